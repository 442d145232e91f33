// Files mapped into memory, which survive what happens to the file meanwhile: a page that can no longer be read (the file
// was truncated, the disk failed) becomes zeros instead of ending the process with SIGBUS, and the mapping says so. Knows
// no format.
#pragma once
#include <sys/stat.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

constexpr size_t HUGE_PAGE = size_t{2} << 20;
// Huge pages that hold this many bytes.
constexpr size_t huge_pages(size_t bytes) { return (bytes + HUGE_PAGE - 1) / HUGE_PAGE; }
// Address space that starts at a huge page's boundary, without memory behind it yet; null if there is none.
uint8_t* reserve_huge(size_t bytes, int protection);

class Mapping {
 public:
  // Throws std::runtime_error, naming the file, if it cannot be opened or is empty.
  explicit Mapping(const std::string& path);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  // The address of a range of the file. Throws std::runtime_error if the file is shorter.
  const uint8_t* at(uint64_t offset, uint64_t bytes) const;
  // Throws std::runtime_error if what was read so far may not be what the file held when it was mapped: a page could not be
  // read, or the file's size or time of change differs. Costs one system call; may be called from any thread.
  void check() const;

  size_t bytes() const { return bytes_; }
  const uint8_t* data() const { return data_; }

  // Reads `count` huge pages of the mapping, from the `first` on, and says whether they came on huge pages of the page cache: newer
  // systems give them to files that are read for the first time. Those that all processes share are worth keeping.
  bool on_huge_pages(size_t first, size_t count) const;
  // Prepares `copy_to_huge_pages`; false if this system has no huge pages for a process that asks.
  bool reserve_copies();
  // Replaces `count` huge pages of the mapping, from the `first` on, by anonymous memory with the file's content, on huge pages where
  // the system has them. Addresses stay valid, and other threads may read them meanwhile. False, with nothing changed, if
  // memory or the file gives out. Different ranges may be copied by several threads. `drop_cached`: also drop the range from the page
  // cache, so that it is not in memory twice.
  bool copy_to_huge_pages(size_t first, size_t count, bool drop_cached);
  // Everything that is read was copied: what happens to the file no longer matters. Throws as `check` does.
  void settle();

 private:
  size_t span() const { return huge_pages(bytes_) * HUGE_PAGE; }

  struct Range;
  friend class Faults;

  const std::string path_;
  int file_ = -1;  // kept open: `check` must ask about this file, whatever has its name now
  struct stat opened_ {};
  uint8_t* data_ = nullptr;    // at a huge page's boundary; the last huge page is reserved to its end
  uint8_t* copies_ = nullptr;  // where copies are made, at the same distance for all
  std::vector<uint8_t> moved_;  // of each huge page, whether its copy was moved, so that the place is no longer ours
  size_t bytes_ = 0;
  std::atomic<bool> settled_{false};
  Range* range_ = nullptr;
};
