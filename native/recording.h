// Recorded programs with inputs and expected results, as test/backend/replay.ts writes them, for programs that run them without Node.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "layout.h"
#include "weights.h"

namespace recording {

struct Case {
  std::string name;
  double tolerance;  // largest difference allowed, relative to the largest value; negative: results are not compared
  Plan plan;
  std::vector<WeightSpec> weights;
  std::vector<int64_t> state_bytes, sizes;
  std::vector<std::vector<int32_t>> inputs, expected;  // bits
};

// Little-endian, like all supported processors. A list is its length (uint32) followed by its items.
class Reader {
  const char* take(size_t n) {
    if (n > bytes_.size() - at_) throw std::runtime_error(path_ + ": ends in the middle of a case");
    at_ += n;
    return bytes_.data() + at_ - n;
  }
  template <class T>
  T one() {
    T x;
    std::memcpy(&x, take(sizeof x), sizeof x);
    return x;
  }
  template <class T>
  std::vector<T> list() {
    const size_t n = one<uint32_t>();
    const char* from = take(n * sizeof(T));
    std::vector<T> items(n);
    if (n) std::memcpy(items.data(), from, n * sizeof(T));
    return items;
  }
  template <class F>
  auto each(F read) {
    std::vector<decltype(read())> items(one<uint32_t>());
    for (auto& item : items) item = read();
    return items;
  }
  std::vector<int64_t> sizes() {
    std::vector<double> numbers = list<double>();
    return {numbers.begin(), numbers.end()};
  }
  std::string text() {
    std::vector<char> chars = list<char>();
    return {chars.begin(), chars.end()};
  }

  std::string path_;
  std::vector<char> bytes_;
  size_t at_ = 0;

 public:
  explicit Reader(const std::string& path) : path_(path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + ": cannot be opened");
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
  }
  bool done() const { return at_ == bytes_.size(); }

  Case next() {
    Case c;
    c.name = text();
    c.tolerance = one<double>();
    c.plan.ops = each([&] { return text(); });
    c.plan.weights = each([&] { return text(); });
    c.plan.values = list<int32_t>();
    c.plan.calls = list<int32_t>();
    c.plan.params = list<double>();
    c.plan.capacity = sizes();
    c.plan.arena_bytes = static_cast<size_t>(one<double>());
    c.weights = each([&] {
      WeightSpec w;
      w.name = text();
      w.stored = static_cast<Dtype>(one<int32_t>());
      w.dtype = static_cast<Dtype>(one<int32_t>());
      w.shape = sizes();
      w.parts = each([&] {
        FilePart p;
        p.file = text();
        p.offset = static_cast<uint64_t>(one<double>());
        p.bytes = static_cast<uint64_t>(one<double>());
        return p;
      });
      return w;
    });
    c.state_bytes = sizes();
    c.sizes = sizes();
    c.inputs = each([&] { return list<int32_t>(); });
    c.expected = each([&] { return list<int32_t>(); });
    return c;
  }
};

// The first difference, or "".
inline std::string compare(const std::vector<int32_t>& actual, const std::vector<int32_t>& expected, Dtype dtype, double tolerance) {
  if (tolerance < 0) return "";
  double worst = 0, top = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    const std::string where = " at " + std::to_string(i);
    if (dtype == I32) {
      if (actual[i] != expected[i]) return std::to_string(actual[i]) + where + ", not " + std::to_string(expected[i]);
      continue;
    }
    float a, e;
    std::memcpy(&a, &actual[i], 4);
    std::memcpy(&e, &expected[i], 4);
    if (a == e) top = std::fmax(top, std::isinf(e) ? 0 : std::fabs(e));
    else if (!std::isfinite(a) || !std::isfinite(e)) return std::to_string(a) + where + ", not " + std::to_string(e);
    else worst = std::fmax(worst, std::fabs(double(a) - e)), top = std::fmax(top, std::fabs(e));
  }
  if (worst <= tolerance * top) return "";
  char text[100];
  std::snprintf(text, sizeof text, "differs by %.2g of the largest, %.2g allowed", worst / top, tolerance);
  return text;
}

}  // namespace recording
