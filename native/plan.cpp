#include "plan.h"

#include <chrono>
#include <stdexcept>

static constexpr int64_t ARENA_UNIT = 64;

size_t resize(Tensor& t, const int32_t* record, const std::vector<int64_t>& sizes) {
  t.dtype = static_cast<Dtype>(record[DTYPE]);
  t.rank = record[RANK];
  int64_t n = 1;
  for (int d = 0; d < t.rank; d++) {
    const int32_t symbol = record[DIMS + 2 * d + 1];
    t.dims[d] = record[DIMS + 2 * d] * (symbol < 0 ? 1 : sizes.at(symbol));
    n *= t.dims[d];
  }
  if (t.dtype == INT8ROW) return static_cast<size_t>(t.dims[0] * int8_row_bytes(t.dims[1]));
  if (t.dtype == INT8KV) return static_cast<size_t>(t.dims[0] * t.dims[1] * t.dims[2] * int8_kv_bytes(t.dims[3]));
  return static_cast<size_t>(n) * (t.dtype == F16 || t.dtype == BF16 ? 2 : 4);
}

Program::Program(const Plan& plan, const KernelTable& kernels, const Weights& weights, const std::vector<Memory*>& states)
    : plan_(plan), arena_(plan.arena_bytes), states_(states), tensors_(plan.values.size() / VALUE_WORDS) {
  std::vector<Kernel> table;
  for (const std::string& op : plan_.ops) {
    const KernelEntry* entry = kernels.entries;
    while (entry->op && op != entry->op) entry++;
    if (!entry->op) throw std::runtime_error("no kernel for the op '" + op + "' on " + kernels.isa);
    table.push_back(entry->run);
  }
  for (size_t i = 0; i < tensors_.size(); i++) {
    const int32_t* v = &plan_.values[i * VALUE_WORDS];
    Tensor& t = tensors_[i];
    t = Tensor{nullptr, nullptr, static_cast<Dtype>(v[DTYPE]), v[RANK], {}};
    if (v[PLACE] == ARENA) t.data = arena_.data() + v[INDEX] * ARENA_UNIT;
    if (v[PLACE] == STATE) t.data = states_.at(v[INDEX])->data();
    if (v[PLACE] == WEIGHT) {
      const std::string& name = plan_.weights.at(v[INDEX]);
      const Weights::Weight* w = weights.find(name);
      if (!w) throw std::runtime_error("internal: the weight " + name + " was not loaded");
      bool fits = w->dtype == t.dtype && static_cast<int>(w->shape.size()) == t.rank;
      for (int d = 0; fits && d < t.rank; d++) fits = w->shape[d] == v[DIMS + 2 * d];
      if (!fits) throw std::runtime_error("internal: the weight " + name + " was loaded in another shape or format");
      t.data = w->parts[0];
      t.parts = w->parts.data();
    }
  }
  for (size_t i = 0; i < plan_.calls.size();) {
    const int32_t* c = &plan_.calls[i];
    calls_.push_back({table.at(c[0]), c[1], c[2], plan_.params.data() + c[3], c + 4});
    i += 4 + c[1] + c[2];
  }
  seconds_.resize(calls_.size());
}

void Program::run(Team& team, const std::vector<int64_t>& sizes, const std::vector<Span>& inputs, const std::vector<Span>& outputs) {
  for (size_t s = 0; s < sizes.size(); s++)
    if (sizes[s] < 0 || sizes[s] > plan_.capacity[s]) throw std::runtime_error("internal: a size of " + std::to_string(sizes[s]) + " is beyond the plan's " + std::to_string(plan_.capacity[s]));
  for (size_t i = 0; i < tensors_.size(); i++) {
    const int32_t* v = &plan_.values[i * VALUE_WORDS];
    Tensor& t = tensors_[i];
    const size_t bytes = resize(t, v, sizes);
    if (v[PLACE] != INPUT && v[PLACE] != OUTPUT) {
      if (v[PLACE] == STATE && bytes > states_[v[INDEX]]->bytes()) throw std::runtime_error("internal: a state is smaller than its shape");
      continue;
    }
    const Span& span = (v[PLACE] == INPUT ? inputs : outputs).at(v[INDEX]);
    if (span.bytes < bytes) throw std::runtime_error("internal: an input or output of " + std::to_string(span.bytes) + " bytes should have " + std::to_string(bytes));
    t.data = span.data;
  }
  const std::string failure = team.run([this](const Worker& worker) {
    using Clock = std::chrono::steady_clock;
    auto last = Clock::now();
    for (size_t i = 0; i < calls_.size(); i++) {
      const Call& c = calls_[i];
      c.kernel(Operands{tensors_.data(), c.ids, c.inputs, c.outputs, c.params}, worker);
      worker.wait();
      if (worker.index) continue;
      const auto now = Clock::now();
      seconds_[i] += std::chrono::duration<double>(now - last).count();
      last = now;
    }
  });
  if (!failure.empty()) throw std::runtime_error(failure);
}
