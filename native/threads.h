// A team of threads, including the caller's, that all run the same job at once, one job at a time. Idle threads spin briefly,
// then sleep.
#pragma once
#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "weights.h"

// Waits until `value` differs from `old`: spins, then yields, then sleeps.
void await_change(const std::atomic<uint32_t>& value, uint32_t old);

struct Barrier {
  explicit Barrier(int count) : count(count) {}
  void wait();
  void fail(const char* format, long long a, long long b);

  const int count;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<uint32_t> generation{0};
  std::atomic<bool> failed{false};
  char message[200] = "";
};

class Team {
 public:
  explicit Team(int count);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Calls job(worker) on every thread of the team and waits for all; returns the first reported failure, or "". The
  // caller is worker 0. Only one thread at a time may call this.
  std::string run(const std::function<void(const Worker&)>& job);
  int count() const { return barrier_.count; }

 private:
  void loop(int index);

  Barrier barrier_;
  Memory scratch_;  // takes no memory until a kernel writes to it
  const std::function<void(const Worker&)>* job_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};
