/* Kernels of 8- and 16-bit integers by vpdpbusd and vpdpwssd (VNNI), with byte permutes (VBMI) for 2^y. */
#include "kernel.h"
#include "narrow_avx512.h"

#define NAME(op) op##_i8
#define KERNEL(op) ada_##op##_i8_avx512vnni
#define DOT dot_i8
#define ELEMENTS 4
#define INTEGER 1
#define START(keys, j) _mm512_set1_epi32((keys)->start[j])
#include "products_tpl.h"

#define NAME(op) op##_i16
#define KERNEL(op) ada_##op##_i16_avx512vnni
#define DOT dot_i16
#define ELEMENTS 2
#define INTEGER 1
#define START(keys, j) _mm512_setzero_si512()
#include "products_tpl.h"

/* ---- 8-bit scores and weights ----
 * y is made of integers, which takes fewer instructions than floats: the sums of two keys, shifted right, are
 * packed into 16 bits and multiplied with a fraction, the unit. Each block's shift is such that nothing
 * overflows, or that what does lies 2^14 steps from zero at least. */

typedef struct {
    int16_t unit[ADA_STRIP / ADA_BLOCK][ADA_LANES / VL][2 * VL] __attribute__((aligned(64)));
    int32_t shift[ADA_STRIP / ADA_BLOCK][ADA_LANES] __attribute__((aligned(64)));
    float m[ADA_LANES] __attribute__((aligned(64)));   /* the reference in steps, without the offset */
    float cut[ADA_LANES] __attribute__((aligned(64))); /* steps that shifting takes off on average */
} y_steps;

/* 32 integers from 16 each in the order of packs: four of a, four of b, and so on. */
INLINE words y_pack(words a, words b) { return _mm512_packs_epi32(a, b); }

/* False when 16 bits cannot hold it. Where a lane sees nothing its reference is zero. */
INLINE bool prepare_steps(y_steps *y, const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    const vec far = v_set1(ADA_FAR_OCTAVES * BYTE_STEPS);
    const int64_t largest = (int64_t)t->DW * 4 * 128 * ADA_I8_MAX;
    const uint64_t seen = lanes_seeing(keys, n);
    int most = 0;
    mask beyond = 0;
    while (largest >> most > INT16_MAX) most++;
    for (int v = 0; v < ADA_LANES / VL; v++) {
        const int i = v * VL;
        const vec octaves = v_sub(v_load(t->f32.m + i), v_load(t->offset + i));
        const vec m = v_select(m_bits(seen, i), v_mul(octaves, v_set1(BYTE_STEPS)), v_zero());
        const vec unit = v_mul(v_load(t->unit + i), v_set1(BYTE_STEPS * (float)(1 << most)));
        vec cut = v_zero();
        for (int b = 0; b < n / ADA_BLOCK; b++) {
            const vec whole = v_mul(unit, v_set1(keys->scale[b]));
            /* A fraction that rounds to one would not fit. NaN stays. */
            const vec octave = _mm512_getexp_ps(v_mul(whole, v_set1(1.0001f)));
            const vec less = v_max(v_zero(), v_add(octave, v_set1(1)));
            const vec shift = v_sub(v_set1((float)most), less);
            const vec fraction = v_scale2(whole, v_sub(v_zero(), less));
            const words u = _mm512_cvtps_epi32(v_mul(fraction, v_set1(32768)));
            const vec half = v_sub(v_set1(0.5f), v_scale2(v_set1(0.5f), v_sub(v_zero(), shift)));
            beyond |= m_outside(less, v_zero(), v_set1((float)most));
            cut = v_fma(fraction, half, cut);
            w_store(y->shift[b] + i, _mm512_cvtps_epi32(shift));
            w_store(y->unit[b][v], y_pack(u, u));
        }
        beyond |= m_outside(m, v_sub(v_zero(), far), far);
        v_store(y->m + i, m);
        v_store(y->cut + i, v_mul(cut, v_set1((float)ADA_BLOCK / (float)n)));
    }
    return !beyond;
}

/* y of the sums a and b of two keys. */
INLINE words y_of_sums(words a, words b, words shift, words unit) {
    return _mm512_mulhrs_epi16(y_pack(_mm512_srav_epi32(a, shift), _mm512_srav_epi32(b, shift)), unit);
}

/* The lanes of a vector that see keys a and b, in the order of packs. */
INLINE __mmask32 y_pack_bits(uint64_t a, uint64_t b, int lane) {
    uint64_t both = (a >> lane & 0xffff) | (b >> lane & 0xffff) << 32;
    both = (both | both << 8) & 0x00ff00ff00ff00ff;
    both = (both | both << 4) & 0x0f0f0f0f0f0f0f0f;
    return (__mmask32)(both | both >> 28);
}

/* Within 128 bits: pairs of 16-bit elements, one of the first four and one of the last. */
INLINE words y_pairs(words x) {
    const words order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    return _mm512_shuffle_epi8(x, order);
}

/* The 8-bit weights of a strip, a vector of lanes at a time: while the products of one are made, eight keys
 * at once, the y of the one before, whose largest is known by then, becomes bytes. A quad of keys lies as two
 * vectors in the order of packs, of keys 0 and 2 and of keys 1 and 3. */
typedef struct {
    y_steps line;
    int16_t y[ADA_STRIP * VL] __attribute__((aligned(64)));
    const uint64_t *visible[ADA_STRIP / ADA_BLOCK];       /* of each block of keys; NULL: all see all */
    int n[ADA_LANES / VL];                                /* behind so many keys a vector's lanes see none */
    words top[ADA_LANES / VL];                            /* largest y */
    words exact[ADA_LANES / VL], rounded[ADA_LANES / VL]; /* sums of 256 times the weights, and of bytes */
} strip_of_bytes;

INLINE void see_strip(strip_of_bytes *s, const ada_narrow_keys *keys, int n) {
    for (int b = 0; b < n / ADA_BLOCK; b++) s->visible[b] = block_bits(keys->visible, b);
    for (int v = 0, j; v < ADA_LANES / VL; v++) {
        for (j = n; j > 8 && keys->visible && !m_bits(keys->visible[j - 1], v * VL);) j--;
        s->n[v] = (j + 7) / 8 * 8;
    }
}

INLINE words least_bytes(const strip_of_bytes *s, int v) {
    const words least = _mm512_cvtps_epi32(v_sub(v_load(s->line.m + v * VL), v_set1(LEAST_BYTES)));
    return y_pack(least, least);
}

/* y of quad i of the eight keys from j on. */
INLINE void y_of_quad(strip_of_bytes *s, const words sums[8], int i, int j, int v, words *most) {
    const int block = j / ADA_BLOCK;
    const words shift = w_load(s->line.shift[block] + v * VL), unit = w_load(s->line.unit[block][v]);
    const uint64_t *visible = s->visible[block];
    UNROLL for (int a = 4 * i; a < 4 * i + 2; a++) {
        words y = y_of_sums(sums[a], sums[a + 2], shift, unit);
        if (visible) {
            const uint64_t *bits = visible + j % ADA_BLOCK + a;
            const __mmask32 seen = y_pack_bits(bits[0], bits[2], v * VL);
            y = _mm512_mask_mov_epi16(_mm512_set1_epi16(INT16_MIN), seen, y);
        }
        *most = _mm512_max_epi16(*most, y);
        w_store(s->y + (j + 4 * i + a % 2 * 2) * VL, y);
    }
}

/* Of y to weights. */
INLINE void quad_of_y(uint32_t *w, const int16_t *y, words top, words *exact, words *rounded) {
    const words a = byte_exp2(_mm512_sub_epi16(top, w_load(y)));
    const words b = byte_exp2(_mm512_sub_epi16(top, w_load(y + 2 * VL)));
    const words high = _mm512_srli_epi16(a, 8);
    w_store(w, y_pairs(_mm512_mask_mov_epi8(high, 0xaaaaaaaaaaaaaaaa, b)));
    *exact = _mm512_add_epi16(*exact, _mm512_add_epi16(a, b));
    *rounded = _mm512_add_epi16(*rounded, _mm512_add_epi16(high, _mm512_srli_epi16(b, 8)));
}

/* A quarter of the words of eight keys. */
INLINE void eight_keys(words acc[8], const uint32_t *q, const uint32_t *k, ptrdiff_t DW, int quarter) {
    const ptrdiff_t end = DW * (quarter + 1) / 4;
    for (ptrdiff_t d = DW * quarter / 4; d < end; d++) {
        words x = w_load(q + d * ADA_LANES);
        PIN(x);
        UNROLL for (int i = 0; i < 8; i++) acc[i] = dot_i8(acc[i], x, _mm512_set1_epi32((int)k[i * DW + d]));
    }
}

/* Sums of keys first ... end - 1 and vector v, and the y of those before; SECOND: with the weights of as many
 * keys and the vector before. */
INLINE void run_of_keys(strip_of_bytes *s, const ada_narrow_tile *t, const ada_narrow_keys *keys, int first,
                        int end, ptrdiff_t DW, int v, words acc[8], words *most, const bool SECOND) {
    const uint32_t *q = t->q + v * VL, *k = keys->k + first * DW;
    const int32_t *start = keys->start;
    uint32_t *w = t->w + (v - 1) * VL;
    words now = *most, top, exact, rounded, sums[8];
    if (SECOND) top = s->top[v - 1], exact = s->exact[v - 1], rounded = s->rounded[v - 1];
    for (int j = first; j < end; j += 8, k += 8 * DW, w += 2 * ADA_LANES) {
        UNROLL for (int i = 0; i < 8; i++) sums[i] = acc[i], acc[i] = _mm512_set1_epi32(start[j + i]);
        UNROLL for (int i = 0; i < 2; i++) {
            if (j) y_of_quad(s, sums, i, j - 8, v, &now);
            eight_keys(acc, q, k, DW, 2 * i);
            if (SECOND) quad_of_y(w + i * ADA_LANES, s->y + (j + 4 * i) * VL, top, &exact, &rounded);
            eight_keys(acc, q, k, DW, 2 * i + 1);
        }
    }
    *most = now;
    if (SECOND) s->exact[v - 1] = exact, s->rounded[v - 1] = rounded;
}

/* The weights of vector v from key j on, n keys in all. */
INLINE void rest_of_weights(strip_of_bytes *s, uint32_t *w, int j, int n, int v) {
    words exact = s->exact[v], rounded = s->rounded[v];
    for (w += v * VL; j < s->n[v]; j += 4)
        quad_of_y(w + j / 4 * ADA_LANES, s->y + j * VL, s->top[v], &exact, &rounded);
    for (; j < n; j += 4) w_store(w + j / 4 * ADA_LANES, _mm512_setzero_si512());
    s->exact[v] = exact, s->rounded[v] = rounded;
}

/* 32 sums in the order of packs to 16. */
INLINE words sums_of_lanes(words sums) {
    const words zero = _mm512_setzero_si512();
    return _mm512_add_epi32(_mm512_unpacklo_epi16(sums, zero), _mm512_unpackhi_epi16(sums, zero));
}

INLINE bool weigh_i8(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, ptrdiff_t DW) {
    enum { VECTORS = ADA_LANES / VL };
    strip_of_bytes s;
    words acc[8];
    vec top[VECTORS];
    mask beyond = 0;
    if (!prepare_steps(&s.line, t, keys, n)) return false;
    see_strip(&s, keys, n);
    UNROLL for (int i = 0; i < 8; i++) acc[i] = _mm512_setzero_si512();
    for (int v = 0; v < VECTORS; v++) {
        const int second = v == 0 ? 0 : s.n[v] < s.n[v - 1] ? s.n[v] : s.n[v - 1];
        words most = least_bytes(&s, v);
        if (second) run_of_keys(&s, t, keys, 0, second, DW, v, acc, &most, true);
        run_of_keys(&s, t, keys, second, s.n[v], DW, v, acc, &most, false);
        if (v) rest_of_weights(&s, t->w, second, n, v - 1);
        UNROLL for (int i = 0; i < 2; i++) y_of_quad(&s, acc, i, s.n[v] - 8, v, &most);
        s.top[v] = _mm512_max_epi16(most, _mm512_shuffle_epi32(most, _MM_PERM_BADC));
        s.exact[v] = s.rounded[v] = _mm512_setzero_si512();
    }
    rest_of_weights(&s, t->w, 0, n, VECTORS - 1);
    for (int v = 0; v < VECTORS; v++) {
        const words y = _mm512_srai_epi32(_mm512_unpacklo_epi16(s.top[v], s.top[v]), 16);
        top[v] = v_sub(_mm512_cvtepi32_ps(y), v_load(s.line.m + v * VL));
        beyond |= m_greater(top[v], v_set1(ADA_LAZY_OCTAVES * BYTE_STEPS));
    }
    if (beyond) return false;
    for (int v = 0; v < VECTORS; v++) {
        float *l = t->f32.l + v * VL, *total = t->sum + v * VL;
        const vec octaves = v_mul(v_add(top[v], v_load(s.line.cut + v * VL)), v_set1(1 / BYTE_STEPS));
        const vec worth = v_mul(v_exp2(octaves), v_set1(1.0f / ADA_U8_MAX));
        const words rest = _mm512_sub_epi16(s.exact[v], _mm512_slli_epi16(s.rounded[v], 8));
        const vec whole = _mm512_cvtepi32_ps(sums_of_lanes(s.rounded[v]));
        const vec less = v_sub(_mm512_cvtepi32_ps(sums_of_lanes(rest)), v_set1(128.0f * (float)s.n[v]));
        v_store(t->worth + v * VL, worth);
        v_store(total, v_fma(whole, worth, v_load(total)));
        v_store(l, v_fma(v_fma(less, v_set1(1 / 256.0f), whole), worth, v_load(l)));
    }
    return true;
}

/* Loops of a known length pay: D = 32 and 64. */
bool ada_weigh_i8_i8_avx512vnni(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    return t->DW == 16  ? weigh_i8(t, keys, n, 16)
           : t->DW == 8 ? weigh_i8(t, keys, n, 8)
                        : weigh_i8(t, keys, n, t->DW);
}

/* Squares are products with the upper half of a weight, rounded up, as one factor has a sign. */
void ada_gauge_i8_avx512vnni(const ada_narrow_tile *t, int n, const float *reach, float *mass,
                             float *spread) {
    const words one = _mm512_set1_epi8(1), most = _mm512_set1_epi8(127);
    const uint32_t *w = t->w;
    for (int b = 0; b < n / ADA_BLOCK; b++, mass += ADA_LANES, spread += ADA_LANES) {
        words sum[4], square[4];
        UNROLL for (int v = 0; v < 4; v++) sum[v] = square[v] = _mm512_setzero_si512();
        for (int j = 0; j < ADA_BLOCK; j += 4, w += ADA_LANES) UNROLL for (int v = 0; v < 4; v++) {
                const words x = w_load(w + v * VL);
                sum[v] = dot_i8(sum[v], x, one);
                square[v] =
                    dot_i8(square[v], x, _mm512_min_epu8(_mm512_avg_epu8(x, _mm512_setzero_si512()), most));
            }
        UNROLL for (int v = 0; v < 4; v++) {
            const vec worth = v_load(t->worth + v * VL), twice = v_add(worth, worth);
            store_gauge(mass + v * VL, spread + v * VL, reach[b], v_mul(_mm512_cvtepi32_ps(sum[v]), worth),
                        v_mul(_mm512_cvtepi32_ps(square[v]), v_mul(worth, twice)));
        }
    }
}

/* ---- 16-bit weights ----
 * A first pass leaves floats, their sums and largest; a second one rounds them into pairs. */

/* The weights of one key and the vector of lanes from `lane` on, of raw sums. */
INLINE vec weigh_floats(vec s, const float *unit, const float *m, int lane, const uint64_t *visible,
                        vec *most) {
    vec y =
        _mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(s)), v_load(unit + lane), v_load(m + lane));
    if (visible) y = y_seen(y, visible, lane);
    *most = v_max(y, *most);
    return v_exp2(y);
}

INLINE void pairs(const ada_narrow_tile *t, int n, int lane, vec most, vec l) {
    const vec some = v_exp2(most);
    const vec inverse = v_min(v_min(v_div(v_set1(ADA_I16_MAX), some), v_set1(0x1p110f)),
                              v_div(v_set1(ADA_I16_WEIGHT_SUM - ADA_STRIP), l));
    words sum = _mm512_setzero_si512();
    for (int j = 0; j < n; j += 2) {
        const float *p = t->f32.p + j * ADA_LANES + lane;
        const words low = _mm512_cvtps_epi32(v_mul(v_load(p), inverse));
        const words high = _mm512_cvtps_epi32(v_mul(v_load(p + ADA_LANES), inverse));
        const words w = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        sum = dot_i16(sum, w, _mm512_set1_epi16(1));
        w_store(t->w + j / 2 * ADA_LANES + lane, w);
    }
    const vec worth = v_div(v_set1(1), inverse);
    v_store(t->worth + lane, worth);
    v_store(t->sum + lane, v_fma(_mm512_cvtepi32_ps(sum), worth, v_load(t->sum + lane)));
    v_store(t->f32.l + lane, v_add(l, v_load(t->f32.l + lane)));
}

/* HIDDEN: some lanes do not see some keys. */
INLINE bool weigh_i16(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, const bool HIDDEN) {
    const int DW = t->DW;
    y_line line;
    words acc[16];
    vec most[4], l[4];
    prepare_y(&line, t, keys, n, 1, 0);
    UNROLL for (int v = 0; v < 4; v++) most[v] = v_set1(-INFINITY), l[v] = v_zero();
    start_i16(acc, keys, 0, 4, 4);
    steps_i16(acc, t->q, keys->k, DW, 0, DW, 4, 4);
    for (int j = 4; j <= n; j += 4) {
        const float *unit = line.unit[(j - 4) / ADA_BLOCK];
        float *p = t->f32.p + (j - 4) * ADA_LANES;
        UNROLL for (int a = 0; a < 16; a++) w_store(p + a * VL, acc[a]);
        start_i16(acc, keys, j, 4, 4);
        for (int i = 0; i < 4; i++) {
            if (j < n)
                steps_i16(acc, t->q, keys->k + (ptrdiff_t)j * DW, DW, i * DW / 4, (i + 1) * DW / 4, 4, 4);
            UNROLL for (int v = 0; v < 4; v++) {
                float *s = p + i * ADA_LANES + v * VL;
                const vec w = weigh_floats(v_load(s), unit, line.m, v * VL,
                                           HIDDEN ? keys->visible + j - 4 + i : NULL, &most[v]);
                l[v] = v_add(l[v], w);
                v_store(s, w);
            }
        }
    }
    mask beyond = 0;
    UNROLL for (int v = 0; v < 4; v++) beyond |= m_greater(most[v], v_set1(ADA_LAZY_OCTAVES));
    if (beyond) return false;
    UNROLL for (int v = 0; v < 4; v++) pairs(t, n, v * VL, most[v], l[v]);
    return true;
}

bool ada_weigh_i16_i16_avx512vnni(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    return keys->visible ? weigh_i16(t, keys, n, true) : weigh_i16(t, keys, n, false);
}

/* The squares of a pair add up to less than 2^31. */
void ada_gauge_i16_avx512vnni(const ada_narrow_tile *t, int n, const float *reach, float *mass,
                              float *spread) {
    const words one = _mm512_set1_epi16(1), zero = _mm512_setzero_si512();
    const uint32_t *w = t->w;
    for (int b = 0; b < n / ADA_BLOCK; b++, mass += ADA_LANES, spread += ADA_LANES) {
        words sum[4];
        vec square[4];
        UNROLL for (int v = 0; v < 4; v++) sum[v] = zero, square[v] = v_zero();
        for (int j = 0; j < ADA_BLOCK; j += 2, w += ADA_LANES) UNROLL for (int v = 0; v < 4; v++) {
                const words x = w_load(w + v * VL);
                sum[v] = dot_i16(sum[v], x, one);
                square[v] = v_add(square[v], _mm512_cvtepi32_ps(dot_i16(zero, x, x)));
            }
        UNROLL for (int v = 0; v < 4; v++) {
            const vec worth = v_load(t->worth + v * VL);
            store_gauge(mass + v * VL, spread + v * VL, reach[b], v_mul(_mm512_cvtepi32_ps(sum[v]), worth),
                        v_mul(square[v], v_mul(worth, worth)));
        }
    }
}
