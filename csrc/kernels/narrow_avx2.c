/* Kernels of narrow operands, avx2. */
#define KERNEL(op) ada_##op##_avx2
#include "kernel.h"
#include "narrow_tpl.h"
