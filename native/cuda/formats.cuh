// Weights of each format, as float32 numbers: one at a time, or eight.
#pragma once
#include "products.cuh"

namespace cuda {

constexpr int32_t padded(int32_t k) { return (k + 63) / 64 * 64; }

// Numbers that are stored as they are. `columns` is the distance between rows.
template <class T>
struct Floats {
  static __host__ __device__ int32_t columns(int32_t k) { return k; }
  static __device__ __forceinline__ float one(const Matrix& m, int64_t row, int32_t c, int32_t columns) {
    return static_cast<float>(static_cast<const T*>(m.data)[row * columns + c]);
  }
  // Columns c .. c + 7, c a multiple of 8; only if rows are aligned to 16 bytes.
  static __device__ __forceinline__ void eight(const Matrix& m, int64_t row, int32_t c, int32_t columns, float* to) {
    alignas(16) T w[8];
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(m.data) + row * columns + c);
    for (size_t i = 0; i < sizeof w / 16; i++) reinterpret_cast<uint4*>(w)[i] = __ldg(from + i);
    for (int i = 0; i < 8; i++) to[i] = static_cast<float>(w[i]);
  }
};

template <class T>
struct Bytes {
  static __host__ __device__ int32_t columns(int32_t k) { return padded(k); }
  static __device__ __forceinline__ float one(const Matrix& m, int64_t row, int32_t c, int32_t columns) {
    const int64_t at = row * columns + c;
    return static_cast<float>(static_cast<const T*>(m.data)[at]) * __half2float(m.scales[at / 64]);
  }
  static __device__ __forceinline__ void eight(const Matrix& m, int64_t row, int32_t c, int32_t columns, float* to) {
    const int64_t at = row * columns + c;
    alignas(8) T w[8];
    *reinterpret_cast<uint2*>(w) = __ldg(reinterpret_cast<const uint2*>(static_cast<const T*>(m.data) + at));
    const float scale = __half2float(m.scales[at / 64]);
    for (int i = 0; i < 8; i++) to[i] = static_cast<float>(w[i]) * scale;
  }
};

struct Nibbles {
  static __host__ __device__ int32_t columns(int32_t k) { return padded(k); }
  static __device__ __forceinline__ float number(uint32_t word, int i) { return static_cast<float>(static_cast<int>(word >> (4 * (i / 2) + 16 * (i % 2)) & 15) - 8); }
  static __device__ __forceinline__ float one(const Matrix& m, int64_t row, int32_t c, int32_t columns) {
    const int64_t at = row * columns + c;
    return number(static_cast<const uint32_t*>(m.data)[at / 8], c % 8) * __half2float(m.scales[at / 32]);
  }
  static __device__ __forceinline__ void eight(const Matrix& m, int64_t row, int32_t c, int32_t columns, float* to) {
    const int64_t at = row * columns + c;
    const uint32_t word = __ldg(static_cast<const uint32_t*>(m.data) + at / 8);
    const float scale = __half2float(m.scales[at / 32]);
    for (int i = 0; i < 8; i++) to[i] = number(word, i) * scale;
  }
};

// Calls visit(format) with the reader of a dtype; throws for one that is no weight's.
template <class Visit>
void with_format(Dtype dtype, Visit visit) {
  switch (dtype) {
    case F32: return visit(Floats<float>{});
    case F16: return visit(Floats<f16>{});
    case BF16: return visit(Floats<bf16>{});
    case INT8: return visit(Bytes<int8_t>{});
    case FP8: return visit(Bytes<__nv_fp8_e4m3>{});
    case INT4: return visit(Nibbles{});
    default: throw std::runtime_error("internal: no CUDA kernel multiplies weights of dtype " + std::to_string(dtype));
  }
}

}  // namespace cuda
