/* The end of few queries: rows from the sums of their splits, a block for each. */
#include "launch.h"

template <int PER, int LANES, bool PAGES>
ADA_KERNEL(ADA_K0_THREADS, 1)
ada_combine(ADA_ARGS(ada_combine_args) a) {
    const ada_cu_params &p = a.k0.p;
    const int thread = ada_thread(), head = p.heads ? p.heads[ada_block() / p.T] : ada_block() / p.T;
    const int t = ada_block() % p.T, b = head / p.H, h = head % p.H;
    const int64_t row = (int64_t)head * p.T + t;
    const float *const sums = a.partials + row * a.splits * p.E;
    const float *const ends = a.partials + a.rows * a.splits * p.E + 3 * row * a.splits;
    enum { WARPS = ADA_K0_THREADS / 32 };
    float *const of_warps = ada_shared_at<float>(0), *const weights = of_warps + 4 * WARPS;

    float m = -ADA_INF, l = 0, saw = 0, good = 0;
    for (int n = thread; n < a.splits; n += ADA_K0_THREADS) m = fmaxf(m, ends[3 * n]);
    ADA_UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) m = fmaxf(m, ada_shuffle_xor(m, lanes));
    if (thread % 32 == 0) of_warps[thread / 32] = m;
    ada_sync();
    for (int i = 0; i < WARPS; i++) m = fmaxf(m, of_warps[i]);
    for (int n = thread; n < a.splits; n += ADA_K0_THREADS) {
        const float *const end = ends + 3 * n;
        weights[n] = end[0] == m ? 1 : ada_exp2(end[0] - m);
        l += end[1] * weights[n];
        saw = fmaxf(saw, end[2]);
    }
    ADA_UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) {
        l += ada_shuffle_xor(l, lanes);
        saw = fmaxf(saw, ada_shuffle_xor(saw, lanes));
    }
    if (thread % 32 == 0) of_warps[WARPS + thread / 32] = l, of_warps[2 * WARPS + thread / 32] = saw;
    ada_sync();
    l = 0;
    for (int i = 0; i < WARPS; i++) l += of_warps[WARPS + i], saw = fmaxf(saw, of_warps[2 * WARPS + i]);
    if (!p.mask.data) {
        const ada_span span = ada_visible(p, ada_sequence_of(p, b), t);
        saw = span.first < span.end;
    }

    const ada_row_end end = ada_end_row(p, h, m, l, saw != 0);
    char *const to = ada_out_row(p, b, h, t);
    for (int e = thread; e < p.E; e += ADA_K0_THREADS) {
        float sum = 0;
        ADA_UNROLL_BY(8) for (int n = 0; n < a.splits; n++) sum += sums[(int64_t)n * p.E + e] * weights[n];
        sum = end.factor == 0 ? 0 : sum * end.factor;
        good += sum * 0;
        ada_store_element(to + e * p.out.stride[3], p.dtype, sum);
    }
    const bool bad = ada_any(!(good == 0)) || !end.good;
    if (thread % 32 == 0) of_warps[3 * WARPS + thread / 32] = bad;
    if (thread == 0) ada_store_lse(p, row, end.lse);
    ada_sync();
    float again = 0;
    for (int i = 0; i < WARPS; i++) again += of_warps[3 * WARPS + i];
    if (again == 0) return;
    if (thread == 0 && p.raised) p.raised[head] = 1;
    ada_k0_row<double, PER, LANES, PAGES>(a.k0, head, t, NULL, NULL);
}

template <int PER, int LANES>
static cudaError_t run(const ada_combine_args &a, int64_t rows, cudaStream_t stream) {
    const int sums = (4 * ADA_K0_THREADS / 32 + a.splits) * 4, again = ada_k0_shared<double, PER, LANES>();
    const auto kernel = a.k0.p.pages.table ? ada_combine<PER, LANES, true> : ada_combine<PER, LANES, false>;
    return ada_launch(kernel, rows, ADA_K0_THREADS, sums > again ? sums : again, stream, a);
}

cudaError_t ada_combine_run(const ada_combine_args &a, int64_t rows, cudaStream_t stream) {
    const int most = a.k0.p.D > a.k0.p.E ? a.k0.p.D : a.k0.p.E;
    if (most <= 32) return run<4, 8>(a, rows, stream);
    if (most <= 128) return run<16, 8>(a, rows, stream);
    return run<16, 16>(a, rows, stream);
}
