// Adagrad with one float32 sum per row, of the mean squared gradient. Like EXACT_ROWWISE_ADAGRAD of FBGEMM, with its
// weight decay and its counters of rows.
#pragma once

#include "core/rules/rule.h"

namespace recis {

// Without kDecays: s += mean of g^2, w -= lr g / (sqrt(s) + eps).
//
// With kDecays, `first` is weight_decay times the factor of the row's counter c: 1 without a half-life; otherwise
// c = 1 + c 2^(-elapsed / halflife), and the factor is halflife / c. Coupled, g += first w; decoupled, w is multiplied
// by 1 - lr first.
template <bool kDecays>
struct RowwiseAdagradRule {
  static constexpr bool kHasState = false;
  static constexpr Needs kNeeds = Needs::kNorm;
  static constexpr bool kDirects = kDecays;
  int64_t sum_offset;
  int64_t counter_offset;
  float lr;
  float eps;
  float weight_decay;
  float coupled;  // 1 or 0
  float halflife;

  // Values: lr, eps, weight_decay, whether it is decoupled, half-life of the counter in steps (0: no counter).
  static RowwiseAdagradRule of(const RuleCall& call, int64_t) {
    return {call.offsets[0], call.offsets[1], call.value(0),
            call.value(1),   call.value(2),   call.values[3] != 0 ? 0.0f : 1.0f,
            call.value(4)};
  }

  RECIS_HD float begin(char* record, int64_t elapsed) const
    requires kDecays
  {
    if (!(halflife > 0.0f)) return weight_decay;
    float* counter = field_at<float>(record, counter_offset, 0);
    *counter = 1.0f + exp2f(-static_cast<float>(elapsed) / halflife) * *counter;
    return weight_decay * (halflife / *counter);
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void direct(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, float* RECIS_RESTRICT r,
                       float first) const {
    ReadTile<E, W> w_tile(field_at<E>(record, 0, d));
    const E* RECIS_RESTRICT w = w_tile.data();
    for (int j = 0; j < n; ++j) r[j] = g[j] + coupled * first * load_element(w[j]);
  }

  RECIS_HD float advance(char* record, float mean) const {
    float* sum = field_at<float>(record, sum_offset, 0);
    *sum += mean;
    return lr / (sqrtf(*sum) + eps);
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* g, Rounding rounding, float first,
                      float scale) const {
    descend<E, W>(record, d, n, g, kDecays ? 1.0f - (1.0f - coupled) * (lr * first) : 1.0f, scale, rounding);
  }
};

}  // namespace recis
