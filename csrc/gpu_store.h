/* Caches on a GPU, whose keys and values lie in pages, and results of attention that are merged there. */
#ifndef ADA_GPU_STORE_H
#define ADA_GPU_STORE_H

#include "gpu.h"

/* Queries of all heads that share keys, for which the pages are read as they are. */
#define ADA_GPU_FEW_ROWS 16

/* Whether a call reads the pages themselves, in fp32; else they become arrays first. */
bool ada_gpu_reads_pages(const ada_problem *p, const ada_budget *budget);

/* ada_gpu_attend on arrays of the pages' tokens: of query's dtype where that holds them, else of float32. */
ada_status ada_gpu_attend_gathered(const ada_problem *p, ada_budget *budget, bool (*interrupt)(void *),
                                   void *context, ada_error *error);

/* The tokens of a store in floats, (B, G, tokens, width) each, and unless scales is NULL those of its int8
 * pages, [2][B][G][columns - 1], to the CPU. */
ada_status ada_gpu_read_store(const ada_cuda_store *store, int device, uintptr_t stream,
                              const int64_t *lengths, int64_t tokens, float *to[2], float *scales,
                              ada_error *error);
/* An array of the device, contiguous and in floats, to the CPU. */
ada_status ada_gpu_read_array(const ada_array *from, int device, uintptr_t stream, float *to,
                              ada_error *error);

ada_status ada_gpu_merge(const ada_merge_problem *m, int device, uintptr_t stream, bool wait,
                         ada_error *error);

#endif
