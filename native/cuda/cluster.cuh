// Clusters: blocks of Hopper that run together and see each other's shared memory. Where there are none, a cluster is one block.
#pragma once
#include "kernels.cuh"

namespace cuda {

constexpr int CLUSTER = 8;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MIXTAPE_CLUSTER __cluster_dims__(CLUSTER, 1, 1)
#else
#define MIXTAPE_CLUSTER
#endif

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The address of the same variable of another block of the cluster.
__device__ __forceinline__ uint32_t address_in(const void* own, int block) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
#endif
  return address;
}

__device__ __forceinline__ float remote_load(const float* own, int block) {
  float x = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address_in(own, block)) : "memory");
#endif
  return x;
}

__device__ __forceinline__ uint64_t remote_load(const uint64_t* own, int block) {
  uint64_t x = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(x) : "r"(address_in(own, block)) : "memory");
#endif
  return x;
}

__device__ __forceinline__ void remote_store(const float* own, int block, float x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address_in(own, block)), "f"(x) : "memory");
#endif
}

}  // namespace cuda
