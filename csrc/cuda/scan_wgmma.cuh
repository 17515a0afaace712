/* The scan on Hopper: a cluster of rs * ceil(Dv / 64) blocks walks a unit, block (h, j) with head h's phi of
 * all its pairs in shared memory and columns 64 j .. 64 j + 63 of H and s beside them. For self_recall scores of 16-bit
 * caches with F <= 128, where that fits (make_cluster_plan in scan.cu).
 *
 * Rows of phi are the L slots and then the C pairs that leave next ("newcomers"), in tiles of 64. Three warpgroups walk
 * the chunks:
 *   score   phi times the high half of H, with both halves of s beside it, 72 columns of wgmma, and times the low
 *           half, 64 columns more; tiles in turn; values come from global memory (L2) meanwhile. Each block sends its
 *           part of every pair's error to all blocks of the cluster.
 *   select  every block adds the parts, column blocks in order, then heads, and finds the cut by itself
 *   swap    a newcomer that stays trades rows with the pair that was dropped from its slot, so that the newcomers' rows
 *           then hold just the pairs to be folded
 *   fold    Phi^T V of those rows, summed for 64 pairs and then added once to H, which lives in registers in float32;
 *           its halves go back to shared memory
 * and a fourth, the helper, has the next newcomers in registers by the time that their rows are free, writes down what
 * queries see, and multiplies phi(q)^T H.
 * Order of sums: scores as they lie in the fragments, then over column blocks, then over heads; folds by newcomers'
 * row. Neither depends on how a call was cut, on the batch, or on the grid.
 *
 * Tiles lie as instructions.cuh says: panels of 64 columns, rows of 128 bytes, swizzled. Columns of H are dealt
 * out within 32 as lola_column_row says, so that a lane's eight results are neighbours: a value's 16 bytes. */
#ifndef LOLA_CUDA_SCAN_WGMMA_CUH
#define LOLA_CUDA_SCAN_WGMMA_CUH

#include "cuda/chain.cuh"
#include "cuda/instructions.cuh"
#include "cuda/scan_block.cuh"

namespace {
namespace wgmma_scan {

constexpr int WALKERS = 384, WARPS = WALKERS / 32, HELPERS = 128, THREADS = WALKERS + HELPERS;
constexpr int COLUMNS = 64; /* of H, to a block */
constexpr int TILE = 64;    /* rows */
constexpr int ROW = 128;    /* bytes of a row in a panel */
/* Rows of the right-hand matrices, one after the other: H's high half, s (its high and its low half by turns), and H's
 * low half. */
constexpr int NORMALIZER_ROW = COLUMNS, LOW_ROW = COLUMNS + 8, HALF_ROWS = LOW_ROW + COLUMNS;
constexpr int PRODUCTS = LOW_ROW / 8;
constexpr int ROWS_AT_ONCE = 128;                             /* of the cache, that are looked at for work */
constexpr int ROWS_MOST = 1024;                               /* of phi: a lane of a warp knows a word of their bits */
constexpr int OWN_ROWS = (ROWS_MOST + WALKERS - 1) / WALKERS; /* of phi, to a walker: each WALKERS-th */
constexpr int BIN_BITS = 7, BINS = 1 << BIN_BITS;             /* of keys: four to a lane */
constexpr int BEFORE = BINS, AFTER = BINS + 1, ALL_BINS = BINS + 4;
constexpr int BLOCKS_MOST = 16;                              /* of a cluster */
constexpr unsigned UNUSED = UINT_MAX, HIGHEST = 0x7fffffffu; /* keys: no pair; NaN, above all others */

/* What is the same on every call for one cache and device, so that the order of sums is too. */
struct cluster_plan {
  int panels;                        /* of phi */
  int slots, newcomers, rows;        /* whole tiles, and both together */
  int blocks, column_blocks;         /* of a cluster */
  int groups;                        /* clusters */
  int vector_recalled;               /* 16-byte stores are possible */
  unsigned identity;                 /* LOLA_IDENTITY */
  int halves, values, parts, tables; /* offsets into shared memory; phi comes first */
  int64_t shared_bytes;
};

/* By row of phi, unless said otherwise. */
struct tables {
  const char *
      *value; /* the block's columns of the pair's values in global memory; of any others where there is no pair */
  int *code;
  float *score;      /* at the last ranking; NaN if never ranked */
  float *normalizer; /* (64 panels,): s */
  uint16_t *drop;    /* (newcomers,): dropped slots, ascending */
  uint16_t *kept;    /* (newcomers,), behind them: newcomers that stay, ascending */
};

__host__ __device__ inline int64_t table_bytes(int64_t rows, int64_t newcomers, int64_t panels) {
  return rows * (8 + 4 + 4) + panels * 64 * 4 + newcomers * 4;
}

/* What a unit's chunks are, counted from the first that its tokens touch. */
struct unit_chunks {
  int count;
  int updates; /* the first whose update is the unit's; so are those of all behind it */
  int end;     /* tokens of the span before the second chunk, if it has so many */
  int code;    /* of the first pair that leaves the window when the first chunk begins */
  int leaving; /* pairs that leave it during them all */
  int before;  /* slots in use when the first begins */
};

/* Apart from the rest, at a place that is known when compiled: it takes no register to find. */
struct cluster_shared {
  uint64_t full, read; /* barriers: parts are there, and were read by the cluster's warps */
  uint64_t newcomers;  /* the helpers have put them in place */
  scan_unit unit;
  unit_chunks chunks;
  int rows[ROWS_AT_ONCE]; /* cache rows with work, of those being looked at */
  int row_count[ROWS_AT_ONCE / 32];
  unsigned dropped[OWN_ROWS * WARPS];       /* a bit for each row */
  __align__(16) unsigned bins[3][ALL_BINS]; /* keys in each bin, before all and after all; three take turns */
  unsigned cut;                             /* where the last cut between keys was */
  int shift;                                /* how wide a bin, base 2, is likely to find the next */
};

template <typename Element, int FEATURE_PANELS, bool VECTOR_ROWS> struct wgmma_kind {
  using element = Element;
  static constexpr int panels = FEATURE_PANELS;
  static constexpr bool vector = VECTOR_ROWS;
  /* 16-byte pieces of a pair: phi's, then the values' */
  static constexpr int phi_pieces = FEATURE_PANELS * 8, value_pieces = COLUMNS / 8;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

extern __shared__ __align__(1024) unsigned char wgmma_memory[];

/* --- instructions ------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/* Of all threads, also where helpers and walkers come to different ones, as __syncthreads is not. */
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

/* The same in all lanes, known to be so. What decides whether and how often wgmma runs must be known to be the same for
 * a whole warp, or products are put one after the other. */
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(ALL, x, 0); }

/* As lola_thread, so that little is kept in registers from chunk to chunk. */
__device__ __forceinline__ int own_thread() {
  const unsigned thread = lola_thread();
  __builtin_assume(thread < 1024); /* so that it is divided by shifts alone */
  return static_cast<int>(thread);
}

__device__ __forceinline__ int own_warpgroup() { return uniform(own_thread() / 128); }

/* Stores into the shared memory of the cluster's block `rank`, at this block's address, and counts the bytes at a
 * barrier there. The store is on its way when this returns; who waits for the barrier sees it. */
__device__ __forceinline__ void send(uint32_t address, uint32_t barrier, int rank, float x) {
  asm volatile(
      "{\n.reg .b32 there, full;\nmapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 full, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %3, [full];\n}" ::"r"(address),
      "r"(barrier), "r"(rank), "f"(x)
      : "memory");
}

/* Other blocks see barriers that were made. */
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* The phase of a barrier for one thread is complete once so many bytes have come. */
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

/* Each warp of walkers tells every block of the cluster, at its barrier at this block's address, that it has read what
 * it wanted to. */
__device__ __forceinline__ void tell_cluster(uint32_t barrier, int blocks) {
  __syncwarp();
  const int rank = threadIdx.x % 32;
  if (rank < blocks)
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
  __syncwarp();
}

#define LOLA_ROW_4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define LOLA_ROW_16(c, i) LOLA_ROW_4(c, i), LOLA_ROW_4(c, i + 1), LOLA_ROW_4(c, i + 2), LOLA_ROW_4(c, i + 3)
#define LOLA_REGISTERS_32                                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "     \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define LOLA_OPERANDS_32(c) LOLA_ROW_16(c, 0), LOLA_ROW_16(c, 4)

/* C (64 x 72) = or += A (64 x 16) B (16 x 72), bfloat16, where to the first 64 columns of B those of a second matrix
 * are added, which lies LOW_ROW rows behind it; panels of A and B run along the sum. */
__device__ __forceinline__ void multiply_rows(float (&c)[PRODUCTS][4], uint32_t a, uint32_t b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %38, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {" LOLA_REGISTERS_32 ", %32, %33, %34, %35}, "
               "%36, %37, p, 1, 1, 0, 0;\n}"
               : LOLA_OPERANDS_32(c), LOLA_ROW_4(c, 8)
               : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)), "r"(accumulate)
               : "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LOLA_REGISTERS_32 "}, "
               "%32, %33, 1, 1, 1, 0, 0;"
               : LOLA_OPERANDS_32(c)
               : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b + LOW_ROW * (ROW / 16)))
               : "memory");
}

/* The same with A in registers. */
__device__ __forceinline__ void multiply_queries(float (&c)[PRODUCTS][4], const unsigned (&a)[4], uint32_t b,
                                                 int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %41, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {" LOLA_REGISTERS_32 ", %32, %33, %34, %35}, "
               "{%36, %37, %38, %39}, %40, p, 1, 1, 0;\n}"
               : LOLA_OPERANDS_32(c), LOLA_ROW_4(c, 8)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wgmma_descriptor(b)), "r"(accumulate)
               : "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LOLA_REGISTERS_32 "}, "
               "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
               : LOLA_OPERANDS_32(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wgmma_descriptor(b + LOW_ROW * (ROW / 16)))
               : "memory");
}

/* C (64 x 64) = or += A (64 x 16) B (16 x 64), bfloat16; rows of both tiles run along the sum. */
__device__ __forceinline__ void multiply_fold(float (&c)[8][4], uint32_t a, uint32_t b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
               "{" LOLA_REGISTERS_32 "}, %32, %33, p, 1, 1, 1, 1;\n}"
               : LOLA_OPERANDS_32(c)
               : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)), "r"(accumulate)
               : "memory");
}

#undef LOLA_OPERANDS_32
#undef LOLA_REGISTERS_32
#undef LOLA_ROW_16
#undef LOLA_ROW_4

/* Four 8 x 8 matrices from fragments, transposed: lanes 8i .. 8i+7 give where columns of matrix i go. */
__device__ __forceinline__ void store_transposed(uint32_t address, const unsigned (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

/* --- who waits for whom in a block -------------------------------------------------------------------------------- */

/* In each chunk: the helper arrives at the barrier `newcomers` once they are in place (if the chunk has an update) and
 * at HALVES once it needs neither the old halves nor the old tables; walkers wait there before they read the ones and
 * change the others, and arrive at CHUNK when all is ready for the next, where the helper waits. */
enum { WALK = 1, CHUNK = 2, HALVES = 3 };
__device__ __forceinline__ void walkers_sync() { named_barrier_sync(WALK, WALKERS); }

/* --- places in shared memory -------------------------------------------------------------------------------------- */

__device__ __forceinline__ tables tables_of(const cluster_plan &plan) {
  tables t;
  t.value = reinterpret_cast<const char **>(wgmma_memory + plan.tables);
  t.code = reinterpret_cast<int *>(t.value + plan.rows);
  t.score = reinterpret_cast<float *>(t.code + plan.rows);
  t.normalizer = t.score + plan.rows;
  t.drop = reinterpret_cast<uint16_t *>(t.normalizer + 64 * plan.panels);
  t.kept = t.drop + plan.newcomers;
  return t;
}

__device__ __forceinline__ uint4 &piece_at(int offset) { return *reinterpret_cast<uint4 *>(wgmma_memory + offset); }
__device__ __forceinline__ unsigned &word_at(int offset) {
  return *reinterpret_cast<unsigned *>(wgmma_memory + offset);
}

/* Offset of a 16-byte piece of a row of phi. */
__device__ __forceinline__ int phi_at(const cluster_plan &plan, int row, int piece) {
  return static_cast<int>(tile_offset(plan.rows, row, piece));
}

/* Offset of a 16-byte piece of row n of the right-hand matrices. */
__device__ __forceinline__ int half_at(const cluster_plan &plan, int n, int piece) {
  return plan.halves + static_cast<int>(tile_offset(HALF_ROWS, n, piece));
}

/* A newcomer's values, 8 columns, in the order that columns are dealt out; float16 as two halves. */
template <typename T>
__device__ __forceinline__ void put_values(const cluster_plan &plan, int newcomer, int piece, const uint4 &x) {
  const unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int w = 0; w < 4; w++) {
    const int at = plan.values + static_cast<int>(tile_offset(0, newcomer, 4 * (piece >> 2) + w)) + 4 * (piece & 3);
    if constexpr (is_half<T>) {
      unsigned hi, lo;
      const float2 pair = lola_widen<__half>(words[w]);
      lola_split_pair(pair.x, pair.y, &hi, &lo);
      word_at(at) = hi;
      word_at(at + plan.newcomers * ROW) = lo;
    } else {
      word_at(at) = words[w];
    }
  }
}

/* What a block knows of itself and, in shared memory, of its unit. */
struct block_place {
  int rank, column_block;
};

/* Which of a set's heads is the block's; worked out anew each time, since it is rarely asked for. */
__device__ __forceinline__ int own_head(const cluster_plan &plan, const block_place &block) {
  int rank = block.rank;
  asm volatile("" : "+r"(rank));
  return rank / plan.column_blocks;
}

/* What changes from chunk to chunk; every thread of the cluster keeps the same. */
struct cluster_progress {
  bool folded;                  /* pairs were, so that there is a state */
  int count;                    /* slots in use */
  int recall_first, recall_end; /* tokens of the span whose phi(q)^T H is still to be written */
};

/* How often the kernel's barriers have come round. */
struct cluster_turns {
  unsigned rankings, updates;
};

/* What there is to do when a chunk begins. */
struct chunk_work {
  bool updates, selects; /* pairs leave the window; some of them or of the slots are dropped */
};

/* Where the pair `code` lies: its phi (0) or its values (1). */
__device__ __forceinline__ const char *row_of(const lola_device_segment &g, const scan_unit &unit, int which,
                                              int code) {
  const int ring = code + unit.ring; /* slots go round */
  const int R = static_cast<int>(g.R), kind = code < 0 ? 0 : code < R ? 1 : 2;
  const int index = code < 0 ? -code - 1 : code >= R ? code - R : ring >= R ? ring - R : ring;
  const row_source &source = unit.sources[which][kind];
  return source.data + index * source.stride;
}

/* --- pairs that come in ------------------------------------------------------------------------------------------- */

/* A pair's phi into a row, by threads that take a piece each; finish with cp_async_wait_all. */
template <typename T>
__device__ __forceinline__ void fetch_phi(const lola_device_segment &g, const cluster_plan &plan, const char *from,
                                          int row, int piece) {
  const int at = phi_at(plan, row, piece);
  if constexpr (T::vector) {
    if (8 * piece < g.F) cp_async(shared_address(wgmma_memory + at), from + 16 * piece);
  } else {
    piece_at(at) = load_chunk<false>(from, 8 * piece, g.F);
  }
}

/* Up to 64 pairs that leave the window, on their way in a helper's registers. */
template <typename T> struct newcomer_pieces {
  static constexpr int phi_step = HELPERS / T::phi_pieces, value_step = HELPERS / T::value_pieces; /* rows at once */
  uint4 phi[TILE / phi_step], values[TILE / value_step];
};

/* Asks for a piece of each of the pairs `code` + first, `code` + first + step, ...: of phi (`which` = 0) or of the
 * values, 8 elements from element `column` on of those that begin `offset` bytes into a row and are `columns`. */
template <typename T, int N>
__device__ __forceinline__ void ask_pieces(const lola_device_segment &g, const scan_unit &unit, int which, int code,
                                           int first, int step, int offset, int column, int columns,
                                           uint4 (&pieces)[N]) {
  const int C = static_cast<int>(g.C), R = static_cast<int>(g.R);
  if (code >= R) { /* tokens of the call, as most are */
    const row_source &source = unit.sources[which][2];
    const char *row = source.data + (code - R + first) * source.stride + offset;
#pragma unroll
    for (int i = 0; i < N; i++, row += step * source.stride)
      if (first + i * step < C) pieces[i] = load_chunk<T::vector>(row, column, columns);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int j = first + i * step;
    if (j < C) pieces[i] = load_chunk<T::vector>(row_of(g, unit, which, code + j) + offset, column, columns);
  }
}

/* Asks for the pairs that leave when a chunk begins, `code` and those behind it, from the `first` of them on; nothing
 * if the chunk has no update. */
template <typename T>
__device__ __forceinline__ void ask_newcomers(const lola_device_segment &g, const block_place &block,
                                              const scan_unit &unit, int code, int first, bool updates,
                                              newcomer_pieces<T> *pieces) {
  const int helper = own_thread() - WALKERS, begin = block.column_block * COLUMNS;
  *pieces = {}; /* so that nothing of the last ones is kept in registers */
  if (!unit.folds || !updates) return;
  ask_pieces<T>(g, unit, 0, code, first + helper / T::phi_pieces, newcomer_pieces<T>::phi_step, 0,
                helper % T::phi_pieces * 8, g.F, pieces->phi);
  ask_pieces<T>(g, unit, 1, code, first + helper / T::value_pieces, newcomer_pieces<T>::value_step, begin * 2,
                helper % T::value_pieces * 8, g.Dv - begin, pieces->values);
}

/* Puts them into the newcomers' rows. */
template <typename T>
__device__ __forceinline__ void put_newcomers(const lola_device_segment &g, const cluster_plan &plan,
                                              const block_place &block, const scan_unit &unit, const tables &t,
                                              int code, int first, const newcomer_pieces<T> &pieces) {
  const int helper = own_thread() - WALKERS, C = static_cast<int>(g.C);
  constexpr int phi_step = newcomer_pieces<T>::phi_step, value_step = newcomer_pieces<T>::value_step;
  if (unit.folds) {
#pragma unroll
    for (int i = 0; i < TILE / phi_step; i++) {
      const int j = first + helper / T::phi_pieces + i * phi_step;
      if (j < C) piece_at(phi_at(plan, plan.slots + j, helper % T::phi_pieces)) = pieces.phi[i];
    }
#pragma unroll
    for (int i = 0; i < TILE / value_step; i++) {
      const int j = first + helper / T::value_pieces + i * value_step;
      if (j < C) put_values<T>(plan, j, helper % T::value_pieces, pieces.values[i]);
    }
  }
  const int j = first + helper;
  if (helper < TILE && j < C) {
    t.code[plan.slots + j] = code + j;
    t.value[plan.slots + j] = row_of(g, unit, 1, code + j) + block.column_block * COLUMNS * 2;
  }
}

/* --- the state in registers --------------------------------------------------------------------------------------- */

/* Warpgroup w keeps rows 64 w .. 64 w + 63 of H as the fragments of a fold lie: h[i][2 half + e] is row 64 w + 16 (warp
 * % 4) + 8 half + lane / 4; i, lane % 4 and e say the column, dealt out. */
typedef float hidden_part[8][4];

/* The first of the 8 neighbouring columns that lane `c` of a quad has in products 4 q .. 4 q + 3. */
__device__ __forceinline__ int column_of(int q, int c) { return 32 * q + 8 * c; }

__device__ __forceinline__ int hidden_row(int half) {
  return own_thread() / 32 * 16 + 8 * half + own_thread() % 32 / 4;
}

template <typename T> __device__ __forceinline__ bool has_state() { return own_warpgroup() < T::panels; }

/* The halves of H, by the warps that keep it. */
__device__ __forceinline__ void store_halves(const cluster_plan &plan, const hidden_part &h) {
  const int lane = own_thread() % 32, warp = own_thread() / 32;
  const int row = lane % 8 + lane / 16 * 8, piece = 2 * warp + lane / 8 % 2; /* of columns 16 i .. 16 i + 15 */
  const uint32_t at = shared_address(wgmma_memory) + half_at(plan, row, piece);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    unsigned hi[4], lo[4];
#pragma unroll
    for (int m = 0; m < 4; m++) lola_split_pair(h[i + m / 2][m % 2 * 2], h[i + m / 2][m % 2 * 2 + 1], &hi[m], &lo[m]);
    store_transposed(at + 8 * i * ROW, hi); /* whole groups of 8 rows on, which are swizzled alike */
    store_transposed(at + (LOW_ROW + 8 * i) * ROW, lo);
  }
}

/* The halves of s at features 2 i and 2 i + 1, four times, so that every lane of a quad has phi^T s among its products.
 */
__device__ __forceinline__ void store_normalizer(const cluster_plan &plan, int i, float x, float y) {
  unsigned hi, lo;
  lola_split_pair(x, y, &hi, &lo);
#pragma unroll
  for (int n = NORMALIZER_ROW; n < LOW_ROW; n += 2) {
    word_at(half_at(plan, n, i / 4) + i % 4 * 4) = hi;
    word_at(half_at(plan, n + 1, i / 4) + i % 4 * 4) = lo;
  }
}

/* Calls visit(i, half, place, count) for fours of elements, h[i][2 half], h[i][2 half + 1] and those of i + 1, the
 * first `count` of which are H's: with the place of the first among the head's F x Dv, the others follow it. `count` is
 * 4 for kinds that read 16 bytes at a time. */
template <typename T, class Visit>
__device__ __forceinline__ void for_each_hidden(const lola_device_segment &g, const block_place &block, Visit visit) {
  const int c = own_thread() % 4, first = block.column_block * COLUMNS;
  if (!has_state<T>()) return;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int row = hidden_row(half), column = first + column_of(i / 4, c) + i % 4 * 2;
      const int count = T::vector ? 4 : min(g.Dv - column, 4);
      if (row < g.F && column < g.Dv) visit(i, half, static_cast<int64_t>(row) * g.Dv + column, count);
    }
}

/* The part of H at `hidden`, the head's; it is zero before. */
template <typename T>
__device__ __forceinline__ void load_hidden(const lola_device_segment &g, const block_place &block, const float *hidden,
                                            hidden_part *h) {
  for_each_hidden<T>(g, block, [&](int i, int half, int64_t place, int count) {
    float four[4] = {0, 0, 0, 0};
    if constexpr (T::vector) {
      const float4 x = *reinterpret_cast<const float4 *>(hidden + place);
      four[0] = x.x, four[1] = x.y, four[2] = x.z, four[3] = x.w;
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (e < count) four[e] = hidden[place + e];
    }
#pragma unroll
    for (int e = 0; e < 4; e++) (*h)[i + e / 2][2 * half + e % 2] = four[e];
  });
}

template <typename T>
__device__ __forceinline__ void store_hidden(const lola_device_segment &g, const block_place &block,
                                             const hidden_part &h, float *hidden) {
  for_each_hidden<T>(g, block, [&](int i, int half, int64_t place, int count) {
    if constexpr (T::vector) {
      *reinterpret_cast<float4 *>(hidden + place) =
          make_float4(h[i][2 * half], h[i][2 * half + 1], h[i + 1][2 * half], h[i + 1][2 * half + 1]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (e < count) hidden[place + e] = h[i + e / 2][2 * half + e % 2];
    }
  });
}

/* h is zero before. */
template <typename T>
__device__ void load_state(const lola_device_segment &g, const cluster_plan &plan, const block_place &block,
                           const scan_unit &unit, const tables &t, hidden_part *h) {
  const int64_t at = static_cast<int64_t>(unit.row) * g.Hq + unit.head;
  const float *H = g.hidden + at * g.F * g.Dv, *s = g.normalizer + at * g.F;
  load_hidden<T>(g, block, H, h);
  if (has_state<T>()) store_halves(plan, *h);
  for (int i = own_thread(); i < 32 * T::panels; i += WALKERS) {
    const float x = 2 * i < g.F ? s[2 * i] : 0, y = 2 * i + 1 < g.F ? s[2 * i + 1] : 0;
    t.normalizer[2 * i] = x;
    t.normalizer[2 * i + 1] = y;
    store_normalizer(plan, i, x, y);
  }
}

template <typename T>
__device__ void store_state(const lola_device_segment &g, const block_place &block, const scan_unit &unit,
                            const tables &t, const hidden_part &h) {
  const int64_t at = static_cast<int64_t>(unit.row) * g.Hq + unit.head;
  float *H = g.hidden + at * g.F * g.Dv, *s = g.normalizer + at * g.F;
  store_hidden<T>(g, block, h, H);
#pragma unroll 1
  for (int f = own_thread(); !block.column_block && f < g.F; f += WALKERS) s[f] = t.normalizer[f];
}

/* --- score -------------------------------------------------------------------------------------------------------- */

/* The thread's row of a tile, the other is 8 rows on. */
__device__ __forceinline__ int tile_row(int first_row) {
  const int thread = own_thread();
  return first_row + thread % 128 / 32 * 16 + thread % 32 / 4;
}

/* Asks for acc = the tile's rows of phi, or fragments of others, times [H, s]. `multiply` takes 16 features. */
template <typename T, class Multiply>
__device__ __forceinline__ void multiply_state(const cluster_plan &plan, float (&acc)[PRODUCTS][4], Multiply multiply) {
  uint32_t halves = wgmma_matrix(shared_address(wgmma_memory) + plan.halves, 16);
  asm volatile("" : "+r"(halves)); /* so that not each step's place is kept in a register of its own */
  pin(acc);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4 * T::panels; step++)
    multiply(step, halves + step / 4 * HALF_ROWS * (ROW / 16) + step % 4 * 2, step > 0);
  wgmma_commit();
}

/* phi^T s of the row whose products are in `acc`. */
__device__ __forceinline__ float normalizer_of(const float (&acc)[PRODUCTS][4], int half) {
  return acc[PRODUCTS - 1][2 * half] + acc[PRODUCTS - 1][2 * half + 1];
}

/* Of a thread's two rows of a tile, 16 columns each. */
struct row_values {
  uint4 v[2][2]; /* zeros past the last column */
};

/* Rows that are not aligned: apart, so that it takes no registers elsewhere. */
__device__ __noinline__ uint4 load_odd_chunk(const char *row, int column, int columns) {
  return load_chunk<false>(row, column, columns);
}

template <typename T>
__device__ __forceinline__ void ask_values(const tables &t, int row, int columns, row_values *values) {
  const char *from[2];
#pragma unroll
  for (int half = 0; half < 2; half++) from[half] = t.value[row + 8 * half];
#pragma unroll
  for (int q = 0; q < 2; q++) {
    const int column = column_of(q, own_thread() % 4);
    if (column < columns)
#pragma unroll
      for (int half = 0; half < 2; half++)
        values->v[half][q] =
            T::vector ? load_chunk<true>(from[half], column, columns) : load_odd_chunk(from[half], column, columns);
  }
}

/* 1 / (phi^T s) of a thread's two rows, or 0. It overflows for a z near the smallest float: there the row's products
 * are lifted first, as recall_scale has it. */
__device__ __forceinline__ void invert_normalizers(float (&acc)[PRODUCTS][4], float (&inverse)[2]) {
  float z[2] = {normalizer_of(acc, 0), normalizer_of(acc, 1)};
  const bool tiny[2] = {z[0] != 0 && z[0] < 1e-30f, z[1] != 0 && z[1] < 1e-30f};
  if (__any_sync(ALL, tiny[0] || tiny[1])) { /* hardly ever */
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float up = tiny[half] ? 0x1p64f : 1.0f;
      z[half] *= up;
#pragma unroll
      for (int i = 0; i < PRODUCTS - 1; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) acc[i][2 * half + e] *= up;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) inverse[half] = z[half] != 0 ? lola_reciprocal(z[half]) : 0;
}

/* The errors of a thread's two rows over its columns. */
template <typename T>
__device__ __forceinline__ void tile_errors(float (&acc)[PRODUCTS][4], const row_values &values, float (&error)[2]) {
  float inverse[2];
  invert_normalizers(acc, inverse);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint4 &a = values.v[half][0], &b = values.v[half][1];
    const unsigned pairs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    float sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float2 value = lola_widen<typename T::element>(pairs[i]);
      const float dx = fmaf(acc[i][2 * half], inverse[half], -value.x);
      const float dy = fmaf(acc[i][2 * half + 1], inverse[half], -value.y);
      sum[0] = fmaf(dx, dx, sum[0]);
      sum[1] = fmaf(dy, dy, sum[1]);
    }
    error[half] = sum[0] + sum[1];
  }
}

/* Adds up the errors of a quad's two rows and sends them to all blocks: the first row's to where it is at `at` in this
 * one, counted at the barrier `full`. */
__device__ __forceinline__ void send_errors(const cluster_plan &plan, const float (&error)[2], int at, uint32_t full) {
  const int c = own_thread() % 4;
  /* Lanes 0 and 2 then have the one row, 1 and 3 the other. */
  float sum = (c % 2 ? error[1] : error[0]) + __shfl_xor_sync(ALL, c % 2 ? error[0] : error[1], 1);
  sum += __shfl_xor_sync(ALL, sum, 2);
  const int own = at + c % 2 * 32;
  const uint32_t there = shared_address(wgmma_memory) + own;
  if (plan.blocks == 1) {
    if (c < 2) word_at(own) = __float_as_uint(sum);
  } else if (plan.blocks % 2 == 0) { /* the one lane sends to every other block, the other one to the rest */
#pragma unroll 4
    for (int rank = 0; rank < plan.blocks; rank += 2) send(there, full, rank + c / 2, sum);
  } else if (c < 2) {
#pragma unroll 1
    for (int rank = 0; rank < plan.blocks; rank++) send(there, full, rank, sum);
  }
}

/* All pairs: the errors over this block's columns, into every block's parts. The warpgroups take tiles in turn, the
 * newcomers' last; a tile is sent while the next one is multiplied. */
template <typename T>
__device__ __forceinline__ void score_pairs(const lola_device_segment &g, const cluster_plan &plan,
                                            const block_place &block, const tables &t, int count, uint32_t full,
                                            uint32_t newcomers, unsigned parity) {
  constexpr int TURN = WALKERS / 128;
  const int slot_tiles = uniform((count + TILE - 1) / TILE), tiles = slot_tiles + plan.newcomers / TILE;
  const int columns = g.Dv - block.column_block * COLUMNS, own_row = tile_row(0);
  const int apart = plan.slots - slot_tiles * TILE; /* rows between the slots in use and the newcomers */
  if (plan.blocks > 1 && own_thread() == 0) expect_bytes(full, plan.blocks * tiles * TILE * 4);
  row_values values = {};
  float acc[PRODUCTS][4], error[2];
  const auto first_row = [&](int tile) { return tile * TILE + (tile < slot_tiles ? 0 : apart); };
  /* Asks for a tile's values and products; in this order, since a warp is held while its products queue. */
  const auto ask = [&](int tile) {
    if (tile >= slot_tiles) barrier_wait(newcomers, parity);
    const int first = first_row(tile);
    ask_values<T>(t, first + own_row, columns, &values);
    const uint32_t phi = wgmma_matrix(shared_address(wgmma_memory) + first * ROW, 16);
    multiply_state<T>(plan, acc, [&](int step, uint32_t right, int accumulate) {
      multiply_rows(acc, phi + step / 4 * plan.rows * (ROW / 16) + step % 4 * 2, right, accumulate);
    });
  };
  const auto place_of = [&](int tile) { return plan.parts + (block.rank * plan.rows + first_row(tile) + own_row) * 4; };
  int tile = own_warpgroup();
  if (tile >= tiles) return;
  ask(tile);
#pragma unroll 1
  for (;; tile += TURN) {
    wgmma_wait<0>();
    pin(acc);
    tile_errors<T>(acc, values, error);
    if (tile + TURN >= tiles) break;
    ask(tile + TURN);
    send_errors(plan, error, place_of(tile), full);
  }
  send_errors(plan, error, place_of(tile), full);
}

/* --- phi(q)^T H --------------------------------------------------------------------------------------------------- */

/* Two features at an even place k of a row of n. VECTOR: k and n are multiples of 8, `row` is the lane's own two of the
 * first 8. */
template <bool VECTOR> __device__ __forceinline__ unsigned load_word(const char *row, int k, int n) {
  if constexpr (VECTOR) return k < n ? __ldg(reinterpret_cast<const unsigned *>(row + 2 * k)) : 0;
  const uint16_t *x = reinterpret_cast<const uint16_t *>(row) + k;
  return (k < n ? __ldg(x) : 0u) | (k + 1 < n ? static_cast<unsigned>(__ldg(x + 1)) << 16 : 0u);
}

/* Of phi(q) of 64 pending tokens: of a lane's two rows, its two features of each 8, 32 to a uint4. */
template <typename T> struct query_fragments { uint4 x[2][2 * T::panels]; };

/* Asks for those of the pending tokens from `first` on. They are put together when they are used (recall_tokens), so
 * that nobody waits for them here, however they lie. */
template <typename T>
__device__ __forceinline__ void ask_queries(const lola_device_segment &g, const scan_unit &unit, int first, int end,
                                            query_fragments<T> *phi) {
  const bool dealt = T::vector && g.queries_dealt;
  const int own = tile_row(first), c = own_thread() % 4, place = !T::vector ? 0 : dealt ? 16 * c : 4 * c;
  const char *rows[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t token = static_cast<int64_t>(unit.span.token) + min(own + 8 * half, end - 1);
    rows[half] = static_cast<const char *>(g.query_phi) + (token * g.Hq + unit.head) * g.F * 2 + place;
    asm volatile("" : "+l"(rows[half])); /* so that other places in it take no registers */
  }
  const auto ask = [&](auto load) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 2 * T::panels; i++) phi->x[half][i] = load(rows[half], 32 * i);
  };
  if (dealt)
    ask([&](const char *row, int k) { return load_chunk<true>(row, k, g.F); });
  else
    ask([&](const char *row, int k) {
      if (!T::vector) k += 2 * c;
      return make_uint4(load_word<T::vector>(row, k, g.F), load_word<T::vector>(row, k + 8, g.F),
                        load_word<T::vector>(row, k + 16, g.F), load_word<T::vector>(row, k + 24, g.F));
    });
}

/* Of the pending tokens; the fragments of the first 64 are on their way. The helpers. */
template <typename T>
__device__ __forceinline__ void recall_tokens(const lola_device_segment &g, const cluster_plan &plan,
                                              const block_place &block, const scan_unit &unit,
                                              const cluster_progress &progress, query_fragments<T> *phi) {
  const int end = uniform(progress.recall_end);
#pragma unroll 1
  for (int first = uniform(progress.recall_first);;) {
    const int own = tile_row(first), c = own_thread() % 4;
    lola_fragment a[2 * T::panels];
#pragma unroll
    for (int i = 0; i < 2 * T::panels; i++) {
      a[i] = lola_fragment_of(phi->x[0][i], phi->x[1][i], plan.identity);
#pragma unroll
      for (int e = 0; e < 8; e++) asm volatile("" : "+r"(a[i].a[e / 4][e % 4])); /* not behind wgmma_fence */
    }
    float acc[PRODUCTS][4];
    multiply_state<T>(plan, acc, [&](int step, uint32_t right, int accumulate) {
      multiply_queries(acc, a[step / 2].a[step % 2], right, accumulate);
    });
    wgmma_wait<0>();
    pin(acc);
    /* Two lanes write the eight columns of the one and then those of the other: whole sectors, 16 bytes to a lane. */
    const int odd = c % 2, column = block.column_block * COLUMNS + column_of(0, c) - 4 * odd;
    if (plan.vector_recalled) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int first = i / 2 * 4 + i % 2; /* products of a lane's first four columns; two on, those of the others */
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float other = __shfl_xor_sync(ALL, odd ? acc[first][e] : acc[first + 2][e], 1);
          if (odd)
            acc[first][e] = other;
          else
            acc[first + 2][e] = other;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float z = normalizer_of(acc, half);
      if (own + 8 * half >= end) continue;
      const int64_t index = (static_cast<int64_t>(unit.span.token) + own + 8 * half) * g.Hq + unit.head;
      float *row = g.recalled + index * g.Dv;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const float x[4] = {acc[i][2 * half], acc[i][2 * half + 1], acc[i + 1][2 * half], acc[i + 1][2 * half + 1]};
        if (plan.vector_recalled) {
          const int at = column + i / 4 * 32 + i % 4 * 4;
          if (at < g.Dv) *reinterpret_cast<float4 *>(row + at) = make_float4(x[0], x[1], x[2], x[3]);
        } else {
          const int at = column + 4 * odd + i / 4 * 32 + i % 4 * 2;
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (at + e < g.Dv) row[at + e] = x[e];
        }
      }
      if (!block.column_block && c == 0) g.z[index] = z;
    }
    first += TILE;
    if (first >= end) break;
    ask_queries<T>(g, unit, first, end, phi);
  }
}

/* Tokens before anything is folded, or whose mixing does not read the state. */
__device__ __forceinline__ void recall_nothing(const lola_device_segment &g, const block_place &block,
                                               const scan_unit &unit, const cluster_progress &progress) {
  const int helper = own_thread() - WALKERS;
  for (int t = progress.recall_first + helper; !block.column_block && t < progress.recall_end; t += HELPERS)
    g.z[(static_cast<int64_t>(unit.span.token) + t) * g.Hq + unit.head] = 0;
}

/* --- select ------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ int64_t position_of(const lola_device_segment &g, const scan_unit &unit, const tables &t,
                                               int row) {
  const int code = t.code[row];
  if (code >= 0) return unit.base + code;
  return g.sparse_positions[(static_cast<int64_t>(unit.row) * g.S + unit.set) * g.L - code - 1];
}

/* Whether nobody has an i-th row. Asked of the last one alone: what all have is worked out without a branch. */
__device__ __forceinline__ bool no_rows(const cluster_plan &plan, int i) {
  return i == OWN_ROWS - 1 && i * WALKERS >= plan.rows;
}

/* The sums of the thread's rows over the cluster's parts: column blocks in order, then heads in order. */
__device__ __forceinline__ void sum_rows(const cluster_plan &plan, float (&total)[OWN_ROWS]) {
  constexpr int AT_ONCE = 8; /* parts that are asked for before any is used */
  const float *parts = reinterpret_cast<const float *>(wgmma_memory + plan.parts);
  const int thread = own_thread(), rows = plan.rows, blocks = plan.blocks, column_blocks = plan.column_blocks;
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) total[i] = 0;
  if (blocks <= AT_ONCE && column_blocks <= 2) {
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) {
      if (no_rows(plan, i)) break;
      const float *part = parts + min(thread + i * WALKERS, rows - 1);
      float x[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) x[j] = j < blocks ? part[j * rows] : 0;
#pragma unroll
      for (int j = 0; j < AT_ONCE; j += 2) /* without a part nothing changes: none is negative */
        total[i] = column_blocks == 2 ? total[i] + (x[j] + x[j + 1]) : total[i] + x[j] + x[j + 1];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) {
    if (no_rows(plan, i)) break;
    const float *part = parts + min(thread + i * WALKERS, rows - 1);
#pragma unroll 1
    for (int left = blocks; left > 0; left -= column_blocks) {
      float head = *part;
#pragma unroll 1
      for (int j = 1; j < column_blocks; j++) head += part[j * rows];
      total[i] += head;
      part += column_blocks * rows;
    }
  }
}

/* Adds the parts of the cluster's blocks for the thread's rows; as keys: scores are sums of squares, so that their bits
 * order as they do. */
__device__ __forceinline__ void sum_parts(const lola_device_segment &g, const cluster_plan &plan, const tables &t,
                                          int count, unsigned (&key)[OWN_ROWS]) {
  const int C = static_cast<int>(g.C), rows = plan.rows, slots = plan.slots, thread = own_thread();
  float total[OWN_ROWS];
  sum_rows(plan, total);
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) {
    const int row = thread + i * WALKERS;
    key[i] = UNUSED;
    if (row >= rows) continue;
    if (row < slots ? row < count : row - slots < C)
      key[i] = total[i] == total[i] ? __float_as_uint(total[i]) : HIGHEST;
    t.score[row] = __uint_as_float(key[i]);
  }
}

/* Keys of a thread's rows. */
struct row_keys {
  unsigned own[OWN_ROWS];
};

/* Which of the thread's rows are among the `ties` latest of the pairs with the key `tied`, a bit each. The walkers:
 * each knows its rows' positions, and they search for the first one to drop together, counting at `zeros`. Rarely
 * called, so that no register is kept for it elsewhere. */
__device__ __noinline__ unsigned find_latest(const lola_device_segment &g, const cluster_plan &plan,
                                             const scan_unit &unit, unsigned tied, int ties, row_keys key,
                                             unsigned *zeros) {
  const tables t = tables_of(plan); /* taken from the caller they would be in memory, and not known to be shared */
  int64_t position[OWN_ROWS];
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) {
    position[i] = -1;
    if (key.own[i] == tied) position[i] = position_of(g, unit, t, own_thread() + i * WALKERS);
  }
  int64_t low = 0, high = unit.span.position + unit.span.tokens;
#pragma unroll 1
  for (int turn = 0; low < high; turn++) { /* at least `ties` lie at or after `low`, fewer after `high` */
    const int64_t middle = low + (high - low + 1) / 2;
    unsigned after = 0;
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) after += __popc(__ballot_sync(ALL, position[i] >= middle));
    if (own_thread() % 32 == 0 && after) atomicAdd(&zeros[turn], after);
    walkers_sync();
    if (zeros[turn] >= static_cast<unsigned>(ties))
      low = middle;
    else
      high = middle - 1;
  }
  unsigned latest = 0;
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) latest |= (position[i] >= low ? 1u : 0u) << i;
  return latest;
}

/* One more at this place of shared memory. */
__device__ __forceinline__ void count_one(unsigned *at) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(shared_address(at)) : "memory");
}

/* Finds the `drops` lowest pairs, ties to the later position: t.drop and t.kept, for who waits for the walkers. Returns
 * how many slots are freed. Keys are counted by bins, first around the last cut and then within the bin where the cut
 * falls, until it is the end of one. */
__device__ __forceinline__ int list_dropped(const lola_device_segment &g, const cluster_plan &plan,
                                            cluster_shared &shared, const tables &t, int count, int drops,
                                            const unsigned (&key)[OWN_ROWS]) {
  constexpr int WIDEST = 22;
  const int thread = own_thread(), warp = thread / 32, lane = thread % 32;
  unsigned low = 0, high = HIGHEST + 1;
  int below = 0, until = count + static_cast<int>(g.C); /* keys below `low`, fewer than drops; below `high`, no fewer */
  int shift = shared.shift;
  unsigned base = shared.cut - min(shared.cut, BINS / 2u << shift);
  int likely = shift;
  unsigned *zeros; /* bins that nobody has counted in yet */
#pragma unroll 1
  for (int turn = 0;; turn++) {
    unsigned *const bins = shared.bins[turn % 3];
    zeros = shared.bins[(turn + 1) % 3];
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) {
      if (no_rows(plan, i)) break;
      const unsigned bin = min(key[i] - base >> shift, static_cast<unsigned>(BINS));
      count_one(&bins[key[i] < base ? BEFORE : bin < BINS ? bin : AFTER]);
    }
    /* Who still reads bins, reads those of the last turn. */
    if (thread < ALL_BINS) zeros[thread] = 0;
    walkers_sync();
    const uint4 own = *reinterpret_cast<const uint4 *>(&bins[4 * lane]);
    const int start = static_cast<int>(bins[BEFORE]);
    const int counts[4] = {static_cast<int>(own.x), static_cast<int>(own.y), static_cast<int>(own.z),
                           static_cast<int>(own.w)};
    const int all = counts[0] + counts[1] + (counts[2] + counts[3]);
    int reach = all;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int other = __shfl_up_sync(ALL, reach, i);
      if (lane >= i) reach += other;
    }
    reach += start;
    /* The first of a lane's bins with which there are `drops` keys, or its last; of the first lane that has so many, or
     * the last one. */
    int bin = 0, begin = reach - all, end = begin + counts[0];
#pragma unroll
    for (int i = 1; i < 4; i++) {
      if (end < drops) bin = i, begin = end, end += counts[i];
    }
    const unsigned owners = __ballot_sync(ALL, reach >= drops);
    const int owner = owners ? __ffs(static_cast<int>(owners)) - 1 : 31;
    static_assert(ROWS_MOST < 1 << 11);
    const unsigned found_bin = __shfl_sync(ALL, static_cast<unsigned>(end << 11 | begin) << 2 | bin, owner);
    begin = static_cast<int>(found_bin >> 2 & 2047);
    end = static_cast<int>(found_bin >> 13);
    const bool within = start < drops && owners;
    if (within) {
      below = begin;
      until = end;
      low = base + ((4 * owner + (found_bin & 3)) << shift);
      high = min(high, low + (1u << shift));
    } else if (start < drops) {
      below = end;
      low = base + (static_cast<unsigned>(BINS) << shift);
    } else {
      until = start;
      high = base;
    }
    const bool found = until == drops || high - low <= 1;
    if (turn == 0 && !found) likely = within ? max(0, shift - 1) : min(WIDEST, shift + 1);
    if (found) break;
    base = low;
    shift = max(0, 32 - BIN_BITS - __clz(static_cast<int>(high - low - 1))); /* the bins hold them all */
  }
  unsigned latest = 0; /* of too many that have the key `low` */
  row_keys own_keys;
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) own_keys.own[i] = key[i];
  if (until != drops) latest = find_latest(g, plan, shared.unit, low, drops - below, own_keys, zeros);
  const unsigned bound = until == drops ? high : low;
  unsigned bits[OWN_ROWS];
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) {
    bits[i] = 0;
    if (no_rows(plan, i)) break;
    bits[i] = __ballot_sync(ALL, key[i] < bound || latest >> i & 1);
    if (lane == 0) shared.dropped[i * WARPS + warp] = bits[i];
  }
  walkers_sync();
  if (thread < ALL_BINS) shared.bins[0][thread] = 0; /* for the next ranking */
  if (thread == 0) {
    shared.cut = high;
    shared.shift = likely;
  }
  const int mine = 32 * lane < plan.rows ? __popc(shared.dropped[lane]) : 0, slots = plan.slots,
            C = static_cast<int>(g.C);
  const int freed = __reduce_add_sync(ALL, 32 * lane < slots ? mine : 0);
#pragma unroll
  for (int i = 0; i < OWN_ROWS; i++) {
    if (no_rows(plan, i)) break;
    const int word = i * WARPS + warp, row = 32 * word + lane, newcomer = row - slots;
    const int rank = __reduce_add_sync(ALL, lane < word ? mine : 0) + __popc(bits[i] & ((1u << lane) - 1));
    const bool dropped = bits[i] >> lane & 1;
    if (newcomer < 0 ? dropped : newcomer < C && !dropped) { /* t.kept lies behind t.drop */
      const int at = newcomer < 0 ? rank : plan.newcomers + newcomer - (rank - freed);
      t.drop[at] = static_cast<uint16_t>(newcomer < 0 ? row : newcomer);
    }
  }
  return freed;
}

/* --- swap --------------------------------------------------------------------------------------------------------- */

/* Newcomers that stay trade places with the pairs dropped from slots, both in order; then they take empty slots. 16
 * threads take a pair. */
template <typename T>
__device__ __forceinline__ void swap_pairs(const lola_device_segment &g, const cluster_plan &plan,
                                           const block_place &block, const tables &t, int count, int drops, int freed) {
  constexpr int LANES = 16, TOGETHER = WALKERS / LANES, AHEAD = 2;
  const int lane = own_thread() % LANES, stay = static_cast<int>(g.C) - (drops - freed);
  const int columns = g.Dv - block.column_block * COLUMNS;
#pragma unroll 1
  for (int first = own_thread() / LANES; first - own_thread() / LANES < stay; first += TOGETHER * AHEAD) {
    uint4 v[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int rank = first + i * TOGETHER;
      v[i] = make_uint4(0, 0, 0, 0);
      if (rank < stay && rank < freed && lane < T::value_pieces)
        v[i] = load_chunk<T::vector>(t.value[t.drop[rank]], 8 * lane, columns);
    }
    __syncwarp(); /* t.value is read before it is written */
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int rank = first + i * TOGETHER;
      if (rank >= stay) continue;
      const int newcomer = plan.slots + t.kept[rank], slot = rank < freed ? t.drop[rank] : count + rank - freed;
      if (lane < T::phi_pieces) {
        uint4 &a = piece_at(phi_at(plan, newcomer, lane)), &b = piece_at(phi_at(plan, slot, lane));
        const uint4 out = rank < freed ? b : make_uint4(0, 0, 0, 0);
        b = a;
        a = out;
      }
      if (lane == LANES - 1) {
        t.value[slot] = t.value[newcomer];
        t.code[slot] = t.code[newcomer];
        t.score[slot] = t.score[newcomer];
      }
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int rank = first + i * TOGETHER;
      if (rank < stay && lane < T::value_pieces) put_values<T>(plan, t.kept[rank], lane, v[i]);
    }
  }
}

/* While all fit: newcomers take the next slots, unranked. */
template <typename T>
__device__ __forceinline__ void enter_all(const lola_device_segment &g, const cluster_plan &plan, const scan_unit &unit,
                                          const tables &t, int count) {
  const int C = static_cast<int>(g.C);
  for (int i = own_thread(); unit.folds && i < C * T::phi_pieces; i += WALKERS)
    piece_at(phi_at(plan, count + i / T::phi_pieces, i % T::phi_pieces)) =
        piece_at(phi_at(plan, plan.slots + i / T::phi_pieces, i % T::phi_pieces));
  for (int j = own_thread(); j < C; j += WALKERS) {
    t.value[count + j] = t.value[plan.slots + j];
    t.code[count + j] = t.code[plan.slots + j];
    t.score[count + j] = NAN;
  }
}

/* --- fold --------------------------------------------------------------------------------------------------------- */

/* The newcomers' rows, which now hold what is dropped and zeros, into H and s, and the halves of s. */
template <typename T>
__device__ __forceinline__ void fold_newcomers(const lola_device_segment &g, const cluster_plan &plan, const tables &t,
                                               hidden_part *h) {
  const int warp = own_thread() / 32, lane = own_thread() % 32;
  const int panel = own_warpgroup();
  const uint32_t base = shared_address(wgmma_memory);
  /* s of 64 rows, by the last warpgroup: two features to a lane, rows by two lanes, fours in turn. */
  const auto fold_normalizer = [&](int first) {
    const int word = warp % 4 * 16 + lane % 16;
    if (warp % 4 * 16 >= 32 * T::panels) return;
    float x = 0, y = 0;
#pragma unroll 8
    for (int j = 0; j < TILE / 2; j++) {
      const int row = plan.slots + first + j / 4 * 8 + lane / 16 * 4 + j % 4;
      const float2 pair = lola_widen<__nv_bfloat16>(word_at(phi_at(plan, row, word / 4) + word % 4 * 4));
      x += pair.x;
      y += pair.y;
    }
    x += __shfl_xor_sync(ALL, x, 16);
    y += __shfl_xor_sync(ALL, y, 16);
    if (lane >= 16) return;
    x = t.normalizer[2 * word] += x;
    y = t.normalizer[2 * word + 1] += y;
    store_normalizer(plan, word, x, y);
  };
#pragma unroll 1
  for (int first = 0; first < plan.newcomers; first += TILE) {
    if (!has_state<T>()) {
      if (panel == WALKERS / 128 - 1) fold_normalizer(first);
      continue;
    }
    const uint32_t phi = wgmma_matrix(base + (panel * plan.rows + plan.slots + first) * ROW, plan.rows * ROW);
    const uint32_t values = wgmma_matrix(base + plan.values + first * ROW, plan.newcomers * ROW);
    float acc[8][4];
    pin(acc);
    wgmma_fence();
    if constexpr (is_half<T>) {
#pragma unroll
      for (int step = 0; step < 4; step++)
        multiply_fold(acc, phi + step * ROW, values + plan.newcomers * (ROW / 16) + step * ROW, step > 0);
    }
#pragma unroll
    for (int step = 0; step < 4; step++)
      multiply_fold(acc, phi + step * ROW, values + step * ROW, is_half<T> || step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(acc);
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) (*h)[i][e] += acc[i][e];
  }
}

/* --- a unit ------------------------------------------------------------------------------------------------------- */

/* The pairs that queries of the span's i-th chunk see: every block writes some. The helpers. */
__device__ __forceinline__ void record_sources(const lola_device_segment &g, const cluster_plan &plan,
                                               const block_place &block, const scan_unit &unit, const tables &t,
                                               int count, int64_t i) {
  const int64_t at = (unit.span.chunk + i) * g.S + unit.set;
  const int helper = own_thread() - WALKERS;
  for (int slot = block.rank * HELPERS + helper; slot < count; slot += plan.blocks * HELPERS)
    g.sources[at * g.L + slot] = t.code[slot];
  if (block.rank == 0 && helper == 0) g.source_count[at] = count;
}

__device__ __forceinline__ unit_chunks chunks_of(const lola_device_segment &g, const scan_unit &unit) {
  const int64_t first = unit.span.position / g.C, filled = (g.R + g.C - 1) / g.C; /* the first chunk to have leavers */
  unit_chunks chunks;
  chunks.count = static_cast<int>(unit.last - first + 1);
  chunks.updates =
      static_cast<int>(min(max(max(unit.span.updated + 1, filled) - first, INT64_C(0)), static_cast<int64_t>(INT_MAX)));
  chunks.end = static_cast<int>((first + 1) * g.C - unit.span.position);
  chunks.code = static_cast<int>(lola_device_leaving_first(g, first) - unit.base);
  chunks.leaving = max(chunks.count - chunks.updates, 0) * static_cast<int>(g.C);
  return chunks;
}

/* By all; HELPS tells who calls, so that the walkers' part is theirs alone: what the slots hold, whose phi are still
 * on their way when it returns. Of others' work only the spans are read before that has ended. */
template <typename T, bool HELPS>
__device__ __forceinline__ void begin_unit(const lola_device_segment &g, const cluster_plan &plan,
                                           const block_place &block, cluster_shared &shared, const tables &t,
                                           cluster_progress *progress, int row, int set, int record) {
  if (!HELPS && own_thread() == 0) {
    shared.unit = scan_unit_of(g, g.spans[row], row, set, own_head(plan, block));
    shared.chunks = chunks_of(g, shared.unit);
  }
  cluster_sync();
  lola_device_await_previous();
  if (record) lola_device_start_next();
  const scan_unit &unit = shared.unit;
  const int64_t group = static_cast<int64_t>(row) * g.S + set;
  const int count = static_cast<int>(g.sparse_count[group]);
  if (!HELPS && own_thread() == 0) shared.chunks.before = count;
  progress->count = uniform(count);
  progress->folded = g.folded[static_cast<int64_t>(row) * g.Hq + unit.head] != 0;
  progress->recall_first = progress->recall_end = 0;
  if (HELPS) return;
  const row_source phi = unit.sources[0][0];
  for (int i = own_thread(); unit.folds && i < count * T::phi_pieces; i += WALKERS)
    fetch_phi<T>(g, plan, phi.data + i / T::phi_pieces * phi.stride, i / T::phi_pieces, i % T::phi_pieces);
  for (int i = own_thread(); i < plan.rows; i += WALKERS) {
    const bool pair = i < count;
    const int code = pair && unit.resumes ? g.slot_source[group * g.L + i] : -i - 1;
    t.code[i] = code;
    t.value[i] = (pair ? row_of(g, unit, 1, code) : unit.sources[1][1].data) + block.column_block * COLUMNS * 2;
    t.score[i] = pair ? g.sparse_scores[group * g.L + i] : NAN;
  }
}

/* Writes down what the unit's slots hold, by threads 0 .. `threads` - 1: `count` pairs where it began with `before`,
 * while `left` pairs left the window. */
__device__ __forceinline__ void keep_pairs(const lola_device_segment &g, const scan_unit &unit, const tables &t,
                                           int64_t before, int count, int64_t left, int thread, int threads) {
  const int64_t group = static_cast<int64_t>(unit.row) * g.S + unit.set;
#pragma unroll 1
  for (int slot = thread; slot < count; slot += threads) {
    g.slot_source[group * g.L + slot] = t.code[slot];
    g.sparse_scores[group * g.L + slot] = t.score[slot];
    if (t.code[slot] >= 0) g.sparse_positions[group * g.L + slot] = unit.base + t.code[slot];
  }
  if (thread == 0) g.sparse_count[group] = count;
#pragma unroll 1
  for (int h = thread; h < g.rs; h += threads) /* what neither stayed nor entered was folded */
    g.folded[static_cast<int64_t>(unit.row) * g.Hq + unit.set * g.rs + h] += left - (count - before);
}

/* The head's phi of what the slots hold, for the next segment's scan; column blocks share the slots. The walkers. */
template <typename T>
__device__ __forceinline__ void keep_phi(const lola_device_segment &g, const cluster_plan &plan,
                                         const block_place &block, const scan_unit &unit, int count) {
  const int pieces = count * T::phi_pieces;
#pragma unroll 1
  for (int i = block.column_block * WALKERS + own_thread(); i < pieces; i += plan.column_blocks * WALKERS) {
    const int slot = i / T::phi_pieces, piece = i % T::phi_pieces;
    char *to = const_cast<char *>(unit.sources[0][0].data) + (static_cast<int64_t>(slot) * g.F + 8 * piece) * 2;
    const uint4 x = piece_at(phi_at(plan, slot, piece));
    if constexpr (T::vector) {
      if (8 * piece < g.F) *reinterpret_cast<uint4 *>(to) = x;
    } else {
      const unsigned words[4] = {x.x, x.y, x.z, x.w};
      for (int e = 0; e < 8 && 8 * piece + e < g.F; e++)
        reinterpret_cast<uint16_t *>(to)[e] = static_cast<uint16_t>(words[e / 2] >> 16 * (e % 2));
    }
  }
}

/* Writes the unit back. All blocks of the cluster have read what it begins with. */
template <typename T>
__device__ __forceinline__ void end_unit(const lola_device_segment &g, const cluster_plan &plan,
                                         const block_place &block, const cluster_shared &shared, const tables &t,
                                         const cluster_progress &progress, const hidden_part &h) {
  const scan_unit &unit = shared.unit;
  if (unit.folds) store_state<T>(g, block, unit, t, h);
  if (unit.folds && unit.continues) keep_phi<T>(g, plan, block, unit, progress.count);
  if (block.rank == 0)
    keep_pairs(g, unit, t, shared.chunks.before, progress.count, shared.chunks.leaving, own_thread(), WALKERS);
}

/* Of the unit's chunk i; all here is the same in all lanes, and known to be. */
__device__ __forceinline__ chunk_work work_of(const lola_device_segment &g, const cluster_progress &progress, int i,
                                              int updates, int count) {
  chunk_work work;
  work.updates = i >= updates && i < count;
  work.selects = work.updates && progress.count + static_cast<int>(g.C) > g.L;
  return work;
}

/* Whether tokens of the chunk before wait for phi(q)^T H. The helper. */
__device__ __forceinline__ bool recalls(const lola_device_segment &g, const cluster_progress &progress) {
  return uniform(progress.recall_first < progress.recall_end && progress.folded && g.mixing != LOLA_MIXING_CACHE_ONLY);
}

/* What the chunk has changed, when it is over. */
__device__ __forceinline__ void advance(const lola_device_segment &g, const chunk_work &work,
                                        cluster_progress *progress) {
  progress->folded |= work.selects;
  if (work.updates) progress->count = work.selects ? g.L : progress->count + static_cast<int>(g.C);
}

template <typename T>
__device__ __forceinline__ void help_unit(const lola_device_segment &g, const cluster_plan &plan,
                                          const block_place &block, cluster_shared &shared, const tables &t, int row,
                                          int set, int record) {
  cluster_progress progress = {};
  begin_unit<T, true>(g, plan, block, shared, t, &progress, row, set, record);
  const scan_unit &unit = shared.unit;
  const unit_chunks &chunks = shared.chunks;
  const auto code = [&](int i) { return chunks.code + i * static_cast<int>(g.C); };
  const auto work_at = [&](int i) { return work_of(g, progress, i, uniform(chunks.updates), uniform(chunks.count)); };
  newcomer_pieces<T> pieces;
  query_fragments<T> queries;
  chunk_work work = work_at(0);
  ask_newcomers<T>(g, block, unit, code(0), 0, work.updates, &pieces);
  cluster_sync();
#pragma unroll 1
  for (int i = 0;; i++) {
    if (i) named_barrier_sync(CHUNK, THREADS);
    if (work.updates) {
      put_newcomers<T>(g, plan, block, unit, t, code(i), 0, pieces);
#pragma unroll 1
      for (int more = TILE; more < g.C; more += TILE) {
        ask_newcomers<T>(g, block, unit, code(i), more, true, &pieces);
        put_newcomers<T>(g, plan, block, unit, t, code(i), more, pieces);
      }
      fence_async_proxy();
      barrier_arrive(shared_address(&shared.newcomers));
    }
    /* The chunk before still sees these tables and this state. */
    if (i && record) record_sources(g, plan, block, unit, t, progress.count, i - 1);
    if (recalls(g, progress))
      recall_tokens<T>(g, plan, block, unit, progress, &queries);
    else
      recall_nothing(g, block, unit, progress);
    if (i == uniform(chunks.count)) break;
    named_barrier_arrive(HALVES, THREADS);
    advance(g, work, &progress);
    progress.recall_first = progress.recall_end;
    if (record) progress.recall_end = min(chunks.end + i * static_cast<int>(g.C), unit.span.tokens);
    work = work_at(i + 1);
    queries = {};
    if (recalls(g, progress)) ask_queries<T>(g, unit, progress.recall_first, progress.recall_end, &queries);
    ask_newcomers<T>(g, block, unit, code(i + 1), 0, work.updates, &pieces);
  }
  cluster_sync();
  cluster_sync(); /* the tables are read to the end */
}

template <typename T>
__device__ __forceinline__ void walk_unit(const lola_device_segment &g, const cluster_plan &plan,
                                          const block_place &block, cluster_shared &shared, const tables &t,
                                          cluster_turns *turns, int row, int set, int record) {
  cluster_progress progress = {};
  hidden_part h = {};
  begin_unit<T, false>(g, plan, block, shared, t, &progress, row, set, record);
  const scan_unit &unit = shared.unit;
  /* Where nothing is folded, now or before, the state is not needed. */
  if (unit.folds || (record && progress.folded && g.mixing != LOLA_MIXING_CACHE_ONLY))
    load_state<T>(g, plan, block, unit, t, &h);
  cp_async_wait_all();
  fence_async_proxy();
  cluster_sync();
  const uint32_t full = shared_address(&shared.full), read = shared_address(&shared.read),
                 newcomers = shared_address(&shared.newcomers);
  const int updates = uniform(shared.chunks.updates), chunks = uniform(shared.chunks.count);
#pragma unroll 1
  for (int i = 0; i < chunks; i++) {
    const chunk_work work = work_of(g, progress, i, updates, chunks);
    const int count = progress.count, drops = count + static_cast<int>(g.C) - g.L;
    if (work.selects) {
      /* A block that has no others in its cluster needs no barriers of the cluster. */
      if (plan.blocks > 1 && turns->rankings) barrier_wait(read, (turns->rankings - 1) & 1);
      score_pairs<T>(g, plan, block, t, count, full, newcomers, turns->updates & 1);
      if (plan.blocks > 1)
        barrier_wait(full, turns->rankings & 1);
      else
        walkers_sync();
      turns->rankings++;
      unsigned key[OWN_ROWS];
      sum_parts(g, plan, t, count, key);
      if (plan.blocks > 1) tell_cluster(read, plan.blocks);
      const int freed = list_dropped(g, plan, shared, t, count, drops, key);
      named_barrier_sync(HALVES, THREADS); /* and what is dropped is listed */
      swap_pairs<T>(g, plan, block, t, count, drops, freed);
      fence_async_proxy();
      walkers_sync();
      fold_newcomers<T>(g, plan, t, &h);
      if (has_state<T>()) store_halves(plan, h);
    } else {
      if (work.updates) barrier_wait(newcomers, turns->updates & 1);
      named_barrier_sync(HALVES, THREADS);
      if (work.updates) enter_all<T>(g, plan, unit, t, count);
    }
    fence_async_proxy();
    walkers_sync();
    named_barrier_arrive(CHUNK, THREADS);
    turns->updates += work.updates;
    advance(g, work, &progress);
  }
  cluster_sync();
  end_unit<T>(g, plan, block, shared, t, progress, h);
  cluster_sync(); /* the tables are read to the end */
}

#endif

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool EMPTY = true; /* compiled for another device: the host sees it by the threads that it takes */
#else
constexpr bool EMPTY = false;
#endif

template <typename T>
__global__ void __launch_bounds__(EMPTY ? 32 : THREADS, 1)
    scan_wgmma_kernel(const __grid_constant__ lola_device_segment g, const __grid_constant__ cluster_plan plan,
                      int record) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (!record) lola_device_start_next();
  __shared__ cluster_shared shared;
  const tables t = tables_of(plan);
  const int group = blockIdx.x / plan.blocks;
  if (!record && g.spans_are_old && group && group >= decoding_units<THREADS>(g)) return; /* makes room for others */
  block_place block;
  block.rank = blockIdx.x % plan.blocks;
  block.column_block = block.rank % plan.column_blocks;
  /* Rows past the last newcomer, columns past F and the last rows of the halves are zero and stay so. */
  for (int at = own_thread() * 16; at < plan.parts; at += THREADS * 16) piece_at(at) = make_uint4(0, 0, 0, 0);
  if (own_thread() < ALL_BINS) shared.bins[0][own_thread()] = 0;
  if (own_thread() == 0) {
    shared.cut = 0;
    shared.shift = 16;
    barrier_init(shared_address(&shared.full), 1);
    barrier_init(shared_address(&shared.read), plan.blocks * WARPS);
    barrier_init(shared_address(&shared.newcomers), HELPERS);
    fence_barrier_init();
  }
  if (record && g.spans_are_old)
    __threadfence(); /* as lola_device_begin has it */
  else
    lola_device_await_previous();
  cluster_arrive(); /* all blocks are there before one writes into another */
  cluster_wait();
  if (own_warpgroup() == WALKERS / 128) {
    for_each_unit<ROWS_AT_ONCE>(g, plan.groups, group, record, shared.rows, shared.row_count, cluster_sync,
                                [&](int row, int set) { help_unit<T>(g, plan, block, shared, t, row, set, record); });
  } else {
    cluster_turns turns = {};
    for_each_unit<ROWS_AT_ONCE>(
        g, plan.groups, group, record, shared.rows, shared.row_count, cluster_sync,
        [&](int row, int set) { walk_unit<T>(g, plan, block, shared, t, &turns, row, set, record); });
  }
  lola_device_await_previous(); /* also if it has no unit */
#endif
}

/* --- the host's side ---------------------------------------------------------------------------------------------- */

/* What `of` makes of the wgmma_kind for a type and so many panels. */
template <bool VECTOR, class Of> auto of_kind(lola_dtype dtype, int panels, Of of) {
  const bool half = dtype == LOLA_FLOAT16;
  if (panels == 1) return half ? of(wgmma_kind<__half, 1, VECTOR>()) : of(wgmma_kind<__nv_bfloat16, 1, VECTOR>());
  return half ? of(wgmma_kind<__half, 2, VECTOR>()) : of(wgmma_kind<__nv_bfloat16, 2, VECTOR>());
}

/* The kernel that reads rows 16 bytes at a time, or not. */
inline const void *kernel_of(lola_dtype dtype, int panels, bool vector) {
  const auto address = [](auto kind) { return reinterpret_cast<const void *>(scan_wgmma_kernel<decltype(kind)>); };
  return vector ? of_kind<true>(dtype, panels, address) : of_kind<false>(dtype, panels, address);
}

/* Launches the clusters of a plan. */
inline cudaError_t launch_clusters(const void *kernel, const cluster_plan &plan, int64_t shared_bytes,
                                   cudaStream_t stream, void **arguments) {
  cudaLaunchAttribute attributes[2] = {};
  const dim3 blocks(static_cast<unsigned>(plan.groups * plan.blocks));
  const cudaLaunchConfig_t config =
      lola_cuda_cluster_launch(kernel, blocks, plan.blocks, THREADS, shared_bytes, stream, attributes);
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
  (void)cudaGetLastError();
  return error;
}

inline cudaError_t launch(const lola_device_segment &g, const cluster_plan &plan, int record, bool vector,
                          cudaStream_t stream) {
  void *arguments[] = {const_cast<lola_device_segment *>(&g), const_cast<cluster_plan *>(&plan), &record};
  return launch_clusters(kernel_of(g.dtype, plan.panels, vector), plan, plan.shared_bytes, stream, arguments);
}

} // namespace wgmma_scan
} // namespace

#endif
