// Duchi, Hazan, Singer: Adaptive subgradient methods (JMLR 2011). Like torch.optim.Adagrad.
#pragma once

#include "core/rules/rule.h"

namespace recis {

// Values of the rules here: lr, lr_decay, weight_decay, eps.
inline float decayed_lr(const RuleCall& call, int64_t t) {
  return static_cast<float>(call.values[0] / (1.0 + static_cast<double>(t - 1) * call.values[1]));
}

// u = g + weight_decay w; s += u^2; w -= lr_t u / (sqrt(s) + eps), lr_t = lr / (1 + (t - 1) lr_decay).
template <bool kDecays>
struct AdagradRule {
  static constexpr bool kHasState = true;
  static constexpr Needs kNeeds = Needs::kGradient;
  int64_t sum_offset;
  float lr;
  float eps;
  float weight_decay;  // without kDecays, unused

  static AdagradRule of(const RuleCall& call, int64_t t) {
    return {call.offsets[0], decayed_lr(call, t), call.value(3), call.value(2)};
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, Rounding rounding) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> sum_tile(field_at<S>(record, sum_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT sum = sum_tile.data();
    for (int j = 0; j < n; ++j) {
      const float w0 = load_element(w[j]);
      const float u = kDecays ? g[j] + weight_decay * w0 : g[j];
      const float s = load_element(sum[j]) + u * u;
      rounding.part(1).store(sum + j, s, d + j);
      rounding.store(w + j, w0 - lr * (u / (sqrtf(s) + eps)), d + j);
    }
  }
};

// s += sum of g_k^2 over the sources k of the gradient, w -= lr_t sum of g_k / (sqrt(s) + eps). RecIS's AdagradSum.
struct AdagradSumRule {
  static constexpr bool kHasState = true;
  static constexpr Needs kNeeds = Needs::kSquares;
  int64_t sum_offset;
  float lr;
  float eps;

  static AdagradSumRule of(const RuleCall& call, int64_t t) {
    return {call.offsets[0], decayed_lr(call, t), call.value(3)};
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g,
                      const float* RECIS_RESTRICT squares, Rounding rounding) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> sum_tile(field_at<S>(record, sum_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT sum = sum_tile.data();
    for (int j = 0; j < n; ++j) {
      const float s = load_element(sum[j]) + squares[j];
      rounding.part(1).store(sum + j, s, d + j);
      rounding.store(w + j, load_element(w[j]) - lr * (g[j] / (sqrtf(s) + eps)), d + j);
    }
  }
};

}  // namespace recis
