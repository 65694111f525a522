/* From exact rows of a head to what is known of its error. */
#ifndef ADA_VERIFY_H
#define ADA_VERIFY_H

#include "adaattn.h"

/* Squared Frobenius error of a head, from rows drawn with known probabilities: an estimate, and limits of its
 * root beyond which it lies with a probability of 1e-3 each. */
typedef struct {
    double estimate2, lower2, upper2;
} ada_error_limits;

/* error2[i]: squared error of row i; weight[i]: the inverse of its probability, 1 where it was certain. */
ada_error_limits ada_limit_error(const double *error2, const double *weight, int n);

/* By how much the upper limit exceeds the estimate with n rows of heads as they usually are, and the rows, at
 * most `most`, at which it does so by `reach`. */
double ada_reach_of_rows(int n);
int ada_rows_for_reach(double reach, int most);

/* Of a number that is rounded to the dtype, relative. */
double ada_rounding_of(ada_dtype dtype);

#endif
