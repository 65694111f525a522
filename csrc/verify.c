/* From the outputs of heads to what is known of their errors, and back to their choices.
 *
 * Horvitz-Thompson estimation with limits by Student's t.
 *
 * A few rows say little about how much rows differ, and heads are alike in that: the variance of a draw is
 * averaged with what heads show in general, as if that came from PRIOR_FREEDOM draws more (moderated t,
 * Smyth, doi 10.2202/1544-6115.1027). tests/test_sampling.py simulates the coverage.
 */
#include "verify.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "attending.h"
#include "exact.h"
#include "operands.h"
#include "rows.h"

#define REAL float
#define KIND(name) name##_f32
#include "read_tpl.h"

#define VERIFY_STREAM 2
#define DOUBT_STREAM 3
/* An fp32 sum of weights and values is off by this share of their root mean square norm. */
#define SUM_ERROR 3e-8

#define PRIOR_FREEDOM 6
#define PRIOR_VARIANCE 1.2 /* of a draw, relative to the square of the total; real heads: 0.6 to 2.5 */

/* That tell the norm of all. */
#define SOME_VALUES 32

/* A measurement that is so far below its prediction is taken again. */
#define SURPRISE 2

/* At least so many where keys are left out, as few rows may carry the error then. */
#define SPARSE_ROWS 16

/* ---- estimates ---- */

int ada_rows_for_reach(double reach, int most) {
    /* Rows n at which the upper limit is about `reach` times the estimate where rows differ as the prior
     * says. */
    const double variance = reach * reach - 1, root = 3.8 * sqrt(PRIOR_VARIANCE) / fmax(variance, 1e-3);
    return root * root < most ? (int)ceil(root * root) : most;
}

double ada_reach_of_rows(int n) { return sqrt(1 + 3.8 * sqrt(PRIOR_VARIANCE / n)); }

/* Quantile 0.999 of Student's t for at least 6 degrees of freedom (Cornish and Fisher's expansion; 3 %). */
static double student(double freedom) {
    const double z = 3.0902, z3 = z * z * z, z5 = z3 * z * z;
    return z + (z3 + z) / (4 * freedom) + (5 * z5 + 16 * z3 + 3 * z) / (96 * freedom * freedom);
}

ada_error_limits ada_limit_error(const double *error2, const double *weight, int n) {
    double certain = 0, drawn = 0, square = 0;
    int draws = 0;
    for (int i = 0; i < n; i++) {
        if (weight[i] == 1)
            certain += error2[i];
        else
            drawn += weight[i] * error2[i], draws++;
    }
    if (draws == 0) return (ada_error_limits){certain, certain, certain};
    for (int i = 0; i < n; i++) {
        const double total = weight[i] * error2[i] * draws; /* what this draw alone would say */
        if (weight[i] != 1) square += (total - drawn) * (total - drawn);
    }
    const double freedom = PRIOR_FREEDOM + draws - 1;
    const double variance = (PRIOR_FREEDOM * PRIOR_VARIANCE * drawn * drawn + square) / freedom;
    const double reach = student(freedom) * sqrt(variance / draws);
    /* Draws are skewed and not below 0: a rare one that is drawn puts the estimate far above the truth, and
     * shows in the reach. */
    const double over = 1 + (drawn > 0 ? reach / drawn : 0), lower = drawn / (over * over);
    return (ada_error_limits){certain + drawn, certain + lower, certain + drawn + reach};
}

ada_relative_error ada_relate_error(const ada_error_limits *limits, double norm2, double allowed) {
    /* The exact norm is not known, but that this one is off by the error at most. */
    const double error = norm2 > 0 ? sqrt(limits->estimate2 / norm2) : limits->estimate2 > 0 ? INFINITY : 0;
    const double slack = 1 + fmin(error, 1);
    return (ada_relative_error){error, norm2 > 0 ? sqrt(limits->upper2 / norm2) * slack : error,
                                limits->lower2 > 0 && sqrt(limits->lower2 / norm2) > allowed * slack};
}

/* ---- rows of heads ---- */

static int larger(int a, int b) { return a > b ? a : b; }

int ada_most_rows_to_verify(int64_t T) {
    return T < 1024 ? 8 : T < 2048 ? 12 : T < 4096 ? 16 : T < 8192 ? 24 : ADA_MOST_ROWS;
}

/* fp32's own errors lie in few rows, and its kernels are slow enough that exact rows cost little beside them.
 */
static int rows_for_fp32(int64_t T) { return T < 512 ? 0 : T < 4096 ? 8 : 12; }

/* Small heads on cheaper rungs are, by few rows. */
static bool is_compared_at_once(const ada_attending *a, const ada_head *head) {
    return ada_is_few(a->p) && !ada_is_thinned(head) &&
           ada_candidate_of(head->choice) > ada_plain_candidate(a->p);
}

/* As many rows as the distance between prediction and budget asks for, and few where that is far. */
static int rows_to_verify(const ada_attending *a, int64_t index) {
    const ada_head *head = &a->budget->heads[index];
    const ada_head_state *s = &a->states[index];
    const int64_t T = a->p->T;
    if ((s->look && !head->forecast.finite) || s->trusted) return 0;
    if (T < ADA_LEAST_QUERIES) return T < ADA_MOST_ROWS ? (int)T : ADA_MOST_ROWS;
    const int own = ada_is_fp32(head) ? rows_for_fp32(T) : 0;
    if (!ada_is_thinned(head) && head->predicted_error * ADA_FINER <= a->budget->tolerance) {
        /* One row refutes a prediction that nothing was looked at for, where it is far off; four where the
         * plain rung may not do. */
        const bool far = 16 * ADA_FINER * head->predicted_error <= a->budget->tolerance;
        const bool hard = !s->look && a->budget->tolerance <= 1e-4;
        const int64_t rows = T / (far ? 256 : 128), least = s->uneven ? 8 : hard ? 4 : 1;
        return larger(own, rows < least ? (int)least : rows > 8 ? 8 : (int)rows);
    }
    const double reach = a->budget->tolerance / (ADA_MARGIN * head->predicted_error);
    const int most = ada_most_rows_to_verify(T),
              rows = isfinite(reach) ? ada_rows_for_reach(reach, most) : most;
    /* Two rows do beside a glance; a plan's prediction may be one for other arrays. */
    const bool two =
        s->glanced && is_compared_at_once(a, head) && 4 * head->predicted_error <= a->budget->tolerance;
    const int least = ada_is_thinned(head) ? SPARSE_ROWS : s->look ? 8 : two ? 2 : 4;
    return larger(own, larger(rows, least));
}

bool ada_may_glance(const ada_attending *a, ada_choice choice) {
    const ada_problem *p = a->p;
    return a->budget->verify && !p->on_gpu && !p->stored && !p->only_f64 && p->query.dtype != ADA_F64 &&
           p->T >= ADA_LEAST_QUERIES && !ada_is_forced(a->budget) && ada_guesses_are_fair(p) &&
           (ada_all_fp32(choice) || ada_is_few(p));
}

bool ada_guess_by_glance(ada_attending *a, int64_t index, char *scratch) {
    const ada_problem *p = a->p;
    ada_head_state *s = &a->states[index];
    ada_head *head = &a->budget->heads[index];
    ada_row_profile *rows = a->profiles + index * ADA_MOST_ROWS;
    ada_key_probe keys;
    ada_forecast forecast;
    const int n = ada_glance(p, a->k, index / p->H, index % p->H, true, rows, &keys, scratch);
    if (n == 0) return false;
    s->total = keys.total;
    ada_forecast_head(rows, n, &keys, p, ADA_CANDIDATES, &forecast);
    s->glanced2 = rows->out2 * rows->weight;
    s->center2 = keys.center2, s->value2 = keys.value2_mean;
    if (!forecast.finite) return false;
    for (int c = 0; c < ADA_CANDIDATES; c++)
        if (s->barred >> c & 1) forecast.error[c] = NAN;
    head->forecast = forecast;
    return true;
}

int ada_piece_of_row(const ada_kernels *k, const ada_array *a, int64_t b, int64_t h, int64_t row, int c,
                     double piece[ADA_PIECE]) {
    const int left = (int)a->shape[3] - c, width = left < ADA_PIECE ? left : ADA_PIECE;
    ada_array part = *a;
    part.data = (char *)part.data + c * part.stride[3];
    ada_load_rows_f64(k, piece, width, &part, b, h, row, 1, width);
    return width;
}

double ada_row_norms(const ada_kernels *k, const ada_array *a, int64_t b, int64_t h, float *norms,
                     float *copy) {
    const int64_t rows = a->shape[2];
    const int width = (int)a->shape[3];
    double sum = 0;
    for (int64_t i = 0; i < rows; i += ADA_BLOCK) {
        const int n = (int)(rows - i < ADA_BLOCK ? rows - i : ADA_BLOCK);
        ptrdiff_t ld;
        const float *x = rows_at_f32(k, a, b, h, i, n, copy, &ld);
        double block = 0;
        k->squares(norms + i, NULL, x, ld, n, width, NULL, NULL);
        for (int r = 0; r < n; r++) block += (double)norms[i + r];
        if (!(block > 1e-30 && block < 1e30)) { /* beyond a float's squares, or zeros */
            block = 0;
            for (int r = 0; r < n; r++)
                for (int c = 0; c < width; c += ADA_PIECE) {
                    double piece[ADA_PIECE];
                    const int m = ada_piece_of_row(k, a, b, h, i + r, c, piece);
                    for (int e = 0; e < m; e++) block += piece[e] * piece[e];
                }
        }
        sum += block;
    }
    return sum;
}

int ada_cpu_output(const ada_attending *a, int64_t head, int i, int e, double *x) {
    const ada_problem *p = a->p;
    return ada_piece_of_row(a->k, &p->out, head / p->H, head % p->H, a->states[head].rows[i], e, x);
}

double ada_cpu_output_lse(const ada_attending *a, int64_t head, int i) {
    const ada_problem *p = a->p;
    const int64_t at = head * p->T + a->states[head].rows[i];
    return p->query.dtype == ADA_F64 ? ((const double *)p->lse)[at] : (double)((const float *)p->lse)[at];
}

double ada_cpu_output_norm(const ada_attending *a, int64_t head, float *norms, char *scratch) {
    const ada_problem *p = a->p;
    return ada_row_norms(a->k, &p->out, head / p->H, head % p->H, norms, (float *)scratch);
}

void ada_mark_seeing_rows(ada_attending *a, int64_t head, char *scratch) {
    const ada_problem *p = a->p;
    const int64_t b = head / p->H, h = head % p->H;
    float *sizes = a->sizes + head * p->T;
    int64_t start, end, block = 0;
    ada_seeing_rows(p, b, &start, &end);
    for (int64_t i = 0; i < p->T; i++) sizes[i] = i >= start && i < end;
    for (int64_t i = start; ada_mask_is_read(p) && i < end; i++)
        sizes[i] = ada_row_sees(p, a->k, b, h, i, &block, (float *)scratch);
}

/* Sizes of rows by the squared norms of their queries. */
static void size_by_queries(const ada_attending *a, int64_t head, float *scratch) {
    const ada_problem *p = a->p;
    float *sizes = a->sizes + head * p->T;
    for (int64_t i = 0; i < p->T; i += ADA_BLOCK) {
        const int n = (int)(p->T - i < ADA_BLOCK ? p->T - i : ADA_BLOCK);
        float norm2[ADA_BLOCK];
        ptrdiff_t ld;
        const float *q = rows_at_f32(a->k, &p->query, head / p->H, head % p->H, i, n, scratch, &ld);
        a->k->squares(norm2, NULL, q, ld, n, (int)p->D, NULL, NULL);
        for (int r = 0; r < n; r++) sizes[i + r] *= (norm2[r] < INFINITY ? norm2[r] : 0) + FLT_MIN;
    }
}

/* Mean squared norm of a head's values, from some at equal distances that a mask leaves to the last row; 0:
 * of none. */
static double value_norm(const ada_attending *a, int64_t head, float *scratch) {
    const ada_problem *p = a->p;
    const int64_t b = head / p->H, h = head % p->H, last = p->T - 1;
    const ada_span span = {ada_visible_span(p, b, 0).first, ada_visible_span(p, b, last).end};
    const int64_t step = (span.end - span.first + SOME_VALUES - 1) / SOME_VALUES;
    double sum = 0;
    int n = 0;
    for (int64_t j = span.first; j < span.end; j += step) {
        float norm2;
        ptrdiff_t ld;
        if (ada_mask_is_read(p) && !ada_keys_seen(p, a->k, b, h, last, 1, j, 1, scratch)) continue;
        const float *v = rows_at_f32(a->k, &p->value, b, h / (p->H / p->G), j, 1, scratch, &ld);
        a->k->squares(&norm2, NULL, v, ld, 1, (int)p->E, NULL, NULL);
        sum += (double)norm2, n++;
    }
    return n ? sum / n : 0;
}

/* What rows' weights and outputs say of fp32's error: more than could be known before they were computed. */
static void forecast_again(const ada_attending *a, int64_t head, const float *norms) {
    const ada_problem *p = a->p;
    const ada_row_mass *mass = a->mass + head * p->T;
    const ada_head_state *s = &a->states[head];
    const float sink = (float)(ada_sink(p, head % p->H) * ADA_LOG2E);
    double apart = 0, together = 0;
    if (!(s->value2 > 0)) return;
    for (int64_t i = 0; i < p->T; i++) {
        const float m = mass[i].reference, others = (1 - mass[i].share) * m * m;
        const float keys = sink > -INFINITY ? 1 / (1 + exp2f(sink - mass[i].lse)) : 1; /* of all weights */
        apart += (double)(keys * mass[i].share * others);
        together += (double)(norms[i] * others);
    }
    const double error = ada_forecast_weighed(s->value2 * apart, together, s->out2);
    if (isfinite(error)) a->budget->heads[head].predicted_error = error;
}

static void measure_norms(ada_attending *a, int64_t head, char *scratch) {
    a->states[head].out2 = a->backend->output_norm(a, head, a->norms + head * a->p->T, scratch);
}

/* By what a head on a GPU is off at most because blocks were left out. */
static double left_out(const ada_attending *a, int64_t head) {
    const double budget2 = a->p->on_gpu ? a->budget->heads[head].budget2 : 0;
    return budget2 > 0 ? sqrt(budget2 * (double)a->p->T / a->states[head].out2) : 0;
}

/* That was predicted for an output of unknown size. */
static void tell_left_out(ada_attending *a, int64_t i) {
    const ada_planned *given = a->budget->given;
    ada_head *head = &a->budget->heads[i];
    if (!a->p->on_gpu || head->budget2 == 0) return;
    const double rung = given ? given[i].predicted_error : ada_error_on(a, i, ada_candidate_of(head->choice));
    head->predicted_error = hypot(rung, left_out(a, i));
}

/* Whether what computed a head says how much each of its rows may be off; not where a GPU leaves out blocks.
 */
static bool has_estimates(const ada_problem *p, const ada_head *head) {
    return ada_is_thinned(head) && (!p->on_gpu || head->rank > 0);
}

/* Which rows of a head whose norms are measured are compared, and how they are computed. */
static void draw_rows_to_verify(ada_attending *a, int64_t head, char *scratch) {
    const ada_problem *p = a->p;
    ada_head_state *s = &a->states[head];
    float *norms = a->norms + head * p->T;
    const double cancelled = SUM_ERROR * sqrt(s->value2 / fmax(s->out2 / (double)p->T, DBL_MIN));
    const double tolerance = a->budget->tolerance;
    if (!s->look && !s->known) {
        ada_mark_seeing_rows(a, head, scratch);
        if (s->uneven) size_by_queries(a, head, (float *)scratch);
    }
    if (a->mass && ada_is_fp32(&a->budget->heads[head])) forecast_again(a, head, norms);
    tell_left_out(a, head);
    if (!s->known)
        ada_draw_rows(a, head, s->n, norms,
                      has_estimates(p, &a->budget->heads[head]) ? a->shift2 + head * p->T : NULL,
                      s->doubted ? DOUBT_STREAM : VERIFY_STREAM);
    const int fp32 = ada_candidate_of((ada_choice){ADA_RUNG_FP32, ADA_RUNG_FP32});
    const double in_fp32 = a->budget->heads[head].forecast.error[fp32];
    s->exact_f64 = tolerance <= (s->look ? 1e-4 : 1e-3) || ADA_FINER * fmax(cancelled, in_fp32) > tolerance ||
                   p->query.dtype == ADA_F64 ||
                   p->T < ADA_LEAST_QUERIES; /* those were computed in fp32 too */
}

static void norm_task(void *context, ada_job *job, int64_t head, int worker) {
    ada_attending *a = context;
    ada_head_state *s = &a->states[head];
    if (!s->open || ada_job_cancelled(job, worker)) return;
    char *scratch = a->scratch + worker * a->scratch_bytes;
    measure_norms(a, head, scratch);
    if (!s->look && !s->glanced && a->mass) s->value2 = value_norm(a, head, (float *)scratch);
    draw_rows_to_verify(a, head, scratch);
}

double ada_rounding_of(ada_dtype dtype) {
    return dtype == ADA_F64 ? 0x1p-53 : dtype == ADA_F32 ? 0x1p-24 : dtype == ADA_F16 ? 0x1p-11 : 0x1p-8;
}

/* Whether rows in fp32 are as fine as verification wants them: a score is off by its last digit. */
static bool floats_suffice(const ada_exact *exact, int n, double tolerance) {
    bool suffice = true;
    for (int i = 0; i < n; i++)
        suffice &=
            exact->good[i] && ADA_FINER * ada_rounding_of(ADA_F32) * fabs(exact->reference[i]) <= tolerance;
    return suffice;
}

/* Exact rows first ... first + n - 1 of those that were drawn. */
static void compute_rows(ada_attending *a, int64_t head, int first, int n, char *scratch) {
    const ada_problem *p = a->p;
    const ada_head_state *s = &a->states[head];
    const int E = (int)p->E;
    ada_exact exact;
    ada_exact_rows(p, a->k, s->exact_f64, false, head / p->H, head % p->H, s->rows + first, n, scratch,
                   &exact);
    if (!s->exact_f64 && !floats_suffice(&exact, n, a->budget->tolerance))
        ada_exact_rows(p, a->k, true, false, head / p->H, head % p->H, s->rows + first, n, scratch, &exact);
    for (int i = 0; i < n; i++) {
        const int64_t at = head * ADA_MOST_ROWS + first + i;
        a->exact_lse[at] = exact.good[i] ? exact.lse[i] : NAN;
        memcpy(a->exact_o + at * E, exact.o + i * E, (size_t)E * sizeof(double));
    }
}

static void exact_task(void *context, ada_job *job, int64_t task, int worker) {
    ada_attending *a = context;
    int64_t head;
    int first;
    const int n = ada_rows_of_task(a, task, &head, &first);
    const ada_head_state *s = &a->states[head];
    if (n > 0 && s->open && !s->known && !ada_job_cancelled(job, worker))
        compute_rows(a, head, first, n, a->scratch + worker * a->scratch_bytes);
}

ada_status ada_cpu_fetch_norms(ada_attending *a, ada_error *error) {
    (void)a, (void)error;
    return ADA_OK;
}

ada_status ada_cpu_exact(ada_attending *a, ada_error *error) {
    return ada_run_tasks(a, exact_task, ada_head_count(a) * ADA_ROW_GROUPS, ada_row_work(a))
               ? ADA_OK
               : ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
}

/* Whether rows say otherwise than what was assumed of a head that nobody looked at. */
static bool refuted(const ada_attending *a, const ada_head *head, const ada_head_state *s) {
    const double rounding =
        ada_is_known(a->p) ? ada_rounding_of(a->p->query.dtype) / 2 : 0; /* of the output */
    const int c = ada_candidate_of(head->choice);
    const double assumed = fmax(head->predicted_error, c < 0 ? 0 : ada_unseen_error(a->p, c));
    return !s->look && head->measured_error > ADA_MARGIN_GUESSED * assumed + rounding;
}

/* What a head's limit may be. fp32's own errors lie in few rows, which the ones that are drawn may miss. */
static double largest_limit(const ada_attending *a, int64_t index) {
    const ada_choice choice = a->budget->heads[index].choice;
    const bool guessed = !a->states[index].look && choice.qk <= ADA_RUNG_FP32 && choice.pv <= ADA_RUNG_FP32;
    return a->budget->tolerance * (guessed ? 0.5 : 1) + ada_rounding_of(a->p->query.dtype);
}

/* Whether few rows of a head in fp32 say so much less than the weights of all that they may have missed those
 * with the error. */
static bool surprises(const ada_attending *a, const ada_head *head) {
    return a->mass && ada_is_fp32(head) && rows_for_fp32(a->p->T) > 0 &&
           SURPRISE * head->measured_error < head->predicted_error;
}

/* Whether a head that may miss the tolerance is given more rows first: they cost less than computing it
 * again, and where the estimate is within the tolerance they often suffice. */
static bool doubts(const ada_attending *a, int64_t index) {
    const ada_head *head = &a->budget->heads[index];
    const ada_head_state *s = &a->states[index];
    return !ada_is_forced(a->budget) && !s->doubted && s->n <= ADA_MOST_ROWS / 2 && s->n < a->p->T / 8 &&
           head->measured_error < a->budget->tolerance &&
           (head->error_limit > largest_limit(a, index) || refuted(a, head, s) || surprises(a, head));
}

static bool lse_holds(const ada_attending *a, const ada_head *head) {
    return head->lse_error <= fmax(a->budget->tolerance, 4e-7);
}

/* Whether a precision or a structure by name computed a head, which is then not replaced. */
static bool was_forced(const ada_attending *a, const ada_head *head) {
    return ada_is_forced(a->budget) || ada_is_thinned_by_name(a->budget, head);
}

/* The error of such a head, whose output (misses) or lse is off beyond doubt. */
static ada_status refuse(const ada_attending *a, int64_t index, bool misses, ada_error *error) {
    const ada_head *head = &a->budget->heads[index];
    const char *what = misses ? "a relative error of at most" : "an lse that is off by at most";
    const double got = misses ? head->measured_error : head->lse_error, wanted = a->budget->tolerance;
    const long long b = index / a->p->H, h = index % a->p->H;
    if (ada_is_forced(a->budget))
        return ada_fail(error, ADA_ERR_NUMERICAL,
                        "precision: expected %s %g in every head, got about %.3g in head (%lld, %lld) from "
                        "('%s', '%s')",
                        what, wanted, got, b, h, ada_rung_name(head->choice.qk),
                        ada_rung_name(head->choice.pv));
    if (head->rank > 0)
        return ada_fail(error, ADA_ERR_NUMERICAL,
                        "structure: expected %s %g in every head, got about %.3g in head (%lld, %lld) from "
                        "%d landmarks",
                        what, wanted, got, b, h, head->rank);
    return ada_fail(error, ADA_ERR_NUMERICAL,
                    "structure: expected %s %g in every head, got about %.3g in head (%lld, %lld) from "
                    "('%s', '%s') and %.0f %% of the blocks",
                    what, wanted, got, b, h, ada_rung_name(head->choice.qk), ada_rung_name(head->choice.pv),
                    100 * head->kept);
}

/* Compares a head with its exact rows; false where it may miss the tolerance. misses: it does so beyond
 * doubt. */
static bool compare_head(ada_attending *a, int64_t index, bool *misses) {
    const ada_problem *p = a->p;
    ada_head *head = &a->budget->heads[index];
    const ada_head_state *s = &a->states[index];
    const double tolerance = a->budget->tolerance, allowed = tolerance + ada_rounding_of(p->query.dtype);
    const int E = (int)p->E;
    double *error2 = a->error2 + index * ADA_MOST_ROWS, out[ADA_PIECE];
    *misses = false;
    head->lse_error = 0;
    bool nothing_seen = true;
    for (int i = 0; i < s->n; i++) {
        const int64_t at = index * ADA_MOST_ROWS + i;
        error2[i] = 0;
        for (int e = 0; e < E; e += ADA_PIECE) {
            const int width = a->backend->output(a, index, i, e, out);
            for (int c = 0; c < width; c++) {
                const double exact = a->exact_o[at * E + e + c], difference = out[c] - exact;
                error2[i] += difference * difference;
                nothing_seen &= exact == 0 && out[c] == 0;
            }
        }
        const double lse = a->exact_lse[at];
        if (isnan(lse) || !isfinite(error2[i])) return true; /* unverifiable: plain arithmetic's own NaN */
        if (!p->lse || lse == -INFINITY) continue;
        const double off = fabs(a->backend->output_lse(a, index, i) - lse);
        head->lse_error = fmax(head->lse_error, off - 4 * ada_rounding_of(ADA_F32) * fabs(lse));
    }
    if (nothing_seen && s->out2 > 0) return true; /* only rows of zeros were drawn: they tell nothing */
    const ada_error_limits limits = ada_limit_error(error2, s->weight, s->n);
    const ada_relative_error error = ada_relate_error(&limits, s->out2, allowed);
    head->verified_rows = s->n;
    head->measured_error = error.error;
    head->error_limit = error.limit;
    /* Few rows without much of an error say little of the others. What was chosen keeps the budget so. */
    if (s->look || (a->mass && ada_is_fp32(head)))
        head->error_limit = fmax(head->error_limit, ADA_MARGIN * head->predicted_error);
    if (p->on_gpu) head->error_limit = fmax(head->error_limit, left_out(a, index));
    *misses = error.misses;
    return head->error_limit <= largest_limit(a, index) && lse_holds(a, head) &&
           !((refuted(a, head, s) || surprises(a, head)) && doubts(a, index));
}

/* What was assumed of the error of a head that nobody looked at gives way to what some of its rows say. */
static void glance_at_plain(ada_attending *a, int64_t index, char *scratch) {
    const ada_problem *p = a->p;
    ada_head_state *s = &a->states[index];
    ada_row_profile *rows = a->profiles + index * ADA_MOST_ROWS;
    const int64_t b = index / p->H, h = index % p->H;
    ada_key_probe keys = {.total = s->total};
    double error, lse_error;
    if (!s->glanced && !ada_glance(p, a->k, b, h, false, rows, &keys, scratch)) return;
    rows->out2 = ada_glance_at_output(p, a->k, b, h, scratch) / rows->weight;
    ada_forecast_plain(rows, 2, keys.total, p, &error, &lse_error);
    if (isnan(error)) return;
    a->budget->heads[index].predicted_error = error;
    const double limit = a->budget->tolerance / ADA_MARGIN_GUESSED;
    /* Of a head this small one exact row would cost more than the 2 % of it that a budget may. */
    s->uneven = !rows[0].good && ada_is_few(p);
    s->trusted = !a->budget->verify_all && rows[0].good && error <= limit &&
                 (!p->lse || lse_error <= fmax(limit, 1e-6));
}

/* Compares a small head with few exact rows at once, while its numbers are at hand; what they do not settle
 * is left to ada_verify_heads. */
static void verify_at_once(ada_attending *a, int64_t index, char *scratch) {
    ada_head_state *s = &a->states[index];
    ada_head *head = &a->budget->heads[index];
    const int c = ada_candidate_of(head->choice);
    bool misses;
    if (!is_compared_at_once(a, head)) return;
    measure_norms(a, index, scratch);
    if (!isfinite(s->out2)) return;
    if (s->glanced) {
        const ada_row_profile *rows = a->profiles + index * ADA_MOST_ROWS;
        const double out2 = s->out2 / (double)a->p->T, guess = rows->p2d * rows->weight;
        /* Outputs that differ more than independent values would make them are those of fewer keys; ones that
         * are far smaller cancel. */
        const double apart = fmax(fmin(out2 - s->center2, s->value2 / 4) / guess, 1);
        const double shrunk = s->glanced2 / out2, factor = shrunk > 1 ? fmax(shrunk / 2, 1) : fmin(shrunk, 1);
        head->predicted_error = head->forecast.error[c] * sqrt(apart * factor);
    }
    s->n = rows_to_verify(a, index);
    if (s->n > ADA_EXACT_ROWS) s->n = ADA_EXACT_ROWS;
    draw_rows_to_verify(a, index, scratch);
    compute_rows(a, index, 0, s->n, scratch);
    s->trusted = compare_head(a, index, &misses);
}

void ada_glance_at(void *attending, int64_t index, int worker) {
    ada_attending *a = attending;
    char *scratch = a->scratch + worker * a->scratch_bytes;
    if (a->states[index].look) return;
    if (ada_all_fp32(a->budget->heads[index].choice))
        glance_at_plain(a, index, scratch);
    else
        verify_at_once(a, index, scratch);
}

/* The rung that a head goes up to; false where there is none, or where it may not. */
static bool go_up(ada_attending *a, int64_t index) {
    ada_head *head = &a->budget->heads[index];
    const bool at_fp32 = head->choice.qk <= ADA_RUNG_FP32 && head->choice.pv <= ADA_RUNG_FP32;
    const ada_rung wanted = at_fp32 ? ADA_RUNG_FP64 : ADA_RUNG_FP32, dearest = a->budget->dearest;
    const ada_rung next = wanted > dearest ? wanted : dearest; /* AUTO is below all */
    ada_head_state *s = &a->states[index];
    const ada_look look = s->look;
    const bool first = !head->retried || s->was_sparse;
    if (ada_is_thinned_by_name(a->budget, head)) return false;
    s->was_sparse = ada_is_thinned(head);
    if (s->was_sparse) {
        ada_make_dense(head);
        const int c = ada_candidate_of(head->choice);
        if (a->p->on_gpu) head->predicted_error = c < 0 ? NAN : ada_error_on(a, index, c);
        return true;
    }
    const int now = ada_candidate_of(head->choice);
    if (ada_is_forced(a->budget) || (head->choice.qk <= next && head->choice.pv <= next)) return false;
    int c = ada_candidate_of((ada_choice){next, next});
    if (look == ADA_LOOK_ALL && first && now > c && isfinite(head->error_limit)) {
        /* The first time to a rung that keeps the budget even if its prediction is off as this one's limit
         * is. */
        ada_forecast worse = head->forecast;
        const double off = fmax(head->error_limit / head->predicted_error, 1);
        for (int i = 0; i < ADA_CANDIDATES; i++) worse.error[i] = i < now ? off * worse.error[i] : INFINITY;
        const ada_task task = ada_task_of(a, index, ADA_MARGIN);
        c = ada_plan_head(&worse, &task, a->budget->rates);
    }
    head->choice = ada_candidates[c];
    head->predicted_error = look ? head->forecast.error[c] : ada_unseen_error(a->p, c);
    head->retried = true;
    return true;
}

/* Calls that are not verified were predicted by statistics that know nothing of the output, whose norm may be
 * far smaller where values cancel. */
static void confirm_guess(ada_attending *a, int64_t index) {
    ada_head *head = &a->budget->heads[index];
    const int c = ada_candidate_of(head->choice);
    const double out2 = a->backend->output_norm(a, index, a->norms + index * a->p->T, a->scratch);
    ada_row_profile guess = a->profiles[index * ADA_MOST_ROWS];
    guess.out2 = out2 / guess.weight;
    ada_forecast after;
    ada_forecast_head(&guess, 1, &a->keys[index / a->per_head], a->p, ada_candidates_of(a, index), &after);
    for (int i = 0; i < ADA_CANDIDATES; i++)
        if (!isnan(head->forecast.error[i])) head->forecast.error[i] = after.error[i];
    head->predicted_error = head->forecast.error[c];
}

/* Heads that are predicted only: those whose outputs say that they miss the tolerance go up. */
static ada_status confirm_guesses(ada_attending *a, ada_error *error) {
    int64_t n = 0;
    if (a->backend->fetch_norms(a, error)) return error->status;
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        const ada_head *head = &a->budget->heads[i];
        if (!a->states[i].look || a->states[i].n || !head->forecast.finite || head->rank > 0 ||
            head->choice.qk > ADA_RUNG_FP32)
            continue;
        confirm_guess(a, i);
        const bool keeps = head->predicted_error * ADA_MARGIN_GUESSED <= a->budget->tolerance;
        if (!keeps && go_up(a, i)) a->list[n++] = i;
    }
    return n ? ada_execute_heads(a, a->list, n, error) : ADA_OK;
}

ada_status ada_verify_heads(ada_attending *a, ada_error *error) {
    const ada_problem *p = a->p;
    int64_t open = 0;
    if (p->T < ADA_LEAST_QUERIES) {
        if (confirm_guesses(a, error)) return error->status;
        if (!ada_has_exact_rows(a)) return ADA_OK;
    }
    for (int64_t i = 0; i < ada_head_count(a); i++) {
        ada_head_state *s = &a->states[i];
        s->n = rows_to_verify(a, i);
        s->open = s->n > 0;
        open += s->open;
    }
    const double reading = (double)(ada_head_count(a) * p->T) * (double)p->E;
    while (open > 0) {
        if (a->backend->fetch_norms(a, error)) return error->status;
        if (!ada_run_tasks(a, norm_task, ada_head_count(a), reading))
            return ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
        if (a->backend->exact(a, error)) return error->status;
        int64_t again = 0;
        open = 0;
        for (int64_t i = 0; i < ada_head_count(a); i++) {
            ada_head *head = &a->budget->heads[i];
            ada_head_state *s = &a->states[i];
            if (!s->open) continue;
            s->known = true;
            /* Where all inputs are known to be finite, an output that is not is wrong. */
            bool misses = !isfinite(s->out2);
            s->open = s->look || !misses;
            if (!s->open) continue;
            s->open = misses || !compare_head(a, i, &misses);
            if (!s->open) continue;
            if (was_forced(a, head) && (misses || !lse_holds(a, head))) return refuse(a, i, misses, error);
            if (!misses && doubts(a, i)) {
                s->n = s->n < 8 ? 8 : 2 * s->n, s->doubted = true, s->known = false;
            } else {
                s->open = go_up(a, i);
                if (s->open) a->list[again++] = i;
            }
            open += s->open;
        }
        if (again && ada_execute_heads(a, a->list, again, error)) return error->status;
    }
    return ADA_OK;
}
