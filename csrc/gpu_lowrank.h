/* Low rank on a GPU: landmarks are chosen here, from a sample of each head that the device takes
 * (landmarks.h), and attended to there. Both wait for it.
 */
#ifndef ADA_GPU_LOWRANK_H
#define ADA_GPU_LOWRANK_H

#include "attending.h"
#include "gpu.h"

/* As ada_backend has them. */
ada_status ada_gpu_plan_ranks(ada_attending *a, ada_cuda_call *call, ada_error *error);
ada_status ada_gpu_execute_ranks(ada_attending *a, ada_cuda_call *call, const ada_low_rank *low,
                                 const int64_t *heads, int64_t n, ada_error *error);

#endif
