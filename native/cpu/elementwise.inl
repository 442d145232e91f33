// Norms, activations, rotary embeddings, sums: ops that read a row and write a row. All but `angles` may overwrite the
// input that their row in the op table names.

namespace ISA {

// out = in / sqrt(mean(in^2) + eps) * w. `out` may be `in`.
static inline void norm_row(const float* in, const float* w, float* out, int64_t n, float eps) {
  vf squares = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) squares += load(in + i) * load(in + i);
  float total = sum(squares);
  for (; i < n; i++) total += in[i] * in[i];
  const float scale = 1 / __builtin_sqrtf(total / static_cast<float>(n) + eps);
  for (i = 0; i + W <= n; i += W) store(out + i, load(w + i) * (load(in + i) * scale));
  for (; i < n; i++) out[i] = w[i] * (in[i] * scale);
}

// y = a + b. `y` may be either input.
static inline void add_numbers(const float* a, const float* b, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, load(a + i) + load(b + i));
  for (; i < n; i++) y[i] = a[i] + b[i];
}

static void rms_norm(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &weight = o.in(1), &y = o.out(0);
  const int64_t n = x.dims[1];
  for (int64_t r = worker.index; r < x.rows(); r += worker.count)
    norm_row(x.as<float>() + r * n, weight.as<float>(), y.as<float>() + r * n, n, static_cast<float>(o.params[0]));
}

static void add(const Operands& o, const Worker& worker) {
  int64_t begin, end;
  worker.share(o.out(0).rows() * o.out(0).width(), 64, begin, end);
  add_numbers(o.in(0).as<float>() + begin, o.in(1).as<float>() + begin, o.out(0).as<float>() + begin, end - begin);
}

// The residual sum and its norm in one pass; bit-identical to `add` followed by `rmsNorm`.
static void add_rms_norm(const Operands& o, const Worker& worker) {
  const Tensor &a = o.in(0), &b = o.in(1), &weight = o.in(2), &sum = o.out(0), &normed = o.out(1);
  const int64_t n = a.dims[1];
  for (int64_t r = worker.index; r < a.rows(); r += worker.count) {
    float* row = sum.as<float>() + r * n;
    add_numbers(a.as<float>() + r * n, b.as<float>() + r * n, row, n);
    norm_row(row, weight.as<float>(), normed.as<float>() + r * n, n, static_cast<float>(o.params[0]));
  }
}

static void scale(const Operands& o, const Worker& worker) {
  const float* x = o.in(0).as<float>();
  const float by = static_cast<float>(o.params[0]);
  float* y = o.out(0).as<float>();
  int64_t i, end;
  worker.share(o.out(0).rows() * o.out(0).width(), 64, i, end);
  for (; i + W <= end; i += W) store(y + i, load(x + i) * by);
  for (; i < end; i++) y[i] = x[i] * by;
}

static void silu_mul(const Operands& o, const Worker& worker) {
  const float *gate = o.in(0).as<float>(), *up = o.in(1).as<float>();
  float* y = o.out(0).as<float>();
  int64_t begin, end;
  worker.share(o.out(0).rows() * o.out(0).width(), 64, begin, end);
  silu_times(gate + begin, up + begin, y + begin, end - begin);
}

// Cosine and sine of each pair's angle, interleaved, computed in float32 as in the reference.
static void angles(const Operands& o, const Worker& worker) {
  const Tensor &positions = o.in(0), &y = o.out(0);
  const int64_t dim = y.dims[1];
  for (int64_t r = worker.index; r < y.rows(); r += worker.count)
    for (int64_t i = 0; i < dim; i += 2) {
      const float frequency = 1.f / static_cast<float>(pow(o.params[1], static_cast<double>(static_cast<float>(i) / static_cast<float>(dim))));
      const float angle = static_cast<float>(positions.as<int32_t>()[r]) * frequency;
      y.as<float>()[r * dim + i] = cosf(angle);
      y.as<float>()[r * dim + i + 1] = sinf(angle);
    }
}

// In place, a head is rotated from a copy, so that the compiler can vectorize this case too (and results are bit-identical).
// DIRECTION -1 rotates back.
template <int DIRECTION>
static void rotate(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &table = o.in(1), &y = o.out(0);
  const int64_t n = x.dims[1], dim = table.dims[1];
  const int64_t heads = n / dim;
  int64_t begin, end;
  float copy[MAX_DIM];
  worker.share(x.rows() * heads, 1, begin, end);
  for (int64_t h = begin; h < end; h++) {
    const float *turn = table.as<float>() + h / heads * dim, *in = x.as<float>() + h * dim;
    float* out = y.as<float>() + h * dim;
    if (in == out && dim <= MAX_DIM) {
      __builtin_memcpy(copy, in, static_cast<size_t>(dim) * sizeof(float));
      in = copy;
    }
    for (int64_t i = 0; i < dim; i += 2) {
      const float c = turn[i], s = DIRECTION * turn[i + 1], a = in[i], b = in[i + 1];
      out[i] = a * c - b * s;
      out[i + 1] = b * c + a * s;
    }
  }
}

static void rope(const Operands& o, const Worker& worker) { rotate<1>(o, worker); }

}  // namespace ISA
