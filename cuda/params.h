/* One launch as the kernels take it, and the functions of the host that launch. Plain C.
 *
 * All pointers are to device memory, but for the struct itself. Strides are in bytes and may be zero or
 * negative; every array is aligned to its dtype. Nothing here is checked: csrc/problem.c did, and the sizes
 * below fit.
 */
#ifndef ADA_CUDA_PARAMS_H
#define ADA_CUDA_PARAMS_H

#include <stddef.h>
#include <stdint.h>

#ifndef ADA_CUDA_MODEL
#    include <cuda_runtime_api.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* As ada_dtype in csrc/adaattn.h. */
enum { ADA_CU_F32, ADA_CU_F64, ADA_CU_F16, ADA_CU_BF16, ADA_CU_BOOL, ADA_CU_I8 = 7 };

/* What the products of a launch are computed from. */
typedef enum {
    ADA_CU_SIMT_F64, /* any chip: float64 throughout */
    ADA_CU_SIMT_F32, /* any chip: products and sums in float32 */
    ADA_CU_SPLIT,    /* sm_80: float32-accurate, two fp16 parts of each operand, three products */
    ADA_CU_FP16,     /* sm_80 */
    ADA_CU_BFLOAT16, /* sm_80 */
    ADA_CU_INT8,     /* sm_80: scores of 8-bit integers, values in bf16 or, for fp16 arrays, fp16 */
    ADA_CU_INT8_FP8, /* sm_89: scores of 8-bit integers, values in e4m3 */
    ADA_CU_FP8       /* sm_89: both in e4m3 */
} ada_cu_rung;

#define ADA_CU_MAX_HEAD 256 /* largest D and E */
#define ADA_CU_UNBOUNDED INT64_MAX

typedef struct {
    void *data;
    int64_t stride[4]; /* batch, head, row, element */
} ada_cu_array;

/* Keys and values of a cache, in pages of ADA_CU_PAGE tokens (ada_cuda_store): head g of side s (keys,
 * values) begins at[s] + g * head[s] bytes behind the page's address, its rows lie row[s] bytes apart; behind
 * rows of bytes come their scale (float), in 16 bytes, and their means (bfloat16). open: the same of pages of
 * floats. */
#define ADA_CU_PAGE 64
typedef struct {
    const uint64_t *table; /* addresses: of each sequence its open page, then its pages; NULL: no cache */
    int64_t columns;       /* of the table */
    int32_t dtype;         /* ADA_CU_F32, F16, BF16 or I8: bytes, counted from 128 */
    struct {
        int64_t at[2], head[2], row[2];
    } closed, open;
} ada_cu_pages;

typedef struct {
    ada_cu_array query, key, value, out;      /* (B, H, T, D), (B, G, S, D), (B, G, S, E), (B, H, T, E) */
    int32_t dtype;                            /* of these four */
    int32_t rung;                             /* ada_cu_rung */
    int32_t B, H, G, T, S, D, E;              /* B * H * T below 2^31 */
    int32_t mask_dtype;                       /* ADA_CU_BOOL or floating */
    ada_cu_array mask;                        /* data NULL: none; stride 0 where it broadcasts */
    double scale, softcap;                    /* softcap 0: none */
    int64_t window_left, window_right;        /* ADA_CU_UNBOUNDED: none; causal: window_right is 0 */
    int64_t offset;                           /* of query 0 on the keys' axis, where query_offset is NULL */
    const int64_t *query_offset, *kv_lengths; /* NULL: not given; [b * stride] in elements, stride may be 0 */
    int64_t query_offset_stride, kv_lengths_stride;
    const double *alibi_slopes; /* NULL: none; [b * stride[0] + h * stride[1]] in elements */
    int64_t alibi_stride[2];
    const double *sinks; /* NULL: none; [h * stride] in elements */
    int64_t sinks_stride;
    double dropout_p;
    uint64_t drop_below;  /* 0: no dropout */
    const uint64_t *seed; /* [b * stride] in elements */
    int64_t seed_stride;
    int32_t one_seed; /* seed is a scalar, mixed with the batch index */
    int32_t n_heads;
    const int32_t *heads; /* ascending indices b * H + h that this launch computes; NULL: all */
    void *lse;            /* (B, H, T) contiguous, double for F64 arrays, else float; NULL: not wanted */
    void *workspace;      /* of ada_cu_workspace bytes, aligned to 256 */
    int32_t multiprocessors, capability; /* of the device: 132 and 90 for an H100 */
    int32_t code;                        /* the chip that what it runs was compiled for, at most as new */
    uint32_t *raised; /* [B * H] becomes 1 where rows were computed again in float64; NULL: not wanted */
    /* [n_heads][tiles of ada_cu_list_rows queries][1 + blocks of keys]: how many blocks of ADA_LIST_BLOCK
     * keys are computed, then which, ascending; NULL: all are. */
    const int32_t *lists;
    ada_cu_pages pages; /* where key and value lie instead, of a cache that kv_lengths says the tokens of */
} ada_cu_params;

#define ADA_LIST_BLOCK 64
#define ADA_LIST_MOST_KEYS (1 << 21) /* of a list */

/* Whether ada_cu_attend has kernels for this rung, dtype, head sizes and capability. */
int ada_cu_computes(const ada_cu_params *p);

/* Whether code for this chip computes e4m3. */
int ada_cu_has_fp8(int32_t code);

/* Bytes of workspace that ada_cu_attend needs for these arrays and this rung. */
size_t ada_cu_workspace(const ada_cu_params *p);

/* Queries of a tile that has a list; 0: no kernel walks lists for this rung, chip and problem. */
int ada_cu_list_rows(const ada_cu_params *p);

/* out and lse of the heads, asynchronously on the stream, whatever the number of queries. Rows that the rung
 * cannot hold (overflow, NaN, infinities) are computed again in float64 within the same call.
 * cudaErrorNotSupported: the chip or the head size is beyond the rung. */
cudaError_t ada_cu_attend(const ada_cu_params *p, cudaStream_t stream);

/* Rows in float64 for arrays of any dtype: pairs [n][2] of a head b * H + h and a row; o [n][E] and lse [n],
 * each NULL where not wanted. Ignores heads, rung and workspace. */
cudaError_t ada_cu_exact_rows(const ada_cu_params *p, const int32_t *pairs, int32_t n, double *o, double *lse,
                              cudaStream_t stream);

/* out and lse of rows of any heads, in float and, where that cannot hold them, in double: list has room for
 * ADA_AGAIN_LIST + n numbers, the first one is n, rows stand from ADA_AGAIN_LIST on as head * T + row; again
 * is as large and overwritten. */
cudaError_t ada_cu_attend_rows(const ada_cu_params *p, const int32_t *list, int32_t n, int32_t *again,
                               cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
