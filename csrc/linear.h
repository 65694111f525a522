/* Products of rows with a weight whose elements are kept as codes of 16 bits, whose high bytes alone are
 * codes of 8: for so few rows that reading the weight is what takes the time.
 *
 * Codes are q = 256 high + low with scale * q for the element, one scale for ADA_LINEAR_DEPTH inputs of a
 * feature; a byte b stands for b - 128. Inputs are computed with in 23 bits (code_products), so that what the
 * weight's rounding left out is the error: of a row x that is a sum over k of x[k] left[k], which the squared
 * norms of the columns of left tell as far as its elements do not depend on each other. A row that would miss
 * the tolerance takes the low bytes too, then the weight itself in fp32, then in fp64.
 */
#ifndef ADA_LINEAR_H
#define ADA_LINEAR_H

#include "adaattn.h"

#define ADA_LINEAR_LANES 256 /* features of a block: the last one has fewer, a multiple of 16 */
#define ADA_LINEAR_DEPTH 256 /* inputs of a group, the last one up to a multiple of 4 */

typedef enum {
    ADA_LINEAR_INT8,
    ADA_LINEAR_INT16,
    ADA_LINEAR_FP32,
    ADA_LINEAR_FP64,
    ADA_LINEAR_RUNGS
} ada_linear_rung;

typedef struct {
    ada_array x;             /* (..., K) float */
    const float *weight;     /* [N][K] */
    const uint8_t *codes[2]; /* high, low: of blocks, in these of groups, as code_products has them */
    const float *scale;      /* [groups][lanes of all blocks] what a one in the high byte stands for */
    const double *left2;     /* [3][K] squared norms of the columns of what int8, int16 and fp32 leave
                                out; NULL: not known, and no codes */
    double weight2;          /* squared norm of the weight */
    const float *bias;       /* [N], or NULL */
    float *out;              /* [rows][N] */
    int64_t N, K;
    double tolerance;      /* relative error of a row; 0: first is what is wanted */
    ada_linear_rung first; /* the cheapest one to try */
    double *told;          /* [rows][2] the rung in the end and the predicted error, or NULL */
    int64_t num_threads;   /* 0: the default */
} ada_linear;

ada_status ada_linear_run(const ada_linear *linear, bool (*interrupt)(void *), void *context,
                          ada_error *error);

#endif
