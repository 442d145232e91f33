// The two 16-bit float formats, in portable integer arithmetic. For files compiled without special flags.
#pragma once
#include <cstdint>
#include <cstring>

static inline float bits_to_f32(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

static inline uint32_t f32_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

static inline float bf16_to_f32(uint16_t h) { return bits_to_f32(static_cast<uint32_t>(h) << 16); }

static inline uint16_t f32_to_bf16(float x) {
  uint32_t bits = f32_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 64);  // keep NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float f16_to_f32(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_to_f32(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Adjust the exponent by multiplying, which also handles subnormals.
  return bits_to_f32(f32_to_bits(bits_to_f32(rest << 13) * 0x1p112f) | sign);
}

static inline uint16_t f32_to_f16(float x) {
  uint32_t bits = f32_to_bits(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
  if (rest < 0x38800000) {                                              // subnormal: let float addition round
    float scaled = bits_to_f32(rest) + 0.5f;                            // the last bit of 0.5 is 2^-24
    return static_cast<uint16_t>(sign | (f32_to_bits(scaled) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
}
