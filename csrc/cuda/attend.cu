/* attend: softmax over window and sparse pairs, mixed with the linear term (Eq. 14), for all chunks of a segment at
 * once.
 *
 * Three kernels of one meaning, the first that can run is taken:
 *   wgmma    16-bit, D = Dv = 64 or 128, Hopper; attend_wgmma.cuh
 *   mma      16-bit, D and Dv multiples of 16 up to 256; attend_mma.cuh
 *   generic  all types and sizes, float32 sums and products; attend_generic.cuh
 * A row of a kernel's matrices is a (token, query head) of a set, so that the heads that share pairs share their loads.
 * Logits, sums and the mix with recalled / z are float32; the fast kernels round exponentials to the values' type.
 * Launched chained beside a scan, and else the ordinary way: blocks that only wait would hold multiprocessors that
 * others could use. */
#include "attend_generic.cuh"
#include "attend_mma.cuh"
#include "attend_wgmma.cuh"
#include "device.cuh"
#include "steps.cuh"

namespace {

/* The first kernel that may be taken: 0 wgmma, 1 mma, 2 generic. To compare them. */
int first_choice = 0;

/* Rows of an array can be read 16 bytes at a time. Strides over axes of one entry say nothing. */
bool aligned(const lola_array &array, bool batched, bool headed) {
  int64_t pieces = 16 / lola_device_item(array.dtype);
  return reinterpret_cast<uintptr_t>(array.data) % 16 == 0 && array.stride_t % pieces == 0 &&
         (!batched || array.stride_b % pieces == 0) && (!headed || array.stride_h % pieces == 0);
}

logit_scale scale_of(float scale) {
  float factor = scale * LOG2E;
  if (factor == 0) return logit_scale{1, 0, 0};
  return logit_scale{factor < 0 ? -factor : factor, 0xffffffffu, factor < 0 ? 0x80008000u : 0};
}

/* The blocks of queries of a segment: at most this many parts for each chunk record and set. */
struct segment_grid {
  int64_t lists; /* chunk records * sets */
  int parts;     /* blocks of BLOCK_TOKENS tokens of a chunk */
  int rows;      /* tokens * heads of a block, at most */
};

segment_grid grid_of(const lola_device_segment &g) {
  int64_t tokens = g.C < g.tokens ? g.C : g.tokens;
  segment_grid grid;
  grid.lists = static_cast<int64_t>(g.chunk_records) * g.S;
  grid.parts = static_cast<int>((tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
  grid.rows = static_cast<int>(tokens < BLOCK_TOKENS ? tokens : BLOCK_TOKENS) * g.rs;
  return grid;
}

lola_status too_large(lola_message *message) {
  return lola_fail(message, LOLA_VALUE_ERROR, "attend: too many tokens and heads in one call: pass fewer at a time");
}

int attribute(cudaDeviceAttr name) {
  int device, value = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, name, device);
  return value;
}

template <typename T, int DP, int MT, int BN, int BLOCKS>
lola_status launch_mma(const lola_device_segment &g, const segment_grid &grid, int beside, cudaStream_t stream,
                       lola_message *message) {
  using layout = mma_layout<DP, MT, BN>;
  int tiles = (grid.rows + layout::M - 1) / layout::M;
  int64_t blocks = grid.lists * grid.parts * tiles;
  if (blocks > INT32_MAX) return too_large(message);
  auto kernel = attend_mma_kernel<T, DP, MT, BN, BLOCKS>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout::BYTES);
  cudaError_t error = lola_cuda_launch(beside, kernel, static_cast<unsigned>(blocks), MMA_THREADS, layout::BYTES,
                                       stream, g, scale_of(g.scale), grid.parts, tiles, beside);
  return lola_cuda_launched(error, "attend_mma", message);
}

template <typename T>
lola_status choose_mma(const lola_device_segment &g, const segment_grid &grid, int beside, cudaStream_t stream,
                       lola_message *message) {
  int size = g.D > g.Dv ? g.D : g.Dv;
  bool few = grid.rows <= 64;
  if (size > 128) return launch_mma<T, 256, 1, 32, 2>(g, grid, beside, stream, message);
  if (size > 64)
    return few ? launch_mma<T, 128, 1, 64, 3>(g, grid, beside, stream, message)
               : launch_mma<T, 128, 2, 64, 2>(g, grid, beside, stream, message);
  return few ? launch_mma<T, 64, 1, 64, 4>(g, grid, beside, stream, message)
             : launch_mma<T, 64, 2, 64, 2>(g, grid, beside, stream, message);
}

template <typename T, int DP, int WGS, int SUBS>
lola_status launch_wgmma(const lola_device_segment &g, const segment_grid &grid, int beside, cudaStream_t stream,
                         lola_message *message) {
  using layout = wgmma_layout<DP, WGS, SUBS>;
  int tiles = (grid.rows + layout::M - 1) / layout::M;
  int64_t items = grid.lists * grid.parts * tiles,
          blocks = (beside ? beside : attribute(cudaDevAttrMultiProcessorCount)) * layout::BLOCKS;
  if (items > INT32_MAX) return too_large(message);
  if (blocks > items) blocks = items;
  auto kernel = attend_wgmma_kernel<T, DP, WGS, SUBS>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout::BYTES);
  cudaError_t error = lola_cuda_launch(beside, kernel, static_cast<unsigned>(blocks), layout::THREADS, layout::BYTES,
                                       stream, g, scale_of(g.scale), grid.parts, tiles, items, beside);
  return lola_cuda_launched(error, "attend_wgmma", message);
}

/* Blocks of 64, 128 or 256 rows: the more rows, the fewer copies of the same pairs. 256 rows take about 0.8 times as
 * long as twice 128. */
template <typename T, int DP>
lola_status choose_wgmma(const lola_device_segment &g, const segment_grid &grid, int beside, cudaStream_t stream,
                         lola_message *message) {
  if (grid.rows <= 64) return launch_wgmma<T, DP, 1, 1>(g, grid, beside, stream, message);
  int halves = (grid.rows + 127) / 128, wholes = (grid.rows + 255) / 256;
  if (wholes * 2 * 4 <= halves * 5) return launch_wgmma<T, DP, 2, 2>(g, grid, beside, stream, message);
  return launch_wgmma<T, DP, 2, 1>(g, grid, beside, stream, message);
}

bool has_mma(const lola_device_segment &g) {
  return first_choice < 2 && g.dtype != LOLA_FLOAT32 && g.dtype == g.q_dtype && g.D % 16 == 0 && g.Dv % 16 == 0 &&
         g.D <= 256 && g.Dv <= 256 && aligned(g.k, g.B > 1, g.Hkv > 1) && aligned(g.v, g.B > 1, g.Hkv > 1);
}

/* Whether this device runs code that was compiled for its own instructions. */
bool has_wgmma(const lola_device_segment &g) {
  if (first_choice > 0 || g.D != g.Dv || (g.D != 64 && g.D != 128) || !aligned(g.q, g.B > 1, g.Hq > 1)) return false;
  if (attribute(cudaDevAttrComputeCapabilityMajor) != 9) return false;
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, attend_wgmma_kernel<__nv_bfloat16, 64, 1, 1>) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.maxThreadsPerBlock >= wgmma_layout<64, 1, 1>::THREADS;
}

unsigned generic_grid(int64_t count) { return static_cast<unsigned>(count < INT32_MAX ? count : INT32_MAX); }

} // namespace

lola_status lola_cuda_segment_attend(const lola_device_segment *segment, int beside, cudaStream_t stream,
                                     lola_message *message) {
  const lola_device_segment &g = *segment;
  segment_grid grid = grid_of(g);
  if (!grid.lists || !grid.parts || !g.B) return LOLA_OK;
  if (has_mma(g)) {
    bool half = g.dtype == LOLA_FLOAT16;
    if (has_wgmma(g) && g.D == 128)
      return half ? choose_wgmma<__half, 128>(g, grid, beside, stream, message)
                  : choose_wgmma<__nv_bfloat16, 128>(g, grid, beside, stream, message);
    if (has_wgmma(g))
      return half ? choose_wgmma<__half, 64>(g, grid, beside, stream, message)
                  : choose_wgmma<__nv_bfloat16, 64>(g, grid, beside, stream, message);
    return half ? choose_mma<__half>(g, grid, beside, stream, message)
                : choose_mma<__nv_bfloat16>(g, grid, beside, stream, message);
  }
  int64_t blocks = grid.lists * grid.parts * g.rs;
  cudaError_t error = lola_cuda_launch(beside, attend_generic_kernel<segment_blocks>, generic_grid(blocks),
                                       GENERIC_THREADS, 0, stream, segment_blocks{g, grid.parts}, blocks, beside);
  return lola_cuda_launched(error, "attend_generic", message);
}

lola_status lola_cuda_attend(const lola_attend_call *call, int device, void *stream, lola_message *message) {
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  int64_t parts = (call->T + BLOCK_TOKENS - 1) / BLOCK_TOKENS, blocks = call->B * call->Hq * parts;
  if (!blocks || !call->Dv) return LOLA_OK;
  if (parts > INT32_MAX) return too_large(message);
  cudaError_t error =
      lola_cuda_launch(false, attend_generic_kernel<step_blocks>, generic_grid(blocks), GENERIC_THREADS, 0,
                       static_cast<cudaStream_t>(stream), step_blocks{*call, static_cast<int>(parts)}, blocks, 0);
  return lola_cuda_launched(error, "attend_generic", message);
}
