/* Lists of blocks of keys, by bounds that hold whatever the keys are.
 *
 * With a block's centre c and its radius r no score of a query q is above q c + |q| r, and a row's sum is at
 * least what the mean of one of its blocks says, by Jensen's inequality, or the score of one key. Blocks have
 * as many keys each. One is left out of a tile where that proves for every row of it that all blocks which
 * are left out weigh too little together. Blocks that a row sees in part, and those with a number that is not
 * finite, stay.
 *
 * Centres are rounded to bf16 before radii are measured, so that tensor cores multiply what the radii are
 * about; what rounding takes from queries is measured, and the roundings of sums are far below SLACK.
 */
#include "lists.h"
#include "k1.cuh"

namespace {

enum { THREADS = 128, WARPS = THREADS / 32, ROWS = 64, BLOCK = ADA_LIST_BLOCK };
#define ADA_SLACK 0.000244140625f /* of the product of two norms */
#define ADA_KEYS_OF_BLOCK 6       /* octaves */

/* NaN wins. */
ADA_DEVICE float larger(float x, float y) { return !(x <= y) ? x : y; }

/* The key head of the n-th listed one; -1: that before has the same. */
ADA_DEVICE int key_head_of(const ada_lists_args &a, int n) {
    const int per = a.p.H / a.p.G, head = a.heads[n].head / per;
    return n > 0 && a.heads[n - 1].head / per == head ? -1 : head;
}

/* A block of keys by one of threads. */
ADA_KERNEL(THREADS, 1) sum_up_blocks(ADA_ARGS(ada_lists_args) a) {
    const ada_cu_params &p = a.p;
    const int block = ada_block() % a.blocks, head = key_head_of(a, ada_block() / a.blocks);
    if (head < 0) return;
    const int b = head / p.G, g = head % p.G, first = block * BLOCK, lane = ada_thread() % 32,
              warp = ada_thread() / 32;
    const int left = ada_sequence_of(p, b).keys - first, count = left < BLOCK ? left : BLOCK;
    const char *keys =
        (const char *)p.key.data + b * p.key.stride[0] + g * p.key.stride[1] + first * p.key.stride[2];
    const char *values = (const char *)p.value.data + b * p.value.stride[0] + g * p.value.stride[1] +
                         first * p.value.stride[2];
    uint16_t *const to = a.centres + ((int64_t)head * a.blocks + block) * a.chunks * 8;
    float *const centre = ada_shared_at<float>(0);                     /* [8 * chunks] */
    float *const each = ada_shared_at<float>(32 * (uint32_t)a.chunks); /* [WARPS][5] */
    float drift2 = 0, size2 = 0, reach2 = 0, most2 = 0, value2 = 0;
    for (int d = ada_thread(); d < 8 * a.chunks; d += THREADS) {
        float sum = 0;
        const char *at = keys + d * p.key.stride[3];
        for (int j = 0; j < BLOCK && d < p.D && count == BLOCK; j++, at += p.key.stride[2])
            sum += ada_element<float>(at, p.dtype);
        const float mean = sum / BLOCK;
        const uint16_t rounded = (uint16_t)ada_pack_bf16(mean, 0);
        const float c = ada_from_bf16(rounded);
        to[d] = rounded, centre[d] = c;
        drift2 += (mean - c) * (mean - c), size2 += c * c;
    }
    ada_sync();
    for (int j = warp; j < count; j += WARPS) {
        float apart2 = 0, norm2 = 0;
        for (int d = lane; d < p.D && count == BLOCK; d += 32) {
            const float x =
                ada_element<float>(keys + j * p.key.stride[2] + d * p.key.stride[3], p.dtype) - centre[d];
            apart2 += x * x;
        }
        for (int e = lane; e < p.E; e += 32) {
            const float x =
                ada_element<float>(values + j * p.value.stride[2] + e * p.value.stride[3], p.dtype);
            norm2 += x * x;
        }
        apart2 = ada_sum_of_warp(apart2), norm2 = ada_sum_of_warp(norm2);
        const bool finite = norm2 < ADA_INF;
        reach2 = larger(finite ? apart2 : ADA_INF, reach2);
        if (finite) most2 = fmaxf(most2, norm2), value2 += norm2;
    }
    drift2 = ada_sum_of_warp(drift2), size2 = ada_sum_of_warp(size2);
    if (lane == 0) {
        float *own = each + 5 * warp;
        own[0] = drift2, own[1] = size2, own[2] = reach2, own[3] = most2, own[4] = value2;
    }
    ada_sync();
    if (ada_thread()) return;
    for (int w = 1; w < WARPS; w++) {
        const float *other = each + 5 * w;
        drift2 += other[0], size2 += other[1], value2 += other[4];
        reach2 = larger(other[2], reach2), most2 = fmaxf(most2, other[3]);
    }
    const bool good = count == BLOCK && reach2 < ADA_INF && size2 < ADA_INF;
    a.figures[(int64_t)head * a.blocks + block] = {good ? 1.0001f * sqrtf(reach2) : ADA_INF, sqrtf(drift2),
                                                   sqrtf(size2), sqrtf(most2), value2};
}

/* A key head by one warp. */
ADA_KERNEL(32, 1) merge_values(ADA_ARGS(ada_lists_args) a) {
    const int head = key_head_of(a, ada_block());
    if (head < 0) return;
    const int keys = ada_sequence_of(a.p, head / a.p.G).keys;
    float most = 0, sum = 0;
    for (int i = ada_thread(); i < a.blocks; i += 32) {
        const ada_block_figures f = a.figures[(int64_t)head * a.blocks + i];
        most = fmaxf(most, f.value_most), sum += f.value2 / (float)(keys > 0 ? keys : 1);
    }
    sum = ada_sum_of_warp(sum);
    for (int lanes = 16; lanes; lanes /= 2) most = fmaxf(most, ada_shuffle_xor(most, lanes));
    if (ada_thread() == 0) a.values[head] = {most, sqrtf(sum)};
}

/* Of a row of queries, norms and scores times the scale, in octaves. */
typedef struct {
    float norm, rest; /* of the query, and of what rounding takes from it */
    float floor;      /* of its sum, in blocks of keys with that score */
    ada_span span;
} row_facts;

template <int W> struct listing {
    typedef ada_tiling<true, W, 4, 1, 1, BLOCK, false, false, 2> tiling;
    static constexpr int CENTRES_AT = tiling::Q_PART, ROWS_AT = CENTRES_AT + tiling::K_PART;
    static constexpr int FIGURES_AT = ROWS_AT + ROWS * (int)sizeof(row_facts);
    static constexpr int COUNTS_AT = FIGURES_AT + BLOCK * (int)sizeof(ada_block_figures);
    static constexpr int KEPT_AT = COUNTS_AT + THREADS * 4; /* a byte for each block that a tile sees */
};

/* Rows of queries from one on, rounded, and what is known of them. */
template <int W>
ADA_DEVICE void load_queries(const ada_lists_args &a, const ada_sequence &s, int h, int first, int end) {
    const char *const keys =
        (const char *)a.p.key.data + s.b * a.p.key.stride[0] + h / (a.p.H / a.p.G) * a.p.key.stride[1];
    typedef listing<W> L;
    typedef typename L::tiling::QK Q;
    const ada_cu_params &p = a.p;
    const float octaves = 1.0001f * fabsf((float)(p.scale * ADA_LOG2E));
    const int lane = ada_thread() % 32;
    for (int row = ada_thread() / 32; row < ROWS; row += WARPS) {
        const int t = first + row;
        const char *at = (const char *)p.query.data + s.b * p.query.stride[0] + h * p.query.stride[1] +
                         t * p.query.stride[2];
        const ada_span span = t < end ? ada_visible(p, s, t) : ada_span{0, 0};
        float norm2 = 0, rest2 = 0, score[2] = {0, 0}, key2[2] = {0, 0};
        for (int d = lane; d < W; d += 32) {
            const float x = t < end && d < p.D ? ada_element<float>(at + d * p.query.stride[3], p.dtype) : 0;
            const uint16_t rounded = (uint16_t)ada_pack_bf16(x, 0);
            const float rest = x - ada_from_bf16(rounded);
            *ada_shared_at<uint16_t>(ada_place<Q>(row, d / 8) + (uint32_t)(d % 8 * 2)) = rounded;
            norm2 += x * x, rest2 += rest * rest;
            /* The first and the last key that the row sees: many look at themselves, or at the beginning. */
            ADA_UNROLL for (int i = 0; i < 2; i++) {
                if (span.first >= span.end || d >= p.D) continue;
                const float k = ada_element<float>(
                    keys + (i ? span.end - 1 : span.first) * p.key.stride[2] + d * p.key.stride[3], p.dtype);
                score[i] += x * k, key2[i] += k * k;
            }
        }
        norm2 = ada_sum_of_warp(norm2), rest2 = ada_sum_of_warp(rest2);
        float floor = -ADA_INF;
        ADA_UNROLL for (int i = 0; i < 2; i++) {
            const float dot = ada_sum_of_warp(score[i]) * (float)(p.scale * ADA_LOG2E);
            const float slack = ADA_SLACK * sqrtf(norm2 * ada_sum_of_warp(key2[i])) * octaves;
            if (span.first < span.end) floor = fmaxf(floor, dot - slack - ADA_KEYS_OF_BLOCK);
        }
        if (lane == 0)
            ada_shared_at<row_facts>(L::ROWS_AT)[row] = {sqrtf(norm2) * octaves, sqrtf(rest2) * octaves,
                                                         floor, span};
    }
}

/* Scores of the rows at hand with centres from one on, raw, and these blocks' figures. */
template <int W>
ADA_DEVICE void score_centres(const ada_lists_args &a, int head, int first, int end,
                              float (&s)[1][BLOCK / 8][4]) {
    typedef listing<W> L;
    typedef typename L::tiling X;
    const int lane = ada_thread() % 32, warp = ada_thread() / 32;
    ada_sync(); /* those before have been read */
    ada_copy_part<X, typename X::QK>((uint32_t)(ada_shared() + L::CENTRES_AT),
                                     (const char *)(a.centres + (int64_t)head * a.blocks * a.chunks * 8),
                                     16 * a.chunks, first, ada_span{first, end}, 16 * a.chunks);
    ada_copy_commit();
    for (int i = ada_thread(); i < BLOCK && first + i < end; i += THREADS)
        ada_shared_at<ada_block_figures>(L::FIGURES_AT)[i] = a.figures[(int64_t)head * a.blocks + first + i];
    ada_copy_wait<0>();
    ada_sync();
    ada_scores<X>(s, ada_shared() + ada_place<typename X::QK>(16 * warp + lane % 16, lane / 16),
                  ada_shared() + L::CENTRES_AT + ada_place<typename X::QK>(lane % 16, lane / 16));
}

/* A tile of queries. */
template <int W> ADA_DEVICE void list_tile(const ada_lists_args &a) {
    typedef listing<W> L;
    const ada_cu_params &p = a.p;
    const int n = ada_block() / a.looked, look = ada_block() % a.looked;
    /* One in each part of them, here and there, as what they look at may have a period. */
    const int part = a.tiles / a.looked;
    const int tile = (int)((int64_t)look * a.tiles / a.looked) + (5 * look + 2) % part;
    const ada_thin_head own = a.heads[n];
    const int b = own.head / p.H, h = own.head % p.H, key_head = b * p.G + h / (p.H / p.G);
    const int first = tile * a.rows, rows_end = first + a.rows < p.T ? first + a.rows : p.T;
    const ada_sequence sequence = ada_sequence_of(p, b);
    const int begin = ada_visible(p, sequence, first).first / BLOCK;
    const int last = ada_visible(p, sequence, rows_end - 1).end, stop = (last + BLOCK - 1) / BLOCK;
    const int end = stop > begin ? stop : begin, thread = ada_thread(), lane = thread % 32;
    const ada_value_figures values = a.values[key_head];
    /* Two outputs that are means of values lie no further apart than twice the largest of these. */
    const float moves = own.absolute + own.relative * values.rms;
    const float share = fminf(own.most, moves / (2 * values.most)) / (float)(end - begin);
    const float above = log2f(share); /* NaN keeps all */
    const float octaves = (float)(p.scale * ADA_LOG2E);
    uint8_t *const kept = ada_shared_at<uint8_t>(L::KEPT_AT);
    for (int i = thread; i < end - begin; i += THREADS) kept[i] = 0;

    for (int at = first; at < rows_end; at += ROWS) {
        float s[1][BLOCK / 8][4], floors[2];
        ada_sync();
        load_queries<W>(a, sequence, h, at, rows_end);
        const row_facts *const facts = ada_shared_at<row_facts>(L::ROWS_AT) + thread / 32 * 16 + lane / 4;
        ada_sync();
        floors[0] = facts[0].floor, floors[1] = facts[8].floor;
        for (int turn = 0; turn < 2; turn++) /* rows' floors, then whom they keep */
            for (int j = begin; j < end; j += BLOCK) {
                score_centres<W>(a, key_head, j, end, s);
                ADA_UNROLL for (int i = 0; i < BLOCK / 8; i++) ADA_UNROLL for (int c = 0; c < 4; c++) {
                    const int half = c / 2, at_block = 8 * i + lane % 4 * 2 + c % 2, block = j + at_block;
                    if (block >= end) continue;
                    const ada_block_figures f = ada_shared_at<ada_block_figures>(L::FIGURES_AT)[at_block];
                    const row_facts r = facts[8 * half];
                    const int64_t low = (int64_t)block * BLOCK, high = low + BLOCK;
                    if (low >= r.span.end || high <= r.span.first) continue;
                    const bool whole = low >= r.span.first && high <= r.span.end && f.reach < ADA_INF;
                    const float score = s[0][i][c] * octaves,
                                slack = r.rest * f.size + ADA_SLACK * r.norm * f.size;
                    if (turn == 0) {
                        if (whole) floors[half] = fmaxf(floors[half], score - r.norm * f.drift - slack);
                    } else {
                        const float most = score + r.norm * f.reach + slack;
                        if (!(whole && most - floors[half] <= above)) kept[block - begin] = 1;
                    }
                }
                if (turn == 0 && j + BLOCK >= end)
                    for (int half = 0; half < 2; half++)
                        for (int lanes = 1; lanes < 4; lanes *= 2)
                            floors[half] = fmaxf(floors[half], ada_shuffle_xor(floors[half], lanes));
            }
    }

    /* Each thread lists a part of them, behind those of the threads before it. */
    ada_sync();
    const int each = (end - begin + THREADS - 1) / THREADS, low = begin + thread * each,
              high = low + each < end ? low + each : end;
    int32_t *const counts = ada_shared_at<int32_t>(L::COUNTS_AT), count = 0;
    for (int j = low; j < high; j++) count += kept[j - begin];
    counts[thread] = count;
    ada_sync();
    int before = 0, all = 0;
    for (int i = 0; i < THREADS; i++) before += i < thread ? counts[i] : 0, all += counts[i];
    if (thread == 0) {
        int32_t *const to = a.counts + 3 * ((int64_t)n * a.looked + look);
        to[0] = all, to[1] = begin, to[2] = end;
    }
    if (!a.lists) return;
    int32_t *const list = a.lists + ((int64_t)n * a.tiles + tile) * (1 + a.blocks);
    if (thread == 0) list[0] = all;
    for (int j = low; j < high; j++)
        if (kept[j - begin]) list[1 + before++] = j;
}

template <int W> ADA_KERNEL(THREADS, 2) list_blocks(ADA_ARGS(ada_lists_args) a) { list_tile<W>(a); }

template <int W> cudaError_t run(const ada_lists_args &a, cudaStream_t stream) {
    return ada_launch(list_blocks<W>, (int64_t)a.n * a.looked, THREADS, listing<W>::KEPT_AT + a.blocks,
                      stream, a);
}

} // namespace

cudaError_t ada_lists_run(const ada_lists_args *args, cudaStream_t stream) {
    const ada_lists_args &a = *args;
    cudaError_t error =
        ada_launch(sum_up_blocks, (int64_t)a.n * a.blocks, THREADS, 32 * a.chunks + WARPS * 5 * 4, stream, a);
    if (!error) error = ada_launch(merge_values, a.n, 32, 0, stream, a);
    if (error) return error;
    return a.p.D <= 64 ? run<64>(a, stream) : run<128>(a, stream);
}
