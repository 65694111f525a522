/* Products with codes, plain C. */
#include "kernel.h"

void ada_code_products_scalar(float *s, ptrdiff_t lds, const float *x, ptrdiff_t ldx, int rows,
                              const uint8_t *codes, int n, int lanes) {
    for (int r = 0; r < rows; r++)
        for (int lane = 0; lane < lanes; lane++) {
            float sum = 0;
            for (int j = 0; j < n; j++)
                sum += x[r * ldx + j] * (float)(codes[4 * (j / 4 * lanes + lane) + j % 4] - 128);
            s[r * lds + lane] = sum;
        }
}
