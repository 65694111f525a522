/* The tilings of K1 whose operands are pairs of fp16. */
#define ADA_RUN ada_k1_run_split
#include "k1_run.cuh"

template <int W, int WARPS> static cudaError_t run_tiles(ada_k1_args &a, bool options, cudaStream_t stream) {
    constexpr int keys = W == 128 ? 16 : 32; /* with 32 the options spill registers */
    if (options) return run<ada_tiling<false, W, WARPS, 1, 1, keys, true, false, 1, 80, 2>>(a, stream);
    return run<ada_tiling<false, W, WARPS, 1, 1, 32, false, false, 1, 80, 2>>(a, stream);
}

template <int W> static cudaError_t run_width(ada_k1_args &a, bool options, cudaStream_t stream) {
    if constexpr (W > 128) {
        return cudaErrorNotSupported; /* registers do not suffice: launch.cu takes K0 */
    } else {
        if (a.splits) return run<ada_tiling<false, W, 1, 1, 2, 32, true, true, 2, 80, 2>>(a, stream);
        if constexpr (W == 128)
            if (a.p.capability % 10 == 0 && a.p.capability < 120)
                return run_tiles<W, 8>(a, options, stream); /* 128 KiB of shared memory */
        return run_tiles<W, 4>(a, options, stream);
    }
}
