#include "ops/gather.h"

#include "cuda/device.cuh"

STABLE_TORCH_LIBRARY_IMPL(recis, RECIS_DEVICE_KEY, m) { recis::register_gather<recis::CudaDevice>(m); }
