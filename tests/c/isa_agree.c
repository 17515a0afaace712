/* Every instruction set of this machine computes what the first one does: prefill, then token by token, in each dtype.
 * It needs no Python, so a cross compiler and an emulator can run it for a machine that is not at hand. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "core/half.h"
#include "lola/lola.h"

enum { B = 2, T = 300, PREFILL = 200, HQ = 4, HKV = 2, D = 37, DV = 29, F = 26 };

static uint32_t state = 1;

static float draw(void) { /* roughly normal */
  float sum = 0;
  for (int i = 0; i < 4; i++) {
    state = state * 1664525u + 1013904223u;
    sum += (float)(state >> 8) * 0x1p-24f - 0.5f;
  }
  return sum * 1.7f;
}

static void *drawn(size_t count, lola_dtype dtype, float scale) {
  void *array = malloc(count * 4);
  if (!array) exit(2);
  for (size_t i = 0; i < count; i++) {
    float x = draw() * scale;
    if (dtype == LOLA_FLOAT32) ((float *)array)[i] = x;
    if (dtype == LOLA_FLOAT16) ((uint16_t *)array)[i] = lola_to_float16(x);
    if (dtype == LOLA_BFLOAT16) ((uint16_t *)array)[i] = lola_to_bfloat16(x);
  }
  return array;
}

static void expect(lola_status status, const lola_message *message) {
  if (!status) return;
  printf("FAILED: %s\n", message->text);
  exit(1);
}

int main(void) {
  lola_message message;
  int failures = 0, count = lola_cpu_isa_count();
  float gate[HQ] = {0.1f, 0.2f, 0.3f, 0.4f};
  for (lola_dtype dtype = LOLA_FLOAT32; dtype <= LOLA_BFLOAT16; dtype++) {
    float *q = drawn(B * T * HQ * D, LOLA_FLOAT32, 1), *w = drawn(HQ * D * F, LOLA_FLOAT32, 0.3f);
    void *k = drawn(B * T * HKV * D, dtype, 1), *v = drawn(B * T * HKV * DV, dtype, 1);
    float *first = NULL;
    for (int i = 0; i < count; i++) {
      expect(lola_cpu_set_isa(lola_cpu_isa_name(i), &message), &message);
      lola_config config = {
          .window = 32, .chunk = 16, .sparse = 40, .score = LOLA_SCORE_SELF_RECALL, .sparse_per = LOLA_PER_KV_HEAD};
      lola_shape shape = {B, HQ, HKV, D, DV, F, dtype};
      lola_cache *cache;
      expect(lola_cache_create(&config, &shape, NULL, &cache, &message), &message);
      float *out = malloc(sizeof(float) * B * T * HQ * DV);
      if (!out) return 2;
      for (int64_t t = 0, n; t < T; t += n) {
        n = t < PREFILL ? PREFILL : 1;
        lola_row rows[B] = {{0, t, n}, {1, t, n}};
        lola_call call = {.q = {q, LOLA_FLOAT32, T * HQ * D, HQ * D, D},
                          .k = {k, dtype, T * HKV * D, HKV * D, D},
                          .v = {v, dtype, T * HKV * DV, HKV * DV, DV},
                          .out = {out, LOLA_FLOAT32, T * HQ * DV, HQ * DV, DV},
                          .rows = rows,
                          .map = {LOLA_MAP_HEDGEHOG, w, w},
                          .gate = gate,
                          .mixing = LOLA_MIXING_GATED,
                          .scale = 0.16f,
                          .check_finite = 1};
        expect(lola_cpu_attention(cache, &call, &message), &message);
      }
      expect(lola_cache_check(cache, &message), &message);
      lola_cache_destroy(cache);
      if (!first) first = out;
      double most = 0, squares = 0;
      for (size_t j = 0; j < (size_t)B * T * HQ * DV; j++) {
        most = fmax(most, fabs((double)out[j] - first[j]));
        squares += (double)first[j] * first[j];
      }
      /* Features are rounded to bfloat16 beside 16-bit keys, so a last bit may tip them over. */
      double error = most / sqrt(squares / (B * T * HQ * DV)), bound = dtype == LOLA_FLOAT32 ? 2e-5 : 2e-3;
      int agrees = error <= bound; /* false for NaN too */
      failures += !agrees;
      printf("dtype %d %-7s differs from %s by %.1e of the rms%s\n", (int)dtype, lola_cpu_isa(), lola_cpu_isa_name(0),
             error, agrees ? "" : ": FAILED");
      if (out != first) free(out);
    }
    free(first);
    free(q);
    free(w);
    free(k);
    free(v);
  }
  return failures != 0;
}
