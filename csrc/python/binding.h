/* What the files of the Python binding share. The binding validates, converts and translates; it computes nothing.
 * Functions that return int give 0, or -1 with a Python exception set. */
#ifndef LOLA_PYTHON_BINDING_H
#define LOLA_PYTHON_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL lola_numpy_api
#ifndef BINDING_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "dlpack.h"
#include "lola/lola.h"

/* Attribute and keyword names, interned once per module. */
typedef enum binding_name {
  NAME_REQUIRES_GRAD,
  NAME_EXCHANGE,
  NAME_DLPACK,
  NAME_MAX_VERSION,
  NAME_NEW_EMPTY,
  NAME_DTYPE,
  NAME_NAMESPACE,
  NAME_FINGERPRINT,
  NAME_STREAM,
  NAME_DLPACK_DEVICE,
  NAME_CUDA_INTERFACE,
  NAME_COUNT
} binding_name;

typedef struct device device; /* device.h */

/* Written while the module is executed and, but for the devices, never after, so that threads may share it. */
typedef struct binding_state {
  PyTypeObject *cache_type, *map_type, *export_type;
  PyObject *names[NAME_COUNT];
  PyObject *dlpack_version;                  /* (1, 0) */
  _Atomic(const struct lola_cuda_api *) api; /* the table found last */
  _Atomic(device *) devices;                 /* those in use so far, the last one first */
  PyThread_type_lock devices_lock;           /* of additions to the list */
} binding_state;

binding_state *binding_state_of(PyObject *module);
binding_state *binding_state_of_type(PyTypeObject *type);

/* --- errors.c ------------------------------------------------------------------------------- */

/* Raises what a status stands for; an exception that is already set stays. Always returns -1. */
int raise_status(lola_status status, const lola_message *message);
/* Raises `type` with this text, the present exception as its cause. Always returns -1. */
int raise_from_present(PyObject *type, const char *format, ...);

/* --- callers' arrays ------------------------------------------------------------------------ */

enum { MAX_NDIM = 8 };

typedef enum element {
  ELEMENT_FLOAT32 = LOLA_FLOAT32,
  ELEMENT_FLOAT16 = LOLA_FLOAT16,
  ELEMENT_BFLOAT16 = LOLA_BFLOAT16,
  ELEMENT_FLOAT64,
  ELEMENT_INT,
  ELEMENT_OTHER
} element;

/* Whose current stream work on a device belongs to. */
typedef struct library {
  enum { LIBRARY_NONE, LIBRARY_EXCHANGE, LIBRARY_TORCH, LIBRARY_CUPY } kind;
  const dl_exchange *exchange; /* of LIBRARY_EXCHANGE */
} library;

enum { ON_HOST = -1 }; /* in the place of a device's number */

/* A caller's array, opened for the duration of a call. All zero is a closed view. */
typedef struct view {
  const char *name;  /* of the argument */
  PyObject *object;  /* the caller's, borrowed */
  PyObject *capsule; /* what to release after: DLPack's, or the owner of a copy */
  dl_managed_versioned *managed;
  element element;
  int type_num; /* NumPy's number for the memory: uint16 where it holds bfloat16 */
  int item_size;
  char dtype[24]; /* for messages */
  int read_only;
  int device;      /* where the memory is: a number, or ON_HOST */
  library library; /* with a device */
  void *stream;    /* on a device: the data are ready in this stream's order */
  char *data;
  int ndim;
  int64_t shape[MAX_NDIM], strides[MAX_NDIM]; /* strides in bytes */
} view;

/* --- opening.c ------------------------------------------------------------------------------ */

/* 1 with *value set, 0 where there is no such attribute, -1 with an exception. */
int find_attribute(PyObject *object, PyObject *name, PyObject **value);
/* NumPy's number for an integer type. */
int integer_type_num(int is_signed, int bits);
void view_set_element(view *array, element element, int type_num);

/* Opens a NumPy array, or anything that speaks DLPack or has a __cuda_array_interface__. */
int view_open(binding_state *state, PyObject *object, const char *name, view *result);
/* Reads a device array into memory of the view's own, and waits for it; nothing to do on the host. */
int view_to_host(binding_state *state, view *array);
void view_close(view *array);

const char *dtype_name(lola_dtype dtype);
/* 0, or -1 with ValueError. */
int dtype_from_name(const char *name, lola_dtype *dtype);

/* --- arrays.c ------------------------------------------------------------------------------- */

/* The shape must equal `want`, where -1 stands for any size; `symbols` tell the axes' names: "(B, T, Hq, D)". */
int view_expect_shape(const view *array, const char *symbols, int ndim, const int64_t *want);
/* Must be float32, float16 or bfloat16. */
int view_expect_float(const view *array);
int view_expect_dtype(const view *array, lola_dtype dtype, const char *why);
/* As the core takes it; the last axis, or with `scalars` no axis, holds the n numbers of a pair. */
int view_to_array(const view *array, int scalars, lola_array *result);
/* A result array must be writable and must not overlap itself. */
int view_expect_output(const view *array);
/* Raises when the two share memory. */
int view_expect_apart(binding_state *state, const view *output, const view *input);
int view_overlaps(const view *array, const void *data, int64_t nbytes);

/* First byte and the one after the last. */
void view_extent(const view *array, const char **low, const char **high);
int view_is_dense(const view *array);
int64_t view_size(const view *array); /* elements */

/* A new C-contiguous float32 or int64 array on the host from any array or sequence of numbers; shape checks as above.
 */
PyArrayObject *floats_from(binding_state *state, PyObject *object, const char *name, const char *symbols, int ndim,
                           const int64_t *want);
PyArrayObject *integers_from(binding_state *state, PyObject *object, const char *name, const char *symbols, int ndim,
                             const int64_t *want);

/* A NumPy array over memory that `owner` keeps alive. Bfloat16 becomes ml_dtypes' where that is installed, else uint16.
 */
PyObject *array_over(PyObject *owner, const lola_buffer *buffer, int writable);

/* A new array of the same library and on the same device as a caller's one, open so that it can be filled. All zero is
 * a closed result. */
typedef struct result {
  PyObject *object;
  PyObject *import; /* from_dlpack of the caller's library, where that is neither NumPy nor torch */
  view opened;
} result;

/* `stream`: that the array will be filled on, where it lies on a device. */
int result_new(binding_state *state, const view *like, const char *name, int ndim, const int64_t *shape,
               element element, void *stream, result *made);
/* The finished array, a new reference. Does not fail: an array that its library refuses is returned as NumPy's. */
PyObject *result_take(binding_state *state, result *made);
void result_close(result *made);

/* --- export.c ------------------------------------------------------------------------------- */

/* An object that offers a NumPy array's memory through DLPack, bfloat16 too, which NumPy itself does not. */
PyObject *export_new(binding_state *state, PyArrayObject *array, element element);
/* The same over dense device memory of `cache`. */
PyObject *export_cache(binding_state *state, PyObject *cache, const lola_buffer *buffer, int writable);
/* The same with dense device memory of its own, uninitialised, in the order of `stream`; `data` is where it lies. */
PyObject *export_allocate(binding_state *state, int device, void *stream, element element, int ndim,
                          const int64_t *shape, void **data);
/* Says that an allocated one is written in its stream's order from here on. */
void export_written(PyObject *object);
extern PyType_Spec export_spec;

/* --- arguments.c ---------------------------------------------------------------------------- */

int expect_argument_count(const char *function, Py_ssize_t given, Py_ssize_t wanted);
int int64_from(PyObject *object, const char *name, int64_t *value);
/* An index into n things, negative ones from the end. */
int index_from(PyObject *object, const char *name, int64_t n, int64_t *value);
int bool_from(PyObject *object, const char *name, int *value);
int string_from(PyObject *object, const char *name, const char **value);
/* Numbers to and from the names that Python uses. */
int mixing_from(PyObject *object, lola_mixing *mixing);
const char *mixing_name(lola_mixing mixing);
/* A lola.Config's fields; `mixing` is -1 for None, `scale` NaN for None. */
int config_from(PyObject *object, lola_config *config, int *mixing, double *scale);
/* The gate as a new float32 array (Hq,) on the host, every value in (0, 1). */
PyArrayObject *gate_from(binding_state *state, PyObject *object, int64_t heads);
int gate_expect(const float *values, int64_t heads);

/* --- feature_map.c -------------------------------------------------------------------------- */

typedef struct map_copy map_copy;

typedef struct feature_map_object {
  PyObject_HEAD lola_map_kind kind;
  PyArrayObject *w_q, *w_k;   /* (Hq, D, M) float32, or NULL */
  _Atomic(map_copy *) copies; /* of the weights on devices, made when first needed */
} feature_map_object;

extern PyType_Spec feature_map_spec;
const char *map_kind_name(lola_map_kind kind);
int map_kind_from_name(const char *name, lola_map_kind *kind);
int feature_map_expect(binding_state *state, PyObject *object);
/* F for these sizes, -1 with ValueError when the weights are for others. */
int64_t feature_map_dim(const feature_map_object *map, int64_t heads, int64_t head_dim);
lola_feature_map feature_map_raw(const feature_map_object *map);
/* The same with weights on a device. Whoever queues work that reads them has the device's keeper wait for it before the
 * map may go. */
int feature_map_on(feature_map_object *map, device *device, lola_feature_map *raw);

/* --- cache.c -------------------------------------------------------------------------------- */

/* What a cache's first call fixed for its life. */
typedef struct terms {
  int bound;
  lola_mixing mixing;
  lola_dtype query_dtype;
  lola_map_kind source;  /* LOLA_MAP_GIVEN: the caller's own features */
  PyObject *map;         /* the feature map object, or NULL */
  PyObject *fingerprint; /* its str, or NULL as long as nobody asked */
  PyArrayObject *gate;   /* (Hq,) float32, or NULL where the mixing reads none, or a device alone knows it */
} terms;

typedef struct device_cache device_cache; /* device.h */

typedef struct cache_object {
  PyObject_HEAD lola_cache *cache;
  PyObject *config;
  int mixing;   /* of the configuration, -1: by the gate */
  double scale; /* of the configuration, NaN: D ** -0.5 */
  terms terms;  /* guarded by the lock, as the cache is */
  PyThread_type_lock lock;
  _Atomic unsigned long holder; /* thread that holds the lock, 0: none */
  device_cache *on;             /* NULL on the host */
} cache_object;

extern PyType_Spec cache_spec;
/* `device` NULL: on the host; else the memory is queued on `stream`. */
cache_object *cache_new(PyTypeObject *type, PyObject *config, const lola_shape *shape, device *device, void *stream);
/* Waits with the GIL released; raises RuntimeError in a signal handler that interrupted a call on the same cache. */
int cache_lock(cache_object *self);
void cache_unlock(cache_object *self);
/* Begins and ends an operation on the cache, on a device in the order of the last caller's current stream. */
int cache_begin(cache_object *self);
void cache_end(cache_object *self);
/* raise_status; after a fault of its device the cache is unusable. */
int cache_fail(cache_object *self, lola_status status, const lola_message *message);
/* Waits for what is queued in the cache's order. */
int cache_wait(cache_object *self);
void terms_clear(terms *bound);
terms terms_copy(const terms *bound);
/* Whether a mixing reads the gate. */
int mixing_reads_gate(lola_mixing mixing);
/* The bound gate on the host, which a device cache may have to read; the caller holds the lock. Borrowed. */
PyArrayObject *cache_gate(cache_object *self);

/* --- cache_rows.c --------------------------------------------------------------------------- */

PyObject *cache_gather(cache_object *self, PyObject *rows);
PyObject *cache_gather_in_place(cache_object *self, PyObject *rows);
PyObject *cache_to(cache_object *self, PyObject *device);
PyObject *cache_reset(cache_object *self, PyObject *rows);
PyObject *cache_crop(cache_object *self, PyObject *tokens);
PyObject *cache_check(cache_object *self, PyObject *unused);
PyObject *cache_sync(cache_object *self, PyObject *unused);

/* --- attention.c, kernels.c ----------------------------------------------------------------- */

typedef PyObject *(*fast_function)(PyObject *, PyObject *const *, Py_ssize_t);

PyObject *py_attention(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *py_features(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *py_score(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *py_select(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *py_fold(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *py_attend(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

#endif
