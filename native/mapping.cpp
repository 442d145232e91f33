#include "mapping.h"

#include <fcntl.h>
#include <signal.h>
#ifdef __linux__
#include <linux/fs.h>
#include <sys/ioctl.h>
#endif
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <stdexcept>

#if defined(__linux__) && !defined(MADV_COLLAPSE)
#define MADV_COLLAPSE 25  // since Linux 6.1; headers may be older than the system
#endif
#if defined(__linux__) && !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // since Linux 5.14
#endif
#if defined(__linux__) && !defined(MADV_POPULATE_READ)
#define MADV_POPULATE_READ 22  // since Linux 5.14
#endif
#if defined(__linux__) && !defined(PAGEMAP_SCAN)  // since Linux 6.7
#define PAGE_IS_HUGE (1 << 6)
struct page_region {
  uint64_t start, end, categories;
};
struct pm_scan_arg {
  uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#endif

// A range of addresses that belongs to a mapping, or is free for the next one (begin = 0). Ranges form a list that only
// grows, so that the handler can walk it without a lock while other threads map and unmap.
struct Mapping::Range {
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<bool> failed{false};
  Range* next = nullptr;
};

class Faults {
 public:
  using Range = Mapping::Range;

  static Range* claim(uintptr_t begin, size_t bytes) {
    std::lock_guard guard(lock_);
    install();
    Range* range = first_.load();
    while (range && range->begin.load()) range = range->next;
    if (!range) {
      range = new Range;
      range->next = first_.load();
      first_.store(range, std::memory_order_release);
    }
    range->failed = false;
    range->end = begin + bytes;
    range->begin.store(begin, std::memory_order_release);
    return range;
  }

  static void release(Range* range) {
    std::lock_guard guard(lock_);
    range->begin = 0;
  }

 private:
  // Once per process, and never removed: another handler may have been put on top that returns to ours.
  static void install() {
    if (installed_) return;
    struct sigaction ours {};
    ours.sa_sigaction = handle;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigemptyset(&ours.sa_mask);
    if (sigaction(SIGBUS, &ours, &before_) != 0) throw std::runtime_error(std::string("cannot handle SIGBUS: ") + std::strerror(errno));
    installed_ = true;
  }

  // Runs in the thread that touched the page. Uses no lock, no memory and no library function but mmap, sigaction and raise; mmap is
  // a plain system call wherever this is compiled, though POSIX does not list it among the functions safe in a handler.
  static void handle(int signal, siginfo_t* info, void* context) {
    const int kept = errno;
    // Signals sent by a process (si_code <= 0) carry no address.
    const uintptr_t address = info->si_code > 0 ? reinterpret_cast<uintptr_t>(info->si_addr) : 0;
    for (Range* range = first_.load(std::memory_order_acquire); address && range; range = range->next) {
      const uintptr_t begin = range->begin.load(std::memory_order_acquire), end = range->end.load();
      if (!begin || address < begin || address >= end) continue;
      // Everything from here to the end at once: a file of many gigabytes would fault millions of times, and whatever is
      // computed from this mapping is discarded anyway.
      const uintptr_t page = address & ~(page_ - 1);
      if (mmap(reinterpret_cast<void*>(page), end - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED) break;
      range->failed = true;
      errno = kept;
      return;
    }
    errno = kept;
    pass_on(signal, info, context);
  }

  // As if this handler had never been installed.
  static void pass_on(int signal, siginfo_t* info, void* context) {
    if (before_.sa_flags & SA_SIGINFO) return before_.sa_sigaction(signal, info, context);
    if (before_.sa_handler != SIG_DFL && before_.sa_handler != SIG_IGN) return before_.sa_handler(signal);
    if (before_.sa_handler == SIG_IGN && info->si_code <= 0) return;
    struct sigaction plain {};
    plain.sa_handler = SIG_DFL;
    sigaction(signal, &plain, nullptr);
    if (info->si_code <= 0) raise(signal);  // otherwise the same access faults again when this returns
  }

  static inline std::mutex lock_;  // of `claim` and `release`
  static inline std::atomic<Range*> first_{nullptr};
  static inline bool installed_ = false;
  static inline struct sigaction before_ {};
  static inline const uintptr_t page_ = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
};

#ifdef __APPLE__
static timespec changed(const struct stat& info) { return info.st_mtimespec; }
#else
static timespec changed(const struct stat& info) { return info.st_mtim; }
#endif

Mapping::Mapping(const std::string& path) : path_(path) {
  file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file_ < 0) throw std::runtime_error(path + ": cannot be opened: " + std::strerror(errno));
  if (fstat(file_, &opened_) == 0) bytes_ = static_cast<size_t>(opened_.st_size);
  data_ = bytes_ ? reserve_huge(span(), PROT_NONE) : nullptr;
  void* p = data_ ? mmap(data_, bytes_, PROT_READ, MAP_SHARED | MAP_FIXED, file_, 0) : MAP_FAILED;
  const int reason = errno;
  try {
    if (p == MAP_FAILED) throw std::runtime_error(path + ": cannot be mapped: " + (bytes_ ? std::strerror(reason) : "the file is empty"));
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes_, MADV_HUGEPAGE);  // for a tmpfs that gives huge pages to those who ask
#endif
    range_ = Faults::claim(reinterpret_cast<uintptr_t>(data_), bytes_);
  } catch (...) {
    if (data_) munmap(data_, span());
    close(file_);
    throw;
  }
}

Mapping::~Mapping() {
  Faults::release(range_);
  munmap(data_, span());
  // Where a copy was moved away from, the system may have put something else by now.
  for (size_t at = 0, end; at < moved_.size(); at = end) {
    for (end = at + 1; end < moved_.size() && moved_[end] == moved_[at];) end++;
    if (!moved_[at]) munmap(copies_ + at * HUGE_PAGE, (end - at) * HUGE_PAGE);
  }
  close(file_);
}

static const size_t PAGE = static_cast<size_t>(sysconf(_SC_PAGESIZE));

uint8_t* reserve_huge(size_t bytes, int protection) {
  bytes = (bytes + PAGE - 1) / PAGE * PAGE;
  const size_t all = bytes + HUGE_PAGE;
  void* p = mmap(nullptr, all, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(p), aligned = huge_pages(begin) * HUGE_PAGE;
  if (aligned > begin) munmap(p, aligned - begin);
  if (begin + all > aligned + bytes) munmap(reinterpret_cast<void*>(aligned + bytes), begin + all - aligned - bytes);
  return reinterpret_cast<uint8_t*>(aligned);
}

// Reads exactly `bytes`, or less at the end of the file; false on a failure.
static bool read_at(int file, uint8_t* to, size_t bytes, size_t offset) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = pread(file, to + done, bytes - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n == 0;
    done += static_cast<size_t>(n);
  }
  return true;
}

bool Mapping::on_huge_pages(size_t first, size_t count) const {
#ifdef __linux__
  static const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  const size_t bytes = count * HUGE_PAGE;
  uint8_t* const from = data_ + first * HUGE_PAGE;
  if (pagemap < 0 || (first + count) * HUGE_PAGE > bytes_ || madvise(from, bytes, MADV_POPULATE_READ) != 0) return false;
  page_region found[16];
  pm_scan_arg scan{};
  scan.size = sizeof scan;
  scan.start = reinterpret_cast<uintptr_t>(from);
  scan.end = scan.start + bytes;
  scan.vec = reinterpret_cast<uintptr_t>(found);
  scan.vec_len = sizeof found / sizeof *found;
  scan.category_mask = scan.return_mask = PAGE_IS_HUGE;
  const int regions = ioctl(pagemap, PAGEMAP_SCAN, &scan);  // an error where the system is older
  size_t huge = 0;
  for (int i = 0; i < regions; i++) huge += found[i].end - found[i].start;
  return huge == bytes;
#else
  return false;
#endif
}

// An address has one content throughout: the file's page before mremap, the copy of it afterwards. mremap holds the lock of the
// process's address space, for which page faults wait, and ends only when no processor has an old translation.
bool Mapping::copy_to_huge_pages(size_t first, size_t count, bool drop_cached) {
#ifdef __linux__
  const size_t offset = first * HUGE_PAGE, bytes = count * HUGE_PAGE;
  uint8_t* const copy = copies_ + offset;
  if (madvise(copy, bytes, MADV_POPULATE_WRITE) != 0 && errno != EINVAL) return false;  // EINVAL: before Linux 5.14; the read below does it
  if (!read_at(file_, copy, std::min(bytes, bytes_ - offset), offset)) return false;
  madvise(copy, bytes, MADV_COLLAPSE);  // where there was no huge page at once: look harder; small pages still serve
  if (range_->failed || mprotect(copy, bytes, PROT_READ) != 0) return false;
  if (mremap(copy, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, data_ + offset) == MAP_FAILED) return false;
  std::fill_n(moved_.begin() + static_cast<ptrdiff_t>(first), count, uint8_t{1});
  if (drop_cached) posix_fadvise(file_, static_cast<off_t>(offset), static_cast<off_t>(bytes), POSIX_FADV_DONTNEED);
  return true;
#else
  return false;
#endif
}

void Mapping::settle() {
  check();
  settled_ = true;
}

bool Mapping::reserve_copies() {
#ifdef __linux__
  if (!copies_ && (copies_ = reserve_huge(span(), PROT_READ | PROT_WRITE))) moved_.resize(span() / HUGE_PAGE);
  return copies_ && madvise(copies_, span(), MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

const uint8_t* Mapping::at(uint64_t offset, uint64_t bytes) const {
  if (offset > bytes_ || bytes > bytes_ - offset)
    throw std::runtime_error(path_ + ": is " + std::to_string(bytes_) + " bytes, a tensor claims " + std::to_string(bytes) + " from " + std::to_string(offset));
  return data_ + offset;
}

void Mapping::check() const {
  if (settled_) return;
  const char* rule = "; to exchange a model in use, write a new file beside it and rename it into place";
  if (range_->failed) throw std::runtime_error(path_ + ": cannot be read any more: it was truncated or its disk failed while the model was in use" + rule);
  struct stat now {};
  if (fstat(file_, &now) != 0) throw std::runtime_error(path_ + ": cannot be read any more: " + std::strerror(errno));
  const timespec then = changed(opened_), last = changed(now);
  if (now.st_size != opened_.st_size || last.tv_sec != then.tv_sec || last.tv_nsec != then.tv_nsec)
    throw std::runtime_error(path_ + ": was changed while the model was in use, so its weights are not those that were loaded" + rule);
}
