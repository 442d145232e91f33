// The experts of a few rows: gate and up, and down with the weighted sum, each one kernel (see rows.cuh). The weights of an expert that several
// rows chose are read once. What these kernels have no shapes for is composed of products.
#include "matrix.cuh"
#include "rows.cuh"

namespace cuda {
namespace {

// The experts that rows chose, in the order of their first slots, in shared memory. `place[e * stride + p]`: slot | row << 16;
// `factor`: its weight.
struct Chosen {
  int32_t count, stride;
  int32_t* expert;
  uint32_t* mask;
  int32_t* place;
  float* factor;

  static constexpr int FEW = 32;  // slots that each warp sorts for itself, which needs no barrier
  static __host__ __device__ int list_words(int most, int positions) { return most * (2 + 2 * positions); }
  static int bytes(int most, int slots, int positions) { return (slots <= FEW ? ROW_WARPS * list_words(most, positions) : list_words(most, positions) + ROW_THREADS + ROW_WARPS) * 4; }

  __device__ void place_lists(int32_t* at, int32_t most, int32_t positions) {
    stride = positions;
    expert = at;
    mask = reinterpret_cast<uint32_t*>(at + most);
    place = at + 2 * most;
    factor = reinterpret_cast<float*>(place + most * positions);
  }

  // by_row: a slot's position is its row; otherwise an expert's slots take the positions from 0 on. `most_slots`: as in bytes().
  __device__ void find(uint8_t* shared, int32_t most, int32_t most_slots, int32_t positions, bool by_row, const float* weights, const int32_t* experts, int32_t rows, int32_t k, int32_t limit, FaultRecord* faults) {
    int32_t* words = reinterpret_cast<int32_t*>(shared);
    const int slots = rows * k, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto id_of = [&](int slot) {
      const int32_t id = slot < slots ? experts[slot] : -1;
      if (slot >= slots || (id >= 0 && id < limit)) return id;
      report(faults, Fault::EXPERT, id, limit);
      return -1;
    };
    if (most_slots <= FEW) {
      place_lists(words + warp * list_words(most, positions), most, positions);
      const int32_t id = id_of(lane);
      const float weight = weights && lane < slots ? weights[lane] : 1.f;
      const uint32_t alike = __match_any_sync(~0u, id), below = (1u << lane) - 1;
      const bool first = id >= 0 && !(alike & below);
      const uint32_t firsts = __ballot_sync(~0u, first);
      count = __popc(firsts);
      const int rank = __popc(firsts & ((1u << (__ffs(alike) - 1)) - 1)), row = lane / k;
      if (id >= 0) {
        const int p = by_row ? row : __popc(alike & below);
        if (p < positions) {
          place[rank * stride + p] = lane | row << 16;
          factor[rank * stride + p] = weight;
        }
      }
      if (first) {
        uint32_t bits = 0;
        if (by_row)
          for (uint32_t rest = alike; rest; rest &= rest - 1) bits |= 1u << (__ffs(rest) - 1) / k;
        else bits = (1u << min(__popc(alike), positions)) - 1;
        expert[rank] = id;
        mask[rank] = bits;
      }
      __syncwarp();
      return;
    }
    int32_t* ids = words;
    uint32_t* firsts = reinterpret_cast<uint32_t*>(ids + ROW_THREADS);
    place_lists(ids + ROW_THREADS + ROW_WARPS, most, positions);
    const int slot = threadIdx.x;
    const int32_t id = id_of(slot);
    ids[slot] = id;
    __syncthreads();
    bool first = id >= 0;
    for (int i = 0; first && i < slot; i++) first = ids[i] != id;
    const uint32_t votes = __ballot_sync(~0u, first);
    if (lane == 0) firsts[warp] = votes;
    __syncthreads();
    int rank = __popc(votes & ((1u << lane) - 1));
    count = 0;
    for (int i = 0; i < ROW_WARPS; i++) {
      const int n = __popc(firsts[i]);
      count += n;
      if (i < warp) rank += n;
    }
    if (first) {
      uint32_t bits = 0;
      for (int i = slot, n = 0; i < slots; i++) {
        if (ids[i] != id) continue;
        const int row = i / k, p = by_row ? row : n++;
        if (p >= positions) break;
        bits |= 1u << p;
        place[rank * stride + p] = i | row << 16;
        factor[rank * stride + p] = weights ? weights[i] : 1.f;
      }
      expert[rank] = id;
      mask[rank] = bits;
    }
    __syncthreads();
  }
};

// What both ops know.
struct Experts {
  const int32_t* experts;  // [rows, k]
  Size rows;
  int32_t k, count;  // experts of a row, and of the stack
  int32_t hidden, width, shared_width;  // 0: no shared experts
  int32_t most, most_slots, positions;  // different experts, slots, and positions that the kernel has
  FaultRecord* faults;
};

template <Dtype D>
struct GatedExperts {
  static constexpr int TILE = TILE_N / 2, SPLITS = 1;
  static constexpr bool PARTS_KNOWN = true, WEIGHTED = false;
  // Up to four rows have positions of their own; of many, those that chose an expert are packed.
  static constexpr bool same(Span span) { return span != Span::MANY; }
  Experts e;
  const float* x;
  Matrix gate, up, shared_gate, shared_up;
  float *h, *hs;
  int32_t rows;
  Chosen chosen;

  __device__ int32_t tiles() const { return (e.width + TILE - 1) / TILE; }
  __device__ int32_t early_items() const { return (e.shared_width + TILE - 1) / TILE; }
  __device__ int32_t prepare(uint8_t* shared) {
    rows = min(e.rows.get(), ROWS_MOST);
    chosen.find(shared, e.most, e.most_slots, e.positions, e.positions <= 4, nullptr, e.experts, rows, e.k, e.count, e.faults);
    return rows > 0 ? early_items() + chosen.count * tiles() : 0;
  }
  __device__ int32_t parts() const { return 1; }
  __device__ int32_t chunks(int32_t) const { return e.hidden / Chunks<D>::CHUNK; }
  __device__ int32_t pitch(int32_t) const { return Chunks<D>::pitch(e.hidden); }
  __device__ int32_t scale_pitch(int32_t) const { return Chunks<D>::scale_pitch(e.hidden); }
  // Of an item that is no shared one: the place of its expert among the chosen ones. The quotient of such small numbers is exact.
  __device__ int32_t index(int32_t item) const { return static_cast<int32_t>((item - early_items() + 0.5f) * __frcp_rn(static_cast<float>(tiles()))); }
  __device__ Source source(const Cursor& c) const {
    const bool is_shared = c.item < early_items();
    const int32_t i = is_shared ? 0 : index(c.item);
    const int32_t n = (is_shared ? c.item : c.item - early_items() - i * tiles()) * TILE;
    const int64_t row = is_shared ? n : static_cast<int64_t>(chosen.expert[i]) * e.width + n;
    return tile_of<D>(is_shared ? shared_gate : gate, is_shared ? shared_up : up, row, (is_shared ? e.shared_width : e.width) - n, e.hidden);
  }
  __device__ uint32_t everybody() const { return (1u << rows) - 1; }
  __device__ uint32_t mask(const Cursor& c) const { return c.item < early_items() ? (1u << rows) - 1 : chosen.mask[index(c.item)]; }
  __device__ const float* row_of(const Cursor& c, int p, float& factor) const {
    factor = 1;
    return x + static_cast<int64_t>(e.positions <= 4 || c.item < early_items() ? p : chosen.place[index(c.item) * chosen.stride + p] >> 16) * e.hidden;
  }
  __device__ int32_t target(const Cursor&, int p) const { return p; }
  __device__ void finish(int32_t item, int p, int n, float sum, float up) const {
    const float v = silu(sum) * up;
    if (item < early_items()) {
      n += item * TILE;
      if (n < e.shared_width && p < rows) hs[static_cast<int64_t>(p) * e.shared_width + n] = v;
      return;
    }
    const int32_t i = index(item);
    n += (item - early_items() - i * tiles()) * TILE;
    if (n < e.width && chosen.mask[i] >> p & 1) h[static_cast<int64_t>(chosen.place[i * chosen.stride + p] & 0xffff) * e.width + n] = v;
  }
  __device__ void after(int32_t) const {}
};

// An item is 16 outputs; its parts are the shared experts and each chosen one.
template <Dtype D>
struct DownExperts {
  static constexpr int TILE = TILE_N, SPLITS = 2;  // there are fewer items than blocks fit the multiprocessors
  static constexpr bool PARTS_KNOWN = false, WEIGHTED = true;
  static constexpr bool same(Span span) { return span == Span::ONE; }
  Experts e;
  const float *h, *hs;
  Matrix down, shared_down;
  const float *weights, *residual;
  float* y;
  float* sums;         // at one row: [SPLITS, hidden], and how many blocks have added to an item's; else null
  int32_t* arrived;
  int32_t rows;
  Chosen chosen;

  __device__ bool is_shared(int32_t part) const { return e.shared_width && part == 0; }
  __device__ int32_t index(int32_t part) const { return part - (e.shared_width > 0); }
  __device__ int32_t tiles() const { return (e.hidden + TILE_N - 1) / TILE_N; }
  __device__ int32_t early_items() const { return e.shared_width ? tiles() : 0; }
  __device__ int32_t prepare(uint8_t* shared) {
    rows = min(e.rows.get(), ROWS_MOST);
    chosen.find(shared, e.most, e.most_slots, e.positions, e.positions <= 4, weights, e.experts, rows, e.k, e.count, e.faults);
    return rows > 0 && parts() > 0 ? tiles() : 0;
  }
  __device__ int32_t parts() const { return chosen.count + (e.shared_width > 0); }
  __device__ int32_t depth(int32_t part) const { return is_shared(part) ? e.shared_width : e.width; }
  __device__ int32_t chunks(int32_t part) const { return depth(part) / Chunks<D>::CHUNK; }
  __device__ int32_t pitch(int32_t part) const { return Chunks<D>::pitch(depth(part)); }
  __device__ int32_t scale_pitch(int32_t part) const { return Chunks<D>::scale_pitch(depth(part)); }
  __device__ Source source(const Cursor& c) const {
    const int32_t n = c.item * TILE_N, k = depth(c.part);
    const bool common = is_shared(c.part);
    const Matrix& m = common ? shared_down : down;
    const int64_t row = common ? n : static_cast<int64_t>(chosen.expert[index(c.part)]) * e.hidden + n;
    return tile_of<D>(m, row, e.hidden - n, k);
  }
  __device__ uint32_t everybody() const { return (1u << rows) - 1; }
  __device__ uint32_t mask(const Cursor& c) const { return is_shared(c.part) ? (1u << rows) - 1 : chosen.mask[index(c.part)]; }
  __device__ const float* row_of(const Cursor& c, int p, float& factor) const {
    if (is_shared(c.part)) {
      factor = 1;
      return hs + static_cast<int64_t>(p) * e.shared_width;
    }
    const int32_t at = index(c.part) * chosen.stride + p;
    factor = chosen.factor[at];
    return h + static_cast<int64_t>(chosen.place[at] & 0xffff) * e.width;
  }
  __device__ int32_t target(const Cursor& c, int p) const { return is_shared(c.part) ? p : chosen.place[index(c.part) * chosen.stride + p] >> 16; }
  __device__ void finish(int32_t item, int p, int n, float sum, float) const {
    n += item * TILE_N;
    if (n >= e.hidden || p >= rows) return;
    if (sums) {
      sums[static_cast<int64_t>(blockIdx.y) * e.hidden + n] = sum;
      return;
    }
    const int64_t at = static_cast<int64_t>(p) * e.hidden + n;
    y[at] = residual ? sum + residual[at] : sum;
  }
  // The last block that has its part of an item adds up all of them, in their order.
  __device__ void after(int32_t item) const {
    if (!sums) return;
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(&arrived[item], 1) == SPLITS - 1;
      if (last) arrived[item] = 0;
    }
    __syncthreads();
    const int32_t n = item * TILE_N + static_cast<int32_t>(threadIdx.x);
    if (!last || threadIdx.x >= TILE_N || n >= e.hidden) return;
    __threadfence();
    float sum = 0;
    for (int s = 0; s < SPLITS; s++) sum += __ldcg(sums + static_cast<int64_t>(s) * e.hidden + n);
    y[n] = residual ? sum + residual[n] : sum;
  }
};

// Sorts slots by expert, as the op `group` does, in one block; slots without an expert are left out.
__global__ void __launch_bounds__(1024) sort_slots(const int32_t* experts, Size rows, int32_t k, int32_t count, int32_t* order, int32_t* offsets, FaultRecord* faults) {
  let_next_start();
  await_inputs();
  const int32_t slots = rows.get() * k;
  for (int32_t e = threadIdx.x; e <= count; e += blockDim.x) {
    int32_t before = 0;
    for (int32_t s = 0; s < slots; s++) before += experts[s] >= 0 && experts[s] < e;
    offsets[e] = before;
    for (int32_t s = 0, at = before; s < slots && e < count; s++)
      if (experts[s] == e) order[at++] = s;
  }
  for (int32_t s = threadIdx.x; s < slots; s += blockDim.x)
    if (experts[s] < 0 || experts[s] >= count) report(faults, Fault::EXPERT, experts[s], count);
}

// y = the sum of each row's slots, times their weights, and the residual.
__global__ void __launch_bounds__(256) add_slots(const float* slots, const float* weights, const float* residual, float* y, Size rows, int32_t k, int32_t n) {
  let_next_start();
  await_inputs();
  const int32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  for (int64_t r = blockIdx.y; r < rows.get(); r += gridDim.y) {
    float sum = 0;
    for (int32_t j = 0; j < k; j++) sum += weights[r * k + j] * slots[(r * k + j) * n + i];
    y[r * n + i] = residual ? sum + residual[r * n + i] : sum;
  }
}

bool fits(const Experts& e, int32_t rows, int32_t k, int32_t shared_k, std::initializer_list<Dtype> formats) {
  const Dtype d = *formats.begin();
  for (Dtype other : formats)
    if (other != d) return false;
  return has_chunks(d) && rows <= ROWS_MOST && rows * e.k <= ROW_THREADS && k % chunk_of(d) == 0 && shared_k % chunk_of(d) == 0;
}

// A product of each slot's expert, for slots in scratch memory or anywhere.
struct Sorted {
  int32_t *order, *offsets;
};
Sorted sort(const Experts& e, int32_t rows, Launch& launch) {
  const Sorted s{static_cast<int32_t*>(launch.scratch(static_cast<size_t>(rows) * e.k * 4)), static_cast<int32_t*>(launch.scratch((e.count + 1) * 4))};
  launch(sort_slots, 1, 1024, 0, e.experts, e.rows, e.k, e.count, s.order, s.offsets, e.faults);
  return s;
}

}  // namespace

// expertsGated(x, gate, up, sharedGate, sharedUp, experts) -> h, hs; or (x, gate, up, experts) -> h
void experts_gated(const Operands& o, Launch& launch) {
  const bool shared = o.params[0] != 0;
  const Tensor &x = o.in(0), &gate = o.in(1), &up = o.in(2), &ids = o.in(shared ? 5 : 3);
  const int32_t rows = ids.most[0], k = ids.most[1], count = gate.most[0], slots = rows * k;
  const Experts e{ids.as<int32_t>(), ids.rows(), k, count, gate.most[2], gate.most[1], shared ? o.in(3).most[0] : 0, count < slots ? count : slots, slots, positions_of(rows), launch.faults};
  if (fits(e, rows, e.hidden, e.hidden, {gate.dtype, up.dtype, shared ? o.in(3).dtype : gate.dtype, shared ? o.in(4).dtype : gate.dtype})) {
    const int items = ceil_div(e.shared_width, TILE_N / 2) + e.most * ceil_div(e.width, TILE_N / 2);
    launch_rows<GatedExperts>(gate.dtype, rows, items, 1, e.hidden, Chosen::bytes(e.most, slots, e.positions), launch, [&](auto tag) {
      return GatedExperts<decltype(tag)::value>{e, x.as<float>(), matrix_of(gate), matrix_of(up), shared ? matrix_of(o.in(3)) : Matrix{}, shared ? matrix_of(o.in(4)) : Matrix{},
                                               o.out(0).as<float>(), shared ? o.out(1).as<float>() : nullptr, 0, {}};
    });
    return;
  }
  if (up.dtype != gate.dtype) throw std::runtime_error("internal: expertsGated: gate and up differ in format");
  const Sorted s = sort(e, rows, launch);
  product({gate.dtype, matrix_of(gate), matrix_of(up), true, x.as<float>(), nullptr, nullptr, o.out(0).as<float>(), s.order, s.offsets, k, count, e.width, e.hidden, slots, x.rows()}, launch);
  if (shared) product(gated_product(x, o.in(3), o.in(4), o.out(1)), launch);
}

// expertsDown(h, hs, down, sharedDown, experts, weights, residual?) -> y; or (h, down, experts, weights, residual?)
void experts_down(const Operands& o, Launch& launch) {
  const bool shared = o.params[0] != 0, has_residual = o.params[1] != 0;
  const Tensor &h = o.in(0), &down = o.in(shared ? 2 : 1), &ids = o.in(shared ? 4 : 2), &weights = o.in(shared ? 5 : 3), &y = o.out(0);
  const int32_t rows = ids.most[0], k = ids.most[1], count = down.most[0], slots = rows * k;
  const Experts e{ids.as<int32_t>(), ids.rows(), k, count, down.most[1], down.most[2], shared ? o.in(3).most[1] : 0, count < slots ? count : slots, slots, positions_of(rows), launch.faults};
  const float* residual = has_residual ? o.in(shared ? 6 : 4).as<float>() : nullptr;
  if (fits(e, rows, e.width, e.shared_width, {down.dtype, shared ? o.in(3).dtype : down.dtype})) {
    constexpr int SPLITS = DownExperts<BF16>::SPLITS;
    float* sums = rows == 1 ? static_cast<float*>(launch.scratch(static_cast<size_t>(SPLITS) * e.hidden * 4)) : nullptr;
    int32_t* arrived = rows == 1 ? launch.counters(ceil_div(e.hidden, TILE_N)) : nullptr;
    launch_rows<DownExperts>(down.dtype, rows, ceil_div(e.hidden, TILE_N), 1, static_cast<int64_t>(k) * e.width + e.shared_width, Chosen::bytes(e.most, slots, e.positions), launch, [&](auto tag) {
      return DownExperts<decltype(tag)::value>{e, h.as<float>(), shared ? o.in(1).as<float>() : nullptr, matrix_of(down), shared ? matrix_of(o.in(3)) : Matrix{},
                                              weights.as<float>(), residual, y.as<float>(), sums, arrived, 0, {}};
    });
    return;
  }
  const Sorted s = sort(e, rows, launch);
  float* each = static_cast<float*>(launch.scratch(static_cast<size_t>(slots) * e.hidden * 4));
  // `h` has a row for each slot.
  Size slot_rows = ids.rows();
  slot_rows.times *= k;
  product({down.dtype, matrix_of(down), {}, false, h.as<float>(), nullptr, nullptr, each, s.order, s.offsets, 1, count, e.hidden, e.width, slots, slot_rows}, launch);
  launch(add_slots, dim3(ceil_div(e.hidden, 256), rows < 65535 ? rows : 65535), 256, 0, each, weights.as<float>(), residual, y.as<float>(), ids.rows(), k, e.hidden);
  if (shared) {
    Product p = linear_product(o.in(1), o.in(3), y);
    p.added = p.y;
    product(p, launch);
  }
}

}  // namespace cuda
