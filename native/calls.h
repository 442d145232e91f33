// How the addon's functions are called: errors become exceptions, and work goes to Node's thread pool as promises.
#pragma once
#include <functional>

#include "js.h"
#include "runner.h"
#include "weights.h"

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

// Runs `work` on Node's thread pool; `result` then creates the value that the promise resolves to.
struct Job {
  std::function<void()> work;
  std::function<napi_value(napi_env)> result;
  std::string error;
  napi_deferred deferred = nullptr;
  napi_async_work handle = nullptr;
  napi_ref keep = nullptr;  // what must stay alive until completion
};

inline napi_value in_background(napi_env env, napi_value keep, std::function<void()> work, std::function<napi_value(napi_env)> result) {
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
        j->error = "internal: cannot convert the result";
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

inline FilePart file_part(napi_env env, napi_value p) {
  return {text(env, get(env, p, "file")), static_cast<uint64_t>(number(env, get(env, p, "offset"))), static_cast<uint64_t>(number(env, get(env, p, "bytes")))};
}

// [{ name, stored, dtype, shape, parts: [{ file, offset, bytes }] }]
inline std::vector<WeightSpec> weight_specs(napi_env env, napi_value specs) {
  return list<WeightSpec>(env, specs, [&](napi_value v) {
    return WeightSpec{text(env, get(env, v, "name")), static_cast<Dtype>(number(env, get(env, v, "stored"))), static_cast<Dtype>(number(env, get(env, v, "dtype"))),
                      list<int64_t>(env, get(env, v, "shape"), [&](napi_value d) { return static_cast<int64_t>(number(env, d)); }),
                      list<FilePart>(env, get(env, v, "parts"), [&](napi_value p) { return file_part(env, p); })};
  });
}

// A NativePlan of src/backend/addon.ts.
inline Plan plan_of(napi_env env, napi_value p) {
  auto string = [&](napi_value v) { return text(env, v); };
  Plan plan;
  plan.ops = list<std::string>(env, get(env, p, "ops"), string);
  plan.weights = list<std::string>(env, get(env, p, "weights"), string);
  plan.values = numbers<int32_t>(env, get(env, p, "values"));
  plan.calls = numbers<int32_t>(env, get(env, p, "calls"));
  plan.params = numbers<double>(env, get(env, p, "params"));
  plan.capacity = list<int64_t>(env, get(env, p, "capacity"), [&](napi_value v) { return static_cast<int64_t>(number(env, v)); });
  plan.arena_bytes = static_cast<size_t>(number(env, get(env, p, "arenaBytes")));
  return plan;
}

// run(device, program, sizes, inputs, outputs, calls), of any backend.
inline napi_value run_step(napi_env env, Runner& runner, const Arguments& a) {
  Step step;
  step.sizes = list<int64_t>(env, a.at(2), [&](napi_value v) { return static_cast<int64_t>(number(env, v)); });
  step.inputs = list<Span>(env, a.at(3), [&](napi_value v) { return span_or_null(env, v); });
  step.outputs = list<Span>(env, a.at(4), [&](napi_value v) { return span_or_null(env, v); });
  step.calls = numbers<int32_t>(env, a.at(5));
  napi_value keep;
  check(env, napi_create_array_with_length(env, 2, &keep));
  check(env, napi_set_element(env, keep, 0, a[3]));
  check(env, napi_set_element(env, keep, 1, a[4]));
  return runner.run(env, alive<Prepared>(env, a.at(1), "program"), std::move(step), keep);
}

// dispose...(handle): frees the memory once no run uses it.
template <class T>
napi_value dispose(napi_env env, const Arguments& a) {
  unwrap<T>(env, a.at(0)).reset();
  return nullptr;
}
