// A warp's part of attention.decode: the row of tasks, the ring of copies, queries as operands and the softmax over units of tokens.
// Included by attention_decode.cu only.
#pragma once
#include <cuda.h>

#include "attention_tensor.cuh"

namespace cuda::attention::decoding {

constexpr int WARPS = 8, THREADS = 32 * WARPS;

struct Decode {
  Rows q, y;
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
  static constexpr int UNIT = BYTES ? 32 : 16;             // tokens
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
  // The reverse: which j and t have a piece.
  static __device__ __forceinline__ int2 taker(int piece) {
    if (ROW == 256) return {(piece >> 1 & 1) + 2 * (piece >> 3), (piece & 1) + 2 * (piece >> 2 & 1)};
    return ROW == 128 && D != INT8KV ? int2{piece & 1, piece >> 1} : int2{piece >> 2, piece & 3};
  }
  // Where a byte of a unit is: the 16-byte pieces of each 128 bytes are permuted as copies of tensor maps do.
  static __host__ __device__ constexpr int place(int byte) { return byte ^ (byte >> 3 & 0x70); }
  // Where `byte` + `more` is, if no bit is in both and `placed` is the place of `byte`: a constant away from another `more`'s.
  static __device__ __forceinline__ int further(int placed, int more) { return (placed ^ (more >> 3 & 0x70) ^ (more & 0x7f)) + (more & ~0x7f); }
};

// A task: some queries of a KV head of a sequence.
struct Task {
  int sequence, group, head, groups;  // groups: of the sequence's queries
  int begin, units, span;             // in all tasks' row of units; of this task; and how many it occupies in the row
  Segment segment;

  template <class L> __device__ __forceinline__ void enter(const Decode& a, int queries, int apart) {
    segment = a.step.segment(sequence);
    units = (segment.position + segment.rows + L::UNIT - 1) / L::UNIT;
    groups = (segment.rows * a.share + queries - 1) / queries;
    span = (units + apart - 1) / apart * apart;
  }
  template <class L> __device__ __forceinline__ void next(const Decode& a, int queries, int apart, int sequences) {
    begin += span;
    if (++head < a.cache.heads) return;
    head = 0;
    if (++group < groups) return;
    group = 0;
    while (++sequence < sequences) {
      const int rows = a.step.segments[sequence * 3 + 1];
      if (rows > 0 && rows <= a.few) return enter<L>(a, queries, apart);
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
  __device__ __forceinline__ void settle(const Decode& a, int queries, int apart, int sequences, int last) {
    for (;;) {
      end = min(task.units, last - task.begin);
      if (unit < end) return;
      task.next<L>(a, queries, apart, sequences);
      if (task.begin >= last) return;
      unit = warp_id();
    }
  }
  // Whether no row of this step is in the next unit.
  __device__ __forceinline__ bool old() const { return (unit + 1) * L::UNIT <= task.segment.position; }

  __device__ __forceinline__ void copy(const Decode& a, const CUtensorMap* keys, const CUtensorMap* values, int columns, int stage) const {
    const int block = a.step.block(a.step.pages + static_cast<int64_t>(task.sequence) * columns, unit * L::UNIT / BLOCK_TOKENS, columns);
    const int64_t at = (static_cast<int64_t>(block) * a.cache.heads + task.head) * head_bytes<D>(DIM);
    const int half = unit % (BLOCK_TOKENS / L::UNIT);
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

// Queries on their way to products. A warp reads one (or two, 8 apart), all warps take all of them from shared memory as operands: 8 with their
// two parts as rows g and g + 8, or 16 with separate parts.
template <Dtype D, int DIM, int QUERIES> struct Queries {
  using L = Layout<D, DIM>;
  using T = Half<D>;
  static constexpr int ROWS = QUERIES / 8, PARTS = ROWS * DIM / 16 * 32 * 4;  // words
  static constexpr int SHARED = (PARTS + 2 * QUERIES) * 4;                     // bytes; parts, then scales of scores and how many tokens are seen
  static constexpr int N = DIM / 32;
  float x[ROWS][N];  // of this warp's queries
  int64_t at[ROWS];  // in q and y; -1 beyond the task's queries
  int seen[ROWS];

  __device__ __forceinline__ void read(const Decode& a, const Task& task) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int i = task.group * QUERIES + r * 8 + warp_id(), row = i / a.share;
      at[r] = row < task.segment.rows ? ((static_cast<int64_t>(task.segment.first + row) * a.cache.heads + task.head) * a.share + i - row * a.share) * DIM + lane_id() * N : -1;
      seen[r] = row < task.segment.rows ? task.segment.position + row + 1 : 1 << 30;
    }
    a.q.with_type([&](auto type) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int d = 0; d < N; d++) x[r][d] = 0;
        if (at[r] >= 0) a.q.read<decltype(type)>(at[r], x[r]);
      }
    });
  }
  __device__ __forceinline__ void share(const Decode& a, uint32_t* to) const {
    const int lane = lane_id(), d = lane * N, e = d % L::NUMBERS / 4;
    const int2 taker = L::taker(d / L::NUMBERS);
    // Dims 4 e to + 3 of a piece are the words of lane 4 g + t: parts of the first two and the last two.
    uint32_t* const words = to + ((taker.x * (L::NUMBERS / 4) + e) * 32 + warp_id() * 4 + taker.y) * 4;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float top = 0;
#pragma unroll
      for (int i = 0; i < N; i++) top = fmaxf(top, fabsf(x[r][i]));
      top = largest(top);
      // Half numbers have a small range.
      const float inverse = top > 0 ? 1 / top : 0;
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        uint32_t high, low;
        split<T>(x[r][i] * inverse, x[r][i + 1] * inverse, high, low);
        const int pair = N == 4 ? i / 2 : lane % 2;
        if (ROWS == 1) words[2 * pair] = high, words[2 * pair + 1] = low;
        else words[2 * pair + r] = high, words[PARTS / 2 + 2 * pair + r] = low;
      }
      if (lane == 0) {
        reinterpret_cast<float*>(to)[PARTS + r * 8 + warp_id()] = top * a.scale;
        reinterpret_cast<int*>(to)[PARTS + QUERIES + r * 8 + warp_id()] = seen[r];
      }
    }
  }
};

template <Dtype D, int DIM, int QUERIES> struct Operand {
  using Q = Queries<D, DIM, QUERIES>;
  uint32_t parts[Q::ROWS][DIM / 16][4];
  float scale[Q::ROWS];  // of scores
  int seen[Q::ROWS];     // tokens

  __device__ __forceinline__ void take(const uint32_t* from) {
#pragma unroll
    for (int r = 0; r < Q::ROWS; r++) {
#pragma unroll
      for (int k = 0; k < DIM / 16; k++) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + r * (Q::PARTS / 2) + (k * 32 + lane_id()) * 4);
        parts[r][k][0] = v.x, parts[r][k][1] = v.y, parts[r][k][2] = v.z, parts[r][k][3] = v.w;
      }
      scale[r] = reinterpret_cast<const float*>(from)[Q::PARTS + r * 8 + lane_id() / 4];
      seen[r] = reinterpret_cast<const int*>(from)[Q::PARTS + QUERIES + r * 8 + lane_id() / 4];
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

  // Adds a unit of tokens, of which the first is t0; the sequence's last is context - 1.
  __device__ __forceinline__ void add(const Operand<D, DIM, QUERIES>& q, const uint8_t* keys, const uint8_t* values, const float* key_scales, const float* value_scales, int t0, int context, int unmasked) {
    constexpr int N = L::UNIT / 4;  // weights of a query that a lane has
    const int g = lane_id() / 4, t = lane_id() % 4;
    int key[L::PIECES];
#pragma unroll
    for (int j = 0; j < L::PIECES; j++) key[j] = L::place(g * L::ROW + L::piece(j, t) * 16);
    const int value = L::place(2 * t * L::ROW + 8 * g * (L::BYTES ? 1 : 2));
    const auto token = [&](int i) { return i / 2 * 8 + 2 * t + i % 2; };  // of weight i
    constexpr int SUMS = L::PIECES > 1 ? 2 : 1;  // of a score, one for each group of int8 keys
    float p[ROWS][N];
#pragma unroll
    for (int n = 0; n < L::UNIT / 8; n++) {
      float s[SUMS][4] = {};
#pragma unroll
      for (int j = 0; j < L::PIECES; j++) {
        const uint4 x = *reinterpret_cast<const uint4*>(keys + L::further(key[j], n * 8 * L::ROW));
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
        float(&c)[4] = s[j % SUMS];
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
        const int i = n * 2 + c;
        float x[ROWS] = {};
#pragma unroll
        for (int h = 0; h < SUMS; h++) {
          const float k = D == INT8KV ? key_scales[token(i) * L::GROUPS + h] : 1.f;
          if constexpr (ROWS == 1) x[0] += (s[h][c] + s[h][c + 2]) * k;
          else x[0] += s[h][c] * k, x[1] += s[h][c + 2] * k;
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) p[r][i] = x[r] * q.scale[r];
      }
    }
    if (t0 + L::UNIT > unmasked) {
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < N; i++)
          if (t0 + token(i) >= min(q.seen[r], context)) p[r][i] = -INFINITY;
    }
    float shrink[ROWS];
    bool some = false;  // of the sums are not zero
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      some |= top[r] != -INFINITY;
      float now = p[r][0];
#pragma unroll
      for (int i = 1; i < N; i++) now = fmaxf(now, p[r][i]);
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
      now = fmaxf(fmaxf(now, __shfl_xor_sync(~0u, now, 2)), top[r]);
      const float base = now == -INFINITY ? 0 : now;
      shrink[r] = power(top[r] - base);
      top[r] = now;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < N; i++) p[r][i] = power(p[r][i] - base), sum += p[r][i];
      total[r] = total[r] * shrink[r] + sum;
    }
    const bool whole = t0 + L::UNIT <= context;
    const auto known = [&](int i) { return whole || t0 + token(i) < context; };
#pragma unroll
    for (int h = 0; h < DIM / 64; h++) {
      float factor[ROWS], w[N];  // w: values' scales in terms of `unit`
#pragma unroll
      for (int r = 0; r < ROWS; r++) factor[r] = shrink[r];
      if constexpr (D == INT8KV) {
        float now = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
          w[i] = known(i) ? value_scales[token(i) * L::GROUPS + h] : 0;
          now = fmaxf(now, w[i]);
        }
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
        now = fmaxf(fmaxf(now, __shfl_xor_sync(~0u, now, 2)), unit[h]);
        const float inverse = 1 / now, change = unit[h] * inverse;
        unit[h] = now;
#pragma unroll
        for (int r = 0; r < ROWS; r++) factor[r] *= change;
#pragma unroll
        for (int i = 0; i < N; i++) w[i] *= inverse;
      }
      bool changed = false;
#pragma unroll
      for (int r = 0; r < ROWS; r++) changed |= some && factor[r] != 1;
      if (__any_sync(~0u, changed)) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
          float(&c)[4] = y[8 * h + j];
          c[0] *= factor[0], c[1] *= factor[0], c[2] *= factor[ROWS - 1], c[3] *= factor[ROWS - 1];
        }
      }
#pragma unroll
      for (int i0 = 0; i0 < N; i0 += 4) {  // 16 tokens
        float v[ROWS][4];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
          for (int i = 0; i < 4; i++) v[r][i] = D == INT8KV ? p[r][i0 + i] * w[i0 + i] : p[r][i0 + i];
        uint32_t a[ROWS][4];
        if constexpr (ROWS == 1) {
          split<T>(v[0][0], v[0][1], a[0][0], a[0][1]);
          split<T>(v[0][2], v[0][3], a[0][2], a[0][3]);
        } else {
#pragma unroll
          for (int r = 0; r < 2; r++) {
            split<T>(v[r][0], v[r][1], a[0][r], a[1][r]);
            split<T>(v[r][2], v[r][3], a[0][r + 2], a[1][r + 2]);
          }
        }
        // Dims 64 h + 8 g to + 7 of four tokens, which become pairs of tokens for each dim.
        constexpr int WORDS = L::BYTES ? 2 : 4;
        uint32_t x[4][WORDS];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const uint8_t* from = values + L::further(value, ((i0 + i) / 2 * 8 + i % 2) * L::ROW + 64 * h * (L::BYTES ? 1 : 2));
          if constexpr (L::BYTES) {
            const uint2 u = *reinterpret_cast<const uint2*>(from);
            x[i][0] = u.x, x[i][1] = u.y;
          } else {
            const uint4 u = *reinterpret_cast<const uint4*>(from);
            x[i][0] = u.x, x[i][1] = u.y, x[i][2] = u.z, x[i][3] = u.w;
          }
        }
        if (!whole) {  // what an earlier sequence left may be NaN
#pragma unroll
          for (int i = 0; i < 4; i++)
#pragma unroll
            for (int k = 0; k < WORDS; k++)
              if (!known(i0 + i)) x[i][k] = 0;
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
  }

  // Leaves the results in shared memory: for each eight queries sums [8][PITCH], then the largest scores [8] and totals [8].
  static constexpr int PITCH = DIM + 8, LEFT = 8 * PITCH + 16;
  __device__ __forceinline__ void leave(float* to, int queries) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int r = 0; r < ROWS; r++, to += LEFT) {
      float all = total[r];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      if (r * 8 + g >= queries) continue;
      if (t == 0) to[8 * PITCH + g] = top[r], to[8 * PITCH + 8 + g] = all;
#pragma unroll
      for (int h = 0; h < DIM / 64; h++) {
        float4 v[4];  // dims 64 h + 16 t + 4 m to + 3
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float(&s)[4] = y[8 * h + m % 2 * 4 + i];
            float x = ROWS == 1 ? s[m / 2] + s[m / 2 + 2] : s[2 * r + m / 2];
            if (D == INT8KV) x *= unit[L::GROUPS == 1 ? 0 : h];
            (&v[m].x)[i] = x;
          }
        // Lanes with t of 2 and 3 write in another order, so that eight lanes' banks differ.
#pragma unroll
        for (int m = 0; m < 4; m++) {
          const bool other = t >= 2;
          const float4 x = {other ? v[m ^ 1].x : v[m].x, other ? v[m ^ 1].y : v[m].y, other ? v[m ^ 1].z : v[m].z, other ? v[m ^ 1].w : v[m].w};
          *reinterpret_cast<float4*>(to + g * PITCH + 64 * h + 16 * t + 4 * (other ? m ^ 1 : m)) = x;
        }
      }
    }
  }
};

}  // namespace cuda::attention::decoding
