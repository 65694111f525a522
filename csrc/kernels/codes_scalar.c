/* Products with codes, plain C. */
#include "kernel.h"
#include "half.h"

void ada_code_products_scalar(float *s, ptrdiff_t lds, const float *x, ptrdiff_t ldx, int rows,
                              const uint8_t *codes, int n, int lanes) {
    for (int r = 0; r < rows; r++)
        for (int lane = 0; lane < lanes; lane++) {
            const int chunk = lane / ADA_CODE_CHUNK * ADA_CODE_CHUNK,
                      wide = lanes - chunk < ADA_CODE_CHUNK ? lanes - chunk : ADA_CODE_CHUNK;
            const uint8_t *at = codes + (ptrdiff_t)chunk * ((n + 3) / 4 * 4) + 4 * (lane - chunk);
            float sum = 0;
            for (int j = 0; j < n; j++) sum += x[r * ldx + j] * (float)(at[4 * (j / 4 * wide) + j % 4] - 128);
            s[r * lds + lane] = sum;
        }
}

void ada_page_rows_scalar(void *to, const float *x, int rows, int D) {
    for (int r = 0; r < rows; r++)
        memcpy((char *)to + r * ADA_PAGE_ROW_BYTES(D), x + r * D, (size_t)D * sizeof *x);
}

void ada_page_scores_scalar(float *s, const void *x, int rows, const uint8_t *codes, int D, float scale,
                            const float *centre) {
    const ptrdiff_t ldx = ADA_PAGE_ROW_BYTES(D) / (ptrdiff_t)sizeof(float);
    ada_code_products_scalar(s, ADA_BLOCK, x, ldx, rows, codes, D, ADA_BLOCK);
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < ADA_BLOCK; j++)
            s[r * ADA_BLOCK + j] = s[r * ADA_BLOCK + j] * scale + centre[r * ADA_BLOCK];
}

void ada_page_values_scalar(float *o, ptrdiff_t ldo, const float *p, int rows, const uint8_t *codes, int E,
                            float scale, const uint16_t *mean) {
    float sums[ADA_ROW_GROUP * ADA_CODES_MOST];
    const int lanes = (E + 15) / 16 * 16;
    ada_code_products_scalar(sums, lanes, p, ADA_BLOCK, rows, codes, ADA_BLOCK, lanes);
    for (int r = 0; r < rows; r++, p += ADA_BLOCK) {
        float weight = 0;
        for (int j = 0; j < ADA_BLOCK; j++) weight += p[j];
        for (int e = 0; e < E; e++)
            o[r * ldo + e] += sums[r * lanes + e] * scale + weight * float_from_bf16(mean[e]);
    }
}
