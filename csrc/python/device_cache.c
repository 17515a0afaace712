/* Caches on a device: the memory operations of the core, and the order of their uses. */
#include "device.h"

#include <stdlib.h>
#include <string.h>

#include "core/message.h"

/* --- the core's memory operations ----------------------------------------------------------- */

static const device_cache *from_memory(const lola_memory *memory) { return (const device_cache *)(const void *)memory; }

static lola_status memory_allocate(const lola_memory *memory, int64_t bytes, void **data, lola_message *message) {
  const device_cache *on = from_memory(memory);
  const lola_cuda_api *api = on->device->api;
  lola_status status = api->allocate(memory->device, bytes, on->stream, data, message);
  if (status) return status;
  status = api->zero(memory->device, *data, bytes, on->stream, message);
  if (status) {
    api->release(memory->device, *data, on->stream);
    *data = NULL;
  }
  return status;
}

static void memory_release(const lola_memory *memory, void *data) {
  const device_cache *on = from_memory(memory);
  on->device->api->release(memory->device, data, on->stream);
}

static lola_status memory_zero(const lola_memory *memory, void *data, int64_t bytes, lola_message *message) {
  const device_cache *on = from_memory(memory);
  return on->device->api->zero(memory->device, data, bytes, on->stream, message);
}

static lola_status memory_begin(const lola_memory *memory, int64_t *chunks, int64_t *row_ids, int64_t first,
                                int64_t rows, lola_message *message) {
  const device_cache *on = from_memory(memory);
  return on->device->api->begin_rows(memory->device, chunks, row_ids, first, rows, on->stream, message);
}

static lola_status copy(const lola_memory *memory, void *target, int64_t target_pitch, const void *source,
                        int64_t source_pitch, int64_t bytes, int64_t rows, lola_copy_kind kind, lola_message *message) {
  const device_cache *on = from_memory(memory);
  const lola_cuda_api *api = on->device->api;
  lola_status status = rows == 1 ? api->copy(memory->device, target, source, bytes, kind, on->stream, message)
                                 : api->copy_rows(memory->device, target, target_pitch, source, source_pitch, bytes,
                                                  rows, kind, on->stream, message);
  return status || kind == LOLA_COPY_ON_DEVICE ? status : api->synchronize(memory->device, on->stream, message);
}

static lola_status memory_move(const lola_memory *memory, void *target, int64_t target_pitch, const void *source,
                               int64_t source_pitch, int64_t bytes, int64_t rows, lola_message *message) {
  return copy(memory, target, target_pitch, source, source_pitch, bytes, rows, LOLA_COPY_ON_DEVICE, message);
}

static lola_status memory_write(const lola_memory *memory, void *target, int64_t target_pitch, const void *source,
                                int64_t source_pitch, int64_t bytes, int64_t rows, lola_message *message) {
  return copy(memory, target, target_pitch, source, source_pitch, bytes, rows, LOLA_COPY_TO_DEVICE, message);
}

static lola_status memory_read(const lola_memory *memory, void *target, int64_t target_pitch, const void *source,
                               int64_t source_pitch, int64_t bytes, int64_t rows, lola_message *message) {
  return copy(memory, target, target_pitch, source, source_pitch, bytes, rows, LOLA_COPY_TO_HOST, message);
}

/* --- life ----------------------------------------------------------------------------------- */

device_cache *device_cache_new(device *device, void *stream) {
  device_cache *on = PyMem_RawCalloc(1, sizeof *on);
  if (!on) return (device_cache *)PyErr_NoMemory();
  on->memory = (lola_memory){.device = device->number,
                             .allocate = memory_allocate,
                             .release = memory_release,
                             .zero = memory_zero,
                             .begin = memory_begin,
                             .move = memory_move,
                             .write = memory_write,
                             .read = memory_read};
  on->device = device;
  on->stream = on->last = stream;
  lola_message message;
  lola_status status = device->api->event_create(device->number, &on->event, &message);
  if (!status) status = device->api->capturing(device->number, stream, &on->capturing, &message);
  on->temporary = on->capturing;
  if (!status) return on;
  device_cache_free(on, NULL);
  raise_status(status, &message);
  return NULL;
}

lola_status device_cache_furnish(device_cache *on, const lola_cache *cache, lola_message *message) {
  const lola_cuda_api *api = on->device->api;
  int number = on->device->number;
  int64_t bytes = api->workspace_bytes(cache, number);
  if (on->block && bytes <= on->workspace_bytes) return LOLA_OK;
  int64_t room = (bytes + 255) / 256 * 256, batch = cache->shape.batch;
  if (!on->seen && !(on->seen = calloc((size_t)batch + 1, sizeof *on->seen)))
    return lola_out_of_memory(message, batch * (int64_t)sizeof *on->seen);
  int64_t indices = 2 * batch > batch + 1 ? 2 * batch : batch + 1;
  int64_t total = room + indices * (int64_t)sizeof(int64_t) + cache->shape.heads * (int64_t)sizeof(float);
  void *block;
  lola_status status = memory_allocate(&on->memory, total, &block, message);
  if (status) return status;
  float *gate = (float *)(void *)((char *)block + room + indices * (int64_t)sizeof(int64_t));
  if (on->block) { /* the cache grew after its gate was known */
    status = api->copy(number, gate, on->gate, cache->shape.heads * (int64_t)sizeof(float), LOLA_COPY_ON_DEVICE,
                       on->stream, message);
    memory_release(&on->memory, status ? block : on->block);
    if (status) return status;
  }
  if (!on->block) on->counted = 1; /* none so far */
  on->block = on->workspace = block;
  on->workspace_bytes = bytes;
  on->index = (int64_t *)(void *)((char *)block + room);
  on->gate = gate;
  return LOLA_OK;
}

void device_cache_settle(const device_cache *on) {
  lola_message ignored;
  on->device->api->event_wait(on->device->number, on->event, on->device->keeper, &ignored);
}

void device_cache_free(device_cache *on, lola_cache *cache) {
  const lola_cuda_api *api = on->device->api;
  /* A recorded call's own cache is memory of the graph, which takes it back in the same stream. */
  if (on->event && !(on->temporary && on->capturing)) device_cache_settle(on);
  on->stream = on->temporary ? on->last : on->device->keeper;
  lola_cache_destroy(cache);
  if (on->block) memory_release(&on->memory, on->block);
  if (on->event) api->event_destroy(on->device->number, on->event);
  free(on->seen);
  PyMem_RawFree(on);
}

/* --- uses ----------------------------------------------------------------------------------- */

int device_cache_stream(binding_state *state, const device_cache *on, void **stream) {
  return library_stream(state, &on->library, on->device->number, stream);
}

int device_cache_enter(device_cache *on, void *stream) {
  const lola_cuda_api *api = on->device->api;
  lola_message message;
  if (on->faulty) {
    PyErr_Format(PyExc_RuntimeError, "cache is unusable since a fault of its device: %s", on->fault.text);
    return -1;
  }
  lola_status status = api->capturing(on->device->number, stream, &on->capturing, &message);
  /* What came before a graph must be over when it is replayed, which the caller sees to. */
  if (!status && !on->capturing && stream != on->last)
    status = api->event_wait(on->device->number, on->event, stream, &message);
  if (status) return raise_status(status, &message);
  on->stream = stream;
  return 0;
}

void device_cache_leave(device_cache *on) {
  lola_message ignored;
  if (on->capturing) return;
  on->device->api->event_record(on->device->number, on->event, on->stream, &ignored);
  on->last = on->stream;
}

int device_cache_raise(device_cache *on, lola_status status, const lola_message *message) {
  if (status == LOLA_DEVICE_ERROR && !on->faulty) {
    on->faulty = 1;
    on->fault = *message;
  }
  return raise_status(status, message);
}
