#include "ops/hash.h"

#include "ops/device.h"
#include "ops/feature_kernels.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("hash_bytes(Tensor values, Tensor offsets, int kind, Tensor? used=None, Tensor? faults=None) -> Tensor");
  m.def("hash_ids(Tensor ids, int kind) -> Tensor");
}

recis::Outcome recis::hash_ids_cpu(const Pool& pool, const HashCall& call, char* reason) {
  return without_exceptions(reason, [&] {
    hash_call(CpuDevice(pool), call);
    return Outcome::kDone;
  });
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_hash<recis::CpuDevice>(m); }
