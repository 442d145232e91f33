#define ISA amx
#define ISA_NAME "amx"
#define HAS_AMX
#ifdef __AVX512F__
#define W 16
#define ISA_PRIMITIVES "isa/x86.h"
#else  // emulated: any vectors will do
#define W 4
#define ISA_PRIMITIVES "isa/portable.h"
#endif
#include "../kernels.inl"
