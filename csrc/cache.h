/* Writing the arrays of a KV cache: key or value (B, G, capacity, width) in float32, float16, bfloat16 or in
 * pages of int8. */
#ifndef ADA_CACHE_H
#define ADA_CACHE_H

#include "adaattn.h"

/* Whether the first counts[b] tokens of each sequence can be stored: a number that overflows the dtype is an
 * error, and in int8, where it would spoil its whole page, so is a NaN or an infinity. */
ada_status ada_cache_check(const ada_array *store, const ada_array *tokens, const char *name,
                           const int64_t *counts, ada_error *error);

/* Stores these tokens, which have passed the check, behind the first lengths[b] ones; there is room. */
void ada_cache_append(const ada_array *store, const ada_array *tokens, const int64_t *lengths,
                      const int64_t *counts);

/* Makes a closed page of int8 the open one, with what its codes are worth. */
void ada_cache_reopen(const ada_array *store, int64_t b, int64_t page);

#endif
