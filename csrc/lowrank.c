/* Attention over landmarks; see lowrank.h. Products run in the tile kernels of fp32. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "exact.h"
#include "execute.h"
#include "landmarks.h"
#include "memory.h"
#include "parallel.h"
#include "rows.h"

#define REAL float
#define KIND(name) name##_f32
#include "read_tpl.h"

typedef struct {
    const ada_problem *p;
    const ada_kernels *k;
    const ada_low_rank *low;
    const int64_t *heads;
    int64_t n_heads, tiles, most_tiles, most_bins; /* of queries, of landmarks, of keys */
    int64_t *offset;                               /* [n_heads] of a head's memory */
    char *memory, *scratch;
    int64_t scratch_bytes;
    atomic_bool *failed;   /* [n_heads] */
    atomic_llong *exactly; /* [n_heads] rows that were computed exactly */
} run;

/* What a head's queries need. */
typedef struct {
    ada_landmarks l;
    ada_far_keys far; /* sums of the first keys, up to the end of each bin */
    float *packed;    /* [tiles][D][64] landmarks as the arrays' keys take them, in log2 units */
    float *reference; /* [tiles][64] what the mean of the keys is to them */
    float *sums;      /* [tiles][bins][E + 1][64] H(L, K) (V, 1) */
    float *values;    /* [bins][chunks of 64 columns][R][64] F(K)' V */
    float *masses;    /* [bins][R] F(K)' 1 */
} state;

static int64_t chunks_of(const ada_problem *p) { return (p->E + ADA_LANES - 1) / ADA_LANES; }

static state state_of(const run *r, int64_t index, ada_carver *c) {
    const ada_problem *p = r->p;
    const int64_t real = sizeof(float);
    state s = {.l = ada_landmarks_of(p, r->low->rank[index], c)};
    ada_far_keys_of(p, r->heads[index] / p->H, &s.far);
    const int64_t R = s.l.R, lanes = ada_up_to(s.l.R, ADA_LANES), bins = s.far.bins;
    s.packed = ada_carve(c, lanes * p->D * real);
    s.reference = ada_carve(c, lanes * real);
    s.sums = ada_carve(c, lanes * bins * (p->E + 1) * real);
    s.values = ada_carve(c, bins * chunks_of(p) * R * ADA_LANES * real);
    s.masses = ada_carve(c, bins * R * real);
    return s;
}

static state state_at(const run *r, int64_t index) {
    ada_carver carver = {r->memory + r->offset[index], 0};
    return state_of(r, index, &carver);
}

static void fail(run *r, int64_t index) {
    atomic_store_explicit(&r->failed[index], true, memory_order_relaxed);
}

static void landmark_task(void *context, ada_job *job, int64_t index, int worker) {
    run *r = context;
    const ada_problem *p = r->p;
    const int64_t b = r->heads[index] / p->H, h = r->heads[index] % p->H;
    const int D = (int)p->D;
    state to = state_at(r, index);
    if (ada_job_cancelled(job, worker)) return;
    if (!ada_find_landmarks(p, r->k, b, h, r->low->rank[index], NULL, &to.l,
                            r->scratch + worker * r->scratch_bytes)) {
        fail(r, index);
        return;
    }
    for (int i = 0; i < to.l.R; i += ADA_LANES) {
        const int n = to.l.R - i < ADA_LANES ? to.l.R - i : ADA_LANES;
        const float factor = (float)(to.l.factor[1] * ADA_LOG2E);
        const float *point = to.l.point + i * D;
        float *reference = to.reference + i;
        r->k->pack_f32(to.packed + i * D, point, D, n, D, ADA_LANES, factor);
        r->k->row_scores_f32(reference, to.l.mean, 1, point, D, n, D);
        for (int j = 0; j < ADA_LANES; j++) reference[j] = j < n ? reference[j] * factor : reference[n - 1];
    }
}

/* Scores of a tile with the n keys from j on, in place where they can be read there, as weights; bits of
 * lanes in visible (NULL: all). */
static bool weigh_keys(const run *r, const ada_tile_f32 *t, int64_t b, int64_t g, int64_t j, int n,
                       float *keys, const uint64_t *visible) {
    const int D = (int)r->p->D;
    ptrdiff_t ld;
    const float *k = rows_at_f32(r->k, &r->p->key, b, g, j, n, keys, &ld);
    if (n == ADA_BLOCK && !visible) return r->k->scores_weights_f32(t, k, ld, n);
    if (n % ADA_KEY_STEP) { /* scores reads whole steps of keys */
        for (int i = 0; k != keys && i < n; i++) memcpy(keys + i * D, k + i * ld, (size_t)D * sizeof *keys);
        memset(keys + n * D, 0, (size_t)((ADA_BLOCK - n) * D) * sizeof *keys);
        k = keys, ld = D;
    }
    r->k->scores_f32(t, k, ld, ada_up_to(n, ADA_KEY_STEP));
    return r->k->weights_f32(t, n, visible, NULL, NULL);
}

/* H(L, K) (V, 1) for a tile of landmarks. */
static void keys_task(void *context, ada_job *job, int64_t task, int worker) {
    run *r = context;
    const ada_problem *p = r->p;
    const int64_t index = task / r->most_tiles, tile = task % r->most_tiles;
    const int64_t b = r->heads[index] / p->H, h = r->heads[index] % p->H, g = h / (p->H / p->G);
    const int D = (int)p->D, E = (int)p->E;
    const state s = state_at(r, index);
    if (tile * ADA_LANES >= s.l.R || r->failed[index]) return;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    float *keys = ada_carve(&carver, ADA_BLOCK * p->D * (int64_t)sizeof *keys);
    float *values = ada_carve(&carver, ADA_BLOCK * p->E * (int64_t)sizeof *values);
    const int64_t left = s.l.R - tile * ADA_LANES, strip = (E + 1) * ADA_LANES;
    ada_tile_f32 t = {.q = s.packed + tile * D * ADA_LANES,
                      .p = ada_carve(&carver, ADA_BLOCK * ADA_LANES * (int64_t)sizeof *t.p),
                      .m = s.reference + tile * ADA_LANES,
                      .D = D,
                      .E = E,
                      .lanes = left < ADA_LANES ? (int)left : ADA_LANES};
    for (int64_t bin = 0; bin < s.far.bins; bin++) {
        const int64_t end = s.far.first + (bin + 1) * s.far.bin;
        float *sums = s.sums + (tile * s.far.bins + bin) * strip;
        if (bin)
            memcpy(sums, sums - strip, (size_t)strip * sizeof *sums);
        else
            memset(sums, 0, (size_t)strip * sizeof *sums);
        t.o = sums, t.l = sums + E * ADA_LANES;
        for (int64_t j = end - s.far.bin; j < end; j += ADA_BLOCK) {
            const int n = (int)(end - j < ADA_BLOCK ? end - j : ADA_BLOCK);
            ptrdiff_t ld;
            if (ada_job_cancelled(job, worker)) return;
            if (!weigh_keys(r, &t, b, g, j, n, keys, NULL)) {
                fail(r, index);
                return;
            }
            const float *v = rows_at_f32(r->k, &p->value, b, g, j, n, values, &ld);
            r->k->values_f32(&t, v, ld, n);
        }
    }
}

/* The basis's transpose times that, for one bin. */
static void values_task(void *context, ada_job *job, int64_t task, int worker) {
    run *r = context;
    const int E = (int)r->p->E;
    const int64_t index = task / r->most_bins, bin = task % r->most_bins, chunks = chunks_of(r->p);
    const state s = state_at(r, index);
    if (bin >= s.far.bins || ada_job_cancelled(job, worker) || r->failed[index]) return;
    float *rows = (float *)(r->scratch + worker * r->scratch_bytes), *masses = s.masses + bin * s.l.R;
    memset(masses, 0, (size_t)s.l.R * sizeof *masses);
    for (int64_t c = 0; c < chunks; c++) {
        const int first = (int)c * ADA_LANES, n = E - first < ADA_LANES ? E - first : ADA_LANES;
        float *out = s.values + (bin * chunks + c) * s.l.R * ADA_LANES;
        memset(rows, 0, (size_t)(s.l.R * ADA_LANES) * sizeof *rows);
        memset(out, 0, (size_t)(s.l.R * ADA_LANES) * sizeof *out);
        for (int l = 0; l < s.l.R; l++) {
            const float *sums =
                s.sums + (l / ADA_LANES * s.far.bins + bin) * (E + 1) * ADA_LANES + l % ADA_LANES;
            for (int e = 0; e < n; e++) rows[l * ADA_LANES + e] = sums[(first + e) * ADA_LANES];
            for (int i = l; c == 0 && i < s.l.R; i++)
                masses[i] += sums[E * ADA_LANES] * s.l.basis[l * s.l.R + i];
        }
        for (int l = 0; l < s.l.R; l += ADA_BLOCK) {
            const ada_tile_f32 t = {.p = rows + l * ADA_LANES,
                                    .o = out + l * ADA_LANES,
                                    .E = s.l.R - l,
                                    .lanes = ada_up_to(n, ADA_LANE_STEP)};
            r->k->values_f32(&t, s.l.basis + l * s.l.R + l, s.l.R,
                             s.l.R - l < ADA_BLOCK ? s.l.R - l : ADA_BLOCK);
        }
    }
}

typedef struct {
    float *q, *p, *f, *o, *m, *l, *factor; /* [D], [64], [R], [E up to 64] of [64]; [64] */
    float *rows;                           /* [64][max(D, E)] */
    float *own, *square, *shift;           /* [64] */
    float *keys, *values;                  /* [64][D] and [64][E] */
    char *exact;
} query_scratch;

static query_scratch query_scratch_of(const ada_problem *p, int R, ada_carver *c) {
    const int64_t real = sizeof(float), strip = ADA_LANES * real, width = p->D > p->E ? p->D : p->E;
    query_scratch x;
    x.q = ada_carve(c, p->D * strip);
    x.p = ada_carve(c, ADA_BLOCK * strip);
    x.f = ada_carve(c, R * strip);
    x.o = ada_carve(c, p->E * strip);
    x.m = ada_carve(c, strip);
    x.l = ada_carve(c, strip);
    x.factor = ada_carve(c, strip);
    x.rows = ada_carve(c, width * strip);
    x.own = ada_carve(c, strip);
    x.square = ada_carve(c, strip);
    x.shift = ada_carve(c, strip);
    x.keys = ada_carve(c, ADA_BLOCK * p->D * real);
    x.values = ada_carve(c, ADA_BLOCK * p->E * real);
    x.exact = ada_carve(c, ada_exact_scratch_bytes(p));
    return x;
}

/* Rows of a tile that are not to be had by landmarks; false where fp32 does not do for them. */
static bool compute_exactly(const run *r, const ada_patch *patch, uint64_t rows, const query_scratch *x) {
    const ada_problem *p = r->p;
    const int E = (int)p->E;
    while (rows) {
        int64_t queries[ADA_EXACT_ROWS];
        int n = 0;
        ada_exact exact;
        for (; rows && n < ADA_EXACT_ROWS; rows &= rows - 1) queries[n++] = patch->i + __builtin_ctzll(rows);
        ada_exact_rows(p, r->k, false, false, patch->b, patch->h, queries, n, x->exact, &exact);
        for (int i = 0; i < n; i++) {
            if (!exact.good[i]) return false;
            ada_store_rows_f64(r->k, &p->out, patch->b, patch->h, queries[i], 1, E, exact.o + i * E, E);
            ada_store_lse(p, patch->b, patch->h, queries[i], exact.lse[i]);
        }
    }
    return true;
}

/* Squared norms and products with the keys' mean of a tile's queries; those beyond the exponents' range count
 * as zero and are returned. */
static uint64_t load_queries(const run *r, const state *s, const query_scratch *x, const ada_patch *patch,
                             const float **q, ptrdiff_t *ld) {
    const ada_problem *p = r->p;
    const int D = (int)p->D;
    const float factor = (float)s->l.factor[0];
    uint64_t out = 0;
    *q = rows_at_f32(r->k, &p->query, patch->b, patch->h, patch->i, patch->n, x->rows, ld);
    r->k->squares(x->own, NULL, *q, *ld, patch->n, D, NULL, NULL);
    r->k->row_scores_f32(x->shift, s->l.mean, 1, *q, *ld, patch->n, D);
    for (int i = 0; i < patch->n; i++) {
        x->own[i] *= factor * factor;
        if (!(x->own[i] <= ADA_MOST_EXPONENT)) out |= (uint64_t)1 << i;
    }
    if (!out) return 0;
    if (*q != x->rows)
        ada_load_rows_f32(r->k, x->rows, D, &p->query, patch->b, patch->h, patch->i, patch->n, D);
    *q = x->rows, *ld = D;
    for (int i = 0; i < patch->n; i++)
        if (out >> i & 1)
            memset(x->rows + i * D, 0, (size_t)D * sizeof *x->rows), x->own[i] = x->shift[i] = 0;
    return out;
}

/* F of a tile's queries and its squared norms, then sums over the first `bins` bins of keys: l, o. */
static void attend_far(const run *r, const state *s, const query_scratch *x, ada_tile_f32 t, int64_t bins) {
    const int64_t chunks = chunks_of(r->p);
    const int E = (int)r->p->E;
    memset(x->m, 0, ADA_LANES * sizeof *x->m);
    memset(x->l, 0, ADA_LANES * sizeof *x->l);
    memset(x->f, 0, (size_t)(s->l.R * ADA_LANES) * sizeof *x->f);
    memset(x->square, 0, ADA_LANES * sizeof *x->square);
    for (int j = 0; j < s->l.R; j += ADA_BLOCK) {
        const int n = s->l.R - j < ADA_BLOCK ? s->l.R - j : ADA_BLOCK;
        t.E = 0;
        r->k->scores_weights_f32(&t, s->l.point + j * t.D, t.D,
                                 n); /* exponents are within ADA_MOST_EXPONENT */
        t.o = x->f + j * ADA_LANES, t.E = s->l.R - j;
        r->k->values_f32(&t, s->l.basis + j * s->l.R + j, s->l.R, n);
    }
    for (int j = 0; j < s->l.R; j++)
        for (int i = 0; i < ADA_LANES; i++) x->square[i] += x->f[j * ADA_LANES + i] * x->f[j * ADA_LANES + i];
    memset(x->l, 0, ADA_LANES * sizeof *x->l);
    memset(x->o, 0, (size_t)E * ADA_LANES * sizeof *x->o);
    if (bins == 0) return;
    t.p = x->f, t.o = x->l, t.E = 1;
    r->k->values_f32(&t, s->masses + (bins - 1) * s->l.R, 1, s->l.R);
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t left = E - c * ADA_LANES;
        t.o = x->o + c * ADA_LANES * ADA_LANES, t.E = left < ADA_LANES ? (int)left : ADA_LANES;
        r->k->values_f32(&t, s->values + ((bins - 1) * chunks + c) * s->l.R * ADA_LANES, ADA_LANES, s->l.R);
    }
}

/* Goes on with the keys from patch.j to end, exactly. False where fp32 does not do. */
static bool attend_near(const run *r, const query_scratch *x, const ada_tile_f32 *t, ada_patch patch,
                        int64_t end) {
    const ada_problem *p = r->p;
    const int64_t g = patch.h / (p->H / p->G);
    for (; patch.j < end; patch.j += ADA_BLOCK) {
        uint64_t bits[ADA_LANES];
        ptrdiff_t ld;
        patch.nk = (int)(end - patch.j < ADA_BLOCK ? end - patch.j : ADA_BLOCK);
        const ada_sight sight = ada_visible_rows(p, &patch, bits);
        if (sight == ADA_HIDDEN) continue;
        if (sight == ADA_MIXED) {
            for (int i = patch.n; i < ADA_LANES; i++) bits[i] = bits[patch.n - 1];
            ada_transpose_bits(bits);
        }
        if (!weigh_keys(r, t, patch.b, g, patch.j, patch.nk, x->keys, sight == ADA_MIXED ? bits : NULL))
            return false;
        const float *v = rows_at_f32(r->k, &p->value, patch.b, g, patch.j, patch.nk, x->values, &ld);
        r->k->values_f32(t, v, ld, patch.nk);
    }
    return true;
}

/* Lanes whose sums over the far keys cannot be right; they go on with none. */
static uint64_t distrust(const state *s, const query_scratch *x, const ada_patch *patch, int64_t bins) {
    const int64_t keys = s->far.end - s->far.first;
    uint64_t bad = 0;
    /* Scores of all centred keys have a mean of zero, so their exponentials one of at least one. */
    const double least = s->far.whole ? (double)keys / 2 : 0;
    for (int i = 0; bins && i < patch->n; i++)
        if (!((double)x->l[i] > least && x->l[i] < INFINITY)) bad |= (uint64_t)1 << i, x->l[i] = 1;
    return bad;
}

static void query_task(void *context, ada_job *job, int64_t task, int worker) {
    run *r = context;
    const ada_problem *p = r->p;
    const int64_t index = task / r->tiles, head = r->heads[index], first = task % r->tiles * ADA_LANES;
    const int E = (int)p->E, D = (int)p->D;
    ada_patch patch = {
        head / p->H, head % p->H, first, 0, (int)(p->T - first < ADA_LANES ? p->T - first : ADA_LANES), 0};
    if (ada_job_cancelled(job, worker) || r->failed[index]) return;
    const state s = state_at(r, index);
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const query_scratch x = query_scratch_of(p, s.l.R, &carver);
    const int64_t bins = ada_bins_seen(p, &s.far, patch.b, first), far = bins * s.far.bin;
    const double scale = p->scale * ADA_LOG2E, share = (double)far / (double)(s.far.end - s.far.first);
    const float *q;
    ptrdiff_t ld;
    ada_tile_f32 t = {
        .q = x.q, .p = x.p, .m = x.m, .l = x.l, .D = D, .lanes = ada_up_to(patch.n, ADA_LANE_STEP)};
    uint64_t exactly = load_queries(r, &s, &x, &patch, &q, &ld);
    r->k->pack_f32(x.q, q, ld, patch.n, D, t.lanes, (float)(s.l.factor[0] * ADA_LOG2E));
    attend_far(r, &s, &x, t, bins);
    exactly |= distrust(&s, &x, &patch, bins);
    for (int i = 0; i < ADA_LANES; i++)
        x.m[i] = (float)((double)x.shift[i < patch.n ? i : patch.n - 1] * scale);
    patch.j = s.far.first + far;
    t.o = x.o, t.E = E;
    bool good = true;
    const int64_t end = ada_visible_span(p, patch.b, first + patch.n - 1).end;
    if (patch.j < end) {
        r->k->pack_f32(x.q, q, ld, patch.n, D, t.lanes, (float)scale);
        good = attend_near(r, &x, &t, patch, end);
    }
    for (int i = 0; i < ADA_LANES; i++) x.factor[i] = 0;
    for (int i = 0; i < patch.n; i++) {
        const uint64_t lane = (uint64_t)1 << i;
        const double own = exp((double)x.own[i]), mass = (double)x.l[i];
        const double residual = fmax(own - (double)x.square[i], (double)ADA_LEAST_RESIDUAL * own);
        const double rest = share > 0 ? share * residual / (mass * mass) : 0,
                     over = r->low->gain[index] * rest;
        if (rest > r->low->limit[index]) exactly |= lane;
        if (r->low->shift2) r->low->shift2[head * p->T + first + i] = exactly & lane ? 0 : (float)over;
        if (exactly & lane) continue;
        double lse;
        x.factor[i] = (float)ada_row_factor(p, patch.h, (double)x.m[i], mass, p->lse ? &lse : NULL);
        if (p->lse) ada_store_lse(p, patch.b, patch.h, first + i, lse);
    }
    const int many = __builtin_popcountll(exactly);
    good &= atomic_fetch_add_explicit(&r->exactly[index], many, memory_order_relaxed) + many <=
                ada_most_exact_rows(p->T) &&
            r->k->unpack_f32(x.rows, E, x.o, x.factor, patch.n, E);
    if (good) {
        ada_store_rows_f32(r->k, &p->out, patch.b, patch.h, first, patch.n, E, x.rows, E);
        good = compute_exactly(r, &patch, exactly, &x);
    }
    if (!good) fail(r, index);
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* All but what state_of carves behind it. */
static void carve_run(run *r, int threads, ada_carver *c) {
    r->scratch = ada_carve(c, threads * r->scratch_bytes);
    r->offset = ada_carve(c, r->n_heads * (int64_t)sizeof *r->offset);
    r->failed = ada_carve(c, r->n_heads * (int64_t)sizeof *r->failed);
    r->exactly = ada_carve(c, r->n_heads * (int64_t)sizeof *r->exactly);
}

static bool run_all(run *r, int threads, bool (*interrupt)(void *), void *context) {
    return ada_parallel_for(r->n_heads, threads, landmark_task, r, interrupt, context) &&
           ada_parallel_for(r->n_heads * r->most_tiles, threads, keys_task, r, interrupt, context) &&
           ada_parallel_for(r->n_heads * r->most_bins, threads, values_task, r, interrupt, context) &&
           ada_parallel_for(r->n_heads * r->tiles, threads, query_task, r, interrupt, context);
}

ada_status ada_execute_low_rank(const ada_problem *p, const ada_low_rank *low, const int64_t *heads,
                                int64_t n_heads, bool (*interrupt)(void *), void *context, ada_error *error) {
    run r = {.p = p,
             .k = ada_kernels_get(),
             .low = low,
             .heads = heads,
             .n_heads = n_heads,
             .tiles = (p->T + ADA_LANES - 1) / ADA_LANES};
    int most = 1;
    double work = 0;
    for (int64_t i = 0; i < n_heads; i++) {
        ada_far_keys far;
        ada_far_keys_of(p, heads[i] / p->H, &far);
        most = low->rank[i] > most ? low->rank[i] : most;
        r.most_bins = larger(r.most_bins, far.bins);
        work += ada_low_rank_operations(&far, (double)p->T, p->D, p->E, low->rank[i]) / 2;
    }
    const int R = ada_up_to(most, ADA_PIVOTS);
    r.most_tiles = (R + ADA_LANES - 1) / ADA_LANES;
    const int threads = ada_threads_for(p, n_heads * larger(r.tiles, r.most_tiles), work);
    ada_carver size = {NULL, 0};
    query_scratch_of(p, R, &size);
    const int64_t real = sizeof(float), blocks = ADA_BLOCK * (p->D + p->E + ADA_LANES) * real + 3 * 64;
    const int64_t building = ada_landmark_scratch_bytes(p, R);
    r.scratch_bytes = larger(larger(size.used, blocks), larger(building, R * ADA_LANES * real));
    size.used = 0;
    carve_run(&r, threads, &size);
    const int64_t before = size.used;
    for (int64_t i = 0; i < n_heads; i++) state_of(&r, i, &size);
    r.memory = ada_scratch_take(size.used);
    if (!r.memory) return ada_no_scratch(size.used, error);
    size = (ada_carver){r.memory, 0};
    carve_run(&r, threads, &size);
    size = (ada_carver){NULL, before};
    for (int64_t i = 0; i < n_heads; i++) {
        r.offset[i] = size.used;
        state_of(&r, i, &size);
        atomic_init(&r.failed[i], false), atomic_init(&r.exactly[i], 0);
    }
    const bool done = run_all(&r, threads, interrupt, context);
    for (int64_t i = 0; i < n_heads; i++) {
        double over = 0;
        for (int64_t row = 0; done && low->shift2 && row < p->T; row++)
            over += (double)low->shift2[heads[i] * p->T + row];
        low->failed[i] = r.failed[i] || over > ADA_MOST_SUM * (double)p->T;
    }
    ada_scratch_give_back(r.memory);
    return done ? ADA_OK : ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
}
