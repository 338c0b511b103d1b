#include "ops/catch_up.h"

#include <cstring>

#include "ops/device.h"

namespace recis {

// Writes the records of equal steps with consecutive numbers t, t + 1, ... to `out`, as many as fit. Their rounding has
// the high words of seed, seed + increment, ...; the logarithms, those of RecordedStep, begin at logs + rates.
void record_steps(int64_t kind, Ints state_offsets, Floats values, int64_t t, int64_t seed, int64_t increment,
                  Floats logs, Floats rates, const Tensor& out) {
  const RuleCall call = rule_call(kind, state_offsets, values);
  auto* to = data<uint8_t>(out, "out");
  RECIS_CHECK(out.numel() % kStepBytes == 0, "out must be whole steps");
  const bool known = with_replayed(call.kind, [&]<class Rule>() {
    RECIS_CHECK(logs.size() == RecordedStep<Rule>::kFactors && rates.size() == logs.size(), "a step has 3 factors");
    for (int64_t k = 0; k < out.numel() / kStepBytes; ++k) {
      RecordedStep<Rule> step{};
      step.rule = Rule::of(call, t + k);
      const auto seeds = static_cast<uint64_t>(seed) + static_cast<uint64_t>(k) * static_cast<uint64_t>(increment);
      step.seed = static_cast<uint32_t>(seeds >> 32);
      for (size_t j = 0; j < logs.size(); ++j) step.logs[j] = logs[j] + static_cast<double>(k + 1) * rates[j];
      std::memcpy(to + k * kStepBytes, &step, sizeof(step));
    }
  });
  RECIS_CHECK(known, "steps of this rule cannot be recorded: ", kind);
}

}  // namespace recis

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) {
  m.def("catch_up_rows(" RECIS_BLOCKS_MUT
        ", int type, int state_type, int dim, int step, Tensor count, Tensor rows, Tensor steps, int first, int kind, "
        "int replays, bool rests, int[] scaled) -> ()");
  m.def(
      "record_steps(int kind, int[] state_offsets, float[] values, int t, int seed, int increment, float[] logs, "
      "float[] rates, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) {
  recis::register_catch_up<recis::CpuDevice>(m);
  m.impl("record_steps", TORCH_BOX(&recis::record_steps));
}
