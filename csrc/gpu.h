/* The CUDA backend, a shared library of its own that is opened when it is first asked for. */
#ifndef ADA_GPU_H
#define ADA_GPU_H

#include "adaattn.h"
#include "attend.h"

#include "../cuda/ada_cuda.h"

/* Rows and keys of a call: below 2^31 by what sizes are rounded up to. */
#define ADA_GPU_MOST (INT32_MAX - (1 << 17))

/* Opens the library at this path, once and for all: later calls find it open and look at no path. */
ada_status ada_gpu_load(const char *path, ada_error *error);
/* Of the open library; NULL before that. */
const ada_cuda_table *ada_gpu_table(void);
/* How many devices it was found to have; 0 before that. */
int ada_gpu_devices(void);
void ada_gpu_set_devices(int n);
/* The sentence of a failure. */
ada_status ada_gpu_fail(const ada_cuda_failure *failure, ada_error *error);

/* ada_attend for a problem on a GPU. Without a tolerance, a report and a float mask to be checked it only
 * puts work on the stream. */
ada_status ada_gpu_attend(const ada_problem *problem, ada_budget *budget, bool (*interrupt)(void *),
                          void *context, ada_error *error);

/* Until the device has done what the problem's stream holds. */
ada_status ada_gpu_wait(const ada_problem *problem, ada_error *error);

#endif
