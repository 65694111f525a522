/* One tile of queries against one block of keys on the way back, and the tasks made of them, in REAL. The
 * including file defines REAL, KIND(name) and KIND_FN(name), names of types and kernels of REAL.
 */
#include "read_tpl.h"

typedef struct {
    REAL *keys;       /* [D][ADA_LANES] of the present block, turned, times scale * log2(e) */
    REAL *values;     /* [E][ADA_LANES] turned */
    REAL *copy;       /* [ADA_BLOCK][D] keys as they are */
    REAL *s, *g;      /* [ADA_LANES][ADA_BLOCK] */
    REAL *derivative; /* of the softcap, the same */
    REAL *bias;       /* the same */
    REAL *q, *go;     /* [ADA_LANES][D] and [ADA_LANES][E], rows that could not be read in place */
    REAL *rows;       /* [ADA_BLOCK][max(D, E)] */
    REAL *lse, *reference, *delta; /* [ADA_LANES] */
    uint64_t *visible, *keep;      /* [ADA_LANES] */
} KIND(scratch);

static KIND(scratch) KIND(scratch_of)(const ada_problem *p, ada_carver *c) {
    const int64_t real = sizeof(REAL), tile = ADA_LANES * ADA_BLOCK * real;
    const int64_t keys = ADA_LANES * p->D * real, values = ADA_LANES * p->E * real;
    KIND(scratch) s;
    s.keys = ada_carve(c, keys), s.values = ada_carve(c, values), s.copy = ada_carve(c, keys);
    s.s = ada_carve(c, tile), s.g = ada_carve(c, tile);
    s.derivative = ada_carve(c, p->has_softcap ? tile : 0), s.bias = ada_carve(c, tile);
    s.q = ada_carve(c, keys), s.go = ada_carve(c, values);
    s.rows = ada_carve(c, keys > values ? keys : values);
    s.lse = ada_carve(c, ADA_LANES * real), s.reference = ada_carve(c, ADA_LANES * real);
    s.delta = ada_carve(c, ADA_LANES * real);
    s.visible = ada_carve(c, ADA_LANES * sizeof(uint64_t)),
    s.keep = ada_carve(c, ADA_LANES * sizeof(uint64_t));
    return s;
}

/* The keys and values of a block. */
static void KIND(take_block)(const back_run *r, const KIND(scratch) * s, const ada_patch *patch) {
    const ada_problem *p = r->p;
    const int64_t g = patch->h / (p->H / p->G);
    const int D = (int)p->D, E = (int)p->E, nk = patch->nk, lanes = up_to_step(nk);
    ptrdiff_t ld;
    const REAL *k = KIND(rows_at)(r->k, &p->key, patch->b, g, patch->j, nk, s->rows, &ld);
    r->k->KIND(pack)(s->keys, k, ld, nk, D, lanes, (REAL)(p->scale * ADA_LOG2E));
    for (int j = 0; j < nk; j++) memcpy(s->copy + j * D, k + j * ld, (size_t)D * sizeof *k);
    const REAL *v = KIND(rows_at)(r->k, &p->value, patch->b, g, patch->j, nk, s->rows, &ld);
    r->k->KIND(pack)(s->values, v, ld, nk, E, lanes, 1);
}

/* A tile's rows of queries or grad_out, one after the other: far strides share few sets of a cache. */
static const REAL *KIND(take_rows)(const back_run *r, const ada_array *a, const ada_patch *patch,
                                   REAL *copy) {
    const int width = (int)a->shape[3];
    ptrdiff_t ld;
    const REAL *rows = KIND(rows_at)(r->k, a, patch->b, patch->h, patch->i, patch->n, copy, &ld);
    if (ld == width) return rows;
    for (int i = 0; i < patch->n; i++) memcpy(copy + i * width, rows + i * ld, (size_t)width * sizeof *copy);
    return copy;
}

/* What is visible, added and kept, and the rows' sums; false when no query of the patch sees a key of it. */
static bool KIND(see_tile)(const back_run *r, const KIND(scratch) * s, const ada_patch *patch,
                           KIND(ada_backward_tile) * t) {
    const ada_problem *p = r->p;
    const ada_sight sight = ada_visible_rows(p, patch, s->visible);
    if (sight == ADA_HIDDEN) return false;
    *t = (KIND(ada_backward_tile)){.s = s->s,
                                   .g = r->scores ? s->g : NULL,
                                   .lse = s->lse,
                                   .delta = s->delta,
                                   .kept = (REAL)(1 / (1 - p->dropout_p)),
                                   .rows = patch->n,
                                   .width = up_to_step(patch->nk)};
    const bool whole = sight == ADA_PLAIN && patch->nk == t->width;
    if (!whole) t->visible = s->visible;
    for (int i = 0; sight == ADA_PLAIN && !whole && i < patch->n; i++)
        s->visible[i] = ada_first_bits(patch->nk);
    const int64_t row = (patch->b * p->H + patch->h) * p->T + patch->i;
    uint64_t dead = 0; /* rows that see nothing */
    for (int i = 0; i < patch->n; i++) {
        const double lse = r->lse[row + i];
        s->lse[i] = (REAL)lse, s->delta[i] = (REAL)r->delta[row + i];
        s->reference[i] = (REAL)r->reference[row + i];
        dead |= (uint64_t)(lse == -INFINITY) << i;
    }
    for (int i = 0; dead && i < patch->n; i++) {
        if (!t->visible) s->visible[i] = UINT64_MAX;
        if (dead >> i & 1) s->visible[i] = 0;
    }
    if (dead) t->visible = s->visible;
    if (p->drop_below) {
        ada_kept_rows(p, r->k, patch, s->keep);
        t->keep = s->keep;
    }
    if (KIND(bias_rows)(p, r->k, s->bias, patch)) t->bias = s->bias;
    return true;
}

/* Caps the scores; false when one is not finite. */
static bool KIND(cap_tile)(const back_run *r, const KIND(scratch) * s, const KIND(ada_backward_tile) * t) {
    const REAL cap = (REAL)(r->p->softcap * ADA_LOG2E);
    bool finite = true;
    for (int i = 0; i < t->rows; i++) {
        REAL *row = s->s + i * ADA_BLOCK, *derivative = s->derivative + i * ADA_BLOCK;
        finite &= r->k->KIND(softcap)(row, t->width, cap);
        for (int j = 0; j < t->width; j++) derivative[j] = 1 - row[j] / cap * (row[j] / cap);
    }
    return finite;
}

/* Scores of a tile. False when one is not finite and the softcap would make it so. */
static bool KIND(score_tile)(const back_run *r, const KIND(scratch) * s, const KIND(ada_backward_tile) * t,
                             const REAL *q) {
    const int D = (int)r->p->D;
    r->k->KIND(product)(
        &(KIND(ada_product)){s->s, q, s->keys, ADA_BLOCK, D, 1, ADA_LANES, t->rows, D, t->width, false});
    return !r->p->has_softcap || KIND(cap_tile)(r, s, t);
}

/* Where a row has a reference: adds the bias, if there is one, to the scores, which may swallow them, and
 * then takes the references away. */
static void KIND(refer_tile)(const KIND(scratch) * s, KIND(ada_backward_tile) * t) {
    bool any = false;
    for (int i = 0; i < t->rows; i++) any |= s->reference[i] != 0;
    if (!any) return;
    for (int i = 0; i < t->rows; i++) {
        uint64_t seen = t->visible ? t->visible[i] : UINT64_MAX;
        for (int j = 0; j < t->width; j++) {
            const int at = i * ADA_BLOCK + j;
            if (!(seen >> j & 1)) continue;
            const REAL bias = t->bias ? t->bias[at] : 0;
            if (bias == -INFINITY) seen &= ~((uint64_t)1 << j);
            s->s[at] = s->s[at] + bias - s->reference[i];
        }
        s->visible[i] = seen;
    }
    t->visible = s->visible;
    t->bias = NULL;
}

/* Weights in s and, where wanted, gradients of the scores behind the softcap in g. False when REAL does not
 * hold them. */
static bool KIND(weigh_tile)(const back_run *r, const KIND(scratch) * s, KIND(ada_backward_tile) * t,
                             const REAL *q, const REAL *go) {
    const int E = (int)r->p->E;
    const bool finite = KIND(score_tile)(r, s, t, q);
    if (t->g)
        r->k->KIND(product)(&(KIND(ada_product)){s->g, go, s->values, ADA_BLOCK, E, 1, ADA_LANES, t->rows, E,
                                                 t->width, false});
    KIND(refer_tile)(s, t);
    return r->k->KIND(backward)(t) && finite;
}

/* From the gradients behind the softcap to those before it. */
static void KIND(uncap_tile)(const back_run *r, const KIND(scratch) * s, const KIND(ada_backward_tile) * t) {
    for (int i = 0; r->p->has_softcap && i < t->rows; i++)
        for (int j = 0; j < t->width; j++) s->g[i * ADA_BLOCK + j] *= s->derivative[i * ADA_BLOCK + j];
}

/* Bits of the keys that row i sees. */
static uint64_t KIND(seen_keys)(const KIND(ada_backward_tile) * t, int i, int nk) {
    uint64_t seen = t->visible ? t->visible[i] : UINT64_MAX;
    for (int j = 0; t->bias && j < nk; j++)
        if (t->bias[i * ADA_BLOCK + j] == -INFINITY) seen &= ~((uint64_t)1 << j);
    return seen & ada_first_bits(nk);
}

/* The gradient of the head's slope. */
static double KIND(slope_of_tile)(const back_run *r, const KIND(scratch) * s, const ada_patch *patch) {
    double sum = 0;
    for (int i = 0; i < patch->n; i++) {
        const int64_t distance = ada_position(r->p, patch->b, patch->i + i) - patch->j;
        double row = 0;
        for (int j = 0; j < patch->nk; j++)
            row += (double)s->g[i * ADA_BLOCK + j] * (double)llabs(distance - j);
        sum -= row;
    }
    return sum;
}

static bool KIND(rows_are_finite)(const REAL *rows, int64_t n) {
    bool finite = true;
    for (int64_t i = 0; i < n; i++) finite &= (bool)isfinite(rows[i]);
    return finite;
}

/* What the tile adds to the three gradients, pair by pair, so that those that do not see each other share no
 * NaN. */
static void KIND(add_pairs)(const back_run *r, const KIND(scratch) * s, const KIND(ada_backward_tile) * t,
                            const ada_patch *patch, const REAL *q, const REAL *go, REAL *dq, REAL *dk,
                            REAL *dv) {
    const int D = (int)r->p->D, E = (int)r->p->E;
    const bool *needs = r->x->needs;
    for (int i = 0; i < patch->n; i++) {
        const uint64_t seen = KIND(seen_keys)(t, i, patch->nk);
        for (int j = 0; j < patch->nk; j++) {
            const REAL w = s->s[i * ADA_BLOCK + j], g = t->g ? t->g[i * ADA_BLOCK + j] : 0;
            if (!(seen >> j & 1)) continue;
            for (int e = 0; needs[ADA_OF_VALUE] && e < E; e++) dv[j * E + e] += w * go[i * E + e];
            for (int d = 0; needs[ADA_OF_KEY] && d < D; d++) dk[j * D + d] += g * q[i * D + d];
            for (int d = 0; needs[ADA_OF_QUERY] && d < D; d++) dq[i * D + d] += g * s->copy[j * D + d];
        }
    }
}

/* Adds what the tile contributes to its rows of dq, dk and dv. */
static bool KIND(tile_back)(const back_run *r, const KIND(scratch) * s, const ada_patch *patch,
                            KIND(ada_backward_tile) * t, REAL *dq, REAL *dk, REAL *dv, double *slope) {
    const ada_problem *p = r->p;
    const int D = (int)p->D, E = (int)p->E, n = patch->n, nk = patch->nk;
    const REAL *q = KIND(take_rows)(r, &p->query, patch, s->q);
    const REAL *go = KIND(take_rows)(r, &r->x->grad_out, patch, s->go);
    const bool finite = KIND(weigh_tile)(r, s, t, q, go);
    if (!finite && !r->careful) return false;
    if (r->x->needs[ADA_OF_SLOPES]) *slope += KIND(slope_of_tile)(r, s, patch);
    if (t->g) KIND(uncap_tile)(r, s, t);
    if (r->careful && (t->visible || t->bias) &&
        !(KIND(rows_are_finite)(q, (int64_t)n * D) && KIND(rows_are_finite)(go, (int64_t)n * E) &&
          KIND(rows_are_finite)(s->copy, (int64_t)nk * D) && finite)) {
        KIND(add_pairs)(r, s, t, patch, q, go, dq, dk, dv);
        return true;
    }
    if (r->x->needs[ADA_OF_VALUE])
        r->k->KIND(product)(&(KIND(ada_product)){dv, s->s, go, E, 1, ADA_BLOCK, E, nk, n, E, true});
    if (r->x->needs[ADA_OF_KEY])
        r->k->KIND(product)(&(KIND(ada_product)){dk, s->g, q, D, 1, ADA_BLOCK, D, nk, n, D, true});
    if (r->x->needs[ADA_OF_QUERY])
        r->k->KIND(product)(&(KIND(ada_product)){dq, s->g, s->copy, D, ADA_BLOCK, 1, D, n, nk, D, true});
    return true;
}

/* NULL where they are not wanted. */
static REAL *KIND(sums_at)(const back_run *r, int which, int64_t at) {
    return r->x->needs[which] ? (REAL *)r->sums[which] + at : NULL;
}

/* Asks for rows i ... i + n - 1 of (b, h). */
static void KIND(prefetch_rows)(const ada_array *a, int64_t b, int64_t h, int64_t i, int64_t n) {
    const int64_t bytes = a->shape[3] * ada_dtype_bytes(a->dtype);
    if (a->stride[3] != ada_dtype_bytes(a->dtype)) return;
    for (int64_t row = i; row < i + n && row < a->shape[2]; row++)
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(ada_row_at(a, b, h, row) + at, 0, 2);
}

/* One part of the keys of a key head against one part of the queries of its heads. */
static bool KIND(part_back)(const back_run *r, int64_t group, int64_t key_part, int64_t query_part,
                            ada_job *job, int worker) {
    const ada_problem *p = r->p;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const KIND(scratch) s = KIND(scratch_of)(p, &carver);
    const int64_t b = group / p->G, per_group = p->H / p->G, h = group % p->G * per_group;
    const int64_t at = group - r->first, keys = ada_key_count(p, b), D = p->D, E = p->E;
    const ada_range blocks = part_of(r->blocks, r->key_parts, key_part);
    const ada_range tiles = part_of(r->tiles, r->query_parts, query_part);
    for (int64_t block = blocks.first; block < blocks.end && block * ADA_BLOCK < keys; block++) {
        const int64_t j = block * ADA_BLOCK;
        ada_patch patch = {.b = b, .j = j, .nk = (int)(keys - j < ADA_BLOCK ? keys - j : ADA_BLOCK)};
        REAL *dk = KIND(sums_at)(r, ADA_OF_KEY, (at * p->S + j) * D);
        REAL *dv = KIND(sums_at)(r, ADA_OF_VALUE, (at * p->S + j) * E);
        bool taken = false;
        for (patch.h = h; patch.h < h + per_group; patch.h++)
            for (int64_t tile = tiles.first; tile < tiles.end; tile++) {
                if (ada_job_cancelled(job, worker)) return true;
                KIND(ada_backward_tile) t;
                patch.i = tile * ADA_LANES;
                patch.n = rows_of_tile(p, tile);
                if (!KIND(see_tile)(r, &s, &patch, &t)) continue;
                if (!taken) {
                    KIND(take_block)(r, &s, &patch);
                    taken = true;
                }
                const int64_t row = (at * per_group + patch.h - h) * p->T + patch.i;
                REAL *dq = KIND(sums_at)(r, ADA_OF_QUERY, row * D);
                double *slope = r->slopes + (b * p->H + patch.h) * r->key_parts + key_part;
                if (!KIND(tile_back)(r, &s, &patch, &t, dq, dk, dv, slope)) return false;
                /* The next block, a slice for each tile. */
                const int64_t next = j + ADA_BLOCK + (tile - tiles.first) * SLICE;
                if (next >= j + 2 * ADA_BLOCK) continue;
                KIND(prefetch_rows)(&p->key, b, group % p->G, next, SLICE);
                KIND(prefetch_rows)(&p->value, b, group % p->G, next, SLICE);
            }
    }
    return true;
}

/* Multiplies those of a key head's sums that lack it with the scale; whether all are finite. */
static bool KIND(scale_sums)(const back_run *r, int64_t group) {
    REAL rest[8] = {0}; /* NaN where one is not finite */
    for (int i = 0; i <= ADA_OF_VALUE; i++) {
        const int64_t n = r->x->needs[i] ? sum_size(r->p, i) : 0;
        const REAL factor = i == ADA_OF_VALUE ? 1 : (REAL)r->p->scale;
        REAL *sums = (REAL *)r->sums[i] + (group - r->first) * n;
        int64_t x = 0;
        for (; x + 8 <= n; x += 8)
            for (int c = 0; c < 8; c++) sums[x + c] *= factor, rest[c] += sums[x + c] - sums[x + c];
        for (; x < n; x++) sums[x] *= factor, rest[0] += sums[x] - sums[x];
    }
    for (int c = 1; c < 8; c++) rest[0] += rest[c];
    return rest[0] == 0;
}

/* Sums of grad_out * out over each of some rows, in double. */
static void KIND(delta_rows)(const back_run *r, int64_t b, int64_t h, int64_t i, int n,
                             const KIND(scratch) * s, double *delta) {
    const int E = (int)r->p->E;
    ptrdiff_t ldx, ldy;
    const REAL *x = KIND(rows_at)(r->k, &r->x->grad_out, b, h, i, n, s->go, &ldx);
    const REAL *y = KIND(rows_at)(r->k, &r->x->out, b, h, i, n, s->rows, &ldy);
    for (int row = 0; row < n; row++, x += ldx, y += ldy) {
        double sum[8] = {0};
        int e = 0;
        for (; e + 8 <= E; e += 8)
            for (int c = 0; c < 8; c++) sum[c] += (double)x[e + c] * (double)y[e + c];
        for (; e < E; e++) sum[0] += (double)x[e] * (double)y[e];
        delta[row] = (sum[0] + sum[1]) + (sum[2] + sum[3]) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    }
}

/* Adds the gradients of the scores behind the softcap, of a head's queries of patch against its keys, to
 * those of the mask; row_step and column_step are 0 where it repeats. */
static bool KIND(mask_back)(const back_run *r, const ada_patch *patch, int row_step, int column_step,
                            double *sum, int worker) {
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const KIND(scratch) s = KIND(scratch_of)(r->p, &carver);
    KIND(ada_backward_tile) t;
    if (!KIND(see_tile)(r, &s, patch, &t)) return true;
    KIND(take_block)(r, &s, patch);
    const REAL *q = KIND(take_rows)(r, &r->p->query, patch, s.q);
    const REAL *go = KIND(take_rows)(r, &r->x->grad_out, patch, s.go);
    if (!KIND(weigh_tile)(r, &s, &t, q, go) && sizeof(REAL) == sizeof(float)) return false;
    for (int i = 0; i < patch->n; i++)
        for (int j = 0; j < patch->nk; j++) sum[i * row_step + j * column_step] += s.g[i * ADA_BLOCK + j];
    return true;
}
