/* linear and gpu_linear of the extension module. */
#include "binding.h"

#include "../gpu.h"
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

/* ---- on a GPU ---- */

static int check_linear(const ada_module_state *state, const ada_cuda_linear *l) {
    const ada_array *x = &l->x, *weight = &l->weight, *bias = &l->bias;
    const long long K = x->ndim == 2 ? x->shape[1] : 0, N = weight->ndim == 2 ? weight->shape[0] : 0;
    if (x->ndim != 2 || x->dtype > ADA_BF16) {
        PyErr_SetString(x->ndim == 2 ? state->dtype_error : state->shape_error,
                        "x: expected a floating array of shape (M, K)");
        return -1;
    }
    if (weight->ndim != 2 || N < 1 || weight->shape[1] != K || K < 1)
        PyErr_Format(state->shape_error,
                     "weight: expected shape (N, %lld) with N, K >= 1, got %d axes of %lld ...", K,
                     weight->ndim, (long long)(weight->ndim ? weight->shape[weight->ndim - 1] : 0));
    else if (weight->dtype != x->dtype || (bias->data && bias->dtype != x->dtype))
        PyErr_Format(state->dtype_error, "%s: expected %s, like x, got %s",
                     weight->dtype != x->dtype ? "weight" : "bias", ada_dtype_name(x->dtype),
                     ada_dtype_name(weight->dtype != x->dtype ? weight->dtype : bias->dtype));
    else if (bias->data && (bias->ndim != 2 || bias->shape[0] != 1 || bias->shape[1] != N))
        PyErr_Format(state->shape_error, "bias: expected shape (%lld,), got %lld elements", N,
                     (long long)bias->shape[bias->ndim - 1]);
    else if (x->shape[0] > INT32_MAX || K > INT32_MAX || N > INT32_MAX)
        PyErr_SetString(state->shape_error,
                        "x: expected fewer than 2**31 rows, inputs and features on a GPU");
    else
        return 0;
    return -1;
}

/* multiply, then product_error over the features, if there are some; supported: false where there is no such
 * product. */
static int run_on_gpu(const ada_cuda_linear *l, ada_product product, const int32_t *features, int n,
                      bool wait, double *error, bool *supported, ada_cuda_failure *failure) {
    const ada_cuda_table *t = ada_gpu_table();
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = t->multiply(l, product, failure);
    *supported = !failed || failure->code != ADA_CUDA_NOT_SUPPORTED;
    if (!failed && n) failed = t->product_error(l, features, n, error, failure);
    if (!failed && wait) failed = t->synchronize(l->device, l->stream, failure);
    Py_END_ALLOW_THREADS;
    return *supported ? failed : 0;
}

PyObject *ada_py_gpu_linear(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    enum { X, WEIGHT, BIAS, PRODUCT, FEATURES, ALLOCATE, N_ARGS };
    enum { N_VIEWS = 4 };
    const ada_module_state *state = PyModule_GetState(module);
    ada_view views[N_VIEWS] = {0}, *x = &views[0], *weight = &views[1], *bias = &views[2], *out = &views[3];
    PyObject *y = NULL, *result = NULL;
    ada_place place = ada_on_cpu;
    ada_cuda_failure failure;
    ada_error error;
    int64_t product;
    int32_t features[ADA_CUDA_FEATURES];
    double measured = Py_NAN;
    bool supported;
    if (nargs != N_ARGS)
        return PyErr_Format(PyExc_TypeError, "gpu_linear: expected %d positional arguments, got %zd", N_ARGS,
                            nargs);
    const Py_ssize_t n = PyTuple_Check(args[FEATURES]) ? PyTuple_GET_SIZE(args[FEATURES]) : -1;
    if (n < 0 || n > ADA_CUDA_FEATURES)
        return PyErr_Format(PyExc_TypeError, "features: expected a tuple of up to %d", ADA_CUDA_FEATURES);
    for (Py_ssize_t i = 0; i < n; i++)
        features[i] = (int32_t)PyLong_AsLong(PyTuple_GET_ITEM(args[FEATURES], i));
    if (PyErr_Occurred() || ada_place_of(args[X], Py_None, &place) ||
        ada_integer_of(state, args[PRODUCT], "product", "an int", &product))
        return NULL;
    if (!place.on_gpu) return PyErr_Format(state->device_error, "x: expected an array of a GPU");
    if (ada_view_of(state, args[X], "x", false, &place, x) ||
        ada_view_of(state, args[WEIGHT], "weight", false, &place, weight) ||
        (args[BIAS] != Py_None && ada_view_of(state, args[BIAS], "bias", false, &place, bias)))
        goto done;
    ada_cuda_linear l = {place.device, place.stream, x->array, weight->array, bias->array, x->array};
    if (check_linear(state, &l)) goto done;
    for (Py_ssize_t i = 0; i < n; i++)
        if (features[i] < 0 || features[i] >= l.weight.shape[0]) {
            PyErr_Format(state->argument_error, "features: expected numbers below %lld, got %d",
                         (long long)l.weight.shape[0], (int)features[i]);
            goto done;
        }
    const int64_t shape[2] = {l.x.shape[0], l.weight.shape[0]};
    if (!(y = ada_new_output(args[X], args[ALLOCATE], l.x.dtype, 2, shape)) ||
        ada_view_of(state, y, "out", true, &place, out))
        goto done;
    l.out = out->array;
    if (run_on_gpu(&l, (ada_product)product, features, (int)n, place.wait, &measured, &supported, &failure)) {
        ada_gpu_fail(&failure, &error);
        ada_raise(state, &error);
    } else {
        result = supported ? Py_BuildValue("(Od)", y, measured) : Py_NewRef(Py_None);
    }
done:
    for (int i = 0; i < N_VIEWS; i++) ada_view_release(&views[i]);
    Py_XDECREF(y);
    return result;
}
