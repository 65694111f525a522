/* Tile kernels, double, AVX2 and FMA. */
#define REAL double
#define REAL_BITS 64
#define KERNEL(op) ada_##op##_f64_avx2
#include "kernel.h"
#include "simd_avx2.h"
#include "tile_tpl.h"
