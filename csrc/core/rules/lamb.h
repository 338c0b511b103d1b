// You et al.: Large batch optimization for deep learning (ICLR 2020), with a row as the layer.
#pragma once

#include "core/rules/adam.h"

namespace recis {

// With the moments m and v of Adam, r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w, and
// w -= lr (|w| / |r|) r; the ratio is 1 if a norm is 0. Like LAMB of FBGEMM.
struct LambRule {
  static constexpr bool kHasState = true;
  static constexpr Needs kNeeds = Needs::kNorms;
  int64_t exp_avg_offset;
  int64_t exp_avg_sq_offset;
  float lr;
  float beta1_rest;
  float beta2_rest;
  float correction;
  float eps;
  float weight_decay;

  // Values: lr, beta1, beta2, eps, weight_decay.
  static LambRule of(const RuleCall& call, int64_t t) {
    const auto [lr, beta1, beta2, eps, weight_decay] = call.values;
    const AdamScalars scalars(beta1, beta2, t);
    return {call.offsets[0],
            call.offsets[1],
            static_cast<float>(lr),
            static_cast<float>(1.0 - beta1),
            static_cast<float>(1.0 - beta2),
            static_cast<float>(scalars.correction),
            static_cast<float>(eps * scalars.eps_scale),
            static_cast<float>(weight_decay)};
  }

  // r = the direction of a step, from the moments before it and the gradient.
  template <class E, class S, int W, class Count>
  RECIS_HD void direct(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, float* RECIS_RESTRICT r) const {
    ReadTile<E, W> w_tile(field_at<E>(record, 0, d));
    ReadTile<S, W> m_tile(field_at<S>(record, exp_avg_offset, d));
    ReadTile<S, W> v_tile(field_at<S>(record, exp_avg_sq_offset, d));
    const E* RECIS_RESTRICT w = w_tile.data();
    const S* RECIS_RESTRICT m = m_tile.data();
    const S* RECIS_RESTRICT v = v_tile.data();
    for (int j = 0; j < n; ++j) {
      const float first = moment(beta1_rest, load_element(m[j]), g[j]);
      const float second = moment(beta2_rest, load_element(v[j]), g[j] * g[j]);
      r[j] = correction * (first / (sqrtf(second) + eps)) + weight_decay * load_element(w[j]);
    }
  }

  // The factor of r, given the sums of the squares of r and w.
  RECIS_HD float trust(float r, float w) const { return r > 0.0f && w > 0.0f ? lr * (sqrtf(w) / sqrtf(r)) : lr; }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, const float* RECIS_RESTRICT r,
                      Rounding rounding, float scale) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> m_tile(field_at<S>(record, exp_avg_offset, d));
    EditTile<S, W> v_tile(field_at<S>(record, exp_avg_sq_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT m = m_tile.data();
    S* RECIS_RESTRICT v = v_tile.data();
    for (int j = 0; j < n; ++j) {
      rounding.part(1).store(m + j, moment(beta1_rest, load_element(m[j]), g[j]), d + j);
      rounding.part(2).store(v + j, moment(beta2_rest, load_element(v[j]), g[j] * g[j]), d + j);
      rounding.store(w + j, load_element(w[j]) - scale * r[j], d + j);
    }
  }

 private:
  RECIS_HD static float moment(float rest, float before, float x) { return (1.0f - rest) * before + rest * x; }
};

}  // namespace recis
