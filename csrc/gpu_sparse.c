/* The choice of heads on a GPU that leave out blocks of keys. */
#include "gpu_sparse.h"

#include <math.h>

/* Of what a head may be off by, for what is left out: bounds fall exponentially, and a fourth leaves nearly
 * all to the rung. */
#define ROOM 0.25
/* Outputs are taken to be no smaller than this beside the values: means of a thousand keys. */
#define LEAST_OUTPUT (1.0 / 32)
/* Of the tolerance, for what a row's sum may lose. */
#define LEAST_SUM 0.25
/* Tiles of queries of a head that are looked at, and the share of the dense time that looking may take, which
 * is less than verification takes. */
#define LOOK_TILES 8
#define LOOK_SHARE (1.0 / 12)
#define TILE 128.0 /* queries of one */
/* A head's part in hearing from a look at several, and to read a byte of its keys and values. */
#define LOOK_SECONDS 4e-6
#define BYTE_SECONDS 5e-13

ada_cuda_thin ada_gpu_thin_of(const ada_attending *a, int64_t head) {
    return (ada_cuda_thin){.head = head,
                           .absolute = sqrt(a->budget->heads[head].budget2),
                           .most = LEAST_SUM * a->budget->tolerance};
}

/* The cheapest candidate of a head that leaves blocks out and keeps the budget, -1: none; forced: or else the
 * head's own one, if it does. */
static int candidate_of(const ada_attending *a, int64_t i, unsigned able, bool forced) {
    const ada_head *head = &a->budget->heads[i];
    const ada_task task = ada_task_of(a, i, ada_margin_of(a, i));
    ada_forecast f = {.finite = true};
    if (a->states[i].look) f = head->forecast;
    if (!f.finite || a->p->only_f64) return -1;
    for (int c = 0; c < ADA_CANDIDATES; c++) f.error[c] = able >> c & 1 ? ada_error_on(a, i, c) : INFINITY;
    const int c = ada_plan_head(&f, &task, a->budget->rates), own = ada_candidate_of(head->choice);
    if (able >> c & 1 && f.error[c] <= task.tolerance / task.margin) return c;
    return forced && own >= 0 && able >> own & 1 ? own : -1;
}

/* What a candidate leaves for blocks. */
static double room_of(const ada_attending *a, int64_t i, int c) {
    const double limit = a->budget->tolerance / ada_margin_of(a, i), error = ada_error_on(a, i, c);
    return fmax(fmin(ROOM * limit, sqrt(fmax(limit * limit - error * error, 0))), ROOM * ROOM * limit);
}

/* Whether looking at a head costs little beside computing it. */
static bool looking_pays(const ada_attending *a, int64_t i, int c) {
    const ada_problem *p = a->p;
    const double bytes = (double)(p->S * (p->D + p->E) * ada_dtype_bytes(p->key.dtype)),
                 own = a->states[i].seconds;
    const double tiles = fmin(LOOK_TILES * TILE / (double)p->T, 1);
    return LOOK_SECONDS + BYTE_SECONDS * bytes + own * a->budget->rates[c].sparse * tiles <= LOOK_SHARE * own;
}

/* Takes the head's lists where they pay. */
static void choose(const ada_attending *a, const ada_cuda_thin *thin, int c, bool forced) {
    ada_head *head = &a->budget->heads[thin->head];
    ada_head_state *s = &a->states[thin->head];
    const ada_task task = ada_task_of(a, thin->head, ada_margin_of(a, thin->head));
    const double seconds = ada_listed_seconds(&task, &a->budget->rates[c], thin->kept);
    const double moves = thin->relative * thin->value_rms;
    if (!(moves > 0) || !(forced || ada_is_faster(seconds, s->seconds))) {
        head->retried |= forced;
        return;
    }
    s->seconds = seconds;
    head->choice = ada_candidates[c];
    head->budget2 = moves * moves, head->joint = 0, head->kept = thin->kept;
    head->predicted_error = hypot(ada_error_on(a, thin->head, c), room_of(a, thin->head, c));
}

ada_status ada_gpu_plan_sparse(ada_attending *a, ada_cuda_call *call, ada_cuda_thin *thin, ada_error *error) {
    const ada_cuda_table *t = ada_gpu_table();
    const bool forced = a->budget->structure == ADA_STRUCTURE_SPARSE;
    const int64_t heads = ada_head_count(a);
    ada_cuda_failure failure;
    unsigned able = 0;
    if (!(forced || a->budget->structure == ADA_STRUCTURE_AUTO) || a->budget->given) return ADA_OK;
    for (int c = 0; c < ADA_CANDIDATES && ada_may_be_sparse(a->p, a->budget); c++)
        if ((forced || a->budget->rates[c].sparse < 1) && t->leaves_out(call, ada_candidates[c]))
            able |= 1u << c;
    for (int64_t i = 0; i < heads; i++) {
        a->rank[i] = able ? candidate_of(a, i, able, forced) : -1;
        a->budget->heads[i].retried |= forced && a->rank[i] < 0;
        if (!forced && a->rank[i] >= 0 && !looking_pays(a, i, a->rank[i])) a->rank[i] = -1;
    }
    for (int c = 0; c < ADA_CANDIDATES; c++) {
        int64_t n = 0;
        for (int64_t i = 0; i < heads; i++)
            if (a->rank[i] == c)
                thin[n++] = (ada_cuda_thin){.head = i,
                                            .relative = LEAST_OUTPUT * room_of(a, i, c),
                                            .most = LEAST_SUM * a->budget->tolerance};
        if (n == 0) continue;
        if (t->look_at_blocks(call, ada_candidates[c], thin, n, LOOK_TILES, &failure))
            return ada_gpu_fail(&failure, error);
        for (int64_t i = 0; i < n; i++) choose(a, &thin[i], c, forced);
    }
    return ADA_OK;
}
