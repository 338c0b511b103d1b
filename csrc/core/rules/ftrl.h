// McMahan et al.: Ad click prediction: a view from the trenches (KDD 2013), algorithm 1.
#pragma once

#include "core/rules/rule.h"

namespace recis {

// s = (sqrt(n + g^2) - sqrt(n)) / lr; z += g - s w; n += g^2;
// w = 0 if |z| <= l1, else -(z - sign(z) l1) / ((beta + sqrt(n)) / lr + l2).
struct FtrlRule {
  static constexpr bool kHasState = true;
  static constexpr Needs kNeeds = Needs::kGradient;
  int64_t linear_offset;  // z
  int64_t sum_offset;     // n
  float inverse_lr;
  float beta;
  float l1;
  float l2;

  // Values: lr, beta, l1, l2.
  static FtrlRule of(const RuleCall& call, int64_t) {
    return {call.offsets[0], call.offsets[1], static_cast<float>(1.0 / call.values[0]),
            call.value(1),   call.value(2),   call.value(3)};
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, Rounding rounding) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> z_tile(field_at<S>(record, linear_offset, d));
    EditTile<S, W> sum_tile(field_at<S>(record, sum_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT z = z_tile.data();
    S* RECIS_RESTRICT sum = sum_tile.data();
    for (int j = 0; j < n; ++j) {
      const float before = load_element(sum[j]);
      const float after = before + g[j] * g[j];
      const float root = sqrtf(after);
      const float linear = load_element(z[j]) + (g[j] - inverse_lr * (root - sqrtf(before)) * load_element(w[j]));
      rounding.part(1).store(z + j, linear, d + j);
      rounding.part(2).store(sum + j, after, d + j);
      // A weight whose z is within l1 is 0, also where beta, n and l2 are. No branches, so that the loop vectorizes.
      const float beyond = fabsf(linear) - l1;
      const float shrunk = beyond > 0.0f ? beyond : 0.0f;
      const float curvature = inverse_lr * (beta + root) + l2;
      rounding.store(w + j, (linear > 0.0f ? -shrunk : shrunk) / (curvature > 0.0f ? curvature : 1.0f), d + j);
    }
  }
};

}  // namespace recis
