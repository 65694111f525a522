/* The table of kernels: kernels.def expanded once to declare them and once to select under a feature mask. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "kernels.h"

#define ADA_KERNEL(slot, isa, need) ADA_IF_##isa(ada_##slot##_fn ada_##slot##_##isa;)
#include "kernels.def"
#undef ADA_KERNEL

enum {
#define SLOT(name) INDEX_##name,
    ADA_SLOTS(SLOT)
#undef SLOT
};

void ada_kernels_select(uint32_t isa_mask, ada_kernels *kernels, const char *isa_of[]) {
    const char *ignored[ADA_SLOT_COUNT];
    if (!isa_of) isa_of = ignored;
    memset(kernels, 0, sizeof *kernels); /* optional slots stay NULL */
    kernels->isa = isa_mask & ada_isa_built();
    for (int i = 0; i < ADA_SLOT_COUNT; i++) isa_of[i] = NULL;
#define ADA_KERNEL(slot, isa, need)                                                                          \
    ADA_IF_##isa(if (((need) & ~isa_mask) == 0) {                                                            \
        kernels->slot = ada_##slot##_##isa;                                                                  \
        isa_of[INDEX_##slot] = #isa;                                                                         \
    })
#include "kernels.def"
#undef ADA_KERNEL
}

uint32_t ada_isa_built(void) {
    uint32_t mask = 0;
#if ADA_BUILD_AVX2
    mask |= ADA_ISA_AVX2;
#endif
#if ADA_BUILD_AVX512
    mask |= ADA_ISA_AVX512;
#endif
#if ADA_BUILD_AVX512VNNI
    mask |= ADA_ISA_AVX512VNNI;
#endif
#if ADA_BUILD_AVX512BF16
    mask |= ADA_ISA_AVX512BF16;
#endif
#if ADA_BUILD_AMX
    mask |= ADA_ISA_AMX;
#endif
    return mask;
}

static ada_kernels chosen;
static pthread_once_t chosen_once = PTHREAD_ONCE_INIT;
static void choose(void) { ada_kernels_select(ada_isa_allowed(), &chosen, NULL); }

const ada_kernels *ada_kernels_get(void) {
    pthread_once(&chosen_once, choose);
    return &chosen;
}

const char *ada_slot_name(int index) {
#define SLOT(name) #name,
    static const char *const names[] = {ADA_SLOTS(SLOT)};
#undef SLOT
    return names[index];
}

uint32_t ada_isa_allowed(void) {
    const char *name = getenv("ADAATTN_ISA");
    uint32_t mask = UINT32_MAX;
    if (name) ada_isa_parse(name, &mask);
    return ada_cpu_isa() & mask;
}
