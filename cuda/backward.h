/* Gradients as the kernels take them, and the functions of the host that launch; see params.h. Plain C. */
#ifndef ADA_CUDA_BACKWARD_H
#define ADA_CUDA_BACKWARD_H

#include "params.h"

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
} ada_cu_gradients;

/* Bytes of the workspace that p's is to have, aligned to 256. */
size_t ada_cu_backward_workspace(const ada_cu_gradients *x);

/* All gradients, asynchronously on the stream. Sums are in an order that the sizes fix. Key heads that the
 * rung cannot hold are computed again in float64, from the inputs alone, within the same call. */
cudaError_t ada_cu_backward(const ada_cu_gradients *x, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
