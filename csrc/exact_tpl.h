/* Exact rows in REAL, block by block with an online softmax. Included by exact.c behind read_tpl.h; OF_FLOATS
 * names kernels of single queries whose keys and values are floats. */
typedef struct {
    REAL *q, *k, *v, *o, *s, *bias, *reference;
} KIND(exact_scratch);

static KIND(exact_scratch) KIND(exact_scratch_of)(const ada_problem *p, ada_carver *c) {
    const int64_t real = sizeof(REAL), blocks = ada_exact_keys(p) / ADA_BLOCK;
    KIND(exact_scratch) s;
    s.q = ada_carve(c, ADA_EXACT_ROWS * p->D * real);
    s.k = ada_carve(c, ADA_BLOCK * p->D * real);
    s.v = ada_carve(c, ADA_BLOCK * p->E * real);
    s.o = ada_carve(c, ADA_EXACT_ROWS * p->E * real);
    s.s = ada_carve(c, ADA_EXACT_ROWS * ADA_BLOCK * real);
    s.bias = ada_carve(c, ADA_BLOCK * real);
    s.reference = ada_carve(c, ADA_EXACT_ROWS * blocks * real); /* that weights of a block are relative to */
    return s;
}

/* Sum and sum of squares of the visible ones of n scores, in parts that vectorise. */
static void KIND(add_scores)(const REAL *x, int n, uint64_t visible, double *sum, double *square) {
    enum { PARTS = 8 };
    REAL s[PARTS] = {0}, q[PARTS] = {0}, copy[ADA_BLOCK];
    for (int j = 0; j < ADA_BLOCK; j++) copy[j] = j < n && (visible >> j & 1) ? x[j] : 0;
    if (n == ADA_BLOCK && visible == UINT64_MAX) memcpy(copy, x, sizeof copy);
    for (int j = 0; j < ADA_BLOCK; j += PARTS)
        for (int i = 0; i < PARTS; i++) s[i] += copy[j + i], q[i] += copy[j + i] * copy[j + i];
    for (int i = 0; i < PARTS; i++) *sum += (double)s[i], *square += (double)q[i];
}

/* n rows of (b, h) from j as row kernels read them: as floats where they lie, or as REAL. */
static const void *KIND(keys_at)(const ada_kernels *k, const ada_array *a, int64_t b, int64_t h, int64_t j,
                                 int n, REAL *copy, ptrdiff_t *ld, bool *floats) {
    *floats = a->dtype == ADA_F32 && (a->stride[3] == (int64_t)sizeof(float) || a->shape[3] == 1);
    if (!*floats) return KIND(rows_at)(k, a, b, h, j, n, copy, ld);
    *ld = a->stride[2] / (ptrdiff_t)sizeof(float);
    return ada_row_at(a, b, h, j);
}

static void KIND(exact_rows)(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                             const int64_t *queries, int rows, const KIND(exact_scratch) * s,
                             ada_exact *exact) {
    const int D = (int)p->D, E = (int)p->E;
    const int64_t g = h / (p->H / p->G), keys = ada_exact_keys(p), blocks = keys / ADA_BLOCK;
    KIND(ada_row) row[ADA_EXACT_ROWS];
    ada_span span = {INT64_MAX, 0};
    for (int r = 0; r < rows; r++) {
        KIND(load_query)(p, k, s->q + r * D, b, h, queries[r]);
        row[r] = (KIND(ada_row)){s->o + r * E, -INFINITY, 0, E};
        exact->good[r] = true;
        const ada_span own = ada_visible_span(p, b, queries[r]);
        if (own.end <= own.first) continue;
        if (own.first < span.first) span.first = own.first;
        if (own.end > span.end) span.end = own.end;
    }
    memset(s->o, 0, (size_t)(rows * E) * sizeof(REAL));
    if (exact->p) memset(exact->p, 0, (size_t)(rows * keys) * sizeof(float));
    if (span.end == 0) span.first = 0;
    span.first -= span.first % ADA_BLOCK;
    for (int64_t j = span.first; j < span.end; j += ADA_BLOCK) {
        const int nk = (int)(span.end - j < ADA_BLOCK ? span.end - j : ADA_BLOCK);
        const uint64_t all = nk == 64 ? UINT64_MAX : ((uint64_t)1 << nk) - 1;
        ptrdiff_t ldk, ldv;
        bool floats[2];
        const void *key = KIND(keys_at)(k, &p->key, b, g, j, nk, s->k, &ldk, &floats[0]);
        const char *value = KIND(keys_at)(k, &p->value, b, g, j, nk, s->v, &ldv, &floats[1]);
        const ptrdiff_t value_bytes = ldv * (ptrdiff_t)(floats[1] ? sizeof(float) : sizeof(REAL));
        uint64_t visible[ADA_EXACT_ROWS], common = all;
        for (int r = 0; r < rows; r += ADA_ROW_GROUP)
            (floats[0] ? k->OF_FLOATS(row_scores) : k->KIND(row_scores))(
                s->s + r * ADA_BLOCK, s->q + r * D, rows - r < ADA_ROW_GROUP ? rows - r : ADA_ROW_GROUP, key,
                ldk, nk, D);
        for (int r = 0; r < rows; r++) {
            const ada_patch patch = {b, h, queries[r], j, 1, nk};
            REAL *x = s->s + r * ADA_BLOCK;
            visible[r] = all;
            const bool seen = exact->good[r] && ada_visible_rows(p, &patch, &visible[r]) != ADA_HIDDEN;
            if (!seen) visible[r] = 0;
            visible[r] &= all;
            if (seen && exact->p)
                KIND(add_scores)(x, nk, visible[r], &exact->score_sum[r], &exact->score_square[r]);
            if (seen) exact->good[r] = KIND(weigh_row)(p, k, &patch, s->bias, &visible[r], &row[r], x);
            if (!seen || !exact->good[r]) visible[r] = 0;
            for (int c = 0; exact->p && visible[r] && c < nk; c++) exact->p[r * keys + j + c] = (float)x[c];
            s->reference[r * blocks + j / ADA_BLOCK] = row[r].m;
            exact->visible[r] += __builtin_popcountll(visible[r]);
            common &= visible[r];
        }
        const int together = common == all ? ADA_ROW_GROUP : 1; /* what is hidden is not read */
        for (int r = 0; r < rows; r += together) ADA_FOR_RUNS(common == all ? all : visible[r], first, n)
        (floats[1] ? k->OF_FLOATS(row_values) : k->KIND(row_values))(
            s->o + r * E, E, s->s + r * ADA_BLOCK + first, rows - r < together ? rows - r : together,
            value + first * value_bytes, ldv, n, E);
    }
    for (int r = 0; r < rows; r++) {
        const double factor = ada_row_factor(p, h, (double)row[r].m, (double)row[r].l, &exact->lse[r]);
        exact->reference[r] = row[r].l > 0 ? (double)row[r].m * ADA_LN2 : 0;
        exact->score_sum[r] *= ADA_LN2, exact->score_square[r] *= ADA_LN2 * ADA_LN2;
        for (int e = 0; e < E; e++) {
            exact->o[r * E + e] = (double)s->o[r * E + e] * factor;
            exact->good[r] &= isfinite(exact->o[r * E + e]) != 0;
        }
        for (int64_t block = span.first / ADA_BLOCK; exact->p && block * ADA_BLOCK < span.end; block++) {
            const double lag = (double)s->reference[r * blocks + block] - (double)row[r].m;
            const float f = row[r].l > 0 && lag > -1000 ? (float)(exp2(lag) * factor) : 0;
            float *x = exact->p + r * keys + block * ADA_BLOCK;
            for (int c = 0; c < ADA_BLOCK; c++) x[c] *= f;
        }
    }
}
