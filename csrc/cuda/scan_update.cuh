/* An update of decoding by clusters of scan_wgmma.cuh: one chunk of each row that ends one, from keys to the new state.
 *
 * Unlike a segment's scan it computes the features itself, in the place of the keys: a decoding step has little to do
 * but much to wait for, and a kernel that computed them before this one would be one more to wait for, and their way
 * through memory one more. The blocks of a head share out its pairs and send each other what they have. For the same
 * reason it looks up by itself which rows end a chunk, and the step's other kernels run beside it.
 * The arithmetic is that of features.cu and of scan_wgmma.cuh, so that bits do not tell how a pair or a state came to
 * be.
 */
#ifndef LOLA_CUDA_SCAN_UPDATE_CUH
#define LOLA_CUDA_SCAN_UPDATE_CUH

#include "cuda/decode_rows.cuh"
#include "cuda/features_matrix.cuh"
#include "cuda/plan.cuh"
#include "cuda/scan_wgmma.cuh"

namespace {
namespace wgmma_scan {

/* And of the rows in `rows`. */
struct update_shared : cluster_shared {
  int64_t positions[ROWS_AT_ONCE]; /* of the token */
  int leaving_slots[ROWS_AT_ONCE]; /* ring slots of the first pair to leave */
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Stores a piece at this address in the shared memory of the cluster's block `rank`. */
__device__ __forceinline__ void store_in_cluster(uint32_t address, int rank, const uint4 &x) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "st.shared::cluster.v4.b32 [there], {%2, %3, %4, %5};\n}" ::"r"(address),
               "r"(rank), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

/* Position of the row's token where pairs leave the window with it, else -1. */
__device__ __forceinline__ int64_t updating_position(const lola_device_segment &g, const call_rows &rows,
                                                     const row_plan &plan, int row) {
  const int64_t position = __ldcg(g.tokens_seen + row), updated = __ldcg(g.chunks + row);
  int64_t start, stop;
  row_range(rows, row, &start, &stop);
  return stop > start && begins_update(g, plan.first_update, position, updated) ? position : -1;
}

/* Whether pairs may leave a window, while the step before, and no other, may still be under way: it counts one more
 * token and, if it has an update itself, one more chunk. The whole block. */
__device__ __forceinline__ bool may_update(const lola_device_segment &g) {
  bool may = false;
#pragma unroll 1
  for (int row = own_thread(); row < g.B; row += THREADS)
    may |= __ldcg(g.tokens_seen + row) + 1 >= (__ldcg(g.chunks + row) + 1) * g.C;
  return __syncthreads_or(may);
}

/* What is the same for all units. The cluster's other blocks may write here when they have waited for it. */
__device__ __forceinline__ void begin_cluster(const lola_device_segment &g, const cluster_plan &plan,
                                              cluster_shared &shared) {
  /* Rows past the last newcomer are zero and stay so; others' keys may be on their way already. */
  for (int at = plan.values + own_thread() * 16; g.C % TILE && at < plan.parts; at += THREADS * 16)
    piece_at(at) = make_uint4(0, 0, 0, 0);
  for (int i = own_thread(); g.C % TILE && i < plan.newcomers * plan.panels * 8; i += THREADS)
    if (i % plan.newcomers >= g.C)
      piece_at(phi_at(plan, plan.slots + i % plan.newcomers, i / plan.newcomers)) = make_uint4(0, 0, 0, 0);
  if (own_thread() < ALL_BINS) shared.bins[0][own_thread()] = 0;
  if (own_thread() == 0) {
    barrier_init(shared_address(&shared.full), 1);
    barrier_init(shared_address(&shared.read), plan.blocks * WARPS);
    barrier_init(shared_address(&shared.newcomers), HELPERS);
    fence_barrier_init();
  }
  cluster_arrive();
}

/* An update to do. */
struct due_update {
  int row, set;
  int leaving_slot; /* of the window ring: where the first pair lies that leaves */
  int64_t position; /* of the row's token */
};

/* Asks for the keys of rows first .. end - 1 whose features this block computes: phi is computed in tiles of 64 rows,
 * which the blocks of a head take in turn, and in a block its warpgroups. `slot`, one of `slots`, has the first key. */
template <typename T>
__device__ __forceinline__ void fetch_keys(const lola_device_segment &g, const cluster_plan &plan,
                                           const block_place &block, int first, int end, const char *keys, int slot,
                                           int slots) {
  constexpr int STEP = THREADS / T::phi_pieces;
  const int piece = own_thread() % T::phi_pieces;
  if (8 * piece >= g.D) return;
  int tile = first / TILE, next = tile % plan.column_blocks; /* whose it is */
#pragma unroll 1
  for (; tile * TILE < end; tile++) {
    const bool own = next == block.column_block;
    next = next + 1 == plan.column_blocks ? 0 : next + 1;
    if (!own) continue;
#pragma unroll
    for (int i = 0; i < TILE; i += STEP) {
      const int row = tile * TILE + own_thread() / T::phi_pieces + i;
      int at = slot + row - first;
      if (at >= slots) at -= slots;
      if (row < end)
        cp_async(shared_address(wgmma_memory + phi_at(plan, row, piece)),
                 keys + (static_cast<int64_t>(at) * g.D + 8 * piece) * 2);
    }
  }
}

/* A head's weights (D, M), on their way in the block's registers. */
template <typename T> struct weight_pieces {
  static constexpr int columns = 32 * T::panels;
  float x[(columns * T::phi_pieces + THREADS - 1) / THREADS][8];
};

template <typename T>
__device__ __forceinline__ void ask_weights(const lola_device_segment &g, int head, weight_pieces<T> *w) {
  constexpr int M = weight_pieces<T>::columns;
  const int m = own_thread() % M;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof w->x / sizeof w->x[0]); i++) {
    const int k = (own_thread() + i * THREADS) / M * 8;
    const float *from = g.map.w_k + (static_cast<int64_t>(head) * g.D + k) * M + m;
#pragma unroll
    for (int j = 0; j < 8; j++) w->x[i][j] = k < g.D ? __ldg(from + j * M) : 0;
  }
}

/* Their halves lie where those of the state will: (64, D) each, column m in row lola_column_row(m). */
__device__ __forceinline__ int weights_at(const lola_device_segment &g, const cluster_plan &plan, int low, int m,
                                          int piece) {
  return plan.halves + low * TILE * g.D * 2 + static_cast<int>(tile_offset(TILE, m, piece));
}

template <typename T>
__device__ __forceinline__ void put_weights(const lola_device_segment &g, const cluster_plan &plan,
                                            const weight_pieces<T> &w) {
  constexpr int M = weight_pieces<T>::columns;
  const int row = lola_column_row(own_thread() % M);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof w.x / sizeof w.x[0]); i++) {
    const int piece = (own_thread() + i * THREADS) / M;
    unsigned hi[4], lo[4];
#pragma unroll
    for (int j = 0; j < 4; j++) lola_split_pair(w.x[i][2 * j], w.x[i][2 * j + 1], &hi[j], &lo[j]);
    if (8 * piece >= g.D) break;
    piece_at(weights_at(g, plan, 0, row, piece)) = make_uint4(hi[0], hi[1], hi[2], hi[3]);
    piece_at(weights_at(g, plan, 1, row, piece)) = make_uint4(lo[0], lo[1], lo[2], lo[3]);
  }
}

/* The keys of 64 rows, if they are `there`, times the weights, as `project` of features_matrix.cuh has it: 16 products
 * at a time, in order of k, of halves of either in the same order. wgmma adds them up as mma.sync does. */
template <typename T>
__device__ __forceinline__ void project_tile(const lola_device_segment &g, const cluster_plan &plan, int first,
                                             bool there, float (&acc)[8][4]) {
  const uint32_t base = shared_address(wgmma_memory);
  pin(acc);
#pragma unroll
  for (int panel = 0; panel < T::panels; panel++) {
    const uint32_t keys = base + (panel * plan.rows + first) * ROW;
    const uint32_t high = wgmma_matrix(base + weights_at(g, plan, 0, 0, 8 * panel), 16),
                   low = wgmma_matrix(base + weights_at(g, plan, 1, 0, 8 * panel), 16);
    if constexpr (is_half<T>) {
      const int lane = own_thread() % 32, row = own_thread() % 128 / 32 * 16 + lane % 16;
      unsigned x[4][4], rest[4][4];
#pragma unroll
      for (int step = 0; step < 4; step++) {
        const int at = phi_at(plan, first + row, 8 * panel + 2 * step + lane / 16);
        /* or weights, which nobody writes */
        ldmatrix(x[step], shared_address(wgmma_memory + (there ? at : plan.halves)));
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 pair = lola_widen<__half>(x[step][e]);
          lola_split_pair(pair.x, pair.y, &x[step][e], &rest[step][e]);
        }
      }
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; step++) {
        wgmma<__nv_bfloat16, 0>(acc, x[step], high + 2 * step, panel > 0 || step > 0);
        wgmma<__nv_bfloat16, 0>(acc, rest[step], high + 2 * step, 1);
        wgmma<__nv_bfloat16, 0>(acc, x[step], low + 2 * step, 1);
      }
    } else {
      const uint32_t left = wgmma_matrix(keys, 16);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; step++) {
        wgmma_shared<__nv_bfloat16>(acc, left + 2 * step, high + 2 * step, panel > 0 || step > 0);
        wgmma_shared<__nv_bfloat16>(acc, left + 2 * step, low + 2 * step, 1);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(acc);
  }
}

/* phi of the rows that are this block's to compute, in the place of their keys, for all blocks of the head. */
template <typename T>
__device__ __forceinline__ void compute_features(const lola_device_segment &g, const cluster_plan &plan,
                                                 const block_place &block, int count) {
  constexpr int M = weight_pieces<T>::columns, WARPGROUPS = THREADS / 128;
  /* All warpgroups take as many turns, so that the block's barrier serves: racecheck loses count of the others where
   * some warps wait at one of their own. Who has no tile left takes the turn's first, in vain. */
  const auto tile_of = [&](int turn) {
    return uniform(turn + own_warpgroup() * plan.column_blocks + block.column_block);
  };
#pragma unroll 1
  for (int turn = 0; turn < plan.rows / TILE; turn += WARPGROUPS * plan.column_blocks) {
    int read = tile_of(turn);
    const bool there = read * TILE < plan.rows;
    if (!there) read = turn;
    float acc[8][4];
    project_tile<T>(g, plan, read * TILE, there, acc);
    __syncthreads();                        /* the keys were read */
    const int first = tile_of(turn) * TILE; /* once more: there are no registers to keep it in */
    const int pairs =
        first < plan.slots ? count - first : static_cast<int>(g.C) + plan.slots - first; /* from there on */
    if (pairs <= 0) continue;
    const int c = own_thread() % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = tile_row(0) + 8 * half;
      finish_hedgehog_row(g.map.kind, reinterpret_cast<const float(&)[M / 8][4]>(acc), half, M, c, row < pairs,
                          [&](int column, const unsigned(&y)[4]) {
                            const int at = phi_at(plan, first + row, column / 8);
                            const uint4 x = make_uint4(y[0], y[1], y[2], y[3]);
                            piece_at(at) = x;
                          });
    }
#pragma unroll 2
    for (int i = 0; i < T::phi_pieces / 2; i++) { /* pieces that the thread has just written; few instructions do it */
      const int row = tile_row(0) + i % 2 * 8, at = phi_at(plan, first + row, i / 2 * 4 + c);
      if (row >= pairs) continue;
      const uint4 x = piece_at(at);
#pragma unroll 1
      for (int other = plan.column_blocks - 1; other >= 0; other--)
        if (other != block.column_block)
          store_in_cluster(shared_address(wgmma_memory + at), block.rank - block.column_block + other, x);
    }
  }
}

/* Asks for lines of memory, those of `bytes` from `from` on that fall to this one of so many threads. */
__device__ __forceinline__ void prefetch_lines(const void *from, int64_t bytes, int thread, int threads) {
#pragma unroll 1
  for (int64_t at = thread * INT64_C(128); at < bytes; at += threads * INT64_C(128))
    prefetch_l2(static_cast<const char *>(from) + at);
}

/* Asks for the values of slots that a unit scores; the helpers of all blocks. */
__device__ __forceinline__ void prefetch_values(const lola_device_segment &g, const cluster_plan &plan,
                                                const block_place &block, const due_update &due) {
  const int thread = block.rank * HELPERS + own_thread() - WALKERS;
  const int64_t bytes = static_cast<int64_t>(g.L) * g.Dv * 2;
  prefetch_lines(static_cast<const char *>(g.sparse_values) + (static_cast<int64_t>(due.row) * g.S + due.set) * bytes,
                 bytes, thread, plan.blocks * HELPERS);
}

/* Asks for what a unit begins with, while another one is under way; the helpers. */
__device__ __forceinline__ void prefetch_update(const lola_device_segment &g, const cluster_plan &plan,
                                                const block_place &block, const due_update &due) {
  const int helper = own_thread() - WALKERS, thread = block.rank * HELPERS + helper, threads = plan.blocks * HELPERS;
  const int64_t group = static_cast<int64_t>(due.row) * g.S + due.set, bytes = static_cast<int64_t>(g.L) * g.D * 2;
  prefetch_lines(static_cast<const char *>(g.sparse_keys) + group * bytes, bytes, thread, threads);
  prefetch_values(g, plan, block, due);
  const int64_t state = static_cast<int64_t>(due.row) * g.Hq + due.set * g.rs + own_head(plan, block);
  prefetch_lines(g.hidden + state * g.F * g.Dv, static_cast<int64_t>(g.F) * g.Dv * 4,
                 block.column_block * HELPERS + helper, plan.column_blocks * HELPERS);
  const int64_t window = (static_cast<int64_t>(due.row) * g.Hkv + due.set / (g.S / g.Hkv)) * g.R;
  for (int j = thread; j < g.C; j += threads) {
    int slot = due.leaving_slot + j;
    if (slot >= g.R) slot -= static_cast<int>(g.R);
    prefetch_lines(static_cast<const char *>(g.window_keys) + (window + slot) * g.D * 2, g.D * 2, 0, 1);
    prefetch_lines(static_cast<const char *>(g.window_values) + (window + slot) * g.Dv * 2, g.Dv * 2, 0, 1);
  }
}

/* `next` calls what it is given for the unit after this one, if there is any. */
template <typename T, class Next>
__device__ __forceinline__ void update_unit(const lola_device_segment &g, const cluster_plan &plan,
                                            const block_place &block, cluster_shared &shared, const tables &t,
                                            cluster_turns *turns, const due_update &due, Next next) {
  const int64_t group = static_cast<int64_t>(due.row) * g.S + due.set;
  const int head = due.set * g.rs + own_head(plan, block), C = static_cast<int>(g.C), R = static_cast<int>(g.R);
  const int64_t state = static_cast<int64_t>(due.row) * g.Hq + head;
  const bool helps = own_warpgroup() == WALKERS / 128;
  /* All that is read first is asked for at once, before it is known how many slots are in use. */
  const int count = static_cast<int>(__ldcg(g.sparse_count + group));
  fetch_keys<T>(g, plan, block, 0, g.L, static_cast<const char *>(g.sparse_keys) + group * g.L * g.D * 2, 0, g.L);
  const int64_t window = (static_cast<int64_t>(due.row) * g.Hkv + due.set / (g.S / g.Hkv)) * g.R;
  fetch_keys<T>(g, plan, block, plan.slots, plan.slots + C, static_cast<const char *>(g.window_keys) + window * g.D * 2,
                due.leaving_slot, R);
  if (own_thread() - WALKERS >= 0 && (own_thread() - WALKERS) * 4 < g.F)
    cp_async(shared_address(t.normalizer + (own_thread() - WALKERS) * 4),
             g.normalizer + state * g.F + (own_thread() - WALKERS) * 4);
  weight_pieces<T> weights;
  ask_weights(g, head, &weights);
  const int begin = block.column_block * COLUMNS;
  const auto load_value = [&](int i) {
    int slot = due.leaving_slot + i / T::value_pieces;
    if (slot >= R) slot -= R;
    return load_chunk<T::vector>(static_cast<const char *>(g.window_values) + ((window + slot) * g.Dv + begin) * 2,
                                 i % T::value_pieces * 8, g.Dv - begin);
  };
  uint4 value = make_uint4(0, 0, 0, 0);
  if (own_thread() < C * T::value_pieces) value = load_value(own_thread());
  if (helps) prefetch_values(g, plan, block, due);
  if (own_thread() == WALKERS) {
    lola_device_span span = {};
    span.position = due.position;
    span.batch = due.row; /* of no use: what leaves the window is not among the call's tokens */
    span.tokens = 1;
    span.in_call = 1;
    span.updated = due.position / g.C - 1;
    shared.unit = scan_unit_of(g, span, due.row, due.set, head - due.set * g.rs);
    shared.cut = HIGHEST;
    shared.shift = 16;
  }
  __syncthreads();
  const scan_unit &unit = shared.unit;
  put_weights<T>(g, plan, weights);
  hidden_part h = {}; /* needed last */
  load_hidden<T>(g, block, g.hidden + state * g.F * g.Dv, &h);
#pragma unroll 1
  for (int i = own_thread(); i < C * T::value_pieces; i += THREADS) {
    if (i >= THREADS) value = load_value(i);
    put_values<T>(plan, i / T::value_pieces, i % T::value_pieces, value);
  }
  const int code = static_cast<int>(lola_device_leaving_first(g, unit.last) - unit.base);
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
  const bool selects = uniform(count + C > g.L);
  cp_async_wait_all();
  fence_async_proxy();
  __syncthreads();
  cluster_wait(); /* the last unit is over */
  if (selects) compute_features<T>(g, plan, block, count);
  fence_async_proxy();
  cluster_arrive();
  __syncthreads(); /* the weights were read, the halves take their place */
  if (has_state<T>()) store_halves(plan, h);
  if (helps) {
    for (int i = own_thread() - WALKERS; i < 32 * T::panels; i += HELPERS)
      store_normalizer(plan, i, t.normalizer[2 * i], t.normalizer[2 * i + 1]);
  }
  cluster_wait(); /* all phi are there, and all blocks have read what keep_pairs writes */
  fence_async_proxy();
  __syncthreads();
  const int after = selects ? g.L : count + C;
  if (helps) {
    barrier_arrive(shared_address(&shared.newcomers));
    next([&](const due_update &other) { prefetch_update(g, plan, block, other); });
    named_barrier_sync(HALVES, THREADS); /* the tables are as they shall be */
    if (block.rank == 0) keep_pairs(g, unit, t, count, after, C, own_thread() - WALKERS, HELPERS);
  } else if (selects) {
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
    named_barrier_arrive(HALVES, THREADS);
    fold_newcomers<T>(g, plan, t, &h);
    walkers_sync(); /* s is there */
    store_state<T>(g, block, unit, t, h);
  } else {
    enter_all<T>(g, plan, unit, t, count);
    named_barrier_arrive(HALVES, THREADS);
  }
  turns->rankings += selects;
  turns->updates++;
  __syncthreads(); /* the tables are read to the end */
  cluster_arrive();
}

#endif

/* It lets the next kernel start at once, which has much to ask for before it awaits this one. A large step (with
 * `known.signals`) begins with its last block. */
template <typename T>
__global__ void __launch_bounds__(EMPTY ? 32 : THREADS, 1)
    update_wgmma_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ cluster_plan plan,
                        const __grid_constant__ call_rows rows, const __grid_constant__ row_plan plan_of_rows,
                        const __grid_constant__ decode_rows known) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ update_shared shared;
  const tables t = tables_of(plan);
  const int group = blockIdx.x / plan.blocks;
  block_place block;
  block.rank = blockIdx.x % plan.blocks;
  block.column_block = block.rank % plan.column_blocks;
  lola_device_start_next();
  /* Where there is nothing to do, all clusters but the last make room at once: who awaits it awaits all before. */
  const bool may = may_update(g);
  if (may || group == plan.groups - 1) lola_device_await_previous();
  if (known.signals && blockIdx.x + 1 == gridDim.x) begin_step(g, plan_of_rows, rows, known);
  if (!may) return;
  cluster_turns turns = {};
  bool begun = false;
  int before = 0; /* units of the rows looked at so far */
#pragma unroll 1
  for (int first = 0; first < g.B; first += ROWS_AT_ONCE) {
    const int thread = own_thread(), warp = thread / 32, lane = thread % 32, row = first + thread;
    int64_t position = -1;
    if (thread < ROWS_AT_ONCE && row < g.B) position = updating_position(g, rows, plan_of_rows, row);
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
      shared.rows[at] = row;
      shared.positions[at] = position;
      shared.leaving_slots[at] =
          static_cast<int>(lola_device_ring_slot(lola_device_leaving_first(g, position / g.C), g.R));
    }
    __syncthreads();
    const int units = some * g.S;
#pragma unroll 1
    for (int unit = (group + plan.groups - before % plan.groups) % plan.groups; unit < units; unit += plan.groups) {
      if (!begun) begin_cluster(g, plan, shared);
      begun = true;
      const auto due_at = [&](int index) {
        const int place = index / g.S;
        return due_update{shared.rows[place], index - place * g.S, shared.leaving_slots[place],
                          shared.positions[place]};
      };
      const int after = unit + plan.groups;
      update_unit<T>(g, plan, block, shared, t, &turns, due_at(unit), [&](auto call) {
        if (after < units) call(due_at(after));
      });
    }
    before += units;
  }
  if (begun) cluster_wait(); /* nobody leaves while others may write to it */
#endif
}

/* --- the host's side ---------------------------------------------------------------------------------------------- */

/* Whether an update with this plan computes its features itself. */
inline bool update_projects(const lola_device_segment &g, const cluster_plan &plan) {
  return plan.groups && lola_device_is_hedgehog(g.map) && !g.stores_features && g.F == 64 * plan.panels && g.D == g.F &&
         g.Dv % 8 == 0;
}

inline const void *update_kernel_of(lola_dtype dtype, int panels) {
  return of_kind<true>(dtype, panels,
                       [](auto kind) { return reinterpret_cast<const void *>(update_wgmma_kernel<decltype(kind)>); });
}

inline cudaError_t launch_update(const lola_device_segment &g, const cluster_plan &plan, const call_rows &rows,
                                 const row_plan &plan_of_rows, const decode_rows &known, cudaStream_t stream) {
  void *arguments[] = {const_cast<lola_device_segment *>(&g), const_cast<cluster_plan *>(&plan),
                       const_cast<call_rows *>(&rows), const_cast<row_plan *>(&plan_of_rows),
                       const_cast<decode_rows *>(&known)};
  return launch_clusters(update_kernel_of(g.dtype, plan.panels), plan, plan.shared_bytes, stream, arguments);
}

} // namespace wgmma_scan
} // namespace

#endif
