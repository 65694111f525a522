/* Kernels of a backward pass, double, AVX-512. */
#define REAL double
#define REAL_BITS 64
#define KERNEL(op) ada_##op##_f64_avx512
#define GROUP_ROWS 4
#include "kernel.h"
#include "simd_avx512.h"
#include "backward_tpl.h"
