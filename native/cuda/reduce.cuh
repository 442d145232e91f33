// Numbers in any float format, sums over a block, and the two loops that most small kernels are: one over elements, one over rows with a
// norm. Kernels never load activations through the read-only cache: the compiler may move such a load above `await_inputs`.
#pragma once
#include <algorithm>

#include "kernels.cuh"

namespace cuda {

// Numbers in memory. Integers are copied as if they were float32.
struct Numbers {
  void* data;
  Dtype dtype;
};

inline Numbers numbers(const Tensor& t) {
  if (t.dtype != F32 && t.dtype != I32 && t.dtype != BF16 && t.dtype != F16) throw std::runtime_error("internal: a kernel got numbers in a block format");
  return {t.data, t.dtype == I32 ? F32 : t.dtype};
}

inline Numbers floats(const Tensor& t) {
  if (t.dtype == I32) throw std::runtime_error("internal: a kernel got integers in place of floats");
  return numbers(t);
}

template <int V>
struct Vec {
  float at[V];
};

// V numbers from element i on. V is 4 only where `vector_width` allows it.
template <int V>
__device__ __forceinline__ Vec<V> load(const Numbers& x, int64_t i) {
  Vec<V> y;
  if (x.dtype == F32) {
    const float* from = static_cast<const float*>(x.data) + i;
    if constexpr (V == 4) {
      const float4 v = *reinterpret_cast<const float4*>(from);
      y.at[0] = v.x, y.at[1] = v.y, y.at[2] = v.z, y.at[3] = v.w;
    } else {
#pragma unroll
      for (int j = 0; j < V; j++) y.at[j] = from[j];
    }
    return y;
  }
  uint16_t bits[V];
  const uint16_t* from = static_cast<const uint16_t*>(x.data) + i;
  if constexpr (V == 4) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    bits[0] = static_cast<uint16_t>(v.x), bits[1] = static_cast<uint16_t>(v.x >> 16), bits[2] = static_cast<uint16_t>(v.y), bits[3] = static_cast<uint16_t>(v.y >> 16);
  } else {
#pragma unroll
    for (int j = 0; j < V; j++) bits[j] = from[j];
  }
#pragma unroll
  for (int j = 0; j < V; j++) y.at[j] = x.dtype == BF16 ? __uint_as_float(static_cast<uint32_t>(bits[j]) << 16) : __half2float(__ushort_as_half(bits[j]));
  return y;
}

template <int V>
__device__ __forceinline__ void store(const Numbers& y, int64_t i, const Vec<V>& v) {
  if (y.dtype == F32) {
    float* to = static_cast<float*>(y.data) + i;
    if constexpr (V == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(v.at[0], v.at[1], v.at[2], v.at[3]);
    } else {
#pragma unroll
      for (int j = 0; j < V; j++) to[j] = v.at[j];
    }
    return;
  }
  uint16_t bits[V];
#pragma unroll
  for (int j = 0; j < V; j++) bits[j] = y.dtype == BF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v.at[j])) : __half_as_ushort(__float2half_rn(v.at[j]));
  uint16_t* to = static_cast<uint16_t*>(y.data) + i;
  if constexpr (V == 4) {
    *reinterpret_cast<uint2*>(to) = make_uint2(bits[0] | static_cast<uint32_t>(bits[1]) << 16, bits[2] | static_cast<uint32_t>(bits[3]) << 16);
  } else {
#pragma unroll
    for (int j = 0; j < V; j++) to[j] = bits[j];
  }
}

// Whether four numbers at a multiple of four can be loaded at once from all of these.
template <class... N>
bool aligned(const N&... x) {
  return (... && (reinterpret_cast<uintptr_t>(x.data) % (x.dtype == F32 ? 16 : 8) == 0));
}

// The number of elements of a value in the current run.
struct Count {
  int64_t times;
  const int32_t* of[4];
  __device__ __forceinline__ int64_t get() const {
    int64_t n = times;
#pragma unroll
    for (int d = 0; d < 4; d++)
      if (of[d]) n *= *of[d];
    return n;
  }
};

// Of all axes, or of those from `first` on.
inline Count elements(const Tensor& t, int first = 0) {
  Count n{1, {}};
  for (int d = first; d < t.rank; d++) n.times *= t.dims[d].times, n.of[d] = t.dims[d].of;
  return n;
}

// y_i = f(i) for the elements of y; f gives V of them at a time.
template <int V, class F>
__global__ void __launch_bounds__(256) map_kernel(F f, Numbers y, Count count, FaultRecord* faults) {
  let_next_start();
  const int64_t total = count.get();
  await_inputs();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * V;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < total; i += stride) {
    if (V == 1 || i + V <= total) {
      store<V>(y, i, f.template at<V>(i, faults));
    } else {
      for (int64_t j = i; j < total; j++) store<1>(y, j, f.template at<1>(j, faults));
    }
  }
}

// `vectors`: whether f can give four elements at once, from a multiple of four on.
template <class F>
void map(const F& f, const Tensor& out, bool vectors, Launch& launch) {
  const Numbers y = numbers(out);
  const int64_t most = std::max<int64_t>(1, static_cast<int64_t>(out.most[0]) * out.width());
  const bool fours = vectors && aligned(y);
  const int grid = static_cast<int>(std::min<int64_t>((most + (fours ? 1024 : 256) - 1) / (fours ? 1024 : 256), 1 << 20));
  if (fours) launch(map_kernel<4, F>, dim3(grid), dim3(256), 0, f, y, elements(out), launch.faults);
  else launch(map_kernel<1, F>, dim3(grid), dim3(256), 0, f, y, elements(out), launch.faults);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// The sum over a block of whole warps, for every thread. `shared` has room for 32 numbers, and its last use lies before the last barrier
// but one (for example, because two take turns).
__device__ __forceinline__ float block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.f);
}

// sum = f(row), y = sum / sqrt(mean(sum^2) + eps) * weight, a row a block. A thread keeps N times V numbers of a row, and reads and writes only
// these, so that results may overwrite inputs of the same format. `sum` may have no data.
template <int V, int N, class F>
__global__ void __launch_bounds__(512) norm_kernel(F f, const float* weight, Numbers sum, Numbers y, Size rows, int32_t n, float eps) {
  constexpr int UNROLL = N <= 8 ? N : 1;
  __shared__ float shared[2][32];
  let_next_start();
  Vec<V> w[N], x[N];
  auto column = [&](int j) { return (j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * V; };
#pragma unroll UNROLL
  for (int j = 0; j < N; j++)
    if (column(j) < n) w[j] = load<V>({const_cast<float*>(weight), F32}, column(j));
  const int count = rows.get();
  await_inputs();
  int turn = 0;
  for (int r = blockIdx.x; r < count; r += gridDim.x, turn ^= 1) {
    float squares = 0;
#pragma unroll UNROLL
    for (int j = 0; j < N; j++)
      if (column(j) < n) x[j] = f.template at<V>(r, column(j));
#pragma unroll UNROLL
    for (int j = 0; j < N; j++)
      if (column(j) < n)
#pragma unroll
        for (int v = 0; v < V; v++) squares += x[j].at[v] * x[j].at[v];
    const float scale = 1 / sqrtf(block_sum(squares, shared[turn]) / static_cast<float>(n) + eps);
#pragma unroll UNROLL
    for (int j = 0; j < N; j++) {
      if (column(j) >= n) continue;
      const int64_t at = static_cast<int64_t>(r) * n + column(j);
      if (sum.data) store<V>(sum, at, x[j]);
      Vec<V> normed;
#pragma unroll
      for (int v = 0; v < V; v++) normed.at[v] = w[j].at[v] * (x[j].at[v] * scale);
      store<V>(y, at, normed);
    }
  }
}

// `vectors`: whether f can give four numbers of a row at once, from a multiple of four on.
template <class F>
void norm(const F& f, const Tensor& weight, const Tensor* sum, const Tensor& out, float eps, bool vectors, Launch& launch) {
  const int n = out.most[1];
  const Numbers y = floats(out), s = sum ? floats(*sum) : Numbers{nullptr, F32}, w = floats(weight);
  if (w.dtype != F32) throw std::runtime_error("internal: a norm's weight is not float32");
  const bool fours = vectors && n % 4 == 0 && aligned(y, s, w);
  const int columns = fours ? n / 4 : n;  // columns of vectors
  auto run = [&](auto kernel, int each) {
    const int threads = std::max(32, ceil_div(ceil_div(columns, each), 32) * 32);
    const int grid = std::min(std::max(1, out.most[0]), launch.multiprocessors * std::max(1, 2048 / threads));
    launch(kernel, dim3(grid), dim3(threads), 0, f, w.data, s, y, out.rows(), n, eps);
  };
  if (columns <= 2 * 512) fours ? run(norm_kernel<4, 2, F>, 2) : run(norm_kernel<1, 2, F>, 2);
  else if (columns <= 8 * 512) fours ? run(norm_kernel<4, 8, F>, 8) : run(norm_kernel<1, 8, F>, 8);
  else if (columns <= 64 * 512) fours ? run(norm_kernel<4, 64, F>, 64) : run(norm_kernel<1, 64, F>, 64);
  else throw std::runtime_error("norms of more than 32768 columns are not supported");
}

}  // namespace cuda
