// Lookups inside jit: the parts that all devices share. Each device inserts rows in its own way: ops/gather.cpp on the
// CPU, cuda/group.cu on CUDA.
#pragma once

#include <vector>

#include "core/table_kernels.h"
#include "ops/gather.h"

namespace recis {

// The features of a lookup without tensors.
struct CallSpans {
  std::vector<IdSpan> ids;
  std::vector<BagSpan> bags;
  std::vector<SourceSpan> sources;
  int64_t positions = 0;
  int64_t vectors = 0;
  bool plain = true;     // whether each id yields one vector
  bool aligned = true;   // whether vectors start at multiples of 16 bytes
  bool streams = false;  // as in GatherBags

  // `counted`: whether positions are those of the ids in use, for which the host must be able to read the offsets.
  CallSpans(const TableRef& table, const LookupCall& call, bool counted) {
    bool aligned64 = table.dim % 16 == 0;
    aligned = table.dim % 4 == 0;
    for (int64_t f = 0; f < call.feature_count; ++f) {
      const FeatureCall& feature = call.features[f];
      const Bags of_feature{feature.offsets, nullptr, static_cast<Combiner>(feature.combiner), 0};
      const int64_t* used = feature.offsets == nullptr ? nullptr : feature.offsets + feature.vectors;
      ids.push_back({positions, feature.ids, feature.member, counted ? nullptr : used});
      bags.push_back({vectors, positions, of_feature, feature.ids, feature.out, nullptr,
                      feature.unknown_zeros ? nullptr : table.initializers + feature.member});
      sources.push_back({vectors, positions, of_feature});
      plain = plain && feature.offsets == nullptr;
      aligned = aligned && reinterpret_cast<uintptr_t>(feature.out) % 16 == 0;
      aligned64 = aligned64 && reinterpret_cast<uintptr_t>(feature.out) % 64 == 0;
      positions += counted && used != nullptr ? *used : feature.length;
      vectors += feature.vectors;
    }
    streams = aligned64 && vectors * table.dim * 4 > kStreamFrom;
  }

  int64_t length(size_t f) const { return (f + 1 < ids.size() ? ids[f + 1].first : positions) - ids[f].first; }
};

// The groups in the context of a training lookup.
inline GroupsRef groups_of(const LookupCall& call) {
  int64_t ids = 0;
  for (int64_t f = 0; f < call.feature_count; ++f) ids += call.features[f].length;
  return GroupsRef::in(call.context, ids, call.scaled != 0);
}

// Refuses a lookup with bad offsets.
template <class Device>
void check_offsets(Device& device, const LookupCall& call, CallFlags* flags) {
  std::vector<OffsetSpan> spans;
  CheckOffsets kernel{};
  for (int64_t f = 0; f < call.feature_count; ++f) {
    const FeatureCall& feature = call.features[f];
    if (feature.offsets == nullptr) continue;
    spans.push_back({kernel.segments.total, feature.offsets, feature.length});
    kernel.segments.total += feature.vectors + 1;
  }
  if (spans.empty()) return;
  device.place(kernel.segments, spans);
  kernel.turn = call.turn;
  kernel.flags = flags;
  device.for_each(kernel.segments.total, 1, kernel);
}

// Writes the token of a lookup and, if it was refused, clears its outputs.
template <class Device>
void end_lookup(Device& device, const TableRef& table, const LookupCall& call, CallFlags* flags) {
  std::vector<OutputSpan> spans;
  ClearOutputs clear{};
  int64_t& total = clear.segments.total;
  int64_t ids = 0;
  for (int64_t f = 0; f < call.feature_count; ++f) {
    const FeatureCall& feature = call.features[f];
    spans.push_back({total, reinterpret_cast<uint32_t*>(feature.out)});
    total += feature.vectors * table.dim;
    ids += feature.length;
  }
  if (call.context != nullptr) {
    spans.push_back({total, reinterpret_cast<uint32_t*>(call.context)});
    total += 2 * Context::words(ids, call.scaled != 0);
  }
  device.place(clear.segments, spans);
  device.for_each(1, 1, EndLookup{call.turn, flags, call.context, call.generation, call.watched, total});
  device.for_each_counted(&flags->cleared, total, 1, clear);
}

// Writes the vectors of a lookup whose rows are known.
template <class Device>
void gather_call(Device& device, const TableRef& table, const CallSpans& spans, const int64_t* rows) {
  gather_spans(device, spans.bags, table.blocks, table.type, table.dim, rows, spans.vectors, spans.aligned,
               spans.streams);
}

// Finds the rows of a lookup, and writes its vectors; changes nothing in the table.
template <class Device>
void find_call(Device& device, const TableRef& table, const CallSpans& spans, int64_t* rows) {
  FindIds<false> find{};
  device.place(find.segments, spans.ids);
  find.segments.total = spans.positions;
  find.map = table.map;
  find.rows = rows;
  device.for_each(spans.positions, 1, find);
  gather_call(device, table, spans, rows);
}

// Marks the rows of a lookup that no update follows as seen.
template <class Device>
void see_call(Device& device, const TableRef& table, const LookupCall& call, const GroupsRef& groups,
              int64_t positions) {
  if (call.watched != 0) return;
  device.for_each_counted(groups.count, positions, 1, SeeRows{table.blocks, groups.unique, groups.starts, call.step});
}

}  // namespace recis
