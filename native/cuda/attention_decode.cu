// Attention of sequences with few rows, such as one each: the context is the work, and reading it sets the time.
//
// The context of all sequences and KV heads is a row of units of 16 or 32 tokens, which the blocks share evenly, whatever the lengths: a block has
// the units of some queries of one KV head (a task), or of the end of one task and the beginning of others. Its warps take units in turns.
// Each has its own ring of stages in shared memory, which copies fill across tasks, and its own softmax. A block merges its warps' results;
// the last block to finish with a task merges those of all.
//
// Products are those of tensor cores with queries and weights as sums of two half numbers, so results are about as good as float32's.
#include "attention_decode.cuh"

namespace cuda::attention {
namespace {

using namespace decoding;

// A query's sums, DIM / 32 adjacent dims in each lane of a warp.
template <int DIM> struct Sums {
  static constexpr int N = DIM / 32;
  float y[N] = {}, top = -INFINITY, total = 0;

  template <bool SHARED> __device__ __forceinline__ void add(float weight, const float* from) {
    using V = std::conditional_t<N == 4, float4, float2>;
    const V* const at = reinterpret_cast<const V*>(from) + lane_id();
    const V v = SHARED ? *at : __ldcg(at);
    const float* const x = &v.x;
#pragma unroll
    for (int d = 0; d < N; d++) y[d] += weight * x[d];
  }
};

template <Dtype D, int DIM, int QUERIES>
__global__ void __launch_bounds__(THREADS, 1) decode_kernel(const __grid_constant__ CUtensorMap keys, const __grid_constant__ CUtensorMap values, const Decode a) {
  using L = Layout<D, DIM>;
  using Q = Queries<D, DIM, QUERIES>;
  using S = Softmax<D, DIM, QUERIES>;
  constexpr int LEFT = S::LEFT * Q::ROWS, PARTIAL = QUERIES * (DIM + 2);
  extern __shared__ uint8_t raw[];
  uint8_t* const shared = raw + (-shared_address(raw) & 1023);
  let_next_start();

  const int sequences = a.step.sequences.get(), columns = a.step.columns.get(), warp = warp_id(), lane = lane_id();
  const auto tasks_of = [&](int s) {
    const int rows = a.step.segments[s * 3 + 1];
    return rows > 0 && rows <= a.few ? (rows * a.share + QUERIES - 1) / QUERIES * a.cache.heads : 0;
  };
  const auto length_of = [&](int s) { return (a.step.segments[s * 3 + 1] + a.step.segments[s * 3 + 2] + L::UNIT - 1) / L::UNIT; };
  // The units of a block. A few tasks begin in blocks of their own, so that a block never has two; many follow one another.
  const int blocks = gridDim.x;
  int part, apart = 1;
  {
    int tasks = 0, all = 0, longest = 0;
    for (int s = lane; s < sequences; s += 32)
      if (const int n = tasks_of(s)) tasks += n, all += n * length_of(s), longest = max(longest, length_of(s));
    tasks = __reduce_add_sync(~0u, tasks), all = __reduce_add_sync(~0u, all), longest = __reduce_max_sync(~0u, longest);
    part = (all + blocks - 1) / blocks;
    const bool own = tasks > 0 && tasks <= blocks && (tasks * 4 <= blocks || longest * tasks <= all + all / 8);
    if (own) {
      const int each = blocks / tasks;
      part = (longest + each - 1) / each;
      if (blocks > tasks) part = min(part, (all + blocks - tasks - 1) / (blocks - tasks));
    }
    part = max(part, min(a.least, longest));
    // Whole turns of the warps, unless that makes the shares uneven.
    if (part > WARPS && part < 16 * WARPS) part = (part + WARPS - 1) / WARPS * WARPS;
    if (own) apart = part;
  }
  const auto units = [&](int s) {
    const int n = tasks_of(s);
    return n ? n * ((length_of(s) + apart - 1) / apart * apart) : 0;
  };
  const int first = blockIdx.x * part;
  Task task;
  int offset;
  if (!locate(first, sequences, units, task.sequence, offset)) return await_inputs();
  const int last = min(first + part, total(sequences, units));
  task.enter<L>(a, QUERIES, apart);
  {
    const int index = offset / task.span;
    task.begin = first - (offset - index * task.span);
    task.group = index / a.cache.heads, task.head = index % a.cache.heads;
  }

  Ring<D, DIM> ring;
  ring.stages = a.stages;
  ring.data = shared_address(shared) + warp * a.stages * L::STAGE;
  const uint8_t* const data = shared + warp * a.stages * L::STAGE;
  float* const scales = reinterpret_cast<float*>(shared + WARPS * a.stages * L::STAGE) + warp * a.stages * L::SCALES / 2;
  ring.scales = shared_address(scales);
  uint32_t* const queries = reinterpret_cast<uint32_t*>(shared + WARPS * a.stages * (L::STAGE + 2 * L::SCALES));
  float* const left = reinterpret_cast<float*>(queries + Q::SHARED / 4);
  ring.barriers = shared_address(left + WARPS * LEFT) + warp * a.stages * 8;
  ring.task = task;
  ring.unit = first - task.begin + warp;
#if __CUDA_ARCH__ >= 900
  if (lane == 0) {
    for (int i = 0; i < a.stages; i++) init_barrier(ring.barriers + i * 8, 1);
    publish_barriers();
  }
  __syncwarp();
#endif
  const auto refill = [&](int stage) {
    if (ring.more(last)) {
      ring.copy(a, &keys, &values, columns, stage);
      ring.unit += WARPS;
      ring.settle(a, QUERIES, apart, sequences, last);
    }
#if __CUDA_ARCH__ < 900
    end_copies();
#endif
  };
  ring.settle(a, QUERIES, apart, sequences, last);
  int filled = 0;
  while (filled < a.stages && ring.more(last) && ring.old()) refill(filled++);
  await_inputs();
  Q read;  // of the next task, as soon as this task's are shared
  read.read(a, task);
  while (filled < a.stages) refill(filled++);

  int stage = 0;
  uint32_t phase = 0;
  for (;;) {
    const int from = max(0, first - task.begin), to = min(task.units, last - task.begin);
    const int context = task.segment.position + task.segment.rows, count = min(QUERIES, task.segment.rows * a.share - task.group * QUERIES);
    const int unmasked = task.segment.position + task.group * QUERIES / a.share + 1;  // tokens that all queries see
    const bool whole = from == 0 && to == task.units;
    int64_t at[Q::ROWS];
#pragma unroll
    for (int r = 0; r < Q::ROWS; r++) at[r] = read.at[r];
    read.share(a, queries);
    const Task current = task;
    task.next<L>(a, QUERIES, apart, sequences);
    const bool more = task.begin < last;
    if (more) read.read(a, task);
    __syncthreads();
    S softmax;
    softmax.clear();
    {
      Operand<D, DIM, QUERIES> operand;
      operand.take(queries);
      for (int unit = from + warp; unit < to; unit += WARPS) {
        ring.wait(stage, phase);
        const uint8_t* const at = data + stage * L::STAGE;
        const float* const scale = scales + stage * L::SCALES / 2;
        softmax.add(operand, at, at + L::DATA, scale, scale + L::SCALES / 4, unit * L::UNIT, context, unmasked);
        __syncwarp();
        refill(stage);
        if (++stage == a.stages) stage = 0, phase ^= 1;
      }
    }
    softmax.leave(left + warp * LEFT, count);
    __syncthreads();

    // Queries `warp` and 8 more.
    const auto write = [&](int r, const Sums<DIM>& sums) {
      const float inverse = 1 / sums.total;
#pragma unroll
      for (int d = 0; d < DIM / 32; d += 2) a.y.put2(at[r] + d, sums.y[d] * inverse, sums.y[d + 1] * inverse);
    };
    // Blocks that have units of a task have two places for partial results each: of the task that they begin with, and of the one that they end with.
    const auto partial = [&](int block) { return a.partials + (2 * block + (current.begin > block * part ? 1 : 0)) * static_cast<int64_t>(PARTIAL); };
#pragma unroll
    for (int r = 0; r < Q::ROWS; r++) {
      if (at[r] < 0) continue;
      const float* const mine = left + r * S::LEFT;
      const float* const stats = mine + lane % WARPS * LEFT + 8 * S::PITCH + warp;  // of the warp `lane`
      Sums<DIM> sums;
      float top = stats[0], all = stats[8];
#pragma unroll
      for (int i = WARPS / 2; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
      sums.top = top;
      const float weight = power(stats[0] - (top == -INFINITY ? 0 : top));
      all *= weight;
#pragma unroll
      for (int i = WARPS / 2; i; i /= 2) all += __shfl_xor_sync(~0u, all, i);
      sums.total = all;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sums.template add<true>(__shfl_sync(~0u, weight, w), mine + w * LEFT + warp * S::PITCH);
      if (whole) {
        write(r, sums);
      } else {
        float* const to = partial(blockIdx.x) + (r * 8 + warp) * DIM + lane * (DIM / 32);
#pragma unroll
        for (int d = 0; d < DIM / 32; d += 2) *reinterpret_cast<float2*>(to + d) = make_float2(sums.y[d], sums.y[d + 1]);
        if (lane == 0) *reinterpret_cast<float2*>(partial(blockIdx.x) + QUERIES * DIM + 2 * (r * 8 + warp)) = make_float2(sums.top, sums.total);
      }
    }
    if (!whole) {
      const int begins = current.begin / part, parts = (current.begin + current.units - 1) / part - begins + 1;
      if (last_to_arrive(a.arrived + (static_cast<int64_t>(current.sequence) * a.most_groups + current.group) * a.cache.heads + current.head, parts)) {
#pragma unroll
        for (int r = 0; r < Q::ROWS; r++) {
          if (at[r] < 0) continue;
          const int query = r * 8 + warp;
          Sums<DIM> sums;
          const auto stats = [&](int i) { return i < parts ? __ldcg(reinterpret_cast<const float2*>(partial(begins + i) + QUERIES * DIM) + query) : float2{-INFINITY, 0}; };
          for (int i = lane; i < parts; i += 32) sums.top = fmaxf(sums.top, stats(i).x);
          sums.top = largest(sums.top);
          for (int i0 = 0; i0 < parts; i0 += 32) {
            const float2 mine = stats(i0 + lane);
            const float weight = power(mine.x - sums.top);
            sums.total += weight * mine.y;
            const int count = min(32, parts - i0);
#pragma unroll 16
            for (int i = 0; i < count; i++) sums.template add<false>(__shfl_sync(~0u, weight, i), partial(begins + i0 + i) + query * DIM);
          }
          sums.total = sum(sums.total);
          write(r, sums);
        }
      }
    }
    if (!more) return;
  }
}

template <Dtype D, int DIM, int QUERIES> void run(const Operands& o, Decode a, Launch& launch) {
  using L = Layout<D, DIM>;
  const Tensor &q = o.in(0), &segments = o.in(3), &pages = o.in(4);
  const int64_t rows = q.most[0], sequences = segments.most[0] < rows ? segments.most[0] : rows;
  a.most_groups = ceil_div((rows < a.few ? rows : a.few) * a.share, QUERIES);
  // Work of the largest step: all rows' groups over the longest context.
  const int64_t groups = ceil_div(rows * a.share, QUERIES) + sequences;
  const int64_t tasks = (groups < sequences * a.most_groups ? groups : sequences * a.most_groups) * a.cache.heads, units = tasks * pages.most[1] * (BLOCK_TOKENS / L::UNIT);
  const int64_t most = tasks > ceil_div(units, a.least) ? tasks : ceil_div(units, a.least);
  const int blocks = static_cast<int>(most < launch.multiprocessors ? most : launch.multiprocessors);
  if (!units) return;
  a.stages = ceil_div(units, blocks) <= WARPS ? 1 : 2;
  a.partials = static_cast<float*>(launch.scratch(static_cast<size_t>(blocks) * 2 * QUERIES * (DIM + 2) * sizeof(float)));
  a.arrived = launch.counters(sequences * a.most_groups * a.cache.heads);
  CUtensorMap maps[2]{};
  if (launch.architecture >= 90)
    for (int i = 0; i < 2; i++)
      launch.tensor_map(&maps[i], CU_TENSOR_MAP_DATA_TYPE_UINT8, i ? a.cache.values : a.cache.keys, 128, a.step.blocks * static_cast<int64_t>(a.cache.heads) * head_bytes<D>(DIM) / 128, 128, 128, L::DATA / 128, CU_TENSOR_MAP_SWIZZLE_128B);
  const size_t bytes = 1024 + WARPS * (a.stages * (L::STAGE + 2 * L::SCALES + 8) + Softmax<D, DIM, QUERIES>::LEFT * (QUERIES / 8) * sizeof(float)) + Queries<D, DIM, QUERIES>::SHARED;
  launch(decode_kernel<D, DIM, QUERIES>, blocks, THREADS, bytes, maps[0], maps[1], a);
}

}  // namespace

bool decodes(const Tensor& keys) { return (keys.most[3] == 64 || keys.most[3] == 128) && keys.dtype != F32; }

void decode(const Operands& o, int few, Launch& launch) {
  const Tensor &q = o.in(0), &keys = o.in(1), &segments = o.in(3);
  Decode a{};
  a.q = rows_of(q), a.y = rows_of(o.out(0)), a.step = step_of(keys, segments, o.in(4), launch.faults), a.cache = cache_of(keys, o.in(2));
  a.share = q.width() / a.cache.dim / a.cache.heads, a.few = few, a.least = WARPS;
  a.scale = LOG2E / sqrtf(static_cast<float>(a.cache.dim));
  // Eight queries at a time where sequences, or those among prompts, probably have a row each.
  const int rows = q.most[0], sequences = segments.most[0];
  const bool narrow = a.share <= 8 && (rows <= sequences || (rows > few && rows > 8 * sequences));
  const auto with = [&](auto d, auto dim) { narrow ? run<d.value, dim.value, 8>(o, a, launch) : run<d.value, dim.value, 16>(o, a, launch); };
  with_format(keys.dtype, [&](auto d) {
    if constexpr (d.value != F32) a.cache.dim == 64 ? with(d, std::integral_constant<int, 64>{}) : with(d, std::integral_constant<int, 128>{});
  });
}

}  // namespace cuda::attention
