/* cuda.h - the CUDA backend as a table of functions, so that the module that holds it is loaded only when a device
 * array or device="cuda" first appears. Plain C: no CUDA headers, streams and device memory are void pointers.
 *
 * Every function that takes a `stream` only queues work on it, and leaves the current device as it found it.
 * Symbols and arrays are lola.h's; data pointers are device addresses unless said otherwise. */
#ifndef LOLA_CUDA_H
#define LOLA_CUDA_H

#include "lola/lola.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { LOLA_CUDA_API_VERSION = 3 };
#define LOLA_CUDA_CAPSULE "lola._cuda.api"

/* Contiguous integers on the device, of 4 or 8 bytes; data NULL: not given. */
typedef struct lola_index {
  const void *data;
  int item_size;
} lola_index;

/* A call on a device. `base.rows`, `base.interrupted` are not read; base.map's weights, base.gate and all arrays are
 * device memory. What enters which row is worked out on the device: offsets starts[b] <= t < stops[b] of the arrays'
 * batch row b, or cu_seqlens[i] <= t < cu_seqlens[i+1] of their only row; clamped to 0 .. T, never out of bounds. */
typedef struct lola_cuda_call {
  lola_call base;
  int64_t tokens; /* T of the arrays */
  lola_index starts, stops, cu_seqlens;
  int device;
  void *stream;
  int no_update; /* the caller knows that no row begins a chunk in this call */
} lola_cuda_call;

typedef enum lola_copy_kind { LOLA_COPY_TO_DEVICE, LOLA_COPY_TO_HOST, LOLA_COPY_ON_DEVICE } lola_copy_kind;

typedef struct lola_cuda_api {
  int version; /* LOLA_CUDA_API_VERSION */

  /* --- the machine --- */
  /* How many devices can be used. The first function to touch the driver. Fails with the reason: no driver, no device,
   * driver too old. */
  lola_status (*device_count)(int *count, lola_message *message);
  lola_status (*current_device)(int *device, lola_message *message);

  /* --- memory --- */
  /* Device memory of the stream's order (cudaMallocAsync); LOLA_MEMORY_ERROR names the bytes. */
  lola_status (*allocate)(int device, int64_t bytes, void *stream, void **data, lola_message *message);
  void (*release)(int device, void *data, void *stream);
  /* Page-locked host memory. */
  lola_status (*allocate_host)(int64_t bytes, void **data, lola_message *message);
  void (*release_host)(void *data);
  lola_status (*copy)(int device, void *target, const void *source, int64_t bytes, lola_copy_kind kind, void *stream,
                      lola_message *message);
  /* `rows` rows of `bytes` bytes at pitches target_pitch and source_pitch. */
  lola_status (*copy_rows)(int device, void *target, int64_t target_pitch, const void *source, int64_t source_pitch,
                           int64_t bytes, int64_t rows, lola_copy_kind kind, void *stream, lola_message *message);
  lola_status (*zero)(int device, void *data, int64_t bytes, void *stream, lola_message *message);
  /* Rows first .. first + rows - 1 have seen nothing: -1 and the row's number; both pointers are at row `first`. */
  lola_status (*begin_rows)(int device, int64_t *chunks, int64_t *row_ids, int64_t first, int64_t rows, void *stream,
                            lola_message *message);

  /* --- streams --- */
  lola_status (*synchronize)(int device, void *stream, lola_message *message);
  lola_status (*stream_create)(int device, void **stream, lola_message *message);
  void (*stream_destroy)(int device, void *stream);
  /* 1 in *capturing while the stream records a graph. */
  lola_status (*capturing)(int device, void *stream, int *capturing, lola_message *message);
  lola_status (*event_create)(int device, void **event, lola_message *message);
  void (*event_destroy)(int device, void *event);
  lola_status (*event_record)(int device, void *event, void *stream, lola_message *message);
  /* The stream waits for the event. */
  lola_status (*event_wait)(int device, void *event, void *stream, lola_message *message);
  /* 1 in *done if what was queued before the event was last recorded is done. */
  lola_status (*event_query)(int device, void *event, int *done, lola_message *message);

  /* --- attention --- */
  /* Appends to a cache whose buffers lie on the call's device, and writes outputs, zeros included for tokens that enter
   * no row. `workspace` is the cache's own, see below. On LOLA_DEVICE_ERROR the cache may be half written; on any other
   * status it is as it was. */
  lola_status (*attention)(lola_cache *cache, void *workspace, const lola_cuda_call *call, lola_message *message);
  /* Device bytes that a cache needs besides its buffers; zeroed by the caller. */
  int64_t (*workspace_bytes)(const lola_cache *cache, int device);
  /* *odd gets a bit per input (q, k, v, q_features, k_features, scores) that holds something it must not among the
   * entering tokens; bit 6: starts, stops or cu_seqlens were out of range. Synchronises. */
  lola_status (*check_finite)(const lola_cache *cache, const lola_cuda_call *call, int *odd, lola_message *message);

  /* --- the five steps on plain device arrays; meanings as of lola_cpu_<step> --- */
  lola_status (*features)(const lola_array *x, int64_t B, int64_t T, int64_t Hx, int64_t D, int64_t Hq, int64_t F,
                          const lola_feature_map *map, int side_key, float *out, int device, void *stream,
                          lola_message *message);
  lola_status (*score)(const lola_array *fk, const lola_array *v, const float *H, const float *s, int64_t B, int64_t S,
                       int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, float *out, int device, void *stream,
                       lola_message *message);
  lola_status (*select)(const float *scores, const int64_t *count, int64_t B, int64_t S, int64_t Hs, int64_t keep,
                        int64_t *kept, int64_t *dropped, int device, void *stream, lola_message *message);
  lola_status (*fold)(const lola_array *fk, const lola_array *v, float *H, float *s, const int64_t *count, int64_t B,
                      int64_t S, int64_t Hq, int64_t Hs, int64_t F, int64_t Dv, int device, void *stream,
                      lola_message *message);
  lola_status (*attend)(const lola_attend_call *call, int device, void *stream, lola_message *message);
} lola_cuda_api;

/* The table of the module that holds the backend (its capsule points to it). */
const lola_cuda_api *lola_cuda_table(void);

#ifdef __cplusplus
}
#endif
#endif
