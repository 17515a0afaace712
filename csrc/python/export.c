/* A DLPack producer over a NumPy array's memory, where NumPy's own refuses bfloat16, and over memory of a device: a
 * cache's, or its own for a result whose library cannot allocate by itself. */
#include "device.h"

#include <stddef.h>
#include <stdlib.h>

typedef struct export_object {
  PyObject_HEAD PyObject *owner; /* a NumPy array or a cache; NULL: memory of its own */
  element element;
  int item, read_only;
  char *data;
  int ndim;
  int64_t shape[MAX_NDIM], strides[MAX_NDIM]; /* strides in elements */
  device *device;                             /* NULL: on the host */
  void *stream, *event;                       /* of memory of its own: where it was written, and when */
} export_object;

/* What a consumer receives: either struct, its sizes, and the object that owns the memory. */
typedef struct shipment {
  union {
    dl_managed plain;
    dl_managed_versioned versioned;
  } managed;
  PyObject *owner;
  int64_t shape[MAX_NDIM], strides[MAX_NDIM];
} shipment;

static void shipment_free(shipment *shipped) {
  /* Consumers may let go on any thread, and after the interpreter is gone. */
  if (Py_IsInitialized()) {
    PyGILState_STATE gil = PyGILState_Ensure();
    Py_DECREF(shipped->owner);
    PyGILState_Release(gil);
  }
  free(shipped);
}

static void delete_plain(dl_managed *managed) { shipment_free(managed->context); }
static void delete_versioned(dl_managed_versioned *managed) { shipment_free(managed->context); }

static void abandon(PyObject *capsule) {
  /* A consumer that takes the memory over renames the capsule. */
  if (PyCapsule_IsValid(capsule, "dltensor") || PyCapsule_IsValid(capsule, "dltensor_versioned"))
    shipment_free(PyCapsule_GetContext(capsule));
}

static int wants_version(PyObject *version) {
  if (!version || version == Py_None) return 0;
  PyObject *major = PySequence_GetItem(version, 0);
  long value = major ? PyLong_AsLong(major) : -1;
  Py_XDECREF(major);
  return value == -1 && PyErr_Occurred() ? -1 : value >= DL_MAJOR;
}

/* --- the order of streams ------------------------------------------------------------------- */

/* The event after the last write that we know of, and its stream. */
static void *last_event(const export_object *self, void **stream) {
  const device_cache *on = self->owner ? ((const cache_object *)self->owner)->on : NULL;
  *stream = on ? on->last : self->stream;
  return on ? on->event : self->event;
}

/* The consumer's stream waits for the memory's last use. `number` as DLPack has it: -1 asks for no wait. */
static int wait_for_use(export_object *self, PyObject *number) {
  void *stream = NULL, *last;
  if (number && number != Py_None) {
    long long value = PyLong_AsLongLong(number);
    if (value == -1) return PyErr_Occurred() ? -1 : 0;
    stream = value == 1 ? NULL : (void *)(intptr_t)value;
  }
  void *event = last_event(self, &last);
  const lola_cuda_api *api = self->device->api;
  lola_message message;
  int capturing = 0;
  if (!event || stream == last) return 0;
  lola_status status = api->capturing(self->device->number, stream, &capturing, &message);
  if (!status && !capturing) status = api->event_wait(self->device->number, event, stream, &message);
  return status ? raise_status(status, &message) : 0;
}

void export_written(PyObject *object) {
  export_object *self = (export_object *)object;
  const lola_cuda_api *api = self->device->api;
  lola_message ignored;
  int capturing = 1;
  api->capturing(self->device->number, self->stream, &capturing, &ignored);
  if (!capturing) api->event_record(self->device->number, self->event, self->stream, &ignored);
}

/* --- the protocols -------------------------------------------------------------------------- */

static PyObject *export_dlpack(export_object *self, PyObject *arguments, PyObject *keywords) {
  static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
  PyObject *stream = NULL, *version = NULL, *device = NULL, *copy = NULL;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|$OOOO", names, &stream, &version, &device, &copy))
    return NULL;
  int versioned = wants_version(version);
  if (versioned < 0 || (self->device && wait_for_use(self, stream))) return NULL;
  shipment *shipped = calloc(1, sizeof *shipped);
  if (!shipped) return PyErr_NoMemory();
  shipped->owner = Py_NewRef(self->device ? (PyObject *)self : self->owner);
  dl_tensor *tensor = versioned ? &shipped->managed.versioned.tensor : &shipped->managed.plain.tensor;
  tensor->data = self->data;
  tensor->device.type = self->device ? DL_CUDA : DL_CPU;
  tensor->device.id = self->device ? self->device->number : 0;
  tensor->ndim = self->ndim;
  tensor->dtype.code = self->element == ELEMENT_BFLOAT16 ? DL_BFLOAT : self->element == ELEMENT_INT ? DL_INT : DL_FLOAT;
  tensor->dtype.bits = (uint8_t)(self->item * 8);
  tensor->dtype.lanes = 1;
  tensor->shape = shipped->shape;
  tensor->strides = shipped->strides;
  for (int i = 0; i < self->ndim; i++) {
    shipped->shape[i] = self->shape[i];
    shipped->strides[i] = self->strides[i];
  }
  if (versioned) {
    shipped->managed.versioned.version.major = DL_MAJOR;
    shipped->managed.versioned.context = shipped;
    shipped->managed.versioned.deleter = delete_versioned;
    shipped->managed.versioned.flags = self->read_only ? DL_FLAG_READ_ONLY : 0;
  } else {
    shipped->managed.plain.context = shipped;
    shipped->managed.plain.deleter = delete_plain;
  }
  PyObject *capsule = PyCapsule_New(&shipped->managed, versioned ? "dltensor_versioned" : "dltensor", abandon);
  if (!capsule || PyCapsule_SetContext(capsule, shipped)) {
    if (!capsule) shipment_free(shipped);
    Py_XDECREF(capsule);
    return NULL;
  }
  return capsule;
}

static PyObject *export_device(export_object *self, PyObject *unused) {
  (void)unused;
  return Py_BuildValue("(ii)", self->device ? DL_CUDA : DL_CPU, self->device ? self->device->number : 0);
}

static PyObject *get_shape(export_object *self, void *unused) {
  (void)unused;
  PyObject *shape = PyTuple_New(self->ndim);
  for (int i = 0; shape && i < self->ndim; i++) {
    PyObject *size = PyLong_FromLongLong(self->shape[i]);
    if (!size)
      Py_CLEAR(shape);
    else
      PyTuple_SET_ITEM(shape, i, size);
  }
  return shape;
}

static int64_t count(const export_object *self) {
  int64_t elements = 1;
  for (int i = 0; i < self->ndim; i++) elements *= self->shape[i];
  return elements;
}

static PyObject *get_interface(export_object *self, void *unused) {
  (void)unused;
  if (!self->device) {
    PyErr_SetString(PyExc_AttributeError, "this array lies in CPU memory");
    return NULL;
  }
  PyObject *shape = get_shape(self, NULL);
  if (!shape) return NULL;
  void *stream;
  last_event(self, &stream);
  /* The protocol has no bfloat16: its bits. The default stream is called 1 in it. */
  const char *type = self->element == ELEMENT_INT       ? "<i8"
                     : self->element == ELEMENT_FLOAT32 ? "<f4"
                     : self->element == ELEMENT_FLOAT16 ? "<f2"
                                                        : "<u2";
  PyObject *address = PyLong_FromVoidPtr(count(self) ? self->data : NULL);
  PyObject *work = PyLong_FromVoidPtr(stream ? stream : (void *)1);
  PyObject *made = address && work ? Py_BuildValue("{sOsss(OO)sOsisO}", "shape", shape, "typestr", type, "data",
                                                   address, self->read_only ? Py_True : Py_False, "strides", Py_None,
                                                   "version", 3, "stream", work)
                                   : NULL;
  Py_XDECREF(address);
  Py_XDECREF(work);
  Py_DECREF(shape);
  return made;
}

static PyObject *get_dtype(export_object *self, void *unused) {
  (void)unused;
  return PyUnicode_FromString(self->element == ELEMENT_INT ? "int64" : dtype_name((lola_dtype)self->element));
}

static PyObject *get_device(export_object *self, void *unused) {
  (void)unused;
  return PyUnicode_FromString(name_of_device(self->device ? self->device->number : ON_HOST).text);
}

static PyObject *get_nbytes(export_object *self, void *unused) {
  (void)unused;
  return PyLong_FromLongLong(count(self) * self->item);
}

/* Dense memory on a device as a NumPy array of bytes: in the order of the cache's last caller, or of who wrote it. */
static PyObject *read_bytes(binding_state *state, export_object *self) {
  const device_cache *on = self->owner ? ((const cache_object *)self->owner)->on : NULL;
  const lola_cuda_api *api = self->device->api;
  int number = self->device->number;
  void *stream = self->stream;
  lola_message message;
  npy_intp bytes = (npy_intp)(count(self) * self->item);
  if (on && device_cache_stream(state, on, &stream)) return NULL;
  PyObject *copy = PyArray_SimpleNew(1, &bytes, NPY_UINT8);
  if (!copy) return NULL;
  lola_status status = LOLA_OK;
  if (on && stream != on->last) status = api->event_wait(number, on->event, stream, &message);
  Py_BEGIN_ALLOW_THREADS if (!status && bytes) status =
      api->copy(number, PyArray_DATA((PyArrayObject *)copy), self->data, bytes, LOLA_COPY_TO_HOST, stream, &message);
  if (!status) status = api->synchronize(number, stream, &message);
  Py_END_ALLOW_THREADS if (!status) return copy;
  Py_DECREF(copy);
  raise_status(status, &message);
  return NULL;
}

static PyObject *export_numpy(export_object *self, PyObject *unused) {
  (void)unused;
  if (!self->device) return PyArray_NewCopy((PyArrayObject *)self->owner, NPY_CORDER);
  binding_state *state = binding_state_of_type(Py_TYPE(self));
  PyObject *bytes = state ? read_bytes(state, self) : NULL;
  if (!bytes) return NULL;
  int integers = self->element == ELEMENT_INT;
  lola_buffer buffer = {.kind = integers ? LOLA_BUFFER_INT64 : LOLA_BUFFER_FLOAT,
                        .dtype = integers ? LOLA_FLOAT32 : (lola_dtype)self->element,
                        .ndim = self->ndim,
                        .data = PyArray_DATA((PyArrayObject *)bytes)};
  for (int i = 0; i < self->ndim; i++) buffer.shape[i] = self->shape[i];
  PyObject *made = array_over(bytes, &buffer, 1);
  Py_DECREF(bytes);
  return made;
}

/* --- making them ---------------------------------------------------------------------------- */

static export_object *make(binding_state *state, element element, int ndim, const int64_t *shape) {
  export_object *self = (export_object *)state->export_type->tp_alloc(state->export_type, 0);
  if (!self) return NULL;
  self->element = element;
  self->item = element == ELEMENT_INT || element == ELEMENT_FLOAT64 ? 8 : element == ELEMENT_FLOAT32 ? 4 : 2;
  self->ndim = ndim;
  int64_t dense = 1;
  for (int i = ndim; i-- > 0;) {
    self->shape[i] = shape[i];
    self->strides[i] = dense;
    dense *= shape[i];
  }
  return self;
}

PyObject *export_new(binding_state *state, PyArrayObject *array, element element) {
  int64_t shape[MAX_NDIM];
  for (int i = 0; i < PyArray_NDIM(array); i++) shape[i] = PyArray_DIM(array, i);
  export_object *self = make(state, element, PyArray_NDIM(array), shape);
  if (!self) return NULL;
  for (int i = 0; i < self->ndim; i++) self->strides[i] = PyArray_STRIDE(array, i) / self->item;
  self->owner = Py_NewRef((PyObject *)array);
  self->data = PyArray_DATA(array);
  return (PyObject *)self;
}

PyObject *export_cache(binding_state *state, PyObject *cache, const lola_buffer *buffer, int writable) {
  element element = buffer->kind == LOLA_BUFFER_FLOAT ? (enum element)buffer->dtype : ELEMENT_INT;
  export_object *self = make(state, element, buffer->ndim, buffer->shape);
  if (!self) return NULL;
  self->owner = Py_NewRef(cache);
  self->data = buffer->data;
  self->read_only = !writable;
  device_cache *on = ((cache_object *)cache)->on;
  self->device = on->device;
  on->exported = 1;
  return (PyObject *)self;
}

PyObject *export_allocate(binding_state *state, int number, void *stream, element element, int ndim,
                          const int64_t *shape, void **data) {
  export_object *self = make(state, element, ndim, shape);
  if (!self) return NULL;
  self->device = device_of(state, number);
  self->stream = stream;
  const lola_cuda_api *api = self->device->api;
  lola_message message;
  void *memory = NULL;
  lola_status status = api->event_create(number, &self->event, &message);
  if (!status) status = api->allocate(number, count(self) * self->item, stream, &memory, &message);
  *data = self->data = memory;
  if (!status) return (PyObject *)self;
  raise_status(status, &message);
  Py_DECREF(self);
  return NULL;
}

static void export_dealloc(export_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  if (self->event) { /* memory of its own; who took it over through DLPack holds us for as long as it is used */
    const lola_cuda_api *api = self->device->api;
    lola_message ignored;
    if (self->data) {
      api->event_wait(self->device->number, self->event, self->device->keeper, &ignored);
      device_keep_for(self->device, NULL);
      api->release(self->device->number, self->data, self->device->keeper);
    }
    api->event_destroy(self->device->number, self->event);
  }
  Py_XDECREF(self->owner);
  type->tp_free(self);
  Py_DECREF(type);
}

static PyMethodDef export_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))export_dlpack, METH_VARARGS | METH_KEYWORDS, NULL},
    {"__dlpack_device__", (PyCFunction)(void (*)(void))export_device, METH_NOARGS, NULL},
    {"numpy", (PyCFunction)(void (*)(void))export_numpy, METH_NOARGS,
     "numpy($self, /)\n--\n\nA copy on the host, once what was queued has been written."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef export_properties[] = {
    {"__cuda_array_interface__", (getter)get_interface, NULL, NULL, NULL},
    {"shape", (getter)get_shape, NULL, "Sizes of the axes.", NULL},
    {"dtype", (getter)get_dtype, NULL, "\"float32\", \"float16\", \"bfloat16\" or \"int64\".", NULL},
    {"device", (getter)get_device, NULL, "\"cpu\" or \"cuda:0\" and so on.", NULL},
    {"nbytes", (getter)get_nbytes, NULL, "Bytes.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot export_slots[] = {
    {Py_tp_dealloc, export_dealloc},
    {Py_tp_methods, export_methods},
    {Py_tp_getset, export_properties},
    {Py_tp_doc, "Memory that other libraries take through DLPack or __cuda_array_interface__, without a copy."},
    {0, NULL},
};

PyType_Spec export_spec = {
    .name = "lola._lola.Array",
    .basicsize = sizeof(export_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = export_slots,
};
