/* A CUDA backend without a GPU, for tests: memory of the CPU, computed by the engine's scalar kernels. Every
 * function that may fail does so on demand, and what is allocated is counted. */
#include "../cuda/ada_cuda.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../csrc/exact.h"
#include "../csrc/execute.h"
#include "../csrc/probe.h"

#ifndef MOCK_ABI
#    define MOCK_ABI ADA_CUDA_ABI
#endif

int mock_fail_after = -1; /* so many calls work, then one fails */
int mock_code = 700;
int mock_live, mock_calls, mock_waits, mock_devices = 2;
uintptr_t mock_stream; /* of the last execution */
double mock_fault = 1; /* by which fp32 outputs of rungs below fp32 are wrong */

struct ada_cuda_call {
    ada_problem problem;
    char *probes; /* [B * G] */
    ada_key_probe *keys;
};

static int fails(const char *call, ada_cuda_failure *failure) {
    mock_calls++;
    if (mock_fail_after < 0 || mock_fail_after-- > 0) return 0;
    failure->code = mock_code;
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
    free(call->probes), free(call->keys);
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

static int execute(ada_cuda_call *call, ada_choice choice, const int64_t *heads, int64_t n,
                   ada_cuda_failure *failure) {
    ada_error error;
    if (fails("execute", failure)) return 1;
    ada_problem p = call->problem;
    mock_stream = p.stream;
    p.precision = choice;
    p.compute_f64 = choice.qk == ADA_RUNG_FP64;
    if (ada_execute(&p, heads, n, NULL, NULL, &error)) return 1;
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

static int probe_keys(ada_cuda_call *call, ada_cuda_keys *keys, int64_t n, ada_cuda_failure *failure) {
    ada_problem p = call->problem;
    double x[256];
    if (fails("probe_keys", failure)) return 1;
    p.attn_mask.data = NULL;
    const int64_t bytes = ada_key_probe_bytes(&p);
    call->probes = aligned_alloc(64, (size_t)(p.B * p.G * bytes));
    call->keys = calloc((size_t)(p.B * p.G), sizeof *call->keys);
    char *scratch = ada_alloc(ada_probe_scratch_bytes(&p));
    for (int64_t i = 0; i < n; i++) {
        ada_cuda_keys *k = &keys[i];
        const int64_t b = k->head / p.G, g = k->head % p.G, shared = p.H / p.G;
        ada_key_probe *own = &call->keys[k->head];
        *own = ada_key_probe_of(&p, call->probes + k->head * bytes);
        ada_probe_keys(&p, ada_kernels_get(), b, g * shared, shared, k->step, own, scratch);
        memcpy(k->mean, own->mean, (size_t)p.D * sizeof(float));
        memcpy(k->variance, own->variance, (size_t)p.D * sizeof(float));
        memcpy(k->value2, own->value2, (size_t)p.S * sizeof(float));
        k->largest2 = own->largest2 * own->count;
        memset(k->value_sum, 0, (size_t)p.E * sizeof(float));
        memset(k->value_most, 0, (size_t)p.E * sizeof(float));
        for (int64_t j = k->first; j < k->end; j++) {
            if ((j / ADA_CUDA_BLOCK - k->first / ADA_CUDA_BLOCK) % k->step) continue;
            load(x, &p.value, b, g, j);
            for (int64_t e = 0; e < p.E; e++) {
                k->value_sum[e] += (float)x[e];
                k->value_most[e] = fmaxf(k->value_most[e], fabsf((float)x[e]));
            }
        }
    }
    ada_free(scratch);
    return 0;
}

static ada_cuda_figures figures_of(const ada_cuda_call *call, int64_t head, int64_t row) {
    const ada_problem *p = &call->problem;
    const ada_key_probe *keys = &call->keys[head / (p->H / p->G)];
    ada_cuda_figures f = {0};
    double x[256];
    load(x, &p->query, head / p->H, head % p->H, row);
    for (int64_t d = 0; d < p->D; d++) {
        f.spread += (float)(x[d] * x[d]) * keys->variance[d];
        f.by_mean += (float)(x[d] * x[d]) * keys->square[d];
        f.norm2 += (float)(x[d] * x[d]);
        f.most = fmaxf(f.most, fabsf((float)x[d]));
    }
    return f;
}

static int row_spreads(ada_cuda_call *call, const ada_cuda_keys *keys, int64_t n, float *spread, float *heavy,
                       ada_cuda_failure *failure) {
    const ada_problem *p = &call->problem;
    const int64_t shared = p->H / p->G;
    double q[256], key[256];
    if (fails("row_spreads", failure)) return 1;
    for (int64_t i = 0; i < n; i++)
        for (int64_t at = keys[i].head * shared * p->T; at < (keys[i].head + 1) * shared * p->T; at++) {
            const int64_t b = at / p->T / p->H, h = at / p->T % p->H, row = at % p->T;
            const ada_span span = ada_visible_span(p, b, row);
            spread[at] = figures_of(call, at / p->T, row).spread;
            heavy[at] = 0;
            load(q, &p->query, b, h, row);
            for (int c = 0; c < keys[i].heavies; c++) {
                double above = 0;
                load(key, &p->key, b, keys[i].head % p->G, keys[i].heavy[c]);
                for (int64_t d = 0; d < p->D; d++) above += q[d] * (key[d] - (double)keys[i].mean[d]);
                const double log_weight = p->scale * above - p->scale * p->scale * (double)spread[at] / 2;
                const double weight = exp(fmin(log_weight, 700)) / (double)(span.end - span.first);
                heavy[at] += keys[i].share[c] * (float)pow(fmin(weight, 1), 2);
            }
        }
    return 0;
}

static int row_figures(ada_cuda_call *call, const ada_cuda_row *rows, int64_t n, ada_cuda_figures *figures,
                       ada_cuda_failure *failure) {
    if (fails("row_figures", failure)) return 1;
    for (int64_t i = 0; i < n; i++) figures[i] = figures_of(call, rows[i].head, rows[i].row);
    return 0;
}

static int row_profiles(ada_cuda_call *call, const ada_cuda_row *rows, int64_t n, ada_cuda_profile *profiles,
                        ada_cuda_failure *failure) {
    const ada_problem *p = &call->problem;
    if (fails("row_profiles", failure)) return 1;
    char *scratch = ada_alloc(ada_probe_scratch_bytes(p));
    for (int64_t i = 0; i < n; i++) {
        const int64_t head = rows[i].head, row = rows[i].row;
        ada_row_profile x;
        ada_profile_rows(p, ada_kernels_get(), head / p->H, head % p->H, &call->keys[head / (p->H / p->G)],
                         &row, 1, &x, scratch);
        profiles[i] = (ada_cuda_profile){.figures = figures_of(call, head, row),
                                         .out2 = x.out2,
                                         .p2d = x.p2d,
                                         .p2d_norm = x.p2d_norm,
                                         .p2d_step = x.p2d_step,
                                         .p2 = x.p2,
                                         .p2_norm = x.p2_norm,
                                         .p2_step = x.p2_step,
                                         .p2v = x.p2v,
                                         .pv = x.pv,
                                         .entropy = x.entropy,
                                         .block_entropy = x.block_entropy,
                                         .reference = x.reference,
                                         .score_square = x.score_std * x.score_std * (double)x.visible,
                                         .visible = x.visible};
    }
    ada_free(scratch);
    return 0;
}

static int exact_rows(ada_cuda_call *call, const ada_cuda_row *rows, int64_t n, double *o, double *lse,
                      ada_cuda_failure *failure) {
    const ada_problem *p = &call->problem;
    if (fails("exact_rows", failure)) return 1;
    char *scratch = ada_alloc(ada_exact_scratch_bytes(p));
    for (int64_t i = 0; i < n; i++) {
        const int64_t row = rows[i].row;
        ada_exact exact;
        ada_exact_rows(p, ada_kernels_get(), true, false, rows[i].head / p->H, rows[i].head % p->H, &row, 1,
                       scratch, &exact);
        memcpy(o + i * p->E, exact.o, (size_t)p->E * sizeof *o);
        lse[i] = exact.lse[0];
    }
    ada_free(scratch);
    return 0;
}

static int output_rows(ada_cuda_call *call, const ada_cuda_row *rows, int64_t n, double *o, double *lse,
                       ada_cuda_failure *failure) {
    const ada_problem *p = &call->problem;
    if (fails("output_rows", failure)) return 1;
    for (int64_t i = 0; i < n; i++) {
        ada_load_rows_f64(ada_kernels_get(), o + i * p->E, p->E, &p->out, rows[i].head / p->H,
                          rows[i].head % p->H, rows[i].row, 1, (int)p->E);
        const int64_t at = rows[i].head * p->T + rows[i].row;
        lse[i] = !p->lse ? 0 : p->query.dtype == ADA_F64 ? ((double *)p->lse)[at] : ((float *)p->lse)[at];
    }
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
                                     .execute = execute,
                                     .probe_keys = probe_keys,
                                     .row_spreads = row_spreads,
                                     .row_figures = row_figures,
                                     .row_profiles = row_profiles,
                                     .exact_rows = exact_rows,
                                     .output_rows = output_rows,
                                     .row_norms = row_norms};

#ifndef MOCK_WITHOUT_SYMBOL
const ada_cuda_table *ada_cuda_plugin(void) { return &table; }
#endif
