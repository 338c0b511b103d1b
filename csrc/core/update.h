// Optimizer updates of records, in one pass over gradients and records.
//
// A rule is plain data with
//
//   static constexpr bool kHasState   whether it keeps state of type S for each element
//   static constexpr bool kRowwise    whether it keeps one number per row
//   apply<E, S>(record, d, n, gradient, rounding)
//
// where apply updates elements d .. d + n - 1 of a record with an embedding of type E and state of type S by their
// `gradient`. A rowwise rule also has
//
//   float advance(record, mean_square)
//
// which one lane calls before apply; its result is passed to apply as an additional argument.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/blocks.h"
#include "core/reduce.h"
#include "core/table.h"

namespace recis {

// Rounds new values to the record's type, stochastically. The random bits depend only on the value, the element and the
// step, so equal rows that receive equal gradients stay equal.
struct Rounding {
  uint32_t seed;

  template <class T>
  RECIS_HD void store(T* at, float x, uint32_t element) const {
    store_stochastic(at, x, rounding_bits(seed, element, x));
  }
  // The rounding of another part of the record.
  RECIS_HD Rounding part(uint32_t number) const { return {seed ^ number * 0x85ebca6bu}; }
};

template <class T>
RECIS_HD T* field_at(char* record, int64_t offset, int64_t d) {
  return reinterpret_cast<T*>(record + offset) + d;
}

template <class Rule, class E, class S, int W>
struct UpdateRows {
  GroupedGradients gradients;
  BlocksRef blocks;
  int64_t dim;
  int64_t step;
  bool mark_seen;  // whether to mark the rows as seen in this step, as SeeRows does
  Rounding rounding;
  Rule rule;
  const int64_t* repeated = nullptr;  // [1]: whether the rows are marked already, which the host need not know; or null

  int64_t fetched_bytes() const { return blocks.record_bytes + dim * 4; }
  int64_t lanes() const { return (dim + W - 1) / W; }

  RECIS_HD void prefetch(int64_t u) const {
    prefetch_record<true>(blocks, gradients.unique[u], blocks.record_bytes);
    gradients.prefetch(u, dim);
  }

  template <class Lanes>
  RECIS_HD void operator()(int64_t u, Lanes lanes) const {
    const int64_t row = gradients.unique[u];
    char* record = blocks.record(row);
    if (lanes.rank == 0) {
      RowMeta* meta = blocks.meta(row);
      const bool marks = mark_seen && (repeated == nullptr || *repeated == 0);
      const int64_t times = marks ? gradients.offsets[u + 1] - gradients.offsets[u] : 0;
      *meta = RowMeta::of(step, marks ? step : meta->seen_step(), meta->frequency() + times);
    }
    if constexpr (Rule::kRowwise) {
      rowwise(u, record, lanes);
    } else {
      for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
        float gradient[W];
        gradients.template sum<W>(u, dim, d, n, gradient);
        rule.template apply<E, S>(record, d, n, gradient, rounding);
      });
    }
  }

  // The row's number must be advanced with the whole gradient before any element is updated. A gradient of one or two
  // tiles (CUDA: one for each lane) is buffered; a longer one is summed twice.
  template <class Lanes>
  RECIS_HD void rowwise(int64_t u, char* record, Lanes lanes) const {
    if (dim == W && lanes.size == 1) return one_tile(u, record);
    constexpr int kBuffered = kOnCuda ? 1 : 2;
    float buffer[kBuffered][W];
    const bool fits = dim <= int64_t{kBuffered} * W * lanes.size;
    float squares[W];
    for (int j = 0; j < W; ++j) squares[j] = 0.0f;
    for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
      float gradient[W];
      gradients.template sum<W>(u, dim, d, n, gradient);
      for (int j = 0; j < n; ++j) squares[j] += gradient[j] * gradient[j];
      if (fits) {
        for (int j = 0; j < n; ++j) buffer[kOnCuda ? 0 : d / W][j] = gradient[j];
      }
    });
    // One lane advances the row's number; the sum broadcasts its result to all lanes.
    const float mean = lanes_sum(halved(squares), lanes) / static_cast<float>(dim);
    const float scale = lanes_sum(lanes.rank == 0 ? rule.advance(record, mean) : 0.0f, lanes);
    for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
      if (fits) return rule.template apply<E, S>(record, d, n, buffer[kOnCuda ? 0 : d / W], rounding, scale);
      float gradient[W];
      gradients.template sum<W>(u, dim, d, n, gradient);
      rule.template apply<E, S>(record, d, n, gradient, rounding, scale);
    });
  }

  // Like rowwise, for rows of one tile: the gradient stays in registers.
  RECIS_HD void one_tile(int64_t u, char* record) const {
    float gradient[W];
    gradients.template sum<W>(u, dim, 0, Const<W>{}, gradient);
    float squares[W];
    for (int j = 0; j < W; ++j) squares[j] = gradient[j] * gradient[j];
    const float scale = rule.advance(record, halved(squares) / static_cast<float>(W));
    rule.template apply<E, S>(record, 0, Const<W>{}, gradient, rounding, scale);
  }

  // Sums by halves, so that the order does not depend on the processor's vector width.
  template <int N>
  RECIS_HD static float halved(const float (&x)[N]) {
    if constexpr (N == 1) {
      return x[0];
    } else {
      float half[N / 2];
      for (int j = 0; j < N / 2; ++j) half[j] = x[j] + x[j + N / 2];
      return halved(half);
    }
  }
};

// w -= scale * g, for elements d .. d + n - 1 of a record.
template <class E, class Count, int W>
RECIS_HD void descend(char* record, int64_t d, Count n, const float (&g)[W], float scale, Rounding rounding) {
  EditTile<E, W> w_tile(field_at<E>(record, 0, d));
  E* w = w_tile.data();
  for (int j = 0; j < n; ++j) rounding.store(w + j, load_element(w[j]) - scale * g[j], d + j);
}

// w -= lr g.
struct SgdRule {
  static constexpr bool kHasState = false;
  static constexpr bool kRowwise = false;
  float lr;

  template <class E, class S, class Count, int W>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float (&g)[W], Rounding rounding) const {
    descend<E>(record, d, n, g, lr, rounding);
  }
};

// b = momentum b + g; w -= lr b. Like torch.optim.SGD: its first step sets b = g, which is the same for b = 0.
struct MomentumRule {
  static constexpr bool kHasState = true;
  static constexpr bool kRowwise = false;
  int64_t buffer_offset;
  float lr;
  float momentum;

  template <class E, class S, class Count, int W>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float (&g)[W], Rounding rounding) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> buffer_tile(field_at<S>(record, buffer_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT buffer = buffer_tile.data();
    for (int j = 0; j < n; ++j) {
      const float b = momentum * load_element(buffer[j]) + g[j];
      rounding.part(1).store(buffer + j, b, d + j);
      rounding.store(w + j, load_element(w[j]) - lr * b, d + j);
    }
  }
};

// Duchi, Hazan, Singer: Adaptive subgradient methods (JMLR 2011). Like torch.optim.Adagrad.
struct AdagradRule {
  static constexpr bool kHasState = true;
  static constexpr bool kRowwise = false;
  int64_t sum_offset;
  float lr;
  float eps;

  template <class E, class S, class Count, int W>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float (&g)[W], Rounding rounding) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> sum_tile(field_at<S>(record, sum_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT sum = sum_tile.data();
    for (int j = 0; j < n; ++j) {
      const float s = load_element(sum[j]) + g[j] * g[j];
      rounding.part(1).store(sum + j, s, d + j);
      rounding.store(w + j, load_element(w[j]) - lr * (g[j] / (sqrtf(s) + eps)), d + j);
    }
  }
};

// Adagrad with one float32 sum per row, of the mean squared gradient.
struct RowwiseAdagradRule {
  static constexpr bool kHasState = false;
  static constexpr bool kRowwise = true;
  int64_t sum_offset;
  float lr;
  float eps;

  RECIS_HD float advance(char* record, float mean_square) const {
    float* sum = field_at<float>(record, sum_offset, 0);
    *sum += mean_square;
    return lr / (sqrtf(*sum) + eps);
  }

  template <class E, class S, class Count, int W>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float (&g)[W], Rounding rounding, float scale) const {
    descend<E>(record, d, n, g, scale, rounding);
  }
};

// Kingma, Ba: Adam (ICLR 2015), applied to rows that have a gradient. Like torch.optim.SparseAdam; with a decay below
// 1, AdamW (Loshchilov, Hutter, ICLR 2019).
struct AdamRule {
  static constexpr bool kHasState = true;
  static constexpr bool kRowwise = false;
  int64_t exp_avg_offset;
  int64_t exp_avg_sq_offset;
  float beta1_rest;  // 1 - beta1
  float beta2_rest;
  float step_size;  // lr sqrt(1 - beta2^t) / (1 - beta1^t)
  float eps;
  float decay;  // 1 - lr weight_decay

  template <class E, class S, class Count, int W>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float (&g)[W], Rounding rounding) const {
    EditTile<E, W> w_tile(field_at<E>(record, 0, d));
    EditTile<S, W> m_tile(field_at<S>(record, exp_avg_offset, d));
    EditTile<S, W> v_tile(field_at<S>(record, exp_avg_sq_offset, d));
    E* RECIS_RESTRICT w = w_tile.data();
    S* RECIS_RESTRICT m = m_tile.data();
    S* RECIS_RESTRICT v = v_tile.data();
    for (int j = 0; j < n; ++j) {
      const float m0 = load_element(m[j]);
      const float v0 = load_element(v[j]);
      // Also exact for a beta of 0. The formula of torch.lerp, with a case for each half of the range, makes a step a
      // third slower.
      const float first = (1.0f - beta1_rest) * m0 + beta1_rest * g[j];
      const float second = (1.0f - beta2_rest) * v0 + beta2_rest * (g[j] * g[j]);
      rounding.part(1).store(m + j, first, d + j);
      rounding.part(2).store(v + j, second, d + j);
      rounding.store(w + j, decay * load_element(w[j]) - step_size * (first / (sqrtf(second) + eps)), d + j);
    }
  }
};

}  // namespace recis
