/* Attention over landmarks (csrc/lowrank.h says what is computed), in float on plain arithmetic: any chip,
 * dtype and layout.
 *
 * A block has 16 x 16 threads and computes tiles of 64 x 64: thread (y, x) owns rows 4 y ... and columns 4 x
 * ... of one. Operands come to shared memory in slices, with what is summed over outside. Exponents are below
 * ADA_MOST_EXPONENT by the choice of landmarks, but for queries that are then computed otherwise.
 */
#include "host.h"
#include "launch.h"

namespace ada_cuda {

namespace {

enum { THREADS = 256, TILE = 64, DEEP = 32, LD = TILE + 4 /* keeps fours together */ };
enum {
    LEFT_AT = 0,
    RIGHT_AT = DEEP * LD * 4,
    WEIGHTS_AT = 2 * RIGHT_AT,
    ROWS_AT = WEIGHTS_AT + TILE * LD * 4
};
#define ADA_MOST_EXPONENT 16                 /* of H(x, x), as in csrc/landmarks.h */
#define ADA_LEAST_RESIDUAL 1e-5f             /* as there */
const size_t MOST_MEMORY = (size_t)64 << 20; /* for heads that are computed together */

struct Head {
    int32_t head, first, end, rank;
    int32_t chunks; /* of ADA_CUDA_BIN keys whose sums are wanted */
    int32_t whole;  /* all queries see all keys: only sums over all chunks count */
    int32_t kept;   /* so many chunks' projections are kept: all, or the last */
    float query_factor, key_factor, gain, limit;
    int64_t mean, point, basis, sums, values; /* where its floats begin */
};

struct Args {
    ada_cu_params p;
    const Head *heads;
    float *memory;
    float *shift2; /* [n][T] */
    int32_t n, most_chunks, most_ranks /* tiles of landmarks */, tiles /* of queries */;
    int64_t factors; /* of each block, [most_ranks * TILE][TILE] */
};

/* What is known of a tile's queries. */
struct Row {
    float own, shift; /* exponent of H(q, q), product with the keys' mean */
    float mass, factor;
    int32_t end;   /* of the keys that it sees */
    int32_t exact; /* not to be had by landmarks */
};

typedef float Tile[4][4];

ADA_DEVICE void clear(Tile &x) {
    ADA_UNROLL for (int i = 0; i < 4; i++) ADA_UNROLL for (int j = 0; j < 4; j++) x[i][j] = 0;
}

/* sums += the slices' product. */
ADA_DEVICE void add_slices(Tile &sums) {
    const float *left = ada_shared_at<float>(LEFT_AT) + ada_thread() / 16 * 4,
                *right = ada_shared_at<float>(RIGHT_AT) + ada_thread() % 16 * 4;
    ADA_UNROLL_BY(4) for (int k = 0; k < DEEP; k++) {
        const ada_vector<float, 4> l = *(const ada_vector<float, 4> *)(left + k * LD),
                                   r = *(const ada_vector<float, 4> *)(right + k * LD);
        ADA_UNROLL for (int i = 0; i < 4; i++) ADA_UNROLL for (int j = 0; j < 4; j++) sums[i][j] +=
            l.x[i] * r.x[j];
    }
}

/* sums = sum over d of left(row, d) right(column, d), which lie together by d. */
template <class LEFT, class RIGHT>
ADA_DEVICE void dot_rows(Tile &sums, int depth, const LEFT &left, const RIGHT &right) {
    clear(sums);
    ADA_UNROLL_NOT for (int at = 0; at < depth; at += DEEP) {
        ada_sync(); /* what stood there has been read */
        ADA_UNROLL_BY(2) for (int i = ada_thread(); i < TILE * DEEP; i += THREADS) {
            const int row = i / DEEP, k = i % DEEP;
            ada_shared_at<float>(LEFT_AT)[k * LD + row] = at + k < depth ? left(row, at + k) : 0;
            ada_shared_at<float>(RIGHT_AT)[k * LD + row] = at + k < depth ? right(row, at + k) : 0;
        }
        ada_sync();
        add_slices(sums);
    }
}

/* sums += sum over k of left(k, row) right(k, column), which lie together by row and column. */
template <class LEFT, class RIGHT>
ADA_DEVICE void add_columns(Tile &sums, int depth, const LEFT &left, const RIGHT &right) {
    ADA_UNROLL_NOT for (int at = 0; at < depth; at += DEEP) {
        ada_sync();
        ADA_UNROLL_BY(2) for (int i = ada_thread(); i < TILE * DEEP; i += THREADS) {
            const int k = i / TILE, column = i % TILE;
            ada_shared_at<float>(LEFT_AT)[k * LD + column] = at + k < depth ? left(at + k, column) : 0;
            ada_shared_at<float>(RIGHT_AT)[k * LD + column] = at + k < depth ? right(at + k, column) : 0;
        }
        ada_sync();
        add_slices(sums);
    }
}

/* 2^(factor x) of a tile, to where LD is its width, for pairs that are there. */
template <class THERE>
ADA_DEVICE void weigh(float *to, int ld, const Tile &x, float factor, const THERE &there) {
    const int y0 = ada_thread() / 16 * 4, x0 = ada_thread() % 16 * 4;
    ADA_UNROLL for (int i = 0; i < 4; i++) {
        ada_vector<float, 4> row;
        ADA_UNROLL for (int j = 0; j < 4; j++) row.x[j] =
            there(y0 + i, x0 + j) ? ada_exp2(x[i][j] * factor) : 0;
        *(ada_vector<float, 4> *)(to + (y0 + i) * ld + x0) = row;
    }
}

ADA_DEVICE float element_of(const ada_cu_params &p, const ada_cu_array &x, int b, int h, int64_t row, int d) {
    return ada_element<float>((const char *)x.data + b * x.stride[0] + h * x.stride[1] + row * x.stride[2] +
                                  d * x.stride[3],
                              p.dtype);
}

/* H(K, L)' (V, 1) of a chunk of keys and a tile of landmarks: [chunks][rank][E], then [chunks][rank]. */
template <int PIECES> ADA_KERNEL(THREADS, 2) sum_values(ADA_ARGS(Args) a) {
    const ada_cu_params &p = a.p;
    const int tile = ada_block() % a.most_ranks, chunk = ada_block() / a.most_ranks % a.most_chunks;
    const Head head = a.heads[ada_block() / a.most_ranks / a.most_chunks];
    const int l0 = tile * TILE, b = head.head / p.H, g = head.head % p.H / (p.H / p.G);
    if (chunk >= head.chunks || l0 >= head.rank) return;
    const int first = head.first + chunk * ADA_CUDA_BIN,
              end = first + ADA_CUDA_BIN < head.end ? first + ADA_CUDA_BIN : head.end;
    const float *const mean = a.memory + head.mean, *const point = a.memory + head.point;
    float *const weights = ada_shared_at<float>(WEIGHTS_AT), mass = 0;
    Tile sums[PIECES], scores;
    ADA_UNROLL for (int c = 0; c < PIECES; c++) clear(sums[c]);
    ADA_UNROLL_NOT for (int j = first; j < end; j += TILE) {
        dot_rows(
            scores, p.D,
            [&](int i, int d) { return j + i < end ? element_of(p, p.key, b, g, j + i, d) - mean[d] : 0; },
            [&](int i, int d) { return l0 + i < head.rank ? point[(l0 + i) * p.D + d] : 0; });
        weigh(weights, LD, scores, head.key_factor * (float)ADA_LOG2E,
              [&](int i, int) { return j + i < end; });
        ada_sync();
        for (int i = 0; ada_thread() < TILE && i < TILE; i++) mass += weights[i * LD + ada_thread()];
        ADA_UNROLL for (int c = 0; c < PIECES; c++) add_columns(
            sums[c], TILE, [&](int i, int l) { return weights[i * LD + l]; },
            [&](int i, int e) {
                return j + i < end && TILE * c + e < p.E ? element_of(p, p.value, b, g, j + i, TILE * c + e)
                                                         : 0;
            });
    }
    float *const to = a.memory + head.sums + (int64_t)chunk * head.rank * p.E;
    float *const masses = a.memory + head.sums + (int64_t)head.chunks * head.rank * p.E + chunk * head.rank;
    const int y0 = ada_thread() / 16 * 4, x0 = ada_thread() % 16 * 4;
    ADA_UNROLL for (int c = 0; c < PIECES; c++) ADA_UNROLL for (int i = 0; i < 4; i++)
        ADA_UNROLL for (int j = 0; j < 4; j++) {
        const int l = l0 + y0 + i, e = TILE * c + x0 + j;
        if (l < head.rank && e < p.E) to[l * p.E + e] = sums[c][i][j];
    }
    if (ada_thread() < TILE && l0 + ada_thread() < head.rank) masses[l0 + ada_thread()] = mass;
}

/* Of each chunk the sums up to its end. A thread owns a column. */
ADA_KERNEL(THREADS, 1) add_chunks(ADA_ARGS(Args) a) {
    const int columns = a.most_ranks * TILE * (a.p.E + 1), blocks = (columns + THREADS - 1) / THREADS;
    const Head head = a.heads[ada_block() / blocks];
    const int i = ada_block() % blocks * THREADS + ada_thread(), wide = head.rank * a.p.E;
    if (i >= wide + head.rank) return;
    const int step = i < wide ? wide : head.rank;
    float *at = a.memory + head.sums + (i < wide ? i : (int64_t)head.chunks * wide + i - wide), sum = 0;
    for (int c = 0; c < head.chunks; c += 8) { /* loads of eight do not wait for stores */
        float x[8];
        ADA_UNROLL for (int k = 0; k < 8; k++) x[k] = c + k < head.chunks ? at[(int64_t)(c + k) * step] : 0;
        ADA_UNROLL for (int k = 0; k < 8; k++) {
            sum += x[k];
            if (head.whole ? c + k == head.chunks - 1 : c + k < head.chunks)
                at[(int64_t)(c + k) * step] = sum;
        }
    }
}

/* The basis's transpose times that, where it is wanted. */
ADA_KERNEL(THREADS, 2) project_values(ADA_ARGS(Args) a) {
    const ada_cu_params &p = a.p;
    const int pieces = (p.E + TILE - 1) / TILE;
    int rest = ada_block();
    const int e0 = rest % pieces * TILE, l0 = (rest /= pieces) % a.most_ranks * TILE;
    const int chunk = (rest /= a.most_ranks) % a.most_chunks;
    const Head head = a.heads[rest / a.most_chunks];
    const int R = head.rank, thread = ada_thread();
    const int slot = chunk - (head.chunks - head.kept);
    if (l0 >= R || chunk >= head.chunks || slot < 0) return;
    const float *const basis = a.memory + head.basis,
                       *const sums = a.memory + head.sums + (int64_t)chunk * R * p.E,
                       *const sum_masses = a.memory + head.sums + (int64_t)head.chunks * R * p.E + chunk * R;
    float *const to = a.memory + head.values + (int64_t)slot * R * p.E;
    float *const masses = a.memory + head.values + (int64_t)head.kept * R * p.E + slot * R;
    const int depth = l0 + TILE < R ? l0 + TILE : R; /* the basis is triangular */
    Tile out;
    clear(out);
    add_columns(
        out, depth, [&](int k, int l) { return l0 + l < R ? basis[k * R + l0 + l] : 0; },
        [&](int k, int e) { return e0 + e < p.E ? sums[k * p.E + e0 + e] : 0; });
    ADA_UNROLL for (int i = 0; i < 4; i++) ADA_UNROLL for (int j = 0; j < 4; j++) {
        const int l = l0 + thread / 16 * 4 + i, e = e0 + thread % 16 * 4 + j;
        if (l < R && e < p.E) to[l * p.E + e] = out[i][j];
    }
    if (e0 > 0 || thread >= TILE || l0 + thread >= R) return;
    float mass = 0;
    for (int k = 0; k < depth; k++) mass += basis[k * R + l0 + thread] * sum_masses[k];
    masses[l0 + thread] = mass;
}

/* A tile's rows: four threads each. */
ADA_DEVICE void load_rows(const Args &a, const Head &head, const ada_sequence &s, int t0) {
    const ada_cu_params &p = a.p;
    const int row = ada_thread() / 4, part = ada_thread() % 4, t = t0 + row, h = head.head % p.H;
    const float *const mean = a.memory + head.mean;
    float norm2 = 0, shift = 0;
    for (int d = part; d < p.D && t < p.T; d += 4) {
        const float x = element_of(p, p.query, s.b, h, t, d);
        norm2 += x * x, shift += x * mean[d];
    }
    ADA_UNROLL for (int lanes = 1; lanes < 4; lanes *= 2) norm2 += ada_shuffle_xor(norm2, lanes),
        shift += ada_shuffle_xor(shift, lanes);
    if (part) return;
    Row *const to = ada_shared_at<Row>(ROWS_AT) + row;
    to->own = norm2 * head.query_factor * head.query_factor, to->shift = shift;
    to->mass = 0, to->factor = 0;
    to->end = t < p.T ? ada_visible(p, s, t).end : 0;
    to->exact = !(to->own <= ADA_MOST_EXPONENT);
}

/* F of a tile's queries, [rank][TILE], and sums over the first bins of keys. */
template <int PIECES>
ADA_DEVICE void attend_far(const Args &a, const Head &head, const ada_sequence &s, int t0, int slot,
                           float *factors, Tile (&out)[PIECES]) {
    const ada_cu_params &p = a.p;
    const int R = head.rank, h = head.head % p.H, y0 = ada_thread() / 16 * 4, x0 = ada_thread() % 16 * 4;
    const float *const point = a.memory + head.point, *const basis = a.memory + head.basis;
    Tile x;
    ADA_UNROLL_NOT for (int l0 = 0; l0 < R; l0 += TILE) {
        dot_rows(
            x, p.D, [&](int i, int d) { return l0 + i < R ? point[(l0 + i) * p.D + d] : 0; },
            [&](int i, int d) { return t0 + i < p.T ? element_of(p, p.query, s.b, h, t0 + i, d) : 0; });
        weigh(factors + l0 * TILE, TILE, x, head.query_factor * (float)ADA_LOG2E,
              [&](int i, int) { return l0 + i < R; });
    }
    /* From the last on, as those before do not need it. */
    ADA_UNROLL_NOT for (int l0 = (R - 1) / TILE * TILE; l0 >= 0; l0 -= TILE) {
        clear(x);
        add_columns(
            x, l0 + TILE < R ? l0 + TILE : R,
            [&](int k, int l) { return l0 + l < R ? basis[k * R + l0 + l] : 0; },
            [&](int k, int i) { return factors[k * TILE + i]; });
        ADA_UNROLL for (int i = 0; i < 4; i++) ADA_UNROLL for (int j = 0; j < 4; j++)
            factors[(l0 + y0 + i) * TILE + x0 + j] = x[i][j];
    }
    ada_sync();
    if (slot < 0) return;
    const float *const values = a.memory + head.values + (int64_t)slot * R * p.E;
    ADA_UNROLL for (int c = 0; c < PIECES; c++) add_columns(
        out[c], R, [&](int k, int i) { return factors[k * TILE + i]; },
        [&](int k, int e) { return TILE * c + e < p.E ? values[k * p.E + TILE * c + e] : 0; });
}

/* Goes on with the keys from one on, exactly. A thread below TILE has a row's mass. */
template <int PIECES>
ADA_DEVICE void attend_near(const Args &a, const Head &head, const ada_sequence &s, int t0, int first,
                            int end, float *mass, Tile (&out)[PIECES]) {
    const ada_cu_params &p = a.p;
    const int h = head.head % p.H, g = h / (p.H / p.G);
    const float *const mean = a.memory + head.mean;
    const Row *const rows = ada_shared_at<Row>(ROWS_AT);
    float *const weights = ada_shared_at<float>(WEIGHTS_AT);
    Tile x;
    ADA_UNROLL_NOT for (int j = first; j < end; j += TILE) {
        dot_rows(
            x, p.D,
            [&](int i, int d) { return j + i < end ? element_of(p, p.key, s.b, g, j + i, d) - mean[d] : 0; },
            [&](int i, int d) { return t0 + i < p.T ? element_of(p, p.query, s.b, h, t0 + i, d) : 0; });
        weigh(weights, LD, x, (float)(p.scale * ADA_LOG2E),
              [&](int i, int row) { return j + i < rows[row].end; });
        ada_sync();
        for (int i = 0; ada_thread() < TILE && i < TILE; i++) *mass += weights[i * LD + ada_thread()];
        ADA_UNROLL for (int c = 0; c < PIECES; c++) add_columns(
            out[c], TILE, [&](int i, int row) { return weights[i * LD + row]; },
            [&](int i, int e) {
                return j + i < end && TILE * c + e < p.E ? element_of(p, p.value, s.b, g, j + i, TILE * c + e)
                                                         : 0;
            });
    }
}

/* A row's end; far: what of its mass landmarks say, of this share of the keys. Returns its estimate. */
ADA_DEVICE float end_row(const Args &a, const Head &head, Row *row, int t, float square, float far,
                         float share) {
    const ada_cu_params &p = a.p;
    const float keys = (float)(head.end - head.first), own = expf(row->own);
    const float residual = fmaxf(own - square, ADA_LEAST_RESIDUAL * own);
    const float rest = share > 0 ? share * residual / (row->mass * row->mass) : 0;
    /* Scores of all centred keys have a mean of zero, so their exponentials one of at least one. */
    const bool trusted = share == 0 || (far > (head.whole ? keys / 2 : 0) && far < ADA_INF);
    const ada_row_end end = ada_end_row(p, head.head % p.H, row->shift * (float)(p.scale * ADA_LOG2E),
                                        row->mass, row->end > head.first);
    row->factor = end.factor;
    row->exact |= !trusted || rest > head.limit || !end.good;
    if (!row->exact) ada_store_lse(p, (int64_t)head.head * p.T + t, end.lse);
    return head.gain * rest;
}

template <int PIECES> ADA_DEVICE void attend_tile(const Args &a, int n, int t0) {
    const ada_cu_params &p = a.p;
    const int thread = ada_thread();
    const Head head = a.heads[n];
    const int b = head.head / p.H, h = head.head % p.H, t = t0 + thread;
    const int last = t0 + TILE < p.T ? t0 + TILE - 1 : p.T - 1;
    const ada_sequence sequence = ada_sequence_of(p, b);
    const int seen = ada_visible(p, sequence, t0).end - head.first;
    const int chunks = head.whole ? head.chunks : seen > 0 ? seen / ADA_CUDA_BIN : 0;
    const int far_end = head.whole ? head.end : head.first + chunks * ADA_CUDA_BIN;
    Row *const rows = ada_shared_at<Row>(ROWS_AT);
    const int slot = chunks - 1 - (head.chunks - head.kept);
    float *const factors = a.memory + a.factors + ada_block() * (int64_t)a.most_ranks * TILE * TILE;
    Tile out[PIECES];
    ADA_UNROLL for (int c = 0; c < PIECES; c++) clear(out[c]);
    load_rows(a, head, sequence, t0);
    attend_far<PIECES>(a, head, sequence, t0, slot, factors, out);
    float square = 0, mass = 0;
    if (thread < TILE) {
        const float *masses =
            a.memory + head.values + (int64_t)head.kept * head.rank * p.E + slot * head.rank;
        for (int l = 0; l < head.rank; l++) {
            const float f = factors[l * TILE + thread];
            square += f * f;
            if (chunks) mass += f * masses[l];
        }
    }
    const float far = mass;
    attend_near<PIECES>(a, head, sequence, t0, far_end, ada_visible(p, sequence, last).end, &mass, out);
    ada_sync();
    float estimate = 0;
    if (thread < TILE && t < p.T) {
        rows[thread].mass = mass;
        estimate = end_row(a, head, &rows[thread], t, square, far,
                           (float)(far_end - head.first) / (float)(head.end - head.first));
    }
    ada_sync();
    ADA_UNROLL for (int i = 0; i < 4; i++) {
        const int row = thread / 16 * 4 + i;
        const bool given = t0 + row < p.T && !rows[row].exact;
        char *const to = given ? ada_out_row(p, b, h, t0 + row) : NULL;
        float bad = 0;
        ADA_UNROLL for (int c = 0; c < PIECES; c++) ADA_UNROLL for (int j = 0; j < 4; j++) {
            const int e = TILE * c + thread % 16 * 4 + j;
            const float x = rows[row].factor == 0 ? 0 : out[c][i][j] * rows[row].factor;
            if (e >= p.E || !given) continue;
            bad += x * 0;
            ada_store_element(to + e * p.out.stride[3], p.dtype, x);
        }
        if (!(bad == 0)) rows[row].own = ADA_NAN; /* by any of its threads */
    }
    ada_sync();
    if (thread < TILE && t < p.T)
        a.shift2[(int64_t)n * p.T + t] =
            rows[thread].exact || !(rows[thread].own == rows[thread].own) ? -1 : estimate;
}

/* Each block takes tile after tile. */
template <int PIECES> ADA_KERNEL(THREADS, 2) attend_tiles(ADA_ARGS(Args) a) {
    ADA_UNROLL_NOT for (int64_t i = ada_block(); i < (int64_t)a.n * a.tiles; i += ada_blocks()) {
        attend_tile<PIECES>(a, (int)(i / a.tiles), (int)(i % a.tiles) * TILE);
        ada_sync(); /* what is known of its rows has been read */
    }
}

/* ---- the host's side ---- */

/* Where a head's floats lie: those that the host sends, and those that are made, each behind those before. */
void place(const ada_cu_params &p, const ada_cuda_landmarks &x, Head *head, int64_t *sent, int64_t *made) {
    const int64_t R = x.rank, keys = x.end - x.first;
    *head = {};
    head->head = (int32_t)x.head, head->first = (int32_t)x.first, head->end = (int32_t)x.end;
    head->rank = x.rank, head->whole = x.whole;
    head->chunks = (int32_t)(x.whole ? ada_divide_up(keys, ADA_CUDA_BIN) : keys / ADA_CUDA_BIN);
    head->query_factor = (float)x.query_factor, head->key_factor = (float)x.key_factor;
    head->gain = (float)x.gain, head->limit = (float)x.limit;
    head->mean = *sent, head->point = head->mean + p.D, head->basis = head->point + R * p.D;
    *sent = head->basis + R * R;
    head->kept = x.whole ? 1 : head->chunks;
    head->sums = *made, head->values = head->sums + head->chunks * R * (p.E + 1);
    *made = head->values + head->kept * R * (p.E + 1);
}

/* That attend to tiles: as many as there are at a time. */
int64_t blocks_of(const Args &a) {
    const int64_t most = 2 * (int64_t)a.p.multiprocessors, tiles = (int64_t)a.n * a.tiles;
    return tiles < most ? tiles : most;
}

template <int PIECES> cudaError_t launch(const Args &a, cudaStream_t stream) {
    const int shared = ROWS_AT + TILE * (int)sizeof(Row);
    const int64_t chunks = (int64_t)a.n * a.most_chunks * a.most_ranks;
    const int64_t columns = ada_divide_up((int64_t)a.most_ranks * TILE * (a.p.E + 1), THREADS);
    cudaError_t error = cudaSuccess;
    if (chunks) {
        error = ada_launch(sum_values<PIECES>, chunks, THREADS, shared, stream, a);
        if (!error) error = ada_launch(add_chunks, a.n * columns, THREADS, 0, stream, a);
        if (!error)
            error =
                ada_launch(project_values, chunks * ada_divide_up(a.p.E, TILE), THREADS, shared, stream, a);
    }
    return error ? error : ada_launch(attend_tiles<PIECES>, blocks_of(a), THREADS, shared, stream, a);
}

/* The first of these heads, at most n, that fit together; *done: how many. */
int attend_some(const ada_cuda_call *call, const ada_cuda_landmarks *given, int64_t n, float *shift2,
                int64_t *done, ada_cuda_failure *failure) {
    Args a = {};
    a.p = call->params;
    a.tiles = (int32_t)ada_divide_up(a.p.T, TILE);
    int64_t sent = 0, made = 0, count = 0;
    for (Head head; count < n; count++) {
        int64_t more = sent, all = made;
        place(a.p, given[count], &head, &more, &all);
        if (count && (size_t)(more + all) * sizeof(float) > MOST_MEMORY) break;
        sent = more, made = all;
        const int32_t ranks = (int32_t)ada_divide_up(given[count].rank, TILE);
        a.most_ranks = ranks > a.most_ranks ? ranks : a.most_ranks;
        a.most_chunks = head.chunks > a.most_chunks ? head.chunks : a.most_chunks;
    }
    *done = count, a.n = (int32_t)count;
    /* What the host says: its floats, then the heads. */
    const int64_t heads_at = ada_divide_up(sent, 4) * 4 * (int64_t)sizeof(float);
    const int64_t told_bytes = heads_at + count * (int64_t)sizeof(Head);
    const int64_t made_at = ada_divide_up(told_bytes, 256) * 256 / (int64_t)sizeof(float);
    a.factors = ada_divide_up(made_at + made, 4) * 4; /* that lie together in fours */
    const int64_t floats = a.factors + blocks_of(a) * a.most_ranks * TILE * TILE;
    Memory memory(call->stream), shifts(call->stream);
    TRY(memory.allocate((size_t)floats * sizeof(float)));
    TRY(shifts.allocate((size_t)(count * a.p.T) * sizeof(float)));
    char *const told = (char *)calloc(1, (size_t)told_bytes);
    if (!told) return failed(cudaErrorMemoryAllocation, "calloc", failure);
    int64_t at = 0, place_at = made_at;
    for (int64_t i = 0; i < count; i++) {
        const ada_cuda_landmarks &x = given[i];
        Head *const head = (Head *)(told + heads_at) + i;
        float *const to = (float *)told;
        place(a.p, x, head, &at, &place_at);
        memcpy(to + head->mean, x.mean, (size_t)a.p.D * sizeof *to);
        memcpy(to + head->point, x.point, (size_t)(x.rank * a.p.D) * sizeof *to);
        memcpy(to + head->basis, x.basis, (size_t)x.rank * (size_t)x.rank * sizeof *to);
    }
    const int status =
        upload(call->problem.device, call->problem.stream, memory.data, told, told_bytes, failure);
    free(told);
    if (status) return status;
    a.memory = (float *)memory.data, a.shift2 = (float *)shifts.data;
    a.heads = (const Head *)((char *)memory.data + heads_at);
    TRY(a.p.E <= 64    ? launch<1>(a, call->stream)
        : a.p.E <= 128 ? launch<2>(a, call->stream)
                       : launch<4>(a, call->stream));
    return fetch(call->stream, shift2, shifts.data, (size_t)(count * a.p.T) * sizeof(float), failure);
}

} // namespace

int execute_low_rank(ada_cuda_call *call, const ada_cuda_landmarks *heads, int64_t n, float *shift2,
                     ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    for (int64_t done = 0, now; done < n; done += now)
        if (attend_some(call, heads + done, n - done, shift2 + done * call->problem.T, &now, failure))
            return failure->code;
    return 0;
}

int execute_rows(ada_cuda_call *call, const ada_cuda_row *rows, int64_t n, ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    const int64_t numbers = ADA_AGAIN_LIST + n, bytes = (numbers * 4 + 7) / 8 * 8;
    Memory memory(call->stream);
    TRY(memory.allocate((size_t)(2 * bytes)));
    int32_t *const list = (int32_t *)calloc(1, (size_t)bytes);
    if (!list) return failed(cudaErrorMemoryAllocation, "calloc", failure);
    list[0] = (int32_t)n;
    for (int64_t i = 0; i < n; i++)
        list[ADA_AGAIN_LIST + i] = (int32_t)(rows[i].head * call->problem.T + rows[i].row);
    const int status = upload(call->problem.device, call->problem.stream, memory.data, list, bytes, failure);
    free(list);
    if (status) return status;
    TRY(ada_cu_attend_rows(&call->params, (const int32_t *)memory.data, (int32_t)n,
                           (int32_t *)((char *)memory.data + bytes), call->stream));
    return 0;
}

double plain_operations(const ada_cuda_call *call) {
    /* Two for each of 64 or, of other chips, 128 lanes at about 1.7 GHz. */
    const double lanes = call->params.capability == 80 ? 64 : 128;
    return 2 * lanes * 1.7e9 * call->params.multiprocessors;
}

} // namespace ada_cuda
