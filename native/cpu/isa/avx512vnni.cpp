#define ISA avx512vnni
#define ISA_NAME "avx512vnni"
#define W 16
#define ISA_PRIMITIVES "isa/x86.h"
#include "../kernels.inl"
