/* Arguments that calls share: numbers, names, and the options of attention. */
#include "binding.h"

/* Replaces a TypeError, ValueError or OverflowError by ours. */
static int type_error(const ada_module_state *state, const char *name, const char *expected,
                      PyObject *object) {
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_OverflowError))
        PyErr_Format(state->argument_error, "%s: expected %s, got one beyond the range of float64", name,
                     expected);
    else if (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_TypeError) ||
             PyErr_ExceptionMatches(PyExc_ValueError))
        PyErr_Format(state->dtype_error, "%s: expected %s, got %s", name, expected, Py_TYPE(object)->tp_name);
    return -1;
}

int ada_number_of(const ada_module_state *state, PyObject *object, const char *name, double *value) {
    *value = PyBool_Check(object) ? -1 : PyFloat_AsDouble(object);
    return *value == -1 && (PyBool_Check(object) || PyErr_Occurred())
               ? type_error(state, name, "a number", object)
               : 0;
}

int ada_integer_of(const ada_module_state *state, PyObject *object, const char *name, const char *expected,
                   int64_t *value) {
    int overflow;
    PyObject *number = PyBool_Check(object) ? NULL : PyNumber_Index(object);
    if (!number) return type_error(state, name, expected, object);
    *value = PyLong_AsLongLongAndOverflow(number, &overflow);
    Py_DECREF(number);
    if (overflow) *value = overflow > 0 ? INT64_MAX : INT64_MIN;
    return *value == -1 && PyErr_Occurred() ? -1 : 0;
}

int ada_flag_of(const ada_module_state *state, PyObject *object, const char *name, bool *value) {
    const int truth = PyObject_IsTrue(object);
    *value = truth > 0;
    return truth < 0 ? type_error(state, name, "a bool", object) : 0;
}

int ada_name_of(const ada_module_state *state, PyObject *object, const char *argument, const char *expected,
                const char *const names[], int n, int *index) {
    if (!PyUnicode_Check(object)) return type_error(state, argument, expected, object);
    for (*index = 0; *index < n; ++*index)
        if (PyUnicode_CompareWithASCIIString(object, names[*index]) == 0) return 0;
    PyErr_Format(state->argument_error, "%s: expected %s, got %R", argument, expected, object);
    return -1;
}

static int causal_of(const ada_module_state *state, PyObject *object, ada_causal *causal) {
    static const char *const names[] = {"lower_right", "upper_left"};
    int index = 0;
    if (object == Py_False || object == Py_True) {
        *causal = object == Py_True ? ADA_LOWER_RIGHT : ADA_NOT_CAUSAL;
        return 0;
    }
    if (ada_name_of(state, object, "causal", "a bool, 'lower_right' or 'upper_left'", names, 2, &index))
        return -1;
    *causal = index ? ADA_UPPER_LEFT : ADA_LOWER_RIGHT;
    return 0;
}

static int window_of(const ada_module_state *state, PyObject *object, ada_problem *p) {
    static const char expected[] = "None or a pair (left, right) of integers or None";
    int64_t *sides[2] = {&p->window_left, &p->window_right};
    p->window_left = p->window_right = ADA_UNBOUNDED;
    if (object == Py_None) return 0;
    if (!PyTuple_Check(object) && !PyList_Check(object)) return type_error(state, "window", expected, object);
    if (PySequence_Size(object) != 2) {
        PyErr_Format(state->argument_error, "window: expected %s, got %R", expected, object);
        return -1;
    }
    for (int i = 0; i < 2; i++) {
        PyObject *side = PySequence_GetItem(object, i);
        int failed = !side || (side != Py_None && ada_integer_of(state, side, "window", expected, sides[i]));
        Py_XDECREF(side);
        if (failed) return -1;
    }
    return 0;
}

int ada_options_of(const ada_module_state *state, PyObject *const *args, ada_view *views, ada_problem *p) {
    enum { CAUSAL, WINDOW, SOFTCAP, ALIBI, SINKS, LENGTHS, OFFSET, SCALE, DROPOUT, SEED };
    const struct {
        int arg;
        const char *name;
        ada_dtype dtype;
        ada_array *array;
    } vectors[ADA_OPTION_VIEWS] = {{ALIBI, "alibi_slopes", ADA_F64, &p->alibi_slopes},
                                   {SINKS, "sinks", ADA_F64, &p->sinks},
                                   {LENGTHS, "kv_lengths", ADA_I64, &p->kv_lengths},
                                   {OFFSET, "query_offset", ADA_I64, &p->query_offset},
                                   {SEED, "seed", ADA_U64, &p->seed}};
    for (int i = 0; i < ADA_OPTION_VIEWS; i++) {
        if (ada_view_of_numbers(state, args[vectors[i].arg], vectors[i].name, vectors[i].dtype, &views[i]))
            return -1;
        *vectors[i].array = views[i].array;
    }
    p->has_softcap = args[SOFTCAP] != Py_None;
    p->has_scale = args[SCALE] != Py_None;
    return causal_of(state, args[CAUSAL], &p->causal) || window_of(state, args[WINDOW], p) ||
                   (p->has_softcap && ada_number_of(state, args[SOFTCAP], "softcap", &p->softcap)) ||
                   (p->has_scale && ada_number_of(state, args[SCALE], "scale", &p->scale)) ||
                   ada_number_of(state, args[DROPOUT], "dropout_p", &p->dropout_p)
               ? -1
               : 0;
}

int ada_threads_of(const ada_module_state *state, PyObject *object, ada_problem *p) {
    p->has_num_threads = object != Py_None;
    return p->has_num_threads
               ? ada_integer_of(state, object, "num_threads", "an int or None", &p->num_threads)
               : 0;
}

int ada_precision_of(const ada_module_state *state, PyObject *object, ada_choice *choice) {
    static const char expected[] =
        "'auto', 'fp64', 'fp32', 'bf16x6', 'bf16x3', 'fp16', 'int16', 'bf16', 'int8', 'fp8' or a pair of "
        "rungs (scores, values)";
    const bool pair = PyTuple_Check(object);
    const char *names[ADA_RUNG_COUNT];
    int index[2];
    for (int i = 0; i < ADA_RUNG_COUNT; i++) names[i] = ada_rung_name((ada_rung)i);
    if (pair && PyTuple_GET_SIZE(object) != 2) {
        PyErr_Format(state->argument_error, "precision: expected %s, got %R", expected, object);
        return -1;
    }
    for (int i = 0; i < 2; i++) /* a pair has no "auto" */
        if (ada_name_of(state, pair ? PyTuple_GET_ITEM(object, i) : object, "precision", expected,
                        names + pair, ADA_RUNG_COUNT - pair, &index[i]))
            return -1;
    *choice = (ada_choice){(ada_rung)(index[0] + pair), (ada_rung)(index[1] + pair)};
    return 0;
}

int ada_rates_of(const ada_module_state *state, PyObject *object, ada_rate table[ADA_CANDIDATES]) {
    ada_view view;
    if (ada_view_of(state, object, "rates", false, &ada_on_cpu, &view)) return -1;
    const ada_array *a = &view.array;
    const bool good = a->dtype == ADA_F64 && a->ndim == 2 && a->shape[0] > 0 &&
                      a->shape[0] <= ADA_CANDIDATES && a->shape[1] >= 3 && a->shape[1] <= 4;
    if (!good)
        PyErr_Format(state->shape_error, "rates: expected float64 of shape (%d, 3) or (%d, 4), or fewer rows",
                     ADA_CANDIDATES, ADA_CANDIDATES);
    for (int c = 0; good && c < ADA_CANDIDATES; c++) {
        double x[4] = {0, 0, 0, 1};
        for (int i = 0; c < a->shape[0] && i < a->shape[1]; i++)
            x[i] = *(const double *)((const char *)a->data + c * a->stride[0] + i * a->stride[1]);
        table[c] = (ada_rate){{x[0], x[1]}, x[2], x[3]};
    }
    ada_view_release(&view);
    return good ? 0 : -1;
}
