/* The only allocator, and the scratch memory that calls on one thread share one after the other. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "adaattn.h"
#include "memory.h"

static atomic_int allocations_left = -1;

void ada_alloc_fail_after(int n) { atomic_store(&allocations_left, n); }

void *ada_alloc(int64_t bytes) {
    if (atomic_load_explicit(&allocations_left, memory_order_relaxed) >= 0 &&
        atomic_fetch_sub(&allocations_left, 1) == 0)
        return NULL;
    void *memory;
    return posix_memalign(&memory, 64, bytes ? (size_t)bytes : 1) ? NULL : memory;
}

void ada_free(void *memory) { free(memory); }

/* What a thread keeps between calls; larger blocks are returned at once. */
static _Atomic int64_t kept_bytes = 4 << 20;
void ada_scratch_keep(int64_t bytes) { atomic_store(&kept_bytes, bytes); }

typedef struct {
    int64_t bytes;
    _Alignas(64) char memory[];
} block;

static pthread_key_t kept_key;
static pthread_once_t kept_once = PTHREAD_ONCE_INIT;
static void kept_init(void) { pthread_key_create(&kept_key, free); }

void *ada_scratch_take(int64_t bytes) {
    pthread_once(&kept_once, kept_init);
    block *kept = pthread_getspecific(kept_key);
    if (kept) {
        pthread_setspecific(kept_key, NULL); /* a call inside this one takes its own */
        if (kept->bytes >= bytes) return kept->memory;
        ada_free(kept);
    }
    block *fresh = ada_alloc(bytes + (int64_t)sizeof(block));
    if (!fresh) return NULL;
    fresh->bytes = bytes;
    return fresh->memory;
}

void ada_scratch_give_back(void *memory) {
    block *used = (block *)((char *)memory - offsetof(block, memory));
    block *kept = pthread_getspecific(kept_key);
    if (kept || used->bytes > atomic_load(&kept_bytes) || pthread_setspecific(kept_key, used)) ada_free(used);
}
