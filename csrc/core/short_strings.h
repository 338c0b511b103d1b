// Hashes of many short strings, without a branch on their lengths.
//
// Lengths that vary make the branches of a hash mispredict, which costs more than the hash. For strings of 1 to 16
// bytes every case is computed from two words, the string's first and last eight bytes, and one is selected. The words
// may reach outside the string, but never outside the column; strings at its ends, which would, and all others are
// hashed one by one. The result is that of the hash itself, bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/farm.h"
#include "core/murmur.h"

namespace recis {

// A string of `size` bytes (1 to 16): eight bytes from its start, and the eight that end where it ends.
struct ShortString {
  uint64_t first;
  uint64_t last;
  uint64_t size;
};

template <class Hasher>
struct ShortHash {
  static constexpr bool kExists = false;
};

template <>
struct ShortHash<Farm> {
  static constexpr bool kExists = true;

  RECIS_HD static uint64_t hash(const ShortString& s) {
    const uint64_t multiplier = Farm::k2 + s.size * 2;
    const bool words = s.size >= 8;
    const uint64_t a = s.first + Farm::k2;
    const uint64_t u8 = Farm::rotate(s.last, 37) * multiplier + a;
    const uint64_t v8 = (Farm::rotate(a, 25) + s.last) * multiplier;
    const uint64_t u4 = s.size + ((s.first & 0xffffffff) << 3);
    const uint64_t joined = Farm::join(words ? u8 : u4, words ? v8 : s.last >> 32, multiplier);
    const uint64_t y = (s.first & 0xff) + ((s.first >> (8 * (s.size >> 1 & 1)) & 0xff) << 8);
    const uint64_t z = s.size + (s.last >> 56 << 2);
    const uint64_t few = Farm::mix(y * Farm::k2 ^ z * Farm::k0) * Farm::k2;
    return s.size >= 4 ? joined : few;
  }
};

template <>
struct ShortHash<Murmur> {
  static constexpr bool kExists = true;

  RECIS_HD static uint64_t block(uint64_t hash, uint64_t word) {
    return (hash ^ Murmur::mix(word * Murmur::kMultiplier) * Murmur::kMultiplier) * Murmur::kMultiplier;
  }

  RECIS_HD static uint64_t hash(const ShortString& s) {
    const uint64_t rest = s.size & 7;
    // The last `rest` bytes end the string; below eight bytes the whole string does.
    const uint64_t tail = s.last >> (8 * (8 - rest) & 63);
    const uint64_t seed = s.size * Murmur::kMultiplier;
    const uint64_t one = block(seed, s.first);
    const uint64_t two = block(one, s.last);
    const uint64_t whole = s.size < 8 ? seed : s.size < 16 ? one : two;
    const uint64_t hash = rest == 0 ? whole : (whole ^ tail) * Murmur::kMultiplier;
    return Murmur::mix(Murmur::mix(hash) * Murmur::kMultiplier);
  }
};

// out[i] = hash of string i, for i < count; string i lies at [offsets[i], offsets[i + 1]) of the `total` bytes.
//
// Returns 1 + the number of a string whose offsets decrease or point outside, which is not followed (its out is 0), or
// 0 where all are good.
template <class Hasher>
RECIS_HD int64_t hash_strings(const uint8_t* values, int64_t total, const int64_t* offsets, int64_t count,
                              int64_t* out) {
  int64_t bad = 0;
  int64_t begin = offsets[0];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t end = offsets[i + 1];
    const int64_t size = end - begin;
    // As unsigned numbers, so that one comparison finds both ends; end <= total < 2^63 then makes size exact.
    if (static_cast<uint64_t>(begin) > static_cast<uint64_t>(end) ||
        static_cast<uint64_t>(end) > static_cast<uint64_t>(total)) {
      bad = i + 1;
      out[i] = 0;
      begin = end;
      continue;
    }
#if !defined(__CUDA_ARCH__)
    if constexpr (ShortHash<Hasher>::kExists) {
      if (static_cast<uint64_t>(size - 1) < 16 && end >= 8 && begin + 8 <= total) {
        ShortString s{0, 0, static_cast<uint64_t>(size)};
        std::memcpy(&s.first, values + begin, 8);
        std::memcpy(&s.last, values + end - 8, 8);
        out[i] = static_cast<int64_t>(ShortHash<Hasher>::hash(s));
        begin = end;
        continue;
      }
    }
#endif
    out[i] = static_cast<int64_t>(Hasher{}(Bytes{values + begin, size}));
    begin = end;
  }
  return bad;
}

}  // namespace recis
