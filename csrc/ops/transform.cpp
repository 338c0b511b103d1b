#include "ops/transform.h"

#include "ops/device.h"
#include "ops/feature_kernels.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("mod_ids(Tensor ids, int modulus) -> Tensor");
  m.def("multi_hash_ids(Tensor ids, int multiplier, int prime, int buckets) -> Tensor");
  m.def("cross_ids(Tensor x, Tensor y) -> Tensor");
  m.def(
      "bucketize(Tensor values, Tensor boundaries, bool right, bool refuse_nan=False, Tensor? used=None, "
      "Tensor? faults=None) -> Tensor");
  m.def(
      "map_values(Tensor values, int kind, float first, float second, Tensor? used=None, Tensor? faults=None) -> "
      "Tensor");
  m.def("clip_ids(Tensor ids, int least, int most) -> Tensor");
  m.def("cast_to_ids(Tensor values, Tensor? used=None, Tensor? faults=None) -> Tensor");
}

recis::Outcome recis::mod_ids_cpu(const Pool& pool, const ModCall& call, char* reason) {
  return without_exceptions(reason, [&] {
    mod_call(CpuDevice(pool), call);
    return Outcome::kDone;
  });
}

recis::Outcome recis::bucketize_cpu(const Pool& pool, const BucketizeCall& call, char* reason) {
  return without_exceptions(reason, [&] {
    int64_t fault = 0;
    int64_t* const word = &fault;
    bucketize_call(CpuDevice(pool), call, nullptr, 1, &word);
    RECIS_CHECK(fault == 0, "bucketize: element ", fault - 1, " is NaN");
    return Outcome::kDone;
  });
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_transform<recis::CpuDevice>(m); }
