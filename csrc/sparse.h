/* Which blocks of keys are read and which are stood in for: by one key of the block's mean value that has the
 * block's own weight, which is why every score is computed.
 *
 * What that moves a row by is the sum over the block's keys of (p - mean p) (v - mean v): about the root of
 * the sum of the (p - mean p)^2, times the largest distance of a value from the mean, which is the block's
 * spread. The squared error of a row is estimated as
 *
 *     own * ((1 - joint) * sum of spread^2 + joint * (sum of spread)^2),
 *
 * with joint 0 where blocks move it in directions that have nothing to do with each other. Profiled rows tell
 * own and joint; they hold for other choices of blocks too, where a factor between error and bound would not.
 */
#ifndef ADA_SPARSE_H
#define ADA_SPARSE_H

#include "adaattn.h"
#include "kernels.h"

/* Sparse ones are looked for from so many queries and keys on. */
#define ADA_SPARSE_LEAST 2048

/* The mean of ADA_BLOCK values, rows of floats, and the largest distance of one from it. mean: [E up to 16];
 * spare: as much again. */
float ada_value_reach(const ada_kernels *k, const float *rows, ptrdiff_t ld, int E, float *mean,
                      float *spare);

typedef struct {
    float cost;
    int block;
} ada_ranked;

/* For qsort: by cost, then by block. */
int ada_by_cost(const void *a, const void *b);

/* Scratch for that: [blocks] and [ADA_LANES]. */
typedef struct {
    float *cost, *sum, *apart;
    ada_ranked *order;
} ada_choosing;

/* Decides for one tile, from spread [blocks][ADA_LANES]: the blocks that move all rows least stand in, as
 * many as the errors above, with own = weight of the lane, stay within budget for in sum. Sets stands[] and
 * shift2[ADA_LANES], the summands; returns how many stand in. */
int ada_choose_stand_ins(const ada_kernels *k, const float *spread, int blocks, const float *weight,
                         double budget, double joint, const ada_choosing *at, bool *stands, float *shift2);

#endif
