// Kingma, Ba: Adam (ICLR 2015), applied to rows that have a gradient, and its variants.
#pragma once

#include "core/rules/rule.h"

namespace recis {

// The scalars of a step. The bias corrections are part of them:
//
//   m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) = correction m / (sqrt(v) + eps sqrt(1 - beta2^t))
//
// torch.optim.SparseAdam and TensorFlow add eps itself to sqrt(v).
struct AdamScalars {
  double correction;
  double eps_scale;

  AdamScalars(double beta1, double beta2, int64_t t) {
    eps_scale = std::sqrt(1.0 - std::pow(beta2, static_cast<double>(t)));
    correction = eps_scale / (1.0 - std::pow(beta1, static_cast<double>(t)));
  }
};

// m += (1 - beta1) (g - m); v += (1 - beta2) (g^2 - v); w = keep w - step_size m / (sqrt(v) + eps).
//
// Like torch.optim.SparseAdam (kAdam), torch.optim.AdamW (kAdamW; Loshchilov, Hutter, ICLR 2019), or the latter with
// the decay of TensorFlow Addons (kAdamWTF).
struct AdamRule {
  static constexpr bool kHasState = true;
  static constexpr Needs kNeeds = Needs::kGradient;
  int64_t exp_avg_offset;
  int64_t exp_avg_sq_offset;
  float beta1_rest;  // 1 - beta1
  float beta2_rest;
  float step_size;  // lr sqrt(1 - beta2^t) / (1 - beta1^t)
  float eps;
  float keep;  // 1 - lr weight_decay (kAdamW), 1 - weight_decay (kAdamWTF)

  // Values: lr, beta1, beta2, eps, weight_decay.
  static AdamRule of(const RuleCall& call, int64_t t) {
    const auto [lr, beta1, beta2, eps, weight_decay] = call.values;
    const AdamScalars scalars(beta1, beta2, t);
    const bool is_adamw = call.kind == RuleKind::kAdamW;
    return {call.offsets[0],
            call.offsets[1],
            static_cast<float>(1.0 - beta1),
            static_cast<float>(1.0 - beta2),
            static_cast<float>(lr * scalars.correction),
            static_cast<float>(is_adamw ? eps * scalars.eps_scale : eps),
            static_cast<float>(1.0 - (is_adamw ? lr : 1.0) * weight_decay)};
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, Rounding rounding) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> m_tile(field_at<S>(record, exp_avg_offset, d));
    EditTile<S, W> v_tile(field_at<S>(record, exp_avg_sq_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT m = m_tile.data();
    S* RECIS_RESTRICT v = v_tile.data();
    for (int j = 0; j < n; ++j) {
      // Also exact for a beta of 0. The formula of torch.lerp, with a case for each half of the range, makes a step a
      // third slower.
      const float first = (1.0f - beta1_rest) * load_element(m[j]) + beta1_rest * g[j];
      const float second = (1.0f - beta2_rest) * load_element(v[j]) + beta2_rest * (g[j] * g[j]);
      rounding.part(1).store(m + j, first, d + j);
      rounding.part(2).store(v + j, second, d + j);
      rounding.store(w + j, keep * load_element(w[j]) - step_size * (first / (sqrtf(second) + eps)), d + j);
    }
  }
};

// Adam with coupled L2, u = g + weight_decay w in place of g; with kMax, AMSGrad (Reddi, Kale, Kumar: On the
// convergence of Adam and beyond, ICLR 2018): the greatest v so far in the denominator. Like torch.optim.Adam.
template <bool kMax>
struct AdamL2Rule {
  static constexpr bool kHasState = true;
  static constexpr Needs kNeeds = Needs::kGradient;
  int64_t exp_avg_offset;
  int64_t exp_avg_sq_offset;
  int64_t max_offset;
  float beta1_rest;
  float beta2_rest;
  float step_size;
  float eps;
  float weight_decay;

  // Values: lr, beta1, beta2, eps, weight_decay.
  static AdamL2Rule of(const RuleCall& call, int64_t t) {
    const auto [lr, beta1, beta2, eps, weight_decay] = call.values;
    const AdamScalars scalars(beta1, beta2, t);
    return {call.offsets[0],
            call.offsets[1],
            call.offsets[kMax ? 2 : 1],
            static_cast<float>(1.0 - beta1),
            static_cast<float>(1.0 - beta2),
            static_cast<float>(lr * scalars.correction),
            static_cast<float>(eps * scalars.eps_scale),
            static_cast<float>(weight_decay)};
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, Rounding rounding) const {
    if constexpr (kMax) {
      EditTile<S, W> max_tile(field_at<S>(record, max_offset, d));
      step<E, S, W>(record, d, n, g, max_tile.data(), rounding);
    } else {
      step<E, S, W>(record, d, n, g, static_cast<S*>(nullptr), rounding);
    }
  }

 private:
  template <class E, class S, int W, class Count>
  RECIS_HD void step(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, S* RECIS_RESTRICT max,
                     Rounding rounding) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> m_tile(field_at<S>(record, exp_avg_offset, d));
    EditTile<S, W> v_tile(field_at<S>(record, exp_avg_sq_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT m = m_tile.data();
    S* RECIS_RESTRICT v = v_tile.data();
    for (int j = 0; j < n; ++j) {
      const float w0 = load_element(w[j]);
      const float u = g[j] + weight_decay * w0;
      const float first = (1.0f - beta1_rest) * load_element(m[j]) + beta1_rest * u;
      const float second = (1.0f - beta2_rest) * load_element(v[j]) + beta2_rest * (u * u);
      rounding.part(1).store(m + j, first, d + j);
      rounding.part(2).store(v + j, second, d + j);
      float greatest = second;
      if constexpr (kMax) {
        const float before = load_element(max[j]);
        greatest = before > second ? before : second;
        rounding.part(3).store(max + j, greatest, d + j);
      }
      rounding.store(w + j, w0 - step_size * (first / (sqrtf(greatest) + eps)), d + j);
    }
  }
};

// Adam with one float32 second moment per row, of the mean squared gradient, and decoupled weight decay. Like
// PARTIAL_ROWWISE_ADAM of FBGEMM.
struct RowwiseAdamRule {
  static constexpr bool kHasState = true;
  static constexpr Needs kNeeds = Needs::kNorm;
  static constexpr bool kDirects = false;
  int64_t exp_avg_offset;
  int64_t exp_avg_sq_offset;
  float beta1_rest;
  float beta2_rest;
  float step_size;
  float eps;
  float keep;

  // Values: lr, beta1, beta2, eps, weight_decay.
  static RowwiseAdamRule of(const RuleCall& call, int64_t t) {
    const auto [lr, beta1, beta2, eps, weight_decay] = call.values;
    const AdamScalars scalars(beta1, beta2, t);
    return {call.offsets[0],
            call.offsets[1],
            static_cast<float>(1.0 - beta1),
            static_cast<float>(1.0 - beta2),
            static_cast<float>(lr * scalars.correction),
            static_cast<float>(eps * scalars.eps_scale),
            static_cast<float>(1.0 - lr * weight_decay)};
  }

  RECIS_HD float advance(char* record, float mean) const {
    float* second = field_at<float>(record, exp_avg_sq_offset, 0);
    *second = (1.0f - beta2_rest) * *second + beta2_rest * mean;
    return step_size / (sqrtf(*second) + eps);
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, Rounding rounding, float,
                      float scale) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> m_tile(field_at<S>(record, exp_avg_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT m = m_tile.data();
    for (int j = 0; j < n; ++j) {
      const float first = (1.0f - beta1_rest) * load_element(m[j]) + beta1_rest * g[j];
      rounding.part(1).store(m + j, first, d + j);
      rounding.store(w + j, keep * load_element(w[j]) - scale * first, d + j);
    }
  }
};

}  // namespace recis
