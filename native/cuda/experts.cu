// The mixture of experts without its products: the router, grouping of slots by expert, and the weighted sum of experts' outputs.
#include "router.cuh"

namespace cuda {
namespace {

// ---- Slots by expert

// A block finds one expert's slots: it counts slots of lower experts, and its own in each warp's stretch; then it writes its own in order.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) group_kernel(const int32_t* experts, int32_t* order, int32_t* offsets, Count slots, int count, FaultRecord* faults) {
  __shared__ int32_t lower_in[32], own_in[32];
  let_next_start();
  const int n = static_cast<int>(slots.get()), expert = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  await_inputs();
  constexpr int WARPS = THREADS / 32;
  const int stretch = (n + WARPS * 32 - 1) / (WARPS * 32) * 32, begin = min(n, warp * stretch), end = min(n, begin + stretch);
  int lower = 0, own = 0;
#pragma unroll 8
  for (int i = begin + lane; i < end; i += 32) {
    const int e = experts[i];
    lower += e < expert, own += e == expert;
    if (expert == 0 && (e < 0 || e >= count)) report(faults, Fault::EXPERT, e, count);
  }
  lower = __reduce_add_sync(~0u, lower), own = __reduce_add_sync(~0u, own);
  if (lane == 0) lower_in[warp] = lower, own_in[warp] = own;
  __syncthreads();
  const int lowers = lane < WARPS ? lower_in[lane] : 0, owns = lane < WARPS ? own_in[lane] : 0;
  const int first = __reduce_add_sync(~0u, lowers), all = __reduce_add_sync(~0u, owns);
  int at = first + __reduce_add_sync(~0u, lane < warp ? owns : 0);
  if (threadIdx.x == 0) {
    offsets[expert] = first;
    if (expert == count - 1) offsets[count] = first + all;
  }
  if (all == 0) return;
  for (int i = begin; i < end; i += 32) {
    const bool mine = i + lane < end && experts[i + lane] == expert;
    const uint32_t who = __ballot_sync(~0u, mine);
    if (mine) order[at + __popc(who & ((1u << lane) - 1))] = i + lane;
    at += __popc(who);
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
  if (most * count <= 128 * 65536) {
    auto run = [&](auto kernel, int threads) { launch(kernel, dim3(count), dim3(threads), 0, keys, order.as<int32_t>(), offsets.as<int32_t>(), slots, count, launch.faults); };
    if (most <= 1024) run(group_kernel<128>, 128);
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

// Then shared is added, then residual, where there are any.
struct Combined {
  Numbers slots, shared, residual;
  const float* weights;
  uint32_t n;
  int32_t k;
  template <int V>
  __device__ Vec<V> at(int r, int c) const {
    const float* w = weights + static_cast<int64_t>(r) * k;
    const int64_t from = static_cast<int64_t>(r) * k * n + c, i = static_cast<int64_t>(r) * n + c;
    Vec<V> total{}, added{}, old{};
    if (shared.data) added = load<V>(shared, i);
    if (residual.data) old = load<V>(residual, i);
    constexpr int AT_ONCE = 8;
    for (int j0 = 0; j0 < k; j0 += AT_ONCE) {
      Vec<V> x[AT_ONCE];
      float by[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        by[j] = 0, x[j] = {};
        if (j0 + j < k) by[j] = w[j0 + j], x[j] = load<V>(slots, from + static_cast<int64_t>(j0 + j) * n);
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
        for (int v = 0; v < V; v++) total.at[v] += by[j] * x[j].at[v];
    }
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

Combined combined(const Operands& o, bool added) {
  const Tensor& slots = o.in(0);
  return {floats(slots), added ? floats(o.in(2)) : Numbers{nullptr, F32}, added ? floats(o.in(3)) : Numbers{nullptr, F32}, o.in(1).as<float>(), static_cast<uint32_t>(slots.most[1]), o.in(1).most[1]};
}

bool vectors(const Combined& f) { return f.n % 4 == 0 && aligned(f.slots, f.shared, f.residual); }

template <bool ADDED>
void combine(const Operands& o, Launch& launch) {
  const Combined f = combined(o, ADDED);
  map(f, o.out(0), vectors(f), launch);
}

// combineAddNorm(slots, weights, shared, residual, weight; eps) -> sum, normed
void combine_add_norm(const Operands& o, Launch& launch) {
  const Combined f = combined(o, true);
  norm(f, o.in(4), &o.out(0), o.out(1), static_cast<float>(o.params[0]), vectors(f), launch);
}

}  // namespace

extern const Entry EXPERTS[] = {
    {"route", route},       {"group", group},         {"adaptedSlots", adapted_slots}, {"addRmsNormRoute", add_rms_norm_route},
    {"combine", combine<false>}, {"combineAdd", combine<true>}, {"combineAddNorm", combine_add_norm}, {nullptr, nullptr},
};

}  // namespace cuda
