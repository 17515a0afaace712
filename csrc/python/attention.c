/* lola.attention: checks every argument and allocates the result before the core writes anything. */
#include "attention.h"

#include <math.h>

static void call_close(call *call) {
  view *views[] = {&call->q,       &call->k,         &call->v,          &call->q_features,   &call->k_features,
                   &call->scores,  &call->out_given, &call->gate_given, &call->starts_given, &call->stops_given,
                   &call->cu_given};
  for (size_t i = 0; i < sizeof views / sizeof *views; i++) view_close(views[i]);
  PyArrayObject *arrays[] = {call->scores_made, call->gate, call->starts, call->stops, call->cu_seqlens};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) Py_XDECREF(arrays[i]);
  Py_XDECREF(call->cache);
  result_close(&call->out);
  result_close(&call->share);
  if (call->rows != call->few_rows) PyMem_Free(call->rows);
}

int given(const call *call, int argument) { return call->arguments[argument] != Py_None; }

int is_packed(const call *call) { return given(call, ARG_CU_SEQLENS); }

/* --- what the arguments are ------------------------------------------------------------------ */

static int check_kinds(call *call) {
  PyObject *const *arguments = call->arguments;
  if (given(call, ARG_CHECK) && bool_from(arguments[ARG_CHECK], "check", &call->raw.check_finite)) return -1;
  int features = given(call, ARG_Q_FEATURES) + given(call, ARG_K_FEATURES), map = given(call, ARG_FEATURE_MAP);
  const char *wrong = map && features     ? "feature_map must be None beside q_features and k_features, got both"
                      : features == 1     ? "q_features and k_features must be given together, got one of them"
                      : !map && !features ? "feature_map must be given, or q_features and k_features, got none of them"
                                          : NULL;
  if (wrong) {
    PyErr_SetString(PyExc_ValueError, wrong);
    return -1;
  }
  if (given(call, ARG_CU_SEQLENS) && (given(call, ARG_STARTS) || given(call, ARG_STOPS))) {
    PyErr_SetString(PyExc_ValueError, "cu_seqlens must be None beside starts or stops, got both");
    return -1;
  }
  return map ? feature_map_expect(call->state, arguments[ARG_FEATURE_MAP]) : 0;
}

/* Takes the caller's cache; leaves NULL where a cache for this call alone is to be made. */
static int take_cache(call *call) {
  PyObject *cache = call->arguments[ARG_CACHE], *config = call->arguments[ARG_CONFIG];
  if (cache == Py_None) return 0;
  if (!PyObject_TypeCheck(cache, call->state->cache_type)) {
    PyErr_Format(PyExc_TypeError, "cache must be a lola.Cache, got %.100s", Py_TYPE(cache)->tp_name);
    return -1;
  }
  call->cache = (cache_object *)Py_NewRef(cache);
  if (config == Py_None || config == call->cache->config) return 0;
  if (Py_TYPE(config) != Py_TYPE(call->cache->config)) {
    PyErr_Format(PyExc_TypeError, "config must be a lola.Config, got %.100s", Py_TYPE(config)->tp_name);
    return -1;
  }
  int same = PyObject_RichCompareBool(config, call->cache->config, Py_EQ);
  if (!same)
    PyErr_Format(PyExc_ValueError, "config must be None or equal to the cache's %R, got %R", call->cache->config,
                 config);
  return same == 1 ? 0 : -1;
}

/* --- arrays ---------------------------------------------------------------------------------- */

static int open_inputs(call *call) {
  const struct {
    view *array;
    int argument;
    const char *name;
  } inputs[] = {{&call->q, ARG_Q, "q"},
                {&call->k, ARG_K, "k"},
                {&call->v, ARG_V, "v"},
                {&call->q_features, ARG_Q_FEATURES, "q_features"},
                {&call->k_features, ARG_K_FEATURES, "k_features"},
                {&call->out_given, ARG_OUT, "out"}};
  for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
    if ((i < 3 || given(call, inputs[i].argument)) &&
        view_open(call->state, call->arguments[inputs[i].argument], inputs[i].name, inputs[i].array))
      return -1;
  return 0;
}

/* --- where it runs --------------------------------------------------------------------------- */

static int refuse_place(const view *array, int place, const char *what) {
  int numpy = PyArray_Check(array->object);
  PyErr_Format(PyExc_ValueError, "%s must lie on %s as %s, got one on %s%s", array->name, name_of_device(place).text,
               what, name_of_device(array->device).text,
               array->device < 0 && place >= 0 && !numpy ? " (only NumPy arrays are copied to a device)" : "");
  return -1;
}

/* The arrays of a call lie in one place, NumPy arrays on the host also where it runs on a device. */
static int take_place(call *call) {
  int said;
  if (device_from(call->state, call->arguments[ARG_DEVICE], &said)) return -1;
  int place = call->cache ? call->cache->cache->device : call->q.device;
  const char *what = call->cache ? "the cache does" : "q does";
  if (!call->cache && call->q.device < 0 && (said >= 0 || said == DEVICE_ANY)) {
    if (device_chosen(call->state, call->arguments[ARG_DEVICE], &place)) return -1;
    what = "device says";
  }
  if (said != DEVICE_UNSAID && said != place && !(said == DEVICE_ANY && place >= 0)) {
    PyErr_Format(PyExc_ValueError, "device must be None or '%s', where the %s, got %R", name_of_device(place).text,
                 call->cache ? "cache lies" : "arrays lie", call->arguments[ARG_DEVICE]);
    return -1;
  }
  call->place = place;
  call->staged = place >= 0 && call->q.device < 0;
  const view *arrays[] = {&call->q, &call->k, &call->v, &call->q_features, &call->k_features, &call->out_given};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
    if (!arrays[i]->object || arrays[i]->device == place) continue;
    if (!call->staged || arrays[i]->device >= 0 || !PyArray_Check(arrays[i]->object))
      return refuse_place(arrays[i], place, what);
  }
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
    if (call->staged && arrays[i]->object && arrays[i]->device != ON_HOST)
      return refuse_place(arrays[i], ON_HOST, "q does");
  if (!given(call, ARG_CHECK)) call->raw.check_finite = place < 0;
  if (place < 0 && given(call, ARG_STREAM)) {
    PyErr_Format(PyExc_ValueError, "stream must be None on the CPU, got %R", call->arguments[ARG_STREAM]);
    return -1;
  }
  if (place < 0) return 0;
  call->device = device_of(call->state, place);
  if (given(call, ARG_STREAM)) return stream_from(call->arguments[ARG_STREAM], &call->stream);
  if (!call->staged)
    call->stream = call->q.stream;
  else if (call->cache)
    return device_cache_stream(call->state, call->cache->on, &call->stream);
  return 0;
}

/* --- what the inputs are --------------------------------------------------------------------- */

/* q, k and v against each other and the cache. */
static int check_inputs(call *call) {
  const lola_shape *shape = call->cache ? &call->cache->cache->shape : NULL;
  int64_t batch = is_packed(call) ? 1 : shape ? shape->batch : -1;
  int64_t want_q[4] = {batch, -1, shape ? shape->heads : -1, shape ? shape->head_dim : -1};
  if (is_packed(call) && call->q.ndim == 4 && call->q.shape[0] != 1) {
    PyErr_Format(PyExc_ValueError, "q must be one packed row, (1, T, Hq, D), beside cu_seqlens, got a batch of %lld",
                 (long long)call->q.shape[0]);
    return -1;
  }
  if (view_expect_shape(&call->q, "(B, T, Hq, D)", 4, want_q)) return -1;
  const int64_t *q = call->q.shape;
  int64_t want_k[4] = {q[0], q[1], shape ? shape->kv_heads : -1, q[3]};
  if (view_expect_shape(&call->k, "(B, T, Hkv, D)", 4, want_k)) return -1;
  int64_t want_v[4] = {q[0], q[1], call->k.shape[2], shape ? shape->value_dim : -1};
  if (view_expect_shape(&call->v, "(B, T, Hkv, Dv)", 4, want_v)) return -1;
  if (view_expect_float(&call->q) || view_expect_float(&call->k)) return -1;
  if (shape && view_expect_dtype(&call->k, shape->dtype, " as the cache is")) return -1;
  if (view_expect_dtype(&call->v, (lola_dtype)call->k.element, " as k is")) return -1;
  return view_to_array(&call->q, 0, &call->raw.q) || view_to_array(&call->k, 0, &call->raw.k) ||
                 view_to_array(&call->v, 0, &call->raw.v)
             ? -1
             : 0;
}

/* Feature map or features; *feature_dim becomes F. */
static int check_features(call *call, int64_t *feature_dim) {
  const int64_t *q = call->q.shape;
  int64_t bound = call->cache ? call->cache->cache->shape.feature_dim : -1;
  if (given(call, ARG_FEATURE_MAP)) {
    const feature_map_object *map = (const feature_map_object *)call->arguments[ARG_FEATURE_MAP];
    *feature_dim = feature_map_dim(map, q[2], q[3]);
    if (*feature_dim < 0) return -1;
    call->raw.map = feature_map_raw(map);
    if (bound < 0 || *feature_dim == bound) return 0;
    PyErr_Format(PyExc_ValueError, "feature_map must give the cache's feature_dim (%lld), got %lld", (long long)bound,
                 (long long)*feature_dim);
    return -1;
  }
  int64_t want[4] = {q[0], q[1], q[2], bound};
  if (view_expect_shape(&call->q_features, "(B, T, Hq, F)", 4, want)) return -1;
  want[3] = *feature_dim = call->q_features.shape[3];
  if (view_expect_shape(&call->k_features, "(B, T, Hq, F)", 4, want) ||
      view_expect_dtype(&call->q_features, LOLA_FLOAT32, "") || view_expect_dtype(&call->k_features, LOLA_FLOAT32, ""))
    return -1;
  return view_to_array(&call->q_features, 0, &call->raw.q_features) ||
                 view_to_array(&call->k_features, 0, &call->raw.k_features)
             ? -1
             : 0;
}

static int check_scores(call *call) {
  int external = call->cache->cache->config.score == LOLA_SCORE_EXTERNAL;
  if (external != given(call, ARG_SCORES)) {
    PyErr_SetString(PyExc_ValueError, external ? "scores must be given with score 'external', got None"
                                               : "scores must be None but with score 'external', got scores");
    return -1;
  }
  if (!external) return 0;
  PyObject *object = call->arguments[ARG_SCORES];
  const int64_t *q = call->q.shape;
  if (view_open(call->state, object, "scores", &call->scores)) return -1;
  if (call->scores.device >= 0 && (call->scores.device != call->place || call->staged))
    return refuse_place(&call->scores, call->staged ? ON_HOST : call->place, "q does");
  if (call->scores.device >= 0) {
    if (view_expect_dtype(&call->scores, LOLA_FLOAT32, " on a device")) return -1;
  } else if (call->scores.element != ELEMENT_FLOAT32) { /* others are converted, float64 too */
    view_close(&call->scores);
    call->scores_made = floats_from(call->state, object, "scores", "(B, T, Hq)", 3, q);
    if (!call->scores_made || view_open(call->state, (PyObject *)call->scores_made, "scores", &call->scores)) return -1;
  }
  if (view_expect_shape(&call->scores, "(B, T, Hq)", 3, q)) return -1;
  return view_to_array(&call->scores, 1, &call->raw.scores);
}

/* --- rows ------------------------------------------------------------------------------------ */

/* An integer argument with an entry for each row: as an array on the host, or open where a device holds it. */
static int open_index(call *call, int argument, const char *name, const char *symbols, int64_t *want, view *opened,
                      PyArrayObject **made) {
  PyObject *object = call->arguments[argument];
  if (call->place >= 0 && !call->staged && !PyArray_Check(object) && !PyList_Check(object) && !PyTuple_Check(object)) {
    if (view_open(call->state, object, name, opened)) return -1;
    if (opened->device == call->place) {
      if (opened->element != ELEMENT_INT || (opened->type_num != NPY_INT32 && opened->type_num != NPY_INT64)) {
        PyErr_Format(PyExc_TypeError, "%s must be int32 or int64 on a device, got %s", name, opened->dtype);
        return -1;
      }
      if (view_expect_shape(opened, symbols, 1, want)) return -1;
      *want = opened->shape[0];
      if (view_is_dense(opened)) return 0;
      PyErr_Format(PyExc_ValueError, "%s must be contiguous on a device", name);
      return -1;
    }
    if (opened->device >= 0) return refuse_place(opened, call->place, "q does");
    view_close(opened);
  }
  *made = integers_from(call->state, object, name, symbols, 1, want);
  if (*made) *want = PyArray_DIM(*made, 0);
  return *made ? 0 : -1;
}

/* Without cu_seqlens every row is a batch row; with it, call->row_count is one less than its entries. */
static int count_rows(call *call) {
  call->row_count = call->q.shape[0];
  if (!is_packed(call)) return 0;
  int64_t want = call->cache ? call->cache->cache->shape.batch + 1 : -1;
  if (open_index(call, ARG_CU_SEQLENS, "cu_seqlens", "(N + 1,)", &want, &call->cu_given, &call->cu_seqlens)) return -1;
  call->row_count = want - 1;
  if (call->row_count < 0) {
    PyErr_SetString(PyExc_ValueError, "cu_seqlens must have at least one entry, got none");
    return -1;
  }
  if (call->row_count || !call->cu_given.object || !call->q.shape[1]) return 0;
  PyErr_Format(PyExc_ValueError, "cu_seqlens must run from 0 to T (%lld), got one entry", (long long)call->q.shape[1]);
  return -1;
}

static int packed_rows(call *call) {
  const int64_t *bounds = PyArray_DATA(call->cu_seqlens);
  int64_t total = call->q.shape[1], n = call->row_count;
  if (bounds[0] != 0 || bounds[n] != total) {
    PyErr_Format(PyExc_ValueError, "cu_seqlens must run from 0 to T (%lld), got %lld to %lld", (long long)total,
                 (long long)bounds[0], (long long)bounds[n]);
    return -1;
  }
  for (int64_t i = 0; i < n; i++) {
    if (bounds[i + 1] < bounds[i]) {
      PyErr_Format(PyExc_ValueError, "cu_seqlens must not decrease, got %lld after %lld", (long long)bounds[i + 1],
                   (long long)bounds[i]);
      return -1;
    }
    call->rows[i] = (lola_row){0, bounds[i], bounds[i + 1] - bounds[i]};
  }
  return 0;
}

static int padded_rows(call *call) {
  int64_t T = call->q.shape[1], n = call->row_count;
  if (given(call, ARG_STARTS) && open_index(call, ARG_STARTS, "starts", "(B,)", &n, &call->starts_given, &call->starts))
    return -1;
  if (given(call, ARG_STOPS) && open_index(call, ARG_STOPS, "stops", "(B,)", &n, &call->stops_given, &call->stops))
    return -1;
  for (int64_t b = 0; b < n; b++) {
    int64_t start = call->starts ? ((const int64_t *)PyArray_DATA(call->starts))[b] : 0;
    int64_t stop = call->stops ? ((const int64_t *)PyArray_DATA(call->stops))[b] : T;
    if (start < 0 || start > stop || stop > T) {
      PyErr_Format(PyExc_ValueError,
                   "starts and stops must satisfy 0 <= start <= stop <= T (%lld), got %lld and %lld in row %lld",
                   (long long)T, (long long)start, (long long)stop, (long long)b);
      return -1;
    }
    call->rows[b] = (lola_row){b, start, stop - start};
  }
  return 0;
}

/* What enters is known on the device alone. */
static int count_all(call *call) {
  call->tokens = call->q.shape[0] * call->q.shape[1];
  return 0;
}

static int check_rows(call *call) {
  if (call->row_count > FEW_ROWS) {
    call->rows = PyMem_New(lola_row, (size_t)call->row_count);
    if (!call->rows) {
      call->rows = call->few_rows;
      PyErr_NoMemory();
      return -1;
    }
  }
  if (call->cu_given.object) return count_all(call);
  if (call->cu_seqlens ? packed_rows(call) : padded_rows(call)) return -1;
  if (call->starts_given.object || call->stops_given.object) return count_all(call);
  for (int64_t i = 0; i < call->row_count; i++) call->tokens += call->rows[i].count;
  call->raw.rows = call->rows;
  return 0;
}

/* --- cache, mixing, results ------------------------------------------------------------------ */

static int make_cache(call *call, int64_t feature_dim) {
  if (call->cache) return 0;
  lola_shape shape = {.batch = call->row_count,
                      .heads = call->q.shape[2],
                      .kv_heads = call->k.shape[2],
                      .head_dim = call->q.shape[3],
                      .value_dim = call->v.shape[3],
                      .feature_dim = feature_dim,
                      .dtype = (lola_dtype)call->k.element};
  call->cache = cache_new(call->state->cache_type, call->arguments[ARG_CONFIG], &shape, call->device, call->stream);
  if (!call->cache) return -1;
  if (call->cache->on) call->cache->on->temporary = 1;
  return 0;
}

static int open_gate(call *call, int64_t heads) {
  PyObject *object = call->arguments[ARG_GATE];
  if (call->place >= 0 && !PyArray_Check(object) && !PyList_Check(object) && !PyTuple_Check(object)) {
    view *gate = &call->gate_given;
    if (view_open(call->state, object, "gate", gate)) return -1;
    if (gate->device == call->place) {
      if (view_expect_shape(gate, "(Hq,)", 1, &heads) || view_expect_dtype(gate, LOLA_FLOAT32, " on a device"))
        return -1;
      if (view_is_dense(gate)) return 0;
      PyErr_SetString(PyExc_ValueError, "gate must be contiguous on a device");
      return -1;
    }
    if (gate->device >= 0) return refuse_place(gate, call->place, "q does");
    view_close(gate);
  }
  call->gate = gate_from(call->state, object, heads);
  return call->gate ? 0 : -1;
}

static int check_mixing(call *call) {
  int has_gate = given(call, ARG_GATE);
  int64_t heads = call->q.shape[2];
  lola_call *raw = &call->raw;
  raw->mixing = call->cache->mixing >= 0 ? (lola_mixing)call->cache->mixing
                : has_gate               ? LOLA_MIXING_GATED
                                         : LOLA_MIXING_PAPER;
  raw->scale = (float)(isnan(call->cache->scale) ? 1 / sqrt((double)call->q.shape[3]) : call->cache->scale);
  if (has_gate && open_gate(call, heads)) return -1;
  int reads_gate = mixing_reads_gate(raw->mixing);
  if (reads_gate && !has_gate) {
    PyErr_Format(PyExc_ValueError, "gate must be given with mixing '%s', got None", mixing_name(raw->mixing));
    return -1;
  }
  if (!reads_gate) {
    Py_CLEAR(call->gate);
    view_close(&call->gate_given);
  }
  raw->gate = call->gate ? PyArray_DATA(call->gate) : NULL;
  return 0;
}

static int check_output(call *call, const int64_t *shape) {
  view *out = &call->out_given;
  if (view_expect_shape(out, "(B, T, Hq, Dv)", 4, shape) ||
      view_expect_dtype(out, (lola_dtype)call->q.element, " as q is") || view_expect_output(out))
    return -1;
  const view *inputs[] = {&call->q, &call->k, &call->v, &call->q_features, &call->k_features, &call->scores};
  for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
    if (inputs[i]->object && view_expect_apart(call->state, out, inputs[i])) return -1;
  const lola_cache *cache = call->cache->cache;
  for (int i = 0; i < cache->buffer_count; i++)
    if (view_overlaps(out, cache->buffers[i].data, cache->buffers[i].nbytes)) {
      PyErr_Format(PyExc_ValueError, "out must not overlap the cache's %s: pass an array of its own memory",
                   cache->buffers[i].name);
      return -1;
    }
  return view_to_array(out, 0, &call->raw.out);
}

static int make_results(call *call) {
  const int64_t shape[4] = {call->q.shape[0], call->q.shape[1], call->q.shape[2], call->v.shape[3]};
  if (given(call, ARG_OUT)) {
    if (check_output(call, shape)) return -1;
  } else if (result_new(call->state, &call->q, "out", 4, shape, call->q.element, call->stream, &call->out) ||
             view_to_array(&call->out.opened, 0, &call->raw.out))
    return -1;
  if (call->arguments[ARG_WITH_SHARE] != Py_True) return 0;
  return result_new(call->state, &call->q, "share", 3, shape, ELEMENT_FLOAT32, call->stream, &call->share) ||
                 view_to_array(&call->share.opened, 1, &call->raw.share)
             ? -1
             : 0;
}

/* --- the call -------------------------------------------------------------------------------- */

static PyObject *take_results(call *call) {
  PyObject *out = given(call, ARG_OUT) ? Py_NewRef(call->arguments[ARG_OUT]) : result_take(call->state, &call->out);
  if (!call->share.object) return out;
  PyObject *share = result_take(call->state, &call->share);
  PyObject *pair = PyTuple_Pack(2, out, share);
  Py_DECREF(out);
  Py_DECREF(share);
  return pair;
}

PyObject *py_attention(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
  if (expect_argument_count("attention", count, ARG_COUNT)) return NULL;
  call call = {.state = binding_state_of(module), .arguments = arguments};
  call.rows = call.few_rows;
  int64_t feature_dim;
  int failed = check_kinds(&call) || take_cache(&call) || open_inputs(&call) || take_place(&call) ||
               check_inputs(&call) || check_features(&call, &feature_dim) || count_rows(&call) || check_rows(&call) ||
               make_cache(&call, feature_dim) || check_scores(&call) || check_mixing(&call) || make_results(&call) ||
               (call.place < 0 ? run_host(&call) : run_device(&call));
  PyObject *made = failed ? NULL : take_results(&call);
  call_close(&call);
  return made;
}
