/* What the AVX-512 kernels of narrow operands share: vectors of words and 2^y in 16-bit integers, made of
 * instructions that leave the multiply-add pipes of Zen 4 free to run inside the products of the next keys.
 */
#define REAL float
#define REAL_BITS 32
#include "simd_avx512.h"

typedef __m512i words;

INLINE words w_load(const void *p) { return _mm512_load_si512(p); }
INLINE void w_store(void *p, words a) { _mm512_store_si512(p, a); }

#include "dots.h"

/* y of a score is its octaves above the reference in some steps, plus a bias: unit holds the steps of a sum
 * of integers for each block of keys, m what is taken off. */
typedef struct {
    float unit[ADA_STRIP / ADA_BLOCK][ADA_LANES] __attribute__((aligned(64)));
    float m[ADA_LANES] __attribute__((aligned(64)));
} y_line;

INLINE void prepare_y(y_line *y, const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, float steps,
                      float bias) {
    for (int i = 0; i < ADA_LANES; i += VL) {
        const vec m = v_mul(v_sub(v_load(t->f32.m + i), v_load(t->offset + i)), v_set1(steps));
        v_store(y->m + i, v_sub(m, v_set1(bias)));
        for (int b = 0; b < n / ADA_BLOCK; b++)
            v_store(y->unit[b] + i, v_mul(v_load(t->unit + i), v_set1(keys->scale[b] * steps)));
    }
}

/* Lanes that do not see the key get a y that is nobody's largest, and the lowest of integers. */
INLINE vec y_seen(vec y, const uint64_t *visible, int lane) {
    return v_select(m_bits(*visible, lane), y, v_set1(-0x1p20f));
}

/* Two vectors of y to 32 integers, saturating. BOUNDED: none is 2^31, which a conversion would make the
 * lowest number. */
INLINE words y_integers(vec y0, vec y1, const bool BOUNDED) {
    const vec most = v_set1(0x1p20f);
    if (!BOUNDED) y0 = v_min(y0, most), y1 = v_min(y1, most);
    return _mm512_packs_epi32(_mm512_cvtps_epi32(y0), _mm512_cvtps_epi32(y1));
}

/* Of one block of keys: the bits of the lanes that see them, NULL where all see all. */
INLINE const uint64_t *block_bits(const uint64_t *visible, int block) {
    uint64_t all = UINT64_MAX;
    if (!visible) return NULL;
    visible += block * ADA_BLOCK;
    for (int j = 0; j < ADA_BLOCK; j++) all &= visible[j];
    return ~all ? visible : NULL;
}

/* The lanes that see some key. */
INLINE uint64_t lanes_seeing(const ada_narrow_keys *keys, int n) {
    uint64_t seen = 0;
    if (!keys->visible) return UINT64_MAX;
    for (int j = 0; j < n; j++) seen |= keys->visible[j];
    return seen;
}

/* Of one block and vector of lanes: the sum of the weights, and reach times their root squared distance. */
INLINE void store_gauge(float *mass, float *spread, float reach, vec sum, vec squares) {
    const vec rest = _mm512_fnmadd_ps(v_mul(sum, v_set1(1.0f / ADA_BLOCK)), sum, squares);
    v_store(mass, sum);
    v_store(spread, v_mul(_mm512_sqrt_ps(v_max(v_zero(), rest)), v_set1(reach)));
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

/* Integers of y to weights, of 2^-126 at least, or zero for the lowest y where some are hidden. */
INLINE words y_to_bf16(words y, words *most, bool hidden) {
    const words normal = _mm512_max_epi16(y, _mm512_set1_epi16(128)), w = bf16_exp2(normal);
    *most = _mm512_max_epi16(*most, normal);
    if (!hidden) return w;
    return _mm512_maskz_mov_epi16(_mm512_cmpgt_epi16_mask(y, _mm512_set1_epi16(INT16_MIN)), w);
}

INLINE vec bf16_pair_sum(words w) {
    const words high = _mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000));
    return v_add(_mm512_castsi512_ps(high), _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)));
}

/* y of two keys and two vectors of lanes to words of weights and their sums. */
INLINE void weigh_bf16(uint32_t *w, const vec y[4], words *most, vec l[2], bool hidden, const bool BOUNDED) {
    const words w0 = y_to_bf16(y_integers(y[0], y[1], BOUNDED), most, hidden);
    const words w1 = y_to_bf16(y_integers(y[2], y[3], BOUNDED), most, hidden);
    const words low = _mm512_unpacklo_epi16(w0, w1), high = _mm512_unpackhi_epi16(w0, w1);
    w_store(w, low);
    w_store(w + VL, high);
    l[0] = v_add(l[0], bf16_pair_sum(low));
    l[1] = v_add(l[1], bf16_pair_sum(high));
}

INLINE bool bf16_in_range(words most) {
    return !_mm512_cmpgt_epi16_mask(most, _mm512_set1_epi16((127 + ADA_LAZY_OCTAVES) * 128));
}

/* ---- 8-bit weights ----
 * They are relative to the strip's largest, so y is 16-bit integers in 1/64 octaves first, and bytes by a
 * table of one octave and a shift once that is known. */

#define BYTE_STEPS 64.0f
/* So far below the reference that it is nothing, but not so far that it is subnormal: where a strip's largest
 * begins, so that what is hidden from a lane weighs nothing beside it either. */
#define LEAST_BYTES (100 * BYTE_STEPS)

/* 255 * 2^(-i / 64) */
static const uint8_t byte_octave[64] __attribute__((aligned(64))) = {
    255, 252, 250, 247, 244, 242, 239, 236, 234, 231, 229, 226, 224, 222, 219, 217,
    214, 212, 210, 208, 205, 203, 201, 199, 197, 195, 192, 190, 188, 186, 184, 182,
    180, 178, 176, 175, 173, 171, 169, 167, 165, 164, 162, 160, 158, 157, 155, 153,
    152, 150, 148, 147, 145, 144, 142, 141, 139, 138, 136, 135, 133, 132, 130, 129,
};

/* 256 times the weights of 32 y so far below the largest, plus a half. */
INLINE words byte_exp2(words below) {
    const words f =
        _mm512_maskz_permutexvar_epi8(0xaaaaaaaaaaaaaaaa, _mm512_slli_epi16(below, 8), w_load(byte_octave));
    return _mm512_add_epi16(_mm512_srlv_epi16(f, _mm512_srli_epi16(below, 6)), _mm512_set1_epi16(0x80));
}
