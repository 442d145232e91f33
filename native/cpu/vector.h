// The vector primitives that all kernels are written with, for one instruction set at a time. Included only by isa/*.cpp,
// which define ISA (a namespace), W (float lanes) and the primitives that differ. Use no standard containers or inline
// library functions here: the linker could keep a copy compiled for this instruction set and use it everywhere.
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../dynamic.h"
#include "../kernels.h"

namespace ISA {

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef float vf_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(W * 4)));  // arithmetic that wraps
typedef int8_t vb __attribute__((vector_size(W)));
typedef int8_t vb_unaligned __attribute__((vector_size(W), aligned(1), may_alias));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vh_unaligned __attribute__((vector_size(W * 2), aligned(2), may_alias));

static inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
static inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
static inline vf splat(float x) { return x - vf{}; }
static inline vi splat(int32_t x) { return x - vi{}; }
static inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }
static inline vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
static inline float max(float a, float b) { return a > b ? a : b; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
static inline uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

// bfloat16 is the upper half of a float.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
static inline float scalar(float x) { return x; }
static inline float scalar(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
static inline vf load(const bf16* p) { return (vf)(__builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vi) << 16); }
static inline bf16 to_bf16(float x) {
  uint32_t bits = to_bits(x);
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
// W numbers rounded to bfloat16; NaN stays NaN.
static inline vh to_bf16(vf x) {
  const vu bits = (vu)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, kept = bits >> 16 | 64u;
  return __builtin_convertvector((vu)select(x == x, (vf)rounded, (vf)kept), vh);
}
static inline void store(bf16* p, vh v) { *reinterpret_cast<vh_unaligned*>(p) = v; }
static inline float scalar(f16 h) {
  uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return from_bits(to_bits(from_bits(rest << 13) * 0x1p112f) | sign);
}

}  // namespace ISA

// max (its second operand if one is NaN), load(const f16*), to_f16, store_bytes (the low byte of each lane), sum, largest, DotBf16, Dot8: defined by each instruction set.
#include ISA_PRIMITIVES
#ifdef HAS_AMX
#include "isa/amx.h"
#endif

namespace ISA {

// Rounds numbers below 2^22 to the nearest integers, ties to even: they are the last bits of 1.5 * 2^23 + x. Of others, NaN
// included, it returns some integer.
static constexpr float ROUNDER = 12582912.f;  // 1.5 * 2^23
static inline vi steps_of(vf rounded) { return (vi)((vu)rounded - 0x4b400000u); }
static inline vi round_steps(vf x) { return steps_of(x + ROUNDER); }

// e^x to about 2 units in the last place from -87 to 88; beyond, clamped to its values there (about 1e-38 and 1e38). NaN
// stays NaN: `max` returns its second operand if one is NaN.
static inline vf exp(vf x) {
  x = max(splat(-87.3f), x);
  x = select(x > splat(88.f), splat(88.f), x);
  const vf rounded = x * 1.44269504f + ROUNDER, n = rounded - ROUNDER;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  return p * (vf)(((vu)steps_of(rounded) + 127u) << 23);
}

static inline float exp(float x) { return exp(splat(x))[0]; }

// 2^x to about 2 units in the last place for x from -126 to 0; below that, 2^-126. NaN stays NaN.
__attribute__((always_inline)) static inline vf exp2(vf x) {
  x = max(splat(-126.f), x);
  const vf n = x + ROUNDER, r = x - (n - ROUNDER);
  vf p = splat(1.32765e-3f);
  p = p * r + 9.67554e-3f;
  p = p * r + 5.550713e-2f;
  p = p * r + 2.402212e-1f;
  p = p * r + 6.9314697e-1f;
  p = p * r + 1.f;
  return select(x == x, (vf)((vu)p + ((vu)n << 23)), x);
}

// Sums of neighbours at distance D: in lanes with bit D unset those of a, in the others those of b.
template <int D, int... L>
static inline vf pair_sums(vf a, vf b, std::integer_sequence<int, L...>) {
  const vi own = {(L & D ? W + L : L)...}, other = {(L & D ? W + (L ^ D) : L ^ D)...};
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

// The sums across the lanes of N vectors; the n-th is in lane n * (W / N). N only decides how many are made at once: each is
// added up in the same order.
template <int N, int D = W / 2>
static inline vf sum_lanes(const vf* x) {
  static_assert(N <= W && W % N == 0);
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  if constexpr (N == 1) {
    const vf half = pair_sums<D>(x[0], x[0], lanes);
    if constexpr (D == 1) return half;
    else return sum_lanes<1, D / 2>(&half);
  } else {
    vf half[N / 2];
    for (int n = 0; n < N / 2; n++) half[n] = pair_sums<D>(x[n], x[n + N / 2], lanes);
    if constexpr (D == 1) return half[0];
    else return sum_lanes<N / 2, D / 2>(half);
  }
}

// The larger of two magnitudes, given and compared as bits: these have the order of the numbers, with NaN after infinity.
static inline vi max_bits(vi a, vi b) { return a > b ? a : b; }
static inline vi magnitude_bits(vf x) { return (vi)x & 0x7fffffff; }
// The largest of magnitudes; INFINITY if one is infinite or NaN.
static inline float largest_magnitude(vi bits) {
  const vi infinite = splat(0x7f800000);
  return largest((vf)(bits < infinite ? bits : infinite));
}

// The largest of n numbers, at least one; NaN is passed over.
static inline float largest_of(const float* x, int64_t n) {
  float top = -INFINITY;
  int64_t i = 0;
  if (n >= W) {
    vf tops = splat(-INFINITY), more = tops;
    for (; i + 2 * W <= n; i += 2 * W) tops = max(load(x + i), tops), more = max(load(x + i + W), more);
    for (; i + W <= n; i += W) tops = max(load(x + i), tops);
    top = largest(max(tops, more));
  }
  for (; i < n; i++) top = max(x[i], top);
  return top;
}

// Whether each of n numbers is finite.
static inline bool all_finite(const float* x, int64_t n) {
  vi bits = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) bits = max_bits(bits, magnitude_bits(load(x + i)));
  float top = largest_magnitude(bits);
  for (; i < n; i++) top = x[i] - x[i] == 0 ? top : INFINITY;
  return top < INFINITY;
}

}  // namespace ISA
