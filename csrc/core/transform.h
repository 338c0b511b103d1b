// Element-wise kernels of features: remainder and bucket.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace recis {

// Remainders by a divisor that stays the same: a multiplication and shifts in place of a division, exact for every
// 64-bit value (Granlund and Montgomery: Division by invariant integers using multiplication, 1994, figure 4.1).
struct Divisor {
  uint64_t divisor;
  uint64_t magic;
  int32_t shift1;
  int32_t shift2;

  // `by` is at least 1. Called on the host.
  static Divisor of(uint64_t by) {
    int32_t bits = 0;  // the least number with 2^bits >= by
    while (bits < 64 && (static_cast<unsigned __int128>(1) << bits) < by) ++bits;
    const unsigned __int128 excess = (static_cast<unsigned __int128>(1) << bits) - by;
    return {by, static_cast<uint64_t>((excess << 64) / by + 1), bits < 1 ? bits : 1, bits < 1 ? 0 : bits - 1};
  }

  RECIS_HD uint64_t remainder(uint64_t x) const {
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(magic, x);
#else
    const uint64_t high = static_cast<uint64_t>(static_cast<unsigned __int128>(magic) * x >> 64);
#endif
    return x - ((high + ((x - high) >> shift1)) >> shift2) * divisor;
  }
};

// out[i] = ids[i] mod the divisor, the id's 64 bits read as an unsigned number: 0 <= out[i] < divisor.
struct ModIds {
  const int64_t* ids;
  Divisor divisor;
  int64_t* out;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    out[i] = static_cast<int64_t>(divisor.remainder(static_cast<uint64_t>(ids[i])));
  }
};

// out[i] = how many of the sorted boundaries lie at or below values[i] (kRight), or below it. NaN is above all of them.
//
// The search takes the same steps for every value, so that no branch depends on data.
template <class T, bool kRight>
struct Bucketize {
  const T* values;
  const T* boundaries;
  int64_t count;
  int64_t* out;

  RECIS_HD static bool above(T value, T boundary) {
    // Negated, so that NaN counts every boundary.
    return kRight ? !(value < boundary) : !(value <= boundary);
  }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const T value = values[i];
    int64_t below = 0;
    int64_t left = count;
    while (left > 1) {
      const int64_t half = left / 2;
      below += above(value, boundaries[below + half - 1]) ? half : 0;
      left -= half;
    }
    if (left == 1) below += above(value, boundaries[below]) ? 1 : 0;
    out[i] = below;
  }
};

}  // namespace recis
