/* Attention on a device: what the call needs there, the order of streams, and the launch. Nothing here waits for the
 * device, but for NumPy arrays, for numbers that the host keeps elsewhere than the arrays, and with check=True. */
#include "staging.h"

#include <string.h>

static int refuse_recorded(const char *what) {
  PyErr_Format(PyExc_RuntimeError, "%s while the stream records a graph", what);
  return -1;
}

/* Arrays of another library, or a stream that the caller named: ours waits for what made them. */
static int follow_arrays(call *call) {
  const view *arrays[] = {
      &call->q,        &call->k,          &call->v,           &call->q_features,   &call->k_features,
      &call->scores,   &call->out_given,  &call->gate_given,  &call->starts_given, &call->stops_given,
      &call->cu_given, &call->out.opened, &call->share.opened};
  if (call->cache->on->capturing) return 0;
  void *last = call->stream; /* that ours has waited for */
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
    if (!arrays[i]->object || arrays[i]->device < 0 || arrays[i]->stream == call->stream || arrays[i]->stream == last)
      continue;
    if (device_follow(call->device, call->stream, arrays[i]->stream)) return -1;
    last = arrays[i]->stream;
  }
  return 0;
}

/* Room for the caller's own features, from the first call with any; *widened says that this is it. */
static int widen(call *call, int *widened) {
  cache_object *self = call->cache;
  lola_message message;
  if (call->raw.map.kind != LOLA_MAP_GIVEN || self->cache->stores_features || !call->tokens) return 0;
  if (self->on->capturing && !self->on->temporary)
    return refuse_recorded("a cache's first call with features of the caller's own cannot be made");
  lola_status status = lola_cache_store_features(self->cache, &message);
  *widened = !status;
  if (!status) status = device_cache_furnish(self->on, self->cache, &message);
  return status ? raise_status(status, &message) : 0;
}

static lola_status put(call *call, void *target, PyArrayObject *made, lola_message *message) {
  lola_status status;
  const void *source = PyArray_DATA(made);
  int64_t bytes = PyArray_NBYTES(made);
  Py_BEGIN_ALLOW_THREADS status = device_put(call->device, call->cache->on->stream, target, source, bytes, message);
  Py_END_ALLOW_THREADS return status;
}

/* With check=True a gate on the device is compared and checked as one on the host always is. */
static int check_gate(call *call) {
  cache_object *self = call->cache;
  int64_t heads = call->q.shape[2];
  if (!call->raw.check_finite || !call->gate_given.object) return 0;
  if (view_to_host(call->state, &call->gate_given)) return -1;
  const float *values = (const float *)(const void *)call->gate_given.data;
  if (gate_expect(values, heads)) return -1;
  if (!self->terms.bound) return 0;
  PyArrayObject *bound = cache_gate(self);
  if (!bound) return -1;
  if (!memcmp(PyArray_DATA(bound), values, (size_t)heads * sizeof(float))) return 0;
  PyErr_SetString(PyExc_ValueError, "gate must be the same, as in the first call with this cache, got other values");
  return -1;
}

/* The cache keeps a copy of the gate that bound it, which all calls read. */
static int bring_gate(call *call, lola_call *raw) {
  cache_object *self = call->cache;
  device_cache *on = self->on;
  const lola_cuda_api *api = call->device->api;
  int64_t bytes = call->q.shape[2] * (int64_t)sizeof(float);
  lola_message message;
  lola_status status = LOLA_OK;
  raw->gate = mixing_reads_gate(raw->mixing) ? on->gate : NULL;
  if (!raw->gate || self->terms.bound) return check_gate(call);
  if (call->gate && on->capturing) return refuse_recorded("gate must lie on the device in a first call that is made");
  if (call->gate)
    status = put(call, on->gate, call->gate, &message);
  else
    status = api->copy(call->place, on->gate, call->gate_given.data, bytes, LOLA_COPY_ON_DEVICE, on->stream, &message);
  return status ? raise_status(status, &message) : check_gate(call);
}

static int bring_index(call *call, const view *given, PyArrayObject *made, int64_t *place, lola_index *index) {
  device_cache *on = call->cache->on;
  *index = (lola_index){NULL, 0};
  if (given->object) *index = (lola_index){given->data, given->item_size};
  if (!made || call->staged) return 0; /* staged calls bring theirs piece by piece */
  if (on->capturing) return refuse_recorded("starts, stops and cu_seqlens must lie on the device");
  lola_message message;
  lola_status status = put(call, place, made, &message);
  *index = (lola_index){place, sizeof *place};
  return status ? raise_status(status, &message) : 0;
}

/* Scores on the host beside arrays on the device; *scratch is what to release. */
static int bring_scores(call *call, lola_array *scores, void **scratch) {
  device_cache *on = call->cache->on;
  const lola_cuda_api *api = call->device->api;
  if (!call->scores.object || call->scores.device >= 0 || call->staged) return 0;
  if (on->capturing) return refuse_recorded("scores must lie on the device");
  PyArrayObject *dense =
      floats_from(call->state, call->arguments[ARG_SCORES], "scores", "(B, T, Hq)", 3, call->q.shape);
  if (!dense) return -1;
  int64_t bytes = PyArray_NBYTES(dense), T = call->q.shape[1], H = call->q.shape[2];
  lola_message message;
  lola_status status = api->allocate(call->place, bytes, on->stream, scratch, &message);
  if (!status)
    status = api->copy(call->place, *scratch, PyArray_DATA(dense), bytes, LOLA_COPY_TO_DEVICE, on->stream, &message);
  if (!status) status = api->synchronize(call->place, on->stream, &message);
  Py_DECREF(dense);
  *scores = (lola_array){*scratch, LOLA_FLOAT32, T * H, H, 1};
  return status ? raise_status(status, &message) : 0;
}

static int prepare(call *call, lola_cuda_call *raw, int *widened, void **scratch) {
  int64_t batch = call->cache->cache->shape.batch;
  if (call->raw.check_finite && call->cache->on->capturing) return refuse_recorded("check must not be True");
  if (call->staged && call->cache->on->capturing) return refuse_recorded("arrays must lie on the device");
  if (check_terms(call) || follow_arrays(call) || widen(call, widened)) return -1;
  raw->base = call->raw;
  if (call->raw.map.kind != LOLA_MAP_GIVEN &&
      feature_map_on((feature_map_object *)call->arguments[ARG_FEATURE_MAP], call->device, &raw->base.map))
    return -1;
  int64_t *index = call->cache->on->index; /* which moves when the cache is widened */
  return bring_gate(call, &raw->base) || bring_index(call, &call->starts_given, call->starts, index, &raw->starts) ||
                 bring_index(call, &call->stops_given, call->stops, index + batch, &raw->stops) ||
                 bring_index(call, &call->cu_given, call->cu_seqlens, index, &raw->cu_seqlens) ||
                 bring_scores(call, &raw->base.scores, scratch)
             ? -1
             : 0;
}

/* check=True: what the host checks before it begins. */
lola_status check_on_device(const call *call, const lola_cuda_call *raw, lola_message *message) {
  static const char *const names[] = {"q", "k", "v", "q_features", "k_features", "scores"};
  int odd = 0;
  lola_status status = call->device->api->check_finite(call->cache->cache, raw, &odd, message);
  if (status || !odd) return status;
  for (int i = 0; i < 6; i++)
    if (odd >> i & 1)
      return lola_fail(message, LOLA_VALUE_ERROR,
                       "%s must be finite%s in every token that enters; it holds NaN, an infinity%s", names[i],
                       i == 3 || i == 4 ? " and at least 0" : "", i == 3 || i == 4 ? " or a negative value" : "");
  return lola_fail(message, LOLA_VALUE_ERROR, "%s must be from 0 to T (%lld) and must not decrease",
                   is_packed(call) ? "cu_seqlens" : "starts and stops", (long long)raw->tokens);
}

static lola_status launch(call *call, lola_cuda_call *raw, lola_message *message) {
  lola_status status = LOLA_OK;
  if (call->staged) return staged_attention(call, raw, message);
  if (call->raw.check_finite) status = check_on_device(call, raw, message);
  if (!status) status = call->device->api->attention(call->cache->cache, call->cache->on->workspace, raw, message);
  return status;
}

/* 1 where the host can tell that a call of one token begins no chunk: most steps of decoding, which are one launch
 * then. A graph must hold the update, since its replays go on to other chunks. */
static int begins_no_chunk(const call *call) {
  const device_cache *on = call->cache->on;
  if (call->q.shape[1] != 1 || on->capturing || on->shared || !on->counted) return 0;
  for (int64_t b = 0; b < call->row_count; b++)
    if (on->seen[b] % call->cache->cache->config.chunk == 0) return 0;
  return 1;
}

/* The host's own count of what each row has seen. */
static void count_seen(call *call) {
  device_cache *on = call->cache->on;
  if (on->capturing) on->shared = 1;
  if (call->starts_given.object || call->stops_given.object || call->cu_given.object) on->counted = 0;
  for (int64_t b = 0; on->counted && !on->shared && b < call->row_count; b++) on->seen[b] += call->rows[b].count;
}

int run_device(call *call) {
  cache_object *self = call->cache;
  device_cache *on = self->on;
  lola_message message;
  lola_status status = LOLA_OK;
  lola_cuda_call raw = {.tokens = call->q.shape[1], .device = call->place, .stream = call->stream};
  void *scratch = NULL;
  int widened = 0;
  if (cache_lock(self)) return -1;
  if (device_cache_enter(on, call->stream)) {
    cache_unlock(self);
    return -1;
  }
  if (!call->staged) on->library = call->q.library;
  int failed = prepare(call, &raw, &widened, &scratch);
  if (!failed) {
    raw.no_update = begins_no_chunk(call);
    Py_BEGIN_ALLOW_THREADS status = launch(call, &raw, &message);
    Py_END_ALLOW_THREADS
  }
  if (scratch) call->device->api->release(call->place, scratch, call->stream);
  if (!failed && !status && call->tokens) {
    fix_terms(call);
    count_seen(call);
  }
  if ((failed || status) && widened) lola_cache_drop_features(self->cache);
  device_cache_leave(on);
  if (!failed && status) failed = device_cache_raise(on, status, &message);
  cache_unlock(self);
  return failed ? -1 : 0;
}
