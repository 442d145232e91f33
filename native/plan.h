// A planned program, bound to weights and memory and ready to run. Reads the layout that src/graph/plan.ts writes; owns
// only its tables.
#pragma once
#include "layout.h"
#include "threads.h"
#include "weights.h"

// Sets a tensor's shape from its record and these sizes; returns its size in bytes (except for weights in block formats).
size_t resize(Tensor& t, const int32_t* record, const std::vector<int64_t>& sizes);

class Program {
 public:
  // Throws std::runtime_error if an op has no kernel, a weight is missing or has another shape or format, or the plan
  // refers beyond its own tables. `weights` and `states` must outlive the program.
  Program(const Plan& plan, const KernelTable& kernels, const Weights& weights, const std::vector<Memory*>& states);

  // Runs the calls with these indices, in this order. Values in the arena live in `workspace`, of at least arena_bytes(),
  // and do not outlive the run. Throws std::runtime_error before anything runs (sizes over capacity, memory missing or too
  // small), or afterwards: if the files of the weights have changed meanwhile, or with the first failure that a kernel reported.
  void run(Team& team, const Memory& workspace, const std::vector<int64_t>& sizes, const std::vector<Span>& inputs, const std::vector<Span>& outputs,
           const std::vector<int32_t>& calls);

  size_t arena_bytes() const { return plan_.arena_bytes; }
  size_t call_count() const { return calls_.size(); }
  // Total seconds of each call over all runs, including waiting for the slowest thread; in the order of the calls.
  const std::vector<double>& seconds() const { return seconds_; }

 private:
  struct Call {
    Kernel kernel;
    int op, inputs, outputs;
    const double* params;
    const int32_t* ids;
  };
  const int32_t* record(size_t value) const { return &plan_.values[value * VALUE_WORDS]; }
  void check_record(size_t value);
  void bind_weight(size_t value, const Weights& weights);
  void bind_state(size_t value, const std::vector<Memory*>& states);
  void read_calls(const KernelTable& kernels);
  void place_values(const Memory& workspace, const std::vector<int64_t>& sizes, const std::vector<Span>& inputs, const std::vector<Span>& outputs);

  Plan plan_;
  const Weights& weights_;
  std::vector<Tensor> tensors_;
  std::vector<size_t> bytes_;              // of each value, in the current run
  std::vector<int32_t> changing_, views_;  // values placed again in each run; views come after their bases
  std::vector<std::vector<void*>> parts_;  // of stacked states
  std::vector<Call> calls_;
  std::vector<double> seconds_;
};
