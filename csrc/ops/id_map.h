// Operators of the IDMap (kernels: core/id_map.h).
#pragma once

#include "core/id_map.h"
#include "ops/common.h"

namespace recis {

// The ids of all features are passed as lists with one element per feature: `ids`, `members` (member tables) and `used`
// (see optional_data), whose last element is the number of ids in use; later positions have no id.
#define RECIS_IDS "Tensor[] ids, int[] members, Tensor[] used"

struct FeatureIds {
  const Tensors& ids;
  const Ints& members;
  const Tensors& used;
};

// The ids of all features; `rows` must hold one element for each. `spans` must outlive the launch.
template <class Device>
Segments<IdSpan> spans_of(Device& device, const FeatureIds& features, const Tensor& rows, std::vector<IdSpan>& spans) {
  RECIS_CHECK(features.ids.size() == features.members.size() && !features.ids.empty(),
              "there must be one member table for each list of ids");
  int64_t total = 0;
  for (size_t f = 0; f < features.ids.size(); ++f) {
    const Tensor& ids = features.ids[f];
    const int64_t* used = optional_data<int64_t>(features.used, f, "used");
    spans.push_back({total, data<int64_t>(ids, "ids"), features.members[f],
                     used == nullptr ? nullptr : used + features.used[f].numel() - 1});
    total += ids.numel();
  }
  RECIS_CHECK(rows.numel() == total, "rows must hold one element for each id");
  Segments<IdSpan> segments{};
  device.place(segments, spans);
  segments.total = total;
  return segments;
}

// The ids to look up in a map, likewise.
template <class Device>
LookUpIds look_up(Device& device, const Tensor& header, const FeatureIds& features, const Tensor& rows,
                  std::vector<IdSpan>& spans) {
  return {spans_of(device, features, rows, spans), id_map_ref(header)};
}

inline int64_t* counter_data(const Tensor& counters) {
  RECIS_CHECK(counters.numel() == kCounters, "counters must be [6]");
  return data<int64_t>(counters, "counters");
}

template <class Device>
void id_map_find(const Tensor& header, Tensors ids, Ints members, Tensors used, bool numbers, const Tensor& rows) {
  Device device(header);
  std::vector<IdSpan> spans;
  const LookUpIds lookup = look_up(device, header, {ids, members, used}, rows, spans);
  int64_t* out = data<int64_t>(rows, "rows");
  if (numbers) {
    device.for_each(rows.numel(), 1, FindIds<true>{lookup, out});
  } else {
    device.for_each(rows.numel(), 1, FindIds<false>{lookup, out});
  }
}

template <class Device>
void id_map_find_or_insert(const Tensor& header, const Tensor& counters, const Tensor& free_rows,
                           const std::optional<Tensor>& admitted, Tensors ids, Ints members, Tensors used,
                           const Tensor& rows, const Tensor& fresh) {
  Device device(header);
  std::vector<IdSpan> spans;
  const LookUpIds lookup = look_up(device, header, {ids, members, used}, rows, spans);
  RECIS_CHECK(fresh.numel() == rows.numel() && (!admitted.has_value() || admitted->numel() == rows.numel()),
              "fresh and admitted must hold one element for each id");
  device.for_each(rows.numel(), 1,
                  FindOrInsertIds{lookup, counter_data(counters), data<int64_t>(free_rows, "free_rows"),
                                  data_or_null<uint8_t>(admitted, "admitted"), data<int64_t>(rows, "rows"),
                                  data<int64_t>(fresh, "fresh")});
}

template <class Device>
void id_map_commit(const Tensor& counters) {
  Device device(counters);
  device.for_each(1, 1, CommitInserts{counter_data(counters)});
}

template <class Device>
void id_map_rehash(const Tensor& header, int64_t slots, const Tensor& fresh_header) {
  Device device(header);
  device.for_each(slots, 1, RehashSlots{id_map_ref(header), id_map_ref(fresh_header, "fresh_header")});
}

template <class Device>
void id_map_move_lines(const Tensor& header, const Tensor& counters, int64_t lines, int64_t first, int64_t end,
                       int64_t last_old, const Tensor& lifted) {
  Device device(header);
  const IdMapRef map = id_map_ref(header);
  const int64_t room = lifted.numel() / static_cast<int64_t>(2 * kLineSlots);
  RECIS_CHECK(0 <= first && first < end && end <= lines && end - first < room, "there is no room for lines ", first,
              " to ", end);
  auto* copies = reinterpret_cast<uint64_t*>(data<int64_t>(lifted, "lifted"));
  int64_t* counts = counter_data(counters);
  constexpr int64_t kLineBytes = 16 * kLineSlots;
  const auto word = [](int64_t number) { return static_cast<uint64_t>(number); };
  device.for_each(1, 1, PrepareMove{map.header, word(lines), word(first), word(end), word(last_old), word(room)});
  const auto* count = reinterpret_cast<const int64_t*>(map.header + kMoveCount);
  device.for_each_counted(count, room, kLineBytes, LiftLines{map, copies, counts});
  device.for_each_counted(count, room, kLineBytes, PlaceLines{map, copies});
}

template <class Device>
void id_map_list(const Tensor& header, int64_t slots, const Tensor& ids, const Tensor& members, const Tensor& rows,
                 const Tensor& numbers, const Tensor& count) {
  Device device(header);
  device.for_each(
      slots, 1,
      ListIds{id_map_ref(header), data<int64_t>(ids, "ids"), data<int64_t>(members, "members"),
              data<int64_t>(rows, "rows"), data<int64_t>(numbers, "numbers"), data<int64_t>(count, "count")});
}

template <class Device>
void id_map_list_marked(const Tensor& header, int64_t slots, const Tensor& marks, const Tensor& ids,
                        const Tensor& members, const Tensor& count) {
  Device device(header);
  RECIS_CHECK(ids.numel() == members.numel(), "ids and members must have equal sizes");
  device.for_each(slots, 1,
                  ListMarked{id_map_ref(header), data<uint8_t>(marks, "marks"), data<int64_t>(ids, "ids"),
                             data<int64_t>(members, "members"), data<int64_t>(count, "count")});
}

template <class Device>
void id_map_erase(const Tensor& header, const Tensor& numbers, const Tensor& counters,
                  const std::optional<Tensor>& free_rows) {
  Device device(header);
  device.for_each(numbers.numel(), 1,
                  EraseSlots{id_map_ref(header), data<int64_t>(numbers, "numbers"), counter_data(counters),
                             data_or_null<int64_t>(free_rows, "free_rows")});
}

template <class Device>
void id_map_set(const Tensor& header, const Tensor& numbers, const Tensor& rows) {
  Device device(header);
  RECIS_CHECK(numbers.numel() == rows.numel(), "there must be one row for each slot");
  device.for_each(numbers.numel(), 1,
                  SetRows{id_map_ref(header), data<int64_t>(numbers, "numbers"), data<int64_t>(rows, "rows")});
}

template <class Device>
void id_map_count(const Tensor& header, const Tensor& counters, Tensors ids, Ints members, Tensors used,
                  const Tensor& rows, const std::optional<Tensor>& counts) {
  Device device(header);
  std::vector<IdSpan> spans;
  const LookUpIds lookup = look_up(device, header, {ids, members, used}, rows, spans);
  RECIS_CHECK(!counts.has_value() || counts->numel() == rows.numel(), "counts must hold one element for each id");
  device.for_each(
      rows.numel(), 1,
      CountIds{lookup, counter_data(counters), data<int64_t>(rows, "rows"), data_or_null<int64_t>(counts, "counts")});
}

template <class Device>
void id_map_admit(const Tensor& header, Tensors ids, Ints members, Tensors used, const Tensor& rows, int64_t least,
                  const Tensor& admitted) {
  Device device(header);
  std::vector<IdSpan> spans;
  const LookUpIds lookup = look_up(device, header, {ids, members, used}, rows, spans);
  RECIS_CHECK(admitted.numel() == rows.numel(), "admitted must hold one element for each id");
  device.for_each(rows.numel(), 1,
                  AdmitCounted{lookup, data<int64_t>(rows, "rows"), least, data<uint8_t>(admitted, "admitted")});
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
  m.impl("id_map_commit", TORCH_BOX(&id_map_commit<Device>));
  m.impl("id_map_rehash", TORCH_BOX(&id_map_rehash<Device>));
  m.impl("id_map_move_lines", TORCH_BOX(&id_map_move_lines<Device>));
  m.impl("id_map_list", TORCH_BOX(&id_map_list<Device>));
  m.impl("id_map_list_marked", TORCH_BOX(&id_map_list_marked<Device>));
  m.impl("id_map_erase", TORCH_BOX(&id_map_erase<Device>));
  m.impl("id_map_set", TORCH_BOX(&id_map_set<Device>));
  m.impl("id_map_count", TORCH_BOX(&id_map_count<Device>));
  m.impl("id_map_admit", TORCH_BOX(&id_map_admit<Device>));
  m.impl("bucket_ids", TORCH_BOX(&bucket_ids<Device>));
}

}  // namespace recis
