/* Gradients against rows of them that are computed for themselves, and heads that miss the budget once more.
 * Included by backward.c; see gradient_check.h.
 */
typedef struct {
    back_run *r;
    ada_gradient_check check;
    bool *in_f64; /* [B * G] its exact rows */
    bool *last;   /* [B * G] it was computed in fp64, from an lse and sums of its own */
} verification;

static double draw_by_norms(const back_run *r, int which, int64_t b, int64_t h, const ada_sampled *s,
                            float *copy) {
    const ada_array *a = &r->x->results[which];
    if (!r->x->needs[which]) return 0;
    const double sum = ada_row_norms(r->k, a, b, h, s->size, copy);
    ada_add_shares(s->share, s->size, s->live, a->shape[2]);
    return sum;
}

/* Queries by equal shares, by their gradients, and by what an error of the output may put into those of keys.
 */
static void draw_queries_task(void *context, ada_job *job, int64_t head, int worker) {
    verification *v = context;
    const back_run *r = v->r;
    const ada_problem *p = r->p;
    const int64_t b = head / p->H, h = head % p->H, group = head / (p->H / p->G);
    const ada_array *const factors[] = {&r->x->grad_out, &p->query, &r->x->out};
    ada_sampled *s = &v->check.queries[head];
    if (!v->check.open[group] || ada_job_cancelled(job, worker)) return;
    float *copy = (float *)(r->scratch + worker * r->scratch_bytes);
    for (int64_t i = 0; i < p->T; i++) {
        s->live[i] = sees_keys(r, b, h, i);
        s->product[i] = 1;
    }
    ada_sampled_clear(s, p->T);
    ada_add_shares(s->share, NULL, s->live, p->T);
    for (int x = 0; x < 3; x++) {
        ada_row_norms(r->k, factors[x], b, h, s->size, copy);
        if (x == 0) ada_add_shares(s->share, s->size, s->live, p->T);
        for (int64_t i = 0; i < p->T; i++) s->product[i] *= s->size[i];
    }
    ada_add_shares(s->share, s->product, s->live, p->T);
    s->norm2 = draw_by_norms(r, ADA_OF_QUERY, b, h, s, copy);
    ada_draw_gradient(&v->check, group, false, s);
}

static void draw_keys_task(void *context, ada_job *job, int64_t group, int worker) {
    verification *v = context;
    const back_run *r = v->r;
    const ada_problem *p = r->p;
    const int64_t b = group / p->G, g = group % p->G, per_group = p->H / p->G;
    ada_sampled *s = &v->check.keys[group];
    if (!v->check.open[group] || ada_job_cancelled(job, worker)) return;
    float *copy = (float *)(r->scratch + worker * r->scratch_bytes);
    for (int64_t j = 0; j < p->S; j += ADA_BLOCK) {
        const uint64_t seen = ada_block_seen(p, r->k, b, g * per_group, per_group, j / ADA_BLOCK, copy);
        for (int64_t c = j; c < p->S && c < j + ADA_BLOCK; c++) s->live[c] = seen >> (c - j) & 1;
    }
    ada_sampled_clear(s, p->S);
    ada_add_shares(s->share, NULL, s->live, p->S);
    s->norm2 = draw_by_norms(r, ADA_OF_KEY, b, g, s, copy);
    s->norm2_value = draw_by_norms(r, ADA_OF_VALUE, b, g, s, copy);
    ada_draw_gradient(&v->check, group, true, s);
}

/* So many groups of rows a head may have. */
#define ROW_TASKS (ADA_MOST_ROWS / ADA_ROW_GROUP)

static void load_found(const back_run *r, int which, int64_t b, int64_t h, int64_t row, double *to) {
    const ada_array *a = &r->x->results[which];
    if (r->x->needs[which]) ada_load_rows_f64(r->k, to, 0, a, b, h, row, 1, (int)a->shape[3]);
}

static void true_rows_task(void *context, ada_job *job, int64_t task, int worker) {
    verification *v = context;
    const back_run *r = v->r;
    const ada_problem *p = r->p;
    const int64_t head = task / ROW_TASKS, first = task % ROW_TASKS * ADA_ROW_GROUP;
    const int64_t b = head / p->H, h = head % p->H, group = b * p->G + h / (p->H / p->G);
    const ada_sampled *s = &v->check.queries[head];
    const int n = (int)(s->n - first < ADA_ROW_GROUP ? s->n - first : ADA_ROW_GROUP);
    if (!v->check.open[group] || n <= 0 || ada_job_cancelled(job, worker)) return;
    (v->in_f64[group] ? true_rows_f64 : true_rows_f32)(r, b, h, s->rows + first, n,
                                                       r->scratch + worker * r->scratch_bytes,
                                                       s->truth + first, s->exact + first * p->D);
    for (int64_t i = first; i < first + n; i++) {
        const int64_t row = head * p->T + s->rows[i];
        s->truth[i].given_lse = r->reference[row] + r->lse[row];
        s->truth[i].given_delta = r->delta[row];
        load_found(r, ADA_OF_QUERY, b, h, s->rows[i], s->found + i * p->D);
    }
}

static void true_keys_task(void *context, ada_job *job, int64_t task, int worker) {
    verification *v = context;
    const back_run *r = v->r;
    const ada_problem *p = r->p;
    const int64_t group = task / ROW_TASKS, first = task % ROW_TASKS * ADA_ROW_GROUP;
    const ada_sampled *s = &v->check.keys[group];
    const int n = (int)(s->n - first < ADA_ROW_GROUP ? s->n - first : ADA_ROW_GROUP);
    if (!v->check.open[group] || n <= 0 || ada_job_cancelled(job, worker)) return;
    (v->in_f64[group] ? true_keys_f64
                      : true_keys_f32)(r, group, s->rows + first, n, r->scratch + worker * r->scratch_bytes,
                                       s->exact + first * p->D, s->exact_value + first * p->E);
    for (int64_t i = first; i < first + n; i++) {
        load_found(r, ADA_OF_KEY, group / p->G, group % p->G, s->rows[i], s->found + i * p->D);
        load_found(r, ADA_OF_VALUE, group / p->G, group % p->G, s->rows[i], s->found_value + i * p->E);
    }
}

static void recompute_task(void *context, ada_job *job, int64_t task, int worker) {
    verification *v = context;
    const back_run *r = v->r;
    const ada_problem *p = r->p;
    const int64_t head = task / r->tiles, tile = task % r->tiles, b = head / p->H, h = head % p->H;
    const int64_t group = b * p->G + h / (p->H / p->G);
    if (r->way[group] != WAY_EXACT || ada_job_cancelled(job, worker)) return;
    const ada_patch patch = {.b = b, .h = h, .i = tile * ADA_LANES, .n = rows_of_tile(p, tile)};
    const bool precise = v->check.budget->heads[group].choice.qk == ADA_RUNG_FP64;
    (precise ? recompute_rows_f64 : recompute_rows_f32)(r, patch, UINT64_MAX, true, precise,
                                                        r->scratch + worker * r->scratch_bytes);
}

/* The next rung of a head that misses: fp32, with an lse and sums of its own, then all of that in fp64; which
 * a head in fp64 has not had yet if that was its first choice. */
static bool gradient_goes_up(void *context, int64_t group) {
    verification *v = context;
    back_run *r = v->r;
    ada_gradient_head *head = &v->check.budget->heads[group];
    if (v->last[group]) return false;
    const bool first = !head->retried && r->p->query.dtype != ADA_F64 && !r->unfit[group];
    if (!first) r->unfit[group] = v->last[group] = true;
    head->choice = plain_rungs(r, group);
    head->predicted_error = NAN;
    head->retried = true;
    r->way[group] = WAY_EXACT;
    return true;
}

static ada_status verify_rounds(verification *v, const back_caller *c, double *spare, ada_error *error) {
    back_run *r = v->r;
    const ada_problem *p = r->p;
    const double T = (double)p->T, S = (double)p->S, width = (double)(p->D + p->E);
    const double heads = (double)(p->B * p->H), rows = heads * 8 * 1.5 * width;
    for (;;) {
        bool again;
        for (int64_t i = 0; i < r->groups; i++) v->in_f64[i] |= r->unfit[i];
        if (!run_tasks_on(v, p, c, draw_queries_task, p->B * p->H, heads * T * width) ||
            !run_tasks_on(v, p, c, draw_keys_task, r->groups, heads * S * width) ||
            !run_tasks_on(v, p, c, true_rows_task, p->B * p->H * ROW_TASKS, rows * S) ||
            !run_tasks_on(v, p, c, true_keys_task, r->groups * ROW_TASKS, rows * T))
            return interrupted(error);
        if (ada_compare_gradients(&v->check, gradient_goes_up, v, &again, error)) return error->status;
        if (!again) return ADA_OK;
        if (!run_tasks_on(v, p, c, recompute_task, p->B * p->H * r->tiles, heads * T * S * width))
            return interrupted(error);
        if (run_ways(r, c, spare, error)) return error->status;
    }
}

static ada_status verify_gradient(back_run *r, const back_caller *c, ada_gradient_budget *budget,
                                  double *spare, ada_error *error) {
    verification v = {.r = r, .check = {.x = r->x, .budget = budget}};
    ada_carver carver = {NULL, 0};
    for (int turn = 0; turn < 2; turn++) {
        if (turn && !(carver.base = ada_scratch_take(carver.used))) return no_memory(carver.used, error);
        carver.used = 0;
        ada_gradient_check_carve(&v.check, &carver);
        v.in_f64 = ada_carve(&carver, r->groups), v.last = ada_carve(&carver, r->groups);
    }
    for (int64_t i = 0; i < r->groups; i++) {
        v.last[i] = false;
        v.in_f64[i] = budget->tolerance <= 1e-4 || r->p->query.dtype == ADA_F64;
    }
    const ada_status status = verify_rounds(&v, c, spare, error);
    ada_scratch_give_back(v.check.queries);
    return status;
}
