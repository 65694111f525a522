/* Gradients on a GPU. */
#ifndef ADA_GPU_BACKWARD_H
#define ADA_GPU_BACKWARD_H

#include "backward.h"

/* ada_backward for arrays on a GPU; without a report it only puts work on the problem's stream. */
ada_status ada_gpu_backward(const ada_backward_problem *backward, ada_gradient_budget *budget,
                            ada_error *error);

#endif
