/* Exact rows for verification: up to four of a head share a pass over a part of the keys, so that a few rows
 * fill a GPU; parts are put together in order. One score by the same steps as k0.cuh.
 */
#include "k0.cuh"
#include "probe.h"

namespace {

enum { THREADS = 128, KEYS = 256 /* of a part */, ROWS = ADA_ROWS_TOGETHER, LANES = THREADS / ROWS };
enum {
    SHARE = 8 /* lanes of a key */,
    AHEAD = 8 /* values on their way */,
    HELD = 4096 /* factors of parts */
};
static_assert(LANES == 32, "a warp per row weighs the scores");

/* What a part knows of a row, before its E outputs. */
enum { PART_M, PART_L, PART_SAW, PART_BAD, PART_O };

template <typename REAL> ADA_DEVICE REAL most_of_warp(REAL x) {
    for (int lanes = 16; lanes; lanes /= 2) {
        const REAL y = ada_shuffle_xor(x, lanes);
        x = y > x ? y : x;
    }
    return x;
}

/* Of a row: what its scores depend on. */
template <typename REAL> struct row_facts {
    ada_span span;
    int64_t position;
    uint64_t random;
    const char *mask;
    REAL slope;
};

template <typename REAL> ADA_DEVICE row_facts<REAL> facts_of(const ada_cu_params &p, int b, int h, int t) {
    row_facts<REAL> f;
    const ada_sequence sequence = ada_sequence_of(p, b);
    f.span = ada_visible(p, sequence, t);
    f.position = sequence.offset + t;
    f.random = p.drop_below ? ada_dropout_row(p, b, h, t) : 0;
    f.mask = p.mask.data ? ada_mask_row(p, b, h, t) : NULL;
    f.slope = p.alibi_slopes ? (REAL)p.alibi_slopes[b * p.alibi_stride[0] + h * p.alibi_stride[1]] : 0;
    return f;
}

/* A product of query and key to a score; false where the key is hidden. */
template <typename REAL>
ADA_DEVICE bool score_of(const ada_cu_params &p, const row_facts<REAL> &f, int j, REAL &s) {
    if (j < f.span.first || j >= f.span.end) return false;
    REAL add = 0;
    if (f.mask) {
        const char *at = f.mask + j * p.mask.stride[3];
        if (p.mask_dtype == ADA_CU_BOOL) {
            if (*at == 0) return false;
        } else {
            add = ada_mask_value<REAL>(p, at);
            if (add == (REAL)-ADA_INF) return false;
        }
    }
    const REAL cap = (REAL)p.softcap;
    s *= (REAL)p.scale;
    if (cap != 0) s = cap * ada_tanh(s / cap);
    const int64_t distance = f.position - j;
    if (f.slope != 0) s -= f.slope * (REAL)(distance < 0 ? -distance : distance);
    s += add;
    return true;
}

template <typename REAL> ADA_DEVICE constexpr int shared_of(int width) {
    return (int)sizeof(REAL) * ROWS * (width + KEYS) + KEYS;
}

template <typename REAL> ADA_KERNEL(THREADS, 1) part_of_rows(ADA_ARGS(ada_rows_args) a) {
    const ada_cu_params &p = a.p;
    const ada_row_group group = a.groups[ada_block() / a.splits];
    const int split = ada_block() % a.splits, first = split * KEYS;
    const int end = first + KEYS < p.S ? first + KEYS : p.S, width = (p.D + 3) / 4 * 4;
    const int b = group.head / p.H, h = group.head % p.H, g = h / (p.H / p.G), thread = ada_thread();
    const uint32_t real = (uint32_t)sizeof(REAL);
    const auto q_at = [&](int r, int d) { return (uint32_t)(r * width + d) * real; };
    const auto w_at = [&](int r, int j) { return (uint32_t)(ROWS * width + r * KEYS + j) * real; };
    const auto seen_at = [&](int j) { return (uint32_t)(ROWS * (width + KEYS)) * real + (uint32_t)j; };
    double *to = a.partials + (int64_t)ada_block() * ROWS * (PART_O + p.E);

    for (int i = thread; i < ROWS * width; i += THREADS) {
        const int r = i / width, d = i % width;
        REAL x = 0;
        if (r < group.count && d < p.D)
            x = ada_element<REAL>((const char *)p.query.data + b * p.query.stride[0] + h * p.query.stride[1] +
                                      a.pairs[2 * (group.first + r) + 1] * p.query.stride[2] +
                                      d * p.query.stride[3],
                                  p.dtype);
        *ada_shared_at<REAL>(q_at(r, d)) = x;
    }
    row_facts<REAL> facts[ROWS];
    bool any = false; /* some row sees some key of this part */
    ADA_UNROLL for (int r = 0; r < ROWS; r++) {
        const int row = a.pairs[2 * (group.first + (r < group.count ? r : 0)) + 1];
        facts[r] = facts_of<REAL>(p, b, h, row);
        if (r >= group.count) facts[r].span.end = 0;
        any |= facts[r].span.first < end && facts[r].span.end > first;
    }
    ada_sync();
    if (!any) {
        if (thread < ROWS) {
            double *part = to + thread * (PART_O + p.E);
            part[PART_M] = -(double)ADA_INF, part[PART_L] = part[PART_SAW] = part[PART_BAD] = 0;
        }
        return;
    }

    /* Eight lanes share a key. */
    const int c = thread % SHARE;
    const char *keys = (const char *)p.key.data + b * p.key.stride[0] + g * p.key.stride[1];
    for (int at = thread / SHARE; at < KEYS; at += THREADS / SHARE) {
        const int j = first + at;
        const char *key = keys + j * p.key.stride[2];
        REAL s[ROWS] = {0};
        for (int d = 4 * c; j < end && d < p.D; d += 4 * SHARE) {
            REAL k[4];
            ada_load_four(k, key, p.key.stride[3], p.dtype, d, p.D, a.fours);
            ADA_UNROLL for (int r = 0; r < ROWS; r++) ADA_UNROLL for (int x = 0; x < 4; x++) s[r] +=
                *ada_shared_at<REAL>(q_at(r, d + x)) * k[x];
        }
        ADA_UNROLL for (int r = 0; r < ROWS; r++) for (int lanes = 1; lanes < SHARE; lanes *= 2) s[r] +=
            ada_shuffle_xor(s[r], lanes);
        if (c) continue;
        uint8_t seen = 0; /* bit r: row r sees the key */
        ADA_UNROLL for (int r = 0; r < ROWS; r++) {
            const bool visible = j < end && score_of(p, facts[r], j, s[r]);
            seen |= (uint8_t)(visible << r);
            *ada_shared_at<REAL>(w_at(r, at)) = visible ? s[r] : (REAL)-ADA_INF;
        }
        *ada_shared_at<uint8_t>(seen_at(at)) = seen;
    }
    ada_sync();

    const int row = thread / LANES, lane = thread % LANES;
    REAL m = (REAL)-ADA_INF, l = 0;
    bool saw = false, bad = false;
    for (int j = lane; j < KEYS; j += LANES) {
        const REAL s = *ada_shared_at<REAL>(w_at(row, j));
        saw |= *ada_shared_at<uint8_t>(seen_at(j)) >> row & 1;
        bad |= !(s < (REAL)ADA_INF);
        m = s > m ? s : m;
    }
    m = most_of_warp(m);
    saw = ada_any(saw), bad = ada_any(bad);
    for (int j = lane; j < KEYS; j += LANES) {
        REAL w = m > (REAL)-ADA_INF ? ada_exp(*ada_shared_at<REAL>(w_at(row, j)) - m) : 0;
        l += w;
        const uint64_t random = row == 0   ? facts[0].random
                                : row == 1 ? facts[1].random
                                : row == 2 ? facts[2].random
                                           : facts[3].random;
        if (p.drop_below && ada_dropped(p, random, first + j)) w = 0;
        *ada_shared_at<REAL>(w_at(row, j)) = w;
    }
    l = ada_sum_of_warp(l);
    if (lane == 0) {
        double *part = to + row * (PART_O + p.E);
        part[PART_M] = (double)m, part[PART_L] = (double)l, part[PART_SAW] = saw, part[PART_BAD] = bad;
    }
    ada_sync();

    for (int e = thread; e < p.E; e += THREADS) {
        const char *value = (const char *)p.value.data + b * p.value.stride[0] + g * p.value.stride[1] +
                            first * p.value.stride[2] + e * p.value.stride[3];
        REAL o[ROWS] = {0};
        for (int j = 0; j < end - first; j += AHEAD) {
            REAL v[AHEAD];
            ADA_UNROLL for (int i = 0; i < AHEAD; i++, value += p.value.stride[2]) v[i] =
                j + i < end - first ? ada_element<REAL>(value, p.dtype) : 0;
            ADA_UNROLL for (int i = 0; i < AHEAD; i++) {
                const int seen = j + i < end - first ? *ada_shared_at<uint8_t>(seen_at(j + i)) : 0;
                ADA_UNROLL for (int r = 0; r < ROWS; r++) if (seen >> r & 1) o[r] +=
                    *ada_shared_at<REAL>(w_at(r, j + i)) * v[i];
            }
        }
        ADA_UNROLL for (int r = 0; r < ROWS; r++) to[r * (PART_O + p.E) + PART_O + e] = (double)o[r];
    }
}

/* A block per row of a group. */
ADA_KERNEL(THREADS, 1) merge_rows(ADA_ARGS(ada_rows_args) a) {
    const ada_cu_params &p = a.p;
    const ada_row_group group = a.groups[ada_block() / ROWS];
    const int r = ada_block() % ROWS;
    const int64_t size = PART_O + p.E, step = ROWS * size, row = group.first + r;
    const double sink = ada_sink(p, group.head % p.H);
    const double *from = a.partials + ada_block() / ROWS * (int64_t)a.splits * step + r * size;
    if (r >= group.count) return;
    double m = sink, l = 0;
    bool saw = false, bad = false;
    for (int i = 0; i < a.splits; i++) {
        const double *part = from + i * step;
        saw |= part[PART_SAW] != 0, bad |= part[PART_BAD] != 0;
        m = part[PART_M] > m ? part[PART_M] : m;
    }
    bad |= saw && m == -(double)ADA_INF;
    const bool good = saw && !bad;
    for (int i = ada_thread(); i < a.splits && i < HELD; i += THREADS) /* of a part that sees nothing: 0 */
        *ada_shared_at<double>(8 * (uint32_t)i) = good ? exp(from[i * step + PART_M] - m) : 0;
    ada_sync();
    const auto factor_of = [&](int i) {
        return i < HELD ? *ada_shared_at<double>(8 * (uint32_t)i) : exp(from[i * step + PART_M] - m);
    };
    for (int i = 0; i < a.splits && good; i++) l += from[i * step + PART_L] * factor_of(i);
    if (m > -(double)ADA_INF) l += exp(sink - m);
    for (int e = ada_thread(); e < p.E; e += THREADS) {
        double sum = 0;
        for (int i = 0; i < a.splits && good; i++)
            if (from[i * step + PART_SAW] != 0) sum += from[i * step + PART_O + e] * factor_of(i);
        a.o[row * p.E + e] = !saw ? 0 : bad ? (double)ADA_NAN : sum / l / (1 - p.dropout_p);
    }
    if (ada_thread() == 0) a.lse[row] = !saw ? sink : bad ? (double)ADA_NAN : m + log(l);
}

} // namespace

int ada_rows_splits(const ada_cu_params *p) { return (p->S + KEYS - 1) / KEYS; }

size_t ada_rows_bytes(const ada_cu_params *p, int64_t groups) {
    return (size_t)(groups * ada_rows_splits(p) * ROWS * (PART_O + p->E)) * sizeof(double);
}

cudaError_t ada_rows_run(ada_rows_args a, bool f64, cudaStream_t stream) {
    const int64_t blocks = (int64_t)a.n_groups * a.splits;
    const int width = (a.p.D + 3) / 4 * 4;
    const cudaError_t error =
        f64 ? ada_launch(part_of_rows<double>, blocks, THREADS, shared_of<double>(width), stream, a)
            : ada_launch(part_of_rows<float>, blocks, THREADS, shared_of<float>(width), stream, a);
    const int held = a.splits < HELD ? a.splits : HELD;
    return error ? error : ada_launch(merge_rows, (int64_t)a.n_groups * ROWS, THREADS, 8 * held, stream, a);
}
