/* Kernels of a backward pass, float, AVX-512. */
#define REAL float
#define REAL_BITS 32
#define KERNEL(op) ada_##op##_f32_avx512
#define GROUP_ROWS 4
#include "kernel.h"
#include "simd_avx512.h"
#include "backward_tpl.h"
