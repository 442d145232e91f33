// Allocation, and the sizes of formats on the card.
#include "device.cuh"

namespace cuda {

static std::string gigabytes(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, bytes < 100'000'000 ? "%.1f MB" : "%.2f GB", double(bytes) / (bytes < 100'000'000 ? 1e6 : 1e9));
  return text;
}

Block::Block(size_t bytes) : bytes_(bytes) {
  if (!bytes) return;
  const cudaError_t e = cudaMalloc(reinterpret_cast<void**>(&data_), bytes);
  if (e == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    bytes_ = 0;
    throw Error("out of memory on the GPU: " + gigabytes(bytes) + " needed, " + gigabytes(free) + " of " + gigabytes(total) + " free");
  }
  check(e, "cudaMalloc");
}

Block::~Block() {
  if (data_) cudaFree(data_);
}

Pinned::Pinned(size_t bytes) : bytes_(bytes) {
  if (bytes) check(cudaMallocHost(reinterpret_cast<void**>(&data_), bytes), "page-locked memory");
}

Pinned::~Pinned() {
  if (data_) cudaFreeHost(data_);
}

static bool is_block(int32_t dtype) { return dtype == INT8 || dtype == INT4 || dtype == FP8; }

size_t data_bytes(const CudaShape& s) {
  size_t n = 1;
  for (int i = 0; i < s.rank; i++) n *= static_cast<size_t>(s.dims[i]);
  switch (s.dtype) {
    case F32:
    case I32: return n * 4;
    case F16:
    case BF16: return n * 2;
    case FP8KV: return n;
    case INT8KV: return n / static_cast<size_t>(s.dims[3]) * static_cast<size_t>(int8_kv_bytes(s.dims[3]));
    default: break;
  }
  if (!is_block(s.dtype) || s.rank < 2) throw Error("internal: no size for dtype " + std::to_string(s.dtype));
  const auto k = static_cast<size_t>(s.dims[s.rank - 1]);
  return n / k * static_cast<size_t>(groups_of(static_cast<int64_t>(k))) * (s.dtype == INT4 ? GROUP / 2 : GROUP);
}

size_t scale_bytes(const CudaShape& s) {
  if (!is_block(s.dtype)) return 0;
  size_t n = 2;
  for (int i = 0; i + 1 < s.rank; i++) n *= static_cast<size_t>(s.dims[i]);
  return n * static_cast<size_t>(groups_of(s.dims[s.rank - 1])) * (s.dtype == INT4 ? 2 : 1);
}

}  // namespace cuda

CudaDevice::CudaDevice(int32_t i) : index(i) {
  use();
  cuda::check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
}

CudaDevice::~CudaDevice() {
  cudaSetDevice(index);
  cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
}

void CudaDevice::grow(cuda::Block& block, size_t bytes) {
  if (bytes <= block.bytes()) return;
  cuda::check(cudaStreamSynchronize(stream), "a step");
  generation++;
  block = cuda::Block();  // free the old one first: nothing in it outlives a step
  block = cuda::Block((bytes + 255) / 256 * 256);
  cuda::check(cudaMemsetAsync(block.data(), 0, block.bytes(), stream), "cudaMemset");
}

CudaMemory::CudaMemory(CudaDevice* d, const CudaShape& s) : device(d), shape(s) {
  d->use();
  // 64 bytes more, so that wide loads at the end of ragged arrays stay within.
  data = cuda::Block(cuda::data_bytes(s) + 64);
  scales = cuda::Block(cuda::scale_bytes(s) ? cuda::scale_bytes(s) + 64 : 0);
  cuda::check(cudaMemset(data.data(), 0, data.bytes()), "cudaMemset");
  if (scales.bytes()) cuda::check(cudaMemset(scales.data(), 0, scales.bytes()), "cudaMemset");
}
