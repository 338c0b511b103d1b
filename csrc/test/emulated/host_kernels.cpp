// TableKernels of the emulated device for callers on the CPU, such as XLA's CPU client: each call is queued on a stream
// of its own, with scratch memory of the device, and waited for.
#include "core/table_kernels.h"

#include <vector>

#include "emulated/machine.h"

namespace {

using namespace recis;

constexpr int64_t kStream = int64_t{1} << 40;  // none of torch's

void* allocate(void* self, int64_t bytes) {
  void* start = emulated::Device::get().allocate(static_cast<size_t>(bytes), kStream);
  if (start != nullptr) static_cast<std::vector<void*>*>(self)->push_back(start);
  return start;
}

template <class Call>
Outcome wait_for(Outcome (*kernels)(const Launch&, const TableRef&, const Call&, char*), const TableRef& table,
                 const Call& call, char* reason) {
  emulated::Device& device = emulated::Device::get();
  std::vector<void*> scratch;
  const Launch launch{nullptr, reinterpret_cast<void*>(kStream), 0, &allocate, &scratch};
  const Outcome outcome = kernels(launch, table, call, reason);
  for (void* start : scratch) device.free(start);
  char fault[kReasonBytes] = "";
  const auto synchronize = [&] {
    device.synchronize(kStream);
    return Outcome::kDone;
  };
  if (without_exceptions(fault, synchronize) == Outcome::kDone) return outcome;
  std::memcpy(reason, fault, kReasonBytes);
  return Outcome::kFailed;
}

Outcome lookup(const Launch&, const TableRef& table, const LookupCall& call, char* reason) {
  return wait_for(recis_table_kernels()->lookup, table, call, reason);
}

Outcome update(const Launch&, const TableRef& table, const UpdateCall& call, char* reason) {
  return wait_for(recis_table_kernels()->update, table, call, reason);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const TableKernels* emulated_table_kernels() {
  static const TableKernels kernels{kKernelsVersion, &lookup, &update};
  return &kernels;
}
