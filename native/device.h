// Runs programs on the CPU: an instruction set's kernels, a team of threads, and the workspace shared by all programs. Knows no Node.
#pragma once
#include <memory>
#include <set>

#include "plan.h"
#include "queue.h"

class Device {
 public:
  Device(const KernelTable& kernels, int threads);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const KernelTable& kernels() const { return kernels_; }

  // The workspace is as large as the largest announced program needs; it is resized between steps.
  // Throws std::runtime_error if that much memory cannot be mapped.
  void announce(const Program& program);
  void forget(const Program& program);

  // One step at a time; the calling thread is worker 0 of the team.
  void run(Program& program, const Step& step);

 private:
  const KernelTable& kernels_;
  Team team_;
  std::mutex lock_;  // protects the next
  std::multiset<size_t> arenas_;
  std::unique_ptr<Memory> workspace_;
};
