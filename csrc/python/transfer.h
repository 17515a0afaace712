/* Arrays of the host's on their way to a device and back, while the device works on what has come.
 *
 * They are cut twice. A piece, some thousand tokens of all arrays, is dense in device memory and worked on at once. A
 * block, some MB of a piece, is copied at once through page-locked memory. Both are few and used again and again, so
 * that memory does not grow with length. The calling thread alone talks to the device; it and the pool's other workers
 * copy between arrays and blocks. */
#ifndef LOLA_PYTHON_TRANSFER_H
#define LOLA_PYTHON_TRANSFER_H

#include "device.h"

/* Pieces in device memory: one comes in, one is worked on, one goes out. */
enum { PIECES = 3, MOST_PARTS = 8 };

/* One array, (batch, tokens, heads, line). */
typedef struct part {
  char *data;
  int64_t strides[3];  /* in bytes, of all axes but the last, which is contiguous */
  int64_t heads, line; /* bytes of a head's numbers; heads * line of a token's */
  int output;
} part;

/* Inputs come before outputs. */
typedef struct transfer_plan {
  part parts[MOST_PARTS];
  int count;
  int64_t batch, tokens;
  int64_t grain;          /* tokens at whose multiples pieces end, but for the last one */
  int64_t length, pieces; /* tokens of a piece, of which the last two may have fewer; how many pieces there are */
} transfer_plan;

/* Tokens first .. first + tokens - 1 of the arrays. */
typedef struct piece {
  int64_t index, first, tokens;
} piece;

/* Cuts the arrays, which are not empty, into pieces, at multiples of `grain` tokens where that is possible. */
void transfer_cut(transfer_plan *plan, int64_t grain);
/* Leaves them whole, one piece. */
void transfer_leave(transfer_plan *plan);
/* Device memory that the pieces take. */
int64_t transfer_bytes(const transfer_plan *plan);
/* Where a part begins in a piece of so many tokens. */
int64_t transfer_offset(const transfer_plan *plan, int part, int64_t tokens);

typedef struct transfer {
  device *device;
  const transfer_plan *plan;
  char *memory; /* transfer_bytes on the device */
  void *stream; /* of the work, which may use `memory` */
  int only;     /* ONLY_IN, ONLY_OUT: not the other way; 0: both */
  char *fresh;  /* memory of an output that nobody has written yet; NULL: all was */
  int64_t fresh_bytes;
  /* Queues the work on a piece; NULL: there is none. */
  lola_status (*work)(void *context, const piece *piece, char *memory, lola_message *message);
  void *context;
} transfer;

enum { ONLY_IN = 1, ONLY_OUT = 2 };

/* Returns when the arrays are free and the results there; after a failure when nothing is under way. The caller holds
 * the device's staging_lock, and not the GIL. */
lola_status transfer_run(const transfer *transfer, lola_message *message);

#endif
