/* Gradients of half arrays on mma.sync. One kernel, two roles: a block keeps a tile of keys and values and
 * lets queries and rows of grad_out come by (dK, dV), or the other way round (dQ). Scores are products of
 * what stays with what comes, so weights and dS, packed, are the left operands of the sums over what comes,
 * as in K1. What comes is copied one tile ahead.
 *
 * dS in fp16 is worth a power of two per key head, from the norms of grad_out and of values, so that it
 * neither overflows nor loses its digits, however a loss is scaled.
 */
#ifndef ADA_CUDA_BACKWARD_TILED_CUH
#define ADA_CUDA_BACKWARD_TILED_CUH

#include "backward.cuh"
#include "k1.cuh"

/* WARPS warps have 16 MR rows each of what stays; KEYS of what comes in a tile. SCORES: sums of dS, dQ or dK,
 * are wanted; WEIGHTS: those of weights, dV. */
template <bool BF16_, int WIDTH_, bool OF_KEYS_, bool SCORES_, bool WEIGHTS_, int WARPS_, int MR_, int KEYS_>
struct ada_back_tiling {
    static constexpr bool BF16 = BF16_, OF_KEYS = OF_KEYS_, SCORES = SCORES_, WEIGHTS = WEIGHTS_;
    static constexpr bool FP8 = false;
    static constexpr int WIDTH = WIDTH_, WARPS = WARPS_, MR = MR_, KEYS = KEYS_, BN = KEYS_, PARTS = 1;
    static constexpr int THREADS = 32 * WARPS, STAYING = 16 * MR * WARPS;
    typedef ada_rows_of<2 * WIDTH> QK;
    typedef QK V;
    static constexpr int Q_PART = 0, K_PART = 0, V_PART = 0; /* there is but one */
    /* Shared memory: both operands that stay, two stages of those that come, and of rows. */
    static constexpr int SECOND_AT = STAYING * QK::BYTES, COMING_AT = 2 * SECOND_AT;
    static constexpr int OPERAND = KEYS * QK::BYTES, STAGE = 2 * OPERAND;
    static constexpr int ROWS_AT = COMING_AT + 2 * STAGE;
    static constexpr int ROWS = OF_KEYS ? KEYS : STAYING, ROWS_STAGE = ROWS * (int)sizeof(ada_back_pair);
    static constexpr int FLAG_AT = ROWS_AT + (OF_KEYS ? 2 : 1) * ROWS_STAGE, SHARED = FLAG_AT + 16;
};

/* A block's place. */
typedef struct {
    int b, h, g; /* h: the first head of queries */
    int first;   /* row of what stays */
} ada_back_where;

template <typename X> ADA_DEVICE ada_back_where ada_back_where_of(const ada_back_args &a) {
    const ada_cu_params &p = a.x.p;
    const int of_group = a.group * a.tiles, index = ada_block(), group = index / of_group * a.group;
    const int here = a.group < a.units - group ? a.group : a.units - group;
    const int unit = group + index % of_group % here, tile = index % of_group / here;
    ada_back_where w;
    /* The longest causal tiles first. */
    w.first = (X::OF_KEYS ? tile : a.tiles - 1 - tile) * X::STAYING;
    if (X::OF_KEYS)
        w.b = unit / p.G, w.g = unit % p.G, w.h = w.g * (p.H / p.G);
    else
        w.b = unit / p.H, w.h = unit % p.H, w.g = w.h / (p.H / p.G);
    return w;
}

/* So many rows of an operand from first on; zeros from rows on. */
template <typename X, int N>
ADA_DEVICE void ada_back_copy(uint32_t to, const ada_operand &from, int b, int h, int first, int rows,
                              int bytes) {
    const char *const at = from.data + b * from.stride[0] + h * from.stride[1];
    ADA_UNROLL_BY(4) for (int i = ada_thread(); i < N * X::QK::CHUNKS; i += X::THREADS) {
        const int row = i / X::QK::CHUNKS, chunk = i % X::QK::CHUNKS;
        const bool there = first + row < rows;
        ada_copy_chunk(to + ada_place<typename X::QK>(row, chunk),
                       there ? at + (first + row) * from.stride[2] : at, there, chunk, bytes);
    }
}

/* Pairs of rows of queries: always there, as they are padded. */
template <typename X, int N>
ADA_DEVICE void ada_back_copy_rows(uint32_t to, const ada_back_args &a, int head, int first) {
    const ada_back_pair *const from = a.pairs + (int64_t)head * a.padded + first;
    for (int i = ada_thread(); i < N / 2; i += X::THREADS) ada_copy(to + 16 * (uint32_t)i, from + 2 * i, 16);
}

/* The n-th tile that comes, into its stage. Keys that nobody may see are zeros: they may hold anything. */
template <typename X>
ADA_DEVICE void ada_back_copy_tile(const ada_back_args &a, const ada_back_where &w, ada_span span, int keys,
                                   int n) {
    const ada_cu_params &p = a.x.p;
    const uint32_t to = ada_shared() + X::COMING_AT + (uint32_t)(n % 2 * X::STAGE);
    const int each = span.end - span.first, first = (span.first + n % each) * X::KEYS;
    if (X::OF_KEYS) {
        const int h = w.h + n / each;
        ada_back_copy<X, X::KEYS>(to, a.q, w.b, h, first, p.T, 2 * p.D);
        ada_back_copy<X, X::KEYS>(to + X::OPERAND, a.go, w.b, h, first, p.T, 2 * p.E);
        ada_back_copy_rows<X, X::ROWS>(ada_shared() + X::ROWS_AT + (uint32_t)(n % 2 * X::ROWS_STAGE), a,
                                       w.b * p.H + h, first);
    } else {
        ada_back_copy<X, X::KEYS>(to, a.k, w.b, w.g, first, keys, 2 * p.D);
        ada_back_copy<X, X::KEYS>(to + X::OPERAND, a.v, w.b, w.g, first, keys, 2 * p.E);
    }
}

/* Query and key of an element of this thread's part of a tile. */
template <typename X> ADA_DEVICE int ada_back_line(const ada_back_where &w, int mr, int half) {
    return w.first + ada_thread() / 32 * 16 * X::MR + ada_thread() % 32 / 4 + 16 * mr + 8 * half;
}
template <typename X> ADA_DEVICE int ada_back_column(int first, int n, int c) {
    return first + ada_thread() % 4 * 2 + 8 * n + c;
}

#define ADA_EACH_PAIR                                                                                        \
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int n = 0; n < X::KEYS / 8; n++)           \
        ADA_UNROLL for (int half = 0; half < 2; half++) ADA_UNROLL for (int c = 0; c < 2; c++)

/* Options: raw scores become octaves behind cap and biases, what is hidden -inf; dp becomes its difference to
 * delta, less what is dropped, times the derivative of the cap. Returns which weights are kept. */
template <typename X>
ADA_DEVICE uint32_t ada_back_options(const ada_back_args &a, const ada_back_where &w, int h, int first,
                                     const ada_reach &reach, const ada_back_pair *rows,
                                     float (&s)[X::MR][X::KEYS / 8][4], float (&dp)[X::MR][X::KEYS / 8][4]) {
    const ada_cu_params &p = a.x.p;
    const float octaves = (float)(p.scale * ADA_LOG2E), cap = (float)(p.softcap * ADA_LOG2E);
    const float kept = (float)(1 / (1 - p.dropout_p)),
                inverse = p.softcap != 0 ? 2 * (float)ADA_LOG2E / cap : 0;
    const int64_t offset = p.alibi_slopes ? ada_sequence_of(p, w.b).offset : 0;
    const float slope =
        p.alibi_slopes ? (float)(p.alibi_slopes[w.b * p.alibi_stride[0] + h * p.alibi_stride[1]] * ADA_LOG2E)
                       : 0;
    uint32_t keep = ~0u;
    ADA_EACH_PAIR {
        const int row = ada_back_line<X>(w, mr, half), column = ada_back_column<X>(first, n, c);
        const int i = X::OF_KEYS ? column : row, j = X::OF_KEYS ? row : column;
        const ada_back_pair of = rows[X::OF_KEYS ? column - first : row - w.first];
        float &x = s[mr][n][2 * half + c], &g = dp[mr][n][2 * half + c];
        bool visible = i < p.T && ada_reaches(reach, i, j);
        x *= octaves;
        float bend = 1;
        if (p.softcap != 0) {
            const float part = ada_reciprocal(ada_exp2(x * inverse) + 1); /* (1 - tanh) / 2 */
            x = cap - 2 * cap * part;
            bend = 4 * part * (1 - part);
        }
        if (p.drop_below && visible && ada_dropped(p, ada_dropout_row(p, w.b, h, i), j)) {
            keep &= ~(1u << (4 * (mr * X::KEYS / 8 + n) + 2 * half + c));
            g = 0;
        } else {
            g *= kept;
        }
        if (slope != 0) x -= slope * fabsf((float)(offset + i - j));
        if (p.mask.data && visible) {
            const char *const m = ada_mask_row(p, w.b, h, i) + j * p.mask.stride[3];
            if (p.mask_dtype == ADA_CU_BOOL) {
                visible = *m != 0;
            } else {
                const float add = ada_mask_value<float>(p, m);
                visible = !(add == -ADA_INF);
                x += add * (float)ADA_LOG2E;
            }
        }
        x = visible ? ada_exp2(x - of.lse) : 0;
        g = visible ? x * (g - of.delta) * bend : 0;
    }
    return keep;
}

template <typename X>
ADA_DEVICE void ada_back_store(const ada_back_args &a, const ada_back_where &w, const ada_cu_array &to,
                               int rows, int width, const float (&sums)[X::MR][X::WIDTH / 8][4],
                               float factor) {
    const int size = 2, h = X::OF_KEYS ? w.g : w.h;
    float good = 0; /* NaN where one is not finite */
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
        const int row = ada_back_line<X>(w, mr, half);
        if (row >= rows) continue;
        char *const at = (char *)to.data + w.b * to.stride[0] + h * to.stride[1] + row * to.stride[2];
        ADA_UNROLL for (int n = 0; n < X::WIDTH / 8; n++) {
            const int d = ada_back_column<X>(0, n, 0);
            const float x = sums[mr][n][2 * half] * factor, y = sums[mr][n][2 * half + 1] * factor;
            good += d < width ? x * 0 : 0;
            good += d + 1 < width ? y * 0 : 0;
            if (a.together && d + 1 < width) {
                *(uint32_t *)(at + size * d) = ada_pack<X>(x, y);
            } else {
                if (d < width) ada_store_element(at + size * d, a.x.p.dtype, x);
                if (d + 1 < width) ada_store_element(at + size * (d + 1), a.x.p.dtype, y);
            }
        }
    }
    if (!(good == 0)) ada_make_unfit(a, w.b * a.x.p.G + w.g);
}

/* What one of dS is worth: its largest magnitude is below 2^15 times that. */
ADA_DEVICE float ada_back_unit(const ada_back_args &a, int group) {
    const float bound = 2 * ada_from_bits(a.most[2 * group]) * ada_from_bits(a.most[2 * group + 1]) /
                        (float)(1 - a.x.p.dropout_p);
    if (!(bound > 1e-30f && bound < 1e30f)) return 1;
    int exponent;
    frexpf(bound, &exponent);
    return ldexpf(1, exponent - 15);
}

template <typename X> ADA_DEVICE void ada_back_block(const ada_back_args &a) {
    const ada_cu_params &p = a.x.p;
    const ada_back_where w = ada_back_where_of<X>(a);
    const int lane = ada_thread() % 32, warp = ada_thread() / 32;
    const uint32_t shared = ada_shared();
    const ada_reach reach = ada_reach_of(p, w.b);
    if (ada_computed_by(a.unfit + w.b * p.G + w.g, X::FLAG_AT) != ADA_BACK_RUNG) return;
    const ada_span span = X::OF_KEYS ? ada_tiles_of_queries(reach, w.first, X::STAYING, p.T, X::KEYS)
                                     : ada_tiles_of_keys(reach, w.first, X::STAYING, p.S, X::KEYS);
    const int each = span.end - span.first, count = each * (X::OF_KEYS ? p.H / p.G : 1);
    if (X::OF_KEYS) {
        ada_back_copy<X, X::STAYING>(shared, a.k, w.b, w.g, w.first, reach.keys, 2 * p.D);
        if (X::SCORES)
            ada_back_copy<X, X::STAYING>(shared + X::SECOND_AT, a.v, w.b, w.g, w.first, reach.keys, 2 * p.E);
    } else {
        ada_back_copy<X, X::STAYING>(shared, a.q, w.b, w.h, w.first, p.T, 2 * p.D);
        ada_back_copy<X, X::STAYING>(shared + X::SECOND_AT, a.go, w.b, w.h, w.first, p.T, 2 * p.E);
        ada_back_copy_rows<X, X::ROWS>(shared + X::ROWS_AT, a, w.b * p.H + w.h, w.first);
    }
    if (count) ada_back_copy_tile<X>(a, w, span, reach.keys, 0);
    ada_copy_commit();

    ada_rows<X> of_scores, of_weights; /* the sums; references are not used */
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int n = 0; n < X::WIDTH / 8; n++)
        ADA_UNROLL for (int c = 0; c < 4; c++) of_scores.o[mr][n][c] = of_weights.o[mr][n][c] = 0;
    const float octaves = (float)(p.scale * ADA_LOG2E);
    const float unit = X::BF16 || !X::SCORES ? 1 : ada_back_unit(a, w.b * p.G + w.g), per_unit = 1 / unit;
    const uint32_t left = shared + ada_place<typename X::QK>(warp * 16 * X::MR + lane % 16, lane / 16);
    const uint32_t right = shared + X::COMING_AT + ada_place<typename X::QK>(lane % 16, lane / 16);

    ADA_UNROLL_NOT for (int n = 0; n < count; n++) {
        const uint32_t at = right + (uint32_t)(n % 2 * X::STAGE);
        const int first = (span.first + n % each) * X::KEYS, h = X::OF_KEYS ? w.h + n / each : w.h;
        const ada_back_pair *const rows =
            ada_shared_at<ada_back_pair>((uint32_t)(X::ROWS_AT + (X::OF_KEYS ? n % 2 * X::ROWS_STAGE : 0)));
        ada_copy_wait<0>(); /* this thread's part of the tile */
        ada_sync();         /* all have this tile, and have read the one before */
        float s[X::MR][X::KEYS / 8][4], g[X::MR][X::KEYS / 8][4];
        ada_scores<X>(s, left, at);
        if (n + 1 < count) ada_back_copy_tile<X>(a, w, span, reach.keys, n + 1);
        ada_copy_commit();
        if (X::SCORES)
            ada_scores<X>(g, left + X::SECOND_AT, at + X::OPERAND);
        else
            ADA_EACH_PAIR g[mr][n][2 * half + c] = 0;

        if (a.options) {
            const uint32_t keep = ada_back_options<X>(a, w, h, first, reach, rows, s, g);
            const float kept = (float)(1 / (1 - p.dropout_p));
            if (X::WEIGHTS && p.drop_below) ADA_EACH_PAIR {
                    const int bit = 4 * (mr * X::KEYS / 8 + n) + 2 * half + c;
                    s[mr][n][2 * half + c] *= keep >> bit & 1 ? kept : 0;
                }
        } else {
            const bool plain = X::OF_KEYS ? ada_all_reach(reach, first, X::KEYS, w.first, X::STAYING)
                                          : ada_all_reach(reach, w.first, X::STAYING, first, X::KEYS);
            ADA_EACH_PAIR {
                const int row = ada_back_line<X>(w, mr, half), column = ada_back_column<X>(first, n, c);
                const ada_back_pair of = rows[X::OF_KEYS ? column - first : row - w.first];
                float &x = s[mr][n][2 * half + c], &y = g[mr][n][2 * half + c];
                x = ada_exp2(x * octaves - of.lse);
                y = x * (y - of.delta);
            }
            if (!plain) ADA_EACH_PAIR {
                    const int row = ada_back_line<X>(w, mr, half), column = ada_back_column<X>(first, n, c);
                    const bool visible = X::OF_KEYS ? ada_reaches(reach, column, row) && column < p.T
                                                    : ada_reaches(reach, row, column) && row < p.T;
                    float &x = s[mr][n][2 * half + c], &y = g[mr][n][2 * half + c];
                    x = visible ? x : 0, y = visible ? y : 0;
                }
        }
        if (X::SCORES && !X::BF16) ADA_EACH_PAIR g[mr][n][2 * half + c] *= per_unit;
        if (X::WEIGHTS) ada_add_values<X>(of_weights, s, at + X::OPERAND, 1);
        if (X::SCORES) ada_add_values<X>(of_scores, g, at, 1);
    }
    ada_copy_wait<0>(); /* what stays, where nothing came */

    const ada_cu_array *const to = a.x.results;
    const float factor = (float)p.scale * unit;
    if (!X::OF_KEYS)
        ada_back_store<X>(a, w, to[ADA_CU_OF_QUERY], p.T, p.D, of_scores.o, factor);
    else if (X::SCORES && to[ADA_CU_OF_KEY].data)
        ada_back_store<X>(a, w, to[ADA_CU_OF_KEY], p.S, p.D, of_scores.o, factor);
    if (X::WEIGHTS && to[ADA_CU_OF_VALUE].data)
        ada_back_store<X>(a, w, to[ADA_CU_OF_VALUE], p.S, p.E, of_weights.o, 1);
}

template <typename X> ADA_KERNEL(X::THREADS, 1) ada_back(ADA_ARGS(ada_back_args) a) {
    if constexpr (ADA_CHIP >= 80) ada_back_block<X>(a);
}

#endif
