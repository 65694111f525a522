/* The instances of K0. */
#include "launch.h"

template <typename REAL, int PER, int LANES>
static cudaError_t run_width(const ada_k0_args &a, int64_t blocks, cudaStream_t stream) {
    return ada_launch(ada_k0<REAL, PER, LANES>, blocks, ADA_K0_THREADS, ada_k0_shared<REAL, PER, LANES>(),
                      stream, a);
}

template <typename REAL> static cudaError_t run(const ada_k0_args &a, int64_t blocks, cudaStream_t stream) {
    const int most = a.p.D > a.p.E ? a.p.D : a.p.E;
    if (most <= 32) return run_width<REAL, 4, 8>(a, blocks, stream);
    if (most <= 128) return run_width<REAL, 16, 8>(a, blocks, stream);
    if (most <= 256) return run_width<REAL, 16, 16>(a, blocks, stream);
    return cudaErrorNotSupported;
}

cudaError_t ada_k0_run(const ada_k0_args &a, bool f64, int64_t blocks, cudaStream_t stream) {
    return f64 ? run<double>(a, blocks, stream) : run<float>(a, blocks, stream);
}
