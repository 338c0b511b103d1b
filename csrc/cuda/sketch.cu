#include "ops/sketch.h"

#include "cuda/device.cuh"

STABLE_TORCH_LIBRARY_IMPL(recis, RECIS_DEVICE_KEY, m) { recis::register_sketch<recis::CudaDevice>(m); }
