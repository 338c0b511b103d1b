#include "ops/id_map.h"

#include "core/file_order.h"
#include "ops/device.h"

namespace recis {
namespace {

void file_order_cpu(const Tensor& ids, const Tensor& members, const Tensor& rows, int64_t members_count,
                    const Tensor& out) {
  const int64_t n = ids.numel();
  RECIS_CHECK(members.numel() == n && rows.numel() == n && out.numel() == 3 * n,
              "members and rows must have one element for each id, and out three");
  const int64_t* numbers = data<int64_t>(members, "members");
  for (int64_t i = 0; i < n; ++i) {
    RECIS_CHECK(numbers[i] >= 0 && numbers[i] < members_count, "there is no member table ", numbers[i]);
  }
  int64_t* target = data<int64_t>(out, "out");
  file_order(CpuThreads{}, n, data<int64_t>(ids, "ids"), numbers, data<int64_t>(rows, "rows"), members_count,
             FileRows{target, target + n, target + 2 * n});
}

}  // namespace
}  // namespace recis

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("id_map_find(Tensor header, " RECIS_IDS ", bool numbers, Tensor(a!) rows) -> ()");
  m.def("id_map_find_or_insert(Tensor(a!) header, Tensor(b!) counters, Tensor free_rows, Tensor? admitted, " RECIS_IDS
        ", Tensor(c!) rows, Tensor(d!) fresh) -> ()");
  m.def("id_map_commit(Tensor(a!) counters) -> ()");
  m.def("id_map_rehash(Tensor header, int slots, Tensor(a!) fresh_header) -> ()");
  m.def(
      "id_map_move_lines(Tensor(a!) header, Tensor(b!) counters, int lines, int first, int end, int last_old, "
      "Tensor(c!) lifted) -> ()");
  m.def(
      "id_map_list(Tensor header, int slots, Tensor(a!) ids, Tensor(b!) members, Tensor(c!) rows, Tensor(d!) numbers, "
      "Tensor(e!) "
      "count) -> ()");
  m.def(
      "id_map_list_marked(Tensor header, int slots, Tensor marks, Tensor(a!) ids, Tensor(b!) members, Tensor(c!) "
      "count) "
      "-> ()");
  m.def("id_map_erase(Tensor(a!) header, Tensor numbers, Tensor(b!) counters, Tensor(c!)? free_rows) -> ()");
  m.def("id_map_set(Tensor(a!) header, Tensor numbers, Tensor rows) -> ()");
  m.def("id_map_count(Tensor(a!) header, Tensor(b!) counters, " RECIS_IDS ", Tensor rows, Tensor? counts) -> ()");
  m.def("id_map_admit(Tensor header, " RECIS_IDS ", Tensor rows, int least, Tensor(a!) admitted) -> ()");
  m.def("bucket_ids(Tensor ids, Tensor(a!) buckets) -> ()");
  m.def("file_order(Tensor ids, Tensor members, Tensor rows, int members_count, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) {
  recis::register_id_map<recis::CpuDevice>(m);
  m.impl("file_order", TORCH_BOX(&recis::file_order_cpu));
}
