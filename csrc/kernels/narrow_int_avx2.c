/* Kernels of 16- and 8-bit integers on AVX2 by vpmaddwd, two a cycle on Zen 3: with the addition that each
 * needs, 1.6 times the multiply-adds of fp32. Bytes are widened on the way: vpmaddubsw saturates, and to keep
 * it exact takes as many instructions, so 8 bits win nothing over 16.
 */
#include "kernel.h"
#define REAL float
#define REAL_BITS 32
#include "simd_avx2.h"

typedef __m256i words;

INLINE words w_load(const void *p) { return _mm256_load_si256(p); }
INLINE void w_store(void *p, words a) { _mm256_store_si256(p, a); }

/* To acc the products of 16-bit pairs, lane by lane. With the intrinsic of the addition gcc 12 moves all
 * products before all additions, and spills the accumulators. */
INLINE words dot(words acc, words lanes, words b) {
    const words product = _mm256_madd_epi16(lanes, b);
    __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(product));
    return acc;
}

/* ---- products ----
 * A group is ROWS rows of broadcast words (keys, or coordinates of values) against two vectors of lanes. */

#define ROWS 4
#define GROUP (ROWS * 2)
#define CHUNK 64 /* quads of a row that are widened at once, to stay in L1 */

/* To acc the products of n words of 16-bit pairs; ldx and ldb are strides in words. */
INLINE void steps_i16(words acc[GROUP], const uint32_t *x, ptrdiff_t ldx, const uint32_t *b, ptrdiff_t ldb,
                      ptrdiff_t n) {
    for (ptrdiff_t d = 0; d < n; d++, x += ldx, b++) {
        words lanes[2] = {w_load(x), w_load(x + VL)};
        PIN(lanes[0]);
        PIN(lanes[1]);
        UNROLL for (int i = 0; i < ROWS; i++) {
            const words one = _mm256_set1_epi32((int)b[i * ldb]);
            UNROLL for (int v = 0; v < 2; v++) acc[i * 2 + v] = dot(acc[i * 2 + v], lanes[v], one);
        }
    }
}

/* Quads of up to CHUNK words of ROWS rows as signed pairs: of bytes 0 and 2, and of bytes 1 and 3. */
typedef struct {
    uint32_t pairs[2][ROWS][CHUNK];
} wide_rows __attribute__((aligned(64)));

INLINE void widen(wide_rows *to, const uint32_t *b, ptrdiff_t ldb, int n) {
    for (int i = 0; i < ROWS; i++, b += ldb)
        for (int d = 0; d < n; d += VL) {
            uint32_t some[VL] = {0};
            const uint32_t *from = b + d;
            if (n - d < VL) from = memcpy(some, from, (size_t)(n - d) * sizeof *b);
            const words x = _mm256_loadu_si256((const __m256i *)from);
            w_store(to->pairs[0][i] + d, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
            w_store(to->pairs[1][i] + d, _mm256_srai_epi16(x, 8));
        }
}

/* To acc the products of n words: unsigned quads in the lanes, signed ones in the rows. */
INLINE void steps_i8(words acc[GROUP], const uint32_t *x, ptrdiff_t ldx, const uint32_t *b, ptrdiff_t ldb,
                     ptrdiff_t n) {
    wide_rows rows;
    for (; n > 0; n -= CHUNK, b += CHUNK) {
        const int some = n < CHUNK ? (int)n : CHUNK;
        widen(&rows, b, ldb, some);
        for (int d = 0; d < some; d++, x += ldx) UNROLL for (int odd = 0; odd < 2; odd++) {
                words lanes[2] = {w_load(x), w_load(x + VL)};
                UNROLL for (int v = 0; v < 2; v++) {
                    lanes[v] = odd ? _mm256_srli_epi16(lanes[v], 8)
                                   : _mm256_and_si256(lanes[v], _mm256_set1_epi16(0xff));
                    PIN(lanes[v]);
                }
                UNROLL for (int i = 0; i < ROWS; i++) {
                    const words one = _mm256_set1_epi32((int)rows.pairs[odd][i][d]);
                    UNROLL for (int v = 0; v < 2; v++) acc[i * 2 + v] = dot(acc[i * 2 + v], lanes[v], one);
                }
            }
    }
}

INLINE void steps(words acc[GROUP], const uint32_t *x, ptrdiff_t ldx, const uint32_t *b, ptrdiff_t ldb,
                  ptrdiff_t n, const bool BYTES) {
    if (BYTES)
        steps_i8(acc, x, ldx, b, ldb, n);
    else
        steps_i16(acc, x, ldx, b, ldb, n);
}

/* Keys j ... against lanes lane ... */
INLINE void scores_group(const ada_narrow_tile *t, const ada_narrow_keys *keys, int j, int lane,
                         words acc[GROUP], const bool BYTES) {
    const uint32_t *k = keys->k + (ptrdiff_t)j * t->DW;
    UNROLL for (int a = 0; a < GROUP; a++) acc[a] = _mm256_set1_epi32(BYTES ? keys->start[j + a / 2] : 0);
    steps(acc, t->q + lane, ADA_LANES, k, t->DW, t->DW, BYTES);
}

INLINE void scores(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, const bool BYTES) {
    for (int j = 0; j < n; j += ROWS)
        for (int lane = 0; lane < t->f32.lanes; lane += 2 * VL) {
            words acc[GROUP];
            scores_group(t, keys, j, lane, acc, BYTES);
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

/* Two vectors of lanes of w are copied first, from rows 256 bytes apart: 3 to 6 % faster on Zen 3. Rows of
 * zeros behind the last coordinate are added too. */
INLINE void values(const ada_narrow_tile *t, const uint32_t *v, int n, const bool BYTES) {
    const int elements = BYTES ? 4 : 2, ldv = ADA_STRIP / elements, width = n / elements, E = t->f32.E;
    uint32_t w[ADA_STRIP / 2 * 2 * VL] __attribute__((aligned(64)));
    for (int lane = 0; lane < t->f32.lanes; lane += 2 * VL) {
        for (int j = 0; j < width; j++)
            UNROLL for (int x = 0; x < 2; x++)
                w_store(w + (j * 2 + x) * VL, w_load(t->w + j * ADA_LANES + lane + x * VL));
        for (int e = 0; e < E; e += ROWS) {
            words acc[GROUP];
            UNROLL for (int a = 0; a < GROUP; a++) acc[a] = _mm256_setzero_si256();
            steps(acc, w, 2 * VL, v + e * ldv, ldv, width, BYTES);
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

/* NV vectors of lanes of n keys' weights to words, zeros up to end; inverse is that of worth. Sets worth and
 * adds to sum. */
INLINE void round_lanes(const ada_narrow_tile *t, int n, int end, int lane, const float *inverse,
                        const bool BYTES, const int NV) {
    const int keys = BYTES ? 4 : 2;
    const words ones = _mm256_set1_epi16(1);
    words sum[ADA_LANES / VL];
    UNROLL for (int v = 0; v < NV; v++) sum[v] = _mm256_setzero_si256();
    for (int j = 0; j < end; j += keys) UNROLL for (int v = 0; v < NV; v++) {
            const float *p = t->f32.p + lane + v * VL;
            const vec f = v_load(inverse + v * VL);
            words w = join_halves(rounded(p, j, n, f), rounded(p, j + keys / 2, n, f)), all = w;
            if (BYTES) {
                const words odd = join_halves(rounded(p, j + 1, n, f), rounded(p, j + 3, n, f));
                all = _mm256_add_epi16(w, odd);
                w = _mm256_or_si256(w, _mm256_slli_epi16(odd, 8));
            }
            sum[v] = dot(sum[v], all, ones);
            w_store(t->w + j / keys * ADA_LANES + lane + v * VL, w);
        }
    UNROLL for (int v = 0; v < NV; v++) {
        const int at = lane + v * VL;
        const vec f = v_load(inverse + v * VL);
        const vec worth = v_select(m_greater(f, v_zero()), v_div(v_set1(1), f), v_zero());
        v_store(t->worth + at, worth);
        v_store(t->sum + at, v_fma(_mm256_cvtepi32_ps(sum[v]), worth, v_load(t->sum + at)));
    }
}

/* What brings weights of which largest is one, and that sum to sum, to the format's range. */
INLINE vec finest(vec largest, vec sum, const bool BYTES) {
    if (BYTES) return v_div(v_set1(ADA_U8_MAX), largest);
    return v_min(v_div(v_set1(ADA_I16_MAX), largest), v_div(v_set1(ADA_I16_WEIGHT_SUM - ADA_STRIP), sum));
}

INLINE void round_block(const ada_narrow_tile *t, int n, const bool BYTES) {
    float inverse[VL] __attribute__((aligned(64)));
    for (int lane = 0; lane < t->f32.lanes; lane += VL) {
        vec largest = v_zero(), sum = v_zero();
        for (int j = 0; j < n; j++) {
            const vec x = v_load(t->f32.p + j * ADA_LANES + lane);
            largest = v_max(x, largest);
            sum = v_add(sum, x);
        }
        const mask some = m_greater(largest, v_set1(ADA_WEIGHTLESS));
        v_store(inverse, v_select(some, finest(largest, sum, BYTES), v_zero()));
        round_lanes(t, n, ADA_BLOCK, lane, inverse, BYTES, 1);
    }
}

void ada_round_i16_avx2(const ada_narrow_tile *t, int n) { round_block(t, n, false); }
void ada_round_i8_avx2(const ada_narrow_tile *t, int n) { round_block(t, n, true); }

/* ---- scores and weights in one ----
 * A first pass leaves floats, their sums and largest; a second one rounds them. */

/* Of the lanes: unit times the scale of each key block, the reference less the offset; then what the weights
 * come to. */
typedef struct {
    float unit[ADA_STRIP / ADA_BLOCK][ADA_LANES], m[ADA_LANES];
    float most[ADA_LANES] /* of the exponents */, l[ADA_LANES];
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
    static const float c[] = {0.001326472875f, 0.009671513182f, 0.05550733745f,
                              0.2402224208f,   0.6931469776f,   1};
    const vec magic = v_set1(0x1.8p23f); /* adding it rounds to an integer in the low bits */
    y = v_max(v_set1(EXP2_ZERO), y);
    const vec k = v_add(y, magic), r = v_sub(y, v_sub(k, magic));
    vec p = v_set1(c[0]);
    UNROLL for (int i = 1; i < 6; i++) p = v_fma(p, r, v_set1(c[i]));
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(k), 23)));
}

/* Sums of ROWS keys and eight lanes, every second one of acc, to weights in p. */
INLINE void weigh(float *p, const words *acc, const float *unit, lines *x, int lane,
                  const uint64_t *visible) {
    vec most = v_load(x->most + lane), l = v_load(x->l + lane);
    UNROLL for (int i = 0; i < ROWS; i++) {
        const vec s = _mm256_cvtepi32_ps(acc[i * 2]);
        vec y = _mm256_fmsub_ps(s, v_load(unit + lane), v_load(x->m + lane));
        if (visible) y = v_select(m_bits(visible[i], lane), y, v_set1(-INFINITY));
        const vec w = exp2_short(y);
        most = v_max(y, most);
        l = v_add(l, w);
        v_store(p + i * ADA_LANES + lane, w);
    }
    v_store(x->most + lane, most);
    v_store(x->l + lane, l);
}

INLINE bool weigh_strip(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n, const bool BYTES) {
    lines x;
    mask beyond = v_zero();
    prepare(&x, t, keys, n);
    for (int j = 0; j < n; j += ROWS)
        for (int lane = 0; lane < ADA_LANES; lane += 2 * VL) {
            words acc[GROUP];
            scores_group(t, keys, j, lane, acc, BYTES);
            UNROLL for (int v = 0; v < 2; v++)
                weigh(t->f32.p + j * ADA_LANES, acc + v, x.unit[j / ADA_BLOCK], &x, lane + v * VL,
                      keys->visible ? keys->visible + j : NULL);
        }
    for (int i = 0; i < ADA_LANES; i += VL)
        beyond = m_or(beyond, m_greater(v_load(x.most + i), v_set1(ADA_LAZY_OCTAVES)));
    if (m_any(beyond)) return false;
    for (int i = 0; i < ADA_LANES; i += VL) {
        const vec l = v_load(x.l + i), largest = v_exp2(v_load(x.most + i));
        v_store(x.m + i, v_min(finest(largest, l, BYTES), v_set1(0x1p110f)));
        v_store(t->f32.l + i, v_add(l, v_load(t->f32.l + i)));
    }
    round_lanes(t, n, n, 0, x.m, BYTES, ADA_LANES / VL);
    return true;
}

bool ada_weigh_i16_i16_avx2(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    return weigh_strip(t, keys, n, false);
}
bool ada_weigh_i8_i8_avx2(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    return weigh_strip(t, keys, n, true);
}

/* ---- what weights come to in a block ----
 * The squares of a pair add up to less than 2^31. */

void ada_gauge_i16_avx2(const ada_narrow_tile *t, int n, const float *reach, float *mass, float *spread) {
    enum { NV = 4 };
    const words ones = _mm256_set1_epi16(1);
    for (int b = 0; b < n / ADA_BLOCK; b++, mass += ADA_LANES, spread += ADA_LANES)
        for (int lane = 0; lane < ADA_LANES; lane += NV * VL) {
            const uint32_t *w = t->w + b * (ADA_BLOCK / 2) * ADA_LANES + lane;
            words sum[NV];
            vec square[NV];
            UNROLL for (int v = 0; v < NV; v++) sum[v] = _mm256_setzero_si256(), square[v] = v_zero();
            for (int j = 0; j < ADA_BLOCK; j += 2, w += ADA_LANES) UNROLL for (int v = 0; v < NV; v++) {
                    const words x = w_load(w + v * VL);
                    sum[v] = dot(sum[v], x, ones);
                    square[v] = v_add(square[v], _mm256_cvtepi32_ps(_mm256_madd_epi16(x, x)));
                }
            UNROLL for (int v = 0; v < NV; v++) {
                const int at = lane + v * VL;
                const vec worth = v_load(t->worth + at), all = _mm256_cvtepi32_ps(sum[v]);
                const vec rest = v_sub(square[v], v_mul(v_mul(all, v_set1(1.0f / ADA_BLOCK)), all));
                v_store(mass + at, v_mul(all, worth));
                v_store(spread + at,
                        v_mul(_mm256_sqrt_ps(v_max(v_zero(), rest)), v_mul(worth, v_set1(reach[b]))));
            }
        }
}
