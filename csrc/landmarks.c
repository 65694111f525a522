/* The choice of landmarks and the forecast of what they do; see lowrank.h. Products run in the tile kernels
 * of fp32. */
#include "landmarks.h"

#include <math.h>
#include <string.h>

#include "execute.h"
#include "memory.h"
#include "probe.h"
#include "rows.h"

#define REAL float
#define KIND(name) name##_f32
#include "read_tpl.h"

/* Rows whose estimate exceeds the budget of a row by so much are computed exactly; the largest share of them
 * in a sample. */
#define MOST_OVER 16
#define MOST_SHARE 0.04
/* Landmarks after which an error is believed to fall no faster. */
#define HOPE 64
/* To read, write and pack an element of keys, values, queries and outputs, in operations. */
#define READING 150
#define SAMPLE_STREAM 4
#define PIVOT_STREAM 5
#define KEEP_STREAM 6
#define QUERY_STREAM 7

static double square(double x) { return x * x; }

bool ada_far_keys_of(const ada_problem *p, int64_t b, ada_far_keys *keys) {
    const ada_span span = ada_visible_span(p, b, 0), last = ada_visible_span(p, b, p->T - 1);
    const int64_t n = last.end - last.first;
    *keys = (ada_far_keys){last.first, last.end, n, 1, span.end == last.end};
    if (!keys->whole) keys->bin = ADA_BIN, keys->bins = n / ADA_BIN;
    return span.first == last.first && n > 0;
}

int64_t ada_bins_seen(const ada_problem *p, const ada_far_keys *keys, int64_t b, int64_t i) {
    const int64_t n = ada_visible_span(p, b, i).end - keys->first;
    return n > 0 ? n / keys->bin : 0;
}

double ada_landmark_operations(double keys, int64_t D, int rank) {
    const double R = rank, sample = fmin(keys, ADA_SAMPLE + ADA_FURTHEST);
    return sample * R * (2 * (double)D + 2 * R) + R * R * R;
}

double ada_low_rank_operations(const ada_far_keys *keys, double queries, int64_t D, int64_t E, int rank) {
    const double R = rank, width = 2 * (double)(D + E), count = (double)(keys->end - keys->first);
    const double near = keys->whole ? 0 : ADA_BIN / 2 + ADA_LANES;
    return (count + queries) * (double)(D + E) * READING + R * (count * width + queries * (width + R)) +
           queries * near * width + (double)keys->bins * R * R * (double)(E + 1);
}

double ada_forecast_operations(double keys, int64_t D, int64_t E, int rank) {
    const double sample = fmin(keys, ADA_SAMPLE + ADA_FURTHEST);
    return ada_landmark_operations(keys, D, rank) +
           sample * ADA_LANES * 2 * (rank + (double)(ADA_RANK_LEVELS * E + D));
}

/* ---- landmarks ---- */

ada_sketch ada_sketch_of(const ada_problem *p, int most, ada_carver *c) {
    const int64_t real = sizeof(float), D = p->D, E = p->E, strip = ADA_LANES * real;
    const int64_t width = D > E ? D : E, tiles = (ADA_SAMPLE + ADA_FURTHEST + ADA_LANES - 1) / ADA_LANES;
    const int64_t points = tiles * ADA_LANES, all = points + ADA_LANES;
    ada_sketch s = {.most = ada_up_to(most, ADA_PIVOTS)};
    s.key = ada_carve(c, points * (int64_t)sizeof *s.key);
    s.mean = ada_carve(c, D * real);
    s.point = ada_carve(c, points * D * real);
    s.packed = ada_carve(c, all * D * real);
    s.factor = ada_carve(c, all * s.most * real);
    s.residual = ada_carve(c, all * real);
    s.own = ada_carve(c, all * real);
    s.pivot = ada_carve(c, s.most * (int64_t)sizeof *s.pivot);
    s.rows = ada_carve(c, strip * (width > ADA_LANES ? width : ADA_LANES));
    s.pivots = ada_carve(c, ADA_PIVOTS * D * real);
    s.before = ada_carve(c, s.most * ADA_PIVOTS * real);
    s.p = ada_carve(c, ADA_BLOCK * strip);
    s.m = ada_carve(c, strip);
    s.l = ada_carve(c, strip);
    s.new = ada_carve(c, ADA_PIVOTS * strip);
    s.inverse = ada_carve(c, ADA_PIVOTS * ADA_PIVOTS * real);
    s.rows_of_inverse = ada_carve(c, (int64_t)s.most * s.most * (int64_t)sizeof *s.rows_of_inverse);
    s.kernel = ada_carve(c, points * strip);
    s.value = ada_carve(c, points * (E + 1) * real);
    s.apart = ada_carve(c, points * real);
    s.sum = ada_carve(c, (E + 1) * strip);
    s.out = ada_carve(c, E * strip);
    s.mass = ada_carve(c, strip);
    return s;
}

int64_t ada_landmark_scratch_bytes(const ada_problem *p, int most) {
    ada_carver size = {NULL, 0};
    ada_sketch_of(p, most, &size);
    return size.used;
}

static ada_tile_f32 tile_of(const ada_sketch *s, float *q, int D) {
    return (ada_tile_f32){.q = q, .p = s->p, .o = s->sum, .m = s->m, .l = s->l, .D = D, .lanes = ADA_LANES};
}

int ada_even_keys(const ada_far_keys *all, int64_t key[ADA_SAMPLE]) {
    const int64_t keys = all->end - all->first, n = keys < ADA_SAMPLE ? keys : ADA_SAMPLE;
    for (int i = 0; i < (int)n; i++) {
        const double place = keys <= ADA_SAMPLE ? 0 : ada_uniform(SAMPLE_STREAM, i);
        key[i] = all->first + (int64_t)(((double)i + place) * (double)keys / (double)n);
    }
    return (int)n;
}

int ada_even_queries(int64_t T, int64_t row[ADA_LANES]) {
    const int n = (int)(T < ADA_LANES ? T : ADA_LANES);
    for (int i = 0; i < n; i++) {
        const double place = T <= ADA_LANES ? 0 : ada_uniform(QUERY_STREAM, i);
        row[i] = (int64_t)(((double)i + place) * (double)T / n);
    }
    return n;
}

/* Of a head's arrays; also the mean of its keys and some queries' norms. */
static ada_extent measure(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                          const ada_far_keys *all, ada_sketch *s) {
    const int64_t g = h / (p->H / p->G), keys = all->end - all->first, step = ada_step_of_queries(p->T);
    const int D = (int)p->D;
    float norm2[ADA_BLOCK], far2[ADA_FURTHEST];
    ada_extent x = {.keys = (double)keys};
    ptrdiff_t ld;
    memset(s->mean, 0, (size_t)D * sizeof(float));
    memset(s->pivots, 0, (size_t)D * sizeof(float)); /* the largest magnitudes, which nobody asks for */
    for (int64_t j = all->first; j < all->end; j += ADA_BLOCK) {
        const int n = (int)(all->end - j < ADA_BLOCK ? all->end - j : ADA_BLOCK);
        const float *row = rows_at_f32(k, &p->key, b, g, j, n, s->rows, &ld);
        k->columns(s->mean, s->pivots, row, ld, n, D);
    }
    for (int d = 0; d < D; d++) s->mean[d] /= (float)keys;
    for (int64_t j = all->first; j < all->end; j += ADA_BLOCK) {
        const int n = (int)(all->end - j < ADA_BLOCK ? all->end - j : ADA_BLOCK);
        const float *row = rows_at_f32(k, &p->key, b, g, j, n, s->rows, &ld);
        k->squares(norm2, NULL, row, ld, n, D, s->mean, NULL);
        for (int i = 0; i < n; i++) {
            x.spread += (double)norm2[i];
            if (x.n_far == ADA_FURTHEST && norm2[i] <= far2[x.n_far - 1]) continue;
            int at = x.n_far < ADA_FURTHEST ? x.n_far++ : ADA_FURTHEST - 1;
            for (; at > 0 && far2[at - 1] < norm2[i]; at--)
                far2[at] = far2[at - 1], x.far[at] = x.far[at - 1];
            far2[at] = norm2[i], x.far[at] = j + i;
        }
    }
    x.furthest2 = (double)far2[0];
    for (int64_t i = 0; i < p->T; i += step) {
        const float *row = rows_at_f32(k, &p->query, b, h, i, 1, s->rows, &ld);
        float *square_of = s->kernel + (int)x.queries++;
        k->squares(square_of, NULL, row, ld, 1, D, NULL, NULL);
        x.query2 += (double)*square_of;
    }
    return x;
}

/* Loads the sampled keys. False where keys or queries are not finite, or keys too far apart. */
static bool take_sample(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                        const ada_far_keys *all, const ada_sample *given, ada_sketch *s) {
    const int64_t g = h / (p->H / p->G);
    const int D = (int)p->D;
    const ada_extent x = given ? given->extent : measure(p, k, b, h, all, s);
    if (given) memcpy(s->mean, given->mean, (size_t)D * sizeof(float));
    const float *query2 = given ? given->query2 : s->kernel;
    if (!isfinite(x.spread) || !isfinite(x.query2)) return false;
    /* Queries and keys of one size: balance is the fourth root of the ratio of their mean squares. */
    const double key2 = x.spread / x.keys, mean2 = x.query2 / x.queries;
    const double balance = key2 > 0 && mean2 > 0 ? sqrt(sqrt(key2 / mean2)) : 1;
    s->key_factor = sqrt(p->scale) / balance, s->query_factor = sqrt(p->scale) * balance;
    const double most = x.furthest2 * square(s->key_factor);
    if (!(most <= ADA_MOST_EXPONENT) || !isfinite(s->query_factor) || !(s->key_factor > 0)) return false;
    s->beyond = 0;
    for (int i = 0; i < (int)x.queries; i++)
        s->beyond += (double)query2[i] * square(s->query_factor) > ADA_MOST_EXPONENT ? 1 / x.queries : 0;
    s->keys = x.keys;
    s->count = s->even = ada_even_keys(all, s->key);
    for (int i = 0; x.keys > ADA_SAMPLE && i < x.n_far; i++) s->key[s->count++] = x.far[i];
    s->tiles = (s->count + ADA_LANES - 1) / ADA_LANES;
    memset(s->point, 0, (size_t)(s->tiles * ADA_LANES * D) * sizeof(float));
    for (int i = 0; i < s->count; i++) {
        float *to = s->point + (ptrdiff_t)i * D;
        if (given)
            memcpy(to, given->keys + (ptrdiff_t)i * D, (size_t)D * sizeof *to);
        else
            ada_load_rows_f32(k, to, D, &p->key, b, g, s->key[i], 1, D);
        for (int d = 0; d < D; d++) to[d] = (to[d] - s->mean[d]) * (float)s->key_factor;
    }
    for (int t = 0; t < s->tiles; t++) {
        const float *row = s->point + (ptrdiff_t)t * ADA_LANES * D;
        k->pack_f32(s->packed + (ptrdiff_t)t * ADA_LANES * D, row, D, ADA_LANES, D, ADA_LANES,
                    (float)ADA_LOG2E);
        k->squares(s->own + t * ADA_LANES, NULL, row, D, ADA_LANES, D, NULL, NULL);
    }
    for (int i = 0; i < s->tiles * ADA_LANES; i++) {
        s->own[i] = i < s->count ? expf(s->own[i]) : 0;
        s->residual[i] = s->own[i];
    }
    s->rank = s->queries = 0;
    return true;
}

/* Loads a tile of queries spread evenly. Those that are too far out count as zeros: they say nothing. */
static void take_queries(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                         const ada_far_keys *keys, const ada_sample *given, ada_sketch *s) {
    int64_t rows[ADA_LANES];
    const int D = (int)p->D, n = ada_even_queries(p->T, rows);
    float *own = s->own + s->tiles * ADA_LANES, *packed = s->packed + (ptrdiff_t)s->tiles * ADA_LANES * D;
    memset(s->rows, 0, (size_t)(ADA_LANES * D) * sizeof(float));
    for (int i = 0; i < n; i++) {
        const int64_t row = rows[i];
        if (given)
            memcpy(s->rows + i * D, given->queries + i * D, (size_t)D * sizeof(float));
        else
            ada_load_rows_f32(k, s->rows + i * D, D, &p->query, b, h, row, 1, D);
        for (int d = 0; d < D; d++) s->rows[i * D + d] *= (float)s->query_factor;
        const int64_t end = ada_visible_span(p, b, row).end;
        const int64_t far = ada_bins_seen(p, keys, b, row - row % ADA_LANES) * keys->bin;
        s->seen[i] = s->far[i] = 0;
        for (int j = 0; j < s->even; j++)
            s->seen[i] += s->key[j] < end, s->far[i] += s->key[j] < keys->first + far;
        s->share[i] = (double)far / s->keys;
    }
    for (int i = n; i < ADA_LANES; i++) s->seen[i] = s->far[i] = 0;
    k->squares(own, NULL, s->rows, D, ADA_LANES, D, NULL, NULL);
    for (int i = 0; i < ADA_LANES; i++) {
        if (!(own[i] <= ADA_MOST_EXPONENT)) memset(s->rows + i * D, 0, (size_t)D * sizeof(float)), own[i] = 0;
        own[i] = s->residual[s->tiles * ADA_LANES + i] = expf(own[i]);
    }
    k->pack_f32(packed, s->rows, D, ADA_LANES, D, ADA_LANES, (float)ADA_LOG2E);
    s->queries = 1;
}

/* Draws pivots with probabilities like their residuals, the first the largest; returns how many. */
static int draw_pivots(ada_sketch *s, int draws, int pivot[ADA_PIVOTS]) {
    double total = 0;
    int largest = 0, n = 0;
    for (int i = 0; i < s->count; i++) {
        total += (double)s->residual[i];
        if (s->residual[i] > s->residual[largest]) largest = i;
    }
    if (!(total > 0)) return 0;
    pivot[n++] = largest;
    total -= (double)s->residual[largest];
    while (n < ADA_PIVOTS && total > 0) {
        double left = ada_uniform(PIVOT_STREAM, draws + n) * total;
        int at = -1;
        for (int i = 0; i < s->count && left >= 0; i++) {
            bool taken = false;
            for (int a = 0; a < n; a++) taken |= pivot[a] == i;
            if (taken || !(s->residual[i] > 0)) continue;
            at = i, left -= (double)s->residual[i];
        }
        if (at < 0) break;
        pivot[n++] = at, total -= (double)s->residual[at];
    }
    return n;
}

/* H(., pivots) less what the factor has of it, for one tile: [ADA_PIVOTS][64] in new. */
static void new_columns(const ada_problem *p, const ada_kernels *k, const ada_sketch *s, int tile) {
    const int D = (int)p->D;
    ada_tile_f32 t = tile_of(s, s->packed + (ptrdiff_t)tile * ADA_LANES * D, D);
    t.p = s->new;
    k->scores_f32(&t, s->pivots, D, ADA_PIVOTS);
    k->weights_f32(&t, ADA_PIVOTS, NULL, NULL, NULL); /* exponents are limited */
    if (s->rank == 0) return;
    t.p = s->factor + (ptrdiff_t)tile * s->most * ADA_LANES, t.o = s->new, t.E = ADA_PIVOTS;
    k->values_f32(&t, s->before, ADA_PIVOTS, s->rank);
}

/* The Cholesky factor of n pivots' own columns, of which those that others leave little of are passed over
 * (by chance, as if they had been drawn one after the other); its inverse. Returns how many are kept. */
static int factorise_pivots(ada_sketch *s, double column[ADA_PIVOTS][ADA_PIVOTS], int n, int draws, int room,
                            int keep[ADA_PIVOTS]) {
    double low[ADA_PIVOTS][ADA_PIVOTS];
    int kept = 0;
    for (int a = 0; a < n && kept < room; a++) {
        double row[ADA_PIVOTS], rest = column[a][a];
        for (int i = 0; i < kept; i++) {
            double x = column[a][keep[i]];
            for (int j = 0; j < i; j++) x -= row[j] * low[i][j];
            row[i] = x / low[i][i], rest -= row[i] * row[i];
        }
        if (a > 0 && !(rest > ada_uniform(KEEP_STREAM, draws + a) * column[a][a])) continue;
        if (!(rest > 0)) continue;
        memcpy(low[kept], row, (size_t)kept * sizeof(double));
        low[kept][kept] = sqrt(rest);
        keep[kept++] = a;
    }
    memset(s->inverse, 0, ADA_PIVOTS * ADA_PIVOTS * sizeof(float));
    /* new factor = low^-1 times the kept columns; [column][row] as values wants it. */
    for (int c = 0; c < kept; c++) {
        double x[ADA_PIVOTS] = {0};
        for (int r = c; r < kept; r++) {
            double sum = r == c;
            for (int j = c; j < r; j++) sum -= low[r][j] * x[j];
            x[r] = sum / low[r][r];
            s->inverse[keep[c] * ADA_PIVOTS + r] = (float)x[r];
        }
    }
    return kept;
}

/* Adds some landmarks, at most `room`; false where nothing is left to gain. draws: 0 at first. */
static bool add_landmarks(const ada_problem *p, const ada_kernels *k, ada_sketch *s, int *draws, int room) {
    int pivot[ADA_PIVOTS], keep[ADA_PIVOTS];
    double column[ADA_PIVOTS][ADA_PIVOTS];
    const int n = draw_pivots(s, *draws, pivot), D = (int)p->D;
    if (n == 0) return false;
    memset(s->m, 0, ADA_LANES * sizeof *s->m);
    for (int a = 0; a < ADA_PIVOTS; a++) {
        const int at = pivot[a < n ? a : 0];
        memcpy(s->pivots + a * D, s->point + (ptrdiff_t)at * D, (size_t)D * sizeof(float));
        const float *f = s->factor + (ptrdiff_t)(at / ADA_LANES) * s->most * ADA_LANES + at % ADA_LANES;
        for (int r = 0; r < s->rank; r++) s->before[r * ADA_PIVOTS + a] = -f[r * ADA_LANES];
    }
    for (int a = 0; a < n; a++) /* columns at the pivots, tile by tile as they come */
        for (int c = 0; c < n; c++) {
            double x = 0, dot = 0;
            const float *u = s->pivots + a * D, *v = s->pivots + c * D;
            for (int d = 0; d < D; d++) dot += (double)u[d] * (double)v[d];
            for (int r = 0; r < s->rank; r++)
                x += (double)s->before[r * ADA_PIVOTS + a] * (double)s->before[r * ADA_PIVOTS + c];
            column[a][c] = exp(dot) - x;
        }
    const int kept = factorise_pivots(s, column, n, *draws, room, keep);
    *draws += ADA_PIVOTS;
    if (kept == 0) return false;
    for (int t = 0; t < s->tiles + s->queries; t++) {
        float *factor = s->factor + ((ptrdiff_t)t * s->most + s->rank) * ADA_LANES,
              *left = s->residual + t * ADA_LANES;
        new_columns(p, k, s, t);
        ada_tile_f32 tile = tile_of(s, NULL, D);
        tile.p = s->new, tile.o = factor, tile.E = kept;
        memset(factor, 0, (size_t)kept * ADA_LANES * sizeof(float));
        k->values_f32(&tile, s->inverse, ADA_PIVOTS, ADA_PIVOTS);
        for (int r = 0; r < kept; r++)
            for (int i = 0; i < ADA_LANES; i++)
                left[i] -= factor[r * ADA_LANES + i] * factor[r * ADA_LANES + i];
        for (int i = 0; i < ADA_LANES; i++)
            if (!(left[i] > ADA_LEAST_RESIDUAL * s->own[t * ADA_LANES + i])) left[i] = 0;
    }
    for (int a = 0; a < kept; a++) {
        s->residual[pivot[keep[a]]] = 0;
        s->pivot[s->rank++] = pivot[keep[a]];
    }
    return true;
}

/* The inverse of the factor at the landmarks, transposed: F = H(., L) basis. */
static void take_basis(const ada_sketch *s, ada_landmarks *to) {
    const int R = to->R;
    for (int r = 0; r < s->rank; r++) { /* row r of the inverse */
        const int at = s->pivot[r];
        const float *f = s->factor + (ptrdiff_t)(at / ADA_LANES) * s->most * ADA_LANES + at % ADA_LANES;
        double *x = s->rows_of_inverse + (ptrdiff_t)r * R;
        memset(x, 0, (size_t)r * sizeof *x);
        for (int c = 0; c < r; c++) {
            const double low = (double)f[c * ADA_LANES], *y = s->rows_of_inverse + (ptrdiff_t)c * R;
            for (int l = 0; l <= c; l++) x[l] -= low * y[l];
        }
        x[r] = 1;
        for (int l = 0; l <= r; l++) {
            x[l] /= (double)f[r * ADA_LANES];
            to->basis[l * R + r] = (float)x[l];
        }
    }
}

ada_landmarks ada_landmarks_of(const ada_problem *p, int rank, ada_carver *c) {
    const int64_t real = sizeof(float), R = ada_up_to(rank, ADA_PIVOTS);
    return (ada_landmarks){.R = (int)R,
                           .factor = ada_carve(c, 2 * (int64_t)sizeof(double)),
                           .mean = ada_carve(c, p->D * real),
                           .point = ada_carve(c, R * p->D * real),
                           .basis = ada_carve(c, R * R * real)};
}

bool ada_find_landmarks(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, int rank,
                        const ada_sample *sample, ada_landmarks *to, char *scratch) {
    ada_carver carver = {scratch, 0};
    ada_sketch s = ada_sketch_of(p, rank, &carver);
    const size_t row = (size_t)p->D * sizeof(float);
    ada_far_keys all;
    int draws = 0;
    if (!ada_far_keys_of(p, b, &all) || !take_sample(p, k, b, h, &all, sample, &s)) return false;
    while (s.rank < rank && add_landmarks(p, k, &s, &draws, rank - s.rank)) {
    }
    if (s.rank == 0) return false;
    to->factor[0] = s.query_factor, to->factor[1] = s.key_factor;
    memcpy(to->mean, s.mean, row);
    memset(to->point, 0, (size_t)to->R * row);
    memset(to->basis, 0, (size_t)(to->R * to->R) * sizeof *to->basis);
    for (int i = 0; i < s.rank; i++) memcpy(to->point + i * p->D, s.point + s.pivot[i] * p->D, row);
    take_basis(&s, to);
    return true;
}

/* ---- forecast ---- */

/* Adds the values of a block of sampled keys from j on, with what is in the kernel for them, to the sums; of
 * queries that take only the first count[i] keys less. apart (may be NULL) gets the squares. */
static void add_sampled(const ada_problem *p, const ada_kernels *k, const ada_sketch *s, const int *count,
                        float *apart) {
    const int E = (int)p->E;
    ada_tile_f32 t = tile_of(s, NULL, 0);
    t.E = E + 1;
    memset(s->sum, 0, (size_t)((E + 1) * ADA_LANES) * sizeof *s->sum);
    for (int j = 0; j < s->tiles * ADA_LANES; j += ADA_BLOCK) {
        memcpy(t.p, s->kernel + (ptrdiff_t)j * ADA_LANES, ADA_BLOCK * ADA_LANES * sizeof(float));
        for (int i = 0; i < ADA_LANES; i++)
            for (int a = count[i] > j ? count[i] - j : 0; a < ADA_BLOCK; a++) t.p[a * ADA_LANES + i] = 0;
        k->values_f32(&t, s->value + (ptrdiff_t)j * (E + 1), E + 1, ADA_BLOCK);
        for (int a = 0; apart && a < ADA_BLOCK; a++)
            for (int i = 0; i < ADA_LANES; i++)
                apart[i] += t.p[a * ADA_LANES + i] * t.p[a * ADA_LANES + i] * s->apart[j + a];
    }
}

/* Kernel of sampled keys and queries; output and mass of the queries, values that stand for others. Returns
 * the mean squared norm of the output. */
static double take_values(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                          const ada_sample *given, ada_sketch *s) {
    const int E = (int)p->E, D = (int)p->D, n = (int)(p->T < ADA_LANES ? p->T : ADA_LANES);
    const int64_t g = h / (p->H / p->G);
    const float stands = (float)(s->keys / s->even);
    double noise = 0, out2 = 0;
    float own[ADA_LANES] = {0};
    memset(s->value, 0, (size_t)(s->tiles * ADA_LANES * (E + 1)) * sizeof(float));
    memset(s->apart, 0, (size_t)(s->tiles * ADA_LANES) * sizeof(float));
    for (int i = 0; i < s->even; i++) {
        float *v = s->value + (ptrdiff_t)i * (E + 1);
        if (given)
            memcpy(v + 1, given->values + (ptrdiff_t)i * E, (size_t)E * sizeof *v);
        else
            ada_load_rows_f32(k, v + 1, E, &p->value, b, g, s->key[i], 1, E);
        v[0] = stands;
        for (int e = 1; e <= E; e++) v[e] *= stands;
    }
    ada_tile_f32 t = tile_of(s, s->packed + (ptrdiff_t)s->tiles * ADA_LANES * D, D);
    memset(s->m, 0, ADA_LANES * sizeof *s->m);
    for (int j = 0; j < s->tiles * ADA_LANES; j += ADA_BLOCK) {
        t.p = s->kernel + (ptrdiff_t)j * ADA_LANES;
        k->scores_weights_f32(&t, s->point + (ptrdiff_t)j * D, D, ADA_BLOCK);
    }
    add_sampled(p, k, s, s->seen, NULL);
    memcpy(s->mass, s->sum, ADA_LANES * sizeof *s->mass);
    memset(s->rows, 0, (size_t)E * sizeof *s->rows);
    for (int e = 0; e < E; e++)
        for (int i = 0; i < n; i++) {
            const float x = s->mass[i] > 0 ? s->sum[(e + 1) * ADA_LANES + i] / s->mass[i] : 0;
            s->out[e * ADA_LANES + i] = x;
            s->rows[e] += x * stands / (float)n, out2 += square((double)x) / n;
        }
    for (int j = 0; j < s->even; j++) {
        const float *v = s->value + (ptrdiff_t)j * (E + 1) + 1;
        for (int e = 0; e < E; e++) s->apart[j] += (v[e] - s->rows[e]) * (v[e] - s->rows[e]);
    }
    add_sampled(p, k, s, s->seen, own);
    for (int i = 0; i < n; i++)
        if (s->mass[i] > 0) noise += (double)own[i] / square((double)s->mass[i]) / n;
    /* Few keys put noise into the output that all of them do not. */
    return fmax(out2 - noise * (1 - 1 / (double)stands), noise / (double)stands);
}

/* Takes the landmarks from `first` on out of the kernel that is left. */
static void lessen_kernel(const ada_kernels *k, ada_sketch *s, int first) {
    const float *query = s->factor + ((ptrdiff_t)s->tiles * s->most + first) * ADA_LANES;
    for (int r = first; r < s->rank; r += ADA_BLOCK) {
        const int n = s->rank - r < ADA_BLOCK ? s->rank - r : ADA_BLOCK;
        for (int i = 0; i < n * ADA_LANES; i++) s->p[i] = -query[(r - first) * ADA_LANES + i];
        for (int t = 0; t < s->tiles; t++) {
            ada_tile_f32 tile = tile_of(s, NULL, 0);
            tile.o = s->kernel + (ptrdiff_t)t * ADA_LANES * ADA_LANES, tile.E = ADA_LANES;
            k->values_f32(&tile, s->factor + ((ptrdiff_t)t * s->most + r) * ADA_LANES, ADA_LANES, n);
        }
    }
}

/* The lse of the worst of thousands of rows is off by so many times the root mean square at most: rows differ
 * by more than their residuals tell. */
#define LARGEST_LSE 20

/* The largest residual, over its squared sum, of a row whose lse is off by `error` at most: by the bound on
 * each weight, or by what the sampled rows' sums are off by. */
static double limit_of_lse(const ada_sketch *s, double error, double per_residual) {
    double roots = 0;
    for (int j = 0; j < s->even; j++)
        roots += sqrt((double)fmaxf(s->residual[j], ADA_LEAST_RESIDUAL * s->own[j]));
    roots *= s->keys / s->even;
    return square(error) * fmax(1 / square(roots), 1 / (square(LARGEST_LSE) * per_residual));
}

/* What is left of the kernel moves the output of the sampled queries by; a row's budget is row2. */
static ada_rank_level level_of(const ada_problem *p, const ada_kernels *k, const ada_sketch *s, double row2,
                               double lse_error) {
    const int E = (int)p->E, n = (int)(p->T < ADA_LANES ? p->T : ADA_LANES);
    const double stands = s->keys / s->even;
    double together = 0, apart = 0, residual[ADA_LANES] = {0}, residuals = 0, masses = 0;
    float own[ADA_LANES] = {0};
    add_sampled(p, k, s, s->far, own);
    for (int i = 0; i < n; i++) {
        const double mass2 = square((double)s->mass[i]);
        const int at = s->tiles * ADA_LANES + i;
        if (!(s->mass[i] > 0)) continue;
        for (int e = 0; e < E; e++) {
            const float *sum = s->sum + i;
            const double off = (double)(sum[(e + 1) * ADA_LANES] - s->out[e * ADA_LANES + i] * sum[0]);
            together += off * off / mass2;
        }
        apart += (double)own[i] / mass2;
        masses += square((double)s->sum[i]) / mass2;
        residual[i] = s->share[i] * (double)fmaxf(s->residual[at], ADA_LEAST_RESIDUAL * s->own[at]) / mass2;
        residuals += residual[i];
    }
    /* Keys that stand for others say more of them together than those would, as their errors are alike. */
    const double error2 = stands > 1 ? fmax(together - apart, 0) + apart / stands : together;
    ada_rank_level level = {.rank = s->rank, .error2 = error2 / n, .limit = INFINITY, .exact = s->beyond};
    if (residuals > 0) level.gain = error2 / residuals;
    if (error2 > 0) level.limit = MOST_OVER * row2 / level.gain;
    if (masses > 0) level.limit = fmin(level.limit, limit_of_lse(s, lse_error, masses / residuals));
    for (int i = 0; i < n; i++) level.exact += residual[i] > level.limit ? 1.0 / n : 0;
    return level;
}

static double target2_of(const ada_rank_wish *wish, const ada_rank_forecast *f) {
    return square(wish->error) * (wish->out2 > 0 ? wish->out2 : f->out2);
}

bool ada_fulfils(const ada_rank_wish *wish, const ada_rank_forecast *f, int level) {
    const ada_rank_level *x = &f->level[level];
    return x->error2 <= target2_of(wish, f) && x->exact <= MOST_SHARE &&
           (x->rank >= wish->least || (f->exhausted && level + 1 == f->levels));
}

void ada_forecast_low_rank(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                           const ada_sample *sample, const ada_rank_wish *wish, ada_rank_forecast *forecast,
                           char *scratch) {
    const int least = wish->least, most = wish->most;
    static const int steps[ADA_RANK_LEVELS] = {16, 32, 48, 64, 96, 128, 192, 256, 384, ADA_MOST_RANK};
    ada_carver carver = {scratch, 0};
    ada_sketch s = ada_sketch_of(p, most, &carver);
    ada_far_keys keys;
    *forecast = (ada_rank_forecast){0};
    if (!ada_far_keys_of(p, b, &keys) || !take_sample(p, k, b, h, &keys, sample, &s)) return;
    take_queries(p, k, b, h, &keys, sample, &s);
    forecast->out2 = take_values(p, k, b, h, sample, &s);
    const double target2 = target2_of(wish, forecast);
    bool more = true;
    for (int step = 0, draws = 0; more && step < ADA_RANK_LEVELS && s.rank < most; step++) {
        const int wanted = steps[step] < most ? steps[step] : most, first = s.rank;
        if (wanted < least && step + 1 < ADA_RANK_LEVELS && steps[step + 1] <= most) continue;
        while (more && s.rank < wanted) more = add_landmarks(p, k, &s, &draws, most - s.rank);
        if (s.rank == first) break;
        lessen_kernel(k, &s, first);
        const ada_rank_level level = level_of(p, k, &s, target2, wish->lse_error),
                             before = forecast->levels ? forecast->level[forecast->levels - 1] : level;
        if (!isfinite(level.error2)) return;
        forecast->level[forecast->levels++] = level;
        forecast->exhausted = !more;
        if (ada_fulfils(wish, forecast, forecast->levels - 1)) return;
        /* The logarithm of the error falls about in proportion to the rank, later somewhat slower. */
        const double slope = level.rank > before.rank
                                 ? log(before.error2 / level.error2) / (level.rank - before.rank)
                                 : INFINITY;
        if (s.rank >= HOPE && log(level.error2 / target2) > slope * (most - level.rank)) return;
    }
}
