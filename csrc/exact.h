/* Single rows of attention, computed for themselves: what a budget is planned by and verified against. */
#ifndef ADA_EXACT_H
#define ADA_EXACT_H

#include "adaattn.h"
#include "kernels.h"

/* Up to ADA_EXACT_ROWS rows of one head. */
typedef struct {
    double *o; /* [rows][E] */
    float *p;  /* [rows][ada_exact_keys(p)] weights; 0 where a key is hidden or dropped; NULL: not wanted */
    double lse[ADA_EXACT_ROWS];
    double reference[ADA_EXACT_ROWS]; /* about the largest score, natural units */
    double score_sum[ADA_EXACT_ROWS], score_square[ADA_EXACT_ROWS]; /* over visible keys, only beside p */
    int64_t visible[ADA_EXACT_ROWS];
    bool good[ADA_EXACT_ROWS]; /* all of it is finite */
} ada_exact;

/* Keys in whole blocks. */
int64_t ada_exact_keys(const ada_problem *p);
int64_t ada_exact_scratch_bytes(const ada_problem *p);
/* Rows `queries` (n <= ADA_EXACT_ROWS) of head (b, h) in double or float, p where weights are wanted; o and p
 * lie in scratch, aligned to 64 bytes, and are good until it is used again. Only visible keys and values are
 * looked at. */
void ada_exact_rows(const ada_problem *p, const ada_kernels *k, bool f64, bool weights, int64_t b, int64_t h,
                    const int64_t *queries, int n, char *scratch, ada_exact *exact);

#endif
