// Loops that measure an instruction set's peak rates: reading memory, int8 products, float products. They return a number
// that depends on all their work, so that the compiler cannot remove any of it.
namespace ISA {

// All products of X values with Y others, as in a matrix product, with as many sums at once as fit in registers.
static constexpr int LIMIT_X = W == 8 ? 2 : 4, LIMIT_Y = W == 8 ? 5 : 4, LIMIT_SUMS = LIMIT_X * LIMIT_Y;

// Tells the compiler that memory at `p` may have changed, so that it reloads it and recomputes the products.
static inline void forget(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

static float limit_read(const uint8_t* p, int64_t bytes) {
  constexpr int at_once = 8;
  vi sums[at_once] = {};
  for (int64_t i = 0; i < bytes; i += at_once * W * 4) {
    for (int line = 0; line < at_once * W * 4; line += 64) __builtin_prefetch(p + i + 4096 + line);
#pragma GCC unroll 8
    for (int j = 0; j < at_once; j++) sums[j] ^= *reinterpret_cast<const vi_unaligned*>(p + i + j * W * 4);
  }
#pragma GCC unroll 8
  for (int j = 1; j < at_once; j++) sums[0] ^= sums[j];
  return sum(to_float(sums[0]));
}

static float limit_int8(int64_t turns) {
  alignas(64) uint8_t ones[LIMIT_X * W * 4];
  for (uint8_t& one : ones) one = 1;
  vi sums[LIMIT_SUMS] = {};
  int32_t y[LIMIT_Y];
  for (int32_t& four : y) four = 0x01010101;
  forget(y);
  int32_t fours[LIMIT_Y];
  for (int j = 0; j < LIMIT_Y; j++) fours[j] = y[j];
  for (int64_t t = 0; t < turns; t++) {
    forget(ones);
#pragma GCC unroll 4
    for (int i = 0; i < LIMIT_X; i++) {
      const Dot8::Weights x = Dot8::load(ones + i * W * 4);
#pragma GCC unroll 5
      for (int j = 0; j < LIMIT_Y; j++) sums[i * LIMIT_Y + j] = Dot8::add(sums[i * LIMIT_Y + j], x, fours[j]);
    }
  }
  vf all = {};
#pragma GCC unroll 16
  for (int i = 0; i < LIMIT_SUMS; i++) all += to_float(sums[i]);
  return sum(all);
}

static float limit_float(int64_t turns) {
  alignas(64) float halves[LIMIT_X * W];
  for (float& half : halves) half = 0.5f;
  vf sums[LIMIT_SUMS] = {};
  float y[LIMIT_Y];
  for (float& half : y) half = 0.5f;
  forget(y);
  vf splats[LIMIT_Y];
  for (int j = 0; j < LIMIT_Y; j++) splats[j] = splat(y[j]);
  for (int64_t t = 0; t < turns; t++) {
    forget(halves);
#pragma GCC unroll 4
    for (int i = 0; i < LIMIT_X; i++) {
      const vf x = load(halves + i * W);
#pragma GCC unroll 5
      for (int j = 0; j < LIMIT_Y; j++) sums[i * LIMIT_Y + j] += x * splats[j];
    }
  }
  vf all = {};
#pragma GCC unroll 16
  for (int i = 0; i < LIMIT_SUMS; i++) all += sums[i];
  return sum(all);
}

static constexpr LimitKernels LIMITS = {
    limit_read, limit_int8, limit_float, LIMIT_SUMS * W * 4 * 2, LIMIT_SUMS * W * 2,
};

}  // namespace ISA
