/* Runs a validated problem: the only file that knows the whole loop.
 *
 * The work is cut into tiles and splits that depend on the sizes of one head only, never on the number of
 * threads or heads, so bits do not either. Many queries: one task per tile of ADA_LANES queries, or, where
 * threads get several each, per small head; on rungs that pack keys, one per head that stays in a core's
 * cache, but for the last few. Few queries: one task per key head and split of its keys, then one per head
 * that joins the splits. All memory is taken before threads start.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "execute.h"
#include "memory.h"
#include "sparse.h"

static _Atomic double narrow_fault = 1;

void ada_narrow_fault(double factor) { atomic_store(&narrow_fault, factor); }
double ada_narrow_fault_now(void) { return atomic_load_explicit(&narrow_fault, memory_order_relaxed); }

/* The binary logarithm of a positive float, to 0.09. */
static float rough_log2(float x) {
    union {
        float f;
        int32_t bits;
    } u = {x};
    return (float)u.bits * 0x1p-23f - 127;
}

/* Writes the lse of a row and where its weights lie; returns what its output is multiplied with. block: the
 * sum of the heaviest block. */
static double finish_row(const ada_problem *p, int64_t b, int64_t h, int64_t i, double m, double l,
                         double block) {
    double lse;
    const double factor = ada_row_factor(p, h, m, l, p->lse ? &lse : NULL);
    if (p->lse) ada_store_lse(p, b, h, i, lse);
    if (p->mass) {
        const float over = (float)(factor * (1 - p->dropout_p)), reference = l > 0 ? (float)m : 0;
        p->mass[(b * p->H + h) * p->T + i] =
            (ada_row_mass){reference, l > 0 ? reference + rough_log2((float)l) : 0, over < 1 ? over : 1,
                           (float)block * over};
    }
    return factor;
}

static bool is_biased(const ada_problem *p) {
    return p->alibi_slopes.data || (p->attn_mask.data && p->attn_mask.dtype != ADA_BOOL);
}

/* Whether a row of floats lost more than rounding: its factor is subnormal, or its scores lie around a bias
 * of more than 2^10 octaves, whose last digit is worth 2^-13 and more. */
static bool row_needs_double(const ada_problem *p, double factor, double m) {
    return (factor != 0 && factor < FLT_MIN) || (is_biased(p) && isfinite(m) && fabs(m) > p->most_bias);
}

static uint64_t lanes_of(const ada_patch *patch) {
    return patch->n == ADA_LANES ? UINT64_MAX : ((uint64_t)1 << patch->n) - 1;
}

/* Row-major bits of n queries to lane bits per key; lanes without a query repeat the last one. */
static void turn_bits(uint64_t bits[64], int n) {
    for (int i = n; i < 64; i++) bits[i] = bits[n - 1];
    ada_transpose_bits(bits);
}

/* The keys that some query of a tile may see, from a multiple of ADA_BLOCK on. */
static ada_span tile_span(const ada_problem *p, const ada_patch *patch) {
    ada_span span = {ada_visible_span(p, patch->b, patch->i).first,
                     ada_visible_span(p, patch->b, patch->i + patch->n - 1).end};
    span.first -= span.first % ADA_BLOCK;
    return span;
}

/* Drops the hidden keys at both ends of a patch of one query; returns how many in front. */
static int trim_patch(ada_patch *patch, uint64_t *visible) {
    uint64_t bits = patch->nk == 64 ? *visible : *visible & (((uint64_t)1 << patch->nk) - 1);
    int skipped = __builtin_ctzll(bits);
    *visible = bits >> skipped;
    patch->j += skipped;
    patch->nk = 64 - __builtin_clzll(*visible);
    return skipped;
}

enum { SPECIAL_NAN = 1, SPECIAL_PLUS = 2, SPECIAL_MINUS = 4 };

#define REAL float
#define KIND(name) name##_f32
#define KIND_FN(name) name##_f32_fn
#define READS_HALF
#include "attend_tpl.h"
#undef REAL
#undef KIND
#undef KIND_FN
#undef READS_HALF

#include "attend_rungs.h"
#include "attend_sparse.h"

#define REAL double
#define KIND(name) name##_f64
#define KIND_FN(name) name##_f64_fn
#include "attend_tpl.h"
#undef REAL
#undef KIND
#undef KIND_FN

/* The careful way, in double, for tiles whose scores are not finite or overflow: kernels see only finite
 * numbers, and what was taken out is put into the result as plain arithmetic would have. */

/* Adds the bias to the scores of the queries and hides what is not finite: a NaN or +inf makes its lane NaN,
 * a -inf weighs 0. */
static void take_special_scores(const scratch_f64 *s, block_f64 *block, int nk, uint64_t queries,
                                uint64_t *nan_lanes, uint64_t *minus_lanes) {
    hide_lanes_f64(s, block, nk, ~queries);
    for (int j = 0; j < nk; j++)
        for (int i = 0; i < ADA_LANES; i++) {
            const uint64_t lane = (uint64_t)1 << i;
            double *x = s->tile.p + j * ADA_LANES + i, add = block->bias ? block->bias[j * ADA_LANES + i] : 0;
            if (!(s->visible[j] & lane)) continue;
            *x += add;
            if (isfinite(*x)) continue;
            s->visible[j] &= ~lane;
            if (add == -INFINITY) continue;
            *(*x == -INFINITY ? minus_lanes : nan_lanes) |= lane;
        }
    block->bias = NULL;
}

/* Hides what lies so far below the reference that it weighs nothing, as the difference may overflow. */
static void hide_weightless(const scratch_f64 *s, int nk, int n) {
    for (int j = 0; j < nk; j++)
        for (int i = 0; i < n; i++)
            if (s->tile.p[j * ADA_LANES + i] - s->tile.m[i] < -4000) s->visible[j] &= ~((uint64_t)1 << i);
}

/* Computes the rows of a tile; returns those whose sums of values times v_scale overflow. */
static uint64_t attend_tile_scaled(const ada_run *r, scratch_f64 *s, ada_patch patch, uint64_t rows,
                                   double v_scale, ada_job *job, int worker) {
    const ada_problem *p = r->p;
    const int E = (int)p->E;
    uint64_t nan_lanes = 0, minus_lanes = 0;
    /* The scale is applied to the scores: products of floats are exact in double, and so cancel. */
    start_tile_f64(r, s, &patch, 1);
    memset(s->special, 0, (size_t)E * ADA_LANES);
    ada_span span = tile_span(p, &patch);
    for (patch.j = span.first; patch.j < span.end; patch.j += ADA_BLOCK) {
        if (ada_job_cancelled(job, worker)) return 0;
        patch.nk = (int)(span.end - patch.j < ADA_BLOCK ? span.end - patch.j : ADA_BLOCK);
        block_f64 block;
        if (!prepare_block_f64(r, s, &patch, &block)) continue;
        take_special_values_f64(r, s, &block, patch.nk, v_scale);
        raw_scores_f64(r, s, &block, patch.nk, p->scale * ADA_LOG2E);
        cap_scores_f64(r, s, patch.nk);
        take_special_scores(s, &block, patch.nk, rows, &nan_lanes, &minus_lanes);
        r->k->reference_f64(&s->tile, patch.nk, block.visible, NULL);
        hide_weightless(s, patch.nk, patch.n);
        r->k->weights_f64(&s->tile, patch.nk, block.visible, NULL, block.keep);
        r->k->values_f64(&s->tile, block.v, block.ldv, patch.nk);
    }
    normalise_f64(r, s, &patch, rows);
    for (int i = 0; i < patch.n; i++) {
        s->factor[i] /= v_scale;
        /* Only scores of -inf, and no sink to take the mass: 0 / 0. */
        if (s->tile.l[i] == 0 && ada_sink(p, patch.h) == -INFINITY)
            nan_lanes |= minus_lanes & (uint64_t)1 << i;
        if (!(rows & nan_lanes & (uint64_t)1 << i)) continue;
        ada_store_lse(p, patch.b, patch.h, patch.i + i, NAN);
        for (int e = 0; e < E; e++) s->special[e * ADA_LANES + i] = SPECIAL_NAN;
    }
    return finish_patched_f64(r, s, &patch, rows);
}

static void attend_tile_carefully(const ada_run *r, const ada_patch *patch, uint64_t rows, ada_job *job,
                                  int worker) {
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    scratch_f64 s = scratch_of_f64(r->p, &carver);
    /* Values near the largest double overflow in a sum of weights times values; their average does not. */
    rows = attend_tile_scaled(r, &s, *patch, rows & lanes_of(patch), 1, job, worker);
    if (rows) attend_tile_scaled(r, &s, *patch, rows, 0x1p-80, job, worker);
}

static int64_t head_of_task(const ada_run *r, int64_t task) {
    return r->heads ? r->heads[task / r->tiles] : task / r->tiles;
}

/* The queries of a task. Within a head the last tiles come first: under a causal limit they are the longest.
 */
static ada_patch tile_of_task(const ada_run *r, int64_t task) {
    const ada_problem *p = r->p;
    const int64_t head = head_of_task(r, task), i = (r->tiles - 1 - task % r->tiles) * ADA_LANES;
    return (ada_patch){head / p->H, head % p->H, i, 0, (int)(p->T - i < ADA_LANES ? p->T - i : ADA_LANES), 0};
}

static void want_rows(ada_prospect *x, int i, const ada_array *a, int64_t b, int64_t h, int64_t first,
                      int64_t n, int64_t steps) {
    const int64_t width = ada_dtype_bytes(a->dtype), bytes = width * a->shape[3];
    if (a->pages || a->stride[3] != width || n <= 0) return;
    const bool dense = a->stride[2] == bytes && bytes % 64 == 0;
    const int64_t lines = dense ? n * bytes / 64 : n, now = (lines + steps - 1) / steps;
    x->now[i] =
        (ada_ahead){ada_row_at(a, b, h, first), dense ? 64 : a->stride[2], (int)now, dense ? 64 : (int)bytes};
    x->later[i] = (int)(lines - now);
}

/* For a tile that takes its keys `step` at a time. Keys and values of the next head are shared out among the
 * tiles of this one, where they stay in the cache until they are used. */
static inline ada_prospect look_ahead(const ada_run *r, const ada_patch *here, int64_t index, int step) {
    const ada_problem *p = r->p;
    const ada_store *store = &r->store;
    const bool whole = store->whole && store->slots[index] < store->whole;
    const ada_span span = tile_span(p, here);
    const int64_t steps = (span.end - span.first + step - 1) / step;
    const int64_t tile = r->tiles - 1 - here->i / ADA_LANES;
    const int64_t behind =
        here->i - (whole || r->by_heads ? 1 : r->threads) * ADA_LANES; /* the next tile of this head */
    int64_t head = index + 1;                                          /* the one that comes next */
    int64_t turn = 1; /* of so many tiles the worker computes one */
    ada_prospect x = {0};
    if (steps <= 0) return x;
    if (whole && head == store->first[store->slots[index] + 1]) {
        const int64_t slot = store->slots[index] + store->workers;
        head = slot < store->whole ? store->first[slot] : r->n_heads;
    } else if (r->by_heads) {
        head = index + r->threads;
    } else if (!whole) {
        turn = r->threads < r->tiles ? r->threads : r->tiles;
        if (r->threads > r->tiles) head = index + (tile + r->threads) / r->tiles;
    }
    want_rows(&x, 0, &p->out, here->b, here->h, here->i, here->n, steps);
    if (behind >= 0) want_rows(&x, 1, &p->query, here->b, here->h, behind, ADA_LANES, steps);
    if (head >= r->n_heads) return x;
    const int64_t per_head = p->H / p->G, id = r->heads ? r->heads[head] : head, b = id / p->H, h = id % p->H;
    const int64_t last = (r->tiles - 1) * ADA_LANES;
    if (behind < 0) want_rows(&x, 1, &p->query, b, h, last, p->T - last, steps);
    if (!ada_stays_cached(p) || (store->heads && !whole)) return x;
    if (b == here->b && h / per_head == here->h / per_head) return x;
    const int64_t share = (p->S + r->tiles - 1) / r->tiles, first = share * (tile - tile % turn);
    const int64_t n = first + share * turn <= p->S ? share * turn : p->S - first;
    want_rows(&x, 2, &p->key, b, h / per_head, first, n, steps);
    want_rows(&x, 3, &p->value, b, h / per_head, first, n, steps);
    return x;
}

static void tile_task(void *context, ada_job *job, int64_t task, int worker) {
    const ada_run *r = context;
    const ada_patch patch = tile_of_task(r, task);
    ada_prospect ahead = look_ahead(r, &patch, task / r->tiles, ADA_BLOCK);
    uint64_t dead = r->p->compute_f64 ? complete_tile_f64(r, &patch, &ahead, job, worker)
                                      : complete_tile_f32(r, &patch, &ahead, job, worker);
    if (dead) attend_tile_carefully(r, &patch, dead, job, worker);
    if (!r->left || ada_job_cancelled(job, worker)) return;
    if (atomic_fetch_sub_explicit(&r->left[task / r->tiles], 1, memory_order_acq_rel) == 1)
        r->p->head_done(r->p->done_context, head_of_task(r, task), worker);
}

/* Tells of a head that its rung could hold. */
static void tell_head(const ada_run *r, ada_job *job, int64_t index, int worker) {
    if (!r->raised[index] && !ada_job_cancelled(job, worker))
        r->p->head_done(r->p->done_context, r->heads ? r->heads[index] : index, worker);
}

static void rung_tile(const ada_run *r, ada_job *job, int64_t task, int worker) {
    atomic_bool *raised = &r->raised[task / r->tiles];
    if (atomic_load_explicit(raised, memory_order_relaxed)) return;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    narrow s = narrow_of(r, &carver);
    const int64_t index = task / r->tiles;
    const ada_patch patch = tile_of_task(r, task);
    tile_end end = TILE_DENSE;
    ada_prospect ahead = {0};
    s.base.ahead = &ahead, s.base.tile.ahead = ahead.now;
    if (r->k->units_begin) r->k->units_begin();
    if (r->tallies && r->p->sparse->budget2[patch.b * r->p->H + patch.h] > 0) {
        const sparse_lists lists = sparse_lists_of(r, &carver);
        end = attend_tile_sparse(r, &s, &lists, patch, index, job, worker);
    }
    if (end == TILE_DENSE) {
        ahead = look_ahead(r, &patch, index, ADA_STRIP);
        end = attend_tile_narrow(r, &s, patch, r->store.slots[index], job, worker) ? TILE_DONE : TILE_UNFIT;
    }
    if (end == TILE_UNFIT) atomic_store_explicit(raised, true, memory_order_relaxed);
    if (r->k->units_end) r->k->units_end();
}

static void survey_task(void *context, ada_job *job, int64_t task, int worker) {
    const ada_run *r = context;
    if (!ada_job_cancelled(job, worker))
        ada_store_survey(&r->store, r->store.whole + task, r->scratch + worker * r->scratch_bytes);
}

static void pack_task(void *context, ada_job *job, int64_t task, int worker) {
    const ada_run *r = context;
    const ada_store *store = &r->store;
    if (!ada_job_cancelled(job, worker))
        ada_store_pack(store, store->whole + task / store->strips, task % store->strips,
                       r->scratch + worker * r->scratch_bytes);
}

/* From packing to the last tile, in one core's cache. */
static void whole_head(const ada_run *r, ada_job *job, int64_t slot, int worker) {
    const ada_store *store = &r->store;
    char *scratch = r->scratch + worker * r->scratch_bytes;
    store->place[slot] = worker;
    ada_store_survey(store, slot, scratch);
    for (int64_t strip = 0; strip < store->strips; strip++) ada_store_pack(store, slot, strip, scratch);
    for (int64_t i = store->first[slot]; i < store->first[slot + 1]; i++) {
        r->raised[i] = store->unfit[slot];
        for (int64_t tile = 0; tile < r->tiles && !ada_job_cancelled(job, worker); tile++)
            rung_tile(r, job, i * r->tiles + tile, worker);
        if (r->p->head_done) tell_head(r, job, i, worker);
    }
}

static void rung_task(void *context, ada_job *job, int64_t task, int worker) {
    const ada_run *r = context;
    const ada_store *store = &r->store;
    if (task < store->whole)
        whole_head(r, job, task, worker);
    else
        rung_tile(r, job, store->first[store->whole] * r->tiles + task - store->whole, worker);
}

static void raised_task(void *context, ada_job *job, int64_t task, int worker) {
    const ada_run *r = context;
    if (r->raised[task / r->tiles]) tile_task(context, job, task, worker);
}

/* Of the heads that were not computed whole. */
static void tell_task(void *context, ada_job *job, int64_t index, int worker) {
    const ada_run *r = context;
    tell_head(r, job, r->store.first[r->store.whole] + index, worker);
}

/* All tiles of a head. */
static void head_task(void *context, ada_job *job, int64_t index, int worker) {
    const ada_run *r = context;
    for (int64_t i = 0; i < r->tiles && !ada_job_cancelled(job, worker); i++)
        tile_task(context, job, index * r->tiles + i, worker);
}

static void split_task(void *context, ada_job *job, int64_t task, int worker) {
    const ada_run *r = context;
    int64_t split = task % r->splits, head = task / r->splits, b = head / r->p->G, g = head % r->p->G;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    if (r->p->compute_f64) {
        scratch_f64 s = scratch_of_f64(r->p, &carver);
        attend_split_f64(r, &s, b, g, split, job, worker);
    } else {
        scratch_f32 s = scratch_of_f32(r->p, &carver);
        attend_split_f32(r, &s, b, g, split, job, worker);
    }
}

static void join_task(void *context, ada_job *job, int64_t head, int worker) {
    const ada_run *r = context;
    const ada_problem *p = r->p;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const scratch_f64 s64 = scratch_of_f64(p, &carver);
    carver.used = 0;
    const scratch_f32 s32 = scratch_of_f32(p, &carver);
    for (int64_t i = 0; i < p->T; i++) {
        const ada_patch patch = {head / p->H, head % p->H, i, 0, 1, 0};
        if (!(p->compute_f64 ? join_splits_f64(r, &s64, patch.b, patch.h, i)
                             : join_splits_f32(r, &s32, patch.b, patch.h, i)))
            attend_tile_carefully(r, &patch, 1, job, worker);
    }
}

/* Looks for what a float mask must not hold, where it does not repeat itself, in rows of ADA_LANES queries.
 */
static void mask_task(void *context, ada_job *job, int64_t task, int worker) {
    ada_run *r = context;
    const ada_problem *p = r->p;
    const ada_array *mask = &p->attn_mask;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    float *copy = ada_carve(&carver, ADA_BLOCK * sizeof *copy);
    int64_t heads = mask->stride[1] ? p->H : 1, width = mask->stride[3] ? p->S : 1;
    int64_t rows = mask->stride[2] ? p->T : 1, chunks = (rows + ADA_LANES - 1) / ADA_LANES;
    int64_t b = task / (heads * chunks), h = task / chunks % heads, first = task % chunks * ADA_LANES;
    for (int64_t i = first; i < rows && i < first + ADA_LANES; i++)
        for (int64_t j = 0; j < width; j += ADA_BLOCK) {
            if (ada_job_cancelled(job, worker)) return;
            const int n = (int)(width - j < ADA_BLOCK ? width - j : ADA_BLOCK);
            const char *row = ada_row_at(mask, b, h, i) + j * mask->stride[3];
            bool bad = false;
            if (mask->dtype == ADA_F64) {
                for (int c = 0; c < n; c++) bad |= !(*(const double *)(row + c * mask->stride[3]) < INFINITY);
            } else {
                ada_array part = *mask;
                ptrdiff_t ld;
                part.data = (void *)row;
                part.shape[3] = n;
                const float *x = rows_at_f32(r->k, &part, 0, 0, 0, 1, copy, &ld);
                for (int c = 0; c < n; c++) bad |= !(x[c] < INFINITY);
            }
            if (bad) atomic_store_explicit(&r->mask_is_bad, true, memory_order_relaxed);
        }
}

/* Small heads are shared out whole where each thread gets at least so many. */
#define HEADS_PER_THREAD 3

/* Threads that are worth waking: each gets at least this many multiply-adds, about 10 us of one core. */
#define WORK_PER_THREAD ((double)(1 << 19))

int ada_threads_for(const ada_problem *p, int64_t tasks, double multiply_adds) {
    int64_t n = p->has_num_threads ? p->num_threads : ada_get_num_threads();
    double useful = fmin(fmin((double)tasks, ADA_MAX_THREADS), 1 + multiply_adds / WORK_PER_THREAD);
    return (int)fmin((double)n, useful);
}

/* The most splits that a sequence has. */
static int64_t count_splits(const ada_problem *p) {
    int64_t most = 1;
    for (int64_t b = 0; b < p->B; b++) {
        const int64_t size = ada_split_keys(p, b), splits = (ada_key_count(p, b) + size - 1) / size;
        if (splits > most) most = splits;
    }
    return most;
}

/* Whether so many heads are tasks as a whole: small ones, whose numbers then stay in the cache of one core,
 * and enough of them that threads end together. */
static bool whole_heads(const ada_problem *p, int64_t heads, int threads) {
    return ada_is_few(p) && heads >= (threads > 1 ? HEADS_PER_THREAD * threads : 1);
}

/* Heads on the problem's rungs, whole ones and then tiles of the others; then those that their rung could not
 * hold in fp32. */
static bool attend_on_rungs(ada_run *r, int threads, bool (*interrupt)(void *), void *context) {
    const ada_problem *p = r->p;
    const ada_store *store = &r->store;
    const int64_t others = store->heads - store->whole, tasks = r->n_heads * r->tiles;
    const int64_t rest = tasks - store->first[store->whole] * r->tiles;
    if (!ada_parallel_for(others, threads, survey_task, r, interrupt, context) ||
        !ada_parallel_for(others * store->strips, threads, pack_task, r, interrupt, context))
        return false;
    for (int64_t i = 0; i < r->n_heads; i++) atomic_init(&r->raised[i], store->unfit[store->slots[i]]);
    if (!ada_parallel_for(store->whole + rest, threads, rung_task, r, interrupt, context)) return false;
    int64_t raised = 0;
    for (int64_t i = 0; i < r->n_heads; i++) {
        raised += r->raised[i];
        if (r->tallies) {
            const double blocks = (double)r->tallies[i].blocks, stand_ins = (double)r->tallies[i].stand_ins;
            p->sparse->kept[r->heads ? r->heads[i] : i] =
                r->raised[i] || blocks == 0 ? 1 : 1 - stand_ins / blocks;
        }
        if (r->raised[i] && p->ran)
            p->ran[r->heads ? r->heads[i] : i] = (ada_choice){ADA_RUNG_FP32, ADA_RUNG_FP32};
    }
    return (!raised || ada_parallel_for(tasks, threads, raised_task, r, interrupt, context)) &&
           (!p->head_done || ada_parallel_for(rest / r->tiles, threads, tell_task, r, interrupt, context));
}

ada_status ada_no_scratch(int64_t bytes, ada_error *error) {
    return ada_fail(error, ADA_ERR_MEMORY, "attention: no memory for %lld bytes of scratch",
                    (long long)bytes);
}

ada_status ada_check_mask(const ada_problem *p, bool (*interrupt)(void *), void *context, ada_error *error) {
    const ada_array *mask = &p->attn_mask;
    if (!mask->data || mask->dtype == ADA_BOOL) return ADA_OK;
    ada_run r = {.p = p, .k = ada_kernels_get()};
    const int64_t heads = (mask->stride[0] ? p->B : 1) * (mask->stride[1] ? p->H : 1);
    const int64_t rows = mask->stride[2] ? p->T : 1, width = mask->stride[3] ? p->S : 1;
    const int64_t tasks = heads * ((rows + ADA_LANES - 1) / ADA_LANES);
    const int threads = ada_threads_for(p, tasks, (double)(heads * rows) * (double)width);
    r.scratch_bytes = ADA_BLOCK * sizeof(float);
    r.scratch = ada_scratch_take(threads * r.scratch_bytes);
    if (!r.scratch) return ada_no_scratch(threads * r.scratch_bytes, error);
    const bool done = ada_parallel_for(tasks, threads, mask_task, &r, interrupt, context);
    ada_scratch_give_back(r.scratch);
    if (!done) return ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
    if (r.mask_is_bad)
        return ada_fail(error, ADA_ERR_ARGUMENT,
                        "attn_mask: expected finite numbers or -inf, got NaN or +inf");
    return ADA_OK;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* What heads on rungs need beside the store. */
static void carve_heads(ada_run *r, ada_carver *c) {
    r->raised = ada_carve(c, r->n_heads * (int64_t)sizeof *r->raised);
    r->tallies = r->p->sparse ? ada_carve(c, r->n_heads * (int64_t)sizeof *r->tallies) : NULL;
}

ada_status ada_execute(const ada_problem *p, const int64_t *heads, int64_t n_heads, bool (*interrupt)(void *),
                       void *context, ada_error *error) {
    ada_run r = {.p = p,
                 .k = ada_kernels_get(),
                 .heads = heads,
                 .n_heads = heads ? n_heads : p->B * p->H,
                 .tiles = (p->T + ADA_LANES - 1) / ADA_LANES};
    const bool on_rungs = ada_store_needed(p, r.k), few = p->T <= ADA_ROWS_MAX && !on_rungs && !heads;
    if (few) r.splits = count_splits(p);
    const int64_t rows = r.n_heads * p->T, tasks = few ? p->B * p->G * r.splits : r.n_heads * r.tiles;
    const int threads = ada_threads_for(p, tasks, (double)rows * p->S * (p->D + p->E));
    r.threads = threads;
    r.by_heads = !on_rungs && !few && whole_heads(p, r.n_heads, threads);

    ada_carver size = {NULL, 0};
    scratch_of_f64(p, &size);
    r.scratch_bytes = size.used;
    int64_t store_bytes = 0;
    if (on_rungs) {
        size.used = 0;
        carve_heads(&r, &size);
        store_bytes = size.used + ada_store_plan(&r.store, p, r.k, heads, r.n_heads, threads);
        size.used = 0;
        narrow_of(&r, &size);
        if (p->sparse) sparse_lists_of(&r, &size);
        r.scratch_bytes = larger(r.scratch_bytes, larger(size.used, ada_store_scratch_bytes(&r.store)));
    }
    const int64_t partial_bytes =
        rows * r.splits * (p->E + 2) * (int64_t)(p->compute_f64 ? sizeof(double) : sizeof(float));
    size.used = 0;
    const bool told = p->head_done && !few && !on_rungs;
    if (told) ada_carve(&size, r.n_heads * (int64_t)sizeof *r.left);
    const int64_t bytes = threads * r.scratch_bytes + partial_bytes + store_bytes + size.used;
    r.scratch = ada_scratch_take(bytes);
    if (!r.scratch) return ada_no_scratch(bytes, error);
    r.partials = r.scratch + threads * r.scratch_bytes;
    if (on_rungs) {
        ada_carver carver = {r.partials, 0}; /* no splits on this way */
        carve_heads(&r, &carver);
        for (int64_t i = 0; r.tallies && i < r.n_heads; i++)
            atomic_init(&r.tallies[i].blocks, 0), atomic_init(&r.tallies[i].stand_ins, 0);
        ada_store_attach(&r.store, heads, (char *)r.partials + carver.used);
    }
    if (told) {
        ada_carver carver = {r.partials, 0}; /* nor on this one */
        r.left = ada_carve(&carver, r.n_heads * (int64_t)sizeof *r.left);
        for (int64_t i = 0; i < r.n_heads; i++) atomic_init(&r.left[i], (int)r.tiles);
    }
    for (int64_t i = 0; p->ran && i < r.n_heads; i++) p->ran[heads ? heads[i] : i] = p->precision;

    bool done;
    if (on_rungs)
        done = attend_on_rungs(&r, threads, interrupt, context);
    else if (r.by_heads)
        done = ada_parallel_for(r.n_heads, threads, head_task, &r, interrupt, context);
    else
        done = ada_parallel_for(tasks, threads, few ? split_task : tile_task, &r, interrupt, context);
    if (done && few) {
        const int joiners = ada_threads_for(p, p->B * p->H, (double)rows * r.splits * p->E);
        done = ada_parallel_for(p->B * p->H, joiners < threads ? joiners : threads, join_task, &r, interrupt,
                                context);
    }
    ada_scratch_give_back(r.scratch);
    return done ? ADA_OK : ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
}
