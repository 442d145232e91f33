// Products with many rows, of x in bfloat16 or float16, on the matrix units.
#pragma once
#include "kernels.cuh"

namespace cuda {

// x [rows, k] in BF16, or F16 with matrices in F16; w [n, k] in BF16, F16, INT8, INT4 or FP8; bias [n] in F32, if there is one. The result is
// F32, BF16 or F16. The others likewise, with the operands of the ops of the same names.
void gemm_linear(const Operands&, Launch&);
void gemm_gated_linear(const Operands&, Launch&);
void gemm_grouped_linear(const Operands&, Launch&);
void gemm_grouped_gated_linear(const Operands&, Launch&);

}  // namespace cuda
