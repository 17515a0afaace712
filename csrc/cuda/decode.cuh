/* What the parts of the decoding kernel share: the plan of one launch, and small pieces of device code. */
#ifndef LOLA_CUDA_DECODE_CUH
#define LOLA_CUDA_DECODE_CUH

#include "decode_rows.cuh"
#include "instructions.cuh"
#include "segment.cuh"

namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int PIECE = 16; /* bytes of a copy */
constexpr float LOG2E = 0x1.715476p+0f;
constexpr unsigned ALL = 0xffffffffu;

/* --- the plan --------------------------------------------------------------------------------------- */

/* Tiles and partials are fixed by the cache's sizes, so a row's sums are the same in any batch. A partial is `columns`
 * sums and 4 more floats; those of a (row, KV head) lie by query head, then: window tiles, sparse tiles, parts of the
 * state. */
struct decode_plan {
  int pipeline;                       /* units of decode_pipeline.cuh */
  int matrix;                         /* otherwise: tiles on the matrix units */
  int lanes;                          /* otherwise: threads that share one pair's key and value: 8, 16 or 32 */
  int pairs;                          /* of a tile */
  int key_pieces, value_pieces;       /* of one key, of one value, the last filled up with zeros */
  int columns;                        /* Dv rounded up to whole pieces */
  int64_t window_tiles, sparse_tiles; /* per KV head; per set */
  int sets;                           /* per KV head */
  int state_parts;                    /* of a query head's state */
  int64_t state_items, sparse_items;  /* of a (row, KV head) */
  int64_t items;                      /* of a (row, KV head), in all: states, sparse tiles, window tiles */
  int64_t slots;                      /* partials per query head */
  int64_t head_floats, group_floats;  /* of the partials of a query head, of a (row, KV head) */
  int64_t blocks;                     /* of the main kernel */
  divisor by_items, by_sparse_items, by_window_tiles, by_state_items, by_kv_heads, by_state_parts, by_sparse_tiles,
      by_rs, by_pairs;
  row_plan row;
  int state_vector, state_shift;   /* floats of H a thread copies at once; threads that share a row of H, base 2 */
  int state_stages;                /* stages of H when it is even (decode_state.cuh), otherwise 0 */
  int cache_aligned, call_aligned; /* rows of the cache, of the call's k and v, begin at multiples of 16 bytes */
  int query_aligned;               /* rows of q do, and q has the cache's type */
  int prefetch;                    /* the grid is small: ask for everything at once, before it is known to be needed */
  unsigned query_blocks;           /* of the queries' kernel */
  int small;                       /* a unit a block, and no kernel for queries */
  int gathers; /* it reads pairs that enter the sparse cache from the window ring, and commits them to their slots */
  int values_at, merge_at, sums_at, weight_at, queries_at; /* shared memory of a tile, offsets in bytes */
  int newest_at;
  int reduce_at, phi_at; /* of a hidden state */
  int64_t shared_bytes;
};

/* --- copies ------------------------------------------------------------------------------------------ */

template <int BYTES> __device__ __forceinline__ void copy_async(void *to, const void *from) {
  static_assert(BYTES == 16 || BYTES == 4);
  const unsigned at = shared_address(to);
  if constexpr (BYTES == 16)
    cp_async(at, from);
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
}

/* 16 bytes, zeros when they are not `there`. */
__device__ __forceinline__ void copy_or_zero(void *to, const void *from, bool there) {
  const unsigned at = shared_address(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(there ? 16 : 0) : "memory");
}

/* What a step reads once gives way in L2 first: instructions, parameters and partials stay. */
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

/* copy_async and copy_or_zero of 16 bytes that are read once. */
__device__ __forceinline__ void stream_async(void *to, const void *from, uint64_t policy) {
  const unsigned at = shared_address(to);
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void stream_or_zero(void *to, const void *from, bool there, uint64_t policy) {
  const unsigned at = shared_address(to);
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(at), "l"(from),
               "r"(there ? 16 : 0), "l"(policy)
               : "memory");
}

/* Asks for memory to be brought into L2; bytes and address multiples of 16. */
__device__ __forceinline__ void prefetch(const void *from, int64_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (bytes > 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)),
                 "r"(static_cast<unsigned>(bytes))
                 : "memory");
#endif
}

/* The same of memory that is read once. */
__device__ __forceinline__ void prefetch_once(const void *from, int64_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (bytes > 0)
    asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(__cvta_generic_to_global(from)),
                 "r"(static_cast<unsigned>(bytes)), "l"(read_once())
                 : "memory");
#endif
}

/* Adds one to a counter, ordered after all that the block wrote before its last barrier and before all that it reads
 * after its next one; returns what it was. */
__device__ __forceinline__ unsigned arrive(unsigned *counter) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
}

/* --- numbers ----------------------------------------------------------------------------------------- */

/* N floats that lie together in shared memory, at a multiple of their size. */
template <int N> __device__ __forceinline__ void load_floats(const float *from, float *x) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 v = *reinterpret_cast<const float4 *>(from + i);
      x[i] = v.x;
      x[i + 1] = v.y;
      x[i + 2] = v.z;
      x[i + 3] = v.w;
    }
  } else if constexpr (N == 2) {
    const float2 v = *reinterpret_cast<const float2 *>(from);
    x[0] = v.x;
    x[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = from[i];
  }
}

template <int N> __device__ __forceinline__ void store_floats(float *to, const float *x) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      *reinterpret_cast<float4 *>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = x[i];
  }
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, offset));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
  return x;
}

/* The sum of `count` numbers that lie `step` apart, in order. */
__device__ __forceinline__ float add_groups(const float *from, int count, int step) {
  float total = 0;
#pragma unroll 4
  for (int j = 0; j < count; j++) total += from[j * step];
  return total;
}

/* exp2(a - b) where a <= b; 0 for a = -inf, even beside b = -inf. */
__device__ __forceinline__ float weight_below(float a, float b) { return exp2f(a - fmaxf(b, -3e38f)); }

/* Eight 16-bit numbers. */
__device__ __forceinline__ void unpack(uint4 v, float (&x)[8], const __half *) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
    x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
  }
}

__device__ __forceinline__ void unpack(uint4 v, float (&x)[8], const __nv_bfloat16 *) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

/* --- a tile of pairs --------------------------------------------------------------------------------- */

struct tile_source {
  const char *keys, *values; /* of slot 0 */
  int64_t slot, slots;       /* of the first pair; after slot slots - 1 comes slot 0 */
  int count;                 /* pairs */
  int newest;                /* the pair that is the call's token, at key and value, or -1 */
  const char *key, *value;
};

__device__ __forceinline__ int64_t slot_of(const tile_source &from, int pair) {
  const int64_t slot = from.slot + pair;
  return slot < from.slots ? slot : slot - from.slots;
}

/* Where a tile's partials of query heads 0, 1, ... of its set go. */
struct tile_target {
  float *partial;
  int64_t step; /* floats from head to head */
};

/* How the sums of pairs join those of pairs before them: both are brought to the larger maximum. Every multiplication
 * is rounded as it stands here, so that whoever joins the same sums gets the same bits. */
struct joining {
  float high, before, share;

  __device__ __forceinline__ joining(float high_before, float high_next)
      : high(fmaxf(high_before, high_next)), before(weight_below(high_before, high)),
        share(weight_below(high_next, high)) {}

  __device__ __forceinline__ float operator()(float x_before, float x_next) const {
    return fmaf(share, x_next, __fmul_rn(before, x_before));
  }
};

/* What the first `warps` of a block left for `heads` heads, in order of warp: maximum and sum of head h at
 * sums[(w * pitch + h) * 2], o at merge[w * warp_step + h * head_step]. */
__device__ __forceinline__ void merge_warps(const decode_plan &plan, const float *merge, int warp_step, int head_step,
                                            const float *sums, int pitch, int warps, int first_head, int heads,
                                            const tile_target &to) {
  const int quads = plan.columns / 4;
  int h = 0, quad = threadIdx.x;
#pragma unroll 1
  while (quad >= quads) {
    quad -= quads;
    h++;
  }
#pragma unroll 1
  while (h < heads) {
    float high = -INFINITY, total = 0, o[4] = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      if (w >= warps) break;
      const float *const own = sums + (w * pitch + h) * 2;
      const joining join(high, own[0]);
      float x[4];
      load_floats<4>(merge + w * warp_step + h * head_step + quad * 4, x);
      high = join.high;
      total = join(total, own[1]);
#pragma unroll
      for (int e = 0; e < 4; e++) o[e] = join(o[e], x[e]);
    }
    float *partial = to.partial + (first_head + h) * to.step;
    store_floats<4>(partial + quad * 4, o);
    if (quad == 0) *reinterpret_cast<float2 *>(partial + plan.columns) = make_float2(high, total);
    quad += THREADS;
    while (quad >= quads) {
      quad -= quads;
      h++;
    }
  }
}

} // namespace

#endif
