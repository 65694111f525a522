/* The probe on the device: sums over some keys and values, and figures of some queries (csrc/probe.h says
 * what for). Every sum has one order, so that two calls choose alike. Threads own columns.
 */
#include "probe.h"

enum { THREADS = 128, WARPS = THREADS / 32 };

namespace {

ADA_DEVICE float most_of_warp(float x) {
    for (int lanes = 16; lanes; lanes /= 2) x = fmaxf(x, ada_shuffle_xor(x, lanes));
    return x;
}

ADA_DEVICE float larger(float x, float y) { return !(x <= y) ? x : y; } /* NaN, if x is */

/* This block's keys. */
typedef struct {
    ada_probe_head head;
    int b, g, first, end;
} keys_of_block;

ADA_DEVICE keys_of_block keys_here(const ada_probe_args &a) {
    keys_of_block k;
    k.head = a.heads[ada_block() / a.looked];
    k.b = k.head.head / a.p.G, k.g = k.head.head % a.p.G;
    const int block = k.head.first / ADA_CUDA_BLOCK + ada_block() % a.looked * k.head.step;
    k.first = block * ADA_CUDA_BLOCK, k.end = k.first + ADA_CUDA_BLOCK;
    k.first = k.first < k.head.first ? k.head.first : k.first;
    k.end = k.end > k.head.end ? k.head.end : k.end;
    return k;
}

/* Sums of columns of K; of V sums, sums of squares and largest magnitudes. */
ADA_KERNEL(THREADS, 1) sum_columns(ADA_ARGS(ada_probe_args) a) {
    const ada_cu_params &p = a.p;
    const keys_of_block k = keys_here(a);
    float *to = a.partials + ada_block() * (int64_t)(p.D + 3 * p.E);
    for (int d = ada_thread(); d < p.D; d += THREADS) {
        const char *at = ada_row_of(p.key, k.b, k.g, k.first) + d * p.key.stride[3];
        float sum = 0;
        for (int j = k.first; j < k.end; j++, at += p.key.stride[2]) sum += ada_element<float>(at, p.dtype);
        to[d] = sum;
    }
    for (int e = ada_thread(); e < p.E; e += THREADS) {
        const char *at = ada_row_of(p.value, k.b, k.g, k.first) + e * p.value.stride[3];
        float sum = 0, square = 0, most = 0;
        for (int j = k.first; j < k.end; j++, at += p.value.stride[2]) {
            const float x = ada_element<float>(at, p.dtype);
            sum += x, square += x * x, most = larger(fabsf(x), most);
        }
        to[p.D + e] = sum, to[p.D + p.E + e] = square, to[p.D + 2 * p.E + e] = most;
    }
}

/* With the means: squared deviations of the columns of K; the largest one's square times the keys. */
ADA_KERNEL(THREADS, 1) sum_deviations(ADA_ARGS(ada_probe_args) a) {
    const ada_cu_params &p = a.p;
    const keys_of_block k = keys_here(a);
    const float *means = a.means + ada_block() / a.looked * (int64_t)p.D;
    float *to = a.partials + ada_block() * (int64_t)(p.D + 1), most = 0;
    for (int d = ada_thread(); d < p.D; d += THREADS) {
        const char *at = ada_row_of(p.key, k.b, k.g, k.first) + d * p.key.stride[3];
        const float mean = means[d];
        float sum = 0;
        for (int j = k.first; j < k.end; j++, at += p.key.stride[2]) {
            const float x = ada_element<float>(at, p.dtype) - mean;
            sum += x * x, most = fmaxf(most, fabsf(x));
        }
        to[d] = sum;
    }
    float *const mosts = ada_shared_at<float>(0); /* [WARPS] */
    most = most_of_warp(most);
    if (ada_thread() % 32 == 0) mosts[ada_thread() / 32] = most;
    ada_sync();
    if (ada_thread()) return;
    for (int w = 1; w < WARPS; w++) most = fmaxf(most, ada_shared_at<float>(0)[w]);
    to[p.D] = k.end > k.first ? most * most * (float)(k.end - k.first) : 0;
}

/* A key head's blocks in order: means and variances from sums, or sums and, from column `most` on, largest
 * ones. */
ADA_KERNEL(THREADS, 1) merge_blocks(ADA_ARGS(ada_probe_args) a) {
    const float count = fmaxf(a.heads[ada_block()].count, 1);
    for (int c = ada_thread(); c < a.width; c += THREADS) {
        const float *from = a.partials + ada_block() * (int64_t)a.looked * a.width + c;
        float sum = 0;
        for (int i = 0; i < a.looked; i++, from += a.width)
            sum = c < a.most ? sum + *from : larger(*from, sum);
        if (c < a.p.D)
            a.merged_columns[ada_block() * (int64_t)a.p.D + c] = sum / count;
        else
            a.merged_rest[ada_block() * (int64_t)(a.width - a.p.D) + c - a.p.D] = sum;
    }
}

/* A warp per row. */
ADA_KERNEL(THREADS, 1) figure_rows(ADA_ARGS(ada_probe_args) a) {
    const ada_cu_params &p = a.p;
    const int64_t i = ada_block() * (int64_t)WARPS + ada_thread() / 32;
    if (i >= a.rows) return;
    const int head = a.pairs[2 * i], key_head = a.key_head[i];
    const char *query = ada_row_of(p.query, head / p.H, head % p.H, a.pairs[2 * i + 1]);
    const float *variances = a.variances + (int64_t)key_head * p.D,
                *means = a.means + (int64_t)key_head * p.D;
    ada_cuda_figures f = {0, 0, 0, 0};
    for (int d = ada_thread() % 32; d < p.D; d += 32) {
        const float x = ada_element<float>(query + d * p.query.stride[3], p.dtype), x2 = x * x;
        f.spread += x2 * variances[d];
        f.by_mean += x2 * means[d] * means[d];
        f.norm2 += x2;
        f.most = fmaxf(f.most, fabsf(x));
    }
    f.spread = ada_sum_of_warp(f.spread), f.by_mean = ada_sum_of_warp(f.by_mean);
    f.norm2 = ada_sum_of_warp(f.norm2), f.most = most_of_warp(f.most);
    if (ada_thread() % 32 == 0) a.figures[i] = f;
}

} // namespace

cudaError_t ada_probe_run(ada_probe_args a, int n, cudaStream_t stream) {
    const int64_t blocks = (int64_t)a.looked * n;
    cudaError_t error = ada_launch(sum_columns, blocks, THREADS, 0, stream, a);
    a.width = a.p.D + 3 * a.p.E, a.most = a.p.D + 2 * a.p.E;
    a.merged_columns = a.means, a.merged_rest = a.value_sums;
    if (!error) error = ada_launch(merge_blocks, n, THREADS, 0, stream, a);
    if (!error) error = ada_launch(sum_deviations, blocks, THREADS, WARPS * 4, stream, a);
    a.width = a.most = a.p.D + 1;
    a.merged_columns = a.variances, a.merged_rest = a.largest2;
    if (!error) error = ada_launch(merge_blocks, n, THREADS, 0, stream, a);
    if (error || !a.rows) return error;
    return ada_launch(figure_rows, (a.rows + WARPS - 1) / WARPS, THREADS, 0, stream, a);
}
