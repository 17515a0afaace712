/* Devices, memory, streams and events for the binding, which knows no CUDA header; and the table of the backend.
 *
 * Nothing here touches the driver before the first call. Memory comes from a pool of lola's own, in stream order, so
 * that scratch costs no synchronisation; the pool keeps up to KEPT_BYTES that are free, less on small devices. */
#include <mutex>
#include <new>
#include <unordered_map>

#include "device.cuh"
#include "segment.cuh"
#include "steps.cuh"

lola_status lola_cuda_status(cudaError_t error, const char *what, lola_message *message) {
  if (error == cudaSuccess) return LOLA_OK;
  cudaGetLastError();
  return lola_fail(message, LOLA_DEVICE_ERROR, "%s failed: %s", what, cudaGetErrorString(error));
}

lola_status lola_cuda_allocation_status(cudaError_t error, int64_t bytes, lola_message *message) {
  if (error != cudaErrorMemoryAllocation) return lola_cuda_status(error, "a CUDA allocation", message);
  cudaGetLastError();
  return lola_out_of_memory(message, bytes);
}

namespace {

constexpr int MAX_DEVICES = 64;
constexpr int THREADS = 256, MOST_BLOCKS = 1024;
constexpr uint64_t KEPT_BYTES = uint64_t(2) << 30, KEPT_SHARE = 32; /* at most, and of the device's memory */

cudaStream_t as_stream(void *stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t as_event(void *event) { return static_cast<cudaEvent_t>(event); }

/* --- the machine ------------------------------------------------------------------------------------------------- */

lola_status device_count(int *count, lola_message *message) {
  *count = 0;
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || !driver) {
    cudaGetLastError();
    return lola_fail(message, LOLA_DEVICE_ERROR, "no NVIDIA driver was found");
  }
  cudaRuntimeGetVersion(&runtime);
  cudaError_t error = cudaGetDeviceCount(count);
  if (error == cudaSuccess && *count > MAX_DEVICES) *count = MAX_DEVICES;
  if (error == cudaSuccess && *count) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, 0);
    if (error == cudaSuccess && properties.major < 8) {
      *count = 0;
      return lola_fail(message, LOLA_DEVICE_ERROR, "%s is too old: its compute capability is %d.%d, lola needs 8.0",
                       properties.name, properties.major, properties.minor);
    }
    if (error == cudaSuccess) return LOLA_OK;
  }
  cudaGetLastError();
  *count = 0;
  if (error == cudaSuccess || error == cudaErrorNoDevice)
    return lola_fail(message, LOLA_DEVICE_ERROR, "the NVIDIA driver sees no CUDA device");
  if (error == cudaErrorInsufficientDriver)
    return lola_fail(message, LOLA_DEVICE_ERROR, "the NVIDIA driver is too old: it runs CUDA %d.%d, lola needs %d.%d",
                     driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  return lola_cuda_status(error, "cudaGetDeviceCount", message);
}

lola_status current_device(int *device, lola_message *message) {
  return lola_cuda_status(cudaGetDevice(device), "cudaGetDevice", message);
}

/* --- memory ------------------------------------------------------------------------------------------------------ */

struct memory_pool {
  cudaMemPool_t pool;
  uint64_t used, kept; /* bytes that were handed out and not taken back; that it may keep beside them */
};

std::mutex pool_mutex;
memory_pool pools[MAX_DEVICES];
/* Bytes, as the pools were asked for them. Never destroyed: caches may outlive what is at a program's end. */
std::unordered_map<void *, uint64_t> &handed_out = *new std::unordered_map<void *, uint64_t>;

lola_status pool_of(int device, cudaMemPool_t *pool, lola_message *message) {
  std::lock_guard<std::mutex> guard(pool_mutex);
  if (!pools[device].pool) {
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    memory_pool made = {};
    size_t free, total;
    lola_status status = lola_cuda_status(cudaMemGetInfo(&free, &total), "cudaMemGetInfo", message);
    if (!status) status = lola_cuda_status(cudaMemPoolCreate(&made.pool, &properties), "cudaMemPoolCreate", message);
    if (status) return status;
    made.kept = total / KEPT_SHARE < KEPT_BYTES ? total / KEPT_SHARE : KEPT_BYTES;
    pools[device] = made;
  }
  *pool = pools[device].pool;
  return LOLA_OK;
}

/* Memory in use counts towards what a pool holds on to, so the limit moves with it. Nothing is queued: a capture that
 * is under way, here or in another thread, is not disturbed. */
void move_limit(const memory_pool &pool) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error == cudaSuccess) {
    uint64_t most = pool.used + pool.kept;
    error = cudaMemPoolSetAttribute(pool.pool, cudaMemPoolAttrReleaseThreshold, &most);
    cudaThreadExchangeStreamCaptureMode(&mode);
  }
  if (error != cudaSuccess) cudaGetLastError(); /* the limit stays where it was */
}

/* Counts memory of a pool that was handed out, or, with 0 bytes, is taken back. */
void count_memory(int device, void *data, uint64_t bytes) {
  std::lock_guard<std::mutex> guard(pool_mutex);
  memory_pool &pool = pools[device];
  if (bytes) {
    try {
      handed_out[data] = bytes;
    } catch (const std::bad_alloc &) {
      return; /* less is kept, then */
    }
    pool.used += bytes;
  } else {
    const auto known = handed_out.find(data);
    if (known == handed_out.end()) return;
    pool.used -= known->second;
    handed_out.erase(known);
  }
  move_limit(pool);
}

lola_status allocate_host(int64_t bytes, void **data, lola_message *message) {
  *data = nullptr;
  return lola_cuda_allocation_status(cudaMallocHost(data, static_cast<size_t>(bytes)), bytes, message);
}

void release_host(void *data) {
  if (data) cudaFreeHost(data);
}

cudaMemcpyKind kind_of(lola_copy_kind kind) {
  return kind == LOLA_COPY_TO_DEVICE ? cudaMemcpyHostToDevice
         : kind == LOLA_COPY_TO_HOST ? cudaMemcpyDeviceToHost
                                     : cudaMemcpyDeviceToDevice;
}

lola_status copy(int device, void *target, const void *source, int64_t bytes, lola_copy_kind kind, void *stream,
                 lola_message *message) {
  if (!bytes) return LOLA_OK;
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  return lola_cuda_status(cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), kind_of(kind), as_stream(stream)),
                          "cudaMemcpyAsync", message);
}

lola_status copy_rows(int device, void *target, int64_t target_pitch, const void *source, int64_t source_pitch,
                      int64_t bytes, int64_t rows, lola_copy_kind kind, void *stream, lola_message *message) {
  if (!bytes || !rows) return LOLA_OK;
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  return lola_cuda_status(cudaMemcpy2DAsync(target, static_cast<size_t>(target_pitch), source,
                                            static_cast<size_t>(source_pitch), static_cast<size_t>(bytes),
                                            static_cast<size_t>(rows), kind_of(kind), as_stream(stream)),
                          "cudaMemcpy2DAsync", message);
}

lola_status zero(int device, void *data, int64_t bytes, void *stream, lola_message *message) {
  if (!bytes) return LOLA_OK;
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  return lola_cuda_status(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), as_stream(stream)), "cudaMemsetAsync",
                          message);
}

/* Lets no kernel start before its blocks have ended: an update looks at counters before it awaits this (chain.cuh). */
__global__ void __launch_bounds__(THREADS)
    begin_rows_kernel(int64_t *chunks, int64_t *row_ids, int64_t first, int64_t rows) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < rows; i += threads) {
    chunks[i] = -1;
    row_ids[i] = first + i;
  }
  __threadfence(); /* seen by whoever starts when the block has ended */
}

lola_status begin_rows(int device, int64_t *chunks, int64_t *row_ids, int64_t first, int64_t rows, void *stream,
                       lola_message *message) {
  if (!rows) return LOLA_OK;
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  const int64_t wanted = (rows + THREADS - 1) / THREADS;
  const unsigned blocks = static_cast<unsigned>(wanted < MOST_BLOCKS ? wanted : MOST_BLOCKS);
  begin_rows_kernel<<<blocks, THREADS, 0, as_stream(stream)>>>(chunks, row_ids, first, rows);
  return lola_cuda_launched("begin_rows", message);
}

/* --- streams ----------------------------------------------------------------------------------------------------- */

lola_status synchronize(int device, void *stream, lola_message *message) {
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  return lola_cuda_status(cudaStreamSynchronize(as_stream(stream)), "cudaStreamSynchronize", message);
}

lola_status stream_create(int device, void **stream, lola_message *message) {
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  cudaStream_t made;
  lola_status status =
      lola_cuda_status(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate", message);
  if (!status) *stream = made;
  return status;
}

void stream_destroy(int device, void *stream) {
  lola_message ignored;
  lola_device_scope scope(device, &ignored);
  if (!scope.status) cudaStreamDestroy(as_stream(stream));
}

lola_status capturing(int device, void *stream, int *result, lola_message *message) {
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  cudaStreamCaptureStatus state;
  lola_status status =
      lola_cuda_status(cudaStreamIsCapturing(as_stream(stream), &state), "cudaStreamIsCapturing", message);
  if (!status) *result = state != cudaStreamCaptureStatusNone;
  return status;
}

lola_status event_create(int device, void **event, lola_message *message) {
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  cudaEvent_t made;
  lola_status status =
      lola_cuda_status(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "cudaEventCreate", message);
  if (!status) *event = made;
  return status;
}

void event_destroy(int device, void *event) {
  lola_message ignored;
  lola_device_scope scope(device, &ignored);
  if (!scope.status) cudaEventDestroy(as_event(event));
}

lola_status event_record(int device, void *event, void *stream, lola_message *message) {
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  return lola_cuda_status(cudaEventRecord(as_event(event), as_stream(stream)), "cudaEventRecord", message);
}

lola_status event_wait(int device, void *event, void *stream, lola_message *message) {
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  return lola_cuda_status(cudaStreamWaitEvent(as_stream(stream), as_event(event), 0), "cudaStreamWaitEvent", message);
}

lola_status event_query(int device, void *event, int *done, lola_message *message) {
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  const cudaError_t error = cudaEventQuery(as_event(event));
  *done = error == cudaSuccess;
  return error == cudaErrorNotReady ? LOLA_OK : lola_cuda_status(error, "cudaEventQuery", message);
}

} // namespace

lola_status lola_cuda_allocate(int device, int64_t bytes, void *stream, void **data, lola_message *message) {
  *data = nullptr;
  if (device < 0 || device >= MAX_DEVICES)
    return lola_fail(message, LOLA_VALUE_ERROR, "device must be from 0 to %d, got %d", MAX_DEVICES - 1, device);
  lola_device_scope scope(device, message);
  if (scope.status) return scope.status;
  cudaMemPool_t pool;
  const size_t asked = static_cast<size_t>(bytes ? bytes : 1);
  lola_status status = pool_of(device, &pool, message);
  if (!status)
    status = lola_cuda_allocation_status(cudaMallocFromPoolAsync(data, asked, pool, as_stream(stream)), bytes, message);
  if (!status) count_memory(device, *data, asked);
  return status;
}

void lola_cuda_release(int device, void *data, void *stream) {
  if (!data) return;
  lola_message ignored;
  lola_device_scope scope(device, &ignored);
  if (scope.status) return;
  count_memory(device, data, 0); /* before another thread can be given the same memory */
  if (cudaFreeAsync(data, as_stream(stream)) != cudaSuccess) cudaGetLastError();
}

const lola_cuda_api *lola_cuda_table(void) {
  static const lola_cuda_api table = {
      LOLA_CUDA_API_VERSION,
      device_count,
      current_device,
      lola_cuda_allocate,
      lola_cuda_release,
      allocate_host,
      release_host,
      copy,
      copy_rows,
      zero,
      begin_rows,
      synchronize,
      stream_create,
      stream_destroy,
      capturing,
      event_create,
      event_destroy,
      event_record,
      event_wait,
      event_query,
      lola_cuda_attention,
      lola_cuda_workspace_bytes,
      lola_cuda_check_finite,
      lola_cuda_features,
      lola_cuda_score,
      lola_cuda_select,
      lola_cuda_fold,
      lola_cuda_attend,
  };
  return &table;
}
