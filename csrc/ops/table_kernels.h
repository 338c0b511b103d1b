// The functions of TableKernels (core/table_kernels.h) on the CPU. Each is defined beside the operators that launch the
// same kernels, so that these are compiled once.
#pragma once

#include "core/table_kernels.h"

namespace recis {

Outcome lookup_cpu(const Launch& launch, const TableRef& table, const LookupCall& call, char* reason);
Outcome update_cpu(const Launch& launch, const TableRef& table, const UpdateCall& call, char* reason);

}  // namespace recis
