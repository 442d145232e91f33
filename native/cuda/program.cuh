// A planned program on a card. Its calls are captured into a CUDA graph for each combination of wanted results and sizes (rounded up to powers
// of two), which later steps replay: copy the inputs in, launch the graph, copy the results out.
#pragma once
#include <list>
#include <map>

#include "../layout.h"
#include "device.cuh"

namespace cuda {
// All kernels, one after another; null after the last.
const Entry* entry(size_t index);
}  // namespace cuda

struct CudaProgram {
  CudaProgram(CudaDevice* device, const CudaPlan& plan);
  ~CudaProgram();
  CudaProgram(const CudaProgram&) = delete;

  // Throws cuda::Error before anything runs, or with what a kernel reported.
  void run(const int64_t* sizes, const CudaSpan* inputs, size_t input_count, const CudaSpan* outputs, size_t output_count, const int32_t* calls, size_t call_count);
  const std::vector<double>& seconds() const { return seconds_; }

 private:
  struct Call {
    cuda::Kernel kernel;
    int op, inputs, outputs;
    const double* params;
    const int32_t* ids;
  };
  // The program for some wanted results and some largest sizes: where its values are, and its graph.
  struct Instance {
    std::vector<int32_t> calls;
    std::vector<int64_t> most;         // of each symbol
    std::vector<size_t> input_at;      // byte offsets in the device's inputs; sizes come first
    std::vector<size_t> output_at;     // byte offsets in the device's outputs, behind the fault record; -1: not wanted
    size_t input_bytes = 0, output_bytes = 0;
    std::vector<cuda::Tensor> values;
    uint64_t generation = 0;
    cudaGraphExec_t graph = nullptr;
    ~Instance();
  };

  const int32_t* record(size_t value) const { return &values_[value * VALUE_WORDS]; }
  void check_record(size_t value) const;
  void read_calls(const CudaPlan& plan);
  size_t bytes_of(const int32_t* record, const std::vector<int64_t>& sizes) const;
  void lay_out(Instance& instance, const std::vector<bool>& given, const std::vector<bool>& wanted) const;
  void place(Instance& instance) const;
  void capture(Instance& instance);
  void launch(Instance& instance, cudaStream_t stream, bool timed);
  Instance& instance_for(const std::vector<int64_t>& sizes, const std::vector<bool>& given, const std::vector<bool>& wanted, const int32_t* calls, size_t call_count);

  CudaDevice* const device_;
  std::vector<std::string> ops_;
  std::vector<int32_t> values_, words_;
  std::vector<double> params_;
  std::vector<int64_t> capacity_;
  std::vector<CudaMemory*> weights_, states_;
  size_t arena_bytes_, input_count_ = 0, output_count_ = 0;
  std::vector<Call> calls_;
  std::vector<double> seconds_;
  std::list<std::pair<std::vector<int64_t>, Instance>> instances_;  // most recently used first; by wanted results, calls and sizes
};
