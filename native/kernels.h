// What a kernel sees: tensors, a call's operands, and its place in the thread team. Knows no kernel and no Node.
#pragma once
#include <atomic>
#include <cstdint>

// Codes as in src/graph/plan.ts. Of GGUF's formats (32 numbers a block, row by row), which files hold and no kernel reads.
enum Dtype : int32_t { F32 = 0, F16 = 1, BF16 = 2, I32 = 3, INT8 = 4, INT8ROW = 5, INT4 = 6, BF16PAIR = 7, INT8KV = 8, Q8_0 = 100, Q4_0 = 101 };

struct Tensor {
  void* data;           // first (or only) part
  void* const* parts;   // stacked weights: one pointer for each of dims[0]; null otherwise
  Dtype dtype;
  int32_t rank;
  int64_t dims[4];

  template <class T> T* as() const { return static_cast<T*>(data); }
  int64_t rows() const { return dims[0]; }
  // Elements of everything behind the first axis.
  int64_t width() const {
    int64_t n = 1;
    for (int i = 1; i < rank; i++) n *= dims[i];
    return n;
  }
};

// All threads of a team run every kernel of a program side by side; a kernel takes the share of its `index`.
struct Barrier;
struct Worker {
  int index, count;
  Barrier* barrier;
  void wait() const;  // until every worker of the team has come here
  // Notes that this step failed (the first note wins); the step runs on, and its caller gets the message.
  void fail(const char* format, long long a, long long b) const;

  // This worker's share of n items: [begin, end), contiguous, in units of `unit` items.
  void share(int64_t n, int64_t unit, int64_t& begin, int64_t& end) const {
    int64_t units = (n + unit - 1) / unit;
    begin = units * index / count * unit;
    end = units * (index + 1) / count * unit;
    if (end > n) end = n;
    if (begin > end) begin = end;
  }
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

using Kernel = void (*)(const Operands&, const Worker&);

struct KernelEntry {
  const char* op;
  Kernel run;
};

// What an instruction set is best at, alone: how fast kernels could be at most (native/machine.cpp).
struct LimitKernels {
  using Loop = float (*)(int64_t turns);
  float (*read)(const uint8_t* data, int64_t bytes);  // in pieces of 4 KiB
  Loop int8, float32;
  int64_t int8_ops, float_ops;  // of one turn
};

// One table for each instruction set; its entries end with one of a null name.
struct KernelTable {
  const char* isa;
  const KernelEntry* entries;
  LimitKernels limits;
};

// Block formats, as in src/tensor/quantized.ts.
constexpr int TILE_ROWS = 16, GROUP = 64, HALF = 32;
constexpr int INT8_BLOCK_BYTES = TILE_ROWS * GROUP + TILE_ROWS * 2, INT4_BLOCK_BYTES = TILE_ROWS * GROUP / 2 + TILE_ROWS * 4;
constexpr int block_bytes(Dtype dtype) { return dtype == INT8 ? INT8_BLOCK_BYTES : INT4_BLOCK_BYTES; }
constexpr int64_t groups_of(int64_t k) { return (k + GROUP - 1) / GROUP; }
constexpr int64_t int8_row_bytes(int64_t k) { return groups_of(k) * (GROUP + 12); }
// A cached key or value of `dim` numbers.
constexpr int64_t int8_kv_bytes(int64_t dim) { return groups_of(dim) * (GROUP + 4); }
