/* Decoding for 16-bit caches with D = Dv = 128, as one stream of bytes: a block takes a run of units, each of 32 KB,
 * one after the other, and always has the next STAGES - 1 of them under way (cp.async), whatever it is doing.
 * What the products have on the left, q or phi(q), comes along with the unit: where so much is under way, nothing comes
 * at once.
 *
 * A unit is 64 pairs of a sparse cache or of a window, or 64 rows of a hidden state. Units are numbered through all
 * (row, KV head), those of one side by side; each block has an even share. Rows that the step updates are shared out
 * apart, after the others, and it is only for them that a block waits for the update's kernels. A warp copies and works
 * on a quarter of a unit: whole runs of 512 bytes, the 16-byte pieces of a row swapped so that no bank conflicts. A
 * unit leaves a partial as decode.cu says, so it does not matter which block worked on it.
 *
 * Pairs are on the right of products on the matrix units, as in decode_matrix.cuh: S = Q K^T, P = exp2(S - max),
 * O = P V. Of P rows 0-7 on the left are its 16-bit halves `hi`, rows 8-15 what rounding left over. Lane
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
constexpr int QUARTER_BYTES = 2 * QUARTER * ROW_BYTES;
/* In a stage, behind the quarters: halves of q, then what they leave over; or 64 features, then s of them. */
constexpr int QUERIES_AT = WARPS * QUARTER_BYTES, REST_AT = QUERIES_AT + MATRIX_HEADS * ROW_BYTES;
constexpr int STAGE_BYTES = REST_AT + MATRIX_HEADS * ROW_BYTES;
constexpr int PIPELINE_BYTES = 2 * STAGE_BYTES;
constexpr int SUM_PITCH = WIDE + 8; /* floats of a head's sums in shared memory */
constexpr int MOST_GROUPS = 16;     /* that a block's run touches */
static_assert(QUARTER * WIDE * 4 == QUARTER_BYTES, "a quarter holds as many rows of a state as pairs");
static_assert(MATRIX_HEADS * SUM_PITCH * 4 <= QUARTER_BYTES, "sums take the place of a quarter");

/* What a block knows of a (row, KV head), looked up once. */
struct group_facts {
  decode_row of; /* row -1: idle, and nothing else is known */
  int kv_head;
  unsigned group;           /* row * Hkv + kv_head */
  unsigned folded;          /* a bit per query head: there is a state to read */
  int counts[MATRIX_HEADS]; /* sparse pairs of each set */
};

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

/* Units of some rows, and how they are shared out: `run` for each block, one more for the first `longer` of them. */
struct unit_share {
  unsigned first_row, units, run, longer;

  __device__ __forceinline__ unit_share(const lola_device_segment &g, const decode_plan &plan, unsigned blocks,
                                        unsigned first, unsigned rows)
      : first_row(first), units(rows * g.Hkv * static_cast<unsigned>(plan.items)), run(units / blocks),
        longer(units - run * blocks) {}

  __device__ __forceinline__ unsigned begin(unsigned block) const { return block * run + min(block, longer); }

  /* The block whose run holds a unit. */
  __device__ __forceinline__ unsigned block_of(unsigned unit) const {
    const unsigned before = longer * (run + 1);
    return unit < before ? unit / (run + 1) : longer + (unit - before) / run;
  }
};

/* A unit into L2, by one thread, before anything is known of its row. */
__device__ __forceinline__ void prefetch_unit(const lola_device_segment &g, const decode_plan &plan, unsigned unit) {
  const work_unit u = unit_at(plan, unit, 0);
  const int64_t group = u.group;
  if (u.kind == STATE_UNIT) {
    if (g.mixing != LOLA_MIXING_CACHE_ONLY)
      prefetch_once(g.hidden + ((group * g.r + u.which) * g.F + u.tile * UNIT_PAIRS) * WIDE, QUERIES_AT);
    return;
  }
  const bool sparse = u.kind == SPARSE_UNIT;
  const int64_t slots = sparse ? g.L : g.R, before = static_cast<int64_t>(u.tile) * UNIT_PAIRS;
  const int64_t at = ((sparse ? group * plan.sets + u.which : group) * slots + before) * ROW_BYTES;
  const int64_t bytes = min(slots - before, static_cast<int64_t>(UNIT_PAIRS)) * ROW_BYTES;
  prefetch_once(static_cast<const char *>(sparse ? g.sparse_keys : g.window_keys) + at, bytes);
  prefetch_once(static_cast<const char *>(sparse ? g.sparse_values : g.window_values) + at, bytes);
}

/* The first two units of every block's run if no row is updated, by all blocks of a kernel that has time for it. */
__device__ __forceinline__ void prefetch_first_units(const lola_device_segment &g, const decode_plan &plan) {
  const unsigned blocks = static_cast<unsigned>(plan.blocks);
  const unit_share share(g, plan, blocks, 0, g.B);
#pragma unroll 1
  for (unsigned i = blockIdx.x + gridDim.x * threadIdx.x; i < 2 * blocks; i += gridDim.x * THREADS) {
    const unsigned unit = share.begin(i / 2) + i % 2;
    if (unit < share.begin(i / 2 + 1)) prefetch_unit(g, plan, unit);
  }
}

/* Pairs of a unit that exist; may be negative. */
__device__ __forceinline__ int pairs_of(const group_facts &facts, const work_unit &u) {
  const int pairs = u.kind == SPARSE_UNIT ? facts.counts[u.which] : facts.of.window_pairs;
  return min(pairs - u.tile * UNIT_PAIRS, UNIT_PAIRS);
}

/* Of a window's unit, which pair is the newest; negative or too large where none is. */
__device__ __forceinline__ int newest_of(const group_facts &facts, const work_unit &u) {
  return u.kind == WINDOW_UNIT ? facts.of.window_pairs - 1 - u.tile * UNIT_PAIRS : -1;
}

/* The first slot of a (row, set) or (row, KV head). */
__device__ __forceinline__ int64_t first_slot(const lola_device_segment &g, const decode_plan &plan,
                                              const group_facts &facts, const work_unit &u) {
  const int64_t group = facts.group;
  return u.kind == SPARSE_UNIT ? (group * plan.sets + u.which) * g.L : group * g.R;
}

__device__ __forceinline__ int slot_in(const lola_device_segment &g, const group_facts &facts, const work_unit &u,
                                       int pair) {
  int slot = u.tile * UNIT_PAIRS + pair;
  if (u.kind == WINDOW_UNIT) {
    slot += facts.of.window_slot;
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

/* Ring slot of the pair that entered the sparse cache's slot in this step, -1 where it held it before. */
__device__ __forceinline__ int entered_from(const lola_device_segment &g, const group_facts &facts, int64_t slot) {
  const int code = __ldcg(g.slot_source + slot);
  if (code < 0) return -1;
  const int from = facts.of.ring_slot + code;
  return from < static_cast<int>(g.R) ? from : from - static_cast<int>(g.R);
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

/* Asks for this warp's quarter of a unit. ENTERED: pairs that enter the sparse cache come from the window ring. */
template <bool ENTERED>
__device__ __forceinline__ void ask_pairs(const lola_device_segment &g, const decode_plan &plan,
                                          const group_facts &facts, const work_unit &u, char *quarter) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, piece = lane % 16;
  const int count = pairs_of(facts, u), newest = newest_of(facts, u);
  if (warp * QUARTER >= count) return;
  const int64_t first = first_slot(g, plan, facts, u), ring = static_cast<int64_t>(facts.group) * g.R;
  const char *const keys = static_cast<const char *>(u.kind == SPARSE_UNIT ? g.sparse_keys : g.window_keys);
  const char *const values = static_cast<const char *>(u.kind == SPARSE_UNIT ? g.sparse_values : g.window_values);
  const int half = lane / 16;
  const int64_t first_at = first * ROW_BYTES + piece * PIECE, ring_at = ring * ROW_BYTES + piece * PIECE;
  const int slot = slot_in(g, facts, u, warp * QUARTER), slots = u.kind == SPARSE_UNIT ? g.L : static_cast<int>(g.R);
  const int newest_row = newest - warp * QUARTER;
  const uint64_t once = read_once();
  if (!ENTERED && count >= (warp + 1) * QUARTER && slot + QUARTER <= slots &&
      (newest_row < 0 || newest_row >= QUARTER)) {
    /* The quarter is one run of memory, as most are. */
    const int64_t at = first_at + static_cast<int64_t>(slot + half) * ROW_BYTES;
    const char *const key = keys + at, *const value = values + at;
#pragma unroll
    for (int i = 0; i < QUARTER / 2; i++) {
      stream_async(quarter + key_place(half, piece) + i * 2 * ROW_BYTES, key + i * 2 * ROW_BYTES, once);
      stream_async(quarter + value_place(2 * i, piece) + half * ROW_BYTES, value + i * 2 * ROW_BYTES, once);
    }
    return;
  }
  int entered[QUARTER / 2];
#pragma unroll
  for (int i = 0; i < QUARTER / 2; i++) {
    const int pair = warp * QUARTER + 2 * i + lane / 16;
    entered[i] = ENTERED && pair < count ? entered_from(g, facts, first + slot_in(g, facts, u, pair)) : -1;
  }
#pragma unroll
  for (int i = 0; i < QUARTER / 2; i++) {
    const int row = 2 * i + half, pair = warp * QUARTER + row;
    const bool there = pair < count;
    const char *key = keys, *value = values;
    int64_t at = first_at + static_cast<int64_t>(there ? slot_in(g, facts, u, pair) : 0) * ROW_BYTES;
    if (ENTERED && entered[i] >= 0) {
      key = static_cast<const char *>(g.window_keys);
      value = static_cast<const char *>(g.window_values);
      at = ring_at + static_cast<int64_t>(entered[i]) * ROW_BYTES;
    }
    if (pair == newest) continue;
    stream_or_zero(quarter + key_place(row, piece), key + at, there, once);
    stream_or_zero(quarter + value_place(row, piece), value + at, there, once);
  }
  if (ENTERED || newest_row < 0 || newest_row >= QUARTER || newest_row % 2 != half) return;
  copy_newest(quarter + key_place(newest_row, piece),
              lola_device_at(g.k, facts.of.batch, facts.of.first, facts.kv_head) + piece * PIECE, plan.call_aligned);
  copy_newest(quarter + value_place(newest_row, piece),
              lola_device_at(g.v, facts.of.batch, facts.of.first, facts.kv_head) + piece * PIECE, plan.call_aligned);
}

/* Where piece `piece` of a head's q lies in shared memory. */
__device__ __forceinline__ int query_place(int head, int piece) {
  return head * ROW_BYTES + (piece ^ (head & 1) * 4) * PIECE;
}

/* Asks for q of the heads that a unit of pairs serves. */
template <typename T>
__device__ __forceinline__ void ask_queries(const lola_device_segment &g, const decode_plan &plan,
                                            const group_facts &facts, const work_unit &u, char *stage) {
  const bool sparse = u.kind == SPARSE_UNIT;
  const int heads = sparse ? g.rs : g.r, head = static_cast<int>(threadIdx.x) / 16, piece = threadIdx.x % 16;
  static_assert(THREADS / 16 == MATRIX_HEADS, "a thread has a piece of q");
  if (head >= heads) return;
  const int own = facts.kv_head * g.r + (sparse ? u.which * g.rs : 0) + head;
  if (plan.query_aligned) {
    copy_async<16>(stage + QUERIES_AT + query_place(head, piece),
                   lola_device_at(g.q, facts.of.batch, facts.of.first, own) + piece * PIECE);
    return;
  }
  lola_device_span span;
  span.batch = facts.of.batch;
  span.first = facts.of.first;
  const query_chunk c = load_query<T>(g, plan, span, own, piece);
  *reinterpret_cast<uint4 *>(stage + QUERIES_AT + query_place(head, piece)) = c.hi;
  *reinterpret_cast<uint4 *>(stage + REST_AT + query_place(head, piece)) = c.lo;
}

/* Asks for a unit and what its products have on the left; a warp for its quarter. */
template <typename T>
__device__ __forceinline__ void ask_unit(const lola_device_segment &g, const decode_plan &plan,
                                         const group_facts &facts, const work_unit &u, bool gathers,
                                         const float *query_phi, char *stage) {
  if (facts.of.row < 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char *const quarter = stage + warp * QUARTER_BYTES;
  if (u.kind != STATE_UNIT) {
    ask_queries<T>(g, plan, facts, u, stage);
    if (gathers && u.kind == SPARSE_UNIT)
      ask_pairs<true>(g, plan, facts, u, quarter);
    else
      ask_pairs<false>(g, plan, facts, u, quarter);
    return;
  }
  if (!(facts.folded >> u.which & 1)) return;
  const int64_t first = (static_cast<int64_t>(facts.group) * g.r + u.which) * g.F + u.tile * UNIT_PAIRS;
  const float *const from = g.hidden + (first + warp * QUARTER) * WIDE + lane * 4;
  if (threadIdx.x < 32) { /* 16 pieces of features, as many of s */
    const float *const left = (lane < 16 ? query_phi : g.normalizer) + first + lane % 16 * 4;
    copy_async<16>(stage + (lane < 16 ? QUERIES_AT : REST_AT) + lane % 16 * PIECE, left);
  }
  const uint64_t once = read_once();
#pragma unroll
  for (int i = 0; i < QUARTER; i++) stream_async(quarter + (i * 32 + lane) * PIECE, from + i * WIDE, once);
}

/* Pairs that entered the sparse cache, from where their lanes copied them, into their slots. */
__device__ __forceinline__ void keep_entered(const lola_device_segment &g, const decode_plan &plan,
                                             const group_facts &facts, const work_unit &u, const char *quarter) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, piece = lane % 16, count = pairs_of(facts, u);
  const int64_t first = first_slot(g, plan, facts, u);
#pragma unroll
  for (int i = 0; i < QUARTER / 2; i++) {
    const int row = 2 * i + lane / 16, pair = warp * QUARTER + row;
    if (pair >= count) break;
    const int64_t slot = first + slot_in(g, facts, u, pair);
    if (entered_from(g, facts, slot) < 0) continue;
    const int64_t at = slot * ROW_BYTES + piece * PIECE;
    *reinterpret_cast<uint4 *>(static_cast<char *>(g.sparse_keys) + at) =
        *reinterpret_cast<const uint4 *>(quarter + key_place(row, piece));
    *reinterpret_cast<uint4 *>(static_cast<char *>(g.sparse_values) + at) =
        *reinterpret_cast<const uint4 *>(quarter + value_place(row, piece));
  }
}

/* Of a quarter and head `lane / 4` of those it serves: the largest logit in base 2, the sum of the weights below it,
 * and those of the lane's four pairs as they go into the second product. */
struct quarter_weights {
  float high, sum;
  unsigned p[4];
};

/* From products q k of the first `count` pairs, of which this lane has 2quad, 2quad + 1 and those 8 later. Words 0 and
 * 2 of a piece of q stood in the upper half of the left-hand matrix, 1 and 3 in the lower: of either product the other
 * half is of no use. */
template <typename T>
__device__ __forceinline__ quarter_weights weights_of(const float (&s)[2][2][4], float scale, int count) {
  const int quad = threadIdx.x % 4;
  quarter_weights w;
  w.high = -INFINITY;
  w.sum = 0;
  float weight[2][2];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float logit = (s[i][0][e] + s[i][1][2 + e]) * (scale * LOG2E);
      weight[i][e] = 8 * i + 2 * quad + e < count ? logit : -INFINITY;
      w.high = fmaxf(w.high, weight[i][e]);
    }
  w.high = fmaxf(w.high, __shfl_xor_sync(ALL, w.high, 1));
  w.high = fmaxf(w.high, __shfl_xor_sync(ALL, w.high, 2));
  /* A quarter without a pair keeps -inf; the lowest float stands in so that -inf - it stays -inf. */
  const float shift = fmaxf(w.high, -3e38f);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float x = power_of_two(weight[i][0] - shift), y = power_of_two(weight[i][1] - shift);
    w.sum += x + y;
    split<T>(x, y, w.p[2 * i], w.p[2 * i + 1]);
  }
  w.sum += __shfl_xor_sync(ALL, w.sum, 1);
  w.sum += __shfl_xor_sync(ALL, w.sum, 2);
  return w;
}

/* Weighted values, columns 64 j + 16 quad .. + 15 of head `row`, from pieces row + 8 j of values 2quad, 2quad + 1,
 * 2quad + 8, 2quad + 9. */
template <typename T>
__device__ __forceinline__ void weigh_values(const unsigned (&p)[4], const uint4 (&v)[4], float (&o)[16]) {
  const unsigned words[4][4] = {{v[0].x, v[0].y, v[0].z, v[0].w},
                                {v[1].x, v[1].y, v[1].z, v[1].w},
                                {v[2].x, v[2].y, v[2].z, v[2].w},
                                {v[3].x, v[3].y, v[3].z, v[3].w}};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const unsigned halves = i % 2 ? 0x7632 : 0x5410;
    float c[4] = {0, 0, 0, 0};
    mma<T>(c, p, __byte_perm(words[0][i / 2], words[1][i / 2], halves),
           __byte_perm(words[2][i / 2], words[3][i / 2], halves));
    o[i] = c[0] + c[2];
    o[8 + i] = c[1] + c[3];
  }
}

/* Softmax sums of this warp's quarter, into its place and `sums`. */
template <typename T>
__device__ __forceinline__ void weigh_quarter(const lola_device_segment &g, const decode_plan &plan, int heads,
                                              int count, char *stage, float *sums) {
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  char *const quarter = stage + warp * QUARTER_BYTES;
  /* Rows without a head repeat the last one; nobody reads their sums. */
  const char *const queries = stage + QUERIES_AT;
  const int head = min(row, heads - 1);
  float s[2][2][4] = {};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const char *const query = queries + query_place(head, 4 * j + quad);
    const uint4 q = *reinterpret_cast<const uint4 *>(query);
    const unsigned hi[4] = {q.x, q.y, q.z, q.w};
    uint4 k[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      k[i] = *reinterpret_cast<const uint4 *>(quarter + key_place(8 * i + row, 4 * j + quad));
      mma<T>(s[i][0], hi, k[i].x, k[i].z);
      mma<T>(s[i][1], hi, k[i].y, k[i].w);
    }
    if (plan.query_aligned) continue;
    const uint4 rest = *reinterpret_cast<const uint4 *>(query + (REST_AT - QUERIES_AT));
    const unsigned lo[4] = {rest.x, rest.y, rest.z, rest.w};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      mma<T>(s[i][0], lo, k[i].x, k[i].z);
      mma<T>(s[i][1], lo, k[i].y, k[i].w);
    }
  }
  const quarter_weights w = weights_of<T>(s, g.scale, count - warp * QUARTER);
  if (quad == 0 && row < heads)
    *reinterpret_cast<float2 *>(sums + (warp * MATRIX_HEADS + row) * 2) = make_float2(w.high, w.sum);

  uint4 v[2][4];
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int n = 0; n < 4; n++)
      v[j][n] = *reinterpret_cast<const uint4 *>(quarter + value_place(2 * quad + n % 2 + n / 2 * 8, 8 * j + row));
  __syncwarp(); /* the sums take the pairs' place */
  float *merge = reinterpret_cast<float *>(quarter);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    float o[16]; /* columns 64 j + 16 quad on, of head `row` */
    weigh_values<T>(w.p, v[j], o);
    if (row < heads) store_floats<16>(merge + row * SUM_PITCH + 64 * j + 16 * quad, o);
  }
}

/* N of this warp's quarter into its place, the four columns of a lane side by side; its part of z into `sums`. `phi`:
 * the unit's features. */
__device__ __forceinline__ void recall_quarter(char *stage, const float *phi, float *sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char *const quarter = stage + warp * QUARTER_BYTES;
  phi += warp * QUARTER;
  const float *const s = reinterpret_cast<const float *>(stage + REST_AT) + warp * QUARTER;
  float n[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < QUARTER; i += 4) {
    float f[4];
    load_floats<4>(phi + i, f);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float x[4];
      load_floats<4>(reinterpret_cast<const float *>(quarter + ((i + j) * 32 + lane) * PIECE), x);
#pragma unroll
      for (int e = 0; e < 4; e++) n[e] = fmaf(f[j], x[e], n[e]);
    }
  }
  const float z = warp_sum(lane < QUARTER ? phi[lane] * s[lane] : 0);
  store_floats<4>(reinterpret_cast<float *>(quarter) + lane * 4, n); /* where this lane alone has read */
  if (lane == 0) sums[warp] = z;
}

} // namespace

#endif
