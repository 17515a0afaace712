#include "core/message.h"

#include <stdarg.h>
#include <stdio.h>

lola_status lola_fail(lola_message *message, lola_status status, const char *format, ...) {
  if (message) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message->text, sizeof message->text, format, arguments);
    va_end(arguments);
  }
  return status;
}

lola_status lola_out_of_memory(lola_message *message, int64_t bytes) {
  return lola_fail(message, LOLA_MEMORY_ERROR, "could not allocate %lld bytes", (long long)bytes);
}
