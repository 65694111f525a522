/* Writing the arrays of a KV cache: key or value (B, G, capacity, width) in float32, float16, bfloat16 or in
 * pages of int8. */
#ifndef ADA_CACHE_H
#define ADA_CACHE_H

#include "adaattn.h"

/* What a step within a tolerance wants to know of the tokens of a head, kept as they come: the mean and the
 * variance of their coordinates, and the sum of the variances, over the first 1, 2, 4, ... 64, 128, 192 and
 * 256 of them and, from then on, over the last page as well of every 512. Figures (B, G, figured,
 * ADA_FIGURE(width)) follow from the tokens before them alone, so truncate has nothing to do. */
#define ADA_FIGURE(width) (2 * (width) + 1)
#define ADA_FIGURE_PAGES 8

/* The last figures of so many tokens; -1: there are none. */
static inline int64_t ada_last_figures(int64_t tokens) {
    if (tokens < ADA_PAGE) return tokens < 1 ? -1 : 63 - __builtin_clzll((uint64_t)tokens);
    const int64_t pages = tokens / ADA_PAGE;
    return pages < ADA_FIGURE_PAGES ? (pages < 4 ? 5 + pages : 9) : 9 + pages / ADA_FIGURE_PAGES;
}

/* Of how many tokens they are. */
static inline int64_t ada_figured_tokens(int64_t at) {
    return at <= 6 ? (int64_t)1 << at : (at - 5) * ADA_PAGE;
}

/* Whether the first counts[b] tokens of each sequence can be stored: a number that overflows the dtype is an
 * error, and in int8, where it would spoil its whole page, so is a NaN or an infinity. */
ada_status ada_cache_check(const ada_array *store, const ada_array *tokens, const char *name,
                           const int64_t *counts, ada_error *error);

/* Stores these tokens, which have passed the check, behind the first lengths[b] ones, and their figures;
 * there is room. */
void ada_cache_append(const ada_array *store, const ada_array *tokens, const int64_t *lengths,
                      const int64_t *counts);

/* Makes a closed page of int8 the open one, with what its codes are worth. */
void ada_cache_reopen(const ada_array *store, int64_t b, int64_t page);

#endif
