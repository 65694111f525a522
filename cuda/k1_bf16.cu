#define ADA_BF16 true
#define ADA_RUN ada_k1_run_bf16
#include "k1_dense.cuh"
