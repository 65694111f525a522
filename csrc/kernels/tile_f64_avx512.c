/* Tile kernels, double, AVX-512. */
#define REAL double
#define REAL_BITS 64
#define KERNEL(op) ada_##op##_f64_avx512
#include "kernel.h"
#include "simd_avx512.h"
#include "tile_tpl.h"
