/* What a block of queries attends to, and where that lies: shared by the attention kernels.
 *
 * A block is up to 64 tokens of one chunk and the query heads of one set. It sees one list of pairs: first the sparse
 * pairs, then the window in order of position. Token i of the block sees the first `seen + i` pairs of the list, so one
 * comparison masks sparse tail, causal diagonal and padding alike. */
#ifndef LOLA_CUDA_ATTEND_BLOCK_CUH
#define LOLA_CUDA_ATTEND_BLOCK_CUH

#include "chain.cuh"
#include "instructions.cuh"
#include "segment.cuh"

namespace {

constexpr int BLOCK_TOKENS = LOLA_BLOCK;
constexpr float LOG2E = 0x1.715476p+0f;

struct query_block {
  int row, set;
  int first, tokens; /* of the span */
  int sparse, seen;  /* sparse pairs; pairs that the block's first token sees */
  int window_code;   /* code of the first window position */
  const int32_t *sources;
};

/* Where the pairs of a list lie, as lola_device_key and lola_device_value say: sparse slots, window ring, the call's
 * tokens; strides in bytes. Kept in shared memory: it is read once for each pair of a tile. */
struct pair_places {
  const int32_t *sources;
  int sparse, window_code, ring, ring_start; /* ring slots; the slot of the row's first position in the call */
  const char *key[3], *value[3];
  int64_t key_stride[3], value_stride[3];
};

/* The row whose chunk records hold `record`, or -1. Spans ascend in `chunk`. For a whole warp. */
__device__ __forceinline__ int find_row(const lola_device_span *spans, int B, int record) {
  int low = 0, high = B;
  while (high - low > 1) {
    int step = (high - low + 31) / 32, row = low + static_cast<int>(threadIdx.x % 32) * step;
    unsigned before = __ballot_sync(0xffffffffu, row < high && spans[row].chunk <= record);
    if (!before) return -1;
    low += (31 - __clz(static_cast<int>(before))) * step;
    high = min(high, low + step);
  }
  return spans[low].chunk <= record && record < spans[low].chunk + spans[low].chunks ? low : -1;
}

/* Part `part` of a chunk record; false where there are no tokens. For a whole warp. */
__device__ __forceinline__ bool open_block(const lola_device_segment &g, int record, int set, int part,
                                           query_block *block) {
  int row = find_row(g.spans, g.B, record);
  if (row < 0) return false;
  const lola_device_span &span = g.spans[row];
  int64_t position = span.position, chunk = position / g.C + (record - span.chunk);
  int64_t first = max(chunk * g.C - position, INT64_C(0)) + static_cast<int64_t>(part) * BLOCK_TOKENS;
  int64_t end = min(min((chunk + 1) * g.C - position, static_cast<int64_t>(span.tokens)), first + BLOCK_TOKENS);
  if (first >= end) return false;
  int64_t window = max(chunk * g.C - g.W, INT64_C(0));
  int64_t list = static_cast<int64_t>(record) * g.S + set;
  block->row = row;
  block->set = set;
  block->first = static_cast<int>(first);
  block->tokens = static_cast<int>(end - first);
  block->sparse = g.L ? g.source_count[list] : 0;
  block->seen = block->sparse + static_cast<int>(position + first - window + 1);
  block->window_code = static_cast<int>(window - (lola_device_origin(span) - g.R));
  block->sources = g.sources + list * g.L;
  return true;
}

__device__ __forceinline__ void place_pairs(const lola_device_segment &g, const query_block &block,
                                            pair_places *places) {
  const lola_device_span &span = g.spans[block.row];
  int64_t item = lola_device_item(g.dtype), kv_head = block.set / (g.S / g.Hkv);
  int64_t slots = (static_cast<int64_t>(block.row) * g.S + block.set) * g.L;
  int64_t ring = (static_cast<int64_t>(block.row) * g.Hkv + kv_head) * g.R;
  places->sources = block.sources;
  places->sparse = block.sparse;
  places->window_code = block.window_code;
  places->ring = static_cast<int>(g.R);
  places->ring_start = static_cast<int>(lola_device_origin(span) % g.R);
  places->key[0] = static_cast<const char *>(g.sparse_keys) + slots * g.D * item;
  places->value[0] = static_cast<const char *>(g.sparse_values) + slots * g.Dv * item;
  places->key[1] = static_cast<const char *>(g.window_keys) + ring * g.D * item;
  places->value[1] = static_cast<const char *>(g.window_values) + ring * g.Dv * item;
  places->key[2] = lola_device_at(g.k, span.batch, lola_device_first(span), kv_head);
  places->value[2] = lola_device_at(g.v, span.batch, lola_device_first(span), kv_head);
  for (int i = 0; i < 2; i++) {
    places->key_stride[i] = g.D * item;
    places->value_stride[i] = g.Dv * item;
  }
  places->key_stride[2] = g.k.stride_t * item;
  places->value_stride[2] = g.v.stride_t * item;
}

/* Code of pair `index` of the list. */
__device__ __forceinline__ int pair_code(const pair_places &places, int index) {
  return index < places.sparse ? places.sources[index] : places.window_code + index - places.sparse;
}

/* Which of the three places a code is in, and its index there. */
__device__ __forceinline__ int pair_place(const pair_places &places, int code, int *index) {
  if (code < 0) {
    *index = -1 - code;
    return 0;
  }
  if (code < places.ring) {
    int slot = code - (places.ring - places.ring_start);
    *index = slot < 0 ? slot + places.ring : slot;
    return 1;
  }
  *index = code - places.ring;
  return 2;
}

__device__ __forceinline__ const char *pair_row(const pair_places &places, bool value, int code) {
  int index, place = pair_place(places, code, &index);
  const char *const *rows = value ? places.value : places.key;
  const int64_t *strides = value ? places.value_stride : places.key_stride;
  return rows[place] + index * strides[place];
}

__device__ __forceinline__ const char *pair_key(const pair_places &places, int code) {
  return pair_row(places, false, code);
}

__device__ __forceinline__ const char *pair_value(const pair_places &places, int code) {
  return pair_row(places, true, code);
}

/* --- the end of a row of the tensor-core kernels ------------------------------------------------------------------ */

/* Where the results of a block go and its linear term comes from: of its first token and its set's first head. */
struct block_end {
  char *out;
  float *share;
  int64_t linear; /* index into z and rows of recalled */
  int head;
};

__device__ __forceinline__ block_end end_of(const lola_device_segment &g, const query_block &block) {
  const lola_device_span &span = g.spans[block.row];
  int64_t first = span.first + block.first;
  int head = block.set * g.rs;
  return block_end{lola_device_at(g.out, span.batch, first, head),
                   g.share.data ? reinterpret_cast<float *>(lola_device_at(g.share, span.batch, first, head)) : nullptr,
                   (static_cast<int64_t>(span.token) + block.first) * g.Hq + head, head};
}

/* The same of one row: out is NULL where there is none, recalled where nothing is folded. */
struct row_end {
  char *out;
  float *share;
  const float *recalled;
  float z, gate;
};

__device__ __forceinline__ row_end end_of_row(const lola_device_segment &g, const block_end &block, int row,
                                              bool valid) {
  if (!valid) return row_end{};
  int token = row / g.rs, head = row % g.rs;
  int64_t linear = block.linear + static_cast<int64_t>(token) * g.Hq + head;
  row_end end;
  end.out = block.out + (token * g.out.stride_t + head * g.out.stride_h) * 2;
  end.share = block.share ? block.share + token * g.share.stride_t + head * g.share.stride_h : nullptr;
  end.z = g.mixing == LOLA_MIXING_CACHE_ONLY ? 0 : g.z[linear];
  end.recalled = end.z > 0 ? g.recalled + linear * g.Dv : nullptr;
  end.gate = g.gate ? g.gate[block.head + head] : 0;
  return end;
}

/* Finishes rows `half` (0: c[.][0..1], 1: c[.][2..3]) of a warp's 16 x Dv sums: mixes them with the linear term and
 * stores them. Lanes 4i .. 4i+3 hold one row, lane i columns 2i and 2i + 1 of each 8: recalled(j) gives those of the
 * j-th 8. m: what the row's exponents were taken from, in base 2, l: this lane's part of its sum. For a whole warp,
 * with rows that are none too. */
template <typename T, int N, class Recalled>
__device__ __forceinline__ void finish_row(lola_mixing mixing, const row_end &end, int Dv, int half,
                                           const float (&c)[N][4], float m, float l, const Recalled &recalled) {
  l += __shfl_xor_sync(0xffffffffu, l, 1);
  l += __shfl_xor_sync(0xffffffffu, l, 2);
  const lola_device_weights w = lola_device_mix(mixing, end.gate, m, l, end.z);
  const int quad = threadIdx.x & 3;
  const bool vector = reinterpret_cast<uintptr_t>(end.out) % 16 == 0;
  if (end.share && quad == 0) *end.share = w.share;
#pragma unroll
  for (int group = 0; group < N; group += 4) {
    float2 n[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      n[j] = make_float2(0, 0);
      if (end.recalled && (group + j) * 8 < Dv) n[j] = recalled(group + j);
    }
    uint32_t x[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
      x[j] = pack<T>(w.softmax * c[group + j][half * 2] + w.linear * n[j].x,
                     w.softmax * c[group + j][half * 2 + 1] + w.linear * n[j].y);
    transpose_quad(x);
    const int column = (group + quad) * 8;
    if (!end.out || column >= Dv) continue;
    if (vector) {
      *reinterpret_cast<uint4 *>(end.out + column * 2) = make_uint4(x[0], x[1], x[2], x[3]);
    } else {
      uint16_t *to = reinterpret_cast<uint16_t *>(end.out) + column;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        to[2 * j] = static_cast<uint16_t>(x[j]);
        to[2 * j + 1] = static_cast<uint16_t>(x[j] >> 16);
      }
    }
  }
}

/* --- softmax of a tile -------------------------------------------------------------------------------------------- */

/* How logits q.k become powers of two: x = factor * q.k with factor > 0, the sign of the scale moved into the queries
 * ((q & keep) ^ flip on pairs of 16-bit numbers). */
struct logit_scale {
  float factor;
  uint32_t keep, flip;
};

/* One row of a lane over its pairs of a tile: masks pairs from `seen` on (counted from this lane's first column), takes
 * the new maximum into *m (of unscaled logits), turns s into exponentials, adds them to *l, and returns what the sums
 * so far must be multiplied by. Exponents are factor * s - factor * m with factor * m rounded once, the same in every
 * tile. Needs factor > 0, and a finite logit in the first tile. */
template <int N>
__device__ __forceinline__ float softmax_row(float (&s)[N][4], int half, bool masked, int seen, float factor, float *m,
                                             float *l) {
  if (masked) {
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (j * 8 + i >= seen) s[j][half * 2 + i] = -INFINITY;
  }
  float high = fmaxf(s[0][half * 2], s[0][half * 2 + 1]);
#pragma unroll
  for (int j = 1; j < N; j++) high = fmaxf(high, fmaxf(s[j][half * 2], s[j][half * 2 + 1]));
  high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
  high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
  high = fmaxf(high, *m);
  float base = __fmul_rn(high, factor);
  float alpha = power_of_two(__fsub_rn(__fmul_rn(*m, factor), base));
  *m = high;
  float sum = *l * alpha;
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float p = power_of_two(fmaf(s[j][half * 2 + i], factor, -base));
      s[j][half * 2 + i] = p;
      sum += p;
    }
  *l = sum;
  return alpha;
}

} // namespace

#endif
