/* Products with codes, AVX2. */
#define REAL float
#define REAL_BITS 32
#define KERNEL(op) ada_##op##_avx2
#include "kernel.h"
#include "simd_avx2.h"
#include "codes_tpl.h"
