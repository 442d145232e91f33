// From logits to a token: processors in the order of Hugging Face transformers, then the choice. One row a thread.

namespace ISA {

// Columns, as in src/graph/ops.ts.
enum { TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, FLOATS };
enum { TOP_K, NGRAM, SEED_LOW, SEED_HIGH, STEP, HISTORY_START, HISTORY_COUNT, PROMPT_COUNT, BIAS_START, BIAS_COUNT, MASK, INTS };

// Sifts heap[i] down; the heap has the largest logit on top, the lowest id first among equals.
static void sift(const float* x, int32_t* heap, int64_t n, int64_t i) {
  auto above = [&](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
  const int32_t moving = heap[i];
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && above(heap[child + 1], heap[child])) child++;
    if (!above(heap[child], moving)) break;
    heap[i] = heap[child];
  }
  heap[i] = moving;
}

// `seen` is scratch of one number for each token.
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
  for (int64_t i = n[PROMPT_COUNT]; i < count && presence; i++) {  // of the generated tokens only
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

// Leaves only what top-k, top-p and min-p keep. `heap` is scratch of one id for each token.
static void truncate(float* x, int64_t vocab, const float* f, const int32_t* n, int32_t* heap) {
  const bool top_k = n[TOP_K] > 0 && n[TOP_K] < vocab, top_p = f[TOP_P] < 1, min_p = f[MIN_P] > 0;
  if (!top_k && !top_p && !min_p) return;
  int64_t size = 0;
  for (int64_t i = 0; i < vocab; i++)
    if (x[i] != -INFINITY) heap[size++] = static_cast<int32_t>(i);
  if (!size) return;
  for (int64_t i = size / 2; i-- > 0;) sift(x, heap, size, i);
  const float top = x[heap[0]];
  float total = 0;
  if (top_p && !top_k) {
    vf totals = {};
    int64_t i = 0;
    for (; i + W <= vocab; i += W) totals += select(load(x + i) == splat(-INFINITY), vf{}, exp(load(x + i) - top));
    total = sum(totals);
    for (; i < vocab; i++) total += x[i] == -INFINITY ? 0 : exp(x[i] - top);
  }
  // Take tokens off the heap from the best down; what has been taken stands behind the heap's end, best last.
  int64_t taken = 0;
  auto take = [&] {
    const int32_t best = heap[0];
    heap[0] = heap[--size];
    if (size) sift(x, heap, size, 0);
    heap[size] = best;
    taken++;
  };
  const int64_t whole = size;
  if (top_k) {
    while (size && (taken < n[TOP_K] || x[heap[0]] == x[heap[whole - n[TOP_K]]])) take();  // equals of the k-th stay, as in the reference
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
  // The kept ones are the last `keep` of the list. Everything else goes.
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
      for (int64_t i = 0; i < vocab; i++)
        if (!(allowed[i / 32] >> (i % 32) & 1)) x[i] = -INFINITY;
    }
    penalize(x, vocab, o.in(3).as<int32_t>() + n[HISTORY_START], f, n, scratch.as<int32_t>() + r * vocab);
    if (f[TEMPERATURE] > 0) {
      for (int64_t i = 0; i < vocab; i++) x[i] /= f[TEMPERATURE];
      truncate(x, vocab, f, n, scratch.as<int32_t>() + r * vocab);
    }
  }
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

static int64_t argmax(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; i++)
    if (x[i] > x[best]) best = i;
  return best;
}

// A number in [0, 1) from a seed and a step (splitmix64).
static double random_number(uint64_t seed, uint64_t step) {
  uint64_t z = seed + (step + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

static void sample(const Operands& o, const Worker& worker) {
  const Tensor &logits = o.in(0), &processed = o.in(1), &ids = o.out(0), &logprobs = o.out(1);
  const int64_t vocab = logits.dims[1];
  for (int64_t r = worker.index; r < logits.rows(); r += worker.count) {
    const float* f = o.in(2).as<float>() + r * FLOATS;
    const int32_t* n = o.in(3).as<int32_t>() + r * INTS;
    const float *raw = logits.as<float>() + r * vocab, *x = processed.as<float>() + r * vocab;
    int64_t id = argmax(x, vocab);
    if (f[TEMPERATURE] > 0) {
      const float top = x[id];
      double total = 0;
      for (int64_t i = 0; i < vocab; i++) total += x[i] == -INFINITY ? 0.f : exp(x[i] - top);
      double left = total * random_number(static_cast<uint64_t>(static_cast<uint32_t>(n[SEED_HIGH])) << 32 | static_cast<uint32_t>(n[SEED_LOW]), static_cast<uint64_t>(n[STEP]));
      for (int64_t i = 0; i < vocab; i++) {
        if (x[i] == -INFINITY) continue;
        left -= exp(x[i] - top);
        id = i;
        if (left < 0) break;
      }
    }
    const float top = raw[argmax(raw, vocab)];
    ids.as<int32_t>()[r] = static_cast<int32_t>(id);
    logprobs.as<float>()[r] = raw[id] - top - logf(exp_sum(raw, vocab, top));
  }
}

}  // namespace ISA
