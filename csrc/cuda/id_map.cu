#include "ops/id_map.h"

#include "cuda/device.cuh"

STABLE_TORCH_LIBRARY_IMPL(recis, CUDA, m) { recis::register_id_map<recis::CudaDevice>(m); }
