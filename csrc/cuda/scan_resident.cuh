/* The scan of scan.cu with every pair of the unit in shared memory: phi (16 bits, F <= 128) of all L slots and of the C
 * pairs that leave next, the block's columns of their values, and H in registers. For self_recall scores, where it fits
 * (lay_out_resident in scan.cu).
 *
 * A pair lies at a place 0 .. L+C-1 and never moves. `place` says where an entry of the list is, slots 0 .. L-1 and
 * then the pairs that leave, L .. L+C-1, and `entry` says it the other way round; both are permutations. A pair that
 * enters a slot trades places with the pair that was dropped from it (or with an empty slot's place), so that the next
 * C pairs can be laid over those that were just folded. They are read from global memory a chunk ahead, into registers.
 * phi: panels of 64 features, rows of 128 bytes, the 16-byte piece c of row i at c ^ i % 8; values: rows of 64 bytes,
 * the piece c at c ^ i / 2 % 4. Rows are read with ldmatrix by their addresses, in any order.
 * The fold adds pairs in the order of the list, which a call's cut does not change; places it does. */
#ifndef LOLA_CUDA_SCAN_RESIDENT_CUH
#define LOLA_CUDA_SCAN_RESIDENT_CUH

#include "cuda/scan_block.cuh"

namespace {

constexpr int RESIDENT_PAIRS = WARPS * TILES * 16; /* at most: one round of scoring */
constexpr int RESIDENT_WORDS = RESIDENT_PAIRS / 32;
constexpr int VALUE_PIECES = COLUMNS / 8;
constexpr int AHEAD = 4;        /* 16-byte pieces of the next pairs to a thread's registers */
constexpr int NOWHERE = 0xffff; /* the place of a row of zeros */
constexpr unsigned UNUSED = UINT_MAX, HIGHEST = 0x7fffffffu; /* bits of scores: HIGHEST is the NaN above all others */
constexpr int SEARCHERS = 4;       /* warps that look for the cut, the last ones: one to a scheduler */
constexpr int PLACING = WARPS - 1; /* the warp that keeps the lists: it has no rows of H */

/* --- layout ----------------------------------------------------------------------------------------------------- */

struct resident_lists {
  int64_t *position; /* by place */
  float *score;      /* (RESIDENT_PAIRS,) by entry, at the last ranking; while it ranks, UNUSED where no pair is */
  unsigned *dropped; /* a bit for each entry */
  int *before;       /* dropped entries before each word of them */
  uint16_t *place;   /* of each entry */
  uint16_t *entry;   /* at each place */
  uint16_t *drop;    /* places of the dropped pairs in the order of the list, NOWHERE up to a multiple of 16 */
};

__host__ __device__ int64_t resident_list_bytes(int64_t L, int64_t C) {
  return (L + C) * (8 + 2 + 2) + RESIDENT_PAIRS * 4 + RESIDENT_WORDS * 8 + (C + 15) / 16 * 16 * 2;
}

__device__ resident_lists resident_lists_of(const lola_device_segment &g, const scan_plan &plan) {
  const int n = g.L + static_cast<int>(g.C);
  resident_lists lists;
  lists.position = reinterpret_cast<int64_t *>(scan_memory + plan.lists);
  lists.score = reinterpret_cast<float *>(lists.position + n);
  lists.dropped = reinterpret_cast<unsigned *>(lists.score + RESIDENT_PAIRS);
  lists.before = reinterpret_cast<int *>(lists.dropped + RESIDENT_WORDS);
  lists.place = reinterpret_cast<uint16_t *>(lists.before + RESIDENT_WORDS);
  lists.entry = lists.place + n;
  lists.drop = lists.entry + n;
  return lists;
}

/* Byte offsets of 16-byte pieces of a place's phi and value. */
__device__ int phi_at(const scan_plan &plan, int place, int piece) {
  return plan.features + (piece >> 3) * plan.rows * 128 + place * 128 + (((piece & 7) ^ (place & 7)) << 4);
}
__device__ int value_at(int values, int place, int piece) {
  return values + place * 64 + ((piece ^ (place >> 1 & 3)) << 4);
}

/* Zeros where rows are shorter than their panels, in the halves, and the row that stands for no pair. */
template <typename T> __device__ void clear_resident(const lola_device_segment &g, const scan_plan &plan) {
  const unsigned thread = lola_thread();
  const auto clear = [thread](int from, int bytes) {
    for (int i = thread; i < bytes / 16; i += THREADS)
      reinterpret_cast<uint4 *>(scan_memory + from)[i] = make_uint4(0, 0, 0, 0);
  };
  if (g.F % 64) clear(plan.features, T::panels * plan.rows * 128);
  clear(plan.halves, HALF_ROWS * T::panels * 128);
  clear(plan.zeros, T::panels * 128);
}

/* --- pairs that come in ----------------------------------------------------------------------------------------- */

/* A pair is `pieces` pieces: phi's, then the value's. */
template <typename T> constexpr int pieces = T::panels * 8 + VALUE_PIECES;

/* Zero if not `wanted`: what is not written on every way through the loop over chunks would hold its registers all
 * around it. */
template <typename T>
__device__ uint4 load_pair(const lola_device_segment &g, const block_shared &shared, bool wanted, int code, int piece) {
  const bool value = piece >= T::panels * 8;
  const int ring = code + shared.unit.ring; /* slots go round */
  const int R = static_cast<int>(g.R), kind = code < 0 ? 0 : code < R ? 1 : 2;
  const int index = code < 0 ? -code - 1 : code >= R ? code - R : ring >= R ? ring - R : ring;
  const row_source &source = shared.unit.sources[value][kind];
  const int k = value ? shared.block.column_block * COLUMNS + 8 * (piece - T::panels * 8) : 8 * piece;
  return load_chunk<T::vector>(source.data + index * source.stride, k, !wanted ? 0 : value ? g.Dv : g.F);
}

template <typename T> __device__ void put_piece(const scan_plan &plan, int place, int piece, const uint4 &x) {
  const int at =
      piece < T::panels * 8 ? phi_at(plan, place, piece) : value_at(plan.values, place, piece - T::panels * 8);
  *reinterpret_cast<uint4 *>(scan_memory + at) = x;
}

/* The unit's slots, slot i at place i. */
template <typename T>
__device__ void load_slots(const lola_device_segment &g, const scan_plan &plan, const block_shared &shared, int count) {
  const unsigned thread = lola_thread();
  for (int first = thread; first < count * pieces<T>; first += THREADS * AHEAD) {
    uint4 x[AHEAD];
#pragma unroll
    for (int q = 0; q < AHEAD; q++) {
      const int i = first + q * THREADS;
      x[q] = load_pair<T>(g, shared, i < count * pieces<T>, -(i / pieces<T>)-1, i % pieces<T>);
    }
#pragma unroll
    for (int q = 0; q < AHEAD; q++) {
      const int i = first + q * THREADS;
      if (i < count * pieces<T>) put_piece<T>(plan, i / pieces<T>, i % pieces<T>, x[q]);
    }
  }
}

/* Begins to read the pairs that leave when `chunk` begins. */
template <typename T>
__device__ void fetch_leaving(const lola_device_segment &g, const block_shared &shared, bool wanted, int64_t chunk,
                              uint4 (&x)[AHEAD]) {
  const unsigned thread = lola_thread();
  const int code = static_cast<int>(lola_device_leaving_first(g, chunk) - shared.unit.base);
#pragma unroll
  for (int q = 0; q < AHEAD; q++) {
    const int i = thread + q * THREADS;
    x[q] = load_pair<T>(g, shared, wanted && i < g.C * pieces<T>, code + i / pieces<T>, i % pieces<T>);
  }
}

/* Lays them over the places of the entries L .. L+C-1. */
template <typename T>
__device__ void put_leaving(const lola_device_segment &g, const scan_plan &plan, const block_shared &shared,
                            const resident_lists &lists, int64_t chunk, const uint4 (&x)[AHEAD]) {
  const unsigned thread = lola_thread();
  const int64_t first = lola_device_leaving_first(g, chunk);
  const int code = static_cast<int>(first - shared.unit.base);
  for (int j = thread; j < g.C; j += THREADS) lists.position[lists.place[g.L + j]] = first + j;
  if (!shared.unit.folds) return;
#pragma unroll
  for (int q = 0; q < AHEAD; q++) {
    const int i = thread + q * THREADS;
    if (i < g.C * pieces<T>) put_piece<T>(plan, lists.place[g.L + i / pieces<T>], i % pieces<T>, x[q]);
  }
  for (int i = thread + AHEAD * THREADS; i < g.C * pieces<T>; i += THREADS) /* more than registers hold */
    put_piece<T>(plan, lists.place[g.L + i / pieces<T>], i % pieces<T>,
                 load_pair<T>(g, shared, true, code + i / pieces<T>, i % pieces<T>));
}

/* --- the state in registers ------------------------------------------------------------------------------------- */

/* Warp w keeps rows 16 w .. 16 w + 15 of H and of s (in the first lane of each quad), as the fragments of a product
 * lie: h[i][2 half + e] is row 16 w + 8 half + lane / 4, column 8 i + 2 (lane % 4) + e. */
struct resident_state {
  float h[4][4], s[2];
};

/* Stores the halves of the warp's rows. They go two rows at a time: even rows of H take column 2 c, odd ones 2 c + 1.
 */
template <typename T> __device__ void store_state_halves(const scan_plan &plan, const resident_state &state) {
  const unsigned thread = lola_thread();
  const int lane = thread % 32, group = lane / 4, c = lane % 4, f = thread / 32 * 16;
  constexpr int pitch = T::panels * 64;
  const bool odd = group & 1;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = f + 8 * half + group;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float x = state.h[i][2 * half], y = state.h[i][2 * half + 1];
      const float other = __shfl_xor_sync(ALL, odd ? x : y, 4);
      store_halves(plan, pitch, row & ~1, 8 * i + 2 * c + odd, odd ? other : x, odd ? y : other);
    }
    if (c == 0) store_normalizer_halves(plan, pitch, row, state.s[half]);
  }
}

template <typename T>
__device__ void load_resident_state(const lola_device_segment &g, const scan_plan &plan, const block_shared &shared,
                                    resident_state *state) {
  const unsigned thread = lola_thread();
  const int lane = thread % 32, group = lane / 4, c = lane % 4, f = thread / 32 * 16;
  const int first = shared.block.column_block * COLUMNS + 2 * c;
  const int64_t at = static_cast<int64_t>(shared.unit.row) * g.Hq + shared.unit.head;
  const float *H = g.hidden + at * g.F * g.Dv, *s = g.normalizer + at * g.F;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = f + 8 * half + group;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int column = first + 8 * i + e;
        state->h[i][2 * half + e] = row < g.F && column < g.Dv ? H[static_cast<int64_t>(row) * g.Dv + column] : 0;
      }
    state->s[half] = row < g.F ? s[row] : 0;
  }
  if (f < g.F) store_state_halves<T>(plan, *state);
}

__device__ void store_resident_state(const lola_device_segment &g, const block_shared &shared,
                                     const resident_state &state) {
  const unsigned thread = lola_thread();
  const int lane = thread % 32, group = lane / 4, c = lane % 4, f = thread / 32 * 16;
  const int first = shared.block.column_block * COLUMNS + 2 * c;
  const int64_t at = static_cast<int64_t>(shared.unit.row) * g.Hq + shared.unit.head;
  float *H = g.hidden + at * g.F * g.Dv, *s = g.normalizer + at * g.F;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = f + 8 * half + group;
    if (row >= g.F) continue;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int column = first + 8 * i + e;
        if (column < g.Dv) H[static_cast<int64_t>(row) * g.Dv + column] = state.h[i][2 * half + e];
      }
    if (c == 0 && !shared.block.column_block) s[row] = state.s[half];
  }
}

/* --- score ------------------------------------------------------------------------------------------------------ */

/* What score_tiles reads of the plan. */
struct score_layout {
  int features, values, halves, zeros, rows, pairs;
};

/* The errors of 16 N places over this block's columns. Operands are in registers before the products that they meet. */
template <typename T, int N> __device__ void score_tiles(score_layout plan, int first, float *out) {
  const unsigned thread = lola_thread();
  constexpr int STEPS = 4 * T::panels, ROW = T::panels * 128; /* of 16 features; bytes of a row of the halves */
  const int lane = thread % 32, group = lane / 4, c = lane % 4, r = lane % 8, matrix = lane / 8;
  /* Left: matrices of a tile are (rows 0-7, piece 0), (8-15, 0), (0-7, 1), (8-15, 1). */
  const char *phi = scan_memory + plan.features + (16 * first + r + (matrix & 1) * 8) * 128;
  const int phi_piece = ((matrix >> 1) ^ r) << 4, panel = plan.rows * 128;
  /* Right: (rows 0-7, piece 0), (0-7, 1), (8-15, 0), (8-15, 1), in the order high and low half of columns 0-15, then of
   * columns 16-31. Of the last product's rows, for 32 features, only two are there and the rest is zero. */
  const int row = r + (matrix >> 1) * 8;
  const char *halves = scan_memory + plan.halves + row * ROW;
  const int halves_piece = ((matrix & 1) ^ lola_swizzle(row)) << 4;
  const char *normalizer = scan_memory + (r < 2 ? plan.halves + (NORMALIZER_ROW + r) * ROW : plan.zeros);
  const int normalizer_piece = r < 2 ? (matrix ^ lola_swizzle(NORMALIZER_ROW + r)) << 4 : 0;
  unsigned left[2][N][4], right[2][4], sums[4];
  const auto load_left = [&](int step) {
#pragma unroll
    for (int i = 0; i < N; i++)
      lola_load_rows(left[step & 1][i], phi + (step >> 2) * panel + i * 2048 + (phi_piece ^ (step & 3) << 5));
  };
  const auto load_right = [&](int step, int part) {
    const int rows = (part & 1) * LOW_ROWS + (part >> 1) * 16;
    lola_load_rows(right[part & 1],
                   halves + rows * ROW + (step >> 2) * 128 + (halves_piece ^ (part >> 1) << 5 ^ (step & 3) << 5));
  };
  float acc[N][5][4] = {};
  load_left(0);
  load_right(0, 0);
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    if (step % 2 == 0) lola_load_rows(sums, normalizer + (step >> 2) * 128 + (normalizer_piece ^ (step & 2) << 5));
    if (step + 1 < STEPS) load_left(step + 1);
#pragma unroll
    for (int part = 0; part < 4; part++) {
      if (part < 3)
        load_right(step, part + 1);
      else if (step + 1 < STEPS)
        load_right(step + 1, 0);
#pragma unroll
      for (int two = 0; two < 2; two++)
#pragma unroll
        for (int i = 0; i < N; i++) {
          const unsigned(&a)[4] = left[step & 1][i], (&b)[4] = right[part & 1];
          lola_mma(acc[i][part / 2 * 2 + two], a[0], a[1], a[2], a[3], b[2 * two], b[2 * two + 1]);
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      const unsigned(&a)[4] = left[step & 1][i];
      lola_mma(acc[i][4], a[0], a[1], a[2], a[3], sums[step % 2 * 2], sums[step % 2 * 2 + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int place = 16 * (first + i) + 8 * half + group;
      const uint4 v = *reinterpret_cast<const uint4 *>(scan_memory + value_at(plan.values, place, c));
      const unsigned pairs[4] = {v.x, v.y, v.z, v.w};
      const float z = quad_normalizer(acc[i][4], half);
      /* As recall_scale, where the way up is hardly ever taken. */
      const bool tiny = z != 0 && z < 1e-30f;
      float lifted = z;
      if (__ballot_sync(ALL, tiny)) {
        const float up = tiny ? 0x1p64f : 1;
        lifted *= up;
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) acc[i][n][2 * half + e] *= up;
      }
      const float inverse = z != 0 ? lola_reciprocal(lifted) : 0;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const float2 value = lola_widen<typename T::element>(pairs[n]);
        const float x = fmaf(acc[i][n][2 * half], inverse, -value.x);
        const float y = fmaf(acc[i][n][2 * half + 1], inverse, -value.y);
        sum = fmaf(x, x, sum);
        sum = fmaf(y, y, sum);
      }
      sum += __shfl_xor_sync(ALL, sum, 1);
      sum += __shfl_xor_sync(ALL, sum, 2);
      if (c == 0 && place < plan.pairs) __stcg(out + place, sum);
    }
}

template <typename T> __device__ void score_resident(const scan_plan &plan, float *out) {
  const unsigned thread = lola_thread();
  const int warp = thread / 32, tiles = plan.rows / 16, each = (tiles + WARPS - 1) / WARPS;
  const int first = warp * each, own = min(each, tiles - first);
  const score_layout layout = {plan.features, plan.values, plan.halves, plan.zeros, plan.rows, plan.pairs};
  if (own == 3)
    score_tiles<T, 3>(layout, first, out);
  else if (own == 2)
    score_tiles<T, 2>(layout, first, out);
  else if (own == 1)
    score_tiles<T, 1>(layout, first, out);
}

/* Adds the parts of the group's blocks, column blocks in order, then heads in order: two places to a thread.
 * NaN becomes HIGHEST: scores are sums of squares, so that now their bits order as they do. */
__device__ void sum_resident(const lola_device_segment &g, const scan_plan &plan, const resident_lists &lists,
                             int count, const float *parts) {
  const int n = g.L + static_cast<int>(g.C);
  const auto ranked = [&](int entry, float score) {
    if (entry >= count && entry < g.L) return __uint_as_float(UNUSED);
    return score == score ? score : __uint_as_float(HIGHEST);
  };
  const unsigned thread = lola_thread();
  constexpr int LOADS = 16;
  for (int i = 2 * thread; i < n; i += 2 * THREADS) {
    const int entry[2] = {lists.entry[i], lists.entry[min(i + 1, n - 1)]};
    float2 total = make_float2(0, 0), head = make_float2(0, 0);
    int column_block = 0;
    for (int at = 0; at < plan.group_blocks; at += LOADS) {
      float2 part[LOADS];
#pragma unroll
      for (int e = 0; e < LOADS; e++)
        part[e] = at + e < plan.group_blocks
                      ? __ldcg(reinterpret_cast<const float2 *>(parts + (at + e) * plan.pairs + i))
                      : make_float2(0, 0);
#pragma unroll
      for (int e = 0; e < LOADS; e++) {
        if (at + e >= plan.group_blocks) break;
        head.x += part[e].x;
        head.y += part[e].y;
        if (++column_block == plan.column_blocks) {
          total.x += head.x;
          total.y += head.y;
          head = make_float2(0, 0);
          column_block = 0;
        }
      }
    }
    lists.score[entry[0]] = ranked(entry[0], total.x);
    if (i + 1 < n) lists.score[entry[1]] = ranked(entry[1], total.y);
  }
}

/* --- select ----------------------------------------------------------------------------------------------------- */

/* The first position at or after which exactly `ties` of the entries with the key `tied` lie. */
__device__ int64_t find_last_positions(const resident_lists &lists, int n, unsigned tied, int ties) {
  const unsigned thread = lola_thread();
  const int lane = thread % 32;
  const auto of = [&](int i) -> int64_t { /* -1: not among them */
                                          return __float_as_uint(lists.score[i]) == tied
                                                     ? lists.position[lists.place[i]]
                                                     : -1;
  };
  int64_t low = INT64_MAX, high = 0;
  for (int i = lane; i < n; i += 32) {
    const int64_t position = of(i);
    if (position < 0) continue;
    low = position < low ? position : low;
    high = position > high ? position : high;
  }
  for (int i = 16; i; i /= 2) {
    const int64_t other_low = __shfl_xor_sync(ALL, low, i), other_high = __shfl_xor_sync(ALL, high, i);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  for (;;) { /* more than `ties` lie at or after `low`, none after `high` */
    const int64_t middle = low + (high - low + 1) / 2;
    unsigned after = 0;
    for (int i = lane; i < n; i += 32) after += of(i) >= middle;
    after = __reduce_add_sync(ALL, after);
    if (after == static_cast<unsigned>(ties)) return middle;
    if (after > static_cast<unsigned>(ties))
      low = middle;
    else
      high = middle - 1;
  }
}

/* The `drops` lowest entries, ties to the later position. The searching warps each look for the cut, all keys in their
 * registers, which costs less than to meet after every look. The cut is guessed from how many keys lie on either side,
 * and now and then the range is halved. */
__device__ void select_resident(const lola_device_segment &g, const resident_lists &lists, int count, int drops) {
  const unsigned thread = lola_thread();
  const int warp = static_cast<int>(thread / 32) - (WARPS - SEARCHERS), lane = thread % 32;
  const int n = g.L + static_cast<int>(g.C);
  if (warp < 0) return;
  unsigned key[RESIDENT_WORDS], low = UNUSED, high = 0;
#pragma unroll
  for (int w = 0; w < RESIDENT_WORDS; w++) {
    key[w] = __float_as_uint(lists.score[32 * w + lane]);
    low = min(low, key[w]);
    high = max(high, key[w] + 1); /* UNUSED is 0 then */
  }
  low = __reduce_min_sync(ALL, low);
  high = __reduce_max_sync(ALL, high) - 1;
  int below = 0, until = count + static_cast<int>(g.C); /* keys < low, keys <= high: below < drops < until */
  unsigned limit;                                       /* keys < limit are dropped */
  for (int step = 0;; step++) {
    if (low == high) { /* of equal keys the latest */
      const int64_t from = find_last_positions(lists, n, low, drops - below);
#pragma unroll
      for (int w = 0; w < RESIDENT_WORDS; w++) {
        bool dropped = key[w] < low;
        if (key[w] == low) dropped = lists.position[lists.place[32 * w + lane]] >= from;
        key[w] = dropped ? 0 : UNUSED;
      }
      limit = 1;
      break;
    }
    const unsigned width = high - low;
    unsigned middle = low + width / 2;
    if (step % 3 != 2) {
      const float part = __fdividef(static_cast<float>(drops - below), static_cast<float>(until - below));
      middle = low + min(__float2uint_rd(static_cast<float>(width) * part), width - 1);
    }
    unsigned found = 0;
#pragma unroll
    for (int w = 0; w < RESIDENT_WORDS; w++) found += key[w] <= middle;
    const int at_most = static_cast<int>(__reduce_add_sync(ALL, found));
    if (at_most == drops) {
      limit = middle + 1;
      break;
    }
    if (at_most < drops) {
      low = middle + 1;
      below = at_most;
    } else {
      high = middle;
      until = at_most;
    }
  }
  /* Each writes up the words w, w + SEARCHERS, .. */
  constexpr int OWN = (RESIDENT_WORDS + SEARCHERS - 1) / SEARCHERS;
  unsigned own_bits[OWN] = {};
  int own_before[OWN] = {}, before = 0;
#pragma unroll
  for (int w = 0; w < RESIDENT_WORDS; w++) {
    const unsigned bits = __ballot_sync(ALL, key[w] < limit);
    if (w % SEARCHERS == warp) {
      own_bits[w / SEARCHERS] = bits;
      own_before[w / SEARCHERS] = before;
    }
    before += __popc(bits);
  }
#pragma unroll
  for (int q = 0; q < OWN; q++) {
    const int w = warp + q * SEARCHERS;
    if (w >= RESIDENT_WORDS) break;
    const unsigned bits = own_bits[q];
    if (bits >> lane & 1) lists.drop[own_before[q] + __popc(bits & ((1u << lane) - 1))] = lists.place[32 * w + lane];
    if (lane == 0) {
      lists.dropped[w] = bits;
      lists.before[w] = own_before[q];
    }
  }
  if (warp == SEARCHERS - 1 && drops + lane < lola_padded(drops, 16)) lists.drop[drops + lane] = NOWHERE;
}

/* --- fold ------------------------------------------------------------------------------------------------------- */

/* H += Phi^T V, s += Phi^T 1 of the dropped pairs, 64 at a time; then the halves. */
template <typename T>
__device__ void fold_resident(const lola_device_segment &g, const scan_plan &plan, const resident_lists &lists,
                              int drops, resident_state *state) {
  const unsigned thread = lola_thread();
  constexpr int BATCH = 4; /* of 16 pairs */
  const int lane = thread % 32, group = lane / 4, f = thread / 32 * 16;
  if (f >= g.F) return;
  const unsigned one = group == 0 ? 0x3f803f80u : 0; /* column 0 of ones: the sum of phi */
  for (int first = 0; first < drops; first += BATCH * 16) {
    unsigned a[BATCH][4] = {}, b[BATCH][2][4] = {};
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      if (first + 16 * k >= drops) continue;
      const int left = lists.drop[first + 16 * k + lane % 8 + lane / 16 * 8];
      const int right = lists.drop[first + 16 * k + lane % 16];
      lola_load_transposed(a[k],
                           scan_memory + (left == NOWHERE ? plan.zeros : phi_at(plan, left, f / 8 + (lane / 8 & 1))));
#pragma unroll
      for (int two = 0; two < 2; two++)
        lola_load_transposed(b[k][two],
                             scan_memory +
                                 (right == NOWHERE ? plan.zeros : value_at(plan.values, right, 2 * two + lane / 16)));
    }
    float acc[5][4] = {};
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      if (first + 16 * k >= drops) continue;
#pragma unroll
      for (int two = 0; two < 2; two++) {
        unsigned(&v)[4] = b[k][two];
        if constexpr (is_half<T>) {
          unsigned rest[4];
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const float2 pair = lola_widen<__half>(v[e]);
            lola_split_pair(pair.x, pair.y, &v[e], &rest[e]);
          }
          lola_mma(acc[2 * two], a[k][0], a[k][1], a[k][2], a[k][3], rest[0], rest[1]);
          lola_mma(acc[2 * two + 1], a[k][0], a[k][1], a[k][2], a[k][3], rest[2], rest[3]);
        }
        lola_mma(acc[2 * two], a[k][0], a[k][1], a[k][2], a[k][3], v[0], v[1]);
        lola_mma(acc[2 * two + 1], a[k][0], a[k][1], a[k][2], a[k][3], v[2], v[3]);
      }
      lola_mma(acc[4], a[k][0], a[k][1], a[k][2], a[k][3], one, one);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) state->h[i][e] += acc[i][e];
    state->s[0] += acc[4][0];
    state->s[1] += acc[4][2];
  }
  store_state_halves<T>(plan, *state);
}

/* --- the sparse cache ------------------------------------------------------------------------------------------- */

/* The pairs that stay take a slot each: a dropped pair's in ascending order, then empty ones. One warp. */
__device__ void place_leaving(const lola_device_segment &g, const resident_lists &lists, int count, bool selected) {
  const unsigned thread = lola_thread();
  const int L = g.L, lane = thread % 32;
  const auto before = [&](int i) {
    return lists.before[i / 32] + __popc(lists.dropped[i / 32] & ((1u << (i % 32)) - 1));
  };
  const int freed = selected ? before(L) : 0;
  for (int j = lane; j < g.C; j += 32) {
    int slot = count + j;
    float score = NAN;
    if (selected) {
      if (lists.dropped[(L + j) / 32] >> ((L + j) % 32) & 1) continue;
      const int rank = j - (before(L + j) - freed);
      slot = rank < freed ? lists.entry[lists.drop[rank]] : count + rank - freed;
      score = lists.score[L + j];
    }
    const uint16_t from = lists.place[slot], to = lists.place[L + j];
    lists.score[slot] = score;
    lists.place[slot] = to;
    lists.entry[to] = static_cast<uint16_t>(slot);
    lists.place[L + j] = from;
    lists.entry[from] = static_cast<uint16_t>(L + j);
  }
  __syncwarp();
}

/* Where a slot's pair lies in the segment: a pair that was there when it began is in its slot still. */
__device__ int code_of(const scan_unit &unit, const resident_lists &lists, int slot) {
  const int64_t position = lists.position[lists.place[slot]];
  return position >= unit.leaving ? static_cast<int>(position - unit.base) : -slot - 1;
}

/* The pairs that queries of the span's i-th chunk see: every block writes some. One warp. */
__device__ void record_resident(const lola_device_segment &g, const scan_plan &plan, const block_shared &shared,
                                const resident_lists &lists, int count, int64_t i) {
  const unsigned thread = lola_thread();
  const int lane = thread % 32, rank = shared.block.rank;
  const int64_t at = (shared.unit.span.chunk + i) * g.S + shared.unit.set;
  for (int slot = 32 * rank + lane; slot < count; slot += 32 * plan.group_blocks)
    g.sources[at * g.L + slot] = code_of(shared.unit, lists, slot);
  if (rank == 0 && lane == 0) g.source_count[at] = count;
}

/* --- phi(q)^T H ------------------------------------------------------------------------------------------------- */

/* A warp takes 16 of the pending tokens and two of the four products across H's columns at a time. */
template <typename T>
__device__ void fetch_tokens(const lola_device_segment &g, const scan_unit &unit, const scan_progress &progress,
                             bool wanted, int task, uint4 (&x)[2][2 * T::panels]) {
  const unsigned thread = lola_thread();
  const int lane = thread % 32, first = progress.recall_first + task / 2 * 16, end = progress.recall_end;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t t = min(first + 8 * half + lane / 4, end - 1);
    const char *row = static_cast<const char *>(g.query_phi) +
                      ((static_cast<int64_t>(unit.span.token) + t) * g.Hq + unit.head) * g.F * 2;
#pragma unroll
    for (int step = 0; step < 2 * T::panels; step++)
      x[half][step] = load_chunk<T::vector>(row, 32 * step + 8 * (lane % 4), wanted && first < end ? g.F : 0);
  }
}

template <typename T>
__device__ void recall_resident(const lola_device_segment &g, const scan_plan &plan, const block_shared &shared,
                                const scan_progress &progress, uint4 (&x)[2][2 * T::panels]) {
  const unsigned thread = lola_thread();
  constexpr int pitch = T::panels * 64;
  const int warp = thread / 32, lane = thread % 32, group = lane / 4, c = lane % 4;
  const int end = progress.recall_end, tasks = (end - progress.recall_first + 15) / 16 * 2;
  for (int task = warp; task < tasks; task += WARPS) {
    if (task != warp) fetch_tokens<T>(g, shared.unit, progress, true, task, x);
    const int side = task % 2; /* of the columns */
    const bool sums = !side && !shared.block.column_block;
    float acc[3][4] = {};
#pragma unroll
    for (int step = 0; step < 2 * T::panels; step++) {
      const lola_fragment phi = lola_fragment_of(x[0][step], x[1][step], plan.identity);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const __nv_bfloat16 *at = halves_of(plan) + lola_swizzled(8 * (2 * side + n) + group, 32 * step + 8 * c, pitch);
        lola_mma_chunk(acc[n], phi, *reinterpret_cast<const uint4 *>(at));
        lola_mma_chunk(acc[n], phi, *reinterpret_cast<const uint4 *>(at + LOW_ROWS * pitch));
      }
      if (!sums) continue;
      uint4 s = make_uint4(0, 0, 0, 0);
      if (group < 2)
        s = *reinterpret_cast<const uint4 *>(halves_of(plan) +
                                             lola_swizzled(NORMALIZER_ROW + group, 32 * step + 8 * c, pitch));
      lola_mma_chunk(acc[2], phi, s);
    }
    const int column = shared.block.column_block * COLUMNS + 8 * c + 4 * side;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = progress.recall_first + task / 2 * 16 + 8 * half + group;
      if (t >= end) continue;
      const int64_t index = (static_cast<int64_t>(shared.unit.span.token) + t) * g.Hq + shared.unit.head;
      float *to = g.recalled + index * g.Dv + column;
      if (plan.vector_recalled) {
        if (column < g.Dv)
          *reinterpret_cast<float4 *>(to) =
              make_float4(acc[0][2 * half], acc[0][2 * half + 1], acc[1][2 * half], acc[1][2 * half + 1]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (column + e < g.Dv) to[e] = acc[e / 2][2 * half + e % 2];
      }
      if (sums && c == 0) g.z[index] = acc[2][2 * half] + acc[2][2 * half + 1];
    }
  }
}

/* Tokens before anything is folded, or whose mixing does not read the state. */
__device__ void recall_nothing(const lola_device_segment &g, const block_shared &shared,
                               const scan_progress &progress) {
  const unsigned thread = lola_thread();
  for (int t = progress.recall_first + thread; !shared.block.column_block && t < progress.recall_end; t += THREADS)
    g.z[(static_cast<int64_t>(shared.unit.span.token) + t) * g.Hq + shared.unit.head] = 0;
}

/* --- a unit ----------------------------------------------------------------------------------------------------- */

template <typename T>
__device__ void begin_resident(const lola_device_segment &g, const scan_plan &plan, block_shared *shared,
                               const resident_lists &lists, scan_progress *progress, resident_state *state, int row,
                               int set, int record) {
  const unsigned thread = lola_thread();
  const int64_t group = static_cast<int64_t>(row) * g.S + set;
  const int count = static_cast<int>(g.sparse_count[group]);
  if (thread == 0) begin_scan_unit(g, shared, row, set, count);
  if (!progress->cleared) clear_resident<T>(g, plan);
  progress->cleared = true;
  __syncthreads();
  progress->count = count;
  progress->folded = g.folded[static_cast<int64_t>(row) * g.Hq + shared->unit.head];
  progress->leaving = false;
  progress->recall_first = progress->recall_end = 0;
  for (int i = thread; i < RESIDENT_PAIRS; i += THREADS) {
    lists.score[i] = __uint_as_float(UNUSED);
    if (i < g.L + static_cast<int>(g.C)) lists.place[i] = lists.entry[i] = static_cast<uint16_t>(i);
    if (i >= count) continue;
    lists.position[i] = g.sparse_positions[group * g.L + i];
    lists.score[i] = g.sparse_scores[group * g.L + i];
  }
  if (shared->unit.folds) load_slots<T>(g, plan, *shared, count);
  /* Where nothing is folded, now or before, the state is not needed. */
  if (shared->unit.folds || (record && progress->folded && g.mixing != LOLA_MIXING_CACHE_ONLY))
    load_resident_state<T>(g, plan, *shared, state);
  __syncthreads();
}

/* As end_unit of scan.cu. */
__device__ void end_resident(const lola_device_segment &g, const scan_plan &plan, const block_shared &shared,
                             const resident_lists &lists, scan_progress *progress, const resident_state &state,
                             bool met, bool folded) {
  const unsigned thread = lola_thread();
  const scan_block &block = shared.block;
  const scan_unit &unit = shared.unit;
  const int64_t group = static_cast<int64_t>(unit.row) * g.S + unit.set;
  const int count = progress->count;
  if (block.rank == 0)
    for (int slot = thread; slot < count; slot += THREADS)
      g.slot_source[group * g.L + slot] = code_of(unit, lists, slot);
  const lola_device_leaving leaving = lola_device_segment_leaving(g, unit.span);
  if (leaving.end <= leaving.first) return;
  const int64_t entered = count - g.sparse_count[group]; /* the rest of the pairs that left were folded */
  if (!met && plan.group_blocks > 1) {
    arrive(block, progress);
    await(plan, block, *progress);
  } else {
    __syncthreads();
  }
  if (folded) store_resident_state(g, shared, state);
  if (block.rank) return;
  for (int slot = thread; slot < count; slot += THREADS) {
    g.sparse_positions[group * g.L + slot] = lists.position[lists.place[slot]];
    g.sparse_scores[group * g.L + slot] = lists.score[slot];
  }
  if (thread == 0) g.sparse_count[group] = count;
  for (int h = thread; h < g.rs; h += THREADS)
    g.folded[static_cast<int64_t>(unit.row) * g.Hq + unit.set * g.rs + h] += leaving.end - leaving.first - entered;
}

/* As walk_unit of scan.cu. */
template <typename T>
__device__ void walk_resident(const lola_device_segment &g, const scan_plan &plan, block_shared *shared,
                              scan_progress *progress, int row, int set, int record) {
  const unsigned thread = lola_thread();
  const int warp = thread / 32, C = static_cast<int>(g.C);
  const unsigned rounds_before = progress->rounds;
  const resident_lists lists = resident_lists_of(g, plan);
  resident_state state = {};
  begin_resident<T>(g, plan, shared, lists, progress, &state, row, set, record);
  const int64_t folded_before = progress->folded, first = shared->unit.span.position / g.C, last = shared->unit.last;
  for (int64_t chunk = first;; chunk++) {
    const bool updates = chunk <= last && chunk > shared->unit.span.updated && lola_device_leaving_first(g, chunk) >= 0;
    const bool selects = updates && progress->count + C > g.L, more = chunk < last;
    const bool pending = progress->recall_first < progress->recall_end;
    const bool recalls = pending && progress->folded && g.mixing != LOLA_MIXING_CACHE_ONLY;
    uint4 next[AHEAD], queries[2][2 * T::panels];
    if (updates && !progress->leaving) {
      fetch_leaving<T>(g, *shared, shared->unit.folds, chunk, next);
      put_leaving<T>(g, plan, *shared, lists, chunk, next);
      __syncthreads();
    }
    if (selects)
      score_resident<T>(plan, parts_of(plan, shared->block, progress->rounds) +
                                  static_cast<int64_t>(shared->block.rank) * plan.pairs);
    /* The chunk before still sees this state, and the group takes a while to meet. */
    fetch_tokens<T>(g, shared->unit, *progress, recalls, warp, queries);
    if (selects) arrive(shared->block, progress);
    fetch_leaving<T>(g, *shared, updates && more && shared->unit.folds, chunk + 1, next);
    if (recalls)
      recall_resident<T>(g, plan, *shared, *progress, queries);
    else if (pending)
      recall_nothing(g, *shared, *progress);
    progress->recall_first = progress->recall_end;
    if (chunk > last) break;
    const int count = progress->count, drops = count + C - g.L;
    if (selects) {
      await(plan, shared->block, *progress);
      sum_resident(g, plan, lists, count, parts_of(plan, shared->block, progress->rounds - 1));
      __syncthreads();
      select_resident(g, lists, count, drops);
      __syncthreads();
      fold_resident<T>(g, plan, lists, drops, &state);
      progress->folded += drops;
    }
    if (updates) progress->count = selects ? g.L : count + C;
    if (warp == PLACING) {
      if (updates) place_leaving(g, lists, count, selects);
      if (record) record_resident(g, plan, *shared, lists, progress->count, chunk - first);
    }
    progress->leaving = updates && more;
    if (updates) {
      __syncthreads(); /* dropped pairs are folded, the lists are in order */
      if (more) {
        put_leaving<T>(g, plan, *shared, lists, chunk + 1, next);
        __syncthreads();
      }
    }
    if (!record) continue;
    const int64_t end = (chunk + 1) * g.C - shared->unit.span.position;
    progress->recall_end = end < shared->unit.span.tokens ? static_cast<int>(end) : shared->unit.span.tokens;
  }
  end_resident(g, plan, *shared, lists, progress, state, progress->rounds != rounds_before,
               progress->folded != folded_before);
  __syncthreads(); /* the lists are read to the end */
}

} // namespace
#endif
