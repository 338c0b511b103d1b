// Kernels of the IDMap: find, find-or-insert, erase, rehash, listing.
//
// Open addressing with linear probing by lines of four slots, a cache line each. The caller keeps the load factor,
// including erased slots, at or below 0.75, so a probe reaches an empty slot. A probe that has passed every line ends.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__AVX__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#include "core/atomics.h"
#include "core/for_each.h"
#include "core/hash/mix.h"
#include "core/segments.h"
#include "core/table.h"

namespace recis {

// The ids of one feature, at positions first, first + 1, ...
struct IdSpan {
  int64_t first;
  const int64_t* ids;
  int64_t member;
  const int64_t* used;  // [1]: the number of ids if the host knows only an upper bound; null: all positions are used

  RECIS_HD bool has(int64_t i) const { return used == nullptr || i - first < *used; }
  RECIS_HD int64_t id(int64_t i) const { return ids[i - first]; }
};

RECIS_HD uint64_t key_of(uint64_t hash, int64_t member) {
  return (static_cast<uint64_t>(member) << kMemberShift) | (hash & ((uint64_t{1} << kTagBits) - 1));
}

// The slot of a line that holds an id, as a mask of one bit, or 0.
//
// All four slots are compared without a branch: the length of a probe is unpredictable, and a branch mispredicted while
// its slot is still being loaded prevents the processor from starting on the next ids.
RECIS_HD int match_mask(const uint64_t* line, uint64_t id, uint64_t key) {
  const uint64_t full = make_entry(SlotState::kFull, key, 0);
  const uint64_t compared = make_entry(SlotState::kErased, kKeyMask, 0);  // both bits of the state, and the key
#if defined(__AVX__) && !defined(__CUDACC__)
  // Processors with AVX read 16 aligned bytes at once, so an entry is read together with the id it was published with.
  const __m128i pattern = _mm_set_epi64x(static_cast<int64_t>(full), static_cast<int64_t>(id));
  const __m128i mask = _mm_set_epi64x(static_cast<int64_t>(compared), -1);
  const auto same = [&](int j) {
    const __m128i slot = _mm_load_si128(reinterpret_cast<const __m128i*>(line) + j);
    return _mm_cmpeq_epi64(_mm_and_si128(slot, mask), pattern);
  };
  const __m128i both = _mm_packs_epi16(_mm_packs_epi32(same(0), same(1)), _mm_packs_epi32(same(2), same(3)));
  return _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(both, _mm_set1_epi32(-1))));
#else
  int match = 0;
  for (uint64_t j = 0; j < kLineSlots; ++j) {
    const uint64_t entry = load_acquire(line + 2 * j + 1);
    const uint64_t difference = ((entry & compared) ^ full) | (load_relaxed(line + 2 * j) ^ id);
    match |= (difference == 0 ? 1 : 0) << j;
  }
  return match;
#endif
}

// Whether the last slot of a line is empty; with several lanes, the same for all.
RECIS_HD bool last_is_empty(const uint64_t* line, OneLane) {
  return entry_state(load_acquire(line + 2 * kLineSlots - 1)) == SlotState::kEmpty;
}
RECIS_HD bool last_is_empty(const uint64_t* line, ManyLanes lanes) {
  return first_lane_where(lanes.rank == 0 && entry_state(load_relaxed(line + 2 * kLineSlots - 1)) == SlotState::kEmpty,
                          lanes) == 0;
}

// The same by kLineSlots lanes, each of which compares one slot. A slot that is being written may be missed.
RECIS_HD uint64_t* match_in_line(uint64_t* line, uint64_t id, uint64_t key, ManyLanes lanes) {
  const uint64_t full = make_entry(SlotState::kFull, key, 0);
  const uint64_t compared = make_entry(SlotState::kErased, kKeyMask, 0);
  uint64_t word = 0;
  uint64_t entry = 0;
  load_relaxed_pair(line + 2 * lanes.rank, word, entry);
  const int match = first_lane_where((entry & compared) == full && word == id, lanes);
  if (match < 0) return nullptr;
  // The two words may be of different times, so an id of zero may be that of a slot whose id is not visible yet.
  uint64_t* slot = line + 2 * match;
  if (id != 0) return slot;
  load_acquire(slot + 1);
  return load_relaxed(slot) == id ? slot : nullptr;
}

RECIS_HD uint64_t* match_in_line(uint64_t* line, uint64_t id, uint64_t key, OneLane) {
  const int match = match_mask(line, id, key);
  if (match == 0) return nullptr;
#if defined(__CUDA_ARCH__)
  return line + 2 * (__ffs(match) - 1);
#else
  return line + 2 * __builtin_ctz(match);
#endif
}

// A slot and its number; null and -1 for none.
struct FoundSlot {
  uint64_t* slot;
  int64_t number;
};

// The slot that holds an id, or none; with several lanes, the same for all. A concurrent insert of the id may be
// missed.
template <class Lanes = OneLane>
RECIS_HD FoundSlot find_slot(const IdMapRef& map, int64_t id, int64_t member, Lanes lanes = {}) {
  const uint64_t hash = slot_hash(id, member);
  const uint64_t key = key_of(hash, member);
  const LineOrder order = map.order();
  uint64_t number = order.first_line(hash);
  for (uint64_t passed = 0; passed < order.lines; ++passed) {
    uint64_t* line = order.line(number);
    // A claimed slot does not match: its id is not published yet.
    if (uint64_t* slot = match_in_line(line, static_cast<uint64_t>(id), key, lanes)) {
      return {slot, static_cast<int64_t>(kLineSlots * number) + (slot - line) / 2};
    }
    // The slots of a line are filled in order and do not become empty again while ids are looked up.
    if (last_is_empty(line, lanes)) break;
    number = order.next_line(number);
  }
  return {nullptr, -1};
}

// The result of find_or_claim: the id's slot and entry, and whether this call inserted it. A null slot means that the
// id is absent and was not inserted, because it may not be or because the map is full.
struct Probe {
  uint64_t* slot;
  uint64_t entry;
  bool claimed;
};

// Finds an id or claims a slot for it. Any number of threads may look for the same id at once; one of them claims the
// slot.
//
// A thread claims an empty slot by compare-and-swap. The claim already carries member and tag, so other threads skip it
// immediately unless it probably holds their own id; only then do they wait for the id to be published. The claiming
// thread alone calls row(), which returns the row bits of the new entry.
//
// `may_claim`, a bool or what converts to one, is read when the id is absent. If it depends on what row() has taken,
// row() releases and `may_claim` acquires, so that an id is found whose claim was the last one.
//
// Several lanes compare the first line together; lane 0 then goes on alone, and its result counts.
template <class Claim, class Row, class Lanes = OneLane>
RECIS_HD Probe find_or_claim(const IdMapRef& map, int64_t id, int64_t member, const Claim& may_claim, Row&& row,
                             Lanes lanes = {}) {
  const uint64_t hash = slot_hash(id, member);
  const uint64_t key = key_of(hash, member);
  const LineOrder order = map.order();
  uint64_t number = order.first_line(hash);
  uint64_t* line = order.line(number);
  if (uint64_t* slot = match_in_line(line, static_cast<uint64_t>(id), key, lanes)) {
    return {slot, load_acquire(slot + 1), false};
  }
  if (lanes.rank != 0) return {nullptr, 0, false};
  for (uint64_t passed = 0; passed < order.lines; ++passed) {
    for (uint64_t* slot = line; slot != line + 2 * kLineSlots; slot += 2) {
      uint64_t entry = load_relaxed(slot + 1);
      if (entry_state(entry) == SlotState::kEmpty) {
        if (!may_claim) {
          // Another thread may have claimed the slot before it took what was left to claim.
          entry = load_acquire(slot + 1);
          if (entry_state(entry) == SlotState::kEmpty) return {nullptr, 0, false};
        } else if (compare_exchange(slot + 1, entry, make_entry(SlotState::kClaimed, key, 0))) {
          entry = make_entry(SlotState::kFull, key, row());
          store_relaxed(slot, static_cast<uint64_t>(id));
          store_release(slot + 1, entry);
          return {slot, entry, true};
        }
      }
      if ((entry & kKeyMask) != key) continue;
      do entry = load_acquire(slot + 1);
      while (entry_state(entry) == SlotState::kClaimed);
      if (entry_state(entry) == SlotState::kFull && slot[0] == static_cast<uint64_t>(id)) return {slot, entry, false};
    }
    number = order.next_line(number);
    line = order.line(number);
  }
  return {nullptr, 0, false};
}

// Finds ids on the CPU, as find_slot does, in a pipeline over blocks of ids.
//
// While the ids of a block are compared, without a branch, with the first lines of their probes, those of the next
// block are being loaded. Ids in later lines, a tenth at usual loads, are collected and follow a block later, while
// their second lines are loaded. So an unpredictable length of the probe costs neither a mispredicted branch nor the
// wait for a line.
struct FindPipeline {
  static constexpr int kIds = 32;  // of a block

  IdMapRef map;

  // Calls found(k, slot, row) for each k below count, for some twice, the last call counting: the number of the slot
  // that holds id(k) of a member table, and its row, or -1 and -1. In between, calls done(end) for growing `end`, the
  // last of them `count`: the calls for all k below `end` have been made, most of them a block or more ago.
  template <class Id, class Found, class Done>
  void operator()(int64_t count, int64_t member, Id&& id, Found&& found, Done&& done) const {
    const LineOrder order = map.order();
    Block blocks[2];
    for (int64_t first = 0; first < count + 3 * kIds; first += kIds) {
      Block& next = blocks[first / kIds % 2];
      Block& loaded = blocks[first / kIds % 2 ^ 1];
      // The late ids of the block before the loaded one, which `next` still holds.
      for (int j = 0; j < next.late_count; ++j) {
        const FoundSlot slot = find_slot(map, id(next.late[j]), member);
        if (slot.slot != nullptr) found(next.late[j], slot.number, entry_row(load_acquire(slot.slot + 1)));
      }
      if (first > 2 * kIds) done(std::min(first - 2 * kIds, count));
      next.start(order, first, static_cast<int>(std::clamp<int64_t>(count - first, 0, kIds)), member, id);
      if (first > 0) loaded.compare(order, id, found);
    }
  }

 private:
  struct Block {
    int64_t first = 0;
    int count = 0;
    int late_count = 0;
    uint64_t keys[kIds];
    uint64_t numbers[kIds];
    const uint64_t* lines[kIds];
    int64_t late[kIds];

    template <class Id>
    void start(const LineOrder& order, int64_t first_id, int ids, int64_t member, Id&& id) {
      first = first_id;
      count = ids;
      late_count = 0;
      uint64_t hashes[kIds];
      for (int k = 0; k < count; ++k) hashes[k] = slot_hash(id(first + k), member);
      for (int k = 0; k < count; ++k) {
        keys[k] = key_of(hashes[k], member);
        numbers[k] = order.first_line(hashes[k]);
        lines[k] = order.line(numbers[k]);
        __builtin_prefetch(lines[k], 0, 3);
      }
    }

    template <class Id, class Found>
    void compare(const LineOrder& order, Id&& id, Found&& found) {
      for (int k = 0; k < count; ++k) {
        const int match = match_mask(lines[k], static_cast<uint64_t>(id(first + k)), keys[k]);
        const int at = __builtin_ctz(match | 1 << (kLineSlots - 1));
        const int64_t none = match == 0 ? -1 : 0;
        found(first + k, (static_cast<int64_t>(kLineSlots * numbers[k]) + at) | none,
              entry_row(load_acquire(lines[k] + 2 * at + 1)) | none);
        late[late_count] = first + k;
        // A claimed slot in the last place counts as full, as in find_slot.
        late_count += match == 0 && load_acquire(lines[k] + 2 * kLineSlots - 1) != 0 ? 1 : 0;
      }
      for (int j = 0; j < late_count; ++j) {
        __builtin_prefetch(order.line(order.next_line(numbers[late[j] - first])), 0, 3);
      }
    }
  };
};

// The row of allocation `number` since the last commit: from the free list first, then from the end.
RECIS_HD int64_t fresh_row(const int64_t* counters, const int64_t* free_rows, int64_t number) {
  const int64_t reused = counters[kFree];
  return number < reused ? free_rows[reused - 1 - number] : counters[kRows] + number - reused;
}

// The base of the kernels that look ids up: the ids of all features, and the map.
struct LookUpIds {
  Segments<IdSpan> segments;
  IdMapRef map;

  static constexpr int64_t fetched_bytes() { return 64; }
  static constexpr int64_t lanes() { return kLineSlots; }

  RECIS_HD void prefetch(int32_t part, int64_t i) const {
    const IdSpan& span = segments[part];
    prefetch_bytes<false>(map.start(slot_hash(span.id(i), span.member)), 1);
  }

  // The slot of the id at position i, or none.
  template <class Lanes>
  RECIS_HD FoundSlot slot(int32_t part, int64_t i, Lanes lanes) const {
    const IdSpan& span = segments[part];
    return span.has(i) ? find_slot(map, span.id(i), span.member, lanes) : FoundSlot{nullptr, -1};
  }
};

// rows[i] = row of ids[i], or -1; with kSlots, the number of its slot instead.
template <bool kSlots>
struct FindIds : LookUpIds {
  int64_t* rows;

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes lanes) const {
    const FoundSlot found = slot(part, i, lanes);
    if (lanes.rank != 0) return;
    rows[i] = kSlots || found.slot == nullptr ? found.number : entry_row(load_acquire(found.slot + 1));
  }

  void run(int32_t part, int64_t begin, int64_t end) const {
    const IdSpan& span = segments[part];
    const int64_t used = span.used == nullptr ? end : std::clamp(span.first + *span.used, begin, end);
    const int64_t* ids = span.ids + (begin - span.first);
    FindPipeline{map}(
        used - begin, span.member, [ids](int64_t k) { return ids[k]; },
        [this, begin](int64_t k, int64_t slot, int64_t row) { rows[begin + k] = kSlots ? slot : row; }, [](int64_t) {});
    std::fill(rows + used, rows + end, -1);
  }
};

// rows[i] = row of ids[i]; an id without a row gets one. For each new row, `fresh` receives the position that inserted
// it; the record then needs initial values. CommitInserts must follow.
struct FindOrInsertIds : LookUpIds {
  int64_t* counters;
  const int64_t* free_rows;  // [counters[kFree]]
  const uint8_t* admitted;   // [n]: whether an id without a row may get one; otherwise its row is -1; null: all may
  int64_t* rows;
  int64_t* fresh;

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes lanes) const {
    const IdSpan& span = segments[part];
    if (!span.has(i)) {
      if (lanes.rank == 0) rows[i] = -1;
      return;
    }
    const bool may_claim = admitted == nullptr || admitted[i] != 0;
    const auto new_row = [&] {
      const int64_t number = fetch_add(counters + kFresh, 1);
      fresh[number] = i;
      return fresh_row(counters, free_rows, number);
    };
    const Probe probe = find_or_claim(map, span.id(i), span.member, may_claim, new_row, lanes);
    if (lanes.rank != 0) return;
    rows[i] = probe.slot == nullptr ? -1 : entry_row(probe.entry);
    if (probe.slot == nullptr && may_claim) store_relaxed(reinterpret_cast<uint64_t*>(counters + kOverflow), 1);
  }
};

// The first slots of a line that are not empty. Without a branch, because their number is unpredictable.
RECIS_HD uint64_t slots_in_use(const uint64_t* line) {
#if defined(__AVX__) && !defined(__CUDACC__)
  const auto entries = [&](int j) {
    const __m128i* slots = reinterpret_cast<const __m128i*>(line) + j;
    return _mm_cmpeq_epi64(_mm_unpackhi_epi64(_mm_load_si128(slots), _mm_load_si128(slots + 1)), _mm_setzero_si128());
  };
  const __m128i empty = _mm_packs_epi32(entries(0), entries(2));
  return __builtin_ctz(_mm_movemask_ps(_mm_castsi128_ps(empty)) | 1 << kLineSlots);
#else
  uint64_t used = 0;
  for (uint64_t j = 0; j < kLineSlots; ++j) used += load_relaxed(line + 2 * j + 1) != 0 ? 1 : 0;
  return used;
#endif
}

// Puts an id that the map does not hold into its first empty slot. Ids are distinct, so no comparison is needed.
RECIS_HD void place_entry(const IdMapRef& map, uint64_t id, uint64_t entry) {
  const LineOrder order = map.order();
  uint64_t number = order.first_line(slot_hash(static_cast<int64_t>(id), entry_member(entry)));
  uint64_t* line = order.line(number);
  for (uint64_t passed = 0; passed < order.lines;) {
    const uint64_t used = slots_in_use(line);
    if (used == kLineSlots) {
      number = order.next_line(number);
      line = order.line(number);
      ++passed;
      continue;
    }
    uint64_t* slot = line + 2 * used;
    uint64_t expected = 0;
    if (compare_exchange(slot + 1, expected, entry)) {
      slot[0] = id;
      return;
    }
  }
}

// Copies every full slot of a map into another, empty one.
struct RehashSlots {
  IdMapRef from;
  IdMapRef to;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    const uint64_t* slot = from.slot(i);
    if (lanes.rank == 0 && entry_state(slot[1]) == SlotState::kFull) place_entry(to, slot[0], slot[1]);
  }
};

// Moving lines, in three kernels: the map grows in place, from `old` lines to `lines`, or drops its erased slots.
//
// The ids of lines [first, old) are spread over the new number of lines, and those of the lines before over the old
// number; kLastOld divides them. Each move lowers `first`: it lifts lines out of the map and places their ids again.
// The lifted lines end with one that is not full, so no probe for an id that stays passes through them. They may
// begin anywhere, because ids of lower lines that are lifted too return to where their probes find them.
//
// PrepareMove determines the lifted lines; a probe that starts there may have wrapped around to line 0.
struct PrepareMove {
  uint64_t* header;
  uint64_t lines;     // the new number
  uint64_t first;     // the first line that is moved
  uint64_t end;       // the first line that was moved before, or the old number of lines
  uint64_t last_old;  // the greatest hash of an id that starts before `first`
  uint64_t room;      // lines that can be lifted

  template <class Lanes>
  RECIS_HD void operator()(int64_t, Lanes lanes) const {
    if (lanes.rank != 0) return;
    header[kMoveCount] = 0;
    if (header[kStuck] != 0) return;
    const IdMapRef map{header};
    const uint64_t total = map.lines();
    uint64_t from = first;
    uint64_t to = end;
    uint64_t wrapped = 0;
    while (to < total && is_full(map.line(to)) && to - from < room) ++to;
    if (to < total) {
      ++to;
    } else {
      while (wrapped < from && is_full(map.line(wrapped)) && wrapped < room) ++wrapped;
      if (wrapped < from) {
        ++wrapped;
      } else {  // all lines before are full, too
        from = 0;
        wrapped = 0;
      }
    }
    if (to - from + wrapped > room) {
      header[kStuck] = 1;
      return;
    }
    header[kMoveFirst] = from;
    header[kMoveEnd] = to;
    header[kMoveWrapped] = wrapped;
    header[kMoveCount] = to - from + wrapped;
    header[kLines] = lines;
    header[kLastOld] = last_old;
    if (first == 0) header[kOldLines] = lines;
  }

  RECIS_HD static bool is_full(const uint64_t* line) { return line[2 * kLineSlots - 1] != 0; }
};

// Copies the lines that are moved to `lifted`, and empties them. One item for each line.
struct LiftLines {
  IdMapRef map;
  uint64_t* lifted;  // [lines][kLineSlots][2]
  int64_t* counters;

  static constexpr int64_t lanes() { return kLineSlots; }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    const uint64_t* header = map.header;
    const uint64_t after = header[kMoveEnd] - header[kMoveFirst];
    const uint64_t number = static_cast<uint64_t>(i);
    uint64_t* line = map.line(number < after ? header[kMoveFirst] + number : number - after);
    uint64_t* copy = lifted + 2 * kLineSlots * number;
    for (uint64_t j = lanes.rank; j < kLineSlots; j += lanes.size) {
      const uint64_t entry = line[2 * j + 1];
      if (entry_state(entry) == SlotState::kErased) fetch_add(counters + kUsedSlots, -1);
      copy[2 * j] = line[2 * j];
      copy[2 * j + 1] = entry;
      line[2 * j] = 0;  // the ids of empty slots are zero; see match_in_line
      line[2 * j + 1] = 0;
    }
  }
};

// Places the ids of the lifted lines again. One item for each line.
struct PlaceLines {
  IdMapRef map;
  const uint64_t* lifted;

  static constexpr int64_t lanes() { return kLineSlots; }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    const uint64_t* line = lifted + 2 * kLineSlots * i;
    for (uint64_t j = lanes.rank; j < kLineSlots; j += lanes.size) {
      if (entry_state(line[2 * j + 1]) == SlotState::kFull) place_entry(map, line[2 * j], line[2 * j + 1]);
    }
  }
};

// Completes a find-or-insert: its fresh rows become ordinary rows. One item.
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
  IdMapRef map;
  int64_t* ids;
  int64_t* members;
  int64_t* rows;
  int64_t* numbers;
  int64_t* count;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const uint64_t* slot = map.slot(i);
    const uint64_t entry = slot[1];
    if (entry_state(entry) != SlotState::kFull) return;
    const int64_t at = fetch_add(count, 1);
    ids[at] = static_cast<int64_t>(slot[0]);
    members[at] = entry_member(entry);
    rows[at] = entry_row(entry);
    numbers[at] = i;
  }
};

// Lists the ids whose rows are marked, with their member tables, in no particular order. One item per slot of the map.
struct ListMarked {
  IdMapRef map;
  const uint8_t* marks;
  int64_t* ids;
  int64_t* members;
  int64_t* count;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    const uint64_t* slot = map.slot(i);
    const uint64_t entry = slot[1];
    if (lanes.rank != 0 || entry_state(entry) != SlotState::kFull || marks[entry_row(entry)] == 0) return;
    const int64_t at = fetch_add(count, 1);
    ids[at] = static_cast<int64_t>(slot[0]);
    members[at] = entry_member(entry);
  }
};

// Erases the ids in the given slots (negative indices are skipped, repeated ones count once) and adds their rows to the
// free list, which must have space for every row. Without a list the rows are not reused.
struct EraseSlots {
  IdMapRef map;
  const int64_t* numbers;
  int64_t* counters;
  int64_t* free_rows;  // or null

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    if (numbers[i] < 0) return;
    uint64_t* word = map.slot(numbers[i]) + 1;
    uint64_t entry = load_acquire(word);
    const uint64_t erased = make_entry(SlotState::kErased, entry & kKeyMask, 0);
    if (entry_state(entry) != SlotState::kFull || !compare_exchange(word, entry, erased)) return;
    if (free_rows != nullptr) free_rows[fetch_add(counters + kFree, 1)] = entry_row(entry);
    fetch_add(counters + kLive, -1);
  }
};

// Sets the rows of the ids in the given, distinct slots.
struct SetRows {
  IdMapRef map;
  const int64_t* numbers;
  const int64_t* rows;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    uint64_t& entry = map.slot(numbers[i])[1];
    entry = make_entry(SlotState::kFull, entry & kKeyMask, rows[i]);
  }
};

// Counts the ids that have no row (rows[i] < 0). The IDMap serves as an exact counter: the row bits of an entry hold
// the sum of the counts of its id.
struct CountIds : LookUpIds {
  int64_t* counters;
  const int64_t* rows;
  const int64_t* counts;  // [n], each at least 1; null: 1

  RECIS_HD void prefetch(int32_t part, int64_t i) const {
    if (rows[i] < 0) LookUpIds::prefetch(part, i);
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes lanes) const {
    const IdSpan& span = segments[part];
    if (rows[i] >= 0 || !span.has(i)) return;
    const int64_t count = counts == nullptr ? 1 : counts[i];
    const Probe probe = find_or_claim(map, span.id(i), span.member, true, [count] { return count; }, lanes);
    if (lanes.rank != 0) return;
    if (probe.claimed) {
      fetch_add(counters + kUsedSlots, 1);
      fetch_add(counters + kLive, 1);
    } else if (probe.slot == nullptr) {
      store_relaxed(reinterpret_cast<uint64_t*>(counters + kOverflow), 1);
    } else {
      // The sum stays within the row bits: no id is counted 2^40 times.
      fetch_add(reinterpret_cast<int64_t*>(probe.slot + 1), count << kTagBits);
    }
  }
};

// admitted[i] = whether ids[i] has a row or was counted at least `least` times.
struct AdmitCounted : LookUpIds {
  const int64_t* rows;
  int64_t least;
  uint8_t* admitted;

  RECIS_HD void prefetch(int32_t part, int64_t i) const {
    if (rows[i] < 0) LookUpIds::prefetch(part, i);
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes lanes) const {
    if (rows[i] >= 0) {
      if (lanes.rank == 0) admitted[i] = 1;
      return;
    }
    const uint64_t* match = slot(part, i, lanes).slot;
    if (lanes.rank != 0) return;
    admitted[i] = match != nullptr && entry_row(load_acquire(match + 1)) >= least;
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
