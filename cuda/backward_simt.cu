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

template <typename X> static cudaError_t run_mask(const ada_back_args &a, cudaStream_t stream) {
    const ada_cu_params &p = a.x.p;
    const ada_cu_array *const mask = &a.x.results[ADA_CU_OF_MASK];
    if (!mask->data) return cudaSuccess;
    const int64_t blocks = (mask->stride[0] ? p.B : 1) * (int64_t)(mask->stride[1] ? p.H : 1) *
                           (mask->stride[2] ? tiles_of(p.T, X::TILE) : 1) *
                           (mask->stride[3] ? tiles_of(p.S, X::TILE) : 1);
    return ada_launch(ada_back_mask<X>, blocks, ADA_SIMT_THREADS, X::SHARED, stream, a);
}

/* NARROW for heads of at most 128, WIDE for others. */
template <typename NARROW, typename WIDE>
static cudaError_t run(const ada_back_args &a, cudaStream_t stream) {
    const int most = a.x.p.D > a.x.p.E ? a.x.p.D : a.x.p.E;
    const cudaError_t error = most <= 128 ? run_width<NARROW, 128 / NARROW::TILE>(a, stream)
                                          : run_width<WIDE, ADA_CU_MAX_HEAD / WIDE::TILE>(a, stream);
    return error ? error : run_mask<NARROW>(a, stream);
}

cudaError_t ada_back_run_simt(const ada_back_args &a, bool f64, cudaStream_t stream) {
    return f64 ? run<ada_simt_f64, ada_simt_f64>(a, stream) : run<ada_simt_f32, ada_simt_wide>(a, stream);
}

cudaError_t ada_back_run_rows(const ada_back_args &a, cudaStream_t stream) {
    typedef ada_simt_f64 X;
    return ada_launch(ada_back_rows_again<X>, (int64_t)a.x.p.B * a.x.p.H * tiles_of(a.x.p.T, X::TILE),
                      ADA_SIMT_THREADS, X::SHARED, stream, a);
}
