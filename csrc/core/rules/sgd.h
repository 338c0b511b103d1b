// Stochastic gradient descent, like torch.optim.SGD.
#pragma once

#include "core/rules/rule.h"

namespace recis {

// w -= lr (g + weight_decay w).
struct SgdRule {
  static constexpr bool kHasState = false;
  static constexpr Needs kNeeds = Needs::kGradient;
  float lr;
  float keep;  // 1 - lr weight_decay

  // Values: lr, weight_decay.
  static SgdRule of(const RuleCall& call, int64_t) {
    return {call.value(0), static_cast<float>(1.0 - call.values[0] * call.values[1])};
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* g, Rounding rounding) const {
    descend<E, W>(record, d, n, g, keep, lr, rounding);
  }
};

// u = g + weight_decay w; b = momentum b + u; w -= lr b, or with Nesterov w -= lr (u + momentum b). The first step of
// torch.optim.SGD sets b = u, which is the same for b = 0.
struct MomentumRule {
  static constexpr bool kHasState = true;
  static constexpr Needs kNeeds = Needs::kGradient;
  int64_t buffer_offset;
  float lr;
  float momentum;
  float weight_decay;
  float ahead;  // the shares of u and b in the step
  float along;

  // Values: lr, momentum, weight_decay, whether Nesterov's.
  static MomentumRule of(const RuleCall& call, int64_t) {
    const bool nesterov = call.values[3] != 0;
    return {call.offsets[0], call.value(0),          call.value(1),
            call.value(2),   nesterov ? 1.0f : 0.0f, nesterov ? call.value(1) : 1.0f};
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, Rounding rounding) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> buffer_tile(field_at<S>(record, buffer_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT buffer = buffer_tile.data();
    for (int j = 0; j < n; ++j) {
      const float w0 = load_element(w[j]);
      const float u = g[j] + weight_decay * w0;
      const float b = momentum * load_element(buffer[j]) + u;
      rounding.part(1).store(buffer + j, b, d + j);
      rounding.store(w + j, w0 - lr * (ahead * u + along * b), d + j);
    }
  }
};

}  // namespace recis
