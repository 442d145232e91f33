// Products of many activation rows with int8 matrices by the tile instructions of AMX. A block of the format (16 rows by 64 columns, in fours)
// is a register as it lies, and 16 activation rows of a group are the other one. Sums are the same integers as with VNNI, and are scaled and
// added in the same order, so a row's result does not depend on how many rows there are.

namespace ISA {

constexpr int64_t AMX_FEWEST = 8;  // rows from which a register of 16 is worth its price

// 16 activation rows by 16 weight rows, of which the first n are stored.
static inline void int8_square(const int8_t* const* x, int64_t rows, const uint8_t* block, int64_t groups, int64_t n, float* const* y, const float* bias, Ahead& ahead) {
  constexpr int V = TILE_ROWS / W;
  // Rows at equal distances are read where they are, others copied.
  const int64_t stride = x[1] - x[0];
  bool even = rows == AMX_ROWS;
  for (int r = 2; r < AMX_ROWS; r++) even = even && x[r] - x[r - 1] == stride;
  alignas(64) int8_t left[AMX_BYTES];
  alignas(64) int32_t sums[AMX_ROWS * TILE_ROWS];
  vf total[AMX_ROWS][V] = {};
  for (int64_t g = 0; g < groups; g++, block += INT8_BLOCK_BYTES) {
    ahead.step();
    if (even) {
      Amx::load<4>(x[0] + g * GROUP, stride);
    } else {
      for (int r = 0; r < AMX_ROWS; r++) __builtin_memcpy(left + r * GROUP, x[r] + g * GROUP, GROUP);
      Amx::load<4>(left, GROUP);
    }
    Amx::load<6>(block, 64);
    Amx::zero<0>();
    Amx::dot_int8<0, 4, 6>();
    Amx::store<0>(sums, TILE_ROWS * 4);
    for (int v = 0; v < V; v++) {
      const vf s = load(reinterpret_cast<const f16*>(block + TILE_ROWS * GROUP) + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < AMX_ROWS; r++) {
        const vi sum = *reinterpret_cast<const vi_unaligned*>(sums + r * TILE_ROWS + v * W) + Blocks::corrections(x[r], groups)[3 * g + 2];
        total[r][v] += to_float(sum) * (s * Blocks::scales(x[r], groups)[g]);
      }
    }
  }
  for (int r = 0; r < rows; r++) {
    const vf(&sum)[1][V] = *reinterpret_cast<const vf(*)[1][V]>(&total[r]);
    Blocks::finish<1>(sum, n, y + r, bias);
  }
}

// Weight rows [n0, stop) times as many of the first rows as fill registers well; returns their number.
template <class XAt, class YAt>
static int64_t rows_by_tiles(const void* w, int64_t n0, int64_t stop, int64_t k, int64_t rows, XAt x_at, YAt y_at, const float* bias, Ahead& ahead) {
  if (rows < AMX_FEWEST) return 0;
  const int64_t groups = groups_of(k);
  int64_t r0 = 0;
  Amx::begin();
  for (; rows - r0 >= AMX_FEWEST; r0 += AMX_ROWS) {
    const int64_t count = min(AMX_ROWS, rows - r0);
    const int8_t* x[AMX_ROWS];
    float* y[AMX_ROWS];
    for (int64_t r = 0; r < AMX_ROWS; r++) x[r] = x_at(r0 + min(r, count - 1));
    for (int64_t n = n0; n < stop; n += TILE_ROWS) {
      for (int64_t r = 0; r < count; r++) y[r] = y_at(r0 + r) + n;
      int8_square(x, count, static_cast<const uint8_t*>(w) + n / TILE_ROWS * groups * INT8_BLOCK_BYTES, groups, min(TILE_ROWS, stop - n), y, bias ? bias + n : nullptr, ahead);
    }
  }
  Amx::end();
  return min(r0, rows);
}

}  // namespace ISA
