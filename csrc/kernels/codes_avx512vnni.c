/* Products with codes by vpdpbusd: numbers are cut into three signed bytes, high to low, which makes them
 * integers of 23 bits and a sign. Sums of integers are exact, and the same in any order.
 */
#define REAL float
#define REAL_BITS 32
#include "kernel.h"
#include "simd_avx512.h"
typedef __m512i words;
#include "dots.h"

enum { PARTS = 3, MOST = ADA_CODES_MOST };
#define AHEAD_BYTES 4096
#define LARGEST_INTEGER 8323072.0f /* 127 * 2^16: its high byte is one still */

/* One row of n numbers, a multiple of 4, as bytes. start: what the codes' offset of 128 makes of each part.
 */
INLINE float cut(int8_t part[PARTS][MOST], int32_t start[PARTS], const float *x, int n) {
    vec largest = v_zero();
    for (int j = 0; j < n; j += VL) largest = v_max(_mm512_abs_ps(v_load_n(x + j, n - j)), largest);
    const float top = v_largest(largest);
    if (!(top >= 0x1p-100f)) {
        for (int i = 0; i < PARTS; i++) memset(part[i], 0, (size_t)(n + VL - 1) / VL * VL), start[i] = 0;
        return 0;
    }
    const vec steps = v_set1(LARGEST_INTEGER / top);
    const words half = _mm512_set1_epi32(128);
    words sums[PARTS] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int j = 0; j < n; j += VL) {
        words rest = _mm512_cvtps_epi32(v_mul(v_load_n(x + j, n - j), steps));
        UNROLL for (int i = PARTS - 1; i >= 0; i--) {
            const words next = _mm512_srai_epi32(_mm512_add_epi32(rest, half), 8);
            const words byte = i > 0 ? _mm512_sub_epi32(rest, _mm512_slli_epi32(next, 8)) : rest;
            _mm_storeu_si128((__m128i *)(part[i] + j), _mm512_cvtepi32_epi8(byte));
            sums[i] = _mm512_add_epi32(sums[i], byte);
            rest = next;
        }
    }
    UNROLL for (int i = 0; i < PARTS; i++) start[i] = -128 * _mm512_reduce_add_epi32(sums[i]);
    return top / LARGEST_INTEGER;
}

/* NV vectors of lanes of R rows. */
INLINE void multiply(float *s, ptrdiff_t lds, int8_t part[][PARTS][MOST], int32_t start[][PARTS],
                     const float *unit, const uint8_t *codes, int n, int lanes, const int R, const int NV) {
    words acc[24];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < PARTS; i++)
        UNROLL for (int v = 0; v < NV; v++) acc[(r * PARTS + i) * NV + v] = _mm512_set1_epi32(start[r][i]);
    for (int j = 0; j < n; j += 4, codes += 4 * lanes) {
        words x[4];
        UNROLL for (int v = 0; v < NV; v++) {
            __builtin_prefetch(codes + v * 64 + AHEAD_BYTES, 0, 2);
            x[v] = _mm512_loadu_si512(codes + v * 64);
            PIN(x[v]);
        }
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < PARTS; i++) {
            int32_t four;
            memcpy(&four, part[r][i] + j, sizeof four);
            const words y = _mm512_set1_epi32(four);
            UNROLL for (int v = 0; v < NV; v++) {
                words *to = &acc[(r * PARTS + i) * NV + v];
                *to = dot_i8(*to, x[v], y);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++) {
        const words *a = &acc[r * PARTS * NV + v];
        vec sum = _mm512_cvtepi32_ps(a[2 * NV]);
        sum = v_fma(_mm512_cvtepi32_ps(a[NV]), v_set1(256), sum);
        sum = v_fma(_mm512_cvtepi32_ps(a[0]), v_set1(65536), sum);
        v_storeu(s + r * lds + v * VL, v_mul(sum, v_set1(unit[r])));
    }
}

INLINE void multiply_rows(float *s, ptrdiff_t lds, const float *x, ptrdiff_t ldx, const uint8_t *codes, int n,
                          int lanes, const int R) {
    const int NV = R == 4 ? 2 : 4;
    int8_t part[ADA_ROW_GROUP][PARTS][MOST];
    int32_t start[ADA_ROW_GROUP][PARTS];
    float unit[ADA_ROW_GROUP];
    int lane = 0;
    for (int r = 0; r < R; r++) unit[r] = cut(part[r], start[r], x + r * ldx, n);
    for (; lane + NV * VL <= lanes; lane += NV * VL)
        multiply(s + lane, lds, part, start, unit, codes + 4 * lane, n, lanes, R, NV);
    for (; lane < lanes; lane += VL)
        multiply(s + lane, lds, part, start, unit, codes + 4 * lane, n, lanes, R, 1);
}

void ada_code_products_avx512vnni(float *s, ptrdiff_t lds, const float *x, ptrdiff_t ldx, int rows,
                                  const uint8_t *codes, int n, int lanes) {
    if (rows & 4) multiply_rows(s, lds, x, ldx, codes, n, lanes, 4);
    if (rows & 2) multiply_rows(s, lds, x, ldx, codes, n, lanes, 2);
    const int last = rows & 2;
    if (rows & 1) multiply_rows(s + last * lds, lds, x + last * ldx, ldx, codes, n, lanes, 1);
}
