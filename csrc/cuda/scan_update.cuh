/* An update of decoding by clusters of scan_wgmma.cuh: one chunk of each row that ends one, from keys to the new state.
 *
 * Unlike a segment's scan it computes the features itself, in the place of the keys: a decoding step has little to do
 * but much to wait for, and a kernel that computed them before this one would be one more to wait for, and their way
 * through memory one more. The blocks of a head share out its pairs and send each other what they have. For the same
 * reason it looks up by itself which rows end a chunk, and runs beside the kernel before it.
 * The arithmetic is that of features.cu and of scan_wgmma.cuh, so that bits do not tell how a pair or a state came to be.
 */
#ifndef LOLA_CUDA_SCAN_UPDATE_CUH
#define LOLA_CUDA_SCAN_UPDATE_CUH

#include "cuda/features_matrix.cuh"
#include "cuda/plan.cuh"
#include "cuda/scan_wgmma.cuh"

namespace {
namespace wgmma_scan {

constexpr int FEATURE_ROWS = 16; /* pairs whose features a warp computes at a time */

/* Behind cluster_shared: positions of the rows in `rows`. */
constexpr int64_t POSITION_BYTES = ROWS_AT_ONCE * sizeof(int64_t);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Stores a piece at this address in the shared memory of the cluster's block `rank`. */
__device__ __forceinline__ void store_in_cluster(uint32_t address, int rank, const uint4 &x) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "st.shared::cluster.v4.b32 [there], {%2, %3, %4, %5};\n}" ::"r"(address),
               "r"(rank), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ int64_t *positions_of(const cluster_plan &plan) {
  return reinterpret_cast<int64_t *>(wgmma_memory + plan.shared + sizeof(cluster_shared));
}

/* Position of the row's token where pairs leave the window with it, else -1. */
__device__ __forceinline__ int64_t updating_position(const lola_device_segment &g, const call_rows &rows, int row) {
  lola_device_span span = {};
  span.position = __ldcg(g.tokens_seen + row);
  span.updated = __ldcg(g.chunks + row);
  int64_t start, stop;
  row_range(rows, row, &start, &stop);
  if (stop <= start || span.position < (span.updated + 1) * g.C) return -1;
  span.tokens = 1;
  const lola_device_leaving leaving = lola_device_segment_leaving(g, span);
  return leaving.end > leaving.first ? span.position : -1;
}

/* What is the same for all units. The cluster's other blocks may write here when they have waited for it. */
__device__ __forceinline__ void begin_cluster(const lola_device_segment &g, const cluster_plan &plan,
                                              cluster_shared &shared) {
  /* Rows past the last newcomer are zero and stay so. */
  for (int at = plan.values + own_thread() * 16; g.C % TILE && at < plan.parts; at += THREADS * 16)
    piece_at(at) = make_uint4(0, 0, 0, 0);
  for (int i = own_thread(); g.C % TILE && i < plan.newcomers * plan.panels * 8; i += THREADS)
    piece_at(phi_at(plan, plan.slots + i % plan.newcomers, i / plan.newcomers)) = make_uint4(0, 0, 0, 0);
  if (own_thread() <= BINS) shared.bins[0][own_thread()] = 0;
  if (own_thread() == 0) {
    barrier_init(shared_address(&shared.full), 1);
    barrier_init(shared_address(&shared.read), plan.blocks * WARPS);
    barrier_init(shared_address(&shared.newcomers), HELPERS / 32);
    fence_barrier_init();
  }
  cluster_arrive();
}

/* Asks for the keys, of slots and then of newcomers, whose features this block computes. */
template <typename T>
__device__ __forceinline__ void fetch_keys(const lola_device_segment &g, const cluster_plan &plan,
                                           const block_place &block, int first, int end, const char *keys, int slot,
                                           int slots) {
  const int key_bytes = g.D * 2;
#pragma unroll 4
  for (int i = own_thread();; i += THREADS) {
    const int own = i / T::phi_pieces, piece = i % T::phi_pieces;
    const int row = (own / FEATURE_ROWS * plan.column_blocks + block.column_block) * FEATURE_ROWS + own % FEATURE_ROWS;
    if (row >= end) break;
    if (row < first || 8 * piece >= g.D) continue;
    int at = slot + row - first;
    if (at >= slots) at -= slots;
    cp_async(shared_address(wgmma_memory + phi_at(plan, row, piece)),
             keys + static_cast<int64_t>(at) * key_bytes + 16 * piece);
  }
}

/* phi of the rows that are this block's to compute, in the place of their keys, for all blocks of the head. */
template <typename T>
__device__ __forceinline__ void compute_features(const lola_device_segment &g, const cluster_plan &plan,
                                                 const block_place &block, int count, const __nv_bfloat16 *hi,
                                                 const __nv_bfloat16 *lo) {
  constexpr int COLUMNS_OF_X = 32 * T::panels, FEATURE_PRODUCTS = COLUMNS_OF_X / 8;
  const int warp = own_thread() / 32, group = own_thread() % 32 / 4, c = own_thread() % 4;
  const int tiles = plan.rows / FEATURE_ROWS, C = static_cast<int>(g.C);
#pragma unroll 1
  for (int tile = warp * plan.column_blocks + block.column_block; tile < tiles;
       tile += THREADS / 32 * plan.column_blocks) {
    const int first = uniform(tile * FEATURE_ROWS);
    const int pairs = first < plan.slots ? count - first : C + plan.slots - first; /* from there on */
    if (pairs <= 0) continue;
    float acc[1][FEATURE_PRODUCTS][4];
    const auto row_at = [&](int row, int k) { return wgmma_memory + phi_at(plan, first + row, k / 8); };
    project<typename T::element, FEATURE_ROWS, FEATURE_PRODUCTS>(row_at, hi, lo, g.D, COLUMNS_OF_X,
                                                                 lola_padded(g.D, 64), acc);
    __syncwarp(); /* the keys were read */
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = 8 * half + group;
      finish_row(g.map.kind, acc[0], half, COLUMNS_OF_X, c, [&](int column, const unsigned(&y)[4]) {
        if (row >= pairs) return;
        const uint32_t at = shared_address(wgmma_memory + phi_at(plan, first + row, column / 8));
        for (int i = 0; i < plan.column_blocks; i++)
          store_in_cluster(at, block.rank - block.column_block + i, make_uint4(y[0], y[1], y[2], y[3]));
      });
    }
  }
}

/* Asks for what the unit after this one begins with; the helpers. */
__device__ __forceinline__ void prefetch_update(const lola_device_segment &g, const cluster_plan &plan,
                                                const block_place &block, int row, int set, int64_t position) {
  const int helper = own_thread() - WALKERS;
  const int64_t group = static_cast<int64_t>(row) * g.S + set, kv_head = set / (g.S / g.Hkv);
  const int64_t state = static_cast<int64_t>(row) * g.Hq + set * g.rs + block.head;
  const auto touch = [](const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); };
  const auto prefetch = [&](const void *from, int64_t bytes) { /* the block's part of it, a line to a thread */
    const int64_t lines = (bytes + 127) / 128;
    for (int64_t i = block.rank * HELPERS + helper; i < lines; i += plan.blocks * HELPERS)
      touch(static_cast<const char *>(from) + i * 128);
  };
  const int64_t keys = static_cast<int64_t>(g.L) * g.D * 2, values = static_cast<int64_t>(g.L) * g.Dv * 2;
  prefetch(static_cast<const char *>(g.sparse_keys) + group * keys, keys);
  prefetch(static_cast<const char *>(g.sparse_values) + group * values, values);
  const int64_t lines = (static_cast<int64_t>(g.F) * g.Dv * 4 + 127) / 128;
  for (int64_t i = block.column_block * HELPERS + helper; i < lines; i += plan.column_blocks * HELPERS)
    touch(reinterpret_cast<const char *>(g.hidden + state * g.F * g.Dv) + i * 128);
  const int64_t leaving = lola_device_leaving_first(g, position / g.C);
  for (int64_t j = block.rank * HELPERS + helper; j < g.C; j += plan.blocks * HELPERS) {
    const int64_t slot = (static_cast<int64_t>(row) * g.Hkv + kv_head) * g.R + (leaving + j) % g.R;
    for (int64_t at = 0; at < g.D * 2; at += 128) touch(static_cast<const char *>(g.window_keys) + slot * g.D * 2 + at);
    for (int64_t at = 0; at < g.Dv * 2; at += 128)
      touch(static_cast<const char *>(g.window_values) + slot * g.Dv * 2 + at);
  }
}

/* `next`: calls for the unit after this one, if there is any. */
template <typename T, class Next>
__device__ __forceinline__ void update_unit(const lola_device_segment &g, const cluster_plan &plan,
                                            const block_place &block, cluster_shared &shared, const tables &t,
                                            cluster_turns *turns, int row, int set, int64_t position, Next next) {
  const int64_t group = static_cast<int64_t>(row) * g.S + set;
  const int head = set * g.rs + block.head, C = static_cast<int>(g.C);
  const int64_t state = static_cast<int64_t>(row) * g.Hq + head;
  const int count = static_cast<int>(__ldcg(g.sparse_count + group));
  __nv_bfloat16 *const hi = reinterpret_cast<__nv_bfloat16 *>(wgmma_memory + plan.halves);
  __nv_bfloat16 *const lo = hi + 32 * T::panels * lola_padded(g.D, 64);
  /* All loads as soon as they can be: what lies in slots before it is known how many are in use. */
  fetch_keys<T>(g, plan, block, 0, g.L, static_cast<const char *>(g.sparse_keys) + group * g.L * g.D * 2, 0, g.L);
  hidden_part h = {};
  load_hidden<T>(g, block, g.hidden + state * g.F * g.Dv, &h);
  if (own_thread() == 0) {
    lola_device_span span = {};
    span.position = position;
    span.batch = row; /* of no use: what leaves the window is not among the call's tokens */
    span.tokens = 1;
    span.updated = position / g.C - 1;
    shared.unit = scan_unit_of(g, span, row, set, block.head, 0);
    shared.cut = HIGHEST;
    shared.shift = 16;
  }
  if (own_thread() >= WALKERS)
    for (int f = own_thread() - WALKERS; f < g.F; f += HELPERS) t.normalizer[f] = g.normalizer[state * g.F + f];
  __syncthreads();
  const scan_unit &unit = shared.unit;
  const int code = newcomer_code(g, unit, unit.last), leaves = code + unit.ring, R = static_cast<int>(g.R);
  const int64_t window = (static_cast<int64_t>(row) * g.Hkv + set / (g.S / g.Hkv)) * g.R;
  fetch_keys<T>(g, plan, block, plan.slots, plan.slots + C,
                static_cast<const char *>(g.window_keys) + window * g.D * 2, leaves >= R ? leaves - R : leaves, R);
  const int begin = block.column_block * COLUMNS;
  const auto load_value = [&](int i) {
    return load_chunk<T::vector>(row_of(g, unit, 1, code + i / T::value_pieces) + begin * 2, i % T::value_pieces * 8,
                                 g.Dv - begin);
  };
  uint4 value = make_uint4(0, 0, 0, 0);
  if (own_thread() < C * T::value_pieces) value = load_value(own_thread());
  load_weights<32 * T::panels>(g.map.w_k + static_cast<int64_t>(head) * g.D * 32 * T::panels, g.D, 32 * T::panels,
                               lola_padded(g.D, 64), hi, lo);
#pragma unroll 1
  for (int i = own_thread(); i < C * T::value_pieces; i += THREADS) {
    if (i >= THREADS) value = load_value(i);
    put_values<T>(plan, i / T::value_pieces, i % T::value_pieces, value);
  }
  /* The last cut between keys lay below the slots' scores, and the next one is likely to lie near it. */
  unsigned least = HIGHEST;
#pragma unroll 1
  for (int i = own_thread(); i < plan.rows; i += THREADS) {
    const int j = i - plan.slots;
    const bool pair = i < count, newcomer = j >= 0 && j < C;
    const int own = newcomer ? code + j : -i - 1;
    const float score = pair ? g.sparse_scores[group * g.L + i] : NAN;
    t.code[i] = own;
    t.value[i] = (pair || newcomer ? row_of(g, unit, 1, own) : unit.sources[1][1].data) + begin * 2;
    t.score[i] = score;
    least = min(least, __float_as_uint(score));
  }
  least = __reduce_min_sync(ALL, least);
  if (own_thread() % 32 == 0) atomicMin(&shared.cut, least);
  cluster_progress progress = {};
  progress.count = count;
  const bool selects = uniform(count + C > g.L);
  cp_async_wait<0>();
  __syncthreads();
  cluster_wait(); /* the last unit is over */
  if (selects) compute_features<T>(g, plan, block, count, hi, lo);
  fence_async_proxy();
  cluster_arrive();
  __syncthreads(); /* the weights were read, the halves take their place */
  if (has_state<T>()) store_halves(plan, h);
  if (own_thread() >= WALKERS) {
    for (int i = own_thread() - WALKERS; i < 32 * T::panels; i += HELPERS)
      store_normalizer(plan, i, t.normalizer[2 * i], t.normalizer[2 * i + 1]);
  }
  cluster_wait(); /* all phi are there, and all blocks have read what end_unit writes */
  fence_async_proxy();
  __syncthreads();
  if (own_warpgroup() == WALKERS / 128) {
    if (own_thread() % 32 == 0) barrier_arrive(shared_address(&shared.newcomers));
    next([&](int row, int set, int64_t position) { prefetch_update(g, plan, block, row, set, position); });
  } else {
    if (selects) {
      const uint32_t full = shared_address(&shared.full), newcomers = shared_address(&shared.newcomers);
      score_pairs<T>(g, plan, block, t, count, full, newcomers, turns->updates & 1);
      if (plan.blocks > 1)
        barrier_wait(full, turns->rankings & 1);
      else
        walkers_sync();
      unsigned key[OWN_ROWS];
      sum_parts(g, plan, t, count, key);
      const int drops = count + C - g.L, freed = list_dropped(g, plan, shared, t, count, drops, key);
      walkers_sync(); /* what is dropped is listed */
      swap_pairs<T>(g, plan, block, t, count, drops, freed);
      fence_async_proxy();
      walkers_sync();
      fold_newcomers<T>(g, plan, t, &h);
    } else {
      enter_all<T>(g, plan, unit, t, count);
    }
    walkers_sync();
    progress.count = selects ? g.L : count + C;
    end_unit<T>(g, block, unit, t, progress, h, selects);
  }
  turns->rankings += selects;
  turns->updates++;
  __syncthreads(); /* the tables are read to the end */
  cluster_arrive();
}

#endif

/* Rows are looked up before the kernel before this one has ended, but where it `awaits` that first. That kernel has
 * awaited all before it, writes nothing of what an update reads, and reads nothing of what it writes. The last cluster's
 * blocks await it in any case: so does who awaits this kernel, and it starts no sooner. */
template <typename T>
__global__ void __launch_bounds__(EMPTY ? 32 : THREADS, 1)
    update_wgmma_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ cluster_plan plan,
                        const __grid_constant__ call_rows rows, int awaits) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  cluster_shared &shared = shared_of(plan);
  const tables t = tables_of(plan);
  const int group = blockIdx.x / plan.blocks, thread = own_thread(), warp = thread / 32, lane = thread % 32;
  block_place block;
  block.rank = blockIdx.x % plan.blocks;
  block.head = block.rank / plan.column_blocks;
  block.column_block = block.rank % plan.column_blocks;
  lola_device_begin(!(awaits || group == plan.groups - 1));
  cluster_turns turns = {};
  bool begun = false;
  int before = 0; /* units of the rows looked at so far */
#pragma unroll 1
  for (int first = 0; first < g.B; first += ROWS_AT_ONCE) {
    const int own = first + thread;
    const int64_t position = thread < ROWS_AT_ONCE && own < g.B ? updating_position(g, rows, own) : -1;
    if (!__syncthreads_or(position >= 0)) continue;
    const unsigned bits = __ballot_sync(ALL, position >= 0);
    if (thread < ROWS_AT_ONCE && lane == 0) shared.row_count[warp] = __popc(bits);
    __syncthreads();
    int at = __popc(bits & ((1u << lane) - 1)), some = 0;
    for (int w = 0; w < ROWS_AT_ONCE / 32; w++) {
      if (w < warp) at += shared.row_count[w];
      some += shared.row_count[w];
    }
    if (position >= 0) {
      shared.rows[at] = own;
      positions_of(plan)[at] = position;
    }
    __syncthreads();
    const int units = some * g.S;
#pragma unroll 1
    for (int unit = (group + plan.groups - before % plan.groups) % plan.groups; unit < units; unit += plan.groups) {
      if (!begun) begin_cluster(g, plan, shared);
      begun = true;
      const auto next = [&](auto call) {
        const int after = unit + plan.groups;
        if (after < units) call(shared.rows[after / g.S], after % g.S, positions_of(plan)[after / g.S]);
      };
      update_unit<T>(g, plan, block, shared, t, &turns, shared.rows[unit / g.S], unit % g.S,
                     positions_of(plan)[unit / g.S], next);
    }
    before += units;
  }
  if (begun) cluster_wait(); /* nobody leaves while others may write to it */
#endif
}

/* --- the host's side ---------------------------------------------------------------------------------------------- */

/* Whether an update with this plan computes its features itself. */
inline bool update_projects(const lola_device_segment &g, const cluster_plan &plan) {
  const bool hedgehog = g.map.kind == LOLA_MAP_HEDGEHOG || g.map.kind == LOLA_MAP_HEDGEHOG_EXP;
  return plan.groups && hedgehog && !g.stores_features && g.F == 64 * plan.panels && g.D <= g.F && g.D % 16 == 0 &&
         g.Dv % 8 == 0;
}

inline const void *update_kernel_of(lola_dtype dtype, int panels) {
  const auto address = [](auto kernel) { return reinterpret_cast<const void *>(kernel); };
  const bool half = dtype == LOLA_FLOAT16;
  if (panels == 1)
    return half ? address(update_wgmma_kernel<wgmma_kind<__half, 1, true>>)
                : address(update_wgmma_kernel<wgmma_kind<__nv_bfloat16, 1, true>>);
  return half ? address(update_wgmma_kernel<wgmma_kind<__half, 2, true>>)
              : address(update_wgmma_kernel<wgmma_kind<__nv_bfloat16, 2, true>>);
}

inline cudaError_t launch_update(const lola_device_segment &g, const cluster_plan &plan, const call_rows &rows,
                                 int awaits, cudaStream_t stream) {
  const void *kernel = update_kernel_of(g.dtype, plan.panels);
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = launch_config(kernel, plan.groups * plan.blocks, plan.blocks,
                                                  plan.shared_bytes + POSITION_BYTES, stream, attributes);
  void *arguments[] = {const_cast<lola_device_segment *>(&g), const_cast<cluster_plan *>(&plan),
                       const_cast<call_rows *>(&rows), &awaits};
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
  (void)cudaGetLastError();
  return error;
}

} // namespace wgmma_scan
} // namespace

#endif
