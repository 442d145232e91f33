// Rows of weights into the block formats of src/tensor/quantized.ts and back. Knows no files.
#pragma once
#include "kernels.h"

// Writes row r of a matrix with k columns. Columns beyond k become zero.
void quantize_row(uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, const float* row);
void expand_row(const uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, float* row);
// Repeatable noise of row r: the same whatever else is made.
void random_row(uint64_t seed, uint64_t r, float deviation, float* row, int64_t k);
