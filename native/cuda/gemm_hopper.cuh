// Products with many rows on Hopper: a warpgroup that copies tiles to shared memory and two that multiply them by `wgmma`. Blocks stay and take one tile
// after another; several may share a tile, each computing a part of k.
//
// Weights come by the tensor copy engine. Matrices in 16 bits are multiplied from shared memory; quantised ones are widened in registers, a block of
// 64 columns while the one before is being multiplied. Tokens come by the copy engine too, or, if they are grouped by expert, by `cp.async` of each row.
#pragma once
#include <cuda.h>

#include <type_traits>

#include "gemm_tile.cuh"
#include "wgmma.cuh"

namespace cuda::gemm {

struct Mapped {
  CUtensorMap w[2], scales[2], x;
  Product p;
};

constexpr int HOPPER_THREADS = 384;

template <Dtype F, int N> struct HopperShape {
  using W = Weights<F>;
  static constexpr int COLUMNS = W::QUANTISED && N <= (F == INT4 ? 64 : 32) ? 128 : 64;  // of k in a stage
  static constexpr int BLOCKS = COLUMNS / 64;
  static constexpr int ROW = COLUMNS * W::BITS / 8;
  static constexpr int A_BYTES = TILE_M * ROW, B_BYTES = N * COLUMNS * 2, STAGE_BYTES = A_BYTES + B_BYTES;
  // Scales are copied eight a row, into a ring of its own: a place is free when the stage before the one that refills it is.
  static constexpr int SCALES = 8, SCALE_BYTES = TILE_M * SCALES * 2, SCALE_BLOCKS = SCALES * W::GROUP_COLUMNS / 64;
  static constexpr int SCALE_PLACES = !W::QUANTISED ? 0 : F == INT4 ? 8 : 4;
  static constexpr int RESIDENT = N <= 64 ? 2 : 1;  // blocks of threads on a multiprocessor
  // Each warpgroup's results of so many tokens, in 16 bits, pass through shared memory at a time, or half as many in 32 bits.
  static constexpr int STORE_TOKENS = N <= 64 ? 32 : 64, STORE_BYTES = STORE_TOKENS * 144;
  static constexpr int BUDGET = (RESIDENT == 2 ? 113 : 227) * 1024 - 3072 - SCALE_PLACES * SCALE_BYTES - 2 * STORE_BYTES;
  static constexpr int STAGES = BUDGET / STAGE_BYTES < 12 ? BUDGET / STAGE_BYTES : 12;
  static constexpr int UNIT = W::QUANTISED ? SCALE_BLOCKS / BLOCKS : 1;  // stages: parts of k are multiples of it
  static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = RESIDENT == 2 ? 96 : 232;
  static constexpr bool INTERLEAVED = !W::QUANTISED;  // rows of gate and up, by eights, if gated
  static_assert(STAGES >= 3 && (SCALE_PLACES == 0 || STAGES * BLOCKS <= SCALE_PLACES * SCALE_BLOCKS - SCALE_BLOCKS + 1));

  static size_t shared_bytes(int experts) { return 1024 + STAGES * STAGE_BYTES + SCALE_PLACES * SCALE_BYTES + 2 * STORE_BYTES + STAGES * 16 + 16 + (experts + 1) * 4; }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A position in the ring of stages.
template <int STAGES> struct Turn {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void operator++(int) {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

template <Dtype F, int N> struct HopperBlock {
  using S = HopperShape<F, N>;
  using W = Weights<F>;
  const Mapped& args;
  const Product& p;
  Schedule schedule;
  uint32_t base, scale_base, store_base, full, empty;
  int stages, items;  // stages of a whole tile

  __device__ uint32_t a_at(int stage) const { return base + stage * S::STAGE_BYTES; }
  __device__ uint32_t b_at(int stage) const { return a_at(stage) + S::A_BYTES; }
  __device__ int part_begin(int part) const { return static_cast<int>(static_cast<int64_t>(stages / S::UNIT) * part / p.splits) * S::UNIT; }

  // Weights of stage `s` of a tile; the barrier has been told of these bytes.
  __device__ void copy_weights(const Turn<S::STAGES>& turn, const Tile& tile, int s, int& scale_place) const {
    const int first = tile.expert * p.n + tile.m * p.tile_columns(), column = s * S::COLUMNS * (F == INT4 ? 1 : 2) / 2;
    const uint32_t barrier = full + turn.stage * 8, to = a_at(turn.stage);
    if (S::INTERLEAVED && p.gated) {
      for (int g = 0; g < TILE_M / 8; g++) copy_box(to + g * 8 * S::ROW, &args.w[g % 2], column, first + g / 2 * 8, barrier);
    } else {
      for (int j = 0; j < 2; j++) copy_box(to + j * 64 * S::ROW, &args.w[p.gated ? j : 0], column, p.gated ? first : first + j * 64, barrier);
    }
    if constexpr (W::QUANTISED) {
      if (s % S::UNIT == 0) {
        for (int j = 0; j < 2; j++)
          copy_box(scale_base + scale_place * S::SCALE_BYTES + j * S::SCALE_BYTES / 2, &args.scales[p.gated ? j : 0], s * S::COLUMNS / W::GROUP_COLUMNS, p.gated ? first : first + j * 64, barrier);
        scale_place = (scale_place + 1) % S::SCALE_PLACES;
      }
    }
  }

  __device__ void expect(const Turn<S::STAGES>& turn, int s, bool tokens) const {
    int bytes = S::A_BYTES + (tokens ? S::B_BYTES : 0);
    if (W::QUANTISED && s % S::UNIT == 0) bytes += S::SCALE_BYTES;
    barrier_expect(full + turn.stage * 8, bytes);
  }

  // By one thread.
  __device__ void produce() const {
    Turn<S::STAGES> turn, ahead;
    int scale_place = 0, filled = 0;
    // Weights do not depend on earlier kernels.
    if (static_cast<int>(blockIdx.x) < items) {
      const Tile tile = schedule.locate(blockIdx.x / p.splits, N);
      const int part = blockIdx.x % p.splits, begin = part_begin(part), end = part_begin(part + 1);
      for (; filled < S::STAGES && begin + filled < end; filled++, ahead++) {
        expect(ahead, begin + filled, true);
        copy_weights(ahead, tile, begin + filled, scale_place);
      }
    }
    await_inputs();
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const Tile tile = schedule.locate(item / p.splits, N);
      const int part = item % p.splits, end = part_begin(part + 1);
      for (int s = part_begin(part); s < end; s++, turn++) {
        if (filled) {
          filled--;
        } else {
          barrier_wait(empty + turn.stage * 8, turn.phase ^ 1);
          expect(turn, s, true);
          copy_weights(turn, tile, s, scale_place);
        }
        for (int i = 0; i < S::BLOCKS; i++) copy_box(b_at(turn.stage) + i * N * 128, &args.x, s * S::COLUMNS + i * 64, tile.first, full + turn.stage * 8);
      }
    }
  }

  // By a warpgroup. Each thread copies the same 16 bytes of every sixteenth token of the tile.
  __device__ void produce_gathered() const {
    constexpr int EACH = N / 16;
    Turn<S::STAGES> turn;
    int scale_place = 0;
    const int piece = threadIdx.x % 8, first = threadIdx.x / 8, lane = threadIdx.x % 32;
    const uint32_t offset = swizzled<128>(first * 128 + piece * 16);
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const Tile tile = schedule.locate(item / p.splits, N);
      const int part = item % p.splits, end = part_begin(part + 1);
      // A lane keeps the rows of two of its warp's tokens: of the copies lane / 4 and 8 + lane / 4 of the thread lane % 4 * 8.
      int rows[2];
      for (int j = 0; j < 2; j++) {
        const int copy = lane / 4 + j * 8, token = threadIdx.x / 32 * 4 + lane % 4 + copy * 16;
        rows[j] = copy < EACH && token < tile.count ? p.order[tile.first + token] / p.slots : -1;
      }
      for (int s = part_begin(part); s < end; s++, turn++) {
        barrier_wait(empty + turn.stage * 8, turn.phase ^ 1);
        if (threadIdx.x == 0) {
          expect(turn, s, false);
          copy_weights(turn, tile, s, scale_place);
        }
        __syncwarp();
        const uint16_t* from = static_cast<const uint16_t*>(p.x) + s * S::COLUMNS + piece * 8;
        const uint32_t to = b_at(turn.stage) + offset;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
          const int row = __shfl_sync(~0u, rows[i / 8], i % 8 * 4 + lane / 8);
          const uint16_t* of_row = from + static_cast<int64_t>(max(row, 0)) * p.k;
#pragma unroll
          for (int b = 0; b < S::BLOCKS; b++) copy_async(to + b * N * 128 + i * 2048, of_row + b * 64, row >= 0);
        }
        barrier_arrive_copied(full + turn.stage * 8);
      }
    }
  }

  __device__ __forceinline__ void release(Turn<S::STAGES>& done) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + done.stage * 8);
    done++;
  }

  __device__ __forceinline__ void await_stage(const Turn<S::STAGES>& turn) const {
    barrier_wait(full + turn.stage * 8, turn.phase);
    if (p.order) fence_async();
  }

  // Multiplies stages [begin, end) from shared memory, for the first TOKENS tokens of the tile.
  template <int TOKENS> __device__ __forceinline__ void multiply_shared(float (&d)[TOKENS / 2], Turn<S::STAGES>& turn, Turn<S::STAGES>& done, int begin, int end, int half) const {
    for (int s = begin; s < end; s++, turn++) {
      await_stage(turn);
      wgmma_begin();
      const uint64_t a = descriptor(a_at(turn.stage) + half * 64 * 128), b = descriptor(b_at(turn.stage));
#pragma unroll
      for (int step = 0; step < 4; step++) Wgmma<TOKENS, F == F16>::from_shared(d, a + step * 2, b + step * 2);
      wgmma_commit();
      if (s > begin) {
        wgmma_wait<1>();
        release(done);
      }
    }
    wgmma_wait<0>();
    release(done);
  }

  // Likewise of quantised weights. A lane has the rows `row0` and `row1` of the tile.
  template <int TOKENS> __device__ __forceinline__ void multiply_widened(float (&d)[TOKENS / 2], Turn<S::STAGES>& turn, Turn<S::STAGES>& done, int& scale_place, int begin, int end, int half) const {
    const int fragment = half * 4 + threadIdx.x / 32 % 4, row0 = fragment * (p.gated ? 8 : 16) + threadIdx.x % 32 / 4, row1 = row0 + (p.gated ? 64 : 8);
    const uint32_t at0 = row0 * S::ROW, at1 = row1 * S::ROW, mask = swizzled<S::ROW>(at0) ^ at0;
    const int blocks = (end - begin) * S::BLOCKS;
    uint32_t even[16], odd[16];
    Turn<S::STAGES> widened = turn;
    const auto widen = [&](uint32_t(&a)[16], int block) __attribute__((always_inline)) {
      if (block % S::BLOCKS == 0) await_stage(widened);
      const uint32_t at = a_at(widened.stage), scales = scale_base + scale_place * S::SCALE_BYTES + block % S::SCALE_BLOCKS * (64 / W::GROUP_COLUMNS) * 2;
      widen_block<F>(a, at + at0, at + at1, block % S::BLOCKS * (S::ROW / 16 / S::BLOCKS), mask, [&](int row, int i) { return load_half(scales + (row ? row1 : row0) * S::SCALES * 2 + i * 2); });
      if (block % S::BLOCKS == S::BLOCKS - 1) widened++;
      if (block % S::SCALE_BLOCKS == S::SCALE_BLOCKS - 1) scale_place = (scale_place + 1) % S::SCALE_PLACES;
    };
    const auto multiply = [&](const uint32_t(&a)[16], int block) __attribute__((always_inline)) {
      wgmma_begin();
      const uint64_t b = descriptor(b_at(turn.stage) + block % S::BLOCKS * N * 128);
#pragma unroll
      for (int step = 0; step < 4; step++) Wgmma<TOKENS, false>::from_registers(d, a + step * 4, b + step * 2);
      wgmma_commit();
      if (block % S::BLOCKS == S::BLOCKS - 1) turn++;
      // The registers of the block before are free then.
      wgmma_wait<1>();
      if (block > 0 && block % S::BLOCKS == 0) release(done);
    };
    widen(even, 0);
    for (int block = 0; block < blocks; block += 2) {
      multiply(even, block);
      widen(odd, block + 1);
      multiply(odd, block + 1);
      if (block + 2 < blocks) widen(even, block + 2);
    }
    wgmma_wait<0>();
    release(done);
  }

  // Adds up the parts of a tile, in the block that is done last. Returns whether this is the one.
  template <int TOKENS> __device__ __forceinline__ bool add_parts(float (&d)[TOKENS / 2], int item, volatile int* last) const {
    const int thread = threadIdx.x - 128, tile = item / p.splits;
    float4* parts = reinterpret_cast<float4*>(p.partials) + static_cast<int64_t>(tile) * p.splits * (N / 8) * 256 + thread;
    float4* mine = parts + item % p.splits * (N / 8) * 256;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) __stcg(mine + i * 256, make_float4(d[i * 4], d[i * 4 + 1], d[i * 4 + 2], d[i * 4 + 3]));
    __threadfence();
    asm volatile("bar.sync 1, 256;" ::: "memory");
    if (thread == 0) {
      *last = atomicAdd(p.counters + tile, 1) == p.splits - 1;
      if (*last) p.counters[tile] = 0;
    }
    asm volatile("bar.sync 1, 256;" ::: "memory");
    if (!*last) return false;
    __threadfence();
    // In the order of the parts, so that results do not depend on which is last.
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) d[i] = 0;
    for (int part = 0; part < p.splits; part++)
#pragma unroll
      for (int i = 0; i < TOKENS / 8; i++) {
        const float4 v = __ldcg(parts + (part * (N / 8) + i) * 256);
        d[i * 4] += v.x, d[i * 4 + 1] += v.y, d[i * 4 + 2] += v.z, d[i * 4 + 3] += v.w;
      }
    return true;
  }

  __device__ static uint32_t narrow(Dtype out, float a, float b) {
    if (out == F16) {
      const __half2 v = __floats2half2_rn(a, b);
      return reinterpret_cast<const uint32_t&>(v);
    }
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(v);
  }

  // Writes a warpgroup's results: turned in shared memory, so that columns of a row are written together.
  template <int TOKENS, bool GATED, bool WIDE> __device__ __forceinline__ void store_half(const float (&d)[TOKENS / 2], const Tile& tile, int half) const {
    constexpr int COLUMNS = GATED ? 32 : 64, BYTES = WIDE ? 4 : 2, PITCH = COLUMNS * BYTES + 16, PIECES = COLUMNS * BYTES / 16, EACH = 16 / BYTES;
    constexpr int MOST = S::STORE_TOKENS / (WIDE ? 2 : 1), AT_ONCE = TOKENS < MOST ? TOKENS : MOST;
    const uint32_t buffer = store_base + half * S::STORE_BYTES;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, thread = threadIdx.x % 128;
    const int first = tile.m * p.tile_columns() + half * COLUMNS, at = warp * (GATED ? 8 : 16) + lane / 4;
    const float* bias = p.bias ? p.bias + static_cast<int64_t>(tile.expert) * p.n + first : nullptr;
    const float bias0 = bias && first + at < p.n ? bias[at] : 0, bias1 = bias && !GATED && first + at + 8 < p.n ? bias[at + 8] : 0;
    const auto value = [&](int i) { return GATED ? gated(d[i], d[i + 2]) : d[i] + (i % 4 < 2 ? bias0 : bias1); };
#pragma unroll
    for (int begin = 0; begin < TOKENS; begin += AT_ONCE) {
      if (begin >= tile.count) break;
      asm volatile("bar.sync %0, 128;" ::"r"(2 + half) : "memory");
#pragma unroll
      for (int g = 0; g < AT_ONCE / 8; g += 2) {
        const int i = (begin / 8 + g) * 4;
        if constexpr (WIDE) {
#pragma unroll
          for (int q = 0; q < 8; q++) {
            if (GATED && q % 4 > 1) continue;
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(buffer + ((g + q / 4) * 8 + lane % 4 * 2 + q % 2) * PITCH + (at + q / 2 % 2 * 8) * 4), "f"(value(i + q)) : "memory");
          }
        } else if constexpr (GATED) {
          store_transposed(buffer + (g * 8 + lane % 16) * PITCH + warp * 16, narrow(p.out, value(i), value(i + 1)), narrow(p.out, value(i + 4), value(i + 5)));
        } else {
          store_transposed(buffer + ((g + lane / 16) * 8 + lane % 8) * PITCH + (warp * 2 + lane / 8 % 2) * 16, narrow(p.out, value(i), value(i + 1)), narrow(p.out, value(i + 2), value(i + 3)),
                           narrow(p.out, value(i + 4), value(i + 5)), narrow(p.out, value(i + 6), value(i + 7)));
        }
      }
      asm volatile("bar.sync %0, 128;" ::"r"(2 + half) : "memory");
      for (int i = thread; i < AT_ONCE * PIECES; i += 128) {
        const int token = begin + i / PIECES, column = first + i % PIECES * EACH;
        if (token >= tile.count || column >= p.n) continue;
        const int64_t row = p.order ? p.order[tile.first + token] : tile.first + token;
        const uint32_t from = buffer + i / PIECES * PITCH + i % PIECES * 16;
        uint8_t* to = static_cast<uint8_t*>(p.y) + (row * p.n + column) * BYTES;
        if (p.n % EACH == 0) {
          *reinterpret_cast<uint4*>(to) = load_shared(from);
        } else {
          for (int j = 0; j < EACH && column + j < p.n; j++) {
            if constexpr (WIDE) {
              float v;
              asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from + j * 4));
              reinterpret_cast<float*>(to)[j] = v;
            } else {
              reinterpret_cast<__half*>(to)[j] = load_half(from + j * 2);
            }
          }
        }
      }
    }
  }

  // Where the consumers are.
  struct Progress {
    Turn<S::STAGES> turn, done;
    int scale_place = 0;
  };

  // A tile that has at most TOKENS tokens.
  template <int TOKENS> __device__ __forceinline__ void consume_tile(Progress& at, int item, const Tile& tile, int half, volatile int* last) const {
    const int begin = part_begin(item % p.splits), end = part_begin(item % p.splits + 1);
    float d[TOKENS / 2] = {};
    if constexpr (W::QUANTISED) multiply_widened<TOKENS>(d, at.turn, at.done, at.scale_place, begin, end, half);
    else multiply_shared<TOKENS>(d, at.turn, at.done, begin, end, half);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) asm volatile("" : "+f"(d[i])::"memory");
    if (p.splits > 1 && !add_parts<TOKENS>(d, item, last)) return;
    if (p.gated) p.out == F32 ? store_half<TOKENS, true, true>(d, tile, half) : store_half<TOKENS, true, false>(d, tile, half);
    else p.out == F32 ? store_half<TOKENS, false, true>(d, tile, half) : store_half<TOKENS, false, false>(d, tile, half);
  }

  // By the two other warpgroups; `half`: which half of the tile's weight rows.
  __device__ void consume(int half, volatile int* last) const {
    Progress at;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const Tile tile = schedule.locate(item / p.splits, N);
      if (N == 256 && tile.count <= 64) consume_tile<N == 256 ? 64 : N>(at, item, tile, half, last);
      else if (N == 256 && tile.count <= 128) consume_tile<N == 256 ? 128 : N>(at, item, tile, half, last);
      else if (N == 256 && tile.count <= 192) consume_tile<N == 256 ? 192 : N>(at, item, tile, half, last);
      else consume_tile<N>(at, item, tile, half, last);
    }
  }
};

#endif

template <Dtype F, int N> __global__ void __launch_bounds__(HOPPER_THREADS, (HopperShape<F, N>::RESIDENT)) hopper_product(const __grid_constant__ Mapped args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = HopperShape<F, N>;
  extern __shared__ uint8_t shared[];
  const Product& p = args.p;
  const uint32_t start = shared_address(shared), base = (start + 1023) & ~1023u, scales = base + S::STAGES * S::STAGE_BYTES, stores = scales + S::SCALE_PLACES * S::SCALE_BYTES, full = stores + 2 * S::STORE_BYTES;
  int32_t* last = reinterpret_cast<int32_t*>(shared + (full - start) + S::STAGES * 16);
  let_next_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::STAGES; i++) {
      barrier_init(full + i * 8, p.order ? 129 : 1);
      barrier_init(full + (S::STAGES + i) * 8, 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async();
  }
  if (p.order) await_inputs();
  if (threadIdx.x / 32 == 1) count_tiles(p, N, last + 4);
  __syncthreads();
  const int columns = p.tile_columns();
  const Schedule schedule{last + 4, p.offsets, p.experts, p.rows.get(), (p.n + columns - 1) / columns};
  const HopperBlock<F, N> block{args, p, schedule, base, scales, stores, full, full + S::STAGES * 8, p.k / S::COLUMNS, schedule.tiles() * p.splits};
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::PRODUCER_REGISTERS));
    if (p.order) block.produce_gathered();
    else if (threadIdx.x == 0) block.produce();
    else await_inputs();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::CONSUMER_REGISTERS));
    await_inputs();
    block.consume(threadIdx.x / 128 - 1, last);
  }
#endif
}

// The number of parts of k for which the blocks are done earliest: of `items` tiles of `units` each, on `blocks` blocks.
inline int choose_splits(int64_t tiles, int units, int64_t blocks, int unit_stages) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int splits = 1; splits <= std::min(units, 16); splits++) {
    // A part costs about as much as four stages besides its own.
    const int64_t cost = ceil_div(tiles * splits, blocks) * (ceil_div(units, splits) * unit_stages + (splits > 1 ? 4 : 0));
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

template <Dtype F, int N> void run_hopper_tile(Product p, Launch& launch, int64_t most_rows) {
  using S = HopperShape<F, N>;
  using W = Weights<F>;
  Mapped args;
  const uint64_t weight_rows = static_cast<uint64_t>(p.experts) * p.n, weight_columns = static_cast<uint64_t>(p.k) * (F == INT4 ? 1 : 2) / 2;
  const int element_bytes = W::QUANTISED ? 1 : 2;
  const CUtensorMapDataType halves = F == F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, type = W::QUANTISED ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : halves;
  const CUtensorMapSwizzle swizzle = S::ROW == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : S::ROW == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
  for (int i = 0; i <= p.gated; i++) {
    launch.tensor_map(&args.w[i], type, const_cast<void*>(p.w[i]), weight_columns, weight_rows, weight_columns * element_bytes, S::ROW / element_bytes, S::INTERLEAVED && p.gated ? 8 : 64, swizzle);
    if constexpr (W::QUANTISED) {
      const uint64_t scale_columns = p.k / W::GROUP_COLUMNS;
      launch.tensor_map(&args.scales[i], CU_TENSOR_MAP_DATA_TYPE_FLOAT16, const_cast<__half*>(p.scales[i]), scale_columns, weight_rows, scale_columns * 2, S::SCALES, 64, CU_TENSOR_MAP_SWIZZLE_NONE);
    }
  }
  if (!p.order) launch.tensor_map(&args.x, halves, const_cast<void*>(p.x), p.k, most_rows, static_cast<uint64_t>(p.k) * 2, 64, N, CU_TENSOR_MAP_SWIZZLE_128B);
  const int64_t token_tiles = p.order ? std::min<int64_t>(most_rows, most_rows / N + p.experts) : ceil_div(most_rows, N), tiles = token_tiles * ceil_div(p.n, p.tile_columns());
  const int64_t blocks = static_cast<int64_t>(launch.multiprocessors) * S::RESIDENT;
  if (!p.order) p.splits = choose_splits(tiles, p.k / S::COLUMNS / S::UNIT, blocks, S::UNIT);
  if (p.splits > 1) {
    p.partials = static_cast<float*>(launch.scratch(tiles * p.splits * TILE_M * N * sizeof(float)));
    p.counters = launch.counters(tiles);
  }
  args.p = p;
  launch(hopper_product<F, N>, dim3(static_cast<unsigned>(std::min(blocks, tiles * p.splits))), dim3(HOPPER_THREADS), S::shared_bytes(p.experts), args);
}

template <Dtype F> void run_hopper_format(const Product& p, Launch& launch, int64_t most_rows) {
  // Experts have more tokens or fewer than the mean.
  const int64_t expected = p.order ? most_rows * 13 / (p.experts * 10) : most_rows;
  if (expected <= 16) run_hopper_tile<F, 16>(p, launch, most_rows);
  else if (expected <= 32) run_hopper_tile<F, 32>(p, launch, most_rows);
  else if (expected <= 64) run_hopper_tile<F, 64>(p, launch, most_rows);
  else if (expected <= 128) run_hopper_tile<F, 128>(p, launch, most_rows);
  else run_hopper_tile<F, 256>(p, launch, most_rows);
}

}  // namespace cuda::gemm
