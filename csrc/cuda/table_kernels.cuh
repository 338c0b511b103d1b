// The functions of TableKernels (core/table_kernels.h) on CUDA. They queue kernels, and never wait for the device.
#pragma once

#include "core/table_kernels.h"

namespace recis {

Outcome lookup_device(const Launch& launch, const TableRef& table, const LookupCall& call, char* reason);
Outcome update_device(const Launch& launch, const TableRef& table, const UpdateCall& call, char* reason);

}  // namespace recis
