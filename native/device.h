// What runs programs: an instruction set's kernels, a team of threads, the workspace that all programs share, and a thread
// of its own that takes steps from a queue and is worker 0 of the team. Knows no Node.
#pragma once
#include <deque>
#include <mutex>
#include <set>

#include "plan.h"

// A run of a program, from the queue to the caller that is told how it went.
struct Step {
  Step() = default;
  Step(Step&&) = default;
  virtual ~Step() = default;

  Program* program = nullptr;
  std::vector<int64_t> sizes;
  std::vector<Span> inputs, outputs;
  std::vector<int32_t> calls;
  std::string error;  // "" where it went well
};

class Device {
 public:
  // `done` is called on the device's thread after each step; `finished` then has it.
  Device(const KernelTable& kernels, int threads, std::function<void()> done);
  // Waits for the step that is running; drops those that have not begun.
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const KernelTable& kernels() const { return kernels_; }

  // The workspace is as large as the largest of the programs that are announced; it changes between steps.
  // Throws std::runtime_error when that much memory cannot be mapped.
  void announce(const Program& program);
  void forget(const Program& program);

  // Steps run one after another, in the order of these calls. A step's destructor runs where `finished` or ~Device is called.
  void post(std::unique_ptr<Step> step);
  std::vector<std::unique_ptr<Step>> finished();

 private:
  void loop();
  void run(Step& step);

  const KernelTable& kernels_;
  const std::function<void()> done_;
  Team team_;
  std::mutex lock_;  // of the next three
  std::multiset<size_t> arenas_;
  std::deque<std::unique_ptr<Step>> waiting_;
  std::vector<std::unique_ptr<Step>> finished_;
  std::unique_ptr<Memory> workspace_;  // of the device's thread
  alignas(64) std::atomic<uint32_t> posted_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};
