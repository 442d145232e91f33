// A planned program, bound to weights and memory, ready to run. Reads the layout that src/graph/plan.ts writes.
#pragma once
#include <string>
#include <vector>

#include "threads.h"
#include "weights.h"

// Words of a value's record, and what its place may be, as in src/graph/plan.ts.
enum { PLACE, INDEX, DTYPE, RANK, DIMS, VALUE_WORDS = 12 };
enum { ARENA, WEIGHT, STATE, INPUT, OUTPUT };

struct Plan {
  std::vector<std::string> ops;
  std::vector<std::string> weights;  // names
  std::vector<int32_t> values, calls;
  std::vector<double> params;
  std::vector<int64_t> capacity;  // of each symbol
  size_t arena_bytes = 0;
  int inputs = 0, outputs = 0;
};

// Gives a tensor the shape that its record has with these sizes; returns its bytes (not those of INT8 weights).
size_t resize(Tensor& t, const int32_t* record, const std::vector<int64_t>& sizes);

// Memory that a run hands over.
struct Span {
  void* data;
  size_t bytes;
};

class Program {
 public:
  // Throws std::runtime_error: an op without a kernel, a weight that is missing or of another shape or format.
  // `weights` and `states` must outlive the program.
  Program(const Plan& plan, const KernelTable& kernels, const Weights& weights, const std::vector<Memory*>& states);

  // Throws std::runtime_error before anything runs (sizes over capacity, spans too short), or after, with what a kernel noted.
  void run(Team& team, const std::vector<int64_t>& sizes, const std::vector<Span>& inputs, const std::vector<Span>& outputs);

  // Seconds that each call took in all runs so far, its wait for the slowest thread included; in the order of the calls.
  const std::vector<double>& seconds() const { return seconds_; }

 private:
  struct Call {
    Kernel kernel;
    int inputs, outputs;
    const double* params;
    const int32_t* ids;
  };
  Plan plan_;
  Memory arena_;
  std::vector<Memory*> states_;
  std::vector<Tensor> tensors_;
  std::vector<Call> calls_;
  std::vector<double> seconds_;
};
