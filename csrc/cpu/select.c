/* select: the pairs with the highest scores stay; a tie keeps the earlier position. */
#include <string.h>

#include "core/half.h"
#include "cpu/steps.h"

uint64_t lola_score_key(float score) {
  if (score != score) return UINT32_MAX;
  uint32_t bits = lola_float_to_bits(score + 0.0f); /* -0 + 0 = +0 */
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The key at place `rank` (0 the lowest) of the chosen ones (all, or those with only[i] set): radix select, a byte at a
 * time from the highest byte in which they differ. `*below` counts the chosen ones under it. */
static uint64_t key_of_rank(int64_t count, const uint64_t *keys, const uint8_t *only, int64_t rank, int64_t *below) {
  uint64_t any = 0, every = ~UINT64_C(0);
  for (int64_t i = 0; i < count; i++) {
    if (only && !only[i]) continue;
    any |= keys[i];
    every &= keys[i];
  }
  uint64_t differ = any ^ every, known = ~UINT64_C(0), prefix = every;
  int shift = 56;
  while (shift > 0 && !(differ >> shift)) shift -= 8;
  if (shift < 56)
    known <<= shift + 8;
  else
    known = 0;
  prefix &= known;
  *below = 0;
  for (; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {0};
    for (int64_t i = 0; i < count; i++)
      if ((!only || only[i]) && (keys[i] & known) == prefix) histogram[keys[i] >> shift & 255]++;
    int byte = 0;
    while (rank >= histogram[byte]) {
      rank -= histogram[byte];
      *below += histogram[byte++];
    }
    prefix |= (uint64_t)byte << shift;
    known |= UINT64_C(255) << shift;
  }
  return prefix;
}

void lola_mark_dropped(int64_t count, const uint64_t *keys, const int64_t *positions, int64_t drops, uint8_t *dropped) {
  if (count <= 0) return;
  memset(dropped, 0, (size_t)count);
  if (drops <= 0) return;
  int64_t below, equal = 0;
  uint64_t threshold = key_of_rank(count, keys, NULL, drops - 1, &below);
  for (int64_t i = 0; i < count; i++) equal += dropped[i] = keys[i] == threshold;
  int64_t ties = drops - below; /* of the equal ones, the latest go */
  uint64_t from = 0;
  if (ties < equal) from = key_of_rank(count, (const uint64_t *)positions, dropped, equal - ties, &below);
  for (int64_t i = 0; i < count; i++)
    dropped[i] = keys[i] < threshold || (keys[i] == threshold && (uint64_t)positions[i] >= from);
}

lola_status lola_cpu_select(const float *scores, const int64_t *count, int64_t B, int64_t S, int64_t Hs, int64_t keep,
                            int64_t *kept, int64_t *dropped, lola_message *message) {
  if (keep > S) keep = S;
  lola_scratch scratch = {0};
  uint64_t *keys = NULL;
  int64_t *positions = NULL;
  uint8_t *marks = NULL;
  for (int pass = 0; pass < 2; pass++) {
    keys = lola_scratch_take(&scratch, S, sizeof *keys);
    positions = lola_scratch_take(&scratch, S, sizeof *positions);
    marks = lola_scratch_take(&scratch, S, 1);
    lola_status status = pass ? LOLA_OK : lola_scratch_open(&scratch, message);
    if (status) return status;
  }
  for (int64_t i = 0; i < S; i++) positions[i] = i;
  for (int64_t b = 0; b < B; b++)
    for (int64_t h = 0; h < Hs; h++) {
      int64_t n = count ? count[b * Hs + h] : S, kept_count = 0, dropped_count = 0;
      for (int64_t i = 0; i < n; i++) keys[i] = lola_score_key(scores[(b * S + i) * Hs + h]);
      lola_mark_dropped(n, keys, positions, n - keep, marks);
      int64_t *k = kept + (b * Hs + h) * keep, *d = dropped + (b * Hs + h) * (S - keep);
      for (int64_t i = 0; i < n; i++) {
        if (marks[i])
          d[dropped_count++] = i;
        else
          k[kept_count++] = i;
      }
      while (kept_count < keep) k[kept_count++] = -1;
      while (dropped_count < S - keep) d[dropped_count++] = -1;
    }
  lola_scratch_close(&scratch);
  return LOLA_OK;
}
