// A row's first values: a function of (seed, member table's name, id), whatever the order of arrival.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/normal.h"
#include "core/philox.h"

namespace recis {

enum class InitKind : int32_t { kConstant = 0, kUniform = 1, kNormal = 2, kTruncatedNormal = 3 };

// One member table's, as it lies in an int64 [members, 5] tensor.
struct Initializer {
  InitKind kind;
  float a;    // constant: the value; uniform: the low end; normal: the mean
  float b;    // uniform: the high end; normal: the standard deviation
  float low;  // truncated normal: its ends
  float high;
  float erf_low;  // truncated normal: erf of the ends as multiples of sqrt(2) standard deviations from the mean
  float erf_high;
  int32_t first_quad;  // where a row is split by column: which four of its elements are the first ones here
  uint64_t key;        // of seed and member table's name
};
static_assert(sizeof(Initializer) == 40, "Initializer is read from rows of five int64");

// Elements 4 * quad .. 4 * quad + 3 of what is here of the row of `id`.
RECIS_HD void first_values(const Initializer& init, int64_t id, int64_t quad, float (&out)[4]) {
  if (init.kind == InitKind::kConstant) {
    for (float& x : out) x = init.a;
    return;
  }
  const Random4 random = philox(init.key, static_cast<uint64_t>(id), static_cast<uint64_t>(init.first_quad + quad));
  if (init.kind == InitKind::kUniform) {
    for (int j = 0; j < 4; ++j) out[j] = init.a + (init.b - init.a) * unit_float(random.x[j]);
  } else if (init.kind == InitKind::kNormal) {
    for (int j = 0; j < 4; j += 2) {
      const Pair pair = normal_pair(random.x[j], random.x[j + 1]);
      out[j] = init.a + init.b * pair.a;
      out[j + 1] = init.a + init.b * pair.b;
    }
  } else {
    for (int j = 0; j < 4; ++j) {
      // The inverse of the cumulative distribution, between the two ends' values of it.
      const float u = init.erf_low + (init.erf_high - init.erf_low) * unit_float(random.x[j]);
      const float x = init.a + init.b * (1.41421356f * inverse_erf(u));
      out[j] = x < init.low ? init.low : x > init.high ? init.high : x;
    }
  }
}

}  // namespace recis
