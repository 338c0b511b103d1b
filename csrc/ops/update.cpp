#include "ops/update.h"

#include "core/group.h"
#include "ops/device.h"

#define RECIS_GROUPED "Tensor[] gradients, Tensor count, Tensor unique, Tensor offsets, Tensor sources, Tensor? scales"
#define RECIS_BLOCKS "Tensor(a!) blocks, int block_shift, int record_bytes, int dim"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def(
      "bag_sources(Tensor[] offsets, int[] bags, int[] lengths, int[] combiners, Tensor(a!) sources, Tensor(b!)? "
      "scales) -> ()");
  m.def(
      "group_rows(Tensor rows, Tensor sources, Tensor? scales, int row_bound, Tensor(a!) unique, Tensor(b!) offsets, "
      "Tensor(c!) grouped_sources, Tensor(d!)? grouped_scales, Tensor(e!) count) -> ()");
  m.def("reduce_rows(" RECIS_GROUPED ", Tensor(a!) out) -> ()");
  m.def("sgd_update(" RECIS_BLOCKS ", " RECIS_GROUPED ", float lr) -> ()");
  m.def("adagrad_update(" RECIS_BLOCKS ", " RECIS_GROUPED ", int sum_offset, float lr, float eps) -> ()");
  m.def("adam_update(" RECIS_BLOCKS ", " RECIS_GROUPED
        ", int exp_avg_offset, int exp_avg_sq_offset, float lr, float beta1, float beta2, float eps, int step) -> ()");
}

namespace recis {

void group_rows(const Tensor& rows, const Tensor& sources, const std::optional<Tensor>& scales, int64_t row_bound,
                const Tensor& unique, const Tensor& offsets, const Tensor& grouped_sources,
                const std::optional<Tensor>& grouped_scales, const Tensor& count) {
  const int64_t n = rows.numel();
  RECIS_CHECK(bits_for(row_bound) + bits_for(n) <= 64, "too many rows and positions for one call: ", row_bound, ", ",
              n);
  RECIS_CHECK(unique.numel() >= n && offsets.numel() >= n + 1 && grouped_sources.numel() >= n && sources.numel() == n,
              "group_rows: a buffer is smaller than its upper bound");
  group_rows_cpu(TorchPool{}, torch::stable::get_num_threads(), data<int64_t>(rows, "rows"),
                 data<int64_t>(sources, "sources"), data_or_null<float>(scales, "scales"), n, row_bound,
                 GroupOutputs{data<int64_t>(unique, "unique"), data<int64_t>(offsets, "offsets"),
                              data<int64_t>(grouped_sources, "grouped_sources"),
                              data_or_null<float>(grouped_scales, "grouped_scales"), data<int64_t>(count, "count")});
}

}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) {
  recis::register_update<recis::CpuDevice>(m);
  m.impl("group_rows", TORCH_BOX(&recis::group_rows));
}
