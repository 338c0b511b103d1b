#include "ops/cache.h"

#include "ops/device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("cache_admit(" RECIS_BLOCKS_MUT ", " RECIS_CACHE_MUT
        ", Tensor count, Tensor unique, Tensor(e!) missing, int lookup, int epoch) -> ()");
  m.def(
      "cache_locate(Tensor tags, Tensor(a!) states, Tensor counters, int first_place, Tensor rows, Tensor? count, "
      "bool writes, Tensor(b!) places) -> ()");
  m.def("cache_write_back(" RECIS_BLOCKS_MUT ", " RECIS_CACHE_MUT ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_cache<recis::CpuDevice>(m); }
