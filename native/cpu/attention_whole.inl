// Attention over whole sequences and its gradient, for training: blocks of scores live in a thread's scratch, never all of them
// (https://arxiv.org/abs/2205.14135). Each thread computes whole blocks of y, dq, dk and dv, in a fixed order of sums. U: how products are
// computed.

namespace ISA {

constexpr int64_t ATTENTION_ROWS = 128, ATTENTION_KEYS = 256;
static_assert(2 * ATTENTION_ROWS * ATTENTION_KEYS + 3 * ATTENTION_ROWS <= SPARE_FLOATS);

// What attention and its gradient are given: queries, keys, values and the sequences that they form.
struct Attention {
  const float *q, *k, *v;
  const Tensor& segments;
  int64_t dim, heads, kv_heads;
  bool causal;
  float scale;

  Attention(const Operands& o, int first, int segments_at)
      : q(o.in(first).as<float>()), k(o.in(first + 1).as<float>()), v(o.in(first + 2).as<float>()), segments(o.in(segments_at)),
        dim(static_cast<int64_t>(o.params[0])), heads(o.in(first).dims[1] / dim), kv_heads(o.in(first + 1).dims[1] / dim), causal(o.params[1] == 1),
        scale(1 / __builtin_sqrtf(static_cast<float>(dim))) {}
};

struct Sequence {
  int64_t row, rows, position, key;  // the first row, their number, the first one's position, and the row of its keys in k and v
  int64_t keys() const { return position + rows; }
  // How many of the keys from `from` on query i sees.
  int64_t seen(int64_t i, int64_t from, int64_t count, bool causal) const { return causal ? min(count, position + i + 1 - from) : count; }
};

// Calls visit(sequence, head of `heads`, block) for each block of `size` of what count(sequence) returns; this thread's share only. The
// shares run to and fro, because under a causal mask later blocks take longer.
template <class Count, class Visit>
static inline void share_blocks(const Tensor& segments, int64_t heads, int64_t size, const Worker& worker, Count count, Visit visit) {
  int64_t unit = 0, key = 0;
  for (int64_t s = 0; s < segments.rows(); s++) {
    const int32_t* segment = segments.as<int32_t>() + s * 3;
    const Sequence sequence{segment[0], segment[1], segment[2], key};
    for (int64_t h = 0; h < heads; h++)
      for (int64_t at = 0; at < count(sequence); at += size, unit++) {
        const int64_t turn = unit / worker.count, place = unit % worker.count;
        if ((turn % 2 ? worker.count - 1 - place : place) == worker.index) visit(sequence, h, at);
      }
    key += sequence.keys();
  }
}

template <class U>
static void attention_by(const Operands& o, const Worker& worker) {
  const Attention a(o, 0, 3);
  const int64_t dim = a.dim, width = a.heads * dim, kv_width = a.kv_heads * dim;
  float *y = o.out(0).as<float>(), *logsumexp = o.out(1).as<float>();
  float *scores = spare(worker, worker.index), *tops = scores + ATTENTION_ROWS * ATTENTION_KEYS, *totals = tops + ATTENTION_ROWS;
  share_blocks(a.segments, a.heads, ATTENTION_ROWS, worker, [](const Sequence& s) { return s.rows; }, [&](const Sequence& s, int64_t h, int64_t i) {
    const int64_t rows = min(ATTENTION_ROWS, s.rows - i), first = (s.row + i) * width + h * dim, kv = s.key * kv_width + h / (a.heads / a.kv_heads) * dim;
    for (int64_t r = 0; r < rows; r++) tops[r] = -INFINITY, totals[r] = 0;
    const int64_t end = a.causal ? s.position + i + rows : s.keys();
    for (int64_t j = 0; j < end; j += ATTENTION_KEYS) {
      const int64_t keys = min(ATTENTION_KEYS, end - j);
      multiply<U>(Along<float>{{a.q + first, width}}, Along<float>{{a.k + kv + j * kv_width, kv_width}}, {0, rows}, {0, keys}, dim, Target{scores, ATTENTION_KEYS}, worker);
      for (int64_t r = 0; r < rows; r++) {
        float *p = scores + r * ATTENTION_KEYS, *out = y + first + r * width;
        const int64_t seen = s.seen(i + r, j, keys, a.causal);
        if (seen <= 0) {
          for (int64_t t = 0; t < keys; t++) p[t] = 0;
          continue;
        }
        const float top = max(tops[r], largest_of(p, seen) * a.scale);
        const float kept = j ? exp(tops[r] - top) : 0.f;
        for (int64_t t = seen; t < keys; t++) p[t] = 0;
        vf sums = {};
        float total = 0;
        int64_t t = 0;
        for (; t + W <= seen; t += W) {
          const vf e = exp(load(p + t) * a.scale - top);
          store(p + t, e);
          sums += e;
        }
        for (; t < seen; t++) total += p[t] = exp(p[t] * a.scale - top);
        totals[r] = totals[r] * kept + (sum(sums) + total);
        if (j)
          for (int64_t d = 0; d < dim; d++) out[d] *= kept;
        tops[r] = top;
      }
      multiply<U>(Along<float>{{scores, ATTENTION_KEYS}}, Across<float>{{a.v + kv + j * kv_width, kv_width}}, {0, rows}, {0, dim}, keys,
                       Target{y + first, width, j > 0}, worker);
    }
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t d = 0; d < dim; d++) y[first + r * width + d] /= totals[r];
      logsumexp[(s.row + i + r) * a.heads + h] = tops[r] + logf(totals[r]);
    }
  });
}

// p = exp(s - logsumexp), D = dy . y: ds = p (dy . v - D), dq = ds k / sqrt(dim), dk = ds q / sqrt(dim), dv = p dy.
template <class U>
static void attention_grad_by(const Operands& o, const Worker& worker) {
  const Attention a(o, 1, 6);
  const int64_t dim = a.dim, width = a.heads * dim, kv_width = a.kv_heads * dim, shared = a.heads / a.kv_heads;
  const float *dy = o.in(0).as<float>(), *y = o.in(4).as<float>(), *logsumexp = o.in(5).as<float>();
  float *dq = o.out(0).as<float>(), *dk = o.out(1).as<float>(), *dv = o.out(2).as<float>();
  float *p = spare(worker, worker.index), *ds = p + ATTENTION_ROWS * ATTENTION_KEYS;
  for (int i = 0; i < 3; i++) {
    const Tensor& d = o.out(i);
    int64_t begin, end;
    worker.share(d.rows() * d.width(), 16, begin, end);
    __builtin_memset(d.as<float>() + begin, 0, static_cast<size_t>(end - begin) * 4);
  }
  worker.wait();

  // The block of queries from i on and keys from j on, of one head: adds to dq, to dk and dv, or to all.
  auto block = [&](const Sequence& s, int64_t h, int64_t i, int64_t j, bool to_q, bool to_kv) {
    const int64_t rows = min(ATTENTION_ROWS, s.rows - i), keys = s.seen(i + rows - 1, j, min(ATTENTION_KEYS, s.keys() - j), a.causal);
    if (keys <= 0) return;
    const int64_t first = (s.row + i) * width + h * dim, kv = (s.key + j) * kv_width + h / shared * dim;
    const Along<float> q{{a.q + first, width}}, k{{a.k + kv, kv_width}}, v{{a.v + kv, kv_width}}, d{{dy + first, width}};
    multiply<U>(q, k, {0, rows}, {0, keys}, dim, Target{p, ATTENTION_KEYS}, worker);
    multiply<U>(d, v, {0, rows}, {0, keys}, dim, Target{ds, ATTENTION_KEYS}, worker);
    for (int64_t r = 0; r < rows; r++) {
      const float mean = dot_of(dy + first + r * width, y + first + r * width, dim), lse = logsumexp[(s.row + i + r) * a.heads + h];
      const int64_t seen = s.seen(i + r, j, keys, a.causal);
      float *pr = p + r * ATTENTION_KEYS, *dr = ds + r * ATTENTION_KEYS;
      int64_t t = 0;
      for (; t + W <= seen; t += W) {
        const vf e = exp(load(pr + t) * a.scale - lse);
        store(pr + t, e);
        store(dr + t, e * (load(dr + t) - mean) * a.scale);
      }
      for (; t < seen; t++) {
        pr[t] = exp(pr[t] * a.scale - lse);
        dr[t] = pr[t] * (dr[t] - mean) * a.scale;
      }
      for (; t < keys; t++) pr[t] = dr[t] = 0;
    }
    const Range all{0, dim};
    if (to_q) multiply<U>(Along<float>{{ds, ATTENTION_KEYS}}, Across<float>{k.rows}, {0, rows}, all, keys, Target{dq + first, width, true}, worker);
    if (!to_kv) return;
    multiply<U>(Across<float>{{p, ATTENTION_KEYS}}, Across<float>{d.rows}, {0, keys}, all, rows, Target{dv + kv, kv_width, true}, worker);
    multiply<U>(Across<float>{{ds, ATTENTION_KEYS}}, Across<float>{q.rows}, {0, keys}, all, rows, Target{dk + kv, kv_width, true}, worker);
  };
  // Of dk and dv, those of the keys from j on, in one KV head: heads and queries in order.
  auto column = [&](const Sequence& s, int64_t kv_head, int64_t j, bool to_q) {
    for (int64_t h = kv_head * shared; h < (kv_head + 1) * shared; h++)
      for (int64_t i = 0; i < s.rows; i += ATTENTION_ROWS) block(s, h, i, j, to_q, true);
  };
  auto rows_of = [](const Sequence& s) { return s.rows; };
  auto keys_of = [](const Sequence& s) { return s.keys(); };
  if (a.segments.rows() * a.kv_heads >= worker.count) {
    // Enough whole heads for all threads: each block's scores are computed once.
    share_blocks(a.segments, a.kv_heads, INT64_MAX / 2, worker, keys_of, [&](const Sequence& s, int64_t kv_head, int64_t) {
      for (int64_t j = 0; j < s.keys(); j += ATTENTION_KEYS) column(s, kv_head, j, true);
    });
  } else {  // the same sums in the same order, with the scores computed twice
    share_blocks(a.segments, a.kv_heads, ATTENTION_KEYS, worker, keys_of, [&](const Sequence& s, int64_t kv_head, int64_t j) { column(s, kv_head, j, false); });
    share_blocks(a.segments, a.heads, ATTENTION_ROWS, worker, rows_of, [&](const Sequence& s, int64_t h, int64_t i) {
      for (int64_t j = 0; j < s.keys(); j += ATTENTION_KEYS) block(s, h, i, j, true, false);
    });
  }
}

static void attention(const Operands& o, const Worker& worker) { (o.params[2] == 1 ? attention_by<Splits> : attention_by<Floats>)(o, worker); }
static void attention_grad(const Operands& o, const Worker& worker) { (o.params[2] == 1 ? attention_grad_by<Splits> : attention_grad_by<Floats>)(o, worker); }

}  // namespace ISA
