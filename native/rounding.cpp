#include "rounding.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "halves.h"
#include "kernels.h"
#include "quantize.h"
#include "targets.h"

namespace {

// One number for each row of a tile.
typedef float Lanes __attribute__((vector_size(64)));
static_assert(sizeof(Lanes) == TILE_ROWS * sizeof(float));

constexpr int64_t PANEL = 64;
// Added to the diagonal of the moments, as a share of its mean: what is not seen here is not free elsewhere.
constexpr double DAMPING = 0.01;

// c[i][j] += sign * sum over p of t[p][i] t[p][j], for j <= i and some beyond; size is a multiple of 64.
FAST void rank_update(float* c, int64_t size, int64_t stride, const float* t, int64_t depth, int64_t t_stride, float sign) {
  for (int64_t i = 0; i < size; i += 4)
    for (int64_t j = 0; j <= i; j += PANEL) {
      Lanes acc[4][4] = {};
      for (int64_t p = 0; p < depth; p++) {
        const float* row = t + p * t_stride;
        Lanes v[4];
        std::memcpy(v, row + j, sizeof v);
        for (int a = 0; a < 4; a++)
          for (int b = 0; b < 4; b++) acc[a][b] += row[i + a] * v[b];
      }
      for (int a = 0; a < 4; a++)
        for (int b = 0; b < 4; b++) {
          Lanes v;
          float* at = c + (i + a) * stride + j + 16 * b;
          std::memcpy(&v, at, sizeof v);
          v += sign * acc[a][b];
          std::memcpy(at, &v, sizeof v);
        }
    }
}

// Replaces the lower triangle of a positive definite matrix by its Cholesky factor; size is a multiple of 64. False if it has none.
FAST bool cholesky(float* a, int64_t size) {
  std::vector<float> panel(static_cast<size_t>(PANEL * size));
  for (int64_t from = 0; from < size; from += PANEL) {
    for (int64_t i = from; i < from + PANEL; i++)
      for (int64_t j = from; j <= i; j++) {
        double sum = a[i * size + j];
        for (int64_t p = from; p < j; p++) sum -= static_cast<double>(a[i * size + p]) * a[j * size + p];
        if (j < i) sum /= a[j * size + j];
        else if (sum > 0) sum = std::sqrt(sum);
        else return false;  // NaN too
        a[i * size + j] = static_cast<float>(sum);
      }
    // The rows below, transposed, so that neighbouring rows are neighbouring lanes.
    const int64_t rest = from + PANEL, count = size - rest;
    for (int64_t j = 0; j < PANEL; j++) {
      const float* factor = a + (from + j) * size + from;
      float* out = panel.data() + j * count;
      for (int64_t i = 0; i < count; i++) out[i] = a[(rest + i) * size + from + j];
      for (int64_t p = 0; p < j; p++)
        for (int64_t i = 0; i < count; i++) out[i] -= factor[p] * panel[p * count + i];
      for (int64_t i = 0; i < count; i++) out[i] /= factor[j];
      for (int64_t i = 0; i < count; i++) a[(rest + i) * size + from + j] = out[i];
    }
    if (count > 0) rank_update(a + rest * size + rest, count, size, panel.data(), PANEL, count, -1);
  }
  return true;
}

// target[c] += sum over j of error[j] carried[j][c], for 32 places.
FAST void carry(const Lanes* error, const float* carried, int64_t count, Lanes* target) {
  for (int half = 0; half < HALF; half += 16) {
    Lanes acc[16];
    for (int c = 0; c < 16; c++) acc[c] = target[half + c];
    for (int64_t j = 0; j < count; j++) {
      const Lanes e = error[j];
      const float* row = carried + j * HALF + half;
      for (int c = 0; c < 16; c++) acc[c] += e * row[c];
    }
    for (int c = 0; c < 16; c++) target[half + c] = acc[c];
  }
}

// Rounds 32 places with a scale for each lane. An error moves the targets of the places after it, by `inner` [32, 32]. Writes the
// integers, the errors against `exact`, and the cost.
FAST void round_places(const Lanes* target, const Lanes* exact, const float* inner, const float* weight, const Lanes& scale, Lanes* integers, Lanes* error, Lanes& cost) {
  const Lanes zero = {}, inverse = scale != zero ? 1 / scale : zero;
  Lanes sum = {};
  for (int c = 0; c < HALF; c++) {
    Lanes t = target[c];
    for (int j = 0; j < c; j++) t += error[j] * inner[j * HALF + c];
    Lanes q = t * inverse;
    q = q < -8.f ? zero - 8.f : q;
    q = q > 7.f ? zero + 7.f : q;
    q = q + 12582912.f - 12582912.f;  // to the nearest integer
    const Lanes rounded = q * scale, left = t - rounded;
    sum += weight[c] * left * left;
    error[c] = exact[c] - rounded;
    integers[c] = q;
  }
  cost = sum;
}

}  // namespace

int64_t padded_columns(int64_t k) { return groups_of(k) * GROUP; }

void add_moments(const float* x, const int32_t* rows, const float* shares, int64_t count, int64_t k, float* moments) {
  const int64_t padded = padded_columns(k);
  std::vector<float> chunk(static_cast<size_t>(PANEL * padded));
  for (int64_t from = 0; from < count; from += PANEL) {
    const int64_t depth = std::min(PANEL, count - from);
    for (int64_t p = 0; p < depth; p++)
      for (int64_t c = 0; c < k; c++) chunk[p * padded + c] = x[rows[from + p] * k + c] * (shares ? shares[from + p] : 1);
    rank_update(moments, padded, padded, chunk.data(), depth, padded, 1);
  }
}

Compensation::Compensation(const std::vector<float>& moments, int64_t k) : k_(k), padded_(padded_columns(k)) {
  const int64_t n = padded_;
  double sum = 0;
  for (int64_t i = 0; i < k; i++) sum += moments[i * n + i];
  if (!std::isfinite(sum)) throw std::runtime_error("sees inputs that are not finite: the weights before it are damaged, or training had diverged");
  const double mean = sum > 0 ? sum / static_cast<double>(k) : 1;
  std::vector<double> diagonal(static_cast<size_t>(n), mean);  // beyond k anything above 0 will do: those weights are 0
  for (int64_t i = 0; i < k; i++) diagonal[i] = moments[i * n + i] + DAMPING * mean;

  // The columns that matter most come first, because those after make up for them. The 32 that share a scale stay together.
  std::vector<double> groups(static_cast<size_t>(n / HALF));
  for (int64_t i = 0; i < k; i++) groups[i / HALF] += diagonal[i];
  order_.resize(static_cast<size_t>(n));
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) {
    const int32_t g = a / HALF, h = b / HALF;
    if (g != h) return groups[g] != groups[h] ? groups[g] > groups[h] : g < h;
    if ((a < k) != (b < k)) return a < k;
    return diagonal[a] > diagonal[b];
  });

  // moments = (1 + u) d (1 + u)^T with u strictly upper triangular in places: the Cholesky factor of the matrix read backwards.
  // The target of place c is its weight + sum over earlier j of error[j] u[j][c]; what is left costs d[c] times its square.
  std::vector<float> a(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j <= i; j++) {
      const int32_t p = order_[n - 1 - i], q = order_[n - 1 - j];
      a[i * n + j] = p == q ? static_cast<float>(diagonal[p]) : moments[std::max(p, q) * n + std::min(p, q)];
    }
  if (!cholesky(a.data(), n)) throw std::runtime_error("sees inputs so large that float32 can't hold the sums of their products");
  auto factor = [&](int64_t j, int64_t c) { return a[(n - 1 - j) * n + n - 1 - c]; };
  for (int64_t c = 0; c < n; c++) weight_.push_back(factor(c, c) * factor(c, c));
  carried_.reserve(static_cast<size_t>(n * (n + HALF) / 2));
  for (int64_t from = 0; from < n; from += HALF)
    for (int64_t j = 0; j < from + HALF; j++)
      for (int64_t c = from; c < from + HALF; c++) carried_.push_back(j < c ? factor(j, c) / factor(c, c) : 0);
}

void Compensation::round_tile(uint8_t* matrix, int64_t tile, const float* rows) const {
  std::vector<float> room(static_cast<size_t>((padded_ + 1) * TILE_ROWS));
  void* start = room.data();
  size_t space = room.size() * sizeof(float);
  auto* error = static_cast<Lanes*>(std::align(sizeof(Lanes), sizeof(Lanes), start, space));  // by place
  std::vector<float> scales(static_cast<size_t>(padded_ / HALF * TILE_ROWS));
  std::vector<int8_t> integers(static_cast<size_t>(padded_ * TILE_ROWS));
  const float* carried = carried_.data();
  for (int64_t from = 0; from < padded_; from += HALF, carried += from * HALF) {
    Lanes exact[HALF], target[HALF], q[HALF], top = {};
    for (int c = 0; c < HALF; c++) {
      const int32_t column = order_[from + c];
      for (int r = 0; r < TILE_ROWS; r++) exact[c][r] = column < k_ ? rows[r * k_ + column] : 0;
      target[c] = exact[c];
    }
    carry(error, carried, from, target);
    for (const Lanes& t : target) top = t * t > top * top ? t : top;
    // As int4_scale in quantize.cpp: candidates that map the target of largest magnitude to 6.8 to 8.8 steps.
    const float* inner = carried + from * HALF;
    Lanes scale = {}, least = Lanes{} + INFINITY, cost;
    for (int step = 0; step <= 10; step++) {
      const Lanes tried = top / (-8.8f + 0.2f * static_cast<float>(step));
      round_places(target, exact, inner, weight_.data() + from, tried, q, error + from, cost);
      scale = cost < least ? tried : scale;
      least = cost < least ? cost : least;
    }
    float* stored = scales.data() + order_[from] / HALF * TILE_ROWS;
    for (int r = 0; r < TILE_ROWS; r++) stored[r] = scale[r] = f16_to_f32(f32_to_f16(scale[r]));
    round_places(target, exact, inner, weight_.data() + from, scale, q, error + from, cost);
    for (int c = 0; c < HALF; c++)
      for (int r = 0; r < TILE_ROWS; r++) integers[r * padded_ + order_[from + c]] = static_cast<int8_t>(q[c][r]);
  }
  for (int r = 0; r < TILE_ROWS; r++)
    for (int64_t from = 0; from < padded_; from += HALF)
      write_group(matrix, INT4, tile * TILE_ROWS + r, k_, from, scales[from / HALF * TILE_ROWS + r], integers.data() + r * padded_ + from);
}
