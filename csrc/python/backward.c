/* attention_backward of the extension module. */
#include "binding.h"

#include <string.h>

#include "../backward.h"
#include "../gpu.h"
#include "../verify.h"

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

/* Numbers of key heads and of query heads: see adaattn.backward. */
enum { HEAD_NUMBERS = 8, QUERY_NUMBERS = 3 };

static PyObject *gradient_report(const ada_module_state *state, const ada_problem *p,
                                 const ada_gradient_budget *budget) {
    const int64_t shapes[2][3] = {{p->B, p->G, HEAD_NUMBERS}, {p->B, p->H, QUERY_NUMBERS}};
    PyObject *tables[2] = {NULL, NULL}, *report = NULL;
    ada_view views[2] = {0};
    for (int i = 0; i < 2; i++) {
        tables[i] = ada_new_array(ADA_F64, 3, shapes[i], NULL);
        if (!tables[i] || ada_view_of(state, tables[i], "report", true, &ada_on_cpu, &views[i])) goto done;
    }
    for (int64_t i = 0; i < p->B * p->G; i++) {
        const ada_gradient_head *h = &budget->heads[i];
        const double numbers[HEAD_NUMBERS] = {h->choice.qk, h->choice.pv,   h->retried,   h->predicted_error,
                                              h->key.error, h->value.error, h->key.limit, h->value.limit};
        memcpy((double *)views[0].array.data + i * HEAD_NUMBERS, numbers, sizeof numbers);
    }
    for (int64_t i = 0; i < p->B * p->H; i++) {
        const ada_measured *m = &budget->queries[i];
        const double numbers[QUERY_NUMBERS] = {m->error, m->limit, m->rows};
        memcpy((double *)views[1].array.data + i * QUERY_NUMBERS, numbers, sizeof numbers);
    }
    report = Py_BuildValue("(OO(dd))", tables[0], tables[1], budget->seconds[0], budget->seconds[1]);
done:
    for (int i = 0; i < 2; i++) {
        ada_view_release(&views[i]);
        Py_XDECREF(tables[i]);
    }
    return report;
}

PyObject *ada_py_attention_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    enum { GRAD_OUT, QUERY, KEY, VALUE, OUT, LSE, MASK, CAUSAL, NEEDS = CAUSAL + 10, PRECISION, TOLERANCE };
    enum { VERIFY = TOLERANCE + 1, RATES, RETURN_REPORT, NUM_THREADS, ALLOCATE };
    enum { N_ARGS = ALLOCATE + 1, N_VIEWS = CAUSAL + ADA_OPTION_VIEWS + ADA_GRADIENTS };
    static const char *const names[] = {"grad_out", "query", "key", "value", "out", "lse", "attn_mask"};
    const ada_module_state *state = PyModule_GetState(module);
    ada_backward_problem x = {0};
    ada_array *const arrays[] = {&x.grad_out, &x.p.query, &x.p.key,      &x.p.value,
                                 &x.out,      &x.lse,     &x.p.attn_mask};
    ada_error error;
    ada_view views[N_VIEWS] = {0}, *view = views;
    ada_gradient_budget budget = {0};
    ada_rate rates[ADA_CANDIDATES];
    PyObject *results[ADA_GRADIENTS] = {0}, *tuple = NULL, *report = NULL;
    ada_place place = ada_on_cpu;
    if (nargs != N_ARGS)
        return PyErr_Format(PyExc_TypeError, "attention_backward: expected %d positional arguments, got %zd",
                            N_ARGS, nargs);
    if (!ada_is_numpy(args[QUERY]) && ada_place_of(args[QUERY], Py_None, &place)) return NULL;
    x.p.on_gpu = place.on_gpu, x.p.device = place.device, x.p.stream = place.stream;
    for (int i = 0; i <= MASK; i++, view++) {
        if (i == MASK && args[MASK] == Py_None) continue;
        if (ada_view_of(state, args[i], names[i], false, &place, view)) goto done;
        *arrays[i] = view->array;
    }
    x.p.has_tolerance = args[TOLERANCE] != Py_None;
    if (ada_options_of(state, args + CAUSAL, view, &x.p) || needs_of(state, args[NEEDS], x.needs) ||
        ada_threads_of(state, args[NUM_THREADS], &x.p) ||
        ada_precision_of(state, args[PRECISION], &x.p.precision) ||
        (x.p.has_tolerance && (ada_number_of(state, args[TOLERANCE], "tolerance", &x.p.tolerance) ||
                               ada_rates_of(state, args[RATES], rates))))
        goto done;
    budget.asked = x.p.precision, budget.rates = rates;
    bool return_report;
    if (ada_flag_of(state, args[VERIFY], "verify", &budget.verify) ||
        ada_flag_of(state, args[RETURN_REPORT], "return_report", &return_report))
        goto done;
    view += ADA_OPTION_VIEWS;
    if (ada_backward_init(&x, &error)) {
        ada_raise(state, &error);
        goto done;
    }
    budget.tolerance = x.p.has_tolerance ? x.p.tolerance : 0;
    /* On a GPU who is told of heads waits for it. */
    const bool verified = x.p.has_tolerance && budget.verify && !(x.p.on_gpu && x.p.T < ADA_LEAST_QUERIES);
    if (return_report || verified) {
        budget.heads = PyMem_Calloc((size_t)(x.p.B * x.p.G), sizeof *budget.heads);
        budget.queries = PyMem_Calloc((size_t)(x.p.B * x.p.H), sizeof *budget.queries);
        if (!budget.heads || !budget.queries) {
            PyErr_NoMemory();
            goto done;
        }
    }
    for (int i = 0; i < ADA_GRADIENTS; i++, view++) {
        const ada_array *a = &x.results[i];
        if (!x.needs[i]) continue;
        results[i] = ada_new_output(args[QUERY], args[ALLOCATE], a->dtype, a->ndim, a->shape);
        if (!results[i] || ada_view_of(state, results[i], ada_gradient_name(i), true, &place, view))
            goto done;
        x.results[i] = view->array;
    }
    ada_released_gil gil = {PyEval_SaveThread()};
    ada_status status = ada_backward(&x, &budget, ada_interrupted, &gil, &error);
    if (!status && place.wait) status = ada_gpu_wait(&x.p, &error);
    PyEval_RestoreThread(gil.thread);
    if (status) {
        ada_raise(state, &error);
        goto done;
    }
    if (return_report && !(report = gradient_report(state, &x.p, &budget))) goto done;
    tuple = PyTuple_New(ADA_GRADIENTS);
    for (int i = 0; tuple && i < ADA_GRADIENTS; i++)
        PyTuple_SET_ITEM(tuple, i, Py_NewRef(results[i] ? results[i] : Py_None));
    if (tuple && report) tuple = Py_BuildValue("(NO)", tuple, report);
done:
    for (int i = 0; i < N_VIEWS; i++) ada_view_release(&views[i]);
    for (int i = 0; i < ADA_GRADIENTS; i++) Py_XDECREF(results[i]);
    PyMem_Free(budget.heads);
    PyMem_Free(budget.queries);
    Py_XDECREF(report);
    return tuple;
}
