/* Kernels of narrow operands, avx512. */
#define KERNEL(op) ada_##op##_avx512
#include "kernel.h"
#include "narrow_tpl.h"
