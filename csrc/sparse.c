/* The choice of blocks that stand in. Pure functions. */
#include "sparse.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

float ada_value_reach(const ada_kernels *k, const float *rows, ptrdiff_t ld, int E, float *mean,
                      float *spare) {
    float norm2[ADA_BLOCK], most = 0;
    memset(mean, 0, (size_t)E * sizeof *mean);
    memset(spare, 0, (size_t)E * sizeof *spare);
    k->columns(mean, spare, rows, ld, ADA_BLOCK, E);
    for (int e = 0; e < E; e++) mean[e] /= ADA_BLOCK;
    k->squares(norm2, NULL, rows, ld, ADA_BLOCK, E, mean, NULL);
    for (int j = 0; j < ADA_BLOCK; j++) most = norm2[j] > most ? norm2[j] : most;
    return sqrtf(most);
}

int ada_by_cost(const void *a, const void *b) {
    const ada_ranked *x = a, *y = b;
    if (x->cost != y->cost) return x->cost < y->cost ? -1 : 1;
    return x->block - y->block;
}

int ada_choose_stand_ins(const ada_kernels *k, const float *spread, int blocks, const float *weight,
                         double budget, double joint, ada_ranked *order, float *sum, bool *stands,
                         float *shift2) {
    float *next = sum + ADA_LANES, *spare = next + ADA_LANES, together, ignored;
    double apart = 0;
    int chosen = 0;
    for (int i = 0; i < blocks; i++) {
        k->squares(&order[i].cost, NULL, spread + (ptrdiff_t)i * ADA_LANES, ADA_LANES, 1, ADA_LANES, NULL,
                   weight);
        if (!(order[i].cost < INFINITY)) order[i].cost = INFINITY;
        order[i].block = i;
        stands[i] = false;
    }
    qsort(order, (size_t)blocks, sizeof *order, ada_by_cost);
    memset(sum, 0, 3 * ADA_LANES * sizeof *sum);
    for (; chosen < blocks; chosen++) {
        memcpy(next, sum, ADA_LANES * sizeof *sum);
        k->columns(next, spare, spread + (ptrdiff_t)order[chosen].block * ADA_LANES, ADA_LANES, 1, ADA_LANES);
        k->squares(&together, NULL, next, ADA_LANES, 1, ADA_LANES, NULL, weight);
        apart += (double)order[chosen].cost;
        if (!((1 - joint) * apart + joint * (double)together <= budget)) break;
        memcpy(sum, next, ADA_LANES * sizeof *sum);
        stands[order[chosen].block] = true;
    }
    memset(shift2, 0, ADA_LANES * sizeof *shift2);
    for (int i = 0; i < chosen; i++)
        k->squares(&ignored, shift2, spread + (ptrdiff_t)order[i].block * ADA_LANES, ADA_LANES, 1, ADA_LANES,
                   NULL, NULL);
    for (int i = 0; i < ADA_LANES; i++)
        shift2[i] = (float)(((1 - joint) * (double)shift2[i] + joint * (double)(sum[i] * sum[i])) *
                            (double)weight[i]);
    return chosen;
}
