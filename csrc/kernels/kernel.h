/* What every vector kernel file starts with: the slots, and a few words of compiler. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "../kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
/* Keeps a loaded vector in a register: gcc 12 otherwise folds the load into every FMA that uses it. */
#define PIN(v) __asm__("" : "+v"(v))
