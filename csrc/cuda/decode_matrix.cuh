/* A tile of 16-bit pairs on the matrix units (mma.sync, sm_80 and later): S = Q K^T, P = exp2(S - max), O = P V.
 *
 * A warp takes 16 pairs. Keys and values are the right-hand sides of the products; every lane copies the very pieces of
 * 16 bytes that it feeds them (cp.async, all at once) into a place of its own, so that nothing waits for the tile and no
 * bank conflicts. On the left are up to 8 query heads: rows 0-7 hold the 16-bit halves `hi` of q, or of P, rows 8-15
 * what rounding left over (zero for a q of the cache's type), so that one product sums both and no weight loses
 * precision. q is scaled after the product. The order of k and of columns in a product is free: lane (row, quad) =
 * (lane / 4, lane % 4) takes elements 32j + 8quad .. + 7 of keys row and row + 8, one piece for two products, and columns
 * 64j + 8row .. + 7 of values 2quad, 2quad + 1 and the two 8 later, of which column 8row + i goes to product i. */
#ifndef LOLA_CUDA_DECODE_MATRIX_CUH
#define LOLA_CUDA_DECODE_MATRIX_CUH

#include "attend_instructions.cuh"
#include "decode.cuh"

namespace {

constexpr int MATRIX_HEADS = 8;             /* query heads at a time */
constexpr int WARP_PAIRS = 16;              /* pairs of a warp */
constexpr int MATRIX_PAIRS = WARPS * WARP_PAIRS;
constexpr int SPAN = 128;                   /* elements of a key, of a value, that are there at a time */
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

/* q of `heads` heads from `head` on, in the order in which the products read it. */
template <typename T>
__device__ __forceinline__ void stage_queries(const lola_device_segment &g, const decode_plan &plan,
                                              const lola_device_span &span, int head, int heads, char *queries) {
  constexpr int LANES = 16;
  const int pitch = query_pitch(g.D), chunks = (g.D + 31) / 32 * 4;
#pragma unroll 1
  for (int h = threadIdx.x / LANES; h < heads; h += THREADS / LANES) {
    const char *q = lola_device_at(g.q, span.batch, span.first, head + h);
#pragma unroll 1
    for (int chunk = threadIdx.x % LANES; chunk < chunks; chunk += LANES) {
      uint4 hi = make_uint4(0, 0, 0, 0), lo = hi;
      if (chunk * 8 < g.D) {
        if (plan.query_aligned) {
          hi = *reinterpret_cast<const uint4 *>(q + chunk * PIECE);
        } else {
          float x[8];
#pragma unroll
          for (int e = 0; e < 8; e++) x[e] = lola_device_load(q, chunk * 8 + e, g.q.dtype);
          split<T>(x[0], x[1], hi.x, lo.x);
          split<T>(x[2], x[3], hi.y, lo.y);
          split<T>(x[4], x[5], hi.z, lo.z);
          split<T>(x[6], x[7], hi.w, lo.w);
        }
      }
      uint4 *to = reinterpret_cast<uint4 *>(queries + h * pitch + chunk * 2 * PIECE);
      to[0] = make_uint4(hi.x, lo.x, hi.y, lo.y);
      to[1] = make_uint4(hi.z, lo.z, hi.w, lo.w);
    }
  }
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

/* Piece n of a lane: key row + 8 (n / 4), elements 32 (n % 4) + 8 quad on; the same for values from KEY_PIECES on, of
 * value 2 quad + n / 2 % 2 + n / 4 * 8, elements 64 (n % 2) + 8 row on. */
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
  for (int i = 0; i < 2; i++) {
    const int pair = key_pair(i);
    const bool there = pair < from.count && pair != from.newest;
    const char *key = from.keys + (there ? slot_of(from, pair) : 0) * g.D * 2 + at * 2;
#pragma unroll
    for (int j = 0; j < 4; j++)
      copy_or_zero(piece_place(shared, i * 4 + j), key + 64 * j, there && at + 32 * j < g.D);
  }
  copies_end_group();
}

__device__ __forceinline__ void ask_values(const lola_device_segment &g, const tile_source &from, int first,
                                           char *shared) {
  const int at = first + threadIdx.x % 32 / 4 * 8;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int pair = value_pair(i);
    const bool there = pair < from.count && pair != from.newest;
    const char *value = from.values + (there ? slot_of(from, pair) : 0) * g.Dv * 2 + at * 2;
#pragma unroll
    for (int j = 0; j < 2; j++)
      copy_or_zero(piece_place(shared, KEY_PIECES + i * 2 + j), value + 128 * j, there && at + 64 * j < g.Dv);
  }
  copies_end_group();
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

/* Columns 64 j + 16 quad .. + 15 of this lane's head: P V, from the values' column block in registers. */
template <typename T>
__device__ __forceinline__ void weigh_values(const unsigned (&p)[4], const uint4 (&v)[4][2], int j, float (&o)[16]) {
  const unsigned words[4][4] = {{v[0][j].x, v[0][j].y, v[0][j].z, v[0][j].w},
                                {v[1][j].x, v[1][j].y, v[1][j].z, v[1][j].w},
                                {v[2][j].x, v[2][j].y, v[2][j].z, v[2][j].w},
                                {v[3][j].x, v[3][j].y, v[3][j].z, v[3][j].w}};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const unsigned halves = i % 2 ? 0x7632 : 0x5410;
    float c[4] = {0, 0, 0, 0};
    mma<T>(c, p, __byte_perm(words[0][i / 2], words[1][i / 2], halves),
           __byte_perm(words[2][i / 2], words[3][i / 2], halves));
    o[i] = c[0] + c[2];
    o[8 + i] = c[1] + c[3];
  }
}

/* A tile for query heads head .. head + heads - 1; a partial each. LONG: keys or values have more than SPAN elements, or
 * there are more than MATRIX_HEADS heads; then what does not stay in registers is loaded again. */
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

  ask_keys(g, from, 0, shared);
  ask_values(g, from, 0, shared);
  stage_queries<T>(g, plan, span, head, heads, queries);
  if (from.newest >= 0) stage_newest<T>(g, from, newest);
  __syncthreads();

#pragma unroll 1
  for (int first = 0; first == 0 || (LONG && first < heads); first += MATRIX_HEADS) {
    if (first) __syncthreads(); /* the last heads' sums were read */
    const int left = min(heads - first, MATRIX_HEADS);

    float s[2][4] = {};
    /* Rows without a head repeat the last one; nobody reads their sums. */
    const char *query = queries + (first + min(row, left - 1)) * query_pitch(g.D) + quad * 2 * PIECE;
#pragma unroll 1
    for (int d = 0; d == 0 || (LONG && d < g.D); d += SPAN) {
      if (LONG && (d || first)) {
        ask_keys(g, from, d, shared);
        copies_wait<0>();
      } else {
        copies_wait<1>();
      }
      if (has_newest) put_newest_key(g, from, d, newest, shared);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (d + 32 * j >= g.D) break;
        const uint4 *q = reinterpret_cast<const uint4 *>(query + (d + 32 * j) * 4);
        const uint4 q0 = q[0], q1 = q[1];
        const unsigned a0[4] = {q0.x, q0.y, q0.z, q0.w}, a1[4] = {q1.x, q1.y, q1.z, q1.w};
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const uint4 k = *reinterpret_cast<const uint4 *>(piece_place(shared, i * 4 + j));
          mma<T>(s[i], a0, k.x, k.y);
          mma<T>(s[i], a1, k.z, k.w);
        }
      }
    }

    /* Of head `row`: logits in base 2 of pairs 2quad, 2quad + 1 and the two 8 later. */
    float high = -INFINITY, sum = 0, weight[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++)
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
    unsigned p[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float x = power_of_two(weight[i][0] - shift), y = power_of_two(weight[i][1] - shift);
      sum += x + y;
      split<T>(x, y, p[2 * i], p[2 * i + 1]);
    }
    sum += __shfl_xor_sync(ALL, sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    if (quad == 0 && row < left)
      *reinterpret_cast<float2 *>(sums + (warp * MATRIX_HEADS + row) * 2) = make_float2(high, sum);

#pragma unroll 1
    for (int column = 0; column == 0 || (LONG && column < g.Dv); column += SPAN) {
      if (LONG && (column || first)) ask_values(g, from, column, shared);
      copies_wait<0>();
      if (has_newest) put_newest_value(g, from, column, newest, shared);
      uint4 v[4][2];
#pragma unroll
      for (int n = 0; n < KEY_PIECES; n++)
        v[n / 2][n % 2] = *reinterpret_cast<const uint4 *>(piece_place(shared, KEY_PIECES + n));
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
    merge_warps(plan, merge, warp_step, pitch, sums, MATRIX_HEADS, first, left, to);
  }
}

} // namespace

#endif
