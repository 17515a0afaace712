#include "cpu/isa/simd_avx2.h"
#define LOLA_KERNELS lola_kernels_avx2
#define LOLA_KERNELS_NAME "avx2"
#include "cpu/isa/kernels_impl.h"
