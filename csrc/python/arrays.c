/* Callers' arrays once they are open: checks, conversions, and new ones of their libraries for results. */
#include "device.h"

#include <stdio.h>
#include <string.h>

/* --- checks --------------------------------------------------------------------------------- */

typedef struct shape_text {
  char text[96];
} shape_text;

static shape_text describe_shape(int ndim, const int64_t *shape) {
  shape_text described = {"("};
  size_t used = 1;
  for (int i = 0; i < ndim && used + 24 < sizeof described.text; i++) {
    const char *end = i + 1 < ndim ? ", " : ndim == 1 ? "," : "";
    char *place = described.text + used;
    size_t space = sizeof described.text - used;
    used += (size_t)(shape[i] < 0 ? snprintf(place, space, "*%s", end)
                                  : snprintf(place, space, "%lld%s", (long long)shape[i], end));
  }
  memcpy(described.text + used, ")", 2);
  return described;
}

int view_expect_shape(const view *array, const char *symbols, int ndim, const int64_t *want) {
  int same = array->ndim == ndim, known = 0;
  for (int i = 0; i < ndim; i++) {
    if (same && want[i] >= 0 && array->shape[i] != want[i]) same = 0;
    if (want[i] >= 0) known = 1;
  }
  if (same) return 0;
  shape_text wanted = describe_shape(ndim, want), got = describe_shape(array->ndim, array->shape);
  PyErr_Format(PyExc_ValueError, "%s must have shape %s%s%s, got %s", array->name, symbols, known ? " = " : "",
               known ? wanted.text : "", got.text);
  return -1;
}

int view_expect_float(const view *array) {
  if (array->element <= ELEMENT_BFLOAT16) return 0;
  int numpy = PyArray_Check(array->object);
  PyErr_Format(PyExc_TypeError, "%s must be float32, float16 or bfloat16, got %s: pass %s%s", array->name, array->dtype,
               array->name, numpy ? ".astype(numpy.float32)" : " as float32");
  return -1;
}

int view_expect_dtype(const view *array, lola_dtype dtype, const char *why) {
  if (array->element == (element)dtype) return 0;
  PyErr_Format(PyExc_TypeError, "%s must be %s%s, got %s", array->name, dtype_name(dtype), why, array->dtype);
  return -1;
}

int64_t view_size(const view *array) {
  int64_t size = 1;
  for (int i = 0; i < array->ndim; i++) size *= array->shape[i];
  return size;
}

int view_is_dense(const view *array) {
  int64_t dense = array->item_size;
  int same = (uintptr_t)array->data % (unsigned)array->item_size == 0;
  for (int i = array->ndim; i-- > 0;) {
    if (!array->shape[i]) return 1;
    if (array->shape[i] > 1 && array->strides[i] != dense) same = 0;
    dense *= array->shape[i];
  }
  return same;
}

static int is_empty(const view *array) { return view_size(array) == 0; }

int view_to_array(const view *array, int scalars, lola_array *result) {
  static double nothing; /* an address for empty arrays: NULL means "not given" */
  int item = array->item_size, leading = array->ndim - !scalars;
  int64_t strides[3] = {0, 0, 0};
  if (!is_empty(array)) {
    int aligned = (uintptr_t)array->data % (unsigned)item == 0;
    for (int i = 0; i < leading; i++) {
      if (array->shape[i] > 1 && array->strides[i] % item) aligned = 0;
      strides[i] = array->strides[i] / item;
    }
    if (!aligned) {
      PyErr_Format(PyExc_ValueError, "%s must be aligned to its items of %d bytes: pass a copy", array->name, item);
      return -1;
    }
    if (!scalars && array->shape[leading] > 1 && array->strides[leading] != item) {
      PyErr_Format(PyExc_ValueError, "the last axis of %s must be contiguous, got a stride of %lld bytes: pass %s",
                   array->name, (long long)array->strides[leading],
                   PyArray_Check(array->object) ? "numpy.ascontiguousarray of it" : "a contiguous copy");
      return -1;
    }
  }
  *result = (lola_array){array->data ? array->data : (void *)&nothing, (lola_dtype)array->element, strides[0],
                         strides[1], strides[2]};
  return 0;
}

int view_expect_output(const view *array) {
  if (array->read_only) {
    PyErr_Format(PyExc_ValueError, "%s must be writable, got a read-only array", array->name);
    return -1;
  }
  /* Axes from the smallest step to the largest: each must step over all that the smaller ones reach. */
  int64_t reach = array->item_size, last = 0;
  for (int done = 0; done < array->ndim && !is_empty(array); done++) {
    int64_t step = INT64_MAX, extent = 1;
    int found = 0, ties = 0;
    for (int i = 0; i < array->ndim; i++) {
      int64_t size = array->strides[i] < 0 ? -array->strides[i] : array->strides[i];
      if (array->shape[i] < 2 || (done && size <= last)) continue;
      if (size == step) ties = 1;
      if (size < step) {
        step = size;
        extent = array->shape[i];
        found = 1;
        ties = 0;
      }
    }
    if (!found) break;
    if (ties || step < reach) {
      PyErr_Format(PyExc_ValueError, "%s must not overlap itself: pass an array with an address for every element",
                   array->name);
      return -1;
    }
    last = step;
    reach = step * (extent - 1) + reach;
  }
  return 0;
}

void view_extent(const view *array, const char **low, const char **high) {
  *low = *high = array->data;
  if (is_empty(array)) return;
  *high += array->item_size;
  for (int i = 0; i < array->ndim; i++) {
    int64_t reach = array->strides[i] * (array->shape[i] - 1);
    *(reach < 0 ? low : high) += reach;
  }
}

/* A NumPy array over a view's memory, for the moment. */
static PyArrayObject *wrap(const view *array, int type_num) {
  npy_intp shape[MAX_NDIM], strides[MAX_NDIM];
  for (int i = 0; i < array->ndim; i++) {
    shape[i] = (npy_intp)array->shape[i];
    strides[i] = (npy_intp)array->strides[i];
  }
  static double nothing;
  return (PyArrayObject *)PyArray_New(&PyArray_Type, array->ndim, shape, type_num, strides,
                                      array->data ? array->data : (char *)&nothing, 0, 0, NULL);
}

static PyArrayObject *wrap_bytes(const view *array) { return wrap(array, integer_type_num(0, array->item_size * 8)); }

int view_expect_apart(binding_state *state, const view *output, const view *input) {
  (void)state;
  const char *low, *high, *input_low, *input_high;
  view_extent(output, &low, &high);
  view_extent(input, &input_low, &input_high);
  if (low >= input_high || input_low >= high) return 0;
  /* The ranges meet; only the exact question tells interleaved arrays from overlapping ones. */
  PyObject *numpy = PyImport_ImportModule("numpy");
  PyArrayObject *a = wrap_bytes(output), *b = wrap_bytes(input);
  PyObject *answer = numpy && a && b ? PyObject_CallMethod(numpy, "shares_memory", "OOi", a, b, 1 << 20) : NULL;
  int asked = numpy && a && b;
  Py_XDECREF(numpy);
  Py_XDECREF(a);
  Py_XDECREF(b);
  if (!asked) return -1;
  if (!answer) PyErr_Clear(); /* too hard to tell */
  int apart = answer == Py_False;
  Py_XDECREF(answer);
  if (apart) return 0;
  PyErr_Format(PyExc_ValueError, "%s must not overlap %s: pass an array of its own memory", output->name, input->name);
  return -1;
}

int view_overlaps(const view *array, const void *data, int64_t nbytes) {
  const char *low, *high, *other = data;
  view_extent(array, &low, &high);
  return low < other + nbytes && other < high;
}

/* --- from a device --------------------------------------------------------------------------- */

int view_to_host(binding_state *state, view *array) {
  if (array->device < 0) return 0;
  const device *device = device_of(state, array->device);
  const lola_cuda_api *api = device->api;
  const char *low, *high;
  view_extent(array, &low, &high);
  npy_intp bytes = high - low;
  PyObject *copy = PyArray_SimpleNew(1, &bytes, NPY_UINT8);
  if (!copy) return -1;
  char *target = PyArray_BYTES((PyArrayObject *)copy);
  int capturing;
  lola_message message;
  lola_status status = api->capturing(device->number, array->stream, &capturing, &message);
  if (!status && capturing) {
    PyErr_Format(PyExc_RuntimeError, "%s cannot be read from its device while the stream records a graph", array->name);
    Py_DECREF(copy);
    return -1;
  }
  Py_BEGIN_ALLOW_THREADS if (!status && bytes) status =
      api->copy(device->number, target, low, bytes, LOLA_COPY_TO_HOST, array->stream, &message);
  if (!status) status = api->synchronize(device->number, array->stream, &message);
  Py_END_ALLOW_THREADS if (status) {
    Py_DECREF(copy);
    return raise_status(status, &message);
  }
  char *data = target + (array->data - low);
  if (array->managed && array->managed->deleter) array->managed->deleter(array->managed);
  array->managed = NULL;
  Py_XSETREF(array->capsule, copy);
  array->data = data;
  array->device = ON_HOST;
  array->read_only = 0;
  return 0;
}

/* --- conversions ---------------------------------------------------------------------------- */

/* Opens arrays as view_open does, and lists of numbers through NumPy; *held is what to release after. */
static int open_numbers(binding_state *state, PyObject *object, const char *name, view *array, PyObject **held) {
  *held = NULL;
  if (PyList_Check(object) || PyTuple_Check(object) || PyArray_IsScalar(object, Generic)) {
    *held = PyArray_FromAny(object, NULL, 0, MAX_NDIM, 0, NULL);
    if (!*held) return raise_from_present(PyExc_TypeError, "%s must be an array of numbers", name);
    object = *held;
  }
  if (!view_open(state, object, name, array)) {
    if (!view_to_host(state, array)) return 0;
    view_close(array);
  }
  Py_CLEAR(*held);
  return -1;
}

/* The view's numbers as a new dense array; bfloat16 is widened by hand, as NumPy does not know it. */
static PyArrayObject *convert(const view *array, int type_num) {
  npy_intp shape[MAX_NDIM];
  for (int i = 0; i < array->ndim; i++) shape[i] = (npy_intp)array->shape[i];
  PyArrayObject *source = wrap(array, array->type_num);
  PyArrayObject *target = source ? (PyArrayObject *)PyArray_SimpleNew(array->ndim, shape, type_num) : NULL;
  PyArrayObject *written = target;
  Py_XINCREF(written);
  int widen = array->element == ELEMENT_BFLOAT16;
  if (target && widen)
    Py_XSETREF(written,
               (PyArrayObject *)PyArray_SimpleNewFromData(array->ndim, shape, NPY_UINT32, PyArray_DATA(target)));
  int failed = !written || PyArray_CopyInto(written, source);
  if (!failed && widen) {
    npy_uint32 *bits = PyArray_DATA(written);
    for (npy_intp i = 0, n = PyArray_SIZE(written); i < n; i++) bits[i] <<= 16;
  }
  Py_XDECREF(written);
  Py_XDECREF(source);
  if (failed) Py_CLEAR(target);
  return target;
}

PyArrayObject *floats_from(binding_state *state, PyObject *object, const char *name, const char *symbols, int ndim,
                           const int64_t *want) {
  view array;
  PyObject *held;
  PyArrayObject *made = NULL;
  if (open_numbers(state, object, name, &array, &held)) return NULL;
  if (array.element > ELEMENT_FLOAT64)
    PyErr_Format(PyExc_TypeError, "%s must be floating-point numbers, got %s", name, array.dtype);
  else if (!view_expect_shape(&array, symbols, ndim, want))
    made = convert(&array, NPY_FLOAT);
  view_close(&array);
  Py_XDECREF(held);
  return made;
}

PyArrayObject *integers_from(binding_state *state, PyObject *object, const char *name, const char *symbols, int ndim,
                             const int64_t *want) {
  view array;
  PyObject *held;
  PyArrayObject *made = NULL;
  if (open_numbers(state, object, name, &array, &held)) return NULL;
  int empty_list = held && is_empty(&array); /* which NumPy makes float64 */
  if (array.element != ELEMENT_INT && !empty_list)
    PyErr_Format(PyExc_TypeError, "%s must be integers, got %s", name, array.dtype);
  else if (!view_expect_shape(&array, symbols, ndim, want))
    made = convert(&array, NPY_INT64);
  view_close(&array);
  Py_XDECREF(held);
  return made;
}

/* --- results -------------------------------------------------------------------------------- */

static int type_num_of(element element) {
  switch (element) {
  case ELEMENT_FLOAT32:
    return NPY_FLOAT;
  case ELEMENT_FLOAT16:
    return NPY_HALF;
  case ELEMENT_BFLOAT16:
    return NPY_UINT16;
  case ELEMENT_FLOAT64:
    return NPY_DOUBLE;
  default:
    return NPY_INT64;
  }
}

/* A uint16 array's memory as ml_dtypes.bfloat16 where that is installed; steals and returns a reference. */
static PyObject *as_bfloat16(PyObject *array) {
  PyObject *module = PyImport_ImportModule("ml_dtypes");
  PyObject *type = module ? PyObject_GetAttrString(module, "bfloat16") : NULL;
  PyObject *seen = type ? PyObject_CallMethod(array, "view", "O", type) : NULL;
  Py_XDECREF(module);
  Py_XDECREF(type);
  if (!seen) {
    PyErr_Clear();
    return array;
  }
  Py_DECREF(array);
  return seen;
}

PyObject *array_over(PyObject *owner, const lola_buffer *buffer, int writable) {
  npy_intp shape[4];
  for (int i = 0; i < buffer->ndim; i++) shape[i] = (npy_intp)buffer->shape[i];
  int number = buffer->kind == LOLA_BUFFER_FLOAT;
  PyObject *array = PyArray_SimpleNewFromData(buffer->ndim, shape,
                                              type_num_of(number ? (element)buffer->dtype : ELEMENT_INT), buffer->data);
  if (!array) return NULL;
  if (PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(owner))) {
    Py_DECREF(array);
    return NULL;
  }
  if (!writable) PyArray_CLEARFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE);
  return number && buffer->dtype == LOLA_BFLOAT16 ? as_bfloat16(array) : array;
}

static PyObject *new_numpy(const view *like, int ndim, const int64_t *shape, element element) {
  npy_intp sizes[MAX_NDIM];
  for (int i = 0; i < ndim; i++) sizes[i] = (npy_intp)shape[i];
  if (element != ELEMENT_BFLOAT16 || !PyArray_Check(like->object))
    return PyArray_SimpleNew(ndim, sizes, type_num_of(element));
  PyArray_Descr *descr = PyArray_DESCR((PyArrayObject *)like->object);
  Py_INCREF(descr); /* stolen below */
  return PyArray_NewFromDescr(&PyArray_Type, descr, ndim, sizes, NULL, NULL, 0, NULL);
}

/* like.new_empty(shape), with dtype=torch.<element> where it is another than like's. */
static PyObject *new_torch(binding_state *state, const view *like, PyObject *new_empty, int ndim, const int64_t *shape,
                           element element) {
  PyObject *sizes = PyTuple_New(ndim), *keywords = NULL, *torch = NULL, *made = NULL;
  PyObject *arguments[2] = {sizes, NULL};
  for (int i = 0; sizes && i < ndim; i++) {
    PyObject *size = PyLong_FromLongLong(shape[i]);
    if (!size)
      Py_CLEAR(sizes);
    else
      PyTuple_SET_ITEM(sizes, i, size);
  }
  if (!sizes) return NULL;
  if (element != like->element) {
    torch = PyImport_ImportModule("torch");
    arguments[1] =
        torch ? PyObject_GetAttrString(torch, element == ELEMENT_INT ? "int64" : dtype_name((lola_dtype)element))
              : NULL;
    keywords = PyTuple_Pack(1, state->names[NAME_DTYPE]);
  }
  if (element == like->element || (arguments[1] && keywords))
    made = PyObject_Vectorcall(new_empty, arguments, 1, keywords);
  Py_DECREF(sizes);
  Py_XDECREF(arguments[1]);
  Py_XDECREF(keywords);
  Py_XDECREF(torch);
  return made;
}

/* The caller's library's from_dlpack, or NULL without an exception where it offers none. */
static PyObject *find_import(binding_state *state, PyObject *object) {
  PyObject *method = PyObject_GetAttr(object, state->names[NAME_NAMESPACE]);
  PyObject *library = method ? PyObject_CallNoArgs(method) : NULL;
  PyObject *import = library ? PyObject_GetAttrString(library, "from_dlpack") : NULL;
  Py_XDECREF(method);
  Py_XDECREF(library);
  if (import) return import;
  PyErr_Clear();
  /* CuPy's arrays name no namespace; the module that their type names has the function. */
  PyObject *module = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__module__");
  const char *name = module && PyUnicode_Check(module) ? PyUnicode_AsUTF8(module) : NULL,
             *dot = name ? strchr(name, '.') : NULL;
  PyObject *root = name ? PyUnicode_FromStringAndSize(name, dot ? dot - name : (Py_ssize_t)strlen(name)) : NULL;
  library = root ? PyImport_GetModule(root) : NULL;
  import = library ? PyObject_GetAttrString(library, "from_dlpack") : NULL;
  Py_XDECREF(module);
  Py_XDECREF(root);
  Py_XDECREF(library);
  if (!import) PyErr_Clear();
  return import;
}

/* Memory of our own on the array's device, already open. */
static int new_on_device(binding_state *state, const view *like, const char *name, int ndim, const int64_t *shape,
                         element element, void *stream, result *made) {
  void *data;
  made->object = export_allocate(state, like->device, stream, element, ndim, shape, &data);
  if (!made->object) return -1;
  view *opened = &made->opened;
  *opened = (view){.name = name, .object = made->object, .device = like->device, .stream = stream, .data = data};
  opened->ndim = ndim;
  view_set_element(opened, element, type_num_of(element));
  opened->item_size = element == ELEMENT_INT ? 8 : element == ELEMENT_FLOAT32 ? 4 : 2;
  int64_t dense = opened->item_size;
  for (int i = ndim; i-- > 0;) {
    opened->shape[i] = shape[i];
    opened->strides[i] = dense;
    dense *= shape[i];
  }
  return 0;
}

int result_new(binding_state *state, const view *like, const char *name, int ndim, const int64_t *shape,
               element element, void *stream, result *made) {
  *made = (result){0};
  PyObject *new_empty = NULL;
  if (!PyArray_Check(like->object)) {
    int torch = find_attribute(like->object, state->names[NAME_NEW_EMPTY], &new_empty);
    if (torch < 0) return -1;
    if (!torch) made->import = find_import(state, like->object);
    if (!torch && like->device >= 0 && new_on_device(state, like, name, ndim, shape, element, stream, made)) {
      result_close(made);
      return -1;
    }
    if (made->object) return 0;
  }
  made->object =
      new_empty ? new_torch(state, like, new_empty, ndim, shape, element) : new_numpy(like, ndim, shape, element);
  Py_XDECREF(new_empty);
  if (!made->object || view_open(state, made->object, name, &made->opened)) {
    result_close(made);
    return -1;
  }
  made->opened.element = element; /* NumPy memory that stands for bfloat16 says uint16 */
  return 0;
}

PyObject *result_take(binding_state *state, result *made) {
  PyObject *object = made->object;
  made->object = NULL;
  element element = made->opened.element;
  view_close(&made->opened);
  PyObject *import = made->import;
  made->import = NULL;
  int exported = Py_TYPE(object) == state->export_type;
  if (exported) export_written(object);
  if (import) {
    PyObject *offer = exported ? Py_NewRef(object) : export_new(state, (PyArrayObject *)object, element);
    PyObject *taken = offer ? PyObject_CallOneArg(import, offer) : NULL;
    Py_XDECREF(offer);
    Py_DECREF(import);
    if (taken)
      Py_SETREF(object, taken);
    else
      PyErr_Clear();
  }
  if (PyArray_Check(object) && element == ELEMENT_BFLOAT16 && PyArray_TYPE((PyArrayObject *)object) == NPY_UINT16)
    return as_bfloat16(object);
  return object;
}

void result_close(result *made) {
  view_close(&made->opened);
  Py_CLEAR(made->object);
  Py_CLEAR(made->import);
}
