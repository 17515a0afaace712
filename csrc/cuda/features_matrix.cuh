/* The features of 16-bit vectors on the matrix units, for whoever computes them: a pair's have the same bits wherever
 * they are computed, in features.cu for a segment or in scan_update.cuh for a step of decoding.
 *
 * x W with W split into two bfloat16 halves (float16 x too, which is exact), float32 accumulation, the map in float32
 * on the accumulators, one rounding to bfloat16 at the end. Matrices lie in shared memory as scan.cuh says. */
#ifndef LOLA_CUDA_FEATURES_MATRIX_CUH
#define LOLA_CUDA_FEATURES_MATRIX_CUH

#include "cuda/scan.cuh"

namespace {

__device__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* Two features, clamped and rounded; in this order, which gives the same as the other for less. */
__device__ __forceinline__ unsigned finish_pair(float x, float y) {
  const __nv_bfloat162 floor = __float2bfloat162_rn(LOLA_FEATURE_FLOOR);
  const __nv_bfloat162 pair = __hmax2(__floats2bfloat162_rn(x, y), floor);
  return lola_pack(pair.x, pair.y);
}

/* phi of one row whose projection lies in `acc`, 32 columns to each 4 products; `half` picks the fragment's rows, and
 * c = lane % 4. Where the row is `needed`, `store` takes 8 neighbouring features, rounded, and which is the first. Of
 * Hedgehog's maps: */
template <int PRODUCTS, class Store>
__device__ __forceinline__ void finish_hedgehog_row(lola_map_kind kind, const float (&acc)[PRODUCTS][4], const int half,
                                                    int M, int c, bool needed, Store store) {
  unsigned y[4];
  float high = -INFINITY, low = INFINITY;
#pragma unroll
  for (int n = 0; n < PRODUCTS; n++) {
    if (32 * (n / 4) + 8 * c < M) {
      high = fmaxf(high, fmaxf(acc[n][2 * half], acc[n][2 * half + 1]));
      low = fminf(low, fminf(acc[n][2 * half], acc[n][2 * half + 1]));
    }
  }
  const float shift[2] = {quad_max(high), -quad_max(-low)};
#pragma unroll
  for (int sign = 0; sign < 2; sign++) {
    constexpr float LOG2E = 1.44269504f;
    const float factor = sign ? -LOG2E : LOG2E, base = __fmul_rn(shift[sign], factor);
    float e[PRODUCTS * 2], sum = 0;
#pragma unroll
    for (int n = 0; n < PRODUCTS; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) e[2 * n + i] = power_of_two(fmaf(acc[n][2 * half + i], factor, -base));
      if (32 * (n / 4) + 8 * c < M) sum += e[2 * n] + e[2 * n + 1];
    }
    sum = quad_sum(sum);
    const float scale = kind == LOLA_MAP_HEDGEHOG ? lola_reciprocal(sum) : 1;
#pragma unroll
    for (int q = 0; q < PRODUCTS / 4; q++) {
      const int column = 32 * q + 8 * c;
#pragma unroll
      for (int i = 0; i < 4; i++) y[i] = finish_pair(e[8 * q + 2 * i] * scale, e[8 * q + 2 * i + 1] * scale);
      if (needed && column < M) store(sign * M + column, y);
    }
  }
}

/* Of any map. */
template <int PRODUCTS, class Store>
__device__ __forceinline__ void finish_row(lola_map_kind kind, const float (&acc)[PRODUCTS][4], const int half, int M,
                                           int c, bool needed, Store store) {
  if (kind != LOLA_MAP_RELU) {
    finish_hedgehog_row(kind, acc, half, M, c, needed, store);
    return;
  }
#pragma unroll
  for (int q = 0; q < PRODUCTS / 4; q++) {
    const int column = 32 * q + 8 * c;
    unsigned y[4];
#pragma unroll
    for (int i = 0; i < 4; i++) y[i] = finish_pair(acc[4 * q + i][2 * half], acc[4 * q + i][2 * half + 1]);
    if (needed && column < M) store(column, y);
  }
}

} // namespace

#endif
