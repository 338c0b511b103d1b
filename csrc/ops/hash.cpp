#include "ops/hash.h"

#include "ops/device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("hash_bytes(Tensor values, Tensor offsets, int kind, Tensor? used=None, Tensor? faults=None) -> Tensor");
  m.def("hash_ids(Tensor ids, int kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_hash<recis::CpuDevice>(m); }
