/* Kernels of narrow operands, AVX2: packing by hand, products of bf16 in plain C. Those of integers are in
 * narrow_int_avx2.c.
 */
#include "kernel.h"
#define REAL float
#define REAL_BITS 32
#include "simd_avx2.h"
#define KERNEL(op) ada_##op##_avx2
#define OWN_INTEGERS
#define OWN_TURNS
#define OWN_REACH
#define OWN_SQUARES
#define OWN_ENCODE
#include "squares_tpl.h"
#include "narrow_tpl.h"

/* Eight words, each made of neighbouring rows' elements of one column. */
INLINE vec join_rows(const void *from, ptrdiff_t ldf, int r, int c, const int BYTES) {
    const char *at = (const char *)from + (r * (ptrdiff_t)(4 / BYTES) * ldf + c) * BYTES;
    if (BYTES == 4) return v_loadu((const float *)at);
    const int each = 4 / BYTES;
    __m256i word = _mm256_setzero_si256();
    UNROLL for (int i = 0; i < each; i++, at += ldf * BYTES) {
        const __m256i x = BYTES == 2 ? _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at))
                                     : _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at));
        word = _mm256_or_si256(word, _mm256_slli_epi32(x, 8 * BYTES * i));
    }
    return _mm256_castsi256_ps(word);
}

/* Strips of columns outside: their rows of the result, which lie far apart, are then filled one after the
 * other. */
INLINE void turn(void *to, ptrdiff_t ldt, const void *from, ptrdiff_t ldf, int rows, int columns,
                 const int BYTES) {
    for (int c = 0; c < columns; c += VL)
        for (int r = 0; r < rows * BYTES / 4; r += VL) {
            vec x[VL];
            UNROLL for (int i = 0; i < VL; i++) x[i] = join_rows(from, ldf, r + i, c, BYTES);
            v_transpose(x);
            UNROLL for (int i = 0; i < VL; i++)
                v_storeu((float *)((char *)to + (c + i) * ldt * BYTES) + r, x[i]);
        }
}

void ada_turn_8_avx2(void *to, ptrdiff_t ldt, const void *from, ptrdiff_t ldf, int rows, int columns) {
    turn(to, ldt, from, ldf, rows, columns, 1);
}
void ada_turn_16_avx2(void *to, ptrdiff_t ldt, const void *from, ptrdiff_t ldf, int rows, int columns) {
    turn(to, ldt, from, ldf, rows, columns, 2);
}
void ada_turn_32_avx2(void *to, ptrdiff_t ldt, const void *from, ptrdiff_t ldf, int rows, int columns) {
    turn(to, ldt, from, ldf, rows, columns, 4);
}

/* Elements c ... of a row, the first n at most, less a row of others or NULL. */
INLINE vec row_part(const float *row, const float *less, int c, int n) {
    const vec x = n >= VL ? v_loadu(row + c) : v_load_n(row + c, n);
    if (!less) return x;
    return v_sub(x, n >= VL ? v_loadu(less + c) : v_load_n(less + c, n));
}

float ada_reach_avx2(const float *rows, ptrdiff_t ld, int n, int width, const float *less, float *norm2) {
    __m256i largest = _mm256_setzero_si256(); /* of magnitudes */
    if (norm2) *norm2 = 0;
    for (int r = 0; r < n; r++, rows += ld) {
        vec sum = v_zero();
        for (int c = 0; c < width; c += VL) {
            const vec x = row_part(rows, less, c, width - c);
            const __m256i bits = _mm256_castps_si256(x);
            sum = v_fma(x, x, sum);
            largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
        }
        if (norm2) *norm2 = fmaxf(*norm2, v_sum(sum));
    }
    int32_t lanes[VL], most = 0;
    _mm256_storeu_si256((__m256i *)lanes, largest);
    for (int i = 0; i < VL; i++) most = lanes[i] > most ? lanes[i] : most;
    return float_from_bits((uint32_t)most);
}

void ada_row_reach_avx2(float *largest, float *norm2, const float *rows, ptrdiff_t ld, int n, int width,
                        const float *less) {
    for (int r = 0; r < n; r++) largest[r] = ada_reach_avx2(rows + r * ld, ld, 1, width, less, norm2 + r);
}

/* Eight elements of row r on their way to integers of at most most, as words. */
INLINE __m128i encode(const float *row, const float *less, const float *factor, bool by_row, int r, int c,
                      int n, float most) {
    const vec f = by_row ? v_set1(factor[r]) : n >= VL ? v_loadu(factor + c) : v_load_n(factor + c, n);
    const vec y = v_mul(row_part(row, less, c, n), f);
    const __m256i x = _mm256_cvtps_epi32(v_min(v_set1(most), v_max(v_set1(-most), y)));
    return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

INLINE void store_first(void *to, __m128i x, int bytes) {
    char copy[16];
    _mm_storeu_si128((__m128i *)copy, x);
    memcpy(to, copy, (size_t)bytes);
}

void ada_encode_i8_avx2(int8_t *to, ptrdiff_t ldt, const float *rows, ptrdiff_t ld, int n, int width,
                        const float *less, const float *factor, bool by_row) {
    for (int r = 0; r < n; r++, to += ldt, rows += ld)
        for (int c = 0; c < width; c += VL) {
            const __m128i x = encode(rows, less, factor, by_row, r, c, width - c, ADA_I8_MAX);
            const __m128i bytes = _mm_packs_epi16(x, x);
            if (width - c >= VL)
                _mm_storel_epi64((__m128i *)(to + c), bytes);
            else
                store_first(to + c, bytes, width - c);
        }
}

void ada_encode_i16_avx2(int16_t *to, ptrdiff_t ldt, const float *rows, ptrdiff_t ld, int n, int width,
                         const float *less, const float *factor, bool by_row) {
    for (int r = 0; r < n; r++, to += ldt, rows += ld)
        for (int c = 0; c < width; c += VL) {
            const __m128i x = encode(rows, less, factor, by_row, r, c, width - c, ADA_I16_MAX);
            if (width - c >= VL)
                _mm_storeu_si128((__m128i *)(to + c), x);
            else
                store_first(to + c, x, 2 * (width - c));
        }
}
