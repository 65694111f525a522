/* Rows of gradients for verification, in double and from the inputs: those of queries with an lse and a delta
 * of their own, those of keys with what the run knows of its queries. A few rows of a head share a pass over
 * a part of those they meet, so that they fill a GPU; parts are added up in order. One pair by the same steps
 * as backward_simt.cuh.
 */
#include "backward_simt.cuh"

namespace {

enum { THREADS = 128, WARPS = THREADS / 32, PART = 256 /* rows that are met */, ROWS = ADA_CU_CHECKED };
enum { SHARE = 8 /* lanes of a row that is met */, MET = THREADS / SHARE };
static_assert(ROWS == WARPS, "a warp sums up a row");

/* What a block does: weigh a query's keys; its dQ and sums; dK and dV. */
enum { WEIGH, OF_QUERIES, OF_KEYS };
/* What a part knows of a row, or before its D sums of dQ. */
enum { PART_M, PART_L, PART_DELTA, PART_SAW, PART_BAD, PART_ENDS };
enum { PART_WEIGHT2, PART_SLOPE2, PART_SCORE2, PART_BOTH, PART_SUMS };

typedef struct {
    ada_cu_gradients x;
    const ada_cu_checked *groups;
    const ada_back_row *known; /* [B * H][padded] */
    ada_back_row *own;         /* [groups][ROWS], of queries */
    double *partials, *to;
    int64_t padded, size;  /* of what a row comes to */
    int32_t parts, splits; /* of a head of those that are met, of all heads */
} Check;

ADA_DEVICE int row_size(const ada_cu_params &p, bool keys) { return keys ? p.D + p.E : PART_SUMS + p.D; }

/* [ROWS][PART] in shared memory: weights, gradients of scores, slopes (of queries); which rows see each. */
ADA_DEVICE double *shared_pairs(int width, int which, int r) {
    return ada_shared_at<double>((uint32_t)(ROWS * width + (which * ROWS + r) * PART) * 8);
}
ADA_DEVICE uint8_t *shared_seen(int width) {
    return ada_shared_at<uint8_t>((uint32_t)(ROWS * (width + 3 * PART)) * 8);
}
int shared_bytes(const ada_cu_params &p) { return ROWS * (p.D + p.E + 3 * PART) * 8 + PART; }

/* Of each of the pairs that see each other, the largest score, the sums of weights and of weights times dP.
 */
ADA_DEVICE void end_part(const double *score, const double *gradient, const uint8_t *seen, int r,
                         double *to) {
    const int lane = ada_thread() % 32;
    double m = (double)-ADA_INF, l = 0, delta = 0, saw = 0, bad = 0;
    for (int n = lane; n < PART; n += 32) {
        if (!(seen[n] >> r & 1)) continue;
        saw = 1;
        if (!(score[n] < (double)ADA_INF))
            bad = 1;
        else if (score[n] > m)
            m = score[n];
    }
    ADA_UNROLL for (int lanes = 16; lanes; lanes /= 2) {
        const double other = ada_shuffle_xor(m, lanes);
        m = other > m ? other : m;
    }
    for (int n = lane; n < PART && m > (double)-ADA_INF; n += 32) {
        const double w = seen[n] >> r & 1 && score[n] < (double)ADA_INF ? exp2(score[n] - m) : 0;
        l += w;
        if (seen[n] >> r & 1) delta += w * gradient[n];
    }
    l = ada_sum_of_warp(l), delta = ada_sum_of_warp(delta), saw = ada_sum_of_warp(saw),
    bad = ada_sum_of_warp(bad);
    if (lane != 0) return;
    to[PART_M] = m, to[PART_L] = l, to[PART_DELTA] = delta, to[PART_SAW] = saw, to[PART_BAD] = bad;
}

template <int WHAT> ADA_KERNEL(THREADS, 1) meet(ADA_ARGS(Check) a) {
    constexpr bool KEYS = WHAT == OF_KEYS;
    const ada_cu_params &p = a.x.p;
    const ada_cu_checked &group = a.groups[ada_block() / a.splits];
    const int split = ada_block() % a.splits, first = split % a.parts * PART, width = p.D + p.E;
    const int heads = KEYS ? p.G : p.H, b = group.head / heads;
    const int h = KEYS ? group.head % heads * (p.H / p.G) + split / a.parts : group.head % heads;
    const ada_back_head at = ada_back_head_of(p, b * p.H + h);
    const int all = KEYS ? p.T : at.reach.keys, end = first + PART < all ? first + PART : all;
    const ada_cu_array &one = KEYS ? p.key : p.query, &other = KEYS ? p.value : a.x.grad_out;
    const ada_cu_array &left = KEYS ? p.query : p.key, &right = KEYS ? a.x.grad_out : p.value;
    const int one_head = KEYS ? at.g : h, met_head = KEYS ? h : at.g;
    double *const held = ada_shared_at<double>(0);
    uint8_t *const seen = shared_seen(width);

    for (int i = ada_thread(); i < ROWS * width; i += THREADS) {
        const int r = i / width, c = i % width;
        const bool is_one = c < p.D;
        const ada_cu_array &from = is_one ? one : other;
        held[i] = r < group.count ? ada_element<double>(ada_row_of(from, b, one_head, group.row[r]) +
                                                            (is_one ? c : c - p.D) * from.stride[3],
                                                        p.dtype)
                                  : 0;
    }
    ada_sync();

    /* Eight lanes share a row that is met; the first of them go on with a pair each. */
    const int lane = ada_thread() % SHARE, mine = lane < group.count ? lane : 0;
    const double slope = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_stride[0] + h * p.alibi_stride[1]] : 0;
    const double kept = 1 / (1 - p.dropout_p);
    ADA_UNROLL_NOT for (int n = ada_thread() / SHARE; n < PART; n += MET) {
        const int met = first + n;
        const int i = KEYS ? met : group.row[mine], j = KEYS ? group.row[mine] : met;
        double add = 0, s = 0, g = 0;
        const char *const mask = p.mask.data && met < end ? ada_mask_row(p, b, h, i) : nullptr;
        const bool sees = lane < group.count && met < end && ada_pair_sees(p, at.reach, mask, i, j, add);
        uint32_t any = (uint32_t)sees << lane;
        ADA_UNROLL for (int lanes = 1; lanes < SHARE; lanes *= 2) any |= ada_shuffle_xor(any, lanes);
        double sums[ROWS] = {0}, gradients[ROWS] = {0};
        const char *const x = any ? ada_row_of(left, b, met_head, met) : nullptr;
        const char *const y = any ? ada_row_of(right, b, met_head, met) : nullptr;
        for (int d = lane; any && d < p.D; d += SHARE) {
            const double e = ada_element<double>(x + d * left.stride[3], p.dtype);
            ADA_UNROLL for (int r = 0; r < ROWS; r++) sums[r] += held[r * width + d] * e;
        }
        for (int d = lane; any && d < p.E; d += SHARE) {
            const double e = ada_element<double>(y + d * right.stride[3], p.dtype);
            ADA_UNROLL for (int r = 0; r < ROWS; r++) gradients[r] += held[r * width + p.D + d] * e;
        }
        ADA_UNROLL for (int r = 0; r < ROWS; r++) {
            ADA_UNROLL for (int lanes = 1; lanes < SHARE; lanes *= 2) {
                sums[r] += ada_shuffle_xor(sums[r], lanes);
                gradients[r] += ada_shuffle_xor(gradients[r], lanes);
            }
            if (r == lane) s = sums[r], g = gradients[r];
        }
        if (lane == 0) seen[n] = (uint8_t)any;
        if (!sees) continue;
        double bend;
        s = ada_pair_score(s * p.scale, p.softcap, slope, at.offset + i - j, add, bend);
        const bool keep = !p.drop_below || !ada_dropped(p, ada_dropout_row(p, b, h, i), j);
        if (p.drop_below) g = keep ? g * kept : 0;
        if (WHAT != WEIGH) {
            const ada_back_row row = KEYS ? a.known[((int64_t)b * p.H + h) * a.padded + i]
                                          : a.own[ada_block() / a.splits * ROWS + lane];
            const double w = exp2(s - row.reference - row.lse);
            g = w * (g - row.delta) * bend;
            s = KEYS ? keep ? w * kept : 0 : w;
            if (!KEYS) shared_pairs(width, 2, lane)[n] = w * bend;
        }
        shared_pairs(width, 0, lane)[n] = s, shared_pairs(width, 1, lane)[n] = g;
    }
    ada_sync();

    const int size = row_size(p, KEYS), own = ada_thread() / 32;
    double *const to = a.partials + (int64_t)ada_block() * ROWS * size;
    if constexpr (WHAT == WEIGH) {
        end_part(shared_pairs(width, 0, own), shared_pairs(width, 1, own), seen, own, to + own * size);
    } else {
        for (int c = ada_thread(); c < (KEYS ? width : p.D); c += THREADS) {
            const bool of_value = c >= p.D; /* dV, from grad_out */
            const ada_cu_array &from = of_value ? right : left;
            const int d = of_value ? c - p.D : c;
            double sums[ROWS] = {0};
            for (int n = 0; n < end - first; n++) {
                const int any = seen[n];
                if (!any) continue;
                const double e = ada_element<double>(
                    ada_row_of(from, b, met_head, first + n) + d * from.stride[3], p.dtype);
                ADA_UNROLL for (int r = 0; r < ROWS; r++) if (any >> r & 1) sums[r] +=
                    shared_pairs(width, !of_value, r)[n] * e;
            }
            ADA_UNROLL for (int r = 0; r < ROWS; r++) to[r * size + (KEYS ? c : PART_SUMS + c)] = sums[r];
        }
        if constexpr (!KEYS) {
            double squares[PART_SUMS] = {0};
            for (int n = ada_thread() % 32; n < PART; n += 32) {
                if (!(seen[n] >> own & 1)) continue;
                const double w = shared_pairs(width, 0, own)[n], d = shared_pairs(width, 1, own)[n];
                const double by = shared_pairs(width, 2, own)[n];
                squares[PART_WEIGHT2] += w * w, squares[PART_SLOPE2] += by * by;
                squares[PART_SCORE2] += d * d, squares[PART_BOTH] += d * by;
            }
            ADA_UNROLL for (int i = 0; i < PART_SUMS; i++) {
                const double sum = ada_sum_of_warp(squares[i]);
                if (ada_thread() % 32 == 0) to[own * size + i] = sum;
            }
        }
    }
}

/* The lse and delta of queries, a thread for each. */
ADA_KERNEL(ROWS, 1) end_rows(ADA_ARGS(Check) a) {
    const ada_cu_params &p = a.x.p;
    const int r = ada_thread(), size = row_size(p, false);
    const double sink = ada_sink(p, a.groups[ada_block()].head % p.H) * ADA_LOG2E;
    const double *const from = a.partials + ((int64_t)ada_block() * a.splits * ROWS + r) * size;
    double m = sink, most = (double)-ADA_INF, l = 0, delta = 0;
    bool saw = false, bad = false;
    for (int i = 0; i < a.splits; i++) {
        const double *const part = from + (int64_t)i * ROWS * size;
        saw |= part[PART_SAW] > 0, bad |= part[PART_BAD] > 0;
        most = part[PART_M] > most ? part[PART_M] : most;
    }
    m = most > m ? most : m;
    for (int i = 0; i < a.splits; i++) {
        const double *const part = from + (int64_t)i * ROWS * size;
        if (!(part[PART_M] > (double)-ADA_INF)) continue;
        const double by = exp2(part[PART_M] - m);
        l += part[PART_L] * by, delta += part[PART_DELTA] * by;
    }
    ada_back_row row = {0, sink, 0};
    if (saw && (bad || m == (double)-ADA_INF)) {
        row.lse = row.delta = (double)ADA_NAN;
    } else if (saw) {
        l += exp2(sink - m);
        row.reference = m, row.lse = log2(l), row.delta = delta / l;
    }
    a.own[ada_block() * ROWS + r] = row;
}

/* Sums over parts, and what else is told of a row: a block for each. */
template <bool KEYS> ADA_KERNEL(THREADS, 1) tell_rows(ADA_ARGS(Check) a) {
    const ada_cu_params &p = a.x.p;
    const ada_cu_checked &group = a.groups[ada_block() / ROWS];
    const int r = ada_block() % ROWS, size = row_size(p, KEYS), width = KEYS ? p.D + p.E : p.D;
    const int heads = KEYS ? p.G : p.H, b = group.head / heads, h = group.head % heads, lane = ada_thread();
    if (r >= group.count) return;
    const double *const from = a.partials + ((int64_t)(ada_block() / ROWS) * a.splits * ROWS + r) * size;
    double *const to = a.to + (int64_t)ada_block() * a.size, *const numbers = to + (KEYS ? 0 : ADA_CU_TRUTHS);
    const auto sum_at = [&](int at) {
        double sum = 0;
        for (int i = 0; i < a.splits; i++) sum += from[(int64_t)i * ROWS * size + at];
        return sum;
    };
    for (int c = lane; c < width; c += THREADS) {
        const bool of_value = c >= p.D;
        const int d = of_value ? c - p.D : c;
        const ada_cu_array &x = a.x.results[of_value ? ADA_CU_OF_VALUE
                                            : KEYS   ? ADA_CU_OF_KEY
                                                     : ADA_CU_OF_QUERY];
        numbers[c] = sum_at(KEYS ? c : PART_SUMS + c) * (of_value ? 1 : p.scale);
        numbers[width + c] =
            x.data ? ada_element<double>(ada_row_of(x, b, h, group.row[r]) + d * x.stride[3], p.dtype) : 0;
    }
    if (KEYS || lane >= 32) return;
    double query2 = 0, grad2 = 0;
    for (int d = lane; d < p.D; d += 32) {
        const double x =
            p.scale *
            ada_element<double>(ada_row_of(p.query, b, h, group.row[r]) + d * p.query.stride[3], p.dtype);
        query2 += x * x;
    }
    for (int e = lane; e < p.E; e += 32) {
        const ada_cu_array &go = a.x.grad_out;
        const double x = ada_element<double>(ada_row_of(go, b, h, group.row[r]) + e * go.stride[3], p.dtype);
        grad2 += x * x;
    }
    query2 = ada_sum_of_warp(query2), grad2 = ada_sum_of_warp(grad2);
    if (lane != 0) return;
    const ada_back_row own = a.own[ada_block()];
    const ada_back_row given = a.known[(int64_t)group.head * a.padded + group.row[r]];
    to[ADA_CU_LSE] = own.reference + own.lse, to[ADA_CU_DELTA] = own.delta;
    to[ADA_CU_QUERY2] = query2, to[ADA_CU_GRAD2] = grad2;
    for (int i = 0; i < PART_SUMS; i++) to[ADA_CU_WEIGHT2 + i] = sum_at(i);
    to[ADA_CU_GIVEN_LSE] = given.reference + given.lse, to[ADA_CU_GIVEN_DELTA] = given.delta;
}
static_assert(ADA_CU_BOTH - ADA_CU_WEIGHT2 == PART_BOTH && (int)PART_SUMS + 1 >= (int)PART_ENDS, "sums");

/* ---- norms ---- */

typedef struct {
    ada_cu_gradients x;
    double *of_queries, *of_keys;
} Norms;

/* The squared norm of a row by a warp. */
ADA_DEVICE double norm2(const ada_cu_params &p, const ada_cu_array &a, int b, int h, int i, int width) {
    double sum = 0;
    for (int d = ada_thread() % 32; a.data && d < width; d += 32) {
        const double x = ada_element<double>(ada_row_of(a, b, h, i) + d * a.stride[3], p.dtype);
        sum += x * x;
    }
    return ada_sum_of_warp(sum);
}

/* Whether a query sees any key, or a key is seen by any query, of those within a span: by a warp. */
ADA_DEVICE bool any_sees(const ada_cu_params &p, const ada_back_head &at, bool of_key, int own,
                         ada_span span) {
    if (!p.mask.data) return span.first < span.end;
    bool found = false;
    for (int n = span.end; n > span.first && !found; n -= 32) { /* what is causal shows at the end */
        const int other = n - 1 - ada_thread() % 32, i = of_key ? other : own, j = of_key ? own : other;
        double add;
        found = ada_any(other >= span.first &&
                        ada_pair_sees(p, at.reach, ada_mask_row(p, at.b, at.h, i), i, j, add));
    }
    return found;
}

/* A warp for each query, then for each key. */
ADA_KERNEL(THREADS, 1) size_rows(ADA_ARGS(Norms) a) {
    const ada_cu_params &p = a.x.p;
    const int64_t row = (int64_t)ada_block() * WARPS + ada_thread() / 32;
    const int64_t queries = (int64_t)p.B * p.H * p.T, key = row - queries;
    const ada_cu_array *const to = a.x.results;
    if (key >= (int64_t)p.B * p.G * p.S) return;
    if (key < 0) {
        const int head = (int)(row / p.T), i = (int)(row % p.T);
        const ada_back_head at = ada_back_head_of(p, head);
        const double go = norm2(p, a.x.grad_out, at.b, at.h, i, p.E);
        const double product =
            go * norm2(p, p.query, at.b, at.h, i, p.D) * norm2(p, p.out, at.b, at.h, i, p.E);
        const double dq = norm2(p, to[ADA_CU_OF_QUERY], at.b, at.h, i, p.D);
        const bool sees = any_sees(p, at, false, i, ada_tiles_of_keys(at.reach, i, 1, p.S, 1));
        if (ada_thread() % 32 != 0) return;
        double *const x = a.of_queries + row * ADA_CU_QUERY_NORMS;
        x[0] = go, x[1] = product, x[2] = dq, x[3] = sees;
        return;
    }
    const int head = (int)(key / p.S), j = (int)(key % p.S), b = head / p.G, g = head % p.G, per = p.H / p.G;
    const double dk = norm2(p, to[ADA_CU_OF_KEY], b, g, j, p.D);
    const double dv = norm2(p, to[ADA_CU_OF_VALUE], b, g, j, p.E);
    bool seen = false;
    for (int h = g * per; h < (g + 1) * per && !seen; h++) {
        const ada_back_head at = ada_back_head_of(p, b * p.H + h);
        seen = any_sees(p, at, true, j, ada_tiles_of_queries(at.reach, j, 1, p.T, 1));
    }
    if (ada_thread() % 32 != 0) return;
    double *const x = a.of_keys + key * ADA_CU_KEY_NORMS;
    x[0] = dk, x[1] = dv, x[2] = seen;
}

int64_t splits_of(const ada_cu_params *p, bool keys) {
    return keys ? ada_divide_up(p->T, PART) * (p->H / p->G) : ada_divide_up(p->S, PART);
}

} // namespace

size_t ada_cu_check_bytes(const ada_cu_params *p, bool keys) {
    const int64_t numbers = splits_of(p, keys) * (keys ? p->D + p->E : PART_SUMS + p->D);
    return (size_t)(ROWS * numbers) * sizeof(double) + ROWS * sizeof(ada_back_row);
}

int64_t ada_cu_check_size(const ada_cu_params *p, bool keys) {
    return ROWS * (int64_t)(keys ? 2 * (p->D + p->E) : ADA_CU_TRUTHS + 2 * p->D);
}

cudaError_t ada_cu_check_rows(const ada_cu_gradients *x, bool keys, const ada_cu_checked *groups, int64_t n,
                              double *partials, double *to, cudaStream_t stream) {
    const ada_cu_params *const p = &x->p;
    Check a = {};
    a.x = *x, a.groups = groups, a.to = to, a.known = (const ada_back_row *)x->rows;
    a.own = (ada_back_row *)partials, a.partials = partials + n * ROWS * (sizeof(ada_back_row) / sizeof *to);
    a.padded = ada_divide_up(p->T, ADA_BACK_ROWS) * ADA_BACK_ROWS;
    a.size = ada_cu_check_size(p, keys) / ROWS;
    a.splits = (int32_t)splits_of(p, keys), a.parts = keys ? a.splits / (p->H / p->G) : a.splits;
    const int shared = shared_bytes(*p);
    cudaError_t error = cudaSuccess;
    if (keys) {
        error = ada_launch(meet<OF_KEYS>, n * a.splits, THREADS, shared, stream, a);
        return error ? error : ada_launch(tell_rows<true>, n * ROWS, THREADS, 0, stream, a);
    }
    error = ada_launch(meet<WEIGH>, n * a.splits, THREADS, shared, stream, a);
    if (!error) error = ada_launch(end_rows, n, ROWS, 0, stream, a);
    if (!error) error = ada_launch(meet<OF_QUERIES>, n * a.splits, THREADS, shared, stream, a);
    return error ? error : ada_launch(tell_rows<false>, n * ROWS, THREADS, 0, stream, a);
}

cudaError_t ada_cu_gradient_norms(const ada_cu_gradients *x, double *of_queries, double *of_keys,
                                  cudaStream_t stream) {
    const ada_cu_params *const p = &x->p;
    const int64_t rows = (int64_t)p->B * p->H * p->T + (int64_t)p->B * p->G * p->S;
    const Norms a = {*x, of_queries, of_keys};
    return ada_launch(size_rows, ada_divide_up(rows, WARPS), THREADS, 0, stream, a);
}
