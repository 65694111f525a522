/* The kernel slots: every typedef and contract, and the table that dispatch.c fills once.
 *
 * Lanes are queries. A tile holds ADA_LANES queries of one head side by side, so a row of a matrix here is
 * one key or one coordinate for all queries: matrix products broadcast elements of K and V, read in place,
 * and softmax works lane by lane, never across lanes. Scores are in log2 units (scale * log2(e) is folded
 * into q). Kernels see tiles of visibility and bias, never an option. They never allocate, lock, log or
 * branch on the ISA; matrices [n][ADA_LANES] and vectors [ADA_LANES] are 64-byte aligned and do not alias.
 */
#ifndef ADA_KERNELS_H
#define ADA_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ADA_LANES 64     /* queries of a tile: 4 zmm of float; bits of a visibility word */
#define ADA_BLOCK 64     /* keys of a block: K, V, P and Q of one block and tile stay in L2 at D = 128 */
#define ADA_LANE_STEP 16 /* tiles with fewer queries compute a multiple of this many lanes */
#define ADA_ROW_GROUP 4  /* single queries that share one pass over the keys */
#define ADA_EXACT_ROWS 8 /* rows that are computed for themselves and share the reading of a block */
#define ADA_KEY_STEP 16  /* scores are computed for a multiple of this many keys */

/* The reference that weights are relative to is raised only when a score exceeds it by this many octaves:
 * lazily, because raising rescales the output. float has 127; 2^60 * |v| * S overflows only for |v| beyond
 * 1e14, and then the tile is computed again in fp64. */
#define ADA_LAZY_OCTAVES 60

/* Rows that are wanted soon: values_* may ask memory for them meanwhile, as the products hide what it costs
 * (asking for all at once takes as long as waiting for them). */
#define ADA_AHEAD 4
typedef struct {
    const char *at;
    ptrdiff_t stride;
    int rows, bytes; /* of a row */
} ada_ahead;

#define ADA_REAL float
#define KIND(name) name##_f32
#define KIND_FN(name) name##_f32_fn
#include "kernels_tpl.h"
#undef ADA_REAL
#undef KIND
#undef KIND_FN

#define ADA_REAL double
#define KIND(name) name##_f64
#define KIND_FN(name) name##_f64_fn
#include "kernels_tpl.h"
#undef ADA_REAL
#undef KIND
#undef KIND_FN

/* s[r * ADA_BLOCK + j] = q[r] . k[j] for r < rows <= ADA_ROW_GROUP queries [rows][D], j < n <= ADA_BLOCK; k
 * of the named dtype, ldk its row stride in elements. A query's bits depend on it and the key alone.
 * Prefetches beyond the rows. */
typedef void ada_row_scores_f32_fn(float *s, const float *q, int rows, const void *k, ptrdiff_t ldk, int n,
                                   int D);
typedef ada_row_scores_f32_fn ada_row_scores_f16_fn, ada_row_scores_bf16_fn;
typedef void ada_row_scores_f64_fn(double *s, const double *q, int rows, const void *k, ptrdiff_t ldk, int n,
                                   int D);
typedef ada_row_scores_f64_fn ada_row_scores_wide_fn; /* of float keys, to the same bits as of doubles */

/* o[r * ldo + e] += sum of p[r * ADA_BLOCK + j] v[j][e] over j < n, for r < rows; likewise. */
typedef void ada_row_values_f32_fn(float *o, ptrdiff_t ldo, const float *p, int rows, const void *v,
                                   ptrdiff_t ldv, int n, int E);
typedef ada_row_values_f32_fn ada_row_values_f16_fn, ada_row_values_bf16_fn;
typedef void ada_row_values_f64_fn(double *o, ptrdiff_t ldo, const double *p, int rows, const void *v,
                                   ptrdiff_t ldv, int n, int E);
typedef ada_row_values_f64_fn ada_row_values_wide_fn; /* likewise */

/* s[r * lds + i] = sum of x[r * ldx + j] (code[j][i] - 128) over j < n for r < rows <= ADA_ROW_GROUP and i <
 * lanes, where codes lie in chunks of ADA_CODE_CHUNK lanes or what is left of them, each [n / 4][lanes][4];
 * n <= ADA_CODES_MOST is a multiple of 4, lanes one of 16.
 * Numbers are finite and below 2^100; rows of which none reaches 2^-100 may count as zero. Off by what n
 * additions round, and by 2^-23 of the row's largest number for each. Prefetches beyond the codes. */
#define ADA_CODES_MOST 1024
#define ADA_CODES_STEP 0x1p-23 /* of a row, in units of its largest number: what it may be rounded to */
#define ADA_CODE_CHUNK 32
typedef void ada_code_products_fn(float *s, ptrdiff_t lds, const float *x, ptrdiff_t ldx, int rows,
                                  const uint8_t *codes, int n, int lanes);

/* The same for ADA_BLOCK tokens whose codes share a scale: to becomes what page_scores wants of x [rows][D],
 * ADA_PAGE_ROW_BYTES(D) for each row, aligned to 64. A NaN or infinity in x makes its row's scores NaN. */
#define ADA_PAGE_ROW_BYTES(D) (((int64_t)(D) + 31) / 16 * 64)
typedef void ada_page_rows_fn(void *to, const float *x, int rows, int D);

/* s[r * ADA_BLOCK + j] = centre[r * ADA_BLOCK] + scale * sum of x[r][d] (code[d][j] - 128) over d < D <=
 * ADA_CODES_MOST, whose codes lie as for code_products, in fours filled up with any. */
typedef void ada_page_scores_fn(float *s, const void *x, int rows, const uint8_t *codes, int D, float scale,
                                const float *centre);

/* o[r * ldo + e] += sum of p[r * ADA_BLOCK + j] ((code[j][e] - 128) scale + mean[e]) over j < ADA_BLOCK, for
 * e < E <= ADA_CODES_MOST, whose codes lie likewise, in sixteens filled up; mean in bfloat16. */
typedef void ada_page_values_fn(float *o, ptrdiff_t ldo, const float *p, int rows, const uint8_t *codes,
                                int E, float scale, const uint16_t *mean);

/* Conversions of n contiguous elements; to half formats by rounding to nearest even. No alignment. */
typedef void ada_load_f16_fn(float *to, const uint16_t *from, int64_t n);
typedef ada_load_f16_fn ada_load_bf16_fn;
typedef void ada_store_f16_fn(uint16_t *to, const float *from, int64_t n);
typedef ada_store_f16_fn ada_store_bf16_fn;

/* Bit j of the result (j < n <= 64): key first + j is kept; its 32 random bits from state reach drop_below,
 * which is below 2^32.
 */
typedef uint64_t ada_dropout_fn(uint64_t state, uint32_t first, int n, uint64_t drop_below);

#include "kernels_narrow.h"

/* clang-format off */
#define ADA_SLOTS(SLOT)                                                                                      \
    SLOT(pack_f32) SLOT(scores_f32) SLOT(softcap_f32) SLOT(reference_f32) SLOT(weights_f32)                  \
    SLOT(scores_weights_f32) SLOT(values_f32) SLOT(unpack_f32) SLOT(row_weights_f32) SLOT(product_f32)       \
    SLOT(backward_f32)                                                                                       \
    SLOT(pack_f64) SLOT(scores_f64) SLOT(softcap_f64) SLOT(reference_f64) SLOT(weights_f64)                  \
    SLOT(scores_weights_f64) SLOT(values_f64) SLOT(unpack_f64) SLOT(row_weights_f64) SLOT(product_f64)       \
    SLOT(backward_f64)                                                                                       \
    SLOT(row_scores_f32) SLOT(row_scores_f16) SLOT(row_scores_bf16) SLOT(row_scores_f64)                     \
    SLOT(row_values_f32) SLOT(row_values_f16) SLOT(row_values_bf16) SLOT(row_values_f64)                     \
    SLOT(row_scores_wide) SLOT(row_values_wide)                                                              \
    SLOT(load_f16) SLOT(load_bf16) SLOT(store_f16) SLOT(store_bf16)                                          \
    SLOT(code_products) SLOT(page_rows) SLOT(page_scores) SLOT(page_values)                                  \
    SLOT(dropout) ADA_NARROW_SLOTS(SLOT)
/* clang-format on */

typedef struct {
#define SLOT(name) ada_##name##_fn *name;
    ADA_SLOTS(SLOT)
#undef SLOT
    uint32_t isa; /* the mask they were selected under, less what is not built */
} ada_kernels;

/* For kernels.def: what belongs to an ISA that the compiler could not build is left out; setup.py says which
 * it could. */
#define ADA_IF_scalar(...) __VA_ARGS__
#if ADA_BUILD_AVX2
#    define ADA_IF_avx2(...) __VA_ARGS__
#else
#    define ADA_IF_avx2(...)
#endif
#if ADA_BUILD_AVX512
#    define ADA_IF_avx512(...) __VA_ARGS__
#else
#    define ADA_IF_avx512(...)
#endif
#if ADA_BUILD_AVX512VNNI
#    define ADA_IF_avx512vnni(...) __VA_ARGS__
#else
#    define ADA_IF_avx512vnni(...)
#endif
#if ADA_BUILD_AVX512BF16
#    define ADA_IF_avx512bf16(...) __VA_ARGS__
#else
#    define ADA_IF_avx512bf16(...)
#endif
#if ADA_BUILD_AMX
#    define ADA_IF_amx(...) __VA_ARGS__
#else
#    define ADA_IF_amx(...)
#endif

enum {
#define SLOT(name) +1
    ADA_SLOT_COUNT = 0 ADA_SLOTS(SLOT)
#undef SLOT
};

/* The fastest kernel per slot under a mask of ADA_ISA_* bits; isa_of (may be NULL) receives the ISA's name
 * per slot, in the order of ADA_SLOTS. */
void ada_kernels_select(uint32_t isa_mask, ada_kernels *kernels, const char *isa_of[]);
const char *ada_slot_name(int index);

/* The selection under ada_isa_allowed(), made once. */
const ada_kernels *ada_kernels_get(void);

/* What the CPU has and the environment variable ADAATTN_ISA allows.
 */
uint32_t ada_isa_allowed(void);
uint32_t ada_isa_built(void); /* what the compiler could build */

#endif
