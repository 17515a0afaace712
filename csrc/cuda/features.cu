/* features: phi(x) for Hedgehog (arXiv 2402.04347, LoLCATs' softmax_dim and exp_dim), 1 + elu and relu maps.
 *
 * x (rows, D) and a head's W (D, M) -> phi (rows, F); F = 2 M for Hedgehog, [softmax(xW), softmax(-xW)], clamped.
 * 16-bit x goes through the matrix units: W split into two bfloat16 halves (float16 x too, which is exact), float32
 * accumulation, softmax in float32 on the accumulators, one rounding to bfloat16 at the end. float32 x, and sizes that
 * the matrix units do not take, are plain float32. Which of the two runs depends on dtype and sizes alone and every row
 * is computed alike, so a pair's features have the same bits wherever the pair lies: in a sparse slot, in the ring or
 * among the call's tokens.
 *
 * One routine serves the segment's scratch (slots, ring, tokens) and the step on plain arrays: a launch is a list of
 * tiles (head, source, rows), and `resolve` says where each row of a tile comes from and goes to. */
#include "cuda/chain.cuh"
#include "cuda/device.cuh"
#include "cuda/scan.cuh"
#include "cuda/steps.cuh"

namespace {

constexpr float FEATURE_FLOOR = 1e-12f;
constexpr int TENSOR_WARPS = 8, TENSOR_THREADS = 32 * TENSOR_WARPS, TENSOR_ROWS = 16 * TENSOR_WARPS,
              PLAIN_THREADS = 256, PLAIN_ROWS = 32, GROUP = 8;
constexpr int RESERVED_SHARED = 8192; /* for static shared memory */
constexpr int KNOWN_ROWS = 512;       /* cache rows whose need is looked up once per block */

enum source_kind { SLOTS, RING, KEYS, QUERIES, ARRAY };

/* Tiles of one launch, in the order [head][source][cache row][rows]. */
struct feature_job {
  lola_device_segment g; /* of the plain step: D, F, Hq, map */
  lola_array x;          /* the plain step's array */
  int64_t T, rows;
  int per_head; /* query heads per head of x */
  float *out;
  int side_key, round;      /* which weights; rounding to bfloat16 */
  lola_dtype target;        /* what is stored: bfloat16 or float32 */
  int sources[3], count;    /* kinds */
  int64_t row_tiles[3];     /* tiles per cache row (SLOTS, RING) or in all */
  int64_t tiles, per_tile;  /* in all for one head; rows per tile */
  int vector_x, vector_out; /* 16-byte loads and stores are possible */
  int stages;               /* tiles of x in shared memory on the matrix units */
};

struct feature_tile {
  int head, kind, row;
  int64_t first; /* row of the source */
};

struct tile_shared {
  const char *from[TENSOR_ROWS];
  char *to[TENSOR_ROWS];
};

__device__ feature_tile tile_at(const feature_job &job, int64_t index) {
  feature_tile tile;
  tile.head = static_cast<int>(index / job.tiles);
  int64_t rest = index % job.tiles;
  tile.row = 0;
  for (int i = 0;; i++) {
    tile.kind = job.sources[i];
    bool by_row = tile.kind == SLOTS || tile.kind == RING;
    int64_t tiles = by_row ? job.row_tiles[i] * job.g.B : job.row_tiles[i];
    if (rest >= tiles && i + 1 < job.count) {
      rest -= tiles;
      continue;
    }
    if (by_row) {
      tile.row = static_cast<int>(rest / job.row_tiles[i]);
      rest %= job.row_tiles[i];
    }
    tile.first = rest * job.per_tile;
    return tile;
  }
}

/* Whether any set of the cache row folds in this segment. */
__device__ bool row_folds(const lola_device_segment &g, int row) {
  lola_device_leaving leaving = lola_device_segment_leaving(g, g.spans[row]);
  if (leaving.end <= leaving.first) return false;
  for (int set = 0; set < g.S; set++)
    if (lola_device_folds(g, leaving, g.sparse_count[static_cast<int64_t>(row) * g.S + set])) return true;
  return false;
}

/* The cache row that the token at `index` of the per-token arrays belongs to, or -1; `hint` is where to look first. */
__device__ int owner_of(const lola_device_segment &g, int64_t index, int hint) {
  for (int i = 0, row = hint; i < g.B; i++) {
    const lola_device_span &span = g.spans[row];
    if (index >= span.token && index < static_cast<int64_t>(span.token) + span.tokens) return row;
    if (++row == g.B) row = 0;
  }
  return -1;
}

/* Where row i of a tile comes from and goes to; false when nothing needs it. */
__device__ bool resolve(const feature_job &job, const feature_tile &tile, int i, int *hint, const char **from,
                        char **to, lola_dtype *dtype) {
  const lola_device_segment &g = job.g;
  const int64_t at = tile.first + i, item = lola_device_item(g.dtype);
  const bool given = g.map.kind == LOLA_MAP_GIVEN;
  if (tile.kind == ARRAY) {
    if (at >= job.rows) return false;
    *from = lola_device_at(job.x, at / job.T, at % job.T, tile.head / job.per_head);
    *to = reinterpret_cast<char *>(job.out + (at * g.Hq + tile.head) * g.F);
    *dtype = job.x.dtype;
    return true;
  }
  if (tile.kind == SLOTS || tile.kind == RING) {
    const int64_t group = static_cast<int64_t>(tile.row) * g.Hq + tile.head, set = tile.head / g.rs;
    const int64_t count = g.sparse_count[static_cast<int64_t>(tile.row) * g.S + set];
    const lola_device_span &span = g.spans[tile.row];
    const lola_device_leaving leaving = lola_device_segment_leaving(g, span);
    if (!lola_device_folds(g, leaving, count)) return false;
    *dtype = given ? job.target : g.dtype;
    if (tile.kind == SLOTS) {
      if (at >= count) return false;
      *to = static_cast<char *>(g.slot_phi) + (group * g.L + at) * g.F * item;
      *from = given ? static_cast<const char *>(g.sparse_features) + (group * g.L + at) * g.F * item
                    : static_cast<const char *>(g.sparse_keys) +
                          ((static_cast<int64_t>(tile.row) * g.S + set) * g.L + at) * g.D * item;
      return true;
    }
    const int64_t position = leaving.first + at;
    if (position >= leaving.end || position >= span.position) return false;
    const int64_t slot = position % g.R;
    *to = static_cast<char *>(g.ring_phi) + (group * g.R + slot) * g.F * item;
    *from = given ? static_cast<const char *>(g.window_features) + (group * g.R + slot) * g.F * item
                  : static_cast<const char *>(g.window_keys) +
                        ((static_cast<int64_t>(tile.row) * g.Hkv + tile.head / g.r) * g.R + slot) * g.D * item;
    return true;
  }
  if (at >= g.tokens) return false;
  const int row = owner_of(g, at, *hint);
  if (row < 0) return false;
  *hint = row;
  const lola_device_span &span = g.spans[row];
  const lola_device_leaving leaving = lola_device_segment_leaving(g, span);
  const int64_t offset = at - span.token, group = at * g.Hq + tile.head;
  const bool folds = lola_device_folds(g, leaving, g.sparse_count[static_cast<int64_t>(row) * g.S + tile.head / g.rs]);
  if (tile.kind == KEYS) {
    if (!folds || span.position + offset >= leaving.end) return false;
    *to = static_cast<char *>(g.token_phi) + group * g.F * item;
    const lola_array &x = given ? g.k_features : g.k;
    *from = lola_device_at(x, span.batch, span.first + offset, given ? tile.head : tile.head / g.r);
    *dtype = x.dtype;
    return true;
  }
  if (!folds && !g.folded[static_cast<int64_t>(row) * g.Hq + tile.head]) return false;
  *to = static_cast<char *>(g.query_phi) + group * g.F * item;
  const lola_array &x = given ? g.q_features : g.q;
  *from = lola_device_at(x, span.batch, span.first + offset, tile.head);
  *dtype = x.dtype;
  return true;
}

/* Fills the tile's table; returns whether any row is needed. Every thread of the block calls it. */
__device__ bool resolve_tile(const feature_job &job, const feature_tile &tile, int *hint, tile_shared *shared,
                             lola_dtype *dtype) {
  const int i = threadIdx.x;
  bool needed = false;
  if (i < job.per_tile) {
    const char *from = nullptr;
    char *to = nullptr;
    lola_dtype own = *dtype;
    needed = resolve(job, tile, i, hint, &from, &to, &own);
    shared->from[i] = needed ? from : nullptr;
    shared->to[i] = to;
  }
  return __syncthreads_or(needed);
}

/* Looks up once which cache rows need features (the first KNOWN_ROWS of them); false when no tile has work. */
__device__ bool look_up_rows(const feature_job &job, uint8_t *folds) {
  bool by_row = false, any = false;
  for (int i = 0; i < job.count; i++) by_row |= job.sources[i] == SLOTS || job.sources[i] == RING;
  if (!by_row) return true;
  for (int row = threadIdx.x; row < job.g.B; row += blockDim.x) {
    bool needed = row_folds(job.g, row);
    if (row < KNOWN_ROWS) folds[row] = needed;
    any |= needed;
  }
  if (__syncthreads_or(any)) return true;
  for (int i = 0; i < job.count; i++)
    if (job.sources[i] == QUERIES) return true;
  return false;
}

__device__ bool skipped(const feature_tile &tile, const uint8_t *folds) {
  return (tile.kind == SLOTS || tile.kind == RING) && tile.row < KNOWN_ROWS && !folds[tile.row];
}

/* --- 16-bit x on the matrix units ------------------------------------------------------------------------------- */

__device__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* 8 neighbouring features. */
__device__ void store_chunk(const feature_job &job, char *to, int column, const float *y) {
  if (job.target == LOLA_BFLOAT16) {
    *reinterpret_cast<uint4 *>(to + static_cast<int64_t>(column) * 2) =
        make_uint4(lola_round_pair(y[0], y[1]), lola_round_pair(y[2], y[3]), lola_round_pair(y[4], y[5]),
                   lola_round_pair(y[6], y[7]));
    return;
  }
  float *out = reinterpret_cast<float *>(to) + column;
  float z[8];
#pragma unroll
  for (int i = 0; i < 8; i++) z[i] = __bfloat162float(__float2bfloat16_rn(y[i]));
  if (job.vector_out) {
    reinterpret_cast<float4 *>(out)[0] = make_float4(z[0], z[1], z[2], z[3]);
    reinterpret_cast<float4 *>(out)[1] = make_float4(z[4], z[5], z[6], z[7]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = z[i];
  }
}

/* A head's weights (D, M) transposed into two halves of padded columns. */
template <int COLUMNS>
__device__ void load_weights(const float *w, int D, int M, int pitch, __nv_bfloat16 *hi, __nv_bfloat16 *lo) {
#pragma unroll 8
  for (int i = threadIdx.x; i < COLUMNS * (pitch / 2); i += TENSOR_THREADS) {
    int m = i % COLUMNS, k = i / COLUMNS * 2;
    float x = m < M && k < D ? __ldg(w + static_cast<int64_t>(k) * M + m) : 0;
    float y = m < M && k + 1 < D ? __ldg(w + static_cast<int64_t>(k + 1) * M + m) : 0;
    unsigned h, l;
    lola_split_pair(x, y, &h, &l);
    int at = lola_swizzled(lola_column_row(m), k, pitch);
    *reinterpret_cast<unsigned *>(hi + at) = h;
    *reinterpret_cast<unsigned *>(lo + at) = l;
  }
}

/* Begins to read the warp's 16 rows of a tile into (16, pitch) swizzled; rows that nothing needs are zero. */
__device__ void fetch_rows(const feature_job &job, const tile_shared &table, int pitch, __nv_bfloat16 *x) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
    const int row = i + lane / 16;
    const char *from = table.from[16 * warp + row];
    for (int k = lane % 16 * 8; k < job.g.D; k += 128) {
      __nv_bfloat16 *to = x + lola_swizzled(row, k, pitch);
      if (from && job.vector_x) {
        lola_copy_async(to, from + static_cast<int64_t>(k) * 2);
        continue;
      }
      unsigned pairs[4] = {0, 0, 0, 0};
      const uint16_t *e = reinterpret_cast<const uint16_t *>(from) + k;
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (from) pairs[j] = e[2 * j] | static_cast<unsigned>(e[2 * j + 1]) << 16;
      *reinterpret_cast<uint4 *>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

/* phi of one row whose projection lies in `acc`, 32 columns to each 4 products; `half` picks the fragment's rows. */
template <int PRODUCTS>
__device__ void finish_row(const feature_job &job, const float (&acc)[PRODUCTS][4], const int half, int M, int c,
                           char *to) {
  float y[8];
  if (job.g.map.kind == LOLA_MAP_RELU) {
#pragma unroll
    for (int q = 0; q < PRODUCTS / 4; q++) {
      int column = 32 * q + 8 * c;
#pragma unroll
      for (int i = 0; i < 8; i++) y[i] = fmaxf(acc[4 * q + i / 2][2 * half + i % 2], FEATURE_FLOOR);
      if (to && column < M) store_chunk(job, to, column, y);
    }
    return;
  }
  float high = -INFINITY, low = INFINITY;
#pragma unroll
  for (int n = 0; n < PRODUCTS; n++) {
    if (32 * (n / 4) + 8 * c < M) {
      high = fmaxf(high, fmaxf(acc[n][2 * half], acc[n][2 * half + 1]));
      low = fminf(low, fminf(acc[n][2 * half], acc[n][2 * half + 1]));
    }
  }
  const float shift[2] = {quad_max(high), -quad_max(-low)};
#pragma unroll
  for (int sign = 0; sign < 2; sign++) {
    constexpr float LOG2E = 1.44269504f;
    const float factor = sign ? -LOG2E : LOG2E;
    float e[PRODUCTS * 2], sum = 0;
#pragma unroll
    for (int n = 0; n < PRODUCTS; n++) {
      float both = 0;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        e[2 * n + i] = lola_power_of_two((acc[n][2 * half + i] - shift[sign]) * factor);
        both += e[2 * n + i];
      }
      if (32 * (n / 4) + 8 * c < M) sum += both;
    }
    sum = quad_sum(sum);
    const float scale = job.g.map.kind == LOLA_MAP_HEDGEHOG ? lola_reciprocal(sum) : 1;
#pragma unroll
    for (int q = 0; q < PRODUCTS / 4; q++) {
      int column = 32 * q + 8 * c;
#pragma unroll
      for (int i = 0; i < 8; i++) y[i] = fmaxf(e[8 * q + i] * scale, FEATURE_FLOOR);
      if (to && column < M) store_chunk(job, to, sign * M + column, y);
    }
  }
}

/* The warp's 16 rows of x times the weights, PRODUCTS * 8 columns at most. */
template <typename T, int PRODUCTS>
__device__ void project(const __nv_bfloat16 *x, const __nv_bfloat16 *hi, const __nv_bfloat16 *lo, int D, int M,
                        int pitch, float (&acc)[PRODUCTS][4]) {
  constexpr bool HALF = __is_same(T, __half);
  /* Left: matrices (rows 0-7, piece 0), (8-15, 0), (0-7, 1), (8-15, 1); right: (rows 0-7, 0), (0-7, 1), (8-15, 0), ..
   */
  const int lane = threadIdx.x % 32, r = lane % 8, matrix = lane / 8;
  const int left_row = r + (matrix & 1) * 8, right_row = r + (matrix >> 1) * 8;
#pragma unroll
  for (int n = 0; n < PRODUCTS; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) acc[n][e] = 0;
#pragma unroll 2
  for (int k = 0; k < D; k += 16) {
    unsigned a[4], rest[4];
    lola_load_rows(a, x + lola_swizzled(left_row, k + (matrix >> 1) * 8, pitch));
    if constexpr (HALF) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 pair = lola_widen<__half>(a[e]);
        lola_split_pair(pair.x, pair.y, &a[e], &rest[e]);
      }
    }
#pragma unroll
    for (int n = 0; n < PRODUCTS; n += 2) {
      if (32 * (n / 4) >= M) break;
      const int at = lola_swizzled(8 * n + right_row, k + (matrix & 1) * 8, pitch);
      unsigned high[4], low[4];
      lola_load_rows(high, hi + at);
      lola_load_rows(low, lo + at);
#pragma unroll
      for (int two = 0; two < 2; two++) {
        lola_mma(acc[n + two], a[0], a[1], a[2], a[3], high[2 * two], high[2 * two + 1]);
        if constexpr (HALF)
          lola_mma(acc[n + two], rest[0], rest[1], rest[2], rest[3], high[2 * two], high[2 * two + 1]);
      }
#pragma unroll
      for (int two = 0; two < 2; two++) lola_mma(acc[n + two], a[0], a[1], a[2], a[3], low[2 * two], low[2 * two + 1]);
    }
  }
}

/* Tiles of 128 rows in turn, 16 to a warp, which reads those of the next tile (with two stages) before it works on this
 * one's. */
template <typename T, int PRODUCTS>
__global__ void __launch_bounds__(TENSOR_THREADS, PRODUCTS <= 8 ? 2 : 1)
    tensor_kernel(const __grid_constant__ feature_job job) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ tile_shared table[2];
  __shared__ uint8_t folds[KNOWN_ROWS];
  const lola_device_segment &g = job.g;
  const int pitch = lola_padded(g.D, 64), M = g.map.kind == LOLA_MAP_RELU ? g.F : g.F / 2;
  __nv_bfloat16 *hi = reinterpret_cast<__nv_bfloat16 *>(memory), *lo = hi + PRODUCTS * 8 * pitch;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, c = lane % 4;
  __nv_bfloat16 *x = lo + (PRODUCTS * 8 + 16 * warp) * pitch;
  lola_device_await_previous();
  lola_device_start_next();
  if (!look_up_rows(job, folds)) return;
  const int64_t total = job.tiles * g.Hq;
  int64_t index = total * blockIdx.x / gridDim.x;
  const int64_t end = total * (blockIdx.x + 1) / gridDim.x;
  int head = -1, hint = 0, now = 0;
  /* The next tile with work, its rows in the table. */
  const auto seek = [&](tile_shared *to, feature_tile *tile) {
    while (index < end) {
      *tile = tile_at(job, index++);
      if (skipped(*tile, folds)) continue;
      __syncthreads(); /* the table was read */
      lola_dtype unused = LOLA_FLOAT32;
      if (resolve_tile(job, *tile, &hint, to, &unused)) return true;
    }
    return false;
  };
  const auto stage = [&](int which) { return x + (job.stages == 2 ? which * TENSOR_ROWS * pitch : 0); };
  for (int which = 0; g.D % 64 && which < job.stages; which++) /* behind the rows' ends */
    for (int i = lane; i < 16 * pitch; i += 32) stage(which)[i] = __float2bfloat16_rn(0);
  __syncwarp();
  feature_tile tile, next;
  bool more = seek(&table[0], &tile);
  if (!more) return;
  fetch_rows(job, table[0], pitch, stage(0));
  lola_copy_commit();
  while (more) {
    more = seek(&table[now ^ 1], &next);
    if (more && job.stages == 2) fetch_rows(job, table[now ^ 1], pitch, stage(now ^ 1));
    lola_copy_commit();
    if (tile.head != head) {
      head = tile.head;
      const float *w = job.side_key ? g.map.w_k : g.map.w_q;
      __syncthreads(); /* the last head's weights were read */
      load_weights<PRODUCTS * 8>(w + static_cast<int64_t>(head) * g.D * M, g.D, M, pitch, hi, lo);
      __syncthreads();
    }
    lola_copy_wait<1>();
    __syncwarp();
    float acc[PRODUCTS][4];
    project<T, PRODUCTS>(stage(now), hi, lo, g.D, M, pitch, acc);
    __syncwarp();
    if (more && job.stages == 1) {
      fetch_rows(job, table[now ^ 1], pitch, stage(0));
      lola_copy_commit();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int at = 16 * warp + half * 8 + group;
      finish_row<PRODUCTS>(job, acc, half, M, c, table[now].from[at] ? table[now].to[at] : nullptr);
    }
    tile = next;
    now ^= 1;
  }
}

/* --- everything else in float32 --------------------------------------------------------------------------------- */

__device__ void store_plain(const feature_job &job, char *to, int column, float y) {
  if (job.target == LOLA_BFLOAT16)
    reinterpret_cast<__nv_bfloat16 *>(to)[column] = __float2bfloat16_rn(y);
  else
    reinterpret_cast<float *>(to)[column] = job.round ? __bfloat162float(__float2bfloat16_rn(y)) : y;
}

__device__ float elementwise(lola_map_kind kind, float x) {
  if (kind == LOLA_MAP_RELU) return fmaxf(x, FEATURE_FLOOR);
  if (kind == LOLA_MAP_ELU_PLUS_ONE) return x > 0 ? x + 1 : expf(fminf(x, 0.0f));
  return x;
}

__device__ float warp_max(float x) {
  for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
  return x;
}

__device__ float warp_sum(float x) {
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}

/* [exp(p - max), exp(min - p)], each divided by its sum for softmax; one warp. */
__device__ void hedgehog_row(const feature_job &job, int M, float *p, char *to) {
  const int lane = threadIdx.x % 32;
  const bool softmax = job.g.map.kind == LOLA_MAP_HEDGEHOG;
  float high = -INFINITY, low = INFINITY;
  for (int m = lane; m < M; m += 32) {
    high = fmaxf(high, p[m]);
    low = fminf(low, p[m]);
  }
  high = warp_max(high);
  low = -warp_max(-low);
  float above = 0, below = 0;
  for (int m = lane; softmax && m < M; m += 32) {
    above += expf(p[m] - high);
    below += expf(low - p[m]);
  }
  const float up = softmax ? 1 / warp_sum(above) : 1, down = softmax ? 1 / warp_sum(below) : 1;
  for (int m = lane; m < M; m += 32) {
    store_plain(job, to, m, fmaxf(expf(p[m] - high) * up, FEATURE_FLOOR));
    store_plain(job, to, M + m, fmaxf(expf(low - p[m]) * down, FEATURE_FLOOR));
  }
}

/* Shared: x (rows, D) and its projection (rows, M), both float32. Each projected element is one chain of multiply-adds
 * in ascending k, as on the CPU. */
__global__ void __launch_bounds__(PLAIN_THREADS) plain_kernel(const __grid_constant__ feature_job job) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ tile_shared table;
  __shared__ lola_dtype types[PLAIN_ROWS];
  __shared__ uint8_t folds[KNOWN_ROWS];
  const lola_device_segment &g = job.g;
  const lola_map_kind kind = g.map.kind;
  const float *w = kind == LOLA_MAP_GIVEN || kind == LOLA_MAP_ELU_PLUS_ONE ? nullptr
                   : job.side_key                                          ? g.map.w_k
                                                                           : g.map.w_q;
  const int rows = static_cast<int>(job.per_tile), D = g.D, F = g.F, M = !w ? 0 : kind == LOLA_MAP_RELU ? F : F / 2;
  float *x = reinterpret_cast<float *>(memory), *projection = x + static_cast<int64_t>(rows) * D;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = PLAIN_THREADS / 32;
  lola_device_await_previous();
  lola_device_start_next();
  if (!look_up_rows(job, folds)) return;
  const int64_t total = job.tiles * g.Hq;
  int hint = 0;
  for (int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const feature_tile tile = tile_at(job, index);
    if (skipped(tile, folds)) continue;
    __syncthreads(); /* the last tile was read */
    bool needed = false;
    if (threadIdx.x < rows) {
      const char *from = nullptr;
      char *to = nullptr;
      lola_dtype dtype = LOLA_FLOAT32;
      needed = resolve(job, tile, threadIdx.x, &hint, &from, &to, &dtype);
      table.from[threadIdx.x] = needed ? from : nullptr;
      table.to[threadIdx.x] = to;
      types[threadIdx.x] = dtype;
    }
    if (!__syncthreads_or(needed)) continue;
    if (!M) {
      for (int i = warp; i < rows; i += warps) {
        if (!table.from[i]) continue;
        for (int f = lane; f < F; f += 32)
          store_plain(job, table.to[i], f, elementwise(kind, lola_device_load(table.from[i], f, types[i])));
      }
      continue;
    }
    for (int i = warp; i < rows; i += warps)
      for (int d = lane; d < D; d += 32)
        x[i * D + d] = table.from[i] ? lola_device_load(table.from[i], d, types[i]) : 0;
    __syncthreads();
    const float *weights = w + static_cast<int64_t>(tile.head) * D * M;
    const int columns = (M + 31) / 32, groups = (rows + GROUP - 1) / GROUP;
    for (int item = warp; item < columns * groups; item += warps) {
      const int m = item % columns * 32 + lane, first = item / columns * GROUP;
      if (m < M) {
        float sum[GROUP] = {};
        const float *line[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; i++) line[i] = x + min(first + i, rows - 1) * D;
#pragma unroll 4
        for (int d = 0; d < D; d++) {
          const float weight = weights[static_cast<int64_t>(d) * M + m];
#pragma unroll
          for (int i = 0; i < GROUP; i++) sum[i] = fmaf(line[i][d], weight, sum[i]);
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++)
          if (first + i < rows) projection[(first + i) * M + m] = sum[i];
      }
    }
    __syncthreads();
    for (int i = warp; i < rows; i += warps) {
      if (!table.from[i]) continue;
      if (kind == LOLA_MAP_RELU)
        for (int m = lane; m < M; m += 32) store_plain(job, table.to[i], m, elementwise(kind, projection[i * M + m]));
      else
        hedgehog_row(job, M, projection + i * M, table.to[i]);
    }
  }
}

/* --- launches --------------------------------------------------------------------------------------------------- */

/* Shared memory of the matrix units' kernel for `columns` padded columns. */
int64_t tensor_bytes(int64_t D, int64_t columns, int64_t stages) {
  return (2 * columns + stages * TENSOR_ROWS) * ((D + 63) / 64 * 64) * 2;
}

template <typename T, int PRODUCTS>
lola_status launch_tensor(const feature_job &job, int blocks, int most_shared, cudaStream_t stream,
                          lola_message *message) {
  const int bytes = static_cast<int>(tensor_bytes(job.g.D, PRODUCTS * 8, job.stages));
  auto kernel = tensor_kernel<T, PRODUCTS>;
  if (bytes > 40 << 10) {
    lola_status status = lola_cuda_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared), "features", message);
    if (status) return status;
  }
  return lola_cuda_status(
      lola_cuda_launch_chained(kernel, static_cast<unsigned>(blocks), TENSOR_THREADS, bytes, stream, job), "features",
      message);
}

template <typename T>
lola_status launch_tensor_of(const feature_job &job, int M, int blocks, int most_shared, cudaStream_t stream,
                             lola_message *message) {
  if (M <= 32) return launch_tensor<T, 4>(job, blocks, most_shared, stream, message);
  if (M <= 64) return launch_tensor<T, 8>(job, blocks, most_shared, stream, message);
  return launch_tensor<T, 16>(job, blocks, most_shared, stream, message);
}

bool aligned(const void *data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

/* Whether 16-byte loads may begin at any row of the array, rows being whole numbers of them. */
bool rows_aligned(const lola_array &x) {
  const int64_t item = lola_device_item(x.dtype);
  return aligned(x.data, 16) && x.stride_b * item % 16 == 0 && x.stride_t * item % 16 == 0 &&
         x.stride_h * item % 16 == 0;
}

struct device_limits {
  int device, processors, shared;
};

/* Of the current device; looked up once. */
lola_status look_up_device(device_limits *limits, lola_message *message) {
  static thread_local device_limits known = {-1, 0, 0};
  int device;
  lola_status status = lola_cuda_status(cudaGetDevice(&device), "cudaGetDevice", message);
  if (!status && device != known.device) {
    device_limits found = {device, 0, 0};
    status = lola_cuda_status(cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device),
                              "cudaDeviceGetAttribute", message);
    if (!status)
      status = lola_cuda_status(cudaDeviceGetAttribute(&found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                                "cudaDeviceGetAttribute", message);
    if (!status) known = found;
  }
  *limits = known;
  return status;
}

/* `rows[i]`: rows of source i, of one cache row (SLOTS, RING) or in all; x_dtype: of the source's vectors. */
lola_status launch(feature_job *job, lola_dtype x_dtype, const int64_t *rows, cudaStream_t stream,
                   lola_message *message) {
  lola_device_segment &g = job->g;
  device_limits limits;
  lola_status status = look_up_device(&limits, message);
  if (status) return status;
  const lola_map_kind kind = g.map.kind;
  const bool projected = (kind == LOLA_MAP_HEDGEHOG || kind == LOLA_MAP_HEDGEHOG_EXP || kind == LOLA_MAP_RELU) &&
                         (job->side_key ? g.map.w_k : g.map.w_q);
  const int M = !projected ? 0 : kind == LOLA_MAP_RELU ? g.F : g.F / 2;
  const int columns = M <= 32 ? 32 : M <= 64 ? 64 : 128;
  const bool tensor = projected && x_dtype != LOLA_FLOAT32 && job->round && g.D % 8 == 0 && M % 8 == 0 && M <= 128 &&
                      tensor_bytes(g.D, columns, 1) + RESERVED_SHARED <= limits.shared;
  int64_t per_tile = PLAIN_ROWS, bytes = 0;
  if (tensor) {
    per_tile = TENSOR_ROWS;
    job->stages = tensor_bytes(g.D, columns, 2) + RESERVED_SHARED <= limits.shared ? 2 : 1;
  } else if (projected) {
    const int64_t row_bytes = (static_cast<int64_t>(g.D) + M) * 4;
    while (per_tile > 1 && per_tile * row_bytes > 48 << 10) per_tile /= 2;
    bytes = per_tile * row_bytes;
    if (bytes + RESERVED_SHARED > limits.shared)
      return lola_fail(message, LOLA_VALUE_ERROR,
                       "head_dim %d and feature_dim %d are too large for this device's feature maps: pass features",
                       g.D, g.F);
  }
  job->per_tile = per_tile;
  job->tiles = 0;
  for (int i = 0; i < job->count; i++) {
    const bool by_row = job->sources[i] == SLOTS || job->sources[i] == RING;
    job->row_tiles[i] = (rows[i] + per_tile - 1) / per_tile;
    job->tiles += by_row ? job->row_tiles[i] * g.B : job->row_tiles[i];
  }
  const int64_t total = job->tiles * g.Hq;
  if (!total) return LOLA_OK;
  const int64_t most = static_cast<int64_t>(limits.processors) * (tensor ? 2 : 4);
  const int blocks = static_cast<int>(total < most ? total : most);
  const int most_shared = limits.shared - RESERVED_SHARED; /* the same on every call, so that threads may race */
  if (tensor)
    return x_dtype == LOLA_BFLOAT16 ? launch_tensor_of<__nv_bfloat16>(*job, M, blocks, most_shared, stream, message)
                                    : launch_tensor_of<__half>(*job, M, blocks, most_shared, stream, message);
  if (bytes > 32 << 10) {
    status =
        lola_cuda_status(cudaFuncSetAttribute(plain_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared),
                         "features", message);
    if (status) return status;
  }
  return lola_cuda_status(
      lola_cuda_launch_chained(plain_kernel, static_cast<unsigned>(blocks), PLAIN_THREADS, bytes, stream, *job),
      "features", message);
}

} // namespace

lola_status lola_cuda_segment_features(const lola_device_segment *segment, int tokens, cudaStream_t stream,
                                       lola_message *message) {
  feature_job job = {};
  job.g = *segment;
  lola_device_segment &g = job.g;
  if (g.stores_features) g.map.kind = LOLA_MAP_GIVEN;
  job.round = g.dtype != LOLA_FLOAT32;
  job.target = job.round ? LOLA_BFLOAT16 : LOLA_FLOAT32;
  job.side_key = 1;
  /* Without the segment's tokens a row has at most one, and one chunk's pairs leave. */
  int64_t rows[3] = {g.L, tokens ? g.R : g.C, g.tokens};
  job.sources[0] = SLOTS;
  job.sources[1] = RING;
  job.sources[2] = KEYS;
  job.count = tokens ? 3 : 2;
  const int64_t row_bytes = static_cast<int64_t>(g.D) * lola_device_item(g.dtype);
  job.vector_x = row_bytes % 16 == 0 && (!tokens || rows_aligned(g.k));
  job.vector_out = 1;
  lola_status status = launch(&job, g.dtype, rows, stream, message);
  if (status || !tokens || g.mixing == LOLA_MIXING_CACHE_ONLY) return status;
  job.side_key = 0;
  job.sources[0] = QUERIES;
  job.count = 1;
  rows[0] = g.tokens;
  job.vector_x = rows_aligned(g.q);
  return launch(&job, g.q_dtype, rows, stream, message);
}

lola_status lola_cuda_features(const lola_array *x, int64_t B, int64_t T, int64_t Hx, int64_t D, int64_t Hq, int64_t F,
                               const lola_feature_map *map, int side_key, float *out, int device, void *stream,
                               lola_message *message) {
  if (!B || !T) return LOLA_OK;
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  feature_job job = {};
  job.g.B = 1;
  job.g.D = static_cast<int>(D);
  job.g.F = static_cast<int>(F);
  job.g.Hq = static_cast<int>(Hq);
  job.g.map = *map;
  job.x = *x;
  job.T = T;
  job.rows = B * T;
  job.per_head = static_cast<int>(Hq / Hx);
  job.out = out;
  job.side_key = side_key;
  job.round = x->dtype != LOLA_FLOAT32;
  job.target = LOLA_FLOAT32;
  job.sources[0] = ARRAY;
  job.count = 1;
  job.vector_x = rows_aligned(*x);
  job.vector_out = aligned(out, 16) && F % 4 == 0;
  const int64_t rows[1] = {B * T};
  return launch(&job, x->dtype, rows, static_cast<cudaStream_t>(stream), message);
}
