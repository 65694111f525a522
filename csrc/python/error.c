/* Statuses of the engine to exceptions of adaattn.errors. */
#include "binding.h"

int ada_errors_import(ada_module_state *state) {
    PyObject *errors = PyImport_ImportModule("adaattn.errors");
    if (!errors) return -1;
    state->argument_error = PyObject_GetAttrString(errors, "ArgumentError");
    state->shape_error = PyObject_GetAttrString(errors, "ShapeError");
    state->dtype_error = PyObject_GetAttrString(errors, "DTypeError");
    state->device_error = PyObject_GetAttrString(errors, "DeviceError");
    state->numerical_error = PyObject_GetAttrString(errors, "NumericalError");
    Py_DECREF(errors);
    return state->argument_error && state->shape_error && state->dtype_error && state->device_error &&
                   state->numerical_error
               ? 0
               : -1;
}

void ada_errors_clear(ada_module_state *state) {
    Py_CLEAR(state->argument_error);
    Py_CLEAR(state->shape_error);
    Py_CLEAR(state->dtype_error);
    Py_CLEAR(state->device_error);
    Py_CLEAR(state->numerical_error);
}

PyObject *ada_raise(const ada_module_state *state, const ada_error *error) {
    PyObject *type = NULL;
    switch (error->status) {
    case ADA_ERR_ARGUMENT:
        type = state->argument_error;
        break;
    case ADA_ERR_SHAPE:
        type = state->shape_error;
        break;
    case ADA_ERR_DTYPE:
        type = state->dtype_error;
        break;
    case ADA_ERR_MEMORY:
        type = PyExc_MemoryError;
        break;
    case ADA_ERR_NUMERICAL:
        type = state->numerical_error;
        break;
    case ADA_ERR_DEVICE:
        type = state->device_error;
        break;
    case ADA_INTERRUPTED:
    case ADA_OK:
        return NULL;
    }
    PyErr_SetString(type, error->message);
    return NULL;
}
