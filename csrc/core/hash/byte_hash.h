// Two hashes with one multiplication per byte and 64-bit state: weak, but independent of the others and of each other,
// as needed for several hashes of one string.
#pragma once

#include <cstdint>

#include "core/hash/bytes.h"

namespace recis {

// djb2 (Dan Bernstein): hash * 33 + byte, from 5381.
struct Djb2 {
  template <class Source>
  RECIS_HD uint64_t operator()(const Source& bytes) const {
    uint64_t hash = 5381;
    for (int64_t at = 0; at < bytes.size; ++at) hash = hash * 33 + bytes.byte(at);
    return hash;
  }
};

// sdbm (Ozan Yigit): hash * 65599 + byte, from 0.
struct Sdbm {
  template <class Source>
  RECIS_HD uint64_t operator()(const Source& bytes) const {
    uint64_t hash = 0;
    for (int64_t at = 0; at < bytes.size; ++at) hash = hash * 65599 + bytes.byte(at);
    return hash;
  }
};

}  // namespace recis
