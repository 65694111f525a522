/* Generators of the slots that work on a tile: random inputs that the contract in kernels_tpl.h allows, what
 * they must become by a computation in long double, with an error bound from the number of roundings, and the
 * call. What a contract leaves open is expected to be anything.
 */
#ifndef CHECK_TILES_H
#define CHECK_TILES_H

#include "check_run.h"

static void make_pack(check *c) {
    int lanes = pick_lanes(c), n = pick(c, "n", 1, lanes, lanes), D = pick_size(c, "D");
    matrix rows = new_rows(c, "rows", c->real, n, D, true);
    buffer *to = new_buffer(c, "to", c->real, (int64_t)D * ADA_LANES, ADA_LANES, 64);
    double factor = chance(c, 0.2) ? 1 : rounded(c, uniform(c, -3, 3));
    for (int d = 0; d < D; d++)
        for (int i = 0; i < lanes; i++) {
            wide x = values(rows.b)[rows.at + (i < n ? i : n - 1) * rows.ld + d] * (wide)factor;
            expect_near(to, d * ADA_LANES + i, x, rounding(c, x), 0);
        }
    c->bytes = 2.0 * D * lanes * to->bytes;
    RUN(c, CALL(c, pack, data(to), rows.first, rows.ld, n, D, lanes, factor));
}

/* q . k[j] for one lane. */
static total dot(buffer *q, int lane, const matrix *k, int j, int D) {
    total t = {0};
    const wide *x = values(q) + lane, *y = values(k->b) + k->at + j * k->ld;
    for (int d = 0; d < D; d++) add_product(&t, x[d * ADA_LANES], y[d]);
    return t;
}

static void make_scores(check *c) {
    int lanes = pick_lanes(c), n = ADA_KEY_STEP * pick(c, "n/16", 1, 4, 4), D = pick_size(c, "D");
    buffer *q = new_strips(c, "q", D, lanes), *p = new_strips(c, "p", ADA_BLOCK, 0);
    matrix k = new_rows(c, "k", c->real, n, D, true);
    for (int j = 0; j < n && !c->bench; j++)
        for (int i = 0; i < lanes; i++) {
            total t = dot(q, i, &k, j, D);
            expect_total(c, p, j * ADA_LANES + i, &t);
        }
    c->flops = 2.0 * n * D * lanes;
    void *tile = tile_of(c, q, p, NULL, NULL, NULL, D, 0, lanes);
    RUN(c, CALL(c, scores, tile, k.first, k.ld, n));
}

static void make_values(check *c) {
    int lanes = pick_lanes(c), n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK), E = pick_size(c, "E");
    buffer *p = new_strips(c, "p", ADA_BLOCK, lanes), *o = new_strips(c, "o", E, lanes);
    matrix v = new_rows(c, "v", c->real, n, E, true);
    const wide *weights = values(p), *rows = values(v.b) + v.at;
    for (int e = 0; e < E && !c->bench; e++)
        for (int i = 0; i < lanes; i++) {
            total t = {0};
            add_product(&t, 1, values(o)[e * ADA_LANES + i]);
            for (int j = 0; j < n; j++) add_product(&t, weights[j * ADA_LANES + i], rows[j * v.ld + e]);
            expect_total(c, o, e * ADA_LANES + i, &t);
        }
    c->flops = 2.0 * n * E * lanes;
    void *tile = tile_of(c, NULL, p, o, NULL, NULL, 0, E, lanes);
    RUN(c, CALL(c, values, tile, v.first, v.ld, n));
}

static void make_unpack(check *c) {
    int n = pick(c, "n", 1, ADA_LANES, ADA_LANES), E = pick_size(c, "E");
    buffer *o = new_strips(c, "o", E, n), *factor = new_strips(c, "factor", 1, n);
    matrix rows = new_rows(c, "rows", c->real, n, E, false);
    c->expected = true;
    for (int i = 0; i < n; i++)
        for (int e = 0; e < E; e++) {
            wide x = values(o)[e * ADA_LANES + i] * values(factor)[i], size = fabsl(x);
            expect_near(rows.b, rows.at + i * rows.ld + e, x, rounding(c, x), 0);
            bool overflow = size > c->limit.largest;
            c->any_result |= overflow && size < c->limit.largest * (1 + (wide)c->limit.unit);
            c->expected &= !overflow && !isnan(x);
        }
    c->bytes = 2.0 * E * n * o->bytes;
    RUN(c, c->result = CALL(c, unpack, rows.first, rows.ld, data(o), data(factor), n, E));
}

/* One score that a block must be refused for. */
static void spoil(check *c, buffer *b, int64_t at, wide m) {
    uint64_t sign = random_bits(c) << 63 >> (64 - 8 * b->bytes);
    set(b, at, INFINITY);
    uint64_t infinity = bits_at(b, at);
    switch (integer(c, 0, 6)) {
    case 0:
    case 1:
        set_bits(b, at, sign | infinity | (1 + random_bits(c) % 0x3fffff));
        break;
    case 2:
        set_bits(b, at, sign | infinity);
        break;
    case 3:
        set(b, at, (double)m + ADA_LAZY_OCTAVES * 1.001 + fabs((double)m) * 1e-5);
        break;
    case 4:
    case 5:
        set(b, at, ADA_LAZY_OCTAVES + (double)m);
        set_bits(b, at, bits_at(b, at) + 1); /* the next number, if this one is positive */
        break;
    default:
        set(b, at, c->real == ADA_F32 ? FLT_MAX : DBL_MAX);
    }
}

/* cap * tanh(s / cap): 2 roundings around tanh, whose condition number is at most 1; in tanh, 2 of its
 * argument in log2 units, up to 4 of expm1 next to a power of two, 3 of the quotient and its terms. */
static void make_softcap(check *c) {
    int n = chance(c, 0.5) ? pick(c, "n", 1, 100, 4096) : ADA_LANES * pick(c, "n/64", 1, 64, 64);
    double cap = rounded(c, chance(c, 0.8) ? exp2(uniform(c, -5, 10)) : exp2(uniform(c, -90, 90)));
    if (c->style == SCALES && chance(c, 0.5)) c->low = -30, c->high = 6;
    buffer *s = new_vector(c, "s", c->real, n);
    if (!c->bench && chance(c, 0.2)) spoil(c, s, integer(c, 0, n - 1), 0);
    c->expected = true;
    for (int i = 0; i < n; i++) {
        wide x = values(s)[i], y = cap * tanhl(x / cap);
        if (isfinite(x))
            expect_near(s, i, y, 12 * c->limit.unit * (double)fabsl(y) + 4 * c->limit.least * fmax(1, cap),
                        0);
        else
            expect_any(s, i), c->expected = false;
    }
    c->bytes = 2.0 * n * s->bytes;
    RUN(c, c->result = CALL(c, softcap, data(s), n, cap));
}

/* ---- weights ---- */

typedef enum { HIDDEN, GOOD, BAD, EITHER } verdict;
typedef struct {
    verdict verdict; /* BAD: the kernel must refuse the block; EITHER: rounding decides */
    bool kept;
    wide value;
    double tolerance, exp2;
} weight;

/* 2^y, y being off by up to error. A subnormal power may be any number up to the smallest normal one. */
static weight power(const check *c, wide y, double error) {
    wide value = exp2l(y);
    double small = value < 1.01 * c->limit.normal ? c->limit.normal : 0;
    return (weight){GOOD, true, value, (double)(exp2l(y + error) - value) + small, (double)value};
}

/* 2^(score - m): the subtraction rounds, unless REAL holds the difference. */
static weight weigh(const check *c, wide score, double error, wide m, double gap) {
    wide y = score - m;
    if (!isfinite(score) || isnan(y) || y == INFINITY) return (weight){.verdict = BAD};
    if (error > 0 || !holds(c, y)) error += rounding(c, y);
    weight w = power(c, y, error);
    if (y + error > gap) w.verdict = y - error > gap ? BAD : EITHER;
    if (gap < INFINITY && y - error < -c->limit.largest) w.verdict = EITHER; /* the difference overflows */
    return w;
}

/* What p[j][i] (rows of p are stride apart) and l, now within start's tolerances, become. Returns false when
 * weights are BAD. */
static bool expect_weights(check *c, const weight *w, int n, int lanes, buffer *p, int stride, buffer *l,
                           int64_t l_at, const weight *start) {
    int bad = 0, either = 0;
    for (int a = 0; a < n * lanes; a++) bad += w[a].verdict == BAD, either += w[a].verdict == EITHER;
    c->expected = bad == 0;
    c->any_result = bad == 0 && either > 0;
    for (int i = 0; i < lanes; i++) {
        weight sum = start[i];
        for (int j = 0; j < n; j++) {
            weight x = w[j * lanes + i];
            if (x.verdict == HIDDEN) x = (weight){0};
            sum.value += x.value;
            sum.tolerance += x.tolerance;
            sum.exp2 += x.exp2;
            if (!x.kept) x = (weight){0};
            if (bad || either)
                expect_any(p, j * stride + i);
            else
                expect_near(p, j * stride + i, x.value, x.tolerance, x.exp2);
        }
        sum.tolerance += (n + 2) * c->limit.unit * (double)(sum.value + 2 * fabsl(start[i].value));
        if (!bad && either) expect_any(l, l_at + i);
        if (!bad && !either) expect_near(l, l_at + i, sum.value, sum.tolerance, sum.exp2);
    }
    return bad == 0;
}

/* Octaves above the reference, where exp2 may stumble or, if no rounding can carry them over it, the gap
 * ends. */
static double octaves(check *c, bool exact) {
    double lowest = c->real == ADA_F32 ? -126 : -1022;
    switch (c->bench ? 9 : integer(c, 0, 9)) {
    case 0:
        return exact ? ADA_LAZY_OCTAVES : ADA_LAZY_OCTAVES - 0.01;
    case 1:
        return uniform(c, lowest - 10, ADA_LAZY_OCTAVES - 0.01);
    case 2:
        return lowest - uniform(c, -1, 1.5);
    case 3:
        return -exp2(uniform(c, -60, 120));
    case 4:
        return integer(c, -320, 320) / 32.0;
    default:
        return uniform(c, -20, 5);
    }
}

static buffer *new_bits(check *c, const char *name, int n) {
    buffer *b = new_buffer(c, name, ADA_U64, n, n, 8);
    double p = chance(c, 0.3) ? 1 : uniform(c, 0, 1);
    for (int j = 0; j < n; j++) {
        uint64_t word = 0;
        for (int i = 0; i < 64; i++) word |= (uint64_t)chance(c, p) << i;
        set_bits(b, j, word);
    }
    return b;
}
static bool bit(const buffer *b, int j, int i) { return !b || (bits_at(b, j) >> i & 1); }
static bool hides(const buffer *bias, int64_t at) { return bias && value_at(bias, at) == -INFINITY; }
static void clear_bit(buffer *b, int j, int i) { set_bits(b, j, bits_at(b, j) & ~(UINT64_C(1) << i)); }

/* A reference m per lane: zero, which keeps differences exact, or around some level. */
static buffer *new_references(check *c, int lanes) {
    buffer *m = new_strips(c, "m", 1, 0);
    bool zero = chance(c, 0.4);
    double level = chance(c, 0.5) ? 0 : uniform(c, -1000, 1000);
    /* A benchmark's scores, or weights taken for scores, never exceed 60 by much. */
    for (int i = 0; i < lanes; i++) set(m, i, c->bench ? 60 : zero ? 0 : level + uniform(c, -3, 3));
    return m;
}

static void make_weights(check *c) {
    int lanes = pick_lanes(c), n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK);
    c->style = PLAIN;
    buffer *p = new_strips(c, "p", ADA_BLOCK, 0), *l = new_strips(c, "l", 1, lanes);
    buffer *m = new_references(c, lanes);
    buffer *visible = c->bench || chance(c, 0.3) ? NULL : new_bits(c, "visible", n);
    buffer *keep = c->bench || chance(c, 0.5) ? NULL : new_bits(c, "keep", n);
    buffer *bias = c->bench || chance(c, 0.5) ? NULL : new_strips(c, "bias", n, lanes);
    note(c, "visible", visible != NULL), note(c, "keep", keep != NULL), note(c, "bias", bias != NULL);
    for (int i = 0; i < lanes; i++) {
        bool empty = visible && chance(c, 0.1);
        for (int j = 0; j < n; j++) {
            int at = j * ADA_LANES + i;
            if (empty) clear_bit(visible, j, i);
            double level = (double)value_at(m, i);
            set(p, at, octaves(c, level == 0 && !bias) + level - (bias ? (double)value_at(bias, at) : 0));
            if (!bit(visible, j, i) && chance(c, 0.3))
                set_special(c, chance(c, 0.5) && bias ? bias : p, at);
            else if (bias && chance(c, 0.05))
                set(bias, at, chance(c, 0.5) ? -INFINITY : -1e30);
        }
        if (empty) set(m, i, -INFINITY);
    }
    if (!c->bench && chance(c, 0.3)) {
        int j = integer(c, 0, n - 1), i = integer(c, 0, lanes - 1);
        spoil(c, bias && chance(c, 0.5) ? bias : p, j * ADA_LANES + i, value_at(m, i));
    }
    if (!c->bench && chance(c, 0.05)) set(m, integer(c, 0, lanes - 1), -INFINITY);

    weight w[ADA_BLOCK * ADA_LANES], start[ADA_LANES] = {0};
    for (int i = 0; i < lanes; i++) {
        start[i].value = values(l)[i];
        for (int j = 0; j < n; j++) {
            int at = j * ADA_LANES + i;
            wide score = values(p)[at] + (bias ? values(bias)[at] : 0);
            double error = bias && !holds(c, score) ? rounding(c, score) : 0;
            weight *x = &w[j * lanes + i];
            *x = (weight){HIDDEN, false, 0, 0, 0};
            if (bit(visible, j, i) && !hides(bias, at))
                *x = weigh(c, score, error, values(m)[i], ADA_LAZY_OCTAVES);
            x->kept = bit(keep, j, i);
        }
    }
    expect_weights(c, w, n, lanes, p, ADA_LANES, l, 0, start);
    c->bytes = 2.0 * n * lanes * p->bytes;
    void *tile = tile_of(c, NULL, p, NULL, m, l, 0, 0, lanes);
    RUN(c, c->result = CALL(c, weights, tile, n, data(visible), data(bias), data(keep)));
}

/* k becomes the identity, so that q is the scores, exactly. */
static void use_identity(check *c, buffer *q, const matrix *k, buffer *m, int n, int D, int lanes) {
    for (int j = 0; j < n; j++)
        for (int d = 0; d < D; d++) set(k->b, k->at + j * k->ld + d, d == j);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < lanes; i++) {
            double level = (double)value_at(m, i);
            set(q, j * ADA_LANES + i, octaves(c, level == 0) + level);
        }
    if (chance(c, 0.5)) {
        int i = integer(c, 0, lanes - 1);
        spoil(c, q, integer(c, 0, n - 1) * ADA_LANES + i, value_at(m, i));
    }
}

/* D = 1: all scores are the same 1 or -1, but for one key or one lane. */
static void use_column(check *c, buffer *q, const matrix *k, buffer *m, int n, int lanes) {
    double signs[] = {chance(c, 0.5) ? 1 : -1, chance(c, 0.5) ? 1 : -1};
    for (int i = 0; i < lanes; i++) set(q, i, signs[0]);
    for (int j = 0; j < n; j++) set(k->b, k->at + j * k->ld, signs[1]);
    int j = integer(c, 0, n - 1), i = integer(c, 0, lanes - 1);
    if (chance(c, 0.4))
        spoil(c, q, i, value_at(m, i));
    else if (chance(c, 0.6))
        spoil(c, k->b, k->at + j * k->ld, value_at(m, 0));
}

static void make_scores_weights(check *c) {
    enum { RANDOM, IDENTITY, COLUMN } way = c->bench ? RANDOM : (unsigned)integer(c, 0, 2);
    int lanes = pick_lanes(c), n = ADA_KEY_STEP * pick(c, "n/16", 1, 4, 4);
    int D = way == RANDOM ? pick_size(c, "D") : note(c, "D", way == IDENTITY ? n + integer(c, 0, 20) : 1);
    if (c->bench || chance(c, 0.8)) c->style = PLAIN;
    buffer *q = new_strips(c, "q", D, lanes), *p = new_strips(c, "p", ADA_BLOCK, 0);
    matrix k = new_rows(c, "k", c->real, n, D, true);
    c->style = PLAIN;
    buffer *m = new_references(c, lanes), *l = new_strips(c, "l", 1, lanes);
    if (way == IDENTITY) use_identity(c, q, &k, m, n, D, lanes);
    if (way == COLUMN) use_column(c, q, &k, m, n, lanes);

    weight w[ADA_BLOCK * ADA_LANES] = {0}, start[ADA_LANES] = {0};
    double slack = integer(c, 0, 9) ? uniform(c, -50, 5) : -60.5;
    for (int i = 0; i < lanes && !c->bench; i++) {
        total t[ADA_BLOCK];
        wide largest = -INFINITY;
        for (int j = 0; j < n; j++) {
            t[j] = dot(q, i, &k, j, D);
            largest = fmaxl(largest, t[j].sum);
        }
        if (way == RANDOM && isfinite(largest)) set(m, i, (double)largest + slack);
        if (chance(c, 0.002)) set(m, i, -INFINITY);
        start[i].value = values(l)[i];
        for (int j = 0; j < n; j++) {
            weight *x = &w[j * lanes + i];
            *x = weigh(c, t[j].sum, total_tolerance(c, &t[j]), value_at(m, i), ADA_LAZY_OCTAVES);
            finiteness finite = total_finiteness(c, &t[j]);
            if (finite == INFINITE) x->verdict = BAD;
            if (finite == MAYBE && x->verdict == GOOD) x->verdict = EITHER;
            x->kept = true;
        }
    }
    expect_weights(c, w, n, lanes, p, ADA_LANES, l, 0, start);
    c->flops = 2.0 * n * D * lanes;
    void *tile = tile_of(c, q, p, NULL, m, l, D, 0, lanes);
    RUN(c, c->result = CALL(c, scores_weights, tile, k.first, k.ld, n));
}

static void expect_scaled(check *c, buffer *b, int64_t i, weight factor) {
    wide x = values(b)[i];
    double size = (double)fabsl(x);
    expect_near(b, i, x * factor.value, size * factor.tolerance + rounding(c, x * factor.value),
                size * factor.exp2);
}

static void make_reference(check *c) {
    int lanes = pick_lanes(c), n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK), E = pick_size(c, "E");
    buffer *p = new_strips(c, "p", ADA_BLOCK, lanes), *m = new_references(c, lanes);
    buffer *visible = c->bench || chance(c, 0.3) ? NULL : new_bits(c, "visible", n);
    buffer *bias = c->bench || chance(c, 0.5) ? NULL : new_strips(c, "bias", n, lanes);
    if (c->style == SPECIALS) c->style = PLAIN;
    buffer *o = new_strips(c, "o", E, lanes), *l = new_strips(c, "l", 1, lanes);
    double level = (double)value_at(m, 0) + uniform(c, -10, 10) + (chance(c, 0.5) ? 2 * ADA_LAZY_OCTAVES : 0);
    for (int i = 0; i < lanes; i++) {
        if (chance(c, 0.2)) {
            set(m, i, -INFINITY), set(l, i, 0);
            for (int e = 0; e < E; e++) set(o, e * ADA_LANES + i, 0);
        }
        for (int j = 0; j < n; j++) {
            int at = j * ADA_LANES + i;
            wide x = value_at(p, at);
            if (isfinite(x)) set(p, at, (double)x * 3 + level);
            if (!bit(visible, j, i) && chance(c, 0.3)) set_special(c, p, at);
        }
        wide before = value_at(m, i), after = before;
        bool nan = false;
        for (int j = 0; j < n; j++) {
            int at = j * ADA_LANES + i;
            wide x = sum_of(c, value_at(p, at), bias ? value_at(bias, at) : 0);
            if (!bit(visible, j, i) || hides(bias, at)) continue;
            nan |= isnan(x);
            if (x > after) after = x;
        }
        if (!(after > before + ADA_LAZY_OCTAVES) && !nan) continue;
        expect_near(m, i, after, 0, 0);
        weight factor = power(c, before - after, rounding(c, before - after));
        expect_scaled(c, l, i, factor);
        for (int e = 0; e < E; e++) expect_scaled(c, o, e * ADA_LANES + i, factor);
        /* Which number a visible NaN leaves is open: the block will be refused. */
        for (int e = 0; nan && e < E; e++) expect_any(o, e * ADA_LANES + i);
        if (nan) expect_any(m, i), expect_any(l, i);
    }
    c->bytes = 1.0 * n * lanes * p->bytes;
    void *tile = tile_of(c, NULL, p, o, m, l, 0, E, lanes);
    RUN(c, CALL(c, reference, tile, n, data(visible), data(bias)));
}

#endif
