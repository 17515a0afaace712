#include "cpu/isa/simd_neon.h"
#define LOLA_KERNELS lola_kernels_neon
#define LOLA_KERNELS_NAME "neon"
#include "cpu/isa/kernels_impl.h"
