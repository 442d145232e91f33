// The addon's functions, as declared in src/backend/addon.ts. Steps run on their device's thread, file operations on Node's
// thread pool; errors become exceptions.
#include <cmath>
#include <cstring>

#include "calls.h"
#include "cpu/dispatch.h"
#include "cards.h"
#include "device.h"
#include "machine.h"
#include "residence.h"
#include "rounding.h"
#include "runner.h"

namespace {

// isas(): names of the instruction sets that this processor supports, best first.
napi_value isas(napi_env env, const Arguments&) {
  napi_value out;
  check(env, napi_create_array(env, &out));
  uint32_t i = 0;
  for (const KernelTable* table : available_kernels()) check(env, napi_set_element(env, out, i++, to_js(env, table->isa)));
  return out;
}

// ops(isa): names of an instruction set's kernels ("" means the best one).
napi_value ops(napi_env env, const Arguments& a) {
  napi_value out;
  check(env, napi_create_array(env, &out));
  uint32_t i = 0;
  for (const KernelEntry* e = choose_kernels(text(env, a.at(0))).entries; e->op; e++) check(env, napi_set_element(env, out, i++, to_js(env, e->op)));
  return out;
}

template <class Codes>
napi_value codes(napi_env env, const Codes& entries) {
  napi_value out;
  check(env, napi_create_object(env, &out));
  for (const auto& [name, code] : entries) check(env, napi_set_named_property(env, out, name, to_js(env, code)));
  return out;
}

template <class Names>
napi_value names(napi_env env, const Names& entries) {
  napi_value out;
  check(env, napi_create_array(env, &out));
  uint32_t i = 0;
  for (const char* name : entries) check(env, napi_set_element(env, out, i++, to_js(env, std::string(name))));
  return out;
}

// describe(): the constants that both sides must agree on; src/backend/addon.ts compares them with its own.
napi_value describe(napi_env env, const Arguments&) {
  struct Code {
    const char* name;
    double code;
  };
#define CODE(id, code, name) Code{name, code},
#define NAME(id, name) name,
  static const Code dtypes[] = {DTYPES(CODE)}, places[] = {PLACES(CODE)};
  static const char *const floats[] = {SAMPLING_FLOATS(NAME)}, *const ints[] = {SAMPLING_INTS(NAME)};
#undef CODE
#undef NAME
  napi_value out;
  check(env, napi_create_object(env, &out));
  const auto set = [&](const char* name, napi_value v) { check(env, napi_set_named_property(env, out, name, v)); };
  set("valueWords", to_js(env, VALUE_WORDS));
  set("arenaUnit", to_js(env, ARENA_UNIT));
  set("blockTokens", to_js(env, BLOCK_TOKENS));
  set("dtypes", codes(env, dtypes));
  set("places", codes(env, places));
  set("samplingFloats", names(env, floats));
  set("samplingInts", names(env, ints));
  return out;
}

// The CPU as JavaScript holds it.
struct Opened {
  std::shared_ptr<Device> device;
  std::shared_ptr<Runner> runner;
};

// open(isa, threads): a device.
napi_value open(napi_env env, const Arguments& a) {
  auto device = std::make_shared<Device>(choose_kernels(text(env, a.at(0))), static_cast<int>(number(env, a.at(1))));
  return wrap(env, std::make_shared<Opened>(Opened{std::move(device), std::make_shared<Runner>(env)}));
}

// load([{ name, stored, dtype, shape, parts: [{ file, offset, bytes }] }]): a promise of weights.
napi_value load(napi_env env, const Arguments& a) {
  auto specs = weight_specs(env, a.at(0));
  auto loaded = std::make_shared<std::shared_ptr<Weights>>();
  return in_background(env, nullptr, [specs = std::move(specs), loaded] { *loaded = std::make_shared<Weights>(specs); },
                       [loaded](napi_env e) { return wrap(e, *loaded); });
}

// weightBytes(weights): { mapped, owned }
napi_value weight_bytes(napi_env env, const Arguments& a) {
  auto weights = alive<Weights>(env, a.at(0), "model");
  napi_value out;
  check(env, napi_create_object(env, &out));
  check(env, napi_set_named_property(env, out, "mapped", to_js(env, static_cast<double>(weights->mapped_bytes()))));
  check(env, napi_set_named_property(env, out, "owned", to_js(env, static_cast<double>(weights->owned_bytes()))));
  return out;
}

// moveWeights(weights, threads, quietly, dropCached): starts to move what is mapped to huge pages.
napi_value move_weights(napi_env env, const Arguments& a) {
  bool quietly = false, drop = false;
  check(env, napi_get_value_bool(env, a.at(2), &quietly));
  check(env, napi_get_value_bool(env, a.at(3), &drop));
  alive<Weights>(env, a.at(0), "model")->residence().start(static_cast<int>(number(env, a.at(1))), quietly, drop);
  return nullptr;
}

// stopMoving(weights, why)
napi_value stop_moving(napi_env env, const Arguments& a) {
  alive<Weights>(env, a.at(0), "model")->residence().stop(text(env, a.at(1)));
  return nullptr;
}

// movedWeights(weights): { bytes, moved, kept, moving, why }
napi_value moved_weights(napi_env env, const Arguments& a) {
  const Residence& residence = alive<Weights>(env, a.at(0), "model")->residence();
  napi_value out, moving;
  check(env, napi_create_object(env, &out));
  check(env, napi_get_boolean(env, residence.moving(), &moving));
  check(env, napi_set_named_property(env, out, "bytes", to_js(env, static_cast<double>(residence.bytes()))));
  check(env, napi_set_named_property(env, out, "moved", to_js(env, static_cast<double>(residence.moved()))));
  check(env, napi_set_named_property(env, out, "kept", to_js(env, static_cast<double>(residence.kept()))));
  check(env, napi_set_named_property(env, out, "moving", moving));
  check(env, napi_set_named_property(env, out, "why", to_js(env, residence.why())));
  return out;
}

// weightPages(weights): a promise of { huge, small }, bytes of memory behind the weights by kind of page.
napi_value weight_pages(napi_env env, const Arguments& a) {
  auto found = std::make_shared<Pages>();
  return in_background(env, nullptr, [weights = alive<Weights>(env, a.at(0), "model"), found] { *found = pages_of(weights->ranges()); },
                       [found](napi_env e) {
                         napi_value out;
                         check(e, napi_create_object(e, &out));
                         check(e, napi_set_named_property(e, out, "huge", to_js(e, static_cast<double>(found->huge))));
                         check(e, napi_set_named_property(e, out, "small", to_js(e, static_cast<double>(found->small))));
                         return out;
                       });
}

// weightsLost(weights): whether a step has found that their files changed.
napi_value weights_lost(napi_env env, const Arguments& a) {
  napi_value out;
  check(env, napi_get_boolean(env, alive<Weights>(env, a.at(0), "model")->lost(), &out));
  return out;
}

// convert({ file, offset, bytes }, stored, dtype, n, k, Uint8Array, name): a promise; writes the matrix in another format.
napi_value convert(napi_env env, const Arguments& a) {
  Span to = span(env, a.at(5));
  const auto stored = static_cast<Dtype>(number(env, a.at(1))), dtype = static_cast<Dtype>(number(env, a.at(2)));
  const auto n = static_cast<int64_t>(number(env, a.at(3))), k = static_cast<int64_t>(number(env, a.at(4)));
  if (to.bytes != matrix_bytes(dtype, n, k)) throw std::runtime_error("internal: convert: the buffer's size does not match the matrix");
  return in_background(env, a.at(5), [part = file_part(env, a.at(0)), name = text(env, a.at(6)), stored, dtype, n, k, to] { convert_file_part(part, name, stored, static_cast<uint8_t*>(to.data), dtype, n, k); }, nullptr);
}

// round([{ file, offset, bytes, name, stored, n, to: Uint8Array }], k, x, rows, shares, common | null): a promise; rounds matrices
// [n, k] that all see the rows `rows` of x [.., k], times `shares` unless that is empty, to INT4.
napi_value round(napi_env env, const Arguments& a) {
  const auto k = static_cast<int64_t>(number(env, a.at(1)));
  const Span x = span(env, a.at(2)), common = span_or_null(env, a.at(5));
  auto parts = list<RoundedPart>(env, a.at(0), [&](napi_value p) {
    const auto n = static_cast<int64_t>(number(env, get(env, p, "n")));
    const Span to = span(env, get(env, p, "to"));
    if (to.bytes != matrix_bytes(INT4, n, k)) throw std::runtime_error("internal: round: the buffer's size does not match the matrix");
    return RoundedPart{file_part(env, p), text(env, get(env, p, "name")), static_cast<Dtype>(number(env, get(env, p, "stored"))), n, static_cast<uint8_t*>(to.data)};
  });
  auto rows = numbers<int32_t>(env, a.at(3));
  auto shares = numbers<float>(env, a.at(4));
  for (int32_t r : rows)
    if (r < 0 || (static_cast<size_t>(r) + 1) * static_cast<size_t>(k) * 4 > x.bytes) throw std::runtime_error("internal: round: row " + std::to_string(r) + " is not in x");
  if (!shares.empty() && shares.size() != rows.size()) throw std::runtime_error("internal: round: as many shares as rows are needed");
  const auto padded = static_cast<size_t>(padded_columns(k));
  if (common.data && common.bytes != padded * padded * 4) throw std::runtime_error("internal: round: the moments' size does not match the matrix");
  napi_value keep;
  check(env, napi_create_array_with_length(env, 3, &keep));
  check(env, napi_set_element(env, keep, 0, a[0]));
  check(env, napi_set_element(env, keep, 1, a[2]));
  check(env, napi_set_element(env, keep, 2, a[5]));
  return in_background(env, keep, [parts = std::move(parts), rows = std::move(rows), shares = std::move(shares), k, x, common] {
    round_file_parts(parts, k, static_cast<const float*>(x.data), rows.data(), shares.empty() ? nullptr : shares.data(), static_cast<int64_t>(rows.size()), static_cast<const float*>(common.data));
  }, nullptr);
}

// moments(x, k, weight, Float32Array): a promise; the moments (rounding.h) of all rows of x [.., k], times `weight`.
napi_value moments(napi_env env, const Arguments& a) {
  const Span x = span(env, a.at(0)), to = span(env, a.at(3));
  const auto k = static_cast<int64_t>(number(env, a.at(1)));
  const auto weight = static_cast<float>(number(env, a.at(2)));
  const auto padded = static_cast<size_t>(padded_columns(k));
  if (to.bytes != padded * padded * 4) throw std::runtime_error("internal: moments: the buffer's size does not match");
  napi_value keep;
  check(env, napi_create_array_with_length(env, 2, &keep));
  check(env, napi_set_element(env, keep, 0, a[0]));
  check(env, napi_set_element(env, keep, 1, a[3]));
  return in_background(env, keep, [x, to, k, weight, padded] {
    std::vector<int32_t> rows(x.bytes / 4 / static_cast<size_t>(k));
    for (size_t i = 0; i < rows.size(); i++) rows[i] = static_cast<int32_t>(i);
    float* out = static_cast<float*>(to.data);
    add_moments(static_cast<const float*>(x.data), rows.data(), nullptr, static_cast<int64_t>(rows.size()), k, out);
    for (size_t i = 0; i < padded * padded; i++) out[i] *= weight;
  }, nullptr);
}

// checkFinite({ file, offset, bytes }, stored, n, k, name): a promise; rejects if a number of the matrix is not finite.
napi_value check_finite(napi_env env, const Arguments& a) {
  const auto stored = static_cast<Dtype>(number(env, a.at(1)));
  const auto n = static_cast<int64_t>(number(env, a.at(2))), k = static_cast<int64_t>(number(env, a.at(3)));
  return in_background(env, nullptr, [part = file_part(env, a.at(0)), name = text(env, a.at(4)), stored, n, k] { check_file_part(part, name, stored, n, k); }, nullptr);
}

// random(seed, deviation, dtype, n, k, Uint8Array): a promise; fills the matrix with noise.
napi_value random(napi_env env, const Arguments& a) {
  Span to = span(env, a.at(5));
  const auto dtype = static_cast<Dtype>(number(env, a.at(2)));
  const auto seed = static_cast<uint64_t>(number(env, a.at(0)));
  const auto deviation = static_cast<float>(number(env, a.at(1)));
  const auto n = static_cast<int64_t>(number(env, a.at(3))), k = static_cast<int64_t>(number(env, a.at(4)));
  if (to.bytes != matrix_bytes(dtype, n, k)) throw std::runtime_error("internal: random: the buffer's size does not match the matrix");
  return in_background(env, a.at(5), [=] { random_matrix(seed, deviation, static_cast<uint8_t*>(to.data), dtype, n, k); }, nullptr);
}

// memory(bytes)
napi_value memory(napi_env env, const Arguments& a) { return wrap(env, std::make_shared<Memory>(static_cast<size_t>(number(env, a.at(0))))); }

// The range of `bytes` bytes of `memory` that starts at `offset`.
uint8_t* part_of(const Memory& memory, double offset, size_t bytes) {
  if (!(std::fabs(offset) <= 0x1p53)) throw std::runtime_error("internal: the offset in a state is not a whole number");
  if (offset < 0 || offset > static_cast<double>(memory.bytes()) || bytes > memory.bytes() - static_cast<size_t>(offset))
    throw std::runtime_error("internal: " + std::to_string(bytes) + " bytes from byte " + std::to_string(static_cast<int64_t>(offset)) + " on are not within a state of " + std::to_string(memory.bytes()) + " bytes");
  return memory.data() + static_cast<size_t>(offset);
}

// readMemory(memory, byteOffset, Uint8Array), writeMemory(memory, byteOffset, Uint8Array)
napi_value read_memory(napi_env env, const Arguments& a) {
  const auto memory = alive<Memory>(env, a.at(0), "state");
  const Span to = span(env, a.at(2));
  const uint8_t* from = part_of(*memory, number(env, a.at(1)), to.bytes);
  if (to.bytes) std::memcpy(to.data, from, to.bytes);
  return nullptr;
}

napi_value write_memory(napi_env env, const Arguments& a) {
  const auto memory = alive<Memory>(env, a.at(0), "state");
  const Span from = span(env, a.at(2));
  uint8_t* to = part_of(*memory, number(env, a.at(1)), from.bytes);
  if (from.bytes) std::memcpy(to, from.data, from.bytes);
  return nullptr;
}

// prepare(device, plan, weights, [memory]): a program. `plan` is a NativePlan of src/backend/addon.ts.
napi_value prepare(napi_env env, const Arguments& a) {
  const auto opened = alive<Opened>(env, a.at(0), "backend");
  if (opened->runner->closed()) throw std::runtime_error("the backend has been disposed of");
  struct Bound {
    std::shared_ptr<Device> device;
    std::shared_ptr<Weights> weights;
    std::vector<std::shared_ptr<Memory>> states;
    std::unique_ptr<Program> program;
    ~Bound() {
      if (program) device->forget(*program);
    }
  };
  auto bound = std::make_shared<Bound>();
  bound->device = opened->device;
  bound->weights = alive<Weights>(env, a.at(2), "model");
  bound->states = list<std::shared_ptr<Memory>>(env, a.at(3), [&](napi_value v) { return alive<Memory>(env, v, "state"); });
  std::vector<Memory*> memories;
  for (const auto& state : bound->states) memories.push_back(state.get());
  auto program = std::make_unique<Program>(plan_of(env, a.at(1)), bound->device->kernels(), *bound->weights, memories);
  bound->device->announce(*program);
  bound->program = std::move(program);
  return wrap(env, std::make_shared<Prepared>(Prepared{[bound](Step& step) { bound->device->run(*bound->program, step); }, [bound] { return bound->program->seconds(); }}));
}

// run(device, program, sizes, [input | null], [output | null], calls): a promise; the arrays must stay untouched until it settles.
napi_value run(napi_env env, const Arguments& a) { return run_step(env, *alive<Opened>(env, a.at(0), "backend")->runner, a); }

// seconds(program): total seconds of each call over all runs.
napi_value seconds(napi_env env, const Arguments& a) {
  auto prepared = alive<Prepared>(env, a.at(0), "program");
  napi_value out;
  check(env, napi_create_array(env, &out));
  uint32_t i = 0;
  for (double s : prepared->seconds()) check(env, napi_set_element(env, out, i++, to_js(env, s)));
  return out;
}

// limits(isa, threads, memory): a promise of { readBytesPerSecond, int8OpsPerSecond, floatOpsPerSecond }, measured.
napi_value limits(napi_env env, const Arguments& a) {
  const KernelTable& kernels = choose_kernels(text(env, a.at(0)));
  const int threads = static_cast<int>(number(env, a.at(1)));
  const auto memory = static_cast<size_t>(number(env, a.at(2)));
  auto measured = std::make_shared<Limits>();
  return in_background(env, nullptr, [=, &kernels] { *measured = measure_limits(kernels, threads, memory); },
                       [measured](napi_env e) {
                         napi_value out;
                         check(e, napi_create_object(e, &out));
                         check(e, napi_set_named_property(e, out, "readBytesPerSecond", to_js(e, measured->read_bytes)));
                         check(e, napi_set_named_property(e, out, "int8OpsPerSecond", to_js(e, measured->int8_ops)));
                         check(e, napi_set_named_property(e, out, "floatOpsPerSecond", to_js(e, measured->float_ops)));
                         return out;
                       });
}

// disposeDevice(device): stops its threads once no run is pending.
napi_value dispose_device(napi_env env, const Arguments& a) {
  const std::shared_ptr<Opened> opened = std::move(unwrap<Opened>(env, a.at(0)));
  if (opened) opened->runner->close();
  return nullptr;
}

napi_value init(napi_env env, napi_value exports) {
  const struct {
    const char* name;
    napi_callback call;
  } functions[] = {
      {"isas", entry<isas>}, {"ops", entry<ops>}, {"describe", entry<describe>}, {"open", entry<open>}, {"load", entry<load>}, {"weightBytes", entry<weight_bytes>}, {"weightsLost", entry<weights_lost>}, {"moveWeights", entry<move_weights>}, {"stopMoving", entry<stop_moving>}, {"movedWeights", entry<moved_weights>}, {"weightPages", entry<weight_pages>},
      {"convert", entry<convert>}, {"round", entry<round>}, {"moments", entry<moments>}, {"checkFinite", entry<check_finite>}, {"random", entry<random>}, {"limits", entry<limits>},
      {"memory", entry<memory>}, {"readMemory", entry<read_memory>}, {"writeMemory", entry<write_memory>},
      {"prepare", entry<prepare>}, {"run", entry<run>}, {"seconds", entry<seconds>},
      {"disposeDevice", entry<dispose_device>}, {"disposeWeights", entry<dispose<Weights>>}, {"disposeMemory", entry<dispose<Memory>>}, {"disposeProgram", entry<dispose<Prepared>>},
  };
  for (const Function& f : cuda_functions()) {
    napi_value v;
    if (napi_create_function(env, f.name, NAPI_AUTO_LENGTH, f.call, nullptr, &v) != napi_ok) return nullptr;
    napi_set_named_property(env, exports, f.name, v);
  }
  for (const auto& f : functions) {
    napi_value v;
    if (napi_create_function(env, f.name, NAPI_AUTO_LENGTH, f.call, nullptr, &v) != napi_ok) return nullptr;
    napi_set_named_property(env, exports, f.name, v);
  }
  return exports;
}

}  // namespace

NAPI_MODULE(mixtape, init)
