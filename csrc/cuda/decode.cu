/* decode: one token for each row that is not idle. The update of the cache where one kernel does it (scan_update.cuh),
 * phi(q) (decode_queries.cuh), the update where it takes more, then everything else; they run beside one another as far
 * as they can, and start before the step begins (decode_rows.cuh). A small batch goes through a kernel of its own
 * (decode_small.cuh) behind the update.
 *
 * The bytes of window, sparse cache and hidden state are the floor, so their reading is spread over many blocks: each
 * (row, KV head) has an item per part of a query head's state for phi(q)^T H (a float32 F x Dv state), one per tile of
 * sparse pairs and one per tile of window pairs. For 16-bit caches of the usual width a block takes one item after the
 * other (decode_pipeline.cuh); otherwise it takes one (decode_state.cuh, and decode_matrix.cuh for 16-bit caches, else
 * decode_generic.cuh) and asks for all that it reads before it waits for anything. An item leaves a partial in scratch:
 * float32 sums o (Dv,), maximum m in base 2 and sum l per query head, or N (Dv,) and z. They are merged in order of
 * tile (decode_merge.cuh), by the block of a (row, KV head) that arrives last, or by a kernel behind, which mixes (Eq.
 * 14) and writes the output. Items are fixed by the cache's sizes alone: the same row gives the same bits in any batch.
 * The block that holds the newest pair, or the one that merges, writes that pair into the window ring and advances the
 * counters, which by then no other reads. */
#include "decode_generic.cuh"
#include "decode_matrix.cuh"
#include "decode_merge.cuh"
#include "decode_pipeline.cuh"
#include "decode_queries.cuh"
#include "decode_small.cuh"
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

struct plan_sizes {
  int64_t r, sets, D, Dv, F, R, L; /* query heads and sets per KV head */
  lola_dtype dtype;
};

/* Whether 16-bit pairs can go to the matrix units. */
bool fits_matrix(const plan_sizes &sizes) {
  return sizes.dtype != LOLA_FLOAT32 && sizes.D % 8 == 0 && sizes.Dv % 8 == 0;
}

/* Whether they go through the pipeline; sizes alone say so. */
bool fits_pipeline(const plan_sizes &sizes) {
  return sizes.dtype != LOLA_FLOAT32 && sizes.D == WIDE && sizes.Dv == WIDE && sizes.F % UNIT_PAIRS == 0 &&
         sizes.r <= MATRIX_HEADS && sizes.R < (1 << 30) && sizes.L < (1 << 30);
}

/* Whether a tile of them does not stay in a warp's hands. */
bool is_long(const plan_sizes &sizes) { return sizes.D > SPAN || sizes.Dv > SPAN || sizes.r > MATRIX_HEADS; }

/* Tiles and partials. */
decode_plan plan_of(const plan_sizes &sizes, bool matrix) {
  const int64_t per_piece = PIECE / lola_device_item(sizes.dtype);
  decode_plan p = {};
  p.pipeline = matrix && fits_pipeline(sizes);
  const int64_t key_pieces = divided_up(sizes.D, per_piece), value_pieces = divided_up(sizes.Dv, per_piece);
  const int64_t widest = key_pieces > value_pieces ? key_pieces : value_pieces;
  p.matrix = matrix;
  p.key_pieces = static_cast<int>(key_pieces);
  p.value_pieces = static_cast<int>(value_pieces);
  p.columns = static_cast<int>(value_pieces * per_piece);
  p.lanes = widest <= 8 ? 8 : widest <= 16 ? 16 : 32;
  if (p.pipeline) {
    p.pairs = UNIT_PAIRS;
  } else if (matrix) {
    p.pairs = MATRIX_PAIRS;
  } else {
    const int64_t groups = THREADS / p.lanes, pass_bytes = groups * (key_pieces + value_pieces) * PIECE;
    int64_t rows = TILE_BYTES / pass_bytes;
    rows = rows < 1 ? 1 : rows > ROWS ? ROWS : rows;
    p.pairs = static_cast<int>(rows * groups);
  }
  p.window_tiles = divided_up(sizes.R, p.pairs);
  p.sparse_tiles = divided_up(sizes.L, p.pairs);
  p.sets = static_cast<int>(sizes.sets);
  p.state_parts = p.pipeline ? static_cast<int>(sizes.F / UNIT_PAIRS) : 1;
  p.state_items = sizes.r * p.state_parts;
  p.sparse_items = sizes.sets * p.sparse_tiles;
  p.items = p.state_items + p.sparse_items + p.window_tiles;
  p.slots = p.window_tiles + p.sparse_tiles + p.state_parts;
  p.head_floats = p.slots * (p.columns + 4);
  p.group_floats = sizes.r * p.head_floats;
  return p;
}

/* Where things lie in shared memory. 64-bit sums: a size too large shows in shared_bytes, and nothing runs. */
void place_shared(const plan_sizes &sizes, decode_plan *p) {
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
  p->reduce_at = take((THREADS * 4 + WARPS) * 4);
  p->phi_at = take(sizes.F * 4);
  if (at > most) most = at;
  p->shared_bytes = most;
}

/* Scratch: signals; counters of arrivals per (row, KV head) and per row, zero between steps; rows; phi(q);
 * partials. */
int64_t counter_bytes(int64_t B, int64_t Hkv) { return divided_up(B * (Hkv + 1) * 4, 256) * 256; }
int64_t rows_bytes(int64_t B) { return divided_up(B * static_cast<int64_t>(sizeof(decode_row) + 4), 256) * 256; }
int64_t phi_bytes(int64_t heads, int64_t F) { return divided_up(heads * F * 4, 256) * 256; }

/* --- the begin ------------------------------------------------------------------------------------- */

/* The step begins, where no update says so. */
__global__ void __launch_bounds__(THREADS)
    decode_begin_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ call_rows rows,
                        const __grid_constant__ row_plan plan, const decode_rows known) {
  lola_device_start_next();
  lola_device_await_previous();
  begin_step(g, plan, rows, known);
}

/* --- an item a block ------------------------------------------------------------------------------- */

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
    const int64_t state = static_cast<int64_t>(b.group) * g.r + b.tile;
    if (g.mixing == LOLA_MIXING_CACHE_ONLY || g.F * g.Dv % 4) return;
    prefetch(g.hidden + state * g.F * g.Dv, g.F * INT64_C(4) * g.Dv);
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
  w.small = plan.row.small_sizes && position < INT64_C(0x7fffffff);
  w.chunk = divided(position, plan.row.by_C, w.small);
  const int64_t start = w.chunk * g.C - g.W;
  w.first = start > 0 ? start : 0;
  w.pairs = position + 1 - w.first;
  return w;
}

template <typename T, int LANES>
__global__ void __launch_bounds__(THREADS, 3)
    decode_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ decode_plan plan,
                  decode_signals *signals, unsigned *counters, const float *query_phi, float *scratch) {
  extern __shared__ __align__(16) char shared[];
  /* What is needed once more at the end waits in shared memory, not in registers. */
  __shared__ lola_device_span kept;
  __shared__ int first_counts[WARPS];
  __shared__ int last;
  const block_part b = part_of(g, plan);
  if (plan.prefetch && threadIdx.x == 0) prefetch_part(g, plan, b);
  lola_device_await_previous();
  if (blockIdx.x == 0 && threadIdx.x == 0) forget_begin(signals);

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

  const int64_t stride = plan.columns + 4, head_step = plan.head_floats;
  float *partials = scratch + b.group * plan.group_floats;
  if (b.is_state) {
    float *partial = partials + b.tile * head_step + (plan.slots - 1) * stride;
    state_item(g, plan, span, state, b.kv_head * g.r + b.tile, known, query_phi, shared, partial);
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
      from.slot -= divided(from.slot, plan.row.by_R, window.small) * g.R;
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
      for (int s = threadIdx.x; g.scores.data && s < sets; s += THREADS)
        lola_device_keep_given(g, b.row, b.kv_head * sets + s, position % g.R, kept.batch, kept.first);
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
  if (!last) return;
  const auto count_of = [&](int j) -> int64_t {
    if (j < WARPS || !g.L) return first_counts[threadIdx.x / 32];
    return g.sparse_count[first_set + divided(static_cast<unsigned>(j), plan.by_rs)];
  };
  merge(g, plan, kept.batch, kept.first, b.kv_head, window_of(g, plan, kept.position).pairs, count_of, partials);
}

/* --- the launches ----------------------------------------------------------------------------------- */

constexpr int DEVICES = 64;

/* Shared memory above 48 KB must be allowed per kernel and device: done once for each size. */
template <auto KERNEL> cudaError_t allow_shared(int64_t bytes, int device) {
  static std::atomic<int64_t> allowed[DEVICES];
  if (device < DEVICES && allowed[device].load(std::memory_order_relaxed) >= bytes) return cudaSuccess;
  cudaError_t error =
      cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess)
    error =
        cudaFuncSetAttribute(KERNEL, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess && device < DEVICES) allowed[device].store(bytes, std::memory_order_relaxed);
  return error;
}

/* Where a step's scratch lies. */
struct scratch_places {
  unsigned *counters, *row_counters;
  decode_rows rows;
  float *phi, *partials;
};

scratch_places places_in(void *scratch, const lola_device_segment &g) {
  char *const signals = static_cast<char *>(scratch), *const counters = signals + sizeof(decode_signals);
  char *const rows = counters + counter_bytes(g.B, g.Hkv);
  char *const phi = rows + rows_bytes(g.B);
  scratch_places places;
  places.rows.signals = reinterpret_cast<decode_signals *>(signals);
  places.counters = reinterpret_cast<unsigned *>(counters);
  places.row_counters = places.counters + static_cast<int64_t>(g.B) * g.Hkv;
  places.rows.rows = reinterpret_cast<decode_row *>(rows);
  places.rows.updated = reinterpret_cast<int *>(places.rows.rows + g.B);
  places.phi = reinterpret_cast<float *>(phi);
  places.partials = reinterpret_cast<float *>(phi + phi_bytes(static_cast<int64_t>(g.B) * g.Hq, g.F));
  return places;
}

struct launch_arguments {
  const lola_device_segment *segment;
  const call_rows *rows;
  decode_plan plan;
  scratch_places scratch;
  bool is_long;
  cudaStream_t stream;
};

template <auto KERNEL, class... A>
cudaError_t launch(const launch_arguments &a, int device, int threads, A... arguments) {
  const cudaError_t error = allow_shared<KERNEL>(a.plan.shared_bytes, device);
  if (error != cudaSuccess) return error;
  return lola_cuda_launch_chained(KERNEL, static_cast<unsigned>(a.plan.blocks), threads, a.plan.shared_bytes, a.stream,
                                  *a.segment, a.plan, arguments...);
}

template <typename T, int LANES> cudaError_t launch_tiles(const launch_arguments &a, int device) {
  const scratch_places &s = a.scratch;
  return launch<decode_kernel<T, LANES>>(a, device, THREADS, s.rows.signals, s.counters, s.phi, s.partials);
}

pipeline_scratch units_of(const scratch_places &places) { return {places.rows, places.phi, places.partials}; }

template <typename T> cudaError_t launch_items(const launch_arguments &a, int device) {
  if constexpr (sizeof(T) == 2) {
    if (a.plan.pipeline)
      return launch<decode_pipeline_kernel<T>>(a, device, PIPELINE_THREADS, *a.rows, units_of(a.scratch));
    if (a.plan.matrix) return a.is_long ? launch_tiles<T, LONG_MATRIX>(a, device) : launch_tiles<T, MATRIX>(a, device);
  }
  if (a.plan.lanes == 8) return launch_tiles<T, 8>(a, device);
  if (a.plan.lanes == 16) return launch_tiles<T, 16>(a, device);
  return launch_tiles<T, 32>(a, device);
}

/* Shared memory of one block and of a multiprocessor, and how many of these there are. */
struct device_limits {
  int shared_bytes, processor_bytes, processors;
};

/* Asked for once per device. */
cudaError_t limits_of(int device, device_limits *limits) {
  static std::atomic<int> known[DEVICES][3];
  constexpr cudaDeviceAttr attributes[3] = {cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                            cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                            cudaDevAttrMultiProcessorCount};
  int values[3];
  for (int i = 0; i < 3; i++) {
    values[i] = device < DEVICES ? known[device][i].load(std::memory_order_relaxed) : 0;
    if (values[i]) continue;
    const cudaError_t error = cudaDeviceGetAttribute(&values[i], attributes[i], device);
    if (error != cudaSuccess) return error;
    if (device < DEVICES) known[device][i].store(values[i], std::memory_order_relaxed);
  }
  *limits = {values[0], values[1], values[2]};
  return cudaSuccess;
}

plan_sizes sizes_of(const lola_device_segment &g) {
  return plan_sizes{g.r, g.S / g.Hkv, g.D, g.Dv, g.F, g.R, g.L, g.dtype};
}

/* Halves of float16 do not hold every q of another type, those of bfloat16 do. */
bool uses_matrix(const lola_device_segment &g) {
  return fits_matrix(sizes_of(g)) && (g.dtype == LOLA_BFLOAT16 || g.q.dtype == g.dtype);
}

lola_status too_large(const lola_device_segment &g, int64_t bytes, int most, lola_message *message) {
  return lola_fail(
      message, LOLA_VALUE_ERROR,
      "heads / kv_heads = %d, head_dim = %d, value_dim = %d and feature_dim = %d need %lld bytes of shared "
      "memory to decode, this device has %d: pass smaller ones",
      g.r, g.D, g.Dv, g.F, static_cast<long long>(bytes), most);
}

lola_status too_many(const lola_device_segment &g, lola_message *message) {
  return lola_fail(message, LOLA_VALUE_ERROR,
                   "a batch of %d with window %lld and sparse %d is too large for one decoding step: pass fewer rows",
                   g.B, static_cast<long long>(g.W), g.L);
}

lola_status launched(cudaError_t error, const char *kernel, lola_message *message) {
  if (error == cudaSuccess) return lola_cuda_launched(kernel, message);
  cudaGetLastError();
  return lola_fail(message, LOLA_DEVICE_ERROR, "CUDA kernel %s could not be launched: %s", kernel,
                   cudaGetErrorString(error));
}

/* Whether phi(q) is Hedgehog's, 128 features of vectors of 128, with weights that can be read 16 bytes at a time. */
bool has_wide_features(const lola_device_segment &g) {
  return lola_device_is_hedgehog(g.map) && !g.stores_features && g.F == WIDE_F && g.D == WIDE_F &&
         reinterpret_cast<uintptr_t>(g.map.w_q) % PIECE == 0;
}

/* The launch of decode_small_kernel; `attributes` must live as long as it. */
template <typename T>
cudaLaunchConfig_t small_launch(const lola_device_segment &g, const small_plan &plan, cudaStream_t stream,
                                cudaLaunchAttribute (&attributes)[2]) {
  const dim3 blocks(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(g.Hkv), static_cast<unsigned>(g.B));
  return lola_cuda_cluster_launch(reinterpret_cast<const void *>(decode_small_kernel<T>), blocks, plan.blocks,
                                  SMALL_THREADS, small_bytes(plan, g.r), stream, attributes);
}

/* How many blocks a cluster of decode_small_kernel may have, 0 where it does not run. Asked for once per device. */
template <typename T> int widest_cluster(int device) {
  enum { PORTABLE = 8, WIDEST = 16, UNKNOWN = -1 };
  static std::atomic<int> known[DEVICES]; /* and 1 more */
  int widest = device < DEVICES ? known[device].load(std::memory_order_relaxed) - 1 : UNKNOWN;
  if (widest != UNKNOWN) return widest;
  const void *const kernel = reinterpret_cast<const void *>(decode_small_kernel<T>);
  widest = 0;
  if (lola_cuda_can_chain(kernel) && allow_shared<decode_small_kernel<T>>(MOST_SMALL_BYTES, device) == cudaSuccess) {
    widest = PORTABLE;
    lola_device_segment g = {};
    g.B = g.Hkv = 1;
    small_plan plan = {};
    plan.blocks = WIDEST;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = small_launch<T>(g, plan, nullptr, attributes);
    config.dynamicSmemBytes = MOST_SMALL_BYTES;
    int clusters = 0;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0)
      widest = WIDEST;
  }
  (void)cudaGetLastError();
  if (device < DEVICES) known[device].store(widest + 1, std::memory_order_relaxed);
  return widest;
}

/* Whether a step is so small that clusters of up to `widest` blocks take it, and their plan: a tile a block at a time
 * where there are multiprocessors for it, else two. */
bool plan_small(const lola_device_segment &g, const decode_plan &p, const device_limits &limits, int widest,
                small_plan *plan) {
  const int64_t groups = static_cast<int64_t>(g.B) * g.Hkv, tiles = p.sparse_items + p.window_tiles;
  if (widest <= g.r || g.B > 0xffff || g.Hkv > 0xffff) return false;
  int64_t blocks = tiles;
  if (groups * (g.r + blocks) > limits.processors) blocks = divided_up(tiles, TILES);
  if (blocks > widest - g.r) blocks = widest - g.r;
  if (groups * (g.r + blocks) > static_cast<int64_t>(MOST_SMALL_BLOCKS) * limits.processors) return false;
  plan->blocks = g.r + static_cast<int>(blocks);
  plan->sets = g.L ? p.sets : 0;
  plan->window_tiles = static_cast<int>(p.window_tiles);
  plan->sparse_tiles = static_cast<int>(p.sparse_tiles);
  plan->tiles = static_cast<int>(tiles);
  plan->first_update = p.row.first_update;
  plan->per_C = 1.0 / static_cast<double>(g.C);
  plan->per_ring = 1.0 / static_cast<double>(g.R);
  plan->by_rs = p.by_rs;
  plan->by_sparse_tiles = p.by_sparse_tiles;
  return p.window_tiles + p.sparse_tiles <= MOST_SMALL_TILES;
}

/* As many blocks as run at once. */
int64_t pipeline_blocks(int64_t groups, const device_limits &limits, const decode_plan &p) {
  constexpr int OTHER_BYTES = 1024 + KNOWN_UNITS * static_cast<int>(sizeof(known_unit)) + 320;
  const int fit = limits.processor_bytes / (PIPELINE_BYTES + OTHER_BYTES);
  const int of_each = fit < 1 ? 1 : fit < PIPELINE_BLOCKS ? fit : PIPELINE_BLOCKS;
  const int64_t blocks = static_cast<int64_t>(limits.processors) * of_each;
  const int64_t units = groups * p.items;
  return blocks < units ? blocks : units;
}

/* All of a step's plan but what depends on the update; before the first kernel, so that a step which does not fit
 * leaves the cache as it was. */
lola_status plan_step(const lola_device_segment &g, decode_plan *plan, small_plan *small, int *device,
                      device_limits *limits, lola_message *message) {
  cudaError_t error = cudaGetDevice(device);
  if (error == cudaSuccess) error = limits_of(*device, limits);
  if (error != cudaSuccess) return launched(error, "decode", message);
  const plan_sizes sizes = sizes_of(g);
  const int64_t groups = static_cast<int64_t>(g.B) * g.Hkv, item = lola_device_item(g.dtype);
  decode_plan p = plan_of(sizes, uses_matrix(g));
  if (p.items > INT64_C(0x7fffffff) / groups || p.head_floats > INT64_C(0x7fffffff)) return too_many(g, message);
  if (p.pipeline) {
    p.shared_bytes = PIPELINE_BYTES;
    p.blocks = pipeline_blocks(groups, *limits, p);
  } else {
    place_shared(sizes, &p);
    p.blocks = groups * p.items;
    p.prefetch = p.blocks <= static_cast<int64_t>(SMALL_GRID) * limits->processors;
  }
  if (p.shared_bytes + 64 > limits->shared_bytes) return too_large(g, p.shared_bytes, limits->shared_bytes, message);
  p.gathers = p.pipeline && !g.stores_features;
  p.cache_aligned = g.D * item % PIECE == 0 && g.Dv * item % PIECE == 0;
  p.call_aligned = p.cache_aligned && lola_device_rows_are_aligned(g.k) && lola_device_rows_are_aligned(g.v);
  p.query_aligned = g.q.dtype == g.dtype && lola_device_rows_are_aligned(g.q);
  p.by_items = divisor_of(p.items);
  p.by_sparse_items = divisor_of(p.sparse_items);
  p.by_window_tiles = divisor_of(p.window_tiles);
  p.by_state_items = divisor_of(p.state_items);
  p.by_kv_heads = divisor_of(g.Hkv);
  p.by_state_parts = divisor_of(p.state_parts);
  p.by_sparse_tiles = divisor_of(p.sparse_tiles);
  p.by_rs = divisor_of(g.rs);
  p.by_pairs = divisor_of(p.pairs);
  p.row = plan_rows(g, !p.pipeline || g.slot_phi);
  if (p.pipeline && has_wide_features(g) && p.call_aligned && p.query_aligned) {
    const int widest =
        g.dtype == LOLA_FLOAT16 ? widest_cluster<__half>(*device) : widest_cluster<__nv_bfloat16>(*device);
    p.small = plan_small(g, p, *limits, widest, small);
  }
  *plan = p;
  return LOLA_OK;
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
  int64_t floats = plan_of(sizes, false).group_floats;
  if (fits_matrix(sizes)) {
    const int64_t others = plan_of(sizes, true).group_floats;
    if (others > floats) floats = others;
  }
  return static_cast<int64_t>(sizeof(decode_signals)) + counter_bytes(shape.batch, shape.kv_heads) +
         rows_bytes(shape.batch) + phi_bytes(shape.batch * shape.heads, shape.feature_dim) + groups * floats * 4;
}

namespace {

/* The plan of the queries' kernel, but for its blocks. */
query_plan plan_queries(const lola_device_segment &g, int rows_of_block) {
  const int M = lola_device_is_hedgehog(g.map) ? g.F / 2 : g.F;
  query_plan plan = {};
  plan.weight_vector = M % 4 == 0 && reinterpret_cast<uintptr_t>(g.map.w_q) % PIECE == 0 ? 4 : 1;
  plan.weight_shift = shift_of(divided_up(M, plan.weight_vector));
  plan.query_vector = g.D % 8 == 0 && lola_device_rows_are_aligned(g.q);
  const bool reads_q = !g.stores_features, projects = reads_q && has_weights(g.map);
  plan.parts = projects ? divided_up(M, static_cast<int64_t>(plan.weight_vector) << plan.weight_shift) * THREADS *
                              plan.weight_vector
                        : 0;
  plan.x_at = static_cast<int>(rows_of_block * plan.parts);
  plan.phi_at = static_cast<int>(plan.x_at + rows_of_block * static_cast<int64_t>(reads_q ? g.D : 0));
  return plan;
}

/* Its shared memory for a row. */
int64_t query_bytes(const lola_device_segment &g, const query_plan &plan) {
  return g.stores_features ? 0 : (plan.parts + g.D + g.F) * 4;
}

/* A launch of that kernel, or of the one for wide features. */
struct query_launch {
  query_plan plan;
  bool wide, many;
  int64_t blocks, bytes;
};

lola_status plan_query_launch(const lola_device_segment &g, const device_limits &limits, decode_plan *step,
                              query_launch *launch, lola_message *message) {
  query_launch l = {};
  l.wide = step->pipeline && has_wide_features(g) && lola_device_rows_are_aligned(g.q);
  if (g.mixing == LOLA_MIXING_CACHE_ONLY) {
    l.blocks = 0;
  } else if (l.wide) {
    l.plan.blocks = static_cast<int>(divided_up(g.B, WIDE_ROWS));
    l.blocks = g.Hq * static_cast<int64_t>(l.plan.blocks);
    l.bytes = WIDE_BYTES;
  } else {
    l.plan = plan_queries(g, 1);
    l.many = static_cast<int64_t>(g.B) * g.Hq > 4 * static_cast<int64_t>(limits.processors) &&
             MANY_ROWS * query_bytes(g, l.plan) <= 48 << 10;
    const int rows_of_block = l.many ? MANY_ROWS : 1;
    if (l.many) l.plan = plan_queries(g, MANY_ROWS);
    l.bytes = rows_of_block * query_bytes(g, l.plan);
    if (l.bytes + 64 > limits.shared_bytes) return too_large(g, l.bytes, limits.shared_bytes, message);
    l.plan.blocks = static_cast<int>(divided_up(g.B, rows_of_block));
    l.blocks = g.Hq * static_cast<int64_t>(l.plan.blocks);
  }
  if (l.blocks > INT64_C(0x7fffffff)) return too_many(g, message);
  step->query_blocks = static_cast<unsigned>(l.blocks);
  *launch = l;
  return LOLA_OK;
}

lola_status launch_queries(const lola_device_segment &g, const call_rows &rows, const query_launch &launch,
                           const scratch_places &places, int device, cudaStream_t stream, lola_message *message) {
  if (!launch.blocks) return LOLA_OK;
  const auto queue = [&](auto kernel) {
    return lola_cuda_launch_chained(kernel, static_cast<unsigned>(launch.blocks), THREADS, launch.bytes, stream, g,
                                    rows, launch.plan, places.rows, places.phi);
  };
  cudaError_t error = cudaSuccess;
  if (launch.wide) {
    error = allow_shared<decode_wide_queries_kernel>(WIDE_BYTES, device);
    if (error == cudaSuccess)
      error = lola_cuda_launch_chained(decode_wide_queries_kernel, static_cast<unsigned>(launch.blocks), WIDE_THREADS,
                                       WIDE_BYTES, stream, g, rows, launch.plan.blocks, places.rows, places.phi);
  } else if (launch.many) {
    error = queue(decode_queries_kernel<MANY_ROWS>);
  } else {
    if (launch.bytes > 48 << 10) error = allow_shared<decode_queries_kernel<1>>(launch.bytes, device);
    if (error == cudaSuccess) error = queue(decode_queries_kernel<1>);
  }
  return launched(error, "decode_queries", message);
}

template <typename T>
cudaError_t launch_small(const lola_device_segment &g, const call_rows &rows, const small_plan &plan,
                         unsigned *row_counters, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = small_launch<T>(g, plan, stream, attributes);
  return cudaLaunchKernelEx(&config, decode_small_kernel<T>, g, rows, plan, row_counters);
}

/* A small step: an update, and a kernel for the rest. */
lola_status decode_small(const lola_device_segment &g, const call_rows &rows, small_plan plan, unsigned *row_counters,
                         int updates, cudaStream_t stream, lola_message *message) {
  lola_status status = LOLA_OK;
  if (updates && !g.slot_phi) {
    status = lola_cuda_update(&g, rows, row_plan{}, decode_rows{}, stream, message);
  } else if (updates) {
    status = lola_cuda_segment_features(&g, LOLA_FEATURES_OF_CACHE, 0, &rows, stream, message);
    if (!status) status = lola_cuda_scan(&g, 0, stream, message);
  }
  if (status) return status;
  plan.updates = updates;
  return launched(g.dtype == LOLA_FLOAT16 ? launch_small<__half>(g, rows, plan, row_counters, stream)
                                          : launch_small<__nv_bfloat16>(g, rows, plan, row_counters, stream),
                  "decode", message);
}

} // namespace

lola_status lola_cuda_decode(const lola_device_segment *segment, const call_rows &rows, void *scratch, int updates,
                             cudaStream_t stream, lola_message *message) {
  const lola_device_segment &g = *segment;
  if (!g.B || !g.Hkv) return LOLA_OK;
  int device = 0;
  device_limits limits = {};
  decode_plan plan = {};
  small_plan small = {};
  query_launch queries = {};
  lola_status status = plan_step(g, &plan, &small, &device, &limits, message);
  if (status) return status;
  const scratch_places places = places_in(scratch, g);
  if (plan.small) return decode_small(g, rows, small, places.row_counters, updates, stream, message);
  status = plan_query_launch(g, limits, &plan, &queries, message);
  if (status) return status;
  const bool projects = updates && !g.slot_phi;
  if (projects)
    status = lola_cuda_update(segment, rows, plan.row, places.rows, stream, message);
  else
    status =
        launched(lola_cuda_launch_chained(decode_begin_kernel, 1, THREADS, 0, stream, g, rows, plan.row, places.rows),
                 "decode_begin", message);
  if (!status) status = launch_queries(g, rows, queries, places, device, stream, message);
  if (!status && updates && !projects) {
    status = lola_cuda_segment_features(segment, LOLA_FEATURES_OF_CACHE, 0, nullptr, stream, message);
    lola_device_segment scanned = g;
    scanned.spans_are_old = 1;
    if (!status) status = lola_cuda_scan(&scanned, 0, stream, message);
  }
  if (!status && updates && !plan.gathers) status = lola_cuda_commit_sparse(segment, stream, message);
  if (!status) {
    const launch_arguments a = {segment, &rows, plan, places, is_long(sizes_of(g)), stream};
    const cudaError_t error = g.dtype == LOLA_FLOAT32   ? launch_items<float>(a, device)
                              : g.dtype == LOLA_FLOAT16 ? launch_items<__half>(a, device)
                                                        : launch_items<__nv_bfloat16>(a, device);
    status = launched(error, "decode", message);
  }
  if (!status && plan.pipeline) {
    const int64_t blocks = divided_up(static_cast<int64_t>(g.B) * g.Hkv, MERGED_GROUPS);
    status = launched(lola_cuda_launch_chained(decode_merge_kernel, static_cast<unsigned>(blocks),
                                               MERGED_GROUPS * THREADS, 0, stream, g, plan, units_of(places)),
                      "decode_merge", message);
  }
  /* A step that has begun but does not end: the next one must not take its signals for its own. */
  if (status) cudaMemsetAsync(places.rows.signals, 0, sizeof(decode_signals), stream);
  return status;
}
