/* attend on Hopper's warpgroup matrices: FlashAttention-3's loop over gathered pairs (arXiv 2407.08608).
 *
 * A block of threads stays on its multiprocessor and works through query blocks. One warpgroup, the producer, looks up
 * where pairs lie and copies their keys and values into a ring of STAGES tiles of 64 pairs, ahead of the others and
 * across query blocks. WGS consumers hold 64 rows (token, head) each: S = Q K^T with Q in registers, O += P V with P in
 * registers, the next tile's logits computed while this one's values are summed. Row i is head i % rs of token i / rs.
 * D = Dv = DP. Copies are in no order with wgmma's reads by themselves, hence the fence after each barrier. */
#ifndef LOLA_CUDA_ATTEND_WGMMA_CUH
#define LOLA_CUDA_ATTEND_WGMMA_CUH

#include "attend_block.cuh"

namespace {

constexpr int WGMMA_PAIRS = 64;

/* What the producer tells the consumers about a query block. */
struct wgmma_item {
  block_end end;
  int first_row, rows; /* the part of the block's rows */
  int seen, tiles;     /* pairs that the block's first token sees; tiles of pairs */
  bool stop;           /* no more */
};

template <int DP, int WGS> struct wgmma_layout {
  static constexpr int THREADS = 128 * (WGS + 1), BLOCKS = WGS == 1 ? 2 : 1, M = 64 * WGS;
  static constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = WGS == 1 ? 200 : 224;
  static_assert(BLOCKS * 128 * (WGS * CONSUMER_REGISTERS + PRODUCER_REGISTERS) <= 65536);
  static constexpr int STAGES = DP == 128 ? (WGS == 1 ? 3 : 5) : (WGS == 1 ? 5 : 8);
  /* Two consumers queue their products in turn, so that one's softmax runs beside the other's products. */
  static constexpr bool TURNS = WGS == 2;
  static constexpr int TILE_BYTES = WGMMA_PAIRS * DP * 2;
  static constexpr int K = M * DP * 2, V = K + STAGES * TILE_BYTES, BARRIERS = V + STAGES * TILE_BYTES;
  /* Barriers of 8 bytes: keys, values and queries have come, and their places are free. */
  static constexpr int K_FULL = BARRIERS, V_FULL = K_FULL + 8 * STAGES, K_EMPTY = V_FULL + 8 * STAGES,
                       V_EMPTY = K_EMPTY + 8 * STAGES, Q_FULL = V_EMPTY + 8 * STAGES, Q_EMPTY = Q_FULL + 8;
  static constexpr int ITEM = Q_EMPTY + 8, PLACES = ITEM + static_cast<int>(sizeof(wgmma_item));
  static constexpr int BYTES = PLACES + 4 * static_cast<int>(sizeof(pair_places));
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

template <int DP, int WGS>
__device__ __forceinline__ void wgmma_produce(const lola_device_segment &g, int parts, int row_tiles, int64_t items,
                                              unsigned char *shared) {
  using layout = wgmma_layout<DP, WGS>;
  constexpr int M = layout::M, PIECES = DP / 8, ROWS = 32 / PIECES; /* rows that a warp copies at once */
  const uint32_t base = shared_address(shared);
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, piece = lane % PIECES;
  pair_places &places = reinterpret_cast<pair_places *>(shared + layout::PLACES)[warp];
  wgmma_item *mailbox = reinterpret_cast<wgmma_item *>(shared + layout::ITEM);
  ring_place<layout::STAGES> at;
  uint32_t q_parity = 1;
  for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
    int left = static_cast<int>(index);
    const int first_row = left % row_tiles * M;
    left /= row_tiles;
    const int part = left % parts;
    left /= parts;
    const int set = left % g.S, record = left / g.S;
    query_block block;
    if (!open_block(g, record, set, part, &block) || first_row >= block.tokens * g.rs) continue;
    const lola_device_span &span = g.spans[block.row];
    const int rows = min(block.tokens * g.rs - first_row, M);
    const int pairs = block.seen + (first_row + rows - 1) / g.rs;
    const int tiles = (pairs + WGMMA_PAIRS - 1) / WGMMA_PAIRS;

    __syncwarp();
    if (lane == 0) place_pairs(g, block, &places);
    __syncwarp();
    /* Warp w copies pairs 16 w .. 16 w + 15 of each tile; the lanes below 16 look up keys, the others values. */
    const int pair = warp * 16 + lane % 16;
    int code = pair_code(places, min(pair, pairs - 1));

    barrier_wait(base + layout::Q_EMPTY, q_parity);
    q_parity ^= 1;
    for (int i = thread; i < M * PIECES; i += 128) {
      const int row = i / PIECES, token = (first_row + row) / g.rs, head = (first_row + row) % g.rs;
      if (row < rows)
        cp_async(base + tile_offset(M, row, i % PIECES),
                 lola_device_at(g.q, span.batch, span.first + block.first + token, set * g.rs + head) +
                     i % PIECES * 16);
    }
    barrier_arrive_after_copies(base + layout::Q_FULL);
    if (thread == 0) {
      *mailbox = wgmma_item{end_of(g, block), first_row, rows, block.seen, tiles, false};
      barrier_arrive(base + layout::Q_FULL);
    }

    for (int tile = 0; tile < tiles; tile++, at.advance()) {
      const char *mine = lane < 16 ? pair_key(places, code) : pair_value(places, code);
      if (tile + 1 < tiles) code = pair_code(places, min((tile + 1) * WGMMA_PAIRS + pair, pairs - 1));
#pragma unroll
      for (int values = 0; values < 2; values++) {
        const uint32_t target = base + (values ? layout::V : layout::K) + at.stage * layout::TILE_BYTES;
        barrier_wait(base + (values ? layout::V_EMPTY : layout::K_EMPTY) + 8 * at.stage, at.parity ^ 1);
#pragma unroll
        for (int i = 0; i < 16 / ROWS; i++) {
          const int row = i * ROWS + lane / PIECES;
          const char *from = reinterpret_cast<const char *>(
              __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(mine), values * 16 + row));
          cp_async(target + tile_offset(WGMMA_PAIRS, warp * 16 + row, piece), from + piece * 16);
        }
        barrier_arrive_after_copies(base + (values ? layout::V_FULL : layout::K_FULL) + 8 * at.stage);
      }
    }

    /* What the consumers will need of the linear term at their end. */
    if (g.mixing != LOLA_MIXING_CACHE_ONLY && thread < rows) {
      const int token = (first_row + thread) / g.rs, head = set * g.rs + (first_row + thread) % g.rs;
      const float *recalled =
          g.recalled + ((static_cast<int64_t>(span.token) + block.first + token) * g.Hq + head) * DP;
#pragma unroll
      for (int i = 0; i < DP; i += 32) prefetch_l2(recalled + i);
    }
  }
  barrier_wait(base + layout::Q_EMPTY, q_parity);
  if (thread == 0) {
    mailbox->stop = true;
    barrier_arrive(base + layout::Q_FULL);
  }
  barrier_arrive(base + layout::Q_FULL);
}

template <typename T, int DP, int WGS>
__device__ __forceinline__ void wgmma_consume(const lola_device_segment &g, const logit_scale &scale,
                                              const unsigned char *shared) {
  using layout = wgmma_layout<DP, WGS>;
  constexpr int M = layout::M, N = WGMMA_PAIRS / 8, PANEL = WGMMA_PAIRS * 128;
  const uint32_t base = shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32; /* the rows of warp w are 16 w .. 16 w + 15 */
  const wgmma_item *mailbox = reinterpret_cast<const wgmma_item *>(shared + layout::ITEM);
  const uint64_t keys = wgmma_descriptor(base + layout::K, 16),
                 values = wgmma_descriptor(base + layout::V, PANEL); /* of stage 0 */
  constexpr int STAGE = layout::TILE_BYTES / 16;
  ring_place<layout::STAGES> at;
  if (layout::TURNS && warp / 4 == 1) named_barrier_arrive(1, 256); /* the first turn is warpgroup 0's */
  for (uint32_t q_parity = 0;; q_parity ^= 1) {
    barrier_wait(base + layout::Q_FULL, q_parity);
    const wgmma_item item = *mailbox;
    if (item.stop) break;
    uint32_t q[DP / 16][4];
#pragma unroll
    for (int k = 0; k < DP / 16; k++) {
      ldmatrix(q[k], base + tile_offset(M, warp * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; i++) q[k][i] = (q[k][i] & scale.keep) ^ scale.flip;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(base + layout::Q_EMPTY);

    /* This lane's rows: 16 w + lane / 4 and 8 more. A row without a query sees what the last one sees. */
    int seen[2];
#pragma unroll
    for (int half = 0; half < 2; half++)
      seen[half] =
          item.seen + (item.first_row + min(warp * 16 + lane / 4 + half * 8, item.rows - 1)) / g.rs - 2 * (lane % 4);
    const int seen_by_all = item.seen + (item.first_row + min(warp * 16, item.rows - 1)) / g.rs;

    float o[DP / 8][4] = {}, s[N][4], m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, alpha[2];
    uint32_t p[N / 2][4];
    const auto queue_logits = [&](const ring_place<layout::STAGES> &from) {
      pin(s);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < DP / 16; k++)
        wgmma<T, 0>(s, q[k], keys + from.stage * STAGE + (k / 4 * PANEL + k % 4 * 32) / 16, k > 0);
      wgmma_commit();
    };
    const auto queue_sums = [&](const ring_place<layout::STAGES> &from) {
      pin(o);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < N / 2; k++) wgmma<T, 1>(o, p[k], values + from.stage * STAGE + k * 16 * 128 / 16, 1);
      wgmma_commit();
    };
    const auto exponentials = [&](int tile) {
      const bool masked = (tile + 1) * WGMMA_PAIRS > seen_by_all;
#pragma unroll
      for (int half = 0; half < 2; half++)
        alpha[half] = softmax_row(s, half, masked, seen[half] - tile * WGMMA_PAIRS, scale.factor, &m[half], &l[half]);
    };
    const auto pack_exponentials = [&]() {
#pragma unroll
      for (int k = 0; k < N / 2; k++) {
        p[k][0] = pack<T>(s[2 * k][0], s[2 * k][1]);
        p[k][1] = pack<T>(s[2 * k][2], s[2 * k][3]);
        p[k][2] = pack<T>(s[2 * k + 1][0], s[2 * k + 1][1]);
        p[k][3] = pack<T>(s[2 * k + 1][2], s[2 * k + 1][3]);
      }
    };

    const auto await = [&](int barriers, const ring_place<layout::STAGES> &from) {
      barrier_wait(base + barriers + 8 * from.stage, from.parity);
    };
    const auto release = [&](int barriers, const ring_place<layout::STAGES> &from) {
      if (lane == 0) barrier_arrive(base + barriers + 8 * from.stage);
    };

    await(layout::K_FULL, at);
    fence_async_proxy();
    queue_logits(at);
    wgmma_wait<0>();
    pin(s);
    release(layout::K_EMPTY, at);
    exponentials(0);
    pack_exponentials();
    for (int tile = 1; tile < item.tiles; tile++) {
      const ring_place<layout::STAGES> before = at;
      at.advance();
      await(layout::V_FULL, before);
      await(layout::K_FULL, at);
      fence_async_proxy();
      if (layout::TURNS) named_barrier_sync(1 + warp / 4, 256);
      queue_logits(at);
      queue_sums(before);
      if (layout::TURNS) named_barrier_arrive(2 - warp / 4, 256);
      wgmma_wait<1>();
      pin(s);
      release(layout::K_EMPTY, at);
      exponentials(tile);
      pin(s); /* all of it while the tensor cores work */
      wgmma_wait<0>();
      pin(o);
      release(layout::V_EMPTY, before);
#pragma unroll
      for (int j = 0; j < DP / 8; j++) {
        o[j][0] *= alpha[0];
        o[j][1] *= alpha[0];
        o[j][2] *= alpha[1];
        o[j][3] *= alpha[1];
      }
      pack_exponentials();
    }
    await(layout::V_FULL, at);
    fence_async_proxy();
    queue_sums(at);
    row_end end[2];
    float2 n[2][DP / 8];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = warp * 16 + lane / 4 + half * 8;
      end[half] = end_of_row(g, item.end, item.first_row + row, row < item.rows);
      load_recalled(end[half], DP, n[half]);
    }
    wgmma_wait<0>();
    pin(o);
    release(layout::V_EMPTY, at);
    at.advance();
#pragma unroll
    for (int half = 0; half < 2; half++)
      finish_row<T>(g.mixing, end[half], DP, half, o, n[half], m[half] * scale.factor, l[half]);
  }
}

#endif

/* Compiled for other chips the kernel is empty, and its launch bound of one warp says so. */
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool WGMMA_EMPTY = true;
#else
constexpr bool WGMMA_EMPTY = false;
#endif

template <typename T, int DP, int WGS>
__global__ void __launch_bounds__(WGMMA_EMPTY ? 32 : wgmma_layout<DP, WGS>::THREADS,
                                  WGMMA_EMPTY ? 1 : wgmma_layout<DP, WGS>::BLOCKS)
    attend_wgmma_kernel(const __grid_constant__ lola_device_segment g, const logit_scale scale, int parts,
                        int row_tiles, int64_t items) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using layout = wgmma_layout<DP, WGS>;
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
  __syncthreads();
  if (threadIdx.x / 128 == WGS) {
    give_registers<layout::PRODUCER_REGISTERS>();
    wgmma_produce<DP, WGS>(g, parts, row_tiles, items, shared);
  } else {
    take_registers<layout::CONSUMER_REGISTERS>();
    wgmma_consume<T, DP, WGS>(g, scale, shared);
  }
#endif
}

} // namespace

#endif
