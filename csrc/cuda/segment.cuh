/* A segment on the device: the tokens of one call that are worked on at a time (csrc/cpu/segment.h says the same for
 * the CPU). The host knows no row's position, so nothing here waits for the device: `plan` (attention.cu) writes one
 * span per segment and cache row, and every kernel reads where its row stands from there.
 *
 *   plan      spans of all segments; where each row's tokens begin and how many they are
 *   features  phi(k) of the tokens that leave the window during the segment, and phi(q) of its own; with the first
 *             segment phi(k) of the sparse slots and of the ring, as far as the call may score or fold them
 *   scan      chunks in order: score, select, fold; writes the sparse cache's counters, positions and scores, H and s,
 *             the pairs that each chunk's queries see (`sources`), and phi(q)^T H, phi(q)^T s of every token; for the
 *             next segment's scan what the slots hold, and their phi(k)
 *   attend    all blocks of queries at once from those records
 *   commit    once a call: keys and values that entered sparse slots, then the window ring, then tokens_seen and chunks
 *
 * The cache's own keys and values stay as they were until the call ends: a pair is named by where it lay when the call
 * began (codes, below), so that from one scan to the next there is nothing between.
 * Where the scan leaves a good part of the device free, attend of the segment before and features of the next one's
 * tokens run beside it (chain.cuh). So these two read nothing that a scan writes meanwhile: two sets of scratch take
 * turns.
 *
 * Decoding (T = 1) runs an update in one kernel, or features and scan behind decode.cu's first one, and, where its
 * main kernel does not do that itself, commit of the sparse cache, which return at once when no row begins a chunk,
 * then the main kernel. */
#ifndef LOLA_CUDA_SEGMENT_CUH
#define LOLA_CUDA_SEGMENT_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "core/message.h"
#include "core/schedule.h"
#include "lola/cuda.h"

/* One cache row's tokens in the segment. */
typedef struct lola_device_span {
  int64_t position;     /* of the first token: the row's tokens_seen when the segment begins */
  int64_t batch, first; /* in the call's arrays: batch index and offset of the first token */
  int64_t before;       /* tokens of the row that the call's segments before this one hold */
  int64_t in_call;      /* and all of its segments */
  int64_t key, key_at;  /* the first token that leaves the window with the segment: its row of token_phi, and how many
                         * of the call's came before it */
  int32_t keys;         /* how many of the call's tokens leave with the segment */
  int32_t tokens;       /* 0: the row is idle */
  int32_t token;        /* index of the first token in the per-token scratch arrays */
  int32_t chunk;        /* index of the row's first chunk record */
  int32_t chunks;       /* chunks that its tokens touch: position / C .. (position + tokens - 1) / C */
  int64_t updated;      /* cache.chunks: the chunk whose update is done when the segment begins */
} lola_device_span;

/* Where a pair lies while the call runs. code < 0: sparse slot -code - 1 as it was when the call began; code >= 0:
 * position span.position - span.before - R + code, in the window ring while code < R, else the row's token code - R of
 * the call. */

/* Features are stored as the cache's keys would be: bfloat16 beside 16-bit keys, else float32 ("feature type"). */
typedef struct lola_device_segment {
  /* sizes */
  int B, Hq, Hkv, S, r, rs; /* r = Hq / Hkv, S sets, rs = Hq / S query heads per set */
  int D, Dv, F, L;
  int64_t W, C, R;
  lola_dtype dtype, q_dtype; /* of keys and values; of queries and outputs */
  int stores_features;       /* the caller's own features: window_features, sparse_features, call.k_features */
  lola_mixing mixing;
  lola_score score;
  uint64_t seed;
  float scale;
  const float *gate;
  lola_feature_map map;
  /* the call's arrays, of the whole call: offsets are span.first + i */
  lola_array q, k, v, out, q_features, k_features, scores, share;
  /* the cache's buffers, laid out as lola_cache says */
  int64_t *tokens_seen, *chunks, *row_ids, *folded, *sparse_count, *sparse_positions;
  void *window_keys, *window_values, *sparse_keys, *sparse_values, *window_features, *sparse_features;
  float *sparse_scores, *hidden, *normalizer, *window_given, *sparse_given;
  /* scratch of this segment */
  int packed;              /* rows of the call's arrays lie one after the other (cu_seqlens) */
  int tokens, key_rows;    /* rows of the arrays per token, and of token_phi */
  int64_t longest;         /* tokens of a cache row, at most */
  int64_t longest_in_call; /* and of the call */
  int chunk_records;       /* rows of the per-chunk arrays */
  lola_device_span *spans; /* (B,) */
  int spans_are_old;       /* they were written two kernels before scan, or earlier: it awaits nobody to read them */
  void *slot_phi;          /* (B, Hq, L, F) feature type; of slots as they were when the segment began */
  void *ring_phi;          /* (B, Hq, R, F), by ring slot position mod R; of the ring as the call found it */
  void *token_phi;         /* (key_rows, Hq, F): phi(k) of the call's tokens that leave the window with the segment */
  void *query_phi;         /* (tokens, Hq, F): phi(q) */
  int queries_dealt;       /* query_phi lies as the scan's matrix units take it (store_dealt in features.cu) */
  float *recalled;         /* (tokens, Hq, Dv): phi(q)^T H; unset where z = 0 */
  float *z;                /* (tokens, Hq): phi(q)^T s; 0 where nothing is folded and for mixing "cache_only" */
  int32_t *sources;        /* (chunk_records, S, L): codes of the pairs that the chunk's queries see */
  int32_t *source_count;   /* (chunk_records, S) */
  int32_t *slot_source;    /* (B, S, L): code of what each sparse slot holds after the last scan */
  void *exchange;          /* scan's own: scores between its blocks */
  int64_t exchange_bytes;
  unsigned *barriers; /* scan's own: zero between launches, LOLA_SCAN_BARRIERS of them */
} lola_device_segment;

enum { LOLA_SCAN_BARRIERS = 1024 };

/* --- launchers: one per step, each queues its kernels and returns the launch's status ---------------------------- */

/* Of the cache: slot_phi and ring_phi of pairs that an update of this call may need (none when no row begins a chunk),
 * with its first segment; of tokens: token_phi and query_phi. Those alone may run beside the scan before, on as many
 * multiprocessors as `beside` says. With `rows` (decoding, where nothing else does) it writes the spans first. */
enum { LOLA_FEATURES_OF_CACHE = 1, LOLA_FEATURES_OF_TOKENS = 2 };
lola_status lola_cuda_segment_features(const lola_device_segment *segment, int parts, int beside,
                                       const struct call_rows *rows, cudaStream_t stream, lola_message *message);
/* Whether it can deal query_phi out (queries_dealt), and whether a scan with `record` reads it so: the same in all
 * segments of a call. */
int lola_cuda_features_can_deal(const lola_device_segment *segment);
int lola_cuda_scan_takes_dealt(const lola_device_segment *segment);
/* Bytes of `exchange` for this cache on the current device. */
int64_t lola_cuda_scan_exchange_bytes(const lola_cache *cache);
/* With `record` also sources, source_count, recalled and z; without it (decoding) only the update. */
lola_status lola_cuda_scan(const lola_device_segment *segment, int record, cudaStream_t stream, lola_message *message);
/* Whether lola_cuda_update can do what features of the cache and a scan without `record` do in decoding, in one kernel
 * that needs no spans. With `known.signals` the step begins with it (decode_rows.cuh), and the step's kernels behind it
 * run beside it; without, the next one awaits it. */
int lola_cuda_update_projects(const lola_device_segment *segment);
lola_status lola_cuda_update(const lola_device_segment *segment, const struct call_rows &rows,
                             const struct row_plan &row, const struct decode_rows &known, cudaStream_t stream,
                             lola_message *message);
/* Multiprocessors that are left to kernels beside a scan of this segment's sizes; 0 if less than a third of the device.
 */
int lola_cuda_scan_leaves(const lola_device_segment *segment);
lola_status lola_cuda_segment_attend(const lola_device_segment *segment, int beside, cudaStream_t stream,
                                     lola_message *message);
/* Sparse slots whose slot_source is >= 0, from ring and tokens, when a call ends; `segment`: its first. */
lola_status lola_cuda_commit_sparse(const lola_device_segment *segment, cudaStream_t stream, lola_message *message);
/* That, and the call's last R tokens into the window ring; then tokens_seen and chunks. */
lola_status lola_cuda_commit(const lola_device_segment *segment, cudaStream_t stream, lola_message *message);
/* One token for each row that is not idle: attends, writes the token into the ring, advances tokens_seen and chunks;
 * before that, where rows may have one (`updates`), comes the update, which computes features itself
 * (lola_cuda_update_projects) if there is no slot_phi. `scratch` of lola_cuda_decode_bytes, zeroed once, left zeroed
 * where it must be. */
int64_t lola_cuda_decode_bytes(const lola_cache *cache);
lola_status lola_cuda_decode(const lola_device_segment *segment, const struct call_rows &rows, void *scratch,
                             int updates, cudaStream_t stream, lola_message *message);

/* After a launch: its error, or else the last one, as a status that names the kernel. */
static inline lola_status lola_cuda_launched(cudaError_t error, const char *kernel, lola_message *message) {
  cudaError_t last = cudaGetLastError();
  if (error == cudaSuccess) error = last;
  if (error == cudaSuccess) return LOLA_OK;
  return lola_fail(message, LOLA_DEVICE_ERROR, "CUDA kernel %s could not be launched: %s", kernel,
                   cudaGetErrorString(error));
}
static inline lola_status lola_cuda_launched(const char *kernel, lola_message *message) {
  return lola_cuda_launched(cudaSuccess, kernel, message);
}

/* --- what kernels share ------------------------------------------------------------------------------------------- */

#ifdef __CUDACC__

/* What features of maps that are not elu + 1 are clamped at. */
constexpr float LOLA_FEATURE_FLOOR = 1e-12f;

static __host__ __device__ inline bool lola_device_is_hedgehog(const lola_feature_map &map) {
  return map.kind == LOLA_MAP_HEDGEHOG || map.kind == LOLA_MAP_HEDGEHOG_EXP;
}

static __host__ __device__ inline int64_t lola_device_item(lola_dtype dtype) { return dtype == LOLA_FLOAT32 ? 4 : 2; }

/* Whether every (b, t, h) begins at a multiple of 16 bytes. */
static inline bool lola_device_rows_are_aligned(const lola_array &array) {
  const int64_t item = lola_device_item(array.dtype);
  return reinterpret_cast<uintptr_t>(array.data) % 16 == 0 && array.stride_b * item % 16 == 0 &&
         array.stride_t * item % 16 == 0 && array.stride_h * item % 16 == 0;
}

/* Address of element 0 of (b, t, h). */
static __device__ inline char *lola_device_at(const lola_array &array, int64_t b, int64_t t, int64_t h) {
  return static_cast<char *>(array.data) +
         (b * array.stride_b + t * array.stride_t + h * array.stride_h) * lola_device_item(array.dtype);
}

static __device__ inline float lola_device_load(const void *data, int64_t i, lola_dtype dtype) {
  if (dtype == LOLA_FLOAT32) return static_cast<const float *>(data)[i];
  if (dtype == LOLA_FLOAT16) return __half2float(static_cast<const __half *>(data)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16 *>(data)[i]);
}

static __device__ inline void lola_device_store(void *data, int64_t i, lola_dtype dtype, float x) {
  if (dtype == LOLA_FLOAT32)
    static_cast<float *>(data)[i] = x;
  else if (dtype == LOLA_FLOAT16)
    static_cast<__half *>(data)[i] = __float2half_rn(x);
  else
    static_cast<__nv_bfloat16 *>(data)[i] = __float2bfloat16_rn(x);
}

/* Of the row's first token in the call: its position, and its offset in the call's arrays. */
static __device__ inline int64_t lola_device_origin(const lola_device_span &span) {
  return span.position - span.before;
}
static __device__ inline int64_t lola_device_first(const lola_device_span &span) { return span.first - span.before; }

/* What the whole call is to the row, as one segment. */
static __device__ inline lola_device_span lola_device_call_span(const lola_device_span &span) {
  lola_device_span call = span;
  call.position = lola_device_origin(span);
  call.first = lola_device_first(span);
  call.tokens = static_cast<int32_t>(span.in_call);
  call.before = 0;
  return call;
}

/* The ring slot of a position that may be before 0 in unused codes. */
static __device__ inline int64_t lola_device_ring_slot(int64_t position, int64_t R) {
  int64_t slot = position % R;
  return slot < 0 ? slot + R : slot;
}

/* Key of the pair `code` of a set; `kv_head` = set * Hkv / S. */
static __device__ inline const char *lola_device_key(const lola_device_segment &g, const lola_device_span &span,
                                                     int row, int set, int code) {
  int64_t item = lola_device_item(g.dtype), kv_head = set / (g.S / g.Hkv);
  if (code < 0)
    return static_cast<const char *>(g.sparse_keys) +
           ((static_cast<int64_t>(row) * g.S + set) * g.L - code - 1) * g.D * item;
  if (code < g.R)
    return static_cast<const char *>(g.window_keys) +
           ((row * g.Hkv + kv_head) * g.R + lola_device_ring_slot(lola_device_origin(span) - g.R + code, g.R)) * g.D *
               item;
  return lola_device_at(g.k, span.batch, lola_device_first(span) + code - g.R, kv_head);
}

static __device__ inline const char *lola_device_value(const lola_device_segment &g, const lola_device_span &span,
                                                       int row, int set, int code) {
  int64_t item = lola_device_item(g.dtype), kv_head = set / (g.S / g.Hkv);
  if (code < 0)
    return static_cast<const char *>(g.sparse_values) +
           ((static_cast<int64_t>(row) * g.S + set) * g.L - code - 1) * g.Dv * item;
  if (code < g.R)
    return static_cast<const char *>(g.window_values) +
           ((row * g.Hkv + kv_head) * g.R + lola_device_ring_slot(lola_device_origin(span) - g.R + code, g.R)) * g.Dv *
               item;
  return lola_device_at(g.v, span.batch, lola_device_first(span) + code - g.R, kv_head);
}

/* phi(k) of the pair `code` for query head `head`, F elements of the feature type (item bytes each). */
static __device__ inline const char *lola_device_phi(const lola_device_segment &g, const lola_device_span &span,
                                                     int row, int head, int code) {
  int64_t item = lola_device_item(g.dtype);
  if (code < 0)
    return static_cast<const char *>(g.slot_phi) +
           ((static_cast<int64_t>(row) * g.Hq + head) * g.L - code - 1) * g.F * item;
  if (code < g.R)
    return static_cast<const char *>(g.ring_phi) + ((static_cast<int64_t>(row) * g.Hq + head) * g.R +
                                                    lola_device_ring_slot(lola_device_origin(span) - g.R + code, g.R)) *
                                                       g.F * item;
  return static_cast<const char *>(g.token_phi) + ((span.key + code - g.R - span.key_at) * g.Hq + head) * g.F * item;
}

/* Keeps the score that a caller gave the pair in a ring slot: the sum of those of the set's query heads. */
static __device__ inline void lola_device_keep_given(const lola_device_segment &g, int row, int set, int64_t slot,
                                                     int64_t batch, int64_t token) {
  float sum = 0;
#pragma unroll 1
  for (int h = set * g.rs; h < (set + 1) * g.rs; h++)
    sum += *reinterpret_cast<const float *>(lola_device_at(g.scores, batch, token, h));
  g.window_given[(static_cast<int64_t>(row) * g.S + set) * g.R + slot] = sum;
}

/* How a query's softmax sums (maximum m in base 2, sum l) and linear sums combine: out = softmax * O + linear * N,
 * where O = sum exp2(a_i - m) v_i. As lola_mix of csrc/cpu/attend.c. */
typedef struct lola_device_weights {
  float softmax, linear, share;
} lola_device_weights;

/* What the gate adds to the linear term's logit in base 2. */
static __device__ inline float lola_device_gate_logit(float gate) { return log2f((1 - gate) / gate); }

/* `logit`, of the linear term, where the mixing has one: for who knows z before m and l. */
static __device__ inline lola_device_weights lola_device_mix(lola_mixing mixing, float gate, float logit, float m,
                                                             float l, float z) {
  lola_device_weights w = {0, 0, 0};
  if (mixing == LOLA_MIXING_CACHE_ONLY || !(z > 0)) {
    w.softmax = l > 0 ? 1 / l : 0;
    return w;
  }
  if (mixing == LOLA_MIXING_LOLCATS) {
    float sum = gate * l + z;
    w.softmax = gate / sum;
    w.linear = 1 / sum;
    w.share = z / sum;
    return w;
  }
  float high = fmaxf(m, logit);
  float softmax = exp2f(m - high), linear = exp2f(logit - high);
  float sum = softmax * l + linear;
  w.softmax = softmax / sum;
  w.linear = linear / sum / z;
  w.share = linear / sum;
  return w;
}

static __device__ inline lola_device_weights lola_device_mix(lola_mixing mixing, float gate, float m, float l,
                                                             float z) {
  float logit = log2f(z);
  if (mixing == LOLA_MIXING_GATED) logit += lola_device_gate_logit(gate);
  return lola_device_mix(mixing, gate, logit, m, l, z);
}

#endif
#endif
