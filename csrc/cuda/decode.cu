/* decode: one token for each row that is not idle, one launch.
 *
 * The bytes of window, sparse cache and hidden state are the floor, so their reading is spread over many blocks: for
 * each (row, KV head) one block per query head for phi(q)^T H (a float32 F x Dv state), one per tile of sparse pairs
 * and one per tile of window pairs. A block asks for all that it reads (cp.async, 16 bytes a piece) before it waits for
 * anything; a thread computes from the very pieces it copied, so nothing waits for the whole tile. Each leaves a
 * partial in scratch: float32 sums o (Dv,), maximum m in base 2 and sum l per query head, or N (Dv,) and z. The block
 * of a (row, KV head) that arrives last merges them in order of tile, mixes (Eq. 14) and writes the output, so the
 * result does not depend on which one it is. Tiles are fixed by the cache's sizes alone: the same row gives the same
 * bits in any batch. The block that holds the newest pair writes it into the window ring and advances the counters,
 * which no other reads. */
#include <atomic>

#include "segment.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int ROWS = 4;   /* pairs of a tile that one thread works on, at most */
constexpr int HEADS = 4;  /* query heads at a time */
constexpr int DEPTH = 16; /* pieces of H that one thread has under way */
constexpr int PIECE = 16; /* bytes of a copy */
constexpr int64_t TILE_BYTES = 48 << 10;
constexpr float LOG2E = 0x1.715476p+0f;
constexpr float FEATURE_FLOOR = 1e-12f;
constexpr unsigned ALL = 0xffffffffu;

/* --- the plan: fixed by the cache's sizes ---------------------------------------------------------- */

struct decode_plan {
  int lanes;                          /* threads that share one pair's key and value: 8, 16 or 32 */
  int pairs;                          /* of a tile */
  int key_pieces, value_pieces;       /* of one key, of one value, the last filled up with zeros */
  int columns;                        /* Dv rounded up to whole pieces; a partial is columns + 4 floats */
  int64_t window_tiles, sparse_tiles; /* per KV head; per set */
  int64_t items;                      /* blocks per (row, KV head) */
  int64_t partials;                   /* per (row, KV head) */
  int state_vector, state_lanes;      /* floats of H a thread copies at once; threads that share a row of H */
  int weight_vector, weight_lanes;    /* the same for the feature map's weights */
  int cache_aligned, call_aligned;    /* rows of the cache, of the call's k and v, begin at multiples of 16 bytes */
  int values_at, merge_at, sums_at, weight_at, queries_at; /* shared memory of a tile, offsets in bytes */
  int reduce_at, x_at, projected_at, phi_at;               /* of a hidden state */
  int64_t shared_bytes;
};

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int power_of_two(int64_t n, int most) {
  int p = 1;
  while (p < most && p < n) p *= 2;
  return p;
}

/* Heads, sets and sizes as lola_cache has them; what depends on the call's arrays is left at 0. */
decode_plan plan_of(int64_t r, int64_t sets, int64_t D, int64_t Dv, int64_t F, int64_t R, int64_t L, lola_dtype dtype) {
  const int64_t item = lola_device_item(dtype), per_piece = PIECE / item;
  decode_plan p = {};
  const int64_t key_pieces = divided_up(D, per_piece), value_pieces = divided_up(Dv, per_piece);
  const int64_t widest = key_pieces > value_pieces ? key_pieces : value_pieces;
  p.key_pieces = static_cast<int>(key_pieces);
  p.value_pieces = static_cast<int>(value_pieces);
  p.columns = static_cast<int>(value_pieces * per_piece);
  p.lanes = widest <= 8 ? 8 : widest <= 16 ? 16 : 32;
  const int64_t groups = THREADS / p.lanes, pass_bytes = groups * (key_pieces + value_pieces) * PIECE;
  int64_t rows = TILE_BYTES / pass_bytes;
  rows = rows < 1 ? 1 : rows > ROWS ? ROWS : rows;
  p.pairs = static_cast<int>(rows * groups);
  p.window_tiles = divided_up(R, p.pairs);
  p.sparse_tiles = divided_up(L, p.pairs);
  p.items = r + sets * p.sparse_tiles + p.window_tiles;
  p.partials = r * (1 + p.sparse_tiles + p.window_tiles);
  p.state_vector = Dv % 4 ? 1 : 4;
  p.state_lanes = power_of_two(divided_up(Dv, p.state_vector), 32);

  /* 64-bit sums: a size too large shows in shared_bytes, and nothing runs. */
  int64_t values_at = p.pairs * key_pieces * PIECE, merge_at = values_at + p.pairs * value_pieces * PIECE;
  int64_t sums_at = merge_at + WARPS * HEADS * static_cast<int64_t>(p.columns) * 4;
  int64_t weight_at = sums_at + WARPS * HEADS * 2 * 4;
  int64_t queries_at = weight_at + WARPS * ROWS * (32 / p.lanes) * HEADS * 4;
  int64_t tile_bytes = queries_at + r * key_pieces * per_piece * 4;

  const int64_t groups_of_state = THREADS / p.state_lanes;
  const int64_t copies = divided_up(F, groups_of_state) * divided_up(Dv, p.state_lanes * p.state_vector);
  int64_t reduce_at = (copies < DEPTH ? copies : DEPTH) * THREADS * p.state_vector * 4;
  int64_t x_at = reduce_at + THREADS * 4 * 4 + WARPS * 4;
  int64_t projected_at = x_at + D * 4, phi_at = projected_at + F * 4;
  int64_t state_bytes = phi_at + F * 4;

  const int64_t mix_bytes = r * 4 * 4; /* what the merging block keeps per head */
  p.shared_bytes = tile_bytes > state_bytes ? tile_bytes : state_bytes;
  if (mix_bytes > p.shared_bytes) p.shared_bytes = mix_bytes;
  p.values_at = static_cast<int>(values_at);
  p.merge_at = static_cast<int>(merge_at);
  p.sums_at = static_cast<int>(sums_at);
  p.weight_at = static_cast<int>(weight_at);
  p.queries_at = static_cast<int>(queries_at);
  p.reduce_at = static_cast<int>(reduce_at);
  p.x_at = static_cast<int>(x_at);
  p.projected_at = static_cast<int>(projected_at);
  p.phi_at = static_cast<int>(phi_at);
  return p;
}

/* Scratch: a counter of arrivals per (row, KV head), zero between launches; then the partials. */
int64_t counter_bytes(int64_t groups) { return divided_up(groups * 4, 256) * 256; }

/* --- small pieces ---------------------------------------------------------------------------------- */

template <int BYTES> __device__ __forceinline__ void copy_async(void *to, const void *from) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
}

__device__ __forceinline__ void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until at most PENDING of this thread's groups are under way. */
template <int PENDING> __device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

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

__device__ __forceinline__ void unpack(uint4 v, float (&x)[8], const __half *) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
    x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
  }
}

__device__ __forceinline__ void unpack(uint4 v, float (&x)[8], const __nv_bfloat16 *) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

/* N floats that lie together in shared memory, at a multiple of their size. */
template <int N> __device__ __forceinline__ void load_floats(const float *from, float *x) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 v = *reinterpret_cast<const float4 *>(from + i);
      x[i] = v.x;
      x[i + 1] = v.y;
      x[i + 2] = v.z;
      x[i + 3] = v.w;
    }
  } else if constexpr (N == 2) {
    const float2 v = *reinterpret_cast<const float2 *>(from);
    x[0] = v.x;
    x[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = from[i];
  }
}

template <int N> __device__ __forceinline__ void store_floats(float *to, const float *x) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      *reinterpret_cast<float4 *>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = x[i];
  }
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

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, offset));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
  return x;
}

/* --- a tile of pairs ------------------------------------------------------------------------------- */

struct tile_source {
  const char *keys, *values; /* of slot 0 */
  int64_t slot, slots;       /* of the first pair; after slot slots - 1 comes slot 0 */
  int count;                 /* pairs */
  int newest;                /* the pair that is the call's token, at key and value, or -1 */
  const char *key, *value;
};

__device__ __forceinline__ int64_t slot_of(const tile_source &from, int pair) {
  const int64_t slot = from.slot + pair;
  return slot < from.slots ? slot : slot - from.slots;
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
  copies_end_group();
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
                                             int heads, float *partial) {
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
  copies_wait<1>();
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
  copies_wait<0>();
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

  /* The warps' sums, in order of warp. */
  const int quads = plan.columns / 4, stride = plan.columns + 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < heads * quads; i += THREADS) {
    const int h = i / quads, column = i % quads * 4;
    float high = -INFINITY, total = 0, o[4] = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < WARPS; w++) high = fmaxf(high, sums[(w * HEADS + h) * 2]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float share = exp2f(sums[(w * HEADS + h) * 2] - high);
      float x[4];
      load_floats<4>(merge + (w * HEADS + h) * plan.columns + column, x);
      total = fmaf(share, sums[(w * HEADS + h) * 2 + 1], total);
#pragma unroll
      for (int e = 0; e < 4; e++) o[e] = fmaf(share, x[e], o[e]);
    }
    float *to = partial + static_cast<int64_t>(first_head + h) * stride;
    store_floats<4>(to + column, o);
    if (column == 0) {
      to[plan.columns] = high;
      to[plan.columns + 1] = total;
    }
  }
}

/* A tile for query heads head .. head + heads - 1; a partial each, from `partial` on. */
template <typename T, int LANES>
__device__ __forceinline__ void attend_tile(const lola_device_segment &g, const decode_plan &plan,
                                            const lola_device_span &span, const tile_source &from, int head, int heads,
                                            char *shared, float *partial) {
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
      attend_heads<T, LANES, 1>(plan, shared, from.count, h, left, partial);
    else if (left == 2)
      attend_heads<T, LANES, 2>(plan, shared, from.count, h, left, partial);
    else
      attend_heads<T, LANES, HEADS>(plan, shared, from.count, h, left, partial);
  }
}

/* --- phi(q)^T H and phi(q)^T s of a query head ----------------------------------------------------- */

__device__ __forceinline__ float finish_feature(float x, float floor, bool round) {
  x = fmaxf(x, floor);
  return round ? __bfloat162float(__float2bfloat16_rn(x)) : x;
}

/* The sum of `count` numbers that lie `step` apart, in order. */
__device__ __forceinline__ float add_groups(const float *from, int count, int step) {
  float total = 0;
#pragma unroll 4
  for (int j = 0; j < count; j++) total += from[j * step];
  return total;
}

/* projected = x W, W (D, M). Waits for the block before it reads x, so that the first weights are on their way by then,
 * and after it has written `projected`. */
template <int VECTOR>
__device__ __forceinline__ void project(const float *weights, int D, int M, int lanes, const float *x, float *reduce,
                                        float *projected) {
  constexpr int AHEAD = 8;
  const int groups = THREADS / lanes, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int block = lanes * VECTOR;
  bool waited = false;
  for (int first = 0; first < M; first += block) {
    const int column = first + lane * VECTOR;
    float sum[VECTOR] = {};
    for (int d = group; d - group < D; d += AHEAD * groups) {
      float w[AHEAD][VECTOR];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int row = d + i * groups;
#pragma unroll
        for (int e = 0; e < VECTOR; e++) w[i][e] = 0;
        if (row < D && column < M) load_floats<VECTOR>(weights + static_cast<int64_t>(row) * M + column, w[i]);
      }
      if (!waited) __syncthreads();
      waited = true;
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int row = d + i * groups;
        const float factor = row < D ? x[row] : 0;
#pragma unroll
        for (int e = 0; e < VECTOR; e++) sum[e] = fmaf(factor, w[i][e], sum[e]);
      }
    }
    store_floats<VECTOR>(reduce + group * block + lane * VECTOR, sum);
    __syncthreads();
    for (int i = threadIdx.x; i < block && first + i < M; i += THREADS)
      projected[first + i] = add_groups(reduce + i, groups, block);
    __syncthreads();
  }
}

/* One side of Hedgehog by one warp: exp(sign (x - shift)) over M, shift the highest (lowest) x, divided by its sum when
 * `normalise`. */
__device__ __forceinline__ void exponentials(const float *x, int M, float sign, bool normalise, bool round,
                                             float *phi) {
  const int lane = threadIdx.x % 32;
  float high = -INFINITY, sum = 0;
#pragma unroll 1
  for (int j = lane; j < M; j += 32) high = fmaxf(high, sign * x[j]);
  high = warp_max(high);
#pragma unroll 1
  for (int j = lane; j < M; j += 32) {
    const float e = expf(sign * x[j] - high);
    phi[j] = e;
    sum += e;
  }
  sum = warp_sum(sum);
  const float scale = normalise ? 1 / sum : 1;
#pragma unroll 1
  for (int j = lane; j < M; j += 32) phi[j] = finish_feature(phi[j] * scale, FEATURE_FLOOR, round);
}

/* phi(q) into shared memory. The block waits for it before it goes on. */
__device__ __forceinline__ void query_features(const lola_device_segment &g, const decode_plan &plan,
                                               const lola_device_span &span, int head, char *shared) {
  float *x = reinterpret_cast<float *>(shared + plan.x_at);
  float *projected = reinterpret_cast<float *>(shared + plan.projected_at);
  float *phi = reinterpret_cast<float *>(shared + plan.phi_at);
  const bool round = g.dtype != LOLA_FLOAT32;
  if (g.stores_features) {
    const char *given = lola_device_at(g.q_features, span.batch, span.first, head);
#pragma unroll 1
    for (int f = threadIdx.x; f < g.F; f += THREADS) {
      const float y = lola_device_load(given, f, g.q_features.dtype);
      phi[f] = round ? __bfloat162float(__float2bfloat16_rn(y)) : y;
    }
    __syncthreads();
    return;
  }
  const char *q = lola_device_at(g.q, span.batch, span.first, head);
#pragma unroll 1
  for (int d = threadIdx.x; d < g.D; d += THREADS) x[d] = lola_device_load(q, d, g.q.dtype);
  const bool hedgehog = g.map.kind == LOLA_MAP_HEDGEHOG || g.map.kind == LOLA_MAP_HEDGEHOG_EXP;
  const int M = hedgehog ? g.F / 2 : g.F;
  const bool projects = hedgehog || (g.map.kind == LOLA_MAP_RELU && g.map.w_q);
  if (projects) {
    const float *weights = g.map.w_q + static_cast<int64_t>(head) * g.D * M;
    float *reduce = reinterpret_cast<float *>(shared + plan.reduce_at);
    if (plan.weight_vector == 4)
      project<4>(weights, g.D, M, plan.weight_lanes, x, reduce, projected);
    else
      project<1>(weights, g.D, M, plan.weight_lanes, x, reduce, projected);
  } else {
    projected = x; /* F = D */
    __syncthreads();
  }
  if (hedgehog) {
    const int warp = threadIdx.x / 32;
    if (warp < 2)
      exponentials(projected, M, warp ? -1.0f : 1.0f, g.map.kind == LOLA_MAP_HEDGEHOG, round, phi + warp * M);
  } else {
#pragma unroll 1
    for (int f = threadIdx.x; f < M; f += THREADS) {
      const float y = projected[f];
      phi[f] = g.map.kind == LOLA_MAP_RELU ? finish_feature(y, FEATURE_FLOOR, round)
                                           : finish_feature(y > 0 ? y + 1 : expf(y), 0, round);
    }
  }
  __syncthreads();
}

/* A thread's walk over H: its rows for one block of columns after the other. */
struct state_walk {
  const float *hidden;
  float *stage; /* this thread's first piece in shared memory */
  int row, column, slot;
};

/* Asks for the next piece of H, if there is one. */
template <int VECTOR> __device__ __forceinline__ void ask(state_walk &walk, const decode_plan &plan, int F, int Dv) {
  const int lanes = plan.state_lanes, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  if (walk.column - lane * VECTOR < Dv) {
    if (walk.row < F && walk.column < Dv)
      copy_async<VECTOR * 4>(walk.stage + walk.slot * (THREADS * VECTOR),
                             walk.hidden + static_cast<int64_t>(walk.row) * Dv + walk.column);
    walk.row += THREADS / lanes;
    if (walk.row - group >= F) {
      walk.row = group;
      walk.column += lanes * VECTOR;
    }
  }
  walk.slot = walk.slot + 1 == DEPTH ? 0 : walk.slot + 1;
  copies_end_group();
}

template <int VECTOR>
__device__ __forceinline__ state_walk begin_walk(const float *hidden, const decode_plan &plan, int F, int Dv,
                                                 char *shared) {
  const int lane = threadIdx.x % plan.state_lanes, group = threadIdx.x / plan.state_lanes;
  state_walk walk = {hidden, reinterpret_cast<float *>(shared) + threadIdx.x * VECTOR, group, lane * VECTOR, 0};
#pragma unroll 1
  for (int i = 0; i < DEPTH; i++) ask<VECTOR>(walk, plan, F, Dv);
  return walk;
}

/* N = phi^T H as the walk goes on, and z from the warps' sums in `reduce_z`. */
template <int VECTOR>
__device__ __forceinline__ void recall(state_walk walk, const decode_plan &plan, int F, int Dv, const float *phi,
                                       float *reduce, const float *reduce_z, float *partial) {
  const int lanes = plan.state_lanes, groups = THREADS / lanes;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int block = lanes * VECTOR;
  int taken = 0;
  for (int first = 0; first < Dv; first += block) {
    float sum[VECTOR] = {};
#pragma unroll 2
    for (int f = group; f - group < F; f += groups) {
      copies_wait<DEPTH - 1>();
      if (f < F && first + lane * VECTOR < Dv) {
        float x[VECTOR];
        load_floats<VECTOR>(walk.stage + taken * (THREADS * VECTOR), x);
#pragma unroll
        for (int e = 0; e < VECTOR; e++) sum[e] = fmaf(phi[f], x[e], sum[e]);
      }
      taken = taken + 1 == DEPTH ? 0 : taken + 1;
      ask<VECTOR>(walk, plan, F, Dv);
    }
    store_floats<VECTOR>(reduce + group * block + lane * VECTOR, sum);
    __syncthreads();
    for (int i = threadIdx.x; i < block && first + i < Dv; i += THREADS)
      partial[first + i] = add_groups(reduce + i, groups, block);
    if (first == 0 && threadIdx.x == 0) partial[plan.columns] = add_groups(reduce_z, WARPS, 1);
    __syncthreads();
  }
}

/* N and z into the head's partial; the call's own features of the token into the ring. */
__device__ __forceinline__ void state_item(const lola_device_segment &g, const decode_plan &plan,
                                           const lola_device_span &span, int64_t state, int head, bool folded,
                                           char *shared, float *partial) {
  const int F = g.F, Dv = g.Dv;
  if (g.stores_features) {
    const lola_dtype type = g.dtype == LOLA_FLOAT32 ? LOLA_FLOAT32 : LOLA_BFLOAT16;
    const char *from = lola_device_at(g.k_features, span.batch, span.first, head);
    char *to =
        static_cast<char *>(g.window_features) + (state * g.R + span.position % g.R) * F * lola_device_item(type);
#pragma unroll 1
    for (int f = threadIdx.x; f < F; f += THREADS)
      lola_device_store(to, f, type, lola_device_load(from, f, g.k_features.dtype));
  }
  if (g.mixing == LOLA_MIXING_CACHE_ONLY || !folded) {
    if (threadIdx.x == 0) partial[plan.columns] = 0;
    return;
  }
  const float *hidden = g.hidden + state * F * Dv, *normalizer = g.normalizer + state * F;
  const bool by_four = plan.state_vector == 4;
  const state_walk walk =
      by_four ? begin_walk<4>(hidden, plan, F, Dv, shared) : begin_walk<1>(hidden, plan, F, Dv, shared);
  const float first_s = threadIdx.x < F ? normalizer[threadIdx.x] : 0;

  query_features(g, plan, span, head, shared);

  float *reduce = reinterpret_cast<float *>(shared + plan.reduce_at), *reduce_z = reduce + THREADS * 4;
  const float *phi = reinterpret_cast<const float *>(shared + plan.phi_at);
  float z = threadIdx.x < F ? phi[threadIdx.x] * first_s : 0;
#pragma unroll 1
  for (int f = threadIdx.x + THREADS; f < F; f += THREADS) z = fmaf(phi[f], normalizer[f], z);
  z = warp_sum(z);
  if (threadIdx.x % 32 == 0) reduce_z[threadIdx.x / 32] = z;
  if (by_four)
    recall<4>(walk, plan, F, Dv, phi, reduce, reduce_z, partial);
  else
    recall<1>(walk, plan, F, Dv, phi, reduce, reduce_z, partial);
}

/* --- the merge ------------------------------------------------------------------------------------- */

/* Where a head's partials are: its tiles in order, window first, then the state. */
struct head_partials {
  const float *window, *sparse, *state;
  int64_t window_step, sparse_step; /* floats from tile to tile */
  int64_t window_tiles, tiles;      /* in use: of the window; of both */
};

__device__ __forceinline__ const float *tile_partial(const head_partials &p, int64_t tile) {
  return tile < p.window_tiles ? p.window + tile * p.window_step : p.sparse + (tile - p.window_tiles) * p.sparse_step;
}

__device__ __forceinline__ head_partials partials_of(const lola_device_segment &g, const decode_plan &plan,
                                                     int64_t group, int64_t window_pairs, const float *partials,
                                                     int j) {
  const int64_t stride = plan.columns + 4;
  const int sets = g.S / g.Hkv, set = j / g.rs;
  head_partials p;
  p.window = partials + j * stride;
  p.window_step = g.r * stride;
  p.sparse = partials + (plan.window_tiles * g.r + set * plan.sparse_tiles * g.rs + j % g.rs) * stride;
  p.sparse_step = g.rs * stride;
  p.state = partials + ((plan.window_tiles + plan.sparse_tiles) * g.r + j) * stride;
  p.window_tiles = (window_pairs + plan.pairs - 1) / plan.pairs;
  p.tiles = p.window_tiles + (g.sparse_count[group * sets + set] + plan.pairs - 1) / plan.pairs;
  return p;
}

struct head_mix {
  float high, softmax, linear;
};

__device__ __forceinline__ void merge(const lola_device_segment &g, const decode_plan &plan,
                                      const lola_device_span &span, int64_t group, int first_head, int64_t window_pairs,
                                      const float *partials, char *shared) {
  head_mix *mixes = reinterpret_cast<head_mix *>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, columns = plan.columns;
#pragma unroll 1
  for (int j = warp; j < g.r; j += WARPS) {
    const head_partials p = partials_of(g, plan, group, window_pairs, partials, j);
    const float z = __ldcg(p.state + columns);
    float high = -INFINITY, sum = 0;
    for (int64_t i = lane; i < p.tiles; i += 32) high = fmaxf(high, __ldcg(tile_partial(p, i) + columns));
    high = warp_max(high);
    for (int64_t i = lane; i < p.tiles; i += 32) {
      const float *tile = tile_partial(p, i) + columns;
      sum = fmaf(exp2f(__ldcg(tile) - high), __ldcg(tile + 1), sum);
    }
    sum = warp_sum(sum);
    if (lane) continue;
    const int head = first_head + j;
    const lola_device_weights w = lola_device_mix(g.mixing, g.gate ? g.gate[head] : 0, high, sum, z);
    mixes[j] = head_mix{high, w.softmax, w.linear};
    if (g.share.data) *reinterpret_cast<float *>(lola_device_at(g.share, span.batch, span.first, head)) = w.share;
  }
  __syncthreads();
  const int quads = columns / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < g.r * quads; i += THREADS) {
    const int j = i / quads, column = i % quads * 4;
    const head_partials p = partials_of(g, plan, group, window_pairs, partials, j);
    const head_mix mix = mixes[j];
    float o[4] = {0, 0, 0, 0}, n[4] = {0, 0, 0, 0};
    if (mix.linear != 0) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (column + e < g.Dv) n[e] = __ldcg(p.state + column + e);
    }
#pragma unroll 4
    for (int64_t t = 0; t < p.tiles; t++) {
      const float *tile = tile_partial(p, t);
      const float share = exp2f(__ldcg(tile + columns) - mix.high);
      const float4 x = __ldcg(reinterpret_cast<const float4 *>(tile + column));
      o[0] = fmaf(share, x.x, o[0]);
      o[1] = fmaf(share, x.y, o[1]);
      o[2] = fmaf(share, x.z, o[2]);
      o[3] = fmaf(share, x.w, o[3]);
    }
    char *out = lola_device_at(g.out, span.batch, span.first, first_head + j);
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (column + e < g.Dv)
        lola_device_store(out, column + e, g.out.dtype, fmaf(mix.softmax, o[e], mix.linear * n[e]));
  }
}

/* --- the kernel ------------------------------------------------------------------------------------ */

template <typename T, int LANES>
__global__ void __launch_bounds__(THREADS, 3)
    decode_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ decode_plan plan,
                  unsigned *counters, float *scratch) {
  extern __shared__ __align__(16) char shared[];
  __shared__ int last;
  const unsigned items = static_cast<unsigned>(plan.items), group = blockIdx.x / items;
  const int row = static_cast<int>(group / g.Hkv), kv_head = static_cast<int>(group % g.Hkv);
  const int sets = g.S / g.Hkv;
  int item = static_cast<int>(blockIdx.x % items);
  /* What a block needs to know of its part is asked for beside the span, not after it. */
  const int states = g.r, sparse_items = static_cast<int>(sets * plan.sparse_tiles);
  const bool is_state = item < states, is_sparse = !is_state && item < states + sparse_items;
  if (!is_state) item -= is_sparse ? states : states + sparse_items;
  const int tile = is_sparse ? item % static_cast<int>(plan.sparse_tiles) : item;
  const int set = is_sparse ? item / static_cast<int>(plan.sparse_tiles) : 0;
  const int64_t state = static_cast<int64_t>(group) * g.r + item, sparse_set = static_cast<int64_t>(group) * sets + set;
  int64_t known = 0;
  if (is_state) known = g.folded[state];
  if (is_sparse) known = g.sparse_count[sparse_set];
  const lola_device_span span = g.spans[row];
  if (span.tokens == 0) return;

  const int64_t stride = plan.columns + 4;
  float *partials = scratch + group * plan.partials * stride;
  const int64_t chunk = span.position / g.C, start = chunk * g.C - g.W, first = start > 0 ? start : 0;
  const int64_t window_pairs = span.position + 1 - first;

  if (is_state) {
    state_item(g, plan, span, state, kv_head * g.r + item, known, shared,
               partials + ((plan.window_tiles + plan.sparse_tiles) * g.r + item) * stride);
  } else {
    tile_source from = {};
    int head = kv_head * g.r, heads = g.r;
    const int64_t before = static_cast<int64_t>(tile) * plan.pairs, item_bytes = sizeof(T);
    int64_t pairs; /* of the set or the window, in all */
    float *partial;
    bool newest = false;
    if (is_sparse) {
      pairs = known;
      head += set * g.rs;
      heads = g.rs;
      from.keys = static_cast<const char *>(g.sparse_keys) + sparse_set * g.L * g.D * item_bytes;
      from.values = static_cast<const char *>(g.sparse_values) + sparse_set * g.L * g.Dv * item_bytes;
      from.slot = before;
      from.slots = g.L;
      partial = partials + (plan.window_tiles * g.r + static_cast<int64_t>(item) * g.rs) * stride;
    } else {
      pairs = window_pairs;
      from.keys = static_cast<const char *>(g.window_keys) + group * g.R * g.D * item_bytes;
      from.values = static_cast<const char *>(g.window_values) + group * g.R * g.Dv * item_bytes;
      from.slot = (first + before) % g.R;
      from.slots = g.R;
      from.key = lola_device_at(g.k, span.batch, span.first, kv_head);
      from.value = lola_device_at(g.v, span.batch, span.first, kv_head);
      partial = partials + static_cast<int64_t>(item) * g.r * stride;
      newest = before < pairs && pairs <= before + plan.pairs;
    }
    from.newest = newest ? static_cast<int>(window_pairs - 1 - before) : -1;
    if (before < pairs) {
      from.count = static_cast<int>(min(pairs - before, static_cast<int64_t>(plan.pairs)));
      attend_tile<T, LANES>(g, plan, span, from, head, heads, shared, partial);
    }
    if (newest) {
      keep_newest<T, LANES>(from, shared, g.D, plan.key_pieces, plan.cache_aligned, const_cast<char *>(from.keys));
      keep_newest<T, LANES>(from, shared + plan.values_at, g.Dv, plan.value_pieces, plan.cache_aligned,
                            const_cast<char *>(from.values));
#pragma unroll 1
      for (int s = threadIdx.x; g.scores.data && s < sets; s += THREADS) {
        const int first_head = (kv_head * sets + s) * g.rs;
        float sum = 0;
#pragma unroll 1
        for (int h = first_head; h < first_head + g.rs; h++)
          sum += *reinterpret_cast<const float *>(lola_device_at(g.scores, span.batch, span.first, h));
        g.window_given[(static_cast<int64_t>(group) * sets + s) * g.R + span.position % g.R] = sum;
      }
      if (kv_head == 0 && threadIdx.x == 0) {
        g.tokens_seen[row] = span.position + 1;
        if (chunk > g.chunks[row]) g.chunks[row] = chunk;
      }
    }
  }

  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&counters[group], 1u) == items - 1;
    if (last) counters[group] = 0;
    __threadfence();
  }
  __syncthreads();
  if (last) merge(g, plan, span, group, kv_head * g.r, window_pairs, partials, shared);
}

/* --- the launch ------------------------------------------------------------------------------------ */

struct launch_arguments {
  const lola_device_segment *segment;
  decode_plan plan;
  unsigned *counters;
  float *partials;
  unsigned blocks;
  cudaStream_t stream;
};

/* Shared memory above 48 KB must be allowed per kernel and device: done once for each size. */
template <typename T, int LANES> cudaError_t launch(const launch_arguments &a) {
  constexpr int DEVICES = 64;
  static std::atomic<int> allowed[DEVICES];
  const int bytes = static_cast<int>(a.plan.shared_bytes);
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= DEVICES || allowed[device].load(std::memory_order_relaxed) < bytes) {
    error = cudaFuncSetAttribute(decode_kernel<T, LANES>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(decode_kernel<T, LANES>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    if (device < DEVICES) allowed[device].store(bytes, std::memory_order_relaxed);
  }
  decode_kernel<T, LANES>
      <<<a.blocks, THREADS, a.plan.shared_bytes, a.stream>>>(*a.segment, a.plan, a.counters, a.partials);
  return cudaSuccess;
}

template <typename T> cudaError_t launch_lanes(const launch_arguments &a) {
  if (a.plan.lanes == 8) return launch<T, 8>(a);
  if (a.plan.lanes == 16) return launch<T, 16>(a);
  return launch<T, 32>(a);
}

bool rows_are_aligned(const lola_array &array) {
  const int64_t item = lola_device_item(array.dtype);
  return reinterpret_cast<uintptr_t>(array.data) % PIECE == 0 && array.stride_b * item % PIECE == 0 &&
         array.stride_t * item % PIECE == 0 && array.stride_h * item % PIECE == 0;
}

} // namespace

int64_t lola_cuda_decode_bytes(const lola_cache *cache) {
  const lola_shape &shape = cache->shape;
  const decode_plan plan = plan_of(shape.heads / shape.kv_heads, cache->sets / shape.kv_heads, shape.head_dim,
                                   shape.value_dim, shape.feature_dim, cache->ring, cache->config.sparse, shape.dtype);
  const int64_t groups = shape.batch * shape.kv_heads;
  return counter_bytes(groups) + groups * plan.partials * (plan.columns + INT64_C(4)) * 4;
}

lola_status lola_cuda_decode(const lola_device_segment *segment, void *scratch, cudaStream_t stream,
                             lola_message *message) {
  const lola_device_segment &g = *segment;
  const int64_t groups = static_cast<int64_t>(g.B) * g.Hkv;
  if (!groups) return LOLA_OK;
  decode_plan plan = plan_of(g.r, g.S / g.Hkv, g.D, g.Dv, g.F, g.R, g.L, g.dtype);
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess && plan.shared_bytes + 64 > most)
    return lola_fail(
        message, LOLA_VALUE_ERROR,
        "heads / kv_heads = %d, head_dim = %d, value_dim = %d and feature_dim = %d need %lld bytes of shared "
        "memory to decode, this device has %d: pass smaller ones",
        g.r, g.D, g.Dv, g.F, static_cast<long long>(plan.shared_bytes), most);
  if (plan.items > INT64_C(0x7fffffff) / groups)
    return lola_fail(message, LOLA_VALUE_ERROR,
                     "a batch of %d with window %lld and sparse %d is too large for one decoding step: pass fewer rows",
                     g.B, static_cast<long long>(g.W), g.L);
  const int64_t item = lola_device_item(g.dtype);
  plan.cache_aligned = g.D * item % PIECE == 0 && g.Dv * item % PIECE == 0;
  plan.call_aligned = plan.cache_aligned && rows_are_aligned(g.k) && rows_are_aligned(g.v);
  const bool hedgehog = g.map.kind == LOLA_MAP_HEDGEHOG || g.map.kind == LOLA_MAP_HEDGEHOG_EXP;
  const int M = hedgehog ? g.F / 2 : g.F;
  plan.weight_vector = M % 4 == 0 && reinterpret_cast<uintptr_t>(g.map.w_q) % PIECE == 0 ? 4 : 1;
  plan.weight_lanes = power_of_two(divided_up(M, plan.weight_vector), 32);
  const launch_arguments a = {segment,
                              plan,
                              static_cast<unsigned *>(scratch),
                              reinterpret_cast<float *>(static_cast<char *>(scratch) + counter_bytes(groups)),
                              static_cast<unsigned>(groups * plan.items),
                              stream};
  if (error == cudaSuccess)
    error = g.dtype == LOLA_FLOAT32   ? launch_lanes<float>(a)
            : g.dtype == LOLA_FLOAT16 ? launch_lanes<__half>(a)
                                      : launch_lanes<__nv_bfloat16>(a);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return lola_fail(message, LOLA_DEVICE_ERROR, "CUDA kernel decode could not be set up: %s",
                     cudaGetErrorString(error));
  }
  return lola_cuda_launched("decode", message);
}
