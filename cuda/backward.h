/* Gradients as the kernels take them, and the functions of the host that launch; see params.h. Plain C. */
#ifndef ADA_CUDA_BACKWARD_H
#define ADA_CUDA_BACKWARD_H

#include "params.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

/* As in csrc/adaattn.h: what a gradient is with respect to. */
enum {
    ADA_CU_OF_QUERY,
    ADA_CU_OF_KEY,
    ADA_CU_OF_VALUE,
    ADA_CU_OF_MASK,
    ADA_CU_OF_SINKS,
    ADA_CU_OF_SLOPES,
    ADA_CU_GRADIENTS
};

/* The call p, of all heads: its out is what the forward pass left; its lse and raised are not used. Rung:
 * FP16 and BFLOAT16 for arrays of these dtypes, SIMT_F32, SIMT_F64. */
typedef struct {
    ada_cu_params p;
    ada_cu_array grad_out, lse; /* (B, H, T, E) like out; (B, H, T), double for F64 arrays, else float */
    ada_cu_array results[ADA_CU_GRADIENTS]; /* data NULL: not wanted. The first three of p's dtype, the others
                                               of lse's; C-contiguous, the mask's with stride 0 where it
                                               broadcasts; slopes [b * stride[0] + h], in elements */
    uint32_t *unfit;                        /* [B * G] becomes 1 where a key head was computed in float64
                                               because its rung did not hold it, or because the rung is SIMT_F64; NULL: not wanted */
    void *rows; /* ada_cu_known_bytes: what is known of rows of queries, for ada_cu_check_rows; NULL:
                   not wanted */
    const uint32_t *again; /* [B * G] 0 for key heads that are computed once more, from an lse and an out of
                              their own, in SIMT_F32, 1 in SIMT_F64, 2 for others; NULL: this is the first
                              time. Needs unfit, and rows as the first time left them. */
} ada_cu_gradients;

/* Bytes of the workspace that p's is to have, aligned to 256. */
size_t ada_cu_backward_workspace(const ada_cu_gradients *x);

/* All gradients, asynchronously on the stream. Sums are in an order that the sizes fix. Key heads that the
 * rung cannot hold are computed again in float64, from the inputs alone, within the same call. */
cudaError_t ada_cu_backward(const ada_cu_gradients *x, cudaStream_t stream);

/* Bytes of what is known of all rows. */
size_t ada_cu_known_bytes(const ada_cu_params *p);

/* Verification. Up to ADA_CU_CHECKED rows of one head are computed together: queries of a head b * H + h, or
 * keys of b * G + g. */
enum { ADA_CU_CHECKED = 4 };
typedef struct {
    int32_t head, count, row[ADA_CU_CHECKED];
} ada_cu_checked;

/* Before the numbers of a query. In order: as ada_true_row in csrc/gradient_check.h. */
enum {
    ADA_CU_LSE,
    ADA_CU_DELTA,
    ADA_CU_QUERY2,
    ADA_CU_GRAD2,
    ADA_CU_WEIGHT2,
    ADA_CU_SLOPE2,
    ADA_CU_SCORE2,
    ADA_CU_BOTH,
    ADA_CU_GIVEN_LSE,
    ADA_CU_GIVEN_DELTA,
    ADA_CU_TRUTHS
};

/* Exact rows of gradients in double beside those that are there (0 where they were not wanted), from groups
 * on the device to [groups][ADA_CU_CHECKED] rows: of queries [ADA_CU_TRUTHS], [2][D] of dQ; of keys, from
 * x->rows, [D] of dK and [E] of dV, twice. */
cudaError_t ada_cu_check_rows(const ada_cu_gradients *x, bool keys, const ada_cu_checked *groups, int64_t n,
                              double *partials, double *to, cudaStream_t stream);
/* Of a group: bytes of partials, and numbers in to. */
size_t ada_cu_check_bytes(const ada_cu_params *p, bool keys);
int64_t ada_cu_check_size(const ada_cu_params *p, bool keys);

/* By what rows are drawn, of queries [B * H][T][4]: squared norms of grad_out, of grad_out, query and out
 * multiplied, of dQ; and whether it sees a key. Of keys [B * G][S][3]: of dK, of dV; whether a query sees it.
 */
enum { ADA_CU_QUERY_NORMS = 4, ADA_CU_KEY_NORMS = 3 };
cudaError_t ada_cu_gradient_norms(const ada_cu_gradients *x, double *of_queries, double *of_keys,
                                  cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
