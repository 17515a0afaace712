/* A segment: the tokens of one call that are worked on at a time, so that scratch does not grow with length.
 *
 * Phase 1 (scan.c) walks the chunks of each (row, head set) in order: score, select, fold, and what later queries
 * need of it goes into the segment: the pairs that each block of queries sees, and phi(q)^T H. Phase 2 (attention.c)
 * computes all blocks at once from those records. Then the new pairs are committed to the cache. Decoding
 * (decode.c) runs the same update for one token and reads the cache itself. */
#ifndef LOLA_CPU_SEGMENT_H
#define LOLA_CPU_SEGMENT_H

#include "cpu/steps.h"

/* One row's tokens in the segment. */
typedef struct lola_span {
  int64_t row;              /* of the cache */
  int64_t array_b, array_t; /* its first token in the call's arrays */
  int64_t position, tokens; /* of the first token; how many */
  int64_t first_token;      /* in the segment's linear terms */
} lola_span;

/* One block of queries of a span. */
typedef struct lola_part {
  const lola_span *span;
  int64_t position, tokens;
} lola_part;

/* A sparse pair that a block of queries sees from offset `from` until offset `until` in the block.
 * source >= 0: the position of a pair that is in the window ring or among the span's tokens; source < 0: sparse slot
 * -source - 1 as it was when the segment began. */
typedef struct lola_entry {
  int64_t source;
  int32_t from, until;
} lola_entry;

typedef struct lola_scan_scratch {
  float *features, *values; /* of sparse slots, then of the pairs that leave: (heads, L + C, F), (L + C, Dv) */
  float *fold_features, *fold_values; /* (heads, C, F), (C, Dv) */
  float *x, *projection, *recalled;   /* LOLA_ROWS rows */
  float *scores;                      /* (L + C,) */
  int64_t *sources, *positions, *slot_entry;
  uint64_t *keys;
  uint8_t *dropped;
  const void **rows;
} lola_scan_scratch;

typedef struct lola_segment {
  const lola_kernels *kernels;
  lola_cache *cache;
  const lola_call *call;
  int64_t heads; /* query heads per set */
  lola_span *spans;
  int64_t span_count;
  lola_part *parts;
  int64_t part_count;
  int64_t entry_capacity;
  lola_entry *entries;  /* (parts, S, entry_capacity) */
  int64_t *entry_count; /* (parts, S) */
  float *recalled, *z;  /* N (tokens, Hq, Dv) and z (tokens, Hq); z = 0 where nothing is folded, N then unset */
  int64_t *slot_source; /* (B, S, L): what each sparse slot holds now */
} lola_segment;

void lola_scan_scratch_take(lola_scratch *scratch, lola_scan_scratch *pieces, const lola_cache *cache,
                            const lola_feature_map *map);
/* Phase 1 of a whole span for one head set; parts are the span's first and number of parts. */
void lola_scan_span(const lola_segment *segment, const lola_span *span, int64_t first_part, int64_t part_count,
                    int64_t set, const lola_scan_scratch *scratch);
/* The update at the start of `chunk` alone, for decoding. */
void lola_scan_update(const lola_segment *segment, const lola_span *span, int64_t chunk, int64_t set,
                      const lola_scan_scratch *scratch);
/* phi(q)^T H and phi(q)^T s of tokens first .. first+tokens-1 of the span for the set's heads. */
void lola_scan_recall(const lola_segment *segment, const lola_span *span, int64_t first, int64_t tokens, int64_t set,
                      const lola_scan_scratch *scratch);
/* Moves pairs that entered the sparse cache into their slots. */
void lola_commit_sparse(const lola_segment *segment, const lola_span *span, int64_t set);
/* Writes the span's tokens into the window ring of one KV head (of its sets for given scores, its heads for features).
 */
void lola_commit_window(const lola_segment *segment, const lola_span *span, int64_t kv_head);

/* A pair's key, value, in the cache's dtype. */
const void *lola_pair_key(const lola_segment *segment, const lola_span *span, int64_t set, int64_t source);
const void *lola_pair_value(const lola_segment *segment, const lola_span *span, int64_t set, int64_t source);

static inline int64_t lola_set_kv_head(const lola_cache *cache, int64_t set) {
  return set / (cache->sets / cache->shape.kv_heads);
}

/* All rows' single tokens (counts 0 or 1). Widths and scratch are the caller's. */
typedef struct lola_decode_scratch {
  lola_scan_scratch scan;
  float *q, *s, *o, *m, *l, *x;
} lola_decode_scratch;
void lola_decode_scratch_take(lola_scratch *scratch, lola_decode_scratch *pieces, const lola_cache *cache,
                              const lola_feature_map *map);
void lola_decode_token(const lola_segment *segment, const lola_span *span, int64_t kv_head,
                       const lola_decode_scratch *scratch);

#endif
