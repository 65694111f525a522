/* Low rank on a GPU. */
#include "gpu_lowrank.h"

#include <math.h>
#include <string.h>

#include "execute.h"
#include "gpu_budget.h"
#include "landmarks.h"
#include "memory.h"

/* What the host does for a head, by the 31 to 47 of a Zen 4's thread: heads share threads, but what one of
 * them is computed by must not depend on the others. */
#define HOST_GFLOPS 100
/* Of the best that a device does on plain arithmetic, for landmarks, and for rows that are computed exactly;
 * to hear from the device, and to bring a byte. Assumed, not measured. */
#define PLAIN_SHARE 0.3
#define EXACT_SHARE 0.05
#define LOOK_SECONDS 1.5e-4
#define BYTE_SECONDS 2e-10
/* Rows of a head that are computed exactly to learn how large its output is. */
#define OUT_ROWS 8
/* Of the time of a head of which nothing else is known, for looking at it. */
#define LOOK_SHARE (1.0 / 12)
/* Of samples at a time. */
#define MOST_BYTES ((int64_t)64 << 20)

_Static_assert(ADA_CUDA_FAR == ADA_FURTHEST && ADA_CUDA_BIN == ADA_BIN, "the ABI's are the engine's");

/* Heads whose samples are at hand, and what becomes of them. */
typedef struct {
    ada_attending *a;
    const int64_t *heads;
    int64_t n;
    int64_t query[ADA_LANES];
    ada_cuda_sampling what;
    ada_cuda_sample_at at;
    float *floats; /* [n][at.floats], then what the device is told */
    char *scratch; /* [threads] */
    int64_t scratch_bytes;
    /* To plan: */
    const int *most;
    double *out2; /* [n] */
    ada_rank_speed speed;
    /* To execute: */
    const ada_low_rank *low;
    int64_t first; /* of the call's list, in low */
    ada_landmarks *landmarks;
} batch;

/* As many of the heads as fit. */
static batch batch_of(ada_attending *a, const int64_t *heads, int64_t n) {
    const ada_problem *p = a->p;
    const int64_t step = ada_step_of_queries(p->T);
    batch x = {.a = a, .heads = heads};
    x.what = (ada_cuda_sampling){.keys = p->S < ADA_SAMPLE ? p->S : ADA_SAMPLE,
                                 .queries = ada_even_queries(p->T, x.query),
                                 .measured = (p->T + step - 1) / step,
                                 .step = step};
    x.at = ada_cuda_sample_layout(p->D, p->E, &x.what);
    const int64_t fit = MOST_BYTES / (x.at.floats * (int64_t)sizeof(float));
    x.n = n < fit ? n : fit > 1 ? fit : 1;
    return x;
}

/* Takes the samples into x->floats, to be given back. */
static ada_status take_samples(batch *x, ada_cuda_call *call, ada_error *error) {
    const ada_problem *p = x->a->p;
    const int64_t heads_at = (x->n * x->at.floats * (int64_t)sizeof *x->floats + 63) / 64 * 64;
    const int64_t keys_at = heads_at + x->n * (int64_t)sizeof(ada_cuda_sampled);
    const int64_t bytes = keys_at + x->n * ADA_SAMPLE * (int64_t)sizeof(int64_t);
    ada_cuda_failure failure;
    if (!(x->floats = ada_scratch_take(bytes))) return ada_no_scratch(bytes, error);
    ada_cuda_sampled *const heads = (ada_cuda_sampled *)((char *)x->floats + heads_at);
    for (int64_t i = 0; i < x->n; i++) {
        int64_t *const keys = (int64_t *)((char *)x->floats + keys_at) + i * ADA_SAMPLE;
        ada_far_keys all;
        ada_far_keys_of(p, x->heads[i] / p->H, &all);
        heads[i] = (ada_cuda_sampled){x->heads[i], all.first, all.end, keys, ada_even_keys(&all, keys)};
    }
    x->what.query = x->query;
    if (!ada_gpu_table()->take_sample(call, heads, x->n, &x->what, x->floats, &failure)) return ADA_OK;
    ada_scratch_give_back(x->floats);
    return ada_gpu_fail(&failure, error);
}

static ada_sample sample_of(const batch *x, int64_t index) {
    const float *from = x->floats + index * x->at.floats;
    ada_far_keys all;
    ada_far_keys_of(x->a->p, x->heads[index] / x->a->p->H, &all);
    ada_sample s = {.extent = {.keys = (double)(all.end - all.first),
                               .spread = (double)from[x->at.spread],
                               .queries = (double)x->what.measured},
                    .mean = from + x->at.mean,
                    .query2 = from + x->at.query2,
                    .keys = from + x->at.keys,
                    .values = from + x->at.values,
                    .queries = from + x->at.queries};
    for (int64_t i = 0; i < x->what.measured; i++) s.extent.query2 += (double)s.query2[i];
    for (int i = 0; i < ADA_FURTHEST; i++) {
        int32_t far;
        memcpy(&far, from + x->at.far + i, sizeof far);
        if (far < 0) continue;
        s.extent.far[s.extent.n_far++] = far;
        s.extent.furthest2 = fmax(s.extent.furthest2, (double)from[x->at.far2 + i]);
    }
    return s;
}

/* A task per head of the batch, with scratch for so many landmarks. */
static ada_status run_tasks(batch *x, ada_task_fn *task, int most, ada_error *error) {
    ada_attending *a = x->a;
    const double work = ada_forecast_operations((double)a->p->S, a->p->D, a->p->E, most) / 2;
    const int threads = ada_threads_for(a->p, x->n, (double)x->n * work);
    x->scratch_bytes = ada_landmark_scratch_bytes(a->p, most);
    x->scratch = ada_scratch_take(threads * x->scratch_bytes);
    if (!x->scratch) return ada_no_scratch(threads * x->scratch_bytes, error);
    const bool done = ada_parallel_for(x->n, threads, task, x, a->interrupt, a->context);
    ada_scratch_give_back(x->scratch);
    return done ? ADA_OK : ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
}

static int largest(const int *x, int64_t n) {
    int most = 1;
    for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* ---- plan ---- */

static ada_rank_speed speed_of(ada_attending *a, ada_cuda_call *call) {
    const double plain = 1e-9 * PLAIN_SHARE * ada_gpu_table()->plain_operations(call);
    const double bytes = (double)(batch_of(a, NULL, 1).at.floats * (int64_t)sizeof(float));
    return (ada_rank_speed){.products = {.gflops = {plain, plain}},
                            .choosing = {.gflops = {HOST_GFLOPS, HOST_GFLOPS}},
                            .exact_gflops = EXACT_SHARE / PLAIN_SHARE * plain,
                            .sample_seconds = LOOK_SECONDS + BYTE_SECONDS * bytes};
}

/* Most landmarks of a head that it may gain by, 0: none. */
static int ranks_to_look_at(const ada_attending *a, int64_t i, const ada_rank_speed *speed) {
    const ada_head_state *s = &a->states[i];
    ada_far_keys keys;
    if (!ada_far_keys_of(a->p, i / a->p->H, &keys)) return 0;
    const ada_rank_task sizes = ada_rank_task_of(a, &keys);
    if (a->budget->structure == ADA_STRUCTURE_LOW_RANK) return sizes.most;
    const ada_task task = ada_task_of(a, i, ada_margin_of(a, i));
    if (s->look) return ada_ranks_to_look_at(&a->budget->heads[i].forecast, &task, &sizes, speed, s->seconds);
    const int most = ada_most_ranks(&task, &sizes, speed, s->seconds);
    return ada_rank_looking_seconds(&task, &sizes, speed, most) <= LOOK_SHARE * s->seconds ? most : 0;
}

static void plan_task(void *context, ada_job *job, int64_t index, int worker) {
    const batch *x = context;
    if (ada_job_cancelled(job, worker)) return;
    const ada_sample sample = sample_of(x, index);
    const float *value2 = x->floats + index * x->at.floats + x->at.value2;
    /* A sample of keys does not tell what the few with far larger values lose. */
    const bool heavy = (double)value2[1] * sample.extent.keys > ADA_HEAVIER * (double)value2[0];
    if (heavy && x->a->budget->structure != ADA_STRUCTURE_LOW_RANK) return;
    ada_choose_rank(x->a, x->heads[index], x->most[index], x->out2[index], &x->speed, &sample,
                    x->scratch + worker * x->scratch_bytes);
}

/* Mean squared norms of the heads' outputs, by some rows. */
static ada_status measure_outputs(batch *x, ada_cuda_call *call, ada_error *error) {
    const ada_problem *p = x->a->p;
    const int64_t each = x->what.queries < OUT_ROWS ? x->what.queries : OUT_ROWS, n = x->n * each, E = p->E;
    ada_carver c = {NULL, 0};
    ada_cuda_failure failure;
    ada_cuda_row *rows = NULL;
    double *o = NULL, *lse = NULL;
    char *memory = NULL;
    for (int turn = 0; turn < 2; turn++) {
        rows = ada_carve(&c, n * (int64_t)sizeof *rows);
        o = ada_carve(&c, n * E * (int64_t)sizeof *o), lse = ada_carve(&c, n * (int64_t)sizeof *lse);
        if (turn) break;
        if (!(memory = ada_scratch_take(c.used))) return ada_no_scratch(c.used, error);
        c = (ada_carver){memory, 0};
    }
    for (int64_t i = 0; i < n; i++)
        rows[i] =
            (ada_cuda_row){(int32_t)x->heads[i / each], (int32_t)x->query[i % each * x->what.queries / each]};
    const bool failed = ada_gpu_table()->rows(call, rows, n, false, o, lse, NULL, NULL, &failure);
    for (int64_t i = 0; i < x->n && !failed; i++) {
        double sum = 0;
        for (int64_t e = 0; e < each * E; e++) sum += o[i * each * E + e] * o[i * each * E + e];
        x->out2[i] = isfinite(sum) ? sum / (double)each : 0;
    }
    ada_scratch_give_back(memory);
    return failed ? ada_gpu_fail(&failure, error) : ADA_OK;
}

ada_status ada_gpu_plan_ranks(ada_attending *a, ada_cuda_call *call, ada_error *error) {
    const ada_rank_speed speed = speed_of(a, call);
    int64_t n = 0;
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        const int most = ranks_to_look_at(a, i, &speed);
        if (most > 0) a->list[n] = i, a->rank[n++] = most;
    }
    for (int64_t first = 0; first < n;) {
        batch x = batch_of(a, a->list + first, n - first);
        x.most = a->rank + first, x.speed = speed;
        x.out2 = a->gain + first;
        if (measure_outputs(&x, call, error) || take_samples(&x, call, error)) return error->status;
        const ada_status status = run_tasks(&x, plan_task, largest(x.most, x.n), error);
        ada_scratch_give_back(x.floats);
        if (status) return status;
        first += x.n;
    }
    return ADA_OK;
}

/* ---- execute ---- */

static void find_task(void *context, ada_job *job, int64_t index, int worker) {
    const batch *x = context;
    const ada_problem *p = x->a->p;
    const int64_t head = x->heads[index], at = x->first + index;
    if (ada_job_cancelled(job, worker)) return;
    const ada_sample sample = sample_of(x, index);
    x->low->failed[at] = !ada_find_landmarks(p, x->a->k, head / p->H, head % p->H, x->low->rank[at], &sample,
                                             &x->landmarks[index], x->scratch + worker * x->scratch_bytes);
}

/* What the device did with a head; lists the rows that are to be computed exactly, unless it failed. */
static bool is_good(const ada_problem *p, int64_t head, float *shift2, ada_cuda_row *rows, int64_t *n) {
    const int64_t most = ada_most_exact_rows(p->T);
    double sum = 0;
    int64_t exactly = 0;
    for (int64_t t = 0; t < p->T; t++) {
        if (shift2[t] < 0) {
            if (exactly == most) return false;
            rows[*n + exactly++] = (ada_cuda_row){(int32_t)head, (int32_t)t}, shift2[t] = 0;
        }
        sum += (double)shift2[t];
    }
    if (sum > ADA_MOST_SUM * (double)p->T) return false;
    *n += exactly;
    return true;
}

/* Of the batch's heads those that have landmarks. */
static ada_status attend(batch *x, ada_cuda_call *call, ada_error *error) {
    const ada_problem *p = x->a->p;
    const ada_cuda_table *t = ada_gpu_table();
    const ada_low_rank *low = x->low;
    const int64_t shifts_at = (x->n * (int64_t)sizeof(ada_cuda_landmarks) + 63) / 64 * 64,
                  rows_at = shifts_at + x->n * p->T * (int64_t)sizeof(float),
                  bytes = rows_at + x->n * ada_most_exact_rows(p->T) * (int64_t)sizeof(ada_cuda_row);
    ada_cuda_failure failure;
    int64_t n = 0, n_rows = 0;
    char *memory = ada_scratch_take(bytes);
    if (!memory) return ada_no_scratch(bytes, error);
    ada_cuda_landmarks *const heads = (ada_cuda_landmarks *)memory;
    float *const shifts = (float *)(memory + shifts_at);
    ada_cuda_row *const rows = (ada_cuda_row *)(memory + rows_at);
    for (int64_t i = 0; i < x->n; i++) {
        const ada_landmarks *l = &x->landmarks[i];
        ada_far_keys all;
        if (low->failed[x->first + i]) continue;
        ada_far_keys_of(p, x->heads[i] / p->H, &all);
        heads[n++] = (ada_cuda_landmarks){.head = x->heads[i],
                                          .first = all.first,
                                          .end = all.end,
                                          .whole = all.whole,
                                          .rank = l->R,
                                          .query_factor = l->factor[0],
                                          .key_factor = l->factor[1],
                                          .mean = l->mean,
                                          .point = l->point,
                                          .basis = l->basis,
                                          .gain = low->gain[x->first + i],
                                          .limit = low->limit[x->first + i]};
    }
    bool done = n == 0 || !t->execute_low_rank(call, heads, n, shifts, &failure);
    for (int64_t i = 0, at = 0; done && i < x->n; i++) {
        if (low->failed[x->first + i]) continue;
        float *const of_head = shifts + at++ * p->T;
        low->failed[x->first + i] = !is_good(p, x->heads[i], of_head, rows, &n_rows);
        if (low->shift2) memcpy(low->shift2 + x->heads[i] * p->T, of_head, (size_t)p->T * sizeof(float));
    }
    if (done && n_rows) done = !t->execute_rows(call, rows, n_rows, &failure);
    ada_scratch_give_back(memory);
    return done ? ADA_OK : ada_gpu_fail(&failure, error);
}

static ada_status execute_batch(batch *x, ada_cuda_call *call, ada_error *error) {
    const ada_problem *p = x->a->p;
    const int *ranks = x->low->rank + x->first;
    ada_carver c = {NULL, 0};
    ada_carve(&c, x->n * (int64_t)sizeof *x->landmarks);
    for (int64_t i = 0; i < x->n; i++) ada_landmarks_of(p, ranks[i], &c);
    char *memory = ada_scratch_take(c.used);
    if (!memory) return ada_no_scratch(c.used, error);
    c = (ada_carver){memory, 0};
    x->landmarks = ada_carve(&c, x->n * (int64_t)sizeof *x->landmarks);
    for (int64_t i = 0; i < x->n; i++) x->landmarks[i] = ada_landmarks_of(p, ranks[i], &c);
    ada_status status = take_samples(x, call, error);
    if (!status) {
        status = run_tasks(x, find_task, largest(ranks, x->n), error);
        ada_scratch_give_back(x->floats);
    }
    if (!status) status = attend(x, call, error);
    ada_scratch_give_back(memory);
    return status;
}

ada_status ada_gpu_execute_ranks(ada_attending *a, ada_cuda_call *call, const ada_low_rank *low,
                                 const int64_t *heads, int64_t n, ada_error *error) {
    const ada_choice fp32 = {ADA_RUNG_FP32, ADA_RUNG_FP32};
    if (ada_gpu_check_choice(ada_gpu_table(), call, fp32, error)) return error->status;
    for (int64_t first = 0; first < n;) {
        batch x = batch_of(a, heads + first, n - first);
        x.low = low, x.first = first;
        if (execute_batch(&x, call, error)) return error->status;
        first += x.n;
    }
    return ADA_OK;
}
