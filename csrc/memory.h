/* Scratch memory of a call: 64-byte aligned, kept by the thread for its next call when it is small, because
 * fresh pages would cost more than a small call. NULL when there is no memory. */
#ifndef ADA_MEMORY_H
#define ADA_MEMORY_H

#include <stddef.h>
#include <stdint.h>

void *ada_scratch_take(int64_t bytes);
void ada_scratch_give_back(void *memory);

#endif
