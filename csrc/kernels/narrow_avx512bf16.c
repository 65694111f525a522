/* Kernels with bf16 products by vdpbf16ps. Scores stay in registers: two keys against four vectors of lanes,
 * whose exponentials run inside the product of the next two keys.
 */
#include <float.h>

#include "kernel.h"
#include "narrow_avx512.h"
#include "scaled_avx512.h"

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

/* Sums of integers start from this, a float's bits: what they come to, below 2^22, is a float then, that much
 * larger, and need not be converted. */
#define ABOVE 0x4b400000
#define ABOVE_FLOAT 0x1.8p23f
#define ABOVE_WORDS 64 /* keys of at most these have such sums */

typedef struct {
    y_line y;
    float above[ADA_STRIP / ADA_BLOCK][ADA_LANES] __attribute__((aligned(64))); /* m, and that times unit */
    int32_t start[ADA_STRIP] __attribute__((aligned(64)));
} above_line;

/* False when sums or y are too large for it: a quarter of a step may come off. */
INLINE bool prepare_above(above_line *x, const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    const uint64_t seen = lanes_seeing(keys, n);
    const vec most = v_set1(0x1p23f);
    mask beyond = 0;
    if (t->DW > ABOVE_WORDS) return false;
    prepare_y(&x->y, t, keys, n, ADA_BF16_STEPS, BF16_BIAS);
    for (int b = 0; b < n / ADA_BLOCK; b++)
        for (int i = 0; i < ADA_LANES; i += VL) {
            const vec unit = v_load(x->y.unit[b] + i), m = v_load(x->y.m + i);
            const vec size = v_fma(v_set1(0x1p24f), _mm512_abs_ps(unit), _mm512_abs_ps(m));
            beyond |= m_bits(seen, i) & m_outside(size, v_zero(), most);
            v_store(x->above[b] + i, v_fma(unit, v_set1(ABOVE_FLOAT), m));
        }
    for (int j = 0; j < n; j += VL)
        w_store(x->start + j,
                _mm512_add_epi32(_mm512_loadu_si512(keys->start + j), _mm512_set1_epi32(ABOVE)));
    return !beyond;
}

/* What scores are: floats in steps of y, integers, or such floats. */
typedef enum { STEPS_OF_Y, INTEGERS, ABOVE_INTEGERS } score_kind;

/* y of two keys and the two vectors of lanes from `lane` on. */
INLINE void y_of(vec y[4], const words s[4], const float *unit, const float *m, int lane,
                 const uint64_t *visible, const score_kind KIND) {
    UNROLL for (int a = 0; a < 4; a++) {
        const int at = lane + a % 2 * VL;
        const vec sum = KIND == INTEGERS ? _mm512_cvtepi32_ps(s[a]) : _mm512_castsi512_ps(s[a]);
        y[a] = KIND == STEPS_OF_Y ? v_sub(sum, v_load(m + at))
                                  : _mm512_fmsub_ps(sum, v_load(unit + at), v_load(m + at));
        if (visible) y[a] = y_seen(y[a], visible + a / 2, at);
    }
}

#define BEGIN(acc, j) (KIND == STEPS_OF_Y ? start_bf16(acc, keys, j, 2, 4) : start_i8(acc, keys, j, 2, 4))
#define STEPS(acc, j, first, end)                                                                            \
    (KIND == STEPS_OF_Y ? steps_bf16(acc, t->q, keys->k + (j)*DW, DW, first, end, 2, 4)                      \
                        : steps_i8(acc, t->q, keys->k + (j)*DW, DW, first, end, 2, 4))

typedef struct {
    words acc[8]; /* sums of the next two keys and four vectors of lanes */
    words most;   /* the largest y */
    vec l[4];
} weighing;

/* One block of keys. visible: where HIDDEN, bits of the lanes that see them. x: prepared for the kind. */
INLINE void weigh_block(weighing *s, const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, int block,
                        const above_line *x, const uint64_t *visible, const ptrdiff_t DW,
                        const score_kind KIND, const bool HIDDEN) {
    const float *unit = x->y.unit[block], *m = KIND == ABOVE_INTEGERS ? x->above[block] : x->y.m;
    words acc[8], most = s->most;
    vec l[4];
    UNROLL for (int a = 0; a < 8; a++) acc[a] = s->acc[a];
    UNROLL for (int v = 0; v < 4; v++) l[v] = s->l[v];
    for (int i = 0; i < ADA_BLOCK; i += 2) {
        const int j = block * ADA_BLOCK + i;
        const words low[4] = {acc[0], acc[1], acc[4], acc[5]}, high[4] = {acc[2], acc[3], acc[6], acc[7]};
        uint32_t *w = t->w + j / 2 * ADA_LANES;
        const bool next = j + 2 < n;
        vec y[4];
        if (next) BEGIN(acc, j + 2);
        y_of(y, low, unit, m, 0, HIDDEN ? visible + i : NULL, KIND);
        weigh_bf16(w, y, &most, l, HIDDEN, KIND == ABOVE_INTEGERS);
        if (next) STEPS(acc, j + 2, 0, DW / 2);
        y_of(y, high, unit, m, 2 * VL, HIDDEN ? visible + i : NULL, KIND);
        weigh_bf16(w + 2 * VL, y, &most, l + 2, HIDDEN, KIND == ABOVE_INTEGERS);
        if (next) STEPS(acc, j + 2, DW / 2, DW);
    }
    UNROLL for (int a = 0; a < 8; a++) s->acc[a] = acc[a];
    UNROLL for (int v = 0; v < 4; v++) s->l[v] = l[v];
    s->most = most;
}

INLINE bool weigh(const ada_narrow_tile *t, const ada_narrow_keys *all, int n, const above_line *x,
                  const ptrdiff_t DW, const score_kind KIND) {
    ada_narrow_keys k = *all, *keys = &k;
    weighing s = {.most = _mm512_setzero_si512()};
    if (KIND == ABOVE_INTEGERS) k.start = x->start;
    UNROLL for (int v = 0; v < 4; v++) s.l[v] = v_zero();
    BEGIN(s.acc, 0);
    STEPS(s.acc, 0, 0, DW);
    for (int b = 0; b < n / ADA_BLOCK; b++) {
        const uint64_t *visible = block_bits(k.visible, b);
        if (visible)
            weigh_block(&s, t, keys, n, b, x, visible, DW, KIND, true);
        else
            weigh_block(&s, t, keys, n, b, x, NULL, DW, KIND, false);
    }
    if (!bf16_in_range(s.most)) return false;
    UNROLL for (int v = 0; v < 4; v++) {
        v_store(t->f32.l + v * VL, v_add(s.l[v], v_load(t->f32.l + v * VL)));
        v_store(t->sum + v * VL, v_add(s.l[v], v_load(t->sum + v * VL)));
    }
    return true;
}

bool ada_weigh_bf16_bf16_avx512bf16(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    above_line x;
    prepare_y(&x.y, t, keys, 0, ADA_BF16_STEPS, BF16_BIAS);
    return weigh(t, keys, n, &x, t->DW, STEPS_OF_Y);
}

/* Loops of a known length pay here: D = 64 and 128. */
bool ada_weigh_i8_bf16_avx512bf16(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    above_line x;
    if (prepare_above(&x, t, keys, n))
        return t->DW == 16   ? weigh(t, keys, n, &x, 16, ABOVE_INTEGERS)
               : t->DW == 32 ? weigh(t, keys, n, &x, 32, ABOVE_INTEGERS)
                             : weigh(t, keys, n, &x, t->DW, ABOVE_INTEGERS);
    prepare_y(&x.y, t, keys, n, ADA_BF16_STEPS, BF16_BIAS);
    return weigh(t, keys, n, &x, t->DW, INTEGERS);
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

/* To bf16, those of low first; the unit rounds subnormal numbers to zero. */
INLINE words to_bf16(vec low, vec high) {
#if ADAATTN_EMULATE_BF16
    const vec x[2] = {low, high};
    __m256i half[2];
    UNROLL for (int i = 0; i < 2; i++) {
        const words bits = _mm512_castps_si512(x[i]), one = _mm512_set1_epi32(1);
        const words even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
        words y = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
        const mask subnormal = _mm512_cmp_ps_mask(_mm512_abs_ps(x[i]), v_set1(FLT_MIN), _CMP_LT_OQ);
        y = _mm512_mask_and_epi32(y, subnormal, bits, _mm512_set1_epi32(INT32_MIN));
        y = _mm512_mask_or_epi32(y, m_differ(x[i], x[i]), bits, _mm512_set1_epi32(0x400000));
        half[i] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(y, 16));
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
#else
    return (words)_mm512_cvtne2ps_pbh(high, low);
#endif
}

INLINE void encode(uint16_t *to, ptrdiff_t ldt, ptrdiff_t part, int parts, const float *rows, ptrdiff_t ld,
                   int n, int width, const float *less, const float *factor, const bool by_row) {
    for (int r = 0; r < n; r++, to += ldt, rows += ld) {
        int c = 0;
        for (; parts == 1 && c + 2 * VL <= width; c += 2 * VL) {
            const vec x = scaled(rows, less, factor, by_row, r, c, VL);
            const vec y = scaled(rows, less, factor, by_row, r, c + VL, VL);
            _mm512_storeu_si512(to + c, to_bf16(x, y));
        }
        for (; c < width; c += VL) {
            vec x = scaled(rows, less, factor, by_row, r, c, width - c);
            for (int a = 0; a < parts; a++) {
                const __m256i half = _mm512_castsi512_si256(to_bf16(x, x));
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

void ada_encode_bf16_avx512bf16(uint16_t *to, ptrdiff_t ldt, ptrdiff_t part, int parts, const float *rows,
                                ptrdiff_t ld, int n, int width, const float *less, const float *factor,
                                bool by_row) {
    if (by_row)
        encode(to, ldt, part, parts, rows, ld, n, width, less, factor, true);
    else
        encode(to, ldt, part, parts, rows, ld, n, width, less, factor, false);
}
