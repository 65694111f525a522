/* The instances of K0. */
#include "launch.h"

template <typename REAL> static cudaError_t run(const ada_k0_args &a, int64_t blocks, cudaStream_t stream) {
    const int most = a.p.D > a.p.E ? a.p.D : a.p.E;
    if (most <= 32)
        return ada_launch(ada_k0<REAL, 4>, blocks, ADA_K0_THREADS, ada_k0_shared<REAL, 4>(), stream, a);
    if (most <= 128)
        return ada_launch(ada_k0<REAL, 16>, blocks, ADA_K0_THREADS, ada_k0_shared<REAL, 16>(), stream, a);
    if (most <= 256)
        return ada_launch(ada_k0<REAL, 32>, blocks, ADA_K0_THREADS, ada_k0_shared<REAL, 32>(), stream, a);
    return cudaErrorNotSupported;
}

cudaError_t ada_k0_run(const ada_k0_args &a, bool f64, int64_t blocks, cudaStream_t stream) {
    return f64 ? run<double>(a, blocks, stream) : run<float>(a, blocks, stream);
}
