/* lola._lola.FeatureMap: the weights of a feature map, checked once and never changed after. */
#include "device.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

static const char *const kind_names[] = {"given", "hedgehog", "hedgehog_exp", "elu_plus_one", "relu"};

const char *map_kind_name(lola_map_kind kind) { return kind_names[kind]; }

int map_kind_from_name(const char *name, lola_map_kind *kind) {
  for (int i = LOLA_MAP_GIVEN; i <= LOLA_MAP_RELU; i++)
    if (!strcmp(name, kind_names[i])) {
      *kind = (lola_map_kind)i;
      return 0;
    }
  PyErr_Format(PyExc_ValueError, "a feature map must be 'hedgehog', 'hedgehog_exp', 'elu_plus_one' or 'relu', got '%s'",
               name);
  return -1;
}

int feature_map_expect(binding_state *state, PyObject *object) {
  if (PyObject_TypeCheck(object, state->map_type)) return 0;
  PyErr_Format(PyExc_TypeError,
               "feature_map must be a lola.Hedgehog, HedgehogExp, EluPlusOne or Relu, got %.100s (features of your own "
               "are passed as q_features and k_features)",
               Py_TYPE(object)->tp_name);
  return -1;
}

int64_t feature_map_dim(const feature_map_object *map, int64_t heads, int64_t head_dim) {
  if (!map->w_q) return head_dim;
  const npy_intp *shape = PyArray_DIMS(map->w_q);
  if (shape[0] != heads || shape[1] != head_dim) {
    PyErr_Format(PyExc_ValueError, "feature_map must have weights for (Hq, D) = (%lld, %lld), got (%lld, %lld)",
                 (long long)heads, (long long)head_dim, (long long)shape[0], (long long)shape[1]);
    return -1;
  }
  return map->kind == LOLA_MAP_RELU ? shape[2] : 2 * shape[2];
}

lola_feature_map feature_map_raw(const feature_map_object *map) {
  return (lola_feature_map){map->kind, map->w_q ? PyArray_DATA(map->w_q) : NULL,
                            map->w_k ? PyArray_DATA(map->w_k) : NULL};
}

/* --- weights on devices --------------------------------------------------------------------- */

struct map_copy {
  device *device;
  float *w_q, *w_k;
  map_copy *next;
};

static lola_status copy_weights(map_copy *made, const feature_map_object *map, lola_message *message) {
  const lola_cuda_api *api = made->device->api;
  int number = made->device->number;
  void *keeper = made->device->keeper;
  int64_t bytes = (int64_t)PyArray_NBYTES(map->w_q);
  lola_status status = api->allocate(number, bytes, keeper, (void **)&made->w_q, message);
  if (!status) status = api->allocate(number, bytes, keeper, (void **)&made->w_k, message);
  if (!status)
    status = api->copy(number, made->w_q, PyArray_DATA(map->w_q), bytes, LOLA_COPY_TO_DEVICE, keeper, message);
  if (!status)
    status = api->copy(number, made->w_k, PyArray_DATA(map->w_k), bytes, LOLA_COPY_TO_DEVICE, keeper, message);
  /* Once and for all, so that every stream may read them from here on. */
  return status ? status : api->synchronize(number, keeper, message);
}

static void release_copy(map_copy *copy) {
  const device *device = copy->device;
  if (copy->w_q) device->api->release(device->number, copy->w_q, device->keeper);
  if (copy->w_k) device->api->release(device->number, copy->w_k, device->keeper);
  PyMem_RawFree(copy);
}

static map_copy *find_copy(feature_map_object *map, const device *device) {
  map_copy *copy = atomic_load(&map->copies);
  while (copy && copy->device != device) copy = copy->next;
  return copy;
}

int feature_map_on(feature_map_object *map, device *device, lola_feature_map *raw) {
  *raw = (lola_feature_map){map->kind, NULL, NULL};
  if (!map->w_q) return 0;
  map_copy *copy = find_copy(map, device);
  if (!copy) {
    lola_message message;
    copy = PyMem_RawCalloc(1, sizeof *copy);
    if (!copy) {
      PyErr_NoMemory();
      return -1;
    }
    copy->device = device;
    lola_status status = copy_weights(copy, map, &message);
    if (status) {
      release_copy(copy);
      return raise_status(status, &message);
    }
    copy->next = atomic_load(&map->copies);
    while (!atomic_compare_exchange_weak(&map->copies, &copy->next, copy)) /* two of one device do no harm */
      ;
  }
  raw->w_q = copy->w_q;
  raw->w_k = copy->w_k;
  return 0;
}

/* --- the type ------------------------------------------------------------------------------- */

static PyArrayObject *weights_from(binding_state *state, PyObject *object, const char *name, const int64_t *want) {
  PyArrayObject *weights = floats_from(state, object, name, "(Hq, D, M)", 3, want);
  if (!weights) return NULL;
  if (!PyArray_SIZE(weights)) {
    const npy_intp *shape = PyArray_DIMS(weights);
    PyErr_Format(PyExc_ValueError, "%s must have no axis of size 0, got shape (%zd, %zd, %zd)", name, shape[0],
                 shape[1], shape[2]);
    Py_DECREF(weights);
    return NULL;
  }
  const float *values = PyArray_DATA(weights);
  for (npy_intp i = 0, n = PyArray_SIZE(weights); i < n; i++)
    if (!isfinite(values[i])) {
      PyErr_Format(PyExc_ValueError, "%s must be finite, got %s", name, isnan(values[i]) ? "NaN" : "infinity");
      Py_DECREF(weights);
      return NULL;
    }
  PyArray_CLEARFLAGS(weights, NPY_ARRAY_WRITEABLE);
  return weights;
}

static PyObject *feature_map_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
  static char *names[] = {"name", "w_q", "w_k", NULL};
  const char *name;
  PyObject *w_q = Py_None, *w_k = Py_None;
  lola_map_kind kind;
  binding_state *state = binding_state_of_type(type);
  if (!state || !PyArg_ParseTupleAndKeywords(arguments, keywords, "s|OO", names, &name, &w_q, &w_k) ||
      map_kind_from_name(name, &kind))
    return NULL;
  int takes_weights = kind != LOLA_MAP_ELU_PLUS_ONE && kind != LOLA_MAP_GIVEN;
  int has_weights = w_q != Py_None || w_k != Py_None;
  if (kind == LOLA_MAP_GIVEN || (!takes_weights && has_weights)) {
    PyErr_Format(PyExc_ValueError, "'%s' is no feature map with weights", name);
    return NULL;
  }
  if ((kind != LOLA_MAP_RELU || has_weights) && takes_weights && (w_q == Py_None || w_k == Py_None)) {
    PyErr_Format(PyExc_TypeError, "%s must be an array (Hq, D, %s), got None", w_q == Py_None ? "w_q" : "w_k",
                 kind == LOLA_MAP_RELU ? "F" : "F/2");
    return NULL;
  }
  feature_map_object *self = (feature_map_object *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->kind = kind;
  if (has_weights) {
    const int64_t any[3] = {-1, -1, -1};
    self->w_q = weights_from(state, w_q, "w_q", any);
    if (self->w_q) {
      int64_t want[3];
      for (int i = 0; i < 3; i++) want[i] = PyArray_DIM(self->w_q, i);
      self->w_k = weights_from(state, w_k, "w_k", want);
    }
    if (!self->w_k) {
      Py_DECREF(self);
      return NULL;
    }
  }
  return (PyObject *)self;
}

static void feature_map_dealloc(feature_map_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  for (map_copy *copy = self->copies, *next; copy; copy = next) {
    next = copy->next;
    release_copy(copy);
  }
  Py_XDECREF(self->w_q);
  Py_XDECREF(self->w_k);
  type->tp_free(self);
  Py_DECREF(type);
}

static int feature_map_traverse(PyObject *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  return 0; /* arrays of numbers close no cycle */
}

static PyObject *feature_map_get_name(feature_map_object *self, void *unused) {
  (void)unused;
  return PyUnicode_FromString(kind_names[self->kind]);
}

static PyObject *feature_map_get_weights(feature_map_object *self, void *key_side) {
  PyArrayObject *weights = key_side ? self->w_k : self->w_q;
  return Py_NewRef(weights ? (PyObject *)weights : Py_None);
}

static PyGetSetDef feature_map_properties[] = {
    {"name", (getter)feature_map_get_name, NULL, "\"hedgehog\", \"hedgehog_exp\", \"elu_plus_one\" or \"relu\".", NULL},
    {"w_q", (getter)feature_map_get_weights, NULL, "Weights for queries, (Hq, D, M) float32, read-only, or None.",
     NULL},
    {"w_k", (getter)feature_map_get_weights, NULL, "Weights for keys, (Hq, D, M) float32, read-only, or None.",
     (void *)1},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot feature_map_slots[] = {
    {Py_tp_new, feature_map_new},
    {Py_tp_dealloc, feature_map_dealloc},
    {Py_tp_traverse, feature_map_traverse},
    {Py_tp_getset, feature_map_properties},
    {Py_tp_doc, "FeatureMap(name, w_q=None, w_k=None)\n--\n\nThe weights of a feature map, checked and copied."},
    {0, NULL},
};

PyType_Spec feature_map_spec = {
    .name = "lola._lola.FeatureMap",
    .basicsize = sizeof(feature_map_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = feature_map_slots,
};
