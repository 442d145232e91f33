// Products of a few rows with one matrix, or with gate and up: see rows.cuh.
#include "rows.cuh"

namespace cuda {
namespace {

template <Dtype D, bool GATED>
struct Whole {
  static constexpr int TILE = GATED ? TILE_N / 2 : TILE_N, SPLITS = 1;
  static constexpr bool PARTS_KNOWN = true, WEIGHTED = false;
  static constexpr bool same(Span) { return true; }
  Product p;
  int32_t first, rows;  // of this block; set by prepare

  __device__ int32_t tiles() const { return (p.n + TILE - 1) / TILE; }
  __device__ int32_t prepare(uint8_t*) {
    first = blockIdx.y * ROWS_MOST;
    rows = min(p.rows.get() - first, ROWS_MOST);
    return rows > 0 ? tiles() : 0;
  }
  __device__ int32_t early_items() const { return tiles(); }
  __device__ int32_t parts() const { return 1; }
  __device__ int32_t chunks(int32_t) const { return p.k / Chunks<D>::CHUNK; }
  __device__ int32_t pitch(int32_t) const { return Chunks<D>::pitch(p.k); }
  __device__ int32_t scale_pitch(int32_t) const { return Chunks<D>::scale_pitch(p.k); }
  __device__ Source source(const Cursor& c) const {
    const int32_t n = c.item * TILE;
    if constexpr (GATED) return tile_of<D>(p.w, p.up, n, p.n - n, p.k);
    else return tile_of<D>(p.w, n, p.n - n, p.k);
  }
  __device__ uint32_t everybody() const { return (1u << rows) - 1; }
  __device__ uint32_t mask(const Cursor&) const { return (1u << rows) - 1; }
  __device__ const float* row_of(const Cursor&, int position, float& factor) const {
    factor = 1;
    return p.x + static_cast<int64_t>(first + position) * p.k;
  }
  __device__ int32_t target(const Cursor&, int p) const { return p; }
  __device__ void finish(int32_t item, int position, int n, float sum, float up) const {
    n += item * TILE;
    if (n >= p.n || position >= rows) return;
    const int64_t at = static_cast<int64_t>(first + position) * p.n + n;
    float v = GATED ? silu(sum) * up : sum;
    if (p.bias) v += p.bias[n];
    if (p.added) v += p.added[at];
    p.y[at] = v;
  }
  __device__ void after(int32_t) const {}
};
template <Dtype D>
using Plain = Whole<D, false>;
template <Dtype D>
using Gated = Whole<D, true>;

}  // namespace

bool few_rows_product(const Product& p, Launch& launch) {
  if (p.order || !has_chunks(p.format) || p.k % chunk_of(p.format) || p.most > 64) return false;
  const int items = ceil_div(p.n, p.gated ? TILE_N / 2 : TILE_N), across = ceil_div(p.most, ROWS_MOST);
  if (p.gated) launch_rows<Gated>(p.format, p.most, items, across, p.k, 0, launch, [&](auto tag) { return Gated<decltype(tag)::value>{p, 0, 0}; });
  else launch_rows<Plain>(p.format, p.most, items, across, p.k, 0, launch, [&](auto tag) { return Plain<decltype(tag)::value>{p, 0, 0}; });
  return true;
}

}  // namespace cuda
