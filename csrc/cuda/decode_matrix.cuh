/* A tile of 16-bit pairs on the matrix units (mma.sync, sm_80 and later): S = Q K^T, P = exp2(S - max), O = P V.
 *
 * A warp takes 16 pairs and loads their keys and values straight into the registers of the products' right-hand sides,
 * everything at once. On the left are up to 8 query heads: rows 0-7 hold the 16-bit halves `hi` of q, or of P, rows
 * 8-15 what rounding left over (zero for a q of the cache's type), so that one product sums both and no weight loses
 * precision. q is scaled after the product. The order of k and of columns in a product is free: lane (row, quad) =
 * (lane / 4, lane % 4) takes elements 32j + 8quad .. + 7 of key `row`, one load for two products, and columns 8row ..
 * 8row + 7 of values 2quad, 2quad + 1 (and 8 later), of which column 8row + i goes to product i. Sums are float32. */
#ifndef LOLA_CUDA_DECODE_MATRIX_CUH
#define LOLA_CUDA_DECODE_MATRIX_CUH

#include "attend_instructions.cuh"
#include "decode.cuh"

namespace {

constexpr int MATRIX_HEADS = 8;             /* query heads at a time */
constexpr int WARP_PAIRS = 16;              /* pairs of a warp */
constexpr int MATRIX_PAIRS = WARPS * WARP_PAIRS;
constexpr int SPAN = 128;                   /* elements of a key, of a value, in registers at a time */

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

/* q of `heads` heads from `head` on, in the order in which the products read it; zeros up to a multiple of 8 heads. */
template <typename T>
__device__ __forceinline__ void stage_queries(const lola_device_segment &g, const decode_plan &plan,
                                              const lola_device_span &span, int head, int heads, char *queries) {
  constexpr int LANES = 16;
  const int pitch = query_pitch(g.D), chunks = (g.D + 31) / 32 * 4;
#pragma unroll 1
  for (int h = threadIdx.x / LANES; h < (heads + MATRIX_HEADS - 1) / MATRIX_HEADS * MATRIX_HEADS; h += THREADS / LANES) {
    const char *q = lola_device_at(g.q, span.batch, span.first, head + min(h, heads - 1));
#pragma unroll 1
    for (int chunk = threadIdx.x % LANES; chunk < chunks; chunk += LANES) {
      uint4 hi = make_uint4(0, 0, 0, 0), lo = hi;
      if (h < heads && chunk * 8 < g.D) {
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

/* What a lane holds of its warp's 16 pairs. */
struct lane_pairs {
  const char *key[2], *value[4]; /* where its pieces begin: of keys row and row + 8; of values 2quad, + 1, + 8, + 9 */
  bool key_there[2], value_there[4];
  uint4 k[2][4], v[4][2];

  __device__ __forceinline__ void find(const lola_device_segment &g, const tile_source &from) {
    const int first = threadIdx.x / 32 * WARP_PAIRS, row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    const int64_t key_bytes = g.D * INT64_C(2), value_bytes = g.Dv * INT64_C(2);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int pair = first + row + 8 * i;
      key[i] = from.keys + slot_of(from, pair) * key_bytes + quad * PIECE;
      key_there[i] = pair < from.count && pair != from.newest;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int pair = first + 2 * quad + i % 2 + i / 2 * 8;
      value[i] = from.values + slot_of(from, pair) * value_bytes + row * PIECE;
      value_there[i] = pair < from.count && pair != from.newest;
    }
  }

  /* Elements first .. first + 127 of the keys, of the values; the newest pair's later, from shared memory. */
  __device__ __forceinline__ void load_keys(const lola_device_segment &g, int first) {
    const int left = g.D - first - threadIdx.x % 4 * 8;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) k[i][j] = load_piece(key[i] + (first + 32 * j) * 2, key_there[i] && 32 * j < left);
  }

  __device__ __forceinline__ void load_values(const lola_device_segment &g, int first) {
    const int left = g.Dv - first - threadIdx.x % 32 / 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        v[i][j] = load_piece(value[i] + (first + 64 * j) * 2, value_there[i] && 64 * j < left);
  }

  __device__ __forceinline__ void take_newest_key(const lola_device_segment &g, const tile_source &from, int first,
                                                  const char *newest) {
    const int pair = from.newest - static_cast<int>(threadIdx.x / 32 * WARP_PAIRS);
    if (pair < 0 || pair >= WARP_PAIRS) return;
    const int row = threadIdx.x % 32 / 4, at = first + threadIdx.x % 4 * 8;
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (pair == row + 8 * i) {
#pragma unroll
        for (int j = 0; j < 4; j++) k[i][j] = load_piece(newest + (at + 32 * j) * 2, at + 32 * j < g.D);
      }
  }

  __device__ __forceinline__ void take_newest_value(const lola_device_segment &g, const tile_source &from, int first,
                                                    const char *newest) {
    const int pair = from.newest - static_cast<int>(threadIdx.x / 32 * WARP_PAIRS);
    if (pair < 0 || pair >= WARP_PAIRS) return;
    const int quad = threadIdx.x % 4, at = first + threadIdx.x % 32 / 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (pair == 2 * quad + i % 2 + i / 2 * 8) {
#pragma unroll
        for (int j = 0; j < 2; j++) v[i][j] = load_piece(newest + (g.D + at + 64 * j) * 2, at + 64 * j < g.Dv);
      }
  }
};

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

/* A tile for query heads head .. head + heads - 1; a partial each. */
template <typename T>
__device__ __forceinline__ void attend_matrix(const lola_device_segment &g, const decode_plan &plan,
                                              const lola_device_span &span, const tile_source &from, int head,
                                              int heads, char *shared, const tile_target &to) {
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  char *queries = shared + plan.queries_at, *newest = shared + plan.newest_at;
  float *merge = reinterpret_cast<float *>(shared + plan.merge_at);
  float *sums = reinterpret_cast<float *>(shared + plan.sums_at);
  const int pitch = merge_pitch(g.Dv);

  lane_pairs pairs;
  pairs.find(g, from);
  pairs.load_keys(g, 0);
  pairs.load_values(g, 0);
  stage_queries<T>(g, plan, span, head, heads, queries);
  if (from.newest >= 0) stage_newest<T>(g, from, newest);
  __syncthreads();
  pairs.take_newest_key(g, from, 0, newest);
  pairs.take_newest_value(g, from, 0, newest);

#pragma unroll 1
  for (int first = 0; first < heads; first += MATRIX_HEADS) {
    if (first) __syncthreads(); /* the last heads' sums were read */
    const int left = min(heads - first, MATRIX_HEADS);

    float s[2][4] = {};
    const char *query = queries + (first + row) * query_pitch(g.D) + quad * 2 * PIECE;
#pragma unroll 1
    for (int d = 0; d < g.D; d += SPAN) {
      if (d || (first && g.D > SPAN)) {
        pairs.load_keys(g, d);
        pairs.take_newest_key(g, from, d, newest);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (d + 32 * j >= g.D) break;
        const uint4 *q = reinterpret_cast<const uint4 *>(query + (d + 32 * j) * 4);
        const uint4 q0 = q[0], q1 = q[1];
        const unsigned a0[4] = {q0.x, q0.y, q0.z, q0.w}, a1[4] = {q1.x, q1.y, q1.z, q1.w};
#pragma unroll
        for (int i = 0; i < 2; i++) {
          mma<T>(s[i], a0, pairs.k[i][j].x, pairs.k[i][j].y);
          mma<T>(s[i], a1, pairs.k[i][j].z, pairs.k[i][j].w);
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
    const int place = warp * MATRIX_HEADS + row;
    if (quad == 0 && row < left) *reinterpret_cast<float2 *>(sums + place * 2) = make_float2(high, sum);

#pragma unroll 1
    for (int column = 0; column < g.Dv; column += SPAN) {
      if (column || (first && g.Dv > SPAN)) {
        pairs.load_values(g, column);
        pairs.take_newest_value(g, from, column, newest);
      }
#pragma unroll
      for (int j = 0; j < 2; j++) {
        if (column + 64 * j >= g.Dv) break;
        float o[16];
        weigh_values<T>(p, pairs.v, j, o);
        if (row < left) store_floats<16>(merge + place * pitch + column + 64 * j + 16 * quad, o);
      }
    }
    __syncthreads();
    merge_warps(plan, merge, pitch, sums, MATRIX_HEADS, first, left, to);
  }
}

} // namespace

#endif
