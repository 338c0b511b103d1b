#include "ops/catch_up.h"

#include "cuda/device.cuh"

STABLE_TORCH_LIBRARY_IMPL(recis, RECIS_DEVICE_KEY, m) { recis::register_catch_up<recis::CudaDevice>(m); }
