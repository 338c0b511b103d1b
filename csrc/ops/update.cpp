#include "ops/update.h"

#include "ops/device.h"
#include "ops/table_kernels.h"

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("reduce_rows(" RECIS_GROUPED ", Tensor(a!) out) -> ()");
  m.def("sum_squares(Tensor values, Tensor count) -> Tensor");
  m.def("clip_rows(Tensor(a!) values, Tensor count, Tensor? factor, float limit) -> ()");
  m.def("update_rows(" RECIS_TABLE ", " RECIS_GROUPED ", int kind, int[] state_offsets, float[] values, int t) -> ()");
}

recis::Outcome recis::update_cpu(const Launch& launch, const TableRef& table, const UpdateCall& call, char* reason) {
  return without_exceptions(reason, [&] {
    CpuDevice device(*launch.pool);
    CallFlags flags;
    update_call(device, table, call, &flags);
    return Outcome::kDone;
  });
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { recis::register_update<recis::CpuDevice>(m); }
