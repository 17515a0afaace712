/* The vector of kernels_impl.h on AVX-512 (F, BW, DQ, VL) with FMA: 16 floats. */
#include <immintrin.h>

#include "core/half.h"

enum { VF_LANES = 16, TILE_ROWS = 6, TILE_VECTORS = 4, DOT_HEADS = 4, FEW_SUMS = 16 };
#define TILE_LAST_ROWS 5 /* TILE_ROWS - 1, for the preprocessor */
typedef __m512 vf;

static inline vf vf_zero(void) { return _mm512_setzero_ps(); }
static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
static inline __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }
static inline vf vf_load_tail(const float *p, int64_t n, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p);
}
static inline void vf_store_tail(float *p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* p 2^n for whole n that keep the result normal. */
static inline vf vf_scale2(vf p, vf n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
}
/* v where x >= limit, else 0. */
static inline vf vf_zero_below(vf v, vf x, float limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_GE_OQ), v);
}
/* a where x > 0, else b. */
static inline vf vf_if_positive(vf x, vf a, vf b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), b, a);
}
static inline __m512i rounded_bits(vf v) {
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
}
static inline vf vf_round_bfloat16(vf v) {
  return _mm512_castsi512_ps(_mm512_and_si512(rounded_bits(v), _mm512_set1_epi32((int)0xffff0000u)));
}
static inline vf vf_load_bfloat16(const uint16_t *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline vf vf_load_float16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void vf_store_bfloat16(uint16_t *p, vf v) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(v), 16)));
}
static inline void vf_store_float16(uint16_t *p, vf v) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline float vf_sum(vf v) { return _mm512_reduce_add_ps(v); }
/* The sums of four vectors. */
static inline void vf_sum4(float *to, vf a, vf b, vf c, vf d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline float vf_highest(vf v) { return _mm512_reduce_max_ps(v); }
static inline float vf_lowest(vf v) { return _mm512_reduce_min_ps(v); }
/* s where from <= position < until, else -inf. */
static inline vf vf_keep_between(vf s, const int32_t *position, int32_t from, int32_t until) {
  __m512i at = _mm512_loadu_si512(position);
  __mmask16 keep = _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(from));
  keep = _mm512_mask_cmplt_epi32_mask(keep, at, _mm512_set1_epi32(until));
  return _mm512_mask_blend_ps(keep, _mm512_set1_ps(-__builtin_inff()), s);
}
