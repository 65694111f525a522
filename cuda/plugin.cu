/* libadaattn_cuda.so: the table of ada_cuda.h over the launches of params.h.
 *
 * Every call of the runtime goes through TRY, which says what failed. Vectors of a problem are few: they
 * reach the device as parameters of a kernel, so that a captured graph keeps them and no host memory is read
 * later.
 */
#include "k0.cuh"
#include "probe.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace {

int failed(cudaError_t status, const char *call, ada_cuda_failure *failure) {
    cudaGetLastError(); /* a launch's error is not reported twice */
    failure->code = status;
    const char *open = strchr(call, '(');
    snprintf(failure->call, sizeof failure->call, "%.*s", open ? (int)(open - call) : (int)strlen(call),
             call);
    snprintf(failure->text, sizeof failure->text, "%s", cudaGetErrorString(status));
    return status;
}

#define TRY(call)                                                                                            \
    do {                                                                                                     \
        const cudaError_t try_status = (call);                                                               \
        if (try_status != cudaSuccess) return failed(try_status, #call, failure);                            \
    } while (0)

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

/* Makes a device current, and the thread's own one again in the end. */
class Device {
  public:
    explicit Device(int device) {
        status = cudaGetDevice(&before);
        if (status == cudaSuccess && before != device) status = cudaSetDevice(device);
    }
    ~Device() { cudaSetDevice(before); }
    Device(const Device &) = delete;
    cudaError_t status;

  private:
    int before = 0;
};

#define ON_DEVICE(device)                                                                                    \
    Device guard(device);                                                                                    \
    if (guard.status != cudaSuccess) return failed(guard.status, "cudaSetDevice", failure)

/* Memory in the order of a stream. */
class Memory {
  public:
    explicit Memory(cudaStream_t on) : stream(on) {}
    ~Memory() {
        if (data) cudaFreeAsync(data, stream);
    }
    Memory(const Memory &) = delete;
    cudaError_t allocate(size_t bytes) { return bytes ? cudaMallocAsync(&data, bytes, stream) : cudaSuccess; }
    void *data = nullptr;

  private:
    cudaStream_t stream;
};

/* ---- the machine ---- */

int count(int *devices, int *driver, int *runtime, ada_cuda_failure *failure) {
    *devices = *driver = 0;
    TRY(cudaRuntimeGetVersion(runtime));
    TRY(cudaDriverGetVersion(driver));
    if (*driver) TRY(cudaGetDeviceCount(devices));
    return 0;
}

uint32_t bit(ada_rung rung) { return 1u << rung; }

int describe(int device, ada_cuda_device *about, ada_cuda_failure *failure) {
    cudaDeviceProp properties;
    TRY(cudaGetDeviceProperties(&properties, device));
    *about = {};
    memcpy(about->name, properties.name, sizeof about->name - 1);
    about->major = properties.major, about->minor = properties.minor;
    about->multiprocessors = properties.multiProcessorCount;
    about->memory_bytes = (int64_t)properties.totalGlobalMem;
    about->rungs = bit(ADA_RUNG_FP64) | bit(ADA_RUNG_FP32);
    if (properties.major >= 8) about->rungs |= bit(ADA_RUNG_FP16) | bit(ADA_RUNG_BF16) | bit(ADA_RUNG_INT8);
    return 0;
}

/* ---- memory ---- */

int allocate(int device, uintptr_t stream, int64_t bytes, void **memory, ada_cuda_failure *failure) {
    ON_DEVICE(device);
    TRY(cudaMallocAsync(memory, (size_t)bytes, stream_of(stream)));
    return 0;
}

int release(int device, uintptr_t stream, void *memory, ada_cuda_failure *failure) {
    const Device guard(device); /* memory has an address of its own on every device */
    const bool any = stream == ADA_CUDA_ANY_STREAM;
    const cudaError_t waited = any ? cudaDeviceSynchronize() : cudaSuccess;
    TRY(cudaFreeAsync(memory, any ? cudaStreamLegacy : stream_of(stream)));
    TRY(waited);
    return 0;
}

int synchronize(int device, uintptr_t stream, ada_cuda_failure *failure) {
    ON_DEVICE(device);
    TRY(cudaStreamSynchronize(stream_of(stream)));
    return 0;
}

/* An event of the current device. */
class Event {
  public:
    ~Event() {
        if (event) cudaEventDestroy(event);
    }
    cudaError_t create() { return cudaEventCreateWithFlags(&event, cudaEventDisableTiming); }
    cudaEvent_t event = nullptr;
};

int order(int device, uintptr_t earlier, uintptr_t later, ada_cuda_failure *failure) {
    if (earlier == later) return 0;
    ON_DEVICE(device);
    Event event;
    TRY(event.create());
    TRY(cudaEventRecord(event.event, stream_of(earlier)));
    TRY(cudaStreamWaitEvent(stream_of(later), event.event, 0));
    return 0;
}

/* Two pinned pieces of memory, kept for all calls: pinning takes longer than copying. One is copied by the
 * host while the other is on its way. */
const size_t PIECE = (size_t)4 << 20;
std::mutex staging_lock;
char *staging[2];

int prepare_staging(Event events[2], ada_cuda_failure *failure) {
    for (int i = 0; i < 2; i++) {
        if (!staging[i]) TRY(cudaHostAlloc((void **)&staging[i], PIECE, cudaHostAllocPortable));
        TRY(events[i].create());
    }
    return 0;
}

size_t piece_at(size_t at, size_t bytes) { return bytes - at < PIECE ? bytes - at : PIECE; }

int upload(int device, uintptr_t stream, void *to, const void *from, int64_t n, ada_cuda_failure *failure) {
    ON_DEVICE(device);
    const std::lock_guard<std::mutex> lock(staging_lock);
    Event events[2];
    const size_t bytes = (size_t)n;
    if (prepare_staging(events, failure)) return failure->code;
    int turn = 0;
    for (size_t at = 0; at < bytes; at += PIECE, turn ^= 1) {
        TRY(cudaEventSynchronize(events[turn].event)); /* at once for one that was never recorded */
        memcpy(staging[turn], (const char *)from + at, piece_at(at, bytes));
        TRY(cudaMemcpyAsync((char *)to + at, staging[turn], piece_at(at, bytes), cudaMemcpyHostToDevice,
                            stream_of(stream)));
        TRY(cudaEventRecord(events[turn].event, stream_of(stream)));
    }
    for (Event &event : events) TRY(cudaEventSynchronize(event.event));
    return 0;
}

int download(int device, uintptr_t stream, void *to, const void *from, int64_t n, ada_cuda_failure *failure) {
    ON_DEVICE(device);
    const std::lock_guard<std::mutex> lock(staging_lock);
    Event events[2];
    const size_t bytes = (size_t)n;
    if (prepare_staging(events, failure)) return failure->code;
    for (size_t at = 0, turn = 0; at < bytes + PIECE; at += PIECE, turn ^= 1) {
        if (at < bytes) {
            TRY(cudaMemcpyAsync(staging[turn], (const char *)from + at, piece_at(at, bytes),
                                cudaMemcpyDeviceToHost, stream_of(stream)));
            TRY(cudaEventRecord(events[turn].event, stream_of(stream)));
        }
        if (at >= PIECE) {
            TRY(cudaEventSynchronize(events[turn ^ 1].event));
            memcpy((char *)to + at - PIECE, staging[turn ^ 1], piece_at(at - PIECE, bytes));
        }
    }
    return 0;
}

/* Results of a call, waited for. */
int fetch(cudaStream_t stream, void *to, const void *from, size_t bytes, ada_cuda_failure *failure) {
    const std::lock_guard<std::mutex> lock(staging_lock);
    if (!staging[0]) TRY(cudaHostAlloc((void **)&staging[0], PIECE, cudaHostAllocPortable));
    for (size_t at = 0; at < bytes; at += PIECE) {
        TRY(cudaMemcpyAsync(staging[0], (const char *)from + at, piece_at(at, bytes), cudaMemcpyDeviceToHost,
                            stream));
        TRY(cudaStreamSynchronize(stream));
        memcpy((char *)to + at, staging[0], piece_at(at, bytes));
    }
    return 0;
}

/* Words of 8 bytes on their way: as many as a launch may carry. */
struct Words {
    enum { MOST = 480, THREADS = 128 };
    uint64_t *to;
    int n;
    uint64_t word[MOST];
};

ADA_KERNEL(Words::THREADS, 1) store_words(ADA_ARGS(Words) a) {
    for (int i = ada_thread(); i < a.n; i += Words::THREADS) a.to[i] = a.word[i];
}

cudaError_t send_words(void *to, const void *from, int64_t bytes, cudaStream_t stream) {
    cudaError_t status = cudaSuccess;
    for (int64_t at = 0; at < bytes && status == cudaSuccess; at += Words::MOST * 8) {
        const int64_t left = bytes - at, now = left < Words::MOST * 8 ? left : Words::MOST * 8;
        Words words;
        words.to = (uint64_t *)((char *)to + at), words.n = (int)(now / 8);
        memcpy(words.word, (const char *)from + at, (size_t)now);
        status = ada_launch(store_words, 1, Words::THREADS, 0, stream, words);
    }
    return status;
}

} // namespace

/* ---- a call ---- */

struct ada_cuda_call {
    ada_problem problem;
    ada_cu_params params; /* of a launch of all heads, but for the rung */
    cudaStream_t stream;
    void *vectors; /* on the device */
    void *again;   /* likewise, [B * H] uint32_t; NULL: nobody asked */
};

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

ada_cu_array array_of(const ada_array *a) {
    ada_cu_array x = {a->data, {0, 0, 0, 0}};
    for (int i = 0; i < a->ndim; i++) x.stride[i] = a->stride[i];
    return x;
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

/* How a choice is computed on this chip, in *rung; false: by no kernel. */
bool rung_of(const ada_cuda_call *call, ada_choice choice, int32_t *rung) {
    const ada_rung half = call->problem.query.dtype == ADA_F16 ? ADA_RUNG_FP16 : ADA_RUNG_BF16;
    ada_cu_params c = call->params;
    if (choice.qk == ADA_RUNG_INT8 && choice.pv == half)
        c.rung = ADA_CU_INT8;
    else if (choice.qk != choice.pv)
        return false;
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
    free(call);
}

/* What a device is does not change. Its memory pool keeps what calls have used: 64 MB, or each call after a
 * wait of the host would take pages from the driver. */
struct Chip {
    std::atomic<int> capability, multiprocessors;
};
Chip chips[64];

int chip_of(int device, ada_cu_params *params, ada_cuda_failure *failure) {
    Chip *chip = &chips[device % 64];
    params->capability = chip->capability, params->multiprocessors = chip->multiprocessors;
    if (params->capability && device < 64) return 0;
    int major, minor;
    cudaMemPool_t pool;
    uint64_t kept = (uint64_t)64 << 20;
    TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    TRY(cudaDeviceGetAttribute(&params->multiprocessors, cudaDevAttrMultiProcessorCount, device));
    TRY(cudaDeviceGetDefaultMemPool(&pool, device));
    TRY(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept));
    params->capability = 10 * major + minor;
    chip->multiprocessors = params->multiprocessors, chip->capability = params->capability;
    return 0;
}

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

size_t watched_bytes(const ada_cuda_call *call) {
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

int execute(ada_cuda_call *call, ada_choice choice, const int64_t *heads, int64_t n,
            ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    ada_cu_params c = call->params;
    if (!rung_of(call, choice, &c.rung)) return failed(cudaErrorNotSupported, "execute", failure);
    Memory list(call->stream), workspace(call->stream);
    if (heads && n < call->problem.B * call->problem.H) {
        const size_t bytes = ((size_t)n * sizeof(int32_t) + 7) / 8 * 8;
        TRY(list.allocate(bytes));
        int32_t *narrow = (int32_t *)calloc(1, bytes);
        if (!narrow) return failed(cudaErrorMemoryAllocation, "calloc", failure);
        for (int64_t i = 0; i < n; i++) narrow[i] = (int32_t)heads[i];
        const cudaError_t status = send_words(list.data, narrow, (int64_t)bytes, call->stream);
        free(narrow);
        TRY(status);
        c.heads = (const int32_t *)list.data;
        c.n_heads = (int32_t)n;
    } else {
        c.n_heads = (int32_t)(call->problem.B * call->problem.H);
    }
    TRY(workspace.allocate(ada_cu_workspace(&c)));
    c.workspace = workspace.data;
    TRY(ada_cu_attend(&c, call->stream));
    return 0;
}

/* ---- masks ---- */

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

/* ---- the probe ---- */

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
    return (const char *)p.out.data + head / p.H * p.out.stride[0] + head % p.H * p.out.stride[1] +
           row * p.out.stride[2];
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

bool in_fours(const ada_cu_params *p, const ada_cu_array *a) {
    const int64_t size = p->dtype == ADA_CU_F32 ? 4 : p->dtype == ADA_CU_F64 ? 8 : 2;
    const int64_t together = a->stride[0] | a->stride[1] | a->stride[2] | (int64_t)(uintptr_t)a->data;
    return a->stride[3] == size && together % (4 * size) == 0;
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
    a.splits = ada_rows_splits(&a.p), a.fours = in_fours(&a.p, &a.p.key);
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
    Outputs outputs = {call->params, a.pairs, a.o + count * E + count, a.o + count * E, nullptr, 0};
    TRY(ada_launch(gather_rows, n, Outputs::THREADS, 0, call->stream, outputs));
    double *here = (double *)malloc(2 * of_rows);
    if (!here) return failed(cudaErrorMemoryAllocation, "malloc", failure);
    const int fetched = fetch(call->stream, here, found.data, 2 * of_rows, failure);
    if (!fetched) {
        const double *outs = here + count * (E + 1);
        memcpy(lse, here, count * sizeof *lse), memcpy(o, here + count, count * E * sizeof *o);
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
    a.fours = in_fours(&a.p, &a.p.out);
    TRY(ada_launch(square_rows, (rows + Outputs::WARPS - 1) / Outputs::WARPS, Outputs::THREADS, 0,
                   call->stream, a));
    return fetch(call->stream, norms, found.data, (size_t)rows * sizeof *norms, failure);
}

const ada_cuda_table table = {ADA_CUDA_ABI, sizeof(ada_problem),
                              ADA_VERSION,  count,
                              describe,     allocate,
                              release,      upload,
                              download,     synchronize,
                              order,        open_call,
                              close_call,   computes,
                              check_mask,   watch,
                              watched,      execute,
                              probe,        compute_rows,
                              row_norms};

} // namespace

extern "C" __attribute__((visibility("default"))) const ada_cuda_table *ada_cuda_plugin(void) {
    return &table;
}
