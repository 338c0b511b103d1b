// Ragged columns on CUDA: one scan (CUB) computes the offsets of all columns, whereas the CPU sums each column
// separately.
#include "ops/ragged.h"

#include <cub/cub.cuh>

#include "cuda/device.cuh"

namespace recis {
namespace {

template <class Rule>
struct LengthPart {
  int64_t first;
  SumPart<Rule> sum;
};

// lengths[i] = the number of values in row i of all columns end to end; an empty row ends each column.
template <class Rule>
struct RowLengths {
  Segments<LengthPart<Rule>> segments;
  int64_t* lengths;

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes) const {
    const LengthPart<Rule>& part = segments[number];
    const int64_t row = i - part.first;
    const int64_t size = row < part.sum.rows ? part.sum.rule.size(row) : 0;
    lengths[i] = size < 0 ? 0 : size;
  }
};

// The offsets of a column: the sums minus the sum before the column.
template <class Rule>
struct RowOffsets {
  Segments<LengthPart<Rule>> segments;
  const int64_t* sums;

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes) const {
    const LengthPart<Rule>& part = segments[number];
    part.sum.sums[i - part.first] = sums[i] - sums[part.first];
  }
};

class RaggedDevice : public CudaDevice {
 public:
  using CudaDevice::CudaDevice;

  template <class Rule>
  void sum_rows(const std::vector<SumPart<Rule>>& parts, int64_t*, bool) {
    std::vector<LengthPart<Rule>> list;
    int64_t total = 0;
    for (const SumPart<Rule>& part : parts) {
      list.push_back({total, part});
      total += part.rows + 1;
    }
    RowLengths<Rule> lengths{};
    place(lengths.segments, list);
    lengths.segments.total = total;
    lengths.lengths = static_cast<int64_t*>(scratch(total * 8));
    auto* sums = static_cast<int64_t*>(scratch(total * 8));
    for_each(total, 1, lengths);
    size_t bytes = 0;
    RECIS_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(nullptr, bytes, lengths.lengths, sums, total, stream()));
    void* temporary = scratch(static_cast<int64_t>(bytes));
    RECIS_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(temporary, bytes, lengths.lengths, sums, total, stream()));
    RowOffsets<Rule> offsets{};
    offsets.segments = lengths.segments;
    offsets.sums = sums;
    for_each(total, 1, offsets);
  }
};

}  // namespace
}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, RECIS_DEVICE_KEY, m) { recis::register_ragged<recis::RaggedDevice>(m); }
