#include "threads.h"

#include <cstdio>
#include <stdexcept>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void pause_cpu() { _mm_pause(); }
#else
static inline void pause_cpu() { asm volatile("yield"); }
#endif

// Spin briefly for a thread that is about to arrive; then yield, so that one that lost its core gets it back, for about as
// long as the gap between two generation steps; then sleep, so that an idle engine uses no CPU time.
static constexpr int SPINS = 300, YIELDS = 200;

void await_change(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < SPINS; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause_cpu();
  }
  for (int i = 0; i < YIELDS; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    std::this_thread::yield();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

void Barrier::wait() {
  if (count == 1) return;
  uint32_t now = generation.load(std::memory_order_relaxed);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
    arrived.store(0, std::memory_order_relaxed);
    generation.store(now + 1, std::memory_order_release);
    generation.notify_all();
  } else {
    await_change(generation, now);
  }
}

void Barrier::fail(const char* format, long long a, long long b) {
  if (!failed.exchange(true)) std::snprintf(message, sizeof message, format, a, b);
}

void Worker::wait() const { barrier->wait(); }
void Worker::fail(const char* format, long long a, long long b) const { barrier->fail(format, a, b); }

Team::Team(int count) : barrier_(count), scratch_(static_cast<size_t>(count * SCRATCH_BYTES)) {
  try {
    for (int i = 1; i < count; i++) threads_.emplace_back([this, i] { loop(i); });
  } catch (const std::system_error& e) {  // stop those that started
    stop_ = true;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& t : threads_) t.join();
    throw std::runtime_error("cannot start " + std::to_string(count) + " threads: " + e.what());
  }
}

Team::~Team() {
  stop_ = true;
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (auto& t : threads_) t.join();
}

std::string Team::run(const std::function<void(const Worker&)>& job) {
  barrier_.failed = false;
  barrier_.message[0] = 0;
  job_ = &job;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  job(Worker{0, barrier_.count, &barrier_, scratch_.data()});
  barrier_.wait();
  return barrier_.message;
}

void Team::loop(int index) {
  uint32_t seen = 0;
  for (;;) {
    await_change(epoch_, seen);
    seen++;
    if (stop_) return;
    (*job_)(Worker{index, barrier_.count, &barrier_, scratch_.data()});
    barrier_.wait();
  }
}
