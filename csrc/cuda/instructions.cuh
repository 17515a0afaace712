/* The machine instructions that kernels are made of, each as a function of its name.
 *
 * Shared memory tiles of 16-bit elements, here and in the kernels: columns in panels of 64, a panel is rows of 128
 * bytes one after the other, and the 16-byte piece c of row i lies at c ^ (i & 7), so that eight rows of one piece hit
 * all banks. It is the layout that wgmma calls 128-byte swizzle; a tile begins at a multiple of 1024 bytes. */
#ifndef LOLA_CUDA_INSTRUCTIONS_CUH
#define LOLA_CUDA_INSTRUCTIONS_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace {

/* Byte offset of 16-byte piece c of row i in a tile of `rows` rows. */
__device__ __forceinline__ uint32_t tile_offset(int rows, int i, int c) {
  return (c >> 3) * rows * 128 + i * 128 + (((c & 7) ^ (i & 7)) << 4);
}

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/* 2^x to 2 units in the last place; 0 below 2^-126. */
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T> __device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t y;
  if constexpr (sizeof(T) == 2 && __is_same(T, __half))
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

/* --- matrices of a warp: mma.sync, sm_80 and later ---------------------------------------------------------------- */

/* Four 8x8 matrices; lanes 8i .. 8i+7 give the rows of matrix i. */
__device__ __forceinline__ void ldmatrix(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

/* C (16 x 8) += A (16 x 16) B (16 x 8). */
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, __half))
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Word j of lane i of a quad becomes word i of lane j. Results of which lane i holds columns 2i and 2i + 1 of each 8 so
 * become its 8 columns of group i, and the other way around. For a whole warp. */
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
  uint32_t a = __shfl_xor_sync(0xffffffffu, high ? x[0] : x[2], 2);
  uint32_t b = __shfl_xor_sync(0xffffffffu, high ? x[1] : x[3], 2);
  const uint32_t y[4] = {high ? a : x[0], high ? b : x[1], high ? x[2] : a, high ? x[3] : b};
  a = __shfl_xor_sync(0xffffffffu, odd ? y[0] : y[1], 1);
  b = __shfl_xor_sync(0xffffffffu, odd ? y[2] : y[3], 1);
  x[0] = odd ? a : y[0];
  x[1] = odd ? y[1] : a;
  x[2] = odd ? b : y[2];
  x[3] = odd ? y[3] : b;
}

/* --- copies from device to shared memory that nobody waits for at once -------------------------------------------- */

__device__ __forceinline__ void cp_async(uint32_t target, const void *source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits for this thread's copies up to its last commit. */
template <int GROUPS> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

/* Waits for all of them, committed or not. */
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void prefetch_l2(const void *address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

/* --- what blocks tell each other through device memory ------------------------------------------------------------ */

__device__ __forceinline__ unsigned load_signal(const unsigned *signal) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(signal)) : "memory");
  return x;
}

__device__ __forceinline__ void store_signal(unsigned *signal, unsigned x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(signal)), "r"(x) : "memory");
}

__device__ __forceinline__ void add_signal(unsigned *signal, unsigned x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(signal)), "r"(x) : "memory");
}

/* --- Hopper: barriers in shared memory and matrices of a warpgroup (4 warps) ------------------------------------- */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Arrives once this thread's cp_async so far have landed. */
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/* Waits until the phase of this parity is complete. */
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile("{\n"
               ".reg .pred done;\n"
               "again:\n"
               "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
               "@done bra.uni over;\n"
               "bra.uni again;\n"
               "over:\n"
               "}" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

/* One of the 16 barriers of a block, for `threads` of its threads; 0 is __syncthreads'. */
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* Between what ordinary stores and cp_async wrote and what wgmma reads. */
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int REGISTERS> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* Before the first wgmma and after the registers that one uses were written. */
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

/* Keeps the compiler from moving reads or writes of accumulators past this point. */
template <int N> __device__ __forceinline__ void pin(float (&x)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
}

/* Of a tile in the layout above, at a multiple of 1024 bytes plus whole 8-row groups or 32-byte steps in a row: the low
 * half of its descriptor, the address in units of 16 bytes. `panel` is the bytes between panels where those run along
 * the result's columns. */
__device__ __forceinline__ uint32_t wgmma_matrix(uint32_t address, int panel) {
  return (address & 0x3ffff) >> 4 | static_cast<uint32_t>(panel >> 4) << 16;
}

/* With the half that is the same for all: 1024 bytes between groups of 8 rows, 128-byte swizzle. */
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t matrix) {
  return static_cast<uint64_t>(1u << 30 | 1024 >> 4) << 32 | matrix;
}

#define LOLA_ACCUMULATORS_4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define LOLA_ACCUMULATORS_16(c, i)                                                                                     \
  LOLA_ACCUMULATORS_4(c, i), LOLA_ACCUMULATORS_4(c, i + 1), LOLA_ACCUMULATORS_4(c, i + 2), LOLA_ACCUMULATORS_4(c, i + 3)
#define LOLA_WGMMA_64(type, c, a, b, accumulate, transposed)                                                           \
  asm volatile("{\n"                                                                                                   \
               ".reg .pred p;\n"                                                                                       \
               "setp.ne.b32 p, %37, 0;\n"                                                                              \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                                         \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                     \
               "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n"                                                            \
               "}"                                                                                                     \
               : LOLA_ACCUMULATORS_16(c, 0), LOLA_ACCUMULATORS_16(c, 4)                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(transposed)                  \
               : "memory")
#define LOLA_WGMMA_SHARED_64(type, c, a, b, accumulate)                                                                \
  asm volatile("{\n"                                                                                                   \
               ".reg .pred p;\n"                                                                                       \
               "setp.ne.b32 p, %34, 0;\n"                                                                              \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                                         \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                     \
               "%32, %33, p, 1, 1, 0, 0;\n"                                                                            \
               "}"                                                                                                     \
               : LOLA_ACCUMULATORS_16(c, 0), LOLA_ACCUMULATORS_16(c, 4)                                                \
               : "l"(a), "l"(b), "r"(accumulate)                                                                       \
               : "memory")
#define LOLA_WGMMA_128(type, c, a, b, accumulate, transposed)                                                          \
  asm volatile("{\n"                                                                                                   \
               ".reg .pred p;\n"                                                                                       \
               "setp.ne.b32 p, %69, 0;\n"                                                                              \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                                        \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                      \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                     \
               "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n"                                                            \
               "}"                                                                                                     \
               : LOLA_ACCUMULATORS_16(c, 0), LOLA_ACCUMULATORS_16(c, 4), LOLA_ACCUMULATORS_16(c, 8),                   \
                 LOLA_ACCUMULATORS_16(c, 12)                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(transposed)                  \
               : "memory")

/* C (64 x 8 N) = or += A (64 x 16, registers) B (16 x 8 N, shared memory). TRANSPOSED: the panels of B's tile run along
 * the result's columns, its rows along the sum; else the other way around. */
template <typename T, int TRANSPOSED, int N>
__device__ __forceinline__ void wgmma(float (&c)[N][4], const uint32_t (&a)[4], uint32_t matrix, int accumulate) {
  static_assert(N == 8 || N == 16);
  const uint64_t b = wgmma_descriptor(matrix);
  if constexpr (N == 8 && __is_same(T, __half)) LOLA_WGMMA_64("f16", c, a, b, accumulate, TRANSPOSED);
  if constexpr (N == 8 && !__is_same(T, __half)) LOLA_WGMMA_64("bf16", c, a, b, accumulate, TRANSPOSED);
  if constexpr (N == 16 && __is_same(T, __half)) LOLA_WGMMA_128("f16", c, a, b, accumulate, TRANSPOSED);
  if constexpr (N == 16 && !__is_same(T, __half)) LOLA_WGMMA_128("bf16", c, a, b, accumulate, TRANSPOSED);
}

/* The same for N = 8 with A in shared memory as well, its panels along the sum as B's. */
template <typename T>
__device__ __forceinline__ void wgmma_shared(float (&c)[8][4], uint32_t left, uint32_t right, int accumulate) {
  const uint64_t a = wgmma_descriptor(left), b = wgmma_descriptor(right);
  if constexpr (__is_same(T, __half))
    LOLA_WGMMA_SHARED_64("f16", c, a, b, accumulate);
  else
    LOLA_WGMMA_SHARED_64("bf16", c, a, b, accumulate);
}

#undef LOLA_WGMMA_64
#undef LOLA_WGMMA_SHARED_64
#undef LOLA_WGMMA_128
#undef LOLA_ACCUMULATORS_16
#undef LOLA_ACCUMULATORS_4

#endif

} // namespace

#endif
