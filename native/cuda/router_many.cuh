// The router of many rows: logits on the matrix units, with the sum and the norm before it if there is one, and a second kernel that chooses and normalises.
#pragma once
#include "router.cuh"

namespace cuda {
namespace {

// Tiles of 64 rows by 64 experts, as exact as float32: each number is the sum of two tf32 numbers, of whose products only that of the two small ones is left
// out (2^-22 of the whole), and sums of 64 columns are added in float32, because the matrix units truncate their own. Of a chunk of 64 columns, a warp
// multiplies 16 with 32 rows. A lane's four consecutive columns of a row are columns t and t + 4 of two steps of 8; which column is which does not
// matter, as both operands agree.
constexpr int TILE = 64, PITCH = TILE + 16, TILE_FLOATS = TILE * PITCH, LOGITS_THREADS = 256, MOST_SPLITS = 20, CHOOSE_WARPS = 4;

struct Logits {
  const float *a, *b;  // b and what follows from it only with a norm
  const float *weight, *gate;
  float *sum, *parts, *squares;  // parts [splits, most rows, experts], squares [splits, most rows]
  Size rows;
  int most, experts, hidden, chunks;  // chunks of columns of a block
};

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void split(const float4& x, uint32_t (&large)[4], uint32_t (&small)[4]) {
  const float v[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) large[i] = to_tf32(v[i]), small[i] = to_tf32(v[i] - __uint_as_float(large[i]));
}

__device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Begins to copy columns [k0, k0 + 64) of 64 rows of a matrix, zeros outside of it. Each thread has 16 numbers.
template <bool VECTORS>
__device__ __forceinline__ void stage(float* tile, const float* from, int row0, int rows, int k0, int end, int width) {
  const int row = static_cast<int>(threadIdx.x) / 4;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int c = j * 16 + static_cast<int>(threadIdx.x) % 4 * 4;
    float* to = tile + row * PITCH + c;
    const float* source = from + static_cast<int64_t>(row0 + row) * width + k0 + c;
    if constexpr (VECTORS) {
      const bool in = row0 + row < rows && k0 + c < end;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(in ? source : from), "r"(in ? 16 : 0) : "memory");
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) to[i] = row0 + row < rows && k0 + c + i < end ? source[i] : 0.f;
    }
  }
}

// Block z of the grid has some chunks of columns, and writes part z. With NORM, x is a + b, of which it also writes the sum and the squares, and which it
// multiplies with the norm's weight; the norm's scale comes later. Then there is one tile of experts.
template <bool NORM, bool VECTORS, int STAGES>
__global__ void __launch_bounds__(LOGITS_THREADS, 1) logits_kernel(Logits p) {
  extern __shared__ __align__(16) float shared[];  // [stages][gate, a and b][64 rows]
  constexpr int STAGE_FLOATS = (NORM ? 3 : 2) * TILE_FLOATS;
  let_next_start();
  const int count = p.rows.get(), r0 = blockIdx.x * TILE, e0 = blockIdx.y * TILE, first = blockIdx.z * p.chunks * 64, end = min(p.hidden, first + p.chunks * 64);
  const int turns = (end - first + 63) / 64, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, half = warp % 2, quarter = warp / 2;
  auto stage_gate = [&](int turn) {
    if (turn < turns) stage<VECTORS>(shared + turn % STAGES * STAGE_FLOATS, p.gate, e0, p.experts, first + turn * 64, end, p.hidden);
  };
  auto stage_x = [&](int turn) {
    float* to = shared + turn % STAGES * STAGE_FLOATS + TILE_FLOATS;
    if (turn < turns) {
      stage<VECTORS>(to, p.a, r0, count, first + turn * 64, end, p.hidden);
      if constexpr (NORM) stage<VECTORS>(to + TILE_FLOATS, p.b, r0, count, first + turn * 64, end, p.hidden);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) stage_gate(s);
  await_inputs();
  if (r0 >= count) return;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) stage_x(s);
  float sums[2][8][4] = {}, c[2][8][4] = {}, squares[2][2] = {};
  for (int turn = 0; turn < turns; turn++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncthreads();
    stage_gate(turn + STAGES - 1), stage_x(turn + STAGES - 1);
    const float *gate = shared + turn % STAGES * STAGE_FLOATS, *x = gate + TILE_FLOATS;
    const int column = quarter * 16 + t * 4, k = first + turn * 64 + column;
    float4 weight{};
    if (NORM && k < end) weight = *reinterpret_cast<const float4*>(p.weight + k);
    uint32_t a_large[2][2][4], a_small[2][2][4];  // of two steps of 8 columns
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = half * 32 + m * 16 + h * 8 + g;
        float4 v = *reinterpret_cast<const float4*>(x + row * PITCH + column);
        if constexpr (NORM) {
          const float4 b = *reinterpret_cast<const float4*>(x + TILE_FLOATS + row * PITCH + column);
          v.x += b.x, v.y += b.y, v.z += b.z, v.w += b.w;
          if (r0 + row < count && k < end) *reinterpret_cast<float4*>(p.sum + static_cast<int64_t>(r0 + row) * p.hidden + k) = v;
          squares[m][h] += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
          v.x *= weight.x, v.y *= weight.y, v.z *= weight.z, v.w *= weight.w;
        }
        uint32_t large[4], small[4];
        split(v, large, small);
#pragma unroll
        for (int i = 0; i < 4; i++) a_large[m][i / 2][i % 2 * 2 + h] = large[i], a_small[m][i / 2][i % 2 * 2 + h] = small[i];
      }
#pragma unroll
    for (int n0 = 0; n0 < 8; n0 += 4) {
      uint32_t l[4][4], s[4][4];
#pragma unroll
      for (int n = 0; n < 4; n++) split(*reinterpret_cast<const float4*>(gate + ((n0 + n) * 8 + g) * PITCH + column), l[n], s[n]);
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
    if (turn % 4 == 3 || turn + 1 == turns) {
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) sums[m][n][i] += c[m][n][i], c[m][n][i] = 0;
    }
  }
  // The quarters' sums, in order.
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  float* squares_of = shared + 3 * TILE * TILE;  // [quarters][rows]
  if constexpr (NORM) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float all = squares[m][h];
        all += __shfl_xor_sync(~0u, all, 1);
        all += __shfl_xor_sync(~0u, all, 2);
        if (t == 0) squares_of[quarter * TILE + half * 32 + m * 16 + h * 8 + g] = all;
      }
  }
  float* others = shared + (max(quarter, 1) - 1) * TILE * TILE;
  if (quarter)
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) others[((m * 8 + n) * 4 + i) * 64 + half * 32 + lane] = sums[m][n][i];
  __syncthreads();
  if (NORM && threadIdx.x < TILE && r0 + static_cast<int>(threadIdx.x) < count) {
    const float* own = squares_of + threadIdx.x;
    p.squares[static_cast<int64_t>(blockIdx.z) * p.most + r0 + threadIdx.x] = own[0] + own[TILE] + (own[2 * TILE] + own[3 * TILE]);
  }
  if (quarter) return;
  float* to = p.parts + static_cast<int64_t>(blockIdx.z) * p.most * p.experts;
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
        if (r < count && e < p.experts) to[static_cast<int64_t>(r) * p.experts + e] = sum;
      }
}

// The sum of parts s of a logit, in order.
__device__ __forceinline__ float add_parts(const float* parts, int64_t stride, int begin, int splits, int step) {
  float sum = 0;
#pragma unroll 5
  for (int s = begin; s < splits; s += step) sum += parts[s * stride];
  return sum;
}

struct Choice {
  const float *parts, *bias;
  float* logits;
  int32_t* experts;
  float* weights;
  Size rows;
  int most, count, k, splits;
  float norm_min;
};

// A warp a row.
template <int N>
__global__ void __launch_bounds__(32 * CHOOSE_WARPS) choose_kernel(Choice p) {
  let_next_start();
  const int rows = p.rows.get(), r = blockIdx.x * CHOOSE_WARPS + threadIdx.x / 32;
  await_inputs();
  if (r >= rows) return;
  float* own = p.logits + static_cast<int64_t>(r) * p.count;
  if (p.splits > 1) {
    const int64_t stride = static_cast<int64_t>(p.most) * p.count;
    for (int e = threadIdx.x % 32; e < p.count; e += 64) {
      const float* parts = p.parts + static_cast<int64_t>(r) * p.count + e;
      const bool second = e + 32 < p.count;
      const float x = add_parts(parts, stride, 0, p.splits, 1), y = second ? add_parts(parts + 32, stride, 0, p.splits, 1) : 0.f;
      own[e] = x;
      if (second) own[e + 32] = y;
    }
    __syncwarp();
  }
  choose<N>(own, p.bias, p.count, p.k, p.norm_min, p.experts + static_cast<int64_t>(r) * p.k, p.weights + static_cast<int64_t>(r) * p.k);
}

constexpr int FINISH_THREADS = 256, FINISH_HELD = 4;

// A block a row: the norm's scale, the logits, the choice, and the norm. `squares` are those of each split. At most 64 experts.
__global__ void __launch_bounds__(FINISH_THREADS) finish_kernel(Choice p, const float* sum, const float* weight, const float* squares, Numbers normed, int hidden, float eps) {
  constexpr int GROUPS = FINISH_THREADS / 64;
  __shared__ float sums[GROUPS][64], logits[64];
  let_next_start();
  const int rows = p.rows.get(), r = blockIdx.x, lane = threadIdx.x % 32, e = threadIdx.x % 64, part = threadIdx.x / 64;
  Vec<4> w[FINISH_HELD], x[FINISH_HELD];
  auto column = [&](int j) { return (j * FINISH_THREADS + static_cast<int>(threadIdx.x)) * 4; };
  const Numbers weights{const_cast<float*>(weight), F32}, from{const_cast<float*>(sum), F32};
#pragma unroll
  for (int j = 0; j < FINISH_HELD; j++)
    if (column(j) < hidden) w[j] = load<4>(weights, column(j));
  await_inputs();
  if (r >= rows) return;
  const int64_t row = static_cast<int64_t>(r) * hidden;
#pragma unroll
  for (int j = 0; j < FINISH_HELD; j++)
    if (column(j) < hidden) x[j] = load<4>(from, row + column(j));
  const float square = warp_sum(lane < p.splits ? squares[static_cast<int64_t>(lane) * p.most + r] : 0.f);
  if (e < p.count) sums[part][e] = add_parts(p.parts + static_cast<int64_t>(r) * p.count + e, static_cast<int64_t>(p.most) * p.count, part, p.splits, GROUPS);
  const float scale = 1 / sqrtf(square / static_cast<float>(hidden) + eps);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < p.count) {
    float all = 0;
#pragma unroll
    for (int i = 0; i < GROUPS; i++) all += sums[i][e];
    p.logits[static_cast<int64_t>(r) * p.count + e] = logits[e] = all * scale;
  }
  auto write = [&](int c, const Vec<4>& v, const Vec<4>& by) {
    Vec<4> y;
#pragma unroll
    for (int i = 0; i < 4; i++) y.at[i] = by.at[i] * (v.at[i] * scale);
    store<4>(normed, row + c, y);
  };
#pragma unroll
  for (int j = 0; j < FINISH_HELD; j++)
    if (column(j) < hidden) write(column(j), x[j], w[j]);
  for (int c = column(FINISH_HELD); c < hidden; c += FINISH_THREADS * 4) write(c, load<4>(from, row + c), load<4>(weights, c));
  __syncthreads();
  if (threadIdx.x < 32) choose<2>(logits, p.bias, p.count, p.k, p.norm_min, p.experts + static_cast<int64_t>(r) * p.k, p.weights + static_cast<int64_t>(r) * p.k);
}

// Splits columns among blocks until there is one for each multiprocessor.
int split_columns(Logits& p, int across, Launch& launch) {
  const int tiles = ceil_div(p.most, TILE), all = ceil_div(p.hidden, 64);
  p.chunks = ceil_div(all, std::clamp(launch.multiprocessors / (tiles * across), 1, MOST_SPLITS));
  return ceil_div(all, p.chunks);
}

template <bool NORM>
void compute_logits(const Logits& p, int splits, bool vectors, Launch& launch) {
  const dim3 grid(ceil_div(p.most, TILE), ceil_div(p.experts, TILE), splits);
  auto run = [&](auto kernel, int stages) { launch(kernel, grid, dim3(LOGITS_THREADS), static_cast<size_t>(stages) * (NORM ? 3 : 2) * TILE_FLOATS * sizeof(float), p); };
  if (launch.architecture >= 90) vectors ? run(logits_kernel<NORM, true, 3>, 3) : run(logits_kernel<NORM, NORM, 3>, 3);
  else vectors ? run(logits_kernel<NORM, true, 2>, 2) : run(logits_kernel<NORM, NORM, 2>, 2);
}

// Logits and choices of x.
void route_many(const NormRoute& n, int most, bool vectors, Launch& launch) {
  Logits l{n.a, nullptr, nullptr, n.gate, nullptr, nullptr, nullptr, n.rows, std::max(1, most), n.count, n.hidden, 0};
  const int splits = split_columns(l, ceil_div(n.count, TILE), launch);
  l.parts = splits > 1 ? static_cast<float*>(launch.scratch(static_cast<size_t>(splits) * static_cast<size_t>(l.most) * static_cast<size_t>(n.count) * sizeof(float))) : n.logits;
  compute_logits<false>(l, splits, vectors, launch);
  const Choice c{l.parts, n.bias, n.logits, n.experts, n.weights, n.rows, l.most, n.count, n.k, splits, n.norm_min};
  with_lanes(n.count, [&](auto lanes) { launch(choose_kernel<decltype(lanes)::value>, dim3(ceil_div(l.most, CHOOSE_WARPS)), dim3(32 * CHOOSE_WARPS), 0, c); });
}

// The same of the norm of a + b, which is written in any float format. Returns whether the shape is one that this is made for.
bool norm_route_many(const NormRoute& n, int most, bool vectors, Launch& launch) {
  if (!vectors || n.count > 64) return false;
  Logits l{n.a, n.b, n.weight, n.gate, n.sum, nullptr, nullptr, n.rows, std::max(1, most), n.count, n.hidden, 0};
  const int splits = split_columns(l, 1, launch);
  const size_t parts = static_cast<size_t>(splits) * static_cast<size_t>(l.most);
  l.parts = static_cast<float*>(launch.scratch(parts * static_cast<size_t>(n.count) * sizeof(float)));
  l.squares = static_cast<float*>(launch.scratch(parts * sizeof(float)));
  compute_logits<true>(l, splits, true, launch);
  const Choice c{l.parts, n.bias, n.logits, n.experts, n.weights, n.rows, l.most, n.count, n.k, splits, n.norm_min};
  launch(finish_kernel, dim3(l.most), dim3(FINISH_THREADS), 0, c, n.sum, n.weight, l.squares, n.normed, n.hidden, n.eps);
  return true;
}

}  // namespace
}  // namespace cuda
