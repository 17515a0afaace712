/* NumPy arrays of a call that runs on a device. */
#ifndef LOLA_PYTHON_STAGING_H
#define LOLA_PYTHON_STAGING_H

#include "attention.h"
#include "core/message.h"

/* The arrays of a call on NumPy memory, piece by piece; `raw` holds everything but them and what enters which row.
 * Called without the GIL. Waits until the results are there. */
lola_status staged_attention(call *call, const lola_cuda_call *raw, lola_message *message);
lola_status check_on_device(const call *call, const lola_cuda_call *raw, lola_message *message);

/* Dense host memory to the device and back, in the stream's order; both return when the host's memory is free. `fresh`:
 * nobody has written it yet. */
lola_status stage_in(device *device, void *stream, void *target, const void *source, int64_t bytes,
                     lola_message *message);
lola_status stage_out(device *device, void *stream, void *target, const void *source, int64_t bytes, int fresh,
                      lola_message *message);

#endif
