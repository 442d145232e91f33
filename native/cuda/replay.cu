// Runs recorded programs on a card and compares their results, without Node, also under compute-sanitizer. Knows no ops.
//
//   replay FILE [WORD]...    only cases whose names contain one of the words
#include <algorithm>
#include <memory>
#include <numeric>

#include "../recording.h"
#include "load.cuh"
#include "program.cuh"

namespace {

using recording::Case, recording::Reader;

// The first problem, or "".
std::string replay(const Case& c, CudaDevice& device) {
  std::vector<std::unique_ptr<CudaMemory>> owned;
  auto allocate = [&](const int32_t* v) {
    CudaShape shape{v[DTYPE], v[RANK], {}};
    for (int d = 0; d < shape.rank; d++) shape.dims[d] = v[DIMS + 2 * d];
    return owned.emplace_back(std::make_unique<CudaMemory>(&device, shape)).get();
  };
  std::vector<CudaMemory*> weights(c.plan.weights.size()), states(c.state_bytes.size());
  std::vector<Dtype> dtypes(c.expected.size());
  for (size_t i = 0; i < c.plan.values.size(); i += VALUE_WORDS) {
    const int32_t* v = &c.plan.values[i];
    if (v[PLACE] == WEIGHT) weights.at(static_cast<size_t>(v[INDEX])) = allocate(v);
    if (v[PLACE] == STATE) states.at(static_cast<size_t>(v[INDEX])) = allocate(v);
    if (v[OUT] >= 0) dtypes.at(static_cast<size_t>(v[OUT])) = static_cast<Dtype>(v[DTYPE]);
  }
  std::vector<std::vector<CudaSource>> sources;
  std::vector<CudaMemory*> to;
  std::vector<const char*> names;
  for (const WeightSpec& spec : c.weights) {
    const auto at = std::find(c.plan.weights.begin(), c.plan.weights.end(), spec.name);
    if (at == c.plan.weights.end()) continue;
    auto& parts = sources.emplace_back();
    for (const FilePart& p : spec.parts) parts.push_back({p.file.c_str(), p.offset, p.bytes, nullptr, spec.stored});
    to.push_back(weights[static_cast<size_t>(at - c.plan.weights.begin())]);
    names.push_back(spec.name.c_str());
  }
  std::vector<const CudaSource*> parts;
  std::vector<size_t> counts;
  for (const auto& s : sources) parts.push_back(s.data()), counts.push_back(s.size());
  std::string problem;
  try {
    cuda::load(device, to.data(), parts.data(), counts.data(), names.data(), to.size(), nullptr, nullptr);
    std::vector<const char*> ops;
    for (const auto& op : c.plan.ops) ops.push_back(op.c_str());
    const CudaPlan plan{ops.data(), c.plan.values.data(), c.plan.calls.data(), c.plan.params.data(), c.plan.capacity.data(), weights.data(), states.data(),
                        ops.size(), c.plan.values.size(), c.plan.calls.size(), c.plan.params.size(), c.plan.capacity.size(), weights.size(), states.size(), c.plan.arena_bytes};
    CudaProgram program(&device, plan);
    std::vector<int32_t> calls(program.seconds().size());
    std::iota(calls.begin(), calls.end(), 0);
    std::vector<std::vector<int32_t>> given = c.inputs, memory;
    std::vector<CudaSpan> inputs, outputs;
    for (auto& bits : given) bits.reserve(1), inputs.push_back({bits.data(), bits.size() * 4});
    for (const auto& e : c.expected) memory.emplace_back(e.size(), 0x7fc00000).reserve(1);
    for (auto& bits : memory) outputs.push_back({bits.data(), bits.size() * 4});
    // Twice: the second time from memory full of NaN.
    for (int turn = 0; turn < 2 && problem.empty(); turn++) {
      for (cuda::Block* b : {&device.workspace, &device.outputs, &device.scratch})
        if (b->bytes()) cuda::check(cudaMemset(b->data(), 0xff, b->bytes()), "cudaMemset");
      cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
      program.run(c.sizes.data(), inputs.data(), inputs.size(), outputs.data(), outputs.size(), calls.data(), calls.size());
      for (size_t i = 0; i < c.expected.size() && problem.empty(); i++) {
        problem = recording::compare(memory[i], c.expected[i], dtypes[i], c.tolerance);
        if (!problem.empty()) problem = "output " + std::to_string(i) + ": " + problem;
        std::fill(memory[i].begin(), memory[i].end(), 0x7fc00000);
      }
    }
  } catch (const std::exception& e) {
    problem = e.what();
  }
  return problem;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: replay FILE [WORD]...\n");
    return 2;
  }
  try {
    CudaDevice device(0);
    Reader reader(argv[1]);
    int passed = 0, cases = 0;
    while (!reader.done()) {
      const Case c = reader.next();
      bool named = argc == 2;
      for (int i = 2; i < argc; i++) named = named || c.name.find(argv[i]) != std::string::npos;
      if (!named) continue;
      cases++;
      const std::string problem = replay(c, device);
      if (problem.empty()) passed++;
      else std::printf("%s: %s\n", c.name.c_str(), problem.c_str());
      if (const cudaError_t e = cudaDeviceSynchronize()) throw cuda::Error(c.name + ": " + cudaGetErrorString(e));
    }
    std::printf("%s: %d of %d cases pass\n", device.properties.name, passed, cases);
    return cases > 0 && passed == cases ? 0 : 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
