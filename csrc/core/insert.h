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

// Ids as keys of group_cpu: they find their row or are given one, with its first values. CommitInserts has to follow.
template <class E>
struct InsertKeys {
  IdMapRef map;
  int64_t* counters;
  const int64_t* free_rows;  // [counters[kFree]]
  BlocksRef blocks;
  const Initializer* initializers;  // by member table
  RecordStart start;

  static uint64_t hash(int64_t id, int64_t member) { return slot_hash(id, member); }

  void prefetch(uint64_t hash) const { __builtin_prefetch(map.slots + 2 * (hash & map.mask), 0, 2); }

  int64_t row(int64_t id, int64_t member) const {
    const uint64_t* slot = find_slot(map, id, member);
    return __builtin_expect(slot != nullptr, 1) ? entry_row(load_acquire(slot + 1)) : insert(id, member);
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
