#define ISA neon
#define ISA_NAME "neon"
#define W 4
#define ISA_PRIMITIVES "isa/arm.h"
#include "../kernels.inl"
