/* Devices behind the table of lola/cuda.h, which is asked for when one is first named or met: their streams, the memory
 * of caches there, and the small things of a call that travel from the host.
 *
 * Everything queued on a device is in some stream's order. Memory that is no longer used is given back on the device's
 * `keeper`, a stream of our own that waits for the last use first, so that nobody else has to wait. */
#ifndef LOLA_PYTHON_DEVICE_H
#define LOLA_PYTHON_DEVICE_H

#include "binding.h"
#include "lola/cuda.h"

/* What device= may say beside a number and ON_HOST: nothing, and "cuda", which is any. */
enum { DEVICE_UNSAID = -2, DEVICE_ANY = -3 };

enum { SLOTS = 16, SLOT_BYTES = 4096 };

typedef struct slot {
  char *data; /* page-locked */
  void *event;
  int used;
} slot;

typedef struct staging staging; /* staging.h */

/* One for each device that was used; they last as long as the process. */
struct device {
  const lola_cuda_api *api;
  int number;
  void *keeper, *waiter; /* streams: see above; and one that the host waits on */
  device *next;
  PyThread_type_lock lock; /* of what follows; never held while another lock is waited for */
  slot slots[SLOTS];
  int next_slot;
  PyThread_type_lock staging_lock; /* held by the call that copies NumPy arrays */
  staging *staging;
};

/* --- finding them --------------------------------------------------------------------------- */

typedef struct device_name {
  char text[16];
} device_name;

device_name name_of_device(int number); /* "cpu", "cuda:0" */
/* 1 if devices can be used; else 0 and the reason in `text`. */
int cuda_is_available(binding_state *state, char *text, size_t size);
/* The device of this number, NULL with an exception. */
device *device_open(binding_state *state, int number);
/* The one that an open device array lies on. */
device *device_of(binding_state *state, int number);
/* None, "cpu", "cuda", "cuda:1", torch.device and its like: a number, ON_HOST, DEVICE_UNSAID or DEVICE_ANY. */
int device_from(binding_state *state, PyObject *object, int *number);
/* The same, where one place must come out: nothing said is the host, "cuda" the current device. */
int device_chosen(binding_state *state, PyObject *object, int *number);

/* --- streams -------------------------------------------------------------------------------- */

/* An address, or a stream object of torch, CuPy or anything with __cuda_stream__. */
int stream_from(PyObject *object, void **stream);
/* The library's current stream on a device; the legacy default stream where there is no library. */
int library_stream(binding_state *state, const library *library, int number, void **stream);
/* `stream` waits for what is queued on `after`; nothing where they are one. */
int device_follow(device *device, void *stream, void *after);
/* The keeper waits for it, as far as that can be; raises nothing. */
void device_keep_for(device *device, void *stream);
/* The host waits for an event. */
lola_status device_wait(device *device, void *event, lola_message *message);
/* Copies a few bytes from the host in the stream's order; neither the host nor its memory has to wait. */
lola_status device_put(device *device, void *stream, void *target, const void *source, int64_t bytes,
                       lola_message *message);

/* --- caches on devices ---------------------------------------------------------------------- */

struct device_cache {
  lola_memory memory; /* first, so that the core's pointer to it leads here */
  device *device;
  void *stream;    /* of the work in hand */
  int capturing;   /* that stream records a graph */
  void *event;     /* recorded after the last use, but in graphs */
  void *last;      /* the stream of that use */
  library library; /* of the last arrays: operations without arrays run on its current stream */
  int temporary;   /* for one call, whose stream its memory returns to */
  int exported;    /* others may read its memory on their current streams */
  int faulty;
  lola_message fault;
  /* What tokens_seen would say, counted on the host so that looking at it waits for nothing. */
  int64_t *seen; /* (B,) */
  int counted;   /* it is right as far as eager calls go */
  int shared; /* a graph was recorded, which may be replayed at any time, or the buffers handed out: the device knows */
  /* Memory beside the cache's own. */
  char *block;
  int64_t workspace_bytes;
  void *workspace;
  float *gate;    /* (Hq,) */
  int64_t *index; /* starts (B,), stops (B,), or cu_seqlens (B + 1,) */
};

/* Before the core's cache is made: where it will lie. */
device_cache *device_cache_new(device *device, void *stream);
/* After: the memory beside it; again when the cache has grown. */
lola_status device_cache_furnish(device_cache *on, const lola_cache *cache, lola_message *message);
/* Gives everything back once the last use is over. */
void device_cache_free(device_cache *on, lola_cache *cache);
/* Has the keeper wait for the last use, before something that it read may go. */
void device_cache_settle(const device_cache *on);
/* The stream for operations without arrays. */
int device_cache_stream(binding_state *state, const device_cache *on, void **stream);
/* Begins work on a stream, which waits for the last use; ends it. Raises for a cache that is unusable. */
int device_cache_enter(device_cache *on, void *stream);
void device_cache_leave(device_cache *on);
/* raise_status; after a fault of the device the cache is unusable. */
int device_cache_raise(device_cache *on, lola_status status, const lola_message *message);

#endif
