// Products of a few rows of float32 activations with weights, bounded by the speed at which weights arrive from memory.
//
// A block computes items: 16 rows of a matrix (or of two, gate and up) times up to 4 NT rows of activations. Its warps split the columns into
// chunks; each warp copies its chunks into a ring in shared memory, the first before the activations are there. Weights are the 16-row operand
// of mma.sync. A row of activations takes two of its 8 columns: the numbers rounded to 16 bits, and what rounding took away, so that
// nothing is lost. Quantised weights are exact in 16 bits; their scales are applied to the sums of a group.
#pragma once
#include "products.cuh"

namespace cuda {

constexpr int ROW_WARPS = 8, ROW_THREADS = 32 * ROW_WARPS;
constexpr int TILE_N = 16;  // weight rows of an item
constexpr int ROWS_MOST = 16;

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
template <int BYTES>
__device__ __forceinline__ void copy_small(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

template <bool BRAIN>
__device__ __forceinline__ void mma(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (BRAIN)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <class To, class From>
__device__ __forceinline__ To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
__device__ __forceinline__ uint32_t minus(uint32_t pair, uint32_t by) { return bits<uint32_t>(__hsub2(bits<__half2>(pair), bits<__half2>(by))); }
__device__ __forceinline__ uint32_t times_plus(uint32_t pair, uint32_t by, uint32_t plus) {
  return bits<uint32_t>(__hfma2(bits<__half2>(pair), bits<__half2>(by), bits<__half2>(plus)));
}
// (a & b) | c
__device__ __forceinline__ uint32_t masked_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// How weights of a format are copied and multiplied. A chunk is CHUNK columns of 16 rows: ROW_BYTES of each, in units of 16 bytes that are
// permuted so that reading is free of bank conflicts, then SCALE_BYTES of each row's scales.
// Lane (g, t) = (lane / 4, lane % 4) holds columns of the rows g and g + 8; which ones is free, as long as activations have the same.
template <Dtype D>
struct Chunks;

template <bool BRAIN_>
struct FloatChunks {
  static constexpr bool BRAIN = BRAIN_;
  static constexpr int CHUNK = 64, ROW_BYTES = 128, SCALE_BYTES = 0, X_STRIDE = 192;
  static __host__ __device__ int32_t pitch(int32_t k) { return 2 * k; }
  static __host__ __device__ int32_t scale_pitch(int32_t) { return 0; }
  static __device__ __forceinline__ int swizzle(int row, int unit) { return unit ^ (row & 1) << 2; }
};
template <>
struct Chunks<BF16> : FloatChunks<true> {};
template <>
struct Chunks<F16> : FloatChunks<false> {};

struct ByteChunks {
  static constexpr bool BRAIN = false;
  static constexpr int CHUNK = 128, ROW_BYTES = 128, SCALE_BYTES = 4, X_STRIDE = 272;
  static __host__ __device__ int32_t pitch(int32_t k) { return k; }
  static __host__ __device__ int32_t scale_pitch(int32_t k) { return k / 32; }
  static __device__ __forceinline__ int swizzle(int row, int unit) { return unit ^ (row & 1) << 2; }
};
template <>
struct Chunks<INT8> : ByteChunks {
  static __device__ __forceinline__ void pairs(uint32_t word, uint32_t& low, uint32_t& high) {
    word ^= 0x80808080;  // 128 + b
    low = minus(permute(word, 0x64646464, 0x4140), 0x64806480);  // 0x6400 + n is 1024 + n
    high = minus(permute(word, 0x64646464, 0x4342), 0x64806480);
  }
};
template <>
struct Chunks<FP8> : ByteChunks {
  static __device__ __forceinline__ void pairs(uint32_t word, uint32_t& low, uint32_t& high) {
#if __CUDA_ARCH__ >= 890
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }" : "=r"(low), "=r"(high) : "r"(word));
#else
    // The bits of an e4m3 number, moved, are those of 2^-8 times it in f16.
    auto widen = [](uint32_t t) { return bits<uint32_t>(__hmul2(bits<__half2>(masked_or(t >> 1, 0x3f803f80, t & 0x80008000)), bits<__half2>(0x5c005c00u))); };
    low = widen(permute(word, 0, 0x1404));
    high = widen(permute(word, 0, 0x3424));
#endif
  }
};

template <>
struct Chunks<INT4> {
  static constexpr bool BRAIN = false;
  static constexpr int CHUNK = 128, ROW_BYTES = 64, SCALE_BYTES = 8, X_STRIDE = 320;
  static __host__ __device__ int32_t pitch(int32_t k) { return k / 2; }
  static __host__ __device__ int32_t scale_pitch(int32_t k) { return k / 16; }
  static __device__ __forceinline__ int swizzle(int row, int unit) { return unit ^ (row >> 1 & 3); }
  // Eight columns, as the pairs 0 1, 2 3, 4 5, 6 7.
  static __device__ __forceinline__ void pairs(uint32_t word, uint32_t* p) {
    const uint32_t next = word >> 8;
    p[0] = minus(masked_or(word, 0x000f000f, 0x64006400), 0x64086408);                     // 1024 + n - 1032
    p[1] = times_plus(masked_or(word, 0x00f000f0, 0x64006400), 0x2c002c00, 0xd480d480);  // (1024 + 16 n) / 16 - 72
    p[2] = minus(masked_or(next, 0x000f000f, 0x64006400), 0x64086408);
    p[3] = times_plus(masked_or(next, 0x00f000f0, 0x64006400), 0x2c002c00, 0xd480d480);
  }
};

// Where a warp is: the chunk of a part of an item. An item's parts are matrices whose products are added up.
struct Cursor {
  int32_t item, part, chunk;
};

// Weights of an item's part, from row 0 of the tile on. `left`: rows of the matrix from there on, at least 1.
template <int M>
struct Source {
  const uint8_t* data[M];
  const uint8_t* scales[M];
  int32_t left;
};

template <Dtype D, int M>
constexpr int stage_bytes() { return M * TILE_N * (Chunks<D>::ROW_BYTES + Chunks<D>::SCALE_BYTES); }
// Stages of a warp's ring: about 6 KiB, two blocks of which fill a multiprocessor's share of the memory system and leave the next
// kernel room to start its own.
template <Dtype D, int M>
constexpr int stages() { return M == 1 ? (Chunks<D>::ROW_BYTES == 64 ? 5 : 3) : (Chunks<D>::ROW_BYTES == 64 ? 3 : 2); }

// Shared memory of a block, besides an op's own: rings, activations, their scales, and the warps' sums of two items.
template <Dtype D, int NT, int M>
struct Layout {
  static constexpr int ring = stages<D, M>() * stage_bytes<D, M>();
  static constexpr int x = 8 * NT * Chunks<D>::X_STRIDE;
  static constexpr int inverse = 4 * NT * 4;
  static constexpr int partial = M * TILE_N * 4 * NT * 4;
  static constexpr int bytes = ROW_WARPS * (ring + x + inverse + 2 * partial);
};

template <Dtype D, int NT, int M>
struct Warp {
  using C = Chunks<D>;
  static constexpr int V = C::CHUNK / 32;  // columns of a chunk that a lane converts
  static constexpr int KEPT = D == BF16 ? 4 : 2;
  static constexpr int READY = NT == 1 ? 4 : 1;  // rows of activations loaded ahead

  uint8_t *ring, *x;
  float* inverse;
  int lane;
  float sums[M][NT][KEPT];
  float ahead[READY][V], factors[READY];

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < NT; i++)
#pragma unroll
        for (int j = 0; j < KEPT; j++) sums[m][i][j] = 0;
  }

  // Starts copying a chunk.
  __device__ __forceinline__ void fetch(int stage, const Source<M>& s, int32_t chunk, int32_t pitch, int32_t scale_pitch) const {
    constexpr int units = C::ROW_BYTES / 16, rows = 32 / units;
#pragma unroll
    for (int m = 0; m < M; m++) {
      uint8_t* to = ring + stage * stage_bytes<D, M>() + m * TILE_N * C::ROW_BYTES;
      const uint8_t* from = s.data[m] + static_cast<int64_t>(chunk) * C::ROW_BYTES + lane % units * 16;
#pragma unroll
      for (int i = 0; i < TILE_N / rows; i++) {
        const int row = i * rows + lane / units;
        copy16(to + row * C::ROW_BYTES + C::swizzle(row, lane % units) * 16, from + static_cast<int64_t>(min(row, s.left - 1)) * pitch);
      }
    }
    if constexpr (C::SCALE_BYTES > 0) {
      if (lane < TILE_N * M) {
        const int m = lane / TILE_N, row = lane % TILE_N;
        uint8_t* to = ring + stage * stage_bytes<D, M>() + M * TILE_N * C::ROW_BYTES + lane * C::SCALE_BYTES;
        const uint8_t* base = M == 1 || m == 0 ? s.scales[0] : s.scales[M - 1];
        copy_small<C::SCALE_BYTES>(to, base + static_cast<int64_t>(min(row, s.left - 1)) * scale_pitch + chunk * C::SCALE_BYTES);
      }
    }
  }

  __device__ __forceinline__ void load(const float* from, int32_t chunk, float* v) const {
    from += chunk * C::CHUNK + lane * V;
    if constexpr (V == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
      const float2 two = *reinterpret_cast<const float2*>(from);
      v[0] = two.x, v[1] = two.y;
    }
  }

  // Splits a row's activations of a chunk, times `factor`, in two.
  __device__ __forceinline__ void convert(int position, float* v, float factor) {
#pragma unroll
    for (int i = 0; i < V; i++) v[i] *= factor;
    uint32_t high[V / 2], low[V / 2];
    if constexpr (C::BRAIN) {
#pragma unroll
      for (int i = 0; i < V / 2; i++) {
        const __nv_bfloat162 h = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
        high[i] = bits<uint32_t>(h);
        low[i] = bits<uint32_t>(__floats2bfloat162_rn(v[2 * i] - __low2float(h), v[2 * i + 1] - __high2float(h)));
      }
    } else {
      // Scaled by a power of two, so that the largest lies between 2^14 and 2^15: f16 has few exponents.
      uint32_t top = 0;
#pragma unroll
      for (int i = 0; i < V; i++) top = max(top, bits<uint32_t>(v[i]) & 0x7fffffff);
      top = max(__reduce_max_sync(~0u, top) >> 23, 15u);
      const float by = bits<float>((268 - top) << 23);
      if (lane == 0) inverse[position] = bits<float>((top - 14) << 23);
#pragma unroll
      for (int i = 0; i < V / 2; i++) {
        const float a = v[2 * i] * by, b = v[2 * i + 1] * by;
        const __half2 h = __floats2half2_rn(a, b);
        high[i] = bits<uint32_t>(h);
        low[i] = bits<uint32_t>(__floats2half2_rn(a - __low2float(h), b - __high2float(h)));
      }
    }
    uint8_t* to = x + 2 * position * C::X_STRIDE + lane * V * 2;
    if constexpr (V == 4) {
      *reinterpret_cast<uint2*>(to) = make_uint2(high[0], high[1]);
      *reinterpret_cast<uint2*>(to + C::X_STRIDE) = make_uint2(low[0], low[1]);
    } else {
      *reinterpret_cast<uint32_t*>(to) = high[0];
      *reinterpret_cast<uint32_t*>(to + C::X_STRIDE) = low[0];
    }
  }

  // This lane's activations of 8 columns: column g of tile i; zero if there is no such row.
  __device__ __forceinline__ uint4 eight(uint32_t mask, int i, int at) const {
    const int g = lane / 4;
    return mask >> (4 * i + g / 2) & 1 ? *reinterpret_cast<const uint4*>(x + (8 * i + g) * C::X_STRIDE + at) : make_uint4(0, 0, 0, 0);
  }

  // Adds the sums of a group, c, times its scales for rows g and g + 8.
  __device__ __forceinline__ void flush(float* sum, const float* c, float first, float second, float back) const {
    sum[0] += (c[0] + c[1]) * (first * back);
    sum[1] += (c[2] + c[3]) * (second * back);
  }

  __device__ __forceinline__ void multiply(int stage, uint32_t mask) {
    const int g = lane / 4, t = lane % 4;
    const uint8_t* from = ring + stage * stage_bytes<D, M>();
    float back[NT];
    if constexpr (!C::BRAIN) {
#pragma unroll
      for (int i = 0; i < NT; i++) back[i] = mask >> (4 * i + t) & 1 ? inverse[4 * i + t] : 0.f;
    }
    auto unit = [&](int m, int row, int u) { return *reinterpret_cast<const uint4*>(from + (m * TILE_N + row) * C::ROW_BYTES + C::swizzle(row, u) * 16); };
    if constexpr (D == BF16 || D == F16) {
      float c[M][NT][4] = {};  // F16
#pragma unroll
      for (int h = 0; h < 2; h++) {
        uint4 a[M], b[M];
#pragma unroll
        for (int m = 0; m < M; m++) a[m] = unit(m, g, 4 * h + t), b[m] = unit(m, g + 8, 4 * h + t);
#pragma unroll
        for (int i = 0; i < NT; i++) {
          if (NT > 1 && !(mask >> 4 * i & 15)) continue;
          const uint4 v = eight(mask, i, h * 64 + t * 16);
#pragma unroll
          for (int m = 0; m < M; m++) {
            float* to = D == BF16 ? sums[m][i] : c[m][i];
            mma<C::BRAIN>(to, a[m].x, b[m].x, a[m].y, b[m].y, v.x, v.y);
            mma<C::BRAIN>(to, a[m].z, b[m].z, a[m].w, b[m].w, v.z, v.w);
          }
        }
      }
      if constexpr (D == F16) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < NT; i++) flush(sums[m][i], c[m][i], 1.f, 1.f, back[i]);
      }
    } else {
      const uint8_t* scales = from + M * TILE_N * C::ROW_BYTES;
      if constexpr (D == INT4) {
        f16 first[M][4], second[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
          *reinterpret_cast<uint2*>(first[m]) = *reinterpret_cast<const uint2*>(scales + (m * TILE_N + g) * 8);
          *reinterpret_cast<uint2*>(second[m]) = *reinterpret_cast<const uint2*>(scales + (m * TILE_N + g + 8) * 8);
        }
#pragma unroll
        for (int q = 0; q < 4; q++) {
          uint32_t a[M][4], b[M][4];
#pragma unroll
          for (int m = 0; m < M; m++) {
            auto word = [&](int row) { return *reinterpret_cast<const uint32_t*>(from + (m * TILE_N + row) * C::ROW_BYTES + C::swizzle(row, q) * 16 + t * 4); };
            C::pairs(word(g), a[m]);
            C::pairs(word(g + 8), b[m]);
          }
#pragma unroll
          for (int i = 0; i < NT; i++) {
            if (NT > 1 && !(mask >> 4 * i & 15)) continue;
            const uint4 v = eight(mask, i, q * 64 + t * 16);
#pragma unroll
            for (int m = 0; m < M; m++) {
              float c[4] = {};
              mma<false>(c, a[m][0], b[m][0], a[m][1], b[m][1], v.x, v.y);
              mma<false>(c, a[m][2], b[m][2], a[m][3], b[m][3], v.z, v.w);
              flush(sums[m][i], c, __half2float(first[m][q]), __half2float(second[m][q]), back[i]);
            }
          }
        }
      } else {
#pragma unroll
        for (int q = 0; q < 2; q++) {
          uint4 a[M], b[M];
#pragma unroll
          for (int m = 0; m < M; m++) a[m] = unit(m, g, 4 * q + t), b[m] = unit(m, g + 8, 4 * q + t);
          float c[M][NT][4] = {};
#pragma unroll
          for (int j = 0; j < 2; j++) {  // pairs of words
            uint32_t p[M][4], r[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
              C::pairs(j ? a[m].z : a[m].x, p[m][0], p[m][1]), C::pairs(j ? a[m].w : a[m].y, p[m][2], p[m][3]);
              C::pairs(j ? b[m].z : b[m].x, r[m][0], r[m][1]), C::pairs(j ? b[m].w : b[m].y, r[m][2], r[m][3]);
            }
#pragma unroll
            for (int i = 0; i < NT; i++) {
              if (NT > 1 && !(mask >> 4 * i & 15)) continue;
              const uint4 v = eight(mask, i, q * 128 + t * 32 + j * 16);
#pragma unroll
              for (int m = 0; m < M; m++) {
                mma<false>(c[m][i], p[m][0], r[m][0], p[m][1], r[m][1], v.x, v.y);
                mma<false>(c[m][i], p[m][2], r[m][2], p[m][3], r[m][3], v.z, v.w);
              }
            }
          }
#pragma unroll
          for (int m = 0; m < M; m++) {
            auto scale = [&](int row) { return __half2float(reinterpret_cast<const f16*>(scales)[(m * TILE_N + row) * 2 + q]); };
            const float first = scale(g), second = scale(g + 8);
#pragma unroll
            for (int i = 0; i < NT; i++) flush(sums[m][i], c[m][i], first, second, back[i]);
          }
        }
      }
    }
  }

  // Writes the sums of an item, [M][16][4 NT].
  __device__ __forceinline__ void store(float* to) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < NT; i++) {
        float* at = to + (m * TILE_N + g) * 4 * NT + 4 * i + t;
        const float* s = sums[m][i];
        at[0] = KEPT == 4 ? s[0] + s[1] : s[0];
        at[8 * 4 * NT] = KEPT == 4 ? s[KEPT - 2] + s[KEPT - 1] : s[1];
      }
  }
};

// What an op must say; see rows.cu and experts_rows.cu:
//   MATRICES                    1, or 2 for gate and up
//   PARTS_KNOWN                 whether parts() is known before await_inputs
//   early_items()               items whose first part's weights are known before await_inputs
//   prepare(shared)             called by all threads after await_inputs; returns the number of items
//   parts(), chunks(part)       of each item
//   source(cursor), pitch(part), scale_pitch(part)
//   mask(cursor)                bit p: whether there is a row of activations at position p, of 4 NT
//   row_of(cursor, p, factor)   that row, and what to multiply it by
//   finish(item, p, n, sums)    the result for weight row n (0 to 15) and position p, called by whole warps; some n and p are out of bounds
//   after(item)                 called by all threads
template <class Op, Dtype D, int NT>
__global__ void __launch_bounds__(ROW_THREADS, NT == 1 ? 3 : 1) rows_kernel(const Op given) {
  constexpr int M = Op::MATRICES, S = stages<D, M>();
  using C = Chunks<D>;
  using L = Layout<D, NT, M>;
  extern __shared__ __align__(128) uint8_t shared[];
  let_next_start();
  Op op = given;
  const int warp = threadIdx.x / 32;
  Warp<D, NT, M> w;
  w.lane = threadIdx.x % 32;
  w.ring = shared + warp * L::ring;
  w.x = shared + ROW_WARPS * L::ring + warp * L::x;
  float* partial = reinterpret_cast<float*>(shared + ROW_WARPS * (L::ring + L::x));
  w.inverse = partial + ROW_WARPS * 2 * L::partial / 4 + warp * 4 * NT;

  int32_t items = op.early_items();
  // To this warp's first chunk at or after the cursor that exists.
  auto settle = [&](Cursor& c) {
    while (c.item < items) {
      if (c.chunk < op.chunks(c.part)) return;
      c.chunk -= op.chunks(c.part);
      if (++c.part == op.parts()) c.item += gridDim.x, c.part = 0, c.chunk = warp;
    }
  };
  auto fetch = [&](int stage, const Cursor& c) { w.fetch(stage, op.source(c), c.chunk, op.pitch(c.part), op.scale_pitch(c.part)); };

  Cursor ahead{static_cast<int32_t>(blockIdx.x), 0, warp};
  int started = 0;
  if constexpr (Op::PARTS_KNOWN) settle(ahead);
  while (started < S && ahead.item < items && ahead.chunk < op.chunks(0)) {
    fetch(started++, ahead);
    close_copies();
    ahead.chunk += ROW_WARPS;
    if constexpr (Op::PARTS_KNOWN) settle(ahead);
  }
  await_inputs();
  items = op.prepare(shared + L::bytes);
  settle(ahead);
  for (; started < S; started++) {
    if (ahead.item < items) {
      fetch(started, ahead);
      ahead.chunk += ROW_WARPS;
      settle(ahead);
    }
    close_copies();
  }

  Cursor now{static_cast<int32_t>(blockIdx.x), 0, warp};
  settle(now);
  uint32_t mask = now.item < items ? op.mask(now) : 0;
  auto load_ahead = [&](const Cursor& c, uint32_t rows) {
    if constexpr (NT == 1) {
#pragma unroll
      for (int p = 0; p < 4; p++) {
        if (!(rows >> p & 1)) continue;
        const float* from = op.row_of(c, p, w.factors[p]);
        w.load(from, c.chunk, w.ahead[p]);
      }
    }
  };
  load_ahead(now, mask);
  int stage = 0, turn = 0;
  for (int32_t item = blockIdx.x; item < items; item += gridDim.x, turn ^= 1) {
    w.clear();
    while (now.item == item) {
      if constexpr (NT == 1) {
#pragma unroll
        for (int p = 0; p < 4; p++)
          if (mask >> p & 1) w.convert(p, w.ahead[p], w.factors[p]);
      } else {
#pragma unroll 4
        for (int p = 0; p < 4 * NT; p++)
          if (mask >> p & 1) {
            float factor;
            float v[C::CHUNK / 32];
            const float* from = op.row_of(now, p, factor);
            w.load(from, now.chunk, v);
            w.convert(p, v, factor);
          }
      }
      Cursor next = now;
      next.chunk += ROW_WARPS;
      settle(next);
      const uint32_t next_mask = next.item < items ? op.mask(next) : 0;
      load_ahead(next, next_mask);
      await_copies<S - 1>();
      __syncwarp();
      w.multiply(stage, mask);
      __syncwarp();
      if (ahead.item < items) {
        fetch(stage, ahead);
        ahead.chunk += ROW_WARPS;
        settle(ahead);
      }
      close_copies();
      stage = stage + 1 == S ? 0 : stage + 1;
      now = next;
      mask = next_mask;
    }
    float* mine = partial + turn * ROW_WARPS * L::partial / 4;
    w.store(mine + warp * L::partial / 4);
    __syncthreads();
    for (int i = threadIdx.x; i < (TILE_N * 4 * NT + 31) / 32 * 32; i += ROW_THREADS) {
      const int n = i % TILE_N, p = i / TILE_N;
      float sums[M] = {};
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < ROW_WARPS; j++) sums[m] += mine[j * L::partial / 4 + (m * TILE_N + n) * 4 * NT + p];
      op.finish(item, p, n, sums);
    }
    op.after(item);
  }
  await_copies<0>();
}

// Rows of a matrix, as an op's source.
template <Dtype D>
__device__ __forceinline__ const uint8_t* data_at(const Matrix& m, int64_t row, int32_t k) {
  return static_cast<const uint8_t*>(m.data) + row * Chunks<D>::pitch(k);
}
template <Dtype D>
__device__ __forceinline__ const uint8_t* scales_at(const Matrix& m, int64_t row, int32_t k) {
  return reinterpret_cast<const uint8_t*>(m.scales) + row * Chunks<D>::scale_pitch(k);
}

constexpr int chunk_of(Dtype d) { return d == BF16 || d == F16 ? 64 : 128; }
constexpr bool has_chunks(Dtype d) { return d == BF16 || d == F16 || d == INT8 || d == FP8 || d == INT4; }

// Launches Op<format, tiles of 4 rows>. `make(format tag)` builds the op for a format.
template <template <Dtype> class Op, int NT, class Make>
void launch_rows(Dtype format, int items, int across, int op_bytes, Launch& launch, Make make) {
  auto go = [&](auto tag) {
    constexpr Dtype D = decltype(tag)::value;
    using O = Op<D>;
    const int bytes = Layout<D, NT, O::MATRICES>::bytes + op_bytes;
    const int together = (NT == 1 ? 2 : 1) * launch.multiprocessors;
    launch(rows_kernel<O, D, NT>, dim3(items < together ? items : together, across), ROW_THREADS, bytes, make(tag));
  };
  switch (format) {
    case BF16: return go(std::integral_constant<Dtype, BF16>{});
    case F16: return go(std::integral_constant<Dtype, F16>{});
    case INT8: return go(std::integral_constant<Dtype, INT8>{});
    case FP8: return go(std::integral_constant<Dtype, FP8>{});
    default: return go(std::integral_constant<Dtype, INT4>{});
  }
}
template <template <Dtype> class Op, class Make>
void launch_rows(Dtype format, int most, int items, int across, int op_bytes, Launch& launch, Make make) {
  if (most <= 4) launch_rows<Op, 1>(format, items, across, op_bytes, launch, make);
  else if (most <= 8) launch_rows<Op, 2>(format, items, across, op_bytes, launch, make);
  else launch_rows<Op, 4>(format, items, across, op_bytes, launch, make);
}

}  // namespace cuda
