#include "ops/ragged.h"

#include "ops/device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def(
      "ragged_resize(Tensor[] offsets, Tensor[] planes, int[] owner, int[] least, int[] most, "
      "int[] flags, int[] fills, str labels, bool exact, bool parallel) -> Tensor[]");
  m.def(
      "ragged_take(Tensor[] offsets, Tensor[] rows, Tensor[] planes, int[] owner, int[] bounds, str labels, "
      "bool exact, bool parallel) -> Tensor[]");
  m.def(
      "ragged_cross(Tensor[] tensors, int[] index, int[] most, int[] bounds, str labels, bool exact, bool parallel) "
      "-> Tensor[]");
  m.def(
      "ragged_topk(Tensor[] values, Tensor[] offsets, Tensor[] weights, int[] most, str labels, bool exact, "
      "bool parallel) -> Tensor[]");
  m.def(
      "ragged_distinct(Tensor[] ids, Tensor[] offsets, Tensor[] planes, int[] weights, str labels, bool exact, "
      "bool parallel) -> Tensor[]");
  m.def("decimal_strings(Tensor[] ids, int[] is_unsigned, bool exact, bool parallel) -> Tensor[]");
  m.def("ragged_concat(Tensor[] tensors, int[] index, str labels, bool parallel) -> Tensor[]");
  m.def("multi_hot(Tensor[] tensors, int[] index, int[] classes, str labels, bool parallel) -> Tensor[]");
  m.def("first_bad_offsets(Tensor[] offsets, int[] totals) -> Tensor");
  m.def("ragged_tile(Tensor[] tensors, int[] index, int[] times, str labels, bool parallel) -> Tensor[]");
}

namespace recis {
namespace {

// The index [1] of the first offsets that do not start at 0, decrease, or do not end at their total; -1 if there are
// none.
Tensor first_bad_offsets(const Tensors& offsets, const Ints& totals) {
  RECIS_CHECK(!offsets.empty() && offsets.size() == totals.size(),
              "first_bad_offsets: there must be one total for each list of offsets");
  const auto good = [&](size_t k) {
    const int64_t* at = data<int64_t>(offsets[k], "offsets");
    const int64_t lists = offsets[k].numel() - 1;
    return lists >= 0 && at[0] == 0 && at[lists] == totals[k] && ascend(at, lists);
  };
  size_t number = 0;
  while (number < offsets.size() && good(number)) ++number;
  const int64_t one[] = {1};
  Tensor index = torch::stable::new_empty(offsets[0], {one, 1}, ScalarType::Long);
  *data<int64_t>(index, "index") = number == offsets.size() ? -1 : static_cast<int64_t>(number);
  return index;
}

}  // namespace
}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) {
  recis::register_ragged<recis::CpuDevice>(m);
  m.impl("first_bad_offsets", TORCH_BOX(&recis::first_bad_offsets));
}
