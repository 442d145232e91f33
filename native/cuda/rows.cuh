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
//   same(P)                     whether all items have the same activations
//   early_items()               items whose first part's weights are known before await_inputs
//   prepare(shared)             called by all threads after await_inputs; returns the number of items
//   parts(), chunks(part)       of each item
//   source(cursor), pitch(part), scale_pitch(part)
//   mask(cursor)                bit p: whether there is a row of activations at position p
//   row_of(cursor, p, factor)   that row, and what to multiply it by
//   finish(item, p, n, sums)    the result for weight row n (0 to 15) and position p, called by whole warps; some n and p are out of bounds
//   after(item)                 called by all threads
//
// RESIDENT: the activations that a warp needs fit into its `slots` and are converted once; otherwise, for each chunk anew.
template <class Op, Dtype D, int P, bool RESIDENT>
__global__ void __launch_bounds__(ROW_THREADS, P == 1 ? 3 : P == 4 ? 2 : 1) rows_kernel(const Op given, const int32_t slots) {
  constexpr int M = Op::MATRICES;
  using W = Warp<D, P, M>;
  constexpr int S = W::STAGES, V = W::V;
  extern __shared__ __align__(128) uint8_t shared[];
  let_next_start();
  Op op = given;
  const int warp = threadIdx.x / 32;
  float* partial = reinterpret_cast<float*>(shared + ROW_WARPS * W::bytes(slots));
  constexpr int SUMS = M * TILE_N * P;  // of a warp
  W w;
  w.start(shared + warp * W::bytes(slots), slots);

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
  items = op.prepare(reinterpret_cast<uint8_t*>(partial + 2 * ROW_WARPS * SUMS));
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
  uint32_t mask = now.item < items ? op.mask(now) : 0;
  if constexpr (P > 1) w.expect(mask);
  auto convert = [&](int slot, int p, float* v, float by) {
    if constexpr (Op::WEIGHTED) {
#pragma unroll
      for (int i = 0; i < V; i++) v[i] *= by;
    }
    w.convert(slot, p, v);
  };
  // Loads the activations of TOGETHER chunks, so that the loads' latencies overlap.
  constexpr int TOGETHER = !RESIDENT ? 1 : P == 1 ? 16 / V : P == 4 ? 8 / V : 1;
  float values[TOGETHER][P][V], factors[TOGETHER][P];
  auto load = [&](int i, const Cursor& c, uint32_t rows) {
#pragma unroll
    for (int p = 0; p < P; p++)
      if (P == 1 || rows >> p & 1) w.load(op.row_of(c, p, factors[i][p]), c.chunk, values[i][p]);
  };
  if constexpr (RESIDENT) {
    Cursor c = now;
    for (int first = 0; c.item == now.item && c.item < items; first += TOGETHER) {
      int count = 0;
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) {
        if (c.item != now.item) continue;
        load(i, c, mask);
        c.chunk += ROW_WARPS;
        settle(c);
        count++;
      }
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) {
        if (i >= count) continue;
#pragma unroll
        for (int p = 0; p < P; p++)
          if (P == 1 || mask >> p & 1) convert(first + i, p, values[i][p], factors[i][p]);
      }
    }
    __syncwarp();
  } else if (now.item < items) {
    load(0, now, mask);
  }
  int stage = 0, turn = 0;
  for (int32_t item = blockIdx.x; item < items; item += gridDim.x, turn ^= 1) {
    w.clear();
    for (int slot = 0; now.item == item; slot += RESIDENT) {
      if constexpr (!RESIDENT) {
#pragma unroll
        for (int p = 0; p < P; p++)
          if (P == 1 || mask >> p & 1) convert(0, p, values[0][p], factors[0][p]);
      }
      const uint32_t active = mask;
      now.chunk += ROW_WARPS;
      const bool moved = settle(now);
      if constexpr (!RESIDENT)
        if (now.item < items) {
          if (moved) mask = op.mask(now);
          load(0, now, mask);
        }
      await_copies<S - 1>();
      __syncwarp();
      w.multiply(stage, slot, active);
      __syncwarp();
      if constexpr (P > 1 && !RESIDENT)
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

// Launches Op<format>, which `make(format tag)` builds, for up to P rows at a time. `depth`: columns of an item.
template <template <Dtype> class Op, int P, class Make>
void launch_rows(Dtype format, int items, int across, int64_t depth, int op_bytes, Launch& launch, Make make) {
  auto go = [&](auto tag) {
    constexpr Dtype D = decltype(tag)::value;
    using O = Op<D>;
    constexpr int M = O::MATRICES, TOGETHER = P <= 4 ? 2 : 1, LIMIT = (227 << 10) / TOGETHER - 1024;  // blocks of a multiprocessor
    const dim3 grid(items < TOGETHER * launch.multiprocessors ? items : TOGETHER * launch.multiprocessors, across);
    auto bytes = [&](int slots) { return ROW_WARPS * (Warp<D, P, M>::bytes(slots) + 2 * M * TILE_N * P * 4) + op_bytes; };
    if constexpr (O::same(P)) {
      const int64_t slots = (depth / Chunks<D>::CHUNK + ROW_WARPS - 1) / ROW_WARPS;
      if (slots < 256 && bytes(static_cast<int>(slots)) <= LIMIT) return launch(rows_kernel<O, D, P, true>, grid, ROW_THREADS, bytes(static_cast<int>(slots)), make(tag), static_cast<int32_t>(slots));
    }
    launch(rows_kernel<O, D, P, false>, grid, ROW_THREADS, bytes(1), make(tag), 1);
  };
  switch (format) {
    case BF16: return go(std::integral_constant<Dtype, BF16>{});
    case F16: return go(std::integral_constant<Dtype, F16>{});
    case INT8: return go(std::integral_constant<Dtype, INT8>{});
    case FP8: return go(std::integral_constant<Dtype, FP8>{});
    default: return go(std::integral_constant<Dtype, INT4>{});
  }
}
// `op_bytes(P)`: shared memory of the op's own.
template <template <Dtype> class Op, class Bytes, class Make>
void launch_rows(Dtype format, int most, int items, int across, int64_t depth, Launch& launch, Bytes op_bytes, Make make) {
  if (most == 1) launch_rows<Op, 1>(format, items, across, depth, op_bytes(1), launch, make);
  else if (most <= 4) launch_rows<Op, 4>(format, items, across, depth, op_bytes(4), launch, make);
  else if (most <= 8) launch_rows<Op, 8>(format, items, across, depth, op_bytes(8), launch, make);
  else launch_rows<Op, 16>(format, items, across, depth, op_bytes(16), launch, make);
}

}  // namespace cuda
