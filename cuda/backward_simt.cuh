/* Gradients on plain arithmetic of REAL: any chip, any dtype, any layout. In double it computes from the
 * inputs alone, and leaves hidden pairs out one by one, so that what they hold reaches nobody.
 *
 * A block has 16 x 16 threads, of which each owns PER x PER pairs of a tile of queries and keys: rows y + 16
 * n of columns x + 16 n. Operands come to shared memory in squares of the tile's size.
 */
#ifndef ADA_CUDA_BACKWARD_SIMT_CUH
#define ADA_CUDA_BACKWARD_SIMT_CUH

#include "backward.cuh"

enum { ADA_SIMT_THREADS = 256 };

template <typename REAL_, int PER_> struct ada_simt {
    typedef REAL_ REAL;
    static constexpr bool CAREFUL = sizeof(REAL) == 8;
    static constexpr int PER = PER_, TILE = 16 * PER, LD = TILE + 1;
    static constexpr int SQUARE = TILE * LD;
    static constexpr int ROWS_AT = 4 * SQUARE * (int)sizeof(REAL);
    static constexpr int SEEN_AT = ROWS_AT + TILE * (int)sizeof(ada_back_row);
    static constexpr int FLAG_AT = SEEN_AT + TILE * TILE, SHARED = FLAG_AT + 16;
};

/* [TILE][LD] in shared memory: operands, weights and gradients of scores; [TILE][TILE]: which pairs see each
 * other. */
template <typename X> ADA_DEVICE typename X::REAL *ada_square(int n) {
    return ada_shared_at<typename X::REAL>((uint32_t)(n * X::SQUARE * (int)sizeof(typename X::REAL)));
}
template <typename X> ADA_DEVICE typename X::REAL *ada_left() { return ada_square<X>(0); }
template <typename X> ADA_DEVICE typename X::REAL *ada_right() { return ada_square<X>(1); }
template <typename X> ADA_DEVICE typename X::REAL *ada_weights() { return ada_square<X>(2); }
template <typename X> ADA_DEVICE typename X::REAL *ada_slopes() { return ada_square<X>(3); }
template <typename X> ADA_DEVICE ada_back_row *ada_tile_rows() {
    return ada_shared_at<ada_back_row>(X::ROWS_AT);
}
template <typename X> ADA_DEVICE uint8_t *ada_seen() { return ada_shared_at<uint8_t>(X::SEEN_AT); }

/* Of gradients in float64; in float32, for heads of at most 128 and for wider ones, whose sums would not fit
 * into registers. */
typedef ada_simt<double, 2> ada_simt_f64;
typedef ada_simt<float, 4> ada_simt_f32;
typedef ada_simt<float, 2> ada_simt_wide;

/* A thread's pairs of a tile. */
template <typename X> struct ada_pairs_of_thread {
    typename X::REAL s[X::PER][X::PER], g[X::PER][X::PER]; /* scores in octaves, dP; then weights, dS */
    typename X::REAL bend[X::PER][X::PER];                 /* derivative of the softcap */
    uint32_t seen, kept;                                   /* bit PER y + x */
};

/* Which head of queries, and what its pairs have in common. */
typedef struct {
    int b, h, g;
    int64_t offset;
    ada_reach reach;
} ada_back_head;

ADA_DEVICE ada_back_head ada_back_head_of(const ada_cu_params &p, int head) {
    ada_back_head at = {head / p.H, head % p.H, 0, 0, {0, 0, 0}};
    at.g = at.h / (p.H / p.G);
    at.offset = ada_sequence_of(p, at.b).offset;
    at.reach = ada_reach_of(p, at.b);
    return at;
}

ADA_DEVICE float ada_power(float x) { return ada_exp2(x); }
ADA_DEVICE double ada_power(double x) { return exp2(x); }

/* A square of an array: rows from first on, elements from d on; zeros outside. */
template <typename X>
ADA_DEVICE void ada_stage(typename X::REAL *to, const ada_cu_array &from, int dtype, int b, int h, int first,
                          int rows, int d, int width) {
    const char *const at = (const char *)from.data + b * from.stride[0] + h * from.stride[1];
    ADA_UNROLL for (int n = 0; n < X::PER * X::PER; n++) {
        const int i = n * ADA_SIMT_THREADS + ada_thread(), r = i / X::TILE, c = i % X::TILE;
        typename X::REAL x = 0;
        if (first + r < rows && d + c < width)
            x = ada_element<typename X::REAL>(at + (first + r) * from.stride[2] + (d + c) * from.stride[3],
                                              dtype);
        to[r * X::LD + c] = x;
    }
}

/* sums += rows of one array times rows of another. */
template <typename X>
ADA_DEVICE void ada_dot_rows(typename X::REAL (&sums)[X::PER][X::PER], const ada_back_args &a,
                             const ada_cu_array &left, const ada_cu_array &right, const ada_back_head &at,
                             int i, int j, int width) {
    const ada_cu_params &p = a.x.p;
    const int x0 = ada_thread() % 16, y0 = ada_thread() / 16;
    ADA_UNROLL for (int y = 0; y < X::PER; y++) ADA_UNROLL for (int x = 0; x < X::PER; x++) sums[y][x] = 0;
    ADA_UNROLL_NOT for (int d = 0; d < width; d += X::TILE) {
        ada_sync(); /* what stood there has been read */
        ada_stage<X>(ada_left<X>(), left, p.dtype, at.b, at.h, i, p.T, d, width);
        ada_stage<X>(ada_right<X>(), right, p.dtype, at.b, at.g, j, at.reach.keys, d, width);
        ada_sync();
        ADA_UNROLL_BY(4) for (int c = 0; c < X::TILE; c++) {
            typename X::REAL l[X::PER], r[X::PER];
            ADA_UNROLL for (int n = 0; n < X::PER; n++) {
                l[n] = ada_left<X>()[(y0 + 16 * n) * X::LD + c];
                r[n] = ada_right<X>()[(x0 + 16 * n) * X::LD + c];
            }
            ADA_UNROLL for (int y = 0; y < X::PER; y++) ADA_UNROLL for (int x = 0; x < X::PER; x++)
                sums[y][x] += l[y] * r[x];
        }
    }
}

/* Scores behind cap and biases, in octaves, and dP of a tile of queries from i and keys from j on. */
template <typename X>
ADA_DEVICE void ada_simt_scores(const ada_back_args &a, const ada_back_head &at, int i, int j,
                                ada_pairs_of_thread<X> &pairs) {
    typedef typename X::REAL REAL;
    const ada_cu_params &p = a.x.p;
    const REAL scale = (REAL)p.scale, cap = (REAL)p.softcap, kept = (REAL)(1 / (1 - p.dropout_p));
    const REAL slope =
        p.alibi_slopes ? (REAL)p.alibi_slopes[at.b * p.alibi_stride[0] + at.h * p.alibi_stride[1]] : 0;
    ada_dot_rows<X>(pairs.s, a, p.query, p.key, at, i, j, p.D);
    ada_dot_rows<X>(pairs.g, a, a.x.grad_out, p.value, at, i, j, p.E);
    pairs.seen = pairs.kept = 0;
    ADA_UNROLL for (int y = 0; y < X::PER; y++) {
        const int row = i + ada_thread() / 16 + 16 * y;
        const bool there = row < p.T;
        const uint64_t random = p.drop_below && there ? ada_dropout_row(p, at.b, at.h, row) : 0;
        const char *const mask = p.mask.data && there ? ada_mask_row(p, at.b, at.h, row) : nullptr;
        ADA_UNROLL for (int x = 0; x < X::PER; x++) {
            const int key = j + ada_thread() % 16 + 16 * x;
            REAL add = 0;
            const bool visible = there && ada_pair_sees(p, at.reach, mask, row, key, add);
            pairs.s[y][x] = ada_pair_score(pairs.s[y][x] * scale, cap, slope, at.offset + row - key, add,
                                           pairs.bend[y][x]);
            const bool keep = !p.drop_below || (visible && !ada_dropped(p, random, key));
            if (p.drop_below) pairs.g[y][x] *= keep ? kept : 0;
            pairs.seen |= (uint32_t)visible << (X::PER * y + x);
            pairs.kept |= (uint32_t)keep << (X::PER * y + x);
        }
    }
}

/* Rows of the tile to shared memory; they are there behind the next barrier. */
template <typename X> ADA_DEVICE void ada_take_rows(const ada_back_args &a, const ada_back_head &at, int i) {
    const ada_back_row *const from = a.rows + ((int64_t)at.b * a.x.p.H + at.h) * a.padded + i;
    for (int n = ada_thread(); n < X::TILE; n += ADA_SIMT_THREADS) ada_tile_rows<X>()[n] = from[n];
}

/* The same, then weights in s and gradients in g of scores behind the softcap. */
template <typename X>
ADA_DEVICE void ada_simt_tile(const ada_back_args &a, const ada_back_head &at, int i, int j,
                              ada_pairs_of_thread<X> &pairs) {
    typedef typename X::REAL REAL;
    ada_simt_scores<X>(a, at, i, j, pairs);
    ADA_UNROLL for (int y = 0; y < X::PER; y++) {
        const ada_back_row row = ada_tile_rows<X>()[ada_thread() / 16 + 16 * y];
        ADA_UNROLL for (int x = 0; x < X::PER; x++) {
            const bool visible = pairs.seen >> (X::PER * y + x) & 1;
            const REAL w =
                visible ? ada_power((REAL)(pairs.s[y][x] - (REAL)row.reference) - (REAL)row.lse) : 0;
            pairs.s[y][x] = w;
            pairs.g[y][x] = visible ? w * (pairs.g[y][x] - (REAL)row.delta) : 0;
        }
    }
}

/* Weights that are kept, gradients before the softcap and who sees whom to shared memory. */
template <typename X>
ADA_DEVICE void ada_share_tile(const ada_back_args &a, const ada_pairs_of_thread<X> &pairs) {
    const typename X::REAL kept = (typename X::REAL)(1 / (1 - a.x.p.dropout_p));
    ADA_UNROLL for (int y = 0; y < X::PER; y++) ADA_UNROLL for (int x = 0; x < X::PER; x++) {
        const int row = ada_thread() / 16 + 16 * y, key = ada_thread() % 16 + 16 * x, bit = X::PER * y + x;
        ada_weights<X>()[row * X::LD + key] = pairs.s[y][x] * (pairs.kept >> bit & 1 ? kept : 0);
        ada_slopes<X>()[row * X::LD + key] = pairs.g[y][x] * pairs.bend[y][x];
        if (X::CAREFUL) ada_seen<X>()[row * X::TILE + key] = (uint8_t)(pairs.seen >> bit & 1);
    }
}

/* Whether this launch has nothing to do with a key head. */
template <typename X> ADA_DEVICE bool ada_not_ours(const ada_back_args &a, int group) {
    return ada_computed_by(a.unfit + group, X::FLAG_AT) !=
           (uint32_t)(X::CAREFUL ? ADA_BACK_F64 : ADA_BACK_RUNG);
}

/* Sums of a tile times a factor to rows of a result. Threads hold rows and elements as they hold pairs. */
template <typename X, int CHUNKS>
ADA_DEVICE void ada_store_sums(const ada_back_args &a, const ada_cu_array &to, int b, int h, int first,
                               int rows, int width, const typename X::REAL (&sums)[CHUNKS][X::PER][X::PER],
                               typename X::REAL factor, int group) {
    typename X::REAL good = 0; /* NaN where one is not finite */
    ADA_UNROLL for (int c = 0; c < CHUNKS; c++) ADA_UNROLL for (int y = 0; y < X::PER; y++)
        ADA_UNROLL for (int x = 0; x < X::PER; x++) {
        const int row = first + ada_thread() / 16 + 16 * y, d = c * X::TILE + ada_thread() % 16 + 16 * x;
        if (row >= rows || d >= width) continue;
        const typename X::REAL sum = sums[c][y][x] * factor;
        good += sum * 0;
        ada_store_element((char *)to.data + b * to.stride[0] + h * to.stride[1] + row * to.stride[2] +
                              d * to.stride[3],
                          a.x.p.dtype, sum);
    }
    if (!X::CAREFUL && !(good == 0)) ada_make_unfit(a, group);
}

/* dK and dV: a block for a tile of keys. */
template <typename X, int CHUNKS> ADA_KERNEL(ADA_SIMT_THREADS, 1) ada_back_keys(ADA_ARGS(ada_back_args) a) {
    typedef typename X::REAL REAL;
    const ada_cu_params &p = a.x.p;
    const int tiles = (p.S + X::TILE - 1) / X::TILE, group = ada_block() / tiles;
    const int j = ada_block() % tiles * X::TILE, b = group / p.G, g = group % p.G, heads = p.H / p.G;
    const int x0 = ada_thread() % 16, y0 = ada_thread() / 16;
    if (ada_not_ours<X>(a, group)) return;
    REAL dk[CHUNKS][X::PER][X::PER], dv[CHUNKS][X::PER][X::PER];
    ADA_UNROLL for (int c = 0; c < CHUNKS; c++) ADA_UNROLL for (int y = 0; y < X::PER; y++)
        ADA_UNROLL for (int x = 0; x < X::PER; x++) dk[c][y][x] = dv[c][y][x] = 0;
    const int most = p.D > p.E ? p.D : p.E;
    ADA_UNROLL_NOT for (int h = 0; h < heads; h++) {
        const ada_back_head at = ada_back_head_of(p, b * p.H + g * heads + h);
        const ada_span span = ada_tiles_of_queries(at.reach, j, X::TILE, p.T, X::TILE);
        ADA_UNROLL_NOT for (int tile = span.first; tile < span.end; tile++) {
            const int i = tile * X::TILE;
            ada_pairs_of_thread<X> pairs;
            ada_sync();
            ada_take_rows<X>(a, at, i);
            ada_simt_tile<X>(a, at, i, j, pairs);
            ada_share_tile<X>(a, pairs);
            ADA_UNROLL for (int c = 0; c < CHUNKS; c++) {
                if (c * X::TILE >= most) continue;
                ada_sync(); /* the tile lies there, and what stood here has been read */
                ada_stage<X>(ada_left<X>(), a.x.grad_out, p.dtype, b, at.h, i, p.T, c * X::TILE, p.E);
                ada_stage<X>(ada_right<X>(), p.query, p.dtype, b, at.h, i, p.T, c * X::TILE, p.D);
                ada_sync();
                REAL of_value[X::PER][X::PER] = {}, of_key[X::PER][X::PER] = {}; /* long sums round more */
                ADA_UNROLL_BY(2) for (int n = 0; n < X::TILE; n++) {
                    REAL go[X::PER], q[X::PER];
                    ADA_UNROLL for (int x = 0; x < X::PER; x++) {
                        go[x] = ada_left<X>()[n * X::LD + x0 + 16 * x];
                        q[x] = ada_right<X>()[n * X::LD + x0 + 16 * x];
                    }
                    ADA_UNROLL for (int y = 0; y < X::PER; y++) {
                        const int key = y0 + 16 * y;
                        const REAL w = ada_weights<X>()[n * X::LD + key],
                                   s = ada_slopes<X>()[n * X::LD + key];
                        if (X::CAREFUL && !ada_seen<X>()[n * X::TILE + key]) continue;
                        ADA_UNROLL for (int x = 0; x < X::PER; x++) {
                            of_value[y][x] += w * go[x];
                            of_key[y][x] += s * q[x];
                        }
                    }
                }
                ADA_UNROLL for (int y = 0; y < X::PER; y++) ADA_UNROLL for (int x = 0; x < X::PER; x++) {
                    dv[c][y][x] += of_value[y][x];
                    dk[c][y][x] += of_key[y][x];
                }
            }
        }
    }
    const ada_cu_array *const to = a.x.results;
    if (to[ADA_CU_OF_KEY].data)
        ada_store_sums<X, CHUNKS>(a, to[ADA_CU_OF_KEY], b, g, j, p.S, p.D, dk, (REAL)p.scale, group);
    if (to[ADA_CU_OF_VALUE].data)
        ada_store_sums<X, CHUNKS>(a, to[ADA_CU_OF_VALUE], b, g, j, p.S, p.E, dv, 1, group);
}

/* The sum over a block's threads, in one order; for thread 0. */
template <typename X> ADA_DEVICE double ada_sum_of_block(double own) {
    double *const all = ada_shared_at<double>(0);
    ada_sync();
    all[ada_thread()] = own;
    for (int n = ADA_SIMT_THREADS / 2; n > 0; n /= 2) {
        ada_sync();
        if (ada_thread() < n) all[ada_thread()] += all[ada_thread() + n];
    }
    return all[0];
}

/* dQ and sums for the gradients of slopes: a block for a tile of queries. */
template <typename X, int CHUNKS>
ADA_KERNEL(ADA_SIMT_THREADS, 1)
ada_back_queries(ADA_ARGS(ada_back_args) a) {
    typedef typename X::REAL REAL;
    const ada_cu_params &p = a.x.p;
    const int tiles = (p.T + X::TILE - 1) / X::TILE, head = ada_block() / tiles, tile = ada_block() % tiles;
    const int i = tile * X::TILE, x0 = ada_thread() % 16, y0 = ada_thread() / 16;
    const ada_back_head at = ada_back_head_of(p, head);
    const int group = at.b * p.G + at.g;
    if (ada_not_ours<X>(a, group)) return;
    REAL dq[CHUNKS][X::PER][X::PER];
    double slope = 0;
    ADA_UNROLL for (int c = 0; c < CHUNKS; c++) ADA_UNROLL for (int y = 0; y < X::PER; y++)
        ADA_UNROLL for (int x = 0; x < X::PER; x++) dq[c][y][x] = 0;
    ada_take_rows<X>(a, at, i);
    const ada_span span = ada_tiles_of_keys(at.reach, i, X::TILE, p.S, X::TILE);
    ADA_UNROLL_NOT for (int n = span.first; n < span.end; n++) {
        const int j = n * X::TILE;
        ada_pairs_of_thread<X> pairs;
        ada_simt_tile<X>(a, at, i, j, pairs);
        ada_share_tile<X>(a, pairs);
        if (a.x.results[ADA_CU_OF_SLOPES].data)
            ADA_UNROLL for (int y = 0; y < X::PER; y++) ADA_UNROLL for (int x = 0; x < X::PER; x++) {
                const int64_t distance = at.offset + (i + y0 + 16 * y) - (j + x0 + 16 * x);
                if (pairs.seen >> (X::PER * y + x) & 1)
                    slope -= (double)pairs.g[y][x] * (double)(distance < 0 ? -distance : distance);
            }
        ADA_UNROLL for (int c = 0; c < CHUNKS; c++) {
            if (c * X::TILE >= p.D) continue;
            ada_sync();
            ada_stage<X>(ada_left<X>(), p.key, p.dtype, at.b, at.g, j, at.reach.keys, c * X::TILE, p.D);
            ada_sync();
            REAL sums[X::PER][X::PER] = {};
            ADA_UNROLL_BY(2) for (int key = 0; key < X::TILE; key++) {
                REAL k[X::PER];
                ADA_UNROLL for (int x = 0; x < X::PER; x++) k[x] = ada_left<X>()[key * X::LD + x0 + 16 * x];
                ADA_UNROLL for (int y = 0; y < X::PER; y++) {
                    const int row = y0 + 16 * y;
                    if (X::CAREFUL && !ada_seen<X>()[row * X::TILE + key]) continue;
                    const REAL s = ada_slopes<X>()[row * X::LD + key];
                    ADA_UNROLL for (int x = 0; x < X::PER; x++) sums[y][x] += s * k[x];
                }
            }
            ADA_UNROLL for (int y = 0; y < X::PER; y++) ADA_UNROLL for (int x = 0; x < X::PER; x++)
                dq[c][y][x] += sums[y][x];
        }
    }
    if (a.x.results[ADA_CU_OF_QUERY].data)
        ada_store_sums<X, CHUNKS>(a, a.x.results[ADA_CU_OF_QUERY], at.b, at.h, i, p.T, p.D, dq, (REAL)p.scale,
                                  group);
    if (!a.x.results[ADA_CU_OF_SLOPES].data) return;
    const double sum = ada_sum_of_block<X>(slope);
    if (ada_thread() != 0) return;
    a.slopes[(int64_t)head * a.slope_tiles + tile] = sum;
    if (!X::CAREFUL && !(sum * 0 == 0)) ada_make_unfit(a, group);
}

/* The gradient of a mask: a block for a tile of it, or for what it does not repeat of one. */
template <typename X> ADA_KERNEL(ADA_SIMT_THREADS, 1) ada_back_mask(ADA_ARGS(ada_back_args) a) {
    const ada_cu_params &p = a.x.p;
    const ada_cu_array &to = a.x.results[ADA_CU_OF_MASK];
    const bool tall = to.stride[2] != 0, wide = to.stride[3] != 0;
    const int all_rows = (p.T + X::TILE - 1) / X::TILE, all_columns = (p.S + X::TILE - 1) / X::TILE;
    const int columns = wide ? all_columns : 1, rows = tall ? all_rows : 1, heads = to.stride[1] ? p.H : 1;
    int index = ada_block();
    const int column = index % columns, row = index / columns % rows;
    index /= columns * rows;
    const int h0 = index % heads, b0 = index / heads;
    if (ada_computed_by(a.any, X::FLAG_AT) != X::CAREFUL) return;
    double sums[X::PER][X::PER];
    ADA_UNROLL for (int y = 0; y < X::PER; y++) ADA_UNROLL for (int x = 0; x < X::PER; x++) sums[y][x] = 0;
    const int b_end = to.stride[0] ? b0 + 1 : p.B, h_end = to.stride[1] ? h0 + 1 : p.H;
    int odd = -1; /* a key head whose gradients of scores are not finite */
    ADA_UNROLL_NOT for (int b = to.stride[0] ? b0 : 0; b < b_end; b++)
        ADA_UNROLL_NOT for (int h = to.stride[1] ? h0 : 0; h < h_end; h++) {
        const ada_back_head at = ada_back_head_of(p, b * p.H + h);
        ADA_UNROLL_NOT for (int r = tall ? row : 0; r < (tall ? row + 1 : all_rows); r++) {
            const int i = r * X::TILE;
            const ada_span span = ada_tiles_of_keys(at.reach, i, X::TILE, p.S, X::TILE);
            const int first = wide && column > span.first ? column : span.first;
            const int end = wide && column + 1 < span.end ? column + 1 : span.end;
            ADA_UNROLL_NOT for (int c = first; c < end; c++) {
                ada_pairs_of_thread<X> pairs;
                ada_sync();
                ada_take_rows<X>(a, at, i);
                ada_simt_tile<X>(a, at, i, c * X::TILE, pairs);
                typename X::REAL good = 0;
                ADA_UNROLL for (int y = 0; y < X::PER; y++) ADA_UNROLL for (int x = 0; x < X::PER; x++) {
                    sums[y][x] += (double)pairs.g[y][x];
                    good += pairs.g[y][x] * 0;
                }
                if (!(good == 0)) odd = b * p.G + at.g;
            }
        }
    }
    if (!X::CAREFUL && odd >= 0) ada_make_unfit(a, odd);
    double *const all = ada_shared_at<double>(0); /* [TILE][TILE] where the operands were */
    ada_sync();
    ADA_UNROLL for (int y = 0; y < X::PER; y++) ADA_UNROLL for (int x = 0; x < X::PER; x++)
        all[(ada_thread() / 16 + 16 * y) * X::TILE + ada_thread() % 16 + 16 * x] = sums[y][x];
    ada_sync();
    for (int n = ada_thread(); n < (tall ? X::TILE : 1) * (wide ? X::TILE : 1); n += ADA_SIMT_THREADS) {
        const int y = wide ? n / X::TILE : n, x = wide ? n % X::TILE : 0;
        const int i = tall ? row * X::TILE + y : 0, j = wide ? column * X::TILE + x : 0;
        if (i >= p.T || j >= p.S) continue;
        double sum = 0;
        for (int r = tall ? y : 0; r < (tall ? y + 1 : X::TILE); r++)
            for (int c = wide ? x : 0; c < (wide ? x + 1 : X::TILE); c++) sum += all[r * X::TILE + c];
        ada_store_element((char *)to.data + b0 * to.stride[0] + h0 * to.stride[1] + i * to.stride[2] +
                              j * to.stride[3],
                          p.dtype == ADA_CU_F64 ? ADA_CU_F64 : ADA_CU_F32, sum);
    }
}

/* Rows of a tile of queries from the inputs alone: their largest score, the logarithm of what is left of the
 * sum, and their sum of weights times dP. */
template <typename X> ADA_KERNEL(ADA_SIMT_THREADS, 1) ada_back_rows_again(ADA_ARGS(ada_back_args) a) {
    const ada_cu_params &p = a.x.p;
    const int tiles = (p.T + X::TILE - 1) / X::TILE, head = ada_block() / tiles;
    const int i = ada_block() % tiles * X::TILE, row = ada_thread();
    const ada_back_head at = ada_back_head_of(p, head);
    const uint32_t by = ada_computed_by(a.unfit + at.b * p.G + at.g, X::FLAG_AT);
    if (by != ADA_BACK_F64 && !(a.own && by == ADA_BACK_RUNG)) return;
    const double nothing = (double)-ADA_INF;
    double m = nothing, l = 0, delta = 0;
    bool saw = false, bad = false;
    const ada_span span = ada_tiles_of_keys(at.reach, i, X::TILE, p.S, X::TILE);
    ADA_UNROLL_NOT for (int n = span.first; n < span.end; n++) {
        ada_pairs_of_thread<X> pairs;
        ada_simt_scores<X>(a, at, i, n * X::TILE, pairs);
        ADA_UNROLL for (int y = 0; y < X::PER; y++) ADA_UNROLL for (int x = 0; x < X::PER; x++) {
            const int of = ada_thread() / 16 + 16 * y, key = ada_thread() % 16 + 16 * x;
            ada_weights<X>()[of * X::LD + key] = pairs.s[y][x],
                                          ada_slopes<X>()[of * X::LD + key] = pairs.g[y][x];
            ada_seen<X>()[of * X::TILE + key] = (uint8_t)(pairs.seen >> (X::PER * y + x) & 1);
        }
        ada_sync();
        if (row < X::TILE) {
            ADA_UNROLL_NOT for (int c = 0; c < X::TILE; c++) {
                const double s = ada_weights<X>()[row * X::LD + c];
                if (!ada_seen<X>()[row * X::TILE + c]) continue;
                saw = true;
                if (!(s < (double)ADA_INF)) {
                    bad = true;
                    continue;
                }
                if (s > m) {
                    const double by = exp2(m - s);
                    m = s, l *= by, delta *= by;
                }
                const double w = m > nothing ? exp2(s - m) : 0;
                l += w, delta += w * ada_slopes<X>()[row * X::LD + c];
            }
        }
        ada_sync();
    }
    if (row >= X::TILE || i + row >= p.T) return;
    const double sink = ada_sink(p, at.h) * ADA_LOG2E, top = sink > m ? sink : m;
    ada_back_row known = {0, sink, 0};
    if (saw && (bad || top == nothing)) {
        known.lse = known.delta = (double)ADA_NAN;
    } else if (saw) {
        const double by = exp2(m - top), total = l * by + exp2(sink - top);
        known.reference = top, known.lse = log2(total), known.delta = delta * by / total;
    }
    a.rows[(int64_t)head * a.padded + i + row] = known;
}

#endif
