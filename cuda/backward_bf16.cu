#define ADA_BF16 true
#define ADA_RUN ada_back_run_bf16
#include "backward_run.cuh"
