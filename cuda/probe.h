/* The probe's kernels: arguments, and the functions of the host that launch them. */
#ifndef ADA_CUDA_PROBE_H
#define ADA_CUDA_PROBE_H

#include "ada_cuda.h"
#include "common.cuh"

/* A key head that is looked at, as ada_cuda_keys says. */
typedef struct {
    int32_t head, first, end, step, heavies;
    int32_t heavy[ADA_CUDA_HEAVY];
    float share[ADA_CUDA_HEAVY];
    float count; /* keys that are looked at */
} ada_probe_head;

typedef struct {
    ada_cu_params p;
    const ada_probe_head *heads;
    int32_t chunks, blocks;       /* ada_probe_chunks(S); blocks of ADA_CUDA_BLOCK keys */
    float *means, *variances;     /* [B * G][D] */
    float *norm2, *value2;        /* [B * G][S] */
    float *largest;               /* [B * G][blocks] */
    float *partials;              /* [heads][chunks][D + 2 E] */
    float *value_sums, *largest2; /* [heads][2][E]; [heads] */
    float *spread, *heavy;        /* [B * H][T] */
    const int32_t *pairs;         /* [rows][2] */
    int64_t rows;
    const double *o, *lse;      /* of exact rows: [rows][E], [rows] */
    ada_cuda_figures *figures;  /* [rows] */
    ada_cuda_profile *profiles; /* [rows] */
    int32_t row_blocks;         /* of a key head's queries */
} ada_probe_args;

int ada_probe_chunks(int64_t keys);
cudaError_t ada_probe_keys_run(const ada_probe_args *args, int heads, cudaStream_t stream);
cudaError_t ada_probe_spreads_run(ada_probe_args args, int heads, cudaStream_t stream);
cudaError_t ada_probe_figures_run(const ada_probe_args *args, cudaStream_t stream);
cudaError_t ada_probe_profiles_run(const ada_probe_args *args, cudaStream_t stream);

#endif
