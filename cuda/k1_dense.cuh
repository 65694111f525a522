/* The tilings of K1 in half formats; the including file defines ADA_BF16 and ADA_RUN. */
#include "k1_run.cuh"

template <int W> static cudaError_t run_width(ada_k1_args &a, bool options, cudaStream_t stream) {
    constexpr bool wide = W > 128;
    constexpr int keys = wide ? 32 : 64;
    if (a.splits)
        return run<ada_tiling<ADA_BF16, W, 1, 1, wide ? 2 : 4, keys, true, true, wide ? 2 : 3>>(a, stream);
    if (options) return run<ada_tiling<ADA_BF16, W, 4, 1, 1, keys, true, false, 2>>(a, stream);
    if constexpr (W == 128) {
        /* Registers and shared memory suffice for 64 keys at a time since sm_90. */
        if (a.p.code < 90) return run<ada_tiling<ADA_BF16, W, 4, 2, 1, 32, false, false, 2>>(a, stream);
        return run<ada_tiling<ADA_BF16, W, 4, 2, 1, 64, false, false, 2, 90>>(a, stream);
    } else if constexpr (W == 64) {
        if (a.p.code < 90) return run<ada_tiling<ADA_BF16, W, 4, 2, 1, 64, false, false, 2>>(a, stream);
        return run<ada_tiling<ADA_BF16, W, 4, 2, 1, 128, false, false, 2, 90>>(a, stream);
    } else {
        return run<ada_tiling<ADA_BF16, W, 4, wide ? 1 : 2, 1, keys, false, false, 2>>(a, stream);
    }
}
