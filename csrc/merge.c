/* Exact combination of two results of attention over disjoint sets of keys, in double: each row weighs by its
 * share of the mass, e^lse. */
#include <math.h>

#include "adaattn.h"
#include "memory.h"
#include "parallel.h"
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
    *weight_a = *weight_b = 0;
    if (a == -INFINITY && b == -INFINITY) return -INFINITY;
    double mass_a = exp(a - m), mass_b = exp(b - m), mass = mass_a + mass_b;
    *weight_a = mass_a / mass, *weight_b = mass_b / mass;
    return m + log(mass);
}

typedef struct {
    const ada_merge_problem *m;
    const ada_kernels *k;
    double *rows; /* of worker w: two of E from rows + 2 * E * w */
} merge_run;

static void merge_task(void *context, ada_job *job, int64_t head, int worker) {
    const merge_run *r = context;
    const ada_merge_problem *m = r->m;
    const int64_t b = head / m->out_a.shape[1], h = head % m->out_a.shape[1];
    const int E = (int)m->out_a.shape[3];
    double *row_a = r->rows + 2 * (int64_t)E * worker, *row_b = row_a + E;
    for (int64_t i = 0; i < m->out_a.shape[2] && !ada_job_cancelled(job, worker); i++) {
        double weight_a, weight_b, lse_a = load_lse(&m->lse_a, b, h, i), lse_b = load_lse(&m->lse_b, b, h, i);
        double lse = share(lse_a, lse_b, &weight_a, &weight_b);
        ada_load_rows_f64(r->k, row_a, E, &m->out_a, b, h, i, 1, E);
        ada_load_rows_f64(r->k, row_b, E, &m->out_b, b, h, i, 1, E);
        /* A side that saw no key says nothing, not even NaN. */
        for (int e = 0; e < E; e++)
            row_a[e] = (lse_a == -INFINITY ? 0 : weight_a * row_a[e]) +
                       (lse_b == -INFINITY ? 0 : weight_b * row_b[e]);
        ada_store_rows_f64(r->k, &m->out, b, h, i, 1, E, row_a, E);
        if (m->lse.dtype == ADA_F64)
            *(double *)lse_at(&m->lse, b, h, i) = lse;
        else
            *(float *)lse_at(&m->lse, b, h, i) = (float)lse;
    }
}

ada_status ada_merge(const ada_merge_problem *m, bool (*interrupt)(void *), void *context, ada_error *error) {
    const int64_t *shape = m->out_a.shape, heads = shape[0] * shape[1];
    const int64_t rows_worth_a_thread = 1 + (1 << 16) / shape[3];
    int64_t threads = 1 + heads * shape[2] / rows_worth_a_thread;
    if (threads > ada_get_num_threads()) threads = ada_get_num_threads();
    if (threads > ADA_MAX_THREADS) threads = ADA_MAX_THREADS;
    const int64_t bytes = threads * 2 * shape[3] * (int64_t)sizeof(double);
    merge_run run = {m, ada_kernels_get(), ada_scratch_take(bytes)};
    if (!run.rows)
        return ada_fail(error, ADA_ERR_MEMORY, "merge: no memory for %lld bytes of scratch",
                        (long long)bytes);
    bool done = ada_parallel_for(heads, (int)threads, merge_task, &run, interrupt, context);
    ada_scratch_give_back(run.rows);
    return done ? ADA_OK : ada_fail(error, ADA_INTERRUPTED, "merge: interrupted");
}
