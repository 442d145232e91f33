// A card: its stream, and the memory that all programs share because steps run one at a time. Knows no ops and no plans.
#pragma once
#include <cstring>
#include <mutex>
#include <set>
#include <vector>

#include "interface.h"
#include "kernels.cuh"

namespace cuda {

// What cannot be fixed by trying again; the message says what was seen and what to do.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  cudaGetLastError();  // errors that are not sticky must not be found by the next call
  throw Error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(e));
}

// Memory on the card. Throws Error with the bytes needed and free if there is not enough.
class Block {
 public:
  Block() = default;
  explicit Block(size_t bytes);
  ~Block();
  Block(Block&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr, other.bytes_ = 0; }
  Block& operator=(Block&& other) noexcept {
    std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    return *this;
  }
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// Page-locked memory of the host.
class Pinned {
 public:
  Pinned() = default;
  explicit Pinned(size_t bytes);
  ~Pinned();
  Pinned(Pinned&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr, other.bytes_ = 0; }
  Pinned& operator=(Pinned&& other) noexcept {
    std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    return *this;
  }
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// Bytes of a row-major array, block formats and caches included, and of the scales behind it.
size_t data_bytes(const CudaShape& shape);
size_t scale_bytes(const CudaShape& shape);

}  // namespace cuda

struct CudaDevice {
  explicit CudaDevice(int32_t index);
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;

  // Makes this the calling thread's device.
  void use() const { cuda::check(cudaSetDevice(index), "cudaSetDevice"); }
  // Memory of at least this size that all programs share. Growing it gives it another address, so captured graphs are no longer valid: `generation`
  // changes. Only between steps.
  void grow(cuda::Block& block, size_t bytes);

  const int32_t index;
  cudaDeviceProp properties{};
  cudaStream_t stream = nullptr;
  cuda::Block workspace, inputs, outputs, scratch, counters;
  cuda::Pinned host_inputs, host_outputs;
  uint64_t generation = 1;
  bool profiling = false;
  std::mutex lock;  // of `workspaces`
  std::multiset<size_t> workspaces;  // what the prepared programs need
};

// Weights or a state.
struct CudaMemory {
  CudaMemory(CudaDevice* device, const CudaShape& shape);

  CudaDevice* const device;
  const CudaShape shape;
  cuda::Block data, scales;
};
