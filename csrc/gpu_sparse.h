/* Sparse heads on a GPU: blocks of keys that provably weigh next to nothing are left out, and no values stand
 * in for them.
 *
 * What a row may move by is the root of ada_head.budget2. It is chosen before outputs are known, by the size
 * of the values; verification holds it against the outputs, and makes a head dense of which it says too
 * little.
 */
#ifndef ADA_GPU_SPARSE_H
#define ADA_GPU_SPARSE_H

#include "attending.h"
#include "gpu.h"

/* Chooses heads that are faster so, or that are asked for. thin: [B * H] scratch. */
ada_status ada_gpu_plan_sparse(ada_attending *a, ada_cuda_call *call, ada_cuda_thin *thin, ada_error *error);
/* What a head on its way leaves out. */
ada_cuda_thin ada_gpu_thin_of(const ada_attending *a, int64_t head);

#endif
