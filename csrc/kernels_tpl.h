/* Slots that exist for float and for double; included by kernels.h with ADA_REAL, KIND and KIND_FN. */

/* One tile: up to ADA_LANES queries of one head on their way over the keys. */
typedef struct {
    ADA_REAL *q; /* [D][ADA_LANES] queries, times scale * log2(e) */
    ADA_REAL *p; /* [ADA_BLOCK][ADA_LANES] scores of the present block, then its weights */
    ADA_REAL *o; /* [E][ADA_LANES] sum of weight * value so far */
    ADA_REAL *m; /* [ADA_LANES] reference: weights are 2^(score - m); -inf before the first visible key, l and
                    o are 0 then */
    ADA_REAL *l; /* [ADA_LANES] sum of weights so far */
    int D, E;
    int lanes; /* lanes to compute, a multiple of ADA_LANE_STEP; only they are read and written */
    const ada_ahead *ahead; /* [ADA_AHEAD]; NULL: nothing */
    bool cached;            /* values are: what lies behind them need not be asked for */
} KIND(ada_tile);

/* to[d][i] = rows[i][d] * factor for i < n; the lanes from n on repeat row n - 1, so that they never make
 * trouble of their own. ld is rows' stride in elements. */
typedef void KIND_FN(ada_pack)(ADA_REAL *to, const ADA_REAL *rows, ptrdiff_t ld, int n, int D, int lanes,
                               ADA_REAL factor);

/* p[j][i] = q_i . k_j for j < n, n a multiple of ADA_KEY_STEP; ldk is the row stride in elements. */
typedef void KIND_FN(ada_scores)(const KIND(ada_tile) * tile, const ADA_REAL *k, ptrdiff_t ldk, int n);

/* s = cap * tanh(s / cap) on n contiguous elements; false when one was NaN or infinite. */
typedef bool KIND_FN(ada_softcap)(ADA_REAL *s, int n, ADA_REAL cap);

/* Where the largest visible score (plus bias) of the block exceeds m by more than ADA_LAZY_OCTAVES, raises m
 * to it and scales l and o along; a NaN is passed over. No lane depends on another. Bit i of visible[j] says
 * that lane i may attend to key j; NULL: all may. bias[j][i] is added, -inf hides; NULL: none. n >= 1. */
typedef void KIND_FN(ada_reference)(const KIND(ada_tile) * tile, int n, const uint64_t *visible,
                                    const ADA_REAL *bias);

/* Turns the scores in p into weights, zero where hidden, and adds their sums to l; then zeroes the weights
 * whose bit in keep (NULL: all ones) is not set. Returns false, with l as before and p spoilt, when a visible
 * score is not finite or exceeds m by more than ADA_LAZY_OCTAVES. */
typedef bool KIND_FN(ada_weights)(const KIND(ada_tile) * tile, int n, const uint64_t *visible,
                                  const ADA_REAL *bias, const uint64_t *keep);

/* scores and weights in one, for blocks where all is visible and nothing is added. */
typedef bool KIND_FN(ada_scores_weights)(const KIND(ada_tile) * tile, const ADA_REAL *k, ptrdiff_t ldk,
                                         int n);

/* o[e][i] += sum of p[j][i] v[j][e] over j < n, any n. */
typedef void KIND_FN(ada_values)(const KIND(ada_tile) * tile, const ADA_REAL *v, ptrdiff_t ldv, int n);

/* rows[i][e] = o[e][i] * factor[i] for i < n; false when one of them is NaN or infinite. */
typedef bool KIND_FN(ada_unpack)(ADA_REAL *rows, ptrdiff_t ld, const ADA_REAL *o, const ADA_REAL *factor,
                                 int n, int E);

/* One query on its way over the keys: o[E], not aligned. */
typedef struct {
    ADA_REAL *o;
    ADA_REAL m, l;
    int E;
} KIND(ada_row);

/* reference and weights for one query: s[j] (j < n <= ADA_BLOCK) becomes the weight of key j. Bits of visible
 * and keep are keys; bias (-inf hides) may be NULL. False when a visible score is NaN or infinite. */
typedef bool KIND_FN(ada_row_weights)(KIND(ada_row) * row, ADA_REAL *s, int n, uint64_t visible,
                                      const ADA_REAL *bias, uint64_t keep);

/* One product of a backward pass: c = a b, or c += a b. No alignment; c lies apart from a and b. */
typedef struct {
    ADA_REAL *c;       /* [rows][width], ldc apart */
    const ADA_REAL *a; /* element (r, k) is a[r * a_row + k * a_step] */
    const ADA_REAL *b; /* [depth][width], ldb apart */
    ptrdiff_t ldc, a_row, a_step, ldb;
    int rows, depth, width; /* each >= 1 */
    bool add;
} KIND(ada_product);
typedef void KIND_FN(ada_product)(const KIND(ada_product) * product);

/* One tile of queries, here the rows, against one block of keys, here the lanes, on the way back. */
typedef struct {
    ADA_REAL *s;             /* [ADA_LANES][ADA_BLOCK] scores in log2 units; then weights */
    ADA_REAL *g;             /* [ADA_LANES][ADA_BLOCK] gradients of the weights, then of the scores in natural
                                units; NULL: not wanted */
    const ADA_REAL *bias;    /* [ADA_LANES][ADA_BLOCK] added to s, -inf hides; NULL: none */
    const ADA_REAL *lse;     /* [rows] log2 units */
    const ADA_REAL *delta;   /* [rows] sum over keys of weight times its gradient */
    const uint64_t *visible; /* [rows] bit per key; NULL: all */
    const uint64_t *keep;    /* [rows] the same, of dropout; NULL: all */
    ADA_REAL kept;           /* what it multiplies those with */
    int rows, width;         /* keys, a multiple of ADA_KEY_STEP */
} KIND(ada_backward_tile);

/* w = 2^(s + bias - lse), 0 where hidden. s becomes w, where there is keep kept * w or 0 * w; g becomes
 * w * (g - delta), 0 where hidden, with g kept or 0. False when a result is NaN or infinite. */
typedef bool KIND_FN(ada_backward)(const KIND(ada_backward_tile) * tile);
