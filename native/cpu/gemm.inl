// Products of large matrices, y[i, j] = sum over d of a[i, d] * b[j, d], for training: both operands are copied in pieces that
// stay in the caches, in the order in which the innermost loop reads them (https://doi.org/10.1145/1356052.1356053). Copying also
// converts their format. Every number is summed in blocks of DEPTH, one after another, whatever the threads and the rows beside it.

namespace ISA {

constexpr int64_t DEPTH = 256, A_ROWS = 336, B_ROWS = 1024;  // of the pieces: 344 KB and 1 MB
constexpr int TILE_A = W == 16 ? 14 : 6, TILE_B = 2 * W;     // a tile of y: as many sums as fit in registers

// The scratch of a thread: the two pieces, then what the caller keeps there.
constexpr int64_t PIECE_FLOATS = (A_ROWS + B_ROWS) * DEPTH + 64, SPARE_FLOATS = SCRATCH_BYTES / 4 - PIECE_FLOATS;
static inline float* spare(const Worker& worker, int thread) { return worker.scratch_of(thread) + PIECE_FLOATS; }

// What pieces consist of: units of 32 bits, each of `numbers` neighbouring numbers of the sum.
struct Floats {
  static constexpr int numbers = 1;
  static vf add(vf acc, const float* a, const float* b) { return acc + splat(*a) * load(b); }
};
// Two bfloat16 numbers. Where no instruction multiplies such pairs, bfloat16 numbers become floats instead.
struct Pairs {
  static constexpr int numbers = 2;
  static vf add(vf acc, const float* a, const float* b) {
    int32_t pair;
    __builtin_memcpy(&pair, a, 4);
    return DotBf16::add_pairs(acc, splat(pair), *reinterpret_cast<const vi_unaligned*>(b));
  }
};
// The same where tile registers multiply them (tiles.inl).
struct Tiles : Pairs {};
// Floats as sums of two bfloat16 numbers: three products of those for one.
struct SplitTiles : Floats {};
#ifdef HAS_AMX
using Halves = Tiles;
using Splits = SplitTiles;
constexpr int64_t PART_ROWS = 32;  // of y, at which threads divide a product
#else
using Halves = std::conditional_t<DotBf16::pairs, Pairs, Floats>;
using Splits = Floats;
constexpr int64_t PART_ROWS = TILE_A;
#endif

// Rows of numbers. With `index`, row i is row index[i] / per of the data.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  const int32_t* index = nullptr;
  int64_t per = 1;
  const T* row(int64_t i) const { return data + (index ? index[i] / per : i) * stride; }
};

// W bfloat16 numbers as the lower halves of lanes.
static inline vi halves_of(const bf16* p) { return __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vi); }

template <int S, bool UPPER>
static constexpr vi exchange_lanes() {
  vi lanes{};
  for (int i = 0; i < W; i++) lanes[i] = UPPER ? (i & S ? W + i : i + S) : (i & S ? W + i - S : i);
  return lanes;
}

// Transposes W vectors of W units: exchanges one bit of the vector's number with one of the lane's at a time.
template <int S = 1>
static inline void turn(vf (&t)[W]) {
  const vi lower = exchange_lanes<S, false>(), upper = exchange_lanes<S, true>();
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & S)) {
      const vf a = t[i], b = t[i + S];
      t[i] = __builtin_shuffle(a, b, lower);
      t[i + S] = __builtin_shuffle(a, b, upper);
    }
  if constexpr (S * 2 < W) turn<S * 2>(t);
}

// An operand whose sums run along its rows: row i of the operand is row i of the matrix.
template <class T>
struct Along {
  Rows<T> rows;

  // W units, or one.
  template <class U>
  static vf units(const T* row, int64_t d) {
    if constexpr (U::numbers == 1) return load(row + d);
    vf v;
    __builtin_memcpy(&v, row + d, sizeof v);
    return v;
  }
  template <class U>
  static float unit(const T* row, int64_t d, int64_t end) {
    if constexpr (U::numbers == 1) return scalar(row[d]);
    else return from_bits(row[d].bits | (d + 1 < end ? static_cast<uint32_t>(row[d + 1].bits) << 16 : 0));
  }

  // Writes rows i to i + count and the numbers d to d + depth of each, unit by unit, with the rows side by side, filled up to P.
  template <class U, int P>
  void pack(int64_t i, int64_t count, int64_t d, int64_t depth, float* to) const {
    constexpr int V = (P + W - 1) / W;
    const T* row[P];
    for (int r = 0; r < count; r++) row[r] = rows.row(i + r) + d;
    int64_t at = 0;
    for (; at + W * U::numbers <= depth; at += W * U::numbers, to += W * P)
      for (int v = V - 1; v >= 0; v--) {  // backwards: a vector beyond P is overwritten by the next unit's first
        vf t[W];
        for (int r = 0; r < W; r++) t[r] = v * W + r < count ? units<U>(row[v * W + r], at) : vf{};
        turn(t);
        for (int u = 0; u < W; u++) store(to + u * P + v * W, t[u]);
      }
    for (; at < depth; at += U::numbers, to += P)
      for (int r = 0; r < P; r++) to[r] = r < count ? unit<U>(row[r], at, depth) : 0.f;
  }
};

// An operand whose sums run across rows: number d of row i of the operand is number i of row d of the matrix.
template <class T>
struct Across {
  Rows<T> rows;

  template <class U>
  static float unit(const T* row, const T* next, int64_t i) {
    if constexpr (U::numbers == 1) return scalar(row[i]);
    else return from_bits(row[i].bits | (next ? static_cast<uint32_t>(next[i].bits) << 16 : 0));
  }

  template <class U, int P>
  void pack(int64_t i, int64_t count, int64_t d, int64_t depth, float* to) const {
    for (int64_t at = 0; at < depth; at += U::numbers, to += P) {
      const T* row = rows.row(d + at) + i;
      const T* next = at + 1 < depth && U::numbers == 2 ? rows.row(d + at + 1) + i : nullptr;
      if constexpr (U::numbers == 2 && P % W == 0) {
        if (count == P && next) {
#pragma GCC unroll 8
          for (int r = 0; r < P; r += W) store(to + r, (vf)(halves_of(row + r) | halves_of(next + r) << 16));
          continue;
        }
      }
      if (count == P && (next || U::numbers == 1)) {
#pragma GCC unroll 32
        for (int r = 0; r < P; r++) to[r] = unit<U>(row, next, r);
      } else {
        for (int r = 0; r < P; r++) to[r] = r < count ? unit<U>(row, next, r) : 0.f;
      }
    }
  }
};

// Matrices in block formats (src/tensor/quantized.ts), `columns` wide, from row `first` on, which starts a tile.
template <Dtype D>
struct Quantized {
  const uint8_t* data;
  int64_t columns;
  static constexpr Dtype dtype = D;
  static constexpr bool whole = D == INT8;
  static constexpr int64_t bytes = block_bytes(D), values = TILE_ROWS * GROUP / (whole ? 1 : 2);

  const uint8_t* block(int64_t row, int64_t column) const { return data + (row / TILE_ROWS * groups_of(columns) + column / GROUP) * bytes; }
  // The offset in its block of four columns of a tile's first row, and whether they are the upper nibbles.
  static int64_t four(int64_t column) { return column % (whole ? GROUP : HALF) / 4 * TILE_ROWS * 4; }
  static bool upper(int64_t column) { return !whole && column % GROUP >= HALF; }
  static const f16* scales(const uint8_t* block, int64_t column) { return reinterpret_cast<const f16*>(block + values) + (upper(column) ? TILE_ROWS : 0); }
};

template <Dtype D>
struct AlongBlocks {
  Quantized<D> matrix;

  // Lanes are rows, as in the format.
  template <class U, int P>
  void pack(int64_t i, int64_t count, int64_t d, int64_t depth, float* to) const {
    using Q = Quantized<D>;
    for (int v = 0; v < P / W; v++) {
      const int64_t row = i + v * W, lane = row % TILE_ROWS;
      for (int64_t c = 0; c < depth; c += 4) {
        const int64_t column = d + c;
        vi fours = {};
        vf scale = {};
        if (v * W < count) {
          const uint8_t* block = matrix.block(row, column);
          fours = *reinterpret_cast<const vi_unaligned*>(block + Q::four(column) + lane * 4);
          scale = load(Q::scales(block, column) + lane);
          if (Q::upper(column)) fours = (fours >> 4);
        }
        const vi mask = splat(Q::whole ? 255 : 15), zero = splat(Q::whole ? 128 : 8);
        for (int b = 0; b < min(4, depth - c); b++) store(to + (c + b) * P + v * W, to_float(((fours >> (8 * b)) & mask) - zero) * scale);
      }
    }
  }
};

template <Dtype D>
struct AcrossBlocks {
  Quantized<D> matrix;

  template <class U, int P>
  void pack(int64_t i, int64_t, int64_t d, int64_t depth, float* to) const {
    using Q = Quantized<D>;
    static_assert(HALF % P == 0);
    for (int64_t row = d; row < d + depth; row++, to += P) {
      const uint8_t* block = matrix.block(row, i);
      uint8_t bytes[P];
      for (int c = 0; c < P; c += 4) __builtin_memcpy(bytes + c, block + Q::four(i + c) + row % TILE_ROWS * 4, 4);
      const float scale = scalar(Q::scales(block, i)[row % TILE_ROWS]);
      const int shift = Q::upper(i) ? 4 : 0;
#pragma GCC unroll 32
      for (int c = 0; c < P; c++) to[c] = static_cast<float>(Q::whole ? bytes[c] - 128 : (bytes[c] >> shift & 15) - 8) * scale;
    }
  }
};

// Where a product goes: rows like those of an operand, to which it is added or not; and a bias.
struct Target {
  float* data;
  int64_t stride;
  bool add = false;
  const float* bias = nullptr;
  const int32_t* index = nullptr;
  int64_t per = 1;
  float* row(int64_t i) const { return data + (index ? index[i] / per : i) * stride; }
};

// R rows by V vectors of y. Rows are updated one after another, because two may be the same one.
template <class U, int R, int V>
static void tile(const float* a, const float* b, int64_t units, int64_t rows, int64_t columns, const Target& y, int64_t i, int64_t j, bool add, const float* bias) {
  vf acc[R][V] = {};
  for (int64_t u = 0; u < units; u++, a += R, b += V * W) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) acc[r][v] = U::add(acc[r][v], a + r, b + v * W);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    if (r >= rows) return;
    float* to = y.row(i + r) + j;
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      const int64_t left = columns - v * W;
      if (left >= W) {
        vf sum = acc[r][v];
        if (bias) sum += load(bias + v * W);
        if (add) sum += load(to + v * W);
        store(to + v * W, sum);
      } else {
        alignas(64) float lanes[W];
        store(lanes, acc[r][v]);
        for (int64_t l = 0; l < left; l++) {
          float sum = lanes[l];
          if (bias) sum += bias[v * W + l];
          if (add) sum += to[v * W + l];
          to[v * W + l] = sum;
        }
      }
    }
  }
}

struct Range {
  int64_t begin, end;
};

// Rows m of a times rows n of b, which start at a multiple of TILE_B, on this thread. With a depth of 0: zeros, or the bias.
template <class U, class A, class B>
static void multiply_vectors(const A& a, const B& b, Range m, Range n, int64_t depth, const Target& y, const Worker& worker) {
  if (m.begin >= m.end) return;
  float *b_piece = worker.scratch_of(worker.index), *a_piece = b_piece + B_ROWS * DEPTH;
  constexpr int half = TILE_A / 2;
  for (int64_t n0 = n.begin; n0 < n.end; n0 += B_ROWS) {
    const int64_t n1 = min(n.end, n0 + B_ROWS);
    int64_t d = 0;
    do {
      const int64_t deep = min(DEPTH, depth - d), units = (deep + U::numbers - 1) / U::numbers;
      for (int64_t j = n0; j < n1; j += TILE_B) {
        float* to = b_piece + (j - n0) * units;
        if (n1 - j > W) b.template pack<U, TILE_B>(j, min(TILE_B, n1 - j), d, deep, to);
        else b.template pack<U, W>(j, n1 - j, d, deep, to);
      }
      const bool add = y.add || d > 0;
      for (int64_t m0 = m.begin; m0 < m.end; m0 += A_ROWS) {
        const int64_t m1 = min(m.end, m0 + A_ROWS);
        for (int64_t i = m0; i < m1; i += TILE_A) {
          float* to = a_piece + (i - m0) * units;
          if (m1 - i > half) a.template pack<U, TILE_A>(i, min(TILE_A, m1 - i), d, deep, to);
          else a.template pack<U, half>(i, m1 - i, d, deep, to);
        }
        for (int64_t j = n0; j < n1; j += TILE_B) {
          const float *right = b_piece + (j - n0) * units, *bias = y.bias && d == 0 ? y.bias + j : nullptr;
          const int64_t columns = min(TILE_B, n1 - j);
          for (int64_t i = m0; i < m1; i += TILE_A) {
            const float* left = a_piece + (i - m0) * units;
            const int64_t rows = min(TILE_A, m1 - i);
            const bool low = rows <= half, narrow = columns <= W;
            (low ? narrow ? tile<U, half, 1> : tile<U, half, 2> : narrow ? tile<U, TILE_A, 1> : tile<U, TILE_A, 2>)(left, right, units, rows, columns, y, i, j, add, bias);
          }
        }
      }
      d += DEPTH;
    } while (d < depth);
  }
}

#ifdef HAS_AMX
template <bool SPLIT, class A, class B>
static void multiply_tiles(const A& a, const B& b, Range m, Range n, int64_t depth, const Target& y, const Worker& worker);
#endif

template <class U, class A, class B>
static inline void multiply(const A& a, const B& b, Range m, Range n, int64_t depth, const Target& y, const Worker& worker) {
#ifdef HAS_AMX
  if constexpr (std::is_same_v<U, Tiles>) multiply_tiles<false>(a, b, m, n, depth, y, worker);
  else if constexpr (std::is_same_v<U, SplitTiles>) multiply_tiles<true>(a, b, m, n, depth, y, worker);
  else
#endif
    multiply_vectors<U>(a, b, m, n, depth, y, worker);
}

// This thread's part of a product [m, n]: of the ways to lay a grid over it, the one with the least to copy.
static inline void part_of(int64_t m, int64_t n, const Worker& worker, Range& rows, Range& columns) {
  int best = 1;
  double least = INFINITY;
  for (int across = 1; across <= worker.count; across++) {
    if (worker.count % across) continue;
    const int down = worker.count / across;
    const double copied = static_cast<double>((m + down - 1) / down) + static_cast<double>((n + across - 1) / across);
    if (copied < least) least = copied, best = across;
  }
  const Worker down{worker.index / best, worker.count / best, nullptr, nullptr}, across{worker.index % best, best, nullptr, nullptr};
  down.share(m, PART_ROWS, rows.begin, rows.end);
  across.share(n, TILE_B, columns.begin, columns.end);
}

// Calls visit(unit, operand) with the matrix `part` of w, from row `first` on (a multiple of 16), as an operand whose sums run along or
// across its rows. X: numbers of the other operand; if they are in bfloat16, so is w.
template <bool ALONG, class X, class Visit>
static inline void with_weight(const Tensor& w, int64_t part, int64_t first, Visit visit) {
  constexpr bool halves = std::is_same_v<X, bf16>;
  const int64_t n = w.dims[w.rank - 2], k = w.dims[w.rank - 1];
  auto plain = [&](auto zero) {
    using T = decltype(zero);
    const T* data = (w.parts ? static_cast<const T*>(w.parts[part]) : w.as<T>() + part * n * k) + first * k;
    using Operand = std::conditional_t<ALONG, Along<T>, Across<T>>;
    if constexpr (!halves) visit(Floats{}, Operand{{data, k}});
    else if constexpr (std::is_same_v<T, bf16>) visit(Halves{}, Operand{{data, k}});
  };
  auto blocks = [&](auto matrix) {
    using Q = decltype(matrix);
    matrix.data = static_cast<const uint8_t*>(w.parts ? w.parts[part] : w.data) + first / TILE_ROWS * groups_of(k) * Q::bytes;
    matrix.columns = k;
    if constexpr (halves) return;
    else if constexpr (ALONG) visit(Floats{}, AlongBlocks<Q::dtype>{matrix});
    else visit(Floats{}, AcrossBlocks<Q::dtype>{matrix});
  };
  switch (w.dtype) {
    case F32: return plain(float{});
    case F16: return plain(f16{});
    case BF16: return plain(bf16{});
    case INT8: return blocks(Quantized<INT8>{});
    case INT4: return blocks(Quantized<INT4>{});
    default: return;  // the op table allows no other format
  }
}

// Rounds n numbers to bfloat16 in place: they take the first half of the memory.
static inline void halve(float* x, int64_t n) {
  bf16* y = reinterpret_cast<bf16*>(x);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vh halves = to_bf16(load(x + i));
    store(y + i, halves);
  }
  for (; i < n; i++) {
    const vf one = splat(x[i]);
    const bf16 half{to_bf16(one)[0]};
    __builtin_memcpy(y + i, &half, 2);
  }
}

// Calls visit(data) for activations in float32 or bfloat16.
template <class Visit>
static inline void with_numbers(const Tensor& x, Visit visit) {
  if (x.dtype == BF16) visit(x.as<bf16>());
  else visit(x.as<float>());
}

}  // namespace ISA
