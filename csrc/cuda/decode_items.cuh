/* Decoding by one item a block: a query head's state, or a tile of sparse or window pairs, for all sizes and types. The
 * block of a (row, KV head) that arrives last merges. */
#ifndef LOLA_CUDA_DECODE_ITEMS_CUH
#define LOLA_CUDA_DECODE_ITEMS_CUH

#include "decode_generic.cuh"
#include "decode_matrix.cuh"
#include "decode_merge.cuh"
#include "decode_state.cuh"

namespace {

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
    const row_window window = window_of(g, plan.row, span.position);
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
      from.slot = window.slot + before;
      if (from.slot >= g.R) from.slot -= g.R;
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
      const row_window ended = window_of(g, plan.row, kept.position);
#pragma unroll 1
      for (int s = threadIdx.x; g.scores.data && s < sets; s += THREADS)
        lola_device_keep_given(g, b.row, b.kv_head * sets + s, ended.ring_slot, kept.batch, kept.first);
      if (b.kv_head == 0 && threadIdx.x == 0) {
        g.tokens_seen[b.row] = kept.position + 1;
        if (ended.chunk > g.chunks[b.row]) g.chunks[b.row] = ended.chunk;
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
  merge(g, plan, kept.batch, kept.first, b.kv_head, window_of(g, plan.row, kept.position).pairs, count_of, partials);
}

} // namespace

#endif
