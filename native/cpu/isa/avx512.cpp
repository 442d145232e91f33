#define ISA avx512
#define ISA_NAME "avx512"
#define W 16
#define ISA_PRIMITIVES "isa/x86.h"
#include "../kernels.inl"
