/* The kernels of a backward pass in the vocabulary of a simd_*.h, for one REAL and ISA. The including file
 * defines REAL, REAL_BITS and KERNEL(op), the symbol of an op, and GROUP_ROWS, the rows of c whose sums stand
 * in registers, TILE_NV vectors each.
 */
#define LARGEST ((REAL)(REAL_BITS == 32 ? FLT_MAX : DBL_MAX))
#define MOST_OCTAVES ((REAL)(REAL_BITS == 32 ? 126 : 1022))
#define CHAIN 64 /* as in tile_tpl.h: longer sums are made of parts */

#if REAL_BITS == 32
typedef ada_product_f32 product_t;
typedef ada_backward_tile_f32 tile_t;
#else
typedef ada_product_f64 product_t;
typedef ada_backward_tile_f64 tile_t;
#endif

/* ROWS rows from r on, NV vectors from column on, of which the last holds `left` elements; terms first ...
 * end - 1. */
INLINE void product_group(const product_t *x, int r, int column, int left, int first, int end, bool add,
                          const int ROWS, const int NV) {
    vec acc[ROWS * NV];
    UNROLL for (int i = 0; i < ROWS * NV; i++) acc[i] = v_zero();
    const REAL *a = x->a + r * x->a_row + first * x->a_step, *b = x->b + first * x->ldb + column;
    for (int k = first; k < end; k++, a += x->a_step, b += x->ldb) {
        vec y[TILE_NV];
        UNROLL for (int v = 0; v < NV; v++) {
            y[v] = left < VL ? v_load_n(b, left) : v_loadu(b + v * VL);
            PIN(y[v]);
        }
        UNROLL for (int i = 0; i < ROWS; i++) {
            const vec z = v_set1(a[i * x->a_row]);
            UNROLL for (int v = 0; v < NV; v++) acc[i * NV + v] = v_fma(y[v], z, acc[i * NV + v]);
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int v = 0; v < NV; v++) {
        REAL *c = x->c + (r + i) * x->ldc + column + v * VL;
        const vec sum = acc[i * NV + v];
        if (left < VL)
            v_store_n(c, add ? v_add(v_load_n(c, left), sum) : sum, left);
        else
            v_storeu(c, add ? v_add(v_loadu(c), sum) : sum);
    }
}

INLINE void product_rows(const product_t *x, int r, int column, int left, const int ROWS, const int NV) {
    for (int k = 0; k < x->depth; k += CHAIN)
        product_group(x, r, column, left, k, x->depth - k < CHAIN ? x->depth : k + CHAIN, x->add || k, ROWS,
                      NV);
}

INLINE void product_strip(const product_t *x, int column, int left, const int NV) {
    int r = 0;
    for (; r + GROUP_ROWS <= x->rows; r += GROUP_ROWS) product_rows(x, r, column, left, GROUP_ROWS, NV);
    for (; r < x->rows; r++) product_rows(x, r, column, left, 1, NV);
}

void KERNEL(product)(const product_t *x) {
    int column = 0;
    for (; column + TILE_NV * VL <= x->width; column += TILE_NV * VL) product_strip(x, column, VL, TILE_NV);
    for (; column + VL <= x->width; column += VL) product_strip(x, column, VL, 1);
    if (column < x->width) product_strip(x, column, x->width - column, 1);
}

/* plain: all is seen and kept, nothing added. */
INLINE bool backward_row(const tile_t *t, int r, const bool plain) {
    const vec lse = v_set1(t->lse[r]), delta = v_set1(t->delta[r]), kept = v_set1(t->kept);
    const uint64_t visible = !plain && t->visible ? t->visible[r] : UINT64_MAX;
    const uint64_t keep = !plain && t->keep ? t->keep[r] : UINT64_MAX;
    mask bad = m_first(0);
    for (int j = 0; j < t->width; j += VL) {
        const int at = r * ADA_BLOCK + j;
        mask see = plain ? m_first(VL) : m_bits(visible, j);
        vec y = v_load(t->s + at);
        if (!plain && t->bias) {
            const vec bias = v_load(t->bias + at);
            y = v_add(y, bias);
            see = m_and(see, m_differ(bias, v_set1(-INFINITY)));
        }
        y = v_sub(y, lse);
        /* NaN and what would overflow become NaN and infinity. */
        vec w = v_select(m_outside(y, v_set1(-INFINITY), v_set1(MOST_OCTAVES)), v_mul(y, v_set1(INFINITY)),
                         v_exp2(y));
        vec g = t->g ? v_load(t->g + at) : v_zero();
        if (!plain && t->keep) {
            const mask kept_lanes = m_bits(keep, j);
            const vec dropped = v_select(kept_lanes, v_mul(w, kept), v_zero());
            g = v_select(kept_lanes, v_mul(g, kept), v_zero());
            g = v_mul(w, v_sub(g, delta));
            w = dropped;
        } else {
            g = v_mul(w, v_sub(g, delta));
        }
        if (!plain) w = v_select(see, w, v_zero()), g = v_select(see, g, v_zero());
        bad = m_or(bad, m_outside(w, v_set1(-LARGEST), v_set1(LARGEST)));
        v_store(t->s + at, w);
        if (!t->g) continue;
        bad = m_or(bad, m_outside(g, v_set1(-LARGEST), v_set1(LARGEST)));
        v_store(t->g + at, g);
    }
    return !m_any(bad);
}

bool KERNEL(backward)(const tile_t *t) {
    bool finite = true;
    if (t->visible || t->bias || t->keep)
        for (int r = 0; r < t->rows; r++) finite &= backward_row(t, r, false);
    else
        for (int r = 0; r < t->rows; r++) finite &= backward_row(t, r, true);
    return finite;
}
