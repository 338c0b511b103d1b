// Ordered reduction of row gradients, alone or fused with the optimizer's update of the record.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/gather.h"
#include "core/segments.h"
#include "core/table.h"

namespace recis {

// The pooled gradients of one feature.
struct GradientSpan {
  int64_t first;  // unused; features are found by number
  const float* values;
  int64_t stride;  // elements from one bag to the next; 0 for an expanded gradient
};

// Row gradients grouped by row: row unique[u] takes the gradients sources[segments[u] .. segments[u + 1]), in input
// order. There are *count rows; the buffers are upper bounds.
struct GroupedGradients {
  Segments<GradientSpan> features;
  const int64_t* count;
  const int64_t* unique;
  const int64_t* offsets;
  const int64_t* sources;
  const float* scales;  // by group, as sources; or null

  RECIS_HD const float* source(int64_t k) const {
    const GradientSpan& feature = features[static_cast<int32_t>(sources[k] >> kSourceShift)];
    return feature.values + (sources[k] & kSourceBag) * feature.stride;
  }

  RECIS_HD void prefetch(int64_t u, int64_t dim) const {
#if !defined(__CUDA_ARCH__)
    const float* gradient = source(offsets[u]);
    for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(gradient + d, 0, 3);
#endif
  }

  // Gradients are added in input order, in chunks of kChunk whose sums are added in order: the same bits whatever the
  // number of threads, and long groups can be summed by several of them.
  static constexpr int64_t kChunk = 256;

  template <int W, class Count>
  RECIS_HD void sum(int64_t u, int64_t d, Count n, float (&total)[W]) const {
    const int64_t begin = offsets[u];
    const int64_t end = offsets[u + 1];
    sum_chunk<W>(begin, min64(end, begin + kChunk), d, n, total);
    for (int64_t at = begin + kChunk; at < end; at += kChunk) {
      float chunk[W];
      sum_chunk<W>(at, min64(end, at + kChunk), d, n, chunk);
      for (int j = 0; j < n; ++j) total[j] += chunk[j];
    }
  }

  template <int W, class Count>
  RECIS_HD void sum_chunk(int64_t begin, int64_t end, int64_t d, Count n, float (&total)[W]) const {
    for (int j = 0; j < n; ++j) total[j] = 0.0f;
    if (scales == nullptr) {
      for (int64_t k = begin; k < end; ++k) {
        const float* gradient = source(k) + d;
        for (int j = 0; j < n; ++j) total[j] += gradient[j];
      }
    } else {
      for (int64_t k = begin; k < end; ++k) {
        const float* gradient = source(k) + d;
        for (int j = 0; j < n; ++j) total[j] += scales[k] * gradient[j];
      }
    }
  }
};

// out[u] = the summed gradient of row unique[u].
template <int W>
struct ReduceRows {
  GroupedGradients gradients;
  int64_t dim;
  float* out;  // [upper bound, dim]

  template <class Lanes>
  RECIS_HD void operator()(int64_t u, Lanes lanes) const {
    if (u >= *gradients.count) return;
    for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
      float sum[W];
      gradients.template sum<W>(u, d, n, sum);
      for (int j = 0; j < n; ++j) out[u * dim + d + j] = sum[j];
    });
  }
};

// One pass over gradient and record: sums the gradient of a row and updates it by the rule. A rule is plain data with
//   apply(record, d, n, gradient)   elements d .. d + n - 1, `gradient` theirs
template <class Rule, int W>
struct UpdateRows {
  GroupedGradients gradients;
  BlocksRef blocks;
  int64_t dim;
  Rule rule;

  RECIS_HD void prefetch(int64_t u) const {
    if (u >= *gradients.count) return;
    prefetch_record<true>(blocks, gradients.unique[u], blocks.record_bytes);
    gradients.prefetch(u, dim);
  }

  template <class Lanes>
  RECIS_HD void operator()(int64_t u, Lanes lanes) const {
    if (u >= *gradients.count) return;
    char* record = blocks.record(gradients.unique[u]);
    for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
      float gradient[W];
      gradients.template sum<W>(u, d, n, gradient);
      rule.apply(record, d, n, gradient);
    });
  }
};

RECIS_HD float* field_at(char* record, int64_t offset, int64_t d) {
  return reinterpret_cast<float*>(record + offset) + d;
}

// w -= lr g.
struct SgdRule {
  float lr;

  template <class Count, int W>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float (&g)[W]) const {
    float* w = field_at(record, 0, d);
    for (int j = 0; j < n; ++j) w[j] -= lr * g[j];
  }
};

// Duchi, Hazan, Singer: Adaptive subgradient methods (JMLR 2011), as torch.optim.Adagrad.
struct AdagradRule {
  int64_t sum_offset;
  float lr;
  float eps;

  template <class Count, int W>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float (&g)[W]) const {
    float* RECIS_RESTRICT w = field_at(record, 0, d);
    float* RECIS_RESTRICT sum = field_at(record, sum_offset, d);
    for (int j = 0; j < n; ++j) {
      const float s = sum[j] + g[j] * g[j];
      sum[j] = s;
      w[j] -= lr * (g[j] / (sqrtf(s) + eps));
    }
  }
};

// Kingma, Ba: Adam (ICLR 2015), for rows that have a gradient, as torch.optim.SparseAdam.
struct AdamRule {
  int64_t exp_avg_offset;
  int64_t exp_avg_sq_offset;
  float beta1_rest;  // 1 - beta1
  float beta2_rest;
  float step_size;  // lr sqrt(1 - beta2^t) / (1 - beta1^t)
  float eps;

  template <class Count, int W>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float (&g)[W]) const {
    float* RECIS_RESTRICT w = field_at(record, 0, d);
    float* RECIS_RESTRICT m = field_at(record, exp_avg_offset, d);
    float* RECIS_RESTRICT v = field_at(record, exp_avg_sq_offset, d);
    for (int j = 0; j < n; ++j) {
      const float first = m[j] + beta1_rest * (g[j] - m[j]);
      const float second = v[j] + beta2_rest * (g[j] * g[j] - v[j]);
      m[j] = first;
      v[j] = second;
      w[j] -= step_size * (first / (sqrtf(second) + eps));
    }
  }
};

}  // namespace recis
