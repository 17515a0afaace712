/* Which instruction set runs: the best one present, or the one asked for. */
#include <stdatomic.h>
#include <string.h>

#include "core/message.h"
#include "cpu/isa/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* The compiler's probe knows whether the system saves the wide registers, but not every one knows F16C. */
static int has_float16(void) {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
}
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_float16(); }
static int has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

static int always(void) { return 1; }

static const struct {
  const lola_kernels *kernels;
  int (*present)(void);
} compiled[] = {
#ifdef LOLA_HAVE_AVX512
    {&lola_kernels_avx512, has_avx512},
#endif
#ifdef LOLA_HAVE_AVX2
    {&lola_kernels_avx2, has_avx2},
#endif
#ifdef LOLA_HAVE_NEON
    {&lola_kernels_neon, always},
#endif
    {&lola_kernels_scalar, always},
};
enum { COMPILED = sizeof compiled / sizeof *compiled };

static _Atomic(const lola_kernels *) chosen;

static const lola_kernels *present(int index) {
  for (int i = 0; i < COMPILED; i++)
    if (compiled[i].present() && index-- == 0) return compiled[i].kernels;
  return NULL;
}

int lola_cpu_isa_count(void) {
  int count = 0;
  while (present(count)) count++;
  return count;
}

const char *lola_cpu_isa_name(int index) {
  const lola_kernels *kernels = present(index);
  return kernels ? kernels->name : NULL;
}

const lola_kernels *lola_cpu_kernels(void) {
  const lola_kernels *kernels = atomic_load(&chosen);
  if (!kernels) {
    kernels = present(0);
    atomic_store(&chosen, kernels);
  }
  return kernels;
}

const char *lola_cpu_isa(void) { return lola_cpu_kernels()->name; }

lola_status lola_cpu_set_isa(const char *name, lola_message *message) {
  const lola_kernels *kernels;
  char names[64] = "";
  for (int i = 0; (kernels = present(i)); i++) {
    if (!name || !*name || !strcmp(name, kernels->name)) {
      atomic_store(&chosen, kernels);
      return LOLA_OK;
    }
    strcat(strcat(names, i ? ", " : ""), kernels->name);
  }
  return lola_fail(message, LOLA_VALUE_ERROR, "the instruction set must be one of %s on this machine, got '%.32s'",
                   names, name);
}
