// XXH64 (Yann Collet, 2012), seed 0.
#pragma once

#include <cstdint>

#include "core/hash/bytes.h"

namespace recis {

struct Xxh64 {
  static constexpr uint64_t k1 = 0x9e3779b185ebca87ull;
  static constexpr uint64_t k2 = 0xc2b2ae3d27d4eb4full;
  static constexpr uint64_t k3 = 0x165667b19e3779f9ull;
  static constexpr uint64_t k4 = 0x85ebca77c2b2ae63ull;
  static constexpr uint64_t k5 = 0x27d4eb2f165667c5ull;

  RECIS_HD static uint64_t rotate(uint64_t x, int by) { return x << by | x >> (64 - by); }
  RECIS_HD static uint64_t round(uint64_t lane, uint64_t word) { return rotate(lane + word * k2, 31) * k1; }
  RECIS_HD static uint64_t merge(uint64_t hash, uint64_t lane) { return (hash ^ round(0, lane)) * k1 + k4; }

  template <class Source>
  RECIS_HD uint64_t operator()(const Source& bytes) const {
    int64_t at = 0;
    uint64_t hash = k5;
    if (bytes.size >= 32) {
      uint64_t a = k1 + k2;
      uint64_t b = k2;
      uint64_t c = 0;
      uint64_t d = 0 - k1;
      for (; at + 32 <= bytes.size; at += 32) {
        a = round(a, bytes.word64(at));
        b = round(b, bytes.word64(at + 8));
        c = round(c, bytes.word64(at + 16));
        d = round(d, bytes.word64(at + 24));
      }
      hash = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18);
      hash = merge(merge(merge(merge(hash, a), b), c), d);
    }
    hash += static_cast<uint64_t>(bytes.size);
    for (; at + 8 <= bytes.size; at += 8) hash = rotate(hash ^ round(0, bytes.word64(at)), 27) * k1 + k4;
    if (at + 4 <= bytes.size) {
      hash = rotate(hash ^ bytes.word32(at) * k1, 23) * k2 + k3;
      at += 4;
    }
    for (; at < bytes.size; ++at) hash = rotate(hash ^ bytes.byte(at) * k5, 11) * k1;
    hash = (hash ^ (hash >> 33)) * k2;
    hash = (hash ^ (hash >> 29)) * k3;
    return hash ^ (hash >> 32);
  }
};

}  // namespace recis
