/* One call that certifies its heads, in progress: what certify.c, certify_pages.c and certify_bounds.c share.
 * `head` is a key head of one sequence; the queries of its query heads, a group, are its rows. */
#ifndef ADA_CERTIFYING_H
#define ADA_CERTIFYING_H

#include <math.h>
#include <stdatomic.h>

#include "adaattn.h"
#include "codes.h"
#include "execute.h"

enum { ADA_CERTIFY_CHUNK = 16 };    /* pages of a task */
enum { ADA_CERTIFY_BUCKETS = 128 }; /* of gains, ada_choose_tiers */

/* How a page counts: by its mean value, by the codes of its values, by fine codes of keys and values, as it
 * is, or not at all, as no row sees it. */
typedef enum { ADA_TIER_MEAN, ADA_TIER_CODES, ADA_TIER_FINE, ADA_TIER_EXACT, ADA_TIER_HIDDEN } ada_tier;

/* A page's weights for one row. scale: from those that are kept to those of the whole row; the others are of
 * the latter: their sum, norm, and norm around their mean. */
typedef struct {
    float scale, sum, norm, apart;
} ada_page_mass;

typedef struct {
    float reference;       /* octaves */
    double z;              /* sum of all weights, the sink's among them */
    double query;          /* norm, scaled */
    double rounding, bias; /* of a score: for a key of norm 1, and for any */
    double norm;           /* of the output */
    double lse;
    float *o;
} ada_row_state;

typedef struct {
    atomic_bool unfit; /* numbers that are not finite or too large, or too many of them to read */
    bool open;         /* not certified yet */
    int64_t coded;     /* pages that have codes */
    double bytes;      /* read, relative to all */
} ada_group_state;

typedef struct {
    const ada_problem *p;
    const ada_kernels *k;
    double tolerance;
    int64_t group, rows, pages, chunks;
    int attempt;
    ada_group_state *groups; /* [B * G] */
    ada_row_state *states;   /* [B * G][rows] */
    double *bounds;          /* [B * H] */
    float *weights;          /* [B * G][pages][rows][ADA_PAGE] */
    ada_page_mass *masses;   /* [B * G][pages][rows] */
    float *away;             /* [B * G][pages][rows]: of the page's centre from the output */
    float *longest;          /* [B * G][pages][2]: row of keys and of values, of pages without codes */
    uint8_t *tiers;          /* [B * G][pages] */
    float *partials;         /* [B * G][chunks][rows][E + 1] */
    float *outs;             /* [B * G][rows][E] */
    char *scratch;
    int64_t scratch_bytes;
} ada_certifying;

/* Of a worker. */
typedef struct {
    float *queries;        /* [rows][D] */
    float *scaled;         /* [ADA_ROW_GROUP][D], D as codes have it */
    float *centres;        /* [rows][ADA_BLOCK] */
    float *scores, *added; /* [rows][ADA_PAGE] */
    float *bias;           /* [ADA_BLOCK] */
    float *sums;           /* [ADA_ROW_GROUP][E] */
    float *weights;        /* [ADA_ROW_GROUP][ADA_PAGE] */
    uint8_t *steps;        /* [pages][2] */
    double *gains;         /* [ADA_CERTIFY_BUCKETS][rows] */
} ada_certify_scratch;

/* Of the group of rows from that one on. */
static inline int ada_rows_from(const ada_certifying *r, int64_t row) {
    return (int)(r->rows - row < ADA_ROW_GROUP ? r->rows - row : ADA_ROW_GROUP);
}

/* Of sequence b. */
static inline int64_t ada_pages_of(const ada_certifying *r, int64_t b) {
    return (ada_key_count(r->p, b) + ADA_PAGE - 1) / ADA_PAGE;
}

static inline int ada_keys_of(const ada_certifying *r, int64_t b, int64_t page) {
    const int64_t left = ada_key_count(r->p, b) - page * ADA_PAGE;
    return left < ADA_PAGE ? (int)left : ADA_PAGE;
}

/* The sum of a row's weights and its sink's, relative to its reference. */
static inline double ada_with_sink(const ada_problem *p, int64_t h, const ada_row_state *state, double sum) {
    return sum + exp2(ada_sink(p, h) * ADA_LOG2E - (double)state->reference);
}

/* Of r only the sizes are read. */
ada_certify_scratch ada_certify_scratch_of(const ada_certifying *r, ada_carver *c);

/* certify_pages.c */
void ada_load_queries(const ada_certifying *r, const ada_certify_scratch *s, int64_t b, int64_t g);
/* Tasks of ADA_CERTIFY_CHUNK pages: their weights by codes and masses relative to each page's own largest
 * score, as they are where there are no codes. */
void ada_weigh_pages(void *context, ada_job *job, int64_t task, int worker);
/* Tasks of as many: what they add to the outputs by their tiers. */
void ada_add_pages(void *context, ada_job *job, int64_t task, int worker);

/* certify_bounds.c */
/* Distances of the centres from the rows' outputs, upper bounds. */
void ada_measure_away(ada_certifying *r, int64_t head);
/* Tasks of a key head: its pages' tiers, or that it is unfit. */
void ada_choose_tiers(void *context, ada_job *job, int64_t head, int worker);
/* The bound of the query head whose rows begin at first, relative to what the exact output is at least. */
double ada_bound_of(const ada_certifying *r, int64_t head, int64_t first);

#endif
