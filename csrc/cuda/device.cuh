/* Errors of the CUDA runtime as statuses, the current device for the length of a scope, and scratch of a stream. */
#ifndef LOLA_CUDA_DEVICE_CUH
#define LOLA_CUDA_DEVICE_CUH

#include <cuda_runtime.h>

#include "core/message.h"

/* The error as a status; `what` names the function. Clears it, so that the next call does not report it again. */
lola_status lola_cuda_status(cudaError_t error, const char *what, lola_message *message);
/* The same for an allocation of `bytes`. */
lola_status lola_cuda_allocation_status(cudaError_t error, int64_t bytes, lola_message *message);

/* Makes a device current, and the one before it again at the end. */
class lola_device_scope {
public:
  lola_device_scope(int device, lola_message *message) {
    status = lola_cuda_status(cudaGetDevice(&before_), "cudaGetDevice", message);
    if (status || before_ == device) return;
    status = lola_cuda_status(cudaSetDevice(device), "cudaSetDevice", message);
    changed_ = !status;
  }
  ~lola_device_scope() {
    if (changed_) cudaSetDevice(before_);
  }
  lola_device_scope(const lola_device_scope &) = delete;
  lola_device_scope &operator=(const lola_device_scope &) = delete;
  lola_status status;

private:
  int before_ = 0;
  bool changed_ = false;
};

/* Memory of a stream's order, from lola's own pool on the device. */
lola_status lola_cuda_allocate(int device, int64_t bytes, void *stream, void **data, lola_message *message);
void lola_cuda_release(int device, void *data, void *stream);

#endif
