/* Kernels of narrow operands, plain C. */
#define KERNEL(op) ada_##op##_scalar
#include "kernel.h"
#include "narrow_tpl.h"
