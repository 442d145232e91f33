// Primitives for AVX2 (with FMA and F16C) and AVX-512, depending on the enabled extensions.
#include <immintrin.h>

namespace ISA {

#if W == 16
static inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline void store_bytes(int8_t* p, vi v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v)); }
static inline float sum(vf v) { return _mm512_reduce_add_ps(v); }
static inline float largest(vf v) { return _mm512_reduce_max_ps(v); }
#else
static inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline void store_bytes(int8_t* p, vi v) { *reinterpret_cast<vb_unaligned*>(p) = __builtin_convertvector(v, vb); }
static inline float sum(vf v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float largest(vf v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
#endif
static inline f16 to_f16(float x) { return f16{static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))}; }

struct DotBf16 {
#ifdef __AVX512BF16__
  static constexpr int step = 32;
  static constexpr bool pairs = true;  // whether one instruction multiplies pairs of numbers
  static vf add(vf acc, const bf16* a, const bf16* b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
  }
  static vf add_pairs(vf acc, vi a, vi b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#else
  static constexpr int step = W;
  static constexpr bool pairs = false;
  static vf add_pairs(vf acc, vi, vi) { return acc; }  // never called
  static vf add(vf acc, const bf16* a, const bf16* b) { return acc + load(a) * load(b); }
#endif
};

struct Dot8 {
  static constexpr bool offset = true;
  static constexpr bool pairs = false;  // whether one instruction multiplies two rows by two
#if W == 16
  using Weights = __m512i;
  static Weights load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void load_nibbles(const uint8_t* p, Weights& low, Weights& high) {
    const __m512i v = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(v, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
  }
#ifdef __AVX512VNNI__
  static vi add(vi acc, Weights w, int32_t a) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, w, _mm512_set1_epi32(a)); }
  static vi add_small(vi acc, Weights w, int32_t a) { return add(acc, w, a); }
#else
  // Without VNNI: multiply even and odd bytes separately, in 16 bits, so that nothing saturates.
  static vi add(vi acc, Weights w, int32_t a) {
    const __m512i b = _mm512_set1_epi32(a);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(b, 8));
    return acc + (vi)even + (vi)odd;
  }
  static vi add_small(vi acc, Weights w, int32_t a) {  // 2 x 15 x 127 fits 16 bits
    return acc + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16(w, _mm512_set1_epi32(a)), _mm512_set1_epi16(1));
  }
#endif
#else
  using Weights = __m256i;
  static Weights load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void load_nibbles(const uint8_t* p, Weights& low, Weights& high) {
    const __m256i v = load(p), mask = _mm256_set1_epi8(15);
    low = _mm256_and_si256(v, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
  }
#ifdef __AVXVNNI__
  static vi add(vi acc, Weights w, int32_t a) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, w, _mm256_set1_epi32(a)); }
  static vi add_small(vi acc, Weights w, int32_t a) { return add(acc, w, a); }
#else
  static vi add(vi acc, Weights w, int32_t a) {
    const __m256i b = _mm256_set1_epi32(a);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(b, 8));
    return acc + (vi)even + (vi)odd;
  }
  static vi add_small(vi acc, Weights w, int32_t a) {
    return acc + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(w, _mm256_set1_epi32(a)), _mm256_set1_epi16(1));
  }
#endif
#endif
};

}  // namespace ISA
