// Logits processors, in the order of Hugging Face transformers: bias, mask, penalties, n-grams, temperature, top-k, top-p, min-p.
#pragma once
#include "cluster.cuh"
#include "reduce.cuh"

namespace cuda {
namespace {

using namespace sampling;  // the columns of the controls

// Larger floats have larger keys; 0 and -0 have the same.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float of_key(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
constexpr uint32_t LOWEST_KEY = 0x00800000;  // above minus infinity's

// A token ranks before another by larger number, ties by lower id.
__device__ __forceinline__ uint64_t token_key(float x, int32_t id) { return static_cast<uint64_t>(key_of(x)) << 32 | (0xffffffffu - static_cast<uint32_t>(id)); }
__device__ __forceinline__ int32_t token_of(uint64_t key) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)); }

// A row is processed by a cluster of blocks, each of which keeps its stretch of the row in shared memory; where there are no clusters, or a row is too long,
// by one block in the row's own memory.
constexpr int PROCESS_THREADS = 512;

struct Process {
  const float* logits;
  const float* floats;
  const int32_t *ints, *history, *bias_ids;
  const float* bias_values;
  const uint32_t* masks;
  float* y;
  int32_t* seen;
  Size rows, mask_rows;
  int32_t vocab, stretch;  // numbers of a row that a block has
  FaultRecord* faults;
};

// Tokens that may be kept are sorted if they are at most this many.
constexpr int CANDIDATES = 1024;
// How far below the maximum candidates may reach; farther, they are all tokens.
constexpr int DEPTHS = 8;
__device__ constexpr float DEPTH[DEPTHS] = {1, 2, 3, 5, 7, 10, 14, 20};
constexpr int WAYS = 8, MOST_SUMS = 2 * DEPTHS + 2;

// What the blocks of a row tell each other.
struct Exchange {
  float warps[PROCESS_THREADS / 32][MOST_SUMS];
  float own[2][MOST_SUMS];  // of this block; two take turns, so that a slow block can still read the last ones
  float all[MOST_SUMS];
  float listed;  // how many candidates this block has
  uint64_t cut;  // in the first block: the last token kept
  uint64_t candidates[CANDIDATES], sorted[CANDIDATES];
};

template <int C>
__device__ __forceinline__ void row_barrier() {
  if constexpr (C > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
}

// v becomes the row's sums, or maxima, in an order that does not change, for all threads.
template <int C, int N, bool MAX>
__device__ void reduce_row(float (&v)[N], Exchange& e, int& turn) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto merge = [](float a, float b) { return MAX ? fmaxf(a, b) : a + b; };
#pragma unroll
  for (int i = 0; i < N; i++) {
#pragma unroll
    for (int d = 16; d; d /= 2) v[i] = merge(v[i], __shfl_xor_sync(~0u, v[i], d));
    if (lane == 0) e.warps[warp][i] = v[i];
  }
  __syncthreads();
  if (threadIdx.x < N) {
    float x = e.warps[0][threadIdx.x];
    for (int i = 1; i < PROCESS_THREADS / 32; i++) x = merge(x, e.warps[i][threadIdx.x]);
    (C > 1 ? e.own[turn] : e.all)[threadIdx.x] = x;
  }
  row_barrier<C>();
  if constexpr (C > 1) {
    if (threadIdx.x < N) {
      float each[C];
#pragma unroll
      for (int i = 0; i < C; i++) each[i] = remote_load(&e.own[turn][threadIdx.x], i);
#pragma unroll
      for (int i = 1; i < C; i++) each[0] = merge(each[0], each[i]);
      e.all[threadIdx.x] = each[0];
    }
    turn ^= 1;
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = e.all[i];
  __syncthreads();  // the next call overwrites them
}

// The largest key from `floor` to the maximum's such that numbers that are not below it weigh at least `target`: each 1, or e^(x - top); else `floor`.
// `above` becomes the weight of what is above. Each pass tries WAYS keys.
template <int C, bool MASS>
__device__ uint32_t threshold(const float* x, int n, uint32_t floor, float top, float target, float& above, Exchange& e, int& turn) {
  uint32_t low = floor, high = key_of(top);
  above = 0;
  while (low < high) {
    const uint32_t step = (high - low + WAYS - 1) / WAYS;
    float sums[WAYS] = {};
    for (int i = threadIdx.x; i < n; i += PROCESS_THREADS) {
      const uint32_t key = key_of(x[i]);
      if (key < low + step) continue;
      const float weight = MASS ? expf(x[i] - top) : 1.f;
#pragma unroll
      for (int j = 0; j < WAYS; j++) sums[j] += key >= low + step * (j + 1) ? weight : 0.f;
    }
    reduce_row<C, WAYS, false>(sums, e, turn);
    const uint32_t base = low, bound = high;
    high = base + step - 1;
    float beyond = sums[0];
#pragma unroll
    for (int j = 0; j < WAYS; j++) {
      const uint32_t key = base + step * (j + 1);
      if (key > bound || !(sums[j] >= target)) continue;
      low = key;
      const bool next = j + 1 < WAYS && key + step <= bound;
      high = next ? key + step - 1 : bound;
      beyond = next ? sums[(j + 1) % WAYS] : above;
    }
    above = beyond;
  }
  return low;
}

// Sorts the first block's candidates, best first; `size` is a power of two.
__device__ void sort_candidates(uint64_t* keys, int size) {
  for (int span = 2; span <= size; span *= 2)
    for (int stride = span / 2; stride; stride /= 2) {
      for (int t = threadIdx.x; t < size / 2; t += PROCESS_THREADS) {
        const int i = 2 * t - (t & (stride - 1)), j = i + stride;
        const uint64_t a = keys[i], b = keys[j];
        if ((a < b) == ((i & span) == 0)) keys[i] = b, keys[j] = a;
      }
      __syncthreads();
    }
}

// The last token that top-k and top-p keep, of sorted candidates, which include all that they keep; `size` is at least 32. By one warp. `total` is
// the sum of e^(x - top) over the row.
__device__ uint64_t last_kept(const uint64_t* keys, int size, int count, int top_k, float top_p, float top, double total) {
  const int lane = threadIdx.x, each = size / 32, from = lane * each;
  int kept = count;
  if (top_k) {
    const uint64_t worst = keys[min(top_k, count) - 1] >> 32;  // ties with the k-th are kept
    int own = 0;
    for (int i = from; i < from + each; i++) own += i < count && keys[i] >> 32 >= worst;
    kept = __reduce_add_sync(~0u, own);
  }
  if (top_p < 1) {
    auto mass = [&](int i) { return i < kept ? static_cast<double>(expf(of_key(static_cast<uint32_t>(keys[i] >> 32)) - top)) : 0.; };
    double own = 0;
    for (int i = from; i < from + each; i++) own += mass(i);
    double upto = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const double other = __shfl_up_sync(~0u, upto, d);
      if (lane >= d) upto += other;
    }
    if (top_k) total = __shfl_sync(~0u, upto, 31);
    double before = upto - own;
    int under = 0;
    for (int i = from; i < from + each; i++) {
      under += i < kept && (i == 0 || before < static_cast<double>(top_p) * total);
      before += mass(i);
    }
    kept = __reduce_add_sync(~0u, under);
  }
  return keys[kept - 1];
}

// Keeps what top-k and top-p keep of many candidates.
template <int C>
__device__ void truncate_many(float* x, int n, int rank, int top_k, float top_p, float top, Exchange& e, int& turn) {
  uint32_t lowest = LOWEST_KEY;
  float above;
  if (top_k) lowest = threshold<C, false>(x, n, lowest, top, static_cast<float>(top_k), above, e, turn);  // ties with the k-th are kept
  if (top_p < 1) {
    float total[1] = {};
    for (int i = threadIdx.x; i < n; i += PROCESS_THREADS)
      if (key_of(x[i]) >= lowest) total[0] += expf(x[i] - top);
    reduce_row<C, 1, false>(total, e, turn);
    const float target = top_p * total[0];
    lowest = threshold<C, true>(x, n, lowest, top, target, above, e, turn);
    // Of numbers equal to the last one kept, those with lower ids come first, until the sum reaches the target.
    float ties[CLUSTER] = {};
    int own = 0;
    for (int i = threadIdx.x; i < n; i += PROCESS_THREADS) own += key_of(x[i]) == lowest;
#pragma unroll
    for (int b = 0; b < CLUSTER; b++) ties[b] = b == rank ? static_cast<float>(own) : 0.f;
    reduce_row<C, CLUSTER, false>(ties, e, turn);
    float before = 0, all = 0;
#pragma unroll
    for (int b = 0; b < CLUSTER; b++) {
      if (b < rank) before += ties[b];
      all += ties[b];
    }
    const float each = expf(of_key(lowest) - top);
    auto kept = [&](float i) { return (above == 0 && i == 0) || above + i * each < target; };
    if (!kept(all - 1) && threadIdx.x < 32) {
      int at = static_cast<int>(before);
      for (int i0 = 0; i0 < n; i0 += 32) {
        const int i = i0 + static_cast<int>(threadIdx.x);
        const bool tie = i < n && key_of(x[i]) == lowest;
        const uint32_t who = __ballot_sync(~0u, tie);
        if (tie && !kept(static_cast<float>(at + __popc(who & ((1u << threadIdx.x) - 1))))) x[i] = -INFINITY;
        at += __popc(who);
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < n; i += PROCESS_THREADS)
    if (key_of(x[i]) < lowest) x[i] = -INFINITY;
}

// Removes everything that top-k and top-p, in this order, do not keep. Mostly that is all but a few tokens near the maximum, which are sorted.
template <int C>
__device__ void truncate(float* x, int begin, int n, int rank, int top_k, float top_p, float top, Exchange& e, int& turn) {
  float sums[MOST_SUMS] = {};  // tokens by depth, all tokens; the same for sums of e^(x - top)
  for (int i = threadIdx.x; i < n; i += PROCESS_THREADS) {
    const float depth = top - x[i];
    if (depth == INFINITY) continue;
    const float mass = top_p < 1 ? expf(-depth) : 0.f;
    sums[DEPTHS] += 1, sums[2 * DEPTHS + 1] += mass;
    if (depth > DEPTH[DEPTHS - 1]) continue;
#pragma unroll
    for (int d = 0; d < DEPTHS; d++)
      if (depth <= DEPTH[d]) sums[d] += 1, sums[DEPTHS + 1 + d] += mass;
  }
  reduce_row<C, MOST_SUMS, false>(sums, e, turn);
  float floor = -INFINITY, found = sums[DEPTHS];
  const float total = sums[2 * DEPTHS + 1];
#pragma unroll
  for (int d = DEPTHS - 1; d >= 0; d--)  // with a margin for rounding
    if (top_k ? sums[d] >= static_cast<float>(top_k) : sums[DEPTHS + 1 + d] > top_p * total * 1.0001f) floor = DEPTH[d], found = sums[d];
  const int count = static_cast<int>(found);
  if (count > CANDIDATES) return truncate_many<C>(x, n, rank, top_k, top_p, top, e, turn);

  int* const listed = reinterpret_cast<int*>(&e.listed);
  if (threadIdx.x == 0) *listed = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += PROCESS_THREADS) {
    const float depth = top - x[i];
    if (floor == -INFINITY ? depth < INFINITY : depth <= floor) e.candidates[atomicAdd(listed, 1)] = token_key(x[i], begin + i);
  }
  row_barrier<C>();
  if (rank == 0) {
    int size = 32, at = 0;
    while (size < count) size *= 2;
#pragma unroll
    for (int b = 0; b < C; b++) {
      const int some = C > 1 ? __float_as_int(remote_load(&e.listed, b)) : *listed;
      for (int i = threadIdx.x; i < some; i += PROCESS_THREADS) e.sorted[at + i] = C > 1 ? remote_load(&e.candidates[i], b) : e.candidates[i];
      at += some;
    }
    for (int i = at + static_cast<int>(threadIdx.x); i < size; i += PROCESS_THREADS) e.sorted[i] = 0;
    __syncthreads();
    sort_candidates(e.sorted, size);
    if (threadIdx.x < 32) {
      const uint64_t cut = last_kept(e.sorted, size, count, top_k, top_p, top, total);
      if (threadIdx.x == 0) e.cut = cut;
    }
  }
  row_barrier<C>();
  const uint64_t cut = C > 1 ? remote_load(&e.cut, 0) : e.cut;
  for (int i = threadIdx.x; i < n; i += PROCESS_THREADS)
    if (token_key(x[i], begin + i) < cut) x[i] = -INFINITY;
}

// Penalties for tokens of the history, and a ban on those that would repeat an n-gram of it.
__device__ void penalize(float* x, int begin, int n, int vocab, const int32_t* history, const float* f, const int32_t* ints, int32_t* seen) {
  const int count = ints[HISTORY_COUNT], prompt = ints[PROMPT_COUNT], size = ints[NGRAM];
  const float repetition = f[REPETITION], presence = f[PRESENCE], frequency = f[FREQUENCY];
  constexpr int32_t SEEN = 1 << 30;  // beside the number of times that a token was generated
  if (repetition != 1 || presence != 0 || frequency != 0) {
    for (int i = threadIdx.x; i < n; i += PROCESS_THREADS) seen[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += PROCESS_THREADS) {
      const int id = history[i] - begin;
      if (id < 0 || id >= n) continue;
      if (i >= prompt) atomicAdd(seen + id, 1);
      atomicOr(seen + id, SEEN);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += PROCESS_THREADS) {
      const int32_t mark = __ldcg(seen + i), generated = mark & (SEEN - 1);
      if (!mark) continue;
      float v = x[i];
      if (repetition != 1) v = v < 0 ? v * repetition : v / repetition;
      if (generated) v -= presence + frequency * static_cast<float>(generated);
      x[i] = v;
    }
    __syncthreads();
  }
  if (size < 1 || count < size - 1) return;
  for (int i = threadIdx.x; i <= count - size; i += PROCESS_THREADS) {
    const int id = history[i + size - 1] - begin;
    if (id < 0 || id >= n) continue;
    bool same = true;
    for (int j = 0; j < size - 1 && same; j++) same = history[i + j] == history[count - size + 1 + j];
    if (same) x[id] = -INFINITY;
  }
  __syncthreads();
}

template <int C>
__device__ void process(const Process& p, float* shared) {
  __shared__ Exchange e;
  let_next_start();
  const int rows = p.rows.get(), r = blockIdx.x / C, rank = blockIdx.x % C, vocab = p.vocab;
  await_inputs();
  if (r >= rows) return;
  const int begin = min(vocab, rank * p.stretch), n = min(vocab - begin, p.stretch);
  const float* f = p.floats + r * FLOATS;
  const int32_t* ints = p.ints + r * INTS;
  const int64_t at = static_cast<int64_t>(r) * vocab + begin;
  const bool random = f[TEMPERATURE] > 0;
  const bool changes = random || ints[HISTORY_COUNT] > 0 || ints[BIAS_COUNT] > 0;
  float* y = p.y + at;
  float* x = C > 1 && changes ? shared : y;  // a row that nothing changes is copied

  const uint32_t* allowed = nullptr;
  if (ints[MASK] >= 0) {
    if (ints[MASK] < p.mask_rows.get()) allowed = p.masks + static_cast<int64_t>(ints[MASK]) * ((vocab + 31) / 32) + begin / 32;
    else report(p.faults, Fault::ROW_INDEX, ints[MASK], p.mask_rows.get());
  }
  const float* in = p.logits + at;
  if (vocab % 4 == 0 && (reinterpret_cast<uintptr_t>(p.logits) | reinterpret_cast<uintptr_t>(p.y)) % 16 == 0) {
#pragma unroll 4
    for (int i = threadIdx.x * 4; i < n; i += PROCESS_THREADS * 4) {
      float4 v = *reinterpret_cast<const float4*>(in + i);
      if (allowed) {
        const uint32_t bits = allowed[i / 32] >> i % 32;
        v = make_float4(bits & 1 ? v.x : -INFINITY, bits & 2 ? v.y : -INFINITY, bits & 4 ? v.z : -INFINITY, bits & 8 ? v.w : -INFINITY);
      }
      *reinterpret_cast<float4*>(x + i) = v;
    }
  } else {
    for (int i = threadIdx.x; i < n; i += PROCESS_THREADS) x[i] = !allowed || allowed[i / 32] >> i % 32 & 1 ? in[i] : -INFINITY;
  }
  if (!changes) return;
  __syncthreads();
  for (int i = threadIdx.x; i < ints[BIAS_COUNT]; i += PROCESS_THREADS) {
    const int id = p.bias_ids[ints[BIAS_START] + i] - begin;
    if (id >= 0 && id < n) x[id] += p.bias_values[ints[BIAS_START] + i];
  }
  __syncthreads();
  penalize(x, begin, n, vocab, p.history + ints[HISTORY_START], f, ints, p.seen + at);
  if (random) {
    float top[1] = {-INFINITY};
    const float temperature = f[TEMPERATURE];
    for (int i = threadIdx.x; i < n; i += PROCESS_THREADS) top[0] = fmaxf(top[0], x[i] = x[i] / temperature);
    const int top_k = ints[TOP_K] > 0 && ints[TOP_K] < vocab ? ints[TOP_K] : 0;
    const float top_p = f[TOP_P], min_p = f[MIN_P];
    if (top_k || top_p < 1 || min_p > 0) {
      int turn = 0;
      reduce_row<C, 1, true>(top, e, turn);
      const float most = top[0];
      if (most > -INFINITY) {
        if (top_k || top_p < 1) truncate<C>(x, begin, n, rank, top_k, top_p, most, e, turn);
        for (int i = threadIdx.x; min_p > 0 && i < n; i += PROCESS_THREADS)
          if (expf(x[i] - most) < min_p) x[i] = -INFINITY;
      }
      row_barrier<C>();  // no block may end while another reads its shared memory
    }
  }
  if (C == 1) return;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += PROCESS_THREADS) y[i] = x[i];
}

__global__ void MIXTAPE_CLUSTER __launch_bounds__(PROCESS_THREADS) process_cluster(Process p) {
  extern __shared__ __align__(16) float stretch_of_row[];
  process<CLUSTER>(p, stretch_of_row);
}

__global__ void __launch_bounds__(PROCESS_THREADS) process_row(Process p) { process<1>(p, nullptr); }

void process_logits(const Operands& o, Launch& launch) {
  const Tensor &logits = o.in(0), &y = o.out(0);
  const int vocab = logits.most[1], stretch = ceil_div(ceil_div(vocab, CLUSTER), 32) * 32, most = std::max(1, logits.most[0]);
  const size_t bytes = static_cast<size_t>(stretch) * sizeof(float);
  const bool clusters = launch.architecture >= 90 && bytes <= 200 << 10;
  const Process p{logits.as<float>(),       o.in(1).as<float>(), o.in(2).as<int32_t>(), o.in(3).as<int32_t>(), o.in(4).as<int32_t>(), o.in(5).as<float>(), o.in(6).as<uint32_t>(), y.as<float>(),
                  o.out(1).as<int32_t>(), logits.rows(),       o.in(6).rows(),        vocab,                 clusters ? stretch : vocab, launch.faults};
  if (clusters) launch(process_cluster, dim3(most * CLUSTER), dim3(PROCESS_THREADS), bytes, p);
  else launch(process_row, dim3(most), dim3(PROCESS_THREADS), 0, p);
}

}  // namespace
}  // namespace cuda
