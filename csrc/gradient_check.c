/* Sampled rows of gradients beside exact ones; see gradient_check.h. */
#include "gradient_check.h"

#include <math.h>
#include <string.h>

static bool is_narrow(ada_choice choice) { return choice.qk > ADA_RUNG_FP32; }

/* How many of so many queries, or keys. Exact heads are compared for what the forward pass left, which
 * queries tell; their own arithmetic counts where the tolerance is near it. */
static int sampled_rows(const ada_gradient_check *v, int64_t group, int64_t of, bool keys) {
    int rows = keys && v->budget->tolerance > 1e-4 ? 0 : 4;
    if (is_narrow(v->budget->heads[group].choice)) rows = ada_most_rows_to_verify(of);
    if (v->closer[group]) rows = ADA_MOST_ROWS;
    return rows < of ? rows : (int)of;
}

static ada_sampled carve_sampled(ada_carver *c, int64_t n, int64_t width, int64_t value_width) {
    ada_sampled s = {.n = 0};
    const int64_t floats = n * (int64_t)sizeof(float), doubles = ADA_MOST_ROWS * (int64_t)sizeof(double);
    s.share = ada_carve(c, floats), s.live = ada_carve(c, floats), s.size = ada_carve(c, floats);
    s.product = ada_carve(c, floats);
    s.truth = ada_carve(c, ADA_MOST_ROWS * (int64_t)sizeof *s.truth);
    s.exact = ada_carve(c, doubles * width), s.exact_value = ada_carve(c, doubles * value_width);
    s.found = ada_carve(c, doubles * width), s.found_value = ada_carve(c, doubles * value_width);
    return s;
}

void ada_gradient_check_carve(ada_gradient_check *v, ada_carver *c) {
    const ada_problem *p = &v->x->p;
    const int64_t heads = p->B * p->H, groups = p->B * p->G;
    v->queries = ada_carve(c, heads * (int64_t)sizeof *v->queries);
    v->keys = ada_carve(c, groups * (int64_t)sizeof *v->keys);
    v->open = ada_carve(c, groups), v->closer = ada_carve(c, groups);
    for (int64_t i = 0; i < heads; i++) {
        const ada_sampled s = carve_sampled(c, p->T, p->D, 0);
        if (c->base) v->queries[i] = s;
    }
    for (int64_t i = 0; i < groups; i++) {
        const ada_sampled s = carve_sampled(c, p->S, p->D, p->E);
        if (c->base) v->keys[i] = s, v->open[i] = true, v->closer[i] = false;
    }
}

void ada_sampled_clear(ada_sampled *s, int64_t of) { memset(s->share, 0, (size_t)of * sizeof *s->share); }

void ada_draw_gradient(const ada_gradient_check *v, int64_t group, bool keys, ada_sampled *s) {
    const int64_t of = keys ? v->x->p.S : v->x->p.T;
    s->n = ada_sample_rows(s->share, of, sampled_rows(v, group, of, keys),
                           keys ? ADA_KEY_STREAM : ADA_QUERY_STREAM, s->rows, s->weight);
}

static void add_limits(ada_error_limits *to, const ada_error_limits *x) {
    to->estimate2 += x->estimate2, to->lower2 += x->lower2, to->upper2 += x->upper2;
}

/* The error of a gradient's head, from its sampled rows and what comes on top (beside, squared).
 * misses: above what is allowed beyond doubt. False where it may be. */
static bool compare_rows(const ada_sampled *s, const double *exact, const double *found, int64_t width,
                         double norm2, const ada_error_limits *beside, double allowed, ada_measured *to,
                         bool *misses) {
    double error2[ADA_MOST_ROWS];
    if (!isfinite(norm2)) return true; /* plain arithmetic's own NaN */
    for (int i = 0; i < s->n; i++) {
        error2[i] = 0;
        for (int64_t c = i * width; c < (i + 1) * width; c++)
            error2[i] += (found[c] - exact[c]) * (found[c] - exact[c]);
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

static forward_part part_of_forward(const ada_gradient_check *v, int64_t group) {
    const ada_problem *p = &v->x->p;
    const int64_t per_group = p->H / p->G, first = group * per_group;
    const double kept = 1 / (1 - p->dropout_p);
    forward_part f = {.shift2 = 0};
    double shift = 0, weights = 0;
    for (int64_t head = first; head < first + per_group; head++) {
        const ada_sampled *s = &v->queries[head];
        double key2[ADA_MOST_ROWS], value2[ADA_MOST_ROWS];
        for (int i = 0; i < s->n; i++) {
            const ada_true_row *t = &s->truth[i];
            const double off = ADA_LN2 * (t->given_lse - t->lse), delta = t->given_delta - t->delta;
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
static bool compare_group(ada_gradient_check *v, int64_t group, bool *misses) {
    const ada_problem *p = &v->x->p;
    const bool *needs = v->x->needs;
    const double allowed = v->budget->tolerance + ada_rounding_of(p->query.dtype);
    const int64_t per_group = p->H / p->G, b = group / p->G, g = group % p->G;
    const ada_error_limits nothing = {0, 0, 0};
    forward_part part = part_of_forward(v, group);
    const ada_sampled *k = &v->keys[group];
    ada_gradient_head *head = &v->budget->heads[group];
    bool keeps = true;
    for (int64_t h = g * per_group; needs[ADA_OF_QUERY] && h < (g + 1) * per_group; h++) {
        const ada_sampled *s = &v->queries[b * p->H + h];
        keeps &= compare_rows(s, s->exact, s->found, p->D, s->norm2, &nothing, allowed,
                              &v->budget->queries[b * p->H + h], misses);
    }
    const double key2 = part.shift2 * k->norm2, value2 = part.shift2 * k->norm2_value;
    add_limits(&part.key, &(ada_error_limits){key2, 0, key2});
    add_limits(&part.value, &(ada_error_limits){value2, 0, value2});
    if (needs[ADA_OF_KEY])
        keeps &= compare_rows(k, k->exact, k->found, p->D, k->norm2, &part.key, allowed, &head->key, misses);
    if (needs[ADA_OF_VALUE])
        keeps &= compare_rows(k, k->exact_value, k->found_value, p->E, k->norm2_value, &part.value, allowed,
                              &head->value, misses);
    return keeps;
}

/* Errors that the forward pass left lie in few rows, which those that are drawn may miss: where a few tell of
 * an eighth of the tolerance, beside what rounding the result takes, more are looked at, and half of it is as
 * good as none left. */
static bool leaves_doubt(const ada_gradient_check *v, int64_t group) {
    const ada_problem *p = &v->x->p;
    const ada_gradient_head *head = &v->budget->heads[group];
    double limit = fmax(head->key.limit, head->value.limit); /* fmax passes NaN over */
    if (is_narrow(head->choice) || head->retried) return false;
    for (int64_t h = group * (p->H / p->G); h < (group + 1) * (p->H / p->G); h++)
        limit = fmax(limit, v->budget->queries[h].limit);
    return limit > v->budget->tolerance / (v->closer[group] ? 2 : 8) + ada_rounding_of(p->query.dtype);
}

static ada_status refuse_forced(const ada_gradient_check *v, int64_t group, ada_error *error) {
    const ada_problem *p = &v->x->p;
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

ada_status ada_compare_gradients(ada_gradient_check *v, bool (*goes_up)(void *context, int64_t group),
                                 void *context, bool *any_open, ada_error *error) {
    const bool forced = v->budget->asked.qk != ADA_RUNG_AUTO;
    *any_open = false;
    for (int64_t i = 0; i < v->x->p.B * v->x->p.G; i++) {
        bool misses = false;
        if (!v->open[i]) continue;
        const bool holds = compare_group(v, i, &misses), doubt = leaves_doubt(v, i);
        if (forced && misses) return refuse_forced(v, i, error);
        const bool keeps = holds && !(doubt && v->closer[i]);
        v->closer[i] = keeps && doubt;
        v->open[i] = v->closer[i] || (!keeps && !forced && goes_up(context, i));
        *any_open |= v->open[i];
    }
    return ADA_OK;
}
