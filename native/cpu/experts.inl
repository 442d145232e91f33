// The mixture of experts: the router, grouping of tokens by expert, each expert's products, and their weighted sum.

namespace ISA {

constexpr int64_t MAX_EXPERTS = 4096;

static void choose(const float* logits, const float* bias, int64_t count, int64_t k, float norm_min, int32_t* experts, float* weights) {
  float p[MAX_EXPERTS];
  float top = logits[0], total = 0;
  for (int64_t e = 1; e < count; e++) top = max(top, logits[e]);
  for (int64_t e = 0; e < count; e++) total += p[e] = expf(logits[e] - top);
  for (int64_t e = 0; e < count; e++) p[e] /= total;
  float kept = 0;
  for (int64_t j = 0; j < k; j++) {
    int64_t best = -1;
    float best_score = 0;
    for (int64_t e = 0; e < count; e++) {
      bool taken = false;
      for (int64_t i = 0; i < j; i++) taken |= experts[i] == e;
      if (taken) continue;
      const float score = p[e] + bias[e];
      if (best < 0 || score > best_score) best = e, best_score = score;
    }
    experts[j] = static_cast<int32_t>(best);
    weights[j] = p[best];
    kept += weights[j];
  }
  for (int64_t j = 0; j < k; j++) weights[j] /= max(kept, norm_min);
}

static void route(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &gate = o.in(1), &bias = o.in(2), &logits = o.out(0), &experts = o.out(1), &weights = o.out(2);
  const int64_t count = gate.dims[0], hidden = gate.dims[1], k = experts.dims[1];
  if (count > MAX_EXPERTS) return worker.fail("route: %lld experts exceed %lld", count, MAX_EXPERTS);
  // Split many rows between the threads; for a few rows, split the experts.
  const bool by_rows = x.rows() >= 4 * worker.count;
  using F = RowMajor<float, float>;
  int64_t begin, end, first = 0, last = count;
  worker.share(x.rows(), 1, begin, end);
  if (!by_rows) worker.share(count, 4, first, last);
  const int64_t r0 = by_rows ? begin : 0, rows = by_rows ? end - begin : x.rows();
  panel<F>(gate.data, first, last, hidden, rows, [&](int64_t r) { return x.as<float>() + (r0 + r) * hidden; },
           [&](int64_t r) { return logits.as<float>() + (r0 + r) * count; }, nullptr);
  if (!by_rows) worker.wait();
  for (int64_t r = begin; r < end; r++)
    choose(logits.as<float>() + r * count, bias.as<float>(), count, k, static_cast<float>(o.params[1]), experts.as<int32_t>() + r * k, weights.as<float>() + r * k);
}

static void group(const Operands& o, const Worker& worker) {
  if (worker.index) return;
  const Tensor &experts = o.in(0), &order = o.out(0), &offsets = o.out(1);
  const int64_t slots = order.rows(), count = offsets.rows() - 1;
  int32_t* at = offsets.as<int32_t>();
  for (int64_t e = 0; e <= count; e++) at[e] = 0;
  for (int64_t s = 0; s < slots; s++) at[experts.as<int32_t>()[s]]++;
  for (int64_t e = 0, start = 0; e <= count; e++) {
    const int32_t n = at[e];
    at[e] = static_cast<int32_t>(start);
    start += n;
  }
  // Filling advances each start to the next one's place; an expert's slots keep their order.
  for (int64_t s = 0; s < slots; s++) order.as<int32_t>()[at[experts.as<int32_t>()[s]]++] = static_cast<int32_t>(s);
  for (int64_t e = count; e > 0; e--) at[e] = at[e - 1];
  at[0] = 0;
}

// A thread's share of one expert: weight rows [begin, end) times `rows` slots.
struct ExpertShare {
  int64_t expert = -1, begin = 0, end = 0, rows = 0;
  const int32_t* slots = nullptr;
};

// Calls visit(share, next) for this thread's share of a product with one expert per slot; `next` is the share after it, or has
// no expert. All tiles are laid end to end, each as long as its expert has rows, and each thread takes an equal stretch.
template <class Visit>
static inline void share_experts(const Tensor& order, const Tensor& offsets, int64_t n, int tile, const Worker& worker, Visit visit) {
  const int64_t experts = offsets.rows() - 1, tiles = (n + tile - 1) / tile, work = tiles * order.rows();
  const int32_t *at = offsets.as<int32_t>(), *slot = order.as<int32_t>();
  const int64_t from = work * worker.index / worker.count, to = work * (worker.index + 1) / worker.count;
  ExpertShare last;
  for (int64_t e = 0; e < experts; e++) {
    const int64_t rows = at[e + 1] - at[e], start = at[e] * tiles;
    if (!rows || start >= to) continue;
    // A tile belongs to the thread whose stretch contains its start.
    auto first_tile = [&](int64_t edge) { return edge <= start ? 0 : min(tiles, (edge - start + rows - 1) / rows); };
    const int64_t begin = first_tile(from) * tile, end = min(first_tile(to) * tile, n);
    if (begin >= end) continue;
    const ExpertShare share{e, begin, end, rows, slot + at[e]};
    if (last.expert >= 0) visit(last, share);
    last = share;
  }
  if (last.expert >= 0) visit(last, ExpertShare{});
}

static void grouped_linear(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &w = o.in(1), &order = o.in(2), &offsets = o.in(3), &y = o.out(0);
  const float* bias = o.has(4) ? o.in(4).as<float>() : nullptr;
  const int64_t n = w.dims[1], k = w.dims[2], slots = static_cast<int64_t>(o.params[0]);
  with_format(w, [&](auto format) {
    using F = decltype(format);
    share_experts(order, offsets, n, F::tile, worker, [&](const ExpertShare& s, const ExpertShare& next) {
      if (next.expert >= 0) fetch_head(weight_row<F>(w.parts[next.expert], next.begin, k));
      panel<F>(w.parts[s.expert], s.begin, s.end, k, s.rows,
               [&](int64_t r) { return reinterpret_cast<const typename F::X*>(x.as<int8_t>() + s.slots[r] / slots * F::x_bytes(k)); },
               [&](int64_t r) { return y.as<float>() + s.slots[r] * n; }, bias ? bias + s.expert * n : nullptr);
    });
  });
}

static void grouped_gated_linear(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &gate = o.in(1), &up = o.in(2), &order = o.in(3), &offsets = o.in(4), &y = o.out(0);
  const int64_t n = gate.dims[1], k = gate.dims[2], slots = static_cast<int64_t>(o.params[0]);
  with_format(gate, [&](auto format) {
    using F = decltype(format);
    share_experts(order, offsets, n, F::tile, worker, [&](const ExpertShare& s, const ExpertShare& next) {
      gated_panel<F>(gate.parts[s.expert], up.parts[s.expert], s.begin, s.end, k, s.rows,
                     [&](int64_t r) { return reinterpret_cast<const typename F::X*>(x.as<int8_t>() + s.slots[r] / slots * F::x_bytes(k)); },
                     [&](int64_t r) { return y.as<float>() + s.slots[r] * n; },
                     next.expert >= 0 ? weight_row<F>(gate.parts[next.expert], next.begin, k) : nullptr);
    });
  });
}

static void combine(const Operands& o, const Worker& worker) {
  const Tensor &slots = o.in(0), &weights = o.in(1), &y = o.out(0);
  const int64_t n = y.dims[1], k = weights.dims[1];
  int64_t begin, end;
  worker.share(y.rows() * n, 64, begin, end);
  for (int64_t i = begin; i < end;) {
    const int64_t r = i / n, stop = min(end, (r + 1) * n);
    const float* w = weights.as<float>() + r * k;
    for (; i + W <= stop; i += W) {
      const float* s = slots.as<float>() + r * k * n + i % n;
      vf total = {};
      for (int64_t j = 0; j < k; j++) total += w[j] * load(s + j * n);
      store(y.as<float>() + i, total);
    }
    for (; i < stop; i++) {
      const float* s = slots.as<float>() + r * k * n + i % n;
      float total = 0;
      for (int64_t j = 0; j < k; j++) total += w[j] * s[j * n];
      y.as<float>()[i] = total;
    }
  }
}

}  // namespace ISA
