/* Decoding for 16-bit caches with D = Dv = 128, as one stream of bytes: a block takes a run of units, each of 32 KB,
 * one after the other, and always has the next STAGES - 1 of them under way (cp.async), whatever it is doing.
 * What the products have on the left, q or phi(q), comes along with the unit: where so much is under way, nothing comes
 * at once.
 *
 * A unit is 64 pairs of a sparse cache or of a window, or 64 rows of a hidden state. Units are numbered through all
 * (row, KV head), first the sparse pairs of all, which take the least to look up, then their windows, then the states,
 * which wait for phi(q); at the end, in the same order, those of rows that the step updates, which wait for the
 * update's kernels. Blocks take them one by one in this order, so that none idles while there is work, whatever else
 * its multiprocessor has to do. A unit leaves a partial as decode.cu says, so it does not matter which block worked on
 * it; a second kernel merges. A warp copies and works on a quarter of a unit: whole runs of 512 bytes, the 16-byte
 * pieces of a row swapped so that no bank conflicts.
 *
 * Pairs are on the right of products on the matrix units, as in decode_matrix.cuh: S = Q K^T, P = exp2(S - max),
 * O = P V. Of P rows 0-7 on the left are its 16-bit halves `hi`, rows 8-15 what rounding left over. Lane
 * (row, quad) = (lane / 4, lane % 4) takes pieces quad, quad + 4, ... of keys row and row + 8, and pieces row, row + 8
 * of values 2quad, 2quad + 1, 2quad + 8, 2quad + 9. */
#ifndef LOLA_CUDA_DECODE_PIPELINE_CUH
#define LOLA_CUDA_DECODE_PIPELINE_CUH

#include "chain.cuh"
#include "decode_matrix.cuh"
#include "decode_merge.cuh"
#include "decode_state.cuh"
#include "scan.cuh"

namespace {

constexpr int WIDE = 128;           /* D and Dv */
constexpr int ROW_BYTES = 2 * WIDE; /* of a key or a value */
constexpr int UNIT_PAIRS = 64;      /* and rows of a state */
constexpr int QUARTER = UNIT_PAIRS / WARPS;
constexpr int QUARTER_BYTES = 2 * QUARTER * ROW_BYTES;
/* In a stage, behind the quarters: halves of q, then what they leave over; or 64 features, then s of them. */
constexpr int QUERIES_AT = WARPS * QUARTER_BYTES, REST_AT = QUERIES_AT + MATRIX_HEADS * ROW_BYTES;
constexpr int STAGE_BYTES = REST_AT + MATRIX_HEADS * ROW_BYTES;
constexpr int STAGES = 2, PIPELINE_BLOCKS = 3; /* units that a block holds at once; blocks of a multiprocessor */
constexpr int PIPELINE_BYTES = STAGES * STAGE_BYTES;
constexpr int SUM_PITCH = WIDE + 8; /* floats of a head's sums in shared memory */
static_assert(QUARTER * WIDE * 4 == QUARTER_BYTES, "a quarter holds as many rows of a state as pairs");
static_assert(MATRIX_HEADS * SUM_PITCH * 4 <= QUARTER_BYTES, "sums take the place of a quarter");

/* What a block knows of a (row, KV head). */
struct group_facts {
  decode_row of; /* row -1: nothing to do */
  int kv_head;
  unsigned group;           /* row * Hkv + kv_head */
  unsigned folded;          /* a bit per query head: there is a state to read */
  int counts[MATRIX_HEADS]; /* sparse pairs of each set */
};

enum unit_kind { NO_UNIT, STATE_UNIT, SPARSE_UNIT, WINDOW_UNIT };

struct work_unit {
  unit_kind kind;
  int which;   /* query head of the group, or set */
  int tile;    /* tile of pairs, or part of the state */
  int updated; /* it is one of those at the end */
};

/* A unit, and what is known of its (row, KV head). */
struct known_unit {
  group_facts facts;
  work_unit unit;

  __device__ __forceinline__ bool is_work() const { return unit.kind != NO_UNIT && facts.of.row >= 0; }
};

/* Where a unit belongs: of the rows, or of those that are updated, the index of the row times Hkv plus KV head. */
struct unit_place {
  work_unit unit;
  unsigned group;
};

/* The unit that comes at `index`, of all rows or else of those that are updated. */
__device__ __forceinline__ unit_place unit_at(const lola_device_segment &g, const decode_plan &plan, unsigned index,
                                              unsigned rows, bool updated) {
  unit_place p = {};
  const unsigned groups = rows * g.Hkv, sparse = static_cast<unsigned>(plan.sparse_items),
                 window = static_cast<unsigned>(plan.window_tiles);
  p.unit.updated = updated;
  if (index >= groups * static_cast<unsigned>(plan.items)) return p;
  if (index < groups * sparse) {
    p.group = divided(index, plan.by_sparse_items);
    const unsigned item = index - p.group * sparse;
    p.unit.kind = SPARSE_UNIT;
    p.unit.which = static_cast<int>(divided(item, plan.by_sparse_tiles));
    p.unit.tile = static_cast<int>(item) - p.unit.which * static_cast<int>(plan.sparse_tiles);
    return p;
  }
  index -= groups * sparse;
  if (index < groups * window) {
    p.group = divided(index, plan.by_window_tiles);
    p.unit.kind = WINDOW_UNIT;
    p.unit.tile = static_cast<int>(index - p.group * window);
    return p;
  }
  index -= groups * window;
  p.group = divided(index, plan.by_state_items);
  const unsigned item = index - p.group * static_cast<unsigned>(plan.state_items);
  p.unit.kind = STATE_UNIT;
  p.unit.which = static_cast<int>(divided(item, plan.by_state_parts));
  p.unit.tile = static_cast<int>(item) - p.unit.which * plan.state_parts;
  return p;
}

/* A warp's look at what is known of a unit's (row, KV head), once what the unit needs has been written: a word a lane,
 * on its way until `keep` needs it. */
struct facts_ahead {
  enum { POSITION, CHUNKS, BEGINS, ENDS, COUNTS = 8, FOLDED = 16 }; /* lanes; the first ones of the last two */
  unit_place place;
  int row, kv_head;
  unsigned group;
  int64_t word;

  __device__ __forceinline__ void ask(const lola_device_segment &g, const decode_plan &plan, const call_rows &rows,
                                      const decode_rows &known, const unit_place &at, bool *queries_known) {
    static_assert(ENDS < COUNTS && MATRIX_HEADS == 8, "a lane each");
    const int lane = threadIdx.x % 32;
    place = at;
    word = 0;
    if (at.unit.kind == NO_UNIT) return;
    if (at.unit.updated) lola_device_await_previous();
    if (at.unit.kind == STATE_UNIT && !*queries_known) {
      await_queries(known, plan.query_blocks);
      *queries_known = true;
    }
    row = static_cast<int>(divided(at.group, plan.by_kv_heads));
    kv_head = static_cast<int>(at.group) - row * g.Hkv;
    if (at.unit.updated) row = __ldcg(known.updated + row);
    group = static_cast<unsigned>(row * g.Hkv + kv_head);
    const int64_t *from = nullptr;
    if (lane == POSITION) from = g.tokens_seen + row;
    if (lane == CHUNKS) from = g.chunks + row;
    if (lane == BEGINS || lane == ENDS) word = row_end(rows, row, lane == ENDS);
    if (g.L && lane >= COUNTS && lane - COUNTS < plan.sets)
      from = g.sparse_count + static_cast<int64_t>(group) * plan.sets + (lane - COUNTS);
    if (g.mixing != LOLA_MIXING_CACHE_ONLY && lane >= FOLDED && lane - FOLDED < g.r)
      from = g.folded + static_cast<int64_t>(group) * g.r + (lane - FOLDED);
    if (from) word = __ldcg(from);
  }

  __device__ __forceinline__ void keep(const lola_device_segment &g, const decode_plan &plan, const call_rows &rows,
                                       known_unit *to) const {
    const int lane = threadIdx.x % 32;
    if (lane == 0) to->unit = place.unit;
    if (place.unit.kind == NO_UNIT) return;
    const unsigned folded = __ballot_sync(ALL, word != 0) >> FOLDED & ((1u << MATRIX_HEADS) - 1);
    decode_row of = describe(g, plan.row, rows, row, __shfl_sync(ALL, word, POSITION), __shfl_sync(ALL, word, CHUNKS),
                             __shfl_sync(ALL, word, BEGINS), __shfl_sync(ALL, word, ENDS));
    /* Others have no use for the rest, and this takes as long as all before. */
    if (place.unit.kind == WINDOW_UNIT || place.unit.updated || g.stores_features)
      of.window = window_of(g, plan.row, of.position);
    if (lane >= COUNTS && lane < COUNTS + MATRIX_HEADS) to->facts.counts[lane - COUNTS] = static_cast<int>(word);
    if (lane == 0) {
      if (of.updated && !place.unit.updated) of.row = -1; /* its time comes at the end */
      to->facts.of = of;
      to->facts.kv_head = kv_head;
      to->facts.group = group;
      to->facts.folded = folded;
    }
  }
};

/* Pairs of a unit that exist; may be negative. */
__device__ __forceinline__ int pairs_of(const group_facts &facts, const work_unit &u) {
  const int pairs = u.kind == SPARSE_UNIT ? facts.counts[u.which] : facts.of.window.pairs;
  return min(pairs - u.tile * UNIT_PAIRS, UNIT_PAIRS);
}

/* Of a window's unit, which pair is the newest; negative or too large where none is. */
__device__ __forceinline__ int newest_of(const group_facts &facts, const work_unit &u) {
  return u.kind == WINDOW_UNIT ? facts.of.window.pairs - 1 - u.tile * UNIT_PAIRS : -1;
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
    slot += facts.of.window.slot;
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
  const int from = facts.of.window.ring_slot + code;
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
__device__ __forceinline__ void ask_unit(const lola_device_segment &g, const decode_plan &plan, const known_unit &k,
                                         const float *query_phi, char *stage) {
  const group_facts &facts = k.facts;
  const work_unit &u = k.unit;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char *const quarter = stage + warp * QUARTER_BYTES;
  if (u.kind != STATE_UNIT) {
    ask_queries<T>(g, plan, facts, u, stage);
    if (u.updated && plan.gathers && u.kind == SPARSE_UNIT)
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
  const int thread = static_cast<int>(lola_thread()); /* what follows from it is not kept from unit to unit */
  const int warp = thread / 32, row = thread % 32 / 4, quad = thread % 4;
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

/* --- the kernel -------------------------------------------------------------------------------------- */

/* A barrier of the warps that work on units. */
__device__ __forceinline__ void workers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

/* What a step's kernels share, beside their arguments. */
struct pipeline_scratch {
  decode_rows rows;
  float *phi, *partials;
};

/* A unit that is there, into its partials. */
template <typename T>
__device__ __forceinline__ void work_on_unit(const lola_device_segment &g, const decode_plan &plan, const known_unit &k,
                                             char *stage, float *sums, float *partials) {
  const group_facts &facts = k.facts;
  const work_unit &u = k.unit;
  const int warp = threadIdx.x / 32, stride = plan.columns + 4;
  const int64_t head_step = plan.head_floats;
  if (u.kind == STATE_UNIT) {
    float *partial = partials + facts.group * plan.group_floats + u.which * head_step +
                     (plan.slots - plan.state_parts + u.tile) * stride;
    const bool folded = facts.folded >> u.which & 1;
    if (folded) recall_quarter(stage, reinterpret_cast<const float *>(stage + QUERIES_AT), sums);
    if (g.stores_features && u.tile == 0)
      keep_features(g, facts.of.batch, facts.of.first, facts.of.window.ring_slot,
                    static_cast<int64_t>(facts.group) * g.r + u.which, facts.kv_head * g.r + u.which);
    workers_sync();
    if (folded && warp == 0) {
      float n[4] = {0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float x[4];
        load_floats<4>(reinterpret_cast<const float *>(stage + w * QUARTER_BYTES) + threadIdx.x * 4, x);
#pragma unroll
        for (int e = 0; e < 4; e++) n[e] += x[e];
      }
      store_floats<4>(partial + threadIdx.x * 4, n);
    }
    if (threadIdx.x == 0) partial[plan.columns] = folded ? add_groups(sums, WARPS, 1) : 0;
    return;
  }
  const int count = pairs_of(facts, u);
  if (count <= 0) return;
  const bool sparse = u.kind == SPARSE_UNIT;
  const int heads = sparse ? g.rs : g.r, warps = (count + QUARTER - 1) / QUARTER;
  if (u.updated && plan.gathers && sparse) keep_entered(g, plan, facts, u, stage + warp * QUARTER_BYTES);
  if (warp < warps) weigh_quarter<T>(g, plan, heads, count, stage, sums);
  workers_sync();
  const tile_target to = {partials + facts.group * plan.group_floats +
                              (sparse ? u.which * g.rs * head_step + plan.window_tiles * stride : 0) + u.tile * stride,
                          head_step};
  merge_warps(plan, reinterpret_cast<const float *>(stage), QUARTER_BYTES / 4, SUM_PITCH, sums, MATRIX_HEADS, warps, 0,
              heads, to);
}

constexpr int PIPELINE_THREADS = THREADS + 32;
constexpr int KNOWN_UNITS = 1 + STAGES; /* this one and the next */

/* Blocks start before the step begins, see decode_rows.cuh. One warp more than work on units looks ahead: it takes the
 * one that comes in STAGES turns, looks up its (row, KV head) and waits for what it needs, which holds up nobody. Both
 * parties go through one loop: in a loop for each, units took a fifth longer. Nothing is said of units that are done, a
 * fence takes about as long as a unit while so much is under way: a kernel behind this one merges. */
template <typename T>
__global__ void __launch_bounds__(PIPELINE_THREADS, PIPELINE_BLOCKS)
    decode_pipeline_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ decode_plan plan,
                           const __grid_constant__ call_rows rows, const __grid_constant__ pipeline_scratch scratch) {
  extern __shared__ __align__(16) char shared[]; /* stages */
  __shared__ known_unit known[KNOWN_UNITS];
  __shared__ __align__(16) float sums[WARPS * MATRIX_HEADS * 2];
  __shared__ unsigned next_ticket; /* of the unit that is looked up next */
  const bool looks_ahead = threadIdx.x >= THREADS;
  const int lane = threadIdx.x % 32;
  const unsigned first_units = static_cast<unsigned>(g.B * g.Hkv) * static_cast<unsigned>(plan.items);
  bool queries_known = false;
  if (looks_ahead) {
    if (lane == 0) {
      await_begin(scratch.rows);
      lola_device_start_next(); /* which may forget the begin */
      next_ticket = blockIdx.x;
    }
    __syncwarp();
  }
  int at = KNOWN_UNITS - STAGES; /* the place of this turn's unit among those known */
  int stage = 0;                 /* its stage */
  /* The first unit is worked on in turn 0; in the turns before it is looked up and asked for, by the same instructions
   * as all others: they come from as far as data, and a step is too short to fetch some for one unit each. */
#pragma unroll 1
  for (int turn = -STAGES;; turn++) {
    const auto beside = [&](int ahead) -> known_unit & {
      const int place = at + ahead;
      return known[place >= KNOWN_UNITS ? place - KNOWN_UNITS : place];
    };
    cp_async_wait<STAGES - 2>();
    __syncthreads(); /* the unit is there, and the sums of the last one were read */
    const known_unit &now = known[at];
    if (turn >= 0 && now.unit.kind == NO_UNIT) break;
    if (looks_ahead) {
      const unsigned index = next_ticket;
      unit_place place = {};
      if (index < first_units)
        place = unit_at(g, plan, index, static_cast<unsigned>(g.B), false);
      else
        place = unit_at(g, plan, index - first_units, static_cast<unsigned>(await_rows(scratch.rows)), true);
      facts_ahead facts;
      facts.ask(g, plan, rows, scratch.rows, place, &queries_known);
      unsigned ticket = index + gridDim.x;
      if (lane == 0 && turn >= -1 && place.unit.kind != NO_UNIT)
        ticket = STAGES * gridDim.x + atomicAdd(&scratch.rows.signals->ticket, 1);
      facts.keep(g, plan, rows, &beside(STAGES));
      __syncwarp(); /* all have read it */
      if (lane == 0) next_ticket = ticket;
    } else {
      const known_unit &next = beside(STAGES - 1);
      if (turn > -STAGES && next.is_work()) {
        /* The zero keeps ptxas from seeing that a warp shares the address: see tests/cuda/disassembly.py. */
        const unsigned zero = threadIdx.x & static_cast<unsigned>(plan.pipeline - 1);
        const unsigned stages = shared_address(shared) ^ zero;
        const int free = stage == 0 ? STAGES - 1 : stage - 1;
        ask_unit<T>(g, plan, next, scratch.phi,
                    static_cast<char *>(__cvta_shared_to_generic(stages)) + free * STAGE_BYTES);
      }
      cp_async_commit();
      if (turn >= 0 && now.is_work())
        work_on_unit<T>(g, plan, now, shared + stage * STAGE_BYTES, sums, scratch.partials);
    }
    if (++at == KNOWN_UNITS) at = 0;
    if (++stage == STAGES) stage = 0;
  }
  lola_device_await_previous(); /* for who awaits this kernel */
}

/* --- the merge --------------------------------------------------------------------------------------- */

/* (row, KV head) of a block. The next step's update starts where it finds all registers of a multiprocessor free, and
 * the other kernels behind it: the fewer blocks of this kernel, the sooner, but the more a multiprocessor has to load.
 */
constexpr int MERGED_GROUPS = 2;

/* THREADS for each (row, KV head): once all units are done, its outputs, and what the step leaves behind. What it needs
 * beside partials it asks for before. */
__global__ void __launch_bounds__(MERGED_GROUPS *THREADS, 2)
    decode_merge_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ decode_plan plan,
                        const __grid_constant__ pipeline_scratch scratch) {
  static_assert(THREADS == WIDE, "a thread has an element of a key");
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    await_queries(scratch.rows, plan.query_blocks); /* who may wait for the begin too */
    forget_begin(scratch.rows.signals);
  }
  __syncthreads();
  lola_device_begin(true);
  const int thread = static_cast<int>(threadIdx.x) % THREADS;
  const unsigned group = blockIdx.x * MERGED_GROUPS + threadIdx.x / THREADS, row = divided(group, plan.by_kv_heads);
  const int kv_head = static_cast<int>(group - row * g.Hkv);
  await_rows(scratch.rows);
  decode_row of = {};
  of.row = -1;
  if (group < static_cast<unsigned>(g.B * g.Hkv)) of = scratch.rows.rows[row];
  if (of.row < 0) {
    lola_device_await_previous();
    return;
  }
  const auto element = [&](const lola_array &x) {
    return reinterpret_cast<const uint16_t *>(lola_device_at(x, of.batch, of.first, kv_head))[thread];
  };
  const uint16_t key = element(g.k), value = element(g.v);
  const auto count_of = [&](int j) -> int64_t {
    const int64_t first = static_cast<int64_t>(group) * plan.sets;
    return g.L ? __ldcg(g.sparse_count + first + divided(static_cast<unsigned>(j), plan.by_rs)) : 0;
  };
  merge_wide(g, plan, thread, of, kv_head, count_of, scratch.partials + group * plan.group_floats);
  /* The newest pair into its ring slot, where until now a pair may have lain that entered the sparse cache. */
  const int64_t slot = static_cast<int64_t>(group) * g.R + of.window.ring_slot;
  static_cast<uint16_t *>(g.window_keys)[slot * WIDE + thread] = key;
  static_cast<uint16_t *>(g.window_values)[slot * WIDE + thread] = value;
  const int sets = g.S / g.Hkv;
#pragma unroll 1
  for (int s = thread; g.scores.data && s < sets; s += THREADS)
    lola_device_keep_given(g, of.row, kv_head * sets + s, of.window.ring_slot, of.batch, of.first);
  if (kv_head == 0 && thread == 0) {
    g.tokens_seen[of.row] = of.position + 1;
    if (of.window.chunk > g.chunks[of.row]) g.chunks[of.row] = of.window.chunk;
  }
}

} // namespace

#endif
