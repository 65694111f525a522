/* Where a call works, and what the CUDA backend says of the machine. adaattn/gpu.py knows where the backend
 * lies and which stream an array's owner works on. */
#include "binding.h"

#include "../gpu.h"

const ada_place ada_on_cpu = {0};

PyObject *ada_py_gpu_load(PyObject *module, PyObject *path) {
    const ada_module_state *state = PyModule_GetState(module);
    PyObject *bytes;
    ada_error error;
    if (!PyUnicode_FSConverter(path, &bytes)) return NULL;
    const ada_status status = ada_gpu_load(PyBytes_AS_STRING(bytes), &error);
    Py_DECREF(bytes);
    if (status) return ada_raise(state, &error);
    Py_RETURN_NONE;
}

PyObject *ada_py_gpu_describe(PyObject *module, PyObject *none) {
    (void)none;
    const ada_module_state *state = PyModule_GetState(module);
    const ada_cuda_table *t = ada_gpu_table();
    ada_cuda_failure failure;
    ada_error error;
    int n, driver, runtime;
    if (!t) return PyErr_Format(state->device_error, "the CUDA backend is not open");
    if (t->count(&n, &driver, &runtime, &failure)) {
        ada_gpu_fail(&failure, &error);
        return ada_raise(state, &error);
    }
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < n; i++) {
        ada_cuda_device about;
        if (t->describe(i, &about, &failure)) {
            Py_DECREF(list);
            ada_gpu_fail(&failure, &error);
            return ada_raise(state, &error);
        }
        PyObject *device = Py_BuildValue("(siiiLI)", about.name, about.major, about.minor,
                                         about.multiprocessors, (long long)about.memory_bytes, about.rungs);
        if (!device || PyList_Append(list, device)) Py_CLEAR(list);
        Py_XDECREF(device);
    }
    return list ? Py_BuildValue("(siiN)", t->version, driver, runtime, list) : NULL;
}

/* adaattn.gpu.place(query, ordinal or None, device) opens the backend and returns (ordinal, stream, wait). */
static int ask_python(PyObject *query, PyObject *ordinal, PyObject *device, ada_place *place) {
    PyObject *gpu = PyImport_ImportModule("adaattn.gpu");
    PyObject *told = gpu ? PyObject_CallMethod(gpu, "place", "OOO", query, ordinal, device) : NULL;
    unsigned long long stream = 0;
    int wait = 0;
    const int failed = !told || !PyArg_ParseTuple(told, "iKp", &place->device, &stream, &wait);
    place->stream = (uintptr_t)stream, place->wait = wait;
    Py_XDECREF(told);
    Py_XDECREF(gpu);
    return failed ? -1 : 0;
}

/* Whether the object says that it lies on a GPU, and on which; -1 for what ends a program. What is wrong with
 * the object itself, its export will say. */
static int lies_on_gpu(PyObject *object, int *id) {
    int type = 0;
    if (ada_is_numpy(object) || PyType_Check(object) || !PyObject_HasAttrString(object, "__dlpack_device__"))
        return 0;
    if (ada_dlpack_device(object, &type, id)) {
        if (!PyErr_ExceptionMatches(PyExc_Exception)) return -1;
        PyErr_Clear();
    }
    return ada_is_cuda(type);
}

PyObject *ada_on_host(PyObject *object) {
    int id;
    const int there = lies_on_gpu(object, &id);
    if (there == 0) return Py_NewRef(object);
    PyObject *gpu = there > 0 ? PyImport_ImportModule("adaattn.gpu") : NULL;
    PyObject *copy = gpu ? PyObject_CallMethod(gpu, "to_host", "O", object) : NULL;
    Py_XDECREF(gpu);
    return copy;
}

int ada_place_of(PyObject *query, PyObject *device, ada_place *place) {
    int id = 0;
    *place = ada_on_cpu;
    const int there = lies_on_gpu(query, &id);
    if (there < 0) return -1;
    if (!there && device == Py_None) return 0;
    PyObject *ordinal = there ? PyLong_FromLong(id) : Py_NewRef(Py_None);
    if (!ordinal) return -1;
    place->on_gpu = true, place->staged = !there;
    const int failed = ask_python(query, ordinal, device, place);
    Py_DECREF(ordinal);
    return failed;
}
