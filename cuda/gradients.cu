/* Gradients as the engine asks for them. */
#include "host.h"

#include "backward.h"

namespace ada_cuda {

static_assert((int)ADA_OF_QUERY == ADA_CU_OF_QUERY && (int)ADA_OF_SLOPES == ADA_CU_OF_SLOPES &&
                  (int)ADA_GRADIENTS == ADA_CU_GRADIENTS && ADA_CUDA_TRUTHS == ADA_CU_TRUTHS,
              "gradients");

namespace {

/* What kernels are told of a call; all that it knows of rows stays with the call. */
ada_cu_gradients arguments(const ada_cuda_call *call, const ada_backward_problem *x) {
    ada_cu_gradients c = {};
    c.p = call->params;
    c.p.out = array_of(&x->out), c.grad_out = array_of(&x->grad_out), c.lse = array_of(&x->lse);
    for (int i = 0; i < ADA_GRADIENTS; i++)
        if (x->needs[i]) c.results[i] = array_of(&x->results[i]);
    c.results[ADA_OF_SLOPES].stride[0] = x->results[ADA_OF_SLOPES].ndim == 2 ? call->problem.H : 0;
    c.rows = call->known;
    return c;
}

int run(ada_cuda_call *call, ada_cu_gradients *c, ada_choice choice, uint32_t *again,
        ada_cuda_failure *failure) {
    const size_t heads = (size_t)(call->problem.B * call->problem.G) * sizeof(uint32_t);
    c->p.rung = choice.qk == ADA_RUNG_FP64   ? ADA_CU_SIMT_F64
                : choice.qk == ADA_RUNG_FP16 ? ADA_CU_FP16
                : choice.qk == ADA_RUNG_BF16 ? ADA_CU_BFLOAT16
                                             : ADA_CU_SIMT_F32;
    Memory workspace(call->stream), unfit(call->stream);
    TRY(workspace.allocate(ada_cu_backward_workspace(c)));
    c->p.workspace = workspace.data;
    if (again) {
        TRY(unfit.allocate(heads));
        c->unfit = (uint32_t *)unfit.data;
    }
    TRY(ada_cu_backward(c, call->stream));
    return again ? fetch(call->stream, again, unfit.data, heads, failure) : 0;
}

/* Memory of the host until the end of a block. */
template <typename T> struct Here {
    T *data;
    explicit Here(size_t n) : data((T *)calloc(n ? n : 1, sizeof(T))) {}
    ~Here() { free(data); }
    Here(const Here &) = delete;
};
#define NEED(here)                                                                                           \
    if (!(here).data) return failed(cudaErrorMemoryAllocation, "calloc", failure)

} // namespace

int gradients(ada_cuda_call *call, const ada_backward_problem *x, ada_choice choice, uint32_t *again,
              ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    if (again && !call->known)
        TRY(cudaMallocAsync(&call->known, ada_cu_known_bytes(&call->params), call->stream));
    ada_cu_gradients c = arguments(call, x);
    return run(call, &c, choice, again, failure);
}

int gradients_again(ada_cuda_call *call, const ada_backward_problem *x, ada_choice choice,
                    const uint32_t *heads, uint32_t *again, ada_cuda_failure *failure) {
    const size_t n = (size_t)(call->problem.B * call->problem.G), words = (n * sizeof *heads + 7) / 8;
    ON_DEVICE(call->problem.device);
    ada_cu_gradients c = arguments(call, x);
    Here<uint64_t> tell(words);
    NEED(tell);
    for (size_t i = 0; i < n; i++) ((uint32_t *)tell.data)[i] = !heads[i] ? 2 : choice.qk == ADA_RUNG_FP64;
    Memory told(call->stream);
    TRY(told.allocate(8 * words));
    TRY(send_words(told.data, tell.data, (int64_t)(8 * words), call->stream));
    c.again = (const uint32_t *)told.data;
    for (int i = ADA_OF_MASK; i < ADA_GRADIENTS; i++) c.results[i].data = nullptr;
    if (run(call, &c, choice, again, failure)) return failure->code;
    for (size_t i = 0; i < n; i++) again[i] = again[i] == 1;
    return 0;
}

int gradient_norms(ada_cuda_call *call, const ada_backward_problem *x, double *of_queries, double *of_keys,
                   ada_cuda_failure *failure) {
    const ada_problem *p = &call->problem;
    const size_t queries = (size_t)(p->B * p->H * p->T * ADA_CU_QUERY_NORMS) * sizeof(double);
    const size_t keys = (size_t)(p->B * p->G * p->S * ADA_CU_KEY_NORMS) * sizeof(double);
    ON_DEVICE(p->device);
    const ada_cu_gradients c = arguments(call, x);
    Memory found(call->stream);
    TRY(found.allocate(queries + keys));
    double *const behind = (double *)((char *)found.data + queries);
    TRY(ada_cu_gradient_norms(&c, (double *)found.data, behind, call->stream));
    return fetch(call->stream, of_queries, found.data, queries, failure) ||
                   fetch(call->stream, of_keys, behind, keys, failure)
               ? failure->code
               : 0;
}

int gradient_rows(ada_cuda_call *call, const ada_backward_problem *x, bool keys, const ada_cuda_row *rows,
                  int64_t n, double *found, ada_cuda_failure *failure) {
    enum : int64_t { PARTIALS = 64 << 20 }; /* bytes, unless one group takes more */
    ON_DEVICE(call->problem.device);
    const ada_cu_gradients c = arguments(call, x);
    const int64_t size = ada_cu_check_size(&c.p, keys), of_row = size / ADA_CU_CHECKED;
    const int64_t bytes = (int64_t)ada_cu_check_bytes(&c.p, keys);
    Here<ada_cu_checked> groups((size_t)n);
    NEED(groups);
    int64_t made = 0;
    for (int64_t i = 0; i < n; i++) {
        ada_cu_checked *last = made ? &groups.data[made - 1] : nullptr;
        if (!last || last->head != rows[i].head || last->count == ADA_CU_CHECKED) {
            last = &groups.data[made++];
            last->head = rows[i].head;
        }
        last->row[last->count++] = rows[i].row;
    }
    const int64_t together = PARTIALS / bytes > 1 ? PARTIALS / bytes : 1,
                  most = made < together ? made : together;
    Memory told(call->stream), partials(call->stream), to(call->stream);
    TRY(told.allocate((size_t)made * sizeof *groups.data));
    TRY(partials.allocate((size_t)(most * bytes)));
    TRY(to.allocate((size_t)(made * size) * sizeof *found));
    TRY(send_words(told.data, groups.data, made * (int64_t)sizeof *groups.data, call->stream));
    for (int64_t i = 0; i < made; i += together)
        TRY(ada_cu_check_rows(&c, keys, (ada_cu_checked *)told.data + i,
                              made - i < together ? made - i : together, (double *)partials.data,
                              (double *)to.data + i * size, call->stream));
    Here<double> all((size_t)(made * size));
    NEED(all);
    if (fetch(call->stream, all.data, to.data, (size_t)(made * size) * sizeof *found, failure))
        return failure->code;
    for (int64_t i = 0; i < made; i++) {
        const int64_t count = groups.data[i].count;
        memcpy(found, all.data + i * size, (size_t)(count * of_row) * sizeof *found);
        found += count * of_row;
    }
    return 0;
}

} // namespace ada_cuda
