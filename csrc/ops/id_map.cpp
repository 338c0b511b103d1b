#include "ops/id_map.h"

#include "ops/device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("id_map_find(Tensor slots, Tensor[] ids, int[] members, Tensor(a!) rows) -> ()");
  m.def(
      "id_map_find_or_insert(Tensor(a!) slots, Tensor(b!) counters, Tensor[] ids, int[] members, Tensor(c!) rows, "
      "Tensor(d!) fresh) -> ()");
  m.def("id_map_rehash(Tensor slots, Tensor(a!) grown) -> ()");
  m.def("bucket_ids(Tensor ids, Tensor(a!) buckets) -> ()");
  m.def("id_map_list(Tensor slots, int member, Tensor(a!) ids, Tensor(b!) rows, Tensor(c!) count) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_id_map<recis::CpuDevice>(m); }
