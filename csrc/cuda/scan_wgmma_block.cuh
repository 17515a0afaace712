/* What the parts of scan_wgmma.cuh share: a cluster's plan, its shared memory, instructions that nobody else uses. */
#ifndef LOLA_CUDA_SCAN_WGMMA_BLOCK_CUH
#define LOLA_CUDA_SCAN_WGMMA_BLOCK_CUH

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

#endif

} // namespace wgmma_scan
} // namespace

#endif
