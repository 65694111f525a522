/* Kernels of narrow operands on the matrix unit; AVX-512 does the softmax beside it.
 *
 * Scores are A = 16 keys x 64 bytes of K times B = 16 words x 16 lanes of q, sums of values A = 16 rows of V
 * transposed x 64 bytes times B = 16 words x 16 lanes of w. A block of two tiles by two needs one load per
 * product: tiles 0 ... 3 are its sums, row by row, 4 and 5 the tiles of A, 6 and 7 those of B.
 */
#define REAL float
#define REAL_BITS 32
#include "kernel.h"
#include "simd_avx512.h"

#include "amx.h"

#define SIDE 32             /* rows and lanes of a block */
#define ROW (ADA_LANES * 4) /* bytes from one row of lanes to the next */
#define STEP_B (16 * ROW)   /* from one tile of B to the next down the sum */

void ada_units_begin_amx(void) { TILES_BEGIN(); }
void ada_units_end_amx(void) { TILES_END(); }

/* ---- products ---- */

/* What a block's sums run over; tall and wide blocks have two tiles down and across. */
typedef struct {
    const char *a, *b;
    ptrdiff_t row; /* bytes from one row of a to the next */
    int steps;     /* of 64 bytes */
    bool bytes;    /* 8-bit integers, not bf16 */
    bool tall, wide;
} block;

#define PRODUCT(x, c, a, b)                                                                                  \
    do {                                                                                                     \
        if ((x)->bytes)                                                                                      \
            TILE_PRODUCT_I8(c, a, b);                                                                        \
        else                                                                                                 \
            TILE_PRODUCT_BF16(c, a, b);                                                                      \
    } while (0)

INLINE void add_products(const block *x, int first) {
    const char *a = x->a + 64 * first, *b = x->b + (ptrdiff_t)STEP_B * first;
    for (int s = first; s < x->steps; s++, a += 64, b += STEP_B) {
        TILE_STREAM(4, a, x->row);
        TILE_LOAD(6, b, ROW);
        PRODUCT(x, 0, 4, 6);
        if (x->wide) {
            TILE_LOAD(7, b + 64, ROW);
            PRODUCT(x, 1, 4, 7);
        }
        if (!x->tall) continue;
        TILE_STREAM(5, a + 16 * x->row, x->row);
        PRODUCT(x, 2, 5, 6);
        if (x->wide) PRODUCT(x, 3, 5, 7);
    }
}

INLINE void zero_block(void) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
}

INLINE void load_block(const block *x, const float *c) {
    TILE_LOAD(0, c, ROW);
    if (x->wide) TILE_LOAD(1, c + 16, ROW);
    if (x->tall) TILE_LOAD(2, c + 16 * ADA_LANES, ROW);
    if (x->tall && x->wide) TILE_LOAD(3, c + 16 * ADA_LANES + 16, ROW);
}

INLINE void store_block(const block *x, float *c) {
    TILE_STORE(0, c, ROW);
    if (x->wide) TILE_STORE(1, c + 16, ROW);
    if (x->tall) TILE_STORE(2, c + 16 * ADA_LANES, ROW);
    if (x->tall && x->wide) TILE_STORE(3, c + 16 * ADA_LANES + 16, ROW);
}

/* Adds the products of all pairs of parts, the smallest first; A has the parts b, B the parts a. */
INLINE void add_parts(const block *x, ada_parts parts, ptrdiff_t part_a, ptrdiff_t part_b) {
    for (int both = parts.terms - 1; both >= 0; both--)
        for (int a = both < parts.a ? both : parts.a - 1; a >= 0 && both - a < parts.b; a--) {
            block y = *x;
            y.a += (both - a) * part_a, y.b += a * part_b;
            add_products(&y, 0);
        }
}

/* ---- scores ---- */

INLINE void raw_scores(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, bool bytes) {
    const ptrdiff_t row = (ptrdiff_t)t->DW * 4;
    for (int j = 0; j < n; j += SIDE)
        for (int i = 0; i < t->f32.lanes; i += SIDE) {
            const block x = {(const char *)keys->k + j * row,
                             (const char *)(t->q + i),
                             row,
                             t->DW / 16,
                             bytes,
                             j + 16 < n,
                             i + 16 < t->f32.lanes};
            zero_block();
            if (bytes)
                add_products(&x, 0);
            else
                add_parts(&x, t->qk, keys->part * 4, (ptrdiff_t)t->DW * ROW);
            store_block(&x, t->f32.p + j * ADA_LANES + i);
        }
}

void ada_scores_bf16_amx(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    raw_scores(t, keys, n, false);
    for (float *p = t->f32.p; p < t->f32.p + n * ADA_LANES; p += ADA_LANES)
        for (int i = 0; i < t->f32.lanes; i += VL)
            v_store(p + i, v_fma(v_load(p + i), v_load(t->unit + i), v_load(t->offset + i)));
}

INLINE vec integer_sums(const float *p, int32_t start) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(p), _mm512_set1_epi32(start)));
}

void ada_scores_i8_amx(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    raw_scores(t, keys, n, true);
    vec unit[ADA_LANES / VL];
    for (int v = 0; v < ADA_LANES / VL; v++)
        unit[v] = v_mul(v_load(t->unit + v * VL), v_set1(keys->scale[0]));
    for (int j = 0; j < n; j++)
        for (int i = 0; i < t->f32.lanes; i += VL) {
            float *p = t->f32.p + j * ADA_LANES + i;
            v_store(p, v_fma(integer_sums(p, keys->start[j]), unit[i / VL], v_load(t->offset + i)));
        }
}

/* ---- values ---- */

/* o += sum * worth over a block. */
INLINE void add_block(const block *x, float *o, const float *sum, bool integers, const float *worth) {
    for (int r = 0; r < (x->tall ? SIDE : 16); r++, o += ADA_LANES, sum += ADA_LANES)
        for (int i = 0; i < (x->wide ? SIDE : 16); i += VL) {
            const vec before = v_load(o + i);
            v_store(o + i, integers ? v_fma(integer_sums(sum + i, 0), v_load(worth + i), before)
                                    : v_add(before, v_load(sum + i)));
        }
}

INLINE void add_values(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n, bool bytes) {
    const int elements = bytes ? 4 : 2, rows = (t->f32.E + 15) / 16 * 16;
    const ptrdiff_t row = ADA_STRIP / elements * 4;
    /* Many small products would each cost a rounding of the whole sum. */
    const bool apart = bytes || t->pv.terms > 2;
    float sum[SIDE * ADA_LANES] __attribute__((aligned(64)));
    for (int e = 0; e < rows; e += SIDE)
        for (int i = 0; i < t->f32.lanes; i += SIDE) {
            const block x = {(const char *)v + e * row,
                             (const char *)(t->w + i),
                             row,
                             n / elements / 16,
                             bytes,
                             e + 16 < rows,
                             i + 16 < t->f32.lanes};
            float *o = t->f32.o + e * ADA_LANES + i;
            if (apart)
                zero_block();
            else
                load_block(&x, o);
            if (bytes)
                add_products(&x, 0);
            else
                add_parts(&x, t->pv, part * 4, (ptrdiff_t)(ADA_STRIP / 2) * ROW);
            store_block(&x, apart ? sum : o);
            if (apart) add_block(&x, o, sum, bytes, t->worth + i);
        }
}

void ada_values_bf16_amx(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n) {
    add_values(t, v, part, n, false);
}

void ada_values_i8_amx(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n) {
    add_values(t, v, part, n, true);
}

/* ---- scores and weights in one ---- */

/* Units of SIDE keys by SIDE lanes: while one is multiplied, the one before it is stored and the pass goes
 * over the one before that. */
typedef struct {
    const ada_narrow_tile *t;
    const int32_t *start;
    float slot[2][SIDE * SIDE] __attribute__((aligned(64)));
    float factor[ADA_STRIP / ADA_BLOCK][ADA_LANES] __attribute__((aligned(64))); /* of a sum, in steps of y */
    float shift[ADA_LANES] __attribute__((aligned(64)));                         /* added to it */
    float sum[ADA_LANES] __attribute__((aligned(64)));
    __m512i most[ADA_LANES / SIDE]; /* largest y of each lane */
} weighing;

/* Pairs of keys first ... end - 1 of a unit. */
typedef void weighing_pass(weighing *w, int unit, int first, int end);

INLINE void start_unit(const block *x, float *before) {
    TILE_STREAM(4, x->a, x->row);
    TILE_LOAD(6, x->b, ROW);
    TILE_STORE(0, before, SIDE * 4);
    TILE_ZERO(0);
    PRODUCT(x, 0, 4, 6);
    TILE_LOAD(7, x->b + 64, ROW);
    TILE_STORE(1, before + 16, SIDE * 4);
    TILE_ZERO(1);
    PRODUCT(x, 1, 4, 7);
    TILE_STREAM(5, x->a + 16 * x->row, x->row);
    TILE_STORE(2, before + 16 * SIDE, SIDE * 4);
    TILE_ZERO(2);
    PRODUCT(x, 2, 5, 6);
    TILE_STORE(3, before + 16 * SIDE + 16, SIDE * 4);
    TILE_ZERO(3);
    PRODUCT(x, 3, 5, 7);
}

INLINE void run_units(weighing *w, const ada_narrow_keys *keys, int n, bool bytes, weighing_pass *pass) {
    enum { PAIRS = SIDE / 2, ACROSS = ADA_LANES / SIDE };
    const int units = n / SIDE * ACROSS;
    block x = {.row = (ptrdiff_t)w->t->DW * 4, .bytes = bytes, .tall = true, .wide = true};
    const int steps = w->t->DW / 16;
    for (int u = 0; u < units; u++) {
        x.a = (const char *)keys->k + u / ACROSS * SIDE * x.row;
        x.b = (const char *)(w->t->q + u % ACROSS * SIDE);
        start_unit(&x, w->slot[(u + 1) % 2]); /* nothing comes of what is stored first */
        for (int s = 0, done = 0, end; s < steps; s++, done = end) {
            x.steps = s + 1;
            end = PAIRS * x.steps / steps;
            if (s) add_products(&x, s);
            if (u > 1) pass(w, u - 2, done, end);
        }
    }
    pass(w, units - 2, 0, PAIRS);
    float *slot = w->slot[(units + 1) % 2];
    TILE_STORE(0, slot, SIDE * 4);
    TILE_STORE(1, slot + 16, SIDE * 4);
    TILE_STORE(2, slot + 16 * SIDE, SIDE * 4);
    TILE_STORE(3, slot + 16 * SIDE + 16, SIDE * 4);
    pass(w, units - 1, 0, PAIRS);
}

INLINE void start_weighing(weighing *w, const ada_narrow_tile *t, const ada_narrow_keys *keys, int n,
                           float steps, float base, bool bytes) {
    w->t = t;
    w->start = keys->start;
    for (int i = 0; i < ADA_LANES; i += VL) {
        const vec y = v_sub(v_load(t->offset + i), v_load(t->f32.m + i));
        v_store(w->shift + i, v_fma(y, v_set1(steps), v_set1(base)));
        v_store(w->sum + i, v_zero());
        for (int b = 0; bytes && b < n / ADA_BLOCK; b++)
            v_store(w->factor[b] + i, v_mul(v_load(t->unit + i), v_set1(keys->scale[b] * steps)));
    }
    for (int h = 0; h < ADA_LANES / SIDE; h++) w->most[h] = _mm512_set1_epi16(INT16_MIN);
}

/* 32 lanes of y, saturated: lanes 0 ... 3, 16 ... 19, 4 ... 7 and so on. What is too large, or NaN, becomes
 * the largest. */
INLINE __m512i saturated(vec low, vec high) {
    const vec most = v_set1(0x1p20f);
    return _mm512_packs_epi32(_mm512_cvtps_epi32(v_min(low, most)), _mm512_cvtps_epi32(v_min(high, most)));
}

/* y of one key in a unit's slot; bf16 scores come in steps of y. */
INLINE __m512i octaves_bf16(const weighing *w, const float *s, int unit) {
    const float *shift = w->shift + unit % 2 * SIDE;
    return saturated(v_add(v_load(s), v_load(shift)), v_add(v_load(s + VL), v_load(shift + VL)));
}

INLINE __m512i octaves_i8(const weighing *w, const float *s, int unit, int key) {
    const float *shift = w->shift + unit % 2 * SIDE, *factor = w->factor[key / ADA_BLOCK] + unit % 2 * SIDE;
    return saturated(v_fma(integer_sums(s, w->start[key]), v_load(factor), v_load(shift)),
                     v_fma(integer_sums(s + VL, w->start[key]), v_load(factor + VL), v_load(shift + VL)));
}

/* bf16 weights: y counts the 1/128 of an octave from 2^-127, so that it is the bits of 2^(y / 128) but for
 * the curve between powers of two, (1 + f - 2^f) * 128 at pairs of f * 128. */
static const uint8_t curve[64] __attribute__((aligned(64))) = {
    0,  1,  1,  2,  2,  3,  4,  4,  5,  5,  5,  6,  6,  7,  7,  8,  8,  8,  9,  9,  9,  9,
    10, 10, 10, 10, 10, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 10, 10, 10,
    10, 10, 9,  9,  9,  8,  8,  8,  7,  7,  6,  6,  5,  5,  4,  3,  3,  2,  1,  1};
enum { BF16_STEPS = (int)ADA_BF16_STEPS, BF16_BASE = 127 * BF16_STEPS };

INLINE __m512i bf16_powers(__m512i y) {
    const __m512i i = _mm512_srli_epi16(_mm512_max_epi16(y, _mm512_set1_epi16(BF16_STEPS)), 1);
    const __m512i less = _mm512_maskz_permutexvar_epi8(0x5555555555555555, i, _mm512_load_si512(curve));
    return _mm512_sub_epi16(_mm512_max_epi16(y, _mm512_set1_epi16(BF16_STEPS)), less);
}

INLINE vec sum_of_halves(__m512i words, vec sum) {
    const __m512i high = _mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000));
    sum = v_add(sum, _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)));
    return v_add(sum, _mm512_castsi512_ps(high));
}

INLINE void weigh_to_bf16(weighing *w, int unit, int first, int end, bool bytes) {
    const int lane = unit % 2 * SIDE, key = unit / 2 * SIDE;
    vec low = v_load(w->sum + lane), high = v_load(w->sum + lane + VL);
    __m512i most = w->most[unit % 2];
    for (int pair = first; pair < end; pair++) {
        const float *s = w->slot[unit % 2] + 2 * pair * SIDE;
        const int j = key + 2 * pair;
        const __m512i y0 = bytes ? octaves_i8(w, s, unit, j) : octaves_bf16(w, s, unit);
        const __m512i y1 = bytes ? octaves_i8(w, s + SIDE, unit, j + 1) : octaves_bf16(w, s + SIDE, unit);
        most = _mm512_max_epi16(most, _mm512_max_epi16(y0, y1));
        const __m512i w0 = bf16_powers(y0), w1 = bf16_powers(y1);
        uint32_t *to = w->t->w + j / 2 * ADA_LANES + lane;
        const __m512i a = _mm512_unpacklo_epi16(w0, w1), b = _mm512_unpackhi_epi16(w0, w1);
        _mm512_store_si512(to, a);
        _mm512_store_si512(to + VL, b);
        low = sum_of_halves(a, low), high = sum_of_halves(b, high);
    }
    v_store(w->sum + lane, low);
    v_store(w->sum + lane + VL, high);
    w->most[unit % 2] = most;
}

static void pass_bf16_bf16(weighing *w, int unit, int first, int end) {
    weigh_to_bf16(w, unit, first, end, false);
}
static void pass_i8_bf16(weighing *w, int unit, int first, int end) {
    weigh_to_bf16(w, unit, first, end, true);
}

static bool within_gap(const weighing *w, int steps, int base) {
    const __m512i gap = _mm512_set1_epi16((short)(ADA_LAZY_OCTAVES * steps + base));
    return !_mm512_cmpgt_epi16_mask(_mm512_max_epi16(w->most[0], w->most[1]), gap);
}

INLINE bool weigh_bf16(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, bool bytes) {
    weighing w;
    start_weighing(&w, t, keys, n, BF16_STEPS, BF16_BASE, bytes);
    run_units(&w, keys, n, bytes, bytes ? pass_i8_bf16 : pass_bf16_bf16);
    if (!within_gap(&w, BF16_STEPS, BF16_BASE)) return false;
    for (int i = 0; i < ADA_LANES; i += VL) {
        const vec sum = v_load(w.sum + i);
        v_store(t->f32.l + i, v_add(v_load(t->f32.l + i), sum));
        v_store(t->sum + i, v_add(v_load(t->sum + i), sum));
    }
    return true;
}

bool ada_weigh_bf16_bf16_amx(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    return weigh_bf16(t, keys, n, false);
}

bool ada_weigh_i8_bf16_amx(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    return weigh_bf16(t, keys, n, true);
}

/* 8-bit weights: y counts the 1/64 of an octave from the reference and waits in p until the largest of its
 * lane is known, then falls below it: 255 * 2^(-i / 64). */
static const uint8_t powers[64] __attribute__((aligned(64))) = {
    255, 252, 250, 247, 244, 242, 239, 236, 234, 231, 229, 226, 224, 222, 219, 217,
    214, 212, 210, 208, 205, 203, 201, 199, 197, 195, 192, 190, 188, 186, 184, 182,
    180, 178, 176, 175, 173, 171, 169, 167, 165, 164, 162, 160, 158, 157, 155, 153,
    152, 150, 148, 147, 145, 144, 142, 141, 139, 138, 136, 135, 133, 132, 130, 129};
enum { I8_STEPS = 64 };

static void pass_i8_i8(weighing *w, int unit, int first, int end) {
    const int key = unit / 2 * SIDE;
    __m512i most = w->most[unit % 2];
    for (int j = 2 * first; j < 2 * end; j++) {
        const __m512i y = octaves_i8(w, w->slot[unit % 2] + j * SIDE, unit, key + j);
        most = _mm512_max_epi16(most, y);
        _mm512_store_si512((int16_t *)w->t->f32.p + (key + j) * ADA_LANES + unit % 2 * SIDE, y);
    }
    w->most[unit % 2] = most;
}

/* In units of 1/256 of the weight one. */
INLINE __m512i fallen(const int16_t *y, __m512i most) {
    const __m512i d = _mm512_subs_epi16(most, _mm512_load_si512(y));
    const __m512i i = _mm512_slli_epi16(d, 8); /* the index of the high byte */
    const __m512i power = _mm512_maskz_permutexvar_epi8(0xaaaaaaaaaaaaaaaa, i, _mm512_load_si512(powers));
    return _mm512_srlv_epi16(power, _mm512_srli_epi16(d, 6));
}

INLINE __m512i sum_of_bytes(__m512i sum, __m512i words) {
    const __m512i ones = _mm512_set1_epi8(1);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(words, ones), _mm512_set1_epi16(1)));
}

/* Half of the lanes: rounds their weights, four keys to a word. whole: sums of the words' bytes; quarter:
 * those of the weights before rounding, the mean of every four. */
static void weigh_lanes(const ada_narrow_tile *t, int half, int n, __m512i most, __m512i whole[2],
                        __m512i quarter[2]) {
    const __m512i round = _mm512_set1_epi16(0x80), zero = _mm512_setzero_si512();
    whole[0] = whole[1] = quarter[0] = quarter[1] = zero;
    for (int j = 0; j < n; j += 4) {
        const int16_t *y = (const int16_t *)t->f32.p + j * ADA_LANES + half * SIDE;
        uint32_t *to = t->w + j / 4 * ADA_LANES + half * SIDE;
        __m512i x[4], r[4];
        UNROLL for (int k = 0; k < 4; k++) {
            x[k] = fallen(y + k * ADA_LANES, most);
            r[k] = _mm512_add_epi16(x[k], round);
        }
        const __m512i a = _mm512_mask_mov_epi8(_mm512_srli_epi16(r[0], 8), 0xaaaaaaaaaaaaaaaa, r[1]);
        const __m512i b = _mm512_mask_mov_epi8(_mm512_srli_epi16(r[2], 8), 0xaaaaaaaaaaaaaaaa, r[3]);
        const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
        _mm512_store_si512(to, low);
        _mm512_store_si512(to + VL, high);
        whole[0] = sum_of_bytes(whole[0], low), whole[1] = sum_of_bytes(whole[1], high);
        const __m512i mean = _mm512_avg_epu16(_mm512_avg_epu16(x[0], x[1]), _mm512_avg_epu16(x[2], x[3]));
        quarter[0] = _mm512_add_epi32(quarter[0], _mm512_unpacklo_epi16(mean, zero));
        quarter[1] = _mm512_add_epi32(quarter[1], _mm512_unpackhi_epi16(mean, zero));
    }
}

bool ada_weigh_i8_i8_amx(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    weighing w;
    start_weighing(&w, t, keys, n, I8_STEPS, 0, true);
    run_units(&w, keys, n, true, pass_i8_i8);
    if (!within_gap(&w, I8_STEPS, 0)) return false;
    for (int half = 0; half < 2; half++) {
        __m512i whole[2], quarter[2];
        const __m512i most = w.most[half];
        weigh_lanes(t, half, n, most, whole, quarter);
        for (int h = 0; h < 2; h++) {
            const int i = half * SIDE + h * VL;
            const __m512i y = _mm512_srai_epi32(
                h ? _mm512_unpackhi_epi16(most, most) : _mm512_unpacklo_epi16(most, most), 16);
            /* So far below the reference that it is nothing, but not so far that it is subnormal. */
            const vec octaves = v_max(v_set1(-100), v_mul(_mm512_cvtepi32_ps(y), v_set1(1.0f / I8_STEPS)));
            const vec worth = v_mul(v_exp2(octaves), v_set1(1.0f / ADA_U8_MAX));
            v_store(t->worth + i, worth);
            v_store(t->sum + i, v_fma(_mm512_cvtepi32_ps(whole[h]), worth, v_load(t->sum + i)));
            v_store(t->f32.l + i, v_fma(_mm512_cvtepi32_ps(quarter[h]), v_mul(worth, v_set1(4.0f / 256)),
                                        v_load(t->f32.l + i)));
        }
    }
    return true;
}
