/* select: the pairs with the highest scores stay; a tie keeps the earlier position.
 *
 * lola.kernels.select on device arrays: scores (B, S, Hs) -> kept (B, Hs, keep) and dropped (B, Hs, S - keep) indices,
 * ascending, padded with -1, of the first count[b, h] pairs. One block per (b, h): radix select on the float's bits,
 * ordered as numbers (-0 = +0, NaN highest), finds the highest key that is dropped and how many equal to it stay; one
 * more walk in order of index writes both lists. */
#include "device.cuh"
#include "segment.cuh"
#include "steps.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;

/* A key that orders as the score does; lola_score_key of the CPU. */
__device__ __forceinline__ uint32_t score_key(float score) {
  if (score != score) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(score + 0.0f); /* -0 + 0 = +0 */
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* How many threads before this one have `flag`, and in *all how many of the block. */
__device__ __forceinline__ int count_before(bool flag, int *counts, int *all) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned set = __ballot_sync(ALL, flag);
  if (lane == 0) counts[warp] = __popc(set);
  __syncthreads();
  int before = __popc(set & ((1u << lane) - 1)), total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    before += w < warp ? counts[w] : 0;
    total += counts[w];
  }
  __syncthreads();
  *all = total;
  return before;
}

struct select_arguments {
  const float *scores;
  const int64_t *count;
  int64_t S, Hs, keep;
  int64_t *kept, *dropped;
};

__global__ void __launch_bounds__(THREADS) select_kernel(const __grid_constant__ select_arguments a) {
  __shared__ unsigned long long histogram[256];
  __shared__ int counts[WARPS];
  __shared__ uint32_t prefix;
  __shared__ int64_t place;
  const int64_t group = blockIdx.x, b = group / a.Hs, h = group % a.Hs;
  const float *scores = a.scores + b * a.S * a.Hs + h;
  int64_t *kept = a.kept + group * a.keep, *dropped = a.dropped + group * (a.S - a.keep);
  int64_t n = a.count ? a.count[group] : a.S;
  n = n < 0 ? 0 : n > a.S ? a.S : n;
  const int64_t drops = n > a.keep ? n - a.keep : 0;

  /* The key at place drops - 1 from the lowest, a byte at a time; then `place` counts the equal ones that go, less 1.
   */
  if (threadIdx.x == 0) {
    prefix = 0;
    place = drops - 1;
  }
  for (int shift = 24; drops && shift >= 0; shift -= 8) {
    histogram[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t known = shift == 24 ? 0 : 0xffffffffu << (shift + 8), found = prefix;
    for (int64_t i = threadIdx.x; i < n; i += THREADS) {
      const uint32_t key = score_key(scores[i * a.Hs]);
      if ((key & known) == found) atomicAdd(&histogram[key >> shift & 255], 1ull);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t rank = place;
      int byte = 0;
      while (byte < 255 && rank >= static_cast<int64_t>(histogram[byte]))
        rank -= static_cast<int64_t>(histogram[byte++]);
      place = rank;
      prefix = found | static_cast<uint32_t>(byte) << shift;
    }
    __syncthreads();
  }
  __syncthreads();
  const uint32_t threshold = prefix;
  const int64_t ties = place + 1; /* of the pairs at the threshold, the latest `ties` go */

  int64_t equal = 0;
  if (drops) { /* how many there are */
    if (threadIdx.x == 0) histogram[0] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += THREADS)
      if (score_key(scores[i * a.Hs]) == threshold) atomicAdd(&histogram[0], 1ull);
    __syncthreads();
    equal = static_cast<int64_t>(histogram[0]);
  }
  const int64_t stay = equal - ties;

  int64_t seen = 0, kept_count = 0; /* at the threshold; kept: before this round */
  for (int64_t first = 0; first < n; first += THREADS) {
    const int64_t i = first + threadIdx.x;
    const uint32_t key = i < n ? score_key(scores[i * a.Hs]) : 0;
    int all, before = count_before(drops && i < n && key == threshold, counts, &all);
    const bool drop = drops && (key < threshold || (key == threshold && seen + before >= stay));
    seen += all;
    before = count_before(i < n && !drop, counts, &all);
    if (i < n) {
      if (drop)
        dropped[i - (kept_count + before)] = i;
      else
        kept[kept_count + before] = i;
    }
    kept_count += all;
  }
  for (int64_t i = kept_count + threadIdx.x; i < a.keep; i += THREADS) kept[i] = -1;
  for (int64_t i = n - kept_count + threadIdx.x; i < a.S - a.keep; i += THREADS) dropped[i] = -1;
}

} // namespace

lola_status lola_cuda_select(const float *scores, const int64_t *count, int64_t B, int64_t S, int64_t Hs, int64_t keep,
                             int64_t *kept, int64_t *dropped, int device, void *stream, lola_message *message) {
  if (keep > S) keep = S;
  if (!B || !S || !Hs) return LOLA_OK;
  if (B > INT64_C(0x7fffffff) / Hs)
    return lola_fail(message, LOLA_VALUE_ERROR,
                     "scores of %lld rows and %lld heads are too large for one call: pass fewer at a time",
                     static_cast<long long>(B), static_cast<long long>(Hs));
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  const select_arguments a = {scores, count, S, Hs, keep, kept, dropped};
  select_kernel<<<static_cast<unsigned>(B * Hs), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return lola_cuda_launched("select", message);
}
