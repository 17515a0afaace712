/* Phase 1: the memories of one (row, head set), chunk by chunk. */
#include <math.h>
#include <string.h>

#include "core/half.h"
#include "cpu/segment.h"

typedef struct {
  const lola_segment *segment;
  const lola_span *span;
  const lola_scan_scratch *scratch;
  lola_cache *cache;
  int64_t set, kv_head, first_head, heads;
  int64_t chunk;  /* whose update is done */
  int64_t *count; /* sparse slots in use */
  int64_t *slot_source, *slot_position;
  float *slot_score, *slot_given;
  int loaded; /* scratch holds the slots' features and values */
  /* the entries of the block being walked, NULL before its first */
  lola_entry *entries;
  int64_t *entry_count;
} scan_t;

void lola_scan_scratch_take(lola_scratch *scratch, lola_scan_scratch *pieces, const lola_cache *cache,
                            const lola_feature_map *map) {
  int64_t C = cache->config.chunk, L = cache->config.sparse, D = cache->shape.head_dim, Dv = cache->shape.value_dim,
          F = cache->shape.feature_dim, heads = cache->shape.heads / cache->sets;
  int64_t stored = cache->config.score == LOLA_SCORE_SELF_RECALL ? L + C : 0;
  int64_t widest = D > Dv ? D : Dv;
  int64_t columns = lola_map_columns(map, 0, F), columns_k = lola_map_columns(map, 1, F);
  pieces->features = lola_scratch_take(scratch, heads * stored * F, sizeof(float));
  pieces->values = lola_scratch_take(scratch, stored * Dv, sizeof(float));
  pieces->fold_features = lola_scratch_take(scratch, heads * C * F, sizeof(float));
  pieces->fold_values = lola_scratch_take(scratch, C * Dv, sizeof(float));
  pieces->x = lola_scratch_take(scratch, LOLA_ROWS * (widest > F ? widest : F), sizeof(float));
  pieces->projection =
      lola_scratch_take(scratch, LOLA_ROWS * (columns > columns_k ? columns : columns_k), sizeof(float));
  pieces->recalled = lola_scratch_take(scratch, LOLA_ROWS * ((Dv > F ? Dv : F) + 1), sizeof(float));
  pieces->scores = lola_scratch_take(scratch, L + C, sizeof(float));
  pieces->sources = lola_scratch_take(scratch, L + C, sizeof(int64_t));
  pieces->positions = lola_scratch_take(scratch, L + C, sizeof(int64_t));
  pieces->slot_entry = lola_scratch_take(scratch, L, sizeof(int64_t));
  pieces->keys = lola_scratch_take(scratch, L + C, sizeof(uint64_t));
  pieces->dropped = lola_scratch_take(scratch, L + C, 1);
  pieces->rows = lola_scratch_take(scratch, LOLA_ROWS, sizeof(void *));
}

/* --- where a pair lies ------------------------------------------------------------------------ */

/* Row `source` of a (B, S, L, n) slot buffer or a (B, H, R, n) ring, or NULL when it is among the span's tokens. */
static const void *stored_row(const lola_segment *segment, const lola_span *span, int64_t source, const void *slots,
                              int64_t slot_group, const void *ring, int64_t ring_group, int64_t row_bytes) {
  const lola_cache *cache = segment->cache;
  if (source < 0) return (const char *)slots + (slot_group * cache->config.sparse - source - 1) * row_bytes;
  if (source < span->position)
    return (const char *)ring + (ring_group * cache->ring + source % cache->ring) * row_bytes;
  return NULL;
}

static const void *pair_row(const lola_segment *segment, const lola_span *span, int64_t set, int64_t source,
                            const void *slots, const void *ring, const lola_array *tokens, int64_t n) {
  const lola_cache *cache = segment->cache;
  int64_t kv_head = lola_set_kv_head(cache, set);
  const void *row = stored_row(segment, span, source, slots, span->row * cache->sets + set, ring,
                               span->row * cache->shape.kv_heads + kv_head, n * lola_item_size(cache->shape.dtype));
  return row ? row : lola_at(tokens, span->array_b, span->array_t + source - span->position, kv_head);
}

const void *lola_pair_key(const lola_segment *segment, const lola_span *span, int64_t set, int64_t source) {
  const lola_cache *cache = segment->cache;
  return pair_row(segment, span, set, source, cache->sparse_keys, cache->window_keys, &segment->call->k,
                  cache->shape.head_dim);
}

const void *lola_pair_value(const lola_segment *segment, const lola_span *span, int64_t set, int64_t source) {
  const lola_cache *cache = segment->cache;
  return pair_row(segment, span, set, source, cache->sparse_values, cache->window_values, &segment->call->v,
                  cache->shape.value_dim);
}

static lola_dtype stored_feature_dtype(const lola_cache *cache) {
  return cache->shape.dtype == LOLA_FLOAT32 ? LOLA_FLOAT32 : LOLA_BFLOAT16;
}

static void round_row(float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] = lola_from_bfloat16(lola_to_bfloat16(x[i]));
}

/* A caller's own features of a pair, as float32. */
static void load_given_features(const lola_segment *segment, const lola_span *span, int64_t head, int64_t source,
                                float *out) {
  const lola_cache *cache = segment->cache;
  int64_t F = cache->shape.feature_dim, group = span->row * cache->shape.heads + head;
  lola_dtype dtype = stored_feature_dtype(cache);
  const void *row = stored_row(segment, span, source, cache->sparse_features, group, cache->window_features, group,
                               F * lola_item_size(dtype));
  if (row) {
    segment->kernels->load_rows(out, F, &row, dtype, 1, F, 1);
    return;
  }
  const lola_array *given = &segment->call->k_features;
  row = lola_at(given, span->array_b, span->array_t + source - span->position, head);
  segment->kernels->load_rows(out, F, &row, given->dtype, 1, F, 1);
  if (dtype == LOLA_BFLOAT16) round_row(out, F);
}

/* Features (head_stride apart per head) and values of `count` pairs, as float32. */
static void load_pairs(const scan_t *scan, int64_t count, const int64_t *sources, float *features, int64_t head_stride,
                       float *values) {
  const lola_segment *segment = scan->segment;
  const lola_kernels *kernels = segment->kernels;
  const lola_shape *shape = &scan->cache->shape;
  const lola_scan_scratch *scratch = scan->scratch;
  int64_t D = shape->head_dim, Dv = shape->value_dim, F = shape->feature_dim;
  for (int64_t i = 0; i < count; i += LOLA_ROWS) {
    int64_t n = count - i < LOLA_ROWS ? count - i : LOLA_ROWS;
    for (int64_t j = 0; j < n; j++) scratch->rows[j] = lola_pair_value(segment, scan->span, scan->set, sources[i + j]);
    kernels->load_rows(values + i * Dv, Dv, scratch->rows, shape->dtype, n, Dv, 1);
    if (scan->cache->stores_features) {
      for (int64_t h = 0; h < scan->heads; h++)
        for (int64_t j = 0; j < n; j++)
          load_given_features(segment, scan->span, scan->first_head + h, sources[i + j],
                              features + h * head_stride + (i + j) * F);
      continue;
    }
    for (int64_t j = 0; j < n; j++) scratch->rows[j] = lola_pair_key(segment, scan->span, scan->set, sources[i + j]);
    kernels->load_rows(scratch->x, D, scratch->rows, shape->dtype, n, D, 1);
    for (int64_t h = 0; h < scan->heads; h++)
      lola_map_rows(kernels, &segment->call->map, 1, scan->first_head + h, n, D, F, scratch->x, D, scratch->projection,
                    features + h * head_stride + i * F, F, shape->dtype != LOLA_FLOAT32);
  }
}

/* --- score, select, fold ---------------------------------------------------------------------- */

/* The caller's score of one of the span's tokens, summed over the set's heads. */
static float entering_score(const lola_segment *segment, const lola_span *span, int64_t set, int64_t position) {
  float sum = 0;
  for (int64_t h = set * segment->heads; h < (set + 1) * segment->heads; h++)
    sum += *(const float *)lola_at(&segment->call->scores, span->array_b, span->array_t + position - span->position, h);
  return sum;
}

/* A window pair's own score: the caller's, or the weight it received. */
static float given_score(const scan_t *scan, int64_t position) {
  const lola_cache *cache = scan->cache;
  if (position < scan->span->position)
    return cache->window_given[(scan->span->row * cache->sets + scan->set) * cache->ring + position % cache->ring];
  return entering_score(scan->segment, scan->span, scan->set, position);
}

static void score_norms(const scan_t *scan, int64_t count, const int64_t *sources, float *scores) {
  const lola_shape *shape = &scan->cache->shape;
  const lola_scan_scratch *scratch = scan->scratch;
  int by_value = scan->cache->config.score == LOLA_SCORE_VALUE_NORM;
  int64_t n = by_value ? shape->value_dim : shape->head_dim;
  float factor = by_value ? (float)scan->heads : -(float)scan->heads;
  for (int64_t i = 0; i < count; i += LOLA_ROWS) {
    int64_t part = count - i < LOLA_ROWS ? count - i : LOLA_ROWS;
    for (int64_t j = 0; j < part; j++)
      scratch->rows[j] =
          (by_value ? lola_pair_value : lola_pair_key)(scan->segment, scan->span, scan->set, sources[i + j]);
    scan->segment->kernels->load_rows(scratch->x, n, scratch->rows, shape->dtype, part, n, 1);
    scan->segment->kernels->square_rows(part, n, scratch->x, n, scores + i);
    for (int64_t j = 0; j < part; j++) scores[i + j] *= factor;
  }
}

static void score_recall(scan_t *scan, int64_t count, int64_t leaving, float *scores) {
  const lola_cache *cache = scan->cache;
  const lola_scan_scratch *scratch = scan->scratch;
  int64_t L = cache->config.sparse, F = cache->shape.feature_dim, Dv = cache->shape.value_dim;
  int64_t head_stride = (L + cache->config.chunk) * F;
  if (!scan->loaded) load_pairs(scan, count, scratch->sources, scratch->features, head_stride, scratch->values);
  scan->loaded = 1;
  load_pairs(scan, leaving, scratch->sources + count, scratch->features + L * F, head_stride, scratch->values + L * Dv);
  for (int64_t h = 0; h < scan->heads; h++) {
    int64_t state = scan->span->row * cache->shape.heads + scan->first_head + h;
    const float *H = cache->hidden + state * F * Dv, *s = cache->normalizer + state * F;
    const float *features = scratch->features + h * head_stride;
    lola_recall_scores(scan->segment->kernels, count, F, Dv, features, scratch->values, Dv, H, s, scratch->recalled,
                       scores, h > 0);
    lola_recall_scores(scan->segment->kernels, leaving, F, Dv, features + L * F, scratch->values + L * Dv, Dv, H, s,
                       scratch->recalled, scores + count, h > 0);
  }
}

/* Scores E, the slots in use and then the pairs that leave, into scratch->scores and its ordering keys. */
static void score_pairs(scan_t *scan, int64_t count, int64_t leaving) {
  const lola_config *config = &scan->cache->config;
  const lola_scan_scratch *scratch = scan->scratch;
  float *scores = scratch->scores;
  int64_t all = count + leaving;
  switch (config->score) {
  case LOLA_SCORE_SELF_RECALL:
    score_recall(scan, count, leaving, scores);
    break;
  case LOLA_SCORE_VALUE_NORM:
  case LOLA_SCORE_KEY_NORM:
    score_norms(scan, all, scratch->sources, scores);
    break;
  case LOLA_SCORE_RECENCY:
    for (int64_t i = 0; i < all; i++) scores[i] = (float)scratch->positions[i] * (float)scan->heads;
    break;
  case LOLA_SCORE_RANDOM:
    for (int64_t i = 0; i < all; i++) {
      scores[i] = 0;
      for (int64_t h = 0; h < scan->heads; h++)
        scores[i] += lola_random_score(config->seed, scan->cache->row_ids[scan->span->row], scan->first_head + h,
                                       scratch->positions[i]);
    }
    break;
  case LOLA_SCORE_EXTERNAL:
  case LOLA_SCORE_ATTENTION:
    for (int64_t i = 0; i < count; i++) scores[i] = scan->slot_given[i];
    for (int64_t i = count; i < all; i++) scores[i] = given_score(scan, scratch->positions[i]);
    break;
  }
  /* A position can exceed what a float tells apart, so recency orders by the position itself. */
  for (int64_t i = 0; i < all; i++)
    scratch->keys[i] =
        config->score == LOLA_SCORE_RECENCY ? (uint64_t)scratch->positions[i] : lola_score_key(scores[i]);
}

/* Folds the dropped ones of E into the state of each of the set's heads. */
static void fold_dropped(const scan_t *scan, int64_t count, int64_t all) {
  lola_cache *cache = scan->cache;
  const lola_scan_scratch *scratch = scan->scratch;
  int64_t C = cache->config.chunk, L = cache->config.sparse, F = cache->shape.feature_dim, Dv = cache->shape.value_dim;
  int64_t n = 0;
  if (cache->config.score == LOLA_SCORE_SELF_RECALL && scan->loaded) {
    for (int64_t i = 0; i < all; i++) {
      if (!scratch->dropped[i]) continue;
      int64_t at = i < count ? i : L + i - count;
      memcpy(scratch->fold_values + n * Dv, scratch->values + at * Dv, (size_t)Dv * sizeof(float));
      for (int64_t h = 0; h < scan->heads; h++)
        memcpy(scratch->fold_features + (h * C + n) * F, scratch->features + (h * (L + C) + at) * F,
               (size_t)F * sizeof(float));
      n++;
    }
  } else {
    for (int64_t i = 0; i < all; i++)
      if (scratch->dropped[i]) scratch->sources[n++] = scratch->sources[i];
    load_pairs(scan, n, scratch->sources, scratch->fold_features, C * F, scratch->fold_values);
  }
  for (int64_t h = 0; h < scan->heads; h++) {
    int64_t state = scan->span->row * cache->shape.heads + scan->first_head + h;
    lola_fold_rows(scan->segment->kernels, n, F, Dv, scratch->fold_features + h * C * F, scratch->fold_values, Dv,
                   cache->hidden + state * F * Dv, cache->normalizer + state * F);
    cache->folded[state] += n;
  }
}

/* --- the sparse cache ------------------------------------------------------------------------- */

/* The pair at `position` moves from the window into a slot; `offset` is its first query in the current block. */
static void enter(const scan_t *scan, int64_t slot, int64_t position, float score, int32_t offset) {
  scan->slot_source[slot] = position;
  scan->slot_position[slot] = position;
  scan->slot_score[slot] = score;
  if (scan->slot_given) scan->slot_given[slot] = given_score(scan, position);
  if (scan->entries) {
    scan->scratch->slot_entry[slot] = *scan->entry_count;
    scan->entries[(*scan->entry_count)++] = (lola_entry){position, offset, LOLA_ALWAYS};
  }
}

static void update(scan_t *scan, int64_t chunk, int32_t offset) {
  lola_cache *cache = scan->cache;
  const lola_scan_scratch *scratch = scan->scratch;
  int64_t C = cache->config.chunk, L = cache->config.sparse, F = cache->shape.feature_dim, Dv = cache->shape.value_dim;
  int64_t first = lola_leaving_first(&cache->config, chunk), count = *scan->count, all = count + C;
  scan->chunk = chunk;
  if (first < 0) return;
  if (all <= L) {
    for (int64_t i = 0; i < C; i++) enter(scan, count + i, first + i, NAN, offset);
    *scan->count = all;
    return;
  }
  for (int64_t i = 0; i < all; i++) {
    scratch->sources[i] = i < count ? scan->slot_source[i] : first + i - count;
    scratch->positions[i] = i < count ? scan->slot_position[i] : first + i - count;
  }
  if (L) {
    score_pairs(scan, count, C);
    lola_mark_dropped(all, scratch->keys, scratch->positions, all - L, scratch->dropped);
  } else {
    memset(scratch->dropped, 1, (size_t)all);
  }
  fold_dropped(scan, count, all);
  /* Pairs that stay keep their slots; a newcomer takes a dropped pair's slot, or an empty one. */
  for (int64_t i = 0; i < count; i++) {
    if (!scratch->dropped[i])
      scan->slot_score[i] = scratch->scores[i];
    else if (scan->entries)
      scan->entries[scratch->slot_entry[i]].until = offset;
  }
  int64_t slot = 0;
  for (int64_t i = 0; i < C; i++) {
    if (scratch->dropped[count + i]) continue;
    while (slot < count && !scratch->dropped[slot]) slot++;
    enter(scan, slot, first + i, scratch->scores[count + i], offset);
    if (scan->loaded) {
      memcpy(scratch->values + slot * Dv, scratch->values + (L + i) * Dv, (size_t)Dv * sizeof(float));
      for (int64_t h = 0; h < scan->heads; h++)
        memcpy(scratch->features + (h * (L + C) + slot) * F, scratch->features + (h * (L + C) + L + i) * F,
               (size_t)F * sizeof(float));
    }
    slot++;
  }
  *scan->count = L;
}

static scan_t begin(const lola_segment *segment, const lola_span *span, int64_t set, const lola_scan_scratch *scratch) {
  lola_cache *cache = segment->cache;
  int64_t group = span->row * cache->sets + set, L = cache->config.sparse;
  scan_t scan = {
      .segment = segment,
      .span = span,
      .scratch = scratch,
      .cache = cache,
      .set = set,
      .kv_head = lola_set_kv_head(cache, set),
      .first_head = set * segment->heads,
      .heads = segment->heads,
      .chunk = cache->chunks[span->row],
      .count = cache->sparse_count + group,
      .slot_source = segment->slot_source + group * L,
      .slot_position = cache->sparse_positions + group * L,
      .slot_score = cache->sparse_scores + group * L,
      .slot_given = cache->sparse_given ? cache->sparse_given + group * L : NULL,
  };
  for (int64_t i = 0; i < *scan.count; i++) scan.slot_source[i] = -i - 1;
  return scan;
}

void lola_scan_update(const lola_segment *segment, const lola_span *span, int64_t chunk, int64_t set,
                      const lola_scan_scratch *scratch) {
  scan_t scan = begin(segment, span, set, scratch);
  update(&scan, chunk, 0);
}

/* --- the linear term -------------------------------------------------------------------------- */

void lola_scan_recall(const lola_segment *segment, const lola_span *span, int64_t first, int64_t tokens, int64_t set,
                      const lola_scan_scratch *scratch) {
  const lola_cache *cache = segment->cache;
  const lola_call *call = segment->call;
  const lola_kernels *kernels = segment->kernels;
  int64_t Hq = cache->shape.heads, D = cache->shape.head_dim, Dv = cache->shape.value_dim, F = cache->shape.feature_dim;
  int narrow = cache->shape.dtype != LOLA_FLOAT32;
  for (int64_t h = set * segment->heads; h < (set + 1) * segment->heads; h++) {
    int64_t state = span->row * Hq + h;
    int idle = !cache->folded[state] || call->mixing == LOLA_MIXING_CACHE_ONLY;
    for (int64_t i = 0; i < tokens; i += LOLA_ROWS) {
      int64_t n = tokens - i < LOLA_ROWS ? tokens - i : LOLA_ROWS;
      float *z = segment->z + (span->first_token + first + i) * Hq + h;
      if (idle) {
        for (int64_t j = 0; j < n; j++) z[j * Hq] = 0;
        continue;
      }
      const lola_array *from = cache->stores_features ? &call->q_features : &call->q;
      for (int64_t j = 0; j < n; j++) scratch->rows[j] = lola_at(from, span->array_b, span->array_t + first + i + j, h);
      const float *features = scratch->x;
      if (cache->stores_features) {
        kernels->load_rows(scratch->x, F, scratch->rows, from->dtype, n, F, 1);
        if (narrow) round_row(scratch->x, n * F);
      } else {
        kernels->load_rows(scratch->x, D, scratch->rows, from->dtype, n, D, 1);
        lola_map_rows(kernels, &call->map, 0, h, n, D, F, scratch->x, D, scratch->projection, scratch->recalled, F,
                      narrow);
        features = scratch->recalled;
      }
      kernels->gemm(n, Dv, F, features, F, 1, cache->hidden + state * F * Dv, Dv,
                    segment->recalled + ((span->first_token + first + i) * Hq + h) * Dv, Hq * Dv, 0);
      float *sums = scratch->recalled + LOLA_ROWS * (Dv > F ? Dv : F);
      kernels->dot_rows(n, F, features, F, cache->normalizer + state * F, sums);
      for (int64_t j = 0; j < n; j++) z[j * Hq] = sums[j];
    }
  }
}

/* --- the walk --------------------------------------------------------------------------------- */

void lola_scan_span(const lola_segment *segment, const lola_span *span, int64_t first_part, int64_t part_count,
                    int64_t set, const lola_scan_scratch *scratch) {
  const lola_config *config = &segment->cache->config;
  scan_t scan = begin(segment, span, set, scratch);
  for (int64_t p = first_part; p < first_part + part_count; p++) {
    const lola_part *part = &segment->parts[p];
    int64_t end = part->position + part->tokens;
    scan.entries = NULL;
    for (int64_t position = part->position; position < end;) {
      int64_t chunk = lola_chunk_of(config, position), chunk_end = (chunk + 1) * config->chunk;
      int64_t until = chunk_end < end ? chunk_end : end;
      if (chunk > scan.chunk) update(&scan, chunk, (int32_t)(position - part->position));
      if (!scan.entries) {
        int64_t group = p * segment->cache->sets + set;
        scan.entries = segment->entries + group * segment->entry_capacity;
        scan.entry_count = segment->entry_count + group;
        *scan.entry_count = *scan.count;
        for (int64_t i = 0; i < *scan.count; i++) {
          scan.entries[i] = (lola_entry){scan.slot_source[i], 0, LOLA_ALWAYS};
          scratch->slot_entry[i] = i;
        }
      }
      lola_scan_recall(segment, span, position - span->position, until - position, set, scratch);
      position = until;
    }
  }
}

/* --- commit ----------------------------------------------------------------------------------- */

void lola_commit_sparse(const lola_segment *segment, const lola_span *span, int64_t set) {
  lola_cache *cache = segment->cache;
  int64_t L = cache->config.sparse, group = span->row * cache->sets + set, F = cache->shape.feature_dim;
  size_t key_bytes = (size_t)(cache->shape.head_dim * lola_item_size(cache->shape.dtype));
  size_t value_bytes = (size_t)(cache->shape.value_dim * lola_item_size(cache->shape.dtype));
  lola_dtype dtype = stored_feature_dtype(cache);
  for (int64_t slot = 0; slot < cache->sparse_count[group]; slot++) {
    int64_t source = segment->slot_source[group * L + slot];
    if (source < 0) continue;
    memcpy((char *)cache->sparse_keys + (size_t)(group * L + slot) * key_bytes,
           lola_pair_key(segment, span, set, source), key_bytes);
    memcpy((char *)cache->sparse_values + (size_t)(group * L + slot) * value_bytes,
           lola_pair_value(segment, span, set, source), value_bytes);
    if (!cache->stores_features) continue;
    for (int64_t h = set * segment->heads; h < (set + 1) * segment->heads; h++) {
      int64_t head = span->row * cache->shape.heads + h;
      void *to = (char *)cache->sparse_features + (head * L + slot) * F * lola_item_size(dtype);
      const void *from =
          stored_row(segment, span, source, NULL, 0, cache->window_features, head, F * lola_item_size(dtype));
      if (from) {
        memcpy(to, from, (size_t)(F * lola_item_size(dtype)));
      } else {
        from = lola_at(&segment->call->k_features, span->array_b, span->array_t + source - span->position, h);
        segment->kernels->store_row(to, dtype, from, F);
      }
    }
  }
}

void lola_commit_window(const lola_segment *segment, const lola_span *span, int64_t kv_head) {
  lola_cache *cache = segment->cache;
  const lola_call *call = segment->call;
  const lola_shape *shape = &cache->shape;
  int64_t R = cache->ring, F = shape->feature_dim, r = shape->heads / shape->kv_heads,
          sets = cache->sets / shape->kv_heads;
  size_t key_bytes = (size_t)(shape->head_dim * lola_item_size(shape->dtype));
  size_t value_bytes = (size_t)(shape->value_dim * lola_item_size(shape->dtype));
  lola_dtype dtype = stored_feature_dtype(cache);
  int64_t ring = span->row * shape->kv_heads + kv_head;
  for (int64_t t = span->tokens > R ? span->tokens - R : 0; t < span->tokens; t++) {
    int64_t slot = (span->position + t) % R, at = span->array_t + t;
    memcpy((char *)cache->window_keys + (size_t)(ring * R + slot) * key_bytes,
           lola_at(&call->k, span->array_b, at, kv_head), key_bytes);
    memcpy((char *)cache->window_values + (size_t)(ring * R + slot) * value_bytes,
           lola_at(&call->v, span->array_b, at, kv_head), value_bytes);
    for (int64_t set = kv_head * sets; call->scores.data && set < (kv_head + 1) * sets; set++)
      cache->window_given[(span->row * cache->sets + set) * R + slot] =
          entering_score(segment, span, set, span->position + t);
    for (int64_t h = kv_head * r; cache->stores_features && h < (kv_head + 1) * r; h++)
      segment->kernels->store_row((char *)cache->window_features +
                                      ((span->row * shape->heads + h) * R + slot) * F * lola_item_size(dtype),
                                  dtype, lola_at(&call->k_features, span->array_b, at, h), F);
  }
}
