// Attention for any head width and format in float32, over the paged cache or over whole sequences.
//
// A block takes a tile of the queries of one KV head of one sequence: rows x the heads that share it. Each of its four warps has its own
// queries, and they share blocks of keys and values in shared memory. Where there are few tiles, the context is split as well.
#include "attention.cuh"

namespace cuda::attention {
namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;

// Keys and values in the paged cache.
template <Dtype D> struct Paged {
  using T = typename Format<D>::T;
  Cache cache;

  struct Reader {
    const T *keys, *values;
    const int32_t* pages;
    int64_t block_stride;
    int columns, dp;
  };
  __device__ Reader reader(const Step& step, int sequence, int head) const {
    const int columns = step.columns.get();
    const int64_t bytes = head_bytes<D>(cache.dim);
    return {reinterpret_cast<const T*>(static_cast<const uint8_t*>(cache.keys) + head * bytes), reinterpret_cast<const T*>(static_cast<const uint8_t*>(cache.values) + head * bytes),
            step.pages + static_cast<int64_t>(sequence) * columns, cache.heads * bytes, columns, padded(D, cache.dim)};
  }
  // Reads the block from token `t0` on into shared memory, `tokens` of it; other tokens are zero.
  __device__ void read(const Step& step, const Reader& r, int t0, int tokens, int dim, int pitch, float* k, float* v) const {
    const int64_t at = step.block(r.pages, t0 / BLOCK_TOKENS, r.columns) * r.block_stride / static_cast<int64_t>(sizeof(T));
    const T *keys = r.keys + at, *values = r.values + at;
    for (int t = warp_id(); t < BLOCK_TOKENS; t += WARPS)
      for (int d = lane_id(); d < dim; d += 32) {
        float x = 0, y = 0;
        if (t < tokens) {
          x = static_cast<float>(keys[t * r.dp + d]), y = static_cast<float>(values[t * r.dp + d]);
          if constexpr (D == INT8KV) {
            const int scale = t * (r.dp / GROUP) + d / GROUP;
            x *= reinterpret_cast<const float*>(keys + BLOCK_TOKENS * r.dp)[scale];
            y *= reinterpret_cast<const float*>(values + BLOCK_TOKENS * r.dp)[scale];
          }
        }
        k[t * pitch + d] = x, v[t * pitch + d] = y;
      }
  }
};

// Keys and values of whole sequences, one after another: [context, heads * dim].
struct Whole {
  const float *keys, *values;
  int32_t heads, dim;

  struct Reader {
    const float *keys, *values;
    int32_t width;
  };
  __device__ Reader reader(const Step& step, int sequence, int head) const {
    int64_t before = 0;  // keys of earlier sequences
    for (int s = 0; s < sequence; s++) before += step.segments[s * 3 + 1] + step.segments[s * 3 + 2];
    const int64_t at = (before * heads + head) * dim;
    return {keys + at, values + at, heads * dim};
  }
  __device__ void read(const Step&, const Reader& r, int t0, int tokens, int dim, int pitch, float* k, float* v) const {
    for (int t = warp_id(); t < BLOCK_TOKENS; t += WARPS)
      for (int d = lane_id(); d < dim; d += 32) {
        const int64_t at = static_cast<int64_t>(t0 + t) * r.width + d;
        k[t * pitch + d] = t < tokens ? r.keys[at] : 0, v[t * pitch + d] = t < tokens ? r.values[at] : 0;
      }
  }
};

struct Task {
  const float* q;
  Out y;
  float* logsumexp;    // [rows, heads], or null
  int32_t heads;       // of q
  int32_t share;       // heads of q for each KV head
  int32_t dim;
  bool causal;
  float scale;         // of scores in powers of two
  float* partials;     // of the splits: [tiles, KV heads, splits, queries, dim + 2]
  int32_t* arrived;    // [tiles, KV heads]
};

// N queries a warp; up to 32 J numbers a head.
template <class Source, int N, int J>
__global__ void __launch_bounds__(THREADS) general_kernel(Source source, Step step, Task task) {
  constexpr int QUERIES = N * WARPS;
  extern __shared__ float4 shared[];
  const int dim = task.dim, width = (dim + 3) / 4 * 4, pitch = width + 4;
  float* const keys = reinterpret_cast<float*>(shared);  // [BLOCK_TOKENS][pitch]
  float* const values = keys + BLOCK_TOKENS * pitch;
  float* const queries = values + BLOCK_TOKENS * pitch + warp_id() * N * (width + BLOCK_TOKENS);  // this warp's: [N][width]
  float* const weights = queries + N * width;                                                     // [BLOCK_TOKENS][N]
  const int lane = lane_id(), sequences = step.sequences.get(), kv_heads = gridDim.y, head = blockIdx.y, splits = gridDim.z;
  await_inputs();
  let_next_start();

  int sequence, tile;
  const bool some = locate(blockIdx.x, sequences, [&](int s) { return ceil_div(static_cast<int64_t>(step.segments[s * 3 + 1]) * task.share, QUERIES); }, sequence, tile);
  if (!some) return;
  const Segment segment = step.segment(sequence);
  const int count = segment.rows * task.share, first = tile * QUERIES + warp_id() * N;
  // A query is a row and one of the heads that share the KV head.
  const auto row_of = [&](int i) { return min(first + i, count - 1) / task.share; };
  const auto at = [&](int i) { return (static_cast<int64_t>(segment.first) + row_of(i)) * task.heads + head * task.share + min(first + i, count - 1) % task.share; };
  const int context = segment.position + segment.rows;
  const int end = task.causal ? segment.position + min(tile * QUERIES + QUERIES - 1, count - 1) / task.share + 1 : context;
  for (int i = 0; i < N; i++)
    for (int d = lane; d < width; d += 32) queries[i * width + d] = d < dim ? task.q[at(i) * dim + d] * task.scale : 0;
  // Columns that only pad.
  if (dim < width)
    for (int i = threadIdx.x; i < BLOCK_TOKENS * (width - dim); i += THREADS) {
      const int to = i / (width - dim) * pitch + dim + i % (width - dim);
      keys[to] = 0, values[to] = 0;
    }

  float top[N], total[N], y[N][J];
#pragma unroll
  for (int i = 0; i < N; i++) {
    top[i] = -INFINITY, total[i] = 0;
#pragma unroll
    for (int j = 0; j < J; j++) y[i][j] = 0;
  }
  const auto reader = source.reader(step, sequence, head);
  const int blocks = ceil_div(end, BLOCK_TOKENS);
  const int from = static_cast<int>(static_cast<int64_t>(blocks) * blockIdx.z / splits), to = static_cast<int>(static_cast<int64_t>(blocks) * (blockIdx.z + 1) / splits);
  for (int block = from; block < to; block++) {
    const int t0 = block * BLOCK_TOKENS;
    __syncthreads();
    source.read(step, reader, t0, min(BLOCK_TOKENS, context - t0), dim, pitch, keys, values);
    __syncthreads();
    float score[N];
#pragma unroll
    for (int i = 0; i < N; i++) score[i] = 0;
    for (int d = 0; d < width; d += 4) {
      const float4 k = *reinterpret_cast<const float4*>(keys + lane * pitch + d);
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float4 q = *reinterpret_cast<const float4*>(queries + i * width + d);
        score[i] += q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
      }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int seen = task.causal ? segment.position + row_of(i) + 1 : context;
      const float s = t0 + lane < seen ? score[i] : -INFINITY;
      const float now = fmaxf(top[i], largest(s));
      const float p = t0 + lane < seen ? exp2f(s - now) : 0.f, shrink = top[i] == -INFINITY ? 0.f : exp2f(top[i] - now);
      total[i] = total[i] * shrink + sum(p);
      top[i] = now;
      weights[lane * N + i] = p;
#pragma unroll
      for (int j = 0; j < J; j++) y[i][j] *= shrink;
    }
    __syncwarp();
    for (int t = 0; t < BLOCK_TOKENS; t++) {
      float v[J];
#pragma unroll
      for (int j = 0; j < J; j++) v[j] = lane + 32 * j < width ? values[t * pitch + lane + 32 * j] : 0;
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float p = weights[t * N + i];
#pragma unroll
        for (int j = 0; j < J; j++) y[i][j] += p * v[j];
      }
    }
    __syncwarp();
  }

  if (splits > 1) {
    const int64_t task_index = static_cast<int64_t>(blockIdx.x) * kv_heads + head;
    float* const all = task.partials + task_index * splits * QUERIES * (dim + 2);
#pragma unroll
    for (int i = 0; i < N; i++) {
      float* mine = all + (static_cast<int64_t>(blockIdx.z) * QUERIES + warp_id() * N + i) * (dim + 2);
      if (lane == 0) mine[0] = top[i], mine[1] = total[i];
#pragma unroll
      for (int j = 0; j < J; j++)
        if (lane + 32 * j < dim) mine[2 + lane + 32 * j] = y[i][j];
    }
    if (!last_to_arrive(task.arrived + task_index, splits)) return;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float* one = all + (warp_id() * N + i) * static_cast<int64_t>(dim + 2);
      const int64_t stride = static_cast<int64_t>(QUERIES) * (dim + 2);
      top[i] = -INFINITY, total[i] = 0;
      for (int z = 0; z < splits; z++) top[i] = fmaxf(top[i], __ldcg(one + z * stride));
#pragma unroll
      for (int j = 0; j < J; j++) y[i][j] = 0;
      for (int z = 0; z < splits; z++) {
        const float part = __ldcg(one + z * stride), w = part == -INFINITY ? 0.f : exp2f(part - top[i]);
        total[i] += w * __ldcg(one + z * stride + 1);
#pragma unroll
        for (int j = 0; j < J; j++)
          if (lane + 32 * j < dim && w > 0) y[i][j] += w * __ldcg(one + z * stride + 2 + lane + 32 * j);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (first + i >= count) break;
    const int64_t to = at(i);
    const float inverse = 1 / total[i];
#pragma unroll
    for (int j = 0; j < J; j++)
      if (lane + 32 * j < dim) task.y.put(to * dim + lane + 32 * j, y[i][j] * inverse);
    if (task.logsumexp && lane == 0) task.logsumexp[to] = (top[i] + log2f(total[i])) / LOG2E;
  }
}

template <int N, int J, class Source>
void run(const Source& source, const Step& step, Task task, int64_t rows, int64_t sequences, int kv_heads, int64_t blocks, Launch& launch) {
  constexpr int QUERIES = N * WARPS;
  const int64_t tiles = ceil_div(rows * task.share, QUERIES) + (sequences < rows ? sequences : rows) - 1;
  // Split the context where that fills the card.
  int64_t splits = launch.multiprocessors * 2 / (tiles * kv_heads);
  if (splits > (blocks + 3) / 4) splits = (blocks + 3) / 4;
  if (splits < 1) splits = 1;
  if (splits > 1) {
    task.partials = static_cast<float*>(launch.scratch(tiles * kv_heads * splits * QUERIES * (task.dim + 2) * sizeof(float)));
    task.arrived = launch.counters(tiles * kv_heads);
  }
  const int width = (task.dim + 3) / 4 * 4;
  const size_t bytes = sizeof(float) * (2 * BLOCK_TOKENS * (width + 4) + QUERIES * (width + BLOCK_TOKENS));
  launch(general_kernel<Source, N, J>, dim3(tiles, kv_heads, splits), THREADS, bytes, source, step, task);
}

template <class Source>
void choose(const Source& source, const Step& step, const Task& task, int64_t rows, int64_t sequences, int kv_heads, int64_t blocks, Launch& launch) {
  if (task.dim > MAX_DIM) throw std::runtime_error("attention: head width " + std::to_string(task.dim) + " exceeds " + std::to_string(MAX_DIM));
  if (task.dim <= 64) run<4, 2>(source, step, task, rows, sequences, kv_heads, blocks, launch);
  else if (task.dim <= 128) {
    if (rows * task.share <= 32) run<2, 4>(source, step, task, rows, sequences, kv_heads, blocks, launch);
    else run<8, 4>(source, step, task, rows, sequences, kv_heads, blocks, launch);
  } else run<4, 16>(source, step, task, rows, sequences, kv_heads, blocks, launch);
}

}  // namespace

void general(const Operands& o, Launch& launch) {
  const Tensor &q = o.in(0), &keys = o.in(1), &segments = o.in(3), &pages = o.in(4), &y = o.out(0);
  const Cache cache = cache_of(keys, o.in(2));
  const int heads = q.width() / cache.dim;
  const Task task{q.as<float>(), out_of(y), nullptr, heads, heads / cache.heads, cache.dim, true, LOG2E / sqrtf(static_cast<float>(cache.dim)), nullptr, nullptr};
  with_format(keys.dtype, [&](auto d) {
    choose(Paged<d.value>{cache}, step_of(keys, segments, pages, launch.faults), task, q.most[0], segments.most[0], cache.heads, pages.most[1], launch);
  });
}

void whole(const Operands& o, Launch& launch) {
  const Tensor &q = o.in(0), &k = o.in(1), &v = o.in(2), &segments = o.in(3), &y = o.out(0);
  const int dim = static_cast<int>(o.params[0]), heads = q.width() / dim, kv_heads = k.width() / dim;
  const Task task{q.as<float>(), out_of(y), o.out(1).as<float>(), heads, heads / kv_heads, dim, o.params[1] != 0, LOG2E / sqrtf(static_cast<float>(dim)), nullptr, nullptr};
  const Step step{segments.as<int32_t>(), nullptr, segments.dims[0], {0, nullptr}, 0, launch.faults};
  choose(Whole{k.as<float>(), v.as<float>(), kv_heads, dim}, step, task, q.most[0], segments.most[0], kv_heads, ceil_div(k.most[0], BLOCK_TOKENS), launch);
}

}  // namespace cuda::attention
