#include "ops/sketch.h"

#include "ops/device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("sketch_admit(Tensor(a!) words, int first_block, int block_shift, int cell_bits, " RECIS_IDS
        ", Tensor rows, Tensor? counts, int least, Tensor(b!) admitted) -> ()");
  m.def("sketch_halve(Tensor(a!) words, int cell_bits, int times) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_sketch<recis::CpuDevice>(m); }
