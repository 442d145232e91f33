#include "plan.h"

#include <chrono>
#include <stdexcept>

// Target for empty memory: kernels may form its address but never read it.
alignas(64) static char nothing[64];

[[noreturn]] static void broken(const std::string& what) { throw std::runtime_error("internal: " + what); }

static int64_t product(int64_t a, int64_t b) {
  int64_t n;
  if (__builtin_mul_overflow(a, b, &n)) broken("a value's size overflows 64 bits");
  return n;
}

size_t resize(Tensor& t, const int32_t* record, const std::vector<int64_t>& sizes) {
  t.dtype = static_cast<Dtype>(record[DTYPE]);
  t.rank = record[RANK];
  int64_t n = 1;
  for (int d = 0; d < t.rank; d++) {
    const int32_t symbol = record[DIMS + 2 * d + 1];
    t.dims[d] = record[DIMS + 2 * d] * (symbol < 0 ? 1 : sizes.at(symbol));
    n = product(n, t.dims[d]);
  }
  if (t.dtype == INT8ROW) return static_cast<size_t>(product(t.dims[0], int8_row_bytes(t.dims[1])));
  if (t.dtype == INT8KV) return static_cast<size_t>(product(t.dims[0] * t.dims[1] * t.dims[2], int8_kv_bytes(t.dims[3])));
  return static_cast<size_t>(product(n, t.dtype == F16 || t.dtype == BF16 ? 2 : 4));
}

// Whether elements are stored individually, so that a view can start at any of them.
static bool in_elements(Dtype dtype) { return dtype == F32 || dtype == F16 || dtype == BF16 || dtype == I32; }

static bool constant(const int32_t* record) {
  for (int d = 0; d < record[RANK]; d++)
    if (record[DIMS + 2 * d + 1] >= 0) return false;
  return true;
}

static std::string label(size_t value) { return "value " + std::to_string(value); }

Program::Program(const Plan& plan, const KernelTable& kernels, const Weights& weights, const std::vector<Memory*>& states) : plan_(plan), weights_(weights) {
  if (plan_.values.size() % VALUE_WORDS) broken("the plan's records have " + std::to_string(plan_.values.size()) + " words, not a multiple of " + std::to_string(VALUE_WORDS));
  const size_t count = plan_.values.size() / VALUE_WORDS;
  tensors_.resize(count, Tensor{nullptr, nullptr, F32, 0, {}});
  bytes_.resize(count);
  for (size_t i = 0; i < count; i++) check_record(i);
  for (size_t i = 0; i < count; i++) {
    const int32_t* v = record(i);
    if (v[PLACE] == WEIGHT) bind_weight(i, weights);
    else if (v[PLACE] == STATE) bind_state(i, states);
    else if (v[PLACE] == VIEW) views_.push_back(static_cast<int32_t>(i));
    else if (v[PLACE] != UNUSED) changing_.push_back(static_cast<int32_t>(i));
  }
  read_calls(kernels);
  seconds_.resize(calls_.size());
}

void Program::check_record(size_t i) {
  const int32_t* v = record(i);
  if (v[RANK] < 0 || v[RANK] > 4) broken(label(i) + " has rank " + std::to_string(v[RANK]) + ", at most 4 fit a record");
  for (int d = 0; d < v[RANK]; d++) {
    const int32_t size = v[DIMS + 2 * d], symbol = v[DIMS + 2 * d + 1];
    if (size < 0 || symbol < -1 || symbol >= static_cast<int32_t>(plan_.capacity.size())) broken(label(i) + " has a size of " + std::to_string(size) + " times symbol " + std::to_string(symbol));
  }
  if (v[INDEX] < 0 || v[OFFSET] < 0) broken(label(i) + " has a negative index or offset");
  switch (v[PLACE]) {
    case ARENA: {
      // Any sizes up to the capacity stay within the slot, so runs need not check again.
      const size_t bytes = resize(tensors_[i], v, plan_.capacity), begin = static_cast<size_t>(v[INDEX] * ARENA_UNIT);
      if (begin > plan_.arena_bytes || bytes > plan_.arena_bytes - begin) broken(label(i) + " ends beyond the workspace of " + std::to_string(plan_.arena_bytes) + " bytes");
      break;
    }
    case VIEW: {
      const size_t base = static_cast<size_t>(v[INDEX]);
      if (base >= tensors_.size() || record(base)[PLACE] == VIEW || record(base)[PLACE] == UNUSED) broken(label(i) + " is a view of value " + std::to_string(base) + ", which has no memory of its own");
      const bool stacked = record(base)[PLACE] == WEIGHT && record(base)[RANK] == 3;
      if (stacked || !in_elements(static_cast<Dtype>(record(base)[DTYPE]))) broken(label(i) + " is a view of value " + std::to_string(base) + ", which is not in one piece");
      break;
    }
    case WEIGHT:
    case STATE:
      if (!constant(v)) broken(label(i) + " is a weight or state whose shape depends on a symbol");
      break;
    case INPUT:
    case OUTPUT:
    case UNUSED: break;
    default: broken(label(i) + " has the place " + std::to_string(v[PLACE]));
  }
}

void Program::bind_weight(size_t i, const Weights& weights) {
  const int32_t* v = record(i);
  Tensor& t = tensors_[i];
  if (static_cast<size_t>(v[INDEX]) >= plan_.weights.size()) broken(label(i) + " is weight " + std::to_string(v[INDEX]) + " of " + std::to_string(plan_.weights.size()));
  const std::string& name = plan_.weights[static_cast<size_t>(v[INDEX])];
  const Weights::Weight* w = weights.find(name);
  if (!w) broken("the weight " + name + " was not loaded");
  bytes_[i] = resize(t, v, plan_.capacity);
  bool fits = w->dtype == t.dtype && static_cast<int>(w->shape.size()) == t.rank;
  for (int d = 0; fits && d < t.rank; d++) fits = w->shape[static_cast<size_t>(d)] == t.dims[d];
  if (!fits) broken("the weight " + name + " was loaded in another shape or format");
  t.data = w->parts[0];
  t.parts = w->parts.data();
}

void Program::bind_state(size_t i, const std::vector<Memory*>& states) {
  const int32_t* v = record(i);
  Tensor& t = tensors_[i];
  if (static_cast<size_t>(v[INDEX]) >= states.size()) broken(label(i) + " is state " + std::to_string(v[INDEX]) + " of " + std::to_string(states.size()));
  const Memory& memory = *states[static_cast<size_t>(v[INDEX])];
  bytes_[i] = resize(t, v, plan_.capacity);
  if (bytes_[i] > memory.bytes()) broken("a state of " + std::to_string(memory.bytes()) + " bytes is smaller than its shape, " + std::to_string(bytes_[i]) + " bytes");
  t.data = memory.data() ? memory.data() : reinterpret_cast<uint8_t*>(nothing);
  if (t.rank != 3 || !in_elements(t.dtype)) return;
  std::vector<void*>& parts = parts_.emplace_back();
  for (int64_t p = 0; p < t.dims[0]; p++) parts.push_back(static_cast<uint8_t*>(t.data) + static_cast<size_t>(p) * (bytes_[i] / static_cast<size_t>(t.dims[0])));
  t.parts = parts.data();
}

void Program::read_calls(const KernelTable& kernels) {
  std::vector<Kernel> table;
  for (const std::string& op : plan_.ops) {
    const KernelEntry* entry = kernels.entries;
    while (entry->op && op != entry->op) entry++;
    if (!entry->op) broken("the instruction set " + std::string(kernels.isa) + " has no kernel for the op '" + op + "'");
    table.push_back(entry->run);
  }
  const std::vector<int32_t>& words = plan_.calls;
  for (size_t i = 0; i < words.size();) {
    const int32_t* c = &words[i];
    const size_t left = words.size() - i;
    const bool whole = left >= 4 && c[1] >= 0 && c[2] >= 0 && left - 4 >= static_cast<size_t>(c[1]) + static_cast<size_t>(c[2]);
    if (!whole || c[0] < 0 || static_cast<size_t>(c[0]) >= table.size() || c[3] < 0 || static_cast<size_t>(c[3]) > plan_.params.size()) broken("call " + std::to_string(calls_.size()) + " of the plan is malformed");
    for (int k = 0; k < c[1] + c[2]; k++)
      if (c[4 + k] < 0 || static_cast<size_t>(c[4 + k]) >= tensors_.size() || record(static_cast<size_t>(c[4 + k]))[PLACE] == UNUSED)
        broken("call " + std::to_string(calls_.size()) + " (" + plan_.ops[static_cast<size_t>(c[0])] + ") refers to value " + std::to_string(c[4 + k]) + ", which has no place");
    calls_.push_back({table[static_cast<size_t>(c[0])], c[0], c[1], c[2], plan_.params.data() + c[3], c + 4});
    i += 4 + static_cast<size_t>(c[1]) + static_cast<size_t>(c[2]);
  }
}

// Memory lent by the caller; null if none was lent.
static void* lent(const std::vector<Span>& spans, int32_t index, size_t bytes, const char* what) {
  if (static_cast<size_t>(index) >= spans.size()) broken(std::string(what) + " " + std::to_string(index) + " is missing: " + std::to_string(spans.size()) + " were given");
  const Span& span = spans[static_cast<size_t>(index)];
  if (span.data && span.bytes < bytes) broken(std::string(what) + " " + std::to_string(index) + " has " + std::to_string(span.bytes) + " bytes, " + std::to_string(bytes) + " expected");
  return span.data;
}

void Program::place_values(const Memory& workspace, const std::vector<int64_t>& sizes, const std::vector<Span>& inputs, const std::vector<Span>& outputs) {
  if (sizes.size() != plan_.capacity.size()) broken(std::to_string(sizes.size()) + " sizes for " + std::to_string(plan_.capacity.size()) + " symbols");
  for (size_t s = 0; s < sizes.size(); s++)
    if (sizes[s] < 0 || sizes[s] > plan_.capacity[s]) broken("a size of " + std::to_string(sizes[s]) + " exceeds the plan's " + std::to_string(plan_.capacity[s]));
  if (workspace.bytes() < plan_.arena_bytes) broken("the workspace has " + std::to_string(workspace.bytes()) + " bytes, " + std::to_string(plan_.arena_bytes) + " needed");
  uint8_t* arena = workspace.data() ? workspace.data() : reinterpret_cast<uint8_t*>(nothing);
  for (const int32_t i : changing_) {
    const int32_t* v = record(static_cast<size_t>(i));
    Tensor& t = tensors_[static_cast<size_t>(i)];
    const size_t bytes = bytes_[static_cast<size_t>(i)] = resize(t, v, sizes);
    if (v[PLACE] == INPUT) t.data = lent(inputs, v[INDEX], bytes, "input");
    else if (v[PLACE] == OUTPUT) t.data = lent(outputs, v[INDEX], bytes, "output");
    else {
      void* wanted = v[OUT] < 0 ? nullptr : lent(outputs, v[OUT], bytes, "output");
      t.data = wanted ? wanted : arena + v[INDEX] * ARENA_UNIT;
    }
  }
  for (const int32_t i : views_) {
    const int32_t* v = record(static_cast<size_t>(i));
    const Tensor& base = tensors_[static_cast<size_t>(v[INDEX])];
    Tensor& t = tensors_[static_cast<size_t>(i)];
    const size_t bytes = bytes_[static_cast<size_t>(i)] = resize(t, v, sizes), whole = bytes_[static_cast<size_t>(v[INDEX])], offset = static_cast<size_t>(v[OFFSET]);
    if (offset > whole || bytes > whole - offset) broken(label(static_cast<size_t>(i)) + " is a view that ends beyond what it shows");
    t.data = base.data ? static_cast<uint8_t*>(base.data) + offset : nullptr;
  }
}

void Program::run(Team& team, const Memory& workspace, const std::vector<int64_t>& sizes, const std::vector<Span>& inputs, const std::vector<Span>& outputs,
                  const std::vector<int32_t>& calls) {
  weights_.check();
  place_values(workspace, sizes, inputs, outputs);
  for (const int32_t index : calls) {
    if (index < 0 || static_cast<size_t>(index) >= calls_.size()) broken("call " + std::to_string(index) + " of " + std::to_string(calls_.size()));
    const Call& c = calls_[static_cast<size_t>(index)];
    for (int k = 0; k < c.inputs + c.outputs; k++)
      if (!tensors_[static_cast<size_t>(c.ids[k])].data)
        broken("call " + std::to_string(index) + " (" + plan_.ops[static_cast<size_t>(c.op)] + ") needs an input or output that was not given: " + label(static_cast<size_t>(c.ids[k])));
  }
  const std::string failure = team.run([&](const Worker& worker) {
    using Clock = std::chrono::steady_clock;
    auto last = Clock::now();
    for (const int32_t index : calls) {
      const Call& c = calls_[static_cast<size_t>(index)];
      c.kernel(Operands{tensors_.data(), c.ids, c.inputs, c.outputs, c.params}, worker);
      worker.wait();
      if (worker.index) continue;
      const auto now = Clock::now();
      seconds_[static_cast<size_t>(index)] += std::chrono::duration<double>(now - last).count();
      last = now;
    }
  });
  weights_.check();
  if (!failure.empty()) throw std::runtime_error(failure);
}
