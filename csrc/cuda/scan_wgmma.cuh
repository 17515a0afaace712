/* The scan on Hopper: a cluster of rs * ceil(Dv / 64) blocks walks a unit, block (h, j) with head h's phi of
 * all its pairs in shared memory and columns 64 j .. 64 j + 63 of H and s beside them. For self_recall scores of 16-bit
 * caches with F <= 128, where that fits (make_cluster_plan in scan.cu).
 *
 * Rows of phi are the L slots and then the C pairs that leave next ("newcomers"), in tiles of 64. Three warpgroups walk
 * the chunks:
 *   score   phi times the high half of H, with both halves of s beside it, 72 columns of wgmma, and times the low
 *           half, 64 columns more; tiles in turn; values come from global memory (L2) meanwhile. Each block sends its
 *           part of every pair's error to all blocks of the cluster.
 *   select  every block adds the parts, column blocks in order, then heads, and finds the cut by itself
 *   swap    a newcomer that stays trades rows with the pair that was dropped from its slot, so that the newcomers' rows
 *           then hold just the pairs to be folded
 *   fold    Phi^T V of those rows, summed for 64 pairs and then added once to H, which lives in registers in float32;
 *           its halves go back to shared memory
 * and a fourth, the helper, has the next newcomers in registers by the time that their rows are free, writes down what
 * queries see, and multiplies phi(q)^T H.
 * Order of sums: scores as they lie in the fragments, then over column blocks, then over heads; folds by newcomers'
 * row. Neither depends on how a call was cut, on the batch, or on the grid.
 *
 * Tiles lie as instructions.cuh says: panels of 64 columns, rows of 128 bytes, swizzled. Columns of H are dealt
 * out within 32 as lola_column_row says, so that a lane's eight results are neighbours: a value's 16 bytes. */
#ifndef LOLA_CUDA_SCAN_WGMMA_CUH
#define LOLA_CUDA_SCAN_WGMMA_CUH

#include "cuda/scan_wgmma_select.cuh"

namespace {
namespace wgmma_scan {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* --- a unit ------------------------------------------------------------------------------------------------------- */

/* The pairs that queries of the span's i-th chunk see: every block writes some. The helpers. */
__device__ __forceinline__ void record_sources(const lola_device_segment &g, const cluster_plan &plan,
                                               const block_place &block, const scan_unit &unit, const tables &t,
                                               int count, int64_t i) {
  const int64_t at = (unit.span.chunk + i) * g.S + unit.set;
  const int helper = own_thread() - WALKERS;
  for (int slot = block.rank * HELPERS + helper; slot < count; slot += plan.blocks * HELPERS)
    g.sources[at * g.L + slot] = t.code[slot];
  if (block.rank == 0 && helper == 0) g.source_count[at] = count;
}

__device__ __forceinline__ unit_chunks chunks_of(const lola_device_segment &g, const scan_unit &unit) {
  const int64_t first = unit.span.position / g.C, filled = (g.R + g.C - 1) / g.C; /* the first chunk to have leavers */
  unit_chunks chunks;
  chunks.count = static_cast<int>(unit.last - first + 1);
  chunks.updates =
      static_cast<int>(min(max(max(unit.span.updated + 1, filled) - first, INT64_C(0)), static_cast<int64_t>(INT_MAX)));
  chunks.end = static_cast<int>((first + 1) * g.C - unit.span.position);
  chunks.code = static_cast<int>(lola_device_leaving_first(g, first) - unit.base);
  chunks.leaving = max(chunks.count - chunks.updates, 0) * static_cast<int>(g.C);
  return chunks;
}

/* By all; HELPS tells who calls, so that the walkers' part is theirs alone: what the slots hold, whose phi are still
 * on their way when it returns. Of others' work only the spans are read before that has ended. */
template <typename T, bool HELPS>
__device__ __forceinline__ void begin_unit(const lola_device_segment &g, const cluster_plan &plan,
                                           const block_place &block, cluster_shared &shared, const tables &t,
                                           cluster_progress *progress, int row, int set, int record) {
  if (!HELPS && own_thread() == 0) {
    shared.unit = scan_unit_of(g, g.spans[row], row, set, own_head(plan, block));
    shared.chunks = chunks_of(g, shared.unit);
  }
  cluster_sync();
  lola_device_await_previous();
  if (record) lola_device_start_next();
  const scan_unit &unit = shared.unit;
  const int64_t group = static_cast<int64_t>(row) * g.S + set;
  const int count = static_cast<int>(g.sparse_count[group]);
  if (!HELPS && own_thread() == 0) shared.chunks.before = count;
  progress->count = uniform(count);
  progress->folded = g.folded[static_cast<int64_t>(row) * g.Hq + unit.head] != 0;
  progress->recall_first = progress->recall_end = 0;
  if (HELPS) return;
  const row_source phi = unit.sources[0][0];
  for (int i = own_thread(); unit.folds && i < count * T::phi_pieces; i += WALKERS)
    fetch_phi<T>(g, plan, phi.data + i / T::phi_pieces * phi.stride, i / T::phi_pieces, i % T::phi_pieces);
  for (int i = own_thread(); i < plan.rows; i += WALKERS) {
    const bool pair = i < count;
    const int code = pair && unit.resumes ? g.slot_source[group * g.L + i] : -i - 1;
    t.code[i] = code;
    t.value[i] = (pair ? row_of(g, unit, 1, code) : unit.sources[1][1].data) + block.column_block * COLUMNS * 2;
    t.score[i] = pair ? g.sparse_scores[group * g.L + i] : NAN;
  }
}

/* Writes down what the unit's slots hold, by threads 0 .. `threads` - 1: `count` pairs where it began with `before`,
 * while `left` pairs left the window. */
__device__ __forceinline__ void keep_pairs(const lola_device_segment &g, const scan_unit &unit, const tables &t,
                                           int64_t before, int count, int64_t left, int thread, int threads) {
  const int64_t group = static_cast<int64_t>(unit.row) * g.S + unit.set;
#pragma unroll 1
  for (int slot = thread; slot < count; slot += threads) {
    g.slot_source[group * g.L + slot] = t.code[slot];
    g.sparse_scores[group * g.L + slot] = t.score[slot];
    if (t.code[slot] >= 0) g.sparse_positions[group * g.L + slot] = unit.base + t.code[slot];
  }
  if (thread == 0) g.sparse_count[group] = count;
#pragma unroll 1
  for (int h = thread; h < g.rs; h += threads) /* what neither stayed nor entered was folded */
    g.folded[static_cast<int64_t>(unit.row) * g.Hq + unit.set * g.rs + h] += left - (count - before);
}

/* The head's phi of what the slots hold, for the next segment's scan; column blocks share the slots. The walkers. */
template <typename T>
__device__ __forceinline__ void keep_phi(const lola_device_segment &g, const cluster_plan &plan,
                                         const block_place &block, const scan_unit &unit, int count) {
  const int pieces = count * T::phi_pieces;
#pragma unroll 1
  for (int i = block.column_block * WALKERS + own_thread(); i < pieces; i += plan.column_blocks * WALKERS) {
    const int slot = i / T::phi_pieces, piece = i % T::phi_pieces;
    char *to = const_cast<char *>(unit.sources[0][0].data) + (static_cast<int64_t>(slot) * g.F + 8 * piece) * 2;
    const uint4 x = piece_at(phi_at(plan, slot, piece));
    if constexpr (T::vector) {
      if (8 * piece < g.F) *reinterpret_cast<uint4 *>(to) = x;
    } else {
      const unsigned words[4] = {x.x, x.y, x.z, x.w};
      for (int e = 0; e < 8 && 8 * piece + e < g.F; e++)
        reinterpret_cast<uint16_t *>(to)[e] = static_cast<uint16_t>(words[e / 2] >> 16 * (e % 2));
    }
  }
}

/* Writes the unit back. All blocks of the cluster have read what it begins with. */
template <typename T>
__device__ __forceinline__ void end_unit(const lola_device_segment &g, const cluster_plan &plan,
                                         const block_place &block, const cluster_shared &shared, const tables &t,
                                         const cluster_progress &progress, const hidden_part &h) {
  const scan_unit &unit = shared.unit;
  if (unit.folds) store_state<T>(g, block, unit, t, h);
  if (unit.folds && unit.continues) keep_phi<T>(g, plan, block, unit, progress.count);
  if (block.rank == 0)
    keep_pairs(g, unit, t, shared.chunks.before, progress.count, shared.chunks.leaving, own_thread(), WALKERS);
}

/* Of the unit's chunk i; all here is the same in all lanes, and known to be. */
__device__ __forceinline__ chunk_work work_of(const lola_device_segment &g, const cluster_progress &progress, int i,
                                              int updates, int count) {
  chunk_work work;
  work.updates = i >= updates && i < count;
  work.selects = work.updates && progress.count + static_cast<int>(g.C) > g.L;
  return work;
}

/* Whether tokens of the chunk before wait for phi(q)^T H. The helper. */
__device__ __forceinline__ bool recalls(const lola_device_segment &g, const cluster_progress &progress) {
  return uniform(progress.recall_first < progress.recall_end && progress.folded && g.mixing != LOLA_MIXING_CACHE_ONLY);
}

/* What the chunk has changed, when it is over. */
__device__ __forceinline__ void advance(const lola_device_segment &g, const chunk_work &work,
                                        cluster_progress *progress) {
  progress->folded |= work.selects;
  if (work.updates) progress->count = work.selects ? g.L : progress->count + static_cast<int>(g.C);
}

template <typename T>
__device__ __forceinline__ void help_unit(const lola_device_segment &g, const cluster_plan &plan,
                                          const block_place &block, cluster_shared &shared, const tables &t, int row,
                                          int set, int record) {
  cluster_progress progress = {};
  begin_unit<T, true>(g, plan, block, shared, t, &progress, row, set, record);
  const scan_unit &unit = shared.unit;
  const unit_chunks &chunks = shared.chunks;
  const auto code = [&](int i) { return chunks.code + i * static_cast<int>(g.C); };
  const auto work_at = [&](int i) { return work_of(g, progress, i, uniform(chunks.updates), uniform(chunks.count)); };
  newcomer_pieces<T> pieces;
  query_fragments<T> queries;
  chunk_work work = work_at(0);
  ask_newcomers<T>(g, block, unit, code(0), 0, work.updates, &pieces);
  cluster_sync();
#pragma unroll 1
  for (int i = 0;; i++) {
    if (i) named_barrier_sync(CHUNK, THREADS);
    if (work.updates) {
      put_newcomers<T>(g, plan, block, unit, t, code(i), 0, pieces);
#pragma unroll 1
      for (int more = TILE; more < g.C; more += TILE) {
        ask_newcomers<T>(g, block, unit, code(i), more, true, &pieces);
        put_newcomers<T>(g, plan, block, unit, t, code(i), more, pieces);
      }
      fence_async_proxy();
      barrier_arrive(shared_address(&shared.newcomers));
    }
    /* The chunk before still sees these tables and this state. */
    if (i && record) record_sources(g, plan, block, unit, t, progress.count, i - 1);
    if (recalls(g, progress))
      recall_tokens<T>(g, plan, block, unit, progress, &queries);
    else
      recall_nothing(g, block, unit, progress);
    if (i == uniform(chunks.count)) break;
    named_barrier_arrive(HALVES, THREADS);
    advance(g, work, &progress);
    progress.recall_first = progress.recall_end;
    if (record) progress.recall_end = min(chunks.end + i * static_cast<int>(g.C), unit.span.tokens);
    work = work_at(i + 1);
    queries = {};
    if (recalls(g, progress)) ask_queries<T>(g, unit, progress.recall_first, progress.recall_end, &queries);
    ask_newcomers<T>(g, block, unit, code(i + 1), 0, work.updates, &pieces);
  }
  cluster_sync();
  cluster_sync(); /* the tables are read to the end */
}

template <typename T>
__device__ __forceinline__ void walk_unit(const lola_device_segment &g, const cluster_plan &plan,
                                          const block_place &block, cluster_shared &shared, const tables &t,
                                          cluster_turns *turns, int row, int set, int record) {
  cluster_progress progress = {};
  hidden_part h = {};
  begin_unit<T, false>(g, plan, block, shared, t, &progress, row, set, record);
  const scan_unit &unit = shared.unit;
  /* Where nothing is folded, now or before, the state is not needed. */
  if (unit.folds || (record && progress.folded && g.mixing != LOLA_MIXING_CACHE_ONLY))
    load_state<T>(g, plan, block, unit, t, &h);
  cp_async_wait_all();
  fence_async_proxy();
  cluster_sync();
  const uint32_t full = shared_address(&shared.full), read = shared_address(&shared.read),
                 newcomers = shared_address(&shared.newcomers);
  const int updates = uniform(shared.chunks.updates), chunks = uniform(shared.chunks.count);
#pragma unroll 1
  for (int i = 0; i < chunks; i++) {
    const chunk_work work = work_of(g, progress, i, updates, chunks);
    const int count = progress.count, drops = count + static_cast<int>(g.C) - g.L;
    if (work.selects) {
      /* A block that has no others in its cluster needs no barriers of the cluster. */
      if (plan.blocks > 1 && turns->rankings) barrier_wait(read, (turns->rankings - 1) & 1);
      score_pairs<T>(g, plan, block, t, count, full, newcomers, turns->updates & 1);
      if (plan.blocks > 1)
        barrier_wait(full, turns->rankings & 1);
      else
        walkers_sync();
      turns->rankings++;
      unsigned key[OWN_ROWS];
      sum_parts(g, plan, t, count, key);
      if (plan.blocks > 1) tell_cluster(read, plan.blocks);
      const int freed = list_dropped(g, plan, shared, t, count, drops, key);
      named_barrier_sync(HALVES, THREADS); /* and what is dropped is listed */
      swap_pairs<T>(g, plan, block, t, count, drops, freed);
      fence_async_proxy();
      walkers_sync();
      fold_newcomers<T>(g, plan, t, &h);
      if (has_state<T>()) store_halves(plan, h);
    } else {
      if (work.updates) barrier_wait(newcomers, turns->updates & 1);
      named_barrier_sync(HALVES, THREADS);
      if (work.updates) enter_all<T>(g, plan, unit, t, count);
    }
    fence_async_proxy();
    walkers_sync();
    named_barrier_arrive(CHUNK, THREADS);
    turns->updates += work.updates;
    advance(g, work, &progress);
  }
  cluster_sync();
  end_unit<T>(g, plan, block, shared, t, progress, h);
  cluster_sync(); /* the tables are read to the end */
}

#endif

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool EMPTY = true; /* compiled for another device: the host sees it by the threads that it takes */
#else
constexpr bool EMPTY = false;
#endif

template <typename T>
__global__ void __launch_bounds__(EMPTY ? 32 : THREADS, 1)
    scan_wgmma_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ cluster_plan plan,
                      int record) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (!record) lola_device_start_next();
  __shared__ cluster_shared shared;
  const tables t = tables_of(plan);
  const int group = blockIdx.x / plan.blocks;
  if (!record && g.spans_are_old && group && group >= decoding_units<THREADS>(g)) return; /* makes room for others */
  block_place block;
  block.rank = blockIdx.x % plan.blocks;
  block.column_block = block.rank % plan.column_blocks;
  /* Rows past the last newcomer, columns past F and the last rows of the halves are zero and stay so. */
  for (int at = own_thread() * 16; at < plan.parts; at += THREADS * 16) piece_at(at) = make_uint4(0, 0, 0, 0);
  if (own_thread() < ALL_BINS) shared.bins[0][own_thread()] = 0;
  if (own_thread() == 0) {
    shared.cut = 0;
    shared.shift = 16;
    barrier_init(shared_address(&shared.full), 1);
    barrier_init(shared_address(&shared.read), plan.blocks * WARPS);
    barrier_init(shared_address(&shared.newcomers), HELPERS);
    fence_barrier_init();
  }
  if (record && g.spans_are_old)
    __threadfence(); /* as lola_device_begin has it */
  else
    lola_device_await_previous();
  cluster_arrive(); /* all blocks are there before one writes into another */
  cluster_wait();
  if (own_warpgroup() == WALKERS / 128) {
    for_each_unit<ROWS_AT_ONCE>(g, plan.groups, group, record, shared.rows, shared.row_count, cluster_sync,
                                [&](int row, int set) { help_unit<T>(g, plan, block, shared, t, row, set, record); });
  } else {
    cluster_turns turns = {};
    for_each_unit<ROWS_AT_ONCE>(
        g, plan.groups, group, record, shared.rows, shared.row_count, cluster_sync,
        [&](int row, int set) { walk_unit<T>(g, plan, block, shared, t, &turns, row, set, record); });
  }
  lola_device_await_previous(); /* also if it has no unit */
#endif
}

/* --- the host's side ---------------------------------------------------------------------------------------------- */

/* What `of` makes of the wgmma_kind for a type and so many panels. */
template <bool VECTOR, class Of> auto of_kind(lola_dtype dtype, int panels, Of of) {
  const bool half = dtype == LOLA_FLOAT16;
  if (panels == 1) return half ? of(wgmma_kind<__half, 1, VECTOR>()) : of(wgmma_kind<__nv_bfloat16, 1, VECTOR>());
  return half ? of(wgmma_kind<__half, 2, VECTOR>()) : of(wgmma_kind<__nv_bfloat16, 2, VECTOR>());
}

/* The kernel that reads rows 16 bytes at a time, or not. */
inline const void *kernel_of(lola_dtype dtype, int panels, bool vector) {
  const auto address = [](auto kind) { return reinterpret_cast<const void *>(scan_wgmma_kernel<decltype(kind)>); };
  return vector ? of_kind<true>(dtype, panels, address) : of_kind<false>(dtype, panels, address);
}

/* Launches the clusters of a plan. */
inline cudaError_t launch_clusters(const void *kernel, const cluster_plan &plan, int64_t shared_bytes,
                                   cudaStream_t stream, void **arguments) {
  cudaLaunchAttribute attributes[2] = {};
  const dim3 blocks(static_cast<unsigned>(plan.groups * plan.blocks));
  const cudaLaunchConfig_t config =
      lola_cuda_cluster_launch(kernel, blocks, plan.blocks, THREADS, shared_bytes, stream, attributes);
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
  (void)cudaGetLastError();
  return error;
}

inline cudaError_t launch(const lola_device_segment &g, const cluster_plan &plan, int record, bool vector,
                          cudaStream_t stream) {
  void *arguments[] = {const_cast<lola_device_segment *>(&g), const_cast<cluster_plan *>(&plan), &record};
  return launch_clusters(kernel_of(g.dtype, plan.panels, vector), plan, plan.shared_bytes, stream, arguments);
}

} // namespace wgmma_scan
} // namespace

#endif
