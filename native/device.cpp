#include "device.h"

Device::Device(const KernelTable& kernels, int threads) : kernels_(kernels), team_(threads), workspace_(std::make_unique<Memory>(0)) {}

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

void Device::run(Program& program, const Step& step) {
  size_t bytes;
  {
    std::lock_guard guard(lock_);
    bytes = arenas_.empty() ? 0 : *arenas_.rbegin();
  }
  if (bytes != workspace_->bytes()) {
    workspace_ = std::make_unique<Memory>(0);  // free the old one first: nothing in it outlives a step
    workspace_ = std::make_unique<Memory>(bytes);
  }
  program.run(team_, *workspace_, step.sizes, step.inputs, step.outputs, step.calls);
}
