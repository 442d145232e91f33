#include "device.h"

#include <utility>

Device::Device(const KernelTable& kernels, int threads, std::function<void()> done)
    : kernels_(kernels), done_(std::move(done)), team_(threads), workspace_(std::make_unique<Memory>(0)), thread_([this] { loop(); }) {}

Device::~Device() {
  stop_ = true;
  posted_.fetch_add(1);
  posted_.notify_one();
  thread_.join();
}

void Device::announce(const Program& program) {
  std::lock_guard guard(lock_);
  // Mapped and unmapped without touching a page: costs nothing, and fails here rather than in a step.
  if (arenas_.empty() || program.arena_bytes() > *arenas_.rbegin()) Memory fits(program.arena_bytes());
  arenas_.insert(program.arena_bytes());
}

void Device::forget(const Program& program) {
  std::lock_guard guard(lock_);
  arenas_.erase(arenas_.find(program.arena_bytes()));
}

void Device::post(std::unique_ptr<Step> step) {
  {
    std::lock_guard guard(lock_);
    waiting_.push_back(std::move(step));
  }
  posted_.fetch_add(1, std::memory_order_release);
  posted_.notify_one();
}

std::vector<std::unique_ptr<Step>> Device::finished() {
  std::lock_guard guard(lock_);
  return std::exchange(finished_, {});
}

void Device::run(Step& step) {
  size_t bytes;
  {
    std::lock_guard guard(lock_);
    bytes = arenas_.empty() ? 0 : *arenas_.rbegin();
  }
  if (bytes != workspace_->bytes()) {
    workspace_ = std::make_unique<Memory>(0);  // free the old one first: nothing in it outlives a step
    workspace_ = std::make_unique<Memory>(bytes);
  }
  step.program->run(team_, *workspace_, step.sizes, step.inputs, step.outputs, step.calls);
}

void Device::loop() {
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
      run(*step);
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
