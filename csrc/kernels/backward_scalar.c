/* Kernels of a backward pass, plain C. */
#include "kernel.h"

#define REAL float
#define KIND(name) name##_f32
#define KERNEL(op) ada_##op##_f32_scalar
#define EXP2 exp2f
#include "scalar_backward_tpl.h"
#undef REAL
#undef KIND
#undef KERNEL
#undef EXP2

#define REAL double
#define KIND(name) name##_f64
#define KERNEL(op) ada_##op##_f64_scalar
#define EXP2 exp2
#include "scalar_backward_tpl.h"
