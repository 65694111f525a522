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

/* 2^(i/16) times 1, c1 and c2, where c1 and c2 are the minimax ln 2 and (ln 2)^2 / 2 on |r| <= 1/32. */
static const float exp2_table[3][16] __attribute__((aligned(64))) = {
    {1.0f, 1.0442737340f, 1.0905077457f, 1.1387885808f, 1.1892070770f, 1.2418577671f, 1.2968395948f,
     1.3542555570f, 1.4142135381f, 1.4768261909f, 1.5422108173f, 1.6104903221f, 1.6817928552f, 1.7562521696f,
     1.8340080976f, 1.9152065515f},
    {0.6931878328f, 0.7238779067f, 0.7559266686f, 0.7893944382f, 0.8243439197f, 0.8608407378f, 0.8989533782f,
     0.9387534856f, 0.9803156256f, 1.0237178802f, 1.0690417289f, 1.1163723468f, 1.1657983064f, 1.2174125909f,
     1.2713121175f, 1.3275978565f},
    {0.2402194589f, 0.2508548796f, 0.2619611918f, 0.2735591828f, 0.2856706976f, 0.2983184158f, 0.3115260899f,
     0.3253185451f, 0.3397216200f, 0.3547623753f, 0.3704690635f, 0.3868711292f, 0.4039993584f, 0.4218859374f,
     0.4405644237f, 0.4600698947f}};

/* 2^y for y <= 126, relative error 5.4e-7 (less than 2^-126 off below -126, 0 from -127 down). Adding 1.5 *
 * 2^19 leaves y in sixteenths in the low bits: four of them index the table, the rest is added to the
 * exponent. Two FMAs; the other instructions run beside the FMA pipes of Zen 4. */
#    define OWN_EXP2
INLINE vec v_exp2(vec y) {
    const vec magic = v_set1(786432.0f);
    y = v_max(v_set1(-127.0f), y);
    vec t = v_add(y, magic), r = v_sub(y, v_sub(t, magic));
    __m512i i = _mm512_castps_si512(t);
    vec p = v_fma(_mm512_permutexvar_ps(i, v_load(exp2_table[2])), r,
                  _mm512_permutexvar_ps(i, v_load(exp2_table[1])));
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

INLINE vec v_load_f64(const double *p) { return v_loadu(p); }
INLINE vec v_load_f64_n(const double *p, int n) { return v_load_n(p, n); }

#endif
