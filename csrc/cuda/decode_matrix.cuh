/* A tile of 16-bit pairs on the matrix units (mma.sync, sm_80 and later): S = Q K^T, P = exp2(S - max), O = P V.
 *
 * A warp takes 32 pairs. Keys and values are the right-hand sides of the products; every lane copies the very pieces of
 * 16 bytes that it feeds them (cp.async, all at once) into a place of its own, so that nothing waits for the tile and
 * no bank conflicts. On the left are up to 8 query heads: rows 0-7 hold the 16-bit halves `hi` of q, or of P, rows 8-15
 * what rounding left over (zero for a q of the cache's type), so that one product sums both and no weight loses
 * precision. q is scaled after the product. The order of k and of columns in a product is free: lane (row, quad) =
 * (lane / 4, lane % 4) takes elements 32j + 8quad .. + 7 of keys row, row + 8, ..., one piece for two products, and
 * columns 64j + 8row .. + 7 of values 2quad, 2quad + 1, 2quad + 8, ..., of which column 8row + i goes to product i. */
#ifndef LOLA_CUDA_DECODE_MATRIX_CUH
#define LOLA_CUDA_DECODE_MATRIX_CUH

#include "decode.cuh"
#include "instructions.cuh"

namespace {

constexpr int MATRIX_HEADS = 8;            /* query heads at a time */
constexpr int WARP_PAIRS = 32;             /* pairs of a warp */
constexpr int KEY_ROWS = WARP_PAIRS / 8;   /* keys that a lane holds a part of */
constexpr int VALUE_ROWS = WARP_PAIRS / 4; /* values */
constexpr int STEPS = WARP_PAIRS / 16;     /* products over all pairs */
constexpr int MATRIX_PAIRS = WARPS * WARP_PAIRS;
constexpr int SPAN = 128; /* elements of a key, of a value, that are there at a time */
constexpr int KEY_PIECES = WARP_PAIRS * SPAN * 2 / PIECE / 32; /* of one lane; of the values as many */
constexpr int WARP_BYTES = 2 * KEY_PIECES * 32 * PIECE;

/* Bytes of a query head in shared memory: 32 per 8 elements, and 16 that keep heads off each other's banks. */
__host__ __device__ __forceinline__ int query_pitch(int D) { return (D + 31) / 32 * 128 + 16; }
/* Floats of a head's sums in shared memory. */
__host__ __device__ __forceinline__ int merge_pitch(int Dv) { return (Dv + 63) / 64 * 64 + 8; }

template <typename T> __device__ __forceinline__ float rounded(float x);
template <> __device__ __forceinline__ float rounded<__half>(float x) { return __half2float(__float2half_rn(x)); }
template <> __device__ __forceinline__ float rounded<__nv_bfloat16>(float x) {
  return __bfloat162float(__float2bfloat16_rn(x));
}

/* Two numbers as 16-bit halves and what they leave over. */
template <typename T> __device__ __forceinline__ void split(float x, float y, unsigned &hi, unsigned &lo) {
  hi = pack<T>(x, y);
  lo = pack<T>(x - rounded<T>(x), y - rounded<T>(y));
}

/* Eight elements of q as halves and what they leave over. */
struct query_chunk {
  uint4 hi, lo;
};

template <typename T>
__device__ __forceinline__ query_chunk load_query(const lola_device_segment &g, const decode_plan &plan,
                                                  const lola_device_span &span, int head, int chunk) {
  query_chunk c = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
  if (chunk * 8 >= g.D) return c;
  const char *q = lola_device_at(g.q, span.batch, span.first, head);
  if (plan.query_aligned) {
    c.hi = *reinterpret_cast<const uint4 *>(q + chunk * PIECE);
    return c;
  }
  float x[8];
#pragma unroll
  for (int e = 0; e < 8; e++) x[e] = lola_device_load(q, chunk * 8 + e, g.q.dtype);
  split<T>(x[0], x[1], c.hi.x, c.lo.x);
  split<T>(x[2], x[3], c.hi.y, c.lo.y);
  split<T>(x[4], x[5], c.hi.z, c.lo.z);
  split<T>(x[6], x[7], c.hi.w, c.lo.w);
  return c;
}

/* In the order in which the products read it. */
__device__ __forceinline__ void store_query(const query_chunk &c, char *query, int chunk) {
  uint4 *to = reinterpret_cast<uint4 *>(query + chunk * 2 * PIECE);
  to[0] = make_uint4(c.hi.x, c.lo.x, c.hi.y, c.lo.y);
  to[1] = make_uint4(c.hi.z, c.lo.z, c.hi.w, c.lo.w);
}

/* The call's key and value, into shared memory and into their ring slot. */
template <typename T>
__device__ __forceinline__ void stage_newest(const lola_device_segment &g, const tile_source &from, char *newest) {
  const int64_t slot = slot_of(from, from.newest);
  T *keys = reinterpret_cast<T *>(const_cast<char *>(from.keys)) + slot * g.D;
  T *values = reinterpret_cast<T *>(const_cast<char *>(from.values)) + slot * g.Dv;
#pragma unroll 1
  for (int e = threadIdx.x; e < g.D + g.Dv; e += THREADS) {
    const bool is_key = e < g.D;
    const int i = is_key ? e : e - g.D;
    const T x = reinterpret_cast<const T *>(is_key ? from.key : from.value)[i];
    reinterpret_cast<T *>(newest)[e] = x;
    (is_key ? keys : values)[i] = x;
  }
}

/* Piece n of a lane: of key row + 8 (n / 4), elements 32 (n % 4) + 8 quad on; from KEY_PIECES on, as many of values:
 * of value 2 quad + n / 2 % 2 + n / 4 * 8, elements 64 (n % 2) + 8 row on. */
__device__ __forceinline__ char *piece_place(char *shared, int n) {
  return shared + threadIdx.x / 32 * WARP_BYTES + n * 32 * PIECE + threadIdx.x % 32 * PIECE;
}

__device__ __forceinline__ int key_pair(int i) { return threadIdx.x / 32 * WARP_PAIRS + threadIdx.x % 32 / 4 + 8 * i; }

__device__ __forceinline__ int value_pair(int i) {
  return threadIdx.x / 32 * WARP_PAIRS + threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8;
}

/* Asks for elements first .. first + 127 of the keys; zeros where there is none. */
__device__ __forceinline__ void ask_keys(const lola_device_segment &g, const tile_source &from, int first,
                                         char *shared) {
  const int at = first + threadIdx.x % 4 * 8;
#pragma unroll
  for (int i = 0; i < KEY_ROWS; i++) {
    const int pair = key_pair(i);
    const bool there = pair < from.count && pair != from.newest;
    const char *key = from.keys + (there ? slot_of(from, pair) : 0) * g.D * 2 + at * 2;
#pragma unroll
    for (int j = 0; j < 4; j++) copy_or_zero(piece_place(shared, i * 4 + j), key + 64 * j, there && at + 32 * j < g.D);
  }
  cp_async_commit();
}

__device__ __forceinline__ void ask_values(const lola_device_segment &g, const tile_source &from, int first,
                                           char *shared) {
  const int at = first + threadIdx.x % 32 / 4 * 8;
#pragma unroll
  for (int i = 0; i < VALUE_ROWS; i++) {
    const int pair = value_pair(i);
    const bool there = pair < from.count && pair != from.newest;
    const char *value = from.values + (there ? slot_of(from, pair) : 0) * g.Dv * 2 + at * 2;
#pragma unroll
    for (int j = 0; j < 2; j++)
      copy_or_zero(piece_place(shared, KEY_PIECES + i * 2 + j), value + 128 * j, there && at + 64 * j < g.Dv);
  }
  cp_async_commit();
}

/* The newest pair's pieces, once the copies have landed. */
__device__ __forceinline__ void put_newest_key(const lola_device_segment &g, const tile_source &from, int first,
                                               const char *newest, char *shared) {
  const int at = first + threadIdx.x % 4 * 8;
#pragma unroll 1
  for (int n = 0; n < KEY_PIECES; n++)
    if (key_pair(n / 4) == from.newest && at + n % 4 * 32 < g.D)
      *reinterpret_cast<uint4 *>(piece_place(shared, n)) =
          *reinterpret_cast<const uint4 *>(newest + (at + n % 4 * 32) * 2);
}

__device__ __forceinline__ void put_newest_value(const lola_device_segment &g, const tile_source &from, int first,
                                                 const char *newest, char *shared) {
  const int at = first + threadIdx.x % 32 / 4 * 8;
#pragma unroll 1
  for (int n = 0; n < KEY_PIECES; n++)
    if (value_pair(n / 2) == from.newest && at + n % 2 * 64 < g.Dv)
      *reinterpret_cast<uint4 *>(piece_place(shared, KEY_PIECES + n)) =
          *reinterpret_cast<const uint4 *>(newest + (g.D + at + n % 2 * 64) * 2);
}

/* Columns 64 j + 16 quad .. + 15 of this lane's head: P V, from the values' pieces in registers. */
template <typename T>
__device__ __forceinline__ void weigh_values(const unsigned (&p)[STEPS][4], const unsigned (&v)[VALUE_ROWS][2][4],
                                             int j, float (&o)[16]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const unsigned halves = i % 2 ? 0x7632 : 0x5410;
    float c[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < STEPS; k++)
      mma<T>(c, p[k], __byte_perm(v[4 * k][j][i / 2], v[4 * k + 1][j][i / 2], halves),
             __byte_perm(v[4 * k + 2][j][i / 2], v[4 * k + 3][j][i / 2], halves));
    o[i] = c[0] + c[2];
    o[8 + i] = c[1] + c[3];
  }
}

/* A tile for query heads head .. head + heads - 1; a partial each. LONG: keys or values have more than SPAN elements,
 * or there are more than MATRIX_HEADS heads; then what does not stay in registers is loaded again. */
template <typename T, bool LONG>
__device__ __forceinline__ void attend_matrix(const lola_device_segment &g, const decode_plan &plan,
                                              const lola_device_span &span, const tile_source &from, int head,
                                              int heads, char *shared, const tile_target &to) {
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  char *queries = shared + plan.queries_at, *newest = shared + plan.newest_at;
  float *merge = reinterpret_cast<float *>(shared + plan.merge_at);
  float *sums = reinterpret_cast<float *>(shared + plan.sums_at);
  const int pitch = merge_pitch(g.Dv), warp_step = LONG ? MATRIX_HEADS * pitch : WARP_BYTES / 4;
  const bool has_newest = from.newest >= 0 && from.newest / WARP_PAIRS == warp;

  /* The first q is under way before the copies, which it would have to wait for; up to MATRIX_HEADS heads of SPAN
   * elements it is all. */
  constexpr int LANES = SPAN / 8;
  const int chunks = (g.D + 31) / 32 * 4, own_head = threadIdx.x / LANES, own_chunk = threadIdx.x % LANES;
  static_assert(THREADS / LANES == MATRIX_HEADS, "a thread has a chunk of q");
  const bool has_query = own_head < heads && own_chunk < chunks;
  query_chunk own = {};
  if (has_query) own = load_query<T>(g, plan, span, head + own_head, own_chunk);
  ask_keys(g, from, 0, shared);
  ask_values(g, from, 0, shared);
  if (has_query) store_query(own, queries + own_head * query_pitch(g.D), own_chunk);
#pragma unroll 1
  for (int h = own_head; LONG && h < heads; h += MATRIX_HEADS)
#pragma unroll 1
    for (int chunk = h == own_head ? own_chunk + LANES : own_chunk; chunk < chunks; chunk += LANES)
      store_query(load_query<T>(g, plan, span, head + h, chunk), queries + h * query_pitch(g.D), chunk);
  if (from.newest >= 0) stage_newest<T>(g, from, newest);
  __syncthreads();

#pragma unroll 1
  for (int first = 0; first == 0 || (LONG && first < heads); first += MATRIX_HEADS) {
    if (first) __syncthreads(); /* the last heads' sums were read */
    const int left = min(heads - first, MATRIX_HEADS);

    float s[KEY_ROWS][4] = {};
    /* Rows without a head repeat the last one; nobody reads their sums. */
    const char *query = queries + (first + min(row, left - 1)) * query_pitch(g.D) + quad * 2 * PIECE;
#pragma unroll 1
    for (int d = 0; d == 0 || (LONG && d < g.D); d += SPAN) {
      if (LONG && (d || first)) {
        ask_keys(g, from, d, shared);
        cp_async_wait<0>();
      } else {
        cp_async_wait<1>();
      }
      if (has_newest) put_newest_key(g, from, d, newest, shared);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (d + 32 * j >= g.D) break;
        const uint4 *q = reinterpret_cast<const uint4 *>(query + (d + 32 * j) * 4);
        const uint4 q0 = q[0], q1 = q[1];
        const unsigned a0[4] = {q0.x, q0.y, q0.z, q0.w}, a1[4] = {q1.x, q1.y, q1.z, q1.w};
#pragma unroll
        for (int i = 0; i < KEY_ROWS; i++) {
          const uint4 k = *reinterpret_cast<const uint4 *>(piece_place(shared, i * 4 + j));
          mma<T>(s[i], a0, k.x, k.y);
          mma<T>(s[i], a1, k.z, k.w);
        }
      }
    }

    /* Of head `row`: logits in base 2 of pairs 2quad, 2quad + 1 and those 8, 16, 24 later. */
    float high = -INFINITY, sum = 0, weight[KEY_ROWS][2];
#pragma unroll
    for (int i = 0; i < KEY_ROWS; i++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float logit = (s[i][e] + s[i][2 + e]) * (g.scale * LOG2E);
        weight[i][e] = warp * WARP_PAIRS + 8 * i + 2 * quad + e < from.count ? logit : -INFINITY;
        high = fmaxf(high, weight[i][e]);
      }
    high = fmaxf(high, __shfl_xor_sync(ALL, high, 1));
    high = fmaxf(high, __shfl_xor_sync(ALL, high, 2));
    /* A warp without a pair keeps -inf; the lowest float stands in so that -inf - it stays -inf. */
    const float shift = fmaxf(high, -3e38f);
    unsigned p[STEPS][4];
#pragma unroll
    for (int i = 0; i < KEY_ROWS; i++) {
      const float x = power_of_two(weight[i][0] - shift), y = power_of_two(weight[i][1] - shift);
      sum += x + y;
      split<T>(x, y, p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
    }
    sum += __shfl_xor_sync(ALL, sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    if (quad == 0 && row < left)
      *reinterpret_cast<float2 *>(sums + (warp * MATRIX_HEADS + row) * 2) = make_float2(high, sum);

#pragma unroll 1
    for (int column = 0; column == 0 || (LONG && column < g.Dv); column += SPAN) {
      if (LONG && (column || first)) ask_values(g, from, column, shared);
      cp_async_wait<0>();
      if (has_newest) put_newest_value(g, from, column, newest, shared);
      unsigned v[VALUE_ROWS][2][4];
#pragma unroll
      for (int n = 0; n < KEY_PIECES; n++) {
        const uint4 piece = *reinterpret_cast<const uint4 *>(piece_place(shared, KEY_PIECES + n));
        v[n / 2][n % 2][0] = piece.x;
        v[n / 2][n % 2][1] = piece.y;
        v[n / 2][n % 2][2] = piece.z;
        v[n / 2][n % 2][3] = piece.w;
      }
      __syncwarp(); /* unless LONG, the sums take the pairs' place */
#pragma unroll
      for (int j = 0; j < 2; j++) {
        if (column + 64 * j >= g.Dv) break;
        float o[16];
        weigh_values<T>(p, v, j, o);
        if (row < left) store_floats<16>(merge + warp * warp_step + row * pitch + column + 64 * j + 16 * quad, o);
      }
    }
    __syncthreads();
    merge_warps(plan, merge, warp_step, pitch, sums, MATRIX_HEADS, WARPS, first, left, to);
  }
}

} // namespace

#endif
