#define ISA avx2
#define ISA_NAME "avx2"
#define W 8
#define ISA_PRIMITIVES "isa/x86.h"
#include "../kernels.inl"
