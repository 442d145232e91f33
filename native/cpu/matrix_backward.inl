// Products with one weight matrix in training: forward, and the gradients of activations, matrix and bias.

namespace ISA {

// Copies a part of a matrix to another, unless they are the same.
static inline void copy_part(const Tensor& from, const Tensor& to, Range rows, Range columns) {
  if (from.data == to.data) return;
  const int64_t n = to.dims[1];
  for (int64_t r = rows.begin; r < rows.end; r++)
    for (int64_t c = columns.begin; c < columns.end; c++) to.as<float>()[r * n + c] = from.as<float>()[r * n + c];
}

// y = x . w^T + bias, for many rows, or what `added` holds + x . w^T. Sums run in another order than those of `linear`.
static void rows_by_weight(const Operands& o, const Worker& worker, const float* bias, const Tensor* added) {
  const Tensor &x = o.in(0), &w = o.in(1), &y = o.out(0);
  const int64_t n = w.dims[0], k = w.dims[1];
  const Target target{y.as<float>(), n, added != nullptr, bias};
  Range rows, columns;
  part_of(x.rows(), n, worker, rows, columns);
  if (added) copy_part(*added, y, rows, columns);
  with_numbers(x, [&](auto* data) {
    using X = std::remove_pointer_t<decltype(data)>;
    with_weight<true, X>(w, 0, 0, [&](auto unit, auto b) { multiply<decltype(unit)>(Along<X>{{data, k}}, b, rows, columns, k, target, worker); });
  });
}

static void tiled_linear(const Operands& o, const Worker& worker) { rows_by_weight(o, worker, o.has(2) ? o.in(2).as<float>() : nullptr, nullptr); }
static void add_linear(const Operands& o, const Worker& worker) { rows_by_weight(o, worker, nullptr, &o.in(2)); }

// dx = dy . w, or what a third input holds + dy . w.
static void linear_t(const Operands& o, const Worker& worker) {
  const Tensor &dy = o.in(0), &w = o.in(1), &dx = o.out(0);
  const int64_t n = w.dims[0], k = w.dims[1];
  Range rows, columns;
  part_of(dy.rows(), k, worker, rows, columns);
  if (o.has(2)) copy_part(o.in(2), dx, rows, columns);
  with_numbers(dy, [&](auto* data) {
    using X = std::remove_pointer_t<decltype(data)>;
    with_weight<false, X>(w, 0, 0, [&](auto unit, auto b) { multiply<decltype(unit)>(Along<X>{{data, n}}, b, rows, columns, n, Target{dx.as<float>(), k, o.has(2)}, worker); });
  });
}

// dw = dy^T x
static void outer(const Operands& o, const Worker& worker) {
  const Tensor &dy = o.in(0), &x = o.in(1), &dw = o.out(0);
  const int64_t n = dy.dims[1], k = x.dims[1];
  Range rows, columns;
  part_of(n, k, worker, rows, columns);
  with_numbers(dy, [&](auto* data) {
    using X = std::remove_pointer_t<decltype(data)>;
    using U = std::conditional_t<sizeof(X) == 2, Halves, Floats>;
    multiply<U>(Across<X>{{data, n}}, Across<X>{{x.as<X>(), k}}, rows, columns, dy.rows(), Target{dw.as<float>(), k}, worker);
  });
}

// y[begin .. end) = the sums of `count` rows; row(i) is the i-th.
template <class Row>
static inline void sum_rows_of(int64_t count, int64_t begin, int64_t end, float* y, Row row) {
  int64_t c = begin;
  for (; c + W <= end; c += W) {
    vf total = {};
    for (int64_t i = 0; i < count; i++) total += load(row(i) + c);
    store(y + c, total);
  }
  for (; c < end; c++) {
    float total = 0;
    for (int64_t i = 0; i < count; i++) total += row(i)[c];
    y[c] = total;
  }
}

static void sum_rows(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &y = o.out(0);
  const int64_t n = x.dims[1];
  int64_t begin, end;
  worker.share(n, 16, begin, end);
  sum_rows_of(x.rows(), begin, end, y.as<float>(), [&](int64_t r) { return x.as<float>() + r * n; });
}

}  // namespace ISA
