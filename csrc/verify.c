/* Horvitz-Thompson estimation with limits by Student's t.
 *
 * A few rows say little about how much rows differ, and heads are alike in that: the variance of a draw is
 * averaged with what heads show in general, as if that came from PRIOR_FREEDOM draws more (moderated t,
 * Smyth, doi 10.2202/1544-6115.1027). tests/test_sampling.py simulates the coverage.
 */
#include "verify.h"

#include <math.h>

#define PRIOR_FREEDOM 6
#define PRIOR_VARIANCE 1.2 /* of a draw, relative to the square of the total; real heads: 0.6 to 2.5 */

int ada_rows_for_reach(double reach, int most) {
    /* Rows n at which the upper limit is about `reach` times the estimate where rows differ as the prior
     * says. */
    const double variance = reach * reach - 1, root = 3.8 * sqrt(PRIOR_VARIANCE) / fmax(variance, 1e-3);
    return root * root < most ? (int)ceil(root * root) : most;
}

double ada_reach_of_rows(int n) { return sqrt(1 + 3.8 * sqrt(PRIOR_VARIANCE / n)); }

/* Quantile 0.999 of Student's t for at least 6 degrees of freedom (Cornish and Fisher's expansion; 3 %). */
static double student(double freedom) {
    const double z = 3.0902, z3 = z * z * z, z5 = z3 * z * z;
    return z + (z3 + z) / (4 * freedom) + (5 * z5 + 16 * z3 + 3 * z) / (96 * freedom * freedom);
}

ada_error_limits ada_limit_error(const double *error2, const double *weight, int n) {
    double certain = 0, drawn = 0, square = 0;
    int draws = 0;
    for (int i = 0; i < n; i++) {
        if (weight[i] == 1)
            certain += error2[i];
        else
            drawn += weight[i] * error2[i], draws++;
    }
    if (draws == 0) return (ada_error_limits){certain, certain, certain};
    for (int i = 0; i < n; i++) {
        const double total = weight[i] * error2[i] * draws; /* what this draw alone would say */
        if (weight[i] != 1) square += (total - drawn) * (total - drawn);
    }
    const double freedom = PRIOR_FREEDOM + draws - 1;
    const double variance = (PRIOR_FREEDOM * PRIOR_VARIANCE * drawn * drawn + square) / freedom;
    const double reach = student(freedom) * sqrt(variance / draws);
    /* Draws are skewed and not below 0: a rare one that is drawn puts the estimate far above the truth, and
     * shows in the reach. */
    const double over = 1 + (drawn > 0 ? reach / drawn : 0), lower = drawn / (over * over);
    return (ada_error_limits){certain + drawn, certain + lower, certain + drawn + reach};
}
