/* The only allocator, and the scratch memory that calls on one thread share one after the other. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "adaattn.h"
#include "memory.h"

static atomic_int allocations_left = -1;

void ada_alloc_fail_after(int n) { atomic_store(&allocations_left, n); }

static bool one_is_to_fail(void) {
    return atomic_load_explicit(&allocations_left, memory_order_relaxed) >= 0;
}

void *ada_alloc(int64_t bytes) {
    if (one_is_to_fail() && atomic_fetch_sub(&allocations_left, 1) == 0) return NULL;
    void *memory;
    return posix_memalign(&memory, 64, bytes ? (size_t)bytes : 1) ? NULL : memory;
}

void ada_free(void *memory) { free(memory); }

/* What a thread keeps between calls: the last blocks that it gave back, as many as a call and one inside it
 * need. Larger ones are returned at once, though their next pages cost 2 % of a call. */
static _Atomic int64_t kept_bytes = 16 << 20;
void ada_scratch_keep(int64_t bytes) { atomic_store(&kept_bytes, bytes); }

typedef struct block {
    int64_t bytes;
    struct block *next;
    _Alignas(64) char memory[];
} block;

static pthread_key_t kept_key;
static pthread_once_t kept_once = PTHREAD_ONCE_INIT;
static void free_kept(void *kept) {
    for (block *b = kept, *next; b; b = next) next = b->next, ada_free(b);
}
static void kept_init(void) { pthread_key_create(&kept_key, free_kept); }

void *ada_scratch_take(int64_t bytes) {
    pthread_once(&kept_once, kept_init);
    block *kept = pthread_getspecific(kept_key);
    if (kept && !one_is_to_fail()) {
        pthread_setspecific(kept_key, kept->next);
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
    used->next = pthread_getspecific(kept_key);
    const bool enough = used->next && used->next->next;
    if (enough || used->bytes > atomic_load(&kept_bytes) || pthread_setspecific(kept_key, used))
        ada_free(used);
}
