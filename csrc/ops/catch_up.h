// Operators that record the steps of an optimizer, and with which rows catch up on them (kernels: core/catch_up.h).
#pragma once

#include "core/catch_up.h"
#include "ops/update.h"

namespace recis {

// Catches up rows[u] for u below *count, of at most `bound`, on the steps up to `step`, of which `steps` holds those
// from step `first` on, in the form that record_steps writes.
template <class Device>
void catch_up_rows(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes, int64_t type,
                   int64_t state_type, int64_t dim, int64_t step, const Tensor& count, const Tensor& rows,
                   const Tensor& steps, int64_t first, int64_t kind, int64_t replays, bool rests, Ints scaled) {
  Device device(rows);
  Records records{};
  records.blocks = blocks_ref(blocks, block_shift, meta_offset, record_bytes);
  records.type = type;
  records.state_type = state_type;
  records.dim = dim;
  RECIS_CHECK(first >= 1 && replays >= 0 && scaled.size() <= 2, "steps count from 1, and at most 2 fields are scaled");
  if (step < first) return;
  const auto* recorded = data<uint8_t>(steps, "steps");
  RECIS_CHECK(steps.numel() >= (step - first + 1) * kStepBytes, "steps are missing");
  const bool known = with_replayed(static_cast<RuleKind>(kind), [&]<class Rule>() {
    device.with_narrow_width(dim % 4 == 0, [&](auto width) {
      with_types<Rule>(records, [&](auto element, auto state) {
        CatchUp<Rule, decltype(element), decltype(state), decltype(width)::value> kernel{
            records.blocks, data<int64_t>(rows, "rows"),         dim, recorded, first, step, replays,
            rests,          static_cast<int64_t>(scaled.size()), {}};
        std::copy(scaled.begin(), scaled.end(), kernel.scaled_offset);
        device.for_each_counted(data<int64_t>(count, "count"), rows.numel(), 4 * dim, kernel);
      });
    });
  });
  RECIS_CHECK(known, "steps of this rule cannot be caught up on: ", kind);
}

template <class Device, class Library>
void register_catch_up(Library& m) {
  m.impl("catch_up_rows", TORCH_BOX(&catch_up_rows<Device>));
}

}  // namespace recis
