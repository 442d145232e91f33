// Primitives for NEON with the dot-product and half-precision extensions (Armv8.2 and later), and with the matrix extension
// (i8mm) if it is enabled.
#include <arm_neon.h>

namespace ISA {

static inline vf max(vf a, vf b) { return select(a > b, a, b); }
static inline vf load(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)))); }
static inline f16 to_f16(float x) { return f16{vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0)}; }
static inline void store_bytes(int8_t* p, vi v) { *reinterpret_cast<vb_unaligned*>(p) = __builtin_convertvector(v, vb); }
static inline float sum(vf v) { return vaddvq_f32(v); }
static inline float largest(vf v) { return vmaxvq_f32(v); }

struct DotBf16 {
  static constexpr int step = W;
  static constexpr bool pairs = false;  // whether one instruction multiplies pairs of numbers
  static vf add_pairs(vf acc, vi, vi) { return acc; }  // never called
  static vf add(vf acc, const bf16* a, const bf16* b) { return acc + load(a) * load(b); }
};

struct Dot8 {
  static constexpr bool offset = false;  // sdot takes two signed operands
  using Weights = int8x16_t;
  static Weights load(const uint8_t* p) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128))); }
  static void load_nibbles(const uint8_t* p, Weights& low, Weights& high) {
    const uint8x16_t v = vld1q_u8(p);
    low = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
    high = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
  }
  static vi add(vi acc, Weights w, int32_t a) { return (vi)vdotq_s32((int32x4_t)acc, w, vreinterpretq_s8_s32(vdupq_n_s32(a))); }
  static vi add_small(vi acc, Weights w, int32_t a) { return add(acc, w, a); }

#ifndef __ARM_FEATURE_MATMUL_INT8
  static constexpr bool pairs = false;
#else
  static constexpr bool pairs = true;
  // Two vectors of weights (4 rows x 4 columns, and the next 4 columns) times 8 numbers of two activation rows.
  struct Pair {
    int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);  // rows 0 and 1, rows 2 and 3: each times both activation rows
    void add(Weights first, Weights second, const int8_t* a, const int8_t* b) {
      const int32x4_t w = vreinterpretq_s32_s8(first), next = vreinterpretq_s32_s8(second);
      const int8x16_t x = vcombine_s8(vld1_s8(a), vld1_s8(b));
      low = vmmlaq_s32(low, vreinterpretq_s8_s32(vzip1q_s32(w, next)), x);
      high = vmmlaq_s32(high, vreinterpretq_s8_s32(vzip2q_s32(w, next)), x);
    }
    vi of_first() const { return (vi)vuzp1q_s32(low, high); }
    vi of_second() const { return (vi)vuzp2q_s32(low, high); }
  };
#endif
};

}  // namespace ISA
