// Reading little-endian words from bytes at any address.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace recis {

static_assert(std::endian::native == std::endian::little, "hashes are defined on little-endian words");

// A string of bytes, read in place. `data` may have any alignment; no read goes outside [data, data + size).
struct Bytes {
  const uint8_t* data;
  int64_t size;

  RECIS_HD uint64_t byte(int64_t at) const { return data[at]; }

  // Four bytes from `at`.
  RECIS_HD uint64_t word32(int64_t at) const {
#if defined(__CUDA_ARCH__)
    return read<4>(data + at);
#else
    uint32_t word;
    std::memcpy(&word, data + at, sizeof(word));
    return word;
#endif
  }

  // Eight bytes from `at`.
  RECIS_HD uint64_t word64(int64_t at) const {
#if defined(__CUDA_ARCH__)
    return read<8>(data + at);
#else
    uint64_t word;
    std::memcpy(&word, data + at, sizeof(word));
    return word;
#endif
  }

#if defined(__CUDA_ARCH__)
 private:
  // A GPU faults on unaligned accesses, so a word is split into halves until they are aligned.
  template <int kSize>
  static __device__ __forceinline__ uint64_t read(const uint8_t* at) {
    if constexpr (kSize == 1) {
      return *at;
    } else {
      if (reinterpret_cast<uintptr_t>(at) % kSize == 0) {
        if constexpr (kSize == 8) return *reinterpret_cast<const uint64_t*>(at);
        if constexpr (kSize == 4) return *reinterpret_cast<const uint32_t*>(at);
        if constexpr (kSize == 2) return *reinterpret_cast<const uint16_t*>(at);
      }
      return read<kSize / 2>(at) | read<kSize / 2>(at + kSize / 2) << (kSize * 4);
    }
  }
#endif
};

// Eight bytes held in a word, so that ids are hashed like Bytes without a copy in memory.
struct WordBytes {
  uint64_t word;
  int64_t size = 8;

  RECIS_HD uint64_t byte(int64_t at) const { return word >> (8 * at) & 0xff; }
  RECIS_HD uint64_t word32(int64_t at) const { return word >> (8 * at) & 0xffffffff; }
  RECIS_HD uint64_t word64(int64_t) const { return word; }
};

// Sixteen bytes held in two words: a pair of ids.
struct PairBytes {
  uint64_t low;
  uint64_t high;
  int64_t size = 16;

  RECIS_HD uint64_t byte(int64_t at) const { return word64(at & 8) >> (8 * (at & 7)) & 0xff; }
  RECIS_HD uint64_t word32(int64_t at) const { return word64(at & 8) >> (8 * (at & 7)) & 0xffffffff; }
  RECIS_HD uint64_t word64(int64_t at) const { return at == 0 ? low : high; }
};

}  // namespace recis
