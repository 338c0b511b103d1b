#include "ops/table_kernels.h"

const recis::TableKernels* recis_table_kernels() {
  static const recis::TableKernels kernels{recis::kKernelsVersion, &recis::lookup_cpu, &recis::update_cpu};
  return &kernels;
}
