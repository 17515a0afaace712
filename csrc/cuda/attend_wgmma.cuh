/* attend on Hopper's warpgroup matrices: FlashAttention-3's loop over gathered pairs (arXiv 2407.08608).
 *
 * A block of threads stays on its multiprocessor and works through query blocks. One warpgroup, the producer, looks up
 * where pairs lie and copies their keys and values into a ring of STAGES tiles of 64 pairs, ahead of the others and
 * across query blocks; after a query block's pairs come its rows of `recalled`, 64 a tile. WGS consumers hold SUBS
 * times 64 rows (token, head) each: S = Q K^T, O += P V with P in registers, the logits of the next 64 x 64 computed
 * while these values are summed, exponents from a maximum that follows the true one in steps. Row i is head i % rs of
 * token i / rs. D = Dv = DP. */
#ifndef LOLA_CUDA_ATTEND_WGMMA_CUH
#define LOLA_CUDA_ATTEND_WGMMA_CUH

#include "attend_block.cuh"

namespace {

constexpr int WGMMA_PAIRS = 64;
/* Copies (generic proxy) are in no order with wgmma's reads (async proxy) by themselves: a fence after each barrier. */
constexpr bool WGMMA_COPY_FENCE = true;
/* Sums are rescaled when a row's maximum has grown by more than this, in base 2: exponentials stay below 2^8. */
constexpr float WGMMA_RISE = 8;

/* What the producer tells the consumers about a query block. */
struct wgmma_item {
  block_end end;
  int first_row, rows; /* the part of the block's rows */
  int seen, tiles;     /* pairs that the block's first token sees; tiles of pairs */
  int recalled;        /* tiles of recalled */
  bool stop;           /* no more */
};

/* What the producer's warps need to know about a query block. */
struct wgmma_work {
  wgmma_item item;
  pair_places places;
  int pairs; /* 0: nothing to do */
  /* Queries, z and recalled of the block's first token and head; the strides of the former in bytes. */
  const char *queries;
  int64_t token_bytes, head_bytes;
  const float *z, *recalled;
};

template <int DP, int WGS, int SUBS> struct wgmma_layout {
  static constexpr int THREADS = 128 * (WGS + 1), BLOCKS = WGS == 1 ? 2 : 1, M = 64 * WGS * SUBS;
  static constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = WGS == 1 ? 200 : 224;
  /* What a launch gives all threads, to be dealt out anew. */
  static constexpr int LAUNCH_REGISTERS = 65536 / (BLOCKS * THREADS) / 8 * 8;
  static_assert(WGS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= (WGS + 1) * LAUNCH_REGISTERS);
  static constexpr int STAGES = DP == 128 ? (WGS == 1 ? 3 : 5) : (WGS == 1 ? 5 : 8);
  /* Two consumers queue their products in turn, so that one's softmax runs beside the other's products. */
  static constexpr bool TURNS = WGS == 2 && SUBS == 1;
  /* Queries that fit the registers are read once, and their place is free for the next block's. */
  static constexpr bool HELD = SUBS == 1;
  static constexpr int TILE_BYTES = WGMMA_PAIRS * DP * 2; /* of keys, of values, and of 64 rows of queries */
  static constexpr int STAGE_BYTES = 2 * TILE_BYTES;      /* keys and values, or 64 rows of recalled */
  static constexpr int RING = M * DP * 2, BARRIERS = RING + STAGES * STAGE_BYTES;
  /* Barriers of 8 bytes: keys, values and queries have come, and their places are free. */
  static constexpr int K_FULL = BARRIERS, V_FULL = K_FULL + 8 * STAGES, K_EMPTY = V_FULL + 8 * STAGES,
                       V_EMPTY = K_EMPTY + 8 * STAGES, Q_FULL = V_EMPTY + 8 * STAGES, Q_EMPTY = Q_FULL + 8;
  static constexpr int ITEMS = Q_EMPTY + 8, WORK = ITEMS + 2 * static_cast<int>(sizeof(wgmma_item));
  static constexpr int ROWS = WORK + static_cast<int>(sizeof(wgmma_work)); /* of each warp: where 16 rows come from */
  static constexpr int BYTES = ROWS + 4 * 16 * 8;
  static_assert(BYTES <= (BLOCKS == 2 ? 115712 : 232448));
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* A place in the ring of stages, and the parity of its barriers' phase. */
template <int STAGES> struct ring_place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/* Byte offset of 16-byte piece c of row i in a tile of recalled, such that no bank serves two of finish_row's lanes. */
template <int DP> __device__ __forceinline__ uint32_t recalled_offset(int i, int c) {
  return i * DP * 4 + ((c ^ ((i & 3) << 1)) << 4);
}

/* Tells a warp where its 16 rows come from: lanes first .. first + 15 know one each. Not before all lanes have read the
 * rows before. */
__device__ __forceinline__ void share_rows(const char **rows, const char *from, int first) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  if (lane / 16 * 16 == first) rows[lane % 16] = from;
  __syncwarp();
}

/* A warp's 16 rows of a tile of 64 rows of DP 16-bit numbers. All addresses are read first, so that copies follow each
 * other at once. */
template <int DP> __device__ __forceinline__ void copy_rows(uint32_t tile, const char *const *rows) {
  constexpr int PIECES = DP / 8, ROWS = 32 / PIECES; /* rows that a warp copies at once */
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, piece = lane % PIECES, first = lane / PIECES;
  const char *from[16 / ROWS];
#pragma unroll
  for (int i = 0; i < 16 / ROWS; i++) from[i] = rows[i * ROWS + first] + piece * 16;
#pragma unroll
  for (int i = 0; i < 16 / ROWS; i++)
    cp_async(tile + tile_offset(WGMMA_PAIRS, warp * 16 + i * ROWS + first, piece), from[i]);
}

/* The same of recalled; NULL where there is no row. */
template <int DP> __device__ __forceinline__ void copy_recalled(uint32_t tile, const char *const *rows) {
  constexpr int PIECES = DP / 4, ROWS = 32 / PIECES, BATCH = 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, piece = lane % PIECES, first = lane / PIECES;
#pragma unroll 1
  for (int row = 0; row < 16; row += BATCH * ROWS) {
    const char *from[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) from[i] = rows[row + i * ROWS + first];
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (from[i])
        cp_async(tile + recalled_offset<DP>(warp * 16 + row + i * ROWS + first, piece), from[i] + piece * 16);
  }
}

/* Looks up a query block. For a whole warp. */
template <int DP, int M>
__device__ __forceinline__ void open_work(const lola_device_segment &g, int parts, int row_tiles, int index,
                                          wgmma_work *work) {
  const int first_row = index % row_tiles * M;
  index /= row_tiles;
  const int part = index % parts;
  index /= parts;
  const int set = index % g.S, record = index / g.S;
  query_block block;
  const bool some = open_block(g, record, set, part, &block) && first_row < block.tokens * g.rs;
  if (threadIdx.x % 32) return;
  work->pairs = 0;
  if (!some) return;
  const lola_device_span &span = g.spans[block.row];
  const int rows = min(block.tokens * g.rs - first_row, M), pairs = block.seen + (first_row + rows - 1) / g.rs;
  const int64_t linear = (static_cast<int64_t>(span.token) + block.first) * g.Hq + set * g.rs;
  work->item.end = end_of(g, block);
  work->item.first_row = first_row;
  work->item.rows = rows;
  work->item.seen = block.seen;
  work->item.tiles = (pairs + WGMMA_PAIRS - 1) / WGMMA_PAIRS;
  work->item.recalled = g.mixing == LOLA_MIXING_CACHE_ONLY ? 0 : (rows + 63) / 64;
  work->item.stop = false;
  work->pairs = pairs;
  place_pairs(g, block, &work->places);
  work->queries = lola_device_at(g.q, span.batch, span.first + block.first, set * g.rs);
  work->token_bytes = g.q.stride_t * 2;
  work->head_bytes = g.q.stride_h * 2;
  work->z = g.z + linear;
  work->recalled = g.recalled + linear * DP;
}

template <int DP, int WGS, int SUBS>
__device__ __forceinline__ void wgmma_produce(const lola_device_segment &g, int parts, int row_tiles, int64_t items,
                                              unsigned char *shared) {
  using layout = wgmma_layout<DP, WGS, SUBS>;
  const uint32_t base = shared_address(shared);
  /* Warp w copies rows 16 w .. 16 w + 15 of each tile; lanes below 16 look up keys, the others values. */
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = __shfl_sync(0xffffffffu, thread / 32, 0);
  const int own = warp * 16 + lane % 16;
  wgmma_work &work = *reinterpret_cast<wgmma_work *>(shared + layout::WORK);
  wgmma_item *mailbox = reinterpret_cast<wgmma_item *>(shared + layout::ITEMS);
  const char **sources = reinterpret_cast<const char **>(shared + layout::ROWS) + warp * 16;
  const auto query_row = [&](int row) {
    const int token = (work.item.first_row + row) / g.rs, head = work.item.first_row + row - token * g.rs;
    return work.queries + token * work.token_bytes + head * work.head_bytes;
  };
  /* Index of a row in z and recalled. */
  const auto linear_row = [&](int row) {
    const int token = (work.item.first_row + row) / g.rs, head = work.item.first_row + row - token * g.rs;
    return static_cast<int64_t>(token) * g.Hq + head;
  };
  ring_place<layout::STAGES> at;
  uint32_t q_parity = 1, letter = 0;
  for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
    named_barrier_sync(3, 128); /* nobody needs the block before any more */
    if (warp == 0) open_work<DP, layout::M>(g, parts, row_tiles, static_cast<int>(index), &work);
    named_barrier_sync(3, 128);
    if (!work.pairs) continue;
    const int rows = work.item.rows, tiles = work.item.tiles, slots = tiles + work.item.recalled;
    /* The queries' place is free after the block before: until then pairs come first. */
    const int queries_at = layout::HELD ? 0 : min(layout::STAGES - 1, tiles - 1);
    if (!layout::HELD)
#pragma unroll 1
      for (int i = thread; i < rows; i += 128) {
        const char *row = query_row(i);
#pragma unroll
        for (int j = 0; j < DP * 2; j += 128) prefetch_l2(row + j);
      }

    /* What this lane's address depends on is read one tile ahead: a pair's code, or the bits of a row's z. */
    int code;
    const auto look_up = [&](int slot) {
      const int row = (slot - tiles) * 64 + own;
      if (slot < tiles)
        code = pair_code(work.places, min(slot * WGMMA_PAIRS + own, work.pairs - 1));
      else
        code = row < rows ? __float_as_int(work.z[linear_row(row)]) : 0;
    };
    look_up(0);
#pragma unroll 1
    for (int slot = 0; slot < slots; slot++, at.advance()) {
      if (slot == queries_at) {
        barrier_wait(base + layout::Q_EMPTY, q_parity);
        q_parity ^= 1;
#pragma unroll 1
        for (int i = 0; i < rows; i += 64) {
          share_rows(sources, query_row(min(i + own, rows - 1)), 0);
          copy_rows<DP>(base + i / 64 * layout::TILE_BYTES, sources);
        }
        barrier_arrive_after_copies(base + layout::Q_FULL);
        if (thread == 0) {
          mailbox[letter] = work.item;
          barrier_arrive(base + layout::Q_FULL);
        }
        letter ^= 1;
      }
      const uint32_t stage = base + layout::RING + at.stage * layout::STAGE_BYTES;
      const uint32_t barrier = base + 8 * at.stage;
      if (slot < tiles) {
        const char *from = pair_row(work.places, lane >= 16, code);
        if (slot + 1 < slots) look_up(slot + 1);
#pragma unroll
        for (int values = 0; values < 2; values++) {
          share_rows(sources, from, values * 16);
          barrier_wait(barrier + (values ? layout::V_EMPTY : layout::K_EMPTY), at.parity ^ 1);
          copy_rows<DP>(stage + values * layout::TILE_BYTES, sources);
          barrier_arrive_after_copies(barrier + (values ? layout::V_FULL : layout::K_FULL));
        }
      } else {
        const char *from = nullptr; /* where z is 0, recalled is unset */
        if (__int_as_float(code) > 0)
          from = reinterpret_cast<const char *>(work.recalled + linear_row((slot - tiles) * 64 + own) * DP);
        if (slot + 1 < slots) look_up(slot + 1);
        barrier_wait(barrier + layout::K_EMPTY, at.parity ^ 1);
        barrier_wait(barrier + layout::V_EMPTY, at.parity ^ 1);
        share_rows(sources, from, 0);
        copy_recalled<DP>(stage, sources);
        barrier_arrive_after_copies(barrier + layout::K_FULL);
        barrier_arrive_after_copies(barrier + layout::V_FULL);
      }
    }
  }
  barrier_wait(base + layout::Q_EMPTY, q_parity);
  if (thread == 0) {
    mailbox[letter].stop = true;
    barrier_arrive(base + layout::Q_FULL);
  }
  barrier_arrive(base + layout::Q_FULL);
}

/* The softmax of a lane's two rows so far: the logits (unscaled) that exponents are taken from, and this lane's parts
 * of the sums. The first is finite, so that a tile without a visible pair leaves the sums alone. */
struct softmax_state {
  float from[2] = {-1e30f, -1e30f}, sum[2] = {0, 0};
};

/* Turns the logits of a tile into exponentials and adds them to the sums. The exponents' origin follows the maximum
 * when that is more than `rise` above it, in base 2, and `rescale` is what earlier sums must be multiplied by: 1 for
 * most tiles. Exponents are factor * s - factor * from, the latter rounded once, the same in every tile. Needs
 * factor > 0. */
template <int N>
__device__ __forceinline__ void softmax_rows(float (&s)[N][4], float factor, float rise, softmax_state *state,
                                             float (&rescale)[2]) {
  float most[2][2], base[2];
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      most[half][i] = fmaxf(s[i][half * 2], s[i][half * 2 + 1]);
#pragma unroll
      for (int j = 2 + i; j < N; j += 2)
        most[half][i] = fmaxf(most[half][i], fmaxf(s[j][half * 2], s[j][half * 2 + 1]));
    }
#pragma unroll
  for (int half = 0; half < 2; half++) most[half][0] = fmaxf(most[half][0], most[half][1]);
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
    for (int half = 0; half < 2; half++)
      most[half][0] = fmaxf(most[half][0], __shfl_xor_sync(0xffffffffu, most[half][0], distance));
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float before = state->from[half];
    if ((most[half][0] - before) * factor > rise) state->from[half] = most[half][0];
    base[half] = __fmul_rn(state->from[half], factor);
    rescale[half] = power_of_two(__fsub_rn(__fmul_rn(before, factor), base[half]));
  }
  float sum[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      s[j][i] = power_of_two(fmaf(s[j][i], factor, -base[i / 2]));
      sum[i] += s[j][i];
    }
#pragma unroll
  for (int half = 0; half < 2; half++)
    state->sum[half] = state->sum[half] * rescale[half] + (sum[half * 2] + sum[half * 2 + 1]);
}

template <typename T, int DP, int WGS, int SUBS>
__device__ __forceinline__ void wgmma_consume(const lola_device_segment &g, const logit_scale &scale,
                                              unsigned char *shared) {
  using layout = wgmma_layout<DP, WGS, SUBS>;
  using place = ring_place<layout::STAGES>;
  constexpr int N = WGMMA_PAIRS / 8, PANEL = WGMMA_PAIRS * 128;
  constexpr int TILE = layout::TILE_BYTES / 16, STAGE = layout::STAGE_BYTES / 16; /* as descriptors count */
  const uint32_t base = shared_address(shared);
  const int lane = threadIdx.x % 32, warps = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); /* the same in all lanes */
  const int group = warps / 4, warp = warps % 4;
  const wgmma_item *mailbox = reinterpret_cast<const wgmma_item *>(shared + layout::ITEMS);
  /* Of the warpgroup's first rows and of stage 0. */
  const uint32_t queries = wgmma_matrix(base + group * layout::TILE_BYTES, 16),
                 keys = wgmma_matrix(base + layout::RING, 16),
                 values = wgmma_matrix(base + layout::RING + layout::TILE_BYTES, PANEL);
  /* LoLCATs' weights need the true maximum. */
  const float rise = g.mixing == LOLA_MIXING_LOLCATS ? 0 : WGMMA_RISE;
  place at;
  if (layout::TURNS && group == 1) named_barrier_arrive(1, 256); /* the first turn is warpgroup 0's */
  for (uint32_t letter = 0;; letter ^= 1) {
    barrier_wait(base + layout::Q_FULL, letter);
    const wgmma_item &item = mailbox[letter];
    if (item.stop) break;
    const int tiles = item.tiles;
    uint32_t q[layout::HELD ? DP / 16 : 1][4];
    if constexpr (layout::HELD) {
#pragma unroll
      for (int k = 0; k < DP / 16; k++) {
        ldmatrix(q[k], base + group * layout::TILE_BYTES +
                           tile_offset(WGMMA_PAIRS, warp * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; i++) q[k][i] = (q[k][i] & scale.keep) ^ scale.flip;
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(base + layout::Q_EMPTY);
    } else if (scale.flip || !scale.keep) { /* the warpgroup changes its rows in their place */
#pragma unroll 1
      for (int i = threadIdx.x % 128; i < SUBS * layout::TILE_BYTES / 4; i += 128) {
        const int tile = i / (layout::TILE_BYTES / 4) * WGS + group, word = i % (layout::TILE_BYTES / 4);
        uint32_t &x = reinterpret_cast<uint32_t *>(shared + tile * layout::TILE_BYTES)[word];
        x = (x & scale.keep) ^ scale.flip;
      }
      fence_async_proxy();
      named_barrier_sync(4 + group, 128);
    }

    /* This lane's rows of sub h: 64 (h WGS + group) + 16 warp + lane / 4 and 8 more. A row without a query sees what
     * the last one sees. */
    const auto row_of = [&](int h, int half) { return (h * WGS + group) * 64 + warp * 16 + lane / 4 + half * 8; };
    int seen_by_all[SUBS]; /* of the warp's rows */
#pragma unroll
    for (int h = 0; h < SUBS; h++)
      seen_by_all[h] = item.seen + (item.first_row + min((h * WGS + group) * 64 + warp * 16, item.rows - 1)) / g.rs;

    float o[SUBS][DP / 8][4] = {}, s[N][4], rescale[2];
    uint32_t p[N / 2][4];
    softmax_state state[SUBS];

    const auto await = [&](int barriers, const place &from) {
      barrier_wait(base + barriers + 8 * from.stage, from.parity);
    };
    const auto release = [&](int barriers, const place &from) {
      if (lane == 0) barrier_arrive(base + barriers + 8 * from.stage);
    };
    const auto queue_logits = [&](int h, const place &from) {
      pin(s);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < DP / 16; k++) {
        const int step = (k / 4 * PANEL + k % 4 * 32) / 16;
        if constexpr (layout::HELD)
          wgmma<T, 0>(s, q[k], keys + from.stage * STAGE + step, k > 0);
        else
          wgmma_shared<T>(s, queries + h * WGS * TILE + step, keys + from.stage * STAGE + step, k > 0);
      }
      wgmma_commit();
    };
    const auto queue_sums = [&](int h, const place &from) {
      pin(o[h]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < N / 2; k++) wgmma<T, 1>(o[h], p[k], values + from.stage * STAGE + k * 16 * 128 / 16, 1);
      wgmma_commit();
    };
    const auto exponentials = [&](int h, int tile) {
      if ((tile + 1) * WGMMA_PAIRS > seen_by_all[h]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int token = (item.first_row + min(row_of(h, half), item.rows - 1)) / g.rs;
          const int seen = item.seen + token - tile * WGMMA_PAIRS - lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < N; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
              if (j * 8 + i >= seen) s[j][half * 2 + i] = -INFINITY;
        }
      }
      softmax_rows(s, scale.factor, rise, &state[h], rescale);
    };
    /* After `exponentials`, when no product of o[h] or p is under way. */
    const auto take_exponentials = [&](int h) {
      if (__any_sync(0xffffffffu, rescale[0] != 1 || rescale[1] != 1)) {
#pragma unroll
        for (int j = 0; j < DP / 8; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) o[h][j][i] *= rescale[i / 2];
      }
#pragma unroll
      for (int k = 0; k < N / 2; k++) {
        p[k][0] = pack<T>(s[2 * k][0], s[2 * k][1]);
        p[k][1] = pack<T>(s[2 * k][2], s[2 * k][3]);
        p[k][2] = pack<T>(s[2 * k + 1][0], s[2 * k + 1][1]);
        p[k][3] = pack<T>(s[2 * k + 1][2], s[2 * k + 1][3]);
      }
    };
    const auto await_copies = [&](int barriers, const place &from) {
      await(barriers, from);
      if (WGMMA_COPY_FENCE) fence_async_proxy();
    };
    /* Queues the logits of sub h with the tile at `next` and the sums of sub `last` with that at `from`, and works on
     * the former while the tensor cores do the latter. `await_next` waits for what the step after this one needs; it is
     * also the branch that keeps the compiler from moving the last wait up before the exponentials. */
    const auto step = [&](int h, const place &next, int tile, int last, const place &from, const auto &await_next) {
      if (layout::TURNS) named_barrier_sync(1 + group, 256);
      queue_logits(h, next);
      queue_sums(last, from);
      if (layout::TURNS) named_barrier_arrive(2 - group, 256);
      wgmma_wait<1>();
      pin(s);
      if (h == SUBS - 1) release(layout::K_EMPTY, next);
      exponentials(h, tile);
      pin(s);
      await_next();
      wgmma_wait<0>();
      pin(o[last]);
      if (last == SUBS - 1) release(layout::V_EMPTY, from);
      take_exponentials(h);
    };

    await_copies(layout::K_FULL, at);
    queue_logits(0, at);
    wgmma_wait<0>();
    pin(s);
    if (SUBS == 1) release(layout::K_EMPTY, at);
    exponentials(0, 0);
    take_exponentials(0);
    await(layout::V_FULL, at);
    place next = at;
    next.advance();
    if (SUBS == 1 && tiles > 1) await(layout::K_FULL, next);
    if (WGMMA_COPY_FENCE) fence_async_proxy();
    for (int tile = 1;; tile++) {
      if constexpr (SUBS == 2)
        step(1, at, tile - 1, 0, at, [&] {
          if (tile < tiles) await_copies(layout::K_FULL, next);
        });
      if (tile >= tiles) break;
      const place now = next;
      next.advance();
      step(0, now, tile, SUBS - 1, at, [&] {
        await(layout::V_FULL, now);
        if (SUBS == 1 && tile + 1 < tiles) await(layout::K_FULL, next);
        if (WGMMA_COPY_FENCE) fence_async_proxy();
      });
      at = now;
    }
    if (!layout::HELD && lane == 0) barrier_arrive(base + layout::Q_EMPTY);
    queue_sums(SUBS - 1, at);

    /* The linear term: the tiles of recalled are in the ring in order of rows. */
    const int recalled_tiles = item.recalled;
    const place last = at;
    at.advance();
#pragma unroll
    for (int h = 0; h < SUBS; h++) {
      row_end end[2];
#pragma unroll
      for (int half = 0; half < 2; half++)
        end[half] = end_of_row(g, item.end, item.first_row + row_of(h, half), row_of(h, half) < item.rows);
      if (h == 0) {
        wgmma_wait<0>();
        pin(o[SUBS - 1]);
        release(layout::V_EMPTY, last);
      }
#pragma unroll 1
      for (int i = 0; i < WGS; i++) {
        const bool has = h * WGS + i < recalled_tiles;
        if (has) {
          await(layout::K_FULL, at);
          await(layout::V_FULL, at);
        }
        if (i == group) {
          const unsigned char *tile = shared + layout::RING + at.stage * layout::STAGE_BYTES;
#pragma unroll
          for (int half = 0; half < 2; half++)
            finish_row<T>(g.mixing, end[half], DP, half, o[h], state[h].from[half] * scale.factor, state[h].sum[half],
                          [&](int j) {
                            return *reinterpret_cast<const float2 *>(
                                tile + recalled_offset<DP>(warp * 16 + lane / 4 + half * 8, j * 2 + lane % 4 / 2) +
                                lane % 2 * 8);
                          });
        }
        if (has) {
          __syncwarp();
          release(layout::K_EMPTY, at);
          release(layout::V_EMPTY, at);
          at.advance();
        }
      }
    }
  }
}

#endif

/* Compiled for other chips the kernel is empty, and its launch bound of one warp says so. */
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool WGMMA_EMPTY = true;
#else
constexpr bool WGMMA_EMPTY = false;
#endif

template <typename T, int DP, int WGS, int SUBS>
__global__ void __launch_bounds__(WGMMA_EMPTY ? 32 : wgmma_layout<DP, WGS, SUBS>::THREADS,
                                  WGMMA_EMPTY ? 1 : wgmma_layout<DP, WGS, SUBS>::BLOCKS)
    attend_wgmma_kernel(const __grid_constant__ lola_device_segment g, const logit_scale scale, int parts,
                        int row_tiles, int64_t items, int beside) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using layout = wgmma_layout<DP, WGS, SUBS>;
  extern __shared__ __align__(1024) unsigned char shared[];
  if (threadIdx.x == 0) {
    const uint32_t base = shared_address(shared);
    for (int stage = 0; stage < layout::STAGES; stage++) {
      barrier_init(base + layout::K_FULL + 8 * stage, 128);
      barrier_init(base + layout::V_FULL + 8 * stage, 128);
      barrier_init(base + layout::K_EMPTY + 8 * stage, 4 * WGS);
      barrier_init(base + layout::V_EMPTY + 8 * stage, 4 * WGS);
    }
    barrier_init(base + layout::Q_FULL, 128 + 1);
    barrier_init(base + layout::Q_EMPTY, 4 * WGS);
  }
  if (beside) lola_device_begin(beside);
  __syncthreads();
  if (threadIdx.x / 128 == WGS) {
    give_registers<layout::PRODUCER_REGISTERS>();
    wgmma_produce<DP, WGS, SUBS>(g, parts, row_tiles, items, shared);
  } else {
    take_registers<layout::CONSUMER_REGISTERS>();
    wgmma_consume<T, DP, WGS, SUBS>(g, scale, shared);
  }
  lola_device_end(beside);
#endif
}

} // namespace

#endif
