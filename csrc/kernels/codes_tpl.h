/* Products of a few rows with 8-bit codes of a page, whose lanes lie side by side in groups of four numbers:
 * each code is converted once for all rows. In the vocabulary of a simd_*.h. OWN_PRODUCTS: the including file
 * has multiply_rows, page_rows and multiply_page of its own.
 */
#ifndef OWN_PRODUCTS
#    include "codes_target.h"

INLINE void multiply_codes(const target *t, int first, const float *x, ptrdiff_t ldx, const uint8_t *codes,
                           int n, int lanes, const int R) {
    for (int lane = 0; lane < lanes; lane += VL) {
        const int chunk = lane / ADA_CODE_CHUNK * ADA_CODE_CHUNK,
                  wide = lanes - chunk < ADA_CODE_CHUNK ? lanes - chunk : ADA_CODE_CHUNK;
        const uint8_t *at = codes + (ptrdiff_t)chunk * n + 4 * (lane - chunk);
        vec acc[ADA_ROW_GROUP];
        UNROLL for (int r = 0; r < R; r++) acc[r] = v_zero();
        for (int j = 0; j < n; j += 4, at += 4 * wide) UNROLL for (int b = 0; b < 4; b++) {
                const vec code = v_code(at, b);
                UNROLL for (int r = 0; r < R; r++) acc[r] = v_fma(v_set1(x[r * ldx + j + b]), code, acc[r]);
            }
        UNROLL for (int r = 0; r < R; r++) finish(t, first + r, lane, acc[r]);
    }
}

INLINE void multiply_rows(const target *t, const float *x, ptrdiff_t ldx, int rows, const uint8_t *codes,
                          int n, int lanes) {
    if (rows & 4) multiply_codes(t, 0, x, ldx, codes, n, lanes, 4);
    if (rows & 2) multiply_codes(t, 0, x, ldx, codes, n, lanes, 2);
    if (rows & 1) multiply_codes(t, rows & 2, x + (rows & 2) * ldx, ldx, codes, n, lanes, 1);
}

void KERNEL(page_rows)(void *to, const float *x, int rows, int D) {
    for (int r = 0; r < rows; r++, x += D) {
        float *row = (float *)((char *)to + r * ADA_PAGE_ROW_BYTES(D));
        memcpy(row, x, (size_t)D * sizeof *x);
        for (int d = D; d % 4; d++) row[d] = 0;
    }
}

INLINE void multiply_page(const target *t, const void *x, int rows, const uint8_t *codes, int D) {
    multiply_rows(t, x, ADA_PAGE_ROW_BYTES(D) / (int)sizeof(float), rows, codes, (D + 3) / 4 * 4, ADA_BLOCK);
}
#endif

void KERNEL(code_products)(float *s, ptrdiff_t lds, const float *x, ptrdiff_t ldx, int rows,
                           const uint8_t *codes, int n, int lanes) {
    const target t = {.s = s, .lds = lds, .lanes = lanes, .scale = 1};
    multiply_rows(&t, x, ldx, rows, codes, n, lanes);
}

void KERNEL(page_scores)(float *s, const void *x, int rows, const uint8_t *codes, int D, float scale,
                         const float *centre) {
    const target t = {.s = s, .lds = ADA_BLOCK, .lanes = ADA_BLOCK, .scale = scale, .centre = centre};
    multiply_page(&t, x, rows, codes, D);
}

void KERNEL(page_values)(float *o, ptrdiff_t ldo, const float *p, int rows, const uint8_t *codes, int E,
                         float scale, const uint16_t *mean) {
    target t = {.s = o, .lds = ldo, .lanes = E, .scale = scale, .mean = mean};
    for (int r = 0; r < rows; r++) {
        vec sum = v_zero();
        for (int j = 0; j < ADA_BLOCK; j += VL) sum = v_add(sum, v_loadu(p + r * ADA_BLOCK + j));
        t.weight[r] = v_sum(sum);
    }
    multiply_rows(&t, p, ADA_BLOCK, rows, codes, ADA_BLOCK, (E + 15) / 16 * 16);
}
