// What the card can do at most: copying and reading memory, and products in its tensor cores from operands that are already there. Each is the median
// of several passes.
#include "limits.cuh"

#include <algorithm>
#include <functional>

namespace cuda {

namespace {

constexpr int PASSES = 9;
constexpr size_t MOST_BYTES = size_t{2} << 30, LEAST_BYTES = size_t{64} << 20;
constexpr int MATH_THREADS = 256, MATH_BLOCKS = 2;  // per multiprocessor

__global__ void __launch_bounds__(512) copy_kernel(const uint4* from, uint4* to, size_t n) {
  const size_t stride = static_cast<size_t>(gridDim.x) * 512;
  size_t i = static_cast<size_t>(blockIdx.x) * 512 + threadIdx.x;
  for (; i + 3 * stride < n; i += 4 * stride) {
    uint4 x[4];
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = __ldcs(from + i + j * stride);
#pragma unroll
    for (int j = 0; j < 4; j++) __stcs(to + i + j * stride, x[j]);
  }
  for (; i < n; i += stride) to[i] = from[i];
}

// Writes something that depends on all that it reads, if `sink` is one of the values that cannot occur.
__global__ void __launch_bounds__(512) read_kernel(const uint4* from, uint32_t* sink, size_t n) {
  const size_t stride = static_cast<size_t>(gridDim.x) * 512;
  size_t i = static_cast<size_t>(blockIdx.x) * 512 + threadIdx.x;
  uint32_t all = 0;
  for (; i + 7 * stride < n; i += 8 * stride) {
    uint4 x[8];
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = __ldcs(from + i + j * stride);
#pragma unroll
    for (int j = 0; j < 8; j++) all |= x[j].x | x[j].y | x[j].z | x[j].w;
  }
  for (; i < n; i += stride) all |= from[i].x;
  if (all == 0x12345678) *sink = all;
}

__global__ void fill_kernel(uint32_t* to, size_t n) {
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += static_cast<size_t>(gridDim.x) * blockDim.x) to[i] = static_cast<uint32_t>(i) * 2654435761u;
}

// Products of tensor cores per turn of a warp: 8 independent ones of 16 x 8 by k.
constexpr int AT_ONCE = 8;

// bfloat16, 16 x 8 x 16; A and B stay in registers. For cards without `wgmma`.
__global__ void __launch_bounds__(MATH_THREADS) mma_bf16(float* sink, int turns) {
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) a[i] = 0x3c003b80u + threadIdx.x * 0x10001u + i;  // small numbers, all different
  for (int i = 0; i < 2; i++) b[i] = 0x3b013c00u + threadIdx.x * 0x10001u + i;
  float c[AT_ONCE][4] = {};
  for (int t = 0; t < turns; t++)
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  float all = 0;
  for (int j = 0; j < AT_ONCE; j++) all += c[j][0] + c[j][1] + c[j][2] + c[j][3];
  if (all == 12345.f) *sink = all;
}

// A warpgroup's products of 64 x 256 by 32 bytes: A in registers, B in shared memory.
template <bool FP8>
__device__ __forceinline__ void wgmma(float (&c)[128], const uint32_t (&a)[4], uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MIXTAPE_C8(i) "%" #i "0, %" #i "1, %" #i "2, %" #i "3, %" #i "4, %" #i "5, %" #i "6, %" #i "7, %" #i "8, %" #i "9"
#define MIXTAPE_SUMS                                                                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " MIXTAPE_C8(1) ", " MIXTAPE_C8(2) ", " MIXTAPE_C8(3) ", " MIXTAPE_C8(4) ", " MIXTAPE_C8(5)    \
  ", " MIXTAPE_C8(6) ", " MIXTAPE_C8(7) ", " MIXTAPE_C8(8) ", " MIXTAPE_C8(9) ", " MIXTAPE_C8(10) ", " MIXTAPE_C8(11)                      \
  ", %120, %121, %122, %123, %124, %125, %126, %127}, {%128, %129, %130, %131}, %132, "
#define MIXTAPE_F8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define MIXTAPE_F32(i) MIXTAPE_F8(i), MIXTAPE_F8(i + 8), MIXTAPE_F8(i + 16), MIXTAPE_F8(i + 24)
  if constexpr (FP8)
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 " MIXTAPE_SUMS "1, 1, 1;"
                 : MIXTAPE_F32(0), MIXTAPE_F32(32), MIXTAPE_F32(64), MIXTAPE_F32(96)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " MIXTAPE_SUMS "1, 1, 1, 0;"
                 : MIXTAPE_F32(0), MIXTAPE_F32(32), MIXTAPE_F32(64), MIXTAPE_F32(96)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
  c[0] += static_cast<float>(a[0] + b);
#endif
}

template <bool FP8>
__global__ void __launch_bounds__(MATH_THREADS) wgmma_kernel(float* sink, int turns) {
  __shared__ __align__(1024) uint32_t tile[256 * 8];  // 256 rows of 32 bytes, without a swizzle
  for (int i = threadIdx.x; i < 256 * 8; i += MATH_THREADS) tile[i] = FP8 ? 0x18201921u + i * 0x01000100u % 0x07000700u : 0x3c003b80u + i % 64 * 0x10001u;
  uint32_t a[4];
  for (int i = 0; i < 4; i++) a[i] = FP8 ? 0x19182021u : 0x3b803c00u + threadIdx.x % 64 * 0x10001u + i;
  float c[128] = {};
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // Core matrices of 8 rows by 16 bytes lie one after another: 128 bytes between those along k, 256 between those along n.
  const uint64_t b = (__cvta_generic_to_shared(tile) & 0x3ffff) >> 4 | uint64_t{128 >> 4} << 16 | uint64_t{256 >> 4} << 32;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  for (int t = 0; t < turns; t++) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int j = 0; j < 4; j++) wgmma<FP8>(c, a, b);
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
#endif
  float all = 0;
  for (int i = 0; i < 128; i++) all += c[i];
  if (all == 12345.f) *sink = all;
}

// The median seconds of a launch, after one that warms up.
double median(cudaStream_t stream, const std::function<void()>& work) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  double seconds[PASSES];
  work();
  for (double& s : seconds) {
    check(cudaEventRecord(begin, stream), "cudaEventRecord");
    work();
    check(cudaEventRecord(end, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end), "measuring");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "measuring");
    s = milliseconds / 1e3;
  }
  check(cudaGetLastError(), "measuring");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(seconds, seconds + PASSES);
  return seconds[PASSES / 2];
}

}  // namespace

CudaLimits measure_limits(CudaDevice& device) {
  device.use();
  const cudaStream_t stream = device.stream;
  const int processors = device.properties.multiProcessorCount;
  CudaLimits found{};
  {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    const size_t bytes = std::clamp(free / 4, LEAST_BYTES, MOST_BYTES) / 4096 * 4096, n = bytes / sizeof(uint4);
    const Block from(bytes), to(bytes);
    auto* x = reinterpret_cast<uint4*>(from.data());
    auto* y = reinterpret_cast<uint4*>(to.data());
    fill_kernel<<<processors * 4, 512, 0, stream>>>(reinterpret_cast<uint32_t*>(x), bytes / 4);
    fill_kernel<<<processors * 4, 512, 0, stream>>>(reinterpret_cast<uint32_t*>(y), bytes / 4);
    found.copy_bytes = 2. * static_cast<double>(bytes) / median(stream, [&] { copy_kernel<<<processors * 4, 512, 0, stream>>>(x, y, n); });
    found.read_bytes = static_cast<double>(bytes) / median(stream, [&] { read_kernel<<<processors * 4, 512, 0, stream>>>(x, reinterpret_cast<uint32_t*>(y), n); });
  }
  const Block sink(256);
  auto* s = reinterpret_cast<float*>(sink.data());
  if (device.properties.major == 9) {
    // Products a turn: 4 of 64 x 256 x 16 (bfloat16) or x 32 (fp8) by each warpgroup.
    constexpr int TURNS = 4000;
    const double products = 4. * TURNS * 64 * 256 * 16 * (MATH_THREADS / 128) * processors;
    found.bf16_flops = 2 * products / median(stream, [&] { wgmma_kernel<false><<<processors, MATH_THREADS, 0, stream>>>(s, TURNS); });
    found.fp8_flops = 4 * products / median(stream, [&] { wgmma_kernel<true><<<processors, MATH_THREADS, 0, stream>>>(s, TURNS); });
  } else {
    constexpr int TURNS = 8000;
    const double products = 1. * AT_ONCE * TURNS * 16 * 8 * 16 * (MATH_THREADS / 32) * processors * MATH_BLOCKS;
    found.bf16_flops = 2 * products / median(stream, [&] { mma_bf16<<<processors * MATH_BLOCKS, MATH_THREADS, 0, stream>>>(s, TURNS); });
  }
  check(cudaStreamSynchronize(stream), "measuring");
  return found;
}

}  // namespace cuda
