/* Opening callers' arrays: NumPy's own, and through DLPack torch's and everybody else's, read without a copy. */
#include "device.h"

#include <stdio.h>
#include <string.h>

/* --- opening -------------------------------------------------------------------------------- */

static const char *const element_names[] = {"float32", "float16", "bfloat16", "float64"};

const char *dtype_name(lola_dtype dtype) { return element_names[dtype]; }

int dtype_from_name(const char *name, lola_dtype *dtype) {
  for (int i = LOLA_FLOAT32; i <= LOLA_BFLOAT16; i++)
    if (!strcmp(name, element_names[i])) {
      *dtype = (lola_dtype)i;
      return 0;
    }
  PyErr_Format(PyExc_ValueError, "dtype must be 'float32', 'float16' or 'bfloat16', got '%s'", name);
  return -1;
}

void view_set_element(view *array, element element, int type_num) {
  array->element = element;
  array->type_num = type_num;
  if (element < ELEMENT_INT) memcpy(array->dtype, element_names[element], strlen(element_names[element]) + 1);
}

static int too_many_axes(const view *array, int ndim) {
  PyErr_Format(PyExc_ValueError, "%s has %d axes, more than any argument takes", array->name, ndim);
  return -1;
}

static int open_numpy(PyArrayObject *source, view *array) {
  PyArray_Descr *descr = PyArray_DESCR(source);
  int type_num = descr->type_num, ndim = PyArray_NDIM(source);
  if (ndim > MAX_NDIM) return too_many_axes(array, ndim);
  /* ml_dtypes registers bfloat16 under a number that is known at run time only. */
  const char *dot = type_num >= NPY_USERDEF ? strrchr(descr->typeobj->tp_name, '.') : NULL;
  if (!PyArray_ISNOTSWAPPED(source))
    view_set_element(array, ELEMENT_OTHER, NPY_NOTYPE);
  else if (type_num == NPY_FLOAT)
    view_set_element(array, ELEMENT_FLOAT32, NPY_FLOAT);
  else if (type_num == NPY_HALF)
    view_set_element(array, ELEMENT_FLOAT16, NPY_HALF);
  else if (type_num == NPY_DOUBLE)
    view_set_element(array, ELEMENT_FLOAT64, NPY_DOUBLE);
  else if (dot && !strcmp(dot + 1, "bfloat16") && PyArray_ITEMSIZE(source) == 2)
    view_set_element(array, ELEMENT_BFLOAT16, NPY_UINT16);
  else
    view_set_element(array, PyTypeNum_ISINTEGER(type_num) ? ELEMENT_INT : ELEMENT_OTHER, type_num);
  if (array->element >= ELEMENT_INT) {
    PyObject *text = PyObject_Str((PyObject *)descr);
    const char *name = text ? PyUnicode_AsUTF8(text) : NULL;
    if (name) snprintf(array->dtype, sizeof array->dtype, "%s", name);
    Py_XDECREF(text);
    if (!name) return -1;
  }
  array->device = ON_HOST;
  array->item_size = (int)PyArray_ITEMSIZE(source);
  array->read_only = !PyArray_ISWRITEABLE(source);
  array->data = PyArray_BYTES(source);
  array->ndim = ndim;
  for (int i = 0; i < ndim; i++) {
    array->shape[i] = PyArray_DIM(source, i);
    array->strides[i] = PyArray_STRIDE(source, i);
  }
  return 0;
}

int integer_type_num(int is_signed, int bits) {
  switch (bits) {
  case 8:
    return is_signed ? NPY_INT8 : NPY_UINT8;
  case 16:
    return is_signed ? NPY_INT16 : NPY_UINT16;
  case 32:
    return is_signed ? NPY_INT32 : NPY_UINT32;
  case 64:
    return is_signed ? NPY_INT64 : NPY_UINT64;
  default:
    return NPY_NOTYPE;
  }
}

static int open_tensor(const dl_tensor *source, view *array) {
  array->device = ON_HOST;
  if (source->device.type == DL_CUDA)
    array->device = source->device.id;
  else if (source->device.type != DL_CPU && source->device.type != DL_CUDA_HOST) {
    PyErr_Format(PyExc_ValueError, "%s must lie in CPU memory or on a CUDA device, got DLPack device type %d",
                 array->name, (int)source->device.type);
    return -1;
  }
  if (source->ndim > MAX_NDIM) return too_many_axes(array, source->ndim);
  int code = source->dtype.code, bits = source->dtype.bits, plain = source->dtype.lanes == 1;
  if (plain && code == DL_FLOAT && bits == 32)
    view_set_element(array, ELEMENT_FLOAT32, NPY_FLOAT);
  else if (plain && code == DL_FLOAT && bits == 16)
    view_set_element(array, ELEMENT_FLOAT16, NPY_HALF);
  else if (plain && code == DL_FLOAT && bits == 64)
    view_set_element(array, ELEMENT_FLOAT64, NPY_DOUBLE);
  else if (plain && code == DL_BFLOAT && bits == 16)
    view_set_element(array, ELEMENT_BFLOAT16, NPY_UINT16);
  else {
    int integer = plain && (code == DL_INT || code == DL_UINT);
    int type_num = integer ? integer_type_num(code == DL_INT, bits) : NPY_NOTYPE;
    view_set_element(array, type_num == NPY_NOTYPE ? ELEMENT_OTHER : ELEMENT_INT, type_num);
    if (integer)
      snprintf(array->dtype, sizeof array->dtype, "%s%d", code == DL_INT ? "int" : "uint", bits);
    else
      snprintf(array->dtype, sizeof array->dtype, "%s", code == DL_BOOL ? "bool" : "an unknown dtype");
  }
  array->item_size = bits / 8 ? bits / 8 : 1;
  array->data = source->data ? (char *)source->data + source->byte_offset : NULL;
  array->ndim = source->ndim;
  int64_t dense = array->item_size;
  for (int i = source->ndim; i-- > 0;) {
    array->shape[i] = source->shape[i];
    array->strides[i] = source->strides ? source->strides[i] * array->item_size : dense;
    dense *= source->shape[i];
  }
  return 0;
}

/* 1 with *value set, 0 where there is no such attribute, -1 with an exception. */
int find_attribute(PyObject *object, PyObject *name, PyObject **value) {
  *value = PyObject_GetAttr(object, name);
  if (*value) return 1;
  if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
  PyErr_Clear();
  return 0;
}

static int refuse_gradient(binding_state *state, view *array) {
  PyObject *flag;
  int found = find_attribute(array->object, state->names[NAME_REQUIRES_GRAD], &flag);
  if (found <= 0) return found;
  int needed = PyObject_IsTrue(flag);
  Py_DECREF(flag);
  if (needed > 0)
    PyErr_Format(
        PyExc_ValueError,
        "%s requires grad, and lola.attention has no gradient: compute it under torch.no_grad() or pass %s.detach()",
        array->name, array->name);
  return needed ? -1 : 0;
}

static int check_version(uint32_t major, const view *array) {
  if (major == DL_MAJOR) return 0;
  PyErr_Format(PyExc_ValueError, "%s comes through DLPack version %u, this build reads version %d", array->name,
               (unsigned)major, DL_MAJOR);
  return -1;
}

/* --- __cuda_array_interface__, for what has no DLPack: numba's arrays --------------------------- */

/* Fills sizes or strides from a tuple; the number of its entries, -1 with an exception. */
static int tuple_numbers(PyObject *tuple, int64_t *numbers) {
  Py_ssize_t count = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : -1;
  if (count < 0 || count > MAX_NDIM) return -1;
  for (Py_ssize_t i = 0; i < count; i++) {
    numbers[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
    if (PyErr_Occurred()) return -1;
  }
  return (int)count;
}

/* "<f4" and so on; 0 for a type that no argument takes. */
static void read_typestr(const char *text, view *array) {
  int size = strlen(text) == 3 ? text[2] - '0' : 0;
  char kind = text[0] == '<' || text[0] == '|' ? text[1] : 0;
  if (kind == 'f' && size == 4)
    view_set_element(array, ELEMENT_FLOAT32, NPY_FLOAT);
  else if (kind == 'f' && size == 2)
    view_set_element(array, ELEMENT_FLOAT16, NPY_HALF);
  else if (kind == 'f' && size == 8)
    view_set_element(array, ELEMENT_FLOAT64, NPY_DOUBLE);
  else {
    int type_num = kind == 'i' || kind == 'u' ? integer_type_num(kind == 'i', 8 * size) : NPY_NOTYPE;
    view_set_element(array, type_num == NPY_NOTYPE ? ELEMENT_OTHER : ELEMENT_INT, type_num);
    snprintf(array->dtype, sizeof array->dtype, "%s", text);
  }
  array->item_size = size > 0 ? size : 1;
}

static int read_interface(view *array, PyObject *dictionary) {
  PyObject *shape = PyDict_GetItemString(dictionary, "shape"), *type = PyDict_GetItemString(dictionary, "typestr"),
           *data = PyDict_GetItemString(dictionary, "data"), *strides = PyDict_GetItemString(dictionary, "strides"),
           *stream = PyDict_GetItemString(dictionary, "stream");
  const char *text = type && PyUnicode_Check(type) ? PyUnicode_AsUTF8(type) : NULL;
  if (!shape || !text || !data || !PyTuple_Check(data) || PyTuple_GET_SIZE(data) != 2) return -1;
  read_typestr(text, array);
  array->data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(data, 0));
  array->read_only = PyObject_IsTrue(PyTuple_GET_ITEM(data, 1));
  array->ndim = tuple_numbers(shape, array->shape);
  if (array->ndim < 0 || PyErr_Occurred()) return -1;
  int64_t dense = array->item_size;
  for (int i = array->ndim; i-- > 0;) {
    array->strides[i] = dense;
    dense *= array->shape[i];
  }
  if (strides && strides != Py_None && tuple_numbers(strides, array->strides) != array->ndim) return -1;
  if (stream && stream != Py_None) {
    array->stream = PyLong_AsVoidPtr(stream);
    if (array->stream == (void *)1) array->stream = NULL;
  }
  return PyErr_Occurred() ? -1 : 0;
}

/* The interface names no device, so the array is taken to lie on the current one. */
static int open_interface(binding_state *state, view *array, PyObject *dictionary) {
  PyObject *cuda = PyUnicode_FromString("cuda");
  int failed = !cuda || device_chosen(state, cuda, &array->device);
  Py_XDECREF(cuda);
  if (failed)
    return raise_from_present(PyExc_RuntimeError, "%s lies on a CUDA device, which cannot be used", array->name);
  if (PyDict_Check(dictionary) && !read_interface(array, dictionary)) return 0;
  PyErr_Clear();
  PyErr_Format(PyExc_ValueError, "%s could not be read through __cuda_array_interface__", array->name);
  return -1;
}

/* Opens the device of an array and finds the stream in whose order its data are ready. */
static int open_device(binding_state *state, view *array, int number) {
  if (!device_of(state, number)) {
    char reason[sizeof(lola_message)];
    if (!cuda_is_available(state, reason, sizeof reason)) {
      PyErr_Format(PyExc_RuntimeError, "%s lies on %s, but %s", array->name, name_of_device(number).text, reason);
      return -1;
    }
    if (!device_open(state, number)) return -1;
  }
  return library_stream(state, &array->library, number, &array->stream);
}

/* Whether the object's type is of this library, or one whose name begins so. */
static int is_of(PyObject *object, const char *library) {
  PyObject *module = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__module__");
  const char *name = module && PyUnicode_Check(module) ? PyUnicode_AsUTF8(module) : NULL;
  int same = name && !strncmp(name, library, strlen(library));
  Py_XDECREF(module);
  PyErr_Clear();
  return same;
}

/* Torch and CuPy tell their current stream; others are told to be ready on the default one. */
static library library_of(PyObject *object) {
  library found = {LIBRARY_NONE, NULL};
  if (is_of(object, "cupy")) {
    found.kind = LIBRARY_CUPY;
    return found;
  }
  PyObject *name = PyUnicode_FromString("torch"), *torch = name ? PyImport_GetModule(name) : NULL;
  PyObject *type = torch ? PyObject_GetAttrString(torch, "Tensor") : NULL;
  if (type && PyObject_IsInstance(object, type) == 1) found.kind = LIBRARY_TORCH;
  Py_XDECREF(name);
  Py_XDECREF(torch);
  Py_XDECREF(type);
  PyErr_Clear();
  return found;
}

/* The device that __dlpack_device__() names, ON_HOST for any but CUDA's. */
static int ask_device(binding_state *state, PyObject *object, int *number) {
  *number = ON_HOST;
  PyObject *method;
  int has = find_attribute(object, state->names[NAME_DLPACK_DEVICE], &method);
  if (has <= 0) return has;
  PyObject *answer = PyObject_CallNoArgs(method);
  Py_DECREF(method);
  long type = -1, id = -1;
  if (answer) {
    PyObject *first = PySequence_GetItem(answer, 0), *second = PySequence_GetItem(answer, 1);
    if (first && second) {
      type = PyLong_AsLong(first); /* enumerations too */
      id = PyLong_AsLong(second);
    }
    Py_XDECREF(first);
    Py_XDECREF(second);
    Py_DECREF(answer);
  }
  if (PyErr_Occurred()) return -1;
  if (type == DL_CUDA) *number = (int)id;
  return 0;
}

/* __dlpack__(), asking for the versioned struct; producers older than it do not know the keyword. `stream` NULL: no
 * such keyword, as for arrays on the host. */
static PyObject *ask_capsule(binding_state *state, PyObject *method, PyObject *stream) {
  PyObject *arguments[2] = {state->dlpack_version, stream};
  PyObject *names = stream ? PyTuple_Pack(2, state->names[NAME_MAX_VERSION], state->names[NAME_STREAM])
                           : PyTuple_Pack(1, state->names[NAME_MAX_VERSION]);
  if (!names) return NULL;
  PyObject *capsule = PyObject_Vectorcall(method, arguments, 0, names);
  Py_DECREF(names);
  if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    names = stream ? PyTuple_Pack(1, state->names[NAME_STREAM]) : PyTuple_New(0);
    if (names) capsule = PyObject_Vectorcall(method, arguments + 1, 0, names);
    Py_XDECREF(names);
  }
  return capsule;
}

/* What __dlpack__ is told of the stream that we shall read on, a new reference: none on the host; -1, no wait, where
 * that is the library's own current stream; 1, CUDA's default one, else. */
static int stream_keyword(binding_state *state, view *array, PyObject **stream) {
  int number;
  *stream = NULL;
  if (ask_device(state, array->object, &number)) return -1;
  if (number < 0) return 0;
  array->library = library_of(array->object);
  if (open_device(state, array, number)) return -1;
  *stream = PyLong_FromLong(array->library.kind == LIBRARY_NONE ? 1 : -1);
  return *stream ? 0 : -1;
}

static int open_capsule(binding_state *state, PyObject *method, view *array) {
  int immutable = is_of(array->object, "jax"); /* which DLPack does not always say */
  PyObject *stream;
  if (stream_keyword(state, array, &stream)) return -1;
  array->capsule = ask_capsule(state, method, stream);
  Py_XDECREF(stream);
  if (!array->capsule) return raise_from_present(PyExc_ValueError, "%s could not be read through DLPack", array->name);
  /* The capsule stays unconsumed: its own destructor gives the memory back when the view is closed. */
  if (PyCapsule_IsValid(array->capsule, "dltensor_versioned")) {
    dl_managed_versioned *managed = PyCapsule_GetPointer(array->capsule, "dltensor_versioned");
    if (check_version(managed->version.major, array)) return -1;
    array->read_only = immutable || (managed->flags & DL_FLAG_READ_ONLY) != 0;
    return open_tensor(&managed->tensor, array);
  }
  array->read_only = immutable;
  if (PyCapsule_IsValid(array->capsule, "dltensor")) {
    dl_managed *managed = PyCapsule_GetPointer(array->capsule, "dltensor");
    return open_tensor(&managed->tensor, array);
  }
  PyErr_Format(PyExc_TypeError, "%s.__dlpack__() must return a DLPack capsule", array->name);
  return -1;
}

static int open_dlpack(binding_state *state, view *array) {
  if (refuse_gradient(state, array)) return -1;
  PyObject *found;
  int has = find_attribute((PyObject *)Py_TYPE(array->object), state->names[NAME_EXCHANGE], &found);
  if (has < 0) return -1;
  if (has) {
    const dl_exchange *exchange = PyCapsule_GetPointer(found, "dlpack_exchange_api");
    Py_DECREF(found); /* the table outlives its capsule */
    if (!exchange) PyErr_Clear();
    if (exchange && exchange->version.major == DL_MAJOR) {
      if (exchange->from_object(array->object, &array->managed))
        return raise_from_present(PyExc_ValueError, "%s could not be read through DLPack", array->name);
      array->read_only = (array->managed->flags & DL_FLAG_READ_ONLY) != 0;
      if (open_tensor(&array->managed->tensor, array)) return -1;
      if (array->device < 0) return 0;
      array->library = (library){LIBRARY_EXCHANGE, exchange};
      return open_device(state, array, array->device);
    }
  }
  has = find_attribute(array->object, state->names[NAME_DLPACK], &found);
  if (has < 0) return -1;
  if (has) {
    int failed = open_capsule(state, found, array);
    Py_DECREF(found);
    return failed;
  }
  has = find_attribute(array->object, state->names[NAME_CUDA_INTERFACE], &found);
  if (has > 0) {
    int failed = open_interface(state, array, found);
    Py_DECREF(found);
    return failed;
  }
  if (!has)
    PyErr_Format(PyExc_TypeError, "%s must be a NumPy array, a torch tensor or another DLPack array, got %.100s",
                 array->name, Py_TYPE(array->object)->tp_name);
  return -1;
}

int view_open(binding_state *state, PyObject *object, const char *name, view *array) {
  *array = (view){.name = name, .object = object};
  int failed = PyArray_Check(object) ? open_numpy((PyArrayObject *)object, array) : open_dlpack(state, array);
  if (failed) view_close(array);
  return failed;
}

void view_close(view *array) {
  if (array->managed && array->managed->deleter) array->managed->deleter(array->managed);
  Py_XDECREF(array->capsule);
  *array = (view){0};
}
