// A thread of its own that runs steps one after another, so that none occupies Node's. Knows no programs.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "layout.h"

// A run of a program, from queueing to reporting its outcome to the caller.
struct Step {
  Step() = default;
  Step(Step&&) = default;
  virtual ~Step() = default;

  std::function<void(Step&)> run;  // throws std::exception
  std::vector<int64_t> sizes;
  std::vector<Span> inputs, outputs;
  std::vector<int32_t> calls;
  std::string error;  // "" on success
};

class Queue {
 public:
  // `done` is called on the queue's thread after each step, which `finished` then returns.
  explicit Queue(std::function<void()> done);
  // Waits for the running step; drops those that have not started.
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  // Steps run one at a time, in the order of these calls. A step is destroyed by the thread that calls `finished` or ~Queue.
  void post(std::unique_ptr<Step> step);
  std::vector<std::unique_ptr<Step>> finished();

 private:
  void loop();

  const std::function<void()> done_;
  std::mutex lock_;  // protects the next two
  std::deque<std::unique_ptr<Step>> waiting_;
  std::vector<std::unique_ptr<Step>> finished_;
  alignas(64) std::atomic<uint32_t> posted_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};
