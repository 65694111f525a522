/* AVX2 vocabulary (with FMA and F16C) for the templates: vectors of REAL (REAL_BITS 32 or 64); a mask is a
 * vector of all-ones and all-zero lanes. "_n" loads and stores touch only the first n elements.
 * Tile shape: 8 accumulators hide an FMA latency of 4 cycles on 2 pipes within 16 registers.
 */
#include <immintrin.h>

#define TILE_NV 2
#define TILE_ACC 8

/* The first n half-precision elements, zeros behind them. */
INLINE __m128i half_first(const uint16_t *p, int n) {
    if (n >= 8) return _mm_loadu_si128((const __m128i *)p);
    uint16_t copy[8] = {0};
    memcpy(copy, p, (size_t)n * sizeof *p);
    return _mm_loadu_si128((const __m128i *)copy);
}

#if REAL_BITS == 32

#    define VL 8
typedef __m256 vec;
typedef __m256 mask;

INLINE __m256i m_index(void) { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
INLINE mask m_first(int n) {
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), m_index()));
}
INLINE mask m_bits(uint64_t word, int lane) {
    __m256i bit = _mm256_sllv_epi32(_mm256_set1_epi32(1), m_index());
    return _mm256_castsi256_ps(
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)(word >> lane)), bit), bit));
}
INLINE vec v_zero(void) { return _mm256_setzero_ps(); }
INLINE vec v_set1(float x) { return _mm256_set1_ps(x); }
INLINE vec v_load(const float *p) { return _mm256_load_ps(p); }
INLINE vec v_loadu(const float *p) { return _mm256_loadu_ps(p); }
INLINE vec v_load_n(const float *p, int n) { return _mm256_maskload_ps(p, _mm256_castps_si256(m_first(n))); }
INLINE void v_store(float *p, vec a) { _mm256_store_ps(p, a); }
INLINE void v_storeu(float *p, vec a) { _mm256_storeu_ps(p, a); }
/* A masked store costs as much as ten whole ones on Zen 4. */
INLINE void v_store_n(float *p, vec a, int n) {
    if (n >= VL)
        v_storeu(p, a);
    else
        _mm256_maskstore_ps(p, _mm256_castps_si256(m_first(n)), a);
}
INLINE vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec v_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec v_div(vec a, vec b) { return _mm256_div_ps(a, b); }
INLINE vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
/* b when one of them is NaN. */
INLINE vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec v_min(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec v_round(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* p * 2^k for integral k; exact where the result is normal, and 0 for p = 1, k = -127. */
INLINE vec v_scale2(vec p, vec k) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(k), 23)));
}
INLINE vec v_select(mask m, vec yes, vec no) { return _mm256_blendv_ps(no, yes, m); }
INLINE mask m_or(mask a, mask b) { return _mm256_or_ps(a, b); }
INLINE mask m_and(mask a, mask b) { return _mm256_and_ps(a, b); }
INLINE bool m_any(mask a) { return _mm256_movemask_ps(a) != 0; }
INLINE mask m_greater(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
/* NaN differs from anything. */
INLINE mask m_differ(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_NEQ_UQ); }
/* Lanes that are not within [low, high], NaN among them. */
INLINE mask m_outside(vec a, vec low, vec high) {
    return _mm256_or_ps(_mm256_cmp_ps(a, low, _CMP_NGE_UQ), _mm256_cmp_ps(a, high, _CMP_NLE_UQ));
}
INLINE float v_sum(vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
INLINE float v_largest(vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

#    define EXP2_ZERO (-127.0f)
#    include "exp2.h"

INLINE void v_transpose(vec r[8]) {
    vec t[8], u[8];
    UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

/* sums[i]: the sum of the lanes of r[i], the same whatever the others are. */
INLINE void v_sum4(float sums[4], const vec r[4]) {
    vec x = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

/* Half formats to float, for kernels that read them in place. */
INLINE vec v_from_bf16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
INLINE vec v_load_f32(const float *p) { return v_loadu(p); }
INLINE vec v_load_f32_n(const float *p, int n) { return v_load_n(p, n); }
INLINE vec v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec v_load_f16_n(const uint16_t *p, int n) { return _mm256_cvtph_ps(half_first(p, n)); }
INLINE void v_to_f16(uint16_t *p, vec a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE vec v_load_bf16(const uint16_t *p) { return v_from_bf16(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec v_load_bf16_n(const uint16_t *p, int n) { return v_from_bf16(half_first(p, n)); }

/* Byte b of each lane's four, less 128. */
INLINE vec v_code(const uint8_t *p, int b) {
    const __m256i x = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i *)p), 8 * b);
    return v_sub(_mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(255))), v_set1(128));
}

#else

#    define VL 4
typedef __m256d vec;
typedef __m256d mask;

INLINE __m256i m_index(void) { return _mm256_setr_epi64x(0, 1, 2, 3); }
INLINE mask m_first(int n) {
    return _mm256_castsi256_pd(_mm256_cmpgt_epi64(_mm256_set1_epi64x(n), m_index()));
}
INLINE mask m_bits(uint64_t word, int lane) {
    __m256i bit = _mm256_sllv_epi64(_mm256_set1_epi64x(1), m_index());
    return _mm256_castsi256_pd(
        _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x((int64_t)(word >> lane)), bit), bit));
}
INLINE vec v_zero(void) { return _mm256_setzero_pd(); }
INLINE vec v_set1(double x) { return _mm256_set1_pd(x); }
INLINE vec v_load(const double *p) { return _mm256_load_pd(p); }
INLINE vec v_loadu(const double *p) { return _mm256_loadu_pd(p); }
INLINE vec v_load_n(const double *p, int n) { return _mm256_maskload_pd(p, _mm256_castpd_si256(m_first(n))); }
INLINE void v_store(double *p, vec a) { _mm256_store_pd(p, a); }
INLINE void v_storeu(double *p, vec a) { _mm256_storeu_pd(p, a); }
INLINE void v_store_n(double *p, vec a, int n) {
    if (n >= VL)
        v_storeu(p, a);
    else
        _mm256_maskstore_pd(p, _mm256_castpd_si256(m_first(n)), a);
}
INLINE vec v_add(vec a, vec b) { return _mm256_add_pd(a, b); }
INLINE vec v_sub(vec a, vec b) { return _mm256_sub_pd(a, b); }
INLINE vec v_mul(vec a, vec b) { return _mm256_mul_pd(a, b); }
INLINE vec v_div(vec a, vec b) { return _mm256_div_pd(a, b); }
INLINE vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_pd(a, b, c); }
INLINE vec v_max(vec a, vec b) { return _mm256_max_pd(a, b); }
INLINE vec v_min(vec a, vec b) { return _mm256_min_pd(a, b); }
INLINE vec v_round(vec a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* p * 2^k for integral k; exact where the result is normal, and 0 for p = 1, k = -1023. */
INLINE vec v_scale2(vec p, vec k) {
    __m256i e = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(k)), 52);
    return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(p), e));
}
INLINE vec v_select(mask m, vec yes, vec no) { return _mm256_blendv_pd(no, yes, m); }
INLINE mask m_or(mask a, mask b) { return _mm256_or_pd(a, b); }
INLINE mask m_and(mask a, mask b) { return _mm256_and_pd(a, b); }
INLINE bool m_any(mask a) { return _mm256_movemask_pd(a) != 0; }
INLINE mask m_greater(vec a, vec b) { return _mm256_cmp_pd(a, b, _CMP_GT_OQ); }
INLINE mask m_differ(vec a, vec b) { return _mm256_cmp_pd(a, b, _CMP_NEQ_UQ); }
INLINE mask m_outside(vec a, vec low, vec high) {
    return _mm256_or_pd(_mm256_cmp_pd(a, low, _CMP_NGE_UQ), _mm256_cmp_pd(a, high, _CMP_NLE_UQ));
}
INLINE double v_sum(vec a) {
    __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
INLINE double v_largest(vec a) {
    __m128d x = _mm_max_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
}

#    define EXP2_ZERO (-1023.0)
#    include "exp2.h"

INLINE void v_transpose(vec r[4]) {
    vec a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
    vec c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(a, c, 0x20);
    r[1] = _mm256_permute2f128_pd(b, d, 0x20);
    r[2] = _mm256_permute2f128_pd(a, c, 0x31);
    r[3] = _mm256_permute2f128_pd(b, d, 0x31);
}

INLINE void v_sum4(double sums[4], const vec r[4]) {
    vec low = _mm256_hadd_pd(r[0], r[1]), high = _mm256_hadd_pd(r[2], r[3]);
    v_storeu(sums, v_add(_mm256_permute2f128_pd(low, high, 0x20), _mm256_permute2f128_pd(low, high, 0x31)));
}

INLINE vec v_load_f64(const double *p) { return v_loadu(p); }
INLINE vec v_load_f64_n(const double *p, int n) { return v_load_n(p, n); }
INLINE vec v_load_f32_wide(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
INLINE vec v_load_f32_wide_n(const float *p, int n) {
    const __m128i first = _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3));
    return _mm256_cvtps_pd(_mm_maskload_ps(p, first));
}

#endif
