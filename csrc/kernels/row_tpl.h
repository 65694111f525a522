/* Scores and values of a few queries, rows of K and V read along the head. Memory-bound: elements are
 * converted in registers, once for up to ROW_GROUP queries, and rows are read one after the other as one
 * stream with each line asking for the one 4 KB ahead. On Zen 4 two or four rows at a time, or partial loads,
 * halve the rate: the hardware's prefetcher loses the stream. The including file defines ROW(op), the symbol
 * of an op, ELEMENT, the dtype of K and V, and LOAD(p) / LOAD_N(p, n). A query's bits do not depend on n or
 * on the other queries.
 */

/* Far enough to hide the latency; with 16 KB more requests are dropped than met. */
#define AHEAD_BYTES 4096
#define PREFETCH(p) __builtin_prefetch((const char *)(p) + AHEAD_BYTES, 0, 2)
/* Asks once per line while i steps over a row's vectors. */
#define PREFETCH_VECTOR(p, i)                                                                                \
    if ((i)*VL * (int)sizeof(ELEMENT) % 64 == 0) PREFETCH((p) + (i)*VL)

INLINE REAL ROW(dot)(const REAL *q, const ELEMENT *k, int D) {
    vec acc[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    int d = 0;
    for (; d + 4 * VL <= D; d += 4 * VL) UNROLL for (int i = 0; i < 4; i++) {
            PREFETCH_VECTOR(k + d, i);
            acc[i] = v_fma(v_loadu(q + d + i * VL), LOAD(k + d + i * VL), acc[i]);
        }
    for (; d + VL <= D; d += VL) {
        PREFETCH(k + d);
        acc[0] = v_fma(v_loadu(q + d), LOAD(k + d), acc[0]);
    }
    if (d < D) acc[0] = v_fma(v_load_n(q + d, D - d), LOAD_N(k + d, D - d), acc[0]);
    return v_sum(v_add(v_add(acc[0], acc[1]), v_add(acc[2], acc[3])));
}

/* One query against the next four keys, for a head of NV whole vectors; sums are formed four at a time. */
INLINE void ROW(dots)(REAL *s, const REAL *q, const ELEMENT *k, ptrdiff_t ldk, const int NV) {
    vec acc[4], x[8]; /* loads of q would cost as much as those of K */
    UNROLL for (int i = 0; i < NV; i++) x[i] = v_loadu(q + i * VL);
    UNROLL for (int j = 0; j < 4; j++, k += ldk) {
        acc[j] = v_zero();
        UNROLL for (int i = 0; i < NV; i++) {
            PREFETCH_VECTOR(k, i);
            acc[j] = v_fma(x[i], LOAD(k + i * VL), acc[j]);
        }
    }
    v_sum4(s, acc);
}

/* Several queries against the next two keys: chains enough to keep the FMA pipes busy. */
INLINE void ROW(dots_of)(REAL *s, const REAL *q, const ELEMENT *k, ptrdiff_t ldk, const int R, const int NV) {
    vec acc[8];
    REAL sums[8];
    UNROLL for (int a = 0; a < 8; a++) acc[a] = v_zero();
    UNROLL for (int i = 0; i < NV; i++) {
        vec x[2];
        UNROLL for (int j = 0; j < 2; j++) {
            PREFETCH_VECTOR(k + j * ldk, i);
            x[j] = LOAD(k + j * ldk + i * VL);
        }
        UNROLL for (int r = 0; r < R; r++) {
            vec y = v_loadu(q + (r * NV + i) * VL);
            UNROLL for (int j = 0; j < 2; j++) acc[2 * r + j] = v_fma(y, x[j], acc[2 * r + j]);
        }
    }
    v_sum4(sums, acc);
    if (R > 2) v_sum4(sums + 4, acc + 4);
    UNROLL for (int r = 0; r < R; r++) memcpy(s + r * ADA_BLOCK, sums + 2 * r, 2 * sizeof *s);
}

INLINE void ROW(whole_rows)(REAL *s, const REAL *q, const ELEMENT *k, ptrdiff_t ldk, int n, const int R,
                            const int NV) {
    const int keys = R == 1 ? 4 : 2;
    int j = 0;
    for (; j + keys <= n; j += keys, k += keys * ldk) {
        if (R == 1)
            ROW(dots)(s + j, q, k, ldk, NV);
        else
            ROW(dots_of)(s + j, q, k, ldk, R, NV);
    }
    for (; j < n; j++, k += ldk)
        for (int r = 0; r < R; r++) {
            REAL same[4];
            ROW(dots)(same, q + r * NV * VL, k, 0, NV);
            s[r * ADA_BLOCK + j] = same[0];
        }
}

INLINE void ROW(score_rows)(REAL *s, const REAL *q, const ELEMENT *k, ptrdiff_t ldk, int n, int D,
                            const int R) {
    if (D == 8 * VL) {
        ROW(whole_rows)(s, q, k, ldk, n, R, 8);
    } else if (D == 4 * VL) {
        ROW(whole_rows)(s, q, k, ldk, n, R, 4);
    } else {
        for (int j = 0; j < n; j++, k += ldk)
            for (int r = 0; r < R; r++) s[r * ADA_BLOCK + j] = ROW(dot)(q + r * D, k, D);
    }
}

void ROW(row_scores)(REAL *s, const REAL *q, int rows, const void *keys, ptrdiff_t ldk, int n, int D) {
    if (rows & 4) {
        ROW(score_rows)(s, q, keys, ldk, n, D, 4);
        return;
    }
    if (rows & 2) ROW(score_rows)(s, q, keys, ldk, n, D, 2);
    if (rows & 1) ROW(score_rows)(s + (rows & 2) * ADA_BLOCK, q + (rows & 2) * D, keys, ldk, n, D, 1);
}

/* NV vectors of coordinates of R queries in registers over all n rows. */
INLINE void ROW(columns)(REAL *o, ptrdiff_t ldo, const REAL *p, const ELEMENT *v, ptrdiff_t ldv, int n,
                         const int R, const int NV) {
    vec acc[TILE_ACC];
    UNROLL for (int a = 0; a < R * NV; a++) acc[a] = v_zero();
    for (int j = 0; j < n; j++, v += ldv) {
        vec w[4];
        UNROLL for (int r = 0; r < R; r++) w[r] = v_set1(p[r * ADA_BLOCK + j]);
        UNROLL for (int i = 0; i < NV; i++) {
            PREFETCH_VECTOR(v, i);
            vec x = LOAD(v + i * VL);
            UNROLL for (int r = 0; r < R; r++) acc[r * NV + i] = v_fma(w[r], x, acc[r * NV + i]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < NV; i++) {
        REAL *to = o + r * ldo + i * VL;
        v_storeu(to, v_add(v_loadu(to), acc[r * NV + i]));
    }
}

/* Fewer than VL coordinates. Partial loads that miss the cache cost twice, so nothing else uses them. */
INLINE void ROW(last_columns)(REAL *o, const REAL *p, const ELEMENT *v, ptrdiff_t ldv, int n, int width) {
    vec acc = v_zero();
    for (int j = 0; j < n; j++) acc = v_fma(v_set1(p[j]), LOAD_N(v + j * ldv, width), acc);
    v_store_n(o, v_add(v_load_n(o, width), acc), width);
}

INLINE void ROW(value_rows)(REAL *o, ptrdiff_t ldo, const REAL *p, const ELEMENT *v, ptrdiff_t ldv, int n,
                            int E, const int R) {
    const int most = TILE_ACC / R < 8 ? TILE_ACC / R : 8;
    int e = 0;
    while (E - e >= VL) {
        const int left = (E - e) / VL, vectors = left < most ? left : most;
#define COLUMNS(NV)                                                                                          \
    case NV:                                                                                                 \
        if (NV <= most) ROW(columns)(o + e, ldo, p, v + e, ldv, n, R, NV);                                   \
        break;
        switch (vectors) {
            COLUMNS(1) COLUMNS(2) COLUMNS(3) COLUMNS(4) COLUMNS(5) COLUMNS(6) COLUMNS(7) COLUMNS(8)
        }
#undef COLUMNS
        e += vectors * VL;
    }
    for (int r = 0; e < E && r < R; r++)
        ROW(last_columns)(o + r * ldo + e, p + r * ADA_BLOCK, v + e, ldv, n, E - e);
}

void ROW(row_values)(REAL *o, ptrdiff_t ldo, const REAL *p, int rows, const void *values, ptrdiff_t ldv,
                     int n, int E) {
    if (rows & 4) {
        ROW(value_rows)(o, ldo, p, values, ldv, n, E, 4);
        return;
    }
    if (rows & 2) ROW(value_rows)(o, ldo, p, values, ldv, n, E, 2);
    if (rows & 1)
        ROW(value_rows)(o + (rows & 2) * ldo, ldo, p + (rows & 2) * ADA_BLOCK, values, ldv, n, E, 1);
}
#undef ROW
#undef ELEMENT
#undef LOAD
#undef LOAD_N
#undef AHEAD_BYTES
#undef PREFETCH
#undef PREFETCH_VECTOR
