// A queue of steps as exposed to JavaScript: each run is a promise, settled on its environment's thread when the queue's thread finishes the
// step. It keeps the process alive only while a run is pending. Knows programs only as something that runs.
#pragma once
#include "js.h"
#include "queue.h"

// A prepared program: what it needs stays alive in `run`.
struct Prepared {
  std::function<void(Step&)> run;
  std::function<std::vector<double>()> seconds;
};

// Used only on the environment's thread.
class Runner : public std::enable_shared_from_this<Runner> {
 public:
  explicit Runner(napi_env env);
  ~Runner();
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  bool closed() const { return !queue_ || closing_; }
  // Throws std::runtime_error if closed. `keep`: what must not be collected before the promise settles.
  napi_value run(napi_env env, std::shared_ptr<Prepared> prepared, Step step, napi_value keep);
  // Refuses new runs, and stops the thread once none is pending.
  void close();

 private:
  void settle(napi_env env);
  void shut();
  static void tear_down(void* self);

  const napi_env env_;
  napi_threadsafe_function wake_ = nullptr;
  std::unique_ptr<Queue> queue_;
  int pending_ = 0;
  bool closing_ = false;
};
