/* What budgets ask for: figures of keys and queries, exact rows and those of the output. */
#include "host.h"
#include "k0.cuh"
#include "probe.h"

namespace ada_cuda {

namespace {

ada_probe_head probe_head(const ada_cuda_keys *keys) {
    ada_probe_head head = {keys->head, keys->first, keys->end, keys->step, 0, 0};
    for (int block = head.first / ADA_CUDA_BLOCK; block * ADA_CUDA_BLOCK < head.end; block += head.step) {
        const int low = block * ADA_CUDA_BLOCK, high = low + ADA_CUDA_BLOCK;
        head.count += (float)((high < head.end ? high : head.end) - (low > head.first ? low : head.first));
    }
    return head;
}

/* What the kernels are told, in one piece: heads, rows, the head of each row. */
struct Told {
    char *memory;
    size_t rows_at, key_head_at, bytes;
    ~Told() { free(memory); }
    int fill(const ada_cuda_keys *keys, int64_t n, const ada_cuda_row *rows, int64_t n_rows, int per_head) {
        rows_at = (size_t)n * sizeof(ada_probe_head);
        key_head_at = rows_at + (size_t)n_rows * sizeof *rows;
        bytes = (key_head_at + (size_t)n_rows * sizeof(int32_t) + 7) / 8 * 8;
        memory = (char *)calloc(1, bytes);
        if (!memory) return -1;
        for (int64_t i = 0; i < n; i++) ((ada_probe_head *)memory)[i] = probe_head(&keys[i]);
        memcpy(memory + rows_at, rows, (size_t)n_rows * sizeof *rows);
        for (int64_t i = 0, at = 0; i < n_rows; i++) { /* both are ascending */
            while (keys[at].head < rows[i].head / per_head) at++;
            ((int32_t *)(memory + key_head_at))[i] = (int32_t)at;
        }
        return 0;
    }
};

} // namespace

int probe(ada_cuda_call *call, ada_cuda_keys *keys, int64_t n, const ada_cuda_row *rows, int64_t n_rows,
          ada_cuda_figures *figures, ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    const size_t D = (size_t)call->problem.D, E = (size_t)call->problem.E, heads = (size_t)n;
    Memory told(call->stream), partials(call->stream), found(call->stream);
    Told tell = {};
    if (tell.fill(keys, n, rows, n_rows, call->params.H / call->params.G))
        return failed(cudaErrorMemoryAllocation, "calloc", failure);
    ada_probe_args a = {};
    a.p = call->params;
    for (int64_t i = 0; i < n; i++) {
        const int32_t first = keys[i].first / ADA_CUDA_BLOCK, end = keys[i].end;
        const int32_t blocks = (end + ADA_CUDA_BLOCK - 1) / ADA_CUDA_BLOCK - first;
        const int32_t looked = blocks > 0 ? (blocks + keys[i].step - 1) / keys[i].step : 1;
        a.looked = looked > a.looked ? looked : a.looked;
    }
    /* Of each head: means, variances [D], sums [3][E], one more; then figures. */
    const size_t of_head = 2 * D + 3 * E + 1, numbers = heads * of_head + (size_t)n_rows * 4;
    TRY(told.allocate(tell.bytes));
    TRY(partials.allocate(heads * (size_t)a.looked * (D + 3 * E) * sizeof(float)));
    TRY(found.allocate(numbers * sizeof(float)));
    TRY(send_words(told.data, tell.memory, (int64_t)tell.bytes, call->stream));
    a.heads = (const ada_probe_head *)told.data;
    a.pairs = (const int32_t *)((char *)told.data + tell.rows_at);
    a.key_head = (const int32_t *)((char *)told.data + tell.key_head_at);
    a.rows = n_rows, a.partials = (float *)partials.data;
    a.means = (float *)found.data, a.variances = a.means + heads * D;
    a.value_sums = a.variances + heads * D, a.largest2 = a.value_sums + heads * 3 * E;
    a.figures = (ada_cuda_figures *)(a.largest2 + heads);
    TRY(ada_probe_run(a, (int)n, call->stream));
    float *here = (float *)malloc(numbers * sizeof *here);
    if (!here) return failed(cudaErrorMemoryAllocation, "malloc", failure);
    if (fetch(call->stream, here, found.data, numbers * sizeof *here, failure)) {
        free(here);
        return failure->code;
    }
    const float *variances = here + heads * D, *sums = variances + heads * D, *rest = sums + heads * 3 * E;
    for (size_t i = 0; i < heads; i++) {
        memcpy(keys[i].mean, here + i * D, D * sizeof *here);
        memcpy(keys[i].variance, variances + i * D, D * sizeof *here);
        memcpy(keys[i].value_sum, sums + 3 * i * E, E * sizeof *here);
        memcpy(keys[i].value2, sums + (3 * i + 1) * E, E * sizeof *here);
        memcpy(keys[i].value_most, sums + (3 * i + 2) * E, E * sizeof *here);
        keys[i].largest2 = rest[i];
    }
    memcpy(figures, rest + heads, (size_t)n_rows * sizeof *figures);
    free(here);
    return 0;
}

/* ---- rows ---- */

namespace {

/* Rows of the output, or of all its rows the norms. */
struct Outputs {
    enum { THREADS = 128, WARPS = THREADS / 32 };
    ada_cu_params p;
    const int32_t *pairs; /* [rows][2] */
    double *o, *lse;      /* [rows][E], [rows] */
    float *norms;         /* [B * H][T] */
    int32_t fours;        /* out can be read four elements at a time */
};

ADA_DEVICE const char *output_row(const ada_cu_params &p, int head, int64_t row) {
    return ada_row_of(p.out, head / p.H, head % p.H, row);
}

ADA_KERNEL(Outputs::THREADS, 1) gather_rows(ADA_ARGS(Outputs) a) {
    const ada_cu_params &p = a.p;
    const int head = a.pairs[2 * ada_block()], row = a.pairs[2 * ada_block() + 1];
    const char *from = output_row(p, head, row);
    for (int e = ada_thread(); e < p.E; e += Outputs::THREADS)
        a.o[ada_block() * (int64_t)p.E + e] = ada_element<double>(from + e * p.out.stride[3], p.dtype);
    if (ada_thread()) return;
    const int64_t at = (int64_t)head * p.T + row;
    double lse = 0;
    if (p.lse) lse = p.dtype == ADA_CU_F64 ? ((const double *)p.lse)[at] : (double)((const float *)p.lse)[at];
    a.lse[ada_block()] = lse;
}

/* A warp per row. */
ADA_KERNEL(Outputs::THREADS, 1) square_rows(ADA_ARGS(Outputs) a) {
    const ada_cu_params &p = a.p;
    const int64_t row = ada_block() * (int64_t)Outputs::WARPS + ada_thread() / 32;
    if (row >= (int64_t)p.B * p.H * p.T) return;
    const char *from = output_row(p, (int)(row / p.T), row % p.T);
    double sum = 0;
    for (int e = 4 * (ada_thread() % 32); e < p.E; e += 128) {
        double x[4];
        ada_load_four(x, from, p.out.stride[3], p.dtype, e, p.E, a.fours);
        for (int i = 0; i < 4; i++) sum += x[i] * x[i];
    }
    for (int lanes = 16; lanes; lanes /= 2) sum += ada_shuffle_xor(sum, lanes);
    if (ada_thread() % 32 == 0) a.norms[row] = (float)sum;
}

/* Rows of a head, few at a time; returns how many groups. */
int group_rows(const ada_cuda_row *rows, int64_t n, ada_row_group *groups) {
    int made = 0;
    for (int64_t i = 0; i < n; i++) {
        ada_row_group *last = made ? &groups[made - 1] : nullptr;
        if (last && last->head == rows[i].head && last->count < ADA_ROWS_TOGETHER)
            last->count++;
        else
            groups[made++] = {rows[i].head, (int32_t)i, 1, 0};
    }
    return made;
}

} // namespace

int compute_rows(ada_cuda_call *call, const ada_cuda_row *rows, int64_t n, bool f64, double *o, double *lse,
                 double *out_o, double *out_lse, ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    const size_t E = (size_t)call->problem.E, count = (size_t)n, of_rows = count * (E + 1) * sizeof(double);
    Memory told(call->stream), partials(call->stream), found(call->stream);
    const size_t pairs_bytes = count * sizeof *rows;
    char *tell = (char *)calloc(count, sizeof *rows + sizeof(ada_row_group));
    if (!tell) return failed(cudaErrorMemoryAllocation, "calloc", failure);
    memcpy(tell, rows, pairs_bytes);
    ada_rows_args a = {};
    a.p = call->params;
    a.rows = n, a.n_groups = group_rows(rows, n, (ada_row_group *)(tell + pairs_bytes));
    a.splits = ada_rows_splits(&a.p), a.fours = ada_in_fours(&a.p.key, a.p.dtype);
    const size_t bytes = pairs_bytes + (size_t)a.n_groups * sizeof(ada_row_group);
    cudaError_t status = told.allocate(bytes);
    if (status == cudaSuccess) status = send_words(told.data, tell, (int64_t)bytes, call->stream);
    free(tell);
    TRY(status);
    TRY(partials.allocate(ada_rows_bytes(&a.p, a.n_groups)));
    TRY(found.allocate(2 * of_rows));
    a.pairs = (const int32_t *)told.data, a.groups = (const ada_row_group *)((char *)told.data + pairs_bytes);
    a.partials = (double *)partials.data;
    a.lse = (double *)found.data, a.o = a.lse + count;
    TRY(ada_rows_run(a, f64, call->stream));
    const size_t wanted = out_o ? 2 * of_rows : of_rows;
    Outputs outputs = {call->params, a.pairs, a.o + count * E + count, a.o + count * E, nullptr, 0};
    if (out_o) TRY(ada_launch(gather_rows, n, Outputs::THREADS, 0, call->stream, outputs));
    double *here = (double *)malloc(wanted);
    if (!here) return failed(cudaErrorMemoryAllocation, "malloc", failure);
    const int fetched = fetch(call->stream, here, found.data, wanted, failure);
    if (!fetched) memcpy(lse, here, count * sizeof *lse), memcpy(o, here + count, count * E * sizeof *o);
    if (!fetched && out_o) {
        const double *outs = here + count * (E + 1);
        memcpy(out_lse, outs, count * sizeof *lse), memcpy(out_o, outs + count, count * E * sizeof *o);
    }
    free(here);
    return fetched;
}

int row_norms(ada_cuda_call *call, float *norms, ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    const int64_t rows = call->problem.B * call->problem.H * call->problem.T;
    Memory found(call->stream);
    TRY(found.allocate((size_t)rows * sizeof *norms));
    Outputs a = {call->params, nullptr, nullptr, nullptr, (float *)found.data, 0};
    a.fours = ada_in_fours(&a.p.out, a.p.dtype);
    TRY(ada_launch(square_rows, (rows + Outputs::WARPS - 1) / Outputs::WARPS, Outputs::THREADS, 0,
                   call->stream, a));
    return fetch(call->stream, norms, found.data, (size_t)rows * sizeof *norms, failure);
}

} // namespace ada_cuda
