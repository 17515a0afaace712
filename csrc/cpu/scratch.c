#include "cpu/scratch.h"

#include <pthread.h>
#include <stdlib.h>

enum { LINE = 64 };
static const int64_t KEPT = INT64_C(64) << 20; /* a block up to this size stays with its thread */
static const int64_t LIMIT = INT64_C(1) << 60;

typedef struct {
  void *block;
  int64_t bytes, peak;
} arena_t;

static _Thread_local arena_t arena;
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void release(void *block) { free(block); }
static void make_key(void) { pthread_key_create(&key, release); }

void *lola_scratch_take(lola_scratch *scratch, int64_t count, int64_t size) {
  int64_t at = scratch->used;
  if (at < 0 || count < 0 || (size && count > LIMIT / size)) {
    scratch->used = -1;
    return NULL;
  }
  scratch->used = at + (count * size + LINE - 1) / LINE * LINE;
  if (scratch->used > LIMIT) scratch->used = -1;
  return scratch->base ? scratch->base + at : NULL;
}

static void *aligned(void *block) {
  char *p = block;
  return p + (LINE - (uintptr_t)p % LINE) % LINE;
}

lola_status lola_scratch_open(lola_scratch *scratch, lola_message *message) {
  int64_t bytes = scratch->used;
  if (bytes < 0) return lola_fail(message, LOLA_MEMORY_ERROR, "a call of these sizes does not fit in memory");
  pthread_once(&once, make_key);
  if (bytes > arena.bytes || !arena.block) {
    free(arena.block);
    arena.bytes = 0;
    arena.block = malloc((size_t)bytes + LINE);
    pthread_setspecific(key, arena.block); /* frees it when the thread ends */
    if (!arena.block) return lola_out_of_memory(message, bytes);
    arena.bytes = bytes;
  }
  arena.peak = bytes;
  scratch->base = aligned(arena.block);
  scratch->used = 0;
  return LOLA_OK;
}

void lola_scratch_close(lola_scratch *scratch) {
  scratch->base = NULL;
  if (arena.bytes <= KEPT) return;
  free(arena.block);
  arena = (arena_t){.peak = arena.peak};
  pthread_setspecific(key, NULL);
}

int64_t lola_cpu_scratch_peak(void) { return arena.peak; }
