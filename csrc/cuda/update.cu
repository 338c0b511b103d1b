#include "ops/update.h"

#include "cuda/device.cuh"
#include "cuda/table_kernels.cuh"

recis::Outcome recis::update_device(const Launch& launch, const TableRef& table, const UpdateCall& call, char* reason) {
  return without_exceptions(reason, [&] {
    CudaDevice device(launch);
    update_call(device, table, call, static_cast<CallFlags*>(device.scratch(sizeof(CallFlags))));
    return Outcome::kDone;
  });
}

STABLE_TORCH_LIBRARY_IMPL(recis, RECIS_DEVICE_KEY, m) { recis::register_update<recis::CudaDevice>(m); }
