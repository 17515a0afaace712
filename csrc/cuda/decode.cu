/* decode: one token for each row that is not idle, two launches, with the update of the cache between them: the rows'
 * spans and phi(q) (decode_queries.cuh), then everything else; they run beside one another as far as they can. A small
 * batch goes through one of its own (decode_small.cuh).
 *
 * The bytes of window, sparse cache and hidden state are the floor, so their reading is spread over many blocks: each
 * (row, KV head) has an item per part of a query head's state for phi(q)^T H (a float32 F x Dv state), one per tile of
 * sparse pairs and one per tile of window pairs. For 16-bit caches of the usual width a block takes one item after the
 * other (decode_pipeline.cuh); otherwise it takes one (decode_state.cuh, and decode_matrix.cuh for 16-bit caches, else
 * decode_generic.cuh) and asks for all that it reads before it waits for anything. An item leaves a
 * partial in scratch: float32 sums o (Dv,), maximum m in base 2 and sum l per query head, or N (Dv,) and z. The block
 * of a (row, KV head) that arrives last merges them in order of tile, mixes (Eq. 14) and writes the output, so the
 * result does not depend on which one it is. Items are fixed by the cache's sizes alone: the same row gives the same
 * bits in any batch. The block that holds the newest pair, or merges, writes that pair into the window ring and
 * advances the counters, which by then no other reads. */
#include "decode_generic.cuh"
#include "decode_matrix.cuh"
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

divisor divisor_of(int64_t d) { return divisor{d > 0 ? UINT64_MAX / static_cast<uint64_t>(d) + 1 : 0, d}; }

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
  p.pair_items = p.sparse_items + p.window_tiles;
  p.items = p.state_items + p.pair_items;
  p.slots = p.window_tiles + p.sparse_tiles + p.state_parts;
  return p;
}

int64_t scratch_floats(const decode_plan &plan, int64_t r) { return r * plan.slots * (plan.columns + INT64_C(4)); }

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

/* Scratch: signals; counters of arrivals per (row, KV head) and per row, zero between launches; rows; phi(q);
 * partials. */
int64_t counter_bytes(int64_t B, int64_t Hkv) { return divided_up(B * (Hkv + 1) * 4, 256) * 256; }
int64_t rows_bytes(int64_t B) { return divided_up(B * static_cast<int64_t>(sizeof(decode_row) + 4), 256) * 256; }
int64_t phi_bytes(int64_t heads, int64_t F) { return divided_up(heads * F * 4, 256) * 256; }

/* --- the merge ------------------------------------------------------------------------------------- */

/* Tiles that n pairs fill. */
__device__ __forceinline__ int tiles_of(const decode_plan &plan, int64_t n) {
  return static_cast<int>(divided(static_cast<unsigned>(n + plan.pairs - 1), plan.by_pairs));
}

/* Adds N tiles to a warp's sums `o` of four columns a lane, which have maximum `high` and sum `sum`: lane t has the
 * tile's own two, (-inf, 0) where there is none. */
template <int N>
__device__ __forceinline__ void add_tiles(float2 pair, const float4 (&x)[N], float *high, float *sum, float (&o)[4]) {
  const float higher = fmaxf(*high, warp_max(pair.x));
  const float before = weight_below(*high, higher), share = weight_below(pair.x, higher);
  *high = higher;
  *sum = fmaf(before, *sum, warp_sum(__fmul_rn(share, pair.y)));
#pragma unroll
  for (int e = 0; e < 4; e++) o[e] *= before;
#pragma unroll
  for (int t = 0; t < N; t++) {
    const float w = __shfl_sync(ALL, share, t);
    o[0] = fmaf(w, x[t].x, o[0]);
    o[1] = fmaf(w, x[t].y, o[1]);
    o[2] = fmaf(w, x[t].z, o[2]);
    o[3] = fmaf(w, x[t].w, o[3]);
  }
}

/* One warp a query head, four columns a lane; tiles in order, window first, then the state. Everything is asked for
 * before anything is used, up to MERGE tiles at a time. The output is that of token `first` of batch row `batch`;
 * `count_of` says how many sparse pairs a query head of the group sees. */
template <class Count>
__device__ __forceinline__ void merge(const lola_device_segment &g, const decode_plan &plan, int64_t batch,
                                      int64_t first, int kv_head, int64_t window_pairs, Count count_of,
                                      const float *partials) {
  constexpr int MERGE = 12, LANE_COLUMNS = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int stride = plan.columns + 4, slots = static_cast<int>(plan.slots),
            window_tiles = tiles_of(plan, window_pairs);
  const int gap = (static_cast<int>(plan.window_tiles) - window_tiles) * stride; /* to the first sparse tile */
#pragma unroll 1
  for (int j = warp; j < g.r; j += WARPS) {
    const int tiles = window_tiles + tiles_of(plan, count_of(j));
    const float *own = partials + static_cast<int64_t>(j) * slots * stride;
    const float *state = own + (slots - plan.state_parts) * stride;
    const int head = kv_head * g.r + j;
    const float gate = g.gate ? g.gate[head] : 0;
    float z = 0;
#pragma unroll 2
    for (int part = 0; part < plan.state_parts; part++) z += __ldcg(state + part * stride + plan.columns);
    char *out = lola_device_at(g.out, batch, first, head);
#pragma unroll 1
    for (int base = 0; base < plan.columns; base += 32 * LANE_COLUMNS) {
      const int column = base + lane * LANE_COLUMNS;
      const bool in = column < plan.columns;
      float n[4] = {0, 0, 0, 0}; /* of columns from Dv on, and where nothing is folded, whatever was there */
#pragma unroll 2
      for (int part = 0; part < plan.state_parts; part++) {
        if (!in) break;
        const float4 x = __ldcg(reinterpret_cast<const float4 *>(state + part * stride + column));
        n[0] += x.x;
        n[1] += x.y;
        n[2] += x.z;
        n[3] += x.w;
      }
      float high = -INFINITY, sum = 0, o[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int done = 0; done < tiles; done += MERGE) {
        const int left = min(tiles - done, MERGE);
        float4 x[MERGE];
#pragma unroll
        for (int t = 0; t < MERGE; t++) {
          const int at = (done + t) * stride + (done + t < window_tiles ? 0 : gap) + column;
          x[t] = make_float4(0, 0, 0, 0);
          if (t < left && in) x[t] = __ldcg(reinterpret_cast<const float4 *>(own + at));
        }
        const int at = (done + lane) * stride + (done + lane < window_tiles ? 0 : gap) + plan.columns;
        float2 pair = make_float2(-INFINITY, 0);
        if (lane < left) pair = __ldcg(reinterpret_cast<const float2 *>(own + at));
        add_tiles(pair, x, &high, &sum, o);
      }
      const lola_device_weights w = lola_device_mix(g.mixing, gate, high, sum, z);
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (column + e < g.Dv) {
          const float linear = w.linear != 0 ? w.linear * n[e] : 0; /* N is unwritten where nothing is folded */
          lola_device_store(out, column + e, g.out.dtype, fmaf(w.softmax, o[e], linear));
        }
      if (base == 0 && lane == 0 && g.share.data)
        *reinterpret_cast<float *>(lola_device_at(g.share, batch, first, head)) = w.share;
    }
  }
}

/* The same for the pipeline's partials: Dv = 128, and tiles in a row with a state's parts behind them. All that one
 * head needs is asked for before any of it is used, so that it takes as long as one load, not as many one after the
 * other. */
template <class Count>
__device__ __forceinline__ void merge_wide(const lola_device_segment &g, const decode_plan &plan, int64_t batch,
                                           int64_t first, int kv_head, int window_pairs, Count count_of,
                                           const float *partials) {
  constexpr int MERGE = 12, PARTS = 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = plan.columns + 4;
  const int slots = static_cast<int>(plan.slots), window_tiles = tiles_of(plan, window_pairs);
  const int gap = (static_cast<int>(plan.window_tiles) - window_tiles) * stride; /* to the first sparse tile */
#pragma unroll 1
  for (int j = warp; j < g.r; j += WARPS) {
    const int tiles = window_tiles + tiles_of(plan, count_of(j)), head = kv_head * g.r + j;
    const float *const own = partials + static_cast<int64_t>(j) * slots * stride;
    const float *const state = own + (slots - plan.state_parts) * stride;
    float high = -INFINITY, sum = 0, z = 0, o[4] = {0, 0, 0, 0}, n[4] = {0, 0, 0, 0};
    float gate = 0;
    if (g.gate) gate = g.gate[head];
    int done = 0;
    do {
      const int left = min(tiles - done, MERGE);
      float4 x[MERGE], y[PARTS];
      float part_z[PARTS];
      float2 pair = make_float2(-INFINITY, 0);
      if (lane < left)
        pair = __ldcg(reinterpret_cast<const float2 *>(own + (done + lane) * stride +
                                                       (done + lane < window_tiles ? 0 : gap) + plan.columns));
#pragma unroll
      for (int t = 0; t < MERGE; t++) {
        const int at = (done + t) * stride + (done + t < window_tiles ? 0 : gap) + lane * 4;
        x[t] = make_float4(0, 0, 0, 0);
        if (t < left) x[t] = __ldcg(reinterpret_cast<const float4 *>(own + at));
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const bool there = done == 0 && part < plan.state_parts;
        y[part] = make_float4(0, 0, 0, 0);
        part_z[part] = 0;
        if (!there) continue;
        y[part] = __ldcg(reinterpret_cast<const float4 *>(state + part * stride + lane * 4));
        part_z[part] = __ldcg(state + part * stride + plan.columns);
      }
      add_tiles(pair, x, &high, &sum, o);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        z += part_z[part];
        n[0] += y[part].x;
        n[1] += y[part].y;
        n[2] += y[part].z;
        n[3] += y[part].w;
      }
      done += MERGE;
    } while (done < tiles);
#pragma unroll 1
    for (int part = PARTS; part < plan.state_parts; part++) {
      const float4 y = __ldcg(reinterpret_cast<const float4 *>(state + part * stride + lane * 4));
      z += __ldcg(state + part * stride + plan.columns);
      n[0] += y.x;
      n[1] += y.y;
      n[2] += y.z;
      n[3] += y.w;
    }
    const lola_device_weights w = lola_device_mix(g.mixing, gate, high, sum, z);
    char *const out = lola_device_at(g.out, batch, first, head);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float linear = w.linear != 0 ? w.linear * n[e] : 0; /* N is unwritten where nothing is folded */
      lola_device_store(out, lane * 4 + e, g.out.dtype, fmaf(w.softmax, o[e], linear));
    }
    if (lane == 0 && g.share.data) *reinterpret_cast<float *>(lola_device_at(g.share, batch, first, head)) = w.share;
  }
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
                  unsigned *counters, const float *query_phi, float *scratch) {
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
  if (!last) return;
  const auto count_of = [&](int j) -> int64_t {
    if (j < WARPS || !g.L) return first_counts[threadIdx.x / 32];
    return g.sparse_count[first_set + divided(static_cast<unsigned>(j), plan.by_rs)];
  };
  merge(g, plan, kept.batch, kept.first, b.kv_head, window_of(g, plan, kept.position).pairs, count_of, partials);
}

/* --- one unit after the other --------------------------------------------------------------------------- */

/* This thread's element of the call's key and value. */
struct newest_elements {
  uint16_t key, value;
};

__device__ __forceinline__ newest_elements load_newest(const lola_device_segment &g, const group_facts &facts) {
  static_assert(THREADS == WIDE, "an element each");
  const char *const key = lola_device_at(g.k, facts.of.batch, facts.of.first, facts.kv_head);
  const char *const value = lola_device_at(g.v, facts.of.batch, facts.of.first, facts.kv_head);
  return newest_elements{reinterpret_cast<const uint16_t *>(key)[threadIdx.x],
                         reinterpret_cast<const uint16_t *>(value)[threadIdx.x]};
}

/* The newest pair into its ring slot, where until now a pair may have lain that enters the sparse cache, and its score.
 */
__device__ __forceinline__ void keep_newest(const lola_device_segment &g, const group_facts &facts,
                                            const newest_elements &newest) {
  const int64_t slot = static_cast<int64_t>(facts.group) * g.R + facts.of.ring_slot;
  static_cast<uint16_t *>(g.window_keys)[slot * WIDE + threadIdx.x] = newest.key;
  static_cast<uint16_t *>(g.window_values)[slot * WIDE + threadIdx.x] = newest.value;
  const int sets = g.S / g.Hkv;
#pragma unroll 1
  for (int s = threadIdx.x; g.scores.data && s < sets; s += THREADS) {
    const int first_head = (facts.kv_head * sets + s) * g.rs;
    float sum = 0;
#pragma unroll 1
    for (int h = first_head; h < first_head + g.rs; h++)
      sum += *reinterpret_cast<const float *>(lola_device_at(g.scores, facts.of.batch, facts.of.first, h));
    g.window_given[(static_cast<int64_t>(facts.group) * sets + s) * g.R + facts.of.ring_slot] = sum;
  }
}

/* The row's counters, by one thread. */
__device__ __forceinline__ void advance(const lola_device_segment &g, const decode_row &of) {
  g.tokens_seen[of.row] = of.position + 1;
  if (of.chunk > g.chunks[of.row]) g.chunks[of.row] = of.chunk;
}

/* A KV head whose units are all done, also by other blocks: its outputs, and what the step leaves behind. */
__device__ __forceinline__ void finish_group(const lola_device_segment &g, const decode_plan &plan,
                                             const group_facts &facts, const float *partials) {
  const auto count_of = [&](int j) -> int64_t { return facts.counts[divided(static_cast<unsigned>(j), plan.by_rs)]; };
  const newest_elements newest = load_newest(g, facts); /* on its way meanwhile */
  merge_wide(g, plan, facts.of.batch, facts.of.first, facts.kv_head, facts.of.window_pairs, count_of, partials);
  keep_newest(g, facts, newest);
  if (facts.kv_head == 0 && threadIdx.x == 0) advance(g, facts.of);
}

/* A barrier of the warps that work on units. */
__device__ __forceinline__ void workers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

/* A unit that is there, into its partials. */
template <typename T>
__device__ __forceinline__ void work_on_unit(const lola_device_segment &g, const decode_plan &plan,
                                             const group_facts &facts, const work_unit &u, char *stage, float *sums,
                                             float *partials) {
  const int warp = threadIdx.x / 32, stride = plan.columns + 4;
  const int64_t head_step = plan.slots * stride;
  if (u.kind == STATE_UNIT) {
    float *partial = partials + u.which * head_step + (plan.slots - plan.state_parts + u.tile) * stride;
    const bool folded = facts.folded >> u.which & 1;
    if (folded) recall_quarter(stage, reinterpret_cast<const float *>(stage + QUERIES_AT), sums);
    if (g.stores_features && u.tile == 0)
      keep_features(g, facts.of.batch, facts.of.first, facts.of.ring_slot,
                    static_cast<int64_t>(facts.group) * g.r + u.which, facts.kv_head * g.r + u.which);
    workers_sync();
    if (folded && warp == 0) {
      float n[4] = {0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float x[4];
        load_floats<4>(reinterpret_cast<const float *>(stage + w * QUARTER_BYTES) + threadIdx.x * 4, x);
#pragma unroll
        for (int e = 0; e < 4; e++) n[e] += x[e];
      }
      store_floats<4>(partial + threadIdx.x * 4, n);
    }
    if (threadIdx.x == 0) partial[plan.columns] = folded ? add_groups(sums, WARPS, 1) : 0;
    return;
  }
  const int count = pairs_of(facts, u);
  if (count <= 0) return;
  const bool sparse = u.kind == SPARSE_UNIT;
  const int heads = sparse ? g.rs : g.r, warps = (count + QUARTER - 1) / QUARTER;
  if (u.updated && plan.gathers && sparse) keep_entered(g, plan, facts, u, stage + warp * QUARTER_BYTES);
  if (warp < warps) weigh_quarter<T>(g, plan, heads, count, stage, sums);
  workers_sync();
  const tile_target to = {
      partials + (sparse ? u.which * g.rs * head_step + plan.window_tiles * stride : 0) + u.tile * stride, head_step};
  merge_warps(plan, reinterpret_cast<const float *>(stage), QUARTER_BYTES / 4, SUM_PITCH, sums, MATRIX_HEADS, warps, 0,
              heads, to);
}

constexpr int PIPELINE_THREADS = THREADS + 32;
constexpr int KNOWN_UNITS = 5; /* the last two, this one and the next two */

/* What the blocks of a step's main kernel share, beside its arguments. */
struct pipeline_scratch {
  decode_rows rows;
  unsigned *counters; /* units of each (row, KV head) that are done */
  const float *phi;
  float *partials;
};

/* Blocks may start before the step's other kernels have ended, see decode_rows.cuh. One warp more than work on units
 * looks ahead: it takes the next but one, looks up its (row, KV head), waits for what it needs, and finds out whether
 * the unit before was the last of its own; none of that holds up the others, nor do their copies hold up its fences. */
template <typename T>
__global__ void __launch_bounds__(PIPELINE_THREADS, 3)
    decode_pipeline_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ decode_plan plan,
                           const __grid_constant__ pipeline_scratch scratch) {
  extern __shared__ __align__(16) char shared[]; /* two stages */
  __shared__ known_unit known[KNOWN_UNITS];
  __shared__ __align__(16) float sums[WARPS * MATRIX_HEADS * 2];
  __shared__ int completes[2]; /* the unit before the last one was the last of its (row, KV head) */
  __shared__ struct {
    unsigned updated_rows, first; /* index of the first unit: if all rows are updated, nothing is to be done before */
    unsigned ticket;              /* of the unit after the next */
    bool queries_known;
  } looking; /* what the warp that looks ahead knows */
  const bool looks_ahead = threadIdx.x >= THREADS;
  const int lane = threadIdx.x % 32;
  lola_device_start_next();
  if (threadIdx.x == 0) {
    await_rows(scratch.rows);
    const unsigned updated_rows = static_cast<unsigned>(__ldcg(&scratch.rows.signals->updated_rows)), B = g.B;
    looking.updated_rows = updated_rows;
    looking.first = updated_rows == B ? B * g.Hkv * static_cast<unsigned>(plan.items) : 0;
    looking.queries_known = false;
    completes[0] = completes[1] = 0;
    known[3].unit.kind = known[4].unit.kind = NO_UNIT;
  }
  __syncthreads();
  const auto place_at = [&](unsigned ticket) { return unit_at(g, plan, looking.first + ticket, looking.updated_rows); };
  const auto take_ticket = [&] { return lane == 0 ? 2 * gridDim.x + atomicAdd(&scratch.rows.signals->ticket, 1) : 0; };
  const auto ask = [&](const known_unit &k, int stage) {
    if (k.is_work()) {
      /* The zero keeps ptxas from seeing that a warp shares the address: see tests/cuda/disassembly.py. */
      const unsigned zero = threadIdx.x & static_cast<unsigned>(plan.pipeline - 1);
      const unsigned stages = static_cast<unsigned>(__cvta_generic_to_shared(shared)) ^ zero;
      ask_unit<T>(g, plan, k.facts, k.unit, scratch.phi,
                  static_cast<char *>(__cvta_shared_to_generic(stages)) + stage * STAGE_BYTES);
    }
    copies_end_group();
  };
  const auto partials_of = [&](const group_facts &facts) {
    return scratch.partials + static_cast<int64_t>(facts.group) * g.r * plan.slots * (plan.columns + 4);
  };
  if (looks_ahead) {
    facts_ahead now, next;
    now.ask(g, plan, scratch.rows, place_at(blockIdx.x), &looking.queries_known);
    next.ask(g, plan, scratch.rows, place_at(blockIdx.x + gridDim.x), &looking.queries_known);
    const unsigned ticket = take_ticket();
    now.keep(&known[0]);
    next.keep(&known[1]);
    if (lane == 0) looking.ticket = ticket;
  }
  __syncthreads();
  if (!looks_ahead) ask(known[0], 0);
  int at = 0;   /* the unit's place among those known */
  int left = 2; /* turns without a unit, in which the last ones are completed */
#pragma unroll 1
  for (int turn = 0;; turn ^= 1) {
    const auto beside = [&](int ahead) -> known_unit & {
      const int place = at + ahead;
      return known[place >= KNOWN_UNITS ? place - KNOWN_UNITS : place];
    };
    copies_wait<0>();
    __syncthreads(); /* the unit is there, and the sums of the last one were read */
    const known_unit &now = known[at];
    if (now.unit.kind == NO_UNIT && left-- == 0) break;
    if (looks_ahead) {
      const known_unit &before = beside(KNOWN_UNITS - 1);
      facts_ahead ahead;
      unsigned ticket = looking.ticket;
      ahead.ask(g, plan, scratch.rows, place_at(ticket), &looking.queries_known);
      if (ahead.place.unit.kind != NO_UNIT) ticket = take_ticket();
      if (lane == 0) {
        bool last = false;
        if (before.is_work()) last = arrive(&scratch.counters[before.facts.group]) == plan.items - 1;
        if (last) scratch.counters[before.facts.group] = 0;
        completes[turn ^ 1] = last;
      }
      ahead.keep(&beside(2));
      if (lane == 0) looking.ticket = ticket;
    } else {
      ask(beside(1), turn ^ 1);
      if (completes[turn]) {
        const group_facts &facts = beside(KNOWN_UNITS - 2).facts;
        finish_group(g, plan, facts, partials_of(facts));
      }
      if (now.is_work())
        work_on_unit<T>(g, plan, now.facts, now.unit, shared + turn * STAGE_BYTES, sums, partials_of(now.facts));
    }
    if (++at == KNOWN_UNITS) at = 0;
  }
  lola_device_await_previous(); /* for who awaits this kernel */
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
  return launch<decode_kernel<T, LANES>>(a, device, THREADS, s.counters, s.phi, s.partials);
}

template <typename T> cudaError_t launch_items(const launch_arguments &a, int device) {
  if constexpr (sizeof(T) == 2) {
    const scratch_places &s = a.scratch;
    if (a.plan.pipeline)
      return launch<decode_pipeline_kernel<T>>(a, device, PIPELINE_THREADS,
                                               pipeline_scratch{s.rows, s.counters, s.phi, s.partials});
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
  plan->first_update = (g.W / g.C + 1) * g.C;
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
  const int64_t blocks = static_cast<int64_t>(limits.processors) * (fit < 1 ? 1 : fit > 3 ? 3 : fit);
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
  if (p.items > INT64_C(0x7fffffff) / groups || scratch_floats(p, 1) > INT64_C(0x7fffffff)) return too_many(g, message);
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
  p.by_pair_items = divisor_of(p.pair_items);
  p.by_state_items = divisor_of(p.state_items);
  p.by_kv_heads = divisor_of(g.Hkv);
  p.by_state_parts = divisor_of(p.state_parts);
  p.by_sparse_tiles = divisor_of(p.sparse_tiles);
  p.by_rs = divisor_of(g.rs);
  p.by_pairs = divisor_of(p.pairs);
  p.by_C = divisor_of(g.C);
  p.by_R = divisor_of(g.R);
  p.small_sizes = g.C < INT64_C(0x40000000) && g.W < INT64_C(0x40000000) && g.R < INT64_C(0x40000000);
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
  int64_t floats = scratch_floats(plan_of(sizes, false), sizes.r);
  if (fits_matrix(sizes)) {
    const int64_t others = scratch_floats(plan_of(sizes, true), sizes.r);
    if (others > floats) floats = others;
  }
  return static_cast<int64_t>(sizeof(decode_signals)) + counter_bytes(shape.batch, shape.kv_heads) +
         rows_bytes(shape.batch) + phi_bytes(shape.batch * shape.heads, shape.feature_dim) + groups * floats * 4;
}

namespace {

/* The first kernel's plan, but for its blocks. */
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

lola_status launch_queries(const lola_device_segment &g, const call_rows &rows, bool pipeline,
                           const scratch_places &places, const device_limits &limits, int device, cudaStream_t stream,
                           lola_message *message) {
  if (pipeline && has_wide_features(g) && g.mixing != LOLA_MIXING_CACHE_ONLY && lola_device_rows_are_aligned(g.q)) {
    const int blocks = static_cast<int>(divided_up(g.B, WIDE_ROWS));
    cudaError_t error = allow_shared<decode_wide_queries_kernel>(WIDE_BYTES, device);
    if (error == cudaSuccess)
      error = lola_cuda_launch_chained(decode_wide_queries_kernel, static_cast<unsigned>(1 + g.Hq * blocks),
                                       WIDE_THREADS, WIDE_BYTES, stream, g, rows, blocks, places.rows, places.phi);
    return launched(error, "decode_queries", message);
  }
  query_plan plan = plan_queries(g, 1);
  const bool many = static_cast<int64_t>(g.B) * g.Hq > 4 * static_cast<int64_t>(limits.processors) &&
                    MANY_ROWS * query_bytes(g, plan) <= 48 << 10;
  const int rows_of_block = many ? MANY_ROWS : 1;
  if (many) plan = plan_queries(g, MANY_ROWS);
  const int64_t bytes = rows_of_block * query_bytes(g, plan);
  if (bytes + 64 > limits.shared_bytes) return too_large(g, bytes, limits.shared_bytes, message);
  plan.blocks = static_cast<int>(divided_up(g.B, rows_of_block));
  const int64_t blocks = 1 + (g.mixing == LOLA_MIXING_CACHE_ONLY ? 0 : g.Hq) * static_cast<int64_t>(plan.blocks);
  if (blocks > INT64_C(0x7fffffff)) return too_many(g, message);
  const auto queue = [&](auto kernel) {
    return lola_cuda_launch_chained(kernel, static_cast<unsigned>(blocks), THREADS, bytes, stream, g, rows, plan,
                                    places.rows, places.phi);
  };
  cudaError_t error = cudaSuccess;
  if (many) {
    error = queue(decode_queries_kernel<MANY_ROWS>);
  } else {
    if (bytes > 48 << 10) error = allow_shared<decode_queries_kernel<1>>(bytes, device);
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

} // namespace

lola_status lola_cuda_decode(const lola_device_segment *segment, const call_rows &rows, void *scratch, int updates,
                             cudaStream_t stream, lola_message *message) {
  const lola_device_segment &g = *segment;
  if (!g.B || !g.Hkv) return LOLA_OK;
  int device = 0;
  device_limits limits = {};
  decode_plan plan = {};
  small_plan small = {};
  lola_status status = plan_step(g, &plan, &small, &device, &limits, message);
  if (status) return status;
  const scratch_places places = places_in(scratch, g);
  if (!plan.small) status = launch_queries(g, rows, plan.pipeline, places, limits, device, stream, message);
  if (updates) {
    const bool projects = !g.slot_phi;
    if (!status && projects)
      status = lola_cuda_update(segment, rows, plan.small ? nullptr : &places.rows, stream, message);
    if (!status && !projects)
      status =
          lola_cuda_segment_features(segment, LOLA_FEATURES_OF_CACHE, 0, plan.small ? &rows : nullptr, stream, message);
    lola_device_segment scanned = g;
    scanned.spans_are_old = !plan.small;
    if (!status && !projects) status = lola_cuda_scan(&scanned, 0, stream, message);
    if (!status && !plan.gathers) status = lola_cuda_commit_sparse(segment, stream, message);
  }
  if (status) return status;
  if (plan.small) {
    small.awaits = !updates;
    small.updates = updates;
    return launched(g.dtype == LOLA_FLOAT16 ? launch_small<__half>(g, rows, small, places.row_counters, stream)
                                            : launch_small<__nv_bfloat16>(g, rows, small, places.row_counters, stream),
                    "decode", message);
  }
  const launch_arguments a = {segment, plan, places, is_long(sizes_of(g)), stream};
  const cudaError_t error = g.dtype == LOLA_FLOAT32   ? launch_items<float>(a, device)
                            : g.dtype == LOLA_FLOAT16 ? launch_items<__half>(a, device)
                                                      : launch_items<__nv_bfloat16>(a, device);
  return launched(error, "decode", message);
}
