// Ceilings of the machine: the rates of products out of registers (fp32 FMA, vpdpbusd, vdpbf16ps), and the
// time to read two given arrays. Both use the widest vectors that the CPU has. The threads wait for each
// other before the clock starts, and the time runs from the first start to the last end, so that creating and
// joining them is not counted.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define MAX_THREADS 256
#define FMA_STEPS 8192  // about 40 us between two looks at the clock
#define READ_BLOCK 4096 // bytes; threads' shares are cut at multiples of it

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Independent chains hide the latency of FMA: 4 or 5 cycles on two pipes.
#define DEFINE_FMA(name, target, lanes, chains)                                                              \
    target static double name(void) {                                                                        \
        typedef float vec __attribute__((vector_size(4 * lanes)));                                           \
        volatile float seed = 0.999f;                                                                        \
        vec x = (vec){0} + seed, y = 1 - x, acc[chains];                                                     \
        for (int i = 0; i < chains; i++) acc[i] = x + (float)i;                                              \
        for (int step = 0; step < FMA_STEPS; step++) {                                                       \
            for (int i = 0; i < chains; i++) acc[i] = acc[i] * x + y;                                        \
        }                                                                                                    \
        for (int i = 1; i < chains; i++) acc[0] += acc[i];                                                   \
        seed = acc[0][0];                                                                                    \
        return 2.0 * lanes * chains * FMA_STEPS;                                                             \
    }

#define DEFINE_READ(name, target, words)                                                                     \
    target static uint64_t name(const char *p, size_t bytes, size_t ahead) {                                 \
        typedef uint64_t vec __attribute__((vector_size(8 * words), aligned(4), may_alias));                 \
        enum { GROUP = 4 * sizeof(vec) };                                                                    \
        vec sum[4] = {0};                                                                                    \
        for (size_t at = 0; at + GROUP <= bytes; at += GROUP) {                                              \
            for (size_t i = 0; ahead && i < GROUP; i += 64) __builtin_prefetch(p + at + ahead + i, 0, 2);    \
            for (int i = 0; i < 4; i++) sum[i] ^= ((const vec *)(p + at))[i];                                \
        }                                                                                                    \
        sum[0] ^= sum[1] ^ sum[2] ^ sum[3];                                                                  \
        uint64_t word = 0;                                                                                   \
        for (int i = 0; i < words; i++) word ^= sum[0][i];                                                   \
        return word;                                                                                         \
    }

#if defined(__x86_64__)
DEFINE_FMA(fma_avx512, __attribute__((target("avx512f"))), 16, 16)
DEFINE_READ(read_avx512, __attribute__((target("avx512f"))), 8)
DEFINE_FMA(fma_avx2, __attribute__((target("avx2,fma"))), 8, 12)
DEFINE_READ(read_avx2, __attribute__((target("avx2"))), 4)
#endif
DEFINE_FMA(fma_plain, , 4, 12)
DEFINE_READ(read_plain, , 2)

// Operations of one of the narrow products in a block of work, 0 where the CPU lacks it.
#if defined(__x86_64__)
/* clang-format off */
#    define STEP(op, i) op " %%zmm31, %%zmm30, %%zmm" #i "\n\t"
/* clang-format on */
#    define STEPS4(op, a, b, c, d) STEP(op, a) STEP(op, b) STEP(op, c) STEP(op, d)
#    define STEPS16(op)                                                                                      \
        STEPS4(op, 0, 1, 2, 3) STEPS4(op, 4, 5, 6, 7) STEPS4(op, 8, 9, 10, 11) STEPS4(op, 12, 13, 14, 15)
#    define CLOBBER                                                                                          \
        "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11",    \
            "zmm12", "zmm13", "zmm14", "zmm15"
__attribute__((target("avx512f"))) static double vnni_block(void) {
    if (!__builtin_cpu_supports("avx512vnni")) return 0;
    for (int step = 0; step < FMA_STEPS; step++) __asm__ volatile(STEPS16("vpdpbusd")::: CLOBBER);
    return 2.0 * 64 * 16 * FMA_STEPS;
}
__attribute__((target("avx512f"))) static double bf16_block(void) {
    if (!__builtin_cpu_supports("avx512bf16")) return 0;
    for (int step = 0; step < FMA_STEPS; step++) __asm__ volatile(STEPS16("vdpbf16ps")::: CLOBBER);
    return 2.0 * 32 * 16 * FMA_STEPS;
}
#else
static double vnni_block(void) { return 0; }
static double bf16_block(void) { return 0; }
#endif

static double fma_block(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return fma_avx512();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fma_avx2();
#endif
    return fma_plain();
}

static uint64_t read_range(const char *p, size_t bytes, size_t ahead) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return read_avx512(p, bytes, ahead);
    if (__builtin_cpu_supports("avx2")) return read_avx2(p, bytes, ahead);
#endif
    return read_plain(p, bytes, ahead);
}

typedef struct {
    int threads;
    double seconds;        // FMA: how long
    const char *arrays[2]; // read: what, how far to prefetch (0: not at all), how often
    size_t bytes, ahead;
    int passes;
    double (*block)(void);
    int home; // CPU of the calling thread
    atomic_int ready;
} team_t;

typedef struct {
    team_t *team;
    int index;
    double start, end, flops;
    volatile uint64_t sink;
} member_t;

static void read_share(member_t *m) {
    size_t blocks = m->team->bytes / READ_BLOCK, n = (size_t)m->team->threads, i = (size_t)m->index;
    size_t from = blocks * i / n * READ_BLOCK;
    size_t to = i + 1 == n ? m->team->bytes : blocks * (i + 1) / n * READ_BLOCK;
    for (int a = 0; a < 2; a++) m->sink ^= read_range(m->team->arrays[a] + from, to - from, m->team->ahead);
}

// A new thread may be left on its parent's CPU for longer than the measurement takes: it moves elsewhere.
static void move_off(int home, int index) {
#if defined(__linux__)
    cpu_set_t allowed, own;
    CPU_ZERO(&own);
    sched_getaffinity(0, sizeof allowed, &allowed);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && cpu != home && --index == 0) CPU_SET(cpu, &own);
    if (CPU_COUNT(&own)) pthread_setaffinity_np(pthread_self(), sizeof own, &own);
#else
    (void)home, (void)index;
#endif
}

static int current_cpu(void) {
#if defined(__linux__)
    return sched_getcpu();
#else
    return 0;
#endif
}

static void *run_member(void *arg) {
    member_t *m = arg;
    team_t *team = m->team;
    if (m->index > 0) move_off(team->home, m->index);
    if (team->passes > 1) read_share(m);
    atomic_fetch_add(&team->ready, 1);
    while (atomic_load(&team->ready) < team->threads) sched_yield();
    m->start = now();
    for (int pass = 0; pass < team->passes; pass++) read_share(m);
    while ((m->end = now()) < m->start + team->seconds) m->flops += team->block();
    return NULL;
}

// Seconds from the first start to the last end, or -1 if the threads could not be had; *flops is their sum.
static double run_team(team_t *team, double *flops) {
    member_t members[MAX_THREADS];
    pthread_t ids[MAX_THREADS];
    int started = 1;
    *flops = 0;
    team->home = current_cpu();
    if (team->threads < 1 || team->threads > MAX_THREADS) return -1;
    for (int i = 0; i < team->threads; i++) members[i] = (member_t){.team = team, .index = i};
    while (started < team->threads && pthread_create(&ids[started], NULL, run_member, &members[started]) == 0)
        started++;
    atomic_fetch_add(&team->ready, team->threads - started);
    run_member(&members[0]);
    for (int i = 1; i < started; i++) pthread_join(ids[i], NULL);
    if (started < team->threads) return -1;

    double start = members[0].start, end = members[0].end;
    for (int i = 0; i < team->threads; i++) {
        if (members[i].start < start) start = members[i].start;
        if (members[i].end > end) end = members[i].end;
        *flops += members[i].flops;
    }
    return end - start;
}

// Operations per second of all threads together over about `seconds`; unit 0: fp32 FMA, 1: vpdpbusd, 2:
// vdpbf16ps. Not positive: it failed, or the CPU lacks the unit.
double roofline_peak(int unit, int threads, double seconds) {
    double (*const blocks[])(void) = {fma_block, vnni_block, bf16_block};
    team_t team = {.threads = threads, .seconds = seconds, .block = blocks[unit]};
    double flops, elapsed = run_team(&team, &flops);
    return flops / elapsed;
}

// Seconds to read two arrays of `bytes` bytes once, mean of `passes`, several of which follow an untimed one;
// negative: it failed. `ahead` is how many bytes ahead of the loads to prefetch, 0: not at all.
double roofline_read(const void *a, const void *b, size_t bytes, size_t ahead, int threads, int passes) {
    team_t team = {.threads = threads,
                   .arrays = {a, b},
                   .bytes = bytes,
                   .ahead = ahead,
                   .passes = passes,
                   .block = fma_block};
    double flops;
    return run_team(&team, &flops) / passes;
}
