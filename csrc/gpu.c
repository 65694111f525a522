/* Opening the CUDA backend, and calls without a budget on it.
 *
 * RTLD_LOCAL: its symbols, the static CUDA runtime among them, meet no other library's. It is never closed:
 * the runtime has threads and handlers of its own.
 */
#include "gpu.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "execute.h"
#include "gpu_budget.h"
#include "gpu_store.h"
#include "memory.h"

/* Beside a GPU fresh pages of what a budget's call works with cost as much as the rest of it does on the
 * host. */
#define KEPT_BYTES ((int64_t)64 << 20)

static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
static const ada_cuda_table *_Atomic loaded;

static atomic_int devices;

const ada_cuda_table *ada_gpu_table(void) { return atomic_load(&loaded); }
int ada_gpu_devices(void) { return atomic_load(&devices); }
void ada_gpu_set_devices(int n) { atomic_store(&devices, n); }

static ada_status check_table(const ada_cuda_table *table, const char *path, ada_error *error) {
    if (table->abi != ADA_CUDA_ABI)
        return ada_fail(error, ADA_ERR_DEVICE, "%.200s: expected ABI %d of this version, got ABI %u", path,
                        ADA_CUDA_ABI, (unsigned)table->abi);
    if (table->problem_bytes != sizeof(ada_problem))
        return ada_fail(error, ADA_ERR_DEVICE,
                        "%.200s: expected problems of %zu bytes as in this version, got %u", path,
                        sizeof(ada_problem), (unsigned)table->problem_bytes);
    return ADA_OK;
}

static ada_status load(const char *path, ada_error *error) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return ada_fail(error, ADA_ERR_DEVICE, "the CUDA backend cannot be opened: %.240s", dlerror());
    union {
        void *symbol;
        ada_cuda_plugin_fn *function;
    } plugin = {dlsym(library, ADA_CUDA_SYMBOL)};
    if (plugin.symbol) {
        const ada_cuda_table *table = plugin.function();
        if (check_table(table, path, error) == ADA_OK) {
            atomic_store(&loaded, table);
            ada_scratch_keep(KEPT_BYTES);
            return ADA_OK;
        }
    } else {
        ada_fail(error, ADA_ERR_DEVICE,
                 "%.200s: expected a CUDA backend, got a library without the symbol %s", path,
                 ADA_CUDA_SYMBOL);
    }
    dlclose(library);
    return error->status;
}

ada_status ada_gpu_load(const char *path, ada_error *error) {
    pthread_mutex_lock(&loading);
    const ada_status status = ada_gpu_table() ? ADA_OK : load(path, error);
    pthread_mutex_unlock(&loading);
    return status;
}

ada_status ada_gpu_fail(const ada_cuda_failure *failure, ada_error *error) {
    const bool of_blas = failure->code < 0;
    return ada_fail(error, failure->code == ADA_CUDA_NO_MEMORY ? ADA_ERR_MEMORY : ADA_ERR_DEVICE,
                    "%s: %s %d of %s: %s", failure->call, of_blas ? "status" : "error",
                    of_blas ? -failure->code : failure->code, of_blas ? "cuBLAS" : "the CUDA runtime",
                    failure->text);
}

/* ---- calls without a budget ---- */

/* What a precision that is left to us is on a GPU: the arrays' own format where tensor cores multiply it
 * exactly, as everyone's implementation does. */
static ada_choice plain_choice(const ada_problem *p, const ada_cuda_table *t, const ada_cuda_call *call) {
    const ada_rung own = p->query.dtype == ADA_F16 ? ADA_RUNG_FP16 : ADA_RUNG_BF16;
    const ada_choice half = {own, own};
    const bool is_half = p->query.dtype == ADA_F16 || p->query.dtype == ADA_BF16;
    return !p->only_f64 && !p->paged && is_half && t->computes(call, half) ? half : p->precision;
}

ada_status ada_gpu_check_choice(const ada_cuda_table *t, const ada_cuda_call *call, ada_choice choice,
                                ada_error *error) {
    if (t->computes(call, choice)) return ADA_OK;
    return ada_fail(error, ADA_ERR_ARGUMENT,
                    "precision: expected rungs that the GPU computes for this dtype and head size, got "
                    "('%s', '%s')",
                    ada_rung_name(choice.qk), ada_rung_name(choice.pv));
}

static ada_status attend_exactly(const ada_problem *p, ada_budget *budget, const ada_cuda_table *t,
                                 ada_cuda_call *call, ada_error *error) {
    ada_cuda_failure failure;
    const bool forced = budget->asked.qk != ADA_RUNG_AUTO;
    const ada_choice choice = forced ? p->precision : plain_choice(p, t, call);
    if (ada_gpu_check_choice(t, call, choice, error)) return error->status;
    if (t->execute(call, choice, NULL, p->B * p->H, &failure)) return ada_gpu_fail(&failure, error);
    for (int64_t i = 0; budget->heads && i < p->B * p->H; i++) {
        budget->heads[i] = ada_unknown_head();
        budget->heads[i].choice = choice;
    }
    return ADA_OK;
}

/* Heads of which rows were beyond their rung. */
static ada_status tell_again(const ada_problem *p, ada_budget *budget, const ada_cuda_table *t,
                             ada_cuda_call *call, ada_error *error) {
    const int64_t heads = p->B * p->H, bytes = heads * (int64_t)sizeof(uint32_t);
    ada_cuda_failure failure;
    uint32_t *again = ada_scratch_take(bytes);
    if (!again) return ada_no_scratch(bytes, error);
    const int failed = t->watched(call, again, &failure);
    for (int64_t i = 0; i < heads && !failed; i++) budget->heads[i].retried |= again[i] != 0;
    ada_scratch_give_back(again);
    return failed ? ada_gpu_fail(&failure, error) : ADA_OK;
}

/* What someone waits for on this call. */
typedef struct {
    bool (*interrupt)(void *);
    void *context;
} caller;

static ada_status attend(const ada_problem *p, ada_budget *budget, const caller *from, ada_error *error) {
    const ada_cuda_table *t = ada_gpu_table();
    ada_cuda_failure failure;
    ada_cuda_call *call;
    bool good = true;
    if (p->B * p->H * p->T > ADA_GPU_MOST || p->S > ADA_GPU_MOST)
        return ada_fail(error, ADA_ERR_SHAPE, "query: expected at most %d rows and keys on a GPU, got %lld",
                        ADA_GPU_MOST, (long long)(p->S > ADA_GPU_MOST ? p->S : p->B * p->H * p->T));
    if (t->open(p, &call, &failure)) return ada_gpu_fail(&failure, error);
    if (p->paged) t->use_store(call, p->paged);
    ada_status status = ADA_OK;
    if (budget->verify && t->check_mask(call, &good, &failure))
        status = ada_gpu_fail(&failure, error);
    else if (!good)
        status =
            ada_fail(error, ADA_ERR_ARGUMENT, "attn_mask: expected finite numbers or -inf, got NaN or +inf");
    else if (budget->report && !budget->plan_only && t->watch(call, &failure))
        status = ada_gpu_fail(&failure, error);
    else if (budget->tolerance > 0)
        status = ada_gpu_attend_within(p, call, budget, from->interrupt, from->context, error);
    else
        status = attend_exactly(p, budget, t, call, error);
    if (!status && budget->report && !budget->plan_only) status = tell_again(p, budget, t, call, error);
    t->close(call);
    return status;
}

/* ---- arrays of the CPU ---- */

/* Bytes from `low` on, on the device in `memory`. */
typedef struct {
    uintptr_t low, high;
    void *memory;
} staged_range;

static ada_status stage(const ada_problem *p, staged_range *range, bool copy, ada_error *error) {
    const ada_cuda_table *t = ada_gpu_table();
    const int64_t bytes = (int64_t)(range->high - range->low);
    ada_cuda_failure failure;
    if (t->allocate(p->device, p->stream, bytes, &range->memory, &failure) ||
        (copy && t->upload(p->device, p->stream, range->memory, (const void *)range->low, bytes, &failure)))
        return ada_gpu_fail(&failure, error);
    return ADA_OK;
}

/* Elements of one layout to another. */
static void scatter(const ada_array *to, const char *from) {
    const size_t bytes = (size_t)ada_dtype_bytes(to->dtype);
    for (int64_t i = 0; i < to->shape[0]; i++)
        for (int64_t j = 0; j < to->shape[1]; j++)
            for (int64_t k = 0; k < to->shape[2]; k++)
                for (int64_t l = 0; l < to->shape[3]; l++, from += bytes)
                    memcpy((char *)to->data + i * to->stride[0] + j * to->stride[1] + k * to->stride[2] +
                               l * to->stride[3],
                           from, bytes);
}

/* Strides of a contiguous array; returns its bytes. */
static int64_t make_contiguous(ada_array *a) {
    int64_t bytes = ada_dtype_bytes(a->dtype);
    for (int i = 3; i >= 0; i--) a->stride[i] = bytes, bytes *= a->shape[i];
    return bytes;
}

static ada_status fetch_out(const ada_problem *p, const void *from, int64_t bytes, ada_error *error) {
    const ada_cuda_table *t = ada_gpu_table();
    ada_array dense = p->out;
    make_contiguous(&dense);
    const bool apart = memcmp(dense.stride, p->out.stride, sizeof dense.stride) != 0;
    char *to = apart ? ada_scratch_take(bytes) : p->out.data;
    ada_cuda_failure failure;
    if (!to) return ada_no_scratch(bytes, error);
    const bool failed = t->download(p->device, p->stream, to, from, bytes, &failure);
    if (apart) {
        if (!failed) scatter(&p->out, to);
        ada_scratch_give_back(to);
    }
    return failed ? ada_gpu_fail(&failure, error) : ADA_OK;
}

enum { IN_QUERY, IN_KEY, IN_VALUE, IN_MASK, OUT, LSE, RANGES };

static ada_status attend_staged(const ada_problem *p, ada_budget *budget, const caller *from,
                                staged_range ranges[RANGES], ada_error *error) {
    const ada_cuda_table *t = ada_gpu_table();
    const int64_t lse_bytes = p->B * p->H * p->T * (p->query.dtype == ADA_F64 ? 8 : 4);
    ada_problem there = *p;
    ada_array *const inputs[] = {&there.query, &there.key, &there.value, &there.attn_mask};
    ada_cuda_failure failure;
    there.staged = false;
    for (int i = 0; i < 4; i++) {
        if (!inputs[i]->data) continue;
        ada_array_extent(inputs[i], &ranges[i].low, &ranges[i].high);
        if (stage(p, &ranges[i], true, error)) return error->status;
        inputs[i]->data = (char *)ranges[i].memory + ((uintptr_t)inputs[i]->data - ranges[i].low);
    }
    if (!budget->plan_only) {
        ranges[OUT].high = (uintptr_t)make_contiguous(&there.out);
        if (stage(p, &ranges[OUT], false, error)) return error->status;
        there.out.data = ranges[OUT].memory;
    }
    if (p->lse && !budget->plan_only) {
        ranges[LSE].high = (uintptr_t)lse_bytes;
        if (stage(p, &ranges[LSE], false, error)) return error->status;
        there.lse = ranges[LSE].memory;
    }
    if (attend(&there, budget, from, error) || budget->plan_only) return error->status;
    if (fetch_out(p, there.out.data, (int64_t)ranges[OUT].high, error)) return error->status;
    if (p->lse && t->download(p->device, p->stream, p->lse, there.lse, lse_bytes, &failure))
        return ada_gpu_fail(&failure, error);
    return ADA_OK;
}

ada_status ada_gpu_attend(const ada_problem *p, ada_budget *budget, bool (*interrupt)(void *), void *context,
                          ada_error *error) {
    const caller from = {interrupt, context};
    const ada_cuda_table *t = ada_gpu_table();
    staged_range ranges[RANGES] = {{0}};
    ada_cuda_failure failure;
    error->status = ADA_OK;
    if (p->paged && !ada_gpu_reads_pages(p, budget))
        return ada_gpu_attend_gathered(p, budget, interrupt, context, error);
    if (!p->staged) return attend(p, budget, &from, error);
    const ada_status status = attend_staged(p, budget, &from, ranges, error);
    for (int i = 0; i < RANGES; i++)
        if (ranges[i].memory) t->release(p->device, p->stream, ranges[i].memory, &failure);
    return status;
}

ada_status ada_gpu_wait(const ada_problem *p, ada_error *error) {
    ada_cuda_failure failure;
    return ada_gpu_table()->synchronize(p->device, p->stream, &failure) ? ada_gpu_fail(&failure, error)
                                                                        : ADA_OK;
}
