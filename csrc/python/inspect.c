/* Pure parts of the engine for tests: the planner's choice, row sampling, limits of an error. */
#include "binding.h"

#include <math.h>

#include "../plan.h"
#include "../probe.h"
#include "../verify.h"

/* A contiguous copy's view: n float64 numbers, n = expected where that is not negative. */
static int numbers_of(const ada_module_state *state, PyObject *object, const char *name, int64_t expected,
                      ada_view *view) {
    if (ada_view_of_numbers(state, object, name, ADA_F64, view)) return -1;
    if (view->array.ndim == 1 && (expected < 0 || view->array.shape[0] == expected)) return 0;
    PyErr_Format(state->shape_error, "%s: expected a vector of %lld numbers", name, (long long)expected);
    return -1;
}

PyObject *ada_py_plan_head(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    PyObject *errors, *lse_errors, *rates, *result = NULL;
    ada_task task = {0};
    ada_forecast forecast = {0};
    ada_rate table[ADA_CANDIDATES];
    int finite, lse, dearest, cheapest;
    long long D;
    ada_view views[3] = {0};
    if (!PyArg_ParseTuple(args, "OOOpddpiiddLi", &errors, &lse_errors, &rates, &finite, &task.tolerance,
                          &task.margin, &lse, &dearest, &cheapest, &task.operations, &task.elements, &D,
                          &task.plain))
        return NULL;
    task.lse = lse, task.D = D, task.dearest = (ada_rung)dearest, task.cheapest = (ada_rung)cheapest;
    forecast.finite = finite;
    if (numbers_of(state, errors, "errors", ADA_CANDIDATES, &views[0]) ||
        numbers_of(state, lse_errors, "lse_errors", ADA_CANDIDATES, &views[1]) ||
        numbers_of(state, rates, "rates", 3 * ADA_CANDIDATES, &views[2]))
        goto done;
    const double *x = views[2].array.data;
    for (int c = 0; c < ADA_CANDIDATES; c++) {
        forecast.error[c] = ((const double *)views[0].array.data)[c];
        forecast.lse_error[c] = ((const double *)views[1].array.data)[c];
        table[c] = (ada_rate){{x[3 * c], x[3 * c + 1]}, x[3 * c + 2], 1};
    }
    result = PyLong_FromLong(ada_plan_head(&forecast, &task, table));
done:
    for (int i = 0; i < 3; i++) ada_view_release(&views[i]);
    return result;
}

PyObject *ada_py_narrow_fault(PyObject *module, PyObject *object) {
    (void)module;
    const double factor = PyFloat_AsDouble(object);
    if (factor == -1 && PyErr_Occurred()) return NULL;
    ada_narrow_fault(factor);
    Py_RETURN_NONE;
}

PyObject *ada_py_sample_rows(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    PyObject *shares, *list = NULL;
    ada_view view = {0};
    int n;
    unsigned long long stream;
    if (!PyArg_ParseTuple(args, "OiK", &shares, &n, &stream) ||
        numbers_of(state, shares, "shares", -1, &view))
        return NULL;
    const int64_t T = view.array.shape[0];
    float *share = PyMem_Malloc((size_t)T * sizeof *share);
    int64_t *rows = PyMem_Malloc((size_t)(n > 0 ? n : 1) * sizeof *rows);
    double *weight = PyMem_Malloc((size_t)(n > 0 ? n : 1) * sizeof *weight);
    if (share && rows && weight) {
        for (int64_t i = 0; i < T; i++) share[i] = (float)((const double *)view.array.data)[i];
        const int found = ada_sample_rows(share, T, n, stream, rows, weight);
        list = PyList_New(found);
        for (int i = 0; list && i < found; i++) {
            PyObject *pair = Py_BuildValue("(Ld)", (long long)rows[i], weight[i]);
            if (pair)
                PyList_SET_ITEM(list, i, pair);
            else
                Py_CLEAR(list);
        }
    } else {
        PyErr_NoMemory();
    }
    PyMem_Free(share);
    PyMem_Free(rows);
    PyMem_Free(weight);
    ada_view_release(&view);
    return list;
}

PyObject *ada_py_limit_error(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    PyObject *error2, *weight, *result = NULL;
    ada_view views[2] = {0};
    if (!PyArg_ParseTuple(args, "OO", &error2, &weight)) return NULL;
    if (numbers_of(state, error2, "error2", -1, &views[0]) == 0 &&
        numbers_of(state, weight, "weight", views[0].array.shape[0], &views[1]) == 0) {
        const ada_error_limits x =
            ada_limit_error(views[0].array.data, views[1].array.data, (int)views[0].array.shape[0]);
        result = Py_BuildValue("(ddd)", sqrt(x.estimate2), sqrt(x.lower2), sqrt(x.upper2));
    }
    for (int i = 0; i < 2; i++) ada_view_release(&views[i]);
    return result;
}
