#if defined(__linux__)
#define _GNU_SOURCE /* sched_getaffinity, CPU_COUNT */
#endif
#include "cpu/pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include "core/message.h"

enum { SPINS = 1000 };

typedef struct {
  lola_task task;
  void *context;
  int64_t tasks;
  int helpers; /* workers 1 .. helpers take part */
} job_t;

static atomic_int wanted_threads; /* 0: as many as the process may run on */

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER; /* held by the thread that uses the pool */
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_ready = PTHREAD_COND_INITIALIZER, work_done = PTHREAD_COND_INITIALIZER;
static int started; /* workers running */
static job_t job;
static atomic_uint generation;
static atomic_int busy; /* helpers still in the current job */
static _Atomic int64_t next_task;

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int allowed_cpus(void) {
#if defined(__linux__)
  cpu_set_t set;
  if (!sched_getaffinity(0, sizeof set, &set)) return CPU_COUNT(&set);
#endif
  long count = sysconf(_SC_NPROCESSORS_ONLN);
  return count > 0 ? (int)count : 1;
}

int lola_cpu_threads(void) {
  int threads = atomic_load(&wanted_threads);
  if (!threads) threads = allowed_cpus();
  return threads < LOLA_MAX_THREADS ? threads : LOLA_MAX_THREADS;
}

lola_status lola_cpu_set_threads(int threads, lola_message *message) {
  if (threads < 0 || threads > LOLA_MAX_THREADS)
    return lola_fail(message, LOLA_VALUE_ERROR, "threads must be from 1 to %d, or 0 for one per allowed CPU, got %d",
                     LOLA_MAX_THREADS, threads);
  atomic_store(&wanted_threads, threads);
  return LOLA_OK;
}

static void work(const job_t *current, int worker) {
  for (;;) {
    int64_t index = atomic_fetch_add(&next_task, 1);
    if (index >= current->tasks) return;
    current->task(current->context, index, worker);
  }
}

static void *worker_main(void *argument) {
  int worker = (int)(intptr_t)argument;
  unsigned seen = 0;
  for (;;) {
    for (int i = 0; i < SPINS && atomic_load(&generation) == seen; i++) pause_briefly();
    pthread_mutex_lock(&guard);
    while (atomic_load(&generation) == seen) pthread_cond_wait(&work_ready, &guard);
    seen = atomic_load(&generation);
    job_t current = job;
    pthread_mutex_unlock(&guard);
    if (worker > current.helpers) continue;
    work(&current, worker);
    if (atomic_fetch_sub(&busy, 1) == 1) {
      pthread_mutex_lock(&guard);
      pthread_cond_signal(&work_done);
      pthread_mutex_unlock(&guard);
    }
  }
  return NULL;
}

/* The child of a fork has none of the workers, and perhaps a lock that one of them held. */
static void forget_workers(void) {
  pthread_mutex_init(&owner, NULL);
  pthread_mutex_init(&guard, NULL);
  pthread_cond_init(&work_ready, NULL);
  pthread_cond_init(&work_done, NULL);
  started = 0;
  atomic_store(&generation, 0);
  atomic_store(&busy, 0);
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }

/* Starts workers up to `helpers`, returns how many there are. A worker starts as if it had seen generation 0 and
 * so may find an old job first: that job counted fewer helpers than this worker's number, so it is passed over. */
static int start_workers(int helpers) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_forks);
  while (started < helpers) {
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int failed = pthread_create(&thread, &attributes, worker_main, (void *)(intptr_t)(started + 1));
    pthread_attr_destroy(&attributes);
    if (failed) break;
    started++;
  }
  return started < helpers ? started : helpers;
}

int lola_pool_width(int64_t tasks) {
  if (tasks <= 1) return 1;
  int threads = lola_cpu_threads();
  return tasks < threads ? (int)tasks : threads;
}

void lola_pool_run(int64_t tasks, int width, lola_task task, void *context) {
  if (width <= 1 || tasks <= 1 || pthread_mutex_trylock(&owner)) {
    for (int64_t i = 0; i < tasks; i++) task(context, i, 0);
    return;
  }
  int helpers = start_workers(width - 1);
  pthread_mutex_lock(&guard);
  job = (job_t){task, context, tasks, helpers};
  atomic_store(&next_task, 0);
  atomic_store(&busy, helpers);
  atomic_fetch_add(&generation, 1);
  pthread_cond_broadcast(&work_ready);
  job_t current = job;
  pthread_mutex_unlock(&guard);
  work(&current, 0);
  for (int i = 0; i < SPINS && atomic_load(&busy); i++) pause_briefly();
  pthread_mutex_lock(&guard);
  while (atomic_load(&busy)) pthread_cond_wait(&work_done, &guard);
  pthread_mutex_unlock(&guard);
  pthread_mutex_unlock(&owner);
}

void lola_pool_rest(int idle) {
  static const struct timespec little = {0, 20000};
  if (idle < SPINS)
    pause_briefly();
  else
    nanosleep(&little, NULL);
}
