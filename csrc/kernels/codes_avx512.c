/* Products with codes, AVX-512. */
#define REAL float
#define REAL_BITS 32
#define KERNEL(op) ada_##op##_avx512
#include "kernel.h"
#include "simd_avx512.h"
#include "codes_tpl.h"
