/* The path of one call: probe, plan, execute, verify, and once more where a head failed.
 *
 * Everything about a head depends on that head and the rates alone. Rows are sampled in streams of a
 * generator that is keyed by nothing else, so two calls give the same bits.
 */
#include "attend.h"

#include <float.h>
#include <math.h>
#include <string.h>
#include <time.h>

#include "attending.h"
#include "certify.h"
#include "gpu.h"
#include "memory.h"
#include "operands.h"
#include "sparse.h"
#include "verify.h"

#define CHOICE_STREAM 1
/* A guess may be this wrong: what it puts further from the budget is not looked at, and profiles of a few
 * rows are not believed when they say less than a part of it. */
#define GUESS_REACH 8
#define GUESS_PART 4
/* Exact rows run at this share of the speed of fp32 tiles. */
#define ROW_SPEED 0.6
/* To look at one element of a key, value or query, and to verify the head, in operations of the plain rung.
 */
#define LOOK_OPERATIONS 110
#define LOOK_WORK 16 /* multiply-adds that take as long, without verifying */
/* The same of a glance, and of comparing what came of it. */
#define GLANCE_OPERATIONS 30
#define GLANCE_WORK 4
/* What it expects of the output may be off by this much. */
#define GLANCE_SLACK 1.1
/* Rates are those of rows of so many keys, with what is done for each row by itself. */
#define RATE_KEYS 1024
/* The error of a head that nobody looked at, in fp32: what real ones show, and a bound of most. */
#define PLAIN_ERROR 3e-7
#define FIXED_ERROR 1e-6
/* A row's values differ: that its norm is that of one of them does not say that it has but one. */
#define MOST_OF_ROW 0.95f
/* Fewer rows are drawn without it: equal shares need them. */
#define LEAST_BY_MASS 8
/* Scores of some heads are off by more than this in fp32, and so may their lse be. */
#define LSE_TOLERANCE 2e-4

double ada_seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

ada_head ada_unknown_head(void) {
    ada_head head = {.forecast = {.entropy = NAN,
                                  .entropy_std = NAN,
                                  .block_entropy = NAN,
                                  .local_entropy = NAN,
                                  .score_std = NAN,
                                  .finite = true},
                     .predicted_error = NAN,
                     .measured_error = NAN,
                     .error_limit = NAN,
                     .error_bound = NAN,
                     .lse_error = NAN};
    for (int c = 0; c < ADA_CANDIDATES; c++) head.forecast.error[c] = head.seconds[c] = NAN;
    head.kept = 1;
    return head;
}

bool ada_run_tasks(ada_attending *a, ada_task_fn *task, int64_t tasks, double multiply_adds) {
    return ada_parallel_for(tasks, ada_threads_for(a->p, tasks, multiply_adds), task, a, a->interrupt,
                            a->context);
}

/* Of weights that are rounded to the format, where values neither cancel nor lie together. */
#define WEIGHTS_FP16 2.1e-4
#define WEIGHTS_BF16 1.7e-3

double ada_unseen_error(const ada_problem *p, int candidate) {
    const ada_choice choice = ada_candidates[candidate];
    if (candidate > 1 && ada_is_known(p) && choice.qk == ADA_RUNG_FP16 && choice.pv == ADA_RUNG_FP16)
        return WEIGHTS_FP16;
    if (candidate > 1 && ada_is_known(p) && choice.qk == ADA_RUNG_BF16 && p->query.dtype == ADA_BF16)
        return WEIGHTS_BF16;
    return candidate > 1 ? INFINITY : candidate == 0 ? 1e-14 : ada_is_fixed(p) ? FIXED_ERROR : PLAIN_ERROR;
}

double ada_error_on(const ada_attending *a, int64_t head, int c) {
    return a->states[head].look ? a->budget->heads[head].forecast.error[c] : ada_unseen_error(a->p, c);
}

/* ---- probe ---- */

static void look_at_keys(ada_attending *a, int64_t key_head, char *scratch) {
    const ada_problem *p = a->p;
    const int64_t per_batch = p->H / a->per_head, b = key_head / per_batch;
    const int64_t h = key_head % per_batch * a->per_head;
    const ada_look look = a->states[b * p->H + h].look;
    if (!look) return;
    ada_key_probe *keys = &a->keys[key_head];
    *keys = ada_key_probe_of(p, a->sparse != 0, a->probes + key_head * a->probe_bytes);
    if (look == ADA_LOOK_SOME && ada_know_keys(p, b, h, keys)) return;
    ada_probe_keys(p, a->k, b, h, a->per_head, look == ADA_LOOK_SOME ? ADA_LOOK_STEP : 1, keys, scratch);
    if (keys->count == 0)
        ada_probe_keys(p, a->k, b, h, a->per_head, 1, keys, scratch); /* a mask hides those */
}

static void keys_task(void *context, ada_job *job, int64_t key_head, int worker) {
    ada_attending *a = context;
    if (!ada_job_cancelled(job, worker)) look_at_keys(a, key_head, a->scratch + worker * a->scratch_bytes);
}

/* 2 (D + E) for every pair of a query and a key within its span. Spans are monotonic: 64 of them tell the
 * area.
 */
double ada_operations_of_head(const ada_problem *p, int64_t b) {
    const int64_t step = (p->T + 63) / 64;
    double pairs = 0, counted = 0;
    for (int64_t i = step / 2; i < p->T; i += step, counted++) {
        const ada_span span = ada_visible_span(p, b, i);
        if (span.end > span.first) pairs += (double)(span.end - span.first);
    }
    return 2 * (double)(p->D + p->E) * pairs * (double)p->T / counted;
}

double ada_operations(const ada_problem *p) {
    double sum = 0;
    for (int64_t b = 0; b < p->B; b++) sum += (double)p->H * ada_operations_of_head(p, b);
    return sum;
}

/* A head packs its keys for itself, though others may share them: it is planned alone. Queries and outputs of
 * few keys weigh more than in the rates. */
ada_task ada_task_of(const ada_attending *a, int64_t head, double margin) {
    const ada_problem *p = a->p;
    const double width = (double)(p->D + p->E);
    const double short_rows = p->on_gpu ? 0 : fmax(1 - (double)p->S / RATE_KEYS, 0) * (double)p->T;
    return (ada_task){.tolerance = a->budget->tolerance,
                      .margin = margin,
                      .lse = p->lse != NULL,
                      .dearest = a->budget->dearest,
                      .cheapest = a->budget->cheapest,
                      .operations = a->operations[head / p->H],
                      .elements = ((double)p->S + short_rows) * width,
                      .D = p->D,
                      .sparse = a->sparse,
                      .barred = a->states[head].barred,
                      .plain = ada_plain_candidate(p)};
}

/* Whether no rung cheaper than the plain one is allowed, so that landmarks are all that may save time. */
static bool only_ranks_pay(const ada_attending *a) {
    return a->ranks && !a->p->on_gpu && a->budget->cheapest != ADA_RUNG_AUTO &&
           a->budget->cheapest <= ada_candidates[ada_plain_candidate(a->p)].qk;
}

/* Rows that are profiled before the choice: none where no cheaper candidate is in sight, or where looking
 * would cost more than it may save. */
static int rows_to_profile(const ada_attending *a, const ada_forecast *guess, int64_t head) {
    const ada_problem *p = a->p;
    const ada_rate *rates = a->budget->rates;
    const int rows = p->T < ADA_LEAST_QUERIES ? 2 : p->T < 4096 ? 4 : 8;
    if (p->on_gpu || a->states[head].look != ADA_LOOK_ALL || !guess->finite) return 0;
    if (only_ranks_pay(a) || a->budget->structure == ADA_STRUCTURE_SPARSE) return rows;
    const ada_task task = ada_task_of(a, head, 1.0 / GUESS_REACH);
    const int best = ada_plan_head(guess, &task, rates);
    if (best <= task.plain) return 0;
    const double plain = ada_predicted_seconds(&task, &rates[task.plain]);
    const double looking = 1.5 * rows * plain / ROW_SPEED / (double)p->T;
    return plain - ada_predicted_seconds(&task, &rates[best]) > 2 * looking ? rows : 0;
}

/* What rounding the scores does to a row whose weights w^2 sum to x = norm / value2, were its values alike:
 * x (1 - x) times the square of the scores. */
static void size_by_norms(float *norms, const ada_row_mass *mass, float value2, int64_t T) {
    const float over = value2 > 0 ? 1 / value2 : 0;
    for (int64_t i = 0; i < T; i++) {
        const float x = fminf(norms[i] * over, MOST_OF_ROW);
        norms[i] = x * (1 - x) * mass[i].lse * mass[i].lse;
    }
}

/* The same, where one block has so much of the weight. */
static void size_by_blocks(float *sizes, const ada_row_mass *mass, int64_t T) {
    for (int64_t i = 0; i < T; i++) {
        const float x = mass[i].block;
        sizes[i] = x < 1 ? x * x * (1 - x) * mass[i].lse * mass[i].lse : 0;
    }
}

void ada_draw_rows(ada_attending *a, int64_t head, int n, float *norms, const float *shift2,
                   uint64_t stream) {
    const int64_t T = a->p->T;
    const float *live = a->sizes + head * T;
    float *share = a->shares + head * T;
    ada_head_state *s = &a->states[head];
    memset(share, 0, (size_t)T * sizeof *share);
    ada_add_shares(share, NULL, live, T);
    if (s->look || s->uneven) ada_add_shares(share, live, live, T);
    if (norms) ada_add_shares(share, norms, live, T);
    if (norms && a->mass && ada_is_fp32(&a->budget->heads[head]) && n >= LEAST_BY_MASS) {
        const ada_row_mass *mass = a->mass + head * T;
        size_by_norms(norms, mass, (float)s->value2, T);
        for (int i = 0; i < 2; i++) ada_add_shares(share, norms, live, T);
        size_by_blocks(norms, mass, T);
        ada_add_shares(share, norms, live, T);
    }
    for (int i = 0; shift2 && i < 3; i++) ada_add_shares(share, shift2, live, T);
    s->n = ada_sample_rows(share, T, n, stream, s->rows, s->weight);
}

/* All of a head at once, as far as others have no part in it, so that arrays are read again while they are
 * at hand. */
static void look_task(void *context, ada_job *job, int64_t head, int worker) {
    ada_attending *a = context;
    const ada_problem *p = a->p;
    const ada_key_probe *keys = &a->keys[head / a->per_head];
    const ada_head_state *s = &a->states[head];
    const int64_t b = head / p->H, h = head % p->H;
    char *scratch = a->scratch + worker * a->scratch_bytes;
    ada_row_profile *profiles = &a->profiles[head * ADA_MOST_ROWS]; /* a guess at first */
    if (!s->look || ada_job_cancelled(job, worker)) return;
    if (a->per_head == 1) look_at_keys(a, head, scratch);
    const ada_spreads spreads = ada_probe_queries(p, a->k, b, h, keys, a->sizes + head * p->T, scratch);
    ada_guess_profile(p, a->k, b, h, keys, profiles, scratch);
    ada_consider_head(a, head, &spreads);
    if (!s->n || ada_job_cancelled(job, worker)) return;
    ada_profile_rows(p, a->k, b, h, keys, s->rows, s->n, profiles, scratch);
    for (int i = 0; i < s->n; i++) profiles[i].weight = s->weight[i];
}

void ada_consider_head(ada_attending *a, int64_t head, const ada_spreads *spreads) {
    const ada_problem *p = a->p;
    const ada_key_probe *keys = &a->keys[head / a->per_head];
    ada_head_state *s = &a->states[head];
    const ada_row_profile *guess = &a->profiles[head * ADA_MOST_ROWS];
    ada_forecast *forecast = &a->budget->heads[head].forecast;
    ada_row_profile peak = *guess;
    ada_forecast_head(guess, 1, keys, p, ada_candidates_of(a, head), forecast);
    forecast->rows = 0;
    forecast->finite &= spreads->finite;
    ada_peak_profile(keys, spreads->largest, &peak);
    if (spreads->largest > 0) s->outliers = spreads->outliers / spreads->largest;
    ada_forecast_head(&peak, 1, keys, p, ada_candidates_of(a, head), &s->peak);
    s->value2 = keys->value2_mean;
    s->n = rows_to_profile(a, forecast, head);
    if (s->n) ada_draw_rows(a, head, s->n, NULL, NULL, CHOICE_STREAM);
}

/* Numbers of its queries, keys and values. */
static double elements_of(const ada_problem *p) {
    return (double)p->S * (double)(p->D + p->E) + (double)(p->T * p->D);
}

/* Whether a small head is glanced at before it is computed: where a rung may save more than that costs. Not
 * 8 bits for weights: how they round those of a row depends on its largest one, which a glance does not see.
 * barred: rungs that save less. */
static bool glance_pays(const ada_attending *a, int64_t head, unsigned *barred) {
    const ada_problem *p = a->p;
    const ada_budget *b = a->budget;
    if (!ada_is_few(p) || p->T < ADA_LEAST_QUERIES || p->on_gpu || p->stored || p->only_f64 ||
        p->query.dtype == ADA_F64 || !ada_guesses_are_fair(p) || ada_is_forced(b) || b->given ||
        b->structure == ADA_STRUCTURE_SPARSE || b->structure == ADA_STRUCTURE_LOW_RANK ||
        b->tolerance < (p->lse ? LSE_TOLERANCE : ADA_FINER * PLAIN_ERROR))
        return false;
    ada_task task = ada_task_of(a, head, 1);
    const double glance = 1e-9 * GLANCE_OPERATIONS * elements_of(p) / b->rates[task.plain].gflops[0];
    const double plain = ada_predicted_seconds(&task, &b->rates[task.plain]);
    task.barred = 1u << ada_candidate_of((ada_choice){ADA_RUNG_INT8, ADA_RUNG_INT8});
    for (int c = task.plain + 1; c < ADA_CANDIDATES; c++)
        if (plain - ada_predicted_seconds(&task, &b->rates[c]) <= glance) task.barred |= 1u << c;
    *barred = task.barred;
    return ada_may_pay(&task, b->rates, glance);
}

/* Whether looking at all keys of a head does: where a cheaper rung than the plain one may save more than that
 * costs, or the plain one may not do. */
static bool pays(const ada_attending *a, int64_t head) {
    const ada_problem *p = a->p;
    if (a->budget->tolerance < (p->lse ? LSE_TOLERANCE : ADA_FINER * PLAIN_ERROR)) return true;
    if (only_ranks_pay(a) || a->budget->structure == ADA_STRUCTURE_SPARSE) return true;
    const ada_task task = ada_task_of(a, head, 1);
    const double looked_at = elements_of(p);
    const ada_rate *rates = a->budget->rates;
    /* What is done for each row, not for each element, weighs more where rows are short. */
    const double each = a->backend->look_operations * (1 + fmin(1024 / (double)(p->D * p->D), 1));
    const double looking = 1e-9 * each * looked_at / rates[task.plain].gflops[0];
    return ada_may_pay(&task, rates, looking + a->backend->look_seconds);
}

/* What of a head's keys is looked at before it is computed. Calls that are not verified are predicted,
 * however they were planned. */
static ada_look look_at(const ada_attending *a, int64_t head) {
    const ada_problem *p = a->p;
    const ada_budget *b = a->budget;
    const bool predicted = p->T < ADA_LEAST_QUERIES;
    if (p->only_f64 || ada_is_forced(b) || ada_is_known(p)) return ADA_LOOK_NONE;
    if (b->given) return predicted && b->verify ? ADA_LOOK_SOME : ADA_LOOK_NONE;
    if (ada_is_fixed(p)) return ADA_LOOK_SOME;
    return pays(a, head) ? ADA_LOOK_ALL : predicted ? ADA_LOOK_SOME : ADA_LOOK_NONE;
}

int ada_rows_of_task(const ada_attending *a, int64_t task, int64_t *head, int *first) {
    *head = task / ADA_ROW_GROUPS, *first = (int)(task % ADA_ROW_GROUPS) * ADA_EXACT_ROWS;
    const int left = a->states[*head].n - *first;
    return left < ADA_EXACT_ROWS ? left : ADA_EXACT_ROWS;
}

double ada_row_work(const ada_attending *a) {
    double rows = 0;
    for (int64_t head = 0; head < ada_head_count(a); head++) rows += a->states[head].n;
    return rows * (double)a->p->S * (double)(a->p->D + a->p->E);
}

static ada_status probe_on_cpu(ada_attending *a, ada_error *error) {
    const ada_problem *p = a->p;
    const double width = (double)(p->D + p->E);
    const bool apart = a->per_head > 1;
    const double keys = LOOK_WORK * (double)a->key_heads * (double)p->S * width;
    const double queries = LOOK_WORK * (double)ada_head_count(a) * (double)p->T * (double)p->D;
    const bool done = (!apart || ada_run_tasks(a, keys_task, a->key_heads, keys)) &&
                      ada_run_tasks(a, look_task, ada_head_count(a), apart ? queries : keys + queries);
    return done ? ADA_OK : ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
}

/* ---- plan ---- */

/* Rows that the profiles cannot have seen: two keys share all weight of such a row, and its output moves by
 * their scores' noise times an eighth of the squared distance of their values. The lse errs most in the
 * largest row. */
static void bound_outliers(ada_attending *a, int64_t head) {
    const ada_head_state *s = &a->states[head];
    const ada_key_probe *keys = &a->keys[head / a->per_head];
    ada_forecast *f = &a->budget->heads[head].forecast;
    const ada_row_profile *rows = &a->profiles[head * ADA_MOST_ROWS];
    const double apart2 = 2 * (keys->value2_mean - keys->center2);
    double out2 = 0;
    for (int i = 0; i < (s->n ? s->n : 1); i++) out2 += rows[i].weight * rows[i].out2;
    for (int c = 0; c < ada_candidates_of(a, head); c++) {
        const double noise = fmin(s->peak.lse_error[c] / ADA_LARGEST_OF_MANY, 1);
        if (out2 > 0) f->error[c] = hypot(f->error[c], noise * sqrt(s->outliers * apart2 / 8 / out2));
        f->lse_error[c] = fmax(f->lse_error[c], s->peak.lse_error[c]);
    }
}

bool ada_may_be_sparse(const ada_problem *p, const ada_budget *b) {
    const bool by_name = b->structure == ADA_STRUCTURE_SPARSE;
    const int64_t queries = by_name ? ADA_LANES : ADA_SPARSE_LEAST, keys = by_name ? ADA_BLOCK : queries;
    return (by_name || b->structure == ADA_STRUCTURE_AUTO) && !b->given && !ada_is_forced(b) &&
           !ada_rules_out(p, ADA_STRUCTURE_SPARSE) && p->T >= queries && p->S >= keys;
}

/* Candidates of which blocks may stand in. */
static unsigned sparse_candidates(const ada_problem *p, const ada_kernels *k, const ada_budget *b) {
    const bool by_name = b->structure == ADA_STRUCTURE_SPARSE;
    unsigned candidates = 0;
    if (p->on_gpu || !ada_may_be_sparse(p, b)) return 0;
    for (int c = 0; c < ADA_CANDIDATES; c++)
        if ((by_name || b->rates[c].sparse < 1) && ada_may_stand_in(k, ada_candidates[c]))
            candidates |= 1u << c;
    return candidates;
}

/* Heads of which some blocks stand in where that is faster than the choice that was made, or asked for. */
static void choose_structure(const ada_attending *a, int64_t i, const ada_task *task) {
    ada_head *head = &a->budget->heads[i];
    const int dense = ada_candidate_of(head->choice);
    const bool forced = a->budget->structure == ADA_STRUCTURE_SPARSE;
    ada_sparse_choice sparse;
    if (!a->states[i].n ||
        !ada_plan_sparse(&head->forecast, task, a->budget->rates, dense, forced, &sparse)) {
        head->retried |= forced;
        return;
    }
    a->states[i].seconds = sparse.seconds;
    head->choice = ada_candidates[sparse.candidate];
    head->budget2 = sparse.budget2, head->joint = sparse.joint;
    head->kept = sparse.kept;
    head->predicted_error = sparse.error;
}

/* The candidate of a head that is open to choice. */
static int choose(const ada_attending *a, int64_t i, const ada_task *task) {
    const ada_budget *b = a->budget;
    const ada_forecast *f = &b->heads[i].forecast;
    if (a->p->only_f64) return 0;
    if (ada_is_known(a->p)) {
        ada_forecast known = {.finite = true};
        for (int c = 0; c < ADA_CANDIDATES; c++) known.error[c] = ada_unseen_error(a->p, c);
        return ada_plan_head(&known, task, b->rates);
    }
    if (ada_is_fixed(a->p)) {
        const bool lse_off = task->lse && f->lse_error[task->plain] > fmax(b->tolerance / ADA_MARGIN, 1e-6);
        const bool in_f64 =
            f->finite && (f->error[task->plain] * ADA_MARGIN_GUESSED > b->tolerance || lse_off);
        return (in_f64 || b->cheapest == ADA_RUNG_FP64) && b->dearest <= ADA_RUNG_FP64 ? 0 : task->plain;
    }
    const ada_head_state *s = &a->states[i];
    /* Dropout makes rows differ too much for two of them to tell. */
    const bool told = s->n && !a->p->drop_below;
    const bool fair = told || a->p->T >= ADA_LEAST_QUERIES || ada_guesses_are_fair(a->p);
    ada_forecast known = {.finite = false};
    if (s->look || s->glanced) known = *f;
    for (int c = task->plain + 1; !(s->look == ADA_LOOK_ALL && fair) && !s->glanced && c < ADA_CANDIDATES;
         c++)
        known.error[c] = INFINITY; /* what is more exact than the plain rung may be chosen still */
    return ada_plan_head(&known, task, b->rates);
}

double ada_margin_of(const ada_attending *a, int64_t head) {
    const int64_t T = a->p->T;
    const ada_head_state *s = &a->states[head];
    /* An lse is verified for few of its rows. */
    if (!(s->n || (s->glanced && !a->p->lse)) || T < ADA_LEAST_QUERIES) return ADA_MARGIN_GUESSED;
    return (s->glanced ? GLANCE_SLACK : 1) * ADA_MARGIN * ada_reach_of_rows(ada_most_rows_to_verify(T));
}

/* The structure of a plan; not landmarks for a call with options that break them: that is dense then. */
static void take_given(const ada_problem *p, const ada_planned *given, int64_t b, ada_head *head) {
    ada_far_keys keys;
    head->budget2 = given->budget2, head->joint = given->joint, head->kept = given->kept;
    if (given->rank == 0) return;
    head->dense = (ada_choice){ADA_RUNG_FP32, ADA_RUNG_FP32};
    head->rank = given->rank, head->rank_gain = given->rank_gain, head->rank_limit = given->rank_limit;
    if (!ada_rules_out(p, ADA_STRUCTURE_LOW_RANK) && ada_far_keys_of(p, b, &keys)) return;
    head->rank = 0, head->retried = true;
}

static void plan_heads(ada_attending *a) {
    const ada_problem *p = a->p;
    /* A cache's heads have no choice that goes by time. */
    const bool timed = !p->stored || a->budget->report || a->budget->plan_only;
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        ada_head *head = &a->budget->heads[i];
        ada_head_state *s = &a->states[i];
        const ada_forecast guess = head->forecast;
        const ada_row_profile *profiles = &a->profiles[i * ADA_MOST_ROWS];
        if (s->n) {
            ada_forecast_head(profiles, s->n, &a->keys[i / a->per_head], p, ADA_CANDIDATES, &head->forecast);
            head->forecast.rows = s->n;
            for (int c = 0; c < ADA_CANDIDATES; c++)
                head->forecast.error[c] = fmax(head->forecast.error[c], guess.error[c] / GUESS_PART);
            head->forecast.finite &= guess.finite;
        }
        if (s->look) bound_outliers(a, i);
        const ada_task task = ada_task_of(a, i, ada_margin_of(a, i));
        for (int c = 0; timed && c < ADA_CANDIDATES; c++)
            head->seconds[c] = ada_predicted_seconds(&task, &a->budget->rates[c]);
        if (a->budget->given && !p->only_f64)
            head->choice = a->budget->given[i].choice;
        else if (ada_is_forced(a->budget))
            head->choice = p->precision;
        else
            head->choice = ada_candidates[choose(a, i, &task)];
        for (int c = 0; c < ADA_CANDIDATES; c++) /* no kernel computes that */
            if (a->budget->rates[c].gflops[0] == 0) head->forecast.error[c] = head->seconds[c] = NAN;
        const int c = ada_candidate_of(head->choice);
        s->seconds = c < 0 ? INFINITY : head->seconds[c];
        head->predicted_error = c < 0 ? NAN : head->forecast.error[c];
        if (a->budget->given && !s->look && !s->glanced)
            head->predicted_error = a->budget->given[i].predicted_error;
        if (isnan(head->predicted_error) && !s->look && c >= 0 && (c <= 1 || ada_is_known(p)))
            head->predicted_error = ada_unseen_error(p, c);
        if (a->budget->given)
            take_given(p, &a->budget->given[i], i / p->H, head);
        else if (!a->backend->thin && (a->sparse || a->budget->structure == ADA_STRUCTURE_SPARSE))
            choose_structure(a, i, &task);
    }
}

/* Whether heads may have landmarks, by what was asked for and their options. Short ones win too little. */
static bool may_have_ranks(const ada_problem *p, const ada_budget *b) {
    if (b->structure == ADA_STRUCTURE_DENSE || b->structure == ADA_STRUCTURE_SPARSE || b->given ||
        ada_is_forced(b) || ada_rules_out(p, ADA_STRUCTURE_LOW_RANK))
        return false;
    return b->structure == ADA_STRUCTURE_LOW_RANK || (p->T >= ADA_SPARSE_LEAST && p->S >= ADA_SPARSE_LEAST);
}

ada_rank_task ada_rank_task_of(const ada_attending *a, const ada_far_keys *keys) {
    const ada_problem *p = a->p;
    const int64_t count = keys->end - keys->first, least = a->budget->least_rank, most = a->budget->most_rank;
    ada_rank_task t = {.keys = *keys, .queries = (double)p->T, .D = p->D, .E = p->E};
    t.most = most > 0 && most < ADA_MOST_RANK ? (int)most : ADA_MOST_RANK;
    if (count < t.most) t.most = (int)count;
    t.least = least < 1 ? 1 : least < t.most ? (int)least : t.most;
    return t;
}

static ada_rank_speed rank_speed_of(const ada_budget *b) {
    return (ada_rank_speed){b->rates[1], b->rates[1], 0, 0};
}

/* Most landmarks of a head that it may gain by, 0: none. Those that cannot are known by their profiles alone.
 */
static int ranks_to_look_at(const ada_attending *a, int64_t i) {
    const ada_budget *b = a->budget;
    const ada_head_state *s = &a->states[i];
    ada_far_keys keys;
    if (!ada_far_keys_of(a->p, i / a->p->H, &keys)) return 0;
    const ada_rank_task sizes = ada_rank_task_of(a, &keys);
    if (b->structure == ADA_STRUCTURE_LOW_RANK) return sizes.most;
    /* A sample of keys does not tell what the few with far larger values lose. */
    if (!s->n || a->keys[i / a->per_head].heavies) return 0;
    const ada_task task = ada_task_of(a, i, ada_margin_of(a, i));
    const ada_rank_speed speed = rank_speed_of(b);
    return ada_ranks_to_look_at(&b->heads[i].forecast, &task, &sizes, &speed, s->seconds);
}

void ada_choose_rank(const ada_attending *a, int64_t i, int most, double out2, const ada_rank_speed *speed,
                     const struct ada_sample *sample, char *scratch) {
    const ada_budget *b = a->budget;
    ada_head *head = &b->heads[i];
    const ada_head_state *s = &a->states[i];
    const bool forced = b->structure == ADA_STRUCTURE_LOW_RANK;
    ada_far_keys keys;
    ada_rank_forecast ranks;
    ada_rank_choice choice;
    ada_far_keys_of(a->p, i / a->p->H, &keys);
    const ada_task task = ada_task_of(a, i, ada_margin_of(a, i));
    const ada_rank_task sizes = ada_rank_task_of(a, &keys);
    const ada_rank_wish wish = ada_rank_wish_of(&task, &sizes, most, out2);
    ada_forecast_low_rank(a->p, a->k, i / a->p->H, i % a->p->H, sample, &wish, &ranks, scratch);
    if (!ada_plan_low_rank(&ranks, &wish, &task, &sizes, speed, s->seconds, forced, &choice)) {
        head->retried |= forced;
        return;
    }
    head->dense = head->choice;
    head->choice = (ada_choice){ADA_RUNG_FP32, ADA_RUNG_FP32};
    head->rank = choice.rank, head->rank_gain = choice.gain, head->rank_limit = choice.limit;
    head->budget2 = 0, head->kept = 1;
    head->predicted_error = choice.error;
}

/* For a head of a->list. */
static void rank_task(void *context, ada_job *job, int64_t index, int worker) {
    const ada_attending *a = context;
    const ada_rank_speed speed = rank_speed_of(a->budget);
    if (ada_job_cancelled(job, worker)) return;
    const int64_t i = a->list[index];
    const double out2 = a->states[i].n ? a->budget->heads[i].forecast.out2 : 0;
    ada_choose_rank(a, i, a->rank[index], out2, &speed, NULL,
                    a->rank_scratch + worker * a->rank_scratch_bytes);
}

static ada_status plan_ranks_on_cpu(ada_attending *a, ada_error *error) {
    const ada_problem *p = a->p;
    int64_t n = 0;
    int largest = 0;
    double work = 0;
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        const int most = ranks_to_look_at(a, i);
        if (most == 0) continue;
        a->list[n] = i, a->rank[n++] = most;
        largest = most > largest ? most : largest;
        work += ada_forecast_operations((double)p->S, p->D, p->E, most) / 2;
    }
    if (n == 0) return ADA_OK;
    const int threads = ada_threads_for(p, n, work);
    a->rank_scratch_bytes = ada_landmark_scratch_bytes(p, largest);
    a->rank_scratch = ada_scratch_take(threads * a->rank_scratch_bytes);
    if (!a->rank_scratch) return ada_no_scratch(threads * a->rank_scratch_bytes, error);
    const bool done = ada_parallel_for(n, threads, rank_task, a, a->interrupt, a->context);
    ada_scratch_give_back(a->rank_scratch);
    return done ? ADA_OK : ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
}

/* ---- execute ---- */

/* Few queries take the way that reads K and V once, for all heads together or none: what is of another mind
 * is computed again after that, so that a head's bits depend on it alone. */
static bool takes_all(const ada_attending *a, ada_choice choice) {
    const ada_choice plain = ada_candidates[ada_plain_candidate(a->p)];
    const bool is_plain = choice.qk == plain.qk && choice.pv == plain.pv;
    return a->p->T <= ADA_ROWS_MAX && !a->p->on_gpu &&
           (is_plain || ada_is_forced(a->budget) || a->p->only_f64);
}

static ada_status execute_on_cpu(ada_attending *a, const ada_problem *problem, const int64_t *heads,
                                 int64_t n, ada_error *error) {
    return ada_execute(problem, heads, n, a->interrupt, a->context, error);
}

static ada_status execute_ranks_on_cpu(ada_attending *a, const ada_low_rank *low, const int64_t *heads,
                                       int64_t n, ada_error *error) {
    return ada_execute_low_rank(a->p, low, heads, n, a->interrupt, a->context, error);
}

const ada_backend ada_cpu_backend = {.probe = probe_on_cpu,
                                     .execute = execute_on_cpu,
                                     .fetch_norms = ada_cpu_fetch_norms,
                                     .output_norm = ada_cpu_output_norm,
                                     .exact = ada_cpu_exact,
                                     .output = ada_cpu_output,
                                     .output_lse = ada_cpu_output_lse,
                                     .plan_ranks = plan_ranks_on_cpu,
                                     .execute_ranks = execute_ranks_on_cpu,
                                     .look_operations = LOOK_OPERATIONS};

/* apart: not even those that take all. */
static ada_status execute_dense(ada_attending *a, const int64_t *list, int64_t n, bool apart,
                                ada_error *error) {
    ada_head *heads = a->budget->heads;
    int64_t *launch = a->list + ada_head_count(a);
    int64_t done = 0;
    const int pairs = ADA_RUNG_COUNT * ADA_RUNG_COUNT;
    for (int turn = 0; turn < 2 * pairs && done < n; turn++) { /* what takes all comes first */
        const int pair = turn % pairs;
        const ada_choice choice = {(ada_rung)(pair / ADA_RUNG_COUNT), (ada_rung)(pair % ADA_RUNG_COUNT)};
        const bool all = !apart && takes_all(a, choice);
        int64_t count = 0;
        if (all != (turn < pairs)) continue;
        for (int64_t i = 0; i < n; i++) {
            const ada_choice own = heads[list[i]].choice;
            if (own.qk == choice.qk && own.pv == choice.pv) launch[count++] = list[i];
        }
        if (count == 0) continue;
        ada_problem problem = *a->p;
        problem.precision = choice;
        problem.compute_f64 = choice.qk == ADA_RUNG_FP64;
        problem.most_bias =
            fmin(problem.most_bias, a->budget->tolerance * 0x1p22); /* a quarter by its digits */
        problem.ran = a->ran, problem.mass = a->mass;
        if (ada_may_glance(a, choice)) problem.head_done = ada_glance_at, problem.done_context = a;
        const ada_sparse sparse = {a->budget2, a->joint, a->shift2, a->kept, a->budget->picture};
        const bool may = !all && (a->backend->leaves_out ? a->backend->leaves_out(a, choice)
                                                         : ada_may_stand_in(a->k, choice));
        for (int64_t i = 0; i < count; i++) {
            ada_head *head = &heads[launch[i]];
            if (!may) head->budget2 = 0; /* a plan from another machine */
            if (head->budget2 > 0) problem.sparse = &sparse;
            a->budget2[launch[i]] = head->budget2, a->joint[launch[i]] = head->joint, a->kept[launch[i]] = 1;
        }
        if (a->backend->execute(a, &problem, all ? NULL : launch, count, error)) return error->status;
        done += count;
    }
    for (int64_t i = 0; i < n; i++) {
        ada_head *head = &heads[list[i]];
        const ada_choice ran = a->ran[list[i]];
        head->kept = a->kept[list[i]];
        if (ran.qk == head->choice.qk && ran.pv == head->choice.pv) continue;
        head->choice = ran;
        head->budget2 = 0, head->retried = true;
        head->predicted_error = head->forecast.error[ada_candidate_of(ran)];
    }
    return ADA_OK;
}

void ada_make_dense(ada_head *head) {
    if (head->rank > 0) head->choice = head->dense;
    const int c = ada_candidate_of(head->choice);
    head->rank = 0, head->budget2 = 0, head->kept = 1;
    head->predicted_error = c < 0 ? NAN : head->forecast.error[c];
    head->retried = true;
}

/* Those that fail are computed as if they had no landmarks. */
static ada_status execute_ranks(ada_attending *a, const int64_t *list, int64_t n, ada_error *error) {
    const ada_low_rank low = {a->rank, a->gain, a->limit, a->shift2, a->failed};
    int64_t *again = a->list + 3 * ada_head_count(a), count = 0;
    for (int64_t i = 0; i < n; i++) {
        const ada_head *head = &a->budget->heads[list[i]];
        a->rank[i] = head->rank, a->gain[i] = head->rank_gain, a->limit[i] = head->rank_limit;
    }
    if (a->backend->execute_ranks(a, &low, list, n, error)) return error->status;
    for (int64_t i = 0; i < n; i++) {
        ada_head *head = &a->budget->heads[list[i]];
        if (!a->failed[i]) continue;
        ada_make_dense(head);
        again[count++] = list[i];
    }
    return count ? execute_dense(a, again, count, true, error) : ADA_OK;
}

ada_status ada_execute_heads(ada_attending *a, const int64_t *list, int64_t n, ada_error *error) {
    int64_t *dense = a->list + 2 * ada_head_count(a), count = 0, ranks = 0;
    for (int64_t i = 0; i < n; i++)
        if (a->budget->heads[list[i]].rank == 0) dense[count++] = list[i];
    if (count && execute_dense(a, dense, count, false, error)) return error->status;
    for (int64_t i = 0; i < n; i++)
        if (a->budget->heads[list[i]].rank > 0) dense[ranks++] = list[i];
    return ranks ? execute_ranks(a, dense, ranks, error) : ADA_OK;
}

/* ---- the call ---- */

static int64_t carve_all(ada_attending *a, char *memory, int threads) {
    const ada_problem *p = a->p;
    const int64_t heads = p->B * p->H, rows = heads * ADA_MOST_ROWS;
    bool sparse = a->sparse != 0 || a->ranks;
    for (int64_t i = 0; a->budget->given && i < heads; i++)
        sparse |= a->budget->given[i].budget2 > 0 || a->budget->given[i].rank > 0;
    ada_carver c = {memory, 0};
    a->keys = ada_carve(&c, a->key_heads * (int64_t)sizeof *a->keys);
    a->probes = ada_carve(&c, a->key_heads * a->probe_bytes);
    a->states = ada_carve(&c, heads * (int64_t)sizeof *a->states);
    a->sizes = ada_carve(&c, heads * p->T * (int64_t)sizeof *a->sizes);
    a->norms = ada_carve(&c, heads * p->T * (int64_t)sizeof *a->norms);
    const bool weighed = a->budget->verify && !p->on_gpu;
    a->mass = weighed ? ada_carve(&c, heads * p->T * (int64_t)sizeof *a->mass) : NULL;
    a->shares = ada_carve(&c, heads * p->T * (int64_t)sizeof *a->shares);
    a->profiles = ada_carve(&c, rows * (int64_t)sizeof *a->profiles);
    a->exact_lse = ada_carve(&c, rows * (int64_t)sizeof(double));
    a->error2 = ada_carve(&c, rows * (int64_t)sizeof(double));
    a->exact_o = ada_carve(&c, ada_has_exact_rows(a) ? rows * p->E * (int64_t)sizeof(double) : 0);
    a->ran = ada_carve(&c, heads * (int64_t)sizeof *a->ran);
    a->budget2 = ada_carve(&c, heads * (int64_t)sizeof *a->budget2);
    a->joint = ada_carve(&c, heads * (int64_t)sizeof *a->joint);
    a->shift2 = ada_carve(&c, sparse ? heads * p->T * (int64_t)sizeof *a->shift2 : 0);
    a->kept = ada_carve(&c, heads * (int64_t)sizeof *a->kept);
    a->list = ada_carve(&c, 4 * heads * (int64_t)sizeof *a->list);
    a->rank = ada_carve(&c, heads * (int64_t)sizeof *a->rank);
    a->gain = ada_carve(&c, heads * (int64_t)sizeof *a->gain);
    a->limit = ada_carve(&c, heads * (int64_t)sizeof *a->limit);
    a->operations = ada_carve(&c, p->B * (int64_t)sizeof *a->operations);
    a->failed = ada_carve(&c, heads * (int64_t)sizeof *a->failed);
    a->scratch = ada_carve(&c, threads * a->scratch_bytes);
    if (a->backend->carve) a->backend->carve(a, &c);
    return c.used;
}

static void glance_task(void *context, ada_job *job, int64_t head, int worker) {
    ada_attending *a = context;
    ada_head_state *s = &a->states[head];
    if (s->glanced && !ada_job_cancelled(job, worker))
        s->glanced = ada_guess_by_glance(a, head, a->scratch + worker * a->scratch_bytes);
}

static ada_status attend_within(ada_attending *a, ada_error *error) {
    const ada_problem *p = a->p;
    ada_budget *budget = a->budget;
    double start = ada_seconds_now();
    bool probed = false, glances = false;
    unsigned barred = 0;
    for (int64_t b = 0; b < p->B; b++) a->operations[b] = ada_operations_of_head(p, b);
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        budget->heads[i] = ada_unknown_head();
        /* Which follows from the sequence and the options alone. */
        ada_head_state *s = &a->states[i];
        *s = (ada_head_state){0};
        if (i % p->H)
            s->look = s[-1].look, s->glanced = s[-1].glanced, s->barred = s[-1].barred;
        else if (!(s->glanced = glance_pays(a, i, &barred)))
            s->look = look_at(a, i);
        else
            s->barred = barred;
        probed |= s->look != ADA_LOOK_NONE, glances |= s->glanced;
    }
    if (probed && a->backend->probe(a, error)) return error->status;
    const double work = GLANCE_WORK * elements_of(p) * (double)ada_head_count(a);
    if (glances && !ada_run_tasks(a, glance_task, ada_head_count(a), work))
        return ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
    double now = ada_seconds_now();
    budget->seconds[0] = now - start, start = now;
    plan_heads(a);
    if (a->backend->thin && a->backend->thin(a, error)) return error->status;
    if (a->ranks && a->backend->plan_ranks(a, error)) return error->status;
    now = ada_seconds_now();
    budget->seconds[1] = now - start, start = now;
    if (budget->plan_only) return ADA_OK;
    for (int64_t i = 0; i < ada_head_count(a); i++) a->list[i] = i;
    if (ada_execute_heads(a, a->list, ada_head_count(a), error)) return error->status;
    now = ada_seconds_now();
    budget->seconds[2] = now - start, start = now;
    if (budget->verify && !p->only_f64 && ada_verify_heads(a, error)) return error->status;
    budget->seconds[3] = ada_seconds_now() - start;
    return ADA_OK;
}

/* Without a budget: what each head was computed with. */
static void record_exact(const ada_problem *p, ada_budget *budget, double seconds) {
    for (int64_t i = 0; i < p->B * p->H; i++) {
        budget->heads[i] = ada_unknown_head();
        budget->heads[i].choice = p->ran[i];
        budget->heads[i].retried =
            ada_is_forced(budget) && (p->ran[i].qk != budget->asked.qk || p->ran[i].pv != budget->asked.pv);
    }
    budget->seconds[2] = seconds;
}

/* Refuses a structure by name where something does not go with it. */
static ada_status check_structure(const ada_problem *p, const ada_budget *budget, ada_error *error) {
    const bool sparse = budget->structure == ADA_STRUCTURE_SPARSE;
    const char *what = ada_rules_out(p, budget->structure);
    bool computed = !sparse || p->on_gpu;
    for (int c = 0; c < ADA_CANDIDATES; c++)
        computed = computed || ada_may_stand_in(ada_kernels_get(), ada_candidates[c]);
    if (what)
        return ada_fail(error, ADA_ERR_ARGUMENT, "structure: expected 'auto' or 'dense' beside %s, got '%s'",
                        what, sparse ? "sparse" : "low_rank");
    if (!computed)
        return ada_fail(error, ADA_ERR_ARGUMENT,
                        "structure: expected 'auto', 'dense' or 'low_rank' on a CPU without AVX2, got "
                        "'sparse'");
    return ADA_OK;
}

ada_status ada_attend(const ada_problem *p, ada_budget *budget, bool (*interrupt)(void *), void *context,
                      ada_error *error) {
    memset(budget->seconds, 0, sizeof budget->seconds);
    if (check_structure(p, budget, error)) return error->status;
    if (p->on_gpu) return ada_gpu_attend(p, budget, interrupt, context, error);
    if (ada_check_mask(p, interrupt, context, error)) return error->status;
    if (budget->tolerance == 0) {
        const double start = budget->heads ? ada_seconds_now() : 0;
        if (ada_execute(p, NULL, 0, interrupt, context, error)) return error->status;
        if (budget->heads) record_exact(p, budget, ada_seconds_now() - start);
        return ADA_OK;
    }
    if (ada_may_certify(p, budget)) return ada_certify(p, budget, interrupt, context, error);
    return ada_attend_within(p, &ada_cpu_backend, NULL, budget, interrupt, context, error);
}

ada_status ada_attend_within(const ada_problem *p, const ada_backend *backend, void *device,
                             ada_budget *budget, bool (*interrupt)(void *), void *context, ada_error *error) {
    const ada_array *mask = &p->attn_mask;
    ada_attending a = {.p = p,
                       .k = ada_kernels_get(),
                       .backend = backend,
                       .device = device,
                       .budget = budget,
                       .interrupt = interrupt,
                       .context = context,
                       .per_head = mask->data && mask->stride[1] && !p->on_gpu ? 1 : p->H / p->G};
    a.key_heads = p->B * p->H / a.per_head;
    a.sparse = sparse_candidates(p, a.k, budget);
    a.probe_bytes = ada_key_probe_bytes(p, a.sparse != 0);
    a.scratch_bytes = ada_probe_scratch_bytes(p, a.sparse != 0);
    if (ada_glance_scratch_bytes(p) > a.scratch_bytes) a.scratch_bytes = ada_glance_scratch_bytes(p);
    a.ranks = may_have_ranks(p, budget);
    /* What is told of heads has the workers of ada_execute, whose tasks are tiles. */
    const int64_t tiles = (p->T + ADA_LANES - 1) / ADA_LANES;
    const int64_t tasks = ada_head_count(&a) * (tiles > ADA_ROW_GROUPS ? tiles : ADA_ROW_GROUPS);
    const int threads = ada_threads_for(p, tasks, INFINITY);
    const int64_t bytes = carve_all(&a, NULL, threads);
    char *memory = ada_scratch_take(bytes);
    if (!memory) return ada_no_scratch(bytes, error);
    carve_all(&a, memory, threads);
    const ada_status status = attend_within(&a, error);
    ada_scratch_give_back(memory);
    return status;
}
