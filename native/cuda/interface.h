// The C interface of the CUDA library: all that the addon knows of it. Both are built from one source tree; `version` tells a stale one.
// Functions that return int or a pointer return nonzero or null on failure; `error` then has the message, for the calling thread.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int32_t CUDA_INTERFACE_VERSION = 1;

struct CudaCard {
  char name[256];
  int32_t index, major, minor, multiprocessors;
  uint64_t total, free;    // bytes of memory
  char refused[256];       // why the backend cannot use it; empty if it can
};

// A matrix, or a stack of them, or a vector (n = 1); or a cache (dims) of a dtype.
struct CudaShape {
  int32_t dtype, rank;
  int64_t dims[4];
};

// Rows of bytes in a file, or in memory if `memory` is set.
struct CudaSource {
  const char* file;
  uint64_t offset, bytes;
  const void* memory;
  int32_t stored;  // dtype
};

struct CudaPlan {
  const char* const* ops;
  const int32_t* values;
  const int32_t* calls;
  const double* params;
  const int64_t* capacity;
  struct CudaMemory* const* weights;
  struct CudaMemory* const* states;
  size_t op_count, value_words, call_words, param_count, symbol_count, weight_count, state_count, arena_bytes;
};

struct CudaSpan {
  void* data;  // null: not given, or not wanted
  size_t bytes;
};

struct CudaLimits {
  double copy_bytes, read_bytes, bf16_flops, fp8_flops;  // per second
};

struct CudaDevice;
struct CudaMemory;
struct CudaProgram;

struct CudaInterface {
  int32_t version;
  const char* (*error)();
  // Driver and runtime versions as 1000 * major + 10 * minor.
  int (*versions)(int32_t* driver, int32_t* runtime);
  int (*count)(int32_t* cards);
  int (*card)(int32_t index, CudaCard* card);
  CudaDevice* (*open)(int32_t index);
  // Nothing of the device may be in use.
  void (*close)(CudaDevice*);
  int (*memory)(CudaDevice*, uint64_t* free, uint64_t* total);
  int (*limits)(CudaDevice*, CudaLimits*);
  // Time each call instead of replaying graphs.
  void (*profile)(CudaDevice*, int32_t on);
  // Memory on the card, zeroed.
  CudaMemory* (*allocate)(CudaDevice*, const CudaShape*);
  void (*release)(CudaMemory*);
  uint64_t (*bytes)(const CudaMemory*);
  // Fills the parts of a matrix or stack from files, converting and repacking on the card. Returns when they are there. `done` is
  // called from time to time, from any thread, with the bytes copied since the last call; if it returns nonzero, loading stops with an error.
  int (*load)(CudaDevice*, CudaMemory* const* to, const CudaSource* const* parts, const size_t* part_counts, const char* const* names, size_t count,
              int32_t (*done)(void* context, uint64_t bytes), void* context);
  // Copies from and to memory whose layout is plain (float32 states).
  int (*read)(CudaMemory*, uint64_t offset, void* to, uint64_t bytes);
  int (*write)(CudaMemory*, uint64_t offset, const void* from, uint64_t bytes);
  // Whether there is a kernel for an op; null after the last.
  const char* (*op)(size_t index);
  CudaProgram* (*prepare)(CudaDevice*, const CudaPlan*);
  void (*discard)(CudaProgram*);
  int (*run)(CudaProgram*, const int64_t* sizes, const CudaSpan* inputs, size_t input_count, const CudaSpan* outputs, size_t output_count, const int32_t* calls, size_t call_count);
  // Seconds of each call over all profiled runs; `count` of them.
  const double* (*seconds)(const CudaProgram*, size_t* count);
};

extern "C" __attribute__((visibility("default"))) const CudaInterface* mixtape_cuda();
