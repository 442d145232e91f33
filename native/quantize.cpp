#include "quantize.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "halves.h"
#include "targets.h"

namespace {

// Columns that share a scale.
constexpr int span_of(Dtype dtype) { return dtype == INT4 ? HALF : GROUP; }

uint8_t* block_of(uint8_t* m, Dtype dtype, int64_t r, int64_t k, int64_t column) {
  return m + (r / TILE_ROWS * groups_of(k) + column / GROUP) * weight_block_bytes(dtype);
}

// Address in the block of a row's and column's scale.
uint8_t* scale_at(uint8_t* block, Dtype dtype, int64_t r, int64_t column) {
  const int64_t half = dtype == INT4 ? column % GROUP / HALF : 0;
  return block + (dtype == INT4 ? TILE_ROWS * GROUP / 2 : TILE_ROWS * GROUP) + (half * TILE_ROWS + r % TILE_ROWS) * 2;
}

float round_to_half(float x) { return f16_to_f32(f32_to_f16(x)); }

// Sum of squared errors of x when rounded to integer multiples of `scale` between low and high.
FAST float error_of(const float* x, int n, float scale, float low, float high) {
  const float inverse = scale != 0 ? 1 / scale : 0;
  float sum = 0;
  for (int i = 0; i < n; i++) {
    float q = x[i] * inverse + 12582912.f - 12582912.f;  // to the nearest integer
    q = q < low ? low : q > high ? high : q;
    const float e = x[i] - q * scale;
    sum += e * e;
  }
  return sum;
}

FAST void round_all(const float* x, int n, float scale, float low, float high, int32_t* q) {
  const float inverse = scale != 0 ? 1 / scale : 0;
  for (int i = 0; i < n; i++) {
    float v = x[i] * inverse + 12582912.f - 12582912.f;
    v = v < low ? low : v > high ? high : v;
    q[i] = static_cast<int32_t>(v);
  }
}

FAST float largest_of(const float* x, int n) {
  float top = 0;
  for (int i = 0; i < n; i++) top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
  return top;
}

// INT8: the largest value becomes 127 steps. With so many steps, searching for a better scale gains nothing measurable.
float int8_scale(const float* x, int n) {
  const float top = largest_of(x, n);
  uint16_t half = f32_to_f16(top / 127);
  if (f16_to_f32(half) * 127.5f < top) half++;  // rounded down too far: the largest value would not fit
  return f16_to_f32(half);
}

// INT4: the scale with the smallest squared error among candidates that map the value of largest magnitude to -8 steps,
// clip it slightly, or use slightly less than the range.
float int4_scale(const float* x, int n) {
  int at = 0;
  for (int i = 1; i < n; i++)
    if (std::fabs(x[i]) > std::fabs(x[at])) at = i;
  float best = 0, best_error = INFINITY;
  for (int step = 0; step <= 10; step++) {
    const float scale = round_to_half(x[at] / (-8.8f + 0.2f * static_cast<float>(step)));  // 6.8 to 8.8 steps
    const float error = error_of(x, n, scale, -8, 7);
    if (error < best_error) best = scale, best_error = error;
  }
  return best;
}

// FP8: E4M3 numbers, with 3 bits of fraction down to 2^-6, and multiples of 2^-9 below.
constexpr float E4M3_MOST = 448, E4M3_NORMAL = 0x1p-6f;

// The scales of FP8 are s / 8 x 2^e, s from 8 to 15: the product with an E4M3 number, which has 4 bits, fits bfloat16's 8. As halves they are
// exact from 2^-21 on, subnormal ones too. In order of size:
constexpr int FP8_SCALES = 8 * (15 + 21 + 1);
float fp8_scale_at(int i) { return static_cast<float>(8 + i % 8) * bits_to_f32(static_cast<uint32_t>(127 - 21 - 3 + i / 8) << 23); }

// Rounds a group's magnitudes to E4M3 numbers (the nearest, ties to even) times `scale`. Returns the sum of squared errors, in float64 so that
// it is the same on all processors.
FAST double round_to_fp8(const float* magnitudes, float scale, float* rounded) {
  double sum = 0;
  for (int i = 0; i < GROUP; i++) {
    const float x = magnitudes[i] / scale;
    const uint32_t bits = f32_to_bits(x);
    const float normal = bits_to_f32((bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000), small = x + 0x1.8p14f - 0x1.8p14f;  // whose last bit is 2^-9
    const float r = x < E4M3_NORMAL ? small : normal;
    rounded[i] = r < E4M3_MOST ? r : E4M3_MOST;
    const double e = magnitudes[i] - rounded[i] * scale;
    sum += e * e;
  }
  return sum;
}

// FP8: of the eight scales that map the largest magnitude to between 224 and 448, the one with the smallest squared error. Among
// numbers whose errors are relative, what counts is which of them lie just below a power of two. Returns the scale; `bytes` gets the numbers.
float to_fp8(const float* x, uint8_t* bytes) {
  float magnitudes[GROUP], rounded[GROUP], best_rounded[GROUP] = {};
  for (int i = 0; i < GROUP; i++) magnitudes[i] = std::fabs(x[i]);
  const float top = largest_of(x, GROUP);
  int first = 0;
  if (const float least = top / E4M3_MOST; least > fp8_scale_at(0)) {
    first = 8 * (static_cast<int>(f32_to_bits(least) >> 23) - 127 + 21);  // the scale at the power of two below
    while (first + 1 < FP8_SCALES && fp8_scale_at(first) * E4M3_MOST < top) first++;
  }
  float best = 0;
  double best_error = INFINITY;
  for (int at = first; at < first + 8 && at < FP8_SCALES; at++) {
    const double error = round_to_fp8(magnitudes, fp8_scale_at(at), rounded);
    if (error >= best_error) continue;
    best = fp8_scale_at(at), best_error = error;
    std::memcpy(best_rounded, rounded, sizeof rounded);
  }
  for (int i = 0; i < GROUP; i++) {
    const float r = best_rounded[i];
    const uint32_t code = r < E4M3_NORMAL ? static_cast<uint32_t>(r * 512) : (f32_to_bits(r) >> 20) - (127 - 7) * 8;
    bytes[i] = static_cast<uint8_t>(code | (code && x[i] < 0 ? 0x80 : 0));
  }
  return best;
}

// The 256 E4M3 numbers, of which two are NaN.
struct E4m3Numbers {
  float of[256];
  constexpr E4m3Numbers() : of{} {
    for (int i = 0; i < 256; i++) {
      const int exponent = i >> 3 & 15, fraction = i & 7;
      float x = exponent ? 0x1p-7f * (1 + fraction / 8.f) : 0x1p-6f * (fraction / 8.f);
      for (int e = 0; e < exponent; e++) x *= 2;
      if ((i & 127) == 127) x = __builtin_nanf("");
      of[i] = i & 128 ? -x : x;
    }
  }
};
constexpr E4m3Numbers E4M3;

}  // namespace

template <class Value>
static void put_group(uint8_t* m, Dtype dtype, int64_t r, int64_t k, int64_t from, float scale, const Value* q) {
  const int lane = static_cast<int>(r % TILE_ROWS);
  uint8_t* block = block_of(m, dtype, r, k, from);
  const uint16_t half = f32_to_f16(scale);
  std::memcpy(scale_at(block, dtype, r, from), &half, 2);
  const bool high = from % GROUP != 0;
  for (int i = 0; i < span_of(dtype); i++) {
    uint8_t& byte = block[(i / 4 * TILE_ROWS + lane) * 4 + i % 4];
    if (dtype == FP8) byte = static_cast<uint8_t>(q[i]);
    else if (dtype == INT8) byte = static_cast<uint8_t>(q[i] + 128);
    else byte = static_cast<uint8_t>(high ? (byte & 15) | (q[i] + 8) << 4 : q[i] + 8);  // the low nibbles come first
  }
}

void write_group(uint8_t* m, Dtype dtype, int64_t r, int64_t k, int64_t from, float scale, const int8_t* q) { put_group(m, dtype, r, k, from, scale, q); }

void quantize_row(uint8_t* m, Dtype dtype, int64_t r, int64_t k, const float* row) {
  const int span = span_of(dtype);
  for (int64_t from = 0; from < groups_of(k) * GROUP; from += span) {
    float x[GROUP] = {};
    int32_t q[GROUP];
    if (from < k) std::memcpy(x, row + from, static_cast<size_t>(k - from < span ? k - from : span) * 4);
    if (dtype == FP8) {
      uint8_t bytes[GROUP];
      const float scale = to_fp8(x, bytes);
      put_group(m, dtype, r, k, from, scale, bytes);
      continue;
    }
    const float scale = dtype == INT8 ? int8_scale(x, span) : int4_scale(x, span);
    round_all(x, span, scale, dtype == INT8 ? -127 : -8, dtype == INT8 ? 127 : 7, q);
    put_group(m, dtype, r, k, from, scale, q);
  }
}

void expand_row(const uint8_t* matrix, Dtype dtype, int64_t r, int64_t k, float* row) {
  uint8_t* m = const_cast<uint8_t*>(matrix);  // read only
  const int lane = static_cast<int>(r % TILE_ROWS), span = span_of(dtype);
  for (int64_t c = 0; c < k; c++) {
    uint8_t* block = block_of(m, dtype, r, k, c);
    uint16_t half;
    std::memcpy(&half, scale_at(block, dtype, r, c), 2);
    const int64_t i = c % span;
    const uint8_t byte = block[(i / 4 * TILE_ROWS + lane) * 4 + i % 4];
    const float q = dtype == FP8 ? E4M3.of[byte] : static_cast<float>(dtype == INT8 ? byte - 128 : (c % GROUP >= HALF ? byte >> 4 : byte & 15) - 8);
    row[c] = q * f16_to_f32(half);
  }
}

void pack_row(uint8_t* m, Dtype dtype, int64_t r, int64_t k, const float* row) {
  uint8_t* block = m + r * (k / HALF) * gguf_block_bytes(dtype);
  for (int64_t from = 0; from < k; from += HALF, block += gguf_block_bytes(dtype)) {
    const float* x = row + from;
    int32_t q[HALF];
    const float scale = dtype == Q8_0 ? int8_scale(x, HALF) : int4_scale(x, HALF);
    round_all(x, HALF, scale, dtype == Q8_0 ? -127 : -8, dtype == Q8_0 ? 127 : 7, q);
    const uint16_t half = f32_to_f16(scale);
    std::memcpy(block, &half, 2);
    if (dtype == Q8_0)
      for (int i = 0; i < HALF; i++) block[2 + i] = static_cast<uint8_t>(q[i]);
    else
      for (int i = 0; i < HALF / 2; i++) block[2 + i] = static_cast<uint8_t>((q[i] + 8) | (q[i + HALF / 2] + 8) << 4);
  }
}

void unpack_row(const uint8_t* m, Dtype dtype, int64_t r, int64_t k, float* row) {
  const uint8_t* block = m + r * (k / HALF) * gguf_block_bytes(dtype);
  for (int64_t from = 0; from < k; from += HALF, block += gguf_block_bytes(dtype)) {
    uint16_t half;
    std::memcpy(&half, block, 2);
    const float scale = f16_to_f32(half);
    for (int i = 0; i < HALF; i++) {
      const uint8_t byte = block[2 + (dtype == Q8_0 ? i : i % (HALF / 2))];
      const int q = dtype == Q8_0 ? static_cast<int8_t>(byte) : (i < HALF / 2 ? byte & 15 : byte >> 4) - 8;
      row[from + i] = static_cast<float>(q) * scale;
    }
  }
}

namespace {

uint32_t load32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

void store32(uint8_t* p, uint32_t v) { std::memcpy(p, &v, 4); }

constexpr uint32_t LOW = 0x0f0f0f0f, SIGNS = 0x80808080;

// Converts between a group's vectors, which have four columns of this row every `step` bytes, and two GGUF blocks of 32.
void take_int4(uint8_t* own, int step, uint8_t* first, uint8_t* second, bool in) {
  for (int w = 0; w < 4; w++) {
    uint8_t *head = own + w * step, *tail = own + (w + 4) * step;
    if (in) {
      const uint32_t a = load32(first + w * 4), b = load32(second + w * 4);
      store32(head, (a & LOW) | (b & LOW) << 4);
      store32(tail, (a >> 4 & LOW) | (b & ~LOW));
    } else {
      const uint32_t a = load32(head), b = load32(tail);
      store32(first + w * 4, (a & LOW) | (b & LOW) << 4);
      store32(second + w * 4, (a >> 4 & LOW) | (b & ~LOW));
    }
  }
}

void take_int8(uint8_t* own, int step, uint8_t* block, bool in) {
  for (int w = 0; w < HALF / 4; w++) {
    uint8_t *ours = own + w * step, *theirs = block + w * 4;
    if (in) store32(ours, load32(theirs) ^ SIGNS);
    else store32(theirs, load32(ours) ^ SIGNS);
  }
}

}  // namespace

bool take_row(const uint8_t* from, Dtype stored, uint8_t* to, Dtype dtype, int64_t r, int64_t k) {
  const bool in = (stored == Q8_0 && dtype == INT8) || (stored == Q4_0 && dtype == INT4);
  if (!in && !(stored == INT8 && dtype == Q8_0) && !(stored == INT4 && dtype == Q4_0)) return false;
  const Dtype blocked = in ? dtype : stored;  // the block format of ours
  const int64_t size = gguf_block_bytes(in ? stored : dtype), count = k / HALF;
  uint8_t* packed = const_cast<uint8_t*>(in ? from : to) + r * count * size;  // written only if it belongs to `to`
  uint8_t* matrix = const_cast<uint8_t*>(in ? to : from);
  if (in && blocked == INT8)
    for (int64_t b = 0; b < count; b++) {
      const uint8_t* block = packed + b * size;
      if ((b % 2 && std::memcmp(block, block - size, 2) != 0) || std::memchr(block + 2, 0x80, HALF)) return false;
    }
  uint8_t zero[34] = {};  // replaces the block missing from the last group
  if (blocked == INT4) std::memset(zero + 2, 0x88, HALF / 2);
  for (int64_t b = 0; b < count; b += 2) {
    uint8_t *first = packed + b * size, *second = b + 1 < count ? first + size : zero;
    uint8_t* block = block_of(matrix, blocked, r, k, b * HALF);
    uint8_t* own = block + r % TILE_ROWS * 4;
    const int step = TILE_ROWS * 4;
    for (uint8_t* other : {first, second}) {
      if (blocked == INT8 && other == second && in) break;  // both halves share one scale
      uint8_t* scale = scale_at(block, blocked, r, other == first ? 0 : HALF);
      if (in) std::memcpy(scale, other, 2);
      else std::memcpy(other, scale, 2);
    }
    if (blocked == INT4) {
      take_int4(own, step, first + 2, second + 2, in);
    } else {
      take_int8(own, step, first + 2, in);
      take_int8(own + HALF / 4 * step, step, second + 2, in);
    }
  }
  return true;
}

FAST void random_row(uint64_t seed, uint64_t r, float deviation, float* row, int64_t k) {
  // Each number is the sum of two uniform ones (splitmix64): close enough to a normal distribution for measuring.
  const float unit = deviation * 2.4494897f / 65536.f;
  for (int64_t i = 0; i < k; i++) {
    uint64_t z = seed + (r * static_cast<uint64_t>(k) + static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    row[i] = (static_cast<float>(static_cast<int32_t>(z & 0xffff)) - static_cast<float>(static_cast<int32_t>((z >> 32) & 0xffff))) * unit;
  }
}
