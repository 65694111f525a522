/* The functions of backward.h: workspace, rows, operands and the order of launches. */
#include "backward_simt.cuh"

namespace {

static_assert(ada_simt_f64::TILE == ADA_BACK_SLOPE_ROWS && ada_simt_wide::TILE == ADA_BACK_SLOPE_ROWS,
              "slopes");

enum { THREADS = 128, WARPS = THREADS / 32 };

/* Where the parts of the workspace begin. */
struct Layout {
    size_t flags, rows, pairs, slopes, packed[4], bytes;
    bool packs[4]; /* query, key, value, grad_out */
};

bool is_tiled(const ada_cu_gradients *x) { return x->p.rung == ADA_CU_FP16 || x->p.rung == ADA_CU_BFLOAT16; }

const ada_cu_array *operand(const ada_cu_gradients *x, int i) {
    const ada_cu_array *const all[4] = {&x->p.query, &x->p.key, &x->p.value, &x->grad_out};
    return all[i];
}

/* Heads, rows and elements of a row of an operand. */
void sizes_of(const ada_cu_params *p, int i, int64_t size[3]) {
    const bool of_query = i == 0 || i == 3;
    size[0] = of_query ? p->H : p->G, size[1] = of_query ? p->T : p->S, size[2] = i < 2 ? p->D : p->E;
}

bool as_tiles_read(const ada_cu_array *a) {
    const int64_t together = a->stride[0] | a->stride[1] | a->stride[2] | (int64_t)(uintptr_t)a->data;
    return a->stride[3] == 2 && together % 16 == 0;
}

size_t take(size_t *used, int64_t bytes) {
    const size_t at = *used;
    *used += (size_t)ada_divide_up(bytes, 256) * 256;
    return at;
}

int64_t padded_rows(const ada_cu_params *p) { return ada_divide_up(p->T, ADA_BACK_ROWS) * ADA_BACK_ROWS; }

Layout layout_of(const ada_cu_gradients *x) {
    const ada_cu_params *const p = &x->p;
    const int64_t heads = (int64_t)p->B * p->H, rows = heads * padded_rows(p);
    Layout at = {};
    size_t used = 0;
    at.flags = take(&used, 4 * (1 + 3 * (int64_t)p->B * p->G)); /* whether any; norms; each */
    at.rows = take(&used, x->rows ? 0 : rows * (int64_t)sizeof(ada_back_row));
    at.pairs = take(&used, rows * (int64_t)sizeof(ada_back_pair));
    at.slopes = take(&used, heads * ada_divide_up(p->T, ADA_BACK_SLOPE_ROWS) * 8);
    for (int i = 0; i < 4 && is_tiled(x); i++) {
        int64_t size[3];
        sizes_of(p, i, size);
        at.packs[i] = !as_tiles_read(operand(x, i));
        if (at.packs[i])
            at.packed[i] = take(&used, p->B * size[0] * size[1] * ada_divide_up(size[2], 8) * 16);
    }
    at.bytes = used;
    return at;
}

/* A warp for each padded row of queries: delta and lse, and the largest norm of grad_out of each key head;
 * then for each row of values that may be seen: theirs. */
ADA_KERNEL(THREADS, 1) know_rows(ADA_ARGS(ada_back_args) a) {
    const ada_cu_params &p = a.x.p;
    const int lane = ada_thread() % 32, per = p.H / p.G;
    const int64_t row = (int64_t)ada_block() * WARPS + ada_thread() / 32;
    const int64_t queries = (int64_t)p.B * p.H * a.padded, at = row - queries;
    if (at >= (int64_t)p.B * p.G * p.S) return;
    const bool of_value = at >= 0;
    const int head = (int)(of_value ? at / p.S : row / a.padded);
    const int i = (int)(of_value ? at % p.S : row % a.padded);
    const int heads = of_value ? p.G : p.H, b = head / heads, h = head % heads;
    const int group = of_value ? head : b * p.G + h / per;
    if (a.unfit[group] == ADA_BACK_DONE) return;
    const bool there = of_value ? i < ada_reach_of(p, b).keys : i < p.T;
    const ada_cu_array &x = of_value ? p.value : a.x.grad_out, &y = of_value ? p.value : p.out;
    double sum = 0;
    float norm2 = 0;
    for (int e = lane; there && e < p.E; e += 32) {
        const char *const from = (const char *)x.data + b * x.stride[0] + h * x.stride[1] + i * x.stride[2];
        const char *const other = (const char *)y.data + b * y.stride[0] + h * y.stride[1] + i * y.stride[2];
        const double g = ada_element<double>(from + e * x.stride[3], p.dtype);
        sum += g * ada_element<double>(other + e * y.stride[3], p.dtype);
        norm2 += (float)g * (float)g;
    }
    ADA_UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) {
        sum += ada_shuffle_xor(sum, lanes);
        norm2 += ada_shuffle_xor(norm2, lanes);
    }
    if (lane != 0) return;
    if (norm2 < ADA_INF) ada_raise(a.most + 2 * group + of_value, sqrtf(norm2));
    if (of_value) return;
    ada_back_row known = {0, (double)ADA_INF, 0};
    if (there) {
        const ada_cu_array &l = a.x.lse;
        const char *const from = (const char *)l.data + b * l.stride[0] + h * l.stride[1] + i * l.stride[2];
        known.lse =
            (p.dtype == ADA_CU_F64 ? *(const double *)from : (double)*(const float *)from) * ADA_LOG2E;
        known.delta = sum;
        const bool good = (fabs(known.lse) <= ADA_MOST_BIAS || known.lse == (double)-ADA_INF) &&
                          fabs(sum) < 3.4028234663852886e38;
        if (!good || p.rung == ADA_CU_SIMT_F64) ada_make_unfit(a, group);
    }
    a.rows[row] = known;
    a.pairs[row] = {(float)known.lse, (float)known.delta};
}

struct Pack {
    ada_cu_array from;
    int32_t heads, rows, width, chunks; /* chunks of 16 bytes in a packed row */
    int64_t items;
    uint16_t *to;
};

ADA_KERNEL(THREADS, 1) pack_rows(ADA_ARGS(Pack) a) {
    const int64_t i = (int64_t)ada_block() * THREADS + ada_thread(), row = i / a.chunks;
    if (i >= a.items) return;
    const int chunk = (int)(i % a.chunks), head = (int)(row / a.rows);
    const char *const from = (const char *)a.from.data + head / a.heads * a.from.stride[0] +
                             head % a.heads * a.from.stride[1] + row % a.rows * a.from.stride[2];
    ada_vector<uint16_t, 8> x;
    ADA_UNROLL for (int c = 0; c < 8; c++) {
        const int at = 8 * chunk + c;
        x.x[c] = at < a.width ? *(const uint16_t *)(from + at * a.from.stride[3]) : 0;
    }
    *(ada_vector<uint16_t, 8> *)(a.to + 8 * i) = x;
}

cudaError_t pack(const ada_cu_gradients *x, const Layout *at, int i, ada_operand *to, cudaStream_t stream) {
    const ada_cu_array *const from = operand(x, i);
    to->data = (const char *)from->data;
    for (int n = 0; n < 3; n++) to->stride[n] = from->stride[n];
    if (!at->packs[i]) return cudaSuccess;
    int64_t size[3];
    sizes_of(&x->p, i, size);
    Pack a = {*from, (int32_t)size[0], (int32_t)size[1], (int32_t)size[2], 0, 0, nullptr};
    a.chunks = (int32_t)ada_divide_up(size[2], 8), a.items = x->p.B * size[0] * size[1] * a.chunks;
    a.to = (uint16_t *)((char *)x->p.workspace + at->packed[i]);
    to->data = (const char *)a.to;
    to->stride[2] = 16 * a.chunks, to->stride[1] = to->stride[2] * size[1];
    to->stride[0] = to->stride[1] * size[0];
    return ada_launch(pack_rows, ada_divide_up(a.items, THREADS), THREADS, 0, stream, a);
}

/* Gradients of sinks and slopes: a block for each of a head, of all sequences where they share one. */
ADA_KERNEL(ADA_SIMT_THREADS, 1) add_vectors(ADA_ARGS(ada_back_args) a) {
    typedef ada_simt_f64 X;
    const ada_cu_params &p = a.x.p;
    const bool of_slopes = ada_block() % 2;
    const ada_cu_array &to = a.x.results[of_slopes ? ADA_CU_OF_SLOPES : ADA_CU_OF_SINKS];
    const int b0 = ada_block() / 2 / p.H, h = ada_block() / 2 % p.H;
    const bool apart = of_slopes && to.stride[0] != 0;
    if (!to.data || (b0 > 0 && !apart)) return;
    const double sink = ada_sink(p, h) * ADA_LOG2E;
    double sum = 0;
    for (int b = apart ? b0 : 0; b < (apart ? b0 + 1 : p.B); b++) {
        const int64_t head = (int64_t)b * p.H + h;
        if (of_slopes) {
            /* As many partial sums as the kernel that computed the head has tiles. */
            const bool unfit = a.unfit[b * p.G + h / (p.H / p.G)] == ADA_BACK_F64;
            const int tile = unfit || p.D > 128 || p.E > 128 ? ADA_BACK_SLOPE_ROWS : ada_simt_f32::TILE;
            for (int n = ada_thread(); n < (p.T + tile - 1) / tile; n += ADA_SIMT_THREADS)
                sum += a.slopes[head * a.slope_tiles + n];
        } else {
            for (int n = ada_thread(); sink > (double)-ADA_INF && n < p.T; n += ADA_SIMT_THREADS) {
                const ada_back_row row = a.rows[head * a.padded + n];
                sum -= exp2(sink - row.reference - row.lse) * row.delta;
            }
        }
    }
    sum = ada_sum_of_block<X>(sum);
    if (ada_thread() != 0) return;
    const int64_t at = (apart ? (int64_t)b0 * p.H : 0) + h;
    if (p.dtype == ADA_CU_F64)
        ((double *)to.data)[at] = sum;
    else
        ((float *)to.data)[at] = (float)sum;
}

bool is_together(const ada_cu_gradients *x) {
    bool good = true;
    for (int i = ADA_CU_OF_QUERY; i <= ADA_CU_OF_VALUE; i++) {
        const ada_cu_array *const a = &x->results[i];
        const int64_t all = a->stride[0] | a->stride[1] | a->stride[2] | (int64_t)(uintptr_t)a->data;
        good &= !a->data || (a->stride[3] == 2 && all % 4 == 0);
    }
    return good;
}

/* On the rung that was asked for. */
cudaError_t run_rung(const ada_back_args *all, const Layout *at, cudaStream_t stream) {
    const ada_cu_gradients *const x = &all->x;
    ada_back_args a = *all, rest = *all; /* what tiles have no kernel for */
    cudaError_t error = cudaSuccess;
    if (!is_tiled(x)) return ada_back_run_simt(a, false, stream);
    if (a.x.results[ADA_CU_OF_SLOPES].data)
        a.x.results[ADA_CU_OF_QUERY].data = nullptr; /* comes with the slopes */
    else
        rest.x.results[ADA_CU_OF_QUERY].data = nullptr;
    rest.x.results[ADA_CU_OF_KEY].data = rest.x.results[ADA_CU_OF_VALUE].data = nullptr;
    ada_operand *const operands[4] = {&a.q, &a.k, &a.v, &a.go};
    for (int i = 0; i < 4 && !error; i++) error = pack(x, at, i, operands[i], stream);
    if (!error) error = x->p.rung == ADA_CU_FP16 ? ada_back_run_f16(a, stream) : ada_back_run_bf16(a, stream);
    return error ? error : ada_back_run_simt(rest, false, stream);
}

} // namespace

size_t ada_cu_known_bytes(const ada_cu_params *p) {
    return (size_t)((int64_t)p->B * p->H * padded_rows(p)) * sizeof(ada_back_row);
}

size_t ada_cu_backward_workspace(const ada_cu_gradients *x) { return layout_of(x).bytes; }

cudaError_t ada_cu_backward(const ada_cu_gradients *x, cudaStream_t stream) {
    const ada_cu_params *const p = &x->p;
    const Layout at = layout_of(x);
    const int64_t groups = (int64_t)p->B * p->G;
    if (p->D > ADA_CU_MAX_HEAD || p->E > ADA_CU_MAX_HEAD || (is_tiled(x) && p->capability < 80))
        return cudaErrorNotSupported;
    ada_back_args a = {};
    char *const workspace = (char *)p->workspace;
    a.x = *x;
    a.any = (uint32_t *)(workspace + at.flags), a.most = a.any + 1;
    a.unfit = x->unfit ? x->unfit : a.most + 2 * groups;
    a.rows = (ada_back_row *)(x->rows ? x->rows : workspace + at.rows);
    a.pairs = (ada_back_pair *)(workspace + at.pairs);
    a.slopes = (double *)(workspace + at.slopes);
    a.slope_tiles = (int32_t)ada_divide_up(p->T, ADA_BACK_SLOPE_ROWS);
    a.padded = (int32_t)padded_rows(p);
    a.together = is_together(x);
    a.options = p->mask.data || p->alibi_slopes || p->softcap != 0 || p->drop_below;
    cudaError_t error = cudaMemsetAsync(a.any, 0, (size_t)(4 * (1 + 2 * groups)), stream);
    const size_t flags = (size_t)(4 * groups);
    a.own = x->again != nullptr;
    if (!error)
        error = x->again ? cudaMemcpyAsync(a.unfit, x->again, flags, cudaMemcpyDeviceToDevice, stream)
                         : cudaMemsetAsync(a.unfit, 0, flags, stream);
    const int64_t rows = (int64_t)p->B * p->H * a.padded + groups * p->S;
    if (!error) error = ada_launch(know_rows, ada_divide_up(rows, WARPS), THREADS, 0, stream, a);
    if (!error && a.own) error = ada_back_run_rows(a, stream);
    if (!error && p->rung != ADA_CU_SIMT_F64) error = run_rung(&a, &at, stream);
    if (!error && !a.own) error = ada_back_run_rows(a, stream);
    if (!error) error = ada_back_run_simt(a, true, stream);
    const bool vectors = x->results[ADA_CU_OF_SINKS].data || x->results[ADA_CU_OF_SLOPES].data;
    if (!error && vectors)
        error = ada_launch(add_vectors, 2 * (int64_t)p->B * p->H, ADA_SIMT_THREADS, ada_simt_f64::SHARED,
                           stream, a);
    return error;
}
