// The arithmetic of element-wise feature operations, one value at a time.
//
// The kernels of single operators (transform.h) and of fused programs (program.h) both call these functions and are
// compiled without contraction, so fused and unfused results are equal bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/hash/bytes.h"
#include "core/hash/murmur.h"

namespace recis {

// Remainders by a constant divisor, computed with a multiplication and shifts instead of a division; exact for every
// 64-bit value (Granlund and Montgomery: Division by invariant integers using multiplication, 1994, figure 4.1).
struct Divisor {
  uint64_t divisor;
  uint64_t magic;
  int32_t shift1;
  int32_t shift2;

  // For the host only. `by` must be at least 1.
  static Divisor of(uint64_t by) {
    int32_t bits = 0;  // the least number with 2^bits >= by
    while (bits < 64 && (static_cast<unsigned __int128>(1) << bits) < by) ++bits;
    const unsigned __int128 excess = (static_cast<unsigned __int128>(1) << bits) - by;
    return {by, static_cast<uint64_t>((excess << 64) / by + 1), bits < 1 ? bits : 1, bits < 1 ? 0 : bits - 1};
  }

  RECIS_HD uint64_t remainder(uint64_t x) const {
    const uint64_t high = multiply_high(magic, x);
    return x - ((high + ((x - high) >> shift1)) >> shift2) * divisor;
  }
};

// (((x * multiplier) % prime + prime) % prime) % buckets in signed arithmetic that wraps; 0 <= result < buckets.
struct MultiHash {
  uint64_t multiplier;
  Divisor prime;
  Divisor buckets;

  RECIS_HD uint64_t operator()(uint64_t x) const {
    const uint64_t product = x * multiplier;
    // For v < 0, floor(v mod p) = p - 1 - (-1 - v) mod p, and -1 - v is ~v.
    const uint64_t negative = 0 - (product >> 63);
    const uint64_t remainder = prime.remainder(product ^ negative);
    return buckets.remainder(negative != 0 ? prime.divisor - 1 - remainder : remainder);
  }
};

// The id of a pair of ids: MurmurHash64A (seed 0) of x's eight bytes and then y's.
RECIS_HD uint64_t cross_ids(uint64_t x, uint64_t y) {
  RECIS_ONE_BY_ONE(x);
  return Murmur{}(PairBytes{x, y});
}

template <class T>
RECIS_HD bool is_nan(T value) {
  return value != value;
}

// Whether a value lies above a sorted boundary: at or above it (kRight), or strictly above. The comparison is negated
// so that NaN lies above every boundary.
template <bool kRight, class T>
RECIS_HD bool above(T value, T boundary) {
  return kRight ? !(value < boundary) : !(value <= boundary);
}

// The number of sorted boundaries that a value lies above. The search takes the same steps for every value, so no
// branch depends on data.
template <bool kRight, class T>
RECIS_HD int64_t boundaries_below(T value, const T* boundaries, int64_t count) {
  int64_t below = 0;
  int64_t left = count;
  while (left > 1) {
    const int64_t half = left / 2;
    below += above<kRight>(value, boundaries[below + half - 1]) ? half : 0;
    left -= half;
  }
  if (left == 1) below += above<kRight>(value, boundaries[below]) ? 1 : 0;
  return below;
}

// Maps from one number to another: f(x) is the result, and f.bad(x) is true if x has none.

// x mod the divisor, where the bits of x are read as an unsigned integer.
struct ModOf {
  Divisor divisor;
  RECIS_HD bool bad(int64_t) const { return false; }
  RECIS_HD int64_t operator()(int64_t x) const {
    return static_cast<int64_t>(divisor.remainder(static_cast<uint64_t>(x)));
  }
};

struct MultiHashOf {
  MultiHash hash;
  RECIS_HD bool bad(int64_t) const { return false; }
  RECIS_HD int64_t operator()(int64_t x) const { return static_cast<int64_t>(hash(static_cast<uint64_t>(x))); }
};

// The number of sorted boundaries below x; see boundaries_below.
template <class T, bool kRight>
struct BucketOf {
  const T* boundaries;
  int64_t count;
  RECIS_HD bool bad(T x) const { return is_nan(x); }
  RECIS_HD int64_t operator()(T x) const { return boundaries_below<kRight>(x, boundaries, count); }
};

// log(x + plus), for x + plus > 0.
template <class T>
struct LogOf {
  T plus;
  RECIS_HD bool bad(T x) const { return !(x + plus > T{0}); }
  RECIS_HD T operator()(T x) const { return std::log(x + plus); }
};

// The nearest number within [least, most].
template <class T>
struct ClipOf {
  T least;
  T most;
  RECIS_HD bool bad(T x) const { return is_nan(x); }
  RECIS_HD T operator()(T x) const { return x < least ? least : x > most ? most : x; }
};

// (x - mean) / std
template <class T>
struct NormalizeOf {
  T mean;
  T std;
  RECIS_HD bool bad(T x) const { return is_nan(x); }
  RECIS_HD T operator()(T x) const { return (x - mean) / std; }
};

// `value` where x is NaN.
template <class T>
struct FillOf {
  T value;
  RECIS_HD bool bad(T) const { return false; }
  RECIS_HD T operator()(T x) const { return is_nan(x) ? value : x; }
};

// A number converted to another type. Floats become integers by truncation toward zero; NaN and values outside the
// range of int64 are bad. Integers wrap when they become narrower.
template <class From, class To>
struct CastOf {
  RECIS_HD bool bad(From x) const {
    if constexpr (static_cast<From>(0.5) != From{0} && static_cast<To>(0.5) == To{0}) {
      return !(x >= static_cast<From>(-9223372036854775808.0) && x < static_cast<From>(9223372036854775808.0));
    }
    return false;
  }
  RECIS_HD To operator()(From x) const { return bad(x) ? To{0} : static_cast<To>(x); }
};

}  // namespace recis
