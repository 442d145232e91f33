// Products with weight matrices and rows of tables: the ops, and which kernels compute them. Activations in float32 are never rounded (products.cu,
// rows.cu); those in BF16 or F16 go through large tiles (gemm.cu).
#include "matrix.cuh"

#include "formats.cuh"
#include "gemm.cuh"

namespace cuda {
namespace {

// A block copies a row of a table, in float32.
template <class F>
__global__ void __launch_bounds__(256) embed_rows(const int32_t* ids, Size rows, Matrix table, int32_t n, int32_t width, float* y, FaultRecord* faults) {
  let_next_start();
  await_inputs();
  const int32_t columns = F::columns(width);
  for (int64_t r = blockIdx.x; r < rows.get(); r += gridDim.x) {
    const int32_t id = ids[r];
    const bool known = id >= 0 && id < n;
    if (!known && threadIdx.x == 0 && blockIdx.y == 0) report(faults, Fault::TOKEN_ID, id, n);
    for (int32_t c = blockIdx.y * blockDim.x + threadIdx.x; c < width; c += gridDim.y * blockDim.x) y[r * width + c] = known ? F::one(table, id, c, columns) : 0.f;
  }
}

void embed(const Operands& o, Launch& launch) {
  const Tensor &ids = o.in(0), &table = o.in(1), &y = o.out(0);
  const int32_t n = table.most[0], width = table.most[1];
  with_format(table.dtype, [&](auto format) {
    using F = decltype(format);
    const int rows = ids.most[0] < 65535 ? ids.most[0] : 65535;
    launch(embed_rows<F>, dim3(rows, rows > 64 ? 1 : ceil_div(width, 256)), 256, 0, ids.as<int32_t>(), ids.rows(), matrix_of(table), n, width, y.as<float>(), launch.faults);
  });
}

bool is_f32(const Tensor& t) { return t.dtype == F32; }

void linear(const Operands& o, Launch& launch) {
  if (!is_f32(o.in(0))) return gemm_linear(o, launch);
  Product p = linear_product(o.in(0), o.in(1), o.out(0));
  if (o.has(2)) p.bias = o.in(2).as<float>();
  product(p, launch);
}

// x w^T + y; the result may replace y.
void add_linear(const Operands& o, Launch& launch) {
  Product p = linear_product(o.in(0), o.in(1), o.out(0));
  p.added = o.in(2).as<float>();
  product(p, launch);
}

void gated_linear(const Operands& o, Launch& launch) {
  if (!is_f32(o.in(0))) return gemm_gated_linear(o, launch);
  product(gated_product(o.in(0), o.in(1), o.in(2), o.out(0)), launch);
}

// (x, w, order, offsets) with w at 1, or gate and up at 1 and 2.
Product grouped_product(const Operands& o, bool gated) {
  const Tensor &x = o.in(0), &w = o.in(1), &order = o.in(gated ? 3 : 2), &offsets = o.in(gated ? 4 : 3), &y = o.out(0);
  return {w.dtype, matrix_of(w), gated ? matrix_of(o.in(2)) : Matrix{}, gated, x.as<float>(), nullptr, nullptr, y.as<float>(),
          order.as<int32_t>(), offsets.as<int32_t>(), static_cast<int32_t>(o.params[0]), w.most[0], w.most[1], w.most[2], order.most[0], x.rows()};
}

void grouped_linear(const Operands& o, Launch& launch) {
  if (!is_f32(o.in(0))) return gemm_grouped_linear(o, launch);
  Product p = grouped_product(o, false);
  if (o.has(4)) p.bias = o.in(4).as<float>();
  product(p, launch);
}

void add_grouped_linear(const Operands& o, Launch& launch) {
  Product p = grouped_product(o, false);
  p.added = o.in(4).as<float>();
  product(p, launch);
}

void grouped_gated_linear(const Operands& o, Launch& launch) {
  if (!is_f32(o.in(0))) return gemm_grouped_gated_linear(o, launch);
  product(grouped_product(o, true), launch);
}

}  // namespace

const Entry MATRIX[] = {
    {"embed", embed},
    {"linear", linear},
    {"addLinear", add_linear},
    {"linearAdd", add_linear},
    {"gatedLinear", gated_linear},
    {"groupedLinear", grouped_linear},
    {"addGroupedLinear", add_grouped_linear},
    {"groupedGatedLinear", grouped_gated_linear},
    {"qkvRope", qkv_rope},
    {"expertsGated", experts_gated},
    {"expertsDown", experts_down},
    {nullptr, nullptr},
};

}  // namespace cuda
