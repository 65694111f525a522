/* Verified gradients on a GPU. */
#ifndef ADA_GPU_GRADIENT_H
#define ADA_GPU_GRADIENT_H

#include "backward.h"
#include "gpu.h"

/* Compares rows of what the device has computed with exact ones of its own, and has key heads that miss the
 * budget computed again: in fp32 from an lse and an out of their own, then in fp64. */
ada_status ada_gpu_verify_gradient(const ada_backward_problem *x, ada_cuda_call *call,
                                   ada_gradient_budget *budget, ada_error *error);
/* Whether the open backend can do that. */
bool ada_gpu_verifies_gradients(void);

#endif
