// Hopper's products with matrices in 16 bits, and the choice among formats.
#include "gemm_hopper.cuh"

namespace cuda::gemm {

void run_hopper_int8(const Product&, Launch&, int64_t most_rows);
void run_hopper_int4(const Product&, Launch&, int64_t most_rows);
void run_hopper_fp8(const Product&, Launch&, int64_t most_rows);

bool run_hopper(const Product& p, Launch& launch, int64_t most_rows) {
  // Rows of scales, copied in pieces of 16 bytes, must be whole pieces.
  const int unit = p.format == BF16 || p.format == F16 ? 64 : p.format == INT4 ? 256 : 512;
  if (p.k % unit || p.experts > 256) return false;
  switch (p.format) {
    case BF16: return run_hopper_format<BF16>(p, launch, most_rows), true;
    case F16: return run_hopper_format<F16>(p, launch, most_rows), true;
    case INT8: return run_hopper_int8(p, launch, most_rows), true;
    case INT4: return run_hopper_int4(p, launch, most_rows), true;
    case FP8: return run_hopper_fp8(p, launch, most_rows), true;
    default: return false;
  }
}

}  // namespace cuda::gemm
