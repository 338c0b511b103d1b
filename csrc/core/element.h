// Elements of records: float32, bfloat16 and float16, converted to and from float32.
//
// Conversions operate on bits, are identical on every CPU level and on CUDA, and have no branches, so that loops over
// them vectorize.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace recis {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

RECIS_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

RECIS_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

RECIS_HD float load_element(float x) { return x; }

RECIS_HD float load_element(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

RECIS_HD float load_element(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t exponent = magnitude & 0x0f800000;
  const float subnormal = float_of(magnitude + 0x38800000) - float_of(0x38800000);  // 0x38800000 is 2^-14
  const uint32_t shift = exponent == 0x0f800000 ? 0x70000000 : 0x38000000;          // infinity and NaN, or normal
  return float_of(sign | (exponent == 0 ? bits_of(subnormal) : magnitude + shift));
}

// Stores x rounded to nearest, ties to even.
RECIS_HD void store_element(float* at, float x) { *at = x; }

RECIS_HD void store_element(BFloat16* at, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  at->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

namespace detail {

// The bits of a float16, given the rounded bits for both cases, a normal and a subnormal number.
RECIS_HD uint16_t float16_bits(uint32_t bits, uint32_t normal, uint32_t subnormal) {
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half = magnitude < 0x38800000 ? subnormal : (normal - 0x38000000) >> 13;
  half = magnitude >= 0x47800000 || half > 0x7c00 ? 0x7c00 : half;  // 65,536 and above
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return static_cast<uint16_t>(bits >> 16 & 0x8000) | static_cast<uint16_t>(half);
}

}  // namespace detail

RECIS_HD void store_element(Float16* at, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Below 2^-14 the spacing is 2^-24: adding 0.5 leaves exactly these bits, rounded.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  at->bits = detail::float16_bits(bits, magnitude + 0xfff + (magnitude >> 13 & 1), subnormal);
}

// Stores x rounded up or down at random, so that the expected value is x: updates smaller than half the spacing of the
// type are applied now and then instead of being lost (Gupta et al.: Deep learning with limited numerical precision,
// ICML 2015).
RECIS_HD void store_stochastic(float* at, float x, uint32_t) { *at = x; }

RECIS_HD void store_stochastic(BFloat16* at, float x, uint32_t random) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Above the greatest finite number, rounding up would yield infinity, so x is rounded to nearest.
  const uint32_t up = magnitude > 0x7f7f0000 ? 0x7fff + (bits >> 16 & 1) : random & 0xffff;
  const uint32_t rounded = (bits + up) >> 16;
  at->bits =
      static_cast<uint16_t>(magnitude >= 0x7f800000 ? bits >> 16 | (magnitude > 0x7f800000 ? 0x40 : 0) : rounded);
}

RECIS_HD void store_stochastic(Float16* at, float x, uint32_t random) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  // In units of 2^-24, truncated after a random fraction is added. The select keeps large values out of the conversion.
  const float units = (magnitude < 0x38800000 ? float_of(magnitude) : 0.0f) * 0x1p24f;
  const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(units + (random & 0x1fff) * 0x1p-13f));
  // Above the greatest finite number, 65,504, x is rounded to nearest, as for bfloat16.
  const uint32_t up = magnitude > 0x477fe000 ? 0xfff + (magnitude >> 13 & 1) : random & 0x1fff;
  at->bits = detail::float16_bits(bits, magnitude + up, subnormal);
}

// Random bits for rounding an element: a function of its value, the step and its position in the row, so that results
// do not depend on row indices, threads or the order of arrival.
RECIS_HD uint32_t rounding_bits(uint32_t seed, uint32_t element, float x) {
  uint32_t h = bits_of(x) ^ (seed + element * 0x9e3779b9u);
  h = (h ^ (h >> 16)) * 0x21f0aaadu;  // the "lowbias32" mix of C. Wellons' hash prospector
  h = (h ^ (h >> 15)) * 0x735a2d97u;
  return h ^ (h >> 15);
}

}  // namespace recis
