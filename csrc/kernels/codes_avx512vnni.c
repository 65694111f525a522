/* Products with codes by vpdpbusd: numbers are cut into three signed bytes, high to low, which makes them
 * integers of 23 bits and a sign. Sums of integers are exact, and the same in any order.
 */
#define REAL float
#define REAL_BITS 32
#define KERNEL(op) ada_##op##_avx512vnni
#include "kernel.h"
#include "simd_avx512.h"
typedef __m512i words;
#include "dots.h"
#include "codes_target.h"

enum { PARTS = 3 };
#define AHEAD_BYTES 10240          /* of a page of 128 coordinates, into the one after the next */
#define LARGEST_INTEGER 8323072.0f /* 127 * 2^16: its high byte is one still */

/* A row of numbers, which are integers times unit and fall: bytes [numbers / 4][PARTS][4]. */
typedef struct {
    float unit, fall;
    int32_t start[PARTS]; /* what the codes' offset of 128 makes of each part */
    int8_t parts[] __attribute__((aligned(64)));
} cut_row;

/* n numbers; those of a row of which none reaches `least` become zero. */
INLINE void cut(cut_row *to, const float *x, int n, float least) {
    const words order = _mm512_setr_epi32(0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11, 12, 13, 14, 15);
    vec largest = v_zero();
    mask bad = m_first(0);
    for (int j = 0; j < n; j += VL) {
        const vec size = _mm512_abs_ps(v_load_n(x + j, n - j));
        bad = m_or(bad, m_outside(size, v_zero(), v_set1(FLT_MAX)));
        largest = v_max(size, largest);
    }
    float top = v_largest(largest), lift = 1;
    const bool none = m_any(bad) || top < least || top == 0;
    if (none) top = 1, lift = 0;
    if (top < 0x1p-60f) lift = 0x1p60f, top *= lift;
    const vec steps = v_set1(LARGEST_INTEGER / top);
    const words half = _mm512_set1_epi32(128);
    words sums[PARTS] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int j = 0; j < n; j += VL) {
        const vec y = v_mul(v_load_n(x + j, n - j), v_set1(lift));
        words rest = none ? _mm512_setzero_si512() : _mm512_cvtps_epi32(v_mul(y, steps));
        words bytes = _mm512_setzero_si512();
        UNROLL for (int i = PARTS - 1; i >= 0; i--) {
            const words next = _mm512_srai_epi32(_mm512_add_epi32(rest, half), 8);
            const words byte = i > 0 ? _mm512_sub_epi32(rest, _mm512_slli_epi32(next, 8)) : rest;
            const __m128i narrow = _mm512_cvtepi32_epi8(byte);
            bytes = i == 2   ? _mm512_inserti32x4(bytes, narrow, 2)
                    : i == 1 ? _mm512_inserti32x4(bytes, narrow, 1)
                             : _mm512_inserti32x4(bytes, narrow, 0);
            sums[i] = _mm512_add_epi32(sums[i], byte);
            rest = next;
        }
        /* 16 bytes too many, which the next ones overwrite. */
        _mm512_storeu_si512(to->parts + PARTS * j, _mm512_permutexvar_epi32(order, bytes));
    }
    UNROLL for (int i = 0; i < PARTS; i++) to->start[i] = -128 * _mm512_reduce_add_epi32(sums[i]);
    to->unit = m_any(bad) ? NAN : none ? 0 : top / LARGEST_INTEGER, to->fall = none ? 1 : 1 / lift;
}

/* One chunk of NV vectors of lanes for R rows, which lie `apart` bytes from each other. */
INLINE void multiply(const target *t, int first, const char *rows, ptrdiff_t apart, const uint8_t *codes,
                     int n, int lane, const int R, const int NV) {
    const cut_row *row[ADA_ROW_GROUP];
    words acc[ADA_ROW_GROUP * PARTS * 2];
    UNROLL for (int r = 0; r < R; r++) {
        row[r] = (const cut_row *)(rows + r * apart);
        UNROLL for (int i = 0; i < PARTS; i++) UNROLL for (int v = 0; v < NV; v++)
            acc[(r * PARTS + i) * NV + v] = _mm512_set1_epi32(row[r]->start[i]);
    }
    for (int j = 0; j < n; j += 4, codes += 64 * NV) {
        words x[2];
        UNROLL for (int v = 0; v < NV; v++) {
            __builtin_prefetch(codes + v * 64 + AHEAD_BYTES, 0, 2);
            x[v] = _mm512_loadu_si512(codes + v * 64);
            PIN(x[v]);
        }
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < PARTS; i++) {
            int32_t four;
            memcpy(&four, row[r]->parts + PARTS * j + 4 * i, sizeof four);
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
        sum = v_mul(v_mul(sum, v_set1(row[r]->unit)), v_set1(row[r]->fall));
        finish(t, first + r, lane + v * VL, sum);
    }
}

/* Not inline: gcc 12 keeps constants of the callers in registers that the sums need. */
#define DEFINE_MULTIPLY(R, NV)                                                                               \
    static __attribute__((noinline)) void multiply_##R##_##NV(const target *t, int first, const char *rows,  \
                                                              ptrdiff_t apart, const uint8_t *codes, int n,  \
                                                              int lane) {                                    \
        multiply(t, first, rows, apart, codes, n, lane, R, NV);                                              \
    }
DEFINE_MULTIPLY(1, 1)
DEFINE_MULTIPLY(1, 2)
DEFINE_MULTIPLY(2, 1)
DEFINE_MULTIPLY(2, 2)
DEFINE_MULTIPLY(4, 1)
DEFINE_MULTIPLY(4, 2)

/* Rows that were cut before. */
INLINE void multiply_cut(const target *t, const char *rows, ptrdiff_t apart, int count, const uint8_t *codes,
                         int n, int lanes) {
    for (int lane = 0; lane < lanes; lane += ADA_CODE_CHUNK, codes += ADA_CODE_CHUNK * ((n + 3) / 4 * 4)) {
        const bool whole = lanes - lane >= ADA_CODE_CHUNK;
        const int last = count & 2;
        if (count & 4) (whole ? multiply_4_2 : multiply_4_1)(t, 0, rows, apart, codes, n, lane);
        if (count & 2) (whole ? multiply_2_2 : multiply_2_1)(t, 0, rows, apart, codes, n, lane);
        if (count & 1)
            (whole ? multiply_1_2 : multiply_1_1)(t, last, rows + last * apart, apart, codes, n, lane);
    }
}

INLINE void multiply_rows(const target *t, const float *x, ptrdiff_t ldx, int rows, const uint8_t *codes,
                          int n, int lanes) {
    char parts[ADA_ROW_GROUP * ADA_PAGE_ROW_BYTES(ADA_CODES_MOST)] __attribute__((aligned(64)));
    const ptrdiff_t apart = ADA_PAGE_ROW_BYTES(n);
    for (int r = 0; r < rows; r++) cut((cut_row *)(parts + r * apart), x + r * ldx, n, 0x1p-100f);
    multiply_cut(t, parts, apart, rows, codes, n, lanes);
}

void ada_page_rows_avx512vnni(void *to, const float *x, int rows, int D) {
    for (int r = 0; r < rows; r++) cut((cut_row *)((char *)to + r * ADA_PAGE_ROW_BYTES(D)), x + r * D, D, 0);
}

INLINE void multiply_page(const target *t, const void *x, int rows, const uint8_t *codes, int D) {
    multiply_cut(t, x, ADA_PAGE_ROW_BYTES(D), rows, codes, D, ADA_BLOCK);
}

#define OWN_PRODUCTS
#include "codes_tpl.h"
