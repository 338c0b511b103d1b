#include "ops/id_map.h"

#include "ops/device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("id_map_find(Tensor slots, " RECIS_IDS ", bool numbers, Tensor(a!) rows) -> ()");
  m.def("id_map_find_or_insert(Tensor(a!) slots, Tensor(b!) counters, Tensor free_rows, Tensor? admitted, " RECIS_IDS
        ", Tensor(c!) rows, Tensor(d!) fresh) -> ()");
  m.def("id_map_commit(Tensor(a!) counters) -> ()");
  m.def("id_map_rehash(Tensor slots, Tensor(a!) fresh_slots) -> ()");
  m.def(
      "id_map_list(Tensor slots, Tensor(a!) ids, Tensor(b!) members, Tensor(c!) rows, Tensor(d!) numbers, Tensor(e!) "
      "count) -> ()");
  m.def("id_map_erase(Tensor(a!) slots, Tensor numbers, Tensor(b!) counters, Tensor(c!)? free_rows) -> ()");
  m.def("id_map_set(Tensor(a!) slots, Tensor numbers, Tensor rows) -> ()");
  m.def("id_map_move(Tensor(a!) slots, Tensor moved) -> ()");
  m.def("id_map_count(Tensor(a!) slots, Tensor(b!) counters, " RECIS_IDS ", Tensor rows) -> ()");
  m.def("id_map_admit(Tensor slots, " RECIS_IDS ", Tensor rows, int least, Tensor(a!) admitted) -> ()");
  m.def("bucket_ids(Tensor ids, Tensor(a!) buckets) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_id_map<recis::CpuDevice>(m); }
