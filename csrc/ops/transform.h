// Element-wise operators of features (kernels: core/transform.h).
#pragma once

#include "core/feature_kernels.h"
#include "core/transform.h"
#include "ops/common.h"
#include "ops/fault_word.h"

namespace recis {

template <>
inline constexpr ScalarType kTypeOf<double> = ScalarType::Double;

// Applies a map of core/maps.h that has a result for every element.
template <class In, class Out, class Device, class Map>
void apply_map(Device& device, const Tensor& values, const Map& map, const Tensor& out) {
  device.for_each(values.numel(), 1,
                  MapValues<Map, In, Out>{data<In>(values, "values"), map, data<Out>(out, "out"), nullptr, 1, nullptr});
}

// How an operator refuses elements. The last element of `used` is the number of rows in use, for callers that only know
// a bound; elements after these rows are never refused.
struct Refusal {
  const char* name;  // of the operator
  const char* why;
  const std::optional<Tensor>& used;
  const std::optional<Tensor>& faults;  // see ops/fault_word.h
};

// Calls launch(used, width, fault) with the arguments of a kernel that refuses elements (see MapValues), and raises on
// the CPU if it has refused one.
template <class F>
void refusing(const Tensor& values, const Refusal& refusal, F&& launch) {
  const FaultWord refused(values, refusal.faults);
  RECIS_CHECK(!refusal.used.has_value() || refusal.used->numel() > 0, refusal.name, ": used must not be empty");
  const int64_t* rows = data_or_null<int64_t>(refusal.used, "used");
  if (rows != nullptr) rows += refusal.used->numel() - 1;
  launch(rows, values.dim() > 0 && values.size(0) > 0 ? values.numel() / values.size(0) : 1, refused.word());
  RECIS_CHECK(refused.fault() == 0, refusal.name, ": element ", refused.fault() - 1, " ", refusal.why);
}

// Applies a map of core/maps.h, and raises on the CPU for an element that it refuses.
template <class In, class Out, class Device, class Map>
void apply_map(Device& device, const Tensor& values, const Map& map, const Tensor& out, const Refusal& refusal) {
  refusing(values, refusal, [&](const int64_t* rows, int64_t width, int64_t* const* fault) {
    device.for_each(
        values.numel(), 1,
        MapValues<Map, In, Out>{data<In>(values, "values"), map, data<Out>(out, "out"), rows, width, fault});
  });
}

inline Tensor new_ids(const Tensor& like) { return torch::stable::new_empty(like, like.sizes(), ScalarType::Long); }

// Calls f with the type of integer results.
template <class F>
void with_integers(NumberType type, F&& f) {
  if (type == NumberType::kInt32) return f.template operator()<int32_t>();
  RECIS_CHECK(type == NumberType::kInt64, "results must be int64 or int32");
  f.template operator()<int64_t>();
}

template <class Device>
void mod_call(const Device& device, const ModCall& call) {
  RECIS_CHECK(call.modulus != 0, "mod_ids: the modulus must not be 0");
  with_integers(call.out_type, [&]<class Out>() {
    device.for_each(call.count, 1,
                    MapValues<ModOf, int64_t, Out>{call.ids, ModOf{Divisor::of(call.modulus)},
                                                   static_cast<Out*>(call.out), nullptr, 1, nullptr});
  });
}

// `modulus` holds the bits of an unsigned integer.
template <class Device>
Tensor mod_ids(const Tensor& ids, int64_t modulus) {
  Device device(ids);
  Tensor out = new_ids(ids);
  mod_call(device, {static_cast<uint64_t>(modulus), data<int64_t>(ids, "ids"), ids.numel(), data<int64_t>(out, "out"),
                    NumberType::kInt64});
  return out;
}

template <class Device>
Tensor multi_hash_ids(const Tensor& ids, int64_t multiplier, int64_t prime, int64_t buckets) {
  Device device(ids);
  RECIS_CHECK(prime > 0 && buckets > 0, "multi_hash_ids: prime and buckets must be positive, got ", prime, " and ",
              buckets);
  Tensor out = new_ids(ids);
  const MultiHash hash{static_cast<uint64_t>(multiplier), Divisor::of(static_cast<uint64_t>(prime)),
                       Divisor::of(static_cast<uint64_t>(buckets))};
  apply_map<int64_t, int64_t>(device, ids, MultiHashOf{hash}, out);
  return out;
}

template <class Device>
Tensor cross_pairs(const Tensor& x, const Tensor& y) {
  Device device(x);
  RECIS_CHECK(x.numel() == y.numel(), "cross_ids: x and y must hold the same number of ids, got ", x.numel(), " and ",
              y.numel());
  Tensor out = new_ids(x);
  device.for_each(x.numel(), 1, CrossIds{data<int64_t>(x, "x"), data<int64_t>(y, "y"), data<int64_t>(out, "out")});
  return out;
}

// Finds buckets. The other arguments are those of MapValues; elements are refused only if call.refuse_nan.
template <class Device>
void bucketize_call(const Device& device, const BucketizeCall& call, const int64_t* used, int64_t width,
                    int64_t* const* fault) {
  const auto launch = [&]<class T, class Out, bool kRight>() {
    using Map = BucketOf<T, kRight>;
    device.for_each(
        call.count, 1,
        MapValues<Map, T, Out>{static_cast<const T*>(call.values),
                               Map{static_cast<const T*>(call.boundaries), call.boundary_count},
                               static_cast<Out*>(call.out), used, width, call.refuse_nan ? fault : nullptr});
  };
  const auto find = [&]<class T>() {
    with_integers(call.out_type, [&]<class Out>() {
      if (call.right) {
        launch.template operator()<T, Out, true>();
      } else {
        launch.template operator()<T, Out, false>();
      }
    });
  };
  switch (call.type) {
    case NumberType::kFloat32:
      return find.template operator()<float>();
    case NumberType::kFloat64:
      return find.template operator()<double>();
    case NumberType::kInt64:
      return find.template operator()<int64_t>();
    default:
      RECIS_CHECK(false, "bucketize: values must be int64, float32 or float64");
  }
}

// Refuses NaN only if `refuse_nan`.
template <class Device>
Tensor bucketize(const Tensor& values, const Tensor& boundaries, bool right, bool refuse_nan,
                 const std::optional<Tensor>& used, const std::optional<Tensor>& faults) {
  Device device(values);
  RECIS_CHECK(boundaries.dim() == 1, "bucketize takes boundaries [buckets - 1]");
  Tensor out = new_ids(values);
  const Refusal refusal{"bucketize", "is NaN", used, faults};
  const auto find = [&]<class T>(NumberType type) {
    const BucketizeCall call{data<T>(values, "values"),
                             data<T>(boundaries, "boundaries"),
                             values.numel(),
                             boundaries.numel(),
                             data<int64_t>(out, "out"),
                             type,
                             NumberType::kInt64,
                             right,
                             refuse_nan};
    if (!refuse_nan) return bucketize_call(device, call, nullptr, 1, nullptr);
    refusing(values, refusal, [&](const int64_t* rows, int64_t width, int64_t* const* fault) {
      bucketize_call(device, call, rows, width, fault);
    });
  };
  switch (values.scalar_type()) {
    case ScalarType::Long:
      find.template operator()<int64_t>(NumberType::kInt64);
      break;
    case ScalarType::Float:
      find.template operator()<float>(NumberType::kFloat32);
      break;
    default:
      find.template operator()<double>(NumberType::kFloat64);
  }
  return out;
}

enum class MapKind : int64_t { kLog = 0, kClip = 1, kNormalize = 2, kFill = 3 };

// One of the maps of core/maps.h over float32 or float64.
template <class Device>
Tensor map_values(const Tensor& values, int64_t kind, double first, double second, const std::optional<Tensor>& used,
                  const std::optional<Tensor>& faults) {
  Device device(values);
  Tensor out = torch::stable::empty_like(values);
  const auto launch = [&]<class T>() {
    const T a = static_cast<T>(first);
    const T b = static_cast<T>(second);
    const auto apply = [&](const auto& map, const char* why) {
      apply_map<T, T>(device, values, map, out, {"map_values", why, used, faults});
    };
    switch (static_cast<MapKind>(kind)) {
      case MapKind::kLog:
        return apply(LogOf<T>{a}, "has no logarithm");
      case MapKind::kClip:
        return apply(ClipOf<T>{a, b}, "is NaN");
      case MapKind::kNormalize:
        return apply(NormalizeOf<T>{a, b}, "is NaN");
      case MapKind::kFill:
        return apply_map<T, T>(device, values, FillOf<T>{a}, out);
    }
    RECIS_CHECK(false, "map_values: unknown kind: ", kind);
  };
  if (values.scalar_type() == ScalarType::Float) {
    launch.template operator()<float>();
  } else {
    launch.template operator()<double>();
  }
  return out;
}

template <class Device>
Tensor clip_ids(const Tensor& ids, int64_t least, int64_t most) {
  Device device(ids);
  Tensor out = new_ids(ids);
  apply_map<int64_t, int64_t>(device, ids, ClipOf<int64_t>{least, most}, out);
  return out;
}

// float32 or float64 to int64, truncated toward zero.
template <class Device>
Tensor cast_to_ids(const Tensor& values, const std::optional<Tensor>& used, const std::optional<Tensor>& faults) {
  Device device(values);
  Tensor out = new_ids(values);
  const auto launch = [&]<class T>() {
    apply_map<T, int64_t>(device, values, CastOf<T, int64_t>{}, out,
                          {"cast_to_ids", "is NaN or outside the range of int64", used, faults});
  };
  if (values.scalar_type() == ScalarType::Float) {
    launch.template operator()<float>();
  } else {
    launch.template operator()<double>();
  }
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
