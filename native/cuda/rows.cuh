// Products of a few rows of float32 activations with weights, bounded by the speed at which weights arrive from memory.
//
// A block computes items: 16 rows of a matrix, or 8 of gate and the same 8 of up, times all rows of activations. Its warps take the chunks of columns
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

// Weights of an item's part: the first rows of the two halves of its tile, and how many rows each half has.
struct Source {
  const uint8_t* data[2];
  const uint8_t* scales[2];
  int32_t left[2];  // at least 1
};

// What an op must say; see rows.cu and experts_rows.cu:
//   TILE                        rows of the result in an item: 16, or 8 of gate and up
//   PARTS_KNOWN                 whether parts() is known before await_inputs
//   WEIGHTED                    whether row_of sets a factor
//   same(span)                  whether all items have the same rows of activations, each at its own position if the item uses it
//   everybody()                 these positions
//   SPLITS                      how many blocks share an item's chunks at one row; `finish` then gets a part of the sum in each
//   early_items()               items whose first part's weights are known before await_inputs
//   prepare(shared)             called by all threads after await_inputs; returns the number of items
//   parts(), chunks(part)       of each item
//   source(cursor), pitch(part), scale_pitch(part)
//   mask(cursor)                bit p: whether there is a row of activations at position p; for MANY, positions are used from 0 on
//   row_of(cursor, p, factor)   that row, and what to multiply it by
//   target(cursor, p)           which sum it belongs to
//   finish(item, p, n, sum, up) the result for result n of the tile and sum p, called by whole warps; some n and p are out of bounds
//   after(item)                 called by all threads
//
// How many rows: ONE, FOUR, or MANY, which takes four at a time and keeps the sums in shared memory.
enum class Span { ONE, FOUR, MANY };

// RESIDENT: the activations that a warp needs fit into its `slots` and are converted once; otherwise, for each chunk anew.
// `width`: sums of a weight row.
template <class Op, Dtype D, Span SPAN, bool RESIDENT>
__global__ void __launch_bounds__(ROW_THREADS, SPAN == Span::ONE ? 3 : 2) rows_kernel(const Op given, const int32_t slots, const int32_t width) {
  constexpr bool MANY = SPAN == Span::MANY;
  constexpr int P = SPAN == Span::ONE ? 1 : 4;
  using W = Warp<D, P>;
  constexpr int S = W::STAGES, V = W::V;
  extern __shared__ __align__(128) uint8_t shared[];
  let_next_start();
  Op op = given;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);  // so that the compiler knows it is the same for all lanes
  float* partial = reinterpret_cast<float*>(shared + ROW_WARPS * W::bytes(slots));
  const int count = TILE_N * (MANY ? width : P);  // sums of a warp
  constexpr int SPLITS = SPAN == Span::ONE ? Op::SPLITS : 1, STRIDE = SPLITS * ROW_WARPS;
  const int own = SPLITS > 1 ? static_cast<int>(blockIdx.y) * ROW_WARPS + warp : warp;  // this warp's first chunk
  W w;
  w.start(shared + warp * W::bytes(slots), slots);

  int32_t items = op.early_items();
  // To this warp's first chunk at or after the cursor that exists; whether it is in another part.
  auto settle = [&](Cursor& c) {
    if (c.chunk < c.chunks) return false;
    while (c.item < items && c.chunk >= c.chunks) {
      c.chunk -= c.chunks;
      if (++c.part == op.parts()) c.item += gridDim.x, c.part = 0, c.chunk = own;
      if (c.item < items) c.chunks = op.chunks(c.part);
    }
    return true;
  };
  auto aim = [&](const Cursor& c) { w.aim(op.source(c), op.pitch(c.part), op.scale_pitch(c.part)); };

  Cursor ahead{static_cast<int32_t>(blockIdx.x), 0, own, op.chunks(0)};
  int started = 0;
  if constexpr (Op::PARTS_KNOWN) settle(ahead);
  if (ahead.item < items && ahead.chunk < ahead.chunks) aim(ahead);
  while (started < S && ahead.item < items && ahead.chunk < ahead.chunks) {
    w.fetch(started++, ahead.chunk);
    close_copies();
    ahead.chunk += STRIDE;
    if constexpr (Op::PARTS_KNOWN)
      if (settle(ahead) && ahead.item < items) aim(ahead);
  }
  await_inputs();
  const int32_t known = items;
  items = op.prepare(reinterpret_cast<uint8_t*>(partial + (MANY ? 1 : 2) * ROW_WARPS * count));

  Cursor now{static_cast<int32_t>(blockIdx.x), 0, own, op.chunks(0)};
  settle(now);
  uint32_t mask = now.item < items ? op.mask(now) : 0;
  const uint32_t all = now.item < items ? op.everybody() : 0;  // if RESIDENT
  const int groups = MANY ? (32 - __clz(all) + 3) / 4 : 1;     // of four rows
  // Visits the chunks of this warp's first item, and their rows.
  auto resident = [&](auto visit) {
    Cursor c = now;
    for (int slot = 0; c.item == now.item && c.item < items; slot += groups) {
#pragma unroll 1
      for (int p = 0; p < (MANY ? 4 * groups : P); p++)
        if (all >> p & 1) visit(c, slot + p / 4, p);
      c.chunk += STRIDE;
      settle(c);
    }
  };
  if constexpr (RESIDENT) {
    resident([&](const Cursor& c, int slot, int p) {
      float factor;
      w.fetch_x(slot, p % 4, op.row_of(c, p, factor), c.chunk);
    });
    close_copies();
  }
  const int after_x = S - started;
  if ((settle(ahead) || ahead.item >= known || !started) && ahead.item < items) aim(ahead);
  for (; started < S; started++) {
    if (ahead.item < items) {
      w.fetch(started, ahead.chunk);
      ahead.chunk += STRIDE;
      if (settle(ahead) && ahead.item < items) aim(ahead);
    }
    close_copies();
  }

  auto put = [&](int slot, int p, float* v, float factor) {
    if constexpr (Op::WEIGHTED) {
#pragma unroll
      for (int i = 0; i < V; i++) v[i] *= factor;
    }
    w.put(slot, p, v);
  };
  // Activations of the next four rows, loaded a step ahead.
  float values[P][V], factors[P];
  auto load = [&](const Cursor& c, uint32_t rows, int group) {
#pragma unroll
    for (int p = 0; p < P; p++)
      if (rows >> (4 * group + p) & 1) w.load(op.row_of(c, 4 * group + p, factors[p]), c.chunk, values[p]);
  };
  if constexpr (RESIDENT) {
    if (after_x == 0) await_copies<0>();
    else if (after_x == 1) await_copies<1>();
    else if (after_x == 2) await_copies<2>();
    else await_copies<3>();
    __syncwarp();
    resident([&](const Cursor& c, int slot, int p) {
      float factor = 1, v[V];
      if constexpr (Op::WEIGHTED) op.row_of(c, p, factor);
      w.taken(slot, p % 4, v);
      put(slot, p % 4, v, factor);
    });
    __syncwarp();
  } else if (now.item < items) {
    load(now, mask, 0);
  }
  if constexpr (P > 1 && !MANY) w.expect(mask);

  int stage = 0, turn = 0;
  for (int32_t item = blockIdx.x; item < items; item += gridDim.x) {
    float* mine = partial + (turn * ROW_WARPS + warp) * count;
    w.clear();
    if constexpr (MANY) {
      for (int i = w.lane; i < count; i += 32) mine[i] = 0;
      __syncwarp();
    }
    for (int slot = 0; now.item == item;) {
      const Cursor at = now;
      const uint32_t active = mask;
      now.chunk += STRIDE;
      const bool moved = settle(now);
      const bool more = now.item < items;
      if (moved && more) mask = op.mask(now);
      const int steps = MANY ? (32 - __clz(active) + 3) / 4 : 1;
      for (int group = 0; group < steps; group++) {
        const uint32_t rows = MANY ? active >> 4 * group & 15 : active;
        if constexpr (MANY) w.expect(rows);
        if constexpr (!RESIDENT) {
#pragma unroll
          for (int p = 0; p < P; p++)
            if (rows >> p & 1) put(0, p, values[p], factors[p]);
          if (group + 1 < steps) load(at, active, group + 1);
          else if (more) load(now, mask, 0);
        }
        if (group == 0) await_copies<S - 1>();
        __syncwarp();
        w.multiply(stage, slot, rows);
        __syncwarp();
        if constexpr (MANY) {
          w.each([&](int n, int p, float v) {
            if (rows >> p & 1) mine[n * width + op.target(at, 4 * group + p)] += v;
          });
          w.clear();
        }
        if constexpr (RESIDENT) slot++;
      }
      if constexpr (P > 1 && !MANY)
        if (moved) w.expect(mask);
      if (ahead.item < items) {
        w.fetch(stage, ahead.chunk);
        ahead.chunk += STRIDE;
        if (settle(ahead) && ahead.item < items) aim(ahead);
      }
      close_copies();
      stage = stage + 1 == S ? 0 : stage + 1;
    }
    if constexpr (!MANY) w.store(mine);
    __syncthreads();
    const int positions = MANY ? width : P;
    for (int i = threadIdx.x; i < (Op::TILE * positions + 31) / 32 * 32; i += ROW_THREADS) {
      const int n = i % Op::TILE, p = i / Op::TILE;
      float sum = 0, up = 0;
      if (p < positions) {
#pragma unroll
        for (int j = 0; j < ROW_WARPS; j++) {
          const float* of = partial + (turn * ROW_WARPS + j) * count + n * positions + p;
          sum += of[0];
          if constexpr (Op::TILE < TILE_N) up += of[Op::TILE * positions];
        }
      }
      op.finish(item, p, n, sum, up);
    }
    op.after(item);
    if constexpr (MANY) __syncthreads();
    else turn ^= 1;
  }
  await_copies<0>();
}

template <Dtype D>
__device__ __forceinline__ const uint8_t* data_at(const Matrix& m, int64_t row, int32_t k) {
  return static_cast<const uint8_t*>(m.data) + row * Chunks<D>::pitch(k);
}
template <Dtype D>
__device__ __forceinline__ const uint8_t* scales_at(const Matrix& m, int64_t row, int32_t k) {
  return reinterpret_cast<const uint8_t*>(m.scales) + row * Chunks<D>::scale_pitch(k);
}
// The tile from a row of a matrix on, of which `left` rows exist.
template <Dtype D>
__device__ __forceinline__ Source tile_of(const Matrix& m, int64_t row, int32_t left, int32_t k) {
  const int64_t second = row + min(left - 1, TILE_N / 2);
  return {{data_at<D>(m, row, k), data_at<D>(m, second, k)}, {scales_at<D>(m, row, k), scales_at<D>(m, second, k)}, {left, max(left - TILE_N / 2, 1)}};
}
// The tile whose halves are the same rows of gate and up.
template <Dtype D>
__device__ __forceinline__ Source tile_of(const Matrix& gate, const Matrix& up, int64_t row, int32_t left, int32_t k) {
  return {{data_at<D>(gate, row, k), data_at<D>(up, row, k)}, {scales_at<D>(gate, row, k), scales_at<D>(up, row, k)}, {left, left}};
}

// Positions of a kernel for up to `most` rows.
constexpr int positions_of(int most) { return most == 1 ? 1 : most <= 4 ? 4 : most <= 8 ? 8 : ROWS_MOST; }

// Launches Op<format>, which `make(format tag)` builds, for up to `most` rows at a time. `depth`: columns of an item; `op_bytes`: shared memory
// of the op's own.
template <template <Dtype> class Op, Span SPAN, class Make>
void launch_rows(Dtype format, int most, int items, int across, int64_t depth, int op_bytes, Launch& launch, Make make) {
  auto go = [&](auto tag) {
    constexpr Dtype D = decltype(tag)::value;
    using O = Op<D>;
    constexpr int P = SPAN == Span::ONE ? 1 : 4, SPLITS = SPAN == Span::ONE ? O::SPLITS : 1;
    constexpr int WHOLE = (227 << 10) - 1024, HALF_OF_IT = (227 << 10) / 2 - 1024, THIRD = (227 << 10) / 3 - 1024;
    const int width = positions_of(most);
    auto bytes = [&](int slots) { return ROW_WARPS * (Warp<D, P>::bytes(slots) + (SPAN == Span::MANY ? 1 : 2) * TILE_N * width * 4) + op_bytes; };
    auto grid = [&](int together) {
      const int most_blocks = together * launch.multiprocessors / SPLITS;
      return dim3(items < most_blocks ? items : most_blocks, across * SPLITS);
    };
    if constexpr (O::same(SPAN)) {
      const int64_t chunks = (depth / Chunks<D>::CHUNK + SPLITS * ROW_WARPS - 1) / (SPLITS * ROW_WARPS);
      const int slots = static_cast<int>((chunks < 256 ? chunks : 256) * ceil_div(width, 4));
      // Alone on its multiprocessor, a block gets fewer weights at a time; that pays if it has many items.
      const bool alone = bytes(slots) > HALF_OF_IT;
      if (bytes(slots) <= (items >= 4 * launch.multiprocessors ? WHOLE : HALF_OF_IT))
        return launch(rows_kernel<O, D, SPAN, true>, grid(alone ? 1 : SPAN == Span::ONE && bytes(slots) <= THIRD ? 3 : 2), ROW_THREADS, bytes(slots), make(tag), slots, width);
    }
    launch(rows_kernel<O, D, SPAN, false>, grid(2), ROW_THREADS, bytes(1), make(tag), 1, width);
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
void launch_rows(Dtype format, int most, int items, int across, int64_t depth, int op_bytes, Launch& launch, Make make) {
  if (most == 1) launch_rows<Op, Span::ONE>(format, most, items, across, depth, op_bytes, launch, make);
  else if (most <= 4) launch_rows<Op, Span::FOUR>(format, most, items, across, depth, op_bytes, launch, make);
  else launch_rows<Op, Span::MANY>(format, most, items, across, depth, op_bytes, launch, make);
}

}  // namespace cuda
