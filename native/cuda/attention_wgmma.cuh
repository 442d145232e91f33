// Products of a warpgroup (four warps) on Hopper's tensor cores: D [64 x N] += A [64 x 16] B [16 x N], asynchronous, with operands in shared
// memory that copies of tensor maps with 128-byte swizzling wrote. Only for sm_90a.
#pragma once
#include "attention_tensor.cuh"

namespace cuda::attention {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// An operand in shared memory whose rows are 128 bytes; `leading` is the distance between pieces of 64 numbers where they are not the axis of sums.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving accesses of registers that products use asynchronously.
template <int N> __device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

#define MIXTAPE_D64(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), \
      "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), \
      "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
      "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), \
      "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define MIXTAPE_R64 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"

// N = 128, A and B in shared memory, both with the axis of sums along rows. `more` 0: D = A B.
#define MIXTAPE_SHARED(type) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " MIXTAPE_R64 ", %64, %65, p, 1, 1, 0, 0;\n}" \
               : MIXTAPE_D64(d) : "l"(a), "l"(b), "r"(more))
// A in registers, the rows of B in shared memory along the axis of sums.
#define MIXTAPE_REGISTERS(type) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " MIXTAPE_R64 ", {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}" \
               : MIXTAPE_D64(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more))

template <class T> __device__ __forceinline__ void product(float (&d)[64], uint64_t a, uint64_t b, int more) {
  if constexpr (std::is_same_v<T, bf16>) MIXTAPE_SHARED("bf16");
  else MIXTAPE_SHARED("f16");
}
template <class T> __device__ __forceinline__ void product(float (&d)[64], const uint32_t* a, uint64_t b, int more) {
  if constexpr (std::is_same_v<T, bf16>) MIXTAPE_REGISTERS("bf16");
  else MIXTAPE_REGISTERS("f16");
}

#undef MIXTAPE_D64
#undef MIXTAPE_R64
#undef MIXTAPE_SHARED
#undef MIXTAPE_REGISTERS

#endif

}  // namespace cuda::attention
