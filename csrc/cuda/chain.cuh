/* Kernels of one stream whose launches overlap (programmatic dependent launch, sm_90 and later): a kernel launched with
 * lola_cuda_launch_chained may start once every block of the kernel before it has called lola_device_start_next or has
 * ended. It must call lola_device_await_previous in every block before it reads anything that an earlier kernel writes
 * and before it writes anything at all; that waits for the whole of the kernel before it, memory included, and so, as
 * that one has waited in its turn, for all before. What comes earlier may only work out indices and ask for prefetches.
 * A kernel launched the ordinary way waits by itself; on older devices both functions are empty and launches ordinary.
 *
 * lola_device_start_next comes after lola_device_await_previous, but in scan and commit, which hold nobody up. Decoding's
 * main kernel comes behind them and builds on it: once it has started, features has begun behind its wait, so all that
 * came before features has ended. */
#ifndef LOLA_CUDA_CHAIN_CUH
#define LOLA_CUDA_CHAIN_CUH

#include <atomic>

#include <cuda_runtime.h>

static __device__ __forceinline__ void lola_device_await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Lets the next kernel of the stream start, if it is launched chained; it still awaits this one. */
static __device__ __forceinline__ void lola_device_start_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Whether kernels of this build wait on the current device: not where older code was translated for a newer device. */
static inline bool lola_cuda_can_chain(const void *kernel) {
  enum { DEVICES = 64, UNKNOWN = 0, NO = 1, YES = 2 };
  static std::atomic<char> known[DEVICES];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= DEVICES) return false;
  char answer = known[device].load(std::memory_order_relaxed);
  if (answer == UNKNOWN) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
      cudaGetLastError();
      return false;
    }
    answer = attributes.ptxVersion >= 90 ? YES : NO;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == YES;
}

/* The attribute of such a launch; how many there are: 1, or 0 for an ordinary one. */
static inline unsigned lola_cuda_chain_attribute(const void *kernel, cudaLaunchAttribute *attribute) {
  attribute->id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute->val.programmaticStreamSerializationAllowed = 1;
  return lola_cuda_can_chain(kernel) ? 1 : 0;
}

template <class... P, class... A>
cudaError_t lola_cuda_launch_chained(void (*kernel)(P...), unsigned blocks, int threads, int64_t shared_bytes,
                                     cudaStream_t stream, A... arguments) {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = lola_cuda_chain_attribute(reinterpret_cast<const void *>(kernel), &attribute);
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

#endif
