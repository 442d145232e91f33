// Products of many rows: activations in BF16 or F16, computed on tensor cores in large tiles. See gemm.cu.
#pragma once
#include "kernels.cuh"

namespace cuda {

void gemm_linear(const Operands& o, Launch& launch);
void gemm_gated_linear(const Operands& o, Launch& launch);
void gemm_grouped_linear(const Operands& o, Launch& launch);
void gemm_grouped_gated_linear(const Operands& o, Launch& launch);

}  // namespace cuda
