#include "ops/ragged.h"

#include "ops/device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def(
      "ragged_resize(Tensor[] offsets, Tensor[] planes, int[] owner, int[] least, int[] most, int[] flags, int[] "
      "fills, "
      "str labels, bool exact, bool parallel) -> Tensor[]");
  m.def(
      "ragged_take(Tensor[] offsets, Tensor[] rows, Tensor[] planes, int[] owner, int[] bounds, str labels, bool "
      "exact, "
      "bool parallel) -> Tensor[]");
  m.def("ragged_cross(Tensor[] tensors, int[] index, int[] most, str labels, bool exact, bool parallel) -> Tensor[]");
  m.def(
      "ragged_topk(Tensor[] values, Tensor[] offsets, Tensor[] weights, int[] most, str labels, bool exact, "
      "bool parallel) -> Tensor[]");
  m.def("ragged_concat(Tensor[] tensors, int[] index, str labels, bool parallel) -> Tensor[]");
  m.def("multi_hot(Tensor[] tensors, int[] index, int[] classes, str labels, bool parallel) -> Tensor[]");
  m.def("ragged_tile(Tensor[] tensors, int[] index, int[] times, str labels, bool parallel) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_ragged<recis::CpuDevice>(m); }
