// What the card can do at most, measured: to compare kernels with.
#pragma once
#include "device.cuh"

namespace cuda {

CudaLimits measure_limits(CudaDevice& device);

}  // namespace cuda
