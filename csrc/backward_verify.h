/* Gradients against rows of them that are computed for themselves, and heads that miss the budget once more.
 * Included by backward.c.
 *
 * Rows of dQ depend on one query: exact ones come from the inputs alone, so what the forward pass left in its
 * out and lse counts as an error. Rows of dK and dV depend on all queries, and are computed with the lse and
 * the out that were given; what those put into them follows from what they are off by in the sampled rows of
 * queries: as independent errors of rows, and as their mean, which all rows would share.
 */
#define QUERY_STREAM 4
#define KEY_STREAM 5

/* Of one head: queries, or the keys of a key head. */
typedef struct {
    int64_t rows[ADA_MOST_ROWS];
    double weight[ADA_MOST_ROWS];
    int n;
    double norm2, norm2_value;            /* of the whole gradient: dQ, or dK and dV */
    float *share, *live, *size, *product; /* [T] or [S] */
    true_row *truth;                      /* [ADA_MOST_ROWS] */
    double *exact, *exact_value;          /* [ADA_MOST_ROWS][D] of dQ or dK, and [E] of dV */
} sampled;

typedef struct {
    back_run *r;
    ada_gradient_budget *budget;
    sampled *queries, *keys; /* [B * H], [B * G] */
    bool *open;              /* [B * G] to be verified */
    bool *in_f64;            /* [B * G] its exact rows */
    bool *last;              /* [B * G] it was computed in fp64, from an lse and sums of its own */
    bool *closer;            /* [B * G] a few rows have found something: more are compared */
} verification;

/* How many of so many queries, or keys. Exact heads are compared for what the forward pass left, which
 * queries tell; their own arithmetic counts where the tolerance is near it. */
static int sampled_rows(const verification *v, int64_t group, int64_t of, bool keys) {
    int rows = keys && v->budget->tolerance > 1e-4 ? 0 : 4;
    if (v->budget->heads[group].choice.qk == ADA_RUNG_INT16) rows = ada_most_rows_to_verify(of);
    if (v->closer[group]) rows = ADA_MOST_ROWS;
    return rows < of ? rows : (int)of;
}

static sampled carve_sampled(ada_carver *c, int64_t n, int64_t width, int64_t value_width) {
    sampled s = {.n = 0};
    const int64_t floats = n * (int64_t)sizeof(float), doubles = ADA_MOST_ROWS * (int64_t)sizeof(double);
    s.share = ada_carve(c, floats), s.live = ada_carve(c, floats), s.size = ada_carve(c, floats);
    s.product = ada_carve(c, floats);
    s.truth = ada_carve(c, ADA_MOST_ROWS * (int64_t)sizeof *s.truth);
    s.exact = ada_carve(c, doubles * width), s.exact_value = ada_carve(c, doubles * value_width);
    return s;
}

static double draw_by_norms(const back_run *r, int which, int64_t b, int64_t h, const sampled *s,
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
    sampled *s = &v->queries[head];
    if (!v->open[group] || ada_job_cancelled(job, worker)) return;
    float *copy = (float *)(r->scratch + worker * r->scratch_bytes);
    for (int64_t i = 0; i < p->T; i++) {
        s->share[i] = 0, s->live[i] = sees_keys(r, b, h, i);
        s->product[i] = 1;
    }
    ada_add_shares(s->share, NULL, s->live, p->T);
    for (int x = 0; x < 3; x++) {
        ada_row_norms(r->k, factors[x], b, h, s->size, copy);
        if (x == 0) ada_add_shares(s->share, s->size, s->live, p->T);
        for (int64_t i = 0; i < p->T; i++) s->product[i] *= s->size[i];
    }
    ada_add_shares(s->share, s->product, s->live, p->T);
    s->norm2 = draw_by_norms(r, ADA_OF_QUERY, b, h, s, copy);
    s->n = ada_sample_rows(s->share, p->T, sampled_rows(v, group, p->T, false), QUERY_STREAM, s->rows,
                           s->weight);
}

static void draw_keys_task(void *context, ada_job *job, int64_t group, int worker) {
    verification *v = context;
    const back_run *r = v->r;
    const ada_problem *p = r->p;
    const int64_t b = group / p->G, g = group % p->G, per_group = p->H / p->G;
    sampled *s = &v->keys[group];
    if (!v->open[group] || ada_job_cancelled(job, worker)) return;
    float *copy = (float *)(r->scratch + worker * r->scratch_bytes);
    for (int64_t j = 0; j < p->S; j++) {
        if (j % ADA_BLOCK == 0) {
            const uint64_t seen = ada_block_seen(p, r->k, b, g * per_group, per_group, j / ADA_BLOCK, copy);
            for (int64_t c = j; c < p->S && c < j + ADA_BLOCK; c++) s->live[c] = seen >> (c - j) & 1;
        }
        s->share[j] = 0;
    }
    ada_add_shares(s->share, NULL, s->live, p->S);
    s->norm2 = draw_by_norms(r, ADA_OF_KEY, b, g, s, copy);
    s->norm2_value = draw_by_norms(r, ADA_OF_VALUE, b, g, s, copy);
    s->n =
        ada_sample_rows(s->share, p->S, sampled_rows(v, group, p->S, true), KEY_STREAM, s->rows, s->weight);
}

/* So many groups of rows a head may have. */
#define ROW_TASKS (ADA_MOST_ROWS / ADA_ROW_GROUP)

static void true_rows_task(void *context, ada_job *job, int64_t task, int worker) {
    verification *v = context;
    const back_run *r = v->r;
    const ada_problem *p = r->p;
    const int64_t head = task / ROW_TASKS, first = task % ROW_TASKS * ADA_ROW_GROUP;
    const int64_t b = head / p->H, h = head % p->H, group = b * p->G + h / (p->H / p->G);
    const sampled *s = &v->queries[head];
    const int n = (int)(s->n - first < ADA_ROW_GROUP ? s->n - first : ADA_ROW_GROUP);
    if (!v->open[group] || n <= 0 || ada_job_cancelled(job, worker)) return;
    (v->in_f64[group] ? true_rows_f64 : true_rows_f32)(r, b, h, s->rows + first, n,
                                                       r->scratch + worker * r->scratch_bytes,
                                                       s->truth + first, s->exact + first * p->D);
}

static void true_keys_task(void *context, ada_job *job, int64_t task, int worker) {
    verification *v = context;
    const back_run *r = v->r;
    const ada_problem *p = r->p;
    const int64_t group = task / ROW_TASKS, first = task % ROW_TASKS * ADA_ROW_GROUP;
    const sampled *s = &v->keys[group];
    const int n = (int)(s->n - first < ADA_ROW_GROUP ? s->n - first : ADA_ROW_GROUP);
    if (!v->open[group] || n <= 0 || ada_job_cancelled(job, worker)) return;
    (v->in_f64[group] ? true_keys_f64
                      : true_keys_f32)(r, group, s->rows + first, n, r->scratch + worker * r->scratch_bytes,
                                       s->exact + first * p->D, s->exact_value + first * p->E);
}

static void add_limits(ada_error_limits *to, const ada_error_limits *x) {
    to->estimate2 += x->estimate2, to->lower2 += x->lower2, to->upper2 += x->upper2;
}

/* The error of a gradient's head, from its sampled rows and what comes on top (beside, squared).
 * misses: above what is allowed beyond doubt. False where it may be. */
static bool compare_rows(const back_run *r, int which, int64_t b, int64_t h, const sampled *s,
                         const double *exact, double norm2, const ada_error_limits *beside, double allowed,
                         ada_measured *to, bool *misses) {
    const ada_array *a = &r->x->results[which];
    const int width = (int)a->shape[3];
    double error2[ADA_MOST_ROWS], piece[ADA_PIECE];
    if (!isfinite(norm2)) return true; /* plain arithmetic's own NaN */
    for (int i = 0; i < s->n; i++) {
        error2[i] = 0;
        for (int c = 0; c < width; c += ADA_PIECE) {
            const int n = ada_piece_of_row(r->k, a, b, h, s->rows[i], c, piece);
            for (int x = 0; x < n; x++) {
                const double off = piece[x] - exact[i * width + c + x];
                error2[i] += off * off;
            }
        }
    }
    ada_error_limits limits = ada_limit_error(error2, s->weight, s->n);
    add_limits(&limits, beside);
    const ada_relative_error error = ada_relate_error(&limits, norm2, allowed);
    *to = (ada_measured){error.error, error.limit, s->n};
    *misses |= error.misses;
    return isnan(to->limit) || to->limit <= allowed;
}

/* What the given lse and out put into dK and dV, squared: the sums of rows' own errors, and the square of the
 * share by which the lse moves all of them. */
typedef struct {
    ada_error_limits key, value;
    double shift2;
} forward_part;

static forward_part part_of_forward(const verification *v, int64_t group) {
    const back_run *r = v->r;
    const ada_problem *p = r->p;
    const int64_t per_group = p->H / p->G, first = group * per_group;
    const double kept = 1 / (1 - p->dropout_p);
    forward_part f = {.shift2 = 0};
    double shift = 0, weights = 0;
    for (int64_t head = first; head < first + per_group; head++) {
        const sampled *s = &v->queries[head];
        double key2[ADA_MOST_ROWS], value2[ADA_MOST_ROWS];
        for (int i = 0; i < s->n; i++) {
            const true_row *t = &s->truth[i];
            const int64_t row = head * p->T + s->rows[i];
            const double off = ADA_LN2 * (r->lse[row] + r->reference[row] - t->lse);
            const double delta = r->delta[row] - t->delta;
            value2[i] = off * off * t->weight2 * kept * t->grad2;
            key2[i] =
                t->query2 * (off * off * t->score2 + 2 * off * delta * t->both + delta * delta * t->slope2);
            shift += s->weight[i] * off, weights += s->weight[i];
        }
        const ada_error_limits key = ada_limit_error(key2, s->weight, s->n);
        const ada_error_limits value = ada_limit_error(value2, s->weight, s->n);
        add_limits(&f.key, &key), add_limits(&f.value, &value);
    }
    if (weights > 0) f.shift2 = shift / weights * (shift / weights);
    return f;
}

/* Whether a key head and its query heads keep the budget as far as is known. */
static bool compare_group(verification *v, int64_t group, bool *misses) {
    const back_run *r = v->r;
    const ada_problem *p = r->p;
    const bool *needs = r->x->needs;
    const double allowed = v->budget->tolerance + ada_rounding_of(p->query.dtype);
    const int64_t per_group = p->H / p->G, b = group / p->G, g = group % p->G;
    const ada_error_limits nothing = {0, 0, 0};
    forward_part part = part_of_forward(v, group);
    const sampled *k = &v->keys[group];
    ada_gradient_head *head = &v->budget->heads[group];
    bool keeps = true;
    for (int64_t h = g * per_group; needs[ADA_OF_QUERY] && h < (g + 1) * per_group; h++) {
        const sampled *s = &v->queries[b * p->H + h];
        keeps &= compare_rows(r, ADA_OF_QUERY, b, h, s, s->exact, s->norm2, &nothing, allowed,
                              &v->budget->queries[b * p->H + h], misses);
    }
    const double key2 = part.shift2 * k->norm2, value2 = part.shift2 * k->norm2_value;
    add_limits(&part.key, &(ada_error_limits){key2, 0, key2});
    add_limits(&part.value, &(ada_error_limits){value2, 0, value2});
    if (needs[ADA_OF_KEY])
        keeps &=
            compare_rows(r, ADA_OF_KEY, b, g, k, k->exact, k->norm2, &part.key, allowed, &head->key, misses);
    if (needs[ADA_OF_VALUE])
        keeps &= compare_rows(r, ADA_OF_VALUE, b, g, k, k->exact_value, k->norm2_value, &part.value, allowed,
                              &head->value, misses);
    return keeps;
}

static void recompute_task(void *context, ada_job *job, int64_t task, int worker) {
    verification *v = context;
    const back_run *r = v->r;
    const ada_problem *p = r->p;
    const int64_t head = task / r->tiles, tile = task % r->tiles, b = head / p->H, h = head % p->H;
    const int64_t group = b * p->G + h / (p->H / p->G);
    if (r->way[group] != WAY_EXACT || ada_job_cancelled(job, worker)) return;
    const ada_patch patch = {.b = b, .h = h, .i = tile * ADA_LANES, .n = rows_of_tile(p, tile)};
    const bool precise = v->budget->heads[group].choice.qk == ADA_RUNG_FP64;
    (precise ? recompute_rows_f64 : recompute_rows_f32)(r, patch, UINT64_MAX, true, precise,
                                                        r->scratch + worker * r->scratch_bytes);
}

/* Errors that the forward pass left lie in few rows, which those that are drawn may miss: where a few tell of
 * an eighth of the tolerance, beside what rounding the result takes, more are looked at, and half of it is as
 * good as none left. */
static bool leaves_doubt(const verification *v, int64_t group) {
    const ada_problem *p = v->r->p;
    const ada_gradient_head *head = &v->budget->heads[group];
    double limit = fmax(head->key.limit, head->value.limit); /* fmax passes NaN over */
    if (head->choice.qk == ADA_RUNG_INT16 || head->retried) return false;
    for (int64_t h = group * (p->H / p->G); h < (group + 1) * (p->H / p->G); h++)
        limit = fmax(limit, v->budget->queries[h].limit);
    return limit > v->budget->tolerance / (v->closer[group] ? 2 : 8) + ada_rounding_of(p->query.dtype);
}

static ada_status refuse_forced(const verification *v, int64_t group, ada_error *error) {
    const ada_problem *p = v->r->p;
    const ada_gradient_head *head = &v->budget->heads[group];
    double most = fmax(head->key.error, head->value.error); /* fmax passes NaN over */
    for (int64_t h = group * (p->H / p->G); h < (group + 1) * (p->H / p->G); h++)
        most = fmax(most, v->budget->queries[h].error);
    return ada_fail(
        error, ADA_ERR_NUMERICAL,
        "precision: expected gradients with a relative error of at most %g in every head, got about "
        "%.3g in key head (%lld, %lld) from ('%s', '%s')",
        v->budget->tolerance, most, (long long)(group / p->G), (long long)(group % p->G),
        ada_rung_name(head->choice.qk), ada_rung_name(head->choice.pv));
}

/* The next rung of a head that misses: fp32, with an lse and sums of its own, then all of that in fp64; which
 * a head in fp64 has not had yet if that was its first choice. */
static bool gradient_goes_up(verification *v, int64_t group) {
    back_run *r = v->r;
    ada_gradient_head *head = &v->budget->heads[group];
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
    const bool forced = v->budget->asked.qk != ADA_RUNG_AUTO;
    for (bool again = true; again;) {
        again = false;
        if (!run_tasks_on(v, p, c, draw_queries_task, p->B * p->H, heads * T * width) ||
            !run_tasks_on(v, p, c, draw_keys_task, r->groups, heads * S * width) ||
            !run_tasks_on(v, p, c, true_rows_task, p->B * p->H * ROW_TASKS, rows * S) ||
            !run_tasks_on(v, p, c, true_keys_task, r->groups * ROW_TASKS, rows * T))
            return interrupted(error);
        for (int64_t i = 0; i < r->groups; i++) {
            bool misses = false;
            if (!v->open[i]) continue;
            const bool holds = compare_group(v, i, &misses), doubt = leaves_doubt(v, i);
            if (forced && misses) return refuse_forced(v, i, error);
            const bool keeps = holds && !(doubt && v->closer[i]);
            v->closer[i] = keeps && doubt;
            v->open[i] = v->closer[i] || (!keeps && !forced && gradient_goes_up(v, i));
            v->in_f64[i] |= r->unfit[i];
            again |= v->open[i];
        }
        if (!again) break;
        if (!run_tasks_on(v, p, c, recompute_task, p->B * p->H * r->tiles, heads * T * S * width))
            return interrupted(error);
        if (run_ways(r, c, spare, error)) return error->status;
    }
    return ADA_OK;
}

static ada_status verify_gradient(back_run *r, const back_caller *c, ada_gradient_budget *budget,
                                  double *spare, ada_error *error) {
    const ada_problem *p = r->p;
    verification v = {.r = r, .budget = budget};
    ada_carver carver = {NULL, 0};
    for (int turn = 0; turn < 2; turn++) {
        if (turn && !(carver.base = ada_scratch_take(carver.used))) return no_memory(carver.used, error);
        carver.used = 0;
        v.queries = ada_carve(&carver, p->B * p->H * (int64_t)sizeof *v.queries);
        v.keys = ada_carve(&carver, r->groups * (int64_t)sizeof *v.keys);
        v.open = ada_carve(&carver, r->groups), v.in_f64 = ada_carve(&carver, r->groups);
        v.last = ada_carve(&carver, r->groups), v.closer = ada_carve(&carver, r->groups);
        for (int64_t i = 0; i < p->B * p->H; i++) {
            const sampled s = carve_sampled(&carver, p->T, p->D, 0);
            if (turn) v.queries[i] = s;
        }
        for (int64_t i = 0; i < r->groups; i++) {
            const sampled s = carve_sampled(&carver, p->S, p->D, p->E);
            if (turn) v.keys[i] = s;
        }
    }
    for (int64_t i = 0; i < r->groups; i++) {
        v.open[i] = true, v.last[i] = v.closer[i] = false;
        v.in_f64[i] = budget->tolerance <= 1e-4 || p->query.dtype == ADA_F64 || r->unfit[i];
    }
    const ada_status status = verify_rounds(&v, c, spare, error);
    ada_scratch_give_back(v.queries);
    return status;
}
