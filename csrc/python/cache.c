/* lola._lola.Cache: owns a lola_cache and a lock, and what the cache's first call fixed. lola.Cache subclasses it. */
#include "binding.h"

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

static terms terms_copy(const terms *bound) {
  Py_XINCREF(bound->map);
  Py_XINCREF(bound->fingerprint);
  Py_XINCREF(bound->gate);
  return *bound;
}

cache_object *cache_new(PyTypeObject *type, PyObject *config, const lola_shape *shape) {
  lola_config raw;
  int mixing;
  double scale;
  lola_message message;
  if (config_from(config, &raw, &mixing, &scale)) return NULL;
  cache_object *self = (cache_object *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->config = Py_NewRef(config);
  self->mixing = mixing;
  self->scale = scale;
  self->lock = PyThread_allocate_lock();
  lola_status status = LOLA_OK;
  if (!self->lock)
    PyErr_NoMemory();
  else
    status = lola_cache_create(&raw, shape, &self->cache, &message);
  if (status) raise_status(status, &message);
  if (!self->cache) Py_CLEAR(self);
  return self;
}

static PyObject *cache_tp_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
  static char *names[] = {"config",    "batch",       "heads", "kv_heads", "head_dim",
                          "value_dim", "feature_dim", "dtype", NULL};
  PyObject *config, *sizes[6];
  const char *dtype;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOOOOOOs", names, &config, &sizes[0], &sizes[1], &sizes[2],
                                   &sizes[3], &sizes[4], &sizes[5], &dtype))
    return NULL;
  lola_shape shape;
  int64_t *fields[6] = {&shape.batch,    &shape.heads,     &shape.kv_heads,
                        &shape.head_dim, &shape.value_dim, &shape.feature_dim};
  for (int i = 0; i < 6; i++)
    if (int64_from(sizes[i], names[i + 1], fields[i])) return NULL;
  if (dtype_from_name(dtype, &shape.dtype)) return NULL;
  return (PyObject *)cache_new(type, config, &shape);
}

static int cache_traverse(cache_object *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->config);
  Py_VISIT(self->terms.map);
  return 0;
}

static int cache_clear(cache_object *self) {
  Py_CLEAR(self->config);
  terms_clear(&self->terms);
  return 0;
}

static void cache_dealloc(cache_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  cache_clear(self);
  lola_cache_destroy(self->cache);
  if (self->lock) PyThread_free_lock(self->lock);
  type->tp_free(self);
  Py_DECREF(type);
}

/* --- rows ----------------------------------------------------------------------------------- */

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

/* A new cache of the given type with these rows of `self`, whose lock the caller holds. */
static cache_object *gather(cache_object *self, PyTypeObject *type, PyArrayObject *rows) {
  lola_shape shape = self->cache->shape;
  shape.batch = PyArray_DIM(rows, 0);
  cache_object *made = cache_new(type, self->config, &shape);
  if (!made) return NULL;
  lola_message message;
  lola_status status = self->cache->stores_features ? lola_cache_store_features(made->cache, &message) : LOLA_OK;
  if (status) {
    raise_status(status, &message);
    Py_DECREF(made);
    return NULL;
  }
  made->terms = terms_copy(&self->terms);
  Py_BEGIN_ALLOW_THREADS lola_cache_gather(made->cache, self->cache, PyArray_DATA(rows));
  Py_END_ALLOW_THREADS return made;
}

static PyObject *cache_gather(cache_object *self, PyObject *object) {
  PyArrayObject *rows = rows_from(self, object);
  if (!rows) return NULL;
  cache_object *made = NULL;
  if (!cache_lock(self)) {
    made = gather(self, Py_TYPE(self), rows);
    cache_unlock(self);
  }
  Py_DECREF(rows);
  return (PyObject *)made;
}

static PyObject *cache_gather_in_place(cache_object *self, PyObject *object) {
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
  if (all && !cache_lock(self)) {
    cache_object *moved = gather(self, binding_state_of_type(Py_TYPE(self))->cache_type, rows);
    if (moved) {
      lola_cache_gather(self->cache, moved->cache, PyArray_DATA(all)); /* back into the same memory */
      failed = 0;
    }
    cache_unlock(self);
    Py_XDECREF(moved);
  }
  Py_XDECREF(all);
  Py_DECREF(rows);
  return failed ? NULL : Py_NewRef(Py_None);
}

static PyObject *cache_reset(cache_object *self, PyObject *object) {
  PyArrayObject *rows = rows_from(self, object);
  if (!rows) return NULL;
  int locked = !cache_lock(self);
  if (locked) {
    lola_cache_reset(self->cache, PyArray_DATA(rows), PyArray_DIM(rows, 0));
    cache_unlock(self);
  }
  Py_DECREF(rows);
  return locked ? Py_NewRef(Py_None) : NULL;
}

static PyObject *cache_crop(cache_object *self, PyObject *object) {
  int64_t tokens;
  lola_message message;
  if (int64_from(object, "n", &tokens) || cache_lock(self)) return NULL;
  lola_status status = lola_cache_crop(self->cache, tokens, &message);
  cache_unlock(self);
  if (status) raise_status(status, &message);
  return status ? NULL : Py_NewRef(Py_None);
}

static PyObject *cache_check(cache_object *self, PyObject *unused) {
  (void)unused;
  lola_message message;
  if (cache_lock(self)) return NULL;
  lola_status status = lola_cache_check(self->cache, &message);
  cache_unlock(self);
  if (status) raise_status(status, &message);
  return status ? NULL : Py_NewRef(Py_None);
}

/* --- what a caller may look at -------------------------------------------------------------- */

static PyObject *copy_of(const void *data, npy_intp count, int type_num, size_t item) {
  PyObject *array = PyArray_SimpleNew(1, &count, type_num);
  if (array && count) memcpy(PyArray_DATA((PyArrayObject *)array), data, (size_t)count * item);
  return array;
}

static PyObject *cache_sparse(cache_object *self, PyObject *const *arguments, Py_ssize_t count) {
  int64_t row, head;
  const lola_cache *cache = self->cache;
  if (expect_argument_count("Cache._sparse", count, 2) || index_from(arguments[0], "row", cache->shape.batch, &row) ||
      index_from(arguments[1], "head", cache->shape.heads, &head) || cache_lock(self))
    return NULL;
  int64_t set = row * cache->sets + head / (cache->shape.heads / cache->sets), L = cache->config.sparse;
  npy_intp used = (npy_intp)cache->sparse_count[set];
  PyObject *positions = copy_of(cache->sparse_positions + set * L, used, NPY_INT64, sizeof(int64_t));
  PyObject *scores = copy_of(cache->sparse_scores + set * L, used, NPY_FLOAT, sizeof(float));
  cache_unlock(self);
  PyObject *pair = positions && scores ? PyTuple_Pack(2, positions, scores) : NULL;
  Py_XDECREF(positions);
  Py_XDECREF(scores);
  return pair;
}

static PyObject *cache_window(cache_object *self, PyObject *object) {
  int64_t row;
  if (index_from(object, "row", self->cache->shape.batch, &row) || cache_lock(self)) return NULL;
  int64_t first = lola_cache_window_start(self->cache, row), end = self->cache->tokens_seen[row];
  cache_unlock(self);
  return Py_BuildValue("(LL)", (long long)first, (long long)end);
}

static const lola_buffer *find_buffer(const lola_cache *cache, const char *name) {
  for (int i = 0; i < cache->buffer_count; i++)
    if (!strcmp(cache->buffers[i].name, name)) return &cache->buffers[i];
  return NULL;
}

/* The buffer as it is now. */
static PyObject *cache_get_snapshot(cache_object *self, void *name) {
  if (cache_lock(self)) return NULL;
  PyObject *live = array_over((PyObject *)self, find_buffer(self->cache, name), 0);
  PyObject *copy = live ? PyArray_NewCopy((PyArrayObject *)live, NPY_CORDER) : NULL;
  cache_unlock(self);
  Py_XDECREF(live);
  return copy;
}

static PyObject *cache_get_live(cache_object *self, void *name) {
  return array_over((PyObject *)self, find_buffer(self->cache, name), 0);
}

static PyObject *cache_buffers(cache_object *self, PyObject *unused) {
  (void)unused;
  PyObject *all = PyDict_New();
  if (!all || cache_lock(self)) {
    Py_XDECREF(all);
    return NULL;
  }
  for (int i = 0; all && i < self->cache->buffer_count; i++) {
    const lola_buffer *buffer = &self->cache->buffers[i];
    PyObject *array = array_over((PyObject *)self, buffer, 1);
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

static PyObject *cache_get_config(cache_object *self, void *unused) {
  (void)unused;
  return Py_NewRef(self->config ? self->config : Py_None);
}

/* --- what the first call fixed, for save and load ------------------------------------------- */

static PyObject *cache_get_terms(cache_object *self, void *unused) {
  (void)unused;
  if (cache_lock(self)) return NULL;
  terms bound = terms_copy(&self->terms);
  cache_unlock(self);
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
    {"_crop", (PyCFunction)cache_crop, METH_O, "_crop($self, n, /)\n--\n\n"},
    {"_check", (PyCFunction)cache_check, METH_NOARGS, "_check($self, /)\n--\n\n"},
    {"_sparse", FAST(cache_sparse), METH_FASTCALL,
     "_sparse($self, row, head, /)\n--\n\nPositions and scores, unsorted."},
    {"_window", (PyCFunction)cache_window, METH_O,
     "_window($self, row, /)\n--\n\nFirst position and the one after the last."},
    {"_bind", FAST(cache_bind), METH_FASTCALL,
     "_bind($self, mixing, query_dtype, source, fingerprint, gate, /)\n--\n\nWhat a loaded cache's first call fixed."},
    {"buffers", (PyCFunction)cache_buffers, METH_NOARGS,
     "buffers($self, /)\n--\n\nEvery buffer of the cache by name, as writable arrays over its own memory.\n\n"
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
    {"nbytes", (getter)cache_get_nbytes, NULL, "Bytes of all buffers.", NULL},
    {"tokens_seen", (getter)cache_get_snapshot, NULL, "Tokens that each row has seen, (B,) int64, a copy.",
     "tokens_seen"},
    {"folded", (getter)cache_get_snapshot, NULL, "Pairs folded into each hidden state, (B, Hq) int64, a copy.",
     "folded"},
    {"hidden", (getter)cache_get_live, NULL, "The hidden states H, (B, Hq, F, Dv) float32, a read-only view.",
     "hidden"},
    {"normalizer", (getter)cache_get_live, NULL, "The normalisers s, (B, Hq, F) float32, a read-only view.",
     "normalizer"},
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
    {Py_tp_doc, "Cache(config, batch, heads, kv_heads, head_dim, value_dim, feature_dim, dtype)\n--\n\n"
                "The memory behind lola.Cache."},
    {0, NULL},
};

PyType_Spec cache_spec = {
    .name = "lola._lola.Cache",
    .basicsize = sizeof(cache_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = cache_slots,
};
