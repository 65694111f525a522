/* Budgets on a GPU: its part of the one path (attending.h). The device computes the figures that csrc/probe.c
 * computes of arrays of the CPU; what follows from them is the same code. Masks are not looked at before rows
 * are exact: statistics are of all keys within the spans.
 */
#include "gpu_budget.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "memory.h"
#include "visible.h"

_Static_assert(ADA_GUESS_ROWS <= ADA_MOST_ROWS && ADA_CUDA_BLOCK == ADA_BLOCK && ADA_CUDA_HEAVY == ADA_HEAVY,
               "the ABI's numbers are the engine's");

/* To start the probe's kernels and hear from them. */
#define LOOK_SECONDS 2e-5

typedef struct {
    ada_cuda_call *call;
    ada_cuda_keys *keys; /* [key heads] those that are looked at */
    float *sums;         /* [key heads][2][E] */
    float *heavy;        /* [B * H][T] */
    ada_cuda_row *rows;  /* [B * H][ADA_MOST_ROWS] */
    ada_cuda_figures *figures;
    ada_cuda_profile *profiles;
    double *lse, *out_lse, *out_o; /* of rows; [rows][E] */
    int64_t *at;                   /* [B * H] where a head's rows begin */
} on_device;

static void carve(const ada_problem *p, ada_carver *c, on_device *d) {
    const int64_t heads = p->B * p->H, rows = heads * ADA_MOST_ROWS, key_heads = p->B * p->G;
    d->keys = ada_carve(c, key_heads * (int64_t)sizeof *d->keys);
    d->sums = ada_carve(c, key_heads * 2 * p->E * (int64_t)sizeof *d->sums);
    d->heavy = ada_carve(c, heads * p->T * (int64_t)sizeof *d->heavy);
    d->rows = ada_carve(c, rows * (int64_t)sizeof *d->rows);
    d->figures = ada_carve(c, rows * (int64_t)sizeof *d->figures);
    d->profiles = ada_carve(c, rows * (int64_t)sizeof *d->profiles);
    d->lse = ada_carve(c, rows * (int64_t)sizeof *d->lse);
    d->out_lse = ada_carve(c, rows * (int64_t)sizeof *d->out_lse);
    d->out_o = ada_carve(c, rows * p->E * (int64_t)sizeof *d->out_o);
    d->at = ada_carve(c, heads * (int64_t)sizeof *d->at);
}

/* ---- probe ---- */

static bool looked_at(const ada_attending *a, int64_t key_head) {
    return a->states[key_head * a->per_head].look != ADA_LOOK_NONE;
}

static int64_t list_keys(ada_attending *a, on_device *d) {
    const ada_problem *p = a->p;
    int64_t n = 0;
    for (int64_t i = 0; i < a->key_heads; i++) {
        if (!looked_at(a, i)) continue;
        ada_key_probe *keys = &a->keys[i];
        const int64_t b = i / p->G;
        const bool some = a->states[i * a->per_head].look == ADA_LOOK_SOME;
        int64_t start, stop;
        *keys = ada_key_probe_of(p, a->probes + i * a->probe_bytes);
        const int64_t step = ada_step_of_keys(p, b, some ? ADA_LOOK_STEP : 1, &start, &stop);
        const int64_t first = ada_visible_span(p, b, 0).first, end = ada_visible_span(p, b, p->T - 1).end;
        d->keys[n++] = (ada_cuda_keys){.head = (int32_t)i,
                                       .first = (int32_t)first,
                                       .end = (int32_t)(end > first ? end : first),
                                       .step = (int32_t)step,
                                       .mean = keys->mean,
                                       .variance = keys->variance,
                                       .value_sum = d->sums + 2 * i * p->E,
                                       .value_most = d->sums + (2 * i + 1) * p->E,
                                       .value2 = keys->value2};
        keys->count = 0;
        const int64_t whole = ada_block_count(p) * ADA_BLOCK; /* what is behind the last key is read too */
        memset(keys->value2 + p->S, 0, (size_t)(whole - p->S) * sizeof *keys->value2);
        memset(keys->seen, 0, (size_t)ada_block_count(p) * sizeof *keys->seen);
        for (int64_t block = start; block < stop; block += step) {
            const int64_t low = block * ADA_BLOCK, from = first > low ? first : low;
            const int64_t to = end < low + ADA_BLOCK ? end : low + ADA_BLOCK;
            if (to > from) keys->seen[block] = 1, keys->count += (double)(to - from);
        }
    }
    return n;
}

static double squared_norm(const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

static void finish_keys(ada_attending *a, ada_cuda_keys *k) {
    const ada_problem *p = a->p;
    ada_key_probe *keys = &a->keys[k->head];
    double value2 = 0;
    for (int64_t j = 0; j < p->S; j++) value2 += (double)k->value2[j];
    ada_finish_keys(p, k->largest2, value2, squared_norm(k->value_most, p->E),
                    squared_norm(k->value_sum, p->E), keys);
    k->heavies = keys->heavies;
    for (int i = 0; i < keys->heavies; i++) {
        k->heavy[i] = (int32_t)keys->heavy[i];
        k->share[i] = (float)((double)keys->value2[keys->heavy[i]] / keys->value2_mean);
    }
}

/* Figures of the rows that guesses are made by. */
static ada_status fetch_figures(ada_attending *a, on_device *d, ada_error *error) {
    int64_t n = 0;
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        int64_t rows[ADA_GUESS_ROWS];
        d->at[i] = n;
        if (!a->states[i].look) continue;
        const int found = ada_rows_to_guess_by(a->p, i / a->p->H, rows);
        for (int r = 0; r < found; r++) d->rows[n++] = (ada_cuda_row){(int32_t)i, (int32_t)rows[r]};
    }
    ada_cuda_failure failure;
    return n && ada_gpu_table()->row_figures(d->call, d->rows, n, d->figures, &failure)
               ? ada_gpu_fail(&failure, error)
               : ADA_OK;
}

static void consider_task(void *context, ada_job *job, int64_t head, int worker) {
    ada_attending *a = context;
    const ada_problem *p = a->p;
    const on_device *d = a->device;
    const int64_t b = head / p->H;
    const ada_key_probe *keys = &a->keys[head / a->per_head];
    int64_t rows[ADA_GUESS_ROWS];
    ada_query_figures figures[ADA_GUESS_ROWS];
    if (!a->states[head].look || ada_job_cancelled(job, worker)) return;
    const int n = ada_rows_to_guess_by(p, b, rows);
    for (int i = 0; i < n; i++) {
        const ada_cuda_figures *f = &d->figures[d->at[head] + i];
        figures[i] = (ada_query_figures){f->spread, f->by_mean, f->norm2, f->most};
    }
    ada_guess_by(p, b, keys, rows, figures, n, &a->profiles[head * ADA_MOST_ROWS]);
    const ada_spreads spreads =
        ada_sizes_of_spreads(p, b, keys->heavies ? d->heavy + head * p->T : NULL, a->sizes + head * p->T);
    ada_consider_head(a, head, &spreads);
}

static void take_profile(const ada_problem *p, const ada_cuda_profile *from, double weight,
                         ada_row_profile *x) {
    const ada_query_figures figures = {from->figures.spread, from->figures.by_mean, from->figures.norm2,
                                       from->figures.most};
    const double count = from->visible > 0 ? (double)from->visible : 1, mean = from->score_sum / count;
    *x = (ada_row_profile){.weight = weight,
                           .out2 = from->out2,
                           .p2d = from->p2d,
                           .p2d_norm = from->p2d_norm,
                           .p2d_step = from->p2d_step,
                           .p2 = from->p2,
                           .p2_norm = from->p2_norm,
                           .p2_step = from->p2_step,
                           .p2v = from->p2v,
                           .pv = from->pv,
                           .entropy = from->entropy,
                           .block_entropy = from->block_entropy,
                           .reference = from->reference,
                           .visible = from->visible,
                           .score_std = sqrt(fmax(from->score_square / count - mean * mean, 0))};
    ada_profile_query(p, &figures, x);
    x->good = isfinite(x->out2) && isfinite(x->p2d_step) && isfinite(x->spread);
}

/* The rows that are chosen of all heads (of open ones alone), one behind another. */
static int64_t list_rows(ada_attending *a, on_device *d, bool only_open, bool only_unknown) {
    int64_t n = 0;
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        const ada_head_state *s = &a->states[i];
        d->at[i] = n;
        if ((only_open && !s->open) || (only_unknown && s->known)) continue;
        for (int r = 0; r < s->n; r++) d->rows[n++] = (ada_cuda_row){(int32_t)i, (int32_t)s->rows[r]};
    }
    return n;
}

static ada_status probe(ada_attending *a, ada_error *error) {
    const ada_problem *p = a->p;
    const ada_cuda_table *t = ada_gpu_table();
    on_device *d = a->device;
    ada_cuda_failure failure;
    const int64_t keys = list_keys(a, d);
    if (t->probe_keys(d->call, d->keys, keys, &failure)) return ada_gpu_fail(&failure, error);
    for (int64_t i = 0; i < keys; i++) finish_keys(a, &d->keys[i]);
    if (t->row_spreads(d->call, d->keys, keys, a->sizes, d->heavy, &failure))
        return ada_gpu_fail(&failure, error);
    if (fetch_figures(a, d, error)) return error->status;
    const double work = (double)(ada_head_count(a) * p->T) * 64;
    if (!ada_run_tasks(a, consider_task, ada_head_count(a), work))
        return ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
    const int64_t rows = list_rows(a, d, false, false);
    if (rows && t->row_profiles(d->call, d->rows, rows, d->profiles, &failure))
        return ada_gpu_fail(&failure, error);
    for (int64_t i = 0; i < ada_head_count(a); i++)
        for (int r = 0; r < a->states[i].n; r++)
            take_profile(p, &d->profiles[d->at[i] + r], a->states[i].weight[r],
                         &a->profiles[i * ADA_MOST_ROWS + r]);
    return ADA_OK;
}

/* ---- execute and verify ---- */

static ada_status execute(ada_attending *a, const ada_problem *problem, const int64_t *heads, int64_t n,
                          ada_error *error) {
    const ada_cuda_table *t = ada_gpu_table();
    const on_device *d = a->device;
    ada_cuda_failure failure;
    if (ada_gpu_check_choice(t, d->call, problem->precision, error)) return error->status;
    if (t->execute(d->call, problem->precision, heads, n, &failure)) return ada_gpu_fail(&failure, error);
    for (int64_t i = 0; i < (heads ? n : ada_head_count(a)); i++)
        a->ran[heads ? heads[i] : i] = problem->precision;
    /* Verification waits for it anyway: its time is to be counted here. */
    return a->budget->verify && t->synchronize(problem->device, problem->stream, &failure)
               ? ada_gpu_fail(&failure, error)
               : ADA_OK;
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
    const ada_cuda_table *t = ada_gpu_table();
    on_device *d = a->device;
    const int64_t E = a->p->E;
    ada_cuda_failure failure;
    int64_t n = list_rows(a, d, true, true);
    if (n && t->exact_rows(d->call, d->rows, n, d->out_o, d->lse, &failure))
        return ada_gpu_fail(&failure, error);
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        const ada_head_state *s = &a->states[i];
        for (int r = 0; s->open && !s->known && r < s->n; r++) {
            const double *o = d->out_o + (d->at[i] + r) * E;
            bool good = !isnan(d->lse[d->at[i] + r]);
            for (int64_t e = 0; e < E; e++) good &= isfinite(o[e]) != 0;
            memcpy(a->exact_o + (i * ADA_MOST_ROWS + r) * E, o, (size_t)E * sizeof *o);
            a->exact_lse[i * ADA_MOST_ROWS + r] = good ? d->lse[d->at[i] + r] : NAN;
        }
    }
    n = list_rows(a, d, true, false);
    return n && t->output_rows(d->call, d->rows, n, d->out_o, d->out_lse, &failure)
               ? ada_gpu_fail(&failure, error)
               : ADA_OK;
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
    static const ada_backend backend = {.probe = probe,
                                        .execute = execute,
                                        .fetch_norms = fetch_norms,
                                        .output_norm = output_norm,
                                        .exact = exact,
                                        .output = output,
                                        .output_lse = output_lse,
                                        .look_seconds = LOOK_SECONDS};
    on_device d = {.call = call};
    ada_carver c = {NULL, 0};
    ada_rate rates[ADA_CANDIDATES];
    for (int i = 0; i < ADA_CANDIDATES; i++)
        rates[i] =
            ada_gpu_table()->computes(call, ada_candidates[i]) ? budget->rates[i] : (ada_rate){{0, 0}, 0};
    budget->rates = rates;
    carve(p, &c, &d);
    char *memory = ada_scratch_take(c.used);
    if (!memory) return ada_no_scratch(c.used, error);
    c = (ada_carver){memory, 0};
    carve(p, &c, &d);
    const ada_status status = ada_attend_within(p, &backend, &d, budget, interrupt, context, error);
    ada_scratch_give_back(memory);
    return status;
}
