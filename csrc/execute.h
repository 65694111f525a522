/* What execute.c and its two instances of attend_tpl.h share: one call in progress. */
#ifndef ADA_EXECUTE_H
#define ADA_EXECUTE_H

#include <math.h>
#include <stdatomic.h>

#include "adaattn.h"
#include "kernels.h"
#include "memory.h"
#include "operands.h"
#include "parallel.h"
#include "rows.h"
#include "visible.h"

#define ADA_LOG2E 1.4426950408889634
#define ADA_LN2 0.69314718055994531

/* Up to this many queries go one by one over the rows of K and V (a tile would compute ADA_LANE_STEP lanes),
 * their keys split so that several threads share a head. */
#define ADA_ROWS_MAX 8
#define ADA_SPLITS_MAX 16
/* They read K and V in turns of keys that take about so many bytes, a double counted as a float: short enough
 * that neither stream goes cold (5 % over four times as much), long enough that weighing a turn does not
 * count. */
#define ADA_TURN_BYTES 8192
#define ADA_SPLIT_KEYS_MIN 512
/* Heads of at most so many scores are small: what is done for a head as a whole weighs more than its rows,
 * and exact rows cost more of it than they may. */
#define ADA_FEW_SCORES (256 * 256)
static inline bool ada_is_few(const ada_problem *p) { return p->T * p->S <= ADA_FEW_SCORES; }

/* Of a sparse head's tiles. */
typedef struct {
    atomic_int_least64_t blocks, stand_ins;
} ada_tally;

/* What memory is asked for during one tile, in equal steps over its keys: where its output goes, what its
 * worker reads next. */
typedef struct {
    ada_ahead now[ADA_AHEAD];
    int later[ADA_AHEAD]; /* rows of steps to come */
} ada_prospect;

static inline void ada_step_ahead(ada_prospect *x) {
    for (int i = 0; i < ADA_AHEAD; i++) {
        ada_ahead *now = &x->now[i];
        now->at += now->rows * now->stride;
        if (now->rows > x->later[i]) now->rows = x->later[i];
        x->later[i] -= now->rows;
    }
}

typedef struct {
    const ada_problem *p;
    const ada_kernels *k;
    int threads;
    bool by_heads; /* arrays are read in place, and each head is a task */
    char *scratch; /* of worker w: from scratch + w * scratch_bytes */
    int64_t scratch_bytes;
    int64_t tiles;  /* per head */
    int64_t splits; /* per head, on the way of few queries */
    void *partials; /* [B][H][T][splits] of m, l, o[E] */
    atomic_bool mask_is_bad;
    const int64_t *heads; /* [n_heads] those to compute, ascending; NULL: all */
    int64_t n_heads;
    ada_store store;     /* of the rungs that need one */
    atomic_bool *raised; /* [n_heads] that their rung could not hold */
    ada_tally *tallies;  /* [n_heads] where blocks stand in */
    atomic_int *left;    /* [n_heads] tiles, where somebody wants to know of the last; NULL: nobody does */
} ada_run;

/* The error of a call that has no scratch memory. */
ada_status ada_no_scratch(int64_t bytes, ada_error *error);
/* Threads that are worth waking for tasks of so many multiply-adds together. */
int ada_threads_for(const ada_problem *p, int64_t tasks, double multiply_adds);

/* How the few queries of a head share its keys out: by the sequence's length alone; a multiple of ADA_BLOCK.
 */
static inline int64_t ada_split_keys(const ada_problem *p, int64_t b) {
    int64_t keys = (ada_key_count(p, b) + ADA_SPLITS_MAX - 1) / ADA_SPLITS_MAX;
    if (keys < ADA_SPLIT_KEYS_MIN) keys = ADA_SPLIT_KEYS_MIN;
    return (keys + ADA_BLOCK - 1) / ADA_BLOCK * ADA_BLOCK;
}

/* Keys of a turn: by the head's sizes alone. Codes are read by the page. */
static inline int ada_turn_keys(const ada_problem *p) {
    const int bytes = ada_dtype_bytes(p->key.dtype) < 4 ? ada_dtype_bytes(p->key.dtype) : 4;
    const int64_t keys = ADA_TURN_BYTES / (p->D * bytes) / 16 * 16;
    return bytes < 2 || keys > ADA_BLOCK ? ADA_BLOCK : keys < 16 ? 16 : (int)keys;
}

static inline double ada_head_value(const ada_array *a, int64_t b, int64_t h) {
    return *(const double *)((const char *)a->data + b * a->stride[0] + h * a->stride[1]);
}

static inline double ada_sink(const ada_problem *p, int64_t h) {
    if (!p->sinks.data) return -INFINITY;
    return *(const double *)((const char *)p->sinks.data + h * p->sinks.stride[0]);
}

static inline void ada_store_lse(const ada_problem *p, int64_t b, int64_t h, int64_t i, double lse) {
    if (!p->lse) return;
    const int64_t at = (b * p->H + h) * p->T + i;
    if (p->query.dtype == ADA_F64)
        ((double *)p->lse)[at] = lse;
    else
        ((float *)p->lse)[at] = (float)lse;
}

/* What a row's output is multiplied with, from its reference m (log2 units) and sum l, and its lse (may be
 * NULL). The sink joins here: mass without a value. */
static inline double ada_row_factor(const ada_problem *p, int64_t h, double m, double l, double *lse) {
    const double sink = ada_sink(p, h), above = sink * ADA_LOG2E - m;
    double factor = 1, base = m * ADA_LN2;
    if (l == 0) { /* no key */
        if (lse) *lse = sink;
        return 0;
    }
    if (above > 0) {
        factor = exp2(-above);
        l = l * factor + 1;
        base = sink;
    } else if (sink > -INFINITY) {
        l += exp2(above);
    }
    if (lse) *lse = base + log2(l) * ADA_LN2;
    return factor / l / (1 - p->dropout_p);
}

#endif
