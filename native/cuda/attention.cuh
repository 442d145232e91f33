// What the attention kernels share: where a step's rows and their keys and values are, the formats of caches, and merging of partial
// softmaxes. Attention reads a context in blocks with an online softmax (https://arxiv.org/abs/2205.14135).
//
// Segments and pages are inputs of a step, which no kernel writes, as are cached tokens of earlier steps: kernels may read them before
// await_inputs().
#pragma once
#include "kernels.cuh"

namespace cuda::attention {

constexpr int MAX_DIM = 512;
constexpr float LOG2E = 1.44269504088896341f;

struct Segment {
  int32_t first, rows, position;  // first row, number of rows, position of the first row
};

// The sequences of a step and their pages.
struct Step {
  const int32_t *segments, *pages;
  Size sequences, columns;  // columns: of `pages`
  int32_t blocks;           // of the cache
  FaultRecord* faults;

  __device__ __forceinline__ Segment segment(int s) const { return {segments[s * 3], segments[s * 3 + 1], segments[s * 3 + 2]}; }
  // The cache's block with the tokens 32 i .. 32 i + 31 of a sequence, of which the first column of its pages is `row`. Reports a page that does
  // not exist and returns a block that does.
  __device__ __forceinline__ int block(const int32_t* row, int i, int columns) const {
    const int page = i < columns ? row[i] : -1;
    if (static_cast<unsigned>(page) < static_cast<unsigned>(blocks)) return page;
    report(faults, Fault::PAGE, page, blocks);
    return 0;
  }
};

// A cache of keys and values.
struct Cache {
  void *keys, *values;
  int32_t heads, dim;
};

// Where results go: f32 or bf16.
struct Out {
  void* data;
  bool narrow;
  __device__ __forceinline__ void put(int64_t i, float x) const {
    if (narrow) static_cast<bf16*>(data)[i] = __float2bfloat16_rn(x);
    else static_cast<float*>(data)[i] = x;
  }
  __device__ __forceinline__ void put2(int64_t i, float x, float y) const {
    if (narrow) *reinterpret_cast<__nv_bfloat162*>(static_cast<bf16*>(data) + i) = __floats2bfloat162_rn(x, y);
    else *reinterpret_cast<float2*>(static_cast<float*>(data) + i) = make_float2(x, y);
  }
};

inline Step step_of(const Tensor& cache, const Tensor& segments, const Tensor& pages, FaultRecord* faults) {
  return {segments.as<int32_t>(), pages.as<int32_t>(), segments.dims[0], pages.dims[1], cache.most[0], faults};
}
inline Cache cache_of(const Tensor& keys, const Tensor& values) { return {keys.data, values.data, keys.most[1], keys.most[3]}; }
inline Out out_of(const Tensor& y) { return {y.data, y.dtype == BF16}; }

// A cache's format: the type of its numbers, and the bytes of what belongs to a block and head.
template <Dtype D> struct Format;
template <> struct Format<F32> { using T = float; };
template <> struct Format<F16> { using T = f16; };
template <> struct Format<BF16> { using T = bf16; };
template <> struct Format<FP8KV> { using T = __nv_fp8_e4m3; };
template <> struct Format<INT8KV> { using T = int8_t; };

__host__ __device__ constexpr int padded(Dtype d, int dim) { return d == INT8KV ? (dim + GROUP - 1) / GROUP * GROUP : dim; }
template <Dtype D> __host__ __device__ constexpr int64_t head_bytes(int dim) {
  return BLOCK_TOKENS * (D == INT8KV ? static_cast<int64_t>(int8_kv_bytes(dim)) : dim * static_cast<int64_t>(sizeof(typename Format<D>::T)));
}
template <Dtype D> __device__ __forceinline__ const uint8_t* head_of(const void* cache, int block, int heads, int head, int64_t bytes) {
  return static_cast<const uint8_t*>(cache) + (static_cast<int64_t>(block) * heads + head) * bytes;
}

// Calls f(std::integral_constant<Dtype, ...>) for a cache's format.
template <class F> void with_format(Dtype d, F f) {
  switch (d) {
    case F32: return f(std::integral_constant<Dtype, F32>{});
    case F16: return f(std::integral_constant<Dtype, F16>{});
    case BF16: return f(std::integral_constant<Dtype, BF16>{});
    case INT8KV: return f(std::integral_constant<Dtype, INT8KV>{});
    case FP8KV: return f(std::integral_constant<Dtype, FP8KV>{});
    default: throw std::runtime_error("internal: no cache has format " + std::to_string(d));
  }
}

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }

__device__ __forceinline__ int inclusive_sum(int x) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int y = __shfl_up_sync(~0u, x, i);
    if (lane_id() >= i) x += y;
  }
  return x;
}
__device__ __forceinline__ float largest(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
__device__ __forceinline__ float sum(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// Sequences have `units(s)` units each; finds the sequence of unit `target`, counted over all, and its number there. A warp calls it together.
template <class F> __device__ __forceinline__ bool locate(int target, int sequences, F units, int& sequence, int& unit) {
  int before = 0;
  for (int base = 0; base < sequences; base += 32) {
    const int s = base + lane_id();
    const int n = s < sequences ? units(s) : 0;
    const int end = before + inclusive_sum(n);
    const unsigned past = __ballot_sync(~0u, target < end);
    if (past) {
      const int at = __ffs(past) - 1;
      sequence = base + at;
      unit = target - __shfl_sync(~0u, end - n, at);
      return true;
    }
    before = __shfl_sync(~0u, end, 31);
  }
  return false;
}

// Sequences' total of units.
template <class F> __device__ __forceinline__ int total(int sequences, F units) {
  int n = 0;
  for (int s = lane_id(); s < sequences; s += 32) n += units(s);
  return __reduce_add_sync(~0u, n);
}

// Whether this block is the last of `count` that call this with the same counter. What the others wrote before is visible then.
__device__ __forceinline__ bool last_to_arrive(int32_t* counter, int count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == count - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// The kernels that serve calls; each launches what it needs. `general` takes any format and width.
void general(const Operands& o, Launch& launch);
// Sequences of up to `few` rows; only formats and widths that `decodes` names.
bool decodes(const Tensor& keys);
void decode(const Operands& o, int few, Launch& launch);
// Sequences of more than `few` rows; only what `prompts` names.
bool prompts(const Tensor& keys, const Launch& launch);
void prompt(const Operands& o, int few, Launch& launch);

}  // namespace cuda::attention
