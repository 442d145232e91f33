#include "weights.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <unordered_map>

#include "halves.h"
#include "quantize.h"

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (!bytes) return;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("out of memory: cannot map " + std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB");
  data_ = static_cast<uint8_t*>(p);
}

Memory::~Memory() {
  if (data_) munmap(data_, bytes_);
}

class Mapping {
 public:
  explicit Mapping(const std::string& path) : path(path) {
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) throw std::runtime_error(path + ": cannot be opened: " + std::strerror(errno));
    struct stat info {};
    if (fstat(fd, &info) == 0) bytes = static_cast<size_t>(info.st_size);
    void* p = bytes ? mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
    int reason = errno;
    close(fd);
    if (p == MAP_FAILED) throw std::runtime_error(path + ": cannot be mapped: " + (bytes ? std::strerror(reason) : "the file is empty"));
    data = static_cast<uint8_t*>(p);
  }
  ~Mapping() {
    if (data) munmap(data, bytes);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const uint8_t* at(const FilePart& part) const {
    if (part.offset > bytes || part.bytes > bytes - part.offset)
      throw std::runtime_error(path + ": is " + std::to_string(bytes) + " bytes, a tensor claims " + std::to_string(part.bytes) + " from " + std::to_string(part.offset));
    return data + part.offset;
  }

  const std::string path;
  uint8_t* data = nullptr;
  size_t bytes = 0;
};

static size_t element_bytes(Dtype dtype) { return dtype == F32 || dtype == I32 ? 4 : dtype == F16 || dtype == BF16 ? 2 : 1; }

size_t matrix_bytes(Dtype dtype, int64_t n, int64_t k) {
  if (dtype == INT8 || dtype == INT4) return static_cast<size_t>((n + TILE_ROWS - 1) / TILE_ROWS * groups_of(k) * block_bytes(dtype));
  if (dtype == Q8_0 || dtype == Q4_0) {
    if (k % HALF) throw std::runtime_error("internal: rows of " + std::to_string(k) + " numbers do not fill GGUF's blocks of 32");
    return static_cast<size_t>(n * (k / HALF) * gguf_block_bytes(dtype));
  }
  return static_cast<size_t>(n * k) * element_bytes(dtype);
}

static uint16_t load16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}

static void store16(uint8_t* p, uint16_t v) { std::memcpy(p, &v, 2); }

static void read_row(const uint8_t* m, Dtype dtype, int64_t r, int64_t k, float* row) {
  switch (dtype) {
    case F32: std::memcpy(row, m + r * k * 4, k * 4); break;
    case F16: for (int64_t c = 0; c < k; c++) row[c] = f16_to_f32(load16(m + (r * k + c) * 2)); break;
    case BF16: for (int64_t c = 0; c < k; c++) row[c] = bf16_to_f32(load16(m + (r * k + c) * 2)); break;
    case INT8:
    case INT4: expand_row(m, dtype, r, k, row); break;
    case Q8_0:
    case Q4_0: unpack_row(m, dtype, r, k, row); break;
    default: throw std::runtime_error("internal: weights of this format cannot be read");
  }
}

static void write_row(uint8_t* m, Dtype dtype, int64_t r, int64_t k, const float* row) {
  switch (dtype) {
    case F32: std::memcpy(m + r * k * 4, row, k * 4); break;
    case F16: for (int64_t c = 0; c < k; c++) store16(m + (r * k + c) * 2, f32_to_f16(row[c])); break;
    case BF16: for (int64_t c = 0; c < k; c++) store16(m + (r * k + c) * 2, f32_to_bf16(row[c])); break;
    case INT8:
    case INT4: quantize_row(m, dtype, r, k, row); break;
    case Q8_0:
    case Q4_0: pack_row(m, dtype, r, k, row); break;
    default: throw std::runtime_error("internal: weights of this format cannot be written");
  }
}

void convert_matrix(const uint8_t* from, Dtype stored, uint8_t* to, Dtype dtype, int64_t n, int64_t k) {
  std::vector<float> row(static_cast<size_t>(k));
  for (int64_t r = 0; r < n; r++) {
    if (take_row(from, stored, to, dtype, r, k)) continue;
    read_row(from, stored, r, k, row.data());
    write_row(to, dtype, r, k, row.data());
  }
  if (dtype == INT8 || dtype == INT4) {
    std::fill(row.begin(), row.end(), 0.f);
    for (int64_t r = n; r % TILE_ROWS; r++) write_row(to, dtype, r, k, row.data());
  }
}

void random_matrix(uint64_t seed, float deviation, uint8_t* to, Dtype dtype, int64_t n, int64_t k) {
  std::vector<float> row(static_cast<size_t>(k));
  for (int64_t r = 0; r < (dtype == INT8 || dtype == INT4 ? (n + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : n); r++) {
    random_row(seed, static_cast<uint64_t>(r), r < n ? deviation : 0, row.data(), k);
    write_row(to, dtype, r, k, row.data());
  }
}

void convert_file_part(const FilePart& part, Dtype stored, uint8_t* to, Dtype dtype, int64_t n, int64_t k) {
  Mapping mapping(part.file);
  if (part.bytes != matrix_bytes(stored, n, k)) throw std::runtime_error("internal: a part's bytes do not match its shape");
  convert_matrix(mapping.at(part), stored, to, dtype, n, k);
}

Weights::Weights(const std::vector<WeightSpec>& specs) {
  std::unordered_map<std::string, const Mapping*> by_path;
  auto mapping = [&](const std::string& path) {
    const Mapping*& found = by_path[path];
    if (!found) found = mappings_.emplace_back(std::make_unique<Mapping>(path)).get();
    return found;
  };
  for (const WeightSpec& spec : specs) {
    Weight weight{spec.dtype, spec.shape, {}};
    const bool stacked = spec.shape.size() == 3;
    if (spec.parts.size() != (stacked ? static_cast<size_t>(spec.shape[0]) : 1)) throw std::runtime_error("internal: " + spec.name + " has " + std::to_string(spec.parts.size()) + " parts");
    const int64_t k = spec.shape.back(), n = spec.shape.size() == 1 ? 1 : spec.shape[spec.shape.size() - 2];
    const size_t bytes = matrix_bytes(spec.stored, n, k);
    for (const FilePart& part : spec.parts) {
      if (part.bytes != bytes) throw std::runtime_error("internal: " + spec.name + " has a part of " + std::to_string(part.bytes) + " bytes, not " + std::to_string(bytes));
      const uint8_t* at = mapping(part.file)->at(part);
      const bool aligned = reinterpret_cast<uintptr_t>(at) % (spec.stored == INT8 || spec.stored == INT4 ? 2 : element_bytes(spec.stored)) == 0;
      if (spec.stored == spec.dtype && aligned) {
        weight.parts.push_back(const_cast<uint8_t*>(at));
        continue;
      }
      Memory& copy = *owned_.emplace_back(std::make_unique<Memory>(matrix_bytes(spec.dtype, n, k)));
      if (spec.stored == spec.dtype) std::memcpy(copy.data(), at, bytes);
      else convert_matrix(at, spec.stored, copy.data(), spec.dtype, n, k);
      weight.parts.push_back(copy.data());
    }
    names_.push_back(spec.name);
    weights_.push_back(std::move(weight));
  }
}

Weights::~Weights() = default;

const Weights::Weight* Weights::find(const std::string& name) const {
  for (size_t i = 0; i < names_.size(); i++)
    if (names_[i] == name) return &weights_[i];
  return nullptr;
}

size_t Weights::mapped_bytes() const {
  size_t n = 0;
  for (auto& m : mappings_) n += m->bytes;
  return n;
}

size_t Weights::owned_bytes() const {
  size_t n = 0;
  for (auto& m : owned_) n += m->bytes();
  return n;
}
