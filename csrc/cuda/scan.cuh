/* What features.cu and scan.cu share: which pairs leave the window during a segment, float32 matrices split into two
 * bfloat16 halves, and tiles of 16 x 8 products on the matrix units (mma.sync, sm_80 and later).
 *
 * A matrix that stands on the right of a product, (K, N), lies in shared memory transposed, a row of K bfloat16 per
 * column n, in chunks of 8 elements (16 bytes) that are swapped by `lola_swizzle(n)` within groups of 8 chunks, so that
 * neither reading nor writing it meets bank conflicts. Rows are padded to 64 elements with zeros.
 * The order of k within a product is free as long as both sides agree: lane c = lane % 4 of a quad takes elements
 * 8c .. 8c+7 of every 32, one 16-byte load, which feed two products of 16 each. The order of columns is free too:
 * 32 columns are dealt out so that a lane's results are 8 neighbours (lola_column_row). */
#ifndef LOLA_CUDA_SCAN_CUH
#define LOLA_CUDA_SCAN_CUH

#include "cuda/instructions.cuh"
#include "cuda/segment.cuh"

/* --- the schedule, as core/schedule.h has it ---------------------------------------------------------------------- */

/* Positions first .. end-1 leave the window during the segment; none when end <= first. */
typedef struct lola_device_leaving {
  int64_t first, end;
} lola_device_leaving;

static __device__ inline int64_t lola_device_leaving_first(const lola_device_segment &g, int64_t chunk) {
  return chunk * g.C - g.W - g.C;
}

static __device__ inline lola_device_leaving lola_device_segment_leaving(const lola_device_segment &g,
                                                                         const lola_device_span &span) {
  lola_device_leaving leaving = {0, 0};
  if (span.tokens <= 0) return leaving;
  int64_t last = (span.position + span.tokens - 1) / g.C;
  leaving.first = lola_device_leaving_first(g, span.updated + 1);
  if (leaving.first < 0) leaving.first = 0;
  leaving.end = lola_device_leaving_first(g, last) + g.C;
  return leaving;
}

/* The same of the segment and those of its call that come after it. */
static __device__ inline lola_device_leaving lola_device_call_leaving(const lola_device_segment &g,
                                                                      const lola_device_span &span) {
  return lola_device_segment_leaving(g, lola_device_call_span(span));
}

/* Whether the cache row has folded pairs in the end: a set keeps L of the pairs that have left the window. What the
 * cache counts says the same, but not beside a scan, which changes it. */
static __device__ inline bool lola_device_has_folded(const lola_device_segment &g, const lola_device_leaving &leaving) {
  return leaving.end > g.L;
}

/* Whether it folds any meanwhile. */
static __device__ inline bool lola_device_folds(const lola_device_segment &g, const lola_device_leaving &leaving) {
  return leaving.end > leaving.first && lola_device_has_folded(g, leaving);
}

/* --- matrix units ------------------------------------------------------------------------------------------------- */

/* c += a b: a (16, 16), b (16, 8) bfloat16, c (16, 8) float32, in the fragments of mma.m16n8k16. */
static __device__ inline void lola_mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                       unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* A lane's part of the left-hand matrix for 32 k, in the order in which two products of 16 read it. */
typedef struct lola_fragment {
  unsigned a[2][4];
} lola_fragment;

/* From the lane's chunks of rows g and g + 8. A product wants its four words side by side, a load leaves the chunk's
 * so; the compiler would rather copy them before every product than once. A permutation of bytes that it cannot know to
 * be the identity keeps it from that: `identity` is LOLA_IDENTITY, from the kernel's parameters. */
enum { LOLA_IDENTITY = 0x3210 };
static __device__ inline lola_fragment lola_fragment_of(const uint4 &low, const uint4 &high, unsigned identity) {
  lola_fragment f;
  f.a[0][0] = __byte_perm(low.x, 0, identity);
  f.a[0][1] = __byte_perm(high.x, 0, identity);
  f.a[0][2] = __byte_perm(low.y, 0, identity);
  f.a[0][3] = __byte_perm(high.y, 0, identity);
  f.a[1][0] = __byte_perm(low.z, 0, identity);
  f.a[1][1] = __byte_perm(high.z, 0, identity);
  f.a[1][2] = __byte_perm(low.w, 0, identity);
  f.a[1][3] = __byte_perm(high.w, 0, identity);
  return f;
}

/* c += a b over 32 k; b is the lane's chunk of column g. */
static __device__ inline void lola_mma_chunk(float (&c)[4], const lola_fragment &f, const uint4 &b) {
  lola_mma(c, f.a[0][0], f.a[0][1], f.a[0][2], f.a[0][3], b.x, b.y);
  lola_mma(c, f.a[1][0], f.a[1][1], f.a[1][2], f.a[1][3], b.z, b.w);
}

/* --- small things ------------------------------------------------------------------------------------------------- */

/* The thread's index, read anew. What is computed from it is not known to be the same in every turn of a loop: the
 * compiler would otherwise compute it once and keep all of it in registers, which a long loop does not have. */
static __device__ inline unsigned lola_thread() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

/* 1 / x to a unit in the last place, for x from 2^-126 to 2^126. */
static __device__ inline float lola_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(y, fmaf(-x, y, 1.0f), y);
}

/* --- layouts in shared memory ------------------------------------------------------------------------------------- */

static __host__ __device__ inline int lola_padded(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

static __device__ inline int lola_swizzle(int n) { return (n & 1) << 2 | ((n >> 1 ^ n >> 3) & 3); }

/* Index of element k of row n in a swizzled matrix with rows of `pitch` (a multiple of 64) elements. */
static __device__ inline int lola_swizzled(int n, int k, int pitch) {
  return n * pitch + ((k >> 3 ^ lola_swizzle(n)) << 3) + (k & 7);
}

/* Row of the right-hand matrix that holds column m: lane c of a quad then owns columns 32 q + 8 c .. + 7, and element
 * e of its results for product 4 q + i is column 32 q + 8 c + 2 i + e. */
static __device__ inline int lola_column_row(int m) {
  return (m & ~31) + 8 * ((m & 7) >> 1) + 2 * ((m & 31) >> 3) + (m & 1);
}

static __device__ inline unsigned lola_pack(__nv_bfloat16 low, __nv_bfloat16 high) {
  return static_cast<unsigned>(__bfloat16_as_ushort(low)) | static_cast<unsigned>(__bfloat16_as_ushort(high)) << 16;
}

/* x = hi + lo up to 2^-17 of it. */
static __device__ inline void lola_split(float x, __nv_bfloat16 *hi, __nv_bfloat16 *lo) {
  *hi = __float2bfloat16_rn(x);
  *lo = __float2bfloat16_rn(x - __bfloat162float(*hi));
}

static __device__ inline void lola_split_pair(float x, float y, unsigned *hi, unsigned *lo) {
  *hi = pack<__nv_bfloat16>(x, y);
  *lo = pack<__nv_bfloat16>(x - __uint_as_float(*hi << 16), y - __uint_as_float(*hi & 0xffff0000u));
}

/* Two 16-bit elements of T as float32. */
template <typename T> static __device__ inline float2 lola_widen(unsigned pair);
template <> __device__ inline float2 lola_widen<__nv_bfloat16>(unsigned pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <> __device__ inline float2 lola_widen<__half>(unsigned pair) {
  __half2 h;
  memcpy(&h, &pair, sizeof h);
  return __half22float2(h);
}

#endif
