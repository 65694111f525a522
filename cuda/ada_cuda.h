/* The C ABI between the engine (csrc/gpu.c) and libadaattn_cuda.so: a table of functions behind the one
 * symbol that the library exports. Plain C, no CUDA header.
 *
 * Every function returns 0, or another number and what failed. None throws, exits or keeps memory of the
 * host that it was given. Where "in order" is said, work is put on the problem's stream and not waited for;
 * functions that fill host memory wait for it.
 */
#ifndef ADA_CUDA_H
#define ADA_CUDA_H

#include "../csrc/adaattn.h"

/* Goes up with every change of this file or of ada_problem. */
#define ADA_CUDA_ABI 3
#define ADA_CUDA_SYMBOL "ada_cuda_plugin"

typedef struct {
    int code;       /* of the runtime; below 0 a status of cuBLAS, the sign changed */
    char call[64];  /* what was called */
    char text[192]; /* the runtime's words */
} ada_cuda_failure;
#define ADA_CUDA_NO_MEMORY 2
#define ADA_CUDA_NOT_SUPPORTED 801 /* by this chip, or the library that it takes */
#define ADA_CUDA_ANY_STREAM UINTPTR_MAX

typedef struct {
    char name[128];
    int major, minor; /* compute capability */
    int multiprocessors;
    int64_t memory_bytes;
    uint32_t rungs; /* bit per ada_rung: computed by a kernel of its own; fp64 and fp32 always are */
} ada_cuda_device;

/* A row of a problem: head = b * H + h. */
typedef struct {
    int32_t head, row;
} ada_cuda_row;

/* A key head that is looked at: sums over the keys first ... end - 1 that lie in every step-th block of
 * ADA_CUDA_BLOCK, counted from first's block on. */
#define ADA_CUDA_BLOCK 64
typedef struct {
    int32_t head; /* in: b * G + g */
    int32_t first, end, step;
    float *mean, *variance;                 /* out: [D] of the keys */
    float *value_sum, *value2, *value_most; /* out: [E] of the values: sums, of squares, largest magnitudes */
    double largest2; /* out: sum over keys of their block's largest |key - mean| squared */
} ada_cuda_keys;

/* Of a query: sums of its squares times variances and squared means of its keys, of its squares; its largest.
 */
typedef struct {
    float spread, by_mean, norm2, most;
} ada_cuda_figures;

/* What a product of matrices is computed from, cheap to dear. */
typedef enum {
#define ADA_PRODUCT(NAME, name) ADA_PRODUCT_##NAME,
#include "products.def"
#undef ADA_PRODUCT
    ADA_PRODUCTS
} ada_product;

/* Rows times a weight, all on the device and of one floating dtype. */
#define ADA_CUDA_FEATURES 16
typedef struct {
    int device;
    uintptr_t stream;
    ada_array x, weight, bias, out; /* (M, K), (N, K), (1, N) or not given, (M, N) contiguous */
} ada_cuda_linear;

/* A head that leaves out blocks of ADA_CUDA_BLOCK keys which weigh next to nothing: an output moves by no
 * more than absolute plus relative times the root mean square norm of the values, and a row's sum by no more
 * than the share `most`. That is certain, by bounds of all scores. */
typedef struct {
    int64_t head; /* b * H + h */
    double absolute, relative, most;
    double kept;      /* out: share of the visible blocks that is computed */
    double value_rms; /* out */
} ada_cuda_thin;

#define ADA_CUDA_TRUTHS 10

/* The pages of a cache on a device, each with keys and then values of all heads. A table of 64-bit addresses
 * has a row of so many columns for each sequence: where its open page lies (int8 alone has one, in floats:
 * the tokens behind its full pages), then its pages. Rows are padded to 16 bytes. */
typedef struct ada_cuda_store {
    void *table;
    int64_t columns;
    ada_dtype dtype; /* ADA_F32, ADA_F16, ADA_BF16 or ADA_I8 */
    int64_t B, G, widths[2];
} ada_cuda_store;

static inline int64_t ada_cuda_row_bytes(ada_dtype dtype, int64_t width) {
    const int64_t size = dtype == ADA_F32 ? 4 : dtype == ADA_I8 ? 1 : 2;
    return (width * size + 15) / 16 * 16;
}
/* Of one head of one side; bytes have a scale and means behind them. */
static inline int64_t ada_cuda_head_bytes(ada_dtype dtype, int64_t width) {
    const int64_t more = dtype == ADA_I8 ? (16 + 2 * width + 15) / 16 * 16 : 0;
    return ADA_PAGE * ada_cuda_row_bytes(dtype, width) + more;
}
static inline int64_t ada_cuda_page_bytes(const ada_cuda_store *s, ada_dtype dtype) {
    return s->G * (ada_cuda_head_bytes(dtype, s->widths[0]) + ada_cuda_head_bytes(dtype, s->widths[1]));
}

/* What landmarks are chosen from (csrc/landmarks.h): of each head the mean of its keys, those furthest from
 * it, rows. */
#define ADA_CUDA_FAR 32
typedef struct {
    int64_t head;        /* b * H + h */
    int64_t first, end;  /* the keys that its queries see */
    const int64_t *keys; /* [n_keys] to be sampled */
    int64_t n_keys;
} ada_cuda_sampled;
/* Of all heads. */
typedef struct {
    int64_t keys;         /* the largest n_keys */
    const int64_t *query; /* [queries] to be sampled */
    int64_t queries;
    int64_t measured, step; /* so many queries, every step-th, have their norms taken */
} ada_cuda_sampling;
/* Where a head's floats are, of so many. */
typedef struct {
    int64_t mean;    /* [D] of the keys */
    int64_t spread;  /* sum of their squared distances from it */
    int64_t value2;  /* [2] of squared norms of the values: the sum, and the largest */
    int64_t far2;    /* [ADA_CUDA_FAR] of the furthest keys, descending; -1 where there are fewer */
    int64_t far;     /* likewise which keys, int32_t */
    int64_t query2;  /* [measured] squared norms */
    int64_t keys;    /* [n_keys + ADA_CUDA_FAR][D] the sampled keys, then the furthest */
    int64_t values;  /* [n_keys][E] */
    int64_t queries; /* [queries][D] */
    int64_t floats;
} ada_cuda_sample_at;

static inline ada_cuda_sample_at ada_cuda_sample_layout(int64_t D, int64_t E, const ada_cuda_sampling *s) {
    ada_cuda_sample_at at;
    at.mean = 0, at.spread = at.mean + D;
    at.value2 = at.spread + 1, at.far2 = at.value2 + 2, at.far = at.far2 + ADA_CUDA_FAR;
    at.query2 = at.far + ADA_CUDA_FAR, at.keys = at.query2 + s->measured;
    at.values = at.keys + (s->keys + ADA_CUDA_FAR) * D, at.queries = at.values + s->keys * E;
    at.floats = at.queries + s->queries * D;
    return at;
}

/* A head that landmarks stand for (csrc/lowrank.h): floats of the host. */
#define ADA_CUDA_BIN 256
typedef struct {
    int64_t head, first, end;
    bool whole;   /* all queries see all of these keys; else sums are kept at every ADA_CUDA_BIN of them */
    int32_t rank; /* a multiple of 16 */
    double query_factor, key_factor;
    const float *mean, *point, *basis; /* [D], [rank][D], [rank][rank] */
    double gain, limit;                /* of a row's residual over its squared sum: to budgets, and at most */
} ada_cuda_landmarks;

/* A problem on its way: its vectors on the device. */
typedef struct ada_cuda_call ada_cuda_call;

typedef struct {
    uint32_t abi, problem_bytes;
    const char *version;

    /* driver 0: there is none, and then no device */
    int (*count)(int *devices, int *driver, int *runtime, ada_cuda_failure *failure);
    int (*describe)(int device, ada_cuda_device *about, ada_cuda_failure *failure);

    /* Memory of a device, in order; release on ADA_CUDA_ANY_STREAM waits for all that the device does. */
    int (*allocate)(int device, uintptr_t stream, int64_t bytes, void **memory, ada_cuda_failure *failure);
    int (*release)(int device, uintptr_t stream, void *memory, ada_cuda_failure *failure);
    /* Through pinned memory. upload: from may be reused afterwards. */
    int (*upload)(int device, uintptr_t stream, void *to, const void *from, int64_t bytes,
                  ada_cuda_failure *failure);
    int (*download)(int device, uintptr_t stream, void *to, const void *from, int64_t bytes,
                    ada_cuda_failure *failure);
    int (*synchronize)(int device, uintptr_t stream, ada_cuda_failure *failure);
    /* What comes on `later` waits for what stands on `earlier` by now. */
    int (*order)(int device, uintptr_t earlier, uintptr_t later, ada_cuda_failure *failure);

    /* The problem is copied; its arrays lie on its device. close frees everything, in order, also after
     * failures; call may be NULL. */
    int (*open)(const ada_problem *problem, ada_cuda_call **call, ada_cuda_failure *failure);
    void (*close)(ada_cuda_call *call);
    /* Whether a kernel of the device computes this choice for this problem. */
    bool (*computes)(const ada_cuda_call *call, ada_choice choice);
    /* Whether no element of a float mask is NaN or +inf. */
    int (*check_mask)(ada_cuda_call *call, bool *good, ada_cuda_failure *failure);
    /* To be called before execute by those who want to know of which heads it did rows again, and then they
     * hear: [B * H], 0 or not. */
    int (*watch)(ada_cuda_call *call, ada_cuda_failure *failure);
    int (*watched)(ada_cuda_call *call, uint32_t *again, ada_cuda_failure *failure);
    /* Out and lse of the listed heads (ascending; NULL: all), in order. Rows that the choice cannot hold are
     * computed in fp64. */
    int (*execute)(ada_cuda_call *call, ada_choice choice, const int64_t *heads, int64_t n,
                   ada_cuda_failure *failure);

    /* Looks at key heads, and at queries of theirs. */
    int (*probe)(ada_cuda_call *call, ada_cuda_keys *keys, int64_t n, const ada_cuda_row *rows,
                 int64_t n_rows, ada_cuda_figures *figures, ada_cuda_failure *failure);
    /* Exact rows, o [n][E] and lse [n], in double or, f64 being false, in float; and the same rows of what
     * was executed (lse 0 where there is none), unless out_o is NULL. Rows of a head come together. */
    int (*rows)(ada_cuda_call *call, const ada_cuda_row *rows, int64_t n, bool f64, double *o, double *lse,
                double *out_o, double *out_lse, ada_cuda_failure *failure);
    /* [B * H][T] squared norms of the output's rows. */
    int (*row_norms)(ada_cuda_call *call, float *norms, ada_cuda_failure *failure);

    /* Opens cuBLAS on a device: the one that the process has already (NULL), of this path, or of this name
     * where the system's loader finds it. Once one works, it stays, and is the one of every device. */
    int (*open_blas)(const char *path, int device, ada_cuda_failure *failure);
    /* out = x weight^T + bias, in order. All but fp64 of arrays that are not, and no rows, take cuBLAS, which
     * does not support every product of every dtype (adaattn.gpu_products knows which are worth asking for).
     */
    int (*multiply)(const ada_cuda_linear *linear, ada_product product, ada_cuda_failure *failure);
    /* Relative error of out in the Frobenius norm, from up to ADA_CUDA_FEATURES of its columns in double. */
    int (*product_error)(const ada_cuda_linear *linear, const int32_t *features, int n, double *error,
                         ada_cuda_failure *failure);

    /* Whether a kernel of the device computes this choice for this problem with blocks left out. */
    bool (*leaves_out)(const ada_cuda_call *call, ada_choice choice);
    /* Fills in what so many tiles of queries of each of these heads (ascending) say. */
    int (*look_at_blocks)(ada_cuda_call *call, ada_choice choice, ada_cuda_thin *heads, int64_t n,
                          int32_t tiles, ada_cuda_failure *failure);
    /* execute for heads that leave out blocks. tell: kept and value_rms are filled in, which waits, and the
     * picture, where there is one, is added to. */
    int (*execute_thin)(ada_cuda_call *call, ada_choice choice, ada_cuda_thin *heads, int64_t n, bool tell,
                        ada_picture *picture, ada_cuda_failure *failure);

    /* Gradients of the call, which was opened for backward->p, in order; the mask's result is broadcast like
     * the mask. Choices: fp64, fp32, or fp16 or bf16 twice for arrays of that dtype. again: [B * G], NULL if
     * not wanted: whether float64 computed a key head. */
    int (*gradients)(ada_cuda_call *call, const ada_backward_problem *backward, ada_choice choice,
                     uint32_t *again, ada_cuda_failure *failure);

    /* All of these in order. */
    int (*merge)(int device, uintptr_t stream, const ada_merge_problem *merge, ada_cuda_failure *failure);
    /* Elements of one array (B, G, N, width) to another of the same shape. */
    int (*convert)(int device, uintptr_t stream, const ada_array *to, const ada_array *from,
                   ada_cuda_failure *failure);
    /* The call's keys and values lie in a cache: execute takes ADA_RUNG_FP32 alone. */
    void (*use_store)(ada_cuda_call *call, const ada_cuda_store *store);
    /* Addresses into a table: to[at[i]] = address[i]. */
    int (*store_set)(int device, uintptr_t stream, void *table, const int64_t *at, const uint64_t *address,
                     int64_t n, ada_cuda_failure *failure);
    /* Pages from addresses to others, none of them twice. */
    int (*store_copy)(int device, uintptr_t stream, const uint64_t *to, const uint64_t *from, int64_t n,
                      int64_t bytes, ada_cuda_failure *failure);
    /* The first counts[b] tokens of key and value (B, G, N, width) behind the first lengths[b] ones. */
    int (*store_append)(int device, uintptr_t stream, const ada_cuda_store *store, const ada_array *key,
                        const ada_array *value, const int64_t *lengths, const int64_t *counts,
                        ada_cuda_failure *failure);
    /* Turns page pages[i] of sequence sequences[i] into its open page. */
    int (*store_reopen)(int device, uintptr_t stream, const ada_cuda_store *store, const int64_t *sequences,
                        const int64_t *pages, int64_t n, ada_cuda_failure *failure);
    /* The first lengths[b] tokens into contiguous arrays (B, G, S, width) of a floating dtype, zeros behind
     * them; scales, unless NULL: of int8 pages of keys, then of values, [2][B][G][columns - 1]. */
    int (*store_read)(int device, uintptr_t stream, const ada_cuda_store *store, const int64_t *lengths,
                      const ada_array *key, const ada_array *value, float *scales, ada_cuda_failure *failure);

    /* Of heads, each so many floats. */
    int (*take_sample)(ada_cuda_call *call, const ada_cuda_sampled *heads, int64_t n,
                       const ada_cuda_sampling *what, float *to, ada_cuda_failure *failure);
    /* execute by landmarks, in float, which waits: shift2 [n][T] tells of each row its estimated squared
     * error in budgets; below 0: it is not to be had so, and was not computed. */
    int (*execute_low_rank)(ada_cuda_call *call, const ada_cuda_landmarks *heads, int64_t n, float *shift2,
                            ada_cuda_failure *failure);
    /* These rows exactly for their dtype, in order. */
    int (*execute_rows)(ada_cuda_call *call, const ada_cuda_row *rows, int64_t n, ada_cuda_failure *failure);
    /* Operations that the call's device computes in a second on plain arithmetic of floats, at best. */
    double (*plain_operations)(const ada_cuda_call *call);
    /* Whether what comes on a stream goes into a CUDA graph: such a stream is not ordered with others. */
    int (*captured)(int device, uintptr_t stream, bool *captured, ada_cuda_failure *failure);
    /* To verify gradients that told of key heads in `again`. First their queries, keys and values once more,
     * in fp32 or fp64, for the key heads [B * G] that are not 0, from an lse and an out of their own. */
    int (*gradients_again)(ada_cuda_call *call, const ada_backward_problem *backward, ada_choice choice,
                           const uint32_t *heads, uint32_t *again, ada_cuda_failure *failure);
    /* Of queries [B * H][T][4]: squared norms of grad_out, of grad_out, query and out multiplied, of dQ; and
     * whether it sees a key. Of keys [B * G][S][3]: of dK, of dV; whether a query sees it. */
    int (*gradient_norms)(ada_cuda_call *call, const ada_backward_problem *backward, double *of_queries,
                          double *of_keys, ada_cuda_failure *failure);
    /* Exact rows in double, those of a head (of keys: b * G + g) together, and the same of the results (0
     * where not wanted). Of a query [ADA_CUDA_TRUTHS + 2 * D]: what ada_true_row of csrc/gradient_check.h
     * has, in order, and dQ; of a key [2 * (D + E)]: dK and dV, from what the run knows of its queries. */
    int (*gradient_rows)(ada_cuda_call *call, const ada_backward_problem *backward, bool keys,
                         const ada_cuda_row *rows, int64_t n, double *found, ada_cuda_failure *failure);
} ada_cuda_table;

typedef const ada_cuda_table *ada_cuda_plugin_fn(void);

#endif
