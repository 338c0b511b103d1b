#include "cuda/table_kernels.cuh"

const recis::TableKernels* recis_table_kernels() {
  static const recis::TableKernels kernels{recis::kKernelsVersion, &recis::lookup_device, &recis::update_device};
  return &kernels;
}
