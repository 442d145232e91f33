// Moves mapped weights into memory on huge pages, while programs read them. A processor that reads gigabytes through pages of
// 4 KiB spends its time on page tables. Knows no format.
#pragma once
#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "mapping.h"

// A part of a mapping that programs read.
struct Stretch {
  Mapping* mapping;
  size_t offset, bytes;
};

class Residence {
 public:
  // The stretches may overlap. Nothing moves yet.
  explicit Residence(const std::vector<Stretch>& stretches);
  // Stops moving.
  ~Residence();
  Residence(const Residence&) = delete;
  Residence& operator=(const Residence&) = delete;

  // Bytes of memory that moving takes.
  size_t bytes() const { return bytes_; }
  // Starts to move with this many threads. `quietly`: at low priority, and what is on huge pages of the page cache stays there.
  // `drop_cached` as in Mapping. Only once.
  void start(int threads, bool quietly, bool drop_cached);
  // Ends the threads at their next pause; what has moved stays moved.
  void stop(const std::string& why);
  // Waits until nothing moves any more.
  void wait();
  bool moving() const { return running_ > 0; }
  size_t moved() const { return moved_; }
  // Bytes that stay on huge pages of the page cache.
  size_t kept() const { return kept_; }
  // Why not everything was moved; empty if it was, or may yet be.
  std::string why() const;

 private:
  // Consecutive huge pages of one mapping.
  struct Piece {
    Mapping* mapping;
    size_t first, count;
  };
  void work(bool quietly, bool drop_cached);
  void fail(const std::string& why);

  std::vector<Piece> pieces_;
  std::vector<Mapping*> mappings_;
  size_t bytes_ = 0;
  std::atomic<size_t> next_{0}, moved_{0}, kept_{0};
  std::atomic<int> running_{0};
  std::atomic<bool> stopping_{false};
  mutable std::mutex lock_;  // of why_ and threads_
  std::string why_;
  std::vector<std::thread> threads_;
};

// Memory behind a range of addresses, by kind, in bytes.
struct Pages {
  size_t huge = 0, small = 0;
};
// Adds the ranges' pages, as the system counts them; both 0 where it does not tell. Takes milliseconds for gigabytes of small pages.
Pages pages_of(const std::vector<std::pair<const void*, size_t>>& ranges);
