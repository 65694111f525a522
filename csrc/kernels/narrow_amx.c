/* Kernels of narrow operands on the matrix unit; AVX-512 does the softmax beside it.
 *
 * Scores are A = 16 keys x 64 bytes of K times B = 16 words x 16 lanes of q, sums of values A = 16 rows of V
 * transposed x 64 bytes times B = 16 words x 16 lanes of w. A block of two tiles by two needs one load per
 * product: tiles 0 ... 3 are its sums, row by row, 4 and 5 the tiles of A, 6 and 7 those of B.
 */
#include "kernel.h"
#include "narrow_avx512.h"

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
    const uint64_t *visible;
    float slot[2][SIDE * SIDE] __attribute__((aligned(64)));
    y_line line;
    vec l[ADA_LANES / VL];        /* sums of weights */
    words most[ADA_LANES / SIDE]; /* largest y of each lane */
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
                           float steps, float bias, bool bytes) {
    w->t = t;
    w->start = keys->start, w->visible = keys->visible;
    prepare_y(&w->line, t, keys, bytes ? n : 0, steps, bias);
    for (int v = 0; v < ADA_LANES / VL; v++) w->l[v] = v_zero();
    for (int h = 0; h < ADA_LANES / SIDE; h++) w->most[h] = _mm512_set1_epi16(-(int16_t)LEAST_BYTES);
}

/* y of one key in a unit's slot; bf16 scores come in steps of y. */
INLINE void y_of(vec y[2], const weighing *w, const float *s, int unit, int key, bool bytes) {
    const int lane = unit % 2 * SIDE;
    UNROLL for (int v = 0; v < 2; v++) {
        const vec m = v_load(w->line.m + lane + v * VL);
        y[v] = bytes ? _mm512_fmsub_ps(integer_sums(s + v * VL, w->start[key]),
                                       v_load(w->line.unit[key / ADA_BLOCK] + lane + v * VL), m)
                     : v_sub(v_load(s + v * VL), m);
        if (w->visible) y[v] = y_seen(y[v], w->visible + key, lane + v * VL);
    }
}

INLINE void weigh_to_bf16(weighing *w, int unit, int first, int end, bool bytes) {
    const int lane = unit % 2 * SIDE, key = unit / 2 * SIDE;
    /* In registers: as far as the compiler can see, every store of weights may change w. */
    vec l[2] = {w->l[lane / VL], w->l[lane / VL + 1]};
    words most = w->most[unit % 2];
    for (int pair = first; pair < end; pair++) {
        const float *s = w->slot[unit % 2] + 2 * pair * SIDE;
        const int j = key + 2 * pair;
        vec y[4];
        y_of(y, w, s, unit, j, bytes);
        y_of(y + 2, w, s + SIDE, unit, j + 1, bytes);
        weigh_bf16(w->t->w + j / 2 * ADA_LANES + lane, y, &most, l, w->visible, false);
    }
    w->l[lane / VL] = l[0], w->l[lane / VL + 1] = l[1];
    w->most[unit % 2] = most;
}

static void pass_bf16_bf16(weighing *w, int unit, int first, int end) {
    weigh_to_bf16(w, unit, first, end, false);
}
static void pass_i8_bf16(weighing *w, int unit, int first, int end) {
    weigh_to_bf16(w, unit, first, end, true);
}

INLINE bool weigh_with_bf16(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, bool bytes) {
    weighing w;
    start_weighing(&w, t, keys, n, ADA_BF16_STEPS, BF16_BIAS, bytes);
    run_units(&w, keys, n, bytes, bytes ? pass_i8_bf16 : pass_bf16_bf16);
    if (!bf16_in_range(_mm512_max_epi16(w.most[0], w.most[1]))) return false;
    for (int v = 0; v < ADA_LANES / VL; v++) {
        v_store(t->f32.l + v * VL, v_add(v_load(t->f32.l + v * VL), w.l[v]));
        v_store(t->sum + v * VL, v_add(v_load(t->sum + v * VL), w.l[v]));
    }
    return true;
}

bool ada_weigh_bf16_bf16_amx(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    return weigh_with_bf16(t, keys, n, false);
}

bool ada_weigh_i8_bf16_amx(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    return weigh_with_bf16(t, keys, n, true);
}

/* y of four keys and 32 lanes to two vectors of quads; rest gathers what rounding took off, in 1/256. */
INLINE void quads(uint32_t *w, const int16_t *y, words most, words sum[2], words *rest) {
    words k[4];
    UNROLL for (int i = 0; i < 4; i++) {
        k[i] = byte_exp2(_mm512_subs_epi16(most, w_load(y + i * ADA_LANES)));
        *rest = _mm512_add_epi16(*rest, _mm512_and_si512(k[i], _mm512_set1_epi16(0xff)));
    }
    const __mmask64 odd = 0xaaaaaaaaaaaaaaaa;
    const words k01 = _mm512_mask_mov_epi8(_mm512_srli_epi16(k[0], 8), odd, k[1]);
    const words k23 = _mm512_mask_mov_epi8(_mm512_srli_epi16(k[2], 8), odd, k[3]);
    const words low = _mm512_unpacklo_epi16(k01, k23), high = _mm512_unpackhi_epi16(k01, k23);
    w_store(w, low);
    w_store(w + VL, high);
    sum[0] = dot_i8(sum[0], low, _mm512_set1_epi8(1));
    sum[1] = dot_i8(sum[1], high, _mm512_set1_epi8(1));
}

/* 32 integers in the order of packs to two vectors of floats in the order of lanes. */
INLINE void unpack_y(vec to[2], words y) {
    to[0] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_unpacklo_epi16(y, y), 16));
    to[1] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_unpackhi_epi16(y, y), 16));
}

INLINE bool bytes_in_range(words most) {
    return !_mm512_cmpgt_epi16_mask(most, _mm512_set1_epi16(ADA_LAZY_OCTAVES * (int)BYTE_STEPS));
}

/* All of a strip's y to weights; 32 lanes. */
INLINE void weigh_bytes(const ada_narrow_tile *t, const int16_t *y, int n, int lane, words most) {
    words sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, rest = sum[0];
    vec top[2], less[2];
    for (int j = 0; j < n; j += 4)
        quads(t->w + j / 4 * ADA_LANES + lane, y + j * ADA_LANES + lane, most, sum, &rest);
    unpack_y(top, most);
    less[0] = _mm512_cvtepi32_ps(_mm512_unpacklo_epi16(rest, _mm512_setzero_si512()));
    less[1] = _mm512_cvtepi32_ps(_mm512_unpackhi_epi16(rest, _mm512_setzero_si512()));
    UNROLL for (int x = 0; x < 2; x++) {
        float *l = t->f32.l + lane + x * VL, *total = t->sum + lane + x * VL;
        const vec octaves = v_mul(top[x], v_set1(1 / BYTE_STEPS));
        const vec worth = v_mul(v_exp2(octaves), v_set1(1.0f / ADA_U8_MAX));
        const vec rounded = _mm512_cvtepi32_ps(sum[x]);
        const vec exact = v_fma(v_sub(less[x], v_set1(128.0f * (float)n)), v_set1(1 / 256.0f), rounded);
        v_store(t->worth + lane + x * VL, worth);
        v_store(total, v_fma(rounded, worth, v_load(total)));
        v_store(l, v_fma(exact, worth, v_load(l)));
    }
}

static void pass_i8_i8(weighing *w, int unit, int first, int end) {
    const int lane = unit % 2 * SIDE, key = unit / 2 * SIDE;
    words most = w->most[unit % 2];
    for (int j = 2 * first; j < 2 * end; j++) {
        vec f[2];
        y_of(f, w, w->slot[unit % 2] + j * SIDE, unit, key + j, true);
        const words y = y_integers(f[0], f[1], false);
        most = _mm512_max_epi16(most, y);
        w_store((int16_t *)w->t->f32.p + (key + j) * ADA_LANES + lane, y);
    }
    w->most[unit % 2] = most;
}

bool ada_weigh_i8_i8_amx(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    weighing w;
    start_weighing(&w, t, keys, n, BYTE_STEPS, 0, true);
    run_units(&w, keys, n, true, pass_i8_i8);
    if (!bytes_in_range(_mm512_max_epi16(w.most[0], w.most[1]))) return false;
    for (int half = 0; half < 2; half++)
        weigh_bytes(t, (const int16_t *)t->f32.p, n, half * SIDE, w.most[half]);
    return true;
}
