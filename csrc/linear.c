/* The rows of a product climb the ladder each by itself, whatever others are beside them: a rung computes all
 * rows that are on it, block by block of features, then those go on whose predicted error misses. */
#include "linear.h"

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

typedef struct {
    const ada_linear *p;
    const ada_kernels *k;
    int64_t width;  /* K up to a multiple of 4 */
    int64_t rows;   /* in all */
    float *x;       /* [rows][width], zeros behind K */
    float *top;     /* [rows] largest |x| */
    double *norm2;  /* [blocks][rows] squared norm of a row's features of a block */
    uint8_t *rung;  /* [rows] */
    int64_t *on_it; /* the rows to compute now, ascending */
    int64_t on_it_n;
    ada_linear_rung now;
    bool add; /* the low codes to what the high ones gave, else all */
} linear_run;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* y[r] += unit * codes of a plane times x[r] for R rows and the features of a block. */
static void add_codes(const linear_run *run, int plane, int64_t row, int R, int64_t first, int lanes) {
    const ada_linear *p = run->p;
    const int64_t all = (p->N + 15) / 16 * 16, features = least(lanes, p->N - first);
    const float unit = plane ? 1 / 256.0f : 1;
    const uint8_t *codes = p->codes[plane] + first * run->width;
    float s[ADA_ROW_GROUP * ADA_LINEAR_LANES];
    for (int64_t at = 0; at < run->width; at += ADA_LINEAR_DEPTH) {
        const int64_t n = least(ADA_LINEAR_DEPTH, run->width - at);
        const float *scale = p->scale + at / ADA_LINEAR_DEPTH * all + first;
        run->k->code_products(s, ADA_LINEAR_LANES, run->x + row * run->width + at, run->width, R, codes,
                              (int)n, lanes);
        codes += n * lanes;
        for (int r = 0; r < R; r++) {
            float *y = p->out + (row + r) * p->N + first;
            for (int64_t i = 0; i < features; i++) y[i] += unit * scale[i] * s[r * ADA_LINEAR_LANES + i];
        }
    }
}

static void by_weight(const linear_run *run, int64_t row, int R, int64_t first, int64_t features) {
    const ada_linear *p = run->p;
    const float *x = run->x + row * run->width;
    float s[ADA_ROW_GROUP * ADA_BLOCK];
    for (int64_t f = first; f < first + features; f += ADA_BLOCK) {
        const int n = (int)least(ADA_BLOCK, first + features - f);
        const float *w = p->weight + f * p->K;
        run->k->row_scores_f32(s, x, R, w, p->K, n, (int)p->K);
        for (int r = 0; r < R; r++)
            for (int i = 0; i < n; i++) p->out[(row + r) * p->N + f + i] += s[r * ADA_BLOCK + i];
    }
}

static void by_doubles(const linear_run *run, int64_t row, int64_t first, int64_t features) {
    const ada_linear *p = run->p;
    const float *x = run->x + row * run->width;
    for (int64_t f = first; f < first + features; f++) {
        const float *w = p->weight + f * p->K;
        double sum = p->bias ? p->bias[f] : 0;
        for (int64_t k = 0; k < p->K; k++) sum += (double)x[k] * w[k];
        p->out[row * p->N + f] = (float)sum;
    }
}

/* Sum of x^2 times weight, or of x^2 alone: sums that the compiler keeps in vectors. */
static double weighted_squares(const float *x, const double *weight, int64_t n) {
    double sum[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n && weight; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += (double)x[i + j] * x[i + j] * weight[i + j];
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += (double)x[i + j] * x[i + j];
    for (; i < n; i++) sum[0] += (double)x[i] * x[i] * (weight ? weight[i] : 1);
    for (int j = 1; j < 8; j++) sum[0] += sum[j];
    return sum[0];
}

static void block_task(void *context, ada_job *job, int64_t block, int worker) {
    const linear_run *run = context;
    const ada_linear *p = run->p;
    const int64_t first = block * ADA_LINEAR_LANES, features = least(ADA_LINEAR_LANES, p->N - first);
    const int lanes = (int)(features + 15) / 16 * 16;
    /* Kernels take rows that lie side by side; by_weight those without zeros between them. */
    const int most = run->now == ADA_LINEAR_FP64 || (run->now == ADA_LINEAR_FP32 && run->width != p->K)
                         ? 1
                         : ADA_ROW_GROUP;
    for (int64_t i = 0, R; i < run->on_it_n && !ada_job_cancelled(job, worker); i += R) {
        const int64_t row = run->on_it[i];
        for (R = 1; R < most && i + R < run->on_it_n && run->on_it[i + R] == row + R;) R++;
        if (R == 3) R = 2; /* groups of powers of two */
        for (int64_t r = 0; r < R && !run->add && run->now != ADA_LINEAR_FP64; r++)
            for (int64_t f = first; f < first + features; f++)
                p->out[(row + r) * p->N + f] = p->bias ? p->bias[f] : 0;
        if (run->now == ADA_LINEAR_FP64)
            by_doubles(run, row, first, features);
        else if (run->now == ADA_LINEAR_FP32)
            by_weight(run, row, (int)R, first, features);
        else if (!run->add)
            add_codes(run, 0, row, (int)R, first, lanes);
        if (run->now == ADA_LINEAR_INT16) add_codes(run, 1, row, (int)R, first, lanes);
        for (int64_t r = row; r < row + R; r++)
            run->norm2[block * run->rows + r] = weighted_squares(p->out + r * p->N + first, NULL, features);
    }
}

/* Copies the rows; those that code_products does not take, for being too large or small or not finite, start
 * with fp32. */
static void load_rows(linear_run *run) {
    const ada_linear *p = run->p;
    const int axes = p->x.ndim - 1;
    for (int64_t row = 0; row < run->rows; row++) {
        const char *from = p->x.data;
        for (int64_t axis = axes - 1, rest = row; axis >= 0; rest /= p->x.shape[axis--])
            from += rest % p->x.shape[axis] * p->x.stride[axis];
        float *to = run->x + row * run->width;
        if (p->x.stride[axes] == (int64_t)sizeof *to) memcpy(to, from, (size_t)p->K * sizeof *to);
        for (int64_t k = 0; k < p->K && p->x.stride[axes] != (int64_t)sizeof *to; k++)
            to[k] = *(const float *)(from + k * p->x.stride[axes]);
        for (int64_t k = p->K; k < run->width; k++) to[k] = 0;
        const float top = run->k->reach(to, run->width, 1, (int)p->K, NULL, NULL);
        run->top[row] = top;
        const bool taken = top == 0 || (top >= 0x1p-100f && top < 0x1p100f);
        run->rung[row] = (uint8_t)(taken || p->first > ADA_LINEAR_FP32 ? p->first : ADA_LINEAR_FP32);
    }
}

/* Whether a row may stay on its rung; its predicted error. */
static bool keeps(const linear_run *run, int64_t row, double *predicted) {
    const ada_linear *p = run->p;
    const int64_t blocks = (p->N + ADA_LINEAR_LANES - 1) / ADA_LINEAR_LANES;
    const bool exact = run->now == ADA_LINEAR_FP64;
    double norm2 = 0;
    for (int64_t b = 0; b < blocks; b++) norm2 += run->norm2[b * run->rows + row];
    const double *left2 = p->left2 ? p->left2 + (exact ? ADA_LINEAR_FP32 : run->now) * p->K : NULL;
    double error2 = left2 ? weighted_squares(run->x + row * run->width, left2, p->K) : NAN;
    if (run->now <= ADA_LINEAR_INT16) error2 += p->weight2 * pow(run->top[row] * ADA_CODES_STEP, 2) / 12;
    *predicted = error2 > 0 ? sqrt(error2 / norm2) * (exact ? 0x1p-29 : 1) : error2;
    if (exact || p->tolerance == 0 || !isfinite(error2)) return true;
    return isfinite(norm2) && error2 <= p->tolerance * p->tolerance * norm2;
}

ada_status ada_linear_run(const ada_linear *p, bool (*interrupt)(void *), void *context, ada_error *error) {
    linear_run run = {.p = p, .k = ada_kernels_get(), .rows = 1, .width = (p->K + 3) / 4 * 4};
    for (int axis = 0; axis < p->x.ndim - 1; axis++) run.rows *= p->x.shape[axis];
    const int64_t blocks = (p->N + ADA_LINEAR_LANES - 1) / ADA_LINEAR_LANES;
    const int64_t most = p->num_threads ? p->num_threads : ada_get_num_threads();
    void *scratch = NULL;
    ada_carver c = {0};
    for (int pass = 0; pass < 2; pass++) {
        run.x = ada_carve(&c, run.rows * run.width * (int64_t)sizeof *run.x);
        run.norm2 = ada_carve(&c, blocks * run.rows * (int64_t)sizeof *run.norm2);
        run.top = ada_carve(&c, run.rows * (int64_t)sizeof *run.top);
        run.on_it = ada_carve(&c, run.rows * (int64_t)sizeof *run.on_it);
        run.rung = ada_carve(&c, run.rows);
        if (pass == 0 && !(scratch = ada_scratch_take(c.used)))
            return ada_fail(error, ADA_ERR_MEMORY, "linear: no memory for %lld bytes of scratch",
                            (long long)c.used);
        if (pass == 0) c = (ada_carver){scratch, 0};
    }
    load_rows(&run);
    bool done = true;
    for (run.now = p->first; done && run.now < ADA_LINEAR_RUNGS; run.now++) {
        run.on_it_n = 0;
        for (int64_t row = 0; row < run.rows; row++)
            if (run.rung[row] == run.now) run.on_it[run.on_it_n++] = row;
        if (run.on_it_n == 0) continue;
        run.add = run.now == ADA_LINEAR_INT16 && p->first == ADA_LINEAR_INT8;
        /* A thread is worth waking for as many products as it does while it wakes. */
        const int64_t threads = least(most, 1 + (run.on_it_n * p->N * p->K >> 18));
        done = ada_parallel_for(blocks, (int)least(threads, ADA_MAX_THREADS), block_task, &run, interrupt,
                                context);
        for (int64_t i = 0; done && i < run.on_it_n; i++) {
            const int64_t row = run.on_it[i];
            double predicted;
            if (!keeps(&run, row, &predicted)) run.rung[row]++;
            if (p->told) p->told[2 * row] = run.rung[row], p->told[2 * row + 1] = predicted;
        }
    }
    ada_scratch_give_back(scratch);
    return done ? ADA_OK : ada_fail(error, ADA_INTERRUPTED, "linear: interrupted");
}
