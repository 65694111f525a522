/* Gradients of a call with respect to its inputs, from its output and its lse.
 *
 * One pass of five products over tiles of queries (rows) and blocks of keys (lanes): weights and their
 * gradients from two, then what they add to dQ, dK and dV. Recomputing them for dQ and for dK, dV apart would
 * take seven. Queries and keys of a head are cut into parts by its sizes alone; in every step each part of
 * the keys meets another part of the queries, as in a Latin square, so no two tasks of a step add to the same
 * sums, and every sum has one order for any number of threads. A key head whose sums are not finite in float
 * is computed again in double.
 */
#include "backward.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "attending.h"
#include "execute.h"
#include "gradient_check.h"
#include "gpu_backward.h"
#include "operands.h"
#include "verify.h"

/* Parts of the queries and of the keys: at least so many tiles, as keys are packed once for each. */
#define PART_TILES 8
#define MOST_PARTS 8
#define NARROW_BYTES (64 << 20)
#define SLICE (ADA_BLOCK / PART_TILES) /* rows to be asked for beside each of a part's tiles */

typedef struct {
    int64_t first, end;
} ada_range;

typedef struct {
    const ada_backward_problem *x;
    const ada_problem *p;
    const ada_kernels *k;
    char *scratch; /* of worker w: from scratch + w * scratch_bytes */
    int64_t scratch_bytes;
    int64_t tiles, blocks; /* of a head: queries and keys */
    int64_t query_parts, key_parts, steps, step;
    bool scores;           /* their gradients are wanted */
    double *delta;         /* [B][H][T] sums of grad_out * out */
    double *reference;     /* [B][H][T] log2 units, of rows whose scores are so large that rounding the lse
                              changes their weights, else 0 */
    double *lse;           /* [B][H][T] log2 units, beyond the reference */
    double *sinks;         /* [B][H][query_parts] */
    double *slopes;        /* [B][H][key_parts] */
    void *sums[3];         /* REAL: of queries, keys and values from key head first on */
    int64_t first, groups; /* key heads b * G + g */
    ada_array mask;        /* its gradient, in four dimensions */
    bool careful;          /* in double, and what is hidden is left out pair by pair where it is not finite */
    atomic_bool *unfit;    /* [B * G] float does not hold it */
    uint8_t *way;          /* [B * G] WAY_... */
    atomic_bool *raised;   /* [B * G] the narrow way does not hold it */
    char *narrow;          /* operands and sums of key heads from first on */
    double fault;          /* of the narrow way, for tests */
} back_run;

/* What is to be done with a key head. */
enum { WAY_DONE, WAY_NARROW, WAY_EXACT };

static ada_range part_of(int64_t n, int64_t parts, int64_t part) {
    return (ada_range){n * part / parts, n * (part + 1) / parts};
}

static int64_t count_parts(int64_t tiles) {
    const int64_t parts = (tiles + PART_TILES - 1) / PART_TILES;
    return parts < MOST_PARTS ? parts : MOST_PARTS;
}

static int rows_of_tile(const ada_problem *p, int64_t tile) {
    const int64_t left = p->T - tile * ADA_LANES;
    return left < ADA_LANES ? (int)left : ADA_LANES;
}

static int up_to_step(int n) { return (n + ADA_KEY_STEP - 1) / ADA_KEY_STEP * ADA_KEY_STEP; }

/* Elements of a key head's queries, keys or values. */
static int64_t sum_size(const ada_problem *p, int which) {
    return which == ADA_OF_QUERY ? p->H / p->G * p->T * p->D : p->S * (which == ADA_OF_KEY ? p->D : p->E);
}

static double lse_at(const ada_array *lse, int64_t b, int64_t h, int64_t i) {
    const char *at = ada_row_at(lse, b, h, i);
    return lse->dtype == ADA_F64 ? *(const double *)at : (double)*(const float *)at;
}

#define REAL float
#define KIND(name) name##_f32
#define KIND_FN(name) name##_f32_fn
#include "backward_tpl.h"
#include "backward_exact_tpl.h"
#undef REAL
#undef KIND
#undef KIND_FN

#define REAL double
#define KIND(name) name##_f64
#define KIND_FN(name) name##_f64_fn
#include "backward_tpl.h"
#include "backward_exact_tpl.h"
#undef REAL
#undef KIND
#undef KIND_FN

/* Whether a query sees a key. */
static bool sees_keys(const back_run *r, int64_t b, int64_t h, int64_t i) {
    int64_t block = 0;
    float rows[ADA_BLOCK];
    return ada_row_sees(r->p, r->k, b, h, i, &block, rows);
}

#include "backward_narrow.h"

static bool is_double(const back_run *r) { return r->careful || r->p->query.dtype == ADA_F64; }

/* What the rows of a part of the queries of a head need, and the gradient of its sink from them. */
static void rows_task(void *context, ada_job *job, int64_t task, int worker) {
    const back_run *r = context;
    const ada_problem *p = r->p;
    const int64_t head = task / r->query_parts, b = head / p->H, h = head % p->H;
    const ada_range tiles = part_of(r->tiles, r->query_parts, task % r->query_parts);
    const double sink = ada_sink(p, h) * ADA_LOG2E;
    double sum = 0;
    char *scratch = r->scratch + worker * r->scratch_bytes;
    for (int64_t tile = tiles.first; tile < tiles.end; tile++) {
        ada_carver carver = {scratch, 0};
        const int64_t i = tile * ADA_LANES, row = head * p->T + i;
        const int n = rows_of_tile(p, tile);
        if (ada_job_cancelled(job, worker)) return;
        if (p->query.dtype == ADA_F64) {
            const scratch_f64 s = scratch_of_f64(p, &carver);
            delta_rows_f64(r, b, h, i, n, &s, r->delta + row);
        } else {
            const scratch_f32 s = scratch_of_f32(p, &carver);
            delta_rows_f32(r, b, h, i, n, &s, r->delta + row);
        }
        uint64_t again = 0;
        for (int x = 0; x < n; x++) {
            const double lse = lse_at(&r->x->lse, b, h, i + x) * ADA_LOG2E;
            r->lse[row + x] = lse;
            if (!isfinite(r->delta[row + x]) && !sees_keys(r, b, h, i + x)) r->delta[row + x] = 0;
            r->reference[row + x] = 0;
            if (isfinite(lse) && fabs(lse) > p->most_bias) again |= (uint64_t)1 << x;
        }
        if (again) {
            recompute_rows_f64(r, (ada_patch){.b = b, .h = h, .i = i, .n = n}, again, false, true, scratch);
            /* Nor do floats hold the scores. */
            atomic_store_explicit(&r->unfit[b * p->G + h / (p->H / p->G)], true, memory_order_relaxed);
        }
        for (int x = 0; sink > -INFINITY && x < n; x++)
            sum -= exp2(sink - r->reference[row + x] - r->lse[row + x]) * r->delta[row + x];
    }
    r->sinks[task] = sum;
}

/* Whether a key head is on the exact way, or the careful one after it. */
static bool is_on_way(const back_run *r, int64_t group) {
    if (r->way[group] != WAY_EXACT) return false;
    return r->careful || !atomic_load_explicit(&r->unfit[group], memory_order_relaxed);
}

/* Zeroes the sums of a key head. */
static void clear_task(void *context, ada_job *job, int64_t task, int worker) {
    const back_run *r = context;
    if (!is_on_way(r, r->first + task)) return;
    const int64_t bytes = is_double(r) ? sizeof(double) : sizeof(float), per_group = r->p->H / r->p->G;
    (void)job, (void)worker;
    for (int i = 0; i <= ADA_OF_VALUE; i++) {
        const int64_t n = sum_size(r->p, i) * bytes;
        if (r->x->needs[i]) memset((char *)r->sums[i] + task * n, 0, (size_t)n);
    }
    memset(r->slopes + (r->first + task) * per_group * r->key_parts, 0,
           (size_t)(per_group * r->key_parts) * sizeof *r->slopes);
}

static void step_task(void *context, ada_job *job, int64_t task, int worker) {
    const back_run *r = context;
    const int64_t group = r->first + task / r->key_parts, key_part = task % r->key_parts;
    const int64_t query_part = (key_part + r->step) % r->steps;
    if (query_part >= r->query_parts) return;
    if (!is_on_way(r, group)) return;
    if (!(is_double(r) ? part_back_f64(r, group, key_part, query_part, job, worker)
                       : part_back_f32(r, group, key_part, query_part, job, worker)))
        atomic_store_explicit(&r->unfit[group], true, memory_order_relaxed);
}

/* Completes the sums of a key head and, where they are not the results themselves, brings them there. */
static void finish_task(void *context, ada_job *job, int64_t task, int worker) {
    const back_run *r = context;
    const ada_problem *p = r->p;
    const int64_t group = r->first + task, b = group / p->G, g = group % p->G, per_group = p->H / p->G;
    (void)job, (void)worker;
    if (!is_on_way(r, group)) return;
    if (!(is_double(r) ? scale_sums_f64(r, group) : scale_sums_f32(r, group)) && !r->careful) {
        atomic_store_explicit(&r->unfit[group], true, memory_order_relaxed);
        return;
    }
    for (int i = 0; i <= ADA_OF_VALUE; i++) {
        const ada_array *to = &r->x->results[i];
        if (!r->x->needs[i] || (!r->careful && r->sums[i] == to->data)) continue;
        const int64_t heads = i == ADA_OF_QUERY ? per_group : 1, rows = to->shape[2], width = to->shape[3];
        for (int64_t h = 0; h < heads; h++)
            for (int64_t row = 0; row < rows; row += ADA_LANES) {
                const int64_t at = ((task * heads + h) * rows + row) * width;
                const int n = (int)(rows - row < ADA_LANES ? rows - row : ADA_LANES);
                if (is_double(r))
                    ada_store_rows_f64(r->k, to, b, g * heads + h, row, n, (int)width,
                                       (const double *)r->sums[i] + at, width);
                else
                    ada_store_rows_f32(r->k, to, b, g * heads + h, row, n, (int)width,
                                       (const float *)r->sums[i] + at, width);
            }
    }
}

/* The gradient of one tile of a mask, [64][64] or what of it the mask does not repeat. */
static void mask_task(void *context, ada_job *job, int64_t task, int worker) {
    const back_run *r = context;
    const ada_problem *p = r->p;
    const ada_array *mask = &r->mask;
    const bool wide = mask->stride[3] != 0, tall = mask->stride[2] != 0;
    const int64_t columns = wide ? r->blocks : 1, rows = tall ? r->tiles : 1;
    const int64_t heads = mask->stride[1] ? p->H : 1;
    const int64_t column = task % columns, row = task / columns % rows;
    const int64_t head = task / (columns * rows) % heads, batch = task / (columns * rows * heads);
    double sum[ADA_LANES * ADA_BLOCK] = {0};
    const ada_range all_b = {mask->stride[0] ? batch : 0, mask->stride[0] ? batch + 1 : p->B};
    const ada_range all_h = {mask->stride[1] ? head : 0, mask->stride[1] ? head + 1 : p->H};
    const ada_range all_i = {tall ? row : 0, tall ? row + 1 : r->tiles};
    const ada_range all_j = {wide ? column : 0, wide ? column + 1 : r->blocks};
    for (int64_t b = all_b.first; b < all_b.end; b++)
        for (int64_t h = all_h.first; h < all_h.end; h++)
            for (int64_t tile = all_i.first; tile < all_i.end; tile++)
                for (int64_t block = all_j.first; block < all_j.end; block++) {
                    const int64_t i = tile * ADA_LANES, j = block * ADA_BLOCK, left = ada_key_count(p, b) - j;
                    const ada_patch patch = {
                        b, h, i, j, rows_of_tile(p, tile), (int)(left < ADA_BLOCK ? left : ADA_BLOCK)};
                    if (ada_job_cancelled(job, worker)) return;
                    if (left <= 0) break;
                    const bool unfit = r->unfit[b * p->G + h / (p->H / p->G)] || is_double(r);
                    if (unfit || !mask_back_f32(r, &patch, tall * ADA_BLOCK, wide, sum, worker))
                        mask_back_f64(r, &patch, tall * ADA_BLOCK, wide, sum, worker);
                }
    const int64_t i = row * ADA_LANES, j = column * ADA_BLOCK;
    const int n = tall ? rows_of_tile(p, row) : 1;
    const int nk = wide ? ada_keys_of_block(p, column) : 1;
    ada_array to = *mask;
    to.data = (char *)to.data + j * to.stride[3];
    ada_store_rows_f64(r->k, &to, batch, head, i, n, nk, sum, ADA_BLOCK);
}

/* Sums over the parts of each head, and over sequences where the vector has none of its own. */
static void store_vector(const ada_problem *p, const ada_array *to, const double *sums, int64_t parts) {
    const int64_t B = to->ndim == 2 ? p->B : 1;
    for (int64_t i = 0; i < B * p->H; i++) {
        double sum = 0;
        for (int64_t b = 0; b < (to->ndim == 2 ? 1 : p->B); b++)
            for (int64_t part = 0; part < parts; part++) sum += sums[(i + b * p->H) * parts + part];
        if (to->dtype == ADA_F64)
            ((double *)to->data)[i] = sum;
        else
            ((float *)to->data)[i] = (float)sum;
    }
}

typedef struct {
    bool (*interrupt)(void *);
    void *context;
    int threads;
} back_caller;

static bool run_tasks_on(void *context, const ada_problem *p, const back_caller *c, ada_task_fn *task,
                         int64_t tasks, double work) {
    const int threads = ada_threads_for(p, tasks, work);
    return ada_parallel_for(tasks, threads < c->threads ? threads : c->threads, task, context, c->interrupt,
                            c->context);
}

static bool run_tasks(back_run *r, const back_caller *c, ada_task_fn *task, int64_t tasks, double work) {
    return run_tasks_on(r, r->p, c, task, tasks, work);
}

static ada_status no_memory(int64_t bytes, ada_error *error) {
    return ada_fail(error, ADA_ERR_MEMORY, "attention_backward: no memory for %lld bytes of scratch",
                    (long long)bytes);
}

static ada_status interrupted(ada_error *error) {
    return ada_fail(error, ADA_INTERRUPTED, "attention_backward: interrupted");
}

/* The three gradients of the key heads from first on. */
static bool run_steps(back_run *r, const back_caller *c) {
    const ada_problem *p = r->p;
    const double heads = (double)(r->groups * (p->H / p->G)), T = (double)p->T, S = (double)p->S;
    const double work = heads * T * S * (double)(p->D + p->E) * 2.5,
                 elements = heads * (T + S) * (double)p->D;
    if (!run_tasks(r, c, clear_task, r->groups, elements)) return false;
    for (r->step = 0; r->step < r->steps; r->step++)
        if (!run_tasks(r, c, step_task, r->groups * r->key_parts, work / (double)r->steps)) return false;
    return run_tasks(r, c, finish_task, r->groups, elements);
}

/* The key heads that are not finite, one after the other, in the memory behind. */
static bool run_unfit(back_run *r, const back_caller *c, double *memory) {
    back_run one = *r;
    one.careful = true, one.groups = 1;
    for (int i = 0; i <= ADA_OF_VALUE; i++) {
        one.sums[i] = memory;
        if (r->x->needs[i]) memory += sum_size(r->p, i);
    }
    for (one.first = 0; one.first < r->groups; one.first++)
        if (r->way[one.first] == WAY_EXACT && r->unfit[one.first] && !run_steps(&one, c)) return false;
    return true;
}

/* The key heads on the narrow way, as many at a time as have work for all threads and little memory. */
static ada_status run_narrow(back_run *r, const back_caller *c, ada_error *error) {
    const ada_problem *p = r->p;
    const int64_t each = narrow_bytes(r), fair = NARROW_BYTES / each, least = c->threads;
    const int64_t most = fair > least ? fair : least, all = r->groups, per_group = p->H / p->G;
    back_run wave = *r;
    wave.groups = most < all ? most : all;
    wave.narrow = ada_scratch_take(wave.groups * each);
    if (!wave.narrow) return no_memory(wave.groups * each, error);
    bool done = true;
    for (wave.first = 0; done && wave.first < all; wave.first += wave.groups) {
        if (wave.groups > all - wave.first) wave.groups = all - wave.first;
        const double heads = (double)(wave.groups * per_group), T = (double)p->T, S = (double)p->S;
        const double work = heads * T * S * (double)(p->D + p->E) * 2.5,
                     elements = heads * (T + S) * (double)p->D;
        done = run_tasks(&wave, c, narrow_start_task, wave.groups, elements) &&
               run_tasks(&wave, c, narrow_keys_task, wave.groups * r->blocks, elements) &&
               run_tasks(&wave, c, narrow_queries_task, wave.groups * per_group * r->tiles, elements);
        for (wave.step = 0; done && wave.step < r->steps; wave.step++)
            done = run_tasks(&wave, c, narrow_step_task, wave.groups * r->key_parts, work / (double)r->steps);
        done = done && run_tasks(&wave, c, narrow_finish_task, wave.groups, elements);
    }
    ada_scratch_give_back(wave.narrow);
    for (int64_t i = 0; i < all; i++)
        if (r->way[i] == WAY_NARROW) r->way[i] = r->raised[i] ? WAY_EXACT : WAY_DONE;
    return done ? ADA_OK : interrupted(error);
}

/* All key heads on their ways. */
static ada_status run_ways(back_run *r, const back_caller *c, double *spare, ada_error *error) {
    bool any[3] = {false};
    for (int64_t i = 0; i < r->groups; i++) any[r->way[i]] = true;
    if (any[WAY_NARROW] && run_narrow(r, c, error)) return error->status;
    for (int64_t i = 0; i < r->groups; i++) any[r->way[i]] = true;
    if (any[WAY_EXACT] && !(run_steps(r, c) && run_unfit(r, c, spare))) return interrupted(error);
    for (int64_t i = 0; i < r->groups; i++) r->way[i] = WAY_DONE;
    return ADA_OK;
}

static bool run_mask(back_run *r, const back_caller *c) {
    const ada_problem *p = r->p;
    const ada_array *mask = &r->mask;
    const int64_t tasks = (mask->stride[0] ? p->B : 1) * (mask->stride[1] ? p->H : 1) *
                          (mask->stride[2] ? r->tiles : 1) * (mask->stride[3] ? r->blocks : 1);
    const double work = (double)(p->B * p->H) * (double)p->T * (double)p->S * (double)(p->D + p->E);
    return run_tasks(r, c, mask_task, tasks, work);
}

/* fp32, or fp64 where that does not hold a key head. */
static ada_choice plain_rungs(const back_run *r, int64_t group) {
    const ada_rung rung = r->unfit[group] || is_double(r) ? ADA_RUNG_FP64 : ADA_RUNG_FP32;
    return (ada_choice){rung, rung};
}

#include "backward_verify.h"

/* The rungs of a key head, by what was asked for or by its sizes. */
static ada_choice choose_rungs(const back_run *r, const ada_gradient_budget *budget, int64_t group) {
    const ada_problem *p = r->p;
    const ada_choice narrow = ADA_GRADIENT_NARROW, plain = plain_rungs(r, group);
    const double queries = (double)(p->H / p->G), width = (double)(p->D + p->E);
    if (r->unfit[group]) return plain;
    if (budget->asked.qk != ADA_RUNG_AUTO) return budget->asked;
    if (budget->tolerance == 0 || r->x->needs[ADA_OF_SLOPES]) return plain;
    const int rows = ada_most_rows_to_verify(p->T);
    const ada_task task = {.tolerance = budget->tolerance,
                           .margin = p->T < ADA_LEAST_QUERIES ? ADA_MARGIN_GUESSED
                                                              : ADA_MARGIN * ada_reach_of_rows(rows),
                           .operations = queries * ada_operations_of_head(p, group / p->G),
                           .elements = ((double)p->S + queries * (double)p->T) * width,
                           .D = p->D,
                           .plain = ada_plain_candidate(p)};
    /* A row takes three products, a key four. */
    const double verifying = rows * width * (3 * queries * (double)p->S + 4 * queries * (double)p->T);
    return ada_plan_gradient(&task, budget->verify ? verifying : 0, budget->rates) ? narrow : plain;
}

static ada_status run_all(back_run *r, const back_caller *c, ada_gradient_budget *budget, double *spare,
                          ada_error *error) {
    const ada_problem *p = r->p;
    const ada_backward_problem *x = r->x;
    const bool *needs = x->needs, sums = needs[ADA_OF_QUERY] || needs[ADA_OF_KEY] || needs[ADA_OF_VALUE];
    const double rows = (double)(p->B * p->H * p->T), start = ada_seconds_now();
    const bool in_f64 = budget->asked.qk == ADA_RUNG_FP64 || p->only_f64;
    for (int64_t i = 0; i < r->groups; i++) {
        atomic_init(&r->unfit[i], in_f64 && p->query.dtype != ADA_F64);
        atomic_init(&r->raised[i], false);
    }
    if (!run_tasks(r, c, rows_task, p->B * p->H * r->query_parts, rows * (double)p->E))
        return interrupted(error);
    for (int64_t i = 0; i < r->groups; i++) {
        const ada_choice choice = choose_rungs(r, budget, i);
        const bool narrow = choice.qk == ADA_RUNG_INT16;
        r->way[i] = narrow ? WAY_NARROW : WAY_EXACT;
        if (!budget->heads) continue;
        budget->heads[i] = (ada_gradient_head){.choice = choice,
                                               .predicted_error = narrow ? ADA_GRADIENT_ERROR : NAN,
                                               .key = {NAN, NAN, 0},
                                               .value = {NAN, NAN, 0}};
    }
    for (int64_t i = 0; budget->queries && i < p->B * p->H; i++)
        budget->queries[i] = (ada_measured){NAN, NAN, 0};
    if ((sums || needs[ADA_OF_SLOPES]) && run_ways(r, c, spare, error)) return error->status;
    for (int64_t i = 0; budget->heads && i < r->groups; i++) {
        ada_gradient_head *head = &budget->heads[i];
        const ada_choice plain = plain_rungs(r, i);
        const bool narrow = head->choice.qk == ADA_RUNG_INT16;
        if (narrow ? !r->raised[i] : head->choice.qk == plain.qk) continue;
        *head = (ada_gradient_head){plain, NAN, true, head->key, head->value};
    }
    const double now = ada_seconds_now();
    budget->seconds[0] = now - start;
    if (budget->tolerance > 0 && budget->verify && sums && p->T >= ADA_LEAST_QUERIES &&
        verify_gradient(r, c, budget, spare, error))
        return error->status;
    const double verified = ada_seconds_now();
    budget->seconds[1] = verified - now;
    if (needs[ADA_OF_SINKS]) store_vector(p, &x->results[ADA_OF_SINKS], r->sinks, r->query_parts);
    if (needs[ADA_OF_SLOPES]) store_vector(p, &x->results[ADA_OF_SLOPES], r->slopes, r->key_parts);
    r->scores = true;
    if (needs[ADA_OF_MASK] && !run_mask(r, c)) return interrupted(error);
    budget->seconds[0] += ada_seconds_now() - verified;
    return ADA_OK;
}

ada_status ada_backward(const ada_backward_problem *x, ada_gradient_budget *budget, bool (*interrupt)(void *),
                        void *context, ada_error *error) {
    const ada_problem *p = &x->p;
    if (p->on_gpu) return ada_gpu_backward(x, budget, error);
    if (ada_check_mask(p, interrupt, context, error)) return error->status;
    back_run r = {.x = x,
                  .p = p,
                  .k = ada_kernels_get(),
                  .tiles = (p->T + ADA_LANES - 1) / ADA_LANES,
                  .blocks = ada_block_count(p),
                  .scores = x->needs[ADA_OF_QUERY] || x->needs[ADA_OF_KEY] || x->needs[ADA_OF_SLOPES],
                  .groups = p->B * p->G,
                  .fault = ada_narrow_fault_now()};
    r.query_parts = count_parts(r.tiles), r.key_parts = count_parts(r.blocks);
    r.steps = r.query_parts > r.key_parts ? r.query_parts : r.key_parts;
    const int64_t heads = p->B * p->H, most_tasks = heads * r.tiles * r.blocks;
    const back_caller caller = {interrupt, context, ada_threads_for(p, most_tasks, INFINITY)};
    if (x->needs[ADA_OF_MASK]) {
        r.mask = x->results[ADA_OF_MASK];
        ada_broadcast(p, &r.mask);
    }
    const bool half = ada_dtype_bytes(p->query.dtype) == 2;

    ada_carver size = {NULL, 0};
    scratch_of_f64(p, &size);
    r.scratch_bytes = size.used;
    size.used = 0;
    narrow_scratch_of(p, &size);
    if (size.used > r.scratch_bytes) r.scratch_bytes = size.used;
    size.used = 0;
    if (budget->tolerance > 0) truth_of_f64(&r, &size);
    if (size.used > r.scratch_bytes) r.scratch_bytes = size.used;
    /* Twice: first to count the bytes. */
    ada_carver carver = {NULL, 0};
    double *spare = NULL;
    for (int turn = 0; turn < 2; turn++) {
        if (turn && !(carver.base = ada_scratch_take(carver.used))) return no_memory(carver.used, error);
        carver.used = 0;
        r.scratch = ada_carve(&carver, caller.threads * r.scratch_bytes);
        const int64_t row_bytes = heads * p->T * (int64_t)sizeof(double);
        r.delta = ada_carve(&carver, row_bytes), r.lse = ada_carve(&carver, row_bytes);
        r.reference = ada_carve(&carver, row_bytes);
        r.sinks = ada_carve(&carver, heads * r.query_parts * (int64_t)sizeof(double));
        r.slopes = ada_carve(&carver, heads * r.key_parts * (int64_t)sizeof(double));
        r.unfit = ada_carve(&carver, r.groups * (int64_t)sizeof *r.unfit);
        r.raised = ada_carve(&carver, r.groups * (int64_t)sizeof *r.raised);
        r.way = ada_carve(&carver, r.groups);
        int64_t spare_size = 0;
        for (int i = 0; i <= ADA_OF_VALUE; i++) {
            r.sums[i] = x->results[i].data;
            if (!x->needs[i]) continue;
            if (half) r.sums[i] = ada_carve(&carver, r.groups * sum_size(p, i) * (int64_t)sizeof(float));
            spare_size += sum_size(p, i);
        }
        spare = ada_carve(&carver, spare_size * (int64_t)sizeof(double));
    }
    const ada_status status = run_all(&r, &caller, budget, spare, error);
    ada_scratch_give_back(r.scratch);
    return status;
}
