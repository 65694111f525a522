/* linear of the extension module. */
#include "binding.h"

#include "../linear.h"

/* What adaattn.products.PackedWeight keeps: (N, K, weight2, weight, scale, left2, high codes, low codes).
 * Made by it alone, so only what would crash is checked. */
static int packed_of(PyObject *packed, ada_linear *p) {
    long long N, K;
    PyObject *parts[5];
    if (!PyArg_ParseTuple(packed, "LLdOOOOO", &N, &K, &p->weight2, &parts[0], &parts[1], &parts[2], &parts[3],
                          &parts[4]))
        return -1;
    const int64_t lanes = (N + 15) / 16 * 16, width = (K + 3) / 4 * 4;
    const int64_t groups = (width + ADA_LINEAR_DEPTH - 1) / ADA_LINEAR_DEPTH;
    p->N = N, p->K = K;
    if (!(p->weight = ada_elements_of(parts[0], ADA_F32, N * K))) return -1;
    if (parts[1] == Py_None) return 0;
    return (p->scale = ada_elements_of(parts[1], ADA_F32, groups * lanes)) &&
                   (p->left2 = ada_elements_of(parts[2], ADA_F64, 3 * K)) &&
                   (p->codes[0] = ada_elements_of(parts[3], ADA_I8, lanes * width)) &&
                   (p->codes[1] = ada_elements_of(parts[4], ADA_I8, lanes * width))
               ? 0
               : -1;
}

PyObject *ada_py_linear(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    enum { PACKED, X, BIAS, TOLERANCE, FIRST, REPORT, NUM_THREADS, N_ARGS };
    enum { N_VIEWS = 4 };
    const ada_module_state *state = PyModule_GetState(module);
    ada_view views[N_VIEWS] = {0}, *x = &views[0], *bias = &views[1], *out = &views[2], *told = &views[3];
    PyObject *y = NULL, *table = NULL, *result = NULL;
    ada_linear p = {0};
    ada_problem threads = {0};
    ada_error error;
    int64_t first;
    if (nargs != N_ARGS)
        return PyErr_Format(PyExc_TypeError, "linear: expected %d positional arguments, got %zd", N_ARGS,
                            nargs);
    if (packed_of(args[PACKED], &p) || ada_view_of(state, args[X], "x", false, &ada_on_cpu, x) ||
        (args[BIAS] != Py_None && ada_view_of(state, args[BIAS], "bias", false, &ada_on_cpu, bias)) ||
        (args[TOLERANCE] != Py_None && ada_number_of(state, args[TOLERANCE], "tolerance", &p.tolerance)) ||
        ada_integer_of(state, args[FIRST], "first", "an int", &first) ||
        ada_threads_of(state, args[NUM_THREADS], &threads))
        goto done;
    p.x = x->array, p.bias = bias->array.data, p.first = (ada_linear_rung)first;
    if (p.x.dtype != ADA_F32 || p.x.ndim < 1 || p.x.shape[p.x.ndim - 1] != p.K) {
        PyErr_Format(state->shape_error, "x: expected float32 of shape (..., %lld)", (long long)p.K);
        goto done;
    }
    if (p.bias && (bias->array.dtype != ADA_F32 || bias->array.ndim != 1 || bias->array.shape[0] != p.N ||
                   (p.N > 1 && bias->array.stride[0] != (int64_t)sizeof(float)))) {
        PyErr_Format(state->shape_error, "bias: expected contiguous float32 of shape (%lld,)",
                     (long long)p.N);
        goto done;
    }
    if (threads.has_num_threads && threads.num_threads < 1) {
        PyErr_Format(state->argument_error, "num_threads: expected at least 1, got %R", args[NUM_THREADS]);
        goto done;
    }
    p.num_threads = threads.num_threads;
    if (first < (p.scale ? ADA_LINEAR_INT8 : ADA_LINEAR_FP32) || first >= ADA_LINEAR_RUNGS) {
        PyErr_Format(state->argument_error, "first: expected a rung that there is, got %R", args[FIRST]);
        goto done;
    }
    int64_t shape[4], rows[2] = {1, 2};
    for (int axis = 0; axis < p.x.ndim; axis++) {
        shape[axis] = axis < p.x.ndim - 1 ? p.x.shape[axis] : p.N;
        if (axis < p.x.ndim - 1) rows[0] *= shape[axis];
    }
    if (!(y = ada_new_array(ADA_F32, p.x.ndim, shape, NULL)) ||
        ada_view_of(state, y, "out", true, &ada_on_cpu, out))
        goto done;
    p.out = out->array.data;
    if (args[REPORT] == Py_True) {
        if (!(table = ada_new_array(ADA_F64, 2, rows, NULL)) ||
            ada_view_of(state, table, "report", true, &ada_on_cpu, told))
            goto done;
        p.told = told->array.data;
    }
    ada_released_gil gil = {PyEval_SaveThread()};
    const ada_status status = ada_linear_run(&p, ada_interrupted, &gil, &error);
    PyEval_RestoreThread(gil.thread);
    if (status)
        ada_raise(state, &error);
    else
        result = table ? PyTuple_Pack(2, y, table) : Py_NewRef(y);
done:
    for (int i = 0; i < N_VIEWS; i++) ada_view_release(&views[i]);
    Py_XDECREF(y);
    Py_XDECREF(table);
    return result;
}
