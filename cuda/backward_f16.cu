#define ADA_BF16 false
#define ADA_RUN ada_back_run_f16
#include "backward_run.cuh"
