/* Decoding: one token per row against the cache as it lies in memory. Keys and values are read once, in order, for all
 * heads that share them; the floor is the bytes of window, sparse cache and hidden state. */
#include <math.h>
#include <string.h>

#include "cpu/segment.h"

enum { KEYS = 256 };
static const float LOG2E = 0x1.715476p+0f;

void lola_decode_scratch_take(lola_scratch *scratch, lola_decode_scratch *pieces, const lola_cache *cache,
                              const lola_feature_map *map) {
  int64_t r = cache->shape.heads / cache->shape.kv_heads, D = cache->shape.head_dim, Dv = cache->shape.value_dim;
  lola_scan_scratch_take(scratch, &pieces->scan, cache, map);
  pieces->q = lola_scratch_take(scratch, r * D, sizeof(float));
  pieces->s = lola_scratch_take(scratch, r * KEYS, sizeof(float));
  pieces->o = lola_scratch_take(scratch, r * Dv, sizeof(float));
  pieces->m = lola_scratch_take(scratch, r, sizeof(float));
  pieces->l = lola_scratch_take(scratch, r, sizeof(float));
  pieces->x = lola_scratch_take(scratch, Dv, sizeof(float));
}

/* Asks for the beginning of what is read later; the kernels ask for the rest as they go. */
static void ask_for(const void *from, int64_t bytes) {
  enum { START = 4096 };
  for (int64_t at = 0; at < bytes && at < START; at += 64) __builtin_prefetch((const char *)from + at, 0, 2);
}

/* Softmax terms of `count` pairs that lie one after the other, for heads first .. first+heads-1 of the group. */
static void attend_run(const lola_segment *segment, const lola_decode_scratch *scratch, int64_t first, int64_t heads,
                       const void *k, const void *v, int64_t count) {
  const lola_kernels *kernels = segment->kernels;
  const lola_shape *shape = &segment->cache->shape;
  int64_t D = shape->head_dim, Dv = shape->value_dim, size = lola_item_size(shape->dtype);
  float *o = scratch->o + first * Dv;
  for (int64_t at = 0; at < count; at += KEYS) {
    int64_t n = count - at < KEYS ? count - at : KEYS;
    const void *values = (const char *)v + at * Dv * size;
    kernels->dot_keys(heads, n, D, scratch->q + first * D, D, (const char *)k + at * D * size, shape->dtype, D,
                      scratch->s, KEYS);
    for (int64_t h = 0; h < heads; h++) {
      float alpha = kernels->softmax_row(n, scratch->s + h * KEYS, scratch->m + first + h, scratch->l + first + h);
      kernels->scale_rows(1, Dv, o + h * Dv, Dv, &alpha);
    }
    kernels->add_values(heads, n, Dv, scratch->s, KEYS, values, shape->dtype, Dv, o, Dv);
  }
}

/* What the token reads after the window's keys, which begin at `slot`. */
static void ask_for_starts(const lola_segment *segment, const lola_span *span, int64_t kv_head, int64_t slot) {
  const lola_cache *cache = segment->cache;
  const lola_shape *shape = &cache->shape;
  const lola_feature_map *map = &segment->call->map;
  int64_t D = shape->head_dim, Dv = shape->value_dim, F = shape->feature_dim, L = cache->config.sparse, R = cache->ring;
  int64_t size = lola_item_size(shape->dtype), head = kv_head * (shape->heads / shape->kv_heads);
  int64_t ring = span->row * shape->kv_heads + kv_head, state = span->row * shape->heads + head;
  int64_t group = span->row * cache->sets + kv_head * (cache->sets / shape->kv_heads);
  int64_t pairs = cache->sparse_count[group], columns = lola_map_columns(map, 0, F);
  ask_for((const char *)cache->window_values + (ring * R + slot) * Dv * size, (R - slot) * Dv * size);
  ask_for((const char *)cache->sparse_keys + group * L * D * size, pairs * D * size);
  ask_for((const char *)cache->sparse_values + group * L * Dv * size, pairs * Dv * size);
  if (!cache->folded[state] || segment->call->mixing == LOLA_MIXING_CACHE_ONLY) return;
  if (columns && !cache->stores_features) ask_for(map->w_q + head * D * columns, D * columns * 4);
  ask_for(cache->hidden + state * F * Dv, F * Dv * 4);
}

void lola_decode_token(const lola_segment *segment, const lola_span *span, int64_t kv_head,
                       const lola_decode_scratch *scratch) {
  lola_cache *cache = segment->cache;
  const lola_call *call = segment->call;
  const lola_kernels *kernels = segment->kernels;
  const lola_shape *shape = &cache->shape;
  int64_t D = shape->head_dim, Dv = shape->value_dim, L = cache->config.sparse, R = cache->ring;
  int64_t size = lola_item_size(shape->dtype), r = shape->heads / shape->kv_heads, sets = cache->sets / shape->kv_heads;
  int64_t chunk = lola_chunk_of(&cache->config, span->position);
  for (int64_t set = kv_head * sets; set < (kv_head + 1) * sets; set++) {
    if (chunk <= cache->chunks[span->row]) continue;
    lola_scan_update(segment, span, chunk, set, &scratch->scan);
    lola_commit_sparse(segment, span, set);
  }
  lola_commit_window(segment, span, kv_head);
  ask_for_starts(segment, span, kv_head, lola_window_first(&cache->config, chunk) % R);

  for (int64_t h = 0; h < r; h++) {
    const void *q = lola_at(&call->q, span->array_b, span->array_t, kv_head * r + h);
    kernels->load_rows(scratch->q + h * D, D, &q, call->q.dtype, 1, D, call->scale * LOG2E);
    scratch->m[h] = -INFINITY;
    scratch->l[h] = 0;
  }
  memset(scratch->o, 0, (size_t)(r * Dv) * sizeof(float));
  /* The window lies in the ring in at most two runs. */
  const char *keys = (const char *)cache->window_keys + (span->row * shape->kv_heads + kv_head) * R * D * size;
  const char *values = (const char *)cache->window_values + (span->row * shape->kv_heads + kv_head) * R * Dv * size;
  for (int64_t p = lola_window_first(&cache->config, chunk); p <= span->position;) {
    int64_t slot = p % R, n = span->position + 1 - p < R - slot ? span->position + 1 - p : R - slot;
    attend_run(segment, scratch, 0, r, keys + slot * D * size, values + slot * Dv * size, n);
    p += n;
  }
  for (int64_t i = 0; i < sets; i++) {
    int64_t group = span->row * cache->sets + kv_head * sets + i;
    attend_run(segment, scratch, i * segment->heads, segment->heads,
               (const char *)cache->sparse_keys + group * L * D * size,
               (const char *)cache->sparse_values + group * L * Dv * size, cache->sparse_count[group]);
    lola_scan_recall(segment, span, 0, 1, kv_head * sets + i, &scratch->scan);
  }
  for (int64_t h = 0; h < r; h++) {
    int64_t head = kv_head * r + h, at = span->first_token * shape->heads + head;
    lola_weights w =
        lola_mix(call->mixing, call->gate ? call->gate[head] : 0, scratch->m[h], scratch->l[h], segment->z[at]);
    kernels->mix_row(Dv, scratch->x, w.softmax, scratch->o + h * Dv, w.linear,
                     w.linear != 0 ? segment->recalled + at * Dv : NULL);
    kernels->store_row(lola_at(&call->out, span->array_b, span->array_t, head), call->out.dtype, scratch->x, Dv);
    if (call->share.data) *(float *)lola_at(&call->share, span->array_b, span->array_t, head) = w.share;
  }
}
