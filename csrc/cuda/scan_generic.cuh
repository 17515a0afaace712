/* The scan on any device, for all sizes, types and scores.
 *
 * A unit, one (row, set), belongs to a group of rs * ceil(Dv / 32) blocks: block (h, j) keeps columns 32 j .. 32 j + 31
 * of head h's H, and its s, in shared memory while it walks the unit's chunks. A chunk costs the group one exchange
 * through global memory: every block writes its part of each pair's error, waits for the others, and then selects for
 * itself. All blocks are resident at once (a cooperative launch), groups take units in turn.
 * 16-bit caches score and fold on the matrix units: features are bfloat16 by contract and so exact, H stands beside
 * itself split into two bfloat16 halves (2^-17), values are split where they are float16; sums are float32, and what a
 * fold adds to H is summed for 64 pairs and then added once. float32 caches use plain multiply-adds. Order of sums:
 * within a part as the fragments lie, then over column blocks, then over heads. It depends on nothing but the pair and
 * the state, so a call's cut, the batch and the grid leave no trace in any bit. */
#ifndef LOLA_CUDA_SCAN_GENERIC_CUH
#define LOLA_CUDA_SCAN_GENERIC_CUH

#include "cuda/chain.cuh"
#include "cuda/scan_block.cuh"

namespace {
namespace generic_scan {

constexpr int WARPS = 12, THREADS = WARPS * 32;
constexpr int COLUMNS = 32;     /* of H, to a block */
constexpr int TILES = 3;        /* of 16 pairs, to a warp: 576 pairs are one round */
constexpr int VALUE_PITCH = 40; /* of staged values: rows of 80 bytes meet no bank conflicts */
constexpr int PLAIN_PAIRS = 4;  /* pairs that a warp scores at a time in float32 */
constexpr int BINS = 256;

/* How a cache's scan is laid out: the same on every call for one device, so that the order of sums is too. */
struct scan_plan {
  int groups, group_blocks, column_blocks;
  int pairs;        /* L + C, padded to a multiple of 4 */
  int stage;        /* pairs that are folded at a time */
  int lists_shared; /* per-pair lists lie in shared memory, else in `exchange` */
  int64_t list_bytes, shared_bytes;
  int vector_recalled; /* 16-byte stores are possible */
  unsigned identity;   /* LOLA_IDENTITY */
  /* offsets into shared memory */
  int hidden, normalizer, halves, features, values, lists;
};

/* --- shared memory ---------------------------------------------------------------------------------------------- */

/* Lists over E: sparse slots 0 .. L-1, then the pairs that leave, L .. L+C-1. */
struct pair_lists {
  const char **phi, **value;
  int64_t *position;
  int *code;
  float *score;        /* of E at this ranking, in the order of E */
  float *slot_score;   /* (L,) at the last ranking */
  float *given;        /* own scores of pairs, or NULL */
  unsigned *dropped;   /* a bit for each of E */
  int *dropped_before; /* for each word of `dropped` */
  int *drop;           /* places in E of the dropped pairs, ascending; at most C */
};

/* The block's part of the state, and its stage. */
extern __shared__ __align__(128) char scan_memory[];

/* (F padded to 16, 32) */
__device__ float *hidden_of(const scan_plan &plan) { return reinterpret_cast<float *>(scan_memory + plan.hidden); }
/* (F padded to 16,) */
__device__ float *normalizer_of(const scan_plan &plan) {
  return reinterpret_cast<float *>(scan_memory + plan.normalizer);
}
/* (66, F padded to 64) swizzled: 32 columns of H high, 32 low, s high, s low. */
__device__ __nv_bfloat16 *halves_of(const scan_plan &plan) {
  return reinterpret_cast<__nv_bfloat16 *>(scan_memory + plan.halves);
}
/* Staged phi of dropped pairs: bfloat16 (stage, F padded to 64) swizzled, or float32 (stage, F). */
template <typename T> __device__ T *staged_features(const scan_plan &plan) {
  return reinterpret_cast<T *>(scan_memory + plan.features);
}
/* Staged values: high and low halves of (stage, VALUE_PITCH), or float32 (stage, 32). */
template <typename T> __device__ T *staged_values(const scan_plan &plan) {
  return reinterpret_cast<T *>(scan_memory + plan.values);
}

/* The block's place and memory. */
struct scan_block {
  pair_lists lists;
  float *exchange;   /* the group's, (2, group_blocks, pairs) */
  unsigned *barrier; /* the group's: arrivals, leavers */
  int rank, head, column_block;
};

/* In static shared memory: kept out of registers, which the products need. */
struct block_shared {
  scan_block block;
  scan_unit unit;
  int rows[THREADS]; /* cache rows with work, of the THREADS being looked at */
  int row_count[WARPS];
};

/* What changes from chunk to chunk; every thread of the group keeps the same. */
struct scan_progress {
  int64_t folded;
  unsigned rounds;              /* of the group's barrier, in this launch */
  int count;                    /* sparse slots in use */
  int recall_first, recall_end; /* tokens of the span whose phi(q)^T H is still to be written */
  bool leaving;                 /* the lists hold the next update's leaving pairs */
};

/* --- the group's barrier ---------------------------------------------------------------------------------------- */

/* Says that this block's writes are done. Every thread calls it; the release covers what the barrier of the block has
 * ordered before it. */
__device__ void arrive(const scan_block &block, scan_progress *progress) {
  progress->rounds++;
  __syncthreads();
  if (threadIdx.x == 0) add_signal(block.barrier, 1);
}

/* Waits until every block of the group has arrived as often as this one. The last warp looks, the first may still be
 * at work. */
__device__ void await(const scan_plan &plan, const scan_block &block, const scan_progress &progress) {
  if (threadIdx.x == THREADS - 32) {
    const unsigned target = progress.rounds * static_cast<unsigned>(plan.group_blocks);
    while (static_cast<int>(load_signal(block.barrier) - target) < 0) {
    }
  }
  __syncthreads();
}

/* The last block to leave puts the counters back to zero; nobody waits any more by then. */
__device__ void leave_barrier(const scan_plan &plan, const scan_block &block, const scan_progress &progress) {
  if (!progress.rounds || threadIdx.x) return;
  __threadfence();
  if (atomicAdd(block.barrier + 1, 1u) + 1 == static_cast<unsigned>(plan.group_blocks)) {
    block.barrier[0] = 0;
    block.barrier[1] = 0;
  }
}

/* Elements of the cache, and whether rows of phi and values can be read 16 bytes at a time. */
template <typename Element, bool VECTOR_ROWS> struct cache_kind {
  using element = Element;
  static constexpr bool tensor = true, vector = VECTOR_ROWS;
};
template <bool VECTOR_ROWS> struct cache_kind<float, VECTOR_ROWS> {
  using element = float;
  static constexpr bool tensor = false, vector = VECTOR_ROWS;
};

/* The rows of the right-hand matrix: column `column` of H (high; its low half is 32 rows on), then s high, s low. */
constexpr int LOW_ROWS = COLUMNS, NORMALIZER_ROW = 2 * COLUMNS, HALF_ROWS = 2 * COLUMNS + 2;

__device__ void store_halves(const scan_plan &plan, int pitch, int f, int column, float x, float y) {
  unsigned hi, lo;
  lola_split_pair(x, y, &hi, &lo);
  const int row = lola_column_row(column);
  *reinterpret_cast<unsigned *>(halves_of(plan) + lola_swizzled(row, f, pitch)) = hi;
  *reinterpret_cast<unsigned *>(halves_of(plan) + lola_swizzled(row + LOW_ROWS, f, pitch)) = lo;
}

__device__ void store_normalizer_halves(const scan_plan &plan, int pitch, int f, float x) {
  __nv_bfloat16 hi, lo;
  lola_split(x, &hi, &lo);
  halves_of(plan)[lola_swizzled(NORMALIZER_ROW, f, pitch)] = hi;
  halves_of(plan)[lola_swizzled(NORMALIZER_ROW + 1, f, pitch)] = lo;
}

/* Where the group's blocks exchange their parts in a round: two areas in turn, so that one barrier a round suffices. */
__device__ float *parts_of(const scan_plan &plan, const scan_block &block, unsigned round) {
  return block.exchange + static_cast<int64_t>(round & 1) * plan.group_blocks * plan.pairs;
}

/* --- lists of pairs --------------------------------------------------------------------------------------------- */

__host__ __device__ int64_t list_bytes_of(int64_t L, int64_t C) {
  const int64_t n = L + C, words = (n + 31) / 32;
  return n * (8 + 8 + 8 + 4 + 4 + 4) + L * 4 + words * 8 + C * 4;
}

__device__ pair_lists lay_out_lists(char *base, int64_t L, int64_t C) {
  const int64_t n = L + C, words = (n + 31) / 32;
  pair_lists lists;
  lists.phi = reinterpret_cast<const char **>(base);
  lists.value = lists.phi + n;
  lists.position = reinterpret_cast<int64_t *>(lists.value + n);
  lists.code = reinterpret_cast<int *>(lists.position + n);
  lists.score = reinterpret_cast<float *>(lists.code + n);
  lists.given = lists.score + n;
  lists.slot_score = lists.given + n;
  lists.dropped = reinterpret_cast<unsigned *>(lists.slot_score + L);
  lists.dropped_before = reinterpret_cast<int *>(lists.dropped + words);
  lists.drop = lists.dropped_before + words;
  return lists;
}

/* Place in the lists of the pair at `i` of E. */
__device__ int list_at(const lola_device_segment &g, int count, int i) { return i < count ? i : i - count + g.L; }

__device__ bool was_dropped(const pair_lists &lists, int i) { return lists.dropped[i / 32] >> (i % 32) & 1; }

/* How many of E before `i` were dropped. */
__device__ int dropped_before(const pair_lists &lists, int i) {
  return lists.dropped_before[i / 32] + __popc(lists.dropped[i / 32] & ((1u << (i % 32)) - 1));
}

/* --- the state in shared memory --------------------------------------------------------------------------------- */

template <typename T>
__device__ void load_state(const lola_device_segment &g, const scan_plan &plan, const scan_block &block,
                           const scan_unit &unit) {
  const int rows = lola_padded(g.F, 16), first = block.column_block * COLUMNS;
  const int64_t state = static_cast<int64_t>(unit.row) * g.Hq + unit.head;
  const float *H = g.hidden + state * g.F * g.Dv, *s = g.normalizer + state * g.F;
  for (int i = threadIdx.x; i < rows * COLUMNS; i += THREADS) {
    const int f = i / COLUMNS, column = first + i % COLUMNS;
    hidden_of(plan)[i] = f < g.F && column < g.Dv ? H[static_cast<int64_t>(f) * g.Dv + column] : 0;
  }
  for (int f = threadIdx.x; f < rows; f += THREADS) normalizer_of(plan)[f] = f < g.F ? s[f] : 0;
  if (!T::tensor) return;
  const int pitch = lola_padded(g.F, 64);
  __syncthreads();
  for (int i = threadIdx.x; i < pitch / 2 * COLUMNS; i += THREADS) {
    const int f = i / COLUMNS * 2, column = i % COLUMNS;
    const bool inside = f < rows; /* `rows` is even */
    store_halves(plan, pitch, f, column, inside ? hidden_of(plan)[f * COLUMNS + column] : 0,
                 inside ? hidden_of(plan)[(f + 1) * COLUMNS + column] : 0);
  }
  for (int f = threadIdx.x; f < pitch; f += THREADS)
    store_normalizer_halves(plan, pitch, f, f < rows ? normalizer_of(plan)[f] : 0);
}

__device__ void store_state(const lola_device_segment &g, const scan_plan &plan, const scan_block &block,
                            const scan_unit &unit) {
  const int first = block.column_block * COLUMNS;
  const int64_t state = static_cast<int64_t>(unit.row) * g.Hq + unit.head;
  float *H = g.hidden + state * g.F * g.Dv, *s = g.normalizer + state * g.F;
  for (int i = threadIdx.x; i < g.F * COLUMNS; i += THREADS) {
    const int column = first + i % COLUMNS;
    if (column < g.Dv) H[static_cast<int64_t>(i / COLUMNS) * g.Dv + column] = hidden_of(plan)[i];
  }
  for (int f = threadIdx.x; !block.column_block && f < g.F; f += THREADS) s[f] = normalizer_of(plan)[f];
}

/* --- phi^T H and phi^T s ---------------------------------------------------------------------------------------- */

/* 16 N rows of phi against H and s: rows[i][half] is row 16 i + 8 half + lane / 4. acc[i][n] then holds the fragments
 * of 32 columns (see lola_column_row), acc[i][4] two halves of phi^T s in the first lane of each quad. */
template <bool VECTOR, int N>
__device__ void multiply(const lola_device_segment &g, const scan_plan &plan, const char *const (&rows)[N][2],
                         float (&acc)[N][5][4]) {
  const int lane = threadIdx.x % 32, group = lane / 4, c = lane % 4, pitch = lola_padded(g.F, 64);
  uint4 next[N][2];
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) next[i][half] = load_chunk<VECTOR>(rows[i][half], 8 * c, g.F);
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int n = 0; n < 5; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][n][e] = 0;
  for (int k = 0; k < g.F; k += 32) {
    lola_fragment phi[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
      phi[i] = lola_fragment_of(next[i][0], next[i][1], plan.identity);
#pragma unroll
      for (int half = 0; half < 2; half++) next[i][half] = load_chunk<VECTOR>(rows[i][half], k + 32 + 8 * c, g.F);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const __nv_bfloat16 *at = halves_of(plan) + lola_swizzled(8 * n + group, k + 8 * c, pitch);
      const uint4 high = *reinterpret_cast<const uint4 *>(at);
      const uint4 low = *reinterpret_cast<const uint4 *>(at + LOW_ROWS * pitch);
#pragma unroll
      for (int i = 0; i < N; i++) lola_mma_chunk(acc[i][n], phi[i], high);
#pragma unroll
      for (int i = 0; i < N; i++) lola_mma_chunk(acc[i][n], phi[i], low);
    }
    uint4 s = make_uint4(0, 0, 0, 0);
    if (group < 2)
      s = *reinterpret_cast<const uint4 *>(halves_of(plan) + lola_swizzled(NORMALIZER_ROW + group, k + 8 * c, pitch));
#pragma unroll
    for (int i = 0; i < N; i++) lola_mma_chunk(acc[i][4], phi[i], s);
  }
}

/* The same in float32 for up to PLAIN_PAIRS rows: n[i] is column `lane` of phi_i^T H, z[i] the whole phi_i^T s. */
template <bool VECTOR>
__device__ void multiply_plain(const lola_device_segment &g, const scan_plan &plan,
                               const float *const (&rows)[PLAIN_PAIRS], float (&n)[PLAIN_PAIRS],
                               float (&z)[PLAIN_PAIRS]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < PLAIN_PAIRS; i++) n[i] = z[i] = 0;
  if constexpr (VECTOR) {
    for (int f = 0; f < g.F; f += 4) {
      float4 phi[PLAIN_PAIRS];
      float h[4];
#pragma unroll
      for (int i = 0; i < PLAIN_PAIRS; i++) phi[i] = __ldg(reinterpret_cast<const float4 *>(rows[i] + f));
#pragma unroll
      for (int e = 0; e < 4; e++) h[e] = hidden_of(plan)[(f + e) * COLUMNS + lane];
#pragma unroll
      for (int i = 0; i < PLAIN_PAIRS; i++) {
        n[i] = fmaf(phi[i].x, h[0], n[i]);
        n[i] = fmaf(phi[i].y, h[1], n[i]);
        n[i] = fmaf(phi[i].z, h[2], n[i]);
        n[i] = fmaf(phi[i].w, h[3], n[i]);
      }
    }
  } else {
    for (int f = 0; f < g.F; f++) {
      const float h = hidden_of(plan)[f * COLUMNS + lane];
#pragma unroll
      for (int i = 0; i < PLAIN_PAIRS; i++) n[i] = fmaf(__ldg(rows[i] + f), h, n[i]);
    }
  }
  for (int f = lane; f < g.F; f += 32) {
    const float s = normalizer_of(plan)[f];
#pragma unroll
    for (int i = 0; i < PLAIN_PAIRS; i++) z[i] = fmaf(__ldg(rows[i] + f), s, z[i]);
  }
#pragma unroll
  for (int i = 0; i < PLAIN_PAIRS; i++) z[i] = warp_sum(z[i]);
}

/* --- score ------------------------------------------------------------------------------------------------------ */

/* Every pair's error over this block's columns, into the exchange. */
template <typename T>
__device__ void score_recall(const lola_device_segment &g, const scan_plan &plan, const scan_block &block, int count,
                             int all, float *out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = block.column_block * COLUMNS;
  const pair_lists &lists = block.lists;
  if constexpr (T::tensor) {
    const int group = lane / 4, c = lane % 4;
    for (int from = warp * TILES * 16; from < all; from += WARPS * TILES * 16) {
      const char *rows[TILES][2];
      float acc[TILES][5][4];
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          rows[i][half] = lists.phi[list_at(g, count, min(from + 16 * i + 8 * half + group, all - 1))];
      multiply<T::vector>(g, plan, rows, acc);
      uint4 v[TILES][2];
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          v[i][half] = load_chunk<T::vector>(
              lists.value[list_at(g, count, min(from + 16 * i + 8 * half + group, all - 1))], first + 8 * c, g.Dv);
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const recall_scale scale = recall_scale_of(quad_normalizer(acc[i][4], half));
          const unsigned pairs[4] = {v[i][half].x, v[i][half].y, v[i][half].z, v[i][half].w};
          float sum = 0;
#pragma unroll
          for (int n = 0; n < 4; n++) {
            const float2 value = lola_widen<typename T::element>(pairs[n]);
            sum = recall_error(scale, acc[i][n][2 * half], value.x, sum);
            sum = recall_error(scale, acc[i][n][2 * half + 1], value.y, sum);
          }
          sum += __shfl_xor_sync(ALL, sum, 1);
          sum += __shfl_xor_sync(ALL, sum, 2);
          const int pair = from + 16 * i + 8 * half + group;
          if (c == 0 && pair < all) out[pair] = sum;
        }
    }
  } else {
    for (int from = warp * PLAIN_PAIRS; from < all; from += WARPS * PLAIN_PAIRS) {
      const float *rows[PLAIN_PAIRS];
      float n[PLAIN_PAIRS], z[PLAIN_PAIRS];
#pragma unroll
      for (int i = 0; i < PLAIN_PAIRS; i++)
        rows[i] = reinterpret_cast<const float *>(lists.phi[list_at(g, count, min(from + i, all - 1))]);
      multiply_plain<T::vector>(g, plan, rows, n, z);
#pragma unroll
      for (int i = 0; i < PLAIN_PAIRS; i++) {
        const float *value = reinterpret_cast<const float *>(lists.value[list_at(g, count, min(from + i, all - 1))]);
        const float v = first + lane < g.Dv ? value[first + lane] : 0;
        const float sum = warp_sum(recall_error(recall_scale_of(z[i]), n[i], v, 0));
        if (lane == 0 && from + i < all) out[from + i] = sum;
      }
    }
  }
}

/* Adds the parts of the group's blocks: column blocks in order, then heads in order. */
__device__ void sum_parts(const scan_plan &plan, const pair_lists &lists, const float *parts, int all) {
  constexpr int AHEAD = 8;
  for (int i = threadIdx.x; i < all; i += THREADS) {
    float total = 0, head = 0;
    int column_block = 0;
    for (int at = 0; at < plan.group_blocks; at += AHEAD) {
      float part[AHEAD];
#pragma unroll
      for (int e = 0; e < AHEAD; e++)
        part[e] = at + e < plan.group_blocks ? __ldcg(parts + static_cast<int64_t>(at + e) * plan.pairs + i) : 0;
#pragma unroll
      for (int e = 0; e < AHEAD; e++) {
        if (at + e >= plan.group_blocks) break;
        head += part[e];
        if (++column_block == plan.column_blocks) {
          total += head;
          head = 0;
          column_block = 0;
        }
      }
    }
    lists.score[i] = total;
  }
}

/* The caller's score of a pair that leaves, summed over the set's heads when it entered or is still a token. */
__device__ float given_score(const lola_device_segment &g, const scan_unit &unit, int code) {
  if (code < g.R)
    return g.window_given[(static_cast<int64_t>(unit.row) * g.S + unit.set) * g.R +
                          lola_device_ring_slot(unit.base + code, g.R)];
  float sum = 0;
  for (int h = 0; h < g.rs; h++)
    sum += *reinterpret_cast<const float *>(
        lola_device_at(g.scores, unit.span.batch, lola_device_first(unit.span) + code - g.R, unit.set * g.rs + h));
  return sum;
}

/* Scores that need no state; every block computes all of them. */
__device__ void score_plain(const lola_device_segment &g, const scan_block &block, const scan_unit &unit, int count,
                            int all) {
  const pair_lists &lists = block.lists;
  if (g.score == LOLA_SCORE_VALUE_NORM || g.score == LOLA_SCORE_KEY_NORM) {
    const bool by_value = g.score == LOLA_SCORE_VALUE_NORM;
    const int n = by_value ? g.Dv : g.D, lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < all; i += WARPS) {
      const int at = list_at(g, count, i);
      const char *x = by_value ? lists.value[at] : lola_device_key(g, unit.span, unit.row, unit.set, lists.code[at]);
      float sum = 0;
      for (int d = lane; d < n; d += 32) {
        const float e = lola_device_load(x, d, g.dtype);
        sum = fmaf(e, e, sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) lists.score[i] = sum * (by_value ? static_cast<float>(g.rs) : -static_cast<float>(g.rs));
    }
    return;
  }
  for (int i = threadIdx.x; i < all; i += THREADS) {
    const int at = list_at(g, count, i);
    const int64_t position = lists.position[at];
    float score = 0;
    if (g.score == LOLA_SCORE_RECENCY) {
      score = static_cast<float>(position) * static_cast<float>(g.rs);
    } else if (g.score == LOLA_SCORE_RANDOM) {
      for (int h = 0; h < g.rs; h++) {
        /* lola_random_score of core/schedule.h */
        uint64_t x = g.seed;
        const uint64_t words[4] = {0, static_cast<uint64_t>(g.row_ids[unit.row]),
                                   static_cast<uint64_t>(unit.set) * g.rs + h, static_cast<uint64_t>(position)};
#pragma unroll
        for (int e = 0; e < 4; e++) {
          x = (x ^ words[e]) + 0x9E3779B97F4A7C15ull;
          x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
          x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
          x ^= x >> 31;
        }
        score += static_cast<float>(x >> 40) * 0x1p-24f;
      }
    } else if (lists.given) {
      score = lists.given[at];
    }
    lists.score[i] = score;
  }
}

/* --- select ----------------------------------------------------------------------------------------------------- */

/* Orders as the score does: -0 equals +0, NaN is highest. As lola_score_key of csrc/cpu/select.c. */
__device__ unsigned score_key(float score) {
  if (score != score) return UINT_MAX;
  const unsigned bits = score == 0 ? 0 : __float_as_uint(score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* In static shared memory. */
struct alignas(16) select_shared {
  unsigned histogram[3][BINS];
  uint64_t low[WARPS], high[WARPS];
};

/* Keys up to `last` are dropped, and of those equal to `tied` so many: ties > 0 and then last < tied (`none`: no key is
 * below it). */
template <typename Key> struct cut {
  Key last, tied;
  int ties;
  bool none;
};

/* Where the `drops` lowest keys end. read(i, &key) says whether i takes part and what its key is. Counts keys in 256
 * equal parts of their range, then of the part where the cut falls, until it falls between parts or within equal keys.
 * Every thread calls it and gets the answer. */
template <typename Key, typename Read>
__device__ cut<Key> find_cut(select_shared *shared, int n, int drops, Read read) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Key low = ~static_cast<Key>(0), high = 0;
  for (int i = threadIdx.x; i < n; i += THREADS) {
    Key key;
    if (!read(i, &key)) continue;
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  if constexpr (sizeof(Key) == 4) {
    low = __reduce_min_sync(ALL, low);
    high = __reduce_max_sync(ALL, high);
  } else {
#pragma unroll
    for (int i = 16; i; i /= 2) {
      const Key other_low = __shfl_xor_sync(ALL, low, i), other_high = __shfl_xor_sync(ALL, high, i);
      low = other_low < low ? other_low : low;
      high = other_high > high ? other_high : high;
    }
  }
  if (lane == 0) {
    shared->low[warp] = low;
    shared->high[warp] = high;
  }
  for (int i = threadIdx.x; i < 3 * BINS; i += THREADS) shared->histogram[i / BINS][i % BINS] = 0;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const Key other_low = static_cast<Key>(shared->low[w]), other_high = static_cast<Key>(shared->high[w]);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  const Key lowest = low;
  const uint64_t range = static_cast<uint64_t>(high) - low;
  int shift = range >> 8 ? 56 - __clzll(static_cast<long long>(range)) : 0;
  for (int pass = 0;; pass++) {
    unsigned *histogram = shared->histogram[pass % 3];
    for (int i = threadIdx.x; i < n; i += THREADS) {
      Key key;
      if (read(i, &key) && key >= low && static_cast<uint64_t>(key - low) >> shift < BINS)
        atomicAdd(&histogram[static_cast<unsigned>(static_cast<uint64_t>(key - low) >> shift)], 1u);
    }
    __syncthreads();
    /* Every warp finds the part in which the cut falls: 8 parts to a lane. */
    const uint4 a = reinterpret_cast<const uint4 *>(histogram)[2 * lane];
    const uint4 b = reinterpret_cast<const uint4 *>(histogram)[2 * lane + 1];
    const int counts[8] = {static_cast<int>(a.x), static_cast<int>(a.y), static_cast<int>(a.z), static_cast<int>(a.w),
                           static_cast<int>(b.x), static_cast<int>(b.y), static_cast<int>(b.z), static_cast<int>(b.w)};
    int mine = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) mine += counts[i];
    int until = mine;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int before = __shfl_up_sync(ALL, until, i);
      if (lane >= i) until += before;
    }
    int below = until - mine, bin = 8 * lane, inside = 0;
    const int owner = __ffs(static_cast<int>(__ballot_sync(ALL, below < drops && drops <= until))) - 1;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (inside) continue;
      if (drops <= below + counts[i])
        inside = counts[i];
      else {
        below += counts[i];
        bin++;
      }
    }
    below = __shfl_sync(ALL, below, owner);
    bin = __shfl_sync(ALL, bin, owner);
    inside = __shfl_sync(ALL, inside, owner);
    if (drops == below + inside) {
      const uint64_t offset = (static_cast<uint64_t>(bin + 1) << shift) - 1, most = static_cast<uint64_t>(high) - low;
      return {static_cast<Key>(offset < most ? low + static_cast<Key>(offset) : high), 0, 0, false};
    }
    drops -= below;
    low += static_cast<Key>(static_cast<uint64_t>(bin) << shift);
    if (shift == 0) return {static_cast<Key>(low - 1), low, drops, low == lowest};
    /* The buffer of the pass before this one: read by all, and not needed until the pass after the next. */
    for (int i = threadIdx.x; i < BINS; i += THREADS) shared->histogram[(pass + 2) % 3][i] = 0;
    shift = shift > 8 ? shift - 8 : 0;
  }
}

/* The `drops` lowest of E, ties to the later position: bits in lists.dropped, their places in lists.drop. */
__device__ void select_pairs(const lola_device_segment &g, const pair_lists &lists, select_shared *shared, int count,
                             int all, int drops) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, words = (all + 31) / 32;
  const auto position = [&](int i) { return static_cast<uint64_t>(lists.position[list_at(g, count, i)]); };
  cut<unsigned> by_score = {UINT_MAX, 0, 0, false};
  cut<uint64_t> by_position = {0, 0, 0, true};
  const bool recency = g.score == LOLA_SCORE_RECENCY;
  if (!g.L) {
    /* nothing is kept */
  } else if (recency) { /* a position can exceed what a float tells apart */
    by_position = find_cut<uint64_t>(shared, all, drops, [&](int i, uint64_t *key) {
      *key = position(i);
      return true;
    });
  } else {
    by_score = find_cut<unsigned>(shared, all, drops, [&](int i, unsigned *key) {
      *key = score_key(lists.score[i]);
      return true;
    });
    if (by_score.ties) {
      __syncthreads(); /* histograms are read to the end */
      by_position = find_cut<uint64_t>(shared, all, by_score.ties, [&](int i, uint64_t *key) {
        *key = ~position(i);
        return score_key(lists.score[i]) == by_score.tied;
      });
    }
  }
  for (int w = warp; w < words; w += WARPS) {
    const int i = 32 * w + lane;
    bool dropped = i < all;
    if (dropped && g.L) {
      if (recency) {
        dropped = position(i) <= by_position.last;
      } else {
        const unsigned key = score_key(lists.score[i]);
        if (!by_score.ties)
          dropped = key <= by_score.last;
        else
          dropped =
              (!by_score.none && key <= by_score.last) || (key == by_score.tied && ~position(i) <= by_position.last);
      }
    }
    const unsigned bits = __ballot_sync(ALL, dropped);
    if (lane == 0) lists.dropped[w] = bits;
  }
  __syncthreads();
  /* Every warp counts through all words and writes the places of its own. */
  for (int first = 0, before = 0; first < words; first += 32) {
    const unsigned bits = first + lane < words ? lists.dropped[first + lane] : 0;
    int until = __popc(bits);
    const int own = until;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int below = __shfl_up_sync(ALL, until, i);
      if (lane >= i) until += below;
    }
    const int start = before + until - own;
    before += __shfl_sync(ALL, until, 31);
    for (int w = first + (warp + WARPS - first % WARPS) % WARPS; w < first + 32 && w < words; w += WARPS) {
      const int at = __shfl_sync(ALL, start, w - first);
      const unsigned word = __shfl_sync(ALL, bits, w - first);
      if (word >> lane & 1) lists.drop[at + __popc(word & ((1u << lane) - 1))] = 32 * w + lane;
      if (lane == 0) lists.dropped_before[w] = at;
    }
  }
  __syncthreads();
}

/* --- fold ------------------------------------------------------------------------------------------------------- */

/* Copies dropped pairs first .. first+n-1 of lists.drop into the stage; rows up to a multiple of 16 are zero. */
template <typename T>
__device__ void stage_pairs(const lola_device_segment &g, const scan_plan &plan, const scan_block &block, int count,
                            int first, int n) {
  const pair_lists &lists = block.lists;
  const int column = block.column_block * COLUMNS;
  if constexpr (T::tensor) {
    const int pitch = lola_padded(g.F, 64), chunks = lola_padded(g.F, 16) / 8, rows = lola_padded(n, 16);
    __nv_bfloat16 *features = staged_features<__nv_bfloat16>(plan), *values = staged_values<__nv_bfloat16>(plan);
    for (int i = threadIdx.x; i < rows * chunks; i += THREADS) {
      const int row = i / chunks, f = i % chunks * 8;
      uint4 chunk = make_uint4(0, 0, 0, 0);
      if (row < n) chunk = load_chunk<T::vector>(lists.phi[list_at(g, count, lists.drop[first + row])], f, g.F);
      *reinterpret_cast<uint4 *>(features + lola_swizzled(row, f, pitch)) = chunk;
    }
    for (int i = threadIdx.x; i < rows * (COLUMNS / 8); i += THREADS) {
      const int row = i / (COLUMNS / 8), at = i % (COLUMNS / 8) * 8;
      uint4 chunk = make_uint4(0, 0, 0, 0);
      if (row < n)
        chunk = load_chunk<T::vector>(lists.value[list_at(g, count, lists.drop[first + row])], column + at, g.Dv);
      __nv_bfloat16 *to = values + row * VALUE_PITCH + at;
      if constexpr (is_half<T>) {
        const unsigned in[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
        unsigned hi[4], lo[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 pair = lola_widen<__half>(in[e]);
          lola_split_pair(pair.x, pair.y, &hi[e], &lo[e]);
        }
        *reinterpret_cast<uint4 *>(to) = make_uint4(hi[0], hi[1], hi[2], hi[3]);
        *reinterpret_cast<uint4 *>(to + plan.stage * VALUE_PITCH) = make_uint4(lo[0], lo[1], lo[2], lo[3]);
      } else {
        *reinterpret_cast<uint4 *>(to) = chunk;
      }
    }
  } else {
    float *features = staged_features<float>(plan), *values = staged_values<float>(plan);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = warp; row < n; row += WARPS) {
      const int at = list_at(g, count, lists.drop[first + row]);
      const float *phi = reinterpret_cast<const float *>(lists.phi[at]);
      const float *value = reinterpret_cast<const float *>(lists.value[at]);
      for (int f = lane; f < g.F; f += 32) features[row * g.F + f] = phi[f];
      values[row * COLUMNS + lane] = column + lane < g.Dv ? value[column + lane] : 0;
    }
  }
}

/* H += Phi^T V, s += Phi^T 1 of the staged pairs; with `last` also the halves. A warp takes 16 rows of H. */
template <typename T>
__device__ void fold_staged(const lola_device_segment &g, const scan_plan &plan, int n, bool last) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if constexpr (T::tensor) {
    const int group = lane / 4, c = lane % 4, pitch = lola_padded(g.F, 64);
    const __nv_bfloat16 *features = staged_features<__nv_bfloat16>(plan);
    const __nv_bfloat16 *values = staged_values<__nv_bfloat16>(plan);
    const unsigned one = group == 0 ? 0x3f803f80u : 0; /* column 0 of ones: the sum of phi */
    for (int f = warp * 16; f < g.F; f += WARPS * 16) {
      float acc[5][4] = {};
      for (int k = 0; k < n; k += 16) {
        unsigned a[4];
        ldmatrix_transposed(
            a, shared_address(features + lola_swizzled(k + lane % 8 + lane / 16 * 8, f + (lane / 8 & 1) * 8, pitch)));
#pragma unroll
        for (int part = 0; part < (is_half<T> ? 2 : 1); part++)
#pragma unroll
          for (int two = 0; two < 2; two++) {
            unsigned b[4];
            ldmatrix_transposed(b, shared_address(values + (part * plan.stage + k + lane % 16) * VALUE_PITCH +
                                                  two * 16 + lane / 16 * 8));
            lola_mma(acc[2 * two], a[0], a[1], a[2], a[3], b[0], b[1]);
            lola_mma(acc[2 * two + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
          }
        lola_mma(acc[4], a[0], a[1], a[2], a[3], one, one);
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = f + 8 * half + group;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float2 *at = reinterpret_cast<float2 *>(hidden_of(plan) + row * COLUMNS + 8 * i + 2 * c);
          float2 h = *at;
          h.x += acc[i][2 * half];
          h.y += acc[i][2 * half + 1];
          *at = h;
          /* Halves are stored two rows at a time: even rows of H take column 2 c, odd ones column 2 c + 1. */
          const bool odd = group & 1;
          const float other = __shfl_xor_sync(ALL, odd ? h.x : h.y, 4);
          if (last) store_halves(plan, pitch, row & ~1, 8 * i + 2 * c + odd, odd ? other : h.x, odd ? h.y : other);
        }
        if (c == 0) {
          const float s = normalizer_of(plan)[row] + acc[4][2 * half];
          normalizer_of(plan)[row] = s;
          if (last) store_normalizer_halves(plan, pitch, row, s);
        }
      }
    }
  } else {
    const float *features = staged_features<float>(plan), *values = staged_values<float>(plan);
    constexpr int ROWS = 4;
    for (int f = warp * ROWS; f < g.F; f += WARPS * ROWS) {
      float h[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; i++) h[i] = hidden_of(plan)[min(f + i, g.F - 1) * COLUMNS + lane];
      for (int p = 0; p < n; p++) {
        const float v = values[p * COLUMNS + lane];
#pragma unroll
        for (int i = 0; i < ROWS; i++) h[i] = fmaf(features[p * g.F + min(f + i, g.F - 1)], v, h[i]);
      }
#pragma unroll
      for (int i = 0; i < ROWS; i++)
        if (f + i < g.F) hidden_of(plan)[(f + i) * COLUMNS + lane] = h[i];
    }
    for (int f = threadIdx.x; f < g.F; f += THREADS) {
      float s = normalizer_of(plan)[f];
      for (int p = 0; p < n; p++) s += features[p * g.F + f];
      normalizer_of(plan)[f] = s;
    }
  }
}

/* --- the sparse cache ------------------------------------------------------------------------------------------- */

/* Entry L + j of the lists: the j-th pair that leaves when `chunk` begins. */
__device__ void write_leaving(const lola_device_segment &g, const scan_block &block, const scan_unit &unit,
                              int64_t chunk, int j) {
  const pair_lists &lists = block.lists;
  const int64_t position = lola_device_leaving_first(g, chunk) + j;
  const int code = static_cast<int>(position - unit.base), at = g.L + j;
  lists.position[at] = position;
  lists.code[at] = code;
  lists.phi[at] = lola_device_phi(g, unit.span, unit.row, unit.head, code);
  lists.value[at] = lola_device_value(g, unit.span, unit.row, unit.set, code);
  if (lists.given) lists.given[at] = given_score(g, unit, code);
}

/* The pairs that stay in the sparse cache take a slot each: a dropped pair's in ascending order, then empty ones. Then
 * the next chunk's leaving pairs take their place in the lists. `all` > L: after a selection. */
__device__ void place_pairs(const lola_device_segment &g, const scan_block &block, const scan_unit &unit, int count,
                            int all, int64_t chunk, bool more) {
  const pair_lists &lists = block.lists;
  const bool selected = all > g.L;
  const int freed = selected ? dropped_before(lists, count) : 0;
  for (int j = THREADS - 1 - threadIdx.x; j < g.C; j += THREADS) { /* the last warps: the first are folding */
    int slot = count + j;
    float score = NAN;
    bool enters = true;
    if (selected) {
      enters = !was_dropped(lists, count + j);
      if (enters) {
        const int rank = j - (dropped_before(lists, count + j) - freed);
        slot = rank < freed ? lists.drop[rank] : count + rank - freed;
        score = lists.score[count + j];
      }
    }
    if (enters) {
      const int at = g.L + j;
      lists.position[slot] = lists.position[at];
      lists.code[slot] = lists.code[at];
      lists.phi[slot] = lists.phi[at];
      lists.value[slot] = lists.value[at];
      if (lists.given) lists.given[slot] = lists.given[at];
      lists.slot_score[slot] = score;
    }
    if (more) write_leaving(g, block, unit, chunk + 1, j);
  }
  for (int i = threadIdx.x; selected && i < count; i += THREADS)
    if (!was_dropped(lists, i)) lists.slot_score[i] = lists.score[i];
}

/* --- phi(q)^T H ------------------------------------------------------------------------------------------------- */

/* Of the pending tokens. */
template <typename T>
__device__ void recall_tokens(const lola_device_segment &g, const scan_plan &plan, const scan_block &block,
                              const scan_unit &unit, const scan_progress &progress) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = block.column_block * COLUMNS;
  const int first = progress.recall_first, end = progress.recall_end;
  const int64_t item = T::tensor ? 2 : 4;
  const auto index = [&](int t) { return (static_cast<int64_t>(unit.span.token) + t) * g.Hq + unit.head; };
  if (!progress.folded || g.mixing == LOLA_MIXING_CACHE_ONLY) {
    for (int t = first + threadIdx.x; !block.column_block && t < end; t += THREADS) g.z[index(t)] = 0;
    return;
  }
  const char *phi = static_cast<const char *>(g.query_phi);
  if constexpr (T::tensor) {
    const int group = lane / 4, c = lane % 4;
    for (int from = first + warp * 16; from < end; from += WARPS * 16) {
      const char *rows[1][2];
      float acc[1][5][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int t = from + 8 * half + group;
        rows[0][half] = phi + index(t < end ? t : end - 1) * g.F * item;
      }
      multiply<T::vector>(g, plan, rows, acc);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int t = from + 8 * half + group;
        const float z = quad_normalizer(acc[0][4], half);
        if (t >= end) continue;
        float *to = g.recalled + index(t) * g.Dv + column + 8 * c;
        if (plan.vector_recalled) {
#pragma unroll
          for (int n = 0; n < 4; n += 2)
            if (column + 8 * c + 2 * n < g.Dv)
              *reinterpret_cast<float4 *>(to + 2 * n) = make_float4(
                  acc[0][n][2 * half], acc[0][n][2 * half + 1], acc[0][n + 1][2 * half], acc[0][n + 1][2 * half + 1]);
        } else {
#pragma unroll
          for (int n = 0; n < 4; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (column + 8 * c + 2 * n + e < g.Dv) to[2 * n + e] = acc[0][n][2 * half + e];
        }
        if (!block.column_block && c == 0) g.z[index(t)] = z;
      }
    }
  } else {
    for (int from = first + warp * PLAIN_PAIRS; from < end; from += WARPS * PLAIN_PAIRS) {
      const float *rows[PLAIN_PAIRS];
      float n[PLAIN_PAIRS], z[PLAIN_PAIRS];
#pragma unroll
      for (int i = 0; i < PLAIN_PAIRS; i++)
        rows[i] = reinterpret_cast<const float *>(phi) + index(from + i < end ? from + i : end - 1) * g.F;
      multiply_plain<T::vector>(g, plan, rows, n, z);
#pragma unroll
      for (int i = 0; i < PLAIN_PAIRS; i++) {
        if (from + i >= end) continue;
        if (column + lane < g.Dv) g.recalled[index(from + i) * g.Dv + column + lane] = n[i];
        if (!block.column_block && lane == 0) g.z[index(from + i)] = z[i];
      }
    }
  }
}

/* --- a unit ----------------------------------------------------------------------------------------------------- */

/* Scores E for the update at the start of `chunk`; with self_recall the group's other parts are still to come. */
template <typename T>
__device__ void begin_selection(const lola_device_segment &g, const scan_plan &plan, block_shared *shared,
                                scan_progress *progress) {
  const scan_block &block = shared->block;
  const int count = progress->count, all = count + static_cast<int>(g.C);
  if (g.score != LOLA_SCORE_SELF_RECALL) {
    score_plain(g, block, shared->unit, count, all);
    return;
  }
  score_recall<T>(g, plan, block, count, all,
                  parts_of(plan, block, progress->rounds) + static_cast<int64_t>(block.rank) * plan.pairs);
  arrive(block, progress);
}

/* Then selects and folds. */
template <typename T>
__device__ void end_selection(const lola_device_segment &g, const scan_plan &plan, block_shared *shared,
                              select_shared *select, scan_progress *progress, int64_t chunk, bool more) {
  const scan_block &block = shared->block;
  const int count = progress->count, all = count + static_cast<int>(g.C), drops = all - g.L;
  if (g.L && g.score == LOLA_SCORE_SELF_RECALL) {
    await(plan, block, *progress);
    sum_parts(plan, block.lists, parts_of(plan, block, progress->rounds - 1), all);
  }
  __syncthreads();
  select_pairs(g, block.lists, select, count, all, drops);
  for (int first = 0; first < drops; first += plan.stage) {
    const int n = min(plan.stage, drops - first);
    const bool last = first + n == drops;
    stage_pairs<T>(g, plan, block, count, first, n);
    __syncthreads();
    fold_staged<T>(g, plan, n, last);
    if (last) place_pairs(g, block, shared->unit, count, all, chunk, more);
    __syncthreads();
  }
  progress->count = g.L;
  progress->folded += drops;
}

/* The pairs that queries of the span's i-th chunk see. */
__device__ void record_sources(const lola_device_segment &g, const scan_block &block, const scan_unit &unit, int count,
                               int64_t i) {
  if (block.rank) return;
  const int64_t at = (unit.span.chunk + i) * g.S + unit.set;
  for (int slot = threadIdx.x; slot < count; slot += THREADS) g.sources[at * g.L + slot] = block.lists.code[slot];
  if (threadIdx.x == 0) g.source_count[at] = count;
}

template <typename T>
__device__ void begin_unit(const lola_device_segment &g, const scan_plan &plan, block_shared *shared,
                           scan_progress *progress, int row, int set, int record) {
  const scan_block &block = shared->block;
  const scan_unit &unit = shared->unit;
  const pair_lists &lists = block.lists;
  const int64_t group = static_cast<int64_t>(row) * g.S + set;
  const int count = static_cast<int>(g.sparse_count[group]);
  if (threadIdx.x == 0) shared->unit = scan_unit_of(g, g.spans[row], row, set, block.head);
  __syncthreads();
  progress->count = count;
  progress->folded = g.folded[static_cast<int64_t>(row) * g.Hq + unit.head];
  progress->leaving = false;
  progress->recall_first = progress->recall_end = 0;
  for (int slot = threadIdx.x; slot < count; slot += THREADS) {
    const int code = unit.resumes ? g.slot_source[group * g.L + slot] : -slot - 1;
    lists.code[slot] = code;
    lists.position[slot] = g.sparse_positions[group * g.L + slot];
    lists.slot_score[slot] = g.sparse_scores[group * g.L + slot];
    lists.phi[slot] = lola_device_phi(g, unit.span, row, unit.head, -slot - 1);
    lists.value[slot] = lola_device_value(g, unit.span, row, set, code);
    if (lists.given) lists.given[slot] = g.sparse_given[group * g.L + slot];
  }
  /* Where nothing is folded, now or before, the state is not needed. */
  if (unit.folds || (record && progress->folded && g.mixing != LOLA_MIXING_CACHE_ONLY))
    load_state<T>(g, plan, block, unit);
  __syncthreads();
}

/* The head's phi of pairs that entered slots, for the next segment's scan. */
__device__ void keep_phi(const lola_device_segment &g, const pair_lists &lists, const scan_unit &unit, int count) {
  const int64_t bytes = g.F * lola_device_item(g.dtype);
  char *kept = const_cast<char *>(unit.sources[0][0].data);
  for (int slot = threadIdx.x / 32; slot < count; slot += WARPS) {
    char *to = kept + slot * bytes;
    const char *from = lists.phi[slot];
    for (int64_t i = threadIdx.x % 32 * 2; from != to && i < bytes; i += 64)
      *reinterpret_cast<uint16_t *>(to + i) = *reinterpret_cast<const uint16_t *>(from + i);
  }
}

/* Writes the unit back. Other blocks of the group read what block 0 writes here when they begin the unit, and phi of
 * slots to its end, so that all must have met in between (`met`: since it began). */
__device__ void end_unit(const lola_device_segment &g, const scan_plan &plan, const block_shared &shared,
                         scan_progress *progress, bool met, bool folded) {
  const scan_block &block = shared.block;
  const scan_unit &unit = shared.unit;
  const pair_lists &lists = block.lists;
  const int64_t group = static_cast<int64_t>(unit.row) * g.S + unit.set;
  const int count = progress->count;
  const auto keep_sources = [&] {
    for (int slot = threadIdx.x; block.rank == 0 && slot < count; slot += THREADS)
      g.slot_source[group * g.L + slot] = lists.code[slot];
  };
  const lola_device_leaving leaving = lola_device_segment_leaving(g, unit.span);
  if (leaving.end <= leaving.first) {
    if (!unit.resumes) keep_sources();
    return;
  }
  const int64_t folds = count - g.sparse_count[group]; /* pairs that entered; the rest of those that left were folded */
  if ((!met || unit.continues) && plan.group_blocks > 1) {
    arrive(block, progress);
    await(plan, block, *progress);
  } else {
    __syncthreads();
  }
  if (folded) store_state(g, plan, block, unit);
  if (unit.continues && unit.folds && !block.column_block) keep_phi(g, lists, unit, count);
  keep_sources();
  if (block.rank) return;
  for (int slot = threadIdx.x; slot < count; slot += THREADS) {
    g.sparse_positions[group * g.L + slot] = lists.position[slot];
    g.sparse_scores[group * g.L + slot] = lists.slot_score[slot];
    if (lists.given) g.sparse_given[group * g.L + slot] = lists.given[slot];
  }
  if (threadIdx.x == 0) g.sparse_count[group] = count;
  for (int h = threadIdx.x; h < g.rs; h += THREADS)
    g.folded[static_cast<int64_t>(unit.row) * g.Hq + unit.set * g.rs + h] += leaving.end - leaving.first - folds;
}

template <typename T>
__device__ void walk_unit(const lola_device_segment &g, const scan_plan &plan, block_shared *shared,
                          select_shared *select, scan_progress *progress, int row, int set, int record) {
  const unsigned rounds_before = progress->rounds;
  begin_unit<T>(g, plan, shared, progress, row, set, record);
  const scan_unit &unit = shared->unit;
  const int64_t folded_before = progress->folded, first = unit.span.position / g.C;
  const int C = static_cast<int>(g.C);
  for (int64_t chunk = first;; chunk++) {
    const bool updates = chunk <= unit.last && chunk > unit.span.updated && lola_device_leaving_first(g, chunk) >= 0;
    const bool selects = updates && progress->count + C > g.L, more = chunk < unit.last;
    if (updates && !progress->leaving) {
      for (int j = threadIdx.x; j < C; j += THREADS) write_leaving(g, shared->block, unit, chunk, j);
      __syncthreads();
    }
    if (selects && g.L) begin_selection<T>(g, plan, shared, progress);
    /* The chunk before still sees this state, and the group takes a while to meet. */
    if (progress->recall_first < progress->recall_end) recall_tokens<T>(g, plan, shared->block, unit, *progress);
    progress->recall_first = progress->recall_end;
    if (chunk > unit.last) break;
    if (selects) {
      end_selection<T>(g, plan, shared, select, progress, chunk, more);
    } else if (updates) {
      place_pairs(g, shared->block, unit, progress->count, progress->count + C, chunk, more);
      progress->count += C;
      __syncthreads();
    }
    progress->leaving = updates && more;
    if (!record) continue;
    record_sources(g, shared->block, unit, progress->count, chunk - first);
    const int64_t end = (chunk + 1) * g.C - unit.span.position;
    progress->recall_end = end < unit.span.tokens ? static_cast<int>(end) : unit.span.tokens;
  }
  end_unit(g, plan, *shared, progress, progress->rounds != rounds_before, progress->folded != folded_before);
  __syncthreads(); /* the lists are read to the end */
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    scan_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ scan_plan plan, int record) {
  __shared__ block_shared shared;
  __shared__ select_shared select;
  if (!record) lola_device_start_next();
  lola_device_await_previous();
  if (record) lola_device_start_next();
  const int group = blockIdx.x / plan.group_blocks;
  if (threadIdx.x == 0) {
    scan_block block;
    block.rank = blockIdx.x % plan.group_blocks;
    block.head = block.rank / plan.column_blocks;
    block.column_block = block.rank % plan.column_blocks;
    const int64_t exchange = 2LL * plan.group_blocks * plan.pairs;
    block.exchange = static_cast<float *>(g.exchange) + group * exchange;
    char *lists = plan.lists_shared ? scan_memory + plan.lists
                                    : static_cast<char *>(g.exchange) + (plan.groups * exchange * 4 + 15) / 16 * 16 +
                                          blockIdx.x * plan.list_bytes;
    block.lists = lay_out_lists(lists, g.L, g.C);
    if (!g.sparse_given) block.lists.given = nullptr;
    block.barrier = g.barriers + LOLA_SCAN_BARRIERS / plan.groups * group;
    shared.block = block;
  }
  scan_progress progress = {};
  const auto sync = [] { __syncthreads(); };
  for_each_unit<THREADS>(g, plan.groups, group, record, shared.rows, shared.row_count, sync, [&](int row, int set) {
    walk_unit<T>(g, plan, &shared, &select, &progress, row, set, record);
  });
  leave_barrier(plan, shared.block, progress);
}

template <bool VECTOR> const void *kernel_of(lola_dtype dtype) {
  const auto address = [](auto kernel) { return reinterpret_cast<const void *>(kernel); };
  if (dtype == LOLA_FLOAT32) return address(scan_kernel<cache_kind<float, VECTOR>>);
  return dtype == LOLA_FLOAT16 ? address(scan_kernel<cache_kind<__half, VECTOR>>)
                               : address(scan_kernel<cache_kind<__nv_bfloat16, VECTOR>>);
}

/* The kernel that reads rows 16 bytes at a time, or not. */
inline const void *kernel_of(lola_dtype dtype, bool vector) {
  return vector ? kernel_of<true>(dtype) : kernel_of<false>(dtype);
}

} // namespace generic_scan
} // namespace

#endif
