// Lookups of training on the CPU: ids are grouped first, and only the distinct ones go to the IDMap.
//
// An id that a batch has many times is looked for once, and while a part of the ids is grouped the slots of its
// distinct ones are on their way from memory. Where each id gives one vector, the part's vectors are written next,
// while its records are in a near cache: all of them are asked for at once, by a loop that waits for none.
//
// On CUDA every position looks for its id at once, and rows are grouped afterwards.
#pragma once

#include <algorithm>

#include "core/blocks.h"
#include "core/for_each.h"
#include "core/gather.h"
#include "core/group.h"
#include "core/id_map.h"

namespace recis {

// Where the vectors of a lookup go in which each id gives one.
struct PlainOutputs {
  float* const* parts;  // by feature, [ids, dim]; null: they are gathered later
  int64_t dim;
  bool streams;  // as GatherBags has it
};

inline constexpr int64_t kGathered = 256 << 10;  // bytes of embeddings on their way at once

// Ids as keys of group_cpu: they find their row or are given one, with its first values. CommitInserts has to follow.
template <class E>
struct InsertKeys {
  IdMapRef map;
  int64_t* counters;
  const int64_t* free_rows;  // [counters[kFree]]
  BlocksRef blocks;
  const Initializer* initializers;  // by member table
  RecordStart start;
  PlainOutputs outputs;

  static uint64_t hash(int64_t id, int64_t member) { return slot_hash(id, member); }

  void prefetch(uint64_t hash) const { __builtin_prefetch(map.slots + 2 * (hash & map.mask), 0, 3); }

  int64_t row(int64_t id, int64_t member) const {
    const uint64_t* slot = find_slot(map, id, member);
    if (__builtin_expect(slot == nullptr, 0)) return insert(id, member);
    return entry_row(load_acquire(slot + 1));
  }

  // How many records to ask for before the first is read; 0: nothing is gathered. All of them fit a second-level cache.
  int64_t gathered_at_once() const {
    if (outputs.parts == nullptr) return 0;
    return std::max<int64_t>(64, kGathered / (outputs.dim * static_cast<int64_t>(sizeof(E))));
  }

  // Always inlined: a compiler takes a function that only prefetches for one without effect, and drops its calls.
  __attribute__((always_inline)) void fetch(int64_t row) const {
    const char* record = blocks.record(row);
    const int64_t bytes = outputs.dim * static_cast<int64_t>(sizeof(E));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(record + at, 0, 3);
    __builtin_prefetch(record + bytes - 1, 0, 3);  // records of small ones do not start with a line
  }

  __attribute__((always_inline)) void gather(int64_t row, int64_t feature, int64_t i) const {
    copy_vector<E, 16>(outputs.parts[feature] + i * outputs.dim, reinterpret_cast<const E*>(blocks.record(row)),
                       outputs.dim, outputs.streams, OneLane{});
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
