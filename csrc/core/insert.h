// Lookups of training on the CPU: ids are grouped first, and only the distinct ones go to the IDMap.
//
// An id that a batch has many times is looked for once, and while a part of the ids is grouped the slots of its
// distinct ones are on their way from memory. On CUDA every position looks for its id at once, and rows are grouped
// afterwards.
#pragma once

#include "core/blocks.h"
#include "core/for_each.h"
#include "core/group.h"
#include "core/id_map.h"

namespace recis {

// The bytes of an embedding that are fetched as soon as its row is known, for the gather that follows: all of one that
// fits a line, and none of a longer one. (A step of 65,520 ids of 16 elements, of which half are distinct, took a tenth
// less with it; of 64 elements a tenth more, since they push each other out of the caches before they are read.)
inline int64_t fetched_early(int64_t bytes) { return bytes <= 64 ? bytes : 0; }

// Ids as keys of group_cpu: they find their row or are given one, with its first values. CommitInserts has to follow.
template <class E>
struct InsertKeys {
  IdMapRef map;
  int64_t* counters;
  const int64_t* free_rows;  // [counters[kFree]]
  BlocksRef blocks;
  const Initializer* initializers;  // by member table
  RecordStart start;
  int64_t fetched;  // bytes to start fetching of a record that was found, at most a line's: see fetched_early

  static uint64_t hash(int64_t id, int64_t member) { return slot_hash(id, member); }

  void prefetch(uint64_t hash) const { __builtin_prefetch(map.slots + 2 * (hash & map.mask), 0, 2); }

  int64_t row(int64_t id, int64_t member) const {
    const uint64_t* slot = find_slot(map, id, member);
    if (__builtin_expect(slot == nullptr, 0)) return insert(id, member);
    const int64_t row = entry_row(load_acquire(slot + 1));
    if (fetched > 0) {
      const char* record = blocks.record(row);
      __builtin_prefetch(record, 0, 2);
      __builtin_prefetch(record + fetched - 1, 0, 2);  // records of small ones do not start with a line
    }
    return row;
  }

  __attribute__((noinline)) int64_t insert(int64_t id, int64_t member) const {
    const Probe met = find_or_claim(map, id, member, true,
                                    [&] { return fresh_row(counters, free_rows, fetch_add(counters + kFresh, 1)); });
    const int64_t row = entry_row(met.entry);
    if (met.claimed) {
      start.template write<E>(blocks.record(row), blocks.meta(row), initializers[member], id, OneLane{});
    }
    return row;
  }
};

}  // namespace recis
