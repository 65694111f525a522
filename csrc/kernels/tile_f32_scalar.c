/* Tile kernels, float, plain C. */
#include "kernel.h"
#define REAL float
#define KIND(name) name##_f32
#define KERNEL(op) ada_##op##_f32_scalar
#define LARGEST FLT_MAX
#define EXP2 exp2f
#define TANH tanhf
#include "scalar_tpl.h"
