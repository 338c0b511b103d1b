// The XLA FFI handlers of this module, and the feature kernels that they call.
#pragma once

#include "core/feature_kernels.h"
#include "xla/ffi/api/c_api.h"

namespace recis {

// The feature kernels of the library that the processor needs; null until the module gets them.
inline const FeatureKernels* cpu_features = nullptr;

}  // namespace recis

extern "C" {
XLA_FFI_Error* recis_lookup_cpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* recis_update_cpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* recis_lookup_cuda(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* recis_update_cuda(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* recis_hash_ids_cpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* recis_mod_ids_cpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* recis_bucketize_cpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* recis_combine_bags_cpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* recis_spread_bags_cpu(XLA_FFI_CallFrame* frame);
}
