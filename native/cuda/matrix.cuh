// Ops of matrix.cu and their pieces in other files.
#pragma once
#include "products.cuh"

namespace cuda {

// x w^T with one matrix, to be completed.
inline Product linear_product(const Tensor& x, const Tensor& w, const Tensor& y) {
  return {w.dtype, matrix_of(w), {}, false, x.as<float>(), nullptr, nullptr, y.as<float>(), nullptr, nullptr, 1, 1, w.most[0], w.most[1], x.most[0], x.rows()};
}
inline Product gated_product(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& y) {
  Product p = linear_product(x, gate, y);
  p.up = matrix_of(up);
  p.gated = true;
  return p;
}

void experts_gated(const Operands& o, Launch& launch);
void experts_down(const Operands& o, Launch& launch);
void qkv_rope(const Operands& o, Launch& launch);

}  // namespace cuda
