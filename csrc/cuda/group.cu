// Grouping of equal rows on CUDA; core/group.h is its CPU counterpart. CUB's radix sort is stable, so input order is
// kept within a row.
#include <cub/cub.cuh>

#include "cuda/device.cuh"
#include "ops/gather.h"
#include "ops/id_map.h"

namespace recis {
namespace {

// Positions without a row are sorted to the end, as a last group.
struct NumberPositions {
  const int64_t* rows;
  int64_t row_bound;
  int64_t* keys;
  int64_t* positions;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    keys[i] = rows[i] < 0 ? row_bound : rows[i];
    positions[i] = i;
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
  const int64_t* order;
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

// Sets the lengths past the last group to zero, so that one scan over the upper bound yields every offset and the end.
struct ClearTail {
  const int64_t* count;
  int64_t* lengths;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    if (i >= *count) lengths[i] = 0;
  }
};

void group_rows(const Tensor& rows, Ints members, int64_t row_bound, Ints lengths, Ints vectors, Tensors offsets,
                Tensors weights, Ints combiners, Ints tiles, const Tensor& unique, const Tensor& starts,
                const Tensor& sources, const std::optional<Tensor>& scales, const Tensor& count) {
  CudaDevice device(rows);
  const int64_t n = rows.numel();
  check_features(n, members, lengths);
  check_groups(n, unique, starts, sources);
  int64_t* group_count = data<int64_t>(count, "count");
  int64_t* begins = data<int64_t>(starts, "starts");
  float* factors = data_or_null<float>(scales, "scales");
  if (n == 0) {
    RECIS_CUDA_CHECK(cudaMemsetAsync(group_count, 0, sizeof(int64_t), device.stream()));
    RECIS_CUDA_CHECK(cudaMemsetAsync(begins, 0, sizeof(int64_t), device.stream()));
    return;
  }
  const auto words = [&](int64_t size) { return static_cast<int64_t*>(device.scratch(size * 8).data_ptr()); };
  int64_t* position_sources = words(n);
  float* position_scales = factors == nullptr ? nullptr : static_cast<float*>(device.scratch(n * 4).data_ptr());
  fill_sources(device, lengths, vectors, offsets, weights, combiners, tiles, position_sources, position_scales);
  int64_t* keys = words(n);
  int64_t* positions = words(n);
  int64_t* sorted_keys = words(n);
  int64_t* order = words(n);
  int64_t* group_lengths = words(n + 1);
  int64_t* distinct = data<int64_t>(unique, "unique");
  const int bits = bits_for(row_bound + 1);
  const auto stream = device.stream();

  // Keys are never negative, so their low bits determine the order.
  size_t sort_bytes = 0;
  size_t encode_bytes = 0;
  size_t scan_bytes = 0;
  RECIS_CUDA_CHECK(
      cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, keys, sorted_keys, positions, order, n, 0, bits, stream));
  RECIS_CUDA_CHECK(cub::DeviceRunLengthEncode::Encode(nullptr, encode_bytes, sorted_keys, distinct, group_lengths,
                                                      group_count, n, stream));
  RECIS_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(nullptr, scan_bytes, group_lengths, begins, n + 1, stream));
  void* temporary = device.scratch(static_cast<int64_t>(std::max({sort_bytes, encode_bytes, scan_bytes}))).data_ptr();

  device.for_each(n, 1, NumberPositions{data<int64_t>(rows, "rows"), row_bound, keys, positions});
  RECIS_CUDA_CHECK(
      cub::DeviceRadixSort::SortPairs(temporary, sort_bytes, keys, sorted_keys, positions, order, n, 0, bits, stream));
  RECIS_CUDA_CHECK(cub::DeviceRunLengthEncode::Encode(temporary, encode_bytes, sorted_keys, distinct, group_lengths,
                                                      group_count, n, stream));
  device.for_each(n + 1, 1, ClearTail{group_count, group_lengths});
  RECIS_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(temporary, scan_bytes, group_lengths, begins, n + 1, stream));
  device.for_each(n, 1,
                  PermuteSources{order, position_sources, position_scales, data<int64_t>(sources, "sources"), factors});
  device.for_each(1, 1, DropLastGroup{distinct, row_bound, group_count});
}

void insert_grouped(const Tensor& slots, const Tensor& counters, const Tensor& free_rows, const Tensor& blocks,
                    int64_t block_shift, int64_t meta_offset, int64_t record_bytes, int64_t type, int64_t dim,
                    const Tensor& initializers, Ints field_offsets, Ints field_widths, Ints field_sizes,
                    Ints field_values, Tensors ids, Ints members, Tensors used, int64_t row_bound, Ints lengths,
                    Ints vectors, Tensors offsets, Tensors weights, Ints combiners, Ints tiles, const Tensor& rows,
                    const Tensor& unique, const Tensor& starts, const Tensor& sources,
                    const std::optional<Tensor>& scales, const Tensor& count, const std::optional<Tensor>& out,
                    Ints out_starts) {
  CudaDevice device(slots);
  check_features(rows.numel(), members, lengths);
  if (out.has_value()) check_plain(*out, out_starts, lengths, vectors, offsets, weights, dim);
  const Tensor fresh = torch::stable::empty_like(rows);
  const std::vector<IdSpan> spans = id_spans(ids, members);
  with_element(type, [&](auto element) {
    // What may raise, for lack of memory or for bad arguments, comes before the first launch: once ids are inserted,
    // their rows must get first values and be committed.
    const auto init = init_fresh_rows<decltype(element)>(
        device, blocks_ref(blocks, block_shift, meta_offset, record_bytes), counters, rows, fresh, spans, initializers,
        record_start(dim, field_offsets, field_widths, field_sizes, field_values));
    id_map_find_or_insert<CudaDevice>(slots, counters, free_rows, std::nullopt, ids, members, used, rows, fresh);
    device.for_each(fresh.numel(), record_bytes / 4, init);
    device.for_each(1, 1, CommitInserts{counter_data(counters)});
  });
  group_rows(rows, members, row_bound, lengths, vectors, offsets, weights, combiners, tiles, unique, starts, sources,
             scales, count);
  if (out.has_value()) {
    gather_bags<CudaDevice>(blocks, block_shift, meta_offset, record_bytes, type, dim, rows, lengths, vectors, offsets,
                            weights, combiners, tiles, {}, members, initializers, *out, out_starts, std::nullopt);
  }
}

}  // namespace
}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, RECIS_DEVICE_KEY, m) {
  m.impl("group_rows", TORCH_BOX(&recis::group_rows));
  m.impl("insert_grouped", TORCH_BOX(&recis::insert_grouped));
}
