// Loading weights to the card. See `load` in interface.h.
#pragma once
#include "device.cuh"

namespace cuda {

void load(CudaDevice& device, CudaMemory* const* to, const CudaSource* const* parts, const size_t* part_counts, const char* const* names, size_t count,
          int32_t (*done)(void*, uint64_t), void* context);

}  // namespace cuda
