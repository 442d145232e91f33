// Products with many rows by `mma.sync` and `cp.async`: for GPUs before Hopper, and for shapes that Hopper's kernel does not take. Any k and n.
#include "gemm_tile.cuh"

namespace cuda::gemm {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, STAGES = 3, BLOCK = 64;  // BLOCK: columns of k in a stage

template <Dtype F, int N> struct Shape {
  static constexpr int ROW = BLOCK * Weights<F>::BITS / 8;  // bytes
  static constexpr int A_BYTES = TILE_M * ROW, B_BYTES = N * BLOCK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
  static constexpr int WARPS_N = N / 64 ? N / 64 : 1, WARPS_M = WARPS / WARPS_N;
  static constexpr int FRAGMENTS = TILE_M / 16 / WARPS_M, GROUPS = N / WARPS_N / 8;
  static constexpr int SCALES = BLOCK / Weights<F>::GROUP_COLUMNS;
};

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}

template <Dtype F> __device__ __forceinline__ void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (F == F16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies eight 16-bit numbers of a row, those from `k` on being zero. Where rows are not aligned, the copy is not asynchronous.
__device__ __forceinline__ void copy_halves(uint32_t to, const uint16_t* row, int column, int k, bool present) {
  if (k % 8 == 0) return copy_async(to, present && column < k ? row + column : row, present && column < k);
  uint32_t word[4] = {};
  for (int i = 0; i < 8; i++)
    if (present && column + i < k) word[i / 2] |= static_cast<uint32_t>(row[column + i]) << i % 2 * 16;
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
}

template <Dtype F, int N> __global__ void __launch_bounds__(THREADS) product(const Product p) {
  using S = Shape<F, N>;
  using W = Weights<F>;
  extern __shared__ __align__(1024) uint8_t shared[];
  let_next_start();
  await_inputs();
  int32_t* starts = reinterpret_cast<int32_t*>(shared + STAGES * S::STAGE_BYTES);
  if (threadIdx.x < 32) count_tiles(p, N, starts);
  __syncthreads();
  const int columns = p.tile_columns();
  const Schedule schedule{starts, p.offsets, p.experts, p.rows.get(), (p.n + columns - 1) / columns};
  if (blockIdx.x >= schedule.tiles()) return;
  const Tile tile = schedule.locate(blockIdx.x, N);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp % S::WARPS_M, warp_n = warp / S::WARPS_M;
  const uint32_t base = shared_address(shared);
  const int64_t row_bytes = static_cast<int64_t>(W::QUANTISED ? p.kp : p.k) * W::BITS / 8;

  // Row r of the tile is a row of gate or up if the product is gated.
  auto weight_row = [&](int r) { return p.gated ? tile.m * columns + r % 64 : tile.m * columns + r; };
  auto matrix = [&](int r) { return p.gated ? r / 64 : 0; };

  constexpr int A_CHUNKS = S::A_BYTES / 16, B_CHUNKS = S::B_BYTES / 16, A_EACH = A_CHUNKS / THREADS, B_EACH = B_CHUNKS / THREADS;
  const uint8_t* a_from[A_EACH];
  bool a_present[A_EACH];
#pragma unroll
  for (int i = 0; i < A_EACH; i++) {
    const int r = (threadIdx.x + i * THREADS) / (S::ROW / 16), row = weight_row(r);
    a_present[i] = row < p.n;
    a_from[i] = static_cast<const uint8_t*>(p.w[matrix(r)]) + (static_cast<int64_t>(tile.expert) * p.n + (a_present[i] ? row : 0)) * row_bytes;
  }
  const uint16_t* b_from[B_EACH];
  bool b_present[B_EACH];
#pragma unroll
  for (int i = 0; i < B_EACH; i++) {
    const int t = (threadIdx.x + i * THREADS) / 8;
    b_present[i] = t < tile.count;
    const int64_t row = !b_present[i] ? 0 : p.order ? p.order[tile.first + t] / p.slots : tile.first + t;
    b_from[i] = static_cast<const uint16_t*>(p.x) + row * p.k;
  }
  const int blocks = (p.k + BLOCK - 1) / BLOCK;
  auto fetch = [&](int block) {
    if (block < blocks) {
      const uint32_t a_to = base + block % STAGES * S::STAGE_BYTES, b_to = a_to + S::A_BYTES;
#pragma unroll
      for (int i = 0; i < A_EACH; i++) {
        const int at = threadIdx.x + i * THREADS;
        const uint32_t to = a_to + swizzled<S::ROW>(at * 16);
        if constexpr (W::QUANTISED) copy_async(to, a_from[i] + block * S::ROW + at % (S::ROW / 16) * 16, a_present[i]);
        else copy_halves(to, reinterpret_cast<const uint16_t*>(a_from[i]), block * BLOCK + at % 8 * 8, p.k, a_present[i]);
      }
#pragma unroll
      for (int i = 0; i < B_EACH; i++) {
        const int at = threadIdx.x + i * THREADS;
        copy_halves(b_to + swizzled<128>(at * 16), b_from[i], block * BLOCK + at % 8 * 8, p.k, b_present[i]);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  for (int i = 0; i < STAGES - 1; i++) fetch(i);

  // The lane's two rows of each fragment, and their scales, which are read a block ahead.
  int first_row[S::FRAGMENTS], second_row[S::FRAGMENTS];
  const __half* scales[S::FRAGMENTS][2];
  __half scale[S::FRAGMENTS][2][S::SCALES];
#pragma unroll
  for (int f = 0; f < S::FRAGMENTS; f++) {
    const int fragment = warp_m * S::FRAGMENTS + f;
    first_row[f] = fragment * (p.gated ? 8 : 16) + lane / 4;
    second_row[f] = first_row[f] + (p.gated ? 64 : 8);
    for (int j = 0; j < 2; j++) {
      const int r = j ? second_row[f] : first_row[f], row = weight_row(r);
      if constexpr (W::QUANTISED) scales[f][j] = p.scales[matrix(r)] + (static_cast<int64_t>(tile.expert) * p.n + (row < p.n ? row : 0)) * (p.kp / W::GROUP_COLUMNS);
    }
  }
  auto fetch_scales = [&](int block) {
    if constexpr (W::QUANTISED)
#pragma unroll
      for (int f = 0; f < S::FRAGMENTS; f++)
        for (int j = 0; j < 2; j++)
          for (int i = 0; i < S::SCALES; i++) scale[f][j][i] = scales[f][j][block * S::SCALES + i];
  };
  fetch_scales(0);

  float d[S::FRAGMENTS][S::GROUPS * 4] = {};
  const int id = lane / 8;
  for (int block = 0; block < blocks; block++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncthreads();
    fetch(block + STAGES - 1);
    const uint32_t a_at = base + block % STAGES * S::STAGE_BYTES, b_at = a_at + S::A_BYTES;
    uint32_t a[S::FRAGMENTS][16];
#pragma unroll
    for (int f = 0; f < S::FRAGMENTS; f++) {
      if constexpr (W::QUANTISED) {
        const uint32_t at0 = first_row[f] * S::ROW, at1 = second_row[f] * S::ROW, mask = swizzled<S::ROW>(at0) ^ at0;
        widen_block<F>(a[f], a_at + at0, a_at + at1, 0, mask, [&](int row, int i) { return scale[f][row][i]; });
      } else {
        const int row = (id % 2 ? second_row[f] : first_row[f]) - lane / 4 + lane % 8;
#pragma unroll
        for (int step = 0; step < 4; step++) load_matrices(reinterpret_cast<uint32_t(&)[4]>(a[f][step * 4]), a_at + swizzled<128>(row * 128 + (step * 2 + id / 2) * 16));
      }
    }
    if (block + 1 < blocks) fetch_scales(block + 1);
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
      for (int g = 0; g < S::GROUPS; g += 2) {
        uint32_t b[4];
        load_matrices(b, b_at + swizzled<128>((warp_n * S::GROUPS * 8 + (g + id / 2) * 8 + lane % 8) * 128 + (step * 2 + id % 2) * 16));
#pragma unroll
        for (int f = 0; f < S::FRAGMENTS; f++) {
          multiply<F>(d[f] + g * 4, a[f] + step * 4, b[0], b[1]);
          multiply<F>(d[f] + g * 4 + 4, a[f] + step * 4, b[2], b[3]);
        }
      }
  }
#pragma unroll
  for (int f = 0; f < S::FRAGMENTS; f++) store_fragment<S::GROUPS>(p, tile, d[f], warp_n * S::GROUPS * 8, tile.m * columns + first_row[f]);
}

template <Dtype F, int N> void run(const Product& p, Launch& launch, int64_t most_rows) {
  const int64_t token_tiles = p.order ? std::min<int64_t>(most_rows, most_rows / N + p.experts) : ceil_div(most_rows, N);
  const int m_tiles = ceil_div(p.n, p.tile_columns());
  launch(product<F, N>, dim3(static_cast<unsigned>(token_tiles * m_tiles)), dim3(THREADS), STAGES * Shape<F, N>::STAGE_BYTES + (p.experts + 1) * 4, p);
}

template <Dtype F> void choose(const Product& p, Launch& launch, int64_t most_rows) {
  if (most_rows / p.experts > 64) run<F, 128>(p, launch, most_rows);
  else run<F, 32>(p, launch, most_rows);
}

}  // namespace

void run_ampere(const Product& p, Launch& launch, int64_t most_rows) {
  switch (p.format) {
    case BF16: return choose<BF16>(p, launch, most_rows);
    case F16: return choose<F16>(p, launch, most_rows);
    case INT8: return choose<INT8>(p, launch, most_rows);
    case INT4: return choose<INT4>(p, launch, most_rows);
    case FP8: return choose<FP8>(p, launch, most_rows);
    default: throw std::runtime_error("internal: a product of many rows with a matrix in format " + std::to_string(p.format));
  }
}

}  // namespace cuda::gemm
