// Groups equal rows on CUDA: CUB's radix sort is stable, so input order is kept within a row (core/group.h is the
// CPU's).
#include <cub/cub.cuh>

#include "cuda/device.cuh"

namespace recis {
namespace {

struct NumberPositions {
  int64_t* positions;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    positions[i] = i;
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

// Lengths past the last group are zero, so that one scan over the bound gives every offset and the end.
struct ClearTail {
  const int64_t* count;
  int64_t* lengths;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    if (i >= *count) lengths[i] = 0;
  }
};

int bits_for(int64_t bound) {
  int bits = 1;
  while (bits < 63 && (int64_t{1} << bits) < bound) ++bits;
  return bits;
}

void group_rows(const Tensor& rows, const Tensor& sources, const std::optional<Tensor>& scales, int64_t row_bound,
                const Tensor& unique, const Tensor& offsets, const Tensor& grouped_sources,
                const std::optional<Tensor>& grouped_scales, const Tensor& count) {
  CudaDevice device(rows);
  const int64_t n = rows.numel();
  RECIS_CHECK(unique.numel() >= n && offsets.numel() >= n + 1 && grouped_sources.numel() >= n && sources.numel() == n,
              "group_rows: a buffer is smaller than its upper bound");
  int64_t* counted = data<int64_t>(count, "count");
  int64_t* starts = data<int64_t>(offsets, "offsets");
  if (n == 0) {
    RECIS_CUDA_CHECK(cudaMemsetAsync(counted, 0, sizeof(int64_t), device.stream()));
    RECIS_CUDA_CHECK(cudaMemsetAsync(starts, 0, sizeof(int64_t), device.stream()));
    return;
  }
  const auto words = [&](int64_t size) { return static_cast<int64_t*>(device.scratch(size * 8).data_ptr()); };
  int64_t* positions = words(n);
  int64_t* sorted = words(n);
  int64_t* order = words(n);
  int64_t* lengths = words(n + 1);
  const int64_t* keys = data<int64_t>(rows, "rows");
  int64_t* distinct = data<int64_t>(unique, "unique");
  const int bits = bits_for(row_bound);
  const auto stream = device.stream();

  // Rows are never negative here, so the low bits alone order them.
  size_t sort_bytes = 0;
  size_t encode_bytes = 0;
  size_t scan_bytes = 0;
  RECIS_CUDA_CHECK(
      cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, keys, sorted, positions, order, n, 0, bits, stream));
  RECIS_CUDA_CHECK(
      cub::DeviceRunLengthEncode::Encode(nullptr, encode_bytes, sorted, distinct, lengths, counted, n, stream));
  RECIS_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(nullptr, scan_bytes, lengths, starts, n + 1, stream));
  void* temporary = device.scratch(static_cast<int64_t>(std::max({sort_bytes, encode_bytes, scan_bytes}))).data_ptr();

  device.for_each(n, 1, NumberPositions{positions});
  RECIS_CUDA_CHECK(
      cub::DeviceRadixSort::SortPairs(temporary, sort_bytes, keys, sorted, positions, order, n, 0, bits, stream));
  RECIS_CUDA_CHECK(
      cub::DeviceRunLengthEncode::Encode(temporary, encode_bytes, sorted, distinct, lengths, counted, n, stream));
  device.for_each(n + 1, 1, ClearTail{counted, lengths});
  RECIS_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(temporary, scan_bytes, lengths, starts, n + 1, stream));
  device.for_each(n, 1,
                  PermuteSources{order, data<int64_t>(sources, "sources"), data_or_null<float>(scales, "scales"),
                                 data<int64_t>(grouped_sources, "grouped_sources"),
                                 data_or_null<float>(grouped_scales, "grouped_scales")});
}

}  // namespace
}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, CUDA, m) { m.impl("group_rows", TORCH_BOX(&recis::group_rows)); }
