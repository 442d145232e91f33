// Writes of keys and values to the paged cache, with or without the rotation by position (RoPE) of queries and keys before.
#include "attention.cuh"

namespace cuda::attention {
namespace {

// Two adjacent numbers of a row; what lies beyond `dim` is zero.
template <class X> __device__ __forceinline__ float2 pair_at(const X* x, int d, int dim) {
  float2 y = {0, 0};
  if constexpr (sizeof(X) == 4) {
    if (d + 1 < dim && dim % 2 == 0) return *reinterpret_cast<const float2*>(x + d);
  } else {
    if (d + 1 < dim && dim % 2 == 0) return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(x + d));
  }
  if (d < dim) y.x = static_cast<float>(x[d]);
  if (d + 1 < dim) y.y = static_cast<float>(x[d + 1]);
  return y;
}

__device__ __forceinline__ float2 rotated(float2 x, float2 angle) { return {x.x * angle.x - x.y * angle.y, x.y * angle.x + x.x * angle.y}; }

// A warp stores columns g .. g + 63 of one head of token t, two of each lane.
template <Dtype D> __device__ __forceinline__ void put(uint8_t* head, int t, int g, int dim, float2 x) {
  const int d = g + 2 * lane_id();
  if constexpr (D == INT8KV) {
    // Values that are not finite make the group's scale NaN: x / x is, for them.
    const float top = largest(fmaxf(fabsf(x.x), fabsf(x.y)));
    const bool finite = __all_sync(~0u, isfinite(x.x) && isfinite(x.y));
    const float inverse = finite && top > 1e-30f ? 127.f / top : 0.f;
    const int dp = padded(D, dim);
    *reinterpret_cast<char2*>(head + t * dp + d) = make_char2(__float2int_rn(finite ? x.x * inverse : 0.f), __float2int_rn(finite ? x.y * inverse : 0.f));
    if (lane_id() == 0) reinterpret_cast<float*>(head + BLOCK_TOKENS * dp)[t * (dp / GROUP) + g / GROUP] = finite ? top / 127.f : __int_as_float(0x7fffffff);
  } else {
    using T = typename Format<D>::T;
    T* to = reinterpret_cast<T*>(head) + t * dim + d;
    if (d < dim) to[0] = T(x.x);
    if (d + 1 < dim) to[1] = T(x.y);
  }
}

// A block takes a row at a time; its warps share the row's heads of q (if it is to be rotated), k and v.
template <Dtype D, class X, bool ROPE>
__global__ void __launch_bounds__(256) write_kernel(const float* q, const X* k, const X* v, const float* angles, Out rotated_q, int heads, Step step, Cache cache, Size rows) {
  const int count = rows.get(), sequences = step.sequences.get(), columns = step.columns.get();
  const int dim = cache.dim, kv = cache.heads;
  const int64_t bytes = head_bytes<D>(dim);
  await_inputs();
  let_next_start();
  for (int row = blockIdx.x; row < count; row += gridDim.x) {
    // Segments need not be in order, and rows may belong to none.
    int sequence = -1;
    for (int base = 0; base < sequences && sequence < 0; base += 32) {
      const int s = base + lane_id();
      const unsigned holds = __ballot_sync(~0u, s < sequences && static_cast<unsigned>(row - step.segments[s * 3]) < static_cast<unsigned>(step.segments[s * 3 + 1]));
      if (holds) sequence = base + __ffs(holds) - 1;
    }
    uint8_t *keys = nullptr, *values = nullptr;
    int t = 0;
    if (sequence >= 0) {
      const Segment segment = step.segment(sequence);
      const int position = segment.position + row - segment.first, page = position / BLOCK_TOKENS;
      const int32_t block = page < columns ? step.pages[static_cast<int64_t>(sequence) * columns + page] : -1;
      t = position % BLOCK_TOKENS;
      if (static_cast<unsigned>(block) < static_cast<unsigned>(step.blocks)) {
        keys = static_cast<uint8_t*>(cache.keys) + static_cast<int64_t>(block) * kv * bytes;
        values = static_cast<uint8_t*>(cache.values) + static_cast<int64_t>(block) * kv * bytes;
      } else if (threadIdx.x == 0) {
        report(step.faults, Fault::PAGE, block, step.blocks);
      }
    }
    const int turned = ROPE ? heads : 0;
    for (int task = warp_id(); task < turned + 2 * kv; task += blockDim.x / 32) {
      for (int g = 0; g < dim; g += GROUP) {
        const int d = g + 2 * lane_id();
        const float2 angle = ROPE && task < turned + kv ? pair_at(angles + static_cast<int64_t>(row) * dim, d, dim) : float2{1, 0};
        if (task < turned) {
          const int64_t at = (static_cast<int64_t>(row) * heads + task) * dim;
          const float2 x = rotated(pair_at(q + at, d, dim), angle);
          if (d + 1 < dim) rotated_q.put2(at + d, x.x, x.y);
        } else {
          const int h = (task - turned) % kv;
          const bool key = task - turned < kv;
          float2 x = pair_at((key ? k : v) + (static_cast<int64_t>(row) * kv + h) * dim, d, dim);
          if (ROPE && key) x = rotated(x, angle);
          if (keys) put<D>((key ? keys : values) + h * bytes, t, g, dim, x);
        }
      }
    }
  }
}

template <class X, bool ROPE>
void write(const Tensor* q, const Tensor& k, const Tensor& v, const Tensor* angles, const Tensor* y, const Tensor& keys, const Tensor& values, const Tensor& segments, const Tensor& pages, Launch& launch) {
  const Cache cache = cache_of(keys, values);
  const Step step = step_of(keys, segments, pages, launch.faults);
  const int heads = q ? q->width() / cache.dim : 0;
  const int grid = k.most[0] < launch.multiprocessors * 8 ? k.most[0] : launch.multiprocessors * 8;
  with_format(keys.dtype, [&](auto d) {
    launch(write_kernel<d.value, X, ROPE>, grid, 256, 0, q ? q->as<float>() : nullptr, k.as<X>(), v.as<X>(), angles ? angles->as<float>() : nullptr, y ? out_of(*y) : Out{}, heads, step, cache, k.rows());
  });
}

}  // namespace

void paged_write(const Operands& o, Launch& launch) {
  if (o.in(0).dtype == BF16) write<bf16, false>(nullptr, o.in(0), o.in(1), nullptr, nullptr, o.in(2), o.in(3), o.in(4), o.in(5), launch);
  else write<float, false>(nullptr, o.in(0), o.in(1), nullptr, nullptr, o.in(2), o.in(3), o.in(4), o.in(5), launch);
}

void rope_write(const Operands& o, Launch& launch) {
  write<float, true>(&o.in(0), o.in(1), o.in(2), &o.in(3), &o.out(0), o.in(4), o.in(5), o.in(6), o.in(7), launch);
}

}  // namespace cuda::attention
