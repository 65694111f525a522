/* attention_backward of the extension module. */
#include "binding.h"

/* Which gradients an iterable of names asks for. */
static int needs_of(const ada_module_state *state, PyObject *object, bool needs[ADA_GRADIENTS]) {
    static const char expected[] =
        "names among 'query', 'key', 'value', 'attn_mask', 'sinks' and 'alibi_slopes'";
    const char *names[ADA_GRADIENTS];
    for (int i = 0; i < ADA_GRADIENTS; i++) names[i] = ada_gradient_name(i);
    PyObject *iterator = PyUnicode_Check(object) ? NULL : PyObject_GetIter(object), *item;
    if (!iterator) {
        if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
        PyErr_Format(state->dtype_error, "needs: expected %s, got %s", expected, Py_TYPE(object)->tp_name);
        return -1;
    }
    while ((item = PyIter_Next(iterator))) {
        int index;
        const int failed = ada_name_of(state, item, "needs", expected, names, ADA_GRADIENTS, &index);
        Py_DECREF(item);
        if (failed) break;
        needs[index] = true;
    }
    Py_DECREF(iterator);
    return PyErr_Occurred() ? -1 : 0;
}

PyObject *ada_py_attention_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    enum { GRAD_OUT, QUERY, KEY, VALUE, OUT, LSE, MASK, CAUSAL, NEEDS = CAUSAL + 10, NUM_THREADS, ALLOCATE };
    enum { N_ARGS = ALLOCATE + 1, N_VIEWS = CAUSAL + ADA_OPTION_VIEWS + ADA_GRADIENTS };
    static const char *const names[] = {"grad_out", "query", "key", "value", "out", "lse", "attn_mask"};
    const ada_module_state *state = PyModule_GetState(module);
    ada_backward_problem x = {0};
    ada_array *const arrays[] = {&x.grad_out, &x.p.query, &x.p.key,      &x.p.value,
                                 &x.out,      &x.lse,     &x.p.attn_mask};
    ada_error error;
    ada_view views[N_VIEWS] = {0}, *view = views;
    PyObject *results[ADA_GRADIENTS] = {0}, *tuple = NULL;
    if (nargs != N_ARGS)
        return PyErr_Format(PyExc_TypeError, "attention_backward: expected %d positional arguments, got %zd",
                            N_ARGS, nargs);
    for (int i = 0; i <= MASK; i++, view++) {
        if (i == MASK && args[MASK] == Py_None) continue;
        if (ada_view_of(state, args[i], names[i], false, &ada_on_cpu, view)) goto done;
        *arrays[i] = view->array;
    }
    if (ada_options_of(state, args + CAUSAL, view, &x.p) || needs_of(state, args[NEEDS], x.needs) ||
        ada_threads_of(state, args[NUM_THREADS], &x.p))
        goto done;
    view += ADA_OPTION_VIEWS;
    if (ada_backward_init(&x, &error)) {
        ada_raise(state, &error);
        goto done;
    }
    for (int i = 0; i < ADA_GRADIENTS; i++, view++) {
        const ada_array *a = &x.results[i];
        if (!x.needs[i]) continue;
        results[i] = ada_new_output(args[QUERY], args[ALLOCATE], a->dtype, a->ndim, a->shape);
        if (!results[i] || ada_view_of(state, results[i], ada_gradient_name(i), true, &ada_on_cpu, view))
            goto done;
        x.results[i] = view->array;
    }
    ada_released_gil gil = {PyEval_SaveThread()};
    const ada_status status = ada_backward(&x, ada_interrupted, &gil, &error);
    PyEval_RestoreThread(gil.thread);
    if (status) {
        ada_raise(state, &error);
        goto done;
    }
    tuple = PyTuple_New(ADA_GRADIENTS);
    for (int i = 0; tuple && i < ADA_GRADIENTS; i++)
        PyTuple_SET_ITEM(tuple, i, Py_NewRef(results[i] ? results[i] : Py_None));
done:
    for (int i = 0; i < N_VIEWS; i++) ada_view_release(&views[i]);
    for (int i = 0; i < ADA_GRADIENTS; i++) Py_XDECREF(results[i]);
    return tuple;
}
