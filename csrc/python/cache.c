/* What adaattn.cache asks of the engine. */
#include "binding.h"

#include <stdio.h>
#include <string.h>

#include "../cache.h"
#include "../codes.h"

int ada_check_tokens(const ada_module_state *state, const char *name, const ada_array *tokens, int64_t B,
                     int64_t G, int64_t width, int64_t count) {
    if (tokens->dtype == ADA_BOOL) {
        PyErr_Format(state->dtype_error, "%s: expected float32, float64, float16 or bfloat16, got bool",
                     name);
        return -1;
    }
    const int64_t n = tokens->ndim == 4 ? tokens->shape[2] : 0;
    if (tokens->ndim == 4 && tokens->shape[0] == B && tokens->shape[1] == G && tokens->shape[3] == width &&
        n > 0 && (count == 0 || n == count))
        return 0;
    char got[96] = "(";
    for (int d = 0; d < tokens->ndim; d++)
        snprintf(got + strlen(got), sizeof got - strlen(got), d ? ", %lld" : "%lld",
                 (long long)tokens->shape[d]);
    char wanted[32] = "N";
    if (count) snprintf(wanted, sizeof wanted, "%lld", (long long)count);
    PyErr_Format(state->shape_error, "%s: expected shape (%lld, %lld, %s, %lld), got %s)", name, (long long)B,
                 (long long)G, wanted, (long long)width, got);
    return -1;
}

/* key and value of a cache and what is to be appended to them, in this order. */
static int views_of_tokens(const ada_module_state *state, PyObject *const *args, ada_pages pages[2],
                           ada_view views[4]) {
    static const char *const names[] = {"key", "value"};
    for (int i = 0; i < 2; i++)
        if (ada_view_of_stored(args[i], &pages[i], NULL, &views[i]) ||
            ada_view_of(state, args[i + 2], names[i], false, &ada_on_cpu, &views[i + 2]))
            return -1;
    for (int i = 0; i < 2; i++) {
        const int64_t *shape = views[i].array.shape;
        if (ada_check_tokens(state, names[i], &views[i + 2].array, shape[0], shape[1], shape[3],
                             i ? views[2].array.shape[2] : 0))
            return -1;
    }
    return 0;
}

PyObject *ada_py_cache_count(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    ada_pages pages[2];
    ada_view views[4] = {0};
    if (nargs != 4)
        return PyErr_Format(PyExc_TypeError, "_cache_count: expected 4 arguments, got %zd", nargs);
    PyObject *count = views_of_tokens(PyModule_GetState(module), args, pages, views)
                          ? NULL
                          : PyLong_FromLongLong(views[2].array.shape[2]);
    for (int i = 0; i < 4; i++) ada_view_release(&views[i]);
    return count;
}

PyObject *ada_py_cache_append(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const ada_module_state *state = PyModule_GetState(module);
    PyObject *result = NULL;
    ada_pages pages[2];
    ada_view views[6] = {0};
    ada_error error;
    if (nargs != 6)
        return PyErr_Format(PyExc_TypeError, "_cache_append: expected 6 arguments, got %zd", nargs);
    if (views_of_tokens(state, args, pages, views) ||
        ada_view_of_numbers(state, args[4], "lengths", ADA_I64, &views[4]) ||
        ada_view_of_numbers(state, args[5], "lengths", ADA_I64, &views[5]))
        goto done;
    const int64_t *lengths = views[4].array.data, *counts = views[5].array.data;
    if (ada_cache_check(&views[0].array, &views[2].array, "key", counts, &error) ||
        ada_cache_check(&views[1].array, &views[3].array, "value", counts, &error)) {
        ada_raise(state, &error);
        goto done;
    }
    for (int i = 0; i < 2; i++) ada_cache_append(&views[i].array, &views[i + 2].array, lengths, counts);
    result = Py_NewRef(Py_None);
done:
    for (int i = 0; i < 6; i++) ada_view_release(&views[i]);
    return result;
}

PyObject *ada_py_cache_reopen(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *stored;
    long long b, page;
    ada_pages pages;
    ada_view view = {0};
    if (!PyArg_ParseTuple(args, "OLL", &stored, &b, &page) || ada_view_of_stored(stored, &pages, NULL, &view))
        return NULL;
    ada_cache_reopen(&view.array, b, page);
    ada_view_release(&view);
    Py_RETURN_NONE;
}

PyObject *ada_py_cache_code(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    PyObject *stored, *until;
    ada_pages pages;
    ada_codes codes;
    ada_error error;
    ada_view view = {0}, numbers = {0};
    int values;
    if (!PyArg_ParseTuple(args, "OpO", &stored, &values, &until) ||
        ada_view_of_stored(stored, &pages, &codes, &view))
        return NULL;
    ada_status status = ADA_ERR_ARGUMENT;
    if (ada_view_of_numbers(state, until, "until", ADA_I64, &numbers) == 0) {
        status = ada_code_pages(&view.array, &codes, values, numbers.array.data, &error);
        if (status) ada_raise(state, &error);
    }
    ada_view_release(&numbers);
    ada_view_release(&view);
    return status ? NULL : Py_NewRef(Py_None);
}
