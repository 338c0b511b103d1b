// MurmurHash64A (Austin Appleby, 2008), seed 0.
#pragma once

#include <cstdint>

#include "core/hash/bytes.h"

namespace recis {

struct Murmur {
  static constexpr uint64_t kMultiplier = 0xc6a4a7935bd1e995ull;

  RECIS_HD static uint64_t mix(uint64_t x) { return x ^ (x >> 47); }

  // The last size % 8 bytes as one word, assembled from overlapping words, which takes few branches and no loop.
  template <class Source>
  RECIS_HD static uint64_t tail(const Source& bytes) {
    const int64_t size = bytes.size;
    if (size >= 8) return bytes.word64(size - 8) >> (64 - 8 * (size & 7));
    if (size >= 4) return bytes.word32(0) | bytes.word32(size - 4) << (8 * (size - 4));
    return bytes.byte(0) | bytes.byte(size >> 1) << (8 * (size >> 1)) | bytes.byte(size - 1) << (8 * (size - 1));
  }

  template <class Source>
  RECIS_HD uint64_t operator()(const Source& bytes) const {
    uint64_t hash = static_cast<uint64_t>(bytes.size) * kMultiplier;
    for (int64_t at = 0; at + 8 <= bytes.size; at += 8) {
      hash = (hash ^ mix(bytes.word64(at) * kMultiplier) * kMultiplier) * kMultiplier;
    }
    if ((bytes.size & 7) != 0) hash = (hash ^ tail(bytes)) * kMultiplier;
    return mix(mix(hash) * kMultiplier);
  }
};

}  // namespace recis
