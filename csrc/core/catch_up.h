// Steps without a gradient, done late: a row that is about to be read catches up on the steps since its last one, so
// that it is what an optimizer that changes every row in every step would have made of it.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/element.h"
#include "core/for_each.h"
#include "core/rules/adagrad.h"
#include "core/rules/adam.h"
#include "core/rules/lion.h"
#include "core/rules/rmsprop.h"
#include "core/rules/rule.h"
#include "core/rules/sgd.h"
#include "core/table.h"

namespace recis {

// A step as it was done: the rule with its hyperparameters, and running sums of the logarithms of the factors by which
// it multiplies the embedding and the first two state fields of a row at rest.
template <class Rule>
struct RecordedStep {
  static constexpr int kFactors = 3;

  Rule rule;
  uint32_t seed;  // of the stochastic rounding
  double logs[kFactors];
};

// The bytes of a recorded step of any rule.
inline constexpr int64_t kStepBytes = 80;

template <class Rule>
RECIS_HD const RecordedStep<Rule>& recorded_step(const uint8_t* steps, int64_t k) {
  static_assert(sizeof(RecordedStep<Rule>) <= kStepBytes);
  return *reinterpret_cast<const RecordedStep<Rule>*>(steps + k * kStepBytes);
}

// Replays the steps that rows have missed with a gradient of 0, at most `replays` of them. After these, or at once if
// the row is at rest because its first state field is 0, the remaining steps only multiply: they are done as one.
template <class Rule, class E, class S, int W>
struct CatchUp {
  BlocksRef blocks;
  const int64_t* rows;
  int64_t dim;
  const uint8_t* steps;  // those from step `first` to step `now`, of the table
  int64_t first;
  int64_t now;
  int64_t replays;
  bool rests;                // whether a row of which the first state field is 0 is at rest
  int64_t scaled;            // state fields that a step at rest multiplies, at most 2
  int64_t scaled_offset[2];  // their offsets

  static constexpr int kPiece = kOnCuda ? W : 512;

  int64_t fetched_bytes() const { return blocks.record_bytes; }
  int64_t lanes() const { return (dim + W - 1) / W; }

  RECIS_HD void prefetch(int64_t u) const { prefetch_record<true>(blocks, rows[u], blocks.record_bytes); }

  template <class Lanes>
  RECIS_HD void operator()(int64_t u, Lanes lanes) const {
    char* record = blocks.record(rows[u]);
    RowMeta* meta = blocks.meta(rows[u]);
    const int64_t done = meta->updated_step() < first ? first - 1 : meta->updated_step();
    // The sum makes all lanes wait until each has read the metadata, which one of them then changes.
    if (!(lanes_sum(done < now ? 1.0f : 0.0f, lanes) > 0.0f)) return;
    if (lanes.rank == 0) *meta = RowMeta::of(now, meta->seen_step(), meta->frequency());
    const float none[kPiece] = {};
    if constexpr (kOnCuda) {
      for_tiles<W>(dim, lanes, [&](int64_t d, auto n) { catch_up(record, d, n, done, none); });
    } else {
      for (int64_t d = 0; d < dim; d += kPiece) {
        catch_up(record, d, static_cast<int>(min64(dim - d, kPiece)), done, none);
      }
    }
  }

 private:
  template <class Count>
  RECIS_HD void catch_up(char* record, int64_t d, Count n, int64_t done, const float* none) const {
    const int64_t missed = now - done;
    int64_t replayed = missed < replays ? missed : replays;
    if (rests && at_rest(record, d, n)) replayed = 0;
    for (int64_t s = done + 1; s <= done + replayed; ++s) {
      const RecordedStep<Rule>& step = recorded_step<Rule>(steps, s - first);
      step.rule.template apply<E, S, W>(record, d, n, none, Rounding{step.seed});
    }
    if (!rests || replayed == missed) return;
    const RecordedStep<Rule>& last = recorded_step<Rule>(steps, now - first);
    const int64_t before = done + replayed - first;  // the step before those that are done as one
    const auto factor = [&](int k) {
      return static_cast<float>(exp(last.logs[k] - (before < 0 ? 0.0 : recorded_step<Rule>(steps, before).logs[k])));
    };
    const Rounding rounding{last.seed};
    scale<E>(record, 0, d, n, factor(0), rounding);
    for (int k = 0; k < scaled; ++k) scale<S>(record, scaled_offset[k], d, n, factor(1 + k), rounding.part(k + 1));
  }

  template <class Count>
  RECIS_HD bool at_rest(char* record, int64_t d, Count n) const {
    if (scaled == 0) return true;
    ReadTile<S, W> tile(field_at<S>(record, scaled_offset[0], d));
    float largest = 0.0f;
    for (int j = 0; j < n; ++j) {
      const float size = fabsf(load_element(tile.data()[j]));
      largest = size > largest || size != size ? size : largest;
    }
    return largest == 0.0f;
  }

  template <class T, class Count>
  RECIS_HD static void scale(char* record, int64_t offset, int64_t d, Count n, float factor, Rounding rounding) {
    if (factor == 1.0f) return;
    EditTile<T, W> tile(field_at<T>(record, offset, d));
    T* RECIS_RESTRICT x = tile.data();
    for (int j = 0; j < n; ++j) rounding.store(x + j, factor * load_element(x[j]), d + j);
  }
};

// Calls f with the type of the rule whose steps without a gradient can be caught up on. Returns false for others.
template <class F>
bool with_replayed(RuleKind kind, F&& f) {
  const auto with = [&]<class Rule>() {
    f.template operator()<Rule>();
    return true;
  };
  switch (kind) {
    case RuleKind::kSgd:
      return with.template operator()<SgdRule>();
    case RuleKind::kMomentum:
      return with.template operator()<MomentumRule>();
    case RuleKind::kAdagrad:
      return with.template operator()<AdagradRule<true>>();
    case RuleKind::kAdam:
    case RuleKind::kAdamW:
    case RuleKind::kAdamWTF:
      return with.template operator()<AdamRule>();
    case RuleKind::kAdamL2:
      return with.template operator()<AdamL2Rule<false>>();
    case RuleKind::kAmsgrad:
      return with.template operator()<AdamL2Rule<true>>();
    case RuleKind::kRmsprop:
      return with.template operator()<RmspropRule>();
    case RuleKind::kLion:
      return with.template operator()<LionRule>();
    default:
      return false;
  }
}

}  // namespace recis
