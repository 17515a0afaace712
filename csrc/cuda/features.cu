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
#include <limits.h>

#include "cuda/chain.cuh"
#include "cuda/device.cuh"
#include "cuda/features_matrix.cuh"
#include "cuda/plan.cuh"
#include "cuda/scan.cuh"
#include "cuda/steps.cuh"

namespace {

constexpr int TENSOR_THREADS = 256, PLAIN_THREADS = 256, PLAIN_ROWS = 32, GROUP = 8; /* at most */
constexpr int RESERVED_SHARED = 8192;                                                /* for static shared memory */
constexpr int KNOWN_ROWS = 1024; /* cache rows whose need is looked up once per block, if there are no more */

enum source_kind { SLOTS, RING, KEYS, QUERIES, ARRAY };

/* Tiles of one launch, in the order [head][source][cache row][rows]; queries, which have weights of their own, last. */
struct feature_job {
  lola_device_segment g; /* of the plain step: D, F, Hq, map */
  call_rows spans_of;    /* what the spans are to be written from, if `writes_spans` */
  int writes_spans;
  lola_array x; /* the plain step's array */
  int64_t T, rows;
  int per_head; /* query heads per head of x */
  float *out;
  int side_key, round;                /* which weights ARRAY takes; rounding to bfloat16 */
  int beside;                         /* multiprocessors to run on beside the kernel before it (chain.cuh), or 0 */
  lola_dtype target;                  /* what is stored: bfloat16 or float32 */
  int sources[4], count;              /* kinds */
  int row_tiles[4];                   /* tiles per cache row (SLOTS, RING) or in all */
  int tiles, per_tile;                /* in all for one head, if every cache row has work; rows per tile */
  int query_tiles;                    /* how many of one head's are queries */
  int projection;                     /* columns of xW, 0 without weights */
  int vector_q, vector_x, vector_out; /* 16-byte loads of queries and of all else, and stores, are possible */
};

struct feature_tile {
  int head, kind, row;
  int64_t first; /* row of the source */
};

__host__ __device__ bool takes_key_weights(const feature_job &job, int kind) {
  return kind == ARRAY ? job.side_key : kind != QUERIES;
}

/* The cache rows that have work, in order; all of them where there are too many to look at. */
struct row_list {
  uint16_t rows[KNOWN_ROWS];
  int count;
  bool all;
};

/* Tiles of one head. */
__device__ int tiles_of(const feature_job &job, const row_list &list) {
  int tiles = 0;
  for (int i = 0; i < job.count; i++)
    tiles += job.row_tiles[i] * (job.sources[i] == SLOTS || job.sources[i] == RING ? list.count : 1);
  return tiles;
}

/* So many tiles from tile `first` of a head on, and then of the next heads. */
struct tile_run {
  int head, first, count;
};

/* Those of the block where a head has so many. Of few tiles a warp takes one, and a block those of one head, so that it
 * loads weights once. */
__device__ tile_run run_of(const feature_job &job, int tiles, int warps) {
  const int64_t heads = job.g.Hq, total = tiles * heads;
  const unsigned parts = static_cast<unsigned>((tiles + warps - 1) / warps); /* of a head */
  if (parts * heads > gridDim.x) {
    const int64_t begin = total * blockIdx.x / gridDim.x, end = total * (blockIdx.x + 1) / gridDim.x;
    return {static_cast<int>(begin / tiles), static_cast<int>(begin % tiles), static_cast<int>(end - begin)};
  }
  const unsigned head = blockIdx.x / parts, part = blockIdx.x % parts;
  if (head >= heads) return {0, 0, 0};
  const int first = static_cast<int>(tiles * part / parts), end = static_cast<int>(tiles * (part + 1) / parts);
  return {static_cast<int>(head), first, end - first};
}

/* Tile `rest` of a head's. */
__device__ feature_tile tile_at(const feature_job &job, const row_list &list, int head, int rest) {
  feature_tile tile;
  tile.head = head;
  tile.row = 0;
  for (int i = 0;; i++) {
    tile.kind = job.sources[i];
    bool by_row = tile.kind == SLOTS || tile.kind == RING;
    const int tiles = by_row ? job.row_tiles[i] * list.count : job.row_tiles[i];
    if (rest >= tiles && i + 1 < job.count) {
      rest -= tiles;
      continue;
    }
    if (by_row) {
      const int place = rest / job.row_tiles[i];
      tile.row = list.all ? place : list.rows[place];
      rest %= job.row_tiles[i];
    }
    tile.first = static_cast<int64_t>(rest) * job.per_tile;
    return tile;
  }
}

/* The cache row that the token at `index` of the per-token arrays, or of token_phi, belongs to, or -1; `hint` is where
 * to look first. */
__device__ int owner_of(const lola_device_segment &g, source_kind kind, int64_t index, int hint) {
  const auto owns = [&](int row) {
    const lola_device_span &span = g.spans[row];
    const int64_t at = index - (kind == KEYS ? span.key : span.token);
    return at >= 0 && at < (kind == KEYS ? span.keys : span.tokens);
  };
  if (!g.packed) {
    const int64_t pitch = kind == KEYS ? lola_key_pitch(g, g.longest) : g.longest;
    const int row = static_cast<int>(static_cast<unsigned>(index) / static_cast<unsigned>(pitch));
    return owns(row) ? row : -1;
  }
  for (int i = 0, row = hint; i < g.B; i++) {
    if (owns(row)) return row;
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
    const lola_device_span &span = g.spans[tile.row];
    const lola_device_leaving leaving = lola_device_call_leaving(g, span);
    if (!lola_device_folds(g, leaving)) return false;
    *dtype = given ? job.target : g.dtype;
    if (tile.kind == SLOTS) {
      if (at >= g.sparse_count[static_cast<int64_t>(tile.row) * g.S + set]) return false;
      *to = static_cast<char *>(g.slot_phi) + (group * g.L + at) * g.F * item;
      *from = given ? static_cast<const char *>(g.sparse_features) + (group * g.L + at) * g.F * item
                    : static_cast<const char *>(g.sparse_keys) +
                          ((static_cast<int64_t>(tile.row) * g.S + set) * g.L + at) * g.D * item;
      return true;
    }
    const int64_t position = leaving.first + at;
    if (position >= leaving.end || position >= lola_device_origin(span)) return false;
    const int64_t slot = position % g.R;
    *to = static_cast<char *>(g.ring_phi) + (group * g.R + slot) * g.F * item;
    *from = given ? static_cast<const char *>(g.window_features) + (group * g.R + slot) * g.F * item
                  : static_cast<const char *>(g.window_keys) +
                        ((static_cast<int64_t>(tile.row) * g.Hkv + tile.head / g.r) * g.R + slot) * g.D * item;
    return true;
  }
  if (at >= (tile.kind == KEYS ? g.key_rows : g.tokens)) return false;
  const int row = owner_of(g, static_cast<source_kind>(tile.kind), at, *hint);
  if (row < 0) return false;
  *hint = row;
  const lola_device_span &span = g.spans[row];
  const int64_t group = at * g.Hq + tile.head;
  if (tile.kind == KEYS) {
    if (!lola_device_folds(g, lola_device_call_leaving(g, span))) return false;
    *to = static_cast<char *>(g.token_phi) + group * g.F * item;
    const lola_array &x = given ? g.k_features : g.k;
    *from = lola_device_at(x, span.batch, lola_device_first(span) + span.key_at + at - span.key,
                           given ? tile.head : tile.head / g.r);
    *dtype = x.dtype;
    return true;
  }
  if (!lola_device_has_folded(g, lola_device_segment_leaving(g, span))) return false;
  *to = static_cast<char *>(g.query_phi) + group * g.F * item;
  const lola_array &x = given ? g.q_features : g.q;
  *from = lola_device_at(x, span.batch, span.first + at - span.token, tile.head);
  *dtype = x.dtype;
  return true;
}

/* The spans of a decoding step. All blocks write the same, so that each can read them at once. */
__device__ void write_spans(const feature_job &job) {
  if (!job.writes_spans) return;
  for (int row = threadIdx.x; row < job.g.B; row += blockDim.x)
    job.g.spans[row] = span_of(job.g, job.spans_of, row, 0, 1);
  __syncthreads();
}

/* Looks up once which cache rows have work, so that blocks share out what there is; false when no tile has any. */
__device__ bool list_rows(const feature_job &job, row_list *list) {
  __shared__ int counts[32];
  const int B = job.g.B, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  bool by_row = false, asks = false;
  for (int i = 0; i < job.count; i++) {
    by_row |= job.sources[i] == SLOTS || job.sources[i] == RING;
    asks |= job.sources[i] == QUERIES;
  }
  const bool all = !by_row || B > KNOWN_ROWS;
  int count = 0; /* of rows before `base` */
  bool any = false;
  for (int base = 0; by_row && base < B; base += blockDim.x) {
    const int row = base + threadIdx.x;
    const bool needed = row < B && lola_device_folds(job.g, lola_device_call_leaving(job.g, job.g.spans[row]));
    any |= needed;
    if (all) continue;
    const unsigned bits = __ballot_sync(0xffffffffu, needed);
    if (lane == 0) counts[warp] = __popc(bits);
    __syncthreads();
    int place = count + __popc(bits & ((1u << lane) - 1));
    for (int w = 0; w < warps; w++) {
      if (w < warp) place += counts[w];
      count += counts[w];
    }
    if (needed) list->rows[place] = static_cast<uint16_t>(row);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    list->all = all;
    list->count = all ? B : count;
  }
  return __syncthreads_or(any) || !by_row || asks;
}

/* --- 16-bit x on the matrix units ------------------------------------------------------------------------------- */

/* 8 neighbouring features, rounded to bfloat16. */
template <typename Out>
__device__ __forceinline__ void store_chunk(const feature_job &job, char *to, int column, const unsigned (&y)[4]) {
  if constexpr (sizeof(Out) == 2) {
    *reinterpret_cast<uint4 *>(to + static_cast<int64_t>(column) * 2) = make_uint4(y[0], y[1], y[2], y[3]);
  } else {
    float2 z[4];
#pragma unroll
    for (int i = 0; i < 4; i++) z[i] = lola_widen<__nv_bfloat16>(y[i]);
    float *out = reinterpret_cast<float *>(to) + column;
    if (job.vector_out) {
      reinterpret_cast<float4 *>(out)[0] = make_float4(z[0].x, z[0].y, z[1].x, z[1].y);
      reinterpret_cast<float4 *>(out)[1] = make_float4(z[2].x, z[2].y, z[3].x, z[3].y);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[2 * i] = z[i].x;
      out[2 * i + 1] = z[i].y;
    }
  }
}

/* The same for a whole warp, whose lanes hold rows of which some are NULL, where a quad's four lanes hold 32
 * neighbours: with `dealt`, lane c stores features 2c and 2c + 1 of each of their eights, the words that lane c of a
 * quad takes of them as fragments of products on the matrix units. */
template <typename Out>
__device__ __forceinline__ void store_dealt(const feature_job &job, char *to, int column, const unsigned (&y)[4],
                                            bool dealt) {
  unsigned x[4] = {y[0], y[1], y[2], y[3]};
  if (sizeof(Out) == 2 && dealt) transpose_quad(x);
  if (to) store_chunk<Out>(job, to, column, x);
}

/* A head's weights (D, M) transposed into two halves of padded columns. */
template <int COLUMNS>
__device__ void load_weights(const float *w, int D, int M, int pitch, __nv_bfloat16 *hi, __nv_bfloat16 *lo) {
#pragma unroll 4
  for (int i = threadIdx.x; i < COLUMNS * (pitch / 8); i += blockDim.x) {
    const int m = i % COLUMNS, k = i / COLUMNS * 8;
    const float *from = w + static_cast<int64_t>(k) * M + m;
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = m < M && k < D ? __ldg(from + static_cast<int64_t>(j) * M) : 0;
    unsigned h[4], l[4];
#pragma unroll
    for (int j = 0; j < 4; j++) lola_split_pair(x[2 * j], x[2 * j + 1], &h[j], &l[j]);
    const int at = lola_swizzled(lola_column_row(m), k, pitch);
    *reinterpret_cast<uint4 *>(hi + at) = make_uint4(h[0], h[1], h[2], h[3]);
    *reinterpret_cast<uint4 *>(lo + at) = make_uint4(l[0], l[1], l[2], l[3]);
  }
}

/* Begins to read a warp's rows, of which each lane knows one, into (ROWS, pitch) swizzled; what lies where there is no
 * row is left alone. */
template <int ROWS>
__device__ __forceinline__ void fetch_rows(const char *own, int D, bool vector, int pitch, __nv_bfloat16 *x) {
  const int lane = static_cast<int>(lola_thread() % 32); /* so that no row's place is kept in a register of its own */
  const auto row_from = [&](int row) {
    return reinterpret_cast<const char *>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(own), row));
  };
  if (!vector) {
#pragma unroll 1
    for (int row = 0; row < ROWS; row++) {
      const uint16_t *from = reinterpret_cast<const uint16_t *>(row_from(row));
      for (int k = lane; from && k < D; k += 32)
        reinterpret_cast<uint16_t *>(x)[lola_swizzled(row, k, pitch)] = from[k];
    }
    return;
  }
#pragma unroll 1
  for (int first = 0; first < D; first += 128) {
    const int k = first + lane % 16 * 8;
#pragma unroll
    for (int i = 0; i < ROWS; i += 2) {
      const char *from = row_from(i + lane / 16);
      if (from && k < D)
        cp_async(shared_address(x + lola_swizzled(i + lane / 16, k, pitch)), from + static_cast<int64_t>(k) * 2);
    }
  }
}

/* A warp's ROWS of x times the weights, PRODUCTS * 8 columns at most. */
template <typename T, int ROWS, int PRODUCTS>
__device__ __forceinline__ void project(const __nv_bfloat16 *x, const __nv_bfloat16 *hi, const __nv_bfloat16 *lo, int D,
                                        int M, int pitch, float (&acc)[ROWS / 16][PRODUCTS][4]) {
  constexpr bool HALF = __is_same(T, __half);
  /* Left: matrices (rows 0-7, piece 0), (8-15, 0), (0-7, 1), (8-15, 1); right: (rows 0-7, 0), (0-7, 1), (8-15, 0), ..
   */
  const int lane = threadIdx.x % 32, r = lane % 8, matrix = lane / 8;
  const int left_row = r + (matrix & 1) * 8, right_row = r + (matrix >> 1) * 8;
#pragma unroll
  for (int m = 0; m < ROWS / 16; m++)
#pragma unroll
    for (int n = 0; n < PRODUCTS; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[m][n][e] = 0;
#pragma unroll(HALF ? 1 : 2)
  for (int k = 0; k < D; k += 16) {
    unsigned a[ROWS / 16][4], rest[ROWS / 16][4];
#pragma unroll
    for (int m = 0; m < ROWS / 16; m++) {
      ldmatrix(a[m], shared_address(x + lola_swizzled(16 * m + left_row, k + (matrix >> 1) * 8, pitch)));
      if constexpr (HALF) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 pair = lola_widen<__half>(a[m][e]);
          lola_split_pair(pair.x, pair.y, &a[m][e], &rest[m][e]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < PRODUCTS; n += 2) {
      if (32 * (n / 4) >= M) break;
      const int at = lola_swizzled(8 * n + right_row, k + (matrix & 1) * 8, pitch);
      unsigned high[4], low[4];
      ldmatrix(high, shared_address(hi + at));
      ldmatrix(low, shared_address(lo + at));
#pragma unroll
      for (int m = 0; m < ROWS / 16; m++)
#pragma unroll
        for (int two = 0; two < 2; two++) {
          float(&sum)[4] = acc[m][n + two];
          lola_mma(sum, a[m][0], a[m][1], a[m][2], a[m][3], high[2 * two], high[2 * two + 1]);
          if constexpr (HALF)
            lola_mma(sum, rest[m][0], rest[m][1], rest[m][2], rest[m][3], high[2 * two], high[2 * two + 1]);
        }
#pragma unroll
      for (int m = 0; m < ROWS / 16; m++)
#pragma unroll
        for (int two = 0; two < 2; two++)
          lola_mma(acc[m][n + two], a[m][0], a[m][1], a[m][2], a[m][3], low[2 * two], low[2 * two + 1]);
    }
  }
}

/* Rows of a warp's tile: the more, the less often the weights are read from shared memory. */
template <int PRODUCTS> struct tensor_tile { static constexpr int ROWS = PRODUCTS <= 8 ? 32 : 16; };

/* A block takes a run of tiles; those of one head and side are dealt out to its warps, which share the weights and
 * nothing else. A warp asks for its next rows as soon as it has multiplied those before. */
template <typename T, typename Out, int PRODUCTS>
__global__ void __launch_bounds__(TENSOR_THREADS, PRODUCTS <= 8 ? 2 : 1)
    tensor_kernel(const __grid_constant__ feature_job job) {
  constexpr int ROWS = tensor_tile<PRODUCTS>::ROWS;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ row_list list;
  const lola_device_segment &g = job.g;
  const int pitch = lola_padded(g.D, 64), M = job.projection;
  __nv_bfloat16 *hi = reinterpret_cast<__nv_bfloat16 *>(memory), *lo = hi + PRODUCTS * 8 * pitch;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, group = lane / 4, c = lane % 4;
  __nv_bfloat16 *x = lo + (PRODUCTS * 8 + ROWS * warp) * pitch;
  const auto load_weights_of = [&](int head, bool asks) {
    const float *w = !asks && takes_key_weights(job, job.sources[0]) ? g.map.w_k : g.map.w_q;
    load_weights<PRODUCTS * 8>(w + static_cast<int64_t>(head) * g.D * M, g.D, M, pitch, hi, lo);
  };
  /* Weights are the caller's, and need not await what comes earlier in a call: those of the block's first tile, if
   * every row has work. In decoding few steps need any. */
  int loaded = -1; /* the head, twice, and one more for queries' */
  if (g.longest > 1) {
    const tile_run likely = run_of(job, job.tiles, warps);
    const bool asks = likely.first >= job.tiles - job.query_tiles;
    load_weights_of(likely.head, asks);
    loaded = 2 * likely.head + asks;
  }
  lola_device_begin(job.beside);
  write_spans(job);
  if (!list_rows(job, &list)) return lola_device_end(job.beside);
  for (int i = lane; g.D % 64 && i < ROWS * pitch; i += 32) x[i] = __float2bfloat16_rn(0); /* behind the rows' ends */
  __syncwarp();
  const int tiles = tiles_of(job, list), queries = tiles - job.query_tiles;
  tile_run run = run_of(job, tiles, warps);
  int hint = 0;
  while (run.count > 0) {
    const int head = run.head;
    const bool asks = run.first >= queries; /* and so are all up to `stop` */
    const int stop = min(run.first + run.count, asks ? tiles : queries);
    /* This lane's row of the warp's next tile with work. */
    int at = run.first + warp;
    const char *from;
    char *to;
    const auto seek = [&] {
      for (; at < stop; at += warps) {
        const feature_tile tile = tile_at(job, list, head, at);
        lola_dtype unused;
        from = nullptr;
        to = nullptr;
        const bool needed = lane < ROWS && resolve(job, tile, lane, &hint, &from, &to, &unused);
        if (!needed) from = nullptr, to = nullptr;
        if (__any_sync(0xffffffffu, needed)) {
          at += warps;
          return true;
        }
      }
      return false;
    };
    bool more = seek();
    if (more) fetch_rows<ROWS>(from, g.D, asks ? job.vector_q : job.vector_x, pitch, x);
    cp_async_commit();
    __syncthreads(); /* the last run's weights were read */
    if (loaded != 2 * head + asks) {
      load_weights_of(head, asks);
      loaded = 2 * head + asks;
      __syncthreads();
    }
    while (more) {
      char *const now = to;
      more = seek();
      cp_async_wait<0>();
      __syncwarp();
      const bool asked = loaded & 1, dealt = asked && g.queries_dealt; /* as `asks`, for which no register is left */
      float acc[ROWS / 16][PRODUCTS][4];
      project<T, ROWS, PRODUCTS>(x, hi, lo, g.D, M, pitch, acc);
      __syncwarp();
      if (more) fetch_rows<ROWS>(from, g.D, asked ? job.vector_q : job.vector_x, pitch, x);
      cp_async_commit();
#pragma unroll
      for (int m = 0; m < ROWS / 16; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          char *row = reinterpret_cast<char *>(
              __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(now), 16 * m + 8 * half + group));
          finish_row(g.map.kind, acc[m], half, M, c, true,
                     [&](int column, const unsigned(&y)[4]) { store_dealt<Out>(job, row, column, y, dealt); });
        }
    }
    run.count -= stop - run.first;
    run.first = stop < tiles ? stop : 0;
    run.head += stop == tiles;
  }
  lola_device_end(job.beside);
}

/* --- everything else in float32 --------------------------------------------------------------------------------- */

__device__ void store_plain(const feature_job &job, char *to, int column, float y) {
  if (job.target == LOLA_BFLOAT16)
    reinterpret_cast<__nv_bfloat16 *>(to)[column] = __float2bfloat16_rn(y);
  else
    reinterpret_cast<float *>(to)[column] = job.round ? __bfloat162float(__float2bfloat16_rn(y)) : y;
}

__device__ float elementwise(lola_map_kind kind, float x) {
  if (kind == LOLA_MAP_RELU) return fmaxf(x, LOLA_FEATURE_FLOOR);
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
    store_plain(job, to, m, fmaxf(expf(p[m] - high) * up, LOLA_FEATURE_FLOOR));
    store_plain(job, to, M + m, fmaxf(expf(low - p[m]) * down, LOLA_FEATURE_FLOOR));
  }
}

/* Shared: x (rows, D) and its projection (rows, M), both float32. Each projected element is one chain of multiply-adds
 * in ascending k, as on the CPU. */
__global__ void __launch_bounds__(PLAIN_THREADS, 3) plain_kernel(const __grid_constant__ feature_job job) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ const char *sources[PLAIN_ROWS];
  __shared__ char *targets[PLAIN_ROWS];
  __shared__ lola_dtype types[PLAIN_ROWS];
  __shared__ row_list list;
  const lola_device_segment &g = job.g;
  const lola_map_kind kind = g.map.kind;
  const int rows = static_cast<int>(job.per_tile), D = g.D, F = g.F, M = job.projection;
  float *x = reinterpret_cast<float *>(memory), *projection = x + static_cast<int64_t>(rows) * D;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = PLAIN_THREADS / 32;
  lola_device_begin(job.beside);
  write_spans(job);
  if (!list_rows(job, &list)) return lola_device_end(job.beside);
  const int tiles = tiles_of(job, list);
  const int64_t total = static_cast<int64_t>(tiles) * g.Hq;
  int hint = 0;
  for (int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const int head = static_cast<int>(index / tiles);
    const feature_tile tile = tile_at(job, list, head, static_cast<int>(index - static_cast<int64_t>(head) * tiles));
    __syncthreads(); /* the last tile was read */
    bool needed = false;
    if (threadIdx.x < rows) {
      const char *from = nullptr;
      char *to = nullptr;
      lola_dtype dtype = LOLA_FLOAT32;
      needed = resolve(job, tile, threadIdx.x, &hint, &from, &to, &dtype);
      sources[threadIdx.x] = needed ? from : nullptr;
      targets[threadIdx.x] = to;
      types[threadIdx.x] = dtype;
    }
    if (!__syncthreads_or(needed)) continue;
    if (!M) {
      for (int i = warp; i < rows; i += warps) {
        if (!sources[i]) continue;
        for (int f = lane; f < F; f += 32)
          store_plain(job, targets[i], f, elementwise(kind, lola_device_load(sources[i], f, types[i])));
      }
      continue;
    }
    for (int i = warp; i < rows; i += warps)
      for (int d = lane; d < D; d += 32) x[i * D + d] = sources[i] ? lola_device_load(sources[i], d, types[i]) : 0;
    __syncthreads();
    const float *weights =
        (takes_key_weights(job, tile.kind) ? g.map.w_k : g.map.w_q) + static_cast<int64_t>(tile.head) * D * M;
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
      if (!sources[i]) continue;
      if (kind == LOLA_MAP_RELU)
        for (int m = lane; m < M; m += 32) store_plain(job, targets[i], m, elementwise(kind, projection[i * M + m]));
      else
        hedgehog_row(job, M, projection + i * M, targets[i]);
    }
  }
  lola_device_end(job.beside);
}

/* --- launches --------------------------------------------------------------------------------------------------- */

/* Shared memory of the matrix units' kernel. */
template <int PRODUCTS> int64_t tensor_bytes(int64_t D, int warps) {
  return (2 * PRODUCTS * 8 + warps * tensor_tile<PRODUCTS>::ROWS) * ((D + 63) / 64 * 64) * 2;
}

/* As many warps as the device's shared memory feeds, 0 if too few. */
template <int PRODUCTS> int tensor_warps(int64_t D, int most_shared) {
  int warps = TENSOR_THREADS / 32;
  while (warps && tensor_bytes<PRODUCTS>(D, warps) > most_shared) warps = warps > 2 ? warps / 2 : 0;
  return warps;
}

int tensor_warps(int64_t D, int M, int most_shared) {
  return M <= 32   ? tensor_warps<4>(D, most_shared)
         : M <= 64 ? tensor_warps<8>(D, most_shared)
                   : tensor_warps<16>(D, most_shared);
}

template <typename T, typename Out, int PRODUCTS>
lola_status launch_tensor(const feature_job &job, int blocks, int warps, int most_shared, cudaStream_t stream,
                          lola_message *message) {
  const int64_t bytes = tensor_bytes<PRODUCTS>(job.g.D, warps);
  auto kernel = tensor_kernel<T, Out, PRODUCTS>;
  if (bytes > 40 << 10) {
    lola_status status = lola_cuda_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared), "features", message);
    if (status) return status;
  }
  return lola_cuda_launched(
      lola_cuda_launch_chained(kernel, static_cast<unsigned>(blocks), 32 * warps, bytes, stream, job), "features",
      message);
}

template <typename T, typename Out>
lola_status launch_tensor_of(const feature_job &job, int blocks, int warps, int most_shared, cudaStream_t stream,
                             lola_message *message) {
  if (job.projection <= 32) return launch_tensor<T, Out, 4>(job, blocks, warps, most_shared, stream, message);
  if (job.projection <= 64) return launch_tensor<T, Out, 8>(job, blocks, warps, most_shared, stream, message);
  return launch_tensor<T, Out, 16>(job, blocks, warps, most_shared, stream, message);
}

template <typename T>
lola_status launch_tensor_to(const feature_job &job, int blocks, int warps, int most_shared, cudaStream_t stream,
                             lola_message *message) {
  return job.target == LOLA_BFLOAT16
             ? launch_tensor_of<T, __nv_bfloat16>(job, blocks, warps, most_shared, stream, message)
             : launch_tensor_of<T, float>(job, blocks, warps, most_shared, stream, message);
}

bool aligned(const void *data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

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

/* Columns of xW, 0 where there are no weights. */
int projection_of(const lola_device_segment &g, bool side_key) {
  const lola_map_kind kind = g.map.kind;
  if (kind != LOLA_MAP_HEDGEHOG && kind != LOLA_MAP_HEDGEHOG_EXP && kind != LOLA_MAP_RELU) return 0;
  return !(side_key ? g.map.w_k : g.map.w_q) ? 0 : kind == LOLA_MAP_RELU ? g.F : g.F / 2;
}

/* Warps of a block of the matrix units' kernel for a projection to M columns; 0 where it does not take x. */
int tensor_warps_for(const lola_device_segment &g, int M, lola_dtype x_dtype, bool round, int most_shared) {
  const bool takes = M && x_dtype != LOLA_FLOAT32 && round && g.D % 8 == 0 && M % 8 == 0 && M <= 128;
  return takes ? tensor_warps(g.D, M, most_shared) : 0;
}

/* `rows[i]`: rows of source i, of one cache row (SLOTS, RING) or in all; x_dtype: of the sources' vectors. */
lola_status launch(feature_job *job, lola_dtype x_dtype, const int64_t *rows, cudaStream_t stream,
                   lola_message *message) {
  lola_device_segment &g = job->g;
  device_limits limits;
  lola_status status = look_up_device(&limits, message);
  if (status) return status;
  const int M = job->projection = projection_of(g, takes_key_weights(*job, job->sources[0]));
  const int most_shared = limits.shared - RESERVED_SHARED; /* the same on every call, so that threads may race */
  const int warps = tensor_warps_for(g, M, x_dtype, job->round, most_shared);
  int64_t per_tile = PLAIN_ROWS, bytes = 0;
  if (warps) {
    per_tile = M <= 64 ? tensor_tile<8>::ROWS : tensor_tile<16>::ROWS;
  } else if (M) {
    const int64_t row_bytes = (static_cast<int64_t>(g.D) + M) * 4;
    while (per_tile > 1 && per_tile * row_bytes > 48 << 10) per_tile /= 2;
    bytes = per_tile * row_bytes;
    if (bytes > most_shared)
      return lola_fail(message, LOLA_VALUE_ERROR,
                       "head_dim %d and feature_dim %d are too large for this device's feature maps: pass features",
                       g.D, g.F);
  }
  job->per_tile = static_cast<int>(per_tile);
  job->query_tiles = 0;
  int64_t tiles = 0;
  for (int i = 0; i < job->count; i++) {
    const bool by_row = job->sources[i] == SLOTS || job->sources[i] == RING;
    const int64_t row_tiles = (rows[i] + per_tile - 1) / per_tile;
    tiles += by_row ? row_tiles * g.B : row_tiles;
    job->row_tiles[i] = static_cast<int>(row_tiles);
    if (job->sources[i] == QUERIES) job->query_tiles = job->row_tiles[i];
  }
  if (tiles * g.Hq > INT_MAX / 2)
    return lola_fail(message, LOLA_VALUE_ERROR, "too many rows in one call: pass fewer at a time");
  job->tiles = static_cast<int>(tiles);
  const int64_t total = tiles * g.Hq;
  if (!total) return LOLA_OK;
  const int64_t most = static_cast<int64_t>(job->beside ? job->beside : limits.processors) * (warps ? 2 : 3);
  const int blocks = static_cast<int>(total < most ? total : most);
  if (warps)
    return x_dtype == LOLA_BFLOAT16 ? launch_tensor_to<__nv_bfloat16>(*job, blocks, warps, most_shared, stream, message)
                                    : launch_tensor_to<__half>(*job, blocks, warps, most_shared, stream, message);
  if (bytes > 32 << 10) {
    status =
        lola_cuda_status(cudaFuncSetAttribute(plain_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared),
                         "features", message);
    if (status) return status;
  }
  return lola_cuda_launched(
      lola_cuda_launch_chained(plain_kernel, static_cast<unsigned>(blocks), PLAIN_THREADS, bytes, stream, *job),
      "features", message);
}

} // namespace

lola_status lola_cuda_segment_features(const lola_device_segment *segment, int parts, int beside,
                                       const call_rows *rows_of_call, cudaStream_t stream, lola_message *message) {
  feature_job job = {};
  job.g = *segment;
  job.writes_spans = rows_of_call != nullptr;
  if (rows_of_call) job.spans_of = *rows_of_call;
  lola_device_segment &g = job.g;
  if (g.stores_features) g.map.kind = LOLA_MAP_GIVEN;
  job.round = g.dtype != LOLA_FLOAT32;
  job.target = job.round ? LOLA_BFLOAT16 : LOLA_FLOAT32;
  job.beside = beside;
  const bool tokens = parts & LOLA_FEATURES_OF_TOKENS;
  int64_t rows[4];
  const auto add = [&](source_kind kind, int64_t count) {
    job.sources[job.count] = kind;
    rows[job.count++] = count;
  };
  if (parts & LOLA_FEATURES_OF_CACHE) {
    const int64_t leave = lola_key_pitch(g, g.longest_in_call);
    add(SLOTS, g.L);
    add(RING, leave < g.R ? leave : g.R);
  }
  if (tokens) add(KEYS, g.key_rows);
  const int64_t row_bytes = static_cast<int64_t>(g.D) * lola_device_item(g.dtype);
  job.vector_x = row_bytes % 16 == 0 && (!tokens || lola_device_rows_are_aligned(g.k));
  job.vector_q = tokens && lola_device_rows_are_aligned(g.q);
  job.vector_out = 1;
  const bool asks = tokens && g.mixing != LOLA_MIXING_CACHE_ONLY;
  const bool together = asks && g.q_dtype == g.dtype && projection_of(g, true) == projection_of(g, false);
  if (together) add(QUERIES, g.tokens);
  lola_status status = launch(&job, g.dtype, rows, stream, message);
  if (status || !asks || together) return status;
  job.count = 0;
  add(QUERIES, g.tokens);
  return launch(&job, g.q_dtype, rows, stream, message);
}

int lola_cuda_features_can_deal(const lola_device_segment *segment) {
  const lola_device_segment &g = *segment;
  const int M = g.stores_features ? 0 : projection_of(g, false);
  device_limits limits;
  lola_message ignored; /* the features say it */
  /* A quad must hold 32 neighbours that begin at a multiple of 32, also of Hedgehog's second half. */
  return !look_up_device(&limits, &ignored) && M % 32 == 0 &&
         tensor_warps_for(g, M, g.q_dtype, g.dtype != LOLA_FLOAT32, limits.shared - RESERVED_SHARED);
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
  job.vector_x = lola_device_rows_are_aligned(*x);
  job.vector_out = aligned(out, 16) && F % 4 == 0;
  const int64_t rows[1] = {B * T};
  return launch(&job, x->dtype, rows, static_cast<cudaStream_t>(stream), message);
}
