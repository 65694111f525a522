/* What is predicted of a head without exact rows: guesses from the statistics of all keys, for heads that are
 * looked at, and glances, which cost a few percent of a small head and go by some of its rows, and by the
 * largest of all its numbers. Both take values as independent of keys, and the scores of a row as normal.
 */
#include <math.h>
#include <string.h>

#include "execute.h"
#include "operands.h"
#include "probe.h"
#include "rows.h"
#include "visible.h"

#define REAL float
#define KIND(name) name##_f32
#include "read_tpl.h"

/* Numbers so much larger than those of the rows that a glance falls on are another kind. */
#define UNEVEN 2

typedef struct {
    float *rows;     /* [ADA_BLOCK][max(D, E, ADA_BLOCK)] */
    float *mean;     /* [D] */
    float *variance; /* [D] */
    float *sum;      /* [max(D, E)] */
    float *largest;  /* [max(D, E)] */
} glance_scratch;

static glance_scratch scratch_of(const ada_problem *p, ada_carver *c) {
    const int64_t real = sizeof(float), width = p->D > p->E ? p->D : p->E;
    glance_scratch s;
    s.rows = ada_carve(c, ADA_BLOCK * (width > ADA_BLOCK ? width : ADA_BLOCK) * real);
    s.mean = ada_carve(c, p->D * real);
    s.variance = ada_carve(c, p->D * real);
    s.sum = ada_carve(c, width * real);
    s.largest = ada_carve(c, width * real);
    return s;
}

int64_t ada_glance_scratch_bytes(const ada_problem *p) {
    ada_carver size = {NULL, 0};
    scratch_of(p, &size);
    return size.used;
}

/* ---- guesses ---- */

int ada_rows_to_guess_by(const ada_problem *p, int64_t b, int64_t rows[ADA_GUESS_ROWS]) {
    int64_t start, end;
    ada_seeing_rows(p, b, &start, &end);
    const int64_t step = (end - start + ADA_GUESS_ROWS - 1) / ADA_GUESS_ROWS;
    int n = 0;
    for (int64_t i = start; i < end; i += step) rows[n++] = i;
    return n;
}

void ada_guess_profile(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                       const ada_key_probe *keys, ada_row_profile *x, char *scratch) {
    ada_carver carver = {scratch, 0};
    const glance_scratch s = scratch_of(p, &carver);
    int64_t rows[ADA_GUESS_ROWS], block = 0;
    ada_query_figures figures[ADA_GUESS_ROWS];
    ada_array some = p->query;
    const int most = ada_rows_to_guess_by(p, b, rows);
    int n = 0;
    for (int i = 0; i < most; i++)
        if (ada_row_sees(p, k, b, h, rows[i], &block, s.rows)) rows[n++] = rows[i];
    /* One after the other where a mask leaves gaps between them. */
    const int together = n == most ? n : 1;
    if (n > 1) some.stride[2] *= rows[1] - rows[0];
    for (int i = 0; i < n; i += together) {
        ptrdiff_t ld;
        some.data = ada_row_at(&p->query, b, h, rows[i]);
        const float *q = rows_at_f32(k, &some, 0, 0, 0, together, s.rows, &ld);
        ada_figures_of(p, k, keys, q, ld, together, figures + i);
    }
    ada_guess_by(p, b, keys, rows, figures, n, x);
}

void ada_guess_by(const ada_problem *p, int64_t b, const ada_key_probe *keys, const int64_t *rows,
                  const ada_query_figures *figures, int found, ada_row_profile *x) {
    const double value2 = keys->value2_mean, own2 = value2 - keys->center2, n = found > 0 ? found : 1;
    *x = (ada_row_profile){.weight = (double)p->T};
    for (int i = 0; i < found; i++) {
        ada_row_profile one;
        const ada_span span = ada_visible_span(p, b, rows[i]);
        ada_profile_query(p, &figures[i], &one);
        x->spread += one.spread, x->size += one.size, x->q2 += one.q2, x->qmax2 += one.qmax2;
        x->p2 += fmin(1, exp(fmin(one.spread, 30)) / (double)(span.end - span.first));
        x->visible += span.end - span.first;
    }
    x->spread /= n, x->size /= n, x->q2 /= n, x->qmax2 /= n;
    x->p2 /= n * (1 - p->dropout_p);
    x->reference = 3 * sqrt(x->size); /* its square counts */
    x->visible /= (int64_t)n;
    /* Independent values around their mean. */
    x->p2_norm = x->p2 * keys->total, x->p2_step = x->p2 * keys->largest2;
    x->out2 = keys->center2 + x->p2 * own2;
    x->p2v = x->p2 * value2, x->p2d = x->p2 * own2;
    x->p2d_norm = x->p2_norm * own2, x->p2d_step = x->p2_step * own2;
    x->pv = value2;
    /* Weights around a peak are rounded away: what real heads showed at worst. */
    x->round8 = x->out2 * 4e-4, x->round16 = x->out2 * 1e-9;
    x->score_std = sqrt(x->spread), x->entropy = x->block_entropy = x->local_entropy = NAN;
    x->good = isfinite(x->p2d_step) && isfinite(x->size);
}

void ada_peak_profile(const ada_key_probe *keys, double spread, ada_row_profile *x) {
    const double ratio = x->spread > 0 ? fmax(spread / x->spread, 1) : 1;
    x->spread *= ratio, x->size *= ratio, x->q2 *= ratio, x->qmax2 *= ratio;
    x->reference = 3 * sqrt(x->size);
    x->p2 = 1, x->p2_norm = keys->total, x->p2_step = keys->largest2;
}

/* ---- glances ---- */

/* Rows of a head that are looked at, of an array or of queries. */
typedef struct {
    int64_t first, end; /* those that count */
    int64_t step;
    int n;
    ada_array every; /* row i of head (0, 0) is row first + i * step */
} some_rows;

static some_rows spread_out(const ada_array *a, int64_t b, int64_t h, int64_t first, int64_t end, int most) {
    some_rows some = {.first = first, .end = end, .step = (end - first + most - 1) / most, .every = *a};
    some.n = some.step ? (int)((end - first + some.step - 1) / some.step) : 0;
    some.every.data = ada_row_at(a, b, h, first);
    some.every.stride[2] *= some.step;
    return some;
}

/* The largest magnitude in all rows that count, less (NULL: nothing) from each. */
static float largest_of(const ada_kernels *k, const ada_array *a, int64_t b, int64_t h, const some_rows *some,
                        const float *less, float *rows) {
    float most = 0;
    for (int64_t i = some->first; i < some->end; i += ADA_BLOCK) {
        const int n = (int)(some->end - i < ADA_BLOCK ? some->end - i : ADA_BLOCK);
        ptrdiff_t ld;
        const float *x = rows_at_f32(k, a, b, h, i, n, rows, &ld);
        const float own = k->reach(x, ld, n, (int)a->shape[3], less, NULL);
        if (!(own <= most)) most = own; /* a NaN stays */
    }
    return most;
}

static int rows_of_glance(const ada_problem *p) {
    return ada_is_few(p) ? ADA_GUESS_ROWS / 2 : ADA_GUESS_ROWS;
}

/* Mean, variances and largest number of keys. */
static bool glance_at_keys(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t g, bool all,
                           const some_rows *some, const glance_scratch *s, ada_key_probe *keys) {
    const int D = (int)p->D;
    float norm2[ADA_GUESS_ROWS], largest;
    ptrdiff_t ld;
    const float *x = rows_at_f32(k, &some->every, 0, 0, 0, some->n, s->rows, &ld);
    memset(s->mean, 0, (size_t)D * sizeof *s->mean);
    memset(s->variance, 0, (size_t)D * sizeof *s->variance);
    memset(s->largest, 0, (size_t)D * sizeof *s->largest);
    k->columns(s->mean, s->largest, x, ld, some->n, D); /* the largest are of no use */
    for (int d = 0; d < D; d++) s->mean[d] /= (float)some->n;
    k->squares(norm2, s->variance, x, ld, some->n, D, s->mean, NULL);
    keys->total = 0;
    for (int d = 0; d < D; d++) s->variance[d] /= (float)some->n, keys->total += (double)s->variance[d];
    if (!all) return false;
    largest = k->reach(x, ld, some->n, D, s->mean, NULL);
    const float most = largest_of(k, &p->key, b, g, some, s->mean, s->rows);
    keys->largest2 = (double)most * (double)most;
    return most <= UNEVEN * largest;
}

/* Squared norms of values; for rungs those of their mean and of their rounding too. */
static bool glance_at_values(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t g, bool all,
                             bool rungs, const some_rows *some, const glance_scratch *s,
                             ada_key_probe *keys) {
    const int E = (int)p->E;
    const double count = (double)(some->end - some->first);
    float norm2[ADA_GUESS_ROWS], sum2;
    double value2 = 0;
    ptrdiff_t ld;
    const float *x = rows_at_f32(k, &some->every, 0, 0, 0, some->n, s->rows, &ld);
    k->squares(norm2, NULL, x, ld, some->n, E, NULL, NULL);
    for (int i = 0; i < some->n; i++) value2 += (double)norm2[i];
    keys->value2_mean = value2 / some->n;
    if (!all) return false;
    const float largest = k->reach(x, ld, some->n, E, NULL, NULL);
    if (!rungs) return largest_of(k, &p->value, b, g, some, NULL, s->rows) <= UNEVEN * largest;
    memset(s->sum, 0, (size_t)E * sizeof *s->sum);
    memset(s->largest, 0, (size_t)E * sizeof *s->largest);
    for (int64_t i = some->first; i < some->end; i += ADA_BLOCK) {
        const int n = (int)(some->end - i < ADA_BLOCK ? some->end - i : ADA_BLOCK);
        x = rows_at_f32(k, &p->value, b, g, i, n, s->rows, &ld);
        k->columns(s->sum, s->largest, x, ld, n, E);
    }
    k->squares(&sum2, NULL, s->sum, E, 1, E, NULL, NULL);
    /* What the mean of so many independent values would have by chance is not of their common mean. */
    const double mean2 = (double)sum2 / (count * count), own2 = fmax(keys->value2_mean - mean2, 0);
    keys->center2 = fmax(mean2 - own2 / count, 0);
    const float most = k->reach(s->largest, E, 1, E, NULL, NULL);
    const double step16 = (double)most / ADA_I16_VALUE_MAX;
    keys->step16 = (double)E * step16 * step16 / 12;
    return most <= UNEVEN * largest;
}

int ada_glance(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, bool rungs,
               ada_row_profile profiles[2], ada_key_probe *keys, char *scratch) {
    ada_carver carver = {scratch, 0};
    const glance_scratch s = scratch_of(p, &carver);
    const int D = (int)p->D;
    const int64_t g = h / (p->H / p->G);
    const double scale2 = p->scale * p->scale;
    int64_t start, end;
    ptrdiff_t ld;
    *keys = (ada_key_probe){0};
    ada_seeing_rows(p, b, &start, &end);
    if (end <= start) return 0;
    const int64_t first = ada_visible_span(p, b, start).first, last = ada_visible_span(p, b, end - 1).end;
    const bool few = ada_is_few(p);
    const int most = rows_of_glance(p);
    rungs &= few;
    const some_rows key = spread_out(&p->key, b, g, first, last, most);
    const some_rows value = spread_out(&p->value, b, g, first, last, most);
    const some_rows query = spread_out(&p->query, b, h, start, end, most);
    bool even = glance_at_keys(p, k, b, g, few, &key, &s, keys);
    even &= glance_at_values(p, k, b, g, few, rungs, &value, &s, keys);
    const double value2 = keys->value2_mean, center2 = keys->center2;
    for (int d = 0; d < D; d++) s.mean[d] *= s.mean[d];
    float spread[ADA_GUESS_ROWS], by_mean[ADA_GUESS_ROWS], one_over[ADA_GUESS_ROWS], p2[ADA_GUESS_ROWS];
    float norm2[ADA_GUESS_ROWS], largest[ADA_GUESS_ROWS];
    const float *x = rows_at_f32(k, &query.every, 0, 0, 0, query.n, s.rows, &ld);
    k->squares(spread, NULL, x, ld, query.n, D, NULL, s.variance);
    k->squares(by_mean, NULL, x, ld, query.n, D, NULL, s.mean);
    if (rungs) k->row_reach(largest, norm2, x, ld, query.n, D, NULL);
    const float above = few ? k->reach(x, ld, query.n, D, NULL, NULL) : 0;
    for (int i = 0; i < query.n; i++) {
        const ada_span span = ada_visible_span(p, b, start + i * query.step);
        spread[i] *= (float)scale2, by_mean[i] *= (float)scale2;
        one_over[i] = 1 / (float)(span.end - span.first);
    }
    even = even && largest_of(k, &p->query, b, h, &query, NULL, s.rows) <= UNEVEN * above;
    ada_crowd_of(spread, one_over, query.n, p2);
    ada_row_profile *all = profiles, *peak = profiles + 1;
    *all = *peak = (ada_row_profile){0};
    for (int i = 0; i < query.n; i++) {
        /* Were 1 / p^2 keys alike and their values independent; at most what two of them make. */
        const double share = (double)p2[i], apart = value2 * (share < 0.5 ? share * (1 - share) : 0.25);
        const double size = (double)spread[i] + (double)by_mean[i];
        const double crowd = share / (1 + share) * (value2 - center2); /* of normal scores of few keys */
        all->p2d += apart, all->p2 += share, all->out2 += center2 + crowd;
        /* A step of its weights, of which the largest is at most the root of p2. */
        const double step = fmax(1 / (double)ADA_I16_WEIGHT_SUM, sqrt(share) / ADA_I16_MAX);
        all->round16 += (value2 - center2) / (double)one_over[i] * step * step / 12;
        all->spread += apart * (double)spread[i], all->size += apart * size;
        if (rungs) all->q2 += apart * scale2 * (double)norm2[i];
        if (rungs) all->qmax2 += apart * scale2 * (double)largest[i] * (double)largest[i];
        if (!(size * share <= peak->size * peak->p2)) {
            *peak = (ada_row_profile){.p2 = share, .spread = (double)spread[i], .size = size};
            if (rungs) peak->q2 = scale2 * (double)norm2[i];
            if (rungs) peak->qmax2 = scale2 * (double)largest[i] * (double)largest[i];
        }
    }
    const double each = all->p2d > 0 ? 1 / all->p2d : 0; /* the others are means, weighted by it */
    all->spread *= each, all->size *= each, all->q2 *= each, all->qmax2 *= each;
    all->weight = 1.0 / query.n;
    all->p2v = all->p2 * value2;
    all->score_std = sqrt(all->spread), all->entropy = all->block_entropy = all->local_entropy = NAN;
    for (ada_row_profile *one = profiles; one < profiles + 2; one++) {
        one->reference = 3 * sqrt(one->size);
        one->p2_norm = one->p2 * keys->total, one->p2_step = one->p2 * keys->largest2;
        one->p2d_norm = one->p2d * keys->total, one->p2d_step = one->p2d * keys->largest2;
        one->good = even && isfinite(one->p2d_step) && isfinite(one->size);
    }
    return 2;
}

double ada_glance_at_output(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, char *scratch) {
    ada_carver carver = {scratch, 0};
    const glance_scratch s = scratch_of(p, &carver);
    float norm2[ADA_GUESS_ROWS];
    double out2 = 0;
    int64_t start, end;
    ptrdiff_t ld;
    ada_seeing_rows(p, b, &start, &end);
    const some_rows some = spread_out(&p->out, b, h, start, end, rows_of_glance(p));
    const float *x = rows_at_f32(k, &some.every, 0, 0, 0, some.n, s.rows, &ld);
    k->squares(norm2, NULL, x, ld, some.n, (int)p->E, NULL, NULL);
    for (int i = 0; i < some.n; i++) out2 += (double)norm2[i];
    return out2 / some.n;
}
