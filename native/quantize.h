// Rows of weights into block formats and back: those of src/tensor/quantized.ts, and GGUF's. Knows no files.
#pragma once
#include "kernels.h"

// Writes row r of a matrix with k columns. Columns beyond k become zero.
void quantize_row(uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, const float* row);
void expand_row(const uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, float* row);
// The same for GGUF's formats, where k is a multiple of 32.
constexpr int64_t gguf_block_bytes(Dtype dtype) { return dtype == Q8_0 ? 34 : 18; }
void pack_row(uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, const float* row);
void unpack_row(const uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, float* row);
// Takes the numbers and scales of row r over as they are, between INT8 and Q8_0 or INT4 and Q4_0. False, and nothing
// written, where that can't be: a group of INT8 has one scale for 64 numbers from -127, Q8_0 has one for 32 from -128.
bool take_row(const uint8_t* from, Dtype stored, uint8_t* to, Dtype dtype, int64_t r, int64_t k);
// Repeatable noise of row r: the same whatever else is made.
void random_row(uint64_t seed, uint64_t r, float deviation, float* row, int64_t k);
