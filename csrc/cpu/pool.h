/* The thread pool: workers are started on first use, park when idle, and are forgotten in a forked child.
 *
 * A task's result must not depend on the worker that runs it. While one thread uses the pool, another thread's
 * parallel call runs inline on that thread. */
#ifndef LOLA_CPU_POOL_H
#define LOLA_CPU_POOL_H

#include <stdint.h>

enum { LOLA_MAX_THREADS = 256 };

typedef void (*lola_task)(void *context, int64_t index, int worker);

/* Workers (this thread included) that `tasks` tasks would use: ids 0 .. width-1. */
int lola_pool_width(int64_t tasks);
/* Runs tasks 0 .. tasks-1, returns when all are done. */
void lola_pool_run(int64_t tasks, int width, lola_task task, void *context);
/* For a task that finds nothing to do, `idle` times in a row: spins at first, then sleeps for a little. */
void lola_pool_rest(int idle);

#endif
