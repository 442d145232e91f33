// The bridge to Node: the only file that knows N-API. Everything slow runs on a worker thread; errors become exceptions.
#include <node_api.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "machine.h"
#include "plan.h"

namespace {

// ---- values in and out of JavaScript ----

struct Pending {};  // a JavaScript exception is already pending

void check(napi_env env, napi_status status) {
  if (status == napi_ok) return;
  bool pending = false;
  napi_is_exception_pending(env, &pending);
  if (pending) throw Pending{};
  const napi_extended_error_info* info = nullptr;
  napi_get_last_error_info(env, &info);
  throw std::runtime_error(std::string("internal: ") + (info && info->error_message ? info->error_message : "a value of an unexpected type"));
}

napi_value get(napi_env env, napi_value object, const char* name) {
  napi_value v;
  check(env, napi_get_named_property(env, object, name, &v));
  return v;
}

double number(napi_env env, napi_value v) {
  double x;
  check(env, napi_get_value_double(env, v, &x));
  return x;
}

std::string text(napi_env env, napi_value v) {
  size_t n = 0;
  check(env, napi_get_value_string_utf8(env, v, nullptr, 0, &n));
  std::string s(n, 0);
  check(env, napi_get_value_string_utf8(env, v, s.data(), n + 1, &n));
  return s;
}

napi_value to_js(napi_env env, double x) {
  napi_value v;
  check(env, napi_create_double(env, x, &v));
  return v;
}

napi_value to_js(napi_env env, const std::string& s) {
  napi_value v;
  check(env, napi_create_string_utf8(env, s.c_str(), s.size(), &v));
  return v;
}

template <class T, class Convert>
std::vector<T> list(napi_env env, napi_value array, Convert convert) {
  uint32_t n = 0;
  check(env, napi_get_array_length(env, array, &n));
  std::vector<T> out;
  out.reserve(n);
  for (uint32_t i = 0; i < n; i++) {
    napi_value v;
    check(env, napi_get_element(env, array, i, &v));
    out.push_back(convert(v));
  }
  return out;
}

Span span(napi_env env, napi_value v) {
  napi_typedarray_type type;
  size_t n = 0, offset = 0;
  void* data = nullptr;
  napi_value buffer;
  check(env, napi_get_typedarray_info(env, v, &type, &n, &data, &buffer, &offset));
  const size_t bytes = type == napi_uint8_array || type == napi_int8_array ? 1 : type == napi_float64_array ? 8 : 4;
  return {data, n * bytes};
}

template <class T>
std::vector<T> numbers(napi_env env, napi_value v) {
  Span s = span(env, v);
  return std::vector<T>(static_cast<T*>(s.data), static_cast<T*>(s.data) + s.bytes / sizeof(T));
}

// ---- objects that JavaScript holds: externals, freed by dispose() or with the last reference ----

template <class T>
struct Handle {
  std::shared_ptr<T> object;
};

template <class T>
napi_value wrap(napi_env env, std::shared_ptr<T> object) {
  napi_value v;
  auto* handle = new Handle<T>{std::move(object)};
  check(env, napi_create_external(env, handle, [](napi_env, void* data, void*) { delete static_cast<Handle<T>*>(data); }, nullptr, &v));
  return v;
}

template <class T>
std::shared_ptr<T>& unwrap(napi_env env, napi_value v) {
  void* data = nullptr;
  check(env, napi_get_value_external(env, v, &data));
  return static_cast<Handle<T>*>(data)->object;
}

template <class T>
std::shared_ptr<T> alive(napi_env env, napi_value v, const char* what) {
  std::shared_ptr<T> object = unwrap<T>(env, v);
  if (!object) throw std::runtime_error(std::string("the ") + what + " has been disposed of");
  return object;
}

// A program, and what it must not outlive.
struct Bound {
  std::shared_ptr<Weights> weights;
  std::vector<std::shared_ptr<Memory>> states;
  std::unique_ptr<Program> program;
};

// ---- calls ----

using Arguments = std::vector<napi_value>;

template <napi_value (*F)(napi_env, const Arguments&)>
napi_value entry(napi_env env, napi_callback_info info) {
  size_t n = 8;
  Arguments args(n);
  try {
    check(env, napi_get_cb_info(env, info, &n, args.data(), nullptr, nullptr));
    args.resize(n);
    return F(env, args);
  } catch (const Pending&) {
  } catch (const std::exception& e) {
    napi_throw_error(env, nullptr, e.what());
  }
  return nullptr;
}

// Runs `work` on a worker thread; the promise resolves with what `result` makes of it on the main thread.
struct Job {
  std::function<void()> work;
  std::function<napi_value(napi_env)> result;
  std::string error;
  napi_deferred deferred = nullptr;
  napi_async_work handle = nullptr;
  napi_ref keep = nullptr;  // what must stay alive until the end
};

napi_value in_background(napi_env env, napi_value keep, std::function<void()> work, std::function<napi_value(napi_env)> result) {
  auto job = std::make_unique<Job>();
  job->work = std::move(work);
  job->result = std::move(result);
  napi_value promise;
  check(env, napi_create_promise(env, &job->deferred, &promise));
  if (keep) check(env, napi_create_reference(env, keep, 1, &job->keep));
  auto execute = [](napi_env, void* data) {
    auto* j = static_cast<Job*>(data);
    try {
      j->work();
    } catch (const std::exception& e) {
      j->error = *e.what() ? e.what() : "internal: an error without a message";
    }
  };
  auto complete = [](napi_env e, napi_status, void* data) {
    std::unique_ptr<Job> j(static_cast<Job*>(data));
    napi_value value = nullptr;
    if (j->keep) napi_delete_reference(e, j->keep);
    napi_delete_async_work(e, j->handle);
    if (j->error.empty()) {
      try {
        value = j->result ? j->result(e) : nullptr;
        if (!value) napi_get_undefined(e, &value);
        napi_resolve_deferred(e, j->deferred, value);
        return;
      } catch (const std::exception& x) {
        j->error = x.what();
      } catch (const Pending&) {
        napi_value thrown;
        napi_get_and_clear_last_exception(e, &thrown);
        j->error = "internal: the result could not be handed over";
      }
    }
    napi_value message;
    napi_create_string_utf8(e, j->error.c_str(), NAPI_AUTO_LENGTH, &message);
    napi_create_error(e, nullptr, message, &value);
    napi_reject_deferred(e, j->deferred, value);
  };
  check(env, napi_create_async_work(env, nullptr, to_js(env, "mixtape"), execute, complete, job.get(), &job->handle));
  check(env, napi_queue_async_work(env, job->handle));
  job.release();  // `complete` owns it now
  return promise;
}

// isas(): names of the instruction sets that run here, best first.
napi_value isas(napi_env env, const Arguments&) {
  napi_value out;
  check(env, napi_create_array(env, &out));
  uint32_t i = 0;
  for (const KernelTable* table : available_kernels()) check(env, napi_set_element(env, out, i++, to_js(env, table->isa)));
  return out;
}

// ops(isa): names of the kernels of an instruction set ("" is the best).
napi_value ops(napi_env env, const Arguments& a) {
  napi_value out;
  check(env, napi_create_array(env, &out));
  uint32_t i = 0;
  for (const KernelEntry* e = choose_kernels(text(env, a.at(0))).entries; e->op; e++) check(env, napi_set_element(env, out, i++, to_js(env, e->op)));
  return out;
}

// team(threads)
napi_value team(napi_env env, const Arguments& a) { return wrap(env, std::make_shared<Team>(static_cast<int>(number(env, a.at(0))))); }

FilePart file_part(napi_env env, napi_value p) {
  return {text(env, get(env, p, "file")), static_cast<uint64_t>(number(env, get(env, p, "offset"))), static_cast<uint64_t>(number(env, get(env, p, "bytes")))};
}

// load([{ name, stored, dtype, shape, parts: [{ file, offset, bytes }] }]): a promise of weights.
napi_value load(napi_env env, const Arguments& a) {
  auto specs = list<WeightSpec>(env, a.at(0), [&](napi_value v) {
    return WeightSpec{text(env, get(env, v, "name")), static_cast<Dtype>(number(env, get(env, v, "stored"))), static_cast<Dtype>(number(env, get(env, v, "dtype"))),
                      list<int64_t>(env, get(env, v, "shape"), [&](napi_value d) { return static_cast<int64_t>(number(env, d)); }),
                      list<FilePart>(env, get(env, v, "parts"), [&](napi_value p) { return file_part(env, p); })};
  });
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

// convert({ file, offset, bytes }, stored, dtype, n, k, Uint8Array): a promise; writes the matrix in another format.
napi_value convert(napi_env env, const Arguments& a) {
  Span to = span(env, a.at(5));
  const auto stored = static_cast<Dtype>(number(env, a.at(1))), dtype = static_cast<Dtype>(number(env, a.at(2)));
  const auto n = static_cast<int64_t>(number(env, a.at(3))), k = static_cast<int64_t>(number(env, a.at(4)));
  if (to.bytes != matrix_bytes(dtype, n, k)) throw std::runtime_error("internal: convert: the buffer's size does not match the matrix");
  return in_background(env, a.at(5), [part = file_part(env, a.at(0)), stored, dtype, n, k, to] { convert_file_part(part, stored, static_cast<uint8_t*>(to.data), dtype, n, k); }, nullptr);
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

// prepare(plan, isa, weights, [memory]): a program. `plan` is a Plan of src/graph/plan.ts with names in place of tensors.
napi_value prepare(napi_env env, const Arguments& a) {
  napi_value p = a.at(0);
  auto string = [&](napi_value v) { return text(env, v); };
  Plan plan;
  plan.ops = list<std::string>(env, get(env, p, "ops"), string);
  plan.weights = list<std::string>(env, get(env, p, "weights"), string);
  plan.values = numbers<int32_t>(env, get(env, p, "values"));
  plan.calls = numbers<int32_t>(env, get(env, p, "calls"));
  plan.params = numbers<double>(env, get(env, p, "params"));
  plan.capacity = list<int64_t>(env, get(env, p, "capacity"), [&](napi_value v) { return static_cast<int64_t>(number(env, v)); });
  plan.arena_bytes = static_cast<size_t>(number(env, get(env, p, "arenaBytes")));
  auto bound = std::make_shared<Bound>();
  bound->weights = alive<Weights>(env, a.at(2), "model");
  bound->states = list<std::shared_ptr<Memory>>(env, a.at(3), [&](napi_value v) { return alive<Memory>(env, v, "KV cache"); });
  std::vector<Memory*> states;
  for (auto& s : bound->states) states.push_back(s.get());
  bound->program = std::make_unique<Program>(plan, choose_kernels(text(env, a.at(1))), *bound->weights, states);
  return wrap(env, bound);
}

// run(program, team, sizes, [input], [output]): a promise; the arrays must stay untouched until it settles.
napi_value run(napi_env env, const Arguments& a) {
  auto bound = alive<Bound>(env, a.at(0), "model");
  auto threads = alive<Team>(env, a.at(1), "backend");
  auto sizes = list<int64_t>(env, a.at(2), [&](napi_value v) { return static_cast<int64_t>(number(env, v)); });
  auto inputs = list<Span>(env, a.at(3), [&](napi_value v) { return span(env, v); });
  auto outputs = list<Span>(env, a.at(4), [&](napi_value v) { return span(env, v); });
  napi_value keep;
  check(env, napi_create_array_with_length(env, 2, &keep));
  check(env, napi_set_element(env, keep, 0, a[3]));
  check(env, napi_set_element(env, keep, 1, a[4]));
  return in_background(env, keep, [=] { bound->program->run(*threads, sizes, inputs, outputs); }, nullptr);
}

// seconds(program): what each call took in all runs so far.
napi_value seconds(napi_env env, const Arguments& a) {
  auto bound = alive<Bound>(env, a.at(0), "model");
  napi_value out;
  check(env, napi_create_array(env, &out));
  uint32_t i = 0;
  for (double s : bound->program->seconds()) check(env, napi_set_element(env, out, i++, to_js(env, s)));
  return out;
}

// limits(isa, threads): a promise of { readBytesPerSecond, int8OpsPerSecond, floatOpsPerSecond }, measured.
napi_value limits(napi_env env, const Arguments& a) {
  const KernelTable& kernels = choose_kernels(text(env, a.at(0)));
  const int threads = static_cast<int>(number(env, a.at(1)));
  auto measured = std::make_shared<Limits>();
  return in_background(env, nullptr, [&kernels, threads, measured] { *measured = measure_limits(kernels, threads); },
                       [measured](napi_env e) {
                         napi_value out;
                         check(e, napi_create_object(e, &out));
                         check(e, napi_set_named_property(e, out, "readBytesPerSecond", to_js(e, measured->read_bytes)));
                         check(e, napi_set_named_property(e, out, "int8OpsPerSecond", to_js(e, measured->int8_ops)));
                         check(e, napi_set_named_property(e, out, "floatOpsPerSecond", to_js(e, measured->float_ops)));
                         return out;
                       });
}

// dispose...(handle): lets go; memory is freed once no run uses it.
template <class T>
napi_value dispose(napi_env env, const Arguments& a) {
  unwrap<T>(env, a.at(0)).reset();
  return nullptr;
}

napi_value init(napi_env env, napi_value exports) {
  const struct {
    const char* name;
    napi_callback call;
  } functions[] = {
      {"isas", entry<isas>}, {"ops", entry<ops>}, {"team", entry<team>}, {"load", entry<load>}, {"weightBytes", entry<weight_bytes>},
      {"convert", entry<convert>}, {"random", entry<random>}, {"memory", entry<memory>}, {"prepare", entry<prepare>}, {"run", entry<run>}, {"seconds", entry<seconds>}, {"limits", entry<limits>},
      {"disposeTeam", entry<dispose<Team>>}, {"disposeWeights", entry<dispose<Weights>>}, {"disposeMemory", entry<dispose<Memory>>}, {"disposeProgram", entry<dispose<Bound>>},
  };
  for (const auto& f : functions) {
    napi_value v;
    if (napi_create_function(env, f.name, NAPI_AUTO_LENGTH, f.call, nullptr, &v) != napi_ok) return nullptr;
    napi_set_named_property(env, exports, f.name, v);
  }
  return exports;
}

}  // namespace

NAPI_MODULE(mixtape, init)
