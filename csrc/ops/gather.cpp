#include "ops/gather.h"

#include "core/distinct.h"
#include "core/insert.h"
#include "ops/group.h"
#include "ops/id_map.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("gather_bags(" RECIS_BLOCKS ", int type, int dim, Tensor rows, " RECIS_FEATURES
        ", Tensor[] ids, int[] members, Tensor initializers, Tensor(a!) out, int[] starts, Tensor(b!)? winners) -> ()");
  m.def("spread_max(Tensor offsets, Tensor winners, Tensor gradient, Tensor(a!) out) -> ()");
  m.def("group_rows(Tensor rows, int[] members, int row_bound, " RECIS_FEATURES ", " RECIS_GROUPS ") -> ()");
  m.def("distinct_ids(Tensor[] ids, int[] kinds, Tensor[] used, int[] owners, int ranks, " RECIS_FEATURES
        ", Tensor(a!) distinct, Tensor(b!) starts, Tensor(c!) sources, Tensor(d!)? scales, Tensor(e!) count, "
        "Tensor(f!) counts, Tensor(g!) places, Tensor(h!) sizes) -> ()");
  m.def("insert_grouped(Tensor(g!) slots, Tensor(h!) counters, Tensor free_rows, " RECIS_BLOCKS_MUT
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

void insert_grouped(const Tensor& slots, const Tensor& counters, const Tensor& free_rows, const Tensor& blocks,
                    int64_t block_shift, int64_t meta_offset, int64_t record_bytes, int64_t type, int64_t dim,
                    const Tensor& initializers, Ints field_offsets, Ints field_widths, Ints field_sizes,
                    Ints field_values, Tensors ids, Ints members, Tensors used, int64_t, Ints lengths, Ints vectors,
                    Tensors offsets, Tensors weights, Ints combiners, Ints tiles, const Tensor& rows,
                    const Tensor& unique, const Tensor& starts, const Tensor& sources,
                    const std::optional<Tensor>& scales, const Tensor& count, const std::optional<Tensor>& out,
                    Ints out_starts) {
  CpuDevice device(slots);
  RECIS_CHECK(used.empty(), "insert_grouped: on the CPU all ids of a tensor are in use; `used` must be empty");
  check_features(rows.numel(), members, lengths);
  std::vector<float*> parts;
  bool streams = false;
  if (out.has_value()) {
    check_plain(*out, out_starts, lengths, vectors, offsets, weights, dim);
    for (const int64_t start : out_starts) parts.push_back(data<float>(*out, "out") + start);
    streams = can_stream(*out, out_starts, rows.numel(), dim);
  }
  // Rows are committed even if an exception ends this call, because every allocated row has its initial values.
  struct Commit {
    int64_t* counters;
    ~Commit() { CommitInserts{counters}(0, OneLane{}); }
  } commit{counter_data(counters)};
  with_element(type, [&](auto element) {
    const InsertKeys<decltype(element)> keys{
        id_map_ref(slots),
        commit.counters,
        data<int64_t>(free_rows, "free_rows"),
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
      TorchPool{}, DistinctInputs{std::move(positions.in), std::move(owners), ranks},
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
