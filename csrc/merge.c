/* Exact combination of two results of attention over disjoint sets of keys, in double: each row weighs by its share
 * of the mass, e^lse. */
#include <math.h>

#include "adaattn.h"
#include "memory.h"
#include "rows.h"

static char *lse_at(const ada_array *a, int64_t b, int64_t h, int64_t i) {
    return (char *)a->data + b * a->stride[0] + h * a->stride[1] + i * a->stride[2];
}

static double load_lse(const ada_array *a, int64_t b, int64_t h, int64_t i) {
    const char *at = lse_at(a, b, h, i);
    return a->dtype == ADA_F64 ? *(const double *)at : *(const float *)at;
}

/* The weights of both sides and the lse of the whole. */
static double share(double a, double b, double *weight_a, double *weight_b) {
    double m = a > b ? a : b;
    if (m == -INFINITY) {
        *weight_a = *weight_b = 0;
        return m;
    }
    double mass_a = exp(a - m), mass_b = exp(b - m), mass = mass_a + mass_b;
    *weight_a = mass_a / mass, *weight_b = mass_b / mass;
    return m + log(mass);
}

ada_status ada_merge(const ada_merge_problem *m, ada_error *error) {
    const ada_kernels *k = ada_kernels_get();
    const int64_t *shape = m->out_a.shape;
    const int E = (int)shape[3];
    const int64_t bytes = 2 * shape[3] * (int64_t)sizeof(double);
    double *row_a = ada_scratch_take(bytes), *row_b = row_a + E;
    if (!row_a) return ada_fail(error, ADA_ERR_MEMORY, "merge: no memory for %lld bytes of scratch", (long long)bytes);
    for (int64_t b = 0; b < shape[0]; b++)
        for (int64_t h = 0; h < shape[1]; h++)
            for (int64_t i = 0; i < shape[2]; i++) {
                double weight_a, weight_b;
                double lse = share(load_lse(&m->lse_a, b, h, i), load_lse(&m->lse_b, b, h, i), &weight_a, &weight_b);
                ada_load_rows_f64(k, row_a, E, &m->out_a, b, h, i, 1, E);
                ada_load_rows_f64(k, row_b, E, &m->out_b, b, h, i, 1, E);
                /* A side without mass says nothing, not even NaN. */
                for (int e = 0; e < E; e++)
                    row_a[e] = (weight_a == 0 ? 0 : weight_a * row_a[e]) + (weight_b == 0 ? 0 : weight_b * row_b[e]);
                ada_store_rows_f64(k, &m->out, b, h, i, 1, E, row_a, E);
                if (m->lse.dtype == ADA_F64)
                    *(double *)lse_at(&m->lse, b, h, i) = lse;
                else
                    *(float *)lse_at(&m->lse, b, h, i) = (float)lse;
            }
    ada_scratch_give_back(row_a);
    return ADA_OK;
}
