/* Which blocks of keys the tiles of queries cannot do without. */
#ifndef ADA_CUDA_LISTS_H
#define ADA_CUDA_LISTS_H

#include "common.cuh"

/* A head for which lists are made, and what may be left out of its rows: weights that move an output by no
 * more than absolute plus relative times the root mean square norm of a value, and of a sum below most. */
typedef struct {
    int32_t head; /* b * H + h */
    float absolute, relative, most;
} ada_thin_head;

/* Of a block of keys: how far its centre and a key, or the mean of the keys, lie apart at most, and the
 * centre's norm; of its values that are numbers the largest norm and the sum of squared ones. reach is
 * infinite where the block cannot be left out. */
typedef struct {
    float reach, drift, size, value_most, value2;
} ada_block_figures;

/* Of a head's values: the largest norm and the root mean square one. */
typedef struct {
    float most, rms;
} ada_value_figures;

typedef struct {
    ada_cu_params p;            /* p.lists is not read */
    const ada_thin_head *heads; /* [n] ascending */
    int32_t n, rows;            /* queries of a tile */
    int32_t tiles, looked;      /* tiles of a head, and how many of them are looked at */
    int32_t blocks;             /* of ADA_LIST_BLOCK keys */
    int32_t *lists;             /* [n][tiles][1 + blocks]; NULL: they are only counted */
    int32_t *counts;            /* [n][looked][3] blocks on the list; the first visible one, their end */
    uint16_t *centres;          /* [B * G][blocks][8 * chunks] bf16, aligned to 16 bytes */
    int32_t chunks;             /* of 16 bytes */
    ada_block_figures *figures; /* [B * G][blocks] */
    ada_value_figures *values;  /* [B * G] */
} ada_lists_args;

extern "C" cudaError_t ada_lists_run(const ada_lists_args *args, cudaStream_t stream);

#endif
