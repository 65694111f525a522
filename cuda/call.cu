/* Calls: a problem's vectors on the device, its heads, its mask. */
#include "host.h"

namespace ada_cuda {

namespace {

/* Vectors of a problem, one behind another; to == NULL: counts their words. */
struct Packer {
    uint64_t *to;
    char *at_device;
    int64_t used;

    template <class T> const T *add(const ada_array *a, int64_t n0, int64_t n1) {
        if (!a->data) return nullptr;
        const T *here = (const T *)(at_device + 8 * used);
        for (int64_t i = 0; i < n0; i++)
            for (int64_t j = 0; j < n1; j++, used++)
                if (to)
                    memcpy(to + used,
                           (const char *)a->data + i * a->stride[0] + (n1 > 1 ? j * a->stride[1] : 0), 8);
        return here;
    }
};

void pack_vectors(const ada_problem *p, ada_cu_params *c, Packer *packer) {
    c->query_offset = packer->add<int64_t>(&p->query_offset, p->B, 1);
    c->kv_lengths = packer->add<int64_t>(&p->kv_lengths, p->B, 1);
    c->seed = packer->add<uint64_t>(&p->seed, p->B, 1);
    c->sinks = packer->add<double>(&p->sinks, p->H, 1);
    c->alibi_slopes = packer->add<double>(&p->alibi_slopes, p->B, p->H);
    c->query_offset_stride = c->kv_lengths_stride = c->seed_stride = c->sinks_stride = 1;
    c->alibi_stride[0] = p->H, c->alibi_stride[1] = 1;
}

/* The dtypes that both headers number alike. */
static_assert((int)ADA_F32 == ADA_CU_F32 && (int)ADA_F64 == ADA_CU_F64 && (int)ADA_F16 == ADA_CU_F16 &&
                  (int)ADA_BF16 == ADA_CU_BF16 && (int)ADA_BOOL == ADA_CU_BOOL,
              "dtypes");

void fill_params(const ada_problem *p, ada_cu_params *c) {
    c->query = array_of(&p->query), c->key = array_of(&p->key), c->value = array_of(&p->value);
    c->out = array_of(&p->out), c->mask = array_of(&p->attn_mask);
    c->dtype = p->query.dtype, c->mask_dtype = p->attn_mask.dtype;
    c->B = (int32_t)p->B, c->H = (int32_t)p->H, c->G = (int32_t)p->G, c->T = (int32_t)p->T;
    c->S = (int32_t)p->S, c->D = (int32_t)p->D, c->E = (int32_t)p->E;
    c->scale = p->scale, c->softcap = p->has_softcap ? p->softcap : 0;
    c->window_left = p->window_left == ADA_UNBOUNDED ? ADA_CU_UNBOUNDED : p->window_left;
    c->window_right = p->causal ? 0 : p->window_right == ADA_UNBOUNDED ? ADA_CU_UNBOUNDED : p->window_right;
    c->offset = p->causal == ADA_UPPER_LEFT ? 0 : p->S - p->T;
    c->dropout_p = p->dropout_p, c->drop_below = p->drop_below;
    c->one_seed = p->seed.ndim == 0;
    c->lse = p->lse;
}

} // namespace

bool rung_of(const ada_cuda_call *call, ada_choice choice, int32_t *rung) {
    const ada_rung half = call->problem.query.dtype == ADA_F16 ? ADA_RUNG_FP16 : ADA_RUNG_BF16;
    ada_cu_params c = call->params;
    if (choice.qk == ADA_RUNG_INT8 && choice.pv == half)
        c.rung = ADA_CU_INT8;
    else if (choice.qk == ADA_RUNG_INT8 && choice.pv == ADA_RUNG_FP8)
        c.rung = ADA_CU_INT8_FP8;
    else if (choice.qk != choice.pv)
        return false;
    else if (choice.qk == ADA_RUNG_FP8)
        c.rung = ADA_CU_FP8;
    else if (choice.qk == ADA_RUNG_FP64)
        c.rung = ADA_CU_SIMT_F64;
    else if (choice.qk == ADA_RUNG_FP32)
        c.rung = ADA_CU_SPLIT;
    else if (choice.qk == ADA_RUNG_FP16)
        c.rung = ADA_CU_FP16;
    else if (choice.qk == ADA_RUNG_BF16)
        c.rung = ADA_CU_BFLOAT16;
    else
        return false;
    if (c.rung == ADA_CU_SPLIT && !ada_cu_computes(&c)) c.rung = ADA_CU_SIMT_F32;
    *rung = c.rung;
    return ada_cu_computes(&c);
}

bool computes(const ada_cuda_call *call, ada_choice choice) {
    int32_t rung;
    return rung_of(call, choice, &rung);
}

void close_call(ada_cuda_call *call) {
    if (!call) return;
    const Device guard(call->problem.device);
    if (call->vectors) cudaFreeAsync(call->vectors, call->stream);
    if (call->again) cudaFreeAsync(call->again, call->stream);
    if (call->known) cudaFreeAsync(call->known, call->stream);
    free(call);
}

namespace {
int prepare(ada_cuda_call *call, ada_cuda_failure *failure) {
    const ada_problem *p = &call->problem;
    ON_DEVICE(p->device);
    if (chip_of(p->device, &call->params, failure)) return failure->code;
    fill_params(p, &call->params);
    Packer packer = {nullptr, nullptr, 0};
    pack_vectors(p, &call->params, &packer);
    if (!packer.used) return 0;
    TRY(cudaMallocAsync(&call->vectors, (size_t)packer.used * 8, call->stream));
    packer.to = (uint64_t *)malloc((size_t)packer.used * 8);
    if (!packer.to) return failed(cudaErrorMemoryAllocation, "malloc", failure);
    packer.at_device = (char *)call->vectors, packer.used = 0;
    pack_vectors(p, &call->params, &packer);
    const cudaError_t status = send_words(call->vectors, packer.to, packer.used * 8, call->stream);
    free(packer.to);
    TRY(status);
    return 0;
}
} // namespace

int open_call(const ada_problem *p, ada_cuda_call **made, ada_cuda_failure *failure) {
    *made = nullptr;
    ada_cuda_call *call = (ada_cuda_call *)calloc(1, sizeof *call);
    if (!call) return failed(cudaErrorMemoryAllocation, "calloc", failure);
    call->problem = *p;
    call->stream = stream_of(p->stream);
    const int status = prepare(call, failure);
    if (status)
        close_call(call);
    else
        *made = call;
    return status;
}

static size_t watched_bytes(const ada_cuda_call *call) {
    return (size_t)(call->problem.B * call->problem.H) * sizeof(uint32_t);
}

int watch(ada_cuda_call *call, ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    TRY(cudaMallocAsync(&call->again, watched_bytes(call), call->stream));
    call->params.raised = (uint32_t *)call->again;
    TRY(cudaMemsetAsync(call->again, 0, watched_bytes(call), call->stream));
    return 0;
}

int watched(ada_cuda_call *call, uint32_t *again, ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    return fetch(call->stream, again, call->again, watched_bytes(call), failure);
}

int send_heads(const ada_cuda_call *call, const int64_t *heads, int64_t n, Memory *list, ada_cu_params *c,
               ada_cuda_failure *failure) {
    c->n_heads = (int32_t)n;
    if (!heads || n == call->problem.B * call->problem.H) return 0;
    const size_t bytes = ((size_t)n * sizeof(int32_t) + 7) / 8 * 8;
    TRY(list->allocate(bytes));
    int32_t *narrow = (int32_t *)calloc(1, bytes);
    if (!narrow) return failed(cudaErrorMemoryAllocation, "calloc", failure);
    for (int64_t i = 0; i < n; i++) narrow[i] = (int32_t)heads[i];
    const cudaError_t status = send_words(list->data, narrow, (int64_t)bytes, call->stream);
    free(narrow);
    TRY(status);
    c->heads = (const int32_t *)list->data;
    return 0;
}

int attend_here(const ada_cuda_call *call, ada_cu_params *c, ada_cuda_failure *failure) {
    Memory workspace(call->stream);
    TRY(workspace.allocate(ada_cu_workspace(c)));
    c->workspace = workspace.data;
    TRY(ada_cu_attend(c, call->stream));
    return 0;
}

int execute(ada_cuda_call *call, ada_choice choice, const int64_t *heads, int64_t n,
            ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    ada_cu_params c = call->params;
    if (!rung_of(call, choice, &c.rung)) return failed(cudaErrorNotSupported, "execute", failure);
    Memory list(call->stream);
    if (send_heads(call, heads, n, &list, &c, failure)) return failure->code;
    return attend_here(call, &c, failure);
}

/* ---- masks ---- */

namespace {

struct Search {
    enum { THREADS = 256 };
    ada_cu_array mask;
    int64_t n[4], total;
    int dtype;
    uint32_t *bad;
};

ADA_KERNEL(Search::THREADS, 1) find_bad(ADA_ARGS(Search) a) {
    for (int64_t i = ada_block() * (int64_t)Search::THREADS + ada_thread(); i < a.total;
         i += (int64_t)ada_blocks() * Search::THREADS) {
        int64_t rest = i, at = 0;
        for (int d = 3; d >= 0; d--) {
            at += rest % a.n[d] * a.mask.stride[d];
            rest /= a.n[d];
        }
        if (!(ada_element<double>((const char *)a.mask.data + at, a.dtype) < (double)ADA_INF)) *a.bad = 1;
    }
}

} // namespace

int check_mask(ada_cuda_call *call, bool *good, ada_cuda_failure *failure) {
    const ada_array *mask = &call->problem.attn_mask;
    *good = true;
    if (!mask->data || mask->dtype == ADA_BOOL) return 0;
    ON_DEVICE(call->problem.device);
    Search search = {call->params.mask, {0, 0, 0, 0}, 1, call->params.mask_dtype, nullptr};
    for (int d = 0; d < 4; d++) search.total *= search.n[d] = mask->stride[d] ? mask->shape[d] : 1;
    Memory flag(call->stream);
    uint32_t bad;
    TRY(flag.allocate(sizeof bad));
    TRY(cudaMemsetAsync(flag.data, 0, sizeof bad, call->stream));
    search.bad = (uint32_t *)flag.data;
    const int64_t blocks = (search.total + 4 * Search::THREADS - 1) / (4 * Search::THREADS);
    TRY(ada_launch(find_bad, blocks < 4096 ? blocks : 4096, Search::THREADS, 0, call->stream, search));
    TRY(cudaMemcpyAsync(&bad, flag.data, sizeof bad, cudaMemcpyDeviceToHost, call->stream));
    TRY(cudaStreamSynchronize(call->stream));
    *good = !bad;
    return 0;
}

} // namespace ada_cuda
