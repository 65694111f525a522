/* Scores and values of a few queries, rows of K and V read along the head. Memory-bound: elements are
 * converted in registers, once for up to ROW_GROUP queries, and rows are read one after the other as one
 * stream with each line asking for one ahead. For one query, two or four rows at a time, or partial loads,
 * halve the rate: the hardware's prefetcher loses the stream. Values that take several passes ask in the
 * order of memory all the same. The including file defines ROW(op), the symbol of an op, ELEMENT, the dtype
 * of K and V, and LOAD(p) / LOAD_N(p, n). A query's bits do not depend on n or on the other queries.
 */

/* One query, whose elements are used as fast as they come, wants them from near. Several take longer than
 * memory's latency for what lies near: they ask from far for L2 and from near for L1, which is 1.5 times as
 * fast on Zen 4. Far is no multiple of 4 KB, whose lines would share their sets with those in use. */
#define NEAR_BYTES 1024
#define FAR_BYTES 14336
#define PREFETCH(p, R)                                                                                       \
    do {                                                                                                     \
        __builtin_prefetch((const char *)(p) + NEAR_BYTES, 0, (R) == 1 ? 2 : 3);                             \
        if ((R) > 1) __builtin_prefetch((const char *)(p) + FAR_BYTES, 0, 2);                                \
    } while (0)
/* Asks once per line while i steps over a row's vectors. */
#define PREFETCH_VECTOR(p, i, R)                                                                             \
    if ((i)*VL * (int)sizeof(ELEMENT) % 64 == 0) PREFETCH((p) + (i)*VL, R)

#if TILE_ACC == 16
/* Four queries against two keys, to the bits of the same one by one: queries are loaded once for both. D is a
 * multiple of 4 VL. */
INLINE void ROW(dots_of_two)(REAL *s, const REAL *q, const ELEMENT *k, ptrdiff_t ldk, const int D) {
    vec acc[16], sums[8];
    REAL to[8];
    UNROLL for (int a = 0; a < 16; a++) acc[a] = v_zero();
    for (int d = 0; d < D; d += 4 * VL) UNROLL for (int i = 0; i < 4; i++) {
            PREFETCH_VECTOR(k + d, i, 4);
            PREFETCH_VECTOR(k + ldk + d, i, 4);
            vec x[2] = {LOAD(k + d + i * VL), LOAD(k + ldk + d + i * VL)};
            PIN(x[0]);
            PIN(x[1]);
            UNROLL for (int r = 0; r < 4; r++) {
                vec y = v_loadu(q + r * D + d + i * VL);
                PIN(y);
                UNROLL for (int j = 0; j < 2; j++) {
                    vec *to_add = acc + 8 * j + 2 * r + i % 2;
                    *to_add = v_fma(y, x[j], *to_add);
                }
            }
        }
    UNROLL for (int a = 0; a < 8; a++) sums[a] = v_add(acc[2 * a], acc[2 * a + 1]);
    v_sum4(to, sums);
    v_sum4(to + 4, sums + 4);
    UNROLL for (int a = 0; a < 8; a++) s[a % 4 * ADA_BLOCK + a / 4] = to[a];
}
#endif

/* R queries against the next 4 / R keys, four sums at a time: two chains for each. */
INLINE void ROW(dots)(REAL *s, const REAL *q, const ELEMENT *k, ptrdiff_t ldk, const int D, const int R) {
    vec acc[8], sums[4];
    REAL to[4];
    UNROLL for (int a = 0; a < 8; a++) acc[a] = v_zero();
    UNROLL for (int j = 0; j < 4; j += R, k += ldk) {
        int d = 0;
        for (; d + 4 * VL <= D; d += 4 * VL) UNROLL for (int i = 0; i < 4; i++) {
                PREFETCH_VECTOR(k + d, i, R);
                vec x = LOAD(k + d + i * VL), *to_add = acc + 2 * j + i % 2;
                UNROLL for (int r = 0; r < R; r++) to_add[2 * r] =
                    v_fma(v_loadu(q + r * D + d + i * VL), x, to_add[2 * r]);
            }
        for (; d < D; d += VL) {
            const int left = D - d;
            PREFETCH(k + d, R);
            vec x = left < VL ? LOAD_N(k + d, left) : LOAD(k + d);
            UNROLL for (int r = 0; r < R; r++) {
                vec y = left < VL ? v_load_n(q + r * D + d, left) : v_loadu(q + r * D + d);
                acc[2 * (j + r)] = v_fma(y, x, acc[2 * (j + r)]);
            }
        }
    }
    UNROLL for (int a = 0; a < 4; a++) sums[a] = v_add(acc[2 * a], acc[2 * a + 1]);
    v_sum4(to, sums);
    UNROLL for (int a = 0; a < 4; a++) s[a % R * ADA_BLOCK + a / R] = to[a];
}

INLINE void ROW(score_heads)(REAL *s, const REAL *q, const ELEMENT *k, ptrdiff_t ldk, int n, const int D,
                             const int R) {
    int j = 0;
#if TILE_ACC == 16
    if (R == 4 && D % (4 * VL) == 0)
        for (; j + 2 <= n; j += 2, k += 2 * ldk) ROW(dots_of_two)(s + j, q, k, ldk, D);
#endif
    for (; j + 4 / R <= n; j += 4 / R, k += 4 / R * ldk) ROW(dots)(s + j, q, k, ldk, D, R);
    for (; j < n; j++, k += ldk) {
        REAL same[ADA_ROW_GROUP * ADA_BLOCK];
        ROW(dots)(same, q, k, 0, D, R);
        for (int r = 0; r < R; r++) s[r * ADA_BLOCK + j] = same[r * ADA_BLOCK];
    }
}

/* Unrolled for the usual sizes of heads. */
INLINE void ROW(score_rows)(REAL *s, const REAL *q, const ELEMENT *k, ptrdiff_t ldk, int n, int D,
                            const int R) {
    if (D == 16 * VL)
        ROW(score_heads)(s, q, k, ldk, n, 16 * VL, R);
    else if (D == 8 * VL)
        ROW(score_heads)(s, q, k, ldk, n, 8 * VL, R);
    else if (D == 4 * VL)
        ROW(score_heads)(s, q, k, ldk, n, 4 * VL, R);
    else
        ROW(score_heads)(s, q, k, ldk, n, D, R);
}

void ROW(row_scores)(REAL *s, const REAL *q, int rows, const void *keys, ptrdiff_t ldk, int n, int D) {
    if (rows & 4) {
        ROW(score_rows)(s, q, keys, ldk, n, D, 4);
        return;
    }
    if (rows & 2) ROW(score_rows)(s, q, keys, ldk, n, D, 2);
    if (rows & 1) ROW(score_rows)(s + (rows & 2) * ADA_BLOCK, q + (rows & 2) * D, keys, ldk, n, D, 1);
}

/* NV vectors of coordinates of R queries in registers over all n rows; ask steps over what is prefetched. */
INLINE void ROW(columns)(REAL *o, ptrdiff_t ldo, const REAL *p, const ELEMENT *v, ptrdiff_t ldv, int n,
                         const ELEMENT *ask, ptrdiff_t step, const int R, const int NV) {
    vec acc[TILE_ACC];
    UNROLL for (int a = 0; a < R * NV; a++) acc[a] = v_zero();
    for (int j = 0; j < n; j++, v += ldv, ask += step) {
        vec w[4];
        UNROLL for (int r = 0; r < R; r++) w[r] = v_set1(p[r * ADA_BLOCK + j]);
        UNROLL for (int i = 0; i < NV; i++) {
            PREFETCH_VECTOR(ask, i, R);
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

/* As many passes over the n rows as the registers need. Each asks for its share of as many bytes, one after
 * the other, of rows that touch: passes that ask for the lines below their own read fp32 at 55 % of the rate.
 */
INLINE void ROW(value_rows)(REAL *o, ptrdiff_t ldo, const REAL *p, const ELEMENT *v, ptrdiff_t ldv, int n,
                            int E, const int R) {
    const int most = TILE_ACC / R < 8 ? TILE_ACC / R : 8;
    int e = 0;
    while (E - e >= VL) {
        const int left = (E - e) / VL, vectors = left < most ? left : most;
        const ELEMENT *ask = v + (ldv == E ? n * e : e);
        const ptrdiff_t step = ldv == E ? vectors * VL : ldv;
#define COLUMNS(NV)                                                                                          \
    case NV:                                                                                                 \
        if (NV <= most) ROW(columns)(o + e, ldo, p, v + e, ldv, n, ask, step, R, NV);                        \
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

/* Blocks of 4 KB: passes over larger ones find less of them in L1. Sums are formed by block, so blocks are
 * the same for any number of queries, and for half formats as for the REAL that those become where they are
 * not read in place. */
INLINE void ROW(value_blocks)(REAL *o, ptrdiff_t ldo, const REAL *p, const ELEMENT *v, ptrdiff_t ldv, int n,
                              int E, const int R) {
    int block = 4096 / (E * (int)sizeof(REAL));
    if (block < 8) block = 8;
    if (E <= TILE_ACC / ADA_ROW_GROUP * VL) block = n;
    for (int j = 0; j < n; j += block)
        ROW(value_rows)(o, ldo, p + j, v + j * ldv, ldv, n - j < block ? n - j : block, E, R);
}

void ROW(row_values)(REAL *o, ptrdiff_t ldo, const REAL *p, int rows, const void *values, ptrdiff_t ldv,
                     int n, int E) {
    if (rows & 4) {
        ROW(value_blocks)(o, ldo, p, values, ldv, n, E, 4);
        return;
    }
    if (rows & 2) ROW(value_blocks)(o, ldo, p, values, ldv, n, E, 2);
    if (rows & 1)
        ROW(value_blocks)(o + (rows & 2) * ldo, ldo, p + (rows & 2) * ADA_BLOCK, values, ldv, n, E, 1);
}
#undef ROW
#undef ELEMENT
#undef LOAD
#undef LOAD_N
#undef NEAR_BYTES
#undef FAR_BYTES
#undef PREFETCH
#undef PREFETCH_VECTOR
