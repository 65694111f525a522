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

/* Keys that landmarks are chosen from: some spread evenly, and those furthest from the mean. */
#define ADA_SAMPLE 1024
#define ADA_FURTHEST 32

/* What is known of a head's keys and queries before its landmarks are chosen. */
typedef struct {
    double keys;               /* that are seen */
    double spread;             /* sum of their squared distances from their mean, */
    double furthest2;          /* and the largest */
    double queries, query2;    /* of some that are spread evenly: how many, and the sum of squared norms */
    int64_t far[ADA_FURTHEST]; /* the furthest keys, */
    int n_far;                 /* fewer where there are fewer */
} ada_extent;

/* A head's extent and rows where the arrays cannot be read, as others found them. */
typedef struct ada_sample {
    ada_extent extent;
    const float *mean;    /* [D] of the keys */
    const float *query2;  /* [extent.queries] squared norms */
    const float *keys;    /* [even + n_far][D] rows of the keys of ada_even_keys, then of the furthest */
    const float *values;  /* [even][E] */
    const float *queries; /* [ADA_LANES][D] of ada_even_queries */
} ada_sample;

/* Keys spread evenly, a place in each stretch at random; returns how many. */
int ada_even_keys(const ada_far_keys *all, int64_t key[ADA_SAMPLE]);
/* The same of a tile of queries. */
int ada_even_queries(int64_t T, int64_t row[ADA_LANES]);
/* From one to the next of those whose norms are an extent's. */
static inline int64_t ada_step_of_queries(int64_t T) { return (T + ADA_SAMPLE - 1) / ADA_SAMPLE; }

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
    double beyond;           /* share of the queries beyond the exponents' range */
    float *rows;             /* [64][max(D, E, 64)] */
    float *pivots;           /* [ADA_PIVOTS][D] */
    float *before;           /* [most][ADA_PIVOTS] minus the factor at the pivots */
    float *p, *m, *l;        /* [64][64], [64], [64] */
    float *new;              /* [ADA_PIVOTS][64] */
    float *inverse;          /* [ADA_PIVOTS][ADA_PIVOTS] */
    double *rows_of_inverse; /* [most][most] of the factor at the landmarks */
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

/* A head's landmarks, of rank R up to ADA_PIVOTS. */
typedef struct {
    int R;
    double *factor; /* [2] of queries, and of keys less the mean */
    float *mean;    /* [D] */
    float *point;   /* [R][D] landmarks as the kernel takes them; zeros behind the last */
    float *basis;   /* [R][R] F = H(., L) basis, triangular */
} ada_landmarks;

ada_landmarks ada_landmarks_of(const ada_problem *p, int rank, ada_carver *c);
/* Of head (b, h), in scratch of ada_landmark_scratch_bytes; sample: NULL where the arrays can be read. False
 * where keys or queries are not finite, or keys too far apart. */
bool ada_find_landmarks(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, int rank,
                        const ada_sample *sample, ada_landmarks *to, char *scratch);
/* The bins that query i sees whole. */
int64_t ada_bins_seen(const ada_problem *p, const ada_far_keys *keys, int64_t b, int64_t i);

/* Of so many rows those which may be computed exactly: half as many again as a sample may show. */
static inline int64_t ada_most_exact_rows(int64_t T) { return T / 16 + 4; }
/* A head is given up where its rows' estimates exceed the budget so far. */
#define ADA_MOST_SUM 2

static inline int ada_up_to(int n, int step) { return (n + step - 1) / step * step; }

#endif
