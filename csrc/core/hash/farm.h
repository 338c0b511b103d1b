// FarmHash Fingerprint64, FarmHash's "na" variant (Geoff Pike, 2014): stable across versions and machines.
#pragma once

#include <cstdint>

#include "core/hash/bytes.h"

namespace recis {

struct Farm {
  static constexpr uint64_t k0 = 0xc3a5c85c97cb3127ull;
  static constexpr uint64_t k1 = 0xb492b66fbe98f273ull;
  static constexpr uint64_t k2 = 0x9ae16a3b2f90404full;

  struct Pair {
    uint64_t first;
    uint64_t second;
  };

  RECIS_HD static uint64_t rotate(uint64_t x, int by) { return x >> by | x << (64 - by); }
  RECIS_HD static uint64_t mix(uint64_t x) { return x ^ (x >> 47); }

  // Combines two words into one.
  RECIS_HD static uint64_t join(uint64_t u, uint64_t v, uint64_t multiplier) {
    const uint64_t a = mix((u ^ v) * multiplier);
    return mix((v ^ a) * multiplier) * multiplier;
  }

  // 1 to 16 bytes.
  template <class Source>
  RECIS_HD static uint64_t upto16(const Source& s, uint64_t size) {
    const uint64_t multiplier = k2 + size * 2;
    if (size >= 8) {
      const uint64_t a = s.word64(0) + k2;
      const uint64_t b = s.word64(size - 8);
      return join(rotate(b, 37) * multiplier + a, (rotate(a, 25) + b) * multiplier, multiplier);
    }
    if (size >= 4) return join(size + (s.word32(0) << 3), s.word32(size - 4), multiplier);
    const uint64_t y = s.byte(0) + (s.byte(size >> 1) << 8);
    const uint64_t z = size + (s.byte(size - 1) << 2);
    return mix(y * k2 ^ z * k0) * k2;
  }

  // 17 to 64 bytes. Up to 32, the words at both ends make up the hash; above, the middle is mixed in.
  template <class Source>
  RECIS_HD static uint64_t upto64(const Source& s, uint64_t size) {
    const uint64_t multiplier = k2 + size * 2;
    const bool small = size <= 32;
    const uint64_t a = s.word64(0) * (small ? k1 : k2);
    const uint64_t b = s.word64(8);
    const uint64_t c = s.word64(size - 8) * multiplier;
    const uint64_t d = s.word64(size - 16) * k2;
    const uint64_t y = rotate(a + b, 43) + rotate(c, 30) + d;
    const uint64_t z = join(y, a + rotate(b + k2, 18) + c, multiplier);
    if (small) return z;
    const uint64_t e = s.word64(16) * multiplier;
    const uint64_t f = s.word64(24);
    const uint64_t g = (y + s.word64(size - 32)) * multiplier;
    const uint64_t h = (z + s.word64(size - 24)) * multiplier;
    return join(rotate(e + f, 43) + rotate(g, 30) + h, e + rotate(f + a, 18) + g, multiplier);
  }

  // Mixes four words of the string into a pair.
  template <class Source>
  RECIS_HD static Pair stir(const Source& s, int64_t at, uint64_t a, uint64_t b) {
    a += s.word64(at);
    const uint64_t last = s.word64(at + 24);
    b = rotate(b + a + last, 21);
    const uint64_t before = a;
    a += s.word64(at + 8) + s.word64(at + 16);
    b += rotate(a, 44);
    return {a + last, b + before};
  }

  // The state of a long string, 56 bytes; every block of 64 bytes updates it.
  struct State {
    uint64_t x, y, z;
    Pair v, w;

    // `weight` is 9 for the last block and 1 for the others.
    template <class Source>
    RECIS_HD void round(const Source& s, int64_t at, uint64_t multiplier, uint64_t weight) {
      x = rotate(x + y + v.first + s.word64(at + 8), 37) * multiplier;
      y = rotate(y + v.second + s.word64(at + 48), 42) * multiplier;
      x ^= w.second * weight;
      y += v.first * weight + s.word64(at + 40);
      z = rotate(z + w.first, 33) * multiplier;
      v = stir(s, at, v.second * multiplier, x + w.first);
      w = stir(s, at + 32, z + w.second, y + s.word64(at + 16));
      const uint64_t swapped = x;
      x = z;
      z = swapped;
    }
  };

  // More than 64 bytes: all whole blocks but the last, then the last 64 bytes, which may overlap the block before.
  template <class Source>
  RECIS_HD static uint64_t above64(const Source& s, int64_t size) {
    constexpr uint64_t kSeed = 81;
    State state{kSeed * k2 + s.word64(0), kSeed * k1 + 113, 0, {0, 0}, {0, 0}};
    state.z = mix(state.y * k2 + 113) * k2;
    const int64_t rest = (size - 1) & 63;
    for (int64_t at = 0; at < size - 1 - rest; at += 64) state.round(s, at, k1, 1);

    const uint64_t multiplier = k1 + ((state.z & 0xff) << 1);
    state.w.first += static_cast<uint64_t>(rest);
    state.v.first += state.w.first;
    state.w.first += state.v.first;
    state.round(s, size - 64, multiplier, 9);
    return join(join(state.v.first, state.w.first, multiplier) + mix(state.y) * k0 + state.z,
                join(state.v.second, state.w.second, multiplier) + state.x, multiplier);
  }

  template <class Source>
  RECIS_HD uint64_t operator()(const Source& s) const {
    const auto size = static_cast<uint64_t>(s.size);
    if (size == 0) return k2;
    if (size <= 16) return upto16(s, size);
    if (size <= 64) return upto64(s, size);
    return above64(s, s.size);
  }
};

}  // namespace recis
