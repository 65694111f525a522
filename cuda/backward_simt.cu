/* The instances of the gradients on plain arithmetic. */
#include "backward_simt.cuh"

static int64_t tiles_of(int64_t rows, int tile) { return (rows + tile - 1) / tile; }

template <typename X, int CHUNKS> static cudaError_t run_width(const ada_back_args &a, cudaStream_t stream) {
    const ada_cu_params &p = a.x.p;
    const ada_cu_array *const to = a.x.results;
    cudaError_t error = cudaSuccess;
    if (to[ADA_CU_OF_KEY].data || to[ADA_CU_OF_VALUE].data)
        error = ada_launch(ada_back_keys<X, CHUNKS>, (int64_t)p.B * p.G * tiles_of(p.S, X::TILE),
                           ADA_SIMT_THREADS, X::SHARED, stream, a);
    if (!error && (to[ADA_CU_OF_QUERY].data || to[ADA_CU_OF_SLOPES].data))
        error = ada_launch(ada_back_queries<X, CHUNKS>, (int64_t)p.B * p.H * tiles_of(p.T, X::TILE),
                           ADA_SIMT_THREADS, X::SHARED, stream, a);
    return error;
}

template <typename X> static cudaError_t run(const ada_back_args &a, cudaStream_t stream) {
    const ada_cu_params &p = a.x.p;
    const ada_cu_array *const mask = &a.x.results[ADA_CU_OF_MASK];
    const int most = p.D > p.E ? p.D : p.E;
    const cudaError_t error = most <= 128 ? run_width<X, 128 / X::TILE>(a, stream)
                                          : run_width<X, ADA_CU_MAX_HEAD / X::TILE>(a, stream);
    if (error || !mask->data) return error;
    const int64_t blocks = (mask->stride[0] ? p.B : 1) * (int64_t)(mask->stride[1] ? p.H : 1) *
                           (mask->stride[2] ? tiles_of(p.T, X::TILE) : 1) *
                           (mask->stride[3] ? tiles_of(p.S, X::TILE) : 1);
    return ada_launch(ada_back_mask<X>, blocks, ADA_SIMT_THREADS, X::SHARED, stream, a);
}

cudaError_t ada_back_run_simt(const ada_back_args &a, bool f64, cudaStream_t stream) {
    return f64 ? run<ada_simt<double>>(a, stream) : run<ada_simt<float>>(a, stream);
}

cudaError_t ada_back_run_rows(const ada_back_args &a, cudaStream_t stream) {
    typedef ada_simt<double> X;
    return ada_launch(ada_back_rows_again<X>, (int64_t)a.x.p.B * a.x.p.H * tiles_of(a.x.p.T, X::TILE),
                      ADA_SIMT_THREADS, X::SHARED, stream, a);
}
