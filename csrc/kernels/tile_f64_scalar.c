/* Tile kernels, double, plain C. */
#include "kernel.h"
#define REAL double
#define KIND(name) name##_f64
#define KERNEL(op) ada_##op##_f64_scalar
#define LARGEST DBL_MAX
#define EXP2 exp2
#define TANH tanh
#include "scalar_tpl.h"
