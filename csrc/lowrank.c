/* Landmarks, and attention over them; see lowrank.h. Products run in the tile kernels of fp32. */
#include "lowrank.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "exact.h"
#include "execute.h"
#include "memory.h"
#include "operands.h"
#include "parallel.h"
#include "probe.h"
#include "rows.h"

#define REAL float
#define KIND(name) name##_f32
#include "read_tpl.h"

/* Keys that landmarks are chosen from: some spread evenly, and those furthest from the mean. */
#define SAMPLE 1024
#define FURTHEST 32
/* Of a draw of pivots. */
#define PIVOTS 16
/* Residuals of fp32 are no better than this share of a kernel's own value. */
#define LEAST_RESIDUAL 1e-5f
/* Exponents of H(x, x) up to which floats hold it, and a factor that takes its digits apart. Queries beyond
 * are computed exactly, heads with such keys are not low rank. */
#define MOST_EXPONENT 16
/* Rows whose estimate exceeds the budget of a row by so much are computed exactly, where they are few, and a
 * sample shows fewer. */
#define MOST_OVER 16
#define MOST_EXACT(T) ((T) / 16 + 4)
#define MOST_SHARE 0.04
/* A head is given up where its rows' estimates exceed the budget so far. */
#define MOST_SUM 2
/* Landmarks after which an error is believed to fall no faster. */
#define HOPE 64
#define SAMPLE_STREAM 4
#define PIVOT_STREAM 5
#define KEEP_STREAM 6
#define QUERY_STREAM 7

static int up_to(int n, int step) { return (n + step - 1) / step * step; }
static double square(double x) { return x * x; }

bool ada_far_keys_of(const ada_problem *p, int64_t b, ada_far_keys *keys) {
    const ada_span span = ada_visible_span(p, b, 0), last = ada_visible_span(p, b, p->T - 1);
    const int64_t n = last.end - last.first;
    *keys = (ada_far_keys){last.first, last.end, n, 1};
    if (span.end != last.end) keys->bin = ADA_BIN, keys->bins = n / ADA_BIN;
    return span.first == last.first && n > 0;
}

/* The bins that query i sees whole. */
static int64_t bins_seen(const ada_problem *p, const ada_far_keys *keys, int64_t b, int64_t i) {
    const int64_t n = ada_visible_span(p, b, i).end - keys->first;
    return n > 0 ? n / keys->bin : 0;
}

static double landmark_operations(double keys, int64_t D, int rank) {
    const double R = rank, sample = fmin(keys, SAMPLE + FURTHEST);
    return sample * R * (2 * (double)D + 2 * R) + R * R * R;
}

double ada_low_rank_operations(const ada_far_keys *keys, double queries, int64_t D, int64_t E, int rank) {
    const double R = rank, width = 2 * (double)(D + E), count = (double)(keys->end - keys->first);
    const double near = keys->bin < keys->end - keys->first ? ADA_BIN / 2 + ADA_LANES : 0;
    return R * (count * width + queries * (width + R)) + queries * near * width +
           (double)keys->bins * R * R * (double)(E + 1) + landmark_operations(count, D, rank);
}

double ada_forecast_operations(double keys, int64_t D, int64_t E, int rank) {
    const double sample = fmin(keys, SAMPLE + FURTHEST);
    return landmark_operations(keys, D, rank) +
           sample * ADA_LANES * 2 * (rank + (double)(ADA_RANK_LEVELS * E + D));
}

/* ---- landmarks ---- */

/* A head's sample and its factor, in tiles of lanes. */
typedef struct {
    int count, tiles, most; /* sampled keys; most landmarks */
    int even;               /* of the sampled keys: those that stand for others */
    int queries;            /* 0 or 1 tiles of sampled queries behind the keys' */
    int64_t *key;           /* [count] */
    float *mean;            /* [D] of all keys */
    float *point;           /* [tiles * 64][D] keys less the mean, times key_factor; zeros behind */
    float *packed;          /* [tiles + queries][D][64] the same, times log2(e) */
    float *factor;          /* [tiles + queries][most][64] */
    float *residual;        /* [tiles + queries][64] */
    float *own;             /* [tiles + queries][64] H(x, x) */
    int *pivot;             /* [most] */
    int rank;
    double keys, query_factor, key_factor;
    double beyond;    /* share of the queries beyond the exponents' range */
    float *rows;      /* [64][max(D, E, 64)] */
    float *pivots;    /* [PIVOTS][D] */
    float *before;    /* [most][PIVOTS] minus the factor at the pivots */
    float *p, *m, *l; /* [64][64], [64], [64] */
    float *new;       /* [PIVOTS][64] */
    float *inverse;   /* [PIVOTS][PIVOTS] */
    /* To forecast: */
    float *kernel; /* [tiles * 64][64] what is left of H(k, q) */
    float *value;  /* [tiles * 64][E + 1]: how many keys it stands for, and that times its value */
    float *apart;  /* [tiles * 64] squared distance of a value from the mean output, times that twice */
    int seen[ADA_LANES], far[ADA_LANES]; /* of the sampled keys: how many a query sees, and in whole bins */
    double share[ADA_LANES];             /* of all keys that lie in its whole bins */
    float *sum;                          /* [E + 1][64] */
    float *out;                          /* [E][64] of the sampled queries, by the sampled keys */
    float *mass;                         /* [64] */
} sketch;

static sketch sketch_of(const ada_problem *p, int most, ada_carver *c) {
    const int64_t real = sizeof(float), D = p->D, E = p->E, strip = ADA_LANES * real;
    const int64_t width = D > E ? D : E, tiles = (SAMPLE + FURTHEST + ADA_LANES - 1) / ADA_LANES;
    const int64_t points = tiles * ADA_LANES, all = points + ADA_LANES;
    sketch s = {.most = up_to(most, PIVOTS)};
    s.key = ada_carve(c, points * (int64_t)sizeof *s.key);
    s.mean = ada_carve(c, D * real);
    s.point = ada_carve(c, points * D * real);
    s.packed = ada_carve(c, all * D * real);
    s.factor = ada_carve(c, all * s.most * real);
    s.residual = ada_carve(c, all * real);
    s.own = ada_carve(c, all * real);
    s.pivot = ada_carve(c, s.most * (int64_t)sizeof *s.pivot);
    s.rows = ada_carve(c, strip * (width > ADA_LANES ? width : ADA_LANES));
    s.pivots = ada_carve(c, PIVOTS * D * real);
    s.before = ada_carve(c, s.most * PIVOTS * real);
    s.p = ada_carve(c, ADA_BLOCK * strip);
    s.m = ada_carve(c, strip);
    s.l = ada_carve(c, strip);
    s.new = ada_carve(c, PIVOTS * strip);
    s.inverse = ada_carve(c, PIVOTS * PIVOTS * real);
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
    sketch_of(p, most, &size);
    return size.used;
}

static ada_tile_f32 tile_of(const sketch *s, float *q, int D) {
    return (ada_tile_f32){.q = q, .p = s->p, .o = s->sum, .m = s->m, .l = s->l, .D = D, .lanes = ADA_LANES};
}

/* Loads the sampled keys: those spread evenly over the span, a place in each stretch at random, then the ones
 * furthest from the mean. False where keys are not finite or too far apart. */
static bool take_sample(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                        const ada_far_keys *all, sketch *s) {
    const int64_t g = h / (p->H / p->G), keys = all->end - all->first;
    const int D = (int)p->D;
    float norm2[ADA_BLOCK], far2[FURTHEST];
    int64_t far[FURTHEST];
    ptrdiff_t ld;
    int found = 0;
    double norms = 0, query_norms = 0, live = 0;
    memset(s->mean, 0, (size_t)D * sizeof(float));
    for (int64_t j = all->first; j < all->end; j += ADA_BLOCK) {
        const int n = (int)(all->end - j < ADA_BLOCK ? all->end - j : ADA_BLOCK);
        const float *x = rows_at_f32(k, &p->key, b, g, j, n, s->rows, &ld);
        k->columns(s->mean, s->pivots, x, ld, n, D);
    }
    for (int d = 0; d < D; d++) s->mean[d] /= (float)keys;
    for (int64_t j = all->first; j < all->end; j += ADA_BLOCK) {
        const int n = (int)(all->end - j < ADA_BLOCK ? all->end - j : ADA_BLOCK);
        const float *x = rows_at_f32(k, &p->key, b, g, j, n, s->rows, &ld);
        k->squares(norm2, NULL, x, ld, n, D, s->mean, NULL);
        for (int i = 0; i < n; i++) {
            norms += (double)norm2[i];
            if (found == FURTHEST && norm2[i] <= far2[found - 1]) continue;
            int at = found < FURTHEST ? found++ : FURTHEST - 1;
            for (; at > 0 && far2[at - 1] < norm2[i]; at--) far2[at] = far2[at - 1], far[at] = far[at - 1];
            far2[at] = norm2[i], far[at] = j + i;
        }
    }
    const int64_t step = (p->T + SAMPLE - 1) / SAMPLE;
    for (int64_t i = 0; i < p->T; i += step, live++) {
        const float *x = rows_at_f32(k, &p->query, b, h, i, 1, s->rows, &ld);
        k->squares(s->kernel + (int)live, NULL, x, ld, 1, D, NULL, NULL);
        query_norms += (double)s->kernel[(int)live];
    }
    if (!isfinite(norms) || !isfinite(query_norms)) return false;
    /* Queries and keys of one size: balance is the fourth root of the ratio of their mean squares. */
    const double key2 = norms / (double)keys, query2 = query_norms / live;
    const double balance = key2 > 0 && query2 > 0 ? sqrt(sqrt(key2 / query2)) : 1;
    s->key_factor = sqrt(p->scale) / balance, s->query_factor = sqrt(p->scale) * balance;
    const double most = (double)far2[0] * square(s->key_factor);
    if (!(most <= MOST_EXPONENT) || !isfinite(s->query_factor) || !(s->key_factor > 0)) return false;
    s->beyond = 0;
    for (int i = 0; i < (int)live; i++)
        s->beyond += (double)s->kernel[i] * square(s->query_factor) > MOST_EXPONENT ? 1 / live : 0;
    s->keys = (double)keys;
    s->even = (int)(keys < SAMPLE ? keys : SAMPLE);
    for (int i = 0; i < s->even; i++) {
        const double place = keys <= SAMPLE ? 0 : ada_uniform(SAMPLE_STREAM, i);
        s->key[i] = all->first + (int64_t)(((double)i + place) * (double)keys / s->even);
    }
    s->count = s->even;
    for (int i = 0; keys > SAMPLE && i < found; i++) s->key[s->count++] = far[i];
    s->tiles = (s->count + ADA_LANES - 1) / ADA_LANES;
    memset(s->point, 0, (size_t)(s->tiles * ADA_LANES * D) * sizeof(float));
    for (int i = 0; i < s->count; i++) {
        float *x = s->point + (ptrdiff_t)i * D;
        ada_load_rows_f32(k, x, D, &p->key, b, g, s->key[i], 1, D);
        for (int d = 0; d < D; d++) x[d] = (x[d] - s->mean[d]) * (float)s->key_factor;
    }
    for (int t = 0; t < s->tiles; t++) {
        const float *x = s->point + (ptrdiff_t)t * ADA_LANES * D;
        k->pack_f32(s->packed + (ptrdiff_t)t * ADA_LANES * D, x, D, ADA_LANES, D, ADA_LANES,
                    (float)ADA_LOG2E);
        k->squares(s->own + t * ADA_LANES, NULL, x, D, ADA_LANES, D, NULL, NULL);
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
                         const ada_far_keys *keys, sketch *s) {
    const int D = (int)p->D, n = (int)(p->T < ADA_LANES ? p->T : ADA_LANES);
    float *own = s->own + s->tiles * ADA_LANES, *packed = s->packed + (ptrdiff_t)s->tiles * ADA_LANES * D;
    memset(s->rows, 0, (size_t)(ADA_LANES * D) * sizeof(float));
    for (int i = 0; i < n; i++) {
        const double place = p->T <= ADA_LANES ? 0 : ada_uniform(QUERY_STREAM, i);
        const int64_t row = (int64_t)(((double)i + place) * (double)p->T / n);
        ada_load_rows_f32(k, s->rows + i * D, D, &p->query, b, h, row, 1, D);
        for (int d = 0; d < D; d++) s->rows[i * D + d] *= (float)s->query_factor;
        const int64_t end = ada_visible_span(p, b, row).end;
        const int64_t far = bins_seen(p, keys, b, row - row % ADA_LANES) * keys->bin;
        s->seen[i] = s->far[i] = 0;
        for (int j = 0; j < s->even; j++)
            s->seen[i] += s->key[j] < end, s->far[i] += s->key[j] < keys->first + far;
        s->share[i] = (double)far / s->keys;
    }
    for (int i = n; i < ADA_LANES; i++) s->seen[i] = s->far[i] = 0;
    k->squares(own, NULL, s->rows, D, ADA_LANES, D, NULL, NULL);
    for (int i = 0; i < ADA_LANES; i++) {
        if (!(own[i] <= MOST_EXPONENT)) memset(s->rows + i * D, 0, (size_t)D * sizeof(float)), own[i] = 0;
        own[i] = s->residual[s->tiles * ADA_LANES + i] = expf(own[i]);
    }
    k->pack_f32(packed, s->rows, D, ADA_LANES, D, ADA_LANES, (float)ADA_LOG2E);
    s->queries = 1;
}

/* Draws pivots with probabilities like their residuals, the first the largest; returns how many. */
static int draw_pivots(sketch *s, int draws, int pivot[PIVOTS]) {
    double total = 0;
    int largest = 0, n = 0;
    for (int i = 0; i < s->count; i++) {
        total += (double)s->residual[i];
        if (s->residual[i] > s->residual[largest]) largest = i;
    }
    if (!(total > 0)) return 0;
    pivot[n++] = largest;
    total -= (double)s->residual[largest];
    while (n < PIVOTS && total > 0) {
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

/* H(., pivots) less what the factor has of it, for one tile: [PIVOTS][64] in new. */
static void new_columns(const ada_problem *p, const ada_kernels *k, const sketch *s, int tile) {
    const int D = (int)p->D;
    ada_tile_f32 t = tile_of(s, s->packed + (ptrdiff_t)tile * ADA_LANES * D, D);
    t.p = s->new;
    k->scores_f32(&t, s->pivots, D, PIVOTS);
    k->weights_f32(&t, PIVOTS, NULL, NULL, NULL); /* exponents are limited */
    if (s->rank == 0) return;
    t.p = s->factor + (ptrdiff_t)tile * s->most * ADA_LANES, t.o = s->new, t.E = PIVOTS;
    k->values_f32(&t, s->before, PIVOTS, s->rank);
}

/* The Cholesky factor of n pivots' own columns, of which those that others leave little of are passed over
 * (by chance, as if they had been drawn one after the other); its inverse. Returns how many are kept. */
static int factorise_pivots(sketch *s, double column[PIVOTS][PIVOTS], int n, int draws, int room,
                            int keep[PIVOTS]) {
    double low[PIVOTS][PIVOTS];
    int kept = 0;
    for (int a = 0; a < n && kept < room; a++) {
        double row[PIVOTS], rest = column[a][a];
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
    memset(s->inverse, 0, PIVOTS * PIVOTS * sizeof(float));
    /* new factor = low^-1 times the kept columns; [column][row] as values wants it. */
    for (int c = 0; c < kept; c++) {
        double x[PIVOTS] = {0};
        for (int r = c; r < kept; r++) {
            double sum = r == c;
            for (int j = c; j < r; j++) sum -= low[r][j] * x[j];
            x[r] = sum / low[r][r];
            s->inverse[keep[c] * PIVOTS + r] = (float)x[r];
        }
    }
    return kept;
}

/* Adds up to PIVOTS landmarks, at most `room`; false where nothing is left to gain. */
static bool add_landmarks(const ada_problem *p, const ada_kernels *k, sketch *s, int *draws, int room) {
    int pivot[PIVOTS], keep[PIVOTS];
    double column[PIVOTS][PIVOTS];
    const int n = draw_pivots(s, *draws, pivot), D = (int)p->D;
    if (n == 0) return false;
    memset(s->m, 0, ADA_LANES * sizeof *s->m);
    for (int a = 0; a < PIVOTS; a++) {
        const int at = pivot[a < n ? a : 0];
        memcpy(s->pivots + a * D, s->point + (ptrdiff_t)at * D, (size_t)D * sizeof(float));
        const float *f = s->factor + (ptrdiff_t)(at / ADA_LANES) * s->most * ADA_LANES + at % ADA_LANES;
        for (int r = 0; r < s->rank; r++) s->before[r * PIVOTS + a] = -f[r * ADA_LANES];
    }
    for (int a = 0; a < n; a++) /* columns at the pivots, tile by tile as they come */
        for (int c = 0; c < n; c++) {
            double x = 0, dot = 0;
            const float *u = s->pivots + a * D, *v = s->pivots + c * D;
            for (int d = 0; d < D; d++) dot += (double)u[d] * (double)v[d];
            for (int r = 0; r < s->rank; r++)
                x += (double)s->before[r * PIVOTS + a] * (double)s->before[r * PIVOTS + c];
            column[a][c] = exp(dot) - x;
        }
    const int kept = factorise_pivots(s, column, n, *draws, room, keep);
    *draws += PIVOTS;
    if (kept == 0) return false;
    for (int t = 0; t < s->tiles + s->queries; t++) {
        float *factor = s->factor + ((ptrdiff_t)t * s->most + s->rank) * ADA_LANES,
              *left = s->residual + t * ADA_LANES;
        new_columns(p, k, s, t);
        ada_tile_f32 tile = tile_of(s, NULL, D);
        tile.p = s->new, tile.o = factor, tile.E = kept;
        memset(factor, 0, (size_t)kept * ADA_LANES * sizeof(float));
        k->values_f32(&tile, s->inverse, PIVOTS, PIVOTS);
        for (int r = 0; r < kept; r++)
            for (int i = 0; i < ADA_LANES; i++)
                left[i] -= factor[r * ADA_LANES + i] * factor[r * ADA_LANES + i];
        for (int i = 0; i < ADA_LANES; i++)
            if (!(left[i] > LEAST_RESIDUAL * s->own[t * ADA_LANES + i])) left[i] = 0;
    }
    for (int a = 0; a < kept; a++) {
        s->residual[pivot[keep[a]]] = 0;
        s->pivot[s->rank++] = pivot[keep[a]];
    }
    return true;
}

/* ---- forecast ---- */

/* Adds the values of a block of sampled keys from j on, with what is in the kernel for them, to the sums; of
 * queries that take only the first count[i] keys less. apart (may be NULL) gets the squares. */
static void add_sampled(const ada_problem *p, const ada_kernels *k, const sketch *s, const int *count,
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
static double take_values(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, sketch *s) {
    const int E = (int)p->E, D = (int)p->D, n = (int)(p->T < ADA_LANES ? p->T : ADA_LANES);
    const int64_t g = h / (p->H / p->G);
    const float stands = (float)(s->keys / s->even);
    double noise = 0, out2 = 0;
    float own[ADA_LANES] = {0};
    memset(s->value, 0, (size_t)(s->tiles * ADA_LANES * (E + 1)) * sizeof(float));
    memset(s->apart, 0, (size_t)(s->tiles * ADA_LANES) * sizeof(float));
    for (int i = 0; i < s->even; i++) {
        float *v = s->value + (ptrdiff_t)i * (E + 1);
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
static void lessen_kernel(const ada_kernels *k, sketch *s, int first) {
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
static double limit_of_lse(const sketch *s, double error, double per_residual) {
    double roots = 0;
    for (int j = 0; j < s->even; j++)
        roots += sqrt((double)fmaxf(s->residual[j], LEAST_RESIDUAL * s->own[j]));
    roots *= s->keys / s->even;
    return square(error) * fmax(1 / square(roots), 1 / (square(LARGEST_LSE) * per_residual));
}

/* What is left of the kernel moves the output of the sampled queries by; a row's budget is row2. */
static ada_rank_level level_of(const ada_problem *p, const ada_kernels *k, const sketch *s, double row2,
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
        residual[i] = s->share[i] * (double)fmaxf(s->residual[at], LEAST_RESIDUAL * s->own[at]) / mass2;
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
                           const ada_rank_wish *wish, ada_rank_forecast *forecast, char *scratch) {
    const int least = wish->least, most = wish->most;
    static const int steps[ADA_RANK_LEVELS] = {16, 32, 48, 64, 96, 128, 192, 256, 384, ADA_MOST_RANK};
    ada_carver carver = {scratch, 0};
    sketch s = sketch_of(p, most, &carver);
    ada_far_keys keys;
    *forecast = (ada_rank_forecast){0};
    if (!ada_far_keys_of(p, b, &keys) || !take_sample(p, k, b, h, &keys, &s)) return;
    take_queries(p, k, b, h, &keys, &s);
    forecast->out2 = take_values(p, k, b, h, &s);
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

/* ---- attention ---- */

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
    int R;            /* its rank up to PIVOTS */
    ada_far_keys far; /* sums of the first keys, up to the end of each bin */
    double *factor;   /* query_factor */
    float *mean;      /* [D] */
    float *point;     /* [R][D] landmarks as the kernel takes them; zeros behind the last */
    float *packed;    /* [tiles][D][64] landmarks as the arrays' keys take them, in log2 units */
    float *reference; /* [tiles][64] what the mean of the keys is to them */
    float *sums;      /* [tiles][bins][E + 1][64] H(L, K) (V, 1) */
    float *basis;     /* [R][R] */
    float *values;    /* [bins][chunks of 64 columns][R][64] F(K)' V */
    float *masses;    /* [bins][R] F(K)' 1 */
} state;

static int64_t chunks_of(const ada_problem *p) { return (p->E + ADA_LANES - 1) / ADA_LANES; }

static state state_of(const run *r, int64_t index, ada_carver *c) {
    const ada_problem *p = r->p;
    const int64_t real = sizeof(float);
    state s = {.R = up_to(r->low->rank[index], PIVOTS)};
    ada_far_keys_of(p, r->heads[index] / p->H, &s.far);
    const int64_t lanes = up_to(s.R, ADA_LANES), bins = s.far.bins;
    s.factor = ada_carve(c, (int64_t)sizeof *s.factor);
    s.mean = ada_carve(c, p->D * real);
    s.point = ada_carve(c, s.R * p->D * real);
    s.packed = ada_carve(c, lanes * p->D * real);
    s.reference = ada_carve(c, lanes * real);
    s.sums = ada_carve(c, lanes * bins * (p->E + 1) * real);
    s.basis = ada_carve(c, (int64_t)s.R * s.R * real);
    s.values = ada_carve(c, bins * chunks_of(p) * s.R * ADA_LANES * real);
    s.masses = ada_carve(c, bins * s.R * real);
    return s;
}

static state state_at(const run *r, int64_t index) {
    ada_carver carver = {r->memory + r->offset[index], 0};
    return state_of(r, index, &carver);
}

static void fail(run *r, int64_t index) {
    atomic_store_explicit(&r->failed[index], true, memory_order_relaxed);
}

/* The inverse of the factor at the landmarks, transposed: F = H(., L) basis. */
static void take_basis(const sketch *s, const state *to, double *rows) {
    const int R = to->R;
    for (int r = 0; r < s->rank; r++) { /* row r of the inverse */
        const int at = s->pivot[r];
        const float *f = s->factor + (ptrdiff_t)(at / ADA_LANES) * s->most * ADA_LANES + at % ADA_LANES;
        double *x = rows + (ptrdiff_t)r * R;
        memset(x, 0, (size_t)r * sizeof *x);
        for (int c = 0; c < r; c++) {
            const double low = (double)f[c * ADA_LANES], *y = rows + (ptrdiff_t)c * R;
            for (int l = 0; l <= c; l++) x[l] -= low * y[l];
        }
        x[r] = 1;
        for (int l = 0; l <= r; l++) {
            x[l] /= (double)f[r * ADA_LANES];
            to->basis[l * R + r] = (float)x[l];
        }
    }
}

static void landmark_task(void *context, ada_job *job, int64_t index, int worker) {
    run *r = context;
    const ada_problem *p = r->p;
    const int64_t b = r->heads[index] / p->H, h = r->heads[index] % p->H;
    const int D = (int)p->D, rank = r->low->rank[index];
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    sketch s = sketch_of(p, rank, &carver);
    double *rows = ada_carve(&carver, (int64_t)s.most * s.most * (int64_t)sizeof *rows);
    const state to = state_at(r, index);
    int draws = 0;
    if (ada_job_cancelled(job, worker)) return;
    const bool good = take_sample(p, r->k, b, h, &to.far, &s);
    while (good && s.rank < rank && add_landmarks(p, r->k, &s, &draws, rank - s.rank)) {
    }
    if (!good || s.rank == 0) {
        fail(r, index);
        return;
    }
    *to.factor = s.query_factor;
    memcpy(to.mean, s.mean, (size_t)D * sizeof *to.mean);
    memset(to.point, 0, (size_t)(to.R * D) * sizeof *to.point);
    memset(to.basis, 0, (size_t)(to.R * to.R) * sizeof *to.basis);
    for (int i = 0; i < s.rank; i++)
        memcpy(to.point + i * D, s.point + (ptrdiff_t)s.pivot[i] * D, (size_t)D * sizeof *to.point);
    for (int i = 0; i < to.R; i += ADA_LANES) {
        const int n = to.R - i < ADA_LANES ? to.R - i : ADA_LANES;
        const float factor = (float)(s.key_factor * ADA_LOG2E);
        float *reference = to.reference + i;
        r->k->pack_f32(to.packed + i * D, to.point + i * D, D, n, D, ADA_LANES, factor);
        r->k->row_scores_f32(reference, s.mean, 1, to.point + i * D, D, n, D);
        for (int j = 0; j < ADA_LANES; j++) reference[j] = j < n ? reference[j] * factor : reference[n - 1];
    }
    take_basis(&s, &to, rows);
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
    r->k->scores_f32(t, k, ld, up_to(n, ADA_KEY_STEP));
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
    if (tile * ADA_LANES >= s.R || r->failed[index]) return;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    float *keys = ada_carve(&carver, ADA_BLOCK * p->D * (int64_t)sizeof *keys);
    float *values = ada_carve(&carver, ADA_BLOCK * p->E * (int64_t)sizeof *values);
    const int64_t left = s.R - tile * ADA_LANES, strip = (E + 1) * ADA_LANES;
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
    float *rows = (float *)(r->scratch + worker * r->scratch_bytes), *masses = s.masses + bin * s.R;
    memset(masses, 0, (size_t)s.R * sizeof *masses);
    for (int64_t c = 0; c < chunks; c++) {
        const int first = (int)c * ADA_LANES, n = E - first < ADA_LANES ? E - first : ADA_LANES;
        float *out = s.values + (bin * chunks + c) * s.R * ADA_LANES;
        memset(rows, 0, (size_t)(s.R * ADA_LANES) * sizeof *rows);
        memset(out, 0, (size_t)(s.R * ADA_LANES) * sizeof *out);
        for (int l = 0; l < s.R; l++) {
            const float *sums =
                s.sums + (l / ADA_LANES * s.far.bins + bin) * (E + 1) * ADA_LANES + l % ADA_LANES;
            for (int e = 0; e < n; e++) rows[l * ADA_LANES + e] = sums[(first + e) * ADA_LANES];
            for (int i = l; c == 0 && i < s.R; i++) masses[i] += sums[E * ADA_LANES] * s.basis[l * s.R + i];
        }
        for (int l = 0; l < s.R; l += ADA_BLOCK) {
            const ada_tile_f32 t = {.p = rows + l * ADA_LANES,
                                    .o = out + l * ADA_LANES,
                                    .E = s.R - l,
                                    .lanes = up_to(n, ADA_LANE_STEP)};
            r->k->values_f32(&t, s.basis + l * s.R + l, s.R, s.R - l < ADA_BLOCK ? s.R - l : ADA_BLOCK);
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
    const float factor = (float)*s->factor;
    uint64_t out = 0;
    *q = rows_at_f32(r->k, &p->query, patch->b, patch->h, patch->i, patch->n, x->rows, ld);
    r->k->squares(x->own, NULL, *q, *ld, patch->n, D, NULL, NULL);
    r->k->row_scores_f32(x->shift, s->mean, 1, *q, *ld, patch->n, D);
    for (int i = 0; i < patch->n; i++) {
        x->own[i] *= factor * factor;
        if (!(x->own[i] <= MOST_EXPONENT)) out |= (uint64_t)1 << i;
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
    memset(x->f, 0, (size_t)(s->R * ADA_LANES) * sizeof *x->f);
    memset(x->square, 0, ADA_LANES * sizeof *x->square);
    for (int j = 0; j < s->R; j += ADA_BLOCK) {
        const int n = s->R - j < ADA_BLOCK ? s->R - j : ADA_BLOCK;
        t.E = 0;
        r->k->scores_weights_f32(&t, s->point + j * t.D, t.D, n); /* exponents are within MOST_EXPONENT */
        t.o = x->f + j * ADA_LANES, t.E = s->R - j;
        r->k->values_f32(&t, s->basis + j * s->R + j, s->R, n);
    }
    for (int j = 0; j < s->R; j++)
        for (int i = 0; i < ADA_LANES; i++) x->square[i] += x->f[j * ADA_LANES + i] * x->f[j * ADA_LANES + i];
    memset(x->l, 0, ADA_LANES * sizeof *x->l);
    memset(x->o, 0, (size_t)E * ADA_LANES * sizeof *x->o);
    if (bins == 0) return;
    t.p = x->f, t.o = x->l, t.E = 1;
    r->k->values_f32(&t, s->masses + (bins - 1) * s->R, 1, s->R);
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t left = E - c * ADA_LANES;
        t.o = x->o + c * ADA_LANES * ADA_LANES, t.E = left < ADA_LANES ? (int)left : ADA_LANES;
        r->k->values_f32(&t, s->values + ((bins - 1) * chunks + c) * s->R * ADA_LANES, ADA_LANES, s->R);
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
    const double least = s->far.bin == keys ? (double)keys / 2 : 0;
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
    const query_scratch x = query_scratch_of(p, s.R, &carver);
    const int64_t bins = bins_seen(p, &s.far, patch.b, first), far = bins * s.far.bin;
    const double scale = p->scale * ADA_LOG2E, share = (double)far / (double)(s.far.end - s.far.first);
    const float *q;
    ptrdiff_t ld;
    ada_tile_f32 t = {.q = x.q, .p = x.p, .m = x.m, .l = x.l, .D = D, .lanes = up_to(patch.n, ADA_LANE_STEP)};
    uint64_t exactly = load_queries(r, &s, &x, &patch, &q, &ld);
    r->k->pack_f32(x.q, q, ld, patch.n, D, t.lanes, (float)(*s.factor * ADA_LOG2E));
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
        const double residual = fmax(own - (double)x.square[i], (double)LEAST_RESIDUAL * own);
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
                MOST_EXACT(p->T) &&
            r->k->unpack_f32(x.rows, E, x.o, x.factor, patch.n, E);
    if (good) {
        ada_store_rows_f32(r->k, &p->out, patch.b, patch.h, first, patch.n, E, x.rows, E);
        good = compute_exactly(r, &patch, exactly, &x);
    }
    if (!good) fail(r, index);
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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
    const int R = up_to(most, PIVOTS);
    r.most_tiles = (R + ADA_LANES - 1) / ADA_LANES;
    const int threads = ada_threads_for(p, n_heads * larger(r.tiles, r.most_tiles), work);
    ada_carver size = {NULL, 0};
    query_scratch_of(p, R, &size);
    const int64_t real = sizeof(float), blocks = ADA_BLOCK * (p->D + p->E + ADA_LANES) * real + 3 * 64;
    const int64_t building = ada_landmark_scratch_bytes(p, R) + (int64_t)R * R * (int64_t)sizeof(double) + 64;
    r.scratch_bytes = larger(larger(size.used, blocks), larger(building, R * ADA_LANES * real));
    size.used = 0;
    r.scratch = ada_carve(&size, threads * r.scratch_bytes);
    r.offset = ada_carve(&size, n_heads * (int64_t)sizeof *r.offset);
    r.failed = ada_carve(&size, n_heads * (int64_t)sizeof *r.failed);
    r.exactly = ada_carve(&size, n_heads * (int64_t)sizeof *r.exactly);
    const int64_t before = size.used;
    for (int64_t i = 0; i < n_heads; i++) state_of(&r, i, &size);
    r.memory = ada_scratch_take(size.used);
    if (!r.memory) return ada_no_scratch(size.used, error);
    size = (ada_carver){r.memory, 0};
    r.scratch = ada_carve(&size, threads * r.scratch_bytes);
    r.offset = ada_carve(&size, n_heads * (int64_t)sizeof *r.offset);
    r.failed = ada_carve(&size, n_heads * (int64_t)sizeof *r.failed);
    r.exactly = ada_carve(&size, n_heads * (int64_t)sizeof *r.exactly);
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
        low->failed[i] = r.failed[i] || over > MOST_SUM * (double)p->T;
    }
    ada_scratch_give_back(r.memory);
    return done ? ADA_OK : ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
}
