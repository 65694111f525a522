/* The kernels of a backward pass in the vocabulary of a simd_*.h, for one REAL and ISA. The including file
 * defines REAL, REAL_BITS and KERNEL(op), the symbol of an op, and GROUP_ROWS, the rows of c whose sums stand
 * in registers, TILE_NV vectors each.
 */
#define MOST_OCTAVES ((REAL)(REAL_BITS == 32 ? 126 : 1022))
#define CHAIN 64 /* as in tile_tpl.h: longer sums are made of parts */

#if REAL_BITS == 32
typedef ada_product_f32 product_t;
typedef ada_backward_tile_f32 tile_t;
#else
typedef ada_product_f64 product_t;
typedef ada_backward_tile_f64 tile_t;
#endif

/* Sums over n terms: ROWS rows of a, NV vectors of b, of which the last holds `left` elements if it is alone.
 */
INLINE void sums(vec acc[], const REAL *a, ptrdiff_t a_row, ptrdiff_t a_step, const REAL *b, ptrdiff_t ldb,
                 int n, int left, const int ROWS, const int NV) {
    UNROLL for (int i = 0; i < ROWS * NV; i++) acc[i] = v_zero();
    for (int k = 0; k < n; k++, a += a_step, b += ldb) {
        vec y[TILE_NV];
        UNROLL for (int v = 0; v < NV; v++) {
            y[v] = NV == 1 && left < VL ? v_load_n(b, left) : v_loadu(b + v * VL);
            PIN(y[v]);
        }
        UNROLL for (int i = 0; i < ROWS; i++) {
            const vec z = v_set1(a[i * a_row]);
            UNROLL for (int v = 0; v < NV; v++) acc[i * NV + v] = v_fma(y[v], z, acc[i * NV + v]);
        }
    }
}

INLINE void store_sums(REAL *c, ptrdiff_t ldc, const vec acc[], int left, bool add, const int ROWS,
                       const int NV) {
    if (NV == 1 && left < VL) {
        UNROLL for (int i = 0; i < ROWS; i++)
            v_store_n(c + i * ldc, add ? v_add(v_load_n(c + i * ldc, left), acc[i]) : acc[i], left);
    } else if (add) {
        UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int v = 0; v < NV; v++)
            v_storeu(c + i * ldc + v * VL, v_add(v_loadu(c + i * ldc + v * VL), acc[i * NV + v]));
    } else {
        UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int v = 0; v < NV; v++)
            v_storeu(c + i * ldc + v * VL, acc[i * NV + v]);
    }
}

INLINE int chain_end(int k, int n) { return n - k < CHAIN ? n : k + CHAIN; }

INLINE void product_rows(const product_t *x, int r, int column, int left, const int ROWS, const int NV) {
    for (int k = 0; k < x->depth; k += CHAIN) {
        vec acc[GROUP_ROWS * TILE_NV];
        sums(acc, x->a + r * x->a_row + k * x->a_step, x->a_row, x->a_step, x->b + k * x->ldb + column,
             x->ldb, chain_end(k, x->depth) - k, left, ROWS, NV);
        store_sums(x->c + r * x->ldc + column, x->ldc, acc, left, x->add || k, ROWS, NV);
    }
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

/* plain: all is seen and kept, nothing added, and g is wanted. */
INLINE bool backward_row(const tile_t *t, int r, const bool plain) {
    const vec lse = v_set1(t->lse[r]), delta = v_set1(t->delta[r]), kept = v_set1(t->kept);
    const vec infinity = v_set1(INFINITY), most = v_set1(MOST_OCTAVES);
    const uint64_t visible = !plain && t->visible ? t->visible[r] : UINT64_MAX;
    const uint64_t keep = !plain && t->keep ? t->keep[r] : UINT64_MAX;
    const int width = t->width;
    REAL *s = t->s + r * ADA_BLOCK, *gradients = t->g ? t->g + r * ADA_BLOCK : NULL;
    const REAL *biases = !plain && t->bias ? t->bias + r * ADA_BLOCK : NULL;
    vec rest = v_zero(); /* NaN when a result is not finite; where the weight is not, its gradient is not */
    for (int j = 0; j < width; j += VL) {
        mask see = plain ? m_first(VL) : m_bits(visible, j);
        vec y = v_load(s + j), g = plain || gradients ? v_load(gradients + j) : v_zero();
        if (!plain && biases) {
            const vec bias = v_load(biases + j);
            y = v_add(y, bias);
            see = m_and(see, m_differ(bias, v_set1(-INFINITY)));
        }
        y = v_sub(y, lse);
        /* NaN and what would overflow become NaN and infinity. */
        vec w = v_select(m_greater(most, y), v_exp2(y), v_mul(y, infinity)), dropped = w;
        if (!plain && t->keep) {
            const mask kept_lanes = m_bits(keep, j);
            dropped = v_mul(w, v_select(kept_lanes, kept, v_zero())); /* what is not finite makes NaN */
            g = v_select(kept_lanes, v_mul(g, kept), v_zero());
        }
        g = v_mul(w, v_sub(g, delta));
        if (!plain) dropped = v_select(see, dropped, v_zero()), g = v_select(see, g, v_zero());
        if (!plain && !gradients) g = dropped;
        rest = v_fma(g, v_zero(), rest);
        v_store(s + j, dropped);
        if (plain || gradients) v_store(gradients + j, g);
    }
    return !m_any(m_differ(rest, v_zero()));
}

bool KERNEL(backward)(const tile_t *t) {
    bool finite = true;
    if (t->visible || t->bias || t->keep || !t->g)
        for (int r = 0; r < t->rows; r++) finite &= backward_row(t, r, false);
    else
        for (int r = 0; r < t->rows; r++) finite &= backward_row(t, r, true);
    return finite;
}
