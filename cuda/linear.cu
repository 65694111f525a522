/* Rows times a weight: by cuBLASLt from operands that kernels convert where they are not what it takes, in
 * float64 by a kernel of our own, and the error of what came out.
 *
 * To cuBLASLt, whose matrices lie column by column, out is (N, M) and the product weight^T (as it lies) by x:
 * the only order in which it takes e4m3. fp16 and e4m3 of wider arrays are worth a power of two per array,
 * of which the device makes alpha, so that nobody waits for it.
 */
#include "blas.h"
#include "host.h"

#include <dlfcn.h>

#include <cstdio>
#include <mutex>

namespace ada_cuda {

namespace {

/* ---- the library ---- */

struct Blas {
#define ADA_MEMBER(type, name, arguments) type(*name) arguments;
    ADA_BLAS_FUNCTIONS(ADA_MEMBER)
#undef ADA_MEMBER
};
enum { OLDEST_BLAS = 120000, MOST_DEVICES = 64 };
const size_t WORKSPACE = (size_t)32 << 20;

/* What decides how cuBLASLt multiplies: types, whether alpha lies on the device, a bias, sizes, rows of
 * operands and alignments. */
struct Question {
    int64_t type, out_type, compute, scaled, bias, features, M, depth, ld[2], alignment[4];
};

/* cuBLASLt ties a handle to a device. NVIDIA calls cuBLAS safe where threads share a handle and advises
 * against it, and of handles of cuBLASLt says nothing: so threads take turns, for the microseconds of a
 * launch. It is made when the library is opened and answers are kept, since neither a handle can be made nor
 * cuBLASLt be asked while a CUDA graph is captured. */
struct Handle {
    enum { KEPT = 512 };
    std::mutex turn;
    void *handle;
    Question questions[KEPT];
    blas_choice answers[KEPT];
    unsigned asked;
};

std::mutex opening;
bool is_open;
Blas blas; /* from the first handle on */
Handle handles[MOST_DEVICES];

int blas_refused(const char *call, const char *text, ada_cuda_failure *failure) {
    failure->code = cudaErrorInvalidValue;
    snprintf(failure->call, sizeof failure->call, "%s", call);
    snprintf(failure->text, sizeof failure->text, "%s", text ? text : "it is not there");
    return failure->code;
}

int blas_failed(const Blas &of, int status, const char *call, ada_cuda_failure *failure) {
    failure->code = status == BLAS_ALLOC_FAILED    ? ADA_CUDA_NO_MEMORY
                    : status == BLAS_NOT_SUPPORTED ? ADA_CUDA_NOT_SUPPORTED
                                                   : -status;
    snprintf(failure->call, sizeof failure->call, "cublasLt%s", call);
    snprintf(failure->text, sizeof failure->text, "%s", of.GetStatusString(status));
    return failure->code;
}

#define TRY_BLAS(name, ...)                                                                                  \
    do {                                                                                                     \
        const int try_status = blas.name(__VA_ARGS__);                                                       \
        if (try_status != BLAS_SUCCESS) return blas_failed(blas, try_status, #name, failure);                \
    } while (0)

void *find_library(const char *path) {
    if (path) return dlopen(path, RTLD_NOW | RTLD_LOCAL);
    void *found = dlopen("libcublasLt.so.13", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    return found ? found : dlopen("libcublasLt.so.12", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
}

int find_functions(void *library, Blas *found, ada_cuda_failure *failure) {
#define ADA_FIND(type, name, arguments)                                                                      \
    found->name = reinterpret_cast<type(*) arguments>(dlsym(library, "cublasLt" #name));                     \
    if (!found->name) return blas_refused("dlsym", dlerror(), failure);
    ADA_BLAS_FUNCTIONS(ADA_FIND)
#undef ADA_FIND
    char text[64];
    snprintf(text, sizeof text, "expected version %d or later, got %zu", OLDEST_BLAS, found->GetVersion());
    return found->GetVersion() < OLDEST_BLAS ? blas_refused("cublasLtGetVersion", text, failure) : 0;
}

/* ---- operands ---- */

/* Rows of elements, contiguous in a row. */
struct Matrix {
    const void *data;
    int64_t ld; /* elements from row to row */
};

int size_of(int type) {
    return type == BLAS_R_64F ? 8 : type == BLAS_R_32F ? 4 : type == BLAS_R_8F_E4M3 ? 1 : 2;
}

int type_of(ada_dtype dtype) {
    return dtype == ADA_F64   ? BLAS_R_64F
           : dtype == ADA_F32 ? BLAS_R_32F
           : dtype == ADA_F16 ? BLAS_R_16F
                              : BLAS_R_16BF;
}

int type_of(ada_product product, ada_dtype dtype) {
    switch (product) {
    case ADA_PRODUCT_FP8:
        return BLAS_R_8F_E4M3;
    case ADA_PRODUCT_BF16:
        return BLAS_R_16BF;
    case ADA_PRODUCT_FP16:
        return BLAS_R_16F;
    default:
        return type_of(dtype);
    }
}

struct Scales {
    float x, weight, alpha, beta;
};

struct Most {
    enum { THREADS = 256, MOST_BLOCKS = 512 };
    ada_cu_array from;
    int dtype, width;
    int64_t elements;
    float *partials; /* [blocks] */
};

/* The largest finite magnitude of a block's part. */
ADA_KERNEL(Most::THREADS, 1) find_most(ADA_ARGS(Most) a) {
    float most = 0;
    for (int64_t i = ada_block() * (int64_t)Most::THREADS + ada_thread(); i < a.elements;
         i += (int64_t)ada_blocks() * Most::THREADS) {
        const char *at = (const char *)a.from.data + i / a.width * a.from.stride[0];
        const float x = fabsf(ada_element<float>(at + i % a.width * a.from.stride[1], a.dtype));
        most = x < ADA_INF ? fmaxf(most, x) : most;
    }
    for (int lanes = 1; lanes < 32; lanes *= 2) most = fmaxf(most, ada_shuffle_xor(most, lanes));
    float *const each = ada_shared_at<float>(0);
    if (ada_thread() % 32 == 0) each[ada_thread() / 32] = most;
    ada_sync();
    if (ada_thread()) return;
    for (int i = 1; i < Most::THREADS / 32; i++) most = fmaxf(most, each[i]);
    a.partials[ada_block()] = most;
}

struct Scaling {
    const float *x, *weight; /* partials */
    int x_blocks, weight_blocks;
    int exponent; /* largest numbers are below 2 to it */
    float beta;
    Scales *to;
};

ADA_DEVICE int exponent_of(const float *partials, int n) {
    float most = 0;
    for (int i = 0; i < n; i++) most = fmaxf(most, partials[i]);
    int exponent = 0;
    frexpf(most, &exponent);
    return exponent < -100 ? -100 : exponent;
}

ADA_KERNEL(32, 1) make_scales(ADA_ARGS(Scaling) a) {
    if (ada_thread()) return;
    const int x = a.exponent - exponent_of(a.x, a.x_blocks);
    /* alpha is to be a normal number, whatever outputs are then. */
    const int wanted = a.exponent - exponent_of(a.weight, a.weight_blocks);
    const int weight = wanted > 126 - x ? 126 - x : wanted < -126 - x ? -126 - x : wanted;
    *a.to = {ldexpf(1, x), ldexpf(1, weight), ldexpf(1, -x - weight), a.beta};
}

struct Convert {
    enum { THREADS = 256, CHUNK = 8 };
    ada_cu_array from; /* (rows, width) */
    int dtype, type;   /* what it is, what it becomes */
    int rows, width;
    int64_t chunks, items; /* of a row, of all rows to be made: zeros beyond the array's */
    const float *factor;   /* NULL: 1 */
    void *to;
};

ADA_DEVICE float float_for_e4m3(float x) { return fabsf(x) < ADA_INF ? x : ADA_NAN; } /* it has no infinity */

ADA_KERNEL(Convert::THREADS, 1) convert_rows(ADA_ARGS(Convert) a) {
    const int64_t i = ada_block() * (int64_t)Convert::THREADS + ada_thread();
    if (i >= a.items) return;
    const int64_t row = i / a.chunks, first = i % a.chunks * Convert::CHUNK;
    const char *const from = (const char *)a.from.data + row * a.from.stride[0];
    const float factor = a.factor ? *a.factor : 1;
    for (int c = 0; c < Convert::CHUNK; c += 2) {
        double wide[2];
        float x[2];
        for (int k = 0; k < 2; k++) {
            const int64_t at = first + c + k;
            const bool there = row < a.rows && at < a.width;
            wide[k] = there ? ada_element<double>(from + at * a.from.stride[1], a.dtype) : 0;
            x[k] = (float)wide[k] * factor;
        }
        const int64_t pair = i * Convert::CHUNK / 2 + c / 2;
        if (a.type == BLAS_R_64F)
            for (int k = 0; k < 2; k++) ((double *)a.to)[2 * pair + k] = wide[k];
        else if (a.type == BLAS_R_32F)
            for (int k = 0; k < 2; k++) ((float *)a.to)[2 * pair + k] = x[k];
        else if (a.type == BLAS_R_8F_E4M3)
            ((uint16_t *)a.to)[pair] = (uint16_t)ada_pack_e4m3(float_for_e4m3(x[0]), float_for_e4m3(x[1]));
        else
            ((uint32_t *)a.to)[pair] =
                a.type == BLAS_R_16F ? ada_pack_f16(x[0], x[1]) : ada_pack_bf16(x[0], x[1]);
    }
}

/* Elements of rows to another place; the rows that are read may be one and the same. */
struct Place {
    enum { THREADS = 256 };
    const char *from;
    char *to;
    int64_t from_row, to_row, rows, width; /* bytes, bytes, and elements of a row */
    int bytes;
};

ADA_KERNEL(Place::THREADS, 1) place(ADA_ARGS(Place) a) {
    const int64_t i = ada_block() * (int64_t)Place::THREADS + ada_thread(), row = i / a.width;
    if (row >= a.rows) return;
    const char *const from = a.from + row * a.from_row + i % a.width * a.bytes;
    char *const to = a.to + row * a.to_row + i % a.width * a.bytes;
    if (a.bytes == 4)
        *(uint32_t *)to = *(const uint32_t *)from;
    else
        *(uint16_t *)to = *(const uint16_t *)from;
}

/* ---- in float64 ---- */

struct Exact {
    enum { THREADS = 256, TILE = 32, DEPTH = 16 };
    ada_cu_array x, weight, bias, out;
    int dtype, M, N, K;
    int64_t tiles; /* of features */
};

/* A tile of TILE x TILE outputs: four of a thread's. */
ADA_KERNEL(Exact::THREADS, 1) multiply_exactly(ADA_ARGS(Exact) a) {
    enum { TILE = Exact::TILE, DEPTH = Exact::DEPTH, ROW = TILE + 1 };
    const int thread = ada_thread(), m0 = (int)(ada_block() / a.tiles) * TILE,
              n0 = (int)(ada_block() % a.tiles) * TILE;
    double *const x = ada_shared_at<double>(0), *const weight = x + DEPTH * ROW;
    double sum[2][2] = {{0, 0}, {0, 0}};
    for (int k0 = 0; k0 < a.K; k0 += DEPTH) {
        for (int i = thread; i < TILE * DEPTH; i += Exact::THREADS) {
            const int row = i / DEPTH, k = i % DEPTH;
            const bool m = m0 + row < a.M && k0 + k < a.K, n = n0 + row < a.N && k0 + k < a.K;
            x[k * ROW + row] = m ? ada_element<double>((const char *)a.x.data + (m0 + row) * a.x.stride[0] +
                                                           (k0 + k) * a.x.stride[1],
                                                       a.dtype)
                                 : 0;
            weight[k * ROW + row] =
                n ? ada_element<double>((const char *)a.weight.data + (n0 + row) * a.weight.stride[0] +
                                            (k0 + k) * a.weight.stride[1],
                                        a.dtype)
                  : 0;
        }
        ada_sync();
        for (int k = 0; k < DEPTH; k++)
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 2; j++)
                    sum[i][j] += x[k * ROW + thread / 16 + 16 * i] * weight[k * ROW + thread % 16 + 16 * j];
        ada_sync();
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            const int m = m0 + thread / 16 + 16 * i, n = n0 + thread % 16 + 16 * j;
            if (m >= a.M || n >= a.N) continue;
            double y = sum[i][j];
            if (a.bias.data)
                y += ada_element<double>((const char *)a.bias.data + n * a.bias.stride[1], a.dtype);
            ada_store_element((char *)a.out.data + m * a.out.stride[0] + n * a.out.stride[1], a.dtype, y);
        }
}

/* ---- the error ---- */

struct Errors {
    enum { THREADS = 256, WARPS = THREADS / 32 };
    ada_cu_array x, weight, bias, out;
    int dtype, M, K, n;
    int32_t features[ADA_CUDA_FEATURES];
    double *of_rows; /* [M][2] squared: of the difference, of what is right */
    double *sums;    /* [2] */
};

/* As the dtype has it: rounding an output is no error of the product. */
ADA_DEVICE double rounded(double x, int dtype) {
    const float y = (float)x;
    return dtype == ADA_CU_F64   ? x
           : dtype == ADA_CU_F32 ? (double)y
           : dtype == ADA_CU_F16 ? (double)ada_from_f16((uint16_t)ada_pack_f16(y, 0))
                                 : (double)ada_from_bf16((uint16_t)ada_pack_bf16(y, 0));
}

/* A warp per row. */
ADA_KERNEL(Errors::THREADS, 1) compare_rows(ADA_ARGS(Errors) a) {
    const int64_t m = ada_block() * (int64_t)Errors::WARPS + ada_thread() / 32;
    if (m >= a.M) return;
    const int lane = ada_thread() % 32;
    double sum[ADA_CUDA_FEATURES];
    for (int f = 0; f < ADA_CUDA_FEATURES; f++) sum[f] = 0;
    for (int k = lane; k < a.K; k += 32) {
        const double x =
            ada_element<double>((const char *)a.x.data + m * a.x.stride[0] + k * a.x.stride[1], a.dtype);
        ADA_UNROLL for (int f = 0; f < ADA_CUDA_FEATURES; f++) if (f < a.n) sum[f] +=
            x * ada_element<double>((const char *)a.weight.data + a.features[f] * a.weight.stride[0] +
                                        k * a.weight.stride[1],
                                    a.dtype);
    }
    double wrong2 = 0, right2 = 0;
    ADA_UNROLL for (int f = 0; f < ADA_CUDA_FEATURES; f++) {
        for (int lanes = 1; lanes < 32; lanes *= 2) sum[f] += ada_shuffle_xor(sum[f], lanes);
        if (f >= a.n) continue;
        const int64_t n = a.features[f];
        if (a.bias.data)
            sum[f] += ada_element<double>((const char *)a.bias.data + n * a.bias.stride[1], a.dtype);
        const double right = rounded(sum[f], a.dtype),
                     got = ada_element<double>(
                         (const char *)a.out.data + m * a.out.stride[0] + n * a.out.stride[1], a.dtype);
        const bool finite = fabs(right) < (double)ADA_INF, same = fabs(got) < (double)ADA_INF;
        if (finite && same) wrong2 += (got - right) * (got - right), right2 += sum[f] * sum[f];
        if (finite != same) wrong2 = (double)ADA_INF; /* otherwise it is plain arithmetic's own */
    }
    if (lane == 0) a.of_rows[2 * m] = wrong2, a.of_rows[2 * m + 1] = right2;
}

/* In an order of its own, whatever the device. */
ADA_KERNEL(Errors::THREADS, 1) add_rows(ADA_ARGS(Errors) a) {
    double *const each = ada_shared_at<double>(0);
    double wrong2 = 0, right2 = 0;
    for (int64_t m = ada_thread(); m < a.M; m += Errors::THREADS)
        wrong2 += a.of_rows[2 * m], right2 += a.of_rows[2 * m + 1];
    each[2 * ada_thread()] = wrong2, each[2 * ada_thread() + 1] = right2;
    ada_sync();
    if (ada_thread() > 1) return;
    double sum = 0;
    for (int i = 0; i < Errors::THREADS; i++) sum += each[2 * i + ada_thread()];
    a.sums[ada_thread()] = sum;
}

/* ---- by cuBLAS ---- */

/* Descriptors, given back with it. */
class Plan {
  public:
    ~Plan() {
        if (desc) blas.MatmulDescDestroy(desc);
        for (void *layout : layouts)
            if (layout) blas.MatrixLayoutDestroy(layout);
        if (preference) blas.MatmulPreferenceDestroy(preference);
    }
    void *desc = nullptr, *layouts[3] = {nullptr, nullptr, nullptr}, *preference = nullptr; /* A, B, D */
};

int alignment_of(const void *at) {
    int alignment = 256;
    while ((uintptr_t)at % (uintptr_t)alignment) alignment /= 2;
    return alignment;
}

/* An operand as the product takes it: where it lies, if that is a multiple of `aligned` bytes, or converted
 * into `made`. */
int take_operand(const ada_array *a, int type, int64_t rows, int aligned, const float *factor,
                 cudaStream_t stream, Memory *made, Matrix *to, ada_cuda_failure *failure) {
    const int size = size_of(type);
    const int64_t row = a->stride[0], width = a->shape[1];
    const bool apart = rows == 1 || (row % size == 0 && row >= width * size);
    if ((uintptr_t)a->data % (uintptr_t)aligned == 0 && type == type_of(a->dtype) && rows == a->shape[0] &&
        (width == 1 || a->stride[1] == size) && apart) {
        *to = {a->data, rows == 1 ? width : row / size};
        return 0;
    }
    Convert c = {array_of(a), a->dtype, type, (int)a->shape[0], (int)width, 0, 0, factor, nullptr};
    c.chunks = ada_divide_up(width, 16) * 2; /* rows of 16 elements and more */
    c.items = c.chunks * rows;
    TRY(made->allocate((size_t)(c.items * Convert::CHUNK * size)));
    c.to = made->data;
    TRY(ada_launch(convert_rows, ada_divide_up(c.items, Convert::THREADS), Convert::THREADS, 0, stream, c));
    *to = {made->data, c.chunks * Convert::CHUNK};
    return 0;
}

/* Powers of two for both operands, and alpha and beta, on the device. */
int scale_operands(const ada_cuda_linear *l, int exponent, bool adds, cudaStream_t stream, Memory *scales,
                   ada_cuda_failure *failure) {
    Memory partials(stream);
    TRY(partials.allocate(2 * Most::MOST_BLOCKS * sizeof(float)));
    TRY(scales->allocate(sizeof(Scales)));
    Scaling s = {(float *)partials.data,
                 (float *)partials.data + Most::MOST_BLOCKS,
                 0,
                 0,
                 exponent,
                 adds ? 1.0f : 0.0f,
                 (Scales *)scales->data};
    const ada_array *const arrays[2] = {&l->x, &l->weight};
    for (int i = 0; i < 2; i++) {
        const ada_array *a = arrays[i];
        Most most = {array_of(a), a->dtype, (int)a->shape[1], a->shape[0] * a->shape[1],
                     (float *)partials.data + i * Most::MOST_BLOCKS};
        const int64_t wanted = ada_divide_up(most.elements, 16 * Most::THREADS);
        const int blocks = wanted < Most::MOST_BLOCKS ? (int)wanted : Most::MOST_BLOCKS;
        (i ? s.weight_blocks : s.x_blocks) = blocks;
        TRY(ada_launch(find_most, blocks, Most::THREADS, Most::THREADS / 32 * (int)sizeof(float), stream,
                       most));
    }
    TRY(ada_launch(make_scales, 1, 32, 0, stream, s));
    return 0;
}

/* How to multiply, from what is known or from cuBLASLt. */
int choose(Handle *own, const Question &question, const Plan &plan, blas_choice *choice,
           ada_cuda_failure *failure) {
    const unsigned known = own->asked < Handle::KEPT ? own->asked : (unsigned)Handle::KEPT;
    for (unsigned i = 0; i < known; i++)
        if (!memcmp(&own->questions[i], &question, sizeof question)) {
            *choice = own->answers[i];
            return 0;
        }
    void *const *const layouts = plan.layouts;
    int found = 0;
    const int looked = blas.MatmulAlgoGetHeuristic(own->handle, plan.desc, layouts[0], layouts[1], layouts[2],
                                                   layouts[2], plan.preference, 1, choice, &found);
    /* It calls what it does not have invalid as well. */
    if (looked != BLAS_SUCCESS && looked != BLAS_INVALID_VALUE)
        return blas_failed(blas, looked, "MatmulAlgoGetHeuristic", failure);
    if (looked != BLAS_SUCCESS || !found || choice->state)
        return blas_failed(blas, BLAS_NOT_SUPPORTED, "MatmulAlgoGetHeuristic", failure);
    const unsigned at = own->asked++ % Handle::KEPT;
    own->questions[at] = question, own->answers[at] = *choice;
    return 0;
}

int multiply_by_blas(const ada_cuda_linear *l, ada_product product, cudaStream_t stream,
                     ada_cuda_failure *failure) {
    const bool fp8 = product == ADA_PRODUCT_FP8, wide = l->x.dtype == ADA_F64;
    const int type = type_of(product, l->x.dtype), out_type = type_of(l->x.dtype);
    const int64_t M = l->x.shape[0], N = l->weight.shape[0], K = l->x.shape[1];
    /* e4m3 wants sizes of 16 bytes: zeros are added, and features that nobody asked for left out. */
    const int64_t features = fp8 ? ada_divide_up(N, 16) * 16 : N, depth = fp8 ? ada_divide_up(K, 16) * 16 : K;
    const bool apart = features != N, filled = fp8 && l->bias.data;
    const bool scaled = fp8 || (product == ADA_PRODUCT_FP16 && l->x.dtype != ADA_F16);
    if (l->device >= MOST_DEVICES || !handles[l->device].handle)
        return blas_refused("cublasLtCreate", "cuBLAS is not open on this device", failure);

    Memory scales(stream), x_made(stream), weight_made(stream), bias_made(stream), out_made(stream),
        workspace(stream);
    Matrix x, weight, bias;
    if (scaled && scale_operands(l, fp8 ? 8 : 14, filled, stream, &scales, failure)) return failure->code;
    const Scales *const on_device = (const Scales *)scales.data;
    if (take_operand(&l->x, type, M, 1, scaled ? &on_device->x : nullptr, stream, &x_made, &x, failure) ||
        take_operand(&l->weight, type, features, 1, scaled ? &on_device->weight : nullptr, stream,
                     &weight_made, &weight, failure))
        return failure->code;
    const int out_bytes = size_of(out_type);
    void *out = l->out.data;
    if (apart) {
        TRY(out_made.allocate((size_t)(M * features * out_bytes)));
        TRY(cudaMemsetAsync(out_made.data, 0, (size_t)(M * features * out_bytes), stream));
        out = out_made.data;
    }
    /* Kernels with an epilogue read 16 bytes of a bias at once; preferences tell nothing of it. */
    if (l->bias.data && take_operand(&l->bias, out_type, 1, 16, nullptr, stream, &bias_made, &bias, failure))
        return failure->code;
    if (filled) {
        const Place fill = {(const char *)bias.data, (char *)out, 0, features * out_bytes, M, N, out_bytes};
        TRY(ada_launch(place, ada_divide_up(M * N, Place::THREADS), Place::THREADS, 0, stream, fill));
    }

    Plan plan;
    const int compute = wide                          ? BLAS_COMPUTE_64F
                        : product == ADA_PRODUCT_TF32 ? BLAS_COMPUTE_32F_FAST_TF32
                                                      : BLAS_COMPUTE_32F;
    TRY_BLAS(MatmulDescCreate, &plan.desc, compute, wide ? BLAS_R_64F : BLAS_R_32F);
    const int transpose = BLAS_OP_T, on_device_mode = BLAS_POINTERS_ON_DEVICE, epilogue = BLAS_EPILOGUE_BIAS;
    TRY_BLAS(MatmulDescSetAttribute, plan.desc, BLAS_DESC_TRANSA, &transpose, sizeof transpose);
    if (scaled)
        TRY_BLAS(MatmulDescSetAttribute, plan.desc, BLAS_DESC_POINTER_MODE, &on_device_mode,
                 sizeof on_device_mode);
    if (l->bias.data && !filled) {
        TRY_BLAS(MatmulDescSetAttribute, plan.desc, BLAS_DESC_EPILOGUE, &epilogue, sizeof epilogue);
        TRY_BLAS(MatmulDescSetAttribute, plan.desc, BLAS_DESC_BIAS_POINTER, &bias.data, sizeof bias.data);
    }
    TRY_BLAS(MatrixLayoutCreate, &plan.layouts[0], type, (uint64_t)depth, (uint64_t)features, weight.ld);
    TRY_BLAS(MatrixLayoutCreate, &plan.layouts[1], type, (uint64_t)depth, (uint64_t)M, x.ld);
    TRY_BLAS(MatrixLayoutCreate, &plan.layouts[2], out_type, (uint64_t)features, (uint64_t)M, features);
    TRY_BLAS(MatmulPreferenceCreate, &plan.preference);
    TRY_BLAS(MatmulPreferenceSetAttribute, plan.preference, BLAS_PREF_WORKSPACE_BYTES, &WORKSPACE,
             sizeof WORKSPACE);
    const void *const pointers[4] = {weight.data, x.data, out, out};
    Question question = {type, out_type, compute,           scaled, l->bias.data && !filled, features,
                         M,    depth,    {weight.ld, x.ld}, {}};
    for (int i = 0; i < 4; i++) {
        const uint32_t alignment = (uint32_t)alignment_of(pointers[i]);
        question.alignment[i] = alignment;
        TRY_BLAS(MatmulPreferenceSetAttribute, plan.preference, BLAS_PREF_ALIGNMENT_A + i, &alignment,
                 sizeof alignment);
    }
    Handle &own = handles[l->device];
    const std::lock_guard<std::mutex> lock(own.turn);
    blas_choice choice = {};
    if (choose(&own, question, plan, &choice, failure)) return failure->code;
    void *const out_layout = plan.layouts[2];
    TRY(workspace.allocate(choice.workspace));
    const double one[2] = {1, 0};
    const float one_f[2] = {1, 0};
    const void *const host[2] = {wide ? (const void *)&one[0] : &one_f[0],
                                 wide ? (const void *)&one[1] : &one_f[1]};
    TRY_BLAS(Matmul, own.handle, plan.desc, scaled ? (const void *)&on_device->alpha : host[0], weight.data,
             plan.layouts[0], x.data, plan.layouts[1], scaled ? (const void *)&on_device->beta : host[1], out,
             out_layout, out, out_layout, choice.algo, workspace.data, choice.workspace, stream);
    if (!apart) return 0;
    const Place wanted = {(const char *)out, (char *)l->out.data, features * out_bytes, N * out_bytes, M, N,
                          out_bytes};
    TRY(ada_launch(place, ada_divide_up(M * N, Place::THREADS), Place::THREADS, 0, stream, wanted));
    return 0;
}

} // namespace

/* ---- entries of the table ---- */

int open_blas(const char *path, int device, ada_cuda_failure *failure) {
    ON_DEVICE(device);
    if (device >= MOST_DEVICES) return blas_refused("cublasLtCreate", "too many devices", failure);
    const std::lock_guard<std::mutex> lock(opening);
    Handle &own = handles[device];
    const std::lock_guard<std::mutex> turn(own.turn);
    if (own.handle) return 0;
    if (is_open) {
        TRY_BLAS(Create, &own.handle);
        return 0;
    }
    void *const library = find_library(path);
    if (!library) return blas_refused("dlopen", path ? dlerror() : NULL, failure);
    Blas found;
    if (find_functions(library, &found, failure)) {
        dlclose(library);
        return failure->code;
    }
    void *handle;
    const int status = found.Create(&handle);
    if (status) return blas_failed(found, status, "Create", failure); /* what has run is not closed */
    blas = found, own.handle = handle, is_open = true;
    return 0;
}

int multiply(const ada_cuda_linear *l, ada_product product, ada_cuda_failure *failure) {
    ON_DEVICE(l->device);
    const cudaStream_t stream = stream_of(l->stream);
    const int64_t M = l->x.shape[0], N = l->weight.shape[0];
    ada_cu_params chip = {};
    if (M == 0) return 0;
    if (chip_of(l->device, &chip, failure)) return failure->code;
    const bool fp8 = product == ADA_PRODUCT_FP8,
               any = product == ADA_PRODUCT_FP32 || product == ADA_PRODUCT_FP64;
    const int least = product == ADA_PRODUCT_FP16 ? 70 : 80;
    const bool has = any || (fp8 ? ada_cu_has_fp8(chip.code) : chip.capability >= least);
    if (!has) return failed(cudaErrorNotSupported, "multiply", failure);
    if (product != ADA_PRODUCT_FP64 || l->x.dtype == ADA_F64) {
        const int status = multiply_by_blas(l, product, stream, failure);
        if (product != ADA_PRODUCT_FP64 || status != ADA_CUDA_NOT_SUPPORTED) return status;
    }
    Exact a = {array_of(&l->x),
               array_of(&l->weight),
               array_of(&l->bias),
               array_of(&l->out),
               l->x.dtype,
               (int)M,
               (int)N,
               (int)l->x.shape[1],
               ada_divide_up(N, Exact::TILE)};
    TRY(ada_launch(multiply_exactly, a.tiles * ada_divide_up(M, Exact::TILE), Exact::THREADS,
                   2 * Exact::DEPTH * (Exact::TILE + 1) * (int)sizeof(double), stream, a));
    return 0;
}

int product_error(const ada_cuda_linear *l, const int32_t *features, int n, double *error,
                  ada_cuda_failure *failure) {
    ON_DEVICE(l->device);
    const cudaStream_t stream = stream_of(l->stream);
    const int64_t M = l->x.shape[0];
    *error = 0;
    if (M == 0) return 0;
    Memory told(stream);
    TRY(told.allocate((size_t)(M + 1) * 2 * sizeof(double)));
    Errors a = {array_of(&l->x),
                array_of(&l->weight),
                array_of(&l->bias),
                array_of(&l->out),
                l->x.dtype,
                (int)M,
                (int)l->x.shape[1],
                n,
                {},
                (double *)told.data,
                (double *)told.data + 2 * M};
    memcpy(a.features, features, (size_t)n * sizeof *features);
    TRY(ada_launch(compare_rows, ada_divide_up(M, Errors::WARPS), Errors::THREADS, 0, stream, a));
    TRY(ada_launch(add_rows, 1, Errors::THREADS, 2 * Errors::THREADS * (int)sizeof(double), stream, a));
    double sums[2];
    if (fetch(stream, sums, a.sums, sizeof sums, failure)) return failure->code;
    *error = sums[0] > 0 ? sqrt(sums[0] / sums[1]) : sums[0];
    return 0;
}

} // namespace ada_cuda
