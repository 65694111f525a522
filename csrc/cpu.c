/* CPU detection: cpuid and xgetbv for instruction sets, affinity and cgroups for the number of CPUs.
 *
 * Written out instead of __builtin_cpu_supports: one table of bits that reads like the manuals, the same
 * under gcc and clang, and the operating system's consent (XCR0, AMX permission) in plain view.
 */
#define _GNU_SOURCE 1
#include "cpu.h"

#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __linux__
#    include <sched.h>
#    include <sys/syscall.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#    include <cpuid.h>
#else
#    include <sys/utsname.h>
#endif

/* ---- instruction sets ---- */

static const struct {
    uint32_t bit;
    const char *name;
} isa_names[] = {
    {0, "scalar"},
    {ADA_ISA_AVX2, "avx2"},
    {ADA_ISA_AVX512, "avx512"},
    {ADA_ISA_AVX512VNNI, "avx512vnni"},
    {ADA_ISA_AVX512BF16, "avx512bf16"},
    {ADA_ISA_AMX, "amx"},
};
enum { N_ISA_NAMES = sizeof isa_names / sizeof *isa_names };

const char *ada_isa_name(uint32_t one_bit) {
    for (int i = 0; i < N_ISA_NAMES; i++)
        if (isa_names[i].bit == one_bit) return isa_names[i].name;
    return NULL;
}

int ada_isa_parse(const char *name, uint32_t *mask) {
    uint32_t implied = 0;
    for (int i = 0; i < N_ISA_NAMES; i++) {
        implied |= isa_names[i].bit;
        if (strcmp(name, isa_names[i].name) == 0) {
            *mask = implied;
            return 0;
        }
    }
    return -1;
}

/* Bundles whose own instructions a build for tests replaces by those of AVX512VNNI. */
enum {
    EMULATED = 0
#ifdef ADAATTN_EMULATE_BF16
               | ADA_ISA_AVX512BF16
#endif
#ifdef ADAATTN_EMULATE_AMX
               | ADA_ISA_AMX
#endif
};

uint32_t ada_isa_emulated(void) { return EMULATED; }

#if defined(__x86_64__) || defined(__i386__)

/* Register state that the operating system saves: bits of XCR0. */
enum { XCR0_YMM = 0x6, XCR0_ZMM = 0xE6, XCR0_TILES = 0x60000 };

static uint64_t read_xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static bool has(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

static bool amx_permitted(void) {
#    if defined(__linux__) && defined(__x86_64__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0) return true;
#    endif
    return false;
}

/* *denied: bundles that the CPU has and the operating system does not grant. */
static uint32_t detect(uint32_t *denied) {
    const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;       /* 1: ecx */
    const uint32_t avx2 = 1u << 5, f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31; /* 7.0: ebx */
    const uint32_t vbmi = 1u << 1, vnni = 1u << 11;                                           /* 7.0: ecx */
    const uint32_t amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_int8 = 1u << 25;             /* 7.0: edx */
    const uint32_t avx512_bf16 = 1u << 5;                                                     /* 7.1: eax */

    uint32_t a, b, c, d, a1 = 0, ignored;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, fma | osxsave | avx | f16c)) return 0;
    uint64_t xcr0 = read_xcr0();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (a >= 1) __get_cpuid_count(7, 1, &a1, &ignored, &ignored, &ignored);

    uint32_t isa = 0;
    if (!has(b, avx2) || !has(xcr0, XCR0_YMM)) return isa;
    isa |= ADA_ISA_AVX2;
    if (!has(b, f | dq | bw | vl) || !has(xcr0, XCR0_ZMM)) return isa;
    isa |= ADA_ISA_AVX512;
    if (!has(c, vbmi | vnni)) return isa;
    isa |= ADA_ISA_AVX512VNNI | EMULATED;
    if (!has(a1, avx512_bf16)) return isa;
    isa |= ADA_ISA_AVX512BF16;
    if (!has(d, amx_bf16 | amx_tile | amx_int8) || isa & ADA_ISA_AMX) return isa;
    if (has(xcr0, XCR0_TILES) && amx_permitted()) return isa | ADA_ISA_AMX;
    *denied = ADA_ISA_AMX;
    return isa;
}

void ada_cpu_name(char *buffer, size_t size) {
    uint32_t words[12] = {0};
    char brand[sizeof words + 1] = "x86";
    bool known = true;
    for (uint32_t i = 0; i < 3 && known; i++)
        known = __get_cpuid(0x80000002 + i, &words[4 * i], &words[4 * i + 1], &words[4 * i + 2],
                            &words[4 * i + 3]);
    if (known) memcpy(brand, words, sizeof words);
    size_t end = strlen(brand);
    while (end && brand[end - 1] == ' ') brand[--end] = '\0';
    snprintf(buffer, size, "%s", brand + strspn(brand, " "));
}

#else

static uint32_t detect(uint32_t *denied) {
    (void)denied;
    return 0;
}

void ada_cpu_name(char *buffer, size_t size) {
    struct utsname machine;
    snprintf(buffer, size, "%s", uname(&machine) >= 0 ? machine.machine : "unknown");
}

#endif

static uint32_t detected, denied_by_system;
static pthread_once_t detected_once = PTHREAD_ONCE_INIT;
static void detect_once(void) { detected = detect(&denied_by_system); }

uint32_t ada_cpu_isa(void) {
    pthread_once(&detected_once, detect_once);
    return detected;
}

uint32_t ada_cpu_isa_denied(void) { return ada_cpu_isa(), denied_by_system; }

/* ---- number of CPUs ---- */

enum { PATH_BYTES = 4096 };

/* Reads up to two numbers from the file folder/name; the word "max" reads as -1. Returns how many. */
static int read_numbers(const char *folder, const char *name, long long numbers[2]) {
    char path[PATH_BYTES + 64], text[64] = "";
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path) return 0;
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    bool read = fgets(text, sizeof text, file) != NULL;
    fclose(file);
    if (!read) return 0;
    if (strncmp(text, "max", 3) == 0) {
        numbers[0] = -1;
        return 1 + (sscanf(text + 3, "%lld", &numbers[1]) == 1);
    }
    return sscanf(text, "%lld %lld", &numbers[0], &numbers[1]);
}

/* The CPUs that the quota of this one cgroup allows, INT_MAX without a quota. */
static int folder_cpus(const char *folder, bool v2) {
    long long v[2], period[2];
    if (v2) {
        if (read_numbers(folder, "cpu.max", v) != 2) return INT_MAX;
    } else {
        if (read_numbers(folder, "cpu.cfs_quota_us", v) < 1) return INT_MAX;
        if (read_numbers(folder, "cpu.cfs_period_us", period) < 1) return INT_MAX;
        v[1] = period[0];
    }
    if (v[0] <= 0 || v[1] <= 0) return INT_MAX;
    long long cpus = v[0] / v[1] + (v[0] % v[1] != 0);
    return cpus < INT_MAX ? (int)cpus : INT_MAX;
}

/* The least over the cgroup and its ancestors. A container may see its own cgroup as mount/ whatever its
 * path says: folders that are not there have no quota. */
static int tree_cpus(const char *root, const char *mount, const char *cgroup, bool v2) {
    char folder[PATH_BYTES];
    int base = snprintf(folder, sizeof folder, "%s/sys/fs/cgroup%s", root, mount);
    if (base >= (int)sizeof folder) return INT_MAX;
    if (snprintf(folder + base, sizeof folder - base, "%s", cgroup) >= (int)sizeof folder - base)
        folder[base] = '\0';
    int least = INT_MAX;
    for (;;) {
        int cpus = folder_cpus(folder, v2);
        if (cpus < least) least = cpus;
        char *slash = strrchr(folder + base, '/');
        if (!slash) return least;
        *slash = '\0';
    }
}

/* Whether "cpu" is an item of a list such as "cpu,cpuacct". */
static bool lists_cpu(const char *list) {
    for (;;) {
        size_t length = strcspn(list, ",");
        if (length == 3 && strncmp(list, "cpu", 3) == 0) return true;
        if (list[length] == '\0') return false;
        list += length + 1;
    }
}

int ada_cgroup_cpus(const char *root) {
    char line[PATH_BYTES];
    if (snprintf(line, sizeof line, "%s/proc/self/cgroup", root) >= (int)sizeof line) return INT_MAX;
    FILE *file = fopen(line, "re");
    if (!file) return INT_MAX;
    int least = INT_MAX;
    while (fgets(line, sizeof line, file)) { /* number:controllers:path, no controllers for v2 */
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *path = controllers ? strchr(++controllers, ':') : NULL;
        if (!path) continue;
        *path++ = '\0';
        int cpus = INT_MAX;
        if (*controllers == '\0')
            cpus = tree_cpus(root, "", path, true);
        else if (lists_cpu(controllers))
            cpus = tree_cpus(root, "/cpu", path, false);
        if (cpus < least) least = cpus;
    }
    fclose(file);
    return least;
}

static int affinity_cpus(void) {
#ifdef __linux__
    for (int n = CPU_SETSIZE; n <= 1 << 20; n *= 4) { /* EINVAL while the mask is smaller than the kernel's */
        cpu_set_t *set = CPU_ALLOC(n);
        if (!set) break;
        bool known = sched_getaffinity(0, CPU_ALLOC_SIZE(n), set) == 0;
        int count = known ? CPU_COUNT_S(CPU_ALLOC_SIZE(n), set) : 0;
        CPU_FREE(set);
        if (known) return count;
    }
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}

int ada_cpu_count(void) {
    int affinity = affinity_cpus(), quota = ada_cgroup_cpus("");
    int count = affinity < quota ? affinity : quota;
    return count > 1 ? count : 1;
}

#ifdef __linux__
int ada_current_cpu(void) { return sched_getcpu(); }

void ada_leave_cpu(int cpu) {
    cpu_set_t allowed, others;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    others = allowed;
    CPU_CLR(cpu, &others);
    if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
int ada_current_cpu(void) { return -1; }
void ada_leave_cpu(int cpu) { (void)cpu; }
#endif
