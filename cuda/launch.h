/* Between the translation units: what launches the instances of each kernel. */
#ifndef ADA_CUDA_LAUNCH_H
#define ADA_CUDA_LAUNCH_H

#include "k0.cuh"
#include "k1_tiling.cuh"

/* Widths that K1 has instances of. */
#ifndef ADA_K1_WIDTHS
#    define ADA_K1_WIDTHS(X) X(32) X(64) X(128) X(256)
#endif

static inline int ada_k1_width(const ada_cu_params *p) {
    const int most = p->D > p->E ? p->D : p->E;
#define ADA_FITS(W)                                                                                          \
    if (most <= W) return W;
    ADA_K1_WIDTHS(ADA_FITS)
#undef ADA_FITS
    return 0;
}

/* Weights and values in e4m3. */
static inline bool ada_is_fp8(const ada_cu_params *p) {
    return p->rung == ADA_CU_INT8_FP8 || p->rung == ADA_CU_FP8;
}

/* Whether K1 takes the rows of all heads that share keys together, and splits the keys; not where e4m3 then
 * needs more registers than there are. */
static inline bool ada_few_queries(const ada_cu_params *p) {
    return p->T <= 16 && !(ada_is_fp8(p) && ada_k1_width(p) > 128);
}

/* Few queries: rows of a tile. */
static inline int ada_few_rows() { return 16; }

/* Few queries: the sums of K1, and K0's arguments for rows that they do not hold. */
typedef struct {
    ada_k0_args k0;
    const float *partials;
    int64_t rows;
    int32_t splits;
} ada_combine_args;

/* few.cu: few queries on keys in float32 or in a cache's pages, which are read as they are. */
bool ada_reads_floats(const ada_cu_params *p);
size_t ada_few_workspace(const ada_cu_params *p);
cudaError_t ada_few_attend(const ada_cu_params *p, const ada_k0_args &again, cudaStream_t stream);

cudaError_t ada_combine_run(const ada_combine_args &a, int64_t rows, cudaStream_t stream);
cudaError_t ada_k0_run(const ada_k0_args &a, bool f64, int64_t blocks, cudaStream_t stream);
cudaError_t ada_k1_run_f16(ada_k1_args a, cudaStream_t stream);
cudaError_t ada_k1_run_bf16(ada_k1_args a, cudaStream_t stream);
cudaError_t ada_k1_run_split(ada_k1_args a, cudaStream_t stream);
cudaError_t ada_k1_run_bytes(ada_k1_args a, cudaStream_t stream);
cudaError_t ada_k1_run_fp8(ada_k1_args a, cudaStream_t stream);
cudaError_t ada_k1_run_listed(ada_k1_args a, cudaStream_t stream);

#endif
