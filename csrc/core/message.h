/* Status codes with a text: the one way a function of the core says what went wrong. */
#ifndef LOLA_CORE_MESSAGE_H
#define LOLA_CORE_MESSAGE_H

#include "lola/lola.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
lola_status
lola_fail(lola_message *message, lola_status status, const char *format, ...);

lola_status lola_out_of_memory(lola_message *message, int64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
