// Kernels that hash strings and ids to ids; the hash functions are in core/hash/.
#pragma once

#include <cstdint>

#include "core/hash/byte_hash.h"
#include "core/hash/bytes.h"
#include "core/hash/farm.h"
#include "core/hash/murmur.h"
#include "core/hash/strings.h"
#include "core/hash/xxh64.h"
#include "core/transform.h"

namespace recis {

enum class HashKind : int64_t { kFarm = 0, kMurmur = 1, kXxh64 = 2, kDjb2 = 3, kSdbm = 4 };

// Calls f with the hash function of a kind. Returns false, without a call, if there is no such kind.
template <class F>
RECIS_HD bool with_hasher(int64_t kind, F&& f) {
  switch (static_cast<HashKind>(kind)) {
    case HashKind::kFarm:
      f(Farm{});
      return true;
    case HashKind::kMurmur:
      f(Murmur{});
      return true;
    case HashKind::kXxh64:
      f(Xxh64{});
      return true;
    case HashKind::kDjb2:
      f(Djb2{});
      return true;
    case HashKind::kSdbm:
      f(Sdbm{});
      return true;
  }
  return false;
}

// out[i] = hash of the bytes [offsets[i], offsets[i + 1]) of `values`, which holds `total` bytes.
//
// A row outside the values is never read: its hash is 0 and, if it is in use, **fault becomes 1 + the row.
template <class Hasher>
struct HashBytes {
  const uint8_t* values;
  int64_t total;
  const int64_t* offsets;
  int64_t* out;
  const int64_t* used;    // [1]: the number of rows in use; null: all
  int64_t* const* fault;  // see ops/fault_word.h

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const int64_t begin = offsets[i];
    const int64_t end = offsets[i + 1];
    if (begin < 0 || end < begin || end > total) {
      if (used == nullptr || i < *used) refuse(*fault, i);
      out[i] = 0;
      return;
    }
    out[i] = static_cast<int64_t>(Hasher{}(Bytes{values + begin, end - begin}));
  }
};

// out[i] = hash of the eight little-endian bytes of ids[i].
template <class Hasher>
struct HashIds {
  const int64_t* ids;
  int64_t* out;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    uint64_t id = static_cast<uint64_t>(ids[i]);
    RECIS_ONE_BY_ONE(id);
    out[i] = static_cast<int64_t>(Hasher{}(WordBytes{id}));
  }
};

}  // namespace recis
