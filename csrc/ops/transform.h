// Element-wise operators of features (kernels: core/transform.h).
#pragma once

#include "core/transform.h"
#include "ops/common.h"

namespace recis {

template <>
inline constexpr ScalarType kTypeOf<double> = ScalarType::Double;

// The modulus is an unsigned number, of which the schema has the bits.
template <class Device>
Tensor mod_ids(const Tensor& ids, int64_t modulus) {
  Device device(ids);
  RECIS_CHECK(modulus != 0, "mod_ids: the modulus must not be 0");
  Tensor out = torch::stable::new_empty(ids, ids.sizes(), ScalarType::Long);
  device.for_each(
      ids.numel(), 1,
      ModIds{data<int64_t>(ids, "ids"), Divisor::of(static_cast<uint64_t>(modulus)), data<int64_t>(out, "out")});
  return out;
}

template <class Device>
Tensor multi_hash_ids(const Tensor& ids, int64_t multiplier, int64_t prime, int64_t buckets) {
  Device device(ids);
  RECIS_CHECK(prime > 0 && buckets > 0, "multi_hash_ids: prime and buckets must be positive, got ", prime, " and ",
              buckets);
  Tensor out = torch::stable::new_empty(ids, ids.sizes(), ScalarType::Long);
  const MultiHash hash{static_cast<uint64_t>(multiplier), Divisor::of(static_cast<uint64_t>(prime)),
                       Divisor::of(static_cast<uint64_t>(buckets))};
  device.for_each(ids.numel(), 1, MultiHashIds{data<int64_t>(ids, "ids"), hash, data<int64_t>(out, "out")});
  return out;
}

template <class Device>
Tensor cross_pairs(const Tensor& x, const Tensor& y) {
  Device device(x);
  RECIS_CHECK(x.numel() == y.numel(), "cross_ids: x and y must be equally many, got ", x.numel(), " and ", y.numel());
  Tensor out = torch::stable::new_empty(x, x.sizes(), ScalarType::Long);
  device.for_each(x.numel(), 1, CrossIds{data<int64_t>(x, "x"), data<int64_t>(y, "y"), data<int64_t>(out, "out")});
  return out;
}

// Raises for the element that a kernel has refused; on CUDA there is none (ops/hash.h says why).
template <class Device>
void raise_refused(const Device& device, int64_t& refused, const char* what, const char* why) {
  const int64_t element = device.items(&refused, 0);
  RECIS_CHECK(element == 0, what, ": element ", element - 1, " ", why);
}

template <class Device>
Tensor bucketize(const Tensor& values, const Tensor& boundaries, bool right, bool refuse_nan) {
  Device device(values);
  RECIS_CHECK(boundaries.dim() == 1, "bucketize takes boundaries [buckets - 1]");
  Tensor out = torch::stable::new_empty(values, values.sizes(), ScalarType::Long);
  int64_t refused = 0;
  const auto launch = [&]<class T, bool kRight>() {
    device.for_each(
        values.numel(), 1,
        Bucketize<T, kRight>{data<T>(values, "values"), data<T>(boundaries, "boundaries"), boundaries.numel(),
                             data<int64_t>(out, "out"), refuse_nan && values.is_cpu() ? &refused : nullptr});
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
  raise_refused(device, refused, "bucketize", "is NaN");
  return out;
}

enum class MapKind : int64_t { kLog = 0, kClip = 1, kNormalize = 2, kFill = 3 };

// One of the maps of core/maps.h over float32 or float64 (and int64 where it clips).
template <class Device>
Tensor map_values(const Tensor& values, int64_t kind, double first, double second) {
  Device device(values);
  Tensor out = torch::stable::empty_like(values);
  int64_t refused = 0;
  const char* why = "is NaN";
  const auto launch = [&]<class T>(auto map) {
    device.for_each(values.numel(), 1,
                    MapValues<decltype(map), T, T>{data<T>(values, "values"), map, data<T>(out, "out"),
                                                   values.is_cpu() ? &refused : nullptr});
  };
  const auto launch_kind = [&]<class T>() {
    const T a = static_cast<T>(first);
    const T b = static_cast<T>(second);
    switch (static_cast<MapKind>(kind)) {
      case MapKind::kLog:
        why = "has no logarithm";
        return launch.template operator()<T>(LogOf<T>{a});
      case MapKind::kClip:
        return launch.template operator()<T>(ClipOf<T>{a, b});
      case MapKind::kNormalize:
        return launch.template operator()<T>(NormalizeOf<T>{a, b});
      case MapKind::kFill:
        return launch.template operator()<T>(FillOf<T>{a});
    }
    RECIS_CHECK(false, "map_values: unknown kind: ", kind);
  };
  if (values.scalar_type() == ScalarType::Float) {
    launch_kind.template operator()<float>();
  } else {
    launch_kind.template operator()<double>();
  }
  raise_refused(device, refused, "map_values", why);
  return out;
}

template <class Device>
Tensor clip_ids(const Tensor& ids, int64_t least, int64_t most) {
  Device device(ids);
  Tensor out = torch::stable::new_empty(ids, ids.sizes(), ScalarType::Long);
  device.for_each(ids.numel(), 1,
                  MapValues<ClipOf<int64_t>, int64_t, int64_t>{
                      data<int64_t>(ids, "ids"), {least, most}, data<int64_t>(out, "out"), nullptr});
  return out;
}

// float32 or float64 to int64, towards zero.
template <class Device>
Tensor cast_to_ids(const Tensor& values) {
  Device device(values);
  Tensor out = torch::stable::new_empty(values, values.sizes(), ScalarType::Long);
  int64_t refused = 0;
  const auto launch = [&]<class T>() {
    device.for_each(
        values.numel(), 1,
        MapValues<CastOf<T, int64_t>, T, int64_t>{
            data<T>(values, "values"), {}, data<int64_t>(out, "out"), values.is_cpu() ? &refused : nullptr});
  };
  if (values.scalar_type() == ScalarType::Float) {
    launch.template operator()<float>();
  } else {
    launch.template operator()<double>();
  }
  raise_refused(device, refused, "cast_to_ids", "is NaN or outside the range of int64");
  return out;
}

template <class Device, class Library>
void register_transform(Library& m) {
  m.impl("mod_ids", TORCH_BOX(&mod_ids<Device>));
  m.impl("multi_hash_ids", TORCH_BOX(&multi_hash_ids<Device>));
  m.impl("cross_ids", TORCH_BOX(&cross_pairs<Device>));
  m.impl("bucketize", TORCH_BOX(&bucketize<Device>));
  m.impl("map_values", TORCH_BOX(&map_values<Device>));
  m.impl("clip_ids", TORCH_BOX(&clip_ids<Device>));
  m.impl("cast_to_ids", TORCH_BOX(&cast_to_ids<Device>));
}

}  // namespace recis
