/* Tile kernels, float, AVX2 and FMA. */
#define REAL float
#define REAL_BITS 32
#define KERNEL(op) ada_##op##_f32_avx2
#include "kernel.h"
#include "simd_avx2.h"
#include "tile_tpl.h"
