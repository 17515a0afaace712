/* Kernels of one stream whose launches overlap (programmatic dependent launch, sm_90 and later): a kernel launched with
 * lola_cuda_launch_chained may start once every block of the kernel before it has called lola_device_start_next or has
 * ended. It must call lola_device_await_previous in every block before it reads anything that an earlier kernel writes
 * and before it writes anything at all; that waits for the whole of the kernel before it, memory included, and so, as
 * that one has waited in its turn, for all before. What comes earlier may only work out indices and ask for prefetches.
 * A kernel launched the ordinary way waits by itself; on older devices both functions are empty and launches ordinary.
 *
 * lola_device_start_next comes after lola_device_await_previous, but in a commit of sparse slots, in decoding's scan,
 * which hold nobody up, and in kernels beside others, those of a large decoding step among them: these wait for the
 * step's begin instead (decode_rows.cuh), and only its first kernel, an update or decode_begin_kernel, awaits all
 * before. Behind features and a scan, where an update takes these, decoding's main kernel starts no sooner than the
 * scan, and this when features has begun behind its wait. In a small step the update lets the next kernel start before
 * it awaits the last step, so that this one asks for what it can meanwhile. An update looks for something to do before
 * it awaits the last step: it relies on all that counts tokens having ended before it starts, but one step. So a commit
 * with which a call ends does not let the next kernel start before; and a large step's last kernel starts when the main
 * kernel knows of the begin, that is, when the step before has ended.
 *
 * Kernels may also run beside the one before them, on multiprocessors that it leaves free: behind a kernel that lets
 * the next one start when all of its blocks run, and no sooner than it has awaited all before it, come one or more that
 * do not await it (lola_device_begin and lola_device_end, `beside`). They may touch nothing that any of the others
 * writes, and write nothing that any of them touches; whatever came before these has ended. The last block of each
 * awaits the kernel before it after its own work: so who awaits the last of them has awaited them all. */
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

/* The beginning of a kernel that may run beside the one before it. The fence keeps it from reading what its
 * multiprocessor may still hold of memory that has been written since: awaiting does so otherwise. */
static __device__ __forceinline__ void lola_device_begin(int beside) {
  if (beside)
    __threadfence();
  else
    lola_device_await_previous();
  lola_device_start_next();
}

/* And its end, in every block: the last one to start is the one to wait. */
static __device__ __forceinline__ void lola_device_end(int beside) {
  if (beside && blockIdx.x + 1 == gridDim.x) lola_device_await_previous();
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

/* A launch of clusters of `cluster` blocks along x, chained; `attributes` must live as long as it. */
static inline cudaLaunchConfig_t lola_cuda_cluster_launch(const void *kernel, dim3 blocks, int cluster, int threads,
                                                          int64_t shared_bytes, cudaStream_t stream,
                                                          cudaLaunchAttribute (&attributes)[2]) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1 + lola_cuda_chain_attribute(kernel, &attributes[1]);
  return config;
}

/* Launches a kernel chained, or the ordinary way. */
template <class... P, class... A>
cudaError_t lola_cuda_launch(bool chained, void (*kernel)(P...), unsigned blocks, int threads, int64_t shared_bytes,
                             cudaStream_t stream, A... arguments) {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = chained ? lola_cuda_chain_attribute(reinterpret_cast<const void *>(kernel), &attribute) : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

template <class... P, class... A>
cudaError_t lola_cuda_launch_chained(void (*kernel)(P...), unsigned blocks, int threads, int64_t shared_bytes,
                                     cudaStream_t stream, A... arguments) {
  return lola_cuda_launch(true, kernel, blocks, threads, shared_bytes, stream, arguments...);
}

#endif
