/* What scan.cu and scan_resident.cuh share: the layout of a block's shared memory, the barrier of a group of blocks, H
 * and s as two bfloat16 halves, and the error of one element. See scan.cu. */
#ifndef LOLA_CUDA_SCAN_BLOCK_CUH
#define LOLA_CUDA_SCAN_BLOCK_CUH

#include <limits.h>
#include <math.h>

#include "cuda/device.cuh"
#include "cuda/scan.cuh"

namespace {

constexpr int WARPS = 12, THREADS = WARPS * 32;
constexpr int COLUMNS = 32;     /* of H, to a block */
constexpr int TILES = 3;        /* of 16 pairs, to a warp: 576 pairs are one round */
constexpr int VALUE_PITCH = 40; /* of staged values: rows of 80 bytes meet no bank conflicts */
constexpr int PLAIN_PAIRS = 4;  /* pairs that a warp scores at a time in float32 */
constexpr int BINS = 256;
constexpr unsigned ALL = 0xffffffffu;

/* How a cache's scan is laid out: the same on every call for one device, so that the order of sums is too. */
struct scan_plan {
  int groups, group_blocks, column_blocks;
  int pairs;        /* L + C, padded to a multiple of 4 */
  int panels;       /* pairs are resident (scan_resident.cuh), phi in so many panels of 64; else 0 */
  int rows;         /* of the resident phi: L + C padded to 16 */
  int stage;        /* pairs that are folded at a time */
  int lists_shared; /* per-pair lists lie in shared memory, else in `exchange` */
  int64_t list_bytes, shared_bytes;
  int vector_recalled; /* 16-byte stores are possible */
  unsigned identity;   /* LOLA_IDENTITY */
  /* offsets into shared memory */
  int hidden, normalizer, halves, features, values, zeros, lists;
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

/* Rows one after the other, `stride` bytes apart. */
struct row_source {
  const char *data;
  int64_t stride;
};

/* What a block knows of its unit, the same for all threads until the next one. */
struct scan_unit {
  lola_device_span span;
  int64_t base;    /* position of code 0 */
  int64_t last;    /* chunk of the last token */
  int64_t leaving; /* the first position that leaves the window in this segment */
  int row, set, head;
  int ring;                 /* ring slot of code 0 */
  row_source sources[2][3]; /* phi and values: of sparse slots, of the ring, of tokens */
  bool folds;               /* pairs are folded in this segment, so that their phi are there */
};

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
  bool cleared;                 /* what is zero in a resident block's memory */
};

/* --- the group's barrier ---------------------------------------------------------------------------------------- */

/* Says that this block's writes are done. Every thread calls it; the release covers what the barrier of the block has
 * ordered before it. */
__device__ void arrive(const scan_block &block, scan_progress *progress) {
  progress->rounds++;
  __syncthreads();
  if (threadIdx.x == 0) lola_arrive(block.barrier);
}

/* Waits until every block of the group has arrived as often as this one. The last warp looks, the first may still be
 * at work. */
__device__ void await(const scan_plan &plan, const scan_block &block, const scan_progress &progress) {
  if (threadIdx.x == THREADS - 32) {
    const unsigned target = progress.rounds * static_cast<unsigned>(plan.group_blocks);
    while (static_cast<int>(lola_arrivals(block.barrier) - target) < 0) {
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

/* --- small things ----------------------------------------------------------------------------------------------- */

__device__ float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(ALL, x, i);
  return x;
}

/* 8 elements of 16 bits from element k of a row of n, zero past its end. */
template <bool VECTOR> __device__ uint4 load_chunk(const char *row, int k, int n) {
  uint4 chunk = make_uint4(0, 0, 0, 0);
  if (k >= n) return chunk;
  const uint16_t *x = reinterpret_cast<const uint16_t *>(row) + k;
  if constexpr (VECTOR) {
    chunk = __ldg(reinterpret_cast<const uint4 *>(x));
  } else {
    unsigned e[8];
#pragma unroll
    for (int i = 0; i < 8; i++) e[i] = k + i < n ? __ldg(x + i) : 0;
    chunk = make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16);
  }
  return chunk;
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
/* The same with all pairs in shared memory, phi in panels of 64 features. */
template <typename Element, int FEATURE_PANELS, bool VECTOR_ROWS> struct resident_kind {
  using element = Element;
  static constexpr int panels = FEATURE_PANELS;
  static constexpr bool vector = VECTOR_ROWS;
};
template <typename T> constexpr bool is_resident = false;
template <typename Element, int PANELS, bool VECTOR>
constexpr bool is_resident<resident_kind<Element, PANELS, VECTOR>> = true;
template <typename T> constexpr bool is_half = __is_same(typename T::element, __half);

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

/* phi^T s of the row whose products are in `acc`, in all lanes of its quad. */
__device__ float quad_normalizer(const float (&acc)[4], const int half) {
  const float z = acc[2 * half] + acc[2 * half + 1];
  return __shfl_sync(ALL, z, threadIdx.x % 32 & ~3);
}

/* n / z - v, or -v where z = 0; 1 / z overflows for a z near the smallest float, so both sides are lifted first. */
struct recall_scale {
  float up, inverse;
};

__device__ recall_scale recall_scale_of(float z) {
  recall_scale scale = {0, 0};
  if (z != 0) {
    scale.up = z < 1e-30f ? 0x1p64f : 1;
    scale.inverse = 1 / (z * scale.up);
  }
  return scale;
}

__device__ float recall_error(const recall_scale &scale, float n, float v, float sum) {
  const float d = fmaf(n * scale.up, scale.inverse, -v);
  return fmaf(d, d, sum);
}

/* Where the group's blocks exchange their parts in a round: two areas in turn, so that one barrier a round suffices. */
__device__ float *parts_of(const scan_plan &plan, const scan_block &block, unsigned round) {
  return block.exchange + static_cast<int64_t>(round & 1) * plan.group_blocks * plan.pairs;
}

/* One thread, before a barrier of the block. `count`: pairs in the set's sparse slots. */
__device__ void begin_scan_unit(const lola_device_segment &g, block_shared *shared, int row, int set, int count) {
  scan_unit unit;
  unit.span = g.spans[row];
  const lola_device_leaving leaving = lola_device_segment_leaving(g, unit.span);
  unit.base = unit.span.position - g.R;
  unit.last = (unit.span.position + unit.span.tokens - 1) / g.C;
  unit.leaving = leaving.first;
  unit.row = row;
  unit.set = set;
  unit.head = set * g.rs + shared->block.head;
  unit.ring = static_cast<int>(lola_device_ring_slot(unit.base, g.R));
  const int64_t item = lola_device_item(g.dtype), F = g.F * item, Dv = g.Dv * item;
  const int64_t state = static_cast<int64_t>(row) * g.Hq + unit.head, pairs = static_cast<int64_t>(row) * g.S + set;
  const int64_t kv_head = set / (g.S / g.Hkv), token = static_cast<int64_t>(unit.span.token) * g.Hq + unit.head;
  unit.sources[0][0] = {static_cast<const char *>(g.slot_phi) + state * g.L * F, F};
  unit.sources[0][1] = {static_cast<const char *>(g.ring_phi) + state * g.R * F, F};
  unit.sources[0][2] = {static_cast<const char *>(g.token_phi) + token * F, g.Hq * F};
  unit.sources[1][0] = {static_cast<const char *>(g.sparse_values) + pairs * g.L * Dv, Dv};
  unit.sources[1][1] = {
      static_cast<const char *>(g.window_values) + (static_cast<int64_t>(row) * g.Hkv + kv_head) * g.R * Dv, Dv};
  unit.sources[1][2] = {lola_device_at(g.v, unit.span.batch, unit.span.first, kv_head), g.v.stride_t * item};
  unit.folds = lola_device_folds(g, leaving, count);
  shared->unit = unit;
}

} // namespace
#endif
