// Chen et al.: Symbolic discovery of optimization algorithms (NeurIPS 2023).
#pragma once

#include "core/rules/rule.h"

namespace recis {

// w = (1 - lr weight_decay) w - lr sign(beta1 m + (1 - beta1) g); m += (1 - beta2) (g - m).
struct LionRule {
  static constexpr bool kHasState = true;
  static constexpr Needs kNeeds = Needs::kGradient;
  int64_t exp_avg_offset;
  float lr;
  float beta1_rest;
  float beta2_rest;
  float keep;

  // Values: lr, beta1, beta2, weight_decay.
  static LionRule of(const RuleCall& call, int64_t) {
    return {call.offsets[0], call.value(0), static_cast<float>(1.0 - call.values[1]),
            static_cast<float>(1.0 - call.values[2]), static_cast<float>(1.0 - call.values[0] * call.values[3])};
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, Rounding rounding) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> m_tile(field_at<S>(record, exp_avg_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT m = m_tile.data();
    for (int j = 0; j < n; ++j) {
      const float m0 = load_element(m[j]);
      const float mixed = (1.0f - beta1_rest) * m0 + beta1_rest * g[j];
      const float sign = mixed > 0.0f ? 1.0f : mixed < 0.0f ? -1.0f : 0.0f;
      rounding.part(1).store(m + j, (1.0f - beta2_rest) * m0 + beta2_rest * g[j], d + j);
      rounding.store(w + j, keep * load_element(w[j]) - lr * sign, d + j);
    }
  }
};

}  // namespace recis
