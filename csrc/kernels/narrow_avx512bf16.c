/* Kernels with bf16 products by vdpbf16ps. Scores stay in registers: two keys against four vectors of lanes,
 * whose exponentials run inside the product of the next two keys.
 */
#include "kernel.h"
#include "narrow_avx512.h"

#define NAME(op) op##_bf16
#define KERNEL(op) ada_##op##_bf16_avx512bf16
#define DOT dot_bf16
#define ELEMENTS 2
#define INTEGER 0
#define START(keys, j) _mm512_setzero_si512()
#include "products_tpl.h"

#define NAME(op) op##_i8
#define DOT dot_i8
#define ELEMENTS 4
#define INTEGER 1
#define START(keys, j) _mm512_set1_epi32((keys)->start[j])
#include "products_tpl.h"

/* y of two keys and the two vectors of lanes from `lane` on. bf16 scores come in steps of y. */
INLINE void y_of(vec y[4], const words s[4], const float *unit, const float *m, int lane,
                 const uint64_t *visible, const bool INTEGERS) {
    UNROLL for (int a = 0; a < 4; a++) {
        const int at = lane + a % 2 * VL;
        y[a] = INTEGERS ? _mm512_fmsub_ps(_mm512_cvtepi32_ps(s[a]), v_load(unit + at), v_load(m + at))
                        : v_sub(_mm512_castsi512_ps(s[a]), v_load(m + at));
        if (visible) y[a] = y_seen(y[a], visible + a / 2, at);
    }
}

/* HIDDEN: some lanes do not see some keys. */
INLINE bool weigh(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, const ptrdiff_t DW,
                  const bool INTEGERS, const bool HIDDEN) {
    y_line line;
    words acc[8], most = _mm512_setzero_si512();
    vec l[4];
    prepare_y(&line, t, keys, INTEGERS ? n : 0, ADA_BF16_STEPS, BF16_BIAS);
    UNROLL for (int v = 0; v < 4; v++) l[v] = v_zero();
#define BEGIN(j) (INTEGERS ? start_i8(acc, keys, j, 2, 4) : start_bf16(acc, keys, j, 2, 4))
#define STEPS(first, end)                                                                                    \
    (INTEGERS ? steps_i8(acc, t->q, k, DW, first, end, 2, 4) : steps_bf16(acc, t->q, k, DW, first, end, 2, 4))
    const uint32_t *k = keys->k;
    BEGIN(0);
    STEPS(0, DW);
    for (int j = 2; j <= n; j += 2) {
        const float *unit = line.unit[(j - 2) / ADA_BLOCK];
        const uint64_t *visible = HIDDEN ? keys->visible + j - 2 : NULL;
        const words low[4] = {acc[0], acc[1], acc[4], acc[5]}, high[4] = {acc[2], acc[3], acc[6], acc[7]};
        uint32_t *w = t->w + (j - 2) / 2 * ADA_LANES;
        vec y[4];
        k = keys->k + j * DW;
        if (j < n) BEGIN(j);
        y_of(y, low, unit, line.m, 0, visible, INTEGERS);
        weigh_bf16(w, y, &most, l, HIDDEN);
        if (j < n) STEPS(0, DW / 2);
        y_of(y, high, unit, line.m, 2 * VL, visible, INTEGERS);
        weigh_bf16(w + 2 * VL, y, &most, l + 2, HIDDEN);
        if (j < n) STEPS(DW / 2, DW);
    }
#undef BEGIN
#undef STEPS
    if (!bf16_in_range(most)) return false;
    UNROLL for (int v = 0; v < 4; v++) {
        v_store(t->f32.l + v * VL, v_add(l[v], v_load(t->f32.l + v * VL)));
        v_store(t->sum + v * VL, v_add(l[v], v_load(t->sum + v * VL)));
    }
    return true;
}

bool ada_weigh_bf16_bf16_avx512bf16(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    return keys->visible ? weigh(t, keys, n, t->DW, false, true) : weigh(t, keys, n, t->DW, false, false);
}

/* Loops of a known length pay here: D = 64 and 128. */
bool ada_weigh_i8_bf16_avx512bf16(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    if (keys->visible) return weigh(t, keys, n, t->DW, true, true);
    return t->DW == 16   ? weigh(t, keys, n, 16, true, false)
           : t->DW == 32 ? weigh(t, keys, n, 32, true, false)
                         : weigh(t, keys, n, t->DW, true, false);
}

void ada_gauge_bf16_avx512bf16(const ada_narrow_tile *t, int n, const float *reach, float *mass,
                               float *spread) {
    const words one = _mm512_set1_epi16(0x3f80);
    const uint32_t *w = t->w;
    for (int b = 0; b < n / ADA_BLOCK; b++, mass += ADA_LANES, spread += ADA_LANES) {
        words sum[4], square[4];
        UNROLL for (int v = 0; v < 4; v++) sum[v] = square[v] = _mm512_setzero_si512();
        for (int j = 0; j < ADA_BLOCK; j += 2, w += ADA_LANES) UNROLL for (int v = 0; v < 4; v++) {
                const words x = w_load(w + v * VL);
                sum[v] = dot_bf16(sum[v], x, one);
                square[v] = dot_bf16(square[v], x, x);
            }
        UNROLL for (int v = 0; v < 4; v++)
            store_gauge(mass + v * VL, spread + v * VL, reach[b], _mm512_castsi512_ps(sum[v]),
                        _mm512_castsi512_ps(square[v]));
    }
}

/* 16 elements from c on, or the last n, of row r on their way to bf16. */
INLINE vec scaled(const float *row, const float *less, const float *factor, bool by_row, int r, int c,
                  int n) {
    const __mmask16 m = m_first(n);
    vec x = n >= VL ? v_loadu(row + c) : _mm512_maskz_loadu_ps(m, row + c);
    if (less) x = v_sub(x, n >= VL ? v_loadu(less + c) : _mm512_maskz_loadu_ps(m, less + c));
    if (by_row) return v_mul(x, v_set1(factor[r]));
    return v_mul(x, n >= VL ? v_loadu(factor + c) : _mm512_maskz_loadu_ps(m, factor + c));
}

INLINE void encode(uint16_t *to, ptrdiff_t ldt, ptrdiff_t part, int parts, const float *rows, ptrdiff_t ld,
                   int n, int width, const float *less, const float *factor, const bool by_row) {
    for (int r = 0; r < n; r++, to += ldt, rows += ld) {
        int c = 0;
        for (; parts == 1 && c + 2 * VL <= width; c += 2 * VL) {
            const vec x = scaled(rows, less, factor, by_row, r, c, VL);
            const vec y = scaled(rows, less, factor, by_row, r, c + VL, VL);
            _mm512_storeu_si512(to + c, (__m512i)_mm512_cvtne2ps_pbh(y, x));
        }
        for (; c < width; c += VL) {
            vec x = scaled(rows, less, factor, by_row, r, c, width - c);
            for (int a = 0; a < parts; a++) {
                const __m256i half = (__m256i)_mm512_cvtneps_pbh(x);
                uint16_t *at = to + a * part + c;
                if (width - c >= VL)
                    _mm256_storeu_si256((__m256i *)at, half);
                else
                    _mm256_mask_storeu_epi16(at, m_first(width - c), half);
                x = v_sub(x, v_from_bf16(half));
            }
        }
    }
}

/* The unit rounds subnormal numbers to zero. */
void ada_encode_bf16_avx512bf16(uint16_t *to, ptrdiff_t ldt, ptrdiff_t part, int parts, const float *rows,
                                ptrdiff_t ld, int n, int width, const float *less, const float *factor,
                                bool by_row) {
    if (by_row)
        encode(to, ldt, part, parts, rows, ld, n, width, less, factor, true);
    else
        encode(to, ldt, part, parts, rows, ld, n, width, less, factor, false);
}
