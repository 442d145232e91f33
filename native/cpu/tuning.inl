// Of training methods: DoRA's norms, losses of classifiers and preferences, and those of the router.

namespace ISA {

static void mul(const Operands& o, const Worker& worker) {
  const float *a = o.in(0).as<float>(), *b = o.in(1).as<float>();
  float* y = o.out(0).as<float>();
  int64_t i, end;
  my_share(o.out(0), worker, i, end);
  for (; i + W <= end; i += W) store(y + i, load(a + i) * load(b + i));
  for (; i < end; i++) y[i] = a[i] * b[i];
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), in float64: there are few of them.
static void softplus(const Operands& o, const Worker& worker) {
  const float* x = o.in(0).as<float>();
  float* y = o.out(0).as<float>();
  int64_t i, end;
  my_share(o.out(0), worker, i, end);
  for (; i < end; i++) {
    const double v = static_cast<double>(x[i]), t = __builtin_exp(v > 0 ? -v : v);
    y[i] = static_cast<float>((v > 0 ? v : 0) + __builtin_log1p(t));
    if (v != v) y[i] = x[i];
  }
}

static void softplus_grad(const Operands& o, const Worker& worker) {
  const float *dy = o.in(0).as<float>(), *x = o.in(1).as<float>();
  float* dx = o.out(0).as<float>();
  int64_t i, end;
  my_share(o.out(0), worker, i, end);
  for (; i < end; i++) dx[i] = static_cast<float>(static_cast<double>(dy[i]) / (1 + __builtin_exp(-static_cast<double>(x[i]))));
}

// y = x * by (+ bias), column by column. `y` may be `x`.
static void scale_columns(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &y = o.out(0);
  const float *by = o.in(1).as<float>(), *bias = o.has(2) ? o.in(2).as<float>() : nullptr;
  const int64_t n = x.dims[1];
  for (int64_t r = worker.index; r < x.rows(); r += worker.count) {
    const float* from = x.as<float>() + r * n;
    float* to = y.as<float>() + r * n;
    int64_t c = 0;
    for (; c + W <= n; c += W) {
      const vf scaled = load(from + c) * load(by + c);
      store(to + c, bias ? scaled + load(bias + c) : scaled);
    }
    for (; c < n; c++) to[c] = from[c] * by[c] + (bias ? bias[c] : 0.f);
  }
}

// A matrix of floats, or one of a stack.
static inline const float* matrix_of(const Tensor& t, int64_t e) {
  if (t.rank < 3) return t.as<float>();
  return t.parts ? static_cast<const float*>(t.parts[e]) : t.as<float>() + e * t.dims[1] * t.dims[2];
}

// 1 / |w_i + scale * (b . a)_i| of each row of a matrix in any format, or of each of a stack. A thread adds up a row in its scratch memory.
static void inverse_norms(const Operands& o, const Worker& worker) {
  const Tensor &w = o.in(0), &a = o.in(1), &b = o.in(2), &y = o.out(0);
  const bool stacked = w.rank == 3;
  const int64_t n = w.dims[w.rank - 2], k = w.dims[w.rank - 1], rank = a.dims[a.rank - 2];
  const float scale = static_cast<float>(o.params[0]);
  if (k * 4 > SCRATCH_BYTES) return worker.fail("internal: inverseNorms: rows of %lld numbers, at most %lld", k, SCRATCH_BYTES / 4);
  float* row = worker.scratch_of(worker.index);
  Tensor matrix = w;
  matrix.rank = 2, matrix.dims[0] = n, matrix.dims[1] = k;
  for (int64_t i = worker.index; i < y.rows(); i += worker.count) {
    const int64_t e = i / n;
    if (stacked) matrix.data = w.parts[e];
    read_row(matrix, i % n, row);
    const float *down = matrix_of(a, e), *up = matrix_of(b, e) + i % n * rank;
    for (int64_t r = 0; r < rank; r++) {
      const float by = scale * up[r], *from = down + r * k;
      int64_t c = 0;
      for (; c + W <= k; c += W) store(row + c, load(row + c) + by * load(from + c));
      for (; c < k; c++) row[c] += by * from[c];
    }
    y.as<float>()[i] = 1 / __builtin_sqrtf(dot_of(row, row, k));
  }
}

// Softmax of a row's logits into p; returns the logarithm of its denominator.
static float softmax_of(const float* l, int64_t count, float* p) {
  float top = l[0], total = 0;
  for (int64_t e = 1; e < count; e++) top = max(top, l[e]);
  for (int64_t e = 0; e < count; e++) total += p[e] = expf(l[e] - top);
  for (int64_t e = 0; e < count; e++) p[e] /= total;
  return top + static_cast<float>(__builtin_log(static_cast<double>(total)));
}

// On one thread, in float64, so that sums do not depend on the team.
static void router_load(const Operands& o, const Worker& worker) {
  if (worker.index) return;
  const Tensor& logits = o.in(0);
  const int64_t rows = logits.rows(), count = logits.dims[1], k = static_cast<int64_t>(o.params[0]);
  if (count * 12 > SCRATCH_BYTES) return worker.fail("internal: routerLoad: %lld experts, at most %lld", count, SCRATCH_BYTES / 12);
  double* sums = reinterpret_cast<double*>(worker.scratch_of(0));
  float *p = reinterpret_cast<float*>(sums + count), *load = o.out(0).as<float>();
  for (int64_t e = 0; e < count; e++) load[e] = 0, sums[e] = 0;
  double squares = 0;
  for (int64_t r = 0; r < rows; r++) {
    const float* l = logits.as<float>() + r * count;
    const double s = static_cast<double>(softmax_of(l, count, p));
    squares += s * s;
    for (int64_t e = 0; e < count; e++) {
      sums[e] += static_cast<double>(p[e]);
      int64_t better = 0;
      for (int64_t j = 0; j < count; j++) better += l[j] > l[e] || (l[j] == l[e] && j < e);
      load[e] += better < k;
    }
  }
  for (int64_t e = 0; e < count; e++) {
    load[e] /= static_cast<float>(rows);
    o.out(1).as<float>()[e] = static_cast<float>(sums[e] / static_cast<double>(rows));
  }
  *o.out(2).as<float>() = static_cast<float>(squares / static_cast<double>(rows));
}

// dl_e = p_e (dP_e - sum_j p_j dP_j + 2 s dz) / rows, s being the logarithm of the softmax's denominator.
static void router_load_grad(const Operands& o, const Worker& worker) {
  const float *d_p = o.in(0).as<float>(), d_z = *o.in(1).as<float>();
  const Tensor &logits = o.in(2), &d_logits = o.out(0);
  const int64_t rows = logits.rows(), count = logits.dims[1];
  for (int64_t r = worker.index; r < rows; r += worker.count) {
    float* d = d_logits.as<float>() + r * count;
    float shift = 2 * d_z * softmax_of(logits.as<float>() + r * count, count, d);
    float mean = 0;
    for (int64_t e = 0; e < count; e++) mean += d[e] * d_p[e];
    for (int64_t e = 0; e < count; e++) d[e] *= (d_p[e] - mean + shift) / static_cast<float>(rows);
  }
}

}  // namespace ISA
