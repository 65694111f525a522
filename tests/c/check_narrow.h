/* Generators of the slots in kernels_narrow.h; see check_tiles.h. Where a kernel chooses the worth of its
 * integers, what it wrote is judged by what it stands for, right after the call.
 */
#ifndef CHECK_NARROW_H
#define CHECK_NARROW_H

#include "check_rows.h"

static void switch_units(const check *c, const char *slot);
#define CALL_IN_UNITS(c, call) (switch_units(c, "units_begin"), (call), switch_units(c, "units_end"))

static void make_units(check *c) { RUN(c, CALL_IN_UNITS(c, (void)0)); }

/* The operands of a case; e elements make a word of q and k, we of w. */
typedef struct {
    ada_narrow_tile t;
    ada_narrow_keys keys;
    buffer *q, *k, *p, *m, *l, *w, *unit, *offset, *sum, *worth, *scale, *start, *visible;
    int e, we, DW, n;
} narrow_case;

static int elements_of(ada_dtype dtype) { return dtype == CHECK_I8 || dtype == CHECK_U8 ? 4 : 2; }

static ada_parts pick_parts(check *c) {
    static const ada_parts all[] = {{1, 1, 1}, {2, 2, 2}, {3, 3, 3}, {2, 2, 3}, {3, 2, 3}, {1, 2, 2}};
    if (c->element != ADA_BF16) return all[0];
    ada_parts parts = all[c->bench ? 0 : integer(c, 0, 5)];
    note(c, "parts", parts.a * 100 + parts.b * 10 + parts.terms);
    return parts;
}

/* Words of a key; the matrix unit takes 16 at once. */
static int pick_words(check *c) {
    int words = chance(c, 0.6) ? 16 * integer(c, 1, 3) : integer(c, 1, 30);
    if (words % 16) c->without = ADA_ISA_AMX;
    if (c->bench) words = 128 / elements_of(c->element), c->without = 0;
    return note(c, "DW", words);
}

/* Floats of no more than 2^20, now and then far apart; part p of a number is 2^(8 p) times smaller. */
static double narrow_float(check *c, int part) {
    double x = uniform(c, -2, 2);
    if (c->style == SCALES) x *= exp2(uniform(c, -20, 20));
    if (chance(c, 0.02)) x = chance(c, 0.5) ? 0 : ldexp(x, -130); /* subnormal */
    return ldexp(x, -8 * part);
}

static buffer *new_floats(check *c, const char *name, int n) {
    buffer *b = new_buffer(c, name, ADA_F32, n, n, 64);
    for (int i = 0; i < n; i++) set(b, i, uniform(c, 0.1, 3));
    return b;
}

static buffer *new_elements(check *c, const char *name, ada_dtype dtype, int64_t count, int parts,
                            double most) {
    buffer *b = new_buffer(c, name, dtype, count, count, 64);
    for (int64_t i = 0; i < count; i++)
        set(b, i,
            dtype == ADA_BF16   ? narrow_float(c, (int)(i / (count / parts)))
            : dtype == CHECK_U8 ? integer(c, 0, (int)most)
                                : integer(c, -(int)most, (int)most));
    return b;
}

/* Queries, keys and what scores are made of; n keys. */
static void make_operands(check *c, narrow_case *s, int n, ada_parts parts) {
    if (c->style == SPECIALS) c->style = PLAIN;
    const ada_dtype dtype = c->element;
    const bool integers = dtype != ADA_BF16;
    s->n = n, s->e = elements_of(dtype), s->DW = pick_words(c);
    const int64_t words = (int64_t)s->DW * s->e, part = n * (int64_t)s->DW + 16 * integer(c, 0, 2);
    const double most =
        dtype == CHECK_I8 ? ADA_I8_MAX : fmin(ADA_I16_MAX, ADA_I16_NORM / sqrt((double)words) - 1);
    s->q = new_elements(c, "q", dtype == CHECK_I8 ? CHECK_U8 : dtype, parts.a * words * ADA_LANES, parts.a,
                        dtype == CHECK_I8 ? ADA_U8_MAX : most);
    s->k = new_elements(c, "k", dtype, parts.b * part * s->e, parts.b, most);
    s->unit = new_floats(c, "unit", ADA_LANES), s->offset = new_floats(c, "offset", ADA_LANES);
    const bool plain = !integers && chance(c, 0.5);
    const double size = dtype == CHECK_I8 ? 1e-3 : dtype == CHECK_I16 ? 1e-8 : 1;
    for (int i = 0; i < ADA_LANES; i++) {
        set(s->unit, i, plain ? 1 : (double)value_at(s->unit, i) * size);
        set(s->offset, i, plain ? 0 : uniform(c, -20, 20));
    }
    s->scale = integers ? new_floats(c, "scale", (n + ADA_BLOCK - 1) / ADA_BLOCK) : NULL;
    s->start = dtype == CHECK_I8 ? new_buffer(c, "start", CHECK_I32, n, n, 4) : NULL;
    for (int j = 0; s->start && j < n; j++) {
        double sum = 0;
        for (int x = 0; x < words; x++) sum += (double)value_at(s->k, j * words + x);
        set(s->start, j, -128 * sum);
    }
    s->t = (ada_narrow_tile){.q = data(s->q),
                             .unit = data(s->unit),
                             .offset = data(s->offset),
                             .DW = s->DW,
                             .qk = parts,
                             .pv = {1, 1, 1}};
    s->keys = (ada_narrow_keys){data(s->k), part, data(s->scale), data(s->start), NULL};
    c->flops = 2.0 * n * (double)words * ADA_LANES;
}

/* A number and how far off a kernel may be. */
typedef struct {
    double value, error;
} about;

/* A sum of products in double: its error there is nothing beside that in float. Subnormal operands may count
 * as zero. */
static void add_dot(about *sum, double *magnitude, const wide *a, ptrdiff_t step_a, const wide *b,
                    ptrdiff_t step_b, int words, int e) {
    for (int d = 0; d < words; d++, a += step_a, b += step_b)
        for (int x = 0; x < e; x++) {
            const double product = (double)a[x] * (double)b[x];
            sum->value += product;
            *magnitude += fabs(product);
            if (fabs((double)a[x]) < FLT_MIN || fabs((double)b[x]) < FLT_MIN) sum->error += fabs(product);
        }
}

static about score_of(const check *c, const narrow_case *s, int j, int i) {
    const ada_parts parts = s->t.qk;
    const wide *q = values(s->q) + i * s->e, *k = values(s->k) + (ptrdiff_t)j * s->DW * s->e;
    const double u = c->limit.unit;
    about sum = {0, 0};
    double magnitude = 0, unit = (double)values(s->unit)[i], offset = (double)values(s->offset)[i];
    int terms = 0;
    for (int a = 0; a < parts.a; a++)
        for (int b = 0; b < parts.b && a + b < parts.terms; b++, terms += s->DW * s->e)
            add_dot(&sum, &magnitude, q + (ptrdiff_t)a * s->DW * ADA_LANES * s->e, ADA_LANES * s->e,
                    k + b * s->keys.part * s->e, s->e, s->DW, s->e);
    if (s->scale) {
        sum = (about){sum.value + (s->start ? (double)values(s->start)[j] : 0), 0};
        sum.error = 2 * u * fabs(sum.value);
        unit *= (double)values(s->scale)[j / ADA_BLOCK];
    } else {
        sum.error += u * (terms + 1) * magnitude + c->limit.normal;
    }
    const double scaled = sum.value * unit;
    return (about){scaled + offset, sum.error * fabs(unit) + u * (3 * fabs(scaled) + 2 * fabs(offset))};
}

static void make_narrow_scores(check *c) {
    narrow_case s = {0};
    const int lanes = pick_lanes(c), n = ADA_KEY_STEP * pick(c, "n/16", 1, 4, 4);
    make_operands(c, &s, n, pick_parts(c));
    s.p = new_buffer(c, "p", ADA_F32, ADA_BLOCK * ADA_LANES, ADA_LANES, 64);
    s.t.f32.p = data(s.p), s.t.f32.lanes = lanes;
    for (int j = 0; j < n && !c->bench; j++)
        for (int i = 0; i < ADA_LANES; i++) {
            if (i >= lanes) {
                expect_any(s.p, j * ADA_LANES + i);
                continue;
            }
            const about x = score_of(c, &s, j, i);
            expect_near(s.p, j * ADA_LANES + i, x.value, x.error, 0);
        }
    RUN(c, CALL_IN_UNITS(c, CALL_AS(c, scores_bf16, &s.t, &s.keys, n)));
}

/* ---- weights as words ---- */

static float float_at(const buffer *b, int64_t i) {
    float x;
    memcpy(&x, b->data + i * 4, sizeof x);
    return x;
}

static int weight_in_words(const narrow_case *s, int j, int i) {
    const char *word = s->w->data + 4 * ((ptrdiff_t)(j / s->we) * ADA_LANES + i);
    int16_t half;
    if (s->we == 4) return (uint8_t)word[j % 4];
    memcpy(&half, word + 2 * (j % 2), sizeof half);
    return half;
}

/* Whether the integers of lane i, n of them, stand for the weights, each known to a relative error; finest
 * says how coarse worth may be, as a factor to the finest one that the format allows. */
static void judge_lane(check *c, const narrow_case *s, int n, int i, const about *weights, double coarse,
                       float sum_before) {
    const double worth = float_at(s->worth, i), most = s->we == 4 ? ADA_U8_MAX : ADA_I16_MAX;
    double largest = 0, total = 0, sum = 0;
    for (int j = 0; j < n; j++) {
        const int x = weight_in_words(s, j, i);
        const about weight = weights[j];
        largest = fmax(largest, weight.value + weight.error), total += weight.value + weight.error;
        sum += x;
        if (x < 0 || !(fabs(x * worth - weight.value) <=
                       weight.error + 0.5001 * worth + 1e-6 * weight.value + ADA_WEIGHTLESS))
            fail(c, "w of key %d, lane %d is %d times %g, expected %g within %g", j, i, x, worth,
                 weight.value, weight.error);
    }
    double finest = largest / most;
    if (s->we == 2) finest = fmax(finest, total / (ADA_I16_WEIGHT_SUM - 2 * ADA_STRIP));
    if (!(worth <= finest * coarse + ADA_WEIGHTLESS))
        fail(c, "worth[%d] is %g, expected at most %g", i, worth, finest * coarse);
    if (s->we == 2 && sum > ADA_I16_WEIGHT_SUM) fail(c, "lane %d of w sums to %.0f", i, sum);
    const double after = sum_before + sum * worth;
    if (!(fabs(float_at(s->sum, i) - after) <= 1e-6 * after + ADA_WEIGHTLESS))
        fail(c, "sum[%d] is %.9g, expected %.9g", i, float_at(s->sum, i), after);
}

static void judge_rounding(check *c, const narrow_case *s) {
    about weights[ADA_BLOCK];
    for (int i = 0; i < s->t.f32.lanes; i++) {
        for (int j = 0; j < ADA_BLOCK; j++)
            weights[j] = (about){j < s->n ? (double)values(s->p)[j * ADA_LANES + i] : 0, 0};
        judge_lane(c, s, ADA_BLOCK, i, weights, 1.0001, (float)values(s->sum)[i]);
        for (int j = s->n; j < ADA_BLOCK; j++)
            if (weight_in_words(s, j, i)) fail(c, "w of key %d, lane %d is not zero", j, i);
    }
}

/* Parts of weight j: bits, or nothing much. */
static double expect_parts(narrow_case *s, int j, int i, float p) {
    double sum = 0;
    for (int a = 0; a < s->t.pv.a; a++) {
        const int64_t at = ((int64_t)(a * (ADA_STRIP / 2) + j / 2) * ADA_LANES + i) * 2 + j % 2;
        const uint16_t bits = to_half(p, ADA_BF16);
        if (p != 0 && fabsf(p) <= ADA_WEIGHTLESS && a == 0) {
            for (; a < s->t.pv.a; a++)
                expect_near(s->w, at + (int64_t)a * ADA_STRIP * ADA_LANES, 0, 1.01 * ADA_WEIGHTLESS, 0);
            return 0;
        }
        expect_bits(s->w, at, bits);
        sum += (double)from_half(bits, ADA_BF16);
        p -= (float)from_half(bits, ADA_BF16);
    }
    return sum;
}

static void make_round(check *c) {
    narrow_case s = {.we = elements_of(c->element), .n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK)};
    const int lanes = pick_lanes(c), words = ADA_BLOCK / s.we * ADA_LANES * s.we;
    s.t.pv = pick_parts(c), s.t.f32.lanes = lanes;
    s.p = new_buffer(c, "p", ADA_F32, ADA_BLOCK * ADA_LANES, ADA_LANES, 64);
    s.sum = new_floats(c, "sum", ADA_LANES), s.worth = new_floats(c, "worth", ADA_LANES);
    const int64_t count = (int64_t)s.t.pv.a * ADA_STRIP * ADA_LANES;
    s.w = new_buffer(c, "w", c->element == CHECK_I8 ? CHECK_U8 : c->element, count, count, 64);
    for (int i = 0; i < lanes; i++) {
        const double level = chance(c, 0.1) ? uniform(c, -126, 60) : 0, spread = uniform(c, 0, 30);
        const bool nothing = chance(c, 0.05);
        double sum = (double)value_at(s.sum, i), total = sum;
        for (int j = 0; j < s.n; j++) {
            const double weight = exp2(fmax(level - uniform(c, 0, spread), -126));
            set(s.p, j * ADA_LANES + i, nothing || chance(c, 0.05) ? 0 : weight);
            if (c->element == ADA_BF16) sum += expect_parts(&s, j, i, float_at(s.p, j * ADA_LANES + i));
            total += weight;
        }
        for (int j = s.n; c->element == ADA_BF16 && j < ADA_BLOCK; j++) expect_parts(&s, j, i, 0);
        if (c->element == ADA_BF16) expect_near(s.sum, i, sum, 3 * (s.n + 2) * c->limit.unit * total, 0);
    }
    for (int i = 0; i < ADA_LANES; i++) {
        if (i >= lanes || c->element != ADA_BF16) expect_any(s.sum, i);
        if (c->element != ADA_BF16) expect_any(s.worth, i);
    }
    for (int at = 0; at < words; at++)
        for (int a = 0; a < s.t.pv.a; a++)
            if (at / s.we % ADA_LANES >= lanes || c->element != ADA_BF16)
                expect_any(s.w, (int64_t)a * ADA_STRIP * ADA_LANES + at);
    s.t.f32.p = data(s.p), s.t.sum = data(s.sum), s.t.worth = data(s.worth), s.t.w = data(s.w);
    const bool judged = c->element != ADA_BF16 && !c->bench;
    if (judged) values(s.p), values(s.sum);
    c->bytes = s.n * ADA_LANES * 4.0;
    RUN(c, {
        CALL_IN_UNITS(c, CALL_AS(c, round_bf16, &s.t, s.n));
        if (judged) judge_rounding(c, &s);
    });
}

/* ---- values ---- */

static void make_narrow_values(check *c) {
    narrow_case s = {.e = elements_of(c->element), .n = ADA_BLOCK * pick(c, "n/64", 1, 4, 4)};
    if (c->style == SPECIALS) c->style = PLAIN;
    const ada_dtype dtype = c->element;
    const int lanes = pick_lanes(c), row = ADA_STRIP / s.e, last = integer(c, 1, s.n);
    const int E = note(c, "E", c->bench ? 128 : chance(c, 0.3) ? 16 * integer(c, 1, 5) : integer(c, 1, 70));
    const int rows = (E + 15) / 16 * 16, o_rows = (E + 16) / 16 * 16;
    const ada_parts parts = pick_parts(c);
    const ptrdiff_t part = (ptrdiff_t)(rows + integer(c, 0, 3)) * row;
    buffer *o = new_strips(c, "o", o_rows, ADA_LANES);
    buffer *v = new_elements(c, "v", dtype, parts.b * part * s.e, parts.b,
                             dtype == CHECK_I8 ? ADA_I8_MAX : ADA_I16_VALUE_MAX);
    const double most = dtype == CHECK_I16 && chance(c, 0.5) ? ADA_I16_MAX : ADA_U8_MAX;
    s.w = new_elements(c, "w", dtype == CHECK_I8 ? CHECK_U8 : dtype, (int64_t)parts.a * ADA_STRIP * ADA_LANES,
                       parts.a, most);
    s.worth = new_floats(c, "worth", ADA_LANES);
    s.t = (ada_narrow_tile){.w = data(s.w), .worth = data(s.worth), .pv = parts};
    s.t.f32.o = data(o), s.t.f32.E = E, s.t.f32.lanes = lanes;
    for (int i = 0; i < ADA_LANES; i++) {
        double left = ADA_I16_WEIGHT_SUM;
        for (int a = 0; a < parts.a; a++)
            for (int j = 0; j < ADA_STRIP; j++) {
                const int64_t at =
                    ((int64_t)(a * (ADA_STRIP / s.e) + j / s.e) * ADA_LANES + i) * s.e + j % s.e;
                double x = (double)value_at(s.w, at);
                if (dtype == CHECK_I16) x = fmin(fabs(x), left), left -= x;
                set(s.w, at, j < last ? x : 0);
            }
        for (int e = E; e < o_rows; e++) set(o, e * ADA_LANES + i, e == E ? uniform(c, 1, 1e3) : 0);
    }
    for (int b = 0; b < parts.b; b++)
        for (int64_t at = (int64_t)E * row * s.e; at < (int64_t)rows * row * s.e; at++)
            set(v, b * part * s.e + at, 0);
    const wide *w = values(s.w), *x = values(v);
    for (int e = 0; e < E && !c->bench; e++)
        for (int i = 0; i < ADA_LANES; i++) {
            if (i >= lanes) {
                expect_any(o, e * ADA_LANES + i);
                continue;
            }
            about sum = {0, 0};
            double magnitude = 0, before = (double)values(o)[e * ADA_LANES + i], u = c->limit.unit;
            int terms = 0;
            for (int a = 0; a < parts.a; a++)
                for (int b = 0; b < parts.b && a + b < parts.terms; b++, terms += s.n)
                    add_dot(&sum, &magnitude, w + ((int64_t)a * (ADA_STRIP / s.e) * ADA_LANES + i) * s.e,
                            ADA_LANES * s.e, x + (b * part + (int64_t)e * row) * s.e, s.e, s.n / s.e, s.e);
            if (dtype != ADA_BF16) {
                sum.value *= (double)values(s.worth)[i];
                sum.error = 3 * u * fabs(sum.value) + 2 * u * fabs(before);
            } else {
                sum.error += u * (terms + 2) * (magnitude + fabs(before)) + c->limit.normal;
            }
            expect_near(o, e * ADA_LANES + i, before + sum.value, sum.error, 0);
        }
    for (int at = E * ADA_LANES; at < rows * ADA_LANES; at++) expect_near(o, at, values(o)[at], 0, 0);
    c->flops = 2.0 * s.n * E * ADA_LANES;
    RUN(c, CALL_IN_UNITS(c, CALL_AS(c, values_bf16, &s.t, data(v), part, s.n)));
}

/* ---- scores and weights in one ---- */

/* The relative error that a format's weights may have, rounding of bf16 included. */
static double weight_error(const check *c, bool integers) {
    if (!integers) return 8e-3;
    return c->element == CHECK_I16 ? 2e-6 : 1.1e-2;
}

static void judge_weights(check *c, narrow_case *s, const about *weights, bool integers) {
    if (!c->result) return;
    for (int i = 0; i < ADA_LANES; i++) {
        const about *lane = weights + (ptrdiff_t)i * ADA_STRIP;
        for (int j = 0; j < s->n; j++)
            if (!bit(s->visible, j, i) && weight_in_words(s, j, i))
                fail(c, "w of key %d, hidden from lane %d, is not zero", j, i);
        const float sum_before = (float)values(s->sum)[i], l_before = (float)values(s->l)[i];
        double l = l_before, error = 0, sum = sum_before;
        if (integers) judge_lane(c, s, s->n, i, lane, s->we == 4 ? 1.03 : 2.1, sum_before);
        for (int j = 0; j < s->n; j++) {
            l += lane[j].value, error += lane[j].error;
            if (integers) {
                error += 0.5 * float_at(s->worth, i);
                continue;
            }
            const int64_t at = ((int64_t)(j / 2) * ADA_LANES + i) * 2 + j % 2;
            uint16_t half;
            memcpy(&half, s->w->data + at * 2, sizeof half);
            const double x = (double)from_half(half, ADA_BF16);
            sum += x;
            if (!(fabs(x - lane[j].value) <= lane[j].error + ADA_WEIGHTLESS))
                fail(c, "w of key %d, lane %d is %g, expected %g within %g", j, i, x, lane[j].value,
                     lane[j].error);
        }
        if (!integers && !(fabs(float_at(s->sum, i) - sum) <= 1e-5 * sum))
            fail(c, "sum[%d] is %.9g, expected %.9g", i, float_at(s->sum, i), sum);
        if (!(fabs(float_at(s->l, i) - l) <= error + 1e-5 * l))
            fail(c, "l[%d] is %.9g, expected %.9g within %.3g", i, float_at(s->l, i), l, error);
    }
}

/* The weights of all keys, [ADA_LANES][ADA_STRIP]; whether the kernel must refuse them, or may. */
static void true_weights(check *c, const narrow_case *s, about *weights, double gap, double error) {
    c->expected = true;
    for (int i = 0; i < ADA_LANES; i++)
        for (int j = 0; j < s->n; j++) {
            weights[i * ADA_STRIP + j] = (about){0, 0};
            if (!bit(s->visible, j, i)) continue;
            const about x = score_of(c, s, j, i);
            const double m = (double)values(s->m)[i], y = x.value - m;
            const double apart = s->we == 4 ? fabs(x.value - (double)values(s->offset)[i]) : 0;
            const double off =
                x.error + 4 * c->limit.unit * (fabs(m) + fabs(x.value)) + ADA_I8_SCORE_ERROR * apart;
            weights[i * ADA_STRIP + j] = (about){exp2(y), exp2(y) * (error + off)};
            if (y - off > ADA_LAZY_OCTAVES + gap) c->expected = false;
            if (fabs(y - ADA_LAZY_OCTAVES) <= off + gap) c->any_result = true;
            const double far = fabs(m - (double)values(s->offset)[i]);
            if (s->we == 4 && far > ADA_FAR_OCTAVES * 0.9999) c->any_result = true;
        }
    for (int at = 0; s->we == 4 && at < ADA_LANES * s->n; at += ADA_BLOCK) {
        const double scale = (double)values(s->scale)[at % s->n / ADA_BLOCK];
        if (fabs((double)values(s->unit)[at / s->n] * scale) > 0.9999 / 64) c->any_result = true;
    }
    if (!c->expected) c->any_result = false;
}

/* A lane whose query is along a key, or against it with a negative unit, whose score is many octaves: what is
 * made of few bits has to hold sums as large as there are, in blocks of any scale. Returns the key. */
static int make_steep(check *c, const narrow_case *s, int lane) {
    const int key = integer(c, 0, s->n - 1), width = s->DW * s->e, less = chance(c, 0.3) ? 16 : 1;
    const int sign = chance(c, 0.5) ? 1 : -1;
    double sum = 0, scale = uniform(c, 0.1, 3) * exp2(-uniform(c, 0, 6));
    for (int x = 0; x < width; x++) {
        const int k = (int)value_at(s->k, (int64_t)key * width + x), q = k / less;
        set(s->q, ((int64_t)(x / s->e) * ADA_LANES + lane) * s->e + x % s->e, 128 + sign * q);
        sum += q * k;
    }
    double unit = exp2(chance(c, 0.8) ? uniform(c, 3, 11) : uniform(c, 0, 14)) / ((sum + 1) * scale);
    /* Just below a power of two. */
    if (chance(c, 0.3)) scale = 1, unit = (double)nextafterf((float)exp2(round(log2(unit))), 0);
    set(s->scale, key / ADA_BLOCK, scale);
    set(s->unit, lane, sign * unit);
    return key;
}

static void make_weigh(check *c) {
    narrow_case s = {0};
    const char *slot = c->kernels[0]->slot;
    const bool integers = strstr(slot, "_bf16") == NULL;
    about *weights = malloc(sizeof *weights * ADA_LANES * ADA_STRIP);
    make_operands(c, &s, ADA_BLOCK * pick(c, "n/64", 1, 4, 4), (ada_parts){1, 1, 1});
    s.p = new_buffer(c, "p", ADA_F32, ADA_STRIP * ADA_LANES, ADA_LANES, 64);
    s.m = new_floats(c, "m", ADA_LANES), s.l = new_floats(c, "l", ADA_LANES);
    s.sum = new_floats(c, "sum", ADA_LANES), s.worth = new_floats(c, "worth", ADA_LANES);
    s.we = integers ? s.e : 2;
    const int64_t count = (int64_t)ADA_STRIP * ADA_LANES;
    s.w = new_buffer(c, "w", s.we == 4 ? CHECK_U8 : CHECK_I16, count, count, 64);
    const int lane = integer(c, 0, ADA_LANES - 1);
    for (int i = 0; i < ADA_LANES; i++) {
        if (c->element == ADA_BF16) set(s.unit, i, 1 / ADA_BF16_STEPS);
        /* Sums reach 2^21: a few octaves from key to key, or every case would be refused. */
        if (c->element == CHECK_I8) set(s.unit, i, (double)value_at(s.unit, i) * 0.002);
    }
    const bool steep = !c->bench && c->element == CHECK_I8 && chance(c, 0.4);
    const int key = steep ? make_steep(c, &s, lane) : 0;
    for (int i = 0; i < ADA_LANES; i++) {
        const bool own = steep && i == lane && chance(c, 0.5);
        const double score = score_of(c, &s, own ? key : integer(c, 0, s.n - 1), i).value;
        set(s.m, i, score + uniform(c, -3, 20));
    }
    if (!c->bench && chance(c, 0.3)) set(s.m, lane, (double)value_at(s.m, lane) - exp2(uniform(c, 5, 40)));
    if (!c->bench && chance(c, 0.1)) set(s.m, lane, chance(c, 0.5) ? -INFINITY : -1e38);
    if (!c->bench && chance(c, 0.6)) s.visible = new_bits(c, "visible", s.n);
    note(c, "visible", s.visible != NULL), s.keys.visible = data(s.visible);
    for (int j = 0; s.visible && steep && j < s.n; j++)
        if (j / ADA_BLOCK != key / ADA_BLOCK) clear_bit(s.visible, j, lane);
    /* The lanes of a vector see no key from some on, as on a diagonal. */
    for (int i = 0; s.visible && i < ADA_LANES; i += 16) {
        const int first = chance(c, 0.3) ? integer(c, 0, s.n) : s.n;
        for (int j = first; j < s.n; j++)
            for (int lane = i; lane < i + 16; lane++) clear_bit(s.visible, j, lane);
    }
    for (int i = 0; s.visible && i < ADA_LANES; i++) {
        if (!chance(c, 0.1)) continue;
        for (int j = 0; j < s.n; j++) clear_bit(s.visible, j, i);
        if (chance(c, 0.7)) set(s.m, i, -INFINITY);
    }
    s.t.f32 = (ada_tile_f32){.p = data(s.p), .m = data(s.m), .l = data(s.l), .lanes = ADA_LANES};
    s.t.w = data(s.w), s.t.sum = data(s.sum), s.t.worth = data(s.worth);
    /* What few bits cut off is put back as it is on average, not in each block. */
    true_weights(c, &s, weights, 0.02, weight_error(c, integers) + (steep && integers ? 3e-3 : 0));
    for (int64_t at = 0; at < s.p->count; at++) expect_any(s.p, at);
    for (int64_t at = 0; at < (int64_t)s.n * ADA_LANES; at++) expect_any(s.w, at);
    for (int i = 0; i < ADA_LANES; i++) {
        expect_any(s.worth, i);
        if (c->expected || c->any_result) expect_any(s.l, i), expect_any(s.sum, i);
    }
    values(s.sum), values(s.l);
    RUN(c, {
        CALL_IN_UNITS(c, c->result = CALL_AS(c, weigh_bf16_bf16, &s.t, &s.keys, s.n));
        if (!c->bench) judge_weights(c, &s, weights, integers);
    });
    free(weights);
}

/* ---- what weights come to in a block ---- */

static void make_gauge(check *c) {
    narrow_case s = {.we = elements_of(c->element), .n = ADA_BLOCK * pick(c, "n/64", 1, 4, 4)};
    const int blocks = s.n / ADA_BLOCK;
    const bool bytes = c->element == CHECK_I8, integers = c->element != ADA_BF16;
    const double u = c->limit.unit, largest = c->element == CHECK_I16 ? ADA_I16_MAX : ADA_U8_MAX;
    s.w = new_buffer(c, "w", bytes ? CHECK_U8 : c->element, (int64_t)s.n * ADA_LANES, s.n * ADA_LANES, 64);
    s.worth = new_floats(c, "worth", ADA_LANES);
    buffer *reach = new_floats(c, "reach", blocks), *mass = new_floats(c, "mass", blocks * ADA_LANES);
    buffer *spread = new_floats(c, "spread", blocks * ADA_LANES);
    for (int64_t at = 0; at < (int64_t)s.n * ADA_LANES; at++) {
        const double x = chance(c, 0.2) ? 0 : exp2(-uniform(c, 0, 8)) * largest;
        set(s.w, at, integers ? floor(x) : x);
    }
    const wide *w = values(s.w);
    for (int b = 0; b < blocks && !c->bench; b++)
        for (int i = 0; i < ADA_LANES; i++) {
            double sum = 0, least = 0, most = 0;
            for (int j = b * ADA_BLOCK; j < (b + 1) * ADA_BLOCK; j++) {
                const double x = (double)w[((int64_t)(j / s.we) * ADA_LANES + i) * s.we + j % s.we];
                sum += x;
                least += bytes ? x * fmin(x, 254) : x * x, most += bytes ? x * (x + fmod(x, 2)) : x * x;
            }
            const double worth = integers ? (double)values(s.worth)[i] : 1, off = 200 * u * most;
            const double even = sum * sum / ADA_BLOCK, r = (double)values(reach)[b] * worth;
            const double low = r * sqrt(fmax(least - even - off, 0)),
                         high = r * sqrt(fmax(most - even + off, 0));
            expect_near(mass, b * ADA_LANES + i, sum * worth, 100 * u * sum * worth, 0);
            expect_near(spread, b * ADA_LANES + i, (low + high) / 2, (high - low) / 2 + 8 * u * high, 0);
        }
    s.t = (ada_narrow_tile){.w = data(s.w), .worth = data(s.worth)};
    c->bytes = (double)s.n * ADA_LANES * 4 / s.we;
    RUN(c, CALL_IN_UNITS(c, CALL_AS(c, gauge_bf16, &s.t, s.n, data(reach), data(mass), data(spread))));
}

/* ---- packing ---- */

static void make_encode(check *c) {
    const ada_dtype dtype = c->element;
    const int n = pick(c, "n", 1, 5, 64), width = pick_size(c, "width");
    const int parts = dtype == ADA_BF16 ? pick(c, "parts", 1, 3, 1) : 1, ldt = width + integer(c, 0, 9);
    const ptrdiff_t part = (ptrdiff_t)n * ldt + integer(c, 0, 20);
    if (c->style == SPECIALS) c->style = PLAIN;
    matrix rows = new_rows(c, "rows", ADA_F32, n, width, true);
    buffer *to = new_buffer(c, "to", dtype, parts * part, parts * part, 2);
    buffer *less = chance(c, 0.5) ? NULL : new_vector(c, "less", ADA_F32, width);
    const bool by_row = note(c, "by_row", chance(c, 0.5));
    buffer *factor = new_vector(c, "factor", ADA_F32, by_row ? n : width);
    const double most = dtype == CHECK_I8 ? ADA_I8_MAX : ADA_I16_MAX;
    for (int i = 0; i < (by_row ? n : width); i++)
        set(factor, i, dtype == ADA_BF16 ? exp2(integer(c, -5, 5)) : uniform(c, -0.6, 0.6) * most);
    for (int r = 0; r < n; r++)
        for (int i = 0; i < width; i++) {
            const float x = (float)values(rows.b)[rows.at + r * rows.ld + i];
            volatile float rest = x - (less ? (float)values(less)[i] : 0);
            rest *= (float)values(factor)[by_row ? r : i];
            for (int a = 0; a < parts; a++) {
                const int64_t at = a * part + (int64_t)r * ldt + i;
                const uint16_t bits = to_half(rest, ADA_BF16);
                const double whole = fmax(-most, fmin(most, rest));
                if (dtype == ADA_BF16 && rest != 0 && fabsf(rest) < FLT_MIN)
                    expect_near(to, at, 0, FLT_MIN, 0);
                else if (dtype == ADA_BF16)
                    expect_bits(to, at, bits);
                else
                    expect_near(to, at, whole, 0.5, 0);
                rest -= (float)from_half(bits, ADA_BF16);
            }
        }
    c->bytes = 4.0 * n * width;
    if (dtype == ADA_BF16)
        RUN(c, CALL_AS(c, encode_bf16, data(to), ldt, part, parts, rows.first, rows.ld, n, width, data(less),
                       data(factor), by_row));
    else
        RUN(c, CALL_AS(c, encode_i8, data(to), ldt, rows.first, rows.ld, n, width, data(less), data(factor),
                       by_row));
}

static void make_pair(check *c) {
    const int64_t count = ADA_LANES * ADA_BLOCK;
    if (c->style == SPECIALS) c->style = PLAIN;
    buffer *rows = new_buffer(c, "rows", ADA_F32, count, ADA_BLOCK, 64);
    buffer *to = new_buffer(c, "to", CHECK_I32, count / 2, ADA_BLOCK, 64);
    for (int64_t at = 0; at < count; at++) set(rows, at, uniform(c, -2, 2) * exp2(integer(c, -60, 60)));
    for (int64_t at = 0; at < count / 2; at++) {
        const int64_t low = at / ADA_BLOCK * 2 * ADA_BLOCK + at % ADA_BLOCK;
        const uint32_t first = to_half((float)value_at(rows, low), ADA_BF16);
        const uint32_t second = to_half((float)value_at(rows, low + ADA_BLOCK), ADA_BF16);
        expect_bits(to, at, first | second << 16);
    }
    c->bytes = 6.0 * (double)count;
    RUN(c, CALL_AS(c, pair_bf16, (uint32_t *)to->data, (float *)rows->data));
}

static void make_turn(check *c) {
    const int size = dtype_bytes(c->element);
    const int rows = 64 / size * pick(c, "rows/64", 1, 3, 4), columns = pick(c, "columns", 1, 70, 128);
    const int whole = (columns + 15) / 16 * 16;
    const int ldf = whole + (chance(c, 0.5) ? 0 : integer(c, 1, 9)),
              ldt = rows + 64 / size * integer(c, 0, 2);
    buffer *from = new_buffer(c, "from", c->element, (int64_t)(rows - 1) * ldf + whole, ldf, 64);
    buffer *to = new_buffer(c, "to", c->element, (int64_t)(whole - 1) * ldt + rows, ldt, 64);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < whole; i++) {
            const int64_t at = (int64_t)i * ldt + r;
            if (i < columns)
                expect_bits(to, at, bits_at(from, (int64_t)r * ldf + i));
            else
                expect_any(to, at);
        }
    c->bytes = 2.0 * rows * columns * size;
    RUN(c, CALL_AS(c, turn_8, data(to), ldt, data(from), ldf, rows, columns));
}

static void make_columns(check *c) {
    const int n = pick(c, "n", 1, 20, 64), width = pick_size(c, "width");
    matrix rows = new_rows(c, "rows", ADA_F32, n, width, true);
    buffer *sum = new_vector(c, "sum", ADA_F32, width), *largest = new_vector(c, "largest", ADA_F32, width);
    for (int i = 0; i < width; i++) set(largest, i, fabs((double)value_at(largest, i)));
    for (int i = 0; i < width; i++) {
        total t = {0};
        wide most = values(largest)[i];
        add_product(&t, 1, values(sum)[i]);
        for (int r = 0; r < n; r++) {
            const wide x = values(rows.b)[rows.at + r * rows.ld + i];
            add_product(&t, 1, x);
            if (isnan(x) || fabsl(x) > most) most = fabsl(x);
        }
        expect_total(c, sum, i, &t);
        expect_near(largest, i, most, 0, 0);
    }
    free(largest->values), largest->values = NULL;
    c->bytes = 4.0 * n * width;
    RUN(c, CALL_AS(c, columns, data(sum), data(largest), rows.first, rows.ld, n, width));
}

static void judge_reach(check *c, float reach, float *norm2_found, wide largest, wide norm2, int width) {
    if (isnan(largest) ? !isnan(reach) : reach != largest)
        fail(c, "largest is %.9g, expected %.9Lg", reach, largest);
    const wide error = norm2 * c->limit.unit * (width + 3) + c->limit.least * width;
    if (norm2_found && !isnan(largest) && norm2 + error <= FLT_MAX && !(fabsl(*norm2_found - norm2) <= error))
        fail(c, "norm2 is %.9g, expected %.9Lg", *norm2_found, norm2);
}

/* The largest |x - less| of row r, NaN where one is, and the sum of squares. */
static void reach_of_row(const matrix *rows, buffer *less, int r, int width, wide *largest, wide *norm2) {
    *largest = *norm2 = 0;
    for (int i = 0; i < width; i++) {
        const float before = less ? (float)values(less)[i] : 0;
        const float x = (float)values(rows->b)[rows->at + r * rows->ld + i] - before;
        if (isnan(x) || fabsf(x) > *largest) *largest = fabsf(x);
        *norm2 += (wide)x * x;
    }
}

static void make_row_reach(check *c) {
    enum { MOST = 64 };
    const int n = pick(c, "n", 1, 10, MOST), width = pick_size(c, "width");
    matrix rows = new_rows(c, "rows", ADA_F32, n, width, true);
    buffer *less = chance(c, 0.5) ? NULL : new_vector(c, "less", ADA_F32, width);
    wide largest[MOST], norm2[MOST];
    float found[MOST], found2[MOST];
    for (int r = 0; r < n; r++) reach_of_row(&rows, less, r, width, &largest[r], &norm2[r]);
    c->bytes = 4.0 * n * width;
    RUN(c, {
        CALL_AS(c, row_reach, found, found2, rows.first, rows.ld, n, width, data(less));
        for (int r = 0; r < n; r++) judge_reach(c, found[r], &found2[r], largest[r], norm2[r], width);
    });
}

static void make_reach(check *c) {
    const int n = pick(c, "n", 1, 10, 64), width = pick_size(c, "width");
    matrix rows = new_rows(c, "rows", ADA_F32, n, width, true);
    buffer *less = chance(c, 0.5) ? NULL : new_vector(c, "less", ADA_F32, width);
    wide largest = 0, norm2 = 0;
    for (int r = 0; r < n; r++) {
        wide most, sum;
        reach_of_row(&rows, less, r, width, &most, &sum);
        if (isnan((double)most) || most > largest) largest = most;
        if (sum > norm2) norm2 = sum;
    }
    c->bytes = 4.0 * n * width;
    float found, *wanted = chance(c, 0.5) ? &found : NULL;
    RUN(c, judge_reach(c, CALL_AS(c, reach, rows.first, rows.ld, n, width, data(less), wanted), wanted,
                       largest, norm2, width));
}

static void make_stand_in(check *c) {
    buffer *sum = new_floats(c, "sum", ADA_LANES), *apart = new_floats(c, "apart", ADA_LANES);
    buffer *x = new_floats(c, "x", ADA_LANES), *weight = new_floats(c, "weight", ADA_LANES);
    const float joint = (float)uniform(c, 0, 1);
    double total = 0;
    for (int i = 0; i < ADA_LANES; i++) {
        const double add = (double)value_at(x, i), s = (double)value_at(sum, i) + add;
        const double a = (double)value_at(apart, i) + add * add;
        expect_near(sum, i, s, 2 * c->limit.unit * s, 0);
        expect_near(apart, i, a, 3 * c->limit.unit * a, 0);
        total += (double)value_at(weight, i) * ((1 - (double)joint) * a + (double)joint * s * s);
    }
    c->bytes = 4.0 * 4 * ADA_LANES;
    RUN(c, {
        const double found =
            (double)CALL_AS(c, stand_in, data(sum), data(apart), data(x), data(weight), joint);
        if (!c->bench && fabs(found - total) > 50 * c->limit.unit * total)
            fail(c, "returned %.9g, expected %.9g", found, total);
    });
}

static void make_row_sums(check *c) {
    enum { P2D, P2D_NORM, P2D_STEP, P2, P2_NORM, P2_STEP, P2V, PV, ROUND8, ROUND16, DROPPED, PLOG, SUMS };
    buffer *sums = new_floats(c, "sums", SUMS * ADA_PARTS), *p = new_floats(c, "p", ADA_BLOCK);
    buffer *dots = new_floats(c, "dots", ADA_BLOCK), *norm2 = new_floats(c, "norm2", ADA_BLOCK);
    buffer *value2 = new_floats(c, "value2", ADA_BLOCK);
    const float out2 = (float)uniform(c, 0, 3), step = (float)uniform(c, 0, 2);
    const float var8 = (float)uniform(c, 0, 1), var16 = (float)uniform(c, 0, 0.1);
    double mass = 0, found[SUMS][ADA_PARTS];
    for (int i = 0; i < SUMS * ADA_PARTS; i++)
        found[i / ADA_PARTS][i % ADA_PARTS] = (double)value_at(sums, i);
    for (int j = 0; j < ADA_BLOCK; j++) {
        if (chance(c, 0.1)) set(p, j, 0);
        const int i = j % ADA_PARTS;
        const float weight = value_at(p, j), square = weight * weight;
        const double w = (double)weight, w2 = w * w, n = (double)value_at(norm2, j);
        const double v = (double)value_at(value2, j);
        const double d = fmax(v - 2 * (double)value_at(dots, j) + (double)out2, 0);
        found[P2D][i] += w2 * d, found[P2][i] += w2;
        found[P2D_NORM][i] += w2 * d * n, found[P2_NORM][i] += w2 * n;
        found[P2D_STEP][i] += w2 * d * (double)step, found[P2_STEP][i] += w2 * (double)step;
        found[P2V][i] += w2 * v, found[PV][i] += w * v;
        found[ROUND8][i] += fmin(w2, (double)var8) * d, found[ROUND16][i] += fmin(w2, (double)var16) * d;
        found[DROPPED][i] += square < 3 * var8 ? w : 0;
        found[PLOG][i] += w > 0 ? w * log2(w) : 0;
        mass += w;
    }
    for (int i = 0; i < SUMS * ADA_PARTS; i++)
        expect_near(sums, i, found[i / ADA_PARTS][i % ADA_PARTS], i / ADA_PARTS == PLOG ? 0.02 : 2e-4, 0);
    c->bytes = 4.0 * 4 * ADA_BLOCK;
    RUN(c, {
        const double total = (double)CALL_AS(c, row_sums, data(sums), data(p), data(dots), data(norm2),
                                             data(value2), out2, step, var8, var16);
        if (!c->bench && fabs(total - mass) > 1e-5 * mass)
            fail(c, "returned %.9g, expected %.9g", total, mass);
    });
}

static void make_squares(check *c) {
    const int n = pick(c, "n", 1, 10, 64), width = pick_size(c, "width");
    matrix rows = new_rows(c, "rows", ADA_F32, n, width, true);
    buffer *less = chance(c, 0.5) ? NULL : new_vector(c, "less", ADA_F32, width);
    buffer *weight = chance(c, 0.5) ? NULL : new_vector(c, "weight", ADA_F32, width);
    buffer *square = chance(c, 0.5) ? NULL : new_vector(c, "square", ADA_F32, width);
    buffer *norm2 = new_buffer(c, "norm2", ADA_F32, n, n, 4);
    total *columns = calloc((size_t)width, sizeof *columns);
    bool *beyond = calloc((size_t)width, sizeof *beyond); /* a square that float cannot hold */
    for (int i = 0; square && i < width; i++) add_product(&columns[i], 1, values(square)[i]);
    for (int r = 0; r < n; r++) {
        total t = {.terms = 2}; /* a square and its weighing round too */
        bool any = false;
        for (int i = 0; i < width; i++) {
            const float x =
                (float)values(rows.b)[rows.at + r * rows.ld + i] - (less ? (float)values(less)[i] : 0);
            const bool bad = !(fabsf(x) < 1e18f) || (x != 0 && fabsf(x) < 1e-18f);
            any |= bad, beyond[i] |= bad;
            add_product(&t, weight ? values(weight)[i] : 1, (wide)x * x);
            add_product(&columns[i], x, x);
        }
        if (any)
            expect_any(norm2, r);
        else
            expect_total(c, norm2, r, &t);
    }
    for (int i = 0; square && i < width; i++) {
        columns[i].terms++;
        if (beyond[i])
            expect_any(square, i);
        else
            expect_total(c, square, i, &columns[i]);
    }
    free(columns), free(beyond);
    if (square) free(square->values), square->values = NULL;
    c->bytes = 4.0 * n * width;
    RUN(c, CALL_AS(c, squares, data(norm2), data(square), rows.first, rows.ld, n, width, data(less),
                   data(weight)));
}

static void make_scale_channels(check *c) {
    const int E = pick_size(c, "E");
    buffer *o = new_buffer(c, "o", ADA_F32, E * ADA_LANES, ADA_LANES, 64);
    buffer *unit = new_vector(c, "unit", ADA_F32, E);
    for (int e = 0; e < E; e++)
        for (int i = 0; i < ADA_LANES; i++) {
            const int at = e * ADA_LANES + i;
            total t = {0};
            add_product(&t, values(o)[at], values(unit)[e]);
            expect_total(c, o, at, &t);
        }
    const ada_tile_f32 tile = {.o = data(o), .E = E};
    c->bytes = 8.0 * E * ADA_LANES;
    RUN(c, CALL_AS(c, scale_channels, &tile, data(unit)));
}

#endif
