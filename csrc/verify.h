/* From exact rows of a head to what is known of its error. */
#ifndef ADA_VERIFY_H
#define ADA_VERIFY_H

#include "adaattn.h"
#include "kernels.h"

/* Fewer queries are not verified unless that is asked for: it costs as much as computing them. */
#define ADA_LEAST_QUERIES 64

/* Squared Frobenius error of a head, from rows drawn with known probabilities: an estimate, and limits of its
 * root beyond which it lies with a probability of 1e-3 each. */
typedef struct {
    double estimate2, lower2, upper2;
} ada_error_limits;

/* error2[i]: squared error of row i; weight[i]: the inverse of its probability, 1 where it was certain. */
ada_error_limits ada_limit_error(const double *error2, const double *weight, int n);

/* What these limits say of a head whose output or gradient, error included, has the squared norm norm2. */
typedef struct {
    double error, limit; /* estimate and upper limit */
    bool misses;         /* it is above what is allowed, beyond doubt */
} ada_relative_error;
ada_relative_error ada_relate_error(const ada_error_limits *limits, double norm2, double allowed);

/* Numbers of a row of an array from column c on, at most ADA_PIECE; returns how many. */
enum { ADA_PIECE = 64 };
int ada_piece_of_row(const ada_kernels *k, const ada_array *a, int64_t b, int64_t h, int64_t row, int c,
                     double piece[ADA_PIECE]);

/* Squared norms of the rows of an array's head; their sum, also where it is beyond a float's squares. copy:
 * [64][width]. */
double ada_row_norms(const ada_kernels *k, const ada_array *a, int64_t b, int64_t h, float *norms,
                     float *copy);

/* By how much the upper limit exceeds the estimate with n rows of heads as they usually are, and the rows, at
 * most `most`, at which it does so by `reach`. */
double ada_reach_of_rows(int n);
int ada_rows_for_reach(double reach, int most);

/* Of a number that is rounded to the dtype, relative. */
double ada_rounding_of(ada_dtype dtype);

#endif
