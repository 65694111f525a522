/* Kernels of narrow operands in plain C, in loops over lanes or columns that compilers vectorise: the oracle
 * of kernels_narrow.h and, compiled for each ISA, what serves where a unit is missing. The including file
 * defines KERNEL(op), and OWN_... for what it has by hand.
 */
#include "half.h"

/* Rounds to nearest even where |x| < 2^22; cheap in any instruction set. */
static inline int32_t nearest_int(float x) {
    return (int32_t)(bits_of_float(x + 0x1.8p23f) - bits_of_float(0x1.8p23f));
}

static inline float low_half(uint32_t word) { return float_from_bits(word << 16); }
static inline float high_half(uint32_t word) { return float_from_bits(word & 0xffff0000); }

void KERNEL(scores_bf16)(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    for (int j = 0; j < n; j++) {
        float sum[ADA_LANES] = {0}, *p = t->f32.p + j * ADA_LANES;
        for (int a = 0; a < t->qk.a; a++)
            for (int b = 0; b < t->qk.b && a + b < t->qk.terms; b++) {
                const uint32_t *q = t->q + (ptrdiff_t)a * t->DW * ADA_LANES;
                const uint32_t *k = keys->k + b * keys->part + (ptrdiff_t)j * t->DW;
                for (int d = 0; d < t->DW; d++, q += ADA_LANES)
                    for (int i = 0; i < ADA_LANES; i++)
                        sum[i] += low_half(q[i]) * low_half(k[d]) + high_half(q[i]) * high_half(k[d]);
            }
        for (int i = 0; i < ADA_LANES; i++) p[i] = sum[i] * t->unit[i] + t->offset[i];
    }
}

#ifndef OWN_INTEGERS
static inline void scaled_scores(const ada_narrow_tile *t, float *p, const int32_t *sum, float scale) {
    for (int i = 0; i < ADA_LANES; i++) p[i] = (float)sum[i] * (t->unit[i] * scale) + t->offset[i];
}

void KERNEL(scores_i8)(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    for (int j = 0; j < n; j++) {
        int32_t sum[ADA_LANES];
        for (int i = 0; i < ADA_LANES; i++) sum[i] = keys->start[j];
        for (int d = 0; d < t->DW; d++) {
            const uint32_t *q = t->q + d * ADA_LANES;
            const int8_t *k = (const int8_t *)(keys->k + (ptrdiff_t)j * t->DW + d);
            for (int i = 0; i < ADA_LANES; i++)
                sum[i] += (int32_t)(q[i] & 255) * k[0] + (int32_t)(q[i] >> 8 & 255) * k[1] +
                          (int32_t)(q[i] >> 16 & 255) * k[2] + (int32_t)(q[i] >> 24) * k[3];
        }
        scaled_scores(t, t->f32.p + j * ADA_LANES, sum, keys->scale[0]);
    }
}

void KERNEL(scores_i16)(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    for (int j = 0; j < n; j++) {
        uint32_t sum[ADA_LANES] = {0}; /* may wrap on the way, not in the end */
        for (int d = 0; d < t->DW; d++) {
            const uint32_t *q = t->q + d * ADA_LANES;
            const int16_t *k = (const int16_t *)(keys->k + (ptrdiff_t)j * t->DW + d);
            for (int i = 0; i < ADA_LANES; i++)
                sum[i] += (uint32_t)((int32_t)(int16_t)q[i] * k[0]) +
                          (uint32_t)((int32_t)(q[i] & 0xffff0000) / 65536 * k[1]);
        }
        scaled_scores(t, t->f32.p + j * ADA_LANES, (const int32_t *)sum, keys->scale[0]);
    }
}
#endif

#ifndef OWN_ROUND_BF16
void KERNEL(round_bf16)(const ada_narrow_tile *t, int n) {
    const ptrdiff_t part = ADA_STRIP / 2 * ADA_LANES;
    float sum[ADA_LANES] = {0};
    for (int j = 0; j < ADA_BLOCK; j++) {
        uint16_t *w = (uint16_t *)(t->w + j / 2 * ADA_LANES) + j % 2;
        for (int i = 0; i < ADA_LANES; i++) {
            const float p = j < n ? t->f32.p[j * ADA_LANES + i] : 0;
            float rest = p > ADA_WEIGHTLESS ? p : 0;
            for (int a = 0; a < t->pv.a; a++) {
                uint16_t bits = bf16_from_float(rest);
                w[2 * (a * part + i)] = bits;
                rest -= float_from_bf16(bits);
                sum[i] += float_from_bf16(bits);
            }
        }
    }
    for (int i = 0; i < ADA_LANES; i++) t->sum[i] += sum[i];
}
#endif

#ifndef OWN_INTEGERS
/* The largest weight of each lane and their sum. */
static inline void survey_weights(const ada_narrow_tile *t, int n, float *largest, float *sum) {
    for (int i = 0; i < ADA_LANES; i++) largest[i] = sum[i] = 0;
    for (int j = 0; j < n; j++)
        for (int i = 0; i < ADA_LANES; i++) {
            const float p = t->f32.p[j * ADA_LANES + i];
            largest[i] = p > largest[i] ? p : largest[i];
            sum[i] += p;
        }
}

void KERNEL(round_i8)(const ada_narrow_tile *t, int n) {
    const int lanes = t->f32.lanes; /* others may hold anything */
    float largest[ADA_LANES], sum[ADA_LANES], inverse[ADA_LANES];
    int32_t total[ADA_LANES] = {0};
    survey_weights(t, n, largest, sum);
    for (int i = 0; i < lanes; i++) {
        const bool some = largest[i] > ADA_WEIGHTLESS;
        inverse[i] = some ? ADA_U8_MAX / largest[i] : 0;
        t->worth[i] = some ? largest[i] / ADA_U8_MAX : 0;
    }
    for (int j = 0; j < ADA_BLOCK; j += 4) {
        uint32_t *w = t->w + j / 4 * ADA_LANES;
        for (int i = 0; i < lanes; i++) {
            uint32_t word = 0;
            for (int c = 0; c < 4 && j + c < n; c++) {
                const int32_t x = nearest_int(t->f32.p[(j + c) * ADA_LANES + i] * inverse[i]);
                word |= (uint32_t)x << 8 * c;
                total[i] += x;
            }
            w[i] = word;
        }
    }
    for (int i = 0; i < lanes; i++) t->sum[i] += (float)total[i] * t->worth[i];
}

void KERNEL(round_i16)(const ada_narrow_tile *t, int n) {
    const int lanes = t->f32.lanes; /* others may hold anything */
    float largest[ADA_LANES], sum[ADA_LANES], inverse[ADA_LANES];
    int32_t total[ADA_LANES] = {0};
    survey_weights(t, n, largest, sum);
    for (int i = 0; i < lanes; i++) {
        const bool some = largest[i] > ADA_WEIGHTLESS;
        const float a = ADA_I16_MAX / largest[i], b = (ADA_I16_WEIGHT_SUM - ADA_STRIP) / sum[i];
        inverse[i] = some ? (a < b ? a : b) : 0;
        t->worth[i] = some ? 1 / inverse[i] : 0;
    }
    for (int j = 0; j < ADA_BLOCK; j += 2) {
        uint32_t *w = t->w + j / 2 * ADA_LANES;
        const float *p = t->f32.p + j * ADA_LANES;
        for (int i = 0; i < lanes; i++) {
            const int32_t low = j < n ? nearest_int(p[i] * inverse[i]) : 0;
            const int32_t high = j + 1 < n ? nearest_int(p[ADA_LANES + i] * inverse[i]) : 0;
            w[i] = (uint32_t)low | (uint32_t)high << 16;
            total[i] += low + high;
        }
    }
    for (int i = 0; i < lanes; i++) t->sum[i] += (float)total[i] * t->worth[i];
}
#endif

void KERNEL(values_bf16)(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n) {
    for (int e = 0; e < t->f32.E; e++, v += ADA_STRIP / 2) {
        float sum[ADA_LANES] = {0}, *o = t->f32.o + e * ADA_LANES;
        for (int a = 0; a < t->pv.a; a++)
            for (int b = 0; b < t->pv.b && a + b < t->pv.terms; b++) {
                const uint32_t *w = t->w + (ptrdiff_t)a * (ADA_STRIP / 2 * ADA_LANES), *x = v + b * part;
                for (int j = 0; j < (n + 1) / 2; j++, w += ADA_LANES)
                    for (int i = 0; i < ADA_LANES; i++)
                        sum[i] += low_half(w[i]) * low_half(x[j]) + high_half(w[i]) * high_half(x[j]);
            }
        for (int i = 0; i < ADA_LANES; i++) o[i] += sum[i];
    }
}

#ifndef OWN_INTEGERS
void KERNEL(values_i8)(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n) {
    (void)part;
    for (int e = 0; e < t->f32.E; e++, v += ADA_STRIP / 4) {
        int32_t sum[ADA_LANES] = {0};
        float *o = t->f32.o + e * ADA_LANES;
        for (int j = 0; j < (n + 3) / 4; j++) {
            const uint32_t *w = t->w + j * ADA_LANES;
            const int8_t *x = (const int8_t *)(v + j);
            for (int i = 0; i < ADA_LANES; i++)
                sum[i] += (int32_t)(w[i] & 255) * x[0] + (int32_t)(w[i] >> 8 & 255) * x[1] +
                          (int32_t)(w[i] >> 16 & 255) * x[2] + (int32_t)(w[i] >> 24) * x[3];
        }
        for (int i = 0; i < ADA_LANES; i++) o[i] += (float)sum[i] * t->worth[i];
    }
}

void KERNEL(values_i16)(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n) {
    const int lanes = t->f32.lanes; /* others may hold anything */
    (void)part;
    for (int e = 0; e < t->f32.E; e++, v += ADA_STRIP / 2) {
        int32_t sum[ADA_LANES] = {0};
        float *o = t->f32.o + e * ADA_LANES;
        for (int j = 0; j < (n + 1) / 2; j++) {
            const uint32_t *w = t->w + j * ADA_LANES;
            const int16_t *x = (const int16_t *)(v + j);
            for (int i = 0; i < lanes; i++)
                sum[i] += (int32_t)(w[i] & 0xffff) * x[0] + (int32_t)(w[i] >> 16) * x[1];
        }
        for (int i = 0; i < lanes; i++) o[i] += (float)sum[i] * t->worth[i];
    }
}
#endif

#ifndef OWN_ENCODE_BF16
/* Whether less is NULL is known to the compiler, which would else load from there under an empty mask: that
 * takes the processor's slow path. */
static inline __attribute__((always_inline)) void encode_bf16_of(uint16_t *to, ptrdiff_t ldt, ptrdiff_t part,
                                                                 int parts, const float *rows, ptrdiff_t ld,
                                                                 int n, int width, const float *less,
                                                                 const float *factor, bool by_row) {
    for (int r = 0; r < n; r++)
        for (int a = 0; a < parts; a++) {
            uint16_t *at = to + a * part + r * ldt;
            for (int c = 0; c < width; c++) {
                float x = (rows[r * ld + c] - (less ? less[c] : 0)) * factor[by_row ? r : c];
                for (int before = 0; before < a; before++) x -= float_from_bf16(at[c + (before - a) * part]);
                at[c] = bf16_from_float(x);
            }
        }
}

void KERNEL(encode_bf16)(uint16_t *to, ptrdiff_t ldt, ptrdiff_t part, int parts, const float *rows,
                         ptrdiff_t ld, int n, int width, const float *less, const float *factor,
                         bool by_row) {
    if (less)
        encode_bf16_of(to, ldt, part, parts, rows, ld, n, width, less, factor, by_row);
    else
        encode_bf16_of(to, ldt, part, parts, rows, ld, n, width, NULL, factor, by_row);
}
#endif

#ifndef OWN_PAIR_BF16
void KERNEL(pair_bf16)(uint32_t *to, const float *rows) {
    for (int i = 0; i < ADA_LANES; i += 2, rows += 2 * ADA_BLOCK, to += ADA_BLOCK)
        for (int j = 0; j < ADA_BLOCK; j++)
            to[j] = bf16_from_float(rows[j]) | (uint32_t)bf16_from_float(rows[ADA_BLOCK + j]) << 16;
}
#endif

#ifndef OWN_ENCODE
#    define ENCODE_INTEGERS(op, type, most)                                                                  \
        void KERNEL(op)(type * to, ptrdiff_t ldt, const float *rows, ptrdiff_t ld, int n, int width,         \
                        const float *less, const float *factor, bool by_row) {                               \
            for (int r = 0; r < n; r++, to += ldt, rows += ld)                                               \
                for (int c = 0; c < width; c++) {                                                            \
                    float x = (rows[c] - (less ? less[c] : 0)) * factor[by_row ? r : c];                     \
                    x = x < -(most) ? -(most) : x > (most) ? (most) : x;                                     \
                    to[c] = (type)nearest_int(x);                                                            \
                }                                                                                            \
        }
ENCODE_INTEGERS(encode_i8, int8_t, (float)ADA_I8_MAX)
ENCODE_INTEGERS(encode_i16, int16_t, (float)ADA_I16_MAX)
#endif

#ifndef OWN_TURNS
#    define TURN(op, type)                                                                                   \
        void KERNEL(op)(void *to, ptrdiff_t ldt, const void *from, ptrdiff_t ldf, int rows, int columns) {   \
            for (int c = 0; c < columns; c++)                                                                \
                for (int r = 0; r < rows; r++)                                                               \
                    ((type *)to)[c * ldt + r] = ((const type *)from)[r * ldf + c];                           \
        }
TURN(turn_8, uint8_t)
TURN(turn_16, uint16_t)
TURN(turn_32, uint32_t)
#endif

/* As integers the bits of |x| order like the numbers, NaN above all. */
static inline int32_t magnitude(float x) { return (int32_t)(bits_of_float(x) & 0x7fffffff); }
static inline int32_t larger_int(int32_t a, int32_t b) { return a > b ? a : b; }

/* Four rows at a time, so that what they are added to is read and written once. */
void KERNEL(columns)(float *sum, float *largest, const float *rows, ptrdiff_t ld, int n, int width) {
    int32_t *most = (int32_t *)largest; /* positive floats */
    int r = 0;
    for (; r + 4 <= n; r += 4, rows += 4 * ld) {
        const float *a = rows, *b = a + ld, *x = b + ld, *y = x + ld;
        for (int c = 0; c < width; c++) {
            const int32_t ab = larger_int(magnitude(a[c]), magnitude(b[c]));
            const int32_t xy = larger_int(magnitude(x[c]), magnitude(y[c]));
            sum[c] += (a[c] + b[c]) + (x[c] + y[c]);
            most[c] = larger_int(most[c], larger_int(ab, xy));
        }
    }
    for (; r < n; r++, rows += ld)
        for (int c = 0; c < width; c++) {
            sum[c] += rows[c];
            most[c] = larger_int(most[c], magnitude(rows[c]));
        }
}

#ifndef OWN_REACH
float KERNEL(reach)(const float *rows, ptrdiff_t ld, int n, int width, const float *less, float *norm2) {
    int32_t largest = 0;
    if (norm2) *norm2 = 0;
    for (int r = 0; r < n; r++, rows += ld) {
        float sum = 0;
        for (int c = 0; c < width; c++) {
            const float x = rows[c] - (less ? less[c] : 0);
            largest = magnitude(x) > largest ? magnitude(x) : largest;
            sum += x * x;
        }
        if (norm2) *norm2 = sum > *norm2 ? sum : *norm2;
    }
    return float_from_bits((uint32_t)largest);
}

void KERNEL(row_reach)(float *largest, float *norm2, const float *rows, ptrdiff_t ld, int n, int width,
                       const float *less) {
    for (int r = 0; r < n; r++) largest[r] = KERNEL(reach)(rows + r * ld, ld, 1, width, less, norm2 + r);
}
#endif

#ifndef OWN_SQUARES
/* 8 floats in the compiler's own vectors, as it does not make them of sums in an array. */
typedef float floats8 __attribute__((vector_size(32), aligned(4), may_alias));

static inline float sum_of_floats8(floats8 x) {
    return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

/* n rows; what is NULL is known to the compiler. */
static inline __attribute__((always_inline)) void squares_of(float *norm2, float *square, const float *rows,
                                                             ptrdiff_t ld, int n, int width,
                                                             const float *less, const float *weight) {
    const int whole = width / 16 * 16;
    for (int r = 0; r < n; r++, rows += ld) {
        floats8 sums[2] = {{0}, {0}};
        float rest = 0;
        for (int c = 0; c < whole; c += 16)
            for (int half = 0; half < 2; half++) {
                const int at = c + 8 * half;
                floats8 x = *(const floats8 *)(rows + at);
                if (less) x -= *(const floats8 *)(less + at);
                x *= x;
                if (square) *(floats8 *)(square + at) += x;
                if (weight) x *= *(const floats8 *)(weight + at);
                sums[half] += x;
            }
        for (int c = whole; c < width; c++) {
            const float x = less ? rows[c] - less[c] : rows[c], x2 = x * x;
            if (square) square[c] += x2;
            rest += weight ? weight[c] * x2 : x2;
        }
        norm2[r] = sum_of_floats8(sums[0] + sums[1]) + rest;
    }
}
#endif

float KERNEL(stand_in)(float *sum, float *apart, const float *x, const float *weight, float joint) {
    float part[16] = {0}, total = 0;
    for (int i = 0; i < ADA_LANES; i += 16)
        for (int j = i; j < i + 16; j++) {
            sum[j] += x[j];
            apart[j] += x[j] * x[j];
            part[j - i] += weight[j] * ((1 - joint) * apart[j] + joint * (sum[j] * sum[j]));
        }
    for (int i = 0; i < 16; i++) total += part[i];
    return total;
}

void KERNEL(squares)(float *norm2, float *square, const float *rows, ptrdiff_t ld, int n, int width,
                     const float *less, const float *weight) {
    if (less && square && !weight)
        squares_of(norm2, square, rows, ld, n, width, less, NULL);
    else if (!less && !square && !weight)
        squares_of(norm2, NULL, rows, ld, n, width, NULL, NULL);
    else if (!less && !square)
        squares_of(norm2, NULL, rows, ld, n, width, NULL, weight);
    else
        squares_of(norm2, square, rows, ld, n, width, less, weight);
}

void KERNEL(scale_channels)(const ada_tile_f32 *t, const float *unit) {
    const int E = t->E;
    float *o = t->o;
    for (int e = 0; e < E; e++, o += ADA_LANES) {
        const float x = unit[e]; /* or the compiler fears that o changes it */
        for (int i = 0; i < ADA_LANES; i++) o[i] *= x;
    }
}

/* log2(x) for x > 0 to 1e-3, some number for 0. */
static inline float rough_log2(float x) {
    const uint32_t bits = bits_of_float(x);
    const float octave = (float)((int32_t)(bits >> 23) - 127);
    const float m = float_from_bits((bits & 0x7fffff) | 0x3f800000);
    return octave - 2.1536207f + m * (3.0478842f + m * (-1.0518750f + m * 0.1582487f));
}

float KERNEL(row_sums)(ada_row_sums *sums, const float *p, const float *dots, const float *norm2,
                       const float *value2, float out2, float step, float var8, float var16) {
    float mass[ADA_PARTS] = {0}, p2[ADA_PARTS] = {0}, p2d[ADA_PARTS] = {0}, total = 0;
    for (int j = 0; j < ADA_BLOCK; j += ADA_PARTS)
        for (int i = 0; i < ADA_PARTS; i++) {
            const float w = p[j + i], w2 = w * w, apart = value2[j + i] - 2 * dots[j + i] + out2;
            const float d = apart > 0 ? apart : 0;
            mass[i] += w;
            p2[i] += w2;
            p2d[i] += w2 * d;
            sums->p2d_norm[i] += w2 * d * norm2[j + i];
            sums->p2_norm[i] += w2 * norm2[j + i];
            sums->p2v[i] += w2 * value2[j + i];
            sums->pv[i] += w * value2[j + i];
            sums->round8[i] += (w2 < var8 ? w2 : var8) * d;
            sums->round16[i] += (w2 < var16 ? w2 : var16) * d;
            sums->dropped[i] += w2 < 3 * var8 ? w : 0;
            sums->plog[i] += w * rough_log2(w);
        }
    for (int i = 0; i < ADA_PARTS; i++) {
        sums->p2[i] += p2[i], sums->p2_step[i] += p2[i] * step;
        sums->p2d[i] += p2d[i], sums->p2d_step[i] += p2d[i] * step;
        total += mass[i];
    }
    return total;
}
