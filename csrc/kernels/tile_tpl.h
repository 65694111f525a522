/* The kernels of one tile in the vocabulary of a simd_*.h, for one REAL and ISA. The including file defines
 * REAL, REAL_BITS and KERNEL(op), the symbol of an op; it may define OWN_SCORES_WEIGHTS and write that one
 * by hand, and NO_VALUES_PREFETCH. A strip is NV vectors of lanes; strips are as wide as the lanes that are
 * left allow.
 */
#define GAP ((REAL)ADA_LAZY_OCTAVES)
#define LARGEST ((REAL)(REAL_BITS == 32 ? FLT_MAX : DBL_MAX))

#if REAL_BITS == 32
typedef ada_tile_f32 tile_t;
typedef ada_row_f32 row_t;
#else
typedef ada_tile_f64 tile_t;
typedef ada_row_f64 row_t;
#endif

/* Calls body(..., NV) for every strip, NV a compile-time constant. */
#define FOR_STRIPS(lanes, lane, body)                                                                        \
    for (int lane = 0; lane < (lanes);) {                                                                    \
        int left = (lanes)-lane;                                                                             \
        if (TILE_NV == 4 && left >= 4 * VL) {                                                                \
            body(4);                                                                                         \
            lane += 4 * VL;                                                                                  \
        } else if (left >= 2 * VL) {                                                                         \
            body(2);                                                                                         \
            lane += 2 * VL;                                                                                  \
        } else {                                                                                             \
            body(1);                                                                                         \
            lane += VL;                                                                                      \
        }                                                                                                    \
    }

#ifndef NO_VALUES_PREFETCH
INLINE void prefetch_row(const REAL *row, int n) {
    for (int i = 0; i < n; i += 64 / (int)sizeof(REAL)) __builtin_prefetch(row + i, 0, 2);
}
#endif

void KERNEL(pack)(REAL *to, const REAL *rows, ptrdiff_t ld, int n, int D, int lanes, REAL factor) {
    for (int lane = 0; lane < lanes; lane += VL)
        for (int d = 0; d < D; d += VL) {
            vec r[VL];
            UNROLL for (int i = 0; i < VL; i++) {
                const REAL *row = rows + (lane + i < n ? lane + i : n - 1) * ld + d;
                r[i] = v_mul(d + VL <= D ? v_loadu(row) : v_load_n(row, D - d), v_set1(factor));
            }
            v_transpose(r);
            for (int i = 0; i < VL && d + i < D; i++) v_store(to + (d + i) * ADA_LANES + lane, r[i]);
        }
}

bool KERNEL(unpack)(REAL *rows, ptrdiff_t ld, const REAL *o, const REAL *factor, int n, int E) {
    bool finite = true;
    for (int lane = 0; lane < n; lane += VL) {
        vec f = v_load(factor + lane);
        int used = n - lane < VL ? n - lane : VL;
        for (int e = 0; e < E; e += VL) {
            vec r[VL];
            mask bad = m_first(0);
            UNROLL for (int i = 0; i < VL; i++) {
                r[i] = e + i < E ? v_mul(v_load(o + (e + i) * ADA_LANES + lane), f) : v_zero();
                bad = m_or(bad, m_outside(r[i], v_set1(-LARGEST), v_set1(LARGEST)));
            }
            finite &= !m_any(m_and(bad, m_first(used)));
            v_transpose(r);
            if (used == VL && E - e >= VL) {
                UNROLL for (int i = 0; i < VL; i++) v_storeu(rows + (lane + i) * ld + e, r[i]);
            } else {
                for (int i = 0; i < used; i++) v_store_n(rows + (lane + i) * ld + e, r[i], E - e);
            }
        }
    }
    return finite;
}

/* Longer sums over a head are made of parts: one chain of 96 additions has outliers that a plain product has
 * not. Kernels that weigh scores in registers take heads up to MOST_FUSED in one chain. */
#define CHAIN 64
#define MOST_FUSED 128

/* Coordinate d of TILE_ACC / NV keys against NV vectors of lanes. */
INLINE void scores_step(const tile_t *t, int lane, const REAL *k, ptrdiff_t ldk, int d, vec acc[TILE_ACC],
                        const int NV) {
    const int keys = TILE_ACC / NV;
    vec q[TILE_NV];
    UNROLL for (int v = 0; v < NV; v++) {
        q[v] = v_load(t->q + d * ADA_LANES + lane + v * VL);
        PIN(q[v]);
    }
    UNROLL for (int i = 0; i < keys; i++) {
        vec b = v_set1(k[i * ldk + d]);
        UNROLL for (int v = 0; v < NV; v++) acc[i * NV + v] = v_fma(q[v], b, acc[i * NV + v]);
    }
}

INLINE void scores_group(const tile_t *t, int lane, const REAL *k, ptrdiff_t ldk, int first, int end,
                         vec acc[TILE_ACC], const int NV) {
    UNROLL for (int a = 0; a < TILE_ACC; a++) acc[a] = v_zero();
    for (int d = first; d < end; d++) scores_step(t, lane, k, ldk, d, acc, NV);
}

INLINE void scores_strip(const tile_t *t, int lane, const REAL *k, ptrdiff_t ldk, int n, const int NV) {
    const int keys = TILE_ACC / NV;
    for (int j = 0; j < n; j += keys)
        for (int d = 0; d < t->D; d += CHAIN) {
            vec acc[TILE_ACC];
            scores_group(t, lane, k + j * ldk, ldk, d, t->D - d < CHAIN ? t->D : d + CHAIN, acc, NV);
            UNROLL for (int a = 0; a < TILE_ACC; a++) {
                REAL *p = t->p + (j + a / NV) * ADA_LANES + lane + a % NV * VL;
                v_store(p, d ? v_add(v_load(p), acc[a]) : acc[a]);
            }
        }
}

void KERNEL(scores)(const tile_t *t, const REAL *k, ptrdiff_t ldk, int n){
#define STRIP(NV) scores_strip(t, lane, k, ldk, n, NV)
    FOR_STRIPS(t->lanes, lane, STRIP)
#undef STRIP
}

/* A score with its bias, and whether its lane may see it. */
INLINE vec biased(const tile_t *t, int j, int lane, const REAL *bias) {
    vec s = v_load(t->p + j * ADA_LANES + lane);
    return bias ? v_add(s, v_load(bias + j * ADA_LANES + lane)) : s;
}
INLINE mask seen(int j, int lane, const uint64_t *visible, const REAL *bias) {
    mask see = visible ? m_bits(visible[j], lane) : m_first(VL);
    return bias ? m_and(see, m_differ(v_load(bias + j * ADA_LANES + lane), v_set1(-INFINITY))) : see;
}

void KERNEL(reference)(const tile_t *t, int n, const uint64_t *visible, const REAL *bias) {
    for (int lane = 0; lane < t->lanes; lane += VL) {
        vec before = v_load(t->m + lane), m = before;
        for (int j = 0; j < n; j++)
            m = v_max(v_select(seen(j, lane, visible, bias), biased(t, j, lane, bias), m), m);
        mask raised = m_greater(m, v_add(before, v_set1(GAP)));
        if (!m_any(raised)) continue;
        m = v_select(raised, m, before);
        v_store(t->m + lane, m);
        if (!m_any(m_greater(before, v_set1(-INFINITY)))) continue; /* nothing was added yet */
        vec f = v_select(raised, v_exp2(v_sub(before, m)), v_set1(1));
        v_store(t->l + lane, v_mul(f, v_load(t->l + lane)));
        for (int e = 0; e < t->E; e++)
            v_store(t->o + e * ADA_LANES + lane, v_mul(f, v_load(t->o + e * ADA_LANES + lane)));
    }
}

bool KERNEL(weights)(const tile_t *t, int n, const uint64_t *visible, const REAL *bias,
                     const uint64_t *keep) {
    vec sum[ADA_LANES / VL];
    for (int lane = 0; lane < t->lanes; lane += VL) {
        vec m = v_load(t->m + lane), l = v_zero();
        mask bad = m_first(0);
        for (int j = 0; j < n; j++) {
            mask see = seen(j, lane, visible, bias);
            vec y = v_sub(biased(t, j, lane, bias), m);
            bad = m_or(bad, m_and(see, m_outside(y, v_set1(-LARGEST), v_set1(GAP))));
            vec p = v_exp2(v_select(see, y, v_set1(-LARGEST)));
            l = v_add(l, p);
            if (keep) p = v_select(m_bits(keep[j], lane), p, v_zero());
            v_store(t->p + j * ADA_LANES + lane, p);
        }
        if (m_any(bad)) return false;
        sum[lane / VL] = v_add(l, v_load(t->l + lane));
    }
    for (int lane = 0; lane < t->lanes; lane += VL) v_store(t->l + lane, sum[lane / VL]);
    return true;
}

#ifndef OWN_SCORES_WEIGHTS
bool KERNEL(scores_weights)(const tile_t *t, const REAL *k, ptrdiff_t ldk, int n) {
    KERNEL(scores)(t, k, ldk, n);
    return KERNEL(weights)(t, n, NULL, NULL, NULL);
}
#endif

/* rows coordinates of V against NV vectors of lanes; the block's sum is formed apart and added to o, which
 * keeps the error from growing with the number of keys. */
INLINE void values_group(const tile_t *t, int lane, const REAL *v, ptrdiff_t ldv, int n, int e,
                         const int rows, const int NV) {
    vec acc[TILE_ACC];
    UNROLL for (int a = 0; a < rows * NV; a++) acc[a] = v_zero();
    for (int j = 0; j < n; j++) {
        vec p[TILE_NV];
        UNROLL for (int x = 0; x < NV; x++) {
            p[x] = v_load(t->p + j * ADA_LANES + lane + x * VL);
            PIN(p[x]);
        }
        UNROLL for (int i = 0; i < rows; i++) {
            vec b = v_set1(v[j * ldv + e + i]);
            UNROLL for (int x = 0; x < NV; x++) acc[i * NV + x] = v_fma(p[x], b, acc[i * NV + x]);
        }
    }
    UNROLL for (int a = 0; a < rows * NV; a++) {
        REAL *o = t->o + (e + a / NV) * ADA_LANES + lane + a % NV * VL;
        v_store(o, v_add(v_load(o), acc[a]));
    }
}

INLINE void values_strip(const tile_t *t, int lane, const REAL *v, ptrdiff_t ldv, int n, const int NV) {
    const int rows = TILE_ACC / NV;
    int e = 0;
    for (; e + rows <= t->E; e += rows) {
#ifndef NO_VALUES_PREFETCH
        /* The next block's rows of V, a slice for each group. */
        for (int j = e / rows; !t->cached && j < n; j += t->E / rows) prefetch_row(v + (n + j) * ldv, t->E);
        ask_ahead(t->ahead, e / rows, t->E / rows);
#endif
        values_group(t, lane, v, ldv, n, e, rows, NV);
    }
    if (rows > 4)
        for (; e + 4 <= t->E; e += 4) values_group(t, lane, v, ldv, n, e, 4, NV);
    for (; e < t->E; e++) values_group(t, lane, v, ldv, n, e, 1, NV);
}

void KERNEL(values)(const tile_t *t, const REAL *v, ptrdiff_t ldv, int n) {
#define STRIP(NV) values_strip(t, lane, v, ldv, n, NV)
    FOR_STRIPS(t->lanes, lane, STRIP)
#undef STRIP
}

bool KERNEL(softcap)(REAL *s, int n, REAL cap) {
    bool finite = true;
    for (int i = 0; i < n; i += VL) {
        vec x = v_load_n(s + i, n - i);
        finite &= !m_any(m_outside(x, v_set1(-LARGEST), v_set1(LARGEST)));
        v_store_n(s + i, v_mul(v_set1(cap), v_tanh(v_div(x, v_set1(cap)))), n - i);
    }
    return finite;
}

/* plain: whole vectors of keys that are seen and kept, nothing added; to the same bits. */
INLINE bool row_weights(row_t *row, REAL *s, int n, uint64_t visible, const REAL *bias, uint64_t keep,
                        const bool plain) {
    vec largest = v_set1(-INFINITY);
    mask bad = m_first(0);
    for (int j = 0; j < n; j += VL) {
        vec x = plain ? v_loadu(s + j) : v_load_n(s + j, n - j);
        mask see = plain ? m_first(VL) : m_and(m_bits(visible, j), m_first(n - j));
        if (bias) {
            vec add = v_load_n(bias + j, n - j);
            x = v_add(x, add);
            see = m_and(see, m_differ(add, v_set1(-INFINITY)));
        }
        bad = m_or(bad, m_and(see, m_outside(x, v_set1(-LARGEST), v_set1(LARGEST))));
        if (!plain) {
            x = v_select(see, x, v_set1(-INFINITY));
            v_store_n(s + j, x, n - j);
        }
        largest = v_max(x, largest);
    }
    if (m_any(bad)) return false;
    REAL m = v_largest(largest);
    if (m > row->m) {
        REAL f[VL];
        v_storeu(f, v_exp2(v_set1(row->m - m)));
        row->m = m;
        row->l *= f[0];
        for (int e = 0; e < row->E; e++) row->o[e] *= f[0];
    }
    vec sum = v_zero(), reference = v_set1(row->m);
    for (int j = 0; j < n; j += VL) {
        if (plain) {
            vec p = v_exp2(v_sub(v_loadu(s + j), reference));
            sum = v_add(sum, p);
            v_storeu(s + j, p);
            continue;
        }
        vec x = v_load_n(s + j, n - j);
        mask see = m_and(m_greater(x, v_set1(-INFINITY)), m_first(n - j));
        vec p = v_exp2(v_select(see, v_sub(x, reference), v_set1(-LARGEST)));
        sum = v_add(sum, p);
        v_store_n(s + j, v_select(m_bits(keep, j), p, v_zero()), n - j);
    }
    row->l += v_sum(sum);
    return true;
}

bool KERNEL(row_weights)(row_t *row, REAL *s, int n, uint64_t visible, const REAL *bias, uint64_t keep) {
    const uint64_t beyond = n < 64 ? UINT64_MAX << n : 0;
    return !bias && n % VL == 0 && !~((visible & keep) | beyond)
               ? row_weights(row, s, n, visible, NULL, keep, true)
               : row_weights(row, s, n, visible, bias, keep, false);
}
