// Attention of sequences with many rows, such as prompts, on Hopper's tensor cores, in the manner of FlashAttention-3
// (https://arxiv.org/abs/2407.08608).
//
// A tile is 128 queries of one KV head of one sequence: rows x the heads that share it. Two warpgroups compute 64 of them each, over tiles of 128
// tokens from the last that they see to the first; a third brings keys and values to shared memory, as copies of tensor maps or, from 8-bit
// caches, converted to half numbers. While the tensor cores multiply weights and values, a warpgroup computes the next weights. Queries and weights
// are rounded to the half numbers that the cache's numbers become.
#include <cuda.h>

#include "attention_wgmma.cuh"

namespace cuda::attention {
namespace {

constexpr int DIM = 128, QUERIES = 128, TOKENS = 128, STAGES = 2;
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128;
constexpr int PART = 128 * 128;  // bytes of 128 rows of 64 half numbers; a tile of queries, keys or values is two
[[maybe_unused]] constexpr int PAGES = TOKENS / BLOCK_TOKENS;

struct Prompt {
  const float* q;
  Out y;
  Step step;
  Cache cache;
  int32_t share;  // queries of a row for each KV head
  int32_t few;    // sequences with more rows are done here
  float scale;    // of scores in powers of two
};

template <Dtype D> constexpr bool BYTES = D == INT8KV || D == FP8KV;
template <Dtype D> using Half = std::conditional_t<D == BF16, bf16, f16>;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void meet(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
// Orders what this thread wrote to shared memory before what tensor cores and copies do next.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void store16(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// Where 8 numbers from column `d` on are in a tile in shared memory.
__device__ __forceinline__ uint32_t place(int row, int d) { return d / 64 * PART + row * 128 + ((d / 8 ^ row) & 7) * 16; }

struct Shared {
  uint32_t queries, keys, values;            // tiles; STAGES of keys and values
  uint32_t full_keys, full_values, empty_keys, empty_values;  // STAGES barriers each
};

// The tiles of all sequences and heads, the ones with the longest contexts first, dealt to the blocks to and fro.
struct Deal {
  int turn = 0, sequence, tile, head, end;  // end: tokens that the tile's queries see
  Segment segment;
  __device__ __forceinline__ bool next(const Prompt& a, int all, int sequences) {
    const int at = turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x), heads = a.cache.heads;
    turn++;
    if (at >= all * heads) return false;
    locate(all - 1 - at / heads, sequences, [&](int s) { return tiles(a, s); }, sequence, tile);
    head = at % heads;
    segment = a.step.segment(sequence);
    end = segment.position + min(tile * QUERIES + QUERIES - 1, segment.rows * a.share - 1) / a.share + 1;
    return true;
  }
  static __device__ __forceinline__ int tiles(const Prompt& a, int s) {
    const int rows = a.step.segments[s * 3 + 1];
    return rows > a.few ? ceil_div(rows * a.share, QUERIES) : 0;
  }
};

// 128 threads, each of which holds 8 times 16 bytes of a tile of 8-bit keys or values and converts them.
template <Dtype D> struct Converter {
  uint4 bytes[8];
  float scale[8];
  // Thread i has columns 16 (i % 8) to + 15 of tokens i / 8 + 16 k.
  __device__ __forceinline__ void load(const Prompt& a, const void* cache, const int32_t* pages, int columns, int head, int t0, int end, int k) {
    const int i = threadIdx.x - CONSUMERS, token = t0 + i / 8 + 16 * k;
    bytes[k] = {0, 0, 0, 0}, scale[k] = 0;
    if (token >= end) return;
    const uint8_t* from = head_of<D>(cache, a.step.block(pages, token / BLOCK_TOKENS, columns), a.cache.heads, head, head_bytes<D>(DIM));
    bytes[k] = *reinterpret_cast<const uint4*>(from + token % BLOCK_TOKENS * DIM + i % 8 * 16);
    if (D == INT8KV) scale[k] = reinterpret_cast<const float*>(from + BLOCK_TOKENS * DIM)[token % BLOCK_TOKENS * (DIM / GROUP) + i % 8 / 4];
  }
  __device__ __forceinline__ void store(uint32_t tile, int k) const {
    const int i = threadIdx.x - CONSUMERS, row = i / 8 + 16 * k;
    const uint32_t words[4] = {bytes[k].x, bytes[k].y, bytes[k].z, bytes[k].w};
    uint32_t x[8];
#pragma unroll
    for (int w = 0; w < 4; w++) {
      widen<D>(words[w], x[2 * w], x[2 * w + 1]);
      if constexpr (D == INT8KV) {
        const __half2 s = __float2half2_rn(scale[k]);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          __half2 y = __hmul2(*reinterpret_cast<__half2*>(&x[2 * w + j]), s);
          x[2 * w + j] = *reinterpret_cast<uint32_t*>(&y);
        }
      }
    }
    store16(tile + place(row, i % 8 * 16), x[0], x[1], x[2], x[3]);
    store16(tile + place(row, i % 8 * 16 + 8), x[4], x[5], x[6], x[7]);
  }
};

template <Dtype D> __device__ __forceinline__ void produce(const Prompt& a, const CUtensorMap* keys, const CUtensorMap* values, const Shared& shared, int all, int sequences) {
  const int columns = a.step.columns.get(), warp = (threadIdx.x - CONSUMERS) / 32, lane = lane_id();
  if (!BYTES<D> && warp) return;
  Deal deal;
  int stage = 0;
  uint32_t phase = 1;
  while (deal.next(a, all, sequences)) {
    const int32_t* const pages = a.step.pages + static_cast<int64_t>(deal.sequence) * columns;
    if constexpr (BYTES<D>) {
      Converter<D> held;
      const int last = (deal.end - 1) / TOKENS * TOKENS;
#pragma unroll
      for (int k = 0; k < 8; k++) held.load(a, a.cache.keys, pages, columns, deal.head, last, deal.end, k);
      for (int t0 = last; t0 >= 0; t0 -= TOKENS) {
        // While values are loaded, keys are stored, and so on.
        wait_barrier(shared.empty_keys + stage * 8, phase);
#pragma unroll
        for (int k = 0; k < 8; k++) {
          held.store(shared.keys + stage * 2 * PART, k);
          held.load(a, a.cache.values, pages, columns, deal.head, t0, deal.end, k);
        }
        publish_shared();
        arrive(shared.full_keys + stage * 8);
        wait_barrier(shared.empty_values + stage * 8, phase);
#pragma unroll
        for (int k = 0; k < 8; k++) {
          held.store(shared.values + stage * 2 * PART, k);
          if (t0 > 0) held.load(a, a.cache.keys, pages, columns, deal.head, t0 - TOKENS, deal.end, k);
        }
        publish_shared();
        arrive(shared.full_values + stage * 8);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    } else {
      for (int t0 = (deal.end - 1) / TOKENS * TOKENS; t0 >= 0; t0 -= TOKENS) {
        // Eight lanes copy half a page each.
        const int count = min(PAGES, ceil_div(deal.end - t0, BLOCK_TOKENS)), page = lane / 2, part = lane % 2;
        const bool copies = page < count;
        const int row = copies ? (a.step.block(pages, t0 / BLOCK_TOKENS + page, columns) * a.cache.heads + deal.head) * BLOCK_TOKENS : 0;
        const uint32_t to = stage * 2 * PART + part * PART + page * BLOCK_TOKENS * 128;
        wait_barrier(shared.empty_keys + stage * 8, phase);
        if (lane == 0) arrive_expecting(shared.full_keys + stage * 8, count * BLOCK_TOKENS * DIM * 2);
        __syncwarp();
        if (copies) copy_box(shared.keys + to, keys, part * 64, row, shared.full_keys + stage * 8);
        wait_barrier(shared.empty_values + stage * 8, phase);
        if (lane == 0) arrive_expecting(shared.full_values + stage * 8, count * BLOCK_TOKENS * DIM * 2);
        __syncwarp();
        if (copies) copy_box(shared.values + to, values, part * 64, row, shared.full_values + stage * 8);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
  }
}

// A warpgroup's queries: lane 4 g + t of warp w has rows 16 w + g and + 8, columns 8 i + 2 t and + 1.
template <Dtype D> struct Consumer {
  using T = Half<D>;
  float y[64], s[64];
  uint32_t p[32];
  float top[2], total[2], shrink[2];
  int seen[2];

  __device__ __forceinline__ void multiply_keys(uint32_t queries, uint32_t keys) {
    begin_products();
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
      const uint32_t offset = k / 4 * PART + k % 4 * 32;
      product<T>(s, descriptor(queries + offset, 16), descriptor(keys + offset, 16), k > 0);
    }
    end_products();
  }
  __device__ __forceinline__ void multiply_values(uint32_t values) {
    begin_products();
#pragma unroll
    for (int k = 0; k < TOKENS / 16; k++) product<T>(y, p + 4 * k, descriptor(values + k * 16 * 128, PART), 1);
    end_products();
  }
  // Scores become weights.
  template <bool MASKED> __device__ __forceinline__ void weigh(int t0) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float now = top[r];
#pragma unroll
      for (int i = 0; i < 32; i++) {
        float& x = s[i / 2 * 4 + 2 * r + i % 2];
        if (MASKED && t0 + i / 2 * 8 + lane_id() % 4 * 2 + i % 2 >= seen[r]) x = -INFINITY;
        now = fmaxf(now, x);
      }
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
      const float base = MASKED && now == -INFINITY ? 0 : now;
      shrink[r] = power(top[r] - base);
      top[r] = now;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 32; i++) {
        float& x = s[i / 2 * 4 + 2 * r + i % 2];
        x = power(x - base);
        sum += x;
      }
      total[r] = total[r] * shrink[r] + sum;
    }
  }
  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int i = 0; i < 32; i++) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
  }
  __device__ __forceinline__ void rescale() {
#pragma unroll
    for (int i = 0; i < 64; i++) y[i] *= shrink[i / 2 % 2];
  }
};

template <Dtype D> __device__ __forceinline__ void consume(const Prompt& a, const Shared& shared, int all, int sequences) {
  using T = Half<D>;
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = lane_id(), g = lane / 4, t = lane % 4;
  const uint32_t queries = shared.queries + group * 64 * 128;
  Deal deal;
  int stage = 0;
  uint32_t phase = 0;
  while (deal.next(a, all, sequences)) {
    const int count = deal.segment.rows * a.share, first = deal.tile * QUERIES + group * 64;
    const auto at = [&](int i) { return ((static_cast<int64_t>(deal.segment.first) + i / a.share) * a.cache.heads + deal.head) * a.share * DIM + i % a.share * DIM; };
    // The products that read the last tile's queries are done in all warps.
    meet(1 + group, 128);
#pragma unroll 4
    for (int i = 0; i < 8; i++) {
      const int row = thread / 16 + 8 * i, d = thread % 16 * 8;
      float4 x = {0, 0, 0, 0}, z = x;
      if (first + row < count) {
        const float4* from = reinterpret_cast<const float4*>(a.q + at(first + row) + d);
        x = from[0], z = from[1];
      }
      store16(queries + place(row, d), pack<T>(x.x * a.scale, x.y * a.scale), pack<T>(x.z * a.scale, x.w * a.scale), pack<T>(z.x * a.scale, z.y * a.scale), pack<T>(z.z * a.scale, z.w * a.scale));
    }
    publish_shared();
    meet(1 + group, 128);

    Consumer<D> c;
    const int row = first + thread / 32 * 16 + g;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      c.top[r] = -INFINITY, c.total[r] = 0;
      c.seen[r] = deal.segment.position + min(row + 8 * r, count - 1) / a.share + 1;
    }
#pragma unroll
    for (int i = 0; i < 64; i++) c.y[i] = 0;
    const int unmasked = deal.segment.position + deal.tile * QUERIES / a.share + 1;  // tokens that all queries see
    const auto release = [&](uint32_t barrier) {
      __syncwarp();
      if (lane == 0) arrive(barrier);
    };
    int t0 = (deal.end - 1) / TOKENS * TOKENS;
    wait_barrier(shared.full_keys + stage * 8, phase);
    c.multiply_keys(queries, shared.keys + stage * 2 * PART);
    // What lies beyond the context in the last tile may be NaN, and is multiplied with zero.
    wait_barrier(shared.full_values + stage * 8, phase);
    if (deal.end < t0 + TOKENS && !BYTES<D>) {
      for (int i = threadIdx.x; i < (t0 + TOKENS - deal.end) * 16; i += CONSUMERS) store16(shared.values + stage * 2 * PART + place(deal.end - t0 + i / 16, i % 16 * 8), 0, 0, 0, 0);
      publish_shared();
      meet(3, CONSUMERS);
    }
    wait_products<0>();
    hold(c.s);
    release(shared.empty_keys + stage * 8);
    c.template weigh<true>(t0);
    c.round_weights();
    for (; t0 > 0; t0 -= TOKENS) {
      const int old = stage;
      const uint32_t old_phase = phase;
      if (++stage == STAGES) stage = 0, phase ^= 1;
      wait_barrier(shared.full_keys + stage * 8, phase);
      c.multiply_keys(queries, shared.keys + stage * 2 * PART);
      wait_barrier(shared.full_values + old * 8, old_phase);
      c.multiply_values(shared.values + old * 2 * PART);
      wait_products<1>();
      hold(c.s);
      release(shared.empty_keys + stage * 8);
      if (t0 > unmasked) c.template weigh<true>(t0 - TOKENS);
      else c.template weigh<false>(t0 - TOKENS);
      wait_products<0>();
      hold(c.y);
      release(shared.empty_values + old * 8);
      c.rescale();
      c.round_weights();
    }
    c.multiply_values(shared.values + stage * 2 * PART);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      c.total[r] += __shfl_xor_sync(~0u, c.total[r], 1);
      c.total[r] += __shfl_xor_sync(~0u, c.total[r], 2);
    }
    wait_products<0>();
    hold(c.y);
    release(shared.empty_values + stage * 8);
    if (++stage == STAGES) stage = 0, phase ^= 1;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (row + 8 * r >= count) continue;
      const int64_t to = at(row + 8 * r) + 2 * t;
      const float inverse = 1 / c.total[r];
#pragma unroll
      for (int i = 0; i < 16; i++) a.y.put2(to + 8 * i, c.y[4 * i + 2 * r] * inverse, c.y[4 * i + 2 * r + 1] * inverse);
    }
  }
}

#endif

template <Dtype D>
__global__ void __launch_bounds__(THREADS, 1) prompt_kernel(const __grid_constant__ CUtensorMap keys, const __grid_constant__ CUtensorMap values, const Prompt a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t raw[];
  Shared shared;
  shared.queries = (shared_address(raw) + 1023) / 1024 * 1024;
  shared.keys = shared.queries + 2 * PART;
  shared.values = shared.keys + STAGES * 2 * PART;
  shared.full_keys = shared.values + STAGES * 2 * PART;
  shared.full_values = shared.full_keys + STAGES * 8;
  shared.empty_keys = shared.full_values + STAGES * 8;
  shared.empty_values = shared.empty_keys + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init_barrier(shared.full_keys + i * 8, BYTES<D> ? 128 : 1);
      init_barrier(shared.full_values + i * 8, BYTES<D> ? 128 : 1);
      init_barrier(shared.empty_keys + i * 8, CONSUMERS / 32);
      init_barrier(shared.empty_values + i * 8, CONSUMERS / 32);
    }
    publish_barriers();
  }
  const int sequences = a.step.sequences.get();
  const int all = total(sequences, [&](int s) { return Deal::tiles(a, s); });
  __syncthreads();
  await_inputs();
  let_next_start();
  if (threadIdx.x >= CONSUMERS) {
    if constexpr (BYTES<D>) asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    produce<D>(a, &keys, &values, shared, all, sequences);
  } else {
    if constexpr (BYTES<D>) asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
    else asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<D>(a, shared, all, sequences);
  }
#endif
}

}  // namespace

bool prompts(const Tensor& keys, const Launch& launch) { return launch.architecture == 90 && keys.most[3] == DIM && keys.dtype != F32; }

void prompt(const Operands& o, int few, Launch& launch) {
  const Tensor &q = o.in(0), &keys = o.in(1), &segments = o.in(3);
  Prompt a{};
  a.q = q.as<float>(), a.y = out_of(o.out(0)), a.step = step_of(keys, segments, o.in(4), launch.faults), a.cache = cache_of(keys, o.in(2));
  a.share = q.width() / DIM / a.cache.heads, a.few = few;
  a.scale = LOG2E / sqrtf(static_cast<float>(DIM));
  const int64_t tiles = (ceil_div(static_cast<int64_t>(q.most[0]) * a.share, QUERIES) + segments.most[0]) * static_cast<int64_t>(a.cache.heads);
  const int blocks = static_cast<int>(tiles < launch.multiprocessors ? tiles : launch.multiprocessors);
  with_format(keys.dtype, [&](auto d) {
    if constexpr (d.value != F32) {
      CUtensorMap maps[2]{};
      if constexpr (!BYTES<d.value>)
        for (int i = 0; i < 2; i++)
          launch.tensor_map(&maps[i], d.value == BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, i ? a.cache.values : a.cache.keys, DIM,
                            static_cast<uint64_t>(a.step.blocks) * a.cache.heads * BLOCK_TOKENS, DIM * 2, 64, BLOCK_TOKENS, CU_TENSOR_MAP_SWIZZLE_128B);
      launch(prompt_kernel<d.value>, blocks, THREADS, 1024 + (2 + 4 * STAGES) * PART + 4 * STAGES * 8, maps[0], maps[1], a);
    }
  });
}

}  // namespace cuda::attention
