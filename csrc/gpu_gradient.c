/* A GPU's part of verified gradients: rows are sized and computed there, drawn and compared here. */
#include "gpu_gradient.h"

#include <math.h>
#include <string.h>

#include "gradient_check.h"

enum { QUERY_NORMS = 4, KEY_NORMS = 3 }; /* numbers of each in the table's gradient_norms */

_Static_assert(sizeof(ada_true_row) == ADA_CUDA_TRUTHS * sizeof(double), "as the ABI has it");

typedef struct {
    ada_gradient_check check;
    ada_cuda_call *call;
    double *of_queries, *of_keys; /* norms, [B * H][T] and [B * G][S] */
    ada_cuda_row *rows;           /* of all heads, as many as are drawn at most */
    double *found;                /* of these rows */
    uint32_t *heads, *again;      /* [B * G] to be computed again; that took float64 */
} verification;

static int64_t query_numbers(const ada_problem *p) { return ADA_CUDA_TRUTHS + 2 * p->D; }
static int64_t key_numbers(const ada_problem *p) { return 2 * (p->D + p->E); }

static void carve(verification *v, ada_carver *c) {
    const ada_problem *p = &v->check.x->p;
    const int64_t heads = p->B * p->H, groups = p->B * p->G, real = sizeof(double);
    const int64_t of_queries = heads * query_numbers(p), of_keys = groups * key_numbers(p);
    ada_gradient_check_carve(&v->check, c);
    v->of_queries = ada_carve(c, heads * p->T * QUERY_NORMS * real);
    v->of_keys = ada_carve(c, groups * p->S * KEY_NORMS * real);
    v->rows = ada_carve(c, heads * ADA_MOST_ROWS * (int64_t)sizeof *v->rows);
    v->found = ada_carve(c, ADA_MOST_ROWS * (of_queries > of_keys ? of_queries : of_keys) * real);
    v->heads = ada_carve(c, groups * (int64_t)sizeof *v->heads);
    v->again = ada_carve(c, groups * (int64_t)sizeof *v->again);
}

/* Shares by the which-th of so many numbers of each row; returns their sum. Sizes are what they are relative
 * to the largest, as squares of the numbers that a double holds may be beyond a float. */
static double add_shares(ada_sampled *s, const double *numbers, int each, int which, int64_t n) {
    double most = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += numbers[i * each + which];
        if (s->live[i] > 0) most = fmax(most, numbers[i * each + which]);
    }
    for (int64_t i = 0; i < n; i++) s->size[i] = (float)(numbers[i * each + which] / most);
    if (most > 0) ada_add_shares(s->share, s->size, s->live, n);
    return sum;
}

static void draw(verification *v, bool keys, int64_t head, ada_sampled *s) {
    const ada_problem *p = &v->check.x->p;
    const int64_t n = keys ? p->S : p->T, group = keys ? head : head / (p->H / p->G);
    const int each = keys ? KEY_NORMS : QUERY_NORMS;
    const double *numbers = (keys ? v->of_keys : v->of_queries) + head * n * each;
    ada_sampled_clear(s, n);
    for (int64_t i = 0; i < n; i++) s->live[i] = (float)numbers[i * each + each - 1];
    ada_add_shares(s->share, NULL, s->live, n);
    if (keys) {
        s->norm2 = add_shares(s, numbers, each, 0, n);
        s->norm2_value = add_shares(s, numbers, each, 1, n);
    } else {
        for (int i = 0; i < 3; i++) s->norm2 = add_shares(s, numbers, each, i, n);
    }
    ada_draw_gradient(&v->check, group, keys, s);
}

static void draw_queries_task(void *context, ada_job *job, int64_t head, int worker) {
    verification *v = context;
    const ada_problem *p = &v->check.x->p;
    (void)job, (void)worker;
    if (v->check.open[head / (p->H / p->G)]) draw(v, false, head, &v->check.queries[head]);
}

static void draw_keys_task(void *context, ada_job *job, int64_t group, int worker) {
    verification *v = context;
    (void)job, (void)worker;
    if (v->check.open[group]) draw(v, true, group, &v->check.keys[group]);
}

/* Draws rows of the open heads, queries or keys, and hears of them from the device. */
static ada_status take_rows(verification *v, bool keys, ada_error *error) {
    const ada_problem *p = &v->check.x->p;
    const int64_t heads = p->B * (keys ? p->G : p->H), per = keys ? 1 : p->H / p->G;
    const size_t D = (size_t)p->D * sizeof(double), E = (size_t)p->E * sizeof(double);
    ada_sampled *all = keys ? v->check.keys : v->check.queries;
    ada_cuda_failure failure;
    int64_t n = 0;
    const int threads = ada_threads_for(p, heads, 16 * (double)heads * (double)(keys ? p->S : p->T));
    ada_parallel_for(heads, threads, keys ? draw_keys_task : draw_queries_task, v, NULL, NULL);
    for (int64_t i = 0; i < heads; i++)
        for (int x = 0; v->check.open[i / per] && x < all[i].n; x++)
            v->rows[n++] = (ada_cuda_row){(int32_t)i, (int32_t)all[i].rows[x]};
    if (n == 0) return ADA_OK;
    if (ada_gpu_table()->gradient_rows(v->call, v->check.x, keys, v->rows, n, v->found, &failure))
        return ada_gpu_fail(&failure, error);
    const double *from = v->found;
    for (int64_t i = 0; i < heads; i++) {
        const ada_sampled *s = &all[i];
        for (int64_t x = 0; v->check.open[i / per] && x < s->n; x++) {
            if (keys) {
                memcpy(s->exact + x * p->D, from, D), memcpy(s->exact_value + x * p->E, from + p->D, E);
                from += p->D + p->E;
                memcpy(s->found + x * p->D, from, D), memcpy(s->found_value + x * p->E, from + p->D, E);
                from += p->D + p->E;
            } else {
                memcpy(&s->truth[x], from, sizeof s->truth[x]);
                from += ADA_CUDA_TRUTHS;
                memcpy(s->exact + x * p->D, from, D), memcpy(s->found + x * p->D, from + p->D, D);
                from += 2 * p->D;
            }
        }
    }
    return ADA_OK;
}

static bool goes_up(void *context, int64_t group) {
    verification *v = context;
    ada_gradient_head *head = &v->check.budget->heads[group];
    if (head->choice.qk == ADA_RUNG_FP64) return false;
    const ada_rung rung = head->retried ? ADA_RUNG_FP64 : ADA_RUNG_FP32;
    *head = (ada_gradient_head){{rung, rung}, NAN, true, head->key, head->value};
    v->heads[group] = rung;
    return true;
}

static ada_status compute_again(verification *v, ada_rung rung, bool *changed, ada_error *error) {
    const int64_t groups = v->check.x->p.B * v->check.x->p.G;
    const ada_choice choice = {rung, rung}, in_f64 = {ADA_RUNG_FP64, ADA_RUNG_FP64};
    ada_cuda_failure failure;
    bool any = false;
    for (int64_t i = 0; i < groups; i++) any |= v->again[i] = v->heads[i] == (uint32_t)rung;
    if (!any) return ADA_OK;
    *changed = true;
    if (ada_gpu_table()->gradients_again(v->call, v->check.x, choice, v->again, v->again, &failure))
        return ada_gpu_fail(&failure, error);
    for (int64_t i = 0; i < groups; i++)
        if (v->again[i]) v->check.budget->heads[i].choice = in_f64;
    return ADA_OK;
}

static ada_status verify(verification *v, ada_error *error) {
    const ada_problem *p = &v->check.x->p;
    const ada_cuda_table *t = ada_gpu_table();
    ada_cuda_failure failure;
    for (bool again, changed = true;;) {
        if (changed && t->gradient_norms(v->call, v->check.x, v->of_queries, v->of_keys, &failure))
            return ada_gpu_fail(&failure, error);
        if (take_rows(v, false, error) || take_rows(v, true, error)) return error->status;
        memset(v->heads, 0, (size_t)(p->B * p->G) * sizeof *v->heads);
        if (ada_compare_gradients(&v->check, goes_up, v, &again, error)) return error->status;
        if (!again) return ADA_OK;
        changed = false;
        if (compute_again(v, ADA_RUNG_FP32, &changed, error) ||
            compute_again(v, ADA_RUNG_FP64, &changed, error))
            return error->status;
    }
}

bool ada_gpu_verifies_gradients(void) {
    const ada_cuda_table *t = ada_gpu_table();
    return t->gradients_again && t->gradient_norms && t->gradient_rows;
}

ada_status ada_gpu_verify_gradient(const ada_backward_problem *x, ada_cuda_call *call,
                                   ada_gradient_budget *budget, ada_error *error) {
    verification v = {.check = {.x = x, .budget = budget}, .call = call};
    ada_carver carver = {NULL, 0};
    for (int turn = 0; turn < 2; turn++) {
        if (turn && !(carver.base = ada_scratch_take(carver.used)))
            return ada_fail(error, ADA_ERR_MEMORY, "attention_backward: no memory for %lld bytes of scratch",
                            (long long)carver.used);
        carver.used = 0;
        carve(&v, &carver);
    }
    const ada_status status = verify(&v, error);
    ada_scratch_give_back(v.check.queries);
    return status;
}
