/* The kernels of a backward pass of one REAL in plain C, as their contracts in kernels_tpl.h say it. The
 * including file defines REAL, KIND(name), the name of a type of REAL, KERNEL(op) and EXP2 of REAL.
 */
void KERNEL(product)(const KIND(ada_product) * x) {
    for (int r = 0; r < x->rows; r++)
        for (int first = 0; first < x->width; first += ADA_BLOCK) {
            const int n = x->width - first < ADA_BLOCK ? x->width - first : ADA_BLOCK;
            REAL sum[ADA_BLOCK] = {0}, *c = x->c + r * x->ldc + first;
            for (int k = 0; k < x->depth; k++) {
                const REAL a = x->a[r * x->a_row + k * x->a_step], *b = x->b + k * x->ldb + first;
                for (int i = 0; i < n; i++) sum[i] += a * b[i];
            }
            for (int i = 0; i < n; i++) c[i] = x->add ? c[i] + sum[i] : sum[i];
        }
}

bool KERNEL(backward)(const KIND(ada_backward_tile) * t) {
    bool finite = true;
    for (int r = 0; r < t->rows; r++)
        for (int j = 0; j < t->width; j++) {
            const int at = r * ADA_BLOCK + j;
            const REAL bias = t->bias ? t->bias[at] : 0;
            const bool see = (!t->visible || (t->visible[r] >> j & 1)) && bias != -INFINITY;
            const REAL kept = !t->keep ? 1 : t->keep[r] >> j & 1 ? t->kept : 0;
            const REAL w = see ? EXP2(t->s[at] + bias - t->lse[r]) : 0;
            t->s[at] = w * kept;
            finite &= (bool)isfinite(t->s[at]);
            if (!t->g) continue;
            t->g[at] = see ? w * ((kept != 0 ? t->g[at] * kept : 0) - t->delta[r]) : 0;
            finite &= (bool)isfinite(t->g[at]);
        }
    return finite;
}
