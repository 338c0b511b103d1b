// Rules of optimizers as plain data, and what all rules share.
//
// A rule is plain data with
//
//   static constexpr bool kHasState   whether it keeps state of type S for each element
//   static constexpr Needs kNeeds     what it needs of a row besides the gradient of an element
//   static Rule of(call, t)           the rule of step t, from 1
//   apply<E, S, W>(record, d, n, g, rounding)
//
// where apply updates elements d .. d + n - 1 of a record with an embedding of type E and state of type S by their
// gradient g. W is the width of a tile on CUDA; on the CPU, n may be any number. With kSquares, apply also gets the
// sums of the squares of the gradient's sources. A rule with kNorm also has
//
//   static constexpr bool kDirects               whether it has direct
//   float begin(record, elapsed)                 done by one lane first, `elapsed` steps after the last; may be missing
//   direct<E, S, W>(record, d, n, g, r, first)   computes r, whose norm the rule needs, from g and the record
//   float advance(record, mean)                  done by one lane, with the mean square of that
//
// and apply gets r in place of g, and the results of begin (`first`) and advance. A rule with kNorms has
//
//   direct<E, S, W>(record, d, n, g, r)          computes r from g and the record
//   float trust(r, w)                            the sums of the squares of r and of the embedding
//
// and apply gets r and trust's result, too. direct does not change the record: it runs again for rows that are too long
// to keep its results.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/element.h"
#include "core/for_each.h"

namespace recis {

enum class RuleKind : int32_t {
  kSgd = 0,
  kMomentum = 1,
  kAdagrad = 2,
  kRowwiseAdagrad = 3,
  kAdam = 4,
  kAdamW = 5,
  kAdamWTF = 6,
  kAdamL2 = 7,
  kAmsgrad = 8,
  kAdagradSum = 9,
  kRmsprop = 10,
  kFtrl = 11,
  kLamb = 12,
  kLion = 13,
  kRowwiseAdam = 14,
  kAssign = 15,
};

// An optimizer: a rule by name, with hyperparameters in double, in the order of its file. Unused ones are 0.
struct RuleCall {
  static constexpr int kOffsets = 3;
  static constexpr int kValues = 5;

  RuleKind kind;
  int64_t offsets[kOffsets];  // of the state fields in the record
  double values[kValues];

  float value(int k) const { return static_cast<float>(values[k]); }
};

enum class Needs {
  kGradient,
  kSquares,  // the sum of the squares of the sources of the gradient
  kNorm,     // the norm of the row's gradient
  kNorms,    // the norms of the row's direction and embedding
};

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

// w = keep * w - scale * g, for elements d .. d + n - 1 of a record.
template <class E, int W, class Count>
RECIS_HD void descend(char* record, int64_t d, Count n, const float* RECIS_RESTRICT g, float keep, float scale,
                      Rounding rounding) {
  EditTile<E, W> w_tile(field_at<E>(record, 0, d));
  E* RECIS_RESTRICT w = w_tile.data();
  for (int j = 0; j < n; ++j) rounding.store(w + j, keep * load_element(w[j]) - scale * g[j], d + j);
}

}  // namespace recis
