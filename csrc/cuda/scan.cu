/* scan: phase 1 of a segment, the memories of each (cache row, head set), chunk by chunk: score E, select, fold.
 *
 *   SRE(k, v | H, s) = || phi(k)^T H / (phi(k)^T s) - v ||^2, and ||v||^2 where phi(k)^T s = 0     (Eq. 10)
 *   H += phi(k) v^T, s += phi(k) for the |E| - L lowest scores                                     (Eq. 12)
 *
 * On Hopper 16-bit caches at the usual sizes go through scan_wgmma.cuh: a cluster of blocks with all pairs in shared
 * memory, which in decoding computes its features too (scan_update.cuh). All other devices, sizes, types and scores go
 * through scan_generic.cuh. Here is what chooses, lays out and launches. */
#include "cuda/scan_generic.cuh"
#include "cuda/scan_update.cuh"
#include "cuda/scan_wgmma.cuh"

namespace {

/* What the planning needs to know of a cache or a segment. */
struct scan_sizes {
  int64_t B, S, rs, Dv, F, L, C;
  lola_dtype dtype;
  lola_score score;
};

struct device_limits {
  int device, processors, shared;
  bool wgmma; /* runs code that was compiled for Hopper's own instructions */
};

lola_status look_up_device(device_limits *limits, lola_message *message) {
  static thread_local device_limits known = {-1, 0, 0, false};
  int device;
  lola_status status = lola_cuda_status(cudaGetDevice(&device), "cudaGetDevice", message);
  if (!status && device != known.device) {
    device_limits found = {device, 0, 0, false};
    int major = 0;
    const struct {
      int *value;
      cudaDeviceAttr name;
    } wanted[] = {{&found.processors, cudaDevAttrMultiProcessorCount},
                  {&found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                  {&major, cudaDevAttrComputeCapabilityMajor}};
    for (const auto &attribute : wanted)
      if (!status)
        status = lola_cuda_status(cudaDeviceGetAttribute(attribute.value, attribute.name, device),
                                  "cudaDeviceGetAttribute", message);
    cudaFuncAttributes attributes = {};
    if (!status && major == 9)
      status = lola_cuda_status(cudaFuncGetAttributes(&attributes, wgmma_scan::kernel_of(LOLA_BFLOAT16, 1, true)),
                                "scan", message);
    found.wgmma = attributes.maxThreadsPerBlock >= wgmma_scan::THREADS;
    if (!status) known = found;
  }
  *limits = known;
  return status;
}

/* Blocks of a kernel that fit on a multiprocessor with `bytes` of shared memory, or clusters of `cluster` blocks on the
 * device. Allows the kernels `most` bytes on the way, always the same, so that calls from other threads do not take it
 * away again. */
lola_status look_up_occupancy(const void *const (&kernels)[2], int device, int threads, int cluster, int64_t bytes,
                              int64_t most, int *fitting, lola_message *message) {
  static thread_local struct {
    const void *kernel;
    int device, cluster, fitting;
    int64_t bytes;
  } known = {nullptr, -1, 0, 0, 0};
  if (known.kernel != kernels[0] || known.device != device || known.cluster != cluster || known.bytes != bytes) {
    int least = INT_MAX;
    for (const void *kernel : kernels) {
      cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
      int found = 0;
      if (error == cudaSuccess && cluster) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        cudaLaunchAttribute attributes[2] = {};
        const cudaLaunchConfig_t config = lola_cuda_cluster_launch(kernel, dim3(static_cast<unsigned>(cluster)),
                                                                   cluster, threads, bytes, nullptr, attributes);
        if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&found, kernel, &config);
      } else if (error == cudaSuccess) {
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, threads, static_cast<size_t>(bytes));
      }
      lola_status status = lola_cuda_status(error, "scan", message);
      if (status) return status;
      if (found < least) least = found;
    }
    known = {kernels[0], device, cluster, least, bytes};
  }
  *fitting = known.fitting;
  return LOLA_OK;
}

/* Lays out shared memory for so many staged pairs; its bytes, without the lists. */
int64_t lay_out_shared(const scan_sizes &sizes, int stage, generic_scan::scan_plan *plan) {
  using namespace generic_scan;
  const bool tensor = sizes.dtype != LOLA_FLOAT32;
  const int64_t rows = (sizes.F + 15) / 16 * 16, pitch = (sizes.F + 63) / 64 * 64;
  const int64_t pieces[5] = {
      rows * COLUMNS * 4,
      rows * 4,
      tensor ? HALF_ROWS * pitch * 2 : 0,
      tensor ? stage * pitch * 2 : stage * sizes.F * 4,
      tensor ? stage * VALUE_PITCH * 2 * (sizes.dtype == LOLA_FLOAT16 ? 2 : 1) : stage * COLUMNS * 4,
  };
  int *const offsets[5] = {&plan->hidden, &plan->normalizer, &plan->halves, &plan->features, &plan->values};
  int64_t used = 0;
  for (int i = 0; i < 5; i++) {
    *offsets[i] = static_cast<int>(used < INT_MAX ? used : INT_MAX);
    used += (pieces[i] + 127) / 128 * 128;
  }
  plan->lists = static_cast<int>(used < INT_MAX ? used : INT_MAX);
  return used;
}

/* Of a kernel's shared memory: what its blocks have at a fixed place, and what it takes to align the rest. */
template <class T> constexpr int fixed_shared = (sizeof(T) + 1023) / 1024 * 1024;

/* How clusters of scan_wgmma.cuh would walk the units; with 0 `groups` where they cannot. */
lola_status make_cluster_plan(const scan_sizes &sizes, const device_limits &limits, wgmma_scan::cluster_plan *plan,
                              lola_message *message) {
  using namespace wgmma_scan;
  *plan = {};
  const int64_t panels = (sizes.F + 63) / 64, slots = (sizes.L + TILE - 1) / TILE * TILE,
                newcomers = (sizes.C + TILE - 1) / TILE * TILE, rows = slots + newcomers;
  const int64_t column_blocks = (sizes.Dv + wgmma_scan::COLUMNS - 1) / wgmma_scan::COLUMNS,
                blocks = sizes.rs * column_blocks;
  if (!limits.wgmma || sizes.dtype == LOLA_FLOAT32 || sizes.score != LOLA_SCORE_SELF_RECALL || !sizes.L || panels > 2 ||
      rows > ROWS_MOST || blocks > BLOCKS_MOST)
    return LOLA_OK;
  plan->panels = static_cast<int>(panels);
  plan->slots = static_cast<int>(slots);
  plan->newcomers = static_cast<int>(newcomers);
  plan->rows = static_cast<int>(rows);
  plan->blocks = static_cast<int>(blocks);
  plan->column_blocks = static_cast<int>(column_blocks);
  plan->identity = LOLA_IDENTITY;
  const int64_t pieces[] = {panels * rows * ROW, panels * wgmma_scan::HALF_ROWS * ROW,
                            newcomers * ROW * (sizes.dtype == LOLA_FLOAT16 ? 2 : 1), blocks * rows * 4,
                            table_bytes(rows, newcomers, panels)};
  int first, *const offsets[] = {&first, &plan->halves, &plan->values, &plan->parts, &plan->tables};
  for (int i = 0; i < 5; i++) {
    *offsets[i] = static_cast<int>(plan->shared_bytes);
    plan->shared_bytes += (pieces[i] + 15) / 16 * 16;
  }
  const int most = limits.shared - fixed_shared<wgmma_scan::cluster_shared>;
  if (plan->shared_bytes > most) return LOLA_OK;
  int clusters;
  lola_status status = look_up_occupancy(
      {wgmma_scan::kernel_of(sizes.dtype, plan->panels, false), wgmma_scan::kernel_of(sizes.dtype, plan->panels, true)},
      limits.device, wgmma_scan::THREADS, plan->blocks, plan->shared_bytes, most, &clusters, message);
  if (status) return status;
  plan->groups = static_cast<int>(clusters < sizes.B * sizes.S ? clusters : sizes.B * sizes.S);
  return LOLA_OK;
}

scan_sizes sizes_of(const lola_device_segment &g) {
  return scan_sizes{g.B, g.S, g.rs, g.Dv, g.F, g.L, g.C, g.dtype, g.score};
}

/* The same of a segment, on the current device. */
lola_status make_cluster_plan(const lola_device_segment &g, device_limits *limits, wgmma_scan::cluster_plan *plan,
                              lola_message *message) {
  const lola_status status = look_up_device(limits, message);
  return status ? status : make_cluster_plan(sizes_of(g), *limits, plan, message);
}

/* How groups of scan_generic.cuh walk them. */
lola_status make_group_plan(const scan_sizes &sizes, const device_limits &limits, generic_scan::scan_plan *plan,
                            lola_message *message) {
  using namespace generic_scan;
  *plan = {};
  plan->column_blocks = static_cast<int>((sizes.Dv + COLUMNS - 1) / COLUMNS);
  plan->pairs = static_cast<int>((sizes.L + sizes.C + 3) / 4 * 4);
  plan->list_bytes = (list_bytes_of(sizes.L, sizes.C) + 127) / 128 * 128;
  const int64_t most =
      limits.shared - static_cast<int64_t>((sizeof(block_shared) + sizeof(select_shared) + 127) / 128 * 128) - 1024;
  /* Long stages and lists in shared memory where they fit: what gives way first costs least. */
  bool fits = false;
  for (int lists_shared = 1; lists_shared >= 0 && !fits; lists_shared--)
    for (int stage = 64; stage >= 16 && !fits; stage /= 4) {
      const int64_t bytes = lay_out_shared(sizes, stage, plan) + (lists_shared ? plan->list_bytes : 0);
      if (bytes > most) continue;
      plan->stage = stage;
      plan->lists_shared = lists_shared;
      plan->shared_bytes = bytes;
      fits = true;
    }
  if (!fits)
    return lola_fail(message, LOLA_VALUE_ERROR,
                     "feature_dim %lld is too large for this device: its state must fit in %d bytes of shared memory",
                     static_cast<long long>(sizes.F), limits.shared);
  int per_processor;
  lola_status status = look_up_occupancy({kernel_of(sizes.dtype, false), kernel_of(sizes.dtype, true)}, limits.device,
                                         THREADS, 0, plan->shared_bytes, most, &per_processor, message);
  if (status) return status;
  const int64_t capacity = static_cast<int64_t>(limits.processors) * per_processor;
  const int64_t group_blocks = sizes.rs * plan->column_blocks;
  if (group_blocks > capacity)
    return lola_fail(message, LOLA_VALUE_ERROR,
                     "%lld query heads that share a sparse cache with value_dim %lld are too many for this device: "
                     "pass sparse_per='query_head'",
                     static_cast<long long>(sizes.rs), static_cast<long long>(sizes.Dv));
  plan->group_blocks = static_cast<int>(group_blocks);
  int64_t groups = capacity / group_blocks;
  if (groups > sizes.B * sizes.S) groups = sizes.B * sizes.S;
  if (groups > LOLA_SCAN_BARRIERS / 2) groups = LOLA_SCAN_BARRIERS / 2;
  plan->groups = static_cast<int>(groups < 1 ? 1 : groups);
  return LOLA_OK;
}

/* Whether rows of phi and values can be read 16 bytes at a time. */
bool reads_vectors(const lola_device_segment &g) {
  return g.dtype == LOLA_FLOAT32 ? g.F % 4 == 0 : g.F % 8 == 0 && g.Dv % 8 == 0 && lola_device_rows_are_aligned(g.v);
}

int64_t exchange_bytes(const generic_scan::scan_plan &plan) {
  const int64_t blocks = static_cast<int64_t>(plan.groups) * plan.group_blocks;
  return (2 * blocks * plan.pairs * 4 + 15) / 16 * 16 + (plan.lists_shared ? 0 : blocks * plan.list_bytes);
}

/* How an update of decoding goes where it computes its features itself; with 0 `groups` where it does not. */
lola_status make_update_plan(const lola_device_segment &g, device_limits *limits, wgmma_scan::cluster_plan *plan,
                             lola_message *message) {
  const lola_status status = make_cluster_plan(g, limits, plan, message);
  if (status) return status;
  if (!wgmma_scan::update_projects(g, *plan) ||
      plan->shared_bytes > limits->shared - fixed_shared<wgmma_scan::update_shared>)
    plan->groups = 0;
  return LOLA_OK;
}

/* Lets the kernel use as much shared memory as there is, and clusters of more than 8 blocks; once per device. */
cudaError_t allow_update(const void *kernel, const device_limits &limits) {
  static thread_local struct {
    const void *kernel;
    int device;
  } known = {nullptr, -1};
  if (known.kernel == kernel && known.device == limits.device) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           limits.shared - fixed_shared<wgmma_scan::update_shared>);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) known = {kernel, limits.device};
  return error;
}

} // namespace

int64_t lola_cuda_scan_exchange_bytes(const lola_cache *cache) {
  const lola_shape &shape = cache->shape;
  const scan_sizes sizes = {shape.batch,         cache->sets,       shape.heads / cache->sets,
                            shape.value_dim,     shape.feature_dim, cache->config.sparse,
                            cache->config.chunk, shape.dtype,       cache->config.score};
  device_limits limits;
  wgmma_scan::cluster_plan clusters;
  generic_scan::scan_plan plan;
  lola_message ignored; /* the first call says it */
  if (look_up_device(&limits, &ignored) || make_cluster_plan(sizes, limits, &clusters, &ignored) || clusters.groups)
    return 0;
  return make_group_plan(sizes, limits, &plan, &ignored) ? 0 : exchange_bytes(plan);
}

int lola_cuda_scan_leaves(const lola_device_segment *segment) {
  device_limits limits;
  wgmma_scan::cluster_plan clusters;
  lola_message ignored; /* the scan says it */
  if (make_cluster_plan(*segment, &limits, &clusters, &ignored)) return 0;
  const int left = limits.processors - clusters.groups * clusters.blocks;
  return clusters.groups && left * 3 >= limits.processors ? left : 0;
}

int lola_cuda_scan_takes_dealt(const lola_device_segment *segment) {
  const lola_device_segment &g = *segment;
  device_limits limits;
  wgmma_scan::cluster_plan clusters;
  lola_message ignored; /* the scan says it */
  return !make_cluster_plan(g, &limits, &clusters, &ignored) && clusters.groups && g.F % 32 == 0 && reads_vectors(g);
}

int lola_cuda_update_projects(const lola_device_segment *segment) {
  device_limits limits;
  wgmma_scan::cluster_plan plan;
  lola_message ignored; /* the update says it */
  return !make_update_plan(*segment, &limits, &plan, &ignored) && plan.groups;
}

lola_status lola_cuda_update(const lola_device_segment *segment, const call_rows &rows, const row_plan &row,
                             const decode_rows &known, cudaStream_t stream, lola_message *message) {
  const lola_device_segment &g = *segment;
  if (!g.B) return LOLA_OK;
  device_limits limits;
  wgmma_scan::cluster_plan plan;
  lola_status status = make_update_plan(g, &limits, &plan, message);
  if (status) return status;
  cudaError_t error = allow_update(wgmma_scan::update_kernel_of(g.dtype, plan.panels), limits);
  if (error == cudaSuccess) error = wgmma_scan::launch_update(g, plan, rows, row, known, stream);
  return lola_cuda_status(error, "update", message);
}

lola_status lola_cuda_scan(const lola_device_segment *segment, int record, cudaStream_t stream, lola_message *message) {
  const lola_device_segment &g = *segment;
  if (!g.B) return LOLA_OK;
  if (g.score == LOLA_SCORE_ATTENTION)
    return lola_fail(message, LOLA_VALUE_ERROR,
                     "score 'attention' runs on the CPU only: use a cache with device='cpu', or another score");
  device_limits limits;
  wgmma_scan::cluster_plan clusters;
  lola_status status = make_cluster_plan(g, &limits, &clusters, message);
  if (status) return status;
  const bool vector = reads_vectors(g);
  if (clusters.groups) {
    clusters.vector_recalled = g.Dv % 4 == 0;
    return lola_cuda_status(wgmma_scan::launch(g, clusters, record, vector, stream), "scan", message);
  }
  generic_scan::scan_plan plan;
  status = make_group_plan(sizes_of(g), limits, &plan, message);
  if (status) return status;
  if (exchange_bytes(plan) > g.exchange_bytes)
    return lola_fail(message, LOLA_DEVICE_ERROR, "the cache's workspace was made for another device");
  plan.identity = LOLA_IDENTITY;
  plan.vector_recalled = g.Dv % 4 == 0;
  void *arguments[] = {const_cast<lola_device_segment *>(segment), &plan, &record};
  const int blocks = plan.groups * plan.group_blocks;
  const void *kernel = generic_scan::kernel_of(g.dtype, vector);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(generic_scan::THREADS);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1 + lola_cuda_chain_attribute(kernel, &attributes[1]);
  cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
  (void)cudaGetLastError();
  return lola_cuda_status(error, "scan", message);
}
