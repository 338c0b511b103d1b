// Tieleman, Hinton: RMSprop (Neural networks for machine learning, lecture 6.5, 2012). Like torch.optim.RMSprop.
#pragma once

#include "core/rules/rule.h"

namespace recis {

// u = g + weight_decay w; v += (1 - alpha) (u^2 - v); w -= lr u / (sqrt(v) + eps).
struct RmspropRule {
  static constexpr bool kHasState = true;
  static constexpr Needs kNeeds = Needs::kGradient;
  int64_t square_avg_offset;
  float lr;
  float alpha_rest;  // 1 - alpha
  float eps;
  float weight_decay;

  // Values: lr, alpha, eps, weight_decay.
  static RmspropRule of(const RuleCall& call, int64_t) {
    return {call.offsets[0], call.value(0), static_cast<float>(1.0 - call.values[1]), call.value(2), call.value(3)};
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, Rounding rounding) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> v_tile(field_at<S>(record, square_avg_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT v = v_tile.data();
    for (int j = 0; j < n; ++j) {
      const float w0 = load_element(w[j]);
      const float u = g[j] + weight_decay * w0;
      const float second = (1.0f - alpha_rest) * load_element(v[j]) + alpha_rest * (u * u);
      rounding.part(1).store(v + j, second, d + j);
      rounding.store(w + j, w0 - lr * (u / (sqrtf(second) + eps)), d + j);
    }
  }
};

}  // namespace recis
