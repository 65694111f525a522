/* A gradient within an error budget: what is asked for, and what became of it. */
#ifndef ADA_BACKWARD_H
#define ADA_BACKWARD_H

#include "adaattn.h"
#include "plan.h"

/* Relative Frobenius error of one head's gradient: an estimate and its upper limit; NaN: not verified. */
typedef struct {
    double error, limit;
    int rows; /* that were compared */
} ada_measured;

/* Of a key head and the query heads that share it. */
typedef struct {
    ada_choice choice; /* of scores and gradients of weights, and of the sums */
    double predicted_error;
    bool retried;
    ada_measured key, value;
} ada_gradient_head;

typedef struct {
    double tolerance; /* 0: none */
    ada_choice asked; /* AUTO, or the precision that was forced */
    bool verify;
    const ada_rate *rates;    /* [ADA_CANDIDATES], with a tolerance */
    ada_gradient_head *heads; /* (B, G); NULL: not verified, and nobody asks */
    ada_measured *queries;    /* (B, H), likewise */
    double seconds[2];        /* execute, verify: the whole call */
} ada_gradient_budget;

ada_status ada_backward(const ada_backward_problem *backward, ada_gradient_budget *budget,
                        bool (*interrupt)(void *), void *context, ada_error *error);

#endif
