#include "ops/transform.h"

#include "cuda/device.cuh"

STABLE_TORCH_LIBRARY_IMPL(recis, CUDA, m) { recis::register_transform<recis::CudaDevice>(m); }
