// Kernels of the IDMap: find, find-or-insert, rehash, listing.
//
// Open addressing with linear probing; the caller keeps the load at or below 0.75, so a probe always meets an empty
// slot.
#pragma once

#include <cstdint>

#include "core/atomics.h"
#include "core/mix.h"
#include "core/segments.h"
#include "core/table.h"

namespace recis {

// The ids of one feature, at positions first, first + 1, ...
struct IdSpan {
  int64_t first;
  const int64_t* ids;
  int64_t member;
};

RECIS_HD uint64_t key_of(uint64_t hash, int64_t member) {
  return (static_cast<uint64_t>(member) << kMemberShift) | (hash >> (64 - kTagBits));
}

RECIS_HD void prefetch_slot(const IdMapRef& map, int64_t id, int64_t member) {
#if !defined(__CUDA_ARCH__)
  __builtin_prefetch(map.slots + 2 * (slot_hash(id, member) & map.mask), 0, 3);
#endif
}

// rows[i] = row of ids[i], or -1.
struct FindIds {
  Segments<IdSpan> segments;
  IdMapRef map;
  int64_t* rows;

  RECIS_HD void prefetch(int32_t part, int64_t i) const {
    const IdSpan& span = segments[part];
    prefetch_slot(map, span.ids[i - span.first], span.member);
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes) const {
    const IdSpan& span = segments[part];
    const int64_t id = span.ids[i - span.first];
    const uint64_t hash = slot_hash(id, span.member);
    const uint64_t key = key_of(hash, span.member);
    for (uint64_t at = hash;; ++at) {
      const uint64_t* slot = map.slots + 2 * (at & map.mask);
      const uint64_t entry = load_acquire(slot + 1);
      if (entry_state(entry) == SlotState::kEmpty) {
        rows[i] = -1;
        return;
      }
      // A claimed slot is an insert still under way: its id is not there for us yet.
      if (entry_state(entry) == SlotState::kFull && (entry & kKeyMask) == key && slot[0] == static_cast<uint64_t>(id)) {
        rows[i] = entry_row(entry);
        return;
      }
    }
  }
};

// Finds each id or gives it a row. Any number of threads may insert the same id at once; one of them wins.
//
// A thread claims an empty slot by compare-and-swap. The claim already carries member and tag, so that others go on
// past it at once unless it is probably their own id; only then do they wait for the id to be published. counters[0]
// counts rows handed out, counters[1] how many of them were handed out before this call; new ones leave the position
// that asked first in `fresh`, so that their records can be given first values afterwards.
struct FindOrInsertIds {
  Segments<IdSpan> segments;
  IdMapRef map;
  int64_t* counters;
  int64_t* rows;
  int64_t* fresh;

  RECIS_HD void prefetch(int32_t part, int64_t i) const {
    const IdSpan& span = segments[part];
    prefetch_slot(map, span.ids[i - span.first], span.member);
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes) const {
    const IdSpan& span = segments[part];
    const int64_t id = span.ids[i - span.first];
    const uint64_t hash = slot_hash(id, span.member);
    const uint64_t key = key_of(hash, span.member);
    for (uint64_t at = hash;; ++at) {
      uint64_t* slot = map.slots + 2 * (at & map.mask);
      uint64_t entry = load_acquire(slot + 1);
      if (entry_state(entry) == SlotState::kEmpty) {
        if (compare_exchange(slot + 1, entry, make_entry(SlotState::kClaimed, key, 0))) {
          const int64_t row = fetch_add(counters, 1);
          slot[0] = static_cast<uint64_t>(id);
          store_release(slot + 1, make_entry(SlotState::kFull, key, row));
          fresh[row - counters[1]] = i;
          rows[i] = row;
          return;
        }
      }
      if ((entry & kKeyMask) != key) continue;
      while (entry_state(entry) == SlotState::kClaimed) entry = load_acquire(slot + 1);
      if (entry_state(entry) == SlotState::kFull && slot[0] == static_cast<uint64_t>(id)) {
        rows[i] = entry_row(entry);
        return;
      }
    }
  }
};

// Moves every full slot of `from` into the larger, empty `to`. Ids are distinct, so no comparison is needed.
struct RehashSlots {
  const uint64_t* from;
  IdMapRef to;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const uint64_t entry = from[2 * i + 1];
    if (entry_state(entry) != SlotState::kFull) return;
    const uint64_t id = from[2 * i];
    for (uint64_t at = slot_hash(static_cast<int64_t>(id), entry_member(entry));; ++at) {
      uint64_t* slot = to.slots + 2 * (at & to.mask);
      uint64_t expected = 0;
      if (load_acquire(slot + 1) == 0 && compare_exchange(slot + 1, expected, entry)) {
        slot[0] = id;
        return;
      }
    }
  }
};

// Lists the ids of one member table and their rows, in no particular order.
struct ListIds {
  const uint64_t* slots;
  int64_t member;
  int64_t* ids;
  int64_t* rows;
  int64_t* count;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const uint64_t entry = slots[2 * i + 1];
    if (entry_state(entry) != SlotState::kFull || entry_member(entry) != member) return;
    const int64_t at = fetch_add(count, 1);
    ids[at] = static_cast<int64_t>(slots[2 * i]);
    rows[at] = entry_row(entry);
  }
};

// buckets[i] = the bucket that owns ids[i].
struct BucketIds {
  const int64_t* ids;
  int64_t* buckets;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    buckets[i] = bucket_of(ids[i]);
  }
};

}  // namespace recis
