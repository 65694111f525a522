/* Budgets on a GPU: its part of the one path (attending.h). The device computes figures of a part of the keys
 * and of some queries, from which the same code guesses; no rows are profiled, since verification finds out
 * what a guess missed and costs less. Masks are not looked at before rows are exact.
 */
#include "gpu_budget.h"

#include <math.h>
#include <string.h>

#include "gpu_lowrank.h"
#include "gpu_sparse.h"
#include "memory.h"
#include "visible.h"

/* To start the probe's kernels and hear from them. */
#define LOOK_SECONDS 2e-5
/* Blocks of keys that tell enough of a head. */
#define LOOK_BLOCKS 32

_Static_assert(ADA_GUESS_ROWS <= ADA_MOST_ROWS && ADA_CUDA_BLOCK == ADA_BLOCK, "the ABI's are the engine's");

typedef struct {
    ada_cuda_call *call;
    ada_cuda_keys *keys; /* [key heads] those that are looked at */
    float *sums;         /* [key heads][3][E] */
    ada_cuda_row *rows;  /* [B * H][ADA_MOST_ROWS] */
    ada_cuda_figures *figures;
    double *o, *lse, *out_o, *out_lse; /* of rows, [rows][E] and [rows]: exact ones, and the output's */
    int64_t *at;                       /* [B * H] where a head's rows begin */
    ada_cuda_thin *thin;               /* [B * H] */
    int64_t *dense;                    /* [B * H] */
} on_device;

static void carve(ada_attending *a, ada_carver *c) {
    const ada_problem *p = a->p;
    on_device *d = a->device;
    const int64_t heads = p->B * p->H, rows = heads * ADA_MOST_ROWS, key_heads = p->B * p->G;
    d->keys = ada_carve(c, key_heads * (int64_t)sizeof *d->keys);
    d->sums = ada_carve(c, key_heads * 3 * p->E * (int64_t)sizeof *d->sums);
    d->rows = ada_carve(c, rows * (int64_t)sizeof *d->rows);
    d->figures = ada_carve(c, rows * (int64_t)sizeof *d->figures);
    d->o = ada_carve(c, rows * p->E * (int64_t)sizeof *d->o);
    d->lse = ada_carve(c, rows * (int64_t)sizeof *d->lse);
    d->out_o = ada_carve(c, rows * p->E * (int64_t)sizeof *d->out_o);
    d->out_lse = ada_carve(c, rows * (int64_t)sizeof *d->out_lse);
    d->at = ada_carve(c, heads * (int64_t)sizeof *d->at);
    d->thin = ada_carve(c, heads * (int64_t)sizeof *d->thin);
    d->dense = ada_carve(c, heads * (int64_t)sizeof *d->dense);
}

/* ---- probe ---- */

/* The key heads that are looked at, and how many of their keys. */
static int64_t list_keys(ada_attending *a, on_device *d) {
    const ada_problem *p = a->p;
    int64_t n = 0;
    for (int64_t i = 0; i < a->key_heads; i++) {
        if (!a->states[i * a->per_head].look) continue;
        ada_key_probe *keys = &a->keys[i];
        float *sums = d->sums + 3 * i * p->E;
        const int64_t b = i / p->G, first = ada_visible_span(p, b, 0).first;
        const int64_t last = ada_visible_span(p, b, p->T - 1).end, end = last > first ? last : first;
        int64_t start, stop, step = ada_step_of_keys(p, b, 1, &start, &stop);
        step = ada_step_of_keys(p, b, (stop - start + LOOK_BLOCKS - 1) / LOOK_BLOCKS, &start, &stop);
        *keys = ada_key_probe_of(p, false, a->probes + i * a->probe_bytes);
        d->keys[n++] =
            (ada_cuda_keys){(int32_t)i,     (int32_t)first, (int32_t)end, (int32_t)step,   keys->mean,
                            keys->variance, sums,           sums + p->E,  sums + 2 * p->E, 0};
        keys->count = 0;
        for (int64_t block = start; block < stop; block += step) {
            const int64_t low = block * ADA_BLOCK, high = low + ADA_BLOCK;
            const int64_t seen = (high < end ? high : end) - (low > first ? low : first);
            if (seen > 0) keys->count += (double)seen;
        }
        memset(keys->seen, 0, (size_t)ada_block_count(p) * sizeof *keys->seen); /* of none its value's size */
    }
    return n;
}

static double sum_of(const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i];
    return sum;
}

static double squared_norm(const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

/* Guesses a head's forecast from the figures of some rows. */
static void consider(ada_attending *a, const on_device *d, int64_t head) {
    const ada_problem *p = a->p;
    const int64_t b = head / p->H;
    int64_t rows[ADA_GUESS_ROWS];
    ada_query_figures figures[ADA_GUESS_ROWS];
    ada_spreads spreads = {.finite = true};
    const int n = ada_rows_to_guess_by(p, b, rows);
    for (int i = 0; i < n; i++) {
        const ada_cuda_figures *f = &d->figures[d->at[head] + i];
        const double spread = p->scale * p->scale * (double)f->spread;
        figures[i] = (ada_query_figures){f->spread, f->by_mean, f->norm2, f->most};
        spreads.finite &= isfinite(spread) != 0;
        spreads.largest = fmax(spreads.largest, spread);
    }
    ada_guess_by(p, b, &a->keys[head / a->per_head], rows, figures, n, &a->profiles[head * ADA_MOST_ROWS]);
    ada_consider_head(a, head, &spreads);
    ada_mark_seeing_rows(a, head, NULL);
}

static ada_status probe(ada_attending *a, ada_error *error) {
    const ada_problem *p = a->p;
    on_device *d = a->device;
    ada_cuda_failure failure;
    const int64_t keys = list_keys(a, d);
    int64_t n = 0;
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        int64_t rows[ADA_GUESS_ROWS];
        const int found = a->states[i].look ? ada_rows_to_guess_by(p, i / p->H, rows) : 0;
        d->at[i] = n;
        for (int r = 0; r < found; r++) d->rows[n++] = (ada_cuda_row){(int32_t)i, (int32_t)rows[r]};
    }
    if (ada_gpu_table()->probe(d->call, d->keys, keys, d->rows, n, d->figures, &failure))
        return ada_gpu_fail(&failure, error);
    for (int64_t i = 0; i < keys; i++) {
        const ada_cuda_keys *k = &d->keys[i];
        ada_finish_keys(p, k->largest2, sum_of(k->value2, p->E), squared_norm(k->value_most, p->E),
                        squared_norm(k->value_sum, p->E), &a->keys[k->head]);
    }
    for (int64_t i = 0; i < ada_head_count(a); i++)
        if (a->states[i].look) consider(a, d, i);
    return ADA_OK;
}

/* ---- execute and verify ---- */

static ada_status execute(ada_attending *a, const ada_problem *problem, const int64_t *heads, int64_t n,
                          ada_error *error) {
    const ada_cuda_table *t = ada_gpu_table();
    const on_device *d = a->device;
    ada_cuda_failure failure;
    if (ada_gpu_check_choice(t, d->call, problem->precision, error)) return error->status;
    int64_t thin = 0, dense = 0;
    for (int64_t i = 0; i < n; i++) {
        a->ran[heads[i]] = problem->precision;
        if (a->budget2[heads[i]] > 0)
            d->thin[thin++] = ada_gpu_thin_of(a, heads[i]);
        else
            d->dense[dense++] = heads[i];
    }
    if (dense && t->execute(d->call, problem->precision, d->dense, dense, &failure))
        return ada_gpu_fail(&failure, error);
    const bool tell = a->budget->verify || a->budget->report;
    if (thin &&
        t->execute_thin(d->call, problem->precision, d->thin, thin, tell, a->budget->picture, &failure))
        return ada_gpu_fail(&failure, error);
    for (int64_t i = 0; i < thin && tell; i++) a->kept[d->thin[i].head] = d->thin[i].kept;
    /* Verification waits for it anyway: its time is to be counted here. */
    return a->budget->verify && t->synchronize(problem->device, problem->stream, &failure)
               ? ada_gpu_fail(&failure, error)
               : ADA_OK;
}

static ada_status thin(ada_attending *a, ada_error *error) {
    const on_device *d = a->device;
    return ada_gpu_plan_sparse(a, d->call, d->thin, error);
}

static bool leaves_out(const ada_attending *a, ada_choice choice) {
    const on_device *d = a->device;
    return ada_gpu_table()->leaves_out(d->call, choice);
}

static ada_status plan_ranks(ada_attending *a, ada_error *error) {
    const on_device *d = a->device;
    return ada_gpu_plan_ranks(a, d->call, error);
}

static ada_status execute_ranks(ada_attending *a, const ada_low_rank *low, const int64_t *heads, int64_t n,
                                ada_error *error) {
    const on_device *d = a->device;
    return ada_gpu_execute_ranks(a, d->call, low, heads, n, error);
}

static ada_status fetch_norms(ada_attending *a, ada_error *error) {
    const on_device *d = a->device;
    ada_cuda_failure failure;
    return ada_gpu_table()->row_norms(d->call, a->norms, &failure) ? ada_gpu_fail(&failure, error) : ADA_OK;
}

static double output_norm(const ada_attending *a, int64_t head, float *norms, char *scratch) {
    (void)head, (void)scratch;
    double sum = 0;
    for (int64_t i = 0; i < a->p->T; i++) sum += (double)norms[i];
    return sum;
}

static ada_status exact(ada_attending *a, ada_error *error) {
    on_device *d = a->device;
    const int64_t E = a->p->E;
    ada_cuda_failure failure;
    int64_t n = 0;
    bool f64 = false;
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        const ada_head_state *s = &a->states[i];
        d->at[i] = n;
        if (!s->open) continue;
        f64 |= s->exact_f64;
        for (int r = 0; r < s->n; r++) d->rows[n++] = (ada_cuda_row){(int32_t)i, (int32_t)s->rows[r]};
    }
    for (bool again = n > 0; again;) {
        if (ada_gpu_table()->rows(d->call, d->rows, n, f64, d->o, d->lse, d->out_o, d->out_lse, &failure))
            return ada_gpu_fail(&failure, error);
        again = false; /* unless a score's last digit in float is not as fine as wanted */
        for (int64_t i = 0; i < n && !f64; i++)
            again |= ADA_FINER * 0x1p-24 * fabs(d->lse[i]) > a->budget->tolerance;
        f64 |= again;
    }
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        const ada_head_state *s = &a->states[i];
        for (int r = 0; s->open && !s->known && r < s->n; r++) {
            const double *o = d->o + (d->at[i] + r) * E;
            bool good = !isnan(d->lse[d->at[i] + r]);
            for (int64_t e = 0; e < E; e++) good &= isfinite(o[e]) != 0;
            memcpy(a->exact_o + (i * ADA_MOST_ROWS + r) * E, o, (size_t)E * sizeof *o);
            a->exact_lse[i * ADA_MOST_ROWS + r] = good ? d->lse[d->at[i] + r] : NAN;
        }
    }
    return ADA_OK;
}

static int output(const ada_attending *a, int64_t head, int i, int e, double *x) {
    const on_device *d = a->device;
    const int left = (int)a->p->E - e, width = left < ADA_PIECE ? left : ADA_PIECE;
    memcpy(x, d->out_o + (d->at[head] + i) * a->p->E + e, (size_t)width * sizeof *x);
    return width;
}

static double output_lse(const ada_attending *a, int64_t head, int i) {
    const on_device *d = a->device;
    return d->out_lse[d->at[head] + i];
}

ada_status ada_gpu_attend_within(const ada_problem *p, ada_cuda_call *call, ada_budget *budget,
                                 bool (*interrupt)(void *), void *context, ada_error *error) {
    static const ada_backend backend = {.carve = carve,
                                        .probe = probe,
                                        .execute = execute,
                                        .fetch_norms = fetch_norms,
                                        .output_norm = output_norm,
                                        .exact = exact,
                                        .output = output,
                                        .output_lse = output_lse,
                                        .thin = thin,
                                        .leaves_out = leaves_out,
                                        .plan_ranks = plan_ranks,
                                        .execute_ranks = execute_ranks,
                                        .look_operations = 0,
                                        .look_seconds = LOOK_SECONDS};
    on_device d = {.call = call};
    const ada_rate *given = budget->rates;
    ada_rate rates[ADA_CANDIDATES];
    for (int i = 0; i < ADA_CANDIDATES; i++) {
        const ada_rung own = p->query.dtype == ADA_F16    ? ADA_RUNG_FP16
                             : p->query.dtype == ADA_BF16 ? ADA_RUNG_BF16
                                                          : ADA_RUNG_AUTO;
        rates[i] = ada_gpu_table()->computes(call, ada_candidates[i]) ? given[i] : (ada_rate){.sparse = 1};
        if (ada_candidates[i].qk == own && ada_candidates[i].pv == own) rates[i].pack_ns = 0;
    }
    budget->rates = rates; /* for as long as they are there */
    const ada_status status = ada_attend_within(p, &backend, &d, budget, interrupt, context, error);
    budget->rates = given;
    return status;
}
