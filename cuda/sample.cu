/* What landmarks are chosen from (csrc/landmarks.h): of a head's keys the mean, the furthest ones and a
 * sample, with values and some queries. Every sum has one order.
 */
#include "host.h"

#include <memory>

namespace ada_cuda {

namespace {

enum { THREADS = 128, WARPS = THREADS / 32, CHUNK = 1024 /* keys of a block */, FAR = ADA_CUDA_FAR };
static_assert(FAR == 32, "a lane for each");

struct Head {
    int32_t head, first, end, n_keys;
};

struct Sampling {
    ada_cu_params p;
    ada_cuda_sample_at at;
    const Head *heads;
    const int32_t *keys, *queries; /* [n][most_keys], [n_queries] */
    int32_t most_keys, n_queries, step, chunks;
    float
        *partials; /* [n][chunks][D + 1 + 2 FAR]: sums of columns, of squared distances, the furthest ones */
    float *to;     /* [n] as at says */
};

ADA_DEVICE const char *row_of(const ada_cu_array &x, int b, int h, int64_t i) {
    return (const char *)x.data + b * x.stride[0] + h * x.stride[1] + i * x.stride[2];
}
ADA_DEVICE const char *key_of(const Sampling &a, const Head &head, int64_t i) {
    return row_of(a.p.key, head.head / a.p.H, head.head % a.p.H / (a.p.H / a.p.G), i);
}
ADA_DEVICE float *partial_of(const Sampling &a, int head, int chunk) {
    return a.partials + ((int64_t)head * a.chunks + chunk) * (a.p.D + 1 + 2 * FAR);
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

ADA_KERNEL(THREADS, 1) sum_keys(ADA_ARGS(Sampling) a) {
    const Part x = part_here(a);
    float *const to = partial_of(a, x.n, x.chunk);
    for (int d = ada_thread(); d < a.p.D; d += THREADS) {
        const char *at = key_of(a, x.head, x.first) + d * a.p.key.stride[3];
        float sum = 0;
        ADA_UNROLL_BY(8)
        for (int j = x.first; j < x.end; j++, at += a.p.key.stride[2])
            sum += ada_element<float>(at, a.p.dtype);
        to[d] = sum;
    }
}

/* A warp per key; lane i keeps the furthest key whose number has the remainder i, which is always the same
 * warp's. */
ADA_KERNEL(THREADS, 1) measure_keys(ADA_ARGS(Sampling) a) {
    const ada_cu_params &p = a.p;
    const Part x = part_here(a);
    if (x.first >= x.end) return;
    const int lane = ada_thread() % 32, warp = ada_thread() / 32, chunks = chunks_of(x.head);
    float *const mean = ada_shared_at<float>(0), *const sums = mean + p.D; /* [D], [WARPS] */
    for (int d = ada_thread(); d < p.D; d += THREADS) {
        float sum = 0;
        for (int c = 0; c < chunks; c++) sum += partial_of(a, x.n, c)[d];
        mean[d] = sum / (float)(x.head.end - x.head.first);
        if (x.chunk == 0) a.to[x.n * a.at.floats + a.at.mean + d] = mean[d];
    }
    ada_sync();
    float most = -1, sum = 0;
    int32_t furthest = -1;
    for (int j = x.first + warp; j < x.end; j += WARPS) {
        const char *at = key_of(a, x.head, j);
        float apart2 = 0;
        for (int d = lane; d < p.D; d += 32) {
            const float y = ada_element<float>(at + d * p.key.stride[3], p.dtype) - mean[d];
            apart2 += y * y;
        }
        apart2 = ada_sum_of_warp(apart2), sum += apart2;
        if ((j - x.head.first) % FAR == lane && apart2 > most) most = apart2, furthest = j;
    }
    float *const to = partial_of(a, x.n, x.chunk) + p.D;
    if (lane % WARPS == warp) to[1 + lane] = most, ((int32_t *)to)[1 + FAR + lane] = furthest;
    if (lane == 0) sums[warp] = sum;
    ada_sync();
    if (ada_thread()) return;
    for (int w = 1; w < WARPS; w++) sum += sums[w];
    to[0] = sum;
}

/* The furthest key with a remainder, and how far. */
ADA_DEVICE int furthest_key(const Sampling &a, int n, int i, float *most) {
    const int chunks = chunks_of(a.heads[n]);
    int32_t key = -1;
    *most = -1;
    for (int c = 0; c < chunks; c++) {
        const float *from = partial_of(a, n, c) + a.p.D + 1;
        if (from[i] > *most) *most = from[i], key = ((const int32_t *)from)[FAR + i];
    }
    return key;
}

ADA_DEVICE void copy_row(float *to, const char *from, int64_t stride, int dtype, int width) {
    for (int i = ada_thread(); i < width; i += THREADS) to[i] = ada_element<float>(from + i * stride, dtype);
}

/* Rows of a head, each by a block: sampled keys, the furthest ones, queries; then norms of other queries, a
 * warp each; then what is left to sum. */
ADA_KERNEL(THREADS, 1) gather_sample(ADA_ARGS(Sampling) a) {
    const ada_cu_params &p = a.p;
    const int measured = (p.T + a.step - 1) / a.step, lane = ada_thread() % 32;
    const int items = a.most_keys + FAR + a.n_queries + (measured + WARPS - 1) / WARPS + 1;
    const int n = ada_block() / items;
    int i = ada_block() % items;
    const Head head = a.heads[n];
    const int b = head.head / p.H, h = head.head % p.H;
    float *const to = a.to + n * a.at.floats;
    if (i < a.most_keys) {
        if (i >= head.n_keys) return;
        const int key = a.keys[n * a.most_keys + i];
        copy_row(to + a.at.keys + i * p.D, key_of(a, head, key), p.key.stride[3], p.dtype, p.D);
        copy_row(to + a.at.values + i * p.E, row_of(p.value, b, h / (p.H / p.G), key), p.value.stride[3],
                 p.dtype, p.E);
        return;
    }
    if ((i -= a.most_keys) < FAR) {
        float most;
        const int key = furthest_key(a, n, i, &most);
        if (ada_thread() == 0) to[a.at.far2 + i] = most, ((int32_t *)to)[a.at.far + i] = key;
        if (key >= 0)
            copy_row(to + a.at.keys + (head.n_keys + i) * p.D, key_of(a, head, key), p.key.stride[3], p.dtype,
                     p.D);
        return;
    }
    if ((i -= FAR) < a.n_queries) {
        copy_row(to + a.at.queries + i * p.D, row_of(p.query, b, h, a.queries[i]), p.query.stride[3], p.dtype,
                 p.D);
        return;
    }
    i -= a.n_queries;
    const int query = i * WARPS + ada_thread() / 32;
    if (i < (measured + WARPS - 1) / WARPS) {
        if (query >= measured) return;
        const char *from = row_of(p.query, b, h, (int64_t)query * a.step);
        float norm2 = 0;
        for (int d = lane; d < p.D; d += 32) {
            const float x = ada_element<float>(from + d * p.query.stride[3], p.dtype);
            norm2 += x * x;
        }
        norm2 = ada_sum_of_warp(norm2);
        if (lane == 0) to[a.at.query2 + query] = norm2;
        return;
    }
    if (ada_thread()) return;
    float sum = 0;
    for (int c = 0; c < chunks_of(head); c++) sum += partial_of(a, n, c)[p.D];
    to[a.at.spread] = sum;
}

} // namespace

int take_sample(ada_cuda_call *call, const ada_cuda_sampled *heads, int64_t n, const ada_cuda_sampling *what,
                float *to, ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    const uintptr_t stream = call->problem.stream;
    Sampling a = {};
    a.p = call->params, a.at = ada_cuda_sample_layout(call->problem.D, call->problem.E, what);
    a.most_keys = (int32_t)what->keys, a.n_queries = (int32_t)what->queries, a.step = (int32_t)what->step;
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
    const size_t of_part = (size_t)a.p.D + 1 + 2 * FAR, numbers = (size_t)(n * a.at.floats) * sizeof(float);
    Memory lists(call->stream), partials(call->stream), found(call->stream);
    TRY(lists.allocate(bytes));
    TRY(partials.allocate((size_t)n * (size_t)a.chunks * of_part * sizeof(float)));
    TRY(found.allocate(numbers));
    if (upload(call->problem.device, stream, lists.data, told.get(), (int64_t)bytes, failure))
        return failure->code;
    a.heads = (const Head *)lists.data, a.keys = (const int32_t *)((char *)lists.data + keys_at);
    a.queries = (const int32_t *)((char *)lists.data + queries_at);
    a.partials = (float *)partials.data, a.to = (float *)found.data;
    const int64_t measured = (a.p.T + a.step - 1) / a.step;
    const int64_t items = a.most_keys + FAR + a.n_queries + (measured + WARPS - 1) / WARPS + 1;
    TRY(ada_launch(sum_keys, n * a.chunks, THREADS, 0, call->stream, a));
    TRY(ada_launch(measure_keys, n * a.chunks, THREADS, (a.p.D + WARPS) * 4, call->stream, a));
    TRY(ada_launch(gather_sample, n * items, THREADS, 0, call->stream, a));
    return fetch(call->stream, to, found.data, numbers, failure);
}

} // namespace ada_cuda
