/* The probe's kernels and those of single rows: arguments, and the functions of the host that launch them. */
#ifndef ADA_CUDA_PROBE_H
#define ADA_CUDA_PROBE_H

#include "ada_cuda.h"
#include "common.cuh"

/* A key head that is looked at, as ada_cuda_keys says. */
typedef struct {
    int32_t head, first, end, step;
    float count; /* keys that are looked at */
    int32_t padding;
} ada_probe_head;

typedef struct {
    ada_cu_params p;
    const ada_probe_head *heads;
    int32_t looked;           /* blocks of keys that are looked at, of the head with most */
    float *partials;          /* [heads][looked][D + 3 E] */
    float *means, *variances; /* [heads][D] */
    float *value_sums;        /* [heads][3][E] sums, of squares, largest */
    float *largest2;          /* [heads] */
    const int32_t *pairs;     /* [rows][2] */
    const int32_t *key_head;  /* [rows] index into heads */
    int64_t rows;
    ada_cuda_figures *figures; /* [rows] */
    /* of a merge */
    int32_t width, most;
    float *merged_columns, *merged_rest;
} ada_probe_args;

cudaError_t ada_probe_run(ada_probe_args args, int heads, cudaStream_t stream);

/* Rows of one head that are computed together. */
enum { ADA_ROWS_TOGETHER = 4 };
typedef struct {
    int32_t head, first, count, padding; /* pairs first ... */
} ada_row_group;

typedef struct {
    ada_cu_params p;
    const ada_row_group *groups;
    const int32_t *pairs; /* [rows][2] */
    int32_t n_groups, splits, fours;
    int64_t rows;
    double *partials; /* ada_rows_bytes */
    double *o, *lse;  /* [rows][E], [rows] */
} ada_rows_args;

int ada_rows_splits(const ada_cu_params *p);
size_t ada_rows_bytes(const ada_cu_params *p, int64_t groups);
/* Exact rows in double or, f64 being false, in float but for the sum of splits. */
cudaError_t ada_rows_run(ada_rows_args args, bool f64, cudaStream_t stream);

#endif
