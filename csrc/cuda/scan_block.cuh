/* What scan_generic.cuh and scan_wgmma.cuh share: where a unit's pairs lie, which units a group of blocks takes, pieces
 * of rows, and the parts of a pair's error. */
#ifndef LOLA_CUDA_SCAN_BLOCK_CUH
#define LOLA_CUDA_SCAN_BLOCK_CUH

#include <limits.h>
#include <math.h>

#include "cuda/device.cuh"
#include "cuda/scan.cuh"

namespace {

constexpr unsigned ALL = 0xffffffffu;

/* Rows one after the other, `stride` bytes apart. */
struct row_source {
  const char *data;
  int64_t stride;
};

/* What a block knows of its unit, one (cache row, head set), the same for all threads until the next one. */
struct scan_unit {
  lola_device_span span;
  int64_t base; /* position of code 0 (segment.cuh) */
  int64_t last; /* chunk of the last token */
  int row, set, head;
  int ring;                 /* ring slot of code 0 */
  row_source sources[2][3]; /* phi and values: of sparse slots, of the ring, of tokens */
  bool folds;               /* pairs are folded now or later in the call, so that their phi are there */
  bool resumes, continues;  /* the call has tokens of the row before this segment, and behind it */
};

/* --- small things ----------------------------------------------------------------------------------------------- */

__device__ float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(ALL, x, i);
  return x;
}

/* 8 elements of 16 bits from element k of a row of n, zero past its end. */
template <bool VECTOR> __device__ uint4 load_chunk(const char *row, int k, int n) {
  uint4 chunk = make_uint4(0, 0, 0, 0);
  if (k >= n) return chunk;
  const uint16_t *x = reinterpret_cast<const uint16_t *>(row) + k;
  if constexpr (VECTOR) {
    chunk = __ldg(reinterpret_cast<const uint4 *>(x));
  } else {
    unsigned e[8];
#pragma unroll
    for (int i = 0; i < 8; i++) e[i] = k + i < n ? __ldg(x + i) : 0;
    chunk = make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16);
  }
  return chunk;
}

/* Of a kernel's kind of cache: whether values are float16. */
template <typename T> constexpr bool is_half = __is_same(typename T::element, __half);

/* phi^T s of the row whose products are in `acc`, in all lanes of its quad. */
__device__ float quad_normalizer(const float (&acc)[4], const int half) {
  const float z = acc[2 * half] + acc[2 * half + 1];
  return __shfl_sync(ALL, z, threadIdx.x % 32 & ~3);
}

/* n / z - v, or -v where z = 0; 1 / z overflows for a z near the smallest float, so both sides are lifted first. */
struct recall_scale {
  float up, inverse;
};

__device__ recall_scale recall_scale_of(float z) {
  recall_scale scale = {0, 0};
  if (z != 0) {
    scale.up = z < 1e-30f ? 0x1p64f : 1;
    scale.inverse = 1 / (z * scale.up);
  }
  return scale;
}

__device__ float recall_error(const recall_scale &scale, float n, float v, float sum) {
  const float d = fmaf(n * scale.up, scale.inverse, -v);
  return fmaf(d, d, sum);
}

/* `span`: the row's; `own`: which of the set's heads. */
__device__ scan_unit scan_unit_of(const lola_device_segment &g, const lola_device_span &span, int row, int set,
                                  int own) {
  scan_unit unit;
  unit.span = span;
  unit.base = lola_device_origin(span) - g.R;
  unit.last = (unit.span.position + unit.span.tokens - 1) / g.C;
  unit.row = row;
  unit.set = set;
  unit.head = set * g.rs + own;
  unit.ring = static_cast<int>(lola_device_ring_slot(unit.base, g.R));
  const int64_t item = lola_device_item(g.dtype), F = g.F * item, Dv = g.Dv * item;
  const int64_t state = static_cast<int64_t>(row) * g.Hq + unit.head, pairs = static_cast<int64_t>(row) * g.S + set;
  const int64_t kv_head = set / (g.S / g.Hkv), key = (span.key - span.key_at) * g.Hq + unit.head;
  unit.sources[0][0] = {static_cast<const char *>(g.slot_phi) + state * g.L * F, F};
  unit.sources[0][1] = {static_cast<const char *>(g.ring_phi) + state * g.R * F, F};
  unit.sources[0][2] = {static_cast<const char *>(g.token_phi) + key * F, g.Hq * F};
  unit.sources[1][0] = {static_cast<const char *>(g.sparse_values) + pairs * g.L * Dv, Dv};
  unit.sources[1][1] = {
      static_cast<const char *>(g.window_values) + (static_cast<int64_t>(row) * g.Hkv + kv_head) * g.R * Dv, Dv};
  unit.sources[1][2] = {lola_device_at(g.v, span.batch, lola_device_first(span), kv_head), g.v.stride_t * item};
  unit.folds = lola_device_folds(g, lola_device_call_leaving(g, span));
  unit.resumes = span.before > 0;
  unit.continues = span.before + span.tokens < span.in_call;
  return unit;
}

__device__ bool row_has_work(const lola_device_segment &g, int row, int record) {
  const lola_device_span &span = g.spans[row];
  if (span.tokens <= 0) return false;
  if (record) return true;
  const lola_device_leaving leaving = lola_device_segment_leaving(g, span);
  return leaving.end > leaving.first;
}

/* How many units a decoding step has, before the kernels before this one have ended; their spans are older than that.
 */
template <int COUNT> __device__ int decoding_units(const lola_device_segment &g) {
  int rows = 0;
  for (int first = 0; first < g.B; first += COUNT) {
    const int row = first + static_cast<int>(threadIdx.x);
    bool busy = false;
    if (row < g.B) {
      lola_device_span span;
      const int64_t *const from = reinterpret_cast<const int64_t *>(g.spans + row);
      int64_t *const to = reinterpret_cast<int64_t *>(&span);
#pragma unroll
      for (unsigned i = 0; i < sizeof span / 8; i++) to[i] = __ldcg(from + i);
      const lola_device_leaving leaving = lola_device_segment_leaving(g, span);
      busy = leaving.end > leaving.first;
    }
    rows += __syncthreads_count(busy);
  }
  return rows * g.S;
}

/* Calls walk(row, set) for the group's units, for a whole block of at least COUNT threads, which looks at COUNT rows at
 * a time; `rows` (COUNT,) and `row_count` (COUNT / 32,) are in shared memory, and sync() is a barrier of the block.
 * Units are numbered through all rows with work; a group takes every groups-th. */
template <int COUNT, class Sync, class Walk>
__device__ void for_each_unit(const lola_device_segment &g, int groups, int group, int record, int *rows,
                              int *row_count, Sync sync, Walk walk) {
  int unit = group; /* the group's next one, counted from the first of the rows that are being looked at */
#pragma unroll 1
  for (int first = 0; first < g.B; first += COUNT) {
    /* Read anew, so that nothing of it is kept in registers from unit to unit. */
    const int thread = static_cast<int>(lola_thread()), warp = thread / 32, lane = thread % 32, row = first + thread;
    const bool looks = thread < COUNT, busy = looks && row < g.B && row_has_work(g, row, record);
    const unsigned bits = __ballot_sync(ALL, busy);
    if (looks && lane == 0) row_count[warp] = __popc(bits);
    sync();
    int at = 0;
    for (int w = 0; w < warp && w < COUNT / 32; w++) at += row_count[w];
    if (busy) rows[at + __popc(bits & ((1u << lane) - 1))] = row;
    sync();
    const auto units = [&] {
      int some = 0;
      for (int w = 0; w < COUNT / 32; w++) some += row_count[w];
      return some * g.S;
    };
#pragma unroll 1
    for (; unit < units(); unit += groups) {
      int sets = g.S;
      asm volatile("" : "+r"(sets)); /* nor what dividing by it takes */
      walk(rows[unit / sets], unit % sets);
    }
    unit -= units();
    sync(); /* the counts are read to the end */
  }
}

} // namespace
#endif
