/* What makes a feature of a projection, for all who compute phi(q) in decoding. */
#ifndef LOLA_CUDA_DECODE_FEATURES_CUH
#define LOLA_CUDA_DECODE_FEATURES_CUH

#include "decode.cuh"

namespace {

__device__ __forceinline__ float finish_feature(float x, float floor, bool round) {
  x = fmaxf(x, floor);
  return round ? __bfloat162float(__float2bfloat16_rn(x)) : x;
}

/* --- Hedgehog's 128 features of vectors of 128, the same as `project` and `exponentials` of decode_queries.cuh make */

constexpr int WIDE_F = 128, WIDE_M = WIDE_F / 2; /* features, columns of the projection */
constexpr int WIDE_PARTS = 8;                    /* that a column's sum has: of d = part, part + 8, ... */

/* Floats as integers in the same order, and back. */
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float of_ordered(int x) { return __int_as_float(x ^ (x >> 31 & 0x7fffffff)); }

/* phi(q) of one sign: features lane and lane + 32 of exp(x - highest), or of exp(lowest - x), by a warp from the
 * WIDE_PARTS parts of x = q W. */
__device__ __forceinline__ void wide_features(const float *parts, bool negative, bool normalise, float (&phi)[2]) {
  const int lane = threadIdx.x % 32;
  const float sign = negative ? -1 : 1;
  const float x[2] = {sign * add_groups(parts + lane, WIDE_PARTS, WIDE_M),
                      sign * add_groups(parts + lane + 32, WIDE_PARTS, WIDE_M)};
  const float high = of_ordered(__reduce_max_sync(ALL, ordered(fmaxf(x[0], x[1]))));
  const float up[2] = {expf(x[0] - high), expf(x[1] - high)};
  const float sum = warp_sum(up[0] + up[1]), scale = normalise ? 1 / sum : 1;
#pragma unroll
  for (int i = 0; i < 2; i++) phi[i] = finish_feature(up[i] * scale, LOLA_FEATURE_FLOOR, true);
}

} // namespace

#endif
