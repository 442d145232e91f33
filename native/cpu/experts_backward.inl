// The mixture of experts in training: products with each slot's expert and their gradients, and those of router and weighted sum.
// Each thread computes some columns of every expert's product.

namespace ISA {

// Calls visit(expert, its slots, how many) for each expert.
template <class Visit>
static inline void each_expert(const Tensor& order, const Tensor& offsets, Visit visit) {
  const int32_t* at = offsets.as<int32_t>();
  for (int64_t e = 0; e + 1 < offsets.rows(); e++) visit(e, order.as<int32_t>() + at[e], static_cast<int64_t>(at[e + 1] - at[e]));
}

// y = x . w^T + bias of each slot's expert, or what `added` holds + x . w^T.
static void slots_by_weight(const Operands& o, const Worker& worker, const float* bias, const Tensor* added) {
  const Tensor &x = o.in(0), &w = o.in(1), &order = o.in(2), &offsets = o.in(3), &y = o.out(0);
  const int64_t n = w.dims[1], k = w.dims[2], slots = static_cast<int64_t>(o.params[0]);
  Range columns;
  worker.share(n, TILE_B, columns.begin, columns.end);
  if (added) copy_part(*added, y, {0, y.rows()}, columns);
  with_numbers(x, [&](auto* data) {
    using X = std::remove_pointer_t<decltype(data)>;
    each_expert(order, offsets, [&](int64_t e, const int32_t* slot, int64_t rows) {
      const Target target{y.as<float>(), n, added != nullptr, bias ? bias + e * n : nullptr, slot};
      with_weight<true, X>(w, e, 0, [&](auto unit, auto b) { multiply<decltype(unit)>(Along<X>{{data, k, slot, slots}}, b, {0, rows}, columns, k, target, worker); });
    });
  });
}

static void tiled_grouped_linear(const Operands& o, const Worker& worker) { slots_by_weight(o, worker, o.has(4) ? o.in(4).as<float>() : nullptr, nullptr); }
static void add_grouped_linear(const Operands& o, const Worker& worker) { slots_by_weight(o, worker, nullptr, &o.in(4)); }

static void grouped_linear_t(const Operands& o, const Worker& worker) {
  const Tensor &dy = o.in(0), &w = o.in(1), &order = o.in(2), &offsets = o.in(3), &dx = o.out(0);
  const int64_t n = w.dims[1], k = w.dims[2], slots = static_cast<int64_t>(o.params[0]);
  Range columns;
  worker.share(k, TILE_B, columns.begin, columns.end);
  for (int64_t r = 0; r < dx.rows(); r++)
    for (int64_t c = columns.begin; c < columns.end; c++) dx.as<float>()[r * k + c] = 0;
  with_numbers(dy, [&](auto* data) {
    using X = std::remove_pointer_t<decltype(data)>;
    each_expert(order, offsets, [&](int64_t e, const int32_t* slot, int64_t rows) {
      const Target target{dx.as<float>(), k, true, nullptr, slot, slots};
      with_weight<false, X>(w, e, 0, [&](auto unit, auto b) { multiply<decltype(unit)>(Along<X>{{data, n, slot}}, b, {0, rows}, columns, n, target, worker); });
    });
  });
}

static void grouped_outer(const Operands& o, const Worker& worker) {
  const Tensor &dy = o.in(0), &x = o.in(1), &order = o.in(2), &offsets = o.in(3), &dw = o.out(0);
  const int64_t n = dw.dims[1], k = dw.dims[2], slots = static_cast<int64_t>(o.params[0]);
  Range rows, columns;
  part_of(n, k, worker, rows, columns);
  with_numbers(dy, [&](auto* data) {
    using X = std::remove_pointer_t<decltype(data)>;
    using U = std::conditional_t<sizeof(X) == 2, Halves, Floats>;
    each_expert(order, offsets, [&](int64_t e, const int32_t* slot, int64_t count) {
      multiply<U>(Across<X>{{data, n, slot}}, Across<X>{{x.as<X>(), k, slot, slots}}, rows, columns, count, Target{dw.as<float>() + e * n * k, k}, worker);
    });
  });
}

static void grouped_sum_rows(const Operands& o, const Worker& worker) {
  const Tensor &dy = o.in(0), &order = o.in(1), &offsets = o.in(2), &db = o.out(0);
  const int64_t n = dy.dims[1];
  int64_t begin, end;
  worker.share(n, 16, begin, end);
  each_expert(order, offsets, [&](int64_t e, const int32_t* slot, int64_t rows) {
    sum_rows_of(rows, begin, end, db.as<float>() + e * n, [&](int64_t i) { return dy.as<float>() + slot[i] * n; });
  });
}

// w_j = p_j / max(S, norm_min), S the sum of the chosen p: dp_j = (dw_j - sum_i dw_i w_i) / S, or dw_j / norm_min if S is smaller;
// then the softmax: dl_e = p_e (dp_e - sum_j p_j dp_j).
static void route_grad(const Operands& o, const Worker& worker) {
  const Tensor &d_weights = o.in(0), &logits = o.in(1), &experts = o.in(2), &weights = o.in(3), &d_logits = o.out(0);
  const int64_t count = logits.dims[1], k = weights.dims[1];
  const float norm_min = static_cast<float>(o.params[0]);
  for (int64_t r = worker.index; r < logits.rows(); r += worker.count) {
    const float *l = logits.as<float>() + r * count, *dw = d_weights.as<float>() + r * k, *w = weights.as<float>() + r * k;
    const int32_t* chosen = experts.as<int32_t>() + r * k;
    float* d = d_logits.as<float>() + r * count;
    float top = l[0], total = 0, kept = 0, shared = 0, mean = 0;
    for (int64_t e = 1; e < count; e++) top = max(top, l[e]);
    for (int64_t e = 0; e < count; e++) total += d[e] = expf(l[e] - top);
    for (int64_t e = 0; e < count; e++) d[e] /= total;  // p
    for (int64_t j = 0; j < k; j++) kept += d[chosen[j]];
    if (kept > norm_min)
      for (int64_t j = 0; j < k; j++) shared += dw[j] * w[j];
    const float divisor = max(kept, norm_min);
    for (int64_t j = 0; j < k; j++) mean += d[chosen[j]] * ((dw[j] - shared) / divisor);
    for (int64_t e = 0; e < count; e++) {
      float dp = 0;
      for (int64_t j = 0; j < k; j++) dp = chosen[j] == e ? (dw[j] - shared) / divisor : dp;
      d[e] *= dp - mean;
    }
  }
}

// slots[r, j] = weights[r, j] * dy[r]
static void spread(const Operands& o, const Worker& worker) {
  const Tensor &dy = o.in(0), &weights = o.in(1), &slots = o.out(0);
  const int64_t n = dy.dims[1], k = weights.dims[1];
  for (int64_t s = worker.index; s < slots.rows(); s += worker.count) {
    const float by = weights.as<float>()[s], *from = dy.as<float>() + s / k * n;
    float* to = slots.as<float>() + s * n;
    for (int64_t i = 0; i < n; i++) to[i] = by * from[i];
  }
}

static inline float dot_of(const float* a, const float* b, int64_t n) {
  vf total = {}, more = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) total += load(a + i) * load(b + i), more += load(a + i + W) * load(b + i + W);
  for (; i + W <= n; i += W) total += load(a + i) * load(b + i);
  float rest = sum(total + more);
  for (; i < n; i++) rest += a[i] * b[i];
  return rest;
}

static void slot_dots(const Operands& o, const Worker& worker) {
  const Tensor &dy = o.in(0), &slots = o.in(1), &d_weights = o.out(0);
  const int64_t n = dy.dims[1], k = d_weights.dims[1];
  for (int64_t s = worker.index; s < slots.rows(); s += worker.count) d_weights.as<float>()[s] = dot_of(dy.as<float>() + s / k * n, slots.as<float>() + s * n, n);
}

}  // namespace ISA
