// Attention over the paged KV cache, block by block with an online softmax (https://arxiv.org/abs/2205.14135), so that
// memory use does not grow with the context. Keys are transposed within a block: lanes are adjacent tokens. This file
// handles float caches and splits the work between threads; attention_int8.inl handles int8 caches.

namespace ISA {

static_assert(BLOCK_TOKENS % W == 0);
constexpr int QUERIES = W == 16 ? 8 : 4;  // query vectors that share a pass over a block
constexpr int MAX_DIM = 512;

static inline void put(float* p, float x) { *p = x; }
static inline void put(f16* p, float x) { *p = to_f16(x); }

// The block of the token at `position` of a sequence, or -1 beyond the sequence's pages.
static inline int64_t page_of(const Tensor& pages, int64_t sequence, int64_t position, int64_t blocks) {
  const int64_t page = position / BLOCK_TOKENS;
  const int32_t block = page < pages.dims[1] ? pages.as<int32_t>()[sequence * pages.dims[1] + page] : -1;
  return block < blocks ? block : -1;
}

// Writes one head of a token, `key` and `value` [dim], to its place in a block; keys are transposed.
template <class T>
static void put_numbers(const float* key, const float* value, int64_t dim, int64_t t, T* keys, T* values) {
  for (int64_t d = 0; d < dim; d++) put(keys + d * BLOCK_TOKENS + t, key[d]);
  for (int64_t d = 0; d < dim; d++) put(values + t * dim + d, value[d]);
}

// Int8 keys are ordered by token, others by dim.
static inline int64_t head_width(const Tensor& keys) { return keys.dims[keys.dtype == INT8KV ? 3 : 2]; }

template <class T>
static void write_cache(const Operands& o, const Worker& worker, int64_t head_elements, void (*put_head)(const float*, const float*, int64_t, int64_t, T*, T*)) {
  const Tensor &k = o.in(0), &v = o.in(1), &keys = o.in(2), &values = o.in(3), &segments = o.in(4), &pages = o.in(5);
  const int64_t heads = keys.dims[1], dim = head_width(keys);
  if (dim > MAX_DIM) return worker.fail("pagedWrite: head width %lld exceeds %lld", dim, MAX_DIM);
  for (int64_t s = 0; s < segments.rows(); s++) {
    const int32_t* segment = segments.as<int32_t>() + s * 3;  // first row, number of rows, position of the first row
    int64_t begin, end;
    worker.share(segment[1], 1, begin, end);
    for (int64_t i = begin; i < end; i++) {
      const int64_t position = segment[2] + i, block = page_of(pages, s, position, keys.dims[0]);
      if (block < 0) { worker.fail("internal: pagedWrite: position %lld of sequence %lld has no page", position, s); continue; }
      for (int64_t h = 0; h < heads; h++) {
        const int64_t from = ((segment[0] + i) * heads + h) * dim, to = (block * heads + h) * head_elements;
        put_head(k.as<float>() + from, v.as<float>() + from, dim, position % BLOCK_TOKENS, keys.as<T>() + to, values.as<T>() + to);
      }
    }
  }
}

// One pass of up to `most` query vectors of a KV head over their sequence's context.
template <class T>
struct Pass {
  using Element = T;
  static constexpr int most = QUERIES;
  const T *keys, *values;  // of the head, in block 0
  const int32_t* pages;
  int64_t dim, block_stride;
  int count;
  const float* query[most];
  float* out[most];
  int64_t last[most];  // the last position that each query may see; ascending

  static int64_t head_elements(int64_t dim) { return dim * BLOCK_TOKENS; }

  template <int Q>
  void pass(float scale) const {
    float m[Q], l[Q], acc[Q][MAX_DIM];
    int64_t end = 0;
    for (int q = 0; q < Q; q++) {
      m[q] = -INFINITY, l[q] = 0;
      for (int64_t d = 0; d < dim; d++) acc[q][d] = 0;
      if (last[q] + 1 > end) end = last[q] + 1;
    }
    constexpr int V = BLOCK_TOKENS / W;
    for (int64_t t0 = 0; t0 < end; t0 += BLOCK_TOKENS) {
      const int64_t at = pages[t0 / BLOCK_TOKENS] * block_stride;
      float p[Q][BLOCK_TOKENS];
      const T* k = keys + at;
      // Each step reads the cache once, from memory: prefetch the next block while computing this one.
      const bool more = t0 + BLOCK_TOKENS < end;
      const int64_t next = more ? pages[t0 / BLOCK_TOKENS + 1] * block_stride : at;
      const T *next_k = keys + next, *next_v = values + next;
      for (int v = 0; v < V; v += 2) {
        constexpr int U = V < 2 ? V : 2;
        vf s[Q][U] = {};
        for (int64_t d = 0; d < dim; d++) {
          vf kv[U];
          for (int u = 0; u < U; u++) kv[u] = load(k + d * BLOCK_TOKENS + (v + u) * W);
          if (v == 0) __builtin_prefetch(next_k + d * BLOCK_TOKENS);
          for (int q = 0; q < Q; q++)
            for (int u = 0; u < U; u++) s[q][u] += query[q][d] * kv[u];
        }
        for (int q = 0; q < Q; q++)
          for (int u = 0; u < U; u++) store(p[q] + (v + u) * W, s[q][u] * scale);
      }
      const int64_t tokens = min(BLOCK_TOKENS, end - t0);
      for (int q = 0; q < Q; q++) {
        for (int64_t t = last[q] + 1 - t0 < 0 ? 0 : last[q] + 1 - t0; t < BLOCK_TOKENS; t++) p[q][t] = -INFINITY;
        vf top = load(p[q]);
        for (int v = 1; v < V; v++) top = max(top, load(p[q] + v * W));
        const float now = max(m[q], largest(top));
        if (now == -INFINITY) continue;  // this query ends before this block
        const float shrink = m[q] == -INFINITY ? 0.f : exp(m[q] - now);
        vf total = {};
        for (int v = 0; v < V; v++) {
          const vf s = load(p[q] + v * W);
          const vf e = select(s == splat(-INFINITY), vf{}, exp(s - now));
          store(p[q] + v * W, e);
          total += e;
        }
        l[q] = l[q] * shrink + sum(total);
        m[q] = now;
        if (shrink != 1.f)
          for (int64_t d = 0; d < dim; d++) acc[q][d] *= shrink;
      }
      const T* value = values + at;
      int64_t d = 0;
      for (; d + W <= dim; d += W) {
        vf sum[Q];
        for (int q = 0; q < Q; q++) sum[q] = load(acc[q] + d);
        for (int64_t t = 0; t < tokens; t++) {
          const vf x = load(value + t * dim + d);
          __builtin_prefetch(next_v + t * dim + d);
          for (int q = 0; q < Q; q++) sum[q] += p[q][t] * x;
        }
        for (int q = 0; q < Q; q++) store(acc[q] + d, sum[q]);
      }
      for (; d < dim; d++)
        for (int q = 0; q < Q; q++)
          for (int64_t t = 0; t < tokens; t++) acc[q][d] += p[q][t] * scalar(value[t * dim + d]);
    }
    for (int q = 0; q < Q; q++)
      for (int64_t d = 0; d < dim; d++) out[q][d] = acc[q][d] / l[q];
  }

  template <int Q = most>
  void run(float scale) const {
    if constexpr (Q > 1) {
      if (count != Q) return run<Q - 1>(scale);
    }
    pass<Q>(scale);
  }
};

}  // namespace ISA

#include "attention_int8.inl"

namespace ISA {

static void paged_write(const Operands& o, const Worker& worker) {
  const int64_t dim = head_width(o.in(2));
  switch (o.in(2).dtype) {
    case INT8KV: return write_cache(o, worker, Int8Pass::head_elements(dim), put_int8);
    case F16: return write_cache(o, worker, Pass<f16>::head_elements(dim), put_numbers<f16>);
    default: return write_cache(o, worker, Pass<float>::head_elements(dim), put_numbers<float>);
  }
}

template <class P>
static void attend(const Operands& o, const Worker& worker) {
  const Tensor &q = o.in(0), &keys = o.in(1), &values = o.in(2), &segments = o.in(3), &pages = o.in(4), &y = o.out(0);
  const int64_t kv_heads = keys.dims[1], dim = head_width(keys), width = q.dims[1], share = width / dim / kv_heads;
  if (dim > MAX_DIM) return worker.fail("pagedAttention: head width %lld exceeds %lld", dim, MAX_DIM);
  const float scale = 1 / __builtin_sqrtf(static_cast<float>(dim));
  int64_t task = 0;
  P pass;
  for (int64_t s = 0; s < segments.rows(); s++) {
    const int32_t* segment = segments.as<int32_t>() + s * 3;
    for (int64_t position = segment[2]; position < segment[2] + segment[1]; position++)
      if (page_of(pages, s, position, keys.dims[0]) < 0) return worker.fail("internal: pagedAttention: position %lld of sequence %lld has no page", position, s);
    // A KV head's queries are rows x the heads that share it, split into passes. A single token's heads are spread over the team.
    const int64_t queries = segment[1] * share;
    int64_t size = P::most;
    if (segments.rows() * kv_heads * ((queries + size - 1) / size) < worker.count) size = min(size, (queries * kv_heads + worker.count - 1) / worker.count);
    for (int64_t h = 0; h < kv_heads; h++)
      for (int64_t first = 0; first < queries; first += size) {
        if (task++ % worker.count != worker.index) continue;
        const int64_t head = P::head_elements(dim);
        pass.keys = keys.as<typename P::Element>() + h * head;
        pass.values = values.as<typename P::Element>() + h * head;
        pass.pages = pages.as<int32_t>() + s * pages.dims[1];
        pass.dim = dim, pass.block_stride = kv_heads * head;
        pass.count = static_cast<int>(min(size, queries - first));
        for (int i = 0; i < pass.count; i++) {
          const int64_t row = (first + i) / share, at = (segment[0] + row) * width + (h * share + (first + i) % share) * dim;
          pass.query[i] = q.as<float>() + at;
          pass.out[i] = y.as<float>() + at;
          pass.last[i] = segment[2] + row;
        }
        pass.run(scale);
      }
  }
}

static void paged_attention(const Operands& o, const Worker& worker) {
  switch (o.in(1).dtype) {
    case INT8KV: return attend<Int8Pass>(o, worker);
    case F16: return attend<Pass<f16>>(o, worker);
    default: return attend<Pass<float>>(o, worker);
  }
}

}  // namespace ISA
