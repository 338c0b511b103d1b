#include "ops/program.h"

#include "ops/device.h"

namespace recis {
namespace {

// The slots of a vocabulary (core/vocabulary.h), from the hashes of its entries: 1 + entry, or 0 for an empty slot.
Tensor vocabulary_slots(const Tensor& hashes, int64_t slots) {
  RECIS_CHECK(slots > hashes.numel() && (slots & (slots - 1)) == 0,
              "vocabulary_slots: slots must be a power of two above the number of entries, got ", slots);
  const int64_t sizes[] = {slots};
  Tensor out = torch::stable::new_zeros(hashes, {sizes, 1}, ScalarType::Long);
  const int64_t* hash = data<int64_t>(hashes, "hashes");
  int64_t* slot = data<int64_t>(out, "slots");
  for (int64_t entry = 0; entry < hashes.numel(); ++entry) {
    uint64_t at = static_cast<uint64_t>(hash[entry]) & static_cast<uint64_t>(slots - 1);
    while (slot[at] != 0) at = (at + 1) & static_cast<uint64_t>(slots - 1);
    slot[at] = entry + 1;
  }
  return out;
}

}  // namespace
}  // namespace recis

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def(
      "feature_program(Tensor[] inputs, Tensor code, Tensor params, int[] parts, int[] like, int[] dtypes, "
      "str refusals, bool parallel) -> Tensor[]");
  m.def("vocabulary_slots(Tensor hashes, int slots) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) {
  recis::register_program<recis::CpuDevice, true>(m);
  m.impl("vocabulary_slots", TORCH_BOX(&recis::vocabulary_slots));
}
