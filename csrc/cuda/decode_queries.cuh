/* phi(q) of every (row, query head) and the rows' spans, before anything else of a decoding step.
 *
 * A block takes one head and up to ROWS rows, so that a large batch reads the feature map's weights (D x M float32,
 * from L2) once for several rows. Sums are in an order that is fixed by the sizes alone: a row's features have the same
 * bits in any batch. */
#ifndef LOLA_CUDA_DECODE_QUERIES_CUH
#define LOLA_CUDA_DECODE_QUERIES_CUH

#include "chain.cuh"
#include "decode.cuh"
#include "plan.cuh"

namespace {

constexpr int ROWS_AHEAD = 16; /* rows of the weights that one thread has under way */
constexpr int MANY_ROWS = 8;   /* rows of a block, where there are many */
constexpr float FEATURE_FLOOR = 1e-12f;

struct query_plan {
  int blocks;                      /* of rows, per head */
  int span_blocks;                 /* that write spans; then come those of head 0, 1, ... */
  int weight_vector, weight_shift; /* floats of the weights that a thread loads at once; threads of a row, base 2 */
  int x_at, phi_at;                /* shared memory, offsets in floats; at 0 the sums of groups of threads */
  int64_t parts;                   /* floats of those, for one row */
};

__host__ __device__ __forceinline__ bool is_hedgehog(const lola_feature_map &map) {
  return map.kind == LOLA_MAP_HEDGEHOG || map.kind == LOLA_MAP_HEDGEHOG_EXP;
}

__host__ __device__ __forceinline__ bool has_weights(const lola_feature_map &map) {
  return is_hedgehog(map) || (map.kind == LOLA_MAP_RELU && map.w_q);
}

__device__ __forceinline__ float finish_feature(float x, float floor, bool round) {
  x = fmaxf(x, floor);
  return round ? __bfloat162float(__float2bfloat16_rn(x)) : x;
}

template <int VECTOR> __device__ __forceinline__ void load_weights(const float *from, float (&w)[VECTOR]) {
  if constexpr (VECTOR == 4) {
    const float4 v = __ldcg(reinterpret_cast<const float4 *>(from));
    w[0] = v.x;
    w[1] = v.y;
    w[2] = v.z;
    w[3] = v.w;
  } else {
    w[0] = __ldcg(from);
  }
}

/* x W of ROWS rows, x (ROWS, D), W (D, M): column m of row q is the sum of `groups` parts, see `column`. `stage` writes
 * x; it is called once the first weights are on their way. */
template <int VECTOR, int ROWS, class Stage>
__device__ __forceinline__ void project(const float *weights, int D, int M, const query_plan &plan, const float *x,
                                        float *parts, Stage stage) {
  const int shift = plan.weight_shift, groups = THREADS >> shift;
  const int lane = threadIdx.x & ((1 << shift) - 1), group = threadIdx.x >> shift, block = VECTOR << shift;
  bool staged = false;
#pragma unroll 1
  for (int first = 0; first < M; first += block) {
    const int column = first + lane * VECTOR;
    float sum[ROWS][VECTOR] = {};
#pragma unroll 1
    for (int d = group; d - group < D; d += ROWS_AHEAD * groups) {
      float w[ROWS_AHEAD][VECTOR];
      const float *row = weights + static_cast<int64_t>(d) * M + column;
#pragma unroll
      for (int i = 0; i < ROWS_AHEAD; i++, row += groups * M) {
#pragma unroll
        for (int e = 0; e < VECTOR; e++) w[i][e] = 0;
        if (d + i * groups < D && column < M) load_weights<VECTOR>(row, w[i]);
      }
      if (!staged) {
        stage();
        __syncthreads();
      }
      staged = true;
#pragma unroll
      for (int i = 0; i < ROWS_AHEAD; i++)
#pragma unroll
        for (int q = 0; q < ROWS; q++) {
          const float factor = d + i * groups < D ? x[q * D + d + i * groups] : 0;
#pragma unroll
          for (int e = 0; e < VECTOR; e++) sum[q][e] = fmaf(factor, w[i][e], sum[q][e]);
        }
    }
#pragma unroll
    for (int q = 0; q < ROWS; q++)
      store_floats<VECTOR>(parts + q * plan.parts + first * groups + group * block + lane * VECTOR, sum[q]);
  }
  __syncthreads();
}

/* Column m of one row's projection. */
__device__ __forceinline__ float column(const query_plan &plan, const float *parts, int m) {
  const int groups = THREADS >> plan.weight_shift, block = plan.weight_vector << plan.weight_shift;
  const int skipped = m < block ? 0 : m / block;
  return add_groups(parts + skipped * groups * block + (m - skipped * block), groups, block);
}

/* One side of Hedgehog by one warp: exp(sign (x - shift)) over M, shift the highest (lowest) x, divided by its sum when
 * `normalise`. */
__device__ __forceinline__ void exponentials(const query_plan &plan, const float *parts, int M, float sign,
                                             bool normalise, bool round, float *kept, float *phi) {
  const int lane = threadIdx.x % 32;
  float high = -INFINITY, sum = 0;
#pragma unroll 1
  for (int j = lane; j < M; j += 32) {
    const float y = sign * column(plan, parts, j);
    kept[j] = y;
    high = fmaxf(high, y);
  }
  high = warp_max(high);
#pragma unroll 1
  for (int j = lane; j < M; j += 32) {
    const float e = expf(kept[j] - high);
    kept[j] = e;
    sum += e;
  }
  sum = warp_sum(sum);
  const float scale = normalise ? 1 / sum : 1;
#pragma unroll 1
  for (int j = lane; j < M; j += 32) phi[j] = finish_feature(kept[j] * scale, FEATURE_FLOOR, round);
}

/* phi (B, Hq, F) float32, of rows that are not idle. */
template <int ROWS>
__global__ void __launch_bounds__(THREADS)
    decode_queries_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ call_rows rows,
                          const __grid_constant__ query_plan plan, float *phi) {
  extern __shared__ __align__(16) float query_memory[];
  __shared__ int64_t batch[ROWS], offset[ROWS]; /* of the rows' tokens; batch -1: idle */
  const int block = static_cast<int>(blockIdx.x) - plan.span_blocks, head = block < 0 ? 0 : block / plan.blocks;
  const bool hedgehog = is_hedgehog(g.map);
  const int M = hedgehog ? g.F / 2 : g.F, D = g.D, F = g.F, first = (block - head * plan.blocks) * ROWS;
  const float *weights = g.map.w_q + static_cast<int64_t>(head) * D * M;
  if (block >= 0 && threadIdx.x == 0 && plan.weight_vector == 4 && has_weights(g.map))
    prefetch(weights, static_cast<int64_t>(D) * M * 4);
  lola_device_await_previous();
  if (block < 0) {
    const int row = static_cast<int>(blockIdx.x) * THREADS + threadIdx.x;
    if (row < g.B) g.spans[row] = span_of(g, rows, row, 0, 1);
    return;
  }
  if (threadIdx.x < ROWS) {
    const int row = first + threadIdx.x;
    int64_t start = 0, stop = 0;
    if (row < g.B) row_range(rows, row, &start, &stop);
    batch[threadIdx.x] = stop <= start ? -1 : rows.cu_seqlens.data ? 0 : row;
    offset[threadIdx.x] = start;
  }
  __syncthreads();
  const bool round = g.dtype != LOLA_FLOAT32;
  float *out = phi + (static_cast<int64_t>(first) * g.Hq + head) * F;
  const int64_t row_step = static_cast<int64_t>(g.Hq) * F;
  if (g.stores_features) {
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * F; i += THREADS) {
      const int q = i / F, f = i - q * F;
      if (batch[q] < 0) continue;
      const float y = lola_device_load(lola_device_at(g.q_features, batch[q], offset[q], head), f, g.q_features.dtype);
      out[q * row_step + f] = round ? __bfloat162float(__float2bfloat16_rn(y)) : y;
    }
    return;
  }
  float *parts = query_memory, *x = query_memory + plan.x_at;
  const auto stage = [&] {
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
      const int q = ROWS == 1 ? 0 : i / D, d = i - q * D;
      x[i] = batch[q] < 0 ? 0 : lola_device_load(lola_device_at(g.q, batch[q], offset[q], head), d, g.q.dtype);
    }
  };
  const bool projects = has_weights(g.map);
  if (!projects) {
    stage();
    __syncthreads();
  } else if (plan.weight_vector == 4) {
    project<4, ROWS>(weights, D, M, plan, x, parts, stage);
  } else {
    project<1, ROWS>(weights, D, M, plan, x, parts, stage);
  }
  if (hedgehog) {
    const int warp = threadIdx.x / 32;
#pragma unroll 1
    for (int i = warp; i < 2 * ROWS; i += WARPS) {
      const int q = i / 2, side = i % 2;
      if (batch[q] < 0) continue;
      exponentials(plan, parts + q * plan.parts, M, side ? -1.0f : 1.0f, g.map.kind == LOLA_MAP_HEDGEHOG, round,
                   query_memory + plan.phi_at + i * M, out + q * row_step + side * M);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * F; i += THREADS) {
    const int q = i / F, f = i - q * F;
    if (batch[q] < 0) continue;
    const float y = projects ? column(plan, parts + q * plan.parts, f) : x[q * D + f]; /* F = D */
    out[q * row_step + f] = g.map.kind == LOLA_MAP_RELU ? finish_feature(y, FEATURE_FLOOR, round)
                                                        : finish_feature(y > 0 ? y + 1 : expf(y), 0, round);
  }
}

} // namespace

#endif
