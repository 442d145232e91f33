// Products with weight matrices. Each output is one dot product, summed in an order that depends only on its length, so a
// row's result does not depend on which rows share the step or how the threads split the work.

namespace ISA {

// Weights that come next, fetched into the second-level cache in equal parts while others are multiplied. Several rows keep
// the multipliers busy, and the processor's own prefetching then lags behind.
struct Ahead {
  const uint8_t* at = nullptr;
  int64_t lines = 0, steps = 1, due = 0;

  Ahead() = default;
  // The `bytes` at `from`, during `steps` calls of `step`.
  Ahead(const void* from, int64_t bytes, int64_t steps) : at(static_cast<const uint8_t*>(from)), lines((bytes + 63) / 64), steps(steps) {}

  void step() {
    for (due += lines; due >= steps; due -= steps, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Row-major formats: up to 16 weight rows by R activation rows at a time, with lanes along k. Sums across lanes are made for
// many weight rows at once: one such sum costs as much as a hundred columns.
template <class X, class WT>
struct Dot {
  static constexpr int step = W, numbers = 1;  // X's per activation
  static vf add(vf acc, const X* x, const WT* w, int64_t) { return acc + load(x) * load(w); }
  static float value(const X* x, int64_t) { return scalar(*x); }
};
// Activations are sums of two bfloat16 numbers that are k apart.
template <>
struct Dot<bf16, bf16> {
  static constexpr int step = DotBf16::step, numbers = 2;
  static vf add(vf acc, const bf16* x, const bf16* w, int64_t k) { return DotBf16::add(DotBf16::add(acc, x, w), x + k, w); }
  static float value(const bf16* x, int64_t k) { return scalar(x[0]) + scalar(x[k]); }
};

template <class X_, class WT>
struct RowMajor {
  using X = X_;
  static constexpr int tile = 16, wide = 1;
  static constexpr int max_rows = W == 16 ? 6 : W == 8 ? 2 : 3;  // so that the accumulators fit in registers

  static int64_t x_bytes(int64_t k) { return k * sizeof(X) * Dot<X, WT>::numbers; }
  static int64_t row_bytes(int64_t k) { return k * sizeof(WT); }

  template <int R, int N>
  static void block(const X* const* x, const WT* w, int64_t k, float* const* y, int64_t n0, const float* bias) {
    using D = Dot<X, WT>;
    vf acc[R][N] = {};
    int64_t c = 0;
    for (; c + D::step <= k; c += D::step)
      for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) acc[r][n] = D::add(acc[r][n], x[r] + c, w + n * k + c, k);
    for (int r = 0; r < R; r++) {
      const vf sums = sum_lanes<N>(acc[r]);
      for (int n = 0; n < N; n++) {
        float s = sums[n * (W / N)];
        for (int64_t t = c; t < k; t++) s += D::value(x[r] + t, k) * scalar(w[n * k + t]);
        y[r][n0 + n] = bias ? s + bias[n0 + n] : s;
      }
    }
  }

  // y[r][0 .. n) = x[r] . w[n0 .. n0 + n)
  template <int R, int>
  static void run(const X* const* x, const void* weights, int64_t n0, int64_t n, int64_t k, float* const* y, const float* bias, Ahead&) {
    const WT* w = static_cast<const WT*>(weights) + n0 * k;
    int64_t i = 0;
    if constexpr (R == 1 && W > 4)
      for (; i + W <= n; i += W) block<R, W>(x, w + i * k, k, y, i, bias);
    for (; i + 4 <= n; i += 4) block<R, 4>(x, w + i * k, k, y, i, bias);
    for (; i < n; i++) block<R, 1>(x, w + i * k, k, y, i, bias);
  }
};

// Block formats (src/tensor/quantized.ts): tiles of 16 weight rows, with rows as lanes and activations broadcast. N tiles are
// computed together if that keeps the multipliers busy: each activation load then serves N tiles.
struct Blocks {
  using X = int8_t;  // a row: groups of 64 bytes, their scales, the corrections for the weights' offsets
  static constexpr int tile = TILE_ROWS;
  static constexpr int parts = TILE_ROWS / W;
  static int64_t x_bytes(int64_t k) { return int8_row_bytes(k); }
  static const float* scales(const X* x, int64_t groups) { return reinterpret_cast<const float*>(x + groups * GROUP); }
  // Per group: -8 x the sum of each half, and -128 x the sum of all.
  static const int32_t* corrections(const X* x, int64_t groups) { return reinterpret_cast<const int32_t*>(x + groups * (GROUP + 4)); }

  static int32_t four(const X* x) {
    int32_t v;
    __builtin_memcpy(&v, x, 4);
    return v;
  }

  template <int R, int V>
  static void finish(const vf (&total)[R][V], int64_t n, float* const* y, const float* bias) {
    for (int r = 0; r < R; r++) {
      if (n == V * W) {
        for (int v = 0; v < V; v++) store(y[r] + v * W, bias ? total[r][v] + load(bias + v * W) : total[r][v]);
      } else {
        for (int64_t i = 0; i < n; i++) y[r][i] = total[r][i / W][i % W] + (bias ? bias[i] : 0);
      }
    }
  }
};

// Adds to `acc` the products of R activation rows, from column `c` on, with STEPS vectors of weights of 4 columns each;
// weights(q) is the q-th vector. Takes two rows by 8 columns at a time if an instruction multiplies pairs of rows.
template <int R, int STEPS, class D = Dot8, class At>
static inline void products(vi* acc, const int8_t* const* x, int64_t c, At weights) {
  if constexpr (D::pairs && R > 1) {
    typename D::Pair sums[R / 2];
    for (int q = 0; q < STEPS; q += 2) {
      const auto first = weights(q), second = weights(q + 1);
      for (int p = 0; p < R / 2; p++) sums[p].add(first, second, x[2 * p] + c + q * 4, x[2 * p + 1] + c + q * 4);
    }
    for (int p = 0; p < R / 2; p++) acc[2 * p] += sums[p].of_first(), acc[2 * p + 1] += sums[p].of_second();
    if constexpr (R % 2) products<1, STEPS>(acc + R - 1, x + R - 1, c, weights);
  } else {
#pragma GCC unroll 16
    for (int q = 0; q < STEPS; q++) {
      const auto w = weights(q);
      for (int r = 0; r < R; r++) acc[r] = D::add(acc[r], w, Blocks::four(x[r] + c + q * 4));
    }
  }
}

// Scale: f16 in weights, float in the KV cache.
template <class Scale>
struct Int8Tiles : Blocks {
  static constexpr int max_rows = W == 16 ? 6 : W == 8 ? 2 : 4, wide = W == 16 ? 2 : 1;
  static constexpr int64_t bytes = TILE_ROWS * GROUP + TILE_ROWS * sizeof(Scale);
  static int64_t row_bytes(int64_t k) { return groups_of(k) * bytes / TILE_ROWS; }

  template <int R, int N>
  static void run(const X* const* x, const void* weights, int64_t n0, int64_t n, int64_t k, float* const* y, const float* bias, Ahead& ahead) {
    constexpr int V = N * parts, U = W == 16 ? N : 1;  // vectors of weight rows, and how many are summed at once
    const int64_t groups = groups_of(k);
    const uint8_t* block = static_cast<const uint8_t*>(weights) + n0 / TILE_ROWS * groups * bytes;
    vf total[R][V] = {};
    for (int64_t g = 0; g < groups; g++, block += bytes) {
      if constexpr (R > 1) ahead.step();
      for (int v = 0; v < V; v += U) {
        const uint8_t* at[U];
        vi acc[R][U];
        for (int u = 0; u < U; u++) at[u] = block + (v + u) / parts * groups * bytes;
        for (int r = 0; r < R; r++) {
          const int32_t start = Dot8::offset ? corrections(x[r], groups)[3 * g + 2] : 0;
          for (int u = 0; u < U; u++) acc[r][u] = splat(start);
        }
        if constexpr (U == 1) {
          products<R, GROUP / 4>(acc[0], x, g * GROUP, [&](int q) { return Dot8::load(at[0] + (q * TILE_ROWS + v % parts * W) * 4); });
        } else {
#pragma GCC unroll 16
          for (int q = 0; q < GROUP / 4; q++) {
            typename Dot8::Weights w[U];
            for (int u = 0; u < U; u++) w[u] = Dot8::load(at[u] + (q * TILE_ROWS + (v + u) % parts * W) * 4);
            for (int r = 0; r < R; r++) {
              const int32_t a = four(x[r] + g * GROUP + q * 4);
              for (int u = 0; u < U; u++) acc[r][u] = Dot8::add(acc[r][u], w[u], a);
            }
          }
        }
        for (int u = 0; u < U; u++) {
          const vf s = load(reinterpret_cast<const Scale*>(at[u] + TILE_ROWS * GROUP) + (v + u) % parts * W);
          for (int r = 0; r < R; r++) total[r][v + u] += to_float(acc[r][u]) * (s * scales(x[r], groups)[g]);
        }
      }
    }
    finish<R>(total, n, y, bias);
  }
};
using Int8Blocks = Int8Tiles<f16>;

struct Int4Blocks : Blocks {
  static constexpr int max_rows = W == 8 ? 2 : 4, wide = W == 16 ? 2 : 1;
  static int64_t row_bytes(int64_t k) { return groups_of(k) * INT4_BLOCK_BYTES / TILE_ROWS; }

  template <int R, int N>
  static void run(const X* const* x, const void* weights, int64_t n0, int64_t n, int64_t k, float* const* y, const float* bias, Ahead& ahead) {
    constexpr int V = N * parts, U = W == 16 ? N : 1;
    const int64_t groups = groups_of(k);
    const uint8_t* block = static_cast<const uint8_t*>(weights) + n0 / TILE_ROWS * groups * INT4_BLOCK_BYTES;
    vf total[R][V] = {};
    for (int64_t g = 0; g < groups; g++, block += INT4_BLOCK_BYTES) {
      if constexpr (R > 1) ahead.step();
      for (int v = 0; v < V; v += U) {
        const uint8_t* at[U];
        vi low[R][U], high[R][U];  // columns 0 to 31 of the block, and 32 to 63
        for (int u = 0; u < U; u++) at[u] = block + (v + u) / parts * groups * INT4_BLOCK_BYTES;
        for (int r = 0; r < R; r++) {
          const int32_t* start = corrections(x[r], groups) + 3 * g;
          for (int u = 0; u < U; u++) low[r][u] = splat(start[0]), high[r][u] = splat(start[1]);
        }
        if constexpr (Dot8::pairs && R > 1) {
          auto nibbles = [&](int q, bool upper) {
            typename Dot8::Weights lower_half, upper_half;
            Dot8::load_nibbles(at[0] + (q * TILE_ROWS + v % parts * W) * 4, lower_half, upper_half);
            return upper ? upper_half : lower_half;
          };
          products<R, HALF / 4>(low[0], x, g * GROUP, [&](int q) { return nibbles(q, false); });
          products<R, HALF / 4>(high[0], x, g * GROUP + HALF, [&](int q) { return nibbles(q, true); });
        } else {
#pragma GCC unroll 8
          for (int q = 0; q < HALF / 4; q++) {
            typename Dot8::Weights a[U], b[U];
            for (int u = 0; u < U; u++) Dot8::load_nibbles(at[u] + (q * TILE_ROWS + (v + u) % parts * W) * 4, a[u], b[u]);
            for (int r = 0; r < R; r++) {
              const X* from = x[r] + g * GROUP + q * 4;
              const int32_t first = four(from), second = four(from + HALF);
              for (int u = 0; u < U; u++) low[r][u] = Dot8::add_small(low[r][u], a[u], first), high[r][u] = Dot8::add_small(high[r][u], b[u], second);
            }
          }
        }
        for (int u = 0; u < U; u++) {
          const f16* row_scales = reinterpret_cast<const f16*>(at[u] + TILE_ROWS * GROUP / 2) + (v + u) % parts * W;
          const vf s_low = load(row_scales), s_high = load(row_scales + TILE_ROWS);
          for (int r = 0; r < R; r++)
            total[r][v + u] += (to_float(low[r][u]) * s_low + to_float(high[r][u]) * s_high) * scales(x[r], groups)[g];
        }
      }
    }
    finish<R>(total, n, y, bias);
  }
};

// Calls F::run on N tiles with the number of rows as a compile-time constant.
template <class F, int N, int R = F::max_rows>
static inline void run_rows(int rows, const typename F::X* const* x, const void* w, int64_t n0, int64_t n, int64_t k, float* const* y, const float* bias, Ahead& ahead) {
  if constexpr (R > 1) {
    if (rows != R) return run_rows<F, N, R - 1>(rows, x, w, n0, n, k, y, bias, ahead);
  }
  F::template run<R, N>(x, w, n0, n, k, y, bias, ahead);
}

constexpr int64_t PANEL = 32;  // weight rows that stay in the cache for all activation rows

#ifdef HAS_AMX
// Emulated tiles give vpdpbusd's bits. On a processor they have to show that first.
#ifdef EMULATE_TILES
constexpr bool INT8_TILES = true;
#else
constexpr bool INT8_TILES = false;
#endif
template <class F>
constexpr bool by_tiles = INT8_TILES && std::is_same_v<F, Int8Blocks>;
template <class XAt, class YAt>
static int64_t rows_by_tiles(const void* w, int64_t n0, int64_t stop, int64_t k, int64_t rows, XAt x_at, YAt y_at, const float* bias, Ahead& ahead);
#else
template <class F>
constexpr bool by_tiles = false;
#endif

// In how many passes, and how many rows at a time, so that no pass is left with a single row.
template <class F>
static inline int64_t passes_of(int64_t rows) { return (rows + F::max_rows - 1) / F::max_rows; }
template <class F>
static inline int64_t together(int64_t rows) { return rows ? (rows + passes_of<F>(rows) - 1) / passes_of<F>(rows) : 1; }

// The weight rows after `n0`'s panel, if they come before `end`, to be fetched while `rows` activation rows pass over the panel.
template <class F>
static inline Ahead next_panel(const void* w, int64_t n0, int64_t end, int64_t k, int64_t rows) {
  const int64_t from = n0 + PANEL, count = min(PANEL, end - from);
  if (count <= 0) return {};
  const int64_t steps = by_tiles<F> ? (rows + 15) / 16 * (PANEL / F::tile) : passes_of<F>(rows) * (PANEL / (F::wide * F::tile));
  return {static_cast<const uint8_t*>(w) + from * F::row_bytes(k), count * F::row_bytes(k), steps * groups_of(k)};
}

// Weight rows [n0, stop), at most a panel, times `rows` activation rows. XAt and YAt map a row number to a pointer.
template <class F, class XAt, class YAt>
static inline void one_panel(const void* w, int64_t n0, int64_t stop, int64_t k, int64_t rows, XAt x_at, YAt y_at, const float* bias, Ahead& ahead) {
  int64_t first = 0;
#ifdef HAS_AMX
  if constexpr (by_tiles<F>) first = rows_by_tiles(w, n0, stop, k, rows, x_at, y_at, bias, ahead);
#endif
  const int64_t most = together<F>(rows - first);
  for (int64_t r0 = first; r0 < rows; r0 += most) {
    const int count = static_cast<int>(min(most, rows - r0));
    const typename F::X* x[F::max_rows];
    float* y[F::max_rows];
    for (int r = 0; r < count; r++) x[r] = x_at(r0 + r);
    // A single row is memory-bound, and fastest when a thread reads its weights sequentially: go tile by tile.
    const int64_t wide = F::wide * F::tile;
    for (int64_t n = n0, step; n < stop; n += step) {
      step = count > 1 && stop - n >= wide ? wide : F::tile;
      for (int r = 0; r < count; r++) y[r] = y_at(r0 + r) + n;
      if (step > F::tile) run_rows<F, F::wide>(count, x, w, n, step, k, y, bias ? bias + n : nullptr, ahead);
      else run_rows<F, 1>(count, x, w, n, min(F::tile, stop - n), k, y, bias ? bias + n : nullptr, ahead);
    }
  }
}

// Weight rows [begin, end) times `rows` activation rows.
template <class F, class XAt, class YAt>
static inline void panel(const void* w, int64_t begin, int64_t end, int64_t k, int64_t rows, XAt x_at, YAt y_at, const float* bias) {
  for (int64_t n0 = begin; n0 < end; n0 += PANEL) {
    Ahead ahead = next_panel<F>(w, n0, end, k, rows);
    one_panel<F>(w, n0, min(n0 + PANEL, end), k, rows, x_at, y_at, bias, ahead);
  }
}

// y = silu(gate) * up
static inline void silu_times(const float* gate, const float* up, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf g = load(gate + i);
    store(y + i, g / (1.f + exp(-g)) * load(up + i));
  }
  for (; i < n; i++) y[i] = gate[i] / (1.f + exp(-gate[i])) * up[i];
}

// Calls visit(format) with the format that multiplies `weight` by activations.
template <class Visit>
static inline void with_format(const Tensor& weight, Visit visit) {
  switch (weight.dtype) {
    case F32: return visit(RowMajor<float, float>{});
    case F16: return visit(RowMajor<float, f16>{});
    case BF16: return visit(RowMajor<bf16, bf16>{});
    case INT8: return visit(Int8Blocks{});
    case INT4: return visit(Int4Blocks{});
    default: return;  // the op table allows no other format
  }
}

// Fetches the beginning of weights that are read next: the processor's prefetching starts late on every new stretch.
static inline void fetch_head(const void* w) {
  for (int64_t i = 0; i < 2048; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(w) + i, 0, 2);
}

template <class F>
static inline const uint8_t* weight_row(const void* w, int64_t n, int64_t k) { return static_cast<const uint8_t*>(w) + n * F::row_bytes(k); }

// silu(gate) * up of weight rows [begin, end) for a single row, which is memory-bound: long stretches of each matrix in turn.
// `next`: what is read after that, or null.
template <class F>
static inline void gated_row(const void* gate, const void* up, int64_t begin, int64_t end, int64_t k, const typename F::X* x, float* y, const void* next) {
  constexpr int64_t stretch = 512;
  alignas(64) float g[stretch], u[stretch];
  Ahead nothing;
  for (int64_t n0 = begin; n0 < end; n0 += stretch) {
    const int64_t stop = min(n0 + stretch, end);
    auto row = [&](int64_t) { return x; };
    fetch_head(weight_row<F>(up, n0, k));
    one_panel<F>(gate, n0, stop, k, 1, row, [&](int64_t) { return g - n0; }, nullptr, nothing);
    if (stop < end || next) fetch_head(stop < end ? weight_row<F>(gate, stop, k) : next);
    one_panel<F>(up, n0, stop, k, 1, row, [&](int64_t) { return u - n0; }, nullptr, nothing);
    silu_times(g, u, y + n0, stop - n0);
  }
}

// silu(gate) * up of weight rows [begin, end): both products for a few rows at a time, while the activations are cached.
template <class F, class XAt, class YAt>
static inline void gated_panel(const void* gate, const void* up, int64_t begin, int64_t end, int64_t k, int64_t rows, XAt x_at, YAt y_at, const void* next = nullptr) {
  if (rows == 1) return gated_row<F>(gate, up, begin, end, k, x_at(0), y_at(0), next);
  constexpr int64_t room = by_tiles<F> ? 16 : F::max_rows;
  const int64_t most = by_tiles<F> ? room : together<F>(rows);
  for (int64_t n0 = begin; n0 < end; n0 += PANEL) {
    const int64_t stop = min(n0 + PANEL, end);
    Ahead next_gate = next_panel<F>(gate, n0, end, k, rows), next_up = next_panel<F>(up, n0, end, k, rows);
    for (int64_t r0 = 0; r0 < rows; r0 += most) {
      const int64_t count = min(most, rows - r0);
      alignas(64) float g[room][PANEL], u[room][PANEL];
      auto x = [&](int64_t r) { return x_at(r0 + r); };
      one_panel<F>(gate, n0, stop, k, count, x, [&](int64_t r) { return g[r] - n0; }, nullptr, next_gate);
      one_panel<F>(up, n0, stop, k, count, x, [&](int64_t r) { return u[r] - n0; }, nullptr, next_up);
      for (int64_t r = 0; r < count; r++) silu_times(g[r], u[r], y_at(r0 + r) + n0, stop - n0);
    }
  }
}

static void gated_linear(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &gate = o.in(1), &up = o.in(2), &y = o.out(0);
  const int64_t k = gate.dims[1];
  with_format(gate, [&](auto format) {
    using F = decltype(format);
    int64_t begin, end;
    worker.share(gate.dims[0], F::tile, begin, end);
    const int8_t* xs = x.as<int8_t>();
    gated_panel<F>(gate.data, up.data, begin, end, k, x.rows(), [&](int64_t r) { return reinterpret_cast<const typename F::X*>(xs + r * F::x_bytes(k)); },
                   [&](int64_t r) { return y.as<float>() + r * y.dims[1]; });
  });
}

static void linear(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &w = o.in(1), &y = o.out(0);
  const float* bias = o.has(2) ? o.in(2).as<float>() : nullptr;
  const int64_t k = w.dims[1];
  with_format(w, [&](auto format) {
    using F = decltype(format);
    int64_t begin, end;
    worker.share(w.dims[0], F::tile, begin, end);
    const int8_t* xs = x.as<int8_t>();
    panel<F>(w.data, begin, end, k, x.rows(), [&](int64_t r) { return reinterpret_cast<const typename F::X*>(xs + r * F::x_bytes(k)); },
             [&](int64_t r) { return y.as<float>() + r * y.dims[1]; }, bias);
  });
}

static void to_bf16_pairs(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &y = o.out(0);
  const int64_t k = x.dims[1];
  int64_t begin, end;
  worker.share(x.rows() * k, 64, begin, end);
  for (int64_t i = begin; i < end; i++) {
    const float v = x.as<float>()[i];
    bf16* at = y.as<bf16>() + i / k * 2 * k + i % k;
    at[0] = to_bf16(v);
    at[k] = to_bf16(v - scalar(at[0]));
  }
}

// Numbers below this become zero when they are rounded to int8: 127 / top must not overflow.
static constexpr float TINY = 0x1p-100f;

// Rounds to 255 steps; each group of 64 is scaled by its largest value. A group with a number that is not finite gets the
// scale NaN, so that the products are NaN too and the step's caller can tell.
static void quantize_row(const float* x, int64_t k, int8_t* row) {
  const int64_t groups = groups_of(k);
  float* scales = reinterpret_cast<float*>(row + groups * GROUP);
  int32_t* corrections = reinterpret_cast<int32_t*>(scales + groups);
  for (int64_t g = 0; g < groups; g++) {
    const int count = static_cast<int>(min(GROUP, k - g * GROUP));
    float padded[GROUP];
    const float* in = x + g * GROUP;
    if (count < GROUP) {
      for (int i = 0; i < GROUP; i++) padded[i] = i < count ? in[i] : 0.f;
      in = padded;
    }
    vi tops = {};
    for (int i = 0; i < GROUP; i += W) tops = max_bits(tops, magnitude_bits(load(in + i)));
    const float top = largest_magnitude(tops);
    if (!(top > TINY && top < INFINITY)) {
      __builtin_memset(row + g * GROUP, 0, GROUP);
      for (int i = 0; i < 3; i++) corrections[3 * g + i] = 0;
      scales[g] = top < INFINITY ? 0.f : __builtin_nanf("");
      continue;
    }
    const float inverse = 127.f / top;
    for (int half = 0; half < 2; half++) {
      vi total = {};
      for (int i = half * HALF; i < (half + 1) * HALF; i += W) {
        const vi steps = round_steps(load(in + i) * inverse);
        store_bytes(row + g * GROUP + i, steps);
        total += steps;
      }
      corrections[3 * g + half] = -8 * static_cast<int32_t>(sum(to_float(total)));  // small integers: exact
    }
    corrections[3 * g + 2] = 16 * (corrections[3 * g] + corrections[3 * g + 1]);
    scales[g] = top / 127.f;
  }
}

static void to_int8_rows(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &y = o.out(0);
  const int64_t k = x.dims[1];
  for (int64_t r = worker.index; r < x.rows(); r += worker.count) quantize_row(x.as<float>() + r * k, k, y.as<int8_t>() + r * int8_row_bytes(k));
}

// Reads a table's row in any format.
static void read_row(const Tensor& table, int64_t r, float* y) {
  const int64_t k = table.dims[1];
  switch (table.dtype) {
    case F32: for (int64_t c = 0; c < k; c++) y[c] = table.as<float>()[r * k + c]; break;
    case BF16: for (int64_t c = 0; c < k; c++) y[c] = scalar(table.as<bf16>()[r * k + c]); break;
    case F16: for (int64_t c = 0; c < k; c++) y[c] = scalar(table.as<f16>()[r * k + c]); break;
    default: {
      const bool whole = table.dtype == INT8;
      const int lane = static_cast<int>(r % TILE_ROWS);
      for (int64_t g = 0; g < groups_of(k); g++) {
        const uint8_t* block = table.as<uint8_t>() + (r / TILE_ROWS * groups_of(k) + g) * block_bytes(table.dtype);
        const f16* scales = reinterpret_cast<const f16*>(block + (whole ? TILE_ROWS * GROUP : TILE_ROWS * GROUP / 2));
        for (int64_t i = 0; i < min(GROUP, k - g * GROUP); i++) {
          const int64_t half = whole ? 0 : i / HALF, c = i - half * HALF;
          const int byte = block[(c / 4 * TILE_ROWS + lane) * 4 + c % 4];
          const int q = whole ? byte - 128 : (half ? byte >> 4 : byte & 15) - 8;
          y[g * GROUP + i] = static_cast<float>(q) * scalar(scales[half * TILE_ROWS + lane]);
        }
      }
    }
  }
}

static void embed(const Operands& o, const Worker& worker) {
  const Tensor &ids = o.in(0), &table = o.in(1), &y = o.out(0);
  for (int64_t r = worker.index; r < ids.rows(); r += worker.count) {
    const int32_t id = ids.as<int32_t>()[r];
    if (id < 0 || id >= table.dims[0]) worker.fail("token id %lld is outside the vocabulary of %lld", id, table.dims[0]);
    else read_row(table, id, y.as<float>() + r * y.dims[1]);
  }
}

}  // namespace ISA
