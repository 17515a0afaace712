/* attend on tensor cores, sm_80 and later: FlashAttention-2's loop over gathered pairs.
 *
 * A block of 4 warps holds 64 MT rows (token, head) of a query block and reads its pairs BN at a time: keys and values
 * of the next tile come by cp_async while this one is worked on, and the addresses of the tile after that are looked
 * up. S = Q K^T and O += P V are mma.sync with float32 sums; P never leaves the registers. Sizes below DP are padded
 * with zero columns. Row i of a block is head i % rs of token i / rs. */
#ifndef LOLA_CUDA_ATTEND_MMA_CUH
#define LOLA_CUDA_ATTEND_MMA_CUH

#include "attend_block.cuh"

namespace {

constexpr int MMA_THREADS = 128;

struct pair_address {
  const char *key, *value;
};

template <int DP, int MT, int BN> struct mma_layout {
  static constexpr int M = 64 * MT, Q_BYTES = M * DP * 2, TILE_BYTES = BN * DP * 2;
  /* Queries that fit the registers pass through the place of the second tile of keys. */
  static constexpr bool HELD = MT == 1 && DP <= 128;
  static_assert(!HELD || Q_BYTES == TILE_BYTES);
  static constexpr int K = HELD ? 0 : Q_BYTES, Q = HELD ? K + TILE_BYTES : 0;
  static constexpr int V = K + 2 * TILE_BYTES, ADDRESSES = V + 2 * TILE_BYTES;
  static constexpr int PLACES = ADDRESSES + 2 * BN * static_cast<int>(sizeof(pair_address));
  static constexpr int BYTES = PLACES + static_cast<int>(sizeof(pair_places));
};

template <int DP, int BN>
__device__ __forceinline__ void copy_tile(const pair_address *addresses, uint32_t keys, uint32_t values, int D,
                                          int Dv) {
  constexpr int PIECES = DP / 8, STEP = MMA_THREADS / PIECES;
  const int piece = threadIdx.x % PIECES, first = threadIdx.x / PIECES;
#pragma unroll
  for (int i = 0; i < BN / STEP; i++) {
    int row = first + i * STEP;
    if (piece * 8 < D) cp_async(keys + tile_offset(BN, row, piece), addresses[row].key + piece * 16);
    if (piece * 8 < Dv) cp_async(values + tile_offset(BN, row, piece), addresses[row].value + piece * 16);
  }
}

/* Rows first .. of the block's queries, zeros where there are none. */
template <int DP, int M>
__device__ __forceinline__ void load_queries(const lola_device_segment &g, const lola_device_span &span,
                                             const query_block &block, int first, const logit_scale &scale,
                                             unsigned char *tile) {
  constexpr int PIECES = DP / 8;
  for (int i = threadIdx.x; i < M * PIECES; i += MMA_THREADS) {
    int row = i / PIECES, piece = i % PIECES, token = (first + row) / g.rs, head = (first + row) % g.rs;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (token < block.tokens && piece * 8 < g.D) {
      const char *from =
          lola_device_at(g.q, span.batch, span.first + block.first + token, block.set * g.rs + head) + piece * 16;
      if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        x = *reinterpret_cast<const uint4 *>(from);
      } else {
        const uint16_t *e = reinterpret_cast<const uint16_t *>(from);
        x = make_uint4(e[0] | static_cast<uint32_t>(e[1]) << 16, e[2] | static_cast<uint32_t>(e[3]) << 16,
                       e[4] | static_cast<uint32_t>(e[5]) << 16, e[6] | static_cast<uint32_t>(e[7]) << 16);
      }
      x.x = (x.x & scale.keep) ^ scale.flip;
      x.y = (x.y & scale.keep) ^ scale.flip;
      x.z = (x.z & scale.keep) ^ scale.flip;
      x.w = (x.w & scale.keep) ^ scale.flip;
    }
    *reinterpret_cast<uint4 *>(tile + tile_offset(M, row, piece)) = x;
  }
}

template <typename T, int DP, int MT, int BN, int BLOCKS>
__global__ void __launch_bounds__(MMA_THREADS, BLOCKS)
    attend_mma_kernel(const __grid_constant__ lola_device_segment g, const logit_scale scale, int parts, int tiles,
                      int beside) {
  using layout = mma_layout<DP, MT, BN>;
  constexpr int M = layout::M;
  constexpr bool HELD = layout::HELD;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, thread = threadIdx.x;
  if (beside) lola_device_begin(beside);
  int index = blockIdx.x;
  const int first_row = index % tiles * M;
  index /= tiles;
  const int part = index % parts;
  index /= parts;
  const int set = index % g.S, record = index / g.S;
  query_block block;
  if (!open_block(g, record, set, part, &block) || first_row >= block.tokens * g.rs) return lola_device_end(beside);
  const lola_device_span &span = g.spans[block.row];

  const uint32_t base = shared_address(shared);
  pair_address *addresses = reinterpret_cast<pair_address *>(shared + layout::ADDRESSES);
  pair_places &places = *reinterpret_cast<pair_places *>(shared + layout::PLACES);
  const int rows = min(block.tokens * g.rs - first_row, M);
  const int pairs = block.seen + (first_row + rows - 1) / g.rs, count = (pairs + BN - 1) / BN;
  if (thread == 0) place_pairs(g, block, &places);
  load_queries<DP, M>(g, span, block, first_row, scale, shared + layout::Q);
  if (g.D < DP || g.Dv < DP) /* columns that no copy reaches; those in the place of the queries are zero already */
    for (int i = thread; i < 4 * layout::TILE_BYTES / 16; i += MMA_THREADS)
      if (!HELD || i * 16 / layout::TILE_BYTES != 1)
        reinterpret_cast<uint4 *>(shared + layout::K)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  /* Pairs past the end repeat the last one, and are masked. */
  for (int i = thread; i < 2 * BN; i += MMA_THREADS) {
    int code = pair_code(places, min(i, pairs - 1));
    addresses[i] = pair_address{pair_key(places, code), pair_value(places, code)};
  }

  /* This lane's rows: warp_row + 16 t + lane / 4 and 8 more. A row without a query sees what the last one sees. */
  const int warp_row = warp * 16 * MT;
  int seen[MT][2];
#pragma unroll
  for (int t = 0; t < MT; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = min(warp_row + t * 16 + lane / 4 + half * 8, rows - 1);
      seen[t][half] = block.seen + (first_row + row) / g.rs - 2 * (lane % 4);
    }
  const int seen_by_all = block.seen + (first_row + min(warp_row, rows - 1)) / g.rs;

  uint32_t q[HELD ? DP / 16 : 1][4];
  if constexpr (HELD) {
#pragma unroll
    for (int k = 0; k < DP / 16; k++)
      ldmatrix(q[k], base + layout::Q + tile_offset(M, warp_row + lane % 16, k * 2 + lane / 16));
  }
  float o[MT][DP / 8][4] = {}, m[MT][2], l[MT][2];
#pragma unroll
  for (int t = 0; t < MT; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      m[t][half] = -INFINITY;
      l[t][half] = 0;
    }
  __syncthreads();
  copy_tile<DP, BN>(addresses, base + layout::K, base + layout::V, g.D, g.Dv);
  cp_async_commit();

  for (int tile = 0; tile < count; tile++) {
    const uint32_t keys = base + layout::K + tile % 2 * layout::TILE_BYTES,
                   values = base + layout::V + tile % 2 * layout::TILE_BYTES;
    cp_async_wait<0>();
    __syncthreads(); /* this tile has come; nobody reads the one before it any more */
    if (tile + 1 < count) {
      int next = (tile + 1) % 2;
      copy_tile<DP, BN>(addresses + next * BN, base + layout::K + next * layout::TILE_BYTES,
                        base + layout::V + next * layout::TILE_BYTES, g.D, g.Dv);
      cp_async_commit();
    }
    int code = 0;
    if (thread < BN && tile + 2 < count) code = pair_code(places, min((tile + 2) * BN + thread, pairs - 1));

    float s[MT][BN / 8][4] = {};
#pragma unroll
    for (int k = 0; k < DP / 16; k++) {
      uint32_t a[MT][4];
#pragma unroll
      for (int t = 0; t < MT; t++) {
        if constexpr (HELD) {
#pragma unroll
          for (int i = 0; i < 4; i++) a[t][i] = q[k][i];
        } else {
          ldmatrix(a[t], base + layout::Q + tile_offset(M, warp_row + t * 16 + lane % 16, k * 2 + lane / 16));
        }
      }
#pragma unroll
      for (int j = 0; j < BN / 16; j++) {
        uint32_t b[4];
        ldmatrix(b, keys + tile_offset(BN, j * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
        for (int t = 0; t < MT; t++) {
          mma<T>(s[t][2 * j], a[t], b[0], b[1]);
          mma<T>(s[t][2 * j + 1], a[t], b[2], b[3]);
        }
      }
    }

    const bool masked = (tile + 1) * BN > seen_by_all;
#pragma unroll
    for (int t = 0; t < MT; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float alpha =
            softmax_row(s[t], half, masked, seen[t][half] - tile * BN, scale.factor, &m[t][half], &l[t][half]);
#pragma unroll
        for (int j = 0; j < DP / 8; j++) {
          o[t][j][half * 2] *= alpha;
          o[t][j][half * 2 + 1] *= alpha;
        }
      }

#pragma unroll
    for (int k = 0; k < BN / 16; k++) {
      uint32_t a[MT][4];
#pragma unroll
      for (int t = 0; t < MT; t++) {
        a[t][0] = pack<T>(s[t][2 * k][0], s[t][2 * k][1]);
        a[t][1] = pack<T>(s[t][2 * k][2], s[t][2 * k][3]);
        a[t][2] = pack<T>(s[t][2 * k + 1][0], s[t][2 * k + 1][1]);
        a[t][3] = pack<T>(s[t][2 * k + 1][2], s[t][2 * k + 1][3]);
      }
#pragma unroll
      for (int j = 0; j < DP / 16; j++) {
        uint32_t b[4];
        ldmatrix_transposed(b, values + tile_offset(BN, k * 16 + lane % 16, j * 2 + lane / 16));
#pragma unroll
        for (int t = 0; t < MT; t++) {
          mma<T>(o[t][2 * j], a[t], b[0], b[1]);
          mma<T>(o[t][2 * j + 1], a[t], b[2], b[3]);
        }
      }
    }
    /* In the place of this tile's addresses, which nobody has read since the tile before. */
    if (thread < BN && tile + 2 < count)
      addresses[tile % 2 * BN + thread] = pair_address{pair_key(places, code), pair_value(places, code)};
  }

  const block_end end = end_of(g, block);
#pragma unroll
  for (int t = 0; t < MT; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = warp_row + t * 16 + lane / 4 + half * 8;
      const row_end own = end_of_row(g, end, first_row + row, row < rows);
      finish_row<T>(g.mixing, own, g.Dv, half, o[t], m[t][half] * scale.factor, l[t][half],
                    [&](int j) { return *reinterpret_cast<const float2 *>(own.recalled + j * 8 + lane % 4 * 2); });
    }
  lola_device_end(beside);
}

} // namespace

#endif
