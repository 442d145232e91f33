// Files mapped into memory, which survive what happens to the file meanwhile: a page that can no longer be read (the file
// was truncated, the disk failed) becomes zeros instead of ending the process with SIGBUS, and the mapping says so. Knows
// no format.
#pragma once
#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <string>

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

 private:
  struct Range;
  friend class Faults;

  const std::string path_;
  int file_ = -1;  // kept open: `check` must ask about this file, whatever has its name now
  struct stat opened_ {};
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  Range* range_ = nullptr;
};
