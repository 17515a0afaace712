#include "cpu/isa/simd_avx512.h"
#define LOLA_KERNELS lola_kernels_avx512
#define LOLA_KERNELS_NAME "avx512"
#include "cpu/isa/kernels_impl.h"
