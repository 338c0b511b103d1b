// Standard normal numbers from uniform bits by the Box-Muller transform, in float32.
//
// log, sin and cos are polynomials, because the library functions of libm and CUDA differ: without contraction, every
// step below rounds identically on all devices. Coefficients are Chebyshev fits in double precision (error of log below
// 2e-9 on [sqrt(1/2), sqrt(2)]; of sin and cos below 2e-10 within an eighth of a turn), well under the rounding of
// float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace recis {

// The natural logarithm of x > 0, for normal numbers.
RECIS_HD float log_f32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  // Subtracting the bits of sqrt(1/2) splits x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  const uint32_t shifted = bits - 0x3f3504f3u;
  const int32_t e = static_cast<int32_t>(shifted) >> 23;
  const uint32_t mantissa = (shifted & 0x007fffffu) + 0x3f3504f3u;
  float m;
  memcpy(&m, &mantissa, 4);
  // log(m) = 2 atanh(s), s = (m - 1) / (m + 1); |s| < 0.1716, so the odd series is short.
  const float s = (m - 1.0f) / (m + 1.0f);
  const float z = s * s;
  float p = 0.2958039581f;
  p = p * z + 0.3998800962f;
  p = p * z + 0.6666669621f;
  const float tail = s * z * p;
  const float fe = static_cast<float>(e);
  return fe * 0.693145751953125f + (2.0f * s + (tail + fe * 1.42860677e-6f));
}

struct Pair {
  float a;
  float b;
};

// cos and sin of 2 pi u for u in [0, 1).
RECIS_HD Pair turn_f32(float u) {
  const float v = u * 4.0f;
  const int32_t quarter = static_cast<int32_t>(v + 0.5f);
  const float t = v - static_cast<float>(quarter);
  const float y = t * t;
  float s = 1.58323377e-4f;
  s = s * y - 4.681319e-3f;
  s = s * y + 7.96925900e-2f;
  s = s * y - 0.645964096f;
  s = t * (s * y + 1.57079633f);
  float c = 9.04446404e-4f;
  c = c * y - 2.08604382e-2f;
  c = c * y + 0.253669255f;
  c = c * y - 1.23370054f;
  c = c * y + 1.0f;
  switch (quarter & 3) {
    case 0:
      return {c, s};
    case 1:
      return {-s, c};
    case 2:
      return {-c, -s};
    default:
      return {s, -c};
  }
}

// Two independent standard normal numbers from two words of random bits.
RECIS_HD Pair normal_pair(uint32_t bits_a, uint32_t bits_b) {
  const float u = static_cast<float>((bits_a >> 8) + 1) * 0x1p-24f;  // in (0, 1], so that the logarithm is finite
  const float radius = sqrtf(-2.0f * log_f32(u));
  const Pair angle = turn_f32(static_cast<float>(bits_b >> 8) * 0x1p-24f);
  return {radius * angle.a, radius * angle.b};
}

// The inverse of the error function, in single precision: M. Giles: Approximating the erfinv function (GPU Computing
// Gems, 2011). Arguments outside (-1, 1) are clamped to the nearest float inside.
RECIS_HD float inverse_erf(float x) {
  constexpr float kEnd = 0x1.fffffep-1f;
  x = x < -kEnd ? -kEnd : x > kEnd ? kEnd : x;
  float w = -log_f32((1.0f - x) * (1.0f + x));
  float p;
  if (w < 5.0f) {
    w = w - 2.5f;
    p = 2.81022636e-08f;
    p = 3.43273939e-07f + p * w;
    p = -3.5233877e-06f + p * w;
    p = -4.39150654e-06f + p * w;
    p = 0.00021858087f + p * w;
    p = -0.00125372503f + p * w;
    p = -0.00417768164f + p * w;
    p = 0.246640727f + p * w;
    p = 1.50140941f + p * w;
  } else {
    w = sqrtf(w) - 3.0f;
    p = -0.000200214257f;
    p = 0.000100950558f + p * w;
    p = 0.00134934322f + p * w;
    p = -0.00367342844f + p * w;
    p = 0.00573950773f + p * w;
    p = -0.0076224613f + p * w;
    p = 0.00943887047f + p * w;
    p = 1.00167406f + p * w;
    p = 2.83297682f + p * w;
  }
  return p * x;
}

}  // namespace recis
