#include "ops/program.h"

#include "cuda/device.cuh"

STABLE_TORCH_LIBRARY_IMPL(recis, RECIS_DEVICE_KEY, m) { recis::register_program<recis::CudaDevice, false>(m); }
