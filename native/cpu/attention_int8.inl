// Attention over an int8 KV cache: scores are products of int8 queries and keys, sums of values are products of int8
// values and 14-bit probabilities. Many queries pass over a stretch of the context while it is in the CPU's caches.
//
// A head of a block takes 32 tokens of ceil(dim / 64) * 68 bytes. Keys: two tiles of 16 tokens, each like int8 weights with
// tokens as rows, but with float scales. Values: tiles of 16 dims, each 8 vectors of 16 dims x 4 tokens, with bytes 128 +
// value; then one float scale per token.

namespace ISA {

using KeyTiles = Int8Tiles<float>;

constexpr int STRETCH = 8 * BLOCK_TOKENS;                     // tokens between rescalings of a query's sums; more overflow `gather`
constexpr int TOGETHER = KeyTiles::max_rows;                  // queries whose products are computed together
constexpr int INT8_QUERIES = 8 * TOGETHER;                    // queries that share a pass over a stretch
constexpr int STEPS = 127 * 128 + 127;                        // steps of a probability
constexpr int VALUE_TILE_BYTES = TILE_ROWS * BLOCK_TOKENS;

static inline int64_t value_tiles(int64_t dim) { return groups_of(dim) * GROUP / TILE_ROWS; }

// Writes one head of a token, `key` and `value` [dim], to its place in a block.
static void put_int8(const float* key, const float* value, int64_t dim, int64_t t, uint8_t* keys, uint8_t* values) {
  int8_t row[MAX_DIM / GROUP * INT8_ROW_GROUP_BYTES];
  const int64_t groups = groups_of(dim);
  quantize_row(key, dim, row);
  for (int64_t g = 0; g < groups; g++) {
    uint8_t* block = keys + (t / TILE_ROWS * groups + g) * KeyTiles::bytes;
    const int64_t lane = t % TILE_ROWS;
    for (int64_t c = 0; c < GROUP; c++) block[(c / 4 * TILE_ROWS + lane) * 4 + c % 4] = static_cast<uint8_t>(128 + row[g * GROUP + c]);
    reinterpret_cast<float*>(block + TILE_ROWS * GROUP)[lane] = Blocks::scales(row, groups)[g];
  }
  uint32_t bits = 0;
  for (int64_t d = 0; d < dim; d++) {
    const uint32_t magnitude = to_bits(value[d]) & 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
  }
  const bool finite = bits < 0x7f800000;
  const float top = finite ? from_bits(bits) : 0.f, inverse = top > TINY ? 127.f / top : 0.f;
  for (int64_t d = 0; d < groups * GROUP; d++) {
    const float steps = finite && d < dim ? value[d] * inverse + ROUNDER - ROUNDER : 0.f;  // rounds, ties to even
    values[d / TILE_ROWS * VALUE_TILE_BYTES + (t / 4 * TILE_ROWS + d % TILE_ROWS) * 4 + t % 4] = static_cast<uint8_t>(128 + static_cast<int>(steps));
  }
  reinterpret_cast<float*>(values + value_tiles(dim) * VALUE_TILE_BYTES)[t] = finite ? top / 127.f : __builtin_nanf("");
}

// Queries of one KV head of one sequence, and their running sums.
struct Int8Pass {
  using Element = uint8_t;
  static constexpr int most = INT8_QUERIES;
  const uint8_t *keys, *values;  // of the head, in block 0
  const int32_t* pages;
  int64_t dim, block_stride;
  int count;
  const float* query[INT8_QUERIES];
  float* out[INT8_QUERIES];
  int64_t last[INT8_QUERIES];  // the last position that each query may see; ascending
  float top[INT8_QUERIES], total[INT8_QUERIES];  // the largest score in powers of two; the sum of all, relative to it
  alignas(64) float sums[INT8_QUERIES][MAX_DIM];  // `dim` of each, padded to whole groups
  alignas(64) int8_t rows[INT8_QUERIES][MAX_DIM / GROUP * INT8_ROW_GROUP_BYTES];

  // A stretch's probabilities times the values' scales, as 128 x high + low in steps of `step`.
  struct Weights {
    alignas(64) int8_t high[STRETCH], low[STRETCH];
    float step;
    int32_t offset;  // cancels the values' bias of 128
  };

  // Turns `score` [STRETCH] into weights and rescales the query's sums. False if the query sees nothing of the stretch.
  bool weigh(int q, float* score, int64_t t0, int blocks, float scale, Weights& w) {
    const int64_t seen = last[q] + 1 - t0;
    if (seen <= 0) return false;
    const int64_t tokens = blocks * BLOCK_TOKENS;
    for (int64_t t = seen; t < tokens; t++) score[t] = -INFINITY;
    vf tops = splat(-INFINITY);
    for (int64_t t = 0; t < tokens; t += W) tops = max(tops, load(score + t));
    const float now = max(top[q], largest(tops) * scale);
    const float shrink = top[q] == now ? 1.f : top[q] == -INFINITY ? 0.f : exp2(splat(top[q] - now))[0];
    vf all = {};
    vi most = {};
    for (int b = 0; b < blocks; b++) {
      const uint8_t* block = values + pages[t0 / BLOCK_TOKENS + b] * block_stride;
      const float* scales = reinterpret_cast<const float*>(block + value_tiles(dim) * VALUE_TILE_BYTES);
      float* s = score + b * BLOCK_TOKENS;
      const bool whole = seen >= (b + 1) * BLOCK_TOKENS;
      for (int t = 0; t < BLOCK_TOKENS; t += W) {
        const vf x = load(s + t);
        vf e = exp2(x * scale - now), p = e * load(scales + t);
        if (!whole) {  // what an earlier sequence left in the block may be NaN
          const vi unseen = x == splat(-INFINITY);
          e = select(unseen, vf{}, e), p = select(unseen, vf{}, p);
        }
        all += e;
        most = max_bits(most, magnitude_bits(p));
        store(s + t, p);
      }
    }
    total[q] = total[q] * shrink + sum(all);
    top[q] = now;
    if (shrink != 1.f)
      for (int64_t d = 0; d < dim; d++) sums[q][d] *= shrink;
    const float largest_weight = largest_magnitude(most);
    if (!(largest_weight > TINY && largest_weight < INFINITY)) {
      w = Weights{};
      w.step = largest_weight < INFINITY ? 0.f : __builtin_nanf("");
      return true;
    }
    const float inverse = STEPS / largest_weight;
    vi steps = {};
    for (int64_t t = 0; t < tokens; t += W) {
      const vi n = round_steps(load(score + t) * inverse);
      store_bytes(w.high + t, n >> 7), store_bytes(w.low + t, n & 127);
      steps += n;
    }
    w.step = largest_weight / STEPS;
    w.offset = Dot8::offset ? -128 * static_cast<int32_t>(sum(to_float(steps))) : 0;  // below 2^24: exact
    return true;
  }

  // Adds the stretch's weighted values to the sums of R queries, starting at `first`.
  template <int R>
  void gather(int first, const Weights* w, int64_t t0, int blocks) {
    constexpr int N = W == 16 ? 2 : 1;  // vectors of values processed together; padding beyond `dim` is zero
    for (int64_t d = 0; d < dim; d += N * W) {
      const int64_t at = d / TILE_ROWS * VALUE_TILE_BYTES + d % TILE_ROWS * 4;
      vi high[R][N] = {}, low[R][N] = {};
      for (int b = 0; b < blocks; b++) {
        const uint8_t* block = values + pages[t0 / BLOCK_TOKENS + b] * block_stride + at;
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK_TOKENS / 4; i++) {
          typename Dot8::Weights v[N];
          for (int n = 0; n < N; n++) v[n] = Dot8::load(block + n * VALUE_TILE_BYTES + i * TILE_ROWS * 4);
          for (int r = 0; r < R; r++) {
            const int32_t h = Blocks::four(w[r].high + b * BLOCK_TOKENS + i * 4), l = Blocks::four(w[r].low + b * BLOCK_TOKENS + i * 4);
            for (int n = 0; n < N; n++) high[r][n] = Dot8::add(high[r][n], v[n], h), low[r][n] = Dot8::add(low[r][n], v[n], l);
          }
        }
      }
      for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
          const vf x = to_float((high[r][n] << 7) + low[r][n] + w[r].offset) * w[r].step;
          float* s = sums[first + r] + d + n * W;
          store(s, load(s) + x);
        }
    }
  }

  template <int R>
  void step(int first, int64_t t0, int blocks, float scale) {
    alignas(64) float scores[R][STRETCH];
    const int8_t* x[R];
    for (int r = 0; r < R; r++) x[r] = rows[first + r];
    for (int b = 0; b < blocks; b++) {
      constexpr int N = KeyTiles::wide;
      const uint8_t* block = keys + pages[t0 / BLOCK_TOKENS + b] * block_stride;
      for (int t = 0; t < BLOCK_TOKENS; t += N * TILE_ROWS) {
        float* y[R];
        for (int r = 0; r < R; r++) y[r] = scores[r] + b * BLOCK_TOKENS + t;
        Ahead nothing;
        KeyTiles::run<R, N>(x, block, t, N * TILE_ROWS, dim, y, nullptr, nothing);
      }
    }
    // Queries that see something of the stretch come last, because positions ascend.
    Weights w[R];
    int blind = 0;
    for (int r = 0; r < R; r++)
      if (!weigh(first + r, scores[r], t0, blocks, scale, w[r])) blind = r + 1;
    for (int r = 0; r < blind; r++) w[r] = Weights{};
    gather<R>(first, w, t0, blocks);
  }

  template <int R = TOGETHER>
  void dispatch(int queries, int first, int64_t t0, int blocks, float scale) {
    if constexpr (R > 1) {
      if (queries != R) return dispatch<R - 1>(queries, first, t0, blocks, scale);
    }
    step<R>(first, t0, blocks, scale);
  }

  static int64_t head_elements(int64_t dim) { return BLOCK_TOKENS * int8_kv_bytes(dim); }

  void run(float inverse_root) {
    const float scale = inverse_root * 1.44269504f;
    for (int q = 0; q < count; q++) {
      quantize_row(query[q], dim, rows[q]);
      top[q] = -INFINITY, total[q] = 0;
      for (int64_t d = 0; d < groups_of(dim) * GROUP; d++) sums[q][d] = 0;
    }
    const int64_t end = last[count - 1] + 1, head_bytes = head_elements(dim);
    for (int64_t t0 = 0; t0 < end; t0 += STRETCH) {
      const int blocks = static_cast<int>((min(STRETCH, end - t0) + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
      // Each step reads the cache once, from memory: prefetch the next stretch while computing this one.
      for (int64_t page = t0 / BLOCK_TOKENS + blocks; page < min(t0 / BLOCK_TOKENS + 2 * blocks, (end + BLOCK_TOKENS - 1) / BLOCK_TOKENS); page++)
        for (int64_t i = 0; i < head_bytes; i += 64) {
          __builtin_prefetch(keys + pages[page] * block_stride + i, 0, 2);
          __builtin_prefetch(values + pages[page] * block_stride + i, 0, 2);
        }
      for (int first = 0; first < count; first += TOGETHER) {
        const int queries = count - first < TOGETHER ? count - first : TOGETHER;
        if (last[first + queries - 1] >= t0) dispatch(queries, first, t0, blocks, scale);
      }
    }
    for (int q = 0; q < count; q++)
      for (int64_t d = 0; d < dim; d++) out[q][d] = sums[q][d] / total[q];
  }
};

}  // namespace ISA
