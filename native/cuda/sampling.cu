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

__device__ __forceinline__ uint64_t token_key(float x, int32_t id) { return static_cast<uint64_t>(key_of(x)) << 32 | (0xffffffffu - static_cast<uint32_t>(id)); }
__device__ __forceinline__ int32_t token_of(uint64_t key) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)); }
// A token ranks before another by larger number, ties by lower id.
__device__ __forceinline__ uint64_t warp_best(uint64_t key) {
#pragma unroll
  for (int d = 16; d; d /= 2) key = max(key, __shfl_xor_sync(~0u, key, d));
  return key;
}

struct Piece {
  float top, sum;  // the maximum and the sum of e^(x - top)
  uint64_t best;
  bool finite;
};

// For all lanes of a warp. V numbers at a time.
template <int V>
__device__ Piece read_piece(const float* x, int begin, int end) {
  constexpr int HELD = 16 / V;
  const int lane = threadIdx.x % 32;
  Piece piece{-INFINITY, 0, 0, true};
  for (int i0 = begin; i0 < end; i0 += 512) {
    Vec<V> v[HELD];
    float top = -INFINITY;
#pragma unroll
    for (int h = 0; h < HELD; h++) {
      const int i = i0 + (h * 32 + lane) * V;
      if (i < end) v[h] = load<V>({const_cast<float*>(x), F32}, i);
#pragma unroll
      for (int j = 0; j < V; j++) {
        if (i >= end) v[h].at[j] = -INFINITY;
        else piece.best = max(piece.best, token_key(v[h].at[j], i + j)), piece.finite = piece.finite && isfinite(v[h].at[j]);
        top = fmaxf(top, v[h].at[j]);
      }
    }
#pragma unroll
    for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    top = fmaxf(top, piece.top);
    if (top == -INFINITY) continue;
    float sum = 0;
#pragma unroll
    for (int h = 0; h < HELD; h++)
#pragma unroll
      for (int j = 0; j < V; j++) sum += expf(v[h].at[j] - top);
    piece.sum = piece.sum * expf(piece.top - top) + sum;
    piece.top = top;
  }
  piece.sum = warp_sum(piece.sum);
  piece.best = warp_best(piece.best);
  piece.finite = __all_sync(~0u, piece.finite);
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

// Over MERGE_THREADS, for every thread. `shared` has room for a number a warp.
template <class T, class F>
__device__ __forceinline__ T merge_block(T x, T* shared, F merge) {
#pragma unroll
  for (int d = 16; d; d /= 2) x = merge(x, __shfl_xor_sync(~0u, x, d));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll
  for (int i = 1; i < MERGE_THREADS / 32; i++) x = merge(x, shared[i]);
  return x;
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
  Piece *raw, *pieces;  // [rows, PIECES]
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
  __shared__ float numbers[4][MERGE_THREADS / 32];
  __shared__ uint64_t keys[MERGE_THREADS / 32];
  __shared__ double sums[MERGE_THREADS / 32], left_in;
  __shared__ int chosen;
  let_next_start();
  const int rows = p.rows.get(), r = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, tid = threadIdx.x;
  await_inputs();
  if (r >= rows) return;
  const float *raw = p.logits + static_cast<int64_t>(r) * p.vocab, *x = p.processed + static_cast<int64_t>(r) * p.vocab;
  auto begin_of = [&](int piece) { return min(p.vocab, piece * p.length); };
  Piece *raw_pieces = p.raw + r * PIECES, *pieces = p.pieces + r * PIECES;
  for (int i = blockIdx.x * (MERGE_THREADS / 32) + warp; i < PIECES; i += gridDim.x * (MERGE_THREADS / 32)) {
    const Piece a = read_piece<V>(raw, begin_of(i), begin_of(i + 1)), b = read_piece<V>(x, begin_of(i), begin_of(i + 1));
    if (lane == 0) raw_pieces[i] = a, pieces[i] = b;
  }
  if (!last_of_row(p.arrived + r)) return;

  const Piece a = raw_pieces[tid], b = pieces[tid];
  auto larger = [](float u, float v) { return fmaxf(u, v); };
  auto plus = [](float u, float v) { return u + v; };
  const float raw_top = merge_block(a.top, numbers[0], larger), top = merge_block(b.top, numbers[1], larger);
  const bool finite = __syncthreads_and(a.finite);
  const uint64_t best = merge_block(b.best, keys, [](uint64_t u, uint64_t v) { return max(u, v); });
  const float raw_sum = merge_block(a.top == -INFINITY ? 0.f : a.sum * expf(a.top - raw_top), numbers[2], plus);
  int id = token_of(best);
  if (!finite || top == -INFINITY) {
    if (tid == 0) p.ids[r] = finite ? NONE_LEFT : NOT_FINITE, p.logprobs[r] = -INFINITY;
    return;
  }
  const float* f = p.floats + r * FLOATS;
  const int32_t* n = p.ints + r * INTS;
  if (f[TEMPERATURE] > 0) {
    // The piece in which the sum passes the random share of the total, then the token within it.
    const double own = b.top == -INFINITY ? 0. : static_cast<double>(b.sum) * static_cast<double>(expf(b.top - top));
    double upto;
    warp_sum_before(own, upto);
    if (lane == 31) sums[warp] = upto;
    if (tid == 0) chosen = PIECES;
    __syncthreads();
    double total = 0;
    for (int i = 0; i < MERGE_THREADS / 32; i++) {
      if (i < warp) upto += sums[i];
      total += sums[i];
    }
    const double left = total * random_number(static_cast<uint64_t>(static_cast<uint32_t>(n[SEED_HIGH])) << 32 | static_cast<uint32_t>(n[SEED_LOW]), static_cast<uint64_t>(n[STEP]));
    if (own > 0 && upto > left) atomicMin(&chosen, tid);
    __syncthreads();
    if (chosen == PIECES) {  // past the end because of rounding: the last piece that has anything
      __syncthreads();
      if (tid == 0) chosen = 0;
      __syncthreads();
      if (own > 0) atomicMax(&chosen, tid);
      __syncthreads();
    }
    if (tid == chosen) left_in = left - (upto - own);
    __syncthreads();
    if (warp) return;
    id = draw(x, begin_of(chosen), begin_of(chosen + 1), top, left_in);
  }
  if (tid == 0) p.ids[r] = id, p.logprobs[r] = raw[id] - raw_top - logf(raw_sum);
}

void sample(const Operands& o, Launch& launch) {
  const Tensor &logits = o.in(0), &processed = o.in(1);
  const int vocab = logits.most[1], most = std::max(1, logits.most[0]);
  Sample p{logits.as<float>(), processed.as<float>(), o.in(2).as<float>(), o.in(3).as<int32_t>(), o.out(0).as<int32_t>(), o.out(1).as<float>(), nullptr, nullptr, launch.counters(most), logits.rows(), vocab,
           piece_length(vocab)};
  p.raw = static_cast<Piece*>(launch.scratch(static_cast<size_t>(most) * PIECES * 2 * sizeof(Piece)));
  p.pieces = p.raw + static_cast<int64_t>(most) * PIECES;
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
  __shared__ float numbers[2][MERGE_THREADS / 32];
  __shared__ uint64_t keys[2][MERGE_THREADS / 32];
  let_next_start();
  const int rows = p.rows.get(), count = p.count.get(), r = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, tid = threadIdx.x;
  await_inputs();
  if (r >= rows) return;
  if (count > p.vocab) return report(p.faults, Fault::ROW_INDEX, count, p.vocab);
  const float* x = p.logits + static_cast<int64_t>(r) * p.vocab;
  auto begin_of = [&](int piece) { return min(p.vocab, piece * p.length); };
  Piece* pieces = p.pieces + r * PIECES;
  for (int i = blockIdx.x * (MERGE_THREADS / 32) + warp; i < PIECES; i += gridDim.x * (MERGE_THREADS / 32)) {
    const Piece piece = read_piece<V>(x, begin_of(i), begin_of(i + 1));
    if (lane == 0) pieces[i] = piece;
  }
  if (!last_of_row(p.arrived + r)) return;
  const Piece own = pieces[tid];  // of the piece tid
  const float top = merge_block(own.top, numbers[0], [](float u, float v) { return fmaxf(u, v); });
  const float total = merge_block(own.top == -INFINITY ? 0.f : own.sum * expf(own.top - top), numbers[1], [](float u, float v) { return u + v; });
  const float norm = top + logf(total);
  uint64_t key = own.best;
  for (int j = 0; j < count; j++) {
    const uint64_t best = merge_block(key, keys[j % 2], [](uint64_t u, uint64_t v) { return max(u, v); });
    const int id = token_of(best), piece = id / p.length;
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
