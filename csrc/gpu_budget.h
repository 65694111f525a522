/* A call within a budget on a GPU. */
#ifndef ADA_GPU_BUDGET_H
#define ADA_GPU_BUDGET_H

#include "attending.h"
#include "gpu.h"

/* Whether a kernel computes the choice; the error names the rungs. */
ada_status ada_gpu_check_choice(const ada_cuda_table *t, const ada_cuda_call *call, ada_choice choice,
                                ada_error *error);
ada_status ada_gpu_attend_within(const ada_problem *p, ada_cuda_call *call, ada_budget *budget,
                                 bool (*interrupt)(void *), void *context, ada_error *error);

#endif
