/* Checks and benchmarks every kernel in kernels.def, one generator per slot and one line of output per kernel.
 *
 * Each kernel, the scalar ones too, must stay within a derived bound of a computation in long double: any two then
 * agree within the sum of their bounds. What a contract leaves open is not checked. A new kernel of a standing slot
 * needs nothing here; a new slot needs a generator and its row in `generators`.
 *
 *     cc -std=c11 -O2 -pthread -DADA_BUILD_AVX2=1 -DADA_BUILD_AVX512=1 tests/c/check_kernels.c csrc/cpu.c kernels/?*.o -lm
 */
#include "../../benchmarks/roofline.c"
#include "check.h"

#include <signal.h>

#define ADA_IF_scalar(...) __VA_ARGS__
#if ADA_BUILD_AVX2
#    define ADA_IF_avx2(...) __VA_ARGS__
#else
#    define ADA_IF_avx2(...)
#endif
#if ADA_BUILD_AVX512
#    define ADA_IF_avx512(...) __VA_ARGS__
#else
#    define ADA_IF_avx512(...)
#endif

#define ADA_KERNEL(slot, isa, needs) ADA_IF_##isa(ada_##slot##_fn ada_##slot##_##isa;)
#include "../../csrc/kernels.def"
#undef ADA_KERNEL

static kernel kernels[] = {
#define ADA_KERNEL(slot, isa, needs) ADA_IF_##isa({#slot, #isa, needs, (function)ada_##slot##_##isa, false, 0, 0, {0}}, )
#include "../../csrc/kernels.def"
#undef ADA_KERNEL
};
enum { N_KERNELS = sizeof kernels / sizeof *kernels };

/* ---- tiles ---- */

static void make_pack(check *c) {
    int lanes = pick_lanes(c), n = pick(c, "n", 1, lanes, lanes), D = pick_size(c, "D");
    matrix rows = new_rows(c, "rows", c->real, n, D, true);
    buffer *to = new_buffer(c, "to", c->real, (int64_t)D * ADA_LANES, ADA_LANES, 64);
    double factor = chance(c, 0.2) ? 1 : rounded(c, uniform(c, -3, 3));
    for (int d = 0; d < D; d++)
        for (int i = 0; i < lanes; i++) {
            wide x = i < n ? values(rows.b)[rows.at + i * rows.ld + d] * (wide)factor : 0;
            expect_near(to, d * ADA_LANES + i, x, rounding(c, x), 0);
        }
    c->bytes = 2.0 * D * lanes * to->bytes;
    RUN(c, CALL(c, pack, (void *)to->data, rows.first, rows.ld, n, D, lanes, factor));
}

/* q . k for every key and lane. */
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
    RUN(c, c->result = CALL(c, unpack, rows.first, rows.ld, (void *)o->data, (void *)factor->data, n, E));
}

/* cap * tanh(s / cap): 2 roundings around tanh, whose condition number is at most 1; in tanh, 2 of its argument in
 * log2 units, up to 4 of expm1 next to a power of two, 3 of the quotient and its terms. */
static void make_softcap(check *c) {
    int n = chance(c, 0.5) ? pick(c, "n", 1, 100, 4096) : ADA_LANES * pick(c, "n/64", 1, 64, 64);
    double cap = rounded(c, chance(c, 0.8) ? exp2(uniform(c, -5, 10)) : exp2(uniform(c, -90, 90)));
    if (c->style == SCALES && chance(c, 0.5)) c->low = -30, c->high = 6;
    buffer *s = new_vector(c, "s", c->real, n);
    c->expected = true;
    for (int i = 0; i < n; i++) {
        wide x = values(s)[i], y = cap * tanhl(x / cap);
        if (isfinite(x))
            expect_near(s, i, y, 12 * c->limit.unit * (double)fabsl(y) + 4 * c->limit.least * fmax(1, cap), 0);
        else
            expect_any(s, i), c->expected = false;
    }
    c->bytes = 2.0 * n * s->bytes;
    RUN(c, c->result = CALL(c, softcap, (void *)s->data, n, cap));
}

/* ---- weights ---- */

typedef enum { HIDDEN, GOOD, BAD, EITHER } verdict;
typedef struct {
    verdict verdict; /* BAD: the kernel must refuse the block; EITHER: rounding decides */
    bool kept;
    wide value;
    double tolerance, exp2;
} weight;

/* 2^y, y being off by up to error. Below the smallest normal number only that is promised. */
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
static bool expect_weights(check *c, const weight *w, int n, int lanes, buffer *p, int stride, buffer *l, int64_t l_at,
                           const weight *start) {
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

/* Octaves above the reference, where exp2 may stumble or the gap ends. */
static double octaves(check *c) {
    double lowest = c->real == ADA_F32 ? -126 : -1022;
    switch (c->bench ? 0 : integer(c, 0, 9)) {
    case 0: return ADA_LAZY_OCTAVES - integer(c, 0, 1) * uniform(c, 0, 1);
    case 1: return uniform(c, lowest - 10, ADA_LAZY_OCTAVES);
    case 2: return lowest - uniform(c, -1, 1.5);
    case 3: return -exp2(uniform(c, -60, 120));
    case 4: return integer(c, -320, 320) / 32.0;
    default: return uniform(c, -20, 5);
    }
}

static buffer *new_bits(check *c, const char *name, int n) {
    buffer *b = new_buffer(c, name, ADA_U64, n, n, 8);
    double p = chance(c, 0.3) ? 1 : uniform(c, 0, 1);
    for (int j = 0; j < n; j++)
        for (uint64_t bit = 1; bit && p < 1; bit <<= 1)
            if (chance(c, p)) set_bits(b, j, bits_at(b, j) | bit);
            else set_bits(b, j, bits_at(b, j) & ~bit);
    for (int j = 0; j < n && p == 1; j++) set_bits(b, j, UINT64_MAX);
    return b;
}
static bool bit(const buffer *b, int j, int i) { return !b || (bits_at(b, j) >> i & 1); }
static bool hides(const buffer *bias, int64_t at) { return bias && value_at(bias, at) == -INFINITY; }
static void clear_bit(buffer *b, int j, int i) { set_bits(b, j, bits_at(b, j) & ~(UINT64_C(1) << i)); }

/* A reference m per lane: zero, which keeps differences exact, or around some level. */
static buffer *new_references(check *c, int lanes) {
    buffer *m = new_strips(c, "m", 1, 0);
    bool zero = chance(c, 0.3);
    double level = chance(c, 0.5) ? 0 : uniform(c, -1000, 1000);
    for (int i = 0; i < lanes; i++) set(m, i, zero ? 0 : level + uniform(c, -3, 3));
    return m;
}

/* One score that a block must be refused for. */
static void spoil(check *c, buffer *b, int64_t at, wide m) {
    uint64_t sign = random_bits(c) << 63 >> (64 - 8 * b->bytes), infinity;
    set(b, at, INFINITY);
    infinity = bits_at(b, at);
    switch (integer(c, 0, 4)) {
    case 0: set_bits(b, at, sign | infinity | (1 + random_bits(c) % 0x3fffff)); break;
    case 1: set_bits(b, at, sign | infinity); break;
    case 2: set(b, at, (double)m + ADA_LAZY_OCTAVES * 1.001 + fabs((double)m) * 1e-5); break;
    case 3: set(b, at, (ADA_LAZY_OCTAVES + (double)m) * (1 + 2 * c->limit.unit)); break; /* the next number */
    default: set(b, at, c->real == ADA_F32 ? FLT_MAX : DBL_MAX);
    }
}

static void make_weights(check *c) {
    int lanes = pick_lanes(c), n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK);
    c->style = PLAIN;
    buffer *p = new_strips(c, "p", ADA_BLOCK, 0), *m = new_references(c, lanes), *l = new_strips(c, "l", 1, lanes);
    buffer *visible = c->bench || chance(c, 0.3) ? NULL : new_bits(c, "visible", n);
    buffer *keep = c->bench || chance(c, 0.5) ? NULL : new_bits(c, "keep", n);
    buffer *bias = c->bench || chance(c, 0.5) ? NULL : new_strips(c, "bias", n, lanes);
    note(c, "visible", visible != NULL), note(c, "keep", keep != NULL), note(c, "bias", bias != NULL);
    for (int i = 0; i < lanes; i++) {
        bool empty = visible && chance(c, 0.1);
        for (int j = 0; j < n; j++) {
            int at = j * ADA_LANES + i;
            if (empty) clear_bit(visible, j, i);
            set(p, at, octaves(c) + (double)value_at(m, i) - (bias ? (double)value_at(bias, at) : 0));
            if (!bit(visible, j, i) && chance(c, 0.3)) set_special(c, chance(c, 0.5) && bias ? bias : p, at);
            else if (bias && chance(c, 0.05)) set(bias, at, chance(c, 0.5) ? -INFINITY : -1e30);
        }
        if (empty) set(m, i, -INFINITY);
    }
    if (!c->bench && chance(c, 0.3)) {
        int j = integer(c, 0, n - 1), i = integer(c, 0, lanes - 1);
        spoil(c, bias && chance(c, 0.3) ? bias : p, j * ADA_LANES + i, value_at(m, i));
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
            if (bit(visible, j, i) && !hides(bias, at)) *x = weigh(c, score, error, values(m)[i], ADA_LAZY_OCTAVES);
            x->kept = bit(keep, j, i);
        }
    }
    expect_weights(c, w, n, lanes, p, ADA_LANES, l, 0, start);
    c->bytes = 2.0 * n * lanes * p->bytes;
    void *tile = tile_of(c, NULL, p, NULL, m, l, 0, 0, lanes);
#define DATA(b) (b ? (void *)b->data : NULL)
    RUN(c, c->result = CALL(c, weights, tile, n, DATA(visible), DATA(bias), DATA(keep)));
}

/* Three ways to scores: any q and k; k the identity, which makes q the scores exactly; D = 1 with all scores of one sign,
 * and NaN of every sort, infinities or huge numbers in one key or lane. */
static void make_scores_weights(check *c) {
    enum { ANYTHING, EXACT, ONE_COLUMN } way = c->bench ? ANYTHING : (unsigned)integer(c, 0, 2);
    int lanes = pick_lanes(c), n = ADA_KEY_STEP * pick(c, "n/16", 1, 4, 4);
    int D = way == ANYTHING ? pick_size(c, "D") : note(c, "D", way == EXACT ? n + integer(c, 0, 20) : 1);
    if (c->bench || chance(c, 0.8)) c->style = PLAIN;
    buffer *q = new_strips(c, "q", D, lanes), *p = new_strips(c, "p", ADA_BLOCK, 0), *m = new_references(c, lanes);
    matrix k = new_rows(c, "k", c->real, n, D, true);
    c->style = PLAIN;
    buffer *l = new_strips(c, "l", 1, lanes);
    for (int j = 0; j < n && way == EXACT; j++)
        for (int d = 0; d < D; d++) set(k.b, k.at + j * k.ld + d, 0);
    for (int j = 0; j < n && way == EXACT; j++) {
        set(k.b, k.at + j * k.ld + j, 1);
        for (int i = 0; i < lanes; i++) set(q, j * ADA_LANES + i, (double)value_at(m, i) + octaves(c));
    }
    double signs[] = {chance(c, 0.5) ? 1 : -1, chance(c, 0.5) ? 1 : -1};
    for (int i = 0; i < lanes && way == ONE_COLUMN; i++) set(q, i, signs[0]);
    for (int j = 0; j < n && way == ONE_COLUMN; j++) set(k.b, k.at + j * k.ld, signs[1]);
    int j = integer(c, 0, n - 1), i = integer(c, 0, lanes - 1);
    if (way == EXACT && chance(c, 0.3)) spoil(c, q, j * ADA_LANES + i, value_at(m, i));
    if (way == ONE_COLUMN && chance(c, 0.4)) spoil(c, q, i, value_at(m, i));
    else if (way == ONE_COLUMN && chance(c, 0.6)) spoil(c, k.b, k.at + j * k.ld, value_at(m, 0));

    weight w[ADA_BLOCK * ADA_LANES] = {0}, start[ADA_LANES] = {0};
    double slack = integer(c, 0, 9) ? uniform(c, -50, 5) : -60.5;
    for (int i = 0; i < lanes; i++) {
        total t[ADA_BLOCK] = {0};
        wide largest = -INFINITY;
        for (int j = 0; j < n && !c->bench; j++) {
            t[j] = dot(q, i, &k, j, D);
            largest = fmaxl(largest, t[j].sum);
        }
        if (way == ANYTHING && isfinite(largest)) set(m, i, (double)largest + slack);
        if (!c->bench && chance(c, 0.002)) set(m, i, -INFINITY);
        start[i].value = values(l)[i];
        for (int j = 0; j < n && !c->bench; j++) {
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
    expect_near(b, i, x * factor.value, size * factor.tolerance + rounding(c, x * factor.value), size * factor.exp2);
}

static void make_reference(check *c) {
    int lanes = pick_lanes(c), n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK), E = pick_size(c, "E");
    buffer *p = new_strips(c, "p", ADA_BLOCK, lanes), *m = new_references(c, lanes);
    buffer *visible = c->bench || chance(c, 0.3) ? NULL : new_bits(c, "visible", n);
    buffer *bias = c->bench || chance(c, 0.5) ? NULL : new_strips(c, "bias", n, lanes);
    if (c->style == SPECIALS) c->style = PLAIN;
    buffer *o = new_strips(c, "o", E, lanes), *l = new_strips(c, "l", 1, lanes);
    double level = (double)value_at(m, 0) + uniform(c, -10, 10);
    for (int i = 0; i < lanes; i++) {
        if (chance(c, 0.2)) set(m, i, -INFINITY);
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
        if (after == before && !nan) continue;
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
    RUN(c, CALL(c, reference, tile, n, DATA(visible), DATA(bias)));
}

/* ---- single queries ---- */

static void make_row_weights(check *c) {
    int n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK), E = pick_size(c, "E");
    uint64_t visible = c->bench || chance(c, 0.3) ? UINT64_MAX : random_bits(c) | (chance(c, 0.3) ? random_bits(c) : 0);
    uint64_t keep = c->bench || chance(c, 0.5) ? UINT64_MAX : random_bits(c);
    if (!c->bench && chance(c, 0.1)) visible = 0;
    if (c->style == SPECIALS) c->style = PLAIN;
    buffer *o = new_vector(c, "o", c->real, E), *s = new_vector(c, "s", c->real, n);
    buffer *bias = c->bench || chance(c, 0.5) ? NULL : new_vector(c, "bias", c->real, n);
    note(c, "bias", bias != NULL);
    double level = chance(c, 0.3) ? 0 : uniform(c, -1000, 1000);
    double m = chance(c, 0.2) ? -INFINITY : rounded(c, chance(c, 0.2) ? 0 : level + uniform(c, -30, 30));
    for (int j = 0; j < n; j++) {
        set(s, j, level + octaves(c));
        if (!(visible >> j & 1) && chance(c, 0.3)) set_special(c, bias && chance(c, 0.5) ? bias : s, j);
        else if (bias && chance(c, 0.05)) set(bias, j, chance(c, 0.5) ? -INFINITY : -1e30);
    }
    if (!c->bench && chance(c, 0.3)) spoil(c, bias && chance(c, 0.3) ? bias : s, integer(c, 0, n - 1), level);

    /* The struct as a buffer of REAL: m and l are what a kernel may change. */
    buffer *row = new_buffer(c, "row", c->real, (int64_t)sizeof(ada_row_f64) / dtype_bytes(c->real), 99, 8);
    ada_row_f32 row_f32 = {(void *)o->data, (float)m, 1.5f, E};
    ada_row_f64 row_f64 = {(void *)o->data, m, 1.5, E};
    int64_t m_at, l_at;
    if (c->real == ADA_F32) {
        memcpy(row->data, &row_f32, sizeof row_f32);
        m_at = offsetof(ada_row_f32, m) / 4, l_at = offsetof(ada_row_f32, l) / 4;
    } else {
        memcpy(row->data, &row_f64, sizeof row_f64);
        m_at = offsetof(ada_row_f64, m) / 8, l_at = offsetof(ada_row_f64, l) / 8;
    }

    wide after = m;
    for (int j = 0; j < n; j++) {
        wide x = sum_of(c, values(s)[j], bias ? values(bias)[j] : 0);
        if (visible >> j & 1 && !hides(bias, j) && x > after) after = x;
    }
    weight w[ADA_BLOCK], factor = power(c, m - after, rounding(c, m - after));
    if (after == m) factor = (weight){GOOD, true, 1, 0, 0};
    for (int j = 0; j < n; j++) {
        wide x = sum_of(c, values(s)[j], bias ? values(bias)[j] : 0);
        w[j] = (weight){HIDDEN, false, 0, 0, 0};
        if (visible >> j & 1 && !hides(bias, j)) w[j] = weigh(c, x, 0, after, INFINITY);
        w[j].kept = keep >> j & 1;
    }
    weight l = factor;
    l.value *= 1.5, l.tolerance *= 1.5, l.exp2 *= 1.5;
    if (expect_weights(c, w, n, 1, s, 1, row, l_at, &l)) {
        expect_near(row, m_at, after, 0, 0);
        for (int e = 0; e < E && after > m; e++) expect_scaled(c, o, e, factor);
    } else {
        expect_any(row, m_at), expect_any(row, l_at);
        for (int e = 0; e < E; e++) expect_any(o, e);
    }
    c->bytes = 2.0 * n * s->bytes;
    RUN(c, c->result = CALL(c, row_weights, (void *)row->data, (void *)s->data, n, visible, DATA(bias), keep));
}

/* K or V of one head; a benchmark walks through more than the caches hold. */
enum { WALK_BYTES = 96 << 20 };
static matrix new_head(check *c, const char *name, int n, int width, int *blocks) {
    int block_bytes = n * width * dtype_bytes(c->element);
    *blocks = c->bench ? WALK_BYTES / block_bytes : 1;
    c->bytes = block_bytes;
    return new_rows(c, name, c->element, n * *blocks, width, true);
}

static void make_row_scores(check *c) {
    int n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK), D = pick_size(c, "D"), blocks;
    buffer *q = new_vector(c, "q", c->real, D), *s = new_buffer(c, "s", c->real, n, n, (size_t)dtype_bytes(c->real));
    matrix k = new_head(c, "k", n, D, &blocks);
    for (int j = 0; j < n && !c->bench; j++) {
        total t = {0};
        for (int d = 0; d < D; d++) add_product(&t, values(q)[d], values(k.b)[k.at + j * k.ld + d]);
        expect_total(c, s, j, &t);
    }
    RUN(c, CALL(c, row_scores, (void *)s->data, (void *)q->data,
                (char *)k.first + c->turn % blocks * n * D * k.b->bytes, k.ld, n, D));
}

static void make_row_values(check *c) {
    int n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK), E = pick_size(c, "E"), blocks;
    buffer *p = new_vector(c, "p", c->real, n), *o = new_vector(c, "o", c->real, E);
    matrix v = new_head(c, "v", n, E, &blocks);
    for (int e = 0; e < E && !c->bench; e++) {
        total t = {0};
        add_product(&t, 1, values(o)[e]);
        for (int j = 0; j < n; j++) add_product(&t, values(p)[j], values(v.b)[v.at + j * v.ld + e]);
        expect_total(c, o, e, &t);
    }
    RUN(c, CALL(c, row_values, (void *)o->data, (void *)p->data,
                (char *)v.first + c->turn % blocks * n * E * v.b->bytes, v.ld, n, E));
}

/* ---- conversions and dropout ---- */

enum { HALVES = 1 << 16, HALVES_CASES = 16, HALVES_STEP = HALVES / HALVES_CASES };

/* The first cases together hold all half-precision numbers. */
static void make_load_half(check *c) {
    int n = c->index < HALVES_CASES ? HALVES_STEP + integer(c, 0, 40) : pick(c, "n", 1, 100, 4096);
    buffer *from = new_buffer(c, "from", c->element, n, n, 2), *to = new_buffer(c, "to", ADA_F32, n, n, 4);
    for (int i = 0; i < n; i++) {
        uint16_t half = (uint16_t)(c->index < HALVES_CASES ? c->index * HALVES_STEP + i : (int)random_bits(c));
        set_bits(from, i, half);
        float x = (float)from_half(half, c->element);
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        /* A NaN of float16 becomes quiet, as the hardware's conversion does; bfloat16 is float cut in two. */
        if (isnan(x)) bits = (half & 0x8000u) << 16 | 0x7fc00000u | (half & 0x3ffu) << 13;
        if (c->element == ADA_BF16) bits = (uint32_t)half << 16;
        expect_bits(to, i, bits);
    }
    c->bytes = 6.0 * n;
    float *target = (float *)to->data;
    RUN(c, c->element == ADA_F16 ? CALL_AS(c, load_f16, target, (uint16_t *)from->data, n)
                                 : CALL_AS(c, load_bf16, target, (uint16_t *)from->data, n));
}

/* The first cases together hold all half-precision numbers, all ties between two neighbours and what lies directly
 * beside the ties; the others hold random bits. */
static void make_store_half(check *c) {
    bool ties = c->index < HALVES_CASES && !c->bench;
    int n = ties ? 4 * (HALVES_STEP + integer(c, 0, 9)) + integer(c, 0, 3) : pick(c, "n", 1, 20000, 4096);
    buffer *from = new_buffer(c, "from", ADA_F32, n, n, 4), *to = new_buffer(c, "to", c->element, n, n, 2);
    for (int i = 0; i < n; i++) {
        uint16_t half = (uint16_t)(c->index * HALVES_STEP + i / 4);
        wide low = from_half(half, c->element), high = from_half((uint16_t)(half + 1), c->element);
        if (isinf(high)) high = low + (low - from_half((uint16_t)(half - 1), c->element));
        float x = (float)(i % 4 ? (low + high) / 2 : low);
        if (i % 4 >= 2) x = nextafterf(x, i % 4 == 2 ? INFINITY : -INFINITY);
        if (ties) set(from, i, x);
        if (c->bench) set(from, i, uniform(c, -2, 2));
        expect_bits(to, i, to_half((float)value_at(from, i), c->element));
    }
    c->bytes = 6.0 * n;
    uint16_t *target = (uint16_t *)to->data;
    RUN(c, c->element == ADA_F16 ? CALL_AS(c, store_f16, target, (float *)from->data, n)
                                 : CALL_AS(c, store_bf16, target, (float *)from->data, n));
}

static uint32_t fmix32(uint32_t h) {
    h ^= h >> 16;
    h *= 0x85EBCA6B;
    h ^= h >> 13;
    h *= 0xC2B2AE35;
    h ^= h >> 16;
    return h;
}

static void make_dropout(check *c) {
    int n = pick(c, "n", 1, 64, 64);
    uint64_t state = random_bits(c), drop_below = random_bits(c) >> integer(c, 32, 63);
    if (chance(c, 0.2)) drop_below = chance(c, 0.5) ? 0 : UINT32_MAX;
    uint32_t first = (uint32_t)random_bits(c), a = (uint32_t)state, high = (uint32_t)(state >> 32);
    if (chance(c, 0.2)) first = UINT32_MAX - (uint32_t)integer(c, 0, 70);
    for (int j = 0; j < n; j++) {
        uint32_t bits = fmix32(fmix32((first + (uint32_t)j) * 0x9E3779B1 + a) ^ high);
        if (chance(c, 0.01)) drop_below = bits + (uint64_t)integer(c, 0, 1); /* keeps or just drops this one */
    }
    if (drop_below > UINT32_MAX) drop_below = UINT32_MAX;
    for (int j = 0; j < n; j++) {
        uint32_t bits = fmix32(fmix32((first + (uint32_t)j) * 0x9E3779B1 + a) ^ high);
        c->expected |= (uint64_t)(bits >= drop_below) << j;
    }
    RUN(c, c->result = CALL_AS(c, dropout, state, first, n, drop_below));
}

/* ---- the program ---- */

#define REALS(op, make) {#op "_f32", make, ADA_F32, ADA_F32}, {#op "_f64", make, ADA_F64, ADA_F64}
#define HALF(op, make) {#op "_f16", make, ADA_F32, ADA_F16}, {#op "_bf16", make, ADA_F32, ADA_BF16}
static const struct {
    const char *slot;
    void (*make)(check *);
    ada_dtype real, element;
} generators[] = {
    REALS(pack, make_pack),
    REALS(scores, make_scores),
    REALS(softcap, make_softcap),
    REALS(reference, make_reference),
    REALS(weights, make_weights),
    REALS(scores_weights, make_scores_weights),
    REALS(values, make_values),
    REALS(unpack, make_unpack),
    REALS(row_weights, make_row_weights),
    REALS(row_scores, make_row_scores),
    HALF(row_scores, make_row_scores),
    REALS(row_values, make_row_values),
    HALF(row_values, make_row_values),
    HALF(load, make_load_half),
    HALF(store, make_store_half),
    {"dropout", make_dropout, ADA_F32, ADA_F32},
};

static struct {
    const char *only, *isa;
    uint64_t seed;
    int cases;
    bool bench, list;
} options = {.seed = 1, .cases = 300};

static double fma_peak; /* flops per ns of float */
static check current;

static void crashed(int number) {
    const kernel *k = current.kernels[current.running < 0 ? 0 : current.running];
    dprintf(1, "%s %s: seed %llu, case %d (%s): %s: reads or writes beyond a buffer, or lacks its alignment\n", k->slot,
            k->isa, (unsigned long long)current.seed, current.index, current.shape, strsignal(number));
    _exit(1);
}

static void start_case(check *c, int index) {
    uint64_t state = c->seed * 0x9E3779B97F4A7C15u + (uint64_t)index;
    for (const char *s = c->kernels[0]->slot; *s; s++) state = state * 31 + (unsigned char)*s;
    c->random = state;
    c->random = random_bits(c);
    c->index = index;
    c->shape[0] = '\0';
    c->running = -1;
    c->expected = 0, c->any_result = false;
    c->flops = c->bytes = 0;
    c->style = c->bench || chance(c, 0.6) ? PLAIN : chance(c, 0.5) ? SCALES : SPECIALS;
    c->low = -20, c->high = 20;
    if (c->style == SPECIALS) c->low = uniform(c, -14, -3);
    if (c->style == SCALES && chance(c, 0.5)) {
        c->low = log2(c->limit.least);
        c->high = -log2(c->limit.normal) - (chance(c, 0.5) ? 1 : 20);
    }
}

static void print_bench(const check *c) {
    double scalar = 0;
    for (int i = 0; i < c->n_kernels; i++) {
        kernel *k = c->kernels[i];
        for (int a = 1; a < SAMPLES; a++)
            for (int b = a; b > 0 && k->ns[b - 1] > k->ns[b]; b--) {
                double t = k->ns[b];
                k->ns[b] = k->ns[b - 1], k->ns[b - 1] = t;
            }
        double ns = k->ns[SAMPLES / 2];
        if (i == 0) scalar = ns;
        if (options.isa && strcmp(options.isa, k->isa) != 0) continue;
        printf("%-18s %-8s %10.1f ns %7.1fx scalar", k->slot, k->isa, ns, scalar / ns);
        if (c->flops > 0)
            printf("  %6.1f GFLOP/s, %5.1f %% of peak", c->flops / ns,
                   100 * c->flops / ns / (c->real == ADA_F64 ? fma_peak / 2 : fma_peak));
        else if (c->bytes > 0)
            printf("  %6.1f GB/s", c->bytes / ns);
        puts("");
    }
}

/* One slot: all its kernels that this CPU can run. */
static void run_slot(check *c, void (*make)(check *)) {
    c->seed = options.seed;
    c->bench = options.bench;
    c->limit = c->real == ADA_F64 ? limits_f64 : limits_f32;
    for (int i = 0; i < (c->bench ? 1 : options.cases); i++) {
        start_case(c, i);
        make(c);
        free_buffers(c);
    }
    if (c->bench) print_bench(c);
}

static bool parse(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(name, "--bench") == 0) options.bench = true;
        else if (strcmp(name, "--list") == 0) options.list = true;
        else if (value && strcmp(name, "--only") == 0) options.only = value, i++;
        else if (value && strcmp(name, "--isa") == 0) options.isa = value, i++;
        else if (value && strcmp(name, "--seed") == 0) options.seed = strtoull(value, NULL, 0), i++;
        else if (value && strcmp(name, "--cases") == 0) options.cases = atoi(value), i++;
        else return false;
    }
    return true;
}

int main(int argc, char **argv) {
    if (!parse(argc, argv)) {
        fprintf(stderr, "usage: %s [--bench] [--list] [--only SLOT] [--isa NAME] [--seed N] [--cases N]\n", argv[0]);
        return 2;
    }
    signal(SIGSEGV, crashed);
    signal(SIGBUS, crashed);
    signal(SIGILL, crashed);
    const uint32_t isa = ada_cpu_isa();
    if (options.bench) {
        fma_peak = roofline_fma(1, 0.3) * 1e-9;
        printf("peak: %.1f GFLOP/s of float FMA, half of it for double\n", fma_peak);
    }
    static const char *const slots[] = {
#define SLOT(name) #name,
        ADA_SLOTS(SLOT)
#undef SLOT
    };
    int passed = 0, failed = 0;
    for (size_t s = 0; s < sizeof slots / sizeof *slots; s++) {
        if (options.only && strcmp(options.only, slots[s]) != 0) continue;
        current = (check){0};
        for (kernel *k = kernels; k < kernels + N_KERNELS; k++) {
            if (strcmp(k->slot, slots[s]) != 0) continue;
            if (options.list) printf("%-18s %-8s%s\n", k->slot, k->isa, k->needs & ~isa ? " (not on this CPU)" : "");
            /* The scalar kernel is what a benchmark compares with. */
            bool wanted = !options.isa || strcmp(k->isa, options.isa) == 0 || (options.bench && k->needs == 0);
            if (wanted && !(k->needs & ~isa) && current.n_kernels < MAX_KERNELS)
                current.kernels[current.n_kernels++] = k;
        }
        if (options.list || current.n_kernels == 0) continue;
        void (*make)(check *) = NULL;
        for (size_t g = 0; g < sizeof generators / sizeof *generators; g++)
            if (strcmp(generators[g].slot, slots[s]) == 0) {
                make = generators[g].make;
                current.real = generators[g].real, current.element = generators[g].element;
            }
        if (make) run_slot(&current, make);
        for (int i = 0; i < current.n_kernels && !options.bench; i++) {
            const kernel *k = current.kernels[i];
            bool good = make && !k->failed;
            printf("%-18s %-8s %s", k->slot, k->isa, good ? "ok" : make ? "FAILED" : "FAILED: no generator");
            if (good) printf("  largest error %.2f of its bound", k->worst);
            puts("");
            passed += good, failed += !good;
        }
    }
    if (options.list || options.bench) return 0;
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0 || passed == 0;
}
