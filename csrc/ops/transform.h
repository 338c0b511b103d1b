// Element-wise operators of features (kernels: core/transform.h).
#pragma once

#include "core/transform.h"
#include "ops/common.h"

namespace recis {

template <>
inline constexpr ScalarType kTypeOf<double> = ScalarType::Double;

template <class Device>
Tensor mod_ids(const Tensor& ids, int64_t modulus) {
  Device device(ids);
  RECIS_CHECK(modulus > 0, "mod_ids: the modulus must be positive, got ", modulus);
  Tensor out = torch::stable::new_empty(ids, ids.sizes(), ScalarType::Long);
  device.for_each(
      ids.numel(), 1,
      ModIds{data<int64_t>(ids, "ids"), Divisor::of(static_cast<uint64_t>(modulus)), data<int64_t>(out, "out")});
  return out;
}

template <class Device>
Tensor bucketize(const Tensor& values, const Tensor& boundaries, bool right) {
  Device device(values);
  RECIS_CHECK(boundaries.dim() == 1, "bucketize takes boundaries [buckets - 1]");
  Tensor out = torch::stable::new_empty(values, values.sizes(), ScalarType::Long);
  const auto launch = [&]<class T, bool kRight>() {
    device.for_each(values.numel(), 1,
                    Bucketize<T, kRight>{data<T>(values, "values"), data<T>(boundaries, "boundaries"),
                                         boundaries.numel(), data<int64_t>(out, "out")});
  };
  const auto launch_side = [&]<class T>() {
    right ? launch.template operator()<T, true>() : launch.template operator()<T, false>();
  };
  switch (values.scalar_type()) {
    case ScalarType::Long:
      launch_side.template operator()<int64_t>();
      break;
    case ScalarType::Float:
      launch_side.template operator()<float>();
      break;
    default:
      launch_side.template operator()<double>();
  }
  return out;
}

template <class Device, class Library>
void register_transform(Library& m) {
  m.impl("mod_ids", TORCH_BOX(&mod_ids<Device>));
  m.impl("bucketize", TORCH_BOX(&bucketize<Device>));
}

}  // namespace recis
