/* The vector of kernels_impl.h in plain C: one float, for any machine. */
#include <math.h>

#include "core/half.h"

enum { VF_LANES = 1, TILE_ROWS = 4, TILE_VECTORS = 8, DOT_HEADS = 1, FEW_SUMS = 8 };
#define TILE_LAST_ROWS 3 /* TILE_ROWS - 1, for the preprocessor */
typedef float vf;

static inline vf vf_zero(void) { return 0; }
static inline vf vf_set1(float x) { return x; }
static inline vf vf_load(const float *p) { return *p; }
static inline void vf_store(float *p, vf v) { *p = v; }
static inline vf vf_load_tail(const float *p, int64_t n, float fill) { return n ? *p : fill; }
static inline void vf_store_tail(float *p, vf v, int64_t n) {
  if (n) *p = v;
}
static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; } /* rounded twice: a library call otherwise */
static inline vf vf_max(vf a, vf b) { return a > b ? a : b; }
static inline vf vf_min(vf a, vf b) { return a < b ? a : b; }
static inline vf vf_round(vf x) { return nearbyintf(x); }
/* p 2^n for whole n that keep the result normal. */
static inline vf vf_scale2(vf p, vf n) {
  return lola_bits_to_float(lola_float_to_bits(p) + ((uint32_t)(int32_t)n << 23));
}
/* v where x >= limit, else 0. */
static inline vf vf_zero_below(vf v, vf x, float limit) { return x >= limit ? v : 0; }
/* a where x > 0, else b. */
static inline vf vf_if_positive(vf x, vf a, vf b) { return x > 0 ? a : b; }
static inline vf vf_round_bfloat16(vf v) { return lola_from_bfloat16(lola_to_bfloat16(v)); }
static inline vf vf_load_bfloat16(const uint16_t *p) { return lola_from_bfloat16(*p); }
static inline vf vf_load_float16(const uint16_t *p) { return lola_from_float16(*p); }
static inline void vf_store_bfloat16(uint16_t *p, vf v) { *p = lola_to_bfloat16(v); }
static inline void vf_store_float16(uint16_t *p, vf v) { *p = lola_to_float16(v); }
static inline float vf_sum(vf v) { return v; }
/* The sums of four vectors. */
static inline void vf_sum4(float *to, vf a, vf b, vf c, vf d) {
  to[0] = a;
  to[1] = b;
  to[2] = c;
  to[3] = d;
}
static inline float vf_highest(vf v) { return v; }
static inline float vf_lowest(vf v) { return v; }
/* s where from <= position < until, else -inf. */
static inline vf vf_keep_between(vf s, const int32_t *position, int32_t from, int32_t until) {
  return *position >= from && *position < until ? s : -__builtin_inff();
}
