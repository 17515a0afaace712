/* The time line, written once for every backend.
 *
 * Chunk n holds positions nC .. nC+C-1. A query of chunk n sees the window max(0, nC-W) .. t, the sparse cache G_n
 * and the hidden state H_n. When the first token of chunk n arrives, positions nC-W-C .. nC-W-1 leave the window. */
#ifndef LOLA_CORE_SCHEDULE_H
#define LOLA_CORE_SCHEDULE_H

#include "lola/lola.h"

static inline int64_t lola_chunk_of(const lola_config *config, int64_t position) { return position / config->chunk; }

/* First position in the window of a query of chunk `chunk`. */
static inline int64_t lola_window_first(const lola_config *config, int64_t chunk) {
  int64_t first = chunk * config->chunk - config->window;
  return first > 0 ? first : 0;
}

/* First of the C positions that leave when chunk `chunk` begins; negative: none leave. */
static inline int64_t lola_leaving_first(const lola_config *config, int64_t chunk) {
  return chunk * config->chunk - config->window - config->chunk;
}

/* A window pair is seen by queries from its own position up to, not including, the position returned here. */
static inline int64_t lola_window_until(const lola_config *config, int64_t position) {
  return (position + config->window) / config->chunk * config->chunk + config->chunk;
}

/* Attention is computed in blocks of about 64 queries that keep to the chunk grid: parts of one chunk where chunks are
 * long, several whole chunks where they are short. Returns where the block that holds `position` ends. */
enum { LOLA_BLOCK = 64 };

static inline int64_t lola_block_end(const lola_config *config, int64_t position) {
  int64_t chunk = config->chunk;
  if (chunk >= LOLA_BLOCK) {
    int64_t start = position / chunk * chunk;
    int64_t end = start + ((position - start) / LOLA_BLOCK + 1) * LOLA_BLOCK;
    return end < start + chunk ? end : start + chunk;
  }
  int64_t block = LOLA_BLOCK / chunk * chunk;
  return (position / block + 1) * block;
}

/* The hash behind score "random": a value in [0, 1), the same on every backend. */
static inline uint64_t lola_scramble(uint64_t x) {
  x += UINT64_C(0x9E3779B97F4A7C15);
  x = (x ^ (x >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  x = (x ^ (x >> 27)) * UINT64_C(0x94D049BB133111EB);
  return x ^ (x >> 31);
}

static inline float lola_random_score(uint64_t seed, int64_t row_id, int64_t head, int64_t position) {
  uint64_t h = lola_scramble(seed);
  h = lola_scramble(h ^ (uint64_t)row_id);
  h = lola_scramble(h ^ (uint64_t)head);
  h = lola_scramble(h ^ (uint64_t)position);
  return (float)(h >> 40) * 0x1p-24f;
}

#endif
