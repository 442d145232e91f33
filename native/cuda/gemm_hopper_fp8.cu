// Hopper's products with matrices in FP8.
#include "gemm_hopper.cuh"

namespace cuda::gemm {
void run_hopper_fp8(const Product& p, Launch& launch, int64_t most_rows) { run_hopper_format<FP8>(p, launch, most_rows); }
}  // namespace cuda::gemm
