// Primitives in plain vectors of four lanes, for processors without a better instruction set.
namespace ISA {

static inline vf max(vf a, vf b) { return select(a > b, a, b); }
static inline vf load(const f16* p) {
  vf v;
  for (int i = 0; i < W; i++) v[i] = scalar(p[i]);
  return v;
}
static inline f16 to_f16(float x) {
  uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return f16{static_cast<uint16_t>(sign | 0x7e00)};
  if (rest >= 0x477ff000) return f16{static_cast<uint16_t>(sign | 0x7c00)};
  if (rest < 0x38800000) return f16{static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000))};
  return f16{static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
}
static inline void store_bytes(int8_t* p, vi v) { *reinterpret_cast<vb_unaligned*>(p) = __builtin_convertvector(v, vb); }
static inline float sum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
static inline float largest(vf v) { return max(max(v[0], v[2]), max(v[1], v[3])); }

// Dot products of bfloat16 pairs, accumulated in float.
struct DotBf16 {
  static constexpr int step = W;
  static constexpr bool pairs = false;  // whether one instruction multiplies pairs of numbers
  static vf add_pairs(vf acc, vi, vi) { return acc; }  // never called
  static vf add(vf acc, const bf16* a, const bf16* b) { return acc + load(a) * load(b); }
};

// In each lane, the dot product of four unsigned weight bytes and four signed activation bytes, accumulated in int32.
struct Dot8 {
  static constexpr bool offset = true;  // weights are stored as 128 + w, so the caller starts from -128 x the activations' sum
  static constexpr bool pairs = false;  // whether one instruction multiplies two rows by two
  struct Weights { uint8_t bytes[W * 4]; };
  static Weights load(const uint8_t* p) {
    Weights w;
    __builtin_memcpy(w.bytes, p, sizeof w.bytes);
    return w;
  }
  // The low and high nibbles of each byte.
  static void load_nibbles(const uint8_t* p, Weights& low, Weights& high) {
    for (int i = 0; i < W * 4; i++) low.bytes[i] = p[i] & 15, high.bytes[i] = p[i] >> 4;
  }
  static vi add(vi acc, const Weights& w, int32_t a) {
    for (int lane = 0; lane < W; lane++) {
      int32_t s = 0;
      for (int j = 0; j < 4; j++) s += w.bytes[lane * 4 + j] * static_cast<int8_t>(a >> (8 * j));
      acc[lane] += s;
    }
    return acc;
  }
  // The same for weights below 16.
  static vi add_small(vi acc, const Weights& w, int32_t a) { return add(acc, w, a); }
};

}  // namespace ISA
