/* The DLPack structures of a tensor, as its specification (version 1.x) lays them out in memory. */
#ifndef ADA_DLPACK_H
#define ADA_DLPACK_H

#include <stdint.h>

enum { DLPACK_CPU = 1, DLPACK_CUDA = 2, DLPACK_CUDA_HOST = 3, DLPACK_CUDA_MANAGED = 13 };
enum { DLPACK_INT = 0, DLPACK_UINT = 1, DLPACK_FLOAT = 2, DLPACK_BFLOAT = 4, DLPACK_BOOL = 6 };
enum { DLPACK_READ_ONLY = 1 };

typedef struct {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape;
    int64_t *strides; /* elements; NULL: C-contiguous */
    uint64_t byte_offset;
} dlpack_tensor;

/* Capsule "dltensor". */
typedef struct dlpack_managed {
    dlpack_tensor tensor;
    void *manager;
    void (*deleter)(struct dlpack_managed *);
} dlpack_managed;

/* Capsule "dltensor_versioned". */
typedef struct dlpack_managed_versioned {
    struct {
        uint32_t major, minor;
    } version;
    void *manager;
    void (*deleter)(struct dlpack_managed_versioned *);
    uint64_t flags;
    dlpack_tensor tensor;
} dlpack_managed_versioned;

/* What a type of array may have as __dlpack_c_exchange_api__, a capsule "dlpack_exchange_api" (since 1.3):
 * the same without Python and without ordering streams. Both return 0, or -1 with an exception. */
typedef struct {
    struct {
        uint32_t major, minor;
        void *older;
    } header;
    void *allocate, *export_managed, *import_managed;
    int (*view)(void *object, dlpack_tensor *tensor); /* good as long as the object; may be NULL */
    int (*current_stream)(int device_type, int32_t device_id, void **stream);
} dlpack_exchange;

#endif
