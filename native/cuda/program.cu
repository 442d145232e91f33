#include "program.cuh"

#include <cuda.h>

#include <algorithm>

using cuda::Error;
using cuda::check;

namespace {

constexpr size_t ALIGNMENT = 256;
constexpr size_t MOST_INSTANCES = 96;
// Results up to this size are copied out together, in one transfer.
constexpr size_t SMALL_RESULTS = 64 << 10;
constexpr size_t NOWHERE = ~size_t{0};

size_t aligned(size_t n) { return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

[[noreturn]] void broken(const std::string& what) { throw Error("internal: " + what); }

// `op`, or `opToBf16` and `opToF16`: the same kernel, which looks at the format of its result.
cuda::Kernel find(std::string op) {
  for (const char* ending : {"ToBf16", "ToF16"})
    if (op.ends_with(ending)) op.resize(op.size() - std::strlen(ending));
  for (size_t i = 0; const cuda::Entry* e = cuda::entry(i); i++)
    if (op == e->op) return e->run;
  broken("the cuda backend has no kernel for the op '" + op + "'");
}

std::string message(const cuda::FaultRecord& r) {
  const std::string value = std::to_string(r.value), limit = std::to_string(r.limit);
  switch (static_cast<cuda::Fault>(r.fault)) {
    case cuda::Fault::TOKEN_ID: return "token id " + value + " is outside the vocabulary of " + limit;
    case cuda::Fault::ROW_INDEX: return "row " + value + " is outside the " + limit + " rows";
    case cuda::Fault::EXPERT: return "expert " + value + " is outside the " + limit + " experts";
    case cuda::Fault::PAGE: return "block " + value + " is outside the cache of " + limit + " blocks";
    case cuda::Fault::NONE: break;
  }
  return "internal: a kernel reported fault " + std::to_string(r.fault);
}

// Thrown while capturing when shared memory must grow first.
struct Grow {
  cuda::Block* block;
  size_t bytes;
};

class Launcher final : public cuda::Launch {
 public:
  Launcher(CudaDevice& device, cudaStream_t s) : device_(device) {
    stream = s;
    architecture = device.properties.major * 10 + device.properties.minor;
    multiprocessors = device.properties.multiProcessorCount;
    faults = reinterpret_cast<cuda::FaultRecord*>(device.outputs.data());
  }
  void next_call() { scratch_ = counters_ = 0; }

  void* scratch(size_t bytes) override { return take(device_.scratch, scratch_, bytes); }
  int32_t* counters(int64_t count) override { return static_cast<int32_t*>(take(device_.counters, counters_, static_cast<size_t>(count) * 4)); }
  void tensor_map(void* map, int type, void* data, uint64_t columns, uint64_t rows, uint64_t pitch_bytes, uint32_t box_columns, uint32_t box_rows, int swizzle) override {
    static const auto encode = [] {
      void* f = nullptr;
      cudaDriverEntryPointQueryResult found{};
      cuda::check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found), "cuTensorMapEncodeTiled");
      return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
    }();
    const cuuint64_t dims[] = {columns, rows}, strides[] = {pitch_bytes};
    const cuuint32_t box[] = {box_columns, box_rows}, steps[] = {1, 1};
    const CUresult r = encode(static_cast<CUtensorMap*>(map), static_cast<CUtensorMapDataType>(type), 2, data, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                              static_cast<CUtensorMapSwizzle>(swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) broken("the driver refuses a tensor map of " + std::to_string(rows) + " x " + std::to_string(columns) + " (" + std::to_string(r) + ")");
  }

 private:
  void* take(cuda::Block& block, size_t& used, size_t bytes) {
    const size_t at = used;
    used += aligned(bytes);
    if (used > block.bytes()) throw Grow{&block, used + used / 4};
    return block.data() + at;
  }
  CudaDevice& device_;
  size_t scratch_ = 0, counters_ = 0;
};

}  // namespace

const cuda::Entry* cuda::entry(size_t index) {
  for (const Entry* table : {ELEMENTWISE, MATRIX, EXPERTS, ATTENTION, SAMPLING})
    for (const Entry* e = table; e->op; e++)
      if (!index--) return e;
  return nullptr;
}

CudaProgram::Instance::~Instance() {
  if (graph) cudaGraphExecDestroy(graph);
}

CudaProgram::CudaProgram(CudaDevice* device, const CudaPlan& plan)
    : device_(device),
      ops_(plan.ops, plan.ops + plan.op_count),
      values_(plan.values, plan.values + plan.value_words),
      words_(plan.calls, plan.calls + plan.call_words),
      params_(plan.params, plan.params + plan.param_count),
      capacity_(plan.capacity, plan.capacity + plan.symbol_count),
      weights_(plan.weights, plan.weights + plan.weight_count),
      states_(plan.states, plan.states + plan.state_count),
      arena_bytes_(plan.arena_bytes) {
  if (values_.size() % VALUE_WORDS) broken("the plan's records have " + std::to_string(values_.size()) + " words, not a multiple of " + std::to_string(VALUE_WORDS));
  for (size_t i = 0; i < values_.size() / VALUE_WORDS; i++) {
    check_record(i);
    const int32_t* v = record(i);
    if (v[PLACE] == INPUT) input_count_ = std::max(input_count_, static_cast<size_t>(v[INDEX]) + 1);
    if (v[PLACE] == OUTPUT) output_count_ = std::max(output_count_, static_cast<size_t>(v[INDEX]) + 1);
    output_count_ = std::max(output_count_, static_cast<size_t>(v[OUT] + 1));
  }
  read_calls(plan);
  seconds_.resize(calls_.size());
  std::lock_guard guard(device_->lock);
  device_->workspaces.insert(arena_bytes_);
}

CudaProgram::~CudaProgram() {
  cudaSetDevice(device_->index);
  std::lock_guard guard(device_->lock);
  device_->workspaces.erase(device_->workspaces.find(arena_bytes_));
}

void CudaProgram::check_record(size_t i) const {
  const int32_t* v = record(i);
  const std::string label = "value " + std::to_string(i);
  const size_t count = values_.size() / VALUE_WORDS;
  if (v[RANK] < 0 || v[RANK] > 4) broken(label + " has rank " + std::to_string(v[RANK]) + ", at most 4 fit a record");
  for (int d = 0; d < v[RANK]; d++)
    if (v[DIMS + 2 * d] < 0 || v[DIMS + 2 * d + 1] < -1 || v[DIMS + 2 * d + 1] >= static_cast<int32_t>(capacity_.size())) broken(label + " has a malformed size");
  if (v[INDEX] < 0 || v[OFFSET] < 0) broken(label + " has a negative index or offset");
  const auto index = static_cast<size_t>(v[INDEX]);
  if (v[PLACE] == ARENA) {
    const size_t begin = index * ARENA_UNIT;
    if (begin > arena_bytes_ || bytes_of(v, capacity_) > arena_bytes_ - begin) broken(label + " ends beyond the workspace of " + std::to_string(arena_bytes_) + " bytes");
  } else if (v[PLACE] == VIEW) {
    if (index >= count || record(index)[PLACE] == VIEW || record(index)[PLACE] == UNUSED) broken(label + " is a view of a value that has no memory of its own");
  } else if (v[PLACE] == WEIGHT || v[PLACE] == STATE) {
    const auto& list = v[PLACE] == WEIGHT ? weights_ : states_;
    if (index >= list.size()) broken(label + " is weight or state " + std::to_string(index) + " of " + std::to_string(list.size()));
    const CudaShape& shape = list[index]->shape;
    bool fits = shape.dtype == v[DTYPE] && shape.rank == v[RANK];
    for (int d = 0; fits && d < v[RANK]; d++) fits = v[DIMS + 2 * d + 1] < 0 && shape.dims[d] == v[DIMS + 2 * d];
    if (!fits) broken(label + " was loaded in another shape or format");
  } else if (v[PLACE] < 0 || v[PLACE] > UNUSED) {
    broken(label + " has the place " + std::to_string(v[PLACE]));
  }
}

void CudaProgram::read_calls(const CudaPlan&) {
  std::vector<cuda::Kernel> table;
  for (const std::string& op : ops_) table.push_back(find(op));
  for (size_t i = 0; i < words_.size();) {
    const int32_t* c = &words_[i];
    const size_t left = words_.size() - i;
    const bool whole = left >= 4 && c[1] >= 0 && c[2] >= 0 && left - 4 >= static_cast<size_t>(c[1]) + static_cast<size_t>(c[2]);
    if (!whole || c[0] < 0 || static_cast<size_t>(c[0]) >= table.size() || c[3] < 0 || static_cast<size_t>(c[3]) > params_.size()) broken("call " + std::to_string(calls_.size()) + " of the plan is malformed");
    for (int k = 0; k < c[1] + c[2]; k++)
      if (c[4 + k] < 0 || static_cast<size_t>(c[4 + k]) >= values_.size() / VALUE_WORDS || record(static_cast<size_t>(c[4 + k]))[PLACE] == UNUSED)
        broken("call " + std::to_string(calls_.size()) + " (" + ops_[static_cast<size_t>(c[0])] + ") refers to a value that has no place");
    calls_.push_back({table[static_cast<size_t>(c[0])], c[0], c[1], c[2], params_.data() + c[3], c + 4});
    i += 4 + static_cast<size_t>(c[1]) + static_cast<size_t>(c[2]);
  }
}

size_t CudaProgram::bytes_of(const int32_t* v, const std::vector<int64_t>& sizes) const {
  CudaShape s{v[DTYPE], v[RANK], {}};
  for (int d = 0; d < s.rank; d++) {
    const int32_t symbol = v[DIMS + 2 * d + 1];
    s.dims[d] = static_cast<int64_t>(v[DIMS + 2 * d]) * (symbol < 0 ? 1 : sizes[static_cast<size_t>(symbol)]);
  }
  return cuda::data_bytes(s);
}

// Where inputs and wanted results are in the device's staging memory.
void CudaProgram::lay_out(Instance& instance, const std::vector<bool>& given, const std::vector<bool>& wanted) const {
  instance.input_at.assign(input_count_, NOWHERE);
  instance.output_at.assign(output_count_, NOWHERE);
  size_t in = aligned(capacity_.size() * sizeof(int32_t)), out = aligned(sizeof(cuda::FaultRecord));
  for (size_t i = 0; i < values_.size() / VALUE_WORDS; i++) {
    const int32_t* v = record(i);
    if (v[PLACE] == INPUT && given[static_cast<size_t>(v[INDEX])]) {
      instance.input_at[static_cast<size_t>(v[INDEX])] = in;
      in += aligned(bytes_of(v, instance.most));
    }
    const int32_t o = v[PLACE] == OUTPUT ? v[INDEX] : v[OUT];
    if (o >= 0 && wanted[static_cast<size_t>(o)]) {
      instance.output_at[static_cast<size_t>(o)] = out;
      out += aligned(bytes_of(v, instance.most));
    }
  }
  instance.input_bytes = in;
  instance.output_bytes = out;
}

void CudaProgram::place(Instance& instance) const {
  const auto* sizes = reinterpret_cast<const int32_t*>(device_->inputs.data());
  const size_t count = values_.size() / VALUE_WORDS;
  instance.values.assign(count, cuda::Tensor{});
  for (size_t i = 0; i < count; i++) {
    const int32_t* v = record(i);
    cuda::Tensor& t = instance.values[i];
    t.dtype = static_cast<Dtype>(v[DTYPE]);
    t.rank = v[RANK];
    for (int d = 0; d < t.rank; d++) {
      const int32_t symbol = v[DIMS + 2 * d + 1];
      t.dims[d] = {v[DIMS + 2 * d], symbol < 0 ? nullptr : sizes + symbol};
      const int64_t most = static_cast<int64_t>(v[DIMS + 2 * d]) * (symbol < 0 ? 1 : instance.most[static_cast<size_t>(symbol)]);
      if (most > INT32_MAX) broken("a size of " + std::to_string(most) + " does not fit in 32 bits");
      t.most[d] = static_cast<int32_t>(most);
    }
    const auto index = static_cast<size_t>(v[INDEX]);
    const size_t wanted = v[PLACE] != OUTPUT && v[OUT] >= 0 ? instance.output_at[static_cast<size_t>(v[OUT])] : NOWHERE;
    switch (v[PLACE]) {
      case ARENA: t.data = wanted == NOWHERE ? device_->workspace.data() + index * ARENA_UNIT : device_->outputs.data() + wanted; break;
      case INPUT: t.data = instance.input_at[index] == NOWHERE ? nullptr : device_->inputs.data() + instance.input_at[index]; break;
      case OUTPUT: t.data = instance.output_at[index] == NOWHERE ? nullptr : device_->outputs.data() + instance.output_at[index]; break;
      case WEIGHT:
      case STATE: {
        const CudaMemory& m = *(v[PLACE] == WEIGHT ? weights_ : states_)[index];
        t.data = m.data.data();
        t.scales = m.scales.data();
        break;
      }
      default: break;
    }
  }
  for (size_t i = 0; i < count; i++) {
    const int32_t* v = record(i);
    if (v[PLACE] != VIEW) continue;
    const cuda::Tensor& base = instance.values[static_cast<size_t>(v[INDEX])];
    instance.values[i].data = base.data ? static_cast<uint8_t*>(base.data) + v[OFFSET] : nullptr;
    instance.values[i].scales = base.scales;
  }
}

void CudaProgram::launch(Instance& instance, cudaStream_t stream, bool timed) {
  Launcher launcher(*device_, stream);
  cudaEvent_t begin = nullptr, end = nullptr;
  if (timed) {
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
  }
  for (const int32_t index : instance.calls) {
    const Call& c = calls_[static_cast<size_t>(index)];
    for (int k = 0; k < c.inputs + c.outputs; k++)
      if (!instance.values[static_cast<size_t>(c.ids[k])].data)
        broken("call " + std::to_string(index) + " (" + ops_[static_cast<size_t>(c.op)] + ") needs an input or output that was not given: value " + std::to_string(c.ids[k]));
    // Nothing to compute: kernels need not cope with arrays without rows.
    bool empty = c.outputs > 0;
    for (int k = c.inputs; k < c.inputs + c.outputs; k++) {
      const cuda::Tensor& t = instance.values[static_cast<size_t>(c.ids[k])];
      empty = empty && std::count(t.most, t.most + t.rank, 0) > 0;
    }
    if (empty) continue;
    launcher.next_call();
    if (timed) check(cudaEventRecord(begin, stream), "cudaEventRecord");
    try {
      c.kernel(cuda::Operands{instance.values.data(), c.ids, c.inputs, c.outputs, c.params}, launcher);
    } catch (const std::runtime_error& e) {
      cudaGetLastError();
      throw Error(std::string(e.what()) + " (in " + ops_[static_cast<size_t>(c.op)] + ")");
    }
    if (!timed) continue;
    check(cudaEventRecord(end, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end), "a kernel");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    seconds_[static_cast<size_t>(index)] += ms / 1000;
  }
  if (timed) {
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
}

// Captures the instance's calls, as often as shared memory has to grow for them.
void CudaProgram::capture(Instance& instance) {
  for (;;) {
    {
      size_t workspace;
      {
        std::lock_guard guard(device_->lock);
        workspace = *device_->workspaces.rbegin();
      }
      device_->grow(device_->workspace, workspace);
      device_->grow(device_->inputs, instance.input_bytes);
      device_->grow(device_->outputs, instance.output_bytes);
    }
    if (instance.generation == device_->generation && (instance.graph || device_->profiling)) return;
    if (instance.graph) cudaGraphExecDestroy(instance.graph);
    instance.graph = nullptr;
    place(instance);
    instance.generation = device_->generation;
    check(cudaStreamBeginCapture(device_->stream, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
    cudaGraph_t graph = nullptr;
    try {
      launch(instance, device_->stream, false);
    } catch (const Grow& more) {
      cudaStreamEndCapture(device_->stream, &graph);
      if (graph) cudaGraphDestroy(graph);
      cudaGetLastError();
      device_->grow(*more.block, more.bytes);
      continue;
    } catch (...) {
      cudaStreamEndCapture(device_->stream, &graph);
      if (graph) cudaGraphDestroy(graph);
      cudaGetLastError();
      instance.generation = 0;
      throw;
    }
    check(cudaStreamEndCapture(device_->stream, &graph), "cudaStreamEndCapture");
    const cudaError_t made = cudaGraphInstantiate(&instance.graph, graph, 0);
    cudaGraphDestroy(graph);
    if (made != cudaSuccess) {
      instance.graph = nullptr;
      instance.generation = 0;
    }
    check(made, "cudaGraphInstantiate");
    return;
  }
}

CudaProgram::Instance& CudaProgram::instance_for(const std::vector<int64_t>& sizes, const std::vector<bool>& given, const std::vector<bool>& wanted, const int32_t* calls, size_t call_count) {
  std::vector<int64_t> most(sizes.size());
  for (size_t s = 0; s < sizes.size(); s++) {
    int64_t n = sizes[s] ? 1 : 0;
    while (n < sizes[s]) n *= 2;
    most[s] = std::min(n, capacity_[s]);
  }
  // The calls follow from what is wanted.
  std::vector<int64_t> key = most;
  for (bool w : wanted) key.push_back(w);
  for (bool g : given) key.push_back(g);
  key.push_back(static_cast<int64_t>(call_count));
  for (auto i = instances_.begin(); i != instances_.end(); ++i)
    if (i->first == key) {
      instances_.splice(instances_.begin(), instances_, i);
      return i->second;
    }
  if (instances_.size() >= MOST_INSTANCES) instances_.pop_back();
  Instance& made = instances_.emplace_front(std::piecewise_construct, std::forward_as_tuple(std::move(key)), std::forward_as_tuple()).second;
  made.calls.assign(calls, calls + call_count);
  made.most = std::move(most);
  lay_out(made, given, wanted);
  return made;
}

void CudaProgram::run(const int64_t* given_sizes, const CudaSpan* inputs, size_t input_count, const CudaSpan* outputs, size_t output_count, const int32_t* calls, size_t call_count) {
  device_->use();
  const std::vector<int64_t> sizes(given_sizes, given_sizes + capacity_.size());
  for (size_t s = 0; s < sizes.size(); s++)
    if (sizes[s] < 0 || sizes[s] > capacity_[s]) broken("a size of " + std::to_string(sizes[s]) + " exceeds the plan's " + std::to_string(capacity_[s]));
  for (size_t i = 0; i < call_count; i++)
    if (calls[i] < 0 || static_cast<size_t>(calls[i]) >= calls_.size()) broken("call " + std::to_string(calls[i]) + " of " + std::to_string(calls_.size()));
  if (input_count < input_count_ || output_count < output_count_) broken("too few inputs or outputs were given");
  std::vector<bool> given(input_count_), wanted(output_count_);
  for (size_t i = 0; i < input_count_; i++) given[i] = inputs[i].data;
  for (size_t o = 0; o < output_count_; o++) wanted[o] = outputs[o].data;

  Instance& instance = instance_for(sizes, given, wanted, calls, call_count);
  capture(instance);
  if (device_->host_inputs.bytes() < instance.input_bytes) device_->host_inputs = cuda::Pinned(instance.input_bytes * 2);
  if (device_->host_outputs.bytes() < instance.output_bytes) device_->host_outputs = cuda::Pinned(instance.output_bytes * 2);

  auto* size_words = reinterpret_cast<int32_t*>(device_->host_inputs.data());
  for (size_t s = 0; s < sizes.size(); s++) size_words[s] = static_cast<int32_t>(std::min<int64_t>(sizes[s], INT32_MAX));
  size_t used = sizes.size() * sizeof(int32_t);
  struct Result {
    size_t at, bytes;
    void* to;
  };
  std::vector<Result> results;
  for (size_t i = 0; i < values_.size() / VALUE_WORDS; i++) {
    const int32_t* v = record(i);
    if (v[PLACE] == INPUT && given[static_cast<size_t>(v[INDEX])]) {
      const CudaSpan& span = inputs[v[INDEX]];
      const size_t bytes = bytes_of(v, sizes), at = instance.input_at[static_cast<size_t>(v[INDEX])];
      if (span.bytes < bytes) broken("input " + std::to_string(v[INDEX]) + " has " + std::to_string(span.bytes) + " bytes, " + std::to_string(bytes) + " expected");
      std::memcpy(device_->host_inputs.data() + at, span.data, bytes);
      used = std::max(used, at + bytes);
    }
    const int32_t o = v[PLACE] == OUTPUT ? v[INDEX] : v[OUT];
    if (o >= 0 && wanted[static_cast<size_t>(o)]) {
      const size_t bytes = bytes_of(v, sizes);
      if (outputs[o].bytes < bytes) broken("output " + std::to_string(o) + " has " + std::to_string(outputs[o].bytes) + " bytes, " + std::to_string(bytes) + " expected");
      results.push_back({instance.output_at[static_cast<size_t>(o)], bytes, outputs[o].data});
    }
  }

  const cudaStream_t stream = device_->stream;
  check(cudaMemcpyAsync(device_->inputs.data(), device_->host_inputs.data(), used, cudaMemcpyHostToDevice, stream), "copying inputs");
  check(cudaMemsetAsync(device_->outputs.data(), 0, sizeof(cuda::FaultRecord), stream), "cudaMemset");
  if (device_->profiling) {
    for (;;) {
      try {
        launch(instance, stream, true);
        break;
      } catch (const Grow& more) {
        device_->grow(*more.block, more.bytes);
        capture(instance);
      }
    }
  } else {
    check(cudaGraphLaunch(instance.graph, stream), "cudaGraphLaunch");
  }
  size_t total = sizeof(cuda::FaultRecord);
  for (const Result& r : results) total = std::max(total, r.at + r.bytes);
  if (total <= SMALL_RESULTS) {
    check(cudaMemcpyAsync(device_->host_outputs.data(), device_->outputs.data(), total, cudaMemcpyDeviceToHost, stream), "copying results");
  } else {
    check(cudaMemcpyAsync(device_->host_outputs.data(), device_->outputs.data(), sizeof(cuda::FaultRecord), cudaMemcpyDeviceToHost, stream), "copying results");
    for (const Result& r : results)
      if (r.bytes) check(cudaMemcpyAsync(device_->host_outputs.data() + r.at, device_->outputs.data() + r.at, r.bytes, cudaMemcpyDeviceToHost, stream), "copying results");
  }
  check(cudaStreamSynchronize(stream), "a step");
  cuda::FaultRecord fault;
  std::memcpy(&fault, device_->host_outputs.data(), sizeof fault);
  if (fault.fault) throw Error(message(fault));
  for (const Result& r : results) std::memcpy(r.to, device_->host_outputs.data() + r.at, r.bytes);
}
