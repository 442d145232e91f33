// Products of float32 activations with weights in any format, of any shape: what one is, and the kernels for all shapes.
#pragma once
#include "kernels.cuh"

namespace cuda {

// A matrix [n, k], or a stack of them, in device memory.
struct Matrix {
  const void* data;
  const f16* scales;
};
inline Matrix matrix_of(const Tensor& t) { return {t.data, static_cast<const f16*>(t.scales)}; }

// y = x w^T, or silu(x w^T) * (x up^T). Of a stack, `order` and `offsets` say which slots an expert has: its rows of x are slot / slots, its
// rows of y the slots.
struct Product {
  Dtype format;
  Matrix w, up;
  bool gated;
  const float* x;
  const float* bias;   // [n] of each matrix, or null
  const float* added;  // like y, or null; may be y
  float* y;
  const int32_t *order, *offsets;  // null if there is one matrix
  int32_t slots, experts, n, k;
  int32_t most;  // rows of y
  Size rows;     // rows of x
};

// For any shape and any number of rows.
void any_product(const Product& p, Launch& launch);

// For few rows, on tensor cores. False if the shape or the format does not allow it; nothing is launched then.
bool few_rows_product(const Product& p, Launch& launch);

// The faster of the two that applies.
inline void product(const Product& p, Launch& launch) {
  if (!few_rows_product(p, launch)) any_product(p, launch);
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

}  // namespace cuda
