/* Kernels of 8- and 16-bit integers by vpdpbusd and vpdpwssd (VNNI), with byte permutes (VBMI) for 2^y. */
#include "kernel.h"
#include "narrow_avx512.h"

#define NAME(op) op##_i8
#define KERNEL(op) ada_##op##_i8_avx512vnni
#define DOT dot_i8
#define ELEMENTS 4
#define INTEGER 1
#define START(keys, j) _mm512_set1_epi32((keys)->start[j])
#include "products_tpl.h"

#define NAME(op) op##_i16
#define KERNEL(op) ada_##op##_i16_avx512vnni
#define DOT dot_i16
#define ELEMENTS 2
#define INTEGER 1
#define START(keys, j) _mm512_setzero_si512()
#include "products_tpl.h"

/* Scores of two keys and the two vectors of lanes from `lane` on to y, 32 of a key in the order of packs. */
INLINE void y_bytes(int16_t *to, const words s[4], const float *unit, const float *m, int lane,
                    const uint64_t *visible, words *most) {
    vec f[4];
    UNROLL for (int a = 0; a < 4; a++) {
        const int at = lane + a % 2 * VL;
        f[a] = _mm512_fmsub_ps(_mm512_cvtepi32_ps(s[a]), v_load(unit + at), v_load(m + at));
        if (visible) f[a] = y_seen(f[a], visible + a / 2, at);
    }
    const words y0 = y_integers(f[0], f[1]), y1 = y_integers(f[2], f[3]);
    *most = _mm512_max_epi16(*most, _mm512_max_epi16(y0, y1));
    w_store(to + lane, y0);
    w_store(to + lane + ADA_LANES, y1);
}

/* Two keys against all lanes in two chains, even and odd words, as one chain each would wait for itself. */
INLINE void two_chains(words acc[16], const uint32_t *q, const uint32_t *k, ptrdiff_t DW, ptrdiff_t first,
                       ptrdiff_t end) {
    q += first * ADA_LANES;
    ptrdiff_t d = first;
    for (; d + 1 < end; d += 2, q += 2 * ADA_LANES) {
        UNROLL for (int c = 0; c < 2; c++) {
            words x[4];
            UNROLL for (int v = 0; v < 4; v++) {
                x[v] = w_load(q + c * ADA_LANES + v * VL);
                PIN(x[v]);
            }
            UNROLL for (int i = 0; i < 2; i++) {
                const words b = _mm512_set1_epi32((int)k[i * DW + d + c]);
                UNROLL for (int v = 0; v < 4; v++) acc[c * 8 + i * 4 + v] =
                    dot_i8(acc[c * 8 + i * 4 + v], x[v], b);
            }
        }
    }
    steps_i8(acc, q - d * ADA_LANES, k, DW, d, end, 2, 4);
}

INLINE void start_chains(words acc[16], const ada_narrow_keys *keys, int j) {
    start_i8(acc, keys, j, 2, 4);
    UNROLL for (int a = 8; a < 16; a++) acc[a] = _mm512_setzero_si512();
}

/* HIDDEN, here and below: some lanes do not see some keys. */
INLINE bool weigh_i8(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, const bool HIDDEN) {
    const int DW = t->DW, middle = DW / 4 * 2;
    int16_t *y = (int16_t *)t->f32.p;
    y_line line;
    words acc[16], most[2] = {LEAST_BYTES, LEAST_BYTES};
    prepare_y(&line, t, keys, n, BYTE_STEPS, 0);
    start_chains(acc, keys, 0);
    two_chains(acc, t->q, keys->k, DW, 0, DW);
    for (int j = 2; j <= n; j += 2) {
        const float *unit = line.unit[(j - 2) / ADA_BLOCK];
        const uint64_t *visible = HIDDEN ? keys->visible + j - 2 : NULL;
        const uint32_t *k = keys->k + (ptrdiff_t)j * DW;
        words low[4], high[4];
        UNROLL for (int a = 0; a < 4; a++) {
            const int at = a / 2 * 4 + a % 2;
            low[a] = _mm512_add_epi32(acc[at], acc[8 + at]);
            high[a] = _mm512_add_epi32(acc[at + 2], acc[10 + at]);
        }
        if (j < n) start_chains(acc, keys, j);
        y_bytes(y + (j - 2) * ADA_LANES, low, unit, line.m, 0, visible, &most[0]);
        if (j < n) two_chains(acc, t->q, k, DW, 0, middle);
        y_bytes(y + (j - 2) * ADA_LANES, high, unit, line.m, 2 * VL, visible, &most[1]);
        if (j < n) two_chains(acc, t->q, k, DW, middle, DW);
    }
    if (!bytes_in_range(_mm512_max_epi16(most[0], most[1]))) return false;
    weigh_bytes(t, y, n, 0, most[0]);
    weigh_bytes(t, y, n, 2 * VL, most[1]);
    return true;
}

bool ada_weigh_i8_i8_avx512vnni(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    return keys->visible ? weigh_i8(t, keys, n, true) : weigh_i8(t, keys, n, false);
}

/* Squares are products with the upper half of a weight, rounded up, as one factor has a sign. */
void ada_gauge_i8_avx512vnni(const ada_narrow_tile *t, int n, const float *reach, float *mass,
                             float *spread) {
    const words one = _mm512_set1_epi8(1), most = _mm512_set1_epi8(127);
    const uint32_t *w = t->w;
    for (int b = 0; b < n / ADA_BLOCK; b++, mass += ADA_LANES, spread += ADA_LANES) {
        words sum[4], square[4];
        UNROLL for (int v = 0; v < 4; v++) sum[v] = square[v] = _mm512_setzero_si512();
        for (int j = 0; j < ADA_BLOCK; j += 4, w += ADA_LANES) UNROLL for (int v = 0; v < 4; v++) {
                const words x = w_load(w + v * VL);
                sum[v] = dot_i8(sum[v], x, one);
                square[v] =
                    dot_i8(square[v], x, _mm512_min_epu8(_mm512_avg_epu8(x, _mm512_setzero_si512()), most));
            }
        UNROLL for (int v = 0; v < 4; v++) {
            const vec worth = v_load(t->worth + v * VL), twice = v_add(worth, worth);
            store_gauge(mass + v * VL, spread + v * VL, reach[b], v_mul(_mm512_cvtepi32_ps(sum[v]), worth),
                        v_mul(_mm512_cvtepi32_ps(square[v]), v_mul(worth, twice)));
        }
    }
}

/* ---- 16-bit weights ----
 * A first pass leaves floats, their sums and largest; a second one rounds them into pairs. */

/* The weights of one key and the vector of lanes from `lane` on, of raw sums. */
INLINE vec weigh_floats(vec s, const float *unit, const float *m, int lane, const uint64_t *visible,
                        vec *most) {
    vec y =
        _mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(s)), v_load(unit + lane), v_load(m + lane));
    if (visible) y = y_seen(y, visible, lane);
    *most = v_max(y, *most);
    return v_exp2(y);
}

INLINE void pairs(const ada_narrow_tile *t, int n, int lane, vec most, vec l) {
    const vec some = v_exp2(most);
    const vec inverse = v_min(v_min(v_div(v_set1(ADA_I16_MAX), some), v_set1(0x1p110f)),
                              v_div(v_set1(ADA_I16_WEIGHT_SUM - ADA_STRIP), l));
    words sum = _mm512_setzero_si512();
    for (int j = 0; j < n; j += 2) {
        const float *p = t->f32.p + j * ADA_LANES + lane;
        const words low = _mm512_cvtps_epi32(v_mul(v_load(p), inverse));
        const words high = _mm512_cvtps_epi32(v_mul(v_load(p + ADA_LANES), inverse));
        const words w = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        sum = dot_i16(sum, w, _mm512_set1_epi16(1));
        w_store(t->w + j / 2 * ADA_LANES + lane, w);
    }
    const vec worth = v_div(v_set1(1), inverse);
    v_store(t->worth + lane, worth);
    v_store(t->sum + lane, v_fma(_mm512_cvtepi32_ps(sum), worth, v_load(t->sum + lane)));
    v_store(t->f32.l + lane, v_add(l, v_load(t->f32.l + lane)));
}

INLINE bool weigh_i16(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, const bool HIDDEN) {
    const int DW = t->DW;
    y_line line;
    words acc[16];
    vec most[4], l[4];
    prepare_y(&line, t, keys, n, 1, 0);
    UNROLL for (int v = 0; v < 4; v++) most[v] = v_set1(-INFINITY), l[v] = v_zero();
    start_i16(acc, keys, 0, 4, 4);
    steps_i16(acc, t->q, keys->k, DW, 0, DW, 4, 4);
    for (int j = 4; j <= n; j += 4) {
        const float *unit = line.unit[(j - 4) / ADA_BLOCK];
        float *p = t->f32.p + (j - 4) * ADA_LANES;
        UNROLL for (int a = 0; a < 16; a++) w_store(p + a * VL, acc[a]);
        start_i16(acc, keys, j, 4, 4);
        for (int i = 0; i < 4; i++) {
            if (j < n)
                steps_i16(acc, t->q, keys->k + (ptrdiff_t)j * DW, DW, i * DW / 4, (i + 1) * DW / 4, 4, 4);
            UNROLL for (int v = 0; v < 4; v++) {
                float *s = p + i * ADA_LANES + v * VL;
                const vec w = weigh_floats(v_load(s), unit, line.m, v * VL,
                                           HIDDEN ? keys->visible + j - 4 + i : NULL, &most[v]);
                l[v] = v_add(l[v], w);
                v_store(s, w);
            }
        }
    }
    mask beyond = 0;
    UNROLL for (int v = 0; v < 4; v++) beyond |= m_greater(most[v], v_set1(ADA_LAZY_OCTAVES));
    if (beyond) return false;
    UNROLL for (int v = 0; v < 4; v++) pairs(t, n, v * VL, most[v], l[v]);
    return true;
}

bool ada_weigh_i16_i16_avx512vnni(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    return keys->visible ? weigh_i16(t, keys, n, true) : weigh_i16(t, keys, n, false);
}

/* The squares of a pair add up to less than 2^31. */
void ada_gauge_i16_avx512vnni(const ada_narrow_tile *t, int n, const float *reach, float *mass,
                              float *spread) {
    const words one = _mm512_set1_epi16(1), zero = _mm512_setzero_si512();
    const uint32_t *w = t->w;
    for (int b = 0; b < n / ADA_BLOCK; b++, mass += ADA_LANES, spread += ADA_LANES) {
        words sum[4];
        vec square[4];
        UNROLL for (int v = 0; v < 4; v++) sum[v] = zero, square[v] = v_zero();
        for (int j = 0; j < ADA_BLOCK; j += 2, w += ADA_LANES) UNROLL for (int v = 0; v < 4; v++) {
                const words x = w_load(w + v * VL);
                sum[v] = dot_i16(sum[v], x, one);
                square[v] = v_add(square[v], _mm512_cvtepi32_ps(dot_i16(zero, x, x)));
            }
        UNROLL for (int v = 0; v < 4; v++) {
            const vec worth = v_load(t->worth + v * VL);
            store_gauge(mass + v * VL, spread + v * VL, reach[b], v_mul(_mm512_cvtepi32_ps(sum[v]), worth),
                        v_mul(square[v], v_mul(worth, worth)));
        }
    }
}
