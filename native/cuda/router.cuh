// The router of a mixture of experts: logits, and the choice of a row's experts; for a few rows in one kernel with the norm before it.
// Over 500 lines, because its two ways share the choice.
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

constexpr int CHOOSE_WARPS = 4;

// A warp a row. The logits are the sums of `splits` parts [splits, most rows, experts], if there are several.
template <int N>
__global__ void __launch_bounds__(32 * CHOOSE_WARPS) choose_kernel(const float* parts, int splits, int64_t part, float* logits, const float* bias, Size rows, int experts, int k, float norm_min,
                                                                      int32_t* chosen, float* weights) {
  let_next_start();
  const int count = rows.get(), r = blockIdx.x * CHOOSE_WARPS + threadIdx.x / 32;
  await_inputs();
  if (r >= count) return;
  float* own = logits + static_cast<int64_t>(r) * experts;
  if (splits > 1) {
    for (int e = threadIdx.x % 32; e < experts; e += 32) {
      float sum = 0;
#pragma unroll 8
      for (int s = 0; s < splits; s++) sum += parts[s * part + static_cast<int64_t>(r) * experts + e];
      own[e] = sum;
    }
    __syncwarp();
  }
  choose<N>(own, bias, experts, k, norm_min, chosen + static_cast<int64_t>(r) * k, weights + static_cast<int64_t>(r) * k);
}

// ---- Logits of many rows

// Tiles of 64 rows by 64 experts on the matrix units, as exact as float32: each number is the sum of two tf32 numbers, of whose products only that of the
// two small ones is left out (2^-22 of the whole), and sums of 64 columns are added in float32, because the units' own sums are truncated. Of a chunk of
// 64 columns, a warp multiplies 16 with 32 rows. Experts are split once, on the way to shared memory. A lane's four consecutive columns of a row are
// columns t and t + 4 of two steps of 8; which column is which does not matter, as both operands agree.
constexpr int TILE = 64, PITCH = TILE + 16, LOGITS_THREADS = 256, MOST_SPLITS = 20;
constexpr size_t LOGITS_SHARED = 4 * TILE * PITCH * sizeof(float);  // two buffers of large and small parts

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four numbers of a row from column c on; zeros beyond its end.
template <bool VECTORS>
__device__ __forceinline__ float4 columns(const float* row, int c, int end) {
  if constexpr (VECTORS) return c < end ? *reinterpret_cast<const float4*>(row + c) : float4{};
  return make_float4(c < end ? row[c] : 0.f, c + 1 < end ? row[c + 1] : 0.f, c + 2 < end ? row[c + 2] : 0.f, c + 3 < end ? row[c + 3] : 0.f);
}

// Block z of the grid has `chunks` chunks of columns, and writes part z.
template <bool VECTORS>
__global__ void __launch_bounds__(LOGITS_THREADS) logits_kernel(const float* x, const float* gate, float* parts, int64_t part, Size rows, int experts, int hidden, int chunks) {
  extern __shared__ __align__(16) float shared[];
  let_next_start();
  const int count = rows.get(), r0 = blockIdx.x * TILE, e0 = blockIdx.y * TILE, first = blockIdx.z * chunks * 64, end = min(hidden, first + chunks * 64);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, half = warp % 2, quarter = warp / 2;
  float4 next_gate[4], next_x[2][2];
  auto fetch_gate = [&](int k0) {
    const int e = e0 + static_cast<int>(threadIdx.x) / 4;
#pragma unroll
    for (int j = 0; j < 4; j++)
      next_gate[j] = e < experts ? columns<VECTORS>(gate + static_cast<int64_t>(e) * hidden, k0 + j * 16 + static_cast<int>(threadIdx.x) % 4 * 4, end) : float4{};
  };
  auto fetch_x = [&](int k0) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int r = r0 + half * 32 + m * 16 + h * 8 + g;
        next_x[m][h] = r < count ? columns<VECTORS>(x + static_cast<int64_t>(r) * hidden, k0 + quarter * 16 + t * 4, end) : float4{};
      }
  };
  fetch_gate(first);
  await_inputs();
  if (r0 >= count || first >= hidden) return;
  fetch_x(first);
  float sums[2][8][4] = {}, c[2][8][4] = {};
  int turn = 0;
  for (int k0 = first; k0 < end; k0 += 64, turn++) {
    float *large = shared + turn % 2 * 2 * TILE * PITCH, *small = large + TILE * PITCH;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int at = static_cast<int>(threadIdx.x) / 4 * PITCH + j * 16 + static_cast<int>(threadIdx.x) % 4 * 4;
      const float v[4] = {next_gate[j].x, next_gate[j].y, next_gate[j].z, next_gate[j].w};
      uint32_t a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = to_tf32(v[i]), b[i] = to_tf32(v[i] - __uint_as_float(a[i]));
      *reinterpret_cast<uint4*>(large + at) = make_uint4(a[0], a[1], a[2], a[3]);
      *reinterpret_cast<uint4*>(small + at) = make_uint4(b[0], b[1], b[2], b[3]);
    }
    uint32_t a_large[2][2][4], a_small[2][2][4];  // of two steps of 8 columns
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float v[4] = {next_x[m][h].x, next_x[m][h].y, next_x[m][h].z, next_x[m][h].w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const uint32_t top = to_tf32(v[i]);
          a_large[m][i / 2][i % 2 * 2 + h] = top;
          a_small[m][i / 2][i % 2 * 2 + h] = to_tf32(v[i] - __uint_as_float(top));
        }
      }
    if (k0 + 64 < end) fetch_gate(k0 + 64), fetch_x(k0 + 64);
    __syncthreads();  // one is enough: whoever writes this buffer again has passed the next
#pragma unroll
    for (int n0 = 0; n0 < 8; n0 += 4) {
      uint32_t l[4][4], s[4][4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const int at = ((n0 + n) * 8 + g) * PITCH + quarter * 16 + t * 4;
        *reinterpret_cast<uint4*>(l[n]) = *reinterpret_cast<const uint4*>(large + at);
        *reinterpret_cast<uint4*>(s[n]) = *reinterpret_cast<const uint4*>(small + at);
      }
      // Eight products between two that add to the same sums.
#pragma unroll
      for (int step = 0; step < 6; step++) {
        const int i = step % 2;
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
          for (int m = 0; m < 2; m++) {
            const uint32_t(&b)[4] = step / 2 == 1 ? s[n] : l[n];
            multiply_tf32(c[m][n0 + n], step / 2 == 0 ? a_small[m][i] : a_large[m][i], b[2 * i], b[2 * i + 1]);
          }
      }
    }
    if (turn % 4 == 3 || k0 + 64 >= end) {
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) sums[m][n][i] += c[m][n][i], c[m][n][i] = 0;
    }
  }
  // The quarters' sums, in order.
  __syncthreads();
  float* others = shared + (max(quarter, 1) - 1) * TILE * TILE;
  if (quarter)
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) others[((m * 8 + n) * 4 + i) * 64 + half * 32 + lane] = sums[m][n][i];
  __syncthreads();
  if (quarter) return;
  float* to = parts + blockIdx.z * part;
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float sum = sums[m][n][i];
#pragma unroll
        for (int q = 0; q < 3; q++) sum += shared[q * TILE * TILE + ((m * 8 + n) * 4 + i) * 64 + half * 32 + lane];
        const int r = r0 + half * 32 + m * 16 + i / 2 * 8 + g, e = e0 + n * 8 + t * 2 + i % 2;
        if (r < count && e < experts) to[static_cast<int64_t>(r) * experts + e] = sum;
      }
}

void route_many(const float* x, const Tensor& gate, const float* bias, const Tensor& logits, const Tensor& experts, float* weights, float norm_min, Launch& launch) {
  const int count = gate.most[0], hidden = gate.most[1], k = experts.most[1], most = std::max(1, logits.most[0]);
  const int tiles = ceil_div(most, TILE), across = ceil_div(count, TILE), all = ceil_div(hidden, 64);
  const int chunks = ceil_div(all, std::clamp(launch.multiprocessors / (tiles * across), 1, MOST_SPLITS)), splits = ceil_div(all, chunks);
  const int64_t part = static_cast<int64_t>(most) * count;
  float* parts = splits > 1 ? static_cast<float*>(launch.scratch(static_cast<size_t>(splits * part) * sizeof(float))) : logits.as<float>();
  auto run = [&](auto kernel) {
    launch(kernel, dim3(tiles, across, splits), dim3(LOGITS_THREADS), LOGITS_SHARED, x, gate.as<float>(), parts, part, logits.rows(), count, hidden, chunks);
  };
  if (hidden % 4 == 0 && aligned(Numbers{const_cast<float*>(x), F32}, numbers(gate))) run(logits_kernel<true>);
  else run(logits_kernel<false>);
  with_lanes(count, [&](auto lanes) {
    constexpr int N = decltype(lanes)::value;
    launch(choose_kernel<N>, dim3(ceil_div(most, CHOOSE_WARPS)), dim3(32 * CHOOSE_WARPS), 0, parts, splits, part, logits.as<float>(), bias, logits.rows(), count, k, norm_min, experts.as<int32_t>(), weights);
  });
}

// ---- Norm and router of a few rows in one kernel

struct NormRoute {
  const float *a, *b;  // b may be null: then there is no sum
  const float *weight, *gate, *bias;  // weight may be null: then there is no norm
  float *sum, *normed, *logits;
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
      if (!p.normed) continue;
      Vec<V> y;
#pragma unroll
      for (int v = 0; v < V; v++) y.at[v] = weight[c].at[v] * (x[c].at[v] * scale);
      store<V>({p.normed, F32}, from + column(c), y);
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
