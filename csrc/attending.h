/* One call under a budget, in progress: what attend.c and verify.c share. */
#ifndef ADA_ATTENDING_H
#define ADA_ATTENDING_H

#include "attend.h"
#include "execute.h"
#include "probe.h"
#include "verify.h"

#define ADA_MOST_ROWS 32
/* Groups of rows of all heads are tasks. */
#define ADA_ROW_GROUPS (ADA_MOST_ROWS / ADA_EXACT_ROWS)
/* Between a prediction that is not verified and the tolerance. */
#define ADA_MARGIN_GUESSED 3
/* Exact rows are this much finer than the tolerance. */
#define ADA_FINER 20

/* At the keys of a head: at none, at some blocks, which tell whether the plain rung will do and no more, at
 * all. */
typedef enum { ADA_LOOK_NONE, ADA_LOOK_SOME, ADA_LOOK_ALL } ada_look;

/* Of keys that only tell whether the plain rung will do: at most one block in so many, but two. */
#define ADA_LOOK_STEP 64

/* One head on its way through the phases. */
typedef struct {
    int64_t rows[ADA_MOST_ROWS]; /* of the choice, later those to verify */
    double weight[ADA_MOST_ROWS];
    int n;
    ada_look look; /* none: sizes and forecast are not known */
    bool exact_f64;
    double out2;     /* squared norm of the output; NaN or infinite: not to be verified */
    double value2;   /* mean squared norm of the values */
    bool glanced;    /* some queries, keys and values were looked at: the forecast is a guess by these, */
    unsigned barred; /* bit per candidate that is not worth it */
    double glanced2; /* that expects outputs of this mean squared norm, */
    double center2;
    double total;      /* with keys whose variances have this sum */
    bool trusted;      /* far within the budget by a glance, or compared at once: not to be verified */
    bool uneven;       /* a glance says that some rows are far larger than others */
    bool open;         /* to be verified */
    bool known;        /* rows are those to verify, and their exact ones are known */
    bool doubted;      /* these are its second rows */
    bool was_sparse;   /* the last time that it was computed again */
    double seconds;    /* predicted, of what was chosen so far */
    double outliers;   /* rows like the one with the largest spread, so few that a sample may miss them */
    ada_forecast peak; /* of the row whose lse errs most */
} ada_head_state;

typedef struct ada_attending ada_attending;

/* Who looks at a call's arrays and computes its heads. */
typedef struct {
    /* Takes its memory for the call; NULL: it needs none. */
    void (*carve)(ada_attending *a, ada_carver *carver);
    /* Statistics, guesses and profiles of the heads that are looked at. */
    ada_status (*probe)(ada_attending *a, ada_error *error);
    /* The listed heads (NULL: all) by the problem's precision; a->ran says by which in the end. */
    ada_status (*execute)(ada_attending *a, const ada_problem *problem, const int64_t *heads, int64_t n,
                          ada_error *error);
    /* Makes outputs known to output_norm. */
    ada_status (*fetch_norms)(ada_attending *a, ada_error *error);
    /* Squared norm of a head's output, in norms those of its rows. */
    double (*output_norm)(const ada_attending *a, int64_t head, float *norms, char *scratch);
    /* Exact rows of open heads where they are not known, and makes the output's known to output. */
    ada_status (*exact)(ada_attending *a, ada_error *error);
    /* Numbers of the output's row rows[i] of a head from e on, at most ADA_PIECE; returns how many. */
    int (*output)(const ada_attending *a, int64_t head, int i, int e, double *x);
    double (*output_lse)(const ada_attending *a, int64_t head, int i);
    /* Chooses heads that leave something out, behind the plan of dense ones; NULL: attend.c does. */
    ada_status (*thin)(ada_attending *a, ada_error *error);
    /* Chooses heads that landmarks stand for, behind both. */
    ada_status (*plan_ranks)(ada_attending *a, ada_error *error);
    /* Computes them. */
    ada_status (*execute_ranks)(ada_attending *a, const ada_low_rank *low, const int64_t *heads, int64_t n,
                                ada_error *error);
    /* Whether such a head is computed by this choice; NULL: attend.c knows. */
    bool (*leaves_out)(const ada_attending *a, ada_choice choice);
    double look_operations; /* to look at an element of a head, in operations of the plain rung, */
    double look_seconds;    /* and at any head */
} ada_backend;

struct ada_attending {
    const ada_problem *p;
    const ada_kernels *k;
    const ada_backend *backend;
    void *device; /* of a backend for GPUs */
    ada_budget *budget;
    bool (*interrupt)(void *);
    void *context;
    int64_t per_head; /* query heads that share a key probe */
    int64_t key_heads;
    char *probes; /* [key_heads] */
    int64_t probe_bytes;
    ada_key_probe *keys;       /* [key_heads] */
    ada_head_state *states;    /* [B * H] */
    float *sizes;              /* [B * H][T] of the rows, ada_probe_queries */
    float *norms;              /* [B * H][T] squared, of the output's rows */
    ada_row_mass *mass;        /* [B * H][T] of those without landmarks; NULL: not wanted, or on a GPU */
    float *shares;             /* [B * H][T] */
    ada_row_profile *profiles; /* [B * H][ADA_MOST_ROWS] */
    double *exact_lse;         /* [B * H][ADA_MOST_ROWS] */
    double *error2;            /* [B * H][ADA_MOST_ROWS] */
    double *exact_o;           /* [B * H][ADA_MOST_ROWS][E] */
    ada_choice *ran;           /* [B * H] */
    unsigned sparse;           /* bit per candidate: heads may be planned so that blocks stand in */
    bool ranks;                /* heads may be planned with landmarks */
    double *budget2, *joint;   /* [B * H], these and the next two as in ada_sparse */
    float *shift2;             /* [B * H][T] */
    double *kept;              /* [B * H] */
    int64_t *list;             /* [4][B * H] those to compute; and of ada_execute_heads */
    int *rank;                 /* [B * H], these and the next two as in ada_low_rank */
    double *gain, *limit;
    double *operations; /* [B] of a head */
    char *rank_scratch; /* while ranks are looked for */
    int64_t rank_scratch_bytes;
    bool *failed;
    char *scratch;
    int64_t scratch_bytes;
};

static inline int64_t ada_head_count(const ada_attending *a) { return a->p->B * a->p->H; }

/* Whether rows may be verified at all. */
static inline bool ada_has_exact_rows(const ada_attending *a) {
    return a->p->T >= ADA_LEAST_QUERIES || (a->budget->verify_all && !a->p->on_gpu);
}

static inline bool ada_is_forced(const ada_budget *b) { return b->asked.qk != ADA_RUNG_AUTO; }

double ada_seconds_now(void);

/* Something of a head's keys is left out. */
static inline bool ada_is_thinned(const ada_head *h) { return h->budget2 > 0 || h->rank > 0; }

static inline bool ada_all_fp32(ada_choice c) { return c.qk == ADA_RUNG_FP32 && c.pv == ADA_RUNG_FP32; }

/* All in fp32, whose own errors lie in few rows. */
static inline bool ada_is_fp32(const ada_head *h) { return ada_all_fp32(h->choice) && h->rank == 0; }

/* Because that was asked for: it is not replaced where it misses the tolerance. */
static inline bool ada_is_thinned_by_name(const ada_budget *b, const ada_head *h) {
    return (h->rank > 0 && b->structure == ADA_STRUCTURE_LOW_RANK) ||
           (h->budget2 > 0 && b->structure == ADA_STRUCTURE_SPARSE);
}

extern const ada_backend ada_cpu_backend;
/* ada_attend with a budget, by this backend. */
ada_status ada_attend_within(const ada_problem *p, const ada_backend *backend, void *device,
                             ada_budget *budget, bool (*interrupt)(void *), void *context, ada_error *error);
/* Forecasts by a guess, which is the first profile of the head, and chooses rows to profile. */
void ada_consider_head(ada_attending *a, int64_t head, const ada_spreads *spreads);
/* Backends' functions in verify.c for the CPU. */
ada_status ada_cpu_fetch_norms(ada_attending *a, ada_error *error);
double ada_cpu_output_norm(const ada_attending *a, int64_t head, float *norms, char *scratch);
ada_status ada_cpu_exact(ada_attending *a, ada_error *error);
int ada_cpu_output(const ada_attending *a, int64_t head, int i, int e, double *x);
double ada_cpu_output_lse(const ada_attending *a, int64_t head, int i);

/* Arrays of a half format, whose products a GPU's tensor cores take as they are: what its rungs do to them is
 * known without looking. */
static inline bool ada_is_known(const ada_problem *p) {
    return p->on_gpu && (p->query.dtype == ADA_F16 || p->query.dtype == ADA_BF16);
}

/* So many of a head's candidates have a prediction: where some keys were looked at, the exact ones. */
static inline int ada_candidates_of(const ada_attending *a, int64_t head) {
    return a->states[head].look == ADA_LOOK_SOME ? 2 : ADA_CANDIDATES;
}

/* The candidate that is exact for the arrays' dtype. */
static inline int ada_plain_candidate(const ada_problem *p) { return p->query.dtype == ADA_F64 ? 0 : 1; }

/* Few queries and stored keys are computed in fp32, or fp64, whatever the budget: memory is what they wait
 * for. */
static inline bool ada_is_fixed(const ada_problem *p) { return p->stored || p->T <= ADA_ROWS_MAX; }

/* Of a candidate that is chosen for a head which nobody looked at. */
double ada_unseen_error(const ada_problem *p, int candidate);
/* Of a candidate of a head, by what is known of that. */
double ada_error_on(const ada_attending *a, int64_t head, int candidate);
/* Between a head's prediction and the tolerance. */
double ada_margin_of(const ada_attending *a, int64_t head);
/* Whether heads may be sparse, by what was asked for and their options. Short ones win too little; by name a
 * tile and a block suffice. */
bool ada_may_be_sparse(const ada_problem *p, const ada_budget *budget);
/* Sizes of landmarks of a head with these keys. */
ada_rank_task ada_rank_task_of(const ada_attending *a, const ada_far_keys *keys);
/* Landmarks for a head, at most so many, where they compute it within the budget and faster than the choice
 * that was made; out2 as in ada_rank_wish; sample and scratch are ada_forecast_low_rank's. */
void ada_choose_rank(const ada_attending *a, int64_t head, int most, double out2, const ada_rank_speed *speed,
                     const struct ada_sample *sample, char *scratch);
bool ada_run_tasks(ada_attending *a, ada_task_fn *task, int64_t tasks, double multiply_adds);
/* Rows that a task of ADA_ROW_GROUPS per head has to do with. */
int ada_rows_of_task(const ada_attending *a, int64_t task, int64_t *head, int *first);
double ada_row_work(const ada_attending *a); /* multiply-adds of the rows that are chosen */
ada_task ada_task_of(const ada_attending *a, int64_t head, double margin);
/* Draws up to n rows of a head: by equal shares, by what they may contribute to the error and, where they are
 * known, by the norms of the output's rows, in equal parts; by bounds of errors, where there are some, as
 * much as by all others. Of a head in fp32 also by where its weights lie; norms are spoilt. */
void ada_draw_rows(ada_attending *a, int64_t head, int n, float *norms, const float *shift2, uint64_t stream);
/* A thinned head as if nothing had been left out of it. */
void ada_make_dense(ada_head *head);
/* The heads on the list, by their choices. */
ada_status ada_execute_heads(ada_attending *a, const int64_t *list, int64_t n, ada_error *error);

/* Whether weights are what queries and keys alone make of them, as guesses have it. */
static inline bool ada_guesses_are_fair(const ada_problem *p) {
    return !p->attn_mask.data && !p->alibi_slopes.data && !p->drop_below;
}

/* Guesses a head's errors by a glance, before it is computed or after; false where that says nothing. */
bool ada_guess_by_glance(ada_attending *a, int64_t head, char *scratch);
/* Told of heads as they are done, where ada_may_glance: of plain ones, and of small ones on other rungs. */
bool ada_may_glance(const ada_attending *a, ada_choice choice);
void ada_glance_at(void *attending, int64_t head, int worker);

/* Sizes of a head's rows: 1 where it sees a key, else 0. scratch: for a mask that is read. */
void ada_mark_seeing_rows(ada_attending *a, int64_t head, char *scratch);
/* Compares heads with exact rows, and computes those that may miss the tolerance again, higher up. */
ada_status ada_verify_heads(ada_attending *a, ada_error *error);
/* So many rows cost a few percent of a call. */
int ada_most_rows_to_verify(int64_t T);

#endif
