#define ISA avx512bf16
#define ISA_NAME "avx512bf16"
#define W 16
#define ISA_PRIMITIVES "isa/x86.h"
#include "../kernels.inl"
