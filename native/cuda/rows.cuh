// Products of a few rows of float32 activations with weights, bounded by the speed at which weights arrive from memory.
//
// A block computes items: 16 rows of a matrix (or of two, gate and up) times up to P rows of activations. Its warps take the chunks of columns
// in turn. Each copies its next chunks into a ring of its own in shared memory, the first before the activations are there, and
// multiplies them as chunks.cuh says; then the block adds up its warps' sums.
#pragma once
#include "chunks.cuh"

namespace cuda {

constexpr int ROW_WARPS = 8, ROW_THREADS = 32 * ROW_WARPS;
constexpr int ROWS_MOST = 16;

// Where a warp is: the chunk of a part of an item. An item's parts are matrices whose products are added up.
struct Cursor {
  int32_t item, part, chunk, chunks;
};

// Weights of an item's part, from row 0 of the tile on. `left`: rows of the matrix from there on, at least 1.
template <int M>
struct Source {
  const uint8_t* data[M];
  const uint8_t* scales[M];
  int32_t left;
};

// What an op must say; see rows.cu and experts_rows.cu:
//   MATRICES                    1, or 2 for gate and up
//   PARTS_KNOWN                 whether parts() is known before await_inputs
//   WEIGHTED                    whether row_of sets a factor
//   early_items()               items whose first part's weights are known before await_inputs
//   prepare(shared)             called by all threads after await_inputs; returns the number of items
//   parts(), chunks(part)       of each item
//   source(cursor), pitch(part), scale_pitch(part)
//   mask(cursor)                bit p: whether there is a row of activations at position p
//   row_of(cursor, p, factor)   that row, and what to multiply it by
//   finish(item, p, n, sums)    the result for weight row n (0 to 15) and position p, called by whole warps; some n and p are out of bounds
//   after(item)                 called by all threads
template <class Op, Dtype D, int P>
__global__ void __launch_bounds__(ROW_THREADS, P <= 4 ? 3 : 1) rows_kernel(const Op given) {
  constexpr int M = Op::MATRICES;
  using W = Warp<D, P, M>;
  constexpr int S = W::STAGES, V = W::V, READY = P <= 4 ? P : 1;
  extern __shared__ __align__(128) uint8_t shared[];
  let_next_start();
  Op op = given;
  const int warp = threadIdx.x / 32;
  float* partial = reinterpret_cast<float*>(shared + ROW_WARPS * W::BYTES);
  constexpr int SUMS = M * TILE_N * P;  // of a warp
  W w;
  w.start(shared + warp * W::BYTES);

  int32_t items = op.early_items();
  // To this warp's first chunk at or after the cursor that exists; whether it is in another part.
  auto settle = [&](Cursor& c) {
    if (c.chunk < c.chunks) return false;
    while (c.item < items && c.chunk >= c.chunks) {
      c.chunk -= c.chunks;
      if (++c.part == op.parts()) c.item += gridDim.x, c.part = 0, c.chunk = warp;
      if (c.item < items) c.chunks = op.chunks(c.part);
    }
    return true;
  };
  auto aim = [&](const Cursor& c) { w.aim(op.source(c), op.pitch(c.part), op.scale_pitch(c.part)); };

  Cursor ahead{static_cast<int32_t>(blockIdx.x), 0, warp, op.chunks(0)};
  int started = 0;
  if constexpr (Op::PARTS_KNOWN) settle(ahead);
  if (ahead.item < items && ahead.chunk < ahead.chunks) aim(ahead);
  while (started < S && ahead.item < items && ahead.chunk < ahead.chunks) {
    w.fetch(started++, ahead.chunk);
    close_copies();
    ahead.chunk += ROW_WARPS;
    if constexpr (Op::PARTS_KNOWN)
      if (settle(ahead) && ahead.item < items) aim(ahead);
  }
  await_inputs();
  const int32_t known = items;
  items = op.prepare(shared + ROW_WARPS * W::BYTES + 2 * ROW_WARPS * SUMS * 4);
  if ((settle(ahead) || ahead.item >= known || !started) && ahead.item < items) aim(ahead);
  for (; started < S; started++) {
    if (ahead.item < items) {
      w.fetch(started, ahead.chunk);
      ahead.chunk += ROW_WARPS;
      if (settle(ahead) && ahead.item < items) aim(ahead);
    }
    close_copies();
  }

  Cursor now{static_cast<int32_t>(blockIdx.x), 0, warp, op.chunks(0)};
  settle(now);
  uint32_t mask = 0;
  const float* row = nullptr;  // if P is 1
  float values[READY][V], factors[READY], factor = 1;
  // Called when another part begins.
  auto meet = [&](const Cursor& c) {
    if (c.item >= items) return 0u;
    const uint32_t rows = op.mask(c);
    if constexpr (P == 1)
      if (rows) row = op.row_of(c, 0, factor);
    return rows;
  };
  auto load_next = [&](const Cursor& c, uint32_t rows) {
    if constexpr (P == 1) {
      if (rows) w.load(row, c.chunk, values[0]), factors[0] = factor;
    } else if constexpr (P <= 4) {
#pragma unroll
      for (int p = 0; p < P; p++)
        if (rows >> p & 1) w.load(op.row_of(c, p, factors[p]), c.chunk, values[p]);
    }
  };
  auto convert = [&](int p, float* v, float by) {
    if constexpr (Op::WEIGHTED) {
#pragma unroll
      for (int i = 0; i < V; i++) v[i] *= by;
    }
    w.convert(p, v);
  };
  mask = meet(now);
  if constexpr (P > 1) w.expect(mask);
  load_next(now, mask);
  int stage = 0, turn = 0;
  for (int32_t item = blockIdx.x; item < items; item += gridDim.x, turn ^= 1) {
    w.clear();
    while (now.item == item) {
      if constexpr (P <= 4) {
#pragma unroll
        for (int p = 0; p < READY; p++)
          if (P == 1 || mask >> p & 1) convert(p, values[p], factors[p]);
      } else {
#pragma unroll 4
        for (int p = 0; p < P; p++) {
          if (!(mask >> p & 1)) continue;
          float v[V], by;
          w.load(op.row_of(now, p, by), now.chunk, v);
          convert(p, v, by);
        }
      }
      const uint32_t active = mask;
      now.chunk += ROW_WARPS;
      const bool moved = settle(now);
      if (moved) mask = meet(now);
      load_next(now, mask);
      await_copies<S - 1>();
      __syncwarp();
      w.multiply(stage, active);
      __syncwarp();
      if constexpr (P > 1)
        if (moved) w.expect(mask);
      if (ahead.item < items) {
        w.fetch(stage, ahead.chunk);
        ahead.chunk += ROW_WARPS;
        if (settle(ahead) && ahead.item < items) aim(ahead);
      }
      close_copies();
      stage = stage + 1 == S ? 0 : stage + 1;
    }
    float* mine = partial + turn * ROW_WARPS * SUMS;
    w.store(mine + warp * SUMS);
    __syncthreads();
    for (int i = threadIdx.x; i < (TILE_N * P + 31) / 32 * 32; i += ROW_THREADS) {
      const int n = i % TILE_N, p = i / TILE_N;
      float sums[M] = {};
      if (p < P) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int j = 0; j < ROW_WARPS; j++) sums[m] += mine[j * SUMS + (m * TILE_N + n) * P + p];
      }
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

// Launches Op<format>, which `make(format tag)` builds, for up to P rows at a time.
template <template <Dtype> class Op, int P, class Make>
void launch_rows(Dtype format, int items, int across, int op_bytes, Launch& launch, Make make) {
  auto go = [&](auto tag) {
    constexpr Dtype D = decltype(tag)::value;
    using O = Op<D>;
    constexpr int M = O::MATRICES;
    const int bytes = ROW_WARPS * (Warp<D, P, M>::BYTES + 2 * M * TILE_N * P * 4) + op_bytes;
    const int together = (P <= 4 ? 2 : 1) * launch.multiprocessors;
    launch(rows_kernel<O, D, P>, dim3(items < together ? items : together, across), ROW_THREADS, bytes, make(tag));
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
  if (most == 1) launch_rows<Op, 1>(format, items, across, op_bytes, launch, make);
  else if (most <= 4) launch_rows<Op, 4>(format, items, across, op_bytes, launch, make);
  else if (most <= 8) launch_rows<Op, 8>(format, items, across, op_bytes, launch, make);
  else launch_rows<Op, 16>(format, items, across, op_bytes, launch, make);
}

}  // namespace cuda
