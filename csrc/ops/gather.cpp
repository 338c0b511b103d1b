#include "ops/gather.h"

#include <algorithm>
#include <numeric>
#include <unordered_set>

#include "core/distinct.h"
#include "core/insert.h"
#include "ops/feature_kernels.h"
#include "ops/group.h"
#include "ops/id_map.h"
#include "ops/lookup_call.h"
#include "ops/table_kernels.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("gather_bags(" RECIS_BLOCKS ", int type, int dim, Tensor rows, " RECIS_FEATURES
        ", Tensor[] ids, int[] members, Tensor initializers, Tensor(a!) out, int[] starts, Tensor(b!)? winners) -> ()");
  m.def("spread_max(Tensor offsets, Tensor winners, Tensor gradient, Tensor(a!) out) -> ()");
  m.def("group_rows(Tensor rows, int[] members, int row_bound, " RECIS_FEATURES ", " RECIS_GROUPS ") -> ()");
  m.def("distinct_ids(Tensor[] ids, int[] kinds, Tensor[] used, int[] owners, int ranks, " RECIS_FEATURES
        ", Tensor(a!) distinct, Tensor(b!) starts, Tensor(c!) sources, Tensor(d!)? scales, Tensor(e!) count, "
        "Tensor(f!) counts, Tensor(g!) places, Tensor(h!) sizes) -> ()");
  m.def("insert_grouped(Tensor(g!) header, Tensor(h!) counters, Tensor free_rows, " RECIS_BLOCKS_MUT
        ", int type, int dim, Tensor initializers, int[] field_offsets, int[] field_widths, int[] field_sizes, int[] "
        "field_values, " RECIS_IDS ", int row_bound, " RECIS_FEATURES ", Tensor(i!) rows, " RECIS_GROUPS
        ", Tensor(j!)? out=None, int[] out_starts=[]) -> ()");
}

namespace recis {

void group_rows(const Tensor& rows, Ints members, int64_t, Ints lengths, Ints vectors, Tensors offsets, Tensors weights,
                Ints combiners, Ints tiles, const Tensor& unique, const Tensor& starts, const Tensor& sources,
                const std::optional<Tensor>& scales, const Tensor& count) {
  CpuDevice device(rows);
  check_features(rows.numel(), members, lengths);
  const int64_t* at = data<int64_t>(rows, "rows");
  std::vector<KeySpan> features;
  for (size_t f = 0; f < lengths.size(); ++f) {
    features.push_back({at, lengths[f], members[f]});
    at += lengths[f];
  }
  group_positions(device, RowsAsKeys{}, std::move(features), lengths, vectors, offsets, weights, combiners, tiles,
                  nullptr, unique, starts, sources, scales, count);
}

void insert_grouped(const Tensor& header, const Tensor& counters, const Tensor& free_rows, const Tensor& blocks,
                    int64_t block_shift, int64_t meta_offset, int64_t record_bytes, int64_t type, int64_t dim,
                    const Tensor& initializers, Ints field_offsets, Ints field_widths, Ints field_sizes,
                    Ints field_values, Tensors ids, Ints members, Tensors used, int64_t, Ints lengths, Ints vectors,
                    Tensors offsets, Tensors weights, Ints combiners, Ints tiles, const Tensor& rows,
                    const Tensor& unique, const Tensor& starts, const Tensor& sources,
                    const std::optional<Tensor>& scales, const Tensor& count, const std::optional<Tensor>& out,
                    Ints out_starts) {
  CpuDevice device(header);
  RECIS_CHECK(used.empty(), "insert_grouped: on the CPU all ids of a tensor are in use; `used` must be empty");
  check_features(rows.numel(), members, lengths);
  std::vector<float*> parts;
  bool streams = false;
  if (out.has_value()) {
    check_plain(*out, out_starts, lengths, vectors, offsets, weights, dim);
    for (const int64_t start : out_starts) parts.push_back(data<float>(*out, "out") + start);
    streams = can_stream(*out, out_starts, rows.numel(), dim);
  }
  const InsertCommit commit{counter_data(counters)};
  with_element(type, [&](auto element) {
    const InsertKeys<decltype(element)> keys{
        {id_map_ref(header), commit.counters, data<int64_t>(free_rows, "free_rows")},
        blocks_ref(blocks, block_shift, meta_offset, record_bytes),
        initializer_data(initializers),
        record_start(dim, field_offsets, field_widths, field_sizes, field_values),
        PlainOutputs{parts.empty() ? nullptr : parts.data(), dim, streams},
    };
    group_positions(device, keys, key_spans(ids, lengths, members), lengths, vectors, offsets, weights, combiners,
                    tiles, data<int64_t>(rows, "rows"), unique, starts, sources, scales, count);
  });
  RECIS_CHECK(commit.counters[kOverflow] == 0, "insert_grouped: the IDMap is full; its caller must reserve slots");
}

namespace {

// Whether a table has room for the new ids of a lookup. Counting them exactly takes a pass over all ids, which is
// needed only if there might not be room for all ids of the lookup.
bool has_room(const TableRef& table, const CallSpans& spans) {
  const int64_t* counters = table.counters;
  const int64_t rows = table.max_rows - counters[kRows] + counters[kFree];
  const int64_t room = std::min(rows, table.max_slots - counters[kUsedSlots]);
  if (spans.positions <= room) return true;
  std::vector<std::unordered_set<int64_t>> unknown;
  int64_t count = 0;
  for (size_t f = 0; f < spans.ids.size(); ++f) {
    const IdSpan& span = spans.ids[f];
    const int64_t end = span.first + spans.length(f);
    if (unknown.size() <= static_cast<size_t>(span.member)) unknown.resize(span.member + 1);
    for (int64_t i = span.first; i < end; ++i) {
      const int64_t id = span.id(i);
      if (find_slot(table.map, id, span.member).slot == nullptr && unknown[span.member].insert(id).second) ++count;
    }
  }
  return count <= room;
}

void insert_call(CpuDevice& device, const TableRef& table, const LookupCall& call, const CallSpans& spans) {
  const GroupsRef groups = groups_of(call);
  GroupInputs in{};
  std::vector<float*> outputs;
  for (int64_t f = 0; f < call.feature_count; ++f) {
    const FeatureCall& feature = call.features[f];
    in.features.push_back({feature.ids, spans.length(static_cast<size_t>(f)), feature.member});
    outputs.push_back(feature.out);
  }
  const int64_t n = spans.positions;
  std::unique_ptr<int64_t[]> sources;
  std::unique_ptr<float[]> scales;
  std::unique_ptr<int64_t[]> rows;
  if (!spans.plain) {
    sources = detail::room<int64_t>(n);
    rows = detail::room<int64_t>(n);
    if (groups.scales != nullptr) scales = detail::room<float>(n);
    fill_sources(device, spans.sources, spans.vectors, sources.get(), scales.get());
    in.sources = sources.get();
    in.scales = scales.get();
  }
  {
    const InsertCommit commit{table.counters};
    with_element(table.type, [&](auto element) {
      const InsertKeys<decltype(element)> keys{
          {table.map, table.counters, table.free_rows},
          table.blocks,
          table.initializers,
          table.start,
          PlainOutputs{spans.plain ? outputs.data() : nullptr, table.dim, spans.streams},
      };
      group_cpu(device.threads(), in, keys,
                GroupOutputs{rows.get(), groups.unique, groups.starts, groups.sources, groups.scales, groups.count});
    });
  }
  if (!spans.plain) gather_call(device, table, spans, rows.get());
  see_call(device, table, call, groups, n);
}

}  // namespace

Outcome lookup_cpu(const Launch& launch, const TableRef& table, const LookupCall& call, char* reason) {
  return without_exceptions(reason, [&] {
    CpuDevice device(*launch.pool);
    CallFlags flags;
    device.for_each(1, 1, StartLookup{call.turn, &flags});
    device.unless(&flags.refused, [&] { check_offsets(device, call, &flags); });
    device.unless(&flags.refused, [&] {
      const CallSpans spans(table, call, true);
      if (call.context == nullptr) {
        const auto rows = detail::room<int64_t>(spans.positions);
        find_call(device, table, spans, rows.get());
      } else if (has_room(table, spans)) {
        insert_call(device, table, call, spans);
      } else {
        call.turn.fail(Status::kNoRoom);
        flags.refused = 1;
      }
    });
    end_lookup(device, table, call, &flags);
    return Outcome::kDone;
  });
}

Outcome combine_bags_cpu(const Pool& pool, const BagsCall& call, const float* values, float* out, int32_t* winners,
                         char* reason) {
  return without_exceptions(reason, [&] {
    check_bags(call);
    if (call.dim == 0) return Outcome::kDone;
    CpuDevice device(pool);
    const auto numbers = detail::room<int64_t>(call.rows);
    std::iota(numbers.get(), numbers.get() + call.rows, int64_t{0});
    const auto address = static_cast<int64_t>(reinterpret_cast<intptr_t>(values));
    combine_call(device, call, &address, numbers.get(), out, winners);
    return Outcome::kDone;
  });
}

Outcome spread_bags_cpu(const Pool& pool, const BagsCall& call, const float* gradients, const int32_t* winners,
                        float* out, char* reason) {
  return without_exceptions(reason, [&] {
    check_bags(call);
    // Rows outside all bags.
    std::fill(out, out + call.offsets[0] * call.dim, 0.0f);
    std::fill(out + call.offsets[call.bags] * call.dim, out + call.rows * call.dim, 0.0f);
    spread_call(CpuDevice(pool), call, gradients, winners, out);
    return Outcome::kDone;
  });
}

void distinct_ids(Tensors ids, Ints kinds, Tensors used, Ints owners, int64_t ranks, Ints lengths, Ints vectors,
                  Tensors offsets, Tensors weights, Ints combiners, Ints tiles, const Tensor& distinct,
                  const Tensor& starts, const Tensor& sources, const std::optional<Tensor>& scales, const Tensor& count,
                  const Tensor& counts, const Tensor& places, const Tensor& sizes) {
  CpuDevice device(distinct);
  RECIS_CHECK(used.empty(), "distinct_ids: on the CPU all ids of a tensor are in use; `used` must be empty");
  check_distinct(kinds, owners, ranks, lengths, distinct, starts, sources, counts, places, sizes);
  float* factors = data_or_null<float>(scales, "scales");
  Positions positions(device, key_spans(ids, lengths, kinds), lengths, vectors, offsets, weights, combiners, tiles,
                      factors != nullptr);
  distinct_cpu(
      device.threads(), DistinctInputs{std::move(positions.in), std::move(owners), ranks},
      DistinctOutputs{data<int64_t>(distinct, "distinct"), data<int64_t>(counts, "counts"),
                      data<int64_t>(places, "places"), data<int64_t>(sizes, "sizes"), data<int64_t>(starts, "starts"),
                      data<int64_t>(sources, "sources"), factors, data<int64_t>(count, "count")});
}

}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) {
  m.impl("distinct_ids", TORCH_BOX(&recis::distinct_ids));
  recis::register_gather<recis::CpuDevice>(m);
  m.impl("group_rows", TORCH_BOX(&recis::group_rows));
  m.impl("insert_grouped", TORCH_BOX(&recis::insert_grouped));
}
