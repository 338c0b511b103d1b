// Bags: the positions of a feature's ids that are combined into one vector, and their weights.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace recis {

enum class Combiner : int32_t { kSum = 0, kMean = 1, kSqrtN = 2, kMax = 3 };

struct Range {
  int64_t begin;
  int64_t end;
};

// The bags of one feature. Positions count its ids from 0.
struct Bags {
  const int64_t* offsets;  // [bags + 1]; null: one id per bag
  const float* weights;    // [ids], or null if every weight is 1
  Combiner combiner;
  int64_t tile;  // 0, or k: a bag yields k vectors, one for each of its first k ids

  // The positions of vector v; without a tile, of bag v.
  RECIS_HD Range range(int64_t v) const {
    if (offsets == nullptr) return {v, v + 1};
    if (tile == 0) return {offsets[v], offsets[v + 1]};
    const int64_t begin = min64(offsets[v / tile] + v % tile, offsets[v / tile + 1]);
    return {begin, min64(begin + 1, offsets[v / tile + 1])};
  }

  RECIS_HD float weight(int64_t position) const { return weights == nullptr ? 1.0f : weights[position]; }

  // The factor of a bag's weighted sum. If the weights sum to zero, the mean is defined as zero.
  RECIS_HD float norm(Range bag) const {
    if (combiner != Combiner::kMean && combiner != Combiner::kSqrtN) return 1.0f;
    float total = static_cast<float>(bag.end - bag.begin);
    if (weights != nullptr) {
      total = 0.0f;
      for (int64_t p = bag.begin; p < bag.end; ++p) {
        total += combiner == Combiner::kMean ? weights[p] : weights[p] * weights[p];
      }
    }
    if (total == 0.0f) return 0.0f;
    return 1.0f / (combiner == Combiner::kMean ? total : sqrtf(total));
  }
};

}  // namespace recis
