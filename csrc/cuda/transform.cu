#include "ops/transform.h"

#include "cuda/device.cuh"

STABLE_TORCH_LIBRARY_IMPL(recis, RECIS_DEVICE_KEY, m) { recis::register_transform<recis::CudaDevice>(m); }
