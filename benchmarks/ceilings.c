/* What this machine can do at most, in float32: fused multiply-adds in registers, and reading memory.
 *
 * Compiled at run time for the very machine (-march=native), loaded with ctypes, used by nothing but the benchmarks.
 * The vectors are the compiler's own, so that one source serves AVX-512, AVX2, NEON and plain SSE. */
#if defined(__linux__)
#define _GNU_SOURCE /* pthread_setaffinity_np */
#include <sched.h>
#endif
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__AVX512F__)
enum { BYTES = 64, SUMS = 24 };
#elif defined(__AVX__)
enum { BYTES = 32, SUMS = 12 };
#elif defined(__aarch64__)
enum { BYTES = 16, SUMS = 24 };
#else
enum { BYTES = 16, SUMS = 12 };
#endif
typedef float vector __attribute__((vector_size(BYTES)));
enum { LANES = BYTES / 4, MOST_THREADS = 1024 };

typedef struct {
  int index, threads, reading;
  int64_t amount; /* multiply-add rounds, or passes over the memory */
  double begin, end;
} worker;

static float *memory;
static size_t memory_floats;
static atomic_int waiting;
static volatile float sink;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* SUMS independent chains hide the latency of the multiply-add; values stay near 1. */
static void multiply_add(int64_t rounds) {
  vector sums[SUMS], a, b;
  for (int j = 0; j < LANES; j++) a[j] = 0.999f + 1e-9f * sink, b[j] = 0.001f;
  for (int i = 0; i < SUMS; i++) sums[i] = a + (float)i * b;
  for (int64_t n = 0; n < rounds; n++)
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; i++) sums[i] = sums[i] * a + b;
  vector all = sums[0];
  for (int i = 1; i < SUMS; i++) all += sums[i];
  sink = all[0];
}

static void slice(const worker *w, size_t *from, size_t *until) {
  size_t unit = 16 * LANES, units = memory_floats / unit;
  *from = units * (size_t)w->index / (size_t)w->threads * unit;
  *until = units * ((size_t)w->index + 1) / (size_t)w->threads * unit;
}

static void read_memory(const worker *w) {
  size_t from, until;
  slice(w, &from, &until);
  vector sums[8] = {{0}};
  for (int64_t pass = 0; pass < w->amount; pass++)
    for (size_t i = from; i < until; i += 8 * LANES)
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) sums[j] += *(const vector *)(memory + i + (size_t)j * LANES);
  vector all = sums[0];
  for (int j = 1; j < 8; j++) all += sums[j];
  sink = all[0];
}

/* Of several threads, each on a processor of its own from the start: new ones may otherwise share their creator's for a
 * while. */
static void stay(int index) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed) || !CPU_COUNT(&allowed)) return;
  index %= CPU_COUNT(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed) || index--) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    return;
  }
#else
  (void)index;
#endif
}

static void *work(void *context) {
  worker *w = context;
  if (w->threads > 1) stay(w->index);
  atomic_fetch_sub(&waiting, 1);
  while (atomic_load(&waiting) > 0) {
  }
  w->begin = now();
  if (w->reading)
    read_memory(w);
  else
    multiply_add(w->amount);
  w->end = now();
  return NULL;
}

/* Seconds from the first thread's begin to the last one's end; -1 where threads cannot be had. */
static double together(int threads, int reading, int64_t amount) {
  static worker workers[MOST_THREADS];
  pthread_t handles[MOST_THREADS];
  if (threads < 1 || threads > MOST_THREADS) return -1;
  atomic_store(&waiting, threads);
  for (int i = 0; i < threads; i++) workers[i] = (worker){i, threads, reading, amount, 0, 0};
  for (int i = 0; i < threads; i++)
    if (pthread_create(&handles[i], NULL, work, &workers[i])) return -1;
  double begin = 1e300, end = 0;
  for (int i = 0; i < threads; i++) {
    pthread_join(handles[i], NULL);
    if (workers[i].begin < begin) begin = workers[i].begin;
    if (workers[i].end > end) end = workers[i].end;
  }
  return end - begin;
}

/* GFLOP/s of `rounds` rounds of multiply-adds on each of `threads` threads. */
double ceiling_fma(int threads, int64_t rounds) {
  return 2e-9 * SUMS * LANES * (double)rounds * threads / together(threads, 0, rounds);
}

/* Memory to read, with large pages where the system gives them on request; 0: not to be had. */
int ceiling_open(int64_t bytes) {
  memory_floats = (size_t)bytes / 4;
  memory = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (memory == MAP_FAILED) return 0;
#if defined(MADV_HUGEPAGE)
  madvise(memory, (size_t)bytes, MADV_HUGEPAGE);
#endif
  for (size_t i = 0; i < memory_floats; i++) memory[i] = 1;
  return 1;
}

/* GB/s of reading all of it once, each thread its own part. */
double ceiling_read(int threads) { return 4e-9 * (double)memory_floats / together(threads, 1, 1); }

void ceiling_close(void) { munmap(memory, memory_floats * 4); }
