// All rules, by name.
#pragma once

#include "core/rules/adagrad.h"
#include "core/rules/adam.h"
#include "core/rules/assign.h"
#include "core/rules/ftrl.h"
#include "core/rules/lamb.h"
#include "core/rules/lion.h"
#include "core/rules/rmsprop.h"
#include "core/rules/rowwise_adagrad.h"
#include "core/rules/sgd.h"

namespace recis {

// Calls f with the rule of a name in step t, counted from 1. Returns false if no rule has the name.
template <class F>
bool with_rule(const RuleCall& call, int64_t t, F&& f) {
  const auto with = [&]<class Rule>() {
    f(Rule::of(call, t));
    return true;
  };
  switch (call.kind) {
    case RuleKind::kSgd:
      return with.template operator()<SgdRule>();
    case RuleKind::kMomentum:
      return with.template operator()<MomentumRule>();
    case RuleKind::kAdagrad:
      return call.values[2] != 0 ? with.template operator()<AdagradRule<true>>()
                                 : with.template operator()<AdagradRule<false>>();
    case RuleKind::kRowwiseAdagrad:
      return call.values[2] != 0 || call.values[4] != 0 ? with.template operator()<RowwiseAdagradRule<true>>()
                                                        : with.template operator()<RowwiseAdagradRule<false>>();
    case RuleKind::kAdam:
    case RuleKind::kAdamW:
    case RuleKind::kAdamWTF:
      return with.template operator()<AdamRule>();
    case RuleKind::kAdamL2:
      return with.template operator()<AdamL2Rule<false>>();
    case RuleKind::kAmsgrad:
      return with.template operator()<AdamL2Rule<true>>();
    case RuleKind::kAdagradSum:
      return with.template operator()<AdagradSumRule>();
    case RuleKind::kRmsprop:
      return with.template operator()<RmspropRule>();
    case RuleKind::kFtrl:
      return with.template operator()<FtrlRule>();
    case RuleKind::kLamb:
      return with.template operator()<LambRule>();
    case RuleKind::kLion:
      return with.template operator()<LionRule>();
    case RuleKind::kRowwiseAdam:
      return with.template operator()<RowwiseAdamRule>();
    case RuleKind::kAssign:
      return with.template operator()<AssignRule>();
  }
  return false;
}

}  // namespace recis
