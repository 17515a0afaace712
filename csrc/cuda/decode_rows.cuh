/* What the kernel of a large decoding step's queries finds out about its rows, for those behind it, and what the
 * kernels of a step signal each other. They run beside one another: all blocks of one run before the next one starts,
 * so each waits for what it needs and for no more. Only the last one, the merge, awaits them all. */
#ifndef LOLA_CUDA_DECODE_ROWS_CUH
#define LOLA_CUDA_DECODE_ROWS_CUH

#include <cstdint>

/* A row as the step begins. */
struct decode_row {
  int64_t batch, first, position, chunk; /* of its token */
  int row;                               /* -1: idle */
  int ring_slot;                         /* of its token */
  int window_pairs, window_slot;         /* with the newest; ring slot of the first */
  int updated;                           /* pairs leave its window in this step */
  int unused;
};

/* On lines of their own. Zero before a cache's first step. */
struct decode_signals {
  alignas(128) unsigned ticket;     /* units that the main kernel's blocks have taken, beyond those they begin with */
  alignas(128) unsigned rows_known; /* 0 until the rows of this step are written, then 1 more than are updated */
  alignas(128) unsigned queries;    /* a multiple of ALL_QUERIES once rows_known and phi(q) are all written */
};

struct decode_rows {
  decode_row *rows; /* in the cache's order */
  int *updated;     /* which are updated */
  decode_signals *signals;
};

namespace {

/* Blocks of the first kernel add up to this: no step needs to know what the one before it left. */
constexpr unsigned ALL_QUERIES = 0x80000000u;

__device__ __forceinline__ unsigned load_signal(const unsigned *signal) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(signal)) : "memory");
  return x;
}

__device__ __forceinline__ void store_signal(unsigned *signal, unsigned x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(signal)), "r"(x) : "memory");
}

__device__ __forceinline__ void add_signal(unsigned *signal, unsigned x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(signal)), "r"(x) : "memory");
}

/* Before a kernel that waits for them may start. */
__device__ __forceinline__ void clear_signals(decode_signals *signals) {
  signals->ticket = signals->rows_known = 0;
  __threadfence();
}

/* Waits until the rows of this step are written; how many are updated. */
__device__ __forceinline__ int await_rows(const decode_rows &known) {
  unsigned signal;
  while (!(signal = load_signal(&known.signals->rows_known))) __nanosleep(20);
  return static_cast<int>(signal - 1);
}

/* Waits until its phi(q) are written too. */
__device__ __forceinline__ void await_queries(const decode_rows &known) {
  while (load_signal(&known.signals->queries) % ALL_QUERIES) __nanosleep(20);
}

} // namespace

#endif
