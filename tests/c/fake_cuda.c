/* A CUDA backend without CUDA, for tests of the binding: lola_cuda_api over host memory, as the module `lola._cuda`.
 *
 * It is stricter than a device. Device addresses cannot be read by the host (they lie in a region without access; the
 * numbers are in a shadow of it), freed memory is never given out again, and streams are lazy: what was queued happens
 * when somebody waits for it and no sooner, page-locked memory is read at that moment, and nothing orders one stream
 * against another but events, the default stream included. So a missing wait shows as wrong numbers, not now and then
 * but always. A stream that records a graph keeps what is queued for `replay`. Attention is lola_cpu_attention. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/half.h"
#include "core/message.h"
#include "lola/cuda.h"
#include "python/dlpack.h"

/* CUDA may be called from any thread; here one call waits for the other. */
static pthread_mutex_t calls = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static void end_call(int *begun) {
  (void)begun;
  pthread_mutex_unlock(&calls);
}
#define ONE_AT_A_TIME __attribute__((cleanup(end_call), unused)) int begun = pthread_mutex_lock(&calls)

enum { MOST_DEVICES = 2, MOST_BLOCKS = 1 << 16, NAME_SIZE = 24, MOST_NAMES = 64 };
static const int64_t REGION = INT64_C(1) << 34; /* addresses per device */
static const int64_t PAGE = 4096;

/* --- what tests can see and set ------------------------------------------------------------- */

static int devices = 2, current;
static int64_t limit = INT64_MAX; /* bytes that may be allocated on a device */
static int64_t late;              /* how often a copy to the host is asked for before it happens */
static char illegal[256];         /* the first thing that no program may do */
static struct counter {
  char name[NAME_SIZE];
  int64_t calls, fail_at;
  lola_status status;
} counters[MOST_NAMES];

static void forbid(const char *what) {
  if (!illegal[0]) snprintf(illegal, sizeof illegal, "%s", what);
}

static struct counter *counter_of(const char *name) {
  for (int i = 0; i < MOST_NAMES; i++) {
    if (!counters[i].name[0]) snprintf(counters[i].name, NAME_SIZE, "%s", name);
    if (!strcmp(counters[i].name, name)) return &counters[i];
  }
  return NULL;
}

/* Counts a call; fails it where a test asked for that. */
static lola_status enter(const char *name, lola_message *message) {
  struct counter *counter = counter_of(name);
  counter->calls++;
  if (!counter->fail_at || --counter->fail_at) return LOLA_OK;
  if (counter->status == LOLA_MEMORY_ERROR) return lola_out_of_memory(message, 12345);
  return lola_fail(message, counter->status, "CUDA kernel fake_%s could not be launched: as the test asks", name);
}

/* --- memory --------------------------------------------------------------------------------- */

typedef struct block {
  char *data;
  int64_t bytes;
  int device; /* -1: page-locked host memory */
  int live;
} block;

static block blocks[MOST_BLOCKS];
static int block_count;
static char *region, *shadow; /* of all devices, one after the other */
static int64_t used[MOST_DEVICES], live_bytes[MOST_DEVICES];

static int open_regions(void) {
  if (region) return 0;
  size_t size = (size_t)REGION * MOST_DEVICES;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  region = mmap(NULL, size, PROT_NONE, flags, -1, 0);
  shadow = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  return region == MAP_FAILED || shadow == MAP_FAILED;
}

static block *block_of(const void *data, int64_t bytes) {
  for (int i = block_count; i-- > 0;) {
    block *found = &blocks[i];
    if ((const char *)data >= found->data && (const char *)data + bytes <= found->data + found->bytes) return found;
  }
  return NULL;
}

/* The host's address of device memory. */
static void *at(int device, const void *data, int64_t bytes) {
  static char nowhere[1 << 20];
  block *found = data ? block_of(data, bytes) : NULL;
  if (!bytes) return nowhere;
  if (!found || found->device != device) {
    forbid("an address that is not the device's");
    return nowhere;
  }
  if (!found->live) {
    forbid("memory after it was released");
    return nowhere;
  }
  return shadow + ((const char *)data - region);
}

/* --- streams -------------------------------------------------------------------------------- */

typedef struct operation {
  void (*run)(struct operation *);
  int device;
  void *pointers[10];
  int64_t numbers[12];
  lola_array arrays[4];
  lola_feature_map map;
  lola_attend_call attend;
  lola_cache cache;
  lola_cuda_call call;
  char *bytes; /* of pageable memory, as they were */
  struct operation *next;
} operation;

typedef struct stream {
  int device, capturing, destroyed;
  operation *first, **last;
  int64_t asked, waits; /* the latter: queued one behind the other, with nothing after them */
  struct stream *next;
} stream;

typedef struct event {
  int device, destroyed;
  stream *on;
  int64_t queued, done;
} event;

static stream defaults[MOST_DEVICES], *streams;

static stream *stream_of(int device, void *handle) {
  stream *found = handle == NULL || handle == (void *)1 ? &defaults[device] : handle;
  if (!found->last) {
    found->device = device;
    found->last = &found->first;
  }
  if (found->device != device) forbid("a stream of another device");
  if (found->destroyed) forbid("a stream that was destroyed");
  return found;
}

static void run_one(stream *on) {
  operation *done = on->first;
  on->first = done->next;
  if (!on->first) {
    on->last = &on->first;
    on->waits = 0;
  }
  done->run(done);
  free(done->bytes);
  free(done);
}

static void flush(stream *on) {
  while (on->first) {
    if (on->capturing) {
      forbid("waiting for a stream that records a graph");
      return;
    }
    run_one(on);
  }
}

static operation *queue(int device, void *handle, void (*run)(operation *)) {
  stream *on = stream_of(device, handle);
  operation *made = calloc(1, sizeof *made);
  made->run = run;
  made->device = device;
  *on->last = made;
  on->last = &made->next;
  on->waits = 0;
  return made;
}

static lola_status fault(lola_message *message) {
  if (!illegal[0]) return LOLA_OK;
  return lola_fail(message, LOLA_DEVICE_ERROR, "an illegal memory access was encountered: %.200s", illegal);
}

/* --- the machine ---------------------------------------------------------------------------- */

static lola_status device_count(int *count, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("device_count", message);
  *count = status ? 0 : devices;
  if (status) return status;
  if (!devices) return lola_fail(message, LOLA_DEVICE_ERROR, "no NVIDIA driver was found");
  return open_regions() ? lola_fail(message, LOLA_DEVICE_ERROR, "no room for the fake's addresses") : LOLA_OK;
}

static lola_status current_device(int *device, lola_message *message) {
  ONE_AT_A_TIME;
  *device = current;
  return enter("current_device", message);
}

/* --- memory --------------------------------------------------------------------------------- */

static void run_nothing(operation *op) { (void)op; }

static lola_status take_memory(int device, int64_t bytes, void *stream, void **data, lola_message *message) {
  *data = NULL;
  if (live_bytes[device] + bytes > limit) return lola_out_of_memory(message, bytes);
  queue(device, stream, run_nothing);
  int64_t room = (bytes + 511) / 256 * 256; /* never two side by side */
  if (used[device] + room > REGION || block_count == MOST_BLOCKS) return lola_out_of_memory(message, bytes);
  char *made = region + device * REGION + used[device];
  memset(shadow + (made - region), 0xA5, (size_t)bytes);
  blocks[block_count++] = (block){made, bytes, device, 1};
  used[device] += room;
  live_bytes[device] += bytes;
  *data = made;
  return LOLA_OK;
}

static lola_status allocate(int device, int64_t bytes, void *stream, void **data, lola_message *message) {
  ONE_AT_A_TIME;
  *data = NULL;
  lola_status status = enter("allocate", message);
  return status ? status : take_memory(device, bytes, stream, data, message);
}

static void run_release(operation *op) {
  block *found = block_of(op->pointers[0], 0);
  if (!found || !found->live || found->data != op->pointers[0]) {
    forbid("releasing what was not allocated");
    return;
  }
  found->live = 0;
  live_bytes[found->device] -= found->bytes;
  char *from = shadow + (found->data - region);
  memset(from, 0xEE, (size_t)found->bytes);
  int64_t odd = -(intptr_t)from & (PAGE - 1), whole = (found->bytes - odd) / PAGE * PAGE;
  if (whole > 0) madvise(from + odd, (size_t)whole, MADV_DONTNEED); /* addresses are plenty, memory is not */
}

static void release(int device, void *data, void *stream) {
  ONE_AT_A_TIME;
  enter("release", NULL);
  if (data) queue(device, stream, run_release)->pointers[0] = data;
}

static lola_status allocate_host(int64_t bytes, void **data, lola_message *message) {
  ONE_AT_A_TIME;
  *data = NULL;
  lola_status status = enter("allocate_host", message);
  if (status) return status;
  *data = malloc((size_t)bytes + 1);
  blocks[block_count++] = (block){*data, bytes, -1, 1};
  return LOLA_OK;
}

static void release_host(void *data) {
  ONE_AT_A_TIME;
  if (!data) return;
  for (stream *on = streams; on; on = on->next)
    if (!on->destroyed && !on->capturing) flush(on); /* as the driver waits */
  block_of(data, 0)->data = NULL;
  free(data);
}

static void run_copy(operation *op) {
  lola_copy_kind kind = (lola_copy_kind)op->numbers[4];
  int64_t bytes = op->numbers[2], rows = op->numbers[3];
  for (int64_t i = 0; i < rows; i++) {
    char *target = (char *)op->pointers[0] + i * op->numbers[0];
    const char *source = op->bytes ? op->bytes + i * bytes : (const char *)op->pointers[1] + i * op->numbers[1];
    if (kind != LOLA_COPY_TO_HOST) target = at(op->device, target, bytes);
    if (kind != LOLA_COPY_TO_DEVICE) source = at(op->device, source, bytes);
    memcpy(target, source, (size_t)bytes);
  }
}

static lola_status queue_copy(int device, void *target, int64_t target_pitch, const void *source, int64_t source_pitch,
                              int64_t bytes, int64_t rows, lola_copy_kind kind, void *stream) {
  if (!bytes || !rows) return LOLA_OK;
  /* Copies to the host that stand behind two waits or more. */
  counter_of("waits")->calls += kind == LOLA_COPY_TO_HOST && stream_of(device, stream)->waits > 1;
  operation *op = queue(device, stream, run_copy);
  op->pointers[0] = target;
  op->pointers[1] = (void *)source;
  int64_t numbers[] = {target_pitch, source_pitch, bytes, rows, kind};
  memcpy(op->numbers, numbers, sizeof numbers);
  const void *host = kind == LOLA_COPY_TO_DEVICE ? source : target;
  int pageable = kind != LOLA_COPY_ON_DEVICE && !block_of(host, bytes),
      capturing = stream_of(device, stream)->capturing;
  if (pageable && capturing) forbid("pageable memory in a graph");
  if (pageable && kind == LOLA_COPY_TO_DEVICE) {
    op->bytes = malloc((size_t)(bytes * rows));
    for (int64_t i = 0; i < rows; i++)
      memcpy(op->bytes + i * bytes, (const char *)source + i * source_pitch, (size_t)bytes);
  }
  if (pageable && kind == LOLA_COPY_TO_HOST) flush(stream_of(device, stream));
  return LOLA_OK;
}

static lola_status copy_rows(int device, void *target, int64_t target_pitch, const void *source, int64_t source_pitch,
                             int64_t bytes, int64_t rows, lola_copy_kind kind, void *stream, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("copy", message);
  return status ? status : queue_copy(device, target, target_pitch, source, source_pitch, bytes, rows, kind, stream);
}

static lola_status copy(int device, void *target, const void *source, int64_t bytes, lola_copy_kind kind, void *stream,
                        lola_message *message) {
  return copy_rows(device, target, bytes, source, bytes, bytes, 1, kind, stream, message);
}

static void run_zero(operation *op) {
  memset(at(op->device, op->pointers[0], op->numbers[0]), 0, (size_t)op->numbers[0]);
}

static lola_status zero(int device, void *data, int64_t bytes, void *stream, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("zero", message);
  if (status || !bytes) return status;
  operation *op = queue(device, stream, run_zero);
  op->pointers[0] = data;
  op->numbers[0] = bytes;
  return LOLA_OK;
}

static void run_begin_rows(operation *op) {
  int64_t first = op->numbers[0], rows = op->numbers[1];
  int64_t *chunks = at(op->device, op->pointers[0], rows * 8), *row_ids = at(op->device, op->pointers[1], rows * 8);
  for (int64_t i = 0; i < rows; i++) {
    chunks[i] = -1;
    row_ids[i] = first + i;
  }
}

static lola_status begin_rows(int device, int64_t *chunks, int64_t *row_ids, int64_t first, int64_t rows, void *stream,
                              lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("begin_rows", message);
  if (status || !rows) return status;
  operation *op = queue(device, stream, run_begin_rows);
  op->pointers[0] = chunks;
  op->pointers[1] = row_ids;
  op->numbers[0] = first;
  op->numbers[1] = rows;
  return LOLA_OK;
}

/* --- streams -------------------------------------------------------------------------------- */

static lola_status synchronize(int device, void *handle, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("synchronize", message);
  if (status) return status;
  if (stream_of(device, handle)->capturing) forbid("waiting for a stream that records a graph");
  flush(stream_of(device, handle));
  return fault(message);
}

static lola_status stream_create(int device, void **handle, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("stream_create", message);
  if (status) return status;
  stream *made = calloc(1, sizeof *made);
  made->device = device;
  made->last = &made->first;
  made->next = streams;
  streams = made;
  *handle = made;
  return LOLA_OK;
}

static void stream_destroy(int device, void *handle) {
  ONE_AT_A_TIME;
  flush(stream_of(device, handle));
  ((stream *)handle)->destroyed = 1;
}

static lola_status capturing(int device, void *handle, int *result, lola_message *message) {
  ONE_AT_A_TIME;
  *result = stream_of(device, handle)->capturing;
  return enter("capturing", message);
}

static lola_status event_create(int device, void **handle, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("event_create", message);
  if (status) return status;
  event *made = calloc(1, sizeof *made);
  made->device = device;
  *handle = made;
  return LOLA_OK;
}

static event *event_of(int device, void *handle) {
  event *found = handle;
  if (found->destroyed) forbid("an event that was destroyed");
  if (found->device != device) forbid("an event of another device");
  return found;
}

static void event_destroy(int device, void *handle) {
  ONE_AT_A_TIME;
  event_of(device, handle)->destroyed = 1;
}

static void run_record(operation *op) {
  event *what = op->pointers[0];
  if (what->done < op->numbers[0]) what->done = op->numbers[0];
}

static lola_status event_record(int device, void *handle, void *stream_handle, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("event_record", message);
  if (status) return status;
  event *what = event_of(device, handle);
  stream *on = stream_of(device, stream_handle);
  if (on->capturing) forbid("an event recorded in a graph");
  operation *op = queue(device, stream_handle, run_record);
  what->on = on;
  op->pointers[0] = what;
  op->numbers[0] = ++what->queued;
  return LOLA_OK;
}

static void run_wait(operation *op) {
  event *what = op->pointers[0];
  stream *on = op->pointers[1];
  while (what->done < op->numbers[0] && on->first) run_one(on);
}

static lola_status event_wait(int device, void *handle, void *stream, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("event_wait", message);
  if (status) return status;
  event *what = event_of(device, handle);
  struct stream *on = stream_of(device, stream);
  if (on->capturing) forbid("an event of outside in a graph");
  int64_t waits = on->waits;
  operation *op = queue(device, stream, run_wait);
  on->waits = waits + 1;
  op->pointers[0] = what;
  op->pointers[1] = what->on;
  op->numbers[0] = what->queued;
  return LOLA_OK;
}

/* Says how things stand, and lets the event's stream do one thing more. */
static lola_status event_query(int device, void *handle, int *done, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("event_query", message);
  if (status) return status;
  event *what = event_of(device, handle);
  *done = what->done >= what->queued;
  if (*done) return fault(message);
  stream *on = what->on;
  int to_host = on->first->run == run_copy && on->first->numbers[4] == LOLA_COPY_TO_HOST;
  if (to_host && on->asked++ < late) return LOLA_OK;
  on->asked = 0;
  run_one(on);
  return fault(message);
}

/* --- attention ------------------------------------------------------------------------------ */

static int64_t item_of(lola_dtype dtype) { return dtype == LOLA_FLOAT32 ? 4 : 2; }

static int64_t last_of(const lola_array *array, int64_t B, int64_t T, int64_t H, int64_t n) {
  return ((B - 1) * array->stride_b + (T - 1) * array->stride_t + (H - 1) * array->stride_h + n) *
         item_of(array->dtype);
}

/* The array with the address that the host can read; strides here are never negative. */
static lola_array array_at(int device, lola_array array, int64_t B, int64_t T, int64_t H, int64_t n) {
  if (array.data && B && T && H && n) array.data = at(device, array.data, last_of(&array, B, T, H, n));
  return array;
}

static int64_t index_at(const lola_index *index, int device, int64_t i, int64_t otherwise, int64_t T) {
  if (!index->data) return otherwise;
  const char *data = at(device, (const char *)index->data + i * index->item_size, index->item_size);
  int64_t value = index->item_size == 8 ? *(const int64_t *)(const void *)data : *(const int32_t *)(const void *)data;
  return value < 0 ? 0 : value > T ? T : value;
}

static int64_t read_rows(const lola_cuda_call *call, int64_t B, lola_row *rows) {
  int64_t T = call->tokens, total = 0;
  for (int64_t b = 0; b < B; b++) {
    int packed = call->cu_seqlens.data != NULL;
    int64_t start =
        packed ? index_at(&call->cu_seqlens, call->device, b, 0, T) : index_at(&call->starts, call->device, b, 0, T);
    int64_t stop =
        packed ? index_at(&call->cu_seqlens, call->device, b + 1, 0, T) : index_at(&call->stops, call->device, b, T, T);
    rows[b] = (lola_row){packed ? 0 : b, start, stop > start ? stop - start : 0};
    total += rows[b].count;
  }
  return total;
}

static const float *floats_at(int device, const float *data, int64_t count) {
  return data ? at(device, data, count * 4) : NULL;
}

static lola_feature_map map_at(int device, lola_feature_map map, int64_t Hq, int64_t D, int64_t F) {
  int64_t count = Hq * D * (map.kind == LOLA_MAP_RELU ? F : F / 2);
  map.w_q = floats_at(device, map.w_q, count);
  map.w_k = floats_at(device, map.w_k, count);
  return map;
}

static void cache_at(lola_cache *cache) {
  void **pointers[] = {(void **)&cache->tokens_seen,   (void **)&cache->chunks,
                       (void **)&cache->row_ids,       &cache->window_keys,
                       &cache->window_values,          &cache->sparse_keys,
                       &cache->sparse_values,          (void **)&cache->sparse_positions,
                       (void **)&cache->sparse_scores, (void **)&cache->sparse_count,
                       (void **)&cache->hidden,        (void **)&cache->normalizer,
                       (void **)&cache->folded,        (void **)&cache->window_given,
                       (void **)&cache->sparse_given,  &cache->window_features,
                       &cache->sparse_features};
  for (size_t i = 0; i < sizeof pointers / sizeof *pointers; i++)
    for (int j = 0; *pointers[i] && j < cache->buffer_count; j++)
      if (cache->buffers[j].data == *pointers[i] && cache->buffers[j].nbytes) { /* empty ones share an address */
        *pointers[i] = at(cache->device, *pointers[i], cache->buffers[j].nbytes);
        break;
      }
  for (int j = 0; j < cache->buffer_count; j++)
    cache->buffers[j].data = at(cache->device, cache->buffers[j].data, cache->buffers[j].nbytes);
}

static void run_attention(operation *op) {
  lola_cache *cache = &op->cache;
  const lola_shape *s = &cache->shape;
  lola_call call = op->call.base;
  int64_t T = op->call.tokens, B = op->call.cu_seqlens.data ? 1 : s->batch, d = op->call.device;
  lola_row rows[64];
  lola_message message;
  int64_t total = read_rows(&op->call, s->batch, rows);
  call.q = array_at((int)d, call.q, B, T, s->heads, s->head_dim);
  call.k = array_at((int)d, call.k, B, T, s->kv_heads, s->head_dim);
  call.v = array_at((int)d, call.v, B, T, s->kv_heads, s->value_dim);
  call.out = array_at((int)d, call.out, B, T, s->heads, s->value_dim);
  call.q_features = array_at((int)d, call.q_features, B, T, s->heads, s->feature_dim);
  call.k_features = array_at((int)d, call.k_features, B, T, s->heads, s->feature_dim);
  call.scores = array_at((int)d, call.scores, B, T, s->heads, 1);
  call.share = array_at((int)d, call.share, B, T, s->heads, 1);
  call.gate = floats_at((int)d, call.gate, s->heads);
  call.map = map_at((int)d, call.map, s->heads, s->head_dim, s->feature_dim);
  call.rows = rows;
  call.check_finite = 0;
  call.interrupted = NULL;
  at((int)d, op->pointers[0], op->numbers[0]);
  cache_at(cache);
  const lola_array *written[] = {&call.out, &call.share};
  for (int i = 0; i < 2; i++)
    for (int64_t b = 0; written[i]->data && b < B; b++)
      for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < s->heads; h++)
          memset((char *)written[i]->data +
                     (b * written[i]->stride_b + t * written[i]->stride_t + h * written[i]->stride_h) *
                         item_of(written[i]->dtype),
                 0, (size_t)((i ? 1 : s->value_dim) * item_of(written[i]->dtype)));
  if (total && !illegal[0] && lola_cpu_attention(cache, &call, &message)) forbid(message.text);
}

static int64_t workspace_bytes(const lola_cache *cache, int device) {
  (void)device;
  return 1000 + cache->shape.batch * 8 + cache->stores_features * 512;
}

static lola_status attention(lola_cache *cache, void *workspace, const lola_cuda_call *call, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("attention", message);
  if (status) return status;
  if (call->tokens == 1) counter_of("decode")->calls++;
  if (cache->shape.batch > 64) return lola_fail(message, LOLA_VALUE_ERROR, "the fake takes 64 rows");
  if (!cache->shape.batch || !call->tokens) return LOLA_OK;
  operation *op = queue(call->device, call->stream, run_attention);
  op->cache = *cache;
  op->call = *call;
  op->pointers[0] = workspace;
  op->numbers[0] = workspace_bytes(cache, call->device);
  return LOLA_OK;
}

static int odd_float(const void *data, int64_t i, lola_dtype dtype, int negative) {
  float x = dtype == LOLA_FLOAT32   ? ((const float *)data)[i]
            : dtype == LOLA_FLOAT16 ? lola_from_float16(((const uint16_t *)data)[i])
                                    : lola_from_bfloat16(((const uint16_t *)data)[i]);
  return !isfinite(x) || (negative && x < 0);
}

static lola_status check_finite(const lola_cache *cache, const lola_cuda_call *call, int *odd, lola_message *message) {
  ONE_AT_A_TIME;
  *odd = 0;
  lola_status status = enter("check_finite", message);
  if (status) return status;
  flush(stream_of(call->device, call->stream));
  const lola_shape *s = &cache->shape;
  const struct {
    lola_array array;
    int64_t heads, n;
  } inputs[] = {{call->base.q, s->heads, s->head_dim},
                {call->base.k, s->kv_heads, s->head_dim},
                {call->base.v, s->kv_heads, s->value_dim},
                {call->base.q_features, s->heads, s->feature_dim},
                {call->base.k_features, s->heads, s->feature_dim},
                {call->base.scores, s->heads, 1}};
  lola_row rows[64];
  int64_t T = call->tokens, B = call->cu_seqlens.data ? 1 : s->batch;
  read_rows(call, s->batch, rows);
  for (int i = 0; i < 6; i++) {
    if (!inputs[i].array.data) continue;
    lola_array array = array_at(call->device, inputs[i].array, B, T, inputs[i].heads, inputs[i].n);
    for (int64_t r = 0; r < s->batch; r++)
      for (int64_t t = rows[r].first; t < rows[r].first + rows[r].count; t++)
        for (int64_t h = 0; h < inputs[i].heads; h++)
          for (int64_t j = 0; j < inputs[i].n; j++)
            if (odd_float(array.data, rows[r].b * array.stride_b + t * array.stride_t + h * array.stride_h + j,
                          array.dtype, i == 3 || i == 4))
              *odd |= 1 << i;
  }
  const lola_index *starts = &call->starts, *stops = &call->stops;
  for (int64_t r = 0; r < s->batch && starts->data && stops->data; r++)
    if (index_at(starts, call->device, r, 0, INT64_MAX) > index_at(stops, call->device, r, 0, INT64_MAX)) *odd |= 64;
  return fault(message);
}

/* --- the five steps ------------------------------------------------------------------------- */

static void run_features(operation *op) {
  const int64_t *n = op->numbers; /* B, T, Hx, D, Hq, F, side */
  lola_array x = array_at(op->device, op->arrays[0], n[0], n[1], n[2], n[3]);
  lola_feature_map map = map_at(op->device, op->map, n[4], n[3], n[5]);
  lola_message message;
  if (lola_cpu_features(&x, n[0], n[1], n[2], n[3], n[4], n[5], &map, (int)n[6],
                        at(op->device, op->pointers[0], n[0] * n[1] * n[4] * n[5] * 4), &message))
    forbid(message.text);
}

static lola_status features(const lola_array *x, int64_t B, int64_t T, int64_t Hx, int64_t D, int64_t Hq, int64_t F,
                            const lola_feature_map *map, int side_key, float *out, int device, void *stream,
                            lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("features", message);
  if (status) return status;
  operation *op = queue(device, stream, run_features);
  const int64_t numbers[] = {B, T, Hx, D, Hq, F, side_key};
  memcpy(op->numbers, numbers, sizeof numbers);
  op->arrays[0] = *x;
  op->map = *map;
  op->pointers[0] = out;
  return LOLA_OK;
}

static void run_state(operation *op) {
  const int64_t *n = op->numbers; /* B, S, Hq, Hs, F, Dv, score */
  lola_array fk = array_at(op->device, op->arrays[0], n[0], n[1], n[2], n[4]),
             v = array_at(op->device, op->arrays[1], n[0], n[1], n[3], n[5]);
  float *H = at(op->device, op->pointers[0], n[0] * n[2] * n[4] * n[5] * 4),
        *s = at(op->device, op->pointers[1], n[0] * n[2] * n[4] * 4);
  lola_message message;
  lola_status status;
  if (n[6])
    status = lola_cpu_score(&fk, &v, H, s, n[0], n[1], n[2], n[3], n[4], n[5],
                            at(op->device, op->pointers[2], n[0] * n[1] * n[2] * 4), &message);
  else
    status = lola_cpu_fold(&fk, &v, H, s, op->pointers[2] ? at(op->device, op->pointers[2], n[0] * n[3] * 8) : NULL,
                           n[0], n[1], n[2], n[3], n[4], n[5], &message);
  if (status) forbid(message.text);
}

static lola_status queue_state(const char *name, const lola_array *fk, const lola_array *v, const float *H,
                               const float *s, const void *third, int64_t B, int64_t S, int64_t Hq, int64_t Hs,
                               int64_t F, int64_t Dv, int score, int device, void *stream, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter(name, message);
  if (status) return status;
  operation *op = queue(device, stream, run_state);
  const int64_t numbers[] = {B, S, Hq, Hs, F, Dv, score};
  memcpy(op->numbers, numbers, sizeof numbers);
  op->arrays[0] = *fk;
  op->arrays[1] = *v;
  op->pointers[0] = (void *)H;
  op->pointers[1] = (void *)s;
  op->pointers[2] = (void *)third;
  return LOLA_OK;
}

static lola_status score(const lola_array *fk, const lola_array *v, const float *H, const float *s, int64_t B,
                         int64_t S, int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, float *out, int device, void *stream,
                         lola_message *message) {
  return queue_state("score", fk, v, H, s, out, B, S, Hq, Hs, F, Dv, 1, device, stream, message);
}

static lola_status fold(const lola_array *fk, const lola_array *v, float *H, float *s, const int64_t *count, int64_t B,
                        int64_t S, int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, int device, void *stream,
                        lola_message *message) {
  return queue_state("fold", fk, v, H, s, count, B, S, Hq, Hs, F, Dv, 0, device, stream, message);
}

static void run_select(operation *op) {
  const int64_t *n = op->numbers; /* B, S, Hs, keep */
  int64_t most = n[3] < n[1] ? n[3] : n[1];
  lola_message message;
  if (lola_cpu_select(at(op->device, op->pointers[0], n[0] * n[1] * n[2] * 4),
                      op->pointers[1] ? at(op->device, op->pointers[1], n[0] * n[2] * 8) : NULL, n[0], n[1], n[2], n[3],
                      at(op->device, op->pointers[2], n[0] * n[2] * most * 8),
                      at(op->device, op->pointers[3], n[0] * n[2] * (n[1] - most) * 8), &message))
    forbid(message.text);
}

static lola_status step_select(const float *scores, const int64_t *count, int64_t B, int64_t S, int64_t Hs,
                               int64_t keep, int64_t *kept, int64_t *dropped, int device, void *stream,
                               lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("select", message);
  if (status) return status;
  operation *op = queue(device, stream, run_select);
  const int64_t numbers[] = {B, S, Hs, keep};
  memcpy(op->numbers, numbers, sizeof numbers);
  op->pointers[0] = (void *)scores;
  op->pointers[1] = (void *)count;
  op->pointers[2] = kept;
  op->pointers[3] = dropped;
  return LOLA_OK;
}

static void run_attend(operation *op) {
  lola_attend_call c = op->attend;
  int d = op->device;
  lola_message message;
  c.q = array_at(d, c.q, c.B, c.T, c.Hq, c.D);
  c.k = array_at(d, c.k, c.B, c.S, c.Hs, c.D);
  c.v = array_at(d, c.v, c.B, c.S, c.Hs, c.Dv);
  c.out = array_at(d, c.out, c.B, c.T, c.Hq, c.Dv);
  c.q_features = array_at(d, c.q_features, c.B, c.T, c.Hq, c.F);
  c.hidden = floats_at(d, c.hidden, c.B * c.Hq * c.F * c.Dv);
  c.normalizer = floats_at(d, c.normalizer, c.B * c.Hq * c.F);
  c.gate = floats_at(d, c.gate, c.Hq);
  if (c.count) c.count = at(d, c.count, c.B * c.Hs * 8);
  if (lola_cpu_attend(&c, &message)) forbid(message.text);
}

static lola_status attend(const lola_attend_call *call, int device, void *stream, lola_message *message) {
  ONE_AT_A_TIME;
  lola_status status = enter("attend", message);
  if (!status) queue(device, stream, run_attend)->attend = *call;
  return status;
}

static const lola_cuda_api table = {
    LOLA_CUDA_API_VERSION,
    device_count,
    current_device,
    allocate,
    release,
    allocate_host,
    release_host,
    copy,
    copy_rows,
    zero,
    begin_rows,
    synchronize,
    stream_create,
    stream_destroy,
    capturing,
    event_create,
    event_destroy,
    event_record,
    event_wait,
    event_query,
    attention,
    workspace_bytes,
    check_finite,
    features,
    score,
    step_select,
    fold,
    attend,
};

/* --- the module ----------------------------------------------------------------------------- */

static void *pointer_from(PyObject *number) { return PyLong_AsVoidPtr(number); }

static PyObject *py_fail(PyObject *module, PyObject *arguments) {
  (void)module;
  const char *name;
  int status, at_call = 1;
  if (!PyArg_ParseTuple(arguments, "si|i", &name, &status, &at_call)) return NULL;
  counter_of(name)->fail_at = at_call;
  counter_of(name)->status = (lola_status)status;
  Py_RETURN_NONE;
}

static PyObject *py_calls(PyObject *module, PyObject *name) {
  (void)module;
  return PyLong_FromLongLong(counter_of(PyUnicode_AsUTF8(name))->calls);
}

static PyObject *py_set(PyObject *module, PyObject *arguments) {
  (void)module;
  const char *name;
  long long value;
  if (!PyArg_ParseTuple(arguments, "sL", &name, &value)) return NULL;
  if (!strcmp(name, "devices")) devices = (int)value;
  if (!strcmp(name, "current")) current = (int)value;
  if (!strcmp(name, "limit")) limit = value < 0 ? INT64_MAX : value;
  if (!strcmp(name, "late")) late = value;
  if (!strcmp(name, "waits")) counter_of(name)->calls = value;
  Py_RETURN_NONE;
}

/* What no program may do, if anything did; and forgets it. */
static PyObject *py_illegal(PyObject *module, PyObject *unused) {
  (void)module;
  (void)unused;
  PyObject *text = PyUnicode_FromString(illegal);
  illegal[0] = 0;
  return text;
}

static void flush_all(void) {
  for (int round = 0; round < 2; round++) {
    for (int i = 0; i < MOST_DEVICES; i++) flush(stream_of(i, NULL));
    for (stream *on = streams; on; on = on->next)
      if (!on->destroyed && !on->capturing) flush(on);
  }
}

static PyObject *py_live(PyObject *module, PyObject *unused) {
  (void)module;
  (void)unused;
  flush_all();
  return PyLong_FromLongLong(live_bytes[0] + live_bytes[1]);
}

static PyObject *py_allocate(PyObject *module, PyObject *arguments) {
  (void)module;
  int device;
  long long bytes;
  void *data;
  lola_message message;
  if (!PyArg_ParseTuple(arguments, "iL", &device, &bytes)) return NULL;
  if (open_regions() || take_memory(device, bytes, NULL, &data, &message)) return PyErr_NoMemory();
  flush(stream_of(device, NULL));
  return PyLong_FromVoidPtr(data);
}

static PyObject *py_free(PyObject *module, PyObject *address) {
  (void)module;
  operation op = {.pointers = {pointer_from(address)}};
  flush_all();
  run_release(&op);
  Py_RETURN_NONE;
}

/* put(device, address, bytes, stream): queued, as work of the caller's library is. */
static PyObject *py_put(PyObject *module, PyObject *arguments) {
  (void)module;
  int device;
  PyObject *address, *stream;
  const char *bytes;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(arguments, "iOy#O", &device, &address, &bytes, &size, &stream)) return NULL;
  queue_copy(device, pointer_from(address), size, bytes, size, size, 1, LOLA_COPY_TO_DEVICE, pointer_from(stream));
  Py_RETURN_NONE;
}

/* take(device, address, size, stream): waits for the stream alone. */
static PyObject *py_take(PyObject *module, PyObject *arguments) {
  (void)module;
  int device;
  PyObject *address, *stream;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(arguments, "iOnO", &device, &address, &size, &stream)) return NULL;
  flush(stream_of(device, pointer_from(stream)));
  return PyBytes_FromStringAndSize(at(device, pointer_from(address), size), size);
}

static PyObject *py_stream(PyObject *module, PyObject *device) {
  (void)module;
  void *made;
  lola_message message;
  if (stream_create((int)PyLong_AsLong(device), &made, &message)) return NULL;
  return PyLong_FromVoidPtr(made);
}

/* follow(device, stream, after): as a library orders its own streams. */
static PyObject *py_follow(PyObject *module, PyObject *arguments) {
  (void)module;
  int device;
  PyObject *one, *two;
  void *made = NULL;
  lola_message message;
  if (!PyArg_ParseTuple(arguments, "iOO", &device, &one, &two)) return NULL;
  event_create(device, &made, &message);
  event_record(device, made, pointer_from(two), &message);
  event_wait(device, made, pointer_from(one), &message);
  Py_RETURN_NONE;
}

/* Recording of what is queued on a stream begins. */
static PyObject *py_capture(PyObject *module, PyObject *arguments) {
  (void)module;
  int device;
  PyObject *handle;
  if (!PyArg_ParseTuple(arguments, "iO", &device, &handle)) return NULL;
  stream *on = stream_of(device, pointer_from(handle));
  flush(on);
  on->capturing = 1;
  Py_RETURN_NONE;
}

/* It ends; the graph, an address. */
static PyObject *py_captured(PyObject *module, PyObject *arguments) {
  (void)module;
  int device;
  PyObject *handle;
  if (!PyArg_ParseTuple(arguments, "iO", &device, &handle)) return NULL;
  stream *on = stream_of(device, pointer_from(handle));
  operation *graph = on->first;
  on->capturing = 0;
  on->first = NULL;
  on->last = &on->first;
  return PyLong_FromVoidPtr(graph);
}

static PyObject *py_replay(PyObject *module, PyObject *arguments) {
  (void)module;
  int device;
  PyObject *graph, *handle;
  if (!PyArg_ParseTuple(arguments, "iOO", &device, &graph, &handle)) return NULL;
  for (const operation *op = pointer_from(graph); op; op = op->next) {
    operation *made = queue(device, pointer_from(handle), op->run), *next = made->next;
    *made = *op;
    made->next = next;
  }
  Py_RETURN_NONE;
}

/* --- DLPack, for arrays that stand in for a library's ---------------------------------------- */

typedef struct shipped {
  dl_managed plain;
  dl_managed_versioned versioned;
  int64_t shape[8], strides[8];
} shipped;

static void delete_plain(dl_managed *managed) { free(managed->context); }
static void delete_versioned(dl_managed_versioned *managed) { free(managed->context); }

static void abandon(PyObject *capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) free(PyCapsule_GetContext(capsule));
  if (PyCapsule_IsValid(capsule, "dltensor")) free(PyCapsule_GetContext(capsule));
}

/* ship(address, shape, strides, code, bits, device, flags, versioned) */
static shipped *ship(PyObject *arguments, int *versioned) {
  PyObject *address, *shape, *strides;
  int code, bits, device, flags;
  if (!PyArg_ParseTuple(arguments, "OO!O!iiiip", &address, &PyTuple_Type, &shape, &PyTuple_Type, &strides, &code, &bits,
                        &device, &flags, versioned))
    return NULL;
  shipped *made = calloc(1, sizeof *made);
  dl_tensor tensor = {.data = pointer_from(address), .ndim = (int32_t)PyTuple_Size(shape)};
  tensor.device.type = device < 0 ? DL_CPU : DL_CUDA;
  tensor.device.id = device < 0 ? 0 : device;
  tensor.dtype.code = (uint8_t)code;
  tensor.dtype.bits = (uint8_t)bits;
  tensor.dtype.lanes = 1;
  tensor.shape = made->shape;
  tensor.strides = made->strides;
  for (int i = 0; i < tensor.ndim; i++) {
    made->shape[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
    made->strides[i] = PyLong_AsLongLong(PyTuple_GetItem(strides, i));
  }
  made->plain = (dl_managed){tensor, made, delete_plain};
  made->versioned.version.major = 1;
  made->versioned.context = made;
  made->versioned.deleter = delete_versioned;
  made->versioned.flags = (uint64_t)flags;
  made->versioned.tensor = tensor;
  return made;
}

static PyObject *py_ship(PyObject *module, PyObject *arguments) {
  (void)module;
  int versioned;
  shipped *made = ship(arguments, &versioned);
  if (!made) return NULL;
  PyObject *capsule = versioned ? PyCapsule_New(&made->versioned, "dltensor_versioned", abandon)
                                : PyCapsule_New(&made->plain, "dltensor", abandon);
  PyCapsule_SetContext(capsule, made);
  return capsule;
}

/* The address, sizes, strides, dtype code and bits, and device of a capsule, which stays unconsumed. */
static PyObject *py_unship(PyObject *module, PyObject *capsule) {
  (void)module;
  dl_managed_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
  if (!managed) return NULL;
  const dl_tensor *tensor = &managed->tensor;
  PyObject *shape = PyTuple_New(tensor->ndim), *strides = PyTuple_New(tensor->ndim);
  for (int i = 0; i < tensor->ndim; i++) {
    PyTuple_SetItem(shape, i, PyLong_FromLongLong(tensor->shape[i]));
    PyTuple_SetItem(strides, i, PyLong_FromLongLong(tensor->strides[i]));
  }
  return Py_BuildValue("(NNNiiiK)", PyLong_FromVoidPtr(tensor->data), shape, strides, tensor->dtype.code,
                       tensor->dtype.bits, tensor->device.type == DL_CUDA ? tensor->device.id : -1,
                       (unsigned long long)managed->flags);
}

/* The C table of a library: arrays ship themselves, and the current stream is what current_stream() last said. */
static void *exchange_stream;

static int exchange_from(void *object, dl_managed_versioned **result) {
  PyObject *arguments = PyObject_CallMethod(object, "shipment", NULL);
  int versioned;
  shipped *made = arguments ? ship(arguments, &versioned) : NULL;
  Py_XDECREF(arguments);
  if (!made) return -1;
  *result = &made->versioned;
  return 0;
}

static int exchange_current(int type, int32_t device, void **stream) {
  (void)type;
  (void)device;
  *stream = exchange_stream;
  return 0;
}

static PyObject *py_current_stream(PyObject *module, PyObject *handle) {
  (void)module;
  exchange_stream = pointer_from(handle);
  Py_RETURN_NONE;
}

static dl_exchange exchange = {.version = {1, 2}, .from_object = exchange_from, .current_stream = exchange_current};

static PyMethodDef functions[] = {
    {"fail", py_fail, METH_VARARGS, NULL},
    {"calls", py_calls, METH_O, NULL},
    {"set", py_set, METH_VARARGS, NULL},
    {"illegal", py_illegal, METH_NOARGS, NULL},
    {"live", py_live, METH_NOARGS, NULL},
    {"allocate", py_allocate, METH_VARARGS, NULL},
    {"free", py_free, METH_O, NULL},
    {"put", py_put, METH_VARARGS, NULL},
    {"take", py_take, METH_VARARGS, NULL},
    {"stream", py_stream, METH_O, NULL},
    {"follow", py_follow, METH_VARARGS, NULL},
    {"capture", py_capture, METH_VARARGS, NULL},
    {"captured", py_captured, METH_VARARGS, NULL},
    {"replay", py_replay, METH_VARARGS, NULL},
    {"ship", py_ship, METH_VARARGS, NULL},
    {"unship", py_unship, METH_O, NULL},
    {"current_stream", py_current_stream, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, .m_name = "lola._cuda", .m_doc = "Not CUDA: a stand-in for tests.",
    .m_size = -1,          .m_methods = functions,
};

PyMODINIT_FUNC PyInit__cuda(void) {
  PyObject *module = PyModule_Create(&module_def);
  if (!module) return NULL;
  PyModule_AddObject(module, "_api", PyCapsule_New((void *)&table, LOLA_CUDA_CAPSULE, NULL));
  PyModule_AddObject(module, "exchange", PyCapsule_New(&exchange, "dlpack_exchange_api", NULL));
  return module;
}
