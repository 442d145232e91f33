// Weights: mapped read-only from files, or copied if the requested format differs from the file's. Knows no ops and no Node.
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

struct FilePart {
  std::string file;
  uint64_t offset, bytes;
};

struct WeightSpec {
  std::string name;
  Dtype stored, dtype;
  std::vector<int64_t> shape;  // as seen by programs; stacked weights have shape[0] parts
  std::vector<FilePart> parts;
};

// Memory mapped from the system, initially zero, unmapped by the destructor.
class Memory {
 public:
  explicit Memory(size_t bytes);  // throws std::runtime_error with the size if out of memory
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_;
};

class Mapping;
class Residence;

class Weights {
 public:
  // Throws std::runtime_error if a file can't be opened or is shorter than its parts claim, if a tensor that is converted holds
  // a number that is not finite, or if out of memory.
  explicit Weights(const std::vector<WeightSpec>& specs);
  ~Weights();

  struct Weight {
    Dtype dtype;
    std::vector<int64_t> shape;
    std::vector<void*> parts;
  };
  const Weight* find(const std::string& name) const;
  // Throws std::runtime_error if the files have changed since they were mapped, and from then on for good. Only one thread
  // at a time may call this.
  void check() const;
  // Whether `check` has thrown.
  bool lost() const { return lost_; }
  // Moves what is mapped to huge pages; not started at first.
  Residence& residence() const { return *residence_; }
  // The memory behind all weights: ranges of addresses.
  std::vector<std::pair<const void*, size_t>> ranges() const;
  size_t mapped_bytes() const;
  size_t owned_bytes() const;

 private:
  std::vector<std::string> names_;
  std::vector<Weight> weights_;
  std::vector<std::unique_ptr<Mapping>> mappings_;
  std::vector<std::unique_ptr<Memory>> owned_;
  std::unique_ptr<Residence> residence_;  // ends before the mappings
  mutable std::atomic<bool> lost_{false};
  mutable std::string why_lost_;
};

// Size of [n, k] in `dtype`, in bytes.
size_t matrix_bytes(Dtype dtype, int64_t n, int64_t k);
// Converts [n, k] between formats, through float32. Throws std::runtime_error for a number that is not finite or too large
// for `dtype`, naming its row and column.
void convert_matrix(const uint8_t* from, Dtype stored, uint8_t* to, Dtype dtype, int64_t n, int64_t k);
// Fills [n, k] with repeatable noise of the given standard deviation, for measuring without a download.
void random_matrix(uint64_t seed, float deviation, uint8_t* to, Dtype dtype, int64_t n, int64_t k);
// Like convert_matrix, but from a file, for tools; errors name the file and the tensor.
void convert_file_part(const FilePart& part, const std::string& name, Dtype stored, uint8_t* to, Dtype dtype, int64_t n, int64_t k);
// A matrix of n rows to be rounded to INT4, and where to.
struct RoundedPart {
  FilePart part;
  std::string name;
  Dtype stored;
  int64_t n;
  uint8_t* to;
};
// Rounds matrices of k columns that all see the same inputs, given those: the rows of x [.., k] numbered in `rows`, each times its
// share (null: 1). `common`: moments (rounding.h) that stand in where there are few rows, or null. Errors name the file and the tensor.
void round_file_parts(const std::vector<RoundedPart>& parts, int64_t k, const float* x, const int32_t* rows, const float* shares, int64_t count, const float* common);
// Throws std::runtime_error if a number of the tensor is not finite.
void check_file_part(const FilePart& part, const std::string& name, Dtype stored, int64_t n, int64_t k);
