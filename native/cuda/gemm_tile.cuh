// What the kernels of products with many rows share: the description of a product, which tile a block computes, weights of each format as
// operands of the matrix units, and writing a tile's results. Knows no particular kernel.
//
// Weights are the left operand: an accumulator has a row for each column of the result and a column for each token, so that a token tile
// may be narrow, and quantised weights, widened in registers, are used for all tokens of the tile.
#pragma once
#include "kernels.cuh"

namespace cuda::gemm {

struct Product {
  const void* x;           // BF16 or F16
  const void* w[2];        // the matrix, or gate and up
  const __half* scales[2];
  const float* bias;       // [n] or [experts, n], or null
  const int32_t* order;    // of grouped products: sorted slots and the offsets of experts; null otherwise
  const int32_t* offsets;
  void* y;
  Dtype format, out;
  Size rows;               // of x
  int32_t experts, slots, n, k, kp;
  bool gated;
  int32_t splits;          // parts of k, computed by different blocks
  float* partials;         // of split products
  int32_t* counters;       // one a tile: parts that are done

  // Result columns of a tile of 128 weight rows.
  __host__ __device__ int tile_columns() const { return gated ? 64 : 128; }
};

constexpr int TILE_M = 128;
constexpr int TOKEN_TILES_TOGETHER = 8;  // that neighbouring blocks compute for the same weights, so that both stay in the L2 cache

// Which tokens and which weights: sorted positions [first, first + count) of an expert, or rows of a plain product.
struct Tile {
  int32_t expert, first, count, m;
};

// The tiles of this run. Tiles of an expert follow one another; `starts` [experts + 1] counts the token tiles before each expert.
struct Schedule {
  const int32_t* starts;  // shared memory
  const int32_t* offsets;
  int32_t experts, rows, m_tiles;

  __device__ int tiles() const { return starts[experts] * m_tiles; }

  __device__ Tile locate(int index, int tokens) const {
    const int group = index / m_tiles;
    int low = 0, high = experts;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (starts[middle] <= group ? low : high) = middle;
    }
    const int within = index - starts[low] * m_tiles, token_tiles = starts[low + 1] - starts[low];
    const int bundle = within / (TOKEN_TILES_TOGETHER * m_tiles), at = within - bundle * TOKEN_TILES_TOGETHER * m_tiles;
    const int wide = min(TOKEN_TILES_TOGETHER, token_tiles - bundle * TOKEN_TILES_TOGETHER);
    const int token = (bundle * TOKEN_TILES_TOGETHER + at % wide) * tokens;
    const int begin = offsets ? offsets[low] : 0, end = offsets ? offsets[low + 1] : rows;
    return {low, begin + token, min(tokens, end - begin - token), at / wide};
  }
};

// Fills `starts`; one warp calls it, after `await_inputs` if there are offsets.
__device__ inline void count_tiles(const Product& p, int tokens, int32_t* starts) {
  const int lane = threadIdx.x % 32;
  if (!p.offsets) {
    if (lane < 2) starts[lane] = lane ? (p.rows.get() + tokens - 1) / tokens : 0;
    return;
  }
  int before = 0;
  for (int base = 0; base < p.experts; base += 32) {
    const int e = base + lane;
    int sum = e < p.experts ? (p.offsets[e + 1] - p.offsets[e] + tokens - 1) / tokens : 0;
    for (int d = 1; d < 32; d *= 2) {
      const int left = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += left;
    }
    if (e < p.experts) starts[e + 1] = before + sum;
    before += __shfl_sync(~0u, sum, 31);
  }
  if (!lane) starts[0] = 0;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ __half load_half(uint32_t at) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
  return __ushort_as_half(v);
}

__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}

// Copies 16 bytes, or zeros if there is nothing to read.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}

// Where a byte of a tile lies whose rows have `ROW` bytes (32, 64 or 128), after the tensor copy engine's swizzle of the same width.
template <int ROW> __device__ __forceinline__ uint32_t swizzled(uint32_t offset) {
  return offset ^ ((offset >> 7 & (ROW / 16 - 1)) << 4);
}

template <Dtype F> struct Weights {
  static constexpr bool QUANTISED = F == INT8 || F == INT4 || F == FP8;
  static constexpr int BITS = F == INT4 ? 4 : QUANTISED ? 8 : 16;
  static constexpr int GROUP_COLUMNS = F == INT4 ? 32 : 64;  // that share a scale
};

// A scale as two numbers in bfloat16 whose sum is exact to 16 bits, each in both halves: only the product is rounded then.
struct Scale {
  __nv_bfloat162 high, low;
  __device__ __forceinline__ explicit Scale(__half s) {
    const float f = __half2float(s);
    const bf16 h = __float2bfloat16_rn(f);
    high = __bfloat162bfloat162(h);
    low = __bfloat162bfloat162(__float2bfloat16_rn(f - __bfloat162float(h)));
  }
  __device__ __forceinline__ uint32_t times(__nv_bfloat162 q) const {
    const __nv_bfloat162 r = __hfma2(q, high, __hmul2(q, low));
    return reinterpret_cast<const uint32_t&>(r);
  }
};

__device__ __forceinline__ __nv_bfloat162 pair(uint32_t bits) { return reinterpret_cast<const __nv_bfloat162&>(bits); }

// Selects this lane's two columns 2 c, 2 c + 1 of eight bytes (c = lane % 4): to the low bytes of the halves of a word, or to the high ones.
template <Dtype F> __device__ __forceinline__ uint32_t byte_selector() {
  const uint32_t c = threadIdx.x % 4 * 2;
  return F == FP8 ? c << 4 | (c + 1) << 12 : c | (c + 1) << 8;
}

// Two neighbouring weights, times their scale, in bfloat16. `word`: what `byte_selector` selected, or of INT4 the pair's nibbles in the halves' low bits.
template <Dtype F> __device__ __forceinline__ uint32_t widen(uint32_t word, const Scale& scale) {
  if constexpr (F == INT8) {
    // 128 + the low seven bits, minus 128 or, of a negative number, 256.
    return scale.times(__hsub2(pair((word & 0x007f007f) | 0x43004300), pair((word & 0x00800080) | 0x43004300)));
  } else if constexpr (F == INT4) {
    return scale.times(__hsub2(pair((word & 0x000f000f) | 0x43004300), pair(0x43084308)));
  } else {
    // e4m3's exponent and fraction in the place of bfloat16's have a bias that is 120 too small.
    return scale.times(__hmul2(pair((word >> 4 & 0x07f007f0) | (word & 0x80008000)), pair(0x7b807b80)));
  }
}

// The left operand of four steps of 16 columns, for a lane's two weight rows, of 64 columns at the chunk (16 bytes) `chunk` of rows `at0` and `at1`
// in shared memory, where chunks are permuted by `mask`. `scale(row, i)`: the scale of row 0 or 1 for the group i of these columns.
template <Dtype F, class Scales> __device__ __forceinline__ void widen_block(uint32_t (&a)[16], uint32_t at0, uint32_t at1, int chunk, uint32_t mask, Scales scale) {
  if constexpr (F == INT4) {
    const int shift = threadIdx.x % 4 * 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Scale scale0(scale(0, half)), scale1(scale(1, half));
      const uint32_t to = (chunk + half) * 16 ^ mask;
      const uint4 u = load_shared(at0 + to), v = load_shared(at1 + to);
      uint32_t* out = a + half * 8;
      out[0] = widen<F>(u.x >> shift, scale0), out[1] = widen<F>(v.x >> shift, scale1);
      out[2] = widen<F>(u.y >> shift, scale0), out[3] = widen<F>(v.y >> shift, scale1);
      out[4] = widen<F>(u.z >> shift, scale0), out[5] = widen<F>(v.z >> shift, scale1);
      out[6] = widen<F>(u.w >> shift, scale0), out[7] = widen<F>(v.w >> shift, scale1);
    }
  } else {
    const uint32_t selector = byte_selector<F>();
    const Scale scale0(scale(0, 0)), scale1(scale(1, 0));
#pragma unroll
    for (int step = 0; step < 4; step++) {
      const uint32_t to = (chunk + step) * 16 ^ mask;
      const uint4 u = load_shared(at0 + to), v = load_shared(at1 + to);
      uint32_t* out = a + step * 4;
      out[0] = widen<F>(__byte_perm(u.x, u.y, selector), scale0), out[1] = widen<F>(__byte_perm(v.x, v.y, selector), scale1);
      out[2] = widen<F>(__byte_perm(u.z, u.w, selector), scale0), out[3] = widen<F>(__byte_perm(v.z, v.w, selector), scale1);
    }
  }
}

__device__ __forceinline__ float gated(float gate, float up) { return gate / (1 + __expf(-gate)) * up; }

__device__ __forceinline__ void store(void* y, Dtype dtype, int64_t at, float v) {
  if (dtype == F32) static_cast<float*>(y)[at] = v;
  else if (dtype == BF16) static_cast<bf16*>(y)[at] = __float2bfloat16_rn(v);
  else static_cast<f16*>(y)[at] = __float2half_rn(v);
}

// Writes a warp's accumulators of 16 weight rows (of gated products, 8 of gate and 8 of up) and `GROUPS` groups of 8 tokens from `token` on.
// `column`: the result column of the lane's first row; the second is 8 further.
template <int GROUPS> __device__ __forceinline__ void store_fragment(const Product& p, const Tile& tile, const float* d, int token, int column) {
  const float* bias = p.bias ? p.bias + static_cast<int64_t>(tile.expert) * p.n : nullptr;
  const bool first = column < p.n, second = column + 8 < p.n;
  const float bias0 = bias && first ? bias[column] : 0, bias1 = bias && second ? bias[column + 8] : 0;
#pragma unroll
  for (int g = 0; g < GROUPS; g++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int t = token + g * 8 + threadIdx.x % 4 * 2 + j;
      if (t >= tile.count) continue;
      const int64_t row = p.order ? p.order[tile.first + t] : tile.first + t;
      const int64_t at = row * p.n + column;
      const float v0 = d[g * 4 + j], v1 = d[g * 4 + 2 + j];
      if (p.gated) {
        if (first) store(p.y, p.out, at, gated(v0, v1));
      } else {
        if (first) store(p.y, p.out, at, v0 + bias0);
        if (second) store(p.y, p.out, at + 8, v1 + bias1);
      }
    }
}

// The kernels. `most_rows`: of the result. The first is for all shapes and GPUs.
void run_ampere(const Product&, Launch&, int64_t most_rows);
// False if the shapes are not for this kernel.
bool run_hopper(const Product&, Launch&, int64_t most_rows);

}  // namespace cuda::gemm
