#define ISA avxvnni
#define ISA_NAME "avxvnni"
#define W 8
#define ISA_PRIMITIVES "isa/x86.h"
#include "../kernels.inl"
