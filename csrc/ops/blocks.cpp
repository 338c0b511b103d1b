#include "ops/blocks.h"

#include "ops/device.h"

// `blocks` is the table of block addresses; it is marked as mutated where the blocks behind it are.
STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def(
      "blocks_init_fresh(Tensor(a!) blocks, int block_shift, int record_bytes, Tensor(b!) counters, Tensor fresh, "
      "Tensor[] ids, int[] init_kinds, float[] init_values, int[] init_keys, int dim, int[] field_offsets, "
      "int[] field_widths, float[] field_values) -> ()");
  m.def(
      "gather_bags(Tensor blocks, int block_shift, int record_bytes, Tensor rows, Tensor[] ids, Tensor[] offsets, "
      "int[] combiners, int[] init_kinds, float[] init_values, int[] init_keys, int dim, Tensor(a!)[] outs) -> ()");
  m.def(
      "blocks_read(Tensor blocks, int block_shift, int record_bytes, Tensor rows, int offset, Tensor(a!) values) -> "
      "()");
  m.def(
      "blocks_write(Tensor(a!) blocks, int block_shift, int record_bytes, Tensor rows, int offset, Tensor values) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_blocks<recis::CpuDevice>(m); }
