// Sampling, and the likeliest alternatives. The random numbers and the order in which probabilities add up are the CPU's, so that equal logits and
// seeds give equal tokens.
#include "processors.cuh"

namespace cuda {
namespace {

// Ids in place of a token: NONE_LEFT and NOT_FINITE of src/graph/ops/sampling.ts.
constexpr int32_t NONE_LEFT = -1, NOT_FINITE = -2;

// ---- Pieces of rows

// Rows are read in pieces, one a warp, by as many blocks as fill the device; a row's last block to finish merges them. The number of pieces does not
// depend on the number of rows, nor do results.
constexpr int PIECES = 256, MERGE_THREADS = 256;

__device__ __forceinline__ uint64_t warp_best(uint64_t key) {
#pragma unroll
  for (int d = 16; d; d /= 2) key = max(key, __shfl_xor_sync(~0u, key, d));
  return key;
}

struct alignas(16) Piece {
  float raw_top, raw_sum;  // of the logits: the maximum, and the sum of e^(x - top)
  float top, sum;          // of the processed ones; the sum only if it is asked for
  float raw_best;          // the logit of the best token
  int32_t best;            // the best one after processing
  int32_t finite, unused;
};

__device__ __forceinline__ float warp_top(float x) { return of_key(__reduce_max_sync(~0u, key_of(x))); }

// Adds numbers with the maximum `top` over the warp to a lane's sum of e^(x - all).
template <int N>
__device__ __forceinline__ void add_exponentials(const float (&v)[N], float top, float& all, float& sum) {
  top = fmaxf(top, all);
  if (top == -INFINITY) return;
  float some = 0;
#pragma unroll
  for (int i = 0; i < N; i++) some += __expf(v[i] - top);
  sum = sum * __expf(all - top) + some;
  all = top;
}

// By a warp, for all lanes; V numbers at a time. With SAME, the processed logits are the logits.
template <int V, bool SAME>
__device__ Piece read_piece(const float* raw, const float* processed, int begin, int end, bool sums) {
  constexpr int HELD = 16 / V;
  const int lane = threadIdx.x % 32;
  Piece piece{-INFINITY, 0, -INFINITY, 0, 0, INT32_MAX, 1, 0};
  float best = -INFINITY;
  for (int i0 = begin; i0 < end; i0 += 512) {
    float v[16], u[16];
#pragma unroll
    for (int h = 0; h < HELD; h++) {
      const int i = i0 + (h * 32 + lane) * V;
      Vec<V> a, b;
#pragma unroll
      for (int j = 0; j < V; j++) a.at[j] = b.at[j] = -INFINITY;
      if (i < end) {
        a = load<V>({const_cast<float*>(raw), F32}, i);
        if constexpr (!SAME) b = load<V>({const_cast<float*>(processed), F32}, i);
      }
#pragma unroll
      for (int j = 0; j < V; j++) v[h * V + j] = a.at[j], u[h * V + j] = SAME ? a.at[j] : b.at[j];
    }
    float raw_top = -INFINITY, top = -INFINITY;
#pragma unroll
    for (int h = 0; h < HELD; h++)
#pragma unroll
      for (int j = 0; j < V; j++) {
        const int i = i0 + (h * 32 + lane) * V + j, at = h * V + j;
        raw_top = fmaxf(raw_top, v[at]), top = fmaxf(top, u[at]);
        if (i >= end) continue;
        if (!isfinite(v[at])) piece.finite = 0;
        if (u[at] > best) best = u[at], piece.best = i, piece.raw_best = v[at];
      }
    add_exponentials(v, warp_top(raw_top), piece.raw_top, piece.raw_sum);
    if (sums) add_exponentials(u, warp_top(top), piece.top, piece.sum);
    else piece.top = fmaxf(piece.top, top);
  }
  piece.raw_sum = warp_sum(piece.raw_sum);
  piece.sum = warp_sum(piece.sum);
  piece.finite = __all_sync(~0u, piece.finite);
  piece.top = warp_top(piece.top);
  // The lowest id of those with the maximum.
  const int own = piece.best < end && best == piece.top ? piece.best : INT32_MAX;
  const int32_t id = __reduce_min_sync(~0u, own);
  const uint32_t who = __ballot_sync(~0u, own == id);
  piece.raw_best = __shfl_sync(~0u, piece.raw_best, __ffs(static_cast<int>(who)) - 1);
  piece.best = id;
  return piece;
}

// Whether this block is the last one of its row; then what the others wrote before can be read.
__device__ __forceinline__ bool last_of_row(int32_t* arrived) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1) == static_cast<int>(gridDim.x) - 1;
    if (last) *arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

int blocks_a_row(int rows, Launch& launch) {
  int blocks = PIECES / (MERGE_THREADS / 32);
  while (blocks > 1 && static_cast<int64_t>(blocks) * rows > 8 * launch.multiprocessors) blocks /= 2;
  return blocks;
}

int piece_length(int vocab) { return ceil_div(ceil_div(vocab, PIECES), 4) * 4; }

// ---- Sampling

// A number in [0, 1) from a seed and a step (splitmix64).
__device__ double random_number(uint64_t seed, uint64_t step) {
  uint64_t z = seed + (step + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

struct Sample {
  const float *logits, *processed, *floats;
  const int32_t* ints;
  int32_t* ids;
  float* logprobs;
  Piece* pieces;  // [rows, PIECES]
  int32_t* arrived;
  Size rows;
  int32_t vocab, length;
};

__device__ __forceinline__ double warp_sum_before(double x, double& upto) {
  upto = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const double other = __shfl_up_sync(~0u, upto, d);
    if (threadIdx.x % 32 >= d) upto += other;
  }
  return upto - x;
}

// Within a piece, the token at which the sum of e^(x - top) passes `left`; by a warp, whose lanes have consecutive stretches.
__device__ int draw(const float* x, int begin, int end, float top, double left) {
  const int lane = threadIdx.x % 32, each = (end - begin + 31) / 32, from = min(end, begin + lane * each), to = min(end, from + each);
  double own = 0;
  int last = -1;
  for (int i = from; i < to; i++)
    if (x[i] > -INFINITY) own += static_cast<double>(expf(x[i] - top)), last = i;
  double upto;
  const double before = warp_sum_before(own, upto);
  const uint32_t passed = __ballot_sync(~0u, last >= 0 && upto > left), any = __ballot_sync(~0u, last >= 0);
  if (!any) return begin;
  const int owner = passed ? __ffs(static_cast<int>(passed)) - 1 : 31 - __clz(static_cast<int>(any));
  int id = last;
  if (lane == owner) {
    double rest = left - before;
    for (int i = from; i < to; i++) {
      if (!(x[i] > -INFINITY)) continue;
      rest -= static_cast<double>(expf(x[i] - top));
      if (rest < 0) {
        id = i;
        break;
      }
    }
  }
  return __shfl_sync(~0u, id, owner);
}

template <int V>
__global__ void __launch_bounds__(MERGE_THREADS) sample_kernel(Sample p) {
  constexpr int WARPS = MERGE_THREADS / 32;
  __shared__ float raw_tops[WARPS], tops[WARPS], raw_sums[WARPS];
  __shared__ int32_t bests[WARPS], finites[WARPS], chosen;
  __shared__ double sums[WARPS], left_in;
  let_next_start();
  const int rows = p.rows.get(), r = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, tid = threadIdx.x;
  await_inputs();
  if (r >= rows) return;
  const float *raw = p.logits + static_cast<int64_t>(r) * p.vocab, *x = p.processed + static_cast<int64_t>(r) * p.vocab;
  const int32_t* n = p.ints + r * INTS;
  const bool random = p.floats[r * FLOATS + TEMPERATURE] > 0;
  auto begin_of = [&](int piece) { return min(p.vocab, piece * p.length); };
  Piece* pieces = p.pieces + r * PIECES;
  for (int i = blockIdx.x * WARPS + warp; i < PIECES; i += gridDim.x * WARPS) {
    const Piece piece = read_piece<V, false>(raw, x, begin_of(i), begin_of(i + 1), random);
    if (lane == 0) pieces[i] = piece;
  }
  if (!last_of_row(p.arrived + r)) return;

  const Piece own = pieces[tid];
  float raw_top = warp_top(own.raw_top), top = warp_top(own.top);
  if (lane == 0) raw_tops[warp] = raw_top, tops[warp] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) raw_top = fmaxf(raw_top, raw_tops[i]), top = fmaxf(top, tops[i]);
  const float raw_sum = warp_sum(own.raw_top == -INFINITY ? 0.f : own.raw_sum * expf(own.raw_top - raw_top));
  const int32_t best = __reduce_min_sync(~0u, own.top == top ? own.best : INT32_MAX);
  const int32_t finite = __all_sync(~0u, own.finite);
  // In float64, the sum over the pieces up to each.
  const double mass = random && own.top > -INFINITY ? static_cast<double>(own.sum) * static_cast<double>(expf(own.top - top)) : 0.;
  double upto = 0;
  if (random) warp_sum_before(mass, upto);
  if (lane == 31) raw_sums[warp] = raw_sum, bests[warp] = best, finites[warp] = finite, sums[warp] = upto;
  if (tid == 0) chosen = PIECES;
  __syncthreads();
  float raw_total = 0;
  double total = 0;
  int32_t id = INT32_MAX;
  bool good = true;
#pragma unroll
  for (int i = 0; i < WARPS; i++) {
    raw_total += raw_sums[i];
    id = min(id, bests[i]);
    good = good && finites[i];
    if (i < warp) upto += sums[i];
    total += sums[i];
  }
  if (!good || top == -INFINITY) {
    if (tid == 0) p.ids[r] = good ? NONE_LEFT : NOT_FINITE, p.logprobs[r] = -INFINITY;
    return;
  }
  if (!random) {
    if (own.best == id) p.ids[r] = id, p.logprobs[r] = own.raw_best - raw_top - logf(raw_total);
    return;
  }
  // The piece in which the sum passes the random share of the total, then the token within it.
  const double left = total * random_number(static_cast<uint64_t>(static_cast<uint32_t>(n[SEED_HIGH])) << 32 | static_cast<uint32_t>(n[SEED_LOW]), static_cast<uint64_t>(n[STEP]));
  if (mass > 0 && upto > left) atomicMin(&chosen, tid);
  __syncthreads();
  if (chosen == PIECES) {  // past the end because of rounding: the last piece that has anything
    __syncthreads();
    if (tid == 0) chosen = 0;
    __syncthreads();
    if (mass > 0) atomicMax(&chosen, tid);
    __syncthreads();
  }
  if (tid == chosen) left_in = left - (upto - mass);
  __syncthreads();
  if (warp) return;
  id = draw(x, begin_of(chosen), begin_of(chosen + 1), top, left_in);
  if (tid == 0) p.ids[r] = id, p.logprobs[r] = raw[id] - raw_top - logf(raw_total);
}

void sample(const Operands& o, Launch& launch) {
  const Tensor &logits = o.in(0), &processed = o.in(1);
  const int vocab = logits.most[1], most = std::max(1, logits.most[0]);
  const Sample p{logits.as<float>(),       processed.as<float>(), o.in(2).as<float>(),
                 o.in(3).as<int32_t>(),    o.out(0).as<int32_t>(), o.out(1).as<float>(),
                 static_cast<Piece*>(launch.scratch(static_cast<size_t>(most) * PIECES * sizeof(Piece))), launch.counters(most), logits.rows(), vocab, piece_length(vocab)};
  const dim3 grid(blocks_a_row(most, launch), most);
  if (vocab % 4 == 0 && aligned(numbers(logits), numbers(processed))) launch(sample_kernel<4>, grid, dim3(MERGE_THREADS), 0, p);
  else launch(sample_kernel<1>, grid, dim3(MERGE_THREADS), 0, p);
}

// ---- The likeliest tokens

struct Top {
  const float* logits;
  int32_t* ids;  // null if nobody wants them
  float* logprobs;
  Piece* pieces;
  int32_t* arrived;
  Size rows, count;
  int32_t vocab, length;
  FaultRecord* faults;
};

// Each piece's best token competes; the winner's piece then enters its next one.
template <int V>
__global__ void __launch_bounds__(MERGE_THREADS) top_kernel(Top p) {
  constexpr int WARPS = MERGE_THREADS / 32;
  __shared__ float tops[WARPS], sums[WARPS];
  __shared__ uint64_t keys[2][WARPS];
  let_next_start();
  const int rows = p.rows.get(), count = p.count.get(), r = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, tid = threadIdx.x;
  await_inputs();
  if (r >= rows) return;
  if (count > p.vocab) return report(p.faults, Fault::ROW_INDEX, count, p.vocab);
  const float* x = p.logits + static_cast<int64_t>(r) * p.vocab;
  auto begin_of = [&](int piece) { return min(p.vocab, piece * p.length); };
  Piece* pieces = p.pieces + r * PIECES;
  for (int i = blockIdx.x * (MERGE_THREADS / 32) + warp; i < PIECES; i += gridDim.x * (MERGE_THREADS / 32)) {
    const Piece piece = read_piece<V, true>(x, x, begin_of(i), begin_of(i + 1), false);
    if (lane == 0) pieces[i] = piece;
  }
  if (!last_of_row(p.arrived + r)) return;
  const Piece own = pieces[tid];  // of the piece tid
  float top = warp_top(own.top);
  if (lane == 0) tops[warp] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) top = fmaxf(top, tops[i]);
  const float sum = warp_sum(own.top == -INFINITY ? 0.f : own.raw_sum * expf(own.top - top));
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) total += sums[i];
  const float norm = top + logf(total);
  uint64_t key = own.best == INT32_MAX ? 0 : token_key(own.top, own.best);
  for (int j = 0; j < count; j++) {
    uint64_t best = warp_best(key);
    if (lane == 0) keys[j % 2][warp] = best;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) best = max(best, keys[j % 2][i]);
    const int id = max(0, token_of(best)), piece = id / p.length;  // of NaN alone, none is best
    if (tid == 0) {
      if (p.ids) p.ids[static_cast<int64_t>(r) * count + j] = id;
      if (p.logprobs) p.logprobs[static_cast<int64_t>(r) * count + j] = x[id] - norm;
    }
    if (warp != piece / 32 || j + 1 == count) continue;
    uint64_t next = 0;
    for (int i = begin_of(piece) + lane; i < begin_of(piece + 1); i += 32) {
      const uint64_t other = token_key(x[i], i);
      if (other < best) next = max(next, other);
    }
    next = warp_best(next);
    if (lane == piece % 32) key = next;
  }
}

void top_logprobs(const Operands& o, Launch& launch) {
  const Tensor &logits = o.in(0), &ids = o.out(0);
  const int vocab = logits.most[1], most = std::max(1, logits.most[0]);
  const Top p{logits.as<float>(), ids.as<int32_t>(), o.out(1).as<float>(), static_cast<Piece*>(launch.scratch(static_cast<size_t>(most) * PIECES * sizeof(Piece))), launch.counters(most), logits.rows(),
              ids.dims[1],        vocab,             piece_length(vocab),  launch.faults};
  const dim3 grid(blocks_a_row(most, launch), most);
  if (vocab % 4 == 0 && aligned(numbers(logits))) launch(top_kernel<4>, grid, dim3(MERGE_THREADS), 0, p);
  else launch(top_kernel<1>, grid, dim3(MERGE_THREADS), 0, p);
}

}  // namespace

extern const Entry SAMPLING[] = {{"processLogits", process_logits}, {"sample", sample}, {"topLogprobs", top_logprobs}, {nullptr, nullptr}};

}  // namespace cuda
