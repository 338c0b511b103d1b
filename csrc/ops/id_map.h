// Operators of the IDMap (kernels: core/id_map.h).
#pragma once

#include "core/id_map.h"
#include "ops/common.h"

namespace recis {

// The ids of all features, end to end. `spans` is the caller's, since a launch may read it in place.
template <class Device>
Segments<IdSpan> id_segments(Device& device, const Tensors& ids, const Ints& members, std::vector<IdSpan>& spans) {
  RECIS_CHECK(ids.size() == members.size() && !ids.empty(), "one member table for each list of ids");
  int64_t total = 0;
  for (size_t f = 0; f < ids.size(); ++f) {
    spans.push_back({total, data<int64_t>(ids[f], "ids"), members[f]});
    total += ids[f].numel();
  }
  Segments<IdSpan> segments;
  device.place(segments, spans);
  segments.total = total;
  return segments;
}

template <class Device>
void id_map_find(const Tensor& slots, Tensors ids, Ints members, const Tensor& rows) {
  Device device(slots);
  std::vector<IdSpan> spans;
  const auto segments = id_segments(device, ids, members, spans);
  RECIS_CHECK(rows.numel() == segments.total, "rows must hold one element for each id");
  device.for_each(segments.total, 1, FindIds{segments, id_map_ref(slots), data<int64_t>(rows, "rows")});
}

template <class Device>
void id_map_find_or_insert(const Tensor& slots, const Tensor& counters, Tensors ids, Ints members, const Tensor& rows,
                           const Tensor& fresh) {
  Device device(slots);
  std::vector<IdSpan> spans;
  const auto segments = id_segments(device, ids, members, spans);
  RECIS_CHECK(rows.numel() == segments.total && fresh.numel() == segments.total,
              "rows and fresh must hold one element for each id");
  device.for_each(segments.total, 1,
                  FindOrInsertIds{segments, id_map_ref(slots), data<int64_t>(counters, "counters"),
                                  data<int64_t>(rows, "rows"), data<int64_t>(fresh, "fresh")});
}

template <class Device>
void id_map_rehash(const Tensor& slots, const Tensor& grown) {
  Device device(slots);
  device.for_each(slots.size(0), 1, RehashSlots{id_map_ref(slots).slots, id_map_ref(grown)});
}

template <class Device>
void id_map_list(const Tensor& slots, int64_t member, const Tensor& ids, const Tensor& rows, const Tensor& count) {
  Device device(slots);
  device.for_each(slots.size(0), 1,
                  ListIds{id_map_ref(slots).slots, member, data<int64_t>(ids, "ids"), data<int64_t>(rows, "rows"),
                          data<int64_t>(count, "count")});
}

template <class Device>
void bucket_ids(const Tensor& ids, const Tensor& buckets) {
  Device device(ids);
  RECIS_CHECK(ids.numel() == buckets.numel(), "buckets must hold one element for each id");
  device.for_each(ids.numel(), 1, BucketIds{data<int64_t>(ids, "ids"), data<int64_t>(buckets, "buckets")});
}

template <class Device, class Library>
void register_id_map(Library& m) {
  m.impl("id_map_find", TORCH_BOX(&id_map_find<Device>));
  m.impl("id_map_find_or_insert", TORCH_BOX(&id_map_find_or_insert<Device>));
  m.impl("id_map_rehash", TORCH_BOX(&id_map_rehash<Device>));
  m.impl("bucket_ids", TORCH_BOX(&bucket_ids<Device>));
  m.impl("id_map_list", TORCH_BOX(&id_map_list<Device>));
}

}  // namespace recis
