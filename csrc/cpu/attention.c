/* lola_cpu_attention: checks, then segment by segment scan, attend, commit; or one step of decoding. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/pool.h"
#include "cpu/segment.h"

/* A segment's records stay near this many bytes, and its length between these. */
static const int64_t SEGMENT_BYTES = INT64_C(24) << 20;
enum { SHORTEST_SEGMENT = 64, LONGEST_SEGMENT = 1024 };

typedef struct {
  lola_segment segment;
  int64_t *first_part; /* per span, and one past the last */
  int64_t longest;     /* tokens of one row in one segment, at most, blocks apart */
  int width;
  struct {
    lola_decode_scratch decode;
    lola_scan_scratch scan;
    lola_attend_scratch attend;
    lola_key *keys;
    float *received; /* beside `keys`, for score "attention" */
  } scratch[LOLA_MAX_THREADS];
} run_t;

/* --- inputs ------------------------------------------------------------------------------------ */

enum { CHECKED_TOKENS = 64 };
typedef struct {
  const lola_kernels *kernels;
  const lola_cache *cache;
  const lola_call *call;
  int64_t parts;  /* per row */
  atomic_int odd; /* a bit per input that holds something it must not */
} check_job;

static const char *const input_names[] = {"q", "k", "v", "q_features", "k_features", "scores"};

static void check_task(void *context, int64_t index, int worker) {
  (void)worker;
  check_job *job = context;
  const lola_call *call = job->call;
  const lola_shape *shape = &job->cache->shape;
  const lola_row *row = &call->rows[index / job->parts];
  int64_t from = index % job->parts * CHECKED_TOKENS, until = from + CHECKED_TOKENS;
  const struct {
    const lola_array *array;
    int64_t heads, n;
    int not_negative;
  } inputs[] = {
      {&call->q, shape->heads, shape->head_dim, 0},
      {&call->k, shape->kv_heads, shape->head_dim, 0},
      {&call->v, shape->kv_heads, shape->value_dim, 0},
      {&call->q_features, shape->heads, shape->feature_dim, 1},
      {&call->k_features, shape->heads, shape->feature_dim, 1},
      {&call->scores, shape->heads, 1, 0},
  };
  for (int64_t t = from; t < until && t < row->count; t++)
    for (int i = 0; i < 6; i++)
      for (int64_t h = 0; inputs[i].array->data && h < inputs[i].heads; h++)
        if (!job->kernels->all_finite(lola_at(inputs[i].array, row->b, row->first + t, h), inputs[i].array->dtype,
                                      inputs[i].n, inputs[i].not_negative))
          atomic_fetch_or(&job->odd, 1 << i);
}

static lola_status check_finite(const lola_cache *cache, const lola_call *call, int64_t most, lola_message *message) {
  check_job job = {lola_cpu_kernels(), cache, call, (most + CHECKED_TOKENS - 1) / CHECKED_TOKENS, 0};
  int64_t tasks = cache->shape.batch * job.parts;
  lola_pool_run(tasks, most > 1 ? lola_pool_width(tasks) : 1, check_task, &job);
  int odd = atomic_load(&job.odd);
  for (int i = 0; i < 6; i++)
    if (odd >> i & 1)
      return lola_fail(
          message, LOLA_VALUE_ERROR,
          "%s must be finite%s in every token that enters; it holds NaN, an infinity%s (check=False skips this test)",
          input_names[i], i == 3 || i == 4 ? " and at least 0" : "", i == 3 || i == 4 ? " or a negative value" : "");
  return LOLA_OK;
}

/* --- the plan ---------------------------------------------------------------------------------- */

/* Where the segment that begins at `position` ends, and in how many blocks. */
static int64_t segment_end(const lola_config *config, int64_t position, int64_t end, int64_t longest, int64_t *parts) {
  int64_t at = position;
  *parts = 0;
  if (config->score == LOLA_SCORE_ATTENTION) { /* a chunk's weights must be summed before the next update */
    int64_t chunk_end = (lola_chunk_of(config, position) + 1) * config->chunk;
    if (chunk_end < end) end = chunk_end;
  }
  while (at < end) {
    int64_t next = lola_block_end(config, at);
    if (next > end) next = end;
    if (at > position && next - position > longest) break;
    at = next;
    ++*parts;
  }
  return at;
}

static int64_t entry_capacity(const lola_config *config) {
  return config->sparse + (config->chunk < LOLA_BLOCK ? LOLA_BLOCK : 0);
}

/* Takes (or adds up) everything a call needs for segments of up to `tokens` tokens in `parts` blocks. */
static void take_scratch(lola_scratch *scratch, run_t *run, int64_t tokens, int64_t parts, int decoding) {
  lola_segment *segment = &run->segment;
  const lola_cache *cache = segment->cache;
  const lola_shape *shape = &cache->shape;
  int64_t S = cache->sets;
  segment->spans = lola_scratch_take(scratch, shape->batch, sizeof(lola_span));
  segment->parts = lola_scratch_take(scratch, parts, sizeof(lola_part));
  run->first_part = lola_scratch_take(scratch, shape->batch + 1, sizeof(int64_t));
  segment->entries = lola_scratch_take(scratch, parts * S * segment->entry_capacity, sizeof(lola_entry));
  segment->entry_count = lola_scratch_take(scratch, parts * S, sizeof(int64_t));
  segment->recalled = lola_scratch_take(scratch, tokens * shape->heads * shape->value_dim, sizeof(float));
  segment->z = lola_scratch_take(scratch, tokens * shape->heads, sizeof(float));
  segment->slot_source = lola_scratch_take(scratch, shape->batch * S * cache->config.sparse, sizeof(int64_t));
  for (int i = 0; i < run->width; i++) {
    if (decoding) {
      lola_decode_scratch_take(scratch, &run->scratch[i].decode, cache, &segment->call->map);
      continue;
    }
    lola_scan_scratch_take(scratch, &run->scratch[i].scan, cache, &segment->call->map);
    lola_attend_scratch_take(scratch, &run->scratch[i].attend, LOLA_BLOCK, segment->heads, shape->head_dim,
                             shape->value_dim);
    int64_t keys = segment->entry_capacity + cache->ring + LOLA_BLOCK;
    run->scratch[i].keys = lola_scratch_take(scratch, keys, sizeof(lola_key));
    run->scratch[i].received =
        lola_scratch_take(scratch, cache->config.score == LOLA_SCORE_ATTENTION ? keys : 0, sizeof(float));
  }
}

/* --- the phases -------------------------------------------------------------------------------- */

static void scan_task(void *context, int64_t index, int worker) {
  run_t *run = context;
  int64_t span = index / run->segment.cache->sets, set = index % run->segment.cache->sets;
  lola_scan_span(&run->segment, &run->segment.spans[span], run->first_part[span],
                 run->first_part[span + 1] - run->first_part[span], set, &run->scratch[worker].scan);
}

/* One block of queries against one set: its sparse pairs, then its window in order of position. */
static void attend_part(const run_t *run, int64_t p, int64_t set, int worker, float *received) {
  const lola_segment *segment = &run->segment;
  const lola_cache *cache = segment->cache;
  const lola_call *call = segment->call;
  const lola_part *part = &segment->parts[p];
  const lola_span *span = part->span;
  lola_key *keys = run->scratch[worker].keys;
  int64_t group = p * cache->sets + set, count = segment->entry_count[group];
  const lola_entry *entries = segment->entries + group * segment->entry_capacity;
  for (int64_t i = 0; i < count; i++)
    keys[i] = (lola_key){lola_pair_key(segment, span, set, entries[i].source),
                         lola_pair_value(segment, span, set, entries[i].source), entries[i].from, entries[i].until};
  int64_t first = lola_window_first(&cache->config, lola_chunk_of(&cache->config, part->position));
  for (int64_t position = first; position < part->position + part->tokens; position++) {
    int64_t from = position - part->position, until = lola_window_until(&cache->config, position) - part->position;
    keys[count++] =
        (lola_key){lola_pair_key(segment, span, set, position), lola_pair_value(segment, span, set, position),
                   from > 0 ? (int32_t)from : 0, until < LOLA_ALWAYS ? (int32_t)until : LOLA_ALWAYS};
  }
  int64_t offset = part->position - span->position, first_head = set * segment->heads;
  int64_t linear = (span->first_token + offset) * cache->shape.heads + first_head;
  lola_block block = {.tokens = part->tokens,
                      .heads = segment->heads,
                      .D = cache->shape.head_dim,
                      .Dv = cache->shape.value_dim,
                      .dtype = cache->shape.dtype,
                      .q = call->q,
                      .out = call->out,
                      .share = call->share,
                      .keys = keys,
                      .key_count = count,
                      .recalled = segment->recalled + linear * cache->shape.value_dim,
                      .z = segment->z + linear,
                      .linear_stride = cache->shape.heads,
                      .gate = call->gate ? call->gate + first_head : NULL,
                      .mixing = call->mixing,
                      .scale = call->scale,
                      .received = received};
  block.q.data = lola_at(&call->q, span->array_b, span->array_t + offset, first_head);
  block.out.data = lola_at(&call->out, span->array_b, span->array_t + offset, first_head);
  if (call->share.data) block.share.data = lola_at(&call->share, span->array_b, span->array_t + offset, first_head);
  lola_attend_block(segment->kernels, &block, &run->scratch[worker].attend);
}

static void attend_task(void *context, int64_t index, int worker) {
  run_t *run = context;
  int64_t S = run->segment.cache->sets;
  attend_part(run, index / S, index % S, worker, NULL);
}

/* The same for score "attention": a span lies in one chunk, its blocks run in order, and what each pair receives is
 * added to what it received before. */
static void receive_task(void *context, int64_t index, int worker) {
  run_t *run = context;
  lola_cache *cache = run->segment.cache;
  int64_t i = index / cache->sets, set = index % cache->sets, R = cache->ring;
  const lola_span *span = &run->segment.spans[i];
  int64_t group = span->row * cache->sets + set, pairs = cache->sparse_count[group];
  float *received = run->scratch[worker].received, *window = cache->window_given + group * R;
  for (int64_t t = 0; t < span->tokens; t++) window[(span->position + t) % R] = 0;
  for (int64_t p = run->first_part[i]; p < run->first_part[i + 1]; p++) {
    const lola_part *part = &run->segment.parts[p];
    int64_t first = lola_window_first(&cache->config, lola_chunk_of(&cache->config, part->position));
    int64_t end = part->position + part->tokens;
    memset(received, 0, (size_t)(pairs + end - first) * sizeof(float));
    attend_part(run, p, set, worker, received);
    for (int64_t slot = 0; slot < pairs; slot++)
      cache->sparse_given[group * cache->config.sparse + slot] += received[slot];
    for (int64_t position = first; position < end; position++)
      window[position % R] += received[pairs + position - first];
  }
}

static void commit_sparse_task(void *context, int64_t index, int worker) {
  (void)worker;
  run_t *run = context;
  int64_t S = run->segment.cache->sets;
  lola_commit_sparse(&run->segment, &run->segment.spans[index / S], index % S);
}

static void commit_window_task(void *context, int64_t index, int worker) {
  (void)worker;
  run_t *run = context;
  int64_t heads = run->segment.cache->shape.kv_heads;
  lola_commit_window(&run->segment, &run->segment.spans[index / heads], index % heads);
}

static void decode_task(void *context, int64_t index, int worker) {
  run_t *run = context;
  int64_t heads = run->segment.cache->shape.kv_heads;
  lola_decode_token(&run->segment, &run->segment.spans[index / heads], index % heads, &run->scratch[worker].decode);
}

/* The next segment's spans and blocks, from where each row stands; `done` counts the tokens of each row's call. */
static void plan_segment(run_t *run, int64_t *done) {
  lola_segment *segment = &run->segment;
  const lola_cache *cache = segment->cache;
  int64_t tokens = 0;
  segment->span_count = segment->part_count = 0;
  for (int64_t b = 0; b < cache->shape.batch; b++) {
    const lola_row *row = &segment->call->rows[b];
    if (done[b] == row->count) continue;
    int64_t start = cache->tokens_seen[b], count, position = start, blocks;
    int64_t end = segment_end(&cache->config, start, start + row->count - done[b], run->longest, &blocks);
    count = end - start;
    lola_span *span = &segment->spans[segment->span_count];
    *span = (lola_span){b, row->b, row->first + done[b], start, count, tokens};
    run->first_part[segment->span_count++] = segment->part_count;
    while (position < end) {
      int64_t next = lola_block_end(&cache->config, position);
      if (next > end) next = end;
      segment->parts[segment->part_count++] = (lola_part){span, position, next - position};
      position = next;
    }
    tokens += count;
    done[b] += count;
  }
  run->first_part[segment->span_count] = segment->part_count;
}

static void run_segment(run_t *run, int decoding) {
  lola_segment *segment = &run->segment;
  lola_cache *cache = segment->cache;
  int64_t spans = segment->span_count, S = cache->sets, kv_heads = cache->shape.kv_heads;
  if (decoding) {
    lola_pool_run(spans * kv_heads, run->width, decode_task, run);
  } else {
    lola_pool_run(spans * S, run->width, scan_task, run);
    if (cache->config.score == LOLA_SCORE_ATTENTION)
      lola_pool_run(spans * S, run->width, receive_task, run);
    else
      lola_pool_run(segment->part_count * S, run->width, attend_task, run);
    lola_pool_run(spans * S, run->width, commit_sparse_task, run);
    lola_pool_run(spans * kv_heads, run->width, commit_window_task, run);
  }
  for (int64_t i = 0; i < spans; i++) {
    const lola_span *span = &segment->spans[i];
    int64_t last = span->position + span->tokens - 1, chunk = lola_chunk_of(&cache->config, last);
    cache->tokens_seen[span->row] = last + 1;
    if (chunk > cache->chunks[span->row]) cache->chunks[span->row] = chunk;
  }
}

/* --- snapshots: an interrupted call commits nothing -------------------------------------------- */

static void copy_buffers(const lola_cache *cache, char *copy, int restore) {
  for (int i = 0; i < cache->buffer_count; i++) {
    size_t bytes = (size_t)cache->buffers[i].nbytes;
    if (restore)
      memcpy(cache->buffers[i].data, copy, bytes);
    else
      memcpy(copy, cache->buffers[i].data, bytes);
    copy += bytes;
  }
}

/* Bytes below which waking other threads costs more than it brings. */
static const int64_t WORTH_SHARING = INT64_C(256) << 10;

lola_status lola_cpu_attention(lola_cache *cache, const lola_call *call, lola_message *message) {
  const lola_config *config = &cache->config;
  const lola_shape *shape = &cache->shape;
  int64_t most = 0, rows = 0;
  for (int64_t b = 0; b < shape->batch; b++) {
    if (call->rows[b].count > most) most = call->rows[b].count;
    rows += call->rows[b].count > 0;
  }
  if (!rows) return LOLA_OK;
  if (call->check_finite) {
    lola_status status = check_finite(cache, call, most, message);
    if (status) return status;
  }

  int decoding = most == 1 && config->score != LOLA_SCORE_ATTENTION;
  run_t run = {.segment = {.kernels = lola_cpu_kernels(),
                           .cache = cache,
                           .call = call,
                           .heads = shape->heads / cache->sets,
                           .entry_capacity = decoding ? 0 : entry_capacity(config)}};
  int64_t per_token = rows * (shape->heads * (shape->value_dim + 1) * 4 +
                              cache->sets * run.segment.entry_capacity * (int64_t)sizeof(lola_entry) / 32);
  run.longest = SEGMENT_BYTES / per_token;
  if (run.longest < SHORTEST_SEGMENT) run.longest = SHORTEST_SEGMENT;
  if (run.longest > LONGEST_SEGMENT) run.longest = LONGEST_SEGMENT;

  /* The largest segment decides what is taken: walk the plan once, row by row. */
  int64_t tokens = 0, parts = 0, segments = 0;
  for (int64_t b = 0; b < shape->batch; b++) {
    int64_t position = cache->tokens_seen[b], end = position + call->rows[b].count;
    int64_t row_tokens = 0, row_parts = 0, row_segments = 0;
    while (position < end) {
      int64_t blocks, next = segment_end(config, position, end, run.longest, &blocks);
      if (next - position > row_tokens) row_tokens = next - position;
      if (blocks > row_parts) row_parts = blocks;
      position = next;
      row_segments++;
    }
    tokens += row_tokens;
    parts += row_parts;
    if (row_segments > segments) segments = row_segments;
  }
  int64_t tasks = decoding ? rows * shape->kv_heads : parts * cache->sets;
  run.width = lola_pool_width(tasks);
  if (decoding && lola_cache_nbytes(cache) < WORTH_SHARING) run.width = 1;

  int64_t *done = calloc((size_t)shape->batch, sizeof *done);
  if (!done) return lola_out_of_memory(message, shape->batch * (int64_t)sizeof *done);
  char *snapshot = NULL;
  lola_status status = LOLA_OK;
  if (segments > 1 && call->interrupted) {
    int64_t bytes = lola_cache_nbytes(cache);
    snapshot = malloc((size_t)bytes);
    if (!snapshot) status = lola_out_of_memory(message, bytes);
  }
  lola_scratch scratch = {0};
  take_scratch(&scratch, &run, tokens, parts, decoding);
  if (!status) status = lola_scratch_open(&scratch, message);
  if (status) {
    free(done);
    free(snapshot);
    return status;
  }
  take_scratch(&scratch, &run, tokens, parts, decoding);

  if (snapshot) copy_buffers(cache, snapshot, 0);
  for (int64_t i = 0; i < segments; i++) {
    if (i && call->interrupted && call->interrupted(call->interrupted_context)) {
      copy_buffers(cache, snapshot, 1);
      status = lola_fail(message, LOLA_INTERRUPTED, "interrupted; the cache is as it was before the call");
      break;
    }
    plan_segment(&run, done);
    run_segment(&run, decoding);
  }
  lola_scratch_close(&scratch);
  free(done);
  free(snapshot);
  return status;
}
