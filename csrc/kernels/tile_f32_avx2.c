/* Tile kernels, float, AVX2 and FMA. Two things differ from the template, by measurements on Zen 3: scores
 * become weights while they are in registers (77-86 % of the FMA peak, against 68-77 %), and nothing
 * prefetches V (values are 7-10 % faster so).
 */
#define REAL float
#define REAL_BITS 32
#define KERNEL(op) ada_##op##_f32_avx2
#include "kernel.h"
#include "simd_avx2.h"
#define OWN_SCORES_WEIGHTS
#define NO_VALUES_PREFETCH
#include "tile_tpl.h"

#define ROWS (TILE_ACC / 2) /* keys of a group, against two vectors of lanes */

/* What decides whether weights are good, as integers: the largest of all y above +0 orders like a signed
 * integer (a NaN or +inf is larger than any number), the lowest below -0 like an unsigned one (-inf and -NaN
 * last). */
typedef struct {
    __m256i high, low;
} range;

INLINE bool in_range(range r) {
    const __m256i gap = _mm256_castps_si256(v_set1(ADA_LAZY_OCTAVES));
    const __m256i lowest = _mm256_castps_si256(v_set1(-FLT_MAX));
    const __m256i high = _mm256_cmpgt_epi32(r.high, gap);
    const __m256i low = _mm256_cmpeq_epi32(_mm256_max_epu32(r.low, lowest), lowest);
    return !m_any(_mm256_castsi256_ps(high)) && _mm256_movemask_epi8(low) == -1;
}

/* Scores of four keys and two vectors of lanes to weights in p. */
INLINE void weigh(const tile_t *t, float *p, int lane, const vec acc[TILE_ACC], vec l[], range *r) {
    UNROLL for (int v = 0; v < 2; v++) {
        const vec m = v_load(t->m + lane + v * VL);
        UNROLL for (int i = 0; i < ROWS; i++) {
            const vec y = v_sub(acc[i * 2 + v], m), w = v_exp2(y);
            r->high = _mm256_max_epi32(r->high, _mm256_castps_si256(y));
            r->low = _mm256_max_epu32(r->low, _mm256_castps_si256(y));
            l[v] = v_add(l[v], w);
            v_store(p + i * ADA_LANES + lane + v * VL, w);
        }
    }
}

/* Spreading the exp2 of one group by hand over the products of the next, as for AVX-512, is slower: 16
 * registers do not hold both. */
bool ada_scores_weights_f32_avx2(const tile_t *t, const float *k, ptrdiff_t ldk, int n) {
    if (t->D > MOST_FUSED) {
        ada_scores_f32_avx2(t, k, ldk, n);
        return ada_weights_f32_avx2(t, n, NULL, NULL, NULL);
    }
    vec l[ADA_LANES / VL];
    range r = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int lane = 0; lane < t->lanes; lane += 2 * VL) {
        vec *sum = l + lane / VL;
        sum[0] = sum[1] = v_zero();
        for (int j = 0; j < n; j += ROWS) {
            vec acc[TILE_ACC];
            scores_group(t, lane, k + j * ldk, ldk, 0, t->D, acc, 2);
            weigh(t, t->p + j * ADA_LANES, lane, acc, sum, &r);
        }
    }
    if (!in_range(r)) return false;
    for (int lane = 0; lane < t->lanes; lane += VL)
        v_store(t->l + lane, v_add(l[lane / VL], v_load(t->l + lane)));
    return true;
}
