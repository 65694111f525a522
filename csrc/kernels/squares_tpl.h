/* Sums of squares along rows, four rows at a time, so that their sums across lanes are formed together. The
 * including file has the vocabulary of an ISA for float, and KERNEL(op).
 */

/* R rows, 1 or 4; what is NULL is known to the compiler. A row's bits do not depend on R. */
INLINE void squares_of_rows(float *norm2, float *square, const float *rows, ptrdiff_t ld, int width,
                            const float *less, const float *weight, const int R) {
    vec sums[4];
    float to[4];
    UNROLL for (int r = 0; r < 4; r++) sums[r] = v_zero();
    for (int c = 0; c < width; c += VL) {
        const int left = width - c;
        const vec centre = !less ? v_zero() : left < VL ? v_load_n(less + c, left) : v_loadu(less + c);
        const vec factor = !weight ? v_zero() : left < VL ? v_load_n(weight + c, left) : v_loadu(weight + c);
        vec column = v_zero();
        UNROLL for (int r = 0; r < R; r++) {
            vec x = left < VL ? v_load_n(rows + r * ld + c, left) : v_loadu(rows + r * ld + c);
            if (less) x = v_sub(x, centre);
            const vec scaled = weight ? v_mul(x, factor) : x;
            sums[r] = v_fma(x, scaled, sums[r]);
            if (square) column = v_fma(x, x, column);
        }
        if (square && left < VL)
            v_store_n(square + c, v_add(v_load_n(square + c, left), column), left);
        else if (square)
            v_storeu(square + c, v_add(v_loadu(square + c), column));
    }
    v_sum4(to, sums);
    UNROLL for (int r = 0; r < R; r++) norm2[r] = to[r];
}

INLINE void squares_of(float *norm2, float *square, const float *rows, ptrdiff_t ld, int n, int width,
                       const float *less, const float *weight) {
    int r = 0;
    for (; r + 4 <= n; r += 4, rows += 4 * ld)
        squares_of_rows(norm2 + r, square, rows, ld, width, less, weight, 4);
    for (; r < n; r++, rows += ld) squares_of_rows(norm2 + r, square, rows, ld, width, less, weight, 1);
}
