/* Every kernel of one REAL in plain C, as its contract in kernels_tpl.h says it: the oracle that the vector
 * kernels are checked against, and what runs where nothing better does. The including file defines REAL,
 * KIND(name), the name of a type or kernel of REAL, and EXP2 and TANH of REAL.
 */
typedef KIND(ada_tile) KIND(tile);
enum { PIECE = 64 };

static bool KIND(bit)(const uint64_t *bits, int j, int i) { return !bits || (bits[j] >> i & 1); }

static bool KIND(sees)(int j, int i, const uint64_t *visible, const REAL *bias) {
    return KIND(bit)(visible, j, i) && !(bias && bias[j * ADA_LANES + i] == -INFINITY);
}

static REAL KIND(score)(const KIND(tile) * t, int j, int i, const REAL *bias) {
    int at = j * ADA_LANES + i;
    return t->p[at] + (bias ? bias[at] : 0);
}

void KERNEL(pack)(REAL *to, const REAL *rows, ptrdiff_t ld, int n, int D, int lanes, REAL factor) {
    for (int d = 0; d < D; d++)
        for (int i = 0; i < lanes; i++) to[d * ADA_LANES + i] = rows[(i < n ? i : n - 1) * ld + d] * factor;
}

void KERNEL(scores)(const KIND(tile) * t, const REAL *k, ptrdiff_t ldk, int n) {
    for (int j = 0; j < n; j++) {
        REAL *s = t->p + j * ADA_LANES;
        for (int i = 0; i < t->lanes; i++) s[i] = 0;
        for (int first = 0; first < t->D; first += PIECE) { /* long sums round more, and there is no FMA */
            const int end = first + PIECE < t->D ? first + PIECE : t->D;
            REAL piece[ADA_LANES] = {0};
            for (int d = first; d < end; d++)
                for (int i = 0; i < t->lanes; i++) piece[i] += t->q[d * ADA_LANES + i] * k[j * ldk + d];
            for (int i = 0; i < t->lanes; i++) s[i] += piece[i];
        }
    }
}

bool KERNEL(softcap)(REAL *s, int n, REAL cap) {
    bool finite = true;
    for (int i = 0; i < n; i++) {
        finite &= (bool)isfinite(s[i]);
        s[i] = cap * TANH(s[i] / cap);
    }
    return finite;
}

void KERNEL(reference)(const KIND(tile) * t, int n, const uint64_t *visible, const REAL *bias) {
    for (int i = 0; i < t->lanes; i++) {
        REAL m = t->m[i];
        for (int j = 0; j < n; j++) {
            REAL s = KIND(score)(t, j, i, bias);
            if (KIND(sees)(j, i, visible, bias) && s > m) m = s;
        }
        if (!(m > t->m[i] + ADA_LAZY_OCTAVES)) continue;
        REAL factor = EXP2(t->m[i] - m);
        t->m[i] = m;
        t->l[i] *= factor;
        for (int e = 0; e < t->E; e++) t->o[e * ADA_LANES + i] *= factor;
    }
}

bool KERNEL(weights)(const KIND(tile) * t, int n, const uint64_t *visible, const REAL *bias,
                     const uint64_t *keep) {
    REAL sum[ADA_LANES] = {0};
    for (int j = 0; j < n; j++)
        for (int i = 0; i < t->lanes; i++) {
            REAL *p = t->p + j * ADA_LANES + i, y = KIND(score)(t, j, i, bias) - t->m[i];
            if (!KIND(sees)(j, i, visible, bias)) {
                *p = 0;
                continue;
            }
            if (!(y >= -LARGEST && y <= ADA_LAZY_OCTAVES)) return false;
            REAL w = EXP2(y);
            sum[i] += w;
            *p = KIND(bit)(keep, j, i) ? w : 0;
        }
    for (int i = 0; i < t->lanes; i++) t->l[i] += sum[i];
    return true;
}

bool KERNEL(scores_weights)(const KIND(tile) * t, const REAL *k, ptrdiff_t ldk, int n) {
    KERNEL(scores)(t, k, ldk, n);
    return KERNEL(weights)(t, n, NULL, NULL, NULL);
}

void KERNEL(values)(const KIND(tile) * t, const REAL *v, ptrdiff_t ldv, int n) {
    for (int e = 0; e < t->E; e++) {
        REAL sum[ADA_LANES] = {0};
        for (int j = 0; j < n; j++)
            for (int i = 0; i < t->lanes; i++) sum[i] += t->p[j * ADA_LANES + i] * v[j * ldv + e];
        for (int i = 0; i < t->lanes; i++) t->o[e * ADA_LANES + i] += sum[i];
    }
}

bool KERNEL(unpack)(REAL *rows, ptrdiff_t ld, const REAL *o, const REAL *factor, int n, int E) {
    bool finite = true;
    for (int i = 0; i < n; i++)
        for (int e = 0; e < E; e++) {
            REAL x = o[e * ADA_LANES + i] * factor[i];
            finite &= (bool)isfinite(x);
            rows[i * ld + e] = x;
        }
    return finite;
}

bool KERNEL(row_weights)(KIND(ada_row) * row, REAL *s, int n, uint64_t visible, const REAL *bias,
                         uint64_t keep) {
    REAL m = row->m, sum = 0;
    for (int j = 0; j < n; j++) {
        if (!KIND(bit)(&visible, 0, j) || (bias && bias[j] == -INFINITY)) {
            s[j] = -INFINITY;
            continue;
        }
        if (bias) s[j] += bias[j];
        if (!isfinite(s[j])) return false;
        if (s[j] > m) m = s[j];
    }
    if (m > row->m) {
        REAL factor = EXP2(row->m - m);
        row->m = m;
        row->l *= factor;
        for (int e = 0; e < row->E; e++) row->o[e] *= factor;
    }
    for (int j = 0; j < n; j++) {
        REAL w = s[j] > -INFINITY ? EXP2(s[j] - m) : 0;
        sum += w;
        s[j] = KIND(bit)(&keep, 0, j) ? w : 0;
    }
    row->l += sum;
    return true;
}
