/* Low rank for diffuse heads: the exponential kernel H(x, y) = exp(x.y) of queries and centred keys, replaced
 * by its projection onto few landmark keys, H(q, L) H(L, L)^-1 H(L, k). With F = H(., L) U, U U' the inverse,
 *
 *     out(q) = F(q) . (F' V) / F(q) . (F' 1),
 *
 * so that keys and values are read once for all queries. Landmarks are chosen by randomly pivoted Cholesky
 * (Chen, Epperly, Tropp, Webber, arXiv 2207.06503; in blocks 2410.03969) among a sample of the keys.
 *
 * What the kernel of a query loses is executed for every row: the residual r(q) = H(q, q) - |F(q)|^2 bounds
 * |H(q, k) - F(q).F(k)|^2 by r(q) r(k). A row's squared error is estimated as gain * r(q) / sum^2, with a
 * gain that sampled rows and keys tell: rows that landmarks do not span have large residuals, and are
 * computed exactly.
 *
 * Where queries see different keys, as under a causal limit, sums over keys are kept at every ADA_BIN of
 * them: a query takes those of the last whole bin that its tile sees, and goes on from there key by key,
 * exactly.
 */
#ifndef ADA_LOWRANK_H
#define ADA_LOWRANK_H

#include "adaattn.h"
#include "kernels.h"
#include "visible.h"

/* Most landmarks: their factor is R^2 for every query. */
#define ADA_MOST_RANK 512
#define ADA_RANK_LEVELS 10

/* What a number of landmarks does to a head, by sampled rows. */
typedef struct {
    int rank;
    double error2; /* mean squared error of a row of the output */
    double gain;
    double limit; /* of a residual; rows above it are to be computed exactly */
    double exact; /* share of the rows that are to be computed exactly */
} ada_rank_level;

typedef struct {
    int levels; /* that were looked at, rank ascending; 0: numbers beyond what the kernel can hold */
    ada_rank_level level[ADA_RANK_LEVELS];
    bool exhausted; /* the last one has all landmarks that residuals leave */
    double out2;    /* mean squared norm of a row of the output, by the sample */
} ada_rank_forecast;

#define ADA_BIN 256

/* The keys of sequence b, from the first one on that its queries see. */
typedef struct {
    int64_t first, end;
    int64_t bin, bins; /* keys of a bin, and how many are whole */
    bool whole;        /* all queries see all keys, which are one bin */
} ada_far_keys;

/* False where queries do not begin with the same key, or see none. */
bool ada_far_keys_of(const ada_problem *p, int64_t b, ada_far_keys *keys);
int64_t ada_landmark_scratch_bytes(const ada_problem *p, int most);
/* What ranks of a head are looked for by. */
typedef struct {
    int least, most;
    double out2;      /* mean squared norm of a row of the output; 0: the sample's */
    double error;     /* of the output, relative */
    double lse_error; /* of any row; INFINITY: it is not wanted */
} ada_rank_wish;

/* Of head (b, h): levels from wish->least landmarks on, until one fulfils it or none will. sample: NULL where
 * the arrays can be read. */
struct ada_sample;
void ada_forecast_low_rank(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                           const struct ada_sample *sample, const ada_rank_wish *wish,
                           ada_rank_forecast *forecast, char *scratch);
/* Whether that is one which does. */
bool ada_fulfils(const ada_rank_wish *wish, const ada_rank_forecast *forecast, int level);

/* Heads to compute, in fp32. */
typedef struct {
    const int *rank;
    const double *gain;  /* over the budget of a row */
    const double *limit; /* of a row's residual over its squared sum; INFINITY: none is computed exactly */
    float *shift2;       /* (B, H, T): the rows' estimates, in units of the budget; NULL: not wanted */
    bool *failed;        /* [n] heads whose numbers or rows do not allow it: their outputs are undefined */
} ada_low_rank;

/* rank, gain and failed are in the order of the list. */
ada_status ada_execute_low_rank(const ada_problem *p, const ada_low_rank *low, const int64_t *heads,
                                int64_t n_heads, bool (*interrupt)(void *), void *context, ada_error *error);

/* Operations of choosing a head's landmarks, */
double ada_landmark_operations(double keys, int64_t D, int rank);
/* of attention to them, */
double ada_low_rank_operations(const ada_far_keys *keys, double queries, int64_t D, int64_t E, int rank);
/* and of a forecast up to that rank. */
double ada_forecast_operations(double keys, int64_t D, int64_t E, int rank);

#endif
