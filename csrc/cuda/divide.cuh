/* Division by a number that the host knows. */
#ifndef LOLA_CUDA_DIVIDE_CUH
#define LOLA_CUDA_DIVIDE_CUH

#include <cstdint>

namespace {

/* For 1 <= d < 2^31 and x < 2^32, x / d is the upper half of x * ceil(2^64 / d). */
struct divisor {
  uint64_t inverse; /* 0 for d = 1, and where d is too large */
  int64_t d;
};

inline divisor divisor_of(int64_t d) { return divisor{d > 0 ? UINT64_MAX / static_cast<uint64_t>(d) + 1 : 0, d}; }

__device__ __forceinline__ unsigned divided(unsigned x, const divisor &by) {
  return by.inverse ? static_cast<unsigned>(__umul64hi(by.inverse, x)) : x;
}

/* The same for a position, however far; `small` when everything fits 31 bits. */
__device__ __forceinline__ int64_t divided(int64_t x, const divisor &by, bool small) {
  if (small) return divided(static_cast<unsigned>(x), by);
  return x / by.d;
}

} // namespace

#endif
