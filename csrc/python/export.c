/* A DLPack producer over NumPy memory. NumPy's own refuses bfloat16, which results for other libraries may be. */
#include "binding.h"

#include <stdlib.h>

typedef struct export_object {
  PyObject_HEAD PyArrayObject *array;
  element element;
} export_object;

/* What a consumer receives: either struct, its sizes, and the array that owns the memory. */
typedef struct shipment {
  union {
    dl_managed plain;
    dl_managed_versioned versioned;
  } managed;
  PyObject *array;
  int64_t shape[MAX_NDIM], strides[MAX_NDIM];
} shipment;

static void shipment_free(shipment *shipped) {
  /* Consumers may let go on any thread, and after the interpreter is gone. */
  if (Py_IsInitialized()) {
    PyGILState_STATE gil = PyGILState_Ensure();
    Py_DECREF(shipped->array);
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

static PyObject *export_dlpack(export_object *self, PyObject *arguments, PyObject *keywords) {
  static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
  PyObject *stream = NULL, *version = NULL, *device = NULL, *copy = NULL;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|$OOOO", names, &stream, &version, &device, &copy))
    return NULL;
  int versioned = wants_version(version);
  if (versioned < 0) return NULL;
  shipment *shipped = calloc(1, sizeof *shipped);
  if (!shipped) return PyErr_NoMemory();
  shipped->array = Py_NewRef((PyObject *)self->array);
  dl_tensor *tensor = versioned ? &shipped->managed.versioned.tensor : &shipped->managed.plain.tensor;
  int item = (int)PyArray_ITEMSIZE(self->array);
  tensor->data = PyArray_DATA(self->array);
  tensor->device.type = DL_CPU;
  tensor->ndim = PyArray_NDIM(self->array);
  tensor->dtype.code = self->element == ELEMENT_BFLOAT16 ? DL_BFLOAT : self->element == ELEMENT_INT ? DL_INT : DL_FLOAT;
  tensor->dtype.bits = (uint8_t)(item * 8);
  tensor->dtype.lanes = 1;
  tensor->shape = shipped->shape;
  tensor->strides = shipped->strides;
  for (int i = 0; i < tensor->ndim; i++) {
    shipped->shape[i] = PyArray_DIM(self->array, i);
    shipped->strides[i] = PyArray_STRIDE(self->array, i) / item;
  }
  if (versioned) {
    shipped->managed.versioned.version.major = DL_MAJOR;
    shipped->managed.versioned.context = shipped;
    shipped->managed.versioned.deleter = delete_versioned;
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

static PyObject *export_device(PyObject *self, PyObject *unused) {
  (void)self;
  (void)unused;
  return Py_BuildValue("(ii)", DL_CPU, 0);
}

static void export_dealloc(export_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  Py_XDECREF(self->array);
  type->tp_free(self);
  Py_DECREF(type);
}

static PyMethodDef export_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))export_dlpack, METH_VARARGS | METH_KEYWORDS, NULL},
    {"__dlpack_device__", export_device, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot export_slots[] = {
    {Py_tp_dealloc, export_dealloc},
    {Py_tp_methods, export_methods},
    {0, NULL},
};

PyType_Spec export_spec = {
    .name = "lola._lola.Export",
    .basicsize = sizeof(export_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = export_slots,
};

PyObject *export_new(binding_state *state, PyArrayObject *array, element element) {
  export_object *self = (export_object *)state->export_type->tp_alloc(state->export_type, 0);
  if (!self) return NULL;
  self->array = (PyArrayObject *)Py_NewRef((PyObject *)array);
  self->element = element;
  return (PyObject *)self;
}
