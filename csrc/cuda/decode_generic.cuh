/* A tile of pairs in float32 products, for all types and sizes: a few lanes share a pair and its copies (cp.async), a
 * thread computes from the very pieces it copied, so that nothing waits for the whole tile. */
#ifndef LOLA_CUDA_DECODE_GENERIC_CUH
#define LOLA_CUDA_DECODE_GENERIC_CUH

#include "decode.cuh"

namespace {

constexpr int ROWS = 8;  /* pairs of a tile that one thread works on, at most */
constexpr int HEADS = 4; /* query heads at a time */
constexpr int64_t TILE_BYTES = 48 << 10;

/* The numbers of a piece of 16 bytes; zeros when it is not `there`, without a branch. */
__device__ __forceinline__ uint4 load_piece(const void *piece, bool there) {
  return there ? *static_cast<const uint4 *>(piece) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void unpack(uint4 v, float (&x)[4], const float *) {
  x[0] = __uint_as_float(v.x);
  x[1] = __uint_as_float(v.y);
  x[2] = __uint_as_float(v.z);
  x[3] = __uint_as_float(v.w);
}

/* Sums N values over the lanes that differ in the bits OFFSET .. LAST: at each step a lane hands half of its values
 * over and keeps the other half (the upper one where its bit is set), until one is left. */
template <int N, int OFFSET, int LAST> __device__ __forceinline__ void sum_lanes(float *x, int lane) {
  if constexpr (OFFSET >= LAST) {
    if constexpr (N > 1) {
      const bool upper = lane & OFFSET;
#pragma unroll
      for (int i = 0; i < N / 2; i++) {
        const float given = upper ? x[i] : x[i + N / 2], kept = upper ? x[i + N / 2] : x[i];
        x[i] = kept + __shfl_xor_sync(ALL, given, OFFSET);
      }
      sum_lanes<N / 2, OFFSET / 2, LAST>(x, lane);
    } else {
      x[0] += __shfl_xor_sync(ALL, x[0], OFFSET);
      sum_lanes<1, OFFSET / 2, LAST>(x, lane);
    }
  }
}

/* Copies this thread's pieces of the tile's keys, or of its values: n numbers a row, `pieces` of them. */
template <typename T, int LANES>
__device__ __forceinline__ void copy_rows(const tile_source &from, const char *slots, const char *newest, int n,
                                          int pieces, bool aligned, bool call_aligned, char *to) {
  constexpr int GROUPS = THREADS / LANES, PER_PIECE = PIECE / sizeof(T);
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int pair = i * GROUPS + group;
    if (pair >= from.count) break;
    const bool is_newest = pair == from.newest;
    const char *row = is_newest ? newest : slots + slot_of(from, pair) * n * static_cast<int64_t>(sizeof(T));
    char *target = to + pair * pieces * PIECE;
#pragma unroll 1
    for (int piece = lane; piece < pieces; piece += LANES) {
      if (is_newest ? call_aligned : aligned) {
        copy_async<16>(target + piece * PIECE, row + piece * PIECE);
      } else {
#pragma unroll
        for (int e = 0; e < PER_PIECE; e++) {
          const int at = piece * PER_PIECE + e;
          T x;
          if (at < n)
            x = reinterpret_cast<const T *>(row)[at];
          else
            x = T(0.0f);
          reinterpret_cast<T *>(target)[at] = x;
        }
      }
    }
  }
  cp_async_commit();
}

/* The newest pair's row, from where its thread copied it, into its ring slot. */
template <typename T, int LANES>
__device__ __forceinline__ void keep_newest(const tile_source &from, const char *copied, int n, int pieces,
                                            bool aligned, char *slots) {
  constexpr int GROUPS = THREADS / LANES, PER_PIECE = PIECE / sizeof(T);
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  if (from.newest % GROUPS != group) return;
  const char *row = copied + from.newest * pieces * PIECE;
  char *target = slots + slot_of(from, from.newest) * n * static_cast<int64_t>(sizeof(T));
#pragma unroll 1
  for (int piece = lane; piece < pieces; piece += LANES) {
    if (aligned) {
      *reinterpret_cast<uint4 *>(target + piece * PIECE) = *reinterpret_cast<const uint4 *>(row + piece * PIECE);
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < PER_PIECE; e++) {
      const int at = piece * PER_PIECE + e;
      if (at < n) reinterpret_cast<T *>(target)[at] = reinterpret_cast<const T *>(row)[at];
    }
  }
}

/* Softmax sums of `heads` <= H query heads over a tile whose copies are under way; q of those heads (float32, scaled)
 * is in shared memory. Each warp has its own maximum until the end. */
template <typename T, int LANES, int H>
__device__ __forceinline__ void attend_heads(const decode_plan &plan, char *shared, int count, int first_head,
                                             int heads, const tile_target &to) {
  constexpr int GROUPS = THREADS / LANES, PER_PIECE = PIECE / sizeof(T);
  constexpr int SHARING = 32 / LANES; /* pairs that a warp works on at a time */
  constexpr int N = ROWS * H;
  static_assert(ROWS <= LANES, "a lane keeps no more than one value per head");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const int part = threadIdx.x % 32 / LANES; /* which of the warp's pairs */
  const char *keys = shared, *values = shared + plan.values_at;
  float *merge = reinterpret_cast<float *>(shared + plan.merge_at);
  float *sums = reinterpret_cast<float *>(shared + plan.sums_at);
  float *weight = reinterpret_cast<float *>(shared + plan.weight_at) + warp * (ROWS * SHARING * HEADS);
  const float *queries = reinterpret_cast<const float *>(shared + plan.queries_at);
  const int width = plan.key_pieces * PER_PIECE;

  /* s = k.q: a partial sum per lane, summed over lanes so that each ends with its own few of the N values. */
  cp_async_wait<1>();
  float s[N];
#pragma unroll
  for (int i = 0; i < N; i++) s[i] = 0;
#pragma unroll 1
  for (int piece = lane; piece < plan.key_pieces; piece += LANES) {
    float q[H][PER_PIECE];
#pragma unroll
    for (int h = 0; h < H; h++)
      load_floats<PER_PIECE>(queries + (first_head + min(h, heads - 1)) * width + piece * PER_PIECE, q[h]);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const int pair = i * GROUPS + group;
      float k[PER_PIECE];
      unpack(load_piece(keys + (pair * plan.key_pieces + piece) * PIECE, pair < count), k,
             static_cast<const T *>(nullptr));
#pragma unroll
      for (int h = 0; h < H; h++)
#pragma unroll
        for (int e = 0; e < PER_PIECE; e++) s[i * H + h] = fmaf(k[e], q[h][e], s[i * H + h]);
    }
  }
  sum_lanes<N, LANES / 2, 1>(s, lane);

  /* Now value i * H + h is in lane (i * H + h) / KEPT * COPIES and the COPIES - 1 that follow. */
  constexpr int KEPT = N > LANES ? N / LANES : 1, COPIES = N > LANES ? 1 : LANES / N;
  float m[KEPT], p[KEPT], l[KEPT];
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    const int i = (lane / COPIES * KEPT + j) / H;
    if (i * GROUPS + group >= count) s[j] = -INFINITY;
    m[j] = s[j];
  }
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const bool same_head = offset >= LANES || (offset >= COPIES && offset / COPIES * KEPT % H == 0);
    if (!same_head) continue;
#pragma unroll
    for (int j = 0; j < KEPT; j++) m[j] = fmaxf(m[j], __shfl_xor_sync(ALL, m[j], offset));
  }
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    /* A warp without a pair keeps -inf; the lowest float stands in so that -inf - it stays -inf. */
    p[j] = exp2f(s[j] - fmaxf(m[j], -3e38f));
    l[j] = p[j];
  }
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const bool same_head = offset >= LANES || (offset >= COPIES && offset / COPIES * KEPT % H == 0);
    if (!same_head) continue;
#pragma unroll
    for (int j = 0; j < KEPT; j++) l[j] += __shfl_xor_sync(ALL, l[j], offset);
  }
  if (lane % COPIES == 0) {
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
      const int index = lane / COPIES * KEPT + j, i = index / H, h = index % H;
      weight[(i * SHARING + part) * H + h] = p[j];
      if (i == 0 && part == 0) {
        sums[(warp * HEADS + h) * 2] = m[j];
        sums[(warp * HEADS + h) * 2 + 1] = l[j];
      }
    }
  }
  __syncwarp();

  /* o = sum p v: a thread owns a piece's columns. */
  cp_async_wait<0>();
#pragma unroll 1
  for (int first = 0; first < plan.value_pieces; first += LANES) {
    const int piece = first + lane;
    float o[H * PER_PIECE];
#pragma unroll
    for (int i = 0; i < H * PER_PIECE; i++) o[i] = 0;
    if (piece < plan.value_pieces) {
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const int pair = i * GROUPS + group;
        float v[PER_PIECE], w[H];
        unpack(load_piece(values + (pair * plan.value_pieces + piece) * PIECE, pair < count), v,
               static_cast<const T *>(nullptr));
        load_floats<H>(weight + (i * SHARING + part) * H, w);
#pragma unroll
        for (int h = 0; h < H; h++)
#pragma unroll
          for (int e = 0; e < PER_PIECE; e++) o[h * PER_PIECE + e] = fmaf(w[h], v[e], o[h * PER_PIECE + e]);
      }
    }
    sum_lanes<H * PER_PIECE, 16, LANES>(o, threadIdx.x % 32);
    constexpr int LEFT = H * PER_PIECE / SHARING, RUN = LEFT < PER_PIECE ? LEFT : PER_PIECE;
    if (piece < plan.value_pieces) {
#pragma unroll
      for (int j = 0; j < LEFT; j += RUN) {
        const int index = part * LEFT + j, h = index / PER_PIECE, e = index % PER_PIECE;
        store_floats<RUN>(merge + (warp * HEADS + h) * plan.columns + piece * PER_PIECE + e, o + j);
      }
    }
  }
  __syncthreads();

  merge_warps(plan, merge, HEADS * plan.columns, plan.columns, sums, HEADS, WARPS, first_head, heads, to);
}

/* A tile for query heads head .. head + heads - 1; a partial each. */
template <typename T, int LANES>
__device__ __forceinline__ void attend_tile(const lola_device_segment &g, const decode_plan &plan,
                                            const lola_device_span &span, const tile_source &from, int head, int heads,
                                            char *shared, const tile_target &to) {
  copy_rows<T, LANES>(from, from.keys, from.key, g.D, plan.key_pieces, plan.cache_aligned, plan.call_aligned, shared);
  copy_rows<T, LANES>(from, from.values, from.value, g.Dv, plan.value_pieces, plan.cache_aligned, plan.call_aligned,
                      shared + plan.values_at);
  const int width = plan.key_pieces * static_cast<int>(PIECE / sizeof(T));
  float *queries = reinterpret_cast<float *>(shared + plan.queries_at);
#pragma unroll 2
  for (int i = threadIdx.x; i < heads * width; i += THREADS) {
    const int h = i / width, d = i % width;
    const char *q = lola_device_at(g.q, span.batch, span.first, head + h);
    queries[i] = d < g.D ? lola_device_load(q, d, g.q.dtype) * (g.scale * LOG2E) : 0;
  }
  __syncthreads();
  for (int h = 0; h < heads; h += HEADS) {
    if (h) __syncthreads(); /* the last heads' sums were read */
    const int left = min(heads - h, HEADS);
    if (left == 1)
      attend_heads<T, LANES, 1>(plan, shared, from.count, h, left, to);
    else if (left == 2)
      attend_heads<T, LANES, 2>(plan, shared, from.count, h, left, to);
    else
      attend_heads<T, LANES, HEADS>(plan, shared, from.count, h, left, to);
  }
  if (from.newest < 0) return;
  keep_newest<T, LANES>(from, shared, g.D, plan.key_pieces, plan.cache_aligned, const_cast<char *>(from.keys));
  keep_newest<T, LANES>(from, shared + plan.values_at, g.Dv, plan.value_pieces, plan.cache_aligned,
                        const_cast<char *>(from.values));
}

} // namespace

#endif
