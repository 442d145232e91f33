// Attention of sequences with few rows, such as one each: the context is the work, and reading it sets the time.
//
// The context of all sequences and KV heads is a row of units of 16 tokens, which the blocks share evenly, whatever the lengths: a block has
// the units of some queries of one KV head (a task), or of the end of one task and the beginning of others. Its warps take units in turns.
// Each has its own ring of stages in shared memory, which copies fill across tasks, and its own softmax. A block merges its warps' results;
// the last block to finish with a task merges those of all.
//
// Products are those of tensor cores with queries and weights as sums of two half numbers, so results are about as good as float32's.
#include "attention_decode.cuh"

namespace cuda::attention {
namespace {

using namespace decoding;

// A warp's lanes hold the sums of one query, DIM / 32 adjacent dims each.
template <int DIM> struct Sums {
  static constexpr int N = DIM / 32;
  float y[N], top, total;

  __device__ __forceinline__ static void read(const float* from, float (&x)[N]) {
    if constexpr (N == 4) {
      const float4 v = __ldcg(reinterpret_cast<const float4*>(from) + lane_id());
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
      const float2 v = __ldcg(reinterpret_cast<const float2*>(from) + lane_id());
      x[0] = v.x, x[1] = v.y;
    }
  }
  __device__ __forceinline__ void clear() {
    total = 0;
#pragma unroll
    for (int i = 0; i < N; i++) y[i] = 0;
  }
};

template <Dtype D, int DIM, int QUERIES>
__global__ void __launch_bounds__(THREADS, 1) decode_kernel(const __grid_constant__ CUtensorMap keys, const __grid_constant__ CUtensorMap values, const Decode a) {
  using L = Layout<D, DIM>;
  constexpr int LEFT = 8 * DIM + 16;  // floats that a warp leaves for merging
  extern __shared__ uint8_t raw[];
  uint8_t* const shared = raw + (-shared_address(raw) & 1023);
  let_next_start();

  const int sequences = a.step.sequences.get(), columns = a.step.columns.get(), warp = warp_id(), lane = lane_id();
  const auto units = [&](int s) {
    const int rows = a.step.segments[s * 3 + 1];
    return rows > 0 && rows <= a.few ? ceil_div(rows * a.share, QUERIES) * a.cache.heads * ceil_div(a.step.segments[s * 3 + 2] + rows, UNIT) : 0;
  };
  const int all = total(sequences, units);
  int part = ceil_div(all, gridDim.x);  // of each block; whole turns of the warps unless that makes it uneven
  if (part < a.least) part = a.least;
  if (part < 16 * WARPS) part = (part + WARPS - 1) / WARPS * WARPS;
  const int first = blockIdx.x * part, last = min(all, first + part);
  if (first >= last) return await_inputs();

  Task task;
  int offset;
  locate(first, sequences, units, task.sequence, offset);
  task.enter(a, QUERIES);
  task.index = offset / task.units;
  task.begin = first - offset % task.units;

  Ring<D, DIM> ring;
  ring.stages = a.stages;
  ring.data = shared_address(shared) + warp * a.stages * L::STAGE;
  const uint8_t* const data = shared + warp * a.stages * L::STAGE;
  float* const scales = reinterpret_cast<float*>(shared + WARPS * a.stages * L::STAGE) + warp * a.stages * L::SCALES / 2;
  ring.scales = shared_address(scales);
  float* const left = reinterpret_cast<float*>(shared + WARPS * a.stages * (L::STAGE + 2 * L::SCALES));
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
      ring.settle(a, QUERIES, sequences, first, last);
    }
#if __CUDA_ARCH__ < 900
    end_copies();
#endif
  };
  ring.settle(a, QUERIES, sequences, first, last);
  int filled = 0;
  while (filled < a.stages && ring.more(last) && ring.old()) refill(filled++);
  await_inputs();
  while (filled < a.stages) refill(filled++);

  int stage = 0;
  uint32_t phase = 0;
  while (task.begin < last) {
    const int from = max(0, first - task.begin), to = min(task.units, last - task.begin);
    const int context = task.segment.position + task.segment.rows;
    Queries<D, DIM, QUERIES> queries;
    queries.read(a, task);
    Softmax<D, DIM, QUERIES> softmax;
    softmax.clear();
    for (int unit = from + warp; unit < to; unit += WARPS) {
      ring.wait(stage, phase);
      const uint8_t* const at = data + stage * L::STAGE;
      const float* const scale = scales + stage * L::SCALES / 2;
      softmax.add(queries, at, at + L::DATA, scale, scale + L::SCALES / 4, unit * UNIT, context);
      __syncwarp();
      refill(stage);
      if (++stage == a.stages) stage = 0, phase ^= 1;
    }

    const int head = task.index % a.cache.heads, group = task.index / a.cache.heads, count = task.segment.rows * a.share;
    const int begins = task.begin / part, parts = (task.begin + task.units - 1) / part - begins + 1;
    const auto partial = [&](int block) { return a.partials + (2 * block + (task.begin > block * part ? 1 : 0)) * static_cast<int64_t>(QUERIES * (DIM + 2)); };
    const auto write = [&](int query, const Sums<DIM>& sums) {
      const int i = group * QUERIES + query;
      if (i >= count) return;
      const int64_t y = (((static_cast<int64_t>(task.segment.first) + i / a.share) * a.cache.heads + head) * a.share + i % a.share) * DIM + lane * Sums<DIM>::N;
      const float inverse = 1 / sums.total;
#pragma unroll
      for (int d = 0; d < Sums<DIM>::N; d += 2) a.y.put2(y + d, sums.y[d] * inverse, sums.y[d + 1] * inverse);
    };
#pragma unroll
    for (int r = 0; r < QUERIES / 8; r++) {
      if (r) __syncthreads();
      softmax.leave(r, left + warp * LEFT);
      __syncthreads();
      Sums<DIM> sums;  // of query `warp`
      sums.clear();
      sums.top = -INFINITY;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sums.top = fmaxf(sums.top, left[w * LEFT + 8 * DIM + warp]);
      const float base = sums.top == -INFINITY ? 0 : sums.top;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float* const from = left + w * LEFT;
        const float weight = power(from[8 * DIM + warp] - base);
        sums.total += weight * from[8 * DIM + 8 + warp];
#pragma unroll
        for (int d = 0; d < Sums<DIM>::N; d++) sums.y[d] += weight * from[warp * DIM + lane * Sums<DIM>::N + d];
      }
      const int query = r * 8 + warp;
      if (parts == 1) {
        write(query, sums);
      } else {
        float* const mine = partial(blockIdx.x);
#pragma unroll
        for (int d = 0; d < Sums<DIM>::N; d++) mine[query * DIM + lane * Sums<DIM>::N + d] = sums.y[d];
        if (lane == 0) mine[QUERIES * DIM + 2 * query] = sums.top, mine[QUERIES * DIM + 2 * query + 1] = sums.total;
      }
    }
    if (parts > 1 && last_to_arrive(a.arrived + (static_cast<int64_t>(task.sequence) * a.most_groups + group) * a.cache.heads + head, parts)) {
      for (int query = warp; query < QUERIES; query += WARPS) {
        if (group * QUERIES + query >= count) break;
        Sums<DIM> sums;
        sums.clear();
        sums.top = -INFINITY;
        for (int i = lane; i < parts; i += 32) sums.top = fmaxf(sums.top, __ldcg(partial(begins + i) + QUERIES * DIM + 2 * query));
        sums.top = largest(sums.top);
#pragma unroll 8
        for (int i = 0; i < parts; i++) {
          const float* const from = partial(begins + i);
          const float2 part_of = __ldcg(reinterpret_cast<const float2*>(from + QUERIES * DIM) + query);
          const float weight = power(part_of.x - sums.top);
          float x[Sums<DIM>::N];
          Sums<DIM>::read(from + query * DIM, x);
          sums.total += weight * part_of.y;
#pragma unroll
          for (int d = 0; d < Sums<DIM>::N; d++) sums.y[d] += weight * x[d];
        }
        write(query, sums);
      }
    }
    task.next(a, QUERIES, sequences);
    if (task.begin < last) __syncthreads();
  }
}

template <Dtype D, int DIM, int QUERIES> void run(const Operands& o, Decode a, Launch& launch) {
  using L = Layout<D, DIM>;
  const Tensor &q = o.in(0), &segments = o.in(3), &pages = o.in(4);
  const int64_t rows = q.most[0], sequences = segments.most[0] < rows ? segments.most[0] : rows;
  a.most_groups = ceil_div((rows < a.few ? rows : a.few) * a.share, QUERIES);
  // Work of the largest step: all rows' groups over the longest context.
  const int64_t groups = ceil_div(rows * a.share, QUERIES) + sequences;
  const int64_t units = (groups < sequences * a.most_groups ? groups : sequences * a.most_groups) * a.cache.heads * pages.most[1] * (BLOCK_TOKENS / UNIT);
  const int64_t most = ceil_div(units, a.least);
  const int blocks = static_cast<int>(most < launch.multiprocessors ? most : launch.multiprocessors);
  a.stages = ceil_div(units, blocks) <= WARPS ? 1 : 2;
  a.partials = static_cast<float*>(launch.scratch(static_cast<size_t>(blocks) * 2 * QUERIES * (DIM + 2) * sizeof(float)));
  a.arrived = launch.counters(sequences * a.most_groups * a.cache.heads);
  CUtensorMap maps[2]{};
  if (launch.architecture >= 90)
    for (int i = 0; i < 2; i++)
      launch.tensor_map(&maps[i], CU_TENSOR_MAP_DATA_TYPE_UINT8, i ? a.cache.values : a.cache.keys, 128, a.step.blocks * static_cast<int64_t>(a.cache.heads) * head_bytes<D>(DIM) / 128, 128, 128, L::DATA / 128, CU_TENSOR_MAP_SWIZZLE_128B);
  const size_t bytes = 1024 + WARPS * (a.stages * (L::STAGE + 2 * L::SCALES + 8) + (8 * DIM + 16) * sizeof(float));
  launch(decode_kernel<D, DIM, QUERIES>, blocks, THREADS, bytes, maps[0], maps[1], a);
}

}  // namespace

bool decodes(const Tensor& keys) { return (keys.most[3] == 64 || keys.most[3] == 128) && keys.dtype != F32; }

void decode(const Operands& o, int few, Launch& launch) {
  const Tensor &q = o.in(0), &keys = o.in(1), &segments = o.in(3);
  Decode a{};
  a.q = q.as<float>(), a.y = out_of(o.out(0)), a.step = step_of(keys, segments, o.in(4), launch.faults), a.cache = cache_of(keys, o.in(2));
  a.share = q.width() / a.cache.dim / a.cache.heads, a.few = few, a.least = 2 * WARPS;
  a.scale = LOG2E / sqrtf(static_cast<float>(a.cache.dim));
  // Eight queries at a time where sequences have a row each.
  const bool narrow = a.share <= 8 && q.most[0] <= segments.most[0];
  const auto with = [&](auto d, auto dim) { narrow ? run<d.value, dim.value, 8>(o, a, launch) : run<d.value, dim.value, 16>(o, a, launch); };
  with_format(keys.dtype, [&](auto d) {
    if constexpr (d.value != F32) a.cache.dim == 64 ? with(d, std::integral_constant<int, 64>{}) : with(d, std::integral_constant<int, 128>{});
  });
}

}  // namespace cuda::attention
