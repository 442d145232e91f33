// Primitives of NEON with the dot-product and half-precision extensions (Armv8.2 and later).
#include <arm_neon.h>

namespace ISA {

static inline vf load(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)))); }
static inline f16 to_f16(float x) { return f16{vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0)}; }
static inline void store_bytes(int8_t* p, vi v) { *reinterpret_cast<vb_unaligned*>(p) = __builtin_convertvector(v, vb); }
static inline float sum(vf v) { return vaddvq_f32(v); }
static inline float largest(vf v) { return vmaxvq_f32(v); }

struct DotBf16 {
  static constexpr int step = W;
  static vf add(vf acc, const bf16* a, const bf16* b) { return acc + load(a) * load(b); }
};

struct Dot8 {
  static constexpr bool offset = false;  // sdot takes signed bytes on both sides
  using Weights = int8x16_t;
  static Weights load(const uint8_t* p) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128))); }
  static void load_nibbles(const uint8_t* p, Weights& low, Weights& high) {
    const uint8x16_t v = vld1q_u8(p);
    low = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
    high = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
  }
  static vi add(vi acc, Weights w, int32_t a) { return (vi)vdotq_s32((int32x4_t)acc, w, vreinterpretq_s8_s32(vdupq_n_s32(a))); }
  static vi add_small(vi acc, Weights w, int32_t a) { return add(acc, w, a); }
};

}  // namespace ISA
