/* The CUDA runtime as the host's side of cuda/ calls it, on the CPU's memory, for tests: with the kernels of
 * cuda/model.h it makes the whole backend run without a GPU. The same knobs as gpu_mock.c. */
#ifndef GPU_RUNTIME_H
#define GPU_RUNTIME_H

#include "ptx.cuh"

#define __CUDA_ARCH_LIST__ 800, 890, 900, 1000

extern "C" {
__attribute__((visibility("default"), weak)) int mock_fail_after = -1;
__attribute__((visibility("default"), weak)) int mock_code = 700;
__attribute__((visibility("default"), weak)) const char *mock_failed;
__attribute__((visibility("default"), weak)) int mock_live, mock_calls, mock_waits, mock_devices = 2;
/* The stream that is captured, and pairs of streams of which the second waited for the first. */
__attribute__((visibility("default"), weak)) int mock_captured, mock_orders, mock_order[64][2];
}

enum {
    cudaErrorMemoryAllocation = 2,
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3,
    cudaHostAllocPortable = 1,
    cudaEventDisableTiming = 2,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMultiProcessorCount = 16
};
#define cudaStreamLegacy ((cudaStream_t)1)

typedef int *cudaEvent_t;
typedef struct {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t totalGlobalMem;
} cudaDeviceProp;

static inline cudaError_t gpu_runtime_call(const char *name) {
    mock_calls++;
    if (mock_fail_after < 0 || mock_fail_after-- > 0) return cudaSuccess;
    mock_failed = name;
    return mock_code;
}
#define GPU_RUNTIME_CALL()                                                                                   \
    do {                                                                                                     \
        const cudaError_t status = gpu_runtime_call(__func__);                                               \
        if (status != cudaSuccess) return status;                                                            \
    } while (0)

static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline const char *cudaGetErrorString(cudaError_t) { return "injected"; }
static inline cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    GPU_RUNTIME_CALL();
    return cudaSuccess;
}
static inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
static inline cudaError_t cudaMallocAsync(void **memory, size_t bytes, cudaStream_t) {
    GPU_RUNTIME_CALL();
    *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    static int poison = 0; /* what is read before it is written differs from call to call */
    memset(*memory, 0x35 * ++poison, bytes);
    mock_live++;
    return cudaSuccess;
}
static inline cudaError_t cudaFreeAsync(void *memory, cudaStream_t) {
    free(memory);
    mock_live--;
    return cudaSuccess;
}
static inline cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    GPU_RUNTIME_CALL();
    return cudaSuccess;
}
static inline cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13010;
    GPU_RUNTIME_CALL();
    return cudaSuccess;
}
static inline cudaError_t cudaGetDeviceCount(int *count) {
    *count = mock_devices;
    GPU_RUNTIME_CALL();
    return cudaSuccess;
}
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    *properties = {};
    snprintf(properties->name, sizeof properties->name, "mock %d", device);
    properties->major = 9, properties->multiProcessorCount = 1, properties->totalGlobalMem = 1 << 20;
    GPU_RUNTIME_CALL();
    return cudaSuccess;
}
static inline cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9
             : attribute == cudaDevAttrMultiProcessorCount  ? 3
                                                            : 0;
    GPU_RUNTIME_CALL();
    return cudaSuccess;
}
typedef int cudaMemPool_t;
enum { cudaMemPoolAttrReleaseThreshold = 4 };
static inline cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *, int) {
    GPU_RUNTIME_CALL();
    return cudaSuccess;
}
static inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, int, void *) {
    GPU_RUNTIME_CALL();
    return cudaSuccess;
}
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    mock_waits++;
    GPU_RUNTIME_CALL();
    return cudaSuccess;
}
static inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    GPU_RUNTIME_CALL();
    *event = (int *)malloc(sizeof **event);
    mock_live++;
    return cudaSuccess;
}
static inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    mock_live--;
    return cudaSuccess;
}
static inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    GPU_RUNTIME_CALL();
    *event = (int)(uintptr_t)stream;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    GPU_RUNTIME_CALL();
    const int pair[2] = {*event, (int)(uintptr_t)stream};
    memcpy(mock_order[mock_orders++ % 64], pair, sizeof pair);
    return cudaSuccess;
}
typedef int cudaStreamCaptureStatus;
enum { cudaStreamCaptureStatusNone = 0, cudaErrorStreamCaptureImplicit = 906 };
static inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
    GPU_RUNTIME_CALL();
    if (mock_captured && stream == cudaStreamLegacy) return cudaErrorStreamCaptureImplicit;
    *status = mock_captured && (int)(uintptr_t)stream == mock_captured;
    return cudaSuccess;
}
static inline cudaError_t cudaEventSynchronize(cudaEvent_t) {
    GPU_RUNTIME_CALL();
    return cudaSuccess;
}
static inline cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned) {
    GPU_RUNTIME_CALL();
    *memory = malloc(bytes); /* kept for all calls */
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, int, cudaStream_t) {
    GPU_RUNTIME_CALL();
    memcpy(to, from, bytes);
    return cudaSuccess;
}

#endif
