/* Rows of the arrays and biases of scores as REAL. The including file defines REAL and KIND(name), names of
 * REAL's types and kernels.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define REAL_DTYPE (sizeof(REAL) == sizeof(double) ? ADA_F64 : ADA_F32)
#define REAL_LARGEST ((REAL)(sizeof(REAL) == sizeof(double) ? DBL_MAX : FLT_MAX))

/* n rows of (b, h) from i, as REAL: where they lie if they can be read there, else converted into copy. */
static inline const REAL *KIND(rows_at)(const ada_kernels *k, const ada_array *a, int64_t b, int64_t h,
                                        int64_t i, int n, REAL *copy, ptrdiff_t *ld) {
    int width = (int)a->shape[3];
    if (a->dtype == REAL_DTYPE && (a->stride[3] == (int64_t)sizeof(REAL) || width == 1)) {
        *ld = a->stride[2] / (ptrdiff_t)sizeof(REAL);
        return (const REAL *)ada_row_at(a, b, h, i);
    }
    *ld = width;
    KIND(ada_load_rows)(k, copy, width, a, b, h, i, n, width);
    return copy;
}

/* Query i of (b, h) times scale * log2(e), of which scores come in log2 units. */
static inline void KIND(load_query)(const ada_problem *p, const ada_kernels *k, REAL *q, int64_t b, int64_t h,
                                    int64_t i) {
    KIND(ada_load_rows)(k, q, p->D, &p->query, b, h, i, 1, (int)p->D);
    for (int64_t d = 0; d < p->D; d++) q[d] *= (REAL)(p->scale * ADA_LOG2E);
}

/* The kernels of single queries for any number of them, one group after the other while the keys and values
 * of a block are at hand. */
static inline void KIND(scores_of_rows)(const ada_kernels *k, REAL *s, const REAL *q, int rows,
                                        const REAL *key, ptrdiff_t ldk, int n, int D) {
    for (int r = 0; r < rows; r += ADA_ROW_GROUP)
        k->KIND(row_scores)(s + r * ADA_BLOCK, q + r * D, rows - r < ADA_ROW_GROUP ? rows - r : ADA_ROW_GROUP,
                            key, ldk, n, D);
}
static inline void KIND(add_values_of_rows)(const ada_kernels *k, REAL *o, const REAL *w, int rows,
                                            const REAL *value, ptrdiff_t ldv, int n, int E) {
    for (int r = 0; r < rows; r += ADA_ROW_GROUP)
        k->KIND(row_values)(o + r * E, E, w + r * ADA_BLOCK,
                            rows - r < ADA_ROW_GROUP ? rows - r : ADA_ROW_GROUP, value, ldv, n, E);
}

/* A float mask's values in natural units, row-major with a stride of ADA_BLOCK. */
static inline void KIND(mask_rows)(const ada_problem *p, const ada_kernels *k, REAL *rows,
                                   const ada_patch *patch) {
    ada_array mask = p->attn_mask;
    mask.data = (char *)mask.data + patch->j * mask.stride[3];
    if (mask.dtype != ADA_F64) {
        KIND(ada_load_rows)(k, rows, ADA_BLOCK, &mask, patch->b, patch->h, patch->i, patch->n, patch->nk);
    } else {
        /* The lowest double must stay finite as a float: it does not hide. */
        for (int i = 0; i < patch->n; i++)
            for (int j = 0; j < patch->nk; j++) {
                double x = *(const double *)(ada_row_at(&mask, patch->b, patch->h, patch->i + i) +
                                             j * mask.stride[3]);
                rows[i * ADA_BLOCK + j] = x > -INFINITY && x < -REAL_LARGEST ? -REAL_LARGEST : (REAL)x;
            }
    }
    /* The lowest float16 counts as float32's lowest: it swallows the scores that are added to it. */
    if (mask.dtype == ADA_F16)
        for (int i = 0; i < patch->n; i++)
            for (int j = 0; j < patch->nk; j++)
                if (rows[i * ADA_BLOCK + j] == -65504) rows[i * ADA_BLOCK + j] = -FLT_MAX;
}

/* What a float mask and ALiBi add to the scores of a patch, in log2 units, row-major with a stride of
 * ADA_BLOCK; -inf hides. False when that is nothing. */
static inline bool KIND(bias_rows)(const ada_problem *p, const ada_kernels *k, REAL *rows,
                                   const ada_patch *patch) {
    bool masked = p->attn_mask.data && p->attn_mask.dtype != ADA_BOOL, any = false;
    double slope = p->alibi_slopes.data ? ada_head_value(&p->alibi_slopes, patch->b, patch->h) : 0;
    if (!masked && slope == 0) return false;
    if (masked)
        KIND(mask_rows)(p, k, rows, patch);
    else
        memset(rows, 0, (size_t)patch->n * ADA_BLOCK * sizeof *rows);
    for (int i = 0; i < patch->n; i++) {
        REAL *row = rows + i * ADA_BLOCK;
        if (masked)
            for (int j = 0; j < patch->nk; j++) {
                REAL x = row[j], y = x * (REAL)ADA_LOG2E;
                any |= x != 0;
                y = y < -REAL_LARGEST ? -REAL_LARGEST : y;
                row[j] = x == -INFINITY ? x : y;
            }
        if (slope != 0) {
            int64_t distance = ada_position(p, patch->b, patch->i + i) - patch->j;
            for (int j = 0; j < patch->nk; j++) {
                REAL y = row[j] - (REAL)(slope * ADA_LOG2E * (double)llabs(distance - j));
                row[j] = row[j] > -INFINITY && y < -REAL_LARGEST ? -REAL_LARGEST : y;
            }
        }
    }
    return any || slope != 0;
}

/* Scores of one row to weights; what the bias hides leaves visible. False when REAL does not suffice. bias:
 * [ADA_BLOCK] to write to. */
static inline bool KIND(weigh_row)(const ada_problem *p, const ada_kernels *k, const ada_patch *patch,
                                   REAL *bias, uint64_t *visible, KIND(ada_row) * row, REAL *x) {
    uint64_t keep = UINT64_MAX;
    if (!KIND(bias_rows)(p, k, bias, patch)) bias = NULL;
    for (int j = 0; bias && j < patch->nk; j++)
        if (bias[j] == -INFINITY) *visible &= ~((uint64_t)1 << j);
    if (p->has_softcap) {
        for (int j = 0; j < patch->nk; j++)
            if ((*visible >> j & 1) && !isfinite(x[j])) return false;
        k->KIND(softcap)(x, patch->nk, (REAL)(p->softcap * ADA_LOG2E));
    }
    if (p->drop_below) ada_kept_rows(p, k, patch, &keep);
    return k->KIND(row_weights)(row, x, patch->nk, *visible, bias, keep);
}
