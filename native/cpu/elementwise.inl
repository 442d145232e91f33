// Norm, activation, rotary positions, sums and gathers: ops that read a row and write a row.

namespace ISA {

static void rms_norm(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &weight = o.in(1), &y = o.out(0);
  const int64_t n = x.dims[1];
  const float eps = static_cast<float>(o.params[0]), *w = weight.as<float>();
  for (int64_t r = worker.index; r < x.rows(); r += worker.count) {
    const float* in = x.as<float>() + r * n;
    float* out = y.as<float>() + r * n;
    vf squares = {};
    int64_t i = 0;
    for (; i + W <= n; i += W) squares += load(in + i) * load(in + i);
    float total = sum(squares);
    for (; i < n; i++) total += in[i] * in[i];
    const float scale = 1 / __builtin_sqrtf(total / static_cast<float>(n) + eps);
    for (i = 0; i < n; i++) out[i] = w[i] * (in[i] * scale);
  }
}

static void add(const Operands& o, const Worker& worker) {
  const float *a = o.in(0).as<float>(), *b = o.in(1).as<float>();
  float* y = o.out(0).as<float>();
  int64_t begin, end;
  worker.share(o.out(0).rows() * o.out(0).width(), 64, begin, end);
  for (int64_t i = begin; i < end; i++) y[i] = a[i] + b[i];
}

static void silu_mul(const Operands& o, const Worker& worker) {
  const float *gate = o.in(0).as<float>(), *up = o.in(1).as<float>();
  float* y = o.out(0).as<float>();
  int64_t begin, end;
  worker.share(o.out(0).rows() * o.out(0).width(), 64, begin, end);
  silu_times(gate + begin, up + begin, y + begin, end - begin);
}

// Cosine and sine of each pair's angle, side by side, as float32 computes them in the reference.
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

static void rope(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &table = o.in(1), &y = o.out(0);
  const int64_t n = x.dims[1], dim = table.dims[1];
  const int64_t heads = n / dim;
  int64_t begin, end;
  worker.share(x.rows() * heads, 1, begin, end);
  for (int64_t h = begin; h < end; h++) {
    const float *turn = table.as<float>() + h / heads * dim, *in = x.as<float>() + h * dim;
    float* out = y.as<float>() + h * dim;
    for (int64_t i = 0; i < dim; i += 2) {
      const float c = turn[i], s = turn[i + 1], a = in[i], b = in[i + 1];
      out[i] = a * c - b * s;
      out[i + 1] = b * c + a * s;
    }
  }
}

static void gather(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &index = o.in(1), &y = o.out(0);
  const int64_t n = x.dims[1];
  for (int64_t r = worker.index; r < y.rows(); r += worker.count) {
    const int32_t from = index.as<int32_t>()[r];
    if (from < 0 || from >= x.rows()) worker.fail("internal: gather: row %lld of %lld", from, x.rows());
    else for (int64_t i = 0; i < n; i++) y.as<float>()[r * n + i] = x.as<float>()[from * n + i];
  }
}

}  // namespace ISA
