#include "staging.h"

#include <stdlib.h>
#include <string.h>

#include "cpu/pool.h"

/* Pieces on their way at once, packed, copied in, computed, copied out or unpacked: enough that both directions of
 * copying have the next one waiting while the host takes its turn at another. */
enum { PIECES = 6 };
/* Bytes of a piece, in and out: large enough that launches do not count, small enough that the first pack and the last
 * unpack, which nothing overlaps, take little. */
static const int64_t PIECE_BYTES = INT64_C(16) << 20;
/* What a thread copies at a time. */
static const int64_t TASK_BYTES = INT64_C(256) << 10;

typedef struct piece {
  char *host; /* page-locked */
  int64_t size;
  void *copied, *computed, *returned; /* events */
  int busy;                           /* `returned` was recorded, and nobody waited for it yet */
} piece;

struct staging {
  void *in, *out; /* streams */
  piece pieces[PIECES];
};

/* --- what is kept --------------------------------------------------------------------------- */

static lola_status open_piece(const device *device, piece *piece, lola_message *message) {
  const lola_cuda_api *api = device->api;
  lola_status status = LOLA_OK;
  void **events[] = {&piece->copied, &piece->computed, &piece->returned};
  for (int i = 0; i < 3 && !status; i++)
    if (!*events[i]) status = api->event_create(device->number, events[i], message);
  return status;
}

/* The device's staging, all of it open; the caller holds its lock. */
static lola_status open_staging(device *device, lola_message *message) {
  const lola_cuda_api *api = device->api;
  if (!device->staging) device->staging = calloc(1, sizeof *device->staging);
  staging *staging = device->staging;
  if (!staging) return lola_out_of_memory(message, sizeof *staging);
  lola_status status = LOLA_OK;
  if (!staging->in) status = api->stream_create(device->number, &staging->in, message);
  if (!status && !staging->out) status = api->stream_create(device->number, &staging->out, message);
  for (int i = 0; i < PIECES && !status; i++) status = open_piece(device, &staging->pieces[i], message);
  return status;
}

static lola_status grow(const device *device, piece *piece, int64_t bytes, lola_message *message) {
  if (bytes <= piece->size) return LOLA_OK;
  device->api->release_host(piece->host);
  piece->host = NULL;
  piece->size = 0;
  lola_status status = device->api->allocate_host(bytes, (void **)&piece->host, message);
  if (!status) piece->size = bytes;
  return status;
}

static lola_status wait_for(device *device, piece *piece, lola_message *message) {
  if (!piece->busy) return LOLA_OK;
  piece->busy = 0;
  return device_wait(device, piece->returned, message);
}

/* --- packing -------------------------------------------------------------------------------- */

/* One array of a call: dense (B, tokens, heads, n) in a piece, and strided in the caller's memory. */
typedef struct part {
  const view *array;
  lola_array *raw;     /* of the call on the device */
  int64_t heads, line; /* bytes of a head's numbers; heads * line of a token's */
  int output;
  int64_t offset; /* in the piece */
} part;

enum { MOST_PARTS = 8 };

typedef struct plan {
  part parts[MOST_PARTS];
  int count;
  int64_t batch, tokens; /* of the whole call */
  int64_t longest;       /* tokens of a piece */
  int64_t bytes, most;   /* of the piece in hand, of the longest */
} plan;

/* One direction of copying a piece between the caller's arrays and page-locked memory. */
typedef struct packing {
  const plan *plan;
  char *piece;
  int64_t first, tokens;
  int output;
} packing;

static int64_t tokens_per_task(const part *part) {
  int64_t tokens = TASK_BYTES / (part->heads * part->line + 1);
  return tokens > 0 ? tokens : 1;
}

static int64_t tasks_of(const packing *packing, const part *part) {
  if (part->output != packing->output || !part->heads || !part->line) return 0;
  int64_t per = tokens_per_task(part);
  return packing->plan->batch * ((packing->tokens + per - 1) / per);
}

static void move_bytes(char *caller, char *piece, int64_t bytes, int output) {
  memcpy(output ? caller : piece, output ? piece : caller, (size_t)bytes);
}

static void move_tokens(const packing *packing, const part *part, int64_t b, int64_t first, int64_t tokens) {
  const view *array = part->array;
  int64_t token = part->heads * part->line;
  char *piece = packing->piece + part->offset + (b * packing->tokens + first) * token;
  char *caller = array->data + b * array->strides[0] + (packing->first + first) * array->strides[1];
  int whole = part->heads == 1 || array->strides[2] == part->line;
  if (whole && (tokens == 1 || array->strides[1] == token)) {
    move_bytes(caller, piece, tokens * token, part->output);
    return;
  }
  for (int64_t t = 0; t < tokens; t++, piece += token, caller += array->strides[1]) {
    if (whole)
      move_bytes(caller, piece, token, part->output);
    else
      for (int64_t h = 0; h < part->heads; h++)
        move_bytes(caller + h * array->strides[2], piece + h * part->line, part->line, part->output);
  }
}

static void packing_task(void *context, int64_t index, int worker) {
  (void)worker;
  const packing *packing = context;
  const part *part = packing->plan->parts;
  for (int64_t tasks; index >= (tasks = tasks_of(packing, part)); part++) index -= tasks;
  int64_t per = tokens_per_task(part), blocks = (packing->tokens + per - 1) / per;
  int64_t first = index % blocks * per, left = packing->tokens - first;
  move_tokens(packing, part, index / blocks, first, left < per ? left : per);
}

/* Lays the parts of a piece of so many tokens out; returns its bytes. */
static int64_t lay_out(plan *plan, int64_t tokens) {
  int64_t used = 0;
  for (int i = 0; i < plan->count; i++) {
    plan->parts[i].offset = used;
    used += (plan->batch * tokens * plan->parts[i].heads * plan->parts[i].line + 255) / 256 * 256;
  }
  return used;
}

static void pack(const plan *plan, char *piece, int64_t first, int64_t tokens, int output) {
  packing packing = {plan, piece, first, tokens, output};
  int64_t tasks = 0;
  for (int i = 0; i < plan->count; i++) tasks += tasks_of(&packing, &plan->parts[i]);
  if (tasks) lola_pool_run(tasks, lola_pool_width(tasks), packing_task, &packing);
}

/* --- a call --------------------------------------------------------------------------------- */

static void add_part(plan *plan, const view *array, lola_array *raw, int scalars, int output) {
  if (!array->object) return;
  int last = scalars ? array->ndim : array->ndim - 1;
  plan->parts[plan->count++] = (part){.array = array,
                                      .raw = raw,
                                      .heads = array->shape[2],
                                      .line = (last < array->ndim ? array->shape[last] : 1) * array->item_size,
                                      .output = output};
}

static void make_plan(plan *plan, call *call, lola_call *raw) {
  *plan = (struct plan){.batch = call->q.shape[0], .tokens = call->q.shape[1]};
  add_part(plan, &call->q, &raw->q, 0, 0);
  add_part(plan, &call->k, &raw->k, 0, 0);
  add_part(plan, &call->v, &raw->v, 0, 0);
  add_part(plan, &call->q_features, &raw->q_features, 0, 0);
  add_part(plan, &call->k_features, &raw->k_features, 0, 0);
  add_part(plan, &call->scores, &raw->scores, 1, 0);
  add_part(plan, call->out_given.object ? &call->out_given : &call->out.opened, &raw->out, 0, 1);
  add_part(plan, &call->share.opened, &raw->share, 1, 1);
  int64_t chunk = call->cache->cache->config.chunk, token = lay_out(plan, 64) / 64;
  plan->longest = plan->tokens;
  if (token && plan->tokens > 2 * PIECE_BYTES / token) {
    int64_t tokens = PIECE_BYTES / token > 64 ? PIECE_BYTES / token : 64;
    if (tokens > chunk) tokens -= tokens % chunk; /* any cut is right; at chunks it is also fast */
    plan->longest = tokens < plan->tokens ? tokens : plan->tokens;
  }
  plan->most = plan->bytes = lay_out(plan, plan->longest);
}

/* starts, stops or cu_seqlens as this piece has them. */
static lola_status put_index(const call *call, PyArrayObject *made, int64_t first, int64_t tokens, int64_t *scratch,
                             int64_t *place, lola_index *index, lola_message *message) {
  if (!made) return LOLA_OK;
  const int64_t *values = PyArray_DATA(made);
  int64_t count = PyArray_DIM(made, 0);
  for (int64_t i = 0; i < count; i++) {
    int64_t value = values[i] - first;
    scratch[i] = value < 0 ? 0 : value > tokens ? tokens : value;
  }
  *index = (lola_index){place, sizeof *place};
  return device_put(call->device, call->stream, place, scratch, count * (int64_t)sizeof *scratch, message);
}

/* The device's side of the work: memory of the pieces, and of the cache as it was. */
typedef struct work {
  call *call;
  lola_cuda_call raw;
  plan plan;
  char *memory, *before;
  int64_t *index;
} work;

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

static lola_status open_work(work *work, lola_message *message) {
  call *call = work->call;
  const device *device = call->device;
  const lola_cuda_api *api = device->api;
  const plan *plan = &work->plan;
  int64_t pieces = (plan->tokens + plan->longest - 1) / plan->longest, rows = 2 * call->row_count + 1;
  work->index = malloc((size_t)rows * sizeof *work->index);
  if (!work->index) return lola_out_of_memory(message, rows * (int64_t)sizeof *work->index);
  int64_t kept = pieces < PIECES ? pieces : PIECES;
  lola_status status = LOLA_OK;
  for (int64_t i = 0; i < kept && !status; i++) status = grow(device, &device->staging->pieces[i], plan->most, message);
  if (!status) status = api->allocate(device->number, kept * plan->most, call->stream, (void **)&work->memory, message);
  if (!status && pieces > 1) {
    status = api->allocate(device->number, lola_cache_nbytes(call->cache->cache), call->stream, (void **)&work->before,
                           message);
    if (!status) status = copy_cache(work, 0, message);
  }
  /* The copying streams may touch the memory from here on. */
  piece *first = &device->staging->pieces[0];
  if (!status) status = api->event_record(device->number, first->computed, call->stream, message);
  if (!status) status = api->event_wait(device->number, first->computed, device->staging->in, message);
  if (!status) status = api->event_wait(device->number, first->computed, device->staging->out, message);
  return status;
}

/* Copies of one direction between a piece's page-locked and its device memory: runs of parts that lie together. */
static lola_status copy_piece(const work *work, char *host, char *memory, int output, void *stream,
                              lola_message *message) {
  const device *device = work->call->device;
  const plan *plan = &work->plan;
  int64_t from = -1, until = plan->bytes;
  for (int i = 0; i < plan->count; i++) { /* inputs come first, then outputs */
    if (plan->parts[i].output == output && from < 0) from = plan->parts[i].offset;
    if (plan->parts[i].output && !output) {
      until = plan->parts[i].offset;
      break;
    }
  }
  if (from < 0 || from == until) return LOLA_OK;
  return output ? device->api->copy(device->number, host + from, memory + from, until - from, LOLA_COPY_TO_HOST, stream,
                                    message)
                : device->api->copy(device->number, memory + from, host + from, until - from, LOLA_COPY_TO_DEVICE,
                                    stream, message);
}

/* Packs the inputs of one piece and queues their way to the device; *raw becomes the call on them. */
static lola_status bring_piece(work *work, int64_t first, int64_t tokens, piece *piece, char *memory,
                               lola_cuda_call *raw, lola_message *message) {
  call *call = work->call;
  plan *plan = &work->plan;
  const lola_cuda_api *api = call->device->api;
  const staging *staging = call->device->staging;
  plan->bytes = lay_out(plan, tokens);
  pack(plan, piece->host, first, tokens, 0);
  *raw = work->raw;
  raw->tokens = tokens;
  for (int i = 0; i < plan->count; i++) {
    const part *part = &plan->parts[i];
    int64_t item = part->array->item_size, token = part->heads * part->line / item;
    lola_array *array = (lola_array *)(void *)((char *)&raw->base + ((char *)part->raw - (char *)&work->raw.base));
    *array =
        (lola_array){memory + part->offset, (lola_dtype)part->array->element, tokens * token, token, part->line / item};
  }
  int64_t *place = call->cache->on->index, batch = call->cache->cache->shape.batch;
  lola_status status = copy_piece(work, piece->host, memory, 0, staging->in, message);
  if (!status) status = api->event_record(call->place, piece->copied, staging->in, message);
  if (!status) status = api->event_wait(call->place, piece->copied, call->stream, message);
  if (!status) status = put_index(call, call->starts, first, tokens, work->index, place, &raw->starts, message);
  if (!status) status = put_index(call, call->stops, first, tokens, work->index, place + batch, &raw->stops, message);
  if (!status) status = put_index(call, call->cu_seqlens, first, tokens, work->index, place, &raw->cu_seqlens, message);
  return status;
}

/* Queues the work on it and the way back. */
static lola_status queue_piece(work *work, const lola_cuda_call *raw, piece *piece, char *memory,
                               lola_message *message) {
  call *call = work->call;
  const lola_cuda_api *api = call->device->api;
  const staging *staging = call->device->staging;
  lola_status status = api->attention(call->cache->cache, call->cache->on->workspace, raw, message);
  if (!status) status = api->event_record(call->place, piece->computed, call->stream, message);
  if (!status) status = api->event_wait(call->place, piece->computed, staging->out, message);
  if (!status) status = copy_piece(work, piece->host, memory, 1, staging->out, message);
  if (!status) status = api->event_record(call->place, piece->returned, staging->out, message);
  if (!status) piece->busy = 1;
  return status;
}

/* All is checked before anything is written, at the price of a second way to the device. */
static lola_status check_pieces(work *work, lola_message *message) {
  const plan *plan = &work->plan;
  piece *piece = &work->call->device->staging->pieces[0];
  lola_status status = LOLA_OK;
  for (int64_t first = 0; first < plan->tokens && !status; first += plan->longest) {
    int64_t tokens = plan->tokens - first < plan->longest ? plan->tokens - first : plan->longest;
    lola_cuda_call raw;
    status = bring_piece(work, first, tokens, piece, work->memory, &raw, message);
    if (!status) status = check_on_device(work->call, &raw, message); /* which waits, so that the piece is free again */
  }
  return status;
}

static lola_status run_pieces(work *work, lola_message *message) {
  device *device = work->call->device;
  plan *plan = &work->plan;
  int64_t pieces = (plan->tokens + plan->longest - 1) / plan->longest;
  lola_status status = LOLA_OK;
  for (int64_t i = 0; i < pieces + PIECES && !status; i++) {
    piece *piece = &device->staging->pieces[i % PIECES];
    int64_t first = i * plan->longest, before = first - PIECES * plan->longest;
    if (i >= PIECES && i - PIECES < pieces) { /* the piece that was here is taken out */
      status = wait_for(device, piece, message);
      if (status) break;
      int64_t tokens = plan->tokens - before < plan->longest ? plan->tokens - before : plan->longest;
      lay_out(plan, tokens);
      pack(plan, piece->host, before, tokens, 1);
    }
    if (i >= pieces) continue;
    int64_t tokens = plan->tokens - first < plan->longest ? plan->tokens - first : plan->longest;
    char *memory = work->memory + i % PIECES * plan->most;
    lola_cuda_call raw;
    status = bring_piece(work, first, tokens, piece, memory, &raw, message);
    if (!status) status = queue_piece(work, &raw, piece, memory, message);
  }
  return status;
}

/* After a failure nothing may be under way in memory that is given back. */
static void settle(work *work) {
  const device *device = work->call->device;
  lola_message ignored;
  void *streams[] = {device->staging->in, work->call->stream, device->staging->out};
  for (int i = 0; i < 3; i++) device->api->synchronize(device->number, streams[i], &ignored);
  for (int i = 0; i < PIECES; i++) device->staging->pieces[i].busy = 0;
}

lola_status staged_attention(call *call, const lola_cuda_call *raw, lola_message *message) {
  device *device = call->device;
  const lola_cuda_api *api = device->api;
  work work = {.call = call, .raw = *raw};
  PyThread_acquire_lock(device->staging_lock, WAIT_LOCK);
  lola_status status = open_staging(device, message);
  make_plan(&work.plan, call, &work.raw.base);
  if (!status && work.plan.batch && work.plan.tokens) {
    status = open_work(&work, message);
    if (!status && call->raw.check_finite) status = check_pieces(&work, message);
    int begun = !status;
    if (begun) status = run_pieces(&work, message);
    if (status) {
      lola_message ignored;
      if (begun && work.before && status != LOLA_DEVICE_ERROR && copy_cache(&work, 1, &ignored))
        status = LOLA_DEVICE_ERROR;
      settle(&work);
    }
    if (work.memory) api->release(device->number, work.memory, call->stream);
    if (work.before) api->release(device->number, work.before, call->stream);
    free(work.index);
  }
  PyThread_release_lock(device->staging_lock);
  return status;
}

/* --- plain arrays --------------------------------------------------------------------------- */

typedef struct dense_copy {
  char *target;
  const char *source;
  int64_t bytes;
} dense_copy;

static void dense_task(void *context, int64_t index, int worker) {
  (void)worker;
  const dense_copy *copy = context;
  int64_t first = index * TASK_BYTES, left = copy->bytes - first;
  memcpy(copy->target + first, copy->source + first, (size_t)(left < TASK_BYTES ? left : TASK_BYTES));
}

static void copy_dense(void *target, const void *source, int64_t bytes) {
  dense_copy copy = {target, source, bytes};
  int64_t tasks = (bytes + TASK_BYTES - 1) / TASK_BYTES;
  lola_pool_run(tasks, lola_pool_width(tasks), dense_task, &copy);
}

/* Through the pieces in turn; `host` and `memory` advance together. */
static lola_status stage(device *device, void *stream, char *host, char *memory, int64_t bytes, lola_copy_kind kind,
                         lola_message *message) {
  const lola_cuda_api *api = device->api;
  int64_t count = (bytes + PIECE_BYTES - 1) / PIECE_BYTES, size = bytes < PIECE_BYTES ? bytes : PIECE_BYTES;
  int out = kind == LOLA_COPY_TO_HOST;
  lola_status status = open_staging(device, message);
  for (int64_t i = 0; i < count + PIECES && !status; i++) {
    piece *piece = &device->staging->pieces[i % PIECES];
    int64_t before = (i - PIECES) * PIECE_BYTES, first = i * PIECE_BYTES;
    if (piece->busy) {
      status = wait_for(device, piece, message);
      int64_t left = bytes - before;
      if (!status && out) copy_dense(host + before, piece->host, left < PIECE_BYTES ? left : PIECE_BYTES);
    }
    if (status || i >= count) continue;
    int64_t left = bytes - first < PIECE_BYTES ? bytes - first : PIECE_BYTES;
    status = grow(device, piece, size, message);
    if (!status && !out) copy_dense(piece->host, host + first, left);
    if (!status)
      status = api->copy(device->number, out ? piece->host : memory + first, out ? memory + first : piece->host, left,
                         kind, stream, message);
    if (!status) status = api->event_record(device->number, piece->returned, stream, message);
    if (!status) piece->busy = 1;
  }
  lola_message ignored;
  if (status) api->synchronize(device->number, stream, &ignored);
  for (int i = 0; device->staging && i < PIECES; i++) device->staging->pieces[i].busy = 0;
  return status;
}

lola_status stage_in(device *device, void *stream, void *target, const void *source, int64_t bytes,
                     lola_message *message) {
  PyThread_acquire_lock(device->staging_lock, WAIT_LOCK);
  lola_status status = stage(device, stream, (char *)source, target, bytes, LOLA_COPY_TO_DEVICE, message);
  PyThread_release_lock(device->staging_lock);
  return status;
}

lola_status stage_out(device *device, void *stream, void *target, const void *source, int64_t bytes,
                      lola_message *message) {
  PyThread_acquire_lock(device->staging_lock, WAIT_LOCK);
  lola_status status = stage(device, stream, target, (char *)source, bytes, LOLA_COPY_TO_HOST, message);
  PyThread_release_lock(device->staging_lock);
  return status;
}
