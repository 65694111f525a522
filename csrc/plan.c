/* The error model and the choice.
 *
 * Rounding moves the scores of a row by independent noise of variance s^2, its weights and values likewise,
 * and the output by s^2 sum p^2 d (probe.h). Constants are root mean squares of the rounding of each format,
 * for mantissas that are distributed evenly in logarithm; benchmarks/error_model.py compares them with
 * measured errors.
 */
#include "plan.h"

#include <math.h>

const ada_choice ada_candidates[ADA_CANDIDATES] = {
    {ADA_RUNG_FP64, ADA_RUNG_FP64},     {ADA_RUNG_FP32, ADA_RUNG_FP32},   {ADA_RUNG_BF16X6, ADA_RUNG_BF16X6},
    {ADA_RUNG_BF16X3, ADA_RUNG_BF16X3}, {ADA_RUNG_INT16, ADA_RUNG_INT16}, {ADA_RUNG_FP16, ADA_RUNG_FP16},
    {ADA_RUNG_BF16, ADA_RUNG_BF16},     {ADA_RUNG_INT8, ADA_RUNG_BF16},   {ADA_RUNG_INT8, ADA_RUNG_INT8},
    {ADA_RUNG_INT8, ADA_RUNG_FP8},      {ADA_RUNG_FP8, ADA_RUNG_FP8}};

int ada_candidate_of(ada_choice choice) {
    for (int c = 0; c < ADA_CANDIDATES; c++)
        if (ada_candidates[c].qk == choice.qk && ada_candidates[c].pv == choice.pv) return c;
    return -1;
}

/* ---- errors ---- */

/* Of one input, relative: 2^-bits times 0.42, where bits count the hidden one. */
#define ROUND_BF16 1.65e-3
#define ROUND_FP16 2.1e-4
#define ROUND_BF16X3 2.1e-6
#define ROUND_FP8 2.6e-2
/* Of fp32, fitted to measured errors: of a score by its terms, and by the row's largest, from which it is
 * subtracted; of a sum of weights and values by its terms, and of the output. */
#define ROUND_TERMS 4e-8
#define ROUND_SCORE 1e-7
#define ROUND_SUM 1.2e-7
#define ROUND_OUTPUT 1e-7
/* Of the exponential that is fused with bf16 and 8-bit weights. */
#define ROUND_EXP 1.7e-3
/* Mean squared norm of values below which floats lose digits of their squares. */
#define LEAST_VALUE2 1e-30

static double square(double x) { return x * x; }

/* Variance of the scores' noise, summed over the keys with the given weights of a key, of its norm2 and of
 * its block's largest^2. */
static double score_noise(const ada_row_profile *x, ada_rung rung, const ada_problem *p, double sum,
                          double norm, double step, double total) {
    const ada_dtype dtype = p->query.dtype;
    const double spread = total > 0 ? x->spread / total * norm : 0; /* sum of scale^2 q^2 k^2 */
    const double with_mean = spread + (x->size - x->spread) * sum;
    switch (rung) {
    case ADA_RUNG_FP64:
        return square(1e-15) * (x->size + 1) * sum;
    case ADA_RUNG_FP32:
    case ADA_RUNG_BF16X6:
        return square(ROUND_TERMS) * with_mean + square(ROUND_SCORE * x->reference) * sum;
    case ADA_RUNG_BF16X3:
        return (dtype == ADA_BF16 ? square(ROUND_TERMS) : 2 * square(ROUND_BF16X3)) * with_mean;
    case ADA_RUNG_FP16:
        return (dtype == ADA_F16 ? square(ROUND_TERMS) : 2 * square(ROUND_FP16)) * with_mean;
    case ADA_RUNG_BF16: /* an array's own format is not centred and not rounded, but for the scale; GPUs do */
        if (p->on_gpu)  /* neither, and scale the score */
            return dtype == ADA_BF16 ? square(ROUND_TERMS) * with_mean : 2 * square(ROUND_BF16) * with_mean;
        return dtype == ADA_BF16 ? square(ROUND_BF16) * with_mean : 2 * square(ROUND_BF16) * spread;
    case ADA_RUNG_INT16: {
        /* A row's step follows from its largest or from its norm; a block's norm is about that of normal
         * entries whose largest is three deviations. */
        const double by_norm = square(1.0 / ADA_I16_NORM), by_most = square(1.0 / ADA_I16_MAX);
        const double keys = fmax(by_most, (double)p->D / 9 * by_norm);
        return (fmax(x->qmax2 * by_most, x->q2 * by_norm) * norm + x->q2 * keys * step) / 12;
    }
    case ADA_RUNG_FP8:
        return 2 * square(ROUND_FP8) * spread;
    default: /* int8 */
        return (x->qmax2 * norm + x->q2 * step) / (12.0 * ADA_I8_MAX * ADA_I8_MAX);
    }
}

/* Squared error that the weights' and values' rounding puts into the output. */
static double value_noise(const ada_row_profile *x, ada_rung rung, const ada_problem *p, double step8,
                          double step16) {
    const ada_dtype dtype = p->query.dtype;
    const double sums = square(ROUND_SUM) * x->p2v + square(ROUND_OUTPUT) * x->out2;
    switch (rung) {
    case ADA_RUNG_FP64:
        return square(1e-15) * x->p2v;
    case ADA_RUNG_FP32:
    case ADA_RUNG_BF16X6:
        return sums;
    case ADA_RUNG_BF16X3:
        return sums + square(ROUND_BF16X3) * (x->p2d + (dtype == ADA_BF16 ? 0 : x->p2v));
    case ADA_RUNG_FP16: /* GPUs round weights too */
        return sums + (p->on_gpu ? square(ROUND_FP16) * x->p2d : 0) +
               (dtype == ADA_F16 ? 0 : square(ROUND_FP16) * x->p2v);
    case ADA_RUNG_BF16:
        return square(ROUND_BF16) * (x->p2d + (dtype == ADA_BF16 ? 0 : x->p2v));
    case ADA_RUNG_INT16:
        return sums + x->round16 + x->p2 * step16;
    case ADA_RUNG_FP8: /* a row of one weight is divided by what that was rounded to */
        return square(ROUND_FP8) * (x->p2d + x->p2v);
    default: /* int8 */
        return x->round8 + x->p2 * step8;
    }
}

static double exp_noise(ada_choice choice, const ada_problem *p) {
    const bool fused = !p->on_gpu && (choice.pv == ADA_RUNG_INT8 || choice.pv == ADA_RUNG_BF16);
    return fused ? square(ROUND_EXP) : 0;
}

/* Blocks that stand in never count as quite independent, nor their values as less apart than they are for
 * some rows: few profiled rows may not meet the one value that is far from all others. */
#define LEAST_JOINT 0.02
#define LEAST_OWN 0.4

static void forecast_level(const ada_row_profile *rows, int n, double out2, int k, ada_forecast *f) {
    double blocks = 0, stand_ins = 0, error2 = 0, parts2 = 0, together2 = 0, apart2 = 0;
    for (int i = 0; i < n; i++) {
        const ada_stand_ins *x = &rows[i].levels[k];
        const double w = rows[i].weight;
        blocks += w * rows[i].blocks, stand_ins += w * (double)x->stand_ins;
        error2 += w * (double)x->error2, parts2 += w * (double)x->parts2;
        together2 += w * (double)x->together2, apart2 += w * (double)x->apart2;
    }
    const double own = fmax(apart2 > 0 ? parts2 / apart2 : 0, LEAST_OWN);
    const double joint = together2 > apart2 ? (error2 - parts2) / (together2 - apart2) / own : 0;
    f->level[k].kept = blocks > 0 ? 1 - stand_ins / blocks : 1;
    f->level[k].error = out2 > 0 ? sqrt(error2 / out2) : INFINITY;
    f->level[k].own = own, f->level[k].joint = fmin(fmax(joint, LEAST_JOINT), 1);
}

void ada_forecast_head(const ada_row_profile *rows, int n, const ada_key_probe *keys, const ada_problem *p,
                       int candidates, ada_forecast *f) {
    double out2 = 0, counted = 0, entropies = 0, entropies2 = 0, blocks = 0, stds = 0, locals = 0, local = 0;
    *f = (ada_forecast){.finite = isfinite(keys->total) && isfinite(keys->step8)};
    /* Statistics are floats, and so are the rungs but one: they know nothing of smaller doubles. */
    if (p->query.dtype == ADA_F64 && keys->count > 0 && keys->value2_mean < LEAST_VALUE2) f->finite = false;
    double noise[ADA_CANDIDATES] = {0}, weights = 0, exponents = 0, apart = 0;
    for (int i = 0; i < n; i++) {
        const ada_row_profile *x = &rows[i];
        f->finite &= x->good;
        out2 += x->weight * x->out2;
        if (x->visible > 0) stds += x->weight * x->score_std;
        exponents += x->weight * x->q2 * keys->total, apart += x->weight * x->p2d;
        if (x->visible > 1) {
            counted += x->weight;
            entropies += x->weight * x->entropy, entropies2 += x->weight * square(x->entropy);
            blocks += x->weight * x->block_entropy;
            if (!isnan(x->local_entropy)) locals += x->weight, local += x->weight * x->local_entropy;
        }
        for (int c = 0; c < candidates; c++) {
            const ada_choice choice = ada_candidates[c];
            const double scores = score_noise(x, choice.qk, p, x->p2d, x->p2d_norm, x->p2d_step, keys->total);
            noise[c] += x->weight * (scores + exp_noise(choice, p) * x->p2d +
                                     value_noise(x, choice.pv, p, keys->step8, keys->step16));
            const double lse = score_noise(x, choice.qk, p, x->p2, x->p2_norm, x->p2_step, keys->total);
            f->lse_error[c] =
                fmax(f->lse_error[c], ADA_LARGEST_OF_MANY * sqrt(lse + exp_noise(choice, p) * x->p2));
        }
    }
    for (int c = 0; c < candidates; c++) {
        const bool known = isfinite(out2) && !isnan(noise[c]); /* squares of floats may overflow */
        f->error[c] = !known ? NAN : out2 > 0 ? sqrt(noise[c] / out2) : noise[c] > 0 ? INFINITY : 0;
        f->finite &= !isnan(f->error[c]);
    }
    for (int c = candidates; c < ADA_CANDIDATES; c++) f->error[c] = NAN;
    const double m = entropies / counted;
    f->entropy = m, f->block_entropy = blocks / counted, f->local_entropy = local / locals;
    f->entropy_std = isnan(m) ? NAN : sqrt(fmax(entropies2 / counted - m * m, 0));
    for (int i = 0; i < n; i++) weights += rows[i].visible > 0 ? rows[i].weight : 0;
    f->score_std = stds / weights;
    f->out2 = out2 / weights;
    f->exponent2 = exponents / weights, f->noise2 = apart / out2;
    for (int k = 0; keys->block_mean && k < ADA_LEVELS; k++) forecast_level(rows, n, out2, k, f);
}

void ada_forecast_plain(const ada_row_profile *rows, int n, double total, const ada_problem *p, double *error,
                        double *lse_error) {
    double noise = 0, out2 = 0, most = 0;
    for (int i = 0; i < n; i++) {
        const ada_row_profile *x = &rows[i];
        noise += x->weight * (score_noise(x, ADA_RUNG_FP32, p, x->p2d, x->p2d_norm, 0, total) +
                              value_noise(x, ADA_RUNG_FP32, p, 0, 0));
        out2 += x->weight * x->out2;
        most = fmax(most, score_noise(x, ADA_RUNG_FP32, p, x->p2, x->p2_norm, 0, total));
    }
    *error = out2 > 0 ? sqrt(noise / out2) : noise > 0 ? INFINITY : 0;
    if (!isfinite(noise) || !isfinite(out2)) *error = NAN;
    *lse_error = ADA_LARGEST_OF_MANY * sqrt(most);
}

/* Of a score, where weights stand apart and where many stand together, and of the output; fitted to measured
 * errors. */
#define WEIGHED_APART 2.3e-8
#define WEIGHED_TOGETHER 4.4e-8
#define WEIGHED_OUTPUT 1.28e-7

double ada_forecast_weighed(double apart, double together, double out2) {
    const double noise = square(WEIGHED_APART) * apart + square(WEIGHED_TOGETHER) * together;
    return hypot(out2 > 0 ? sqrt(noise / out2) : 0, WEIGHED_OUTPUT);
}

/* ---- choice ---- */

double ada_predicted_seconds(const ada_task *t, const ada_rate *rate) {
    /* Rates are known for two head sizes. The time of an operation is a constant and, for the softmax, a part
     * that is shared by D of them: a line over 1 / D, level beyond 128 and below 16. */
    const double d = fmin(fmax((double)t->D, 16), 128), small = 1 / rate->gflops[0],
                 large = 1 / rate->gflops[1];
    const double each = large + (small - large) * (128 / d - 1);
    return 1e-9 * (t->operations * fmax(each, 0.1 * large) + t->elements * rate->pack_ns);
}

/* A less exact rung is taken where it needs at most this share of the time: rates scatter. */
#define PAYS 0.95

static bool allowed(const ada_task *t, int c) {
    const ada_choice choice = ada_candidates[c];
    if (t->barred >> c & 1) return false;
    if (t->dearest != ADA_RUNG_AUTO && (choice.qk < t->dearest || choice.pv < t->dearest)) return false;
    return t->cheapest == ADA_RUNG_AUTO || (choice.qk <= t->cheapest && choice.pv <= t->cheapest);
}

/* No head is known on which a rung's error is below this; most have less than COMMON times as much. */
#define COMMON 8
static const double least_error[ADA_CANDIDATES] = {0, 0, 0, 3e-7, 1e-5, 5e-5, 3e-4, 1e-3, 1.5e-3, 5e-3, 5e-3};

bool ada_may_pay(const ada_task *t, const ada_rate rates[ADA_CANDIDATES], double cost) {
    const double plain = ada_predicted_seconds(t, &rates[t->plain]);
    for (int c = t->plain + 1; c < ADA_CANDIDATES; c++) {
        const double saved = plain - ada_predicted_seconds(t, &rates[c]);
        /* Few heads are as good as the best: what only they allow must be worth twice the looking. */
        const double stake = COMMON * least_error[c] <= t->tolerance ? cost : 2 * cost;
        if (allowed(t, c) && ADA_MARGIN * least_error[c] <= t->tolerance && saved > (1 - PAYS) * plain &&
            saved > stake)
            return true;
    }
    return !allowed(t, t->plain);
}

int ada_plan_head(const ada_forecast *f, const ada_task *t, const ada_rate rates[ADA_CANDIDATES]) {
    int best = -1, dearest = -1;
    for (int c = 0; c < ADA_CANDIDATES; c++) {
        if (!allowed(t, c)) continue;
        const bool computed = rates[c].gflops[0] > 0;
        if (dearest < 0 || (computed && rates[dearest].gflops[0] == 0)) dearest = c;
        if (!computed) continue;
        /* The plain rung needs no more than its prediction's own margin: what is dearer costs most. */
        const double limit = t->tolerance / (c == t->plain ? fmin(t->margin, ADA_MARGIN) : t->margin);
        /* What is not finite is left to plain arithmetic, which passes it on as it should. */
        const bool keeps = f->finite
                               ? f->error[c] <= limit && (!t->lse || f->lse_error[c] <= fmax(limit, 1e-6))
                               : c == t->plain;
        if (!keeps) continue;
        const double seconds = ada_predicted_seconds(t, &rates[c]);
        if (best < 0 || seconds < PAYS * ada_predicted_seconds(t, &rates[best])) best = c;
    }
    return best >= 0 ? best : dearest >= 0 ? dearest : t->plain;
}

/* Rows of gradients run at this share of the speed of fp32 tiles; and what a head costs besides, in seconds.
 */
#define GRADIENT_ROW_SPEED 0.25
#define GRADIENT_COST 1.5e-4

bool ada_plan_gradient(const ada_task *t, double verifying, const ada_rate rates[ADA_CANDIDATES]) {
    const ada_choice narrow = ADA_GRADIENT_NARROW;
    const ada_rate *scores = &rates[ada_candidate_of((ada_choice){narrow.qk, narrow.qk})];
    const ada_rate *sums = &rates[ada_candidate_of((ada_choice){narrow.pv, narrow.pv})];
    if (scores->gflops[0] == 0 || sums->gflops[0] == 0) return false;
    ada_task rows = *t;
    rows.operations = verifying / GRADIENT_ROW_SPEED, rows.elements = 0;
    /* Two products for the scores and three for the sums, where forward there is one of each. */
    const double plain = 2.5 * ada_predicted_seconds(t, &rates[t->plain]);
    const double time = ada_predicted_seconds(t, scores) + 1.5 * ada_predicted_seconds(t, sums) +
                        ada_predicted_seconds(&rows, &rates[t->plain]) + GRADIENT_COST;
    return ADA_GRADIENT_ERROR * t->margin <= t->tolerance && time < PAYS * plain;
}

/* ---- structure ---- */

static bool has_float_mask(const ada_problem *p) {
    return p->attn_mask.data && p->attn_mask.dtype != ADA_BOOL;
}
static bool has_mask(const ada_problem *p) { return p->attn_mask.data != NULL; }
static bool has_softcap(const ada_problem *p) { return p->has_softcap; }
static bool has_alibi(const ada_problem *p) { return p->alibi_slopes.data != NULL; }
static bool has_dropout(const ada_problem *p) { return p->drop_below != 0; }
static bool has_left_window(const ada_problem *p) { return p->window_left != ADA_UNBOUNDED; }
static bool is_stored(const ada_problem *p) { return p->stored; }
static bool has_mask_on_gpu(const ada_problem *p) { return p->on_gpu && has_mask(p); }
static bool is_wide_on_gpu(const ada_problem *p) { return p->on_gpu && (p->D > 128 || p->E > 128); }
static bool is_double(const ada_problem *p) { return p->query.dtype == ADA_F64; }
static bool has_odd_scale(const ada_problem *p) { return p->only_f64; }

/* Where something is added to the scores, the kernels that weigh blocks have no part. Landmarks need weights
 * that are the exponential of a product, for all keys from the first on that queries see. */
static const struct {
    const char *what;
    bool (*given)(const ada_problem *p);
    bool sparse, low_rank;
} rules[] = {{"softcap", has_softcap, false, false},
             {"alibi_slopes", has_alibi, false, false},
             {"a floating attn_mask", has_float_mask, false, false},
             {"dropout_p", has_dropout, false, false},
             {"a KVCache", is_stored, false, false},
             {"attn_mask on a GPU", has_mask_on_gpu, false, false},
             {"head sizes above 128 on a GPU", is_wide_on_gpu, false, true},
             {"a scale beyond fp32", has_odd_scale, false, false},
             {"attn_mask", has_mask, true, false},
             {"window[0]", has_left_window, true, false},
             {"float64 arrays", is_double, true, false}};

const char *ada_rules_out(const ada_problem *p, ada_structure structure) {
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        const bool goes = structure == ADA_STRUCTURE_SPARSE     ? rules[i].sparse
                          : structure == ADA_STRUCTURE_LOW_RANK ? rules[i].low_rank
                                                                : true;
        if (!goes && rules[i].given(p)) return rules[i].what;
    }
    return NULL;
}

/* What few rows say of the error is taken so much larger. */
#define STAND_MARGIN 1.15
/* Reading the kept blocks one by one costs so much of the dense time on top. */
#define LISTED 0.05
/* Of the budget, for what stands in by name where the rung leaves none. */
#define LEAST_ROOM 0.1

/* The share of blocks that 64 rows keep together, from what each keeps where it is alone. */
static double kept_by_tile(double alone) { return pow(alone, 0.6); }

double ada_listed_seconds(const ada_task *t, const ada_rate *rate, double kept) {
    ada_task part = *t;
    part.operations *= rate->sparse + kept * (1 + LISTED - rate->sparse);
    return ada_predicted_seconds(&part, rate);
}

/* A head on a candidate, with so much room for what stands in, as a share of its output. */
static ada_sparse_choice sparse_on(const ada_forecast *f, const ada_task *t, const ada_rate *rate, int c,
                                   double room) {
    int level = ADA_LEVELS - 1;
    while (level > 0 && f->level[level - 1].error <= room) level--;
    const double kept = kept_by_tile(f->level[level].kept);
    return (ada_sparse_choice){.candidate = c,
                               .budget2 = room * room * f->out2 / f->level[level].own,
                               .joint = f->level[level].joint,
                               .kept = kept,
                               .error = hypot(f->error[c], room),
                               .seconds = ada_listed_seconds(t, rate, kept)};
}

bool ada_is_faster(double seconds, double than) { return seconds < PAYS * than; }

bool ada_plan_sparse(const ada_forecast *f, const ada_task *t, const ada_rate rates[ADA_CANDIDATES],
                     int dense, bool forced, ada_sparse_choice *choice) {
    const double limit = t->tolerance / t->margin;
    double best = forced ? INFINITY : PAYS * ada_predicted_seconds(t, &rates[dense]);
    bool found = false, within = false;
    for (int c = 0; c < ADA_CANDIDATES; c++) {
        if (!(t->sparse >> c & 1) || !allowed(t, c) || !f->finite) continue;
        const bool keeps = f->error[c] <= limit && (!t->lse || f->lse_error[c] <= fmax(limit, 1e-6));
        double room = keeps ? sqrt(limit * limit - f->error[c] * f->error[c]) / STAND_MARGIN : 0;
        if (forced)
            room = fmax(room, LEAST_ROOM * limit);
        else if (!keeps || !(f->level[ADA_LEVELS - 1].error <= room))
            continue;
        const ada_sparse_choice own = sparse_on(f, t, &rates[c], c, room);
        const double cost = keeps ? own.seconds : own.error;
        if (found && keeps != within ? !keeps : !(cost < best)) continue;
        best = cost, found = true, within = keeps;
        *choice = own;
    }
    return found && choice->budget2 > 0;
}

/* Sampled rows and keys say by this much too little of a rank's error. */
#define RANK_MARGIN 1.15
/* Landmarks take so much longer than their products: packing, residuals, rows that are computed exactly. */
#define RANK_OVERHEAD 1.25
/* Heads need this share of the landmarks that their dimensions and spread ask for, or more. */
#define LEAST_RANKS 0.25

/* Of so many operations, with nothing to pack. */
static double seconds_of(double operations, const ada_task *t, const ada_rate *rate) {
    ada_task part = *t;
    part.operations = operations, part.elements = 0;
    return ada_predicted_seconds(&part, rate);
}

double ada_low_rank_seconds(const ada_task *t, const ada_rank_task *sizes, const ada_rank_speed *speed,
                            int rank) {
    const double keys = (double)(sizes->keys.end - sizes->keys.first);
    const double operations = ada_low_rank_operations(&sizes->keys, sizes->queries, sizes->D, sizes->E, rank);
    return speed->sample_seconds + seconds_of(RANK_OVERHEAD * operations, t, &speed->products) +
           seconds_of(RANK_OVERHEAD * ada_landmark_operations(keys, sizes->D, rank), t, &speed->choosing);
}

/* Of a kernel of scores that spread by s over d dimensions, terms of degree n + 1 of the exponential's series
 * are s^(n + 1) / sqrt((n + 1)!) beside its size exp(s^2 / 2); those of n and less span (d + n)! / d! / n!.
 */
static double ranks_needed(const ada_forecast *f, double error) {
    const double s = f->score_std, d = fmax(f->exponent2 / (s * s), 1);
    double rest = s * exp(-s * s / 2), ranks = 1;
    for (int n = 1; rest > error && ranks < 1e6; n++) {
        ranks *= (d + n) / n;
        rest *= s / sqrt(n + 1);
    }
    return ranks;
}

double ada_rank_looking_seconds(const ada_task *t, const ada_rank_task *sizes, const ada_rank_speed *speed,
                                int rank) {
    const double keys = (double)(sizes->keys.end - sizes->keys.first);
    return speed->sample_seconds +
           seconds_of(ada_forecast_operations(keys, sizes->D, sizes->E, rank), t, &speed->choosing);
}

int ada_most_ranks(const ada_task *t, const ada_rank_task *sizes, const ada_rank_speed *speed,
                   double seconds) {
    int most = sizes->most;
    while (most > 0 &&
           !(ada_low_rank_seconds(t, sizes, speed, most) + ada_rank_looking_seconds(t, sizes, speed, most) <
             PAYS * seconds))
        most -= most > 16 ? 16 : most;
    return most >= sizes->least ? most : 0;
}

int ada_ranks_to_look_at(const ada_forecast *f, const ada_task *t, const ada_rank_task *sizes,
                         const ada_rank_speed *speed, double seconds) {
    const double error = t->tolerance / sqrt(f->noise2);
    if (!f->finite || !(f->out2 > 0)) return 0;
    const int most = ada_most_ranks(t, sizes, speed, seconds);
    return LEAST_RANKS * ranks_needed(f, error) <= most ? most : 0;
}

ada_rank_wish ada_rank_wish_of(const ada_task *t, const ada_rank_task *sizes, int most, double out2) {
    return (ada_rank_wish){.least = sizes->least < most ? sizes->least : most,
                           .most = most,
                           .out2 = out2,
                           .error = t->tolerance / t->margin / RANK_MARGIN,
                           .lse_error = t->lse ? fmax(t->tolerance, 1e-6) : INFINITY};
}

bool ada_plan_low_rank(const ada_rank_forecast *ranks, const ada_rank_wish *wish, const ada_task *t,
                       const ada_rank_task *sizes, const ada_rank_speed *speed, double seconds, bool forced,
                       ada_rank_choice *choice) {
    const double out2 = wish->out2 > 0 ? wish->out2 : ranks->out2, row2 = square(wish->error) * out2;
    for (int i = 0; i < ranks->levels; i++) {
        const ada_rank_level *level = &ranks->level[i];
        const bool keeps = ada_fulfils(wish, ranks, i);
        if (!keeps && !(forced && i + 1 == ranks->levels)) continue;
        const double relative2 = out2 > 0 ? level->error2 / out2 : level->error2 > 0 ? INFINITY : 0;
        *choice = (ada_rank_choice){.rank = level->rank,
                                    .gain = keeps && row2 > 0 ? level->gain / row2 : 0,
                                    .limit = keeps ? level->limit : INFINITY,
                                    .error = sqrt(relative2),
                                    .seconds = ada_low_rank_seconds(t, sizes, speed, level->rank)};
        if (speed->exact_gflops > 0)
            choice->seconds += 1e-9 * level->exact * t->operations / speed->exact_gflops;
        return forced || choice->seconds < PAYS * seconds;
    }
    return false;
}
