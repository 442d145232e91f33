// The table of functions that the addon opens (interface.h): turns exceptions into messages.
#include "limits.cuh"
#include "load.cuh"
#include "program.cuh"

namespace {

thread_local std::string last_error;

template <class F>
int attempt(F work) {
  try {
    work();
    return 0;
  } catch (const std::exception& e) {
    last_error = *e.what() ? e.what() : "internal: an error without a message";
    return 1;
  }
}

template <class T, class F>
T* made(F make) {
  T* result = nullptr;
  attempt([&] { result = make(); });
  return result;
}

void describe(int32_t index, CudaCard& card) {
  cudaDeviceProp p{};
  cuda::check(cudaGetDeviceProperties(&p, index), "cudaGetDeviceProperties");
  card = {};
  card.index = index;
  std::snprintf(card.name, sizeof card.name, "%s", p.name);
  card.major = p.major;
  card.minor = p.minor;
  card.multiprocessors = p.multiProcessorCount;
  card.total = p.totalGlobalMem;
  // The kernels are built for the Ampere line (8.x) and, with its own instructions, for 9.0.
  if (p.major < 8) std::snprintf(card.refused, sizeof card.refused, "compute capability %d.%d; 8.0 or newer is needed", p.major, p.minor);
  else if (p.major > 9) std::snprintf(card.refused, sizeof card.refused, "compute capability %d.%d; the kernels are built for 8.x and 9.0", p.major, p.minor);
  if (*card.refused) return;
  cuda::check(cudaSetDevice(index), "cudaSetDevice");
  size_t free = 0, total = 0;
  cuda::check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  card.free = free;
  card.total = total;
}

const CudaInterface INTERFACE = {
    .version = CUDA_INTERFACE_VERSION,
    .error = [] { return last_error.c_str(); },
    .versions = [](int32_t* driver, int32_t* runtime) {
      return attempt([&] {
        cuda::check(cudaDriverGetVersion(driver), "cudaDriverGetVersion");
        cuda::check(cudaRuntimeGetVersion(runtime), "cudaRuntimeGetVersion");
      });
    },
    .count = [](int32_t* cards) {
      return attempt([&] {
        const cudaError_t e = cudaGetDeviceCount(cards);
        if (e == cudaErrorNoDevice || e == cudaErrorInsufficientDriver) {  // the caller compares the versions
          cudaGetLastError();
          *cards = 0;
        } else cuda::check(e, "cudaGetDeviceCount");
      });
    },
    .card = [](int32_t index, CudaCard* card) { return attempt([&] { describe(index, *card); }); },
    .open = [](int32_t index) { return made<CudaDevice>([&] { return new CudaDevice(index); }); },
    .close = [](CudaDevice* d) { delete d; },
    .memory = [](CudaDevice* d, uint64_t* free, uint64_t* total) {
      return attempt([&] {
        d->use();
        size_t f = 0, t = 0;
        cuda::check(cudaMemGetInfo(&f, &t), "cudaMemGetInfo");
        *free = f;
        *total = t;
      });
    },
    .limits = [](CudaDevice* d, CudaLimits* limits) { return attempt([&] { *limits = cuda::measure_limits(*d); }); },
    .profile = [](CudaDevice* d, int32_t on) { d->profiling = on; },
    .allocate = [](CudaDevice* d, const CudaShape* shape) { return made<CudaMemory>([&] { return new CudaMemory(d, *shape); }); },
    .release = [](CudaMemory* m) {
      cudaSetDevice(m->device->index);
      delete m;
    },
    .bytes = [](const CudaMemory* m) -> uint64_t { return m->data.bytes() + m->scales.bytes(); },
    .load = [](CudaDevice* d, CudaMemory* const* to, const CudaSource* const* parts, const size_t* part_counts, const char* const* names, size_t count, int32_t (*done)(void*, uint64_t), void* context) {
      return attempt([&] { cuda::load(*d, to, parts, part_counts, names, count, done, context); });
    },
    .read = [](CudaMemory* m, uint64_t offset, void* to, uint64_t bytes) {
      return attempt([&] {
        if (offset > m->data.bytes() || bytes > m->data.bytes() - offset) throw cuda::Error("internal: bytes beyond a state");
        m->device->use();
        cuda::check(cudaMemcpy(to, m->data.data() + offset, bytes, cudaMemcpyDeviceToHost), "reading a state");
      });
    },
    .write = [](CudaMemory* m, uint64_t offset, const void* from, uint64_t bytes) {
      return attempt([&] {
        if (offset > m->data.bytes() || bytes > m->data.bytes() - offset) throw cuda::Error("internal: bytes beyond a state");
        m->device->use();
        cuda::check(cudaMemcpy(m->data.data() + offset, from, bytes, cudaMemcpyHostToDevice), "writing a state");
      });
    },
    .op = [](size_t index) -> const char* {
      const cuda::Entry* e = cuda::entry(index);
      return e ? e->op : nullptr;
    },
    .prepare = [](CudaDevice* d, const CudaPlan* plan) { return made<CudaProgram>([&] { return new CudaProgram(d, *plan); }); },
    .discard = [](CudaProgram* p) { delete p; },
    .run = [](CudaProgram* p, const int64_t* sizes, const CudaSpan* inputs, size_t input_count, const CudaSpan* outputs, size_t output_count, const int32_t* calls, size_t call_count) {
      return attempt([&] { p->run(sizes, inputs, input_count, outputs, output_count, calls, call_count); });
    },
    .seconds = [](const CudaProgram* p, size_t* count) {
      *count = p->seconds().size();
      return p->seconds().data();
    },
};

}  // namespace

extern "C" const CudaInterface* mixtape_cuda() { return &INTERFACE; }
