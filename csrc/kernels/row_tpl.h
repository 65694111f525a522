/* Scores and values of a single query, rows of K and V read along the head. Memory-bound: elements are
 * converted in registers, and rows are read one after the other as one stream with each line asking for the
 * one 2 KB ahead. On Zen 4 two or four rows at a time, or partial loads, halve the rate: the hardware's
 * prefetcher loses the stream. The including file defines ROW(op), the symbol of an op, ELEMENT, the dtype of
 * K and V, and LOAD(p) / LOAD_N(p, n).
 */

/* Far enough to hide the latency; with 16 KB more requests are dropped than met. */
#define AHEAD_BYTES 2048
#define PREFETCH(p) __builtin_prefetch((const char *)(p) + AHEAD_BYTES, 0, 2)

INLINE REAL ROW(dot)(const REAL *q, const ELEMENT *k, int D) {
    vec acc[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    int d = 0;
    for (; d + 4 * VL <= D; d += 4 * VL) UNROLL for (int i = 0; i < 4; i++) {
            PREFETCH(k + d + i * VL);
            acc[i] = v_fma(v_loadu(q + d + i * VL), LOAD(k + d + i * VL), acc[i]);
        }
    for (; d + VL <= D; d += VL) {
        PREFETCH(k + d);
        acc[0] = v_fma(v_loadu(q + d), LOAD(k + d), acc[0]);
    }
    if (d < D) acc[0] = v_fma(v_load_n(q + d, D - d), LOAD_N(k + d, D - d), acc[0]);
    return v_sum(v_add(v_add(acc[0], acc[1]), v_add(acc[2], acc[3])));
}

/* The same for a head of NV whole vectors, with q in registers: loads of q cost as much as those of K. */
INLINE void ROW(dots)(REAL *s, const REAL *q, const ELEMENT *k, ptrdiff_t ldk, int n, const int NV) {
    vec x[8];
    UNROLL for (int i = 0; i < NV; i++) x[i] = v_loadu(q + i * VL);
    for (int j = 0; j < n; j++, k += ldk) {
        vec acc[2] = {v_zero(), v_zero()};
        UNROLL for (int i = 0; i < NV; i++) {
            PREFETCH(k + i * VL);
            acc[i % 2] = v_fma(x[i], LOAD(k + i * VL), acc[i % 2]);
        }
        s[j] = v_sum(v_add(acc[0], acc[1]));
    }
}

void ROW(row_scores)(REAL *s, const REAL *q, const void *keys, ptrdiff_t ldk, int n, int D) {
    const ELEMENT *k = keys;
    if (D == 4 * VL) {
        ROW(dots)(s, q, k, ldk, n, 4);
    } else if (D == 8 * VL) {
        ROW(dots)(s, q, k, ldk, n, 8);
    } else {
        for (int j = 0; j < n; j++, k += ldk) s[j] = ROW(dot)(q, k, D);
    }
}

/* NV vectors of coordinates in registers over all n rows. */
INLINE void ROW(columns)(REAL *o, const REAL *p, const ELEMENT *v, ptrdiff_t ldv, int n, const int NV) {
    vec acc[8];
    UNROLL for (int x = 0; x < NV; x++) acc[x] = v_zero();
    for (int j = 0; j < n; j++, v += ldv) {
        vec w = v_set1(p[j]);
        UNROLL for (int x = 0; x < NV; x++) {
            PREFETCH(v + x * VL);
            acc[x] = v_fma(w, LOAD(v + x * VL), acc[x]);
        }
    }
    UNROLL for (int x = 0; x < NV; x++) v_storeu(o + x * VL, v_add(v_loadu(o + x * VL), acc[x]));
}

/* Fewer than VL coordinates. Partial loads that miss the cache cost twice, so nothing else uses them. */
INLINE void ROW(last_columns)(REAL *o, const REAL *p, const ELEMENT *v, ptrdiff_t ldv, int n, int width) {
    vec acc = v_zero();
    for (int j = 0; j < n; j++) acc = v_fma(v_set1(p[j]), LOAD_N(v + j * ldv, width), acc);
    v_store_n(o, v_add(v_load_n(o, width), acc), width);
}

void ROW(row_values)(REAL *o, const REAL *p, const void *values, ptrdiff_t ldv, int n, int E) {
    const ELEMENT *v = values;
    int e = 0;
    while (E - e >= VL) {
        const int vectors = (E - e) / VL < 8 ? (E - e) / VL : 8;
#define COLUMNS(NV)                                                                                          \
    case NV:                                                                                                 \
        ROW(columns)(o + e, p, v + e, ldv, n, NV);                                                           \
        break;
        switch (vectors) {
            COLUMNS(1) COLUMNS(2) COLUMNS(3) COLUMNS(4) COLUMNS(5) COLUMNS(6) COLUMNS(7) COLUMNS(8)
        }
#undef COLUMNS
        e += vectors * VL;
    }
    if (e < E) ROW(last_columns)(o + e, p, v + e, ldv, n, E - e);
}
#undef ROW
#undef ELEMENT
#undef LOAD
#undef LOAD_N
#undef AHEAD_BYTES
#undef PREFETCH
