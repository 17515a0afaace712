/* The parts of the DLPack ABI that the binding reads and writes: version 1, and the unversioned struct before it.
 * Specification: https://dmlc.github.io/dlpack/latest/c_api.html */
#ifndef LOLA_PYTHON_DLPACK_H
#define LOLA_PYTHON_DLPACK_H

#include <stdint.h>

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3 };
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_BOOL = 6 };
enum { DL_MAJOR = 1, DL_FLAG_READ_ONLY = 1 };

typedef struct dl_tensor {
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
  int64_t *strides; /* in elements; NULL: row-major */
  uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed { /* in a capsule named "dltensor" */
  dl_tensor tensor;
  void *context;
  void (*deleter)(struct dl_managed *);
} dl_managed;

typedef struct dl_managed_versioned { /* in a capsule named "dltensor_versioned" */
  struct {
    uint32_t major, minor;
  } version;
  void *context;
  void (*deleter)(struct dl_managed_versioned *);
  uint64_t flags;
  dl_tensor tensor;
} dl_managed_versioned;

/* In a capsule named "dlpack_exchange_api", the attribute __dlpack_c_exchange_api__ of a tensor type. */
typedef struct dl_exchange {
  struct {
    uint32_t major, minor;
  } version;
  void *previous;
  void (*allocate)(void);
  int (*from_object)(void *object, dl_managed_versioned **result);
  void (*to_object)(void);
  void (*view_object)(void);
  int (*current_stream)(int device_type, int32_t device, void **stream);
} dl_exchange;

#endif
