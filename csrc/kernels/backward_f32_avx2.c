/* Kernels of a backward pass, float, AVX2. */
#define REAL float
#define REAL_BITS 32
#define KERNEL(op) ada_##op##_f32_avx2
#define GROUP_ROWS 6
#include "kernel.h"
#include "simd_avx2.h"
#include "backward_tpl.h"
