/* The terms of a cache, and attention on the host. */
#include "attention.h"

#include <string.h>

/* --- the terms that a first call fixes ------------------------------------------------------- */

/* 1 when the maps are the same, whoever made them. */
static int same_map(call *call, terms *bound) {
  PyObject *map = call->arguments[ARG_FEATURE_MAP];
  if (bound->map == map) return 1;
  PyObject *name = call->state->names[NAME_FINGERPRINT];
  if (!bound->fingerprint && !(bound->fingerprint = PyObject_GetAttr(bound->map, name))) return -1;
  PyObject *fingerprint = PyObject_GetAttr(map, name);
  int same = fingerprint ? PyObject_RichCompareBool(fingerprint, bound->fingerprint, Py_EQ) : -1;
  Py_XDECREF(fingerprint);
  if (same == 1) { /* found by address the next time */
    if (call->cache->on) device_cache_settle(call->cache->on);
    Py_XSETREF(bound->map, Py_NewRef(map));
  }
  return same;
}

static int differs(const char *name, const char *bound, const char *now) {
  PyErr_Format(PyExc_ValueError, "%s must be %s, as in the first call with this cache, got %s", name, bound, now);
  return -1;
}

int check_terms(call *call) {
  terms *bound = &call->cache->terms;
  const lola_call *raw = &call->raw;
  if (!bound->bound) return 0;
  if (bound->mixing != raw->mixing) return differs("mixing", mixing_name(bound->mixing), mixing_name(raw->mixing));
  if (bound->query_dtype != (lola_dtype)call->q.element)
    return view_expect_dtype(&call->q, bound->query_dtype, ", as in the first call with this cache");
  if (bound->source != raw->map.kind) {
    if (bound->source == LOLA_MAP_GIVEN) return differs("feature_map", "None beside q_features and k_features", "one");
    return differs("feature_map", map_kind_name(bound->source), map_kind_name(raw->map.kind));
  }
  if (bound->source != LOLA_MAP_GIVEN) {
    int same = same_map(call, bound);
    if (same < 0) return -1;
    if (!same) return differs("feature_map", "the same", "one with other weights");
  }
  if (!call->gate) return 0; /* none is read; or a device has it, and comparing would wait for it */
  PyArrayObject *gate = call->cache->on && call->cache->on->capturing ? bound->gate : cache_gate(call->cache);
  if (!gate) return PyErr_Occurred() ? -1 : 0;
  if (memcmp(PyArray_DATA(call->gate), PyArray_DATA(gate), (size_t)PyArray_NBYTES(call->gate)))
    return differs("gate", "the same", "other values");
  return 0;
}

void fix_terms(call *call) {
  terms *bound = &call->cache->terms;
  if (bound->bound) return;
  *bound = (terms){.bound = 1,
                   .mixing = call->raw.mixing,
                   .query_dtype = (lola_dtype)call->q.element,
                   .source = call->raw.map.kind,
                   .gate = (PyArrayObject *)Py_XNewRef((PyObject *)call->gate)};
  if (bound->source != LOLA_MAP_GIVEN) bound->map = Py_NewRef(call->arguments[ARG_FEATURE_MAP]);
}

/* --- the run --------------------------------------------------------------------------------- */

/* Called by the core between segments, on the thread that called it. */
static int interrupted(void *context) {
  PyThreadState **thread = context;
  PyEval_RestoreThread(*thread);
  int signalled = PyErr_CheckSignals();
  *thread = PyEval_SaveThread();
  return signalled;
}

/* Outputs of tokens that entered no row are zero. */
static void zero_outside(const call *call, const lola_array *array, int64_t numbers) {
  int64_t T = call->q.shape[1], H = call->q.shape[2];
  size_t item = array->dtype == LOLA_FLOAT32 ? 4 : 2;
  if (!array->data || call->cu_seqlens) return; /* packed rows leave nothing out */
  for (int64_t i = 0; i < call->row_count; i++) {
    const lola_row *row = &call->rows[i];
    for (int64_t t = 0; t < T; t++) {
      if (t == row->first) t += row->count;
      if (t >= T) break;
      for (int64_t h = 0; h < H; h++)
        memset((char *)array->data +
                   (row->b * array->stride_b + t * array->stride_t + h * array->stride_h) * (int64_t)item,
               0, (size_t)numbers * item);
    }
  }
}

int run_host(call *call) {
  lola_message message;
  lola_status status = LOLA_OK;
  lola_cache *cache = call->cache->cache;
  if (cache_lock(call->cache)) return -1;
  int failed = check_terms(call), widened = 0;
  if (!failed && call->tokens && call->raw.map.kind == LOLA_MAP_GIVEN && !cache->stores_features) {
    status = lola_cache_store_features(cache, &message);
    widened = !status;
  }
  if (!failed && !status) {
    PyThreadState *thread = PyEval_SaveThread();
    call->raw.interrupted = interrupted;
    call->raw.interrupted_context = &thread;
    if (call->tokens) status = lola_cpu_attention(cache, &call->raw, &message);
    if (!status) {
      zero_outside(call, &call->raw.out, call->v.shape[3]);
      zero_outside(call, &call->raw.share, 1);
    }
    PyEval_RestoreThread(thread);
  }
  if (!failed && !status && call->tokens) fix_terms(call);
  if (status && widened) lola_cache_drop_features(cache);
  cache_unlock(call->cache);
  return failed ? -1 : status ? raise_status(status, &message) : 0;
}
