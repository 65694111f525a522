/* What every vector kernel file starts with: the slots, and a few words of compiler. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "../kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* What a group of several asks for: its share of one of the ADA_AHEAD runs of rows. */
INLINE void ask_ahead(const ada_ahead *ahead, int group, int groups) {
    if (!ahead) return;
    ahead += group % ADA_AHEAD;
    const int step = groups > ADA_AHEAD ? groups / ADA_AHEAD : 1;
    for (int c = 0; c < ahead->bytes; c += 64) {
        const char *at = ahead->at + group / ADA_AHEAD * ahead->stride + c;
        for (int r = group / ADA_AHEAD; r < ahead->rows; r += step, at += step * ahead->stride)
            __builtin_prefetch(at, 0, 2);
    }
}

/* Keeps a loaded vector in a register: gcc 12 otherwise folds the load into every FMA that uses it. */
#define PIN(v) __asm__("" : "+v"(v))
