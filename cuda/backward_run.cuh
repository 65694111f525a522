/* The tilings of the gradients in half formats; the including file defines ADA_BF16 and ADA_RUN. */
#include "backward_tiled.cuh"

/* Widths that there are instances of. */
#ifndef ADA_BACK_WIDTHS
#    define ADA_BACK_WIDTHS(X) X(64) X(128) X(256)
#endif

template <typename X> static cudaError_t run(ada_back_args a, cudaStream_t stream) {
    const ada_cu_params &p = a.x.p;
    const bool ragged = p.window_right != ADA_CU_UNBOUNDED || p.window_left != ADA_CU_UNBOUNDED;
    a.group = ragged ? 16 : 1; /* as K1's */
    a.units = p.B * (X::OF_KEYS ? p.G : p.H);
    a.tiles = ((X::OF_KEYS ? p.S : p.T) + X::STAYING - 1) / X::STAYING;
    return ada_launch(ada_back<X>, (int64_t)a.units * a.tiles, X::THREADS, X::SHARED, stream, a);
}

template <int W> static cudaError_t run_width(const ada_back_args &a, cudaStream_t stream) {
    const ada_cu_array *const to = a.x.results;
    const bool key = to[ADA_CU_OF_KEY].data, value = to[ADA_CU_OF_VALUE].data;
    cudaError_t error = cudaSuccess;
    if constexpr (W > 128) {
        /* Registers suffice for the sums of one of them. */
        if (key) error = run<ada_back_tiling<ADA_BF16, W, true, true, false, 4, 1, 16>>(a, stream);
        if (value && !error)
            error = run<ada_back_tiling<ADA_BF16, W, true, false, true, 4, 1, 16>>(a, stream);
        if (to[ADA_CU_OF_QUERY].data && !error)
            error = run<ada_back_tiling<ADA_BF16, W, false, true, false, 4, 1, 16>>(a, stream);
    } else {
        if (key || value) error = run<ada_back_tiling<ADA_BF16, W, true, true, true, 8, 1, 32>>(a, stream);
        if (to[ADA_CU_OF_QUERY].data && !error)
            error = run<ada_back_tiling<ADA_BF16, W, false, true, false, 8, 1, 32>>(a, stream);
    }
    return error;
}

cudaError_t ADA_RUN(const ada_back_args &a, cudaStream_t stream) {
    const int most = a.x.p.D > a.x.p.E ? a.x.p.D : a.x.p.E;
#define ADA_FITS(W)                                                                                          \
    if (most <= W) return run_width<W>(a, stream);
    ADA_BACK_WIDTHS(ADA_FITS)
#undef ADA_FITS
    return cudaErrorNotSupported;
}
