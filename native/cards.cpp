#include "cards.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>

#include "calls.h"
#include "cuda/interface.h"

namespace {

// The library, once it is open. Stays open: a card's context does not survive closing it.
const CudaInterface* library = nullptr;

const CudaInterface& opened_library() {
  if (!library) throw std::runtime_error("internal: the CUDA library is not open");
  return *library;
}

[[noreturn]] void fail() { throw std::runtime_error(opened_library().error()); }
void check_cuda(int failed) {
  if (failed) fail();
}

struct Card {
  explicit Card(int index) : device(opened_library().open(index)) {
    if (!device) fail();
  }
  ~Card() { library->close(device); }
  Card(const Card&) = delete;
  CudaDevice* const device;
  std::atomic<uint64_t> loaded{0};  // bytes, of the weights that are being loaded
  std::atomic<bool> stop{false};    // stops loading
};

struct Opened {
  std::shared_ptr<Card> card;
  std::shared_ptr<Runner> runner;
};

// Memory on a card, which it keeps open.
struct Held {
  Held(std::shared_ptr<Card> c, const CudaShape& shape) : card(std::move(c)), memory(library->allocate(card->device, &shape)) {
    if (!memory) fail();
  }
  ~Held() { library->release(memory); }
  Held(const Held&) = delete;
  const std::shared_ptr<Card> card;
  CudaMemory* const memory;
};

struct CudaWeights {
  std::vector<std::string> names;
  std::vector<std::shared_ptr<Held>> memories;
  uint64_t bytes = 0;
  CudaMemory* find(const std::string& name) const {
    for (size_t i = 0; i < names.size(); i++)
      if (names[i] == name) return memories[i]->memory;
    throw std::runtime_error("internal: the weight " + name + " was not loaded");
  }
};

CudaShape shape_of(Dtype dtype, const std::vector<int64_t>& dims) {
  if (dims.size() > 4) throw std::runtime_error("internal: more than 4 dimensions");
  CudaShape shape{dtype, static_cast<int32_t>(dims.size()), {}};
  for (size_t d = 0; d < dims.size(); d++) shape.dims[d] = dims[d];
  return shape;
}

bool is_float(Dtype dtype) { return dtype == F32 || dtype == F16 || dtype == BF16; }

// Loads weights in the format asked for. Those that the card cannot convert (to int8, int4, fp8; from GGUF's formats) are converted here,
// one part at a time.
std::shared_ptr<CudaWeights> load(const std::shared_ptr<Card>& card, const std::vector<WeightSpec>& specs) {
  auto weights = std::make_shared<CudaWeights>();
  card->loaded = 0;
  std::vector<std::vector<CudaSource>> sources(specs.size());
  std::vector<CudaMemory*> to;
  std::vector<const CudaSource*> parts;
  std::vector<size_t> counts;
  std::vector<const char*> names;
  const auto flush = [&] {
    const auto done = [](void* c, uint64_t bytes) -> int32_t {
      static_cast<Card*>(c)->loaded += bytes;
      return static_cast<Card*>(c)->stop;
    };
    check_cuda(library->load(card->device, to.data(), parts.data(), counts.data(), names.data(), to.size(), done, card.get()));
    to.clear(), parts.clear(), counts.clear(), names.clear();
  };
  for (size_t i = 0; i < specs.size(); i++) {
    const WeightSpec& spec = specs[i];
    auto& held = weights->memories.emplace_back(std::make_shared<Held>(card, shape_of(spec.dtype, spec.shape)));
    weights->names.push_back(spec.name);
    weights->bytes += library->bytes(held->memory);
    const bool direct = spec.stored == spec.dtype || (is_float(spec.stored) && is_float(spec.dtype));
    if (direct) {
      for (const FilePart& p : spec.parts) sources[i].push_back({p.file.c_str(), p.offset, p.bytes, nullptr, spec.stored});
      to.push_back(held->memory), parts.push_back(sources[i].data()), counts.push_back(sources[i].size()), names.push_back(spec.name.c_str());
      continue;
    }
    const int64_t k = spec.shape.back();
    int64_t n = 1;
    for (size_t d = 0; d + 1 < spec.shape.size(); d++) n *= spec.shape[d];
    n /= static_cast<int64_t>(spec.parts.size());
    const size_t bytes = matrix_bytes(spec.dtype, n, k);
    std::vector<uint8_t> converted(bytes * spec.parts.size());
    for (size_t p = 0; p < spec.parts.size(); p++) {
      if (card->stop) throw std::runtime_error("loading was cancelled");
      convert_file_part(spec.parts[p], spec.name, spec.stored, converted.data() + p * bytes, spec.dtype, n, k);
      sources[i].push_back({nullptr, p * bytes, bytes, converted.data(), spec.dtype});
    }
    flush();  // in order, so that no more than one converted weight is in memory
    to.push_back(held->memory), parts.push_back(sources[i].data()), counts.push_back(sources[i].size()), names.push_back(spec.name.c_str());
    flush();
  }
  flush();
  return weights;
}

// cudaLibrary(path): opens the library; throws with the loader's message, or if it is of another version. cudaOps() then lists its kernels.
napi_value cuda_library(napi_env env, const Arguments& a) {
  if (library) return nullptr;
  const std::string path = text(env, a.at(0));
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(dlerror());
  const auto find = reinterpret_cast<const CudaInterface* (*)()>(dlsym(handle, "mixtape_cuda"));
  const CudaInterface* found = find ? find() : nullptr;
  if (!found || found->version != CUDA_INTERFACE_VERSION) {
    dlclose(handle);
    throw std::runtime_error(path + " is of another version of mixtape; rebuild it with 'npm run build'");
  }
  library = found;
  return nullptr;
}

napi_value cuda_ops(napi_env env, const Arguments&) {
  napi_value out;
  check(env, napi_create_array(env, &out));
  for (uint32_t i = 0; const char* op = opened_library().op(i); i++) check(env, napi_set_element(env, out, i, to_js(env, std::string(op))));
  return out;
}

void set(napi_env env, napi_value object, const char* name, double x) { check(env, napi_set_named_property(env, object, name, to_js(env, x))); }
void set(napi_env env, napi_value object, const char* name, const char* s) { check(env, napi_set_named_property(env, object, name, to_js(env, std::string(s)))); }

// cudaCards(): { driver, runtime, cards: [{ name, major, minor, multiprocessors, total, free, refused }] }
napi_value cuda_cards(napi_env env, const Arguments&) {
  const CudaInterface& l = opened_library();
  int32_t driver = 0, runtime = 0, count = 0;
  check_cuda(l.versions(&driver, &runtime));
  napi_value out, cards;
  check(env, napi_create_object(env, &out));
  set(env, out, "driver", driver);
  set(env, out, "runtime", runtime);
  check(env, napi_create_array(env, &cards));
  check(env, napi_set_named_property(env, out, "cards", cards));
  if (!driver) return out;  // no driver: no cards
  check_cuda(l.count(&count));
  for (int32_t i = 0; i < count; i++) {
    CudaCard card;
    check_cuda(l.card(i, &card));
    napi_value v;
    check(env, napi_create_object(env, &v));
    set(env, v, "name", card.name);
    set(env, v, "refused", card.refused);
    set(env, v, "major", card.major);
    set(env, v, "minor", card.minor);
    set(env, v, "multiprocessors", card.multiprocessors);
    set(env, v, "total", static_cast<double>(card.total));
    set(env, v, "free", static_cast<double>(card.free));
    check(env, napi_set_element(env, cards, static_cast<uint32_t>(i), v));
  }
  return out;
}

// cudaOpen(index): a device.
napi_value cuda_open(napi_env env, const Arguments& a) {
  auto card = std::make_shared<Card>(static_cast<int>(number(env, a.at(0))));
  return wrap(env, std::make_shared<Opened>(Opened{std::move(card), std::make_shared<Runner>(env)}));
}

// cudaFree(device): { free, total } bytes.
napi_value cuda_free(napi_env env, const Arguments& a) {
  uint64_t free = 0, total = 0;
  check_cuda(opened_library().memory(alive<Opened>(env, a.at(0), "backend")->card->device, &free, &total));
  napi_value out;
  check(env, napi_create_object(env, &out));
  set(env, out, "free", static_cast<double>(free));
  set(env, out, "total", static_cast<double>(total));
  return out;
}

// cudaProfile(device, on): time each call instead of replaying graphs.
napi_value cuda_profile(napi_env env, const Arguments& a) {
  bool on = false;
  check(env, napi_get_value_bool(env, a.at(1), &on));
  opened_library().profile(alive<Opened>(env, a.at(0), "backend")->card->device, on);
  return nullptr;
}

// cudaLimits(device): a promise of { copyBytesPerSecond, readBytesPerSecond, bf16FlopsPerSecond, fp8FlopsPerSecond }, measured.
napi_value cuda_limits(napi_env env, const Arguments& a) {
  auto card = alive<Opened>(env, a.at(0), "backend")->card;
  auto measured = std::make_shared<CudaLimits>();
  return in_background(env, nullptr, [card, measured] { check_cuda(library->limits(card->device, measured.get())); },
                       [measured](napi_env e) {
                         napi_value out;
                         check(e, napi_create_object(e, &out));
                         set(e, out, "copyBytesPerSecond", measured->copy_bytes);
                         set(e, out, "readBytesPerSecond", measured->read_bytes);
                         set(e, out, "bf16FlopsPerSecond", measured->bf16_flops);
                         set(e, out, "fp8FlopsPerSecond", measured->fp8_flops);
                         return out;
                       });
}

// cudaLoad(device, specs as `load` takes them): a promise of weights.
napi_value cuda_load(napi_env env, const Arguments& a) {
  auto card = alive<Opened>(env, a.at(0), "backend")->card;
  auto specs = weight_specs(env, a.at(1));
  auto loaded = std::make_shared<std::shared_ptr<CudaWeights>>();
  return in_background(env, nullptr, [card, specs = std::move(specs), loaded] { *loaded = load(card, specs); },
                       [loaded](napi_env e) { return wrap(e, *loaded); });
}

// cudaLoaded(device): bytes copied so far by the running cudaLoad.
napi_value cuda_loaded(napi_env env, const Arguments& a) { return to_js(env, static_cast<double>(alive<Opened>(env, a.at(0), "backend")->card->loaded.load())); }

// cudaWeightBytes(weights)
napi_value cuda_weight_bytes(napi_env env, const Arguments& a) { return to_js(env, static_cast<double>(alive<CudaWeights>(env, a.at(0), "model")->bytes)); }

// cudaMemory(device, dtype, shape)
napi_value cuda_memory(napi_env env, const Arguments& a) {
  const auto dims = list<int64_t>(env, a.at(2), [&](napi_value d) { return static_cast<int64_t>(number(env, d)); });
  return wrap(env, std::make_shared<Held>(alive<Opened>(env, a.at(0), "backend")->card, shape_of(static_cast<Dtype>(number(env, a.at(1))), dims)));
}

// cudaRead(memory, byteOffset, Uint8Array), cudaWrite(memory, byteOffset, Uint8Array)
napi_value cuda_read(napi_env env, const Arguments& a) {
  const Span to = span(env, a.at(2));
  check_cuda(opened_library().read(alive<Held>(env, a.at(0), "state")->memory, static_cast<uint64_t>(number(env, a.at(1))), to.data, to.bytes));
  return nullptr;
}
napi_value cuda_write(napi_env env, const Arguments& a) {
  const Span from = span(env, a.at(2));
  check_cuda(opened_library().write(alive<Held>(env, a.at(0), "state")->memory, static_cast<uint64_t>(number(env, a.at(1))), from.data, from.bytes));
  return nullptr;
}

// cudaPrepare(device, plan, weights, [memory]): a program, as `prepare` makes it.
napi_value cuda_prepare(napi_env env, const Arguments& a) {
  const auto opened = alive<Opened>(env, a.at(0), "backend");
  if (opened->runner->closed()) throw std::runtime_error("the backend has been disposed of");
  struct Bound {
    std::shared_ptr<Card> card;
    std::shared_ptr<CudaWeights> weights;
    std::vector<std::shared_ptr<Held>> states;
    CudaProgram* program = nullptr;
    ~Bound() {
      if (program) library->discard(program);
    }
  };
  auto bound = std::make_shared<Bound>();
  bound->card = opened->card;
  bound->weights = alive<CudaWeights>(env, a.at(2), "model");
  bound->states = list<std::shared_ptr<Held>>(env, a.at(3), [&](napi_value v) { return alive<Held>(env, v, "state"); });
  const Plan plan = plan_of(env, a.at(1));
  std::vector<const char*> ops;
  for (const auto& op : plan.ops) ops.push_back(op.c_str());
  std::vector<CudaMemory*> weights, states;
  for (const auto& name : plan.weights) weights.push_back(bound->weights->find(name));
  for (const auto& state : bound->states) states.push_back(state->memory);
  const CudaPlan given{ops.data(), plan.values.data(), plan.calls.data(), plan.params.data(), plan.capacity.data(), weights.data(), states.data(),
                       ops.size(), plan.values.size(), plan.calls.size(), plan.params.size(), plan.capacity.size(), weights.size(), states.size(), plan.arena_bytes};
  bound->program = library->prepare(bound->card->device, &given);
  if (!bound->program) fail();
  const auto step = [bound](Step& s) {
    const auto spans = [](const std::vector<Span>& from) {
      std::vector<CudaSpan> to;
      for (const Span& x : from) to.push_back({x.data, x.bytes});
      return to;
    };
    const auto inputs = spans(s.inputs), outputs = spans(s.outputs);
    check_cuda(library->run(bound->program, s.sizes.data(), inputs.data(), inputs.size(), outputs.data(), outputs.size(), s.calls.data(), s.calls.size()));
  };
  const auto seconds = [bound] {
    size_t count = 0;
    const double* s = library->seconds(bound->program, &count);
    return std::vector<double>(s, s + count);
  };
  return wrap(env, std::make_shared<Prepared>(Prepared{step, seconds}));
}

// cudaRun(device, program, ...): as `run`.
napi_value cuda_run(napi_env env, const Arguments& a) { return run_step(env, *alive<Opened>(env, a.at(0), "backend")->runner, a); }

// disposeCuda(device): refuses new runs; the card's memory is freed with what uses it.
napi_value dispose_cuda(napi_env env, const Arguments& a) {
  const std::shared_ptr<Opened> opened = std::move(unwrap<Opened>(env, a.at(0)));
  if (!opened) return nullptr;
  opened->card->stop = true;
  opened->runner->close();
  return nullptr;
}

}  // namespace

const std::vector<Function>& cuda_functions() {
  static const std::vector<Function> functions = {
      {"cudaLibrary", entry<cuda_library>}, {"cudaOps", entry<cuda_ops>}, {"cudaCards", entry<cuda_cards>}, {"cudaOpen", entry<cuda_open>},
      {"cudaFree", entry<cuda_free>}, {"cudaProfile", entry<cuda_profile>}, {"cudaLimits", entry<cuda_limits>},
      {"cudaLoad", entry<cuda_load>}, {"cudaLoaded", entry<cuda_loaded>}, {"cudaWeightBytes", entry<cuda_weight_bytes>},
      {"cudaMemory", entry<cuda_memory>}, {"cudaRead", entry<cuda_read>}, {"cudaWrite", entry<cuda_write>},
      {"cudaPrepare", entry<cuda_prepare>}, {"cudaRun", entry<cuda_run>}, {"disposeCuda", entry<dispose_cuda>},
      {"disposeCudaWeights", entry<dispose<CudaWeights>>}, {"disposeCudaMemory", entry<dispose<Held>>},
  };
  return functions;
}
