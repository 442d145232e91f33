// Products with many rows: describes each op's product and chooses its kernel.
#include "gemm.cuh"

#include "gemm_tile.cuh"

namespace cuda {
namespace {

using gemm::Product;

// The product of x and matrices `first` (and, if `gated`, `first` + 1), the operands after which are order and offsets if it is grouped, then the bias.
void run(const Operands& o, Launch& launch, bool gated, bool grouped) {
  const Tensor &x = o.in(0), &w = o.in(1), &y = o.out(0);
  Product p{};
  p.x = x.data;
  for (int i = 0; i <= gated; i++) {
    p.w[i] = o.in(1 + i).data;
    p.scales[i] = static_cast<const __half*>(o.in(1 + i).scales);
  }
  int next = 2 + gated;
  p.experts = p.slots = 1;
  if (grouped) {
    p.order = o.in(next++).as<int32_t>();
    p.offsets = o.in(next++).as<int32_t>();
    p.experts = w.most[0];
    p.slots = static_cast<int32_t>(o.params[0]);
  }
  if (o.has(next)) p.bias = o.in(next).as<float>();
  p.y = y.data;
  p.format = w.dtype;
  p.out = y.dtype;
  p.rows = x.rows();
  p.n = w.most[w.rank - 2];
  p.k = w.most[w.rank - 1];
  p.kp = ceil_div(p.k, 64) * 64;
  p.gated = gated;
  p.splits = 1;
  const int64_t most_rows = static_cast<int64_t>(x.most[0]) * p.slots;
  if (launch.architecture != 90 || !gemm::run_hopper(p, launch, most_rows)) gemm::run_ampere(p, launch, most_rows);
}

}  // namespace

void gemm_linear(const Operands& o, Launch& launch) { run(o, launch, false, false); }
void gemm_gated_linear(const Operands& o, Launch& launch) { run(o, launch, true, false); }
void gemm_grouped_linear(const Operands& o, Launch& launch) { run(o, launch, false, true); }
void gemm_grouped_gated_linear(const Operands& o, Launch& launch) { run(o, launch, true, true); }

}  // namespace cuda
