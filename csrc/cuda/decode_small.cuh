/* Decoding for batches so small that a step takes as long as what waits for one another in it: one kernel, a cluster of
 * blocks for each (row, KV head), for the caches of decode_pipeline.cuh with Hedgehog's 128 features.
 *
 * The cluster's first r blocks have a query head each: phi(q), N and z of its state and, once the others have sent
 * their tiles, the merge. The others have the tiles of pairs, a warp for a quarter of one. Pairs go straight to the
 * registers of who multiplies them; a state comes by bulk copies, since loads of so much would hold up the shuffles of
 * phi(q). All is asked for at once: where a block's part lies depends on its place alone, but for the window. Tiles
 * reach the head's block through distributed shared memory and count their bytes at its barrier.
 *
 * Sums are in the order that decode_queries.cuh and the pipeline have: rows have the same bits in any batch. */
#ifndef LOLA_CUDA_DECODE_SMALL_CUH
#define LOLA_CUDA_DECODE_SMALL_CUH

#include "decode_pipeline.cuh"
#include "decode_queries.cuh"

namespace {

constexpr int SMALL_WARPS = 8, SMALL_THREADS = SMALL_WARPS * 32;
constexpr int CLERK = WARPS;               /* the warp that looks after counters; it does not merge */
constexpr int TILES = SMALL_WARPS / WARPS; /* that a block works on at a time */
constexpr int TILE_FLOATS = WIDE + 4;      /* o, m, l of a head's tile in shared memory */
constexpr int TILE_SENT = WIDE * 4 + 8;    /* bytes of it */
constexpr int MOST_SMALL_BLOCKS = 3;       /* per multiprocessor: from there on decode_pipeline.cuh is faster */
constexpr int MOST_SMALL_TILES = 48;       /* that a head is sent */
constexpr int MERGE = 12;                  /* tiles that a head adds at a time */
/* Of a head: its state, N of the quarters, the warps' parts of q W. */
constexpr int STATE_FLOATS = WIDE_F * WIDE + SMALL_WARPS * (WIDE + WIDE_M);
static_assert(SMALL_WARPS * MATRIX_HEADS * SUM_PITCH <= STATE_FLOATS);
constexpr int PROJECTION_ROWS = WIDE / SMALL_WARPS; /* of the weights, per warp */
static_assert(WIDE_F == SMALL_WARPS * QUARTER, "a warp has a quarter of a state's part");
static_assert(SMALL_WARPS == WIDE_PARTS, "a part each");
static_assert(WIDE_M == 2 * 32 && WIDE == 4 * 32, "columns of a lane");

struct small_plan {
  int blocks;                     /* of a cluster */
  int sets;                       /* per KV head; 0 without a sparse cache */
  int window_tiles, sparse_tiles; /* at most: per KV head, per set */
  int tiles;                      /* of a cluster, at most */
  int updates;                    /* rows may begin a chunk: an update's kernels came before */
  int64_t first_update;           /* the first position whose chunk does not begin within W */
  double per_C, per_ring;         /* 1 / C and 1 / R */
  divisor by_rs, by_sparse_tiles;
};

/* Tiles that a head's block has room for: the window's end at `window_tiles`, and all are filled up to whole MERGEs. */
__host__ __device__ __forceinline__ int received_tiles(const small_plan &plan) {
  return plan.window_tiles + plan.sparse_tiles + MERGE;
}

/* Shared memory: what tiles a head's block is sent, then what its own warps share, or those of tiles. */
__host__ __device__ __forceinline__ int small_bytes(const small_plan &plan, int r) {
  const int pairs = SMALL_WARPS * r * SUM_PITCH;
  return (received_tiles(plan) * TILE_FLOATS + (STATE_FLOATS > pairs ? STATE_FLOATS : pairs)) * 4;
}

constexpr int MOST_SMALL_BYTES = ((MOST_SMALL_TILES + MERGE) * TILE_FLOATS + STATE_FLOATS) * 4;

/* What a head's block needs to know of its tiles. */
struct small_facts {
  int window_tiles, tiles; /* with its set's; before the clerk says so, pairs of that */
  float gate, gate_logit;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/* --- clusters --------------------------------------------------------------------------------------- */

/* RELAXED: nothing was written but barriers, which have a fence of their own. */
template <bool RELAXED = false> __device__ __forceinline__ void small_cluster_arrive() {
  if constexpr (RELAXED)
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  else
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void small_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* A barrier for one phase: of one thread, and of the bytes that it says. */
__device__ __forceinline__ void make_barrier(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(barrier)
               : "memory");
}
__device__ __forceinline__ void await_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void await_barrier(uint32_t barrier) {
  asm volatile("{\n.reg .pred done;\nagain:\n"
               "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], 0;\n"
               "@!done bra.uni again;\n}" ::"r"(barrier)
               : "memory");
}

/* An address of this block's shared memory in that of the cluster's block `rank`. */
__device__ __forceinline__ uint32_t address_in(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void send(uint32_t to, uint32_t barrier, const float (&x)[4]) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void send(uint32_t to, uint32_t barrier, float x, float y) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
               "f"(x), "f"(y), "r"(barrier)
               : "memory");
}

/* Of the warps that share a tile. */
__device__ __forceinline__ void tile_barrier() {
  static_assert(TILES == 2, "a barrier each");
  if (threadIdx.x < THREADS)
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
  else
    asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory");
}

/* Copies to shared memory and counts the bytes, for who waits, at its barrier. */
__device__ __forceinline__ void copy_bulk(void *to, const void *from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
               : "memory");
}

/* Between the clerk, who ARRIVES with the facts, and the warps that merge. */
template <bool ARRIVES> __device__ __forceinline__ void facts_barrier() {
  if constexpr (ARRIVES)
    asm volatile("bar.arrive 1, %0;" ::"n"(THREADS + 32) : "memory");
  else
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS + 32) : "memory");
}

/* --- loads ------------------------------------------------------------------------------------------ */

/* Into registers, at once and in this order. */
__device__ __forceinline__ uint4 ask(const void *from) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return x;
}

/* Weights never change. */
__device__ __forceinline__ float2 ask_weights(const float *from) {
  float2 x;
  asm volatile("ld.global.nc.L1::no_allocate.v2.f32 {%0, %1}, [%2];"
               : "=f"(x.x), "=f"(x.y)
               : "l"(__cvta_generic_to_global(from)));
  return x;
}

/* --- the window -------------------------------------------------------------------------------------- */

struct small_window {
  int ring_slot, slot, pairs; /* ring slots of the token and of the first pair; pairs with the newest */
};

__device__ __forceinline__ int tiles_of(int pairs) { return (pairs + UNIT_PAIRS - 1) / UNIT_PAIRS; }

/* x / d for x below 2^52, more tokens than there will be; `inverse` is 1 / d. */
__device__ __forceinline__ int64_t quotient(int64_t x, int d, double inverse) {
  const int64_t q = static_cast<int64_t>(static_cast<double>(x) * inverse), left = x - q * d;
  return q + (left >= d) - (left < 0);
}

__device__ __forceinline__ small_window window_of(const lola_device_segment &g, const small_plan &plan,
                                                  int64_t position) {
  const int C = static_cast<int>(g.C), ring = static_cast<int>(g.R);
  small_window w;
  w.pairs = static_cast<int>(min(position, position - quotient(position, C, plan.per_C) * C + g.W)) + 1;
  w.ring_slot = static_cast<int>(position - quotient(position, ring, plan.per_ring) * ring);
  w.slot = w.ring_slot + 1 - w.pairs;
  if (w.slot < 0) w.slot += ring;
  return w;
}

/* --- tiles of pairs --------------------------------------------------------------------------------- */

/* A quarter of a tile. */
struct small_pairs {
  const char *keys, *values; /* of slot 0 */
  int slot, slots;           /* of the first pair; after slot slots - 1 comes slot 0 */
  int there;                 /* pairs from there on that can be read, one or more */
  int newest;                /* which of them is the call's, if any */
  const int32_t *sources;    /* of the slots, where pairs that enter come from the window ring */
};

/* Pairs on the way to registers: pieces quad + 4j of keys row, row + 8; pieces row + 8j of values 2quad, 2quad + 1,
 * 2quad + 8, 2quad + 9; and pieces quad + 4j of a query. */
struct small_quarter {
  uint4 q[4], k[2][4], v[4][2];
};

__device__ __forceinline__ small_quarter ask_quarter(const lola_device_segment &g, const char *query,
                                                     const small_pairs &pairs, int batch, int kv_head, int group,
                                                     int ring_slot) {
  const int row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4, row_at = row * PIECE, quad_at = quad * PIECE;
  small_quarter x;
#pragma unroll
  for (int j = 0; j < 4; j++) x.q[j] = ask(query + quad_at + 4 * j * PIECE);
  const char *from[6];
  const bool is_run = !pairs.sources && pairs.there >= QUARTER && pairs.slot + QUARTER <= pairs.slots &&
                      static_cast<unsigned>(pairs.newest) >= QUARTER;
  unsigned entered = 0;
  const auto slot_of = [&](int pair) {
    const int slot = pairs.slot + min(pair, pairs.there - 1);
    return slot < pairs.slots ? slot : slot - pairs.slots;
  };
  const auto pair_at = [&](int i) { return i < 2 ? row + 8 * i : 2 * quad + i % 2 + (i - 2) / 2 * 8; };
  if (is_run) { /* of memory, as most are */
    const int64_t at = static_cast<int64_t>(pairs.slot) * ROW_BYTES;
    const char *const key = pairs.keys + at + row * ROW_BYTES + quad_at;
    const char *const value = pairs.values + at + 2 * quad * ROW_BYTES + row_at;
#pragma unroll
    for (int i = 0; i < 6; i++) from[i] = (i < 2 ? key : value) + (i < 2 ? 8 * i : i % 2 + (i - 2) / 2 * 8) * ROW_BYTES;
  } else {
#pragma unroll
    for (int i = 0; i < 6; i++) {
      const bool is_key = i < 2;
      const int slot = slot_of(pair_at(i));
      from[i] = (is_key ? pairs.keys : pairs.values) + static_cast<int64_t>(slot) * ROW_BYTES;
      if (min(pair_at(i), pairs.there - 1) == pairs.newest)
        from[i] = lola_device_at(is_key ? g.k : g.v, batch, 0, kv_head);
      if (pairs.sources) {
        const int code = __ldcg(pairs.sources + slot), ring = static_cast<int>(g.R);
        if (code >= 0 && pair_at(i) < pairs.there) {
          const int64_t at = static_cast<int64_t>(group) * ring +
                             (ring_slot + code < ring ? ring_slot + code : ring_slot + code - ring);
          from[i] = static_cast<const char *>(is_key ? g.window_keys : g.window_values) + at * ROW_BYTES;
          entered |= 1u << i;
        }
      }
      from[i] += is_key ? quad_at : row_at;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) x.k[i][j] = ask(from[i] + 4 * j * PIECE);
#pragma unroll
  for (int n = 0; n < 4; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) x.v[n][j] = ask(from[2 + n] + 8 * j * PIECE);
  if (entered) { /* into their slots: each piece is one lane's */
#pragma unroll
    for (int i = 0; i < 6; i++) {
      if (!(entered >> i & 1)) continue;
      char *const to = const_cast<char *>(i < 2 ? pairs.keys : pairs.values) +
                       static_cast<int64_t>(slot_of(pair_at(i))) * ROW_BYTES + (i < 2 ? quad_at : row_at);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (i < 2)
          *reinterpret_cast<uint4 *>(to + 4 * j * PIECE) = x.k[i][j];
        else if (j < 2)
          *reinterpret_cast<uint4 *>(to + 8 * j * PIECE) = x.v[i - 2][j];
      }
    }
  }
  return x;
}

/* Softmax sums of `count` pairs of a quarter, into `merge` (SUM_PITCH floats a head) and `sums`. */
template <typename T>
__device__ __forceinline__ void weigh_registers(const small_quarter &x, int heads, int count, float scale, float *merge,
                                                float2 *sums) {
  const int row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  float s[2][2][4] = {};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const unsigned q[4] = {x.q[j].x, x.q[j].y, x.q[j].z, x.q[j].w};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      mma<T>(s[i][0], q, x.k[i][j].x, x.k[i][j].z);
      mma<T>(s[i][1], q, x.k[i][j].y, x.k[i][j].w);
    }
  }
  const quarter_weights w = weights_of<T>(s, scale, count);
  if (quad == 0 && row < heads) sums[row] = make_float2(w.high, w.sum);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    float o[16]; /* columns 64 j + 16 quad on, of head `row` */
    weigh_values<T>(w.p, {x.v[0][j], x.v[1][j], x.v[2][j], x.v[3][j]}, o);
    if (row < heads) store_floats<16>(merge + row * SUM_PITCH + 64 * j + 16 * quad, o);
  }
}

/* Four columns of a tile, and its maximum and sum: quarters in order, those that have pairs. */
__device__ __forceinline__ void add_quarters(const float *merge, int step, const float2 (*sums)[MATRIX_HEADS], int head,
                                             int count, float *high, float *sum, float (&o)[4]) {
  float2 pair[WARPS];
  float x[WARPS][4];
#pragma unroll
  for (int i = 0; i < WARPS; i++) {
    const int from = i * QUARTER < count ? i : 0;
    pair[i] = sums[from][head];
    load_floats<4>(merge + from * step, x[i]);
  }
  *high = -INFINITY;
  *sum = o[0] = o[1] = o[2] = o[3] = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) {
    if (i * QUARTER >= count) break;
    const joining join(*high, pair[i].x);
    *high = join.high;
    *sum = join(*sum, pair[i].y);
#pragma unroll
    for (int e = 0; e < 4; e++) o[e] = join(o[e], x[i][e]);
  }
}

/* --- a query head ----------------------------------------------------------------------------------- */

/* Softmax sums of a head's `count` tiles, which lie one after the other, up to whole MERGEs none (-inf and zeros):
 * maximum, sum and this thread's column. The order is add_tiles', every thread for itself: a shuffle takes longer than
 * what it saves. */
__device__ __forceinline__ void merge_tiles(const float *tiles, int count, float *high, float *sum, float *o) {
  static_assert(MERGE == 12, "as the sum is written");
#pragma unroll 1
  for (int done = 0; done < count; done += MERGE, tiles += MERGE * TILE_FLOATS) {
    float2 pair[MERGE];
    float x[MERGE], higher = *high, share[MERGE], part[MERGE];
#pragma unroll
    for (int t = 0; t < MERGE; t++) {
      pair[t] = *reinterpret_cast<const float2 *>(tiles + t * TILE_FLOATS + WIDE);
      x[t] = tiles[t * TILE_FLOATS + threadIdx.x];
      higher = fmaxf(higher, pair[t].x);
    }
    const float before = weight_below(*high, higher);
    *high = higher;
#pragma unroll
    for (int t = 0; t < MERGE; t++) {
      share[t] = weight_below(pair[t].x, higher);
      part[t] = __fmul_rn(share[t], pair[t].y);
    }
    /* as warp_sum adds what its lanes have */
#pragma unroll
    for (int t = 0; t < 4; t++) part[t] = (part[t] + part[t + 8]) + part[t + 4];
    *sum = fmaf(before, *sum, (part[0] + part[2]) + (part[1] + part[3]));
    *o *= before;
#pragma unroll
    for (int t = 0; t < MERGE; t++) *o = fmaf(share[t], x[t], *o);
  }
}

#endif

/* --- the kernel ------------------------------------------------------------------------------------- */

/* Blocks (blocks of a cluster, Hkv, B). `arrivals`: per row, zero between launches. */
template <typename T>
__global__ void __launch_bounds__(SMALL_THREADS, 2)
    decode_small_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ call_rows rows,
                        const __grid_constant__ small_plan plan, unsigned *arrivals) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) float small_memory[];
  __shared__ uint64_t tiles_are_there, state_is_there[SMALL_WARPS];
  __shared__ float2 sums[SMALL_WARPS][MATRIX_HEADS];
  __shared__ small_facts facts;
  __shared__ int is_updated;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = blockIdx.x, kv_head = blockIdx.y, row = blockIdx.z, head = kv_head * g.r + rank;
  const int group = row * g.Hkv + kv_head, state = group * g.r + rank, ring = static_cast<int>(g.R);
  const int batch = rows.cu_seqlens.data ? 0 : row; /* of the token; its offset is 0, there is but one */
  const bool is_state = rank < g.r, recalls = is_state && g.mixing != LOLA_MIXING_CACHE_ONLY;
  const int quarter = warp % WARPS, turn = (plan.blocks - g.r) * TILES;
  float *const tiles = small_memory, *const own = tiles + received_tiles(plan) * TILE_FLOATS;
  const uint32_t barrier = shared_address(&tiles_are_there);

  /* A tile of the window, or of a set: those of the window come first. */
  int index = is_state ? plan.tiles : rank - g.r + warp / WARPS * (plan.blocks - g.r);
  int set, first; /* the first pair of this warp's quarter */
  int64_t slots_before;
  const char *query;
  const bool has_window = index < plan.window_tiles;
  const auto place_of = [&](int tile, int *its_set, int64_t *before) {
    *its_set = 0;
    *before = static_cast<int64_t>(group) * ring;
    if (tile < plan.window_tiles) return tile;
    tile -= plan.window_tiles;
    *its_set = static_cast<int>(divided(static_cast<unsigned>(tile), plan.by_sparse_tiles));
    *before = static_cast<int64_t>(group * plan.sets + *its_set) * g.L;
    return tile - *its_set * plan.sparse_tiles;
  };
  const auto look_at_tile = [&] {
    first = place_of(index, &set, &slots_before) * UNIT_PAIRS + quarter * QUARTER;
    const int heads = index < plan.window_tiles ? g.r : g.rs;
    query = lola_device_at(g.q, batch, 0, kv_head * g.r + set * g.rs + min(lane / 4, heads - 1));
  };
  look_at_tile();

  /* Into L2 what will be read, and weights into registers. */
  float2 weights[PROJECTION_ROWS];
  const float *const hidden = g.hidden + static_cast<int64_t>(state) * (WIDE_F * WIDE) + warp * (QUARTER * WIDE);
  const uint32_t own_barrier = shared_address(&state_is_there[warp]);
  if (recalls) {
    if (lane == 0) {
      prefetch_once(hidden, QUARTER * WIDE * 4);
      make_barrier(own_barrier);
    }
    const float *const from = g.map.w_q + static_cast<int64_t>(head) * (WIDE * WIDE_M) + warp * WIDE_M + lane * 2;
#pragma unroll
    for (int i = 0; i < PROJECTION_ROWS; i++) weights[i] = ask_weights(from + i * SMALL_WARPS * WIDE_M);
  } else if (index + lane * turn < plan.tiles) { /* a lane for each of the warp's tiles */
    int its_set;
    int64_t before;
    const int from = place_of(index + lane * turn, &its_set, &before) * UNIT_PAIRS + quarter * QUARTER;
    const bool sparse = index + lane * turn >= plan.window_tiles;
    const int bytes = min((sparse ? g.L : ring) - from, QUARTER) * ROW_BYTES;
    const int64_t at = (before + from) * ROW_BYTES;
    prefetch_once(static_cast<const char *>(sparse ? g.sparse_keys : g.window_keys) + at, bytes);
    prefetch_once(static_cast<const char *>(sparse ? g.sparse_values : g.window_values) + at, bytes);
  }
  if (threadIdx.x == 0) make_barrier(barrier);
  __syncwarp();
  small_cluster_arrive<true>();
  const T *const own_query = reinterpret_cast<const T *>(lola_device_at(g.q, batch, 0, head)) + warp;
  char *const out = lola_device_at(g.out, batch, 0, head);
  lola_device_await_previous();
  lola_device_start_next();

  int64_t position = 0; /* who reads it does before it arrives below: then it may change */
  if (plan.updates || warp == CLERK || has_window) position = __ldcg(g.tokens_seen + row);
  if (rows.starts.data || rows.stops.data || rows.cu_seqlens.data) {
    int64_t start, stop;
    row_range(rows, row, &start, &stop);
    if (stop <= start) return; /* idle */
  }
  int pairs_of_set = 0; /* for the merge */
  float gate = 0;
  if (is_state && warp == CLERK) {
    if (g.gate) gate = g.gate[head];
    if (plan.sets) {
      const int own_set = static_cast<int>(divided(static_cast<unsigned>(rank), plan.by_rs));
      pairs_of_set = static_cast<int>(__ldcg(g.sparse_count + group * plan.sets + own_set));
    }
  }
  unsigned short x = 0; /* lane i: the i-th element of q that this warp multiplies */
  if (recalls && lane < PROJECTION_ROWS)
    x = __ldcg(reinterpret_cast<const unsigned short *>(own_query + lane * SMALL_WARPS));
  bool updated = false;
  if (plan.updates) {
    updated = begins_update(g, plan.first_update, position, __ldcg(g.chunks + row));
    if (threadIdx.x == 0) is_updated = updated;
  }

  if (is_state) {
    float n[4] = {0, 0, 0, 0},
          z = 0, *const quarters = own + WIDE_F * WIDE, *const parts = quarters + SMALL_WARPS * WIDE;
    if (recalls) {
      float *const h = own + warp * (QUARTER * WIDE);
      if (lane == 0) {
        await_bytes(own_barrier, QUARTER * WIDE * 4);
        copy_bulk(h, hidden, QUARTER * WIDE * 4, own_barrier);
      }
      const bool folded = __ldcg(g.folded + state);
      float s = 0;
      if (lane < QUARTER) s = __ldcg(g.normalizer + static_cast<int64_t>(state) * WIDE_F + warp * QUARTER + lane);
      const float factors = static_cast<float>(*reinterpret_cast<const T *>(&x));
      float sum[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < PROJECTION_ROWS; i++) {
        const float factor = __shfl_sync(ALL, factors, i);
        sum[0] = fmaf(factor, weights[i].x, sum[0]);
        sum[1] = fmaf(factor, weights[i].y, sum[1]);
      }
      *reinterpret_cast<float2 *>(parts + warp * WIDE_M + lane * 2) = make_float2(sum[0], sum[1]);
      __syncthreads();
      float phi[2];
      wide_features(parts, warp >= SMALL_WARPS / 2, g.map.kind == LOLA_MAP_HEDGEHOG, phi);
      const float mine = warp / 2 % 2 ? phi[1] : phi[0];
      const int base = warp % 2 * QUARTER;
      await_barrier(own_barrier);
#pragma unroll
      for (int i = 0; i < QUARTER; i++) {
        const float f = __shfl_sync(ALL, mine, base + i);
        float y[4];
        load_floats<4>(h + i * WIDE + lane * 4, y);
#pragma unroll
        for (int e = 0; e < 4; e++) n[e] = fmaf(f, y[e], n[e]);
      }
      z = warp_sum(__fmul_rn(__shfl_sync(ALL, mine, base + lane % QUARTER), s)); /* s is 0 from lane QUARTER on */
      if (!folded) {                                                             /* whatever was there */
        n[0] = n[1] = n[2] = n[3] = 0;
        z = 0;
      }
    }
    store_floats<4>(quarters + warp * WIDE + lane * 4, n);
    if (lane == 0) sums[warp][0].x = z;
    if (warp == CLERK && lane == 0) {
      facts.gate = gate;
      facts.tiles = pairs_of_set;
    }
    small_cluster_wait();
  } else {
    small_window window;
    if (updated || has_window) window = window_of(g, plan, position);
    bool exact = updated; /* asks for pairs that are, not for slots */
    const int merge_step = g.r * SUM_PITCH;
    float *const merge = own + warp / WARPS * WARPS * merge_step;
    small_cluster_wait(); /* the blocks that are sent to are there */
#pragma unroll 1
    while (index < plan.tiles) {
      const bool sparse = index >= plan.window_tiles;
      const int heads = sparse ? g.rs : g.r;
      small_pairs pairs;
      int all = window.pairs; /* of the set or the window */
      pairs.sources = nullptr;
      if (sparse) {
        all = static_cast<int>(__ldcg(g.sparse_count + group * plan.sets + set));
        pairs.slots = g.L;
        pairs.slot = first;
        pairs.there = g.L - first;
        pairs.newest = -1;
        if (updated) pairs.sources = g.slot_source + slots_before;
      } else {
        pairs.slots = ring;
        pairs.slot = first + window.slot;
        if (pairs.slot >= ring) pairs.slot -= ring;
        pairs.there = all - first;
        pairs.newest = all - first - 1;
      }
      pairs.keys = static_cast<const char *>(sparse ? g.sparse_keys : g.window_keys) + slots_before * ROW_BYTES;
      pairs.values = static_cast<const char *>(sparse ? g.sparse_values : g.window_values) + slots_before * ROW_BYTES;
      if (exact) pairs.there = all - first;
      if (pairs.there > 0) {
        const small_quarter asked = ask_quarter(g, query, pairs, batch, kv_head, group, window.ring_slot);
        asm volatile("" : "+r"(all)); /* nothing waits for it before the pairs are under way */
        const int count = all - first;
        if (!exact && sparse && count > 0 && count < min(g.L - first, QUARTER)) {
          exact = true; /* what lies behind them may be no numbers */
          continue;
        }
        if (count > 0) weigh_registers<T>(asked, heads, count, g.scale, merge + quarter * merge_step, sums[warp]);
      }
      const int count = all - (first - quarter * QUARTER); /* from the tile's first on */
      const int place = first / UNIT_PAIRS, first_head = set * g.rs;
      index += turn;
      look_at_tile();
      if (count <= 0) continue;
      tile_barrier();
      /* The window's tiles end where the set's begin. */
      const int to_tile = plan.window_tiles + place - (sparse ? 0 : tiles_of(window.pairs));
      const uint32_t slot = shared_address(tiles + to_tile * TILE_FLOATS);
#pragma unroll 1
      for (int h = quarter; h < heads; h += WARPS) {
        float high, sum, o[4];
        add_quarters(merge + h * SUM_PITCH + lane * 4, merge_step, sums + warp / WARPS * WARPS, h, count, &high, &sum,
                     o);
        const uint32_t to = address_in(slot, first_head + h), there = address_in(barrier, first_head + h);
        send(to + lane * 16, there, o);
        if (lane == 0) send(to + WIDE * 4, there, high, sum);
      }
      if (index < plan.tiles) tile_barrier(); /* the sums were read */
    }
  }

  __syncthreads(); /* the state's sums are written */
  if (plan.updates &&
      is_updated) { /* no block of the cluster may read the ring any more when the call's pair is written */
    small_cluster_arrive();
    small_cluster_wait();
  }
  if (is_state && warp < WARPS) {
    float n = 0, z = 0, high = -INFINITY, sum = 0, o = 0;
    const float *const quarters = own + WIDE_F * WIDE + threadIdx.x;
#pragma unroll
    for (int part = 0; part < SMALL_WARPS; part += WARPS) {
      n += add_groups(quarters + part * WIDE, WARPS, WIDE);
      z += add_groups(&sums[part][0].x, WARPS, 2 * MATRIX_HEADS);
    }
    float logit = log2f(z);
    facts_barrier<false>();
    if (g.mixing == LOLA_MIXING_GATED) logit += facts.gate_logit;
    await_barrier(barrier);
    merge_tiles(tiles + (plan.window_tiles - facts.window_tiles) * TILE_FLOATS, facts.tiles, &high, &sum, &o);
    const lola_device_weights w = lola_device_mix(g.mixing, facts.gate, logit, high, sum, z);
    lola_device_store(out, threadIdx.x, g.out.dtype, fmaf(w.softmax, o, w.linear != 0 ? w.linear * n : 0));
    if (threadIdx.x == 0 && g.share.data) *reinterpret_cast<float *>(lola_device_at(g.share, batch, 0, head)) = w.share;
  }
  if (warp != CLERK) return;
  int ring_slot = 0;
  if (is_state) { /* what the merge needs to know */
    const small_window window = window_of(g, plan, position);
    const int window_tiles = tiles_of(window.pairs), count = window_tiles + tiles_of(facts.tiles);
    const int missing = (MERGE - count % MERGE) % MERGE * (TILE_FLOATS / 4);
    float4 *const behind = reinterpret_cast<float4 *>(tiles + (plan.window_tiles - window_tiles + count) * TILE_FLOATS);
    __syncwarp(); /* all have read `tiles` */
#pragma unroll 1
    for (int i = lane; i < missing; i += 32)
      behind[i] = make_float4(i % (TILE_FLOATS / 4) < WIDE / 4 ? 0 : -INFINITY, 0, 0, 0);
    if (lane == 0) {
      facts.window_tiles = window_tiles;
      facts.tiles = count;
      facts.gate_logit = lola_device_gate_logit(facts.gate);
      await_bytes(barrier, count * TILE_SENT);
    }
    facts_barrier<true>();
    ring_slot = window.ring_slot;
  }
  if (rank == 0) { /* the newest pair into its ring slot, and its score */
    const bool is_key = lane < 16;
    const int64_t slot = static_cast<int64_t>(group) * ring + ring_slot;
    const char *const from = lola_device_at(is_key ? g.k : g.v, batch, 0, kv_head);
    char *const to = static_cast<char *>(is_key ? g.window_keys : g.window_values) + slot * ROW_BYTES;
    reinterpret_cast<uint4 *>(to)[lane % 16] = reinterpret_cast<const uint4 *>(from)[lane % 16];
    if (g.scores.data && lane * g.rs < g.r) {
      const int own_set = static_cast<int>(divided(static_cast<unsigned>(kv_head * g.r), plan.by_rs)) + lane;
      lola_device_keep_given(g, row, own_set, ring_slot, batch, 0);
    }
  }
  asm volatile("" : "+l"(position)); /* it is there */
  if (lane == 31 && atomicAdd(arrivals + row, 1) == static_cast<unsigned>(plan.blocks * g.Hkv) - 1) {
    /* No block of the row will look at its counters. */
    arrivals[row] = 0;
    g.tokens_seen[row] = position + 1;
    g.chunks[row] = quotient(position, static_cast<int>(g.C), plan.per_C); /* no fewer than before */
  }
#endif
}

} // namespace

#endif
