// Cross-entropy over a vocabulary and its gradient, without storing logits: each thread computes those of LOSS_IDS ids at a time in its
// scratch. A head may have an adapter's branch. Then clipping and the optimiser's updates.

namespace ISA {

constexpr int64_t LOSS_ROWS = 1024;  // rows with a label that are computed together; a multiple of DEPTH, so that sums run in the same blocks
#ifdef HAS_AMX
constexpr int64_t LOSS_IDS = 2 * DEPTH;  // fast products are worth fewer passes over activations and gradients
#else
constexpr int64_t LOSS_IDS = DEPTH;  // of which a thread computes the logits at a time
#endif

// What a thread keeps in its scratch: logits [LOSS_ROWS, LOSS_IDS], the rows that have a label, and three numbers for each of them.
struct LossScratch {
  float logits[LOSS_ROWS * LOSS_IDS];
  int32_t rows[LOSS_ROWS];
  float top[LOSS_ROWS], total[LOSS_ROWS], label[LOSS_ROWS];
  double sums[LOSS_ROWS];
};
static_assert(sizeof(LossScratch) <= SPARE_FLOATS * 4);
static LossScratch& loss_scratch(const Worker& worker, int thread) { return *reinterpret_cast<LossScratch*>(spare(worker, thread)); }

struct Head {
  const Tensor &x, &weight, &labels;
  const float* bias;
  const Tensor *low = nullptr, *up = nullptr;  // an adapter's branch: low [rows, rank] and its second matrix [vocab, rank]
  int64_t rank() const { return up ? up->dims[1] : 0; }
  int64_t k() const { return weight.dims[1]; }
  int64_t vocab() const { return weight.dims[0]; }

  // Collects up to LOSS_ROWS rows that have a label, from `row` on, which moves behind them; returns their number.
  int64_t collect(int64_t& row, int32_t* rows, const Worker& worker) const {
    int64_t count = 0;
    for (; row < x.rows() && count < LOSS_ROWS; row++) {
      const int32_t label = labels.as<int32_t>()[row];
      if (label >= vocab()) worker.fail("label %lld is outside the vocabulary of %lld", label, vocab());
      else if (label >= 0) rows[count++] = static_cast<int32_t>(row);
    }
    return count;
  }

  // logits [count, LOSS_IDS] of the ids from `begin` on.
  void logits(const int32_t* rows, int64_t count, Range ids, float* to, const Worker& worker) const {
    const Target target{to, LOSS_IDS, false, bias ? bias + ids.begin : nullptr};
    with_numbers(x, [&](auto* data) {
      using X = std::remove_pointer_t<decltype(data)>;
      with_weight<true, X>(weight, 0, ids.begin, [&](auto unit, auto b) {
        multiply<decltype(unit)>(Along<X>{{data, k(), rows}}, b, {0, count}, {0, ids.end - ids.begin}, k(), target, worker);
      });
    });
    if (!up) return;
    with_weight<true, float>(*up, 0, ids.begin, [&](auto unit, auto b) {
      const Target more{to, LOSS_IDS, true};
      multiply<decltype(unit)>(Along<float>{{low->as<float>(), rank(), rows}}, b, {0, count}, {0, ids.end - ids.begin}, rank(), more, worker);
    });
  }

  // The ids of which a thread computes the logits, when all threads together are at `at`.
  Range ids_of(int64_t at, int thread) const {
    const int64_t begin = min(vocab(), at + thread * LOSS_IDS);
    return {begin, min(vocab(), begin + LOSS_IDS)};
  }
};

static void cross_entropy_of(const Head& head, const Operands& o, const Worker& worker) {
  const int32_t* labels = head.labels.as<int32_t>();
  float *losses = o.out(0).as<float>(), *logsumexp = o.out(1).as<float>();
  LossScratch& own = loss_scratch(worker, worker.index);
  int64_t begin, end;
  worker.share(head.x.rows(), 16, begin, end);
  for (int64_t r = begin; r < end; r++) losses[r] = logsumexp[r] = 0;
  worker.wait();
  for (int64_t row = 0; row < head.x.rows();) {
    const int64_t count = head.collect(row, own.rows, worker);
    worker.share(count, 16, begin, end);
    // The running maximum, sum and label's logit of this thread's share of the rows.
    float tops[LOSS_ROWS], picked[LOSS_ROWS];
    for (int64_t i = begin; i < end; i++) tops[i] = -INFINITY, own.sums[i] = 0;
    for (int64_t at = 0; at < head.vocab(); at += LOSS_IDS * worker.count) {
      const Range ids = head.ids_of(at, worker.index);
      if (ids.begin < ids.end) head.logits(own.rows, count, ids, own.logits, worker);
      const int64_t n = ids.end - ids.begin;
      for (int64_t i = 0; i < count && n; i++) {
        const float* l = own.logits + i * LOSS_IDS;
        const float top = largest_of(l, n);
        float rest = 0;
        vf sums = {};
        int64_t j = 0;
        for (; j + W <= n; j += W) sums += exp(load(l + j) - top);
        for (; j < n; j++) rest += exp(l[j] - top);
        own.top[i] = top;
        own.total[i] = sum(sums) + rest;
        const int64_t label = labels[own.rows[i]] - ids.begin;
        if (label >= 0 && label < n) own.label[i] = l[label];
      }
      worker.wait();
      for (int t = 0; t < worker.count; t++) {
        const Range theirs = head.ids_of(at, t);
        if (theirs.begin == theirs.end) continue;
        const LossScratch& other = loss_scratch(worker, t);
        for (int64_t i = begin; i < end; i++) {
          const float top = max(tops[i], other.top[i]);
          const double kept = at || t ? static_cast<double>(exp(tops[i] - top)) : 0;
          own.sums[i] = own.sums[i] * kept + static_cast<double>(other.total[i]) * static_cast<double>(exp(other.top[i] - top));
          tops[i] = top;
          const int32_t label = labels[own.rows[i]];
          if (label >= theirs.begin && label < theirs.end) picked[i] = other.label[i];
        }
      }
      worker.wait();
    }
    for (int64_t i = begin; i < end; i++) {
      const float lse = tops[i] + static_cast<float>(log(own.sums[i]));
      logsumexp[own.rows[i]] = lse;
      losses[own.rows[i]] = lse - picked[i];
    }
  }
}

static void cross_entropy(const Operands& o, const Worker& worker) {
  cross_entropy_of({o.in(0), o.in(1), o.in(2), o.has(3) ? o.in(3).as<float>() : nullptr}, o, worker);
}

static void adapted_cross_entropy(const Operands& o, const Worker& worker) {
  cross_entropy_of({o.in(0), o.in(1), o.in(2), o.has(5) ? o.in(5).as<float>() : nullptr, &o.in(3), &o.in(4)}, o, worker);
}

// Gradients of a branch's low [rows, rank], if the head has one, and of the second matrix [vocab, rank].
struct BranchGradients {
  float *low, *up;
};

static void cross_entropy_grad_of(const Head& head, const Operands& o, float* d_head, float* d_bias, BranchGradients branch, const Worker& worker) {
  const Tensor &dy = o.in(0), &logsumexp = o.in(4), &dx = o.out(0);
  const int64_t k = head.k();
  LossScratch& own = loss_scratch(worker, worker.index);
  int64_t begin, end;
  worker.share(dx.rows(), 1, begin, end);
  __builtin_memset(dx.as<float>() + begin * k, 0, static_cast<size_t>((end - begin) * k) * 4);
  if (branch.low) __builtin_memset(branch.low + begin * head.rank(), 0, static_cast<size_t>((end - begin) * head.rank()) * 4);
  worker.wait();
  int64_t row = 0;
  bool first = true;
  do {
    const int64_t count = head.collect(row, own.rows, worker);
    Range rows, columns;
    part_of(count, k, worker, rows, columns);
    for (int64_t at = 0; at < head.vocab(); at += LOSS_IDS * worker.count) {
      const Range ids = head.ids_of(at, worker.index);
      const int64_t n = ids.end - ids.begin;
      if (n) head.logits(own.rows, count, ids, own.logits, worker);
      for (int64_t i = 0; i < count && n; i++) {
        const int64_t r = own.rows[i], label = head.labels.as<int32_t>()[r] - ids.begin;
        float* l = own.logits + i * LOSS_IDS;
        const float by = dy.as<float>()[r], lse = logsumexp.as<float>()[r];
        int64_t j = 0;
        for (; j + W <= n; j += W) store(l + j, exp(load(l + j) - lse) * by);
        for (; j < n; j++) l[j] = exp(l[j] - lse) * by;
        if (label >= 0 && label < n) l[label] -= by;
      }
      if (d_bias && n)
        for (int64_t j = 0; j < n; j++) {
          float total = first ? 0.f : d_bias[ids.begin + j];
          for (int64_t i = 0; i < count; i++) total += own.logits[i * LOSS_IDS + j];
          d_bias[ids.begin + j] = total;
        }
      if (branch.low) {  // before the logits' gradients are rounded, if they are
        const int64_t rank = head.rank();
        if (n) multiply<Floats>(Across<float>{{own.logits, LOSS_IDS}}, Across<float>{{head.low->as<float>(), rank, own.rows}}, {0, n}, {0, rank}, count, {branch.up + ids.begin * rank, rank, !first}, worker);
        worker.wait();
        Range its_rows, ranks;
        part_of(count, rank, worker, its_rows, ranks);
        for (int t = 0; t < worker.count; t++) {
          const Range theirs = head.ids_of(at, t);
          if (theirs.begin == theirs.end) continue;
          const Along<float> d{{loss_scratch(worker, t).logits, LOSS_IDS}};
          const Target target{branch.low, rank, true, nullptr, own.rows};
          with_weight<false, float>(*head.up, 0, theirs.begin, [&](auto unit, auto b) { multiply<decltype(unit)>(d, b, its_rows, ranks, theirs.end - theirs.begin, target, worker); });
        }
        worker.wait();
      }
      with_numbers(head.x, [&](auto* data) {
        using X = std::remove_pointer_t<decltype(data)>;
        using U = std::conditional_t<sizeof(X) == 2, Halves, Floats>;
        constexpr int64_t stride = LOSS_IDS * 4 / static_cast<int64_t>(sizeof(X));
        if constexpr (sizeof(X) == 2)  // in place: a row's bfloat16 numbers are not longer than its floats
          for (int64_t i = 0; i < count; i++) halve(own.logits + i * LOSS_IDS, n);
        if (d_head && n) {
          const Target target{d_head + ids.begin * k, k, !first};
          multiply<U>(Across<X>{{reinterpret_cast<X*>(own.logits), stride}}, Across<X>{{data, k, own.rows}}, {0, n}, {0, k}, count, target, worker);
        }
        worker.wait();
        for (int t = 0; t < worker.count; t++) {
          const Range theirs = head.ids_of(at, t);
          if (theirs.begin == theirs.end) continue;
          const Along<X> d{{reinterpret_cast<X*>(loss_scratch(worker, t).logits), stride}};
          const Target target{dx.as<float>(), k, true, nullptr, own.rows};
          with_weight<false, X>(head.weight, 0, theirs.begin, [&](auto unit, auto b) { multiply<decltype(unit)>(d, b, rows, columns, theirs.end - theirs.begin, target, worker); });
        }
      });
      worker.wait();
    }
    first = false;
  } while (row < head.x.rows());
}

static void cross_entropy_grad(const Operands& o, const Worker& worker) {
  const Head head{o.in(1), o.in(2), o.in(3), o.has(5) ? o.in(5).as<float>() : nullptr};
  float* d_head = o.outputs > 1 ? o.out(1).as<float>() : nullptr;
  float* d_bias = o.outputs > 2 ? o.out(2).as<float>() : nullptr;
  cross_entropy_grad_of(head, o, d_head, d_bias, {}, worker);
}

static void adapted_cross_entropy_grad(const Operands& o, const Worker& worker) {
  const Head head{o.in(1), o.in(2), o.in(3), o.has(7) ? o.in(7).as<float>() : nullptr, &o.in(5), &o.in(6)};
  cross_entropy_grad_of(head, o, nullptr, nullptr, {o.out(1).as<float>(), o.out(2).as<float>()}, worker);
}

// The L2 norm of all inputs. Threads sum pieces of all numbers in a row, whose size depends only on how many numbers there are;
// the first thread adds up the pieces.
static void norm(const Operands& o, const Worker& worker) {
  constexpr int64_t most = 4096;
  int64_t all = 0;
  for (int t = 0; t < o.inputs; t++) all += o.in(t).rows() * o.in(t).width();
  int64_t size = (all + most - 1) / most;
  if (size < 65536) size = 65536;
  double* pieces = reinterpret_cast<double*>(worker.scratch_of(0));
  const int64_t count = (all + size - 1) / size;
  int64_t before = 0;
  for (int64_t p = worker.index; p < count; p += worker.count) pieces[p] = 0;
  worker.wait();
  for (int t = 0; t < o.inputs; t++) {
    const int64_t n = o.in(t).rows() * o.in(t).width();
    const float* x = o.in(t).as<float>();
    for (int64_t p = before / size; p * size < before + n; p++) {
      if (p % worker.count != worker.index) continue;
      const int64_t begin = p * size > before ? p * size - before : 0, end = min(n, (p + 1) * size - before);
      double total = 0;
      for (int64_t i = begin; i < end; i += 4096) {
        const float part = dot_of(x + i, x + i, min(4096, end - i));
        total += static_cast<double>(part);
      }
      pieces[p] += total;
    }
    before += n;
  }
  worker.wait();
  if (worker.index) return;
  double total = 0;
  for (int64_t p = 0; p < count; p++) total += pieces[p];
  *o.out(0).as<float>() = static_cast<float>(__builtin_sqrt(total));
}

static void clip(const Operands& o, const Worker& worker) {
  if (worker.index) return;
  const float factor = static_cast<float>(o.params[0]) / (*o.in(0).as<float>() + 1e-6f);
  *o.out(0).as<float>() = factor > 1 ? 1.f : factor;  // NaN stays
}

enum { LEARNING_RATE, BETA1, BETA2, EPS, WEIGHT_DECAY, BIAS1, BIAS2 };

static void adamw(const Operands& o, const Worker& worker) {
  float *parameter = o.in(0).as<float>(), *m = o.in(2).as<float>(), *v = o.in(3).as<float>();
  const float *gradient = o.in(1).as<float>(), *rates = o.in(4).as<float>(), factor = o.has(5) ? *o.in(5).as<float>() : 1.f;
  const float beta1 = rates[BETA1], beta2 = rates[BETA2], rest1 = 1 - beta1, rest2 = 1 - beta2, eps = rates[EPS];
  const float kept = 1 - rates[LEARNING_RATE] * rates[WEIGHT_DECAY], by = rates[LEARNING_RATE] / rates[BIAS1], inverse2 = 1 / rates[BIAS2];
  int64_t i, end;
  my_share(o.in(0), worker, i, end);
#pragma GCC ivdep
  for (; i < end; i++) {
    const float g = gradient[i] * factor;
    m[i] = beta1 * m[i] + rest1 * g;
    v[i] = beta2 * v[i] + rest2 * g * g;
    parameter[i] = parameter[i] * kept - by * (m[i] / (__builtin_sqrtf(v[i] * inverse2) + eps));
  }
}

// The same with moments in dynamic 8-bit numbers (native/dynamic.h), a block at a time: the update uses the new moments before they are
// rounded.
static void adamw8bit(const Operands& o, const Worker& worker) {
  using dynamic::BLOCK;
  const Tensor& state = o.in(0);
  uint8_t *m_codes = o.in(2).as<uint8_t>(), *v_codes = o.in(3).as<uint8_t>();
  float *m_scales = o.in(4).as<float>(), *v_scales = o.in(5).as<float>();
  const float *rates = o.in(6).as<float>(), factor = o.has(7) ? *o.in(7).as<float>() : 1.f;
  const float beta1 = rates[BETA1], beta2 = rates[BETA2], rest1 = 1 - beta1, rest2 = 1 - beta2, eps = rates[EPS];
  const float kept = 1 - rates[LEARNING_RATE] * rates[WEIGHT_DECAY], by = rates[LEARNING_RATE] / rates[BIAS1], inverse2 = 1 / rates[BIAS2];
  const int64_t n = state.rows() * state.width();
  int64_t begin, end;
  worker.share(n, BLOCK, begin, end);
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t count = min(BLOCK, end - at), block = at / BLOCK;
    float *parameter = state.as<float>() + at, m[BLOCK], v[BLOCK];
    const float* gradient = o.in(1).as<float>() + at;
    for (int64_t i = 0; i < count; i++) {
      m[i] = m_scales[block] * dynamic::SIGNED_VALUES.of[m_codes[at + i]];
      v[i] = v_scales[block] * dynamic::UNSIGNED.levels[v_codes[at + i]];
    }
    float top_m = 0, top_v = 0;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) {
      const float g = gradient[i] * factor;
      m[i] = beta1 * m[i] + rest1 * g;
      v[i] = beta2 * v[i] + rest2 * g * g;
      parameter[i] = parameter[i] * kept - by * (m[i] / (__builtin_sqrtf(v[i] * inverse2) + eps));
    }
    for (int64_t i = 0; i < count; i++) {
      top_m = max(m[i] < 0 ? -m[i] : m[i], top_m);
      top_v = max(v[i], top_v);
    }
    m_scales[block] = top_m;
    v_scales[block] = top_v;
    const float by_m = top_m > 0 ? top_m : 1.f, by_v = top_v > 0 ? top_v : 1.f;
    for (int64_t i = 0; i < count; i++) {
      const int level = dynamic::SIGNED.nearest((m[i] < 0 ? -m[i] : m[i]) / by_m), lower = level < 127 ? level : 127;
      m_codes[at + i] = static_cast<uint8_t>(127 + (m[i] < 0 ? -lower : level));
      v_codes[at + i] = static_cast<uint8_t>(dynamic::UNSIGNED.nearest(v[i] / by_v));
    }
  }
}

// A state += a gradient.
static void accumulate(const Operands& o, const Worker& worker) {
  float* total = o.in(0).as<float>();
  int64_t begin, end;
  my_share(o.in(0), worker, begin, end);
  add_numbers(total + begin, o.in(1).as<float>() + begin, total + begin, end - begin);
}

// A state = zeros.
static void clear(const Operands& o, const Worker& worker) {
  int64_t begin, end;
  my_share(o.in(0), worker, begin, end);
  __builtin_memset(o.in(0).as<float>() + begin, 0, static_cast<size_t>(end - begin) * 4);
}

}  // namespace ISA
