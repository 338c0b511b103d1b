// The XLA FFI handlers of this module, and the kernels that they call.
#pragma once

#include "core/table_kernels.h"
#include "xla/ffi/api/c_api.h"

namespace recis {

// The kernels of the library that the processor needs; null until the module gets them.
inline const TableKernels* cpu_kernels = nullptr;

}  // namespace recis

extern "C" {
XLA_FFI_Error* recis_lookup_cpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* recis_update_cpu(XLA_FFI_CallFrame* frame);
}
