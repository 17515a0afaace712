/* phi(q) of every (row, query head), beside the main kernel of a decoding step, or before it.
 *
 * A block takes one head and up to ROWS rows, so that a large batch reads the feature map's weights (D x M float32,
 * from L2) once for several rows. Sums are in an order that is fixed by the sizes alone: a row's features have the same
 * bits in any batch. */
#ifndef LOLA_CUDA_DECODE_QUERIES_CUH
#define LOLA_CUDA_DECODE_QUERIES_CUH

#include "chain.cuh"
#include "decode_features.cuh"
#include "decode_rows.cuh"
#include "plan.cuh"
#include "scan.cuh"

namespace {

constexpr int ROWS_AHEAD = 16; /* rows of the weights that one thread has under way */
constexpr int MANY_ROWS = 4;   /* rows of a block, where there are many */

struct query_plan {
  int blocks;                      /* of rows, per head */
  int weight_vector, weight_shift; /* floats of the weights that a thread loads at once; threads of a row, base 2 */
  int query_vector;                /* rows of q are whole pieces of 16 bytes */
  int x_at, phi_at;                /* shared memory, offsets in floats; at 0 the sums of groups of threads */
  int64_t parts;                   /* floats of those, for one row */
};

__host__ __device__ __forceinline__ bool has_weights(const lola_feature_map &map) {
  return lola_device_is_hedgehog(map) || (map.kind == LOLA_MAP_RELU && map.w_q);
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

/* Elements 8 piece .. 8 piece + 7 of a row that begins at a multiple of 16 bytes. */
__device__ __forceinline__ void load_eight(const char *row, int piece, lola_dtype dtype, float (&x)[8]) {
  if (dtype == LOLA_FLOAT32) {
    const float4 *from = reinterpret_cast<const float4 *>(row) + 2 * piece;
    const float4 low = from[0], high = from[1];
    x[0] = low.x;
    x[1] = low.y;
    x[2] = low.z;
    x[3] = low.w;
    x[4] = high.x;
    x[5] = high.y;
    x[6] = high.z;
    x[7] = high.w;
    return;
  }
  const uint4 v = reinterpret_cast<const uint4 *>(row)[piece];
  if (dtype == LOLA_FLOAT16)
    unpack(v, x, static_cast<const __half *>(nullptr));
  else
    unpack(v, x, static_cast<const __nv_bfloat16 *>(nullptr));
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

/* Hedgehog of one row by one warp: exp(x - highest) and exp(lowest - x) over M, each divided by its sum when
 * `normalise`. */
__device__ __forceinline__ void exponentials(const query_plan &plan, const float *parts, int M, bool normalise,
                                             bool round, float *kept, float *phi) {
  const int lane = threadIdx.x % 32;
  float high = -INFINITY, low = INFINITY, above = 0, below = 0;
#pragma unroll 2
  for (int j = lane; j < M; j += 32) {
    const float y = column(plan, parts, j);
    kept[j] = y;
    high = fmaxf(high, y);
    low = fminf(low, y);
  }
  high = warp_max(high);
  low = -warp_max(-low);
#pragma unroll 2
  for (int j = lane; j < M; j += 32) {
    const float y = kept[j], up = expf(y - high), down = expf(low - y);
    kept[j] = up;
    kept[M + j] = down;
    above += up;
    below += down;
  }
  above = warp_sum(above);
  below = warp_sum(below);
  const float up = normalise ? 1 / above : 1, down = normalise ? 1 / below : 1;
#pragma unroll 2
  for (int j = lane; j < M; j += 32) {
    phi[j] = finish_feature(kept[j] * up, LOLA_FEATURE_FLOOR, round);
    phi[M + j] = finish_feature(kept[M + j] * down, LOLA_FEATURE_FLOOR, round);
  }
}

/* --- the kernels ------------------------------------------------------------------------------------- */

/* Where `count` rows' tokens lie, from row `first` on: their place in the batch, -1 if idle, and offset. */
__device__ __forceinline__ void look_up_rows(const call_rows &rows, const decode_rows &known, int B, int first,
                                             int count, int64_t *batch, int64_t *offset) {
  if (threadIdx.x == 0) await_begin(known);
  __syncthreads();
  const int own = static_cast<int>(threadIdx.x);
  if (own < count) {
    const int row = first + own;
    int64_t start = 0, stop = 0;
    if (row < B) row_range(rows, row, &start, &stop);
    batch[own] = stop <= start ? -1 : rows.cu_seqlens.data ? 0 : row;
    offset[own] = start;
  }
  __syncthreads();
}

/* The block's phi(q) are written, and it ends. */
__device__ __forceinline__ void signal_queries(const decode_rows &known) {
  __syncthreads();
  if (threadIdx.x == 0) add_signal(&known.signals->queries, 1);
  lola_device_end(true);
}

/* phi (B, Hq, F) float32, of rows that are not idle. Weights never change, so they are asked for before the step
 * begins. */
template <int ROWS>
__global__ void __launch_bounds__(THREADS, 4)
    decode_queries_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ call_rows rows,
                          const __grid_constant__ query_plan plan, const decode_rows known, float *phi) {
  extern __shared__ __align__(16) float query_memory[];
  __shared__ int64_t batch[ROWS], offset[ROWS]; /* of the rows' tokens; batch -1: idle */
  lola_device_start_next();
  const int block = static_cast<int>(blockIdx.x), head = block / plan.blocks;
  const bool hedgehog = lola_device_is_hedgehog(g.map);
  const int M = hedgehog ? g.F / 2 : g.F, D = g.D, F = g.F, first = (block - head * plan.blocks) * ROWS;
  const float *weights = g.map.w_q + static_cast<int64_t>(head) * D * M;
  const auto look_up = [&] { look_up_rows(rows, known, g.B, first, ROWS, batch, offset); };
  const bool round = g.dtype != LOLA_FLOAT32;
  float *out = phi + (static_cast<int64_t>(first) * g.Hq + head) * F;
  const int64_t row_step = static_cast<int64_t>(g.Hq) * F;
  if (g.stores_features) {
    look_up();
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * F; i += THREADS) {
      const int q = i / F, f = i - q * F;
      if (batch[q] < 0) continue;
      const float y = lola_device_load(lola_device_at(g.q_features, batch[q], offset[q], head), f, g.q_features.dtype);
      out[q * row_step + f] = round ? __bfloat162float(__float2bfloat16_rn(y)) : y;
    }
    signal_queries(known);
    return;
  }
  float *parts = query_memory, *x = query_memory + plan.x_at;
  const auto stage = [&] {
    look_up();
    if (plan.query_vector) { /* all of it at once: loads that follow one another would take longer than the rest */
#pragma unroll 1
      for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        const int q = ROWS == 1 ? 0 : i / (D / 8), piece = i - q * (D / 8);
        float eight[8] = {};
        if (batch[q] >= 0) load_eight(lola_device_at(g.q, batch[q], offset[q], head), piece, g.q.dtype, eight);
        store_floats<8>(x + q * D + piece * 8, eight);
      }
      return;
    }
#pragma unroll 1
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
    for (int q = warp; q < ROWS; q += WARPS)
      if (batch[q] >= 0)
        exponentials(plan, parts + q * plan.parts, M, g.map.kind == LOLA_MAP_HEDGEHOG, round,
                     query_memory + plan.phi_at + q * F, out + q * row_step);
    signal_queries(known);
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * F; i += THREADS) {
    const int q = i / F, f = i - q * F;
    if (batch[q] < 0) continue;
    const float y = projects ? column(plan, parts + q * plan.parts, f) : x[q * D + f]; /* F = D */
    out[q * row_step + f] = g.map.kind == LOLA_MAP_RELU ? finish_feature(y, LOLA_FEATURE_FLOOR, round)
                                                        : finish_feature(y > 0 ? y + 1 : expf(y), 0, round);
  }
  signal_queries(known);
}

/* The same for Hedgehog's 128 features of vectors of 128. A block has one head and up to WIDE_ROWS rows, four of which
 * each of its teams takes at a time: few blocks, so that others find room beside them, and each reads the weights once,
 * into registers. */
constexpr int WIDE_TEAMS = 4, WIDE_THREADS = WIDE_TEAMS * THREADS, WIDE_ROWS = 64;
constexpr int WIDE_BYTES = (WIDE_ROWS * WIDE_F + WIDE_TEAMS * WARPS * WIDE_PARTS * WIDE_M) * 4;

__global__ void __launch_bounds__(WIDE_THREADS, 1)
    decode_wide_queries_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ call_rows rows,
                               int blocks, const decode_rows known, float *phi) {
  extern __shared__ __align__(16) float query_memory[];
  __shared__ int64_t batch[WIDE_ROWS], offset[WIDE_ROWS];
  constexpr int D = WIDE_F, STEPS = D / WIDE_PARTS;
  lola_device_start_next();
  const int block = static_cast<int>(blockIdx.x), head = block / blocks, first = (block - head * blocks) * WIDE_ROWS;
  const int count = min(g.B - first, WIDE_ROWS);
  const int team = threadIdx.x / THREADS, own = threadIdx.x % THREADS, warp = own / 32, lane = threadIdx.x % 32;
  const int part = own / 16, column = own % 16 * 4;
  float w[STEPS][4];
  const float *const weights = g.map.w_q + (static_cast<int64_t>(head) * D + part) * WIDE_M + column;
#pragma unroll
  for (int i = 0; i < STEPS; i++) load_weights<4>(weights + i * WIDE_PARTS * WIDE_M, w[i]);
  look_up_rows(rows, known, g.B, first, WIDE_ROWS, batch, offset);
  float *const x = query_memory;
  for (int i = threadIdx.x; i < count * (D / 8); i += WIDE_THREADS) {
    const int row = i / (D / 8), piece = i % (D / 8);
    float eight[8] = {};
    if (batch[row] >= 0) load_eight(lola_device_at(g.q, batch[row], offset[row], head), piece, g.q.dtype, eight);
    store_floats<8>(x + row * D + piece * 8, eight);
  }
  __syncthreads();
  float *const parts = query_memory + WIDE_ROWS * D + team * (WARPS * WIDE_PARTS * WIDE_M);
  const auto team_sync = [team] { asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(THREADS) : "memory"); };
#pragma unroll 1
  for (int row = team * WARPS; row < count; row += WIDE_TEAMS * WARPS) {
#pragma unroll
    for (int r = 0; r < WARPS; r++) {
      float sum[4] = {0, 0, 0, 0};
      const float *const from = x + min(row + r, count - 1) * D + part;
#pragma unroll
      for (int i = 0; i < STEPS; i++) {
        const float factor = from[i * WIDE_PARTS];
#pragma unroll
        for (int e = 0; e < 4; e++) sum[e] = fmaf(factor, w[i][e], sum[e]);
      }
      store_floats<4>(parts + (r * WIDE_PARTS + part) * WIDE_M + column, sum);
    }
    team_sync();
    if (row + warp < count && batch[row + warp] >= 0) {
      float *const out = phi + (static_cast<int64_t>(first + row + warp) * g.Hq + head) * WIDE_F;
#pragma unroll
      for (int sign = 0; sign < 2; sign++) {
        float y[2];
        wide_features(parts + warp * WIDE_PARTS * WIDE_M, sign, g.map.kind == LOLA_MAP_HEDGEHOG, y);
        out[sign * WIDE_M + lane] = y[0];
        out[sign * WIDE_M + lane + 32] = y[1];
      }
    }
    team_sync(); /* the parts were read */
  }
  signal_queries(known);
}

} // namespace

#endif
