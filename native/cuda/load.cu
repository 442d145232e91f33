// Loading weights: pieces of files go through page-locked memory to the card, where they are converted or repacked into the layout of
// kernels.cuh. Several threads read, each with two buffers and a stream of its own.
#include "load.cuh"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <map>
#include <memory>
#include <thread>

namespace cuda {

namespace {

constexpr size_t PIECE_BYTES = 16 << 20;
constexpr int MOST_THREADS = 8;

bool is_float(int32_t dtype) { return dtype == F32 || dtype == F16 || dtype == BF16; }

struct Piece {
  size_t weight;         // for errors
  const char* file;      // or:
  const uint8_t* memory;
  uint64_t offset;
  size_t bytes;
  CudaMemory* to;
  int32_t stored;
  int64_t first, count;  // elements of floats, or tiles of 16 rows of block formats, counted from the start of the stack
};

template <class T> __device__ float to_float(T x) { return static_cast<float>(x); }

// Sets `bad` if a number is not finite, or too large for T.
template <class From, class T>
__global__ void convert(const From* from, T* to, int64_t n, int32_t* bad) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const float x = to_float(from[i]);
    const T y = static_cast<T>(x);
    if (!isfinite(to_float(y))) *bad = 1;
    to[i] = y;
  }
}

template <class From>
void convert_from(const void* from, CudaMemory& to, int64_t first, int64_t n, int32_t* bad, cudaStream_t stream) {
  const auto* f = static_cast<const From*>(from);
  const dim3 grid(1024), block(256);
  switch (to.shape.dtype) {
    case F32: convert<<<grid, block, 0, stream>>>(f, reinterpret_cast<float*>(to.data.data()) + first, n, bad); break;
    case F16: convert<<<grid, block, 0, stream>>>(f, reinterpret_cast<f16*>(to.data.data()) + first, n, bad); break;
    default: convert<<<grid, block, 0, stream>>>(f, reinterpret_cast<bf16*>(to.data.data()) + first, n, bad); break;
  }
  check(cudaGetLastError(), "converting weights");
}

// One block of threads per block of 16 rows x 64 columns; `tile` counts from `first_tile`, whose first row is `first_tile * 16` of the padded stack.
// `n` rows per matrix, which tiles pad to a multiple of 16.
__global__ void repack_bytes(const uint8_t* from, int8_t* to, f16* scales, int64_t first_tile, int groups, int64_t n, bool offset) {
  const int64_t tile = first_tile + blockIdx.y, tiles_per_matrix = (n + TILE_ROWS - 1) / TILE_ROWS;
  const int64_t row0 = tile / tiles_per_matrix * n + tile % tiles_per_matrix * TILE_ROWS;
  const int rows = static_cast<int>(min(static_cast<int64_t>(TILE_ROWS), n - tile % tiles_per_matrix * TILE_ROWS));
  const int group = blockIdx.x;
  const uint8_t* block = from + (static_cast<int64_t>(blockIdx.y) * groups + group) * INT8_BLOCK_BYTES;
  // Words of 4 columns: word w of the block holds columns 4 (w / 16) .. of row w % 16.
  for (int w = threadIdx.x; w < TILE_ROWS * GROUP / 4; w += blockDim.x) {
    const int row = w % TILE_ROWS, quad = w / TILE_ROWS;
    if (row >= rows) continue;
    uint32_t word = reinterpret_cast<const uint32_t*>(block)[w];
    if (offset) word ^= 0x80808080u;  // 128 + q as unsigned is q as signed
    *reinterpret_cast<uint32_t*>(to + ((row0 + row) * groups + group) * GROUP + quad * 4) = word;
  }
  if (threadIdx.x < rows) scales[(row0 + threadIdx.x) * groups + group] = reinterpret_cast<const f16*>(block + TILE_ROWS * GROUP)[threadIdx.x];
}

__global__ void repack_nibbles(const uint8_t* from, uint32_t* to, f16* scales, int64_t first_tile, int groups, int64_t n) {
  const int64_t tile = first_tile + blockIdx.y, tiles_per_matrix = (n + TILE_ROWS - 1) / TILE_ROWS;
  const int64_t row0 = tile / tiles_per_matrix * n + tile % tiles_per_matrix * TILE_ROWS;
  const int rows = static_cast<int>(min(static_cast<int64_t>(TILE_ROWS), n - tile % tiles_per_matrix * TILE_ROWS));
  const int group = blockIdx.x;
  const uint8_t* block = from + (static_cast<int64_t>(blockIdx.y) * groups + group) * INT4_BLOCK_BYTES;
  // A word of ours is 8 columns: 4 bytes of quad 2 o and of quad 2 o + 1, low nibbles for columns 0 to 31, high ones for the others.
  for (int w = threadIdx.x; w < TILE_ROWS * 8; w += blockDim.x) {
    const int row = w % TILE_ROWS, word = w / TILE_ROWS, octet = word % 4, shift = word / 4 * 4;
    if (row >= rows) continue;
    uint32_t out = 0;
    for (int c = 0; c < 8; c++) {
      const int quad = octet * 2 + c / 4;
      const uint32_t q = block[(quad * TILE_ROWS + row) * 4 + c % 4] >> shift & 15;
      out |= q << (c % 2 * 16 + c / 2 * 4);
    }
    to[((row0 + row) * groups + group) * 8 + word] = out;
  }
  const f16* from_scales = reinterpret_cast<const f16*>(block + TILE_ROWS * GROUP / 2);
  if (threadIdx.x < 2 * TILE_ROWS) {
    const int row = threadIdx.x % TILE_ROWS, half = threadIdx.x / TILE_ROWS;
    if (row < rows) scales[((row0 + row) * groups + group) * 2 + half] = from_scales[half * TILE_ROWS + row];
  }
}

void put(const Piece& p, const uint8_t* on_card, int32_t* bad, cudaStream_t stream) {
  CudaMemory& to = *p.to;
  const int32_t dtype = to.shape.dtype;
  if (is_float(p.stored)) {
    if (p.stored == F32) convert_from<float>(on_card, to, p.first, p.count, bad, stream);
    else if (p.stored == F16) convert_from<f16>(on_card, to, p.first, p.count, bad, stream);
    else convert_from<bf16>(on_card, to, p.first, p.count, bad, stream);
    return;
  }
  const int64_t n = to.shape.dims[to.shape.rank - 2];
  const int groups = static_cast<int>(groups_of(to.shape.dims[to.shape.rank - 1]));
  const dim3 grid(groups, static_cast<unsigned>(p.count));
  if (dtype == INT4) repack_nibbles<<<grid, 128, 0, stream>>>(on_card, reinterpret_cast<uint32_t*>(to.data.data()), reinterpret_cast<f16*>(to.scales.data()), p.first, groups, n);
  else repack_bytes<<<grid, 128, 0, stream>>>(on_card, reinterpret_cast<int8_t*>(to.data.data()), reinterpret_cast<f16*>(to.scales.data()), p.first, groups, n, dtype == INT8);
  check(cudaGetLastError(), "repacking weights");
}

// Cuts the parts of a weight into pieces that the buffers hold.
void cut(std::vector<Piece>& pieces, size_t weight, const char* name, CudaMemory* to, const CudaSource* parts, size_t count) {
  const CudaShape& s = to->shape;
  const int64_t k = s.dims[s.rank - 1];
  int64_t rows = 1;
  for (int i = 0; i + 1 < s.rank; i++) rows *= s.dims[i];
  if (!count || rows % static_cast<int64_t>(count)) throw Error(std::string("internal: ") + name + " has " + std::to_string(count) + " parts");
  const int64_t n = rows / static_cast<int64_t>(count);
  for (size_t p = 0; p < count; p++) {
    const CudaSource& source = parts[p];
    const bool floats = is_float(source.stored);
    if (floats ? !is_float(s.dtype) : source.stored != s.dtype) throw Error(std::string("internal: ") + name + " has to be converted before it is loaded");
    const size_t unit = floats ? (source.stored == F32 ? 4 : 2) : static_cast<size_t>(groups_of(k)) * static_cast<size_t>(s.dtype == INT4 ? INT4_BLOCK_BYTES : INT8_BLOCK_BYTES);
    const int64_t units = floats ? n * k : (n + TILE_ROWS - 1) / TILE_ROWS;
    if (source.bytes != static_cast<uint64_t>(units) * unit) throw Error(std::string("internal: ") + name + " has " + std::to_string(source.bytes) + " bytes, " + std::to_string(static_cast<uint64_t>(units) * unit) + " expected");
    const auto at_once = static_cast<int64_t>(std::max<size_t>(1, PIECE_BYTES / unit));
    for (int64_t first = 0; first < units; first += at_once) {
      const int64_t some = std::min(at_once, units - first);
      pieces.push_back({weight, source.file, static_cast<const uint8_t*>(source.memory), source.offset + static_cast<uint64_t>(first) * unit, static_cast<size_t>(some) * unit, to, source.stored,
                        static_cast<int64_t>(p) * units + first, some});
    }
  }
}

class File {
 public:
  explicit File(const std::string& path) : fd(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd < 0) throw Error(path + ": " + std::strerror(errno));
  }
  ~File() { close(fd); }
  const int fd;
};

}  // namespace

void load(CudaDevice& device, CudaMemory* const* to, const CudaSource* const* parts, const size_t* part_counts, const char* const* names, size_t count,
          int32_t (*done)(void*, uint64_t), void* context) {
  device.use();
  std::vector<Piece> pieces;
  size_t largest = 0;
  for (size_t i = 0; i < count; i++) cut(pieces, i, names[i], to[i], parts[i], part_counts[i]);
  std::map<std::string, std::unique_ptr<File>> files;
  for (const Piece& p : pieces) {
    largest = std::max(largest, p.bytes);
    if (!p.memory && !files.contains(p.file)) files.emplace(p.file, std::make_unique<File>(p.file));
  }
  Block bad(count * 4 + 4);
  check(cudaMemset(bad.data(), 0, bad.bytes()), "cudaMemset");

  const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  const size_t threads = std::min({pieces.size(), cores, static_cast<size_t>(MOST_THREADS)});
  std::atomic<size_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex lock;
  std::string failure;
  auto work = [&] {
    try {
      device.use();
      cudaStream_t stream;
      check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
      Pinned host[2] = {Pinned(largest), Pinned(largest)};
      Block card[2] = {Block(largest), Block(largest)};
      cudaEvent_t free[2];
      for (auto& e : free) check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "cudaEventCreate");
      for (int turn = 0; !stop; turn ^= 1) {
        const size_t i = next++;
        if (i >= pieces.size()) break;
        const Piece& p = pieces[i];
        check(cudaEventSynchronize(free[turn]), "copying weights");
        if (p.memory) std::memcpy(host[turn].data(), p.memory + p.offset, p.bytes);
        else
          for (size_t at = 0; at < p.bytes;) {
            const ssize_t n = pread(files.at(p.file)->fd, host[turn].data() + at, p.bytes - at, static_cast<off_t>(p.offset + at));
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) throw Error(std::string(p.file) + ": " + std::strerror(errno));
            if (n == 0) throw Error(std::string(p.file) + ": " + names[p.weight] + " ends beyond the file");
            at += static_cast<size_t>(n);
          }
        check(cudaMemcpyAsync(card[turn].data(), host[turn].data(), p.bytes, cudaMemcpyHostToDevice, stream), "copying weights");
        put(p, card[turn].data(), reinterpret_cast<int32_t*>(bad.data()) + p.weight, stream);
        check(cudaEventRecord(free[turn], stream), "cudaEventRecord");
        if (done && done(context, p.bytes)) throw Error("loading was cancelled");
      }
      check(cudaStreamSynchronize(stream), "copying weights");
      for (auto& e : free) cudaEventDestroy(e);
      cudaStreamDestroy(stream);
    } catch (const std::exception& e) {
      std::lock_guard guard(lock);
      if (failure.empty()) failure = e.what();
      stop = true;
    }
  };
  std::vector<std::thread> team;
  for (size_t t = 1; t < threads; t++) team.emplace_back(work);
  work();
  for (auto& t : team) t.join();
  if (!failure.empty()) {
    cudaDeviceSynchronize();
    throw Error(failure);
  }
  std::vector<int32_t> found(count);
  check(cudaMemcpy(found.data(), bad.data(), count * 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
  for (size_t i = 0; i < count; i++)
    if (found[i]) throw Error(std::string(parts[i]->file ? parts[i]->file : "a checkpoint") + ": " + names[i] + " holds a number that is not finite, or too large for its format");
}

}  // namespace cuda
