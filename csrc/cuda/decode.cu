/* decode: one token for each row that is not idle, one launch.
 *
 * The bytes of window, sparse cache and hidden state are the floor, so their reading is spread over many blocks: for
 * each (row, KV head) one block per query head for phi(q)^T H (a float32 F x Dv state, decode_state.cuh), one per tile
 * of sparse pairs and one per tile of window pairs (decode_matrix.cuh for 16-bit caches, else decode_generic.cuh). A
 * block asks for all that it reads before it waits for anything. Each leaves a partial in scratch: float32 sums o
 * (Dv,), maximum m in base 2 and sum l per query head, or N (Dv,) and z. The block of a (row, KV head) that arrives
 * last merges them in order of tile, mixes (Eq. 14) and writes the output, so the result does not depend on which one
 * it is. Tiles are fixed by the cache's sizes alone: the same row gives the same bits in any batch. The block that
 * holds the newest pair writes it into the window ring and advances the counters, which no other reads. */
#include "chain.cuh"
#include "decode.cuh"
#include "decode_generic.cuh"
#include "decode_matrix.cuh"
#include "decode_state.cuh"

namespace {

/* Blocks per multiprocessor up to which a grid is small: it does not fill memory's queues for long, so each block asks
 * for its part before it knows its row. */
constexpr int SMALL_GRID = 3;

/* --- the plan -------------------------------------------------------------------------------------- */

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* The least power of two that is not below n, but no more than 32, base 2. */
int shift_of(int64_t n) {
  int shift = 0;
  while (shift < 5 && (INT64_C(1) << shift) < n) shift++;
  return shift;
}

divisor divisor_of(int64_t d) { return divisor{d > 0 ? UINT64_MAX / static_cast<uint64_t>(d) + 1 : 0, d}; }

struct plan_sizes {
  int64_t r, sets, D, Dv, F, R, L; /* query heads and sets per KV head */
  lola_dtype dtype;
};

/* Whether 16-bit pairs can go to the matrix units. */
bool fits_matrix(const plan_sizes &sizes) {
  return sizes.dtype != LOLA_FLOAT32 && sizes.D % 8 == 0 && sizes.Dv % 8 == 0;
}

/* Whether a tile of them does not stay in a warp's hands. */
bool is_long(const plan_sizes &sizes) { return sizes.D > SPAN || sizes.Dv > SPAN || sizes.r > MATRIX_HEADS; }

/* Tiles and partials. */
decode_plan plan_of(const plan_sizes &sizes, bool matrix) {
  const int64_t per_piece = PIECE / lola_device_item(sizes.dtype);
  decode_plan p = {};
  const int64_t key_pieces = divided_up(sizes.D, per_piece), value_pieces = divided_up(sizes.Dv, per_piece);
  const int64_t widest = key_pieces > value_pieces ? key_pieces : value_pieces;
  p.matrix = matrix;
  p.key_pieces = static_cast<int>(key_pieces);
  p.value_pieces = static_cast<int>(value_pieces);
  p.columns = static_cast<int>(value_pieces * per_piece);
  p.lanes = widest <= 8 ? 8 : widest <= 16 ? 16 : 32;
  if (matrix) {
    p.pairs = MATRIX_PAIRS;
  } else {
    const int64_t groups = THREADS / p.lanes, pass_bytes = groups * (key_pieces + value_pieces) * PIECE;
    int64_t rows = TILE_BYTES / pass_bytes;
    rows = rows < 1 ? 1 : rows > ROWS ? ROWS : rows;
    p.pairs = static_cast<int>(rows * groups);
  }
  p.window_tiles = divided_up(sizes.R, p.pairs);
  p.sparse_tiles = divided_up(sizes.L, p.pairs);
  p.items = sizes.r + sizes.sets * p.sparse_tiles + p.window_tiles;
  p.slots = p.window_tiles + p.sparse_tiles + 1;
  return p;
}

int64_t scratch_floats(const decode_plan &plan, int64_t r) { return r * plan.slots * (plan.columns + INT64_C(4)); }

/* Where things lie in shared memory. 64-bit sums: a size too large shows in shared_bytes, and nothing runs. */
void place_shared(const plan_sizes &sizes, int64_t M, decode_plan *p) {
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t place = at;
    at += divided_up(bytes, PIECE) * PIECE;
    return static_cast<int>(place);
  };
  int64_t most = sizes.r * 4 * 4;
  if (p->matrix) {
    p->merge_at = take(WARPS * WARP_BYTES); /* keys and values, which the sums replace */
    p->queries_at = take(sizes.r * query_pitch(static_cast<int>(sizes.D)));
    p->newest_at = take((sizes.D + sizes.Dv) * 2);
    p->sums_at = take(WARPS * MATRIX_HEADS * 2 * 4);
    if (is_long(sizes)) p->merge_at = take(WARPS * MATRIX_HEADS * INT64_C(4) * merge_pitch(static_cast<int>(sizes.Dv)));
  } else {
    take(p->pairs * INT64_C(1) * p->key_pieces * PIECE); /* keys */
    p->values_at = take(p->pairs * INT64_C(1) * p->value_pieces * PIECE);
    p->merge_at = take(WARPS * HEADS * INT64_C(4) * p->columns);
    p->sums_at = take(WARPS * HEADS * 2 * 4);
    p->weight_at = take(WARPS * ROWS * (32 / p->lanes) * HEADS * 4);
    p->queries_at = take(sizes.r * p->key_pieces * (PIECE / lola_device_item(sizes.dtype)) * 4);
  }
  if (at > most) most = at;

  at = 0;
  p->state_vector = sizes.Dv % 4 ? 1 : 4;
  p->state_shift = shift_of(divided_up(sizes.Dv, p->state_vector));
  const int64_t groups = THREADS >> p->state_shift, columns = p->state_vector << p->state_shift;
  const bool even = p->state_vector == 4 && sizes.Dv == columns && sizes.F % (groups * PASSES) == 0;
  if (even) {
    const int64_t stages = sizes.F / (groups * PASSES);
    p->state_stages = static_cast<int>(stages);
    take((stages < AHEAD ? stages : AHEAD) * STAGE_FLOATS * 4);
  } else {
    const int64_t copies = divided_up(sizes.F, groups) * divided_up(sizes.Dv, columns);
    take((copies < DEPTH ? copies : DEPTH) * THREADS * p->state_vector * 4);
  }
  const int64_t block = p->weight_vector << p->weight_shift;
  const int64_t parts = divided_up(M, block) * THREADS * p->weight_vector * 4, sums = (THREADS * 4 + WARPS) * 4;
  p->reduce_at = take(parts > sums ? parts : sums);
  p->x_at = take(sizes.D * 4);
  p->phi_at = take(sizes.F * 4);
  if (at > most) most = at;
  p->shared_bytes = most;
}

/* Scratch: a counter of arrivals per (row, KV head), zero between launches; then the partials. */
int64_t counter_bytes(int64_t groups) { return divided_up(groups * 4, 256) * 256; }

/* --- the merge ------------------------------------------------------------------------------------- */

/* Tiles that n pairs fill. */
__device__ __forceinline__ int tiles_of(const decode_plan &plan, int64_t n) {
  return static_cast<int>(divided(static_cast<unsigned>(n + plan.pairs - 1), plan.by_pairs));
}

/* One warp a query head, four columns a lane; tiles in order, window first, then the state. Everything is asked for
 * before anything is used, up to MERGE tiles at a time. `first_count` is the number of sparse pairs that head `warp`
 * sees. */
__device__ __forceinline__ void merge(const lola_device_segment &g, const decode_plan &plan,
                                      const lola_device_span &span, int64_t group, int kv_head, int64_t window_pairs,
                                      int first_count, const float *partials) {
  constexpr int MERGE = 12, LANE_COLUMNS = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int stride = plan.columns + 4, slots = static_cast<int>(plan.slots),
            window_tiles = tiles_of(plan, window_pairs);
  const int gap = (static_cast<int>(plan.window_tiles) - window_tiles) * stride; /* to the first sparse tile */
#pragma unroll 1
  for (int j = warp; j < g.r; j += WARPS) {
    int64_t count = first_count;
    if (j != warp && g.L) {
      const unsigned set = divided(static_cast<unsigned>(j), plan.by_rs);
      count = g.sparse_count[group * (g.S / g.Hkv) + set];
    }
    const int tiles = window_tiles + tiles_of(plan, count);
    const float *own = partials + static_cast<int64_t>(j) * slots * stride;
    const float *state = own + (slots - 1) * stride;
    const int head = kv_head * g.r + j;
    const float gate = g.gate ? g.gate[head] : 0;
    const float z = __ldcg(state + plan.columns);
    char *out = lola_device_at(g.out, span.batch, span.first, head);
#pragma unroll 1
    for (int base = 0; base < plan.columns; base += 32 * LANE_COLUMNS) {
      const int column = base + lane * LANE_COLUMNS;
      const bool in = column < plan.columns;
      float n[4] = {0, 0, 0, 0}; /* of columns that exist: the state leaves the others unwritten */
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (column + e < g.Dv) n[e] = __ldcg(state + column + e);
      float high = -INFINITY, sum = 0, o[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int first = 0; first < tiles; first += MERGE) {
        const int left = min(tiles - first, MERGE);
        float4 x[MERGE];
#pragma unroll
        for (int t = 0; t < MERGE; t++) {
          const int at = (first + t) * stride + (first + t < window_tiles ? 0 : gap) + column;
          x[t] = make_float4(0, 0, 0, 0);
          if (t < left && in) x[t] = __ldcg(reinterpret_cast<const float4 *>(own + at));
        }
        const int at = (first + lane) * stride + (first + lane < window_tiles ? 0 : gap) + plan.columns;
        float2 pair = make_float2(-INFINITY, 0);
        if (lane < left) pair = __ldcg(reinterpret_cast<const float2 *>(own + at));
        const float higher = fmaxf(high, warp_max(pair.x));
        const float before = weight_below(high, higher), share = weight_below(pair.x, higher);
        high = higher;
        sum = fmaf(before, sum, warp_sum(share * pair.y));
#pragma unroll
        for (int e = 0; e < 4; e++) o[e] *= before;
#pragma unroll
        for (int t = 0; t < MERGE; t++) {
          const float w = __shfl_sync(ALL, share, t);
          o[0] = fmaf(w, x[t].x, o[0]);
          o[1] = fmaf(w, x[t].y, o[1]);
          o[2] = fmaf(w, x[t].z, o[2]);
          o[3] = fmaf(w, x[t].w, o[3]);
        }
      }
      const lola_device_weights w = lola_device_mix(g.mixing, gate, high, sum, z);
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (column + e < g.Dv) {
          const float linear = w.linear != 0 ? w.linear * n[e] : 0; /* N is unwritten where nothing is folded */
          lola_device_store(out, column + e, g.out.dtype, fmaf(w.softmax, o[e], linear));
        }
      if (base == 0 && lane == 0 && g.share.data)
        *reinterpret_cast<float *>(lola_device_at(g.share, span.batch, span.first, head)) = w.share;
    }
  }
}

/* --- the kernel ------------------------------------------------------------------------------------ */

/* What a block works on. */
struct block_part {
  unsigned group; /* (row, KV head) */
  int row, kv_head;
  bool is_state, is_sparse; /* otherwise the window */
  int set, tile;            /* of a state: tile is the query head */
};

__device__ __forceinline__ block_part part_of(const lola_device_segment &g, const decode_plan &plan) {
  block_part b;
  b.group = divided(blockIdx.x, plan.by_items);
  b.row = static_cast<int>(divided(b.group, plan.by_kv_heads));
  b.kv_head = static_cast<int>(b.group) - b.row * g.Hkv;
  const int sets = g.S / g.Hkv, sparse_items = sets * static_cast<int>(plan.sparse_tiles);
  int item = static_cast<int>(blockIdx.x - b.group * static_cast<unsigned>(plan.items));
  b.is_state = item < g.r;
  b.is_sparse = !b.is_state && item < g.r + sparse_items;
  b.set = 0;
  if (!b.is_state) item -= b.is_sparse ? g.r : g.r + sparse_items;
  if (b.is_sparse) {
    b.set = static_cast<int>(divided(static_cast<unsigned>(item), plan.by_sparse_tiles));
    item -= b.set * static_cast<int>(plan.sparse_tiles);
  }
  b.tile = item;
  return b;
}

/* Into L2, by one thread, all that the block may read; before the kernels before this one have ended. */
__device__ __forceinline__ void prefetch_part(const lola_device_segment &g, const decode_plan &plan,
                                              const block_part &b) {
  const int64_t item = lola_device_item(g.dtype);
  if (b.is_state) {
    const int64_t head = b.kv_head * g.r + b.tile, state = static_cast<int64_t>(b.group) * g.r + b.tile;
    if (g.mixing == LOLA_MIXING_CACHE_ONLY || g.F * g.Dv % 4) return;
    prefetch(g.hidden + state * g.F * g.Dv, g.F * INT64_C(4) * g.Dv);
    const int M = is_hedgehog(g.map) ? g.F / 2 : g.F;
    if (g.map.w_q && plan.weight_vector == 4) prefetch(g.map.w_q + head * g.D * M, g.D * INT64_C(4) * M);
    return;
  }
  if (!plan.cache_aligned) return;
  const int64_t slots = b.is_sparse ? g.L : g.R, before = b.tile * static_cast<int64_t>(plan.pairs);
  const int64_t count = min(slots - before, static_cast<int64_t>(plan.pairs));
  const int64_t place = b.is_sparse ? static_cast<int64_t>(b.group) * (g.S / g.Hkv) + b.set : b.group;
  const char *keys = static_cast<const char *>(b.is_sparse ? g.sparse_keys : g.window_keys);
  const char *values = static_cast<const char *>(b.is_sparse ? g.sparse_values : g.window_values);
  prefetch(keys + (place * slots + before) * g.D * item, count * g.D * item);
  prefetch(values + (place * slots + before) * g.Dv * item, count * g.Dv * item);
}

/* How tiles are worked on: on the matrix units, keys and values of up to SPAN elements or longer; otherwise the number
 * of threads that share a pair. */
enum { MATRIX = 0, LONG_MATRIX = 1 };

/* The first pair of a row's window, and how many there are with the newest. */
struct row_window {
  bool small;
  int64_t chunk, first, pairs;
};

__device__ __forceinline__ row_window window_of(const lola_device_segment &g, const decode_plan &plan,
                                                int64_t position) {
  row_window w;
  w.small = plan.small_sizes && position < INT64_C(0x7fffffff);
  w.chunk = divided(position, plan.by_C, w.small);
  const int64_t start = w.chunk * g.C - g.W;
  w.first = start > 0 ? start : 0;
  w.pairs = position + 1 - w.first;
  return w;
}

template <typename T, int LANES>
__global__ void __launch_bounds__(THREADS, 3)
    decode_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ decode_plan plan,
                  unsigned *counters, float *scratch) {
  extern __shared__ __align__(16) char shared[];
  /* What is needed once more at the end waits in shared memory, not in registers. */
  __shared__ lola_device_span kept;
  __shared__ int first_counts[WARPS];
  __shared__ int last;
  const block_part b = part_of(g, plan);
  if (plan.prefetch && threadIdx.x == 0) prefetch_part(g, plan, b);
  lola_device_await_previous();

  /* What a block needs to know of its part is asked for beside the span, not after it. */
  const int sets = g.S / g.Hkv;
  const int64_t state = static_cast<int64_t>(b.group) * g.r + b.tile;
  const int64_t first_set = static_cast<int64_t>(b.group) * sets, sparse_set = first_set + b.set;
  int64_t known = 0;
  if (b.is_state) known = g.folded[state];
  if (b.is_sparse) known = g.sparse_count[sparse_set];
  int64_t first_count = 0; /* of sparse pairs that head `threadIdx.x` sees, for the merge */
  if (g.L && threadIdx.x < WARPS) {
    const int merged = min(static_cast<int>(threadIdx.x), g.r - 1);
    first_count = g.sparse_count[first_set + divided(static_cast<unsigned>(merged), plan.by_rs)];
  }
  const lola_device_span span = g.spans[b.row];
  if (span.tokens == 0) return;
  if (threadIdx.x == 0) kept = span;
  if (threadIdx.x < WARPS) first_counts[threadIdx.x] = static_cast<int>(first_count);

  const int64_t stride = plan.columns + 4, head_step = plan.slots * stride;
  float *partials = scratch + b.group * g.r * head_step;
  if (b.is_state) {
    float *partial = partials + b.tile * head_step + (plan.slots - 1) * stride;
    state_item(g, plan, span, state, b.kv_head * g.r + b.tile, known, shared, partial);
  } else {
    const row_window window = window_of(g, plan, span.position);
    tile_source from = {};
    int head = b.kv_head * g.r, heads = g.r;
    const int64_t before = static_cast<int64_t>(b.tile) * plan.pairs, item_bytes = sizeof(T);
    int64_t pairs; /* of the set or the window, in all */
    tile_target to = {partials + b.tile * stride, head_step};
    bool newest = false;
    if (b.is_sparse) {
      pairs = known;
      head += b.set * g.rs;
      heads = g.rs;
      from.keys = static_cast<const char *>(g.sparse_keys) + sparse_set * g.L * g.D * item_bytes;
      from.values = static_cast<const char *>(g.sparse_values) + sparse_set * g.L * g.Dv * item_bytes;
      from.slot = before;
      from.slots = g.L;
      to.partial += b.set * g.rs * head_step + plan.window_tiles * stride;
    } else {
      pairs = window.pairs;
      from.keys = static_cast<const char *>(g.window_keys) + b.group * g.R * g.D * item_bytes;
      from.values = static_cast<const char *>(g.window_values) + b.group * g.R * g.Dv * item_bytes;
      from.slot = window.first + before;
      from.slot -= divided(from.slot, plan.by_R, window.small) * g.R;
      from.slots = g.R;
      from.key = lola_device_at(g.k, span.batch, span.first, b.kv_head);
      from.value = lola_device_at(g.v, span.batch, span.first, b.kv_head);
      newest = before < pairs && pairs <= before + plan.pairs;
    }
    from.newest = newest ? static_cast<int>(pairs - 1 - before) : -1;
    if (before < pairs) {
      from.count = static_cast<int>(min(pairs - before, static_cast<int64_t>(plan.pairs)));
      if constexpr (LANES == MATRIX || LANES == LONG_MATRIX)
        attend_matrix<T, LANES == LONG_MATRIX>(g, plan, span, from, head, heads, shared, to);
      else
        attend_tile<T, LANES>(g, plan, span, from, head, heads, shared, to);
    }
    if (from.newest >= 0) {
      const int64_t position = kept.position;
#pragma unroll 1
      for (int s = threadIdx.x; g.scores.data && s < sets; s += THREADS) {
        const int first_head = (b.kv_head * sets + s) * g.rs;
        float sum = 0;
#pragma unroll 1
        for (int h = first_head; h < first_head + g.rs; h++)
          sum += *reinterpret_cast<const float *>(lola_device_at(g.scores, kept.batch, kept.first, h));
        g.window_given[(first_set + s) * g.R + position % g.R] = sum;
      }
      if (b.kv_head == 0 && threadIdx.x == 0) {
        const int64_t chunk = window_of(g, plan, position).chunk;
        g.tokens_seen[b.row] = position + 1;
        if (chunk > g.chunks[b.row]) g.chunks[b.row] = chunk;
      }
    }
  }

  __syncthreads();
  if (threadIdx.x == 0) {
    last = arrive(&counters[b.group]) == static_cast<unsigned>(plan.items) - 1;
    if (last) counters[b.group] = 0;
  }
  __syncthreads();
  if (last)
    merge(g, plan, kept, b.group, b.kv_head, window_of(g, plan, kept.position).pairs, first_counts[threadIdx.x / 32],
          partials);
}

/* --- the launch ------------------------------------------------------------------------------------ */

struct launch_arguments {
  const lola_device_segment *segment;
  decode_plan plan;
  unsigned *counters;
  float *partials;
  unsigned blocks;
  bool is_long;
  cudaStream_t stream;
};

constexpr int DEVICES = 64;

/* Shared memory above 48 KB must be allowed per kernel and device: done once for each size. */
template <typename T, int LANES> cudaError_t launch(const launch_arguments &a, int device) {
  static std::atomic<int> allowed[DEVICES];
  const int bytes = static_cast<int>(a.plan.shared_bytes);
  if (device >= DEVICES || allowed[device].load(std::memory_order_relaxed) < bytes) {
    cudaError_t error =
        cudaFuncSetAttribute(decode_kernel<T, LANES>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(decode_kernel<T, LANES>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    if (device < DEVICES) allowed[device].store(bytes, std::memory_order_relaxed);
  }
  return lola_cuda_launch_chained(decode_kernel<T, LANES>, a.blocks, THREADS, a.plan.shared_bytes, a.stream, *a.segment,
                                  a.plan, a.counters, a.partials);
}

template <typename T> cudaError_t launch_lanes(const launch_arguments &a, int device) {
  if constexpr (sizeof(T) == 2) {
    if (a.plan.matrix) return a.is_long ? launch<T, LONG_MATRIX>(a, device) : launch<T, MATRIX>(a, device);
  }
  if (a.plan.lanes == 8) return launch<T, 8>(a, device);
  if (a.plan.lanes == 16) return launch<T, 16>(a, device);
  return launch<T, 32>(a, device);
}

struct device_limits {
  int shared_bytes, processors;
};

/* Asked for once per device. */
cudaError_t limits_of(int device, device_limits *limits) {
  static std::atomic<int> shared_bytes[DEVICES], processors[DEVICES];
  if (device < DEVICES) {
    limits->shared_bytes = shared_bytes[device].load(std::memory_order_relaxed);
    limits->processors = processors[device].load(std::memory_order_relaxed);
    if (limits->shared_bytes && limits->processors) return cudaSuccess;
  }
  cudaError_t error = cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limits->processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && device < DEVICES) {
    shared_bytes[device].store(limits->shared_bytes, std::memory_order_relaxed);
    processors[device].store(limits->processors, std::memory_order_relaxed);
  }
  return error;
}

bool rows_are_aligned(const lola_array &array) {
  const int64_t item = lola_device_item(array.dtype);
  return reinterpret_cast<uintptr_t>(array.data) % PIECE == 0 && array.stride_b * item % PIECE == 0 &&
         array.stride_t * item % PIECE == 0 && array.stride_h * item % PIECE == 0;
}

} // namespace

int64_t lola_cuda_decode_bytes(const lola_cache *cache) {
  const lola_shape &shape = cache->shape;
  const plan_sizes sizes = {shape.heads / shape.kv_heads,
                            cache->sets / shape.kv_heads,
                            shape.head_dim,
                            shape.value_dim,
                            shape.feature_dim,
                            cache->ring,
                            cache->config.sparse,
                            shape.dtype};
  const int64_t groups = shape.batch * shape.kv_heads;
  int64_t floats = scratch_floats(plan_of(sizes, false), sizes.r);
  if (fits_matrix(sizes)) {
    const int64_t others = scratch_floats(plan_of(sizes, true), sizes.r);
    if (others > floats) floats = others;
  }
  return counter_bytes(groups) + groups * floats * 4;
}

lola_status lola_cuda_decode(const lola_device_segment *segment, void *scratch, cudaStream_t stream,
                             lola_message *message) {
  const lola_device_segment &g = *segment;
  const int64_t groups = static_cast<int64_t>(g.B) * g.Hkv;
  if (!groups) return LOLA_OK;
  const plan_sizes sizes = {g.r, g.S / g.Hkv, g.D, g.Dv, g.F, g.R, g.L, g.dtype};
  /* Halves of float16 do not hold every q of another type, those of bfloat16 do. */
  const bool matrix = fits_matrix(sizes) && (g.dtype == LOLA_BFLOAT16 || g.q.dtype == g.dtype);
  decode_plan plan = plan_of(sizes, matrix);
  int device = 0;
  device_limits limits = {};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = limits_of(device, &limits);
  if (plan.items > INT64_C(0x7fffffff) / groups || scratch_floats(plan, 1) > INT64_C(0x7fffffff))
    return lola_fail(message, LOLA_VALUE_ERROR,
                     "a batch of %d with window %lld and sparse %d is too large for one decoding step: pass fewer rows",
                     g.B, static_cast<long long>(g.W), g.L);
  const int64_t blocks = groups * plan.items, item = lola_device_item(g.dtype);
  const int M = is_hedgehog(g.map) ? g.F / 2 : g.F;
  plan.prefetch = blocks <= static_cast<int64_t>(SMALL_GRID) * limits.processors;
  plan.weight_vector = M % 4 == 0 && reinterpret_cast<uintptr_t>(g.map.w_q) % PIECE == 0 ? 4 : 1;
  plan.weight_shift = shift_of(divided_up(M, plan.weight_vector));
  place_shared(sizes, M, &plan);
  if (error == cudaSuccess && plan.shared_bytes + 64 > limits.shared_bytes)
    return lola_fail(
        message, LOLA_VALUE_ERROR,
        "heads / kv_heads = %d, head_dim = %d, value_dim = %d and feature_dim = %d need %lld bytes of shared "
        "memory to decode, this device has %d: pass smaller ones",
        g.r, g.D, g.Dv, g.F, static_cast<long long>(plan.shared_bytes), limits.shared_bytes);
  plan.cache_aligned = g.D * item % PIECE == 0 && g.Dv * item % PIECE == 0;
  plan.call_aligned = plan.cache_aligned && rows_are_aligned(g.k) && rows_are_aligned(g.v);
  plan.query_aligned = g.q.dtype == g.dtype && rows_are_aligned(g.q);
  plan.by_items = divisor_of(plan.items);
  plan.by_kv_heads = divisor_of(g.Hkv);
  plan.by_sparse_tiles = divisor_of(plan.sparse_tiles);
  plan.by_rs = divisor_of(g.rs);
  plan.by_pairs = divisor_of(plan.pairs);
  plan.by_C = divisor_of(g.C);
  plan.by_R = divisor_of(g.R);
  plan.small_sizes = g.C < INT64_C(0x40000000) && g.W < INT64_C(0x40000000) && g.R < INT64_C(0x40000000);
  const launch_arguments a = {segment,
                              plan,
                              static_cast<unsigned *>(scratch),
                              reinterpret_cast<float *>(static_cast<char *>(scratch) + counter_bytes(groups)),
                              static_cast<unsigned>(blocks),
                              is_long(sizes),
                              stream};
  if (error == cudaSuccess)
    error = g.dtype == LOLA_FLOAT32   ? launch_lanes<float>(a, device)
            : g.dtype == LOLA_FLOAT16 ? launch_lanes<__half>(a, device)
                                      : launch_lanes<__nv_bfloat16>(a, device);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return lola_fail(message, LOLA_DEVICE_ERROR, "CUDA kernel decode could not be launched: %s",
                     cudaGetErrorString(error));
  }
  return lola_cuda_launched("decode", message);
}
