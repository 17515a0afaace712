/* Which offsets of a call enter which cache row, worked out on the device from the call's index arrays. */
#ifndef LOLA_CUDA_PLAN_CUH
#define LOLA_CUDA_PLAN_CUH

#include "scan.cuh"

struct call_rows {
  lola_index starts, stops, cu_seqlens;
  int64_t tokens; /* T of the arrays */
};

namespace {

__device__ inline int64_t index_at(const lola_index &index, int64_t i) {
  return index.item_size == 4 ? static_cast<const int32_t *>(index.data)[i]
                              : static_cast<const int64_t *>(index.data)[i];
}

__device__ inline int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

/* Where a row's offsets begin, or end, as the call says. */
__device__ inline int64_t row_end(const call_rows &rows, int row, bool end) {
  if (rows.cu_seqlens.data) return index_at(rows.cu_seqlens, row + end);
  const lola_index &index = end ? rows.stops : rows.starts;
  return index.data ? index_at(index, row) : end ? rows.tokens : 0;
}

/* Offsets of the call that enter a row. */
__device__ inline void row_range(const call_rows &rows, int row, int64_t *start, int64_t *stop) {
  *start = clamped(row_end(rows, row, false), 0, rows.tokens);
  *stop = clamped(row_end(rows, row, true), *start, rows.tokens);
}

/* Tokens of a row that leave its window with `count` tokens, at most. */
__host__ __device__ inline int64_t lola_key_pitch(const lola_device_segment &g, int64_t count) {
  return (count + g.C - 1) / g.C * g.C;
}

/* A row's span of the offsets first .. first+count-1, where the call's offsets before `first` were entered, or will
 * have been. */
__device__ inline lola_device_span span_of(const lola_device_segment &g, const call_rows &rows, int row, int64_t first,
                                           int64_t count) {
  int64_t start, stop;
  row_range(rows, row, &start, &stop);
  const int64_t before = max(min(stop, first) - start, INT64_C(0)), in_call = stop - start;
  start = max(start, first);
  stop = min(stop, first + count);
  bool packed = rows.cu_seqlens.data;
  lola_device_span span = {};
  span.position = g.tokens_seen[row] + before;
  span.updated = g.chunks[row];
  if (before) span.updated = max(span.updated, (span.position - 1) / g.C);
  span.batch = packed ? 0 : row;
  span.first = start;
  span.before = before;
  span.in_call = in_call;
  if (stop > start) {
    span.tokens = static_cast<int32_t>(stop - start);
    span.chunks = static_cast<int32_t>((span.position + span.tokens - 1) / g.C - span.position / g.C + 1);
  }
  span.token = static_cast<int32_t>((packed ? 0 : row * count) + start - first);
  /* Chunk records are counted so that no prefix sum is needed: n tokens touch at most n / C + 2 chunks. They ascend
   * with the row, idle ones too, so that a record's row can be searched for. */
  span.chunk = static_cast<int32_t>(packed ? (start - first) / g.C + 2 * row : row * (count / g.C + 2));
  if (rows.tokens == 1) return span; /* what leaves the window came before the call */
  /* And n tokens touch no more updates than n / C, rounded up. */
  const lola_device_leaving leaving = lola_device_segment_leaving(g, span);
  const int64_t origin = lola_device_origin(span), key = max(leaving.first, origin);
  span.keys = static_cast<int32_t>(max(leaving.end - key, INT64_C(0)));
  span.key = packed ? start - first + row * g.C : row * lola_key_pitch(g, count);
  span.key_at = key - origin;
  return span;
}

} // namespace

#endif
