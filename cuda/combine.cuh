/* The end of few queries. */
#ifndef ADA_CUDA_COMBINE_CUH
#define ADA_CUDA_COMBINE_CUH

#include "k1.cuh"

/* Rows from the sums of their splits, a warp for each. */
enum { ADA_COMBINE_THREADS = 128 };

static ADA_KERNEL(ADA_COMBINE_THREADS, 1) ada_combine(ADA_ARGS(ada_k1_args) a) {
    const ada_cu_params &p = a.p;
    const int lane = ada_thread() % 32;
    const int64_t i = (int64_t)ada_block() * (ADA_COMBINE_THREADS / 32) + ada_thread() / 32;
    const int64_t rows = (int64_t)(p.heads ? p.n_heads : p.B * p.H) * p.T;
    if (i >= rows) return;
    const int head = p.heads ? p.heads[i / p.T] : (int)(i / p.T), t = (int)(i % p.T);
    const int64_t row = (int64_t)head * p.T + t;
    const float *ends = a.partials + a.rows * a.splits * p.E + 3 * row * a.splits;
    float m = -ADA_INF, l = 0, good = 0;
    bool saw = false;
    for (int n = 0; n < a.splits; n++) m = fmaxf(m, ends[3 * n]), saw |= ends[3 * n + 2] != 0;
    for (int n = 0; n < a.splits; n++)
        l += ends[3 * n + 1] * (ends[3 * n] == m ? 1 : ada_exp2(ends[3 * n] - m));
    const ada_row_end end = ada_end_row(p, head % p.H, m, l, saw);
    char *to = ada_out_row(p, head / p.H, head % p.H, t);
    for (int e = lane; e < p.E; e += 32) {
        float sum = 0;
        for (int n = 0; n < a.splits; n++)
            sum += a.partials[(row * a.splits + n) * p.E + e] *
                   (ends[3 * n] == m ? 1 : ada_exp2(ends[3 * n] - m));
        sum = end.factor == 0 ? 0 : sum * end.factor;
        good += sum * 0;
        ada_store_element(to + e * p.out.stride[3], p.dtype, sum);
    }
    const bool again = ada_any(!(good == 0)) || !end.good;
    if (lane) return;
    ada_store_lse(p, row, end.lse);
    if (again) ada_again(a.again, row);
}

#endif
