// The router of a mixture of experts: logits, and the choice of a row's experts; for a few rows in one kernel with the norm before it.
#pragma once
#include "reduce.cuh"

namespace cuda {
namespace {

constexpr int MAX_EXPERTS = 4096;

// ---- The choice of experts

// Larger floats have larger keys, and every key is above 0, that of a taken expert. NaN has one as well, so that a choice is always made.
__device__ __forceinline__ uint32_t rank_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return max(1u, bits & 0x80000000u ? ~bits : bits | 0x80000000u);
}

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, x);
#else
  return x;
#endif
}

// The softmax of a row's logits, the k best by probability plus bias, ties by lower index, and their normalised probabilities; by one warp, whose lanes
// hold the experts lane, lane + 32, ... (N at most).
template <int N>
__device__ void choose(const float* logits, const float* bias, int count, int k, float norm_min, int32_t* experts, float* weights) {
  constexpr int UNROLL = N <= 8 ? N : 1;
  const int lane = threadIdx.x % 32;
  float p[N];
  uint32_t keys[N];
  float top = -INFINITY;
#pragma unroll UNROLL
  for (int i = 0; i < N; i++) {
    p[i] = lane + 32 * i < count ? __ldcg(logits + lane + 32 * i) : -INFINITY;
    top = fmaxf(top, p[i]);
  }
#pragma unroll
  for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
  float total = 0;
#pragma unroll UNROLL
  for (int i = 0; i < N; i++) {
    p[i] = lane + 32 * i < count ? expf(p[i] - top) : 0.f;
    total += p[i];
  }
  total = warp_sum(total);
#pragma unroll UNROLL
  for (int i = 0; i < N; i++) {
    p[i] /= total;
    keys[i] = lane + 32 * i < count ? rank_key(p[i] + bias[lane + 32 * i]) : 0;
  }
  float kept = 0;
  int mine = 0;  // lane j % 32 remembers the j-th choice until the sum is known
  float weight = 0;
  for (int j = 0; j < k; j++) {
    uint32_t best = 0;
#pragma unroll UNROLL
    for (int i = 0; i < N; i++) best = max(best, keys[i]);
    best = warp_max(best);
    int expert = 0;
    float found = 0;
    bool open = true;
#pragma unroll UNROLL
    for (int i = 0; i < N; i++) {
      const uint32_t who = open ? __ballot_sync(~0u, keys[i] == best) : 0;
      if (!who) continue;
      open = false;
      const int owner = __ffs(static_cast<int>(who)) - 1;
      expert = owner + 32 * i;
      found = __shfl_sync(~0u, p[i], owner);
      if (lane == owner) keys[i] = 0;
    }
    kept += found;
    if (lane == j % 32) mine = expert, weight = found;
    if (j % 32 == 31 || j == k - 1) {
      const int at = j / 32 * 32 + lane;
      if (at <= j) experts[at] = mine, weights[at] = weight;
    }
  }
  const float by = fmaxf(kept, norm_min);
  for (int at = lane; at < k; at += 32) weights[at] /= by;
}

// Calls f with the number of experts per lane that `choose` is compiled for. The last one keeps its numbers in memory.
template <class F>
void with_lanes(int experts, F f) {
  if (experts > MAX_EXPERTS) throw std::runtime_error("route: more than 4096 experts");
  if (experts <= 64) f(std::integral_constant<int, 2>{});
  else if (experts <= 256) f(std::integral_constant<int, 8>{});
  else f(std::integral_constant<int, MAX_EXPERTS / 32>{});
}

// A warp a row.
template <int N>
__global__ void __launch_bounds__(128) choose_kernel(const float* logits, const float* bias, Size rows, int experts, int k, float norm_min, int32_t* chosen, float* weights) {
  let_next_start();
  const int count = rows.get();
  await_inputs();
  const int r = blockIdx.x * 4 + threadIdx.x / 32;
  if (r < count) choose<N>(logits + static_cast<int64_t>(r) * experts, bias, experts, k, norm_min, chosen + static_cast<int64_t>(r) * k, weights + static_cast<int64_t>(r) * k);
}

// ---- Logits

// Many rows: tiles of 64 rows by 64 experts in float32. Of every 64 columns, each of four groups of 64 threads sums a quarter, 8 x 8 products a thread,
// and the groups' sums are added in order.
constexpr int TILE = 64, PITCH = TILE + 4;

__global__ void __launch_bounds__(256) logits_kernel(const float* x, const float* gate, float* logits, Size rows, int experts, int hidden) {
  extern __shared__ float shared[];  // [2][64 columns][PITCH], then the sums of three groups
  let_next_start();
  const int count = rows.get(), r0 = blockIdx.x * TILE, e0 = blockIdx.y * TILE;
  await_inputs();
  if (r0 >= count) return;
  float *xs = shared, *gs = shared + TILE * PITCH;
  const int group = threadIdx.x / 64, t = threadIdx.x % 64, tr = t / 8, te = t % 8;
  float sums[8][8] = {};
  // A thread carries 16 numbers of a row of x and of gate from memory to the tile of the next turn.
  const int own = threadIdx.x / 4, part = threadIdx.x % 4 * 16;
  float a[16], b[16];
  auto fetch = [&](int k0) {
    const bool has_row = r0 + own < count, has_expert = e0 + own < experts;
    const float *from = x + static_cast<int64_t>(r0 + own) * hidden, *with = gate + static_cast<int64_t>(e0 + own) * hidden;
#pragma unroll
    for (int j = 0; j < 16; j += 4) {
      const int c = k0 + part + j;
      if (hidden % 4 == 0) {
        const bool in = c < hidden;
        const float4 u = in && has_row ? *reinterpret_cast<const float4*>(from + c) : float4{}, v = in && has_expert ? *reinterpret_cast<const float4*>(with + c) : float4{};
        a[j] = u.x, a[j + 1] = u.y, a[j + 2] = u.z, a[j + 3] = u.w;
        b[j] = v.x, b[j + 1] = v.y, b[j + 2] = v.z, b[j + 3] = v.w;
      } else {
#pragma unroll
        for (int i = j; i < j + 4; i++) {
          const bool in = k0 + part + i < hidden;
          a[i] = in && has_row ? from[k0 + part + i] : 0.f;
          b[i] = in && has_expert ? with[k0 + part + i] : 0.f;
        }
      }
    }
  };
  fetch(0);
  for (int k0 = 0; k0 < hidden; k0 += 64) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 16; j++) xs[(part + j) * PITCH + own] = a[j], gs[(part + j) * PITCH + own] = b[j];
    __syncthreads();
    if (k0 + 64 < hidden) fetch(k0 + 64);
#pragma unroll 4
    for (int k = group * 16; k < group * 16 + 16; k++) {
      float u[8], v[8];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        *reinterpret_cast<float4*>(u + i) = *reinterpret_cast<const float4*>(xs + k * PITCH + i / 4 * 32 + tr * 4);
        *reinterpret_cast<float4*>(v + i) = *reinterpret_cast<const float4*>(gs + k * PITCH + i / 4 * 32 + te * 4);
      }
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sums[i][j] += u[i] * v[j];
    }
  }
  for (int g = 3; g > 0; g--) {
    __syncthreads();
    if (group == g) {
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) shared[(i * 8 + j) * 64 + t] = sums[i][j];
    }
    __syncthreads();
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sums[i][j] += shared[(i * 8 + j) * 64 + t];
    }
  }
  if (group) return;
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int r = r0 + i / 4 * 32 + tr * 4 + i % 4, e = e0 + j / 4 * 32 + te * 4 + j % 4;
      if (r < count && e < experts) logits[static_cast<int64_t>(r) * experts + e] = sums[i][j];
    }
}

// ---- Norm and router of a few rows in one kernel

struct NormRoute {
  const float *a, *b;  // b may be null: then there is no sum
  const float *weight, *gate, *bias;  // weight may be null: then there is no norm
  float *sum, *normed, *logits;
  int32_t* experts;
  float* weights;
  int32_t* arrived;  // per row
  Size rows;
  int hidden, count, k;
  float eps, norm_min;
};

// A block has E experts of a row (blockIdx.y) and computes the row's norm on the side; the row's last block to finish chooses, and writes the sum
// and the norm, which may overwrite a or b, as every other block has read them. Everything that does not depend on the kernel before is loaded first.
// C: numbers of a row that a thread holds, in vectors of V.
template <int V, int C, int E, int N>
__global__ void __launch_bounds__(512) norm_route_kernel(NormRoute p) {
  __shared__ float shared[16][E + 1];
  __shared__ float scale_of;
  __shared__ bool last;
  let_next_start();
  const int r = blockIdx.y, e0 = blockIdx.x * E, hidden = p.hidden;
  auto column = [&](int c) { return (c * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * V; };
  Vec<V> g[E][C], w[C], x[C];
#pragma unroll
  for (int c = 0; c < C; c++) {
    const bool in = column(c) < hidden;
#pragma unroll
    for (int e = 0; e < E; e++) {
      g[e][c] = {};
      if (in && e0 + e < p.count) g[e][c] = load<V>({const_cast<float*>(p.gate), F32}, static_cast<int64_t>(e0 + e) * hidden + column(c));
    }
#pragma unroll
    for (int v = 0; v < V; v++) w[c].at[v] = 1;
    if (in && p.weight) w[c] = load<V>({const_cast<float*>(p.weight), F32}, column(c));
  }
  const int rows = p.rows.get();
  await_inputs();
  if (r >= rows) return;
  const int64_t from = static_cast<int64_t>(r) * hidden;
  float sums[E + 1] = {};  // products with the experts, and the squares
#pragma unroll
  for (int c = 0; c < C; c++) {
    x[c] = {};
    if (column(c) < hidden) {
      x[c] = load<V>({const_cast<float*>(p.a), F32}, from + column(c));
      if (p.b) {
        const Vec<V> b = load<V>({const_cast<float*>(p.b), F32}, from + column(c));
#pragma unroll
        for (int v = 0; v < V; v++) x[c].at[v] += b.at[v];
      }
    }
#pragma unroll
    for (int v = 0; v < V; v++) {
      sums[E] += x[c].at[v] * x[c].at[v];
      const float y = x[c].at[v] * w[c].at[v];
#pragma unroll
      for (int e = 0; e < E; e++) sums[e] += y * g[e][c].at[v];
    }
  }
#pragma unroll
  for (int e = 0; e <= E; e++) sums[e] = warp_sum(sums[e]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) {
#pragma unroll
    for (int e = 0; e <= E; e++) shared[warp][e] = sums[e];
  }
  __syncthreads();
  if (warp == 0) {
    float total = 0;
    if (lane <= E)
      for (int i = 0; i < warps; i++) total += shared[i][lane];
    const float scale = p.weight ? 1 / sqrtf(__shfl_sync(~0u, total, E) / static_cast<float>(hidden) + p.eps) : 1.f;
    if (lane < E && e0 + lane < p.count) p.logits[static_cast<int64_t>(r) * p.count + e0 + lane] = total * scale;
    __syncwarp();
    if (lane == 0) {
      __threadfence();
      last = atomicAdd(p.arrived + r, 1) == static_cast<int>(gridDim.x) - 1;
      if (last) p.arrived[r] = 0;
      __threadfence();
      scale_of = scale;
    }
  }
  __syncthreads();
  if (!last) return;
  const float scale = scale_of;
#pragma unroll
  for (int c = 0; c < C; c++) {
    if (column(c) >= hidden) continue;
    if (p.sum) store<V>({p.sum, F32}, from + column(c), x[c]);
    if (!p.normed) continue;
    Vec<V> y;
#pragma unroll
    for (int v = 0; v < V; v++) y.at[v] = w[c].at[v] * (x[c].at[v] * scale);
    store<V>({p.normed, F32}, from + column(c), y);
  }
  if (warp == warps - 1) choose<N>(p.logits + static_cast<int64_t>(r) * p.count, p.bias, p.count, p.k, p.norm_min, p.experts + static_cast<int64_t>(r) * p.k, p.weights + static_cast<int64_t>(r) * p.k);
}

constexpr int FEW_ROWS = 16;

// Returns whether the shape is one that the kernel is made for.
bool norm_route(NormRoute p, int most, bool vectors, Launch& launch) {
  const int columns = vectors ? p.hidden / 4 : p.hidden;
  if (most > FEW_ROWS || columns > 4 * 512 || p.count > 256) return false;
  p.arrived = launch.counters(std::max(1, most));
  const int each = columns <= 2 * 512 ? 2 : 4, threads = std::max(32, ceil_div(ceil_div(columns, each), 32) * 32);
  // About as many blocks as multiprocessors: with few rows, one expert a block.
  const bool wide = most > 4;
  const dim3 grid(ceil_div(p.count, wide ? (each == 2 ? 8 : 2) : 1), std::max(1, most));
  with_lanes(p.count, [&](auto lanes) {
    constexpr int N = decltype(lanes)::value <= 8 ? decltype(lanes)::value : 8;
    auto run = [&](auto kernel) { launch(kernel, grid, dim3(threads), 0, p); };
    if (vectors && each == 2) wide ? run(norm_route_kernel<4, 2, 8, N>) : run(norm_route_kernel<4, 2, 1, N>);
    else if (vectors) wide ? run(norm_route_kernel<4, 4, 2, N>) : run(norm_route_kernel<4, 4, 1, N>);
    else if (each == 2) wide ? run(norm_route_kernel<1, 2, 8, N>) : run(norm_route_kernel<1, 2, 1, N>);
    else wide ? run(norm_route_kernel<1, 4, 2, N>) : run(norm_route_kernel<1, 4, 1, N>);
  });
  return true;
}

void route_many(const float* x, const Tensor& gate, const float* bias, const Tensor& logits, const Tensor& experts, float* weights, float norm_min, Launch& launch) {
  const int count = gate.most[0], hidden = gate.most[1], k = experts.most[1], most = std::max(1, logits.most[0]);
  launch(logits_kernel, dim3(ceil_div(most, TILE), ceil_div(count, TILE)), dim3(256), 2 * TILE * PITCH * sizeof(float), x, gate.as<float>(), logits.as<float>(), logits.rows(), count, hidden);
  with_lanes(count, [&](auto lanes) {
    launch(choose_kernel<decltype(lanes)::value>, dim3(ceil_div(most, 4)), dim3(128), 0, logits.as<float>(), bias, logits.rows(), count, k, norm_min, experts.as<int32_t>(), weights);
  });
}

void expect_f32(const Operands& o, int inputs) {
  for (int i = 0; i < inputs; i++)
    if (o.in(i).dtype != F32) throw std::runtime_error("internal: a router's operand is not float32");
}

void route(const Operands& o, Launch& launch) {
  expect_f32(o, 3);
  const Tensor &x = o.in(0), &gate = o.in(1), &logits = o.out(0), &experts = o.out(1);
  const float norm_min = static_cast<float>(o.params[1]);
  NormRoute p{};
  p.a = x.as<float>(), p.gate = gate.as<float>(), p.bias = o.in(2).as<float>();
  p.logits = logits.as<float>(), p.experts = experts.as<int32_t>(), p.weights = o.out(2).as<float>();
  p.rows = x.rows(), p.hidden = gate.most[1], p.count = gate.most[0], p.k = experts.most[1], p.norm_min = norm_min;
  if (norm_route(p, x.most[0], p.hidden % 4 == 0 && aligned(numbers(x), numbers(gate)), launch)) return;
  route_many(p.a, gate, p.bias, logits, experts, p.weights, norm_min, launch);
}

struct RowSum {
  Numbers a, b;
  int32_t n;
  template <int V>
  __device__ Vec<V> at(int r, int c) const {
    const int64_t i = static_cast<int64_t>(r) * n + c;
    Vec<V> x = load<V>(a, i);
    const Vec<V> y = load<V>(b, i);
#pragma unroll
    for (int v = 0; v < V; v++) x.at[v] += y.at[v];
    return x;
  }
};

// addRmsNormRoute(a, b, weight, gate, bias; eps, k, normMin) -> sum, normed, logits, experts, weights
void add_rms_norm_route(const Operands& o, Launch& launch) {
  expect_f32(o, 5);
  const Tensor &a = o.in(0), &b = o.in(1), &weight = o.in(2), &gate = o.in(3), &sum = o.out(0), &normed = o.out(1), &logits = o.out(2), &experts = o.out(3);
  const float eps = static_cast<float>(o.params[0]), norm_min = static_cast<float>(o.params[2]);
  const NormRoute p{a.as<float>(),      b.as<float>(),      weight.as<float>(),    gate.as<float>(),     o.in(4).as<float>(), sum.as<float>(), normed.as<float>(),
                    logits.as<float>(), experts.as<int32_t>(), o.out(4).as<float>(), nullptr, a.rows(), gate.most[1], gate.most[0], experts.most[1], eps, norm_min};
  const bool vectors = p.hidden % 4 == 0 && aligned(numbers(a), numbers(b), numbers(weight), numbers(gate), numbers(sum), numbers(normed));
  if (norm_route(p, a.most[0], vectors, launch)) return;
  norm(RowSum{numbers(a), numbers(b), p.hidden}, weight, &sum, normed, eps, aligned(numbers(a), numbers(b)), launch);
  route_many(p.normed, gate, p.bias, logits, experts, p.weights, norm_min, launch);
}

}  // namespace
}  // namespace cuda
