// Queries, keys and values of a few rows: the three products, the rotation of positions, and the write to the paged cache, in one kernel
// (see rows.cuh) or, for shapes that it cannot do, in four.
#include "matrix.cuh"
#include "rows.cuh"

namespace cuda {
namespace {

// Where keys and values go. A row's keys and values are written in groups of 64 columns of a head, which in INT8KV share a scale.
struct Cache {
  Dtype format;
  void *keys, *values;
  int32_t heads, dim, blocks;
  const int32_t *segments, *pages;
  Size sequences, page_count;
  FaultRecord* faults;

  __device__ int32_t groups() const { return (dim + 63) / 64; }

  // The place of a row among the tokens of all blocks, or -1.
  __device__ int64_t token_of(int32_t row) const {
    const int32_t most_pages = page_count.get();
    for (int32_t s = 0; s < sequences.get(); s++) {
      const int32_t* segment = segments + 3 * s;
      const int32_t i = row - segment[0];
      if (i < 0 || i >= segment[1]) continue;
      const int32_t position = segment[2] + i, page = position / BLOCK_TOKENS;
      const int32_t block = page < most_pages ? pages[s * most_pages + page] : -1;
      if (block >= 0 && block < blocks) return static_cast<int64_t>(block) * BLOCK_TOKENS + position % BLOCK_TOKENS;
      report(faults, Fault::PAGE, block, blocks);
      return -1;
    }
    return -1;
  }
  // The start of a head's block in elements of its rows, and the token in it.
  __device__ int64_t block_at(int64_t token, int32_t head) const { return (token / BLOCK_TOKENS * heads + head) * BLOCK_TOKENS; }

  __device__ void put(bool is_value, int64_t token, int32_t head, int32_t d, float v) const {
    const int64_t at = (block_at(token, head) + token % BLOCK_TOKENS) * dim + d;
    void* to = is_value ? values : keys;
    switch (format) {
      case F16: static_cast<f16*>(to)[at] = __float2half_rn(v); break;
      case BF16: static_cast<bf16*>(to)[at] = __float2bfloat16_rn(v); break;
      case FP8KV: static_cast<__nv_fp8_storage_t*>(to)[at] = __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3); break;
      default: static_cast<float*>(to)[at] = v;
    }
  }

  // INT8KV: the bytes of a group, 16 lanes holding 4 columns each, and its scale. `top`: the largest magnitude in the group, as bits.
  __device__ void put_group(bool is_value, int64_t token, int32_t head, int32_t group, int lane, const float* v, uint32_t top) const {
    const int32_t padded = groups() * 64;
    const int64_t bytes = static_cast<int64_t>(BLOCK_TOKENS) * (padded + groups() * 4);
    uint8_t* block = static_cast<uint8_t*>(is_value ? values : keys) + block_at(token, head) / BLOCK_TOKENS * bytes;
    const int32_t t = token % BLOCK_TOKENS;
    const float largest = __uint_as_float(top);
    const bool finite = top < 0x7f800000;
    const float inverse = finite && largest > 0x1p-100f ? 127.f / largest : 0.f;
    char4 to;
    auto round = [&](float x) { return static_cast<signed char>(finite ? __float2int_rn(x * inverse) : 0); };
    to.x = round(v[0]), to.y = round(v[1]), to.z = round(v[2]), to.w = round(v[3]);
    *reinterpret_cast<char4*>(block + t * padded + group * 64 + lane * 4) = to;
    if (lane == 0) reinterpret_cast<float*>(block + BLOCK_TOKENS * padded)[t * groups() + group] = finite ? (inverse > 0 ? largest / 127.f : 0.f) : __uint_as_float(0x7fc00000);
  }
};

__device__ __forceinline__ uint32_t magnitude(float v) { return __float_as_uint(v) & 0x7fffffff; }
__device__ __forceinline__ uint32_t largest_of_16(uint32_t top) {
  for (int d = 8; d; d /= 2) top = max(top, __shfl_xor_sync(~0u, top, d));
  return top;
}

// Items are tiles of the keys' rows, then the values', then the queries'.
template <Dtype D>
struct Qkv {
  static constexpr int TILE = TILE_N, SPLITS = 1;
  static constexpr bool PARTS_KNOWN = true, WEIGHTED = false;
  static constexpr bool same(Span) { return true; }
  const float *x, *angles;
  Matrix wq, wk, wv;
  int32_t k, q_width;
  Cache cache;
  float* q;
  // INT8KV: keys and values until a group of 64 columns is complete, [rows, 2 kv width], and how many tiles of each are done.
  float* waiting;
  int32_t* done;
  Size row_count;
  int32_t rows;

  __device__ int32_t kv_width() const { return cache.heads * cache.dim; }
  __device__ int32_t early_items() const { return (q_width + 2 * kv_width()) / TILE_N; }
  __device__ int32_t prepare(uint8_t*) {
    rows = min(row_count.get(), ROWS_MOST);
    return rows > 0 ? early_items() : 0;
  }
  __device__ int32_t parts() const { return 1; }
  __device__ int32_t chunks(int32_t) const { return k / Chunks<D>::CHUNK; }
  __device__ int32_t pitch(int32_t) const { return Chunks<D>::pitch(k); }
  __device__ int32_t scale_pitch(int32_t) const { return Chunks<D>::scale_pitch(k); }
  __device__ Source source(const Cursor& c) const {
    int32_t n = c.item * TILE_N;
    const Matrix* m = &wk;
    if (n >= 2 * kv_width()) m = &wq, n -= 2 * kv_width();
    else if (n >= kv_width()) m = &wv, n -= kv_width();
    return tile_of<D>(*m, n, TILE_N, k);
  }
  __device__ uint32_t everybody() const { return (1u << rows) - 1; }
  __device__ uint32_t mask(const Cursor&) const { return (1u << rows) - 1; }
  __device__ const float* row_of(const Cursor&, int p, float& factor) const {
    factor = 1;
    return x + static_cast<int64_t>(p) * k;
  }
  __device__ int32_t target(const Cursor&, int p) const { return p; }
  __device__ void finish(int32_t item, int p, int n, float v, float) const {
    n += item * TILE_N;
    const float pair = __shfl_xor_sync(~0u, v, 1);
    if (p >= rows) return;
    const int32_t kv = kv_width();
    const bool is_value = n >= kv && n < 2 * kv;
    const int32_t column = n < kv ? n : n < 2 * kv ? n - kv : n - 2 * kv;
    if (!is_value) {
      const float* turn = angles + static_cast<int64_t>(p) * cache.dim + (column % cache.dim & ~1);
      v = column & 1 ? v * turn[0] + pair * turn[1] : v * turn[0] - pair * turn[1];
    }
    if (n >= 2 * kv) {
      q[static_cast<int64_t>(p) * q_width + column] = v;
    } else if (cache.format == INT8KV) {
      waiting[static_cast<int64_t>(p) * 2 * kv + n] = v;
    } else {
      const int64_t token = cache.token_of(p);
      if (token >= 0) cache.put(is_value, token, column / cache.dim, column % cache.dim, v);
    }
  }
  // The block that completes a group of 64 columns writes it.
  __device__ void after(int32_t item) const {
    const int32_t group = item * TILE_N / 64, kv = kv_width();
    if (cache.format != INT8KV || group * 64 >= 2 * kv) return;
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(done + group, 1) == 64 / TILE_N - 1;
      if (last) done[group] = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    const int p = threadIdx.x / 16, lane = threadIdx.x % 16;
    static_assert(ROW_THREADS == 16 * ROWS_MOST);
    float4 v{};
    if (p < rows) v = __ldcg(reinterpret_cast<const float4*>(waiting + static_cast<int64_t>(p) * 2 * kv + group * 64) + lane);
    const uint32_t top = largest_of_16(max(max(magnitude(v.x), magnitude(v.y)), max(magnitude(v.z), magnitude(v.w))));
    const int64_t token = p < rows ? cache.token_of(p) : -1;
    const int32_t column = group * 64 % kv;
    const float four[4] = {v.x, v.y, v.z, v.w};
    if (token >= 0) cache.put_group(group * 64 >= kv, token, column / cache.dim, column % cache.dim / 64, lane, four, top);
  }
};

// Rotates q in place and writes k and v to the cache; a block has a row and 64 columns of a head.
__global__ void __launch_bounds__(64) rotate_and_write(float* q, const float* k, const float* v, const float* angles, Size rows, int32_t q_heads, const Cache cache) {
  let_next_start();
  await_inputs();
  const int32_t r = blockIdx.x, groups = cache.groups(), dim = cache.dim;
  int32_t head = blockIdx.y / groups;
  const int32_t group = blockIdx.y % groups;
  if (r >= rows.get()) return;
  const int kind = head < q_heads ? 0 : head < q_heads + cache.heads ? 1 : 2;
  head -= kind == 0 ? 0 : kind == 1 ? q_heads : q_heads + cache.heads;
  __shared__ float turned[64];
  const int32_t d = group * 64 + threadIdx.x, heads = kind ? cache.heads : q_heads;
  const float* from = (kind == 0 ? q : kind == 1 ? k : v) + (static_cast<int64_t>(r) * heads + head) * dim;
  float value = 0;
  if (d < dim) {
    value = from[d];
    if (kind < 2) {
      const float* turn = angles + static_cast<int64_t>(r) * dim + (d & ~1);
      const float pair = from[d ^ 1];
      value = d & 1 ? value * turn[0] + pair * turn[1] : value * turn[0] - pair * turn[1];
    }
  }
  turned[threadIdx.x] = value;
  __syncthreads();
  if (kind == 0) {
    if (d < dim) q[(static_cast<int64_t>(r) * heads + head) * dim + d] = value;
    return;
  }
  const int64_t token = cache.token_of(r);
  if (token < 0) return;
  if (cache.format != INT8KV) {
    if (d < dim) cache.put(kind == 2, token, head, d, value);
    return;
  }
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x % 16;
  uint32_t top = 0;
  for (int i = 0; i < 4; i++) top = max(top, magnitude(turned[lane * 4 + i]));
  top = largest_of_16(top);
  if (threadIdx.x < 16) cache.put_group(kind == 2, token, head, group, lane, turned + lane * 4, top);
}

}  // namespace

// qkvRope(x, wq, wk, wv, angles, keys, values, segments, pages) -> q
void qkv_rope(const Operands& o, Launch& launch) {
  const Tensor &x = o.in(0), &wq = o.in(1), &wk = o.in(2), &wv = o.in(3), &angles = o.in(4), &keys = o.in(5), &values = o.in(6), &segments = o.in(7), &pages = o.in(8), &q = o.out(0);
  const int32_t rows = x.most[0], k = wq.most[1], dim = angles.most[1], heads = wk.most[0] / dim;
  const Cache cache{keys.dtype, keys.data, values.data, heads, dim, keys.most[0], segments.as<int32_t>(), pages.as<int32_t>(), segments.rows(), pages.dims[1], launch.faults};
  const Dtype d = wq.dtype;
  const bool aligned = has_chunks(d) && wk.dtype == d && wv.dtype == d && k % chunk_of(d) == 0 && dim % (keys.dtype == INT8KV ? 64 : TILE_N) == 0;
  if (aligned && rows <= ROWS_MOST) {
    const bool grouped = keys.dtype == INT8KV;
    float* waiting = grouped ? static_cast<float*>(launch.scratch(static_cast<size_t>(rows) * 2 * heads * dim * 4)) : nullptr;
    int32_t* done = grouped ? launch.counters(2 * heads * dim / 64) : nullptr;
    launch_rows<Qkv>(d, rows, (wq.most[0] + 2 * heads * dim) / TILE_N, 1, k, 0, launch, [&](auto tag) {
      return Qkv<decltype(tag)::value>{x.as<float>(), angles.as<float>(), matrix_of(wq), matrix_of(wk), matrix_of(wv), k, wq.most[0], cache, q.as<float>(), waiting, done, x.rows(), 0};
    });
    return;
  }
  Tensor sides[2] = {x, x};  // k and v, in scratch memory
  for (Tensor& t : sides) t.data = launch.scratch(static_cast<size_t>(rows) * heads * dim * 4);
  product(linear_product(x, wq, q), launch);
  product(linear_product(x, wk, sides[0]), launch);
  product(linear_product(x, wv, sides[1]), launch);
  const int32_t q_heads = wq.most[0] / dim;
  launch(rotate_and_write, dim3(rows, (q_heads + 2 * heads) * ceil_div(dim, 64)), 64, 0, q.as<float>(), sides[0].as<float>(), sides[1].as<float>(), angles.as<float>(), x.rows(), q_heads, cache);
}

}  // namespace cuda
