#include "machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "threads.h"
#include "weights.h"

static constexpr int PASSES = 7;
static constexpr double PASS_SECONDS = 0.01;
static constexpr int64_t UNIT = 4096;

// So large that the caches hold almost nothing of it when the next pass begins.
static size_t buffer_bytes(size_t memory) {
  long cache = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
  cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  const size_t wanted = std::clamp<size_t>(cache > 0 ? 8 * static_cast<size_t>(cache) : 0, size_t{256} << 20, size_t{2} << 30);
  return std::min(wanted, std::max(memory, size_t{64} << 20));
}

static double seconds_of(Team& team, const std::function<void(const Worker&)>& job) {
  const auto start = std::chrono::steady_clock::now();
  team.run(job);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The best of several passes, because disturbances do not count against the machine's limit.
static double fastest(Team& team, const std::function<void(const Worker&)>& job) {
  double best = seconds_of(team, job);
  for (int i = 1; i < PASSES; i++) best = std::min(best, seconds_of(team, job));
  return best;
}

static double arithmetic(Team& team, LimitKernels::Loop loop, int64_t ops_a_turn) {
  std::vector<float> sinks(static_cast<size_t>(team.count()));
  int64_t turns = 1000;
  auto job = [&](const Worker& worker) { sinks[static_cast<size_t>(worker.index)] = loop(turns); };
  while (seconds_of(team, job) < PASS_SECONDS) turns *= 2;
  return static_cast<double>(turns) * static_cast<double>(ops_a_turn) * team.count() / fastest(team, job);
}

Limits measure_limits(const KernelTable& kernels, int threads, size_t memory) {
  Team team(threads);
  const LimitKernels& limit = kernels.limits;
  Limits found{};
  {
    Memory buffer(buffer_bytes(memory));
#ifdef MADV_HUGEPAGE
    madvise(buffer.data(), buffer.bytes(), MADV_HUGEPAGE);
#endif
    std::vector<float> sinks(static_cast<size_t>(threads));
    auto part = [&](const Worker& worker, int64_t& begin, int64_t& end) { worker.share(static_cast<int64_t>(buffer.bytes()), UNIT, begin, end); };
    team.run([&](const Worker& worker) {  // write all pages; unwritten ones would share one page of zeros
      int64_t begin, end;
      part(worker, begin, end);
      std::memset(buffer.data() + begin, 1, static_cast<size_t>(end - begin));
    });
    found.read_bytes = static_cast<double>(buffer.bytes()) / fastest(team, [&](const Worker& worker) {
      int64_t begin, end;
      part(worker, begin, end);
      sinks[static_cast<size_t>(worker.index)] = limit.read(buffer.data() + begin, end - begin);
    });
  }
  found.int8_ops = arithmetic(team, limit.int8, limit.int8_ops);
  found.float_ops = arithmetic(team, limit.float32, limit.float_ops);
  return found;
}
