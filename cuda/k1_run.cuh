/* The instances of K1 of one format; the including file defines run_width<W>(a, options, stream) and ADA_RUN.
 */
#include "k1.cuh"
#include "launch.h"

template <typename X> static cudaError_t run(ada_k1_args &a, cudaStream_t stream) {
    const ada_cu_params &p = a.p;
    /* Where tiles differ, the long ones of all heads come before the short ones; of so many heads only, so
     * that blocks at work share keys in the cache. */
    a.group = p.window_right == ADA_CU_UNBOUNDED ? 1 : 16;
    a.units = (p.heads ? p.n_heads : p.B * p.H) / a.pack;
    a.tiles = (a.pack * p.T + X::BM - 1) / X::BM;
    return ada_launch(ada_k1<X>, (int64_t)a.units * a.tiles * (X::FEW ? a.splits : 1), X::THREADS, X::SHARED,
                      stream, a);
}

template <int W> static cudaError_t run_width(ada_k1_args &a, bool options, cudaStream_t stream);

cudaError_t ADA_RUN(ada_k1_args a, cudaStream_t stream) {
    const ada_cu_params &p = a.p;
    switch (ada_k1_width(&p)) {
#define ADA_CASE(W)                                                                                          \
    case W:                                                                                                  \
        return run_width<W>(a, a.options, stream);
        ADA_K1_WIDTHS(ADA_CASE)
#undef ADA_CASE
    default:
        return cudaErrorNotSupported;
    }
}
