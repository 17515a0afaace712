/* attention: plans segments and queues their steps; the host waits for nothing.
 *
 * Prefill runs segment by segment, so that scratch does not grow with length: each is a range of offsets into the
 * call's arrays, and a kernel works out what of it enters which row. Scratch of a call comes from the stream's pool.
 * A scan that leaves much of the device free has attend of the segment before and features of the next one beside it.
 * Decoding keeps what it needs in the cache's workspace; only an update that does not compute its features itself, and
 * needs memory for those of all its pairs for a moment, takes more from the pool. */
#include "chain.cuh"
#include "device.cuh"
#include "plan.cuh"
#include "steps.cuh"

namespace {

constexpr int THREADS = 256;
/* Tokens of all rows that a segment holds, more or less: enough to fill the device, few enough to bound scratch. */
constexpr int64_t SEGMENT_TOKENS = 8192;
/* Of a call from which on segments that overlap save more time than it takes to go from one to the next, and from which
 * on two of full length and their tapers do. */
constexpr int64_t OVERLAPPING_TOKENS = 3072, TWICE_OVERLAPPING_TOKENS = 6144;

/* --- the plan ---------------------------------------------------------------------------------------------------- */

/* How a call is cut into segments: the first has offsets 0 .. first - 1 of it, then come `whole` of `count` offsets,
 * one of `last_but_one`, and one of what is left. Fewer `segments` end with a whole one, or what is left of it. */
struct call_cuts {
  int64_t tokens, first, count, whole, last_but_one, segments;
};

__host__ __device__ int64_t segment_begin(const call_cuts &cuts, int64_t i) {
  if (i == cuts.segments) return cuts.tokens;
  if (i == 0) return 0;
  return i - 1 <= cuts.whole ? cuts.first + (i - 1) * cuts.count
                             : cuts.first + cuts.whole * cuts.count + cuts.last_but_one;
}

__host__ __device__ int64_t segment_length(const call_cuts &cuts, int64_t i) {
  return segment_begin(cuts, i + 1) - segment_begin(cuts, i);
}

/* The spans of all segments. Launched the ordinary way: it waits for all that is before it. */
__global__ void plan_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ call_rows rows,
                            const __grid_constant__ call_cuts cuts) {
  lola_device_start_next();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, i = index / g.B;
  if (i < cuts.segments)
    g.spans[index] = span_of(g, rows, static_cast<int>(index % g.B), segment_begin(cuts, i), segment_length(cuts, i));
}

/* Outputs of tokens that enter no row are zero. One thread per (batch row, token, head). */
__global__ void zero_outside_kernel(const __grid_constant__ lola_device_segment g,
                                    const __grid_constant__ call_rows rows, int64_t batch) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= batch * rows.tokens * g.Hq) return;
  int64_t h = index % g.Hq, t = index / g.Hq % rows.tokens, b = index / g.Hq / rows.tokens;
  int64_t start, stop;
  if (rows.cu_seqlens.data) { /* the rows lie one after the other */
    int64_t unused;
    row_range(rows, 0, &start, &unused);
    row_range(rows, g.B - 1, &unused, &stop);
  } else {
    row_range(rows, static_cast<int>(b), &start, &stop);
  }
  if (t >= start && t < stop) return;
  char *out = lola_device_at(g.out, b, t, h);
  for (int c = 0; c < g.Dv; c++) lola_device_store(out, c, g.out.dtype, 0);
  if (g.share.data) *reinterpret_cast<float *>(lola_device_at(g.share, b, t, h)) = 0;
}

int blocks_for(int64_t threads) { return static_cast<int>((threads + THREADS - 1) / THREADS); }

/* --- scratch ----------------------------------------------------------------------------------------------------- */

/* Hands out aligned pieces of a block; without a block it adds up. */
struct pieces {
  char *base;
  int64_t used = 0;
  template <class T> void take(T *&pointer, int64_t bytes) {
    pointer = base ? reinterpret_cast<T *>(base + used) : nullptr;
    used += (bytes + 255) / 256 * 256;
  }
};

/* What a cache keeps for its life: barriers and the decoding kernel's counters are zero between launches. */
struct workspace_layout {
  void *decode;
  unsigned *barriers;
  lola_device_span *spans;
  int32_t *slot_source;
  void *exchange;
};

workspace_layout lay_out_workspace(const lola_cache *cache, pieces *from) {
  workspace_layout w;
  from->take(w.decode, lola_cuda_decode_bytes(cache));
  from->take(w.barriers, LOLA_SCAN_BARRIERS * static_cast<int64_t>(sizeof(unsigned)));
  from->take(w.spans, cache->shape.batch * static_cast<int64_t>(sizeof(lola_device_span)));
  from->take(w.slot_source, cache->shape.batch * cache->sets * cache->config.sparse * 4);
  from->take(w.exchange, lola_cuda_scan_exchange_bytes(cache));
  return w;
}

/* Of what the cache holds. */
void take_phi(pieces *from, lola_device_segment *g) {
  int64_t item = lola_device_item(g->dtype), heads = static_cast<int64_t>(g->B) * g->Hq;
  from->take(g->slot_phi, heads * g->L * g->F * item);
  from->take(g->ring_phi, heads * g->R * g->F * item);
}

void take_records(pieces *from, lola_device_segment *g) {
  int64_t item = lola_device_item(g->dtype), rows = static_cast<int64_t>(g->tokens) * g->Hq;
  from->take(g->token_phi, static_cast<int64_t>(g->key_rows) * g->Hq * g->F * item);
  from->take(g->query_phi, rows * g->F * item);
  from->take(g->recalled, rows * g->Dv * 4);
  from->take(g->z, rows * 4);
  from->take(g->sources, static_cast<int64_t>(g->chunk_records) * g->S * g->L * 4);
  from->take(g->source_count, static_cast<int64_t>(g->chunk_records) * g->S * 4);
}

/* --- the call ---------------------------------------------------------------------------------------------------- */

lola_device_segment begin(const lola_cache *cache, const lola_cuda_call *call) {
  const lola_shape &shape = cache->shape;
  const lola_call &base = call->base;
  lola_device_segment g = {};
  g.B = static_cast<int>(shape.batch);
  g.Hq = static_cast<int>(shape.heads);
  g.Hkv = static_cast<int>(shape.kv_heads);
  g.S = static_cast<int>(cache->sets);
  g.r = g.Hq / g.Hkv;
  g.rs = g.Hq / g.S;
  g.D = static_cast<int>(shape.head_dim);
  g.Dv = static_cast<int>(shape.value_dim);
  g.F = static_cast<int>(shape.feature_dim);
  g.L = static_cast<int>(cache->config.sparse);
  g.W = cache->config.window;
  g.C = cache->config.chunk;
  g.R = cache->ring;
  g.dtype = shape.dtype;
  g.q_dtype = base.q.dtype;
  g.stores_features = cache->stores_features;
  g.mixing = base.mixing;
  g.score = cache->config.score;
  g.seed = cache->config.seed;
  g.scale = base.scale;
  g.gate = base.gate;
  g.map = base.map;
  g.q = base.q;
  g.k = base.k;
  g.v = base.v;
  g.out = base.out;
  g.q_features = base.q_features;
  g.k_features = base.k_features;
  g.scores = base.scores;
  g.share = base.share;
  g.tokens_seen = cache->tokens_seen;
  g.chunks = cache->chunks;
  g.row_ids = cache->row_ids;
  g.folded = cache->folded;
  g.sparse_count = cache->sparse_count;
  g.sparse_positions = cache->sparse_positions;
  g.window_keys = cache->window_keys;
  g.window_values = cache->window_values;
  g.sparse_keys = cache->sparse_keys;
  g.sparse_values = cache->sparse_values;
  g.window_features = cache->window_features;
  g.sparse_features = cache->sparse_features;
  g.sparse_scores = cache->sparse_scores;
  g.hidden = cache->hidden;
  g.normalizer = cache->normalizer;
  g.window_given = cache->window_given;
  g.sparse_given = cache->sparse_given;
  return g;
}

lola_status decode(lola_device_segment g, void *decode_scratch, const call_rows &rows, const lola_cuda_call *call,
                   lola_message *message) {
  cudaStream_t stream = static_cast<cudaStream_t>(call->stream);
  void *phi = nullptr;
  if (!call->no_update && !lola_cuda_update_projects(&g)) {
    pieces sizes = {nullptr};
    take_phi(&sizes, &g);
    lola_status status = lola_cuda_allocate(call->device, sizes.used, call->stream, &phi, message);
    if (status) return status;
    pieces from = {static_cast<char *>(phi)};
    take_phi(&from, &g);
  }
  g.tokens = g.B; /* a token a row, at most */
  g.longest = 1;
  const lola_status status = lola_cuda_decode(&g, rows, decode_scratch, !call->no_update, stream, message);
  lola_cuda_release(call->device, phi, call->stream);
  return status;
}

struct prefill_plan {
  call_cuts cuts;
  int64_t batch; /* rows of the call's arrays */
  int beside;    /* multiprocessors for phases of neighbouring segments beside a scan; 0: they take turns with it */
};

/* Segments of one length, as few as there may be. */
call_cuts cut_evenly(int64_t tokens, int64_t first, int64_t count) {
  const int64_t more = tokens > first ? (tokens - first + count - 1) / count : 0;
  return call_cuts{tokens, first, count, more, 0, 1 + more};
}

/* Segments that overlap: nothing runs beside the features of the first, nor beside attend of the last, so that these
 * are a quarter of the others, and the last but one is half of them. In whole chunks. */
call_cuts cut_tapered(int64_t tokens, int64_t longest, bool twice, int64_t C) {
  int64_t lengths = (tokens + longest - 1) / longest; /* in all */
  if (lengths == 1 && twice) lengths = 2;
  const auto chunks = [&](int64_t n) { return (n + C - 1) / C * C; };
  const int64_t count = chunks((tokens + lengths - 1) / lengths), first = chunks((count + 3) / 4), whole = lengths - 1;
  const int64_t left = tokens - first - whole * count;
  if (left < 3 * C || left > count) return cut_evenly(tokens, first, count);
  return call_cuts{tokens, first, count, whole, chunks(left * 2 / 3), whole + 3};
}

prefill_plan plan_prefill(const lola_device_segment &g, const call_rows &rows) {
  prefill_plan plan = {{}, g.packed ? 1 : g.B, 0};
  int64_t longest = SEGMENT_TOKENS / plan.batch < 64 ? 64 : SEGMENT_TOKENS / plan.batch;
  /* Where chunks are short their records outweigh the tokens: one word for each slot and chunk. */
  const int64_t record = static_cast<int64_t>(g.S) * g.L / g.C, token = static_cast<int64_t>(g.Hq) * (g.F + g.Dv);
  if (record > token) longest = longest * token / record < 64 ? 64 : longest * token / record;
  if (longest > rows.tokens) longest = rows.tokens;
  const int64_t all = rows.tokens * plan.batch;
  const int left = all >= OVERLAPPING_TOKENS ? lola_cuda_scan_leaves(&g) : 0;
  if (left) plan.cuts = cut_tapered(rows.tokens, longest, all > TWICE_OVERLAPPING_TOKENS, g.C);
  if (left && plan.cuts.segments > 1)
    plan.beside = left;
  else
    plan.cuts = cut_evenly(rows.tokens, longest, longest);
  return plan;
}

/* Sizes of a segment of so many offsets. */
void size_segment(const prefill_plan &plan, int64_t part, lola_device_segment *g) {
  g->tokens = static_cast<int>(plan.batch * part);
  g->key_rows = static_cast<int>(g->packed ? part + g->B * g->C : plan.batch * lola_key_pitch(*g, part));
  g->longest = part;
  g->chunk_records = static_cast<int>(g->packed ? part / g->C + 2 * g->B + 1 : plan.batch * (part / g->C + 2));
}

/* Scratch of segments that take turns, from what they have in common; its bytes. */
int64_t lay_out_prefill(const prefill_plan &plan, const lola_device_segment &common, char *memory,
                        lola_device_segment (&turns)[2]) {
  pieces from = {memory};
  lola_device_segment &even = turns[0], &odd = turns[1];
  even = common;
  size_segment(plan, plan.cuts.count, &even);
  from.take(even.spans, plan.cuts.segments * even.B * static_cast<int64_t>(sizeof(lola_device_span)));
  take_phi(&from, &even);
  odd = even;
  take_records(&from, &even);
  if (plan.beside)
    take_records(&from, &odd);
  else
    odd = even;
  return from.used;
}

/* Every kernel of the loop awaits all before it, but attend of the segment before and features of the next one's
 * tokens, which start once the scan's blocks have: whatever came before that scan has ended. Beside it they read spans,
 * the call's arrays, the cache's pairs, which stay as they are until commit, and what their own segment's turn holds
 * since then, and write outputs and features of the next turn, which the last scan but one was the last to read. */
lola_status prefill(const lola_device_segment &common, const call_rows &rows, const lola_cuda_call *call,
                    lola_message *message) {
  cudaStream_t stream = static_cast<cudaStream_t>(call->stream);
  const prefill_plan plan = plan_prefill(common, rows);
  const call_cuts &cuts = plan.cuts;
  lola_device_segment turns[2];
  void *scratch;
  lola_status status =
      lola_cuda_allocate(call->device, lay_out_prefill(plan, common, nullptr, turns), call->stream, &scratch, message);
  if (status) return status;
  lay_out_prefill(plan, common, static_cast<char *>(scratch), turns);
  turns[0].queries_dealt = turns[1].queries_dealt =
      lola_cuda_scan_takes_dealt(&common) && lola_cuda_features_can_deal(&common);
  const auto segment_at = [&](int64_t i) {
    lola_device_segment g = turns[i % 2];
    size_segment(plan, segment_length(cuts, i), &g);
    g.spans += i * g.B;
    return g;
  };
  plan_kernel<<<blocks_for(cuts.segments * common.B), THREADS, 0, stream>>>(turns[0], rows, cuts);
  status = lola_cuda_launched("plan", message);
  for (int64_t i = 0; i < cuts.segments && !status; i++) {
    lola_device_segment g = segment_at(i);
    g.spans_are_old = i > 0;
    const bool begins = !plan.beside || i == 0, ends = !plan.beside || i + 1 == cuts.segments;
    const int parts = (i == 0 ? LOLA_FEATURES_OF_CACHE : 0) | (begins ? LOLA_FEATURES_OF_TOKENS : 0);
    if (parts) status = lola_cuda_segment_features(&g, parts, 0, nullptr, stream, message);
    if (!status) status = lola_cuda_scan(&g, 1, stream, message);
    if (!status && !begins) {
      const lola_device_segment before = segment_at(i - 1);
      status = lola_cuda_segment_attend(&before, plan.beside, stream, message);
    }
    if (!status && !ends) {
      const lola_device_segment after = segment_at(i + 1);
      status = lola_cuda_segment_features(&after, LOLA_FEATURES_OF_TOKENS, plan.beside, nullptr, stream, message);
    }
    if (!status && ends) status = lola_cuda_segment_attend(&g, 0, stream, message);
  }
  if (!status) {
    const lola_device_segment first = segment_at(0);
    status = lola_cuda_commit(&first, stream, message);
  }
  lola_cuda_release(call->device, scratch, call->stream);
  return status;
}

call_rows rows_of(const lola_cuda_call *call) {
  return call_rows{call->starts, call->stops, call->cu_seqlens, call->tokens};
}

/* --- check_finite ------------------------------------------------------------------------------------------------ */

struct checked_input {
  lola_array array;
  int heads, n, not_negative, bit;
};

/* One warp per (batch row, token, head). */
__global__ void check_kernel(const __grid_constant__ checked_input input, const __grid_constant__ call_rows rows, int B,
                             int64_t batch, int *odd) {
  int lane = threadIdx.x % 32;
  int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (index >= batch * rows.tokens * input.heads) return;
  int64_t h = index % input.heads, t = index / input.heads % rows.tokens, b = index / input.heads / rows.tokens;
  if (!rows.cu_seqlens.data) {
    int64_t start, stop;
    row_range(rows, static_cast<int>(b), &start, &stop);
    if (t < start || t >= stop) return;
  }
  const char *data = lola_device_at(input.array, b, t, h);
  bool wrong = false;
  for (int i = lane; i < input.n; i += 32) {
    float x = lola_device_load(data, i, input.array.dtype);
    wrong |= !isfinite(x) || (input.not_negative && x < 0);
  }
  if (__any_sync(0xffffffffu, wrong) && lane == 0) atomicOr(odd, 1 << input.bit);
}

__global__ void check_index_kernel(const __grid_constant__ call_rows rows, int B, int *odd) {
  int64_t T = rows.tokens;
  bool wrong = false;
  for (int row = threadIdx.x; row < B; row += blockDim.x) {
    int64_t start = 0, stop = T;
    if (rows.cu_seqlens.data) {
      start = index_at(rows.cu_seqlens, row);
      stop = index_at(rows.cu_seqlens, row + 1);
      wrong |= (row == 0 && start != 0) || (row == B - 1 && stop != T);
    } else {
      if (rows.starts.data) start = index_at(rows.starts, row);
      if (rows.stops.data) stop = index_at(rows.stops, row);
    }
    wrong |= start < 0 || start > stop || stop > T;
  }
  if (wrong) atomicOr(odd, 1 << 6);
}

} // namespace

int64_t lola_cuda_workspace_bytes(const lola_cache *cache, int device) {
  lola_message ignored;
  lola_device_scope scope(device, &ignored);
  pieces sizes = {nullptr};
  lay_out_workspace(cache, &sizes);
  return sizes.used;
}

lola_status lola_cuda_attention(lola_cache *cache, void *workspace, const lola_cuda_call *call, lola_message *message) {
  if (cache->config.score == LOLA_SCORE_ATTENTION)
    return lola_fail(message, LOLA_VALUE_ERROR,
                     "score 'attention' runs on the CPU only: use a cache with device='cpu', or another score");
  if (!cache->shape.batch || !call->tokens) return LOLA_OK;
  lola_device_scope scope(call->device, message);
  if (scope.status) return scope.status;
  lola_device_segment g = begin(cache, call);
  call_rows rows = rows_of(call);
  g.packed = rows.cu_seqlens.data != nullptr;
  g.longest_in_call = rows.tokens;
  if (rows.tokens > INT32_MAX - g.R)
    return lola_fail(message, LOLA_VALUE_ERROR, "too many tokens in one call: pass fewer at a time");
  pieces from = {static_cast<char *>(workspace)};
  workspace_layout kept = lay_out_workspace(cache, &from);
  g.spans = kept.spans;
  g.slot_source = kept.slot_source;
  g.barriers = kept.barriers;
  g.exchange = kept.exchange;
  g.exchange_bytes = lola_cuda_scan_exchange_bytes(cache);
  int64_t batch = g.packed ? 1 : g.B;
  if (rows.starts.data || rows.stops.data || rows.cu_seqlens.data) {
    int64_t threads = batch * rows.tokens * g.Hq;
    if (threads > INT64_C(0x7fffffff) * THREADS)
      return lola_fail(message, LOLA_VALUE_ERROR, "too many tokens in one call: pass fewer at a time");
    zero_outside_kernel<<<blocks_for(threads), THREADS, 0, static_cast<cudaStream_t>(call->stream)>>>(g, rows, batch);
    lola_status status = lola_cuda_launched("zero_outside", message);
    if (status) return status;
  }
  return call->tokens == 1 ? decode(g, kept.decode, rows, call, message) : prefill(g, rows, call, message);
}

lola_status lola_cuda_check_finite(const lola_cache *cache, const lola_cuda_call *call, int *odd,
                                   lola_message *message) {
  const lola_shape &shape = cache->shape;
  *odd = 0;
  if (!shape.batch) return LOLA_OK;
  lola_device_scope scope(call->device, message);
  if (scope.status) return scope.status;
  cudaStream_t stream = static_cast<cudaStream_t>(call->stream);
  const lola_call &base = call->base;
  const int heads = static_cast<int>(shape.heads), kv_heads = static_cast<int>(shape.kv_heads);
  const int D = static_cast<int>(shape.head_dim), Dv = static_cast<int>(shape.value_dim),
            F = static_cast<int>(shape.feature_dim);
  const checked_input inputs[] = {
      {base.q, heads, D, 0, 0},          {base.k, kv_heads, D, 0, 1},       {base.v, kv_heads, Dv, 0, 2},
      {base.q_features, heads, F, 1, 3}, {base.k_features, heads, F, 1, 4}, {base.scores, heads, 1, 0, 5},
  };
  void *found;
  lola_status status = lola_cuda_allocate(call->device, sizeof(int), call->stream, &found, message);
  if (status) return status;
  status = lola_cuda_status(cudaMemsetAsync(found, 0, sizeof(int), stream), "cudaMemsetAsync", message);
  call_rows rows = rows_of(call);
  int64_t batch = rows.cu_seqlens.data ? 1 : shape.batch;
  for (const checked_input &input : inputs) {
    int64_t threads = batch * rows.tokens * input.heads * 32;
    if (status || !input.array.data || !threads) continue;
    check_kernel<<<blocks_for(threads), THREADS, 0, stream>>>(input, rows, static_cast<int>(shape.batch), batch,
                                                              static_cast<int *>(found));
    status = lola_cuda_launched("check", message);
  }
  if (!status && (rows.starts.data || rows.stops.data || rows.cu_seqlens.data)) {
    check_index_kernel<<<1, THREADS, 0, stream>>>(rows, static_cast<int>(shape.batch), static_cast<int *>(found));
    status = lola_cuda_launched("check_index", message);
  }
  if (!status)
    status = lola_cuda_status(cudaMemcpyAsync(odd, found, sizeof(int), cudaMemcpyDeviceToHost, stream),
                              "cudaMemcpyAsync", message);
  if (!status) status = lola_cuda_status(cudaStreamSynchronize(stream), "cudaStreamSynchronize", message);
  lola_cuda_release(call->device, found, call->stream);
  return status;
}
