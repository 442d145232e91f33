// Rounds matrices to INT4 so that their products with given inputs change little: errors are compensated by the columns that are
// rounded later (GPTQ, https://arxiv.org/abs/2210.17323, in the form of LDLQ, https://arxiv.org/abs/2307.13304). Knows no files and no Node.
#pragma once
#include <cstdint>
#include <vector>

// Columns of a matrix with k columns, padded to whole groups of 64.
int64_t padded_columns(int64_t k);

// Adds to `moments`, a square of padded columns, the sum of x x^T over `count` rows of x [.., k], its lower triangle: the rows
// numbered in `rows`, each times its share (null: 1).
void add_moments(const float* x, const int32_t* rows, const float* shares, int64_t count, int64_t k, float* moments);

// How the columns of matrices that see the same inputs make up for each other's errors, and in which order they are rounded.
class Compensation {
 public:
  // Throws std::runtime_error if a moment is not finite.
  Compensation(const std::vector<float>& moments, int64_t k);
  // Rounds 16 rows of a matrix, [16, k], and writes them as its tile number `tile`.
  void round_tile(uint8_t* matrix, int64_t tile, const float* rows) const;

 private:
  int64_t k_, padded_;
  std::vector<int32_t> order_;   // the column at each place
  std::vector<float> weight_;    // by place: the cost of a squared error that the places after it can't make up for
  std::vector<float> carried_;   // for each 32 places from g on: [g + 32, 32], how errors of the places before move their targets
};
