// Storing what a rule outside of these files has computed.
#pragma once

#include "core/rules/rule.h"

namespace recis {

// A field of the record, in the type of the embedding, takes the value of the gradient, rounded as by any other rule.
struct AssignRule {
  static constexpr bool kHasState = false;
  static constexpr Needs kNeeds = Needs::kGradient;
  int64_t offset;
  uint32_t part;  // of the rounding: 0 for the embedding

  // Values: number of the part.
  static AssignRule of(const RuleCall& call, int64_t) {
    return {call.offsets[0], static_cast<uint32_t>(call.values[0])};
  }

  template <class E, class S, int W, class Count>
  RECIS_HD void apply(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, Rounding rounding) const {
    WriteTile<E, W> tile(field_at<E>(record, offset, d));
    E* RECIS_RESTRICT to = tile.data();
    for (int j = 0; j < n; ++j) rounding.part(part).store(to + j, g[j], d + j);
  }
};

}  // namespace recis
