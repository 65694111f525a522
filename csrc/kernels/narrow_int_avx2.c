/* Kernels of 16- and 8-bit integers on AVX2 by vpmaddwd, two a cycle on Zen 3 and on Intel's since Haswell:
 * with the addition that each needs, 1.6 times the multiply-adds of fp32. Bytes are widened on the way:
 * vpmaddubsw saturates, and to keep it exact takes as many instructions as that, so 8 bits win nothing over
 * 16.
 */
#include "kernel.h"
#define REAL float
#define REAL_BITS 32
#include "simd_avx2.h"

typedef __m256i words;

INLINE words w_load(const void *p) { return _mm256_load_si256(p); }
INLINE void w_store(void *p, words a) { _mm256_store_si256(p, a); }

/* To acc the products of 16-bit pairs, lane by lane. */
INLINE words dot(words acc, words lanes, words b) {
    const words product = _mm256_madd_epi16(lanes, b);
    __asm__ volatile("vpaddd %1, %0, %0" : "+x"(acc) : "x"(product));
    return acc;
}

/* By hand to keep the products in order: gcc 12 moves those of the intrinsic before all additions and
 * spills. */
INLINE words broadcast(const uint32_t *p) {
    words x;
    __asm__("vpbroadcastd %1, %0" : "=x"(x) : "m"(*p));
    return x;
}

/* ---- products ----
 * A group is ROWS rows of broadcast words (keys, or coordinates of values) against two vectors of lanes. */

#define ROWS 4
#define GROUP (ROWS * 2)
#define CHUNK 64 /* quads of a row that are widened at once, to stay in L1 */

/* To acc the products of n words of 16-bit pairs; ldx and ldb are strides in words. */
INLINE void steps(words acc[GROUP], const uint32_t *x, ptrdiff_t ldx, const uint32_t *b, ptrdiff_t ldb,
                  ptrdiff_t n) {
    for (ptrdiff_t d = 0; d < n; d++, x += ldx, b++) {
        words lanes[2] = {w_load(x), w_load(x + VL)};
        PIN(lanes[0]);
        PIN(lanes[1]);
        UNROLL for (int i = 0; i < ROWS; i++) {
            const words one = broadcast(b + i * ldb);
            UNROLL for (int v = 0; v < 2; v++) acc[i * 2 + v] = dot(acc[i * 2 + v], lanes[v], one);
        }
    }
}

/* Signed bytes 0 and 2, 1 and 3 of quads as pairs of words. */
INLINE words even_bytes(words x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
INLINE words odd_bytes(words x) { return _mm256_srai_epi16(x, 8); }

/* Quads, at most CHUNK of a row. */
typedef struct {
    uint32_t even[ROWS][CHUNK], odd[ROWS][CHUNK];
} wide_rows __attribute__((aligned(64)));

INLINE void widen(wide_rows *to, const uint32_t *b, ptrdiff_t ldb, int n) {
    for (int i = 0; i < ROWS; i++, b += ldb)
        for (int d = 0; d < n; d += VL) {
            uint32_t copy[VL] = {0};
            words x;
            if (n - d >= VL) {
                x = _mm256_loadu_si256((const __m256i *)(b + d));
            } else {
                memcpy(copy, b + d, (size_t)(n - d) * sizeof *b);
                x = _mm256_loadu_si256((const __m256i *)copy);
            }
            w_store(to->even[i] + d, even_bytes(x));
            w_store(to->odd[i] + d, odd_bytes(x));
        }
}

/* To acc the products of n words: unsigned quads in the lanes, signed ones in the rows. */
INLINE void steps_i8(words acc[GROUP], const uint32_t *x, ptrdiff_t ldx, const uint32_t *b, ptrdiff_t ldb,
                     ptrdiff_t n) {
    wide_rows rows;
    for (; n > 0; n -= CHUNK, b += CHUNK) {
        const int some = n < CHUNK ? (int)n : CHUNK;
        widen(&rows, b, ldb, some);
        for (int d = 0; d < some; d++, x += ldx)
            UNROLL for (int odd = 0; odd < 2; odd++) {
                words lanes[2] = {w_load(x), w_load(x + VL)};
                UNROLL for (int v = 0; v < 2; v++) {
                    lanes[v] = odd ? _mm256_srli_epi16(lanes[v], 8)
                                   : _mm256_and_si256(lanes[v], _mm256_set1_epi16(0xff));
                    PIN(lanes[v]);
                }
                UNROLL for (int i = 0; i < ROWS; i++) {
                    const words one = broadcast((odd ? rows.odd[i] : rows.even[i]) + d);
                    UNROLL for (int v = 0; v < 2; v++) acc[i * 2 + v] = dot(acc[i * 2 + v], lanes[v], one);
                }
            }
    }
}

INLINE void products(words acc[GROUP], const uint32_t *x, ptrdiff_t ldx, const uint32_t *b, ptrdiff_t ldb,
                     ptrdiff_t n, const bool BYTES) {
    if (BYTES)
        steps_i8(acc, x, ldx, b, ldb, n);
    else
        steps(acc, x, ldx, b, ldb, n);
}

INLINE void scores(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, const bool BYTES) {
    for (int j = 0; j < n; j += ROWS)
        for (int lane = 0; lane < t->f32.lanes; lane += 2 * VL) {
            words acc[GROUP];
            UNROLL for (int a = 0; a < GROUP; a++) acc[a] =
                _mm256_set1_epi32(BYTES ? keys->start[j + a / 2] : 0);
            products(acc, t->q + lane, ADA_LANES, keys->k + (ptrdiff_t)j * t->DW, t->DW, t->DW, BYTES);
            UNROLL for (int a = 0; a < GROUP; a++) {
                const int at = lane + a % 2 * VL;
                const vec unit = v_mul(v_load(t->unit + at), v_set1(keys->scale[0]));
                v_store(t->f32.p + (j + a / 2) * ADA_LANES + at,
                        v_fma(_mm256_cvtepi32_ps(acc[a]), unit, v_load(t->offset + at)));
            }
        }
}

void ada_scores_i16_avx2(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    scores(t, keys, n, false);
}
void ada_scores_i8_avx2(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    scores(t, keys, n, true);
}

/* Two vectors of lanes of w are copied first: as they lie, 256 bytes apart, they share a quarter of L1's sets
 * and push each other out. Rows of zeros behind the last coordinate count. */
INLINE void values(const ada_narrow_tile *t, const uint32_t *v, int n, const bool BYTES) {
    const int elements = BYTES ? 4 : 2, ldv = ADA_STRIP / elements, width = n / elements, E = t->f32.E;
    uint32_t w[ADA_STRIP / 2 * 2 * VL] __attribute__((aligned(64)));
    for (int lane = 0; lane < t->f32.lanes; lane += 2 * VL) {
        for (int j = 0; j < width; j++)
            UNROLL for (int x = 0; x < 2; x++) w_store(w + (j * 2 + x) * VL,
                                                       w_load(t->w + j * ADA_LANES + lane + x * VL));
        for (int e = 0; e < E; e += ROWS) {
            words acc[GROUP];
            UNROLL for (int a = 0; a < GROUP; a++) acc[a] = _mm256_setzero_si256();
            products(acc, w, 2 * VL, v + e * ldv, ldv, width, BYTES);
            UNROLL for (int a = 0; a < GROUP; a++) {
                const int at = lane + a % 2 * VL;
                float *o = t->f32.o + (e + a / 2) * ADA_LANES + at;
                v_store(o, v_fma(_mm256_cvtepi32_ps(acc[a]), v_load(t->worth + at), v_load(o)));
            }
        }
    }
}

void ada_values_i16_avx2(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n) {
    (void)part;
    values(t, v, n, false);
}
void ada_values_i8_avx2(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n) {
    (void)part;
    values(t, v, n, true);
}

/* ---- rounding ---- */

/* The weight of key j < n, or zero, times inverse to the nearest integer below 2^16, in the low half. */
INLINE words rounded(const float *p, int j, int n, vec inverse) {
    const vec x = j < n ? v_load(p + j * ADA_LANES) : v_zero();
    return _mm256_castps_si256(v_fma(x, inverse, v_set1(0x1p23f)));
}

INLINE words join_halves(words low, words high) {
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
}

INLINE words add_pairs(words sum, words w) {
    return dot(sum, w, _mm256_set1_epi16(1));
}

/* Eight lanes of n keys' weights to words, zeros up to end; sets worth and adds to sum. */
INLINE void round_pairs(const ada_narrow_tile *t, int n, int end, int lane, vec inverse, vec worth) {
    words sum = _mm256_setzero_si256();
    for (int j = 0; j < end; j += 2) {
        const float *p = t->f32.p + lane;
        const words w = join_halves(rounded(p, j, n, inverse), rounded(p, j + 1, n, inverse));
        sum = add_pairs(sum, w);
        w_store(t->w + j / 2 * ADA_LANES + lane, w);
    }
    v_store(t->worth + lane, worth);
    v_store(t->sum + lane, v_fma(_mm256_cvtepi32_ps(sum), worth, v_load(t->sum + lane)));
}

INLINE void round_quads(const ada_narrow_tile *t, int n, int lane, vec inverse, vec worth) {
    words sum = _mm256_setzero_si256();
    for (int j = 0; j < ADA_BLOCK; j += 4) {
        const float *p = t->f32.p + lane;
        const words even = join_halves(rounded(p, j, n, inverse), rounded(p, j + 2, n, inverse));
        const words odd = join_halves(rounded(p, j + 1, n, inverse), rounded(p, j + 3, n, inverse));
        sum = add_pairs(sum, _mm256_add_epi16(even, odd));
        w_store(t->w + j / 4 * ADA_LANES + lane, _mm256_or_si256(even, _mm256_slli_epi16(odd, 8)));
    }
    v_store(t->worth + lane, worth);
    v_store(t->sum + lane, v_fma(_mm256_cvtepi32_ps(sum), worth, v_load(t->sum + lane)));
}

/* The largest weight of eight lanes and their sum. */
INLINE void survey(const float *p, int n, vec *largest, vec *sum) {
    *largest = *sum = v_zero();
    for (int j = 0; j < n; j++) {
        const vec x = v_load(p + j * ADA_LANES);
        *largest = v_max(x, *largest);
        *sum = v_add(*sum, x);
    }
}

void ada_round_i16_avx2(const ada_narrow_tile *t, int n) {
    for (int lane = 0; lane < t->f32.lanes; lane += VL) {
        vec largest, sum;
        survey(t->f32.p + lane, n, &largest, &sum);
        const mask some = m_greater(largest, v_set1(ADA_WEIGHTLESS));
        const vec inverse = v_min(v_div(v_set1(ADA_I16_MAX), largest),
                                  v_div(v_set1(ADA_I16_WEIGHT_SUM - ADA_STRIP), sum));
        round_pairs(t, n, ADA_BLOCK, lane, v_select(some, inverse, v_zero()),
                    v_select(some, v_div(v_set1(1), inverse), v_zero()));
    }
}

void ada_round_i8_avx2(const ada_narrow_tile *t, int n) {
    for (int lane = 0; lane < t->f32.lanes; lane += VL) {
        vec largest, sum;
        survey(t->f32.p + lane, n, &largest, &sum);
        const mask some = m_greater(largest, v_set1(ADA_WEIGHTLESS));
        const vec inverse = v_div(v_set1(ADA_U8_MAX), largest);
        round_quads(t, n, lane, v_select(some, inverse, v_zero()),
                    v_select(some, v_mul(largest, v_set1(1.0f / ADA_U8_MAX)), v_zero()));
    }
}

/* ---- scores and weights in one, 16 bits ----
 * A first pass leaves floats, their sums and largest; a second one rounds them into pairs. */

/* Of the lanes: unit times the scale of each key block, the reference less the offset; then what the weights
 * come to. */
typedef struct {
    float unit[ADA_STRIP / ADA_BLOCK][ADA_LANES], m[ADA_LANES];
    float most[ADA_LANES] /* of y */, l[ADA_LANES];
} lines __attribute__((aligned(64)));

INLINE void prepare(lines *x, const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    for (int i = 0; i < ADA_LANES; i += VL) {
        for (int b = 0; b < n / ADA_BLOCK; b++)
            v_store(x->unit[b] + i, v_mul(v_load(t->unit + i), v_set1(keys->scale[b])));
        v_store(x->m + i, v_sub(v_load(t->f32.m + i), v_load(t->offset + i)));
        v_store(x->most + i, v_set1(-INFINITY));
        v_store(x->l + i, v_zero());
    }
}

/* 2^y with a relative error of 1.5e-7, in fewer steps than v_exp2. */
INLINE vec exp2_short(vec y) {
    static const float c[] = {0.001326472875f, 0.009671513182f, 0.05550733745f, 0.2402224208f,
                              0.6931469776f,   1};
    const vec magic = v_set1(0x1.8p23f), z = v_add(v_max(v_set1(EXP2_ZERO), y), magic);
    const vec r = v_sub(v_max(v_set1(EXP2_ZERO), y), v_sub(z, magic));
    vec p = v_set1(c[0]);
    UNROLL for (int i = 1; i < 6; i++) p = v_fma(p, r, v_set1(c[i]));
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(z), 23)));
}

/* Sums of ROWS keys and two vectors of lanes to weights in p. */
INLINE void weigh(float *p, const words acc[GROUP], const float *unit, lines *x, int lane) {
    UNROLL for (int v = 0; v < 2; v++) {
        const int at = lane + v * VL;
        vec most = v_load(x->most + at), l = v_load(x->l + at);
        UNROLL for (int i = 0; i < ROWS; i++) {
            const vec s = _mm256_cvtepi32_ps(acc[i * 2 + v]);
            const vec y = _mm256_fmsub_ps(s, v_load(unit + at), v_load(x->m + at));
            const vec w = exp2_short(y);
            most = v_max(y, most);
            l = v_add(l, w);
            v_store(p + i * ADA_LANES + at, w);
        }
        v_store(x->most + at, most);
        v_store(x->l + at, l);
    }
}

bool ada_weigh_i16_i16_avx2(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    lines x;
    prepare(&x, t, keys, n);
    for (int j = 0; j < n; j += ROWS)
        for (int lane = 0; lane < ADA_LANES; lane += 2 * VL) {
            words acc[GROUP];
            UNROLL for (int a = 0; a < GROUP; a++) acc[a] = _mm256_setzero_si256();
            steps(acc, t->q + lane, ADA_LANES, keys->k + (ptrdiff_t)j * t->DW, t->DW, t->DW);
            weigh(t->f32.p + j * ADA_LANES, acc, x.unit[j / ADA_BLOCK], &x, lane);
        }
    mask beyond = v_zero();
    for (int i = 0; i < ADA_LANES; i += VL)
        beyond = m_or(beyond, m_greater(v_load(x.most + i), v_set1(ADA_LAZY_OCTAVES)));
    if (m_any(beyond)) return false;
    for (int i = 0; i < ADA_LANES; i += VL) {
        const vec l = v_load(x.l + i), some = v_exp2(v_load(x.most + i));
        const vec inverse = v_min(v_min(v_div(v_set1(ADA_I16_MAX), some), v_set1(0x1p110f)),
                                  v_div(v_set1(ADA_I16_WEIGHT_SUM - ADA_STRIP), l));
        round_pairs(t, n, n, i, inverse, v_div(v_set1(1), inverse));
        v_store(t->f32.l + i, v_add(l, v_load(t->f32.l + i)));
    }
    return true;
}
