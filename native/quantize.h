// Converts rows of weights to and from block formats: those of src/tensor/quantized.ts, and GGUF's. Knows no files.
#pragma once
#include "kernels.h"

// Whether weights of this format are in our blocks, and the size of one: FP8 has the blocks of INT8, with other numbers.
constexpr bool in_blocks(Dtype dtype) { return dtype == INT8 || dtype == INT4 || dtype == FP8; }
constexpr int weight_block_bytes(Dtype dtype) { return dtype == INT4 ? INT4_BLOCK_BYTES : INT8_BLOCK_BYTES; }

// The largest number that FP8 can hold: the largest E4M3 number times the largest scale.
constexpr float FP8_MOST = 448.f * 61440.f;

// Writes row r of a matrix with k columns. Columns beyond k become zero.
void quantize_row(uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, const float* row);
// Writes the group of columns from `from` on (64 for INT8, 32 for INT4) of row r; groups of a row in order.
void write_group(uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, int64_t from, float scale, const int8_t* q);
void expand_row(const uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, float* row);
// The same for GGUF's formats; k must be a multiple of 32.
constexpr int64_t gguf_block_bytes(Dtype dtype) { return dtype == Q8_0 ? 34 : 18; }
void pack_row(uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, const float* row);
void unpack_row(const uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, float* row);
// Repacks row r between INT8 and Q8_0 or INT4 and Q4_0 without rounding. Returns false and writes nothing if that is
// impossible: INT8 has one scale per 64 numbers from -127 up, Q8_0 one per 32 numbers from -128 up.
bool take_row(const uint8_t* from, Dtype stored, uint8_t* to, Dtype dtype, int64_t r, int64_t k);
// Repeatable noise for row r, independent of what else is generated.
void random_row(uint64_t seed, uint64_t r, float deviation, float* row, int64_t k);
