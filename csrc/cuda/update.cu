#include "ops/update.h"

#include "cuda/device.cuh"

STABLE_TORCH_LIBRARY_IMPL(recis, CUDA, m) { recis::register_update<recis::CudaDevice>(m); }
