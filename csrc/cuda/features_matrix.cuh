/* The features of 16-bit vectors on the matrix units, for whoever computes them: a pair's have the same bits wherever
 * they are computed, in features.cu for a segment or in scan_update.cuh for a step of decoding.
 *
 * x W with W split into two bfloat16 halves (float16 x too, which is exact), float32 accumulation, the map in float32
 * on the accumulators, one rounding to bfloat16 at the end. Matrices lie in shared memory as scan.cuh says. */
#ifndef LOLA_CUDA_FEATURES_MATRIX_CUH
#define LOLA_CUDA_FEATURES_MATRIX_CUH

#include "cuda/scan.cuh"

namespace {

constexpr float FEATURE_FLOOR = 1e-12f;

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
  const __nv_bfloat162 floor = __float2bfloat162_rn(FEATURE_FLOOR);
  const __nv_bfloat162 pair = __hmax2(__floats2bfloat162_rn(x, y), floor);
  return lola_pack(pair.x, pair.y);
}

/* A head's weights (D, M) transposed into two halves of padded columns. */
template <int COLUMNS>
__device__ void load_weights(const float *w, int D, int M, int pitch, __nv_bfloat16 *hi, __nv_bfloat16 *lo) {
#pragma unroll 4
  for (int i = threadIdx.x; i < COLUMNS * (pitch / 8); i += blockDim.x) {
    const int m = i % COLUMNS, k = i / COLUMNS * 8;
    const float *from = w + static_cast<int64_t>(k) * M + m;
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = m < M && k < D ? __ldg(from + static_cast<int64_t>(j) * M) : 0;
    unsigned h[4], l[4];
#pragma unroll
    for (int j = 0; j < 4; j++) lola_split_pair(x[2 * j], x[2 * j + 1], &h[j], &l[j]);
    const int at = lola_swizzled(lola_column_row(m), k, pitch);
    *reinterpret_cast<uint4 *>(hi + at) = make_uint4(h[0], h[1], h[2], h[3]);
    *reinterpret_cast<uint4 *>(lo + at) = make_uint4(l[0], l[1], l[2], l[3]);
  }
}

/* A warp's ROWS of x times the weights, PRODUCTS * 8 columns at most. `at` says where elements k .. k + 7 of a row of x
 * lie in shared memory. */
template <typename T, int ROWS, int PRODUCTS, class At>
__device__ __forceinline__ void project(At at, const __nv_bfloat16 *hi, const __nv_bfloat16 *lo, int D, int M,
                                        int pitch, float (&acc)[ROWS / 16][PRODUCTS][4]) {
  constexpr bool HALF = __is_same(T, __half);
  /* Left: matrices (rows 0-7, piece 0), (8-15, 0), (0-7, 1), (8-15, 1); right: (rows 0-7, 0), (0-7, 1), (8-15, 0), ..
   */
  const int lane = threadIdx.x % 32, r = lane % 8, matrix = lane / 8;
  const int left_row = r + (matrix & 1) * 8, right_row = r + (matrix >> 1) * 8;
#pragma unroll
  for (int m = 0; m < ROWS / 16; m++)
#pragma unroll
    for (int n = 0; n < PRODUCTS; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[m][n][e] = 0;
#pragma unroll(HALF ? 1 : 2)
  for (int k = 0; k < D; k += 16) {
    unsigned a[ROWS / 16][4], rest[ROWS / 16][4];
#pragma unroll
    for (int m = 0; m < ROWS / 16; m++) {
      lola_load_rows(a[m], at(16 * m + left_row, k + (matrix >> 1) * 8));
      if constexpr (HALF) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 pair = lola_widen<__half>(a[m][e]);
          lola_split_pair(pair.x, pair.y, &a[m][e], &rest[m][e]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < PRODUCTS; n += 2) {
      if (32 * (n / 4) >= M) break;
      const int place = lola_swizzled(8 * n + right_row, k + (matrix & 1) * 8, pitch);
      unsigned high[4], low[4];
      lola_load_rows(high, hi + place);
      lola_load_rows(low, lo + place);
#pragma unroll
      for (int m = 0; m < ROWS / 16; m++)
#pragma unroll
        for (int two = 0; two < 2; two++) {
          float(&sum)[4] = acc[m][n + two];
          lola_mma(sum, a[m][0], a[m][1], a[m][2], a[m][3], high[2 * two], high[2 * two + 1]);
          if constexpr (HALF)
            lola_mma(sum, rest[m][0], rest[m][1], rest[m][2], rest[m][3], high[2 * two], high[2 * two + 1]);
        }
#pragma unroll
      for (int m = 0; m < ROWS / 16; m++)
#pragma unroll
        for (int two = 0; two < 2; two++)
          lola_mma(acc[m][n + two], a[m][0], a[m][1], a[m][2], a[m][3], low[2 * two], low[2 * two + 1]);
    }
  }
}

/* phi of one row whose projection lies in `acc`, 32 columns to each 4 products; `half` picks the fragment's rows, and
 * c = lane % 4. `store` takes 8 neighbouring features, rounded, and which is the first. */
template <int PRODUCTS, class Store>
__device__ __forceinline__ void finish_row(lola_map_kind kind, const float (&acc)[PRODUCTS][4], const int half, int M,
                                           int c, Store store) {
  unsigned y[4];
  if (kind == LOLA_MAP_RELU) {
#pragma unroll
    for (int q = 0; q < PRODUCTS / 4; q++) {
      const int column = 32 * q + 8 * c;
#pragma unroll
      for (int i = 0; i < 4; i++) y[i] = finish_pair(acc[4 * q + i][2 * half], acc[4 * q + i][2 * half + 1]);
      if (column < M) store(column, y);
    }
    return;
  }
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
      for (int i = 0; i < 2; i++) e[2 * n + i] = lola_power_of_two(fmaf(acc[n][2 * half + i], factor, -base));
      if (32 * (n / 4) + 8 * c < M) sum += e[2 * n] + e[2 * n + 1];
    }
    sum = quad_sum(sum);
    const float scale = kind == LOLA_MAP_HEDGEHOG ? lola_reciprocal(sum) : 1;
#pragma unroll
    for (int q = 0; q < PRODUCTS / 4; q++) {
      const int column = 32 * q + 8 * c;
#pragma unroll
      for (int i = 0; i < 4; i++) y[i] = finish_pair(e[8 * q + 2 * i] * scale, e[8 * q + 2 * i + 1] * scale);
      if (column < M) store(sign * M + column, y);
    }
  }
}

} // namespace

#endif
