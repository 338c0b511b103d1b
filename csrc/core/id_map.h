// Kernels of the IDMap: find, find-or-insert, erase, rehash, listing.
//
// Open addressing with linear probing from the first slot of a cache line of four; the caller keeps the load, erased
// slots included, at or below 0.75, so a probe always meets an empty slot.
#pragma once

#include <cstdint>

#if defined(__AVX__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#include "core/atomics.h"
#include "core/hash/mix.h"
#include "core/segments.h"
#include "core/table.h"

namespace recis {

// The ids of one feature, at positions first, first + 1, ...
struct IdSpan {
  int64_t first;
  const int64_t* ids;
  int64_t member;
  const int64_t* used;  // [1]: how many there are, where the host knows but a bound: others have no row; null: all

  RECIS_HD bool has(int64_t i) const { return used == nullptr || i - first < *used; }
};

RECIS_HD uint64_t key_of(uint64_t hash, int64_t member) {
  return (static_cast<uint64_t>(member) << kMemberShift) | (hash >> (64 - kTagBits));
}

// The number, before it is masked, of the slot that a probe starts from.
RECIS_HD uint64_t probe_start(uint64_t hash) { return hash & ~(kLineSlots - 1); }

// The slot of a line that holds an id, or null.
//
// All four are compared without a branch: how far a probe goes is a toss-up, and a branch that is guessed wrong while
// its slot is still on the way from memory keeps the processor from starting on the ids after it.
RECIS_HD uint64_t* match_in_line(uint64_t* line, uint64_t id, uint64_t key) {
  const uint64_t full = make_entry(SlotState::kFull, key, 0);
  const uint64_t compared = make_entry(SlotState::kErased, kKeyMask, 0);  // both bits of the state, and the key
#if defined(__AVX__) && !defined(__CUDACC__)
  // Processors that have AVX read 16 aligned bytes at once, so that an entry comes with the id that it was published
  // with.
  const __m128i wanted = _mm_set_epi64x(static_cast<int64_t>(full), static_cast<int64_t>(id));
  const __m128i mask = _mm_set_epi64x(static_cast<int64_t>(compared), -1);
  const auto same = [&](int j) {
    const __m128i slot = _mm_load_si128(reinterpret_cast<const __m128i*>(line) + j);
    return _mm_cmpeq_epi64(_mm_and_si128(slot, mask), wanted);
  };
  const __m128i both = _mm_packs_epi16(_mm_packs_epi32(same(0), same(1)), _mm_packs_epi32(same(2), same(3)));
  const int found = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(both, _mm_set1_epi32(-1))));
  return found == 0 ? nullptr : line + 2 * __builtin_ctz(found);
#else
  uint64_t found = kLineSlots;
  for (uint64_t j = 0; j < kLineSlots; ++j) {
    const uint64_t entry = load_acquire(line + 2 * j + 1);
    const uint64_t difference = ((entry & compared) ^ full) | (load_relaxed(line + 2 * j) ^ id);
    found = difference == 0 ? j : found;
  }
  return found == kLineSlots ? nullptr : line + 2 * found;
#endif
}

RECIS_HD void prefetch_slot(const IdMapRef& map, int64_t id, int64_t member) {
#if !defined(__CUDA_ARCH__)
  __builtin_prefetch(map.slots + 2 * (slot_hash(id, member) & map.mask), 0, 3);
#endif
}

// The slot that holds an id, or null: for maps that nothing is inserted into meanwhile, or where an insert under way
// may be missed.
RECIS_HD uint64_t* find_slot(const IdMapRef& map, int64_t id, int64_t member) {
  const uint64_t hash = slot_hash(id, member);
  const uint64_t key = key_of(hash, member);
  for (uint64_t at = probe_start(hash);; at += kLineSlots) {
    uint64_t* line = map.slots + 2 * (at & map.mask);
    // A claimed slot is an insert still under way: its id is not there for us yet.
    if (uint64_t* slot = match_in_line(line, static_cast<uint64_t>(id), key)) return slot;
    // Slots of a line are filled in order, and never become empty again.
    if (entry_state(load_acquire(line + 2 * kLineSlots - 1)) == SlotState::kEmpty) return nullptr;
  }
}

// rows[i] = row of ids[i], or -1; with kSlots the number of its slot instead.
template <bool kSlots>
struct FindIds {
  Segments<IdSpan> segments;
  IdMapRef map;
  int64_t* rows;

  static constexpr int64_t fetched_bytes() { return 64; }

  RECIS_HD void prefetch(int32_t part, int64_t i) const {
    const IdSpan& span = segments[part];
    prefetch_slot(map, span.ids[i - span.first], span.member);
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes) const {
    const IdSpan& span = segments[part];
    const uint64_t* slot = span.has(i) ? find_slot(map, span.ids[i - span.first], span.member) : nullptr;
    rows[i] = slot == nullptr ? -1 : kSlots ? (slot - map.slots) / 2 : entry_row(load_acquire(slot + 1));
  }
};

// What find_or_claim met: the id's slot and entry, and whether it was put there just now; no slot: it is not there and
// was not to be.
struct Probe {
  uint64_t* slot;
  uint64_t entry;
  bool claimed;
};

// Finds an id or claims a slot for it. Any number of threads may ask for the same id at once; one of them wins.
//
// A thread claims an empty slot by compare-and-swap. The claim already carries member and tag, so that others go on
// past it at once unless it is probably their own id; only then do they wait for the id to be published. `row` is
// called by the winner alone and gives what the entry's row bits are to hold.
template <class Row>
RECIS_HD Probe find_or_claim(const IdMapRef& map, int64_t id, int64_t member, bool may_claim, Row&& row) {
  const uint64_t hash = slot_hash(id, member);
  const uint64_t key = key_of(hash, member);
  const uint64_t start = probe_start(hash);
  if (uint64_t* slot = match_in_line(map.slots + 2 * (start & map.mask), static_cast<uint64_t>(id), key)) {
    return {slot, load_acquire(slot + 1), false};
  }
  for (uint64_t at = start;; ++at) {
    uint64_t* slot = map.slots + 2 * (at & map.mask);
    uint64_t entry = load_acquire(slot + 1);
    if (entry_state(entry) == SlotState::kEmpty) {
      if (!may_claim) return {nullptr, 0, false};
      if (compare_exchange(slot + 1, entry, make_entry(SlotState::kClaimed, key, 0))) {
        entry = make_entry(SlotState::kFull, key, row());
        store_relaxed(slot, static_cast<uint64_t>(id));
        store_release(slot + 1, entry);
        return {slot, entry, true};
      }
    }
    if ((entry & kKeyMask) != key) continue;
    while (entry_state(entry) == SlotState::kClaimed) entry = load_acquire(slot + 1);
    if (entry_state(entry) == SlotState::kFull && slot[0] == static_cast<uint64_t>(id)) return {slot, entry, false};
  }
}

// The row that is handed out as number `number` since the last commit: from the free list first, then from the end.
RECIS_HD int64_t fresh_row(const int64_t* counters, const int64_t* free_rows, int64_t number) {
  const int64_t reused = counters[kFree];
  return number < reused ? free_rows[reused - 1 - number] : counters[kRows] + number - reused;
}

// Finds each id or gives it a row. Each new row leaves the position that asked first in `fresh`, so that its record can
// be given first values afterwards. CommitInserts has to follow.
struct FindOrInsertIds {
  Segments<IdSpan> segments;
  IdMapRef map;
  int64_t* counters;
  const int64_t* free_rows;  // [counters[kFree]]
  const uint8_t* admitted;   // [n]: whether an id without a row may have one; null: all may, and else row -1 is given
  int64_t* rows;
  int64_t* fresh;

  static constexpr int64_t fetched_bytes() { return 64; }

  RECIS_HD void prefetch(int32_t part, int64_t i) const {
    const IdSpan& span = segments[part];
    prefetch_slot(map, span.ids[i - span.first], span.member);
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes) const {
    const IdSpan& span = segments[part];
    if (!span.has(i)) {
      rows[i] = -1;
      return;
    }
    const Probe met =
        find_or_claim(map, span.ids[i - span.first], span.member, admitted == nullptr || admitted[i] != 0, [&] {
          const int64_t number = fetch_add(counters + kFresh, 1);
          fresh[number] = i;
          return fresh_row(counters, free_rows, number);
        });
    rows[i] = met.slot == nullptr ? -1 : entry_row(met.entry);
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
    for (uint64_t at = probe_start(slot_hash(static_cast<int64_t>(id), entry_member(entry)));; ++at) {
      uint64_t* slot = to.slots + 2 * (at & to.mask);
      uint64_t expected = 0;
      if (load_acquire(slot + 1) == 0 && compare_exchange(slot + 1, expected, entry)) {
        slot[0] = id;
        return;
      }
    }
  }
};

// Closes a find-or-insert: the rows it handed out are old from now on. One item.
struct CommitInserts {
  int64_t* counters;

  template <class Lanes>
  RECIS_HD void operator()(int64_t, Lanes lanes) const {
    if (lanes.rank != 0) return;
    const int64_t fresh = counters[kFresh];
    const int64_t reused = min64(fresh, counters[kFree]);
    counters[kFree] -= reused;
    counters[kRows] += fresh - reused;
    counters[kUsedSlots] += fresh;
    counters[kLive] += fresh;
    counters[kFresh] = 0;
  }
};

// Lists all ids with their member tables, rows and slots, in no particular order.
struct ListIds {
  const uint64_t* slots;
  int64_t* ids;
  int64_t* members;
  int64_t* rows;
  int64_t* numbers;
  int64_t* count;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const uint64_t entry = slots[2 * i + 1];
    if (entry_state(entry) != SlotState::kFull) return;
    const int64_t at = fetch_add(count, 1);
    ids[at] = static_cast<int64_t>(slots[2 * i]);
    members[at] = entry_member(entry);
    rows[at] = entry_row(entry);
    numbers[at] = i;
  }
};

// Erases the ids in the given slots (numbers below 0 are passed over, a repeated one counts once) and puts their rows
// on the free list, which has room for every row; without a list they are forgotten.
struct EraseSlots {
  uint64_t* slots;
  const int64_t* numbers;
  int64_t* counters;
  int64_t* free_rows;  // or null

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    if (numbers[i] < 0) return;
    uint64_t* word = slots + 2 * numbers[i] + 1;
    uint64_t entry = load_acquire(word);
    const uint64_t erased = make_entry(SlotState::kErased, entry & kKeyMask, 0);
    if (entry_state(entry) != SlotState::kFull || !compare_exchange(word, entry, erased)) return;
    if (free_rows != nullptr) free_rows[fetch_add(counters + kFree, 1)] = entry_row(entry);
    fetch_add(counters + kLive, -1);
  }
};

// Gives the ids in the given, distinct slots the rows `rows`.
struct SetRows {
  uint64_t* slots;
  const int64_t* numbers;
  const int64_t* rows;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    uint64_t& entry = slots[2 * numbers[i] + 1];
    entry = make_entry(SlotState::kFull, entry & kKeyMask, rows[i]);
  }
};

// Gives every id another row: moved[row] is where the record of `row` has gone.
struct MoveRows {
  uint64_t* slots;
  const int64_t* moved;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const uint64_t entry = slots[2 * i + 1];
    if (entry_state(entry) != SlotState::kFull) return;
    slots[2 * i + 1] = make_entry(SlotState::kFull, entry & kKeyMask, moved[entry_row(entry)]);
  }
};

// An IDMap as an exact counter: the entry's row bits hold how often an id was counted. Counts the positions whose row
// is below 0: ids that have none.
struct CountIds {
  Segments<IdSpan> segments;
  IdMapRef map;
  int64_t* counters;
  const int64_t* rows;

  static constexpr int64_t fetched_bytes() { return 64; }

  RECIS_HD void prefetch(int32_t part, int64_t i) const {
    const IdSpan& span = segments[part];
    if (rows[i] < 0) prefetch_slot(map, span.ids[i - span.first], span.member);
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes) const {
    const IdSpan& span = segments[part];
    if (rows[i] >= 0 || !span.has(i)) return;
    const Probe met = find_or_claim(map, span.ids[i - span.first], span.member, true, [] { return int64_t{1}; });
    if (met.claimed) {
      fetch_add(counters + kUsedSlots, 1);
      fetch_add(counters + kLive, 1);
    } else {
      // 2^40 sightings of an id that has no row are out of reach: the sum stays within the row's bits.
      fetch_add(reinterpret_cast<int64_t*>(met.slot + 1), int64_t{1} << kTagBits);
    }
  }
};

// admitted[i] = whether ids[i] has a row or was counted `least` times.
struct AdmitCounted {
  Segments<IdSpan> segments;
  IdMapRef map;
  const int64_t* rows;
  int64_t least;
  uint8_t* admitted;

  static constexpr int64_t fetched_bytes() { return 64; }

  RECIS_HD void prefetch(int32_t part, int64_t i) const {
    const IdSpan& span = segments[part];
    if (rows[i] < 0) prefetch_slot(map, span.ids[i - span.first], span.member);
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes) const {
    const IdSpan& span = segments[part];
    if (rows[i] >= 0) {
      admitted[i] = 1;
      return;
    }
    const uint64_t* slot = span.has(i) ? find_slot(map, span.ids[i - span.first], span.member) : nullptr;
    admitted[i] = slot != nullptr && entry_row(load_acquire(slot + 1)) >= least;
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
