/* Rows of dQ and of dK, dV, each for itself, in REAL: what the gradients of a head are compared with. The
 * including file defines REAL and KIND(name) as for backward_tpl.h.
 */
typedef struct {
    REAL *one, *other;  /* [ADA_ROW_GROUP][D] and [E] of those that are computed */
    REAL *x, *g, *cap;  /* [ADA_ROW_GROUP][whole blocks of S, or one]: scores, gradients of weights, slope of
                           the cap */
    REAL *left, *right; /* [ADA_BLOCK][D] and [E] of those they meet */
    REAL *bias;         /* [ADA_BLOCK][ADA_BLOCK] */
    REAL *s, *t;        /* [ADA_ROW_GROUP][ADA_BLOCK] */
    REAL *sum, *sum2;   /* [ADA_ROW_GROUP][D] and [E] */
} KIND(truth);

static KIND(truth) KIND(truth_of)(const back_run *r, ada_carver *c) {
    const ada_problem *p = r->p;
    const int64_t D = p->D, E = p->E, real = sizeof(REAL), rows = ADA_ROW_GROUP;
    const int64_t all = rows * r->blocks * ADA_BLOCK * real;
    KIND(truth) s;
    s.one = ada_carve(c, rows * D * real), s.other = ada_carve(c, rows * E * real);
    s.x = ada_carve(c, all), s.g = ada_carve(c, all), s.cap = ada_carve(c, all);
    s.left = ada_carve(c, ADA_BLOCK * D * real), s.right = ada_carve(c, ADA_BLOCK * E * real);
    s.bias = ada_carve(c, ADA_BLOCK * ADA_BLOCK * real);
    s.s = ada_carve(c, rows * ADA_BLOCK * real), s.t = ada_carve(c, rows * ADA_BLOCK * real);
    s.sum = ada_carve(c, rows * D * real), s.sum2 = ada_carve(c, rows * E * real);
    return s;
}

static double KIND(power_of_2)(double y) {
    return sizeof(REAL) == sizeof(float) ? (double)exp2f((float)y) : exp2(y);
}

/* Caps n scores; cap gets the slope there. */
static void KIND(cap_scores)(const back_run *r, REAL *x, REAL *cap, int n) {
    const REAL most = (REAL)(r->p->softcap * ADA_LOG2E);
    for (int i = 0; !r->p->has_softcap && i < n; i++) cap[i] = 1;
    if (!r->p->has_softcap) return;
    r->k->KIND(softcap)(x, n, most);
    for (int i = 0; i < n; i++) cap[i] = 1 - x[i] / most * (x[i] / most);
}

/* sum[r] += w[r][i] rows[i] over the bits of seen[r]: what is hidden is not read. */
static void KIND(add_rows)(const back_run *r, REAL *sum, const REAL *w, const uint64_t *seen, int n,
                           const REAL *rows, ptrdiff_t ld, int count, int width) {
    uint64_t common = ada_first_bits(count);
    for (int x = 0; x < n; x++) common &= seen[x];
    if (common == ada_first_bits(count)) {
        r->k->KIND(row_values)(sum, width, w, n, rows, ld, count, width);
        return;
    }
    for (int x = 0; x < n; x++) ADA_FOR_RUNS(seen[x], first, length)
    r->k->KIND(row_values)(sum + x * width, width, w + x * ADA_BLOCK + first, 1, rows + first * ld, ld,
                           length, width);
}

/* Rows i[0 ... n - 1] of dQ in dq, and what else is known of them. */
static void KIND(true_rows)(const back_run *r, int64_t b, int64_t h, const int64_t *i, int n, char *scratch,
                            ada_true_row *truth, double *dq) {
    const ada_problem *p = r->p;
    const int D = (int)p->D, E = (int)p->E;
    const int64_t g = h / (p->H / p->G), ldx = r->blocks * ADA_BLOCK;
    const double sink = ada_sink(p, h) * ADA_LOG2E, kept = 1 / (1 - p->dropout_p);
    ada_carver carver = {scratch, 0};
    const KIND(truth) s = KIND(truth_of)(r, &carver);
    uint64_t seen[ADA_ROW_GROUP];
    ptrdiff_t ldk, ldv;
    for (int x = 0; x < n; x++) {
        KIND(load_query)(p, r->k, s.one + x * D, b, h, i[x]);
        KIND(ada_load_rows)(r->k, s.other + x * E, E, &r->x->grad_out, b, h, i[x], 1, E);
    }
    for (int64_t block = 0; block < r->blocks; block++) {
        const int64_t j = block * ADA_BLOCK;
        const int nk = ada_keys_of_block(p, block);
        uint64_t any = 0;
        for (int x = 0; x < n; x++) {
            const ada_patch patch = {b, h, i[x], j, 1, nk};
            seen[x] = UINT64_MAX;
            if (ada_visible_rows(p, &patch, &seen[x]) == ADA_HIDDEN) seen[x] = 0;
            any |= seen[x];
            for (int c = 0; c < nk; c++) s.x[x * ldx + j + c] = -INFINITY;
        }
        if (!any) continue;
        const REAL *k = KIND(rows_at)(r->k, &p->key, b, g, j, nk, s.left, &ldk);
        const REAL *v = KIND(rows_at)(r->k, &p->value, b, g, j, nk, s.right, &ldv);
        r->k->KIND(row_scores)(s.s, s.one, n, k, ldk, nk, D);
        r->k->KIND(row_scores)(s.t, s.other, n, v, ldv, nk, E);
        for (int x = 0; x < n; x++) {
            const ada_patch patch = {b, h, i[x], j, 1, nk};
            REAL *to = s.x + x * ldx + j, *gradient = s.g + x * ldx + j, *cap = s.cap + x * ldx + j;
            REAL *score = s.s + x * ADA_BLOCK;
            uint64_t keep = UINT64_MAX;
            const bool biased = KIND(bias_rows)(p, r->k, s.bias, &patch);
            if (p->drop_below) ada_kept_rows(p, r->k, &patch, &keep);
            KIND(cap_scores)(r, score, cap, nk);
            for (int c = 0; c < nk; c++) {
                const bool hidden = !(seen[x] >> c & 1) || (biased && s.bias[c] == -INFINITY);
                to[c] = hidden ? -INFINITY : score[c] + (biased ? s.bias[c] : 0);
                gradient[c] = hidden || !(keep >> c & 1) ? 0 : s.t[x * ADA_BLOCK + c] * (REAL)kept;
            }
        }
    }
    memset(s.sum, 0, (size_t)(n * D) * sizeof(REAL));
    for (int x = 0; x < n; x++) {
        REAL *score = s.x + x * ldx, *gradient = s.g + x * ldx, *cap = s.cap + x * ldx;
        double m = sink, l = 0, delta = 0;
        for (int64_t j = 0; j < p->S; j++) m = fmax(m, (double)score[j]);
        const double from = m > -INFINITY ? m : 0;
        for (int64_t j = 0; j < p->S; j++) { /* scores to weights; what is hidden stays below 0 */
            if (score[j] == -INFINITY) continue;
            const double w = KIND(power_of_2)((double)score[j] - from);
            l += w, delta += w * (double)gradient[j];
            score[j] = (REAL)w;
        }
        l += exp2(sink - from), delta = l > 0 ? delta / l : 0;
        truth[x] = (ada_true_row){.lse = from + log2(l), .delta = delta};
        for (int d = 0; d < D; d++)
            truth[x].query2 += (double)s.one[x * D + d] * (double)s.one[x * D + d] * (ADA_LN2 * ADA_LN2);
        for (int e = 0; e < E; e++) truth[x].grad2 += (double)s.other[x * E + e] * (double)s.other[x * E + e];
        for (int64_t j = 0; j < p->S; j++) {
            if (score[j] == -INFINITY) continue;
            const double w = (double)score[j] / l, slope = w * (double)cap[j];
            const double d = slope * ((double)gradient[j] - delta);
            truth[x].weight2 += w * w, truth[x].slope2 += slope * slope;
            truth[x].score2 += d * d, truth[x].both += d * slope;
            gradient[j] = (REAL)d;
        }
    }
    for (int64_t block = 0; block < r->blocks; block++) {
        const int64_t j = block * ADA_BLOCK;
        const int nk = ada_keys_of_block(p, block);
        uint64_t any = 0;
        for (int x = 0; x < n; x++) {
            seen[x] = 0;
            for (int c = 0; c < nk; c++) {
                seen[x] |= (uint64_t)(s.x[x * ldx + j + c] > -INFINITY) << c;
                s.s[x * ADA_BLOCK + c] = s.g[x * ldx + j + c];
            }
            any |= seen[x];
        }
        if (!any) continue;
        const REAL *k = KIND(rows_at)(r->k, &p->key, b, g, j, nk, s.left, &ldk);
        KIND(add_rows)(r, s.sum, s.s, seen, n, k, ldk, nk, D);
    }
    for (int c = 0; c < n * D; c++) dq[c] = (double)s.sum[c] * p->scale;
}

/* Rows j[0 ... n - 1] of dK and dV in dk and dv, with the lse and delta of the run. */
static void KIND(true_keys)(const back_run *r, int64_t group, const int64_t *j, int n, char *scratch,
                            double *dk, double *dv) {
    const ada_problem *p = r->p;
    const int D = (int)p->D, E = (int)p->E;
    const int64_t b = group / p->G, g = group % p->G, per_group = p->H / p->G;
    const double kept = 1 / (1 - p->dropout_p);
    ada_carver carver = {scratch, 0};
    const KIND(truth) s = KIND(truth_of)(r, &carver);
    uint64_t seen[ADA_ROW_GROUP], see[ADA_ROW_GROUP][ADA_LANES], keep[ADA_LANES];
    for (int x = 0; x < n; x++) {
        KIND(ada_load_rows)(r->k, s.one + x * D, D, &p->key, b, g, j[x], 1, D);
        for (int d = 0; d < D; d++) s.one[x * D + d] *= (REAL)(p->scale * ADA_LOG2E);
        KIND(ada_load_rows)(r->k, s.other + x * E, E, &p->value, b, g, j[x], 1, E);
    }
    memset(s.sum, 0, (size_t)(n * D) * sizeof(REAL)), memset(s.sum2, 0, (size_t)(n * E) * sizeof(REAL));
    for (int64_t h = g * per_group; h < (g + 1) * per_group; h++)
        for (int64_t tile = 0; tile < r->tiles; tile++) {
            const int64_t i = tile * ADA_LANES, row = (b * p->H + h) * p->T + i;
            const int rows = rows_of_tile(p, tile);
            ada_sight sight[ADA_ROW_GROUP];
            bool any = false;
            for (int x = 0; x < n; x++) {
                sight[x] = ada_visible_rows(p, &(ada_patch){b, h, i, j[x], rows, 1}, see[x]);
                any |= sight[x] != ADA_HIDDEN;
            }
            if (!any) continue;
            ptrdiff_t ldq, ldgo;
            const REAL *q = KIND(rows_at)(r->k, &p->query, b, h, i, rows, s.left, &ldq);
            const REAL *go = KIND(rows_at)(r->k, &r->x->grad_out, b, h, i, rows, s.right, &ldgo);
            r->k->KIND(row_scores)(s.s, s.one, n, q, ldq, rows, D);
            r->k->KIND(row_scores)(s.t, s.other, n, go, ldgo, rows, E);
            for (int x = 0; x < n; x++) {
                const ada_patch patch = {b, h, i, j[x], rows, 1};
                REAL *score = s.s + x * ADA_BLOCK, *gradient = s.t + x * ADA_BLOCK, *cap = s.cap;
                const bool biased = KIND(bias_rows)(p, r->k, s.bias, &patch);
                if (p->drop_below) ada_kept_rows(p, r->k, &patch, keep);
                KIND(cap_scores)(r, score, cap, rows);
                seen[x] = 0;
                for (int c = 0; c < rows; c++) {
                    const REAL bias = biased ? s.bias[c * ADA_BLOCK] : 0;
                    const bool hidden = sight[x] == ADA_HIDDEN ||
                                        (sight[x] == ADA_MIXED && !(see[x][c] & 1)) || bias == -INFINITY ||
                                        r->lse[row + c] == -INFINITY;
                    const bool dropped = p->drop_below && !(keep[c] & 1);
                    const double y =
                        (double)score[c] + (double)bias - r->reference[row + c] - r->lse[row + c];
                    const double w = hidden ? 0 : KIND(power_of_2)(y),
                                 from = dropped ? 0 : kept * (double)gradient[c];
                    seen[x] |= (uint64_t)!hidden << c;
                    score[c] = (REAL)(dropped ? 0 : w * kept);
                    gradient[c] = hidden ? 0 : (REAL)(w * (from - r->delta[row + c]) * (double)cap[c]);
                }
            }
            KIND(add_rows)(r, s.sum2, s.s, seen, n, go, ldgo, rows, E);
            KIND(add_rows)(r, s.sum, s.t, seen, n, q, ldq, rows, D);
        }
    for (int c = 0; c < n * D; c++) dk[c] = (double)s.sum[c] * p->scale;
    for (int c = 0; c < n * E; c++) dv[c] = (double)s.sum2[c];
}

/* Sum of w[j] g[j] over the bits of seen, in parts that vectorise where all n are seen. */
static double KIND(sum_seen)(const REAL *w, const REAL *g, uint64_t seen, int n) {
    enum { PARTS = 8 };
    REAL parts[PARTS] = {0};
    double sum = 0;
    int j = 0;
    for (; seen == ada_first_bits(n) && j + PARTS <= n; j += PARTS)
        for (int c = 0; c < PARTS; c++) parts[c] += w[j + c] * g[j + c];
    for (; j < n; j++)
        if (seen >> j & 1) parts[j % PARTS] += w[j] * g[j];
    for (int c = 0; c < PARTS; c++) sum += (double)parts[c];
    return sum;
}

/* The lse and delta of a tile's rows from queries, keys, values and grad_out; the lse beyond a reference
 * where it is to be kept apart. A row with a score that REAL does not hold keeps what it has. */
static void KIND(recompute_rows)(const back_run *r, ada_patch patch, uint64_t rows, bool with_delta,
                                 bool referred, char *scratch) {
    const ada_problem *p = r->p;
    ada_carver carver = {scratch, 0};
    const KIND(scratch) s = KIND(scratch_of)(p, &carver);
    const double sink = ada_sink(p, patch.h) * ADA_LOG2E, kept = 1 / (1 - p->dropout_p);
    KIND(ada_row) state[ADA_LANES];
    double delta[ADA_LANES] = {0};
    for (int i = 0; i < patch.n; i++) state[i] = (KIND(ada_row)){.m = (REAL)fmin(sink, (double)REAL_LARGEST)};
    for (int64_t block = 0; block < r->blocks; block++) {
        KIND(ada_backward_tile) t;
        patch.j = block * ADA_BLOCK, patch.nk = ada_keys_of_block(p, block);
        if (!KIND(see_tile)(r, &s, &patch, &t)) continue;
        KIND(take_block)(r, &s, &patch);
        KIND(score_tile)(r, &s, &t, KIND(take_rows)(r, &p->query, &patch, s.q));
        if (with_delta) {
            const REAL *go = KIND(take_rows)(r, &r->x->grad_out, &patch, s.go);
            r->k->KIND(product)(&(KIND(ada_product)){s.g, go, s.values, ADA_BLOCK, (int)p->E, 1, ADA_LANES,
                                                     t.rows, (int)p->E, t.width, false});
        }
        for (int i = 0; i < patch.n; i++) {
            const uint64_t seen = rows >> i & 1 ? KIND(seen_keys)(&t, i, patch.nk) : 0;
            const uint64_t keep = t.keep ? t.keep[i] : UINT64_MAX;
            const REAL before = state[i].m;
            const int at = i * ADA_BLOCK;
            if (!seen) continue;
            if (!r->k->KIND(row_weights)(&state[i], s.s + at, patch.nk, seen, t.bias ? t.bias + at : NULL,
                                         keep)) {
                rows &= ~((uint64_t)1 << i);
                continue;
            }
            if (before < state[i].m) delta[i] *= exp2((double)before - (double)state[i].m);
            if (with_delta) delta[i] += kept * KIND(sum_seen)(s.s + at, s.g + at, seen & keep, patch.nk);
        }
    }
    const int64_t row = (patch.b * p->H + patch.h) * p->T + patch.i;
    for (int i = 0; i < patch.n; i++) {
        const double m = (double)state[i].m, l = (double)state[i].l + exp2(sink - m);
        if (!(rows >> i & 1) || m == -INFINITY) continue;
        r->reference[row + i] = referred ? m : 0;
        r->lse[row + i] = log2(l) + (referred ? 0 : m);
        if (with_delta) r->delta[row + i] = delta[i] / l;
    }
}
