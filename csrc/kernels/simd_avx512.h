/* AVX-512 vocabulary (F, BW, DQ, VL) for the templates: vectors of REAL (REAL_BITS 32 or 64), lane masks,
 * loads, exp2, transposes. "_n" loads and stores touch only the first n elements.
 * Tile shape: NV <= TILE_NV vectors of lanes times TILE_ACC / NV broadcast elements make 16 accumulators,
 * enough to hide an FMA latency of 4 cycles on 2 pipes, and leave registers for operands and exp2.
 */
#include <immintrin.h>

#define TILE_NV 4
#define TILE_ACC 16

#if REAL_BITS == 32

#    define VL 16
typedef __m512 vec;
typedef __mmask16 mask;

INLINE mask m_first(int n) { return n >= VL ? 0xffff : (mask)((1u << n) - 1); }
INLINE mask m_bits(uint64_t word, int lane) { return (mask)(word >> lane); }
INLINE vec v_zero(void) { return _mm512_setzero_ps(); }
INLINE vec v_set1(float x) { return _mm512_set1_ps(x); }
INLINE vec v_load(const float *p) { return _mm512_load_ps(p); }
INLINE vec v_loadu(const float *p) { return _mm512_loadu_ps(p); }
INLINE vec v_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(m_first(n), p); }
INLINE void v_store(float *p, vec a) { _mm512_store_ps(p, a); }
INLINE void v_storeu(float *p, vec a) { _mm512_storeu_ps(p, a); }
INLINE void v_store_n(float *p, vec a, int n) { _mm512_mask_storeu_ps(p, m_first(n), a); }
INLINE vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec v_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec v_div(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
/* b when one of them is NaN. */
INLINE vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec v_min(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec v_round(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec v_scale2(vec p, vec k) { return _mm512_scalef_ps(p, k); }
INLINE vec v_select(mask m, vec yes, vec no) { return _mm512_mask_mov_ps(no, m, yes); }
INLINE mask m_or(mask a, mask b) { return a | b; }
INLINE mask m_and(mask a, mask b) { return a & b; }
INLINE bool m_any(mask a) { return a != 0; }
INLINE mask m_greater(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
/* NaN differs from anything. */
INLINE mask m_differ(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
/* Lanes that are not within [low, high], NaN among them. */
INLINE mask m_outside(vec a, vec low, vec high) {
    return _mm512_cmp_ps_mask(a, low, _CMP_NGE_UQ) | _mm512_cmp_ps_mask(a, high, _CMP_NLE_UQ);
}
INLINE float v_sum(vec a) { return _mm512_reduce_add_ps(a); }
INLINE float v_largest(vec a) { return _mm512_reduce_max_ps(a); }

/* 2^(i/16) times 1, c1, c2 and c3: the minimax polynomial of 2^r on |r| <= 1/32, 3e-9 off at most. */
static const float exp2_table[4][16] __attribute__((aligned(64))) = {
    {1.0f, 1.044273734f, 1.090507746f, 1.138788581f, 1.189207077f, 1.241857767f, 1.296839595f, 1.354255557f,
     1.414213538f, 1.476826191f, 1.542210817f, 1.610490322f, 1.681792855f, 1.75625217f, 1.834008098f,
     1.915206552f},
    {0.6931471825f, 0.7238354087f, 0.7558823824f, 0.7893481255f, 0.8242955804f, 0.8607902527f, 0.8989006877f,
     0.938698411f, 0.9802581668f, 1.023657918f, 1.068979144f, 1.116306782f, 1.16573f, 1.217341185f,
     1.271237493f, 1.327520013f},
    {0.2402335554f, 0.250869602f, 0.2619765401f, 0.2735752463f, 0.2856874466f, 0.2983359098f, 0.3115443587f,
     0.3253376186f, 0.3397415578f, 0.3547831774f, 0.3704907894f, 0.3868938088f, 0.4040230513f, 0.4219107032f,
     0.4405902624f, 0.4600968659f},
    {0.05550508574f, 0.05796250701f, 0.06052872539f, 0.06320855767f, 0.06600704044f, 0.06892942637f,
     0.07198119164f, 0.07516807318f, 0.07849604636f, 0.08197136223f, 0.08560054004f, 0.08939040452f,
     0.09334805608f, 0.09748092294f, 0.1017967761f, 0.1063037068f}};

/* 2^y for y <= 126, relative error 1.8e-7 (less than 2^-126 off below -126, 0 from -127 down). Adding 1.5 *
 * 2^19 leaves y in sixteenths in the low bits: four of them index the table, the rest is added to the
 * exponent. Three FMAs; the other instructions run beside the FMA pipes of Zen 4. */
#    define OWN_EXP2
INLINE vec v_exp2(vec y) {
    const vec magic = v_set1(786432.0f);
    y = v_max(v_set1(-127.0f), y);
    vec t = v_add(y, magic), r = v_sub(y, v_sub(t, magic));
    __m512i i = _mm512_castps_si512(t);
    vec p = v_fma(_mm512_permutexvar_ps(i, v_load(exp2_table[3])), r,
                  _mm512_permutexvar_ps(i, v_load(exp2_table[2])));
    p = v_fma(p, r, _mm512_permutexvar_ps(i, v_load(exp2_table[1])));
    p = v_fma(p, r, _mm512_permutexvar_ps(i, v_load(exp2_table[0])));
    i = _mm512_slli_epi32(_mm512_and_si512(i, _mm512_set1_epi32(0x1ff0)), 19);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), i));
}

#    include "exp2.h"

INLINE void v_transpose(vec r[16]) {
    vec t[16];
    UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
        __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
        r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
        r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* sums[i]: the sum of the lanes of r[i], the same whatever the others are. */
INLINE void v_sum4(float sums[4], const vec r[4]) {
    vec low = v_add(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
    vec high = v_add(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
    __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
    vec x = v_add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
}

/* Half formats to float, for kernels that read them in place. */
INLINE vec v_load_f32(const float *p) { return v_loadu(p); }
INLINE vec v_load_f32_n(const float *p, int n) { return v_load_n(p, n); }
INLINE vec v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vec v_load_f16_n(const uint16_t *p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m_first(n), p));
}
INLINE vec v_from_bf16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
INLINE void v_to_f16(uint16_t *p, vec a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE vec v_load_bf16(const uint16_t *p) { return v_from_bf16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vec v_load_bf16_n(const uint16_t *p, int n) {
    return v_from_bf16(_mm256_maskz_loadu_epi16(m_first(n), p));
}

/* Byte b of each lane's four, less 128. */
INLINE vec v_code(const uint8_t *p, int b) {
    const __m512i x = _mm512_srli_epi32(_mm512_loadu_si512(p), 8 * (unsigned)b);
    return v_sub(_mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(255))), v_set1(128));
}

#else

#    define VL 8
typedef __m512d vec;
typedef __mmask8 mask;

INLINE mask m_first(int n) { return n >= VL ? 0xff : (mask)((1u << n) - 1); }
INLINE mask m_bits(uint64_t word, int lane) { return (mask)(word >> lane); }
INLINE vec v_zero(void) { return _mm512_setzero_pd(); }
INLINE vec v_set1(double x) { return _mm512_set1_pd(x); }
INLINE vec v_load(const double *p) { return _mm512_load_pd(p); }
INLINE vec v_loadu(const double *p) { return _mm512_loadu_pd(p); }
INLINE vec v_load_n(const double *p, int n) { return _mm512_maskz_loadu_pd(m_first(n), p); }
INLINE void v_store(double *p, vec a) { _mm512_store_pd(p, a); }
INLINE void v_storeu(double *p, vec a) { _mm512_storeu_pd(p, a); }
INLINE void v_store_n(double *p, vec a, int n) { _mm512_mask_storeu_pd(p, m_first(n), a); }
INLINE vec v_add(vec a, vec b) { return _mm512_add_pd(a, b); }
INLINE vec v_sub(vec a, vec b) { return _mm512_sub_pd(a, b); }
INLINE vec v_mul(vec a, vec b) { return _mm512_mul_pd(a, b); }
INLINE vec v_div(vec a, vec b) { return _mm512_div_pd(a, b); }
INLINE vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_pd(a, b, c); }
INLINE vec v_max(vec a, vec b) { return _mm512_max_pd(a, b); }
INLINE vec v_min(vec a, vec b) { return _mm512_min_pd(a, b); }
INLINE vec v_round(vec a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec v_scale2(vec p, vec k) { return _mm512_scalef_pd(p, k); }
INLINE vec v_select(mask m, vec yes, vec no) { return _mm512_mask_mov_pd(no, m, yes); }
INLINE mask m_or(mask a, mask b) { return a | b; }
INLINE mask m_and(mask a, mask b) { return a & b; }
INLINE bool m_any(mask a) { return a != 0; }
INLINE mask m_greater(vec a, vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
INLINE mask m_differ(vec a, vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_NEQ_UQ); }
INLINE mask m_outside(vec a, vec low, vec high) {
    return _mm512_cmp_pd_mask(a, low, _CMP_NGE_UQ) | _mm512_cmp_pd_mask(a, high, _CMP_NLE_UQ);
}
INLINE double v_sum(vec a) { return _mm512_reduce_add_pd(a); }
INLINE double v_largest(vec a) { return _mm512_reduce_max_pd(a); }

INLINE void v_transpose(vec r[8]) {
    vec t[8];
    UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm512_unpacklo_pd(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        r[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
        r[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
        r[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
        r[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
}

#    define EXP2_ZERO (-1080.0)
#    include "exp2.h"

INLINE void v_sum4(double sums[4], const vec r[4]) {
    vec x = v_add(_mm512_unpacklo_pd(r[0], r[1]), _mm512_unpackhi_pd(r[0], r[1]));
    vec y = v_add(_mm512_unpacklo_pd(r[2], r[3]), _mm512_unpackhi_pd(r[2], r[3]));
    __m256d low = _mm256_add_pd(_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1));
    __m256d high = _mm256_add_pd(_mm512_castpd512_pd256(y), _mm512_extractf64x4_pd(y, 1));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20),
                                         _mm256_permute2f128_pd(low, high, 0x31)));
}

INLINE vec v_load_f64(const double *p) { return v_loadu(p); }
INLINE vec v_load_f64_n(const double *p, int n) { return v_load_n(p, n); }
INLINE vec v_load_f32_wide(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
INLINE vec v_load_f32_wide_n(const float *p, int n) {
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(m_first(n), p));
}

#endif
