/* The cache: its sizes, its buffers and the operations that move whole rows. */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* madvise */
#include <sys/mman.h>
#endif
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/message.h"
#include "core/schedule.h"

/* Every size stays under this, so that sums and products of a few of them cannot overflow 64 bits. */
#define MAX_SIZE (INT64_C(1) << 31)

static lola_status check_size(const char *name, int64_t value, int64_t least, lola_message *message) {
  if (value < least || value > MAX_SIZE)
    return lola_fail(message, LOLA_VALUE_ERROR, "%s must be from %lld to %lld, got %lld", name, (long long)least,
                     (long long)MAX_SIZE, (long long)value);
  return LOLA_OK;
}

lola_status lola_config_check(const lola_config *config, lola_message *message) {
  lola_status status = check_size("chunk", config->chunk, 1, message);
  if (!status) status = check_size("window", config->window, 1, message);
  if (!status) status = check_size("sparse", config->sparse, 0, message);
  if (status) return status;
  if (config->window % config->chunk)
    return lola_fail(message, LOLA_VALUE_ERROR, "window must be a multiple of chunk (%lld), got %lld",
                     (long long)config->chunk, (long long)config->window);
  return LOLA_OK;
}

lola_status lola_shape_check(const lola_config *config, const lola_shape *shape, lola_message *message) {
  (void)config;
  lola_status status = check_size("batch", shape->batch, 0, message);
  if (!status) status = check_size("heads", shape->heads, 1, message);
  if (!status) status = check_size("kv_heads", shape->kv_heads, 1, message);
  if (!status) status = check_size("head_dim", shape->head_dim, 1, message);
  if (!status) status = check_size("value_dim", shape->value_dim, 1, message);
  if (!status) status = check_size("feature_dim", shape->feature_dim, 1, message);
  if (status) return status;
  if (shape->heads % shape->kv_heads)
    return lola_fail(message, LOLA_VALUE_ERROR, "heads must be a multiple of kv_heads (%lld), got %lld",
                     (long long)shape->kv_heads, (long long)shape->heads);
  return LOLA_OK;
}

static int64_t item_size(const lola_buffer *buffer) {
  if (buffer->kind == LOLA_BUFFER_INT64) return 8;
  return buffer->dtype == LOLA_FLOAT32 ? 4 : 2;
}

/* Adds a (B, n1, n2, n3) buffer to the table; trailing ones are left away. Sets nbytes to -1 when it overflows. */
static void describe(lola_cache *cache, const char *name, const char *part, lola_buffer_kind kind, lola_dtype dtype,
                     int64_t n1, int64_t n2, int64_t n3) {
  lola_buffer *buffer = &cache->buffers[cache->buffer_count++];
  *buffer = (lola_buffer){.name = name, .part = part, .kind = kind, .dtype = dtype};
  int64_t sizes[4] = {cache->shape.batch, n1, n2, n3};
  int64_t bytes = item_size(buffer);
  int ndim = n1 < 0 ? 1 : n2 < 0 ? 2 : n3 < 0 ? 3 : 4;
  for (int i = 0; i < ndim; i++) {
    buffer->shape[i] = sizes[i];
    if (bytes >= 0 && sizes[i] > 0 && bytes > (INT64_C(1) << 56) / sizes[i])
      bytes = -1;
    else if (bytes >= 0)
      bytes *= sizes[i];
  }
  buffer->ndim = ndim;
  buffer->nbytes = bytes;
}

enum { ALIGNMENT = 64 };

static int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

enum { LARGE_PAGE = 2 << 20 };

/* A core reads up to a fifth faster from large pages. Whole ones only, so that no memory is added. */
static void ask_for_large_pages(void *base, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  int64_t whole = bytes / LARGE_PAGE * LARGE_PAGE;
  if (whole) (void)madvise(base, (size_t)whole, MADV_HUGEPAGE); /* a wish: a refusal costs nothing but speed */
#else
  (void)base, (void)bytes;
#endif
}

/* One zeroed allocation for buffers first .. buffer_count-1. */
static lola_status allocate(lola_cache *cache, int first, void **block, lola_message *message) {
  int64_t total = 0;
  for (int i = first; i < cache->buffer_count; i++) {
    int64_t bytes = cache->buffers[i].nbytes;
    if (bytes < 0 || total > (INT64_C(1) << 56))
      return lola_fail(message, LOLA_MEMORY_ERROR,
                       "a cache of these sizes does not fit in memory: %s alone needs more than 2**56 bytes",
                       cache->buffers[i].name);
    total += aligned(bytes);
  }
  char *base = NULL;
  int64_t alignment = ALIGNMENT;
  if (cache->memory) {
    lola_status status = cache->memory->allocate(cache->memory, total + ALIGNMENT, block, message);
    if (status) return status;
  } else {
    /* calloc hands out zero pages lazily; over-allocate to align by hand. */
    if (total >= LARGE_PAGE) alignment = LARGE_PAGE;
    *block = calloc(1, (size_t)(total + alignment));
    if (!*block) return lola_out_of_memory(message, total);
  }
  base = (char *)*block + (alignment - (int64_t)((uintptr_t)*block % (uintptr_t)alignment)) % alignment;
  if (!cache->memory) ask_for_large_pages(base, total);
  for (int i = first; i < cache->buffer_count; i++) {
    cache->buffers[i].data = base;
    base += aligned(cache->buffers[i].nbytes);
  }
  return LOLA_OK;
}

static void release(lola_cache *cache, void **block) {
  if (cache->memory && *block)
    cache->memory->release(cache->memory, *block);
  else
    free(*block);
  *block = NULL;
}

static void *take(lola_cache *cache, const char *name) {
  for (int i = 0; i < cache->buffer_count; i++)
    if (!strcmp(cache->buffers[i].name, name)) return cache->buffers[i].data;
  return NULL;
}

/* The counters of rows that have seen nothing, apart from zeros. */
static lola_status begin(lola_cache *cache, int64_t first, int64_t rows, lola_message *message) {
  if (cache->memory && rows)
    return cache->memory->begin(cache->memory, cache->chunks + first, cache->row_ids + first, first, rows, message);
  for (int64_t b = first; b < first + rows; b++) {
    cache->chunks[b] = -1;
    cache->row_ids[b] = b;
  }
  return LOLA_OK;
}

lola_status lola_cache_create(const lola_config *config, const lola_shape *shape, const lola_memory *memory,
                              lola_cache **result, lola_message *message) {
  *result = NULL;
  lola_status status = lola_config_check(config, message);
  if (!status) status = lola_shape_check(config, shape, message);
  if (status) return status;
  lola_cache *cache = calloc(1, sizeof *cache);
  if (!cache) return lola_out_of_memory(message, sizeof *cache);
  cache->config = *config;
  cache->shape = *shape;
  cache->memory = memory;
  cache->device = memory ? memory->device : -1;
  int64_t S = cache->sets = config->sparse_per == LOLA_PER_KV_HEAD ? shape->kv_heads : shape->heads;
  int64_t R = cache->ring = config->window + config->chunk;
  int64_t L = config->sparse, Hq = shape->heads, Hkv = shape->kv_heads, D = shape->head_dim, Dv = shape->value_dim,
          F = shape->feature_dim;
  lola_dtype dtype = shape->dtype, f32 = LOLA_FLOAT32;
  const lola_buffer_kind number = LOLA_BUFFER_FLOAT, index = LOLA_BUFFER_INT64;
  describe(cache, "tokens_seen", "counters", index, f32, -1, -1, -1);
  describe(cache, "chunks", "counters", index, f32, -1, -1, -1);
  describe(cache, "row_ids", "counters", index, f32, -1, -1, -1);
  describe(cache, "folded", "counters", index, f32, Hq, -1, -1);
  describe(cache, "sparse_count", "counters", index, f32, S, -1, -1);
  describe(cache, "window_keys", "window", number, dtype, Hkv, R, D);
  describe(cache, "window_values", "window", number, dtype, Hkv, R, Dv);
  describe(cache, "sparse_keys", "sparse", number, dtype, S, L, D);
  describe(cache, "sparse_values", "sparse", number, dtype, S, L, Dv);
  describe(cache, "sparse_positions", "sparse", index, f32, S, L, -1);
  describe(cache, "sparse_scores", "sparse", number, f32, S, L, -1);
  describe(cache, "hidden", "state", number, f32, Hq, F, Dv);
  describe(cache, "normalizer", "state", number, f32, Hq, F, -1);
  if (config->score == LOLA_SCORE_EXTERNAL || config->score == LOLA_SCORE_ATTENTION) {
    describe(cache, "window_given", "window", number, f32, S, R, -1);
    describe(cache, "sparse_given", "sparse", number, f32, S, L, -1);
  }
  status = allocate(cache, 0, &cache->blocks[0], message);
  if (status) {
    lola_cache_destroy(cache);
    return status;
  }
  cache->tokens_seen = take(cache, "tokens_seen");
  cache->chunks = take(cache, "chunks");
  cache->row_ids = take(cache, "row_ids");
  cache->folded = take(cache, "folded");
  cache->sparse_count = take(cache, "sparse_count");
  cache->window_keys = take(cache, "window_keys");
  cache->window_values = take(cache, "window_values");
  cache->sparse_keys = take(cache, "sparse_keys");
  cache->sparse_values = take(cache, "sparse_values");
  cache->sparse_positions = take(cache, "sparse_positions");
  cache->sparse_scores = take(cache, "sparse_scores");
  cache->hidden = take(cache, "hidden");
  cache->normalizer = take(cache, "normalizer");
  cache->window_given = take(cache, "window_given");
  cache->sparse_given = take(cache, "sparse_given");
  status = begin(cache, 0, shape->batch, message);
  if (status)
    lola_cache_destroy(cache);
  else
    *result = cache;
  return status;
}

lola_status lola_cache_store_features(lola_cache *cache, lola_message *message) {
  if (cache->stores_features) return LOLA_OK;
  int first = cache->buffer_count;
  lola_dtype dtype = cache->shape.dtype == LOLA_FLOAT32 ? LOLA_FLOAT32 : LOLA_BFLOAT16;
  int64_t Hq = cache->shape.heads, F = cache->shape.feature_dim;
  describe(cache, "window_features", "window", LOLA_BUFFER_FLOAT, dtype, Hq, cache->ring, F);
  describe(cache, "sparse_features", "sparse", LOLA_BUFFER_FLOAT, dtype, Hq, cache->config.sparse, F);
  lola_status status = allocate(cache, first, &cache->blocks[1], message);
  if (status) {
    cache->buffer_count = first;
    return status;
  }
  cache->window_features = take(cache, "window_features");
  cache->sparse_features = take(cache, "sparse_features");
  cache->stores_features = 1;
  return LOLA_OK;
}

void lola_cache_drop_features(lola_cache *cache) {
  if (!cache->stores_features) return;
  cache->buffer_count -= 2; /* the last two, see above */
  release(cache, &cache->blocks[1]);
  cache->window_features = cache->sparse_features = NULL;
  cache->stores_features = 0;
}

void lola_cache_destroy(lola_cache *cache) {
  if (!cache) return;
  release(cache, &cache->blocks[0]);
  release(cache, &cache->blocks[1]);
  free(cache);
}

int64_t lola_cache_nbytes(const lola_cache *cache) {
  int64_t total = 0;
  for (int i = 0; i < cache->buffer_count; i++) total += cache->buffers[i].nbytes;
  return total;
}

static int64_t row_bytes(const lola_cache *cache, int buffer) {
  return cache->shape.batch ? cache->buffers[buffer].nbytes / cache->shape.batch : 0;
}

/* Copies rows of a buffer between two memories, each the host's or a device's. */
static lola_status copy_rows(const lola_cache *target, const lola_cache *source, int buffer, int64_t to, int64_t from,
                             int64_t step, int64_t rows, lola_message *message) {
  int64_t bytes = row_bytes(target, buffer), pitch = step * bytes;
  char *target_data = (char *)target->buffers[buffer].data + to * bytes;
  const char *source_data = (const char *)source->buffers[buffer].data + from * bytes;
  if (rows == 1 || step == 1) { /* one piece */
    bytes *= rows;
    pitch = bytes;
    rows = 1;
  }
  int64_t target_pitch = rows == 1 ? bytes : row_bytes(target, buffer);
  const lola_memory *memory = target->memory ? target->memory : source->memory;
  return (!source->memory ? memory->write
          : !target->memory
              ? memory->read
              : memory->move)(memory, target_data, target_pitch, source_data, pitch, bytes, rows, message);
}

/* On a device each copy has its price, so rows that lie at even steps go together. */
static lola_status gather_device(lola_cache *target, const lola_cache *source, const int64_t *rows,
                                 lola_message *message) {
  lola_status status = LOLA_OK;
  int64_t batch = target->shape.batch, run;
  for (int64_t b = 0; b < batch && !status; b += run) {
    int64_t step = b + 1 < batch && rows[b + 1] > rows[b] ? rows[b + 1] - rows[b] : 1;
    for (run = 1; b + run < batch && rows[b + run] == rows[b] + run * step;) run++;
    for (int i = 0; i < target->buffer_count && !status; i++)
      if (row_bytes(target, i)) status = copy_rows(target, source, i, b, rows[b], step, run, message);
  }
  return status;
}

lola_status lola_cache_gather(lola_cache *target, const lola_cache *source, const int64_t *rows,
                              lola_message *message) {
  if (target->memory || source->memory) return gather_device(target, source, rows, message);
  for (int i = 0; i < target->buffer_count; i++) {
    size_t bytes = (size_t)row_bytes(target, i);
    if (!bytes) continue;
    for (int64_t b = 0; b < target->shape.batch; b++)
      memcpy((char *)target->buffers[i].data + (size_t)b * bytes,
             (const char *)source->buffers[i].data + (size_t)rows[b] * bytes, bytes);
  }
  return LOLA_OK;
}

/* Whether a buffer lies right behind the one before it; never where a block begins, as each goes on behind its last
 * buffer's padding. */
static int follows(const lola_cache *cache, int buffer) {
  const lola_buffer *before = &cache->buffers[buffer - 1];
  return cache->buffers[buffer].data == (char *)before->data + aligned(before->nbytes);
}

/* On a device each piece has its price, so where all rows go, a block's buffers go together. */
static lola_status zero_rows(lola_cache *cache, int64_t first, int64_t rows, lola_message *message) {
  lola_status status = LOLA_OK;
  int count = cache->buffer_count, next;
  for (int i = 0; i < count && !status; i = next) {
    int64_t bytes = row_bytes(cache, i);
    char *data = (char *)cache->buffers[i].data + first * bytes;
    bytes *= rows;
    for (next = i + 1; rows == cache->shape.batch && next < count && follows(cache, next); next++)
      bytes = (char *)cache->buffers[next].data + cache->buffers[next].nbytes - data;
    if (bytes && cache->memory)
      status = cache->memory->zero(cache->memory, data, bytes, message);
    else if (bytes)
      memset(data, 0, (size_t)bytes);
  }
  return status;
}

lola_status lola_cache_reset(lola_cache *cache, const int64_t *rows, int64_t count, lola_message *message) {
  lola_status status = LOLA_OK;
  int64_t run;
  for (int64_t j = 0; j < count && !status; j += run) {
    for (run = 1; j + run < count && rows[j + run] == rows[j] + run;) run++;
    status = zero_rows(cache, rows[j], run, message);
    if (!status) status = begin(cache, rows[j], run, message);
  }
  return status;
}

int64_t lola_cache_window_start(const lola_cache *cache, int64_t chunk) {
  return chunk < 0 ? 0 : lola_window_first(&cache->config, chunk);
}

/* Sets the counters in `seen` back to `tokens`, or says which row cannot go back that far. */
static lola_status crop_counters(const lola_cache *cache, int64_t *seen, const int64_t *chunks, int64_t tokens,
                                 lola_message *message) {
  for (int64_t b = 0; b < cache->shape.batch; b++) {
    if (seen[b] <= tokens) continue;
    int64_t start = chunks[b] * cache->config.chunk;
    if (tokens < start)
      return lola_fail(message, LOLA_VALUE_ERROR,
                       "n must be at least %lld, the start of row %lld's current chunk (what was folded before it "
                       "cannot be undone), got %lld",
                       (long long)start, (long long)b, (long long)tokens);
  }
  for (int64_t b = 0; b < cache->shape.batch; b++)
    if (seen[b] > tokens) seen[b] = tokens;
  return LOLA_OK;
}

lola_status lola_cache_crop(lola_cache *cache, int64_t tokens, lola_message *message) {
  if (tokens < 0) return lola_fail(message, LOLA_VALUE_ERROR, "n must be at least 0, got %lld", (long long)tokens);
  if (cache->config.score == LOLA_SCORE_ATTENTION)
    return lola_fail(
        message, LOLA_VALUE_ERROR,
        "a cache with score='attention' cannot be cropped: the weight its pairs received is already summed");
  const lola_memory *memory = cache->memory;
  if (!memory) return crop_counters(cache, cache->tokens_seen, cache->chunks, tokens, message);
  int64_t batch = cache->shape.batch, bytes = batch * (int64_t)sizeof(int64_t);
  if (!batch) return LOLA_OK;
  int64_t *seen = malloc(2 * (size_t)bytes), *chunks = seen + batch;
  if (!seen) return lola_out_of_memory(message, 2 * bytes);
  lola_status status = memory->read(memory, seen, bytes, cache->tokens_seen, bytes, bytes, 1, message);
  if (!status) status = memory->read(memory, chunks, bytes, cache->chunks, bytes, bytes, 1, message);
  if (!status) status = crop_counters(cache, seen, chunks, tokens, message);
  if (!status) status = memory->write(memory, cache->tokens_seen, bytes, seen, bytes, bytes, 1, message);
  free(seen);
  return status;
}

lola_status lola_cache_check(const lola_cache *cache, lola_message *message) {
  const lola_config *config = &cache->config;
  int64_t S = cache->sets, L = config->sparse, r = cache->shape.heads / S;
  for (int64_t b = 0; b < cache->shape.batch; b++) {
    int64_t seen = cache->tokens_seen[b], chunk = cache->chunks[b];
    int64_t last = seen ? (seen - 1) / config->chunk : -1;
    /* A crop to a chunk's start leaves the chunk begun and empty. */
    int begun = chunk == last || (chunk == last + 1 && seen == chunk * config->chunk);
    if (seen < 0 || seen > INT64_MAX / 4 || !begun)
      return lola_fail(message, LOLA_VALUE_ERROR, "row %lld: %lld tokens seen do not fit chunk %lld", (long long)b,
                       (long long)seen, (long long)chunk);
    int64_t first = lola_cache_window_start(cache, chunk);
    for (int64_t g = 0; g < S; g++) {
      int64_t count = cache->sparse_count[b * S + g];
      if (count < 0 || count > L)
        return lola_fail(message, LOLA_VALUE_ERROR, "row %lld, set %lld: %lld sparse pairs in a cache of %lld",
                         (long long)b, (long long)g, (long long)count, (long long)L);
      for (int64_t i = 0; i < count; i++) {
        int64_t position = cache->sparse_positions[(b * S + g) * L + i];
        if (position < 0 || position >= first)
          return lola_fail(message, LOLA_VALUE_ERROR,
                           "row %lld, set %lld: sparse position %lld is not before the window", (long long)b,
                           (long long)g, (long long)position);
      }
      for (int64_t h = g * r; h < (g + 1) * r; h++)
        if (cache->folded[b * cache->shape.heads + h] != first - count)
          return lola_fail(message, LOLA_VALUE_ERROR, "row %lld, head %lld: %lld pairs folded, expected %lld",
                           (long long)b, (long long)h, (long long)cache->folded[b * cache->shape.heads + h],
                           (long long)(first - count));
    }
  }
  return LOLA_OK;
}
