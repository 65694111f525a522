/* libadaattn_cuda.so: the table of ada_cuda.h, devices and their memory. */
#include "host.h"

#include <atomic>
#include <cstdio>
#include <mutex>

namespace ada_cuda {

int failed(cudaError_t status, const char *call, ada_cuda_failure *failure) {
    cudaGetLastError(); /* a launch's error is not reported twice */
    failure->code = status;
    const char *open = strchr(call, '(');
    snprintf(failure->call, sizeof failure->call, "%.*s", open ? (int)(open - call) : (int)strlen(call),
             call);
    snprintf(failure->text, sizeof failure->text, "%s", cudaGetErrorString(status));
    return status;
}

namespace {

/* ---- the machine ---- */

int count(int *devices, int *driver, int *runtime, ada_cuda_failure *failure) {
    *devices = *driver = 0;
    TRY(cudaRuntimeGetVersion(runtime));
    TRY(cudaDriverGetVersion(driver));
    if (*driver) TRY(cudaGetDeviceCount(devices));
    return 0;
}

uint32_t bit(ada_rung rung) { return 1u << rung; }

/* The chip whose code one of this capability runs: the newest of its generation that nvcc knew, or PTX of
 * sm_80. */
int code_of(int capability) {
    const int compiled[] = {__CUDA_ARCH_LIST__};
    int code = 80;
    for (const int x : compiled)
        if (x / 100 == capability / 10 && x / 10 <= capability && x / 10 > code) code = x / 10;
    return code;
}

int describe(int device, ada_cuda_device *about, ada_cuda_failure *failure) {
    cudaDeviceProp properties; /* without a context on the device */
    TRY(cudaGetDeviceProperties(&properties, device));
    *about = {};
    memcpy(about->name, properties.name, sizeof about->name - 1);
    about->major = properties.major, about->minor = properties.minor;
    about->multiprocessors = properties.multiProcessorCount;
    about->memory_bytes = (int64_t)properties.totalGlobalMem;
    about->rungs = bit(ADA_RUNG_FP64) | bit(ADA_RUNG_FP32);
    if (properties.major >= 8) about->rungs |= bit(ADA_RUNG_FP16) | bit(ADA_RUNG_BF16) | bit(ADA_RUNG_INT8);
    if (ada_cu_has_fp8(code_of(10 * properties.major + properties.minor))) about->rungs |= bit(ADA_RUNG_FP8);
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

} // namespace

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

namespace {

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

/* What a device is does not change. Its memory pool keeps what calls have used: 64 MB, or each call after a
 * wait of the host would take pages from the driver. */
struct Chip {
    std::atomic<int> capability, multiprocessors, code;
};
Chip chips[64];

} // namespace

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

int chip_of(int device, ada_cu_params *params, ada_cuda_failure *failure) {
    Chip *chip = &chips[device % 64];
    params->capability = chip->capability, params->multiprocessors = chip->multiprocessors;
    params->code = chip->code;
    if (params->capability && device < 64) return 0;
    int major, minor;
    cudaMemPool_t pool;
    uint64_t kept = (uint64_t)64 << 20;
    TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    TRY(cudaDeviceGetAttribute(&params->multiprocessors, cudaDevAttrMultiProcessorCount, device));
    TRY(cudaDeviceGetDefaultMemPool(&pool, device));
    TRY(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept));
    params->capability = 10 * major + minor, params->code = code_of(params->capability);
    chip->multiprocessors = params->multiprocessors, chip->code = params->code;
    chip->capability = params->capability;
    return 0;
}

namespace {

const ada_cuda_table table = {ADA_CUDA_ABI,   sizeof(ada_problem),
                              ADA_VERSION,    count,
                              describe,       allocate,
                              release,        upload,
                              download,       synchronize,
                              order,          open_call,
                              close_call,     computes,
                              check_mask,     watch,
                              watched,        execute,
                              probe,          compute_rows,
                              row_norms,      open_blas,
                              multiply,       product_error,
                              leaves_out,     look_at_blocks,
                              execute_thin,   gradients,
                              merge,          convert,
                              use_store,      store_set,
                              store_copy,     store_append,
                              store_reopen,   store_read,
                              take_sample,    execute_low_rank,
                              execute_rows,   plain_operations,
                              captured,       gradients_again,
                              gradient_norms, gradient_rows};

} // namespace
} // namespace ada_cuda

extern "C" __attribute__((visibility("default"))) const ada_cuda_table *ada_cuda_plugin(void) {
    return &ada_cuda::table;
}
