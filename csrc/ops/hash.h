// Operators that hash strings and ids (kernels: core/hash.h).
#pragma once

#include "core/feature_kernels.h"
#include "core/hash.h"
#include "ops/common.h"
#include "ops/fault_word.h"

namespace recis {

// Like with_hasher (core/hash.h), but raises if there is no such kind.
template <class F>
void with_known_hasher(int64_t kind, F&& f) {
  RECIS_CHECK(with_hasher(kind, f), "unknown kind of hash: ", kind);
}

template <class Device>
Tensor hash_bytes(const Tensor& values, const Tensor& offsets, int64_t kind, const std::optional<Tensor>& used,
                  const std::optional<Tensor>& faults) {
  Device device(values);
  RECIS_CHECK(values.dim() == 1 && offsets.dim() == 1 && offsets.numel() > 0,
              "hash_bytes takes values [bytes] and offsets [rows + 1]");
  const int64_t rows = offsets.numel() - 1;
  const int64_t sizes[] = {rows};
  Tensor out = torch::stable::new_empty(values, {sizes, 1}, ScalarType::Long);
  RECIS_CHECK(!used.has_value() || used->numel() > 0, "hash_bytes: used must not be empty");
  const int64_t* counts = data_or_null<int64_t>(used, "used");
  if (counts != nullptr) counts += used->numel() - 1;
  const FaultWord refused(values, faults);
  with_known_hasher(kind, [&](auto hasher) {
    device.for_each(
        rows, 1,
        HashBytes<decltype(hasher)>{data<uint8_t>(values, "values"), values.numel(), data<int64_t>(offsets, "offsets"),
                                    data<int64_t>(out, "out"), counts, refused.word()});
  });
  RECIS_CHECK(refused.fault() == 0, "hash_bytes: the offsets of row ", refused.fault() - 1,
              " decrease or lie outside the ", values.numel(), " bytes");
  return out;
}

template <class Device>
void hash_call(const Device& device, const HashCall& call) {
  with_known_hasher(
      call.kind, [&](auto hasher) { device.for_each(call.count, 1, HashIds<decltype(hasher)>{call.ids, call.out}); });
}

template <class Device>
Tensor hash_ids(const Tensor& ids, int64_t kind) {
  Device device(ids);
  Tensor out = torch::stable::new_empty(ids, ids.sizes(), ScalarType::Long);
  hash_call(device, {kind, data<int64_t>(ids, "ids"), ids.numel(), data<int64_t>(out, "out")});
  return out;
}

template <class Device, class Library>
void register_hash(Library& m) {
  m.impl("hash_bytes", TORCH_BOX(&hash_bytes<Device>));
  m.impl("hash_ids", TORCH_BOX(&hash_ids<Device>));
}

}  // namespace recis
