// The interface of kernels: tensors, a call's operands, and the worker's place in the thread team. Knows no kernel and no Node.
#pragma once
#include <atomic>
#include <cstdint>

// Names and codes are compared with those of src/backend/addon.ts when the addon loads. The last two are GGUF's formats
// (blocks of 32 numbers, row by row), which occur only in files; no kernel reads them.
#define DTYPES(_) \
  _(F32, 0, "f32") _(F16, 1, "f16") _(BF16, 2, "bf16") _(I32, 3, "i32") _(INT8, 4, "int8") _(INT8ROW, 5, "int8row") _(INT4, 6, "int4") \
  _(BF16PAIR, 7, "bf16pair") _(INT8KV, 8, "int8kv") _(FP8, 9, "fp8") _(FP8KV, 10, "fp8kv") _(Q8_0, 100, "q8_0") _(Q4_0, 101, "q4_0")
#define ENUMERATOR(id, code, name) id = code,
enum Dtype : int32_t { DTYPES(ENUMERATOR) };
#undef ENUMERATOR

struct Tensor {
  void* data;           // first (or only) part
  void* const* parts;   // stacked matrices: one pointer for each of dims[0]; null otherwise
  Dtype dtype;
  int32_t rank;
  int64_t dims[4];

  template <class T> T* as() const { return static_cast<T*>(data); }
  int64_t rows() const { return dims[0]; }
  // Number of elements in all axes after the first.
  int64_t width() const {
    int64_t n = 1;
    for (int i = 1; i < rank; i++) n *= dims[i];
    return n;
  }
};

// All threads of a team run each kernel at the same time; `index` determines a thread's share.
struct Barrier;
// Memory that each thread has for itself while a kernel runs; the others can see it.
constexpr int64_t SCRATCH_BYTES = 4 << 20;
struct Worker {
  int index, count;
  Barrier* barrier;
  uint8_t* scratch;  // of all threads, one after another
  float* scratch_of(int thread) const { return reinterpret_cast<float*>(scratch + thread * SCRATCH_BYTES); }
  void wait() const;  // until every worker of the team has called it
  // Marks this run as failed (the first message wins). The run continues; its caller gets the message.
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

// Loops that measure an upper bound of any kernel's speed (native/machine.cpp).
struct LimitKernels {
  using Loop = float (*)(int64_t turns);
  float (*read)(const uint8_t* data, int64_t bytes);  // in chunks of 4 KiB
  Loop int8, float32;
  int64_t int8_ops, float_ops;  // operations per turn
};

// One table per instruction set; a null name ends its entries.
struct KernelTable {
  const char* isa;
  const KernelEntry* entries;
  LimitKernels limits;
};

// Tokens per block of the paged KV cache; a multiple of every lane count. Compared with src/backend/backend.ts when the addon loads.
constexpr int BLOCK_TOKENS = 32;

// Columns of the sampling controls; their names are compared like the dtypes.
#define SAMPLING_FLOATS(_) \
  _(TEMPERATURE, "temperature") _(TOP_P, "topP") _(MIN_P, "minP") _(REPETITION, "repetitionPenalty") _(PRESENCE, "presencePenalty") \
  _(FREQUENCY, "frequencyPenalty")
#define SAMPLING_INTS(_) \
  _(TOP_K, "topK") _(NGRAM, "noRepeatNgram") _(SEED_LOW, "seedLow") _(SEED_HIGH, "seedHigh") _(STEP, "step") _(HISTORY_START, "historyStart") \
  _(HISTORY_COUNT, "historyCount") _(PROMPT_COUNT, "promptCount") _(BIAS_START, "biasStart") _(BIAS_COUNT, "biasCount") _(MASK, "mask")
#define ENUMERATOR(id, name) id,
namespace sampling {
enum { SAMPLING_FLOATS(ENUMERATOR) FLOATS };
enum { SAMPLING_INTS(ENUMERATOR) INTS };
}  // namespace sampling
#undef ENUMERATOR

// Block formats, as in src/tensor/quantized.ts.
constexpr int TILE_ROWS = 16, GROUP = 64, HALF = 32;
constexpr int INT8_BLOCK_BYTES = TILE_ROWS * GROUP + TILE_ROWS * 2, INT4_BLOCK_BYTES = TILE_ROWS * GROUP / 2 + TILE_ROWS * 4;
constexpr int INT8_ROW_GROUP_BYTES = GROUP + 16;  // of activations: bytes, scale, three corrections
constexpr int block_bytes(Dtype dtype) { return dtype == INT8 ? INT8_BLOCK_BYTES : INT4_BLOCK_BYTES; }
constexpr int64_t groups_of(int64_t k) { return (k + GROUP - 1) / GROUP; }
constexpr int64_t int8_row_bytes(int64_t k) { return groups_of(k) * INT8_ROW_GROUP_BYTES; }
// A cached key or value of `dim` numbers.
constexpr int64_t int8_kv_bytes(int64_t dim) { return groups_of(dim) * (GROUP + 4); }
