/* AdaAttn's engine: types of one attention call and the functions that validate and run it.
 *
 * Dimensions, here and everywhere: B batch, H query heads, G key/value heads (H a multiple of G),
 * T queries, S keys, D head size, E value head size. Bare numbers are elements; others carry their unit.
 * Nothing here knows Python. Arrays belong to the caller and outlive the call.
 */
#ifndef ADAATTN_H
#define ADAATTN_H

#include <stdbool.h>
#include <stdint.h>

#define ADA_VERSION "0.1.0"

typedef enum {
#define ADA_DTYPE(NAME, name, bytes) ADA_##NAME,
#include "dtypes.def"
#undef ADA_DTYPE
    ADA_BOOL, /* attn_mask */
    ADA_I64,  /* kv_lengths, query_offset */
    ADA_U64,  /* seed */
    ADA_I8    /* codes of a cache's pages */
} ada_dtype;

typedef enum {
    ADA_OK,
    ADA_ERR_ARGUMENT, /* a value that makes no sense */
    ADA_ERR_SHAPE,
    ADA_ERR_DTYPE,
    ADA_ERR_MEMORY,
    ADA_ERR_NUMERICAL, /* a stated tolerance is missed */
    ADA_ERR_DEVICE,    /* a device is missing, or failed */
    ADA_INTERRUPTED
} ada_status;

/* One sentence: the argument, what was expected, what came. */
typedef struct {
    ada_status status;
    char message[320];
} ada_error;

#define ADA_PAGE 64 /* tokens that share a mean and a scale in an int8 cache */

/* How an I8 array (B, G, S, width) is to be read: element = (code - 128) * scale + mean of its page, whose
 * codes lie from its first row on as ada_code_place says; the tokens of sequence b in page open_page[b] lie
 * in open as they came, and those behind it are none. */
typedef struct {
    float *scale;   /* [B][G][pages] */
    uint16_t *mean; /* bfloat16, [B][G][pages][width] */
    float *open;    /* [B][G][ADA_PAGE][width] */
    const int64_t *open_page;
    int64_t pages;
    bool values; /* of tokens, not keys */
} ada_pages;

typedef struct ada_codes ada_codes; /* codes.h */

/* data == NULL: not given. Strides are in bytes and may be zero or negative; data is aligned to the dtype. */
typedef struct {
    void *data;
    ada_dtype dtype;
    int ndim;
    int64_t shape[4];
    int64_t stride[4];
    const ada_pages *pages; /* of an I8 array, else NULL */
    const ada_codes *codes; /* of a cache's pages, or NULL */
    float *figures;         /* of a cache's tokens (cache.h), or NULL */
    int64_t figured;        /* that there is room for, of a head */
} ada_array;

typedef enum { ADA_NOT_CAUSAL, ADA_LOWER_RIGHT, ADA_UPPER_LEFT } ada_causal;

/* What a product is computed from. AUTO: exact for the dtype. */
typedef enum {
    ADA_RUNG_AUTO,
#define ADA_RUNG(NAME, name) ADA_RUNG_##NAME,
#include "rungs.def"
#undef ADA_RUNG
    ADA_RUNG_COUNT
} ada_rung;
const char *ada_rung_name(ada_rung rung);

/* The rungs of one head's scores and values. */
typedef struct {
    ada_rung qk, pv;
} ada_choice;

/* Of a head's visible blocks, by so many parts of its queries and of its keys: how many there are and how
 * many are computed. */
#define ADA_PICTURE_MOST 32
typedef struct {
    int rows, columns;
    uint32_t *visible, *kept; /* (B, H, rows, columns) */
} ada_picture;

/* Of a row whose weights are 2^(score - reference). */
typedef struct {
    float reference, lse; /* in octaves, without the sink; 0 where it sees no key */
    float share;          /* of a key that has the reference for its score, in all weights and the sink's */
    float block;          /* of the heaviest block of ADA_BLOCK keys; 0 where that is not known */
} ada_row_mass;

/* Heads whose keys may stand in for others of their block, on rungs whose kernels can. */
typedef struct {
    const double *budget2, *joint; /* (B, H): mean squared error of a row over own, and joint, of sparse.h; a
                                      budget of 0: none do */
    float *shift2;                 /* (B, H, T): the rows' estimates, in units of the budget */
    double *kept;                  /* (B, H): share of the visible blocks that were computed */
    ada_picture *picture;          /* NULL: not wanted */
} ada_sparse;

#define ADA_UNBOUNDED INT64_MAX

/* One call. The caller fills the first part; ada_problem_init checks it and derives the second. */
typedef struct {
    ada_array query, key,
        value;              /* (B, H, T, D), (B, G, S, D), (B, G, S, E), one floating dtype unless stored */
    ada_array attn_mask;    /* bool or floating, broadcastable to (B, H, T, S) */
    ada_array alibi_slopes; /* F64, (H) or (B, H) */
    ada_array sinks;        /* F64, (H) */
    ada_array kv_lengths;   /* I64, (B) */
    ada_array query_offset; /* I64, () or (B) */
    ada_array seed;         /* U64, () or (B) */
    ada_array out;          /* (B, H, T, E), query's dtype; may be attached after ada_problem_init */
    void *lse;              /* (B, H, T) contiguous, double for F64 arrays, else float; NULL: not wanted */
    ada_causal causal;
    int64_t window_left, window_right;            /* ADA_UNBOUNDED: no limit on that side */
    bool has_softcap, has_scale, has_num_threads; /* else: no cap, 1/sqrt(D), the default */
    double softcap, scale;
    int64_t num_threads;
    double dropout_p;
    ada_choice precision; /* both AUTO or none */
    bool has_tolerance;
    double tolerance;         /* relative error of a head that the caller can bear */
    const ada_sparse *sparse; /* NULL: all heads are dense */
    /* Called once for each head but those of few queries and those that their rung cannot hold; where it can
     * be, by the worker that computed the last tile, while the arrays are at hand. NULL: nobody is. */
    void (*head_done)(void *context, int64_t head, int worker);
    void *done_context;
    ada_row_mass *mass; /* (B, H, T): where rows' weights lie; NULL: not wanted */
    ada_choice *ran;    /* (B, H): what each head was computed with in the end; NULL: not wanted */
    bool stored;        /* key and value come from a cache, each of a dtype of its own */
    bool on_gpu;        /* it is computed on this device; its vectors are memory of the CPU all the same */
    int device;
    uintptr_t stream;                   /* a cudaStream_t, on which the arrays are there and wanted */
    bool staged;                        /* the arrays are memory of the CPU, to be copied there and back */
    const struct ada_cuda_store *paged; /* where key and value lie instead, of a cache on that device, whose
                                           tokens kv_lengths says; NULL: in their arrays */

    int64_t B, H, G, T, S, D, E;
    bool compute_f64;    /* else fp32 accumulation */
    double most_bias;    /* octaves of a biased score that fp32 may hold */
    bool only_f64;       /* fp32 cannot hold the scale */
    uint64_t drop_below; /* a key is dropped when its 32 random bits are below this; 0: no dropout, 2^32: all
                            are, and dropout_p is 0 */
} ada_problem;

/* The only validator. Normalises attn_mask to four dimensions with zero strides where it broadcasts. */
ada_status ada_problem_init(ada_problem *problem, ada_error *error);
/* Whether the device of a problem computes products from this rung, which the named argument asks for. */
ada_status ada_check_rung(const ada_problem *problem, const char *name, ada_rung rung, ada_error *error);
/* Checks out: shape, dtype, every element in a place of its own, none shared with an input. */
ada_status ada_problem_check_out(const ada_problem *problem, ada_error *error);

/* Refuses what a float mask must not hold. */
ada_status ada_check_mask(const ada_problem *problem, bool (*interrupt)(void *), void *context,
                          ada_error *error);
/* Computes out and lse of the listed heads (ascending indices b * H + h; NULL: of all) on the problem's
 * rungs. Interrupted: interrupt(context) was true; out is then undefined. */
ada_status ada_execute(const ada_problem *problem, const int64_t *heads, int64_t n_heads,
                       bool (*interrupt)(void *), void *context, ada_error *error);

/* Exact combination of attention over two disjoint sets of keys. Outputs (B, H, T, E) of one dtype, lse
 * (B, H, T) float or double; a and b in, out and lse out. */
typedef struct {
    ada_array out_a, lse_a, out_b, lse_b, out, lse;
} ada_merge_problem;
ada_status ada_merge_init(const ada_merge_problem *merge, ada_error *error);
ada_status ada_merge(const ada_merge_problem *merge, bool (*interrupt)(void *), void *context,
                     ada_error *error);

/* Gradients of a call with respect to its inputs, in this order. */
enum { ADA_OF_QUERY, ADA_OF_KEY, ADA_OF_VALUE, ADA_OF_MASK, ADA_OF_SINKS, ADA_OF_SLOPES, ADA_GRADIENTS };
const char *ada_gradient_name(int which);

/* From the gradient with respect to the output of the call p, its output and its lse. The caller fills all
 * but the results, ada_backward_init checks it and says what those must be; then they are attached. */
typedef struct {
    ada_problem p; /* its own out and lse are not used */
    ada_array grad_out, out, lse;
    bool needs[ADA_GRADIENTS];
    ada_array results[ADA_GRADIENTS]; /* C-contiguous; only where needed */
} ada_backward_problem;
/* To the four dimensions of a mask, with stride 0 where the array repeats; false when it does not fit. */
bool ada_broadcast(const ada_problem *problem, ada_array *array);
ada_status ada_backward_init(ada_backward_problem *backward, ada_error *error);

/* The bytes that an array covers, from its lowest to behind its highest element. */
void ada_array_extent(const ada_array *array, uintptr_t *low, uintptr_t *high);

const char *ada_dtype_name(ada_dtype dtype);
int ada_dtype_bytes(ada_dtype dtype);

/* Writes the sentence and returns the status. */
ada_status ada_fail(ada_error *error, ada_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The only allocator: 64-byte aligned, NULL when there is no memory. ada_alloc_fail_after(n) makes the
 * (n + 1)-th allocation from now on fail once (for tests), and until then no call gets memory that an earlier
 * one left; a negative n switches that off. */
void *ada_alloc(int64_t bytes);
void ada_free(void *memory);
void ada_alloc_fail_after(int n);
/* For tests of the verification: outputs of rungs below fp32 are wrong by this factor; 1: they are right. */
void ada_narrow_fault(double factor);
double ada_narrow_fault_now(void);

#endif
