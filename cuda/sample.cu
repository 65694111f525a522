/* What landmarks are chosen from (csrc/landmarks.h): of a head's keys the mean, the furthest ones and a
 * sample, with values and some queries. Every sum has one order.
 */
#include "host.h"

#include <memory>

namespace ada_cuda {

namespace {

enum { THREADS = 128, WARPS = THREADS / 32, CHUNK = 256 /* keys of a block */, FAR = ADA_CUDA_FAR };

struct Head {
    int32_t head, first, end, n_keys;
};

/* What is known of a chunk, in floats behind the sums of its D columns. */
enum { SPREAD, VALUE2, VALUE_MOST2, FAR2, FAR_KEYS = FAR2 + FAR /* int32_t */, KNOWN = FAR_KEYS + FAR };

struct Sampling {
    ada_cu_params p;
    ada_cuda_sample_at at;
    const Head *heads;
    const int32_t *keys, *queries; /* [n][most_keys], [n_queries] */
    int32_t most_keys, n_queries, step, measured, chunks;
    int32_t blocks;  /* of a head, that gather */
    float *partials; /* [n][chunks][D + KNOWN] */
    float *to;       /* [n] as at says */
};

/* Of the key head of a head. */
ADA_DEVICE const char *key_row(const Sampling &a, const ada_cu_array &x, const Head &head, int64_t i) {
    return ada_row_of(x, head.head / a.p.H, head.head % a.p.H / (a.p.H / a.p.G), i);
}
ADA_DEVICE float *partial_of(const Sampling &a, int head, int chunk) {
    return a.partials + ((int64_t)head * a.chunks + chunk) * (a.p.D + KNOWN);
}
ADA_DEVICE int chunks_of(const Head &head) { return (head.end - head.first + CHUNK - 1) / CHUNK; }

/* Keys of this block: a part of a head's. */
struct Part {
    Head head;
    int n, chunk, first, end;
};

ADA_DEVICE Part part_here(const Sampling &a) {
    Part x;
    x.n = ada_block() / a.chunks, x.chunk = ada_block() % a.chunks;
    x.head = a.heads[x.n];
    x.first = x.head.first + x.chunk * CHUNK, x.end = x.first + CHUNK;
    x.end = x.end < x.head.end ? x.end : x.head.end;
    return x;
}

ADA_DEVICE float squared_norm(const char *row, int64_t stride, int dtype, int width) {
    float sum = 0;
    for (int d = ada_thread() % 32; d < width; d += 32) {
        const float x = ada_element<float>(row + d * stride, dtype);
        sum += x * x;
    }
    return ada_sum_of_warp(sum);
}

/* A warp per key: sums of columns, and of values squared norms. */
ADA_KERNEL(THREADS, 4) sum_keys(ADA_ARGS(Sampling) a) {
    enum { MOST = ADA_CU_MAX_HEAD / 32 };
    const ada_cu_params &p = a.p;
    const Part x = part_here(a);
    if (x.first >= x.end) return;
    const int lane = ada_thread() % 32, warp = ada_thread() / 32;
    float *const columns = ada_shared_at<float>(0), *const values = columns + WARPS * p.D;
    float sums[MOST] = {0}, value2 = 0, most2 = 0;
    for (int j = x.first + warp; j < x.end; j += WARPS) {
        const char *key = key_row(a, p.key, x.head, j);
        ADA_UNROLL for (int i = 0; i < MOST; i++) {
            const int d = lane + 32 * i;
            if (d < p.D) sums[i] += ada_element<float>(key + d * p.key.stride[3], p.dtype);
        }
        const float norm2 = squared_norm(key_row(a, p.value, x.head, j), p.value.stride[3], p.dtype, p.E);
        value2 += norm2, most2 = fmaxf(most2, norm2);
    }
    ADA_UNROLL for (int i = 0; i < MOST; i++) if (lane + 32 * i < p.D) columns[warp * p.D + lane + 32 * i] =
        sums[i];
    if (lane == 0) values[2 * warp] = value2, values[2 * warp + 1] = most2;
    ada_sync();
    float *const to = partial_of(a, x.n, x.chunk);
    for (int d = ada_thread(); d < p.D; d += THREADS) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += columns[w * p.D + d];
        to[d] = sum;
    }
    if (ada_thread()) return;
    for (int w = 1; w < WARPS; w++) value2 += values[2 * w], most2 = fmaxf(most2, values[2 * w + 1]);
    to[p.D + VALUE2] = value2, to[p.D + VALUE_MOST2] = most2;
}

/* Distances from the mean; those of the furthest keys of a chunk in descending order. */
ADA_KERNEL(THREADS, 4) measure_keys(ADA_ARGS(Sampling) a) {
    const ada_cu_params &p = a.p;
    const Part x = part_here(a);
    if (x.first >= x.end) return;
    const int lane = ada_thread() % 32, warp = ada_thread() / 32, chunks = chunks_of(x.head),
              count = x.end - x.first;
    float *const apart2 = ada_shared_at<float>(0), *const mean = apart2 + CHUNK; /* [CHUNK], [D] */
    for (int d = ada_thread(); d < p.D; d += THREADS) {
        float sum = 0;
        ADA_UNROLL_BY(8) for (int c = 0; c < chunks; c++) sum += partial_of(a, x.n, c)[d];
        mean[d] = sum / (float)(x.head.end - x.head.first);
        if (x.chunk == 0) a.to[x.n * a.at.floats + a.at.mean + d] = mean[d];
    }
    ada_sync();
    for (int i = warp; i < count; i += WARPS) {
        const char *key = key_row(a, p.key, x.head, x.first + i);
        float sum = 0;
        for (int d = lane; d < p.D; d += 32) {
            const float y = ada_element<float>(key + d * p.key.stride[3], p.dtype) - mean[d];
            sum += y * y;
        }
        sum = ada_sum_of_warp(sum);
        if (lane == 0) apart2[i] = sum;
    }
    ada_sync();
    float *const to = partial_of(a, x.n, x.chunk) + p.D;
    for (int i = ada_thread(); i < count || i < FAR; i += THREADS) {
        int rank = i;
        if (i < count) {
            rank = 0;
            for (int j = 0; j < count; j++)
                rank += apart2[j] > apart2[i] || (apart2[j] == apart2[i] && j < i);
        }
        if (rank >= FAR) continue;
        to[FAR2 + rank] = i < count ? apart2[i] : -1;
        ((int32_t *)to)[FAR_KEYS + rank] = i < count ? x.first + i : -1;
    }
    if (ada_thread()) return;
    float sum = 0;
    for (int i = 0; i < count; i++) sum += apart2[i];
    to[SPREAD] = sum;
}

/* What chunks know of a head together: of the furthest keys each round takes the first one that is left. */
ADA_KERNEL(THREADS, 1) merge_chunks(ADA_ARGS(Sampling) a) {
    struct Best {
        float most;
        int32_t chunk;
    };
    const ada_cu_params &p = a.p;
    const int n = ada_block(), thread = ada_thread(), chunks = chunks_of(a.heads[n]);
    float *const to = a.to + n * a.at.floats;
    Best *const bests = ada_shared_at<Best>(0);                               /* [WARPS] */
    uint8_t *const taken = ada_shared_at<uint8_t>(WARPS * (int)sizeof(Best)); /* [chunks] of each */
    for (int c = thread; c < chunks; c += THREADS) taken[c] = 0;
    for (int i = 0; i < FAR; i++) {
        Best own = {-1, -1};
        for (int c = thread; c < chunks; c += THREADS) {
            const float most = taken[c] < FAR ? partial_of(a, n, c)[p.D + FAR2 + taken[c]] : -1;
            if (most > own.most) own.most = most, own.chunk = c;
        }
        for (int lanes = 16; lanes; lanes /= 2) {
            const float most = ada_shuffle_xor(own.most, lanes);
            const int32_t chunk = ada_shuffle_xor(own.chunk, lanes);
            if (most > own.most || (most == own.most && chunk < own.chunk))
                own.most = most, own.chunk = chunk;
        }
        if (thread % 32 == 0) bests[thread / 32] = own;
        ada_sync();
        for (int w = 0; w < WARPS; w++) {
            const Best other = bests[w];
            if (other.most > own.most || (other.most == own.most && other.chunk < own.chunk)) own = other;
        }
        ada_sync();
        if (thread == own.chunk % THREADS || (own.chunk < 0 && thread == 0)) {
            int32_t key = -1;
            if (own.chunk >= 0)
                key = ((const int32_t *)partial_of(a, n, own.chunk))[p.D + FAR_KEYS + taken[own.chunk]++];
            to[a.at.far2 + i] = own.most, ((int32_t *)to)[a.at.far + i] = key;
        }
    }
    if (thread) return;
    float spread = 0, value2 = 0, most2 = 0;
    for (int c = 0; c < chunks; c++) {
        const float *from = partial_of(a, n, c) + p.D;
        spread += from[SPREAD], value2 += from[VALUE2], most2 = fmaxf(most2, from[VALUE_MOST2]);
    }
    to[a.at.spread] = spread, to[a.at.value2] = value2, to[a.at.value2 + 1] = most2;
}

ADA_DEVICE void copy_row(float *to, const char *from, int64_t stride, int dtype, int width) {
    for (int i = ada_thread(); i < width; i += THREADS) to[i] = ada_element<float>(from + i * stride, dtype);
}

ADA_DEVICE void copy_key(const Sampling &a, const Head &head, float *to, int at, int key) {
    copy_row(to + a.at.keys + at * a.p.D, key_row(a, a.p.key, head, key), a.p.key.stride[3], a.p.dtype,
             a.p.D);
}

/* Rows of a head: sampled keys, the furthest ones, queries; norms of other queries, a warp each. */
ADA_KERNEL(THREADS, 1) gather_sample(ADA_ARGS(Sampling) a) {
    const ada_cu_params &p = a.p;
    const int n = ada_block() / a.blocks;
    int i = ada_block() % a.blocks;
    const Head head = a.heads[n];
    const int b = head.head / p.H, h = head.head % p.H;
    float *const to = a.to + n * a.at.floats;
    if (i < a.most_keys) {
        if (i >= head.n_keys) return;
        const int key = a.keys[n * a.most_keys + i];
        copy_key(a, head, to, i, key);
        copy_row(to + a.at.values + i * p.E, key_row(a, p.value, head, key), p.value.stride[3], p.dtype, p.E);
    } else if ((i -= a.most_keys) < FAR) {
        const int key = ((const int32_t *)to)[a.at.far + i];
        if (key >= 0) copy_key(a, head, to, head.n_keys + i, key);
    } else if ((i -= FAR) < a.n_queries) {
        copy_row(to + a.at.queries + i * p.D, ada_row_of(p.query, b, h, a.queries[i]), p.query.stride[3],
                 p.dtype, p.D);
    } else {
        const int query = (i - a.n_queries) * WARPS + ada_thread() / 32;
        if (query >= a.measured) return;
        const float norm2 =
            squared_norm(ada_row_of(p.query, b, h, (int64_t)query * a.step), p.query.stride[3], p.dtype, p.D);
        if (ada_thread() % 32 == 0) to[a.at.query2 + query] = norm2;
    }
}

} // namespace

int take_sample(ada_cuda_call *call, const ada_cuda_sampled *heads, int64_t n, const ada_cuda_sampling *what,
                float *to, ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    const uintptr_t stream = call->problem.stream;
    Sampling a = {};
    a.p = call->params, a.at = ada_cuda_sample_layout(call->problem.D, call->problem.E, what);
    a.most_keys = (int32_t)what->keys, a.n_queries = (int32_t)what->queries, a.step = (int32_t)what->step;
    a.measured = (int32_t)what->measured;
    a.chunks = 1;
    /* Heads, keys, queries: one behind another. */
    const size_t keys_at = (size_t)n * sizeof(Head), queries_at = keys_at + (size_t)(n * what->keys) * 4;
    const size_t bytes = queries_at + (size_t)what->queries * 4;
    const std::unique_ptr<char, decltype(&free)> told((char *)calloc(1, bytes), free);
    if (!told) return failed(cudaErrorMemoryAllocation, "calloc", failure);
    for (int64_t i = 0; i < n; i++) {
        const ada_cuda_sampled *x = &heads[i];
        ((Head *)told.get())[i] = {(int32_t)x->head, (int32_t)x->first, (int32_t)x->end, (int32_t)x->n_keys};
        for (int64_t j = 0; j < x->n_keys; j++)
            ((int32_t *)(told.get() + keys_at))[i * what->keys + j] = (int32_t)x->keys[j];
        const int32_t chunks = (int32_t)((x->end - x->first + CHUNK - 1) / CHUNK);
        a.chunks = chunks > a.chunks ? chunks : a.chunks;
    }
    for (int64_t i = 0; i < what->queries; i++)
        ((int32_t *)(told.get() + queries_at))[i] = (int32_t)what->query[i];
    const size_t of_part = (size_t)a.p.D + KNOWN, numbers = (size_t)(n * a.at.floats) * sizeof(float);
    Memory lists(call->stream), partials(call->stream), found(call->stream);
    TRY(lists.allocate(bytes));
    TRY(partials.allocate((size_t)n * (size_t)a.chunks * of_part * sizeof(float)));
    TRY(found.allocate(numbers));
    if (upload(call->problem.device, stream, lists.data, told.get(), (int64_t)bytes, failure))
        return failure->code;
    a.heads = (const Head *)lists.data, a.keys = (const int32_t *)((char *)lists.data + keys_at);
    a.queries = (const int32_t *)((char *)lists.data + queries_at);
    a.partials = (float *)partials.data, a.to = (float *)found.data;
    a.blocks = a.most_keys + FAR + a.n_queries + (a.measured + WARPS - 1) / WARPS;
    const int shared = WARPS * (a.p.D + 2) * 4;
    TRY(ada_launch(sum_keys, n * a.chunks, THREADS, shared, call->stream, a));
    TRY(ada_launch(measure_keys, n * a.chunks, THREADS, (CHUNK + a.p.D) * 4, call->stream, a));
    TRY(ada_launch(merge_chunks, n, THREADS, WARPS * 8 + a.chunks, call->stream, a));
    TRY(ada_launch(gather_sample, n * a.blocks, THREADS, 0, call->stream, a));
    return fetch(call->stream, to, found.data, numbers, failure);
}

} // namespace ada_cuda
