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
                         double budget, double joint, const ada_choosing *at, bool *stands, float *shift2) {
    int chosen = 0;
    k->squares(at->cost, NULL, spread, ADA_LANES, blocks, ADA_LANES, NULL, weight);
    for (int i = 0; i < blocks; i++) {
        at->order[i] = (ada_ranked){at->cost[i] < INFINITY ? at->cost[i] : INFINITY, i};
        stands[i] = false;
    }
    qsort(at->order, (size_t)blocks, sizeof *at->order, ada_by_cost);
    memset(at->sum, 0, ADA_LANES * sizeof *at->sum);
    memset(at->apart, 0, ADA_LANES * sizeof *at->apart);
    for (; chosen < blocks; chosen++) {
        const int block = at->order[chosen].block;
        const float *x = spread + (ptrdiff_t)block * ADA_LANES;
        if (!((double)k->stand_in(at->sum, at->apart, x, weight, (float)joint) <= budget)) {
            for (int i = 0; i < ADA_LANES; i++) at->sum[i] -= x[i], at->apart[i] -= x[i] * x[i];
            break;
        }
        stands[block] = true;
    }
    for (int i = 0; i < ADA_LANES; i++) {
        const double square = (double)at->sum[i] * (double)at->sum[i];
        shift2[i] = (float)fmax(((1 - joint) * (double)at->apart[i] + joint * square) * (double)weight[i], 0);
    }
    return chosen;
}
