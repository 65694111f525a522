/* ptx.cuh on the CPU, for tests: a block's threads are fibers in one thread, run in an order drawn at random.
 *
 * Copies into shared memory poison their destination at once and land at a random time, at the latest when
 * they are waited for. Collectives of a warp take place when its last lane arrives. Products of e4m3 cut off
 * what lies more than 13 bits behind the point of a sum's largest term, as sm_89 does. Not modelled: bank
 * conflicts, the memory model of plain accesses, the tensor cores' rounding in other formats (sums here are
 * in float, in order).
 */
#ifndef ADA_CUDA_MODEL_H
#define ADA_CUDA_MODEL_H

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

typedef int cudaError_t;
typedef struct CUstream_st *cudaStream_t;
enum {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801
};

static inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    memset(to, value, bytes);
    return cudaSuccess;
}

#define ADA_KERNEL(threads, blocks) void
#define ADA_DEVICE static inline
#define ADA_ARGS(type) const type
#define ADA_CHIP 90
#define ADA_UNROLL
#define ADA_UNROLL_NOT
#define ADA_UNROLL_BY(n)

extern "C" uint64_t ada_model_seed; /* of the order and the delays */

namespace ada_model {

enum state { READY, AT_WARP, AT_BARRIER, DONE };

struct copy {
    uint32_t to;
    const void *from;
    int bytes, group;
};

struct fiber {
    ucontext_t context;
    jmp_buf here;
    bool started;
    std::vector<char> stack;
    state is;
    void *argument; /* of the collective it waits at */
    int operation;
    std::vector<copy> copies;
    int committed;
};

struct machine {
    std::vector<fiber> fibers;
    std::vector<uint32_t> shared; /* words, so that it is aligned */
    ucontext_t home_context;
    jmp_buf home;
    int threads, current, block, blocks, shared_bytes;
    uint64_t random;
    uint32_t delay; /* of copies: one in so many switches between threads lets one land */
    std::function<void()> kernel;
};
extern machine m;

inline uint32_t draw() {
    m.random ^= m.random << 13, m.random ^= m.random >> 7, m.random ^= m.random << 17;
    return (uint32_t)(m.random >> 32);
}

[[noreturn]] inline void fail(const char *what) {
    fprintf(stderr, "model: %s (block %d, thread %d)\n", what, m.block, m.current);
    _longjmp(m.home, 2);
}

inline char *shared(uint32_t offset, int bytes) {
    if ((int64_t)offset + bytes > m.shared_bytes) fail("outside shared memory");
    return (char *)m.shared.data() + offset;
}

inline void land(fiber &f, int newest) {
    size_t kept = 0;
    for (const copy &c : f.copies) {
        if (c.group > newest) {
            f.copies[kept++] = c;
            continue;
        }
        char *to = shared(c.to, 16);
        memset(to, 0, 16);
        memcpy(to, c.from, (size_t)c.bytes);
    }
    f.copies.resize(kept);
}

/* To some fiber that can run: of the same warp where there is one, now and then another. */
inline void give_way() {
    fiber &self = m.fibers[(size_t)m.current];
    if (!self.copies.empty() && draw() % m.delay == 0) land(self, self.copies.front().group);
    const int first = m.current / 32 * 32;
    int next = -1;
    for (int i = 1; i <= 32 && next < 0; i++) {
        const int lane = first + (m.current - first + i) % 32;
        if (lane < m.threads && m.fibers[(size_t)lane].is == READY) next = lane;
    }
    if (next < 0 || draw() % 256 == 0) {
        const int warps = (m.threads + 31) / 32, from = (int)(draw() % (uint32_t)warps);
        int found = -1;
        for (int w = 0; w < warps && found < 0; w++)
            for (int i = (from + w) % warps * 32, end = i + 32; i < end && found < 0; i++)
                if (i < m.threads && m.fibers[(size_t)i].is == READY) found = i;
        next = found;
    }
    if (next < 0) {
        bool all = true;
        for (fiber &f : m.fibers) all &= f.is == DONE;
        if (!all) fail("threads wait for each other");
        if (self.is == DONE) _longjmp(m.home, 1);
    }
    if (next == m.current) return;
    fiber &other = m.fibers[(size_t)next];
    if (self.is != DONE && _setjmp(self.here)) return;
    m.current = next;
    if (other.started) _longjmp(other.here, 1);
    other.started = true;
    setcontext(&other.context);
}

/* The last lane of the warp to arrive runs the operation on all arguments. */
template <typename T, typename F> inline void collective(int operation, T *argument, F run) {
    fiber &self = m.fibers[(size_t)m.current];
    const int first = m.current / 32 * 32;
    self.argument = argument, self.operation = operation, self.is = AT_WARP;
    T *all[32];
    for (int i = 0; i < 32; i++) {
        fiber &f = m.fibers[(size_t)(first + i)];
        if (f.is != AT_WARP) {
            do give_way();
            while (self.is != READY);
            return;
        }
        if (f.operation != operation) fail("lanes of a warp at different collectives");
        all[i] = (T *)f.argument;
    }
    run(all);
    for (int i = 0; i < 32; i++) m.fibers[(size_t)(first + i)].is = READY;
    if (draw() % 8 == 0) give_way();
}

/* False where a thread failed. */
bool run(int64_t blocks, int threads, int bytes);

} // namespace ada_model

template <typename ARGS>
static cudaError_t ada_launch(void (*kernel)(ARGS), int64_t blocks, int threads, int bytes, cudaStream_t,
                              const ARGS &args) {
    ada_model::m.kernel = [&] { kernel(args); };
    return ada_model::run(blocks, threads, bytes) ? cudaSuccess : cudaErrorLaunchFailure;
}

ADA_DEVICE int ada_thread() { return ada_model::m.current; }
ADA_DEVICE int ada_block() { return ada_model::m.block; }
ADA_DEVICE int ada_blocks() { return ada_model::m.blocks; }
ADA_DEVICE uint32_t ada_shared() { return 0; }
template <typename T> ADA_DEVICE T *ada_shared_at(uint32_t offset) {
    return (T *)ada_model::shared(offset, (int)sizeof(T));
}

ADA_DEVICE void ada_sync() {
    using namespace ada_model;
    m.fibers[(size_t)m.current].is = AT_BARRIER;
    bool all = true;
    for (fiber &f : m.fibers) all &= f.is == AT_BARRIER;
    if (all)
        for (fiber &f : m.fibers) f.is = READY;
    do give_way();
    while (m.fibers[(size_t)m.current].is != READY);
}

template <typename T> ADA_DEVICE T ada_shuffle_xor(T x, int mask) {
    struct {
        T in, out;
        int mask;
    } own = {x, x, mask};
    ada_model::collective(1, &own, [](decltype(own) **all) {
        for (int i = 0; i < 32; i++) all[i]->out = all[i ^ all[i]->mask]->in;
    });
    return own.out;
}
ADA_DEVICE bool ada_any(bool x) {
    ada_model::collective(2, &x, [](bool **all) {
        bool any = false;
        for (int i = 0; i < 32; i++) any |= *all[i];
        for (int i = 0; i < 32; i++) *all[i] = any;
    });
    return x;
}
ADA_DEVICE int ada_count_up(int32_t *counter) { return (*counter)++; }
ADA_DEVICE void ada_raise(uint32_t *to, float x) {
    float most;
    memcpy(&most, to, sizeof most);
    if (x > most) memcpy(to, &x, sizeof x);
}
ADA_DEVICE float ada_reciprocal(float x) { return 1 / x; }
ADA_DEVICE float ada_exp2(float x) { return x < -126 ? 0 : exp2f(x); }

ADA_DEVICE void ada_copy(uint32_t to, const void *from, int bytes) {
    using namespace ada_model;
    if (to % 16 || (uintptr_t)from % 16 || bytes < 0 || bytes > 16) fail("a copy that is not aligned");
    memset(shared(to, 16), 0xff, 16); /* NaN in every format */
    fiber &self = m.fibers[(size_t)m.current];
    self.copies.push_back({to, from, bytes, self.committed});
}
ADA_DEVICE void ada_copy_commit() { ada_model::m.fibers[(size_t)ada_model::m.current].committed++; }
template <int GROUPS> ADA_DEVICE void ada_copy_wait() {
    ada_model::fiber &self = ada_model::m.fibers[(size_t)ada_model::m.current];
    ada_model::land(self, self.committed - 1 - GROUPS);
}

namespace ada_model {
struct matrices {
    uint32_t *x, from;
};
template <bool TRANSPOSED> inline void load_matrices(matrices **all) {
    uint16_t element[4][8][8];
    for (int i = 0; i < 32; i++) {
        if (all[i]->from % 16) fail("a matrix row that is not aligned");
        memcpy(element[i / 8][i % 8], shared(all[i]->from, 16), 16);
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            const int r = lane / 4, c = lane % 4 * 2;
            const uint32_t low = TRANSPOSED ? element[i][c][r] : element[i][r][c];
            const uint32_t high = TRANSPOSED ? element[i][c + 1][r] : element[i][r][c + 1];
            all[lane]->x[i] = low | high << 16;
        }
}

template <typename C> struct product {
    C *c;
    const uint32_t *a;
    uint32_t b[2];
};
/* Elements of WIDE operands lie PER to a register. */
template <int PER, typename C, typename F, typename S>
inline void multiply(product<C> **all, F element, S sum_of) {
    const int K = 8 * PER;
    C a[16][8 * PER], b[8][8 * PER];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < PER; i++) {
            const int r = lane / 4, k = lane % 4 * PER + i;
            for (int part = 0; part < 4; part++)
                a[r + part % 2 * 8][k + part / 2 * 4 * PER] = element(all[lane]->a[part], i);
            for (int part = 0; part < 2; part++) b[r][k + part * 4 * PER] = element(all[lane]->b[part], i);
        }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            const C *x = a[lane / 4 + i / 2 * 8], *y = b[lane % 4 * 2 + i % 2];
            all[lane]->c[i] = sum_of(all[lane]->c[i], x, y, K);
        }
}
template <int PER, typename C, typename F> inline void multiply(product<C> **all, F element) {
    multiply<PER>(all, element, [](C c, const C *x, const C *y, int K) {
        C sum[4] = {0, 0, 0, 0};
        for (int k = 0; k < K; k++) sum[k % 4] += x[k] * y[k];
        return c + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    });
}
/* All terms in units of the largest one's exponent, 13 bits behind its point. */
inline float cut_sum(float c, const float *x, const float *y, int K) {
    float term[33], most = fabsf(c), all = c;
    for (int k = 0; k < K; k++) {
        term[k] = x[k] * y[k], all += term[k];
        most = fabsf(term[k]) > most ? fabsf(term[k]) : most;
    }
    if (!(fabsf(all) < INFINITY) || most < 0x1p-100f) return all;
    int exponent;
    frexpf(most, &exponent);
    const float units = ldexpf(1, 14 - exponent), unit = ldexpf(1, exponent - 14);
    int32_t sum = (int32_t)(c * units);
    for (int k = 0; k < K; k++) sum += (int32_t)(term[k] * units);
    return (float)sum * unit;
}
} // namespace ada_model

ADA_DEVICE void ada_load_matrices(uint32_t (&x)[4], uint32_t from) {
    ada_model::matrices own = {x, from};
    ada_model::collective(3, &own, ada_model::load_matrices<false>);
}
ADA_DEVICE void ada_load_transposed(uint32_t (&x)[4], uint32_t from) {
    ada_model::matrices own = {x, from};
    ada_model::collective(4, &own, ada_model::load_matrices<true>);
}

ADA_DEVICE float ada_from_bits(uint32_t x) {
    float y;
    memcpy(&y, &x, sizeof y);
    return y;
}

namespace ada_model {
#include "../csrc/kernels/half.h"

inline float float_from_e4m3(uint8_t x) {
    const int exponent = x >> 3 & 15, digits = x & 7;
    const float size =
        (x & 127) == 127 ? NAN : ldexpf(exponent ? 8 + digits : digits, (exponent ? exponent : 1) - 10);
    return x & 128 ? -size : size;
}
inline uint8_t e4m3_from_float(float x) {
    const uint8_t sign = signbit(x) ? 128 : 0;
    const float size = fabsf(x);
    if (!(size <= 448)) return sign | (size != size ? 0x7f : 0x7e);
    const int exponent = size < 0.015625f ? -6 : ilogbf(size);
    return (uint8_t)(sign | (((exponent + 6) << 3) + (int)rintf(ldexpf(size, 3 - exponent))));
}
} // namespace ada_model

ADA_DEVICE float ada_from_f16(uint16_t x) { return ada_model::float_from_f16(x); }
ADA_DEVICE uint32_t ada_pack_f16(float x, float y) {
    return ada_model::f16_from_float(x) | (uint32_t)ada_model::f16_from_float(y) << 16;
}
ADA_DEVICE uint32_t ada_pack_bf16(float x, float y) {
    return ada_model::bf16_from_float(x) | (uint32_t)ada_model::bf16_from_float(y) << 16;
}

ADA_DEVICE void ada_multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ada_model::product<float> own = {c, a, {b0, b1}};
    ada_model::collective(5, &own, [](ada_model::product<float> **all) {
        ada_model::multiply<2>(all, [](uint32_t x, int i) { return ada_from_f16((uint16_t)(x >> 16 * i)); });
    });
}
ADA_DEVICE void ada_multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ada_model::product<float> own = {c, a, {b0, b1}};
    ada_model::collective(6, &own, [](ada_model::product<float> **all) {
        ada_model::multiply<2>(all, [](uint32_t x, int i) { return ada_from_bits(x >> 16 * i << 16); });
    });
}
ADA_DEVICE uint32_t ada_pack_e4m3(float x, float y) {
    return ada_model::e4m3_from_float(x) | (uint32_t)ada_model::e4m3_from_float(y) << 8;
}
ADA_DEVICE void ada_multiply_e4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ada_model::product<float> own = {c, a, {b0, b1}};
    ada_model::collective(8, &own, [](ada_model::product<float> **all) {
        static float values[256];
        if (!values[1])
            for (int i = 0; i < 256; i++) values[i] = ada_model::float_from_e4m3((uint8_t)i);
        ada_model::multiply<4>(
            all, [](uint32_t x, int i) { return values[x >> 8 * i & 255]; }, ada_model::cut_sum);
    });
}
ADA_DEVICE void ada_multiply_i8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ada_model::product<int32_t> own = {c, a, {b0, b1}};
    ada_model::collective(7, &own, [](ada_model::product<int32_t> **all) {
        ada_model::multiply<4>(all, [](uint32_t x, int i) { return (int32_t)(int8_t)(x >> 8 * i); });
    });
}

#endif
