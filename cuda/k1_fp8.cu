/* The tilings of K1 whose weights and values are e4m3; queries and keys are that too, or integers. */
#define ADA_RUN ada_k1_run_fp8
#include "k1_run.cuh"

/* The kernels for options do without them too: those with two tiles of rows need more registers. */
template <int W, bool E4M3> static cudaError_t run_scores(ada_k1_args &a, cudaStream_t stream) {
    constexpr int keys = W > 64 ? 32 : 64;
    if constexpr (W <= 128) /* else keys are not split: launch.h */
        if (a.splits)
            return run<ada_tiling<true, W, 1, 1, 2, 64, true, true, 4, 89, 1, true, E4M3, true>>(a, stream);
    return run<ada_tiling<true, W, 4, 1, 1, keys, true, false, 2, 89, 1, true, E4M3, true>>(a, stream);
}

template <int W> static cudaError_t run_width(ada_k1_args &a, bool, cudaStream_t stream) {
    return a.p.rung == ADA_CU_FP8 ? run_scores<W, true>(a, stream) : run_scores<W, false>(a, stream);
}
