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
  // Two blocks that compute neighbouring weight rows for the same tokens, half of which each copies for both.
  static constexpr int CLUSTER = N >= 128 ? 2 : 1;
  static constexpr bool SORTED = N >= 128;  // tokens of grouped products are sorted by a kernel before this one
  static_assert(STAGES >= 3 && (SCALE_PLACES == 0 || STAGES * BLOCKS <= SCALE_PLACES * SCALE_BLOCKS - SCALE_BLOCKS + 1));

  static size_t shared_bytes(int experts) { return 1024 + STAGES * STAGE_BYTES + SCALE_PLACES * SCALE_BYTES + 2 * STORE_BYTES + STAGES * 16 + (experts + 1) * 4; }
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
  int stages, items;  // stages of a whole tile; tiles, or pairs of a cluster, times parts
  int rank, first_item, step;

  // Whether tokens are copied by `cp.async`.
  __device__ bool gathers() const { return !S::SORTED && p.order; }
  __device__ __forceinline__ Tile locate(int item) const {
    Tile tile = schedule.locate(item / p.splits, N);
    tile.m = tile.m * S::CLUSTER + rank;
    return tile;
  }
  __device__ uint32_t a_at(int stage) const { return base + stage * S::STAGE_BYTES; }
  __device__ uint32_t b_at(int stage) const { return a_at(stage) + S::A_BYTES; }
  __device__ int part_begin(int part) const { return static_cast<int>(static_cast<int64_t>(stages / S::UNIT) * part / p.splits) * S::UNIT; }

  // Weights of stage `s` of a tile; the barrier has been told of these bytes.
  __device__ __forceinline__ void copy_weights(const Turn<S::STAGES>& turn, const Tile& tile, int s, int& scale_place) const {
    const int first = tile.expert * p.n + tile.m * p.tile_columns(), column = s * S::COLUMNS * (F == INT4 ? 1 : 2) / 2;
    const uint32_t barrier = full + turn.stage * 8, to = a_at(turn.stage);
    for (int j = 0; j < 2; j++) copy_box(to + j * 64 * S::ROW, &args.w[p.gated ? j : 0], column, p.gated ? first : first + j * 64, barrier);
    if constexpr (W::QUANTISED) {
      if (s % S::UNIT == 0) {
        for (int j = 0; j < 2; j++)
          copy_box(scale_base + scale_place * S::SCALE_BYTES + j * S::SCALE_BYTES / 2, &args.scales[p.gated ? j : 0], s * S::COLUMNS / W::GROUP_COLUMNS, p.gated ? first : first + j * 64, barrier);
        scale_place = (scale_place + 1) % S::SCALE_PLACES;
      }
    }
  }

  __device__ __forceinline__ void expect(const Turn<S::STAGES>& turn, int s, bool tokens) const {
    int bytes = S::A_BYTES + (tokens ? S::B_BYTES : 0);
    if (W::QUANTISED && s % S::UNIT == 0) bytes += S::SCALE_BYTES;
    barrier_expect(full + turn.stage * 8, bytes);
  }

  // By one thread.
  __device__ __forceinline__ void produce() const {
    Turn<S::STAGES> turn, ahead;
    int scale_place = 0, filled = 0;
    // Weights do not depend on earlier kernels.
    if (first_item < items) {
      const Tile tile = locate(first_item);
      const int part = first_item % p.splits, begin = part_begin(part), end = part_begin(part + 1);
      for (; filled < S::STAGES && begin + filled < end; filled++, ahead++) {
        expect(ahead, begin + filled, true);
        copy_weights(ahead, tile, begin + filled, scale_place);
      }
    }
    await_inputs();
    for (int item = first_item; item < items; item += step) {
      const Tile tile = locate(item);
      const int part = item % p.splits, end = part_begin(part + 1);
      for (int s = part_begin(part); s < end; s++, turn++) {
        if (filled) {
          filled--;
        } else {
          barrier_wait(empty + turn.stage * 8, turn.phase ^ 1);
          expect(turn, s, true);
          copy_weights(turn, tile, s, scale_place);
        }
        for (int i = 0; i < S::BLOCKS; i++) {
          const uint32_t to = b_at(turn.stage) + i * N * 128, barrier = full + turn.stage * 8;
          const int column = s * S::COLUMNS + i * 64, share = N / S::CLUSTER * rank;
          if constexpr (S::CLUSTER == 1) copy_box(to, &args.x, column, tile.first, barrier);
          else copy_box_to_all(to + share * 128, &args.x, column, tile.first + share, barrier, 3);
        }
      }
    }
  }

  // By a warpgroup. Each thread copies the same 16 bytes of every sixteenth token of the tile.
  __device__ __forceinline__ void produce_gathered() const {
    constexpr int EACH = N / 16;
    Turn<S::STAGES> turn;
    int scale_place = 0;
    const int piece = threadIdx.x % 8, first = threadIdx.x / 8, lane = threadIdx.x % 32;
    const uint32_t offset = swizzled<128>(first * 128 + piece * 16);
    for (int item = first_item; item < items; item += step) {
      const Tile tile = locate(item);
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
    if constexpr (S::CLUSTER == 1) {
      if (threadIdx.x % 32 == 0) barrier_arrive(empty + done.stage * 8);
    } else {
      if (threadIdx.x % 32 < S::CLUSTER) barrier_arrive_at(empty + done.stage * 8, threadIdx.x % 32);
    }
    done++;
  }

  __device__ __forceinline__ void await_stage(const Turn<S::STAGES>& turn) const {
    barrier_wait(full + turn.stage * 8, turn.phase);
    if (gathers()) fence_async();
  }

  // Multiplies stages [begin, end) from shared memory, for the first TOKENS tokens of the tile. A warpgroup has half of the weight rows; or, if GATED,
  // all rows of gate and then of up, but half of the tokens.
  template <int TOKENS, bool GATED> __device__ __forceinline__ void multiply_shared(float (&d)[TOKENS / 2], Turn<S::STAGES>& turn, Turn<S::STAGES>& done, int begin, int end, int half) const {
    for (int s = begin; s < end; s++, turn++) {
      await_stage(turn);
      wgmma_begin();
      const uint64_t a = descriptor(a_at(turn.stage) + (GATED ? 0 : half * 64 * 128)), b = descriptor(b_at(turn.stage) + (GATED ? half * TOKENS / 2 * 128 : 0));
#pragma unroll
      for (int step = 0; step < 4; step++) {
        if constexpr (GATED) {
          Wgmma<TOKENS / 2, F == F16>::from_shared(d, a + step * 2, b + step * 2);
          Wgmma<TOKENS / 2, F == F16>::from_shared(d + TOKENS / 4, a + 64 * 128 / 16 + step * 2, b + step * 2);
        } else {
          Wgmma<TOKENS, F == F16>::from_shared(d, a + step * 2, b + step * 2);
        }
      }
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

  __device__ static uint32_t narrow(Dtype out, float a, float b) {
    if (out == F16) {
      const __half2 v = __floats2half2_rn(a, b);
      return reinterpret_cast<const uint32_t&>(v);
    }
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(v);
  }

  // Writes a warpgroup's results: turned in shared memory, so that columns of a row are written together. PAIRED: rows of gate and up are paired in
  // a lane, and the warpgroup has half of the tile's rows; otherwise, if GATED, it has half of the tokens.
  template <int TOKENS, bool GATED, bool WIDE> __device__ __forceinline__ void store_half(const float (&d)[TOKENS / 2], const Tile& tile, int half) const {
    constexpr bool PAIRED = GATED && W::QUANTISED, HALVED = GATED && !W::QUANTISED;
    constexpr int COLUMNS = PAIRED ? 32 : 64, BYTES = WIDE ? 4 : 2, PITCH = COLUMNS * BYTES + 16, PIECES = COLUMNS * BYTES / 16, EACH = 16 / BYTES;
    constexpr int ALL = HALVED ? TOKENS / 2 : TOKENS, MOST = S::STORE_TOKENS / (WIDE ? 2 : 1), AT_ONCE = ALL < MOST ? ALL : ALL % MOST ? 48 : MOST, UNIT = AT_ONCE % 16 ? 1 : 2;
    static_assert(ALL % AT_ONCE == 0 && AT_ONCE <= MOST);
    const uint32_t buffer = store_base + half * S::STORE_BYTES;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, thread = threadIdx.x % 128;
    const int first = tile.m * p.tile_columns() + (HALVED ? 0 : half * COLUMNS), at = warp * (PAIRED ? 8 : 16) + lane / 4, first_token = HALVED ? half * ALL : 0;
    const float* bias = p.bias ? p.bias + static_cast<int64_t>(tile.expert) * p.n + first : nullptr;
    const float bias0 = bias && first + at < p.n ? bias[at] : 0, bias1 = bias && !GATED && first + at + 8 < p.n ? bias[at + 8] : 0;
    const auto value = [&](int i) { return PAIRED ? gated(d[i], d[i + 2]) : HALVED ? gated(d[i], d[i + TOKENS / 4]) : d[i] + (i % 4 < 2 ? bias0 : bias1); };
#pragma unroll
    for (int begin = 0; begin < ALL; begin += AT_ONCE) {
      if (first_token + begin >= tile.count) break;
      asm volatile("bar.sync %0, 128;" ::"r"(2 + half) : "memory");
#pragma unroll
      for (int g = 0; g < AT_ONCE / 8; g += UNIT) {
        const int i = (begin / 8 + g) * 4;
        if constexpr (WIDE) {
#pragma unroll
          for (int q = 0; q < 4 * UNIT; q++) {
            if (PAIRED && q % 4 > 1) continue;
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(buffer + ((g + q / 4) * 8 + lane % 4 * 2 + q % 2) * PITCH + (at + q / 2 % 2 * 8) * 4), "f"(value(i + q)) : "memory");
          }
        } else if constexpr (PAIRED) {
          store_transposed(buffer + (g * 8 + lane % 16) * PITCH + warp * 16, narrow(p.out, value(i), value(i + 1)), narrow(p.out, value(i + 4), value(i + 5)));
        } else if constexpr (UNIT == 1) {
          store_transposed(buffer + (g * 8 + lane % 8) * PITCH + (warp * 2 + lane / 8 % 2) * 16, narrow(p.out, value(i), value(i + 1)), narrow(p.out, value(i + 2), value(i + 3)));
        } else {
          store_transposed(buffer + ((g + lane / 16) * 8 + lane % 8) * PITCH + (warp * 2 + lane / 8 % 2) * 16, narrow(p.out, value(i), value(i + 1)), narrow(p.out, value(i + 2), value(i + 3)),
                           narrow(p.out, value(i + 4), value(i + 5)), narrow(p.out, value(i + 6), value(i + 7)));
        }
      }
      asm volatile("bar.sync %0, 128;" ::"r"(2 + half) : "memory");
      for (int i = thread; i < AT_ONCE * PIECES; i += 128) {
        const int token = first_token + begin + i / PIECES, column = first + i % PIECES * EACH;
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

  // Keeps the compiler from moving accesses to sums across this place.
  template <int COUNT> __device__ __forceinline__ static void settle(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
  }

  // Where the consumers are.
  struct Progress {
    Turn<S::STAGES> turn, done;
    int scale_place = 0;
  };

  // A tile that has at most TOKENS tokens.
  template <int TOKENS, bool GATED> __device__ __forceinline__ void consume_tile(Progress& at, int item, const Tile& tile, int half) const {
    const int begin = part_begin(item % p.splits), end = part_begin(item % p.splits + 1);
    float d[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) d[i] = 0;
    settle(d);
    if constexpr (W::QUANTISED) multiply_widened<TOKENS>(d, at.turn, at.done, at.scale_place, begin, end, half);
    else multiply_shared<TOKENS, GATED>(d, at.turn, at.done, begin, end, half);
    settle(d);
    if (p.splits > 1) {
      // `add_parts` continues.
      float4* parts = reinterpret_cast<float4*>(p.partials) + (static_cast<int64_t>(item / p.splits * S::CLUSTER + rank) * p.splits + item % p.splits) * (N / 8) * 256 + threadIdx.x - 128;
#pragma unroll
      for (int i = 0; i < TOKENS / 8; i++) __stcg(parts + i * 256, make_float4(d[i * 4], d[i * 4 + 1], d[i * 4 + 2], d[i * 4 + 3]));
      return;
    }
    p.out == F32 ? store_half<TOKENS, GATED, true>(d, tile, half) : store_half<TOKENS, GATED, false>(d, tile, half);
  }

  // By the two other warpgroups; `half`: which half of the tile's weight rows.
  template <bool GATED> __device__ __forceinline__ void consume(int half) const {
    Progress at;
    for (int item = first_item; item < items; item += step) {
      const Tile tile = locate(item);
      // (Of quantised weights, with more such cases the compiler lacks registers.)
      if (N == 256 && !W::QUANTISED && tile.count <= 64) consume_tile<N == 256 && !W::QUANTISED ? 64 : N, GATED>(at, item, tile, half);
      else if (N == 256 && tile.count <= 128) consume_tile<N == 256 ? 128 : N, GATED>(at, item, tile, half);
      else if (N == 256 && !W::QUANTISED && tile.count <= 192) consume_tile<N == 256 && !W::QUANTISED ? 192 : N, GATED>(at, item, tile, half);
      else consume_tile<N, GATED>(at, item, tile, half);
    }
  }
};

#endif

template <Dtype F, int N> __global__ void __cluster_dims__(HopperShape<F, N>::CLUSTER) __launch_bounds__(HOPPER_THREADS, (HopperShape<F, N>::RESIDENT)) hopper_product(const __grid_constant__ Mapped args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = HopperShape<F, N>;
  extern __shared__ uint8_t shared[];
  const Product& p = args.p;
  const uint32_t start = shared_address(shared), base = (start + 1023) & ~1023u, scales = base + S::STAGES * S::STAGE_BYTES, stores = scales + S::SCALE_PLACES * S::SCALE_BYTES, full = stores + 2 * S::STORE_BYTES;
  int32_t* starts = reinterpret_cast<int32_t*>(shared + (full - start) + S::STAGES * 16);
  let_next_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::STAGES; i++) {
      barrier_init(full + i * 8, !S::SORTED && p.order ? 129 : 1);
      barrier_init(full + (S::STAGES + i) * 8, 8 * S::CLUSTER);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async();
  }
  if (p.order) await_inputs();
  if (threadIdx.x / 32 == 1) count_tiles(p, N, starts);
  if constexpr (S::CLUSTER > 1) cluster_sync();
  else __syncthreads();
  const int columns = p.tile_columns() * S::CLUSTER;
  const Schedule schedule{starts, p.offsets, p.experts, p.rows.get(), (p.n + columns - 1) / columns};
  const HopperBlock<F, N> block{args, p, schedule, base, scales, stores, full, full + S::STAGES * 8, p.k / S::COLUMNS, schedule.tiles() * p.splits, S::CLUSTER > 1 ? cluster_rank() : 0,
                                static_cast<int>(blockIdx.x) / S::CLUSTER, static_cast<int>(gridDim.x) / S::CLUSTER};
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::PRODUCER_REGISTERS));
    if (block.gathers()) block.produce_gathered();
    else if (threadIdx.x == 0) block.produce();
    else await_inputs();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::CONSUMER_REGISTERS));
    await_inputs();
    if (p.gated) block.template consume<true>(threadIdx.x / 128 - 1);
    else block.template consume<false>(threadIdx.x / 128 - 1);
  }
  // The other block may still write to this one's shared memory, or arrive at its barriers.
  if constexpr (S::CLUSTER > 1) {
    __syncwarp();
    cluster_sync();
  }
#endif
}

// The rows of x in the order of the slots, in scratch memory.
void* sort_rows(const Product&, Launch&, int64_t most_rows);
// Adds up the parts of each tile of a plain product, and writes its result.
void add_parts(const Product&, Launch&, int tokens, int cluster, int tiles);

template <Dtype F, int N> void run_hopper_tile(Product p, Launch& launch, int64_t most_rows) {
  using S = HopperShape<F, N>;
  using W = Weights<F>;
  Mapped args;
  const uint64_t weight_rows = static_cast<uint64_t>(p.experts) * p.n, weight_columns = static_cast<uint64_t>(p.k) * (F == INT4 ? 1 : 2) / 2;
  const int element_bytes = W::QUANTISED ? 1 : 2;
  const CUtensorMapDataType halves = F == F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, type = W::QUANTISED ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : halves;
  const CUtensorMapSwizzle swizzle = S::ROW == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : S::ROW == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
  for (int i = 0; i <= p.gated; i++) {
    launch.tensor_map(&args.w[i], type, const_cast<void*>(p.w[i]), weight_columns, weight_rows, weight_columns * element_bytes, S::ROW / element_bytes, 64, swizzle);
    if constexpr (W::QUANTISED) {
      const uint64_t scale_columns = p.k / W::GROUP_COLUMNS;
      launch.tensor_map(&args.scales[i], CU_TENSOR_MAP_DATA_TYPE_FLOAT16, const_cast<__half*>(p.scales[i]), scale_columns, weight_rows, scale_columns * 2, S::SCALES, 64, CU_TENSOR_MAP_SWIZZLE_NONE);
    }
  }
  if (S::SORTED && p.order) {
    p.x = sort_rows(p, launch, most_rows);
    p.sorted = true;
  }
  if (S::SORTED || !p.order) launch.tensor_map(&args.x, halves, const_cast<void*>(p.x), p.k, most_rows, static_cast<uint64_t>(p.k) * 2, 64, N / S::CLUSTER, CU_TENSOR_MAP_SWIZZLE_128B);
  const int64_t token_tiles = p.order ? std::min<int64_t>(most_rows, most_rows / N + p.experts) : ceil_div(most_rows, N), tiles = token_tiles * ceil_div(p.n, p.tile_columns() * S::CLUSTER);
  const int64_t blocks = static_cast<int64_t>(launch.multiprocessors) * S::RESIDENT / S::CLUSTER;
  if (p.splits > 1) p.partials = static_cast<float*>(launch.scratch(tiles * S::CLUSTER * p.splits * TILE_M * N * sizeof(float)));
  args.p = p;
  launch(hopper_product<F, N>, dim3(static_cast<unsigned>(std::min(blocks, tiles * p.splits) * S::CLUSTER)), dim3(HOPPER_THREADS), S::shared_bytes(p.experts), args);
  if (p.splits > 1) add_parts(p, launch, N, S::CLUSTER, static_cast<int>(tiles));
}

// A plain product's tokens in a tile and parts of k.
struct Plan {
  int tokens, splits;
};

// The plan that is expected to take the fewest cycles. `unit`: columns of k that a part's are a multiple of.
inline Plan plan_product(const Product& p, int64_t rows, int multiprocessors, int unit) {
  constexpr int TOKENS[] = {16, 32, 64, 128, 256}, STAGE_CYCLES[] = {330, 350, 410, 560, 1050};
  Plan best{};
  double least = 1e300;
  for (int i = 0; i < 5; i++) {
    if (i && TOKENS[i - 1] >= rows) break;
    const int64_t tiles = static_cast<int64_t>(ceil_div(rows, TOKENS[i])) * ceil_div(p.n, p.tile_columns());
    for (int splits = 1; splits <= std::min(16, p.k / unit); splits++) {
      const double stages = static_cast<double>(ceil_div(p.k / unit, splits)) * unit / 64 + 3;
      double cycles = ceil_div(tiles * splits, multiprocessors) * stages * STAGE_CYCLES[i];
      if (splits > 1) cycles += 2500 + 8.0 * splits * tiles * TILE_M * TOKENS[i] / (25 * multiprocessors);
      if (cycles < least) least = cycles, best = {TOKENS[i], splits};
    }
  }
  return best;
}

template <Dtype F> void run_hopper_format(Product p, Launch& launch, int64_t most_rows) {
  // Experts have more tokens or fewer than the mean.
  int64_t tokens = most_rows * 13 / (p.experts * 10);
  if (!p.order) {
    const Plan plan = plan_product(p, most_rows, launch.multiprocessors, F == INT4 ? 256 : Weights<F>::QUANTISED ? 512 : 64);
    tokens = plan.tokens;
    p.splits = plan.splits;
  }
  if (tokens <= 16) run_hopper_tile<F, 16>(p, launch, most_rows);
  else if (tokens <= 32) run_hopper_tile<F, 32>(p, launch, most_rows);
  else if (tokens <= 64) run_hopper_tile<F, 64>(p, launch, most_rows);
  else if (tokens <= 128) run_hopper_tile<F, 128>(p, launch, most_rows);
  else run_hopper_tile<F, 256>(p, launch, most_rows);
}

}  // namespace cuda::gemm
