/* The scan of scan.cu on Hopper: a cluster of rs * ceil(Dv / 64) blocks walks a unit, block (h, j) with head h's phi of
 * all its pairs in shared memory and columns 64 j .. 64 j + 63 of H and s beside them. For self_recall scores of 16-bit
 * caches with F <= 128, where that fits (make_cluster_plan in scan.cu).
 *
 * Rows of phi are the L slots and then the C pairs that leave next ("newcomers"), in tiles of 64. Two warpgroups walk the
 * chunks:
 *   score   phi times [H high, H low, s high, s low], 136 columns of wgmma, tiles in turn; values come from global memory
 *           (L2) meanwhile. Each block writes its part of every pair's error into all blocks of the cluster.
 *   select  every block adds the parts, column blocks in order, then heads, and finds the cut by itself
 *   swap    a newcomer that stays trades rows with the pair that was dropped from its slot, so that the newcomers' rows
 *           then hold just the pairs to be folded
 *   fold    Phi^T V of those rows, summed for 64 pairs and then added once to H, which lives in registers in float32;
 *           its halves go back to shared memory
 * and a third, the helper, brings the next newcomers, writes down what queries see, and multiplies phi(q)^T H.
 * Order of sums: scores as they lie in the fragments, then over column blocks, then over heads; folds by newcomers' row.
 * Neither depends on how a call was cut, on the batch, or on the grid.
 *
 * Tiles lie as attend_instructions.cuh says: panels of 64 columns, rows of 128 bytes, swizzled. Columns of H are dealt
 * out within 32 as lola_column_row says, so that a lane's eight results are neighbours: a value's 16 bytes. */
#ifndef LOLA_CUDA_SCAN_WGMMA_CUH
#define LOLA_CUDA_SCAN_WGMMA_CUH

#include "cuda/attend_instructions.cuh"
#include "cuda/chain.cuh"
#include "cuda/scan_block.cuh"

namespace {
namespace wgmma_scan {

constexpr int WALKERS = 256, WARPS = WALKERS / 32, HELPERS = 128, THREADS = WALKERS + HELPERS;
constexpr int LAUNCH_REGISTERS = 65536 / THREADS / 8 * 8, WALKER_REGISTERS = 176, HELPER_REGISTERS = 152;
static_assert(WALKERS * WALKER_REGISTERS + HELPERS * HELPER_REGISTERS <= THREADS * LAUNCH_REGISTERS);
constexpr int COLUMNS = 64;             /* of H, to a block */
constexpr int TILE = 64;                /* rows */
constexpr int ROW = 128;                /* bytes of a row in a panel */
constexpr int HALF_ROWS = 2 * COLUMNS + 8, NORMALIZER_ROW = 2 * COLUMNS; /* of the right-hand matrix; the last 6 are zero */
constexpr int PRODUCTS = HALF_ROWS / 8;
constexpr int ROWS_MOST = 1024; /* of phi: a lane of a warp knows a word of their bits */
constexpr int BINS = 256, LISTED = 32;
constexpr int NEWCOMER_VALUES = 4; /* 16-byte pieces to a helper's registers: 64 newcomers */
constexpr int BLOCKS_MOST = 16;
constexpr unsigned UNUSED = UINT_MAX, HIGHEST = 0x7fffffffu; /* keys: no pair; NaN, above all others */

/* What is the same on every call for one cache and device, so that the order of sums is too. */
struct cluster_plan {
  int panels;                                 /* of phi */
  int slots, newcomers, rows;                 /* whole tiles, and both together */
  int blocks, column_blocks;                  /* of a cluster */
  int groups;                                 /* clusters */
  int vector_recalled;                        /* 16-byte stores are possible */
  int halves, values, parts, tables, shared; /* offsets into shared memory; phi comes first */
  int64_t shared_bytes;
};

/* By row of phi, unless said otherwise. */
struct tables {
  const char **value;  /* the block's columns of the pair's values in global memory; NULL: no pair */
  int *code;
  float *score;        /* at the last ranking; NaN if never ranked */
  float *normalizer;   /* (64 panels,): s */
  unsigned *histogram; /* (BINS,) */
  unsigned *dropped;   /* a bit for each */
  uint16_t *drop;      /* (newcomers,): dropped slots, ascending */
  uint16_t *kept;      /* (newcomers,): newcomers that stay, ascending */
};

__host__ __device__ inline int64_t table_bytes(int64_t rows, int64_t newcomers, int64_t panels) {
  return rows * (8 + 4 + 4) + panels * 64 * 4 + BINS * 4 + rows / 8 + newcomers * 4;
}

struct cluster_shared {
  uint64_t full, read; /* barriers: parts are there, and were read by the cluster's warps */
  scan_unit unit;
  int rows[THREADS]; /* cache rows with work, of the THREADS being looked at */
  int row_count[THREADS / 32];
  unsigned low[WARPS], high[WARPS];
  unsigned listed, list_key[LISTED];
  int list_row[LISTED];
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

/* The same in all lanes, known to be so. What decides whether and how often wgmma runs must be known to be the same for
 * a whole warp, or products are put one after the other. */
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(ALL, x, 0); }

/* As lola_thread, so that little is kept in registers from chunk to chunk. */
__device__ __forceinline__ int own_thread() { return static_cast<int>(lola_thread()); }

__device__ __forceinline__ int own_warpgroup() { return uniform(own_thread() / 128); }

/* Stores into the shared memory of the cluster's block `rank`, at this block's address, and counts the bytes at a barrier
 * there. The store is on its way when this returns; who waits for the barrier sees it. */
__device__ __forceinline__ void send(uint32_t address, uint32_t barrier, int rank, float x) {
  asm volatile("{\n.reg .b32 there, full;\nmapa.shared::cluster.u32 there, %0, %2;\n"
               "mapa.shared::cluster.u32 full, %1, %2;\n"
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

/* Each warp of walkers tells every block of the cluster, at its barrier at this block's address, that it has read what it
 * wanted to. */
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
#define LOLA_REGISTERS_68                                                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "    \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "     \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67}, "
#define LOLA_OPERANDS_68(c)                                                                                            \
  LOLA_ROW_16(c, 0), LOLA_ROW_16(c, 4), LOLA_ROW_16(c, 8), LOLA_ROW_16(c, 12), LOLA_ROW_4(c, 16)

/* C (64 x 136) = or += A (64 x 16) B (16 x 136), bfloat16; panels of A and B run along the sum. */
__device__ __forceinline__ void multiply_rows(float (&c)[PRODUCTS][4], uint32_t a, uint32_t b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %70, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n136k16.f32.bf16.bf16 " LOLA_REGISTERS_68 "%68, %69, p, 1, 1, 0, 0;\n}"
               : LOLA_OPERANDS_68(c)
               : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)), "r"(accumulate)
               : "memory");
}

/* The same with A in registers. */
__device__ __forceinline__ void multiply_queries(float (&c)[PRODUCTS][4], const unsigned (&a)[4], uint32_t b,
                                                 int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %73, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n136k16.f32.bf16.bf16 " LOLA_REGISTERS_68
               "{%68, %69, %70, %71}, %72, p, 1, 1, 0;\n}"
               : LOLA_OPERANDS_68(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wgmma_descriptor(b)), "r"(accumulate)
               : "memory");
}

/* C (64 x 64) = or += A (64 x 16) B (16 x 64), bfloat16; rows of both tiles run along the sum. */
__device__ __forceinline__ void multiply_fold(float (&c)[8][4], uint32_t a, uint32_t b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
               "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 1, 1;\n}"
               : LOLA_ROW_16(c, 0), LOLA_ROW_16(c, 4)
               : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)), "r"(accumulate)
               : "memory");
}

#undef LOLA_OPERANDS_68
#undef LOLA_REGISTERS_68
#undef LOLA_ROW_16
#undef LOLA_ROW_4

/* Four 8 x 8 matrices from fragments, transposed: lanes 8i .. 8i+7 give where columns of matrix i go. */
__device__ __forceinline__ void store_transposed(uint32_t address, const unsigned (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

/* --- who waits for whom in a block -------------------------------------------------------------------------------- */

/* In each chunk: the helper arrives at NEWCOMERS once they are in place (if the chunk has an update) and at HALVES once
 * it needs neither the old halves nor the old tables; walkers wait there before they read the ones and change the others,
 * and arrive at CHUNK when all is ready for the next, where the helper waits. */
enum { NEWCOMERS = 1, WALK = 2, CHUNK = 3, HALVES = 4 };
__device__ __forceinline__ void walkers_sync() { named_barrier_sync(WALK, WALKERS); }

/* --- places in shared memory -------------------------------------------------------------------------------------- */

__device__ __forceinline__ tables tables_of(const cluster_plan &plan) {
  tables t;
  t.value = reinterpret_cast<const char **>(wgmma_memory + plan.tables);
  t.code = reinterpret_cast<int *>(t.value + plan.rows);
  t.score = reinterpret_cast<float *>(t.code + plan.rows);
  t.normalizer = t.score + plan.rows;
  t.histogram = reinterpret_cast<unsigned *>(t.normalizer + 64 * plan.panels);
  t.dropped = t.histogram + BINS;
  t.drop = reinterpret_cast<uint16_t *>(t.dropped + plan.rows / 32);
  t.kept = t.drop + plan.newcomers;
  return t;
}

__device__ __forceinline__ cluster_shared &shared_of(const cluster_plan &plan) {
  return *reinterpret_cast<cluster_shared *>(wgmma_memory + plan.shared);
}

__device__ __forceinline__ uint4 &piece_at(int offset) { return *reinterpret_cast<uint4 *>(wgmma_memory + offset); }
__device__ __forceinline__ unsigned &word_at(int offset) {
  return *reinterpret_cast<unsigned *>(wgmma_memory + offset);
}

/* Offset of a 16-byte piece of a row of phi. */
__device__ __forceinline__ int phi_at(const cluster_plan &plan, int row, int piece) {
  return static_cast<int>(tile_offset(plan.rows, row, piece));
}

/* Offset of a 16-byte piece of row n of the right-hand matrix. */
__device__ __forceinline__ int half_at(const cluster_plan &plan, int n, int piece) {
  return plan.halves + static_cast<int>(tile_offset(HALF_ROWS, n, piece));
}

/* A newcomer's values, 8 columns, in the order that columns are dealt out; float16 as two halves. */
template <typename T>
__device__ __forceinline__ void put_values(const cluster_plan &plan, int newcomer, int piece, const uint4 &x) {
  const unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int w = 0; w < 4; w++) {
    const int at =
        plan.values + static_cast<int>(tile_offset(0, newcomer, 4 * (piece >> 2) + w)) + 4 * (piece & 3);
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
  int rank, head, column_block;
};

/* What changes from chunk to chunk; every thread of the cluster keeps the same. */
struct cluster_progress {
  int64_t folded;
  int count;                    /* slots in use */
  int recall_first, recall_end; /* tokens of the span whose phi(q)^T H is still to be written */
};

/* What there is to do when a chunk begins. */
struct chunk_work {
  bool updates, selects; /* pairs leave the window; some of them or of the slots are dropped */
  bool recalls;          /* tokens of the chunk before wait for phi(q)^T H */
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

/* A pair's phi into a row, by threads that take a piece each; finish with cp_async_wait. */
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

/* Brings the pairs that leave when `chunk` begins into the newcomers' rows. The helpers. */
template <typename T>
__device__ __forceinline__ void fetch_newcomers(const lola_device_segment &g, const cluster_plan &plan,
                                                const block_place &block, const scan_unit &unit, const tables &t,
                                                int64_t chunk) {
  const int helper = own_thread() - WALKERS;
  const int C = static_cast<int>(g.C), code = static_cast<int>(lola_device_leaving_first(g, chunk) - unit.base);
  const int offset = block.column_block * COLUMNS * 2, columns = g.Dv - block.column_block * COLUMNS;
  for (int j = helper; j < C; j += HELPERS) {
    t.code[plan.slots + j] = code + j;
    t.value[plan.slots + j] = row_of(g, unit, 1, code + j) + offset;
  }
  if (unit.folds) {
#pragma unroll 1
    for (int i = helper; i < C * T::phi_pieces; i += HELPERS)
      fetch_phi<T>(g, plan, row_of(g, unit, 0, code + i / T::phi_pieces), plan.slots + i / T::phi_pieces,
                   i % T::phi_pieces);
#pragma unroll 1
    for (int first = helper; first < C * T::value_pieces; first += NEWCOMER_VALUES * HELPERS) {
      uint4 values[NEWCOMER_VALUES];
#pragma unroll
      for (int i = 0; i < NEWCOMER_VALUES; i++) {
        const int at = first + i * HELPERS, j = at / T::value_pieces;
        if (j < C)
          values[i] = load_chunk<T::vector>(row_of(g, unit, 1, code + j) + offset, at % T::value_pieces * 8, columns);
      }
#pragma unroll
      for (int i = 0; i < NEWCOMER_VALUES; i++) {
        const int at = first + i * HELPERS, j = at / T::value_pieces;
        if (j < C) put_values<T>(plan, j, at % T::value_pieces, values[i]);
      }
    }
  }
  cp_async_wait<0>();
  fence_async_proxy();
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

template <typename T> __device__ __forceinline__ bool has_state() { return T::panels == 2 || own_warpgroup() == 0; }

/* The halves of H, by the warps that keep it. */
__device__ __forceinline__ void store_halves(const cluster_plan &plan, const hidden_part &h) {
  const int lane = own_thread() % 32, warp = own_thread() / 32;
  const int row = lane % 8 + lane / 16 * 8, piece = 2 * warp + lane / 8 % 2; /* of columns 16 i .. 16 i + 15 */
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    unsigned hi[4], lo[4];
#pragma unroll
    for (int m = 0; m < 4; m++)
      lola_split_pair(h[i + m / 2][m % 2 * 2], h[i + m / 2][m % 2 * 2 + 1], &hi[m], &lo[m]);
    store_transposed(shared_address(wgmma_memory + half_at(plan, 8 * i + row, piece)), hi);
    store_transposed(shared_address(wgmma_memory + half_at(plan, COLUMNS + 8 * i + row, piece)), lo);
  }
}

/* The halves of s at features 2 i and 2 i + 1. */
__device__ __forceinline__ void store_normalizer(const cluster_plan &plan, int i, float x, float y) {
  unsigned hi, lo;
  lola_split_pair(x, y, &hi, &lo);
  word_at(half_at(plan, NORMALIZER_ROW, i / 4) + i % 4 * 4) = hi;
  word_at(half_at(plan, NORMALIZER_ROW + 1, i / 4) + i % 4 * 4) = lo;
}

template <typename T>
__device__ void load_state(const lola_device_segment &g, const cluster_plan &plan, const block_place &block,
                           const scan_unit &unit, const tables &t, hidden_part *h) {
  const int64_t at = static_cast<int64_t>(unit.row) * g.Hq + unit.head;
  const float *H = g.hidden + at * g.F * g.Dv, *s = g.normalizer + at * g.F;
  const int c = own_thread() % 4, first = block.column_block * COLUMNS;
  if (has_state<T>()) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int row = hidden_row(half), column = first + column_of(i / 4, c) + i % 4 * 2 + e;
          (*h)[i][2 * half + e] =
              row < g.F && column < g.Dv ? H[static_cast<int64_t>(row) * g.Dv + column] : 0;
        }
    store_halves(plan, *h);
  }
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
  const int c = own_thread() % 4, first = block.column_block * COLUMNS;
  if (has_state<T>())
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int row = hidden_row(half), column = first + column_of(i / 4, c) + i % 4 * 2 + e;
          if (row < g.F && column < g.Dv) H[static_cast<int64_t>(row) * g.Dv + column] = h[i][2 * half + e];
        }
  for (int f = own_thread(); !block.column_block && f < g.F; f += WALKERS) s[f] = t.normalizer[f];
}

/* --- score -------------------------------------------------------------------------------------------------------- */

/* The values of a thread's two rows of a tile: 16 columns of each. */
struct row_values {
  uint4 v[2][2];
};

/* The thread's row of a tile, the other is 8 rows on. */
__device__ __forceinline__ int tile_row(int first_row) {
  return first_row + own_thread() % 128 / 32 * 16 + own_thread() % 32 / 4;
}

template <typename T>
__device__ __forceinline__ void load_values(const lola_device_segment &g, const block_place &block, const tables &t,
                                            int first_row, row_values *values) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const char *value = t.value[tile_row(first_row) + 8 * half];
#pragma unroll
    for (int q = 0; q < 2; q++)
      values->v[half][q] = load_chunk<T::vector>(value, column_of(q, own_thread() % 4),
                                                 value ? g.Dv - block.column_block * COLUMNS : 0);
  }
}

/* The errors of a tile's rows over this block's columns, from the products, into every block's parts. */
template <typename T>
__device__ __forceinline__ void write_parts(const cluster_plan &plan, const block_place &block, int first_row,
                                            const float (&acc)[PRODUCTS][4], const row_values &values, uint32_t full) {
  const int c = own_thread() % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint4 &a = values.v[half][0], &b = values.v[half][1];
    const unsigned pairs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    const float z = quad_normalizer(acc[PRODUCTS - 1], half);
    const auto error = [&](float up) {
      const float inverse = z != 0 ? lola_reciprocal(z * up) : 0;
      float sum[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float2 value = lola_widen<typename T::element>(pairs[i]);
        const float x = (acc[i][2 * half] + acc[i + 8][2 * half]) * up;
        const float y = (acc[i][2 * half + 1] + acc[i + 8][2 * half + 1]) * up;
        const float dx = fmaf(x, inverse, -value.x), dy = fmaf(y, inverse, -value.y);
        sum[0] = fmaf(dx, dx, sum[0]);
        sum[1] = fmaf(dy, dy, sum[1]);
      }
      return sum[0] + sum[1];
    };
    /* As recall_scale, where the way up is hardly ever taken. */
    const bool tiny = z != 0 && z < 1e-30f;
    float part = __any_sync(ALL, tiny) ? error(tiny ? 0x1p64f : 1.0f) : error(1.0f);
    part += __shfl_xor_sync(ALL, part, 1);
    part += __shfl_xor_sync(ALL, part, 2);
    const int at = plan.parts + (block.rank * plan.rows + tile_row(first_row) + 8 * half) * 4;
    if (plan.blocks == 1) {
      if (c == 0) word_at(at) = __float_as_uint(part);
      continue;
    }
#pragma unroll 1
    for (int rank = c; rank < plan.blocks; rank += 4) send(shared_address(wgmma_memory) + at, full, rank, part);
  }
}

/* All pairs, the warpgroups' tiles in turn. The newcomers come last, they may still be on their way. */
template <typename T>
__device__ __forceinline__ void score_pairs(const lola_device_segment &g, const cluster_plan &plan,
                                            const block_place &block, const tables &t, int count, uint32_t full) {
  const int slot_tiles = uniform((count + TILE - 1) / TILE), tiles = slot_tiles + plan.newcomers / TILE;
  const uint32_t halves = wgmma_matrix(shared_address(wgmma_memory) + plan.halves, 16);
  const auto first_row = [&](int tile) {
    return tile < slot_tiles ? tile * TILE : plan.slots + (tile - slot_tiles) * TILE;
  };
  if (plan.blocks > 1 && own_thread() == 0) expect_bytes(full, plan.blocks * tiles * TILE * 4);
  int tile = own_warpgroup();
  bool met = false;
  row_values next = {};
  if (tile < tiles) {
    if (tile >= slot_tiles) named_barrier_sync(NEWCOMERS, THREADS);
    met = tile >= slot_tiles;
    load_values<T>(g, block, t, first_row(tile), &next);
  }
#pragma unroll 1
  for (; tile < tiles; tile += 2) {
    const uint32_t phi = wgmma_matrix(shared_address(wgmma_memory) + first_row(tile) * ROW, 16);
    float acc[PRODUCTS][4];
    pin(acc);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4 * T::panels; step++)
      multiply_rows(acc, phi + step / 4 * plan.rows * (ROW / 16) + step % 4 * 2,
                    halves + step / 4 * HALF_ROWS * (ROW / 16) + step % 4 * 2, step > 0);
    wgmma_commit();
    /* The next tile's values are on their way while this one's errors are computed. */
    const row_values values = next;
    if (tile + 2 < tiles) {
      if (tile + 2 >= slot_tiles && !met) {
        named_barrier_sync(NEWCOMERS, THREADS);
        met = true;
      }
      load_values<T>(g, block, t, first_row(tile + 2), &next);
    }
    wgmma_wait<0>();
    pin(acc);
    write_parts<T>(plan, block, first_row(tile), acc, values, full);
  }
  if (!met) named_barrier_arrive(NEWCOMERS, THREADS);
}

/* --- phi(q)^T H --------------------------------------------------------------------------------------------------- */

/* Two features at an even place of a row of n. */
template <bool VECTOR> __device__ __forceinline__ unsigned load_word(const char *row, int k, int n) {
  if constexpr (VECTOR) return k < n ? __ldg(reinterpret_cast<const unsigned *>(row + 2 * k)) : 0;
  const uint16_t *x = reinterpret_cast<const uint16_t *>(row) + k;
  return (k < n ? __ldg(x) : 0u) | (k + 1 < n ? static_cast<unsigned>(__ldg(x + 1)) << 16 : 0u);
}

/* Of the pending tokens. The helpers. */
template <typename T>
__device__ __forceinline__ void recall_tokens(const lola_device_segment &g, const cluster_plan &plan,
                                              const block_place &block, const scan_unit &unit,
                                              const cluster_progress &progress) {
  const int lane = own_thread() % 32, c = lane % 4, end = uniform(progress.recall_end);
  const uint32_t halves = wgmma_matrix(shared_address(wgmma_memory) + plan.halves, 16);
#pragma unroll 1
  for (int first = uniform(progress.recall_first); first < end; first += TILE) {
    const int own = tile_row(first);
    const char *rows[2];
#pragma unroll
    for (int half = 0; half < 2; half++)
      rows[half] = static_cast<const char *>(g.query_phi) +
                   ((static_cast<int64_t>(unit.span.token) + min(own + 8 * half, end - 1)) * g.Hq + unit.head) * g.F * 2;
    unsigned phi[4 * T::panels][4];
#pragma unroll
    for (int step = 0; step < 4 * T::panels; step++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        phi[step][e] = load_word<T::vector>(rows[e % 2], 16 * step + 8 * (e / 2) + 2 * c, g.F);
    float acc[PRODUCTS][4];
    pin(acc);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4 * T::panels; step++)
      multiply_queries(acc, phi[step], halves + step / 4 * HALF_ROWS * (ROW / 16) + step % 4 * 2, step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(acc);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float z = quad_normalizer(acc[PRODUCTS - 1], half);
      if (own + 8 * half >= end) continue;
      const int64_t index = (static_cast<int64_t>(unit.span.token) + own + 8 * half) * g.Hq + unit.head;
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const int column = block.column_block * COLUMNS + column_of(q, c);
        float *to = g.recalled + index * g.Dv + column;
        float x[8];
#pragma unroll
        for (int e = 0; e < 8; e++)
          x[e] = acc[4 * q + e / 2][2 * half + e % 2] + acc[4 * q + e / 2 + 8][2 * half + e % 2];
#pragma unroll
        for (int e = 0; e < 8; e += 4)
          if (plan.vector_recalled) {
            if (column + e < g.Dv)
              *reinterpret_cast<float4 *>(to + e) = make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]);
          } else {
#pragma unroll
            for (int i = e; i < e + 4; i++)
              if (column + i < g.Dv) to[i] = x[i];
          }
      }
      if (!block.column_block && c == 0) g.z[index] = z;
    }
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

__device__ __forceinline__ bool is_pair(const lola_device_segment &g, const cluster_plan &plan, int count, int row) {
  return row < plan.slots ? row < count : row - plan.slots < g.C;
}

__device__ __forceinline__ int64_t position_of(const lola_device_segment &g, const scan_unit &unit, const tables &t,
                                               int row) {
  const int code = t.code[row];
  if (code >= 0) return unit.base + code;
  return g.sparse_positions[(static_cast<int64_t>(unit.row) * g.S + unit.set) * g.L - code - 1];
}

/* Adds the parts of the cluster's blocks: column blocks in order, then heads in order. As a key: scores are sums of
 * squares, so that their bits order as they do. */
__device__ __forceinline__ unsigned sum_parts(const cluster_plan &plan, int row) {
  constexpr int AHEAD = 8;
  const float *parts = reinterpret_cast<const float *>(wgmma_memory + plan.parts) + row;
  float total = 0, head = 0;
  int column_block = 0;
#pragma unroll 1
  for (int at = 0; at < plan.blocks; at += AHEAD) {
    float part[AHEAD];
#pragma unroll
    for (int e = 0; e < AHEAD; e++) part[e] = at + e < plan.blocks ? parts[(at + e) * plan.rows] : 0;
#pragma unroll
    for (int e = 0; e < AHEAD; e++) {
      if (at + e >= plan.blocks) break;
      head += part[e];
      if (++column_block == plan.column_blocks) {
        total += head;
        head = 0;
        column_block = 0;
      }
    }
  }
  return total == total ? __float_as_uint(total) : HIGHEST;
}

/* The bin in which the cut falls that `drops` keys are below or in: the bin, keys in bins before it, keys in it. For
 * each warp by itself. */
struct cut_bin {
  int bin, before, inside;
};

__device__ __forceinline__ cut_bin find_bin(const unsigned *histogram, int drops) {
  const int lane = own_thread() % 32;
  const uint4 a = reinterpret_cast<const uint4 *>(histogram)[lane];
  const uint4 b = reinterpret_cast<const uint4 *>(histogram)[lane + 32];
  const int counts[2][4] = {{static_cast<int>(a.x), static_cast<int>(a.y), static_cast<int>(a.z), static_cast<int>(a.w)},
                            {static_cast<int>(b.x), static_cast<int>(b.y), static_cast<int>(b.z), static_cast<int>(b.w)}};
  int own[2], until[2];
#pragma unroll
  for (int i = 0; i < 2; i++) own[i] = until[i] = counts[i][0] + counts[i][1] + counts[i][2] + counts[i][3];
#pragma unroll
  for (int i = 1; i < 32; i *= 2)
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int below = __shfl_up_sync(ALL, until[k], i);
      if (lane >= i) until[k] += below;
    }
  until[1] += __shfl_sync(ALL, until[0], 31);
  const unsigned first = __ballot_sync(ALL, until[0] >= drops), second = __ballot_sync(ALL, until[1] >= drops);
  const int k = first ? 0 : 1, owner = __ffs(static_cast<int>(first ? first : second)) - 1;
  cut_bin cut = {128 * k + 4 * lane, until[k] - own[k], 0};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (cut.inside) continue;
    if (drops <= cut.before + counts[k][i]) {
      cut.inside = counts[k][i];
    } else {
      cut.before += counts[k][i];
      cut.bin++;
    }
  }
  cut.bin = __shfl_sync(ALL, cut.bin, owner);
  cut.before = __shfl_sync(ALL, cut.before, owner);
  cut.inside = __shfl_sync(ALL, cut.inside, owner);
  return cut;
}

/* The first position at or after which exactly `ties` of the pairs with the key `tied` lie. For each warp by itself. */
__device__ int64_t find_last_positions(const lola_device_segment &g, const cluster_plan &plan, const scan_unit &unit,
                                       const tables &t, int count, unsigned tied, int ties) {
  const int lane = own_thread() % 32;
  const auto of = [&](int row) -> int64_t { /* -1: not among them */
    if (!is_pair(g, plan, count, row) || __float_as_uint(t.score[row]) != tied) return -1;
    return position_of(g, unit, t, row);
  };
  int64_t low = INT64_MAX, high = 0;
  for (int row = lane; row < plan.rows; row += 32) {
    const int64_t position = of(row);
    if (position < 0) continue;
    low = position < low ? position : low;
    high = position > high ? position : high;
  }
  for (int i = 16; i; i /= 2) {
    const int64_t other_low = __shfl_xor_sync(ALL, low, i), other_high = __shfl_xor_sync(ALL, high, i);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  while (low < high) { /* at least `ties` lie at or after `low`, fewer after `high` */
    const int64_t middle = low + (high - low + 1) / 2;
    unsigned after = 0;
    for (int row = lane; row < plan.rows; row += 32) after += of(row) >= middle;
    after = __reduce_add_sync(ALL, after);
    if (after >= static_cast<unsigned>(ties))
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

/* Finds the `drops` lowest pairs, ties to the later position: t.drop and t.kept. Returns how many slots are freed. The
 * walkers wait for the result. Keys lie in t.score. */
__device__ __forceinline__ int select_pairs(const lola_device_segment &g, const cluster_plan &plan,
                                            cluster_shared &shared, const tables &t, int count, int drops) {
  const int warp = own_thread() / 32, lane = own_thread() % 32;
  const auto key_of = [&](int row) { return __float_as_uint(t.score[row]); };
  unsigned low = UNUSED, high = 0;
#pragma unroll 1
  for (int row = own_thread(); row < plan.rows; row += WALKERS) {
    unsigned key = UNUSED;
    if (is_pair(g, plan, count, row)) {
      key = sum_parts(plan, row);
      low = min(low, key);
      high = max(high, key);
    }
    t.score[row] = __uint_as_float(key);
  }
  if (plan.blocks > 1) tell_cluster(shared_address(&shared.read), plan.blocks);
  low = __reduce_min_sync(ALL, low);
  high = __reduce_max_sync(ALL, high);
  if (lane == 0) {
    shared.low[warp] = low;
    shared.high[warp] = high;
  }
  t.histogram[own_thread()] = 0;
  if (own_thread() == 0) shared.listed = 0;
  walkers_sync();
  low = __reduce_min_sync(ALL, shared.low[lane % WARPS]);
  high = __reduce_max_sync(ALL, shared.high[lane % WARPS]);
  int left = drops, listed = 0; /* keys below `low` are dropped, of those up to `high` so many, others stay */
  unsigned limit = low;         /* in the end: keys below it are dropped, and of the listed ones so many */
  int64_t last = INT64_MAX;     /* and those of the key `limit` at or after this position */
#pragma unroll 1
  for (;;) {
    const int shift = max(0, 24 - __clz(static_cast<int>(high - low))); /* 256 bins hold them all */
#pragma unroll 1
    for (int row = own_thread(); row < plan.rows; row += WALKERS) {
      const unsigned key = key_of(row);
      if (key >= low && key <= high) atomicAdd(&t.histogram[(key - low) >> shift], 1u);
    }
    walkers_sync();
    const cut_bin cut = find_bin(t.histogram, left);
    low += static_cast<unsigned>(cut.bin) << shift;
    high = min(high, low + ((1u << shift) - 1));
    left -= cut.before;
    if (left == cut.inside) {
      limit = high + 1;
      break;
    }
    limit = low;
    if (cut.inside <= LISTED) {
      listed = cut.inside;
      break;
    }
    if (shift == 0) { /* too many of one key for the list */
      last = find_last_positions(g, plan, shared.unit, t, count, low, left);
      break;
    }
    walkers_sync(); /* the histogram is read */
    t.histogram[own_thread()] = 0;
    walkers_sync();
  }
#pragma unroll 1
  for (int word = warp; word < plan.rows / 32; word += WARPS) {
    const int row = 32 * word + lane;
    const unsigned key = key_of(row);
    bool dropped = key < limit;
    if (last != INT64_MAX && key == limit) dropped = position_of(g, shared.unit, t, row) >= last;
    const unsigned bits = __ballot_sync(ALL, dropped);
    if (lane == 0) t.dropped[word] = bits;
    if (listed && key >= low && key <= high) {
      const unsigned place = atomicAdd(&shared.listed, 1u);
      shared.list_key[place] = key;
      shared.list_row[place] = row;
    }
  }
  walkers_sync();
  /* Every warp by itself: lane l knows word l, and one of the list. */
  unsigned own = lane < plan.rows / 32 ? t.dropped[lane] : 0;
  if (listed) {
    const unsigned key = lane < listed ? shared.list_key[lane] : UNUSED;
    const int row = lane < listed ? shared.list_row[lane] : 0;
    int before = 0;
#pragma unroll 1
    for (int i = 0; i < listed; i++) {
      const unsigned other = shared.list_key[i];
      bool first = other < key;
      if (other == key && i != lane)
        first = position_of(g, shared.unit, t, shared.list_row[i]) > position_of(g, shared.unit, t, row);
      before += first;
    }
    unsigned chosen = __ballot_sync(ALL, lane < listed && before < left);
#pragma unroll 1
    while (chosen) {
      const int one = __shfl_sync(ALL, row, __ffs(static_cast<int>(chosen)) - 1);
      if (lane == one / 32) own |= 1u << (one % 32);
      chosen &= chosen - 1;
    }
  }
  int until = __popc(own);
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int below = __shfl_up_sync(ALL, until, i);
    if (lane >= i) until += below;
  }
  until -= __popc(own); /* dropped before the word */
  const int freed = __shfl_sync(ALL, until, plan.slots / 32);
#pragma unroll 1
  for (int word = warp; word < plan.rows / 32; word += WARPS) {
    const int row = 32 * word + lane;
    const unsigned bits = __shfl_sync(ALL, own, word);
    const int rank = __shfl_sync(ALL, until, word) + __popc(bits & ((1u << lane) - 1));
    const bool dropped = bits >> lane & 1;
    if (row < plan.slots) {
      if (dropped) t.drop[rank] = static_cast<uint16_t>(row);
    } else if (row - plan.slots < g.C && !dropped) {
      t.kept[row - plan.slots - (rank - freed)] = static_cast<uint16_t>(row - plan.slots);
    }
  }
  walkers_sync();
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
__device__ __forceinline__ void enter_all(const lola_device_segment &g, const cluster_plan &plan,
                                          const scan_unit &unit, const tables &t, int count) {
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

/* The newcomers' rows, which now hold what is dropped and zeros, into H and s, and the halves of both. */
template <typename T>
__device__ __forceinline__ void fold_newcomers(const lola_device_segment &g, const cluster_plan &plan, const tables &t,
                                               hidden_part *h) {
  const int warp = own_thread() / 32, lane = own_thread() % 32;
  const int panel = own_warpgroup();
  const uint32_t base = shared_address(wgmma_memory);
  /* s of 64 rows: two features to a lane, rows by four lanes in turn. */
  const auto fold_normalizer = [&](int first) {
    const int word = 8 * warp + lane % 8;
    if (word >= 32 * T::panels) return;
    float x = 0, y = 0;
#pragma unroll 4
    for (int j = lane / 8; j < TILE; j += 4) {
      const float2 pair =
          lola_widen<__nv_bfloat16>(word_at(phi_at(plan, plan.slots + first + j, word / 4) + word % 4 * 4));
      x += pair.x;
      y += pair.y;
    }
#pragma unroll
    for (int i = 8; i < 32; i *= 2) {
      x += __shfl_xor_sync(ALL, x, i);
      y += __shfl_xor_sync(ALL, y, i);
    }
    if (lane >= 8) return;
    x = t.normalizer[2 * word] += x;
    y = t.normalizer[2 * word + 1] += y;
    store_normalizer(plan, word, x, y);
  };
#pragma unroll 1
  for (int first = 0; first < plan.newcomers; first += TILE) {
    if (!has_state<T>()) {
      fold_normalizer(first);
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
    fold_normalizer(first);
    wgmma_wait<0>();
    pin(acc);
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) (*h)[i][e] += acc[i][e];
  }
  if (has_state<T>()) store_halves(plan, *h);
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

template <typename T>
__device__ __forceinline__ void begin_unit(const lola_device_segment &g, const cluster_plan &plan,
                                           const block_place &block, cluster_shared &shared, const tables &t,
                                           cluster_progress *progress, int row, int set) {
  const int64_t group = static_cast<int64_t>(row) * g.S + set;
  const int count = static_cast<int>(g.sparse_count[group]);
  if (own_thread() == 0) shared.unit = scan_unit_of(g, row, set, block.head, count);
  __syncthreads();
  const scan_unit &unit = shared.unit;
  progress->count = count;
  progress->folded = g.folded[static_cast<int64_t>(row) * g.Hq + unit.head];
  progress->recall_first = progress->recall_end = 0;
  for (int i = own_thread(); i < plan.rows; i += THREADS) {
    const bool pair = i < count;
    t.code[i] = -i - 1;
    t.value[i] = pair ? row_of(g, unit, 1, -i - 1) + block.column_block * COLUMNS * 2 : nullptr;
    t.score[i] = pair ? g.sparse_scores[group * g.L + i] : NAN;
  }
  for (int i = own_thread(); unit.folds && i < count * T::phi_pieces; i += THREADS)
    fetch_phi<T>(g, plan, row_of(g, unit, 0, -(i / T::phi_pieces) - 1), i / T::phi_pieces, i % T::phi_pieces);
  cp_async_wait<0>();
  fence_async_proxy();
}

/* Writes the unit back. All blocks of the cluster have read what it begins with. */
template <typename T>
__device__ __forceinline__ void end_unit(const lola_device_segment &g, const block_place &block, const scan_unit &unit,
                                         const tables &t, const cluster_progress &progress, const hidden_part &h,
                                         bool folded) {
  const int64_t group = static_cast<int64_t>(unit.row) * g.S + unit.set;
  const int count = progress.count;
  const lola_device_leaving leaving = lola_device_segment_leaving(g, unit.span);
  if (folded) store_state<T>(g, block, unit, t, h);
  if (block.rank == 0) {
    for (int slot = own_thread(); slot < count; slot += WALKERS) {
      g.slot_source[group * g.L + slot] = t.code[slot];
      g.sparse_scores[group * g.L + slot] = t.score[slot];
      if (t.code[slot] >= 0) g.sparse_positions[group * g.L + slot] = unit.base + t.code[slot];
    }
    const int64_t left = leaving.end > leaving.first ? leaving.end - leaving.first : 0;
    const int64_t entered = count - g.sparse_count[group]; /* the rest of the pairs that left were folded */
    walkers_sync();
    if (own_thread() == 0) g.sparse_count[group] = count;
    for (int h = own_thread(); h < g.rs; h += WALKERS)
      g.folded[static_cast<int64_t>(unit.row) * g.Hq + unit.set * g.rs + h] += left - entered;
  }
}

__device__ __forceinline__ chunk_work work_of(const lola_device_segment &g, const scan_unit &unit,
                                              const cluster_progress &progress, int64_t chunk) {
  chunk_work work;
  work.updates = uniform(chunk <= unit.last && chunk > unit.span.updated && lola_device_leaving_first(g, chunk) >= 0);
  work.selects = work.updates && uniform(progress.count + g.C > g.L);
  work.recalls = uniform(progress.recall_first < progress.recall_end && progress.folded &&
                         g.mixing != LOLA_MIXING_CACHE_ONLY);
  return work;
}

/* What the chunk has changed, when it is over. */
__device__ __forceinline__ void advance(const lola_device_segment &g, const scan_unit &unit, const chunk_work &work,
                                        int64_t chunk, int record, cluster_progress *progress) {
  if (work.selects) progress->folded += progress->count + g.C - g.L;
  if (work.updates) progress->count = work.selects ? g.L : progress->count + static_cast<int>(g.C);
  progress->recall_first = progress->recall_end;
  const int64_t end = (chunk + 1) * g.C - unit.span.position;
  if (record) progress->recall_end = end < unit.span.tokens ? static_cast<int>(end) : unit.span.tokens;
}

template <typename T>
__device__ __forceinline__ void help_unit(const lola_device_segment &g, const cluster_plan &plan,
                                          const block_place &block, cluster_shared &shared, const tables &t, int row,
                                          int set, int record) {
  cluster_progress progress = {};
  begin_unit<T>(g, plan, block, shared, t, &progress, row, set);
  __syncthreads();
  const scan_unit &unit = shared.unit;
  const int64_t first = unit.span.position / g.C, last = unit.last;
#pragma unroll 1
  for (int64_t chunk = first;; chunk++) {
    const chunk_work work = work_of(g, unit, progress, chunk);
    if (chunk > first) {
      named_barrier_sync(CHUNK, THREADS);
      if (record) record_sources(g, plan, block, unit, t, progress.count, chunk - 1 - first);
    }
    if (work.updates) {
      fetch_newcomers<T>(g, plan, block, unit, t, chunk);
      named_barrier_arrive(NEWCOMERS, THREADS);
    }
    /* The chunk before still sees this state. */
    if (work.recalls)
      recall_tokens<T>(g, plan, block, unit, progress);
    else
      recall_nothing(g, block, unit, progress);
    if (chunk > last) break;
    named_barrier_arrive(HALVES, THREADS);
    advance(g, unit, work, chunk, record, &progress);
  }
  cluster_arrive();
  cluster_wait();
  __syncthreads(); /* the tables are read to the end */
}

template <typename T>
__device__ __forceinline__ void walk_unit(const lola_device_segment &g, const cluster_plan &plan,
                                          const block_place &block, cluster_shared &shared, const tables &t,
                                          unsigned *rounds, int row, int set, int record) {
  cluster_progress progress = {};
  hidden_part h = {};
  begin_unit<T>(g, plan, block, shared, t, &progress, row, set);
  const scan_unit &unit = shared.unit;
  /* Where nothing is folded, now or before, the state is not needed. */
  if (unit.folds || (record && progress.folded && g.mixing != LOLA_MIXING_CACHE_ONLY))
    load_state<T>(g, plan, block, unit, t, &h);
  fence_async_proxy();
  __syncthreads();
  const int64_t folded_before = progress.folded, last = unit.last;
  const uint32_t full = shared_address(&shared.full), read = shared_address(&shared.read);
#pragma unroll 1
  for (int64_t chunk = unit.span.position / g.C; chunk <= last; chunk++) {
    const chunk_work work = work_of(g, unit, progress, chunk);
    const int count = progress.count, drops = count + static_cast<int>(g.C) - g.L;
    if (work.selects) {
      /* A block that has no others in its cluster needs no barriers of the cluster. */
      if (plan.blocks > 1 && *rounds) barrier_wait(read, *rounds - 1 & 1);
      score_pairs<T>(g, plan, block, t, count, full);
      if (plan.blocks > 1)
        barrier_wait(full, *rounds & 1);
      else
        walkers_sync();
      ++*rounds;
      const int freed = select_pairs(g, plan, shared, t, count, drops);
      named_barrier_sync(HALVES, THREADS);
      swap_pairs<T>(g, plan, block, t, count, drops, freed);
      fence_async_proxy();
      walkers_sync();
      fold_newcomers<T>(g, plan, t, &h);
    } else {
      if (work.updates) named_barrier_sync(NEWCOMERS, THREADS);
      named_barrier_sync(HALVES, THREADS);
      if (work.updates) enter_all<T>(g, plan, unit, t, count);
    }
    fence_async_proxy();
    walkers_sync();
    named_barrier_arrive(CHUNK, THREADS);
    advance(g, unit, work, chunk, record, &progress);
  }
  cluster_arrive();
  cluster_wait();
  end_unit<T>(g, block, unit, t, progress, h, progress.folded != folded_before);
  __syncthreads(); /* the tables are read to the end */
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
  lola_device_start_next();
  cluster_shared &shared = shared_of(plan);
  const tables t = tables_of(plan);
  const int group = blockIdx.x / plan.blocks;
  if (g.spans_are_old && group && group >= decoding_units<THREADS>(g)) return; /* makes room for who comes next */
  block_place block;
  block.rank = blockIdx.x % plan.blocks;
  block.head = block.rank / plan.column_blocks;
  block.column_block = block.rank % plan.column_blocks;
  /* Rows past the last newcomer, columns past F and the last rows of the halves are zero and stay so. */
  for (int at = own_thread() * 16; at < plan.parts; at += THREADS * 16) piece_at(at) = make_uint4(0, 0, 0, 0);
  if (own_thread() == 0) {
    barrier_init(shared_address(&shared.full), 1);
    barrier_init(shared_address(&shared.read), plan.blocks * WARPS);
    fence_barrier_init();
  }
  lola_device_await_previous();
  cluster_arrive(); /* all blocks are there before one writes into another */
  cluster_wait();
  if (own_warpgroup() == WALKERS / 128) {
    give_registers<HELPER_REGISTERS>();
    for_each_unit<THREADS>(g, plan.groups, group, record, shared.rows, shared.row_count,
                           [&](int row, int set) { help_unit<T>(g, plan, block, shared, t, row, set, record); });
  } else {
    take_registers<WALKER_REGISTERS>();
    unsigned rounds = 0; /* of the cluster's barriers */
    for_each_unit<THREADS>(g, plan.groups, group, record, shared.rows, shared.row_count, [&](int row, int set) {
      walk_unit<T>(g, plan, block, shared, t, &rounds, row, set, record);
    });
  }
#endif
}

/* --- the host's side ---------------------------------------------------------------------------------------------- */

template <bool VECTOR> const void *kernel_of(lola_dtype dtype, int panels) {
  const auto address = [](auto kernel) { return reinterpret_cast<const void *>(kernel); };
  const bool half = dtype == LOLA_FLOAT16;
  if (panels == 1)
    return half ? address(scan_wgmma_kernel<wgmma_kind<__half, 1, VECTOR>>)
                : address(scan_wgmma_kernel<wgmma_kind<__nv_bfloat16, 1, VECTOR>>);
  return half ? address(scan_wgmma_kernel<wgmma_kind<__half, 2, VECTOR>>)
              : address(scan_wgmma_kernel<wgmma_kind<__nv_bfloat16, 2, VECTOR>>);
}

/* The kernel that reads rows 16 bytes at a time, or not. */
inline const void *kernel_of(lola_dtype dtype, int panels, bool vector) {
  return vector ? kernel_of<true>(dtype, panels) : kernel_of<false>(dtype, panels);
}

/* `attributes` must live as long as the configuration. */
inline cudaLaunchConfig_t launch_config(const void *kernel, int blocks, int cluster, int64_t shared_bytes,
                                        cudaStream_t stream, cudaLaunchAttribute (&attributes)[2]) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1 + lola_cuda_chain_attribute(kernel, &attributes[1]);
  return config;
}

inline cudaError_t launch(const lola_device_segment &g, const cluster_plan &plan, int record, bool vector,
                          cudaStream_t stream) {
  const void *kernel = kernel_of(g.dtype, plan.panels, vector);
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config =
      launch_config(kernel, plan.groups * plan.blocks, plan.blocks, plan.shared_bytes, stream, attributes);
  void *arguments[] = {const_cast<lola_device_segment *>(&g), const_cast<cluster_plan *>(&plan), &record};
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
  (void)cudaGetLastError();
  return error;
}

} // namespace wgmma_scan
} // namespace

#endif
