/* Scratch memory of a call: 64-byte aligned, kept by the thread for its next call when it is small, because
 * fresh pages would cost more than a small call. NULL when there is no memory. */
#ifndef ADA_MEMORY_H
#define ADA_MEMORY_H

#include <stddef.h>
#include <stdint.h>

void *ada_scratch_take(int64_t bytes);
void ada_scratch_give_back(void *memory);
/* From now on blocks of up to so many bytes are kept. */
void ada_scratch_keep(int64_t bytes);

/* Hands out consecutive pieces of a block of memory, or counts their bytes when base is NULL. */
typedef struct {
    char *base;
    int64_t used;
} ada_carver;

static inline void *ada_carve(ada_carver *c, int64_t bytes) {
    void *piece = c->base ? c->base + c->used : NULL;
    c->used += (bytes + 63) / 64 * 64;
    return piece;
}

#endif
