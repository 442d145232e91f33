// How weights of each format are copied into shared memory, widened to 16 bits and multiplied on tensor cores. Knows no op.
#pragma once
#include "products.cuh"

namespace cuda {

constexpr int TILE_N = 16;  // weight rows of a tile: the longer side of mma.sync

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
template <int BYTES>
__device__ __forceinline__ void copy_small(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
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

// A chunk is CHUNK columns of a tile: ROW_BYTES of each row, then SCALE_BYTES of each row's scales. Its units of 16 bytes are permuted so that
// reading is free of bank conflicts.
//
// Quantised numbers become f16 by their bits alone: n below 1024 is the bits of n 2^-24, which mma.sync takes without loss. So they are
// multiplied as n = OFFSET + q, and OFFSET times the sum of the activations is taken off again; 2^-24 is part of the scale.
template <Dtype D>
struct Chunks;

template <bool BRAIN_>
struct FloatChunks {
  static constexpr bool BRAIN = BRAIN_, SCALED = false;
  static constexpr int CHUNK = 64, ROW_BYTES = 128, SCALE_BYTES = 0, X_STRIDE = 192, OFFSET = 0;
  static __host__ __device__ int32_t pitch(int32_t k) { return 2 * k; }
  static __host__ __device__ int32_t scale_pitch(int32_t) { return 0; }
};
template <>
struct Chunks<BF16> : FloatChunks<true> {};
template <>
struct Chunks<F16> : FloatChunks<false> {};

struct ByteChunks {
  static constexpr bool BRAIN = false, SCALED = true;
  static constexpr int CHUNK = 128, ROW_BYTES = 128, SCALE_BYTES = 4, X_STRIDE = 272, GROUP_COLUMNS = 64;
  static __host__ __device__ int32_t pitch(int32_t k) { return k; }
  static __host__ __device__ int32_t scale_pitch(int32_t k) { return k / 32; }
};
template <>
struct Chunks<INT8> : ByteChunks {
  static constexpr int OFFSET = 128;
  // Four columns as two pairs.
  static __device__ __forceinline__ void widen(uint32_t word, uint32_t* p) {
    word ^= 0x80808080;
    p[0] = __byte_perm(word, 0, 0x4140);
    p[1] = __byte_perm(word, 0, 0x4342);
  }
};
template <>
struct Chunks<FP8> : ByteChunks {
  static constexpr int OFFSET = 0;
  static __device__ __forceinline__ void widen(uint32_t word, uint32_t* p) {
#if __CUDA_ARCH__ >= 890
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }" : "=r"(p[0]), "=r"(p[1]) : "r"(word));
#else
    // The bits of an e4m3 number, moved, are those of 2^-8 times it in f16.
    for (int i = 0; i < 2; i++) {
      const uint32_t t = __byte_perm(word, 0, i ? 0x3424 : 0x1404);
      p[i] = bits<uint32_t>(__hmul2(bits<__half2>((t >> 1 & 0x3f803f80) | (t & 0x80008000)), bits<__half2>(0x5c005c00u)));
    }
#endif
  }
};

template <>
struct Chunks<INT4> {
  static constexpr bool BRAIN = false, SCALED = true;
  static constexpr int CHUNK = 128, ROW_BYTES = 64, SCALE_BYTES = 8, X_STRIDE = 320, GROUP_COLUMNS = 32, OFFSET = 8;
  static __host__ __device__ int32_t pitch(int32_t k) { return k / 2; }
  static __host__ __device__ int32_t scale_pitch(int32_t k) { return k / 16; }
  // Eight columns as four pairs; the second and the fourth are 16 times too large, and their activations are 16 times smaller.
  static __device__ __forceinline__ void widen(uint32_t word, uint32_t* p) {
    p[0] = word & 0x000f000f;
    p[1] = word & 0x00f000f0;
    word >>= 8;
    p[2] = word & 0x000f000f;
    p[3] = word & 0x00f000f0;
  }
};

constexpr int chunk_of(Dtype d) { return d == BF16 || d == F16 ? 64 : 128; }
constexpr bool has_chunks(Dtype d) { return d == BF16 || d == F16 || d == INT8 || d == FP8 || d == INT4; }

// A warp's part of a product: a ring of chunks of M matrices, and the activations of one chunk for P rows.
//
// Each row of activations takes two of the 8 columns of mma.sync: the numbers rounded to 16 bits, and what rounding took away. Lane (g, t) = (lane / 4,
// lane % 4) holds weights of the rows g and g + 8; which columns is free, as long as activations have the same.
// With a single row, 6 of 8 columns would be empty. There, the four lanes t take different scale groups, 32 columns each, and lane t's
// activations are zero but in columns 2t and 2t + 1: so the results of lane t are of its own group, to be scaled once a chunk.
template <Dtype D, int P, int M>
struct Warp {
  using C = Chunks<D>;
  static constexpr int NT = (P + 3) / 4;         // tiles of activations, 4 rows each
  static constexpr int V = C::CHUNK / 32;        // columns of a chunk that a lane converts
  static constexpr int KEPT = D == BF16 ? 4 : 2;
  static constexpr int UNITS = C::ROW_BYTES / 16, COPIES = TILE_N * UNITS / 32;
  static constexpr int STAGE = M * TILE_N * (C::ROW_BYTES + C::SCALE_BYTES);
  // About 6 KiB: two blocks fill a multiprocessor's share of the memory system, and leave the next kernel room to start its own.
  static constexpr int STAGES = M == 1 ? (C::ROW_BYTES == 64 ? 5 : 3) : (C::ROW_BYTES == 64 ? 3 : 2);
  // Activations of a chunk: 2 P columns, then each row's [8]: the sums of its groups, its scale. After all of them, a column of zeros.
  static constexpr int STRIDE = P == 1 && !C::SCALED ? C::CHUNK * 2 : C::X_STRIDE;
  static constexpr int X = 2 * P * STRIDE, SLOT = X + (D == BF16 ? 0 : P * 8 * 4);
  static constexpr int bytes(int slots) { return STAGES * STAGE + slots * SLOT + STRIDE; }

  uint8_t *ring, *x, *zeros;
  int lane, g, t;
  uint32_t to;       // where this lane's copies go in a stage
  uint32_t to_scale;
  int from;          // where its reading starts
  const uint8_t* column[NT];  // its activations in slot 0
  int32_t step[NT];           // and how far those in the next slot are
  float sums[M][NT][KEPT];

  // Weights to copy.
  const uint8_t* data[M];
  const uint8_t* scales;
  int32_t offset[COPIES];

  static __device__ __forceinline__ int swizzle(int row, int unit) {
    if constexpr (C::ROW_BYTES == 64) return unit ^ (row >> 1 & 3);
    else if constexpr (C::SCALED && P == 1) return unit ^ (row & 1);
    else return unit ^ (row & 1) << 2;
  }

  __device__ void start(uint8_t* memory, int slots) {
    lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    ring = memory, x = ring + STAGES * STAGE, zeros = x + slots * SLOT;
    const int row = lane / UNITS;
    to = shared_address(ring) + row * C::ROW_BYTES + swizzle(row, lane % UNITS) * 16;
    to_scale = shared_address(ring) + M * TILE_N * C::ROW_BYTES + lane * C::SCALE_BYTES;
    for (int i = lane; i < STRIDE / 4; i += 32) reinterpret_cast<uint32_t*>(zeros)[i] = 0;
    expect(P == 1 ? 1 : 0);
    __syncwarp();
  }

  // Which positions have activations; the columns of the others are zeros.
  __device__ __forceinline__ void expect(uint32_t mask) {
#pragma unroll
    for (int i = 0; i < NT; i++) {
      const bool has = P > 1 ? mask >> (4 * i + g / 2) & 1 : C::SCALED ? g / 2 == t : g < 2;
      const int own = P > 1 ? 8 * i + g : C::SCALED ? g % 2 : g, columns = P == 1 && C::SCALED ? 32 : C::X_STRIDE == 272 ? 16 : 8;
      column[i] = (has ? x + own * STRIDE : zeros) + t * columns * 2;
      step[i] = has ? SLOT : 0;
    }
  }
  __device__ __forceinline__ float* notes(int slot) const { return reinterpret_cast<float*>(x + slot * SLOT + X); }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < NT; i++)
#pragma unroll
        for (int j = 0; j < KEPT; j++) sums[m][i][j] = 0;
  }

  // From now on, copies are of these matrices, of which `left` rows exist.
  template <class S>
  __device__ __forceinline__ void aim(const S& s, int32_t pitch, int32_t scale_pitch) {
#pragma unroll
    for (int m = 0; m < M; m++) data[m] = s.data[m] + lane % UNITS * 16;
#pragma unroll
    for (int i = 0; i < COPIES; i++) offset[i] = min(i * (32 / UNITS) + lane / UNITS, s.left - 1) * pitch;
    if constexpr (C::SCALE_BYTES > 0) scales = (M == 1 || lane < TILE_N ? s.scales[0] : s.scales[M - 1]) + static_cast<int64_t>(min(lane % TILE_N, s.left - 1)) * scale_pitch;
  }

  __device__ __forceinline__ void fetch(int stage, int32_t chunk) const {
#pragma unroll
    for (int m = 0; m < M; m++) {
      const uint8_t* at = data[m] + chunk * C::ROW_BYTES;
#pragma unroll
      for (int i = 0; i < COPIES; i++) copy16(to + stage * STAGE + m * TILE_N * C::ROW_BYTES + i * 512, at + offset[i]);
    }
    if constexpr (C::SCALE_BYTES > 0)
      if (lane < TILE_N * M) copy_small<C::SCALE_BYTES>(to_scale + stage * STAGE, scales + chunk * C::SCALE_BYTES);
  }

  __device__ __forceinline__ void load(const float* row, int32_t chunk, float* v) const {
    row += chunk * C::CHUNK + lane * V;
    if constexpr (V == 4) {
      const float4 four = *reinterpret_cast<const float4*>(row);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
      const float2 two = *reinterpret_cast<const float2*>(row);
      v[0] = two.x, v[1] = two.y;
    }
  }

  // Splits a row's activations of a chunk in two.
  __device__ __forceinline__ void convert(int slot, int position, float* v) {
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
      if (lane == 0) notes(slot)[position * 8 + 4] = bits<float>((C::OFFSET ? min(top + 10, 254u) : top - 14) << 23);
#pragma unroll
      for (int i = 0; i < V; i++) v[i] *= by;
      if constexpr (C::OFFSET > 0) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < V; i++) sum += v[i];
        // Of 32 columns; of 64 where they are a group, unless lanes take 32 each.
#pragma unroll
        for (int d = 1; d < (P > 1 ? C::GROUP_COLUMNS : 32) / V; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (lane % 8 == 0) notes(slot)[position * 8 + lane / 8] = sum * (-C::OFFSET * 0x1p-24f);
      }
      if constexpr (D == INT4) v[2] *= 0.0625f, v[3] *= 0.0625f;
#pragma unroll
      for (int i = 0; i < V / 2; i++) {
        const __half2 h = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
        high[i] = bits<uint32_t>(h);
        low[i] = bits<uint32_t>(__floats2half2_rn(v[2 * i] - __low2float(h), v[2 * i + 1] - __high2float(h)));
      }
    }
    uint8_t* at = x + slot * SLOT + 2 * position * STRIDE + lane * V * 2;
    if constexpr (V == 4) {
      *reinterpret_cast<uint2*>(at) = make_uint2(high[0], high[1]);
      *reinterpret_cast<uint2*>(at + STRIDE) = make_uint2(low[0], low[1]);
    } else {
      *reinterpret_cast<uint32_t*>(at) = high[0];
      *reinterpret_cast<uint32_t*>(at + STRIDE) = low[0];
    }
  }

  static __device__ __forceinline__ uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
  static __device__ __forceinline__ uint4 unit(const uint8_t* stage, int m, int row, int u) {
    return *reinterpret_cast<const uint4*>(stage + (m * TILE_N + row) * C::ROW_BYTES + swizzle(row, u) * 16);
  }
  __device__ __forceinline__ uint4 eight(int slot, int i, int at) const { return *reinterpret_cast<const uint4*>(column[i] + slot * step[i] + at); }

  // Multiplies a stage's chunk by a slot's activations. `mask`: positions that have any.
  __device__ __forceinline__ void multiply(int stage_number, int slot, uint32_t mask) {
    const uint8_t* stage = ring + stage_number * STAGE;
    if constexpr (!C::SCALED) multiply_floats(stage, slot, mask);
    else if constexpr (P == 1) multiply_one(stage, slot);
    else multiply_groups(stage, slot, mask);
  }

  __device__ __forceinline__ bool empty(uint32_t mask, int i) const { return NT > 1 && !(mask >> 4 * i & 15); }

  __device__ __forceinline__ void multiply_floats(const uint8_t* stage, int slot, uint32_t mask) {
    float c[M][NT][4] = {};  // F16
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint4 a[M], b[M];
#pragma unroll
      for (int m = 0; m < M; m++) a[m] = unit(stage, m, g, 4 * h + t), b[m] = unit(stage, m, g + 8, 4 * h + t);
#pragma unroll
      for (int i = 0; i < NT; i++) {
        if (empty(mask, i)) continue;
        const uint4 v = eight(slot, i, h * 64);
#pragma unroll
        for (int m = 0; m < M; m++) {
          float* sum = D == BF16 ? sums[m][i] : c[m][i];
          mma<C::BRAIN>(sum, a[m].x, b[m].x, a[m].y, b[m].y, v.x, v.y);
          mma<C::BRAIN>(sum, a[m].z, b[m].z, a[m].w, b[m].w, v.z, v.w);
        }
      }
    }
    if constexpr (D == F16) {
#pragma unroll
      for (int i = 0; i < NT; i++) {
        const float back = P == 1 ? notes(slot)[4] : mask >> (4 * i + t) & 1 ? notes(slot)[(4 * i + t) * 8 + 4] : 0.f;
#pragma unroll
        for (int m = 0; m < M; m++) {
          sums[m][i][0] += (c[m][i][0] + c[m][i][1]) * back;
          sums[m][i][1] += (c[m][i][2] + c[m][i][3]) * back;
        }
      }
    }
  }

  // Lane t has 32 columns of its own.
  __device__ __forceinline__ void multiply_one(const uint8_t* stage, int slot) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = eight(slot, 0, j * 16);
    const float back = notes(slot)[4], first = C::OFFSET ? notes(slot)[t] : 0.f;
#pragma unroll
    for (int m = 0; m < M; m++) {
      float c[4] = {first, 0, first, 0}, d[4] = {};  // two, for a shorter chain
      constexpr int units = C::ROW_BYTES / 64;
#pragma unroll
      for (int u = 0; u < units; u++) {
        const uint4 a = unit(stage, m, g, units * t + u), b = unit(stage, m, g + 8, units * t + u);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          uint32_t p[4], q[4];
          C::widen(word(a, j), p);
          C::widen(word(b, j), q);
          if constexpr (units == 1) {
            mma<false>(c, p[0], q[0], p[1], q[1], v[j].x, v[j].y);
            mma<false>(d, p[2], q[2], p[3], q[3], v[j].z, v[j].w);
          } else {
            const uint4& w = v[2 * u + j / 2];
            mma<false>(j % 2 ? d : c, p[0], q[0], p[1], q[1], j % 2 ? w.z : w.x, j % 2 ? w.w : w.y);
          }
        }
      }
      const f16* scale = reinterpret_cast<const f16*>(stage + M * TILE_N * C::ROW_BYTES + (m * TILE_N + g) * C::SCALE_BYTES) + t / units;
      sums[m][0][0] += (c[0] + c[1] + (d[0] + d[1])) * (__half2float(scale[0]) * back);
      sums[m][0][1] += (c[2] + c[3] + (d[2] + d[3])) * (__half2float(scale[8 * C::SCALE_BYTES / 2]) * back);
    }
  }

  // The four lanes t share each group.
  __device__ __forceinline__ void multiply_groups(const uint8_t* stage, int slot, uint32_t mask) {
    constexpr int GROUPS = C::CHUNK / C::GROUP_COLUMNS;
    float total[M][NT][2] = {};
#pragma unroll
    for (int q = 0; q < GROUPS; q++) {
      float c[M][NT][4];
#pragma unroll
      for (int i = 0; i < NT; i++) {
        const float first = C::OFFSET && mask >> (4 * i + t) & 1 ? notes(slot)[(4 * i + t) * 8 + q * (4 / GROUPS)] : 0.f;
#pragma unroll
        for (int m = 0; m < M; m++) c[m][i][0] = first, c[m][i][1] = 0, c[m][i][2] = first, c[m][i][3] = 0;
      }
      if constexpr (D == INT4) {
        uint32_t a[M][4], b[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
          auto own = [&](int row) { return *reinterpret_cast<const uint32_t*>(stage + (m * TILE_N + row) * C::ROW_BYTES + swizzle(row, q) * 16 + t * 4); };
          C::widen(own(g), a[m]);
          C::widen(own(g + 8), b[m]);
        }
#pragma unroll
        for (int i = 0; i < NT; i++) {
          if (empty(mask, i)) continue;
          const uint4 v = eight(slot, i, q * 64);
#pragma unroll
          for (int m = 0; m < M; m++) {
            mma<false>(c[m][i], a[m][0], b[m][0], a[m][1], b[m][1], v.x, v.y);
            mma<false>(c[m][i], a[m][2], b[m][2], a[m][3], b[m][3], v.z, v.w);
          }
        }
      } else {
        uint4 a[M], b[M];
#pragma unroll
        for (int m = 0; m < M; m++) a[m] = unit(stage, m, g, 4 * q + t), b[m] = unit(stage, m, g + 8, 4 * q + t);
#pragma unroll
        for (int j = 0; j < 2; j++) {  // pairs of words
          uint32_t p[M][4], r[M][4];
#pragma unroll
          for (int m = 0; m < M; m++) {
            C::widen(word(a[m], 2 * j), p[m]), C::widen(word(a[m], 2 * j + 1), p[m] + 2);
            C::widen(word(b[m], 2 * j), r[m]), C::widen(word(b[m], 2 * j + 1), r[m] + 2);
          }
#pragma unroll
          for (int i = 0; i < NT; i++) {
            if (empty(mask, i)) continue;
            const uint4 v = eight(slot, i, q * 128 + j * 16);
#pragma unroll
            for (int m = 0; m < M; m++) {
              mma<false>(c[m][i], p[m][0], r[m][0], p[m][1], r[m][1], v.x, v.y);
              mma<false>(c[m][i], p[m][2], r[m][2], p[m][3], r[m][3], v.z, v.w);
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < M; m++) {
        const f16* scale = reinterpret_cast<const f16*>(stage + M * TILE_N * C::ROW_BYTES + (m * TILE_N + g) * C::SCALE_BYTES) + q;
        const float a = __half2float(scale[0]), b = __half2float(scale[8 * C::SCALE_BYTES / 2]);
#pragma unroll
        for (int i = 0; i < NT; i++) total[m][i][0] += (c[m][i][0] + c[m][i][1]) * a, total[m][i][1] += (c[m][i][2] + c[m][i][3]) * b;
      }
    }
#pragma unroll
    for (int i = 0; i < NT; i++) {
      const float back = mask >> (4 * i + t) & 1 ? notes(slot)[(4 * i + t) * 8 + 4] : 0.f;
#pragma unroll
      for (int m = 0; m < M; m++) sums[m][i][0] += total[m][i][0] * back, sums[m][i][1] += total[m][i][1] * back;
    }
  }

  // Writes the sums of an item, [M][16][P].
  __device__ __forceinline__ void store(float* at) const {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < NT; i++) {
        const float* s = sums[m][i];
        float a = KEPT == 4 ? s[0] + s[1] : s[0], b = KEPT == 4 ? s[KEPT - 2] + s[KEPT - 1] : s[1];
        if constexpr (P == 1) {
#pragma unroll
          for (int d = 1; d < 4; d *= 2) a += __shfl_xor_sync(~0u, a, d), b += __shfl_xor_sync(~0u, b, d);
          if (t == 0) at[m * TILE_N + g] = a, at[m * TILE_N + g + 8] = b;
        } else {
          at[(m * TILE_N + g) * P + 4 * i + t] = a;
          at[(m * TILE_N + g + 8) * P + 4 * i + t] = b;
        }
      }
  }
};

}  // namespace cuda
