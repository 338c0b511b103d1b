// Training lookups on the CPU: ids are grouped first, and only the distinct ones are looked up in the IDMap.
//
// An id that occurs many times in a batch is looked up once. Where each id yields one vector, the vectors are written
// in the same pipeline: while the slots of a block of ids are being loaded, so are the records of the block before it,
// and the vectors of the block before that are written.
//
// On CUDA all positions are looked up in parallel, and rows are grouped afterwards.
#pragma once

#include <algorithm>

#include "core/blocks.h"
#include "core/bounded_insert.h"
#include "core/for_each.h"
#include "core/gather.h"
#include "core/group.h"
#include "core/id_map.h"

namespace recis {

// The outputs of a lookup in which each id yields one vector.
struct PlainOutputs {
  float* const* parts;  // [ids, dim] for each feature; null: gathered later
  int64_t dim;
  bool streams;  // as in GatherBags
};

// Commits the rows of InsertKeys at the end of its scope, even if an exception ends it, because every allocated row has
// its initial values.
struct InsertCommit {
  int64_t* counters;

  ~InsertCommit() { CommitInserts{counters}(0, OneLane{}); }
};

// Ids as keys of group_cpu, for types that derive from this one: insert(id, member) returns the row of an id that may
// have none.
struct IdKeys {
  IdMapRef map;
  int64_t* counters;
  const int64_t* free_rows;  // [counters[kFree]]

  static uint64_t hash(int64_t id, int64_t member) { return slot_hash(id, member); }

  // Replaces distinct ids of a member table by their rows; insert(id, member) is called for an id that has none. Calls
  // fetch(row) for each as soon as its row is known, and found(end) for growing `end`, the last of them `count`: the
  // rows before `end` are known, and fetch was called a block ago.
  template <class Insert, class Fetch, class Found>
  void find_rows(int64_t* keys, int64_t count, int64_t member, const Insert& insert, const Fetch& fetch,
                 Found&& found) const {
    const auto ids = detail::room<int64_t>(count);
    std::copy_n(keys, count, ids.get());
    int64_t known = 0;
    FindPipeline{map}(
        count, member, [&ids](int64_t k) { return ids[k]; }, [&](int64_t k, int64_t, int64_t row) { keys[k] = row; },
        [&](int64_t end) {
          const int64_t before = known;
          for (; known < end; ++known) {
            if (__builtin_expect(keys[known] < 0, 0)) keys[known] = insert(ids[known], member);
            fetch(keys[known]);
          }
          found(before);
        });
    found(count);
  }

  // The row of an id, which gets one if it has none: created(probe, number) is called then, with the number of rows
  // created before it since the last commit. -1 if the map is full; the operator raises then.
  template <class Created>
  int64_t find_or_create(int64_t id, int64_t member, const Created& created) const {
    int64_t number = 0;
    const Probe probe = find_or_claim(map, id, member, true, [&] {
      number = fetch_add(counters + kFresh, 1);
      return fresh_row(counters, free_rows, number);
    });
    if (probe.slot == nullptr) {
      store_relaxed(reinterpret_cast<uint64_t*>(counters + kOverflow), 1);
      return -1;
    }
    if (probe.claimed) created(probe, number);
    return entry_row(probe.entry);
  }
};

// Ids as keys, of which an id without a row gets one, with its initial values. An InsertCommit must be in scope.
template <class E>
struct InsertKeys : IdKeys {
  BlocksRef blocks;
  const Initializer* initializers;  // by member table
  RecordStart start;
  PlainOutputs outputs;

  bool gathers() const { return outputs.parts != nullptr; }

  template <class Found>
  void rows(int64_t* keys, int64_t count, int64_t member, Found&& found) const {
    const auto make = [this](int64_t id, int64_t table) { return insert(id, table); };
    if (gathers()) {
      find_rows(keys, count, member, make, [this](int64_t row) __attribute__((always_inline)) { fetch(row); }, found);
    } else {
      find_rows(keys, count, member, make, [](int64_t) {}, found);
    }
  }

  // Always inlined, because the compiler treats a function that only prefetches as free of side effects and drops its
  // calls.
  __attribute__((always_inline)) void fetch(int64_t row) const {
    prefetch_bytes<false>(blocks.record(row), outputs.dim * static_cast<int64_t>(sizeof(E)));
  }

  __attribute__((always_inline)) void gather(int64_t row, int64_t feature, int64_t i) const {
    copy_vector<E, 16>(outputs.parts[feature] + i * outputs.dim, reinterpret_cast<const E*>(blocks.record(row)),
                       outputs.dim, outputs.streams, OneLane{});
  }

  __attribute__((noinline)) int64_t insert(int64_t id, int64_t member) const {
    const int64_t row = find_or_create(id, member, [&](const Probe& probe, int64_t) {
      const int64_t created = entry_row(probe.entry);
      start.template write<E>(blocks.record(created), blocks.meta(created), initializers[member], id, OneLane{});
    });
    return row < 0 ? 0 : row;  // row 0 exists if the map is full
  }
};

// A row that was created for an id.
struct CreatedRow {
  int64_t id;
  int64_t member;
  int64_t row;
  uint64_t* slot;
};

// Ids as keys, of which an id without a row gets one, whose record is still to be made: `created` lists such rows.
struct ListKeys : IdKeys {
  CreatedRow* created;  // [ids] upper bound

  bool gathers() const { return false; }

  template <class Found>
  void rows(int64_t* keys, int64_t count, int64_t member, Found&& found) const {
    const auto make = [this](int64_t id, int64_t table) {
      return find_or_create(id, table, [&](const Probe& probe, int64_t number) {
        created[number] = {id, table, entry_row(probe.entry), probe.slot};
      });
    };
    find_rows(keys, count, member, make, [](int64_t) {}, found);
  }

  void gather(int64_t, int64_t, int64_t) const {}

  // Takes the rows back that were created since the last commit; nothing else may have used the map since.
  void undo() const {
    for (int64_t i = 0; i < counters[kFresh]; ++i) UndoInserts{&created[i].slot}(0, OneLane{});
    counters[kFresh] = 0;
  }
};

}  // namespace recis
