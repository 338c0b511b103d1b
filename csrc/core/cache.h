// Kernels of a GPU cache of records, whose rows are in host memory that the GPU can access.
//
// The cache is set-associative: kWays ways form a set, and a row belongs to set `row % sets`. Rows are numbered
// densely, so sets are equally full, and `row / sets` identifies a row within its set. A kernel that works on records
// is given places instead of rows: the row itself, or first_place + the number of the way that holds its record. The
// address table of the blocks continues with those of the cache, whose first place is the capacity of the blocks.
//
// A lookup runs TouchRows for its distinct rows, which marks the ways that hold one, and then ClaimWays for the others.
// No way that the lookup uses is replaced in it, and each way is claimed by one row at most, by compare-and-swap, so
// that records are copied without locks. If a set has no other way left, the row is not cached ("bypassed").
//
// The way with the lowest score is replaced: the number of lookups that used it, halved with each epoch since (LFU with
// ageing), and of equal ones the way that was used longest ago.
#pragma once

#include <cstdint>

#include "core/atomics.h"
#include "core/blocks.h"
#include "core/for_each.h"
#include "core/table.h"

namespace recis {

inline constexpr int kWays = 32;
inline constexpr int kTagsAtOnce = 4;  // tags of one 16-byte access
inline constexpr uint32_t kNoTag = 0;

enum CacheCounter : int {
  kHits = 0,         // distinct rows of lookups that were in the cache
  kMisses = 1,       // those that were not
  kBypassed = 2,     // misses that found no way to replace
  kWrittenBack = 3,  // records that were copied back to the blocks
  kCacheCounters = 4,
};

// Counters have copies, which are added when they are read: atomic additions to one address would run one by one.
inline constexpr int64_t kCounterCopies = 64;

// The state of a way: 24 bits lookup that used it last | 16 bits epoch of that lookup | 23 bits count | 1 bit dirty.
struct WayState {
  uint64_t word;

  static constexpr int kCountBits = 23;
  static constexpr int kEpochBits = 16;
  static constexpr int kEpochShift = 1 + kCountBits;
  static constexpr int kLookupShift = kEpochShift + kEpochBits;
  static constexpr uint64_t kDirty = 1;
  static constexpr uint64_t kMostUsed = (uint64_t{1} << kCountBits) - 1;
  static constexpr uint64_t kEpochMask = (uint64_t{1} << kEpochBits) - 1;
  static constexpr uint64_t kLookupMask = (uint64_t{1} << (64 - kLookupShift)) - 1;

  RECIS_HD bool is_dirty() const { return (word & kDirty) != 0; }
  RECIS_HD uint64_t lookup() const { return word >> kLookupShift; }
  RECIS_HD uint64_t epoch() const { return word >> kEpochShift & kEpochMask; }
  RECIS_HD uint64_t count() const { return word >> 1 & kMostUsed; }
};

// The time of a lookup: its number from 1 and its epoch, both of which may wrap around.
struct CacheTime {
  uint64_t lookup;
  uint64_t epoch;

  RECIS_HD bool is_used_now(WayState state) const { return state.lookup() == lookup; }

  // The count of a way, halved with each epoch since it was used.
  RECIS_HD uint64_t aged_count(WayState state) const {
    const uint64_t epochs = (epoch - state.epoch()) & WayState::kEpochMask;
    return epochs >= WayState::kCountBits ? 0 : state.count() >> epochs;
  }

  // The state of a way that is used now.
  RECIS_HD uint64_t used(uint64_t count, bool dirty) const {
    const uint64_t most = count < WayState::kMostUsed ? count : WayState::kMostUsed;
    return lookup << WayState::kLookupShift | epoch << WayState::kEpochShift | most << 1 | (dirty ? 1 : 0);
  }

  // Orders the ways of a set; the lowest is replaced first. The last bits are the way.
  RECIS_HD uint64_t score(WayState state, int way) const {
    const uint64_t lookups_ago = (lookup - state.lookup()) & WayState::kLookupMask;
    return (aged_count(state) << 24 | (WayState::kLookupMask - lookups_ago)) << 5 | static_cast<uint64_t>(way);
  }
};

struct CacheRef {
  uint32_t* tags;     // [sets][kWays]: 1 + row / sets of the record that a way holds, or kNoTag; aligned to 16 bytes
  uint64_t* states;   // [sets][kWays]: WayState, 0 if empty
  int64_t* counters;  // [kCounterCopies][kCacheCounters]
  int64_t sets;
  int64_t first_place;  // the place of way 0

  RECIS_HD int64_t first_way(int64_t row) const { return row % sets * kWays; }

  // The tag of a row; kNoTag for a row that cannot be cached, because its tag would be too large.
  RECIS_HD uint32_t tag(int64_t row) const {
    const int64_t tag = row / sets + 1;
    return tag >> 32 == 0 ? static_cast<uint32_t>(tag) : kNoTag;
  }

  // The row of the record in a way.
  RECIS_HD int64_t row(int64_t way, uint32_t tag) const { return (int64_t{tag} - 1) * sets + way / kWays; }

  RECIS_HD void add(CacheCounter counter, int64_t item) const {
    fetch_add(counters + item % kCounterCopies * kCacheCounters + counter, 1);
  }
};

// The way that holds a row, or -1; with several lanes, the same for all.
template <class Lanes>
RECIS_HD int64_t find_way(const CacheRef& cache, int64_t row, Lanes lanes) {
  const uint32_t tag = cache.tag(row);
  const int64_t first = cache.first_way(row);
  uint64_t found = kWays;
  for (int way = lanes.rank * kTagsAtOnce; way < kWays; way += lanes.size * kTagsAtOnce) {
    ReadTile<uint32_t, kTagsAtOnce> tags(cache.tags + first + way);
    for (int j = 0; j < kTagsAtOnce; ++j) found = tags.data()[j] == tag ? static_cast<uint64_t>(way + j) : found;
  }
  found = lanes_min(found, lanes);
  return found == kWays || tag == kNoTag ? -1 : first + static_cast<int64_t>(found);
}

// Marks the ways that hold the rows of a lookup as used, and lists the rows that no way holds.
struct TouchRows {
  CacheRef cache;
  const int64_t* rows;  // distinct
  CacheTime now;
  uint8_t* missing;  // [rows]

  static constexpr int64_t lanes() { return kWays / kTagsAtOnce; }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    const int64_t way = find_way(cache, rows[i], lanes);
    if (lanes.rank != 0) return;
    missing[i] = way < 0 ? 1 : 0;
    cache.add(way < 0 ? kMisses : kHits, i);
    if (way < 0) return;
    const WayState state{cache.states[way]};
    cache.states[way] = now.used(now.aged_count(state) + 1, state.is_dirty());
  }
};

// Copies the records of missing rows into ways that the lookup does not use; a record there that is newer than the one
// in the blocks is written back first. TouchRows must have run.
struct ClaimWays {
  CacheRef cache;
  BlocksRef blocks;
  const int64_t* rows;  // distinct
  CacheTime now;
  const uint8_t* missing;

  static constexpr int64_t lanes() { return kWays; }

  // A claimed way: its number in the set, the tag of the record that it held, and whether that must be written back.
  struct Claim {
    uint64_t word;

    static constexpr uint64_t kNone = ~uint64_t{0};  // every way is used by this lookup
    static constexpr uint64_t kLost = kNone - 1;     // another row has claimed the way

    RECIS_HD int way() const { return static_cast<int>(word >> 33); }
    RECIS_HD bool is_dirty() const { return (word >> 32 & 1) != 0; }
    RECIS_HD uint32_t tag() const { return static_cast<uint32_t>(word); }
  };

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    if (missing[i] == 0) return;
    const int64_t row = rows[i];
    const uint32_t tag = cache.tag(row);
    Claim claim{Claim::kNone};
    if (tag != kNoTag) {
      do claim.word = lanes_min(try_claim(cache.first_way(row), lanes), lanes);
      while (claim.word == Claim::kLost);
    }
    if (claim.word == Claim::kNone) {
      if (lanes.rank == 0) cache.add(kBypassed, i);
      return;
    }
    const int64_t way = cache.first_way(row) + claim.way();
    replace(blocks.record(cache.first_place + way), blocks.record(row),
            claim.is_dirty() ? blocks.record(cache.row(way, claim.tag())) : nullptr, lanes);
    if (lanes.rank != 0) return;
    cache.tags[way] = tag;
    if (claim.is_dirty()) cache.add(kWrittenBack, i);
  }

  // Claims the way with the lowest score: the lane that saw it returns the claim, or kLost; others return kNone.
  template <class Lanes>
  RECIS_HD uint64_t try_claim(int64_t first, Lanes lanes) const {
    uint64_t best = Claim::kNone;
    uint64_t seen = 0;
    for (int way = lanes.rank; way < kWays; way += lanes.size) {
      const uint64_t state = load_relaxed(cache.states + first + way);
      if (now.is_used_now({state})) continue;
      const uint64_t score = now.score({state}, way);
      seen = score < best ? state : seen;
      best = score < best ? score : best;
    }
    if (lanes_min(best, lanes) != best || best == Claim::kNone) return Claim::kNone;
    const int64_t way = static_cast<int64_t>(best % kWays);
    const uint64_t dirty = WayState{seen}.is_dirty() ? 1 : 0;
    if (!compare_exchange(cache.states + first + way, seen, now.used(1, false))) return Claim::kLost;
    return static_cast<uint64_t>(way) << 33 | dirty << 32 | cache.tags[first + way];
  }

  // Moves the record in `cached` to `old`, unless null, and copies `fresh` into its place. Each lane reads a word
  // before it overwrites it, so lanes need not wait for each other.
  template <class Lanes>
  RECIS_HD void replace(char* cached, const char* fresh, char* old, Lanes lanes) const {
    const int64_t words = blocks.record_bytes / 16;
    for (int64_t w = lanes.rank; w < words; w += lanes.size) {
      Word<16>* at = reinterpret_cast<Word<16>*>(cached) + w;
      const Word<16> next = reinterpret_cast<const Word<16>*>(fresh)[w];
      if (old != nullptr) reinterpret_cast<Word<16>*>(old)[w] = *at;
      *at = next;
    }
  }
};

// places[i] = where the record of rows[i] is, or rows[i] if negative. With kWrites the records are about to be written:
// rows must be distinct, and the ways become dirty.
template <bool kWrites>
struct LocateRows {
  CacheRef cache;
  const int64_t* rows;
  int64_t* places;

  static constexpr int64_t lanes() { return kWays / kTagsAtOnce; }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    const int64_t row = rows[i];
    const int64_t way = row < 0 ? -1 : find_way(cache, row, lanes);
    if (lanes.rank != 0) return;
    places[i] = way < 0 ? row : cache.first_place + way;
    if (kWrites && way >= 0) cache.states[way] |= WayState::kDirty;
  }
};

// Copies the records that are newer than those in the blocks back to them; they stay in the cache. One item per way.
struct WriteBackWays {
  CacheRef cache;
  BlocksRef blocks;

  static constexpr int64_t lanes() { return kWays; }

  template <class Lanes>
  RECIS_HD void operator()(int64_t way, Lanes lanes) const {
    // One lane reads the state, which it changes below, for all.
    const uint64_t state = lanes_min(lanes.rank == 0 ? cache.states[way] : ~uint64_t{0}, lanes);
    if (!WayState{state}.is_dirty()) return;
    const char* record = blocks.record(cache.first_place + way);
    char* row = blocks.record(cache.row(way, cache.tags[way]));
    for (int64_t w = lanes.rank; w < blocks.record_bytes / 16; w += lanes.size) {
      reinterpret_cast<Word<16>*>(row)[w] = reinterpret_cast<const Word<16>*>(record)[w];
    }
    if (lanes.rank != 0) return;
    cache.states[way] = state & ~WayState::kDirty;
    cache.add(kWrittenBack, way);
  }
};

}  // namespace recis
