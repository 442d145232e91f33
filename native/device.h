// Runs programs: an instruction set's kernels, a team of threads, the workspace shared by all programs, and a dedicated
// thread that takes steps from a queue and is worker 0 of the team. Knows no Node.
#pragma once
#include <deque>
#include <mutex>
#include <set>

#include "plan.h"

// A run of a program, from queueing to reporting its outcome to the caller.
struct Step {
  Step() = default;
  Step(Step&&) = default;
  virtual ~Step() = default;

  Program* program = nullptr;
  std::vector<int64_t> sizes;
  std::vector<Span> inputs, outputs;
  std::vector<int32_t> calls;
  std::string error;  // "" on success
};

class Device {
 public:
  // `done` is called on the device's thread after each step, which `finished` then returns.
  Device(const KernelTable& kernels, int threads, std::function<void()> done);
  // Waits for the running step; drops those that have not started.
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const KernelTable& kernels() const { return kernels_; }

  // The workspace is as large as the largest announced program needs; it is resized between steps.
  // Throws std::runtime_error if that much memory cannot be mapped.
  void announce(const Program& program);
  void forget(const Program& program);

  // Steps run one at a time, in the order of these calls. A step is destroyed by the thread that calls `finished` or ~Device.
  void post(std::unique_ptr<Step> step);
  std::vector<std::unique_ptr<Step>> finished();

 private:
  void loop();
  void run(Step& step);

  const KernelTable& kernels_;
  const std::function<void()> done_;
  Team team_;
  std::mutex lock_;  // protects the next three
  std::multiset<size_t> arenas_;
  std::deque<std::unique_ptr<Step>> waiting_;
  std::vector<std::unique_ptr<Step>> finished_;
  std::unique_ptr<Memory> workspace_;  // used only by the device's thread
  alignas(64) std::atomic<uint32_t> posted_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};
