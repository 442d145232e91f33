// The router of a mixture of experts: logits, and the choice of a row's experts; for a few rows in one kernel with the norm before it.
#pragma once
#include "cluster.cuh"
#include "reduce.cuh"

namespace cuda {
namespace {

constexpr int MAX_EXPERTS = 4096;

// ---- The choice of experts

// Larger floats have larger keys, and every key is above 0, that of no expert. NaN has one as well, so that a choice is always made.
__device__ __forceinline__ uint32_t rank_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return max(1u, bits & 0x80000000u ? ~bits : bits | 0x80000000u);
}

__device__ __forceinline__ float of_rank_key(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The softmax of a row's logits, the k best by probability plus bias, ties by lower index, and their normalised probabilities; by one warp, whose lanes
// hold the experts lane, lane + 32, ... (N at most).
template <int N>
__device__ void choose(const float* logits, const float* bias, int count, int k, float norm_min, int32_t* experts, float* weights) {
  constexpr int UNROLL = N <= 8 ? N : 1;
  const int lane = threadIdx.x % 32;
  float p[N];
  uint32_t keys[N], most = 0;
#pragma unroll UNROLL
  for (int i = 0; i < N; i++) {
    const bool in = lane + 32 * i < count;
    p[i] = in ? logits[lane + 32 * i] : 0.f;
    most = max(most, in ? rank_key(p[i]) : 0u);
  }
  const float top = of_rank_key(__reduce_max_sync(~0u, most));
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
  float kept = 0, mine = 0;
  int place = 0;  // lane j % 32 remembers the j-th choice until the sum is known
  for (int j = 0; j < k; j++) {
    uint32_t best = 0;
#pragma unroll UNROLL
    for (int i = 0; i < N; i++) best = max(best, keys[i]);
    best = __reduce_max_sync(~0u, best);
    int expert = 0;
    float found = 0;
#pragma unroll UNROLL
    for (int i = N - 1; i >= 0; i--) {
      const uint32_t who = __ballot_sync(~0u, keys[i] == best);
      if (who) expert = __ffs(static_cast<int>(who)) - 1 + 32 * i;
    }
#pragma unroll UNROLL
    for (int i = 0; i < N; i++)
      if (expert / 32 == i) {
        found = p[i];
        if (expert % 32 == lane) keys[i] = 0;
      }
    found = __shfl_sync(~0u, found, expert % 32);
    kept += found;
    if (lane == j % 32) place = expert, mine = found;
    if (j % 32 == 31 || j == k - 1) {
      const int at = j / 32 * 32 + lane;
      if (at <= j) experts[at] = place, weights[at] = mine;
    }
  }
  const float by = fmaxf(kept, norm_min);
  if (k <= 32) {
    if (lane < k) weights[lane] = mine / by;
  } else {
    for (int at = lane; at < k; at += 32) weights[at] /= by;
  }
}

// Calls f with the number of experts per lane that `choose` is compiled for. The last one keeps its numbers in memory.
template <class F>
void with_lanes(int experts, F f) {
  if (experts > MAX_EXPERTS) throw std::runtime_error("route: more than 4096 experts");
  if (experts <= 64) f(std::integral_constant<int, 2>{});
  else if (experts <= 256) f(std::integral_constant<int, 8>{});
  else f(std::integral_constant<int, MAX_EXPERTS / 32>{});
}

// ---- Norm and router of a few rows in one kernel

struct NormRoute {
  const float *a, *b;  // b may be null: then there is no sum
  const float *weight, *gate, *bias;  // weight may be null: then there is no norm
  float* sum;
  Numbers normed;
  float* logits;
  int32_t* experts;
  float* weights;
  int32_t* arrived;  // per row; only without clusters
  Size rows;
  int hidden, count, k;
  float eps, norm_min;
};

// The part of a row that a thread holds: C vectors of V numbers.
template <int V, int C>
struct Held {
  Vec<V> x[C], weight[C];
  static __device__ __forceinline__ int column(int c) { return (c * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * V; }

  // What does not depend on the kernel before.
  __device__ __forceinline__ void load_weight(const NormRoute& p) {
#pragma unroll
    for (int c = 0; c < C; c++) {
#pragma unroll
      for (int v = 0; v < V; v++) weight[c].at[v] = 1;
      if (column(c) < p.hidden && p.weight) weight[c] = load<V>({const_cast<float*>(p.weight), F32}, column(c));
    }
  }
  __device__ __forceinline__ void load_row(const NormRoute& p, int64_t from) {
#pragma unroll
    for (int c = 0; c < C; c++) {
      x[c] = {};
      if (column(c) >= p.hidden) continue;
      x[c] = load<V>({const_cast<float*>(p.a), F32}, from + column(c));
      if (!p.b) continue;
      const Vec<V> b = load<V>({const_cast<float*>(p.b), F32}, from + column(c));
#pragma unroll
      for (int v = 0; v < V; v++) x[c].at[v] += b.at[v];
    }
  }
  // Products with E experts, then the sum of squares, over the block: lane e of warp 0 gets the e-th.
  template <int E>
  __device__ __forceinline__ float products(const Vec<V> (&g)[E][C], float (*shared)[E + 1]) const {
    float sums[E + 1] = {};
#pragma unroll
    for (int c = 0; c < C; c++)
#pragma unroll
      for (int v = 0; v < V; v++) {
        sums[E] += x[c].at[v] * x[c].at[v];
        const float y = x[c].at[v] * weight[c].at[v];
#pragma unroll
        for (int e = 0; e < E; e++) sums[e] += y * g[e][c].at[v];
      }
#pragma unroll
    for (int e = 0; e <= E; e++) sums[e] = warp_sum(sums[e]);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) {
#pragma unroll
      for (int e = 0; e <= E; e++) shared[warp][e] = sums[e];
    }
    __syncthreads();
    float total = 0;
    if (warp == 0 && lane <= E)
      for (int i = 0; i < static_cast<int>(blockDim.x) / 32; i++) total += shared[i][lane];
    return total;
  }
  // Columns [begin, end) of the sum and of the norm.
  __device__ __forceinline__ void write(const NormRoute& p, int64_t from, float scale, int begin, int end) const {
#pragma unroll
    for (int c = 0; c < C; c++) {
      if (column(c) < begin || column(c) >= end) continue;
      if (p.sum) store<V>({p.sum, F32}, from + column(c), x[c]);
      if (!p.normed.data) continue;
      Vec<V> y;
#pragma unroll
      for (int v = 0; v < V; v++) y.at[v] = weight[c].at[v] * (x[c].at[v] * scale);
      store<V>(p.normed, from + column(c), y);
    }
  }
};

template <int V, int C, int E>
__device__ __forceinline__ void load_gates(const NormRoute& p, Vec<V> (&g)[E][C], int e0, int end) {
#pragma unroll
  for (int c = 0; c < C; c++)
#pragma unroll
    for (int e = 0; e < E; e++) {
      g[e][c] = {};
      if (Held<V, C>::column(c) < p.hidden && e0 + e < end) g[e][c] = load<V>({const_cast<float*>(p.gate), F32}, static_cast<int64_t>(e0 + e) * p.hidden + Held<V, C>::column(c));
    }
}

// A row a cluster; each block has an eighth of the experts, at most 8, and computes the row's norm on the side. The first block chooses. The sum and the
// norm may overwrite a or b: they are written when every block has read these.
template <int V, int C>
__global__ void MIXTAPE_CLUSTER __launch_bounds__(512) norm_route_cluster(NormRoute p) {
  constexpr int E = 8;
  __shared__ float shared[16][E + 1], logits[64], bias[64], scale_of;
  let_next_start();
  cluster_arrive();  // no block may write to another before that has started
  const int r = blockIdx.y, rank = blockIdx.x, each = (p.count + CLUSTER - 1) / CLUSTER, e0 = rank * each, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Held<V, C> held;
  Vec<V> g[E][C];
  load_gates<V, C, E>(p, g, e0, min(p.count, e0 + each));
  held.load_weight(p);
  for (int e = threadIdx.x; rank == 0 && e < p.count; e += blockDim.x) bias[e] = p.bias[e];
  const int rows = p.rows.get();
  await_inputs();
  if (r >= rows) return cluster_wait();
  const int64_t from = static_cast<int64_t>(r) * p.hidden;
  held.load_row(p, from);
  const float total = held.template products<E>(g, shared);
  cluster_wait();
  if (warp == 0) {
    const float scale = p.weight ? 1 / sqrtf(__shfl_sync(~0u, total, E) / static_cast<float>(p.hidden) + p.eps) : 1.f;
    if (lane < each && e0 + lane < p.count) {
      p.logits[static_cast<int64_t>(r) * p.count + e0 + lane] = total * scale;
      remote_store(logits + e0 + lane, 0, total * scale);
    }
    if (lane == 0) scale_of = scale;
  }
  cluster_arrive();
  cluster_wait();
  const int width = (p.hidden / V + CLUSTER - 1) / CLUSTER * V;
  held.write(p, from, scale_of, rank * width, min(p.hidden, (rank + 1) * width));
  if (rank == 0 && warp == static_cast<int>(blockDim.x) / 32 - 1)
    choose<2>(logits, bias, p.count, p.k, p.norm_min, p.experts + static_cast<int64_t>(r) * p.k, p.weights + static_cast<int64_t>(r) * p.k);
}

// Without clusters, or with more experts: a block has E experts of a row, and the last block of a row to finish chooses and writes.
template <int V, int C, int E, int N>
__global__ void __launch_bounds__(512) norm_route_kernel(NormRoute p) {
  __shared__ float shared[16][E + 1], scale_of;
  __shared__ bool last;
  let_next_start();
  const int r = blockIdx.y, e0 = blockIdx.x * E, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Held<V, C> held;
  Vec<V> g[E][C];
  load_gates<V, C, E>(p, g, e0, p.count);
  held.load_weight(p);
  const int rows = p.rows.get();
  await_inputs();
  if (r >= rows) return;
  const int64_t from = static_cast<int64_t>(r) * p.hidden;
  held.load_row(p, from);
  const float total = held.template products<E>(g, shared);
  if (warp == 0) {
    const float scale = p.weight ? 1 / sqrtf(__shfl_sync(~0u, total, E) / static_cast<float>(p.hidden) + p.eps) : 1.f;
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
  held.write(p, from, scale_of, 0, p.hidden);
  if (warp == static_cast<int>(blockDim.x) / 32 - 1)
    choose<N>(p.logits + static_cast<int64_t>(r) * p.count, p.bias, p.count, p.k, p.norm_min, p.experts + static_cast<int64_t>(r) * p.k, p.weights + static_cast<int64_t>(r) * p.k);
}

constexpr int FEW_ROWS = 16;

// Returns whether the shape is one that these kernels are made for.
bool norm_route(NormRoute p, int most, bool vectors, Launch& launch) {
  most = std::max(1, most);
  const int columns = vectors ? p.hidden / 4 : p.hidden;
  if (most > FEW_ROWS || columns > 4 * 512 || p.count > 256) return false;
  const bool narrow = columns <= 2 * 512;
  const int threads = std::max(32, ceil_div(ceil_div(columns, narrow ? 2 : 4), 32) * 32);
  if (launch.architecture >= 90 && narrow && p.count <= 64 && most <= 4) {
    if (vectors) launch(norm_route_cluster<4, 2>, dim3(CLUSTER, most), dim3(threads), 0, p);
    else launch(norm_route_cluster<1, 2>, dim3(CLUSTER, most), dim3(threads), 0, p);
    return true;
  }
  p.arrived = launch.counters(most);
  // With few rows, a block for each expert; with more, about as many blocks as multiprocessors.
  const bool wide = most > 4 && narrow;
  auto run = [&](auto kernel) { launch(kernel, dim3(ceil_div(p.count, wide ? 8 : 1), most), dim3(threads), 0, p); };
  auto with_choice = [&](auto lanes) {
    constexpr int N = decltype(lanes)::value;
    if (wide) vectors ? run(norm_route_kernel<4, 2, 8, N>) : run(norm_route_kernel<1, 2, 8, N>);
    else if (narrow) vectors ? run(norm_route_kernel<4, 2, 1, N>) : run(norm_route_kernel<1, 2, 1, N>);
    else vectors ? run(norm_route_kernel<4, 4, 1, N>) : run(norm_route_kernel<1, 4, 1, N>);
  };
  if (p.count <= 64) with_choice(std::integral_constant<int, 2>{});
  else with_choice(std::integral_constant<int, 8>{});
  return true;
}

}  // namespace
}  // namespace cuda
