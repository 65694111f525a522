/* Where a call works, and what the CUDA backend says of the machine. adaattn/gpu.py knows where the backend
 * lies and which stream an array's owner works on. */
#include "binding.h"

#include <string.h>

#include "../gpu.h"
#include "dlpack.h"

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
    ada_gpu_set_devices(n);
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

/* ---- memory for libraries that make none for others ---- */

#define MEMORY "adaattn_gpu_memory"

typedef struct {
    int device;
    void *data;
} gpu_memory;

static void free_memory(PyObject *capsule) {
    gpu_memory *memory = PyCapsule_GetPointer(capsule, MEMORY);
    ada_cuda_failure failure; /* there is nobody to tell */
    ada_gpu_table()->release(memory->device, ADA_CUDA_ANY_STREAM, memory->data, &failure);
    PyMem_Free(memory);
}

PyObject *ada_py_gpu_allocate(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    const ada_cuda_table *t = ada_gpu_table();
    ada_cuda_failure failure;
    ada_error error;
    int device;
    unsigned long long stream;
    long long bytes;
    void *data;
    if (!PyArg_ParseTuple(args, "iKL", &device, &stream, &bytes)) return NULL;
    gpu_memory *memory = PyMem_Malloc(sizeof *memory);
    if (!memory) return PyErr_NoMemory();
    if (t->allocate(device, (uintptr_t)stream, bytes, &data, &failure)) {
        PyMem_Free(memory);
        ada_gpu_fail(&failure, &error);
        return ada_raise(state, &error);
    }
    *memory = (gpu_memory){device, data};
    PyObject *capsule = PyCapsule_New(memory, MEMORY, free_memory);
    if (!capsule) {
        t->release(device, (uintptr_t)stream, data, &failure);
        PyMem_Free(memory);
    }
    return capsule;
}

/* A tensor over memory that a capsule holds. */
typedef struct {
    dlpack_managed managed;
    int64_t shape[4];
    PyObject *memory;
} exported_tensor;

static void delete_tensor(dlpack_managed *managed) {
    exported_tensor *tensor = managed->manager;
    const PyGILState_STATE gil = PyGILState_Ensure();
    Py_DECREF(tensor->memory);
    PyMem_Free(tensor);
    PyGILState_Release(gil);
}

static void drop_capsule(PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return; /* it was taken over */
    dlpack_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
    managed->deleter(managed);
}

PyObject *ada_py_gpu_export(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *memory, *shape;
    int device;
    const char *dtype;
    if (!PyArg_ParseTuple(args, "OiO!s", &memory, &device, &PyTuple_Type, &shape, &dtype)) return NULL;
    gpu_memory *from = PyCapsule_GetPointer(memory, MEMORY);
    exported_tensor *tensor = from ? PyMem_Calloc(1, sizeof *tensor) : NULL;
    if (!tensor) return from ? PyErr_NoMemory() : NULL;
    int kind = 0;
    while (kind < ADA_BOOL && strcmp(ada_dtype_name((ada_dtype)kind), dtype) != 0) kind++;
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape);
    for (Py_ssize_t i = 0; i < ndim && i < 4; i++)
        tensor->shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
    if (ndim > 4 || kind == ADA_BOOL || PyErr_Occurred()) {
        PyMem_Free(tensor);
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "_gpu_export: got %s", dtype);
    }
    dlpack_tensor *t = &tensor->managed.tensor;
    t->data = from->data;
    t->device.type = DLPACK_CUDA, t->device.id = device;
    t->ndim = (int32_t)ndim;
    t->dtype.code = kind == ADA_BF16 ? DLPACK_BFLOAT : DLPACK_FLOAT;
    t->dtype.bits = (uint8_t)(8 * ada_dtype_bytes((ada_dtype)kind)), t->dtype.lanes = 1;
    t->shape = tensor->shape;
    tensor->managed.manager = tensor, tensor->managed.deleter = delete_tensor;
    tensor->memory = Py_NewRef(memory);
    PyObject *capsule = PyCapsule_New(&tensor->managed, "dltensor", drop_capsule);
    if (!capsule) delete_tensor(&tensor->managed);
    return capsule;
}

PyObject *ada_py_gpu_order(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    ada_cuda_failure failure;
    ada_error error;
    int device;
    unsigned long long earlier, later;
    if (!PyArg_ParseTuple(args, "iKK", &device, &earlier, &later)) return NULL;
    if (ada_gpu_table()->order(device, (uintptr_t)earlier, (uintptr_t)later, &failure)) {
        ada_gpu_fail(&failure, &error);
        return ada_raise(state, &error);
    }
    Py_RETURN_NONE;
}

PyObject *ada_py_gpu_captured(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    ada_cuda_failure failure;
    ada_error error;
    int device;
    unsigned long long stream;
    bool captured;
    if (!PyArg_ParseTuple(args, "iK", &device, &stream)) return NULL;
    if (!ada_gpu_table()->captured(device, (uintptr_t)stream, &captured, &failure))
        return PyBool_FromLong(captured);
    ada_gpu_fail(&failure, &error);
    return ada_raise(state, &error);
}

PyObject *ada_py_gpu_open_blas(PyObject *module, PyObject *args) {
    const ada_module_state *state = PyModule_GetState(module);
    ada_cuda_failure failure;
    ada_error error;
    PyObject *path, *bytes = NULL;
    int device;
    if (!PyArg_ParseTuple(args, "Oi", &path, &device)) return NULL;
    if (!ada_gpu_table()) return PyErr_Format(state->device_error, "the CUDA backend is not open");
    if (path != Py_None && !PyUnicode_FSConverter(path, &bytes)) return NULL;
    const char *name = bytes ? PyBytes_AS_STRING(bytes) : NULL;
    const int failed = ada_gpu_table()->open_blas(name, device, &failure);
    Py_XDECREF(bytes);
    if (!failed) Py_RETURN_NONE;
    ada_gpu_fail(&failure, &error);
    return ada_raise(state, &error);
}

/* ---- the place of a call ---- */

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

/* The same without Python, for a library that says where its tensors lie and which stream is current, once
 * the devices are known. */
static bool placed_quickly(PyObject *query, ada_place *place) {
    const dlpack_exchange *exchange = ada_gpu_devices() ? ada_exchange_of(query) : NULL;
    dlpack_tensor tensor;
    if (!exchange) return false;
    if (exchange->view(query, &tensor)) {
        PyErr_Clear();
        return false;
    }
    if (!ada_is_cuda(tensor.device.type) || tensor.device.id >= ada_gpu_devices()) return false;
    *place = (ada_place){.on_gpu = true, .device = tensor.device.id};
    place->stream = ada_current_stream(exchange, place->device);
    return true;
}

int ada_place_of(PyObject *query, PyObject *device, ada_place *place) {
    int id = 0;
    *place = ada_on_cpu;
    if (device == Py_None && placed_quickly(query, place)) return 0;
    const int there = lies_on_gpu(query, &id);
    if (there < 0) return -1;
    if (!there && device == Py_None) return 0;
    PyObject *ordinal = there ? PyLong_FromLong(id) : Py_NewRef(Py_None);
    if (!ordinal) return -1;
    place->on_gpu = there, place->staged = !there;
    const int failed = ask_python(query, ordinal, device, place);
    Py_DECREF(ordinal);
    return failed;
}
