// 64-bit mixing of ids.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace recis {

// The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), a bijection.
RECIS_HD uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// The hash that places an id of a member table in its IDMap. 2^64 / golden ratio keeps member tables apart.
RECIS_HD uint64_t slot_hash(int64_t id, int64_t member) {
  return mix64(static_cast<uint64_t>(id) + static_cast<uint64_t>(member + 1) * 0x9e3779b97f4a7c15ull);
}

// The hash whose top 16 bits are the bucket of an id. It is the same on every rank and in every checkpoint and must
// never change. It has its own salt, so that the ids of one bucket still spread over a whole IDMap.
RECIS_HD uint64_t bucket_hash(int64_t id) { return mix64(static_cast<uint64_t>(id) ^ 0x5851f42d4c957f2dull); }

// The bucket of an id, one of 65,536.
RECIS_HD int64_t bucket_of(int64_t id) { return static_cast<int64_t>(bucket_hash(id) >> 48); }

}  // namespace recis
