// The interface of CUDA kernels: values in device memory, a call's operands, and launching. Knows no kernel and no Node.
//
// A program is captured into a CUDA graph once and replayed, so nothing that changes between steps may be an argument of a kernel: sizes
// are read from device memory, grids are made for the largest sizes of the graph, and blocks beyond the actual size return. Every kernel
// is launched with programmatic dependent launch: a block may begin while the kernel before it still runs. So EVERY block of EVERY
// kernel calls `await_inputs()` before it reads or writes anything but weights and sizes, and before it returns.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

// A size of the current run: `times`, times a number in device memory if there is one. Constant while a graph runs.
struct Size {
  int32_t times;
  const int32_t* of;
  __device__ __forceinline__ int32_t get() const { return of ? times * *of : times; }
};

// A value. Rows are contiguous. Matrices in block formats are repacked when they are loaded, kp = k rounded up to a multiple of 64, and
// the matrices of a stack [experts, n, k] follow one another without gaps, data and scales alike:
//   INT8   data int8 [n, kp], -127 to 127; scales half [n, kp / 64]
//   INT4   data [n, kp / 2 bytes]; scales half [n, kp / 32]. Of eight columns c .. c + 7, a 32-bit word: columns c, c + 2, c + 4, c + 6 in
//          the nibbles 0 to 3 (lowest first) and c + 1, c + 3, c + 5, c + 7 in the nibbles 4 to 7, so that (word >> 4 i) & 0x000f000f is the
//          pair c + 2 i, c + 2 i + 1. A nibble is 8 + an integer from -8 to 7.
//   FP8    data e4m3 [n, kp]; scales half [n, kp / 64]
// Columns from k on are zero (INT4: 8). Floats have no padding; their data is aligned to 256 bytes, rows are not padded.
// Caches are [blocks, heads, BLOCK_TOKENS, dim], keys and values alike; in INT8KV, dim is padded to dp, a multiple of 64, and what belongs to a
// block and head is int8 [BLOCK_TOKENS, dp] followed by float scales [BLOCK_TOKENS, dp / 64]. FP8KV is e4m3 without scales.
struct Tensor {
  void* data;
  void* scales;  // of INT8, INT4 and FP8
  Dtype dtype;
  int32_t rank;
  int32_t most[4];  // the largest sizes in this graph
  Size dims[4];

  template <class T> T* as() const { return static_cast<T*>(data); }
  Size rows() const { return dims[0]; }
  // Elements of all axes after the first, which are constant.
  int32_t width() const {
    int32_t n = 1;
    for (int i = 1; i < rank; i++) n *= most[i];
    return n;
  }
};

// What a kernel found wrong, in device memory; the first wins. The run continues, and its caller gets the message.
enum class Fault : int32_t { NONE, TOKEN_ID, ROW_INDEX, EXPERT, PAGE };
struct FaultRecord {
  int32_t fault;
  int32_t value, limit;
};

class Launch {
 public:
  cudaStream_t stream;
  int architecture;     // 80, 90, ...; kernels for 90 need sm_90a
  int multiprocessors;
  FaultRecord* faults;  // device memory

  // Device memory for this call alone, 256-byte aligned, not initialised. May be called several times.
  virtual void* scratch(size_t bytes) = 0;
  // `count` integers in device memory that are zero when a kernel starts, and which it must leave zero.
  virtual int32_t* counters(int64_t count) = 0;
  // A tensor map for a two-dimensional row-major array: see cuTensorMapEncodeTiled. Throws if the driver refuses it. `map` is a CUtensorMap.
  virtual void tensor_map(void* map, int type, void* data, uint64_t columns, uint64_t rows, uint64_t pitch_bytes, uint32_t box_columns, uint32_t box_rows, int swizzle) = 0;

  // Launches a kernel after the one before it. Throws std::runtime_error if that fails.
  template <class... P, class... A>
  void operator()(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A&&... args) {
    if (!grid.x || !grid.y || !grid.z) return;
    if (shared > 48 << 10) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = architecture >= 90 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
  }

  static void check(cudaError_t e) {
    if (e != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(e));
  }

 protected:
  ~Launch() = default;
};

struct Operands {
  const Tensor* values;
  const int32_t* ids;  // inputs, then outputs
  int inputs, outputs;
  const double* params;
  const Tensor& in(int i) const { return values[ids[i]]; }
  const Tensor& out(int i) const { return values[ids[inputs + i]]; }
  bool has(int i) const { return i < inputs; }
};

using Kernel = void (*)(const Operands&, Launch&);

struct Entry {
  const char* op;
  Kernel run;
};

// Waits until the results of earlier kernels are visible.
__device__ __forceinline__ void await_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the blocks of the next kernel start as soon as there is room for them. Call it early: they wait for this kernel's end by themselves.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void report(FaultRecord* record, Fault fault, int32_t value, int32_t limit) {
  if (atomicCAS(&record->fault, 0, static_cast<int32_t>(fault)) == 0) {
    record->value = value;
    record->limit = limit;
  }
}

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Each file of kernels ends with its entries.
extern const Entry ELEMENTWISE[], MATRIX[], EXPERTS[], ATTENTION[], SAMPLING[];

}  // namespace cuda
