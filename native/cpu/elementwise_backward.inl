// Gradients of norms, activations and rotations; casts, dropout, and rows that are added, zeroed or padded.

namespace ISA {

// This thread's share of y's elements.
static inline void my_share(const Tensor& y, const Worker& worker, int64_t& begin, int64_t& end) { worker.share(y.rows() * y.width(), 64, begin, end); }

static inline float inverse_rms(const float* x, int64_t n, float eps) { return 1 / __builtin_sqrtf(dot_of(x, x, n) / static_cast<float>(n) + eps); }

// y_i = w_i x_i s, s = (mean x^2 + eps)^-1/2: dx_i = s (w_i dy_i - x_i s^2 mean(w dy x))
static void rms_norm_grad_x(const Operands& o, const Worker& worker) {
  const Tensor &dy = o.in(0), &x = o.in(1), &weight = o.in(2), &dx = o.out(0);
  const int64_t n = x.dims[1];
  const float* w = weight.as<float>();
  for (int64_t r = worker.index; r < x.rows(); r += worker.count) {
    const float *in = x.as<float>() + r * n, *d = dy.as<float>() + r * n, s = inverse_rms(in, n, static_cast<float>(o.params[0]));
    float* out = dx.as<float>() + r * n;
    vf sums = {};
    int64_t i = 0;
    for (; i + W <= n; i += W) sums += load(w + i) * load(d + i) * load(in + i);
    float mean = sum(sums);
    for (; i < n; i++) mean += w[i] * d[i] * in[i];
    const float by = s * s * (mean / static_cast<float>(n));
    for (i = 0; i < n; i++) out[i] = s * (w[i] * d[i] - in[i] * by);
  }
}

// dw_i = the sum of dy x s over the rows. Each thread sums some columns; it computes s of a few rows at a time.
static void rms_norm_grad_w(const Operands& o, const Worker& worker) {
  const Tensor &dy = o.in(0), &x = o.in(1), &dw = o.out(0);
  const int64_t n = x.dims[1], rows = x.rows();
  constexpr int64_t batch = 64;
  int64_t begin, end;
  worker.share(n, 16, begin, end);
  float* y = dw.as<float>();
  for (int64_t c = begin; c < end; c++) y[c] = 0;
  for (int64_t r0 = 0; r0 < rows && begin < end; r0 += batch) {
    const int64_t count = min(batch, rows - r0);
    const float *in = x.as<float>() + r0 * n, *d = dy.as<float>() + r0 * n;
    float s[batch];
    for (int64_t r = 0; r < count; r++) s[r] = inverse_rms(in + r * n, n, static_cast<float>(o.params[0]));
    int64_t c = begin;
    for (; c + W <= end; c += W) {
      vf total = load(y + c);
      for (int64_t r = 0; r < count; r++) total += load(d + r * n + c) * load(in + r * n + c) * s[r];
      store(y + c, total);
    }
    for (; c < end; c++)
      for (int64_t r = 0; r < count; r++) y[c] += d[r * n + c] * in[r * n + c] * s[r];
  }
}

// silu(g) = g s, s = 1 / (1 + e^-g): silu' = s (1 + g (1 - s))
static void silu_mul_grad(const Operands& o, const Worker& worker) {
  const float *dy = o.in(0).as<float>(), *gate = o.in(1).as<float>(), *up = o.in(2).as<float>();
  float *d_gate = o.out(0).as<float>(), *d_up = o.out(1).as<float>();
  int64_t i, end;
  my_share(o.out(0), worker, i, end);
  for (; i + W <= end; i += W) {
    const vf g = load(gate + i), d = load(dy + i), s = 1.f / (1.f + exp(-g));
    store(d_gate + i, d * load(up + i) * s * (1.f + g * (1.f - s)));
    store(d_up + i, d * g * s);
  }
  for (; i < end; i++) {
    const float g = gate[i], d = dy[i], s = 1.f / (1.f + exp(-g));
    d_gate[i] = d * up[i] * s * (1.f + g * (1.f - s));
    d_up[i] = d * g * s;
  }
}

static void scale_by(const Operands& o, const Worker& worker) {
  const float *x = o.in(0).as<float>(), by = *o.in(1).as<float>();
  float* y = o.out(0).as<float>();
  int64_t i, end;
  my_share(o.out(0), worker, i, end);
  for (; i < end; i++) y[i] = x[i] * by;
}

static void fill(const Operands& o, const Worker& worker) {
  int64_t i, end;
  my_share(o.out(0), worker, i, end);
  for (; i < end; i++) o.out(0).as<float>()[i] = static_cast<float>(o.params[0]);
}

// The sum of a * b, in float64, on one thread: vectors are as long as there are rows.
static void dot(const Operands& o, const Worker& worker) {
  if (worker.index) return;
  const float *a = o.in(0).as<float>(), *b = o.in(1).as<float>();
  double total = 0;
  for (int64_t i = 0; i < o.in(0).rows(); i++) total += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  *o.out(0).as<float>() = static_cast<float>(total);
}

// One round of MurmurHash3's finalizer, as in the reference.
static inline uint32_t stir(uint32_t h, uint32_t word) {
  h = (h ^ word) * 0x85ebca6bu;
  h = (h ^ h >> 13) * 0xc2b2ae35u;
  return (h ^ h >> 16) + 0x9e3779b9u;
}

static void dropout(const Operands& o, const Worker& worker) {
  const float* x = o.in(0).as<float>();
  const int32_t* seed = o.in(1).as<int32_t>();
  float* y = o.out(0).as<float>();
  // A number of 24 bits is less than p of their range if it is less than the smallest whole number from p * 2^24 on.
  const int32_t limit = static_cast<int32_t>(__builtin_ceil(o.params[0] * 0x1p24));
  const float kept = static_cast<float>(1 - o.params[0]);
  const uint32_t start = stir(stir(stir(0, static_cast<uint32_t>(seed[0])), static_cast<uint32_t>(seed[1])), static_cast<uint32_t>(static_cast<int64_t>(o.params[1])));
  int64_t i, end;
  my_share(o.out(0), worker, i, end);
  for (; i < end; i++) {
    const int32_t drawn = static_cast<int32_t>(stir(start, static_cast<uint32_t>(i)) >> 8);
    y[i] = drawn < limit ? 0.f : x[i] / kept;
  }
}

static inline void convert(float x, float& y) { y = x; }
static inline void convert(float x, f16& y) { y = to_f16(x); }
static inline void convert(float x, bf16& y) { y = x == x ? to_bf16(x) : bf16{static_cast<uint16_t>(to_bits(x) >> 16 | 64)}; }  // keeps NaN

template <class Y>
static void cast(const Operands& o, const Worker& worker) {
  int64_t begin, end;
  my_share(o.out(0), worker, begin, end);
  Y* y = o.out(0).as<Y>();
  auto from = [&](auto* x) {
    int64_t i = begin;
    if constexpr (std::is_same_v<Y, bf16>)
      for (; i + W <= end; i += W) store(y + i, to_bf16(load(x + i)));
    for (; i < end; i++) convert(scalar(x[i]), y[i]);
  };
  const Tensor& x = o.in(0);
  if (x.dtype == F32) from(x.as<float>());
  else if (x.dtype == BF16) from(x.as<bf16>());
  else from(x.as<f16>());
}

// The transpose of `rope`: the same rotation backwards.
static void rope_t(const Operands& o, const Worker& worker) { rotate<-1>(o, worker); }

// Adds row r of dy to row index[r] of zeros. Each thread adds some columns of all rows, in order.
static void scatter_rows(const Operands& o, const Worker& worker) {
  const Tensor &dy = o.in(0), &index = o.in(1), &dx = o.out(0);
  const int64_t n = dy.dims[1];
  int64_t begin, end;
  worker.share(dx.rows(), 1, begin, end);
  __builtin_memset(dx.as<float>() + begin * n, 0, static_cast<size_t>((end - begin) * n) * 4);
  worker.wait();
  worker.share(n, 16, begin, end);
  for (int64_t r = 0; r < index.rows(); r++) {
    const int32_t to = index.as<int32_t>()[r];
    if (to < 0 || to >= dx.rows()) worker.fail("internal: scatterRows: row %lld of %lld", to, dx.rows());
    else if (begin < end) add_numbers(dx.as<float>() + to * n + begin, dy.as<float>() + r * n + begin, dx.as<float>() + to * n + begin, end - begin);
  }
}

// y = x with some rows set to zero. `y` may be `x`.
static void zero_rows(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &index = o.in(1), &y = o.out(0);
  const int64_t n = x.dims[1];
  int64_t begin, end;
  worker.share(x.rows(), 1, begin, end);
  if (y.data != x.data) __builtin_memcpy(y.as<float>() + begin * n, x.as<float>() + begin * n, static_cast<size_t>((end - begin) * n) * 4);
  for (int64_t i = 0; i < index.rows(); i++) {
    const int32_t r = index.as<int32_t>()[i];
    if (r < 0 || r >= x.rows()) worker.fail("internal: zeroRows: row %lld of %lld", r, x.rows());
    else if (r >= begin && r < end) __builtin_memset(y.as<float>() + r * n, 0, static_cast<size_t>(n) * 4);
  }
}

// Zeros around x along `axis`. Elements are 4 bytes.
static void pad(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &y = o.out(0);
  const int axis = static_cast<int>(o.params[0]);
  const int64_t start = static_cast<int64_t>(o.params[1]);
  if (start < 0 || start + x.dims[axis] > y.dims[axis]) return worker.fail("internal: pad: ends at %lld of %lld", start + x.dims[axis], y.dims[axis]);
  int64_t inner = 1, outer = 1;
  for (int d = axis + 1; d < x.rank; d++) inner *= x.dims[d];
  for (int d = 0; d < axis; d++) outer *= x.dims[d];
  const int64_t given = x.dims[axis] * inner, whole = y.dims[axis] * inner, before = start * inner;
  for (int64_t i = worker.index; i < outer; i += worker.count) {
    int32_t* to = y.as<int32_t>() + i * whole;
    __builtin_memset(to, 0, static_cast<size_t>(before) * 4);
    __builtin_memcpy(to + before, x.as<int32_t>() + i * given, static_cast<size_t>(given) * 4);
    __builtin_memset(to + before + given, 0, static_cast<size_t>(whole - before - given) * 4);
  }
}

}  // namespace ISA
