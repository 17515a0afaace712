/* score: self-recall error, how badly the hidden state recalls a pair (Eq. 10):
 * SRE(k, v | H, s) = || phi(k)^T H / (phi(k)^T s) - v ||^2, and ||v||^2 where phi(k)^T s = 0.
 *
 * lola.kernels.score on device arrays: fk (B, S, Hq, F), v (B, S, Hs, Dv), H (B, Hq, F, Dv), s (B, Hq, F) -> out
 * (B, S, Hq), float32 throughout. A block takes 64 pairs of one query head and walks the columns of H, 64 at a time: a
 * 4 x 4 tile per thread, one chain of multiply-adds in ascending f per element, the errors added up per pair as the
 * columns pass. So a score's bits depend on its pair and the state alone. */
#include "device.cuh"
#include "segment.cuh"
#include "steps.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int PAIRS = 64, COLUMNS = 64, DEPTH = 16; /* of a tile: pairs, columns of H, features at a time */
constexpr unsigned ALL = 0xffffffffu;

struct score_arguments {
  lola_array fk, v;
  const float *H, *s;
  float *out;
  int64_t S, Hq, Hs, F, Dv, parts;
};

__global__ void __launch_bounds__(THREADS) score_kernel(const __grid_constant__ score_arguments a) {
  __shared__ __align__(16) float phi[DEPTH][PAIRS + 4], H[DEPTH][COLUMNS];
  __shared__ float z[PAIRS];
  const int64_t head = blockIdx.x % a.Hq, part = blockIdx.x / a.Hq % a.parts, b = blockIdx.x / a.Hq / a.parts;
  const int64_t first = part * PAIRS;
  const int count = static_cast<int>(a.S - first < PAIRS ? a.S - first : PAIRS);
  const float *hidden = a.H + (b * a.Hq + head) * a.F * a.Dv, *normalizer = a.s + (b * a.Hq + head) * a.F;
  const int64_t set = head / (a.Hq / a.Hs);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  /* z = phi^T s, a warp per pair. */
  for (int i = warp; i < PAIRS; i += THREADS / 32) {
    float sum = 0;
    if (i < count) {
      const char *row = lola_device_at(a.fk, b, first + i, head);
      for (int64_t f = lane; f < a.F; f += 32) sum = fmaf(lola_device_load(row, f, a.fk.dtype), normalizer[f], sum);
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(ALL, sum, offset);
    if (lane == 0) z[i] = sum;
  }
  __syncthreads();

  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16; /* pairs 4 ty .. 4 ty + 3, columns 4 tx .. 4 tx + 3 */
  float lift[4], inverse[4], error[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    /* 1 / z overflows for a z near the smallest float: lift both sides first. */
    const float y = z[ty * 4 + i];
    lift[i] = y < 1e-30f ? 0x1p64f : 1;
    inverse[i] = y == 0 ? 0 : 1 / (y * lift[i]);
    if (y == 0) lift[i] = 0;
  }
  for (int64_t column = 0; column < a.Dv; column += COLUMNS) {
    float n[4][4] = {};
    for (int64_t from = 0; from < a.F; from += DEPTH) {
      for (int i = threadIdx.x; i < DEPTH * PAIRS; i += THREADS) {
        const int pair = i / DEPTH, f = i % DEPTH;
        const bool inside = pair < count && from + f < a.F;
        phi[f][pair] = inside ? lola_device_load(lola_device_at(a.fk, b, first + pair, head), from + f, a.fk.dtype) : 0;
      }
      for (int i = threadIdx.x; i < DEPTH * COLUMNS; i += THREADS) {
        const int f = i / COLUMNS, c = i % COLUMNS;
        const bool inside = from + f < a.F && column + c < a.Dv;
        H[f][c] = inside ? hidden[(from + f) * a.Dv + column + c] : 0;
      }
      __syncthreads();
#pragma unroll
      for (int f = 0; f < DEPTH; f++) {
        const float4 x = *reinterpret_cast<const float4 *>(&phi[f][ty * 4]);
        const float4 y = *reinterpret_cast<const float4 *>(&H[f][tx * 4]);
        const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) n[i][j] = fmaf(xs[i], ys[j], n[i][j]);
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (ty * 4 + i >= count) continue;
      const char *v = lola_device_at(a.v, b, first + ty * 4 + i, set);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int64_t c = column + tx * 4 + j;
        if (c >= a.Dv) continue;
        const float recalled = lift[i] == 0 ? 0 : n[i][j] * lift[i] * inverse[i];
        const float d = recalled - lola_device_load(v, c, a.v.dtype);
        error[i] = fmaf(d, d, error[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int offset = 8; offset; offset /= 2) error[i] += __shfl_xor_sync(ALL, error[i], offset);
    if (tx == 0 && ty * 4 + i < count) a.out[(b * a.S + first + ty * 4 + i) * a.Hq + head] = error[i];
  }
}

} // namespace

lola_status lola_cuda_score(const lola_array *fk, const lola_array *v, const float *H, const float *s, int64_t B,
                            int64_t S, int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, float *out, int device,
                            void *stream, lola_message *message) {
  const int64_t parts = (S + PAIRS - 1) / PAIRS;
  if (!B || !S || !Hq) return LOLA_OK;
  if (B > INT64_C(0x7fffffff) / Hq / parts)
    return lola_fail(message, LOLA_VALUE_ERROR,
                     "fk of %lld x %lld pairs and %lld heads is too large for one call: pass fewer at a time",
                     static_cast<long long>(B), static_cast<long long>(S), static_cast<long long>(Hq));
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  const score_arguments a = {*fk, *v, H, s, out, S, Hq, Hs, F, Dv, parts};
  score_kernel<<<static_cast<unsigned>(B * Hq * parts), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return lola_cuda_launched("score", message);
}
