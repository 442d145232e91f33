// The mixture of experts without its products: the router, grouping of slots by expert, and the weighted sum of experts' outputs.
#include "router.cuh"

namespace cuda {
namespace {

// ---- Slots by expert

// A block finds one expert's slots: it counts slots of lower experts, and its own in each warp's stretch; then it writes its own in order. A lane reads
// four slots at a time and remembers which are the expert's, so that a warp reads its stretch once; hence at most MARKED slots a lane.
constexpr int MARKED = 64;

template <int THREADS>
__global__ void __launch_bounds__(THREADS) group_kernel(const int32_t* experts, int32_t* order, int32_t* offsets, Count slots, int count, FaultRecord* faults) {
  __shared__ int32_t lower_in[32], own_in[32];
  let_next_start();
  const int n = static_cast<int>(slots.get()), expert = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  await_inputs();
  constexpr int WARPS = THREADS / 32;
  const int turns = (n + WARPS * 128 - 1) / (WARPS * 128), begin = warp * turns * 128;
  int lower = 0;
  uint64_t own = 0;  // a bit per slot
#pragma unroll 4
  for (int t = 0; t < turns; t++) {
    const int i = begin + t * 128 + lane * 4;
    int e[4] = {INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX};
    if (i + 4 <= n) *reinterpret_cast<int4*>(e) = *reinterpret_cast<const int4*>(experts + i);
    else
      for (int j = 0; i + j < n; j++) e[j] = experts[i + j];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      lower += e[j] < expert;
      own |= static_cast<uint64_t>(e[j] == expert) << (t * 4 + j);
      if (expert == 0 && (e[j] < 0 || (e[j] >= count && i + j < n))) report(faults, Fault::EXPERT, e[j], count);
    }
  }
  lower = __reduce_add_sync(~0u, lower);
  const int found = __reduce_add_sync(~0u, __popcll(own));
  if (lane == 0) lower_in[warp] = lower, own_in[warp] = found;
  __syncthreads();
  const int lowers = lane < WARPS ? lower_in[lane] : 0, owns = lane < WARPS ? own_in[lane] : 0;
  const int first = __reduce_add_sync(~0u, lowers), all = __reduce_add_sync(~0u, owns);
  int at = first + __reduce_add_sync(~0u, lane < warp ? owns : 0);
  if (threadIdx.x == 0) {
    offsets[expert] = first;
    if (expert == count - 1) offsets[count] = first + all;
  }
  for (int t = 0; t < turns; t++) {
    const uint32_t mine = static_cast<uint32_t>(own >> (t * 4)) & 15;
    if (!__any_sync(~0u, mine)) continue;
    int before = 0;  // of lower lanes
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32_t who = __ballot_sync(~0u, mine >> j & 1);
      before += __popc(who & ((1u << lane) - 1));
    }
    int total = before + __popc(mine), to = at + before;
    for (int j = 0; j < 4; j++)
      if (mine >> j & 1) order[to++] = begin + t * 128 + lane * 4 + j;
    at += __shfl_sync(~0u, total, 31);
  }
}

// Many keys (an adapter and an expert each): each warp counts the keys of a chunk of slots, then the counts become places, then each warp places its chunk.
constexpr int CHUNK = 256;

__global__ void __launch_bounds__(128) count_kernel(const int32_t* keys, int32_t* counts, Count slots, int count, FaultRecord* faults) {
  let_next_start();
  const int n = static_cast<int>(slots.get()), chunk = blockIdx.x, begin = chunk * CHUNK, end = min(n, begin + CHUNK);
  await_inputs();
  if (begin >= n) return;
  int32_t* own = counts + static_cast<int64_t>(chunk) * count;
  for (int e = threadIdx.x; e < count; e += 128) own[e] = 0;
  __syncthreads();
  for (int i = begin + threadIdx.x; i < end; i += 128) {
    const int e = keys[i];
    if (e < 0 || e >= count) report(faults, Fault::EXPERT, e, count);
    else atomicAdd(own + e, 1);
  }
}

__global__ void __launch_bounds__(1024) places_kernel(int32_t* counts, int32_t* offsets, Count slots, int count) {
  __shared__ int32_t sums[32];
  let_next_start();
  const int n = static_cast<int>(slots.get()), chunks = (n + CHUNK - 1) / CHUNK, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  await_inputs();
  int base = 0;
  for (int e0 = 0; e0 < count; e0 += 1024) {
    const int e = e0 + threadIdx.x;
    int own = 0;
    if (e < count)
      for (int c = 0; c < chunks; c++) own += counts[static_cast<int64_t>(c) * count + e];
    int before = own;  // becomes the inclusive sum over the warp
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, before, d);
      if (lane >= d) before += other;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    int at = base + before - own + __reduce_add_sync(~0u, lane < warp ? sums[lane] : 0);
    base += __reduce_add_sync(~0u, sums[lane]);
    if (e >= count) continue;
    offsets[e] = at;
    for (int c = 0; c < chunks; c++) {
      int32_t& place = counts[static_cast<int64_t>(c) * count + e];
      const int of_chunk = place;
      place = at;
      at += of_chunk;
    }
  }
  if (threadIdx.x == 0) offsets[count] = base;
}

__global__ void __launch_bounds__(32) place_kernel(const int32_t* keys, int32_t* counts, int32_t* order, Count slots, int count) {
  let_next_start();
  const int n = static_cast<int>(slots.get()), chunk = blockIdx.x, begin = chunk * CHUNK, end = min(n, begin + CHUNK), lane = threadIdx.x;
  await_inputs();
  int32_t* places = counts + static_cast<int64_t>(chunk) * count;
  for (int i = begin; i < end; i += 32) {
    const int e = i + lane < end ? keys[i + lane] : -1;
    const uint32_t same = __match_any_sync(~0u, e), before = same & ((1u << lane) - 1);
    const bool valid = e >= 0 && e < count;
    const int place = valid ? places[e] : 0;
    __syncwarp();
    if (valid) {
      order[place + __popc(before)] = i + lane;
      if (!before) places[e] = place + __popc(same);
    }
    __syncwarp();
  }
}

void group(const Operands& o, Launch& launch) {
  const Tensor &experts = o.in(0), &order = o.out(0), &offsets = o.out(1);
  const int count = static_cast<int>(o.params[0]);
  const int64_t most = std::max<int64_t>(1, order.most[0]);
  const Count slots = elements(experts);
  const int32_t* keys = experts.as<int32_t>();
  if (most <= 1024 * MARKED && most * count <= 128 * 65536) {
    auto run = [&](auto kernel, int threads) { launch(kernel, dim3(count), dim3(threads), 0, keys, order.as<int32_t>(), offsets.as<int32_t>(), slots, count, launch.faults); };
    if (most <= 128 * 16) run(group_kernel<128>, 128);
    else if (most <= 256 * 32) run(group_kernel<256>, 256);
    else run(group_kernel<1024>, 1024);
    return;
  }
  const int chunks = ceil_div(most, CHUNK);
  auto* counts = static_cast<int32_t*>(launch.scratch(static_cast<size_t>(chunks) * static_cast<size_t>(count) * sizeof(int32_t)));
  launch(count_kernel, dim3(chunks), dim3(128), 0, keys, counts, slots, count, launch.faults);
  launch(places_kernel, dim3(1), dim3(1024), 0, counts, offsets.as<int32_t>(), slots, count);
  launch(place_kernel, dim3(chunks), dim3(32), 0, keys, counts, order.as<int32_t>(), slots, count);
}

// The expert slots of rows with an adapter, and each slot's (adapter, expert) as one number.
__global__ void __launch_bounds__(256) adapted_kernel(const int32_t* experts, const int32_t* rows, const int32_t* ids, int32_t* keys, int32_t* slots, Size most, Size adapted, int k, int count,
                                                      FaultRecord* faults) {
  let_next_start();
  const int n = adapted.get() * k, limit = most.get();
  await_inputs();
  for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) {
    const int r = rows[i / k], j = i % k;
    if (r < 0 || r >= limit) {
      report(faults, Fault::ROW_INDEX, r, limit);
      keys[i] = slots[i] = 0;
      continue;
    }
    keys[i] = ids[i / k] * count + experts[r * k + j];
    slots[i] = r * k + j;
  }
}

void adapted_slots(const Operands& o, Launch& launch) {
  const Tensor &experts = o.in(0), &rows = o.in(1), &keys = o.out(0);
  const int k = experts.most[1], grid = std::min(std::max(1, ceil_div(static_cast<int64_t>(keys.most[0]) * k, 256)), 4 * launch.multiprocessors);
  launch(adapted_kernel, dim3(grid), dim3(256), 0, experts.as<int32_t>(), rows.as<int32_t>(), o.in(2).as<int32_t>(), keys.as<int32_t>(), o.out(1).as<int32_t>(), experts.rows(), rows.rows(), k,
         static_cast<int>(o.params[0]), launch.faults);
}

// ---- The weighted sum of a row's slots

// Numbers known to be bfloat16: the loads of several can be in flight at once.
struct Bf16 {
  void* data;
};

template <int V>
__device__ __forceinline__ Vec<V> load(const Bf16& x, int64_t i) {
  return load<V>(Numbers{x.data, BF16}, i);
}

// Then shared is added, then residual, where there are any.
template <class S>
struct Combined {
  S slots;
  Numbers shared, residual;
  const float* weights;
  uint32_t n;
  int32_t k;
  // AT_ONCE slots at a time, all loaded before the first is used; past the end, the last one again.
  template <int AT_ONCE, int V>
  __device__ __forceinline__ void add(Vec<V>& total, const float* w, int64_t from) const {
    for (int j0 = 0; j0 < k; j0 += AT_ONCE) {
      Vec<V> x[AT_ONCE];
      float by[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const int slot = min(j0 + j, k - 1);
        by[j] = w[slot];
        x[j] = load<V>(slots, from + static_cast<int64_t>(slot) * n);
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        if (j0 + j >= k) continue;
#pragma unroll
        for (int v = 0; v < V; v++) total.at[v] += by[j] * x[j].at[v];
      }
    }
  }
  template <int V>
  __device__ Vec<V> at(int r, int c) const {
    const float* w = weights + static_cast<int64_t>(r) * k;
    const int64_t from = static_cast<int64_t>(r) * k * n + c, i = static_cast<int64_t>(r) * n + c;
    Vec<V> total{}, added{}, old{};
    if (shared.data) added = load<V>(shared, i);
    if (residual.data) old = load<V>(residual, i);
    if (k == 6) add<6>(total, w, from);
    else if (k == 8) add<8>(total, w, from);
    else add<4>(total, w, from);
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (shared.data) total.at[v] += added.at[v];
      if (residual.data) total.at[v] += old.at[v];
    }
    return total;
  }
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord*) const {
    const uint32_t r = static_cast<uint32_t>(i / V) / (n / V);
    return at<V>(static_cast<int>(r), static_cast<int>(i - static_cast<int64_t>(r) * n));
  }
};

// Calls f with the sum, and whether it can give four numbers at once.
template <class F>
void with_combined(const Operands& o, bool added, F f) {
  const Numbers slots = floats(o.in(0)), shared = added ? floats(o.in(2)) : Numbers{nullptr, F32}, residual = added ? floats(o.in(3)) : Numbers{nullptr, F32};
  const float* weights = o.in(1).as<float>();
  const int32_t n = o.in(0).most[1], k = o.in(1).most[1];
  const bool vectors = n % 4 == 0 && aligned(slots, shared, residual);
  if (slots.dtype == BF16) f(Combined<Bf16>{{slots.data}, shared, residual, weights, static_cast<uint32_t>(n), k}, vectors);
  else f(Combined<Numbers>{slots, shared, residual, weights, static_cast<uint32_t>(n), k}, vectors);
}

template <bool ADDED>
void combine(const Operands& o, Launch& launch) {
  with_combined(o, ADDED, [&](const auto& f, bool vectors) { map(f, o.out(0), vectors, launch); });
}

// combineAddNorm(slots, weights, shared, residual, weight; eps) -> sum, normed
void combine_add_norm(const Operands& o, Launch& launch) {
  with_combined(o, true, [&](const auto& f, bool vectors) { norm(f, o.in(4), &o.out(0), o.out(1), static_cast<float>(o.params[0]), vectors, launch); });
}

}  // namespace

extern const Entry EXPERTS[] = {
    {"route", route},       {"group", group},         {"adaptedSlots", adapted_slots}, {"addRmsNormRoute", add_rms_norm_route},
    {"combine", combine<false>}, {"combineAdd", combine<true>}, {"combineAddNorm", combine_add_norm}, {nullptr, nullptr},
};

}  // namespace cuda
