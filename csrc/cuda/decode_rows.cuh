/* The rows of a large decoding step, and what its kernels signal each other. They run beside one another: all blocks of
 * one have started before the next one does, so each waits for what it needs and for no more. Only the last one, the
 * merge, awaits them all.
 *
 * The kernels start before the step begins: while the merge of the last step is under way, its successors take the
 * places that become free and wait. One block of the step's first kernel, the only one to await all that came before,
 * says when the step begins, and writes the rows then; the step's last kernel takes the word back before it lets
 * another step's kernels start. */
#ifndef LOLA_CUDA_DECODE_ROWS_CUH
#define LOLA_CUDA_DECODE_ROWS_CUH

#include "divide.cuh"
#include "instructions.cuh"
#include "plan.cuh"

/* How a row is looked up. */
struct row_plan {
  divisor by_C, by_R;
  int small_sizes;      /* C, R and W fit 31 bits */
  int writes_spans;     /* kernels of this step read them */
  int64_t first_update; /* the first position whose chunk does not begin within W */
};

/* A row's window with its token. */
struct row_window {
  int64_t chunk;       /* of the token */
  int ring_slot, slot; /* of the token, of the first pair */
  int pairs;           /* with the newest */
};

/* A row as the step begins. */
struct decode_row {
  int64_t batch, first, position; /* of its token */
  int row;                        /* -1: idle */
  int updated;                    /* pairs leave its window in this step */
  row_window window;
};

/* On lines of their own. `begun` is 0 between steps; who sets it clears the others before. */
struct decode_signals {
  alignas(128) unsigned begun;      /* all that came before the step has ended */
  alignas(128) unsigned ticket;     /* units that the main kernel's blocks have taken, beyond those they begin with */
  alignas(128) unsigned rows_known; /* 0 until the updated rows of this step are written, then 1 more than there are */
  alignas(128) unsigned queries;    /* blocks that have written their phi(q) */
};

struct decode_rows {
  decode_row *rows; /* in the cache's order */
  int *updated;     /* which are updated, in any order */
  decode_signals *signals;
};

namespace {

inline row_plan plan_rows(const lola_device_segment &g, bool writes_spans) {
  row_plan p = {};
  p.by_C = divisor_of(g.C);
  p.by_R = divisor_of(g.R);
  p.small_sizes = g.C < INT64_C(0x40000000) && g.W < INT64_C(0x40000000) && g.R < INT64_C(0x40000000);
  p.writes_spans = writes_spans;
  p.first_update = (g.W / g.C + 1) * g.C;
  return p;
}

/* Whether pairs leave a row's window with its token: it is the first of its chunk, whose window does not begin with
 * position 0. */
__device__ __forceinline__ bool begins_update(const lola_device_segment &g, int64_t first_update, int64_t position,
                                              int64_t updated) {
  return position >= (updated + 1) * g.C && position >= first_update;
}

__device__ __forceinline__ row_window window_of(const lola_device_segment &g, const row_plan &plan, int64_t position) {
  const bool small = plan.small_sizes && position < INT64_C(0x7fffffff);
  const auto slot_of = [&](int64_t x) { return static_cast<int>(x - divided(x, plan.by_R, small) * g.R); };
  row_window w;
  w.chunk = divided(position, plan.by_C, small);
  const int64_t begin = w.chunk * g.C - g.W, first = begin > 0 ? begin : 0;
  w.ring_slot = slot_of(position);
  w.slot = slot_of(first);
  w.pairs = static_cast<int>(position + 1 - first);
  return w;
}

/* A row, but for its window: from what the cache counts of it, and where the call says that its offsets
 * begin and end. */
__device__ __forceinline__ decode_row describe(const lola_device_segment &g, const row_plan &plan,
                                               const call_rows &rows, int row, int64_t position, int64_t updated,
                                               int64_t begins, int64_t ends) {
  const int64_t start = clamped(begins, 0, rows.tokens);
  const bool idle = min(ends, rows.tokens) <= start;
  decode_row d = {};
  d.batch = rows.cu_seqlens.data ? 0 : row;
  d.first = start;
  d.position = position;
  d.row = idle ? -1 : row;
  d.updated = !idle && begins_update(g, plan.first_update, position, updated);
  return d;
}

/* The step begins: by one block that has awaited all that came before it. Who cannot wait for the rows looks up its own
 * meanwhile. */
__device__ __forceinline__ void begin_step(const lola_device_segment &g, const row_plan &plan, const call_rows &rows,
                                           const decode_rows &known) {
  __shared__ int updated_rows;
  if (threadIdx.x == 0) {
    updated_rows = known.signals->ticket = known.signals->rows_known = known.signals->queries = 0;
    store_signal(&known.signals->begun, 1);
  }
  __syncthreads();
#pragma unroll 1
  for (int row = threadIdx.x; row < g.B; row += blockDim.x) {
    decode_row d = describe(g, plan, rows, row, __ldcg(g.tokens_seen + row), __ldcg(g.chunks + row),
                            row_end(rows, row, false), row_end(rows, row, true));
    if (d.updated) known.updated[atomicAdd(&updated_rows, 1)] = row;
    d.window = window_of(g, plan, d.position);
    known.rows[row] = d;
    if (plan.writes_spans) g.spans[row] = span_of(g, rows, row, 0, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) store_signal(&known.signals->rows_known, 1 + updated_rows);
}

/* Waits until the step has begun. */
__device__ __forceinline__ void await_begin(const decode_rows &known) {
  while (!load_signal(&known.signals->begun)) __nanosleep(20);
}

/* Waits until the rows of this step are written, once it has begun; how many are updated. */
__device__ __forceinline__ int await_rows(const decode_rows &known) {
  unsigned signal;
  while (!(signal = load_signal(&known.signals->rows_known))) __nanosleep(20);
  return static_cast<int>(signal - 1);
}

/* Waits until so many blocks have written their phi(q). */
__device__ __forceinline__ void await_queries(const decode_rows &known, unsigned blocks) {
  while (load_signal(&known.signals->queries) != blocks) __nanosleep(20);
}

/* By one thread of the step's last kernel, when nobody waits for the step's begin any more and before another step's
 * kernels may start. */
__device__ __forceinline__ void forget_begin(decode_signals *signals) {
  signals->begun = 0;
  __threadfence();
}

} // namespace

#endif
