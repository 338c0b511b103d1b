#include "ops/gather.h"

#include "core/group.h"
#include "ops/device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("gather_bags(" RECIS_BLOCKS ", int type, int dim, Tensor rows, " RECIS_FEATURES
        ", Tensor[] ids, int[] members, Tensor initializers, Tensor(a!) out, int[] starts, Tensor(b!)? winners) -> ()");
  m.def("spread_max(Tensor offsets, Tensor winners, Tensor gradient, Tensor(a!) out) -> ()");
  m.def("group_rows(Tensor rows, int row_bound, " RECIS_FEATURES
        ", Tensor(a!) unique, Tensor(b!) starts, Tensor(c!) sources, Tensor(d!)? scales, Tensor(e!) count) -> ()");
}

namespace recis {

void group_rows(const Tensor& rows, int64_t row_bound, Ints lengths, Ints vectors, Tensors offsets, Tensors weights,
                Ints combiners, Ints tiles, const Tensor& unique, const Tensor& starts, const Tensor& sources,
                const std::optional<Tensor>& scales, const Tensor& count) {
  CpuDevice device(rows);
  const int64_t n = rows.numel();
  RECIS_CHECK(bits_for(row_bound + 1) + bits_for(n) <= 64, "too many rows and positions for one call: ", row_bound,
              ", ", n);
  RECIS_CHECK(unique.numel() >= n && starts.numel() >= n + 1 && sources.numel() >= n,
              "group_rows: a buffer is smaller than its upper bound");
  float* shares = data_or_null<float>(scales, "scales");
  // Uninitialised on purpose: every position that has a row is written.
  const std::unique_ptr<int64_t[]> ungrouped(new int64_t[std::max<int64_t>(n, 1)]);
  const std::unique_ptr<float[]> ungrouped_scales(shares == nullptr ? nullptr : new float[std::max<int64_t>(n, 1)]);
  fill_sources(device, lengths, vectors, offsets, weights, combiners, tiles, ungrouped.get(), ungrouped_scales.get());
  group_rows_cpu(TorchPool{}, torch::stable::get_num_threads(), data<int64_t>(rows, "rows"), ungrouped.get(),
                 ungrouped_scales.get(), n, row_bound,
                 GroupOutputs{data<int64_t>(unique, "unique"), data<int64_t>(starts, "starts"),
                              data<int64_t>(sources, "sources"), shares, data<int64_t>(count, "count")});
}

}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) {
  recis::register_gather<recis::CpuDevice>(m);
  m.impl("group_rows", TORCH_BOX(&recis::group_rows));
}
