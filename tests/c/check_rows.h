/* Generators of the slots for single queries, half formats and dropout; see check_tiles.h. */
#ifndef CHECK_ROWS_H
#define CHECK_ROWS_H

#include "check_tiles.h"

static void make_row_weights(check *c) {
    int n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK), E = pick_size(c, "E");
    uint64_t visible =
        c->bench || chance(c, 0.3) ? UINT64_MAX : random_bits(c) | (chance(c, 0.3) ? random_bits(c) : 0);
    uint64_t keep = c->bench || chance(c, 0.5) ? UINT64_MAX : random_bits(c);
    if (!c->bench && chance(c, 0.1)) visible = 0;
    if (c->style == SPECIALS) c->style = PLAIN;
    buffer *o = new_vector(c, "o", c->real, E), *s = new_vector(c, "s", c->real, n);
    buffer *bias = c->bench || chance(c, 0.5) ? NULL : new_vector(c, "bias", c->real, n);
    note(c, "bias", bias != NULL);
    double level = c->bench || chance(c, 0.3) ? 0 : uniform(c, -1000, 1000);
    double m = chance(c, 0.2) ? -INFINITY : rounded(c, chance(c, 0.2) ? 0 : level + uniform(c, -30, 30));
    for (int j = 0; j < n; j++) {
        set(s, j, level + octaves(c, true));
        if (!(visible >> j & 1) && chance(c, 0.3))
            set_special(c, bias && chance(c, 0.5) ? bias : s, j);
        else if (bias && chance(c, 0.05))
            set(bias, j, chance(c, 0.5) ? -INFINITY : -1e30);
    }
    if (!c->bench && chance(c, 0.3)) spoil(c, bias && chance(c, 0.5) ? bias : s, integer(c, 0, n - 1), level);

    /* The struct as a buffer of REAL: m and l are what a kernel may change. */
    buffer *row = new_buffer(c, "row", c->real, (int64_t)sizeof(ada_row_f64) / dtype_bytes(c->real), 99, 8);
    ada_row_f32 row_f32 = {data(o), (float)m, 1.5f, E};
    ada_row_f64 row_f64 = {data(o), m, 1.5, E};
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
    RUN(c, c->result = CALL(c, row_weights, data(row), data(s), n, visible, data(bias), keep));
}

/* K or V of one head; a benchmark walks through more than the caches hold. */
enum { WALK_BYTES = 96 << 20 };
static matrix new_head(check *c, const char *name, int n, int width, int *blocks) {
    int block_bytes = n * width * dtype_bytes(c->element);
    *blocks = c->bench ? WALK_BYTES / block_bytes : 1;
    c->bytes = block_bytes, c->walks = true;
    return new_rows(c, name, c->element, n * *blocks, width, true);
}

/* [rows][columns], `used` of each. */
static buffer *new_block(check *c, const char *name, int rows, int columns, int used) {
    buffer *b = new_buffer(c, name, c->real, (int64_t)rows * columns, columns, (size_t)dtype_bytes(c->real));
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < used; i++) put(c, b, r * columns + i);
    return b;
}

static void make_row_scores(check *c) {
    int rows = pick(c, "rows", 1, ADA_ROW_GROUP, 1), n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK), blocks;
    int D = pick_size(c, "D");
    buffer *q = new_block(c, "q", rows, D, D), *s = new_block(c, "s", rows, ADA_BLOCK, 0);
    matrix k = new_head(c, "k", n, D, &blocks);
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < n && !c->bench; j++) {
            total t = {0};
            for (int d = 0; d < D; d++)
                add_product(&t, values(q)[r * D + d], values(k.b)[k.at + j * k.ld + d]);
            expect_total(c, s, r * ADA_BLOCK + j, &t);
        }
    RUN(c, CALL(c, row_scores, data(s), data(q), rows,
                (char *)k.first + c->turn % blocks * n * D * k.b->bytes, k.ld, n, D));
}

static void make_row_values(check *c) {
    int rows = pick(c, "rows", 1, ADA_ROW_GROUP, 1), n = pick(c, "n", 1, ADA_BLOCK, ADA_BLOCK), blocks;
    int E = pick_size(c, "E"), ldo = E + pick(c, "gap", 0, 9, 0);
    buffer *p = new_block(c, "p", rows, ADA_BLOCK, n), *o = new_block(c, "o", rows, ldo, E);
    matrix v = new_head(c, "v", n, E, &blocks);
    for (int r = 0; r < rows; r++)
        for (int e = 0; e < E && !c->bench; e++) {
            total t = {0};
            add_product(&t, 1, values(o)[r * ldo + e]);
            for (int j = 0; j < n; j++)
                add_product(&t, values(p)[r * ADA_BLOCK + j], values(v.b)[v.at + j * v.ld + e]);
            expect_total(c, o, r * ldo + e, &t);
        }
    RUN(c, CALL(c, row_values, data(o), ldo, data(p), rows,
                (char *)v.first + c->turn % blocks * n * E * v.b->bytes, v.ld, n, E));
}

/* Where codes of n numbers (a multiple of 4) and so many lanes have number j of a lane. */
static int64_t code_at(int n, int lanes, int lane, int j) {
    const int first = lane / ADA_CODE_CHUNK * ADA_CODE_CHUNK;
    const int chunk = lanes - first < ADA_CODE_CHUNK ? lanes - first : ADA_CODE_CHUNK;
    return (int64_t)first * n + 4 * (j / 4 * chunk + lane - first) + j % 4;
}

static void make_code_products(check *c) {
    const int rows = pick(c, "rows", 1, ADA_ROW_GROUP, 1), n = 4 * pick(c, "groups", 1, 40, 16);
    const int lanes = 16 * pick(c, "vectors", 1, 9, 4), ldx = n + pick(c, "gap", 0, 9, 0);
    const int bytes = n * lanes, blocks = c->bench ? WALK_BYTES / bytes : 1;
    buffer *x = new_block(c, "x", rows, ldx, n), *s = new_block(c, "s", rows, lanes + 3, 0);
    buffer *codes = new_buffer(c, "codes", CHECK_U8, (int64_t)bytes * blocks, bytes, 1);
    for (int64_t i = 0; i < (int64_t)bytes * blocks; i++) set_bits(codes, i, random_bits(c) % 256);
    for (int r = 0; r < rows; r++) {
        const double size = chance(c, 0.1) ? 0 : exp2(integer(c, -110, 98));
        for (int j = 0; j < n; j++) set(x, r * ldx + j, chance(c, 0.1) ? 0 : size * uniform(c, -2, 2));
    }
    for (int r = 0; r < rows; r++) {
        wide top = 0;
        for (int j = 0; j < n; j++) top = fmaxl(top, fabsl(values(x)[r * ldx + j]));
        for (int i = 0; i < lanes && !c->bench; i++) {
            total t = {0};
            wide shares = 0;
            for (int j = 0; j < n; j++) {
                const wide code = (wide)bits_at(codes, code_at(n, lanes, i, j)) - 128;
                add_product(&t, values(x)[r * ldx + j], code);
                shares += fabsl(code);
            }
            expect_total(c, s, r * (lanes + 3) + i, &t);
            s->expected[r * (lanes + 3) + i].tolerance += (double)(0x1p-23L * top * shares) + 0x1p-80;
        }
    }
    c->bytes = bytes, c->walks = true;
    RUN(c, CALL_AS(c, code_products, (float *)data(s), lanes + 3, (float *)data(x), ldx, rows,
                   (uint8_t *)codes->data + c->turn % blocks * bytes, n, lanes));
}

/* The kernel of a slot of the ISA that is running. */
static function run_beside(const check *c, const char *slot);

static buffer *new_codes(check *c, int bytes, int *blocks) {
    *blocks = c->bench ? WALK_BYTES / bytes : 1;
    buffer *codes = new_buffer(c, "codes", CHECK_U8, (int64_t)bytes * *blocks, bytes, 1);
    for (int64_t i = 0; i < (int64_t)bytes * *blocks; i++) set_bits(codes, i, random_bits(c) % 256);
    c->bytes = bytes, c->walks = true;
    return codes;
}

/* page_rows has no other meaning than what page_scores make of its result. */
static void make_page_scores(check *c) {
    const int rows = pick(c, "rows", 1, ADA_ROW_GROUP, 1), D = pick_size(c, "D"), n = (D + 3) / 4 * 4;
    int blocks;
    buffer *x = new_block(c, "x", rows, D, D), *s = new_block(c, "s", rows, ADA_BLOCK, 0);
    buffer *centre = new_block(c, "centre", rows, ADA_BLOCK, 1),
           *codes = new_codes(c, n * ADA_BLOCK, &blocks);
    buffer *cut = new_buffer(c, "cut", CHECK_U8, rows * ADA_PAGE_ROW_BYTES(D), ADA_PAGE_ROW_BYTES(D), 64);
    const float scale = (float)exp2(uniform(c, -20, 4));
    const double size = chance(c, 0.1) ? 0 : exp2(integer(c, -60, 60));
    for (int i = 0; i < rows * D; i++) set(x, i, chance(c, 0.1) ? 0 : size * uniform(c, -2, 2));
    const int spoilt = !c->bench && chance(c, 0.1) ? integer(c, 0, rows - 1) : -1;
    if (spoilt >= 0) set(x, spoilt * D + integer(c, 0, D - 1), chance(c, 0.5) ? NAN : INFINITY);
    for (int r = 0; r < rows && !c->bench; r++) {
        wide top = 0;
        for (int d = 0; d < D; d++) top = fmaxl(top, fabsl(values(x)[r * D + d]));
        for (int j = 0; j < ADA_BLOCK; j++) {
            total t = {0};
            wide shares = 0;
            add_product(&t, 1, values(centre)[r * ADA_BLOCK]);
            for (int d = 0; d < D; d++) {
                const wide code = (wide)bits_at(codes, code_at(n, ADA_BLOCK, j, d)) - 128;
                add_product(&t, values(x)[r * D + d], code * (wide)scale);
                shares += fabsl(code);
            }
            const int at = r * ADA_BLOCK + j;
            if (r == spoilt) {
                expect(s, at, (expectation){.rule = NONFINITE});
                continue;
            }
            t.terms += 3; /* what scales the sum */
            expect_total(c, s, at, &t);
            s->expected[at].tolerance += (double)(0x1p-23L * top * shares * (wide)scale) + 0x1p-80;
        }
    }
    for (int64_t i = 0; i < rows * ADA_PAGE_ROW_BYTES(D); i++) expect_any(cut, i);
    RUN(c, {
        ((ada_page_rows_fn *)run_beside(c, "page_rows"))(cut->data, (float *)data(x), rows, D);
        ((ada_page_scores_fn *)run_beside(c, "page_scores"))(
            (float *)data(s), cut->data, rows, (uint8_t *)codes->data + c->turn % blocks * n * ADA_BLOCK, D,
            scale, (float *)data(centre));
    });
}

static void make_page_values(check *c) {
    const int rows = pick(c, "rows", 1, ADA_ROW_GROUP, 1), E = pick_size(c, "E"), lanes = (E + 15) / 16 * 16;
    const int ldo = E + pick(c, "gap", 0, 9, 0);
    int blocks;
    buffer *p = new_block(c, "p", rows, ADA_BLOCK, 0), *o = new_block(c, "o", rows, ldo, E);
    buffer *codes = new_codes(c, lanes * ADA_BLOCK, &blocks),
           *mean = new_buffer(c, "mean", ADA_BF16, E, E, 2);
    const float scale = (float)exp2(uniform(c, -20, 4));
    for (int i = 0; i < rows * ADA_BLOCK; i++) set(p, i, chance(c, 0.2) ? 0 : exp2(uniform(c, -30, 0)));
    for (int e = 0; e < E; e++) set(mean, e, uniform(c, -4, 4));
    for (int r = 0; r < rows && !c->bench; r++) {
        wide top = 0;
        for (int j = 0; j < ADA_BLOCK; j++) top = fmaxl(top, values(p)[r * ADA_BLOCK + j]);
        for (int e = 0; e < E; e++) {
            total t = {0};
            wide shares = 0;
            add_product(&t, 1, values(o)[r * ldo + e]);
            for (int j = 0; j < ADA_BLOCK; j++) {
                const wide code = (wide)bits_at(codes, code_at(ADA_BLOCK, lanes, e, j)) - 128;
                add_product(&t, values(p)[r * ADA_BLOCK + j], code * (wide)scale);
                add_product(&t, values(p)[r * ADA_BLOCK + j], values(mean)[e]);
                shares += fabsl(code);
            }
            expect_total(c, o, r * ldo + e, &t);
            o->expected[r * ldo + e].tolerance += (double)(0x1p-23L * top * shares * (wide)scale) + 0x1p-80;
        }
    }
    RUN(c, CALL_AS(c, page_values, (float *)data(o), ldo, (float *)data(p), rows,
                   (uint8_t *)codes->data + c->turn % blocks * lanes * ADA_BLOCK, E, scale,
                   (uint16_t *)mean->data));
}

/* ---- conversions and dropout ---- */

enum { HALVES = 1 << 16, HALVES_CASES = 16, HALVES_STEP = HALVES / HALVES_CASES };

/* The first cases together hold all half-precision numbers. */
static void make_load_half(check *c) {
    int n = c->index < HALVES_CASES ? HALVES_STEP + integer(c, 0, 40) : pick(c, "n", 1, 100, 4096);
    buffer *from = new_buffer(c, "from", c->element, n, n, 2), *to = new_buffer(c, "to", ADA_F32, n, n, 4);
    for (int i = 0; i < n; i++) {
        uint16_t half =
            (uint16_t)(c->index < HALVES_CASES ? c->index * HALVES_STEP + i : (int)random_bits(c));
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

/* The first cases together hold all half-precision numbers, all ties between two neighbours and what lies
 * directly beside the ties; the others hold random bits. */
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
        if (chance(c, 0.01))
            drop_below = bits + (uint64_t)integer(c, 0, 1); /* keeps or just drops this one */
    }
    if (drop_below > UINT32_MAX) drop_below = UINT32_MAX;
    for (int j = 0; j < n; j++) {
        uint32_t bits = fmix32(fmix32((first + (uint32_t)j) * 0x9E3779B1 + a) ^ high);
        c->expected |= (uint64_t)(bits >= drop_below) << j;
    }
    RUN(c, c->result = CALL_AS(c, dropout, state, first, n, drop_below));
}

#endif
