/* What is measured of a head before its precision is chosen: statistics of keys, values and queries at O(SD)
 * and O(TD), and profiles of a few rows whose weights are computed in fp32. */
#ifndef ADA_PROBE_H
#define ADA_PROBE_H

#include "adaattn.h"
#include "kernels.h"
#include "memory.h"

/* Values whose squared norm is so far above the mean decide the error of rows that attend to them. */
#define ADA_HEAVIER 32

/* Keys and values of one key head that some query may attend to; others count nowhere. Keys are centred. */
#define ADA_HEAVY 7
/* What stands in may do so up to one of these sums of spreads (sparse.h) in a row: 2^(-4 - k) mean squared
 * values, squared. */
#define ADA_LEVELS 20
typedef struct {
    float stand_ins;         /* how many blocks */
    float error2, parts2;    /* squared shift of the row, and the sum of that of each block */
    float together2, apart2; /* squared sum of the spreads, and sum of their squares */
} ada_stand_ins;

typedef struct {
    float *mean, *variance; /* [D] of the keys */
    float *square;          /* [D] of the mean */
    float *norm2;           /* [keys] squared norm of a centred key */
    float *value2;          /* [keys] squared norm of a value */
    float *largest;         /* [blocks] largest magnitude in the centred keys of a block */
    uint64_t *seen;         /* [blocks] bit per key */
    double total;           /* sum of the variances */
    double largest2;        /* mean of largest squared, over keys */
    double step8, step16;   /* what rounding values to int8 and int16 does to the squared norm of one, mean */
    double count;
    double value2_mean, center2; /* mean squared norm of a value; squared norm of their mean */
    int64_t heavy[ADA_HEAVY];    /* keys whose values are far larger than others, the largest of them */
    int heavies;
    float *block_mean; /* [blocks][E] of values, NULL where nothing may stand in */
    float *reach;      /* [blocks] the largest distance of a value from that */
} ada_key_probe;

/* What one row has to do with the error of its head. Sums run over its keys; d is the squared distance of a
 * value from the row's output, so that noise of variance s^2 in the scores moves the output by s^2 sum p^2 d.
 */
typedef struct {
    double weight;                  /* rows of the head that it stands for */
    double out2;                    /* squared norm of the output */
    double p2d, p2d_norm, p2d_step; /* sum p^2 d; times the key's norm2; times its block's largest^2 */
    double p2, p2_norm, p2_step;    /* the same with 1 for d */
    double p2v, pv;                 /* sum p^2 and p times value2 */
    double round8, round16;         /* sum of d times the variance of rounding p to int8 and int16 */
    double spread, size; /* variance of its scores by the keys' variances, without and with their mean */
    double q2, qmax2;    /* squared norm and largest of scale * q */
    double reference;    /* largest score, about */
    double entropy, block_entropy; /* nats, over keys and over blocks of ADA_BLOCK keys */
    double local_entropy; /* nats, of the weights near the row's own place; NaN where there are none */
    double score_std;
    int64_t visible;
    bool good;                        /* all of it is finite */
    double blocks;                    /* that it sees */
    ada_stand_ins levels[ADA_LEVELS]; /* were it alone */
} ada_row_profile;

/* sparse: blocks may stand in. */
int64_t ada_key_probe_bytes(const ada_problem *p, bool sparse);
ada_key_probe ada_key_probe_of(const ada_problem *p, bool sparse, char *memory);
int64_t ada_probe_scratch_bytes(const ada_problem *p, bool sparse);
/* The keys of query heads h ... h + heads - 1 of sequence b, which share them: every step-th block of them.
 */
void ada_probe_keys(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, int64_t heads,
                    int64_t step, ada_key_probe *keys, char *scratch);
/* The same from the figures of a cache, without looking at a key, as far as the fp32 rung's error follows
 * from them; false where there are none, or queries do not see all that they count. */
bool ada_know_keys(const ada_problem *p, int64_t b, int64_t h, ada_key_probe *keys);
/* The blocks of keys that some query's span meets, and the step that looks at two of them at least. */
int64_t ada_step_of_keys(const ada_problem *p, int64_t b, int64_t step, int64_t *first, int64_t *end);
/* What follows from keys->count, mean, variance, value2 and seen, and from sums over the keys: of their
 * block's largest squared, of value2; squared norms of the largest magnitudes and of the sum of values. */
void ada_finish_keys(const ada_problem *p, double largest2, double value2, double most2, double center2,
                     ada_key_probe *keys);
/* Of a query: sums of its squares times the keys' variances and squared means, of its squares; its largest.
 */
typedef struct {
    float spread, by_mean, norm2, most;
} ada_query_figures;
/* Spreads of a head's rows. */
typedef struct {
    double largest;
    double outliers; /* sum of those that are far above the mean: rows that a sample may miss */
    bool finite;     /* all of them are */
} ada_spreads;

/* size[i] (i < T): how much row i may be expected to contribute to the squared error, in units of its own; 0
 * where it sees no key or is not finite. */
ada_spreads ada_probe_queries(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                              const ada_key_probe *keys, float *size, char *scratch);
/* The index-th number of a stream in [0, 1), by splitmix64. */
double ada_uniform(uint64_t stream, int index);
/* share[i] += size[i] over the sum of all, or 1 for each row where size is NULL, over their number; only rows
 * whose size in live is above 0. */
void ada_add_shares(float *share, const float *size, const float *live, int64_t T);
/* Up to n rows, ascending, drawn with probabilities like their shares; weight[i] is the inverse of a row's
 * probability, exactly 1 for one that is certain. Depends on the shares, n and the stream alone; other shares
 * are other draws. */
int ada_sample_rows(const float *share, int64_t T, int n, uint64_t stream, int64_t *rows, double *weight);
/* n <= ADA_EXACT_ROWS of them; weight is left to the caller. */
void ada_profile_rows(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                      const ada_key_probe *keys, const int64_t *rows, int n, ada_row_profile *profiles,
                      char *scratch);
/* A profile for the whole head from the statistics alone, as if its values were independent of its keys. */
void ada_guess_profile(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                       const ada_key_probe *keys, ada_row_profile *profile, char *scratch);
/* The same from figures of n of the rows to guess by. */
#define ADA_GUESS_ROWS 32
int ada_rows_to_guess_by(const ada_problem *p, int64_t b, int64_t rows[ADA_GUESS_ROWS]);
void ada_guess_by(const ada_problem *p, int64_t b, const ada_key_probe *keys, const int64_t *rows,
                  const ada_query_figures *figures, int n, ada_row_profile *profile);

/* Makes a guess that of a row with this spread and all its weight on one key: the one whose lse errs most. */
void ada_peak_profile(const ada_key_probe *keys, double spread, ada_row_profile *guess);

/* From some queries, keys and values of a head alone: a profile of all its rows and one, without weight, of
 * the row whose lse errs most; returns how many, 0 where no row sees a key. Of keys what is one number. Only
 * what the plain rung's error follows from; with rungs, and at most ADA_FEW_SCORES, those of all but 8-bit
 * values. good: the head has at most that many, and no number that is far larger than those of these rows.
 * Not beside masks and biases, which make other weights. The profiles are sums over rows whose number is the
 * inverse of the weight.
 */
int ada_glance(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, bool rungs,
               ada_row_profile profiles[2], ada_key_probe *keys, char *scratch);
/* Mean squared norm of some rows of its output. */
double ada_glance_at_output(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, char *scratch);
int64_t ada_glance_scratch_bytes(const ada_problem *p);

/* What both have in common: figures of n <= ADA_BLOCK queries, and the parts of a profile that these decide.
 */
void ada_figures_of(const ada_problem *p, const ada_kernels *k, const ada_key_probe *keys, const float *q,
                    ptrdiff_t ld, int n, ada_query_figures *figures);
void ada_profile_query(const ada_problem *p, const ada_query_figures *figures, ada_row_profile *x);
/* Of n rows that spread so, the share of a weight's square in its row, were scores normal:
 * sum p^2 = exp(spread) / keys, at most 1; one_over[i]: 1 / keys. */
void ada_crowd_of(const float *spread, const float *one_over, int n, float *crowd);

#endif
