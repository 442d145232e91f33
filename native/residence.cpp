#include "residence.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <exception>
#include <map>

// Huge pages moved at once: a few milliseconds of work, so that a stop takes effect soon.
static constexpr size_t PIECE = 8;
static constexpr int QUIET = 10;  // of -20 to 19

Residence::Residence(const std::vector<Stretch>& stretches) {
  std::map<Mapping*, std::vector<std::pair<size_t, size_t>>> ranges;
  for (const Stretch& s : stretches) {
    if (!ranges.count(s.mapping)) mappings_.push_back(s.mapping);
    ranges[s.mapping].push_back({s.offset / HUGE_PAGE, huge_pages(s.offset + s.bytes)});
  }
  for (Mapping* mapping : mappings_) {
    auto& list = ranges[mapping];
    std::sort(list.begin(), list.end());
    size_t at = 0;  // everything before it has its piece
    for (const auto& [first, end] : list)
      for (at = std::max(at, first); at < end;) {
        const size_t count = std::min(PIECE, end - at);
        pieces_.push_back({mapping, at, count});
        bytes_ += count * HUGE_PAGE;
        at += count;
      }
  }
}

Residence::~Residence() {
  stop("unloaded");
  wait();
}

void Residence::start(int threads, bool quietly, bool drop_cached) {
  std::lock_guard guard(lock_);
  for (Mapping* mapping : mappings_)
    if (!mapping->reserve_copies()) {
      why_ = "this system offers no huge pages";
      return;
    }
  running_ = threads;
  for (int i = 0; i < threads; i++) threads_.emplace_back([=, this] { work(quietly, drop_cached); });
}

void Residence::work(bool quietly, bool drop_cached) {
#ifdef __linux__
  if (quietly) setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), QUIET);  // of this thread alone
#endif
  for (;;) {
    const size_t i = next_++;
    if (i >= pieces_.size() || stopping_) break;
    const Piece& piece = pieces_[i];
    if (quietly && piece.mapping->on_huge_pages(piece.first, piece.count)) {
      kept_ += piece.count * HUGE_PAGE;
      continue;
    }
    if (!piece.mapping->copy_to_huge_pages(piece.first, piece.count, drop_cached)) {
      fail("out of memory, or the file could not be read");
      break;
    }
    const size_t bytes = piece.count * HUGE_PAGE;
    if (moved_.fetch_add(bytes) + bytes < bytes_) continue;
    try {  // the last piece of all
      for (Mapping* mapping : mappings_) mapping->settle();
    } catch (const std::exception& e) {
      fail(e.what());
    }
  }
  running_--;
}

void Residence::fail(const std::string& why) {
  std::lock_guard guard(lock_);
  if (why_.empty()) why_ = why;
  stopping_ = true;
}

void Residence::stop(const std::string& why) {
  if (moved_ + kept_ < bytes_) fail(why);
}

void Residence::wait() {
  std::vector<std::thread> threads;
  {
    std::lock_guard guard(lock_);
    threads.swap(threads_);
  }
  for (std::thread& t : threads) t.join();
}

std::string Residence::why() const {
  std::lock_guard guard(lock_);
  return why_;
}

Pages pages_of(const std::vector<std::pair<const void*, size_t>>& ranges) {
  Pages found;
  FILE* maps = std::fopen("/proc/self/smaps", "re");
  if (!maps) return found;
  char line[512];
  bool ours = false;
  size_t resident = 0, huge = 0;
  const auto take = [&] {
    if (ours) {
      found.huge += huge;
      found.small += resident - std::min(resident, huge);
    }
    resident = huge = 0;
  };
  while (std::fgets(line, sizeof line, maps)) {
    uintptr_t from, to;
    size_t kib;
    if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &from, &to) == 2) {
      take();
      ours = std::any_of(ranges.begin(), ranges.end(), [&](const auto& r) {
        const auto begin = reinterpret_cast<uintptr_t>(r.first);
        return from < begin + r.second && to > begin;
      });
    } else if (std::sscanf(line, "Rss: %zu kB", &kib) == 1) resident = kib << 10;
    else if (std::sscanf(line, "AnonHugePages: %zu kB", &kib) == 1 || std::sscanf(line, "FilePmdMapped: %zu kB", &kib) == 1 ||
             std::sscanf(line, "ShmemPmdMapped: %zu kB", &kib) == 1)
      huge += kib << 10;
  }
  take();
  std::fclose(maps);
  return found;
}
