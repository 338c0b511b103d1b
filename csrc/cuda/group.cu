// Grouping of equal rows on CUDA; core/group.h is its CPU counterpart. CUB's radix sort is stable, so input order is
// kept within a row. Positions fit into 32 bits, and so do rows as a rule: the sort then moves half the bytes.
#include "core/bounded_insert.h"
#include "cuda/device.cuh"
#include "cuda/sort.cuh"
#include "cuda/table_kernels.cuh"
#include "ops/gather.h"
#include "ops/id_map.h"
#include "ops/lookup_call.h"

namespace recis {
namespace {

// Positions without a row are sorted to the end, as a last group.
template <class Key>
struct NumberPositions {
  const int64_t* rows;
  int64_t row_bound;
  Key* keys;
  uint32_t* positions;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    keys[i] = static_cast<Key>(rows[i] < 0 ? row_bound : rows[i]);
    positions[i] = static_cast<uint32_t>(i);
  }
};

// Excludes that last group from the count.
struct DropLastGroup {
  const int64_t* unique;
  int64_t row_bound;
  int64_t* count;

  template <class Lanes>
  RECIS_HD void operator()(int64_t, Lanes lanes) const {
    if (lanes.rank == 0 && unique[*count - 1] == row_bound) --*count;
  }
};

struct PermuteSources {
  const uint32_t* order;
  const int64_t* sources;
  const float* scales;
  int64_t* grouped_sources;
  float* grouped_scales;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    grouped_sources[i] = sources[order[i]];
    if (scales != nullptr) grouped_scales[i] = scales[order[i]];
  }
};

// Sorts the positions by row into `order`, and finds the distinct rows and where their positions begin.
template <class Key>
void sort_rows(CudaDevice& device, const int64_t* rows, int64_t n, int64_t row_bound, int64_t* unique, int64_t* begins,
               uint32_t* order, int64_t* count) {
  const auto words = [&](int64_t size, auto word) {
    return static_cast<decltype(word)*>(device.scratch(size * static_cast<int64_t>(sizeof(word))));
  };
  Key* keys = words(n, Key{});
  Key* sorted_keys = words(n, Key{});
  uint32_t* positions = words(n, uint32_t{});
  uint32_t* lengths = words(n + 1, uint32_t{});
  const int bits = bits_for(row_bound + 1);
  const auto stream = device.stream();

  // Keys are never negative, so their low bits determine the order.
  const auto sort = radix_sort(keys, sorted_keys, positions, order, n, bits, stream);
  const auto encode = [=](void* storage, size_t& bytes) {
    return cub::DeviceRunLengthEncode::Encode(storage, bytes, sorted_keys, unique, lengths, count, n, stream);
  };
  const auto sum = running_sum(lengths, begins, n + 1, stream);
  const CubStorage storage(device, sort, encode, sum);

  device.for_each(n, 1, NumberPositions<Key>{rows, row_bound, keys, positions});
  storage.run(sort);
  storage.run(encode);
  // The lengths past the last group are undefined, and so are the sums past its end, which nothing reads.
  storage.run(sum);
}

// Groups positions by row. If the launches are refused, CUB sorts what memory holds, which nothing follows.
void group_positions(CudaDevice& device, const int64_t* rows, int64_t n, int64_t row_bound, const int64_t* sources,
                     const float* scales, const GroupsRef& out) {
  auto* order = static_cast<uint32_t*>(device.scratch(n * 4));
  if (row_bound < int64_t{1} << 32) {
    sort_rows<uint32_t>(device, rows, n, row_bound, out.unique, out.starts, order, out.count);
  } else {
    sort_rows<uint64_t>(device, rows, n, row_bound, out.unique, out.starts, order, out.count);
  }
  device.for_each(n, 1, PermuteSources{order, sources, scales, out.sources, out.scales});
  device.for_each(1, 1, DropLastGroup{out.unique, row_bound, out.count});
}

// The groups of no positions.
void group_nothing(const CudaDevice& device, const GroupsRef& out) {
  RECIS_CUDA_CHECK(cudaMemsetAsync(out.count, 0, sizeof(int64_t), device.stream()));
  RECIS_CUDA_CHECK(cudaMemsetAsync(out.starts, 0, sizeof(int64_t), device.stream()));
}

// Groups the positions of features by row. What is wrong with the arguments is found before rows are there.
struct GroupCall {
  CudaDevice& device;
  int64_t n;
  GroupsRef out;
  int64_t* sources = nullptr;
  float* scales = nullptr;

  GroupCall(CudaDevice& device_of_rows, int64_t count_of_rows, Ints lengths, Ints vectors, Tensors offsets,
            Tensors weights, Ints combiners, Ints tiles, const Tensor& unique, const Tensor& starts,
            const Tensor& grouped_sources, const std::optional<Tensor>& grouped_scales, const Tensor& count)
      : device(device_of_rows), n(count_of_rows) {
    check_groups(n, unique, starts, grouped_sources);
    out = {data<int64_t>(count, "count"), data<int64_t>(unique, "unique"), data<int64_t>(starts, "starts"),
           data<int64_t>(grouped_sources, "sources"), data_or_null<float>(grouped_scales, "scales")};
    if (n == 0) return;
    sources = static_cast<int64_t*>(device.scratch(n * 8));
    if (out.scales != nullptr) scales = static_cast<float*>(device.scratch(n * 4));
    fill_sources(device, lengths, vectors, offsets, weights, combiners, tiles, sources, scales);
  }

  void run(const int64_t* rows, int64_t row_bound) const {
    if (n == 0) return group_nothing(device, out);
    group_positions(device, rows, n, row_bound, sources, scales, out);
  }
};

void group_rows(const Tensor& rows, Ints members, int64_t row_bound, Ints lengths, Ints vectors, Tensors offsets,
                Tensors weights, Ints combiners, Ints tiles, const Tensor& unique, const Tensor& starts,
                const Tensor& sources, const std::optional<Tensor>& scales, const Tensor& count) {
  CudaDevice device(rows);
  check_features(rows.numel(), members, lengths);
  const GroupCall groups(device, rows.numel(), lengths, vectors, offsets, weights, combiners, tiles, unique, starts,
                         sources, scales, count);
  groups.run(data<int64_t>(rows, "rows"), row_bound);
}

void insert_grouped(const Tensor& header, const Tensor& counters, const Tensor& free_rows, const Tensor& blocks,
                    int64_t block_shift, int64_t meta_offset, int64_t record_bytes, int64_t type, int64_t dim,
                    const Tensor& initializers, Ints field_offsets, Ints field_widths, Ints field_sizes,
                    Ints field_values, Tensors ids, Ints members, Tensors used, int64_t row_bound, Ints lengths,
                    Ints vectors, Tensors offsets, Tensors weights, Ints combiners, Ints tiles, const Tensor& rows,
                    const Tensor& unique, const Tensor& starts, const Tensor& sources,
                    const std::optional<Tensor>& scales, const Tensor& count, const std::optional<Tensor>& out,
                    Ints out_starts) {
  CudaDevice device(header);
  check_features(rows.numel(), members, lengths);
  if (out.has_value()) {
    check_plain(*out, out_starts, lengths, vectors, offsets, weights, dim);
    data<float>(*out, "out");
  }
  const int64_t* at = data<int64_t>(rows, "rows");
  const GroupCall groups(device, rows.numel(), lengths, vectors, offsets, weights, combiners, tiles, unique, starts,
                         sources, scales, count);
  const Tensor fresh = torch::stable::empty_like(rows);
  const std::vector<IdSpan> spans = id_spans(ids, members);
  with_element(type, [&](auto element) {
    // What may raise, for lack of memory or for bad arguments, comes before ids are inserted: from then on, their rows
    // must get first values and be committed.
    const auto init = init_fresh_rows<decltype(element)>(
        device, blocks_ref(blocks, block_shift, meta_offset, record_bytes), rows, fresh, spans, initializers,
        record_start(dim, field_offsets, field_widths, field_sizes, field_values));
    id_map_find_or_insert<CudaDevice>(header, counters, free_rows, std::nullopt, ids, members, used, rows, fresh);
    int64_t* counts = counter_data(counters);
    device.for_each_counted(counts + kFresh, fresh.numel(), record_bytes / 4, init);
    device.for_each(1, 1, CommitInserts{counts});
  });
  groups.run(at, row_bound);
  if (out.has_value()) {
    gather_bags<CudaDevice>(blocks, block_shift, meta_offset, record_bytes, type, dim, rows, lengths, vectors, offsets,
                            weights, combiners, tiles, {}, members, initializers, *out, out_starts, std::nullopt);
  }
}

// Inserts the ids of a training lookup inside jit, and gives new rows their first values.
template <class E>
void insert_ids(CudaDevice& device, const TableRef& table, const LookupCall& call, const CallSpans& spans,
                int64_t* rows, CallFlags* flags) {
  const int64_t n = spans.positions;
  const Room room{table.counters, table.max_rows, table.max_slots};
  // What may raise, for lack of memory, comes before the first launch: once ids are inserted, they must be committed.
  auto* fresh = static_cast<int64_t*>(device.scratch(n * 8));
  auto* fresh_slots = static_cast<uint64_t**>(device.scratch(n * 8));
  InsertWithin insert{};
  device.place(insert.segments, spans.ids);
  insert.segments.total = n;
  insert.map = table.map;
  insert.room = room;
  insert.free_rows = table.free_rows;
  insert.rows = rows;
  insert.fresh = fresh;
  insert.fresh_slots = fresh_slots;
  insert.flags = flags;
  InitFreshRows<E> init{};
  device.place(init.spans, spans.ids);
  init.spans.total = n;
  init.blocks = table.blocks;
  init.initializers = table.initializers;
  init.rows = rows;
  init.fresh = fresh;
  init.start = table.start;
  device.unless(&flags->refused, [&] {
    device.for_each(n, 1, insert);
    device.for_each(1, 1, CommitWithin{room, call.turn, flags});
  });
  device.for_each_counted(&flags->fresh, n, table.blocks.record_bytes / 4, init);
  device.for_each_counted(&flags->undone, n, 1, UndoInserts{fresh_slots});
}

// Groups the positions of a training lookup inside jit.
void group_call(CudaDevice& device, const TableRef& table, const CallSpans& spans, const int64_t* rows,
                const GroupsRef& groups) {
  const int64_t n = spans.positions;
  if (n == 0) return group_nothing(device, groups);
  auto* sources = static_cast<int64_t*>(device.scratch(n * 8));
  auto* scales = groups.scales == nullptr ? nullptr : static_cast<float*>(device.scratch(n * 4));
  fill_sources(device, spans.sources, spans.vectors, sources, scales);
  group_positions(device, rows, n, table.max_rows, sources, scales, groups);
}

void lookup_call(CudaDevice& device, const TableRef& table, const LookupCall& call) {
  const CallSpans spans(table, call, false);
  RECIS_CHECK(spans.positions < (int64_t{1} << 31), "a lookup must have at most 2^31 - 1 ids, got ", spans.positions);
  auto* rows = static_cast<int64_t*>(device.scratch(spans.positions * 8));
  auto* flags = static_cast<CallFlags*>(device.scratch(sizeof(CallFlags)));
  device.for_each(1, 1, StartLookup{call.turn, flags});
  device.unless(&flags->refused, [&] { check_offsets(device, call, flags); });
  if (call.context == nullptr) {
    device.unless(&flags->refused, [&] { find_call(device, table, spans, rows); });
  } else {
    with_element(table.type,
                 [&](auto element) { insert_ids<decltype(element)>(device, table, call, spans, rows, flags); });
    device.unless(&flags->refused, [&] {
      const GroupsRef groups = groups_of(call);
      group_call(device, table, spans, rows, groups);
      gather_call(device, table, spans, rows);
      see_call(device, table, call, groups, spans.positions);
    });
  }
  end_lookup(device, table, call, flags);
}

}  // namespace

Outcome lookup_device(const Launch& launch, const TableRef& table, const LookupCall& call, char* reason) {
  return without_exceptions(reason, [&] {
    CudaDevice device(launch);
    lookup_call(device, table, call);
    return Outcome::kDone;
  });
}

}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, RECIS_DEVICE_KEY, m) {
  m.impl("group_rows", TORCH_BOX(&recis::group_rows));
  m.impl("insert_grouped", TORCH_BOX(&recis::insert_grouped));
}
