/* From profiles of rows to a predicted error of every rung, and from errors and rates to a choice. Pure
 * functions of one head: no clock, no globals, no array but what is passed in.
 */
#ifndef ADA_PLAN_H
#define ADA_PLAN_H

#include "adaattn.h"
#include "lowrank.h"
#include "probe.h"

/* What a planner may choose from, dear to cheap; those that only GPUs compute come last. */
#define ADA_CANDIDATES 11
extern const ada_choice ada_candidates[ADA_CANDIDATES];
/* The one that computes a choice, or -1: a pair that is forced only. */
int ada_candidate_of(ada_choice choice);

/* Speed of one core, or a whole GPU, per candidate; 0: not computed. */
typedef struct {
    double gflops[2]; /* of 2 T S (D + E) operations, at D = 64 and 128, without packing */
    double pack_ns;   /* to pack one element of the keys or values */
    double sparse;    /* share of the products' time that is left where all blocks stand in, or on a GPU are
                         left out; 1: not offered */
} ada_rate;

/* Predicted for one head: relative Frobenius error of the output per candidate, largest error of its lse. */
typedef struct {
    double error[ADA_CANDIDATES], lse_error[ADA_CANDIDATES];
    double entropy, entropy_std, block_entropy,
        local_entropy; /* nats; means over the rows, and their spread */
    double score_std;
    double out2; /* mean squared norm of the output's rows */
    struct {
        double kept, error, own, joint; /* share of the blocks, relative error, sparse.h */
    } level[ADA_LEVELS];                /* of what stands in, by the profiled rows */
    double exponent2; /* mean square of the product of a query's norm and the keys' spread */
    double noise2;    /* squared error of the output were weights off by their own size, over out2 */
    int rows;         /* behind it; 0: a guess from statistics alone */
    bool finite;      /* false: NaN, infinities or numbers beyond float's range take part */
} ada_forecast;

/* Standard deviations of noise that the largest of thousands of rows stays below. */
#define ADA_LARGEST_OF_MANY 4.5

/* From profiles of some rows of a head with these keys, for so many candidates; errors of others are NaN. Of
 * the problem its dtype, whose own rung rounds nothing, its head size and whether it is computed on a GPU
 * count. */
void ada_forecast_head(const ada_row_profile *rows, int n, const ada_key_probe *keys, const ada_problem *p,
                       int candidates, ada_forecast *forecast);

/* The errors of the plain fp32 rung alone, of the output and the largest of the lse, by profiles of rows
 * whose keys have these variances in sum; NaN where something is not finite. */
void ada_forecast_plain(const ada_row_profile *rows, int n, double total, const ada_problem *p, double *error,
                        double *lse_error);

/* The error of the plain fp32 rung by where its rows' weights lie: sums over rows of what their squared
 * scores times what their heaviest key leaves to others amount to, times that key's share and the mean
 * squared norm of a value, and times the row's own squared norm; and of these norms. */
double ada_forecast_weighed(double apart, double together, double out2);

/* By how much predictions from profiles may be off. */
#define ADA_MARGIN 1.25

/* What a choice must keep, and what it costs. */
typedef struct {
    double tolerance;
    double margin;              /* between the predicted error and the tolerance */
    bool lse;                   /* its error counts too */
    ada_rung dearest, cheapest; /* limits of the choice; ADA_RUNG_AUTO: none */
    double operations;          /* 2 (D + E) per visible pair of query and key */
    double elements;            /* of keys and values to pack, this head's share */
    int64_t D;
    unsigned sparse; /* bit per candidate: its blocks may stand in */
    unsigned barred; /* bit per candidate: not to be chosen */
    int plain;       /* the candidate that is exact for the dtype: for heads that are not finite */
} ada_task;

double ada_predicted_seconds(const ada_task *task, const ada_rate *rate);
/* Whether some rung below the plain one may keep the tolerance and save more than this, in seconds. */
bool ada_may_pay(const ada_task *task, const ada_rate rates[ADA_CANDIDATES], double cost);
/* The cheapest candidate that is computed and within the budget; the dearest allowed one where none is. */
int ada_plan_head(const ada_forecast *forecast, const ada_task *task, const ada_rate rates[ADA_CANDIDATES]);

/* The rung of a gradient below the exact one: scores and gradients of weights from 16-bit integers, sums over
 * queries and keys from bf16; and its usual error. */
#define ADA_GRADIENT_NARROW ((ada_choice){ADA_RUNG_INT16, ADA_RUNG_BF16})
#define ADA_GRADIENT_ERROR 4e-3
/* Whether a head's gradient is computed on it: within the budget, and faster than exactly with so many
 * operations of rows that verify it. */
bool ada_plan_gradient(const ada_task *task, double verifying, const ada_rate rates[ADA_CANDIDATES]);

typedef enum {
    ADA_STRUCTURE_AUTO,
    ADA_STRUCTURE_DENSE,
    ADA_STRUCTURE_SPARSE,
    ADA_STRUCTURE_LOW_RANK
} ada_structure;
/* What of a problem, by its argument's name, does not go with a structure; NULL: nothing. */
const char *ada_rules_out(const ada_problem *p, ada_structure structure);

/* What a head computes where some of its blocks stand in. */
typedef struct {
    int candidate;
    double budget2, joint;       /* as in ada_sparse */
    double kept, error, seconds; /* predicted */
} ada_sparse_choice;
/* Whether some candidate is faster so than the dense one, and within the budget; forced: whatever it takes,
 * the one that comes nearest where none is. */
bool ada_plan_sparse(const ada_forecast *forecast, const ada_task *task, const ada_rate rates[ADA_CANDIDATES],
                     int dense, bool forced, ada_sparse_choice *choice);

/* Of a head on a GPU of whose blocks of keys that share is computed, the others being left out. */
double ada_listed_seconds(const ada_task *task, const ada_rate *rate, double kept);
/* By more than rates scatter. */
bool ada_is_faster(double seconds, double than);

/* What a head of landmarks computes. */
typedef struct {
    int rank;
    double gain, limit;    /* as in ada_low_rank */
    double error, seconds; /* predicted */
} ada_rank_choice;
/* The problem's sizes that it goes by. */
typedef struct {
    ada_far_keys keys;
    double queries;
    int64_t D, E;
    int least, most; /* ranks that are allowed */
} ada_rank_task;
/* How fast landmarks are attended to, and chosen; before that a sample is taken, of which so long is waited
 * for. exact_gflops: of rows that are computed exactly; 0: they are few, and counted among the others. */
typedef struct {
    ada_rate products, choosing;
    double sample_seconds, exact_gflops;
} ada_rank_speed;
double ada_low_rank_seconds(const ada_task *task, const ada_rank_task *sizes, const ada_rank_speed *speed,
                            int rank);
/* To look for ranks up to that one. */
double ada_rank_looking_seconds(const ada_task *task, const ada_rank_task *sizes, const ada_rank_speed *speed,
                                int rank);
/* Most landmarks with which a head, looked for, may be faster than in these seconds, 0: none. */
int ada_most_ranks(const ada_task *task, const ada_rank_task *sizes, const ada_rank_speed *speed,
                   double seconds);
/* The same, or 0 where the head's own statistics say that it needs more. */
int ada_ranks_to_look_at(const ada_forecast *forecast, const ada_task *task, const ada_rank_task *sizes,
                         const ada_rank_speed *speed, double seconds);
/* What a head's ranks are looked for by; out2 as there. */
ada_rank_wish ada_rank_wish_of(const ada_task *task, const ada_rank_task *sizes, int most, double out2);
/* The least rank within the budget that is faster than these seconds; forced: the one that comes nearest. */
bool ada_plan_low_rank(const ada_rank_forecast *ranks, const ada_rank_wish *wish, const ada_task *task,
                       const ada_rank_task *sizes, const ada_rank_speed *speed, double seconds, bool forced,
                       ada_rank_choice *choice);

#endif
