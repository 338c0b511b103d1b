// Kernels that hash strings and ids to ids; the hash functions are in core/hash/.
#pragma once

#include <cassert>
#include <cstdint>

#include "core/hash/byte_hash.h"
#include "core/hash/bytes.h"
#include "core/hash/farm.h"
#include "core/hash/murmur.h"
#include "core/hash/strings.h"
#include "core/hash/xxh64.h"

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
// A row outside the values is never read. On the CPU, *fault becomes 1 + such a row, and the operator raises. On CUDA
// the host could learn of it only by synchronizing, so the kernel traps, as torch does for an index out of bounds.
template <class Hasher>
struct HashBytes {
  const uint8_t* values;
  int64_t total;
  const int64_t* offsets;
  int64_t* out;
  int64_t* fault;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const int64_t begin = offsets[i];
    const int64_t end = offsets[i + 1];
    if (begin < 0 || end < begin || end > total) {
#if defined(__CUDA_ARCH__)
      assert(false && "recis::hash_bytes: offsets decrease or lie outside the values");
#else
      __atomic_store_n(fault, i + 1, __ATOMIC_RELAXED);
#endif
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
