/* Everything that kernels need of the machine, and the only place with PTX: threads, shared memory, copies
 * into it, matrix products, shuffles. Compiled by a C++ compiler with ADA_CUDA_MODEL, the same names are
 * models on the CPU (model.h), so that the kernels' source runs in tests without a GPU.
 *
 * Shared memory is addressed by 32-bit numbers from ada_shared() on. Lanes of a warp call its collectives
 * together.
 */
#ifndef ADA_CUDA_PTX_CUH
#define ADA_CUDA_PTX_CUH

#include <math.h>
#include <stdint.h>

#ifdef ADA_CUDA_MODEL
#    include "model.h"
#else

#    include <cuda_runtime.h>

#    define ADA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#    define ADA_DEVICE __device__ __forceinline__
#    define ADA_ARGS(type) const __grid_constant__ type
#    ifdef __CUDA_ARCH__
#        define ADA_CHIP (__CUDA_ARCH__ / 10) /* that is compiled for */
#    else
#        define ADA_CHIP 0
#    endif
#    define ADA_UNROLL _Pragma("unroll")
#    define ADA_UNROLL_NOT _Pragma("unroll 1")
#    define ADA_PRAGMA(text) _Pragma(#    text)
#    define ADA_UNROLL_BY(n) ADA_PRAGMA(unroll n)

/* Launches a kernel; the value is a cudaError_t. */
template <typename ARGS>
static cudaError_t ada_launch(void (*kernel)(ARGS), int64_t blocks, int threads, int shared,
                              cudaStream_t stream, const ARGS &args) {
    if (shared > 48 * 1024) {
        cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return error;
    }
    kernel<<<(unsigned)blocks, threads, (size_t)shared, stream>>>(args);
    return cudaGetLastError();
}

extern __shared__ __align__(1024) char ada_shared_memory[]; /* swizzles are by address */

/* Read anew at every use, which costs less than a register that waits for it through a loop. */
ADA_DEVICE int ada_thread() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    __builtin_assume(x >= 0 && x < 1024);
    return x;
}
ADA_DEVICE int ada_block() { return (int)blockIdx.x; }
ADA_DEVICE int ada_blocks() { return (int)gridDim.x; }
ADA_DEVICE uint32_t ada_shared() { return (uint32_t)__cvta_generic_to_shared(ada_shared_memory); }
template <typename T> ADA_DEVICE T *ada_shared_at(uint32_t offset) {
    return (T *)(ada_shared_memory + offset);
}
ADA_DEVICE void ada_sync() { __syncthreads(); }

template <typename T> ADA_DEVICE T ada_shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}
ADA_DEVICE bool ada_any(bool x) { return __any_sync(0xffffffffu, x); }
ADA_DEVICE int ada_count_up(int32_t *counter) { return atomicAdd(counter, 1); }
/* The largest of all x, none negative, as a float's bits. */
ADA_DEVICE void ada_raise(uint32_t *to, float x) { atomicMax(to, __float_as_uint(x)); }

/* 2^x, to 2 ulp; subnormal results are 0. */
ADA_DEVICE float ada_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / x, to 1 ulp. */
ADA_DEVICE float ada_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 16 bytes to shared memory, of which all but the first bytes (0 ... 16) are zeros; both addresses are
 * multiples of
 * 16. They are there for the thread after ada_copy_wait, for others after a barrier behind that. */
ADA_DEVICE void ada_copy(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
ADA_DEVICE void ada_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Until at most so many of the groups committed last are on their way. */
template <int GROUPS> ADA_DEVICE void ada_copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

/* Four 8 x 8 matrices of 16-bit elements; lane 8 i + r addresses row r of matrix i. Register i of lane 4 r +
 * c gets elements 2 c and 2 c + 1 of row r of matrix i; transposed: of column r. */
ADA_DEVICE void ada_load_matrices(uint32_t (&x)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(from)
                 : "memory");
}
ADA_DEVICE void ada_load_transposed(uint32_t (&x)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(from)
                 : "memory");
}

/* c += a * b in float, a 16 x 16 and b 16 x 8. Lane 4 r + t holds of a: rows r and r + 8 (registers 0, 1) of
 * columns 2 t and 2 t + 1, then (2, 3) of columns 8 further; of b: rows 2 t and 2 t + 1, then 8 further, of
 * column r; of c: columns 2 t and 2 t + 1 of row r, then of row r + 8. */
ADA_DEVICE void ada_multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ADA_DEVICE void ada_multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/* The same of signed bytes, a 16 x 32 and b 32 x 8: where two columns or rows stood, there are four, 4 t ...
 */
ADA_DEVICE void ada_multiply_i8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The same of e4m3 (fp8), summed in float: sm_89 keeps about 13 bits behind the point of the largest term and
 * cuts off the rest, and later chips make halves of the operands. Nothing before sm_89. */
ADA_DEVICE void ada_multiply_e4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#    if ADA_CHIP >= 89
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#    endif
}
/* Two floats to e4m3, the first one lowest; beyond 448 they become 448, and NaN stays NaN. */
ADA_DEVICE uint32_t ada_pack_e4m3(float x, float y) {
    uint16_t z = 0;
#    if ADA_CHIP >= 89
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(z) : "f"(y), "f"(x));
#    endif
    return z;
}

/* Two floats to half formats, to nearest even, the first one lowest. */
ADA_DEVICE uint32_t ada_pack_f16(float x, float y) {
    uint32_t z;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
    return z;
}
ADA_DEVICE uint32_t ada_pack_bf16(float x, float y) {
    uint32_t z;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
    return z;
}
ADA_DEVICE float ada_from_f16(uint16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
ADA_DEVICE float ada_from_bits(uint32_t x) { return __uint_as_float(x); }

#endif

ADA_DEVICE float ada_from_bf16(uint16_t x) { return ada_from_bits((uint32_t)x << 16); }

#endif
