#include "staging.h"

#include <stdlib.h>

#include "transfer.h"

/* --- a call --------------------------------------------------------------------------------- */

/* The device's side of a call: its memory, and the cache as it was. */
typedef struct work {
  call *call;
  lola_cuda_call raw;
  transfer_plan plan;
  const view *views[MOST_PARTS]; /* of the parts */
  lola_array *arrays[MOST_PARTS];
  char *before;
  int64_t *index;
} work;

static void add_part(work *work, const view *array, lola_array *raw, int scalars, int output) {
  transfer_plan *plan = &work->plan;
  if (!array->object) return;
  int last = scalars ? array->ndim : array->ndim - 1;
  work->views[plan->count] = array;
  work->arrays[plan->count] = raw;
  plan->parts[plan->count++] = (part){.data = array->data,
                                      .strides = {array->strides[0], array->strides[1], array->strides[2]},
                                      .heads = array->shape[2],
                                      .line = (last < array->ndim ? array->shape[last] : 1) * array->item_size,
                                      .output = output};
}

static void plan_call(work *work) {
  call *call = work->call;
  lola_call *raw = &work->raw.base;
  work->plan = (transfer_plan){.batch = call->q.shape[0], .tokens = call->q.shape[1]};
  add_part(work, &call->q, &raw->q, 0, 0);
  add_part(work, &call->k, &raw->k, 0, 0);
  add_part(work, &call->v, &raw->v, 0, 0);
  add_part(work, &call->q_features, &raw->q_features, 0, 0);
  add_part(work, &call->k_features, &raw->k_features, 0, 0);
  add_part(work, &call->scores, &raw->scores, 1, 0);
  add_part(work, call->out_given.object ? &call->out_given : &call->out.opened, &raw->out, 0, 1);
  add_part(work, &call->share.opened, &raw->share, 1, 1);
  transfer_cut(&work->plan, call->cache->cache->config.chunk); /* any cut is right; at chunks it is also fast */
}

/* starts, stops or cu_seqlens as this piece has them. */
static lola_status put_index(const work *work, PyArrayObject *made, const piece *piece, int64_t *place,
                             lola_index *index, lola_message *message) {
  if (!made) return LOLA_OK;
  const int64_t *values = PyArray_DATA(made);
  int64_t count = PyArray_DIM(made, 0);
  for (int64_t i = 0; i < count; i++) {
    int64_t value = values[i] - piece->first;
    work->index[i] = value < 0 ? 0 : value > piece->tokens ? piece->tokens : value;
  }
  *index = (lola_index){place, sizeof *place};
  return device_put(work->call->device, work->call->stream, place, work->index, count * (int64_t)sizeof *work->index,
                    message);
}

/* *raw becomes the call on a piece. */
static lola_status call_on(work *work, const piece *piece, char *memory, lola_cuda_call *raw, lola_message *message) {
  const call *call = work->call;
  for (int i = 0; i < work->plan.count; i++) {
    const part *part = &work->plan.parts[i];
    const view *view = work->views[i];
    int64_t line = part->line / view->item_size, token = part->heads * line;
    *work->arrays[i] = (lola_array){memory + transfer_offset(&work->plan, i, piece->tokens), (lola_dtype)view->element,
                                    piece->tokens * token, token, line};
  }
  *raw = work->raw;
  raw->tokens = piece->tokens;
  int64_t *place = call->cache->on->index, batch = call->cache->cache->shape.batch;
  lola_status status = put_index(work, call->starts, piece, place, &raw->starts, message);
  if (!status) status = put_index(work, call->stops, piece, place + batch, &raw->stops, message);
  if (!status) status = put_index(work, call->cu_seqlens, piece, place, &raw->cu_seqlens, message);
  return status;
}

static lola_status attend_piece(void *context, const piece *piece, char *memory, lola_message *message) {
  work *work = context;
  const call *call = work->call;
  lola_cuda_call raw;
  lola_status status = call_on(work, piece, memory, &raw, message);
  return status ? status : call->device->api->attention(call->cache->cache, call->cache->on->workspace, &raw, message);
}

static lola_status check_piece(void *context, const piece *piece, char *memory, lola_message *message) {
  work *work = context;
  lola_cuda_call raw;
  lola_status status = call_on(work, piece, memory, &raw, message);
  return status ? status : check_on_device(work->call, &raw, message);
}

static lola_status copy_cache(const work *work, int restore, lola_message *message) {
  const lola_cache *cache = work->call->cache->cache;
  const lola_cuda_api *api = work->call->device->api;
  lola_status status = LOLA_OK;
  char *copy = work->before;
  for (int i = 0; i < cache->buffer_count && !status; i++) {
    const lola_buffer *buffer = &cache->buffers[i];
    status = api->copy(cache->device, restore ? buffer->data : copy, restore ? copy : buffer->data, buffer->nbytes,
                       LOLA_COPY_ON_DEVICE, work->call->stream, message);
    copy += buffer->nbytes;
  }
  return status;
}

static lola_status open_work(work *work, transfer *transfer, lola_message *message) {
  const call *call = work->call;
  const device *device = call->device;
  const lola_cuda_api *api = device->api;
  int64_t rows = call->row_count + 1, pieces = work->plan.pieces;
  work->index = malloc((size_t)rows * sizeof *work->index);
  if (!work->index) return lola_out_of_memory(message, rows * (int64_t)sizeof *work->index);
  lola_status status =
      api->allocate(device->number, transfer_bytes(&work->plan), call->stream, (void **)&transfer->memory, message);
  if (status || pieces == 1) return status;
  status = api->allocate(device->number, lola_cache_nbytes(call->cache->cache), call->stream, (void **)&work->before,
                         message);
  return status ? status : copy_cache(work, 0, message);
}

lola_status staged_attention(call *call, const lola_cuda_call *raw, lola_message *message) {
  device *device = call->device;
  const lola_cuda_api *api = device->api;
  if (!call->q.shape[0] || !call->q.shape[1]) return LOLA_OK;
  work work = {.call = call, .raw = *raw};
  plan_call(&work);
  transfer transfer = {.device = device, .plan = &work.plan, .stream = call->stream, .context = &work};
  if (call->out.opened.object) {
    transfer.fresh = call->out.opened.data;
    transfer.fresh_bytes = view_size(&call->out.opened) * call->out.opened.item_size;
  }
  PyThread_acquire_lock(device->staging_lock, WAIT_LOCK);
  lola_status status = open_work(&work, &transfer, message);
  if (!status && call->raw.check_finite) { /* before anything is written, at the price of a second way to the device */
    transfer.only = ONLY_IN;
    transfer.work = check_piece;
    status = transfer_run(&transfer, message);
  }
  if (!status) {
    transfer.only = 0;
    transfer.work = attend_piece;
    status = transfer_run(&transfer, message);
    lola_message ignored;
    if (status && work.before && status != LOLA_DEVICE_ERROR && copy_cache(&work, 1, &ignored))
      status = LOLA_DEVICE_ERROR;
  }
  PyThread_release_lock(device->staging_lock);
  if (transfer.memory) api->release(device->number, transfer.memory, call->stream);
  if (work.before) api->release(device->number, work.before, call->stream);
  free(work.index);
  return status;
}

/* --- plain arrays --------------------------------------------------------------------------- */

static lola_status stage(device *device, void *stream, char *host, char *memory, int64_t bytes, int output, int fresh,
                         lola_message *message) {
  transfer_plan plan = {.parts = {{.data = host, .strides = {0, 1, 1}, .heads = 1, .line = 1, .output = output}},
                        .count = 1,
                        .batch = 1,
                        .tokens = bytes};
  transfer transfer = {
      .device = device, .plan = &plan, .memory = memory, .stream = stream, .only = output ? ONLY_OUT : ONLY_IN};
  if (fresh) {
    transfer.fresh = host;
    transfer.fresh_bytes = bytes;
  }
  transfer_leave(&plan);
  PyThread_acquire_lock(device->staging_lock, WAIT_LOCK);
  lola_status status = transfer_run(&transfer, message);
  PyThread_release_lock(device->staging_lock);
  return status;
}

lola_status stage_in(device *device, void *stream, void *target, const void *source, int64_t bytes,
                     lola_message *message) {
  return stage(device, stream, (char *)source, target, bytes, 0, 0, message);
}

lola_status stage_out(device *device, void *stream, void *target, const void *source, int64_t bytes, int fresh,
                      lola_message *message) {
  return stage(device, stream, target, (char *)source, bytes, 1, fresh, message);
}
