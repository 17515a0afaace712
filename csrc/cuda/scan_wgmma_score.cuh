/* Of scan_wgmma.cuh, what multiplies by H: pairs that come in, the state in registers and its halves in shared memory,
 * the errors of pairs, and phi(q)^T H. */
#ifndef LOLA_CUDA_SCAN_WGMMA_SCORE_CUH
#define LOLA_CUDA_SCAN_WGMMA_SCORE_CUH

#include "cuda/scan_wgmma_block.cuh"

namespace {
namespace wgmma_scan {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* --- pairs that come in ------------------------------------------------------------------------------------------- */

/* A pair's phi into a row, by threads that take a piece each; finish with cp_async_wait_all. */
template <typename T>
__device__ __forceinline__ void fetch_phi(const lola_device_segment &g, const cluster_plan &plan, const char *from,
                                          int row, int piece) {
  const int at = phi_at(plan, row, piece);
  if constexpr (T::vector) {
    if (8 * piece < g.F) cp_async(shared_address(wgmma_memory + at), from + 16 * piece);
  } else {
    piece_at(at) = load_chunk<false>(from, 8 * piece, g.F);
  }
}

/* Up to 64 pairs that leave the window, on their way in a helper's registers. */
template <typename T> struct newcomer_pieces {
  static constexpr int phi_step = HELPERS / T::phi_pieces, value_step = HELPERS / T::value_pieces; /* rows at once */
  uint4 phi[TILE / phi_step], values[TILE / value_step];
};

/* Asks for a piece of each of the pairs `code` + first, `code` + first + step, ...: of phi (`which` = 0) or of the
 * values, 8 elements from element `column` on of those that begin `offset` bytes into a row and are `columns`. */
template <typename T, int N>
__device__ __forceinline__ void ask_pieces(const lola_device_segment &g, const scan_unit &unit, int which, int code,
                                           int first, int step, int offset, int column, int columns,
                                           uint4 (&pieces)[N]) {
  const int C = static_cast<int>(g.C), R = static_cast<int>(g.R);
  if (code >= R) { /* tokens of the call, as most are */
    const row_source &source = unit.sources[which][2];
    const char *row = source.data + (code - R + first) * source.stride + offset;
#pragma unroll
    for (int i = 0; i < N; i++, row += step * source.stride)
      if (first + i * step < C) pieces[i] = load_chunk<T::vector>(row, column, columns);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int j = first + i * step;
    if (j < C) pieces[i] = load_chunk<T::vector>(row_of(g, unit, which, code + j) + offset, column, columns);
  }
}

/* Asks for the pairs that leave when a chunk begins, `code` and those behind it, from the `first` of them on; nothing
 * if the chunk has no update. */
template <typename T>
__device__ __forceinline__ void ask_newcomers(const lola_device_segment &g, const block_place &block,
                                              const scan_unit &unit, int code, int first, bool updates,
                                              newcomer_pieces<T> *pieces) {
  const int helper = own_thread() - WALKERS, begin = block.column_block * COLUMNS;
  *pieces = {}; /* so that nothing of the last ones is kept in registers */
  if (!unit.folds || !updates) return;
  ask_pieces<T>(g, unit, 0, code, first + helper / T::phi_pieces, newcomer_pieces<T>::phi_step, 0,
                helper % T::phi_pieces * 8, g.F, pieces->phi);
  ask_pieces<T>(g, unit, 1, code, first + helper / T::value_pieces, newcomer_pieces<T>::value_step, begin * 2,
                helper % T::value_pieces * 8, g.Dv - begin, pieces->values);
}

/* Puts them into the newcomers' rows. */
template <typename T>
__device__ __forceinline__ void put_newcomers(const lola_device_segment &g, const cluster_plan &plan,
                                              const block_place &block, const scan_unit &unit, const tables &t,
                                              int code, int first, const newcomer_pieces<T> &pieces) {
  const int helper = own_thread() - WALKERS, C = static_cast<int>(g.C);
  constexpr int phi_step = newcomer_pieces<T>::phi_step, value_step = newcomer_pieces<T>::value_step;
  if (unit.folds) {
#pragma unroll
    for (int i = 0; i < TILE / phi_step; i++) {
      const int j = first + helper / T::phi_pieces + i * phi_step;
      if (j < C) piece_at(phi_at(plan, plan.slots + j, helper % T::phi_pieces)) = pieces.phi[i];
    }
#pragma unroll
    for (int i = 0; i < TILE / value_step; i++) {
      const int j = first + helper / T::value_pieces + i * value_step;
      if (j < C) put_values<T>(plan, j, helper % T::value_pieces, pieces.values[i]);
    }
  }
  const int j = first + helper;
  if (helper < TILE && j < C) {
    t.code[plan.slots + j] = code + j;
    t.value[plan.slots + j] = row_of(g, unit, 1, code + j) + block.column_block * COLUMNS * 2;
  }
}

/* --- the state in registers --------------------------------------------------------------------------------------- */

/* Warpgroup w keeps rows 64 w .. 64 w + 63 of H as the fragments of a fold lie: h[i][2 half + e] is row 64 w + 16 (warp
 * % 4) + 8 half + lane / 4; i, lane % 4 and e say the column, dealt out. */
typedef float hidden_part[8][4];

/* The first of the 8 neighbouring columns that lane `c` of a quad has in products 4 q .. 4 q + 3. */
__device__ __forceinline__ int column_of(int q, int c) { return 32 * q + 8 * c; }

__device__ __forceinline__ int hidden_row(int half) {
  return own_thread() / 32 * 16 + 8 * half + own_thread() % 32 / 4;
}

template <typename T> __device__ __forceinline__ bool has_state() { return own_warpgroup() < T::panels; }

/* The halves of H, by the warps that keep it. */
__device__ __forceinline__ void store_halves(const cluster_plan &plan, const hidden_part &h) {
  const int lane = own_thread() % 32, warp = own_thread() / 32;
  const int row = lane % 8 + lane / 16 * 8, piece = 2 * warp + lane / 8 % 2; /* of columns 16 i .. 16 i + 15 */
  const uint32_t at = shared_address(wgmma_memory) + half_at(plan, row, piece);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    unsigned hi[4], lo[4];
#pragma unroll
    for (int m = 0; m < 4; m++) lola_split_pair(h[i + m / 2][m % 2 * 2], h[i + m / 2][m % 2 * 2 + 1], &hi[m], &lo[m]);
    store_transposed(at + 8 * i * ROW, hi); /* whole groups of 8 rows on, which are swizzled alike */
    store_transposed(at + (LOW_ROW + 8 * i) * ROW, lo);
  }
}

/* The halves of s at features 2 i and 2 i + 1, four times, so that every lane of a quad has phi^T s among its products.
 */
__device__ __forceinline__ void store_normalizer(const cluster_plan &plan, int i, float x, float y) {
  unsigned hi, lo;
  lola_split_pair(x, y, &hi, &lo);
#pragma unroll
  for (int n = NORMALIZER_ROW; n < LOW_ROW; n += 2) {
    word_at(half_at(plan, n, i / 4) + i % 4 * 4) = hi;
    word_at(half_at(plan, n + 1, i / 4) + i % 4 * 4) = lo;
  }
}

/* Calls visit(i, half, place, count) for fours of elements, h[i][2 half], h[i][2 half + 1] and those of i + 1, the
 * first `count` of which are H's: with the place of the first among the head's F x Dv, the others follow it. `count` is
 * 4 for kinds that read 16 bytes at a time. */
template <typename T, class Visit>
__device__ __forceinline__ void for_each_hidden(const lola_device_segment &g, const block_place &block, Visit visit) {
  const int c = own_thread() % 4, first = block.column_block * COLUMNS;
  if (!has_state<T>()) return;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int row = hidden_row(half), column = first + column_of(i / 4, c) + i % 4 * 2;
      const int count = T::vector ? 4 : min(g.Dv - column, 4);
      if (row < g.F && column < g.Dv) visit(i, half, static_cast<int64_t>(row) * g.Dv + column, count);
    }
}

/* The part of H at `hidden`, the head's; it is zero before. */
template <typename T>
__device__ __forceinline__ void load_hidden(const lola_device_segment &g, const block_place &block, const float *hidden,
                                            hidden_part *h) {
  for_each_hidden<T>(g, block, [&](int i, int half, int64_t place, int count) {
    float four[4] = {0, 0, 0, 0};
    if constexpr (T::vector) {
      const float4 x = *reinterpret_cast<const float4 *>(hidden + place);
      four[0] = x.x, four[1] = x.y, four[2] = x.z, four[3] = x.w;
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (e < count) four[e] = hidden[place + e];
    }
#pragma unroll
    for (int e = 0; e < 4; e++) (*h)[i + e / 2][2 * half + e % 2] = four[e];
  });
}

template <typename T>
__device__ __forceinline__ void store_hidden(const lola_device_segment &g, const block_place &block,
                                             const hidden_part &h, float *hidden) {
  for_each_hidden<T>(g, block, [&](int i, int half, int64_t place, int count) {
    if constexpr (T::vector) {
      *reinterpret_cast<float4 *>(hidden + place) =
          make_float4(h[i][2 * half], h[i][2 * half + 1], h[i + 1][2 * half], h[i + 1][2 * half + 1]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (e < count) hidden[place + e] = h[i + e / 2][2 * half + e % 2];
    }
  });
}

/* h is zero before. */
template <typename T>
__device__ void load_state(const lola_device_segment &g, const cluster_plan &plan, const block_place &block,
                           const scan_unit &unit, const tables &t, hidden_part *h) {
  const int64_t at = static_cast<int64_t>(unit.row) * g.Hq + unit.head;
  const float *H = g.hidden + at * g.F * g.Dv, *s = g.normalizer + at * g.F;
  load_hidden<T>(g, block, H, h);
  if (has_state<T>()) store_halves(plan, *h);
  for (int i = own_thread(); i < 32 * T::panels; i += WALKERS) {
    const float x = 2 * i < g.F ? s[2 * i] : 0, y = 2 * i + 1 < g.F ? s[2 * i + 1] : 0;
    t.normalizer[2 * i] = x;
    t.normalizer[2 * i + 1] = y;
    store_normalizer(plan, i, x, y);
  }
}

template <typename T>
__device__ void store_state(const lola_device_segment &g, const block_place &block, const scan_unit &unit,
                            const tables &t, const hidden_part &h) {
  const int64_t at = static_cast<int64_t>(unit.row) * g.Hq + unit.head;
  float *H = g.hidden + at * g.F * g.Dv, *s = g.normalizer + at * g.F;
  store_hidden<T>(g, block, h, H);
#pragma unroll 1
  for (int f = own_thread(); !block.column_block && f < g.F; f += WALKERS) s[f] = t.normalizer[f];
}

/* --- score -------------------------------------------------------------------------------------------------------- */

/* The thread's row of a tile, the other is 8 rows on. */
__device__ __forceinline__ int tile_row(int first_row) {
  const int thread = own_thread();
  return first_row + thread % 128 / 32 * 16 + thread % 32 / 4;
}

/* Asks for acc = the tile's rows of phi, or fragments of others, times [H, s]. `multiply` takes 16 features. */
template <typename T, class Multiply>
__device__ __forceinline__ void multiply_state(const cluster_plan &plan, float (&acc)[PRODUCTS][4], Multiply multiply) {
  uint32_t halves = wgmma_matrix(shared_address(wgmma_memory) + plan.halves, 16);
  asm volatile("" : "+r"(halves)); /* so that not each step's place is kept in a register of its own */
  pin(acc);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4 * T::panels; step++)
    multiply(step, halves + step / 4 * HALF_ROWS * (ROW / 16) + step % 4 * 2, step > 0);
  wgmma_commit();
}

/* phi^T s of the row whose products are in `acc`. */
__device__ __forceinline__ float normalizer_of(const float (&acc)[PRODUCTS][4], int half) {
  return acc[PRODUCTS - 1][2 * half] + acc[PRODUCTS - 1][2 * half + 1];
}

/* Of a thread's two rows of a tile, 16 columns each. */
struct row_values {
  uint4 v[2][2]; /* zeros past the last column */
};

/* Rows that are not aligned: apart, so that it takes no registers elsewhere. */
__device__ __noinline__ uint4 load_odd_chunk(const char *row, int column, int columns) {
  return load_chunk<false>(row, column, columns);
}

template <typename T>
__device__ __forceinline__ void ask_values(const tables &t, int row, int columns, row_values *values) {
  const char *from[2];
#pragma unroll
  for (int half = 0; half < 2; half++) from[half] = t.value[row + 8 * half];
#pragma unroll
  for (int q = 0; q < 2; q++) {
    const int column = column_of(q, own_thread() % 4);
    if (column < columns)
#pragma unroll
      for (int half = 0; half < 2; half++)
        values->v[half][q] =
            T::vector ? load_chunk<true>(from[half], column, columns) : load_odd_chunk(from[half], column, columns);
  }
}

/* 1 / (phi^T s) of a thread's two rows, or 0. It overflows for a z near the smallest float: there the row's products
 * are lifted first, as recall_scale has it. */
__device__ __forceinline__ void invert_normalizers(float (&acc)[PRODUCTS][4], float (&inverse)[2]) {
  float z[2] = {normalizer_of(acc, 0), normalizer_of(acc, 1)};
  const bool tiny[2] = {z[0] != 0 && z[0] < 1e-30f, z[1] != 0 && z[1] < 1e-30f};
  if (__any_sync(ALL, tiny[0] || tiny[1])) { /* hardly ever */
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float up = tiny[half] ? 0x1p64f : 1.0f;
      z[half] *= up;
#pragma unroll
      for (int i = 0; i < PRODUCTS - 1; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) acc[i][2 * half + e] *= up;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) inverse[half] = z[half] != 0 ? lola_reciprocal(z[half]) : 0;
}

/* The errors of a thread's two rows over its columns. */
template <typename T>
__device__ __forceinline__ void tile_errors(float (&acc)[PRODUCTS][4], const row_values &values, float (&error)[2]) {
  float inverse[2];
  invert_normalizers(acc, inverse);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint4 &a = values.v[half][0], &b = values.v[half][1];
    const unsigned pairs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    float sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float2 value = lola_widen<typename T::element>(pairs[i]);
      const float dx = fmaf(acc[i][2 * half], inverse[half], -value.x);
      const float dy = fmaf(acc[i][2 * half + 1], inverse[half], -value.y);
      sum[0] = fmaf(dx, dx, sum[0]);
      sum[1] = fmaf(dy, dy, sum[1]);
    }
    error[half] = sum[0] + sum[1];
  }
}

/* Adds up the errors of a quad's two rows and sends them to all blocks: the first row's to where it is at `at` in this
 * one, counted at the barrier `full`. */
__device__ __forceinline__ void send_errors(const cluster_plan &plan, const float (&error)[2], int at, uint32_t full) {
  const int c = own_thread() % 4;
  /* Lanes 0 and 2 then have the one row, 1 and 3 the other. */
  float sum = (c % 2 ? error[1] : error[0]) + __shfl_xor_sync(ALL, c % 2 ? error[0] : error[1], 1);
  sum += __shfl_xor_sync(ALL, sum, 2);
  const int own = at + c % 2 * 32;
  const uint32_t there = shared_address(wgmma_memory) + own;
  if (plan.blocks == 1) {
    if (c < 2) word_at(own) = __float_as_uint(sum);
  } else if (plan.blocks % 2 == 0) { /* the one lane sends to every other block, the other one to the rest */
#pragma unroll 4
    for (int rank = 0; rank < plan.blocks; rank += 2) send(there, full, rank + c / 2, sum);
  } else if (c < 2) {
#pragma unroll 1
    for (int rank = 0; rank < plan.blocks; rank++) send(there, full, rank, sum);
  }
}

/* All pairs: the errors over this block's columns, into every block's parts. The warpgroups take tiles in turn, the
 * newcomers' last; a tile is sent while the next one is multiplied. */
template <typename T>
__device__ __forceinline__ void score_pairs(const lola_device_segment &g, const cluster_plan &plan,
                                            const block_place &block, const tables &t, int count, uint32_t full,
                                            uint32_t newcomers, unsigned parity) {
  constexpr int TURN = WALKERS / 128;
  const int slot_tiles = uniform((count + TILE - 1) / TILE), tiles = slot_tiles + plan.newcomers / TILE;
  const int columns = g.Dv - block.column_block * COLUMNS, own_row = tile_row(0);
  const int apart = plan.slots - slot_tiles * TILE; /* rows between the slots in use and the newcomers */
  if (plan.blocks > 1 && own_thread() == 0) expect_bytes(full, plan.blocks * tiles * TILE * 4);
  row_values values = {};
  float acc[PRODUCTS][4], error[2];
  const auto first_row = [&](int tile) { return tile * TILE + (tile < slot_tiles ? 0 : apart); };
  /* Asks for a tile's values and products; in this order, since a warp is held while its products queue. */
  const auto ask = [&](int tile) {
    if (tile >= slot_tiles) barrier_wait(newcomers, parity);
    const int first = first_row(tile);
    ask_values<T>(t, first + own_row, columns, &values);
    const uint32_t phi = wgmma_matrix(shared_address(wgmma_memory) + first * ROW, 16);
    multiply_state<T>(plan, acc, [&](int step, uint32_t right, int accumulate) {
      multiply_rows(acc, phi + step / 4 * plan.rows * (ROW / 16) + step % 4 * 2, right, accumulate);
    });
  };
  const auto place_of = [&](int tile) { return plan.parts + (block.rank * plan.rows + first_row(tile) + own_row) * 4; };
  int tile = own_warpgroup();
  if (tile >= tiles) return;
  ask(tile);
#pragma unroll 1
  for (;; tile += TURN) {
    wgmma_wait<0>();
    pin(acc);
    tile_errors<T>(acc, values, error);
    if (tile + TURN >= tiles) break;
    ask(tile + TURN);
    send_errors(plan, error, place_of(tile), full);
  }
  send_errors(plan, error, place_of(tile), full);
}

/* --- phi(q)^T H --------------------------------------------------------------------------------------------------- */

/* Two features at an even place k of a row of n. VECTOR: k and n are multiples of 8, `row` is the lane's own two of the
 * first 8. */
template <bool VECTOR> __device__ __forceinline__ unsigned load_word(const char *row, int k, int n) {
  if constexpr (VECTOR) return k < n ? __ldg(reinterpret_cast<const unsigned *>(row + 2 * k)) : 0;
  const uint16_t *x = reinterpret_cast<const uint16_t *>(row) + k;
  return (k < n ? __ldg(x) : 0u) | (k + 1 < n ? static_cast<unsigned>(__ldg(x + 1)) << 16 : 0u);
}

/* Of phi(q) of 64 pending tokens: of a lane's two rows, its two features of each 8, 32 to a uint4. */
template <typename T> struct query_fragments { uint4 x[2][2 * T::panels]; };

/* Asks for those of the pending tokens from `first` on. They are put together when they are used (recall_tokens), so
 * that nobody waits for them here, however they lie. */
template <typename T>
__device__ __forceinline__ void ask_queries(const lola_device_segment &g, const scan_unit &unit, int first, int end,
                                            query_fragments<T> *phi) {
  const bool dealt = T::vector && g.queries_dealt;
  const int own = tile_row(first), c = own_thread() % 4, place = !T::vector ? 0 : dealt ? 16 * c : 4 * c;
  const char *rows[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t token = static_cast<int64_t>(unit.span.token) + min(own + 8 * half, end - 1);
    rows[half] = static_cast<const char *>(g.query_phi) + (token * g.Hq + unit.head) * g.F * 2 + place;
    asm volatile("" : "+l"(rows[half])); /* so that other places in it take no registers */
  }
  const auto ask = [&](auto load) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 2 * T::panels; i++) phi->x[half][i] = load(rows[half], 32 * i);
  };
  if (dealt)
    ask([&](const char *row, int k) { return load_chunk<true>(row, k, g.F); });
  else
    ask([&](const char *row, int k) {
      if (!T::vector) k += 2 * c;
      return make_uint4(load_word<T::vector>(row, k, g.F), load_word<T::vector>(row, k + 8, g.F),
                        load_word<T::vector>(row, k + 16, g.F), load_word<T::vector>(row, k + 24, g.F));
    });
}

/* Of the pending tokens; the fragments of the first 64 are on their way. The helpers. */
template <typename T>
__device__ __forceinline__ void recall_tokens(const lola_device_segment &g, const cluster_plan &plan,
                                              const block_place &block, const scan_unit &unit,
                                              const cluster_progress &progress, query_fragments<T> *phi) {
  const int end = uniform(progress.recall_end);
#pragma unroll 1
  for (int first = uniform(progress.recall_first);;) {
    const int own = tile_row(first), c = own_thread() % 4;
    lola_fragment a[2 * T::panels];
#pragma unroll
    for (int i = 0; i < 2 * T::panels; i++) {
      a[i] = lola_fragment_of(phi->x[0][i], phi->x[1][i], plan.identity);
#pragma unroll
      for (int e = 0; e < 8; e++) asm volatile("" : "+r"(a[i].a[e / 4][e % 4])); /* not behind wgmma_fence */
    }
    float acc[PRODUCTS][4];
    multiply_state<T>(plan, acc, [&](int step, uint32_t right, int accumulate) {
      multiply_queries(acc, a[step / 2].a[step % 2], right, accumulate);
    });
    wgmma_wait<0>();
    pin(acc);
    /* Two lanes write the eight columns of the one and then those of the other: whole sectors, 16 bytes to a lane. */
    const int odd = c % 2, column = block.column_block * COLUMNS + column_of(0, c) - 4 * odd;
    if (plan.vector_recalled) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int first = i / 2 * 4 + i % 2; /* products of a lane's first four columns; two on, those of the others */
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float other = __shfl_xor_sync(ALL, odd ? acc[first][e] : acc[first + 2][e], 1);
          if (odd)
            acc[first][e] = other;
          else
            acc[first + 2][e] = other;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float z = normalizer_of(acc, half);
      if (own + 8 * half >= end) continue;
      const int64_t index = (static_cast<int64_t>(unit.span.token) + own + 8 * half) * g.Hq + unit.head;
      float *row = g.recalled + index * g.Dv;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const float x[4] = {acc[i][2 * half], acc[i][2 * half + 1], acc[i + 1][2 * half], acc[i + 1][2 * half + 1]};
        if (plan.vector_recalled) {
          const int at = column + i / 4 * 32 + i % 4 * 4;
          if (at < g.Dv) *reinterpret_cast<float4 *>(row + at) = make_float4(x[0], x[1], x[2], x[3]);
        } else {
          const int at = column + 4 * odd + i / 4 * 32 + i % 4 * 2;
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (at + e < g.Dv) row[at + e] = x[e];
        }
      }
      if (!block.column_block && c == 0) g.z[index] = z;
    }
    first += TILE;
    if (first >= end) break;
    ask_queries<T>(g, unit, first, end, phi);
  }
}

/* Tokens before anything is folded, or whose mixing does not read the state. */
__device__ __forceinline__ void recall_nothing(const lola_device_segment &g, const block_place &block,
                                               const scan_unit &unit, const cluster_progress &progress) {
  const int helper = own_thread() - WALKERS;
  for (int t = progress.recall_first + helper; !block.column_block && t < progress.recall_end; t += HELPERS)
    g.z[(static_cast<int64_t>(unit.span.token) + t) * g.Hq + unit.head] = 0;
}

#endif

} // namespace wgmma_scan
} // namespace

#endif
