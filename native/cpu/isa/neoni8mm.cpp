#define ISA neoni8mm
#define ISA_NAME "neoni8mm"
#define W 4
#define ISA_PRIMITIVES "isa/arm.h"
#include "../kernels.inl"
