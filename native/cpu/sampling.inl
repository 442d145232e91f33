// From logits to a token: processors in the order of Hugging Face transformers, then sampling. One row per thread.

namespace ISA {

using namespace sampling;  // the columns of the controls

// Whether token a ranks before token b: by larger logit, ties by lower id.
struct Before {
  const float* x;
  bool operator()(int32_t a, int32_t b) const { return x[a] > x[b] || (x[a] == x[b] && a < b); }
};
struct After {
  const float* x;
  bool operator()(int32_t a, int32_t b) const { return Before{x}(b, a); }
};

// Sifts heap[i] down; `above` says which of two tokens is nearer to the top.
template <class Above>
static void sift(Above above, int32_t* heap, int64_t n, int64_t i) {
  const int32_t moving = heap[i];
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && above(heap[child + 1], heap[child])) child++;
    if (!above(heap[child], moving)) break;
    heap[i] = heap[child];
  }
  heap[i] = moving;
}

// `seen` is scratch with one number per token.
static void penalize(float* x, int64_t vocab, const int32_t* history, const float* f, const int32_t* n, int32_t* seen) {
  const int64_t count = n[HISTORY_COUNT];
  const bool repetition = f[REPETITION] != 1, presence = f[PRESENCE] != 0 || f[FREQUENCY] != 0;
  if (repetition || presence)
    for (int64_t i = 0; i < vocab; i++) seen[i] = 0;
  for (int64_t i = 0; i < count && (repetition || presence); i++) {
    const int32_t id = history[i];
    if (id < 0 || id >= vocab) continue;
    if (repetition && !(seen[id] & 1)) x[id] = x[id] < 0 ? x[id] * f[REPETITION] : x[id] / f[REPETITION];
    seen[id] |= 1;
  }
  for (int64_t i = n[PROMPT_COUNT]; i < count && presence; i++) {  // only generated tokens
    const int32_t id = history[i];
    if (id < 0 || id >= vocab) continue;
    x[id] -= f[FREQUENCY] + (seen[id] & 2 ? 0 : f[PRESENCE]);
    seen[id] |= 2;
  }
  const int64_t size = n[NGRAM];
  if (size < 1 || count + 1 < size) return;
  for (int64_t i = 0; i + size <= count; i++) {
    bool same = true;
    for (int64_t j = 0; j < size - 1 && same; j++) same = history[i + j] == history[count - size + 1 + j];
    const int32_t id = history[i + size - 1];
    if (same && id >= 0 && id < vocab) x[id] = -INFINITY;
  }
}

// A row's maximum.
static float top_of(const float* x, int64_t n) {
  vf tops = splat(-INFINITY);
  int64_t i = 0;
  for (; i + W <= n; i += W) tops = max(load(x + i), tops);
  float top = largest(tops);
  for (; i < n; i++) top = max(x[i], top);
  return top;
}

// Calls `visit` with the index of each number that passes `test`, in order, while it returns true. Skips whole blocks
// without such a number, which are the majority.
template <class Test, class Visit>
static void each_where(const float* x, int64_t n, Test test, Visit visit) {
  constexpr int64_t block = 4 * W;
  for (int64_t i = 0; i < n; i += block) {
    if (i + block <= n) {
      const vi any = test(load(x + i)) | test(load(x + i + W)) | test(load(x + i + 2 * W)) | test(load(x + i + 3 * W));
      if (sum(to_float(any)) == 0) continue;
    }
    for (int64_t j = i; j < min(i + block, n); j++)
      if (test(splat(x[j]))[0] && !visit(j)) return;
  }
}

// Index of the first maximum; 0 if all are NaN.
static int64_t argmax(const float* x, int64_t n) {
  const float top = top_of(x, n);
  int64_t best = 0;
  each_where(x, n, [&](vf v) { return v == splat(top); }, [&](int64_t i) {
    best = i;
    return false;
  });
  return best;
}

// Sum of e^(x - top) over a row.
static float exp_sum(const float* x, int64_t n, float top) {
  vf totals = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) totals += select(load(x + i) == splat(-INFINITY), vf{}, exp(load(x + i) - top));
  float total = sum(totals);
  for (; i < n; i++) total += x[i] == -INFINITY ? 0.f : exp(x[i] - top);
  return total;
}

// Successive guesses of how far below the maximum the kept numbers reach.
static constexpr float DEPTHS[] = {4, 8, 12, 18};

// A lower bound for the kept numbers: at least `count` numbers, or `mass` of the sum of e^(x - top), are not below it.
static float lowest_kept(const float* x, int64_t vocab, float top, int64_t count, float mass) {
  for (const float depth : DEPTHS) {
    const vf floor = splat(top - depth);
    vi counts = {};
    vf masses = {};
    int64_t i = 0;
    if (count)
      for (; i + W <= vocab; i += W) counts -= load(x + i) >= floor;
    else
      for (; i + W <= vocab; i += W) masses += select(load(x + i) >= floor, exp(load(x + i) - top), vf{});
    int64_t counted = static_cast<int64_t>(sum(to_float(counts)));  // a lane counts less than 2^24
    float found = sum(masses);
    for (; i < vocab; i++)
      if (x[i] >= top - depth) counted++, found += exp(x[i] - top);
    if (count ? counted >= count : found > mass) return top - depth;
  }
  return -INFINITY;
}

// Removes everything that top-k, top-p and min-p do not keep. `heap` is scratch with one id per token.
static void truncate(float* x, int64_t vocab, const float* f, const int32_t* n, int32_t* heap) {
  const bool top_k = n[TOP_K] > 0 && n[TOP_K] < vocab, top_p = f[TOP_P] < 1, min_p = f[MIN_P] > 0;
  if (!top_k && !top_p && !min_p) return;
  const float top = top_of(x, vocab);
  if (top == -INFINITY) return;
  float total = 0;
  if (top_p && !top_k) total = exp_sum(x, vocab, top);
  // First drop what cannot be kept, with a margin for rounding, so that the heap has hundreds of tokens instead of all.
  const float floor = top_k ? lowest_kept(x, vocab, top, n[TOP_K], 0) : top_p ? lowest_kept(x, vocab, top, 0, f[TOP_P] * total * 1.0001f) : top + logf(f[MIN_P]) - 0.001f;
  for (int64_t i = 0; i < vocab; i++) x[i] = x[i] >= floor ? x[i] : -INFINITY;
  int64_t size = 0;
  each_where(x, vocab, [](vf v) { return v > splat(-INFINITY); }, [&](int64_t i) {
    heap[size++] = static_cast<int32_t>(i);
    return true;
  });
  const Before before{x};
  for (int64_t i = size / 2; i-- > 0;) sift(before, heap, size, i);
  // Pop tokens off the heap, best first; popped tokens are stored after the heap's end, best last.
  int64_t taken = 0;
  auto take = [&] {
    const int32_t best = heap[0];
    heap[0] = heap[--size];
    if (size) sift(before, heap, size, 0);
    heap[size] = best;
    taken++;
  };
  const int64_t whole = size;
  if (top_k) {
    while (size && (taken < n[TOP_K] || x[heap[0]] == x[heap[whole - n[TOP_K]]])) take();  // ties with the k-th are kept, as in the reference
    for (int64_t i = whole - taken; i < whole; i++) total += exp(x[heap[i]] - top);
  } else if (top_p) {
    float sum = 0;
    while (size && (taken == 0 || sum < f[TOP_P] * total)) {
      sum += exp(x[heap[0]] - top);
      take();
    }
  } else {
    while (size && (taken == 0 || exp(x[heap[0]] - top) >= f[MIN_P])) take();
  }
  int64_t keep = taken;
  if (top_k && top_p) {
    float sum = 0;
    for (keep = 0; keep < taken && (keep == 0 || sum < f[TOP_P] * total); keep++) sum += exp(x[heap[whole - 1 - keep]] - top);
  }
  if (min_p)
    while (keep > 1 && exp(x[heap[whole - keep]] - top) < f[MIN_P]) keep--;
  // The last `keep` tokens of the list are kept; remove the others.
  for (int64_t i = 0; i < whole - keep; i++) x[heap[i]] = -INFINITY;
}

static void process_logits(const Operands& o, const Worker& worker) {
  const Tensor &logits = o.in(0), &y = o.out(0), &scratch = o.out(1);
  const int64_t vocab = logits.dims[1];
  for (int64_t r = worker.index; r < logits.rows(); r += worker.count) {
    const float* f = o.in(1).as<float>() + r * FLOATS;
    const int32_t* n = o.in(2).as<int32_t>() + r * INTS;
    const float* in = logits.as<float>() + r * vocab;
    float* x = y.as<float>() + r * vocab;
    for (int64_t i = 0; i < vocab; i++) x[i] = in[i];
    for (int64_t i = n[BIAS_START]; i < n[BIAS_START] + n[BIAS_COUNT]; i++) {
      const int32_t id = o.in(4).as<int32_t>()[i];
      if (id >= 0 && id < vocab) x[id] += o.in(5).as<float>()[i];
    }
    if (n[MASK] >= 0) {
      const Tensor& masks = o.in(6);
      if (n[MASK] >= masks.rows()) { worker.fail("internal: processLogits: mask %lld of %lld", n[MASK], masks.rows()); continue; }
      const uint32_t* allowed = masks.as<uint32_t>() + n[MASK] * masks.dims[1];
      for (int64_t i = 0; i < vocab; i += 32) {
        const uint32_t bits = allowed[i / 32];
        if (bits == ~0u) continue;
        for (int64_t j = i; j < min(i + 32, vocab); j++) x[j] = bits >> (j - i) & 1 ? x[j] : -INFINITY;
      }
    }
    penalize(x, vocab, o.in(3).as<int32_t>() + n[HISTORY_START], f, n, scratch.as<int32_t>() + r * vocab);
    if (f[TEMPERATURE] > 0) {
      for (int64_t i = 0; i < vocab; i++) x[i] /= f[TEMPERATURE];
      truncate(x, vocab, f, n, scratch.as<int32_t>() + r * vocab);
    }
  }
}

// A number in [0, 1) from a seed and a step (splitmix64).
static double random_number(uint64_t seed, uint64_t step) {
  uint64_t z = seed + (step + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// Draws with probability proportional to e^x: the token at which the running sum passes `share` (0 to 1) of the total. `top` is the maximum.
static int64_t draw(const float* x, int64_t vocab, float top, double share) {
  // Find the piece by the sums of pieces, then the token within it.
  constexpr int64_t pieces = 256;
  const int64_t length = (vocab + pieces * 4 * W - 1) / (pieces * 4 * W) * 4 * W;
  float sums[pieces];
  double total = 0;
  for (int64_t p = 0; p * length < vocab; p++) total += sums[p] = exp_sum(x + p * length, min(length, vocab - p * length), top);
  double left = total * share;
  int64_t piece = 0;
  for (int64_t p = 0; p * length < vocab; p++) {
    if (sums[p] == 0) continue;
    piece = p;
    if (left < sums[p]) break;
    left -= sums[p];
  }
  if (left >= sums[piece]) left = sums[piece];  // past the end because of rounding
  int64_t id = 0;
  each_where(x + piece * length, min(length, vocab - piece * length), [](vf v) { return v > splat(-INFINITY); }, [&](int64_t i) {
    id = piece * length + i;
    left -= exp(x[id] - top);
    return left >= 0;
  });
  return id;
}

static void sample(const Operands& o, const Worker& worker) {
  const Tensor &logits = o.in(0), &processed = o.in(1), &ids = o.out(0), &logprobs = o.out(1);
  const int64_t vocab = logits.dims[1];
  for (int64_t r = worker.index; r < logits.rows(); r += worker.count) {
    const float* f = o.in(2).as<float>() + r * FLOATS;
    const int32_t* n = o.in(3).as<int32_t>() + r * INTS;
    const float *raw = logits.as<float>() + r * vocab, *x = processed.as<float>() + r * vocab;
    if (!all_finite(raw, vocab)) {
      ids.as<int32_t>()[r] = -2;  // NOT_FINITE of src/graph/ops/sampling.ts
      logprobs.as<float>()[r] = -INFINITY;
      continue;
    }
    int64_t id = argmax(x, vocab);
    if (x[id] == -INFINITY) {  // nothing is allowed
      ids.as<int32_t>()[r] = -1;
      logprobs.as<float>()[r] = -INFINITY;
      continue;
    }
    if (f[TEMPERATURE] > 0) id = draw(x, vocab, x[id], random_number(static_cast<uint64_t>(static_cast<uint32_t>(n[SEED_HIGH])) << 32 | static_cast<uint32_t>(n[SEED_LOW]), static_cast<uint64_t>(n[STEP])));
    const float top = top_of(raw, vocab);
    ids.as<int32_t>()[r] = static_cast<int32_t>(id);
    logprobs.as<float>()[r] = raw[id] - top - logf(exp_sum(raw, vocab, top));
  }
}

// The k likeliest tokens of each row, best first, with their log-probabilities.
static void top_logprobs(const Operands& o, const Worker& worker) {
  const Tensor &logits = o.in(0), &ids = o.out(0), &logprobs = o.out(1);
  const int64_t vocab = logits.dims[1], k = ids.dims[1];
  if (k < 1 || k > vocab) return worker.fail("internal: topLogprobs: %lld of %lld tokens", k, vocab);
  for (int64_t r = worker.index; r < logits.rows(); r += worker.count) {
    const float* x = logits.as<float>() + r * vocab;
    int32_t* best = ids.as<int32_t>() + r * k;  // a heap with the worst of the k best on top
    const After after{x};
    for (int64_t i = 0; i < k; i++) best[i] = static_cast<int32_t>(i);
    for (int64_t i = k / 2; i-- > 0;) sift(after, best, k, i);
    each_where(x + k, vocab - k, [&](vf v) { return v > splat(x[best[0]]); }, [&](int64_t i) {
      best[0] = static_cast<int32_t>(k + i);
      sift(after, best, k, 0);
      return true;
    });
    for (int64_t size = k; size-- > 1;) {
      const int32_t worst = best[0];
      best[0] = best[size];
      best[size] = worst;
      sift(after, best, size, 0);
    }
    const float top = x[best[0]], norm = top + logf(exp_sum(x, vocab, top));
    for (int64_t i = 0; i < k; i++) logprobs.as<float>()[r * k + i] = x[best[i]] - norm;
  }
}

}  // namespace ISA
