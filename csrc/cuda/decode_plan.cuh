/* What the host works out before a decoding step: how its parts are cut and laid out, which kernels take them. Tiles
 * follow from the cache's sizes alone, so a row's sums are the same in any batch. */
#ifndef LOLA_CUDA_DECODE_PLAN_CUH
#define LOLA_CUDA_DECODE_PLAN_CUH

#include "decode_pipeline.cuh"
#include "decode_queries.cuh"
#include "decode_small.cuh"

namespace {

/* Blocks per multiprocessor up to which a grid is small: it does not fill memory's queues for long, so each block asks
 * for its part before it knows its row. */
constexpr int SMALL_GRID = 3;

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

/* --- the device ----------------------------------------------------------------------------------- */

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
  if (error != cudaSuccess) return lola_cuda_launched(error, "decode", message);
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

/* --- the queries ---------------------------------------------------------------------------------- */

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

} // namespace

#endif
