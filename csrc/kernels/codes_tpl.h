/* Products of a few rows with 8-bit codes of a page, whose lanes lie side by side in groups of four numbers:
 * each code is converted once for all rows. In the vocabulary of a simd_*.h.
 */
INLINE void multiply_codes(float *s, ptrdiff_t lds, const float *x, ptrdiff_t ldx, const uint8_t *codes,
                           int n, int lanes, const int R) {
    for (int lane = 0; lane < lanes; lane += VL) {
        vec acc[ADA_ROW_GROUP];
        UNROLL for (int r = 0; r < R; r++) acc[r] = v_zero();
        for (int j = 0; j < n; j += 4) UNROLL for (int b = 0; b < 4; b++) {
                const vec code = v_code(codes + 4 * ((ptrdiff_t)(j / 4) * lanes + lane), b);
                UNROLL for (int r = 0; r < R; r++) acc[r] = v_fma(v_set1(x[r * ldx + j + b]), code, acc[r]);
            }
        UNROLL for (int r = 0; r < R; r++) v_storeu(s + r * lds + lane, acc[r]);
    }
}

void KERNEL(code_products)(float *s, ptrdiff_t lds, const float *x, ptrdiff_t ldx, int rows,
                           const uint8_t *codes, int n, int lanes) {
    if (rows & 4) multiply_codes(s, lds, x, ldx, codes, n, lanes, 4);
    if (rows & 2) multiply_codes(s, lds, x, ldx, codes, n, lanes, 2);
    const int last = rows & 2;
    if (rows & 1) multiply_codes(s + last * lds, lds, x + last * ldx, ldx, codes, n, lanes, 1);
}
