/* decode: one token for each row that is not idle. The update of the cache where one kernel does it (scan_update.cuh),
 * phi(q) (decode_queries.cuh), the update where it takes more, then everything else; they run beside one another as far
 * as they can, and start before the step begins (decode_rows.cuh). A small batch goes through a kernel of its own
 * (decode_small.cuh) behind the update.
 *
 * The bytes of window, sparse cache and hidden state are the floor, so their reading is spread over many blocks: each
 * (row, KV head) has an item per part of a query head's state for phi(q)^T H (a float32 F x Dv state), one per tile of
 * sparse pairs and one per tile of window pairs. For 16-bit caches of the usual width a block takes one item after the
 * other (decode_pipeline.cuh); otherwise it takes one (decode_state.cuh, and decode_matrix.cuh for 16-bit caches, else
 * decode_generic.cuh) and asks for all that it reads before it waits for anything. An item leaves a partial in scratch:
 * float32 sums o (Dv,), maximum m in base 2 and sum l per query head, or N (Dv,) and z. They are merged in order of
 * tile (decode_merge.cuh), by the block of a (row, KV head) that arrives last, or by a kernel behind, which mixes (Eq.
 * 14) and writes the output. Items are fixed by the cache's sizes alone: the same row gives the same bits in any batch.
 * The block that holds the newest pair, or the one that merges, writes that pair into the window ring and advances the
 * counters, which by then no other reads. */
#include "decode_items.cuh"
#include "decode_plan.cuh"

namespace {

/* --- the begin ------------------------------------------------------------------------------------- */

/* The step begins, where no update says so. */
__global__ void __launch_bounds__(THREADS)
    decode_begin_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ call_rows rows,
                        const __grid_constant__ row_plan plan, const decode_rows known) {
  lola_device_start_next();
  lola_device_await_previous();
  begin_step(g, plan, rows, known);
}

/* --- the launches ----------------------------------------------------------------------------------- */

/* Where a step's scratch lies. */
struct scratch_places {
  unsigned *counters, *row_counters;
  decode_rows rows;
  float *phi, *partials;
};

scratch_places places_in(void *scratch, const lola_device_segment &g) {
  char *const signals = static_cast<char *>(scratch), *const counters = signals + sizeof(decode_signals);
  char *const rows = counters + counter_bytes(g.B, g.Hkv);
  char *const phi = rows + rows_bytes(g.B);
  scratch_places places;
  places.rows.signals = reinterpret_cast<decode_signals *>(signals);
  places.counters = reinterpret_cast<unsigned *>(counters);
  places.row_counters = places.counters + static_cast<int64_t>(g.B) * g.Hkv;
  places.rows.rows = reinterpret_cast<decode_row *>(rows);
  places.rows.updated = reinterpret_cast<int *>(places.rows.rows + g.B);
  places.phi = reinterpret_cast<float *>(phi);
  places.partials = reinterpret_cast<float *>(phi + phi_bytes(static_cast<int64_t>(g.B) * g.Hq, g.F));
  return places;
}

struct launch_arguments {
  const lola_device_segment *segment;
  const call_rows *rows;
  decode_plan plan;
  scratch_places scratch;
  bool is_long;
  cudaStream_t stream;
};

template <auto KERNEL, class... A>
cudaError_t launch(const launch_arguments &a, int device, int threads, A... arguments) {
  const cudaError_t error = allow_shared<KERNEL>(a.plan.shared_bytes, device);
  if (error != cudaSuccess) return error;
  return lola_cuda_launch_chained(KERNEL, static_cast<unsigned>(a.plan.blocks), threads, a.plan.shared_bytes, a.stream,
                                  *a.segment, a.plan, arguments...);
}

template <typename T, int LANES> cudaError_t launch_tiles(const launch_arguments &a, int device) {
  const scratch_places &s = a.scratch;
  return launch<decode_kernel<T, LANES>>(a, device, THREADS, s.rows.signals, s.counters, s.phi, s.partials);
}

pipeline_scratch units_of(const scratch_places &places) { return {places.rows, places.phi, places.partials}; }

template <typename T> cudaError_t launch_items(const launch_arguments &a, int device) {
  if constexpr (sizeof(T) == 2) {
    if (a.plan.pipeline)
      return launch<decode_pipeline_kernel<T>>(a, device, PIPELINE_THREADS, *a.rows, units_of(a.scratch));
    if (a.plan.matrix) return a.is_long ? launch_tiles<T, LONG_MATRIX>(a, device) : launch_tiles<T, MATRIX>(a, device);
  }
  if (a.plan.lanes == 8) return launch_tiles<T, 8>(a, device);
  if (a.plan.lanes == 16) return launch_tiles<T, 16>(a, device);
  return launch_tiles<T, 32>(a, device);
}

lola_status launch_queries(const lola_device_segment &g, const call_rows &rows, const query_launch &launch,
                           const scratch_places &places, int device, cudaStream_t stream, lola_message *message) {
  if (!launch.blocks) return LOLA_OK;
  const auto queue = [&](auto kernel) {
    return lola_cuda_launch_chained(kernel, static_cast<unsigned>(launch.blocks), THREADS, launch.bytes, stream, g,
                                    rows, launch.plan, places.rows, places.phi);
  };
  cudaError_t error = cudaSuccess;
  if (launch.wide) {
    error = allow_shared<decode_wide_queries_kernel>(WIDE_BYTES, device);
    if (error == cudaSuccess)
      error = lola_cuda_launch_chained(decode_wide_queries_kernel, static_cast<unsigned>(launch.blocks), WIDE_THREADS,
                                       WIDE_BYTES, stream, g, rows, launch.plan.blocks, places.rows, places.phi);
  } else if (launch.many) {
    error = queue(decode_queries_kernel<MANY_ROWS>);
  } else {
    if (launch.bytes > 48 << 10) error = allow_shared<decode_queries_kernel<1>>(launch.bytes, device);
    if (error == cudaSuccess) error = queue(decode_queries_kernel<1>);
  }
  return lola_cuda_launched(error, "decode_queries", message);
}

template <typename T>
cudaError_t launch_small(const lola_device_segment &g, const call_rows &rows, const small_plan &plan,
                         unsigned *row_counters, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = small_launch<T>(g, plan, stream, attributes);
  return cudaLaunchKernelEx(&config, decode_small_kernel<T>, g, rows, plan, row_counters);
}

/* A small step: an update, and a kernel for the rest. */
lola_status decode_small(const lola_device_segment &g, const call_rows &rows, const row_plan &row, small_plan plan,
                         unsigned *row_counters, int updates, cudaStream_t stream, lola_message *message) {
  lola_status status = LOLA_OK;
  if (updates && !g.slot_phi) {
    status = lola_cuda_update(&g, rows, row, decode_rows{}, stream, message);
  } else if (updates) {
    status = lola_cuda_segment_features(&g, LOLA_FEATURES_OF_CACHE, 0, &rows, stream, message);
    if (!status) status = lola_cuda_scan(&g, 0, stream, message);
  }
  if (status) return status;
  plan.updates = updates;
  return lola_cuda_launched(g.dtype == LOLA_FLOAT16 ? launch_small<__half>(g, rows, plan, row_counters, stream)
                                                    : launch_small<__nv_bfloat16>(g, rows, plan, row_counters, stream),
                            "decode", message);
}

} // namespace

int64_t lola_cuda_decode_bytes(const lola_cache *cache) {
  const lola_shape &shape = cache->shape;
  const plan_sizes sizes = {shape.heads / shape.kv_heads,
                            cache->sets / shape.kv_heads,
                            shape.head_dim,
                            shape.value_dim,
                            shape.feature_dim,
                            cache->ring,
                            cache->config.sparse,
                            shape.dtype};
  const int64_t groups = shape.batch * shape.kv_heads;
  int64_t floats = plan_of(sizes, false).group_floats;
  if (fits_matrix(sizes)) {
    const int64_t others = plan_of(sizes, true).group_floats;
    if (others > floats) floats = others;
  }
  return static_cast<int64_t>(sizeof(decode_signals)) + counter_bytes(shape.batch, shape.kv_heads) +
         rows_bytes(shape.batch) + phi_bytes(shape.batch * shape.heads, shape.feature_dim) + groups * floats * 4;
}

lola_status lola_cuda_decode(const lola_device_segment *segment, const call_rows &rows, void *scratch, int updates,
                             cudaStream_t stream, lola_message *message) {
  const lola_device_segment &g = *segment;
  if (!g.B || !g.Hkv) return LOLA_OK;
  int device = 0;
  device_limits limits = {};
  decode_plan plan = {};
  small_plan small = {};
  query_launch queries = {};
  lola_status status = plan_step(g, &plan, &small, &device, &limits, message);
  if (status) return status;
  const scratch_places places = places_in(scratch, g);
  if (plan.small) return decode_small(g, rows, plan.row, small, places.row_counters, updates, stream, message);
  status = plan_query_launch(g, limits, &plan, &queries, message);
  if (status) return status;
  const bool projects = updates && !g.slot_phi;
  if (projects)
    status = lola_cuda_update(segment, rows, plan.row, places.rows, stream, message);
  else
    status = lola_cuda_launched(
        lola_cuda_launch_chained(decode_begin_kernel, 1, THREADS, 0, stream, g, rows, plan.row, places.rows),
        "decode_begin", message);
  if (!status) status = launch_queries(g, rows, queries, places, device, stream, message);
  if (!status && updates && !projects) {
    status = lola_cuda_segment_features(segment, LOLA_FEATURES_OF_CACHE, 0, nullptr, stream, message);
    lola_device_segment scanned = g;
    scanned.spans_are_old = 1;
    if (!status) status = lola_cuda_scan(&scanned, 0, stream, message);
  }
  if (!status && updates && !plan.gathers) status = lola_cuda_commit_sparse(segment, stream, message);
  if (!status) {
    const launch_arguments a = {segment, &rows, plan, places, is_long(sizes_of(g)), stream};
    const cudaError_t error = g.dtype == LOLA_FLOAT32   ? launch_items<float>(a, device)
                              : g.dtype == LOLA_FLOAT16 ? launch_items<__half>(a, device)
                                                        : launch_items<__nv_bfloat16>(a, device);
    status = lola_cuda_launched(error, "decode", message);
  }
  if (!status && plan.pipeline) {
    const int64_t blocks = divided_up(static_cast<int64_t>(g.B) * g.Hkv, MERGED_GROUPS);
    status = lola_cuda_launched(lola_cuda_launch_chained(decode_merge_kernel, static_cast<unsigned>(blocks),
                                                         MERGED_GROUPS * THREADS, 0, stream, g, plan, units_of(places)),
                                "decode_merge", message);
  }
  /* A step that has begun but does not end: the next one must not take its signals for its own. */
  if (status) cudaMemsetAsync(places.rows.signals, 0, sizeof(decode_signals), stream);
  return status;
}
