/* Tile kernels, float, AVX-512. scores_weights is by hand: the exp2 of one group of scores runs inside the
 * FMA loop of the next one, made of instructions that leave the FMA pipes free, so that softmax costs little
 * beside the matrix products (on Zen 4 92-94 % of the FMA peak, against 87 % with one after the other at D =
 * 64).
 */
#define REAL float
#define REAL_BITS 32
#define KERNEL(op) ada_##op##_f32_avx512
#include "kernel.h"
#include "simd_avx512.h"
#define OWN_SCORES_WEIGHTS
#include "tile_tpl.h"

/* What decides whether a block's weights are good, as integers: the largest of all y above +0 orders like a
 * signed integer (a NaN or +inf is larger than any number), the lowest below -0 like an unsigned one (-inf
 * and -NaN last). */
typedef struct {
    __m512i high, low;
} range;

/* The weights of one vector of scores. */
INLINE vec weigh(vec s, vec m, range *r) {
    vec y = v_sub(s, m);
    r->high = _mm512_max_epi32(r->high, _mm512_castps_si512(y));
    r->low = _mm512_max_epu32(r->low, _mm512_castps_si512(y));
    return v_exp2(y);
}

INLINE bool in_range(range r) {
    const int gap = 0x42700000 /* 60.0f */, minus_infinity = (int)0xff800000;
    _Static_assert(ADA_LAZY_OCTAVES == 60, "gap is its bit pattern");
    return !(_mm512_cmpgt_epi32_mask(r.high, _mm512_set1_epi32(gap)) |
             _mm512_cmpge_epu32_mask(r.low, _mm512_set1_epi32(minus_infinity)));
}

/* Group g's accumulators are stored raw in p; their 16 exp2 are spread over the D steps of group g + 1. */
INLINE bool scores_weights_strip(const tile_t *t, int lane, const float *k, ptrdiff_t ldk, int n, vec l[],
                                 const int NV) {
    const int keys = TILE_ACC / NV, D = t->D;
    range r = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    vec acc[TILE_ACC];
    UNROLL for (int v = 0; v < NV; v++) l[v] = v_zero();
    scores_group(t, lane, k, ldk, 0, D, acc, NV);
    for (int j = keys; j < n; j += keys) {
        float *p = t->p + (j - keys) * ADA_LANES + lane;
        UNROLL for (int a = 0; a < TILE_ACC; a++) {
            v_store(p + a / NV * ADA_LANES + a % NV * VL, acc[a]);
            acc[a] = v_zero();
        }
        const float *kj = k + j * ldk;
        int d = 0;
        for (int i = 0; i < keys; i++) UNROLL for (int v = 0; v < NV; v++) {
                int end = (i * NV + v + 1) * D / TILE_ACC;
                for (; d < end; d++) scores_step(t, lane, kj, ldk, d, acc, NV);
                float *s = p + i * ADA_LANES + v * VL;
                vec w = weigh(v_load(s), v_load(t->m + lane + v * VL), &r);
                l[v] = v_add(l[v], w);
                v_store(s, w);
            }
    }
    UNROLL for (int a = 0; a < TILE_ACC; a++) {
        int v = a % NV;
        vec w = weigh(acc[a], v_load(t->m + lane + v * VL), &r);
        l[v] = v_add(l[v], w);
        v_store(t->p + (n - keys + a / NV) * ADA_LANES + lane + v * VL, w);
    }
    return in_range(r);
}

bool ada_scores_weights_f32_avx512(const tile_t *t, const float *k, ptrdiff_t ldk, int n) {
    if (t->D > MOST_FUSED) {
        ada_scores_f32_avx512(t, k, ldk, n);
        return ada_weights_f32_avx512(t, n, NULL, NULL, NULL);
    }
    vec l[ADA_LANES / VL];
    bool good = true;
#define STRIP(NV) good &= scores_weights_strip(t, lane, k, ldk, n, l + lane / VL, NV)
    FOR_STRIPS(t->lanes, lane, STRIP)
#undef STRIP
    if (good)
        for (int lane = 0; lane < t->lanes; lane += VL)
            v_store(t->l + lane, v_add(l[lane / VL], v_load(t->l + lane)));
    return good;
}
