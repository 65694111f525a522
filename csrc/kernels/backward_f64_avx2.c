/* Kernels of a backward pass, double, AVX2. */
#define REAL double
#define REAL_BITS 64
#define KERNEL(op) ada_##op##_f64_avx2
#define GROUP_ROWS 6
#include "kernel.h"
#include "simd_avx2.h"
#include "backward_tpl.h"
