// Products of large bfloat16 matrices by the tile instructions of AMX, for the same operands as those of gemm.inl. Both are copied in
// pieces: the left one as registers [16 rows, 32 numbers], the right one as registers of 16 pairs by 16 columns. Every number is summed in
// blocks of AMX_UNITS pairs, one after another, whatever the threads and the rows beside it.

namespace ISA {

// The pieces take the same scratch as those of gemm.inl: 344 KB and 1 MB. They are deeper, because y is read and written once a piece.
constexpr int64_t AMX_UNITS = 512, AMX_LEFT = 160, AMX_RIGHT = 512, AMX_SQUARE = 32;
static_assert((AMX_LEFT + AMX_RIGHT) * AMX_UNITS + 64 <= PIECE_FLOATS);

// W vectors by W lanes at a time: transposes 16 x 16 units in place.
static inline void turn_register(float* units) {
  for (int r = 0; r < AMX_ROWS; r += W)
    for (int c = r; c < AMX_ROWS; c += W) {
      vf t[W], other[W];
      for (int i = 0; i < W; i++) t[i] = load(units + (r + i) * AMX_ROWS + c), other[i] = load(units + (c + i) * AMX_ROWS + r);
      turn(t);
      for (int i = 0; i < W; i++) store(units + (c + i) * AMX_ROWS + r, t[i]);
      if (r == c) continue;
      turn(other);
      for (int i = 0; i < W; i++) store(units + (r + i) * AMX_ROWS + c, other[i]);
    }
}

static inline int64_t whole_registers(int64_t depth) { return (depth + 31) / 32; }

// Rows i to i + count (at most 16) of the left operand, numbers d to d + depth of each: registers that are `stride` bytes apart, filled up
// with zeros.
template <class T>
static void pack_left(const Along<T>& a, int64_t i, int64_t count, int64_t d, int64_t depth, uint8_t* to, int64_t stride) {
  static_assert(sizeof(T) == 2);
  for (int64_t r = 0; r < AMX_ROWS; r++, to += 64) {
    const uint8_t* row = r < count ? reinterpret_cast<const uint8_t*>(a.rows.row(i + r) + d) : nullptr;
    uint8_t* at = to;
    for (int64_t c = 0; c < depth; c += 32, at += stride) {
      const int64_t bytes = row ? 2 * min(32, depth - c) : 0;
      if (bytes == 64) {
        __builtin_memcpy(at, row + 2 * c, 64);
      } else {
        __builtin_memset(at, 0, 64);
        if (bytes) __builtin_memcpy(at, row + 2 * c, static_cast<size_t>(bytes));
      }
    }
  }
}

template <class T>
static void pack_left(const Across<T>& a, int64_t i, int64_t count, int64_t d, int64_t depth, uint8_t* to, int64_t stride) {
  for (int64_t c = 0; c < depth; c += 32, to += stride) {
    float* units = reinterpret_cast<float*>(to);
    const int64_t deep = min(32, depth - c), filled = (deep + 1) / 2;
    a.template pack<Pairs, AMX_ROWS>(i, count, d + c, deep, units);
    __builtin_memset(units + filled * AMX_ROWS, 0, static_cast<size_t>((AMX_ROWS - filled) * 64));
    turn_register(units);
  }
}

// Columns j to j + count (at most 16) of the right operand: consecutive registers, filled up with zeros.
template <class B>
static void pack_right(const B& b, int64_t j, int64_t count, int64_t d, int64_t depth, float* to) {
  b.template pack<Pairs, AMX_ROWS>(j, count, d, depth, to);
  const int64_t filled = (depth + 1) / 2, all = whole_registers(depth) * AMX_ROWS;
  __builtin_memset(to + filled * AMX_ROWS, 0, static_cast<size_t>((all - filled) * 64));
}

// Registers of floats as sums of two bfloat16 numbers: put(c, high, low) gets units [16 pairs, 16 rows] of the numbers from d + 32 c on, of
// rows i to i + count (at most 16) of an operand.
template <class Operand, class Put>
static void split(const Operand& x, int64_t i, int64_t count, int64_t d, int64_t depth, Put put) {
  alignas(64) float numbers[32 * AMX_ROWS], high[16 * AMX_ROWS], low[16 * AMX_ROWS];
  for (int64_t c = 0; c < whole_registers(depth); c++) {
    const int64_t deep = min(32, depth - 32 * c);
    x.template pack<Floats, AMX_ROWS>(i, count, d + 32 * c, deep, numbers);
    __builtin_memset(numbers + deep * AMX_ROWS, 0, static_cast<size_t>((32 - deep) * AMX_ROWS * 4));
    for (int u = 0; u < 16; u++)
      for (int v = 0; v < AMX_ROWS; v += W) {
        const auto halves = [](vf value) { return __builtin_convertvector(to_bf16(value), vi); };
        const vf first = load(numbers + 2 * u * AMX_ROWS + v), second = load(numbers + (2 * u + 1) * AMX_ROWS + v);
        const vi a = halves(first), b = halves(second);
        store(high + u * AMX_ROWS + v, (vf)(a | b << 16));
        store(low + u * AMX_ROWS + v, (vf)(halves(first - (vf)(a << 16)) | halves(second - (vf)(b << 16)) << 16));
      }
    put(c, high, low);
  }
}

// Three products in one sum: high . high + high . low + low . high.
template <class A>
static void split_left(const A& a, int64_t i, int64_t count, int64_t d, int64_t depth, uint8_t* to, int64_t stride) {
  const int64_t steps = whole_registers(depth);
  split(a, i, count, d, depth, [&](int64_t c, float* high, float* low) {
    turn_register(high);
    turn_register(low);
    __builtin_memcpy(to + c * stride, high, AMX_BYTES);
    __builtin_memcpy(to + (steps + c) * stride, high, AMX_BYTES);
    __builtin_memcpy(to + (2 * steps + c) * stride, low, AMX_BYTES);
  });
}

template <class B>
static void split_right(const B& b, int64_t j, int64_t count, int64_t d, int64_t depth, float* to) {
  const int64_t steps = whole_registers(depth), floats = AMX_BYTES / 4;
  split(b, j, count, d, depth, [&](int64_t c, const float* high, const float* low) {
    __builtin_memcpy(to + c * floats, high, AMX_BYTES);
    __builtin_memcpy(to + (steps + c) * floats, low, AMX_BYTES);
    __builtin_memcpy(to + (2 * steps + c) * floats, high, AMX_BYTES);
  });
}

static inline void fetch_register(const uint8_t* from) {
#pragma GCC unroll 16
  for (int line = 0; line < AMX_BYTES; line += 64) __builtin_prefetch(from + line);
}

// R by C registers of y: `to` [16 R, 16 C], rows `stride` floats apart. The next registers are fetched into the first cache meanwhile: at moments
// when loads and products hardly overlap, apparently because the core's other hardware thread is busy, every load from the second cache is
// waited for (docs/KERNELS.md has figures).
template <int R, int C>
static inline void square(const uint8_t* left, const uint8_t* right, int64_t steps, float* to, int64_t stride) {
  const uint8_t* second = right + steps * AMX_BYTES;
  Amx::zero<0>();
  if constexpr (C > 1) Amx::zero<1>();
  if constexpr (R > 1) Amx::zero<2>();
  if constexpr (R > 1 && C > 1) Amx::zero<3>();
  for (int64_t s = 0; s < steps; s++, left += R * AMX_BYTES, right += AMX_BYTES, second += AMX_BYTES) {
    Amx::load<6>(right, 64);
    Amx::load<4>(left, 64);
    fetch_register(left + R * AMX_BYTES);
    Amx::dot_bf16<0, 4, 6>();
    if constexpr (C > 1) {
      Amx::load<7>(second, 64);
      fetch_register(right + AMX_BYTES);
      Amx::dot_bf16<1, 4, 7>();
    }
    if constexpr (R > 1) {
      Amx::load<5>(left + AMX_BYTES, 64);
      fetch_register(left + (R + 1) * AMX_BYTES);
      Amx::dot_bf16<2, 5, 6>();
      if constexpr (C > 1) {
        fetch_register(second + AMX_BYTES);
        Amx::dot_bf16<3, 5, 7>();
      }
    }
  }
  Amx::store<0>(to, stride * 4);
  if constexpr (C > 1) Amx::store<1>(to + AMX_ROWS, stride * 4);
  if constexpr (R > 1) Amx::store<2>(to + AMX_ROWS * stride, stride * 4);
  if constexpr (R > 1 && C > 1) Amx::store<3>(to + AMX_ROWS * stride + AMX_ROWS, stride * 4);
}

// y[i .., j ..] = or += sums [rows, columns] + bias. Rows are updated one after another, because two may be the same one.
static void put(const float* sums, int64_t rows, int64_t columns, const Target& y, int64_t i, int64_t j, bool add, const float* bias) {
  for (int64_t r = 0; r < rows; r++, sums += AMX_SQUARE) {
    float* to = y.row(i + r) + j;
    int64_t c = 0;
    for (; c + W <= columns; c += W) {
      vf sum = load(sums + c);
      if (bias) sum += load(bias + c);
      if (add) sum += load(to + c);
      store(to + c, sum);
    }
    for (; c < columns; c++) {
      float sum = sums[c];
      if (bias) sum += bias[c];
      if (add) sum += to[c];
      to[c] = sum;
    }
  }
}

template <bool SPLIT, class A, class B>
static void multiply_tiles(const A& a, const B& b, Range m, Range n, int64_t depth, const Target& y, const Worker& worker) {
  if (m.begin >= m.end || n.begin >= n.end) return;
  float* right_piece = worker.scratch_of(worker.index);
  uint8_t* left_piece = reinterpret_cast<uint8_t*>(right_piece + AMX_RIGHT * AMX_UNITS);
  constexpr int64_t deepest = SPLIT ? 2 * AMX_UNITS / 96 * 32 : 2 * AMX_UNITS;
  const auto pack_a = [&](int64_t i, int64_t count, int64_t d, int64_t deep, uint8_t* to, int64_t stride) {
    if constexpr (SPLIT) split_left(a, i, count, d, deep, to, stride);
    else pack_left(a, i, count, d, deep, to, stride);
  };
  const auto pack_b = [&](int64_t j, int64_t count, int64_t d, int64_t deep, float* to) {
    if constexpr (SPLIT) split_right(b, j, count, d, deep, to);
    else pack_right(b, j, count, d, deep, to);
  };
  Amx::begin();
  for (int64_t n0 = n.begin; n0 < n.end; n0 += AMX_RIGHT) {
    const int64_t n1 = min(n.end, n0 + AMX_RIGHT);
    int64_t d = 0;
    do {
      const int64_t deep = min(deepest, depth - d), steps = whole_registers(deep) * (SPLIT ? 3 : 1);
      for (int64_t j = n0; j < n1; j += AMX_ROWS) pack_b(j, min(AMX_ROWS, n1 - j), d, deep, right_piece + (j - n0) * steps * AMX_ROWS);
      const bool add = y.add || d > 0;
      for (int64_t m0 = m.begin; m0 < m.end; m0 += AMX_LEFT) {
        const int64_t m1 = min(m.end, m0 + AMX_LEFT);
        for (int64_t i = m0; i < m1; i += AMX_SQUARE) {
          uint8_t* to = left_piece + (i - m0) * steps * 64;
          const bool two = m1 - i > AMX_ROWS;
          pack_a(i, min(AMX_ROWS, m1 - i), d, deep, to, (two + 1) * AMX_BYTES);
          if (two) pack_a(i + AMX_ROWS, min(AMX_ROWS, m1 - i - AMX_ROWS), d, deep, to + AMX_BYTES, 2 * AMX_BYTES);
        }
        for (int64_t j = n0; j < n1; j += AMX_SQUARE) {
          const uint8_t* right = reinterpret_cast<const uint8_t*>(right_piece + (j - n0) * steps * AMX_ROWS);
          const float* bias = y.bias && d == 0 ? y.bias + j : nullptr;
          const int64_t columns = min(AMX_SQUARE, n1 - j);
          for (int64_t i = m0; i < m1; i += AMX_SQUARE) {
            const uint8_t* left = left_piece + (i - m0) * steps * 64;
            const int64_t rows = min(AMX_SQUARE, m1 - i);
            const bool low = rows <= AMX_ROWS, narrow = columns <= AMX_ROWS;
            const auto run = low ? narrow ? square<1, 1> : square<1, 2> : narrow ? square<2, 1> : square<2, 2>;
            if (rows == AMX_SQUARE && columns == AMX_SQUARE && !add && !bias && !y.index) {
              run(left, right, steps, y.data + i * y.stride + j, y.stride);
            } else {
              alignas(64) float sums[AMX_SQUARE * AMX_SQUARE];
              run(left, right, steps, sums, AMX_SQUARE);
              put(sums, rows, columns, y, i, j, add, bias);
            }
          }
        }
      }
      d += deepest;
    } while (d < depth);
  }
  Amx::end();
}

}  // namespace ISA
