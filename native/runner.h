// A device as exposed to JavaScript: each run is a promise, settled on its environment's thread when the device's thread
// finishes the step. The device keeps the process alive only while a run is pending.
#pragma once
#include "device.h"
#include "js.h"

class Runner;

// A program together with everything that must outlive it.
struct Bound {
  Bound(std::shared_ptr<Runner> runner, std::shared_ptr<Weights> weights, std::vector<std::shared_ptr<Memory>> states, const Plan& plan);
  ~Bound();

  const std::shared_ptr<Runner> runner;
  const std::shared_ptr<Weights> weights;
  const std::vector<std::shared_ptr<Memory>> states;
  std::unique_ptr<Program> program;
};

// Used only on the environment's thread.
class Runner : public std::enable_shared_from_this<Runner> {
 public:
  Runner(napi_env env, const KernelTable& kernels, int threads);
  ~Runner();
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  // Null once closed.
  Device* device() const { return device_.get(); }
  // Throws std::runtime_error if closed. `keep`: what must not be collected before the promise settles.
  napi_value run(napi_env env, std::shared_ptr<Bound> bound, Step step, napi_value keep);
  // Refuses new runs, and stops the threads once none is pending.
  void close();

 private:
  void settle(napi_env env);
  void shut();
  static void tear_down(void* self);

  const napi_env env_;
  napi_threadsafe_function wake_ = nullptr;
  std::unique_ptr<Device> device_;
  int pending_ = 0;
  bool closing_ = false;
};
