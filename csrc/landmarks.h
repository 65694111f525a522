/* Landmarks of a head: what lowrank.c, which attends to them, takes from landmarks.c, which chooses them. */
#ifndef ADA_LANDMARKS_H
#define ADA_LANDMARKS_H

#include "lowrank.h"
#include "memory.h"

/* Of a draw of pivots; ranks are computed up to a multiple of it. */
#define ADA_PIVOTS 16
/* Residuals of fp32 are no better than this share of a kernel's own value. */
#define ADA_LEAST_RESIDUAL 1e-5f
/* Exponents of H(x, x) up to which floats hold it, and a factor that takes its digits apart. Queries beyond
 * are computed exactly, heads with such keys are not low rank. */
#define ADA_MOST_EXPONENT 16

/* A head's sample and its factor, in tiles of lanes. */
typedef struct {
    int count, tiles, most; /* sampled keys; most landmarks */
    int even;               /* of the sampled keys: those that stand for others */
    int queries;            /* 0 or 1 tiles of sampled queries behind the keys' */
    int64_t *key;           /* [count] */
    float *mean;            /* [D] of all keys */
    float *point;           /* [tiles * 64][D] keys less the mean, times key_factor; zeros behind */
    float *packed;          /* [tiles + queries][D][64] the same, times log2(e) */
    float *factor;          /* [tiles + queries][most][64] */
    float *residual;        /* [tiles + queries][64] */
    float *own;             /* [tiles + queries][64] H(x, x) */
    int *pivot;             /* [most] */
    int rank;
    double keys, query_factor, key_factor;
    double beyond;    /* share of the queries beyond the exponents' range */
    float *rows;      /* [64][max(D, E, 64)] */
    float *pivots;    /* [ADA_PIVOTS][D] */
    float *before;    /* [most][ADA_PIVOTS] minus the factor at the pivots */
    float *p, *m, *l; /* [64][64], [64], [64] */
    float *new;       /* [ADA_PIVOTS][64] */
    float *inverse;   /* [ADA_PIVOTS][ADA_PIVOTS] */
    /* To forecast: */
    float *kernel; /* [tiles * 64][64] what is left of H(k, q) */
    float *value;  /* [tiles * 64][E + 1]: how many keys it stands for, and that times its value */
    float *apart;  /* [tiles * 64] squared distance of a value from the mean output, times that twice */
    int seen[ADA_LANES], far[ADA_LANES]; /* of the sampled keys: how many a query sees, and in whole bins */
    double share[ADA_LANES];             /* of all keys that lie in its whole bins */
    float *sum;                          /* [E + 1][64] */
    float *out;                          /* [E][64] of the sampled queries, by the sampled keys */
    float *mass;                         /* [64] */
} ada_sketch;

ada_sketch ada_sketch_of(const ada_problem *p, int most, ada_carver *c);
/* Loads the sampled keys: those spread evenly over all, a place in each stretch at random, then the ones
 * furthest from the mean. False where keys or queries are not finite, or keys too far apart. */
bool ada_take_sample(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h,
                     const ada_far_keys *all, ada_sketch *s);
/* Adds some landmarks, at most `room`; false where nothing is left to gain. draws: 0 at first. */
bool ada_add_landmarks(const ada_problem *p, const ada_kernels *k, ada_sketch *s, int *draws, int room);
/* The bins that query i sees whole. */
int64_t ada_bins_seen(const ada_problem *p, const ada_far_keys *keys, int64_t b, int64_t i);

static inline int ada_up_to(int n, int step) { return (n + step - 1) / step * step; }

#endif
