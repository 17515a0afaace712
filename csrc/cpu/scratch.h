/* Working memory of a call: one block per calling thread, kept between calls while it is small, so that decoding
 * neither allocates nor faults pages in. All of a call's scratch is taken before its first write. */
#ifndef LOLA_CPU_SCRATCH_H
#define LOLA_CPU_SCRATCH_H

#include "core/message.h"

/* Adds up the pieces first, then hands them out in the same order. */
typedef struct lola_scratch {
  char *base; /* NULL while adding up */
  int64_t used;
} lola_scratch;

/* The next `count` items of `size` bytes, aligned to a cache line; NULL while adding up. */
void *lola_scratch_take(lola_scratch *scratch, int64_t count, int64_t size);
/* Turns an added-up scratch into memory and rewinds it. */
lola_status lola_scratch_open(lola_scratch *scratch, lola_message *message);
/* The call is over: gives a large block back. */
void lola_scratch_close(lola_scratch *scratch);

#endif
