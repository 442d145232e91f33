// The mixture of experts: the router, tokens grouped by expert, each expert's products, their weighted sum.

namespace ISA {

static void choose(const float* logits, const float* bias, int64_t count, int64_t k, float norm_min, int32_t* experts, float* weights) {
  // Probabilities are recomputed from the logits where they are needed: no scratch, and k is small.
  float top = logits[0], total = 0;
  for (int64_t e = 1; e < count; e++) top = max(top, logits[e]);
  for (int64_t e = 0; e < count; e++) total += expf(logits[e] - top);
  float kept = 0;
  for (int64_t j = 0; j < k; j++) {
    int64_t best = -1;
    float best_score = 0;
    for (int64_t e = 0; e < count; e++) {
      bool taken = false;
      for (int64_t i = 0; i < j; i++) taken |= experts[i] == e;
      if (taken) continue;
      const float score = expf(logits[e] - top) / total + bias[e];
      if (best < 0 || score > best_score) best = e, best_score = score;
    }
    experts[j] = static_cast<int32_t>(best);
    weights[j] = expf(logits[best] - top) / total;
    kept += weights[j];
  }
  for (int64_t j = 0; j < k; j++) weights[j] /= max(kept, norm_min);
}

static void route(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &gate = o.in(1), &bias = o.in(2), &logits = o.out(0), &experts = o.out(1), &weights = o.out(2);
  const int64_t count = gate.dims[0], hidden = gate.dims[1], k = experts.dims[1];
  for (int64_t r = worker.index; r < x.rows(); r += worker.count) {
    float* row = logits.as<float>() + r * count;
    panel<RowMajor<float, float>>(gate.data, 0, count, hidden, 1, [&](int64_t) { return x.as<float>() + r * hidden; }, [&](int64_t) { return row; }, nullptr);
    choose(row, bias.as<float>(), count, k, static_cast<float>(o.params[1]), experts.as<int32_t>() + r * k, weights.as<float>() + r * k);
  }
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
  // Filling moves each start to the next one's place; slots of an expert keep their order.
  for (int64_t s = 0; s < slots; s++) order.as<int32_t>()[at[experts.as<int32_t>()[s]]++] = static_cast<int32_t>(s);
  for (int64_t e = count; e > 0; e--) at[e] = at[e - 1];
  at[0] = 0;
}

static void grouped_linear(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &w = o.in(1), &order = o.in(2), &offsets = o.in(3), &y = o.out(0);
  const float* bias = o.has(4) ? o.in(4).as<float>() : nullptr;
  const int64_t experts = w.dims[0], n = w.dims[1], k = w.dims[2], slots = static_cast<int64_t>(o.params[0]);
  const int32_t *at = offsets.as<int32_t>(), *slot = order.as<int32_t>();
  with_format(w, [&](auto format) {
    using F = decltype(format);
    // Work is laid end to end, each expert's tiles as long as it has rows, and each thread takes an equal stretch.
    const int64_t tiles = (n + F::tile - 1) / F::tile, work = tiles * order.rows();
    const int64_t from = work * worker.index / worker.count, to = work * (worker.index + 1) / worker.count;
    for (int64_t e = 0; e < experts; e++) {
      const int64_t rows = at[e + 1] - at[e], start = at[e] * tiles;
      if (!rows || start >= to) continue;
      // A tile belongs to the thread in whose stretch it begins.
      auto first_tile = [&](int64_t edge) { return edge <= start ? 0 : min(tiles, (edge - start + rows - 1) / rows); };
      const int64_t begin = first_tile(from) * F::tile, end = min(first_tile(to) * F::tile, n);
      if (begin >= end) continue;
      const int32_t* mine = slot + at[e];
      panel<F>(w.parts[e], begin, end, k, rows, [&](int64_t r) { return reinterpret_cast<const typename F::X*>(x.as<int8_t>() + mine[r] / slots * F::x_bytes(k)); },
               [&](int64_t r) { return y.as<float>() + mine[r] * n; }, bias ? bias + e * n : nullptr);
    }
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
    for (; i < stop; i++) {
      const float* s = slots.as<float>() + r * k * n + i % n;
      float total = 0;
      for (int64_t j = 0; j < k; j++) total += w[j] * s[j * n];
      y.as<float>()[i] = total;
    }
  }
}

}  // namespace ISA
