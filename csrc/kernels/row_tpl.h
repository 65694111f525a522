/* Scores and values of a single query, rows of K and V read along the head: memory-bound, so elements are
 * converted in registers and the rows some KB ahead are prefetched (what makes one core reach its read bandwidth). The
 * including file defines ROW(op), the symbol of an op, ELEMENT, the dtype of K and V, and LOAD(p) / LOAD_N(p, n).
 */

#define AHEAD_BYTES 16384
#define PREFETCH_ROW(row, n)                                                                                 \
    for (int b = 0; b < (n) * (int)sizeof(ELEMENT); b += 64)                                                 \
        __builtin_prefetch((const char *)(row) + AHEAD_BYTES + b, 0, 2)

/* Four rows at a time share the loads of q and hide the FMA latency. */
INLINE void ROW(dots)(REAL *s, const REAL *q, const ELEMENT *k, ptrdiff_t ldk, const int rows, int D) {
    vec acc[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    int d = 0;
    for (; d + VL <= D; d += VL) {
        vec x = v_loadu(q + d);
        UNROLL for (int i = 0; i < rows; i++) acc[i] = v_fma(x, LOAD(k + i * ldk + d), acc[i]);
    }
    if (d < D) {
        vec x = v_load_n(q + d, D - d);
        UNROLL for (int i = 0; i < rows; i++) acc[i] = v_fma(x, LOAD_N(k + i * ldk + d, D - d), acc[i]);
    }
    UNROLL for (int i = 0; i < rows; i++) s[i] = v_sum(acc[i]);
}

void ROW(row_scores)(REAL *s, const REAL *q, const void *keys, ptrdiff_t ldk, int n, int D) {
    const ELEMENT *k = keys;
    int j = 0;
    for (; j + 4 <= n; j += 4) {
        for (int i = 0; i < 4; i++) PREFETCH_ROW(k + (j + i) * ldk, D);
        ROW(dots)(s + j, q, k + j * ldk, ldk, 4, D);
    }
    for (; j < n; j++) ROW(dots)(s + j, q, k + j * ldk, ldk, 1, D);
}

/* NV vectors of coordinates in registers over all n rows. */
INLINE void ROW(columns)(REAL *o, const REAL *p, const ELEMENT *v, ptrdiff_t ldv, int n, int width, const int NV) {
    vec acc[8];
    UNROLL for (int x = 0; x < NV; x++) acc[x] = v_zero();
    for (int j = 0; j < n; j++, v += ldv) {
        PREFETCH_ROW(v, width);
        vec w = v_set1(p[j]);
        UNROLL for (int x = 0; x < NV - 1; x++) acc[x] = v_fma(w, LOAD(v + x * VL), acc[x]);
        acc[NV - 1] = v_fma(w, LOAD_N(v + (NV - 1) * VL, width - (NV - 1) * VL), acc[NV - 1]);
    }
    UNROLL for (int x = 0; x < NV; x++) {
        int left = width - x * VL;
        v_store_n(o + x * VL, v_add(v_load_n(o + x * VL, left), acc[x]), left);
    }
}

void ROW(row_values)(REAL *o, const REAL *p, const void *values, ptrdiff_t ldv, int n, int E) {
    const ELEMENT *v = values;
    for (int e = 0; e < E; e += 8 * VL) {
        int width = E - e < 8 * VL ? E - e : 8 * VL;
#define COLUMNS(NV) case NV: ROW(columns)(o + e, p, v + e, ldv, n, width, NV); break;
        switch ((width + VL - 1) / VL) {
            COLUMNS(1) COLUMNS(2) COLUMNS(3) COLUMNS(4) COLUMNS(5) COLUMNS(6) COLUMNS(7) COLUMNS(8)
        }
#undef COLUMNS
    }
}
#undef ROW
#undef ELEMENT
#undef LOAD
#undef LOAD_N
#undef AHEAD_BYTES
#undef PREFETCH_ROW
