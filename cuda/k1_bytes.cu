/* The tilings of K1 whose queries and keys are bytes; values are fp16 where the arrays are, else bf16. */
#define ADA_RUN ada_k1_run_bytes
#include "k1_run.cuh"

template <int W, bool BF16> static cudaError_t run_format(ada_k1_args &a, bool options, cudaStream_t stream) {
    constexpr bool wide = W > 128;
    constexpr int keys = wide ? 32 : 64;
    if (a.splits)
        return run<ada_tiling<BF16, W, 1, 1, wide ? 2 : 4, keys, true, true, wide ? 2 : 3, 80, 1, true>>(
            a, stream);
    if (options) return run<ada_tiling<BF16, W, 4, 1, 1, keys, true, false, 2, 80, 1, true>>(a, stream);
    return run<ada_tiling<BF16, W, 4, wide ? 1 : 2, 1, W == 128 ? 32 : keys, false, false, 2, 80, 1, true>>(
        a, stream);
}

template <int W> static cudaError_t run_width(ada_k1_args &a, bool options, cudaStream_t stream) {
    return a.p.dtype == ADA_CU_F16 ? run_format<W, false>(a, options, stream)
                                   : run_format<W, true>(a, options, stream);
}
