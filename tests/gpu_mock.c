/* A CUDA backend without a GPU, for tests: memory of the CPU, computed by the engine's scalar kernels. Every
 * function that may fail does so on demand, and what is allocated is counted. */
#include "../cuda/ada_cuda.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../csrc/backward.h"
#include "../csrc/exact.h"
#include "../csrc/execute.h"

#ifndef MOCK_ABI
#    define MOCK_ABI ADA_CUDA_ABI
#endif

int mock_fail_after = -1; /* so many calls work, then one fails */
int mock_code = 700;
const char *mock_failed; /* what failed last */
int mock_live, mock_calls, mock_waits, mock_devices = 2;
uintptr_t mock_stream; /* of the last execution */
double mock_fault = 1; /* by which fp32 outputs of rungs below fp32 are wrong */

struct ada_cuda_call {
    ada_problem problem;
    uint32_t *again;
};

static int fails(const char *call, ada_cuda_failure *failure) {
    mock_calls++;
    if (mock_fail_after < 0 || mock_fail_after-- > 0) return 0;
    failure->code = mock_code, mock_failed = call;
    snprintf(failure->call, sizeof failure->call, "%s", call);
    snprintf(failure->text, sizeof failure->text, "injected");
    return 1;
}

static int count(int *devices, int *driver, int *runtime, ada_cuda_failure *failure) {
    *devices = mock_devices, *driver = 13010, *runtime = 13000;
    return fails("count", failure);
}

static int describe(int device, ada_cuda_device *about, ada_cuda_failure *failure) {
    memset(about, 0, sizeof *about);
    snprintf(about->name, sizeof about->name, "mock %d", device);
    about->major = 9, about->multiprocessors = 1, about->memory_bytes = 1 << 20;
    about->rungs = 1u << ADA_RUNG_FP64 | 1u << ADA_RUNG_FP32 | 1u << ADA_RUNG_FP16 | 1u << ADA_RUNG_BF16;
    return fails("describe", failure);
}

static int allocate(int device, uintptr_t stream, int64_t bytes, void **memory, ada_cuda_failure *failure) {
    (void)device, (void)stream;
    if (fails("allocate", failure)) return 1;
    *memory = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    mock_live++;
    return 0;
}

static int release(int device, uintptr_t stream, void *memory, ada_cuda_failure *failure) {
    (void)device, (void)stream;
    free(memory);
    mock_live--;
    return fails("release", failure);
}

static int copy(int device, uintptr_t stream, void *to, const void *from, int64_t bytes,
                ada_cuda_failure *failure) {
    (void)device, (void)stream;
    if (fails("copy", failure)) return 1;
    memcpy(to, from, (size_t)bytes);
    return 0;
}

static int synchronize(int device, uintptr_t stream, ada_cuda_failure *failure) {
    (void)device, (void)stream;
    mock_waits++;
    return fails("synchronize", failure);
}

static int order(int device, uintptr_t earlier, uintptr_t later, ada_cuda_failure *failure) {
    (void)device, (void)earlier, (void)later;
    return fails("order", failure);
}

static int open_call(const ada_problem *p, ada_cuda_call **made, ada_cuda_failure *failure) {
    *made = NULL;
    if (fails("open", failure)) return 1;
    *made = calloc(1, sizeof **made);
    (*made)->problem = *p;
    (*made)->problem.on_gpu = false;
    mock_live++;
    return 0;
}

static void close_call(ada_cuda_call *call) {
    if (!call) return;
    free(call->again);
    free(call);
    mock_live--;
}

static bool computes(const ada_cuda_call *call, ada_choice c) {
    (void)call;
    const bool known =
        c.qk == ADA_RUNG_FP64 || c.qk == ADA_RUNG_FP32 || c.qk == ADA_RUNG_FP16 || c.qk == ADA_RUNG_BF16;
    return (known && c.qk == c.pv) || (c.qk == ADA_RUNG_INT8 && c.pv == ADA_RUNG_BF16);
}

static int check_mask(ada_cuda_call *call, bool *good, ada_cuda_failure *failure) {
    ada_error error = {ADA_OK, ""};
    if (fails("check_mask", failure)) return 1;
    *good = ada_check_mask(&call->problem, NULL, NULL, &error) == ADA_OK;
    return 0;
}

static int watch(ada_cuda_call *call, ada_cuda_failure *failure) {
    if (fails("watch", failure)) return 1;
    call->again = calloc((size_t)(call->problem.B * call->problem.H), sizeof *call->again);
    return 0;
}

static int watched(ada_cuda_call *call, uint32_t *again, ada_cuda_failure *failure) {
    if (fails("watched", failure)) return 1;
    memcpy(again, call->again, (size_t)(call->problem.B * call->problem.H) * sizeof *again);
    return 0;
}

static int execute(ada_cuda_call *call, ada_choice choice, const int64_t *heads, int64_t n,
                   ada_cuda_failure *failure) {
    ada_error error;
    if (fails("execute", failure)) return 1;
    ada_problem p = call->problem;
    mock_stream = p.stream;
    p.precision = choice;
    p.compute_f64 = choice.qk == ADA_RUNG_FP64;
    p.ran = malloc((size_t)(p.B * p.H) * sizeof *p.ran);
    if (ada_execute(&p, heads, n, NULL, NULL, &error)) return 1;
    for (int64_t i = 0; call->again && i < n; i++)
        call->again[heads ? heads[i] : i] |= p.ran[heads ? heads[i] : i].qk != choice.qk;
    free(p.ran);
    if (choice.qk > ADA_RUNG_FP32 && p.out.dtype == ADA_F32) /* contiguous in these tests */
        for (int64_t i = 0; i < n * p.T * p.E; i++)
            ((float *)p.out.data)[heads ? heads[i / (p.T * p.E)] * p.T * p.E + i % (p.T * p.E) : i] *=
                (float)mock_fault;
    return 0;
}

/* One row of an array in double. */
static void load(double *x, const ada_array *a, int64_t b, int64_t h, int64_t row) {
    ada_load_rows_f64(ada_kernels_get(), x, a->shape[3], a, b, h, row, 1, (int)a->shape[3]);
}

/* The next key from j on that is looked at, or the end. */
static int64_t next_key(const ada_cuda_keys *k, int64_t j) {
    while (j < k->end && (j / ADA_CUDA_BLOCK - k->first / ADA_CUDA_BLOCK) % k->step) j++;
    return j;
}

static int probe(ada_cuda_call *call, ada_cuda_keys *keys, int64_t n, const ada_cuda_row *rows,
                 int64_t n_rows, ada_cuda_figures *figures, ada_cuda_failure *failure) {
    const ada_problem *p = &call->problem;
    double x[256];
    if (fails("probe", failure)) return 1;
    for (int64_t i = 0; i < n; i++) {
        ada_cuda_keys *k = &keys[i];
        const int64_t b = k->head / p->G, g = k->head % p->G;
        double mean[256] = {0}, variance[256] = {0}, count = 0, largest[1024] = {0};
        for (int64_t e = 0; e < p->E; e++) k->value_sum[e] = k->value2[e] = k->value_most[e] = 0;
        for (int64_t j = next_key(k, k->first); j < k->end; j = next_key(k, j + 1), count++) {
            load(x, &p->key, b, g, j);
            for (int64_t d = 0; d < p->D; d++) mean[d] += x[d];
            load(x, &p->value, b, g, j);
            for (int64_t e = 0; e < p->E; e++) {
                k->value_sum[e] += (float)x[e], k->value2[e] += (float)(x[e] * x[e]);
                k->value_most[e] = fmaxf(k->value_most[e], fabsf((float)x[e]));
            }
        }
        for (int64_t d = 0; d < p->D; d++) k->mean[d] = (float)(mean[d] /= count);
        for (int64_t j = next_key(k, k->first); j < k->end; j = next_key(k, j + 1)) {
            load(x, &p->key, b, g, j);
            for (int64_t d = 0; d < p->D; d++) {
                double *most = &largest[j / ADA_CUDA_BLOCK];
                variance[d] += (x[d] - mean[d]) * (x[d] - mean[d]);
                *most = fmax(*most, fabs(x[d] - mean[d]));
            }
        }
        k->largest2 = 0;
        for (int64_t d = 0; d < p->D; d++) k->variance[d] = (float)(variance[d] / count);
        for (int64_t j = next_key(k, k->first); j < k->end; j = next_key(k, j + 1))
            k->largest2 += largest[j / ADA_CUDA_BLOCK] * largest[j / ADA_CUDA_BLOCK];
    }
    for (int64_t i = 0, at = 0; i < n_rows; i++) {
        while (keys[at].head < rows[i].head / (p->H / p->G)) at++;
        figures[i] = (ada_cuda_figures){0, 0, 0, 0};
        load(x, &p->query, rows[i].head / p->H, rows[i].head % p->H, rows[i].row);
        for (int64_t d = 0; d < p->D; d++) {
            const float x2 = (float)(x[d] * x[d]), m = keys[at].mean[d];
            figures[i].spread += x2 * keys[at].variance[d];
            figures[i].by_mean += x2 * m * m;
            figures[i].norm2 += x2;
            figures[i].most = fmaxf(figures[i].most, fabsf((float)x[d]));
        }
    }
    return 0;
}

static int rows(ada_cuda_call *call, const ada_cuda_row *list, int64_t n, bool f64, double *o, double *lse,
                double *out_o, double *out_lse, ada_cuda_failure *failure) {
    const ada_problem *p = &call->problem;
    if (fails("rows", failure)) return 1;
    char *scratch = ada_alloc(ada_exact_scratch_bytes(p));
    for (int64_t i = 0; i < n; i++) {
        const int64_t b = list[i].head / p->H, h = list[i].head % p->H, row = list[i].row;
        const int64_t at = list[i].head * p->T + row;
        ada_exact exact;
        ada_exact_rows(p, ada_kernels_get(), f64, false, b, h, &row, 1, scratch, &exact);
        memcpy(o + i * p->E, exact.o, (size_t)p->E * sizeof *o);
        lse[i] = exact.lse[0];
        if (!out_o) continue;
        load(out_o + i * p->E, &p->out, b, h, row);
        out_lse[i] = !p->lse ? 0 : p->query.dtype == ADA_F64 ? ((double *)p->lse)[at] : ((float *)p->lse)[at];
    }
    ada_free(scratch);
    return 0;
}

static int row_norms(ada_cuda_call *call, float *norms, ada_cuda_failure *failure) {
    const ada_problem *p = &call->problem;
    if (fails("row_norms", failure)) return 1;
    double *row = malloc((size_t)p->E * sizeof *row);
    for (int64_t i = 0; i < p->B * p->H * p->T; i++) {
        double sum = 0;
        ada_load_rows_f64(ada_kernels_get(), row, p->E, &p->out, i / p->T / p->H, i / p->T % p->H, i % p->T,
                          1, (int)p->E);
        for (int64_t e = 0; e < p->E; e++) sum += row[e] * row[e];
        norms[i] = (float)sum;
    }
    free(row);
    return 0;
}

static bool leaves_out(const ada_cuda_call *call, ada_choice choice) {
    (void)call, (void)choice;
    return false;
}

static int gradients(ada_cuda_call *call, const ada_backward_problem *x, ada_choice choice, uint32_t *again,
                     ada_cuda_failure *failure) {
    ada_error error;
    if (fails("gradients", failure)) return 1;
    ada_backward_problem y = *x;
    y.p.on_gpu = false;
    mock_stream = y.p.stream;
    const ada_rung rung = choice.qk == ADA_RUNG_FP64 ? ADA_RUNG_FP64 : ADA_RUNG_AUTO;
    ada_gradient_budget budget = {.asked = {rung, rung}};
    if (again) memset(again, 0, (size_t)(call->problem.B * call->problem.G) * sizeof *again);
    return ada_backward(&y, &budget, NULL, NULL, &error) != ADA_OK;
}

static int merge(int device, uintptr_t stream, const ada_merge_problem *m, ada_cuda_failure *failure) {
    ada_error error;
    (void)device, (void)stream;
    return fails("merge", failure) || ada_merge(m, NULL, NULL, &error);
}

/* Finds keys that are not numbers, so that no head has landmarks. */
static int take_sample(ada_cuda_call *call, const ada_cuda_sampled *heads, int64_t n,
                       const ada_cuda_sampling *what, float *to, ada_cuda_failure *failure) {
    const ada_cuda_sample_at at = ada_cuda_sample_layout(call->problem.D, call->problem.E, what);
    (void)heads;
    for (int64_t i = 0; i < n * at.floats; i++) to[i] = NAN;
    return fails("take_sample", failure);
}

static double plain_operations(const ada_cuda_call *call) {
    (void)call;
    return 1e12;
}

/* It keeps no caches, and attends to no landmarks: these functions are missing. */
static const ada_cuda_table table = {.abi = MOCK_ABI,
                                     .problem_bytes = sizeof(ada_problem),
                                     .version = "mock",
                                     .count = count,
                                     .describe = describe,
                                     .allocate = allocate,
                                     .release = release,
                                     .upload = copy,
                                     .download = copy,
                                     .synchronize = synchronize,
                                     .order = order,
                                     .open = open_call,
                                     .close = close_call,
                                     .computes = computes,
                                     .check_mask = check_mask,
                                     .watch = watch,
                                     .watched = watched,
                                     .execute = execute,
                                     .probe = probe,
                                     .rows = rows,
                                     .row_norms = row_norms,
                                     .leaves_out = leaves_out,
                                     .gradients = gradients,
                                     .merge = merge,
                                     .take_sample = take_sample,
                                     .plain_operations = plain_operations};

#ifndef MOCK_WITHOUT_SYMBOL
const ada_cuda_table *ada_cuda_plugin(void) { return &table; }
#endif
