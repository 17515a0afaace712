/* Decoding for 16-bit caches with D = Dv = 128, as one stream of bytes: a block takes a run of units, each of 32 KB,
 * one after the other, and always has the next STAGES - 1 of them under way (cp.async), whatever it is doing.
 *
 * A unit is 64 pairs of a sparse cache or of a window, or 64 rows of a hidden state. Units are numbered through all
 * (row, KV head), those of one side by side; each block has an even share. A warp copies and works on a quarter of a
 * unit: whole runs of 512 bytes, the 16-byte pieces of a row swapped so that no bank conflicts. A unit leaves a partial
 * as decode.cu says, so it does not matter which block worked on it.
 *
 * Pairs are on the right of products on the matrix units, as in decode_matrix.cuh: S = Q K^T, P = exp2(S - max),
 * O = P V; on the left rows 0-7 are the 16-bit halves `hi` of q, or of P, rows 8-15 what rounding left over. Lane
 * (row, quad) = (lane / 4, lane % 4) takes pieces quad, quad + 4, ... of keys row and row + 8, and pieces row, row + 8
 * of values 2quad, 2quad + 1, 2quad + 8, 2quad + 9. */
#ifndef LOLA_CUDA_DECODE_PIPELINE_CUH
#define LOLA_CUDA_DECODE_PIPELINE_CUH

#include "decode_matrix.cuh"
#include "decode_state.cuh"

namespace {

constexpr int WIDE = 128;           /* D and Dv */
constexpr int ROW_BYTES = 2 * WIDE; /* of a key or a value */
constexpr int UNIT_PAIRS = 64;      /* and rows of a state */
constexpr int QUARTER = UNIT_PAIRS / WARPS;
constexpr int QUARTER_BYTES = 2 * QUARTER * ROW_BYTES, UNIT_BYTES = WARPS * QUARTER_BYTES;
constexpr int SUM_PITCH = WIDE + 8; /* floats of a head's sums in shared memory */
constexpr int MOST_GROUPS = 24;     /* that a block's run touches */
static_assert(QUARTER * WIDE * 4 == QUARTER_BYTES, "a quarter holds as many rows of a state as pairs");
static_assert(MATRIX_HEADS * SUM_PITCH * 4 <= QUARTER_BYTES, "sums take the place of a quarter");

/* What a block knows of a (row, KV head), looked up once. */
struct group_facts {
  int64_t batch, first, position; /* of the row's token */
  int row, kv_head;               /* row -1: idle */
  int window_pairs, window_slot;  /* with the newest; ring slot of the first */
  unsigned folded;                /* a bit per query head: there is a state to read */
  int counts[MATRIX_HEADS];       /* sparse pairs of each set */
};

constexpr int FACTS_BYTES = MOST_GROUPS * static_cast<int>(sizeof(group_facts));

enum unit_kind { STATE_UNIT, SPARSE_UNIT, WINDOW_UNIT };

struct work_unit {
  int group; /* of the block's, from 0 */
  unit_kind kind;
  int which; /* query head of the group, or set */
  int tile;  /* tile of pairs, or part of the state */
};

__device__ __forceinline__ work_unit unit_at(const decode_plan &plan, unsigned index, unsigned first_group) {
  work_unit u;
  const unsigned group = divided(index, plan.by_items);
  u.group = static_cast<int>(group - first_group);
  unsigned item = index - group * static_cast<unsigned>(plan.items);
  u.which = 0;
  if (item < static_cast<unsigned>(plan.state_items)) {
    u.kind = STATE_UNIT;
    u.which = static_cast<int>(divided(item, plan.by_state_parts));
    u.tile = static_cast<int>(item) - u.which * plan.state_parts;
    return u;
  }
  item -= static_cast<unsigned>(plan.state_items);
  u.kind = item < static_cast<unsigned>(plan.sparse_items) ? SPARSE_UNIT : WINDOW_UNIT;
  if (u.kind == SPARSE_UNIT)
    u.which = static_cast<int>(divided(item, plan.by_sparse_tiles));
  else
    item -= static_cast<unsigned>(plan.sparse_items);
  u.tile = static_cast<int>(item) - u.which * static_cast<int>(plan.sparse_tiles);
  return u;
}

/* Pairs of a unit that exist; may be negative. */
__device__ __forceinline__ int pairs_of(const group_facts &facts, const work_unit &u) {
  const int pairs = u.kind == SPARSE_UNIT ? facts.counts[u.which] : facts.window_pairs;
  return min(pairs - u.tile * UNIT_PAIRS, UNIT_PAIRS);
}

/* Of a window's unit, which pair is the newest; negative or too large where none is. */
__device__ __forceinline__ int newest_of(const group_facts &facts, const work_unit &u) {
  return u.kind == WINDOW_UNIT ? facts.window_pairs - 1 - u.tile * UNIT_PAIRS : -1;
}

/* The first slot of a (row, set) or (row, KV head). */
__device__ __forceinline__ int64_t first_slot(const lola_device_segment &g, const group_facts &facts,
                                              const work_unit &u) {
  const int64_t group = static_cast<int64_t>(facts.row) * g.Hkv + facts.kv_head;
  return u.kind == SPARSE_UNIT ? (group * (g.S / g.Hkv) + u.which) * g.L : group * g.R;
}

__device__ __forceinline__ int slot_in(const lola_device_segment &g, const group_facts &facts, const work_unit &u,
                                       int pair) {
  int slot = u.tile * UNIT_PAIRS + pair;
  if (u.kind == WINDOW_UNIT) {
    slot += facts.window_slot;
    if (slot >= static_cast<int>(g.R)) slot -= static_cast<int>(g.R);
  }
  return slot;
}

/* Where piece `piece` of the quarter's key, or value, `row` lies in shared memory. */
__device__ __forceinline__ int key_place(int row, int piece) {
  return row * ROW_BYTES + (piece ^ (row & 1) * 4) * PIECE;
}
__device__ __forceinline__ int value_place(int row, int piece) {
  return QUARTER * ROW_BYTES + row * ROW_BYTES + (piece ^ (row & 6)) * PIECE;
}

/* 16 bytes of the call's own key or value. */
__device__ __forceinline__ void copy_newest(void *to, const char *from, bool aligned) {
  if (aligned) {
    copy_async<16>(to, from);
    return;
  }
  const uint16_t *x = reinterpret_cast<const uint16_t *>(from);
#pragma unroll
  for (int e = 0; e < 8; e++) static_cast<uint16_t *>(to)[e] = x[e];
}

/* Asks for this warp's quarter of a unit. */
__device__ __forceinline__ void ask_unit(const lola_device_segment &g, const decode_plan &plan,
                                         const group_facts &facts, const work_unit &u, char *quarter) {
  if (facts.row < 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (u.kind == STATE_UNIT) {
    if (!(facts.folded >> u.which & 1)) return;
    const int64_t state = (static_cast<int64_t>(facts.row) * g.Hkv + facts.kv_head) * g.r + u.which;
    const float *from = g.hidden + (state * g.F + u.tile * UNIT_PAIRS + warp * QUARTER) * WIDE + lane * 4;
#pragma unroll
    for (int i = 0; i < QUARTER; i++) copy_async<16>(quarter + (i * 32 + lane) * PIECE, from + i * WIDE);
    return;
  }
  const int count = pairs_of(facts, u), newest = newest_of(facts, u);
  if (warp * QUARTER >= count) return;
  const int64_t first = first_slot(g, facts, u);
  const char *keys = static_cast<const char *>(u.kind == SPARSE_UNIT ? g.sparse_keys : g.window_keys);
  const char *values = static_cast<const char *>(u.kind == SPARSE_UNIT ? g.sparse_values : g.window_values);
  const int piece = lane % 16;
#pragma unroll
  for (int i = 0; i < QUARTER / 2; i++) {
    const int row = 2 * i + lane / 16, pair = warp * QUARTER + row;
    const bool there = pair < count;
    const int64_t at = (first + (there ? slot_in(g, facts, u, pair) : 0)) * ROW_BYTES + piece * PIECE;
    if (pair == newest) {
      copy_newest(quarter + key_place(row, piece),
                  lola_device_at(g.k, facts.batch, facts.first, facts.kv_head) + piece * PIECE, plan.call_aligned);
      copy_newest(quarter + value_place(row, piece),
                  lola_device_at(g.v, facts.batch, facts.first, facts.kv_head) + piece * PIECE, plan.call_aligned);
    } else {
      copy_or_zero(quarter + key_place(row, piece), keys + at, there);
      copy_or_zero(quarter + value_place(row, piece), values + at, there);
    }
  }
}

/* What a unit's products have on the left, in registers a unit ahead: q in halves, or phi(q) and s. */
struct unit_operands {
  uint4 hi[4], lo[4]; /* of a state: 16 features in hi */
  float s;            /* of a state: lane i < 16 has that of row i */
};

__device__ __forceinline__ uint4 as_words(float4 x) {
  return make_uint4(__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z), __float_as_uint(x.w));
}

template <typename T>
__device__ __forceinline__ void load_operands(const lola_device_segment &g, const decode_plan &plan,
                                              const group_facts &facts, const work_unit &u, const float *query_phi,
                                              unit_operands *left) {
  if (facts.row < 0) return;
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  if (u.kind == STATE_UNIT) {
    if (!(facts.folded >> u.which & 1)) return;
    const int64_t state = (static_cast<int64_t>(facts.row) * g.Hkv + facts.kv_head) * g.r + u.which;
    const int64_t at = state * g.F + u.tile * UNIT_PAIRS + warp * QUARTER;
#pragma unroll
    for (int j = 0; j < 4; j++) left->hi[j] = as_words(__ldcg(reinterpret_cast<const float4 *>(query_phi + at) + j));
    left->s = threadIdx.x % 32 < QUARTER ? g.normalizer[at + threadIdx.x % 32] : 0;
    return;
  }
  const int heads = u.kind == SPARSE_UNIT ? g.rs : g.r;
  /* Rows without a head repeat the last one; nobody reads their sums. */
  const int head = facts.kv_head * g.r + (u.kind == SPARSE_UNIT ? u.which * g.rs : 0) + min(row, heads - 1);
  lola_device_span span;
  span.batch = facts.batch;
  span.first = facts.first;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const query_chunk c = load_query<T>(g, plan, span, head, 4 * j + quad);
    left->hi[j] = c.hi;
    left->lo[j] = c.lo;
  }
}

/* Softmax sums of this warp's quarter, into its place and `sums`. */
template <typename T>
__device__ __forceinline__ void weigh_quarter(const lola_device_segment &g, const unit_operands &left, int heads,
                                              int count, char *quarter, float *sums) {
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  float s[2][2][4] = {};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const uint4 hi = left.hi[j], lo = left.lo[j];
    const unsigned a0[4] = {hi.x, lo.x, hi.y, lo.y}, a1[4] = {hi.z, lo.z, hi.w, lo.w};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 k = *reinterpret_cast<const uint4 *>(quarter + key_place(8 * i + row, 4 * j + quad));
      mma<T>(s[i][0], a0, k.x, k.y);
      mma<T>(s[i][1], a1, k.z, k.w);
    }
  }

  /* Of head `row`: logits in base 2 of pairs 2quad, 2quad + 1 and those 8 later. */
  float high = -INFINITY, sum = 0, weight[2][2];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float logit = ((s[i][0][e] + s[i][1][e]) + (s[i][0][2 + e] + s[i][1][2 + e])) * (g.scale * LOG2E);
      weight[i][e] = warp * QUARTER + 8 * i + 2 * quad + e < count ? logit : -INFINITY;
      high = fmaxf(high, weight[i][e]);
    }
  high = fmaxf(high, __shfl_xor_sync(ALL, high, 1));
  high = fmaxf(high, __shfl_xor_sync(ALL, high, 2));
  /* A warp without a pair keeps -inf; the lowest float stands in so that -inf - it stays -inf. */
  const float shift = fmaxf(high, -3e38f);
  unsigned p[4];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float x = power_of_two(weight[i][0] - shift), y = power_of_two(weight[i][1] - shift);
    sum += x + y;
    split<T>(x, y, p[2 * i], p[2 * i + 1]);
  }
  sum += __shfl_xor_sync(ALL, sum, 1);
  sum += __shfl_xor_sync(ALL, sum, 2);
  if (quad == 0 && row < heads)
    *reinterpret_cast<float2 *>(sums + (warp * MATRIX_HEADS + row) * 2) = make_float2(high, sum);

  unsigned v[2][4][4]; /* pieces row and row + 8 of values 2quad, 2quad + 1, 2quad + 8, 2quad + 9 */
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const uint4 x =
          *reinterpret_cast<const uint4 *>(quarter + value_place(2 * quad + n % 2 + n / 2 * 8, 8 * j + row));
      v[j][n][0] = x.x;
      v[j][n][1] = x.y;
      v[j][n][2] = x.z;
      v[j][n][3] = x.w;
    }
  __syncwarp(); /* the sums take the pairs' place */
  float *merge = reinterpret_cast<float *>(quarter);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    float o[16]; /* columns 64 j + 16 quad on, of head `row` */
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const unsigned halves = i % 2 ? 0x7632 : 0x5410;
      float c[4] = {0, 0, 0, 0};
      mma<T>(c, p, __byte_perm(v[j][0][i / 2], v[j][1][i / 2], halves),
             __byte_perm(v[j][2][i / 2], v[j][3][i / 2], halves));
      o[i] = c[0] + c[2];
      o[8 + i] = c[1] + c[3];
    }
    if (row < heads) store_floats<16>(merge + row * SUM_PITCH + 64 * j + 16 * quad, o);
  }
}

/* N of this warp's quarter into its place, and the four columns of a lane side by side; its part of z into `sums`. */
__device__ __forceinline__ void recall_quarter(const unit_operands &left, char *quarter, float *sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float n[4] = {0, 0, 0, 0}, z = 0;
#pragma unroll
  for (int i = 0; i < QUARTER; i++) {
    const uint4 four = left.hi[i / 4];
    const float f = __uint_as_float(i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w);
    float x[4];
    load_floats<4>(reinterpret_cast<const float *>(quarter + (i * 32 + lane) * PIECE), x);
#pragma unroll
    for (int e = 0; e < 4; e++) n[e] = fmaf(f, x[e], n[e]);
    if (lane == i) z = f * left.s;
  }
  z = warp_sum(z);
  store_floats<4>(reinterpret_cast<float *>(quarter) + lane * 4, n); /* where this lane alone has read */
  if (lane == 0) sums[warp] = z;
}

/* The newest pair, from where its lanes copied it, into its ring slot. */
__device__ __forceinline__ void keep_newest_pair(const lola_device_segment &g, const group_facts &facts,
                                                 const work_unit &u, const char *quarter) {
  const int newest = newest_of(facts, u), row = newest % QUARTER, lane = threadIdx.x % 32, piece = lane % 16;
  if (static_cast<int>(threadIdx.x) / 32 != newest / QUARTER || lane / 16 != row % 2) return;
  const int64_t at = (first_slot(g, facts, u) + slot_in(g, facts, u, newest)) * ROW_BYTES + piece * PIECE;
  *reinterpret_cast<uint4 *>(static_cast<char *>(g.window_keys) + at) =
      *reinterpret_cast<const uint4 *>(quarter + key_place(row, piece));
  *reinterpret_cast<uint4 *>(static_cast<char *>(g.window_values) + at) =
      *reinterpret_cast<const uint4 *>(quarter + value_place(row, piece));
}

} // namespace

#endif
