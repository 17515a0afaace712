/* The vector of kernels_impl.h on AArch64: 4 floats. */
#include <arm_neon.h>

#include "core/half.h"

enum { VF_LANES = 4, TILE_ROWS = 6, TILE_VECTORS = 4, DOT_HEADS = 4, FEW_SUMS = 16 };
#define TILE_LAST_ROWS 5 /* TILE_ROWS - 1, for the preprocessor */
typedef float32x4_t vf;

static inline vf vf_zero(void) { return vdupq_n_f32(0); }
static inline vf vf_set1(float x) { return vdupq_n_f32(x); }
static inline vf vf_load(const float *p) { return vld1q_f32(p); }
static inline void vf_store(float *p, vf v) { vst1q_f32(p, v); }
static inline vf vf_load_tail(const float *p, int64_t n, float fill) {
  float lanes[4] = {fill, fill, fill, fill};
  for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
  return vld1q_f32(lanes);
}
static inline void vf_store_tail(float *p, vf v, int64_t n) {
  float lanes[4];
  vst1q_f32(lanes, v);
  for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
}
static inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf vf_max(vf a, vf b) { return vmaxq_f32(a, b); }
static inline vf vf_min(vf a, vf b) { return vminq_f32(a, b); }
static inline vf vf_round(vf x) { return vrndnq_f32(x); }
/* p 2^n for whole n that keep the result normal. */
static inline vf vf_scale2(vf p, vf n) {
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vcvtnq_s32_f32(n), 23)));
}
/* v where x >= limit, else 0. */
static inline vf vf_zero_below(vf v, vf x, float limit) {
  return vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(x, vdupq_n_f32(limit)), vreinterpretq_u32_f32(v)));
}
/* a where x > 0, else b. */
static inline vf vf_if_positive(vf x, vf a, vf b) { return vbslq_f32(vcgtq_f32(x, vdupq_n_f32(0)), a, b); }
static inline uint32x4_t rounded_bits(vf v) {
  uint32x4_t bits = vreinterpretq_u32_f32(v);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(v, v), up, vorrq_u32(bits, vdupq_n_u32(0x400000)));
}
static inline vf vf_round_bfloat16(vf v) {
  return vreinterpretq_f32_u32(vandq_u32(rounded_bits(v), vdupq_n_u32(0xffff0000u)));
}
static inline vf vf_load_bfloat16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline vf vf_load_float16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void vf_store_bfloat16(uint16_t *p, vf v) { vst1_u16(p, vshrn_n_u32(rounded_bits(v), 16)); }
static inline void vf_store_float16(uint16_t *p, vf v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
static inline float vf_sum(vf v) { return vaddvq_f32(v); }
/* The sums of four vectors. */
static inline void vf_sum4(float *to, vf a, vf b, vf c, vf d) {
  vst1q_f32(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}
static inline float vf_highest(vf v) { return vmaxvq_f32(v); }
static inline float vf_lowest(vf v) { return vminvq_f32(v); }
/* s where from <= position < until, else -inf. */
static inline vf vf_keep_between(vf s, const int32_t *position, int32_t from, int32_t until) {
  int32x4_t at = vld1q_s32(position);
  uint32x4_t keep = vandq_u32(vcgeq_s32(at, vdupq_n_s32(from)), vcltq_s32(at, vdupq_n_s32(until)));
  return vbslq_f32(keep, s, vdupq_n_f32(-__builtin_inff()));
}
