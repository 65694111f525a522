/* What the AVX-512 kernels of narrow operands share: vectors of words and 2^y in 16-bit integers, made of
 * instructions that leave the multiply-add pipes of Zen 4 free to run inside the products of the next keys.
 */
#define REAL float
#define REAL_BITS 32
#include "simd_avx512.h"

typedef __m512i words;

INLINE words w_load(const void *p) { return _mm512_load_si512(p); }
INLINE void w_store(void *p, words a) { _mm512_store_si512(p, a); }

/* unit times each key block's scale times steps of y, and the reference less the offset in steps of y. */
typedef struct {
    float unit[ADA_STRIP / ADA_BLOCK][ADA_LANES] __attribute__((aligned(64)));
    float m[ADA_LANES] __attribute__((aligned(64)));
} y_line;

INLINE void prepare_y(y_line *y, const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, float steps) {
    for (int i = 0; i < ADA_LANES; i += VL) {
        v_store(y->m + i, v_mul(v_sub(v_load(t->f32.m + i), v_load(t->offset + i)), v_set1(steps)));
        for (int b = 0; b < n / ADA_BLOCK; b++)
            v_store(y->unit[b] + i, v_mul(v_load(t->unit + i), v_set1(keys->scale[b] * steps)));
    }
}

/* Two vectors of y to 32 integers, saturating: a conversion would make the largest numbers the lowest. */
INLINE words y_integers(vec y0, vec y1) {
    const vec most = v_set1(0x1p20f);
    return _mm512_packs_epi32(_mm512_cvtps_epi32(v_min(y0, most)), _mm512_cvtps_epi32(v_min(y1, most)));
}

/* ---- bf16 weights ---- */

#define BF16_BIAS (127 * ADA_BF16_STEPS) /* then y is the exponent field and a linear significand */

/* What the line through the ends of an octave is above 2^f, in steps, for f = (2 i + 1/2) / 128. */
static const uint8_t bf16_excess[64] __attribute__((aligned(64))) = {
    0,  1,  1,  2,  2,  3,  4,  4,  5,  5,  5,  6,  6,  7,  7,  8,  8,  8,  9,  9,  9,  9,
    10, 10, 10, 10, 10, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 10, 10, 10,
    10, 10, 9,  9,  9,  8,  8,  8,  7,  7,  6,  6,  5,  5,  4,  3,  3,  2,  1,  1,
};

/* 2^(y - bias) as bf16, 32 of them. */
INLINE words bf16_exp2(words y) {
    const words excess =
        _mm512_maskz_permutexvar_epi8(0x5555555555555555, _mm512_srli_epi16(y, 1), w_load(bf16_excess));
    return _mm512_sub_epi16(y, excess);
}

/* 128 at least, the lowest normal number. */
INLINE words y_bf16(vec y0, vec y1) { return _mm512_max_epi16(y_integers(y0, y1), _mm512_set1_epi16(128)); }

INLINE vec bf16_pair_sum(words w) {
    const words high = _mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000));
    return v_add(_mm512_castsi512_ps(high), _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)));
}

/* y of two keys and two vectors of lanes to words of weights and their sums. */
INLINE void weigh_bf16(uint32_t *w, const vec y[4], words *most, vec l[2]) {
    words y0 = y_bf16(y[0], y[1]), y1 = y_bf16(y[2], y[3]);
    *most = _mm512_max_epi16(*most, _mm512_max_epi16(y0, y1));
    y0 = bf16_exp2(y0), y1 = bf16_exp2(y1);
    const words low = _mm512_unpacklo_epi16(y0, y1), high = _mm512_unpackhi_epi16(y0, y1);
    w_store(w, low);
    w_store(w + VL, high);
    l[0] = v_add(l[0], bf16_pair_sum(low));
    l[1] = v_add(l[1], bf16_pair_sum(high));
}

INLINE bool bf16_in_range(words most) {
    return !_mm512_cmpgt_epi16_mask(most, _mm512_set1_epi16((127 + ADA_LAZY_OCTAVES) * 128));
}
