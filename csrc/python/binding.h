/* What the files of csrc/python share. Only they see Python.h and NumPy. */
#ifndef ADA_BINDING_H
#define ADA_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <limits.h>
#include <Python.h>
#include <stdbool.h>

#include "../adaattn.h"
#include "../plan.h"
#include "dlpack.h"

/* module.c: one per module object, never changed after its exec. */
typedef struct {
    PyObject *argument_error, *shape_error, *dtype_error, *device_error, *numerical_error;
} ada_module_state;

/* error.c */
int ada_errors_import(ada_module_state *state); /* 0, or -1 with a Python exception */
void ada_errors_clear(ada_module_state *state);
/* Raises what error says (nothing for an interrupted call: the signal's own exception is set). Returns NULL.
 */
PyObject *ada_raise(const ada_module_state *state, const ada_error *error);

/* Where the arrays of a call are expected. Zeros: in the CPU's memory. */
typedef struct {
    bool on_gpu; /* they lie there */
    int device;
    uintptr_t stream; /* that the call works on */
    bool wait;        /* the owner does not know that stream: the call waits for it */
    bool staged;      /* they are NumPy's, to be copied there and back */
} ada_place;
extern const ada_place ada_on_cpu;

/* array.c */
int ada_array_import_numpy(void);
/* The type's dlpack_exchange, where it has a view; else NULL, without an exception. */
const dlpack_exchange *ada_exchange_of(PyObject *object);
/* On which its arrays are worked on now. */
uintptr_t ada_current_stream(const dlpack_exchange *exchange, int device);
/* What __dlpack_device__ says. */
int ada_dlpack_device(PyObject *object, int *type, int *id);
bool ada_is_cuda(int dlpack_type);

/* An array and what keeps its memory alive. */
typedef struct {
    ada_array array;
    PyObject *owner; /* a reference of ours, or NULL */
} ada_view;

void ada_view_release(ada_view *view);
/* A NumPy array or anything with __dlpack__ at this place, read where it lies (on the CPU copied once if it
 * is not aligned or of foreign byte order). writable: it will be written, so neither read-only nor copied. 0,
 * or -1 with an exception. */
int ada_view_of(const ada_module_state *state, PyObject *object, const char *name, bool writable,
                const ada_place *place, ada_view *view);
/* A small vector that may be any sequence of numbers: converted to F64, I64 or U64. None gives data == NULL.
 */
int ada_view_of_numbers(const ada_module_state *state, PyObject *object, const char *name, ada_dtype dtype,
                        ada_view *view);
/* One side of a cache, adaattn.cache.Stored: a tuple (dtype name, data, scale, mean, open, open_page), the
 * last four None but for int8, and where there are codes a tuple (codes, fine codes, scale, centre, norms,
 * coded) more. It is made by adaattn.cache alone, so only what would crash is checked. codes NULL: they are
 * not wanted. */
bool ada_is_stored(PyObject *object);
int ada_view_of_stored(PyObject *object, ada_pages *pages, ada_codes *codes, ada_view *view);
/* The elements of a NumPy array made by the package: C-contiguous, of so many floats, doubles or (I8)
 * unsigned bytes, as long as it lives. NULL with an exception where it is another. */
void *ada_elements_of(PyObject *object, ada_dtype dtype, int64_t count);
/* A new NumPy array, C-contiguous; bfloat16 takes its NumPy dtype from like. */
PyObject *ada_new_array(ada_dtype dtype, int ndim, const int64_t *shape, PyObject *like);
bool ada_is_numpy(PyObject *object);

/* arguments.c: 0, or -1 with an exception that names the argument. */
int ada_number_of(const ada_module_state *state, PyObject *object, const char *name, double *value);
/* Values beyond 64 bits become the nearest one. */
int ada_integer_of(const ada_module_state *state, PyObject *object, const char *name, const char *expected,
                   int64_t *value);
/* Anything that is true or false. */
int ada_flag_of(const ada_module_state *state, PyObject *object, const char *name, bool *value);
/* One of the names, as its index. */
int ada_name_of(const ada_module_state *state, PyObject *object, const char *argument, const char *expected,
                const char *const names[], int n, int *index);
/* causal, window, softcap, alibi_slopes, sinks, kv_lengths, query_offset, scale, dropout_p, seed. */
enum { ADA_OPTION_VIEWS = 5 };
int ada_options_of(const ada_module_state *state, PyObject *const *args, ada_view *views, ada_problem *p);
int ada_threads_of(const ada_module_state *state, PyObject *object, ada_problem *p);
/* "auto", a rung, or a pair of rungs (scores, values). */
int ada_precision_of(const ada_module_state *state, PyObject *object, ada_choice *choice);
/* Made by adaattn.rates alone: only what would crash is checked. */
int ada_rates_of(const ada_module_state *state, PyObject *object, ada_rate table[ADA_CANDIDATES]);

/* module.c */
typedef struct {
    PyThreadState *thread;
} ada_released_gil;
/* For the engine: whether a signal's handler raised an exception. context: an ada_released_gil. */
bool ada_interrupted(void *context);
/* A new output of the kind that query is: a NumPy array, or what allocate(query, shape, dtype name) makes. */
PyObject *ada_new_output(PyObject *query, PyObject *allocate, ada_dtype dtype, int ndim,
                         const int64_t *shape);

/* backward.c */
PyObject *ada_py_attention_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

/* cache.c */
PyObject *ada_py_cache_count(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *ada_py_cache_append(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *ada_py_cache_reopen(PyObject *module, PyObject *args);
PyObject *ada_py_cache_code(PyObject *module, PyObject *args);
/* Whether tokens (B, G, N, width) fit; count: N, 0 where it is free. 0, or -1 with an exception. */
int ada_check_tokens(const ada_module_state *state, const char *name, const ada_array *tokens, int64_t B,
                     int64_t G, int64_t width, int64_t count);

/* store.c: caches on a GPU. adaattn.pages alone makes what tells of one, a tuple Paged (dtype name, address of
 * the table, its columns, B, G, D, E, tokens of the longest sequence, device). */
struct ada_cuda_store;
bool ada_is_paged(PyObject *object);
/* Key and value of a problem that is at this place. */
int ada_use_paged(const ada_module_state *state, PyObject *object, const ada_place *place,
                  struct ada_cuda_store *store, ada_problem *p);
PyObject *ada_py_store_bytes(PyObject *module, PyObject *args);
PyObject *ada_py_store_address(PyObject *module, PyObject *array);
PyObject *ada_py_store_stream(PyObject *module, PyObject *like);
PyObject *ada_py_store_set(PyObject *module, PyObject *args);
PyObject *ada_py_store_copy(PyObject *module, PyObject *args);
PyObject *ada_py_store_count(PyObject *module, PyObject *args);
PyObject *ada_py_store_append(PyObject *module, PyObject *args);
PyObject *ada_py_store_reopen(PyObject *module, PyObject *args);
PyObject *ada_py_store_read(PyObject *module, PyObject *args);
PyObject *ada_py_gpu_numbers(PyObject *module, PyObject *array);

/* linear.c */
PyObject *ada_py_linear(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *ada_py_gpu_linear(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

/* device.c */
/* Where a call with this query and this device argument works. Opens the CUDA backend if it is on a GPU. */
int ada_place_of(PyObject *query, PyObject *device, ada_place *place);
/* A new reference to the object, or to its copy on the CPU if it is an array of a GPU. */
PyObject *ada_on_host(PyObject *object);
PyObject *ada_py_gpu_load(PyObject *module, PyObject *path);
PyObject *ada_py_gpu_describe(PyObject *module, PyObject *none);
PyObject *ada_py_gpu_allocate(PyObject *module, PyObject *args);
PyObject *ada_py_gpu_export(PyObject *module, PyObject *args);
PyObject *ada_py_gpu_order(PyObject *module, PyObject *args);
PyObject *ada_py_gpu_captured(PyObject *module, PyObject *args);
PyObject *ada_py_gpu_open_blas(PyObject *module, PyObject *args);

/* inspect.c: methods of the module, for tests. */
PyObject *ada_py_plan_head(PyObject *module, PyObject *args);
PyObject *ada_py_narrow_fault(PyObject *module, PyObject *object);
PyObject *ada_py_sample_rows(PyObject *module, PyObject *args);
PyObject *ada_py_limit_error(PyObject *module, PyObject *args);

#endif
