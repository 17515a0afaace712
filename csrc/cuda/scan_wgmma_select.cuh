/* Of scan_wgmma.cuh, what follows from the errors: which pairs are dropped, the trade of rows, and the fold. */
#ifndef LOLA_CUDA_SCAN_WGMMA_SELECT_CUH
#define LOLA_CUDA_SCAN_WGMMA_SELECT_CUH

#include "cuda/scan_wgmma_score.cuh"

namespace {
namespace wgmma_scan {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* --- select ------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ int64_t position_of(const lola_device_segment &g, const scan_unit &unit, const tables &t,
                                               int row) {
  const int code = t.code[row];
  if (code >= 0) return unit.base + code;
  return g.sparse_positions[(static_cast<int64_t>(unit.row) * g.S + unit.set) * g.L - code - 1];
}

/* Whether nobody has an i-th row. Asked of the last one alone: what all have is worked out without a branch. */
__device__ __forceinline__ bool no_rows(const cluster_plan &plan, int i) {
  return i == OWN_ROWS - 1 && i * WALKERS >= plan.rows;
}

/* The sums of the thread's rows over the cluster's parts: column blocks in order, then heads in order. */
__device__ __forceinline__ void sum_rows(const cluster_plan &plan, float (&total)[OWN_ROWS]) {
  constexpr int AT_ONCE = 8; /* parts that are asked for before any is used */
  const float *parts = reinterpret_cast<const float *>(wgmma_memory + plan.parts);
  const int thread = own_thread(), rows = plan.rows, blocks = plan.blocks, column_blocks = plan.column_blocks;
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) total[i] = 0;
  if (blocks <= AT_ONCE && column_blocks <= 2) {
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) {
      if (no_rows(plan, i)) break;
      const float *part = parts + min(thread + i * WALKERS, rows - 1);
      float x[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) x[j] = j < blocks ? part[j * rows] : 0;
#pragma unroll
      for (int j = 0; j < AT_ONCE; j += 2) /* without a part nothing changes: none is negative */
        total[i] = column_blocks == 2 ? total[i] + (x[j] + x[j + 1]) : total[i] + x[j] + x[j + 1];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) {
    if (no_rows(plan, i)) break;
    const float *part = parts + min(thread + i * WALKERS, rows - 1);
#pragma unroll 1
    for (int left = blocks; left > 0; left -= column_blocks) {
      float head = *part;
#pragma unroll 1
      for (int j = 1; j < column_blocks; j++) head += part[j * rows];
      total[i] += head;
      part += column_blocks * rows;
    }
  }
}

/* Adds the parts of the cluster's blocks for the thread's rows; as keys: scores are sums of squares, so that their bits
 * order as they do. */
__device__ __forceinline__ void sum_parts(const lola_device_segment &g, const cluster_plan &plan, const tables &t,
                                          int count, unsigned (&key)[OWN_ROWS]) {
  const int C = static_cast<int>(g.C), rows = plan.rows, slots = plan.slots, thread = own_thread();
  float total[OWN_ROWS];
  sum_rows(plan, total);
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) {
    const int row = thread + i * WALKERS;
    key[i] = UNUSED;
    if (row >= rows) continue;
    if (row < slots ? row < count : row - slots < C)
      key[i] = total[i] == total[i] ? __float_as_uint(total[i]) : HIGHEST;
    t.score[row] = __uint_as_float(key[i]);
  }
}

/* Keys of a thread's rows. */
struct row_keys {
  unsigned own[OWN_ROWS];
};

/* Which of the thread's rows are among the `ties` latest of the pairs with the key `tied`, a bit each. The walkers:
 * each knows its rows' positions, and they search for the first one to drop together, counting at `zeros`. Rarely
 * called, so that no register is kept for it elsewhere. */
__device__ __noinline__ unsigned find_latest(const lola_device_segment &g, const cluster_plan &plan,
                                             const scan_unit &unit, unsigned tied, int ties, row_keys key,
                                             unsigned *zeros) {
  const tables t = tables_of(plan); /* taken from the caller they would be in memory, and not known to be shared */
  int64_t position[OWN_ROWS];
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) {
    position[i] = -1;
    if (key.own[i] == tied) position[i] = position_of(g, unit, t, own_thread() + i * WALKERS);
  }
  int64_t low = 0, high = unit.span.position + unit.span.tokens;
#pragma unroll 1
  for (int turn = 0; low < high; turn++) { /* at least `ties` lie at or after `low`, fewer after `high` */
    const int64_t middle = low + (high - low + 1) / 2;
    unsigned after = 0;
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) after += __popc(__ballot_sync(ALL, position[i] >= middle));
    if (own_thread() % 32 == 0 && after) atomicAdd(&zeros[turn], after);
    walkers_sync();
    if (zeros[turn] >= static_cast<unsigned>(ties))
      low = middle;
    else
      high = middle - 1;
  }
  unsigned latest = 0;
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) latest |= (position[i] >= low ? 1u : 0u) << i;
  return latest;
}

/* One more at this place of shared memory. */
__device__ __forceinline__ void count_one(unsigned *at) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(shared_address(at)) : "memory");
}

/* Finds the `drops` lowest pairs, ties to the later position: t.drop and t.kept, for who waits for the walkers. Returns
 * how many slots are freed. Keys are counted by bins, first around the last cut and then within the bin where the cut
 * falls, until it is the end of one. */
__device__ __forceinline__ int list_dropped(const lola_device_segment &g, const cluster_plan &plan,
                                            cluster_shared &shared, const tables &t, int count, int drops,
                                            const unsigned (&key)[OWN_ROWS]) {
  constexpr int WIDEST = 22;
  const int thread = own_thread(), warp = thread / 32, lane = thread % 32;
  unsigned low = 0, high = HIGHEST + 1;
  int below = 0, until = count + static_cast<int>(g.C); /* keys below `low`, fewer than drops; below `high`, no fewer */
  int shift = shared.shift;
  unsigned base = shared.cut - min(shared.cut, BINS / 2u << shift);
  int likely = shift;
  unsigned *zeros; /* bins that nobody has counted in yet */
#pragma unroll 1
  for (int turn = 0;; turn++) {
    unsigned *const bins = shared.bins[turn % 3];
    zeros = shared.bins[(turn + 1) % 3];
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) {
      if (no_rows(plan, i)) break;
      const unsigned bin = min(key[i] - base >> shift, static_cast<unsigned>(BINS));
      count_one(&bins[key[i] < base ? BEFORE : bin < BINS ? bin : AFTER]);
    }
    /* Who still reads bins, reads those of the last turn. */
    if (thread < ALL_BINS) zeros[thread] = 0;
    walkers_sync();
    const uint4 own = *reinterpret_cast<const uint4 *>(&bins[4 * lane]);
    const int start = static_cast<int>(bins[BEFORE]);
    const int counts[4] = {static_cast<int>(own.x), static_cast<int>(own.y), static_cast<int>(own.z),
                           static_cast<int>(own.w)};
    const int all = counts[0] + counts[1] + (counts[2] + counts[3]);
    int reach = all;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int other = __shfl_up_sync(ALL, reach, i);
      if (lane >= i) reach += other;
    }
    reach += start;
    /* The first of a lane's bins with which there are `drops` keys, or its last; of the first lane that has so many, or
     * the last one. */
    int bin = 0, begin = reach - all, end = begin + counts[0];
#pragma unroll
    for (int i = 1; i < 4; i++) {
      if (end < drops) bin = i, begin = end, end += counts[i];
    }
    const unsigned owners = __ballot_sync(ALL, reach >= drops);
    const int owner = owners ? __ffs(static_cast<int>(owners)) - 1 : 31;
    static_assert(ROWS_MOST < 1 << 11);
    const unsigned found_bin = __shfl_sync(ALL, static_cast<unsigned>(end << 11 | begin) << 2 | bin, owner);
    begin = static_cast<int>(found_bin >> 2 & 2047);
    end = static_cast<int>(found_bin >> 13);
    const bool within = start < drops && owners;
    if (within) {
      below = begin;
      until = end;
      low = base + ((4 * owner + (found_bin & 3)) << shift);
      high = min(high, low + (1u << shift));
    } else if (start < drops) {
      below = end;
      low = base + (static_cast<unsigned>(BINS) << shift);
    } else {
      until = start;
      high = base;
    }
    const bool found = until == drops || high - low <= 1;
    if (turn == 0 && !found) likely = within ? max(0, shift - 1) : min(WIDEST, shift + 1);
    if (found) break;
    base = low;
    shift = max(0, 32 - BIN_BITS - __clz(static_cast<int>(high - low - 1))); /* the bins hold them all */
  }
  unsigned latest = 0; /* of too many that have the key `low` */
  row_keys own_keys;
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) own_keys.own[i] = key[i];
  if (until != drops) latest = find_latest(g, plan, shared.unit, low, drops - below, own_keys, zeros);
  const unsigned bound = until == drops ? high : low;
  unsigned bits[OWN_ROWS];
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) {
    bits[i] = 0;
    if (no_rows(plan, i)) break;
    bits[i] = __ballot_sync(ALL, key[i] < bound || latest >> i & 1);
    if (lane == 0) shared.dropped[i * WARPS + warp] = bits[i];
  }
  walkers_sync();
  if (thread < ALL_BINS) shared.bins[0][thread] = 0; /* for the next ranking */
  if (thread == 0) {
    shared.cut = high;
    shared.shift = likely;
  }
  const int mine = 32 * lane < plan.rows ? __popc(shared.dropped[lane]) : 0, slots = plan.slots,
            C = static_cast<int>(g.C);
  const int freed = __reduce_add_sync(ALL, 32 * lane < slots ? mine : 0);
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) {
    if (no_rows(plan, i)) break;
    const int word = i * WARPS + warp, row = 32 * word + lane, newcomer = row - slots;
    const int rank = __reduce_add_sync(ALL, lane < word ? mine : 0) + __popc(bits[i] & ((1u << lane) - 1));
    const bool dropped = bits[i] >> lane & 1;
    if (newcomer < 0 ? dropped : newcomer < C && !dropped) { /* t.kept lies behind t.drop */
      const int at = newcomer < 0 ? rank : plan.newcomers + newcomer - (rank - freed);
      t.drop[at] = static_cast<uint16_t>(newcomer < 0 ? row : newcomer);
    }
  }
  return freed;
}

/* --- swap --------------------------------------------------------------------------------------------------------- */

/* Newcomers that stay trade places with the pairs dropped from slots, both in order; then they take empty slots. 16
 * threads take a pair. */
template <typename T>
__device__ __forceinline__ void swap_pairs(const lola_device_segment &g, const cluster_plan &plan,
                                           const block_place &block, const tables &t, int count, int drops, int freed) {
  constexpr int LANES = 16, TOGETHER = WALKERS / LANES, AHEAD = 2;
  const int lane = own_thread() % LANES, stay = static_cast<int>(g.C) - (drops - freed);
  const int columns = g.Dv - block.column_block * COLUMNS;
#pragma unroll 1
  for (int first = own_thread() / LANES; first - own_thread() / LANES < stay; first += TOGETHER * AHEAD) {
    uint4 v[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int rank = first + i * TOGETHER;
      v[i] = make_uint4(0, 0, 0, 0);
      if (rank < stay && rank < freed && lane < T::value_pieces)
        v[i] = load_chunk<T::vector>(t.value[t.drop[rank]], 8 * lane, columns);
    }
    __syncwarp(); /* t.value is read before it is written */
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int rank = first + i * TOGETHER;
      if (rank >= stay) continue;
      const int newcomer = plan.slots + t.kept[rank], slot = rank < freed ? t.drop[rank] : count + rank - freed;
      if (lane < T::phi_pieces) {
        uint4 &a = piece_at(phi_at(plan, newcomer, lane)), &b = piece_at(phi_at(plan, slot, lane));
        const uint4 out = rank < freed ? b : make_uint4(0, 0, 0, 0);
        b = a;
        a = out;
      }
      if (lane == LANES - 1) {
        t.value[slot] = t.value[newcomer];
        t.code[slot] = t.code[newcomer];
        t.score[slot] = t.score[newcomer];
      }
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int rank = first + i * TOGETHER;
      if (rank < stay && lane < T::value_pieces) put_values<T>(plan, t.kept[rank], lane, v[i]);
    }
  }
}

/* While all fit: newcomers take the next slots, unranked. */
template <typename T>
__device__ __forceinline__ void enter_all(const lola_device_segment &g, const cluster_plan &plan, const scan_unit &unit,
                                          const tables &t, int count) {
  const int C = static_cast<int>(g.C);
  for (int i = own_thread(); unit.folds && i < C * T::phi_pieces; i += WALKERS)
    piece_at(phi_at(plan, count + i / T::phi_pieces, i % T::phi_pieces)) =
        piece_at(phi_at(plan, plan.slots + i / T::phi_pieces, i % T::phi_pieces));
  for (int j = own_thread(); j < C; j += WALKERS) {
    t.value[count + j] = t.value[plan.slots + j];
    t.code[count + j] = t.code[plan.slots + j];
    t.score[count + j] = NAN;
  }
}

/* --- fold --------------------------------------------------------------------------------------------------------- */

/* The newcomers' rows, which now hold what is dropped and zeros, into H and s, and the halves of s. */
template <typename T>
__device__ __forceinline__ void fold_newcomers(const lola_device_segment &g, const cluster_plan &plan, const tables &t,
                                               hidden_part *h) {
  const int warp = own_thread() / 32, lane = own_thread() % 32;
  const int panel = own_warpgroup();
  const uint32_t base = shared_address(wgmma_memory);
  /* s of 64 rows, by the last warpgroup: two features to a lane, rows by two lanes, fours in turn. */
  const auto fold_normalizer = [&](int first) {
    const int word = warp % 4 * 16 + lane % 16;
    if (warp % 4 * 16 >= 32 * T::panels) return;
    float x = 0, y = 0;
#pragma unroll 8
    for (int j = 0; j < TILE / 2; j++) {
      const int row = plan.slots + first + j / 4 * 8 + lane / 16 * 4 + j % 4;
      const float2 pair = lola_widen<__nv_bfloat16>(word_at(phi_at(plan, row, word / 4) + word % 4 * 4));
      x += pair.x;
      y += pair.y;
    }
    x += __shfl_xor_sync(ALL, x, 16);
    y += __shfl_xor_sync(ALL, y, 16);
    if (lane >= 16) return;
    x = t.normalizer[2 * word] += x;
    y = t.normalizer[2 * word + 1] += y;
    store_normalizer(plan, word, x, y);
  };
#pragma unroll 1
  for (int first = 0; first < plan.newcomers; first += TILE) {
    if (!has_state<T>()) {
      if (panel == WALKERS / 128 - 1) fold_normalizer(first);
      continue;
    }
    const uint32_t phi = wgmma_matrix(base + (panel * plan.rows + plan.slots + first) * ROW, plan.rows * ROW);
    const uint32_t values = wgmma_matrix(base + plan.values + first * ROW, plan.newcomers * ROW);
    float acc[8][4];
    pin(acc);
    wgmma_fence();
    if constexpr (is_half<T>) {
#pragma unroll
      for (int step = 0; step < 4; step++)
        multiply_fold(acc, phi + step * ROW, values + plan.newcomers * (ROW / 16) + step * ROW, step > 0);
    }
#pragma unroll
    for (int step = 0; step < 4; step++)
      multiply_fold(acc, phi + step * ROW, values + step * ROW, is_half<T> || step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(acc);
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) (*h)[i][e] += acc[i][e];
  }
}

#endif

} // namespace wgmma_scan
} // namespace

#endif
