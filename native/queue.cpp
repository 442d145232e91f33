#include "queue.h"

#include <utility>

Queue::Queue(std::function<void()> done) : done_(std::move(done)), thread_([this] { loop(); }) {}

Queue::~Queue() {
  stop_ = true;
  posted_.fetch_add(1);
  posted_.notify_one();
  thread_.join();
}

void Queue::post(std::unique_ptr<Step> step) {
  {
    std::lock_guard guard(lock_);
    waiting_.push_back(std::move(step));
  }
  posted_.fetch_add(1, std::memory_order_release);
  posted_.notify_one();
}

std::vector<std::unique_ptr<Step>> Queue::finished() {
  std::lock_guard guard(lock_);
  return std::exchange(finished_, {});
}

void Queue::loop() {
  for (uint32_t seen = 0;; seen++) {
    while (posted_.load(std::memory_order_acquire) == seen) posted_.wait(seen, std::memory_order_acquire);
    if (stop_) return;
    std::unique_ptr<Step> step;
    {
      std::lock_guard guard(lock_);
      step = std::move(waiting_.front());
      waiting_.pop_front();
    }
    try {
      step->run(*step);
    } catch (const std::exception& e) {
      step->error = *e.what() ? e.what() : "internal: an error without a message";
    }
    {
      std::lock_guard guard(lock_);
      finished_.push_back(std::move(step));
    }
    done_();
  }
}
