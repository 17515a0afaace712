/* attend for all types and sizes, in float32 throughout.
 *
 * A block of 256 threads works on up to 64 queries of one head: logits of 64 queries x 64 pairs, 4 x 4 a thread, summed
 * over slices of 32 of D; then an online softmax, and sums over slices of 32 pairs and 128 columns of values, 4 x 8 a
 * thread. More columns than 128 repeat the logits. Keys and values are widened on their way into shared memory. The
 * same loop serves a segment and lola.kernels.attend, whose linear term is computed here as well. */
#ifndef LOLA_CUDA_ATTEND_GENERIC_CUH
#define LOLA_CUDA_ATTEND_GENERIC_CUH

#include "attend_block.cuh"

namespace {

constexpr int GENERIC_THREADS = 256, SLICE = 32, COLUMNS = 128, PAIRS = 64;
static_assert(BLOCK_TOKENS == 64 && PAIRS == 64, "threads hold 4 x 4 of them");

/* One head's queries of a block; strides in elements. */
struct generic_block {
  pair_places places;
  const char *q;
  char *out;
  float *share;
  int64_t q_stride, out_stride, share_stride;
  int tokens, D, Dv;
  lola_dtype dtype, q_dtype;
  float factor; /* scale * log2(e) */
  /* Token i sees the first min(limit, seen + slope * i) pairs. */
  int seen, slope, limit;
  lola_mixing mixing;
  float gate;
  /* The linear term: z and recalled of token i at i * linear_stride; or, with features, computed from them. */
  const float *z, *recalled;
  int64_t linear_stride;
  const char *features;
  lola_dtype features_dtype;
  int64_t features_stride;
  int F;
  const float *hidden, *normalizer;

  __device__ int seen_by(int i) const { return max(min(limit, seen + slope * i), 0); }
};

/* The blocks of a segment: (record, set, part, head of the set), the last fastest. */
struct segment_blocks {
  lola_device_segment g;
  int parts;

  __device__ bool open(int64_t index, generic_block *block) const {
    int head = static_cast<int>(index % g.rs);
    index /= g.rs;
    int part = static_cast<int>(index % parts);
    index /= parts;
    int set = static_cast<int>(index % g.S), record = static_cast<int>(index / g.S);
    query_block queries;
    if (!open_block(g, record, set, part, &queries)) return false;
    if (threadIdx.x % 32) return true;
    const lola_device_span &span = g.spans[queries.row];
    int64_t first = span.first + queries.first, token = static_cast<int64_t>(span.token) + queries.first;
    head += set * g.rs;
    place_pairs(g, queries, &block->places);
    block->q = lola_device_at(g.q, span.batch, first, head);
    block->out = lola_device_at(g.out, span.batch, first, head);
    block->share = g.share.data ? reinterpret_cast<float *>(lola_device_at(g.share, span.batch, first, head)) : nullptr;
    block->q_stride = g.q.stride_t;
    block->out_stride = g.out.stride_t;
    block->share_stride = g.share.stride_t;
    block->tokens = queries.tokens;
    block->D = g.D;
    block->Dv = g.Dv;
    block->dtype = g.dtype;
    block->q_dtype = g.q_dtype;
    block->factor = g.scale * LOG2E;
    block->seen = queries.seen;
    block->slope = 1;
    block->limit = INT32_MAX;
    block->mixing = g.mixing;
    block->gate = g.gate ? g.gate[head] : 0;
    block->z = g.z + token * g.Hq + head;
    block->recalled = g.recalled + (token * g.Hq + head) * g.Dv;
    block->linear_stride = g.Hq;
    block->features = nullptr;
    return true;
  }
};

/* The blocks of lola.kernels.attend: (b, head, part), the last fastest. */
struct step_blocks {
  lola_attend_call call;
  int parts;

  __device__ bool open(int64_t index, generic_block *block) const {
    if (threadIdx.x % 32) return true;
    int64_t part = index % parts, head = index / parts % call.Hq, b = index / parts / call.Hq;
    int64_t set = head / (call.Hq / call.Hs), first = part * BLOCK_TOKENS;
    int64_t count = call.count ? call.count[b * call.Hs + set] : call.S;
    block->places = pair_places{};
    block->places.key[2] = lola_device_at(call.k, b, 0, set);
    block->places.value[2] = lola_device_at(call.v, b, 0, set);
    block->places.key_stride[2] = call.k.stride_t * lola_device_item(call.k.dtype);
    block->places.value_stride[2] = call.v.stride_t * lola_device_item(call.v.dtype);
    block->q = lola_device_at(call.q, b, first, head);
    block->out = lola_device_at(call.out, b, first, head);
    block->share = nullptr;
    block->q_stride = call.q.stride_t;
    block->out_stride = call.out.stride_t;
    block->tokens = static_cast<int>(min(call.T - first, static_cast<int64_t>(BLOCK_TOKENS)));
    block->D = static_cast<int>(call.D);
    block->Dv = static_cast<int>(call.Dv);
    block->dtype = call.k.dtype;
    block->q_dtype = call.q.dtype;
    block->factor = call.scale * LOG2E;
    block->limit = static_cast<int>(max(min(count, call.S), INT64_C(0)));
    block->slope = call.causal ? 1 : 0;
    block->seen = call.causal ? static_cast<int>(call.S - call.T + first + 1) : block->limit;
    block->mixing = call.mixing;
    block->gate = call.gate ? call.gate[head] : 0;
    block->z = block->recalled = nullptr;
    block->features = nullptr;
    if (call.q_features.data && call.mixing != LOLA_MIXING_CACHE_ONLY) {
      block->features = lola_device_at(call.q_features, b, first, head);
      block->features_dtype = call.q_features.dtype;
      block->features_stride = call.q_features.stride_t;
      block->F = static_cast<int>(call.F);
      block->hidden = call.hidden + (b * call.Hq + head) * call.F * call.Dv;
      block->normalizer = call.normalizer + (b * call.Hq + head) * call.F;
    }
    return true;
  }
};

struct generic_shared {
  generic_block block;
  bool open;
  const char *key[PAIRS], *value[PAIRS];
  float normalizer[SLICE];
  union alignas(16) {
    struct {
      float q[SLICE][BLOCK_TOKENS + 4], k[SLICE][PAIRS + 4]; /* transposed: a thread reads 4 rows at once */
    } logits;
    struct {
      float v[SLICE][COLUMNS];
    } sums;
  };
  alignas(16) float p[PAIRS][BLOCK_TOKENS + 4];
};

/* Rows of n elements, columns from .. from + SLICE - 1 transposed into `to`, times factor; zeros outside. */
template <class Row>
__device__ __forceinline__ void load_transposed(float (&to)[SLICE][64 + 4], int rows, int n, int from, lola_dtype dtype,
                                                float factor, Row row_at) {
  for (int i = threadIdx.x; i < 64 * SLICE; i += GENERIC_THREADS) {
    int row = i / SLICE, column = from + i % SLICE;
    to[i % SLICE][row] = row < rows && column < n ? lola_device_load(row_at(row), column, dtype) * factor : 0;
  }
}

/* o (rows of `left`, transposed and 4 each thread) += left^T right, over SLICE. */
__device__ __forceinline__ void add_product(float (&o)[4][8], const float (*left)[64 + 4],
                                            const float (&right)[SLICE][COLUMNS], const float (&factor)[4]) {
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll 4
  for (int k = 0; k < SLICE; k++) {
    float4 a = *reinterpret_cast<const float4 *>(&left[k][ty * 4]);
    float4 b[2] = {*reinterpret_cast<const float4 *>(&right[k][tx * 4]),
                   *reinterpret_cast<const float4 *>(&right[k][64 + tx * 4])};
    const float x[4] = {a.x * factor[0], a.y * factor[1], a.z * factor[2], a.w * factor[3]};
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        o[i][4 * j] += x[i] * b[j].x;
        o[i][4 * j + 1] += x[i] * b[j].y;
        o[i][4 * j + 2] += x[i] * b[j].z;
        o[i][4 * j + 3] += x[i] * b[j].w;
      }
  }
}

/* Columns from .. of the values that softmax sums and linear term give, for all queries of the block. */
__device__ __forceinline__ void attend_columns(generic_shared &shared, int from) {
  const generic_block &block = shared.block;
  const int thread = threadIdx.x, ty = thread / 16, tx = thread % 16;
  const int pairs = block.seen_by(block.tokens - 1);
  const auto query_at = [&](int i) { return block.q + i * block.q_stride * lola_device_item(block.q_dtype); };
  float o[4][8] = {}, m[4], l[4] = {}, z[4] = {};
  for (int i = 0; i < 4; i++) m[i] = -INFINITY;

  for (int first = 0; first < pairs; first += PAIRS) {
    const int count = min(pairs - first, PAIRS);
    __syncthreads();
    if (thread < count) {
      int code = pair_code(block.places, first + thread);
      shared.key[thread] = pair_key(block.places, code);
      shared.value[thread] = pair_value(block.places, code);
    }
    float s[4][4] = {};
    for (int d = 0; d < block.D; d += SLICE) {
      __syncthreads();
      load_transposed(shared.logits.q, block.tokens, block.D, d, block.q_dtype, block.factor, query_at);
      load_transposed(shared.logits.k, count, block.D, d, block.dtype, 1, [&](int i) { return shared.key[i]; });
      __syncthreads();
#pragma unroll 8
      for (int k = 0; k < SLICE; k++) {
        float4 a = *reinterpret_cast<const float4 *>(&shared.logits.q[k][ty * 4]);
        float4 b = *reinterpret_cast<const float4 *>(&shared.logits.k[k][tx * 4]);
        const float x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) s[i][j] += x[i] * y[j];
      }
    }

#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int seen = block.seen_by(ty * 4 + i) - first;
      float high = m[i];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (tx * 4 + j >= seen || tx * 4 + j >= count) s[i][j] = -INFINITY;
        high = fmaxf(high, s[i][j]);
      }
      for (int lanes = 8; lanes; lanes /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, lanes));
      const float base = high == -INFINITY ? 0 : high, alpha = exp2f(m[i] - base);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        s[i][j] = exp2f(s[i][j] - base);
        sum += s[i][j];
      }
      for (int lanes = 8; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      m[i] = high;
      l[i] = l[i] * alpha + sum;
#pragma unroll
      for (int j = 0; j < 8; j++) o[i][j] *= alpha;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
      *reinterpret_cast<float4 *>(&shared.p[tx * 4 + j][ty * 4]) = make_float4(s[0][j], s[1][j], s[2][j], s[3][j]);

    const float ones[4] = {1, 1, 1, 1};
    for (int part = 0; part < PAIRS; part += SLICE) {
      __syncthreads();
      for (int i = thread; i < SLICE * COLUMNS; i += GENERIC_THREADS) {
        int pair = part + i / COLUMNS, column = from + i % COLUMNS;
        shared.sums.v[i / COLUMNS][i % COLUMNS] =
            pair < count && column < block.Dv ? lola_device_load(shared.value[pair], column, block.dtype) : 0;
      }
      __syncthreads();
      add_product(o, shared.p + part, shared.sums.v, ones);
    }
  }

  const auto features_at = [&](int i) {
    return block.features + i * block.features_stride * lola_device_item(block.features_dtype);
  };
  const int features = block.features ? block.F : 0;
  for (int f = 0; f < features; f += SLICE) {
    __syncthreads();
    load_transposed(shared.logits.q, block.tokens, block.F, f, block.features_dtype, 1, features_at);
    if (thread < SLICE) shared.normalizer[thread] = f + thread < block.F ? block.normalizer[f + thread] : 0;
    __syncthreads();
    for (int k = 0; k < SLICE; k++)
      for (int i = 0; i < 4; i++) z[i] += shared.logits.q[k][ty * 4 + i] * shared.normalizer[k];
  }
  lola_device_weights w[4];
  for (int i = 0; i < 4; i++) {
    const int token = ty * 4 + i;
    if (block.z && token < block.tokens) z[i] = block.z[token * block.linear_stride];
    w[i] = lola_device_mix(block.mixing, block.gate, m[i], l[i], z[i]);
    for (int j = 0; j < 8; j++) o[i][j] *= w[i].softmax;
  }
  const float linear[4] = {w[0].linear, w[1].linear, w[2].linear, w[3].linear};
  for (int f = 0; f < features; f += SLICE) {
    __syncthreads();
    /* P's place holds the features: values and features cannot share theirs. */
    load_transposed(reinterpret_cast<float(&)[SLICE][64 + 4]>(shared.p), block.tokens, block.F, f, block.features_dtype,
                    1, features_at);
    for (int i = thread; i < SLICE * COLUMNS; i += GENERIC_THREADS) {
      int k = f + i / COLUMNS, column = from + i % COLUMNS;
      shared.sums.v[i / COLUMNS][i % COLUMNS] =
          k < block.F && column < block.Dv ? block.hidden[static_cast<int64_t>(k) * block.Dv + column] : 0;
    }
    __syncthreads();
    add_product(o, shared.p, shared.sums.v, linear);
  }

  for (int i = 0; i < 4; i++) {
    const int64_t token = ty * 4 + i;
    if (token >= block.tokens) break;
    if (block.share && tx == 0 && from == 0) block.share[token * block.share_stride] = w[i].share;
    const float *recalled =
        block.recalled && w[i].linear != 0 ? block.recalled + token * block.linear_stride * block.Dv : nullptr;
    for (int j = 0; j < 8; j++) {
      int column = from + j / 4 * 64 + tx * 4 + j % 4;
      if (column >= block.Dv) continue;
      float x = o[i][j];
      if (recalled) x += w[i].linear * recalled[column];
      lola_device_store(block.out, token * block.out_stride + column, block.q_dtype, x);
    }
  }
}

template <class Blocks>
__global__ void __launch_bounds__(GENERIC_THREADS)
    attend_generic_kernel(const __grid_constant__ Blocks blocks, int64_t count, int beside) {
  __shared__ generic_shared shared;
  if (beside) lola_device_begin(beside);
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    if (threadIdx.x < 32) {
      bool open = blocks.open(index, &shared.block);
      if (threadIdx.x == 0) shared.open = open;
    }
    __syncthreads();
    if (shared.open)
      for (int from = 0; from < shared.block.Dv; from += COLUMNS) attend_columns(shared, from);
    __syncthreads();
  }
  lola_device_end(beside);
}

} // namespace

#endif
