/* What the items of a (row, KV head) left in scratch, joined into its outputs. */
#ifndef LOLA_CUDA_DECODE_MERGE_CUH
#define LOLA_CUDA_DECODE_MERGE_CUH

#include "chain.cuh"
#include "decode.cuh"

namespace {

/* Tiles that n pairs fill. */
__device__ __forceinline__ int tiles_of(const decode_plan &plan, int64_t n) {
  return static_cast<int>(divided(static_cast<unsigned>(n + plan.pairs - 1), plan.by_pairs));
}

/* Adds N tiles to a warp's sums `o` of four columns a lane, which have maximum `high` and sum `sum`: lane t has the
 * tile's own two, (-inf, 0) where there is none. */
template <int N>
__device__ __forceinline__ void add_tiles(float2 pair, const float4 (&x)[N], float *high, float *sum, float (&o)[4]) {
  const float higher = fmaxf(*high, warp_max(pair.x));
  const float before = weight_below(*high, higher), share = weight_below(pair.x, higher);
  *high = higher;
  *sum = fmaf(before, *sum, warp_sum(__fmul_rn(share, pair.y)));
#pragma unroll
  for (int e = 0; e < 4; e++) o[e] *= before;
#pragma unroll
  for (int t = 0; t < N; t++) {
    const float w = __shfl_sync(ALL, share, t);
    o[0] = fmaf(w, x[t].x, o[0]);
    o[1] = fmaf(w, x[t].y, o[1]);
    o[2] = fmaf(w, x[t].z, o[2]);
    o[3] = fmaf(w, x[t].w, o[3]);
  }
}

/* One warp a query head, four columns a lane; tiles in order, window first, then the state. Everything is asked for
 * before anything is used, up to MERGE tiles at a time. The output is that of token `first` of batch row `batch`;
 * `count_of` says how many sparse pairs a query head of the group sees. */
template <class Count>
__device__ __forceinline__ void merge(const lola_device_segment &g, const decode_plan &plan, int64_t batch,
                                      int64_t first, int kv_head, int64_t window_pairs, Count count_of,
                                      const float *partials) {
  constexpr int MERGE = 12, LANE_COLUMNS = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int stride = plan.columns + 4, slots = static_cast<int>(plan.slots),
            window_tiles = tiles_of(plan, window_pairs);
  const int gap = (static_cast<int>(plan.window_tiles) - window_tiles) * stride; /* to the first sparse tile */
#pragma unroll 1
  for (int j = warp; j < g.r; j += WARPS) {
    const int tiles = window_tiles + tiles_of(plan, count_of(j));
    const float *own = partials + j * plan.head_floats;
    const float *state = own + (slots - plan.state_parts) * stride;
    const int head = kv_head * g.r + j;
    const float gate = g.gate ? g.gate[head] : 0;
    float z = 0;
#pragma unroll 2
    for (int part = 0; part < plan.state_parts; part++) z += __ldcg(state + part * stride + plan.columns);
    char *out = lola_device_at(g.out, batch, first, head);
#pragma unroll 1
    for (int base = 0; base < plan.columns; base += 32 * LANE_COLUMNS) {
      const int column = base + lane * LANE_COLUMNS;
      const bool in = column < plan.columns;
      float n[4] = {0, 0, 0, 0}; /* of columns from Dv on, and where nothing is folded, whatever was there */
#pragma unroll 2
      for (int part = 0; part < plan.state_parts; part++) {
        if (!in) break;
        const float4 x = __ldcg(reinterpret_cast<const float4 *>(state + part * stride + column));
        n[0] += x.x;
        n[1] += x.y;
        n[2] += x.z;
        n[3] += x.w;
      }
      float high = -INFINITY, sum = 0, o[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int done = 0; done < tiles; done += MERGE) {
        const int left = min(tiles - done, MERGE);
        float4 x[MERGE];
#pragma unroll
        for (int t = 0; t < MERGE; t++) {
          const int at = (done + t) * stride + (done + t < window_tiles ? 0 : gap) + column;
          x[t] = make_float4(0, 0, 0, 0);
          if (t < left && in) x[t] = __ldcg(reinterpret_cast<const float4 *>(own + at));
        }
        const int at = (done + lane) * stride + (done + lane < window_tiles ? 0 : gap) + plan.columns;
        float2 pair = make_float2(-INFINITY, 0);
        if (lane < left) pair = __ldcg(reinterpret_cast<const float2 *>(own + at));
        add_tiles(pair, x, &high, &sum, o);
      }
      const lola_device_weights w = lola_device_mix(g.mixing, gate, high, sum, z);
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (column + e < g.Dv) {
          const float linear = w.linear != 0 ? w.linear * n[e] : 0; /* N is unwritten where nothing is folded */
          lola_device_store(out, column + e, g.out.dtype, fmaf(w.softmax, o[e], linear));
        }
      if (base == 0 && lane == 0 && g.share.data)
        *reinterpret_cast<float *>(lola_device_at(g.share, batch, first, head)) = w.share;
    }
  }
}

/* The same for the pipeline's partials: Dv = 128, and tiles in a row with a state's parts behind them, by THREADS
 * threads. All that one head needs is asked for before any of it is used, so that it takes as long as one load, not as
 * many one after the other. It awaits the kernel before this one, when it has all but the partials and, of a row that
 * is updated, the counts of its sparse pairs. */
template <class Count>
__device__ __forceinline__ void merge_wide(const lola_device_segment &g, const decode_plan &plan, int thread,
                                           const decode_row &of, int kv_head, Count count_of, const float *partials) {
  constexpr int MERGE = 12, PARTS = 2, COLUMNS = 128, STRIDE = COLUMNS + 4;
  const int warp = thread / 32, lane = thread % 32;
  const int slots = static_cast<int>(plan.slots), window_tiles = tiles_of(plan, of.window.pairs);
  const int gap = (static_cast<int>(plan.window_tiles) - window_tiles) * STRIDE; /* to the first sparse tile */
#pragma unroll 1
  for (int j = warp; j < g.r; j += WARPS) {
    const int head = kv_head * g.r + j;
    const float *const own = partials + j * plan.head_floats;
    const float *const state = own + (slots - plan.state_parts) * STRIDE;
    char *const out = lola_device_at(g.out, of.batch, of.first, head);
    char *const share = g.share.data ? lola_device_at(g.share, of.batch, of.first, head) : nullptr;
    const float gate = g.gate ? __ldg(g.gate + head) : 0;
    int64_t count = of.updated ? 0 : count_of(j);
    lola_device_await_previous();
    if (of.updated) count = count_of(j);
    const int tiles = window_tiles + tiles_of(plan, count);
    float high = -INFINITY, sum = 0, z = 0, o[4] = {0, 0, 0, 0}, n[4] = {0, 0, 0, 0};
    int done = 0;
    do {
      const int left = min(tiles - done, MERGE);
      float4 x[MERGE], y[PARTS];
      float part_z[PARTS];
      float2 pair = make_float2(-INFINITY, 0);
      if (lane < left)
        pair = __ldcg(reinterpret_cast<const float2 *>(own + (done + lane) * STRIDE +
                                                       (done + lane < window_tiles ? 0 : gap) + COLUMNS));
#pragma unroll
      for (int t = 0; t < MERGE; t++) {
        const int at = (done + t) * STRIDE + (done + t < window_tiles ? 0 : gap) + lane * 4;
        x[t] = make_float4(0, 0, 0, 0);
        if (t < left) x[t] = __ldcg(reinterpret_cast<const float4 *>(own + at));
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const bool there = done == 0 && part < plan.state_parts;
        y[part] = make_float4(0, 0, 0, 0);
        part_z[part] = 0;
        if (!there) continue;
        y[part] = __ldcg(reinterpret_cast<const float4 *>(state + part * STRIDE + lane * 4));
        part_z[part] = __ldcg(state + part * STRIDE + COLUMNS);
      }
      add_tiles(pair, x, &high, &sum, o);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        z += part_z[part];
        n[0] += y[part].x;
        n[1] += y[part].y;
        n[2] += y[part].z;
        n[3] += y[part].w;
      }
      done += MERGE;
    } while (done < tiles);
#pragma unroll 1
    for (int part = PARTS; part < plan.state_parts; part++) {
      const float4 y = __ldcg(reinterpret_cast<const float4 *>(state + part * STRIDE + lane * 4));
      z += __ldcg(state + part * STRIDE + COLUMNS);
      n[0] += y.x;
      n[1] += y.y;
      n[2] += y.z;
      n[3] += y.w;
    }
    const lola_device_weights w = lola_device_mix(g.mixing, gate, high, sum, z);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float linear = w.linear != 0 ? w.linear * n[e] : 0; /* N is unwritten where nothing is folded */
      lola_device_store(out, lane * 4 + e, g.out.dtype, fmaf(w.softmax, o[e], linear));
    }
    if (lane == 0 && share) *reinterpret_cast<float *>(share) = w.share;
  }
  lola_device_await_previous(); /* a warp without a head too */
}

} // namespace

#endif
