/* Gradients within a budget: sampled rows beside exact ones, and what follows from them, for the CPU's and a
 * GPU's alike.
 *
 * Rows of dQ depend on one query: exact ones come from the inputs alone, so what the forward pass left in its
 * out and lse counts as an error. Rows of dK and dV depend on all queries, and are computed with the lse and
 * the out that were given; what those put into them follows from what they are off by in the sampled rows of
 * queries: as independent errors of rows, and as their mean, which all rows would share.
 */
#ifndef ADA_GRADIENT_CHECK_H
#define ADA_GRADIENT_CHECK_H

#include "attending.h"
#include "backward.h"
#include "memory.h"

#define ADA_QUERY_STREAM 4
#define ADA_KEY_STREAM 5

/* Of a row that is computed for itself: its lse in log2 units, its sum of weights times their gradients, the
 * squared norms of its query times the scale and of its grad_out, and sums over its keys: of squared weights,
 * of squared slopes and gradients of its scores and of their products, where a slope is what a unit of the
 * first sum moves a gradient by; and the lse and the first sum that its gradients were computed with. */
typedef struct {
    double lse, delta, query2, grad2, weight2, slope2, score2, both, given_lse, given_delta;
} ada_true_row;

/* Of one head: queries, or the keys of a key head. */
typedef struct {
    int64_t rows[ADA_MOST_ROWS];
    double weight[ADA_MOST_ROWS];
    int n;
    double norm2, norm2_value;            /* of the whole gradient: dQ, or dK and dV */
    float *share, *live, *size, *product; /* [T] or [S] */
    ada_true_row *truth;                  /* [ADA_MOST_ROWS] */
    double *exact, *exact_value;          /* [ADA_MOST_ROWS][D] of dQ or dK, and [E] of dV */
    double *found, *found_value;          /* likewise, of the gradients; where they are needed */
} ada_sampled;

typedef struct {
    const ada_backward_problem *x;
    ada_gradient_budget *budget;
    ada_sampled *queries, *keys; /* [B * H], [B * G] */
    bool *open;                  /* [B * G] to be verified */
    bool *closer;                /* [B * G] a few rows have found something: more are compared */
} ada_gradient_check;

/* x and budget are there; queries is what was taken first. */
void ada_gradient_check_carve(ada_gradient_check *check, ada_carver *carver);
/* Forgets the shares of rows that are there so far. */
void ada_sampled_clear(ada_sampled *s, int64_t of);
/* Draws rows of a head, queries or keys, by their shares. */
void ada_draw_gradient(const ada_gradient_check *check, int64_t group, bool keys, ada_sampled *s);
/* Compares the open key heads. Those that may be off, or have more rows to be compared, stay open: the former
 * when goes_up gives them another choice. An error where the budget is missed by a precision that was asked
 * for. */
ada_status ada_compare_gradients(ada_gradient_check *check, bool (*goes_up)(void *context, int64_t group),
                                 void *context, bool *any_open, ada_error *error);

#endif
