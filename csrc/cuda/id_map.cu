#include "ops/id_map.h"

#include "cuda/device.cuh"

STABLE_TORCH_LIBRARY_IMPL(recis, RECIS_DEVICE_KEY, m) { recis::register_id_map<recis::CudaDevice>(m); }
