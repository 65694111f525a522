/* Scores and values of a few queries in plain C. The including file defines REAL, ROW(op), the symbol of an
 * op, ELEMENT, the dtype of K and V, and VALUE(x), an element as REAL.
 */
void ROW(row_scores)(REAL *s, const REAL *q, int rows, const void *keys, ptrdiff_t ldk, int n, int D) {
    for (int r = 0; r < rows; r++, s += ADA_BLOCK, q += D) {
        const ELEMENT *k = keys;
        for (int j = 0; j < n; j++, k += ldk) {
            s[j] = 0;
            for (int d = 0; d < D; d++) s[j] += q[d] * VALUE(k[d]);
        }
    }
}

void ROW(row_values)(REAL *o, ptrdiff_t ldo, const REAL *p, int rows, const void *values, ptrdiff_t ldv,
                     int n, int E) {
    const ELEMENT *v = values;
    for (int r = 0; r < rows; r++, o += ldo, p += ADA_BLOCK)
        for (int e = 0; e < E; e++) {
            REAL sum = 0;
            for (int j = 0; j < n; j++) sum += p[j] * VALUE(v[j * ldv + e]);
            o[e] += sum;
        }
}
#undef ROW
#undef ELEMENT
#undef VALUE
