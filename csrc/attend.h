/* One call with or without an error budget: probe, plan, execute, verify. */
#ifndef ADA_ATTEND_H
#define ADA_ATTEND_H

#include "adaattn.h"
#include "plan.h"

/* What became of one head. */
typedef struct {
    ada_choice choice;
    ada_choice dense;             /* where landmarks do not do */
    int rank;                     /* landmarks; 0: none */
    double rank_gain, rank_limit; /* as in ada_low_rank */
    ada_forecast forecast;
    double seconds[ADA_CANDIDATES]; /* predicted, of one core */
    double budget2, joint;          /* as in ada_sparse */
    double kept;                    /* share of the blocks that are computed: predicted, then counted */
    double predicted_error, measured_error, error_limit, lse_error; /* NaN: not known */
    double error_bound;                                             /* certified; NaN: none is */
    int verified_rows;
    bool retried; /* the first choice failed, or could not hold the head's numbers */
} ada_head;

/* A head of a plan made earlier. */
typedef struct {
    ada_choice choice;
    double predicted_error; /* NaN: not known */
    double budget2, joint, kept;
    int rank;
    double rank_gain, rank_limit;
} ada_planned;

typedef struct {
    double tolerance;         /* 0: no budget, the problem's precision is computed as it is */
    ada_choice asked;         /* AUTO, or the precision that was forced: it is verified and never changed */
    const ada_planned *given; /* (B, H), or NULL */
    bool verify;
    bool verify_all;            /* even where that costs more than it may be worth */
    bool report;                /* heads are to be told all that became of them */
    ada_structure structure;    /* that was asked for */
    int least_rank, most_rank;  /* limits of the landmarks; 0: none */
    bool plan_only;             /* nothing is executed */
    ada_rung dearest, cheapest; /* limits of the choice; AUTO: none */
    const ada_rate *rates;      /* [ADA_CANDIDATES] */
    ada_picture *picture;       /* of sparse heads, all zeros before; NULL: not wanted */
    ada_head *heads;            /* (B, H) results; may be NULL without a tolerance */
    double seconds[4];          /* probe, plan, execute, verify: the whole call */
} ada_budget;

ada_status ada_attend(const ada_problem *problem, ada_budget *budget, bool (*interrupt)(void *),
                      void *context, ada_error *error);

/* One of which nothing is known yet. */
ada_head ada_unknown_head(void);

/* Floating-point operations of both products of a call, over the keys that spans leave. */
double ada_operations(const ada_problem *problem);
/* Of one head of sequence b. */
double ada_operations_of_head(const ada_problem *problem, int64_t b);

#endif
