/* Python objects to ada_array: NumPy arrays directly, everything else through DLPack. */
#include "binding.h"

#include "../codes.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>
#include <stddef.h>
#include <string.h>

#include "dlpack.h"

int ada_array_import_numpy(void) {
    import_array1(-1);
    return 0;
}

void ada_view_release(ada_view *view) { Py_CLEAR(view->owner); }

bool ada_is_numpy(PyObject *object) { return PyArray_Check(object); }

static const char *type_name(PyObject *object) { return Py_TYPE(object)->tp_name; }

/* ml_dtypes registers bfloat16 with NumPy under this name. */
static bool is_bfloat16(PyArray_Descr *descr) {
    const char *name = descr->typeobj->tp_name, *dot = strrchr(name, '.');
    return descr->type_num >= NPY_USERDEF && strcmp(dot ? dot + 1 : name, "bfloat16") == 0;
}

static bool dtype_of(PyArray_Descr *descr, ada_dtype *dtype) {
    switch (descr->type_num) {
    case NPY_FLOAT:
        *dtype = ADA_F32;
        return true;
    case NPY_DOUBLE:
        *dtype = ADA_F64;
        return true;
    case NPY_HALF:
        *dtype = ADA_F16;
        return true;
    case NPY_BOOL:
        *dtype = ADA_BOOL;
        return true;
    default:
        *dtype = ADA_BF16;
        return is_bfloat16(descr);
    }
}

/* The data of an array without elements, which must not look like "not given". */
static max_align_t nothing;

/* Masked arrays would lose their mask and matrices have a product of their own: neither is an array here. */
static bool is_refused_subclass(PyObject *object) {
    if (PyArray_CheckExact(object)) return false;
    PyObject *bases = Py_TYPE(object)->tp_mro;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(bases); i++) {
        const char *name = ((PyTypeObject *)PyTuple_GET_ITEM(bases, i))->tp_name;
        if (strcmp(name, "MaskedArray") == 0 || strcmp(name, "matrix") == 0) return true;
    }
    return false;
}

static int view_numpy(const ada_module_state *state, PyObject *object, const char *name, bool writable,
                      ada_view *view) {
    PyArrayObject *array = (PyArrayObject *)object;
    ada_array *a = &view->array;
    if (is_refused_subclass(object)) {
        PyErr_Format(state->dtype_error, "%s: expected a plain array, got %s", name, type_name(object));
        return -1;
    }
    if (!dtype_of(PyArray_DESCR(array), &a->dtype)) {
        PyErr_Format(state->dtype_error, "%s: expected float32, float64, float16 or bfloat16%s, got %S", name,
                     strcmp(name, "attn_mask") ? "" : " or bool", (PyObject *)PyArray_DESCR(array));
        return -1;
    }
    if (PyArray_NDIM(array) > 4) {
        PyErr_Format(state->shape_error, "%s: expected at most 4 dimensions, got %d", name,
                     PyArray_NDIM(array));
        return -1;
    }
    if (writable && !(PyArray_ISBEHAVED(array))) {
        PyErr_Format(state->argument_error, "%s: expected writable, aligned memory, got a%s array", name,
                     PyArray_ISWRITEABLE(array) ? "n unaligned or byte-swapped" : " read-only");
        return -1;
    }
    if (PyArray_ISALIGNED(array) && PyArray_ISNOTSWAPPED(array)) {
        Py_INCREF(array);
    } else {
        PyArray_Descr *native = PyArray_DescrNewByteorder(PyArray_DESCR(array), NPY_NATIVE);
        if (!native) return -1;
        array = (PyArrayObject *)PyArray_FromArray(array, native, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_ENSURECOPY);
        if (!array) return -1;
    }
    view->owner = (PyObject *)array;
    a->data = PyArray_DATA(array);
    a->ndim = PyArray_NDIM(array);
    for (int i = 0; i < a->ndim; i++) {
        a->shape[i] = PyArray_DIM(array, i);
        a->stride[i] = PyArray_STRIDE(array, i);
    }
    return 0;
}

static bool dlpack_dtype_of(const dlpack_tensor *t, ada_dtype *dtype) {
    const int key = t->dtype.code << 8 | t->dtype.bits;
    if (t->dtype.lanes != 1) return false;
    switch (key) {
    case DLPACK_FLOAT << 8 | 16:
        *dtype = ADA_F16;
        return true;
    case DLPACK_FLOAT << 8 | 32:
        *dtype = ADA_F32;
        return true;
    case DLPACK_FLOAT << 8 | 64:
        *dtype = ADA_F64;
        return true;
    case DLPACK_BFLOAT << 8 | 16:
        *dtype = ADA_BF16;
        return true;
    case DLPACK_BOOL << 8 | 8:
        *dtype = ADA_BOOL;
        return true;
    default:
        return false;
    }
}

/* Whether a tensor lies where it is expected; raises where it does not. */
static int check_place(const ada_module_state *state, const ada_place *place, int type, int id,
                       const char *name) {
    const bool on_cpu = type == DLPACK_CPU || type == DLPACK_CUDA_HOST;
    if (place->on_gpu ? ada_is_cuda(type) && id == place->device : on_cpu) return 0;
    if (place->on_gpu)
        PyErr_Format(
            state->device_error,
            "%s: expected memory of CUDA device %d like query's, got a tensor on DLPack device %d:%d", name,
            place->device, type, id);
    else
        PyErr_Format(state->device_error,
                     "%s: expected memory of the CPU, got a tensor on DLPack device %d:%d", name, type, id);
    return -1;
}

static int view_tensor(const ada_module_state *state, const dlpack_tensor *t, const char *name,
                       const ada_place *place, ada_array *a) {
    if (check_place(state, place, t->device.type, t->device.id, name)) return -1;
    if (!dlpack_dtype_of(t, &a->dtype)) {
        static const char *const codes[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
        PyErr_Format(state->dtype_error, "%s: expected float32, float64, float16 or bfloat16%s, got %s%d",
                     name, strcmp(name, "attn_mask") ? "" : " or bool",
                     t->dtype.code < 7 ? codes[t->dtype.code] : "type ", (int)t->dtype.bits);
        return -1;
    }
    if (t->ndim > 4) {
        PyErr_Format(state->shape_error, "%s: expected at most 4 dimensions, got %d", name, (int)t->ndim);
        return -1;
    }
    int64_t itemsize = ada_dtype_bytes(a->dtype), step = itemsize;
    a->data = t->data ? (char *)t->data + t->byte_offset : (char *)&nothing;
    a->ndim = t->ndim;
    for (int i = t->ndim - 1; i >= 0; i--) {
        a->shape[i] = t->shape[i];
        a->stride[i] = t->strides ? t->strides[i] * itemsize : step;
        step *= t->shape[i];
    }
    return 0;
}

/* Replaces a tensor that is not aligned by a contiguous copy. */
static int align_view(const ada_module_state *state, const char *name, bool writable, const ada_place *place,
                      ada_view *view) {
    ada_array *a = &view->array;
    const int64_t itemsize = ada_dtype_bytes(a->dtype);
    int64_t strides[4], bytes = itemsize;
    if ((uintptr_t)a->data % (uintptr_t)itemsize == 0) return 0;
    if (writable || place->on_gpu) {
        PyErr_Format(state->argument_error, "%s: expected %saligned memory, got an unaligned tensor", name,
                     writable ? "writable, " : "");
        return -1;
    }
    for (int i = a->ndim - 1; i >= 0; i--) {
        strides[i] = bytes;
        bytes *= a->shape[i];
    }
    npy_intp dims[] = {(npy_intp)bytes};
    PyObject *copy = PyArray_SimpleNew(1, dims, NPY_UINT8);
    if (!copy) return -1;
    char *to = PyArray_DATA((PyArrayObject *)copy);
    for (int64_t at = 0; at < bytes; at += itemsize) {
        int64_t from = 0;
        for (int i = 0; i < a->ndim; i++) from += at / strides[i] % a->shape[i] * a->stride[i];
        memcpy(to + at, (char *)a->data + from, (size_t)itemsize);
    }
    Py_SETREF(view->owner, copy);
    a->data = to;
    memcpy(a->stride, strides, sizeof strides);
    return 0;
}

/* What __dlpack__ is told: the newest version we know and, of a GPU, the stream that will use the tensor. */
static PyObject *export_options(const ada_place *place, bool versioned) {
    PyObject *options = PyDict_New();
    PyObject *version = versioned && options ? Py_BuildValue("(ii)", 1, 0) : NULL;
    PyObject *stream = place->on_gpu && options ? PyLong_FromUnsignedLongLong(place->stream) : NULL;
    if ((version && PyDict_SetItemString(options, "max_version", version)) ||
        (stream && PyDict_SetItemString(options, "stream", stream)) || PyErr_Occurred())
        Py_CLEAR(options);
    Py_XDECREF(version);
    Py_XDECREF(stream);
    return options;
}

/* The capsule of a tensor; its own destructor gives the tensor back, as its name is never changed. */
static PyObject *export_dlpack(const ada_module_state *state, PyObject *object, const char *name,
                               const ada_place *place) {
    PyObject *capsule = NULL, *method = PyObject_GetAttrString(object, "__dlpack__");
    PyObject *none = method ? PyTuple_New(0) : NULL;
    for (int versioned = 1; none && !capsule && versioned >= 0; versioned--) {
        PyObject *options = export_options(place, versioned);
        capsule = options ? PyObject_Call(method, none, options) : NULL;
        Py_XDECREF(options);
        if (capsule || !versioned || !PyErr_ExceptionMatches(PyExc_TypeError)) break;
        PyErr_Clear(); /* an exporter from before version 1 */
    }
    Py_XDECREF(none);
    Py_XDECREF(method);
    if (capsule || !PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError) ||
        PyErr_ExceptionMatches(state->device_error))
        return capsule;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    PyErr_Format(state->argument_error, "%s: expected an array that can be read through DLPack, got %s: %S",
                 name, type_name(object), value ? value : Py_None);
    PyObject *raised_type, *raised, *raised_traceback;
    PyErr_Fetch(&raised_type, &raised, &raised_traceback);
    PyErr_NormalizeException(&raised_type, &raised, &raised_traceback);
    if (raised && value) {
        PyException_SetCause(raised, value); /* takes the reference */
        value = NULL;
    }
    Py_XDECREF(type), Py_XDECREF(value), Py_XDECREF(traceback);
    PyErr_Restore(raised_type, raised, raised_traceback);
    return NULL;
}

const dlpack_exchange *ada_exchange_of(PyObject *object) {
    static _Thread_local PyTypeObject
        *known; /* with a reference; the one that is asked for again and again */
    static _Thread_local const dlpack_exchange *exchange;
    PyTypeObject *type = Py_TYPE(object);
    if (type == known) return exchange;
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    const dlpack_exchange *x = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
    if (!x) PyErr_Clear();
    Py_XDECREF(capsule);
    if (x && (x->header.major != 1 || !x->view)) x = NULL;
    Py_INCREF(type);
    Py_XSETREF(known, type);
    exchange = x;
    return x;
}

uintptr_t ada_current_stream(const dlpack_exchange *exchange, int device) {
    void *stream = NULL;
    if (exchange->current_stream(DLPACK_CUDA, device, &stream)) PyErr_Clear();
    return stream ? (uintptr_t)stream : 1; /* the legacy one */
}

/* A tensor of a GPU by the quick way, whose owner works on our stream: 1, or 0 where its export is to be
 * asked. */
static int view_exchanged(const ada_module_state *state, PyObject *object, const char *name,
                          const ada_place *place, ada_view *view) {
    const dlpack_exchange *exchange = ada_exchange_of(object);
    PyObject *grad = exchange ? PyObject_GetAttrString(object, "requires_grad") : NULL;
    dlpack_tensor tensor;
    if (exchange && !grad) PyErr_Clear();
    const bool refuses = grad && grad != Py_False; /* its export says why */
    Py_XDECREF(grad);
    if (!exchange || refuses || ada_current_stream(exchange, place->device) != place->stream) return 0;
    if (exchange->view(object, &tensor)) {
        PyErr_Clear();
        return 0;
    }
    if (view_tensor(state, &tensor, name, place, &view->array)) return -1;
    view->owner = Py_NewRef(object);
    return 1;
}

static int view_dlpack(const ada_module_state *state, PyObject *object, const char *name, bool writable,
                       const ada_place *place, ada_view *view) {
    const int quick = place->on_gpu ? view_exchanged(state, object, name, place, view) : 0;
    if (quick < 0) return -1;
    if (quick) {
        if (align_view(state, name, writable, place, view) == 0) return 0;
        ada_view_release(view);
        return -1;
    }
    int type, id; /* an exporter on the CPU knows no stream */
    if (place->on_gpu && (ada_dlpack_device(object, &type, &id) || check_place(state, place, type, id, name)))
        return -1;
    view->owner = export_dlpack(state, object, name, place);
    if (!view->owner) return -1;
    const dlpack_tensor *tensor = NULL;
    bool read_only = false;
    if (PyCapsule_IsValid(view->owner, "dltensor")) {
        tensor = &((dlpack_managed *)PyCapsule_GetPointer(view->owner, "dltensor"))->tensor;
    } else if (PyCapsule_IsValid(view->owner, "dltensor_versioned")) {
        dlpack_managed_versioned *managed = PyCapsule_GetPointer(view->owner, "dltensor_versioned");
        tensor = managed->version.major == 1 ? &managed->tensor : NULL;
        read_only = managed->flags & DLPACK_READ_ONLY;
    }
    if (!tensor) {
        PyErr_Format(state->dtype_error,
                     "%s: expected a DLPack tensor of version 0 or 1, got another capsule from %s", name,
                     type_name(object));
    } else if (writable && read_only) {
        PyErr_Format(state->argument_error, "%s: expected writable memory, got a read-only tensor", name);
    } else if (view_tensor(state, tensor, name, place, &view->array) == 0 &&
               align_view(state, name, writable, place, view) == 0) {
        return 0;
    }
    ada_view_release(view);
    return -1;
}

int ada_dlpack_device(PyObject *object, int *type, int *id) {
    PyObject *pair = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    const int failed =
        !pair || !PyTuple_Check(pair) || !PyArg_ParseTuple(pair, "ii", type, id); /* enumerators are ints */
    if (failed && !PyErr_Occurred())
        PyErr_Format(PyExc_TypeError, "__dlpack_device__ of %s: expected a pair of ints", type_name(object));
    Py_XDECREF(pair);
    return failed ? -1 : 0;
}

bool ada_is_cuda(int dlpack_type) { return dlpack_type == DLPACK_CUDA || dlpack_type == DLPACK_CUDA_MANAGED; }

int ada_view_of(const ada_module_state *state, PyObject *object, const char *name, bool writable,
                const ada_place *place, ada_view *view) {
    if (PyArray_Check(object))
        return place->on_gpu ? check_place(state, place, DLPACK_CPU, 0, name)
                             : view_numpy(state, object, name, writable, view);
    if (PyObject_HasAttrString(object, "__dlpack__") && !PyType_Check(object))
        return view_dlpack(state, object, name, writable, place, view);
    PyErr_Format(state->dtype_error, "%s: expected an array (NumPy's or one with __dlpack__), got %s", name,
                 type_name(object));
    return -1;
}

/* A Python int: its low 64 bits (U64), or what fits (I64). */
static PyObject *array_of_int(const ada_module_state *state, PyObject *object, const char *name,
                              ada_dtype dtype) {
    int overflow = 0;
    uint64_t bits = dtype == ADA_U64 ? PyLong_AsUnsignedLongLongMask(object)
                                     : (uint64_t)PyLong_AsLongLongAndOverflow(object, &overflow);
    PyObject *array = NULL;
    if (overflow)
        PyErr_Format(state->argument_error, "%s: expected an int of at most 64 bits, got %S", name, object);
    else if (!PyErr_Occurred())
        array = PyArray_ZEROS(0, NULL, NPY_INT64, 0);
    if (array) memcpy(PyArray_DATA((PyArrayObject *)array), &bits, sizeof bits);
    return array;
}

static PyObject *array_of_numbers(const ada_module_state *state, PyObject *object, const char *name,
                                  ada_dtype dtype) {
    const bool integers = dtype != ADA_F64;
    PyObject *array = PyArray_Check(object) && is_refused_subclass(object) ? NULL : PyArray_FROM_O(object);
    if (!array && PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_MemoryError)) return NULL;
    PyErr_Clear();
    const int type = array ? PyArray_TYPE((PyArrayObject *)array) : NPY_NOTYPE;
    bool fits = PyTypeNum_ISINTEGER(type) ||
                (!integers && array &&
                 (PyTypeNum_ISFLOAT(type) || is_bfloat16(PyArray_DESCR((PyArrayObject *)array))));
    if (!fits) {
        PyErr_Format(state->dtype_error, "%s: expected %s, got %s", name, integers ? "integers" : "numbers",
                     type_name(object));
        Py_XDECREF(array);
        return NULL;
    }
    PyObject *cast = PyArray_Cast((PyArrayObject *)array, integers ? NPY_INT64 : NPY_DOUBLE);
    /* Above the largest int64 an uint64 would turn negative; seeds are taken modulo 2^64. */
    if (cast && dtype == ADA_I64 && PyTypeNum_ISUNSIGNED(type)) {
        const int64_t *x = PyArray_DATA((PyArrayObject *)cast);
        for (npy_intp i = 0; i < PyArray_SIZE((PyArrayObject *)cast); i++)
            if (x[i] < 0) {
                PyErr_Format(state->argument_error, "%s: expected integers below 2**63, got %llu", name,
                             (unsigned long long)x[i]);
                Py_CLEAR(cast);
                break;
            }
    }
    Py_DECREF(array);
    return cast;
}

int ada_view_of_numbers(const ada_module_state *state, PyObject *object, const char *name, ada_dtype dtype,
                        ada_view *view) {
    const bool integers = dtype != ADA_F64;
    view->array.data = NULL;
    if (object == Py_None) return 0;
    const bool is_int = integers && PyLong_Check(object) && !PyBool_Check(object);
    PyObject *here = is_int ? Py_NewRef(object) : ada_on_host(object);
    if (!here) return -1;
    PyObject *array =
        is_int ? array_of_int(state, here, name, dtype) : array_of_numbers(state, here, name, dtype);
    Py_DECREF(here);
    if (!array) return -1;
    PyArrayObject *contiguous = (PyArrayObject *)array;
    if (PyArray_NDIM(contiguous) > 2) {
        PyErr_Format(state->shape_error, "%s: expected at most 2 dimensions, got %d", name,
                     PyArray_NDIM(contiguous));
        Py_DECREF(array);
        return -1;
    }
    view->owner = array;
    view->array.data = PyArray_DATA(contiguous);
    view->array.dtype = dtype;
    view->array.ndim = PyArray_NDIM(contiguous);
    for (int i = 0; i < view->array.ndim; i++) {
        view->array.shape[i] = PyArray_DIM(contiguous, i);
        view->array.stride[i] = PyArray_STRIDE(contiguous, i);
    }
    return 0;
}

bool ada_is_stored(PyObject *object) {
    return PyTuple_Check(object) && strcmp(Py_TYPE(object)->tp_name, "Stored") == 0;
}

/* Parts of codes; -1 where they are not what adaattn.cache makes. */
static int codes_of(PyObject *object, ada_codes *codes) {
    const int types[6] = {NPY_UINT8, NPY_UINT8, NPY_FLOAT, NPY_FLOAT, NPY_FLOAT, NPY_INT64};
    PyObject *parts[6];
    void *at[6];
    if (!PyArg_ParseTuple(object, "OOOOOO", &parts[0], &parts[1], &parts[2], &parts[3], &parts[4], &parts[5]))
        return -1;
    for (int i = 0; i < 6; i++) {
        PyArrayObject *array = (PyArrayObject *)parts[i];
        if (!PyArray_Check(parts[i]) || PyArray_TYPE(array) != types[i] || !PyArray_IS_C_CONTIGUOUS(array))
            return -1;
        at[i] = PyArray_DATA(array);
    }
    *codes = (ada_codes){at[0], at[1], at[2], at[3], at[4], at[5], PyArray_DIM((PyArrayObject *)parts[2], 2)};
    return 0;
}

int ada_view_of_stored(PyObject *object, ada_pages *pages, ada_codes *codes, ada_view *view) {
    static const struct {
        const char *name;
        ada_dtype dtype;
        int type;
    } kinds[] = {{"fp32", ADA_F32, NPY_FLOAT},
                 {"fp16", ADA_F16, NPY_HALF},
                 {"bf16", ADA_BF16, NPY_UINT16},
                 {"int8 keys", ADA_I8, NPY_UINT8},
                 {"int8 values", ADA_I8, NPY_UINT8}};
    const int types[4] = {NPY_FLOAT, NPY_UINT16, NPY_FLOAT, NPY_INT64};
    const char *name;
    PyObject *data, *parts[4], *figures, *coded = NULL;
    ada_array *a = &view->array;
    if (!PyArg_ParseTuple(object, "sO!OOOOO!|O", &name, &PyArray_Type, &data, &parts[0], &parts[1], &parts[2],
                          &parts[3], &PyArray_Type, &figures, &coded))
        return -1;
    PyArrayObject *array = (PyArrayObject *)data;
    size_t kind = 0;
    while (kind < 5 && strcmp(kinds[kind].name, name) != 0) kind++;
    bool good = kind < 5 && PyArray_NDIM(array) == 4 && PyArray_TYPE(array) == kinds[kind].type;
    const bool paged = good && kinds[kind].dtype == ADA_I8;
    for (int i = 0; paged && i < 4; i++)
        good &= PyArray_Check(parts[i]) && PyArray_TYPE((PyArrayObject *)parts[i]) == types[i] &&
                PyArray_IS_C_CONTIGUOUS((PyArrayObject *)parts[i]);
    good &= PyArray_NDIM((PyArrayObject *)figures) == 4 &&
            PyArray_TYPE((PyArrayObject *)figures) == NPY_FLOAT &&
            PyArray_IS_C_CONTIGUOUS((PyArrayObject *)figures);
    if (coded && codes) {
        good &= codes_of(coded, codes) == 0;
        a->codes = codes;
    }
    if (!good) {
        PyErr_SetString(PyExc_TypeError, "Stored: expected what adaattn.cache makes");
        return -1;
    }
    if (paged) {
        void *at[4];
        for (int i = 0; i < 4; i++) at[i] = PyArray_DATA((PyArrayObject *)parts[i]);
        *pages =
            (ada_pages){at[0], at[1], at[2], at[3], PyArray_DIM((PyArrayObject *)parts[0], 2), kind == 4};
        a->pages = pages;
    }
    view->owner = Py_NewRef(object);
    a->figures = PyArray_DATA((PyArrayObject *)figures);
    a->figured = PyArray_DIM((PyArrayObject *)figures, 2);
    a->data = PyArray_DATA(array);
    a->dtype = kinds[kind].dtype;
    a->ndim = 4;
    for (int i = 0; i < 4; i++) {
        a->shape[i] = PyArray_DIM(array, i);
        a->stride[i] = PyArray_STRIDE(array, i);
    }
    /* Pages are padded to whole groups of codes. */
    if (paged) a->shape[3] = PyArray_DIM((PyArrayObject *)parts[1], 3);
    return 0;
}

void *ada_elements_of(PyObject *object, ada_dtype dtype, int64_t count) {
    const int type = dtype == ADA_F64 ? NPY_DOUBLE : dtype == ADA_F32 ? NPY_FLOAT : NPY_UINT8;
    PyArrayObject *array = (PyArrayObject *)object;
    if (PyArray_Check(object) && PyArray_TYPE(array) == type && PyArray_ISCARRAY_RO(array) &&
        PyArray_SIZE(array) == count)
        return PyArray_DATA(array);
    PyErr_SetString(PyExc_TypeError, "packed: expected what the package makes");
    return NULL;
}

PyObject *ada_new_array(ada_dtype dtype, int ndim, const int64_t *shape, PyObject *like) {
    npy_intp dims[4];
    for (int i = 0; i < ndim; i++) dims[i] = (npy_intp)shape[i];
    PyArray_Descr *descr;
    if (dtype == ADA_BF16) {
        descr = PyArray_DescrNewByteorder(PyArray_DESCR((PyArrayObject *)like), NPY_NATIVE);
    } else {
        descr = PyArray_DescrFromType(dtype == ADA_F64   ? NPY_DOUBLE
                                      : dtype == ADA_F32 ? NPY_FLOAT
                                                         : NPY_HALF);
    }
    return !descr ? NULL : PyArray_NewFromDescr(&PyArray_Type, descr, ndim, dims, NULL, NULL, 0, NULL);
}
