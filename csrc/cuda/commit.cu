/* commit: what a call leaves behind in the cache's buffers, after every kernel that reads their old content.
 *
 * The sparse part copies keys, values and a caller's own features of pairs that entered the sparse cache into their
 * slots; they come from the window ring or the call's arrays, never from a slot, so the order of copies is free.
 * The window part copies the last R tokens of each row into the ring, then advances tokens_seen and chunks. The sparse
 * part reads what it overwrites, and comes first.
 * Each part gives a row a few blocks whose teams share its work; a row without work costs a block one look at its span.
 * Launched chained, the kernel lets the next one start at once: decoding waits for it where it matters. */
#include "chain.cuh"
#include "segment.cuh"

namespace {

constexpr int THREADS = 256;
/* A team of lanes copies pairs one after the other, those of a few slots. */
constexpr int TEAM = 16, TEAMS = THREADS / TEAM, TEAM_SLOTS = 2;
/* Blocks of all rows together, at most, as long as each row has one: few enough to run at once, since most steps of
 * decoding have no work for them. */
constexpr int64_t MOST_BLOCKS = 384;

__device__ __forceinline__ lola_dtype feature_type(const lola_device_segment &g) {
  return g.dtype == LOLA_FLOAT32 ? LOLA_FLOAT32 : LOLA_BFLOAT16;
}

__host__ __device__ __forceinline__ int64_t runs_of(int64_t slots) { return (slots + TEAM_SLOTS - 1) / TEAM_SLOTS; }

/* A key and a value by one team, in pieces of U; both are read before either is written. */
template <typename U>
__device__ __forceinline__ void copy_pair_as(char *to_key, const char *key, int64_t key_bytes, char *to_value,
                                             const char *value, int64_t value_bytes) {
  const int64_t keys = key_bytes / static_cast<int64_t>(sizeof(U)),
                values = value_bytes / static_cast<int64_t>(sizeof(U));
  for (int64_t i = threadIdx.x % TEAM; i < keys || i < values; i += TEAM) {
    U k = {}, v = {};
    if (i < keys) k = reinterpret_cast<const U *>(key)[i];
    if (i < values) v = reinterpret_cast<const U *>(value)[i];
    if (i < keys) reinterpret_cast<U *>(to_key)[i] = k;
    if (i < values) reinterpret_cast<U *>(to_value)[i] = v;
  }
}

__device__ __forceinline__ void copy_pair(char *to_key, const char *key, int64_t key_bytes, char *to_value,
                                          const char *value, int64_t value_bytes) {
  const uint64_t all = reinterpret_cast<uintptr_t>(to_key) | reinterpret_cast<uintptr_t>(key) |
                       reinterpret_cast<uintptr_t>(to_value) | reinterpret_cast<uintptr_t>(value) |
                       static_cast<uint64_t>(key_bytes) | static_cast<uint64_t>(value_bytes);
  if (all % 16 == 0)
    copy_pair_as<uint4>(to_key, key, key_bytes, to_value, value, value_bytes);
  else
    copy_pair_as<uint16_t>(to_key, key, key_bytes, to_value, value, value_bytes);
}

/* A row of features by one team, from `type` to `to_type`. */
__device__ __forceinline__ void copy_features(char *to, lola_dtype to_type, const char *from, lola_dtype type, int F) {
  for (int f = threadIdx.x % TEAM; f < F; f += TEAM) lola_device_store(to, f, to_type, lola_device_load(from, f, type));
}

/* Part `part` of `parts` of a row's sparse slots. */
__device__ __forceinline__ void commit_sparse(const lola_device_segment &g, const lola_device_span &span, int row,
                                              int part, int parts) {
  if (span.tokens == 0 || (span.position + span.tokens - 1) / g.C <= span.updated) return;
  const int member = threadIdx.x % TEAM;
  const unsigned team = 0xffffu << threadIdx.x % 32 / TEAM * TEAM;
  const int64_t item = lola_device_item(g.dtype), key_bytes = g.D * item, value_bytes = g.Dv * item;
  const int64_t runs = runs_of(g.L);
  const lola_dtype type = feature_type(g);
  for (int64_t i = part * TEAMS + threadIdx.x / TEAM; i < runs * g.S; i += static_cast<int64_t>(parts) * TEAMS) {
    const int set = static_cast<int>(i / runs);
    const int64_t group = static_cast<int64_t>(row) * g.S + set, first = i % runs * TEAM_SLOTS;
    const int64_t count = g.sparse_count[group];
    const int own = static_cast<int>(first) + member; /* whose source this lane looks up */
    const int code = member < TEAM_SLOTS && own < count ? g.slot_source[group * g.L + own] : -1;
#pragma unroll 1
    for (int j = 0; j < TEAM_SLOTS && first + j < count; j++) {
      const int source = __shfl_sync(team, code, j, TEAM);
      if (source < 0) continue;
      const int64_t slot = group * g.L + first + j;
      copy_pair(static_cast<char *>(g.sparse_keys) + slot * key_bytes, lola_device_key(g, span, row, set, source),
                key_bytes, static_cast<char *>(g.sparse_values) + slot * value_bytes,
                lola_device_value(g, span, row, set, source), value_bytes);
      for (int h = set * g.rs; g.stores_features && h < (set + 1) * g.rs; h++) {
        const int64_t head = static_cast<int64_t>(row) * g.Hq + h, bytes = g.F * lola_device_item(type);
        char *to = static_cast<char *>(g.sparse_features) + (head * g.L + first + j) * bytes;
        if (source < g.R)
          copy_features(to, type,
                        static_cast<const char *>(g.window_features) +
                            (head * g.R + lola_device_ring_slot(span.position - g.R + source, g.R)) * bytes,
                        type, g.F);
        else
          copy_features(to, type, lola_device_at(g.k_features, span.batch, span.first + source - g.R, h),
                        g.k_features.dtype, g.F);
      }
    }
  }
}

/* The same of its ring. A team writes one token of one KV head at a time. */
__device__ __forceinline__ void commit_window(const lola_device_segment &g, const lola_device_span &span, int row,
                                              int part, int parts) {
  if (span.tokens == 0) return;
  const int member = threadIdx.x % TEAM, sets = g.S / g.Hkv;
  const int64_t item = lola_device_item(g.dtype), key_bytes = g.D * item, value_bytes = g.Dv * item;
  const int64_t begin = max(span.tokens - g.R, INT64_C(0));
  const lola_dtype type = feature_type(g);
  for (int64_t i = part * TEAMS + threadIdx.x / TEAM; i < (span.tokens - begin) * g.Hkv;
       i += static_cast<int64_t>(parts) * TEAMS) {
    const int kv_head = static_cast<int>(i % g.Hkv);
    const int64_t t = begin + i / g.Hkv, slot = (span.position + t) % g.R;
    const int64_t at = (static_cast<int64_t>(row) * g.Hkv + kv_head) * g.R + slot;
    const int code = static_cast<int>(g.R + t);
    copy_pair(static_cast<char *>(g.window_keys) + at * key_bytes, lola_device_key(g, span, row, kv_head * sets, code),
              key_bytes, static_cast<char *>(g.window_values) + at * value_bytes,
              lola_device_value(g, span, row, kv_head * sets, code), value_bytes);
    for (int s = member; g.scores.data && s < sets; s += TEAM)
      lola_device_keep_given(g, row, kv_head * sets + s, slot, span.batch, span.first + t);
    for (int h = kv_head * g.r; g.stores_features && h < (kv_head + 1) * g.r; h++)
      copy_features(static_cast<char *>(g.window_features) +
                        ((static_cast<int64_t>(row) * g.Hq + h) * g.R + slot) * g.F * lola_device_item(type),
                    type, lola_device_at(g.k_features, span.batch, span.first + t, h), g.k_features.dtype, g.F);
  }
  if (part == 0 && threadIdx.x == 0) {
    const int64_t chunk = (span.position + span.tokens - 1) / g.C;
    g.tokens_seen[row] = span.position + span.tokens;
    if (chunk > g.chunks[row]) g.chunks[row] = chunk;
    __threadfence(); /* seen by whoever starts when the block has ended */
  }
}

/* A row has blocks for its sparse slots or blocks for its ring. Behind these the next kernel may be an update, which
 * looks at counters before it awaits this one: it starts when all blocks have ended. */
__global__ void __launch_bounds__(THREADS, 3)
    commit_kernel(const __grid_constant__ lola_device_segment g, int blocks, int window) {
  if (!window) lola_device_start_next();
  const int row = blockIdx.x / blocks, part = blockIdx.x % blocks;
  lola_device_await_previous();
  const lola_device_span span = lola_device_call_span(g.spans[row]);
  if (window)
    commit_window(g, span, row, part, blocks);
  else
    commit_sparse(g, span, row, part, blocks);
}

/* Blocks per row for work that keeps so many teams of it busy. */
int blocks_for(int64_t teams, int B) {
  int64_t blocks = (teams + TEAMS - 1) / TEAMS, most = MOST_BLOCKS / B;
  if (blocks > most) blocks = most;
  return blocks < 1 ? 1 : static_cast<int>(blocks);
}

lola_status launch(const lola_device_segment &g, int row_blocks, int window, cudaStream_t stream,
                   lola_message *message) {
  const int64_t blocks = static_cast<int64_t>(g.B) * row_blocks;
  if (!blocks) return LOLA_OK;
  if (blocks > INT64_C(0x7fffffff))
    return lola_fail(message, LOLA_VALUE_ERROR, "a batch of %d is too large: pass fewer rows", g.B);
  return lola_cuda_launched(
      lola_cuda_launch_chained(commit_kernel, static_cast<unsigned>(blocks), THREADS, 0, stream, g, row_blocks, window),
      "commit", message);
}

} // namespace

lola_status lola_cuda_commit_sparse(const lola_device_segment *segment, cudaStream_t stream, lola_message *message) {
  const lola_device_segment &g = *segment;
  return g.B && g.L ? launch(g, blocks_for(runs_of(g.L) * g.S, g.B), 0, stream, message) : LOLA_OK;
}

lola_status lola_cuda_commit(const lola_device_segment *segment, cudaStream_t stream, lola_message *message) {
  const lola_device_segment &g = *segment;
  if (!g.B) return LOLA_OK;
  const int64_t tokens = g.longest_in_call < g.R ? g.longest_in_call : g.R;
  lola_status status = lola_cuda_commit_sparse(segment, stream, message);
  if (!status) status = launch(g, blocks_for(tokens * g.Hkv, g.B), 1, stream, message);
  return status;
}
