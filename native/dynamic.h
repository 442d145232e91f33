// The levels of block-wise dynamic 8-bit numbers, as src/tensor/dynamic.ts defines them, and a table by which a number finds its level in one
// comparison. Computed by the compiler.
#pragma once
#include <cstdint>

namespace dynamic {

constexpr int BLOCK = 256;

// A number's table entry: its exponent from 2^-24 to 1 and the first eight bits of its fraction.
constexpr uint32_t LEAST = 103u << 23;  // the bits of 2^-24, which is below every middle
constexpr int SHIFT = 15, BUCKETS = (24 << 8) + 1;

template <int COUNT>
struct Levels {
  float levels[COUNT], middles[COUNT];  // behind the last level lies 2
  uint8_t first[BUCKETS];  // the level of the smallest number of a bucket: its largest is at most one level higher

  // The level nearest to x, from 0 to 1; between two of them the lower one. Without a branch: what comes is unpredictable.
  int nearest(float x) const {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    bits = bits < LEAST ? LEAST : bits;
    const uint32_t bucket = (bits - LEAST) >> SHIFT;
    const int level = first[bucket < BUCKETS ? bucket : BUCKETS - 1];
    return level + (x > middles[level]);
  }
};

template <int COUNT>
constexpr Levels<COUNT> levels_of(int lowest) {
  constexpr double tens[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1};
  Levels<COUNT> found{};
  int n = 1;
  for (int decade = 0; decade < 7; decade++) {
    const int count = lowest << decade;
    for (int j = 0; j < count; j++) found.levels[n++] = static_cast<float>((0.1 + (0.9 * (j + 0.5)) / count) * tens[decade]);
  }
  found.levels[n] = 1;
  for (int i = 0; i + 1 < COUNT; i++) found.middles[i] = (found.levels[i] + found.levels[i + 1]) / 2;
  found.middles[COUNT - 1] = 2;
  int level = 0;
  for (int b = 0; b < BUCKETS; b++) {
    const float least = __builtin_bit_cast(float, LEAST + (static_cast<uint32_t>(b) << SHIFT));
    while (level + 1 < COUNT && least > found.middles[level]) level++;
    found.first[b] = static_cast<uint8_t>(level);
  }
  return found;
}

// Whether no bucket reaches over two levels.
template <int COUNT>
constexpr bool one_comparison(const Levels<COUNT>& l) {
  for (int b = 0; b + 1 < BUCKETS; b++) {
    const float most = __builtin_bit_cast(float, LEAST + (static_cast<uint32_t>(b + 1) << SHIFT) - 1);
    if (l.first[b] + 1 < COUNT - 1 && most > l.middles[l.first[b] + 1]) return false;
  }
  return true;
}

inline constexpr Levels<129> SIGNED = levels_of<129>(1);
inline constexpr Levels<256> UNSIGNED = levels_of<256>(2);

// What each code of a number with a sign stands for.
struct Values {
  float of[256];
};
inline constexpr Values SIGNED_VALUES = [] {
  Values values{};
  for (int code = 0; code < 256; code++) values.of[code] = code < 127 ? -SIGNED.levels[127 - code] : SIGNED.levels[code - 127];
  return values;
}();
static_assert(one_comparison(SIGNED) && one_comparison(UNSIGNED));

}  // namespace dynamic
