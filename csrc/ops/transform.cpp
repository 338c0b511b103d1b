#include "ops/transform.h"

#include "ops/device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("mod_ids(Tensor ids, int modulus) -> Tensor");
  m.def("bucketize(Tensor values, Tensor boundaries, bool right) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_transform<recis::CpuDevice>(m); }
