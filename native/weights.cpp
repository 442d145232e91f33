#include "weights.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>
#include <unordered_map>

#include "halves.h"
#include "mapping.h"
#include "quantize.h"
#include "residence.h"
#include "rounding.h"

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (!bytes) return;
  // On huge pages where it fills several: what a step reads and writes in it then needs few entries of page tables.
  const bool large = bytes >= 2 * HUGE_PAGE;
  void* p = large ? reserve_huge(bytes, PROT_READ | PROT_WRITE) : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (!p || p == MAP_FAILED) throw std::runtime_error("out of memory: cannot map " + std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB");
  data_ = static_cast<uint8_t*>(p);
#ifdef MADV_HUGEPAGE
  if (large) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
}

Memory::~Memory() {
  if (data_) munmap(data_, bytes_);
}

static size_t element_bytes(Dtype dtype) { return dtype == F32 || dtype == I32 ? 4 : dtype == F16 || dtype == BF16 ? 2 : 1; }

size_t matrix_bytes(Dtype dtype, int64_t n, int64_t k) {
  if (in_blocks(dtype)) return static_cast<size_t>((n + TILE_ROWS - 1) / TILE_ROWS * groups_of(k) * weight_block_bytes(dtype));
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
    case FP8:
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
    case FP8:
    case INT4: quantize_row(m, dtype, r, k, row); break;
    case Q8_0:
    case Q4_0: pack_row(m, dtype, r, k, row); break;
    default: throw std::runtime_error("internal: weights of this format cannot be written");
  }
}

// The largest number that a format can hold: in blocks, the largest half times the steps on the side with fewer of them.
static float largest_in(Dtype dtype) {
  switch (dtype) {
    case F16: return 65504.f;
    case BF16: return bf16_to_f32(0x7f7f);
    case INT8:
    case Q8_0: return 65504.f * 127;
    case INT4:
    case Q4_0: return 65504.f * 7;
    case FP8: return FP8_MOST;
    default: return INFINITY;
  }
}

// Throws std::runtime_error for a number that is not finite, or too large for `dtype`.
static void check_row(const float* row, int64_t r, int64_t k, Dtype dtype) {
  const float most = largest_in(dtype);
  bool good = true;
  for (int64_t c = 0; c < k; c++) good &= std::fabs(row[c]) <= most && row[c] - row[c] == 0;
  if (good) return;
  int64_t c = 0;
  while (std::fabs(row[c]) <= most && row[c] - row[c] == 0) c++;
  char text[160];
  if (std::isfinite(row[c])) std::snprintf(text, sizeof text, "holds %g at row %lld, column %lld; the largest number that this format can hold is %g", row[c], static_cast<long long>(r), static_cast<long long>(c), most);
  else std::snprintf(text, sizeof text, "holds %s at row %lld, column %lld: the file is damaged, or training had diverged", std::isnan(row[c]) ? "NaN" : "infinity", static_cast<long long>(r), static_cast<long long>(c));
  throw std::runtime_error(text);
}

void convert_matrix(const uint8_t* from, Dtype stored, uint8_t* to, Dtype dtype, int64_t n, int64_t k) {
  std::vector<float> row(static_cast<size_t>(k));
  for (int64_t r = 0; r < n; r++) {
    read_row(from, stored, r, k, row.data());
    const bool taken = take_row(from, stored, to, dtype, r, k);
    check_row(row.data(), r, k, taken ? F32 : dtype);
    if (!taken) write_row(to, dtype, r, k, row.data());
  }
  if (in_blocks(dtype)) {
    std::fill(row.begin(), row.end(), 0.f);
    for (int64_t r = n; r % TILE_ROWS; r++) write_row(to, dtype, r, k, row.data());
  }
}

void random_matrix(uint64_t seed, float deviation, uint8_t* to, Dtype dtype, int64_t n, int64_t k) {
  std::vector<float> row(static_cast<size_t>(k));
  for (int64_t r = 0; r < (in_blocks(dtype) ? (n + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : n); r++) {
    random_row(seed, static_cast<uint64_t>(r), r < n ? deviation : 0, row.data(), k);
    write_row(to, dtype, r, k, row.data());
  }
}

// Runs `use` on a part's bytes; what it throws is told of the tensor `name`, unless the file has changed meanwhile.
template <class Use>
static void with_part(const Mapping& mapping, const FilePart& part, const std::string& name, Use use) {
  std::string fault;
  try {
    use(mapping.at(part.offset, part.bytes));
  } catch (const std::runtime_error& e) {
    fault = e.what();
  }
  mapping.check();
  if (!fault.empty()) throw std::runtime_error(part.file + ": tensor " + name + " " + fault);
}

void convert_file_part(const FilePart& part, const std::string& name, Dtype stored, uint8_t* to, Dtype dtype, int64_t n, int64_t k) {
  if (part.bytes != matrix_bytes(stored, n, k)) throw std::runtime_error("internal: a part's bytes do not match its shape");
  with_part(Mapping(part.file), part, name, [&](const uint8_t* from) { convert_matrix(from, stored, to, dtype, n, k); });
}

static Compensation compensation_of(const FilePart& part, const std::string& name, int64_t k, const float* x, const int32_t* rows, const float* shares, int64_t count, const float* common) {
  const auto square = static_cast<size_t>(padded_columns(k) * padded_columns(k));
  try {
    std::vector<float> moments(square);
    add_moments(x, rows, shares, count, k, moments.data());
    if (common)
      for (size_t i = 0; i < square; i++) moments[i] += common[i];
    return Compensation(moments, k);
  } catch (const std::bad_alloc&) {
    throw std::runtime_error("out of memory: rounding " + name + " by what it sees takes " + std::to_string(square * 10 >> 20) + " MiB");
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(part.file + ": tensor " + name + " " + e.what());
  }
}

void round_file_parts(const std::vector<RoundedPart>& parts, int64_t k, const float* x, const int32_t* rows, const float* shares, int64_t count, const float* common) {
  if (parts.empty()) return;
  const Compensation compensation = compensation_of(parts[0].part, parts[0].name, k, x, rows, shares, count, common);
  std::vector<float> tile(static_cast<size_t>(TILE_ROWS * k));
  for (const RoundedPart& p : parts) {
    if (p.part.bytes != matrix_bytes(p.stored, p.n, k)) throw std::runtime_error("internal: a part's bytes do not match its shape");
    with_part(Mapping(p.part.file), p.part, p.name, [&](const uint8_t* from) {
      for (int64_t first = 0; first < p.n; first += TILE_ROWS) {
        std::fill(tile.begin(), tile.end(), 0.f);
        for (int64_t r = first; r < std::min(p.n, first + TILE_ROWS); r++) {
          float* row = tile.data() + (r - first) * k;
          read_row(from, p.stored, r, k, row);
          check_row(row, r, k, INT4);
        }
        compensation.round_tile(p.to, first / TILE_ROWS, tile.data());
      }
    });
  }
}

void check_file_part(const FilePart& part, const std::string& name, Dtype stored, int64_t n, int64_t k) {
  if (part.bytes != matrix_bytes(stored, n, k)) throw std::runtime_error("internal: a part's bytes do not match its shape");
  with_part(Mapping(part.file), part, name, [&](const uint8_t* from) {
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t r = 0; r < n; r++) {
      read_row(from, stored, r, k, row.data());
      check_row(row.data(), r, k, F32);
    }
  });
}

Weights::Weights(const std::vector<WeightSpec>& specs) {
  std::unordered_map<std::string, Mapping*> by_path;
  std::vector<Stretch> read;
  auto mapping = [&](const std::string& path) {
    Mapping*& found = by_path[path];
    if (!found) found = mappings_.emplace_back(std::make_unique<Mapping>(path)).get();
    return found;
  };
  for (const WeightSpec& spec : specs) {
    Weight weight{spec.dtype, spec.shape, {}};
    const bool stacked = spec.shape.size() == 3;
    if (spec.parts.size() != (stacked ? static_cast<size_t>(spec.shape[0]) : 1)) throw std::runtime_error("internal: " + spec.name + " has " + std::to_string(spec.parts.size()) + " parts");
    const int64_t k = spec.shape.back(), n = spec.shape.size() == 1 ? 1 : spec.shape[spec.shape.size() - 2];
    const size_t bytes = matrix_bytes(spec.stored, n, k);
    for (size_t p = 0; p < spec.parts.size(); p++) {
      const FilePart& part = spec.parts[p];
      if (part.bytes != bytes) throw std::runtime_error("internal: " + spec.name + " has a part of " + std::to_string(part.bytes) + " bytes, not " + std::to_string(bytes));
      Mapping& file = *mapping(part.file);
      const uint8_t* at = file.at(part.offset, part.bytes);
      const bool aligned = reinterpret_cast<uintptr_t>(at) % (in_blocks(spec.stored) ? 2 : element_bytes(spec.stored)) == 0;
      if (spec.stored == spec.dtype && aligned) {
        weight.parts.push_back(const_cast<uint8_t*>(at));
        read.push_back({&file, static_cast<size_t>(part.offset), static_cast<size_t>(part.bytes)});
        continue;
      }
      Memory& copy = *owned_.emplace_back(std::make_unique<Memory>(matrix_bytes(spec.dtype, n, k)));
      with_part(file, part, stacked ? spec.name + " of expert " + std::to_string(p) : spec.name, [&](const uint8_t* from) {
        if (spec.stored == spec.dtype) std::memcpy(copy.data(), from, bytes);
        else convert_matrix(from, spec.stored, copy.data(), spec.dtype, n, k);
      });
      weight.parts.push_back(copy.data());
    }
    names_.push_back(spec.name);
    weights_.push_back(std::move(weight));
  }
  residence_ = std::make_unique<Residence>(read);
}

Weights::~Weights() = default;

const Weights::Weight* Weights::find(const std::string& name) const {
  for (size_t i = 0; i < names_.size(); i++)
    if (names_[i] == name) return &weights_[i];
  return nullptr;
}

std::vector<std::pair<const void*, size_t>> Weights::ranges() const {
  std::vector<std::pair<const void*, size_t>> all;
  for (auto& m : mappings_) all.push_back({m->data(), m->bytes()});
  for (auto& m : owned_) all.push_back({m->data(), m->bytes()});
  return all;
}

size_t Weights::mapped_bytes() const {
  size_t n = 0;
  for (auto& m : mappings_) n += m->bytes();
  return n;
}

void Weights::check() const {
  if (lost_) throw std::runtime_error(why_lost_);
  try {
    for (auto& m : mappings_) m->check();
  } catch (const std::runtime_error& e) {
    why_lost_ = e.what();
    lost_ = true;
    throw;
  }
}

size_t Weights::owned_bytes() const {
  size_t n = 0;
  for (auto& m : owned_) n += m->bytes();
  return n;
}
