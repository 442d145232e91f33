#define ISA scalar
#define ISA_NAME "scalar"
#define W 4
#define ISA_PRIMITIVES "isa/portable.h"
#include "../kernels.inl"
