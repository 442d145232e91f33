// Products of float32 activations for all formats, shapes and numbers of rows, in float32: dot products where there are few rows, tiles
// where there are many. Slower than what rows.cu and gemm.cu do for aligned shapes.
#include "formats.cuh"

namespace cuda {
namespace {

// The rows of one matrix: of x, and where their results go.
struct Rows {
  const int32_t* order;
  int32_t slots, count;
  __device__ __forceinline__ int32_t y(int32_t i) const { return order ? order[i] : i; }
  __device__ __forceinline__ int32_t x(int32_t i) const { return order ? order[i] / slots : i; }
};

__device__ __forceinline__ Rows rows_of(const Product& p, int32_t expert) {
  if (!p.order) return {nullptr, 1, p.rows.get()};
  const int32_t first = p.offsets[expert];
  return {p.order + first, p.slots, p.offsets[expert + 1] - first};
}

__device__ __forceinline__ void put(const Product& p, int32_t expert, int32_t row, int32_t n, float product, float up) {
  const int64_t at = static_cast<int64_t>(row) * p.n + n;
  float v = p.gated ? silu(product) * up : product;
  if (p.bias) v += p.bias[static_cast<int64_t>(expert) * p.n + n];
  if (p.added) v += p.added[at];
  p.y[at] = v;
}

constexpr int WARPS = 8;

// A warp computes one output of up to R rows at a time, its lanes along k.
template <class F, int R, bool GATED>
__global__ void __launch_bounds__(32 * WARPS) dots(const Product p) {
  let_next_start();
  await_inputs();
  const int32_t lane = threadIdx.x % 32, n = blockIdx.x * WARPS + threadIdx.x / 32, columns = F::columns(p.k);
  if (n >= p.n) return;
  const bool whole = p.k % 8 == 0;
  for (int32_t expert = blockIdx.y; expert < p.experts; expert += gridDim.y) {
    const Rows rows = rows_of(p, expert);
    const int64_t row = static_cast<int64_t>(expert) * p.n + n;
    for (int32_t first = 0; first < rows.count; first += R) {
      const float* x[R];
      for (int r = 0; r < R; r++) x[r] = p.x + static_cast<int64_t>(rows.x(min(first + r, rows.count - 1))) * p.k;
      float sum[R] = {}, up[R] = {};
      if (whole) {
#pragma unroll 2
        for (int32_t c = lane * 8; c < p.k; c += 256) {
          float w[8], u[8];
          F::eight(p.w, row, c, columns, w);
          if constexpr (GATED) F::eight(p.up, row, c, columns, u);
          for (int r = 0; r < R; r++) {
            alignas(16) float v[8];
            for (int i = 0; i < 2; i++) reinterpret_cast<float4*>(v)[i] = reinterpret_cast<const float4*>(x[r] + c)[i];
            for (int i = 0; i < 8; i++) sum[r] += v[i] * w[i];
            if constexpr (GATED)
              for (int i = 0; i < 8; i++) up[r] += v[i] * u[i];
          }
        }
      } else {
        for (int32_t c = lane; c < p.k; c += 32) {
          const float w = F::one(p.w, row, c, columns), u = GATED ? F::one(p.up, row, c, columns) : 0;
          for (int r = 0; r < R; r++) sum[r] += x[r][c] * w, up[r] += x[r][c] * u;
        }
      }
      for (int r = 0; r < R; r++) {
        for (int d = 16; d; d /= 2) {
          sum[r] += __shfl_xor_sync(~0u, sum[r], d);
          if constexpr (GATED) up[r] += __shfl_xor_sync(~0u, up[r], d);
        }
        if (lane == 0 && first + r < rows.count) put(p, expert, rows.y(first + r), n, sum[r], up[r]);
      }
    }
  }
}

constexpr int TILE = 64, DEPTH = 16;

// A block computes a tile of 64 rows and 64 outputs, a thread 4 by 4 of it.
template <class F, bool GATED>
__global__ void __launch_bounds__(256) tiles(const Product p) {
  let_next_start();
  await_inputs();
  __shared__ float xs[DEPTH][TILE + 4], ws[GATED + 1][DEPTH][TILE + 4];
  const int32_t n0 = blockIdx.x * TILE, expert = blockIdx.z, columns = F::columns(p.k);
  const Rows rows = rows_of(p, expert);
  const int32_t tr = threadIdx.x / 16 * 4, tn = threadIdx.x % 16 * 4;
  for (int32_t r0 = blockIdx.y * TILE; r0 < rows.count; r0 += gridDim.y * TILE) {
    float sum[GATED + 1][4][4] = {};
    for (int32_t k0 = 0; k0 < p.k; k0 += DEPTH) {
      for (int32_t i = threadIdx.x; i < TILE * DEPTH; i += blockDim.x) {
        const int32_t c = i % DEPTH, j = i / DEPTH;
        const bool inside = k0 + c < p.k;
        xs[c][j] = inside && r0 + j < rows.count ? p.x[static_cast<int64_t>(rows.x(r0 + j)) * p.k + k0 + c] : 0.f;
        const int64_t row = static_cast<int64_t>(expert) * p.n + n0 + j;
        ws[0][c][j] = inside && n0 + j < p.n ? F::one(p.w, row, k0 + c, columns) : 0.f;
        if constexpr (GATED) ws[1][c][j] = inside && n0 + j < p.n ? F::one(p.up, row, k0 + c, columns) : 0.f;
      }
      __syncthreads();
      for (int c = 0; c < DEPTH; c++) {
        const float4 x4 = *reinterpret_cast<const float4*>(&xs[c][tr]);
        const float x[4] = {x4.x, x4.y, x4.z, x4.w};
        for (int m = 0; m <= GATED; m++) {
          const float4 w4 = *reinterpret_cast<const float4*>(&ws[m][c][tn]);
          const float w[4] = {w4.x, w4.y, w4.z, w4.w};
          for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) sum[m][i][j] += x[i] * w[j];
        }
      }
      __syncthreads();
    }
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++)
        if (r0 + tr + i < rows.count && n0 + tn + j < p.n) put(p, expert, rows.y(r0 + tr + i), n0 + tn + j, sum[0][i][j], sum[GATED][i][j]);
  }
}

template <class F, bool GATED>
void launch_product(const Product& p, Launch& launch) {
  const int each = ceil_div(p.most, p.experts);  // rows of a matrix, on average
  if (each > 16) {
    const int across = p.experts == 1 ? ceil_div(p.most, TILE) : ceil_div(4 * each, TILE);
    launch(tiles<F, GATED>, dim3(ceil_div(p.n, TILE), across < 65535 ? across : 65535, p.experts), 256, 0, p);
  } else {
    const dim3 grid(ceil_div(p.n, WARPS), p.experts < 65535 ? p.experts : 65535);
    if (each == 1) launch(dots<F, 1, GATED>, grid, 32 * WARPS, 0, p);
    else launch(dots<F, 4, GATED>, grid, 32 * WARPS, 0, p);
  }
}

}  // namespace

void any_product(const Product& p, Launch& launch) {
  with_format(p.format, [&](auto format) {
    using F = decltype(format);
    if (p.gated) launch_product<F, true>(p, launch);
    else launch_product<F, false>(p, launch);
  });
}

}  // namespace cuda
