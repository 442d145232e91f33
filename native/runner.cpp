#include "runner.h"

namespace {

struct Promised : Step {
  Promised(Step&& step, std::shared_ptr<Runner> r, std::shared_ptr<Prepared> p) : Step(std::move(step)), runner(std::move(r)), prepared(std::move(p)) { run = prepared->run; }

  const std::shared_ptr<Runner> runner;  // which settles it
  const std::shared_ptr<Prepared> prepared;
  napi_deferred deferred = nullptr;
  napi_ref keep = nullptr;
};

}  // namespace

Runner::Runner(napi_env env) : env_(env) {
  // The queue's thread only wakes ours: finished steps wait in the queue's list, so that none is lost on shutdown.
  auto wake = [](napi_env e, napi_value, void* self, void*) {
    if (e) static_cast<Runner*>(self)->shared_from_this()->settle(e);
  };
  check(env, napi_create_threadsafe_function(env, nullptr, nullptr, to_js(env, "mixtape"), 0, 1, nullptr, nullptr, this, wake, &wake_));
  check(env, napi_unref_threadsafe_function(env, wake_));
  try {
    queue_ = std::make_unique<Queue>([this] { napi_call_threadsafe_function(wake_, nullptr, napi_tsfn_nonblocking); });
  } catch (...) {
    napi_release_threadsafe_function(wake_, napi_tsfn_abort);
    throw;
  }
  check(env, napi_add_env_cleanup_hook(env, tear_down, this));
}

Runner::~Runner() { shut(); }

napi_value Runner::run(napi_env env, std::shared_ptr<Prepared> prepared, Step step, napi_value keep) {
  if (!queue_ || closing_) throw std::runtime_error("the backend has been disposed of");
  auto pending = std::make_unique<Promised>(std::move(step), shared_from_this(), std::move(prepared));
  napi_value promise;
  check(env, napi_create_reference(env, keep, 1, &pending->keep));
  check(env, napi_create_promise(env, &pending->deferred, &promise));
  if (!pending_++) napi_ref_threadsafe_function(env, wake_);
  queue_->post(std::move(pending));
  return promise;
}

void Runner::settle(napi_env env) {
  if (!queue_) return;
  for (const auto& step : queue_->finished()) {
    auto& done = static_cast<Promised&>(*step);
    napi_delete_reference(env, done.keep);
    napi_value value;
    if (done.error.empty()) {
      napi_get_undefined(env, &value);
      napi_resolve_deferred(env, done.deferred, value);
    } else {
      napi_value message;
      napi_create_string_utf8(env, done.error.c_str(), done.error.size(), &message);
      napi_create_error(env, nullptr, message, &value);
      napi_reject_deferred(env, done.deferred, value);
    }
    pending_--;
  }
  if (pending_) return;
  napi_unref_threadsafe_function(env, wake_);
  if (closing_) shut();
}

void Runner::close() {
  closing_ = true;
  if (!pending_) shut();
}

void Runner::shut() {
  if (!queue_) return;
  queue_.reset();
  napi_remove_env_cleanup_hook(env_, tear_down, this);
  napi_release_threadsafe_function(wake_, napi_tsfn_abort);
}

// The environment is shutting down. Wait for the running step, because it uses arrays that are about to be freed. The
// promises of the others never settle. N-API releases the threadsafe function itself.
void Runner::tear_down(void* data) {
  const std::shared_ptr<Runner> self = static_cast<Runner*>(data)->shared_from_this();
  self->queue_.reset();
}
