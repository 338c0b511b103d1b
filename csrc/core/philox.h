// Philox4x32-10, a counter-based generator: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3
// (SC11).
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace recis {

struct Random4 {
  uint32_t x[4];
};

// Four independent 32-bit words, a function of (key, counter) alone.
RECIS_HD Random4 philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  Random4 c{{static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
             static_cast<uint32_t>(counter_high), static_cast<uint32_t>(counter_high >> 32)}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.x[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.x[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.x[1] ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.x[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Maps random bits to [0, 1): 24 bits, so that every value is exact in float32.
RECIS_HD float unit_float(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }

}  // namespace recis
