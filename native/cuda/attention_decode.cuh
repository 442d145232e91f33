// A warp's part of attention.decode: the row of tasks, the ring of copies, queries as operands and the softmax over units of 16 tokens.
// Included by attention_decode.cu only.
#pragma once
#include <cuda.h>

#include "attention_tensor.cuh"

namespace cuda::attention::decoding {

constexpr int WARPS = 8, THREADS = 32 * WARPS, UNIT = 16;

struct Decode {
  const float* q;
  Out y;
  Step step;
  Cache cache;
  int32_t share;     // queries of a row for each KV head
  int32_t few;       // rows of the sequences that are done here
  int32_t most_groups;
  int32_t stages;    // of each warp's ring
  int32_t least;     // units of a block
  float scale;       // of scores in powers of two
  float* partials;   // [blocks][2][queries][dim + 2]
  int32_t* arrived;  // [sequences, groups, KV heads]
};

// Half numbers that the cache's numbers become for products.
template <Dtype D> using Half = std::conditional_t<D == BF16, bf16, f16>;

template <Dtype D, int DIM> struct Layout {
  static constexpr bool BYTES = D == INT8KV || D == FP8KV;
  static constexpr int ROW = DIM * (BYTES ? 1 : 2);        // bytes of a token
  static constexpr int NUMBERS = BYTES ? 16 : 8;           // in 16 bytes
  static constexpr int PIECES = ROW / 64;                  // of 16 bytes of a token's key for each lane
  static constexpr int GROUPS = D == INT8KV ? DIM / GROUP : 1;
  static constexpr int DATA = UNIT * ROW;                  // bytes of a unit's keys or values
  static constexpr int SCALES = D == INT8KV ? UNIT * GROUPS * 4 : 0;
  static constexpr int STAGE = 2 * DATA;
  // Which 16 bytes of a key lane 4 g + t takes as its j-th, such that eight lanes' lie in different banks where scales permit it.
  static __device__ __forceinline__ int piece(int j, int t) {
    if (ROW == 256) return (t & 1) + 4 * (t >> 1) + 2 * (j & 1) + 8 * (j >> 1);
    return ROW == 128 && D != INT8KV ? 2 * t + j : t + 4 * j;
  }
  // Where a byte of a unit is: the 16-byte pieces of each 128 bytes are permuted as copies of tensor maps do.
  static __device__ __forceinline__ int place(int byte) { return byte ^ (byte >> 3 & 0x70); }
};

// A task, and the block's share of its units.
struct Task {
  int sequence, index, count;  // of the sequence's tasks
  int begin, units;            // in all tasks' row of units; of this task
  Segment segment;

  __device__ __forceinline__ void enter(const Decode& a, int queries) {
    segment = a.step.segment(sequence);
    units = ceil_div(segment.position + segment.rows, UNIT);
    count = ceil_div(segment.rows * a.share, queries) * a.cache.heads;
  }
  __device__ __forceinline__ void next(const Decode& a, int queries, int sequences) {
    begin += units;
    if (++index < count) return;
    index = 0;
    while (++sequence < sequences) {
      const int rows = a.step.segments[sequence * 3 + 1];
      if (rows > 0 && rows <= a.few) return enter(a, queries);
    }
  }
};

template <Dtype D, int DIM> struct Ring {
  using L = Layout<D, DIM>;
  uint32_t data, scales, barriers;  // of this warp, in shared memory
  int stages;
  Task task;
  int unit, end;  // of the task, next to be copied; of the block's share of it

  __device__ __forceinline__ bool more(int last) const { return task.begin < last; }
  __device__ __forceinline__ void settle(const Decode& a, int queries, int sequences, int first, int last) {
    for (;;) {
      end = min(task.units, last - task.begin);
      if (unit < end) return;
      task.next(a, queries, sequences);
      if (task.begin >= last) return;
      unit = warp_id();
    }
  }
  // Whether no row of this step is in the next unit.
  __device__ __forceinline__ bool old() const { return (unit + 1) * UNIT <= task.segment.position; }

  __device__ __forceinline__ void copy(const Decode& a, const CUtensorMap* keys, const CUtensorMap* values, int columns, int stage) const {
    const int head = task.index % a.cache.heads;
    const int block = a.step.block(a.step.pages + static_cast<int64_t>(task.sequence) * columns, unit * UNIT / BLOCK_TOKENS, columns);
    const int64_t at = (static_cast<int64_t>(block) * a.cache.heads + head) * head_bytes<D>(DIM);
    const int half = unit % (BLOCK_TOKENS / UNIT);
    const int64_t scale = at + BLOCK_TOKENS * L::ROW + half * L::SCALES;
    const uint32_t to = data + stage * L::STAGE;
#if __CUDA_ARCH__ >= 900
    if (lane_id() == 0) {
      const uint32_t barrier = barriers + stage * 8;
      arrive_expecting(barrier, 2 * (L::DATA + L::SCALES));
      const int row = static_cast<int>((at + half * L::DATA) / 128);
      copy_box(to, keys, 0, row, barrier);
      copy_box(to + L::DATA, values, 0, row, barrier);
      if constexpr (L::SCALES > 0) {
        copy_bytes(scales + stage * 2 * L::SCALES, static_cast<const uint8_t*>(a.cache.keys) + scale, L::SCALES, barrier);
        copy_bytes(scales + stage * 2 * L::SCALES + L::SCALES, static_cast<const uint8_t*>(a.cache.values) + scale, L::SCALES, barrier);
      }
    }
#else
    for (int i = lane_id() * 16; i < L::DATA; i += 512) {
      copy16(to + L::place(i), static_cast<const uint8_t*>(a.cache.keys) + at + half * L::DATA + i);
      copy16(to + L::DATA + L::place(i), static_cast<const uint8_t*>(a.cache.values) + at + half * L::DATA + i);
    }
    if (lane_id() * 16 < L::SCALES) {
      copy16(scales + stage * 2 * L::SCALES + lane_id() * 16, static_cast<const uint8_t*>(a.cache.keys) + scale + lane_id() * 16);
      copy16(scales + stage * 2 * L::SCALES + L::SCALES + lane_id() * 16, static_cast<const uint8_t*>(a.cache.values) + scale + lane_id() * 16);
    }
#endif
  }
  __device__ __forceinline__ void wait(int stage, uint32_t phase) const {
#if __CUDA_ARCH__ >= 900
    wait_barrier(barriers + stage * 8, phase);
#else
    if (stages == 1) wait_copies<0>();
    else if (stages == 2) wait_copies<1>();
    else wait_copies<2>();
    __syncwarp();
#endif
  }
};

// Queries as operands of products, in the order of Layout::piece; 8 queries with their two parts as rows g and g + 8, or 16 with separate parts.
template <Dtype D, int DIM, int QUERIES> struct Queries {
  using L = Layout<D, DIM>;
  using T = Half<D>;
  static constexpr int ROWS = QUERIES / 8;
  uint32_t parts[ROWS][DIM / 16][4];
  float scale[ROWS];  // of scores
  int seen[ROWS];     // tokens

  __device__ __forceinline__ void read(const Decode& a, const Task& task) {
    const int g = lane_id() / 4, t = lane_id() % 4, head = task.index % a.cache.heads, group = task.index / a.cache.heads;
    float x[ROWS][DIM / 4];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int i = group * QUERIES + r * 8 + g;
      const bool some = i < task.segment.rows * a.share;
      const int row = some ? i / a.share : 0;
      seen[r] = some ? task.segment.position + row + 1 : 1 << 30;
      const float* q = a.q + ((static_cast<int64_t>(task.segment.first) + row) * a.cache.heads + head) * a.share * DIM + i % a.share * DIM;
      float top = 0;
#pragma unroll
      for (int j = 0; j < L::PIECES; j++)
#pragma unroll
        for (int e = 0; e < L::NUMBERS; e += 4) {
          const float4 v = some ? *reinterpret_cast<const float4*>(q + L::piece(j, t) * L::NUMBERS + e) : float4{0, 0, 0, 0};
          float* to = x[r] + j * L::NUMBERS + e;
          to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
          top = fmaxf(top, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
        }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      // Half numbers have a small range.
      const float inverse = top > 0 ? 1 / top : 0;
      scale[r] = top * a.scale;
#pragma unroll
      for (int i = 0; i < DIM / 4; i++) x[r][i] *= inverse;
    }
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
      if constexpr (ROWS == 1) {
        split<T>(x[0][4 * k], x[0][4 * k + 1], parts[0][k][0], parts[0][k][1]);
        split<T>(x[0][4 * k + 2], x[0][4 * k + 3], parts[0][k][2], parts[0][k][3]);
      } else {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          split<T>(x[r][4 * k], x[r][4 * k + 1], parts[0][k][r], parts[1][k][r]);
          split<T>(x[r][4 * k + 2], x[r][4 * k + 3], parts[0][k][r + 2], parts[1][k][r + 2]);
        }
      }
    }
  }
};

// A warp's softmax.
template <Dtype D, int DIM, int QUERIES> struct Softmax {
  using L = Layout<D, DIM>;
  using T = Half<D>;
  static constexpr int ROWS = QUERIES / 8;
  float top[ROWS], total[ROWS];  // the total: of this lane's tokens
  float y[DIM / 8][4];           // [8 (d / 64) + d % 8]: dims 64 h + 8 column + j
  float unit[L::GROUPS];         // y is in terms of this: the largest scale of values

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < ROWS; r++) top[r] = -INFINITY, total[r] = 0;
#pragma unroll
    for (int j = 0; j < DIM / 8; j++) y[j][0] = y[j][1] = y[j][2] = y[j][3] = 0;
#pragma unroll
    for (int h = 0; h < L::GROUPS; h++) unit[h] = 1e-30f;
  }

  // Adds 16 tokens, of which the first is t0 and the last context - 1.
  __device__ __forceinline__ void add(const Queries<D, DIM, QUERIES>& q, const uint8_t* keys, const uint8_t* values, const float* key_scales, const float* value_scales, int t0, int context) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    float p[ROWS][4];  // of tokens 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t
#pragma unroll
    for (int n = 0; n < 2; n++) {
      float s[L::GROUPS][4] = {};
#pragma unroll
      for (int j = 0; j < L::PIECES; j++) {
        const uint4 x = *reinterpret_cast<const uint4*>(keys + L::place((n * 8 + g) * L::ROW + L::piece(j, t) * 16));
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
        float(&c)[4] = s[L::GROUPS == 1 ? 0 : j];
#pragma unroll
        for (int e = 0; e < L::NUMBERS / 4; e++) {
          uint32_t b0, b1;
          if constexpr (L::BYTES) widen<D>(words[e], b0, b1);
          else b0 = words[2 * e], b1 = words[2 * e + 1];
          const int k = j * (L::NUMBERS / 4) + e;
#pragma unroll
          for (int r = 0; r < ROWS; r++) multiply<T>(c, q.parts[r][k], b0, b1);
        }
      }
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int token = n * 8 + 2 * t + c;
        float x[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) x[r] = 0;
#pragma unroll
        for (int h = 0; h < L::GROUPS; h++) {
          const float k = D == INT8KV ? key_scales[token * L::GROUPS + h] : 1.f;
          if constexpr (ROWS == 1) x[0] += (s[h][c] + s[h][c + 2]) * k;
          else x[0] += s[h][c] * k, x[1] += s[h][c + 2] * k;
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) p[r][n * 2 + c] = t0 + token < min(q.seen[r], context) ? x[r] * q.scale[r] : -INFINITY;
      }
    }
    float shrink[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float now = fmaxf(fmaxf(p[r][0], p[r][1]), fmaxf(p[r][2], p[r][3]));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
      now = fmaxf(fmaxf(now, __shfl_xor_sync(~0u, now, 2)), top[r]);
      const float base = now == -INFINITY ? 0 : now;
      shrink[r] = power(top[r] - base);
      top[r] = now;
#pragma unroll
      for (int i = 0; i < 4; i++) p[r][i] = power(p[r][i] - base);
      total[r] = total[r] * shrink[r] + (p[r][0] + p[r][1]) + (p[r][2] + p[r][3]);
    }
    const bool whole = t0 + UNIT <= context;
    const auto known = [&](int i) { return whole || t0 + (i & 1) + 8 * (i >> 1) + 2 * t < context; };
#pragma unroll
    for (int h = 0; h < DIM / 64; h++) {
      float w[ROWS][4], factor[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        factor[r] = shrink[r];
#pragma unroll
        for (int i = 0; i < 4; i++) w[r][i] = p[r][i];
      }
      if constexpr (D == INT8KV) {
        float v[4], now = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          v[i] = known(i) ? value_scales[((i & 1) + 8 * (i >> 1) + 2 * t) * L::GROUPS + h] : 0;
          now = fmaxf(now, v[i]);
        }
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
        now = fmaxf(fmaxf(now, __shfl_xor_sync(~0u, now, 2)), unit[h]);
        const float inverse = 1 / now, change = unit[h] * inverse;
        unit[h] = now;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          factor[r] *= change;
#pragma unroll
          for (int i = 0; i < 4; i++) w[r][i] *= v[i] * inverse;
        }
      }
      bool changed = false;
#pragma unroll
      for (int r = 0; r < ROWS; r++) changed |= factor[r] != 1;
      if (__any_sync(~0u, changed)) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
          float(&c)[4] = y[8 * h + j];
          c[0] *= factor[0], c[1] *= factor[0], c[2] *= factor[ROWS - 1], c[3] *= factor[ROWS - 1];
        }
      }
      uint32_t a[ROWS][4];
      if constexpr (ROWS == 1) {
        split<T>(w[0][0], w[0][1], a[0][0], a[0][1]);
        split<T>(w[0][2], w[0][3], a[0][2], a[0][3]);
      } else {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          split<T>(w[r][0], w[r][1], a[0][r], a[1][r]);
          split<T>(w[r][2], w[r][3], a[0][r + 2], a[1][r + 2]);
        }
      }
      // Dims 64 h + 8 g to + 7 of four tokens, which become pairs of tokens for each dim.
      constexpr int WORDS = L::BYTES ? 2 : 4;
      uint32_t x[4][WORDS];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint8_t* from = values + L::place(((i & 1) + 8 * (i >> 1) + 2 * t) * L::ROW + (64 * h + 8 * g) * (L::BYTES ? 1 : 2));
        if constexpr (L::BYTES) {
          const uint2 v = *reinterpret_cast<const uint2*>(from);
          x[i][0] = v.x, x[i][1] = v.y;
        } else {
          const uint4 v = *reinterpret_cast<const uint4*>(from);
          x[i][0] = v.x, x[i][1] = v.y, x[i][2] = v.z, x[i][3] = v.w;
        }
        if (!known(i)) {  // what an earlier sequence left may be NaN
#pragma unroll
          for (int k = 0; k < WORDS; k++) x[i][k] = 0;
        }
      }
#pragma unroll
      for (int k = 0; k < WORDS; k++) {
        if constexpr (L::BYTES) {
          uint32_t b0[4], b1[4];
          widen<D>(__byte_perm(x[0][k], x[1][k], 0x5140), b0[0], b0[1]);
          widen<D>(__byte_perm(x[0][k], x[1][k], 0x7362), b0[2], b0[3]);
          widen<D>(__byte_perm(x[2][k], x[3][k], 0x5140), b1[0], b1[1]);
          widen<D>(__byte_perm(x[2][k], x[3][k], 0x7362), b1[2], b1[3]);
#pragma unroll
          for (int j = 0; j < 4; j++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) multiply<T>(y[8 * h + 4 * k + j], a[r], b0[j], b1[j]);
        } else {
          const uint32_t b0 = __byte_perm(x[0][k], x[1][k], 0x5410), b1 = __byte_perm(x[2][k], x[3][k], 0x5410);
          const uint32_t c0 = __byte_perm(x[0][k], x[1][k], 0x7632), c1 = __byte_perm(x[2][k], x[3][k], 0x7632);
#pragma unroll
          for (int r = 0; r < ROWS; r++) multiply<T>(y[8 * h + 2 * k], a[r], b0, b1);
#pragma unroll
          for (int r = 0; r < ROWS; r++) multiply<T>(y[8 * h + 2 * k + 1], a[r], c0, c1);
        }
      }
    }
  }

  // Leaves 8 queries' results in shared memory: sums [8][DIM], then the largest scores [8] and totals [8].
  __device__ __forceinline__ void leave(int r, float* to) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    float all = total[r];
    all += __shfl_xor_sync(~0u, all, 1);
    all += __shfl_xor_sync(~0u, all, 2);
    if (t == 0) to[8 * DIM + g] = top[r], to[8 * DIM + 8 + g] = all;
#pragma unroll
    for (int h = 0; h < DIM / 64; h++)
#pragma unroll
      for (int c = 0; c < 2; c++)
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
          float4 v;
          float* x = &v.x;
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float(&s)[4] = y[8 * h + j + i];
            x[i] = ROWS == 1 ? s[c] + s[c + 2] : s[2 * r + c];
            if (D == INT8KV) x[i] *= unit[L::GROUPS == 1 ? 0 : h];
          }
          *reinterpret_cast<float4*>(to + g * DIM + 64 * h + 16 * t + 8 * c + j) = v;
        }
  }
};

}  // namespace cuda::attention::decoding
