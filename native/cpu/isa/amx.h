// The tile registers of AMX: eight, of 16 rows by 64 bytes. With EMULATE_TILES the same in plain C++, so that the products built of
// them can be tested on any processor; after Intel's manual (volume 2, TDPBF16PS and TDPBSUD), one element at a time.
namespace ISA {

constexpr int AMX_ROWS = 16, AMX_BYTES = 1024;

struct Amx {
#ifdef EMULATE_TILES
  struct Register {
    uint8_t row[AMX_ROWS][64];
  };
  static Register& at(int r) {
    static thread_local Register registers[8];
    return registers[r];
  }
  static void begin() {
    for (int r = 0; r < 8; r++) __builtin_memset(&at(r), 0, sizeof(Register));
  }
  static void end() { begin(); }
  template <int R>
  static void zero() { __builtin_memset(&at(R), 0, sizeof(Register)); }
  template <int R>
  static void load(const void* from, int64_t stride) {
    for (int i = 0; i < AMX_ROWS; i++) __builtin_memcpy(at(R).row[i], static_cast<const uint8_t*>(from) + i * stride, 64);
  }
  template <int R>
  static void store(void* to, int64_t stride) {
    for (int i = 0; i < AMX_ROWS; i++) __builtin_memcpy(static_cast<uint8_t*>(to) + i * stride, at(R).row[i], 64);
  }
  template <int C, int A, int B>
  static void dot_bf16() {
    for (int m = 0; m < AMX_ROWS; m++)
      for (int n = 0; n < AMX_ROWS; n++) {
        float sum, even = 0, odd = 0;
        for (int k = 0; k < AMX_ROWS; k++) {
          bf16 a[2], b[2];
          __builtin_memcpy(a, at(A).row[m] + k * 4, 4);
          __builtin_memcpy(b, at(B).row[k] + n * 4, 4);
          even += scalar(a[0]) * scalar(b[0]);
          odd += scalar(a[1]) * scalar(b[1]);
        }
        __builtin_memcpy(&sum, at(C).row[m] + n * 4, 4);
        sum += even + odd;
        __builtin_memcpy(at(C).row[m] + n * 4, &sum, 4);
      }
  }
  template <int C, int A, int B>
  static void dot_int8() {
    for (int m = 0; m < AMX_ROWS; m++)
      for (int n = 0; n < AMX_ROWS; n++) {
        int32_t sum;
        __builtin_memcpy(&sum, at(C).row[m] + n * 4, 4);
        for (int k = 0; k < 64; k++) sum += static_cast<int8_t>(at(A).row[m][k]) * at(B).row[k / 4][n * 4 + k % 4];
        __builtin_memcpy(at(C).row[m] + n * 4, &sum, 4);
      }
  }
#else
  // Loads the configuration: all eight registers in full. Without one, tile instructions are illegal.
  static void begin() {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int r = 0; r < 8; r++) config[16 + 2 * r] = 64, config[48 + r] = AMX_ROWS;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  // Frees them, so that the system has nothing to save when it switches threads.
  static void end() { asm volatile("tilerelease" ::: "memory"); }
  template <int R>
  static void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(R)); }
  // The compiler's intrinsics do not say that a load depends on memory.
  template <int R>
  static void load(const void* from, int64_t stride) { asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(R) : "memory"); }
  template <int R>
  static void store(void* to, int64_t stride) { asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(R) : "memory"); }
  // C += A . B: A [16, 32] bfloat16, B [16, 16] pairs (32 numbers of each of 16 columns), C [16, 16] floats.
  template <int C, int A, int B>
  static void dot_bf16() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
  // C += A . B: A [16, 64] int8, B [16, 16] fours of uint8, C [16, 16] int32.
  template <int C, int A, int B>
  static void dot_int8() { asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
#endif
};

}  // namespace ISA
