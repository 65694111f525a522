/* Rows of floats on their way to narrow elements, AVX-512: less what they are centred by, times a factor. */
/* 16 elements from c on, or the last n. */
INLINE vec distances(const float *row, const float *less, int c, int n) {
    const vec x = n >= VL ? v_loadu(row + c) : v_load_n(row + c, n);
    if (!less) return x;
    return v_sub(x, n >= VL ? v_loadu(less + c) : v_load_n(less + c, n));
}

/* The same on their way to a format. */
INLINE vec scaled(const float *x, const float *less, const float *factor, bool by_row, int r, int c, int n) {
    const vec y = distances(x, less, c, n);
    if (by_row) return v_mul(y, v_set1(factor[r]));
    return v_mul(y, n >= VL ? v_loadu(factor + c) : v_load_n(factor + c, n));
}
