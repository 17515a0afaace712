/* What moves rows of a cache: copies, selections, resets, crops, and moves to another place. */
#include "device.h"

/* Row numbers as a new int64 array, negative ones counted from the end; None: all rows. */
static PyArrayObject *rows_from(cache_object *self, PyObject *object) {
  int64_t batch = self->cache->shape.batch, any = -1;
  PyArrayObject *rows;
  if (object == Py_None) {
    npy_intp size = (npy_intp)batch;
    rows = (PyArrayObject *)PyArray_SimpleNew(1, &size, NPY_INT64);
    for (int64_t b = 0; rows && b < batch; b++) ((int64_t *)PyArray_DATA(rows))[b] = b;
    return rows;
  }
  binding_state *state = binding_state_of_type(Py_TYPE(self));
  rows = state ? integers_from(state, object, "rows", "(rows,)", 1, &any) : NULL;
  if (!rows) return NULL;
  int64_t *values = PyArray_DATA(rows);
  for (npy_intp i = 0, n = PyArray_SIZE(rows); i < n; i++) {
    int64_t given = values[i];
    if (given < 0) values[i] += batch;
    if (values[i] >= 0 && values[i] < batch) continue;
    PyErr_Format(PyExc_ValueError, "rows must be rows of a cache with batch %lld, got %lld", (long long)batch,
                 (long long)given);
    Py_DECREF(rows);
    return NULL;
  }
  return rows;
}

/* An empty cache of the given type for rows of `self`, whose lock the caller holds; `device` NULL: on the host. */
static cache_object *make_like(cache_object *self, PyTypeObject *type, int64_t batch, device *device, void *stream) {
  lola_shape shape = self->cache->shape;
  shape.batch = batch;
  cache_object *made = cache_new(type, self->config, &shape, device, stream);
  if (!made) return NULL;
  lola_message message;
  lola_status status = LOLA_OK;
  if (self->cache->stores_features) {
    status = lola_cache_store_features(made->cache, &message);
    if (!status && device) status = device_cache_furnish(made->on, made->cache, &message);
  }
  if (status) {
    raise_status(status, &message);
    if (device) device_cache_leave(made->on);
    Py_CLEAR(made);
  }
  return made;
}

/* What the host knows of how far rows are travels with them. */
static void count_rows(device_cache *made, const cache_object *self, const int64_t *rows, int64_t batch) {
  const int64_t *seen = self->on ? self->on->seen : self->cache->tokens_seen;
  made->counted = !self->on || (self->on->counted && !self->on->shared);
  for (int64_t b = 0; made->counted && b < batch; b++) made->seen[b] = seen[rows[b]];
}

/* The rows and the gate from `self` to `made`, wherever they lie; of two devices both on one. */
static int fill(cache_object *made, cache_object *self, const int64_t *rows) {
  lola_message message;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status = lola_cache_gather(made->cache, self->cache, rows, &message);
  Py_END_ALLOW_THREADS if (!status && made->on && self->terms.bound && mixing_reads_gate(self->terms.mixing)) {
    int64_t bytes = self->cache->shape.heads * (int64_t)sizeof(float);
    const lola_memory *memory = &made->on->memory;
    status = self->on ? memory->move(memory, made->on->gate, bytes, self->on->gate, bytes, bytes, 1, &message)
                      : memory->write(memory, made->on->gate, bytes, PyArray_DATA(self->terms.gate), bytes, bytes, 1,
                                      &message);
  }
  if (made->on) device_cache_leave(made->on);
  if (status) return cache_fail(self, status, &message);
  if (!made->on && self->on && !cache_gate(self) && PyErr_Occurred()) return -1;
  made->terms = terms_copy(&self->terms);
  if (made->on) count_rows(made->on, self, rows, made->cache->shape.batch);
  if (made->on && self->on) made->on->library = self->on->library;
  return 0;
}

/* A new cache of the given type with these rows of `self`, which is begun. */
static cache_object *gather(cache_object *self, PyTypeObject *type, PyArrayObject *rows) {
  device *device = self->on ? self->on->device : NULL;
  void *stream = self->on ? self->on->stream : NULL;
  cache_object *made = make_like(self, type, PyArray_DIM(rows, 0), device, stream);
  if (made && fill(made, self, PyArray_DATA(rows))) Py_CLEAR(made);
  return made;
}

PyObject *cache_gather(cache_object *self, PyObject *object) {
  PyArrayObject *rows = rows_from(self, object);
  if (!rows) return NULL;
  cache_object *made = NULL;
  if (!cache_begin(self)) {
    made = gather(self, Py_TYPE(self), rows);
    cache_end(self);
  }
  Py_DECREF(rows);
  return (PyObject *)made;
}

/* On another device, or on the host where `device` is NULL. One of the two is on the host. */
static cache_object *move(cache_object *self, device *device) {
  PyArrayObject *all = rows_from(self, Py_None);
  cache_object *made = NULL;
  if (all && !cache_begin(self)) {
    made = make_like(self, Py_TYPE(self), PyArray_DIM(all, 0), device, device ? device->keeper : NULL);
    if (made && (fill(made, self, PyArray_DATA(all)) || (device && cache_wait(made)))) Py_CLEAR(made);
    cache_end(self);
  }
  Py_XDECREF(all);
  return made;
}

PyObject *cache_to(cache_object *self, PyObject *object) {
  binding_state *state = binding_state_of_type(Py_TYPE(self));
  int number;
  if (!state || device_chosen(state, object, &number)) return NULL;
  if (number == self->cache->device) return Py_NewRef((PyObject *)self);
  device *device = number < 0 ? NULL : device_of(state, number);
  if (!device || !self->on) return (PyObject *)move(self, device);
  cache_object *between = move(self, NULL);
  cache_object *made = between ? move(between, device) : NULL;
  Py_XDECREF(between);
  return (PyObject *)made;
}

PyObject *cache_gather_in_place(cache_object *self, PyObject *object) {
  PyArrayObject *rows = rows_from(self, object);
  if (!rows) return NULL;
  int64_t batch = self->cache->shape.batch;
  if (PyArray_DIM(rows, 0) != batch) {
    PyErr_Format(PyExc_ValueError, "select_ keeps the batch, so rows must have %lld entries, got %lld: use select",
                 (long long)batch, (long long)PyArray_DIM(rows, 0));
    Py_DECREF(rows);
    return NULL;
  }
  PyArrayObject *all = rows_from(self, Py_None);
  int failed = 1;
  if (all && !cache_begin(self)) {
    cache_object *moved = gather(self, binding_state_of_type(Py_TYPE(self))->cache_type, rows);
    if (moved) {
      lola_message message;
      /* back into the same memory */
      lola_status status = lola_cache_gather(self->cache, moved->cache, PyArray_DATA(all), &message);
      failed = status ? cache_fail(self, status, &message) : 0;
      if (self->on && !failed) count_rows(self->on, moved, PyArray_DATA(all), batch);
      if (moved->on) device_cache_leave(moved->on);
    }
    cache_end(self);
    Py_XDECREF(moved);
  }
  Py_XDECREF(all);
  Py_DECREF(rows);
  return failed ? NULL : Py_NewRef(Py_None);
}

PyObject *cache_reset(cache_object *self, PyObject *object) {
  PyArrayObject *rows = rows_from(self, object);
  if (!rows) return NULL;
  int failed = cache_begin(self);
  if (!failed) {
    lola_message message;
    const int64_t *values = PyArray_DATA(rows);
    lola_status status = lola_cache_reset(self->cache, values, PyArray_DIM(rows, 0), &message);
    for (npy_intp i = 0; self->on && i < PyArray_DIM(rows, 0); i++) self->on->seen[values[i]] = 0;
    failed = status ? cache_fail(self, status, &message) : 0;
    cache_end(self);
  }
  Py_DECREF(rows);
  return failed ? NULL : Py_NewRef(Py_None);
}

PyObject *cache_crop(cache_object *self, PyObject *object) {
  int64_t tokens;
  lola_message message;
  if (int64_from(object, "n", &tokens) || cache_begin(self)) return NULL;
  lola_status status;
  Py_BEGIN_ALLOW_THREADS status = lola_cache_crop(self->cache, tokens, &message);
  Py_END_ALLOW_THREADS int failed = status ? cache_fail(self, status, &message) : 0;
  for (int64_t b = 0; self->on && !failed && b < self->cache->shape.batch; b++)
    if (self->on->seen[b] > tokens) self->on->seen[b] = tokens;
  cache_end(self);
  return failed ? NULL : Py_NewRef(Py_None);
}

PyObject *cache_check(cache_object *self, PyObject *unused) {
  (void)unused;
  lola_message message;
  if (self->on) { /* on the host */
    cache_object *copy = move(self, NULL);
    PyObject *result = copy ? cache_check(copy, NULL) : NULL;
    Py_XDECREF(copy);
    return result;
  }
  if (cache_lock(self)) return NULL;
  lola_status status = lola_cache_check(self->cache, &message);
  cache_unlock(self);
  if (status) raise_status(status, &message);
  return status ? NULL : Py_NewRef(Py_None);
}

/* Waits for the last use, so that a fault of it shows here. */
PyObject *cache_sync(cache_object *self, PyObject *unused) {
  (void)unused;
  if (!self->on) Py_RETURN_NONE;
  if (cache_begin(self)) return NULL;
  int failed = cache_wait(self);
  cache_end(self);
  return failed ? NULL : Py_NewRef(Py_None);
}
