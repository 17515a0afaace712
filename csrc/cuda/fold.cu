/* fold: a pair moves into the hidden state, for good (Eq. 12): H += phi(k) v^T, s += phi(k).
 *
 * lola.kernels.fold on device arrays: fk (B, S, Hq, F), v (B, S, Hs, Dv) into H (B, Hq, F, Dv) and s (B, Hq, F) in
 * place, float32, the first count[b, h of Hs] pairs. A block owns 64 x 64 elements of one H, a 4 x 4 tile per thread;
 * each element is one chain of multiply-adds from its old value in ascending order of pairs, whatever the sizes. */
#include "device.cuh"
#include "segment.cuh"
#include "steps.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int ROWS = 64, COLUMNS = 64, DEPTH = 16; /* of a tile: features, columns of H; pairs at a time */

struct fold_arguments {
  lola_array fk, v;
  float *H, *s;
  const int64_t *count;
  int64_t S, Hq, Hs, F, Dv, row_tiles, column_tiles;
};

__global__ void __launch_bounds__(THREADS) fold_kernel(const __grid_constant__ fold_arguments a) {
  __shared__ __align__(16) float phi[DEPTH][ROWS], value[DEPTH][COLUMNS];
  const int64_t tiles = a.row_tiles * a.column_tiles, tile = blockIdx.x % tiles, state = blockIdx.x / tiles;
  const int64_t b = state / a.Hq, head = state % a.Hq, set = head / (a.Hq / a.Hs);
  const int64_t row = tile / a.column_tiles * ROWS, column = tile % a.column_tiles * COLUMNS;
  int64_t n = a.count ? a.count[b * a.Hs + set] : a.S;
  n = n < 0 ? 0 : n > a.S ? a.S : n;
  float *hidden = a.H + state * a.F * a.Dv, *normalizer = a.s + state * a.F;

  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16; /* rows 4 ty .. 4 ty + 3, columns 4 tx .. 4 tx + 3 */
  float sum[4][4] = {};
  const bool sums_phi = column == 0 && threadIdx.x < ROWS && row + threadIdx.x < a.F;
  float total = sums_phi ? normalizer[row + threadIdx.x] : 0;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (row + ty * 4 + i < a.F && column + tx * 4 + j < a.Dv)
        sum[i][j] = hidden[(row + ty * 4 + i) * a.Dv + column + tx * 4 + j];

  for (int64_t first = 0; first < n; first += DEPTH) {
    for (int i = threadIdx.x; i < DEPTH * ROWS; i += THREADS) {
      const int pair = i / ROWS, f = i % ROWS;
      const bool inside = first + pair < n && row + f < a.F;
      phi[pair][f] = inside ? lola_device_load(lola_device_at(a.fk, b, first + pair, head), row + f, a.fk.dtype) : 0;
    }
    for (int i = threadIdx.x; i < DEPTH * COLUMNS; i += THREADS) {
      const int pair = i / COLUMNS, c = i % COLUMNS;
      const bool inside = first + pair < n && column + c < a.Dv;
      value[pair][c] = inside ? lola_device_load(lola_device_at(a.v, b, first + pair, set), column + c, a.v.dtype) : 0;
    }
    __syncthreads();
    const int pairs = static_cast<int>(n - first < DEPTH ? n - first : DEPTH);
    for (int k = 0; k < pairs; k++) {
      const float4 x = *reinterpret_cast<const float4 *>(&phi[k][ty * 4]);
      const float4 y = *reinterpret_cast<const float4 *>(&value[k][tx * 4]);
      const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] = fmaf(xs[i], ys[j], sum[i][j]);
      if (sums_phi) total += phi[k][threadIdx.x];
    }
    __syncthreads();
  }

  if (sums_phi) normalizer[row + threadIdx.x] = total;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (row + ty * 4 + i < a.F && column + tx * 4 + j < a.Dv)
        hidden[(row + ty * 4 + i) * a.Dv + column + tx * 4 + j] = sum[i][j];
}

} // namespace

lola_status lola_cuda_fold(const lola_array *fk, const lola_array *v, float *H, float *s, const int64_t *count,
                           int64_t B, int64_t S, int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, int device,
                           void *stream, lola_message *message) {
  const int64_t row_tiles = (F + ROWS - 1) / ROWS, column_tiles = (Dv + COLUMNS - 1) / COLUMNS;
  if (!B || !S || !Hq || !F || !Dv) return LOLA_OK;
  if (B > INT64_C(0x7fffffff) / Hq / row_tiles / column_tiles)
    return lola_fail(message, LOLA_VALUE_ERROR,
                     "H of %lld rows, %lld heads and %lld x %lld is too large for one call: pass fewer rows at a time",
                     static_cast<long long>(B), static_cast<long long>(Hq), static_cast<long long>(F),
                     static_cast<long long>(Dv));
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  const fold_arguments a = {*fk, *v, H, s, count, S, Hq, Hs, F, Dv, row_tiles, column_tiles};
  fold_kernel<<<static_cast<unsigned>(B * Hq * row_tiles * column_tiles), THREADS, 0,
                static_cast<cudaStream_t>(stream)>>>(a);
  return lola_cuda_launched("fold", message);
}
