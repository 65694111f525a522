/* What the host's side of the backend shares: devices, memory, failures and calls on their way.
 *
 * Every call of the runtime goes through TRY, which says what failed. What kernels are told is little: it
 * reaches the device as parameters of a kernel (send_words), so that a captured graph keeps it and no host
 * memory is read later.
 */
#ifndef ADA_CUDA_HOST_H
#define ADA_CUDA_HOST_H

#include "ada_cuda.h"
#include "common.cuh"

#include <cstdlib>
#include <cstring>

struct ada_cuda_call {
    ada_problem problem;
    ada_cu_params params; /* of a launch of all heads, but for the rung */
    cudaStream_t stream;
    void *vectors; /* on the device */
    void *again;   /* likewise, [B * H] uint32_t; NULL: nobody asked */
    void *known;   /* likewise, of a gradient's rows, by ada_cu_known_bytes; NULL: nobody asked */
};

namespace ada_cuda {

/* Tells what failed; returns the status. */
int failed(cudaError_t status, const char *call, ada_cuda_failure *failure);

#define TRY(call)                                                                                            \
    do {                                                                                                     \
        const cudaError_t try_status = (call);                                                               \
        if (try_status != cudaSuccess) return failed(try_status, #call, failure);                            \
    } while (0)

inline cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

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

/* Results of a call, waited for. */
int fetch(cudaStream_t stream, void *to, const void *from, size_t bytes, ada_cuda_failure *failure);
/* The table's upload. */
int upload(int device, uintptr_t stream, void *to, const void *from, int64_t n, ada_cuda_failure *failure);
/* Words of 8 bytes to the device. */
cudaError_t send_words(void *to, const void *from, int64_t bytes, cudaStream_t stream);
/* Capability and multiprocessors of the device. */
int chip_of(int device, ada_cu_params *params, ada_cuda_failure *failure);

inline ada_cu_array array_of(const ada_array *a) {
    ada_cu_array x = {a->data, {0, 0, 0, 0}};
    for (int i = 0; i < a->ndim; i++) x.stride[i] = a->stride[i];
    return x;
}

/* How a choice is computed on this chip, in *rung; false: by no kernel. */
bool rung_of(const ada_cuda_call *call, ada_choice choice, int32_t *rung);
/* Tells a launch which heads it computes, in memory that list takes. */
int send_heads(const ada_cuda_call *call, const int64_t *heads, int64_t n, Memory *list, ada_cu_params *c,
               ada_cuda_failure *failure);
/* Launches, with a workspace of its own. */
int attend_here(const ada_cuda_call *call, ada_cu_params *c, ada_cuda_failure *failure);

/* ---- entries of the table ---- */

int open_call(const ada_problem *problem, ada_cuda_call **call, ada_cuda_failure *failure);
void close_call(ada_cuda_call *call);
bool computes(const ada_cuda_call *call, ada_choice choice);
int check_mask(ada_cuda_call *call, bool *good, ada_cuda_failure *failure);
int watch(ada_cuda_call *call, ada_cuda_failure *failure);
int watched(ada_cuda_call *call, uint32_t *again, ada_cuda_failure *failure);
int execute(ada_cuda_call *call, ada_choice choice, const int64_t *heads, int64_t n,
            ada_cuda_failure *failure);
int probe(ada_cuda_call *call, ada_cuda_keys *keys, int64_t n, const ada_cuda_row *rows, int64_t n_rows,
          ada_cuda_figures *figures, ada_cuda_failure *failure);
int compute_rows(ada_cuda_call *call, const ada_cuda_row *rows, int64_t n, bool f64, double *o, double *lse,
                 double *out_o, double *out_lse, ada_cuda_failure *failure);
int row_norms(ada_cuda_call *call, float *norms, ada_cuda_failure *failure);
int open_blas(const char *path, int device, ada_cuda_failure *failure);
int multiply(const ada_cuda_linear *linear, ada_product product, ada_cuda_failure *failure);
int product_error(const ada_cuda_linear *linear, const int32_t *features, int n, double *error,
                  ada_cuda_failure *failure);
bool leaves_out(const ada_cuda_call *call, ada_choice choice);
int look_at_blocks(ada_cuda_call *call, ada_choice choice, ada_cuda_thin *heads, int64_t n, int32_t tiles,
                   ada_cuda_failure *failure);
int execute_thin(ada_cuda_call *call, ada_choice choice, ada_cuda_thin *heads, int64_t n, bool tell,
                 ada_picture *picture, ada_cuda_failure *failure);
int take_sample(ada_cuda_call *call, const ada_cuda_sampled *heads, int64_t n, const ada_cuda_sampling *what,
                float *to, ada_cuda_failure *failure);
int execute_low_rank(ada_cuda_call *call, const ada_cuda_landmarks *heads, int64_t n, float *shift2,
                     ada_cuda_failure *failure);
int execute_rows(ada_cuda_call *call, const ada_cuda_row *rows, int64_t n, ada_cuda_failure *failure);
double plain_operations(const ada_cuda_call *call);
int gradients(ada_cuda_call *call, const ada_backward_problem *x, ada_choice choice, uint32_t *again,
              ada_cuda_failure *failure);
int gradients_again(ada_cuda_call *call, const ada_backward_problem *x, ada_choice choice,
                    const uint32_t *heads, uint32_t *again, ada_cuda_failure *failure);
int gradient_norms(ada_cuda_call *call, const ada_backward_problem *x, double *of_queries, double *of_keys,
                   ada_cuda_failure *failure);
int gradient_rows(ada_cuda_call *call, const ada_backward_problem *x, bool keys, const ada_cuda_row *rows,
                  int64_t n, double *found, ada_cuda_failure *failure);

/* store.cu */
int merge(int device, uintptr_t stream, const ada_merge_problem *m, ada_cuda_failure *failure);
int convert(int device, uintptr_t stream, const ada_array *to, const ada_array *from,
            ada_cuda_failure *failure);
void use_store(ada_cuda_call *call, const ada_cuda_store *store);
int store_set(int device, uintptr_t stream, void *table, const int64_t *at, const uint64_t *address,
              int64_t n, ada_cuda_failure *failure);
int store_copy(int device, uintptr_t stream, const uint64_t *to, const uint64_t *from, int64_t n,
               int64_t bytes, ada_cuda_failure *failure);
int store_append(int device, uintptr_t stream, const ada_cuda_store *store, const ada_array *key,
                 const ada_array *value, const int64_t *lengths, const int64_t *counts,
                 ada_cuda_failure *failure);
int store_reopen(int device, uintptr_t stream, const ada_cuda_store *store, const int64_t *sequences,
                 const int64_t *pages, int64_t n, ada_cuda_failure *failure);
int store_read(int device, uintptr_t stream, const ada_cuda_store *store, const int64_t *lengths,
               const ada_array *key, const ada_array *value, float *scales, ada_cuda_failure *failure);
int captured(int device, uintptr_t stream, bool *captured, ada_cuda_failure *failure);

} // namespace ada_cuda

#endif
