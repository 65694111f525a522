/* What is used of cuBLASLt, declared here: building needs no header of it, and it is opened when a product
 * first asks for it. Names and numbers are those of NVIDIA's cublasLt.h of versions 12 and 13. */
#ifndef ADA_CUDA_BLAS_H
#define ADA_CUDA_BLAS_H

#include <stddef.h>
#include <stdint.h>

typedef struct CUstream_st *cudaStream_t;

enum {
    BLAS_SUCCESS = 0,
    BLAS_ALLOC_FAILED = 3,
    BLAS_INVALID_VALUE = 7,
    BLAS_NOT_SUPPORTED = 15
};                                                                                      /* CUBLAS_STATUS_ */
enum { BLAS_COMPUTE_32F = 68, BLAS_COMPUTE_64F = 70, BLAS_COMPUTE_32F_FAST_TF32 = 77 }; /* CUBLAS_ */
enum { BLAS_R_32F = 0, BLAS_R_64F = 1, BLAS_R_16F = 2, BLAS_R_16BF = 14, BLAS_R_8F_E4M3 = 28 }; /* CUDA_ */
enum { BLAS_OP_T = 1 };                                                                         /* CUBLAS_ */
enum { BLAS_POINTERS_ON_DEVICE = 1 }; /* CUBLASLT_POINTER_MODE_DEVICE */
enum { BLAS_EPILOGUE_BIAS = 4 };      /* CUBLASLT_EPILOGUE_BIAS */
enum {                                /* CUBLASLT_MATMUL_DESC_ */
       BLAS_DESC_POINTER_MODE = 2,
       BLAS_DESC_TRANSA = 3,
       BLAS_DESC_EPILOGUE = 7,
       BLAS_DESC_BIAS_POINTER = 8
};
enum {                                /* CUBLASLT_MATMUL_PREF_ */
       BLAS_PREF_WORKSPACE_BYTES = 1, /* MAX_WORKSPACE_BYTES */
       BLAS_PREF_ALIGNMENT_A = 5,     /* MIN_ALIGNMENT_A_BYTES, then those of B, C and D */
       BLAS_PREF_ALIGNMENT_B = 6,
       BLAS_PREF_ALIGNMENT_C = 7,
       BLAS_PREF_ALIGNMENT_D = 8
};

/* cublasLtMatmulHeuristicResult_t */
typedef struct {
    uint64_t algo[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
} blas_choice;

/* Handles, descriptors, layouts and preferences are pointers to what the library allocates. */
#define ADA_BLAS_FUNCTIONS(X)                                                                                \
    X(size_t, GetVersion, (void))                                                                            \
    X(const char *, GetStatusString, (int status))                                                           \
    X(int, Create, (void **handle))                                                                          \
    X(int, MatmulDescCreate, (void **desc, int compute, int scale))                                          \
    X(int, MatmulDescDestroy, (void *desc))                                                                  \
    X(int, MatmulDescSetAttribute, (void *desc, int attribute, const void *value, size_t bytes))             \
    X(int, MatrixLayoutCreate, (void **layout, int type, uint64_t rows, uint64_t columns, int64_t ld))       \
    X(int, MatrixLayoutDestroy, (void *layout))                                                              \
    X(int, MatmulPreferenceCreate, (void **preference))                                                      \
    X(int, MatmulPreferenceDestroy, (void *preference))                                                      \
    X(int, MatmulPreferenceSetAttribute, (void *preference, int attribute, const void *value, size_t bytes)) \
    X(int, MatmulAlgoGetHeuristic,                                                                           \
      (void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference, int wanted,           \
       blas_choice *choices, int *count))                                                                    \
    X(int, Matmul,                                                                                           \
      (void *handle, void *desc, const void *alpha, const void *a, void *a_layout, const void *b,            \
       void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,             \
       const uint64_t *algo, void *workspace, size_t workspace_bytes, cudaStream_t stream))

#endif
