#include "ops/gather.h"

#include "core/group.h"
#include "ops/device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("gather_bags(" RECIS_BLOCKS ", int type, int dim, Tensor rows, " RECIS_FEATURES
        ", Tensor[] ids, int[] members, Tensor initializers, Tensor(a!) out, int[] starts, Tensor(b!)? winners) -> ()");
  m.def("spread_max(Tensor offsets, Tensor winners, Tensor gradient, Tensor(a!) out) -> ()");
  m.def("group_rows(Tensor rows, int[] members, int row_bound, " RECIS_FEATURES
        ", Tensor(a!) unique, Tensor(b!) starts, Tensor(c!) sources, Tensor(d!)? scales, Tensor(e!) count) -> ()");
}

namespace recis {

void group_rows(const Tensor& rows, Ints members, int64_t row_bound, Ints lengths, Ints vectors, Tensors offsets,
                Tensors weights, Ints combiners, Ints tiles, const Tensor& unique, const Tensor& starts,
                const Tensor& sources, const std::optional<Tensor>& scales, const Tensor& count) {
  CpuDevice device(rows);
  const int64_t n = rows.numel();
  RECIS_CHECK(unique.numel() >= n && starts.numel() >= n + 1 && sources.numel() >= n,
              "group_rows: a buffer is smaller than its upper bound");
  RECIS_CHECK(n < (int64_t{1} << 31), "group_rows: at most 2^31 - 1 positions, got ", n);
  float* shares = data_or_null<float>(scales, "scales");
  const bool plain = offsets.empty() && shares == nullptr;  // one id a vector: nothing to look up
  const auto ungrouped = detail::room<int64_t>(plain ? 0 : n);
  const auto ungrouped_scales = detail::room<float>(shares == nullptr ? 0 : n);
  if (!plain) {
    fill_sources(device, lengths, vectors, offsets, weights, combiners, tiles, ungrouped.get(),
                 shares == nullptr ? nullptr : ungrouped_scales.get());
  }
  group_rows_cpu(TorchPool{},
                 GroupInputs{data<int64_t>(rows, "rows"), n, lengths, members, plain ? nullptr : ungrouped.get(),
                             shares == nullptr ? nullptr : ungrouped_scales.get()},
                 GroupOutputs{data<int64_t>(unique, "unique"), data<int64_t>(starts, "starts"),
                              data<int64_t>(sources, "sources"), shares, data<int64_t>(count, "count")});
}

}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) {
  recis::register_gather<recis::CpuDevice>(m);
  m.impl("group_rows", TORCH_BOX(&recis::group_rows));
}
