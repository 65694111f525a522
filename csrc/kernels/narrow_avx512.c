/* Kernels of narrow operands, AVX-512. */
#include "kernel.h"
#define REAL float
#define REAL_BITS 32
#include "simd_avx512.h"

#include "scaled_avx512.h"
#define KERNEL(op) ada_##op##_avx512
#define OWN_TURNS
#define OWN_REACH
#define OWN_SQUARES
#define OWN_ENCODE
#define OWN_ENCODE_BF16
#define OWN_ROUND_BF16
#define OWN_PAIR_BF16
#include "squares_tpl.h"
#include "narrow_tpl.h"

INLINE __mmask16 first_columns(int n) { return (__mmask16)(n >= 16 ? 0xffff : (1u << n) - 1); }

/* Row r of 16 words, each made of neighbouring rows' elements of one column. */
INLINE __m512i join_rows(const void *from, ptrdiff_t ldf, int r, int c, __mmask16 m, const int BYTES) {
    if (BYTES == 4) return _mm512_maskz_loadu_epi32(m, (const uint32_t *)from + r * ldf + c);
    const int each = 4 / BYTES;
    __m512i word = _mm512_setzero_si512();
    UNROLL for (int i = 0; i < each; i++) {
        const ptrdiff_t at = (r * (4 / BYTES) + i) * ldf + c;
        const __m512i x =
            BYTES == 2 ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, (const uint16_t *)from + at))
                       : _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, (const uint8_t *)from + at));
        word = _mm512_or_si512(word, _mm512_slli_epi32(x, (unsigned)(8 * BYTES * i)));
    }
    return word;
}

INLINE void turn(void *to, ptrdiff_t ldt, const void *from, ptrdiff_t ldf, int rows, int columns,
                 const int BYTES) {
    for (int r = 0; r < rows * BYTES / 4; r += 16)
        for (int c = 0; c < columns; c += 16) {
            const __mmask16 m = first_columns(columns - c);
            vec x[16];
            UNROLL for (int i = 0; i < 16; i++) x[i] =
                _mm512_castsi512_ps(join_rows(from, ldf, r + i, c, m, BYTES));
            v_transpose(x);
            for (int i = 0; i < 16 && c + i < columns; i++)
                _mm512_storeu_ps((char *)to + (c + i) * ldt * BYTES + r * 4, x[i]);
        }
}

void ada_turn_8_avx512(void *to, ptrdiff_t ldt, const void *from, ptrdiff_t ldf, int rows, int columns) {
    turn(to, ldt, from, ldf, rows, columns, 1);
}
void ada_turn_16_avx512(void *to, ptrdiff_t ldt, const void *from, ptrdiff_t ldf, int rows, int columns) {
    turn(to, ldt, from, ldf, rows, columns, 2);
}
void ada_turn_32_avx512(void *to, ptrdiff_t ldt, const void *from, ptrdiff_t ldf, int rows, int columns) {
    turn(to, ldt, from, ldf, rows, columns, 4);
}

/* |x| as an integer, which orders like the number, NaN above all. */
INLINE __m512i magnitudes(vec x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

/* Four maxima at a time, which do not wait for each other. */
float ada_reach_avx512(const float *rows, ptrdiff_t ld, int n, int width, const float *less, float *norm2) {
    __m512i most[4];
    UNROLL for (int i = 0; i < 4; i++) most[i] = _mm512_setzero_si512();
    if (norm2) *norm2 = 0;
    if (!less && !norm2 && ld == width) width *= n, n = n > 0;
    for (int r = 0; r < n; r++, rows += ld) {
        vec sum = v_zero();
        int c = 0;
        for (; c + 4 * VL <= width; c += 4 * VL) UNROLL for (int i = 0; i < 4; i++) {
                const vec x = distances(rows, less, c + i * VL, VL);
                if (norm2) sum = v_fma(x, x, sum);
                most[i] = _mm512_max_epi32(most[i], magnitudes(x));
            }
        for (; c < width; c += VL) {
            const vec x = distances(rows, less, c, width - c);
            if (norm2) sum = v_fma(x, x, sum);
            most[0] = _mm512_max_epi32(most[0], magnitudes(x));
        }
        if (norm2) *norm2 = fmaxf(*norm2, v_sum(sum));
    }
    const __m512i low = _mm512_max_epi32(most[0], most[1]), high = _mm512_max_epi32(most[2], most[3]);
    return float_from_bits((uint32_t)_mm512_reduce_max_epi32(_mm512_max_epi32(low, high)));
}

void ada_row_reach_avx512(float *largest, float *norm2, const float *rows, ptrdiff_t ld, int n, int width,
                          const float *less) {
    for (int r = 0; r < n; r++, rows += ld) {
        __m512i most = _mm512_setzero_si512();
        vec sum = v_zero();
        for (int c = 0; c < width; c += VL) {
            const vec x = distances(rows, less, c, width - c);
            sum = v_fma(x, x, sum);
            most = _mm512_max_epi32(most, magnitudes(x));
        }
        largest[r] = float_from_bits((uint32_t)_mm512_reduce_max_epi32(most));
        norm2[r] = v_sum(sum);
    }
}

INLINE __m512i to_integers(vec y, float most) {
    return _mm512_cvtps_epi32(v_min(v_set1(most), v_max(v_set1(-most), y)));
}

/* 4 / bytes vectors of integers to one of elements of `bytes` each, which hold them. */
INLINE __m512i join_integers(const __m512i x[], const int bytes) {
    const __m512i low = _mm512_packs_epi32(x[0], x[1]);
    if (bytes == 2) return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), low);
    const __m512i all = _mm512_packs_epi16(low, _mm512_packs_epi32(x[2], x[3]));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
                                    all);
}

/* To integers of at most most, of `bytes` each. */
INLINE void encode_of(char *to, ptrdiff_t ldt, const float *rows, ptrdiff_t ld, int n, int width,
                      const float *less, const float *factor, const bool by_row, const int bytes,
                      float most) {
    for (int r = 0; r < n; r++, to += ldt * bytes, rows += ld) {
        const int each = 4 / bytes;
        int c = 0;
        for (; c + each * VL <= width; c += each * VL) {
            __m512i x[4];
            UNROLL for (int i = 0; i < each; i++) x[i] =
                to_integers(scaled(rows, less, factor, by_row, r, c + i * VL, VL), most);
            _mm512_storeu_si512(to + bytes * c, join_integers(x, bytes));
        }
        for (; bytes == 1 && c + 2 * VL <= width; c += 2 * VL) {
            const __m512i x = to_integers(scaled(rows, less, factor, by_row, r, c, VL), most);
            const __m512i y = to_integers(scaled(rows, less, factor, by_row, r, c + VL, VL), most);
            const __m512i both[4] = {x, y, x, y};
            _mm256_storeu_si256((__m256i *)(to + c), _mm512_castsi512_si256(join_integers(both, 1)));
        }
        for (; c + VL <= width; c += VL) {
            const __m512i x = to_integers(scaled(rows, less, factor, by_row, r, c, VL), most);
            if (bytes == 1)
                _mm_storeu_si128((__m128i *)(to + c), _mm512_cvtepi32_epi8(x));
            else
                _mm256_storeu_si256((__m256i *)(to + 2 * c), _mm512_cvtepi32_epi16(x));
        }
        if (c == width) continue;
        const __m512i x = to_integers(scaled(rows, less, factor, by_row, r, c, width - c), most);
        if (bytes == 1)
            _mm512_mask_cvtepi32_storeu_epi8(to + c, m_first(width - c), x);
        else
            _mm512_mask_cvtepi32_storeu_epi16(to + 2 * c, m_first(width - c), x);
    }
}

/* With each way of scaling known to the compiler. */
INLINE void encode(void *to, ptrdiff_t ldt, const float *rows, ptrdiff_t ld, int n, int width,
                   const float *less, const float *factor, bool by_row, const int bytes, float most) {
    if (by_row)
        encode_of(to, ldt, rows, ld, n, width, less, factor, true, bytes, most);
    else
        encode_of(to, ldt, rows, ld, n, width, less, factor, false, bytes, most);
}

void ada_encode_i8_avx512(int8_t *to, ptrdiff_t ldt, const float *rows, ptrdiff_t ld, int n, int width,
                          const float *less, const float *factor, bool by_row) {
    encode(to, ldt, rows, ld, n, width, less, factor, by_row, 1, ADA_I8_MAX);
}

void ada_encode_i16_avx512(int16_t *to, ptrdiff_t ldt, const float *rows, ptrdiff_t ld, int n, int width,
                           const float *less, const float *factor, bool by_row) {
    encode(to, ldt, rows, ld, n, width, less, factor, by_row, 2, ADA_I16_MAX);
}

/* Bits of x rounded to bf16 in the high half; x is finite. */
INLINE __m512i bf16_bits(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000));
}

void KERNEL(encode_bf16)(uint16_t *to, ptrdiff_t ldt, ptrdiff_t part, int parts, const float *rows,
                         ptrdiff_t ld, int n, int width, const float *less, const float *factor,
                         bool by_row) {
    for (int r = 0; r < n; r++, to += ldt, rows += ld)
        for (int c = 0; c < width; c += VL) {
            vec x = scaled(rows, less, factor, by_row, r, c, width - c);
            for (int a = 0; a < parts; a++) {
                const __m512i bits = bf16_bits(x), half = _mm512_srli_epi32(bits, 16);
                uint16_t *at = to + a * part + c;
                if (width - c >= VL)
                    _mm256_storeu_si256((__m256i *)at, _mm512_cvtepi32_epi16(half));
                else
                    _mm512_mask_cvtepi32_storeu_epi16(at, m_first(width - c), half);
                x = v_sub(x, _mm512_castsi512_ps(bits));
            }
        }
}

INLINE __m512 weight_at(const float *p, bool there) {
    const __m512 x = _mm512_load_ps(p);
    return _mm512_maskz_mov_ps(there ? _mm512_cmp_ps_mask(x, _mm512_set1_ps(ADA_WEIGHTLESS), _CMP_GT_OQ) : 0,
                               x);
}

void KERNEL(round_bf16)(const ada_narrow_tile *t, int n) {
    const ptrdiff_t part = ADA_STRIP / 2 * ADA_LANES;
    for (int i = 0; i < ADA_LANES; i += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int j = 0; j < ADA_BLOCK; j += 2) {
            const float *p = t->f32.p + j * ADA_LANES + i;
            uint32_t *w = t->w + j / 2 * ADA_LANES + i;
            __m512 low = weight_at(p, j < n), high = weight_at(p + ADA_LANES, j + 1 < n);
            for (int a = 0; a < t->pv.a; a++, w += part) {
                const __m512i x = bf16_bits(low), y = bf16_bits(high);
                const __m512 first = _mm512_castsi512_ps(x), second = _mm512_castsi512_ps(y);
                _mm512_store_si512(w, _mm512_or_si512(_mm512_srli_epi32(x, 16), y));
                low = _mm512_sub_ps(low, first), high = _mm512_sub_ps(high, second);
                sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
            }
        }
        _mm512_store_ps(t->sum + i, _mm512_add_ps(_mm512_load_ps(t->sum + i), sum));
    }
}

void KERNEL(pair_bf16)(uint32_t *to, const float *rows) {
    for (int i = 0; i < ADA_LANES; i += 2, rows += 2 * ADA_BLOCK, to += ADA_BLOCK)
        for (int j = 0; j < ADA_BLOCK; j += VL) {
            const __m512i low = bf16_bits(v_loadu(rows + j)), high = bf16_bits(v_loadu(rows + ADA_BLOCK + j));
            _mm512_storeu_si512(to + j, _mm512_or_si512(_mm512_srli_epi32(low, 16), high));
        }
}
