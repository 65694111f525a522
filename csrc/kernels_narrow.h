/* Slots whose products are of narrow operands: bf16, 8- and 16-bit integers. Included by kernels.h.
 *
 * Operands are words: 32 bits that hold 2 or 4 neighbouring elements, the first one lowest. Sums run along
 * the words, so keys and values lie as the tiles of a matrix unit want them: K [keys][DW] with the head in
 * words, V transposed, [E][keys in words]; Q and the weights have words of all lanes side by side. A bf16
 * operand may have several parts, high to low, that add up to a wider number; of a product of parts (a, b)
 * those with a + b < terms are computed.
 */
#define ADA_STRIP 256 /* keys whose weights enter the second product at once; integers then become floats */

/* Largest elements: a sum of products of ADA_STRIP of them stays inside int32, as does that of a query and a
 * key whose norms (16 bits) are at most ADA_I16_NORM, by Cauchy and Schwarz. */
#define ADA_I8_MAX 127
#define ADA_U8_MAX 255
#define ADA_I16_MAX 32767
#define ADA_I16_NORM 46000.0f
#define ADA_I16_VALUE_MAX 8191
#define ADA_I16_WEIGHT_SUM 262000.0f /* of a strip: times ADA_I16_VALUE_MAX it is below 2^31 */

#define ADA_BF16_STEPS 128.0f /* of a bf16 in an octave: fused kernels take bf16 scores in such steps */

typedef struct {
    int a, b, terms;
} ada_parts;

/* A tile of queries whose scores or weights are narrow. Kernels compute f32.lanes lanes or all, whatever the
 * others hold. */
typedef struct {
    ada_tile_f32 f32; /* p: [ADA_STRIP][ADA_LANES]; o has zeros up to a multiple of 16 rows */
    uint32_t *q;      /* [parts][DW][ADA_LANES]; 8 bits: unsigned, 128 above the signed number */
    uint32_t *w;      /* [parts][ADA_STRIP / elements][ADA_LANES] rounded weights; 8 bits: unsigned */
    float *unit;      /* [ADA_LANES] the score of a product of one (integers: with a key scale of one) */
    float *offset;    /* [ADA_LANES] added to every score */
    float *sum;       /* [ADA_LANES] sum of the rounded weights so far */
    float *worth;     /* [ADA_LANES] integers: the weight that a one in w stands for */
    int DW;           /* words of a key; zeros fill the last ones; a multiple of 16 where the CPU has AMX */
    ada_parts qk, pv; /* bf16: parts of q and k, of w and v */
} ada_narrow_tile;

/* Keys from some multiple of ADA_KEY_STEP on, for weights of ADA_BLOCK; rows behind the last key are zero. */
typedef struct {
    const uint32_t *k;       /* [keys][DW] */
    ptrdiff_t part;          /* words from one part to the next */
    const float *scale;      /* integers: one for every ADA_BLOCK keys */
    const int32_t *start;    /* 8 bits: [keys] what sums start from: -128 times the key's sum */
    const uint64_t *visible; /* [keys] bits of the lanes that see a key; NULL: all do */
} ada_narrow_keys;

/* f32.p[j][i] = score of key j < n, for n a multiple of ADA_KEY_STEP up to ADA_BLOCK: the sum of products
 * times unit (and key scale) plus offset. */
typedef void ada_scores_bf16_fn(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n);
typedef ada_scores_bf16_fn ada_scores_i8_fn, ada_scores_i16_fn;

/* The weights in f32.p (j < n <= ADA_BLOCK) rounded into w, which is filled with zeros up to ADA_BLOCK keys;
 * sets worth and adds to sum. Integers: each lane has its own worth. Weights up to ADA_WEIGHTLESS may count
 * as zero. */
#define ADA_WEIGHTLESS                                                                                       \
    0x1p-100f /* nothing beside the reference's 1, and parts of more are never subnormal                     \
               */
typedef void ada_round_bf16_fn(const ada_narrow_tile *t, int n);
typedef ada_round_bf16_fn ada_round_i8_fn, ada_round_i16_fn;

/* scores, weights and their rounding in one, for a full tile where nothing is added; n is a multiple of
 * ADA_BLOCK up to ADA_STRIP. Adds to f32.l and sum, sets worth. False, with them as before and w spoilt, when
 * a score that its lane sees exceeds f32.m by more than ADA_LAZY_OCTAVES; where it sees none, f32.m may be
 * -inf. With weights of 8 bits it may be false also when f32.m of a lane that sees a key is further from
 * offset than ADA_FAR_OCTAVES, or a one in a sum comes to 1/64 octave. The relative error of a weight, before
 * rounding, is that of the format: 3e-3 (bf16), 3e-3 to 4.5e-3 (8 bits, where a score may also be off by its
 * distance from offset times ADA_I8_SCORE_ERROR), 1e-6 (16 bits); of a key that is hidden it is zero. bf16
 * has one part, and unit is 1 / ADA_BF16_STEPS. Optional slots. */
#define ADA_FAR_OCTAVES 128
#define ADA_I8_SCORE_ERROR 0x1p-15
typedef bool ada_weigh_bf16_bf16_fn(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n);
typedef ada_weigh_bf16_bf16_fn ada_weigh_i8_bf16_fn, ada_weigh_i8_i8_fn, ada_weigh_i16_i16_fn;

/* What the n weights in w come to in each block of ADA_BLOCK keys b and lane i: mass[b][i] is their sum,
 * spread[b][i] reach[b] times the root of the sum of their squared distances from their mean. 8 bits: odd
 * weights may count as the next even one in the squares. All lanes; optional slots. */
typedef void ada_gauge_bf16_fn(const ada_narrow_tile *t, int n, const float *reach, float *mass,
                               float *spread);
typedef ada_gauge_bf16_fn ada_gauge_i8_fn, ada_gauge_i16_fn;

/* f32.o[e][i] += sum of weight j times v[e][j], the words of v from the first weight's key on, ADA_STRIP keys
 * in words from one e to the next and part words from part to part; n <= ADA_STRIP, a multiple of ADA_BLOCK
 * in whose words behind the last key w is zero. v has rows of zeros up to a multiple of 16, which may be
 * added to o as well. */
typedef void ada_values_bf16_fn(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n);
typedef ada_values_bf16_fn ada_values_i8_fn, ada_values_i16_fn;

/* Rows of floats to narrow elements: to[r][c] = (rows[r][c] - less[c]) * factor[c], or with by_row *
 * factor[r], rounded to nearest even, r < n, c < width; less may be NULL. ldt and ld are row strides in
 * elements. Integers beyond the format's range saturate at its ADA_..._MAX. bf16: parts of them, part
 * elements apart, each rounding what the ones before left; a subnormal number may count as zero. */
typedef void ada_encode_bf16_fn(uint16_t *to, ptrdiff_t ldt, ptrdiff_t part, int parts, const float *rows,
                                ptrdiff_t ld, int n, int width, const float *less, const float *factor,
                                bool by_row);
typedef void ada_encode_i8_fn(int8_t *to, ptrdiff_t ldt, const float *rows, ptrdiff_t ld, int n, int width,
                              const float *less, const float *factor, bool by_row);
typedef void ada_encode_i16_fn(int16_t *to, ptrdiff_t ldt, const float *rows, ptrdiff_t ld, int n, int width,
                               const float *less, const float *factor, bool by_row);

/* to[i / 2][j] = the pair of rows[i][j] and rows[i + 1][j], rounded to bf16, for ADA_LANES rows of ADA_BLOCK
 * finite numbers. */
typedef void ada_pair_bf16_fn(uint32_t *to, const float *rows);

/* to[c][r] = from[r][c] for r < rows, c < columns, elements of 1, 2 or 4 bytes; strides in elements. rows is
 * a multiple of 16, 32 or 64 (64 bytes); whole groups of 16 columns are read and written. */
typedef void ada_turn_8_fn(void *to, ptrdiff_t ldt, const void *from, ptrdiff_t ldf, int rows, int columns);
typedef ada_turn_8_fn ada_turn_16_fn, ada_turn_32_fn;

/* sum[c] += rows[r][c]; largest[c] = max(largest[c], |rows[r][c]|), where a NaN counts as larger than all. */
typedef void ada_columns_fn(float *sum, float *largest, const float *rows, ptrdiff_t ld, int n, int width);

/* The largest |x - less| of n rows, NaN where one is; norm2 (may be NULL) gets the largest sum of squares of
 * a row. */
typedef float ada_reach_fn(const float *rows, ptrdiff_t ld, int n, int width, const float *less,
                           float *norm2);

/* The same of each row: largest[r] and norm2[r], r < n. */
typedef void ada_row_reach_fn(float *largest, float *norm2, const float *rows, ptrdiff_t ld, int n, int width,
                              const float *less);

/* norm2[r] = sum of weight[c] * x^2 and square[c] += x^2 for x = rows[r][c] - less[c], r < n, c < width;
 * less, weight (ones) and square may be NULL. */
typedef void ada_squares_fn(float *norm2, float *square, const float *rows, ptrdiff_t ld, int n, int width,
                            const float *less, const float *weight);

/* sum[i] += x[i] and apart[i] += x[i]^2 for all lanes; returns the sum over them of
 * weight[i] * ((1 - joint) * apart[i] + joint * sum[i]^2). */
typedef float ada_stand_in_fn(float *sum, float *apart, const float *x, const float *weight, float joint);

/* Sums over the keys of one row, each in parts. p: a key's weight, d: squared distance of its value from the
 * row's output, norm2 and value2: squared norms of the key and the value; more in probe.h. */
enum { ADA_PARTS = 16 };
typedef struct {
    float p2d[ADA_PARTS], p2d_norm[ADA_PARTS], p2d_step[ADA_PARTS]; /* p^2 d, times norm2, times step */
    float p2[ADA_PARTS], p2_norm[ADA_PARTS], p2_step[ADA_PARTS];    /* the same with 1 for d */
    float p2v[ADA_PARTS], pv[ADA_PARTS];                            /* p^2 and p times value2 */
    float round8[ADA_PARTS], round16[ADA_PARTS]; /* d times p^2, but at most times var8 and var16 */
    float dropped[ADA_PARTS];                    /* p below half a step of 8 bits, whose square is 12 var8 */
    float plog[ADA_PARTS];                       /* p log2(p), to 1e-3 */
} ada_row_sums;

/* Adds a block of ADA_BLOCK keys, whose values times the output (out2: squared norm) are dots; returns the
 * sum of p. */
typedef float ada_row_sums_fn(ada_row_sums *sums, const float *p, const float *dots, const float *norm2,
                              const float *value2, float out2, float step, float var8, float var16);

/* o[e][i] *= unit[e] for all lanes. */
typedef void ada_scale_channels_fn(const ada_tile_f32 *t, const float *unit);

/* Around the calls of the kernels above in one thread: a unit's state. Optional slots. */
typedef void ada_units_begin_fn(void);
typedef ada_units_begin_fn ada_units_end_fn;

#define ADA_NARROW_SLOTS(SLOT)                                                                               \
    SLOT(units_begin)                                                                                        \
    SLOT(units_end)                                                                                          \
    SLOT(scores_bf16)                                                                                        \
    SLOT(scores_i8)                                                                                          \
    SLOT(scores_i16)                                                                                         \
    SLOT(round_bf16)                                                                                         \
    SLOT(round_i8)                                                                                           \
    SLOT(round_i16)                                                                                          \
    SLOT(weigh_bf16_bf16)                                                                                    \
    SLOT(weigh_i8_bf16)                                                                                      \
    SLOT(weigh_i8_i8)                                                                                        \
    SLOT(weigh_i16_i16)                                                                                      \
    SLOT(gauge_bf16)                                                                                         \
    SLOT(gauge_i8)                                                                                           \
    SLOT(gauge_i16)                                                                                          \
    SLOT(values_bf16)                                                                                        \
    SLOT(values_i8)                                                                                          \
    SLOT(values_i16)                                                                                         \
    SLOT(encode_bf16)                                                                                        \
    SLOT(encode_i8)                                                                                          \
    SLOT(encode_i16)                                                                                         \
    SLOT(pair_bf16)                                                                                          \
    SLOT(turn_8)                                                                                             \
    SLOT(turn_16)                                                                                            \
    SLOT(turn_32)                                                                                            \
    SLOT(columns) SLOT(reach) SLOT(row_reach) SLOT(squares) SLOT(stand_in) SLOT(scale_channels) SLOT(row_sums)
