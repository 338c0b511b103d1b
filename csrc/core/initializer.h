// Initial values of rows: a function of (seed, name of the member table, id), independent of the order of arrival.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/normal.h"
#include "core/philox.h"

namespace recis {

enum class InitKind : int32_t { kConstant = 0, kUniform = 1, kNormal = 2, kTruncatedNormal = 3 };

// The initializer of one member table, a row of an int64 [members, 5] tensor.
struct Initializer {
  InitKind kind;
  float a;    // constant: the value; uniform: the low end; normal: the mean
  float b;    // uniform: the high end; normal: the standard deviation
  float low;  // truncated normal: its bounds
  float high;
  float erf_low;  // truncated normal: erf of the bounds in units of sqrt(2) standard deviations from the mean
  float erf_high;
  int32_t first_quad;  // for rows split by column: the index of the first four elements of this shard
  uint64_t key;        // hash of the seed and the member table's name
};
static_assert(sizeof(Initializer) == 40, "Initializer is read from rows of five int64");

// Elements 4 * quad .. 4 * quad + 3 of the row of `id`, counted from first_quad.
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
      // The inverse of the cumulative distribution function between its values at the bounds.
      const float u = init.erf_low + (init.erf_high - init.erf_low) * unit_float(random.x[j]);
      const float x = init.a + init.b * (1.41421356f * inverse_erf(u));
      out[j] = x < init.low ? init.low : x > init.high ? init.high : x;
    }
  }
}

}  // namespace recis
