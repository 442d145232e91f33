// Hopper's products with matrices in 16 bits, and the choice among formats.
#include "gemm_hopper.cuh"

namespace cuda::gemm {

void run_hopper_int8(const Product&, Launch&, int64_t most_rows);
void run_hopper_int4(const Product&, Launch&, int64_t most_rows);
void run_hopper_fp8(const Product&, Launch&, int64_t most_rows);

namespace {
// A warp copies a row.
__global__ void __launch_bounds__(256) copy_rows(const Product p, uint4* to) {
  let_next_start();
  await_inputs();
  const int position = blockIdx.x * 8 + threadIdx.x / 32, pieces = p.k / 8;
  if (position >= p.rows.get() * p.slots) return;
  const uint4* from = static_cast<const uint4*>(p.x) + static_cast<int64_t>(p.order[position] / p.slots) * pieces;
  for (int i = threadIdx.x % 32; i < pieces; i += 32) to[static_cast<int64_t>(position) * pieces + i] = from[i];
}

// A block adds up eight tokens of a tile; its threads are the tile's consumers.
__global__ void __launch_bounds__(256) add_tile_parts(const Product p, int tokens, int cluster) {
  let_next_start();
  await_inputs();
  const int columns = p.tile_columns(), rows = p.rows.get();
  const int32_t starts[] = {0, (rows + tokens - 1) / tokens};
  const Schedule schedule{starts, nullptr, 1, rows, (p.n + columns * cluster - 1) / (columns * cluster)};
  const int groups = tokens / 8, index = blockIdx.x / groups, group = blockIdx.x % groups;
  if (index >= schedule.tiles() * cluster) return;
  Tile tile = schedule.locate(index / cluster, tokens);
  tile.m = tile.m * cluster + index % cluster;
  // Of gated products with matrices in 16 bits, a warpgroup has the first or the second half of the tokens that the tile was computed for, all of gate, then all of up.
  const bool halved = p.gated && (p.format == BF16 || p.format == F16);
  const int computed = tokens < 256 ? tokens : min(tokens, (tile.count + 63) / 64 * 64);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, half = threadIdx.x / 128;
  if (halved && group >= computed / 16) return;
  const int token = group * 8 + (halved ? half * computed / 2 : 0);
  if (token >= tile.count) return;
  float d[8] = {};
  const float4* parts = reinterpret_cast<const float4*>(p.partials) + static_cast<int64_t>(index) * p.splits * groups * 256 + threadIdx.x;
  for (int part = 0; part < p.splits; part++)
    for (int j = 0; j <= halved; j++) {
      const float4 v = __ldcg(parts + (part * groups + group + j * computed / 16) * 256);
      d[j * 4] += v.x, d[j * 4 + 1] += v.y, d[j * 4 + 2] += v.z, d[j * 4 + 3] += v.w;
    }
  const int column = tile.m * columns + (halved ? warp * 16 : (half * 4 + warp) * (p.gated ? 8 : 16)) + lane / 4;
  if (!halved) return store_fragment<1>(p, tile, d, token, column);
  for (int i = 0; i < 4; i++) {
    const int t = token + lane % 4 * 2 + i % 2, c = column + i / 2 * 8;
    if (t < tile.count && c < p.n) store(p.y, p.out, static_cast<int64_t>(tile.first + t) * p.n + c, gated(d[i], d[4 + i]));
  }
}
}  // namespace

void add_parts(const Product& p, Launch& launch, int tokens, int cluster, int tiles) {
  launch(add_tile_parts, dim3(tiles * cluster * (tokens / 8)), dim3(256), 0, p, tokens, cluster);
}

void* sort_rows(const Product& p, Launch& launch, int64_t most_rows) {
  uint4* to = static_cast<uint4*>(launch.scratch(most_rows * p.k * 2));
  launch(copy_rows, dim3(ceil_div(most_rows, 8)), dim3(256), 0, p, to);
  return to;
}

bool run_hopper(const Product& p, Launch& launch, int64_t most_rows) {
  // Rows of scales, copied in pieces of 16 bytes, must be whole pieces.
  const int unit = p.format == BF16 || p.format == F16 ? 64 : p.format == INT4 ? 256 : 512;
  if (p.k % unit || p.experts > 256) return false;
  switch (p.format) {
    case BF16: return run_hopper_format<BF16>(p, launch, most_rows), true;
    case F16: return run_hopper_format<F16>(p, launch, most_rows), true;
    case INT8: return run_hopper_int8(p, launch, most_rows), true;
    case INT4: return run_hopper_int4(p, launch, most_rows), true;
    case FP8: return run_hopper_fp8(p, launch, most_rows), true;
    default: return false;
  }
}

}  // namespace cuda::gemm
