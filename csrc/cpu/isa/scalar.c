#include "cpu/isa/simd_scalar.h"
#define LOLA_KERNELS lola_kernels_scalar
#define LOLA_KERNELS_NAME "scalar"
#include "cpu/isa/kernels_impl.h"
