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
  static constexpr int CHUNK = 64, ROW_BYTES = 128, SCALE_BYTES = 0, OFFSET = 0;
  static __host__ __device__ int32_t pitch(int32_t k) { return 2 * k; }
  static __host__ __device__ int32_t scale_pitch(int32_t) { return 0; }
};
template <>
struct Chunks<BF16> : FloatChunks<true> {};
template <>
struct Chunks<F16> : FloatChunks<false> {};

struct ByteChunks {
  static constexpr bool BRAIN = false, SCALED = true;
  static constexpr int CHUNK = 128, ROW_BYTES = 128, SCALE_BYTES = 4, GROUP_COLUMNS = 64;
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
  static constexpr int CHUNK = 128, ROW_BYTES = 64, SCALE_BYTES = 8, GROUP_COLUMNS = 32, OFFSET = 8;
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

// A warp's part of a product: a ring of chunks, and the activations of chunks for P rows.
//
// Each row of activations takes two of the 8 columns of mma.sync: the numbers rounded to 16 bits, and what rounding took away. Lane (g, t) = (lane / 4,
// lane % 4) holds weights of the rows g and g + 8; which columns is free, as long as activations have the same.
// With a single row, 6 of 8 columns would be empty. There, the four lanes t take different scale groups, 32 columns each, and lane t's
// activations are zero but in columns 2t and 2t + 1: so the results of lane t are of its own group, to be scaled once a chunk.
template <Dtype D, int P>
struct Warp {
  using C = Chunks<D>;
  static constexpr int NT = (P + 3) / 4;         // tiles of activations, 4 rows each
  static constexpr int V = C::CHUNK / 32;        // columns of a chunk that a lane converts
  static constexpr int KEPT = D == BF16 ? 4 : 2;
  static constexpr int UNITS = C::ROW_BYTES / 16, COPIES = TILE_N * UNITS / 32;
  static constexpr int STAGE = TILE_N * (C::ROW_BYTES + C::SCALE_BYTES);
  // About 6 KiB: two blocks fill a multiprocessor's share of the memory system, and leave the next kernel room to start its own.
  static constexpr int STAGES = C::ROW_BYTES == 64 ? 5 : 3;
  // Activations of a chunk, a slot: 2 P columns, then each row's [8]: the sums of its groups, its scale. After all slots, a column of zeros.
  static constexpr int STRIDE = C::CHUNK * 2, X = 2 * P * STRIDE, SLOT = X + (D == BF16 ? 0 : P * 8 * 4);
  static constexpr int bytes(int slots) { return STAGES * STAGE + slots * SLOT + STRIDE; }
  // Columns that lane t takes in one piece, and by which odd columns' bytes are permuted so that reading is free of bank conflicts.
  static constexpr int PIECE = P == 1 && C::SCALED ? 32 : C::ROW_BYTES == 128 && C::SCALED ? 16 : 8, ODD = PIECE == 8 ? 64 : 16;

  uint8_t *ring, *x, *zeros;
  int lane, g, t;
  uint32_t to;       // where this lane's copies go in a stage
  uint32_t to_scale;
  int from;          // where its reading starts
  const uint8_t* column[NT];  // its activations in slot 0
  int odd;                    // ODD in odd columns
  int32_t step[NT];           // and how far those in the next slot are
  float sums[NT][KEPT];

  // Weights to copy.
  const uint8_t* data[2];  // of the upper and the lower half of a tile's rows
  const uint8_t* scales;
  int32_t offset[COPIES];

  static __device__ __forceinline__ int swizzle(int row, int unit) {
    if constexpr (C::ROW_BYTES == 64) return unit ^ (row >> 1 & 3);
    else if constexpr (C::SCALED && P == 1) return unit ^ (row & 1);
    else return unit ^ (row & 1) << 2;
  }

  __device__ void start(uint8_t* memory, int slots) {
    lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    odd = g % 2 * ODD;
    ring = memory, x = ring + STAGES * STAGE, zeros = x + slots * SLOT;
    const int row = lane / UNITS;
    to = shared_address(ring) + row * C::ROW_BYTES + swizzle(row, lane % UNITS) * 16;
    to_scale = shared_address(ring) + TILE_N * C::ROW_BYTES + lane * C::SCALE_BYTES;
    for (int i = lane; i < STRIDE / 4; i += 32) reinterpret_cast<uint32_t*>(zeros)[i] = 0;
    expect(P == 1 ? 1 : 0);
    __syncwarp();
  }

  // Which positions have activations; the columns of the others are zeros.
  __device__ __forceinline__ void expect(uint32_t mask) {
#pragma unroll
    for (int i = 0; i < NT; i++) {
      const bool has = P > 1 ? mask >> (4 * i + g / 2) & 1 : C::SCALED ? g / 2 == t : g < 2;
      const int own = P > 1 ? 8 * i + g : C::SCALED ? g % 2 : g;
      column[i] = (has ? x + own * STRIDE : zeros) + t * PIECE * 2;
      step[i] = has ? SLOT : 0;
    }
  }
  __device__ __forceinline__ float* notes(int slot) const { return reinterpret_cast<float*>(x + slot * SLOT + X); }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
      for (int j = 0; j < KEPT; j++) sums[i][j] = 0;
  }

  // From now on, copies are of these rows.
  template <class S>
  __device__ __forceinline__ void aim(const S& s, int32_t pitch, int32_t scale_pitch) {
#pragma unroll
    for (int half = 0; half < 2; half++) data[half] = s.data[half] + lane % UNITS * 16;
#pragma unroll
    for (int i = 0; i < COPIES; i++) offset[i] = min((i * (32 / UNITS) + lane / UNITS) % (TILE_N / 2), s.left[i / (COPIES / 2)] - 1) * pitch;
    if constexpr (C::SCALE_BYTES > 0) {
      const bool lower = lane & TILE_N / 2;
      scales = (lower ? s.scales[1] : s.scales[0]) + static_cast<int64_t>(min(lane % (TILE_N / 2), (lower ? s.left[1] : s.left[0]) - 1)) * scale_pitch;
    }
  }

  __device__ __forceinline__ void fetch(int stage, int32_t chunk) const {
#pragma unroll
    for (int i = 0; i < COPIES; i++) copy16(to + stage * STAGE + i * 512, data[i / (COPIES / 2)] + chunk * C::ROW_BYTES + offset[i]);
    if constexpr (C::SCALE_BYTES > 0)
      if (lane < TILE_N) copy_small<C::SCALE_BYTES>(to_scale + stage * STAGE, scales + chunk * C::SCALE_BYTES);
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

  // Starts copying a row's activations of a chunk into a slot; `taken` reads this lane's.
  __device__ __forceinline__ void fetch_x(int slot, int position, const float* row, int32_t chunk) const {
    copy_small<V * 4>(shared_address(x + slot * SLOT + 2 * position * STRIDE + lane * V * 4), row + chunk * C::CHUNK + lane * V);
  }
  __device__ __forceinline__ void taken(int slot, int position, float* v) const {
    const uint8_t* at = x + slot * SLOT + 2 * position * STRIDE + lane * V * 4;
    if constexpr (V == 4) {
      const float4 four = *reinterpret_cast<const float4*>(at);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
      const float2 two = *reinterpret_cast<const float2*>(at);
      v[0] = two.x, v[1] = two.y;
    }
    __syncwarp();  // before anybody writes there
  }

  // Splits a row's activations of a chunk in two and puts them into a slot.
  __device__ __forceinline__ void put(int slot, int position, float* v) {
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
      *reinterpret_cast<uint2*>(x + slot * SLOT + (2 * position + 1) * STRIDE + (lane * V * 2 ^ ODD)) = make_uint2(low[0], low[1]);
    } else {
      *reinterpret_cast<uint32_t*>(at) = high[0];
      *reinterpret_cast<uint32_t*>(x + slot * SLOT + (2 * position + 1) * STRIDE + (lane * V * 2 ^ ODD)) = low[0];
    }
  }

  static __device__ __forceinline__ uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
  static __device__ __forceinline__ uint4 unit(const uint8_t* stage, int row, int u) {
    return *reinterpret_cast<const uint4*>(stage + row * C::ROW_BYTES + swizzle(row, u) * 16);
  }
  __device__ __forceinline__ uint4 eight(int slot, int i, int at) const {
    // at ^ odd: t's piece has none of these bits.
    return *reinterpret_cast<const uint4*>(column[i] + slot * step[i] + (at & ODD ? -odd : odd) + at);
  }

  // Multiplies a stage's chunk by a slot's activations. `mask`: positions that have any.
  __device__ __forceinline__ void multiply(int stage_number, int slot, uint32_t mask) {
    const uint8_t* stage = ring + stage_number * STAGE;
    if constexpr (!C::SCALED) multiply_floats(stage, slot, mask);
    else if constexpr (P == 1) multiply_one(stage, slot);
    else multiply_groups(stage, slot, mask);
  }

  __device__ __forceinline__ void multiply_floats(const uint8_t* stage, int slot, uint32_t mask) {
    float c[NT][4] = {};  // F16
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint4 a = unit(stage, g, 4 * h + t), b = unit(stage, g + 8, 4 * h + t);
#pragma unroll
      for (int i = 0; i < NT; i++) {
        const uint4 v = eight(slot, i, h * 64);
        float* sum = D == BF16 ? sums[i] : c[i];
        mma<C::BRAIN>(sum, a.x, b.x, a.y, b.y, v.x, v.y);
        mma<C::BRAIN>(sum, a.z, b.z, a.w, b.w, v.z, v.w);
      }
    }
    if constexpr (D == F16) {
#pragma unroll
      for (int i = 0; i < NT; i++) {
        const float back = P == 1 ? notes(slot)[4] : mask >> (4 * i + t) & 1 ? notes(slot)[(4 * i + t) * 8 + 4] : 0.f;
        sums[i][0] += (c[i][0] + c[i][1]) * back;
        sums[i][1] += (c[i][2] + c[i][3]) * back;
      }
    }
  }

  static __device__ __forceinline__ const f16* scales_of(const uint8_t* stage, int row) {
    return reinterpret_cast<const f16*>(stage + TILE_N * C::ROW_BYTES + row * C::SCALE_BYTES);
  }

  // Lane t has 32 columns of its own.
  __device__ __forceinline__ void multiply_one(const uint8_t* stage, int slot) {
    constexpr int units = C::ROW_BYTES / 64;
    const float first = C::OFFSET ? notes(slot)[t] : 0.f;
    float c[4] = {first, 0, first, 0}, d[4] = {};  // two, for a shorter chain
#pragma unroll
    for (int u = 0; u < units; u++) {
      const uint4 a = unit(stage, g, units * t + u), b = unit(stage, g + 8, units * t + u);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint32_t p[4], q[4];
        C::widen(word(a, j), p);
        C::widen(word(b, j), q);
        if constexpr (units == 1) {
          const uint4 v = eight(slot, 0, j * 16);
          mma<false>(c, p[0], q[0], p[1], q[1], v.x, v.y);
          mma<false>(d, p[2], q[2], p[3], q[3], v.z, v.w);
        } else {
          const uint4 v = eight(slot, 0, (2 * u + j / 2) * 16);
          mma<false>(j % 2 ? d : c, p[0], q[0], p[1], q[1], j % 2 ? v.z : v.x, j % 2 ? v.w : v.y);
        }
      }
    }
    const float back = notes(slot)[4];
    sums[0][0] += (c[0] + c[1] + (d[0] + d[1])) * (__half2float(scales_of(stage, g)[t / units]) * back);
    sums[0][1] += (c[2] + c[3] + (d[2] + d[3])) * (__half2float(scales_of(stage, g + 8)[t / units]) * back);
  }

  // The four lanes t share each group.
  __device__ __forceinline__ void multiply_groups(const uint8_t* stage, int slot, uint32_t mask) {
    constexpr int GROUPS = C::CHUNK / C::GROUP_COLUMNS;
    float total[NT][2] = {};
#pragma unroll
    for (int q = 0; q < GROUPS; q++) {
      float c[NT][4];
#pragma unroll
      for (int i = 0; i < NT; i++) {
        const float first = C::OFFSET && mask >> (4 * i + t) & 1 ? notes(slot)[(4 * i + t) * 8 + q * (4 / GROUPS)] : 0.f;
        c[i][0] = first, c[i][1] = 0, c[i][2] = first, c[i][3] = 0;
      }
      if constexpr (D == INT4) {
        uint32_t a[4], b[4];
        auto own = [&](int row) { return *reinterpret_cast<const uint32_t*>(stage + row * C::ROW_BYTES + swizzle(row, q) * 16 + t * 4); };
        C::widen(own(g), a);
        C::widen(own(g + 8), b);
#pragma unroll
        for (int i = 0; i < NT; i++) {
          const uint4 v = eight(slot, i, q * 64);
          mma<false>(c[i], a[0], b[0], a[1], b[1], v.x, v.y);
          mma<false>(c[i], a[2], b[2], a[3], b[3], v.z, v.w);
        }
      } else {
        const uint4 a = unit(stage, g, 4 * q + t), b = unit(stage, g + 8, 4 * q + t);
#pragma unroll
        for (int j = 0; j < 2; j++) {  // pairs of words
          uint32_t p[4], r[4];
          C::widen(word(a, 2 * j), p), C::widen(word(a, 2 * j + 1), p + 2);
          C::widen(word(b, 2 * j), r), C::widen(word(b, 2 * j + 1), r + 2);
#pragma unroll
          for (int i = 0; i < NT; i++) {
            const uint4 v = eight(slot, i, q * 128 + j * 16);
            mma<false>(c[i], p[0], r[0], p[1], r[1], v.x, v.y);
            mma<false>(c[i], p[2], r[2], p[3], r[3], v.z, v.w);
          }
        }
      }
      const float a = __half2float(scales_of(stage, g)[q]), b = __half2float(scales_of(stage, g + 8)[q]);
#pragma unroll
      for (int i = 0; i < NT; i++) total[i][0] += (c[i][0] + c[i][1]) * a, total[i][1] += (c[i][2] + c[i][3]) * b;
    }
#pragma unroll
    for (int i = 0; i < NT; i++) {
      const float back = mask >> (4 * i + t) & 1 ? notes(slot)[(4 * i + t) * 8 + 4] : 0.f;
      sums[i][0] += total[i][0] * back, sums[i][1] += total[i][1] * back;
    }
  }

  // Writes the sums of an item, [16][P].
  __device__ __forceinline__ void store(float* at) const {
    each([&](int row, int position, float v) { at[row * P + position] = v; });
  }
  // Calls visit(row, position, sum) for the sums that this lane has.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < NT; i++) {
      const float* s = sums[i];
      float a = KEPT == 4 ? s[0] + s[1] : s[0], b = KEPT == 4 ? s[KEPT - 2] + s[KEPT - 1] : s[1];
      if constexpr (P == 1) {
#pragma unroll
        for (int d = 1; d < 4; d *= 2) a += __shfl_xor_sync(~0u, a, d), b += __shfl_xor_sync(~0u, b, d);
        if (t == 0) visit(g, 0, a), visit(g + 8, 0, b);
      } else {
        visit(g, 4 * i + t, a);
        visit(g + 8, 4 * i + t, b);
      }
    }
  }
};

}  // namespace cuda
