/* The functions of params.h: workspace, operands in the layout of K1, and the order of launches. */
#include "launch.h"
#include "pack.cuh"

/* Where the parts of the workspace begin. */
typedef struct {
    size_t again, q, k, v, units, partials, bytes;
    bool packs_q, packs_k, packs_v;
    int splits, pack;
} layout;

static int64_t head_count(const ada_cu_params *p) { return p->heads ? p->n_heads : (int64_t)p->B * p->H; }
static bool is_pairs(const ada_cu_params *p) {
    return p->rung == ADA_CU_SPLIT && p->D <= 128 && p->E <= 128 && p->capability >= 80;
}
/* Queries and keys are bytes. */
static bool is_bytes(const ada_cu_params *p) { return p->rung == ADA_CU_INT8 || ada_is_fp8(p); }
/* By K1; where pairs are too wide for it, K0 is as accurate. */
static bool is_tiled(const ada_cu_params *p) {
    return p->rung == ADA_CU_FP16 || p->rung == ADA_CU_BFLOAT16 || is_pairs(p) || is_bytes(p);
}
/* Of halves. */
static int format_of(const ada_cu_params *p) {
    return p->rung == ADA_CU_FP16 || (is_bytes(p) && p->dtype == ADA_CU_F16) ? ADA_CU_F16 : ADA_CU_BF16;
}

static bool as_k1_reads(const ada_cu_params *p, const ada_cu_array *a) {
    const int64_t together = a->stride[0] | a->stride[1] | a->stride[2] | (int64_t)(uintptr_t)a->data;
    return !is_pairs(p) && p->dtype == format_of(p) && a->stride[3] == 2 && together % 16 == 0;
}

/* Keys of a split: by their number alone, so that a head's bits do not depend on how many there are. */
static int keys_of_split(const ada_cu_params *p) {
    const int64_t least = p->S > 8192 ? 512 : 256, each = ada_divide_up(ada_divide_up(p->S, 1024), 64) * 64;
    return (int)(each > least ? each : least);
}

static size_t take(size_t *used, int64_t bytes) {
    const size_t at = *used;
    *used += (size_t)ada_divide_up(bytes, 256) * 256;
    return at;
}

static int64_t units_of(int64_t B, int64_t heads, int64_t rows) {
    return B * heads * ada_divide_up(rows, ADA_UNIT_ROWS);
}

static layout layout_of(const ada_cu_params *p) {
    layout at = {};
    size_t used = 0;
    at.pack = 1;
    if (p->rung == ADA_CU_SIMT_F64) return at;
    const int64_t rows = (int64_t)p->B * p->H * p->T;
    at.again = take(&used, 4 * (ADA_AGAIN_LIST + rows));
    if (is_tiled(p)) {
        const int64_t d = ada_divide_up(p->D, 8) * 16, e = ada_divide_up(p->E, 8) * 16,
                      keys = (int64_t)p->B * p->G * p->S;
        at.packs_q = is_bytes(p) || !as_k1_reads(p, &p->query);
        at.packs_k = is_bytes(p) || !as_k1_reads(p, &p->key);
        at.packs_v = ada_is_fp8(p) || !as_k1_reads(p, &p->value);
        const int parts = is_pairs(p) ? 2 : 1; /* bytes take less */
        if (at.packs_q) at.q = take(&used, parts * rows * d);
        if (at.packs_k) at.k = take(&used, parts * keys * d);
        if (ada_is_fp8(p))
            at.v = take(&used, units_of(p->B, p->G, p->S) * ADA_UNIT_ROWS * p->E);
        else if (at.packs_v)
            at.v = take(&used, parts * keys * e);
        if (is_pairs(p))
            at.units = take(&used, 4 * (units_of(p->B, p->H, p->T) + 2 * units_of(p->B, p->G, p->S)));
        if (is_bytes(p))
            at.units =
                take(&used, 4 * (2 * rows + 2 * units_of(p->B, p->G, p->S) + (int64_t)p->B * p->G * p->D));
        if (ada_few_queries(p)) {
            at.pack = p->heads ? 1 : p->H / p->G;
            at.splits = (int)ada_divide_up(p->S, keys_of_split(p));
            at.partials = take(&used, rows * at.splits * (p->E + 3) * 4);
        }
    }
    at.bytes = used;
    return at;
}

size_t ada_cu_workspace(const ada_cu_params *p) {
    return ada_reads_floats(p) ? ada_few_workspace(p) : layout_of(p).bytes;
}

static ada_k0_args k0_args(const ada_cu_params *p) {
    ada_k0_args a = {};
    a.p = *p;
    a.rows = head_count(p) * p->T;
    a.fours = ada_in_fours(&p->query, p->dtype) && ada_in_fours(&p->key, p->dtype) &&
              ada_in_fours(&p->value, p->dtype);
    return a;
}

static int64_t k0_blocks(const ada_cu_params *p, int64_t rows) {
    const int64_t most =
        4 * (int64_t)p->multiprocessors; /* that are there at a time: each takes row after row */
    return rows < most ? rows : most;
}

/* The rows on the list, in double. */
static cudaError_t run_again(const ada_cu_params *p, const int32_t *again, cudaStream_t stream) {
    ada_k0_args a = k0_args(p);
    a.list = again;
    return ada_k0_run(a, true, k0_blocks(p, a.rows), stream);
}

/* Rows as K1 reads them: where they lie, or packed into the workspace. */
static cudaError_t pack(const ada_cu_params *p, const ada_cu_array *from, int heads, int rows, int width,
                        bool needed, size_t at, float *units, ada_operand *to, cudaStream_t stream) {
    to->data = (const char *)from->data;
    for (int i = 0; i < 3; i++) to->stride[i] = from->stride[i];
    if (!needed) return cudaSuccess;
    ada_pack_args a = {};
    a.from = *from, a.dtype = p->dtype, a.heads = heads, a.rows = rows, a.width = width;
    a.chunks = (int)ada_divide_up(width, 8);
    a.bf16 = format_of(p) == ADA_CU_BF16;
    a.list = p->heads, a.per = from == &p->query ? 1 : p->H / p->G;
    const int64_t wanted = p->heads ? p->n_heads : (int64_t)p->B * heads;
    a.items = wanted * rows * a.chunks;
    a.to = (uint16_t *)((char *)p->workspace + at);
    to->data = (const char *)a.to;
    to->stride[2] = 16 * a.chunks, to->stride[1] = to->stride[2] * rows,
    to->stride[0] = to->stride[1] * heads;
    if (!is_pairs(p))
        return ada_launch(ada_pack_rows, ada_divide_up(a.items, ADA_PACK_THREADS), ADA_PACK_THREADS, 0,
                          stream, a);
    a.part = 8 * (int64_t)p->B * heads * rows * a.chunks, to->part = 2 * a.part;
    to->units = a.units = units;
    if (from != &p->query) a.lengths = p->kv_lengths, a.lengths_stride = p->kv_lengths_stride;
    return ada_launch(ada_split_rows, wanted * ada_divide_up(rows, ADA_UNIT_ROWS), ADA_PACK_THREADS,
                      ADA_PACK_THREADS / 32 * 4, stream, a);
}

static bool mask_in_pairs(const ada_cu_params *p) {
    const ada_cu_array *mask = &p->mask;
    const int64_t size = p->mask_dtype == ADA_CU_BOOL ? 1 : 4;
    const int64_t together =
        mask->stride[0] | mask->stride[1] | mask->stride[2] | (int64_t)(uintptr_t)mask->data;
    return mask->stride[3] == size && p->S % 2 == 0 && together % (2 * size) == 0;
}

/* Queries and keys as bytes, values as e4m3 where the rung has them so. */
static cudaError_t pack_bytes(const ada_cu_params *p, const layout *at, ada_k1_args *k1,
                              cudaStream_t stream) {
    const int64_t rows = (int64_t)p->B * p->H * p->T, tiles = units_of(p->B, p->G, p->S);
    const int64_t wanted = p->heads ? p->n_heads : (int64_t)p->B * p->G; /* of keys */
    float *const q_units = (float *)((char *)p->workspace + at->units), *const k_units = q_units + 2 * rows;
    const int warps = ADA_PACK_THREADS / 32;
    ada_pack_args a = {};
    a.from = p->key, a.dtype = p->dtype, a.heads = p->G, a.rows = p->S, a.width = p->D, a.G = p->G;
    a.chunks = (int)ada_divide_up(p->D, 16);
    a.lengths = p->kv_lengths, a.lengths_stride = p->kv_lengths_stride;
    a.list = p->heads, a.per = p->H / p->G;
    a.to = (uint16_t *)((char *)p->workspace + at->k);
    a.e4m3 = p->rung == ADA_CU_FP8;
    a.units = k_units, a.mean = k_units + 2 * tiles;
    k1->k.data = (const char *)a.to, k1->k.units = k_units;
    k1->k.stride[2] = 16 * a.chunks, k1->k.stride[1] = k1->k.stride[2] * p->S;
    k1->k.stride[0] = k1->k.stride[1] * p->G;
    cudaError_t error = ada_launch(ada_mean_of_keys, wanted, ADA_PACK_THREADS, 0, stream, a);
    if (!error)
        error = ada_launch(ada_bytes_of_keys, wanted * ada_divide_up(p->S, ADA_UNIT_ROWS), ADA_PACK_THREADS,
                           4 * warps, stream, a);
    a.from = p->query, a.heads = p->H, a.rows = p->T, a.per = 1;
    a.items = head_count(p) * p->T;
    a.to = (uint16_t *)((char *)p->workspace + at->q), a.units = q_units;
    k1->q.data = (const char *)a.to, k1->q.units = q_units;
    k1->q.stride[2] = 16 * a.chunks, k1->q.stride[1] = k1->q.stride[2] * p->T;
    k1->q.stride[0] = k1->q.stride[1] * p->H;
    if (!error)
        error =
            ada_launch(ada_bytes_of_queries, ada_divide_up(a.items, warps), ADA_PACK_THREADS, 0, stream, a);
    if (error || !ada_is_fp8(p)) return error;
    a.from = p->value, a.heads = p->G, a.rows = p->S, a.width = p->E, a.per = p->H / p->G;
    a.to = (uint16_t *)((char *)p->workspace + at->v), a.units = k_units + tiles;
    k1->v.data = (const char *)a.to, k1->v.units = a.units;
    k1->v.stride[1] = units_of(1, 1, p->S) * ADA_UNIT_ROWS * p->E, k1->v.stride[0] = k1->v.stride[1] * p->G;
    return ada_launch(ada_columns_of_values, wanted * units_of(1, 1, p->S), ADA_PACK_THREADS,
                      ADA_UNIT_ROWS * p->E < 4 * warps ? 4 * warps : ADA_UNIT_ROWS * p->E, stream, a);
}

static bool in_pairs(const ada_cu_params *p) {
    const ada_cu_array *out = &p->out;
    const int64_t size = p->dtype == ADA_CU_F32 ? 4 : 2;
    const int64_t together = out->stride[0] | out->stride[1] | out->stride[2] | (int64_t)(uintptr_t)out->data;
    return p->dtype != ADA_CU_F64 && out->stride[3] == size && together % (2 * size) == 0;
}

static cudaError_t run_tiled(const ada_cu_params *p, const layout *at, int32_t *again, cudaStream_t stream) {
    ada_k1_args a = {};
    a.p = *p;
    a.again = again;
    a.rows = (int64_t)p->B * p->H * p->T;
    a.splits = at->splits, a.pack = at->pack;
    a.partials = (float *)((char *)p->workspace + at->partials);
    a.pairs = in_pairs(p);
    a.mask_pairs = mask_in_pairs(p);
    a.split_keys = keys_of_split(p);
    a.options = p->mask.data || p->alibi_slopes || p->softcap != 0 || p->drop_below;
    a.octaves = (float)(p->scale * ADA_LOG2E);
    a.lazy = ADA_LAZY_OCTAVES / a.octaves;
    float *const q_units = (float *)((char *)p->workspace + at->units);
    float *const k_units = q_units + units_of(p->B, p->H, p->T), *const v_units =
                                                                     k_units + units_of(p->B, p->G, p->S);
    cudaError_t error = cudaSuccess;
    if (is_bytes(p)) {
        error = pack_bytes(p, at, &a, stream);
    } else {
        error = pack(p, &p->query, p->H, p->T, p->D, at->packs_q, at->q, q_units, &a.q, stream);
        if (!error) error = pack(p, &p->key, p->G, p->S, p->D, at->packs_k, at->k, k_units, &a.k, stream);
    }
    if (!error && !ada_is_fp8(p))
        error = pack(p, &p->value, p->G, p->S, p->E, at->packs_v, at->v, v_units, &a.v, stream);
    if (!error)
        error = p->lists                 ? ada_k1_run_listed(a, stream)
                : ada_is_fp8(p)          ? ada_k1_run_fp8(a, stream)
                : is_bytes(p)            ? ada_k1_run_bytes(a, stream)
                : is_pairs(p)            ? ada_k1_run_split(a, stream)
                : p->rung == ADA_CU_FP16 ? ada_k1_run_f16(a, stream)
                                         : ada_k1_run_bf16(a, stream);
    if (error || !a.splits) return error;
    ada_combine_args combine = {};
    combine.k0 = k0_args(p);
    combine.partials = a.partials, combine.rows = a.rows, combine.splits = a.splits;
    return ada_combine_run(combine, combine.k0.rows, stream);
}

int ada_cu_has_fp8(int32_t code) { return code >= 89; }

int ada_cu_computes(const ada_cu_params *p) {
    if (p->D > ADA_CU_MAX_HEAD || p->E > ADA_CU_MAX_HEAD) return 0;
    if (ada_is_fp8(p) && !ada_cu_has_fp8(p->code)) return 0;
    return !is_tiled(p) || (p->capability >= 80 && ada_k1_width(p));
}

cudaError_t ada_cu_attend(const ada_cu_params *p, cudaStream_t stream) {
    if (!ada_cu_computes(p)) return cudaErrorNotSupported;
    if (p->heads && p->n_heads == 0) return cudaSuccess;
    if (ada_reads_floats(p)) return ada_few_attend(p, k0_args(p), stream);
    ada_k0_args simt = k0_args(p);
    if (p->rung == ADA_CU_SIMT_F64) return ada_k0_run(simt, true, simt.rows, stream);
    const layout at = layout_of(p);
    int32_t *const again = (int32_t *)((char *)p->workspace + at.again);
    if (at.splits) return run_tiled(p, &at, again, stream);
    cudaError_t error = cudaMemsetAsync(again, 0, 4, stream);
    if (error) return error;
    simt.again = again;
    error = is_tiled(p) ? run_tiled(p, &at, again, stream) : ada_k0_run(simt, false, simt.rows, stream);
    return error ? error : run_again(p, again, stream);
}

cudaError_t ada_cu_exact_rows(const ada_cu_params *p, const int32_t *pairs, int32_t n, double *o, double *lse,
                              cudaStream_t stream) {
    if (n == 0) return cudaSuccess;
    ada_k0_args a = k0_args(p);
    a.pairs = pairs, a.rows = n, a.o = o, a.lse = lse;
    return ada_k0_run(a, true, k0_blocks(p, n), stream);
}

cudaError_t ada_cu_attend_rows(const ada_cu_params *p, const int32_t *list, int32_t n, int32_t *again,
                               cudaStream_t stream) {
    ada_k0_args a = k0_args(p);
    a.list = list, a.again = again;
    cudaError_t error = cudaMemsetAsync(again, 0, 4, stream);
    if (!error) error = ada_k0_run(a, false, k0_blocks(p, n), stream);
    return error ? error : run_again(p, again, stream);
}
