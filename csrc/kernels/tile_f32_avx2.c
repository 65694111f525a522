/* Tile kernels, float, AVX2 and FMA. Products are by hand for the sake of L1: what they read over and over
 * is copied together first, and scores become weights while they are in registers. On Zen 3 values run at
 * 89-95 % of the FMA peak, against 75-85 % by the template, and scores with their weights at 78-86 %, against
 * 68-77 %.
 */
#define REAL float
#define REAL_BITS 32
#define KERNEL(op) ada_##op##_f32_avx2
#include "kernel.h"
#include "simd_avx2.h"
#define OWN_SCORES_WEIGHTS
#define OWN_VALUES
#include "tile_tpl.h"

#define ROWS (TILE_ACC / 2) /* of broadcast numbers, against two vectors of lanes */

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

/* Two vectors of the lanes of a matrix are copied before they are read over and over: as they lie, 256 bytes
 * apart, they share a quarter of L1's sets, and push each other out. */
INLINE void copy_lanes(float *to, const float *from, int n) {
    for (int i = 0; i < n; i++)
        UNROLL for (int v = 0; v < 2; v++) v_store(to + (i * 2 + v) * VL,
                                                   v_load(from + i * ADA_LANES + v * VL));
}

/* Products of n rows x of two vectors with rows broadcast numbers each: step from one row to the next, ldb
 * between those of a row. */
INLINE void products(vec acc[TILE_ACC], const float *x, const float *b, ptrdiff_t step, ptrdiff_t ldb, int n,
                     const int rows) {
    UNROLL for (int a = 0; a < rows * 2; a++) acc[a] = v_zero();
    for (int j = 0; j < n; j++, x += 2 * VL, b += step) {
        vec lanes[2] = {v_load(x), v_load(x + VL)};
        PIN(lanes[0]);
        PIN(lanes[1]);
        UNROLL for (int i = 0; i < rows; i++) {
            const vec one = v_set1(b[i * ldb]);
            UNROLL for (int c = 0; c < 2; c++) acc[i * 2 + c] = v_fma(lanes[c], one, acc[i * 2 + c]);
        }
    }
}

/* The processor itself runs the exp2 of one group beside the products of the next. Spreading them by hand
 * over the products, as for AVX-512, spills registers and is slower. */
bool ada_scores_weights_f32_avx2(const tile_t *t, const float *k, ptrdiff_t ldk, int n) {
    if (t->D > CHAIN) {
        ada_scores_f32_avx2(t, k, ldk, n);
        return ada_weights_f32_avx2(t, n, NULL, NULL, NULL);
    }
    float q[CHAIN * 2 * VL] __attribute__((aligned(64)));
    vec l[ADA_LANES / VL];
    range r = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int lane = 0; lane < t->lanes; lane += 2 * VL) {
        vec *sum = l + lane / VL;
        copy_lanes(q, t->q + lane, t->D);
        sum[0] = sum[1] = v_zero();
        for (int j = 0; j < n; j += ROWS) {
            vec acc[TILE_ACC];
            products(acc, q, k + j * ldk, 1, ldk, t->D, ROWS);
            weigh(t, t->p + j * ADA_LANES, lane, acc, sum, &r);
        }
    }
    if (!in_range(r)) return false;
    for (int lane = 0; lane < t->lanes; lane += VL)
        v_store(t->l + lane, v_add(l[lane / VL], v_load(t->l + lane)));
    return true;
}

/* The block's sum is formed apart and added to o, which keeps the error from growing with the number of keys.
 */
INLINE void values_group(const tile_t *t, int lane, const float *p, const float *v, ptrdiff_t ldv, int n,
                         int e, const int rows) {
    vec acc[TILE_ACC];
    products(acc, p, v + e, ldv, 1, n, rows);
    UNROLL for (int a = 0; a < rows * 2; a++) {
        float *o = t->o + (e + a / 2) * ADA_LANES + lane + a % 2 * VL;
        v_store(o, v_add(v_load(o), acc[a]));
    }
}

void ada_values_f32_avx2(const tile_t *t, const float *v, ptrdiff_t ldv, int n) {
    float p[ADA_BLOCK * 2 * VL] __attribute__((aligned(64)));
    for (int lane = 0; lane < t->lanes; lane += 2 * VL) {
        int e = 0;
        copy_lanes(p, t->p + lane, n);
        for (; e + ROWS <= t->E; e += ROWS) values_group(t, lane, p, v, ldv, n, e, ROWS);
        for (; e < t->E; e++) values_group(t, lane, p, v, ldv, n, e, 1);
    }
}
