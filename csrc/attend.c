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

#include "exact.h"
#include "execute.h"
#include "memory.h"
#include "probe.h"
#include "rows.h"
#include "verify.h"

#define REAL float
#define KIND(name) name##_f32
#include "read_tpl.h"

enum { MOST_ROWS = 32, CHOICE_STREAM = 1, VERIFY_STREAM = 2 };
/* What a call of few queries is computed in: its error in fp32 is of this class. */
#define FEW_ERROR 1e-6
/* Fewer queries are not verified: that would cost as much as computing them. */
#define LEAST_QUERIES 64
/* Between a prediction from statistics alone and the tolerance. */
#define MARGIN_GUESSED 3
/* A guess may be this wrong: what it puts further from the budget is not looked at, and profiles of a few
 * rows are not believed when they say less than a part of it. */
#define GUESS_REACH 8
#define GUESS_PART 4
/* Exact rows are this much finer than the tolerance, and run at this share of the speed of fp32 tiles. */
#define FINER 20
#define ROW_SPEED 0.6
/* An fp32 sum of weights and values is off by this share of their root mean square norm. */
#define SUM_ERROR 3e-8
/* To look at one element of a key, value or query, in seconds. */
#define LOOK_SECONDS 4e-10
/* The error of a head that nobody looked at, in fp32: what real ones show. */
#define PLAIN_ERROR 3e-7

/* One head on its way through the phases. */
typedef struct {
    int64_t rows[MOST_ROWS]; /* of the choice, later those to verify */
    double weight[MOST_ROWS];
    int n;
    bool exact_f64;
    double out2;       /* squared norm of the output; NaN or infinite: not to be verified */
    double value2;     /* mean squared norm of the values */
    bool open;         /* to be verified */
    bool drawn;        /* rows are those to verify */
    double outliers;   /* rows like the one with the largest spread, so few that a sample may miss them */
    ada_forecast peak; /* of the row whose lse errs most */
} head_state;

typedef struct {
    const ada_problem *p;
    const ada_kernels *k;
    ada_budget *budget;
    bool (*interrupt)(void *);
    void *context;
    int64_t per_head; /* query heads that share a key probe */
    int64_t key_heads;
    char *probes; /* [key_heads] */
    int64_t probe_bytes;
    ada_key_probe *keys;       /* [key_heads] */
    head_state *states;        /* [B * H] */
    float *sizes;              /* [B * H][T] of the rows, ada_probe_queries */
    float *norms;              /* [B * H][T] squared, of the output's rows */
    float *shares;             /* [B * H][T] */
    ada_row_profile *profiles; /* [B * H][MOST_ROWS] */
    double *exact_lse;         /* [B * H][MOST_ROWS] */
    double *error2;            /* [B * H][MOST_ROWS] */
    double *exact_o;           /* [B * H][MOST_ROWS][E] */
    ada_choice *ran;           /* [B * H] */
    int64_t *list;             /* [B * H] */
    bool probed;               /* sizes and forecasts are known */
    char *scratch;
    int64_t scratch_bytes;
} attending;

static bool forced(const ada_budget *b) { return b->asked.qk != ADA_RUNG_AUTO; }

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static ada_head unknown_head(void) {
    ada_head head = {.forecast = {.entropy = NAN,
                                  .entropy_std = NAN,
                                  .block_entropy = NAN,
                                  .score_std = NAN,
                                  .finite = true},
                     .predicted_error = NAN,
                     .measured_error = NAN,
                     .error_limit = NAN,
                     .lse_error = NAN};
    for (int c = 0; c < ADA_CANDIDATES; c++) head.forecast.error[c] = head.seconds[c] = NAN;
    return head;
}

static int64_t head_count(const attending *a) { return a->p->B * a->p->H; }

static bool run_tasks(attending *a, ada_task_fn *task, int64_t tasks, double multiply_adds) {
    return ada_parallel_for(tasks, ada_threads_for(a->p, tasks, multiply_adds), task, a, a->interrupt,
                            a->context);
}

/* Few queries take the way that reads K and V once: all heads or none, so that a head's bits depend on it
 * alone.
 */
static bool takes_few(const ada_problem *p) { return p->stored || p->T <= ADA_ROWS_MAX || p->only_f64; }

/* Of a candidate that is chosen for a head which nobody looked at. */
static double unseen_error(const ada_problem *p, int candidate) {
    return candidate == 0 ? 1e-14 : takes_few(p) ? FEW_ERROR : PLAIN_ERROR;
}

/* ---- probe ---- */

static void keys_task(void *context, ada_job *job, int64_t task, int worker) {
    attending *a = context;
    const ada_problem *p = a->p;
    const int64_t per_batch = p->H / a->per_head;
    if (ada_job_cancelled(job, worker)) return;
    a->keys[task] = ada_key_probe_of(p, a->probes + task * a->probe_bytes);
    ada_probe_keys(p, a->k, task / per_batch, task % per_batch * a->per_head, a->per_head, &a->keys[task],
                   a->scratch + worker * a->scratch_bytes);
}

/* 2 (D + E) for every pair of a query and a key within its span. Spans are monotonic: 64 of them tell the
 * area.
 */
static double operations_of_head(const ada_problem *p, int64_t b) {
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
    for (int64_t b = 0; b < p->B; b++) sum += (double)p->H * operations_of_head(p, b);
    return sum;
}

static ada_task task_of(const attending *a, int64_t head, double margin) {
    const ada_problem *p = a->p;
    const double width = (double)(p->D + p->E);
    return (ada_task){.tolerance = a->budget->tolerance,
                      .margin = margin,
                      .lse = p->lse != NULL,
                      .dearest = a->budget->dearest,
                      .cheapest = a->budget->cheapest,
                      .operations = operations_of_head(p, head / p->H),
                      .elements = (double)p->S * width / (double)a->per_head,
                      .D = p->D,
                      .plain = p->query.dtype == ADA_F64 ? 0 : 1};
}

/* Rows that are profiled before the choice: none where no cheaper candidate is in sight, or where looking
 * would cost more than it may save. */
static int rows_to_profile(const attending *a, const ada_forecast *guess, int64_t head) {
    const ada_problem *p = a->p;
    ada_task task = task_of(a, head, 1.0 / GUESS_REACH);
    const ada_rate *rates = a->budget->rates;
    const int rows = p->T < 4096 ? 4 : 8, best = ada_plan_head(guess, &task, rates);
    if (p->T < LEAST_QUERIES || !guess->finite || best <= task.plain) return 0;
    const double plain = ada_predicted_seconds(&task, &rates[task.plain]);
    const double looking = 1.5 * rows * plain / ROW_SPEED / (double)p->T;
    return plain - ada_predicted_seconds(&task, &rates[best]) > 2 * looking ? rows : 0;
}

/* Draws up to n rows of a head: by equal shares, by what they may contribute to the error and, where they are
 * known, by the norms of the output's rows, in equal parts. */
static void draw_rows(attending *a, int64_t head, int n, const float *norms, uint64_t stream) {
    const int64_t T = a->p->T;
    const float *live = a->sizes + head * T;
    float *share = a->shares + head * T;
    head_state *s = &a->states[head];
    memset(share, 0, (size_t)T * sizeof *share);
    ada_add_shares(share, NULL, live, T);
    if (a->probed) ada_add_shares(share, live, live, T);
    if (norms) ada_add_shares(share, norms, live, T);
    s->n = ada_sample_rows(share, T, n, stream, s->rows, s->weight);
}

static void queries_task(void *context, ada_job *job, int64_t head, int worker) {
    attending *a = context;
    const ada_problem *p = a->p;
    const ada_key_probe *keys = &a->keys[head / a->per_head];
    head_state *s = &a->states[head];
    float *size = a->sizes + head * p->T;
    char *scratch = a->scratch + worker * a->scratch_bytes;
    ada_row_profile *guess = &a->profiles[head * MOST_ROWS];
    if (ada_job_cancelled(job, worker)) return;
    ada_guess_profile(p, a->k, head / p->H, head % p->H, keys, guess, scratch);
    ada_forecast_head(guess, 1, keys, p->query.dtype, p->D, &a->budget->heads[head].forecast);
    a->budget->heads[head].forecast.rows = 0;
    ada_row_profile peak = *guess;
    const ada_spreads spreads = ada_probe_queries(p, a->k, head / p->H, head % p->H, keys, size, scratch);
    a->budget->heads[head].forecast.finite &= spreads.finite;
    ada_peak_profile(keys, spreads.largest, &peak);
    if (spreads.largest > 0) s->outliers = spreads.outliers / spreads.largest;
    ada_forecast_head(&peak, 1, keys, p->query.dtype, p->D, &s->peak);
    s->value2 = keys->value2_mean;
    s->n = rows_to_profile(a, &a->budget->heads[head].forecast, head);
    if (s->n) draw_rows(a, head, s->n, NULL, CHOICE_STREAM);
}

/* Whether the heads are looked at before they are computed: where the choice is open, and a cheaper rung than
 * the plain one may save more than looking costs. All heads of a problem are of one size, and so of one mind.
 */
static bool probes(const attending *a) {
    const ada_problem *p = a->p;
    const ada_budget *b = a->budget;
    if (takes_few(p) || b->given || forced(b)) return false;
    if (b->tolerance < FINER * PLAIN_ERROR) return true;
    const ada_task task = task_of(a, 0, 1);
    const double looked_at = task.elements + (double)(p->T * p->D);
    return ada_may_pay(&task, b->rates, 2 * LOOK_SECONDS * looked_at);
}

/* Groups of rows of all heads are tasks. */
#define GROUPS (MOST_ROWS / ADA_ROW_GROUP)

static int group_of_task(const attending *a, int64_t task, int64_t *head, int *first) {
    *head = task / GROUPS, *first = (int)(task % GROUPS) * ADA_ROW_GROUP;
    const int left = a->states[*head].n - *first;
    return left < ADA_ROW_GROUP ? left : ADA_ROW_GROUP;
}

static void profile_task(void *context, ada_job *job, int64_t task, int worker) {
    attending *a = context;
    const ada_problem *p = a->p;
    int64_t head;
    int first;
    const int n = group_of_task(a, task, &head, &first);
    if (n <= 0 || ada_job_cancelled(job, worker)) return;
    const head_state *s = &a->states[head];
    ada_row_profile *profiles = &a->profiles[head * MOST_ROWS + first];
    ada_profile_rows(p, a->k, head / p->H, head % p->H, &a->keys[head / a->per_head], s->rows + first, n,
                     profiles, a->scratch + worker * a->scratch_bytes);
    for (int i = 0; i < n; i++) profiles[i].weight = s->weight[first + i];
}

static double row_work(const attending *a) { /* multiply-adds of the rows that are chosen */
    double rows = 0;
    for (int64_t head = 0; head < head_count(a); head++) rows += a->states[head].n;
    return rows * (double)a->p->S * (double)(a->p->D + a->p->E);
}

static bool probe(attending *a) {
    const ada_problem *p = a->p;
    const double width = (double)(p->D + p->E);
    return run_tasks(a, keys_task, a->key_heads, (double)a->key_heads * (double)p->S * width) &&
           run_tasks(a, queries_task, head_count(a), (double)head_count(a) * (double)p->T * width) &&
           run_tasks(a, profile_task, head_count(a) * GROUPS, row_work(a));
}

/* ---- plan ---- */

/* So many rows cost a few percent of a call. */
static int most_rows_to_verify(int64_t T) {
    return T < 1024 ? 8 : T < 2048 ? 12 : T < 4096 ? 16 : T < 8192 ? 24 : MOST_ROWS;
}

/* Rows that the profiles cannot have seen: two keys share all weight of such a row, and its output moves by
 * their scores' noise times an eighth of the squared distance of their values. The lse errs most in the
 * largest row. */
static void bound_outliers(attending *a, int64_t head) {
    const head_state *s = &a->states[head];
    const ada_key_probe *keys = &a->keys[head / a->per_head];
    ada_forecast *f = &a->budget->heads[head].forecast;
    const ada_row_profile *rows = &a->profiles[head * MOST_ROWS];
    const double apart2 = 2 * (keys->value2_mean - keys->center2);
    double out2 = 0;
    for (int i = 0; i < (s->n ? s->n : 1); i++) out2 += rows[i].weight * rows[i].out2;
    for (int c = 0; c < ADA_CANDIDATES; c++) {
        const double noise = fmin(s->peak.lse_error[c] / ADA_LARGEST_OF_MANY, 1);
        if (out2 > 0) f->error[c] = hypot(f->error[c], noise * sqrt(s->outliers * apart2 / 8 / out2));
        f->lse_error[c] = fmax(f->lse_error[c], s->peak.lse_error[c]);
    }
}

static void plan_heads(attending *a) {
    const ada_problem *p = a->p;
    for (int64_t i = 0; i < head_count(a); i++) {
        ada_head *head = &a->budget->heads[i];
        const head_state *s = &a->states[i];
        const ada_forecast guess = head->forecast;
        if (s->n) {
            ada_forecast_head(&a->profiles[i * MOST_ROWS], s->n, &a->keys[i / a->per_head], p->query.dtype,
                              p->D, &head->forecast);
            head->forecast.rows = s->n;
            for (int c = 0; c < ADA_CANDIDATES; c++)
                head->forecast.error[c] = fmax(head->forecast.error[c], guess.error[c] / GUESS_PART);
            head->forecast.finite &= guess.finite;
        }
        if (a->probed) bound_outliers(a, i);
        const double reach = ada_reach_of_rows(most_rows_to_verify(p->T));
        const ada_task task = task_of(a, i, s->n ? ADA_MARGIN * reach : MARGIN_GUESSED);
        for (int c = 0; c < ADA_CANDIDATES; c++)
            head->seconds[c] = ada_predicted_seconds(&task, &a->budget->rates[c]);
        if (a->budget->given && !p->only_f64)
            head->choice = a->budget->given[i];
        else if (forced(a->budget))
            head->choice = p->precision;
        else if (!a->probed)
            head->choice = ada_candidates[p->only_f64 || task.tolerance < 3 * FEW_ERROR ? 0 : task.plain];
        else
            head->choice = ada_candidates[ada_plan_head(&head->forecast, &task, a->budget->rates)];
        const int c = ada_candidate_of(head->choice);
        head->predicted_error = c < 0 ? NAN : head->forecast.error[c];
        if (!a->probed && c >= 0 && c <= 1) head->predicted_error = unseen_error(p, c);
    }
}

/* ---- execute ---- */

/* The heads on the list, launch by launch. */
static ada_status execute_list(attending *a, const int64_t *list, int64_t n, ada_error *error) {
    ada_head *heads = a->budget->heads;
    int64_t *launch = a->list + head_count(a);
    int64_t done = 0;
    for (int pair = 0; pair < ADA_RUNG_COUNT * ADA_RUNG_COUNT && done < n; pair++) {
        const ada_choice choice = {(ada_rung)(pair / ADA_RUNG_COUNT), (ada_rung)(pair % ADA_RUNG_COUNT)};
        int64_t count = 0;
        for (int64_t i = 0; i < n; i++) {
            const ada_choice own = heads[list[i]].choice;
            if (own.qk == choice.qk && own.pv == choice.pv) launch[count++] = list[i];
        }
        if (count == 0) continue;
        ada_problem problem = *a->p;
        problem.precision = choice;
        problem.compute_f64 = choice.qk == ADA_RUNG_FP64;
        problem.ran = a->ran;
        /* All heads together take the way of few queries where there is one. */
        const bool all = count == head_count(a);
        if (ada_execute(&problem, all ? NULL : launch, count, a->interrupt, a->context, error))
            return error->status;
        done += count;
    }
    for (int64_t i = 0; i < n; i++) {
        ada_head *head = &heads[list[i]];
        const ada_choice ran = a->ran[list[i]];
        if (ran.qk == head->choice.qk && ran.pv == head->choice.pv) continue;
        head->choice = ran;
        head->retried = true;
        head->predicted_error = head->forecast.error[ada_candidate_of(ran)];
    }
    return ADA_OK;
}

/* ---- verify ---- */

/* As many rows as the distance between prediction and budget asks for, and few where that is far, as it is
 * for the default. */
static int rows_to_verify(const attending *a, const ada_head *head) {
    const int64_t T = a->p->T;
    if (T < LEAST_QUERIES || !a->budget->verify || (a->probed && !head->forecast.finite)) return 0;
    if (head->predicted_error * FINER <= a->budget->tolerance) {
        const int64_t rows = T / 128;
        return rows < 1 ? 1 : rows > 8 ? 8 : (int)rows;
    }
    const double reach = a->budget->tolerance / (ADA_MARGIN * head->predicted_error);
    const int most = most_rows_to_verify(T), rows = isfinite(reach) ? ada_rows_for_reach(reach, most) : most;
    return rows < 8 ? 8 : rows;
}

static void norm_task(void *context, ada_job *job, int64_t head, int worker) {
    attending *a = context;
    const ada_problem *p = a->p;
    head_state *s = &a->states[head];
    if (!s->open || ada_job_cancelled(job, worker)) return;
    const int E = (int)p->E;
    ada_carver carver = {a->scratch + worker * a->scratch_bytes, 0};
    float *copy = ada_carve(&carver, ADA_BLOCK * p->E * (int64_t)sizeof *copy);
    double sum = 0;
    for (int64_t i = 0; i < p->T; i += ADA_BLOCK) {
        const int n = (int)(p->T - i < ADA_BLOCK ? p->T - i : ADA_BLOCK);
        ptrdiff_t ld;
        const float *x = rows_at_f32(a->k, &p->out, head / p->H, head % p->H, i, n, copy, &ld);
        float *norm2 = a->norms + head * p->T + i;
        double block = 0;
        a->k->squares(norm2, NULL, x, ld, n, E, NULL, NULL);
        for (int r = 0; r < n; r++) block += (double)norm2[r];
        if (!(block > 1e-30 && block < 1e30)) { /* beyond a float's squares, or zeros */
            block = 0;
            for (int r = 0; r < n; r++)
                for (int e = 0; e < E; e++) block += (double)x[r * ld + e] * (double)x[r * ld + e];
        }
        sum += block;
    }
    s->out2 = sum;
    const double cancelled = SUM_ERROR * sqrt(s->value2 / fmax(sum / (double)p->T, DBL_MIN));
    const double tolerance = a->budget->tolerance;
    for (int64_t i = 0; !a->probed && !s->drawn && i < p->T; i++) {
        const ada_span span = ada_visible_span(p, head / p->H, i);
        a->sizes[head * p->T + i] = span.end > span.first;
    }
    if (!s->drawn) draw_rows(a, head, s->n, a->norms + head * p->T, VERIFY_STREAM);
    s->drawn = true;
    const int fp32 = ada_candidate_of((ada_choice){ADA_RUNG_FP32, ADA_RUNG_FP32});
    const double in_fp32 = a->budget->heads[head].forecast.error[fp32];
    s->exact_f64 = tolerance <= (a->probed ? 1e-4 : 1e-3) || FINER * fmax(cancelled, in_fp32) > tolerance ||
                   p->query.dtype == ADA_F64;
}

/* Of a number that is rounded to the dtype, relative. */
static double rounding_of(ada_dtype dtype) {
    return dtype == ADA_F64 ? 0x1p-53 : dtype == ADA_F32 ? 0x1p-24 : dtype == ADA_F16 ? 0x1p-11 : 0x1p-8;
}

/* Whether rows in fp32 are as fine as verification wants them: a score is off by its last digit. */
static bool floats_suffice(const ada_exact *exact, int n, double tolerance) {
    bool suffice = true;
    for (int i = 0; i < n; i++)
        suffice &= exact->good[i] && FINER * rounding_of(ADA_F32) * fabs(exact->reference[i]) <= tolerance;
    return suffice;
}

static void exact_task(void *context, ada_job *job, int64_t task, int worker) {
    attending *a = context;
    const ada_problem *p = a->p;
    int64_t head;
    int first;
    const int n = group_of_task(a, task, &head, &first), E = (int)p->E;
    const head_state *s = &a->states[head];
    ada_exact exact;
    if (n <= 0 || !s->open || ada_job_cancelled(job, worker)) return;
    char *scratch = a->scratch + worker * a->scratch_bytes;
    ada_exact_rows(p, a->k, s->exact_f64, false, head / p->H, head % p->H, s->rows + first, n, scratch,
                   &exact);
    if (!s->exact_f64 && !floats_suffice(&exact, n, a->budget->tolerance))
        ada_exact_rows(p, a->k, true, false, head / p->H, head % p->H, s->rows + first, n, scratch, &exact);
    for (int i = 0; i < n; i++) {
        const int64_t at = head * MOST_ROWS + first + i;
        a->exact_lse[at] = exact.good[i] ? exact.lse[i] : NAN;
        memcpy(a->exact_o + at * E, exact.o + i * E, (size_t)E * sizeof(double));
    }
}

static double lse_at(const ada_problem *p, int64_t at) {
    return p->query.dtype == ADA_F64 ? ((const double *)p->lse)[at] : (double)((const float *)p->lse)[at];
}

/* Compares a head with its exact rows; false where it may miss the tolerance. misses: it does so beyond
 * doubt. */
static bool compare_head(attending *a, int64_t index, bool *misses) {
    const ada_problem *p = a->p;
    ada_head *head = &a->budget->heads[index];
    const head_state *s = &a->states[index];
    const double tolerance = a->budget->tolerance, allowed = tolerance + rounding_of(p->query.dtype);
    const int E = (int)p->E;
    double *error2 = a->error2 + index * MOST_ROWS, out[64];
    *misses = false;
    head->lse_error = 0;
    bool nothing_seen = true;
    for (int i = 0; i < s->n; i++) {
        const int64_t at = index * MOST_ROWS + i;
        error2[i] = 0;
        for (int e = 0; e < E; e += 64) {
            const int width = E - e < 64 ? E - e : 64;
            ada_array part = p->out;
            part.data = (char *)part.data + e * part.stride[3];
            ada_load_rows_f64(a->k, out, width, &part, index / p->H, index % p->H, s->rows[i], 1, width);
            for (int c = 0; c < width; c++) {
                const double exact = a->exact_o[at * E + e + c], difference = out[c] - exact;
                error2[i] += difference * difference;
                nothing_seen &= exact == 0 && out[c] == 0;
            }
        }
        const double lse = a->exact_lse[at];
        if (isnan(lse) || !isfinite(error2[i])) return true; /* unverifiable: plain arithmetic's own NaN */
        if (!p->lse || lse == -INFINITY) continue;
        const double off = fabs(lse_at(p, index * p->T + s->rows[i]) - lse);
        head->lse_error = fmax(head->lse_error, off - 4 * rounding_of(ADA_F32) * fabs(lse));
    }
    if (nothing_seen && s->out2 > 0) return true; /* only rows of zeros were drawn: they tell nothing */
    const ada_error_limits limits = ada_limit_error(error2, s->weight, s->n);
    /* The exact norm is not known, but that the output's is off by the error at most. */
    const double error = s->out2 > 0 ? sqrt(limits.estimate2 / s->out2) : limits.estimate2 > 0 ? INFINITY : 0;
    const double slack = 1 + fmin(error, 1);
    head->verified_rows = s->n;
    head->measured_error = error;
    head->error_limit = limits.upper2 > 0 ? sqrt(limits.upper2 / s->out2) * slack : 0;
    *misses = limits.lower2 > 0 && sqrt(limits.lower2 / s->out2) > allowed * slack;
    return head->error_limit <= allowed && head->lse_error <= fmax(tolerance, 4e-7);
}

/* The rung that a head goes up to; false where there is none, or where it may not. */
static bool go_up(const attending *a, int64_t index) {
    ada_head *head = &a->budget->heads[index];
    const bool at_fp32 = head->choice.qk <= ADA_RUNG_FP32 && head->choice.pv <= ADA_RUNG_FP32;
    const ada_rung wanted = at_fp32 ? ADA_RUNG_FP64 : ADA_RUNG_FP32, dearest = a->budget->dearest;
    const ada_rung next = wanted > dearest ? wanted : dearest; /* AUTO is below all */
    const int now = ada_candidate_of(head->choice);
    if (forced(a->budget) || (head->choice.qk <= next && head->choice.pv <= next)) return false;
    int c = ada_candidate_of((ada_choice){next, next});
    if (a->probed && !head->retried && now > c && isfinite(head->error_limit)) {
        /* The first time to a rung that keeps the budget even if its prediction is off as this one's limit
         * is. */
        ada_forecast worse = head->forecast;
        const double off = fmax(head->error_limit / head->predicted_error, 1);
        for (int i = 0; i < ADA_CANDIDATES; i++) worse.error[i] = i < now ? off * worse.error[i] : INFINITY;
        const ada_task task = task_of(a, index, ADA_MARGIN);
        c = ada_plan_head(&worse, &task, a->budget->rates);
    }
    head->choice = ada_candidates[c];
    head->predicted_error = a->probed ? head->forecast.error[c] : unseen_error(a->p, c);
    head->retried = true;
    return true;
}

static ada_status verify(attending *a, ada_error *error) {
    const ada_problem *p = a->p;
    int64_t open = 0;
    for (int64_t i = 0; i < head_count(a); i++) {
        head_state *s = &a->states[i];
        s->n = rows_to_verify(a, &a->budget->heads[i]);
        s->open = s->n > 0;
        open += s->open;
    }
    const double reading = (double)(head_count(a) * p->T) * (double)p->E;
    for (bool rows_known = false; open > 0; rows_known = true) {
        if (!run_tasks(a, norm_task, head_count(a), reading) ||
            (!rows_known && !run_tasks(a, exact_task, head_count(a) * GROUPS, row_work(a))))
            return ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
        open = 0;
        for (int64_t i = 0; i < head_count(a); i++) {
            ada_head *head = &a->budget->heads[i];
            head_state *s = &a->states[i];
            if (!s->open) continue;
            /* Where all inputs are known to be finite, an output that is not is wrong. */
            bool misses = !isfinite(s->out2);
            s->open = a->probed || !misses;
            if (!s->open) continue;
            s->open = misses || !compare_head(a, i, &misses);
            if (!s->open) continue;
            if (forced(a->budget) && misses)
                return ada_fail(error, ADA_ERR_NUMERICAL,
                                "precision: expected a relative error of at most %g in every head, got about "
                                "%.3g in head (%lld, %lld) from ('%s', '%s')",
                                a->budget->tolerance, head->measured_error, (long long)(i / p->H),
                                (long long)(i % p->H), ada_rung_name(head->choice.qk),
                                ada_rung_name(head->choice.pv));
            s->open = go_up(a, i);
            if (s->open) a->list[open++] = i;
        }
        if (open && execute_list(a, a->list, open, error)) return error->status;
    }
    return ADA_OK;
}

/* ---- the call ---- */

static int64_t carve_all(attending *a, char *memory, int threads) {
    const ada_problem *p = a->p;
    const int64_t heads = p->B * p->H, rows = heads * MOST_ROWS;
    ada_carver c = {memory, 0};
    a->keys = ada_carve(&c, a->key_heads * (int64_t)sizeof *a->keys);
    a->probes = ada_carve(&c, a->key_heads * a->probe_bytes);
    a->states = ada_carve(&c, heads * (int64_t)sizeof *a->states);
    a->sizes = ada_carve(&c, heads * p->T * (int64_t)sizeof *a->sizes);
    a->norms = ada_carve(&c, heads * p->T * (int64_t)sizeof *a->norms);
    a->shares = ada_carve(&c, heads * p->T * (int64_t)sizeof *a->shares);
    a->profiles = ada_carve(&c, rows * (int64_t)sizeof *a->profiles);
    a->exact_lse = ada_carve(&c, rows * (int64_t)sizeof(double));
    a->error2 = ada_carve(&c, rows * (int64_t)sizeof(double));
    a->exact_o = ada_carve(&c, p->T < LEAST_QUERIES ? 0 : rows * p->E * (int64_t)sizeof(double));
    a->ran = ada_carve(&c, heads * (int64_t)sizeof *a->ran);
    a->list = ada_carve(&c, 2 * heads * (int64_t)sizeof *a->list);
    a->scratch = ada_carve(&c, threads * a->scratch_bytes);
    return c.used;
}

static ada_status attend_within(attending *a, ada_error *error) {
    const ada_problem *p = a->p;
    ada_budget *budget = a->budget;
    double start = seconds_now();
    a->probed = probes(a);
    for (int64_t i = 0; i < head_count(a); i++) {
        budget->heads[i] = unknown_head();
        a->states[i] = (head_state){0};
        a->list[i] = i;
    }
    if (a->probed && !probe(a)) return ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
    double now = seconds_now();
    budget->seconds[0] = now - start, start = now;
    plan_heads(a);
    now = seconds_now();
    budget->seconds[1] = now - start, start = now;
    if (budget->plan_only) return ADA_OK;
    if (execute_list(a, a->list, head_count(a), error)) return error->status;
    now = seconds_now();
    budget->seconds[2] = now - start, start = now;
    if (budget->verify && !takes_few(p) && verify(a, error)) return error->status;
    budget->seconds[3] = seconds_now() - start;
    return ADA_OK;
}

/* Without a budget: what each head was computed with. */
static void record_exact(const ada_problem *p, ada_budget *budget, double seconds) {
    for (int64_t i = 0; i < p->B * p->H; i++) {
        budget->heads[i] = unknown_head();
        budget->heads[i].choice = p->ran[i];
        budget->heads[i].retried =
            forced(budget) && (p->ran[i].qk != budget->asked.qk || p->ran[i].pv != budget->asked.pv);
    }
    budget->seconds[2] = seconds;
}

ada_status ada_attend(const ada_problem *p, ada_budget *budget, bool (*interrupt)(void *), void *context,
                      ada_error *error) {
    memset(budget->seconds, 0, sizeof budget->seconds);
    if (ada_check_mask(p, interrupt, context, error)) return error->status;
    if (budget->tolerance == 0) {
        const double start = budget->heads ? seconds_now() : 0;
        if (ada_execute(p, NULL, 0, interrupt, context, error)) return error->status;
        if (budget->heads) record_exact(p, budget, seconds_now() - start);
        return ADA_OK;
    }
    const ada_array *mask = &p->attn_mask;
    attending a = {.p = p,
                   .k = ada_kernels_get(),
                   .budget = budget,
                   .interrupt = interrupt,
                   .context = context,
                   .per_head = mask->data && mask->stride[1] ? 1 : p->H / p->G};
    a.key_heads = p->B * p->H / a.per_head;
    a.probe_bytes = ada_key_probe_bytes(p);
    a.scratch_bytes = ada_probe_scratch_bytes(p);
    const int threads = ada_threads_for(p, head_count(&a) * GROUPS, INFINITY);
    const int64_t bytes = carve_all(&a, NULL, threads);
    char *memory = ada_scratch_take(bytes);
    if (!memory) return ada_no_scratch(bytes, error);
    carve_all(&a, memory, threads);
    const ada_status status = attend_within(&a, error);
    ada_scratch_give_back(memory);
    return status;
}
