#include "ops/blocks.h"

#include "ops/device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("blocks_init_fresh(" RECIS_BLOCKS_MUT
        ", int type, Tensor counters, Tensor rows, Tensor fresh, Tensor[] ids, int[] members, Tensor initializers, "
        "int dim, int[] field_offsets, int[] field_widths, int[] field_sizes, int[] field_values) -> ()");
  m.def("blocks_read(" RECIS_BLOCKS ", Tensor rows, int offset, Tensor(a!) values) -> ()");
  m.def("blocks_write(" RECIS_BLOCKS_MUT ", Tensor rows, int offset, Tensor values) -> ()");
  m.def("blocks_read_meta(" RECIS_BLOCKS ", Tensor rows, Tensor(a!) columns) -> ()");
  m.def("blocks_write_meta(" RECIS_BLOCKS_MUT ", Tensor rows, Tensor columns) -> ()");
  m.def("blocks_copy_records(" RECIS_BLOCKS_MUT ", Tensor source, Tensor target) -> ()");
  m.def("blocks_see_rows(" RECIS_BLOCKS_MUT ", Tensor count, Tensor unique, Tensor offsets, int step) -> ()");
  m.def("blocks_mark_touched(" RECIS_BLOCKS ", int step, Tensor(a!) marks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_blocks<recis::CpuDevice>(m); }
