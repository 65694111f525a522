/* What adaattn.pages asks of the engine: caches on a GPU. */
#include "binding.h"

#include <string.h>

#include "../gpu_store.h"

static const ada_dtype kinds[] = {ADA_F32, ADA_F16, ADA_BF16, ADA_I8};

static int kind_of(const char *name, ada_dtype *dtype) {
    static const char *const names[] = {"fp32", "fp16", "bf16", "int8"};
    for (int i = 0; i < 4; i++)
        if (strcmp(names[i], name) == 0) {
            *dtype = kinds[i];
            return 0;
        }
    PyErr_SetString(PyExc_TypeError, "Paged: expected what adaattn.pages makes");
    return -1;
}

bool ada_is_paged(PyObject *object) {
    return PyTuple_Check(object) && strcmp(Py_TYPE(object)->tp_name, "Paged") == 0;
}

static int store_of(PyObject *object, ada_cuda_store *store, long long *tokens, int *device) {
    const char *name;
    unsigned long long table;
    long long columns, B, G, D, E;
    if (!PyArg_ParseTuple(object, "sKLLLLLLi", &name, &table, &columns, &B, &G, &D, &E, tokens, device))
        return -1;
    *store = (ada_cuda_store){(void *)(uintptr_t)table, columns, ADA_F32, B, G, {D, E}};
    return kind_of(name, &store->dtype);
}

int ada_use_paged(const ada_module_state *state, PyObject *object, const ada_place *place,
                  struct ada_cuda_store *store, ada_problem *p) {
    long long tokens;
    int device;
    if (store_of(object, store, &tokens, &device)) return -1;
    if (!place->on_gpu || place->device != device) {
        PyErr_Format(state->device_error,
                     "query: expected memory of CUDA device %d, where the cache lies, got another's", device);
        return -1;
    }
    ada_array *const sides[] = {&p->key, &p->value};
    for (int i = 0; i < 2; i++)
        *sides[i] = (ada_array){.data = store->table,
                                .dtype = ADA_F32,
                                .ndim = 4,
                                .shape = {store->B, store->G, tokens, store->widths[i]}};
    p->paged = store, p->stored = true;
    return 0;
}

PyObject *ada_py_store_bytes(PyObject *module, PyObject *args) {
    const char *name;
    long long G, D, E;
    ada_dtype dtype;
    const ada_module_state *state = PyModule_GetState(module);
    if (!PyArg_ParseTuple(args, "sLLL", &name, &G, &D, &E) || kind_of(name, &dtype)) return NULL;
    if (!ada_gpu_table()->store_append)
        return PyErr_Format(state->device_error,
                            "device: expected None, since the CUDA backend %s keeps no "
                            "caches",
                            ada_gpu_table()->version);
    const ada_cuda_store store = {NULL, 0, dtype, 1, G, {D, E}};
    return Py_BuildValue("(LL)", (long long)ada_cuda_page_bytes(&store, dtype),
                         (long long)ada_cuda_page_bytes(&store, ADA_F32));
}

/* The end of what was put on the stream of this place: waited for where its owner does not know the stream.
 */
static PyObject *end_of(const ada_module_state *state, const ada_place *place, int failed,
                        ada_cuda_failure *failure) {
    ada_error error;
    if (!failed && place->wait) failed = ada_gpu_table()->synchronize(place->device, place->stream, failure);
    if (!failed) return Py_NewRef(Py_None);
    ada_gpu_fail(failure, &error);
    return ada_raise(state, &error);
}

PyObject *ada_py_store_address(PyObject *module, PyObject *array) {
    ada_place place;
    ada_view view = {0};
    if (ada_place_of(array, Py_None, &place) ||
        ada_view_of(PyModule_GetState(module), array, "memory", true, &place, &view))
        return NULL;
    PyObject *address = PyLong_FromUnsignedLongLong((uintptr_t)view.array.data);
    ada_view_release(&view);
    return address;
}

/* The stream that is current for the array's library. */
PyObject *ada_py_store_stream(PyObject *module, PyObject *like) {
    (void)module;
    ada_place place;
    return ada_place_of(like, Py_None, &place) ? NULL : PyLong_FromUnsignedLongLong(place.stream);
}

/* Two vectors of as many numbers. */
static int views_of_vectors(const ada_module_state *state, PyObject *a, ada_dtype a_dtype, PyObject *b,
                            ada_dtype b_dtype, ada_view views[2]) {
    if (ada_view_of_numbers(state, a, "at", a_dtype, &views[0]) ||
        ada_view_of_numbers(state, b, "to", b_dtype, &views[1]))
        return -1;
    if (views[0].array.ndim == 1 && views[1].array.ndim == 1 &&
        views[0].array.shape[0] == views[1].array.shape[0])
        return 0;
    PyErr_SetString(PyExc_TypeError, "pages: expected vectors of one length");
    return -1;
}

PyObject *ada_py_store_set(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    PyObject *like, *at, *addresses, *result = NULL;
    unsigned long long table;
    ada_place place;
    ada_view views[2] = {0};
    ada_cuda_failure failure;
    if (!PyArg_ParseTuple(args, "OKOO", &like, &table, &at, &addresses)) return NULL;
    if (ada_place_of(like, Py_None, &place) == 0 &&
        views_of_vectors(state, at, ADA_I64, addresses, ADA_U64, views) == 0)
        result = end_of(state, &place,
                        ada_gpu_table()->store_set(place.device, place.stream, (void *)(uintptr_t)table,
                                                   views[0].array.data, views[1].array.data,
                                                   views[0].array.shape[0], &failure),
                        &failure);
    for (int i = 0; i < 2; i++) ada_view_release(&views[i]);
    return result;
}

PyObject *ada_py_store_copy(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    PyObject *like, *to, *from, *result = NULL;
    long long bytes;
    ada_place place;
    ada_view views[2] = {0};
    ada_cuda_failure failure;
    if (!PyArg_ParseTuple(args, "OOOL", &like, &to, &from, &bytes)) return NULL;
    if (ada_place_of(like, Py_None, &place) == 0 &&
        views_of_vectors(state, to, ADA_U64, from, ADA_U64, views) == 0)
        result =
            end_of(state, &place,
                   ada_gpu_table()->store_copy(place.device, place.stream, views[0].array.data,
                                               views[1].array.data, views[0].array.shape[0], bytes, &failure),
                   &failure);
    for (int i = 0; i < 2; i++) ada_view_release(&views[i]);
    return result;
}

/* Tokens for a cache, which lie on its device. */
static int views_of_tokens(const ada_module_state *state, PyObject *key, PyObject *value,
                           const ada_cuda_store *store, ada_place *place, ada_view views[2]) {
    static const char *const names[] = {"key", "value"};
    PyObject *const arrays[] = {key, value};
    if (ada_place_of(key, Py_None, place)) return -1;
    for (int i = 0; i < 2; i++)
        if (ada_view_of(state, arrays[i], names[i], false, place, &views[i]) ||
            ada_check_tokens(state, names[i], &views[i].array, store->B, store->G, store->widths[i],
                             i ? views[0].array.shape[2] : 0))
            return -1;
    return 0;
}

PyObject *ada_py_store_count(PyObject *module, PyObject *args) {
    PyObject *paged, *key, *value, *count = NULL;
    ada_cuda_store store;
    long long tokens;
    int device;
    ada_place place;
    ada_view views[2] = {0};
    if (!PyArg_ParseTuple(args, "OOO", &paged, &key, &value) || store_of(paged, &store, &tokens, &device))
        return NULL;
    if (views_of_tokens(PyModule_GetState(module), key, value, &store, &place, views) == 0)
        count = PyLong_FromLongLong(views[0].array.shape[2]);
    for (int i = 0; i < 2; i++) ada_view_release(&views[i]);
    return count;
}

PyObject *ada_py_store_append(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    PyObject *paged, *key, *value, *lengths, *counts, *result = NULL;
    ada_cuda_store store;
    long long tokens;
    int device;
    ada_place place;
    ada_view views[4] = {0};
    ada_cuda_failure failure;
    if (!PyArg_ParseTuple(args, "OOOOO", &paged, &key, &value, &lengths, &counts) ||
        store_of(paged, &store, &tokens, &device))
        return NULL;
    if (views_of_tokens(state, key, value, &store, &place, views) == 0 &&
        views_of_vectors(state, lengths, ADA_I64, counts, ADA_I64, views + 2) == 0)
        result = end_of(state, &place,
                        ada_gpu_table()->store_append(place.device, place.stream, &store, &views[0].array,
                                                      &views[1].array, views[2].array.data,
                                                      views[3].array.data, &failure),
                        &failure);
    for (int i = 0; i < 4; i++) ada_view_release(&views[i]);
    return result;
}

PyObject *ada_py_store_reopen(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    PyObject *like, *paged, *sequences, *pages, *result = NULL;
    ada_cuda_store store;
    long long tokens;
    int device;
    ada_place place;
    ada_view views[2] = {0};
    ada_cuda_failure failure;
    if (!PyArg_ParseTuple(args, "OOOO", &like, &paged, &sequences, &pages) ||
        store_of(paged, &store, &tokens, &device))
        return NULL;
    if (ada_place_of(like, Py_None, &place) == 0 &&
        views_of_vectors(state, sequences, ADA_I64, pages, ADA_I64, views) == 0)
        result = end_of(state, &place,
                        ada_gpu_table()->store_reopen(place.device, place.stream, &store, views[0].array.data,
                                                      views[1].array.data, views[0].array.shape[0], &failure),
                        &failure);
    for (int i = 0; i < 2; i++) ada_view_release(&views[i]);
    return result;
}

/* A new array of floats and where they go. */
static PyObject *new_floats(const ada_module_state *state, const int64_t shape[4], float **to) {
    ada_view view = {0};
    PyObject *array = ada_new_array(ADA_F32, 4, shape, NULL);
    if (array && ada_view_of(state, array, "numbers", true, &ada_on_cpu, &view)) Py_CLEAR(array);
    *to = view.array.data;
    ada_view_release(&view);
    return array;
}

PyObject *ada_py_store_read(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    PyObject *like, *paged, *lengths, *result = NULL, *arrays[3] = {NULL};
    ada_cuda_store store;
    long long tokens;
    int device;
    ada_place place;
    ada_view view = {0};
    ada_error error;
    float *to[3] = {NULL};
    if (!PyArg_ParseTuple(args, "OOO", &like, &paged, &lengths) || store_of(paged, &store, &tokens, &device))
        return NULL;
    const int64_t shapes[3][4] = {{store.B, store.G, tokens, store.widths[0]},
                                  {store.B, store.G, tokens, store.widths[1]},
                                  {2, store.B, store.G, store.columns - 1}};
    bool made = ada_place_of(like, Py_None, &place) == 0 &&
                ada_view_of_numbers(state, lengths, "lengths", ADA_I64, &view) == 0;
    for (int i = 0; made && i < 3; i++) made = (arrays[i] = new_floats(state, shapes[i], &to[i])) != NULL;
    if (made && ada_gpu_read_store(&store, device, place.stream, view.array.data, tokens, to,
                                   store.dtype == ADA_I8 ? to[2] : NULL, &error))
        ada_raise(state, &error);
    else if (made)
        result = PyTuple_Pack(3, arrays[0], arrays[1], arrays[2]);
    for (int i = 0; i < 3; i++) Py_XDECREF(arrays[i]);
    ada_view_release(&view);
    return result;
}

PyObject *ada_py_gpu_numbers(PyObject *module, PyObject *array) {
    const ada_module_state *state = PyModule_GetState(module);
    ada_place place;
    ada_view view = {0};
    ada_error error;
    float *to;
    if (ada_place_of(array, Py_None, &place) || ada_view_of(state, array, "query", false, &place, &view))
        return NULL;
    PyObject *result = new_floats(state, view.array.shape, &to);
    if (result && ada_gpu_read_array(&view.array, place.device, place.stream, to, &error)) {
        Py_CLEAR(result);
        ada_raise(state, &error);
    }
    ada_view_release(&view);
    return result;
}
