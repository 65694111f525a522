/* Calls on a cache of a GPU: what few queries ask goes to the pages as they are, everything else to arrays of
 * their tokens, which take the way of all arrays.
 */
#include "gpu_store.h"

bool ada_gpu_reads_pages(const ada_problem *p, const ada_budget *budget) {
    const bool fp32 = p->precision.qk == ADA_RUNG_FP32 && p->precision.pv == ADA_RUNG_FP32;
    return fp32 && !p->only_f64 && p->query.dtype != ADA_F64 && !(budget->tolerance > 0) &&
           p->T * (p->H / p->G) <= ADA_GPU_FEW_ROWS;
}

/* A contiguous array like this one, in memory of the device that *memory keeps. */
static ada_status make_array(const ada_problem *p, ada_array *a, ada_dtype dtype, void **memory,
                             ada_error *error) {
    ada_cuda_failure failure;
    int64_t bytes = ada_dtype_bytes(dtype);
    a->dtype = dtype;
    for (int i = 3; i >= 0; i--) a->stride[i] = bytes, bytes *= a->shape[i];
    if (ada_gpu_table()->allocate(p->device, p->stream, bytes, memory, &failure))
        return ada_gpu_fail(&failure, error);
    a->data = *memory;
    return ADA_OK;
}

enum { QUERY, KEY, VALUE, OUT, ARRAYS };

static ada_status attend_arrays(const ada_problem *p, ada_budget *budget, bool (*interrupt)(void *),
                                void *context, void *memory[ARRAYS], ada_error *error) {
    const ada_cuda_table *t = ada_gpu_table();
    const ada_dtype own = p->query.dtype;
    const bool half = own == ADA_F16 || own == ADA_BF16, wide = half && p->paged->dtype != own;
    ada_problem there = *p;
    ada_cuda_failure failure;
    there.paged = NULL, there.stored = false;
    if (make_array(p, &there.key, wide ? ADA_F32 : own, &memory[KEY], error) ||
        make_array(p, &there.value, wide ? ADA_F32 : own, &memory[VALUE], error))
        return error->status;
    if (t->store_read(p->device, p->stream, p->paged, p->kv_lengths.data, &there.key, &there.value, NULL,
                      &failure))
        return ada_gpu_fail(&failure, error);
    if (wide) {
        if (make_array(p, &there.query, ADA_F32, &memory[QUERY], error)) return error->status;
        if (t->convert(p->device, p->stream, &there.query, &p->query, &failure))
            return ada_gpu_fail(&failure, error);
        if (!budget->plan_only && make_array(p, &there.out, ADA_F32, &memory[OUT], error))
            return error->status;
    }
    if (ada_gpu_attend(&there, budget, interrupt, context, error)) return error->status;
    if (wide && !budget->plan_only && t->convert(p->device, p->stream, &p->out, &there.out, &failure))
        return ada_gpu_fail(&failure, error);
    return ADA_OK;
}

ada_status ada_gpu_attend_gathered(const ada_problem *p, ada_budget *budget, bool (*interrupt)(void *),
                                   void *context, ada_error *error) {
    void *memory[ARRAYS] = {NULL};
    ada_cuda_failure failure;
    const ada_status status = attend_arrays(p, budget, interrupt, context, memory, error);
    for (int i = 0; i < ARRAYS; i++)
        if (memory[i]) ada_gpu_table()->release(p->device, p->stream, memory[i], &failure);
    return status;
}

static ada_status fetch_numbers(int device, uintptr_t stream, const ada_array *from, float *to,
                                ada_error *error) {
    int64_t bytes = (int64_t)sizeof *to;
    ada_cuda_failure failure;
    for (int i = 0; i < 4; i++) bytes *= from->shape[i];
    if (ada_gpu_table()->download(device, stream, to, from->data, bytes, &failure))
        return ada_gpu_fail(&failure, error);
    return ADA_OK;
}

static ada_status read_store(const ada_problem *p, const int64_t *lengths, float *to[2], float *scales,
                             void *memory[3], ada_error *error) {
    const ada_cuda_table *t = ada_gpu_table();
    const ada_cuda_store *s = p->paged;
    ada_array sides[2], steps = {.ndim = 4, .shape = {2, s->B, s->G, s->columns - 1}};
    ada_cuda_failure failure;
    for (int i = 0; i < 2; i++) {
        sides[i] = (ada_array){.ndim = 4, .shape = {s->B, s->G, p->S, s->widths[i]}};
        if (make_array(p, &sides[i], ADA_F32, &memory[i], error)) return error->status;
    }
    if (scales && make_array(p, &steps, ADA_F32, &memory[2], error)) return error->status;
    if (t->store_read(p->device, p->stream, s, lengths, &sides[0], &sides[1], memory[2], &failure))
        return ada_gpu_fail(&failure, error);
    if (fetch_numbers(p->device, p->stream, &sides[0], to[0], error) ||
        fetch_numbers(p->device, p->stream, &sides[1], to[1], error) ||
        (scales && fetch_numbers(p->device, p->stream, &steps, scales, error)))
        return error->status;
    return ADA_OK;
}

ada_status ada_gpu_read_store(const ada_cuda_store *store, int device, uintptr_t stream,
                              const int64_t *lengths, int64_t tokens, float *to[2], float *scales,
                              ada_error *error) {
    const ada_problem p = {.paged = store, .device = device, .stream = stream, .S = tokens};
    void *memory[3] = {NULL};
    ada_cuda_failure failure;
    const ada_status status = read_store(&p, lengths, to, scales, memory, error);
    for (int i = 0; i < 3; i++)
        if (memory[i]) ada_gpu_table()->release(device, stream, memory[i], &failure);
    return status;
}

ada_status ada_gpu_read_array(const ada_array *from, int device, uintptr_t stream, float *to,
                              ada_error *error) {
    const ada_problem p = {.device = device, .stream = stream};
    ada_array dense = *from;
    void *memory = NULL;
    ada_cuda_failure failure;
    ada_status status = make_array(&p, &dense, ADA_F32, &memory, error);
    if (!status && ada_gpu_table()->convert(device, stream, &dense, from, &failure))
        status = ada_gpu_fail(&failure, error);
    if (!status) status = fetch_numbers(device, stream, &dense, to, error);
    if (memory) ada_gpu_table()->release(device, stream, memory, &failure);
    return status;
}

ada_status ada_gpu_merge(const ada_merge_problem *m, int device, uintptr_t stream, bool wait,
                         ada_error *error) {
    const ada_cuda_table *t = ada_gpu_table();
    ada_cuda_failure failure;
    if (t->merge(device, stream, m, &failure) || (wait && t->synchronize(device, stream, &failure)))
        return ada_gpu_fail(&failure, error);
    return ADA_OK;
}
