#define ADA_BF16 false
#define ADA_RUN ada_k1_run_f16
#include "k1_dense.cuh"
