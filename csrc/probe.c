/* Statistics, row sampling and row profiles. All sums run in an order that the head alone fixes. */
#include "probe.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cache.h"
#include "exact.h"
#include "execute.h"
#include "operands.h"
#include "rows.h"
#include "sparse.h"
#include "visible.h"

#define REAL float
#define KIND(name) name##_f32
#include "read_tpl.h"

/* Rows whose scores spread more see one key, and rounding moves little. */
#define MOST_SPREAD 16
/* Rows that spread so much more than the mean are so few that a sample may miss them. */
#define OUTLIER 8
/* Rows of a block that is looked at for others, too. */
#define SOME_OF_BLOCK UINT64_C(0xFFFF)

static double square(double x) { return x * x; }

static double total_of(const float *parts) {
    double sum = 0;
    for (int i = 0; i < ADA_PARTS; i++) sum += (double)parts[i];
    return sum;
}

/* ---- keys ---- */

static ada_key_probe carve_probe(const ada_problem *p, bool sparse, ada_carver *c) {
    const int64_t real = sizeof(float), blocks = ada_block_count(p);
    ada_key_probe keys = {0};
    keys.mean = ada_carve(c, p->D * real);
    keys.variance = ada_carve(c, p->D * real);
    keys.square = ada_carve(c, p->D * real);
    keys.norm2 = ada_carve(c, blocks * ADA_BLOCK * real);
    keys.value2 = ada_carve(c, blocks * ADA_BLOCK * real);
    keys.largest = ada_carve(c, blocks * real);
    keys.seen = ada_carve(c, blocks * (int64_t)sizeof *keys.seen);
    if (sparse) {
        keys.block_mean = ada_carve(c, blocks * p->E * real);
        keys.reach = ada_carve(c, blocks * real);
    }
    return keys;
}

int64_t ada_key_probe_bytes(const ada_problem *p, bool sparse) {
    ada_carver size = {NULL, 0};
    carve_probe(p, sparse, &size);
    return size.used;
}

ada_key_probe ada_key_probe_of(const ada_problem *p, bool sparse, char *memory) {
    ada_carver carver = {memory, 0};
    return carve_probe(p, sparse, &carver);
}

typedef struct {
    float *rows;   /* [ADA_BLOCK][max(D, E, ADA_BLOCK)] */
    float *column; /* [max(D, E)] */
    float *sum;    /* [max(D, E)] */
    float *out;    /* [ADA_EXACT_ROWS][E] */
    float *dots;   /* [ADA_EXACT_ROWS][ADA_STRIP] */
    float *heavy;  /* [1 + ADA_HEAVY][D] */
    char *exact;
    /* Of the blocks that may stand in: */
    float *off;        /* [blocks][ADA_EXACT_ROWS][E] what that moves rows by */
    ada_ranked *order; /* [ADA_EXACT_ROWS][blocks] bounds */
} probe_scratch;

static probe_scratch scratch_of(const ada_problem *p, bool sparse, ada_carver *c) {
    const int64_t real = sizeof(float), width = p->D > p->E ? p->D : p->E;
    probe_scratch s;
    s.rows = ada_carve(c, ADA_BLOCK * (width > ADA_BLOCK ? width : ADA_BLOCK) * real);
    s.column = ada_carve(c, width * real);
    s.sum = ada_carve(c, width * real);
    s.out = ada_carve(c, ADA_EXACT_ROWS * p->E * real);
    s.dots = ada_carve(c, ADA_EXACT_ROWS * ADA_STRIP * real);
    s.heavy = ada_carve(c, (1 + ADA_HEAVY) * p->D * real);
    s.exact = ada_carve(c, ada_exact_scratch_bytes(p));
    s.off = NULL, s.order = NULL;
    if (sparse) {
        const int64_t pairs = ada_block_count(p) * ADA_EXACT_ROWS;
        s.off = ada_carve(c, pairs * p->E * real);
        s.order = ada_carve(c, pairs * (int64_t)sizeof *s.order);
    }
    return s;
}

int64_t ada_probe_scratch_bytes(const ada_problem *p, bool sparse) {
    ada_carver size = {NULL, 0};
    scratch_of(p, sparse, &size);
    return size.used;
}

/* The keys whose values are far larger than the mean; of more than ADA_HEAVY the largest. */
static void find_heavy(ada_key_probe *keys, int64_t blocks) {
    keys->heavies = 0;
    for (int64_t j = 0; j < blocks * ADA_BLOCK; j++) {
        if (!keys->seen[j / ADA_BLOCK]) {
            j += ADA_BLOCK - 1;
            continue;
        }
        if (!((double)keys->value2[j] > ADA_HEAVIER * keys->value2_mean)) continue;
        int at = keys->heavies < ADA_HEAVY ? keys->heavies++ : ADA_HEAVY;
        for (; at > 0 && keys->value2[keys->heavy[at - 1]] < keys->value2[j]; at--)
            if (at < ADA_HEAVY) keys->heavy[at] = keys->heavy[at - 1];
        if (at < ADA_HEAVY) keys->heavy[at] = j;
    }
}

void ada_finish_keys(const ada_problem *p, double largest2, double value2, double most2, double center2,
                     ada_key_probe *keys) {
    const double count = keys->count > 0 ? keys->count : 1;
    keys->largest2 = largest2 / count;
    keys->total = 0;
    for (int64_t d = 0; d < p->D; d++) keys->total += (double)keys->variance[d];
    for (int64_t d = 0; d < p->D; d++) keys->square[d] = keys->mean[d] * keys->mean[d];
    keys->value2_mean = value2 / count;
    keys->center2 = fmin(center2 / (count * count), keys->value2_mean);
    keys->step8 = most2 / (12.0 * ADA_I8_MAX * ADA_I8_MAX);
    keys->step16 = most2 / (12.0 * ADA_I16_VALUE_MAX * ADA_I16_VALUE_MAX);
    find_heavy(keys, ada_block_count(p));
}

int64_t ada_step_of_keys(const ada_problem *p, int64_t b, int64_t step, int64_t *first, int64_t *end) {
    *first = ada_visible_span(p, b, 0).first / ADA_BLOCK;
    *end = (ada_visible_span(p, b, p->T - 1).end + ADA_BLOCK - 1) / ADA_BLOCK;
    const int64_t half = (*end - *first + 1) / 2; /* two blocks at least */
    return step <= half ? step : half > 1 ? half : 1;
}

void ada_probe_keys(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, int64_t heads,
                    int64_t step, ada_key_probe *keys, char *scratch) {
    ada_carver carver = {scratch, 0};
    const probe_scratch s = scratch_of(p, false, &carver);
    const int D = (int)p->D, E = (int)p->E;
    const int64_t g = h / (p->H / p->G), blocks = ada_block_count(p);
    /* Memory is what a few blocks cost: a part of each says as much. */
    const uint64_t part = step > 1 ? SOME_OF_BLOCK : UINT64_MAX;
    int64_t start, end;
    step = ada_step_of_keys(p, b, step, &start, &end);
    double largest2 = 0;
    ptrdiff_t ld;
    memset(s.column, 0, (size_t)(D > E ? D : E) * sizeof(float));
    memset(keys->mean, 0, (size_t)D * sizeof(float));
    memset(keys->variance, 0, (size_t)D * sizeof(float));
    keys->count = 0;
    for (int64_t block = 0; block < blocks; block++) {
        const uint64_t seen = keys->seen[block] =
            (block - start) % step ? 0 : part & ada_block_seen(p, k, b, h, heads, block, s.rows);
        if (!seen) continue;
        const float *x =
            rows_at_f32(k, &p->key, b, g, block * ADA_BLOCK, ada_keys_of_block(p, block), s.rows, &ld);
        ADA_FOR_RUNS(seen, first, n) k->columns(keys->mean, s.column, x + first * ld, ld, n, D);
        keys->count += __builtin_popcountll(seen);
    }
    for (int d = 0; d < D && keys->count; d++) keys->mean[d] /= (float)keys->count;
    memset(s.column, 0, (size_t)(D > E ? D : E) * sizeof(float));
    memset(s.sum, 0, (size_t)(D > E ? D : E) * sizeof(float));
    double value2_sum = 0;
    for (int64_t block = 0; block < blocks; block++) {
        const uint64_t seen = keys->seen[block];
        float *norm2 = keys->norm2 + block * ADA_BLOCK, *value2 = keys->value2 + block * ADA_BLOCK;
        memset(norm2, 0, ADA_BLOCK * sizeof(float));
        memset(value2, 0, ADA_BLOCK * sizeof(float));
        keys->largest[block] = 0;
        if (!seen) continue;
        const int rows = ada_keys_of_block(p, block);
        const float *x = rows_at_f32(k, &p->key, b, g, block * ADA_BLOCK, rows, s.rows, &ld);
        ADA_FOR_RUNS(seen, first, n) {
            k->squares(norm2 + first, keys->variance, x + first * ld, ld, n, D, keys->mean, NULL);
            const float most = k->reach(x + first * ld, ld, n, D, keys->mean, NULL);
            keys->largest[block] = most > keys->largest[block] ? most : keys->largest[block];
        }
        largest2 += (double)keys->largest[block] * (double)keys->largest[block] * __builtin_popcountll(seen);
        x = rows_at_f32(k, &p->value, b, g, block * ADA_BLOCK, rows, s.rows, &ld);
        ADA_FOR_RUNS(seen, first, n) {
            k->squares(value2 + first, NULL, x + first * ld, ld, n, E, NULL, NULL);
            k->columns(s.sum, s.column, x + first * ld, ld, n, E);
        }
        if (keys->block_mean && seen == UINT64_MAX)
            keys->reach[block] = ada_value_reach(k, x, ld, E, keys->block_mean + block * E, s.out);
        for (int r = 0; r < rows; r++) value2_sum += (double)value2[r];
    }
    for (int d = 0; d < D; d++) keys->variance[d] /= (float)(keys->count > 0 ? keys->count : 1);
    float most2, center2;
    k->squares(&most2, NULL, s.column, E, 1, E, NULL, NULL);
    k->squares(&center2, NULL, s.sum, E, 1, E, NULL, NULL);
    ada_finish_keys(p, largest2, value2_sum, (double)most2, (double)center2, keys);
}

bool ada_know_keys(const ada_problem *p, int64_t b, int64_t h, ada_key_probe *keys) {
    const int64_t g = h / (p->H / p->G), D = p->D, E = p->E;
    const int64_t at = ada_last_figures(ada_visible_span(p, b, p->T - 1).end);
    if (!p->key.figures || !p->value.figures || p->attn_mask.data || at < 0 ||
        ada_visible_span(p, b, 0).first > 0)
        return false;
    float *key = p->key.figures + ((b * p->G + g) * p->key.figured + at) * ADA_FIGURE(D);
    const float *value = p->value.figures + ((b * p->G + g) * p->value.figured + at) * ADA_FIGURE(E);
    double center2 = 0;
    for (int64_t e = 0; e < E; e++) center2 += (double)value[e] * (double)value[e];
    for (int64_t d = 0; d < D; d++) keys->square[d] = key[d] * key[d];
    keys->mean = key, keys->variance = key + D;
    keys->total = (double)key[2 * D];
    keys->count = (double)ada_figured_tokens(at);
    keys->value2_mean = (double)value[2 * E] + center2, keys->center2 = center2;
    keys->largest2 = keys->step8 = keys->step16 = 0;
    keys->heavies = 0;
    return true;
}

/* ---- queries ---- */

void ada_figures_of(const ada_problem *p, const ada_kernels *k, const ada_key_probe *keys, const float *q,
                    ptrdiff_t ld, int n, ada_query_figures *figures) {
    const int D = (int)p->D;
    float spread[ADA_BLOCK], by_mean[ADA_BLOCK], norm2[ADA_BLOCK];
    k->squares(spread, NULL, q, ld, n, D, NULL, keys->variance);
    k->squares(by_mean, NULL, q, ld, n, D, NULL, keys->square);
    k->squares(norm2, NULL, q, ld, n, D, NULL, NULL);
    for (int i = 0; i < n; i++)
        figures[i] =
            (ada_query_figures){spread[i], by_mean[i], norm2[i], k->reach(q + i * ld, ld, 1, D, NULL, NULL)};
}

void ada_profile_query(const ada_problem *p, const ada_query_figures *f, ada_row_profile *x) {
    const double scale2 = p->scale * p->scale, most = (double)f->most;
    x->spread = scale2 * (double)f->spread;
    x->size = x->spread + scale2 * (double)f->by_mean;
    x->q2 = scale2 * (double)f->norm2;
    x->qmax2 = scale2 * most * most;
}

/* Adds what rows may owe to keys with heavy values: the squares of their weights, were other scores normal,
 * in units of a mean value's squared norm. x: n rows of queries, spread: of their scores. */
static void add_heavy(const ada_problem *p, const ada_kernels *k, const ada_key_probe *keys,
                      const probe_scratch *s, const float *x, ptrdiff_t ld, int n, const float *spread,
                      const float *one_over, float *crowd) {
    float dots[(1 + ADA_HEAVY) * ADA_BLOCK];
    scores_of_rows_f32(k, dots, s->heavy, keys->heavies + 1, x, ld, n, (int)p->D);
    for (int c = 1; c <= keys->heavies; c++) {
        const double share = (double)keys->value2[keys->heavy[c - 1]] / keys->value2_mean;
        for (int i = 0; i < n; i++) {
            const double above = p->scale * (double)(dots[c * ADA_BLOCK + i] - dots[i]);
            const double weight = exp(fmin(above - (double)spread[i] / 2, 700)) * (double)one_over[i];
            crowd[i] += (float)(share * square(fmin(weight, 1)));
        }
    }
}

/* 2^x to 4e-3, for x from -126 to 127, in steps that compilers vectorise. */
static inline float rough_exp2(float x) {
    union {
        int32_t bits;
        float f;
    } u;
    const int32_t octave = (int32_t)(x + 127) - 127; /* towards -inf */
    const float part = x - (float)octave;
    u.bits = (octave + 127) << 23;
    return u.f * (1 + part * (0.6565f + part * 0.3435f));
}

void ada_crowd_of(const float *spread, const float *one_over, int n, float *crowd) {
    for (int i = 0; i < n; i++) {
        const float most = spread[i] < 30 ? spread[i] : 30;
        const float share = rough_exp2(most > 0 ? most * (float)ADA_LOG2E : 0) * one_over[i];
        crowd[i] = share < 1 ? share : 1;
    }
}

/* Scales the spreads of rows that see keys, sets the others to -1; sums, in parts. */
static void find_spreads(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, float *size,
                         float *rows, ada_spreads *spreads, double *mean) {
    const float scale2 = (float)(p->scale * p->scale);
    float parts[ADA_PARTS] = {0}, largest = 0;
    int64_t start, end, block = 0, live = 0, finite = 0;
    double sum = 0;
    ada_seeing_rows(p, b, &start, &end);
    for (int64_t i = 0; i < start; i++) size[i] = -1;
    for (int64_t i = end; i < p->T; i++) size[i] = -1;
    for (int64_t i = start; i < end; i++) size[i] *= scale2;
    for (int64_t i = start; ada_mask_is_read(p) && i < end; i++)
        if (!ada_row_sees(p, k, b, h, i, &block, rows)) size[i] = -1;
    for (int64_t i = start; i < end; i += ADA_PARTS) {
        const int n = (int)(end - i < ADA_PARTS ? end - i : ADA_PARTS);
        for (int c = 0; c < n; c++) {
            const float x = size[i + c];
            const bool sees = x != -1;
            parts[c] += sees ? x : 0;
            largest = x > largest ? x : largest;
            live += sees, finite += x < INFINITY;
        }
        if (i / ADA_PARTS % 64 != 63 && i + ADA_PARTS < end) continue;
        sum += total_of(parts);
        memset(parts, 0, sizeof parts);
    }
    spreads->finite = finite == end - start;
    spreads->largest = (double)largest;
    *mean = live > 0 ? sum / (double)live : 0;
}

ada_spreads ada_probe_queries(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                              const ada_key_probe *keys, float *size, char *scratch) {
    ada_carver carver = {scratch, 0};
    const probe_scratch s = scratch_of(p, false, &carver);
    const ada_span first_span = ada_visible_span(p, b, 0), last_span = ada_visible_span(p, b, p->T - 1);
    const bool alike = first_span.first == last_span.first && first_span.end == last_span.end;
    ada_spreads spreads = {.finite = true};
    double mean;
    for (int64_t i = 0; i < p->T; i += ADA_BLOCK) {
        const int n = (int)(p->T - i < ADA_BLOCK ? p->T - i : ADA_BLOCK);
        ptrdiff_t ld;
        const float *q = rows_at_f32(k, &p->query, b, h, i, n, s.rows, &ld);
        k->squares(size + i, NULL, q, ld, n, (int)p->D, NULL, keys->variance);
    }
    find_spreads(p, k, b, h, size, s.rows, &spreads, &mean); /* sizes are spreads so far */
    if (keys->heavies) {
        memcpy(s.heavy, keys->mean, (size_t)p->D * sizeof(float));
        for (int c = 0; c < keys->heavies; c++)
            ada_load_rows_f32(k, s.heavy + (c + 1) * p->D, p->D, &p->key, b, h / (p->H / p->G),
                              keys->heavy[c], 1, (int)p->D);
    }
    const float far = (float)fmax(MOST_SPREAD, OUTLIER * mean);
    float one_over[ADA_BLOCK], crowd[ADA_BLOCK];
    for (int64_t first = 0; first < p->T; first += ADA_BLOCK) {
        const int n = (int)(p->T - first < ADA_BLOCK ? p->T - first : ADA_BLOCK);
        float *spread = size + first;
        for (int i = 0; i < n && !(alike && first > 0); i++) {
            const ada_span span = alike ? first_span : ada_visible_span(p, b, first + i);
            one_over[i] = span.end > span.first ? 1 / (float)(span.end - span.first) : 1;
        }
        ada_crowd_of(spread, one_over, n, crowd);
        if (keys->heavies) {
            ptrdiff_t ld;
            const float *q = rows_at_f32(k, &p->query, b, h, first, n, s.rows, &ld);
            add_heavy(p, k, keys, &s, q, ld, n, spread, one_over, crowd);
        }
        for (int i = 0; i < n && spreads.largest > (double)far; i++)
            if (spread[i] > far) spreads.outliers += (double)spread[i];
        for (int i = 0; i < n; i++) {
            const float x = spread[i], most = x < MOST_SPREAD ? x : MOST_SPREAD;
            spread[i] = x >= 0 && x < INFINITY ? (most + 1) * crowd[i] : 0;
        }
    }
    return spreads;
}

double ada_uniform(uint64_t stream, int index) {
    uint64_t x = stream * 0x9E3779B97F4A7C15u + (uint64_t)index * 0xD1B54A32D192ED03u + 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return (double)((x ^ x >> 31) >> 11) * 0x1p-53;
}

/* The compiler's own vectors, as it makes none of what is conditional. */
typedef float floats4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ints4 __attribute__((vector_size(16), aligned(4), may_alias));

/* x of rows i ... i + 3, where they are live. */
static inline floats4 where_live(const float *live, int64_t i, floats4 x) {
    return (floats4)((ints4)x & (*(const floats4 *)(live + i) > 0));
}

/* Sum of the sizes, or ones, of live rows, in parts. */
static inline double live_sum(const float *size, const float *live, int64_t T) {
    const floats4 ones = {1, 1, 1, 1};
    double sum = 0;
    for (int64_t i = 0; i < T; i += ADA_BLOCK) {
        const int64_t end = T - i < ADA_BLOCK ? T : i + ADA_BLOCK;
        floats4 parts[ADA_PARTS / 4] = {{0}};
        float rest[ADA_PARTS] = {0};
        int64_t c = i;
        for (; c + ADA_PARTS <= end; c += ADA_PARTS)
            for (int j = 0; j < ADA_PARTS / 4; j++) {
                floats4 own = ones;
                if (size) own = *(const floats4 *)(size + c + 4 * j);
                parts[j] += where_live(live, c + 4 * j, own);
            }
        for (int j = 0; c + j < end; j++) rest[j] = live[c + j] > 0 ? (size ? size[c + j] : 1) : 0;
        for (int j = 0; j < ADA_PARTS / 4; j++) parts[j] += *(const floats4 *)(rest + 4 * j);
        sum += total_of((const float *)parts);
    }
    return sum;
}

void ada_add_shares(float *share, const float *size, const float *live, int64_t T) {
    const double sum = size ? live_sum(size, live, T) : live_sum(NULL, live, T);
    const float each = (float)(1 / sum);
    const floats4 all = {each, each, each, each};
    if (!(each > 0 && each < INFINITY)) return; /* sizes that a float does not hold have no shares */
    int64_t i = 0;
    for (; i + 4 <= T; i += 4) {
        floats4 own = all;
        if (size) own *= *(const floats4 *)(size + i);
        *(floats4 *)(share + i) += where_live(live, i, own);
    }
    for (; i < T; i++) share[i] += live[i] > 0 ? (size ? each * size[i] : each) : 0;
}

/* Shares that are certain to be drawn, n at most: those of at least 1 / left of what is not certain, until
 * none is left. rest: of all shares, then of the others; returns the least of them. */
static double certain_bound(const float *shares, int64_t T, int n, double *rest, int *left) {
    double bound = INFINITY;
    *left = n;
    for (bool changed = true; changed && *left > 0;) {
        const double limit = *rest / *left;
        double still = 0;
        int certain = 0;
        for (int64_t i = 0; i < T; i++) {
            const double share = (double)shares[i];
            if (share > 0 && share >= limit) certain++;
            if (share < limit) still += share;
        }
        changed = n - certain < *left;
        bound = limit;
        *left = n - certain;
        if (certain >= n) break; /* as many as there are rows, or the largest take all */
        *rest = still;
    }
    if (*left < 0) *left = 0;
    return bound;
}

/* A number that other shares make another one of, and their sum and largest. */
static uint64_t digest(const float *shares, int64_t T, double *sum, float *largest) {
    uint64_t hash[4] = {1, 2, 3, 4};
    double parts[4] = {0};
    float most[4] = {0};
    for (int64_t i = 0; i < T; i += 4)
        for (int c = 0; c < 4 && i + c < T; c++) {
            union {
                float f;
                uint32_t bits;
            } u = {shares[i + c]};
            hash[c] = (hash[c] ^ u.bits) * 0x100000001B3u; /* FNV-1a by words */
            parts[c] += (double)u.f;
            most[c] = u.f > most[c] ? u.f : most[c];
        }
    *sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    *largest = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    return ((hash[0] * 0x100000001B3u ^ hash[1]) * 0x100000001B3u ^ hash[2]) * 0x100000001B3u ^ hash[3];
}

int ada_sample_rows(const float *shares, int64_t T, int n, uint64_t stream, int64_t *rows, double *weight) {
    double rest, bound = INFINITY, before = 0;
    float largest;
    int left = n, found = 0, stratum = 0;
    stream ^= digest(shares, T, &rest, &largest); /* other heads draw other rows */
    if (!(rest > 0) || n == 0) return 0;
    if ((double)largest >= rest / n) bound = certain_bound(shares, T, n, &rest, &left);
    double next = ada_uniform(stream, 0) * rest / fmax(left, 1);
    for (int64_t i = 0; i < T && found < n; i++) {
        const double share = (double)shares[i];
        if (!(share > 0)) continue;
        if (share >= bound) {
            rows[found] = i, weight[found++] = 1;
            continue;
        }
        before += share;
        for (; next < before && stratum < left && found < n; stratum++) {
            rows[found] = i, weight[found++] = fmax(rest / (left * share), 1 + DBL_EPSILON);
            next = (stratum + 1 + ada_uniform(stream, stratum + 1)) * rest / left;
        }
    }
    return found;
}

/* ---- profiles ---- */

/* Sums over one strip of keys for one row. */
static void add_strip_sums(const ada_kernels *k, ada_row_sums *sums, const ada_key_probe *keys, int64_t first,
                           int blocks, const float *p, const float *dots, float out2, double *block_plog) {
    float most[ADA_PARTS] = {0}, parts[ADA_PARTS] = {0}, largest = 0;
    for (int j = 0; j < blocks * ADA_BLOCK; j += ADA_PARTS)
        for (int i = 0; i < ADA_PARTS; i++) {
            most[i] = p[j + i] > most[i] ? p[j + i] : most[i];
            parts[i] += p[j + i];
        }
    for (int i = 0; i < ADA_PARTS; i++) largest = most[i] > largest ? most[i] : largest;
    if (largest == 0) return;
    const float step8 = largest / ADA_U8_MAX;
    const float step16 = fmaxf(largest / ADA_I16_MAX, (float)total_of(parts) / ADA_I16_WEIGHT_SUM);
    for (int i = 0; i < blocks; i++) {
        const int64_t block = first + i, at = block * ADA_BLOCK;
        const float reach = keys->largest[block];
        const double mass = (double)k->row_sums(sums, p + i * ADA_BLOCK, dots + i * ADA_BLOCK,
                                                keys->norm2 + at, keys->value2 + at, out2, reach * reach,
                                                step8 * step8 / 12, step16 * step16 / 12);
        if (mass > 0) *block_plog += mass * log2(mass);
    }
}

static void take_sums(ada_row_profile *x, const ada_row_sums *sums) {
    x->p2d = total_of(sums->p2d), x->p2d_norm = total_of(sums->p2d_norm);
    x->p2d_step = total_of(sums->p2d_step), x->p2 = total_of(sums->p2);
    x->p2_norm = total_of(sums->p2_norm), x->p2_step = total_of(sums->p2_step);
    x->p2v = total_of(sums->p2v), x->pv = total_of(sums->pv);
    x->round8 = total_of(sums->round8), x->round16 = total_of(sums->round16);
    const double dropped = total_of(sums->dropped);
    x->round8 += dropped * dropped * x->out2;
    x->entropy = -total_of(sums->plog) * ADA_LN2;
}

/* Nats: of the weights p of the ADA_BLOCK keys of the row's span that are nearest to its own place, among
 * themselves. */
static double local_entropy(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t row,
                            const float *weights) {
    static const float zeros[ADA_BLOCK];
    const ada_span span = ada_visible_span(p, b, row);
    int64_t first = ada_position(p, b, row) - ADA_BLOCK / 2;
    if (first > span.end - ADA_BLOCK) first = span.end - ADA_BLOCK;
    if (first < span.first) first = span.first;
    const int64_t last = ada_exact_keys(p) - ADA_BLOCK; /* what is hidden weighs nothing */
    if (first > last) first = last;
    ada_row_sums sums = {0};
    const double mass = (double)k->row_sums(&sums, weights + first, zeros, zeros, zeros, 0, 0, 0, 0);
    return mass > 0 ? fmax(log2(mass) - total_of(sums.plog) / mass, 0) * ADA_LN2 : NAN;
}

static void take_off(float *restrict x, const float *restrict mean, float mass, int E) {
    for (int e = 0; e < E; e++) x[e] -= mass * mean[e];
}

/* The blocks that may stand in for the tile of each row: their bounds, and what they move it by. counts[r] of
 * them. */
static void list_stand_ins(const ada_problem *p, const ada_kernels *k, const ada_key_probe *keys,
                           const probe_scratch *s, int64_t b, int64_t h, const int64_t *rows, int n,
                           const float *weights, ada_row_profile *profiles, int counts[ADA_EXACT_ROWS]) {
    const int E = (int)p->E;
    const int64_t g = h / (p->H / p->G), blocks = ada_block_count(p), all_keys = ada_exact_keys(p);
    for (int64_t block = 0; block < blocks; block++) {
        float w[ADA_EXACT_ROWS * ADA_BLOCK], mass[ADA_EXACT_ROWS] = {0};
        float *off = s->off + block * ADA_EXACT_ROWS * E;
        bool some = false;
        for (int r = 0; r < n; r++) {
            const int64_t i = rows[r] - rows[r] % ADA_LANES, left = p->T - i;
            const ada_patch tile = {b,
                                    h,
                                    i,
                                    block * ADA_BLOCK,
                                    left < ADA_LANES ? (int)left : ADA_LANES,
                                    ada_keys_of_block(p, block)};
            uint64_t bits[64];
            const ada_sight sight = ada_visible_rows(p, &tile, bits);
            profiles[r].blocks += sight != ADA_HIDDEN;
            memcpy(w + r * ADA_BLOCK, weights + r * all_keys + block * ADA_BLOCK, ADA_BLOCK * sizeof *w);
            if (sight != ADA_PLAIN || keys->seen[block] != UINT64_MAX) continue;
            float parts[ADA_PARTS] = {0}, squares[ADA_PARTS] = {0};
            for (int j = 0; j < ADA_BLOCK; j += ADA_PARTS)
                for (int c = 0; c < ADA_PARTS; c++) {
                    const float x = w[r * ADA_BLOCK + j + c];
                    parts[c] += x, squares[c] += x * x;
                }
            mass[r] = (float)total_of(parts);
            const double apart = total_of(squares) - square((double)mass[r]) / ADA_BLOCK;
            s->order[r * blocks + counts[r]++] =
                (ada_ranked){(float)sqrt(fmax(apart, 0)) * keys->reach[block], (int)block};
            some = true;
        }
        if (!some) continue;
        ptrdiff_t ld;
        const float *v = rows_at_f32(k, &p->value, b, g, block * ADA_BLOCK, ADA_BLOCK, s->rows, &ld);
        const float *mean = keys->block_mean + block * E;
        memset(off, 0, (size_t)(n * E) * sizeof *off);
        add_values_of_rows_f32(k, off, w, n, v, ld, ADA_BLOCK, E);
        for (int r = 0; r < n; r++) take_off(off + r * E, mean, mass[r], E);
    }
}

/* What stands in at each level, were the row alone. */
static void profile_stand_ins(const ada_problem *p, const ada_kernels *k, const ada_key_probe *keys,
                              const probe_scratch *s, int64_t b, int64_t h, const int64_t *rows, int n,
                              const float *weights, ada_row_profile *profiles) {
    const int E = (int)p->E;
    const int64_t blocks = ada_block_count(p);
    int counts[ADA_EXACT_ROWS] = {0};
    list_stand_ins(p, k, keys, s, b, h, rows, n, weights, profiles, counts);
    for (int r = 0; r < n; r++) {
        ada_ranked *order = s->order + r * blocks;
        ada_stand_ins at = {0};
        double together = 0;
        int chosen = 0;
        qsort(order, (size_t)counts[r], sizeof *order, ada_by_cost);
        memset(s->sum, 0, (size_t)E * sizeof *s->sum);
        for (int level = ADA_LEVELS - 1; level >= 0; level--) {
            const double most = sqrt(keys->value2_mean * exp2(-4 - level));
            for (; chosen < counts[r] && together + (double)order[chosen].cost <= most; chosen++) {
                const float *off = s->off + ((ptrdiff_t)order[chosen].block * ADA_EXACT_ROWS + r) * E;
                const float spread = order[chosen].cost;
                float off2;
                k->squares(&off2, NULL, off, E, 1, E, NULL, NULL);
                together += (double)spread, at.apart2 += spread * spread, at.parts2 += off2;
                for (int e = 0; e < E; e++) s->sum[e] += off[e];
            }
            k->squares(&at.error2, NULL, s->sum, E, 1, E, NULL, NULL);
            at.stand_ins = (float)chosen, at.together2 = (float)(together * together);
            profiles[r].levels[level] = at;
        }
    }
}

void ada_profile_rows(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                      const ada_key_probe *keys, const int64_t *rows, int n, ada_row_profile *profiles,
                      char *scratch) {
    ada_carver carver = {scratch, 0};
    const probe_scratch s = scratch_of(p, keys->block_mean != NULL, &carver);
    const int E = (int)p->E;
    const int64_t g = h / (p->H / p->G), blocks = ada_block_count(p), all_keys = ada_exact_keys(p);
    ada_exact exact;
    ada_row_sums sums[ADA_EXACT_ROWS] = {0};
    double block_plog[ADA_EXACT_ROWS] = {0};
    ada_exact_rows(p, k, false, true, b, h, rows, n, s.exact, &exact);
    for (int r = 0; r < n; r++) {
        ada_row_profile *x = &profiles[r];
        ptrdiff_t ld;
        const float *q = rows_at_f32(k, &p->query, b, h, rows[r], 1, s.rows, &ld);
        ada_query_figures figures;
        ada_figures_of(p, k, keys, q, ld, 1, &figures);
        ada_profile_query(p, &figures, x);
        x->out2 = 0;
        for (int e = 0; e < E; e++) {
            s.out[r * E + e] = (float)exact.o[r * E + e];
            x->out2 += exact.o[r * E + e] * exact.o[r * E + e];
        }
        x->good = exact.good[r];
        x->reference = exact.reference[r];
        x->visible = exact.visible[r];
        const double count = x->visible > 0 ? (double)x->visible : 1, mean = exact.score_sum[r] / count;
        x->score_std = sqrt(fmax(exact.score_square[r] / count - mean * mean, 0));
    }
    for (int64_t first = 0; first < blocks; first += ADA_STRIP / ADA_BLOCK) {
        const int in_strip =
            (int)(blocks - first < ADA_STRIP / ADA_BLOCK ? blocks - first : ADA_STRIP / ADA_BLOCK);
        for (int i = 0; i < in_strip; i++) {
            const int64_t block = first + i;
            const int nk = ada_keys_of_block(p, block);
            float dots[ADA_EXACT_ROWS * ADA_BLOCK] = {0};
            ptrdiff_t ld;
            if (keys->seen[block]) {
                const float *v = rows_at_f32(k, &p->value, b, g, block * ADA_BLOCK, nk, s.rows, &ld);
                scores_of_rows_f32(k, dots, s.out, n, v, ld, nk, E);
            }
            for (int r = 0; r < n; r++) {
                float *to = s.dots + r * ADA_STRIP + i * ADA_BLOCK;
                memcpy(to, dots + r * ADA_BLOCK, ADA_BLOCK * sizeof(float));
                for (int j = 0; keys->seen[block] != UINT64_MAX && j < ADA_BLOCK; j++)
                    if (!(keys->seen[block] >> j & 1)) to[j] = 0;
            }
        }
        for (int r = 0; r < n; r++)
            add_strip_sums(k, &sums[r], keys, first, in_strip, exact.p + r * all_keys + first * ADA_BLOCK,
                           s.dots + r * ADA_STRIP, (float)profiles[r].out2, &block_plog[r]);
    }
    for (int r = 0; r < n; r++) {
        profiles[r].blocks = 0;
        memset(profiles[r].levels, 0, sizeof profiles[r].levels);
    }
    if (keys->block_mean) profile_stand_ins(p, k, keys, &s, b, h, rows, n, exact.p, profiles);
    for (int r = 0; r < n; r++) {
        take_sums(&profiles[r], &sums[r]);
        profiles[r].block_entropy = -block_plog[r] * ADA_LN2;
        profiles[r].local_entropy = local_entropy(p, k, b, rows[r], exact.p + r * all_keys);
        profiles[r].good &= isfinite(profiles[r].p2d_step) && isfinite(profiles[r].spread);
    }
}
