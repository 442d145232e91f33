// Runs recorded programs and compares their results, without Node, for emulated processors and sanitizers. Knows no ops;
// test/backend/replay.ts writes the files.
//
//   replay ISA THREADS FILE...    ISA is a name, or "all" for all that this processor supports
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "cpu/dispatch.h"
#include "plan.h"
#include "recording.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace {

using recording::Case, recording::Reader, recording::compare;

// Makes it an error to touch memory from `end` up to the next multiple of `unit`, because the address sanitizer tracks the
// heap but not mapped memory.
void fence([[maybe_unused]] const void* end, [[maybe_unused]] size_t unit) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(end, (unit - reinterpret_cast<uintptr_t>(end) % unit) % unit);
#endif
}

void unfence([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(begin, bytes);
#endif
}

Span span_of(std::vector<int32_t>& bits) {
  bits.reserve(1);  // gives an empty one an address, because null means "none"
  return {bits.data(), bits.size() * 4};
}

// The first problem, or "". With `apart`, no two computed values share memory: each is a separate output, whose bounds the
// address sanitizer knows. Views stay views.
std::string replay(const Case& c, const KernelTable& kernels, Team& team, bool apart) {
  Weights weights(c.weights);
  std::vector<std::unique_ptr<Memory>> owned;
  std::vector<Memory*> states;
  for (int64_t bytes : c.state_bytes) states.push_back(owned.emplace_back(std::make_unique<Memory>(bytes)).get());

  Plan plan = c.plan;
  std::vector<Dtype> dtypes(c.expected.size());
  std::vector<std::vector<int32_t>> memory;
  for (const auto& e : c.expected) memory.emplace_back(e.size(), 0x7fc00000);  // NaN
  for (size_t i = 0; i < plan.values.size(); i += VALUE_WORDS) {
    int32_t* v = &plan.values[i];
    if (v[OUT] >= 0) dtypes.at(static_cast<size_t>(v[OUT])) = static_cast<Dtype>(v[DTYPE]);
    if (v[PLACE] != ARENA || v[OUT] >= 0 || !apart) continue;
    v[PLACE] = OUTPUT;
    v[INDEX] = static_cast<int32_t>(memory.size());
    Tensor t;
    memory.emplace_back((resize(t, v, c.sizes) + 3) / 4, 0x7fc00000);
  }

  std::vector<Span> inputs, outputs;
  std::vector<std::vector<int32_t>> given = c.inputs;
  for (auto& bits : given) inputs.push_back(span_of(bits));
  for (auto& bits : memory) outputs.push_back(span_of(bits));
  Program program(plan, kernels, weights, states);
  const Memory workspace(plan.arena_bytes);
  std::vector<int32_t> calls(program.call_count());
  std::iota(calls.begin(), calls.end(), 0);

  auto each_mapped = [&](auto visit) {
    for (const WeightSpec& spec : c.weights)
      for (size_t p = 0; p < spec.parts.size(); p++) visit(static_cast<uint8_t*>(weights.find(spec.name)->parts[p]), spec.parts[p].bytes, 64);
    for (Memory* state : states) visit(state->data(), state->bytes(), 4096);
  };
  if (apart) {
    each_mapped([](uint8_t* p, size_t bytes, size_t unit) { fence(p + bytes, unit); });
    each_mapped([](uint8_t* p, size_t bytes, size_t) { unfence(p, bytes); });  // in a checkpoint the next tensor follows immediately
  }
  std::string problem;
  try {
    program.run(team, workspace, c.sizes, inputs, outputs, calls);
  } catch (const std::exception& e) {
    problem = e.what();
  }
  each_mapped([](uint8_t* p, size_t bytes, size_t unit) { unfence(p, bytes + unit); });
  for (size_t i = 0; i < c.expected.size() && problem.empty(); i++) {
    problem = compare(memory[i], c.expected[i], dtypes[i], c.tolerance);
    if (!problem.empty()) problem = "output " + std::to_string(i) + ": " + problem;
  }
  return problem;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: replay ISA|all THREADS FILE...\n");
    return 2;
  }
  try {
    const std::string isa = argv[1];
    const int threads = std::atoi(argv[2]);
    if (threads < 1) throw std::runtime_error(std::string("threads: ") + argv[2] + " is not a whole number from 1");
    std::vector<const KernelTable*> tables = available_kernels();
    if (isa != "all") tables = {&choose_kernels(isa)};
    Team team(threads);
    std::vector<int> passed(tables.size());
    int cases = 0;
    for (int f = 3; f < argc; f++) {
      Reader reader(argv[f]);
      for (; !reader.done(); cases++) {
        const Case c = reader.next();
        for (size_t t = 0; t < tables.size(); t++) {
          std::string problem;
          for (bool apart : {false, true})
            if (problem.empty()) problem = replay(c, *tables[t], team, apart);
          if (problem.empty()) passed[t]++;
          else std::printf("%s, %d threads: %s: %s\n", tables[t]->isa, threads, c.name.c_str(), problem.c_str());
        }
      }
    }
    bool good = cases > 0;
    for (size_t t = 0; t < tables.size(); t++) {
      std::printf("%s, %d threads: %d of %d cases pass\n", tables[t]->isa, threads, passed[t], cases);
      good = good && passed[t] == cases;
    }
    return good ? 0 : 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
