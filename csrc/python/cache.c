/* lola._lola.Cache: owns a lola_cache and a lock, and what the cache's first call fixed. lola.Cache subclasses it. */
#include "device.h"

#include <stdatomic.h>
#include <stddef.h>

/* --- the lock ------------------------------------------------------------------------------- */

int cache_lock(cache_object *self) {
  unsigned long me = PyThread_get_thread_ident();
  PyLockStatus status = PyThread_acquire_lock(self->lock, NOWAIT_LOCK) ? PY_LOCK_ACQUIRED : PY_LOCK_FAILURE;
  if (status != PY_LOCK_ACQUIRED && atomic_load(&self->holder) == me) {
    PyErr_SetString(PyExc_RuntimeError, "cache is in use by a call that this thread has not finished (a signal handler "
                                        "or finalizer must not use a cache that it interrupted)");
    return -1;
  }
  while (status != PY_LOCK_ACQUIRED) {
    Py_BEGIN_ALLOW_THREADS status = PyThread_acquire_lock_timed(self->lock, -1, 1);
    Py_END_ALLOW_THREADS if (status == PY_LOCK_INTR && PyErr_CheckSignals()) return -1;
  }
  atomic_store(&self->holder, me);
  return 0;
}

void cache_unlock(cache_object *self) {
  atomic_store(&self->holder, 0);
  PyThread_release_lock(self->lock);
}

/* --- life ----------------------------------------------------------------------------------- */

void terms_clear(terms *bound) {
  Py_CLEAR(bound->map);
  Py_CLEAR(bound->fingerprint);
  Py_CLEAR(bound->gate);
  bound->bound = 0;
}

terms terms_copy(const terms *bound) {
  Py_XINCREF(bound->map);
  Py_XINCREF(bound->fingerprint);
  Py_XINCREF(bound->gate);
  return *bound;
}

/* --- operations ----------------------------------------------------------------------------- */

int cache_begin(cache_object *self) {
  if (cache_lock(self)) return -1;
  if (!self->on) return 0;
  binding_state *state = binding_state_of_type(Py_TYPE(self));
  void *stream;
  if (state && !device_cache_stream(state, self->on, &stream) && !device_cache_enter(self->on, stream)) {
    if (!self->on->capturing) return 0;
    PyErr_SetString(
        PyExc_RuntimeError,
        "cache cannot be read or rearranged while the stream records a graph: only attention can be recorded");
  }
  cache_unlock(self);
  return -1;
}

void cache_end(cache_object *self) {
  if (self->on) device_cache_leave(self->on);
  cache_unlock(self);
}

int cache_fail(cache_object *self, lola_status status, const lola_message *message) {
  return self->on ? device_cache_raise(self->on, status, message) : raise_status(status, message);
}

static lola_status create(cache_object *self, const lola_config *config, const lola_shape *shape,
                          lola_message *message) {
  lola_status status = lola_cache_create(config, shape, self->on ? &self->on->memory : NULL, &self->cache, message);
  if (status || !self->on) return status;
  status = device_cache_furnish(self->on, self->cache, message);
  device_cache_leave(self->on);
  return status;
}

cache_object *cache_new(PyTypeObject *type, PyObject *config, const lola_shape *shape, device *device, void *stream) {
  lola_config raw;
  int mixing;
  double scale;
  lola_message message;
  if (config_from(config, &raw, &mixing, &scale)) return NULL;
  if (device && raw.score == LOLA_SCORE_ATTENTION) {
    PyErr_SetString(PyExc_ValueError,
                    "score 'attention' needs outputs before each update and runs on the CPU only: use "
                    "device='cpu', or another score");
    return NULL;
  }
  cache_object *self = (cache_object *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->config = Py_NewRef(config);
  self->mixing = mixing;
  self->scale = scale;
  self->lock = PyThread_allocate_lock();
  if (!self->lock)
    PyErr_NoMemory();
  else if (!device || (self->on = device_cache_new(device, stream))) {
    lola_status status = create(self, &raw, shape, &message);
    if (!status) return self;
    raise_status(status, &message);
  }
  Py_DECREF(self);
  return NULL;
}

int cache_wait(cache_object *self) {
  lola_message message;
  lola_status status;
  device_cache *on = self->on;
  Py_BEGIN_ALLOW_THREADS status = on->device->api->synchronize(on->device->number, on->stream, &message);
  Py_END_ALLOW_THREADS return status ? cache_fail(self, status, &message) : 0;
}

static PyObject *cache_tp_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
  static char *names[] = {"config",    "batch",       "heads", "kv_heads", "head_dim",
                          "value_dim", "feature_dim", "dtype", "device",   NULL};
  PyObject *config, *sizes[6], *where = Py_None;
  const char *dtype;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOOOOOOs|O", names, &config, &sizes[0], &sizes[1], &sizes[2],
                                   &sizes[3], &sizes[4], &sizes[5], &dtype, &where))
    return NULL;
  lola_shape shape;
  int64_t *fields[6] = {&shape.batch,    &shape.heads,     &shape.kv_heads,
                        &shape.head_dim, &shape.value_dim, &shape.feature_dim};
  for (int i = 0; i < 6; i++)
    if (int64_from(sizes[i], names[i + 1], fields[i])) return NULL;
  if (dtype_from_name(dtype, &shape.dtype)) return NULL;
  binding_state *state = binding_state_of_type(type);
  int number;
  if (!state || device_chosen(state, where, &number)) return NULL;
  if (number < 0) return (PyObject *)cache_new(type, config, &shape, NULL, NULL);
  /* Ready when we return, so that any stream may use it first, one that records a graph too. */
  device *device = device_of(state, number);
  cache_object *made = cache_new(type, config, &shape, device, device->keeper);
  if (made && cache_wait(made)) Py_CLEAR(made);
  return (PyObject *)made;
}

static int cache_traverse(cache_object *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->config);
  Py_VISIT(self->terms.map);
  return 0;
}

static int cache_clear(cache_object *self) {
  if (self->on) device_cache_settle(self->on); /* what is queued reads the map's weights */
  Py_CLEAR(self->config);
  terms_clear(&self->terms);
  return 0;
}

/* Others may still read memory that was handed out, on their current stream or the default one. */
static void leave_to_readers(cache_object *self) {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  binding_state *state = binding_state_of_type(Py_TYPE(self));
  void *stream = NULL;
  if (state && !device_cache_stream(state, self->on, &stream) && stream) device_keep_for(self->on->device, stream);
  device_keep_for(self->on->device, NULL);
  PyErr_Restore(type, value, traceback);
}

static void cache_dealloc(cache_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  if (self->on && self->on->exported) leave_to_readers(self);
  cache_clear(self);
  if (self->on)
    device_cache_free(self->on, self->cache);
  else
    lola_cache_destroy(self->cache);
  if (self->lock) PyThread_free_lock(self->lock);
  type->tp_free(self);
  Py_DECREF(type);
}

/* --- what a caller may look at -------------------------------------------------------------- */

/* Numbers of a begun cache, wherever they lie. */
static int read_numbers(cache_object *self, void *target, const void *source, int64_t bytes) {
  lola_message message;
  lola_status status = LOLA_OK;
  if (!bytes) return 0;
  if (!self->on) {
    memcpy(target, source, (size_t)bytes);
    return 0;
  }
  const lola_memory *memory = &self->on->memory;
  Py_BEGIN_ALLOW_THREADS status = memory->read(memory, target, bytes, source, bytes, bytes, 1, &message);
  Py_END_ALLOW_THREADS return status ? cache_fail(self, status, &message) : 0;
}

static PyObject *copy_of(cache_object *self, const void *data, int ndim, const npy_intp *shape, int type_num) {
  PyObject *array = PyArray_SimpleNew(ndim, (npy_intp *)shape, type_num);
  if (array && read_numbers(self, PyArray_DATA((PyArrayObject *)array), data, PyArray_NBYTES((PyArrayObject *)array)))
    Py_CLEAR(array);
  return array;
}

static PyObject *cache_sparse(cache_object *self, PyObject *const *arguments, Py_ssize_t count) {
  int64_t row, head, used;
  const lola_cache *cache = self->cache;
  if (expect_argument_count("Cache._sparse", count, 2) || index_from(arguments[0], "row", cache->shape.batch, &row) ||
      index_from(arguments[1], "head", cache->shape.heads, &head) || cache_begin(self))
    return NULL;
  int64_t set = row * cache->sets + head / (cache->shape.heads / cache->sets), L = cache->config.sparse;
  PyObject *positions = NULL, *scores = NULL, *pair = NULL;
  if (!read_numbers(self, &used, cache->sparse_count + set, sizeof used)) {
    npy_intp size = (npy_intp)used;
    positions = copy_of(self, cache->sparse_positions + set * L, 1, &size, NPY_INT64);
    scores = copy_of(self, cache->sparse_scores + set * L, 1, &size, NPY_FLOAT);
  }
  cache_end(self);
  if (positions && scores) pair = PyTuple_Pack(2, positions, scores);
  Py_XDECREF(positions);
  Py_XDECREF(scores);
  return pair;
}

static PyObject *cache_window(cache_object *self, PyObject *object) {
  int64_t row, seen, chunk;
  if (index_from(object, "row", self->cache->shape.batch, &row) || cache_begin(self)) return NULL;
  int failed = read_numbers(self, &chunk, self->cache->chunks + row, sizeof chunk) ||
               read_numbers(self, &seen, self->cache->tokens_seen + row, sizeof seen);
  cache_end(self);
  if (failed) return NULL;
  return Py_BuildValue("(LL)", (long long)lola_cache_window_start(self->cache, chunk), (long long)seen);
}

static const lola_buffer *find_buffer(const lola_cache *cache, const char *name) {
  for (int i = 0; i < cache->buffer_count; i++)
    if (!strcmp(cache->buffers[i].name, name)) return &cache->buffers[i];
  return NULL;
}

/* The counters as they are now. */
static PyObject *cache_get_snapshot(cache_object *self, void *name) {
  const lola_buffer *buffer = find_buffer(self->cache, name);
  npy_intp shape[4];
  for (int i = 0; i < buffer->ndim; i++) shape[i] = (npy_intp)buffer->shape[i];
  if (cache_begin(self)) return NULL;
  PyObject *copy = copy_of(self, buffer->data, buffer->ndim, shape, NPY_INT64);
  cache_end(self);
  return copy;
}

/* tokens_seen, on a device as it was counted here where that is right. */
static PyObject *cache_get_seen(cache_object *self, void *unused) {
  (void)unused;
  device_cache *on = self->on;
  npy_intp batch = (npy_intp)self->cache->shape.batch;
  if (!on) return cache_get_snapshot(self, "tokens_seen");
  if (cache_lock(self)) return NULL;
  int counted = on->counted && !on->shared && !on->faulty;
  PyObject *made = counted ? PyArray_SimpleNew(1, &batch, NPY_INT64) : NULL;
  if (made) memcpy(PyArray_DATA((PyArrayObject *)made), on->seen, (size_t)batch * sizeof *on->seen);
  cache_unlock(self);
  if (counted || cache_begin(self)) return made;
  made = copy_of(self, self->cache->tokens_seen, 1, &batch, NPY_INT64);
  if (made) memcpy(on->seen, PyArray_DATA((PyArrayObject *)made), (size_t)batch * sizeof *on->seen);
  on->counted = made != NULL;
  cache_end(self);
  return made;
}

static PyObject *live(cache_object *self, const lola_buffer *buffer, int writable) {
  if (!self->on) return array_over((PyObject *)self, buffer, writable);
  binding_state *state = binding_state_of_type(Py_TYPE(self));
  return state ? export_cache(state, (PyObject *)self, buffer, writable) : NULL;
}

static PyObject *cache_get_live(cache_object *self, void *name) {
  return live(self, find_buffer(self->cache, name), 0);
}

static PyObject *cache_buffers(cache_object *self, PyObject *unused) {
  (void)unused;
  PyObject *all = PyDict_New();
  if (!all || cache_lock(self)) {
    Py_XDECREF(all);
    return NULL;
  }
  if (self->on) self->on->shared = 1; /* others may write from here on */
  for (int i = 0; all && i < self->cache->buffer_count; i++) {
    const lola_buffer *buffer = &self->cache->buffers[i];
    PyObject *array = live(self, buffer, 1);
    if (!array || PyDict_SetItemString(all, buffer->name, array)) Py_CLEAR(all);
    Py_XDECREF(array);
  }
  cache_unlock(self);
  return all;
}

static PyObject *cache_memory(cache_object *self, PyObject *unused) {
  (void)unused;
  PyObject *parts = PyDict_New();
  if (!parts || cache_lock(self)) {
    Py_XDECREF(parts);
    return NULL;
  }
  for (int i = 0; parts && i < self->cache->buffer_count; i++) {
    const char *part = self->cache->buffers[i].part;
    int64_t bytes = 0;
    for (int j = 0; j < self->cache->buffer_count; j++)
      if (!strcmp(self->cache->buffers[j].part, part)) bytes += self->cache->buffers[j].nbytes;
    PyObject *number = PyLong_FromLongLong(bytes);
    if (!number || PyDict_SetItemString(parts, part, number)) Py_CLEAR(parts);
    Py_XDECREF(number);
  }
  cache_unlock(self);
  return parts;
}

static PyObject *cache_get_nbytes(cache_object *self, void *unused) {
  (void)unused;
  if (cache_lock(self)) return NULL;
  int64_t bytes = lola_cache_nbytes(self->cache);
  cache_unlock(self);
  return PyLong_FromLongLong(bytes);
}

static PyObject *cache_get_size(cache_object *self, void *offset) {
  return PyLong_FromLongLong(*(const int64_t *)((const char *)&self->cache->shape + (uintptr_t)offset));
}

static PyObject *cache_get_dtype(cache_object *self, void *unused) {
  (void)unused;
  return PyUnicode_FromString(dtype_name(self->cache->shape.dtype));
}

static PyObject *cache_get_device(cache_object *self, void *unused) {
  (void)unused;
  return PyUnicode_FromString(name_of_device(self->cache->device).text);
}

static PyObject *cache_get_config(cache_object *self, void *unused) {
  (void)unused;
  return Py_NewRef(self->config ? self->config : Py_None);
}

/* --- what the first call fixed, for save and load ------------------------------------------- */

PyArrayObject *cache_gate(cache_object *self) {
  terms *bound = &self->terms;
  if (bound->gate || !self->on || !bound->bound || !mixing_reads_gate(bound->mixing)) return bound->gate;
  npy_intp heads = (npy_intp)self->cache->shape.heads;
  bound->gate = (PyArrayObject *)copy_of(self, self->on->gate, 1, &heads, NPY_FLOAT);
  return bound->gate;
}

static PyObject *cache_get_terms(cache_object *self, void *unused) {
  (void)unused;
  if (cache_begin(self)) return NULL;
  int failed = !cache_gate(self) && PyErr_Occurred();
  terms bound = terms_copy(&self->terms);
  cache_end(self);
  if (failed) {
    terms_clear(&bound);
    return NULL;
  }
  if (!bound.bound) return Py_NewRef(Py_None);
  PyObject *made =
      Py_BuildValue("(sssOOO)", mixing_name(bound.mixing), dtype_name(bound.query_dtype), map_kind_name(bound.source),
                    bound.map ? bound.map : Py_None, bound.fingerprint ? bound.fingerprint : Py_None,
                    bound.gate ? (PyObject *)bound.gate : Py_None);
  terms_clear(&bound);
  return made;
}

static PyObject *cache_bind(cache_object *self, PyObject *const *arguments, Py_ssize_t count) {
  terms bound = {.bound = 1};
  const char *dtype, *source;
  lola_message message;
  binding_state *state = binding_state_of_type(Py_TYPE(self));
  if (self->on) {
    PyErr_SetString(PyExc_RuntimeError, "a cache is loaded on the CPU and then moved");
    return NULL;
  }
  if (!state || expect_argument_count("Cache._bind", count, 5) || mixing_from(arguments[0], &bound.mixing) ||
      string_from(arguments[1], "query_dtype", &dtype) || dtype_from_name(dtype, &bound.query_dtype) ||
      string_from(arguments[2], "source", &source))
    return NULL;
  if (strcmp(source, "given") && map_kind_from_name(source, &bound.source)) return NULL;
  if (bound.source != LOLA_MAP_GIVEN) {
    const char *fingerprint;
    if (string_from(arguments[3], "fingerprint", &fingerprint)) return NULL;
    bound.fingerprint = Py_NewRef(arguments[3]);
  }
  if (arguments[4] != Py_None) {
    bound.gate = gate_from(state, arguments[4], self->cache->shape.heads);
    if (!bound.gate) goto fail;
  }
  if (cache_lock(self)) goto fail;
  lola_status status = bound.source == LOLA_MAP_GIVEN ? lola_cache_store_features(self->cache, &message) : LOLA_OK;
  if (!status) {
    terms old = self->terms;
    self->terms = bound;
    bound = old;
  }
  cache_unlock(self);
  terms_clear(&bound);
  if (status) raise_status(status, &message);
  return status ? NULL : Py_NewRef(Py_None);

fail:
  terms_clear(&bound);
  return NULL;
}

#define FAST(function) (PyCFunction)(void (*)(void))(fast_function)(void (*)(void))(function)

static PyMethodDef cache_methods[] = {
    {"_gather", (PyCFunction)cache_gather, METH_O, "_gather($self, rows, /)\n--\n\nA new cache with these rows."},
    {"_gather_in_place", (PyCFunction)cache_gather_in_place, METH_O, "_gather_in_place($self, rows, /)\n--\n\n"},
    {"_reset", (PyCFunction)cache_reset, METH_O, "_reset($self, rows, /)\n--\n\n"},
    {"_to", (PyCFunction)cache_to, METH_O, "_to($self, device, /)\n--\n\n"},
    {"_sync", (PyCFunction)cache_sync, METH_NOARGS, "_sync($self, /)\n--\n\n"},
    {"_crop", (PyCFunction)cache_crop, METH_O, "_crop($self, n, /)\n--\n\n"},
    {"_check", (PyCFunction)cache_check, METH_NOARGS, "_check($self, /)\n--\n\n"},
    {"_sparse", FAST(cache_sparse), METH_FASTCALL,
     "_sparse($self, row, head, /)\n--\n\nPositions and scores, unsorted."},
    {"_window", (PyCFunction)cache_window, METH_O,
     "_window($self, row, /)\n--\n\nFirst position and the one after the last."},
    {"_bind", FAST(cache_bind), METH_FASTCALL,
     "_bind($self, mixing, query_dtype, source, fingerprint, gate, /)\n--\n\nWhat a loaded cache's first call fixed."},
    {"buffers", (PyCFunction)cache_buffers, METH_NOARGS,
     "buffers($self, /)\n--\n\nEvery buffer of the cache by name, as writable arrays over its own memory: NumPy's, or "
     "on\n"
     "a device ones that torch.from_dlpack, cupy.from_dlpack and the like take.\n\n"
     "Their addresses last as long as the cache. The first call with features of the caller's own adds two. Bfloat16\n"
     "buffers have ml_dtypes' dtype where that package is installed, else uint16. Nothing guards the memory against a\n"
     "call of another thread."},
    {"memory", (PyCFunction)cache_memory, METH_NOARGS,
     "memory($self, /)\n--\n\nBytes by part: \"window\", \"sparse\", \"state\" and \"counters\". They add up to "
     "`nbytes`."},
    {NULL, NULL, 0, NULL},
};

#define SIZE(field) (void *)offsetof(lola_shape, field)

static PyGetSetDef cache_properties[] = {
    {"config", (getter)cache_get_config, NULL, "The lola.Config.", NULL},
    {"batch", (getter)cache_get_size, NULL, "Rows.", SIZE(batch)},
    {"heads", (getter)cache_get_size, NULL, "Query heads, Hq.", SIZE(heads)},
    {"kv_heads", (getter)cache_get_size, NULL, "Key and value heads, Hkv.", SIZE(kv_heads)},
    {"head_dim", (getter)cache_get_size, NULL, "Size of queries and keys, D.", SIZE(head_dim)},
    {"value_dim", (getter)cache_get_size, NULL, "Size of values, Dv.", SIZE(value_dim)},
    {"feature_dim", (getter)cache_get_size, NULL, "Size of features, F.", SIZE(feature_dim)},
    {"dtype", (getter)cache_get_dtype, NULL, "Of keys and values: \"float32\", \"float16\" or \"bfloat16\".", NULL},
    {"device", (getter)cache_get_device, NULL, "Where the memory lies: \"cpu\" or \"cuda:0\" and so on.", NULL},
    {"nbytes", (getter)cache_get_nbytes, NULL, "Bytes of all buffers.", NULL},
    {"tokens_seen", (getter)cache_get_seen, NULL, "Tokens that each row has seen, (B,) int64, a copy.", NULL},
    {"folded", (getter)cache_get_snapshot, NULL, "Pairs folded into each hidden state, (B, Hq) int64, a copy.",
     "folded"},
    {"hidden", (getter)cache_get_live, NULL,
     "The hidden states H, (B, Hq, F, Dv) float32, a read-only view (on a device, for DLPack).", "hidden"},
    {"normalizer", (getter)cache_get_live, NULL,
     "The normalisers s, (B, Hq, F) float32, a read-only view (on a device, for DLPack).", "normalizer"},
    {"_terms", (getter)cache_get_terms, NULL, "What the first call fixed, or None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot cache_slots[] = {
    {Py_tp_new, cache_tp_new},
    {Py_tp_dealloc, cache_dealloc},
    {Py_tp_traverse, cache_traverse},
    {Py_tp_clear, cache_clear},
    {Py_tp_methods, cache_methods},
    {Py_tp_getset, cache_properties},
    {Py_tp_doc, "Cache(config, batch, heads, kv_heads, head_dim, value_dim, feature_dim, dtype, device=None)\n--\n\n"
                "The memory behind lola.Cache."},
    {0, NULL},
};

PyType_Spec cache_spec = {
    .name = "lola._lola.Cache",
    .basicsize = sizeof(cache_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = cache_slots,
};
