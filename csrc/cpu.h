/* What the machine offers: instruction sets, CPUs that this process may use, the processor's name.
 * Only cpu.c asks the CPU and the operating system such questions. */
#ifndef ADA_CPU_H
#define ADA_CPU_H

#include <stddef.h>
#include <stdint.h>

/* Bundles of instruction sets. Each implies the ones before it: a CPU with BF16 but without VBMI counts
 * as avx512 only. */
typedef enum {
    ADA_ISA_AVX2 = 1 << 0,       /* AVX2, FMA, F16C */
    ADA_ISA_AVX512 = 1 << 1,     /* AVX-512 F, BW, DQ, VL */
    ADA_ISA_AVX512VNNI = 1 << 2, /* VNNI, VBMI */
    ADA_ISA_AVX512BF16 = 1 << 3, /* BF16 */
    ADA_ISA_AMX = 1 << 4,        /* tiles, BF16, INT8 */
} ada_isa;

/* Bundles that both the CPU and the operating system support; 0 where there is none (not x86). Where AMX
 * exists, asks Linux for the permission to use it (once per process; threads and children inherit it). A
 * build that emulates bundles counts them where AVX512VNNI is, without what they imply. */
uint32_t ada_cpu_isa(void);

uint32_t ada_isa_emulated(void);

/* Bundles that the CPU has but the operating system denies. */
uint32_t ada_cpu_isa_denied(void);

/* "avx2" ... "amx" for one bit, "scalar" for 0, NULL otherwise. */
const char *ada_isa_name(uint32_t one_bit);

/* *mask = the named bundle and all that it implies. Returns 0, or -1 for an unknown name. */
int ada_isa_parse(const char *name, uint32_t *mask);

/* CPUs that the affinity mask and the cgroup quota (rounded up) allow; at least 1. */
int ada_cpu_count(void);

/* The CPU this thread runs on; -1 where the system does not tell. */
int ada_current_cpu(void);

/* Moves this thread to another of the CPUs that it may use, if there is one. */
void ada_leave_cpu(int cpu);

/* The smallest CPU quota, rounded up, of this process's cgroups (v1 and v2) and their ancestors; INT_MAX
 * without one. Files are looked up below root: "" except in tests. */
int ada_cgroup_cpus(const char *root);

/* The processor's brand string (not x86: the name of the architecture), cut to size bytes including the final
 * NUL. */
void ada_cpu_name(char *buffer, size_t size);

#endif
