// Vocabularies: maps from strings or ids to their index in a list. Exact: a hash finds candidates, which are compared.
#pragma once

#include <cstdint>

#include "core/hash/bytes.h"
#include "core/hash/farm.h"
#include "core/hash/murmur.h"
#include "core/macros.h"

namespace recis {

// A view of six header words and the arrays that follow them, all in one array of 64-bit words, so that a vocabulary is
// passed as one tensor. Positions are relative to the header:
//
//   words[0] mask      number of slots - 1; a power of two of slots, more than entries
//   words[1] slots     position of the slots: 1 + entry, or 0 for an empty one; open addressing, linear probing
//   words[2] keys      position of the entries' hashes (strings) or of the entries (ids)
//   words[3] offsets   position of the entries + 1 offsets into `bytes` (strings)
//   words[4] bytes     position of the entries' bytes (strings)
//   words[5] unknown   the result for values without an entry; -1 refuses them
struct Vocabulary {
  const int64_t* words;

  RECIS_HD int64_t unknown() const { return words[5]; }

  template <class Same>
  RECIS_HD int64_t find(uint64_t hash, Same&& same) const {
    const int64_t* slots = words + words[1];
    const uint64_t mask = static_cast<uint64_t>(words[0]);
    for (uint64_t slot = hash & mask;; slot = (slot + 1) & mask) {
      const int64_t entry = slots[slot] - 1;
      if (entry < 0) return unknown();
      if (same(entry)) return entry;
    }
  }

  RECIS_HD int64_t find_id(int64_t id) const {
    const int64_t* keys = words + words[2];
    return find(Murmur{}(WordBytes{static_cast<uint64_t>(id)}), [&](int64_t entry) { return keys[entry] == id; });
  }

  RECIS_HD int64_t find_string(const Bytes& string) const {
    const int64_t* keys = words + words[2];
    const int64_t* offsets = words + words[3];
    const auto* bytes = reinterpret_cast<const uint8_t*>(words + words[4]);
    const uint64_t hash = Farm{}(string);
    return find(hash, [&](int64_t entry) {
      if (static_cast<uint64_t>(keys[entry]) != hash || offsets[entry + 1] - offsets[entry] != string.size)
        return false;
      for (int64_t at = 0; at < string.size; ++at) {
        if (bytes[offsets[entry] + at] != string.data[at]) return false;
      }
      return true;
    });
  }
};

}  // namespace recis
